"""The image encoders: DINOv3 and DINOv2 vision transformers, frozen under a head or (models/eomt.py) trained with it.

DINOv3 (Simeoni et al. 2025, arXiv 2508.10104): axial rotary positions (RoPE), LayerScale, storage ("register") tokens,
an MLP or a SwiGLU as feed-forward. DINOv2 (Oquab et al. 2023, arXiv 2304.07193; registers: Darcet et al. 2024) differs
by a learned position embedding and patches of 14 pixels. Parameters have the names of the released files, apart from
two that no inference reads: the `bias_mask` of the qkv bias (the loader sets the key part to zero instead) and
`local_cls_norm`. Train mode changes nothing here: the official random rescaling of positions is left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.query_masks import attend
from utils.checks import did_you_mean, nearest
from utils.device import autocast


class ViTConfig(NamedTuple):
    """Everything that tells one backbone from another.

    ffn: "mlp", "swiglu" (w1, w2 apart) or "swiglu_fused" (w12). pos_grid None: rotary positions, and no bias of keys; a
    number or (h, w): learned ones for a grid of that side or sides, resized bicubically by scale factor with
    pos_offset, or by size where it is 0; pos_class: the class token has one too.
    taps: the blocks whose tokens the heads read (those of the DINOv3 adapter).
    """

    embed_dim: int
    depth: int
    num_heads: int
    ffn: str
    ffn_hidden: int
    taps: Sequence[int] = (2, 5, 8, 11)
    patch_size: int = 16
    num_registers: int = 4
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    rope_base: float = 100.0
    pos_grid: int | tuple[int, int] | None = None
    pos_class: bool = True
    pos_offset: float = 0.0
    pos_antialias: bool = False


_V2_REG = {"patch_size": 14, "norm_eps": 1e-6, "pos_grid": 37, "pos_antialias": True}
_V2 = _V2_REG | {"num_registers": 0, "pos_offset": 0.1, "pos_antialias": False}
_TAPS_L, _TAPS_40 = (4, 11, 17, 23), (9, 19, 29, 39)

BACKBONES = {
    "dinov3_vits16": ViTConfig(384, 12, 6, "mlp", 1536),
    "dinov3_vits16plus": ViTConfig(384, 12, 6, "swiglu", 1536),
    "dinov3_vitb16": ViTConfig(768, 12, 12, "mlp", 3072),
    "dinov3_vitl16": ViTConfig(1024, 24, 16, "mlp", 4096, _TAPS_L),
    "dinov3_vitl16plus": ViTConfig(1024, 24, 16, "swiglu", 4096, _TAPS_L),
    "dinov3_vith16plus": ViTConfig(1280, 32, 20, "swiglu", 5120, (7, 15, 23, 31)),
    "dinov3_vit7b16": ViTConfig(4096, 40, 32, "swiglu", 8192, _TAPS_40, qkv_bias=False),
    "dinov2_vits14": ViTConfig(384, 12, 6, "mlp", 1536, **_V2),
    "dinov2_vitb14": ViTConfig(768, 12, 12, "mlp", 3072, **_V2),
    "dinov2_vitl14": ViTConfig(1024, 24, 16, "mlp", 4096, _TAPS_L, **_V2),
    "dinov2_vitg14": ViTConfig(1536, 40, 24, "swiglu_fused", 4096, _TAPS_40, **_V2),
    "dinov2_vits14_reg": ViTConfig(384, 12, 6, "mlp", 1536, **_V2_REG),
    "dinov2_vitb14_reg": ViTConfig(768, 12, 12, "mlp", 3072, **_V2_REG),
    "dinov2_vitl14_reg": ViTConfig(1024, 24, 16, "mlp", 4096, _TAPS_L, **_V2_REG),
    "dinov2_vitg14_reg": ViTConfig(1536, 40, 24, "swiglu_fused", 4096, _TAPS_40, **_V2_REG),
}


def backbone_name(text: str) -> str:
    """The key of BACKBONES that `text` means, which may lack the dinov3_ or dinov2_ ("vits16"); ValueError if none."""
    short = {name.partition("_")[2]: name for name in BACKBONES}
    name = short.get(text, text)
    if name not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}; got {text!r}"
                         f"{did_you_mean(nearest(text, [*BACKBONES, *short]))}")
    return name


# -- layers ------------------------------------------------------------------------------------------------------------

def rope_periods(config: ViTConfig) -> Tensor:
    """(head_dim / 4,) float32: base^(i / (head_dim / 4)), from Python floats: the same bits on every machine."""
    count = config.embed_dim // config.num_heads // 4
    return torch.tensor([config.rope_base ** (i / count) for i in range(count)], dtype=torch.float32)


class RopePositions(nn.Module):
    """Cosine and sine of the rotary angles 2 pi coordinate / period, at patch centres, each axis scaled to [-1, 1]."""

    def __init__(self, config: ViTConfig, persistent: bool = True):
        super().__init__()
        self.register_buffer("periods", rope_periods(config), persistent)

    def forward(self, height: int, width: int, num_prefix: int) -> tuple[Tensor, Tensor]:
        """Grid (h, w) -> cos, sin for `rotate`, float32 (num_prefix + h w, 1, 1, D): the y angles, then the x angles,
        for both halves of D; angle 0 for the prefix, which is not rotated."""
        periods = self.periods.float()
        y, x = ((2 * torch.arange(n, device=periods.device, dtype=torch.float32) + 1) / n - 1 for n in (height, width))
        angles = torch.cat([(2 * math.pi * y[:, None] / periods)[:, None].expand(-1, width, -1),
                            (2 * math.pi * x[:, None] / periods).expand(height, -1, -1)], -1)    # (h, w, D/2)
        angles = F.pad(angles.flatten(0, 1), (0, 0, num_prefix, 0))[:, None, None]               # (N, 1, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries and keys (B, N, 2, heads, D) by angles (N, 1, 1, D), in float32; result in the dtype of qk.

    The first and second half of D are the pairs (not neighbours): (a, b) -> (a cos - b sin, b cos + a sin), where `sin`
    has the minus signs already.
    """
    first, second = qk.chunk(2, -1)
    return (qk * cos).addcmul_(torch.cat([second, first], -1), sin).to(qk.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; `rope` (cos, sin) or None; `allowed`: see attend. The key part of DINOv3's bias, zero,
    gets no gradient."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.key_bias = config.pos_grid is not None
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, allowed: Tensor | None = None) -> Tensor:
        bias = self.qkv.bias
        if bias is not None and bias.requires_grad and not self.key_bias:
            query, key, value = bias.chunk(3)
            bias = torch.cat([query, key.detach(), value])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))      # (B, N, 3, heads, D)
        qk, v = qkv.split([2, 1], 2)                                 # whose gradients are joined by one copy
        q, k = (qk if rope is None else rotate(qk, *rope)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.squeeze(2)))        # (B, heads, N, D), views
        return self.proj(attend(q, k, v, allowed).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if not x.requires_grad:                                      # in place: 3 % of a forward pass
            return self.fc2(torch.ops.aten.gelu_(x))
        return self.fc2(F.gelu(x))                                   # there it would copy x, and twice the gradient


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x) (Shazeer 2020); fused: w1 and w2 are the halves of one w12."""

    def __init__(self, dim: int, hidden: int, fused: bool):
        super().__init__()
        if fused:
            self.w12 = nn.Linear(dim, 2 * hidden)
        else:
            self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1) if self.fused else (self.w1(x), self.w2(x))
        return self.w3(F.silu(gate).mul_(value))


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + gamma * branch, in one pass."""
        return torch.addcmul(x, branch, self.gamma)


class Block(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, config.norm_eps), nn.LayerNorm(dim, config.norm_eps)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.attn = Attention(config)
        self.mlp = (Mlp(dim, config.ffn_hidden) if config.ffn == "mlp"
                    else SwiGLU(dim, config.ffn_hidden, fused=config.ffn == "swiglu_fused"))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, allowed: Tensor | None = None) -> Tensor:
        x = self.ls1(x, self.attn(self.norm1(x), rope, allowed))
        return self.ls2(x, self.mlp(self.norm2(x)))


# -- the transformer ---------------------------------------------------------------------------------------------------

class VisionTransformer(nn.Module):
    """A ViT with class token, registers and patch tokens, in this order.

    Images are normalised floats (B, 3, H, W) whose sides are multiples of patch_size; ValueError otherwise (the
    official DINOv3 cuts the rest off without a word). train() and eval() compute the same.

    Untrained weights follow torch.manual_seed: uniform of standard deviation 0.02 (rather than a truncated normal,
    whose last bits depend on the processor), biases 0, LayerScale 1 (rather than DINOv3's 1e-5, with which an
    untrained network would return its patch embedding from every block).
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.config = config
        self.embed_dim = dim
        self.patch_size = patch
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))          # of pre-training; in the files, never read
        self.registers = "storage_tokens" if config.pos_grid is None else "register_tokens"
        if config.num_registers or config.pos_grid is None:
            setattr(self, self.registers, nn.Parameter(torch.empty(1, config.num_registers, dim)))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, stride=patch)
        if config.pos_grid is None:
            self.rope_embed = RopePositions(config)
        else:
            height, width = self._learned_grid()
            self.pos_embed = nn.Parameter(torch.empty(1, config.pos_class + height * width, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        bound = 0.02 * math.sqrt(3)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """-> "class_token" (B, C), "storage_tokens" (B, R, C) and "patch_tokens" (B, h w, C), after the final norm."""
        prefix = 1 + self.config.num_registers
        tokens = self.norm(self._run(image, [self.config.depth - 1])[0])
        return {"class_token": tokens[:, 0], "storage_tokens": tokens[:, 1:prefix], "patch_tokens": tokens[:, prefix:]}

    def get_intermediate_layers(self, image: Tensor, n: int | Sequence[int] = 1, reshape: bool = True,
                                prefix: bool = False) -> tuple[Tensor, ...]:
        """Patch tokens after the last n blocks, or after the blocks with the indices n, in their order.

        -> each (B, C, h, w) (memory is channels-last), or with reshape=False (B, h w, C), or with prefix=True all
        tokens (B, 1 + R + h w, C), class token and registers first. The *final* norm is applied to each. No block
        after the last one asked for is run. ValueError for an index that does not exist.
        """
        depth = self.config.depth
        wanted = list(range(depth - n, depth)) if isinstance(n, int) else list(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"blocks: expected indices from 0 to {depth - 1}, or a number of blocks; got {n}")
        grid = [side // self.patch_size for side in image.shape[-2:]]
        outputs = [self.norm(x) for x in self._run(image, wanted)]                               # (B, 1 + R + h w, C)
        if prefix:
            return tuple(outputs)
        outputs = [x[:, 1 + self.config.num_registers:] for x in outputs]                        # (B, h w, C)
        return tuple(x.transpose(1, 2).unflatten(2, grid) if reshape else x for x in outputs)

    def _run(self, image: Tensor, wanted: list[int]) -> list[Tensor]:
        """All tokens (B, 1 + R + h w, C) after each of the wanted blocks."""
        x, rope = self.embed(image)
        kept = {}
        for index, block in enumerate(self.blocks[:max(wanted) + 1]):
            x = block(x, rope)
            if index in wanted:
                kept[index] = x
        return [kept[index] for index in wanted]

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens (B, 1 + R + h w, C) before the first block, and what the blocks rotate them by (None for DINOv2)."""
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(f"image: expected normalised floats (B, 3, H, W), got {image.dtype} {tuple(image.shape)}")
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise ValueError(f"image: {height} x {width} pixels, but both sides must be multiples of the patch size "
                             f"{self.patch_size}; pad or resize it")
        height, width = height // self.patch_size, width // self.patch_size
        x = self.patch_embed.proj(image).flatten(2).transpose(1, 2)                              # (B, h w, C)
        prefix = self.cls_token
        rope = None
        if self.config.pos_grid is None:
            rope = self.rope_embed(height, width, 1 + self.config.num_registers)
        else:
            position = self._position(height, width)
            if self.config.pos_class:
                prefix, position = prefix + position[:, :1], position[:, 1:]
            x = x + position                                                                     # registers get none
        if self.config.num_registers:
            prefix = torch.cat([prefix, getattr(self, self.registers)], 1)                       # (1, 1 + R, C)
        return torch.cat([prefix.expand(len(x), -1, -1), x.to(prefix.dtype)], 1), rope

    def _learned_grid(self) -> tuple[int, int]:
        grid = self.config.pos_grid
        return (grid, grid) if isinstance(grid, int) else grid

    def _position(self, height: int, width: int) -> Tensor:
        """The learned embedding for a grid: (1, [1 +] h w, C), float32; unchanged for the grid it was learned for."""
        learned, offset = self._learned_grid(), self.config.pos_offset
        if (height, width) == learned:
            return self.pos_embed
        of_class, grid = self.pos_embed.tensor_split([int(self.config.pos_class)], 1)
        target = {"scale_factor": ((height + offset) / learned[0], (width + offset) / learned[1])} if offset else \
            {"size": (height, width)}
        return torch.cat([of_class, resize_positions(grid, learned, self.config.pos_antialias, **target)], 1)


def resize_positions(position: Tensor, grid: tuple[int, int], antialias: bool, **target: Any) -> Tensor:
    """Positions (1, h w, C) of the patches of a grid (h, w), resized bicubically to target's size or scale_factor
    (see F.interpolate): (1, H W, C) float32."""
    position = position.float().unflatten(1, grid).permute(0, 3, 1, 2)                           # (1, C, h, w)
    return F.interpolate(position, mode="bicubic", antialias=antialias, **target).flatten(2).transpose(1, 2)


class FrozenBackbone:
    """A ViT that is only ever run: no module, so it is in no state_dict, optimiser, train() or DDP of a model.

    taps: blocks to return; prefix: whether as all their tokens rather than as maps of the patches; mean, std (3,) of
    RGB in [0, 1]; entry: plain types that say which weights these are, for checkpoints. `multiple`: image sides must be
    multiples of it (of the patch, and of the heads' coarsest stride 32). open_backbone sets taps and prefix for a head.
    """

    def __init__(self, vit: VisionTransformer, taps: Sequence[int], mean: Sequence[float], std: Sequence[float],
                 entry: dict[str, Any]):
        self.vit = vit.requires_grad_(False).eval()
        self.taps = tuple(taps)
        self.prefix = False
        self.entry = entry
        self.embed_dim = vit.embed_dim
        self.patch_size = vit.patch_size
        self.multiple = math.lcm(32, vit.patch_size)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.amp_dtype: torch.dtype | None = None
        self._sha256: str | None = None

    def to(self, device: torch.device | str, amp_dtype: torch.dtype | None = None) -> FrozenBackbone:
        """Move it. amp_dtype: compute under autocast in it, and hold the weights of linear layers and of the patch
        convolution in it, which autocast would otherwise cast on every call: same numbers, half the memory.

        ValueError where the weights are already held in another dtype: what was cut off does not come back.
        """
        if self.amp_dtype not in (None, amp_dtype):
            raise ValueError(f"the backbone is held in {self.amp_dtype}; load it again for {amp_dtype or 'float32'}")
        if amp_dtype is not None and self.amp_dtype is None:
            self.sha256()                                            # of the float32 weights, while they are there
            for module in self.vit.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(amp_dtype)                             # before the move: the device never holds both
        self.vit.to(device)
        self.mean = self.mean.to(device)
        self.std = self.std.to(device)
        self.amp_dtype = amp_dtype
        return self

    def normalize(self, image: Tensor) -> Tensor:
        """RGB uint8 (B, 3, H, W) -> float32 (image / 255 - mean) / std on the same device; ValueError if not uint8."""
        if image.dtype != torch.uint8:
            raise ValueError(f"image: expected uint8 from 0 to 255, got {image.dtype}")
        mean, std = self.mean.to(image.device), self.std.to(image.device)
        return image.float().sub_(255 * mean).div_(255 * std)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Tensor]:
        """Normalised image (B, 3, H, W) -> the tapped maps, each (B, C, h, w) after the final norm, as computed; with
        `prefix` the tokens (B, P + h w, C), P class token and registers."""
        with autocast(image.device, self.amp_dtype):
            return list(self.vit.get_intermediate_layers(image, self.taps, prefix=self.prefix))

    @torch.no_grad()
    def last_map(self, image: Tensor) -> Tensor:
        """Normalised image (B, 3, H, W) -> the patches' features after the last block and norm (B, C, h, w)."""
        with autocast(image.device, self.amp_dtype):
            return self.vit.get_intermediate_layers(image)[0]

    def sha256(self) -> str:
        """Of all names, shapes and float32 values: the same on every device, whatever file they came from."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.vit.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.float().cpu().contiguous().numpy())
            self._sha256 = digest.hexdigest()
        return self._sha256
