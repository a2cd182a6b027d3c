"""models/deformable_attention.py against explicit loops, finite differences and values by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.deformable_attention import MSDeformAttn, grid_centers, sine_embedding

SHAPES = [(2, 3), (4, 5)]
CPU = torch.device("cpu")


def case(seed=0, levels=2, heads=2, points=3, ratio=0.5, dtype=torch.float64):
    """A module with random weights, query (2, 7, 8), reference points (1, 7, 1, 2), value (2, 26, 8)."""
    torch.manual_seed(seed)
    attention = MSDeformAttn(8, levels, heads, points, ratio).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention, torch.randn(2, 7, 8, dtype=dtype), torch.rand(1, 7, 1, 2, dtype=dtype), torch.randn(2, 26, 8, dtype=dtype)


def read_by_hand(value, x, y):
    """Bilinear value (d,) of a map (H, W, d) at the cell coordinates x, y, cell 0 having its centre at 0."""
    H, W, _ = value.shape
    total = torch.zeros_like(value[0, 0])
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < H and 0 <= j < W:
                total = total + (1 - abs(x - j)) * (1 - abs(y - i)) * value[i, j]
    return total


@torch.no_grad()
def test_equals_explicit_loops_on_maps_that_are_not_square():
    attention, query, reference, value = case()
    expected = torch.zeros(2, 7, 4, dtype=torch.float64)
    for b in range(2):
        maps, projected = [], attention.value_proj(value[b])
        for part, (H, W) in zip(projected.split([H * W for H, W in SHAPES]), SHAPES, strict=True):
            maps.append(part.view(H, W, 2, 2))                                        # rows, columns, heads, d
        offset = attention.sampling_offsets(query[b]).view(7, 2, 2, 3, 2)             # queries, heads, levels, points, (x, y)
        weight = attention.attention_weights(query[b]).view(7, 2, 6).softmax(-1).view(7, 2, 2, 3)   # over levels and points
        for q in range(7):
            for head in range(2):
                for level, (H, W) in enumerate(SHAPES):
                    for p in range(3):
                        x = float(reference[0, q, 0, 0]) * W - 0.5 + float(offset[q, head, level, p, 0])
                        y = float(reference[0, q, 0, 1]) * H - 0.5 + float(offset[q, head, level, p, 1])
                        read = read_by_hand(maps[level][:, :, head], x, y)
                        expected[b, q, 2 * head:2 * head + 2] += weight[q, head, level, p] * read
    torch.testing.assert_close(attention(query, reference, value, SHAPES), attention.output_proj(expected))


def test_derivatives_equal_finite_differences():
    attention, query, reference, value = case(1)
    names = [name for name, _ in attention.named_parameters()]

    def function(query, reference, value, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, state, (query, reference, value, SHAPES))

    inputs = [query[:, :3], reference[:, :3], value, *attention.parameters()]
    assert torch.autograd.gradcheck(function, [x.detach().clone().requires_grad_() for x in inputs])


@torch.no_grad()
def test_reference_points_may_be_given_for_each_image_and_level():
    attention, query, reference, value = case()
    expected = attention(query, reference, value, SHAPES)
    torch.testing.assert_close(attention(query, reference.expand(2, 7, 2, 2), value, SHAPES), expected)
    moved = torch.cat([reference, (reference + 0.1) % 1])
    assert torch.equal(attention(query, moved, value, SHAPES)[0], expected[0])
    assert not torch.allclose(attention(query, moved, value, SHAPES)[1], expected[1])


@torch.no_grad()
def test_without_offsets_each_cell_reads_itself():
    attention = MSDeformAttn(4, 1, 2, 3)
    attention.sampling_offsets.bias.zero_()
    for layer in (attention.value_proj, attention.output_proj):
        layer.weight.copy_(torch.eye(4))
    value = torch.randn(1, 15, 4)
    centers = grid_centers(((3, 5),), CPU)[None, :, None]
    torch.testing.assert_close(attention(value, centers, value, [(3, 5)]), value)


def test_first_offsets_are_a_ring():
    bias = MSDeformAttn(16, 2, 4, 3).sampling_offsets.bias.view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    expected = directions[:, None, None] * torch.tensor([1.0, 2, 3])[:, None]
    torch.testing.assert_close(bias.detach(), expected.expand(4, 2, 3, 2), atol=1e-6, rtol=0)
    square = MSDeformAttn(16, 1, 8, 1).sampling_offsets.bias.view(8, 2)
    torch.testing.assert_close(square[1].detach(), torch.ones(2))                     # diagonals reach the corner


def test_places_are_float32_under_autocast(monkeypatch):
    attention, query, reference, value = case(dtype=torch.float32)
    grids, sample = [], F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda x, grid, **kwargs: (grids.append((x.dtype, grid)), sample(x, grid, **kwargs))[1])
    plain = attention(query, reference, value, SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(query, reference, value, SHAPES)
    assert mixed.dtype == torch.bfloat16 and {dtype for dtype, _ in grids} == {torch.float32}
    half = len(grids) // 2
    assert half and all(torch.equal(a, b) for (_, a), (_, b) in zip(grids[:half], grids[half:], strict=True))
    torch.testing.assert_close(mixed.float(), plain, atol=0.1, rtol=0.05)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """A CPU reads as many heads at a time as it has threads; 3 leave a smaller part of these."""
    found, heads = [], []
    sample = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda x, *args, **kwargs: (heads.append(len(x)), sample(x, *args, **kwargs))[1])
    for threads in (1, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
        attention, query, reference, value = case(dtype=torch.float32)
        inputs = [query.detach().requires_grad_(), value.detach().requires_grad_()]
        out = attention(inputs[0], reference, inputs[1], SHAPES)
        out.square().sum().backward()
        found.append([out.detach(), *(x.grad for x in (*inputs, *attention.parameters()))])
    assert {1, 3} <= set(heads) and max(heads) > 3
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_keeps_nothing_of_what_was_read():
    attention, query, reference, value = case(points=4, ratio=2.0, dtype=torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        attention(query.requires_grad_(), reference, value, SHAPES)
    assert max(sizes) < 2 * 2 * 8 * 4 * 7                                             # images, heads, d, points, queries of one level


def test_errors():
    with pytest.raises(ValueError, match="3 heads do not divide the value width 4"):
        MSDeformAttn(8, 1, 3, 4, 0.5)
    attention, query, reference, value = case()
    for shapes in ([(2, 3)], [(2, 3), (5, 5)]):
        with pytest.raises(ValueError, match="26 value positions do not fit the 2 levels"):
            attention(query, reference, value, shapes)


def test_grid_centers():
    expected = torch.tensor([[1 / 4, 1 / 2], [3 / 4, 1 / 2], [1 / 2, 1 / 4], [1 / 2, 3 / 4]])
    torch.testing.assert_close(grid_centers(((1, 2), (2, 1)), CPU), expected)


def test_sine_embedding_by_loops():
    embedding = sine_embedding(3, 5, 8, CPU)
    assert embedding.shape == (15, 8)
    for i in range(3):
        for j in range(5):
            for axis, angle in enumerate((2 * math.pi * (i + 1) / (3 + 1e-6), 2 * math.pi * (j + 1) / (5 + 1e-6))):
                expected = [f(angle / 10000 ** (k / 2)) for k in range(2) for f in (math.sin, math.cos)]
                torch.testing.assert_close(embedding[i * 5 + j, 4 * axis:4 * axis + 4], torch.tensor(expected), atol=1e-6, rtol=0)


def test_codes_first_made_for_inference_serve_training():
    attention, query, _, value = case(dtype=torch.float32)
    with torch.inference_mode():
        grid_centers(((1, 7),), CPU), sine_embedding(7, 1, 8, CPU)
        attention(query, grid_centers(((1, 7),), CPU)[None, :, None], value, [(1, 6), (4, 5)])
    query = torch.nn.Parameter(query) * sine_embedding(7, 1, 8, CPU)
    attention(query, grid_centers(((1, 7),), CPU)[None, :, None], value, [(1, 6), (4, 5)]).sum().backward()
    assert grid_centers(((1, 7),), CPU) is grid_centers(((1, 7),), CPU)
