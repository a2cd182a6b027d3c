"""train_prototype.py with evaluate.py and predict.py, run whole on tiny pictures: every phase trains what it should and nothing else, it resumes
exactly wherever it is stopped, and the pushed prototypes are patches of the photographs they name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import export
import predict
import train_prototype as script
from data import cityscapes
from models.prototype_push import NearestPatches, PushTable
from tests.tiny_images import write_classes, write_pictures
from tests.tiny_runs import TinyRun, run_pair
from tests.whole_runs import assert_equal, sigterm_in_call
from utils import prototype_scripts
from utils.checkpoint import load_checkpoint
from utils.cli import StopRequested
from utils.config import load_config
from utils.config_file import write_yaml
from utils.image_inference import build_normalizer
from utils.log import read_log
from utils.prototype_losses import resize_label
from utils.prototype_scripts import STAGES
from utils.seed import seed_everything
from utils.training import Totals

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """images/SPLIT and masks/SPLIT; the third class is in every picture."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count, first in (("train", 6, 0), ("val", 2, 100), ("test", 2, 200)):
        folder = write_pictures(root / split, count, first, size=(48, 64) if split == "train" else (50, 61))
        for kind in ("images", "masks"):
            (root / kind).mkdir(exist_ok=True)
            (folder / kind).rename(root / kind / split)
        folder.rmdir()
    write_classes(root / "classes.json")
    return root


def write_config(data, folder):
    write_yaml({"dataset": {"root": str(data), "window_size": [41, 49], "cache_dir": str(data / "cache")},
                "model": {"num_classes": 3, "prototype_shape": [12, 8, 1, 1], "weights": "random", "n_blocks": [1, 1, 1, 1], "base_width": 8,
                          "freeze_bn": False},
                "training": {"steps": [6, 12, 6], "accumulate": 2, "prune": True, "prune_neighbors": 3, "prune_threshold": 1},
                "optimizer": {"backbone_lr": 3e-3, "aspp_lr": 3e-3, "prototype_lr": 3e-3, "last_layer_lr": 3e-3, "finetune_lr": 3e-3},
                "evaluation": {"interval": 6}, "logging": {"log_interval": 1, "tensorboard": False}}, folder / "config.yaml")
    return str(folder / "config.yaml")


@pytest.fixture
def config(data, tmp_path):
    return write_config(data, tmp_path)


def train(config, output, *more):
    return script.main([config, "--device", "cpu", "--num-workers", "0", "--output-dir", str(output), *map(str, more)])


def checkpoint(output, name="model_last"):
    return load_checkpoint(Path(output) / "model" / f"{name}.pth")


def changed(first, second):
    return {name for name in first["model"] if not torch.equal(first["model"][name], second["model"][name])}


def start(config, *overrides):
    """The network before the first step, as a checkpoint's entry."""
    seed_everything(0)
    return {"model": {name: value.clone() for name, value in script.build_model(load_config(config, script.DEFAULTS, overrides)).state_dict().items()}}


# -- what each phase changes ---------------------------------------------------

def parts(names):
    """features.base.layer2.block1.reduce.bn.weight -> what the table of phases calls it."""
    found = set()
    for name in names:
        kind = name.split(".")[-1]
        found.add("aspp" if ".aspp." in name else name if not name.startswith("features.") else
                  "statistics" if kind.startswith(("running", "num")) else "norm" if ".bn." in name else "backbone")
    return found


@pytest.mark.parametrize("freeze_bn, last_layer, expected", [
    (True, "[false,false,true]", [{"aspp", "prototype_vectors"}, {"aspp", "prototype_vectors", "backbone"}, {"last_layer.weight"}]),
    (False, "[true,true,true]", [{"aspp", "prototype_vectors", "last_layer.weight"},
                                 {"aspp", "prototype_vectors", "backbone", "norm", "statistics", "last_layer.weight"}, {"last_layer.weight"}])])
def test_each_phase_trains_exactly_its_parameters(config, tmp_path, freeze_bn, last_layer, expected):
    settings = [f"model.freeze_bn={str(freeze_bn).lower()}", f"training.train_last_layer={last_layer}", "training.prune=false"]
    train(config, tmp_path / "run", *settings)
    stages = [start(config, *settings), *(checkpoint(tmp_path / "run", name) for name in ("warmup", "joint"))]
    for before, after, names in zip(stages, stages[1:], expected, strict=False):
        assert parts(changed(before, after)) == names
    assert parts(changed(checkpoint(tmp_path / "run", "push"), checkpoint(tmp_path / "run", "finetune"))) == expected[2]


def test_push_moves_prototypes_onto_features_and_fine_tuning_leaves_them_there(config, tmp_path):
    train(config, tmp_path / "run", "training.prune=false")
    pushed, last = checkpoint(tmp_path / "run", "push"), checkpoint(tmp_path / "run")
    assert torch.equal(pushed["model"]["prototype_vectors"], last["model"]["prototype_vectors"])
    model = script.load_model(last, torch.device("cpu"))
    normalize = model.normalize
    for vector, entry in zip(model.prototype_vectors, model.provenance, strict=True):
        photo = np.asarray(Image.open(entry["image"]))                      # the file itself: no crop, no scale, not mirrored
        label = np.asarray(Image.open(entry["image"].replace("images", "masks")))
        assert entry["pushed"] and tuple(entry["size"]) == label.shape
        with torch.no_grad():
            features = model.features_of(normalize(torch.tensor(photo).permute(2, 0, 1)[None]))          # (1, D, h, w)
        y, x = entry["cell"]
        assert torch.allclose(features[0, :, y, x], vector[:, 0, 0], atol=1e-6)
        assert model.similarity(model.prototype_distances(features))[0, :, y, x].max() > 9.0
        y0, x0, y1, x1 = entry["cell_box"]
        assert (label[y0:y1, x0:x1] == entry["class"]).any()
    listed = json.loads((tmp_path / "run" / "prototypes" / "prototypes.json").read_text())
    assert listed == model.provenance


def test_pruning_slices_everything_alike(config, tmp_path):
    train(config, tmp_path / "run", "training.prune_neighbors=2", "training.prune_threshold=2")
    before, after = checkpoint(tmp_path / "run", "finetune"), checkpoint(tmp_path / "run", "prune")
    kept = [index for entry in after["prototypes"] for index, old in enumerate(before["prototypes"]) if entry == old]
    assert 0 < len(kept) == len(after["prototypes"]) <= len(before["prototypes"])
    for name in ("prototype_vectors", "class_identity", "ones"):
        assert torch.equal(before["model"][name][kept], after["model"][name])
    assert torch.equal(before["model"]["last_layer.weight"][:, kept], after["model"]["last_layer.weight"])
    again = script.load_model(after, torch.device("cpu"))
    assert [entry["class"] for entry in again.provenance] == again.class_identity.argmax(1).tolist()


# -- schedule and accumulation -------------------------------------------------

def test_schedule_is_in_updates_and_only_in_the_joint_phase(config, tmp_path, monkeypatch):
    rates = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: rates.append([g["lr"] for g in self.param_groups]) or original(self, *a, **k))
    train(config, tmp_path / "run", "training.prune=false", "optimizer.backbone_lr=0.001")
    assert len(rates) == 3 + 6 + 3                                                       # updates of two micro-steps
    assert all(rate == pytest.approx(3e-3) for update in (*rates[:3], *rates[9:]) for rate in update)
    for k, update in enumerate(rates[3:9]):
        factor = (1 - k / 6) ** 0.9
        assert update[0] == pytest.approx(1e-3 * factor) and update[-1] == pytest.approx(3e-3 * factor)


def test_an_update_is_the_mean_of_its_micro_losses(config, tmp_path, monkeypatch):
    """Not the loss of the pooled images: their labelled cells differ in number. And the next update starts from nothing."""
    settings = load_config(config, script.DEFAULTS, ["training.accumulate=5", "model.freeze_bn=true"])
    torch.manual_seed(0)
    model, criterion, normalize = script.build_model(settings), script.MaskedCrossEntropyLoss(), build_normalizer(settings.dataset.mean, settings.dataset.std)
    groups = script.start_stage("warmup", model, settings, 2)[0].param_groups
    script.set_train_mode(model, "warmup", settings)
    images, labels = torch.randint(0, 256, (5, 3, 33, 33), dtype=torch.uint8), torch.randint(0, 3, (5, 33, 33))
    for k, label in enumerate(labels):
        label[:6 * k] = -100
    losses = [script.compute_loss(criterion, model, model(normalize(x[None])), y[None], settings)["total"] for x, y in zip(images, labels, strict=True)]
    trained = [p for group in groups for p in group["params"]]
    wanted, seen = torch.autograd.grad(sum(losses) / 5, trained), []
    pooled = torch.autograd.grad(script.compute_loss(criterion, model, model(normalize(images)), labels, settings)["total"], trained)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: seen.append([p.grad.clone() for p in trained]))
    batches = 2 * [{"image": x[None], "label": y[None]} for x, y in zip(images, labels, strict=True)]
    run = script.Run(script.parse_args([str(config), "--device", "cpu", "--output-dir", str(tmp_path)]), "train_prototype.py", script.DEFAULTS)
    model.normalize, run.model, run.log_interval, run.totals = normalize, model, 100, Totals(3)
    run.log = SimpleNamespace(still_running=lambda step: None)
    run.optimizer, run.scheduler = torch.optim.SGD(groups, lr=1.0), SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0])
    monkeypatch.setattr(script, "stage_batches", lambda job, end: iter(batches))
    job = SimpleNamespace(run=run, config=settings, model=model, criterion=criterion, progress=script.Progress())
    assert script.train_until(job, "warmup", model, 10)
    assert (job.progress.done, run.step, len(seen)) == (10, 2, 2)
    assert run.totals.means()["total"] == pytest.approx(float(sum(losses).detach() / 5), rel=1e-5)
    for gradients in zip(wanted, *seen, pooled, strict=True):
        assert all(torch.allclose(gradients[0], other, atol=1e-6) for other in gradients[1:3])
    assert not torch.allclose(wanted[-1], pooled[-1], atol=1e-4)


def test_class_weights_of_the_cells(config):
    """Cross entropy is a mean in which each cell has the weight of its class; the other terms do not change."""
    torch.manual_seed(0)
    settings = load_config(config, script.DEFAULTS, ["loss.class_weights=sqrt_median_frequency"])
    model = script.build_model(settings).eval()
    criterion = script.build_criterion(settings, np.array([100, 400, 25]))
    label = torch.randint(0, 3, (2, 33, 33))
    label[:, :20] = 2
    logits, _ = outputs = model(torch.randn(2, 3, 33, 33))
    terms = script.compute_loss(criterion, model, outputs, label, settings)
    expected = F.cross_entropy(logits.flatten(0, 2), resize_label(label, logits.shape[1:3]).flatten(), torch.tensor([1.0, 0.5, 2.0]))
    assert float(terms["ce"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    plain = script.compute_loss(script.MaskedCrossEntropyLoss(), model, outputs, label, settings)
    assert float((plain["ce"] - terms["ce"]).detach()) != 0 and torch.equal(plain["kld"], terms["kld"]) and torch.equal(plain["l1"], terms["l1"])


def test_training_accuracy_is_of_the_labelled_cells_of_every_micro_step(whole, data, monkeypatch, tmp_path):
    """The logged numbers, from what the network said of each micro-batch; at several scales, from the largest grid."""
    from sklearn.metrics import confusion_matrix

    seen, original = [], script.compute_loss

    def spy(criterion, model, outputs, label, config):
        logits = outputs[-1][0]
        seen.append((resize_label(label, logits.shape[1:3]).flatten(), logits.argmax(-1).flatten()))
        return original(criterion, model, outputs, label, config)
    monkeypatch.setattr(script, "compute_loss", spy)
    train(whole[0], tmp_path / "run", "training.steps=[4,0,0]", "evaluation.interval=2", "training.prune=false", "model.scales=[0.5]", "--phase", 0)
    records = [record for record in read_log(tmp_path / "run" / "log" / "log.jsonl") if record["split"] == "train"]
    assert len(records) == 2 and len(seen) == 4
    for record, micro in zip(records, (seen[:2], seen[2:]), strict=True):
        label, pred = (torch.cat(parts) for parts in zip(*micro, strict=True))
        matrix = confusion_matrix(label[label >= 0], pred[label >= 0], labels=range(3))
        union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        assert record["overall_accuracy"] == pytest.approx(np.diag(matrix).sum() / matrix.sum())
        assert record["miou"] == pytest.approx((np.diag(matrix)[union > 0] / union[union > 0]).mean())
    text = (tmp_path / "run" / "log" / "train.log").read_text()
    assert f"Train mIoU: {records[-1]['miou']:.4f}, Train Acc: {records[-1]['overall_accuracy']:.4f}" in text


def test_masks_of_one_class_are_refused(data, config, tmp_path):
    root = tmp_path / "binary"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("cache"))
    for mask in root.glob("masks/*/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(mask)) == 1, 255, 0).astype(np.uint8)).save(mask)
    binary = [f"dataset.root={root}", "model.num_classes=2", "model.prototype_shape=[4,8,1,1]", "dataset.classes=null"]
    (root / "classes.json").unlink()
    with pytest.raises(ValueError, match="all labelled pixels of the training masks are class 0, .*label_map"):
        train(config, tmp_path / "run", *binary)
    assert not (tmp_path / "run").exists()
    result = train(config, tmp_path / "run", *binary, "dataset.label_map=0:0,255:1", "training.steps=[2,0,0]", "evaluation.interval=2", "--phase", 0)
    assert 0 <= result["miou"] < 1


def test_loss_terms(config):
    settings = load_config(config, script.DEFAULTS)
    torch.manual_seed(0)
    model, criterion = script.build_model(settings), script.MaskedCrossEntropyLoss()
    model.eval()
    image, label = torch.randn(2, 3, 33, 33), torch.randint(0, 3, (2, 33, 33))
    terms = script.compute_loss(criterion, model, model(image), label, settings)
    assert float(terms["l1"]) == pytest.approx(0.5 * 12 * 2)
    assert float(terms["total"]) == pytest.approx(float(terms["ce"] + 0.25 * terms["kld"] + 1e-4 * terms["l1"]), rel=1e-6)
    settings.loss.kld_labels = "published"
    assert abs(float(script.compute_loss(criterion, model, model(image), label, settings)["kld"] - terms["kld"])) > 1e-6
    settings.loss.kld_labels = "correct"
    void = script.compute_loss(criterion, model, model(image), torch.full_like(label, -100), settings)
    assert float(void["ce"]) == float(void["kld"]) == 0 and torch.isfinite(void["total"])
    void["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_an_unusual_folder(config, data, tmp_path, capsys):
    """One prototype a class, one image a batch, a class that never occurs, crops larger than the pictures, several scales of odd sizes."""
    for split, count in (("train", 3), ("val", 1)):
        folder = write_pictures(tmp_path / "made", count, size=(33, 47))
        for mask in (folder / "masks").iterdir():
            label = np.array(Image.open(mask))
            Image.fromarray(np.where(label == 2, 1, label).astype(np.uint8)).save(mask)                  # no box anywhere
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind).rename(tmp_path / "data" / kind / split)
    settings = [f"dataset.root={tmp_path / 'data'}", "dataset.window_size=[65,81]", "model.prototype_shape=[3,8,1,1]", "model.scales=[0.5,0.75]",
                "training.steps=[2,4,2]", "training.batch_size=1", "training.accumulate=1", "evaluation.interval=4"]
    assert np.isfinite(train(config, tmp_path / "run", *settings)["miou"])
    output = capsys.readouterr().out
    assert "class 2 never occurs in the push set" in output and "no prototype is left of class 2" in output
    pushed, untouched = checkpoint(tmp_path / "run", "push"), checkpoint(tmp_path / "run", "joint")
    assert [entry["pushed"] for entry in pushed["prototypes"]] == [True, True, False]
    assert torch.equal(pushed["model"]["prototype_vectors"][2], untouched["model"]["prototype_vectors"][2])
    photo = sorted((tmp_path / "data" / "images" / "val").iterdir())[0]
    for name in ("warmup", "push", "refinetune"):                           # not pushed, pushed, pruned
        path = str(tmp_path / "run" / "model" / f"{name}.pth")
        assert np.isfinite(evaluate.main([path, "--device", "cpu", "--output-dir", str(tmp_path / name)])["miou"])
        predict.main([path, str(photo), "--output", str(tmp_path / name), "--device", "cpu", "--explain", "46,32"])
        sources = [part["source"] for part in json.loads((tmp_path / name / f"{photo.stem}_explain.json").read_text())["pixels"][0]["prototypes"]]
        assert [source and source["pushed"] for source in sources].count(True) == {"warmup": 0, "push": 2, "refinetune": 2}[name]


def test_cityscapes_end_to_end(config, tmp_path):
    """From its folders and label ids to label ids in the predictions."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, ending, shape in (("leftImg8bit", "leftImg8bit", (32, 48, 3)), ("gtFine", "gtFine_labelIds", (32, 48))):
            folder = tmp_path / "data" / kind / split / "ulm"
            folder.mkdir(parents=True)
            picture = rng.integers(0, 256, shape) if kind == "leftImg8bit" else rng.choice([0, 7, 26, 33], shape)
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"ulm_000000_000019_{ending}.png")
    train(config, tmp_path / "run", "dataset.name=cityscapes", f"dataset.root={tmp_path / 'data'}", "model.num_classes=19", "training.prune=false",
          "model.prototype_shape=[19,8,1,1]", "training.steps=[0,2,0]")
    last = checkpoint(tmp_path / "run")
    assert {entry["class"] for entry in last["prototypes"] if entry["pushed"]} <= {0, 13, 18} and last["class_names"][13] == "car"
    photo = next((tmp_path / "data" / "leftImg8bit" / "val" / "ulm").iterdir())
    label = predict.main([str(tmp_path / "run" / "model" / "model_last.pth"), str(photo), "--output", str(tmp_path / "out"), "--device", "cpu"])[str(photo)]
    written = Image.open(tmp_path / "out" / photo.name)
    assert np.array_equal(np.asarray(written), cityscapes.LABEL_IDS[label])
    script, model, _ = evaluate.load(str(tmp_path / "run" / "model" / "model_last.pth"), [], torch.device("cpu"))
    entries = export.metadata_of(model, script.__name__, {})                # an exported network writes the same numbers and colours
    assert entries["mask_values"] == cityscapes.LABEL_IDS.tolist() and np.ravel(entries["palette"]).tolist() == written.getpalette()


# -- resuming ------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """One undisturbed run of all six stages, with its config file."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(data, folder)
    train(path, folder / "run")
    return path, folder / "run"


@pytest.mark.parametrize("owner, method, call", [
    (torch.optim.Adam, "step", 2), (torch.optim.Adam, "step", 5), (PushTable, "update", 3), (torch.optim.Adam, "step", 11), (NearestPatches, "update", 2),
    (torch.optim.Adam, "step", 14)], ids=["warmup", "joint", "push", "finetune", "prune", "refinetune"])
def test_a_run_stopped_anywhere_ends_in_the_same_weights(whole, tmp_path, monkeypatch, owner, method, call):
    path, undisturbed = whole
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, owner, method, call)
        with pytest.raises(StopRequested):
            train(path, tmp_path / "run")
    assert (checkpoint(tmp_path / "run")["batch"] > 0) == (owner is torch.optim.Adam)    # within an epoch: not with other processes
    train(path, tmp_path / "run", "--resume", "auto")
    first, second = checkpoint(undisturbed), checkpoint(tmp_path / "run")
    for section in ("model", "prototypes", "best", "step", "stage"):
        assert_equal(first[section], second[section], section)
    assert read_log(undisturbed / "log" / "log.jsonl")[-1]["miou"] == read_log(tmp_path / "run" / "log" / "log.jsonl")[-1]["miou"]


def test_phases_one_by_one_equal_the_whole_run(whole, tmp_path, monkeypatch):
    path, undisturbed = whole
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="run --phase 0 first"):
        train(path, run, "--phase", 1)
    train(path, run, "--phase", 0)
    monkeypatch.setattr(script, "SCAN_CHUNK", 4)             # a save within a pass over the photographs
    for owner, method, call, more in ((prototype_scripts, "save_checkpoint", 1, []), (PushTable, "update", 6, ["--resume", "auto"])):
        with monkeypatch.context() as patch:                 # killed while it writes joint.pth, and behind that save
            original, calls = getattr(owner, method), []

            def killed(*arguments, original=original, calls=calls, call=call, **more):
                calls.append(1)
                if len(calls) == call:
                    raise KeyboardInterrupt
                return original(*arguments, **more)
            patch.setattr(owner, method, killed)
            with pytest.raises(KeyboardInterrupt):
                train(path, run, "--phase", 1, *more)
    stopped = checkpoint(run)
    assert (STAGES[stopped["stage"]], stopped["done"], len(calls)) == ("push", 4, 6)
    train(path, run, "--phase", 1, "--resume", "auto")
    train(path, run, "--phase", 2)
    assert {f"{stage}.pth" for stage in STAGES} <= {file.name for file in (run / "model").iterdir()}
    assert_equal(checkpoint(undisturbed)["model"], checkpoint(run)["model"])
    log = (run / "log" / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="in joint, phase 1"):
        train(path, run, "--phase", 2, "--resume", run / "model" / "warmup.pth")
    assert (run / "log" / "log.jsonl").read_bytes() == log


def test_a_phase_without_steps_is_no_reason_to_wait(config, tmp_path):
    args = script.parse_args([str(config), "training.steps=[0,12,6]", "--phase", "1", "--output-dir", str(tmp_path)])
    script.read_config(args)
    assert args.resume is None


def test_pruning_can_be_decided_afterwards(whole, tmp_path, monkeypatch):
    path, undisturbed = whole
    train(path, tmp_path / "run", "training.prune=false")
    assert not (tmp_path / "run" / "model" / "prune.pth").exists()
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, NearestPatches, "update", 2)
        with pytest.raises(StopRequested):
            train(path, tmp_path / "run", "--resume", "auto")
    train(path, tmp_path / "run", "--resume", "auto", "training.resume=true")
    assert_equal(checkpoint(undisturbed)["model"], checkpoint(tmp_path / "run")["model"])


def test_resume_refuses_another_run(whole, tmp_path):
    path, undisturbed = whole
    last = undisturbed / "model" / "joint.pth"
    for change, message in ((["--seed", "1"], "--seed 1"), (["optimizer.aspp_lr=1"], "optimizer.aspp_lr"), (["training.steps=[6,12,8]"], "steps")):
        with pytest.raises(ValueError, match=message):
            train(path, tmp_path / "other", "--resume", last, *change)


def test_early_stopping_ends_fine_tuning(config, tmp_path, capsys):
    train(config, tmp_path / "run", "training.steps=[0,6,60]", "training.patience=1", "evaluation.interval=2", "optimizer.finetune_lr=1e-9",
          "training.prune=false")
    assert "the accuracy has not risen" in capsys.readouterr().out
    assert checkpoint(tmp_path / "run", "finetune")["step"] < 3 + 30


# -- scoring, predicting, looking ----------------------------------------------

def test_every_reader_agrees(whole, tmp_path, capsys):
    path, run = whole
    best = run / "model" / "model_last.pth"
    logged = [record for record in read_log(run / "log" / "log.jsonl") if record["split"] == "val"][-1]
    assert train(path, tmp_path / "none", "--resume", best, "--test-only", "evaluation.interpretability=false")["miou"] == logged["miou"]
    scores = evaluate.main([str(best), "--device", "cpu", "--output-dir", str(tmp_path / "scores"), "--split", "val"])
    assert scores["miou"] == logged["miou"]
    record = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert record["prototypes"]["prototypes"] == len(checkpoint(run)["prototypes"])
    output = capsys.readouterr().out
    assert "purity" in output and "stability" in output


def test_a_test_split_that_is_not_named_is_not_scored_as_one(whole, tmp_path):
    with pytest.raises(ValueError, match="no test split"):
        evaluate.main([str(whole[1] / "model" / "model_last.pth"), "--device", "cpu", "--output-dir", str(tmp_path), "--split", "test"])


def test_predictions_and_explanations(whole, data, tmp_path):
    path, run = whole
    photo = sorted((data / "images" / "test").iterdir())[0]
    labels = predict.main([str(run / "model" / "model_last.pth"), str(photo), "--output", str(tmp_path / "out"), "--device", "cpu", "--explain", "5,7", "40,30"])
    assert labels[str(photo)].shape == (50, 61)
    names = {file.name.removeprefix(photo.stem) for file in (tmp_path / "out").iterdir()}
    assert {".png", "_overlay.png", "_prototypes.png", "_explain.json"} <= names
    for entry in json.loads((tmp_path / "out" / f"{photo.stem}_explain.json").read_text())["pixels"]:
        total = sum(part["contribution"] for part in entry["prototypes"]) + entry["other_prototypes"]["contribution"]
        assert total == pytest.approx(entry["logit"], abs=1e-4)
    for change, shown in (([], (50, 61)), (["evaluation.squash=[33,41]"], (33, 41))):               # the distances are those behind the label
        _, model, _ = evaluate.load(str(run / "model" / "model_last.pth"), change, torch.device("cpu"))
        prediction = script.predict(model, photo)
        scores = torch.einsum("cp,phw->chw", model.last_layer.weight.detach(), model.similarity(prediction["distances"]))[None]
        scores = F.interpolate(F.interpolate(scores, shown, mode="bilinear"), (50, 61), mode="bilinear")
        assert (scores[0].argmax(0).numpy() == prediction["label"]).mean() > 0.999
    with pytest.raises(ValueError, match="not on the photograph"):
        predict.main([str(run / "model" / "model_last.pth"), str(photo), "--output", str(tmp_path / "out2"), "--device", "cpu", "--explain", "5,700"])


def test_gallery(whole, tmp_path):
    path, run = whole
    assert (run / "prototypes" / "index.html").is_file()
    train(path, tmp_path / "again", "--resume", run / "model" / "model_last.pth", "--gallery")
    page = (tmp_path / "again" / "prototypes" / "index.html").read_text()
    assert page.count("data:image/jpeg") >= len(checkpoint(run)["prototypes"])
    with pytest.raises(ValueError, match="not pushed yet"):
        train(path, tmp_path / "again", "--resume", run / "model" / "joint.pth", "--gallery")


def test_learns_and_the_labels_matter(config, tmp_path):
    """On new pictures far above one class everywhere (0.2), and above a network for which each picture's classes were exchanged."""
    scores = []
    for turn in (0, 1):
        root = tmp_path / f"data{turn}"
        for split, count, first in (("train", 12, 0), ("val", 4, 100)):
            folder = write_pictures(tmp_path / f"{turn}{split}", count, first, size=(48, 64))
            for k, mask in enumerate(sorted((folder / "masks").iterdir())):
                label = np.array(Image.open(mask))
                changed = np.where(label == 255, 255, (label + turn * k) % 3) if split == "train" else label
                Image.fromarray(changed.astype(np.uint8)).save(mask)
            for kind in ("images", "masks"):
                (root / kind).mkdir(parents=True, exist_ok=True)
                (folder / kind).rename(root / kind / split)
        scores.append(train(config, tmp_path / f"run{turn}", f"dataset.root={root}", "training.steps=[0,160,20]", "evaluation.interval=160",
                            "training.prune=false", "dataset.scale_range=[1.0,1.0]", "optimizer.backbone_lr=0.005", "optimizer.aspp_lr=0.005",
                            "optimizer.prototype_lr=0.01", "optimizer.last_layer_lr=0.01")["miou"])
    assert scores[0] > 0.7 and scores[1] < scores[0] - 0.3, scores


# -- errors --------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (["model.prototype_shape=[13,8,1,1]"], "multiple of"), (["model.num_classes=19", "dataset.name=pascal", "model.prototype_shape=[19,8,1,1]"], "has 21 classes"),
    (["training.steps=[3,12,6]"], r"training.steps\[0\]"), (["loss.class_weights=[1,2]"], "loss.class_weights: 2 numbers for 3"), (["evaluation.interval=5"], "evaluation.interval"), (["training.steps=[6,12]"], "three phases"),
    (["model.n_blocks=[1,1,1]"], "n_blocks"), (["dataset.window_size=[4,4]"], "window_size"), (["optimizer.aspp_lr=0"], "aspp_lr"),
    (["model.weights=null"], "model.weights"), (["model.weights=missing.pth"], "missing.pth"), (["evaluation.squash=[513]"], "squash"),
    (["training.train_last_layer=[true,true,false]"], "the third must be true"), (["training.prune_threshold=4"], "at most training.prune_neighbors=3"),
    (["model.scales=[0]"], r"model\.scales"), (["model.scales=[x]"], r"model\.scales"), (["evaluation.squash=[a,b]"], "squash"), (["dataset.mean=[0.5]"], "red, green and blue"),
    (["evaluation.squash=[33,33]", "evaluation.window=32"], "name one"), (["dataset.train_split=nowhere"], "nowhere"), (["training.prune_treshold=1"], "prune_threshold")])
def test_mistakes_are_one_clear_line(config, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path / "run", *changes)
    assert not (tmp_path / "run").exists()


# -- several processes ---------------------------------------------------------

def test_two_processes_equal_one_with_the_double_batch(config, tmp_path):
    """Training, push and pruning; batch norm is frozen, because it would see other batches."""
    more = ["training.steps=[2,8,4]", "evaluation.interval=4", "model.freeze_bn=true"]
    train(config, tmp_path / "one", "training.batch_size=2", *more)
    run = TinyRun("train_prototype.py", [config, "training.batch_size=1", "--device", "cpu", "--num-workers", "0", *more], tmp_path)
    run_pair(run, tmp_path / "two")
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert [entry["image"] for entry in one["prototypes"]] == [entry["image"] for entry in two["prototypes"]]
    for name, value in one["model"].items():
        # Adam divides by the size of the gradient: where that is nearly 0, another order of sums moves a weight by a share of its rate, 3e-3.
        assert torch.allclose(value.float(), two["model"][name].float(), atol=1e-3), name
    curves = [[record["loss"] for record in read_log(tmp_path / name / "log" / "log.jsonl") if record["split"] == "train"] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
