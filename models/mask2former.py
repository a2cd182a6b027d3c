"""Mask2Former head (Cheng et al. 2022): a set of queries, each of which predicts one mask and its class.

A pixel decoder (deformable attention over strides 32, 16, 8, then one step of a feature pyramid) makes mask features
at stride 4; a transformer decoder updates the queries, each looking only where its own last mask is (section 3.2.1).
The parameters carry the names of the head released with DINOv3, which is wider than the original (16 heads, 4096 in
the feed-forward layers). B images, Q queries, K classes, C hidden_dim, S positions of all levels, h w those of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.deformable_attention import MSDeformAttn, grid_centers, sine_embedding
from utils.parts import by_parts

# -- pixel decoder --------------------------------------------------------------------------------------------------


def feed_forward(linear1: nn.Linear, linear2: nn.Linear, x: Tensor) -> Tensor:
    """linear2(relu(linear1(x))), x (B, N, C). As a matrix: ReLU in place copies what is a view, and three axes are
    one."""
    rows = by_parts(lambda part: linear2(F.relu_(linear1(part))), 512, x.flatten(0, 1))
    return rows.unflatten(0, x.shape[:2])


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward layer, each with a residual and the norm after it."""

    def __init__(self, dim: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(dim, 3, num_heads, num_points)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """x (B, S, C), position (S, C), reference_points (1, S, 1, 2) -> (B, S, C)."""
        x = self.norm1(x + self.self_attn(x + position, reference_points, x, shapes))
        return self.norm2(x + feed_forward(self.linear1, self.linear2, x))


class Encoder(nn.Module):
    """The layers, and a learned row for each level that tells the queries which map a position is of."""

    def __init__(self, dim: int, num_heads: int, num_points: int, ffn_dim: int, num_layers: int) -> None:
        super().__init__()
        self.level_encoding = nn.Parameter(torch.empty(3, dim))
        self.encoder = nn.Module()                                               # only for the released names
        self.encoder.layers = nn.ModuleList(EncoderLayer(dim, num_heads, num_points, ffn_dim)
                                            for _ in range(num_layers))


class ConvNorm(nn.Conv2d):
    """Convolution without bias, then group norm: weight and norm.* side by side, as in the released head."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(32, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """Four feature maps -> mask features at stride 4 and three maps for the transformer decoder, all C channels.

    Runs in float32 under autocast as well, as the original does.
    """

    def __init__(self, in_channels: int, dim: int, num_heads: int, num_points: int, ffn_dim: int, num_layers: int,
                 gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(in_channels, dim, 1), nn.GroupNorm(32, dim)) for _ in range(3))
        self.encoder = Encoder(dim, num_heads, num_points, ffn_dim, num_layers)
        self.mask_feature = nn.Conv2d(dim, dim, 1)
        self.lateral_convs = nn.ModuleList([ConvNorm(in_channels, dim, 1)])
        self.output_convs = nn.ModuleList([ConvNorm(dim, dim, 3)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 4:                   # convolutions; Xavier in input_convs, He by fan-in in the others
                if name.startswith("input_convs"):
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.kaiming_uniform_(parameter, a=1)
        for module in self.modules():
            if isinstance(module, EncoderLayer):
                nn.init.xavier_uniform_(module.linear1.weight)
                nn.init.xavier_uniform_(module.linear2.weight)
        for conv in (self.mask_feature, *(block[0] for block in self.input_convs)):
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.encoder.level_encoding)

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """features "1" to "4" of strides 4, 8, 16, 32 (B, in_channels, ., .) -> mask features (B, C, H/4, W/4) and the
        maps of strides 32, 16 and 8 (B, C, ., .), float32."""
        with torch.autocast(features["1"].device.type, enabled=False):
            weight_type = self.mask_feature.weight.dtype
            levels = [conv(features[name].to(weight_type))
                      for conv, name in zip(self.input_convs, "432", strict=True)]                  # (B, C, h, w) each
            shapes = [(x.shape[2], x.shape[3]) for x in levels]
            maps = self._encode(levels, shapes)
            fine = self.lateral_convs[0](features["1"].to(weight_type))                             # (B, C, H/4, W/4)
            fine = fine + F.interpolate(maps[-1], size=fine.shape[2:], mode="bilinear", align_corners=False)
            return self.mask_feature(F.relu_(self.output_convs[0](fine))), maps

    def _encode(self, levels: list[Tensor], shapes: list[tuple[int, int]]) -> list[Tensor]:
        device, dim = levels[0].device, levels[0].shape[1]
        x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)                # (B, S, C)
        position = torch.cat([sine_embedding(*shape, dim, device) + row
                              for shape, row in zip(shapes, self.encoder.level_encoding, strict=True)])     # (S, C)
        reference_points = grid_centers(tuple(shapes), device)[None, :, None]                       # (1, S, 1, 2)
        for layer in self.encoder.encoder.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, position, reference_points, shapes, use_reentrant=False)
            else:
                x = layer(x, position, reference_points, shapes)
        parts = x.split([H * W for H, W in shapes], dim=1)
        return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


# -- transformer decoder --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention.

    The mask is one for all heads and is never repeated for them; no weights are averaged and returned.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query (B, Q, C), key and value (B, S, C), allowed (B, Q, S) bool, True = may look -> (B, Q, C)."""
        projected = [F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                     for x, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3),
                                                self.in_proj_bias.chunk(3), strict=True)]      # (B, heads, ., d) each
        mask = None if allowed is None else allowed.unsqueeze(1)
        x = F.scaled_dot_product_attention(*projected, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    """Queries look at one level: norm(x + attention)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.multihead_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_position: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        return self.norm(x + self.multihead_attn(x + query_position, key, value, allowed))


class SelfAttentionLayer(nn.Module):
    """Queries look at one another: norm(x + attention)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        placed = x + query_position
        return self.norm(x + self.self_attn(placed, placed, x))


class FFNLayer(nn.Module):
    """norm(x + linear(relu(linear(x))))."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + feed_forward(self.linear1, self.linear2, x))


class MLP(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


class TransformerDecoder(nn.Module):
    """Masked cross-attention to the levels in turn, self-attention, feed-forward; a prediction before and after each.
    """

    def __init__(self, num_classes: int, dim: int, num_queries: int, num_heads: int, ffn_dim: int,
                 num_layers: int) -> None:
        super().__init__()
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(dim, num_heads) for _ in range(num_layers))
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(dim, num_heads) for _ in range(num_layers))
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(dim, ffn_dim) for _ in range(num_layers))
        self.post_norm = nn.LayerNorm(dim)
        self.query_feat, self.query_embed = nn.Embedding(num_queries, dim), nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(3, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor], aux: bool = True) -> dict:
        """mask_features (B, C, H/4, W/4), maps of strides 32, 16, 8 -> outputs as Mask2FormerHead; no aux_outputs
        without `aux`."""
        B, C = mask_features.shape[:2]
        values = [m.flatten(2).transpose(1, 2) + row
                  for m, row in zip(maps, self.level_embed.weight, strict=True)]                         # (B, h w, C)
        keys = [value + sine_embedding(*m.shape[2:], C, m.device) for value, m in zip(values, maps, strict=True)]
        x = self.query_feat.weight.expand(B, -1, -1)                                                     # (B, Q, C)
        position = self.query_embed.weight
        normed = [self.post_norm(x)]
        embedded = [self.mask_embed(normed[0])]
        with torch.no_grad():     # masks at a level's size: resizing the features once replaces resizing every mask
            small = [F.interpolate(mask_features, size=m.shape[2:], mode="bilinear", align_corners=False).flatten(2)
                     .to(embedded[0].dtype) for m in maps]                                               # (B, C, h w)
        for i in range(len(self.transformer_ffn_layers)):
            level = i % len(maps)
            allowed = self._allowed(embedded[-1], small[level])
            x = self.transformer_cross_attention_layers[i](x, position, keys[level], values[level], allowed)
            x = self.transformer_self_attention_layers[i](x, position)
            x = self.transformer_ffn_layers[i](x)
            normed.append(self.post_norm(x))
            embedded.append(self.mask_embed(normed[-1]))
        return self._outputs(normed if aux else normed[-1:], embedded if aux else embedded[-1:], mask_features)

    @staticmethod
    @torch.no_grad()
    def _allowed(embedded: Tensor, features: Tensor) -> Tensor:
        """Where a query's mask is above one half: (B, Q, h w) bool; everywhere for a query whose mask is empty."""
        allowed = torch.matmul(embedded, features) >= 0
        return allowed | ~allowed.any(-1, keepdim=True)

    def _outputs(self, normed: list[Tensor], embedded: list[Tensor], mask_features: Tensor) -> dict:
        """All predictions by one matrix product: ten times less traffic for the gradient of the mask features."""
        Q, count = normed[0].shape[1], len(normed)
        logits = self.class_embed(torch.stack(normed)).unbind(0)                                         # (B, Q, K+1)
        masks = torch.matmul(torch.cat(embedded, dim=1), mask_features.flatten(2))                       # (B, 10 Q, .)
        masks = masks.unflatten(2, mask_features.shape[2:]).unflatten(1, (count, Q)).unbind(1)       # (B, Q, H/4, W/4)
        outputs = [{"pred_logits": c, "pred_masks": m} for c, m in zip(logits, masks, strict=True)]
        return outputs[-1] | ({"aux_outputs": outputs[:-1]} if count > 1 else {})


# -- head and model -------------------------------------------------------------------------------------------------


class Mask2FormerHead(nn.Module):
    """Pixel decoder and transformer decoder over maps of strides 4, 8, 16, 32 with `in_channels` channels each.

    forward(features {"1": (B, in_channels, H/4, W/4), "2", "3", "4"}) -> {"pred_logits" (B, Q, K+1), the last class
    meaning "no object", "pred_masks" (B, Q, H/4, W/4) logits, "aux_outputs": the same of the decoder_layers earlier
    predictions, first one first (absent with aux=False)}. ValueError: hidden_dim no multiple of 32 or of num_heads.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden_dim: int = 256, num_queries: int = 100,
                 num_heads: int = 16, ffn_dim: int = 4096, encoder_layers: int = 6, decoder_layers: int = 9,
                 num_points: int = 4, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        if hidden_dim % 32 or hidden_dim % num_heads:
            raise ValueError(f"hidden_dim must be a multiple of 32 (group norm) and of the {num_heads} heads, "
                             f"got {hidden_dim}; 256 is the usual width")
        self.pixel_decoder = PixelDecoder(in_channels, hidden_dim, num_heads, num_points, ffn_dim, encoder_layers,
                                          gradient_checkpointing)
        self.predictor = TransformerDecoder(num_classes, hidden_dim, num_queries, num_heads, ffn_dim, decoder_layers)

    def forward(self, features: dict[str, Tensor], aux: bool = True) -> dict:
        return self.predictor(*self.pixel_decoder(features), aux=aux)


def semantic_scores(pred_logits: Tensor, pred_masks: Tensor, size: Sequence[int]) -> Tensor:
    """Score of each class at each pixel: sum over queries of its probability times the query's mask.

    pred_logits (B, Q, K+1), pred_masks (B, Q, h, w) logits, size (H, W) -> (B, K, H, W) float32, >= 0, no
    probability: the sum over classes is free. The logits are resized (bilinear), not the masks; "no object" is left
    out after the softmax. Deviation: DINOv3 forms the product in bfloat16.
    """
    with torch.autocast(pred_masks.device.type, enabled=False):
        mask = F.interpolate(pred_masks.float(), size=tuple(size), mode="bilinear", align_corners=False).sigmoid_()
        probability = pred_logits.float().softmax(-1)[..., :-1]                                          # (B, Q, K)
        return torch.matmul(probability.transpose(1, 2), mask.flatten(2)).unflatten(2, mask.shape[2:])


class Mask2FormerSegmenter(nn.Module):
    """Adapter and head over a frozen backbone that is no part of it: every parameter here is trained.

    forward(image (B, 3, H, W) normalised, taps of the backbone) -> outputs of the head. The names in state_dict are
    those of the head released with DINOv3. backbone: set it to the FrozenBackbone for `scores`; it is no module, so it
    is in no state_dict.
    """

    backbone = None

    def __init__(self, adapter: nn.Module, head: Mask2FormerHead) -> None:
        super().__init__()
        self.segmentation_model = nn.ModuleList([adapter, head])

    def forward(self, image: Tensor, taps: Sequence[Tensor], aux: bool = True) -> dict:
        adapter, head = self.segmentation_model
        return head(adapter(image, taps), aux=aux)

    def scores(self, image: Tensor) -> Tensor:
        """Scores of the classes at the image's size, (B, K, H, W) float32; the auxiliary outputs are not computed."""
        outputs = self(image, self.backbone(image), aux=False)
        return semantic_scores(outputs["pred_logits"], outputs["pred_masks"], image.shape[2:])
