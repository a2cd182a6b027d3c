"""scripts/lod3_folds.py on made-up meshes: folds, scores of a forest and of a network."""

import pytest
import yaml

from scripts import lod3_folds
from tests.tiny_meshes import write_set


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    write_set(folder / "meshes", 4)
    settings = {"paths": {"mesh_dir": str(folder / "meshes"), "cache_dir": str(folder / "cache")},
                "data": {"class_names": ["low", "high", "cap"]},
                "model": {"n_classes": 3, "features": ["normal", "plane", "height"], "embedding_dim": 16, "num_heads": 2,
                          "num_attention_blocks": 1},
                "augmentation": {"mode": "z"}, "training": {"epochs": 1}, "logging": {"tensorboard": False}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_parts_of_a_building_are_in_one_fold():
    names = ["4018149a", "4018149b", "4018106", "4018204a", "4018204d", "4018302"]
    folds = lod3_folds.held_out(names, 3)
    assert folds == [["4018106*", "4018302*"], ["4018149*"], ["4018204*"]]
    with pytest.raises(ValueError, match="--folds 5: the files are of 4 buildings"):
        lod3_folds.held_out(names, 5)


def test_a_forest_is_better_than_chance(config):
    result = lod3_folds.main([str(config), "--forest", "--folds", "2"])
    assert len(result["by face"]["folds"]) == 2 and result["by face"]["sum"]["miou"] > 0.7
    assert result["by area"]["sum"]["overall_accuracy"] != result["by face"]["sum"]["overall_accuracy"]


def test_a_network_is_scored_on_what_it_has_not_seen(config, tmp_path, capsys):
    result = lod3_folds.main([str(config), "--output-dir", str(tmp_path), "--folds", "2", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "by face, mIoU: mean" in shown and "IoU: low" in shown
    assert all((tmp_path / f"fold{fold}" / "model" / "model_last.pth").is_file() for fold in (0, 1))
    scores = [fold["overall_accuracy"] for fold in result["by face"]["folds"]]
    assert min(scores) <= result["by face"]["sum"]["overall_accuracy"] <= max(scores)


def test_either_a_forest_or_a_network(config, tmp_path):
    for flags in ([], ["--forest", "--output-dir", str(tmp_path)]):
        with pytest.raises(ValueError, match="give --output-dir for a network, or --forest"):
            lod3_folds.main([str(config), *flags])
