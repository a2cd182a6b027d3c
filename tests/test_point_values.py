"""data/point_values.py: what colours, normals and labels of files mean, whatever wrote them."""

import numpy as np
import pytest

from data.label_map import read_label_map
from data.point_values import NAN_LABEL, as_color, as_integers, as_unit, check_label_settings, file_labels, to_labels
from utils.losses import IGNORE_INDEX

BYTES = np.random.default_rng(0).integers(0, 256, (200, 3)).astype(np.uint8)
BYTES[0] = (0, 128, 255)


def read(color, color_range=None):
    warnings = []
    return as_color(color, "a.ply", warnings, color_range), warnings


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("most", [1.0, 1.0000001, 1.001])
def test_colours_from_0_to_1_may_be_rounded(kind, most):
    color = (BYTES / 255).astype(kind)
    color[0] = (-1e-7, 0.5, most)
    found, warnings = read(color)
    np.testing.assert_allclose(found, BYTES, atol=0.6)
    assert 0 <= found.min() and found.max() <= 255 and len(warnings) == 1 and "taken as 0..1" in warnings[0]


def test_floating_point_colours_below_2_are_a_doubt_that_a_setting_ends():
    found, warnings = read(BYTES / 255 * 1.3)
    assert found.max() == 255 and "colours up to 1.3, taken as 0..1 and cut at 1; set data.color_range=1, or 255" in warnings[0]
    found, warnings = read(BYTES / 255 * 1.3, (0, 255))
    assert found.max() == pytest.approx(1.3) and not warnings
    found, warnings = read(BYTES / 255, (0, 1))
    np.testing.assert_allclose(found, BYTES, atol=1e-3)
    assert not warnings


@pytest.mark.parametrize("color", [BYTES, BYTES.astype(int), BYTES.astype(np.float32), BYTES + 0.0005, np.zeros((9, 3))])
def test_colours_from_0_to_255_stay_as_they_are_without_a_word(color):
    found, warnings = read(color)
    np.testing.assert_allclose(found, np.clip(color, 0, 255), atol=0)
    assert not warnings


def test_wider_and_shifted_ranges():
    found, warnings = read(BYTES.astype(np.uint16) // 2)
    assert found.max() == 127 and "16-bit colours up to 127, taken as 0..255" in warnings[0] and "65535" in warnings[0]
    np.testing.assert_allclose(read(BYTES.astype(np.uint16) * 257, (0, 65535))[0], BYTES, atol=1e-3)
    np.testing.assert_allclose(read(BYTES / 127.5 - 1, (-1, 1))[0], BYTES, atol=1e-3)
    for color, given, message in ((BYTES / 127.5 - 1, None, "from -1 to 1; expected 0..255 .or 0..1.; another range: data.color_range="),
                                  (BYTES * 257.0, None, "from 0 to 65535"), (BYTES * 1.0, (0, 1), "from 0 to 255; expected 0..1, as data.color_range"),
                                  (BYTES * np.nan, (0, 1), "from nan"), (BYTES * 1.1, None, "from 0 to 280.5")):
        with pytest.raises(ValueError, match=f"a.ply: colours {message}"):
            read(color, given)


def test_normals_of_other_lengths_are_a_doubt():
    warnings = []
    normal = np.random.default_rng(0).random((50, 3))
    np.testing.assert_allclose(np.linalg.norm(as_unit(normal, "a.npy", warnings), axis=1), 1, atol=1e-6)
    assert len(warnings) == 1 and "a.npy: normals of length" in warnings[0]
    as_unit(normal / np.linalg.norm(normal, axis=1, keepdims=True), "a.npy", warnings)
    assert len(warnings) == 1


def test_normals_that_are_all_zero_or_nan_are_none():
    warnings = []
    for value in (0, np.nan, 1e300):
        assert as_unit(np.full((40, 3), value), "a.npy", warnings) is None
    assert not warnings
    normal = np.tile([[0, 0, 1.0]], (40, 1))
    normal[[3, 9]] = [[0, 0, 0], [np.nan, 0, 1]]
    assert as_unit(normal, "a.npy", warnings)[[3, 9, 10]].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert len(warnings) == 1 and "2 of 40 normals are zero or NaN" in warnings[0]


def test_nan_means_unlabelled_only_where_that_was_said():
    with np.errstate(all="raise"):
        assert as_integers(np.float16([0, np.nan, 2]), "a.ply").tolist() == [0, NAN_LABEL, 2]
    label = as_integers(np.float32([0, np.nan, 2, np.nan]), "a.ply")
    assert label.tolist() == [0, NAN_LABEL, 2, NAN_LABEL]
    assert to_labels(label, 3, (-1, "nan"), "a.ply").tolist() == [0, IGNORE_INDEX, 2, IGNORE_INDEX]
    with pytest.raises(ValueError, match=r"a.ply: label nan at 2 of 4 points.*data.ignore_labels=\[-1, nan\]"):
        to_labels(label, 3, (-1,), "a.ply")
    with pytest.raises(ValueError, match="label 0.5 of point 1 .1 in all. is not a whole number"):
        as_integers(np.array([np.nan, 0.5]), "a.ply")


def test_numbers_of_the_files_become_classes_and_back():
    values = np.array([1, 2, 3, 3, 0])
    assert to_labels(values, 3, (0,), "a", offset=-1).tolist() == [0, 1, 2, 2, IGNORE_INDEX]
    with pytest.raises(ValueError, match="label 3 at 2 of 5 points, expected 0..2 or -1 "):
        to_labels(values, 3, (-1,), "a")
    with pytest.raises(ValueError, match="Do the files count from 1. Then data.label_offset=-1"):
        to_labels(values[:4], 3, (-1,), "a")
    with pytest.raises(ValueError, match="label 4 at 1 of 5 points, expected 1..3 or 0 "):
        to_labels(np.array([1, 2, 3, 4, 0]), 3, (0,), "a", offset=-1)
    codes = as_integers(np.array([2.0, 5, 6, 5, np.nan, -1]), "a")
    found = to_labels(codes, 2, (-1, "nan"), "a", label_map=read_label_map("2:0,5:1,6:ignore"))
    assert found.tolist() == [0, 1, IGNORE_INDEX, 1, IGNORE_INDEX, IGNORE_INDEX]
    with pytest.raises(ValueError, match="a: value 6 .1 times. not in the label map"):
        to_labels(codes[:3], 2, (-1,), "a", label_map=read_label_map("2:0,5:1"))
    assert file_labels(np.array([0, 1]), {"label_map": "2:0,5:1"}).tolist() == [2, 5]
    assert file_labels(np.array([0, 1]), {"label_offset": -1}).tolist() == [1, 2]
    assert file_labels(np.array([0, 1]), {}).tolist() == [0, 1]


def test_settings_of_labels_are_checked():
    data = {"ignore_labels": [-1, "nan"], "label_map": {"ground": 2, "house": [5, 6]}, "label_offset": None}
    check_label_settings(data, 2)
    assert isinstance(data["label_map"], str) and read_label_map(data["label_map"]).names == ["ground", "house"]
    for changes, message in (({"ignore_labels": ["none"]}, "data.ignore_labels: 'none'; expected integers, and nan"),
                             ({"label_offset": -1}, "leave one out"), ({"label_map": "1:0"}, "1 classes and model.num_classes=2")):
        with pytest.raises(ValueError, match=message):
            check_label_settings({**data, **changes}, 2)
