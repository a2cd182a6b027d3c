"""ViT-Adapter without injectors: four maps at strides 4, 8, 16 and 32 from an image and four layers of a frozen ViT.

After ViT-Adapter (Chen et al. 2023, section 3) as DINOv3 uses it (Simeoni et al. 2025, section 6.3.2): a small
convolutional stem turns the image into tokens of three strides, and these read from the ViT's layers by deformable
attention. Nothing flows back into the ViT, so it runs once, without gradients, and its features can be cached. The
parameters carry the names of the released head. B images, C embed_dim, N = 21 H W / 1024 tokens of the three strides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.deformable_attention import MSDeformAttn, grid_centers
from models.nomeformer import DropPath

Shapes = Sequence[tuple[int, int]]


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True)]


class SpatialPriorModule(nn.Module):
    """Convolutional stem: image (B, 3, H, W) -> four maps (B, C, H/4, W/4), (B, C, H/8, W/8), ... down to stride 32."""

    def __init__(self, embed_dim: int, inplane: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, inplane, 2), *_conv(inplane, inplane), *_conv(inplane, inplane),
                                  nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*_conv(inplane, 2 * inplane, 2))
        self.conv3 = nn.Sequential(*_conv(2 * inplane, 4 * inplane, 2))
        self.conv4 = nn.Sequential(*_conv(4 * inplane, 4 * inplane, 2))
        self.fc1, self.fc2 = nn.Conv2d(inplane, embed_dim, 1), nn.Conv2d(2 * inplane, embed_dim, 1)
        self.fc3, self.fc4 = nn.Conv2d(4 * inplane, embed_dim, 1), nn.Conv2d(4 * inplane, embed_dim, 1)

    def forward(self, image: Tensor) -> list[Tensor]:
        c1 = self.stem(image)                                                    # (B, inplane, H/4, W/4)
        c2 = self.conv2(c1)                                                      # (B, 2 inplane, H/8, W/8)
        c3 = self.conv3(c2)                                                      # (B, 4 inplane, H/16, W/16)
        c4 = self.conv4(c3)                                                      # (B, 4 inplane, H/32, W/32)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)]


class DWConv(nn.Module):
    """One depthwise 3x3 convolution on each of the maps that a token sequence is made of. x (B, N, C) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        parts = x.split([H * W for H, W in shapes], dim=1)
        maps = [self.dwconv(p.transpose(1, 2).unflatten(2, shape)) for p, shape in zip(parts, shapes, strict=True)]
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)


class ConvFFN(nn.Module):
    """Linear, depthwise convolution, GELU, linear. x (B, N, C) -> the same."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(embed_dim, hidden_dim), nn.Linear(hidden_dim, embed_dim)
        self.dwconv = DWConv(hidden_dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), shapes)))


class Extractor(nn.Module):
    """The stem's tokens read from one layer of the ViT: c + attention(c, tokens), then + drop_path(ConvFFN)."""

    def __init__(self, embed_dim: int, num_heads: int, num_points: int, deform_ratio: float, cffn_ratio: float,
                 drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = MSDeformAttn(embed_dim, 1, num_heads, num_points, deform_ratio)
        self.ffn = ConvFFN(embed_dim, int(embed_dim * cffn_ratio))
        self.ffn_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: Tensor, shapes: Shapes, reference_points: Tensor, tokens: Tensor,
                grid: tuple[int, int]) -> Tensor:
        """c (B, N, C), reference_points (1, N, 1, 2), tokens (B, h w, C) of the ViT, grid (h, w) -> (B, N, C)."""
        c = c + self.attn(self.query_norm(c), reference_points, self.feat_norm(tokens), [grid])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), shapes))


class Interaction(nn.Module):
    """One stage: an extractor, in the last stage two more in sequence. Holds the released names, computes nothing."""

    def __init__(self, num_extra: int, *args) -> None:
        super().__init__()
        self.extractor = Extractor(*args)
        if num_extra:
            self.extra_extractors = nn.ModuleList(Extractor(*args) for _ in range(num_extra))

    def extractors(self) -> list[Extractor]:
        return [self.extractor, *getattr(self, "extra_extractors", [])]


class DINOv3_Adapter(nn.Module):
    """Pyramid of a frozen ViT. The batch norms are plain: convert them to SyncBatchNorm for several processes.

    forward(image (B, 3, H, W) normalised float, taps: four maps (B, C, H/patch, W/patch) after the ViT's final norm)
    -> {"1", "2", "3", "4"}: (B, C, H/s, W/s) at s = 4, 8, 16, 32. No gradient is returned to taps that need none.
    `patch_size` is only used to check that the taps belong to the image. ValueError where H or W is no multiple of 32,
    or taps and image do not fit. Deviation: drop path and batch norm follow train() and eval() as usual; the ViT,
    which is outside, does not.
    """

    def __init__(self, embed_dim: int, patch_size: int = 16, conv_inplane: int = 64, n_points: int = 4,
                 deform_num_heads: int = 16, drop_path: float = 0.3, cffn_ratio: float = 0.25,
                 deform_ratio: float = 0.5, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.level_embed = nn.Parameter(torch.empty(3, embed_dim))
        self.spm = SpatialPriorModule(embed_dim, conv_inplane)
        args = (embed_dim, deform_num_heads, n_points, deform_ratio, cffn_ratio, drop_path)
        self.interactions = nn.ModuleList(Interaction(2 if stage == 3 else 0, *args) for stage in range(4))
        self.up = nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2)
        self.norm1, self.norm2 = nn.BatchNorm2d(embed_dim), nn.BatchNorm2d(embed_dim)
        self.norm3, self.norm4 = nn.BatchNorm2d(embed_dim), nn.BatchNorm2d(embed_dim)
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, image: Tensor, taps: Sequence[Tensor]) -> dict[str, Tensor]:
        self._check(image, taps)
        c1, *maps = self.spm(image.contiguous(memory_format=torch.channels_last))    # tokens lie in memory like that
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        c = torch.cat([m.flatten(2).transpose(1, 2) + self.level_embed[i] for i, m in enumerate(maps)], 1)   # (B, N, C)
        reference_points = grid_centers(tuple(shapes), image.device)[None, :, None]                      # (1, N, 1, 2)
        for interaction, tap in zip(self.interactions, taps, strict=True):
            tokens = tap.flatten(2).transpose(1, 2)                                                      # (B, h w, C)
            grid = (tap.shape[2], tap.shape[3])
            for extractor in interaction.extractors():
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    c = checkpoint(extractor, c, shapes, reference_points, tokens, grid, use_reentrant=False)
                else:
                    c = extractor(c, shapes, reference_points, tokens, grid)
        parts = c.split([H * W for H, W in shapes], dim=1)
        c2, c3, c4 = (part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True))
        out = {}
        for i, c in enumerate((self.up(c2) + c1, c2, c3, c4)):
            vit = F.interpolate(taps[i], size=c.shape[2:], mode="bilinear", align_corners=False)
            out[str(i + 1)] = getattr(self, f"norm{i + 1}")(c + vit)
        return out

    def _check(self, image: Tensor, taps: Sequence[Tensor]) -> None:
        B, _, H, W = image.shape
        if H % 32 or W % 32:
            raise ValueError(f"the adapter needs image sides that are multiples of 32, got {H} x {W}; pad or resize")
        if len(taps) != 4:
            raise ValueError(f"the adapter needs the features of 4 layers of the backbone, got {len(taps)}")
        expected = (B, self.embed_dim, H // self.patch_size, W // self.patch_size)
        if wrong := [tuple(tap.shape) for tap in taps if tap.shape != expected]:
            raise ValueError(f"backbone features of shape {wrong[0]} do not belong to images {tuple(image.shape)}: the "
                             f"adapter expects {expected} at patch size {self.patch_size}")


def _init_weights(module: nn.Module) -> None:
    """Truncated normal 0.02 for linear layers; He normal by fan-out for convolutions, the groups taken into account."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
