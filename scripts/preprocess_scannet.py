"""ScanNet v2 as downloaded -> one folder of .npy files a scene, with the labels of ScanNet20 and ScanNet200.

    python scripts/preprocess_scannet.py RAW datasets/scannet --splits SPLITS --num-workers 8

RAW holds scans/ (and scans_test/) with, for each scene, NAME_vh_clean_2.ply, NAME_vh_clean_2.0.010000.segs.json and
NAME.aggregation.json, and scannetv2-labels.combined.tsv. SPLITS holds scannetv2_train.txt, scannetv2_val.txt and, if
wanted, scannetv2_test.txt (from ScanNet's repository, Tasks/Benchmark).
Written: OUT/{train,val,test}/SCENE/{coord,color,normal,segment20,segment200,instance}.npy; test scenes have no labels.
Scenes stay in the scan's own frame (no axis alignment), as in Pointcept's version of the data; -1 means no class.
Finished scenes are left alone, so that a broken run goes on where it stopped.
"""

import csv
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.mesh_io import read_mesh  # noqa: E402
from data.point_classes import BENCHMARKS  # noqa: E402
from data.point_files import COLUMNS, read_ply_vertices, write_cloud  # noqa: E402
from utils.checkpoint import check_writable  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.log import progress  # noqa: E402

LABEL_TABLE = "scannetv2-labels.combined.tsv"
COLUMN = {"scannet20": "nyu40id", "scannet200": "id"}           # of the label table


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(V, 3) float32: the mean of the normals of a vertex' faces, weighted by their areas; zero without faces."""
    corner = vertices[faces]                                                            # (F, 3, 3)
    cross = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])          # length: twice the area
    normal = np.stack([np.bincount(faces.ravel(), np.repeat(cross[:, axis], 3), len(vertices)) for axis in range(3)], 1)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return (normal / np.where(length > 0, length, 1)).astype(np.float32)


def read_label_table(path: Path) -> dict[str, dict[str, int]]:
    """{benchmark: {raw category: label}} for the categories that are classes of the benchmark."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or any(column not in rows[0] for column in ("raw_category", *COLUMN.values())):
        raise ValueError(f"{path}: expected columns raw_category, {', '.join(COLUMN.values())}; is it ScanNet's table?")
    table = {}
    for benchmark, column in COLUMN.items():
        label = {str(number): index for index, number in enumerate(BENCHMARKS[benchmark].ids)}
        table[benchmark] = {row["raw_category"]: label[row[column]] for row in rows if row[column] in label}
    return table


def vertex_labels(folder: Path, num_vertices: int, table: Mapping[str, Mapping[str, int]]) -> dict[str, np.ndarray]:
    """segment20, segment200 and instance, (V,) int64 each: segment -> object -> raw category -> label, else -1."""
    file = folder / f"{folder.name}_vh_clean_2.0.010000.segs.json"
    segment = np.array(json.loads(file.read_text())["segIndices"])
    if segment.shape != (num_vertices,):
        raise ValueError(f"{file}: {len(segment)} segments for {num_vertices} vertices; are the files of one release?")
    groups = json.loads((folder / f"{folder.name}.aggregation.json").read_text())["segGroups"]
    arrays = {name: np.full(num_vertices, -1, np.int64) for name in ("segment20", "segment200", "instance")}
    for group in groups:
        inside = np.isin(segment, group["segments"])
        arrays["instance"][inside] = group["objectId"]
        for benchmark, labels in table.items():
            arrays[BENCHMARKS[benchmark].field][inside] = labels.get(group["label"], -1)
    return arrays


def convert(job: tuple[Path, Path, bool], table: Mapping[str, Mapping[str, int]]) -> int:
    """Write one scene -> its number of points (0: it was there)."""
    folder, out, labelled = job
    if out.exists():
        return 0
    path = folder / f"{folder.name}_vh_clean_2.ply"
    mesh, columns = read_mesh(path), read_ply_vertices(path)
    arrays = {"coord": mesh.vertices.astype(np.float32),
              "color": np.stack([columns[name] for name in COLUMNS["color"]], 1).astype(np.uint8),
              "normal": vertex_normals(mesh.vertices, mesh.faces)}
    write_cloud(out, **arrays, **(vertex_labels(folder, len(mesh.vertices), table) if labelled else {}))
    return len(mesh.vertices)


def find_jobs(raw: Path, out: Path, splits: Path) -> list[tuple[Path, Path, bool]]:
    """(scene folder, where to write, whether it has labels) of all scenes of the split lists."""
    jobs, missing = [], []
    for split in ("train", "val", "test"):
        file = splits / f"scannetv2_{split}.txt"
        if not file.is_file() and split != "test":
            raise FileNotFoundError(f"--splits: {file} is missing; it is in ScanNet's repository, Tasks/Benchmark")
        for name in file.read_text().split() if file.is_file() else ():
            folder = raw / ("scans_test" if split == "test" else "scans") / name
            jobs.append((folder, out / split / name, split != "test"))
            if not (folder / f"{name}_vh_clean_2.ply").is_file():
                missing.append(folder)
    if missing:
        raise ValueError(f"{missing[0]} has no {missing[0].name}_vh_clean_2.ply (and {len(missing) - 1} more of "
                         f"{len(jobs)} scenes of the split lists); finish the download or shorten the lists")
    return jobs


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="folder with scans/ and the label table")
    parser.add_argument("out", type=Path)
    parser.add_argument("--splits", type=Path, required=True, help="folder with scannetv2_train.txt ...")
    parser.add_argument("--num-workers", type=int, default=4)
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = parse_args(argv)
    jobs = find_jobs(args.raw, args.out, args.splits)
    check_writable(args.out)
    work = partial(convert, table=read_label_table(args.raw / LABEL_TABLE))
    if args.num_workers > 1:
        with ProcessPoolExecutor(args.num_workers) as pool:
            counts = list(progress(pool.map(work, jobs), "scenes", len(jobs)))
    else:
        counts = [work(job) for job in progress(jobs, "scenes")]
    print(f"{sum(count > 0 for count in counts)} scenes written, {counts.count(0)} were there, {sum(counts):,} points")
    return {"scenes": len(counts), "points": sum(counts)}


if __name__ == "__main__":
    run_main(main)
