"""Rotary position embedding of points in metres: what Utonia adds to the attention of Point Transformer V3.

Su et al., RoFormer (arXiv 2104.09864), in three dimensions as in Utonia (arXiv 2603.03283, github.com/Pointcept/Utonia,
Apache-2.0). A head of D channels is three chunks of D / 3, for x, y and z; an axis has D / 6 frequencies

    f_j = base^(-6 j / D),   j = 0 .. D / 6 - 1              D = 18, base 10: 1, 0.464, 0.215 (no 2 pi)

and channel j of the first half of its chunk turns with channel j of the second half by the angle position x f_j. Query
and key are turned, the value is not, so attention sees differences of positions alone.

Deviations: angles and rotation are float32 under autocast as well (upstream's positions there have the dtype of the
network); a common shift of all positions, `shift_coords` upstream, is not drawn, because it changes nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """base of the frequencies; in training positions are multiplied by one factor an axis, log-uniform in
    [1 / jitter, jitter], and by one for all axes in [1 / rescale, rescale]; None: not."""

    base: float
    jitter: float | None = None
    rescale: float | None = None


def frequencies(head_width: int, base: float) -> Tensor:
    """(head_width / 6,) float32 radians a metre, the largest, 1, first."""
    chunk = head_width // 3
    return torch.tensor([base ** (-2 * j / chunk) for j in range(chunk // 2)])


class PointRotary(nn.Module):
    """Turns query and key vectors by their points' positions.

    The persistent buffer inv_freq (D / 6,) has the official name: a weight file says by it that it rotates, and how.
    ValueError for a head width that is not a multiple of 6, a base that is not above 0, and a range below 1.
    """

    def __init__(self, head_width: int, rotation: Rotation):
        super().__init__()
        if head_width % 6:
            raise ValueError(f"heads of {head_width} channels cannot be rotated: three axes of pairs need a multiple "
                             f"of 6 (Utonia has 18)")
        if not isinstance(rotation.base, int | float) or not 0 < rotation.base < math.inf:
            raise ValueError(f"rope_base is {rotation.base!r}; expected a number above 0")
        for name, widest in (("jitter_coords", rotation.jitter), ("rescale_coords", rotation.rescale)):
            if widest is not None and (not isinstance(widest, int | float) or not 1 <= widest < math.inf):
                raise ValueError(f"{name} is {widest!r}; expected the largest factor, 1 or above, or null")
        self.rotation = rotation
        self.register_buffer("inv_freq", frequencies(head_width, rotation.base))

    def factors(self, device: torch.device) -> Tensor | None:
        """(3,) what positions are multiplied by in one attention of one training step, the same for the whole batch;
        None in eval mode. From torch's global generator of the device, as drop path."""
        if not self.training or (self.rotation.jitter is None and self.rotation.rescale is None):
            return None
        logarithm = torch.zeros(3, device=device)
        if self.rotation.jitter is not None:
            most = math.log(self.rotation.jitter)
            logarithm = logarithm + torch.empty(3, device=device).uniform_(-most, most)
        if self.rotation.rescale is not None:
            most = math.log(self.rotation.rescale)
            logarithm = logarithm + torch.empty(1, device=device).uniform_(-most, most)
        return logarithm.exp()

    def angles(self, coord: Tensor) -> Tensor:
        """coord (n, 3) metres -> (n, 3, D / 6) float32 radians: axis, frequency."""
        coord = coord.float()
        factors = self.factors(coord.device)
        if factors is not None:
            coord = coord * factors
        return coord[:, :, None] * self.inv_freq.float()

    def forward(self, vectors: Tensor, coord: Tensor) -> Tensor:
        """vectors (n, V, D) of any dtype, coord (n, 3) metres -> (n, V, D) turned, in the dtype of vectors."""
        angle = self.angles(coord)[:, None]                                          # (n, 1, 3, D / 6)
        cosine = angle.cos()
        sine = angle.sin()
        first, second = vectors.unflatten(2, (3, 2, -1)).unbind(3)                   # (n, V, 3, D / 6) each
        turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], 3)
        return turned.flatten(2).to(vectors.dtype)
