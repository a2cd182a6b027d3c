"""Multi-scale deformable attention (Zhu et al. 2021, eq. 3) in plain PyTorch, and the two position codes around it.

Each query looks at a few points of each level, placed by learned offsets around its reference point, instead of at
all positions. Bilinear reading is `grid_sample`, whose own gradient replaces the CUDA extension of the original: it
runs wherever PyTorch runs (under --deterministic on a GPU with that of utils/bilinear.py).
B images, Lq queries, S value positions over all levels, C channels, d channels of a head.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.bilinear import read_gradient
from utils.parts import rows_at_once

MAX_SIZES = 64                 # of each position code below: sizes whose result is kept


def _cached(function):
    """Keep the last results. Made outside inference mode, or a later training step could not save them."""
    @functools.lru_cache(MAX_SIZES)
    def kept(*args):
        with torch.inference_mode(False):
            return function(*args)

    @functools.wraps(function)
    def call(*args):               # torch.compile keeps constants itself and warns of other caches
        return function(*args) if torch.compiler.is_compiling() else kept(*args)
    return call


@_cached
def grid_centers(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres of the cells of several grids, row by row, one grid after the other: (sum H W, 2) float32 (x, y) in
    [0, 1]. The result is kept for the next call: do not write to it."""
    grids = []
    for H, W in shapes:
        y = (torch.arange(H, device=device) + 0.5) / H
        x = (torch.arange(W, device=device) + 0.5) / W
        grids.append(torch.stack([x.expand(H, W), y[:, None].expand(H, W)], dim=-1).flatten(0, 1))       # (H W, 2)
    return torch.cat(grids)


@_cached
def _level_cells(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Cells of each level as (W, H): (levels, 1, 1, 2) float32. Kept, so that no step copies it to the device."""
    return torch.tensor([(W, H) for H, W in shapes], dtype=torch.float32, device=device).view(-1, 1, 1, 2)


@_cached
def sine_embedding(H: int, W: int, dim: int, device: torch.device) -> Tensor:
    """Sines and cosines of the row, then of the column, of each cell: (H W, dim) float32; `dim` a multiple of 4.

    As in DETR (Carion et al. 2020), normalised to (0, 2 pi], temperature 10000. Kept for the next call.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, device=device) * 4 / dim)            # (dim/4,)

    def code(count: int) -> Tensor:
        step = torch.scalar_tensor(2 * math.pi / (count + 1e-6), device=device)              # count may be a symbol
        angle = torch.arange(1, count + 1, device=device) * step
        phase = angle[:, None] * frequency            # (count, dim/4)
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)            # (count, dim/2)

    row, column = code(H)[:, None].expand(H, W, -1), code(W).expand(H, W, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


class _WeightedRead(torch.autograd.Function):
    """Weighted sum of what is read at the points of all levels, level by level.

    Plain autograd would keep all that was read, (B heads, levels, d, points, Lq), for every layer: the largest tensors
    of the model. The backward pass reads again instead, which costs little beside it. First derivatives only.
    """

    @staticmethod
    def forward(ctx, maps: Tensor, grid: Tensor, weight: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """maps (N, d, S), grid (N, levels, points, Lq, 2) in [-1, 1], weight (N, levels, points, Lq) -> (N, d, Lq)."""
        ctx.save_for_backward(maps, grid, weight)
        ctx.shapes = shapes
        out = maps.new_zeros(*maps.shape[:2], grid.shape[3])
        for some in _parts(maps):
            total = out[some]
            for level, part in enumerate(_levels(maps[some], shapes)):
                read = F.grid_sample(part, grid[some, level], align_corners=False)           # (n, d, points, Lq)
                for point in range(read.shape[2]):
                    total.addcmul_(read[:, :, point], weight[some, None, level, point])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        maps, grid, weight = ctx.saved_tensors
        grad_maps, grad_grid, grad_weight = torch.empty_like(maps), torch.empty_like(grid), torch.empty_like(weight)
        for some in _parts(maps):
            grad_out = grad[some].unsqueeze(2)                                               # (n, d, 1, Lq)
            grad_parts = _levels(grad_maps[some], ctx.shapes)
            for level, part in enumerate(_levels(maps[some], ctx.shapes)):
                read = F.grid_sample(part, grid[some, level], align_corners=False)
                grad_weight[some, level] = read.mul_(grad_out).sum(1)
                torch.mul(grad_out, weight[some, None, level], out=read)                     # now the gradient of read
                grad_part, grad_grid[some, level] = read_gradient(read, part, grid[some, level])
                grad_parts[level].copy_(grad_part)
        return grad_maps, grad_grid, grad_weight, None


def _parts(maps: Tensor) -> list[slice]:
    """Of the N heads: on a CPU one for each thread, in whose cache all that is read then stays."""
    count = rows_at_once(maps, 1)
    return [slice(start, start + count) for start in range(0, len(maps), count)]


def _levels(maps: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(N, d, S) -> views (N, d, H, W)."""
    return [part.unflatten(-1, shape) for part, shape in zip(maps.split([H * W for H, W in shapes], -1), shapes,
                                                             strict=True)]


class MSDeformAttn(nn.Module):
    """Deformable attention over `num_levels` maps, `num_points` points each; the values are `ratio` * C wide.

    Offsets, weights and reading are computed in float32 (float64 stays) whatever autocast says: bfloat16 would place
    the points up to 1/32 of a cell wrongly at an offset of 4 cells. ValueError: widths that the heads do not divide.
    """

    def __init__(self, embed_dim: int, num_levels: int, num_heads: int, num_points: int, ratio: float = 1.0) -> None:
        super().__init__()
        value_dim = int(embed_dim * ratio)
        if value_dim % num_heads:
            raise ValueError(f"deformable attention: {num_heads} heads do not divide the value width {value_dim} "
                             f"(= {embed_dim} x {ratio}); choose another number of heads or another width")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, value_dim)
        self.output_proj = nn.Linear(value_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's start: equal weights; point p of head k lies p + 1 cells away, in direction k of a ring."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1)            # (heads, 2)
        ring = ring / ring.abs().max(-1, keepdim=True)[0]
        steps = torch.arange(1, self.num_points + 1)
        bias = (ring[:, None, None] * steps[:, None]).expand(-1, self.num_levels, -1, -1)
        with torch.no_grad():
            nn.init.zeros_(self.sampling_offsets.weight)
            self.sampling_offsets.bias.copy_(bias.flatten())
            for layer in (self.attention_weights, self.value_proj, self.output_proj):
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(self.attention_weights.weight)
            nn.init.xavier_uniform_(self.value_proj.weight)
            nn.init.xavier_uniform_(self.output_proj.weight)

    def forward(self, query: Tensor, reference_points: Tensor, value: Tensor,
                spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """query (B, Lq, C); reference_points (B or 1, Lq, levels or 1, 2) as (x, y) in [0, 1]; value (B, S, C), the
        levels one after the other, row by row; spatial_shapes: (H, W) of each level, sum of H W = S -> (B, Lq, C).

        Points outside a map read zeros. Offsets count in cells of the level. ValueError: shapes that do not fit.
        """
        B, Lq, _ = query.shape
        sizes = [H * W for H, W in spatial_shapes]
        if len(sizes) != self.num_levels or sum(sizes) != value.shape[1]:
            raise ValueError(f"deformable attention: {value.shape[1]} value positions do not fit the "
                             f"{self.num_levels} levels {list(spatial_shapes)}")
        value = self.value_proj(value).transpose(1, 2)                                       # (B, heads d, S)
        with _no_autocast(query):
            query, value = _at_least_float32(query), _at_least_float32(value)
            grid, weight = self._points(query, reference_points, spatial_shapes)
            maps = value.reshape(B * self.num_heads, -1, value.shape[-1])                    # (B heads, d, S)
            out = _WeightedRead.apply(maps, grid, weight, tuple(spatial_shapes))             # (B heads, d, Lq)
        return self.output_proj(out.reshape(B, -1, Lq).transpose(1, 2))

    def _points(self, query: Tensor, reference_points: Tensor,
                spatial_shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """-> where to read, (B heads, levels, points, Lq, 2) in [-1, 1], and weights (B heads, levels, points, Lq).

        Queries last: the softmax and the sum over points then run along rows of Lq neighbours, several times faster.
        """
        B, Lq, _ = query.shape
        split = (self.num_heads, self.num_levels, self.num_points)
        offset = self.sampling_offsets(query).view(B, Lq, *split, 2).permute(0, 2, 3, 4, 1, 5).contiguous()
        cells = _level_cells(tuple(spatial_shapes), query.device).to(offset.dtype)
        center = reference_points.to(offset.dtype).transpose(1, 2)[:, None, :, None]         # (B, 1, levels, 1, Lq, 2)
        grid = torch.addcmul(2 * center - 1, offset, 2 / cells)                  # (B, heads, levels, points, Lq, 2)
        weight = self.attention_weights(query).transpose(1, 2).reshape(B * self.num_heads, -1, Lq).softmax(1)
        return grid.flatten(0, 1), weight.unflatten(1, split[1:])


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
