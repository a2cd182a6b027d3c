"""utils/parts.py: parts give what the whole gives, and are taken on a CPU only."""

import pytest
import torch
from torch import nn

from utils.parts import by_parts


@pytest.mark.parametrize("threads, sizes", [(1, [3, 3, 1]), (2, [6, 1]), (3, [7])])
def test_values_and_gradients_are_those_of_the_whole(monkeypatch, threads, sizes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    linear, seen = nn.Linear(4, 5).double(), []
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    def layer(part):
        seen.append(len(part))
        return linear(part).relu()

    found = [(out, *torch.autograd.grad(out.square().sum(), [x, *linear.parameters()]))
             for out in (layer(x), by_parts(layer, 3, x))]
    assert seen == [7, *sizes]
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("where", ["meta", "compiled"])
def test_elsewhere_all_at_once(monkeypatch, where):
    if where == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen = []
    out = by_parts(lambda x: seen.append(len(x)) or x, 1, torch.zeros(3, 2, device="meta" if where == "meta" else "cpu"))
    assert seen == [3] and out.shape == (3, 2)
