"""benchmarks/bench_prototype.py runs, at a tiny size, and refuses results that differ."""

import pytest
import torch

from benchmarks import bench_prototype


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", bench_prototype.PARTS)
def test_part(part, capsys):
    bench_prototype.main([part, "--tiny", "--repeats", "1"])
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"| {part} |")


def test_different_results_are_an_error(monkeypatch):
    monkeypatch.setattr(bench_prototype, "prototype_divergence", lambda *arguments: (arguments[0].mean(), 1))
    with pytest.raises(RuntimeError, match="the values differ by"):
        bench_prototype.main(["kld", "--tiny", "--repeats", "1"])


def test_another_patch_is_an_error(monkeypatch):
    loop = bench_prototype.pixel_loop
    monkeypatch.setattr(bench_prototype, "pixel_loop", lambda *arguments: loop(*arguments)[::-1])
    with pytest.raises(RuntimeError, match="the tables differ"):
        bench_prototype.main(["push", "--tiny", "--repeats", "1"])
