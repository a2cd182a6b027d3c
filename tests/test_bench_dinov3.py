"""benchmarks/bench_dinov3.py runs: each part that needs no transformers, at a tiny size."""

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_dinov3
from models import dinov3
from tests.tiny_images import TINY


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setitem(dinov3.BACKBONES, "dinov3_tiny", TINY)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["dinov3_tiny", "dinov3_vits16plus"])
def test_flops_are_those_that_pytorch_counts(name):
    config = dinov3.BACKBONES[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        dinov3.VisionTransformer(config)(torch.empty(1, 3, 64, 64))
    assert bench_dinov3.backbone_flops(config, 64) == counter.get_total_flops()


@pytest.mark.parametrize("part", ["vit", "m2f"])
def test_one_side_alone(part):
    peak = bench_dinov3.main(["memory", "--of", part, "--backbone", "dinov3_tiny", "--shapes", "64x2", "--num-heads", "2",
                              "--ffn-dim", "32", "--num-points", "50", "--hidden-dim", "32"])
    assert peak >= 0


def test_without_transformers_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps transformers"):
        bench_dinov3.main(["vit"])


@pytest.mark.slow                                        # a benchmark of a GPU; its parts are tested above and in test_roofline.py
def test_whole_steps_on_the_cpu(capsys):
    [row] = bench_dinov3.main(["gpu", "--device", "cpu", "--backbone", "dinov3_tiny", "--shapes", "64x2", "--num-heads", "2",
                               "--ffn-dim", "32", "--num-points", "50", "--hidden-dim", "32", "--repeats", "1"])
    assert 0 < row["share"] < 1 and row["forward"] > row["step"] > 0 and 0 < row["mfu"] < 1
    assert "dinov3_tiny, 64 px, batch 2" in capsys.readouterr().out


@pytest.mark.slow                    # of a benchmark; tests/test_image_scripts.py compares cached features by default
def test_cached_features_give_the_same_losses():
    rows = bench_dinov3.main(["cache", "--backbone", "dinov3_tiny", "--shapes", "64x1", "--repeats", "1", "--hidden-dim", "32",
                              "--ffn-dim", "32", "--num-points", "50"])
    assert [row["script"] for row in rows] == ["train_linear_head.py", "train_m2f_head.py", "train_upernet_head.py"]
    assert all(row["ratio"] > 0 and row["difference"] < 1e-5 for row in rows)


def test_turns_alternate_and_the_first_call_does_not_count():
    calls = []
    seconds = bench_dinov3.by_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, torch.device("cpu"))
    assert "".join(calls) == "ab" "ab" "ba" and [len(values) for values in seconds.values()] == [2, 2]
