"""Multi-scale deformable attention (Zhu et al. 2021, eq. 3) in plain PyTorch, and the two position codes around it.

Each query looks at a few points of each level, placed by learned offsets around its reference point, instead of at
all positions. Bilinear reading is `grid_sample`, whose own gradient replaces the CUDA extension of the original: it
runs wherever PyTorch runs. B images, Lq queries, S value positions over all levels, C channels, d channels of a head.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SIZES = 64                 # of each position code below: sizes whose result is kept


def _cached(function):
    """Keep the last results. Made outside inference mode, or a later training step could not save them."""
    @functools.wraps(function)
    def make(*args):
        with torch.inference_mode(False):
            return function(*args)
    return functools.lru_cache(MAX_SIZES)(make)


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
    """Cells of each level as (W, H): (levels, 1, 1, 1, 1, 2) float32. Kept, so that no step copies it to the device."""
    return torch.tensor([(W, H) for H, W in shapes], dtype=torch.float32, device=device).view(-1, 1, 1, 1, 1, 2)


@_cached
def sine_embedding(H: int, W: int, dim: int, device: torch.device) -> Tensor:
    """Sines and cosines of the row, then of the column, of each cell: (H W, dim) float32; `dim` a multiple of 4.

    As in DETR (Carion et al. 2020), normalised to (0, 2 pi], temperature 10000. Kept for the next call.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, device=device) * 4 / dim)            # (dim/4,)

    def code(count: int) -> Tensor:
        angle = torch.arange(1, count + 1, device=device) * (2 * math.pi / (count + 1e-6))
        phase = angle[:, None] * frequency            # (count, dim/4)
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)            # (count, dim/2)

    row, column = code(H)[:, None].expand(H, W, -1), code(W).expand(H, W, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1)


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
        value = self.value_proj(value).transpose(1, 2)            # (B, heads d, S)
        with _no_autocast(query):
            query, value = _at_least_float32(query), _at_least_float32(value)
            grid, weight = self._points(query, reference_points, spatial_shapes)
            maps = value.reshape(B * self.num_heads, -1, value.shape[-1]).split(sizes, dim=-1)
            out: Tensor | int = 0
            # Level by level: all at once would hold (B heads, d, points, Lq) for every level two times.
            for level, (part, shape) in enumerate(zip(maps, spatial_shapes, strict=True)):
                read = F.grid_sample(part.unflatten(-1, shape), grid[level], align_corners=False)
                out = out + (read * weight[level]).sum(2)            # (B heads, d, Lq)
        return self.output_proj(out.reshape(B, -1, Lq).transpose(1, 2))

    def _points(self, query: Tensor, reference_points: Tensor,
                spatial_shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """-> where to read, (levels, B heads, points, Lq, 2) in [-1, 1], and weights (levels, B heads, 1, points, Lq).

        Points before queries: the sum over points then runs along rows of Lq neighbours in memory, which is faster.
        """
        B, Lq, _ = query.shape
        split = (B, Lq, self.num_heads, self.num_levels, self.num_points)
        offset = self.sampling_offsets(query).view(*split, 2).permute(3, 0, 2, 4, 1, 5).contiguous()
        cells = _level_cells(tuple(spatial_shapes), query.device).to(offset.dtype)
        center = reference_points.to(offset.dtype).permute(2, 0, 1, 3)[:, :, None, None]     # (levels, B, 1, 1, Lq, 2)
        grid = torch.addcmul(2 * center - 1, offset, 2 / cells)                  # (levels, B, heads, points, Lq, 2)
        weight = self.attention_weights(query).view(B, Lq, self.num_heads, -1).softmax(-1).view(split)
        weight = weight.permute(3, 0, 2, 4, 1)                                   # (levels, B, heads, points, Lq)
        return grid.flatten(1, 2), weight.flatten(1, 2).unsqueeze(2)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
