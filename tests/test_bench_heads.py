"""benchmarks/bench_heads.py runs, each head at a tiny size, and measures what it says."""

import pytest
import torch

from benchmarks import bench_heads
from models import dinov3
from tests.tiny_images import TINY


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setitem(dinov3.BACKBONES, "dinov3_tiny", TINY)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow                    # four seconds, of a benchmark
def test_every_head_has_a_row(monkeypatch, capsys):
    monkeypatch.setattr(bench_heads, "peak_alone", lambda name, of, *_: {"head": 5.0, "inference": 10.0, "step": 20.0}[of])
    rows = bench_heads.main(["--backbone", "dinov3_tiny", "--shapes", "64x1", "--repeats", "1", "--heads", "pmt", "linear", "pyramid", "eomt"])
    assert [row["name"] for row in rows] == ["pmt", "linear", "pyramid", "eomt"] and rows[0]["step_ratio"] == 1
    assert all(0 < row["head"] and 0 < row["inference"] and 0 < row["step"] and row["step_mib"] == 20 for row in rows)
    assert rows[3]["parameters"] > sum(p.numel() for p in dinov3.VisionTransformer(TINY).parameters())
    assert rows[1]["parameters"] == 2 * 32 + 32 * 150 + 150 and "64x1 linear" in capsys.readouterr().out


def test_a_step_is_a_step_of_the_script():
    """It changes the trained part and leaves the backbone; inference changes nothing."""
    torch.manual_seed(0)
    args = bench_heads.parse_args(["--backbone", "dinov3_tiny"])
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_heads, "OneStep", lambda *given: seen.append(given[0]) or OneStep(*given))
        head = bench_heads.build("linear", args, 64, 2)
    before = [p.clone() for p in seen[0].parameters()]
    head["inference"]()
    assert all(map(torch.equal, before, seen[0].parameters()))
    head["step"]()
    assert not any(map(torch.equal, before, seen[0].parameters())) and not any(p.requires_grad for p in seen[0].backbone.vit.parameters())


OneStep = bench_heads.OneStep


def test_memory_is_measured_alone(capsys):
    bench_heads.main(["--of", "step", "--heads", "linear", "--backbone", "dinov3_tiny", "--shapes", "64x1"])
    assert float(capsys.readouterr().out.split("peak ")[1]) >= 0
