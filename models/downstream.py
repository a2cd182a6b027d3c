"""The per-face segmentation models: a (pre-trained) mesh encoder and a classification head on every face."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from models.nomeformer import Nomeformer, init_weights
from utils.params import unfreeze_last


class DownstreamClassifier(nn.Module):
    """Encoder + head: features (B, N, F, Dg), masks (B, N, F), centroid (B, N, F, 3) -> logits (B, N, F, C).

    head "mlp": E -> E/2 -> E/4 -> C with LayerNorm, GELU and dropout between, as the downstream document draws it;
    "linear": one layer, the usual probe. unfrozen_layers: 0 freezes the encoder, k trains its last k blocks and the
    final norm, "all" trains everything. What is frozen stays in eval mode whatever train() says. Raises ValueError for
    a k the encoder does not have.
    """

    def __init__(self, encoder: Nomeformer, num_classes: int, head: str = "mlp", dropout: float = 0.1,
                 unfrozen_layers: int | str = 0) -> None:
        super().__init__()
        E = encoder.embed_dim
        self.encoder, self.num_classes = encoder, num_classes
        if head == "linear":
            self.head: nn.Module = nn.Linear(E, num_classes)
        else:
            self.head = nn.Sequential(nn.Linear(E, E // 2), nn.LayerNorm(E // 2), nn.GELU(), nn.Dropout(dropout),
                                      nn.Linear(E // 2, E // 4), nn.LayerNorm(E // 4), nn.GELU(), nn.Dropout(dropout),
                                      nn.Linear(E // 4, num_classes))
        self.head.apply(init_weights)
        encoder.requires_grad_(unfrozen_layers == "all")
        if unfrozen_layers != "all":
            unfreeze_last(encoder.blocks, unfrozen_layers, *([encoder.norm] if hasattr(encoder, "norm") else []))
        self.train()

    @property
    def num_layers(self) -> int:
        """For utils.params.layerwise_groups: the layers below the head."""
        return len(self.encoder.blocks) + 2

    def layer_id(self, name: str) -> int:
        """0 for what is before the blocks, then the blocks, their norm, and the head with the texture's part."""
        if name.startswith(("head.", "encoder.texture_")):
            return self.num_layers
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return self.num_layers - 1 if name.startswith("encoder.norm.") else 0

    @property
    def encoder_is_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> DownstreamClassifier:
        super().train(mode)
        for module in self.encoder.modules():                       # a module trains if something below it does
            module.training = mode and any(parameter.requires_grad for parameter in module.parameters())
        if mode:                                                    # dropout has no parameters: it follows its parent
            for parent in self.encoder.modules():
                for child in parent.children():
                    if next(child.parameters(), None) is None:
                        child.training = parent.training
        return self

    def embed(self, features: Tensor, masks: Tensor, centroid: Tensor, **texture: Tensor) -> Tensor:
        """(B, N, F, E) embeddings of the faces; texture: what models/mesh_texture.py wants besides.

        A frozen encoder runs without gradient, and on each mesh alone, without the padding behind its last cluster and
        face: then an embedding depends on nothing but its mesh, and one that was computed once and kept
        (training.cache_features) is the same to the last bit.
        """
        if not self.encoder_is_frozen:
            return self.encoder(features, masks, centroid, **texture)
        embedding = features.new_zeros(*features.shape[:3], self.encoder.embed_dim)
        with torch.no_grad():
            for b in range(len(features)):
                used = masks[b].nonzero()                                        # (faces, 2)
                if len(used):
                    N, slots = (used.amax(0) + 1).tolist()
                    one = (slice(b, b + 1), slice(N), slice(slots))
                    embedding[one] = self.encoder(features[one], masks[one], centroid[one]).to(embedding.dtype)
        return embedding

    def forward(self, features: Tensor | None, masks: Tensor | None, centroid: Tensor | None,
                embedding: Tensor | None = None, **texture: Tensor) -> Tensor:
        """Logits (B, N, F, C); with `embedding` (B, N, F, E), the result of an earlier embed, the encoder is not
        run."""
        return self.head(self.embed(features, masks, centroid, **texture) if embedding is None else embedding)


class SurfaceClassifier(DownstreamClassifier):
    """The same on a DiffusionNet without its last layer: features is the batch's data.mesh_surfaces.Surfaces.

    unfrozen_layers k trains the last k blocks, "all" the input layer, too. With head "linear" and the last layer of
    the official files in it (models/pretrained_mesh.load_diffusion_net), it is the official network: a mean over
    corners and a linear layer may change places.
    """

    def embed(self, features: Sequence, masks: Tensor, centroid: Tensor | None = None) -> Tensor:
        """(B, 1, F, E) embeddings of the faces, 0 where masks (B, 1, F) is False. Meshes go through the encoder one by
        one: each comes out as it does alone, to the last bit."""
        frozen = self.encoder_is_frozen
        with torch.no_grad() if frozen else nullcontext():
            each = [self.encoder(surface.features, surface.operators, "faces", surface.faces) for surface in features]
        slots = masks.shape[2]
        return torch.stack([nn.functional.pad(faces, (0, 0, 0, slots - len(faces))) for faces in each])[:, None]

    @property
    def num_layers(self) -> int:
        return self.encoder.num_blocks + 1

    def layer_id(self, name: str) -> int:
        """0 for the input layer, 1 .. blocks for the blocks, blocks + 1 for the head."""
        if name.startswith("head."):
            return self.encoder.num_blocks + 1
        part = name.split(".")[1]
        return int(part.removeprefix("block_")) + 1 if part.startswith("block_") else 0


def face_logits(network: nn.Module, batch: dict) -> Tensor:
    """Logits (B, N, F, C) of a collated batch, on the embeddings where they were computed before; network: a
    DownstreamClassifier, or what DDP and torch.compile made of it."""
    return network(batch.get("features"), batch["mask"], batch.get("centroid"), embedding=batch.get("embedding"),
                   **texture_of(batch))


def texture_of(batch: dict) -> dict:
    return {name: batch[name] for name in ("texture_sequences", "texture_masks") if name in batch}


def share_of(batch: dict) -> dict:
    """For a loss: which part of its polygon each triangle is, where a batch says it."""
    return {"share": batch["share"]} if "share" in batch else {}
