"""The scripts train_*_head.py and train_eomt.py with evaluate.py and predict.py, run whole on tiny pictures and a tiny backbone: they learn,
resume exactly, never touch a frozen backbone, and every reader has the same numbers. What only one of them has: tests/test_SCRIPT.py."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import models.dinov3 as dinov3
import predict
import train_eomt
import train_linear_head
import train_m2f_head
import train_pmt_head
import train_upernet_head
import utils.image_scripts as image_scripts
from tests.tiny_heads import add_tiny_backbone, flags, score, train, val, weights, write_backbone, write_data
from tests.tiny_images import write_classes, write_pictures
from tests.whole_runs import assert_equal, refused, sigterm_in_call
from utils.cli import StopRequested
from utils.log import read_log

ROOT = Path(__file__).resolve().parents[1]
OVERFIT = {"train_m2f_head": ["--epochs", "100", "--lr", "0.003", "--val-interval", "100", "--warmup-epochs", "5", "--clip-grad", "0.1"],
           "train_upernet_head": ["--epochs", "120", "--lr", "0.005", "--val-interval", "120", "--warmup-epochs", "3", "--hidden-dim", "32",
                                  "--dropout", "0"],
           "train_pmt_head": ["--epochs", "150", "--lr", "0.003", "--val-interval", "150", "--clip-grad", "0.1"],
           "train_linear_head": ["--epochs", "120", "--lr", "0.1", "--val-interval", "120", "--dropout", "0"],
           "train_eomt": ["--epochs", "60", "--lr", "0.005", "--val-interval", "60", "--layer-decay", "1", "--clip-grad", "0.1"]}
REACHED = {"train_linear_head": 0.8}               # whose pixels are patches of 16 x 16, smoothly enlarged; the others: 0.95
FROZEN = (train_linear_head, train_m2f_head, train_pmt_head, train_upernet_head)


@pytest.fixture(params=[*FROZEN, train_eomt], ids=lambda module: module.__name__)
def script(request, monkeypatch):
    add_tiny_backbone(monkeypatch)
    return request.param


def scripts(*modules):
    return pytest.mark.parametrize("script", modules, indirect=True, ids=lambda module: module.__name__)


# What is done by utils/image_scripts.py for all of them is tested with one of each kind; what a script, its network or its loss could
# get wrong is tested with every one, and so is the whole way in test_every_reader_agrees.
frozen, one_frozen, two = scripts(*FROZEN), scripts(train_linear_head), scripts(train_linear_head, train_eomt)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def backbone_file(tmp_path):
    return write_backbone(tmp_path / "tiny.pth")


def assert_same_run(first, second):
    for section in ("model", "optimizer"):
        assert_equal(first[section], second[section], section)
    assert (first["epoch"], first["step"], first["best"]) == (second["epoch"], second["step"], second["best"])


def sigterm_in_step(patch, step):
    sigterm_in_call(patch, torch.optim.AdamW, "step", step)


def sha(state):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(state.items()))).hexdigest()


# slow: half a minute to three minutes each
@pytest.mark.parametrize("script", [train_linear_head, train_eomt, *(pytest.param(module, marks=pytest.mark.slow) for module in FROZEN[1:])],
                         indirect=True, ids=lambda module: module.__name__)
def test_overfits_four_pictures(script, tmp_path):
    folder = write_pictures(tmp_path / "data", 4)
    write_classes(folder / "classes.json")
    paths = ["--image-paths", f"{folder}/images", "--mask-paths", f"{folder}/masks", "--val-image-paths", f"{folder}/images",
             "--val-mask-paths", f"{folder}/masks", "--classes", f"{folder}/classes.json"]
    result = train(script, folder, tmp_path / "out", *OVERFIT[script.__name__], *paths, "--validate", "--batch-size", "4", "--augment", "windows")
    assert result["miou"] > REACHED.get(script.__name__, 0.95)


def test_every_reader_agrees(script, data, tmp_path, capsys):
    out = tmp_path / "run"
    result = train(script, data, out, *val(data), "--eval-size", "0", "--test-image-paths", f"{data}/test/images", "--test-mask-paths",
                   f"{data}/test/masks", "--save-interval", "1")
    names = ["model_best.pth", "model_last.pth", "checkpoint_epoch_1.pth", "checkpoint_epoch_2.pth"]
    assert [name for name in names if not (out / "model" / name).is_file()] == []
    last = str(out / "model" / "model_last.pth")
    again = script.main(["--resume", last, "--test-only", "--device", "cpu", "--num-workers", "0"])
    assert again != {} and "test split" in capsys.readouterr().out
    scored = evaluate.main([last, "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / "scores"), "--batch-size", "3"])
    assert scored["miou"] == pytest.approx(result["miou"], abs=1e-9)
    assert score(out, data / "test")["miou"] == pytest.approx(again["miou"], abs=1e-9)
    report = (tmp_path / "scores" / "report.html").read_text()
    assert "random weights" in report and "None" not in report

    labels = predict.main([last, f"{data}/val/images", "--output", str(tmp_path / "pred"), "--device", "cpu",
                           *(["--pca"] if script in FROZEN else [])])
    matrix = np.zeros((3, 3), int)
    for path, label in labels.items():
        written = np.array(Image.open(tmp_path / "pred" / f"{Path(path).stem}.png"))
        assert (written == label).all() and written.shape == (70, 93)
        truth = np.array(Image.open(f"{data}/val/masks/{Path(path).name}"))
        np.add.at(matrix, (truth[truth != 255], label[truth != 255]), 1)
    iou = np.diag(matrix) / np.maximum(matrix.sum(0) + matrix.sum(1) - np.diag(matrix), 1)
    assert np.mean(iou[matrix.sum(0) + matrix.sum(1) > 0]) == pytest.approx(scored["miou"], abs=1e-9)
    with pytest.raises(ValueError, match="--html"):
        predict.main([last, f"{data}/val/images", "--output", str(tmp_path / "pred"), "--device", "cpu", "--html"])


@frozen
def test_backbone_is_untouched_and_in_no_checkpoint(script, data, tmp_path, backbone_file, monkeypatch):
    loaded = []
    original = image_scripts.load_backbone
    monkeypatch.setattr(image_scripts, "load_backbone", lambda *args: loaded.append(original(*args)) or loaded[-1])
    before = sha(torch.load(backbone_file, weights_only=True))
    train(script, data, tmp_path / "run", "--backbone-weights", backbone_file)
    vit = loaded[0][0].vit
    assert sha(vit.state_dict()) == before and all(p.grad is None and not p.requires_grad for p in vit.parameters())
    checkpoint = weights(tmp_path / "run")
    assert not any("backbone" in name for name in checkpoint["model"]) and not checkpoint["model"].keys() & vit.state_dict().keys()
    assert checkpoint["encoder"]["file"] == backbone_file
    model = script.load_model(checkpoint, torch.device("cpu"))
    in_optimizer = sum(len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
    assert in_optimizer == len(list(model.parameters())) and sha(model.backbone.vit.state_dict()) == before
    assert not model.backbone.vit.training and not model.train().backbone.vit.training

    state = torch.load(backbone_file, weights_only=True)
    state["norm.weight"][0] += 1e-3
    torch.save(state, backbone_file)
    with pytest.raises(ValueError, match="sha256"):
        script.load_model(weights(tmp_path / "run"), torch.device("cpu"))
    Path(backbone_file).unlink()
    with pytest.raises(ValueError, match="not stored in checkpoints"):
        score(tmp_path / "run", data / "val")


@pytest.mark.parametrize("script, step", [(train_linear_head, 1), (train_eomt, 5), *((module, 3) for module in (*FROZEN, train_eomt))],
                         indirect=["script"])
def test_resume_is_exact_wherever_it_stopped(script, data, tmp_path, monkeypatch, step):
    train(script, data, tmp_path / "whole", *val(data))
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, step)
        with pytest.raises(StopRequested, match="resume auto"):
            train(script, data, tmp_path / "cut", *val(data))
    assert weights(tmp_path / "cut")["step"] == step
    train(script, data, tmp_path / "cut", *val(data), "--resume", "auto")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    whole, cut = (read_log(tmp_path / name / "log" / "log.jsonl") for name in ("whole", "cut"))
    assert [record["loss"] for record in whole] == pytest.approx([record["loss"] for record in cut], rel=1e-6)


@two
def test_resume_is_exact_with_workers_and_accumulation(script, data, tmp_path, monkeypatch):
    more = ["--num-workers", "2", "--accumulate", "2", "--batch-size", "1"]
    train(script, data, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        sigterm_in_step(patch, 4)
        with pytest.raises(StopRequested):
            train(script, data, tmp_path / "cut", *more)
    train(script, data, tmp_path / "cut", *more, "--resume", tmp_path / "cut" / "model" / "model_last.pth")
    assert_same_run(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@scripts(train_linear_head, train_m2f_head)
def test_cached_features_give_the_same_loss_curve(script, data, tmp_path, capsys):
    losses = []
    for name, more in (("plain", []), ("cached", ["--cache-features"]), ("again", ["--cache-features"])):
        train(script, data, tmp_path / name, "--augment", "windows", "--cache-dir", tmp_path / "cache", *more)
        losses.append([record["loss"] for record in read_log(tmp_path / name / "log" / "log.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == losses[1]
    printed = capsys.readouterr().out
    assert "embedded into" in printed and "read from" in printed


@two
def test_validation_images_can_be_held_out(script, data, tmp_path, capsys):
    result = train(script, data, tmp_path, "--validate", "--val-share", "0.34", "--epochs", "1")
    assert "4 training and 2 validation" in capsys.readouterr().out and np.isfinite(result["miou"])


@two
def test_test_time_augmentation_and_whole_images_run(script, data, tmp_path):
    train(script, data, tmp_path, "--epochs", "1")
    for more in (["evaluation.tta=true"], ["evaluation.eval_mode=whole"], ["evaluation.eval_size=96", "evaluation.eval_stride=40"]):
        assert np.isfinite(score(tmp_path, data / "val", "--limit-batches", "1", *more)["miou"])


@two
def test_random_weights_are_announced_and_no_weights_refused(script, data, tmp_path, capsys):
    train(script, data, tmp_path, "--epochs", "1", "--limit-batches", "1")
    printed = capsys.readouterr().out
    assert "randomly initialised (seed 0), as --backbone-weights random asks for" in printed and "no weights" not in printed
    command = flags(script, data, tmp_path / "b")
    at = command.index("--backbone-weights")
    with pytest.raises(ValueError, match="--backbone-weights is missing"):
        script.main(command[:at] + command[at + 2:])


@two
@pytest.mark.parametrize("more, message", [
    (["--image-size", "72"], "--image-size 72: must be a multiple"),
    (["--cache-features"], "--cache-features"),
    (["--mask-paths", "nowhere/*.png"], "--mask-paths"),
    (["--num-classes", "4"], "4"),
    (["--epochs", "0"], "--epochs"),
    (["--lr", "0"], "--lr"), (["--lr", "nan"], "--lr"),
    (["--eval-stride", "0"], "--eval-stride"), (["--eval-stride", "70"], "--eval-stride"), (["--eval-size", "-5"], "--eval-size"),
    (["--ignore-label", "1"], "--ignore-label 1 is one of the 3 classes"),
    (["--backbone", "vits17"], "vits16"),
    (["--val-image-paths", "x"], "--val-mask-paths"),
    (["--test-only"], "--test-only needs"),
])
def test_user_errors_name_the_place(script, data, tmp_path, more, message, capsys):
    if "--val-image-paths" in more:
        more = [*more, "--validate"]
    with refused(capsys, message):
        train(script, data, tmp_path, *more)


@two
def test_resume_of_another_run_is_refused(script, data, tmp_path):
    train(script, data, tmp_path, "--epochs", "1")
    for more, message in ((["--lr", "0.5"], "training.lr"), (["--seed", "1"], "--seed 1"), (["--epochs", "3"], "epochs"),
                          (["--augment", "windows"], "data.augment")):
        with pytest.raises(ValueError, match=message):
            train(script, data, tmp_path, "--epochs", "1", *more, "--resume", "auto")


@two
def test_a_diverging_run_says_so(script, data, tmp_path, monkeypatch):
    original = script.compute_loss

    def broken(*args):
        terms = original(*args)
        return {**terms, "total": terms["total"] * float("nan")}

    monkeypatch.setattr(script, "compute_loss", broken)
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(script, data, tmp_path)


def test_a_misspelt_flag_is_named(script, data, tmp_path, capsys):
    with refused(capsys, "--image-paths"):
        train(script, data, tmp_path, "--image-pats", "x")


@two
def test_the_best_checkpoint_is_that_of_the_highest_miou(script, data, tmp_path, monkeypatch):
    original, scores = script.evaluate, iter([0.2, 0.6, 0.4])

    def scripted(*args, **kwargs):
        result = original(*args, **kwargs)
        return {**result, "loss": -1.0, "metrics": {**result["metrics"], "miou": next(scores), "overall_accuracy": 0.5}}

    monkeypatch.setattr(script, "evaluate", scripted)
    result = train(script, data, tmp_path, *val(data), "--epochs", "3", "--limit-batches", "1")
    assert result["best_epoch"] == 2 == weights(tmp_path, "model_best.pth")["epoch"] and result["best"] == 0.6


def test_an_odd_number_of_pictures_and_bfloat16(script, data, tmp_path):
    write_pictures(tmp_path / "odd", 5)
    train(script, tmp_path / "odd" / "..", tmp_path / "run", "--image-paths", f"{tmp_path}/odd/images", "--mask-paths", f"{tmp_path}/odd/masks",
          "--classes", f"{data}/classes.json", "--epochs", "1", "--amp-dtype", "bfloat16")
    checkpoint = weights(tmp_path / "run")
    assert checkpoint["step"] == 3 and all(value.dtype != torch.bfloat16 for value in checkpoint["model"].values())


def test_any_size_is_padded_and_cropped_exactly(script, data, tmp_path):
    train(script, data, tmp_path, "--epochs", "1", "--limit-batches", "1")
    model = script.load_model(weights(tmp_path), torch.device("cpu"))
    scores, image = image_scripts.score_function(model, torch.device("cpu"), None), torch.randn(2, 3, 70, 93)
    padded = torch.zeros(2, 3, *(-(-side // model.multiple) * model.multiple for side in (70, 93)))
    assert padded.shape[2:] == (96, 96) or model.multiple == 16
    padded[..., :70, :93] = image
    with torch.no_grad():
        assert torch.equal(scores(image), model.scores(padded)[..., :70, :93])


@two
def test_masks_that_count_from_one(script, data, tmp_path):
    """0 is unlabelled, k is class k - 1: in training, in the score and in the files that are written."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for path in sorted((data / "train" / "masks").iterdir())[:2]:
        label = np.array(Image.open(path)).astype(int)
        shifted = np.where(label == 255, 0, label + 1)
        Image.fromarray(shifted.astype(np.uint8)).save(tmp_path / "masks" / path.name)
        Image.open(data / "train" / "images" / path.name).save(tmp_path / "images" / path.name)
    paths = ["--image-paths", f"{tmp_path}/images", "--mask-paths", f"{tmp_path}/masks", "--reduce-zero-label", "--epochs", "1"]
    train(script, data, tmp_path / "run", *paths)
    result = predict.main([f"{tmp_path}/run/model/model_last.pth", f"{tmp_path}/images", "--output", str(tmp_path / "out"), "--device", "cpu"])
    for path, label in result.items():
        assert (np.array(Image.open(tmp_path / "out" / f"{Path(path).stem}.png")) == label + 1).all()
        assert label.shape == Image.open(tmp_path / "masks" / Path(path).name).size[::-1]
    assert np.isfinite(score(tmp_path / "run", tmp_path)["miou"])
    record = json.loads((tmp_path / "run" / "scores" / "metrics.json").read_text())
    assert np.sum(record["confusion_matrix"]) == sum((np.array(Image.open(p)) > 0).sum() for p in (tmp_path / "masks").iterdir())


@two
def test_test_only_takes_exactly_the_flags_that_are_given(script, data, tmp_path, capsys):
    out = tmp_path / "run"
    train(script, data, out, *val(data), "--epochs", "1", "--eval-size", "96", "--test-image-paths", f"{data}/test/images", "--test-mask-paths",
          f"{data}/test/masks")
    seen = []
    original = image_scripts.evaluate_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_scripts, "evaluate_images", lambda *args: seen.append((args[4], len(args[2]))) or original(*args))
        common = ["--resume", str(out / "model" / "model_last.pth"), "--test-only", "--device", "cpu", "--num-workers", "0"]
        script.main(common)
        script.main([*common, "--eval-size", "0", "--eval-mode", "slide"])
        script.main([*common, "--tta", *val(data)[1:], "--limit-batches", "1"])
    assert [view.size for view, _ in seen] == [96, None, 96] and seen[2][0].flip and len(seen[2][0].scales) == 5
    printed = capsys.readouterr().out
    assert printed.count("on the test split") == 2 and printed.count("on the val split") == 1
    for more, message in ((["--backbone", "vitb16"], "--backbone"), (["--normalization", "sat493m"], "--normalization")):
        with pytest.raises(ValueError, match=message):
            script.main([*common, *more])
    with pytest.raises(ValueError, match="no checkpoint in"):
        script.main(["--resume", "auto", "--test-only", "--device", "cpu", "--output-dir", str(tmp_path / "empty")])


@two
def test_validation_can_be_asked_for_when_testing(script, data, tmp_path, capsys):
    """--validate holds out a tenth of the training images, as it does in training; and data are looked at before a network is loaded."""
    train(script, data, tmp_path, "--epochs", "1", "--limit-batches", "1")
    last = ["--resume", str(tmp_path / "model" / "model_last.pth"), "--test-only", "--device", "cpu", "--num-workers", "0"]
    with pytest.raises(ValueError, match="--val-share 0.1 leaves no validation image of 6"):
        script.main([*last, "--validate"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_model", None)
        with pytest.raises((ValueError, OSError), match="nowhere"):
            script.main([*last, "--val-image-paths", "/nowhere/*.png", "--val-mask-paths", "/nowhere/*.png"])


@two
def test_without_a_validation_split_nothing_is_scored(script, data, tmp_path):
    train(script, data, tmp_path, "--epochs", "1", "--limit-batches", "1")
    last = str(tmp_path / "model" / "model_last.pth")
    for call in (lambda: script.main(["--resume", last, "--test-only", "--device", "cpu"]), lambda: evaluate.main([last, "--device", "cpu"])):
        with pytest.raises(ValueError, match="no validation split"):
            call()
    with pytest.raises(ValueError, match="--label-dir is needed"):
        evaluate.main([last, "--data-dir", f"{data}/val/images", "--device", "cpu"])


@frozen
def test_dinov2_with_its_patches_of_14(script, data, tmp_path, monkeypatch):
    config = dinov3.ViTConfig(32, 4, 2, "mlp", 64, taps=(0, 1, 2, 3), **dinov3._V2)
    monkeypatch.setitem(dinov3.BACKBONES, "dinov2_tiny", config._replace(pos_grid=4))
    train(script, data, tmp_path, "--backbone", "dinov2_tiny", "--image-size", "224", "--epochs", "1", "--limit-batches", "1", "--batch-size", "1")
    assert np.isfinite(score(tmp_path, data / "val", "--limit-batches", "1")["miou"])
