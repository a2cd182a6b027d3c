"""The per-face segmentation model: a (pre-trained) mesh encoder and a classification head on every face."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.nomeformer import Nomeformer, init_weights
from utils.params import freeze, unfreeze_last


class DownstreamClassifier(nn.Module):
    """Encoder + head: features (B, N, F, Dg), masks (B, N, F), centroid (B, N, F, 3) -> logits (B, N, F, C).

    head "mlp": E -> E/2 -> E/4 -> C with LayerNorm, GELU and dropout between, as the downstream document draws it; "linear": one
    layer, the usual probe. unfrozen_layers: 0 freezes the encoder, k trains its last k blocks and the final norm, "all" trains
    everything. What is frozen stays in eval mode whatever train() says. Raises ValueError for a k the encoder does not have.
    """

    def __init__(self, encoder: Nomeformer, num_classes: int, head: str = "mlp", dropout: float = 0.1,
                 unfrozen_layers: int | str = 0) -> None:
        super().__init__()
        E = encoder.embed_dim
        self.encoder = encoder
        if head == "linear":
            self.head: nn.Module = nn.Linear(E, num_classes)
        else:
            self.head = nn.Sequential(nn.Linear(E, E // 2), nn.LayerNorm(E // 2), nn.GELU(), nn.Dropout(dropout),
                                      nn.Linear(E // 2, E // 4), nn.LayerNorm(E // 4), nn.GELU(), nn.Dropout(dropout),
                                      nn.Linear(E // 4, num_classes))
        self.head.apply(init_weights)
        if unfrozen_layers != "all":
            freeze(encoder)
            if unfrozen_layers:
                unfreeze_last(encoder.blocks, unfrozen_layers, encoder.norm)
        self.train()

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

    def embed(self, features: Tensor, masks: Tensor, centroid: Tensor) -> Tensor:
        """(B, N, F, E) embeddings of the faces; without gradient where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_is_frozen):
            return self.encoder(features, masks, centroid)

    def forward(self, features: Tensor, masks: Tensor, centroid: Tensor) -> Tensor:
        return self.head(self.embed(features, masks, centroid))     # (B, N, F, C)
