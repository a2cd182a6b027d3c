"""What only train_m2f_head.py has, its loss, its widths and a released head, and two processes. Other whole runs:
tests/test_image_scripts.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_m2f_head as script
from tests.tiny_heads import add_tiny_backbone, flags, train, val, weights, write_backbone, write_data
from tests.tiny_images import write_pictures
from utils.log import read_log

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def data(tmp_path, monkeypatch):
    add_tiny_backbone(monkeypatch)
    return write_data(tmp_path / "pictures")


def test_first_loss_is_of_the_known_size(data, tmp_path):
    """About 11 to 15 for each of the ten outputs of an untrained head; a forgotten term or output would be far off."""
    train(script, data, tmp_path, "--limit-batches", "1", "--epochs", "1", "--num-queries", "100")
    loss = read_log(tmp_path / "log" / "log.jsonl")[0]["loss"]
    assert 80 < loss < 160


@pytest.mark.parametrize("width", ["0", "100"])
def test_a_width_the_heads_cannot_share_is_refused(data, tmp_path, width):
    with pytest.raises(ValueError, match="--hidden-dim"):
        train(script, data, tmp_path, "--hidden-dim", width)


def launch(*command, processes=0):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [sys.executable]
    done = subprocess.run([*start, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow                    # twenty seconds; tests/test_train_segmentation.py does it by default
def test_two_processes_train_together_and_score_like_one(data, tmp_path):
    """Three photographs for two processes: nothing is dropped, repeated or padded."""
    command = flags(script, data, tmp_path / "run", "--backbone", "dinov3_vits16", "--epochs", "1", "--batch-size", "1",
                    "--limit-batches", "1", "--save-interval", "1")
    launch(f"{script.__name__}.py", *command, processes=2)
    write_pictures(tmp_path / "odd", 3, first_seed=30, size=(40, 40))
    scores = []
    for processes in (0, 2):
        out = tmp_path / f"scores{processes}"
        launch("evaluate.py", tmp_path / "run" / "model" / "model_last.pth", "--data-dir", tmp_path / "odd" / "images", "--label-dir",
               tmp_path / "odd" / "masks", "--device", "cpu", "--output-dir", out, processes=processes)
        scores.append(json.loads((out / "metrics.json").read_text()))
    for key in ("confusion_matrix", "miou", "overall_accuracy", "files"):
        assert scores[0][key] == scores[1][key]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-9)


def test_a_released_head_is_scored_and_continued(data, tmp_path, capsys):
    more = ["--backbone-weights", write_backbone(tmp_path / "tiny.pth")]
    result = train(script, data, tmp_path / "run", *val(data), *more, "--epochs", "1")
    torch.save(weights(tmp_path / "run")["model"], tmp_path / "head.pth")
    head = ["--head-weights", tmp_path / "head.pth"]
    again = train(script, data, tmp_path / "none", *val(data)[1:], *more, *head, "--test-only")
    assert again["miou"] == result["miou"]
    (tmp_path / "four.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"]}))
    train(script, data, tmp_path / "next", *more, *head, "--num-classes", "4", "--classes", tmp_path / "four.json",
          "--epochs", "1", "--limit-batches", "1", "--lr", "1e-12")
    assert "class layer starts anew: 3 classes in the file, 4 here" in capsys.readouterr().out
    first, second = weights(tmp_path / "run")["model"], weights(tmp_path / "next")["model"]
    name = "segmentation_model.1.predictor.mask_embed.layers.0.weight"
    assert torch.allclose(first[name], second[name], atol=1e-6)
    (tmp_path / "other.pth").write_bytes((tmp_path / "head.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated"):
        train(script, data, tmp_path / "none", *val(data)[1:], *more, "--head-weights", tmp_path / "other.pth", "--test-only")
