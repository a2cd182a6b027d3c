"""benchmarks/bench_segmentation.py runs, at a tiny size."""

import pytest
import torch

from benchmarks import bench_segmentation


@pytest.mark.parametrize("part", ["data", "step"])
def test_part(part, capsys):
    before = torch.get_num_threads()
    try:
        best = bench_segmentation.main([part, "--size", "40", "50", "--crop", "32", "--batch-size", "2", "--repeats", "1", "--device", "cpu"])
    finally:
        torch.set_num_threads(before)
    assert best["ours"] > 0 and f"| {part} |" in capsys.readouterr().out
