"""train_jepa.py runs whole, on tiny meshes: it learns, resumes exactly, stops at a monitor's word; its file loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trimesh
import yaml

import train_jepa
from data.mesh import MeshSpec, custom_collate_fn
from models.jepa_monitors import MONITORS, parameter_distance
from models.nomeformer import Nomeformer
from models.pretrained_mesh import check_features, read_encoder
from tests.tiny_meshes import write_obj, write_set
from tests.whole_runs import assert_equal, sigterm_in_call
from utils.checkpoint import load_checkpoint
from utils.cli import StopRequested
from utils.log import read_log
from utils.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3                                                   # of an epoch: 6 meshes, 2 at a time


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    write_set(folder / "train", 6)
    write_set(folder / "val", 3, first_seed=100)
    return folder


def write_config(folder, data, **sections):
    content = {
        "paths": {"mesh_dir": str(data / "train"), "val_mesh_dir": str(data / "val"), "cache_dir": str(data / "cache")},
        "model": {"n_classes": 3, "features": ["normal", "area"], "embedding_dim": 16, "num_heads": 2,
                  "num_attention_blocks": 2, "num_attention_blocks_predictor": 1, "faces_per_cluster": 16,
                  "encoder_dropout": 0.1},
        "masking": {"whole_share": 0.0},
        "training": {"epochs": 2, "batch_size": 2},
        "scheduler": {"warmup_epochs": 0.5},
        "optimizer": {"learning_rate": 0.005},
        "augmentation": {"mode": "z", "scale_range": [0.9, 1.1]},
        "monitor": {"stop": False},
        "checkpointing": {"save_interval": 0},
        "logging": {"tensorboard": False, "log_interval": 1}, **sections}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "tiny.yaml")


@pytest.fixture
def config(data, tmp_path):
    return write_config(tmp_path, data)


def train(config, output, *more):
    return train_jepa.main([config, "--output-dir", str(output), "--device", "cpu", "--num-workers", "0",
                            *map(str, more)])


def weights(output, name="model_last.pth"):
    return load_checkpoint(Path(output) / "model" / name, "train_jepa.py")


def sigterm_in_step(patch, step):
    sigterm_in_call(patch, train_jepa.Jepa, "update_target", step)


# -- one run and what it leaves ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 8 epochs with a probe, no augmentation and no dropout: (folder, results, config file)."""
    folder = tmp_path_factory.mktemp("finished")
    model = {"n_classes": 3, "features": ["normal", "area"], "embedding_dim": 16, "num_heads": 2,
             "num_attention_blocks": 2, "num_attention_blocks_predictor": 1, "faces_per_cluster": 16}
    path = write_config(folder, data, model=model, augmentation={}, training={"epochs": 8, "batch_size": 2},
                        probe={"interval": 4}, checkpointing={"save_interval": 4}, logging={"log_interval": 8})
    return folder / "run", train(path, folder / "run"), path


def test_learns_and_logs(finished):
    folder, result, _ = finished
    records = read_log(folder / "log" / "log.jsonl")
    losses = [r["loss"] for r in records if r["split"] == "train"]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    monitors = [r for r in records if r["split"] == "monitor"]
    assert len(monitors) == 8 and set(MONITORS) <= set(monitors[-1])
    assert monitors[-1]["target_std"] == result["monitor_target_std"]
    probes = [r for r in records if r["split"] == "probe"]
    assert [r["epoch"] for r in probes] == [4, 8] and probes[-1]["miou"] == result["probe_miou"]
    assert set(probes[-1]) >= {"random encoder", "raw features", "majority class"}
    assert probes[-1]["raw features"]["miou"] > probes[-1]["majority class"]["miou"]
    assert {p.name for p in (folder / "model").iterdir()} == {"model_last.pth", "model_best.pth",
                                                              "checkpoint_epoch_4.pth", "checkpoint_epoch_8.pth"}
    assert (folder / "config" / "config.yaml").is_file() and (folder / "config" / "environment.json").is_file()
    text = (folder / "log" / "train.log").read_text()
    assert "untrained: loss" in text and "pre-training" in text and "time constant" in text and " nan" not in text


def test_checkpoint_has_the_layout_users_expect_and_holds_the_weights_once(finished):
    folder, _, _ = finished
    checkpoint = weights(folder)
    assert set(checkpoint) >= {"format", "script", "config", "class_names", "palette", "model", "encoder",
                               "target_encoder", "predictor", "optimizer", "scheduler", "scaler", "epoch", "step",
                               "loss", "rng", "best", "feature_spec", "cluster_spec", "version", "seed"}
    assert checkpoint["epoch"] == 8 and checkpoint["step"] == 8 * STEPS and checkpoint["loss"] > 0
    for name in ("encoder", "target_encoder", "predictor"):
        part = {key.removeprefix(f"{name}."): value for key, value in checkpoint["model"].items()
                if key.startswith(f"{name}.")}
        assert_equal(part, checkpoint[name], name)
    size = sum(t.numel() * t.element_size() for t in checkpoint["model"].values())
    moments = sum(t.numel() * t.element_size() for s in checkpoint["optimizer"]["state"].values() for t in s.values())
    assert (folder / "model" / "model_last.pth").stat().st_size < 1.5 * size + moments + 150_000   # 150 kB: 600 names
    spec = checkpoint["feature_spec"]
    assert spec["names"] == ["normal", "area"] and spec["widths"] == [3, 1]
    assert len(spec["mean"]) == len(spec["std"]) == 4
    assert checkpoint["cluster_spec"]["F"] == 16 and checkpoint["cluster_spec"]["method"] == "bisection"
    assert checkpoint["model"]["encoder.feature_mean"].tolist() == pytest.approx(spec["mean"])


def test_the_teacher_is_what_downstream_training_loads(finished):
    folder, _, _ = finished
    path = folder / "model" / "model_last.pth"
    state, layout, spec = read_encoder(path)
    check_features(spec, ["area", "normal"], path)
    encoder = Nomeformer(4, 16, 2, 2)
    assert load_weights(encoder, state, path, layout=layout).startswith("matched ") and layout == "target_encoder"
    assert_equal(encoder.state_dict(), weights(folder)["target_encoder"])
    student = Nomeformer(4, 16, 2, 2)
    load_weights(student, weights(folder)["encoder"], path)
    assert parameter_distance(encoder, student) > 1e-4      # the teacher is not the student


def test_test_only_repeats_monitors_and_probe(finished, capsys):
    folder, result, config = finished
    again = train(config, folder, "--resume", "auto", "--test-only")
    assert again == {key: value for key, value in result.items() if key in again} and len(again) > 12
    assert "probe at epoch 8" in capsys.readouterr().out


def test_load_model_gives_the_whole_network(finished):
    folder, _, _ = finished
    model = train_jepa.load_model(weights(folder), torch.device("cpu"))
    assert_equal(model.state_dict(), weights(folder)["model"])
    assert not model.training and not any(p.requires_grad for p in model.target_encoder.parameters())


# -- resume ------------------------------------------------------------------------------------------------------------

MORE = ("probe.interval=1", "loss.beta=0.5", "loss.gamma=0.1")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody stopped: (folder, results)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", train(write_config(folder, data), folder / "run", *MORE)


@pytest.mark.parametrize("step", [2, STEPS, STEPS + 1], ids=["mid-epoch", "end of an epoch", "second epoch"])
def test_resumes_bit_for_bit_after_sigterm(config, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, step)
        with pytest.raises(StopRequested, match=rf"stopped at step {step} of 6, saved; .*--resume auto"):
            train(config, tmp_path / "cut", *MORE)
    assert weights(tmp_path / "cut")["step"] == step
    assert train(config, tmp_path / "cut", *MORE, "--resume", "auto") == whole[1]
    first, second = weights(whole[0]), weights(tmp_path / "cut")
    for section in ("model", "optimizer", "scheduler", "rng", "loss", "baselines", "best"):
        assert_equal(first[section], second[section], section)
    assert read_log(whole[0] / "log" / "log.jsonl") == read_log(tmp_path / "cut" / "log" / "log.jsonl")


def test_resume_refuses_another_run(config, tmp_path):
    train(config, tmp_path / "run", "training.epochs=1")
    for change, message in (("training.epochs=2", "training.epochs"), ("ema.momentum=0.5", "ema.momentum"),
                            ("masking.num_mask_blocks=2", "num_mask_blocks"), ("training.batch_size=3", "steps"), ("model.features=[area]", "model.features")):
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "run", "--resume", "auto", "training.epochs=1", change)
    with pytest.raises(ValueError, match="model.features"):
        train(config, tmp_path / "run", "--resume", "auto", "--test-only", "model.features=[area]")
    with pytest.raises(ValueError, match="--seed 1"):
        train(config, tmp_path / "run", "--resume", "auto", "--seed", 1, "training.epochs=1")


# -- monitors ----------------------------------------------------------------------------------------------------------

def test_constant_features_stop_the_run(config, data, tmp_path):
    """Icosahedra: all faces are alike, whatever the encoder does; only positions differ."""
    folder = tmp_path / "alike"
    folder.mkdir()
    for i in range(4):
        solid = trimesh.creation.icosahedron()
        write_obj(folder / f"{i}.obj", solid.vertices, solid.faces)
    more = (f"paths.mesh_dir={folder}", "paths.val_mesh_dir=null", "model.features=[angles]",
            "model.faces_per_cluster=4", "augmentation.scale_range=[1,1]", "monitor.warmup_epochs=0")
    with pytest.raises(FloatingPointError, match=r"monitor (content|target_std) = .* is below its bound monitor\.min_.*"
                                                 r"docs/jepa.md") as error:
        train(config, tmp_path / "run", *more, "monitor.stop=true")
    assert "\n" not in str(error.value) and "--resume auto" in str(error.value)
    assert weights(tmp_path / "run")["epoch"] == 1                     # saved before stopping
    train(config, tmp_path / "run", *more, "--resume", "auto")         # monitor.stop=false goes on
    assert weights(tmp_path / "run")["epoch"] == 2


def test_monitors_fire_on_a_run_made_to_collapse_and_are_quiet_on_one_tied_to_descriptors(config, tmp_path):
    more = ("training.epochs=30", "monitor.stop=true", "monitor.interval=10", "optimizer.learning_rate=0.01")
    with pytest.raises(FloatingPointError, match="monitor (position_r2|target_std|target_std_ratio) "):
        train(config, tmp_path / "collapsed", *more, "loss.delta=0", "ema.momentum=0.5")     # a teacher that follows at once
    alone = read_log(tmp_path / "collapsed" / "log" / "log.jsonl")[-1]
    train(config, tmp_path / "run", *more, "masking.whole_share=0.25")
    tied = read_log(tmp_path / "run" / "log" / "log.jsonl")[-1]
    assert alone["split"] == tied["split"] == "monitor"
    assert alone["loss"] < 0.1 and alone["target_std_ratio"] < 0.5 * tied["target_std_ratio"]


def test_a_teacher_too_slow_to_follow_stops_the_run(config, tmp_path):
    with pytest.raises(FloatingPointError, match="monitor teacher_follow = .* below .*ema.momentum"):
        train(config, tmp_path / "run", "ema.momentum=0.9999", "monitor.stop=true", "monitor.warmup_epochs=0",
              "monitor.min_teacher_moved=0")


def test_every_monitor_has_a_bound_in_the_config():
    assert {key for key, _, _ in MONITORS.values()} <= set(train_jepa.DEFAULTS["monitor"])


# -- settings ----------------------------------------------------------------------------------------------------------

def test_all_terms_of_the_loss(config, tmp_path):
    train(config, tmp_path / "run", "loss.beta=1", "loss.gamma=0.04", "training.epochs=1")
    record = read_log(tmp_path / "run" / "log" / "log.jsonl")[0]
    assert record["loss"] == pytest.approx(record["prediction"] + record["descriptors"] + record["variance"] + 0.04 * record["covariance"])


def test_without_validation_or_labels(config, data, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in (data / "train").glob("*.obj"):
        (folder / path.name).write_bytes(path.read_bytes())
    result = train(config, tmp_path / "run", f"paths.mesh_dir={folder}", "paths.val_mesh_dir=null",
                   "model.n_classes=null", "training.epochs=1", "training.clusters_per_batch=5",
                   "monitor.min_content=null")
    assert result["loss"] > 0 and not any(key.startswith("probe") for key in result)
    assert {p.name for p in (tmp_path / "run" / "model").iterdir()} == {"model_last.pth"}


def test_weight_decay_momentum_and_masks_follow_the_steps(config, tmp_path, monkeypatch):
    momenta, decays, epochs = [], [], []
    update, step = train_jepa.Jepa.update_target, torch.optim.AdamW.step
    monkeypatch.setattr(train_jepa.Jepa, "update_target", lambda self, m: (momenta.append(m), update(self, m)))

    def recorded(self, *args, **kwargs):
        decays.append({group["name"]: group["weight_decay"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    set_epoch = train_jepa.MaskedMeshes.set_epoch
    monkeypatch.setattr(train_jepa.MaskedMeshes, "set_epoch", lambda self, e: (epochs.append(e), set_epoch(self, e)))
    train(config, tmp_path / "run", "ema.momentum=0.4")
    assert epochs == [0, 1]
    assert momenta == pytest.approx([0.4 + 0.6 * t / 6 for t in range(6)])
    assert [d["no_decay"] for d in decays] == [0.0] * 6
    assert decays[0]["decay"] == pytest.approx(0.04) and decays[3]["decay"] == pytest.approx(0.22)
    assert all(a["decay"] < b["decay"] < 0.4 for a, b in zip(decays[:-1], decays[1:], strict=True))


@pytest.mark.parametrize("change, message", [
    ("model.feature_dim=9", "feature_dim=9"),
    ("training.weight_decay=[0.1]", "weight_decay"),
    ("masking.target_scale=[0.2]", "target_scale"),
    ("masking.context_scale=[0.9,0.8]", "context_scale"),
    ("ema.momentum=1.0", "ema.momentum"),
    ("loss.delte=1", "did you mean loss.delta"),
    (("loss.delta=0", "masking.whole_share=0.5"), "teach nothing"),
    ("model.embedding_dim=18", "multiple of"),
    ("model.faces_per_cluster=400", "one cluster"),
    ("model.num_attention_blocks_predictor=0", "num_attention_blocks_predictor"),
    ("logging.log_interval=0", "log_interval"),
    ("probe.max_faces=0", "max_faces"),
    ("augmentation.flip_probability=3", "flip_probability"),
    ("training.gradient_clip_val=-1", "gradient_clip_val"),
    ("model.features=[normal,areas]", "areas"),
])
def test_wrong_settings_are_refused_before_training(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", *([change] if isinstance(change, str) else change))
    assert not (tmp_path / "run" / "model").exists()


def test_probe_needs_classes_and_validation(config, tmp_path):
    with pytest.raises(ValueError, match="n_classes"):
        train(config, tmp_path / "run", "probe.interval=1", "model.n_classes=null")
    with pytest.raises(ValueError, match="val_split"):
        train(config, tmp_path / "run", "probe.interval=1", "paths.val_mesh_dir=null")
    with pytest.raises(ValueError, match="--test-only needs a checkpoint"):
        train(config, tmp_path / "run", "--test-only")


def test_a_diverging_run_says_so_and_keeps_the_last_good_file(config, tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is .* at step .*learning rate"):
        train(config, tmp_path / "run", "optimizer.learning_rate=1e30", "training.gradient_clip_val=0",
              "scheduler.name=constant")


def test_shipped_configs_are_valid():
    for path in sorted((ROOT / "configs").glob("jepa_*.yaml")):
        config = train_jepa.load_config(path, train_jepa.DEFAULTS)
        train_jepa.check_config(config)
        assert config.paths.mesh_dir.startswith("datasets/") and isinstance(train_jepa.mesh_spec(config), MeshSpec)


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(config, tmp_path):
    """1 x 4 and 2 x 2: the same loss in every epoch, the same weights to rounding. Some processes have a step without a target."""
    common = [config, "--device", "cpu", "--num-workers", "0", "model.encoder_dropout=0", "masking.whole_share=0.6"]
    train_jepa.main([*common, "training.batch_size=4", "--output-dir", str(tmp_path / "one")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                    "train_jepa.py", *common, "training.batch_size=2", "--output-dir", str(tmp_path / "two")],
                   cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = ([r["loss"] for r in read_log(tmp_path / name / "log" / "log.jsonl")] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)
    for name, tensor in weights(tmp_path / "one")["model"].items():
        torch.testing.assert_close(weights(tmp_path / "two")["model"][name], tensor, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("clusters_per_batch", ["null", 3])
def test_probe_embeds_each_labelled_face_once(config, data, clusters_per_batch):
    settings = train_jepa.load_config(config, train_jepa.DEFAULTS, ["probe.interval=1", f"training.clusters_per_batch={clusters_per_batch}"])
    files = train_jepa.list_meshes(data / "train")
    prober = train_jepa.build_probe(settings, files, train_jepa.list_meshes(data / "val"), [80] * 6)
    x, label = prober.embed(prober.train, None)
    assert len(x) == len(label) == sum(prober.train.num_faces)
    batch = custom_collate_fn([prober.train[0]])
    torch.testing.assert_close(torch.from_numpy(x[:5]), batch["features"][batch["mask"]][:5])
