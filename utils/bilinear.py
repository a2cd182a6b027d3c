"""Reading maps between their pixels: torch's grid_sample, with a gradient that --deterministic allows on a GPU; and
F.interpolate as a product.

Maps (N, C, H, W), grid (N, h, w, 2) as (x, y) in [-1, 1], (-1, -1) the outer corner of the first pixel, zeros outside:
grid_sample(align_corners=False). Its own gradient on CUDA adds up in whatever order threads arrive, and PyTorch refuses
it under use_deterministic_algorithms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def read_at(maps: Tensor, grid: Tensor) -> Tensor:
    """-> (N, C, h, w), differentiable in both."""
    if _must_be_deterministic(maps):
        return _Read.apply(maps, grid)
    return F.grid_sample(maps, grid, align_corners=False)


def read_gradient(grad: Tensor, maps: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of read_at: grad (N, C, h, w) of its result -> those of maps and grid, of their shapes."""
    if _must_be_deterministic(maps):
        return deterministic_gradient(grad, maps, grid)
    return torch.ops.aten.grid_sampler_2d_backward(grad, maps, grid, 0, 0, False, (True, True))    # bilinear, zeros


def _must_be_deterministic(maps: Tensor) -> bool:
    return torch.are_deterministic_algorithms_enabled() and maps.device.type != "cpu"


class _Read(torch.autograd.Function):
    """grid_sample with the gradient below. First derivatives only."""

    @staticmethod
    def forward(ctx, maps: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(maps, grid)
        return F.grid_sample(maps, grid, align_corners=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return deterministic_gradient(grad, *ctx.saved_tensors)


def deterministic_gradient(grad: Tensor, maps: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """read_gradient in sums of a fixed order: index_put_(accumulate=True), which sorts on CUDA. Several times slower,
    and holds four rows of C numbers for each point."""
    N, C, H, W = maps.shape
    x = ((grid[..., 0] + 1) * W - 1) / 2                                         # (N, h, w), in pixels
    y = ((grid[..., 1] + 1) * H - 1) / 2
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    rows = grad.permute(0, 2, 3, 1)                                              # (N, h, w, C)
    pixels = maps.permute(0, 2, 3, 1).reshape(N * H * W, C)
    grad_pixels = torch.zeros_like(pixels)
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    first = torch.arange(N, device=maps.device).view(N, 1, 1) * (H * W)
    for down in (0, 1):
        for along in (0, 1):
            column, row = left + along, top + down
            inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
            row, column = row.nan_to_num().clamp(0, H - 1), column.nan_to_num().clamp(0, W - 1)    # NaN is no index
            place = first + (row * W + column).long()
            share_x = right_share if along else 1 - right_share
            share_y = lower_share if down else 1 - lower_share
            weight = torch.where(inside, share_x * share_y, 0)
            grad_pixels.index_put_((place.flatten(),), (rows * weight[..., None]).flatten(0, 2), accumulate=True)
            slope = torch.where(inside, (pixels[place] * rows).sum(-1), 0)       # (N, h, w)
            grad_x += slope * share_y * (1 if along else -1)
            grad_y += slope * share_x * (1 if down else -1)
    grad_grid = torch.stack([grad_x * (W / 2), grad_y * (H / 2)], -1)
    return grad_pixels.view(N, H, W, C).permute(0, 3, 1, 2), grad_grid


def source_rows(source_height: int, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `height` rows of F.interpolate(mode="bilinear"): the row above and below it in the source, int64, and
    the share of the one below, float32; (height,) each."""
    rows = torch.arange(height, dtype=torch.float32)
    rows = ((rows + 0.5) * (source_height / height) - 0.5).clamp(min=0)
    upper = rows.floor().long().clamp(max=source_height - 1)
    return upper, (upper + 1).clamp(max=source_height - 1), rows - upper


def resize_weights(source_height: int, height: int, begin: int = 0, end: int | None = None) -> tuple[int, Tensor]:
    """Rows begin..end-1 of the matrix by which F.interpolate(mode="bilinear") makes `height` rows: the first source row
    they read, and their weights of it and the k - 1 after it, (end - begin, k) float32."""
    upper, lower, share = (values[begin:end] for values in source_rows(source_height, height))
    first, row = int(upper[0]), torch.arange(len(upper))
    weights = torch.zeros(len(upper), int(lower[-1]) + 1 - first)
    weights[row, upper - first] = 1 - share
    weights[row, lower - first] += share
    return first, weights
