"""What only train_linear_head.py has: its blocks, its head and its loss. Whole runs: tests/test_image_scripts.py."""

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train_linear_head as script
from models.dinov3 import VisionTransformer
from tests.tiny_heads import add_tiny_backbone, score, train, weights, write_backbone, write_data
from tests.tiny_images import TINY
from utils.image_scripts import score_function
from utils.log import read_log


@pytest.fixture
def data(tmp_path, monkeypatch):
    add_tiny_backbone(monkeypatch)
    return write_data(tmp_path / "pictures")


def test_first_loss_is_that_of_guessing(data, tmp_path):
    """log 3; a mean over all pixels instead of the labelled ones would be lower."""
    train(script, data, tmp_path, "--limit-batches", "1", "--epochs", "1")
    assert read_log(tmp_path / "log" / "log.jsonl")[0]["loss"] == pytest.approx(np.log(3), abs=0.15)


@pytest.mark.parametrize("layers", [1, 4])
def test_the_scores_are_those_of_the_last_blocks_by_hand(data, tmp_path, layers):
    """Final norm, patches alone, batch norm, one matrix, bilinear: worked out without the network."""
    train(script, data, tmp_path, "--layers", layers, "--epochs", "1", "--backbone-weights", write_backbone(tmp_path / "tiny.pth"))
    checkpoint = weights(tmp_path)
    model, head = script.load_model(checkpoint, torch.device("cpu")), checkpoint["model"]
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        vit = VisionTransformer(TINY)
        vit.load_state_dict(torch.load(tmp_path / "tiny.pth", weights_only=True))
        tokens = torch.cat([vit.norm(x)[0, 5:] for x in vit._run(image, list(range(4 - layers, 4)))], 1)        # (12, 32 or 128)
        norm = [head[f"batchnorm_layer.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        tokens = (tokens - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]
        logits = (tokens @ head["conv.weight"].flatten(1).T + head["conv.bias"]).T.reshape(1, 3, 3, 4)
        expected = torch.nn.functional.interpolate(logits, (48, 64), mode="bilinear")
        torch.testing.assert_close(score_function(model, torch.device("cpu"), None)(image), expected, atol=1e-5, rtol=1e-5)
    assert np.isfinite(score(tmp_path, data / "val", "--limit-batches", "1")["miou"])


def test_dropout_is_of_whole_channels_and_of_training_alone():
    model = script.LinearSegmenter(6, 3, dropout=0.5)
    torch.manual_seed(0)
    seen = []
    model.batchnorm_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model([torch.ones(2, 6, 4, 4)])
    model.eval()([torch.ones(2, 6, 4, 4)])
    channels = seen[0].flatten(2)
    assert set(channels.amax(2).flatten().tolist()) == {0.0, 2.0} and torch.equal(channels.amin(2), channels.amax(2))
    assert torch.equal(seen[1], torch.ones(2, 6, 4, 4))


def test_the_cache_holds_what_the_head_reads(data, tmp_path):
    """One map of 32 channels, not the four of the other heads; cached features of one number of layers are not taken for the other's."""
    sizes = {}
    for layers in (1, 4):
        train(script, data, tmp_path / "out", "--layers", layers, "--augment", "windows", "--cache-features", "--cache-dir", tmp_path / "cache")
        for path in (tmp_path / "cache").glob("features_*.npy"):
            sizes.setdefault(path.name, (layers, path.stat().st_size))
    (one, small), (four, large) = sizes.values()
    assert (one, four) == (1, 4) and large - small == pytest.approx(6 * 3 * 32 * 16 * 4, abs=1024)     # views, maps, channels, patches, bytes


def test_a_head_continues_with_other_classes(data, tmp_path, capsys):
    train(script, data, tmp_path / "run", "--epochs", "1")
    more = ["--head-weights", tmp_path / "run" / "model" / "model_last.pth", "--epochs", "1", "--limit-batches", "1", "--lr", "1e-12"]
    (tmp_path / "four.json").write_text('{"classes": ["a", "b", "c", "d"]}')
    train(script, data, tmp_path / "next", *more, "--num-classes", "4", "--classes", tmp_path / "four.json")
    assert "class layer starts anew: 3 classes in the file, 4 here" in capsys.readouterr().out
    first, second = weights(tmp_path / "run")["model"], weights(tmp_path / "next")["model"]
    assert torch.allclose(first["batchnorm_layer.weight"], second["batchnorm_layer.weight"], atol=1e-6)
    with pytest.raises(ValueError, match="conv.weight|batchnorm_layer"):
        train(script, data, tmp_path / "wide", *more, "--layers", "4")


def test_class_weights_of_the_training_set(data, tmp_path):
    """Each pixel has the weight of its class, in the sum and in what divides it."""
    losses = {}
    for name, more in (("plain", []), ("ones", ["--class-weights", "1,1,1"]), ("named", ["--class-weights", "median_frequency"]),
                       ("first", ["--class-weights", "1,0,0"]), ("tenth", ["--class-weights", "0.001,0,0"])):
        train(script, data, tmp_path / name, "--limit-batches", "1", "--epochs", "1", *more)
        losses[name] = read_log(tmp_path / name / "log" / "log.jsonl")[0]["loss"]
    assert losses["plain"] == pytest.approx(losses["ones"], rel=1e-6) and losses["first"] == pytest.approx(losses["tenth"], rel=1e-5)
    assert len({round(loss, 4) for loss in losses.values()}) == 3


def test_features_of_photographs_of_any_size_are_shown(data, tmp_path):
    train(script, data, tmp_path / "out", "--epochs", "1", "--limit-batches", "1")
    (tmp_path / "photos").mkdir()
    for width, height in ((93, 70), (32, 32), (300, 200)):                     # below, at and above --image-size
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{width}.png")
    predict.main([str(tmp_path / "out" / "model" / "model_last.pth"), str(tmp_path / "photos"), "--output", str(tmp_path / "pred"), "--pca",
                  "--device", "cpu"])
    assert {Image.open(tmp_path / "pred" / f"{width}_pca.png").size for width in (93, 32, 300)} == {(93, 70), (32, 32), (300, 200)}
