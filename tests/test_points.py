"""data/point_files.py, data/points.py: every format gives the same cloud, every defect is one clear line."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import points
from data.label_map import read_label_map
from data.point_files import find_clouds, read_classes, read_cloud, write_cloud, write_ply
from data.point_transforms import VIEWS, PointAugmentation, height_over_plane, local_shape
from data.point_values import to_labels
from data.points import PointDataset, PointSpec, PreciseTest, collate_points, complete
from utils.array_file import save_checked
from utils.files import replacing
from utils.losses import IGNORE_INDEX

PLAIN = PointSpec(grid_size=0.25)
np.save(npy := io.BytesIO(), np.zeros((4, 3)))
NPY = npy.getvalue()


def zipped(**members):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def arrays(seed=0, n=300, num_classes=4):
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(n, 3)).astype(np.float32)
    return {"coord": rng.uniform(0, 2, (n, 3)).astype(np.float32), "color": rng.integers(0, 256, (n, 3), np.uint8),
            "normal": normal / np.linalg.norm(normal, axis=1, keepdims=True),
            "segment": rng.integers(-1, num_classes, n)}


def save(path, cloud):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **cloud)
    return path


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"cloud_{i}.npz", arrays(i, 200 + 50 * i)) for i in range(4)]


def table(cloud, kind):
    """The cloud as rows of a PLY file or a structured array."""
    names = ["x", "y", "z", "red", "green", "blue", "nx", "ny", "nz", "label"]
    types = ["<f4"] * 3 + ["u1"] * 3 + ["<f4"] * 3 + ["<i4"]
    rows = np.empty(len(cloud["coord"]), list(zip(names, types, strict=True)))
    values = np.concatenate([cloud["coord"], cloud["color"], cloud["normal"], cloud["segment"][:, None]], 1)
    for i, name in enumerate(names):
        rows[name] = values[:, i]
    words = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    header = "\n".join(["ply", f"format {kind} 1.0", "comment made up", f"element vertex {len(rows)}",
                        *(f"property {words[t]} {n}" for n, t in zip(names, types, strict=True)), "end_header\n"])
    return rows, header.encode()


def write_format(path, cloud, kind):
    if kind == "folder":
        write_cloud(path, coord=cloud["coord"], color=cloud["color"], normal=cloud["normal"],
                    segment=cloud["segment"].astype(np.int16)[:, None])
    elif kind == "npz":
        path = save(path.with_suffix(".npz"), cloud)
    elif kind == "matrix":
        path = path.with_suffix(".npy")
        np.save(path, np.concatenate([cloud["coord"], cloud["color"], cloud["normal"], cloud["segment"][:, None]], 1))
    elif kind == "structured":
        path = path.with_suffix(".npy")
        np.save(path, table(cloud, "")[0])
    else:
        path = path.with_suffix(".ply")
        rows, header = table(cloud, kind)
        if kind == "ascii":
            body = "\n".join(" ".join(str(value) for value in row.tolist()) for row in rows).encode() + b"\n"
        elif kind == "binary_big_endian":
            body = rows.astype(rows.dtype.newbyteorder(">")).tobytes()
        else:
            body = rows.tobytes()
        path.write_bytes(header + body)
    return path


# -- reading -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["folder", "npz", "matrix", "structured", "ascii", "binary_little_endian",
                                  "binary_big_endian"])
def test_every_format_gives_the_same_cloud(tmp_path, kind):
    cloud = arrays()
    read = read_cloud(write_format(tmp_path / "cloud", cloud, kind))
    assert read.coord.dtype == np.float32 and read.label.dtype == np.int64 and read.warnings == ()
    np.testing.assert_array_equal(read.coord, cloud["coord"])
    np.testing.assert_array_equal(read.color, cloud["color"])
    np.testing.assert_allclose(read.normal, cloud["normal"], atol=1e-6)
    np.testing.assert_array_equal(read.label, cloud["segment"])


def test_what_was_written_is_read(tmp_path):
    cloud = arrays()
    write_ply(tmp_path / "out.ply", cloud["coord"], cloud["color"], cloud["segment"])
    read = read_cloud(tmp_path / "out.ply")
    for name, other in (("coord", "coord"), ("color", "color"), ("label", "segment")):
        np.testing.assert_array_equal(getattr(read, name), cloud[other])
    with pytest.raises(ValueError, match="exists"):
        write_cloud(tmp_path, coord=cloud["coord"])
    assert not list(tmp_path.glob(".*"))


def test_scannet_has_two_sets_of_labels(tmp_path):
    cloud = arrays()
    write_cloud(tmp_path / "scene", coord=cloud["coord"], segment20=cloud["segment"], segment200=cloud["segment"] + 1)
    assert (read_cloud(tmp_path / "scene", "segment200").label == cloud["segment"] + 1).all()
    assert (read_cloud(tmp_path / "scene").label == cloud["segment"]).all()              # segment20 where nothing is said
    assert read_cloud(tmp_path / "scene", "segment").label is None


def test_colours_between_0_and_1_are_scaled_with_a_warning(tmp_path):
    cloud = arrays()
    read = read_cloud(save(tmp_path / "a.npz", {**cloud, "color": cloud["color"] / 255}))
    np.testing.assert_allclose(read.color, cloud["color"], atol=1e-3)
    assert len(read.warnings) == 1 and "taken as 0..1" in read.warnings[0]


def test_map_coordinates_keep_their_millimetres(tmp_path):
    cloud = arrays()
    far = cloud["coord"].astype(np.float64) + [500_000, 5_400_000, 300]
    read = read_cloud(save(tmp_path / "a.npz", {**cloud, "coord": far}))
    np.testing.assert_allclose(read.coord - read.coord[0], cloud["coord"] - cloud["coord"][0], atol=1e-6)
    assert len(read.warnings) == 1 and "moved by [-500000.0, -5400000.0, -300.0]" in read.warnings[0]
    rounded = read_cloud(save(tmp_path / "c.npz", {**cloud, "coord": far.astype(np.float32)})).warnings
    assert len(rounded) == 1 and "float32 coordinates up to 5400002 are rounded to 0.5" in rounded[0]
    near = read_cloud(save(tmp_path / "b.npz", {**cloud, "coord": cloud["coord"].astype(np.float64) + 50}))
    assert near.warnings == () and near.coord.min() >= 50 and near.coord.dtype == np.float32


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int16, np.int64])
def test_whole_coordinates_of_any_type(tmp_path, kind):
    coord = np.random.default_rng(0).integers(5, 120, (30, 3)).astype(kind)
    with np.errstate(all="raise"):
        read = read_cloud(save(tmp_path / "a.npz", {"coord": coord}))
    np.testing.assert_array_equal(read.coord, coord)
    assert read.warnings == ()
    if np.iinfo(kind).max > 2 ** 16:
        read = read_cloud(save(tmp_path / "a.npz", {"coord": coord + kind(200_000)}))
        np.testing.assert_array_equal(read.coord, coord - coord.min(0))
        np.testing.assert_array_equal(read.exact, coord + kind(200_000))


DEFECTS = [({"coord": None}, "coordinates"), ({"coord": np.zeros((5, 2))}, r"got float64 \(5, 2\)"), ({"coord": np.full((300, 3), "a")}, "numeric"),
           ({"coord": np.zeros((0, 3))}, "at least one point"), ({"segment": np.zeros(7, int)}, "label of shape"),
           ({"color": np.zeros((300, 4), np.uint8)}, "color of shape"), ({"color": np.full((300, 3), 700)}, "to 700"),
           ({"color": np.full((300, 3), np.nan)}, "colours from nan"),
           ({"segment": np.full(300, 1.5)}, "1.5 of point 0 .300 in all. is not a whole number"),
           ({"coord": np.where(np.arange(300)[:, None] == 4, np.nan, np.ones((300, 3)))}, "1 of 300 points.*point 4")]


@pytest.mark.parametrize("change, message", DEFECTS)
def test_every_defect_names_the_file(tmp_path, change, message):
    cloud = {name: value for name, value in {**arrays(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        read_cloud(save(tmp_path / "bad.npz", cloud))
    assert "bad.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("a.npz", b"PK\3\4 cut"), ("a.npy", b"\x93NUMPY"), ("a.ply", b"ply\nformat"),
                                           ("a.npy", NPY.replace(b"(4, 3)", b"(4, 3 ")), ("a.npy", NPY[:-1]),
                                           ("a.npz", zipped(coord=NPY[1:])), ("a.npz", zipped(coord=NPY, label=NPY.replace(b"}", b"("))),
                                           ("a.npz", zipped(coord=NPY.replace(b"(4, 3), }    ", b"(40000000, 3),}"))),
                                           ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\n"
                                                     b"end_header\n1\n"),
                                           ("a.ply", b"ply\nformat ascii 1.0\nelement face 0\nend_header\n")])
def test_damaged_files_are_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read.*damaged") as error:
        read_cloud(tmp_path / name)
    assert str(error.value).count(name) == 1 and "\n" not in str(error.value)


def test_numbers_beyond_all_sizes(tmp_path):
    with pytest.raises(ValueError, match="3 of 4 points have .* or one beyond 1e[+]15, the first is point 1"):
        read_cloud(save(tmp_path / "a.npz", {"coord": np.diag([1e300] * 4)[1:].T}))
    with pytest.raises(ValueError, match="colours from 0 to inf"):
        read_cloud(save(tmp_path / "a.npz", {"coord": np.zeros((4, 3)), "color": np.eye(4)[:, :3] * 1e300}))
    with pytest.raises(ValueError, match="label of type <U1; numbers"):
        read_cloud(save(tmp_path / "a.npz", {"coord": np.zeros((4, 3)), "label": np.array(list("abcd"))}))
    with np.errstate(all="raise"):
        normal = read_cloud(save(tmp_path / "a.npz", {"coord": np.zeros((3, 3)), "normal": [[0, 0, 1e300], [np.nan, 0, 1], [0, 0, 2]]})).normal
    assert normal.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_float16_coordinates_are_read_without_a_warning(tmp_path):
    np.save(tmp_path / "a.npy", np.float16([[0, 0.5, 1], [2, 3, 4]]))
    with np.errstate(over="raise"):
        assert read_cloud(tmp_path / "a.npy").coord.tolist() == [[0, 0.5, 1], [2, 3, 4]]
    np.save(tmp_path / "a.npy", np.float16([[0, 0.5, np.inf]]))
    with pytest.raises(ValueError, match="1 of 1 points have a NaN or infinite"):
        read_cloud(tmp_path / "a.npy")


@pytest.mark.parametrize("header, message", [(3, "18 numbers more"), (5, "index|numbers|buffer"), (4, None)])
def test_rows_of_an_ascii_ply_have_as_many_columns_as_its_header(tmp_path, header, message):
    rows = "\n".join(" ".join(map(str, row)) for row in np.arange(72).reshape(18, 4))
    names = "".join(f"property float {name}\n" for name in ("x", "y", "z", "label", "other")[:header])
    (tmp_path / "a.ply").write_text(f"ply\nformat ascii 1.0\nelement vertex 18\n{names}end_header\n{rows}\n")
    if message is None:
        assert read_cloud(tmp_path / "a.ply").label.tolist() == list(range(3, 72, 4))
    else:
        with pytest.raises(ValueError, match=f"a.ply: cannot be read as PLY.*({message})"):
            read_cloud(tmp_path / "a.ply")


def test_an_archive_that_announces_more_than_it_holds(tmp_path):
    data = bytearray(zipped(coord=NPY))
    at = data.index(b"PK\1\2") + 20                                                    # sizes of the entry, in the directory
    data[at:at + 8] = b"\xff\xff\xff\x7f" * 2
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match="a.npz: cannot be read .*larger than the file"):
        read_cloud(tmp_path / "a.npz")


def test_unknown_paths_and_suffixes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such cloud"):
        read_cloud(tmp_path / "nothing.npz")
    (tmp_path / "a.e57").write_bytes(b"")
    with pytest.raises(ValueError, match="'.e57'.*[.]npz.*[.]laz"):
        read_cloud(tmp_path / "a.e57")
    np.save(tmp_path / "a.npy", np.zeros((4, 5)))
    with pytest.raises(ValueError, match="columns are x y z"):
        read_cloud(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([{"x": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):                              # never unpickled
        read_cloud(tmp_path / "b.npy")


def test_labels_are_translated_and_checked():
    label = np.array([0, 2, -1, 255, 1])
    assert to_labels(label, 3, (-1, 255), "f").tolist() == [0, 2, IGNORE_INDEX, IGNORE_INDEX, 1]
    with pytest.raises(ValueError, match=r"scan.npz: label 7 at 3 of 4 points.*expected 0..2 or -1 .ignored."):
        to_labels(np.array([7, 7, 7, 1]), 3, (-1,), "scan.npz")
    with pytest.raises(ValueError, match="1 more such"):
        to_labels(np.array([3, 9, 0]), 3, (-1,), "f")


# -- finding files -----------------------------------------------------------------------------------------------------

def test_find_clouds_in_every_layout(tmp_path):
    cloud = arrays()
    for name in ("train/b", "train/a", "Area_1/x", "Area_2/y"):
        write_cloud(tmp_path / name, coord=cloud["coord"])
    save(tmp_path / "flat1.npz", cloud), save(tmp_path / "flat2.npz", cloud), save(tmp_path / "train/.hidden.npz", cloud)
    (tmp_path / "splits.json").write_text(json.dumps({"few": ["flat2"], "all": ["flat1", "flat2.npz"], "bad": ["no"]}))
    (tmp_path / "list.json").write_text(json.dumps(["train/a", "Area_2/y"]))

    def names(split):
        return [path.relative_to(tmp_path).as_posix() for path in find_clouds(tmp_path, split)]

    assert names("train") == ["train/a", "train/b"]
    assert names(["Area_2", "Area_1"]) == ["Area_1/x", "Area_2/y"]
    assert names("few") == ["flat2.npz"] and names("all") == ["flat1.npz", "flat2.npz"]
    (tmp_path / "few.txt").write_text("\ufeffflat2\r\n", encoding="utf-8")
    (tmp_path / "few16.txt").write_text("flat2\r\n", encoding="utf-16")                  # PowerShell: ls -Name > few16.txt
    assert names("few16") == ["flat2.npz"]
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(["train/a", "Area_2/y", "train/a"]), encoding="utf-8")
    assert names(["few", "few.txt"]) == ["flat2.npz"]                                     # listed twice: scored once
    assert names("list.json") == names(str(tmp_path / "list.json")) == ["Area_2/y", "train/a"]
    (tmp_path / "empty").mkdir()
    for split, message in (("tran", "no split 'tran'.*did you mean train"), ("empty", "is empty"), ("bad", "names no")):
        with pytest.raises(ValueError, match=message):
            find_clouds(tmp_path, split)
    with pytest.raises(FileNotFoundError, match="data.root"):
        find_clouds(tmp_path / "nowhere", "train")
    for file, split in (("list.json", "list.json"), ("splits.json", "few")):
        for text, message in (("{", "cannot be read as JSON .Expecting"), ("3", "expected .* got a int")):
            (tmp_path / file).write_text(text)
            with pytest.raises(ValueError, match=f"{file}: {message}"):
                find_clouds(tmp_path, split)
        (tmp_path / file).unlink()


def test_read_classes(tmp_path):
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert read_classes(tmp_path)[:2] == (["a", "b"], (-1,))
    (tmp_path / "c.json").write_text('\ufeff{"classes": ["a"], "ignore_index": 255, "palette": [[1, 2, 3]]}', encoding="utf-8")
    names, ignored, palette = read_classes(tmp_path / "c.json")
    assert names == ["a"] and ignored == (-1, 255) and palette.tolist() == [[1, 2, 3]]
    for text in ("{", "3", '{"names": []}', '["a", "a"]', '[1]', '{"classes": ["a"], "palette": [[1, 2]]}',
                 '{"classes": ["a"], "palette": [[0, 0, 300]]}', '{"classes": ["a"], "palette": [[0, 0.5, 1]]}',
                 '{"classes": ["a"], "ignore_index": ["none"]}', '{"classes": {"1": "a", "0": "b"}}',
                 '{"classes": ["a", "b"], "ignore_index": 1.5}', '{"classes": ["a", "b"], "ignore_index": true}', '{"classes": ["a"], "ignore_index": 1e400}', "[" * 5000):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match="c.json: expected a list of class names"):
            read_classes(tmp_path / "c.json")


# -- the data set ------------------------------------------------------------------------------------------------------

def test_items_depend_on_seed_epoch_and_item_only(files):
    def items(workers=0, epoch=0, seed=0, memory=True):
        dataset = PointDataset(files, PLAIN, 4, PointAugmentation(), seed=seed, num_items=2 * len(files))
        if not memory:
            dataset._kept.clear()
        dataset.set_epoch(epoch)
        return list(DataLoader(dataset, 3, collate_fn=collate_points, num_workers=workers))

    first = items()
    assert [len(batch["offset"]) for batch in first] == [3, 3, 2]
    for same in (items(workers=2), items(memory=False)):
        for a, b in zip(first, same, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for other in (items(epoch=1), items(seed=1)):
        assert not torch.equal(first[0]["feat"], other[0]["feat"])
    size = first[0]["offset"][0]
    begin, end = first[1]["offset"][:2]
    assert not torch.equal(first[0]["feat"][:size], first[1]["feat"][begin:end])         # cloud 0, the second time


def test_layout_of_a_batch(files):
    batch = collate_points([PointDataset(files, PLAIN, 4, PointAugmentation())[i] for i in range(2)])
    count = len(batch["coord"])
    assert batch["offset"].dtype == torch.int64 and batch["offset"][-1] == count and len(batch["offset"]) == 2
    for name, shape, dtype in (("coord", (count, 3), torch.float32), ("grid_coord", (count, 3), torch.int32),
                               ("feat", (count, 9), torch.float32), ("label", (count,), torch.int64)):
        assert batch[name].shape == shape and batch[name].dtype == dtype
    assert torch.equal(batch["feat"][:, :3], batch["coord"])
    assert 0 <= batch["feat"][:, 3:6].min() and 0.5 < batch["feat"][:, 3:6].max() <= 1   # colours as shares
    assert set(batch["label"].tolist()) == {IGNORE_INDEX, 0, 1, 2, 3}


def test_mix3d_follows_the_first_items_coin(files):
    dataset = PointDataset(files, PLAIN, 4, PointAugmentation(), num_items=50 * len(files))
    samples = [dataset[i] for i in range(200)]
    assert 0.7 < np.mean([sample["mix_draw"] < 0.8 for sample in samples]) < 0.9
    mixed = next(i for i, sample in enumerate(samples) if sample["mix_draw"] < 0.8)
    apart = next(i for i, sample in enumerate(samples) if sample["mix_draw"] >= 0.8)
    assert len(collate_points([samples[mixed], *samples[:4]], 0.8)["offset"]) == 3       # 5 scenes: two pairs and one
    assert len(collate_points([samples[apart], *samples[:4]], 0.8)["offset"]) == 5


def test_scores_belong_to_raw_points(tmp_path):
    """Two labels in one voxel: whatever the voxel is predicted, one raw point of the two is wrong."""
    coord = np.float32([[0, 0, 0], [0.01, 0, 0], [1, 1, 1], [1, 1, 1.01], [1, 1, 1.02]])
    file = save(tmp_path / "a.npz", {"coord": coord, "segment": np.array([0, 1, 1, 1, -1])})
    dataset = PointDataset([file, file], PointSpec(grid_size=0.1, features=("coord",)), 2)
    item = dataset[0]
    assert len(item["coord"]) == 2 and collate_points([item, dataset[1]])["offset"].tolist() == [2, 4]
    pred = torch.ones(2, dtype=torch.int64)[item["inverse"]]                             # (5,)
    counted = item["raw_label"] != IGNORE_INDEX
    assert counted.sum() == 4 and (pred == item["raw_label"])[counted].float().mean() == 0.75
    voxel = item["inverse"].tolist()
    assert voxel[0] == voxel[1] and voxel[0] != voxel[2] and voxel[4] == voxel[2]


def test_evaluation_is_the_same_every_time_and_shows_real_points(files):
    dataset = PointDataset(files, PLAIN, 4)
    first = dataset[1]
    dataset.set_epoch(5)
    alone = PointDataset(files[1:2], PLAIN, 4, seed=3)
    for again in (dataset[1], alone[0]):
        assert all(torch.equal(first[name], again[name]) for name in first)
    cloud = arrays(1, 250)
    assert len(first["inverse"]) == len(first["raw_label"]) == 250 and len(first["coord"]) < 250
    raw = {tuple(row) for row in cloud["normal"].tolist()}
    normal = first["feat"][:, 6:].numpy()
    assert all(min(np.abs(np.array(list(raw)) - row).sum(1)) < 1e-5 for row in normal[:20])


def test_whole_set_is_checked_at_construction(tmp_path):
    good, blank = arrays(), {**arrays(), "segment": np.full(300, -1)}
    a, b = save(tmp_path / "a.npz", good), save(tmp_path / "b.npz", blank)
    dataset = PointDataset([a, b], PLAIN, 4)
    assert dataset.class_counts.tolist() == np.bincount(good["segment"] + 1)[1:].tolist() and dataset.num_points == [300] * 2
    assert any("1 of 2 clouds have no labels" in message and "b.npz" in message for message in dataset.notes)
    with pytest.raises(ValueError, match="no labelled point in 1 clouds.*segment20"):
        PointDataset([b], PLAIN, 4)
    with pytest.raises(ValueError, match="a.npz: label 3 at"):
        PointDataset([b, a], PLAIN, 3)
    far = save(tmp_path / "far.npz", {**good, "coord": good["coord"] * 4000})
    with pytest.raises(ValueError, match=r"far.npz: .*0.001, or a larger data.grid_size: 65535 voxels of 0.1 m fit"):
        PointDataset([far], PointSpec(0.1), 4)
    message, = PointDataset([far], PointSpec(9.0), 4).notes
    assert re.search(r"far.npz: the cloud is \d{4} m wide; is it in millimetres", message)
    assert PointDataset([far], PointSpec(unit=0.001), 4).notes == []
    assert len(PointDataset([far] * 4, PointSpec(9.0), 4).notes) == 4                 # a line a cloud, but not 1,000 of them
    messages = PointDataset([far] * 9, PointSpec(9.0), 4).notes
    assert len(messages) == 6 and messages[-1] == "... and 4 more such lines"


def test_a_doubt_is_not_hidden_behind_many_of_another_kind(tmp_path):
    files = [save(tmp_path / f"{i}.npz", {"coord": arrays(n=30)["coord"].astype(np.float64) + 5e5, "segment": np.zeros(30, int)})
             for i in range(12)]
    files.append(save(tmp_path / "odd.npz", {**arrays(), "color": arrays()["color"] / 255 * 1.3}))
    messages = PointDataset(files, PLAIN, 4).notes
    assert sum("moved by" in line for line in messages) == 5 and "... and 7 more such lines" in messages
    assert sum("odd.npz: colours up to 1.3" in line for line in messages) == 1


def test_one_name_with_two_suffixes_is_a_doubt(tmp_path):
    """A converted copy beside its source would be learnt, or scored, twice."""
    files = [save(tmp_path / f"{name}.npz", arrays()) for name in ("a", "b.v1", "b.v2")]
    assert PointDataset(files, PLAIN, 4).notes == []
    write_ply(tmp_path / "a.ply", arrays()["coord"], arrays()["color"], arrays()["segment"])
    message = PointDataset([*files, tmp_path / "a.ply"], PointSpec(0.25, features=("coord",)), 4).notes[0]
    assert message.startswith(f"1 of 4 clouds have the name of another but for the suffix, such as {tmp_path}/a.npz and a.ply")


def test_missing_normals_and_colours(tmp_path):
    rng = np.random.default_rng(0)
    floor = np.c_[rng.uniform(0, 1, (200, 2)), np.zeros(200)].astype(np.float32)
    file = save(tmp_path / "a.npz", {"coord": floor, "segment": np.zeros(200, int)})
    dataset = PointDataset([file], PLAIN, 1, cache_dir=tmp_path / "cache")
    assert (dataset.cloud(0)["normal"][:, 2] > 0.99).all() and (dataset.cloud(0)["color"] == 0).all()
    assert [word in " ".join(dataset.notes) for word in ("estimated from neighbours", "no colors (black; expect worse")] == [True] * 2
    entry, = (tmp_path / "cache").glob("normals_*.npy")
    with replacing(entry) as stored:                                                     # the cache is used ...
        save_checked(stored, np.full((200, 3), 0.5, np.float32))
    assert (PointDataset([file], PLAIN, 1, cache_dir=tmp_path / "cache").cloud(0)["normal"] == 0.5).all()
    entry.write_bytes(b"cut")                                                            # ... and repaired
    assert (PointDataset([file], PLAIN, 1, cache_dir=tmp_path / "cache").cloud(0)["normal"][:, 2] > 0.99).all()
    zeros = PointDataset([file], PointSpec(0.25, missing_normal="zeros"), 1)
    assert (zeros.cloud(0)["normal"] == 0).all() and "(zero; expect worse" in " ".join(zeros.notes)
    for spec, message in ((PointSpec(missing_normal="error"), "no normals; set data.missing_normal"),
                          (PointSpec(missing_color="error"), "no colors")):
        with pytest.raises(ValueError, match=message):
            PointDataset([file], spec, 1)
    coord_only = PointDataset([file], PointSpec(0.05, features=("coord",)), 1)
    assert coord_only[0]["feat"].shape[1] == 3 and coord_only.notes == []


def test_a_cloud_without_labels_can_be_prepared(tmp_path):
    cloud = arrays()
    del cloud["segment"]
    item = PointDataset([save(tmp_path / "a.npz", cloud)], PLAIN)[0]
    assert (item["raw_label"] == IGNORE_INDEX).all() and len(item["inverse"]) == 300


def test_a_single_point_goes_all_the_way(tmp_path):
    file = save(tmp_path / "a.npz", {"coord": np.ones((1, 3)), "segment": np.zeros(1, int)})
    sample = PointDataset([file], PLAIN, 1, PointAugmentation())[0]
    assert sample["grid_coord"].tolist() == [[0, 0, 0]] and sample["feat"].shape == (1, 9)
    dataset = PointDataset([file], PLAIN, 1)
    assert dataset[0]["inverse"].tolist() == [0] and len(list(PreciseTest(dataset.cloud(0), PLAIN, 1))) == 13


def test_unit_scales_the_coordinates(tmp_path):
    file = save(tmp_path / "a.npz", arrays())
    small = PointDataset([file], PointSpec(0.5), 4)[0]
    large = PointDataset([file], PointSpec(1.5, unit=3.0), 4)[0]
    assert torch.equal(small["grid_coord"], large["grid_coord"])
    torch.testing.assert_close(small["coord"] * 3, large["coord"], atol=1e-5, rtol=0)


def test_scale_comes_before_the_voxels_and_reaches_coordinates_and_features(tmp_path):
    file = save(tmp_path / "a.npz", arrays())
    room, half = PointDataset([file], PointSpec(0.5), 4)[0], PointDataset([file], PointSpec(0.25, scale=0.5), 4)[0]
    assert torch.equal(room["grid_coord"], half["grid_coord"])
    torch.testing.assert_close(half["coord"], room["coord"] / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(half["feat"][:, :3], half["coord"], atol=0, rtol=0)
    coarser = PointDataset([file], PointSpec(0.5, scale=0.5), 4)[0]          # the grid is not scaled with it
    assert len(coarser["grid_coord"]) < len(room["grid_coord"])
    assert torch.equal(PointDataset([file], PointSpec(0.5, scale=1.0), 4)[0]["feat"], room["feat"])


def test_an_object_becomes_one_of_radius_one(tmp_path):
    file = save(tmp_path / "a.npz", {**arrays(), "coord": arrays()["coord"] * 7 + 30})
    coord = PointDataset([file], PointSpec(0.01, scale="object"), 4).cloud(0)["coord"]
    np.testing.assert_allclose(coord.mean(0), 0, atol=1e-5)
    assert np.linalg.norm(coord, axis=1).max() == pytest.approx(1, abs=1e-5)
    one = save(tmp_path / "b.npz", {"coord": np.ones((3, 3)), "segment": np.zeros(3, int)})
    assert (PointDataset([one], PointSpec(0.01, scale="object"), 4).cloud(0)["coord"] == 0).all()


def test_outdoors_the_sensor_stays_where_it_is(tmp_path):
    file = save(tmp_path / "a.npz", arrays())
    spec = PointSpec(0.5, center=False)
    dataset = PointDataset([file], spec, 4)
    raw = {tuple(row) for row in dataset.cloud(0)["coord"].tolist()}
    assert all(tuple(row) in raw for row in dataset[0]["coord"].tolist())
    assert all(tuple(row) in raw for row in next(iter(PreciseTest(dataset.cloud(0), spec, 4)))["coord"].tolist())
    assert dataset[0]["grid_coord"].min() == 0


def test_normals_are_estimated_in_metres_whatever_the_scale(tmp_path):
    cloud = arrays()
    del cloud["normal"]
    file = save(tmp_path / "a.npz", cloud)
    normal = [PointDataset([file], PointSpec(0.5, scale=scale), 4).cloud(0)["normal"] for scale in (1.0, 0.2, "object")]
    assert all(np.array_equal(normal[0], other) for other in normal[1:])


def test_height_and_shape_are_features_on_request(tmp_path):
    cloud = arrays()
    np.savez(tmp_path / "cloud.npz", **cloud)
    spec = PointSpec(0.05, unit=2.0, scale=0.5, features=("normal", "height", "shape"), shape_sizes=(0.1, 0.2))
    dataset = PointDataset([tmp_path / "cloud.npz"], spec, 4, cache_dir=tmp_path / "cache")
    made = dataset.cloud(0)
    assert spec.num_channels == 12 and PointSpec().num_channels == 9
    assert dataset[0]["feat"].shape == (len(dataset[0]["coord"]), 12)
    double = cloud["coord"] * np.float32(2)                             # lengths are metres after unit, before scale
    np.testing.assert_array_equal(made["shape"], local_shape(double, (0.1, 0.2)))
    np.testing.assert_allclose(made["height"], 0.5 * height_over_plane(double), rtol=1e-6)
    entry, = (tmp_path / "cache").glob("shape_*.npy")
    with open(entry, "wb") as file:
        save_checked(file, np.zeros_like(made["shape"]))               # what is kept is taken
    assert not PointDataset([tmp_path / "cloud.npz"], spec, 4, cache_dir=tmp_path / "cache").cloud(0)["shape"].any()
    assert PointDataset([tmp_path / "cloud.npz"], PointSpec(0.05), 4).cloud(0).keys() == {"coord", "color", "normal", "label"}


def test_spec_refuses_nonsense():
    for change in ({"grid_size": 0}, {"features": ()}, {"features": ("coord", "coord")}, {"features": ("cord",)},
                   {"missing_normal": "guess"}, {"unit": -1.0}, {"scale": 0}, {"scale": "objects"}, {"scale": True},
                   {"shape_sizes": ()}, {"shape_sizes": (0.1, 0)}):
        with pytest.raises(ValueError, match="data[.]"):
            PointSpec(**change)


# -- names, values that nobody needs, extents -----------------------------------------------------------------------------

@pytest.mark.parametrize("names", [("r", "g", "b"), ("R", "G", "B"), ("Red", "Green", "Blue"), ("diffuse_red", "diffuse_green", "diffuse_blue")])
@pytest.mark.parametrize("suffix", [".ply", ".npy"])
def test_colours_under_other_names(tmp_path, names, suffix):
    cloud = arrays()
    path = write_format(tmp_path / "cloud", cloud, "structured" if suffix == ".npy" else "binary_little_endian")
    if suffix == ".npy":
        rows = np.load(path)
        rows.dtype.names = [dict(zip(("red", "green", "blue"), names, strict=True)).get(name, name) for name in rows.dtype.names]
        np.save(path, rows)
    else:
        header, body = path.read_bytes().split(b"end_header\n", 1)
        for old, new in zip(("red", "green", "blue"), names, strict=True):
            header = header.replace(f"uchar {old}\n".encode(), f"uchar {new}\n".encode())
        path.write_bytes(header + b"end_header\n" + body)
    np.testing.assert_array_equal(read_cloud(path).color, cloud["color"])


@pytest.mark.parametrize("label", [np.full(300, np.nan), np.full(300, 0.5), np.zeros((300, 2), int), np.full(300, "tree"), np.zeros(7), np.full(300, 1e30)])
def test_labels_that_nobody_needs_may_be_anything(tmp_path, label):
    cloud = arrays()
    path = save(tmp_path / "a.npz", {**cloud, "segment": label})
    read = read_cloud(path, labels=False)
    assert read.label is None and (read.coord == cloud["coord"]).all()
    assert len(PointDataset([path], PLAIN)[0]["inverse"]) == 300                         # no classes: nothing to score
    with pytest.raises(ValueError, match="label"):
        PointDataset([path], PLAIN, 4)
    if label.ndim == 1 and len(label) == 300 and label.dtype.kind == "f":
        np.save(tmp_path / "b.npy", np.c_[cloud["coord"], label])
        assert read_cloud(tmp_path / "b.npy", labels=False).label is None


def test_nan_label_map_and_offset_reach_the_data_set(tmp_path):
    cloud = arrays()
    files = [save(tmp_path / "a.npz", {**cloud, "segment": np.where(cloud["segment"] < 0, np.nan, cloud["segment"] + 1.0)})]
    dataset = PointDataset(files, PLAIN, 4, ignore_labels=("nan",), label_offset=-1)
    expected = np.where(cloud["segment"] < 0, IGNORE_INDEX, cloud["segment"])
    assert (dataset.cloud(0)["label"] == expected).all() and dataset.ignored_classes() == []
    dataset = PointDataset(files, PLAIN, 2, ignore_labels=("nan",), label_map=read_label_map("1:0,2:1,3:1,4:ignore"))
    assert (dataset.cloud(0)["label"] == np.array([0, 1, 1, IGNORE_INDEX, IGNORE_INDEX])[cloud["segment"]]).all()
    with pytest.raises(ValueError, match=r"a.npz: label nan at \d+ of 300 points"):
        PointDataset(files, PLAIN, 5)
    for offset, ignored, classes in ((0, (0, -1), [0]), (0, (3, 1), [1, 3]), (-1, (1, 0), [0]), (0, (255, "nan"), [])):
        dataset = PointDataset(files, PLAIN, 5, ignore_labels=(*ignored, "nan"), label_offset=offset)
        assert dataset.ignored_classes() == classes


def test_ignored_classes_of_classes_json_may_be_nan(tmp_path):
    for text in ('{"classes": ["a"], "ignore_index": NaN}', '{"classes": ["a"], "ignore_index": ["nan", 7]}'):
        (tmp_path / "classes.json").write_text(text)
        assert "nan" in read_classes(tmp_path).ignore_labels


def test_the_own_coordinates_of_a_file_are_kept_where_float32_does_not_hold_them(tmp_path):
    cloud = arrays()
    assert read_cloud(save(tmp_path / "a.npz", cloud)).exact is None
    assert read_cloud(save(tmp_path / "a.npz", {**cloud, "coord": cloud["coord"].astype(np.float64)})).exact is None
    for shift in ([5e5, 5.4e6, 300.0], [0.0, 0.0, 1e-9], [2 ** 26 + 1.0, 0, 0]):
        far = cloud["coord"].astype(np.float64) + shift
        read = read_cloud(save(tmp_path / "a.npz", {**cloud, "coord": far}))
        assert read.exact.dtype == np.float64 and (read.exact == far).all()
        assert PointDataset([tmp_path / "a.npz"], PLAIN, 4)._kept[0].exact is None       # only results need them
        write_ply(tmp_path / "out.ply", read.exact, cloud["color"], cloud["segment"])
        again = read_cloud(tmp_path / "out.ply")
        assert (again.exact == far).all() and (again.label == cloud["segment"]).all() and (again.color == cloud["color"]).all()


@pytest.mark.parametrize("shift", [0.0, 5e5])
def test_a_cloud_whose_y_points_up_is_read_upright_and_keeps_its_own_coordinates(tmp_path, shift):
    """Turned about x, so that a room seen from its floor, its heights and a viewpoint are those of the same cloud with z up."""
    cloud = arrays()
    x, y, z = (cloud["coord"].astype(np.float64) + shift).T
    save(tmp_path / "z.npz", {**cloud, "coord": np.stack([x, y, z], 1)})
    lying = np.stack([x, z, -y], 1)
    save(tmp_path / "y.npz", {**cloud, "coord": lying, "normal": cloud["normal"][:, [0, 2, 1]] * np.float32([1, 1, -1])})
    for features, view in ((("normal", "height"), None), (("normal", "height"), (1.0 + shift, 2.0 + shift, 30.0 + shift))):
        made = []
        for name, up in (("z", "auto"), ("y", "y")):
            place = view if view is None or up == "auto" else (view[0], view[2], -view[1])
            spec = PointSpec(0.05, features=features, normal_view=place, up=up)
            raw = spec.read(tmp_path / f"{name}.npz")
            made.append(complete(raw if view is None else raw._replace(normal=None), spec)[0])
        assert np.allclose(*(np.ptp(one.coord, 0) for one in made), atol=1e-3)
        assert np.allclose(made[0].height, made[1].height, atol=1e-3)
        assert np.allclose(made[0].normal, made[1].normal, atol=0.05)
        assert (made[1].exact == lying).all()
    with pytest.raises(ValueError, match="data.up: expected one of auto, z, y"):
        PointSpec(up="x")


@pytest.mark.parametrize("width, height", [(60, 6), (178, 30), (300, 6)])
def test_outdoor_sweeps_are_trained_with_the_defaults(tmp_path, width, height):
    cloud = arrays()
    file = save(tmp_path / "a.npz", {**cloud, "coord": cloud["coord"] / 2 * np.float32([width, width, height])})
    dataset = PointDataset([file], PointSpec(), 4, PointAugmentation())
    assert len(dataset[0]["coord"]) > 150
    told = [line for line in dataset.notes if "augmentation.elastic: to fit in memory, noise of 0.2 m gets cells" in line]
    assert len(told) == (width > 100)
    assert PointDataset([file], PointSpec(), 4).notes == []
    assert PointDataset([file], PointSpec(), 4, PointAugmentation(elastic=())).notes == []


def test_what_augmentation_can_make_too_wide_is_refused_at_once(tmp_path):
    """1,200 m are 60,000 voxels of 2 cm, turned and enlarged too many; in the thirteen views those of the test alone."""
    cloud = arrays()
    file = save(tmp_path / "a.npz", {**cloud, "coord": cloud["coord"] * np.float32([600, 600, 2])})
    assert PointDataset([file], PointSpec(), 4)[0]["grid_coord"].max() > 59_000
    with pytest.raises(ValueError, match=r"a.npz: augmentation can make the cloud \d+ m wide.*data.grid_size=0.0\d+ or larger") as error:
        PointDataset([file], PointSpec(), 4, PointAugmentation())
    grid = float(re.search(r"data.grid_size=([\d.]+)", str(error.value))[1])             # the cure is one
    PointDataset([file], PointSpec(grid), 4, PointAugmentation())
    dataset = PointDataset([file], PointSpec(grid), 4, PointAugmentation(elastic=()), num_items=20)
    assert 50_000 < max(dataset[i]["grid_coord"].max() for i in range(20)) < 65535
    wide = save(tmp_path / "b.npz", {**cloud, "coord": cloud["coord"] * 640})            # x 1.05 are 67,200
    with pytest.raises(ValueError, match="larger data.grid_size"):
        PointDataset([wide], PointSpec(), 4)


# -- the precise test --------------------------------------------------------------------------------------------------

def test_every_raw_point_gets_votes_from_every_view(files):
    dataset = PointDataset(files, PLAIN, 4)
    test = PreciseTest(dataset.cloud(0), PLAIN, 4)
    seen = torch.zeros(200)
    for batch in test:
        assert len(set(batch["index"].tolist())) == len(batch["coord"]) == batch["offset"].item()
        seen[batch["index"]] += 1
        test.add(batch, torch.randn(len(batch["coord"]), 4).bfloat16())
    assert seen.min() >= len(VIEWS)
    torch.testing.assert_close(test.votes.sum(1), seen, atol=1e-4, rtol=1e-5)            # probabilities, not logits
    assert test.prediction().shape == (200,)


def test_votes_are_sums_of_probabilities(monkeypatch):
    """One confident fragment outweighs two lukewarm ones; counting labels would say otherwise."""
    cloud = {"coord": np.zeros((1, 3), np.float32)}
    spec = PointSpec(features=("coord",))
    monkeypatch.setattr(points, "VIEWS", VIEWS[:3])
    test = PreciseTest(cloud, spec, 2)
    for batch, logits in zip(test, ([[9.0, 0]], [[0, 0.1]], [[0, 0.1]]), strict=True):
        test.add(batch, torch.tensor(logits))
    assert test.prediction().tolist() == [0]


def test_thinning_before_the_test_maps_back_to_raw_points():
    coord = np.float32([[0, 0, 0], [0, 0, 0.003], [0.5, 0, 0], [0.5, 0, 0.003]])
    spec = PointSpec(0.02, features=("coord",), test_grid_size=0.01)
    test = PreciseTest({"coord": coord, "label": np.zeros(4, int)}, spec, 2)
    assert len(test.votes) == 2
    for batch in test:
        right = torch.from_numpy(test.cloud["coord"][batch["index"].numpy(), 0] > 0)
        test.add(batch, torch.stack([~right, right], 1) * 5.0)
    assert test.prediction().tolist() == [0, 0, 1, 1]


def test_memory_limit_changes_nothing_but_the_speed(files, monkeypatch):
    expected = PointDataset(files, PLAIN, 4)[2]
    monkeypatch.setattr(points, "POINTS_IN_MEMORY", 300)
    dataset = PointDataset(files, PLAIN, 4)
    assert list(dataset._kept) == [0]
    assert all(torch.equal(expected[name], dataset[2][name]) for name in ("feat", "label", "inverse"))


def dense(n=40):
    """n different points in one voxel, n equal ones in another, one alone."""
    rng = np.random.default_rng(0)
    coord = np.concatenate([rng.uniform(0.01, 0.02, (n, 3)), np.full((n, 3), 1.02), [[2.02, 0.02, 0.02]]])
    return {"coord": coord.astype(np.float32), "color": np.repeat(np.float32([[255] * 3, [0] * 3, [0] * 3]), [n, n, 1], 0)}


FEW = PointSpec(0.05, features=("coord", "color"), center=False)


def vote(test):
    """Logits that say whether a point is white; -> number of batches."""
    batches = list(test)
    for batch in batches:
        test.add(batch, torch.stack([1 - batch["feat"][:, 3], batch["feat"][:, 3]], 1) * 4)
    return len(batches)


def test_equal_points_share_their_passes():
    cloud = dense()
    test = PreciseTest(cloud, FEW, 2)
    assert len(test.votes) == 42 and test.count_passes() == vote(test) == 13 * 40
    assert len(test.prediction()) == 81 and test.prediction()[40:].tolist() == [0] * 41 and test.prediction()[:40].sum() == 40
    other = {**cloud, "color": np.arange(243, dtype=np.float32).reshape(81, 3)}          # equal in place alone
    assert len(PreciseTest(other, FEW, 2).votes) == 81
    returns = {"coord": np.zeros((500, 3), np.float32), "color": np.zeros((500, 3), np.float32)}
    test = PreciseTest(returns, FEW, 2)
    assert vote(test) == 13 and test.prediction().shape == (500,)


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_bounded_passes_still_label_every_point(most):
    cloud = dense()
    test = PreciseTest(cloud, FEW, 2, most)
    assert test.count_passes() == vote(test) == 13 * min(40, most)
    assert (test.votes.sum(1) > 12.99).all() and test.prediction().tolist() == [1] * 40 + [0] * 41
    full = PreciseTest(cloud, FEW, 2)
    vote(full)
    if most == 100:
        assert torch.equal(test.votes, full.votes)
    seen = {index for batch in PreciseTest(cloud, FEW, 2, most) for index in batch["index"].tolist()}
    assert len(seen) == min(40, most) + 2                                                # those that passed; the others got votes


def test_points_beyond_the_bound_get_the_votes_of_one_fragment():
    spec = PointSpec(0.5, features=("coord",), center=False)
    test = PreciseTest({"coord": np.linspace(0.1, 0.2, 5, dtype=np.float32)[:, None].repeat(3, 1)}, spec, 2, 2)
    batches = [batch for batch, _ in zip(test, range(2), strict=False)]
    assert [batch["index"].tolist() for batch in batches] == [[0], [1]]
    assert [batch["others"].tolist() for batch in batches] == [[2, 4], [3]] and batches[0]["other_places"].tolist() == [0, 0]
