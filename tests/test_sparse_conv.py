import resource

import pytest
import torch

from models.sparse_conv import SubMConv3d, neighbour_table, pack, unpack

both = pytest.mark.parametrize("dense", [False, True], ids=["pairs", "dense"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def voxels(count=60, side=5, scenes=2, seed=0, distinct=True):
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        flat = torch.randperm(scenes * side ** 3, generator=generator)[:count]
    else:
        flat = torch.randint(scenes * side ** 3, (count,), generator=generator)
    scene, rest = flat // side ** 3, flat % side ** 3
    return torch.stack([rest // side ** 2, rest // side % side, rest % side], 1).int(), scene


def by_definition(x, grid, scene, weight, bias):
    """The sum over taps, voxel by voxel, where the first of equal voxels answers, and a voxel itself in the centre."""
    half, first = weight.shape[1] // 2, {}
    places = [(int(s), *map(int, g)) for s, g in zip(scene, grid, strict=True)]
    for row, place in enumerate(places):
        first.setdefault(place, row)
    rows = []
    for row, (s, a, b, c) in enumerate(places):
        value = bias
        for i in range(-half, half + 1):
            for j in range(-half, half + 1):
                for k in range(-half, half + 1):
                    other = row if i == j == k == 0 else first.get((s, a + i, b + j, c + k))
                    if other is not None:
                        value = value + weight[:, i + half, j + half, k + half] @ x[other]
        rows.append(value)
    return torch.stack(rows)


@both
@pytest.mark.parametrize("kernel, distinct", [(3, True), (5, True), (3, False), (1, True)])
def test_equals_its_definition_with_gradients(kernel, distinct, dense):
    grid, scene = voxels(count=60 if kernel < 5 else 25, distinct=distinct, side=5 if distinct else 2)
    conv = SubMConv3d(3, 4, kernel).double()
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(len(grid), 3, dtype=torch.float64, requires_grad=True)
    table = neighbour_table(grid, scene, kernel, dense)
    assert (table.first is None) == distinct
    out, expected = conv(x, table), by_definition(x, grid, scene, conv.weight, conv.bias)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    inputs = (x, conv.weight, conv.bias)
    for ours, theirs in zip(torch.autograd.grad((out * weights).sum(), inputs),
                            torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@both
def test_each_tap_shifts_in_its_direction(dense):
    grid = torch.cartesian_prod(*[torch.arange(5)] * 3)
    table = neighbour_table(grid, kernel_size=3, dense=dense)
    conv = SubMConv3d(1, 1, bias=False)
    x = torch.zeros(5, 5, 5, 1)
    x[2, 2, 2] = 1
    for tap in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[0, tap[0], tap[1], tap[2]] = 1
            out = conv(x.reshape(-1, 1), table).view(5, 5, 5)
        assert out.nonzero().tolist() == [[3 - step for step in tap]]


@both
def test_no_neighbours_across_borders_or_scenes(dense):
    """Every voxel at the border of a full grid, in two scenes: the sum of ones counts neighbours of the same scene."""
    grid = torch.cartesian_prod(*[torch.arange(4)] * 3)
    conv = SubMConv3d(1, 1, bias=False)
    torch.nn.init.ones_(conv.weight)
    scene = torch.arange(2).repeat_interleave(64)
    with torch.no_grad():
        count = conv(torch.ones(128, 1), neighbour_table(grid.repeat(2, 1), scene, dense=dense))[:, 0]
    inside = ((grid > 0) & (grid < 3)).sum(1)
    assert torch.equal(count, (2.0 ** (3 - inside) * 3.0 ** inside).repeat(2))


@both
def test_memory_follows_the_voxels_not_the_extent(dense):
    grid = torch.tensor([[0, 0, 0], [10_000, 10_000, 10_000], [10_000, 10_000, 9_999]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    conv = SubMConv3d(2, 2)
    out = conv(torch.ones(3, 2), neighbour_table(grid, dense=dense))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000             # KiB
    assert not torch.equal(out[0], out[1]) and out.shape == (3, 2)


@both
def test_order_of_the_voxels_does_not_matter(dense):
    grid, scene = voxels(200, 6)
    x, conv, permutation = torch.randn(200, 4), SubMConv3d(4, 4), torch.randperm(200)
    out = conv(x, neighbour_table(grid, scene, dense=dense))
    again = conv(x[permutation], neighbour_table(grid[permutation], scene[permutation], dense=dense))
    torch.testing.assert_close(again, out[permutation])


def test_chunks_change_nothing(monkeypatch):
    grid, scene = voxels(200, 6)
    x, conv, table = torch.randn(200, 4, requires_grad=True), SubMConv3d(4, 5), neighbour_table(grid, scene, dense=True)
    results = []
    for elements in (2 ** 26, 27 * 4 * 30):
        monkeypatch.setattr("models.sparse_conv.CHUNK_ELEMENTS", elements)
        out = conv(x, table)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, conv.weight])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@both
def test_autocast_sums_in_float32(dense):
    grid, scene = voxels(120, 4)
    x, conv = torch.randn(120, 16, requires_grad=True), SubMConv3d(16, 16)
    table = neighbour_table(grid, scene, dense=dense)
    expected = torch.autograd.grad(conv(x, table).square().sum(), [x, conv.weight])
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x, table)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), conv(x, table), rtol=0.02, atol=0.01)
    for ours, theirs in zip(torch.autograd.grad(out.float().square().sum(), [x, conv.weight]), expected, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.02 * theirs.norm()


def test_pack_and_unpack():
    grid, scene = voxels(50)
    key = pack(grid, scene, 3)
    assert torch.equal(unpack(key, 3)[0], grid) and torch.equal(unpack(key, 3)[1], scene)
    rows = torch.cat([scene[:, None], grid], 1).tolist()
    assert [rows[i] for i in key.argsort()] == sorted(rows)


def test_errors():
    with pytest.raises(ValueError, match="kernel_size: expected an odd number, got 4"):
        neighbour_table(torch.zeros(1, 3), kernel_size=4)
    with pytest.raises(ValueError, match="more than 63 bits"):
        neighbour_table(torch.full((1, 3), 2 ** 20), torch.tensor([100]))
    with pytest.raises(ValueError, match="table is of kernel size 5, not 3"):
        SubMConv3d(2, 2)(torch.ones(1, 2), neighbour_table(torch.zeros(1, 3).int(), kernel_size=5))


@pytest.mark.gpu
@pytest.mark.parametrize("distinct", [True, False])
def test_deterministic_on_cuda(distinct):
    grid, scene = voxels(3000, 12 if distinct else 8, distinct=distinct)
    conv = SubMConv3d(32, 32)
    x = torch.randn(3000, 32)
    expected = conv(x, neighbour_table(grid, scene))
    conv, grid, scene, x = conv.cuda(), grid.cuda(), scene.cuda(), x.cuda().requires_grad_()
    results = []
    for _ in range(5):
        out = conv(x, neighbour_table(grid, scene))
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, conv.weight, conv.bias])])
    torch.testing.assert_close(results[0][0].cpu(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
