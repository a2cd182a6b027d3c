"""data/point_formats.py, data/point_tiles.py: the formats of scanners and other programs give the same cloud, and large clouds go
through the network in tiles."""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import predict
import train_sonata
from data.point_files import find_clouds, list_clouds, read_cloud, read_ply_vertices, write_ply
from data.point_formats import check_columns, lzf_decompress, matrix_columns, write_las
from data.point_tiles import MARGIN, part_of, split_tiles
from data.points import PointDataset, PointSpec
from tests.tiny_clouds import ENCODER, tiny_cloud, write_config
from utils import point_scripts
from utils.log import read_log
from utils.point_scripts import items_of_piece


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
    ("a.txt", "//X Y Z R G B Scalar_Label\n60\n", " "), ("a.txt", "X Y Z R G B Label\n60\n", " "), ("a.txt", "# made by us\n# x y z r g b label\n", "  "),
    ("a.txt", '"x" "y" "z" "r" "g" "b" "scalar_label"\n', " "), ("a.XYZ", "\n", "\t")])
def test_text_with_and_without_header(cloud, tmp_path, name, first, separator):
    path = write_text(tmp_path / name, rows(cloud, "coord", "color", "segment"), first, separator)
    assert check(path, cloud).warnings == ()


@pytest.mark.parametrize("columns", [(), ("x", "y", "z", "r", "g", "b", "label")])
@pytest.mark.parametrize("first", ["", "x y z r g b label\n", "# in Metern \u00fcber NN\n# x y z r g b label\n"])
def test_text_of_windows_programs(cloud, tmp_path, first, columns):
    """A byte order mark, line ends of two bytes and letters of another encoding: no point is lost."""
    path = write_text(tmp_path / "a.txt", rows(cloud, "coord", "color", "segment"), first)
    text = path.read_text().replace("\n", "\r\n")
    for data in (b"\xef\xbb\xbf" + text.encode(), text.encode("cp1252"), text.encode("utf-16")):
        path.write_bytes(data)
        check(path, cloud, columns=columns)


def test_pandas_numbers_columns_without_names(cloud, tmp_path):
    """pandas.DataFrame(array).to_csv(path, index=False): the numbers are no point."""
    path = write_text(tmp_path / "a.csv", rows(cloud, "coord", "color", "segment"), "0,1,2,3,4,5,6\n", ",")
    assert check(path, cloud).warnings == (f"{path}: its first line counts the columns from 0, so it is taken as a header",)
    check(path, cloud, columns=("x", "y", "z", "r", "g", "b", "label"))


def test_a_header_of_other_columns_is_no_guess(cloud, tmp_path):
    """R writes no name for the numbers of its rows; names with blanks in them are several."""
    table = np.c_[np.arange(60), rows(cloud, "coord", "color")]
    for first, matrix in (("x y z r g b\n", table), ("//X Y Z Number of Returns Classification\n", table[:, :6]),
                          ("name x y z r g b label\n", table)):
        path = write_text(tmp_path / "a.txt", matrix, first)
        with pytest.raises(ValueError, match="a.txt: .*columns, but its header names .*data.columns"):
            read_cloud(path)
    path = write_text(tmp_path / "a.txt", rows(cloud, "coord", "color"), "# the columns are x y z and colours\n")
    check(path, cloud, label=False)
    check(write_text(tmp_path / "a.txt", table, "x y z r g b\n"), cloud, label=False,
          columns=("_", "x", "y", "z", "r", "g", "b"))


def test_semantic3d_has_its_labels_in_another_file(cloud, tmp_path):
    path = write_text(tmp_path / "a.txt", rows(cloud, "coord", "intensity", "color"))
    np.savetxt(tmp_path / "a.labels", cloud["segment"], "%d")
    read = check(path, cloud, fields=["intensity"])
    np.testing.assert_array_equal(read.extra["intensity"], cloud["intensity"])
    assert read.warnings == () and read_cloud(path, labels=False).label is None
    write_text(tmp_path / "a.txt", rows(cloud, "coord", "color"), "x y z r g b\n")
    check(path, cloud)
    (tmp_path / "a.labels").write_text("1\n")
    with pytest.raises(ValueError, match="a.labels has 1 labels for 60 points"):
        read_cloud(path)


def test_fewer_points_than_announced(cloud, tmp_path):
    path = write_text(tmp_path / "a.pts", rows(cloud, "coord", "intensity", "color"), "61\n")
    with pytest.raises(ValueError, match="a.pts: cannot be read .*60 of 61 points"):
        read_cloud(path)


def test_names_of_cloudcompare(cloud, tmp_path):
    """Colours from 0 to 1 have names of their own; a scalar field beside the columns that it was made from is second."""
    path = write_text(tmp_path / "a.txt", np.c_[cloud["coord"], cloud["color"] / 255, cloud["segment"]], "//X Y Z Rf Gf Bf Label\n")
    np.testing.assert_allclose(read_cloud(path).color, cloud["color"], atol=0.1)
    path = write_text(tmp_path / "a.txt", np.c_[rows(cloud, "coord", "color", "segment"), cloud["coord"] + 9, 255 - cloud["color"]],
                      "//X Y Z R G B Label scalar_X scalar_Y scalar_Z scalar_Red scalar_G scalar_Blue\n")
    check(path, cloud)
    table = np.loadtxt(path, skiprows=1)
    names = path.read_text().split("\n")[0].lstrip("/").split()
    np.save(tmp_path / "a.npy", np.rec.fromarrays(table.T, names=names))
    check(tmp_path / "a.npy", cloud)


def test_structured_arrays_of_three_columns(cloud, tmp_path):
    table = np.zeros(60, [("xyz", "f4", 3), ("rgb", "u1", 3), ("class", "i4")])
    table["xyz"], table["rgb"], table["class"] = cloud["coord"], cloud["color"], cloud["segment"]
    np.save(tmp_path / "a.npy", table)
    check(tmp_path / "a.npy", cloud)


def test_labels_under_two_names_are_a_doubt(cloud, tmp_path):
    """Paris-Lille-3D has objects under label, and classes under class."""
    np.savez(tmp_path / "a.npz", coord=cloud["coord"], label=np.arange(60), **{"class": cloud["segment"]})
    table = np.c_[rows(cloud, "coord"), np.arange(60), cloud["segment"]]
    for path in (tmp_path / "a.npz", write_text(tmp_path / "a.txt", table, "x y z label class\n")):
        read = read_cloud(path)
        assert read.label.tolist() == list(range(60))
        assert [line for line in read.warnings if "labels in label, class: label is taken; data.label_field" in line]
        check(path, cloud, color=False, label_field="class")
        assert read_cloud(path, label_field="class").warnings == read_cloud(path, labels=False).warnings == ()


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
    (tmp_path / "a.pcd").write_bytes(data.replace(b"POINTS 60", b"POINTS 59"))
    if form == "ascii":                                                 # the count is wrong: no point is lost without a word
        with pytest.raises(ValueError, match="60 of 59 points"):
            read_cloud(tmp_path / "a.pcd")
    (tmp_path / "a.pcd").write_bytes(data[:-30])
    with pytest.raises(ValueError, match="a.pcd: cannot be read"):
        read_cloud(tmp_path / "a.pcd")


def test_pcd_colours_as_numbers_and_as_nan(cloud, tmp_path):
    """ASCII files have the bits of a floating-point number, or the whole number itself; NaN has lost them."""
    path = write_pcd(tmp_path / "a.pcd", cloud, "ascii")
    *head, body = path.read_text().partition("DATA ascii\n")
    packed = (cloud["color"].astype(int) * [1 << 16, 1 << 8, 1]).sum(1)
    for number, message in (("{:.9g}", None), ("nan", "rgb of 60 points is NaN")):
        lines = [line.split() for line in body.split("\n")]
        lines = [" ".join([*line[:6], number.format(float(value)), line[7]]) for line, value in zip(lines, packed, strict=False)]
        path.write_text("".join(head) + "\n".join(lines))
        if message is None:
            check(path, {**cloud, "segment": cloud["segment"] + 1})
        else:
            with pytest.raises(ValueError, match=message):
                read_cloud(path)


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
    torch.save({**scene, "semantic_gt20": cloud["segment"].tolist()}, tmp_path / "b.pth")
    check(tmp_path / "b.pth", cloud)
    torch.save({"coord": scene["coord"], "colors": scene["color"], "labels": scene["semantic_gt20"]}, tmp_path / "b.pth")
    check(tmp_path / "b.pth", cloud)
    for unknown in (torch.zeros(4, 3, dtype=torch.bfloat16), torch.eye(3).to_sparse()):
        torch.save({"coord": unknown}, tmp_path / "b.pth")
        with pytest.raises(ValueError, match="b.pth: cannot be read"):
            read_cloud(tmp_path / "b.pth")
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
    if point_format < 6:
        las.scan_angle_rank = np.arange(len(las.points)) % 41 - 20
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
    many = data[:100] + b"\xff\xff\xff\x7f" + data[104:]               # 2 billion records of the header: not made one by one
    for wrong in (data[:-100], data[:300], data[:100], b"LASF" + bytes(300), b"", many):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"a{suffix}: cannot be read"):
            read_cloud(path)


def test_las_of_a_format_with_colours_but_without_any(cloud, tmp_path):
    path = write_las_file(tmp_path / "a.las", {**cloud, "color": np.zeros_like(cloud["color"])}, 3)
    assert read_cloud(path).color is None and read_cloud(path).warnings == ()


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


def test_raw_scannet_is_no_set_of_clouds(tmp_path, cloud):
    """The labels are a second PLY, whose colours are the classes: what learns from it learns nothing."""
    for name in ("scene_vh_clean_2.ply", "scene_vh_clean_2.labels.ply"):
        (tmp_path / "train" / "scene").mkdir(parents=True, exist_ok=True)
        write_ply(tmp_path / "train" / "scene" / name, cloud["coord"], cloud["color"])
    for find in (lambda: find_clouds(tmp_path, "train"), lambda: list_clouds(tmp_path)):
        with pytest.raises(ValueError, match=r"clean_2.labels.ply: the labels of another cloud.*preprocess_scannet.py"):
            find()
    (tmp_path / "train" / "scene" / "scene_vh_clean_2.ply").unlink()
    assert len(find_clouds(tmp_path, "train")) == 1
    with pytest.raises(ValueError, match="no split is named"):
        find_clouds(tmp_path, [])


def test_linked_folders_are_read_once(tmp_path):
    for name in ("store/Area_1/room_0", "store/Area_2/room_0", "train/own/room_0", "val/room_0"):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "coord.npy", np.zeros((3, 3)))
    for link, target in (("Area_1", "store/Area_1"), ("Area_1_again", "store/Area_1"), ("own/loop", "train"), ("own/up", ".")):
        (tmp_path / "train" / link).symlink_to(tmp_path / target)
    found = find_clouds(tmp_path, "train")
    assert len(found) == 2 and {path.resolve() for path in found} == {tmp_path / "store" / "Area_1" / "room_0", tmp_path / "train/own/room_0"}
    (tmp_path / "val" / "room_0" / "coord.npy").unlink()
    (tmp_path / "val" / "room_0" / "linked").symlink_to(tmp_path / "store")
    assert len(find_clouds(tmp_path, "val")) == 2


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


# -- whole runs --------------------------------------------------------------------------------------------------------

def write_tiles(root, splits):
    """Floors with boxes and balls as LAS tiles at map coordinates: classes 2, 6 and 64."""
    for split, seeds in splits.items():
        (root / split).mkdir()
        for seed in seeds:
            made = tiny_cloud(seed, 400)
            made["intensity"] = 100 * (made["segment"] + 2)
            write_las_file(root / split / f"tile_{seed}.las", made, 7, (448_000, 5_411_000, 300),
                           np.array([2, 6, 64, 7])[made["segment"]])


@pytest.fixture(scope="module")
def las_run(tmp_path_factory):
    """A network trained on LAS tiles: (folder with train, val and new, checkpoint)."""
    pytest.importorskip("laspy")
    root = tmp_path_factory.mktemp("las")
    write_tiles(root, {"train": range(4), "val": range(50, 52), "new": [90]})
    encoder = {**ENCODER, "in_channels": 7}
    config = write_config(root / "config.yaml", root, data={"root": str(root), "grid_size": 0.05, "label_map": "2:0,6:1,64:2,7:ignore",
                                                       "features": ["coord", "color", "intensity/1000"]},
                          model={"encoder": encoder}, training={"epochs": 1, "steps": 24, "eval_epochs": 2, "batch_size": 2,
                                                                "class_weights": "sqrt_median_frequency"})
    result = train_sonata.main([config, "--device", "cpu", "--num-workers", "0", "--output-dir", str(root / "run")])
    return root, root / "run" / "model" / "model_last.pth", result


def test_las_tiles_through_all_scripts(las_run, tmp_path, capsys):
    laspy = pytest.importorskip("laspy")
    root, checkpoint, result = las_run
    log = (root / "run" / "log" / "train.log").read_text()
    assert "24 optimiser steps, 12 passes over the training clouds" in log and "WARNING: 24 steps are few" in log
    assert read_log(root / "run" / "log" / "log.jsonl")[-1]["step"] == 24
    assert result["miou"] > 0.6                                         # of 1/3 and less for one class everywhere
    scored = evaluate.main([str(checkpoint), "--device", "cpu", "--output-dir", str(tmp_path / "eval")])
    assert scored["miou"] == pytest.approx(result["miou"])
    before = capsys.readouterr()
    assert "no label" not in before.out + before.err
    source = root / "new" / "tile_90.las"
    predict.main([str(checkpoint), str(source), "--device", "cpu", "--output", str(tmp_path / "out")])
    old, new = laspy.read(source), laspy.read(tmp_path / "out" / "tile_90.las")
    codes = np.load(tmp_path / "out" / "tile_90.npy")
    np.testing.assert_array_equal(new.classification, codes)
    assert {*np.unique(codes)} <= {2, 6, 64} and (codes == np.array(old.classification))[5:].mean() > 0.7
    for name in old.point_format.dimension_names:
        assert name == "classification" or (np.array(old[name]) == np.array(new[name])).all(), name
    np.testing.assert_array_equal(old.xyz, new.xyz)
    ply = read_ply_vertices(tmp_path / "out" / "tile_90.ply")
    np.testing.assert_allclose(np.c_[ply["x"], ply["y"], ply["z"]], old.xyz, atol=1e-9)


def test_a_result_without_its_las_is_not_taken_for_done(las_run, tmp_path, monkeypatch):
    root, checkpoint, _ = las_run
    call = [str(checkpoint), str(root / "new" / "tile_90.las"), "--device", "cpu", "--output", str(tmp_path), "--skip-existing"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(point_scripts, "write_las", lambda *_: (_ for _ in ()).throw(OSError("full")))
        predict.main(call)
    predict.main(call)
    assert {path.suffix for path in tmp_path.iterdir()} == {".las", ".npy", ".ply"}


def test_numbers_that_no_las_file_holds_leave_it_out(las_run, tmp_path, capsys):
    root, checkpoint, _ = las_run
    predict.main([str(checkpoint), "data.label_map=1000:0,2000:1,3000:2,7:ignore", str(root / "new" / "tile_90.las"), "--device", "cpu",
                  "--output", str(tmp_path)])
    assert "classes from 1000 to 3000 do not fit into the classification field" in capsys.readouterr().out
    assert {*np.unique(np.load(tmp_path / "tile_90.npy"))} <= {1000, 2000, 3000} and not (tmp_path / "tile_90.las").exists()


def test_classes_beyond_31_change_an_old_point_format(las_run, tmp_path):
    laspy = pytest.importorskip("laspy")
    source = write_las_file(tmp_path / "old.las", tiny_cloud(7, 90) | {"intensity": np.arange(90)}, 3)
    with open(tmp_path / "new.las", "wb") as file:
        write_las(file, source, np.resize([2, 64], 90))
    new, old = laspy.read(tmp_path / "new.las"), laspy.read(source)
    assert new.point_format.id == 7 and (np.array(new.classification) == np.resize([2, 64], 90)).all()
    np.testing.assert_array_equal(new.xyz, old.xyz)
    np.testing.assert_array_equal(new.planarity, old.planarity)
    np.testing.assert_array_equal(np.round(new.scan_angle * 0.006), np.array(old.scan_angle_rank))
    assert len({*new.scan_angle}) > 10
    with open(tmp_path / "new.las", "wb") as file, pytest.raises(ValueError, match="labels -1 to -1"):
        write_las(file, source, np.full(90, -1))


@pytest.mark.parametrize("place, content", [(25, b"\0"), (26, "H\u00f6he".encode("cp1252"))])     # LAS 1.0; of which system
def test_las_copies_of_odd_headers(tmp_path, cloud, place, content):
    laspy = pytest.importorskip("laspy")
    data = bytearray(write_las_file(tmp_path / "a.las", cloud, 1).read_bytes())
    data[place:place + len(content)] = content
    (tmp_path / "a.las").write_bytes(data)
    for label in (np.resize([2, 7], 60), np.resize([2, 40], 60)):
        with open(tmp_path / "new.las", "wb") as file:
            write_las(file, tmp_path / "a.las", label)
        assert (laspy.read(tmp_path / "new.las").classification == label).all()
        assert content == b"\0" or content in (tmp_path / "new.las").read_bytes()[:60]


def test_las_copies_have_the_labels_where_training_read_them(tmp_path, cloud):
    laspy = pytest.importorskip("laspy")
    las = laspy.read(write_las_file(tmp_path / "a.las", cloud, 3))
    for name in ("My Class", "label"):
        las.add_extra_dim(laspy.ExtraBytesParams(name, "i1"))
        las[name] = cloud["segment"] + 5
    las.write(tmp_path / "a.las")
    label = np.resize([3, 7, 40], 60)
    for field in ("my_class", None):
        with open(tmp_path / "new.las", "wb") as file:
            write_las(file, tmp_path / "a.las", label, field)
        assert (read_cloud(tmp_path / "new.las", "classification").label == label).all()
        assert (read_cloud(tmp_path / "new.las", "label").label == cloud["segment"] + 5).all()
        assert (read_cloud(tmp_path / "new.las", "My Class").label == (cloud["segment"] + 5 if field is None else label)).all()
    with open(tmp_path / "new.las", "wb") as file, pytest.raises(ValueError, match="label 163 does not fit into the field My Class .int8"):
        write_las(file, tmp_path / "a.las", label + 160, "My Class")


def test_records_behind_the_points_stay_but_an_octree(tmp_path, cloud):
    """A coordinate system may stand there. COPC's places of points would be wrong, and laspy does not write them."""
    laspy = pytest.importorskip("laspy")
    las = laspy.read(write_las_file(tmp_path / "a.las", cloud, 7))
    las.vlrs.append(laspy.VLR("c0pc", 1, "info", bytes(160)))
    las.evlrs = laspy.vlrs.vlrlist.VLRList([laspy.VLR("c0pc", 1000, "tree", bytes(32)), laspy.VLR("LASF_Projection", 2112, "", b"PROJCS[]")])
    las.write(tmp_path / "a.las")
    (tmp_path / "a.las").write_bytes((tmp_path / "a.las").read_bytes().replace(b"c0pc", b"copc"))
    with open(tmp_path / "new.las", "wb") as file:
        write_las(file, tmp_path / "a.las", cloud["segment"] + 1)
    new = laspy.read(tmp_path / "new.las")
    assert [record.user_id for record in new.evlrs] == ["LASF_Projection"] and "copc" not in {record.user_id for record in new.vlrs}
    np.testing.assert_array_equal(new.classification, cloud["segment"] + 1)
    np.testing.assert_array_equal(new.planarity, las.planarity)


def test_tiles_give_the_labels_of_the_whole(las_run, tmp_path, capsys):
    """One tile is the whole cloud, point for point; and in many tiles nearly all labels stay."""
    root, checkpoint, _ = las_run
    clouds = [tiny_cloud(seed, 500) for seed in range(60, 66)]
    coord = np.concatenate([made["coord"] + [i % 3, i // 3, 0] for i, made in enumerate(clouds)])
    color = np.concatenate([made["color"] for made in clouds])
    intensity = np.concatenate([100 * (made["segment"] + 2) for made in clouds])
    np.savez(tmp_path / "hall.npz", coord=coord, color=color, intensity=intensity)
    found = {}
    for tile in (None, 9, 1):
        options = [] if tile is None else ["--tile", str(tile)]
        predict.main([str(checkpoint), str(tmp_path / "hall.npz"), "--device", "cpu", "--output", str(tmp_path / "out"), *options])
        found[tile] = np.load(tmp_path / "out" / "hall.npy")
    np.testing.assert_array_equal(found[9], found[None])
    assert (found[1] == found[None]).mean() > 0.85 and not (found[1] == found[1][0]).all()
    for options, message in ((["--tile", "0"], "above 0"), (["--tile", "1", "--pca"], "leave it or --tile out")):
        with pytest.raises(ValueError, match=message):
            predict.main([str(checkpoint), str(tmp_path / "hall.npz"), "--output", str(tmp_path / "o"), "--device", "cpu", *options])


def test_steps_are_divided_among_the_pieces(tmp_path):
    config = write_config(tmp_path / "c.yaml", tmp_path, training={"steps": 25, "eval_epochs": 2})
    with pytest.raises(ValueError, match="training.steps=25 is no multiple of training.eval_epochs=2"):
        train_sonata.check_config(train_sonata.load_config(config, train_sonata.DEFAULTS, []))
    loaded = train_sonata.load_config(config, train_sonata.DEFAULTS, ["training.steps=24", "training.accumulation_steps=2"])
    train_sonata.check_config(loaded)
    assert items_of_piece(loaded.training, 5) == 12 * 3 * 2


def test_a_cloud_in_a_few_voxels_is_a_warning(tmp_path):
    made = tiny_cloud(0, 2000)
    np.savez(tmp_path / "a.npz", coord=made["coord"] * 0.001, color=made["color"])
    messages = PointDataset([tmp_path / "a.npz"], PointSpec(0.02)).notes
    assert any("2000 points, 0.000999 m wide, fill at most 1 voxels of 0.02 m; set data.unit" in line for line in messages)
    assert not any("voxels of" in line for line in PointDataset([tmp_path / "a.npz"], PointSpec(0.02, unit=1000.0)).notes)


def test_columns_that_are_no_colours_are_a_doubt(cloud, tmp_path):
    """ISPRS Vaihingen: intensity, number of the return, number of returns."""
    echo = np.arange(60)[:, None] % [3, 4] + 1
    for name in ("a.txt", "a.pts"):
        path = write_text(tmp_path / name, np.c_[cloud["coord"], 6 * cloud["intensity"], echo, cloud["segment"] + 1])
        columns = "5 to 7" if name == "a.pts" else "4 to 6"
        assert [line for line in read_cloud(path).warnings if f"columns {columns}, taken as colours" in line and "data.columns" in line]
    dark = {**cloud, "color": cloud["color"] // 5}
    assert check(write_text(tmp_path / "a.txt", rows(dark, "coord", "color")), dark, label=False).warnings == ()


def test_a_seventh_column_of_many_numbers_is_a_doubt(cloud, tmp_path):
    np.save(tmp_path / "a.npy", rows(cloud, "coord", "intensity", "color"))
    assert "column 7, taken as label, holds" in read_cloud(tmp_path / "a.npy").warnings[0]
    read = check(tmp_path / "a.npy", cloud, label=False, columns=("x", "y", "z", "intensity", "r", "g", "b"))
    assert read.warnings == ()
    np.save(tmp_path / "a.npy", rows(cloud, "coord", "color", "segment"))
    assert check(tmp_path / "a.npy", cloud).warnings == ()


@pytest.mark.parametrize("columns, expected", [
    ([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]], "nx"),                     # of length 1
    ([[0.6, 0.9, 0.0], [0.0, 1.0, 0.5]], "_place_x"),               # S3DIS: places in the room
    ([[0.6, -0.9, 0.0], [0.0, 1.0, 0.5]], "nx"),                    # normals that are not of length 1, in three ways
    ([[0.6, 0.9, 0.0], [0.0, 1.5, 0.5]], "nx"),
    ([[0.6, -0.9, 0.0], [0.0, 1.5, 0.5]], "nx"),
    ([], "nx")])
def test_places_in_the_room_are_no_normals(columns, expected):
    warnings = []
    array = np.concatenate([np.zeros((len(columns), 6)), np.array(columns).reshape(-1, 3)], axis=1)
    assert list(matrix_columns(array, [], warnings, Path("room.txt"))) == ["coord", "red", "green", "blue", expected, *(
        ["_place_y", "_place_z"] if "place" in expected else ["ny", "nz"])]
    assert len(warnings) == (expected == "_place_x")
