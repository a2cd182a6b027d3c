"""benchmarks/bench_pretraining.py at tiny size: every row runs, the meshes are those asked for, the picture is drawn."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import train_jepa
from benchmarks import bench_pretraining
from data.mesh import Augmentation, MeshDataset, MeshSpec
from tests.tiny_meshes import write_set

MODEL = {"n_classes": 3, "features": ["normal", "area"], "embedding_dim": 16, "num_heads": 2, "num_attention_blocks": 2,
         "faces_per_cluster": 16}


@pytest.fixture
def command(tmp_path):
    """Arguments of the benchmark, with an encoder that train_jepa.py trained for one epoch."""
    for name, count, seed in (("train", 4, 0), ("val", 2, 100)):
        write_set(tmp_path / name, count, first_seed=seed)
    paths = {"mesh_dir": str(tmp_path / "train"), "val_mesh_dir": str(tmp_path / "val"), "cache_dir": None}
    (tmp_path / "jepa.yaml").write_text(yaml.safe_dump({
        "paths": paths, "model": MODEL, "training": {"epochs": 1, "batch_size": 2}, "monitor": {"stop": False},
        "logging": {"tensorboard": False}}))
    train_jepa.main([str(tmp_path / "jepa.yaml"), "--output-dir", str(tmp_path / "jepa"), "--device", "cpu",
                     "--num-workers", "0"])
    paths = {"mesh_dir": str(tmp_path / "train"), "val_mesh_dir": str(tmp_path / "val"), "cache_dir": None}
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump({"paths": paths, "model": MODEL}))
    return [str(tmp_path / "mesh.yaml"), "--pretrained_path", str(tmp_path / "jepa" / "model" / "model_last.pth"),
            "--device", "cpu", "--split", "val", "--views", "1"]


@pytest.mark.slow                    # four seconds, of a benchmark
def test_four_rows_and_the_picture(command, tmp_path, capsys):
    results = bench_pretraining.main([*command, "--labelled", "2", "--seeds", "0", "1", "--steps", "2",
                                      "--batch-size", "2"])
    assert set(results) == {("2", name) for name in bench_pretraining.ROWS}
    assert all(np.shape(scores) == (2, 4) and np.all((0 <= np.array(scores)) & (np.array(scores) <= 100))
               for scores in results.values())
    assert capsys.readouterr().out.count("accuracy") == 4
    bench_pretraining.main([*command, "--picture", str(tmp_path / "features.png")])
    assert Image.open(tmp_path / "features.png").size[0] > 0
    with pytest.raises(ValueError, match="--labelled many"):
        bench_pretraining.main([*command, "--labelled", "many"])


def test_items_are_those_of_the_meshes_asked_for_also_where_they_are_cut(tmp_path):
    spec = MeshSpec(("normal",), faces_per_cluster=8, clusters_per_batch=3)
    meshes = MeshDataset(sorted(write_set(tmp_path, 3).glob("*.obj")), tmp_path, spec, 3, Augmentation())
    items = bench_pretraining.items_of(meshes, np.array([2, 0]))
    assert len(meshes) > 3 and {int(meshes[i]["index"]) for i in items} == {0, 2}
    assert len(items) == sum(index != 1 for index, _, _ in meshes.items) and torch.is_tensor(meshes[0]["mask"])
