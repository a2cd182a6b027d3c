"""EoMT (Kerssies et al. 2025, arXiv 2503.19108): a vision transformer whose last blocks also process queries.

Queries are put in front of the tokens before the last n blocks; classes and masks are predicted from the tokens before
each of these blocks and after the last. In training a query looks only at the patches of its own last mask; these masks
are switched off block by block, so that the finished network is a plain ViT with a small head.
DINOv2 runs with patches of 16 pixels (models/eomt_weights.py resamples it), so that every mask has stride 4.

B images, Q queries, K classes, C width of the ViT, P its prefix (class token, registers), h w patches, N = Q + P + h w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.dinov3 import BACKBONES, VisionTransformer, ViTConfig
from models.mask2former import semantic_scores
from models.query_masks import allowed_patches, mask_mlp, upscale_steps

PATCH_SIZE = 16
JOINT_BLOCKS = {12: 3, 24: 4}                               # by depth, as published; deeper ones: 5


def eomt_config(name: str, image_size: int) -> ViTConfig:
    """The backbone `name` of BACKBONES as EoMT trains it on squares of image_size pixels: DINOv2 with patches of 16,
    positions for their grid, and none for the class token (its value holds it)."""
    config = BACKBONES[name]
    if config.pos_grid is None:
        return config
    side = image_size // PATCH_SIZE
    return config._replace(patch_size=PATCH_SIZE, pos_grid=(side, side), pos_class=False, pos_offset=0.0,
                           pos_antialias=True)


def annealing_periods(blocks: int, first_at_once: bool) -> list[tuple[float, float]]:
    """When the masks of each of the joint blocks are switched off, (start, end) as shares of the run, as published:
    each takes a sixth of it, the first one from a sixth on (first_at_once, with DINOv3: from the start, for 0.15), the
    last one until five sixths."""
    starts = [1 / 6 + b / (2 * max(blocks - 1, 1)) for b in range(blocks)]
    periods = [(start, start + 1 / 6) for start in starts]
    return [(0.0, 0.15), *periods[1:]] if first_at_once else periods


class EoMT(nn.Module):
    """A ViT with queries in its last `joint_blocks` blocks; every part of it is trained.

    forward(image (B, 3, H, W) normalised, sides multiples of the patch) -> {"pred_logits" (B, Q, K + 1), the last class
    meaning "no object", "pred_masks" (B, Q, H/4, W/4) logits, "aux_outputs": the same before each joint block, first
    one first (absent with aux=False)}. shares, with aux: for each joint block None, no masks, or the share of queries
    that keep theirs (allowed_patches). vit: a VisionTransformer, whose unused mask_token is removed. ValueError unless
    1 <= joint_blocks <= its depth.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int, num_queries: int = 100, joint_blocks: int = 4,
                 gradient_checkpointing: bool = False) -> None:
        super().__init__()
        dim = vit.embed_dim
        if not 1 <= joint_blocks <= vit.config.depth:
            raise ValueError(f"joint_blocks is {joint_blocks}, must be from 1 to the ViT's {vit.config.depth}")
        del vit.mask_token
        self.encoder = vit.requires_grad_(True)
        self.joint_blocks = joint_blocks
        self.gradient_checkpointing = gradient_checkpointing
        self.q = nn.Embedding(num_queries, dim)
        self.class_head = nn.Linear(dim, num_classes + 1)
        self.mask_head = mask_mlp(dim)
        self.upscale = upscale_steps(dim, PATCH_SIZE)

    def forward(self, image: Tensor, shares: Sequence[Tensor | None] | None = None, aux: bool = True) -> dict:
        vit, num_queries = self.encoder, self.q.num_embeddings
        num_prefix = 1 + vit.config.num_registers
        grid = image.shape[-2] // vit.patch_size, image.shape[-1] // vit.patch_size
        x, rope = vit.embed(image)                                                           # (B, P + h w, C)
        for block in vit.blocks[:-self.joint_blocks]:
            x = self._run(block, x, rope)
        x = torch.cat([self.q.weight.expand(len(x), -1, -1), x], 1)                          # (B, N, C)
        if rope is not None:
            rope = vit.rope_embed(*grid, num_queries + num_prefix)                           # queries: not rotated
        outputs = []
        for block, share in zip(vit.blocks[-self.joint_blocks:], shares or [None] * self.joint_blocks, strict=True):
            allowed = None
            if aux:
                outputs.append(self._run(self._predict, x, grid))
            if share is not None:
                allowed = allowed_patches(outputs[-1]["pred_masks"], grid, share)
            x = self._run(block, x, rope, allowed)
        final = self._run(self._predict, x, grid)
        return final | {"aux_outputs": outputs} if aux else final

    def _run(self, function: Callable, *arguments) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _predict(self, x: Tensor, grid: tuple[int, int]) -> dict:
        """Classes and masks from the tokens x (B, N, C) of queries and patches, through the ViT's final norm."""
        x = self.encoder.norm(x)
        query, patches = x[:, :self.q.num_embeddings], x[:, -grid[0] * grid[1]:]
        features = self.upscale(patches.unflatten(1, grid))                                  # (B, 4 h, 4 w, C)
        masks = torch.matmul(self.mask_head(query), features.flatten(1, 2).transpose(1, 2))
        return {"pred_logits": self.class_head(query), "pred_masks": masks.unflatten(2, features.shape[1:3])}

    def freeze_blocks(self, count: int) -> None:
        """No training for the embeddings and the first `count` blocks (0: everything is trained)."""
        if count:
            for parameter in self.encoder.parameters():
                parameter.requires_grad_(False)
            for module in (*self.encoder.blocks[count:], self.encoder.norm):
                module.requires_grad_(True)

    def scores(self, image: Tensor) -> Tensor:
        """Scores of the classes at the image's size, (B, K, H, W) float32: no masks, the last prediction alone."""
        outputs = self(image, aux=False)
        return semantic_scores(outputs["pred_logits"], outputs["pred_masks"], image.shape[2:])
