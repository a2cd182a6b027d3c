"""Nomeformer: a transformer over the faces of a mesh, local inside clusters and global between them.

A mesh is cut into N clusters of up to F faces (data/mesh_clusters.py). Every block does three things:
  local    the faces of a cluster and its summary token attend to one another,
  global   the summary tokens of all clusters attend to one another,
  and the summary token, which now knows of the other clusters, enters the next block's local step.
With a single block there is no global step, and clusters cannot communicate: take two or more.
The cost is N F^2 + N^2, memory is linear in the number of faces (no score matrix is ever held).

After the per-face encoder that the downstream document calls `nomeformer` ("local attention with a summary token, then
a hierarchical global step"). Deviations: pre-norm and GELU instead of post-norm and ReLU; the summary tokens always
exchange information (the original's default never mixes clusters); dropout obeys eval(); position codes are sines of
the face and cluster centres in a normalised frame. Shapes: B meshes, N clusters, F face slots of a cluster, Dg
features, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

POSITION_OCTAVES = 6            # wavelengths 4, 2, ... 1/8 of the mesh's length unit, sqrt(area)
CHUNK = 1 << 15                 # sequences at a time: attention on CUDA takes up to 65,535


class PositionCode(nn.Module):
    """Sines and cosines of 3-d positions in 6 octaves, mapped linearly to E. position (..., 3) -> (..., E)."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequency", math.pi / 2 * 2.0 ** torch.arange(POSITION_OCTAVES), persistent=False)
        self.proj = nn.Linear(6 * POSITION_OCTAVES, embed_dim)

    def forward(self, position: Tensor) -> Tensor:
        phase = (position[..., None] * self.frequency).flatten(-2)               # (..., 18)
        return self.proj(torch.cat([phase.sin(), phase.cos()], dim=-1))          # (..., E)


class Attention(nn.Module):
    """Multi-head self-attention over T tokens through scaled_dot_product_attention. x (G, T, E), valid (G, T) bool;
    queries: only the first so many tokens ask, and come out."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, valid: Tensor, queries: int | None = None) -> Tensor:
        G, T, E = x.shape
        # Split, not unbound: the gradients of the three then meet in one copy, where their order is the layer's.
        query, key, value = (part.view(G, T, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        parts = [query[:, :, :queries], key, value, valid[:, None, None, :]]
        dropout = self.dropout if self.training else 0.0
        if G <= CHUNK:
            x = F.scaled_dot_product_attention(*parts, dropout_p=dropout)        # (G, heads, T, -1)
        else:
            x = torch.cat([F.scaled_dot_product_attention(*part, dropout_p=dropout)
                           for part in zip(*(part.split(CHUNK) for part in parts), strict=True)])
        return self.proj(x.transpose(1, 2).reshape(G, -1, E))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drop a residual branch of a whole group of tokens. x (G, T, E)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device) >= self.rate).to(x.dtype).div(1 - self.rate)


class Layer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, embed_dim))
        self.drop = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, valid: Tensor, queries: int | None = None) -> Tensor:
        x = x[:, :queries] + self.drop_path(self.drop(self.attn(self.norm1(x), valid, queries)))
        return x + self.drop_path(self.drop(self.mlp(self.norm2(x))))


class Block(nn.Module):
    """One local and one global step; the last block has no global one, whose result nobody would read.

    faces (B, N, F, E), summary (B, N, E) -> the same.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, dropout: float, drop_path: float,
                 is_last: bool = False) -> None:
        super().__init__()
        self.local_layer = Layer(embed_dim, num_heads, mlp_ratio, dropout, drop_path)
        self.global_layer = None if is_last else Layer(embed_dim, num_heads, mlp_ratio, dropout, drop_path)

    def forward(self, faces: Tensor, summary: Tensor, valid_face: Tensor,
                valid_cluster: Tensor) -> tuple[Tensor, Tensor]:
        B, N, slots, E = faces.shape
        tokens = torch.cat([summary[:, :, None], faces], dim=2).view(B * N, slots + 1, E)
        # The summary token is always a valid key, so that an empty cluster cannot make a softmax over nothing (NaN).
        valid = F.pad(valid_face, (1, 0), value=True).view(B * N, slots + 1)
        tokens = self.local_layer(tokens, valid).view(B, N, slots + 1, E)
        summary, faces = tokens.split([1, slots], dim=2)                   # whose gradients are joined by one copy
        summary = summary.squeeze(2)
        return faces, summary if self.global_layer is None else self.global_layer(summary, valid_cluster)


class Nomeformer(nn.Module):
    """Per-face encoder: features (B, N, F, Dg) -> embedding (B, N, F, E); padded slots come out as 0.

    feature_dim Dg; embed_dim E, a multiple of num_heads; num_attention_blocks local steps, with a global one between
    any two; dropout and drop_path (stochastic depth) inside the layers; use_position False leaves the position codes
    out; gradient_checkpointing computes the blocks again in the backward pass instead of keeping what is in them. The
    features are standardised with `feature_mean` and `feature_std`, which travel in the state dict.
    """

    def __init__(self, feature_dim: int, embed_dim: int = 96, num_heads: int = 4, num_attention_blocks: int = 6,
                 mlp_ratio: float = 2.0, dropout: float = 0.0, drop_path: float = 0.0,
                 use_position: bool = True, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"model.embedding_dim={embed_dim} is not a multiple of model.num_heads={num_heads}")
        if num_attention_blocks < 1 or not 0 <= drop_path < 1:
            raise ValueError(f"model.num_attention_blocks={num_attention_blocks} must be at least 1, "
                             f"model.drop_path={drop_path} in [0, 1)")
        self.embed_dim, self.feature_dim = embed_dim, feature_dim
        self.use_position = use_position
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.embed = nn.Linear(feature_dim, embed_dim)
        if use_position:
            self.face_position = PositionCode(embed_dim)
            self.cluster_position = PositionCode(embed_dim)
        self.summary_token = nn.Parameter(torch.zeros(embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, dropout, drop_path, is_last=i == num_attention_blocks - 1)
            for i in range(num_attention_blocks))
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)

    def forward(self, features: Tensor, masks: Tensor, centroid: Tensor, visible: Tensor | None = None,
                fuse: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """masks (B, N, F) bool, True = a face; centroid (B, N, F, 3) face centres in the normalised frame.

        visible (B, N) bool hides the other clusters: their features are zeroed, and no token ever attends to them
        (I-JEPA's context). Their own output slots are 0. fuse maps the face tokens (B, N, F, E) to others of that shape
        before the first block. Returns (B, N, F, E).
        """
        if visible is not None:
            masks = masks & visible[:, :, None]
        valid_cluster = masks.any(-1)                                                            # (B, N)
        features = torch.where(masks[..., None], (features - self.feature_mean) / self.feature_std, 0.0)
        centroid = torch.where(masks[..., None], centroid, 0.0)
        center = centroid.sum(2) / masks.sum(2, keepdim=True).clamp(min=1)                       # (B, N, 3)
        faces = self.embed(features)                                                             # (B, N, F, E)
        if fuse is not None:
            faces = fuse(faces)
        summary = self.summary_token.expand(*center.shape[:2], -1)                               # (B, N, E)
        if self.use_position:
            faces, summary = faces + self.face_position(centroid), summary + self.cluster_position(center)
        # Keys of the global step: a mesh with no visible cluster keeps its (empty) summary tokens rather than NaN.
        keys = valid_cluster | ~valid_cluster.any(1, keepdim=True)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                faces, summary = checkpoint(block, faces, summary, masks, keys, use_reentrant=False)
            else:
                faces, summary = block(faces, summary, masks, keys)
        return torch.where(masks[..., None], self.norm(faces), 0.0)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
