"""PMT (arXiv 2603.25398): a plain mask transformer on a frozen ViT, under its official names.

All tokens of four blocks of the ViT, each normed, projected and scaled, are summed; learned queries are put in front,
and ordinary transformer blocks run over queries and patches together. Each query predicts a class and a mask. While
training, predictions before each block say where its queries may look, ever more rarely; at inference there are no
masks, and one prediction. B images, Q queries, P class token and registers, K classes, C channels, h w the grid of
patches, N = P + h w. Nothing depends on the size of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.dinov3 import RopePositions, ViTConfig, rotate
from models.dinov3_weights import fetch
from models.mask2former import semantic_scores
from models.query_masks import allowed_patches, attend, mask_mlp, mask_probability, upscale_steps
from utils.weights import read_weights

BLOCKS = 6
# Shares of the run in which a block's masks go from always to never (official: of 20,191 steps on ADE20K).
ANNEALING = [(0.0, 0.15), *((4 / 15 + b / 10, 4 / 15 + b / 10 + 1 / 6) for b in range(BLOCKS - 1))]


def default_taps(depth: int) -> tuple[int, ...]:
    """The blocks, from 0, whose tokens are read: official for depth 12 (S, B) and 24 (L: not those of the adapter)."""
    return tuple(range(depth // 4 - 1, depth, depth // 4))


class Attention(nn.Module):
    """Self-attention of queries and tokens; q and k of the patches are rotated."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], allowed: Tensor | None) -> Tensor:
        qk = torch.stack([self.q_proj(x), self.k_proj(x)], 2).unflatten(-1, (self.num_heads, -1))
        q, k = rotate(qk, *rope).unbind(2)                                                      # (B, Q + N, heads, D)
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        x = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allowed)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + lambda1 * branch, in one pass."""
        return torch.addcmul(x, branch, self.lambda1)


class Block(nn.Module):
    """A block as in DINOv3, with a narrower feed-forward: x (B, Q + N, C) -> the same shape."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-5), nn.LayerNorm(dim, 1e-5)
        self.attention = Attention(dim, num_heads)
        self.mlp = Mlp(dim, ffn_dim)
        self.layer_scale1, self.layer_scale2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], allowed: Tensor | None = None) -> Tensor:
        x = self.layer_scale1(x, self.attention(self.norm1(x), rope, allowed))
        return self.layer_scale2(x, self.mlp(self.norm2(x)))


class Decoder(nn.Module):
    """Everything behind the batch norms of the taps."""

    def __init__(self, dim: int, num_heads: int, num_classes: int, num_queries: int, ffn_dim: int, num_taps: int,
                 num_blocks: int, patch_size: int, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("attn_mask_probs", torch.ones(num_blocks))
        self.scalers = nn.ParameterList(torch.ones(dim) for _ in range(num_taps))
        self.lateral_projections = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim)) for _ in range(num_taps))
        self.q = nn.Embedding(num_queries, dim)
        self.rope = RopePositions(ViTConfig(dim, num_blocks, num_heads, "mlp", ffn_dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_dim) for _ in range(num_blocks))
        self.decoder_norm = nn.LayerNorm(dim, 1e-5)
        self.upscale = upscale_steps(dim, patch_size)
        self.mask_head = mask_mlp(dim)
        self.class_head = nn.Linear(dim, num_classes + 1)

    def fuse(self, taps: Sequence[Tensor]) -> Tensor:
        """Normed taps (B, N, C) -> the sum of all, each projected and scaled (B, N, C)."""
        return sum((tap + project(tap)) * scale
                   for tap, project, scale in zip(taps, self.lateral_projections, self.scalers, strict=True))

    def forward(self, taps: Sequence[Tensor], grid: tuple[int, int], aux: bool = True) -> dict:
        """Normed taps (B, N, C) of a grid (h, w) -> outputs as PMTSegmenter."""
        x = self.fuse(taps)
        num_prefix = self.q.num_embeddings + x.shape[1] - grid[0] * grid[1]
        x = torch.cat([self.q.weight.to(x.dtype).expand(len(x), -1, -1), x], 1)                  # (B, Q + N, C)
        rope = self.rope(*grid, num_prefix)
        outputs = []
        for block, probability in zip(self.blocks, self.attn_mask_probs, strict=True):
            allowed = None
            if aux:
                outputs.append(self._maybe_checkpoint(self.predict, x, grid))
                allowed = allowed_patches(outputs[-1]["pred_masks"].detach(), grid, probability)
            x = self._maybe_checkpoint(block, x, rope, allowed)
        outputs.append(self._maybe_checkpoint(self.predict, x, grid))
        return outputs[-1] | ({"aux_outputs": outputs[:-1]} if aux else {})

    def predict(self, x: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Classes (B, Q, K + 1) and masks (B, Q, 4 h, 4 w) of the queries in x (B, Q + N, C)."""
        x = self.decoder_norm(x)
        queries, patches = x[:, :self.q.num_embeddings], x[:, -grid[0] * grid[1]:]
        features = self.upscale(patches.unflatten(1, grid))                                      # (B, 4 h, 4 w, C)
        masks = torch.matmul(self.mask_head(queries), features.flatten(1, 2).transpose(1, 2))
        return {"pred_logits": self.class_head(queries), "pred_masks": masks.unflatten(2, features.shape[1:3])}

    def _maybe_checkpoint(self, function, *arguments):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def anneal(self, done: float) -> None:
        """Set how often each block masks its queries when this share of the run is done (0 to 1)."""
        self.attn_mask_probs.copy_(torch.tensor([mask_probability(done, *share) for share in ANNEALING]))


class PMTSegmenter(nn.Module):
    """The trained part of PMT; its state has the names of the released files without their prefix "network.".

    dim, num_heads, patch_size: of the backbone; ffn_dim: inner width of the blocks, released: dim.
    forward(image (B, 3, H, W), of which only the size matters, taps (B, P + h w, C) of the frozen backbone) ->
    {"pred_logits" (B, Q, K + 1), the last class meaning "no object", "pred_masks" logits (B, Q, 4 h, 4 w), or 2 h, 2 w
    for patches of 14 pixels, "aux_outputs": the same of the earlier predictions, first one first}. With aux=False, as
    at inference, queries are never masked, and the earlier predictions are not made. backbone: set it to a
    FrozenBackbone with `prefix` for `scores`; it is no module, so it is in no state_dict.

    Deviation: where the ViT has no rotary positions of its own (DINOv2), the official code stretches the decoder's at
    random while training.
    """

    backbone = None

    def __init__(self, dim: int, num_heads: int, patch_size: int, num_classes: int, num_queries: int = 100,
                 ffn_dim: int | None = None, num_taps: int = 4, num_blocks: int = BLOCKS,
                 gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.bn = nn.ModuleList(nn.BatchNorm1d(dim) for _ in range(num_taps))
        self.decoder = Decoder(dim, num_heads, num_classes, num_queries, ffn_dim or dim, num_taps, num_blocks,
                               patch_size, gradient_checkpointing)

    def normalize_taps(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Batch norm of each tap (B, N, C) over images and all tokens."""
        return [norm(tap.flatten(0, 1)).view_as(tap) for norm, tap in zip(self.bn, taps, strict=True)]

    def forward(self, image: Tensor, taps: Sequence[Tensor], aux: bool = True) -> dict:
        grid = tuple(side // self.patch_size for side in image.shape[-2:])
        return self.decoder(self.normalize_taps(taps), grid, aux)

    def scores(self, image: Tensor) -> Tensor:
        """Scores of the classes at the image's size, (B, K, H, W) float32."""
        outputs = self(image, self.backbone(image), aux=False)
        return semantic_scores(outputs["pred_logits"], outputs["pred_masks"], image.shape[2:])


def read_pmt_head(path: str | Path, taps: Sequence[int], official_taps: Sequence[int],
                  num_queries: int) -> dict[str, Tensor]:
    """The tensors of a decoder (a released file, its URL, or a checkpoint of ours), by the names of PMTSegmenter.

    Released files do not say on which blocks they were trained: they are for official_taps. ValueError where taps, the
    run's, are others, for another number of queries, and for a file that is no PMT decoder; else as read_weights.
    """
    content = read_weights(fetch(path))
    trained_on = official_taps
    if isinstance(content.get("encoder"), dict):                            # a checkpoint of ours
        trained_on = content["encoder"].get("taps", official_taps)
    content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    names = {name: str(name).replace("_orig_mod.", "").removeprefix("network.") for name in content}
    state = {names[name]: tensor for name, tensor in content.items() if names[name].startswith(("bn.", "decoder."))}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.pe.")}
    queries = state.get("decoder.q.weight")
    if queries is None:
        raise ValueError(f"{path}: no PMT decoder; it holds {', '.join(map(str, list(content)[:3]))} ...")
    if tuple(trained_on) != tuple(taps):
        raise ValueError(f"{path}: trained on the blocks {' '.join(map(str, trained_on))} of the backbone, not "
                         f"{' '.join(map(str, taps))}; set --taps to these")
    if len(queries) != num_queries:
        raise ValueError(f"{path}: has {len(queries)} queries, not {num_queries}; set --num-queries {len(queries)}")
    return state
