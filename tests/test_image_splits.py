"""Which files are which split, and class names from JSON."""

import json

import numpy as np
import pytest

from data.image_splits import checked_dataset, read_classes, split_pairs
from tests.tiny_images import write_classes, write_pictures

DATA = {"image_paths": [], "mask_paths": [], "val_image_paths": [], "val_mask_paths": [], "test_image_paths": [], "test_mask_paths": [],
        "val_share": 0.0, "num_classes": 3, "ignore_label": 255, "reduce_zero_label": False, "cache_dir": "", "image_size": 32}


def data_of(folder, **more):
    return {**DATA, "image_paths": [f"{folder}/images"], "mask_paths": [f"{folder}/masks"], **more}


def stems(pairs):
    assert all(image.stem == mask.stem for image, mask in pairs)
    return [image.stem[-1] for image, _ in pairs]


def test_held_out_pictures_are_in_no_other_split(tmp_path):
    data = data_of(write_pictures(tmp_path, 8), val_share=0.25)
    assert stems(split_pairs(data, "train")) == list("012456") and stems(split_pairs(data, "val")) == list("37")


def test_named_splits(tmp_path):
    folder, other = write_pictures(tmp_path / "a", 4), write_pictures(tmp_path / "b", 2, first_seed=7)
    named = {"val_image_paths": [f"{other}/images/*.png"], "val_mask_paths": [f"{other}/masks"]}
    data = data_of(folder, val_share=0.5, **named)                         # a named split wins over a share
    assert stems(split_pairs(data, "train")) == list("0123") and stems(split_pairs(data, "val")) == list("78")


@pytest.mark.parametrize("more, split, message", [
    ({}, "test", "--test-image-paths and --test-mask-paths are needed"),
    ({"val_image_paths": ["x"]}, "val", "belong together"),
    ({"image_paths": [], "mask_paths": []}, "train", "--image-paths and --mask-paths are needed"),
    ({"val_share": 0.1}, "val", "leaves no validation image of 4"),
    ({}, "val", "there is no validation split"),
])
def test_errors_name_the_flag(tmp_path, more, split, message):
    with pytest.raises(ValueError, match=message):
        split_pairs(data_of(write_pictures(tmp_path, 4), **more), split)


def test_classes(tmp_path):
    names, colors = read_classes(write_classes(tmp_path / "classes.json"), 3)
    assert names == ["sky", "ground", "box"] and colors.dtype == np.uint8 and colors.tolist()[2] == [200, 50, 40]
    names, colors = read_classes(None, 4)
    assert names[3] == "class 3" and colors.shape == (4, 3)
    (tmp_path / "names.json").write_text(json.dumps({"classes": ["a", "b"]}))
    assert read_classes(tmp_path / "names.json", 2)[0] == ["a", "b"]


@pytest.mark.parametrize("content, message", [
    ("{", "expected"), ("[1, 2]", "expected"), ('{"classes": ["a"]}', "1 names"), ('{"names": []}', "expected"),
    ('{"classes": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 300]]}', "0 to 255"),
    ('{"classes": ["a", "b"], "palette": [[0, 0], [0, 0]]}', "palette of shape"),
])
def test_wrong_class_files_are_refused(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.json", 2)


def test_every_file_is_checked_first(tmp_path):
    data = data_of(write_pictures(tmp_path, 3))
    dataset, summary = checked_dataset(data, split_pairs(data, "train"))
    assert len(dataset) == 3 and summary.class_counts.shape == (3,)
    with pytest.raises(ValueError, match="picture_"):
        checked_dataset({**data, "num_classes": 2}, split_pairs(data, "train"))
