"""What a network knows of a triangle mesh besides its features, as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# torch.compiler.disable, but the compiler, which takes 2 s, is imported by the first call.
uncompiled = torch._disable_dynamo


class Operators(NamedTuple):
    """For models/diffusion_net.py, made by data/mesh_surfaces.py: mass (V,), eigenvalues (k,), eigenvectors (V, k),
    gradient_index (2, E) rows and columns, sorted, gradient_x and gradient_y (E,). float32, indices int32 or int64."""

    mass: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    gradient_index: Tensor
    gradient_x: Tensor
    gradient_y: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Operators:
        return Operators(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    @uncompiled
    def gradient(self) -> Tensor:
        """Both gradient matrices as one sparse matrix (2V, V), x over y."""
        V = len(self.mass)
        index = self.gradient_index.long()
        both = torch.cat([index, index + index.new_tensor([[V], [0]])], dim=1)
        values = torch.cat([self.gradient_x, self.gradient_y])
        return torch.sparse_coo_tensor(both, values, (2 * V, V), is_coalesced=True, check_invariants=False)
