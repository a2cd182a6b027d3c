"""Labels and coloured clouds as files, and the picture of a cloud."""

import numpy as np
import pytest
from PIL import Image

from data.point_files import read_ply_vertices
from data.point_results import example_clouds, render_points, write_point_result
from utils.losses import IGNORE_INDEX

PALETTE = np.array([[10, 20, 200], [200, 30, 10]], np.uint8)
RNG = np.random.default_rng(0)
COORD = RNG.random((40, 3)).astype(np.float32)
LABEL = RNG.integers(0, 2, 40)
PREDICTION = {"label": LABEL, "coord": COORD}


@pytest.mark.parametrize("labels", ["npy", "txt"])
def test_labels_and_clouds_are_in_file_order(tmp_path, labels):
    colors = {"": PALETTE[LABEL], "_pca": np.full((40, 3), 7, np.uint8)}
    stem = tmp_path / "scan.v2"                                                # a name with a dot keeps it
    written = write_point_result(stem, PREDICTION, colors, labels)
    assert [path.name for path in written] == [f"scan.v2.{labels}", "scan.v2.ply", "scan.v2_pca.ply"]
    assert sorted(written) == sorted(tmp_path.iterdir())
    stored = np.load(written[0]) if labels == "npy" else np.loadtxt(written[0], dtype=int)
    assert (stored == LABEL).all() and (labels == "txt" or stored.dtype == np.int16)
    for path, color in zip(written[1:], colors.values(), strict=True):
        vertices = read_ply_vertices(path)
        assert (np.stack([vertices[axis] for axis in "xyz"], 1) == COORD).all()
        assert (np.stack([vertices[name] for name in ("red", "green", "blue")], 1) == color).all()
        assert (vertices["label"] == LABEL).all() if path is written[1] else "label" not in vertices


def test_labels_alone(tmp_path):
    assert write_point_result(tmp_path / "a", PREDICTION, {"": PALETTE[LABEL]}, picture="none") == [tmp_path / "a.npy"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_whole_files_or_none(tmp_path):
    write_point_result(tmp_path / "a", PREDICTION, {}, "txt")
    before = (tmp_path / "a.txt").read_bytes()
    with pytest.raises((ValueError, IndexError)):                              # colours of other points
        write_point_result(tmp_path / "a", {**PREDICTION, "label": 1 - LABEL}, {"": PALETTE[LABEL[:7]]}, "txt")
    assert (tmp_path / "a.txt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def pixels(picture):
    return np.asarray(picture).reshape(-1, 3)


def test_nearer_points_cover_farther_ones():
    """Two slabs above each other, seen from above: the upper colour alone; from below, the lower one."""
    x, y = np.meshgrid(np.linspace(0, 1, 30), np.linspace(0, 1, 30))
    slab = np.stack([x.ravel(), y.ravel(), np.zeros(900)], 1)
    coord, color = np.concatenate([slab, slab + [0, 0, 0.3]]), np.repeat(np.array([[255, 0, 0], [0, 0, 255]], np.uint8), 900, 0)
    for elevation, visible in ((90, 2), (-90, 0)):
        seen = pixels(render_points(coord, color, 120, azimuth=0, elevation=elevation))
        assert (seen[:, visible] == 255).all() and seen[:, 2 - visible].min() == 0          # its colour and white, nothing else
        assert (seen[:, 2 - visible] == seen[:, 1]).all()


def test_up_is_up_and_right_is_right():
    """Along y, from the front: what is higher in z stands higher in the picture."""
    coord = np.array([[0, 0, 0], [0, 0, 1.0], [1, 0, 0.5]])
    picture = np.asarray(render_points(coord, np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8), 90, azimuth=0, elevation=0)).astype(int)
    place = [np.argwhere((picture[..., c] > 200) & (picture.sum(2) < 400)).mean(0) for c in range(3)]
    assert place[1][0] < place[2][0] < place[0][0]                             # rows: green, blue, red
    assert place[2][1] > place[0][1] + 10 and abs(place[0][1] - place[1][1]) < 2


@pytest.mark.parametrize("coord", [np.zeros((1, 3)), np.ones((5, 3)), np.array([[0, 0, 0], [1e4, 0, 0]]), COORD * 1e-6])
def test_clouds_of_any_extent_are_drawn(coord):
    picture = render_points(coord, np.full((len(coord), 3), 0, np.uint8), 64)
    assert picture.size == (64, 64) and pixels(picture).min() < 255 and pixels(picture).max() == 255


def test_examples_show_the_truth_where_there_is_one():
    label = np.where(np.arange(40) < 10, IGNORE_INDEX, LABEL)
    truth, pred = example_clouds({"coord": COORD, "label": label}, LABEL.astype(np.int16), PALETTE)
    assert isinstance(truth, Image.Image) and isinstance(pred, Image.Image) and truth.size == pred.size
    grey = [(pixels(picture) == 200).all(1).any() for picture in (truth, pred)]
    assert grey == [True, False]                                               # points without a label
    for cloud in ({"coord": COORD}, {"coord": COORD, "label": np.full(40, IGNORE_INDEX)}):
        assert example_clouds(cloud, LABEL, PALETTE)[0] is None
