"""S3DIS (Stanford3dDataset_v1.2) as downloaded -> one folder of .npy files a room.

    python scripts/preprocess_s3dis.py Stanford3dDataset_v1.2 datasets/s3dis --align-angle --num-workers 4

RAW holds Area_1 ... Area_6, in them a folder a room with Annotations/CLASS_NUMBER.txt (x y z r g b a line).
Written: OUT/Area_k/ROOM/{coord,color,normal,segment,instance}.npy. Unknown classes (stairs) become clutter. Lines
with a stray byte (the release has a few) are repaired where that gives six numbers; anything else is an error.
--align-angle turns each room about its middle by the area's Area_k_alignmentAngle.txt, as the official data does.
--normals: estimate them from neighbouring points (the raw files have none; the official data takes them from meshes of
another download, which this script does not read), or write none.
Finished rooms are left alone, so that a broken run goes on where it stopped.
"""

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.columns import parse_numbers  # noqa: E402
from data.point_classes import BENCHMARKS  # noqa: E402
from data.point_files import write_cloud  # noqa: E402
from data.point_normals import estimate_normals  # noqa: E402
from data.point_transforms import rotate  # noqa: E402
from utils.checkpoint import check_writable  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.log import progress  # noqa: E402

CLASSES = BENCHMARKS["s3dis"].names
STRAY = re.compile(rb"[^0-9eE+\-. \t\r\n]")


def read_annotation(path: Path) -> np.ndarray:
    """(N, 6) float64 x y z r g b. ValueError names the first line that cannot be repaired."""
    data = path.read_bytes()
    parsed = parse_numbers(data, np.float64)
    if parsed is None or not np.isin(parsed[1], (0, 6)).all():
        lines = []
        for number, line in enumerate(data.split(b"\n"), 1):
            candidates = (STRAY.sub(filler, line) for filler in (b" ", b""))
            numbers = next((words for words in map(_to_numbers, candidates) if len(words) in (0, 6)), None)
            if numbers is None:
                raise ValueError(f"{path}, line {number}: {line[:60]!r} is not x y z r g b; correct it by hand")
            lines += numbers
        points = np.array(lines, np.float64).reshape(-1, 6)
    else:
        points = parsed[0].reshape(-1, 6)
    if not np.isfinite(points).all():
        raise ValueError(f"{path}: a NaN or infinite number in point {np.argmin(np.isfinite(points).all(1))}; correct "
                         f"it by hand")
    return points


def _to_numbers(line: bytes) -> list[float]:
    try:
        return [float(word) for word in line.split()]
    except ValueError:
        return [np.nan]                                         # one number: no line of a cloud


def read_angles(path: Path) -> dict[str, float]:
    """{room: degrees} of Area_k_alignmentAngle.txt (lines "room degrees", comments with #)."""
    words = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    try:
        return {room: float(degrees) for room, degrees in words}
    except ValueError:
        raise ValueError(f"{path}: expected lines 'room degrees' (comments begin with #); download it again") from None


def convert(job: tuple[Path, Path, float], normals: str) -> int:
    """Write one room -> its number of points (0: it was there)."""
    room, out, angle = job
    if out.exists():
        return 0
    rows, segment, instance = [], [], []
    for number, path in enumerate(sorted((room / "Annotations").glob("*.txt"))):
        points = read_annotation(path)
        name = path.stem.split("_")[0]
        rows.append(points)
        segment.append(np.full(len(points), CLASSES.index(name if name in CLASSES else "clutter"), np.int16))
        instance.append(np.full(len(points), number, np.int16))
    if not rows or not sum(map(len, rows)):
        raise ValueError(f"{room}: no points in Annotations/*.txt; is the download complete?")
    points = np.concatenate(rows)
    coord = points[:, :3].astype(np.float32)
    if angle:
        coord = rotate({"coord": coord}, -angle)["coord"]
    if not (points[:, 3:].min() >= 0 and points[:, 3:].max() <= 255):
        raise ValueError(f"{room}: colours from {points[:, 3:].min():g} to {points[:, 3:].max():g}; expected 0..255")
    arrays = {"coord": coord, "color": points[:, 3:].astype(np.uint8), "segment": np.concatenate(segment)[:, None],
              "instance": np.concatenate(instance)[:, None]}
    if normals == "estimate":
        arrays["normal"] = estimate_normals(coord)
    write_cloud(out, **arrays)
    return len(coord)


def find_jobs(raw: Path, out: Path, areas: list[int], align: bool) -> list[tuple[Path, Path, float]]:
    """(room folder, where to write, degrees) of all rooms."""
    jobs = []
    for area in (f"Area_{number}" for number in areas):
        rooms = sorted(path.parent for path in (raw / area).glob("*/Annotations"))
        if not rooms:
            raise ValueError(f"{raw / area}: no ROOM/Annotations folders; give the folder that holds Area_1 ... Area_6")
        angles = read_angles(raw / area / f"{area}_alignmentAngle.txt") if align else {}
        if align and (lacking := [room.name for room in rooms if room.name not in angles]):
            raise ValueError(f"{area}_alignmentAngle.txt has no angle for {', '.join(lacking[:3])}")
        jobs += [(room, out / area / room.name, angles.get(room.name, 0.0)) for room in rooms]
    return jobs


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="folder with Area_1 ... Area_6")
    parser.add_argument("out", type=Path)
    parser.add_argument("--areas", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--align-angle", action="store_true", help="turn rooms by Area_k_alignmentAngle.txt")
    parser.add_argument("--normals", choices=["estimate", "none"], default="estimate")
    parser.add_argument("--num-workers", type=int, default=2)
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = parse_args(argv)
    jobs = find_jobs(args.raw, args.out, args.areas, args.align_angle)
    check_writable(args.out)
    work = partial(convert, normals=args.normals)
    if args.num_workers > 1:
        with ProcessPoolExecutor(args.num_workers) as pool:
            counts = list(progress(pool.map(work, jobs), "rooms", len(jobs)))
    else:
        counts = [work(job) for job in progress(jobs, "rooms")]
    print(f"{sum(count > 0 for count in counts)} rooms written, {counts.count(0)} were there, {sum(counts):,} points")
    return {"rooms": len(counts), "points": sum(counts)}


if __name__ == "__main__":
    run_main(main)
