"""DiffusionNet: learned heat diffusion along the surface, gradients in tangent planes, and an MLP at every vertex.

Sharp, Attaiki, Crane and Ovsjanikov, "DiffusionNet: Discretization Agnostic Learning on Surfaces", ACM Transactions on
Graphics 41(3), 2022. Parameters have the names of the reference code (github.com/nmwsharp/diffusion-net, MIT), so that
its weights load as they are. Deviations: a mesh at a time instead of batches of one; outside training, a diffusion time
below 1e-8 is clamped for the pass and stays in the parameter; diffusion and gradients are float32 under autocast.

Shapes: V vertices, k eigenpairs, C channels (width), F faces. The mesh comes as `Operators`, which
data/mesh_operators.py prepares. Memory: `memory_needed`; with 4 blocks of 128 channels about 56 kB a vertex in
training, 11 kB without gradients.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.memory import check_memory
from utils.surface_operators import Operators, uncompiled

SMALLEST_TIME = 1e-8
# Floats per vertex and channel, from the largest resident memory of passes over 20,000 to 250,000 vertices (CPU).
PASSING_FLOATS = 22             # without gradients: one block at its widest place
KEPT_FLOATS = 25                # in training: what every block keeps for the backward pass
BACKWARD_FLOATS = 10            # in training: besides
CHECKPOINTED_FLOATS = 46        # in training with gradient checkpointing: one block, forward and backward
CHECKPOINTED_KEPT_FLOATS = 8    # and what every block keeps then
WHERE = ("vertices", "faces", "edges", "global_mean")


# -- layers ------------------------------------------------------------------------------------------------------------

class LearnedTimeDiffusion(nn.Module):
    """Heat diffusion with one learned time a channel, in the basis of the eigenvectors. x (V, C) -> (V, C).

    The time is at least 1e-8. Clamping passes the gradient on, so that a time that starts at 0 can grow; in training
    the parameter itself is clamped, as in the reference code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.diffusion_time = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mass: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
        if self.training:
            self._clamp()
        time = self.diffusion_time.float()
        time = time + (time.clamp(min=SMALLEST_TIME) - time).detach()
        spectrum = eigenvectors.T @ (x * mass[:, None])                          # (k, C)
        return eigenvectors @ (torch.exp(-eigenvalues[:, None] * time) * spectrum)

    @uncompiled
    def _clamp(self) -> None:
        # .data: a second mesh of the batch must not look as if it changed what the first one's backward pass needs.
        self.diffusion_time.data.clamp_(min=SMALLEST_TIME)


class SpatialGradientFeatures(nn.Module):
    """tanh of inner products between a channel's gradient and a learned mix of all channels' gradients, which does not
    depend on the axes of the tangent planes.

    vectors (V, C, 2), x and y along the axes -> (V, C). rotations: the mix may also turn the gradients; without, a mesh
    needs no consistent orientation.
    """

    def __init__(self, width: int, rotations: bool = True) -> None:
        super().__init__()
        self.rotations = rotations
        if rotations:
            self.A_re = nn.Linear(width, width, bias=False)
            self.A_im = nn.Linear(width, width, bias=False)
        else:
            self.A = nn.Linear(width, width, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        x, y = vectors.movedim(-1, 0)                                            # (V, C) each
        if self.rotations:
            mixed_x = self.A_re(x) - self.A_im(y)
            mixed_y = self.A_re(y) + self.A_im(x)
        else:
            mixed_x, mixed_y = self.A(x), self.A(y)
        return torch.tanh(x * mixed_x + y * mixed_y)


def mini_mlp(sizes: Sequence[int], dropout: float = 0.5) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between, and dropout before every one but the first. (V, sizes[0]) ->
    (V, sizes[-1])."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (size, next_size) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        if i:
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"dropout_{i}"] = nn.Dropout(dropout)
        layers[f"miniMLP_mlp_layer_{i:03d}"] = nn.Linear(size, next_size)
    return nn.Sequential(layers)


class DiffusionNetBlock(nn.Module):
    """x + MLP([x, diffused x, gradient features of diffused x]). x (V, C) -> (V, C)."""

    def __init__(self, width: int, hidden: Sequence[int], dropout: float = 0.5, gradient_features: bool = True,
                 gradient_rotations: bool = True) -> None:
        super().__init__()
        self.diffusion = LearnedTimeDiffusion(width)
        self.gradient_features = SpatialGradientFeatures(width, gradient_rotations) if gradient_features else None
        self.mlp = mini_mlp([(3 if gradient_features else 2) * width, *hidden, width], dropout)

    def forward(self, x: Tensor, operators: Operators, gradient: Tensor | None) -> Tensor:
        """gradient: `operators.gradient()`, made once for all blocks; not needed without gradient features."""
        with torch.autocast(x.device.type, enabled=False):
            diffused = self.diffusion(x, operators.mass, operators.eigenvalues, operators.eigenvectors)
            parts = [x, diffused]
            if self.gradient_features is not None:
                vectors = torch.sparse.mm(gradient, diffused).unflatten(0, (2, -1))                  # (2, V, C)
                parts.append(self.gradient_features(vectors.movedim(0, -1)))     # a view: x and y each lie together
        return self.mlp(torch.cat(parts, dim=-1)).float() + x


# -- network -----------------------------------------------------------------------------------------------------------

class DiffusionNet(nn.Module):
    """features (V, in_channels) of the vertices of one mesh -> logits, or without num_classes the width-C embedding.

    width C; hidden: sizes of the MLPs' hidden layers, [C, C] by default; dropout inside the MLPs. The official networks
    are DiffusionNet(16 or 3, 8). gradient_checkpointing computes the blocks again in the backward pass instead of
    keeping what is in them: a quarter less memory with 4 blocks, two fifths with 8, for a third more time.
    """

    def __init__(self, in_channels: int, num_classes: int | None = None, width: int = 128, num_blocks: int = 4,
                 hidden: Sequence[int] | None = None, dropout: float = 0.5, gradient_features: bool = True,
                 gradient_rotations: bool = True, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        if num_blocks < 1 or not 0 <= dropout < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1, dropout={dropout} in [0, 1)")
        hidden = [width, width] if hidden is None else list(hidden)
        self.in_channels, self.embed_dim, self.num_blocks = in_channels, width, num_blocks
        self.gradient_checkpointing = gradient_checkpointing
        self.first_lin = nn.Linear(in_channels, width)
        self.last_lin = None if num_classes is None else nn.Linear(width, num_classes)
        for b in range(num_blocks):
            self.add_module(f"block_{b}", DiffusionNetBlock(width, hidden, dropout, gradient_features,
                                                            gradient_rotations))

    @property
    def blocks(self) -> list[DiffusionNetBlock]:
        return [getattr(self, f"block_{b}") for b in range(self.num_blocks)]

    def embed(self, features: Tensor, operators: Operators) -> Tensor:
        """(V, in_channels) -> (V, C) float32: everything before the last layer. Raises ValueError where memory for the
        mesh is missing."""
        self._check_memory(features)
        with_gradient = torch.is_grad_enabled()
        has_gradients = self.block_0.gradient_features is not None
        gradient = operators.gradient() if has_gradients else None
        x = self.first_lin(features).float()
        for block in self.blocks:
            if self.gradient_checkpointing and with_gradient:
                x = checkpoint(block, x, operators, gradient, use_reentrant=False)
            else:
                x = block(x, operators, gradient)
        return x

    def forward(self, features: Tensor, operators: Operators, where: str = "vertices",
                elements: Tensor | None = None) -> Tensor:
        """Logits (or embeddings) at the vertices (V, .), at faces (F, .) or edges (E, .), the means over the vertices
        in elements (F, 3) or (E, 2), or one for the whole mesh (.,), the mean weighted by area."""
        x = self.embed(features, operators)
        if self.last_lin is not None:
            x = self.last_lin(x)
        return at_elements(x, where, elements, operators.mass)

    @uncompiled
    def _check_memory(self, features: Tensor) -> None:
        training, V = torch.is_grad_enabled(), len(features)
        check_memory(self.memory_needed(V, training), features.device, f"a mesh of {V:,} vertices",
                     "simplify it, or set model.gradient_checkpointing=true" if training else "simplify it")

    def memory_needed(self, num_vertices: int, training: bool) -> int:
        """Bytes of a pass over a mesh, in training with what is kept for the backward pass; operators not counted."""
        floats = PASSING_FLOATS
        if training:
            floats = BACKWARD_FLOATS + KEPT_FLOATS * self.num_blocks
        if training and self.gradient_checkpointing:
            floats = CHECKPOINTED_FLOATS + CHECKPOINTED_KEPT_FLOATS * self.num_blocks
        return 4 * num_vertices * self.embed_dim * floats


def at_elements(x: Tensor, where: str, elements: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
    """Values at the vertices x (V, C) -> at `where`, as `DiffusionNet.forward` says. Means of logits, not of
    probabilities."""
    if where not in WHERE:
        raise ValueError(f"outputs at {where!r}: expected one of {', '.join(WHERE)}")
    if where == "vertices":
        return x
    if where == "global_mean":
        return (x * mass[:, None]).sum(0) / mass.sum()
    if elements is None:
        raise ValueError(f"outputs at {where} need their vertices: elements (F, 3) or (E, 2)")
    return x[elements].mean(1)
