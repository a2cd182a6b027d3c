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
from data.synthetic_points import (
    BUILDING,
    FLOOR,
    GROUND,
    IGNORE_INDEX,
    ORIGIN,
    POINT_CLASSES,
    TABLE,
    TERRAIN_CLASSES,
    TERRAIN_CODES,
    VEGETATION,
    WALL,
    WIRE,
    make_point_set,
    make_room,
    make_terrain,
    make_terrain_set,
)


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
    assert dataset.num_points == [5000] * 3 and dataset.notes == [] and palette.shape == (len(names), 3)
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


# -- terrain -----------------------------------------------------------------------------------------------------------

def test_terrain_is_an_aerial_scan():
    terrain = make_terrain(np.random.default_rng(0), 40_000)
    local = terrain.coord - ORIGIN
    assert terrain.coord.dtype == np.float64 and (local[:, :2] >= -1e-6).all() and (local[:, :2] <= 60 + 1e-6).all()
    share = np.bincount(terrain.label, minlength=5) / 40_000
    assert (share > 0.003).all() and share[GROUND] > 0.5 and share[WIRE] == 0.01
    assert (terrain.label[terrain.return_number == 2] == GROUND).mean() > 0.9   # what is seen through a crown
    assert {*zip(terrain.return_number.tolist(), terrain.number_of_returns.tolist(), strict=True)} == {(1, 1), (1, 2), (2, 2)}
    assert (terrain.number_of_returns[terrain.label == BUILDING] == 1).all() and (terrain.number_of_returns[terrain.label == VEGETATION] == 2).any()
    ground = local[terrain.label == GROUND]
    assert np.ptp(ground[:, 2]) > 2                                             # hills: height alone tells nothing
    tree = DecisionTreeClassifier(max_depth=12, random_state=0)
    alone = np.column_stack([local[:, 2], terrain.intensity, terrain.return_number, terrain.number_of_returns])
    other = make_terrain(np.random.default_rng(1), 40_000)
    seen = np.column_stack([(other.coord - ORIGIN)[:, 2], other.intensity, other.return_number, other.number_of_returns])
    pred = tree.fit(alone, terrain.label).predict(seen)
    recall = [(pred[other.label == c] == c).mean() for c in range(5)]
    assert np.mean(recall) < 0.6                                                # surroundings are needed


def test_terrain_sets_are_repeatable_and_readable(tmp_path):
    for folder in ("a", "b"):
        make_terrain_set(tmp_path / folder, 1, 1, 0, seed=3, num_points=900)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") and len(digests(tmp_path / "a")) == 3
    assert main(["terrain", str(tmp_path / "c"), "--num-train", "1", "--num-val", "0", "--num-test", "0", "--points", "900"]) == TERRAIN_CLASSES
    with np.load(tmp_path / "a" / "train" / "tile_000.npz") as tile:
        assert {*np.unique(tile["classification"])} <= {*TERRAIN_CODES} and tile["coord"].shape == (900, 3) and tile["intensity"].dtype == np.uint16
    with pytest.raises(ValueError, match="num_points=0"):
        make_terrain(np.random.default_rng(0), 0)
