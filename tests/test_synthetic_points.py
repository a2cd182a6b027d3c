"""data/synthetic_points.py: rooms that are repeatable, labelled as they look, and not given away by their colours."""

import hashlib
import time

import numpy as np
import pytest
from sklearn.tree import DecisionTreeClassifier

from data.point_files import find_clouds, read_classes
from data.point_transforms import voxelize
from data.points import PointDataset, PointSpec
from data.synthetic import main
from data.synthetic_points import FLOOR, IGNORE_INDEX, POINT_CLASSES, TABLE, WALL, make_point_set, make_room


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_and_splits_do_not_depend_on_one_another(tmp_path):
    for folder, counts, seed in (("a", (2, 1, 1), 0), ("b", (2, 1, 1), 0), ("c", (3, 0, 1), 0), ("d", (2, 1, 1), 1)):
        make_point_set(tmp_path / folder, *counts, seed, 500)
    a, b, c, d = (digests(tmp_path / folder) for folder in "abcd")
    assert a == b and len(a) == 5
    assert a["train/room_001.npz"] == c["train/room_001.npz"] and a["test/room_000.npz"] == c["test/room_000.npz"]
    assert not set(a.values()) & {value for name, value in d.items() if name.endswith("npz")}


def test_the_data_set_reads_it(tmp_path):
    assert main(["points", str(tmp_path), "--num-train", "3", "--num-val", "1", "--num-test", "0", "--points", "5000"]
                ) == POINT_CLASSES
    names, ignored, palette = read_classes(tmp_path)
    dataset = PointDataset(find_clouds(tmp_path, "train"), PointSpec(0.05), len(names), ignore_labels=ignored)
    assert dataset.num_points == [5000] * 3 and dataset.messages == [] and palette.shape == (len(names), 3)
    assert (dataset.class_counts > 0).all()


def test_100000_points_quickly():
    begin = time.perf_counter()
    room = make_room(np.random.default_rng(0), 100_000)
    assert time.perf_counter() - begin < 3                                               # 0.1 s on an idle core
    assert room.coord.shape == room.color.shape == room.normal.shape == (100_000, 3) and len(room.label) == 100_000
    assert 70_000 < len(voxelize(room.coord, 0.02).grid_coord) < 100_000


def test_a_larger_room_takes_more_furniture():
    size = (12.0, 9.0, 2.5)
    large, small = (make_room(np.random.default_rng(1), 20_000, s) for s in (size, (3.5, 3.0, 2.5)))
    assert np.ptp(large.coord, 0).max() > 9 and set(large.label) >= set(range(len(POINT_CLASSES)))
    assert np.ptp(small.coord, 0).max() < 5


def test_labels_and_normals_fit_the_shapes():
    for seed in range(5):
        room = make_room(np.random.default_rng(seed), 20_000)
        np.testing.assert_allclose(np.linalg.norm(room.normal, axis=1), 1, atol=1e-5)
        floor, wall, table = (room.label == label for label in (FLOOR, WALL, TABLE))
        assert np.abs(room.coord[floor, 2]).max() < 0.03 and (room.normal[floor, 2] > 0.999).all()
        middle = (room.coord[floor].min(0) + room.coord[floor].max(0)) / 2
        assert ((middle - room.coord[wall]) * room.normal[wall])[:, :2].sum(1).min() > 0   # walls look into the room
        assert 0.6 < room.coord[table, 2].max() < 0.85
        assert room.coord[:, 2].min() > -0.03 and set(room.label) <= {IGNORE_INDEX, *range(len(POINT_CLASSES))}


def test_colours_alone_do_not_tell_the_class():
    rooms = [make_room(np.random.default_rng(seed), 2000) for seed in range(24)]
    color = np.concatenate([room.color for room in rooms])
    label = np.concatenate([room.label for room in rooms])
    train = np.arange(len(label)) < 32_000
    tree = DecisionTreeClassifier(max_depth=8, random_state=0).fit(color[train], label[train])
    right = (tree.predict(color[~train]) == label[~train]).mean()
    assert right < (label[~train] == WALL).mean() + 0.1


def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_points=0"):
        make_room(np.random.default_rng(0), 0)
    with pytest.raises(ValueError, match="num_val=-1"):
        make_point_set(tmp_path, 1, -1, 0, num_points=10)
