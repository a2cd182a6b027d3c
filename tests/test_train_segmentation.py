"""train_segmentation.py with evaluate.py and predict.py, run whole on tiny pictures and a tiny U-Net: the document's configuration works
as written, it learns, resumes exactly, and every reader has the same numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import evaluate
import predict
import train_segmentation
import utils.device
import utils.run
from data import image_splits
from data.image_splits import check_counts
from data.images import Augmentation
from models.resnet import ENCODERS
from models.unet import UNet
from tests.tiny_images import shrink_unet, write_classes, write_pictures
from tests.tiny_runs import TinyRun, run_pair
from tests.whole_runs import assert_equal, sigterm_in_call
from utils.checkpoint import CheckpointKeeper, EarlyStopping, load_checkpoint
from utils.cli import StopRequested
from utils.config import load_config
from utils.image_inference import build_normalizer
from utils.log import read_log
from utils.losses import IGNORE_INDEX, WeightedLoss, lovasz_softmax_loss, soft_dice_loss
from utils.postprocess import build_refine
from utils.training import build_loader

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = train_segmentation
CPU = torch.device("cpu")
# The example of the document that asked for this script, word for word.
DOCUMENT = """
experiment_name: seg_baseline

dataset:
  root: data/segmentation_dataset
  train_split: train
  val_split: val
  num_classes: 4
  image_size: [512, 512]
  normalization:
    mean: [0.485, 0.456, 0.406]
    std:  [0.229, 0.224, 0.225]

augmentations:
  horizontal_flip: true
  color_jitter: {brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.1}
  random_crop: {size: [512, 512], padding: 16}

model:
  name: unet
  backbone: resnet34
  pretrained: true
  dropout: 0.1

optimizer:
  name: adamw
  lr: 0.0003
  weight_decay: 0.01

scheduler:
  name: cosine
  warmup_epochs: 5
  max_epochs: 100

training:
  epochs: 100
  batch_size: 8
  num_workers: 8
  amp: true
  seed: 42
  gradient_clip_val: 1.0
  accumulate_grad_batches: 1
  early_stopping: {patience: 10, metric: val/mIoU, mode: max}

checkpointing:
  dir: runs/checkpoints/seg_baseline
  save_top_k: 3
  monitor: val/mIoU
  mode: max

logging:
  dir: runs/logs/seg_baseline
  log_every_n_steps: 50
"""


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    shrink_unet(monkeypatch)


def write_split(root, split, count, first_seed, size=(64, 64)):
    write_pictures(root / split, count, first_seed, size)
    for kind in ("images", "masks"):
        (root / kind).mkdir(exist_ok=True)
        (root / split / kind).rename(root / kind / split)
    (root / split).rmdir()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_split(folder, "train", 6, 0)
    write_split(folder, "val", 2, 100, (70, 93))
    write_split(folder, "test", 2, 200, (48, 50))
    write_classes(folder / "classes.json")
    return folder


def write_config(path, root, **sections):
    config = {"dataset": {"root": str(root), "num_classes": 3, "image_size": 64, "cache_dir": str(root / "cache")},
              "augmentations": {"scale_range": [0.8, 1.4], "color_jitter": {"brightness": 0.2}},
              "model": {"backbone": "resnet18", "dropout": 0.1}, "training": {"epochs": 2, "batch_size": 2, "num_workers": 0, "amp": False},
              "logging": {"log_every_n_steps": 1, "tensorboard": False}}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(config))
    return str(path)


def train(config, output, *more):
    return SCRIPT.main([str(config), "--device", "cpu", "--output-dir", str(output), *map(str, more)])


def last(output):
    return Path(output) / "model" / "model_last.pth"


def assert_same_run(first, second):
    first, second = (load_checkpoint(last(folder)) for folder in (first, second))
    for section in ("model", "optimizer", "scheduler", "ema", "totals", "stopping", "best", "rng"):
        assert_equal(first[section], second[section], section)
    assert (first["epoch"], first["batch"], first["step"]) == (second["epoch"], second["batch"], second["step"])


# -- the document's example --------------------------------------------------------------------------------------------

def test_every_key_of_the_documents_example_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENCODERS, "resnet34", ENCODERS["resnet18"])
    data = Path("data/segmentation_dataset")
    data.mkdir(parents=True)
    write_split(data, "train", 8, 0, (40, 48))
    write_split(data, "val", 1, 50, (40, 48))
    (data / "classes.txt").write_text("0 background\n1 road\n2 building\n3 vegetation\n")
    Path("seg.yaml").write_text(DOCUMENT)
    torch.manual_seed(5)
    pretrained = ENCODERS["resnet34"]().state_dict()
    torch.save({**pretrained, "fc.weight": torch.zeros(2, 64), "fc.bias": torch.zeros(2)}, "resnet34.pth")

    seen = {"loader": [], "clip": [], "stop": [], "keep": [], "model": [], "data": []}
    monkeypatch.setattr(SCRIPT, "build_loader", lambda data, sampler, num_workers, device: seen["loader"].append(num_workers) or build_loader(data, sampler, 0, device))
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, norm: seen["clip"].append(norm) or clip(p, norm))
    monkeypatch.setattr(SCRIPT, "EarlyStopping", lambda *a: seen["stop"].append(a) or EarlyStopping(*a))
    monkeypatch.setattr(utils.run, "CheckpointKeeper", lambda *a: seen["keep"].append(a[1:]) or CheckpointKeeper(*a))
    load, dataset = SCRIPT.load_pretrained, image_splits.SegmentationDataset
    monkeypatch.setattr(SCRIPT, "load_pretrained", lambda model, config: seen["model"].append(model) or load(model, config))
    monkeypatch.setattr(image_splits, "SegmentationDataset", lambda *a, **more: seen["data"].append(a) or dataset(*a, **more))
    # as written, but for a smaller picture and two steps of one epoch each
    sizes = ["dataset.image_size=[32, 48]", "augmentations.random_crop.size=[32, 40]"]
    result = SCRIPT.main(["--config", "seg.yaml", "training.epochs=2", *sizes, "--device", "cpu", "--pretrained_path", "resnet34.pth"])

    assert Path("exp/seg_baseline/config/config.yaml").is_file()
    folder = Path("runs/checkpoints/seg_baseline")
    assert {path.name for path in folder.iterdir()} == {"model_best.pth", "model_last.pth", "checkpoint_top_1.pth", "checkpoint_top_2.pth"}
    assert len(read_log(Path("runs/logs/seg_baseline/log.jsonl"))) == 4 and np.isfinite(result["miou"])
    checkpoint = load_checkpoint(folder / "model_last.pth")
    assert checkpoint["class_names"] == ["background", "road", "building", "vegetation"] and checkpoint["seed"] == 42
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0] and "betas" in groups[0]
    # 100 epochs of one step each, the first five warm up: the rate after two
    assert groups[0]["lr"] == pytest.approx(3e-4 * (0.01 + 0.99 * 2 / 5)) and checkpoint["step"] == 2
    (pairs, size, classes, augmentation, *_), (val_pairs, *_) = seen["data"]
    assert [len(pairs), len(val_pairs), size, classes] == [8, 1, (32, 40), 4] and pairs[0][0].parent == data / "images" / "train"
    assert augmentation == Augmentation((1.0, 1.0), cat_max_ratio=1.0, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1,
                                        padding=16, color="factors", cover=(32, 48))
    assert seen["loader"] == [8] and seen["clip"] == [1.0, 1.0] and seen["stop"] == [(10, "max")] and seen["keep"] == [(3, 0, "max")]
    model, = seen["model"]
    assert isinstance(model, UNet) and model.dropout.p == 0.1 and model.segmentation_head[0].out_channels == 4
    config = load_config("seg.yaml", SCRIPT.DEFAULTS)
    grey = build_normalizer(**config.dataset.normalization)(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert grey.tolist() == pytest.approx([(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)])
    assert (config.training.amp, config.logging.log_every_n_steps, config.training.accumulate_grad_batches) == (True, 50, 1)


def test_the_document_without_weights_says_where_to_get_them(tmp_path, root):
    config = write_config(tmp_path / "c.yaml", root, model={"pretrained": True})
    with pytest.raises(ValueError, match="https://download.pytorch.org/models/resnet18-f37072fd.pth.*--pretrained_path"):
        train(config, tmp_path / "out")
    with pytest.raises(ValueError, match="model.pretrained=false, but some.pth"):
        train(config, tmp_path / "out", "model.pretrained=false", "--pretrained_path", "some.pth")


def test_the_example_is_the_documents_and_toml_and_json_say_the_same(tmp_path):
    (tmp_path / "c.yaml").write_text(DOCUMENT)
    config = load_config(tmp_path / "c.yaml", SCRIPT.DEFAULTS)
    assert load_config(ROOT / "configs" / "segmentation_example.yaml", SCRIPT.DEFAULTS) == config
    plain = yaml.safe_load(DOCUMENT)
    (tmp_path / "c.json").write_text(json.dumps(plain))
    lines = [f'experiment_name = "{plain.pop("experiment_name")}"']
    for section, values in plain.items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else None
            lines.append(f"{key} = {json.dumps(value) if inner is None else '{' + inner + '}'}")
    (tmp_path / "c.toml").write_text("\n".join(lines))
    for name in ("c.json", "c.toml"):
        args = SCRIPT.parse_args([str(tmp_path / name), "training.epochs=100"])
        assert SCRIPT.read_config(args, [args.config]) == config and args.output_dir == "exp/seg_baseline"


def test_flags_win_over_the_file(tmp_path, root):
    argv = ["dataset.num_classes=2", "--config", write_config(tmp_path / "c.yaml", root, training={"seed": 3}), "--num-workers", "5",
            "--amp-dtype", "float32", "--output-dir", "x"]
    args = SCRIPT.parse_args(argv)
    config = SCRIPT.read_config(args, argv)
    assert (config.training.seed, config.training.num_workers, config.training.amp, config.dataset.num_classes) == (3, 5, "float32", 2)
    argv += ["--seed", "0"]
    assert args.output_dir == "x" and SCRIPT.read_config(SCRIPT.parse_args(argv), argv).training.seed == 0
    for wrong in (["a.yaml", "--config", "b.yaml"], ["training.epochs=1"]):
        with pytest.raises(SystemExit):
            SCRIPT.parse_args(wrong)


# -- learning ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("losses", [{"ce": 1.0, "dice": 0.5}, {"ce": 0.0, "focal": 1.0, "lovasz": 0.5, "class_weights":
                                                               "sqrt_median_frequency"}], ids=["ce+dice", "focal+lovasz"])
def test_overfits_four_pictures(tmp_path, losses):
    for split in ("train", "val"):
        write_split(tmp_path, split, 4, 0)
    config = write_config(tmp_path / "c.yaml", tmp_path, losses=losses, training={"epochs": 40, "batch_size": 4}, augmentations=
                          {"horizontal_flip": False, "scale_range": [1.0, 1.0], "color_jitter": {}}, model={"dropout": 0.0},
                          optimizer={"lr": 0.01}, scheduler={"name": "onecycle"}, evaluation={"interval": 40})
    result = train(config, tmp_path / "out")
    assert result["miou"] > 0.9
    names = read_log(tmp_path / "out" / "log" / "log.jsonl")[0]
    assert {name for name, value in losses.items() if value and name != "class_weights"} <= names.keys()


def test_accumulated_is_the_big_batch(tmp_path, root, monkeypatch):
    """Without batch norm, and with very different numbers of unlabelled pixels: two micro-batches of two are one batch of four."""
    monkeypatch.setattr(SCRIPT, "UNet", lambda *_: nn.Conv2d(3, 3, 3, padding=1))
    monkeypatch.setattr(nn.Conv2d, "scores", nn.Conv2d.forward, raising=False)
    results = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        config = write_config(tmp_path / "c.yaml", root, training={"batch_size": batch, "accumulate_grad_batches": accumulate, "epochs": 1,
                                                                    "gradient_clip_val": 0.5},
                              augmentations={"scale_range": [0.5, 0.9], "random_crop": {"padding": 30}}, optimizer={"name": "sgd", "lr": 0.1},
                              losses={"ce": 1.0, "focal": 0.5, "class_weights": [1.0, 0.2, 3.0]}, scheduler={"name": "constant"})
        train(config, tmp_path / f"out{batch}")
        results.append(load_checkpoint(last(tmp_path / f"out{batch}")))
    assert results[0]["step"] == results[1]["step"] == results[2]["step"] == 1              # 6 pictures: the rest is left out
    for other in results[1:]:
        for name, value in results[0]["model"].items():
            assert torch.allclose(value, other["model"][name], atol=1e-7), name
    start = SCRIPT.load_model({**results[0], "ema": None}, CPU).state_dict()["weight"]
    assert float(start.abs().sum()) > 0


def test_losses_of_a_step_are_their_sums(root):
    torch.manual_seed(0)
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    label[0, :5] = IGNORE_INDEX
    criterion = WeightedLoss({"ce": 1.0, "dice": 0.5, "lovasz": 0.25}, [1.0, 2.0, 0.5], class_dim=1)
    parts = {"ce": criterion.ce(logits, label), "dice": soft_dice_loss(logits, label, class_dim=1),
             "lovasz": lovasz_softmax_loss(logits, label, class_dim=1)}
    whole = parts["ce"] + 0.5 * parts["dice"] + 0.25 * parts["lovasz"]
    terms = SCRIPT.compute_loss(criterion, logits, label, criterion.label_weight(label), 1.0)
    assert terms["total"].item() == pytest.approx(whole.item(), rel=1e-5) and terms["dice"].item() == pytest.approx(parts["dice"].item())
    ignored = torch.full_like(label, IGNORE_INDEX)
    assert SCRIPT.compute_loss(criterion, logits, ignored, criterion.label_weight(ignored), 1.0)["total"].item() == 0


def test_early_stopping_and_the_best_of_a_run(tmp_path, root, monkeypatch, capsys):
    original, scores = SCRIPT.evaluate, iter([0.2, 0.6, 0.4, 0.5, 0.9])

    def scripted(*args, **kwargs):
        result = original(*args, **kwargs)
        return {**result, "metrics": {**result["metrics"], "miou": next(scores)}}

    monkeypatch.setattr(SCRIPT, "evaluate", scripted)
    config = write_config(tmp_path / "c.yaml", root, training={"epochs": 5, "early_stopping": {"patience": 2}}, checkpointing=
                          {"save_top_k": 2})
    result = train(config, tmp_path / "out", "--limit-batches", "1")
    assert (result["best"], result["best_epoch"]) == (0.6, 2) and load_checkpoint(last(tmp_path / "out"))["epoch"] == 4
    assert "stopped early" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert {"checkpoint_top_2.pth", "checkpoint_top_4.pth"} < names and "checkpoint_top_1.pth" not in names
    assert train(config, tmp_path / "out", "--limit-batches", "1", "--resume", "auto")["best"] == 0.6      # and stays stopped


@pytest.mark.parametrize("more", [["optimizer.name=adam", "scheduler.name=poly", "training.amp=bfloat16", "training.channels_last=true"],
                                  ["optimizer.name=sgd", "scheduler.name=step", "scheduler.milestones=[1]", "model.freeze_encoder=true"],
                                  ["model.name=deeplab_v2", "model.n_blocks=[1, 1, 1, 1]", "model.base_width=4", "evaluation.mode=slide",
                                   "evaluation.stride=40", "training.ema=0.9"]], ids=["adam", "sgd", "deeplab"])
def test_other_optimisers_schedules_and_networks(tmp_path, root, more):
    config = write_config(tmp_path / "c.yaml", root, checkpointing={"monitor": "val/loss", "mode": "min"})
    result = train(config, tmp_path / "out", *more, "--limit-batches", "1")
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    assert result["best"] <= result["loss"] and all(value.dtype != torch.bfloat16 for value in checkpoint["model"].values())
    if "scheduler.name=step" in more:
        assert checkpoint["optimizer"]["param_groups"][0]["lr"] == pytest.approx(3e-5) and len(checkpoint["optimizer"]["state"]) < 40


# -- stopping and going on ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that nobody stopped: 2 epochs of 3 steps, with dropout, an average of the weights and accumulation."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "c.yaml", root, training={"ema": 0.9, "batch_size": 1, "accumulate_grad_batches": 2},
                          losses={"lovasz": 0.5, "class_weights": "median_frequency"})
    with pytest.MonkeyPatch.context() as patch:
        shrink_unet(patch)
        result = train(config, folder / "out")
    return config, folder / "out", result


@pytest.mark.parametrize("owner, method, call, step", [(torch.optim.AdamW, "step", 1, 1), (torch.optim.AdamW, "step", 3, 3),
                                                       (torch.optim.AdamW, "step", 5, 5), (UNet, "forward", 3, 2)])
def test_resume_is_exact_wherever_it_stopped(whole, tmp_path, monkeypatch, owner, method, call, step):
    """The last: within the accumulation of the second step, which is finished first."""
    config, reference, _ = whole
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, owner, method, call)
        with pytest.raises(StopRequested, match="resume auto"):
            train(config, tmp_path / "cut")
    assert load_checkpoint(last(tmp_path / "cut"))["step"] == step
    train(config, tmp_path / "cut", "--resume", "auto", "--num-workers", "2" if step == 5 else "0")
    assert_same_run(reference, tmp_path / "cut")
    logs = [read_log(folder / "log" / "log.jsonl") for folder in (reference, tmp_path / "cut")]
    assert [record["loss"] for record in logs[0]] == [record["loss"] for record in logs[1]]


def test_resume_of_another_run_is_refused(whole):
    config, reference, _ = whole
    for change in ("optimizer.lr=0.5", "training.seed=1", "losses.ce=0.5", "augmentations.horizontal_flip=false", "training.epochs=3",
                   "dataset.num_classes=4", "dataset.image_size=80", "scheduler.name=poly"):
        with pytest.raises(ValueError, match=f"{change.split('=')[0].split('.')[1]}|classes"):
            train(config, reference, change, "--resume", "auto")


# -- every reader has the same numbers ---------------------------------------------------------------------------------

def test_every_reader_agrees(root, whole, tmp_path, capsys):
    config, folder, result = whole
    again = train(config, folder, "--resume", "auto", "--test-only", "dataset.test_split=val")
    assert "on the test split" in capsys.readouterr().out and again["miou"] == pytest.approx(result["miou"], abs=1e-12)
    scored = evaluate.main([str(last(folder)), "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / "a"), "--batch-size", "3"])
    assert scored["miou"] == pytest.approx(result["miou"], abs=1e-9) and (tmp_path / "a" / "report.html").is_file()
    test = evaluate.main([str(last(folder)), "--device", "cpu", "--output-dir", str(tmp_path / "b")])
    assert "test split: 2 files" in capsys.readouterr().out and test["miou"] != scored["miou"]
    record = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert {"fw_iou", "mean_f1", "overall_accuracy"} <= record.keys() and "f1" in record["per_class"]["sky"]

    labels = predict.main([str(last(folder)), f"{root}/images/val", "--output", str(tmp_path / "pred"), "--device", "cpu"])
    matrix = np.zeros((3, 3), int)
    for path, label in labels.items():
        assert (np.array(Image.open(tmp_path / "pred" / f"{Path(path).stem}.png")) == label).all() and label.shape == (70, 93)
        truth = np.array(Image.open(f"{root}/masks/val/{Path(path).name}"))
        np.add.at(matrix, (truth[truth != 255], label[truth != 255]), 1)
    iou = np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1) - np.diag(matrix), 1)
    assert np.mean(iou[matrix.sum(0) + matrix.sum(1) > 0]) == pytest.approx(scored["miou"], abs=1e-9)
    for option in ("--pca", "--html"):
        with pytest.raises(ValueError, match=option):
            predict.main([str(last(folder)), f"{root}/images/val", "--output", str(tmp_path / "pred"), "--device", "cpu", option])


def test_the_averaged_weights_are_what_is_scored(whole):
    checkpoint = load_checkpoint(last(whole[1]))
    model = SCRIPT.load_model(checkpoint, CPU)
    name = "decoder.blocks.0.conv1.0.weight"
    assert torch.equal(model.state_dict()[name], checkpoint["ema"]["shadow"][name])
    assert not torch.equal(model.state_dict()[name], checkpoint["model"][name])


def test_post_processing_is_off_until_asked_for_and_tells_the_score_before(root, whole, tmp_path, capsys):
    _, folder, result = whole
    plain = str(last(folder))
    assert build_refine(load_config(whole[0], SCRIPT.DEFAULTS).postprocess) is None
    for number, more in enumerate((["postprocess.mode=5", "postprocess.min_area=40"], ["postprocess.crf.use=true", "postprocess.crf.iterations=2"])):
        after = evaluate.main([plain, "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / f"{number}"), *more])
        record = json.loads((tmp_path / f"{number}" / "metrics.json").read_text())
        assert record["before post-processing"]["miou"] == pytest.approx(result["miou"], abs=1e-9) and after["miou"] != result["miou"]
    before = predict.main([plain, f"{root}/images/val", "--output", str(tmp_path / "p"), "--device", "cpu"])
    after = predict.main([plain, f"{root}/images/val", "--output", str(tmp_path / "q"), "--device", "cpu", "postprocess.min_area=40"])
    assert any((before[path] != after[path]).any() for path in before)
    with pytest.raises(ValueError, match="closing_order"):
        evaluate.main([plain, "--device", "cpu", "postprocess.closing=3"])


def test_without_a_test_split_validation_is_scored(tmp_path, whole, capsys):
    for split in ("train", "val"):
        write_split(tmp_path, split, 2, 0)
    evaluate.main([str(last(whole[1])), f"dataset.root={tmp_path}", "--device", "cpu", "--output-dir", str(tmp_path / "s")])
    assert "on val split: 2 files" in capsys.readouterr().out
    for more, name in ((["dataset.test_split=holdout"], "holdout"), (["--split", "test"], "test")):           # not validation by that name
        with pytest.raises(ValueError, match=f"images/{name}"):
            evaluate.main([str(last(whole[1])), f"dataset.root={tmp_path}", "--device", "cpu", *more])


def test_masks_that_count_from_one(tmp_path):
    """0 is unlabelled, k is class k - 1: in training, in the score and in the files that are written."""
    for split in ("train", "val"):
        write_split(tmp_path, split, 2, 0)
        for path in (tmp_path / "masks" / split).iterdir():
            label = np.array(Image.open(path)).astype(int)
            Image.fromarray(np.where(label == 255, 0, label + 1).astype(np.uint8)).save(path)
    config = write_config(tmp_path / "c.yaml", tmp_path, dataset={"root": str(tmp_path), "num_classes": 3, "image_size": 64,
                          "reduce_zero_label": True, "cache_dir": None}, training={"epochs": 1, "batch_size": 2, "num_workers": 0})
    train(config, tmp_path / "out")
    labels = predict.main([str(last(tmp_path / "out")), f"{tmp_path}/images/val", "--output", str(tmp_path / "p"), "--device", "cpu"])
    for path, label in labels.items():
        assert (np.array(Image.open(tmp_path / "p" / f"{Path(path).stem}.png")) == label + 1).all()


# -- data --------------------------------------------------------------------------------------------------------------

def test_the_crop_is_a_part_of_the_scaled_photograph(tmp_path):
    """image_size covers, the crop is cut out of that: one pixel of the crop is one of the 80 x 100 photograph at half its size."""
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    ramp = np.tile(np.arange(100, dtype=np.uint8), (80, 1))
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "images" / "train" / "a.png")
    Image.fromarray(ramp // 50).save(tmp_path / "masks" / "train" / "a.png")
    config = write_config(tmp_path / "c.yaml", tmp_path, dataset={"root": str(tmp_path), "num_classes": 2, "image_size": [40, 50]},
                          augmentations={"scale_range": [1.0, 1.0], "horizontal_flip": False, "color_jitter": {}, "random_crop": {"size": [16, 20]}})
    dataset = SCRIPT.build_dataset(load_config(config, SCRIPT.DEFAULTS), "train")
    starts = set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        row = dataset[0]["image"][0, 5].int()
        assert dataset[0]["image"].shape == (3, 16, 20) and bool(((row[1:-1].diff() - 2).abs() <= 1).all())
        starts.add(int(row[0]))
    assert len(starts) > 3 and dataset.class_counts.tolist() == [4000, 4000]


# -- errors and processes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    ("dataset.num_classes=2", "3 names for num_classes=2"), ("dataset.val_split=vall", "images/vall"), ("dataset.ignore_label=1", "reduce_zero_label"),
    ("dataset.image_size=[64, 64, 3]", "height, width"), ("augmentations.random_crop.size=8", "random_crop.size=8"),
    ("dataset.normalization.std=[1, 1, 0]", "normalization.std"), ("augmentations.color_jitter.hue=2", "hue"),
    ("model.backbone=resnet19", "resnet18"), ("model.name=unett", "unet"), ("optimizer.lr=0", "optimizer.lr"),
    ("losses.ce=0", "no loss with a weight"), ("losses.class_weights=[1, 2]", "2 numbers for 3 classes"),
    ("losses.class_weights=median", "median_frequency"), ("training.epochs=0", "training.epochs"), ("training.ema=1.5", "moving average"),
    ("checkpointing.mode=min", "better when it is larger"), ("training.early_stopping.metric=val/loss", "better when it is smaller"),
    ("checkpointing.monitor=val/miou", "val/mIoU"), ("scheduler.nam=poly", "scheduler.name"), ("evaluation.stride=0", "evaluation.size"),
    ("training.amp=float8", "bfloat16"), ("scheduler.pct_start=2 scheduler.name=onecycle", "pct_start"),
    ("scheduler.name=onecycle scheduler.warmup_epochs=5", "scheduler.warmup_epochs=5.*pct_start"), ("dataset.num_classes=1", "from 2"), ("dataset.image_size=[]", "height, width"),
])
def test_user_errors_name_the_place(tmp_path, root, change, message):
    config = write_config(tmp_path / "c.yaml", root)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "out", *change.split(" ") if "onecycle" in change else [change])


def test_masks_of_0_and_255_have_one_class(tmp_path):
    """255 meant as a class is unlabelled: without an error the run would score 100 %."""
    for split in ("train", "val"):
        write_split(tmp_path, split, 2, 0)
        for path in (tmp_path / "masks" / split).iterdir():
            Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(ValueError, match="are class 0.*255.*is unlabelled.*write 1"):
        train(write_config(tmp_path / "c.yaml", tmp_path, dataset={"num_classes": 2, "root": str(tmp_path)}), tmp_path / "out")


def test_what_is_rarely_meant_is_told(tmp_path, root):
    """The document's own command, training.epochs=200, with its file, where the schedule has 100 epochs."""
    config = load_config(write_config(tmp_path / "c.yaml", root, scheduler={"max_epochs": 100}), SCRIPT.DEFAULTS, ["training.epochs=200"])
    (absent,), (schedule,) = check_counts(["sky", "ground", "box"], np.array([5, 0, 3]), "255"), SCRIPT.schedule_doubts(config)
    assert "no pixel of the training masks is ground" in absent and "max_epochs=100; the last 100 of 200" in schedule
    config.training.epochs = 100
    assert check_counts(["sky", "ground", "box"], np.array([5, 1, 3]), "255") == SCRIPT.schedule_doubts(config) == []


def test_a_step_that_overflows_in_float16_does_not_count_for_the_schedule(tmp_path, root, monkeypatch):
    original, calls = SCRIPT.compute_loss, []

    def overflow(*args):
        calls.append(1)
        terms = original(*args)
        return {**terms, "total": terms["total"] * (1e38 if len(calls) == 2 else 1)}      # finite, until the scaler multiplies it

    monkeypatch.setattr(SCRIPT, "compute_loss", overflow)
    monkeypatch.setattr(utils.run, "amp_settings", lambda *_: (None, torch.amp.GradScaler("cpu")))
    config = write_config(tmp_path / "c.yaml", root, logging={"log_every_n_steps": 100}, scheduler={"name": "poly"}, training={"epochs": 1})
    train(config, tmp_path / "out")
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    assert (checkpoint["step"], checkpoint["scheduler"]["last_epoch"], len(calls)) == (3, 2, 3)
    assert checkpoint["scaler"]["scale"] == 2.0 ** 15


@pytest.mark.parametrize("flags, computed", [({"avx512_bf16"}, "bfloat16"), ({"avx512f"}, "float32")])
def test_amp_true_is_what_the_processor_computes_in_and_a_run_goes_on_as_it_began(tmp_path, root, monkeypatch, capsys, flags, computed):
    config = write_config(tmp_path / "c.yaml", root, training={"amp": True, "epochs": 1})
    monkeypatch.setattr(utils.device, "_processor_flags", lambda: flags)
    train(config, tmp_path / "out", "--limit-batches", "1")
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    assert checkpoint["amp_dtype"] == f"torch.{computed}" and checkpoint["config"]["training"]["amp"] is True
    monkeypatch.setattr(utils.device, "_processor_flags", lambda: {"avx512_bf16"})
    losses = {}
    for name, more in {"default": [], "float32": ["--amp-dtype", "float32"], "bfloat16": ["--amp-dtype", "bfloat16"]}.items():
        evaluate.main([str(last(tmp_path / "out")), "--device", "cpu", "--num-workers", "0", "--output-dir", str(tmp_path / name), *more])
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["loss"]
    assert losses["default"] == losses[computed] and losses["float32"] != losses["bfloat16"]
    train(config, tmp_path / "out", "--limit-batches", "1", "--resume", "auto", "training.epochs=1")
    assert f", torch.{computed}, seed" in capsys.readouterr().out


def test_evaluation_sees_photographs_as_large_as_training_does(tmp_path, root):
    """A crop of [96, 128] comes out of a photograph that covers this, whichever of its sides is the tight one."""
    config = load_config(write_config(tmp_path / "c.yaml", root), SCRIPT.DEFAULTS, ["dataset.image_size=[96, 128]"])
    assert SCRIPT.evaluation_view(config).size == (96, 128)
    for size, expected in ((80, 80), (0, None)):
        config.evaluation.size = size
        assert SCRIPT.evaluation_view(config).size == expected


def test_a_diverging_run_says_so(tmp_path, root, monkeypatch):
    original = SCRIPT.compute_loss
    monkeypatch.setattr(SCRIPT, "compute_loss", lambda *args: {**(terms := original(*args)), "total": terms["total"] * float("nan")})
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(write_config(tmp_path / "c.yaml", root), tmp_path / "out")


def test_two_processes_train_together_score_like_one_and_resume(root, tmp_path):
    """Two photographs for validation, one in each process."""
    config = write_config(tmp_path / "c.yaml", root, model={"name": "deeplab_v2", "n_blocks": [1, 1, 1, 1], "base_width": 4},
                          training={"epochs": 2, "batch_size": 1, "accumulate_grad_batches": 2, "num_workers": 0, "ema": 0.9},
                          checkpointing={"save_interval": 1})

    run = TinyRun("train_segmentation.py", [str(config), "--device", "cpu"], root)
    run_pair(run, tmp_path / "out")
    together = read_log(tmp_path / "out" / "log" / "log.jsonl")[-1]
    checkpoint = load_checkpoint(last(tmp_path / "out"))
    assert together["split"] == "val" and checkpoint["step"] == 2 and len(checkpoint["rng_others"]) == 1
    model = SCRIPT.load_model(checkpoint, CPU)
    alone = SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "val"))
    for key in ("miou", "overall_accuracy", "fw_iou"):
        assert together[key] == pytest.approx(alone["metrics"][key], abs=1e-12)
    run_pair(run, tmp_path / "again", "--resume", tmp_path / "out" / "model" / "checkpoint_epoch_1.pth")
    assert_same_run(tmp_path / "out", tmp_path / "again")


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPT.parse_args(["--help"])
    assert stopped.value.code == 0 and "--pretrained_path" in capsys.readouterr().out
