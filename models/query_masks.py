"""Queries that run through plain transformer blocks together with the patch tokens of an image: where each may look
while training (masked attention, annealed away), and the mask of each (Kerssies et al. 2025, EoMT; PMT likewise).

Tokens are in the order queries, class token and registers, patches row by row. B images, Q queries, C channels, h w the
grid of patches, N all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# -- masked attention --------------------------------------------------------------------------------------------------


def mask_probability(step: float, start: float, end: float, power: float = 0.9) -> float:
    """The probability that a query keeps its mask: 1 up to `start`, then falling, 0 from `end` on."""
    return (1 - min(max((step - start) / (end - start), 0), 1)) ** power


@torch.no_grad()
def allowed_patches(mask_logits: Tensor, grid: tuple[int, int], probability: Tensor | float,
                    random: Tensor | None = None) -> Tensor:
    """The patches that each query sees in the next block: those where its mask is above one half.

    mask_logits (B, Q, ., .), grid (h, w), probability with which a query keeps its mask; the others see all patches.
    random (B, Q) uniform in [0, 1), drawn where not given -> (B, Q, h w) bool. A query whose mask is empty sees no
    patch (Mask2Former opens such rows); the other queries, class token and registers are always seen, see `attend`.
    """
    small = F.interpolate(mask_logits.float(), grid, mode="bilinear", align_corners=False)
    if random is None:
        random = torch.rand(mask_logits.shape[:2], device=mask_logits.device)
    return (small > 0).flatten(2) | (random > probability).unsqueeze(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention of all tokens to all (B, heads, N, D); with `allowed` (B, Q, h w) the first Q, the queries, see of the
    last h w, the patches, only those. Everything else sees everything, so that no mask of N x N is made."""
    if allowed is None:
        return F.scaled_dot_product_attention(q, k, v)
    count = allowed.shape[1]
    mask = F.pad(allowed, (k.shape[2] - allowed.shape[2], 0), value=True).unsqueeze(1)           # (B, 1, Q, N)
    queries = F.scaled_dot_product_attention(q[:, :, :count], k, v, attn_mask=mask)
    return torch.cat([queries, F.scaled_dot_product_attention(q[:, :, count:], k, v)], 2)


# -- masks -------------------------------------------------------------------------------------------------------------


class UpscaleStep(nn.Module):
    """Twice the resolution: 2 x 2 transposed convolution, GELU, 3 x 3 convolution per channel, norm of the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, h, w, C) -> (B, 2 h, 2 w, C). Channels stay last: the convolution is one matrix product."""
        B, h, w, C = x.shape
        weight = self.conv1.weight.permute(2, 3, 1, 0).flatten(0, 2)                             # (4 C, C)
        x = F.linear(x, weight, self.conv1.bias.repeat(4)).view(B, h, w, 2, 2, C)
        x = F.gelu(x.transpose(2, 3).reshape(B, 2 * h, 2 * w, C))
        return self.norm(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def upscale_steps(dim: int, patch_size: int) -> nn.Sequential:
    """Steps that take the grid of patches to masks: two for patches of 16 pixels (stride 4), one for 14 (stride 7)."""
    return nn.Sequential(*(UpscaleStep(dim) for _ in range(max(1, patch_size.bit_length() - 3))))


def mask_mlp(dim: int) -> nn.Sequential:
    """Three linear layers that make a query's mask embedding."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
