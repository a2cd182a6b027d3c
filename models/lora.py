"""Low-rank adaptation of the attention of a frozen Point Transformer V3 (Hu et al., LoRA, arXiv 2106.09685).

    qkv(x) = W x + b + (alpha / rank) B A dropout(x),     A (rank, C), B (3 C, rank)

A starts random and B at zero, so that the network starts unchanged. Rank, alpha and dropout are those of Concerto's
configs (github.com/Pointcept/Pointcept, MIT): every qkv of the encoder, nothing else; 32 C parameters a block, 313,344
for Concerto large. The updates are parameters of their own beside qkv (`attn.lora.a`, `attn.lora.b`), so that qkv keeps
its name and its pre-trained weight; upstream's names come from peft and differ. Upstream has no such config for Utonia.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, ALPHA, DROPOUT = 8, 16.0, 0.1
UPDATE = ".lora."                                           # in the names of all tensors of updates


class LowRankUpdate(nn.Module):
    """(alpha / rank) B A dropout(x): x (n, in_channels) -> (n, out_channels)."""

    def __init__(self, in_channels: int, out_channels: int, rank: int = RANK, alpha: float = ALPHA,
                 dropout: float = DROPOUT):
        super().__init__()
        self.factor, self.dropout = alpha / rank, dropout
        self.a = nn.Parameter(torch.empty(rank, in_channels))
        self.b = nn.Parameter(torch.zeros(out_channels, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))    # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return self.factor * F.linear(F.linear(x, self.a), self.b)

    def product(self) -> Tensor:
        """(out_channels, in_channels) float64 on the CPU: what the update adds to the weight."""
        return self.factor * self.b.detach().cpu().double() @ self.a.detach().cpu().double()


def add_lora(encoder: nn.Module) -> None:
    """Give every attention below `encoder` (a module with qkv and lora) an update that changes nothing yet."""
    for attention in _attentions(encoder):
        attention.lora = LowRankUpdate(attention.qkv.in_features, attention.qkv.out_features)


@torch.no_grad()
def merge_lora(encoder: nn.Module) -> int:
    """Add the updates to the weights of qkv and remove them; returns how many there were. The outputs stay the same up
    to rounding. The encoder then has the official names alone, and its state dict is a plain weight file's."""
    merged = 0
    for attention in _attentions(encoder):
        if attention.lora is not None:
            weight = attention.qkv.weight
            weight.copy_(weight.cpu().double() + attention.lora.product())
            attention.lora = None
            merged += 1
    return merged


def _attentions(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if hasattr(child, "qkv") and hasattr(child, "lora")]
