"""scripts/tabletop_folds.py and benchmarks/point_trees.py on made-up clouds."""

import json

import numpy as np
import pytest

from benchmarks import point_trees
from scripts import tabletop_folds
from tests.tiny_clouds import write_clouds


def test_held_out_objects_leave_training_and_only_they_are_scored():
    cloud = {"coord": np.arange(12.0).reshape(4, 3), "segment": np.array([0, 1, 1, 2]),
             "instance": np.array([-1, 0, 1, 2])}
    train, val = tabletop_folds.hold_out(cloud, ["red", "green", "cup"], ("red", "cup"))
    assert train["segment"].tolist() == [0, 1] and train["instance"].tolist() == [-1, 1]
    np.testing.assert_array_equal(train["coord"], cloud["coord"][[0, 2]])
    assert val["segment"].tolist() == [0, 1, 2] and val["instance"].tolist() == [-1, 0, 2]      # the other object is cut out
    assert tabletop_folds.hold_out(cloud, ["red", "green", "cup"], ("tin",))[1] is None
    assert tabletop_folds.hold_out(cloud, ["red", "green", "cup"], ("red", "green", "cup"))[0] is None
    assert cloud["segment"].tolist() == [0, 1, 1, 2]


def test_every_object_is_in_one_fold():
    named = {name for line in tabletop_folds.OBJECTS.values() for name in line.split()}
    listed = [name for fold in tabletop_folds.FOLDS for name in fold]
    assert named == set(listed) and len(listed) == len(named)


def test_folds_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tabletop_folds, "OBJECTS", {"a": "red", "b": "red tin", "c": "bowl"})
    (tmp_path / "classes.json").write_text('["table", "box", "round"]')
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["a", "b"], "val": ["c"], "test": ["d"]}))
    for name, objects in (("a", 1), ("b", 2), ("c", 1)):
        np.savez(tmp_path / f"{name}.npz", coord=np.zeros((objects + 1, 3)), segment=np.arange(objects + 1),
                 instance=np.arange(-1, objects))
    result = tabletop_folds.main([str(tmp_path), str(tmp_path / "folds")])
    assert result == {"fold0": {"train": 2, "val": 2}, "fold1": {"train": 3, "val": 1}, "fold2": {"train": 2, "val": 1}}
    assert json.loads((tmp_path / "folds/fold0/splits.json").read_text()) == {
        "train": ["train_b", "train_c"], "val": ["val_a", "val_b"]}


def test_trees_learn_and_take_fewer_clouds(tmp_path, capsys):
    for split, first in (("train", 0), ("val", 50)):
        write_clouds(tmp_path / split, 4, first)
    (tmp_path / "config.yaml").write_text(f"data: {{root: {tmp_path}, grid_size: 0.02}}\nmodel: {{num_classes: 3}}\n")
    arguments = [str(tmp_path / "config.yaml"), f"paths.cache_dir={tmp_path / 'cache'}",
                 "data.features=[color,normal,height,shape]"]
    result = point_trees.main(arguments)
    assert result["miou"] > 0.8 and result["matrix"].sum() == 4 * 295 + 7 * (0 + 1 + 2 + 3)     # 5 points have no class
    point_trees.main([*arguments, "--clouds", "1", "--points", "100", "--balanced"])
    assert "100 of" in (out := capsys.readouterr().out) and "of 1 clouds, 19 features, val split, seed 0" in out


@pytest.mark.parametrize("script", [tabletop_folds, point_trees])
def test_help(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "usage" in capsys.readouterr().out
