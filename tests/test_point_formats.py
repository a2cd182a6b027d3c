"""data/point_formats.py, data/point_tiles.py: the formats of scanners and other programs give the same cloud, and large clouds go
through the network in tiles."""

import re
import struct
import sys

import numpy as np
import pytest
import torch

from data.point_files import find_clouds, list_clouds, read_cloud
from data.point_formats import check_columns, lzf_decompress
from data.point_tiles import MARGIN, part_of, split_tiles
from data.points import PointDataset, PointSpec
from tests.tiny_clouds import tiny_cloud


@pytest.fixture
def cloud():
    made = tiny_cloud(3, 60)
    return {**made, "coord": made["coord"].round(3), "intensity": np.arange(60) * 7 % 41}


def rows(cloud, *names):
    """The matrix of some of a cloud's arrays."""
    return np.column_stack([cloud[name] for name in names]).astype(np.float64)


def write_text(path, matrix, first="", separator=" "):
    lines = [separator.join(f"{value:.6g}" for value in row) for row in matrix]
    path.write_text(first + "\n".join(lines) + "\n")
    return path


def check(path, cloud, color=True, label=True, **settings):
    read = read_cloud(path, **settings)
    np.testing.assert_allclose(read.coord, cloud["coord"], atol=1e-5)
    assert (read.color is not None) == color and (read.label is not None) == label
    if color:
        np.testing.assert_array_equal(read.color, cloud["color"])
    if label:
        np.testing.assert_array_equal(read.label, cloud["segment"])
    return read


# -- text --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "first", "separator"), [
    ("a.txt", "", " "), ("a.csv", "x,y,z,R,G,B,Label\n", ","), ("a.csv", "X;Y;Z;red;green;blue;class\n", ";"),
    ("a.txt", "//X Y Z R G B Scalar_Label\n60\n", " "), ("a.txt", "# made by us\n# x y z r g b label\n", "  "),
    ("a.txt", '"x" "y" "z" "r" "g" "b" "scalar_label"\n', " "), ("a.XYZ", "\n", "\t")])
def test_text_with_and_without_header(cloud, tmp_path, name, first, separator):
    path = write_text(tmp_path / name, rows(cloud, "coord", "color", "segment"), first, separator)
    assert check(path, cloud).warnings == ()


def test_pts_begin_with_their_number_and_have_an_intensity(cloud, tmp_path):
    path = write_text(tmp_path / "a.pts", rows(cloud, "coord", "intensity", "color"), "60\n")
    read = check(path, cloud, label=False, fields=["strength"])
    np.testing.assert_array_equal(read.extra["strength"], cloud["intensity"])


def test_columns_of_the_settings_win(cloud, tmp_path):
    path = write_text(tmp_path / "a.txt", rows(cloud, "segment", "coord", "intensity", "intensity", "color"))
    columns = ("label", "x", "y", "z", "_", "intensity", "r", "g", "b")
    read = check(path, cloud, columns=columns, fields=["intensity"])
    np.testing.assert_array_equal(read.extra["intensity"], cloud["intensity"])
    np.save(tmp_path / "a.npy", rows(cloud, "segment", "coord", "intensity", "intensity", "color"))
    check(tmp_path / "a.npy", cloud, columns=columns)
    with pytest.raises(ValueError, match="9 columns, but data.columns names 8"):
        read_cloud(path, columns=columns[:-1])
    with pytest.raises(ValueError, match=r"no field ring.*there are label, x.*"):
        read_cloud(path, columns=columns, fields=["ring"])
    for wrong in (("x", "y"), ("x", "y", "z", "r", "red"), ("x", "x", "y", "z")):
        with pytest.raises(ValueError, match="data.columns"):
            check_columns(wrong)


@pytest.mark.parametrize(("text", "message"), [
    ("", "no row of numbers"), ("name,a\nb,c\n", "line 2.*not a row of numbers"), ("1 2 3 4 5\n", "columns are x y z"),
    ("1 2 3\n4 5\n", "a.txt: cannot be read"), ("1 2 3\n4 five 6\n", "a.txt: cannot be read"), ("a b c\n1 2 3\n", "no column x, y or z")])
def test_text_that_is_no_cloud(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cloud(tmp_path / "a.txt")


def test_matrices_whose_columns_are_not_what_their_number_says(cloud, tmp_path):
    for names in (("normal",), ("normal", "segment")):                  # ModelNet, ShapeNet
        np.save(tmp_path / "a.npy", rows(cloud, "coord", *names))
        read = check(tmp_path / "a.npy", cloud, color=False, label=len(names) == 2)
        np.testing.assert_allclose(read.normal, cloud["normal"], atol=1e-6)
        assert "taken as normals" in read.warnings[0] and "data.columns" in read.warnings[0]
    np.save(tmp_path / "a.npy", np.c_[rows(cloud, "coord"), np.linspace(0, 1, 60)])             # KITTI
    read = read_cloud(tmp_path / "a.npy", fields=["intensity"])
    assert read.label is None and "taken as intensity" in read.warnings[0] and read.extra["intensity"][-1] == 1
    place = np.random.default_rng(0).random((60, 3))                                            # PointNet's S3DIS
    np.save(tmp_path / "a.npy", np.c_[rows(cloud, "coord", "color"), place])
    read = check(tmp_path / "a.npy", cloud, label=False)
    assert read.normal is None and "no normals: left out" in read.warnings[0]
    np.save(tmp_path / "a.npy", rows(cloud, "coord", "color", "normal"))
    read = check(tmp_path / "a.npy", cloud, label=False)
    assert read.normal is not None and read.warnings == ()


# -- PCD ---------------------------------------------------------------------------------------------------------------

def lzf(data):
    """The simplest stream: pieces of 32 bytes as they are; of a repeated byte one reference that overlaps what it writes."""
    out = bytearray()
    for begin in range(0, len(data), 32):
        piece = data[begin:begin + 32]
        if len(piece) == 32 and len(set(piece)) == 1:
            out += bytes([0, piece[0], 7 << 5, 31 - 2 - 7, 0])
        else:
            out += bytes([len(piece) - 1]) + piece
    return bytes(out)


def write_pcd(path, cloud, form):
    packed = (cloud["color"].astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(1, dtype=np.uint32)
    row = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("pad", "<u1", 3), ("rgb", "<f4"), ("label", "<u2")])
    data = np.zeros(60, row)
    for i, name in enumerate("xyz"):
        data[name] = cloud["coord"][:, i]
    data["rgb"], data["label"] = packed.view("<f4"), cloud["segment"] + 1
    header = ("# .PCD v0.7\nVERSION 0.7\nFIELDS x y z _ rgb label\nSIZE 4 4 4 1 4 2\nTYPE F F F U F U\nCOUNT 1 1 1 3 1 1\nWIDTH 60\n"
              f"HEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 60\nDATA {form}\n")
    if form == "ascii":
        body = "\n".join(" ".join([*(f"{float(value):.9g}" for value in point["x y z".split()].tolist()), "0 0 0",
                                   f"{float(point['rgb']):.9g}", str(point["label"])]) for point in data).encode()
    elif form == "binary":
        body = data.tobytes()
    else:
        columns = b"".join(np.ascontiguousarray(data[name]).tobytes() for name in row.names)
        body = struct.pack("<II", len(lzf(columns)), len(columns)) + lzf(columns)
    path.write_bytes(header.encode() + body)
    return path


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
def test_pcd(cloud, tmp_path, form):
    read = check(write_pcd(tmp_path / "a.pcd", cloud, form), {**cloud, "segment": cloud["segment"] + 1})
    assert read.warnings == ()
    data = (tmp_path / "a.pcd").read_bytes()
    (tmp_path / "a.pcd").write_bytes(data[:-30])
    with pytest.raises(ValueError, match="a.pcd: cannot be read"):
        read_cloud(tmp_path / "a.pcd")


def test_lzf_by_hand():
    assert lzf_decompress(bytes([2]) + b"abc" + bytes([2 << 5, 2]), 7) == b"abcabca"            # 4 bytes from 3 back
    assert lzf_decompress(bytes([0]) + b"a" + bytes([7 << 5, 3, 0]), 13) == b"a" * 13           # a length of two bytes
    for wrong in (bytes([2]) + b"abc", bytes([0]) + b"a" + bytes([2 << 5, 5])):
        with pytest.raises(ValueError, match="announced|damaged"):
            lzf_decompress(wrong, 9)


# -- KITTI, Pointcept --------------------------------------------------------------------------------------------------

def test_kitti_with_labels_beside_it(cloud, tmp_path):
    folder = tmp_path / "sequences" / "00"
    for name in ("velodyne", "labels"):
        (folder / name).mkdir(parents=True)
    rows(cloud, "coord", "intensity").astype("<f4").tofile(folder / "velodyne" / "000000.bin")
    (cloud["segment"].astype("<u4") & 0xFFFF | 7 << 16).astype("<u4").tofile(folder / "labels" / "000000.label")
    (folder / "calib.txt").write_text("P0: 1 2 3\n")
    assert list_clouds(folder) == [folder / "velodyne" / "000000.bin"]
    read = check(folder / "velodyne" / "000000.bin", cloud, color=False, fields=["intensity"])
    np.testing.assert_array_equal(read.extra["intensity"], cloud["intensity"])
    np.zeros(59, "<u4").tofile(folder / "velodyne" / "000000.label")
    with pytest.raises(ValueError, match="59 labels for 60 points"):
        read_cloud(folder / "velodyne" / "000000.bin")
    assert read_cloud(folder / "velodyne" / "000000.bin", labels=False).label is None


def test_nuscenes_has_a_fifth_column(cloud, tmp_path):
    path = tmp_path / "a.bin"
    np.c_[rows(cloud, "coord", "intensity"), np.arange(60) % 32].astype("<f4").tofile(path)
    read = check(path, cloud, color=False, label=False, columns=("x", "y", "z", "intensity", "ring"), fields=["ring"])
    assert read.extra["ring"].max() == 31
    np.c_[rows(cloud, "coord", "intensity") - 1, np.arange(60)].astype("<f4").tofile(path)
    with pytest.raises(ValueError, match="a negative intensity.*data.columns"):
        read_cloud(path)
    np.zeros(13, "<f4").tofile(path)
    with pytest.raises(ValueError, match="no rows of 4 float32"):
        read_cloud(path)


@pytest.mark.parametrize("tensors", [False, True])
def test_pth_scenes_of_old_pointcept(cloud, tmp_path, tensors):
    scene = {"coord": cloud["coord"], "color": cloud["color"], "normal": cloud["normal"], "semantic_gt20": cloud["segment"]}
    if tensors:
        scene = {name: torch.from_numpy(values) for name, values in scene.items()}
    (tmp_path / "train").mkdir()
    for number in range(8):                                             # read by several threads at once
        torch.save({**scene, "scene_id": "a"}, tmp_path / "train" / f"{number}.pth")
    check(tmp_path / "train" / "0.pth", cloud)
    check(tmp_path / "train" / "0.pth", cloud, label_field="segment20")
    dataset = PointDataset(find_clouds(tmp_path, "train"), PointSpec(0.05), 3)
    assert dataset.num_points == [60] * 8 and dataset.class_counts.sum() == 8 * (cloud["segment"] >= 0).sum()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="a scene is expected, not weights"):
        read_cloud(tmp_path / "b.pth")
    torch.save({"coord": np.array([print], object)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth: .*(Python objects|damaged)"):
        read_cloud(tmp_path / "b.pth")


# -- LAS ---------------------------------------------------------------------------------------------------------------

def write_las_file(path, cloud, point_format=3, offset=(0, 0, 0), codes=None):
    laspy = pytest.importorskip("laspy")
    if path.suffix == ".laz":
        pytest.importorskip("lazrs")
    las = laspy.LasData(laspy.LasHeader(point_format=point_format, version="1.4" if point_format > 5 else "1.2"))
    las.header.scales, las.header.offsets = [0.001] * 3, offset
    las.x, las.y, las.z = (cloud["coord"].astype(np.float64) + offset).T
    if "red" in las.point_format.dimension_names:
        las.red, las.green, las.blue = (cloud["color"].astype(np.uint16) * 257).T
    las.intensity = cloud["intensity"]
    las.classification = cloud["segment"] + 1 if codes is None else codes
    las.return_number = np.resize([1, 2], len(las.points))
    las.add_extra_dim(laspy.ExtraBytesParams("planarity", "f4"))
    las.planarity = np.linspace(0, 1, len(las.points))
    las.write(path)
    return path


@pytest.mark.parametrize(("suffix", "point_format"), [(".las", 1), (".las", 3), (".laz", 3), (".las", 7), (".laz", 6)])
def test_las(cloud, tmp_path, suffix, point_format):
    path = write_las_file(tmp_path / f"a{suffix}", cloud, point_format, (448_000, 5_411_000, 300))
    read = check(path, {**cloud, "segment": cloud["segment"] + 1, "coord": cloud["coord"] - np.floor(cloud["coord"].min(0))},
                 color=point_format in (3, 7), fields=["strength", "planarity", "return_number"])
    np.testing.assert_array_equal(read.extra["strength"], cloud["intensity"])
    np.testing.assert_allclose(read.extra["planarity"], np.linspace(0, 1, 60), atol=1e-6)
    np.testing.assert_array_equal(read.extra["return_number"], np.resize([1, 2], 60))
    np.testing.assert_allclose(read.exact, cloud["coord"].astype(np.float64) + (448_000, 5_411_000, 300), atol=1e-4)
    data = path.read_bytes()
    for wrong in (data[:-100], data[:300], data[:100], b"LASF" + bytes(300), b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"a{suffix}: cannot be read"):
            read_cloud(path)


def test_las_without_laspy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "laspy", None)
    (tmp_path / "a.laz").write_bytes(b"LASF")
    with pytest.raises(ValueError, match="pip install laspy lazrs"):
        read_cloud(tmp_path / "a.laz")


# -- features ----------------------------------------------------------------------------------------------------------

def test_any_field_is_a_feature_with_its_scale(cloud, tmp_path):
    np.savez(tmp_path / "a.npz", coord=cloud["coord"], strength=cloud["intensity"], ring=cloud["segment"] + 5)
    spec = PointSpec(0.0001, features=("intensity/41", "coord", "ring"))
    item = PointDataset([tmp_path / "a.npz"], spec)[0]
    assert spec.num_channels == item["feat"].shape[1] == 5
    raw = item["feat"][item["inverse"]]
    np.testing.assert_allclose(raw[:, 0], cloud["intensity"] / 41, rtol=1e-6)
    np.testing.assert_array_equal(raw[:, 4], cloud["segment"] + 5)
    np.savez(tmp_path / "a.npz", coord=cloud["coord"], strength=np.full(60, np.nan), ring=cloud["segment"])
    with pytest.raises(ValueError, match="intensity of point 0 .60 in all. is NaN"):
        PointDataset([tmp_path / "a.npz"], spec)
    for wrong in ("intensity/0", "intensity/x", "coord/2", "a b", "colour"):
        with pytest.raises(ValueError, match="data.features"):
            PointSpec(features=(wrong,))


# -- folders and lists -------------------------------------------------------------------------------------------------

def test_nested_folders_and_what_an_empty_split_holds(tmp_path):
    for name in ("train/scene_0/room_0", "train/scene_1/room_0", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "coord.npy", np.zeros((3, 3)))
    np.save(tmp_path / "val" / "b.npy", np.zeros((3, 3)))
    (tmp_path / "val" / "notes.txt").write_text("nothing")
    assert find_clouds(tmp_path, "train") == [tmp_path / "train" / f"scene_{i}" / "room_0" for i in (0, 1)]
    assert find_clouds(tmp_path, "val") == [tmp_path / "val" / "a", tmp_path / "val" / "b.npy"]
    (tmp_path / "test" / "deep").mkdir(parents=True)
    for name in ("a.e57", "b.e57", "c.tif"):
        (tmp_path / "test" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="'test' is empty.*there are 2 .e57 files, 1 (.tif files|folders), 1 (.tif files|folders)"):
        find_clouds(tmp_path, "test")
    with pytest.raises(ValueError, match="no clouds in this folder; there are 2 .e57 files"):
        list_clouds(tmp_path / "test")


def test_split_lists_as_text(tmp_path):
    (tmp_path / "clouds").mkdir()
    for name in "abc":
        np.save(tmp_path / "clouds" / f"{name}.npy", np.zeros((3, 3)))
    (tmp_path / "train.txt").write_text("# my split\nclouds/b\n\nclouds/a.npy\n")
    (tmp_path / "rest.txt").write_text("clouds/c\n")
    assert [path.name for path in find_clouds(tmp_path, "train")] == ["a.npy", "b.npy"]
    assert [path.name for path in find_clouds(tmp_path, ["train.txt", str(tmp_path / "rest.txt")])] == ["a.npy", "b.npy", "c.npy"]
    (tmp_path / "rest.txt").write_text("clouds/d\n")
    with pytest.raises(ValueError, match="rest.txt names clouds/d"):
        find_clouds(tmp_path, "rest.txt")


# -- tiles -------------------------------------------------------------------------------------------------------------

def test_every_point_is_in_one_tile_with_its_surroundings(monkeypatch):
    monkeypatch.setattr("data.point_tiles.BLOCK", 500)
    coord = (np.random.default_rng(0).random((5000, 3)) * [100, 60, 9] + [3, -7, 0]).astype(np.float32)
    count, tiles = split_tiles(coord, 25.0)
    assert count == 12
    owner = np.zeros(5000, int)
    for number, (index, own) in enumerate(tiles, 1):
        assert (np.diff(index) > 0).all() and not owner[index[own]].any()
        owner[index[own]] = number
        low = coord[:, :2].min(0) + 25 * np.floor((coord[index[own]][0, :2] - coord[:, :2].min(0)) / 25)
        around = ((coord[:, :2] > low - 25 * MARGIN) & (coord[:, :2] < low + 25 + 25 * MARGIN)).all(1)
        np.testing.assert_array_equal(np.flatnonzero(around), index)
        assert (coord[index[own], :2] >= low - 1e-4).all() and (coord[index[own], :2] <= low + 25 + 1e-4).all()
    assert owner.all()
    with pytest.raises(ValueError, match="too many; take a larger --tile"):
        split_tiles(coord, 1e-4)


def test_a_part_keeps_all_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **tiny_cloud(0, 40), ring=np.arange(40))
    part = part_of(read_cloud(tmp_path / "a.npz", fields=["ring"]), np.array([3, 9]))
    assert part.coord.shape == part.color.shape == part.normal.shape == (2, 3) and len(part.label) == 2
    assert part.extra["ring"].tolist() == [3, 9] and not re.search("a.npz", str(part.warnings))
