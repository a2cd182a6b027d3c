"""train_sonata.py with evaluate.py and predict.py, run whole on tiny clouds and a tiny network: it learns, freezes what it should,
resumes exactly, scores raw points, and every reader has the same numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import predict
import train_sonata as SCRIPT
from data.point_files import read_cloud, read_ply_vertices, write_ply
from data.points import VIEWS, PreciseTest
from models.point_transformer import build_segmenter
from tests.tiny_clouds import (
    ENCODER,
    STILL,
    tiny_cloud,
    write_classes,
    write_clouds,
    write_config,
    write_encoder,
    write_every_format,
)
from tests.tiny_runs import TinyRun, run_pair
from tests.whole_runs import assert_equal, refused, sigterm_in_call
from utils import point_scripts
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import StopRequested
from utils.log import read_log
from utils.losses import IGNORE_INDEX, MaskedCrossEntropyLoss, lovasz_softmax_loss
from utils.training import check_same_run

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ONE_STEP = {"epochs": 1, "eval_epochs": 1, "batch_size": 5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clouds")
    for split, count, seed in (("train", 5, 0), ("val", 3, 100), ("test", 3, 200)):
        write_clouds(folder / split, count, seed, 90 if split == "test" else 300)
    return write_classes(folder)


def train(config, output, *more):
    return SCRIPT.main([config, "--device", "cpu", "--num-workers", "0", "--output-dir", str(output), *map(str, more)])


def score(checkpoint, output, *more):
    return evaluate.main([str(checkpoint), "--device", "cpu", "--output-dir", str(output), *map(str, more)])


def last(output):
    return Path(output) / "model" / "model_last.pth"


def numbers(text, before):
    """The number printed behind the words `before`."""
    return float(text.split(before)[1].split()[0].strip(",)"))


@pytest.fixture
def network():
    """A model as load_model returns it, untrained."""
    def build(root, tmp_path, **sections):
        config = SCRIPT.load_config(write_config(tmp_path / "network.yaml", root, **sections), SCRIPT.DEFAULTS, [])
        torch.manual_seed(0)
        model = SCRIPT.build_model(config, ENCODER).eval()
        SCRIPT.attach(model, config, SCRIPT.class_names(config), SCRIPT.class_colors(config))
        return model
    return build


# -- training ----------------------------------------------------------------------------------------------------------

def test_overfits_three_clouds(tmp_path, capsys):
    write_clouds(tmp_path / "train", 3)
    config = write_config(tmp_path / "c.yaml", write_classes(tmp_path), data={"val": "train"}, augmentation=STILL,
                          training={"epochs": 25, "eval_epochs": 1}, optimizer={"lr": 0.01, "block_lr": 0.005})
    result = train(config, tmp_path / "out")
    labels = np.concatenate([tiny_cloud(seed, 300 + 7 * seed)["segment"] for seed in range(3)])
    majority = np.bincount(labels[labels >= 0]).max() / (labels >= 0).sum()
    assert "WARNING: 3 of 3 validation clouds are in training too" in capsys.readouterr().out
    assert result["overall_accuracy"] > 0.9 > majority + 0.3 and result["official_miou"] > 0.85


@pytest.mark.parametrize("mode", ["lin", "dec", "ft"])
def test_each_mode_trains_what_it_should(root, tmp_path, monkeypatch, mode):
    seen, rates = [], []
    original = torch.optim.AdamW.step
    prepare = SCRIPT.start_model

    def step(self, *args):
        model = seen[0]
        for name, parameter in model.named_parameters():
            frozen = mode != "ft" and name.startswith(("backbone.embedding.", "backbone.enc."))
            assert (parameter.grad is None) == frozen, name
        groups = {group["name"]: group for group in self.param_groups}
        assert {id(p) for group in groups.values() for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
        rates.append({name: group["lr"] for name, group in groups.items()})
        return original(self, *args)

    def spy(*args):
        model, entry = prepare(*args)
        seen.extend([model, {name: tensor.clone() for name, tensor in model.state_dict().items()}])
        return model, entry

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(SCRIPT, "start_model", spy)
    weights = write_encoder(tmp_path / "sonata.pth")
    stored = torch.load(weights, weights_only=True)["state_dict"]
    config = write_config(tmp_path / "c.yaml", root, model={"mode": mode}, scheduler={"pct_start": 0.5},
                          training={"use_pretrained": None, "epochs": 5, "eval_epochs": 1})
    train(config, tmp_path / "out", "--pretrained_path", weights)
    model, before = seen
    for name, tensor in model.state_dict().items():
        inner = name.removeprefix("backbone.")
        if inner in stored:
            assert torch.equal(before[name], stored[inner]), name
        assert torch.equal(tensor, before[name]) == (inner in stored and mode != "ft"), name
    assert list(rates[0]) == (["rest"] if mode == "lin" else ["rest", "block"])
    peaks = {"rest": 0.004, "block": 0.002}
    for name, peak in peaks.items() if mode != "lin" else [("rest", 0.004)]:             # eight steps
        assert [rates[step][name] for step in (0, 3, 7)] == pytest.approx([peak / 10, peak, peak / 10 / 1000])


def test_batches_that_do_not_divide_and_a_batch_without_labels(root, tmp_path, capsys, monkeypatch):
    """Five clouds three at a time are one step, and so they are 24 at a time; Mix3D makes two and three of them; unlabelled points teach
    nothing and break nothing."""
    scenes = []
    monkeypatch.setattr(SCRIPT, "to_device", lambda batch, device: scenes.append(len(batch["offset"])) or batch)
    config = write_config(tmp_path / "c.yaml", root, training={"epochs": 1, "eval_epochs": 1}, augmentation={"mix_probability": 1.0})
    train(config, tmp_path / "a")
    assert load_checkpoint(last(tmp_path / "a"))["step"] == 1
    train(config, tmp_path / "b", "training.batch_size=24")
    assert load_checkpoint(last(tmp_path / "b"))["step"] == 1
    train(config, tmp_path / "c", "augmentation.mix_probability=0")
    assert scenes == [2, 3, 3]
    data = write_classes(tmp_path)
    write_clouds(data / "train", 2)
    cloud = tiny_cloud(5)
    np.savez(data / "train" / "unlabelled.npz", **{**cloud, "segment": np.full_like(cloud["segment"], -1)})
    config = write_config(tmp_path / "d.yaml", data, data={"val": "train"}, training={"epochs": 1, "eval_epochs": 1, "batch_size": 1})
    result = train(config, tmp_path / "d")
    losses = [float(line.split("loss")[1].split()[0]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert load_checkpoint(last(tmp_path / "d"))["step"] == 3 and np.isfinite(result["loss"])
    assert sorted(loss == 0 for loss in losses[-3:]) == [False, False, True]


def test_the_loss_is_cross_entropy_of_the_step_and_lovasz_of_each_micro_batch():
    torch.manual_seed(0)
    logits, label, criterion = torch.randn(40, 3), torch.randint(-1, 3, (40,)), MaskedCrossEntropyLoss()
    label[label < 0] = IGNORE_INDEX
    weight, pieces = criterion.label_weight(label), (slice(0, 8), slice(8, 40))
    entropy = torch.nn.functional.cross_entropy(logits, label, ignore_index=IGNORE_INDEX)
    whole = SCRIPT.compute_loss(criterion, logits, label, weight, 1.0)
    torch.testing.assert_close(whole, entropy + lovasz_softmax_loss(logits, label))
    step = sum(SCRIPT.compute_loss(criterion, logits[piece], label[piece], weight, 0.5) for piece in pieces)
    torch.testing.assert_close(step, entropy + sum(lovasz_softmax_loss(logits[piece], label[piece]) for piece in pieces) / 2)


def test_a_diverging_run_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setattr(SCRIPT, "compute_loss", lambda *args, f=SCRIPT.compute_loss: f(*args) * float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(write_config(tmp_path / "c.yaml", root), tmp_path / "out")


# -- weights -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["lin", "dec"])
def test_a_frozen_encoder_stays_in_its_file(root, tmp_path, mode):
    weights = write_encoder(tmp_path / "sonata.pth")
    config = write_config(tmp_path / "c.yaml", root, model={"mode": mode, "encoder": {}}, training={**ONE_STEP, "use_pretrained": None})
    result = train(config, tmp_path / "out", "--pretrained_path", weights)
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    assert not any(name.startswith(("backbone.enc.", "backbone.embedding.")) for name in checkpoint["model"])
    assert any(name.startswith("backbone.dec.") for name in checkpoint["model"]) == (mode == "dec") and "seg_head.weight" in checkpoint["model"]
    state = SCRIPT.load_model(checkpoint, CPU).state_dict()
    for name, tensor in torch.load(weights, weights_only=True)["state_dict"].items():
        assert name == "embedding.mask_token" or torch.equal(state[f"backbone.{name}"], tensor)

    moved = Path(weights).rename(tmp_path / "moved.pth")
    with pytest.raises(FileNotFoundError, match=r"sonata.pth: no such file.*paths.checkpoint_pretrain=FILE"):
        score(last(tmp_path / "out"), tmp_path / "scores", "--split", "val")
    again = score(last(tmp_path / "out"), tmp_path / "scores", "--split", "val", f"paths.checkpoint_pretrain={moved}")
    assert again["miou"] == pytest.approx(result["miou"], abs=1e-12)
    write_encoder(tmp_path / "sonata.pth", seed=4)
    with pytest.raises(ValueError, match=r"sonata.pth: not the encoder of .*content differs.*paths.checkpoint_pretrain"):
        SCRIPT.load_model(checkpoint, CPU)
    with pytest.raises(ValueError, match="not the encoder"):                             # resume looks as well
        train(config, tmp_path / "out", "--pretrained_path", weights, "--resume", "auto")


def test_a_random_frozen_encoder_is_in_the_checkpoint(root, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", root, model={"mode": "lin"}, training=ONE_STEP)
    train(config, tmp_path / "out")
    assert "WARNING: the encoder is randomly initialised, and stays so: a baseline" in capsys.readouterr().out
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    state = SCRIPT.load_model(checkpoint, CPU).state_dict()
    assert checkpoint["encoder"]["file"] is None and set(state) == set(checkpoint["model"])
    assert_equal(dict(state), dict(checkpoint["model"]))


def test_a_checkpoint_serves_as_weights_and_its_head_too(root, tmp_path, capsys):
    """Another run starts from what ft made: the encoder, or in lin with the head of a linear probe."""
    train(write_config(tmp_path / "c.yaml", root, training=ONE_STEP), tmp_path / "ft")
    config = write_config(tmp_path / "d.yaml", root, model={"mode": "lin", "encoder": {}}, training={**ONE_STEP, "use_pretrained": None})
    train(config, tmp_path / "lin", "--pretrained_path", last(tmp_path / "ft"))
    assert "(layout: SegHeads checkpoint, prefix 'backbone.')" in capsys.readouterr().out
    train(config, tmp_path / "more", "--pretrained_path", last(tmp_path / "ft"), f"paths.head={last(tmp_path / 'lin')}", "optimizer.lr=1e-30",
          "optimizer.weight_decay=0")
    heads = [load_checkpoint(last(tmp_path / name))["model"]["seg_head.weight"] for name in ("lin", "more")]
    assert torch.equal(*heads)
    with pytest.raises(ValueError, match="head tensors"):
        train(config, tmp_path / "wrong", "--pretrained_path", last(tmp_path / "ft"), f"paths.head={last(tmp_path / 'ft')}")


def test_the_file_of_an_encoder_says_nothing_about_the_decoder(root, tmp_path):
    weights = write_encoder(tmp_path / "sonata.pth", dec_depths=[9, 9], dec_channels=[8, 8])
    for given, channels in (({}, (64, 32)), ({key: ENCODER[key] for key in ENCODER if key.startswith("dec_")}, (16, 32))):
        config = write_config(tmp_path / "c.yaml", root, model={"mode": "dec", "encoder": given}, training={"use_pretrained": None})
        config = SCRIPT.load_config(config, SCRIPT.DEFAULTS, [f"paths.checkpoint_pretrain={weights}"])
        assert SCRIPT.build_model(config, SCRIPT.open_encoder(config)[0]).backbone.dec_channels == channels


def test_weights_that_are_not_there(root, tmp_path):
    for mode in ("lin", "dec"):
        config = write_config(tmp_path / "c.yaml", root, model={"mode": mode}, training={"use_pretrained": None})
        with pytest.raises(ValueError, match=f"model.mode={mode} needs --pretrained_path"):
            train(config, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file"):
        train(config, tmp_path / "out", "--pretrained_path", tmp_path / "nowhere.pth")
    content = torch.load(write_encoder(tmp_path / "sonata.pth"), weights_only=True)
    name = "enc.enc1.block0.cpe.0.weight"
    content["state_dict"]["enc.enc1.block0.cpe.conv.weight"] = content["state_dict"].pop(name)
    torch.save(content, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match=rf"renamed.pth.*1 missing \({name}\)"):
        train(config, tmp_path / "out", "--pretrained_path", tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match="set model.encoder"):
        train(write_config(tmp_path / "d.yaml", root, model={"encoder": {}}), tmp_path / "out")
    torch.save(content["state_dict"], tmp_path / "plain.pth")                            # the size is then read from the shapes
    with pytest.raises(ValueError, match=r"plain.pth: enc.enc1.* belongs to none of the 1 stages"):
        train(config, tmp_path / "out", "--pretrained_path", tmp_path / "plain.pth", "model.encoder={}")
    assert not (tmp_path / "out").exists()


# -- stopping and going on ---------------------------------------------------------------------------------------------

def assert_same_run(first, second):
    first, second = (load_checkpoint(last(folder)) for folder in (first, second))
    for section in ("model", "optimizer", "scheduler", "totals", "rng"):
        assert_equal(first[section], second[section], section)
    assert (first["epoch"], first["batch"], first["step"], first["best"]) == (second["epoch"], second["batch"], second["step"], second["best"])


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that nobody stopped: 2 epochs of 3 steps (two passes over five clouds, three at a time), with Mix3D and drop path."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "c.yaml", root)
    train(config, folder / "out")
    return config, folder / "out"


STOPS = [(torch.optim.AdamW, "step", 1, 1), (torch.optim.AdamW, "step", 3, 3), (torch.optim.AdamW, "step", 5, 5),
         (point_scripts, "label_cloud", 2, 3)]                   # at the start, at the end of an epoch, in the next, in a validation


@pytest.mark.parametrize("owner, method, call, step", STOPS, ids=["first", "end", "middle", "validation"])
def test_resume_is_exact_wherever_it_stopped(whole, tmp_path, monkeypatch, owner, method, call, step):
    config, reference = whole
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, owner, method, call)
        with pytest.raises(StopRequested, match="resume auto"):
            train(config, tmp_path / "cut")
    cut = load_checkpoint(last(tmp_path / "cut"))
    assert (cut["step"], cut["epoch"]) == (step, int(call == 2 or step > 3))
    workers = "2" if call == 3 else "0"                                    # the number of workers changes nothing
    train(config, tmp_path / "cut", "--resume", "auto", "--num-workers", workers)
    assert_same_run(reference, tmp_path / "cut")
    logs = [read_log(folder / "log" / "log.jsonl") for folder in (reference, tmp_path / "cut")]
    assert [record["loss"] for record in logs[0]] == [record["loss"] for record in logs[1]]


def test_resume_is_exact_with_workers_accumulation_and_a_frozen_encoder(root, tmp_path, monkeypatch):
    weights = write_encoder(tmp_path / "sonata.pth")
    config = write_config(tmp_path / "c.yaml", root, model={"mode": "dec"}, training={
        "use_pretrained": None, "batch_size": 1, "accumulation_steps": 2, "epochs": 1, "eval_epochs": 1})
    more = ["--pretrained_path", weights, "--num-workers", "2"]
    train(config, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, torch.optim.AdamW, "step", 1)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "cut", *more)
    assert load_checkpoint(last(tmp_path / "cut"))["batch"] == 2
    train(config, tmp_path / "cut", *more, "--resume", last(tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_of_two_processes_goes_on_in_one(whole, tmp_path, monkeypatch):
    """batch_size counts the clouds of all processes: the place in the epoch is the same for any number of them."""
    config, _ = whole
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, torch.optim.AdamW, "step", 2)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "cut")
    checkpoint = load_checkpoint(last(tmp_path / "cut"))
    save_checkpoint(last(tmp_path / "cut"), **{**checkpoint, "rng_others": [checkpoint["rng"]]})
    with pytest.raises(ValueError, match="6 items a batch, over all processes, and now there would be 3"):
        check_same_run(load_checkpoint(last(tmp_path / "cut")), checkpoint["config"], 6, (), 0)          # counted as batches of one process
    train(config, tmp_path / "cut", "--resume", "auto")
    assert load_checkpoint(last(tmp_path / "cut"))["step"] == 6


def test_resume_of_another_run_is_refused(whole):
    config, reference = whole
    for more, message in ((["optimizer.lr=0.5"], "optimizer.lr"), (["--seed", "1"], "--seed 1"), (["training.epochs=6"], "training.epochs"),
                          (["augmentation.jitter=0"], "augmentation.jitter"), (["data.grid_size=0.04"], "data.grid_size"), (["model.mode=dec"], "model.mode")):
        with pytest.raises(ValueError, match=message):
            train(config, reference, "--resume", "auto", *more)


# -- scores ------------------------------------------------------------------------------------------------------------

def test_every_reader_agrees(root, whole, tmp_path, capsys):
    config, out = whole
    val = next(record for record in reversed(read_log(out / "log" / "log.jsonl")) if record.get("split") == "val")
    more = ["--resume", str(last(out)), "--test-only", "--device", "cpu", "--num-workers", "0"]
    again = SCRIPT.main([config, *more])
    printed = capsys.readouterr().out
    assert "on the val split, single-view test, raw points" in printed
    assert numbers(printed, "(the official mean): mIoU") == pytest.approx(100 * val["official_miou"], abs=0.006)
    scored = score(last(out), tmp_path / "scores")
    assert again["miou"] == scored["miou"] == val["miou"] and again["loss"] == pytest.approx(val["loss"], rel=1e-12)
    record = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert record[SCRIPT.OFFICIAL]["miou"] == again["official_miou"] == val["official_miou"]
    assert (tmp_path / "scores" / "report.html").is_file()

    labels = predict.main([str(last(out)), f"{root}/val", "--output", str(tmp_path / "pred"), "--device", "cpu", "evaluation.precise=false"])
    matrix = np.zeros((3, 3), int)
    for index, (path, label) in enumerate(labels.items()):
        truth = read_cloud(path).label
        if index == 0:                                                 # the orders are those of cloud 0 of an evaluation
            model = SCRIPT.load_model(load_checkpoint(last(out)), CPU)
            result = SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "val"), limit_batches=1)
            assert (label == result["predictions"][0]).all()
            np.add.at(matrix, (truth[truth >= 0], label[truth >= 0]), 1)
            assert (matrix == result["matrix"]).all()
    test = score(last(out), tmp_path / "other", "--data-dir", root / "test", "--num-workers", "2")
    named = SCRIPT.main([config, "data.test=test", *more])
    assert test["miou"] == named["miou"] and "on the test split" in capsys.readouterr().out


def test_doubts_about_the_files_stand_above_their_scores(whole, tmp_path, capsys):
    config, out = whole
    (tmp_path / "odd").mkdir()
    cloud = tiny_cloud(60)
    np.savez(tmp_path / "odd" / "a.npz", **{**cloud, "color": cloud["color"] / 255 * 1.3})
    score(last(out), tmp_path / "scores", "--data-dir", tmp_path / "odd")
    assert capsys.readouterr().out.count("a.npz: colours up to 1.3, taken as 0..1 and cut at 1; set data.color_range") == 1
    SCRIPT.main([config, f"data.test={tmp_path}/odd", "--resume", str(last(out)), "--test-only", "--device", "cpu", "--num-workers", "0"])
    assert capsys.readouterr().out.count("a.npz: colours up to 1.3, taken as 0..1 and cut at 1") == 1


def test_scores_are_of_raw_points(tmp_path, network):
    """Twenty points in each voxel, of two classes: no prediction by voxels can be right for all, and all are counted."""
    rng = np.random.default_rng(0)
    corner = np.repeat(np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3), 20, 0) * 0.05
    segment = np.tile([0] * 11 + [1] * 7 + [-1] * 2, 64)
    cloud = {"coord": (corner + rng.uniform(0.001, 0.049, corner.shape)).astype(np.float32), "color": np.zeros((1280, 3), np.uint8),
             "normal": np.tile(np.float32([0, 0, 1]), (1280, 1)), "segment": segment}
    (tmp_path / "val").mkdir()
    np.savez(tmp_path / "val" / "mixed.npz", **cloud)
    model = network(write_classes(tmp_path), tmp_path)
    dataset = SCRIPT.build_dataset(model.config, "val")
    result = SCRIPT.evaluate(model, dataset, precise=False)
    sample, label = dataset[0], result["predictions"][0]
    assert len(sample["label"]) <= 64 * 2 and result["matrix"].sum() == (segment >= 0).sum() == 64 * 18
    voxel = sample["inverse"].numpy()
    assert all(len(set(label[voxel == v])) == 1 for v in range(voxel.max() + 1))
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (segment[segment >= 0], label[segment >= 0]), 1)
    assert (result["matrix"] == matrix).all() and result["metrics"]["overall_accuracy"] <= 11 / 18


def test_scores_pool_the_points_of_all_clouds(tmp_path, monkeypatch, network):
    """Two clouds of a class each, all called floor: not the mean of 1 and 0."""
    (write_classes(tmp_path) / "val").mkdir()
    for c, count in enumerate((100, 300)):
        np.savez(tmp_path / "val" / f"{c}.npz", **{**tiny_cloud(c, count), "segment": np.full(count, c)})
    monkeypatch.setattr(point_scripts, "label_cloud", lambda model, cloud, *_, **__: (torch.zeros(len(cloud["label"]), dtype=torch.int64), None, None))
    model = network(tmp_path, tmp_path, data={"test": "val"}, evaluation={"precise": True})
    with pytest.raises(ValueError, match="data.test names no clouds"):
        SCRIPT.build_dataset(network(tmp_path, tmp_path).config, "test")
    result = SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "test"))
    assert result["matrix"].tolist() == [[100, 0, 0], [300, 0, 0], [0, 0, 0]]
    assert result["metrics"]["miou"] == 0.25 / 2 and result["tables"][SCRIPT.OFFICIAL]["miou"] == pytest.approx(0.25 / 3)
    assert [example[2] for example in result["examples"]] == [1, 0]                      # of each cloud, for the report alone


def test_absent_classes_count_as_0_in_the_official_mean(root, tmp_path, monkeypatch, network, capsys):
    folder = write_classes(tmp_path, ("floor", "box", "ball", "ghost"))
    write_clouds(folder / "val", 2)
    model = network(folder, tmp_path, model={"mode": "lin", "num_classes": 4})

    def perfect(model, cloud, precise, index, sample):
        label = sample["raw_label"].clamp(min=0)
        return label, torch.ones(len(label)), torch.zeros(len(sample["label"]), 4)

    monkeypatch.setattr(point_scripts, "label_cloud", perfect)
    result = SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "val"))
    official = result["tables"][SCRIPT.OFFICIAL]
    assert result["metrics"]["miou"] == 1.0 and official["miou"] == official["mean_accuracy"] == official["mean_f1"] == 0.75
    assert SCRIPT.official_mean(result) == {"official_miou": 0.75} and SCRIPT.headline(result)["miou"] == 1.0
    config = write_config(tmp_path / "c.yaml", folder, model={"num_classes": 4}, data={"train": "val"}, training=ONE_STEP)
    assert train(config, tmp_path / "out")["best"] == 0.75                              # the best is chosen by it
    assert "Val mIoU: 0.7500, Val mIoU of present classes: 1.0000" in capsys.readouterr().out
    score(last(tmp_path / "out"), tmp_path / "scores")
    assert f"{SCRIPT.OFFICIAL}: overall accuracy 100.00, mIoU 75.00, mean F1 75.00, mean accuracy 75.00" in capsys.readouterr().out


@pytest.mark.parametrize("ignored", [0, 2])
def test_an_ignored_class_is_in_no_mean_whatever_its_number(tmp_path, monkeypatch, network, capsys, ignored):
    """Two classes are labelled; of the perfect predictions one point more is called by the ignored class."""
    folder = write_classes(tmp_path)
    write_clouds(folder / "val", 2)
    model = network(folder, tmp_path, data={"ignore_labels": [-1, ignored]}, model={"mode": "lin"})
    dataset = SCRIPT.build_dataset(model.config, "val")

    def nearly(model, cloud, precise, index, sample):
        label = sample["raw_label"].clone()
        label[label == IGNORE_INDEX] = ignored
        label[torch.where(sample["raw_label"] >= 0)[0][0]] = ignored
        return label, torch.ones(len(label)), torch.zeros(len(sample["label"]), 3)

    monkeypatch.setattr(point_scripts, "label_cloud", nearly)
    result = SCRIPT.evaluate(model, dataset)
    official, iou = result["tables"][SCRIPT.OFFICIAL], result["metrics"]["iou"]
    kept = [c for c in range(3) if c != ignored]
    assert np.isnan(iou[ignored]) and 0.9 < official["miou"] == result["metrics"]["miou"] == iou[kept].mean() < 1
    assert official["mean_accuracy"] == result["metrics"]["mean_accuracy"] < 1
    assert result["metrics"]["overall_accuracy"] < 1                                     # the wrong points are still wrong
    config = write_config(tmp_path / "c.yaml", folder, data={"train": "val", "ignore_labels": [-1, ignored]}, training=ONE_STEP)
    assert train(config, tmp_path / "out")["best"] == official["miou"]
    name = ("floor", "box", "ball")[ignored]
    assert f"class {ignored} ({name}) is ignored: not learnt, and in no mean" in capsys.readouterr().out


def test_two_evaluations_are_the_same_and_leave_the_random_state_alone(root, tmp_path, network):
    model = network(root, tmp_path)
    dataset = SCRIPT.build_dataset(model.config, "val")
    first = SCRIPT.evaluate(model, dataset)
    state = torch.get_rng_state()
    torch.rand(7)
    torch.set_rng_state(state)
    second = SCRIPT.evaluate(model, dataset)
    assert torch.equal(state, torch.get_rng_state()) and first["loss"] == second["loss"] and not model.training
    for index, label in first["predictions"].items():
        assert (label == second["predictions"][index]).all()
    orders = [point_scripts.fixed_orders(model, index) for index in range(6)]
    assert torch.equal(orders[0], point_scripts.fixed_orders(model, 0)) and not all(torch.equal(orders[0], other) for other in orders)
    assert all((order.sort(1).values == torch.arange(4)).all() for order in orders)


@pytest.mark.parametrize("test_grid_size", [None, 0.02])
def test_precise_test_votes_on_every_raw_point(root, tmp_path, monkeypatch, network, test_grid_size):
    votes, add = [], PreciseTest.prediction
    monkeypatch.setattr(PreciseTest, "prediction", lambda self: votes.append((self, add(self))) or votes[-1][1])
    model = network(root, tmp_path, data={"test": "test", "test_grid_size": test_grid_size}, evaluation={"precise": True})
    dataset = SCRIPT.build_dataset(model.config, "test")                                
    result = SCRIPT.evaluate(model, dataset, limit_batches=1)
    (test, label), cloud = votes[0], tiny_cloud(200, 90)
    assert len(votes) == 1 and len(VIEWS) == 13 and (test.votes.sum(1) > 12.99).all()          # probabilities, 13 or more a point
    assert (len(test.votes) < 90) == (test_grid_size is not None)
    assert (result["predictions"][0] == label.numpy()).all() and len(label) == len(cloud["coord"])
    assert result["matrix"].sum() == (cloud["segment"] >= 0).sum() and np.isnan(result["loss"])
    share = point_scripts.label_cloud(model, dataset.cloud(0), True)[1]
    assert share.shape == (90,) and (share > 1 / 3).all() and (share <= 1).all()


def test_test_only_is_the_precise_test_unless_told(whole, tmp_path, capsys):
    config, out = whole
    more = ["--device", "cpu", "--num-workers", "0", "--limit-batches", "1", "evaluation.precise=true", "data.test=test"]
    result = SCRIPT.main([config, "--resume", str(last(out)), "--test-only", *more])
    assert "on the test split, precise test, raw points" in capsys.readouterr().out and np.isfinite(result["official_miou"])
    assert score(last(out), tmp_path, *more, "--examples", "1")["miou"] == result["miou"]
    assert json.loads((tmp_path / "metrics.json").read_text())["loss"] is None


# -- prediction --------------------------------------------------------------------------------------------------------

def test_predict_every_format(whole, tmp_path):
    clouds = write_every_format(tmp_path / "in")
    out = tmp_path / "pred"
    labels = predict.main([str(last(whole[1])), str(tmp_path / "in"), "--output", str(out), "--device", "cpu", "--pca"])
    palette = np.array(load_checkpoint(last(whole[1]))["palette"])
    assert sorted(Path(path).name for path in labels) == sorted(clouds)
    for path, label in labels.items():
        cloud, stem = clouds[Path(path).name], out / Path(path).stem
        assert (np.load(f"{stem}.npy") == label).all() and label.shape == (len(cloud["coord"]),) and set(label) <= {0, 1, 2}
        colored, pca = read_ply_vertices(f"{stem}.ply"), read_ply_vertices(f"{stem}_pca.ply")
        for vertices in (colored, pca):                                                  # the points, in the order of the file
            np.testing.assert_allclose(np.stack([vertices[axis] for axis in "xyz"], 1), cloud["coord"], atol=1e-6)
        rgb = [np.stack([vertices[name] for name in ("red", "green", "blue")], 1) for vertices in (colored, pca)]
        assert (colored["label"] == label).all() and (rgb[0] == palette[label]).all() and "label" not in pca
        assert len(np.unique(rgb[1], axis=0)) > 10
    assert len(list(out.iterdir())) == 12                                                # and nothing half written


def label_files(whole, folder, out, *more):
    args = [str(last(whole[1])), str(folder), "--output", str(out), "--device", "cpu", "evaluation.precise=false", *more]
    return {Path(path).name: label for path, label in predict.main(args).items()}


def test_predict_reads_no_labels(whole, tmp_path, capsys):
    """A file whose own label column is NaN, text, fractional, two columns, or anything else, is labelled like one without."""
    cloud = tiny_cloud(3, 200)
    del cloud["segment"]
    columns = {"nan": np.full(200, np.nan), "text": np.array(["tree", "car"] * 100), "soft": np.full(200, 0.4), "pairs": np.zeros((200, 2), int),
               "short": np.zeros(7, int), "far": np.full(200, 999)}
    folder = tmp_path / "in"
    folder.mkdir()
    np.savez(folder / "none.npz", **cloud)
    for name, label in columns.items():
        np.savez(folder / f"{name}.npz", **cloud, label=label)
    names = ["x", "y", "z", "red", "green", "blue", "nx", "ny", "nz", "class"]
    rows = np.zeros(200, [(name, "<f8") for name in names])
    for name, column in zip(names, np.c_[cloud["coord"], cloud["color"], cloud["normal"], np.full(200, np.nan)].T, strict=True):
        rows[name] = column
    header = "".join(f"property double {name}\n" for name in names)
    (folder / "scan.ply").write_bytes(f"ply\nformat binary_little_endian 1.0\nelement vertex 200\n{header}end_header\n".encode() + rows.tobytes())
    labels = label_files(whole, folder, tmp_path / "out")
    assert len(labels) == 8 and all((label == labels["none.npz"]).all() for label in labels.values())


@pytest.mark.parametrize("kind", ["ply", "npy"])
def test_results_lie_on_map_coordinates(whole, tmp_path, kind):
    cloud = tiny_cloud(4, 150)
    near, far = cloud["coord"].astype(np.float64), cloud["coord"].astype(np.float64) + [627458.123456, 4842478.654321, 141.000001]
    (tmp_path / "in").mkdir()
    if kind == "ply":
        write_ply(tmp_path / "in" / "near.ply", near, cloud["color"])
        write_ply(tmp_path / "in" / "far.ply", far, cloud["color"])
    else:
        for name, coord in (("near", near), ("far", far)):
            np.save(tmp_path / "in" / f"{name}.npy", np.c_[coord, cloud["color"]])
    labels = label_files(whole, tmp_path / "in", tmp_path / "out", "--pca", "data.missing_normal=zeros")
    assert (labels[f"far.{kind}"] == labels[f"near.{kind}"]).mean() > 0.95              # only rounding differs
    for name, coord, number in (("near", near, np.float32), ("far", far, np.float64), ("far_pca", far, np.float64)):
        vertices = read_ply_vertices(tmp_path / "out" / f"{name}.ply")
        assert all((vertices[axis] == coord[:, i]).all() and vertices[axis].dtype == number for i, axis in enumerate("xyz"))


def test_labels_are_written_in_the_numbers_of_the_label_files(tmp_path):
    """Classes that count from 1, and codes of a label map: read, scored, and written back."""
    for name, values, setting in (("offset", {0: 1, 1: 2, 2: 3}, {"label_offset": -1}),
                                  ("map", {0: 2, 1: 600, 2: 70000}, {"label_map": "2:0,600:1,70000:2,9:ignore"})):
        (tmp_path / name).mkdir()
        data = write_classes(tmp_path / name)
        for split, seed in (("train", 0), ("val", 9)):
            (data / split).mkdir()
            cloud = tiny_cloud(seed)
            segment = np.array([values.get(c, -1) for c in cloud["segment"]])
            np.savez(data / split / "a.npz", **{**cloud, "segment": segment})
        config = write_config(tmp_path / f"{name}.yaml", data, data=setting, training={**ONE_STEP, "batch_size": 1})
        result = train(config, tmp_path / name / "out")
        labels = label_files((config, tmp_path / name / "out"), data / "val", tmp_path / name / "pred")
        stored, vertices = np.load(tmp_path / name / "pred" / "a.npy"), read_ply_vertices(tmp_path / name / "pred" / "a.ply")
        assert (stored == np.array([values[c] for c in labels["a.npz"].tolist()])).all() and (vertices["label"] == stored).all()
        assert stored.dtype == (np.int16 if name == "offset" else np.int32)
        correct = (stored == segment)[segment != -1].mean()
        assert 0 < correct == result["overall_accuracy"] == score(last(tmp_path / name / "out"), tmp_path / "scores")["overall_accuracy"]


def test_passes_are_announced_and_bounded(whole, tmp_path, capsys):
    cloud = tiny_cloud(3, 30)
    coord = np.concatenate([cloud["coord"], np.full((50, 3), 0.501), 0.61 + np.random.default_rng(0).random((9, 3)) * 0.01])
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "a.npz", coord=coord)
    found = {}
    for most in ("null", 2):
        args = ["evaluation.precise=true", f"evaluation.max_fragments={most}", "data.missing_normal=zeros"]
        found[most] = label_files(whole, tmp_path / "in", tmp_path / f"out{most}", *args)["a.npz"]
        printed = capsys.readouterr().out
        passes = int(re.search(r"a.npz: (\d+) passes through the network for the precise test .evaluation.max_fragments=", printed)[1])
        assert 13 * 7 < passes < 13 * 15 if most == "null" else passes == 26             # the 50 equal points have one
        assert len(found[most]) == 89
    assert (found["null"] == found[2]).mean() > 0.8


def test_the_view_of_the_training_clouds_is_that_of_all(tmp_path, capsys):
    """Hilly training clouds without normals: neighbours decide, also in the flat validation cloud, and later in predict.py."""
    data = write_classes(tmp_path)
    rng = np.random.default_rng(0)
    for split, height in (("train", 6.0), ("val", 0.0)):
        (data / split).mkdir()
        x, y = rng.uniform(0, 40, (2, 1500))
        z = height * np.sin(x / 6) * np.cos(y / 7)
        np.savez(data / split / "a.npz", coord=np.stack([x, y, z], 1), segment=rng.integers(0, 3, 1500))
    config = write_config(tmp_path / "c.yaml", data, data={"grid_size": 1.0}, training={**ONE_STEP, "batch_size": 1})
    train(config, tmp_path / "out")
    assert "data.normal_view=neighbours: seen from inside, more than 2 % of the ground looks down in 1 of 1 clouds" in capsys.readouterr().out
    assert load_checkpoint(last(tmp_path / "out"))["config"]["data"]["normal_view"] == "neighbours"
    train(config, tmp_path / "out", "--resume", "auto")                                  # the config still says null
    label_files((config, tmp_path / "out"), data / "val", tmp_path / "pred")
    assert "a.npz: no normals in the file; estimated, the ground turned up and neighbours to one side" in capsys.readouterr().out
    label_files((config, tmp_path / "out"), data / "val", tmp_path / "pred", "data.normal_view=[20,20,90]")
    assert "a.npz: no normals in the file; estimated, turned to 20 20 90" in capsys.readouterr().out


def test_predict_one_scene_folder_as_text(whole, tmp_path):
    clouds = write_every_format(tmp_path / "in")
    labels = predict.main([str(last(whole[1])), str(tmp_path / "in" / "scene0001_00"), "--output", str(tmp_path / "out"), "--device", "cpu",
                           "--labels", "txt", "--picture", "none", "evaluation.precise=true"])
    (label,) = labels.values()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["scene0001_00.txt"]
    assert (np.loadtxt(tmp_path / "out" / "scene0001_00.txt") == label).all() and len(label) == len(clouds["scene0001_00"]["coord"])
    (tmp_path / "in" / "scene0001_00").rename(tmp_path / "in" / "scene0001.v2")             # a dot in a folder's name is no suffix
    predict.main([str(last(whole[1])), str(tmp_path / "in" / "scene0001.v2"), "--output", str(tmp_path / "dot"), "--device", "cpu"])
    assert sorted(file.name for file in (tmp_path / "dot").iterdir()) == ["scene0001.v2.npy", "scene0001.v2.ply"]
    with pytest.raises(ValueError, match="--html"):
        predict.main([str(last(whole[1])), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--device", "cpu", "--html"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no clouds in this folder"):
        predict.main([str(last(whole[1])), str(tmp_path / "empty"), "--output", str(tmp_path / "out"), "--device", "cpu"])


# -- mistakes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, message", [
    (["training.batch_size=0"], "training.batch_size"),
    (["training.epochs=5"], "training.epochs=5 is no multiple"),
    (["training.epoch=5"], "training.epoch"),
    (["optimizer.block_lr=0"], "optimizer.block_lr"),
    (["model.mode=linear"], "model.mode"),
    (["model.num_classes=4"], "3 class names for model.num_classes=4"),
    (["data.root=nowhere"], "nowhere: no such folder; set data.root"),
    (["data.train=trian"], "no split 'trian'.*train"),
    (["data.features=[coord,colour]"], "data.features"),
    (["data.grid_size=-1"], "data.grid_size"),
    (["data.benchmark=scannet"], "data.benchmark"),
    (["augmentation.mix_probability=2"], "augmentation.mix_probability"),
    (["augmentation.elastic=[0.2]"], "augmentation.elastic"),
    (["data.features=[coord,color]"], "6 channels, the encoder takes 9 .in_channels of model.encoder"),
    (["--pretrained_path", "sonata.pth"], "--pretrained_path sonata.pth, but training.use_pretrained=false would not read it"),
    (["--test-only"], "--test-only needs a checkpoint"),
    (["--limit-batches", "-1"], "--limit-batches"),
    (["--num-workers", "-1"], "--num-workers"),
    (["scheduler.pct_start=2"], "pct_start"),
    (["data.normal_view=up"], "data.normal_view"),
    (["data.normal_view=[1,2]"], "data.normal_view=.1.0, 2.0.: expected"),
    (["data.color_range=[1,0]"], "data.color_range=.1.0, 0.0.: expected the highest colour"),
    (["data.color_range=0"], "data.color_range=.0.0, 0.0."),
    (["data.ignore_labels=[none]"], "data.ignore_labels: 'none'; expected integers, and nan"),
    (["data.ignore_labels=[0.5]"], "data.ignore_labels.0.: expected an integer or text"),
    (["data.label_map=1:0,2:1"], "data.label_map has 2 classes and model.num_classes=3"),
    (["data.label_map=1:0,2:1,3:2", "data.label_offset=-1"], "leave one out"),
    (["evaluation.max_fragments=0"], "evaluation.max_fragments"),
])
def test_user_errors_name_the_place(root, tmp_path, more, message, capsys):
    with refused(capsys, message):
        train(write_config(tmp_path / "c.yaml", root), tmp_path / "out", *more)


def test_labels_are_checked_and_the_ignored_values_of_classes_json_hold(root, tmp_path):
    folder = write_clouds(tmp_path / "train", 1).parent
    cloud = tiny_cloud(7)
    cloud["segment"][:9] = 255
    np.savez(folder / "train" / "other.npz", **cloud)
    config = SCRIPT.load_config(write_config(tmp_path / "c.yaml", folder), SCRIPT.DEFAULTS, [])
    with pytest.raises(ValueError, match=r"other.npz: label 255 at 9 of 300 points"):
        SCRIPT.build_dataset(config, "train")
    (folder / "classes.json").write_text(json.dumps({"classes": ["a", "b", "c"], "ignore_index": 255}))
    dataset = SCRIPT.build_dataset(config, "train")
    assert (dataset.cloud(1)["label"] == IGNORE_INDEX).sum() == 9 and SCRIPT.class_names(config) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="--label-dir"):
        SCRIPT.build_dataset(config, "test", data_dir=str(folder), label_dir=str(folder))


# -- processes and imports ---------------------------------------------------------------------------------------------

def test_two_processes_train_together_and_score_like_one(root, tmp_path):
    """Three clouds for two processes: each is scored once."""
    config = write_config(tmp_path / "c.yaml", root, model={"mode": "dec"}, training={**ONE_STEP, "use_pretrained": None, "batch_size": 4})
    weights = write_encoder(tmp_path / "sonata.pth")
    run = TinyRun("train_sonata.py", [config, "--device", "cpu", "--num-workers", "0", "--pretrained_path", weights], root)
    run_pair(run, tmp_path / "out")
    together = read_log(tmp_path / "out" / "log" / "log.jsonl")[-1]
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    assert together["split"] == "val" and checkpoint["step"] == 1 and len(checkpoint["rng_others"]) == 1
    model = SCRIPT.load_model(checkpoint, CPU)
    alone = SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "val"), precise=False)
    assert alone["matrix"].sum() == sum((tiny_cloud(seed, 300 + 7 * (seed % 5))["segment"] >= 0).sum() for seed in (100, 101, 102))
    for key in ("miou", "overall_accuracy", "fw_iou"):
        assert together[key] == pytest.approx(alone["metrics"][key], abs=1e-12)
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert together["official_miou"] == pytest.approx(alone["tables"][SCRIPT.OFFICIAL]["miou"], abs=1e-12)


def test_runs_where_the_usual_extensions_are_refused():
    """The whole script, its help text included, never tries spconv, torch_scatter, flash_attn, pointops, timm or addict."""
    code = """
import sys, torch
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"spconv", "cumm", "torch_scatter", "torch_cluster", "flash_attn", "pointops", "timm", "addict"}:
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
import train_sonata, evaluate, predict
from models.point_transformer import build_segmenter
from tests.tiny_clouds import ENCODER
batch = {"grid_coord": torch.arange(90).view(30, 3) % 7, "feat": torch.rand(30, 9), "offset": torch.tensor([12, 30])}
print(build_segmenter(ENCODER, 3, "ft")(batch).shape)
try:
    train_sonata.main(["--help"])
except SystemExit as end:
    print("exit", end.code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "torch.Size([30, 3])" in done.stdout and "exit 0" in done.stdout, done.stderr
    assert "--pretrained_path" in done.stdout


def test_the_smallest_cloud_goes_all_the_way():
    model = build_segmenter(ENCODER, 3, "ft").eval()
    batch = {"grid_coord": torch.zeros(1, 3, dtype=torch.int32), "feat": torch.rand(1, 9), "offset": torch.tensor([1])}
    assert model(batch).shape == (1, 3)
