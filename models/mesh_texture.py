"""Texture beside geometry: colours sampled on every face become one vector, fused into the face's token.

After the seeds' IntegratedTextureGeometryModel: the texture joins the geometry of a face BEFORE the transformer blocks,
so neighbours see it. Deviations: fusion happens at width E, behind the encoder's own first layer, so that a pre-trained
geometry encoder keeps all its tensors; "concat" uses the texture; faces without texture keep their geometry token
exactly, whatever lies in their texture slots. Shapes as in models/nomeformer.py, and T texture samples of a face, Et
texture width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.diffusion_net import DiffusionNet
from models.downstream import DownstreamClassifier, SurfaceClassifier
from models.nomeformer import Layer, Nomeformer, init_weights

FUSIONS = ("gated", "concat", "add")
CHUNK = 1 << 15                     # faces at a time: attention on CUDA takes up to 65,535 sequences


class TextureEncoder(nn.Module):
    """Colours (G, T, 3) in 0..1, valid (G, T) bool -> one vector (G, Et) a face: a linear layer, one attention layer in
    which a summary token looks at the samples (their order does not matter), a norm."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3, embed_dim)
        self.summary_token = nn.Parameter(torch.zeros(embed_dim))
        self.layer = Layer(embed_dim, math.gcd(embed_dim, 4), 2.0, 0.0, 0.0)
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)

    def forward(self, colors: Tensor, valid: Tensor) -> Tensor:
        samples = self.embed(torch.where(valid[..., None], 4 * colors - 2, 0.0))         # (G, T, Et)
        tokens = torch.cat([self.summary_token.expand(len(samples), 1, -1), samples], dim=1)
        # The summary token is a valid key of its own, so that a face without samples is no softmax over nothing (NaN).
        valid = nn.functional.pad(valid, (1, 0), value=True)
        return self.norm(self.layer(tokens, valid, queries=1)[:, 0])                     # (G, Et)


class TextureFusion(nn.Module):
    """Geometry (G, E) and texture (G, Et) -> (G, E). gated: geometry + gate * W texture, the gate from both; add: the
    same without the gate; concat: W [geometry, texture]."""

    def __init__(self, embed_dim: int, texture_dim: int, method: str) -> None:
        super().__init__()
        if method not in FUSIONS:
            raise ValueError(f"model.fusion_method={method!r}: expected one of {', '.join(FUSIONS)}")
        self.method = method
        self.proj = nn.Linear(texture_dim + (embed_dim if method == "concat" else 0), embed_dim)
        self.gate = nn.Linear(embed_dim + texture_dim, embed_dim) if method == "gated" else None
        self.apply(init_weights)

    def forward(self, geometry: Tensor, texture: Tensor) -> Tensor:
        both = torch.cat([geometry, texture], dim=-1)
        if self.method == "concat":
            return self.proj(both)
        return geometry + self.proj(texture) * (1.0 if self.gate is None else self.gate(both).sigmoid())


def fuse_texture(faces: Tensor, texture_sequences: Tensor, texture_masks: Tensor, encoder: TextureEncoder,
                 fusion: TextureFusion) -> Tensor:
    """Geometry faces (B, N, F, E) with their colours (B, N, F, T, 3) and masks (B, N, F, T) -> (B, N, F, E); a face
    without texture keeps its geometry exactly."""
    some = texture_masks.any(-1)
    # One face where none has texture: so no tensor is empty, and no parameter without a gradient (for DDP).
    some[0, 0, 0] |= ~some.any()
    valid = texture_masks[some]                                                  # (G, T)
    texture = torch.cat([encoder(*part) for part in
                         zip(texture_sequences[some].split(CHUNK), valid.split(CHUNK), strict=True)])
    geometry = faces[some]                                                       # (G, E)
    fused = fusion(geometry, texture).to(faces.dtype)
    return faces.index_put((some,), torch.where(valid.any(-1, keepdim=True), fused, geometry))


class IntegratedTextureGeometryModel(Nomeformer):
    """A Nomeformer whose face tokens know the texture. Arguments of the Nomeformer, then texture_embed_dim Et and
    fusion (FUSIONS). All that is new lies under texture_*: the other tensors are those of the geometry encoder."""

    def __init__(self, *geometry, texture_embed_dim: int = 32, fusion: str = "gated", **options) -> None:
        super().__init__(*geometry, **options)
        self.texture_encoder = TextureEncoder(texture_embed_dim)
        self.texture_fusion = TextureFusion(self.embed_dim, texture_embed_dim, fusion)

    def forward(self, features: Tensor, masks: Tensor, centroid: Tensor, visible: Tensor | None = None,
                texture_sequences: Tensor | None = None, texture_masks: Tensor | None = None) -> Tensor:
        """As the Nomeformer, with texture_sequences (B, N, F, T, 3) in 0..1 and texture_masks (B, N, F, T) bool;
        without them, geometry alone. Returns (B, N, F, E)."""
        if texture_sequences is None:
            return super().forward(features, masks, centroid, visible)

        def fuse(faces: Tensor) -> Tensor:
            return fuse_texture(faces, texture_sequences, texture_masks, self.texture_encoder, self.texture_fusion)

        return super().forward(features, masks, centroid, visible, fuse)


class IntegratedDownstreamClassifier(DownstreamClassifier):
    """DownstreamClassifier on an IntegratedTextureGeometryModel; unfrozen_layers speaks of the geometry encoder, the
    texture parts are always trained."""

    def __init__(self, encoder: IntegratedTextureGeometryModel, *args, **options) -> None:
        super().__init__(encoder, *args, **options)
        encoder.texture_encoder.requires_grad_(True)
        encoder.texture_fusion.requires_grad_(True)
        self.train()


class TexturedSurfaceClassifier(SurfaceClassifier):
    """SurfaceClassifier whose face embeddings are fused with the texture BEHIND the encoder, because DiffusionNet knows
    vertices, and colours belong to faces: neighbours do not see them. Further arguments: texture_embed_dim, fusion
    (FUSIONS). unfrozen_layers speaks of the encoder, the texture parts are always trained."""

    def __init__(self, encoder: DiffusionNet, *args, texture_embed_dim: int = 32, fusion: str = "gated",
                 **options) -> None:
        super().__init__(encoder, *args, **options)
        self.texture_encoder = TextureEncoder(texture_embed_dim)
        self.texture_fusion = TextureFusion(encoder.embed_dim, texture_embed_dim, fusion)

    def embed(self, features: Sequence, masks: Tensor, centroid: Tensor | None = None,
              texture_sequences: Tensor | None = None, texture_masks: Tensor | None = None) -> Tensor:
        """(B, 1, F, E); texture_sequences (B, 1, F, T, 3) in 0..1, texture_masks (B, 1, F, T). Without them, geometry
        alone."""
        faces = super().embed(features, masks, centroid)
        if texture_sequences is None:
            return faces
        return fuse_texture(faces, texture_sequences, texture_masks, self.texture_encoder, self.texture_fusion)

    def layer_id(self, name: str) -> int:
        return self.encoder.num_blocks + 1 if name.startswith("texture_") else super().layer_id(name)
