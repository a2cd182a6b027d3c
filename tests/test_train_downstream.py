"""train_downstream.py, evaluate.py and predict.py run whole, on tiny meshes: they learn, resume exactly, agree on every number."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml

import data.mesh_io as mesh_io
import data.mesh_results as data_mesh_results
import evaluate
import predict
import train_downstream
from data.mesh_io import read_mesh
from tests.tiny_meshes import CLASSES, tiny_mesh, write_obj, write_set, write_textured_set
from tests.tiny_runs import TinyRun, run_forked, run_pair, start_pair
from tests.whole_runs import assert_equal, refused, sigterm_in_call
from utils.checkpoint import load_checkpoint
from utils.cli import StopRequested
from utils.config import load_config
from utils.log import read_log
from utils.losses import MaskedCrossEntropyLoss

ROOT = Path(__file__).resolve().parents[1]

# The keys of the original's configurations (paths, training, model ...), as its users have them in their files.
DOCUMENT = """
paths: {mesh_dir: M, label_dir: M, val_mesh_dir: V, val_label_dir: V, json_dir: J, val_json_dir: J,
        texture_dir: T, val_texture_dir: T, log_dir: OUT/logs, checkpoint_dir: OUT/weights}
training: {epochs: 1, batch_size: 2, clusters_per_batch: 2, accumulation_steps: 2, resume: false, use_pretrained: false,
           num_unfrozen_encoder_layers: all, weight_decay: 0.01, ema_decay: 0.99, use_ema: true, ignore_index: 0,
           layer_wise_lr_decay: [10, 2]}
masking: {ratio_range: [0.3, 0.7], num_mask_blocks: 4, clusters_to_select: 2}
loss: {alpha: 1, beta: 0, gamma: 0}
model: {feature_dim: 19, include_normals: true, additional_geometrical_features: true, use_texture: false, fusion_method: gated,
        texture_embed_dim: 8, max_texture_pixels: 64, texture_patch_size: 4, num_attention_blocks_predictor: 2, n_clusters: 6, embedding_dim: 16, num_heads: 2, num_attention_blocks: 2, n_classes: 3, faces_per_cluster: 16,
        use_pe: true, dropout: 0.1, features: [corners, area, angles]}
augmentation: {rotation_range: [-180, 180], scale_range: [0.9, 1.1], noise_std: 0.01, flip_probability: 0.5, mode: z}
optimizer: {type: adamw, learning_rate: 0.001, warmup: 1, start_lr: 0.0001}
scheduler: {name: half_cosine}
class_weights: {class_percentages: [50, 30, 20]}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    write_set(folder / "train", 6)
    write_set(folder / "val", 3, first_seed=100)
    write_set(folder / "test", 2, first_seed=200)
    return folder


@pytest.fixture
def config(data, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({
        "paths": {"mesh_dir": str(data / "train"), "val_mesh_dir": str(data / "val"), "test_mesh_dir": str(data / "test"),
                  "cache_dir": str(data / "cache")},
        "data": {"class_names": ["low", "high", "cap"]},
        "model": {"n_classes": 3, "features": ["centroid", "normal", "area"], "embedding_dim": 16, "num_heads": 2,
                  "num_attention_blocks": 2, "faces_per_cluster": 16, "encoder_dropout": 0.1},
        "training": {"epochs": 2, "batch_size": 2},
        "optimizer": {"learning_rate": 0.01},
        "augmentation": {"mode": "z", "scale_range": [0.9, 1.1], "recluster": True},
        "logging": {"tensorboard": False, "log_interval": 1}}))
    return str(path)


def train(config, output, *more):
    return train_downstream.main([config, "--output-dir", str(output), "--device", "cpu", "--num-workers", "0", *map(str, more)])


def weights(output, name="model_last.pth"):
    return load_checkpoint(Path(output) / "model" / name)


def assert_same_run(first, second):
    for section in ("model", "ema", "optimizer"):
        assert_equal(first[section], second[section], section)
    assert (first["epoch"], first["step"], first["best"]) == (second["epoch"], second["step"], second["best"])


def sigterm_in_step(patch, step):
    sigterm_in_call(patch, train_downstream.EMA, "update", step)


@pytest.fixture(scope="module")
def encoder_file(data, tmp_path_factory):
    """An encoder trained from scratch for two epochs, in a downstream checkpoint."""
    folder = tmp_path_factory.mktemp("pretrained")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({
        "paths": {"mesh_dir": str(data / "train"), "val_mesh_dir": str(data / "val"), "cache_dir": str(data / "cache")},
        "model": {"n_classes": 3, "features": ["centroid", "normal", "area"], "embedding_dim": 16, "num_heads": 2,
                  "num_attention_blocks": 2, "faces_per_cluster": 16},
        "training": {"epochs": 2, "batch_size": 2}, "logging": {"tensorboard": False}}))
    train(str(path), folder / "run")
    return folder / "run" / "model" / "model_last.pth"


def test_learns_and_every_reader_agrees(config, data, tmp_path, capsys):
    final = train(config, tmp_path / "run", "training.epochs=25", "checkpointing.save_top_k=2")
    out = capsys.readouterr().out
    assert final["overall_accuracy"] > 0.85 and final["miou"] > 0.7                 # the majority class has 0.5 and 0.17
    assert "Epoch 1: Train Loss: " in out and ", Train F1: " in out and "          Val Loss: " in out and "New best F1: " in out

    folder = tmp_path / "run"
    assert {p.name for p in (folder / "model").iterdir()} >= {"model_best.pth", "model_last.pth", "checkpoint_epoch_5.pth",
                                                              "checkpoint_epoch_25.pth"}
    assert len(list((folder / "model").glob("checkpoint_top_*.pth"))) == 2
    assert (folder / "config" / "config.yaml").is_file() and (folder / "config" / "environment.json").is_file()
    records = [r for r in read_log(folder / "log" / "log.jsonl") if r["split"] == "val"]
    assert [r["epoch"] for r in records] == list(range(1, 26))

    # the best checkpoint scores what the log says, by --test-only (no test split: on validation) and by evaluate.py
    best = str(folder / "model" / "model_best.pth")
    said = max(r["mean_f1"] for r in records)
    again = train(config, folder, "--resume", best, "--test-only", "paths.test_mesh_dir=null")
    assert again["mean_f1"] == said == final["best"]
    scored = evaluate.main([best, "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / "evaluation")])
    assert scored["mean_f1"] == said and scored["miou"] == again["miou"]
    assert (tmp_path / "evaluation" / "metrics.json").is_file()
    assert "<svg" in (tmp_path / "evaluation" / "report.html").read_text()

    # prediction: one label per face, whatever is done to order, place and size
    vertices, faces, label = tiny_mesh(301)
    order = np.random.default_rng(0).permutation(len(faces))
    write_obj(tmp_path / "plain.obj", vertices, faces)
    write_obj(tmp_path / "permuted.obj", vertices, faces[order])
    write_obj(tmp_path / "moved.obj", vertices * 1000 + 100_000, faces)
    labels = predict.main([best, str(tmp_path / "plain.obj"), str(tmp_path / "permuted.obj"), str(tmp_path / "moved.obj"),
                           "--output", str(tmp_path / "out"), "--device", "cpu", "--html", "--pca"])
    plain, permuted, moved = labels.values()
    assert len(plain) == len(faces) and (plain == label).mean() > 0.7
    assert (plain[order] == permuted).mean() > 0.995                               # clusters may differ where centres tie
    assert (plain == moved).mean() > 0.995                                         # the file has 9 digits of the coordinates
    assert np.array_equal(np.loadtxt(tmp_path / "out" / "plain.txt", dtype=int), plain)
    assert np.array_equal(read_mesh(tmp_path / "out" / "plain.ply").properties["face"]["label"], plain)
    assert np.allclose(read_mesh(tmp_path / "out" / "plain.ply").vertices[faces], vertices[faces])
    pages = [(tmp_path / "out" / f"{name}.html").read_text() for name in ("plain", "plain_pca")]
    shares = [f"<td>{name}</td><td>{100 * (plain == c).mean():.1f} %</td>" for c, name in enumerate(CLASSES) if (plain == c).any()]
    assert all(share in pages[0] for share in shares) and pages[0].count("<tr") == len(shares) and "<tr" not in pages[1]
    assert (tmp_path / "out" / "plain_pca.ply").is_file()


def test_quads_get_one_label_a_line(config, tmp_path, monkeypatch):
    train(config, tmp_path / "run", "training.epochs=1")
    parsed, parse = [], mesh_io.READERS[".obj"]
    monkeypatch.setitem(mesh_io.READERS, ".obj", lambda path: parsed.append(path.name) or parse(path))
    (tmp_path / "quads.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 2 0 0\nv 2 1 0\nf 1 2 3 4\nf 2 5 6 3\n")
    labels = predict.main([str(tmp_path / "run/model/model_last.pth"), str(tmp_path / "quads.obj"), "--output", str(tmp_path / "out"),
                           "--picture", "glb", "--labels", "npy"])
    assert [len(label) for label in labels.values()] == [2] == [len(np.load(tmp_path / "out" / "quads.npy"))]
    assert (tmp_path / "out" / "quads.glb").is_file()
    assert parsed == ["quads.obj"]                          # once: for the picture and for the network


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resume_is_exact_wherever_it_stopped(config, tmp_path, monkeypatch, step):
    """3 steps an epoch, 2 epochs: stopped in the middle of either and at the border; dropout, EMA and augmentation included."""
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, step)
        with pytest.raises(StopRequested, match="--resume auto"):
            train(config, tmp_path / "broken")
    assert weights(tmp_path / "broken")["step"] == step
    train(config, tmp_path / "broken", "--resume", "auto")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    losses = [[(r["split"], r["epoch"], r["loss"]) for r in read_log(tmp_path / name / "log" / "log.jsonl")]
              for name in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_resume_is_exact_with_limited_batches(config, tmp_path, monkeypatch):
    """Stopped in the last of the steps that --limit-batches allows: the epoch is over."""
    more = ("--limit-batches", "2")
    train(config, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, 2)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "broken", *more)
    train(config, tmp_path / "broken", *more, "--resume", "auto")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_resume_is_exact_with_workers_and_accumulation(config, tmp_path, monkeypatch):
    more = ("training.accumulation_steps=2", "training.batch_size=1", "--num-workers", "1")
    train(config, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, 2)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "broken", *more)
    train(config, tmp_path / "broken", *more, "--resume", "auto")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def assert_close(first, second, tolerance):
    """Equal to rounding, but for attention biases: that of the keys has no gradient (a softmax does not feel it), so there AdamW
    blows rounding up to whole steps."""
    for name, tensor in first.items():
        assert name.endswith("qkv.bias") or torch.allclose(tensor, second[name], atol=tolerance), name


def test_accumulated_steps_equal_the_big_batch(config, tmp_path):
    """To rounding: the meshes have different sizes, so a mean of means would be off in the second digit."""
    more = ("model.encoder_dropout=0", "model.dropout=0", "model.drop_path=0", "training.epochs=1")
    train(config, tmp_path / "big", "training.batch_size=4", *more)
    train(config, tmp_path / "small", "training.batch_size=2", "training.accumulation_steps=2", *more)
    assert_close(weights(tmp_path / "big")["model"], weights(tmp_path / "small")["model"], 2e-4)


def test_frozen_encoder_is_the_files_and_stays_so(config, tmp_path, encoder_file):
    train(config, tmp_path / "run", "--pretrained_path", encoder_file)
    run, source = weights(tmp_path / "run"), load_checkpoint(encoder_file)
    names = [name for name in run["model"] if name.startswith("encoder.")]
    assert len(names) > 20
    assert all(torch.equal(run["model"][name], source["model"][name]) for name in names)
    assert not any(name.startswith("encoder.") for name in run["ema"]["shadow"])
    assert run["encoder"]["file"] == str(encoder_file) and len(run["encoder"]["sha256"]) == 64
    head = sum(1 for name in run["model"] if name.startswith("head."))
    assert len(run["optimizer"]["state"]) == head


def test_unfreezing_moves_exactly_the_last_blocks(config, tmp_path, encoder_file):
    train(config, tmp_path / "run", "--pretrained_path", encoder_file, "training.num_unfrozen_encoder_layers=1",
          "training.layer_wise_lr_decay=[10,2]")
    run, source = weights(tmp_path / "run")["model"], load_checkpoint(encoder_file)["model"]
    moved = {name.split(".")[1] + "." + name.split(".")[2] for name in run
             if name.startswith("encoder.") and not torch.equal(run[name], source[name])}
    assert all(name.startswith(("blocks.1", "norm.")) for name in moved) and any(name.startswith("blocks.1") for name in moved)


def test_cached_features_give_the_same_run_bit_for_bit(config, tmp_path, encoder_file):
    still = ("--pretrained_path", encoder_file, "augmentation.mode=none", "augmentation.scale_range=[1.0,1.0]",
             "augmentation.recluster=false")
    train(config, tmp_path / "plain", *still)
    train(config, tmp_path / "cached", *still, "training.cache_features=true")
    train(config, tmp_path / "read", *still, "training.cache_features=true")        # now from the file
    assert_same_run(weights(tmp_path / "plain"), weights(tmp_path / "cached"))
    assert_same_run(weights(tmp_path / "plain"), weights(tmp_path / "read"))
    with pytest.raises(ValueError, match="augmentation"):
        train(config, tmp_path / "moving", "--pretrained_path", encoder_file, "training.cache_features=true")
    with pytest.raises(ValueError, match="frozen"):
        train(config, tmp_path / "scratch", *still[2:], "training.cache_features=true")


def test_cached_features_are_those_of_the_number_format(config, tmp_path, encoder_file):
    """bfloat16: embedded under the same autocast, and not read from what float32 left in the cache."""
    still = ("--pretrained_path", encoder_file, "augmentation.mode=none", "augmentation.scale_range=[1.0,1.0]",
             "augmentation.recluster=false", "training.epochs=1")
    train(config, tmp_path / "plain", *still, "--amp-dtype", "bfloat16")
    train(config, tmp_path / "float", *still, "training.cache_features=true")
    train(config, tmp_path / "cached", *still, "training.cache_features=true", "--amp-dtype", "bfloat16")
    assert_same_run(weights(tmp_path / "plain"), weights(tmp_path / "cached"))


def test_an_encoder_of_other_features_or_heads_is_refused(config, tmp_path, encoder_file):
    """Of the same width, so that every tensor would fit."""
    with pytest.raises(ValueError, match="trained on the features"):
        train(config, tmp_path / "run", "--pretrained_path", encoder_file, "model.features=[centroid, curvature, area]")
    with pytest.raises(ValueError, match="2 attention heads"):
        train(config, tmp_path / "run", "--pretrained_path", encoder_file, "model.num_heads=4")
    with pytest.raises(ValueError, match="trained with model.unit=null, so its features have other sizes; set model.unit=null instead of 10.0"):
        train(config, tmp_path / "run", "--pretrained_path", encoder_file, "model.unit=10")


def test_every_reader_has_the_same_loss_and_views(config, data, tmp_path):
    """The loss of --test-only is the logged one, class weights included; predict turns the mesh as evaluate does."""
    more = ("training.epochs=1", "class_weights.class_percentages=[70, 20, 10]", "training.label_smoothing=0.1",
            "augmentation.rotation_range=[0, 40]", "evaluation.views=3", "paths.test_mesh_dir=null")
    final = train(config, tmp_path / "run", *more)
    checkpoint = tmp_path / "run" / "model" / "model_last.pth"
    assert train(config, tmp_path / "run", *more, "--resume", checkpoint, "--test-only")["loss"] == final["loss"]
    script, model, _ = evaluate.load(str(checkpoint), [], torch.device("cpu"))
    result = script.evaluate(model, script.build_dataset(model.config, "val"), batch_size=1)
    for index, path in enumerate(sorted((data / "val").glob("*.obj"))):
        assert np.array_equal(script.predict(model, path)["label"], result["predictions"][index])
    assert evaluate.load(str(checkpoint), ["model.faces_per_cluster=64"], torch.device("cpu"))[1].spec.faces_per_cluster == 64
    with pytest.raises(ValueError, match="model.features"):
        evaluate.load(str(checkpoint), ["model.features=[centroid, curvature, area]"], torch.device("cpu"))
    with pytest.raises(ValueError, match="--data-dir"):
        evaluate.main([str(checkpoint), "--label-dir", str(data / "val"), "--device", "cpu"])
    with pytest.raises(ValueError, match="is a file"):
        evaluate.main([str(checkpoint), "--device", "cpu", "--output-dir", str(checkpoint / "below")])


def test_pooled_planes_have_one_label_in_every_reader(config, tmp_path):
    train(config, tmp_path / "run", "evaluation.pool_planes=1")
    last = str(tmp_path / "run" / "model" / "model_last.pth")
    box = trimesh.creation.box().subdivide().subdivide()
    (tmp_path / "boxes").mkdir()
    write_obj(tmp_path / "boxes" / "box.obj", np.array(box.vertices), np.array(box.faces))
    side = np.unique(np.round(box.face_normals).astype(int), axis=0, return_inverse=True)[1].ravel()
    (tmp_path / "boxes" / "box.txt").write_text("\n".join(map(str, side % 3)) + "\n")
    label, = predict.main([last, str(tmp_path / "boxes" / "box.obj"), "--output", str(tmp_path / "out"), "--device", "cpu"]).values()
    assert [len(np.unique(label[side == s])) for s in range(6)] == [1] * 6
    score = ["--data-dir", str(tmp_path / "boxes"), "--device", "cpu", "--output-dir", str(tmp_path / "score")]
    assert evaluate.main([last, *score])["overall_accuracy"] == pytest.approx((label == side % 3).mean())
    split = evaluate.main([last, "evaluation.pool_planes=0", *score])["overall_accuracy"]
    assert round(192 * split) % 32 != 0                                          # sides of 32 faces have several labels


def test_epochs_without_evaluation_are_logged_and_saved(config, tmp_path):
    train(config, tmp_path / "run", "training.epochs=3", "evaluation.interval=3", "checkpointing.save_interval=1")
    assert {path.name for path in (tmp_path / "run" / "model").glob("checkpoint_*")} == {f"checkpoint_epoch_{e}.pth" for e in (1, 2, 3)}
    records = read_log(tmp_path / "run" / "log" / "log.jsonl")
    assert [(r["split"], r["epoch"]) for r in records] == [("train", 1), ("train", 2), ("train", 3), ("val", 3)]


def test_an_interruption_leaves_nothing_half_written(config, data, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    still = (f"paths.cache_dir={cache}", "training.use_pretrained=false", "training.cache_features=true", "augmentation.mode=none",
             "augmentation.scale_range=[1.0,1.0]", "augmentation.recluster=false", "training.epochs=1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):         # while the meshes are prepared
        patch.setattr(np, "savez", interrupt)
        train(config, tmp_path / "run", *still)
    assert list(cache.iterdir()) == []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):         # while they are embedded
        patch.setattr(np.memmap, "flush", interrupt)
        train(config, tmp_path / "run", *still)
    assert not list(cache.glob("*.tmp")) and not list(cache.glob("embedding_*")) and not (tmp_path / "run").exists()
    train(config, tmp_path / "run", *still)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):         # while a prediction is written
        patch.setattr(data_mesh_results, "write_ply", interrupt)
        predict.main([str(tmp_path / "run/model/model_last.pth"), str(data / "val"), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def textured(config, tmp_path):
    """The tiny configuration for meshes whose labels only the texture tells; .ply files lie beside the .obj files."""
    folder = write_textured_set(tmp_path / "textured", 8)
    for path in folder.glob("*.obj"):
        path.with_suffix(".ply").write_text("not read")
    settings = yaml.safe_load(Path(config).read_text())
    settings["paths"] = {"mesh_dir": str(folder), "cache_dir": str(tmp_path / "cache")}
    settings["data"] = {"suffixes": [".obj"], "val_split": ["mesh_06"], "test_split": ["mesh_07", "mesh_05"]}
    settings["model"] |= {"n_classes": 2, "use_texture": True, "texture_embed_dim": 8, "max_texture_pixels": 4}
    Path(config).write_text(yaml.safe_dump(settings))
    return config


def test_texture_is_learnt_resumed_scored_and_predicted(textured, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(StopRequested):
        sigterm_in_step(patch, 5)
        train(textured, run, "training.epochs=12")
    train(textured, run, "training.epochs=12", "--resume", "auto")
    final = train(textured, tmp_path / "whole", "training.epochs=12")
    assert_same_run(weights(tmp_path / "whole"), weights(run))
    assert final["overall_accuracy"] == 1.0
    best = str(run / "model" / "model_best.pth")
    assert train(textured, run, "--resume", best, "--test-only")["overall_accuracy"] == 1.0
    assert evaluate.main([best, "--device", "cpu", "--output-dir", str(tmp_path / "scored")])["overall_accuracy"] == 1.0
    assert "2 files" in capsys.readouterr().out                                    # mesh_05 and mesh_07, the test split
    mesh = tmp_path / "textured" / "mesh_07.obj"
    labels, = predict.main([best, str(mesh), "--output", str(tmp_path / "out"), "--device", "cpu", "--pca"]).values()
    assert np.array_equal(labels, np.loadtxt(mesh.with_suffix(".txt"), dtype=int))
    labels = predict.main([best, str(mesh.parent), "--output", str(tmp_path / "all"), "--device", "cpu"])
    assert sorted(labels) == sorted(map(str, mesh.parent.glob("*.obj")))           # data.suffixes: not the .ply beside them
    assert "geometry alone" not in capsys.readouterr().out
    write_obj(tmp_path / "plain.obj", *tiny_mesh(0)[:2])
    predict.main([best, str(tmp_path / "plain.obj"), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert "plain.obj: no face has a texture or a colour; labelled by geometry alone" in capsys.readouterr().out


@pytest.mark.parametrize("unfrozen", [0, "all"])
def test_texture_joins_a_pretrained_geometry_encoder(textured, encoder_file, tmp_path, capsys, unfrozen):
    train(textured, tmp_path / "run", "--pretrained_path", encoder_file, f"training.num_unfrozen_encoder_layers={unfrozen}",
          "training.layer_wise_lr_decay=[10, 2]")
    before, after = load_checkpoint(encoder_file)["model"], weights(tmp_path / "run")["model"]
    geometry = [name for name in before if name.startswith("encoder.")]
    fresh = [name for name in after if name.startswith("encoder.texture_")]
    assert f"matched {len(geometry + fresh)}/{len(geometry + fresh)} encoder tensors" in (out := capsys.readouterr().out)
    assert f"{len(fresh)} of them, the texture's, are not in the file" in out
    same = [torch.equal(before[name], after[name]) for name in geometry]
    assert all(same) if unfrozen == 0 else not all(same)
    with pytest.raises(ValueError, match="without texture"):
        train(textured, tmp_path / "cached", "--pretrained_path", encoder_file, "training.cache_features=true",
              "augmentation.mode=none", "augmentation.scale_range=[1, 1]", "augmentation.recluster=false")
    with pytest.raises(ValueError, match="1 missing"):                             # half a texture encoder is none
        torch.save({"model": {n: t for n, t in after.items() if n != fresh[0]}}, tmp_path / "half.pth")
        train(textured, tmp_path / "half", "--pretrained_path", tmp_path / "half.pth")


def test_early_stopping(config, tmp_path, capsys):
    train(config, tmp_path / "run", "training.epochs=30", "early_stopping.patience=1", "optimizer.learning_rate=1e-5")
    assert "stopped early" in capsys.readouterr().out


def test_the_documents_keys_are_understood(data, tmp_path, monkeypatch):
    path = tmp_path / "document.yaml"
    path.write_text(DOCUMENT.replace(": M", f": {data / 'train'}").replace(": V", f": {data / 'val'}").replace("OUT", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    train_downstream.main([str(path), "--device", "cpu", "--num-workers", "0", f"paths.cache_dir={data / 'cache'}", "logging.tensorboard=true"])
    assert (tmp_path / "weights" / "model_best.pth").is_file() and (tmp_path / "logs" / "log.jsonl").is_file()
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("normals, more, expected", [
    (None, None, ["area", "normal"]), (True, True, ["area", "normal", "ground"]), (False, None, ["area"]),
    (False, True, ["area", "ground"]), (None, False, ["area", "normal"])])
def test_keys_of_the_original_add_and_remove_features(config, normals, more, expected):
    settings = load_config(config, train_downstream.DEFAULTS, ["model.features=[normal, area]"])
    settings.model.include_normals, settings.model.additional_geometrical_features = normals, more
    assert sorted(train_downstream.mesh_spec(settings).features) == sorted(expected)


@pytest.mark.parametrize("more, message", [
    (["training.epoch=3"], "epochs"),
    (["model.feature_dim=64"], "feature_dim=64"),
    (["--resume", "missing.pth"], "missing.pth"),
    (["--pretrained_path", "missing.pth"], "missing.pth"),
    (["--test-only"], "--resume"),
    (["training.use_pretrained=true"], "--pretrained_path"),
    (["data.suffixes=[obj]"], "data.suffixes"),
    (["data.test_split=[mesh_00]"], "both say what the test meshes are"),
    (["data.test_split=[house*]", "paths.test_mesh_dir=null"], "matches none of the 6 meshes"),
    (["model.use_texture=true"], "has a texture or a colour"),
    (["paths.checkpoint_pertrain=x"], "checkpoint_pretrain"),
    (["data.class_names=[a, b]"], "2 entries"),
    (["class_weights.class_percentages=[1, 0, 3]"], "above 0"),
    (["model.n_classes=2", "data.class_names=[]"], "label 2"),
    (["training.num_unfrozen_encoder_layers=some"], "num_unfrozen"),
    (["model.features=[centroid, normals]"], "normals"),
    (["evaluation.views=0"], "evaluation.views"),                           # would be a training set: random, not all faces
    (["evaluation.interval=0"], "evaluation.interval"),
    (["logging.log_interval=0"], "logging.log_interval"),
    (["training.epochs=0"], "training.epochs"),
    (["training.weight_decay=-1"], "training.weight_decay"),
    (["model.dropout=2"], "model.dropout"),
    (["model.features=[ground]", "augmentation.mode=so3"], "z axis"),
    (["augmentation.rotation_range=[1]"], "rotation_range"),
    (["augmentation.scale_range=[0, 1]"], "scale_range"),
    (["augmentation.flip_probability=3"], "flip_probability"),
    (["--limit-batches", "-1"], "--limit-batches"),
])
def test_user_errors_name_the_place(config, tmp_path, more, message, capsys):
    with refused(capsys, message):
        train(config, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "model").exists()


def test_one_label_short_is_refused_with_both_counts(config, data, tmp_path):
    write_set(tmp_path / "short", 2)
    lines = (tmp_path / "short" / "mesh_01.txt").read_text().split()
    (tmp_path / "short" / "mesh_01.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=rf"mesh_01.*{len(lines) - 1} labels.*{len(lines)}"):
        train(config, tmp_path / "run", f"paths.mesh_dir={tmp_path / 'short'}")


def test_another_batch_in_the_middle_of_an_epoch_is_refused(config, tmp_path, monkeypatch):
    """The number of steps is the same, but the batches done would be other meshes."""
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, 1)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "run", "--limit-batches", "2")
    with pytest.raises(ValueError, match="2 items a batch.*3"):
        train(config, tmp_path / "run", "--limit-batches", "2", "--resume", "auto", "training.batch_size=3")


def test_resume_of_another_run_is_refused(config, tmp_path, encoder_file):
    train(config, tmp_path / "run", "training.epochs=1")
    with pytest.raises(ValueError, match="training.epochs"):
        train(config, tmp_path / "run", "--resume", "auto")
    for more, name in ((["--seed", "7"], "--seed"), (["training.weight_decay=0.5"], "weight_decay"), (["training.use_ema=false"], "use_ema"),
                       (["class_weights.class_percentages=[1, 2, 3]"], "class_percentages"), (["training.batch_size=1"], "steps")):
        with pytest.raises(ValueError, match=name):
            train(config, tmp_path / "run", "--resume", "auto", "training.epochs=1", *more)
    with pytest.raises(ValueError, match="started from no file"):
        train(config, tmp_path / "run", "--resume", "auto", "training.epochs=1", "--pretrained_path", encoder_file)
    with pytest.raises(ValueError, match="model.features"):                        # the checkpoint's network, other data
        train(config, tmp_path / "run", "--resume", "auto", "--test-only", "model.features=[centroid, curvature, area]")
    with pytest.raises(ValueError, match="learning_rate"):
        train(config, tmp_path / "run", "--resume", "auto", "training.epochs=1", "optimizer.learning_rate=0.5")


def test_diverging_run_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    """The loss turns to NaN in the second epoch; the checkpoint of the first stays as it was."""
    sum_and_weight, calls = MaskedCrossEntropyLoss.sum_and_weight, []

    def breaks(self, logits, label, mask=None):
        calls.append(logits.requires_grad)
        total, weight = sum_and_weight(self, logits, label, mask)
        return total * (float("nan") if sum(calls) > 4 else 1.0), weight             # training steps, not evaluation

    monkeypatch.setattr(MaskedCrossEntropyLoss, "sum_and_weight", breaks)
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(config, tmp_path / "run")
    checkpoint = weights(tmp_path / "run")
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 3)
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_a_fresh_run_in_a_used_folder_keeps_the_old_checkpoints(config, tmp_path):
    train(config, tmp_path / "run", "training.epochs=1")
    before = (tmp_path / "run" / "model" / "model_best.pth").read_bytes()
    train(config, tmp_path / "run", "training.epochs=1", "--seed", "1")
    assert (tmp_path / "run" / "model" / "previous_1" / "model_best.pth").read_bytes() == before
    assert (tmp_path / "run" / "log" / "previous_1" / "log.jsonl").is_file()


def test_command_line(config, tmp_path):
    """In a process of its own, where run_main makes one line and an exit status of an error."""
    done = subprocess.run([sys.executable, "train_downstream.py", config, "--ouput-dir", str(tmp_path / "run")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--output-dir" in done.stderr and done.stderr.count("\n") == 1
    done = run_forked(in_processes(config, "modle.n_classes=3"), tmp_path / "run")
    assert done.code == 2 and "model" in done.stderr and "Traceback" not in done.stderr


def in_processes(config, *more):
    return TinyRun("train_downstream.py", [config, "--device", "cpu", "--num-workers", "0", *more], Path(config).parent)


def test_resume_of_two_processes_is_exact(config, tmp_path):
    """Dropout included, which each process draws for itself; one process of the two has no mesh to evaluate."""
    write_set(tmp_path / "one", 1)
    text = Path(config).read_text().replace(yaml.safe_load(Path(config).read_text())["paths"]["val_mesh_dir"], str(tmp_path / "one"))
    Path(config).write_text(text)
    run = in_processes(config, "training.batch_size=1")
    run_pair(run, tmp_path / "whole")

    def sigterm_to_the_second():                                                   # a signal to any process stops all
        if os.environ["RANK"] == "1":
            sigterm_in_call(pytest.MonkeyPatch(), train_downstream.EMA, "update", 2)

    pair = [child.wait() for child in start_pair(run, tmp_path / "broken", hook=sigterm_to_the_second)]
    assert all(child.code for child in pair) and "SIGTERM" in pair[1].stderr, pair[0].stderr + pair[1].stderr
    run_pair(run, tmp_path / "broken", "--resume", "auto")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


@pytest.mark.parametrize("meshes", [6, 7])
def test_two_processes_equal_one_with_the_double_batch(config, data, tmp_path, meshes):
    """Same batches, the mean over the global batch: weights equal to rounding; evaluation sums uneven shards (3 meshes on 2)."""
    write_set(tmp_path / "train", meshes)
    more = ["model.encoder_dropout=0", "model.dropout=0", "model.drop_path=0", f"paths.mesh_dir={tmp_path / 'train'}"]
    one = train(config, tmp_path / "one", "training.batch_size=4", *more)
    run_pair(in_processes(config, "training.batch_size=2", *more), tmp_path / "two")
    assert_close(weights(tmp_path / "one")["model"], weights(tmp_path / "two")["model"], 2e-3)
    records = [[r for r in read_log(tmp_path / name / "log" / "log.jsonl") if r["split"] == "val"] for name in ("one", "two")]
    assert len(records[0]) == len(records[1]) == 2
    assert abs(records[0][0]["loss"] - records[1][0]["loss"]) < 1e-3 and one["overall_accuracy"] > 0
