"""What only train_upernet_head.py has: its losses and the pyramid neck. Whole runs: tests/test_image_scripts.py."""

import numpy as np
import pytest
import torch

import train_upernet_head as script
from tests.tiny_heads import add_tiny_backbone, score, train, weights, write_data
from utils.image_scripts import score_function
from utils.log import read_log


@pytest.fixture
def data(tmp_path, monkeypatch):
    add_tiny_backbone(monkeypatch)
    return write_data(tmp_path / "pictures")


def test_first_loss_is_that_of_guessing(data, tmp_path):
    """log 3 for each head, the auxiliary one times 0.4; a mean over all pixels instead of the labelled ones would be lower."""
    train(script, data, tmp_path, "--limit-batches", "1", "--epochs", "1")
    first = read_log(tmp_path / "log" / "log.jsonl")[0]
    assert first["ce"] == pytest.approx(np.log(3), abs=0.15) and first["aux"] == pytest.approx(np.log(3), abs=0.15)
    assert first["loss"] == pytest.approx(first["ce"] + 0.4 * first["aux"])


def test_class_weights_of_the_training_set(data, tmp_path):
    """Both terms are means in which each pixel has the weight of its class; the checkpoint keeps the setting."""
    config = script.config_of(script.parse_args(["--num-classes", "3", "--class-weights", "sqrt_median_frequency"]))
    criterion = script.build_criterion(config, np.array([100, 400, 25]))
    assert criterion.class_weights.tolist() == [1.0, 0.5, 2.0]
    torch.manual_seed(0)
    label = torch.randint(-1, 3, (2, 16, 16))
    label[label == -1] = -100
    outputs = {"logits": torch.randn(2, 3, 4, 4), "aux_logits": torch.randn(2, 3, 1, 1)}
    terms = script.compute_loss(criterion, outputs, label, criterion.label_weight(label))
    for name, logits in (("ce", outputs["logits"]), ("aux", outputs["aux_logits"])):
        logits = torch.nn.functional.interpolate(logits, (16, 16), mode="bilinear")
        expected = torch.nn.functional.cross_entropy(logits, label, torch.tensor([1.0, 0.5, 2.0]))
        assert float(terms[name]) == pytest.approx(float(expected), rel=1e-5)
    losses = {}
    for name, more in (("plain", []), ("named", ["--class-weights", "median_frequency"]), ("numbers", ["--class-weights", "1,0,0"])):
        train(script, data, tmp_path / name, "--limit-batches", "1", "--epochs", "1", *more)
        losses[name] = read_log(tmp_path / name / "log" / "log.jsonl")[0]["loss"]
    assert len(set(losses.values())) == 3
    assert weights(tmp_path / "numbers")["config"]["training"]["class_weights"] == "1,0,0"


def test_pyramid_neck_and_batches_of_one(data, tmp_path):
    """The pooling to 1x1 of a batch of one has a single value per channel."""
    more = ["--neck", "pyramid", "--batch-size", "1", "--augment", "windows", "--cache-dir", tmp_path / "cache"]
    train(script, data, tmp_path / "plain", *more)
    train(script, data, tmp_path / "cached", *more, "--cache-features")
    losses = [[record["loss"] for record in read_log(tmp_path / name / "log" / "log.jsonl")] for name in ("plain", "cached")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and np.isfinite(losses).all()
    assert not any(name.startswith("neck.spm") for name in weights(tmp_path / "plain")["model"])
    assert np.isfinite(score(tmp_path / "plain", data / "val")["miou"])
    model = script.load_model(weights(tmp_path / "plain"), torch.device("cpu"))
    seen, original = [], model.scores
    model.scores = lambda image: seen.append(tuple(image.shape)) or original(image)
    score_function(model, torch.device("cpu"), None)(torch.zeros(1, 3, 50, 70))
    assert seen == [(1, 3, 64, 80)]                                    # multiples of the patch are enough without the adapter
