"""Submanifold sparse convolution in plain PyTorch (Graham et al. 2018, arXiv 1711.10275), weights as in spconv 2.

    out[p] = bias + sum over taps t of weight[:, t] . x[p + t],  t in {-h..h}^3, h = kernel_size // 2

over the voxels that exist, and only at them. Neighbours are found once per grid (`neighbour_table`) and shared by all
layers on it. On the CPU each tap is one matrix product over the pairs it has; elsewhere the neighbours of a run of
voxels are gathered into one product. Both are deterministic: no sum depends on the order of atomic operations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2 ** 26         # of gathered neighbours at a time off the CPU: 256 MiB in float32


def pack(grid_coord: Tensor, scene: Tensor | None, width: int) -> Tensor:
    """One int64 key per voxel, ascending by (scene, x, y, z): grid_coord (N, 3) in 0..2^width - 1, scene (N,)."""
    x, y, z = grid_coord.long().unbind(1)
    key = x << 2 * width | y << width | z
    return key if scene is None else key | scene.long() << 3 * width


def unpack(key: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Undo `pack`: (N,) int64 -> grid_coord (N, 3) int32, scene (N,) int64."""
    mask = (1 << width) - 1
    grid = torch.stack([key >> 2 * width & mask, key >> width & mask, key & mask], 1)
    return grid.int(), key >> 3 * width


class NeighbourTable:
    """Which voxels are neighbours, for one kernel size.

    Two layouts. pairs: per tap of the first half (the others mirror them) the rows (centre, neighbour), ascending.
    dense: (U, taps) int32 row of the neighbour, U where there is none and for the centre tap.

    Voxels that occur more than once (Mix3D lays scenes over each other): the first of them, by row, answers all
    look-ups; each gets its own output, with itself under the centre tap. `first` (U,) is then the row of each distinct
    voxel and `voxel` (N,) the distinct voxel of each row; both None where all are distinct. What spconv does here
    depends on its build.
    """

    def __init__(self, kernel_size: int, pairs: list[tuple[Tensor, Tensor]] | None, dense: Tensor | None,
                 first: Tensor | None, voxel: Tensor | None):
        self.kernel_size, self.num_taps = kernel_size, kernel_size ** 3
        self.pairs, self.dense, self.first, self.voxel = pairs, dense, first, voxel

    def taps(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(tap, centre rows, neighbour rows) for every tap but the centre."""
        for tap, (centre, neighbour) in enumerate(self.pairs):
            yield tap, centre, neighbour
            yield self.num_taps - 1 - tap, neighbour, centre


def neighbour_table(grid_coord: Tensor, scene: Tensor | None = None, kernel_size: int = 3, dense: bool | None = None,
                    largest: int | None = None, num_scenes: int | None = None) -> NeighbourTable:
    """The neighbours of voxels grid_coord (N, 3) integer >= 0 within their scene (N,), any order, memory linear in N.

    dense: which layout; None takes pairs on the CPU. largest index and num_scenes: where they are known, finding them
    waits for the device; looking for voxels that occur twice does once. ValueError for an even kernel, or keys of more
    than 63 bits.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
    half = kernel_size // 2
    device = grid_coord.device
    dense = device.type != "cpu" if dense is None else dense
    if largest is None and len(grid_coord):
        largest = int(grid_coord.max())
    if num_scenes is None:
        num_scenes = int(scene.max()) + 1 if scene is not None and len(scene) else 1
    width = (largest + 2 * half).bit_length() if len(grid_coord) else 1                     # a margin on both sides
    if 3 * width + (num_scenes - 1).bit_length() > 63:
        raise ValueError(f"{num_scenes} scenes with indices up to 2^{width} need keys of more than 63 bits")
    key, order = pack(grid_coord + half, scene, width).sort(stable=True)
    first = voxel = None
    new = torch.ones(len(key), dtype=torch.bool, device=device)
    new[1:] = key[1:] != key[:-1]
    if not new.all():
        first = order[new]
        voxel = torch.empty_like(order)
        voxel[order] = new.cumsum(0) - 1
        key = key[new]
        order = torch.arange(len(key), device=device)
    pairs, columns = [], []
    middle = kernel_size ** 3 // 2
    for tap in range(kernel_size ** 3 if dense else middle):
        x, y, z = tap // kernel_size ** 2 - half, tap // kernel_size % kernel_size - half, tap % kernel_size - half
        wanted = key + (x << 2 * width) + (y << width) + z
        place = torch.searchsorted(key, wanted).clamp_(max=max(len(key) - 1, 0))
        found = key[place] == wanted
        if dense:
            column = torch.where(found & (tap != middle), order[place], len(key))
            columns.append(torch.empty_like(column).scatter_(0, order, column).int())
        else:
            centre = found.nonzero().squeeze(1)
            pairs.append((order[centre], order[place[centre]]))
    return NeighbourTable(kernel_size, None if dense else pairs, torch.stack(columns, 1) if dense else None,
                          first, voxel)


def add_rows(size: int, index: Tensor, values: Tensor) -> Tensor:
    """out (size, C) with out[index[i]] += values[i], in a fixed order (index_add_ on CUDA is atomic, index_put_
    sorts; on the CPU it is the other way round)."""
    out = values.new_zeros(size, values.shape[1])
    return out.index_add_(0, index, values) if values.device.type == "cpu" \
        else out.index_put_((index,), values, accumulate=True)


class _SubMConv(torch.autograd.Function):
    """x (N, in), weight (out, taps, in), bias (out) or None -> (N, out). Saves x and weight only."""

    @staticmethod
    def forward(ctx, x, weight, bias, table):
        ctx.save_for_backward(x, weight)
        ctx.table = table
        ctx.has_bias = bias is not None
        centre = weight[:, table.num_taps // 2].t()
        out = (x @ centre if bias is None else torch.addmm(bias, x, centre)).to(_sum_dtype(x))
        if table.first is None:
            return _neighbours(out, x, weight, table, False).to(x.dtype)
        around = out.new_zeros(len(table.first), len(weight))
        around = _neighbours(around, x.index_select(0, table.first), weight, table, False)
        return out.add_(around.index_select(0, table.voxel)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), table, middle = ctx.saved_tensors, ctx.table, ctx.table.num_taps // 2
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        rows, row_grad = x, grad
        if table.first is not None:
            rows, row_grad = x.index_select(0, table.first), add_rows(len(table.first), table.voxel, grad)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight[:, middle]).to(_sum_dtype(x))
            if table.first is None:
                grad_x = _neighbours(grad_x, grad, weight, table, True)
            else:
                around = grad_x.new_zeros(len(rows), grad_x.shape[1])
                grad_x.index_add_(0, table.first, _neighbours(around, row_grad, weight, table, True))
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(rows, row_grad, weight, table)
            grad_weight[:, middle] = grad.t() @ x
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.to(_sum_dtype(grad)).sum(0).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Sums over taps are taken in at least float32, also under autocast."""
    return torch.promote_types(x.dtype, torch.float32)


def _neighbours(out: Tensor, x: Tensor, weight: Tensor, table: NeighbourTable, transposed: bool) -> Tensor:
    """out += all taps but the centre, in place; transposed: the same with each tap mirrored and its matrix
    transposed, which is the gradient for the input (j is i's neighbour at t where i is j's at -t)."""
    if table.dense is None:
        for tap, centre, neighbour in table.taps():
            if transposed:
                out.index_add_(0, neighbour, (x.index_select(0, centre) @ weight[:, tap]).to(out.dtype))
            else:
                out.index_add_(0, centre, (x.index_select(0, neighbour) @ weight[:, tap].t()).to(out.dtype))
        return out
    matrix = weight.flip(1).permute(2, 1, 0) if transposed else weight                       # (to, taps, from)
    matrix = matrix.flatten(1).t()
    for rows, gathered in _gathered(x, table):
        out[rows] += gathered @ matrix
    return out


def _gathered(x: Tensor, table: NeighbourTable) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows and their neighbours' features side by side, (rows, taps * C), 0 where there is none."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    step = max(CHUNK_ELEMENTS // (table.num_taps * x.shape[1]), 1)
    for start in range(0, len(x), step):
        index = table.dense[start:start + step]
        yield slice(start, start + step), padded.index_select(0, index.flatten()).view(len(index), -1)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, table: NeighbourTable) -> Tensor:
    """(out, taps, in) without the centre tap: the sum over voxels of grad x neighbour's feature."""
    total = torch.zeros_like(weight, dtype=_sum_dtype(weight))
    if table.dense is None:
        for tap, centre, neighbour in table.taps():
            total[:, tap] = grad.index_select(0, centre).t() @ x.index_select(0, neighbour)
    else:
        for rows, gathered in _gathered(x, table):
            total += (grad[rows].t() @ gathered).view_as(total)
    return total


class SubMConv3d(nn.Module):
    """weight (out, k, k, k, in): the kernel's axes are x, y, z, no flip (spconv 2's layout; spconv 1 and nn.Conv3d
    differ, and between C -> C layers the wrong one loads without a word). bias (out).

    forward(x (N, in), table of that kernel size over the same N voxels) -> (N, out). Under autocast the products are
    taken in its dtype and summed in float32; the result has its dtype.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, kernel_size, kernel_size, kernel_size, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, table: NeighbourTable) -> Tensor:
        if table.kernel_size != self.kernel_size:
            raise ValueError(f"the neighbour table is of kernel size {table.kernel_size}, not {self.kernel_size}")
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _SubMConv.apply(x.to(dtype), self.weight.flatten(1, 3).to(dtype), bias, table)
