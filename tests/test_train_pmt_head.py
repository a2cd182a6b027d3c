"""What only train_pmt_head.py has: its taps, its masks that are annealed away, and released decoders. Whole runs:
tests/test_image_scripts.py; numbers of the official code: tests/test_golden_pmt.py."""

import numpy as np
import pytest
import torch

import evaluate
import models.pmt as pmt
import train_pmt_head as script
from models.dinov3 import BACKBONES
from models.pmt import PMTSegmenter, default_taps
from tests.tiny_heads import add_tiny_backbone, flags, score, train, val, weights, write_backbone, write_data
from tests.whole_runs import refused
from utils.image_scripts import score_function
from utils.log import read_log
from utils.mask_losses import SetCriterion


@pytest.fixture
def data(tmp_path, monkeypatch):
    add_tiny_backbone(monkeypatch)
    return write_data(tmp_path / "pictures")


@pytest.fixture
def released(data, tmp_path):
    """The arguments of a file as upstream writes it, of a run on all blocks, and what that run scored."""
    more = ["--backbone-weights", write_backbone(tmp_path / "tiny.pth")]
    result = train(script, data, tmp_path / "run", *val(data), *more, "--epochs", "1")
    state = weights(tmp_path / "run")["model"]
    extra = {"network.encoder.pixel_mean": torch.zeros(3), "criterion.empty_weight": torch.ones(4), "network.decoder.pe.x": torch.zeros(1)}
    torch.save({"state_dict": {**{f"network._orig_mod.{name}": tensor for name, tensor in state.items()}, **extra}}, tmp_path / "released.bin")
    return [*more, "--head-weights", tmp_path / "released.bin"], result


def test_first_loss_is_of_the_known_size(data, tmp_path):
    """About 11 to 15 for each of the seven outputs of an untrained head; a forgotten term or output would be far off."""
    train(script, data, tmp_path, "--limit-batches", "1", "--epochs", "1", "--num-queries", "100")
    assert 56 < read_log(tmp_path / "log" / "log.jsonl")[0]["loss"] < 112


# -- taps --------------------------------------------------------------------------------------------------------------

def test_the_official_taps_end_with_the_last_block():
    assert default_taps(12) == (2, 5, 8, 11) and default_taps(24) == (5, 11, 17, 23) != BACKBONES["dinov3_vitl16"].taps
    assert all(default_taps(config.depth)[-1] == config.depth - 1 and len(default_taps(config.depth)) == 4 for config in BACKBONES.values())


def test_taps_are_stored_with_the_head_and_checked(data, tmp_path, capsys):
    """On other blocks every tensor fits, and the numbers are wrong: refused wherever a checkpoint is read."""
    more = ["--taps", "1", "3", "--epochs", "1", "--limit-batches", "1"]
    train(script, data, tmp_path, *more, *val(data))
    last = tmp_path / "model" / "model_last.pth"
    checkpoint = weights(tmp_path)
    assert checkpoint["encoder"]["taps"] == checkpoint["config"]["model"]["taps"] == [1, 3]
    model = script.load_model(checkpoint, torch.device("cpu"))
    assert model.backbone.taps == (1, 3) and [tap.shape for tap in model.backbone(torch.zeros(1, 3, 32, 48))] == [(1, 5 + 6, 32)] * 2
    checkpoint["config"]["model"]["taps"] = [0, 3]
    with pytest.raises(ValueError, match=r"trained on the blocks \[1, 3\] of the backbone, not on \[0, 3\]"):
        script.load_model(checkpoint, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"trained on the blocks \[1, 3\]"):
        evaluate.main([str(last), "--split", "val", "--device", "cpu", "model.taps=[0,3]"])
    with pytest.raises(ValueError, match="trained on the blocks 1 3 of the backbone, not 0 3; set --taps to these"):
        train(script, data, tmp_path / "next", "--head-weights", last, "--taps", "0", "3")
    with pytest.raises(ValueError, match="--taps"):
        script.main(["--resume", str(last), "--test-only", "--device", "cpu", "--taps", "0", "3"])
    with pytest.raises(ValueError, match="model.taps"):
        train(script, data, tmp_path, *more, "--taps", "0", "3", "--resume", "auto")


@pytest.mark.parametrize("taps, message", [("0 4", "from 0 to 3"), ("2 1", "in their order"), ("1 1", "different"), ("-1 3", "--taps")])
def test_blocks_that_are_not_there_are_refused(data, tmp_path, taps, message, capsys):
    with refused(capsys, message):
        train(script, data, tmp_path, "--taps", *taps.split())


def test_the_cache_tells_tokens_from_maps_and_taps_from_taps(data, tmp_path):
    for number, taps in enumerate((["1", "3"], ["0", "3"])):
        train(script, data, tmp_path / "out", "--taps", *taps, "--augment", "windows", "--cache-features", "--cache-dir", tmp_path / "cache", "--epochs", "1")
        assert len(list((tmp_path / "cache").glob("features_*.npy"))) == number + 1


# -- released decoders -------------------------------------------------------------------------------------------------

def test_a_released_decoder_is_scored_and_continued(data, tmp_path, released, capsys):
    head, result = released
    again = train(script, data, tmp_path / "none", *val(data)[1:], *head, "--test-only")
    assert again["miou"] == result["miou"]
    (tmp_path / "four.json").write_text('{"classes": ["a", "b", "c", "d"]}')
    train(script, data, tmp_path / "next", *head, "--num-classes", "4", "--classes", tmp_path / "four.json", "--epochs", "1",
          "--limit-batches", "1", "--lr", "1e-12")
    assert "class layer starts anew: 3 classes in the file, 4 here" in capsys.readouterr().out
    first, second = weights(tmp_path / "run")["model"], weights(tmp_path / "next")["model"]
    assert torch.allclose(first["decoder.q.weight"], second["decoder.q.weight"], atol=1e-6)


@pytest.mark.parametrize("more, message", [
    (["--taps", "0", "1", "2"], "trained on the blocks 0 1 2 3 of the backbone, not 0 1 2"),
    (["--num-queries", "9"], "has 8 queries, not 9; set --num-queries 8"),
    (["--ffn-dim", "64"], "mlp.up_proj"),
])
def test_a_released_decoder_on_other_settings_is_refused(data, tmp_path, released, more, message):
    with pytest.raises(ValueError, match=message):
        train(script, data, tmp_path / "none", *released[0], *more)


def test_another_file_is_no_decoder(data, tmp_path):
    file = write_backbone(tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="no PMT decoder; it holds"):
        train(script, data, tmp_path / "none", *val(data)[1:], "--head-weights", file, "--test-only")


# -- masks -------------------------------------------------------------------------------------------------------------

def test_masks_are_annealed_block_by_block():
    """Always there at first, in block after block more rarely, nowhere in the last sixth."""
    decoder, seen = PMTSegmenter(32, 2, 16, 3).decoder, []
    for step in range(60):
        decoder.anneal(step / 60)
        seen.append(decoder.attn_mask_probs.tolist())
    seen = np.array(seen)
    assert (np.diff(seen, axis=0) <= 0).all() and (seen[0] == 1).all() and (seen[-10:] == 0).all() and seen[-11, 5] > 0
    half = [int((column <= 0.5).argmax()) for column in seen.T]            # the step from which on less than half of the queries are masked
    assert half == sorted(half) and 0 < half[0] < 9 and 15 < half[1] and half[5] < 50
    official = [(0, 3000), (5384, 8749), (7403, 10769), (9422, 12788), (11442, 14807), (13461, 16826)]        # of 20,191 steps
    assert np.array(pmt.ANNEALING) * 20191 == pytest.approx(np.array(official), abs=30)


def test_annealing_and_warm_up_follow_the_run(data, tmp_path, monkeypatch):
    """A run of 6 steps leaves its warm-up after 2 and ends without masks."""
    done, schedules, original, build = [], [], pmt.Decoder.anneal, script.photos.build_schedule
    monkeypatch.setattr(pmt.Decoder, "anneal", lambda self, share: done.append(share) or original(self, share))
    monkeypatch.setattr(script.photos, "build_schedule", lambda *args, **more: schedules.append(build(*args, **more)) or schedules[-1])
    train(script, data, tmp_path, "--lr", "0.001")
    assert done == pytest.approx(np.arange(6) / 6) and torch.equal(weights(tmp_path)["model"]["decoder.attn_mask_probs"], torch.tensor([0.] * 6))
    factor = schedules[0].lr_lambdas[0]
    assert [factor(step) for step in range(6)] == pytest.approx([0, 0.5, *((1 + np.cos(np.pi * np.arange(4) / 4)) / 2)])
    command = flags(script, data, tmp_path, "--warmup-epochs", "0", "--epochs", "1")
    assert script.config_of(script.parse_args(command)).training.warmup_epochs == 0


def test_nothing_is_masked_at_inference_and_the_result_is_of_no_chance(data, tmp_path):
    train(script, data, tmp_path, "--epochs", "1", "--limit-batches", "1")
    model = script.load_model(weights(tmp_path), torch.device("cpu"))
    assert model.decoder.attn_mask_probs.min() == 1
    scores, image = score_function(model, torch.device("cpu"), None), torch.randn(1, 3, 40, 90)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmt, "allowed_patches", None)
        first = scores(image)
        assert first.shape == (1, 3, 40, 90) and torch.equal(first, scores(image))
    assert np.isfinite(score(tmp_path, data / "val", "--limit-batches", "1", "evaluation.eval_mode=even")["miou"])


def test_gradient_reaches_everything_and_checkpointing_changes_nothing():
    gradients = []
    label = torch.randint(0, 5, (2, 48, 32))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = PMTSegmenter(32, 2, 16, 5, num_queries=7, gradient_checkpointing=checkpointing)
        model.decoder.anneal(0.5)
        outputs = model(torch.empty(2, 3, 48, 32), [torch.randn(2, 5 + 6, 32) for _ in range(4)])
        assert outputs["pred_masks"].shape == (2, 7, 12, 8) and len(outputs["aux_outputs"]) == 6
        SetCriterion(5, 64, divide_by_pairs=True)(outputs, label)["total"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_everything_is_decayed(data):
    model = script.build_model(script.config_of(script.parse_args(flags(script, data, "out"))))
    optimizer = script.build_optimizer(model, script.config_of(script.parse_args(flags(script, data, "out", "--weight-decay", "0.5"))))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5]
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
