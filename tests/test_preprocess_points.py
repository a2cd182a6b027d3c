"""scripts/preprocess_scannet.py and preprocess_s3dis.py on made-up downloads; the class lists."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.point_classes import BENCHMARKS
from data.point_files import find_clouds, read_cloud
from data.points import PointDataset, PointSpec
from scripts import preprocess_s3dis, preprocess_scannet

ROOT = Path(__file__).resolve().parents[1]


def test_class_lists():
    assert {name: len(benchmark.names) for name, benchmark in BENCHMARKS.items()} == {"scannet20": 20, "scannet200": 200,
                                                                                     "s3dis": 13}
    for name in ("scannet20", "scannet200"):
        names, ids, _ = BENCHMARKS[name]
        assert len(set(names)) == len(names) == len(ids) and list(ids) == sorted(set(ids))
    assert BENCHMARKS["scannet20"].ids[-8:] == (14, 16, 24, 28, 33, 34, 36, 39)
    assert BENCHMARKS["scannet20"].names[1] == "floor" and BENCHMARKS["scannet200"].names[1:3] == ("chair", "floor")
    assert BENCHMARKS["scannet200"].ids[-1] == 1191 and BENCHMARKS["scannet200"].names[-1] == "mattress"
    assert BENCHMARKS["scannet200"].ids[BENCHMARKS["scannet200"].names.index("toilet")] == 17


# -- ScanNet -----------------------------------------------------------------------------------------------------------

VERTICES = np.float32([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 1], [5, 5, 5]])
FACES = [[0, 1, 2], [0, 3, 1]]              # area 2 with normal +z, area 1 with normal +y; vertex 4 has no face
COLORS = np.uint8([[10, 20, 30], [1, 2, 3], [4, 5, 6], [7, 8, 9], [255, 0, 128]])


def make_scene(folder, segments=(1, 1, 2, 3, 4)):
    folder.mkdir(parents=True)
    types = [(n, "<f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue", "alpha")]
    rows = np.empty(5, types)
    for i, name in enumerate("xyz"):
        rows[name] = VERTICES[:, i]
    for i, name in enumerate(("red", "green", "blue")):
        rows[name] = COLORS[:, i]
    words = ["float"] * 3 + ["uchar"] * 4
    header = ["ply", "format binary_little_endian 1.0", "element vertex 5",
              *(f"property {w} {t[0]}" for w, t in zip(words, types, strict=True)), "element face 2",
              "property list uchar int vertex_indices", "end_header\n"]
    faces = b"".join(b"\3" + np.array(face, "<i4").tobytes() for face in FACES)
    (folder / f"{folder.name}_vh_clean_2.ply").write_bytes("\n".join(header).encode() + rows.tobytes() + faces)
    (folder / f"{folder.name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": list(segments)}))
    groups = [{"objectId": 0, "segments": [1], "label": "office chair"}, {"objectId": 1, "segments": [2], "label": "floor"},
              {"objectId": 2, "segments": [3], "label": "never heard of"}]
    (folder / f"{folder.name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))


@pytest.fixture
def scannet(tmp_path):
    raw = tmp_path / "raw"
    for name in ("scans/scene0000_00", "scans/scene0001_00", "scans_test/scene0707_00"):
        make_scene(raw / name)
    (raw / preprocess_scannet.LABEL_TABLE).write_text(
        "id\traw_category\tcategory\tnyu40id\n10\toffice chair\tx\t5\n3\tfloor\tx\t2\n400\tnever heard of\tx\t40\n")
    splits = tmp_path / "splits"
    splits.mkdir()
    for split, name in (("train", "scene0000_00"), ("val", "scene0001_00"), ("test", "scene0707_00")):
        (splits / f"scannetv2_{split}.txt").write_text(f"{name}\n")
    return raw, tmp_path / "out", splits


def run_scannet(paths):
    raw, out, splits = map(str, paths)
    return preprocess_scannet.main([raw, out, "--splits", splits, "--num-workers", "1"])


def test_scannet_scene(scannet):
    assert run_scannet(scannet) == {"scenes": 3, "points": 15}
    out = scannet[1]
    scene = {path.stem: np.load(path) for path in (out / "train" / "scene0000_00").iterdir()}
    assert {name: (str(v.dtype), v.shape) for name, v in scene.items()} == {
        "coord": ("float32", (5, 3)), "color": ("uint8", (5, 3)), "normal": ("float32", (5, 3)),
        "segment20": ("int64", (5,)), "segment200": ("int64", (5,)), "instance": ("int64", (5,))}
    np.testing.assert_array_equal(scene["coord"], VERTICES)                              # the scan's own frame
    np.testing.assert_array_equal(scene["color"], COLORS)
    np.testing.assert_allclose(scene["normal"][:4], np.array([[0, 1, 2], [0, 1, 2], [0, 0, 5 ** 0.5], [0, 5 ** 0.5, 0]])
                               / 5 ** 0.5, atol=1e-6)                                    # weights 2 : 1 by area
    assert scene["normal"][4].tolist() == [0, 0, 0]
    chair20, floor20 = BENCHMARKS["scannet20"].names.index("chair"), BENCHMARKS["scannet20"].names.index("floor")
    names200 = BENCHMARKS["scannet200"].names
    office_chair = names200.index("office chair")
    assert scene["segment20"].tolist() == [chair20, chair20, floor20, -1, -1]
    assert scene["segment200"].tolist() == [office_chair, office_chair, names200.index("floor"), -1, -1]
    assert scene["instance"].tolist() == [0, 0, 1, 2, -1]
    assert sorted(path.stem for path in (out / "test" / "scene0707_00").iterdir()) == ["color", "coord", "normal"]
    dataset = PointDataset(find_clouds(out, "val"), PointSpec(), 20, label_field="segment20")
    assert dataset.class_counts[[chair20, floor20]].tolist() == [2, 1] and ["1 of 5 normals" in line for line in dataset.notes] == [True]


def test_scannet_goes_on_where_it_stopped(scannet):
    run_scannet(scannet)
    kept = scannet[1] / "val" / "scene0001_00" / "coord.npy"
    time, gone = kept.stat().st_mtime_ns, scannet[1] / "train" / "scene0000_00"
    for path in gone.iterdir():
        path.unlink()
    gone.rmdir()
    assert run_scannet(scannet) == {"scenes": 3, "points": 5}
    assert kept.stat().st_mtime_ns == time and (gone / "coord.npy").is_file()


def test_scannet_mistakes_are_one_line(scannet):
    raw, out, splits = scannet
    (splits / "scannetv2_train.txt").write_text("scene0000_00\nscene0009_00\n")
    with pytest.raises(ValueError, match="scene0009_00 has no scene0009_00_vh_clean_2.ply"):
        run_scannet(scannet)
    (splits / "scannetv2_train.txt").unlink()
    with pytest.raises(FileNotFoundError, match="--splits.*scannetv2_train.txt is missing"):
        run_scannet(scannet)
    (splits / "scannetv2_train.txt").write_text("scene0002_00\n")
    make_scene(raw / "scans" / "scene0002_00", segments=(1, 2))
    with pytest.raises(ValueError, match="2 segments for 5 vertices"):
        run_scannet(scannet)
    assert not (out / "train" / "scene0002_00").exists()
    (raw / preprocess_scannet.LABEL_TABLE).write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="expected columns raw_category"):
        run_scannet(scannet)


# -- S3DIS -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def s3dis(tmp_path):
    raw = tmp_path / "raw"
    notes = raw / "Area_1" / "office_1" / "Annotations"
    notes.mkdir(parents=True)
    (notes / "chair_1.txt").write_text("0 0 0 1 2 3\n4.0 0 0 4 5 6\n")
    (notes / "stairs_1.txt").write_bytes(b"0.0 2.0 1.0 7.0 8.0 9.0\r\n")
    (notes / "ceiling_1.txt").write_bytes(b"4 2 3 185\x10187 9\n1 1 3 2\x1055 1 1\n")     # stray bytes: a blank; nothing
    (raw / "Area_1" / "Area_1_alignmentAngle.txt").write_text("## room angle\noffice_1 90\n")
    return raw, tmp_path / "out"


def run_s3dis(paths, *flags):
    return preprocess_s3dis.main([*map(str, paths), "--areas", "1", "--num-workers", "1", *flags])


def test_s3dis_room(s3dis):
    assert run_s3dis(s3dis) == {"rooms": 1, "points": 5}
    folder = s3dis[1] / "Area_1" / "office_1"
    room = {path.stem: np.load(path) for path in folder.iterdir()}
    assert {name: (str(v.dtype), v.shape) for name, v in room.items()} == {
        "coord": ("float32", (5, 3)), "color": ("uint8", (5, 3)), "normal": ("float32", (5, 3)),
        "segment": ("int16", (5, 1)), "instance": ("int16", (5, 1))}
    names = [BENCHMARKS["s3dis"].names[i] for i in room["segment"][:, 0]]
    assert names == ["ceiling", "ceiling", "chair", "chair", "clutter"]                  # stairs are clutter
    assert room["instance"][:, 0].tolist() == [0, 0, 1, 1, 2]
    assert room["color"][:2].tolist() == [[185, 187, 9], [255, 1, 1]] and room["coord"][4].tolist() == [0, 2, 1]
    cloud = read_cloud(folder)
    assert cloud.label.tolist() == room["segment"][:, 0].tolist() and cloud.normal is not None
    assert run_s3dis(s3dis) == {"rooms": 1, "points": 0}                                 # already there


def test_s3dis_rooms_are_turned_about_their_middle(s3dis):
    run_s3dis(s3dis, "--align-angle", "--normals", "none")
    coord = np.load(s3dis[1] / "Area_1" / "office_1" / "coord.npy")
    np.testing.assert_allclose(coord[2:4], [[1, 3, 0], [1, -1, 0]], atol=1e-6)           # 90 degrees clockwise about (2, 1)
    assert not (s3dis[1] / "Area_1" / "office_1" / "normal.npy").exists()


def test_s3dis_mistakes_are_one_line(s3dis):
    raw, out = s3dis
    with pytest.raises(ValueError, match="Area_2: no ROOM/Annotations"):
        preprocess_s3dis.main([str(raw), str(out), "--areas", "2", "--num-workers", "1"])
    (raw / "Area_1" / "Area_1_alignmentAngle.txt").write_text("# none\n")
    with pytest.raises(ValueError, match="no angle for office_1"):
        run_s3dis(s3dis, "--align-angle")
    chair = raw / "Area_1" / "office_1" / "Annotations" / "chair_1.txt"
    for text, message in (("1 2 3 4 5 6\n1 2 3\n", "chair_1.txt, line 2: b'1 2 3'"),
                          ("1 2 3 4 5 x\n", "line 1"), ("1 2 3 400 5 6\n", "colours from 1 to 400")):
        chair.write_text(text)
        with pytest.raises(ValueError, match=message):
            run_s3dis(s3dis)
    assert not out.exists() or not list(out.rglob("*.npy"))


def test_scripts_run_from_anywhere(tmp_path):
    """One of the two: they find the repository by the same line."""
    lines = [(ROOT / "scripts" / f"preprocess_{name}.py").read_text().splitlines() for name in ("scannet", "s3dis")]
    assert all("sys.path.insert(0, str(Path(__file__).resolve().parents[1]))" in text for text in lines)
    result = subprocess.run([sys.executable, ROOT / "scripts" / "preprocess_s3dis.py", "--help"], cwd=tmp_path,
                            text=True, capture_output=True, check=True)
    assert "datasets/s3dis" in result.stdout
