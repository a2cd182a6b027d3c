"""train_downstream.py with model.encoder: diffusion_net, run whole on tiny meshes: from scratch, with the file's head and no training,
frozen, fine-tuned, with cached features, resumed, in two processes, and read by evaluate.py and predict.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import evaluate
import predict
import train_downstream
from models.diffusion_net import DiffusionNet
from tests.tiny_meshes import tiny_mesh, write_obj, write_set, write_textured_set
from tests.tiny_runs import TinyRun, run_pair
from tests.whole_runs import assert_equal, sigterm_in_call
from utils.checkpoint import load_checkpoint
from utils.cli import StopRequested

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surfaces")
    write_set(folder / "train", 6)
    write_set(folder / "val", 2, first_seed=100)
    write_set(folder / "test", 2, first_seed=200)
    return folder


@pytest.fixture
def config(data, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({
        "paths": {"mesh_dir": str(data / "train"), "val_mesh_dir": str(data / "val"), "test_mesh_dir": str(data / "test"),
                  "cache_dir": str(data / "cache")},
        "data": {"class_names": ["low", "high", "cap"]},
        "model": {"encoder": "diffusion_net", "n_classes": 3, "features": ["hks", "xyz"], "hks_scale": 0.1, "num_eigenpairs": 24,
                  "embedding_dim": 16, "num_diffusion_blocks": 2, "encoder_dropout": 0.2, "head": "linear"},
        "training": {"epochs": 2, "batch_size": 2},
        "optimizer": {"learning_rate": 0.01},
        "augmentation": {"mode": "z"},
        "logging": {"tensorboard": False, "log_interval": 1}}))
    return str(path)


@pytest.fixture(scope="module")
def official_like(tmp_path_factory):
    """A plain state dict with the names of the official files, for these features and three classes."""
    torch.manual_seed(7)
    net = DiffusionNet(19, 3, 16, 2)
    for block in net.blocks:
        block.diffusion.diffusion_time.data.uniform_(0.01, 0.2)
    path = tmp_path_factory.mktemp("weights") / "parts.pth"
    torch.save(net.state_dict(), path)
    return path


def train(config, output, *more):
    return train_downstream.main([config, "--output-dir", str(output), "--device", "cpu", "--num-workers", "0", *map(str, more)])


def weights(output, name="model_last.pth"):
    return load_checkpoint(Path(output) / "model" / name)


def assert_same_run(first, second):
    for section in ("model", "ema", "optimizer"):
        assert_equal(first[section], second[section], section)
    assert (first["epoch"], first["step"], first["best"]) == (second["epoch"], second["step"], second["best"])


def test_learns_and_every_reader_agrees(config, tmp_path):
    final = train(config, tmp_path / "run", "training.epochs=15")
    assert final["overall_accuracy"] > 0.85
    best = str(tmp_path / "run" / "model" / "model_best.pth")
    again = train(config, tmp_path / "run", "--resume", best, "--test-only", "paths.test_mesh_dir=null")
    scored = evaluate.main([best, "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / "evaluation")])
    assert again["mean_f1"] == scored["mean_f1"] == final["best"] and again["miou"] == scored["miou"]
    vertices, faces, label = tiny_mesh(301)
    order = np.random.default_rng(0).permutation(len(faces))
    write_obj(tmp_path / "plain.obj", vertices, faces)
    write_obj(tmp_path / "permuted.obj", vertices, faces[order])
    labels = predict.main([best, str(tmp_path / "plain.obj"), str(tmp_path / "permuted.obj"), "--output", str(tmp_path / "out"), "--device",
                           "cpu", "--html", "--pca"])
    plain, permuted = labels.values()
    assert (plain == label).mean() > 0.7 and np.array_equal(plain[order], permuted)


def test_no_epochs_scores_and_predicts_with_the_files_own_head(config, data, tmp_path, official_like, capsys):
    final = train(config, tmp_path / "run", "--pretrained_path", official_like, "training.epochs=0", "training.pretrained_head=true")
    assert "matched 22/22 encoder and head tensors from" in capsys.readouterr().out
    model, original = weights(tmp_path / "run", "model_best.pth")["model"], torch.load(official_like, weights_only=True)
    for name, value in original.items():
        assert torch.equal(model[name.replace("last_lin.", "head.") if name.startswith("last_lin.") else f"encoder.{name}"], value)
    best = str(tmp_path / "run" / "model" / "model_best.pth")
    assert evaluate.main([best, "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / "e")])["miou"] == final["miou"]
    label, = predict.main([best, str(data / "test" / "mesh_00.obj"), "--output", str(tmp_path / "out"), "--device", "cpu"]).values()
    assert len(label) == len(tiny_mesh(200)[1])


def test_frozen_and_partly_frozen_encoders_keep_what_they_should(config, tmp_path, official_like):
    original = torch.load(official_like, weights_only=True)
    for unfrozen, moved in ((0, []), (1, ["block_1"]), ("all", ["block_0", "block_1", "first_lin"])):
        train(config, tmp_path / f"run_{unfrozen}", "--pretrained_path", official_like, f"training.num_unfrozen_encoder_layers={unfrozen}")
        model = weights(tmp_path / f"run_{unfrozen}")["model"]
        changed = {name.split(".")[0] for name, value in original.items()
                   if name[:8] != "last_lin" and not torch.equal(model[f"encoder.{name}"], value)}
        assert sorted(changed) == moved


def test_cached_features_give_the_same_run_bit_for_bit(config, tmp_path, official_like):
    options = "--pretrained_path", official_like, "augmentation.mode=none"
    train(config, tmp_path / "plain", *options)
    train(config, tmp_path / "cached", *options, "training.cache_features=true")
    assert_same_run(weights(tmp_path / "plain"), weights(tmp_path / "cached"))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resume_is_exact(config, tmp_path, monkeypatch, step):
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(StopRequested):
        sigterm_in_call(patch, train_downstream.EMA, "update", step)
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts", "--resume", "auto")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_our_checkpoint_is_a_pretrained_file(config, tmp_path, capsys):
    train(config, tmp_path / "first")
    file = tmp_path / "first" / "model" / "model_last.pth"
    train(config, tmp_path / "second", "--pretrained_path", file, "training.pretrained_head=true", "training.epochs=0")
    assert "(layout: model: encoder.*)" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "first")["model"], weights(tmp_path / "second")["model"], "model")


def test_texture(config, tmp_path):
    folder = write_textured_set(tmp_path / "textured", 4)
    val = write_textured_set(tmp_path / "val", 2, first_seed=50)
    final = train(config, tmp_path / "run", f"paths.mesh_dir={folder}", f"paths.val_mesh_dir={val}", "model.n_classes=2", "data.class_names=[red, blue]",
                  "model.use_texture=true", "model.texture_embed_dim=8", "model.max_texture_pixels=4", "training.epochs=8", "paths.test_mesh_dir=null")
    assert final["overall_accuracy"] > 0.9


@pytest.mark.parametrize("more, message", [
    (["model.features=[corners]"], r"model.features: unknown \['corners'\] for vertices; choose from"),
    (["model.unit=10"], "model.unit is for clusters of faces"), (["training.clusters_per_batch=4"], "training.clusters_per_batch is for clusters of faces"),
    (["augmentation.recluster=true"], "augmentation.recluster is for networks on clusters of faces"),
    (["training.pretrained_head=true", "model.head=mlp"], "set model.encoder: diffusion_net and model.head: linear"),
    (["model.num_eigenpairs=0"], "model.num_eigenpairs=0")])
def test_user_errors_name_the_place(config, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", *more)


def test_files_that_do_not_fit_are_refused(config, tmp_path, official_like):
    with pytest.raises(ValueError, match="the file has a DiffusionNet of 19 input channels, .* the model is one of 16"):
        train(config, tmp_path / "run", "--pretrained_path", official_like, "model.features=[hks]")


def test_two_processes_equal_one_with_the_double_batch(config, tmp_path):
    options = ["training.epochs=1", "model.encoder_dropout=0", "augmentation.mode=none"]
    train(config, tmp_path / "one", *options, "training.batch_size=6")
    run = TinyRun("train_downstream.py", [config, "--device", "cpu", "--num-workers", "0", *options, "training.batch_size=3"], tmp_path)
    run_pair(run, tmp_path / "two")
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=1e-3, atol=2e-4)
