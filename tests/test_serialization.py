import pytest
import torch

from utils.serialization import ORDERS, depth_of, encode, grid_range, invert, patch_layout, serialize


def cube(depth):
    side = torch.arange(2 ** depth)
    return torch.cartesian_prod(side, side, side).int()


def test_z_order_by_hand():
    grid = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 1], [3, 3, 3]], dtype=torch.int32)
    assert encode(grid, None, "z", 2).tolist() == [0, 1, 2, 4, 33, 63]
    assert encode(grid, None, "z-trans", 2).tolist() == [0, 1, 4, 2, 17, 63]
    assert encode(grid, torch.tensor([0, 0, 0, 1, 1, 2]), "z", 2).tolist() == [0, 1, 2, 68, 97, 191]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_curve_visits_every_voxel_once(order, depth):
    grid = cube(depth)
    code = encode(grid, None, order, depth)
    assert torch.equal(code.sort().values, torch.arange(8 ** depth))
    if order.startswith("hilbert"):
        steps = grid[code.argsort()].diff(dim=0).abs().sum(1)
        assert (steps == 1).all()                             # each voxel touches the one before by a face


@pytest.mark.parametrize("order", ["z", "hilbert"])
def test_trans_swaps_x_and_y(order):
    grid = cube(3)
    assert torch.equal(encode(grid, None, order + "-trans", 3), encode(grid[:, [1, 0, 2]], None, order, 3))
    assert not torch.equal(encode(grid, None, order + "-trans", 3), encode(grid, None, order, 3))


def test_largest_index_and_all_bits():
    top = 2 ** 16 - 1
    assert encode(torch.tensor([[top] * 3]), None, "z", 16).item() == 2 ** 48 - 1
    codes = [encode(torch.tensor([[1 << b, 0, 0], [0, 1 << b, 0], [0, 0, 1 << b]]), None, "z", 16) for b in range(16)]
    assert torch.equal(torch.stack(codes), torch.stack([1 << torch.tensor([3 * b + 2, 3 * b + 1, 3 * b]) for b in range(16)]))
    assert encode(torch.tensor([[3, 1, 2]]), None, "hilbert", 2).shape == (1,)       # a single voxel


def test_hilbert_order_depends_on_depth_modulo_three():
    grid = cube(3)
    orders = [encode(grid, None, "hilbert", depth).argsort() for depth in (3, 4, 5, 6)]
    assert torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_serialize_keeps_scenes_and_ties():
    grid = torch.tensor([[5, 1, 2], [0, 0, 0], [5, 1, 2], [0, 0, 0]])
    scene = torch.tensor([0, 0, 0, 1])
    result = serialize(grid, scene, ORDERS, 3)
    assert result.order.tolist() == [[1, 0, 2, 3]] * 4 and result.inverse.tolist() == [[1, 0, 2, 3]] * 4
    permutation = torch.stack([torch.randperm(9) for _ in range(3)])
    assert torch.equal(permutation.gather(1, invert(permutation)), torch.arange(9).expand(3, 9))


def test_errors():
    assert depth_of(65534) == 16
    with pytest.raises(ValueError, match=r"largest index is 65535, expected 0\.\.65534; is the scene in millimetres"):
        depth_of(65535)
    assert grid_range(torch.tensor([[0, 7, 3]]), 2 ** 15) == 7
    with pytest.raises(ValueError, match="smallest index is -1"):
        grid_range(torch.tensor([[0, -1, 3]]), 1)
    with pytest.raises(ValueError, match="no voxel"):
        grid_range(torch.zeros(0, 3), 1)
    with pytest.raises(ValueError, match="40000 scenes with indices up to 40000 need codes"):
        grid_range(torch.tensor([[40000, 1, 3]]), 40000)
    with pytest.raises(ValueError, match=r"order: expected one of z, .* did you mean hilbert"):
        encode(torch.tensor([[0, 1, 3]]), None, "hilbrt", 3)


@pytest.mark.parametrize("sizes", [[3], [4], [5], [7, 8, 9], [1, 4, 9, 1, 2], [2, 13, 2, 4]])
def test_patches_by_the_borrow_rule(sizes):
    """Each place attends to its own run of 4, but the last run of a scene with more than 4 reaches back."""
    layout, start, place = patch_layout(sizes, 4), 0, 0
    patches = {}
    for count, length in layout.groups:
        for _ in range(count):
            patches.update({slot: layout.slots[start:start + length].tolist() for slot in range(start, start + length)})
            start += length
    for size in sizes:
        scene = list(range(place, place + size))
        for i in range(size):
            first = 0 if size <= 4 else min(i // 4 * 4, size - 4)
            assert patches[int(layout.unpad[place + i])] == scene[first:first + 4], (size, i)
        place += size
    assert [length for _, length in layout.groups if length < 4] == sorted({size for size in sizes if size < 4})
