"""Which files are which split, and class names from JSON."""

import json

import numpy as np
import pytest

from data.image_splits import (
    check_counts,
    check_file_settings,
    checked_dataset,
    class_info,
    folder_pairs,
    given_pairs,
    mask_reader,
    read_class_file,
    read_classes,
    split_pairs,
    training_doubts,
)
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
    ('{"classes": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 1e400]]}', "expected"),
    ('{"classes": ["a", "b"], "palette": [[1.0, 0, 0], [0, 0.5, 0]]}', "whole numbers, 0 to 255"),
    ('{"classes": {"0": "a", "1": "b"}}', "dict in place of a list of names"), ('{"classes": "ab"}', "str in place of a list of names"),
    ('{"classes": ' + "[" * 5000, "expected"),
    ('{"classes": ["a", "b"], "palette": [[0, 0], [0, 0]]}', "palette of shape"), ('{"classes": ["a"], "palette": [[0], [0, 1]]}', "expected"),
])
def test_wrong_class_files_are_refused(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "classes.json", 2)


@pytest.mark.parametrize("content", ["0 background\n1 traffic light\n2 sky\n", "2\tsky\n\n 0: background \n1 traffic light", "background\ntraffic light\nsky",
                                     "\ufeff0 background\n1 traffic light\n2 sky"])
def test_lists_of_names(tmp_path, content):
    (tmp_path / "classes.txt").write_text(content, encoding="utf-8")
    assert read_class_file(tmp_path / "classes.txt") == (["background", "traffic light", "sky"], None)
    names, colors = class_info(tmp_path, None, 3)                                         # found by itself
    assert names[1] == "traffic light" and colors.shape == (3, 3) and colors.dtype == np.uint8


def test_the_class_file_named_wins_then_json(tmp_path):
    assert class_info(tmp_path, "", 2)[0] == ["class 0", "class 1"]
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    write_classes(tmp_path / "classes.json")
    (tmp_path / "mine.txt").write_text("x\ny\nz")
    names, colors = class_info(tmp_path, None, 3)
    assert names == ["sky", "ground", "box"] and colors.tolist()[2] == [200, 50, 40]
    assert class_info(tmp_path, tmp_path / "mine.txt", 3)[0] == ["x", "y", "z"]
    with pytest.raises(ValueError, match="3 names for num_classes=4"):
        class_info(tmp_path, None, 4)
    with pytest.raises(ValueError, match="gone.txt: .*FileNotFoundError"):
        class_info(tmp_path, tmp_path / "gone.txt", 3)


@pytest.mark.parametrize("content, message", [
    ("1 a\n2 b", "the numbers of 2 classes are 1, 2; expected each of 0 to 1"), ("0 a\n0 b", "expected each of 0 to 1"),
    ("0 a\nb", '"b" has no number in front'), ("0 a\n" + "1" * 5000 + " b", "has no number in front")])
def test_wrong_lists_of_names_are_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_file(tmp_path / "classes.txt")


def test_folders_by_split(tmp_path):
    write_pictures(tmp_path, 2)
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir()
        for path in (tmp_path / kind).glob("*.png"):
            path.rename(path.parent / "train" / path.name)
    assert stems(folder_pairs(tmp_path, "train")) == list("01")
    with pytest.raises(ValueError, match="images/val: no such folder; expected images/SPLIT and masks/SPLIT in .*, with SPLIT train"):
        folder_pairs(str(tmp_path), "val")
    next((tmp_path / "masks" / "train").iterdir()).unlink()
    with pytest.raises(ValueError, match="images/train: 1 of 2 files have no partner of the same name in .*masks/train"):
        folder_pairs(tmp_path, "train")
    (tmp_path / "images" / "empty").mkdir()
    (tmp_path / "masks" / "empty").mkdir()
    with pytest.raises(ValueError, match="images/empty: no images"):
        folder_pairs(tmp_path, "empty")


def test_every_file_is_checked_first(tmp_path):
    data = data_of(write_pictures(tmp_path, 3))
    dataset, summary = checked_dataset(data, split_pairs(data, "train"))
    assert len(dataset) == 3 and summary.class_counts.shape == (3,)
    with pytest.raises(ValueError, match="picture_"):
        checked_dataset({**data, "num_classes": 2}, split_pairs(data, "train"))


def test_masks_of_one_class_are_refused_and_absent_classes_named():
    names = ["a", "b", "c"]
    with pytest.raises(ValueError, match="all labelled pixels of the training masks are b, .*; 255 is ignored: "):
        check_counts(names, np.array([0, 5, 0]), "255 is ignored")
    assert check_counts(names, np.array([1, 5, 0]), "255 is ignored") == ["WARNING: no pixel of the training masks is c; 255 is ignored"]
    assert check_counts(names, np.array([1, 5, 2]), "") == []


def test_photographs_of_both_splits_and_doubts_of_validation_are_named(tmp_path):
    write_pictures(tmp_path, 3)
    data = {"image_size": 64, "num_classes": 3, "ignore_label": 255, "reduce_zero_label": False, "cache_dir": ""}
    train, val = (checked_dataset(data, given_pairs(tmp_path / "images", tmp_path / "masks", data)[part])[0] for part in (slice(2), slice(1, 3)))
    val.notes = ["WARNING: of val"]
    lines = training_doubts(list("abc"), train, val, data)
    assert lines[0] == "WARNING: of val" and "1 of 2 validation photographs are training photographs too" in lines[1] and "picture_001.png" in lines[1]
    val.files = val.files[1:]
    assert training_doubts(list("abc"), train, val, data) == ["WARNING: of val"] and training_doubts(list("abc"), train, None, data) == []


@pytest.mark.parametrize("ignored", [65535, -1])
def test_a_value_of_unlabelled_beyond_8_bits_names_the_label_map(ignored):
    with pytest.raises(ValueError, match=rf"ignore_label={ignored}: expected a number from 0 to 255; .* 0:0,1:1,{ignored}:ignore \(--label-map\)"):
        check_file_settings({"ignore_label": ignored}, 2)


def test_colours_of_masks_are_those_of_a_class_file_that_fits(tmp_path):
    write_classes(tmp_path / "classes.json")
    data = data_of(tmp_path, classes=str(tmp_path / "classes.json"))
    assert mask_reader(data, 3).colors.tolist() == read_class_file(tmp_path / "classes.json")[1].tolist()
    assert mask_reader(data, 4).colors is None and mask_reader(data_of(tmp_path, classes=""), 3).colors is None
    (tmp_path / "classes.json").write_text('{"classes": ["sky", "ground", "box"]}')
    assert mask_reader(data, 3).colors is None
