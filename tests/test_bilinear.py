import pytest
import torch
import torch.nn.functional as F

from utils import bilinear
from utils.bilinear import deterministic_gradient, read_at, read_gradient


def case(seed=0, shape=(2, 3, 5, 7), dtype=torch.float64):
    """Maps, and points inside, on the edge and far outside of them."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(*shape, generator=generator, dtype=dtype)
    grid = torch.rand(shape[0], 4, 50, 2, generator=generator, dtype=dtype) * 3 - 1.5
    grid[:, 0, :5] = torch.tensor([1.0, -1.0])
    grid[:, 1, :5] = 20.0
    return maps, grid, torch.randn(shape[0], shape[1], 4, 50, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 2, 8, 2)])
def test_the_deterministic_gradient_is_that_of_grid_sample(shape):
    maps, grid, grad = case(shape=shape)
    expected = read_gradient(grad, maps, grid)
    for found, wanted in zip(deterministic_gradient(grad, maps, grid), expected, strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_its_use_in_a_graph(monkeypatch):
    """As on a GPU under --deterministic, which the test pretends."""
    maps, grid, grad = case()
    wanted = []
    for forced in (False, True):
        monkeypatch.setattr(bilinear, "_must_be_deterministic", lambda maps, forced=forced: forced)
        leaves = maps.clone().requires_grad_(), grid.clone().requires_grad_()
        out = read_at(*leaves)
        assert torch.equal(out, F.grid_sample(maps, grid, align_corners=False))
        out.backward(grad)
        wanted.append([leaf.grad for leaf in leaves])
    for first, second in zip(*wanted, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_the_cpu_keeps_the_gradient_of_grid_sample():
    torch.use_deterministic_algorithms(True)
    try:
        maps, grid, grad = case(dtype=torch.float32)
        leaf = maps.clone().requires_grad_()
        read_at(leaf, grid).backward(grad)
        leaf_of_torch = maps.clone().requires_grad_()
        F.grid_sample(leaf_of_torch, grid, align_corners=False).backward(grad)
        assert torch.equal(leaf.grad, leaf_of_torch.grad)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_point_that_is_not_a_number_is_no_index():
    maps, grid, grad = case()
    grid[0, 0, 0] = float("nan")
    assert deterministic_gradient(grad, maps, grid)[0].isfinite().all()
