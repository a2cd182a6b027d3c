"""Numbers of label files as classes, and back."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data.label_map import LabelMap, read_label_map, unread_classes
from utils.losses import IGNORE_INDEX


@pytest.mark.parametrize("given, targets, names", [
    ("0:0,255:1", {0: 0, 255: 1}, None), (" 0:0, 255:1,\n4:ignore ", {0: 0, 255: 1, 4: IGNORE_INDEX}, None),
    ("11:0,12:1,48:1,0:ignore", {11: 0, 12: 1, 48: 1, 0: IGNORE_INDEX}, None), ("-1:ignore,7:0,9:1", {-1: IGNORE_INDEX, 7: 0, 9: 1}, None),
    ("0:background,255:object,4:void", {0: 0, 255: 1, 4: IGNORE_INDEX}, ["background", "object"]),
    ({0: "background", 255: "object"}, {0: 0, 255: 1}, ["background", "object"]), ({"0": 0, "255": 1, "3": None}, {0: 0, 255: 1, 3: IGNORE_INDEX}, None),
    ({"background": 0, "tooth": [11, 12], "ignore": 255}, {0: 0, 11: 1, 12: 1, 255: IGNORE_INDEX}, ["background", "tooth"]),
    ({"map": {"0": 0, "255": 1, "9": "ignore"}, "names": ["a", "b"]}, {0: 0, 255: 1, 9: IGNORE_INDEX}, ["a", "b"]),
    ({"labels": {"ground": 2, "roof": 6}}, {2: 0, 6: 1}, ["ground", "roof"]), ('{"0": 0, "255": 1}', {0: 0, 255: 1}, None),
    ({"classes": [{"id": 2, "name": "ground"}, {"id": 6, "name": "roof"}, {"id": 7, "name": "ignore"}]}, {2: 0, 6: 1, 7: IGNORE_INDEX}, ["ground", "roof"]),
])
def test_what_is_read(given, targets, names):
    found = read_label_map(given)
    assert found.targets == targets and found.names == names
    again = read_label_map(found.text())                                   # what a checkpoint holds
    assert again.targets == targets and again.names == names


@pytest.mark.parametrize("name, text", [("map.json", '{"0": "background", "255": "object"}'), ("map.yaml", "0: background\n255: object\n"),
                                        ("map.yml", "background: 0\nobject: [255]\n"),
                                        ("map.json", '[{"id": 0, "name": "background"}, {"id": 255, "name": "object"}]')])
def test_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found = read_label_map(str(tmp_path / name))
    assert found.targets == {0: 0, 255: 1} and found.names == ["background", "object"]


def test_the_file_of_semantic_kitti(tmp_path):
    (tmp_path / "kitti.json").write_text(json.dumps({
        "labels": {"0": "unlabeled", "10": "car", "252": "moving-car", "40": "road"}, "learning_map": {"0": 0, "252": 1, "10": 1, "40": 9},
        "learning_map_inv": {"0": 0, "1": 10, "9": 40}, "learning_ignore": {"0": True, "1": False, "9": False}}))
    found = read_label_map(tmp_path / "kitti.json")
    assert found.targets == {0: IGNORE_INDEX, 10: 0, 252: 0, 40: 1} and found.names == ["car", "road"]
    assert found.class_values().tolist() == [10, 40]


def test_there_and_back():
    found = read_label_map("11:0,12:1,48:2,99:2,0:ignore")
    values = np.array([[11, 48, 99], [0, 12, 11]], np.uint16)
    label = found.to_labels(values, "m.png")
    assert label.dtype == np.int64 and label.tolist() == [[0, 2, 2], [IGNORE_INDEX, 1, 0]]
    assert found.to_values(label, preferred=0).tolist() == [[11, 48, 48], [0, 12, 11]]
    with pytest.raises(ValueError, match="3 classes"):
        found.to_values(np.array([3]))
    assert read_label_map("0:0,255:1").ignored_value(255) == 256 and read_label_map("0:0,255:1,7:ignore").ignored_value(255) == 7
    assert found.ignoring([255, 11]).targets == {255: IGNORE_INDEX, **found.targets}


def test_unmapped_values_are_listed_with_counts():
    found = read_label_map("0:0,255:1")
    with pytest.raises(ValueError, match=r"m.png: values 3 \(2 times\), 7 \(1 times\) not in the label map \(0:0,255:1\); add them"):
        found.to_labels(np.array([0, 3, 7, 255, 3]), "m.png")
    assert found.problem({0: 5, 255: 1, 9: 0}) is None
    assert "and 8 more" in found.problem({value: 1 for value in range(1, 21)})


@pytest.mark.parametrize("given, message", [
    ("", "VALUE:CLASS"), ("0", "not a VALUE:CLASS pair"), ("0:0,0:1", "given twice"), ("x:0", "not a VALUE:CLASS pair"),
    ("0:0,255:2", "its classes are 0, 2"), ("0:ignore", "its classes are none"), ("0:0,1:sky", "numbers and others names"),
    ("gone.json", "no such settings file"), ({"a": "b"}, "not an integer"), ({"map": {"0": 0}, "names": ["a", "b"]}, "2 names for 1 classes"),
    ("{0: ", "not valid"), ([], "VALUE:CLASS"), ({"0": "a\nb", "1": "c"}, "not text on one line"), ("1" * 30 + ":0", "not a VALUE")])
def test_everything_else_is_refused_in_one_line(given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_label_map(given)
    assert "\n" not in str(error.value)


def test_no_value_for_a_class():
    with pytest.raises(ValueError, match="its classes are 1; expected each of 0, 1, 2"):
        LabelMap({5: 1})


# -- a class file that is not read ---------------------------------------------------------------------------------------

def test_a_class_file_near_the_data_that_is_not_read_is_named(tmp_path):
    folder = tmp_path / "town" / "images" / "train"
    folder.mkdir(parents=True)
    names = ["class 0", "class 1"]
    assert unread_classes(names, folder, "do this") == []
    (tmp_path / "town" / "classes.txt").write_text("0 sky\n1 road\n")
    line, = unread_classes(names, folder, "do this")
    assert line == f"note: the classes have no names; {tmp_path}/town/classes.txt is not read: do this"
    assert unread_classes(["sky", "road"], folder, "do this") == []
    (folder / "classes.json").write_text("{}")
    assert "train/classes.json" in unread_classes(names, folder, "do this")[0]


@pytest.mark.parametrize("kind", ["images", "clouds", "meshes"])
def test_every_kind_of_data_says_so(kind, tmp_path):
    import train_downstream
    from data.image_splits import training_doubts
    from utils import point_scripts
    (tmp_path / "classes.json").write_text("[]")
    data = SimpleNamespace(files=[tmp_path / "set" / "train" / "a.x"], doubts=[], messages=[], notes=[], class_counts=np.ones(2), num_points=[1],
                           num_polygons=[1], num_faces=[1], ignored_classes=lambda: [], augmentation=SimpleNamespace(drop_color=0, drop_normal=0))
    names = ["class 0", "class 1"]
    lines = {"images": lambda: training_doubts(names, data, None, {"ignore_label": 255, "reduce_zero_label": False}),
             "clouds": lambda: point_scripts.describe_data(data, data, names),
             "meshes": lambda: train_downstream.describe_data(data, data, names)}[kind]()
    remedy = {"images": "--classes or, in a config, dataset.classes", "clouds": "data.root, or write its names into data.class_names",
              "meshes": "set data.class_names"}[kind]
    assert [line for line in lines if "classes.json is not read" in line and remedy in line]
