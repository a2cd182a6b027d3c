"""Point Transformer V3 in the variants that Sonata and Utonia pre-train (PT-v3m2, m3), and segmentation heads on it.

Wu et al., Point Transformer V3 (CVPR 2024, arXiv 2312.10035) and Sonata (CVPR 2025, arXiv 2503.16429), Utonia (arXiv
2603.03283); the numbers are those of github.com/facebookresearch/sonata and github.com/Pointcept/Utonia (Apache-2.0)
on their GPU path, the parameter names too. Concerto is Sonata's network with other weights and sizes. No compiled
extension: the sparse convolution is models/sparse_conv.py, attention is scaled_dot_product_attention.

A batch is a dict: grid_coord (N, 3) integer >= 0, feat (N, in_channels) float (for Sonata coordinates in metres,
colour in 0..1, normal), offset (S,) int64, the cumulative ends of the scenes; `mask` (N,) bool where the mask token
replaces the embedding; coord (N, 3) float metres where the network rotates (Utonia; float64 for map coordinates).
Inside, the voxels lie in the order of their coordinates, for the memory's sake; everything that is returned has the
order of the batch.

Deviations: one attention patch is exact in the dtype of the computation (officially half precision); ties of the
max-pooling share the gradient; equal voxels, which Mix3D makes, follow a fixed rule (see NeighbourTable).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.lora import LowRankUpdate, add_lora
from models.point_networks import decoder_of
from models.point_rotary import PointRotary, Rotation
from models.sparse_conv import NeighbourTable, SubMConv3d, neighbour_table, pack, unpack
from utils.checks import check_choice, did_you_mean, nearest
from utils.parts import by_parts
from utils.serialization import (
    ORDERS,
    PatchLayout,
    Serialization,
    depth_of,
    grid_range,
    invert,
    patch_layout,
    serialize,
)

MODES = ("lin", "dec", "ft", "lora")
ENCODER_ONLY = ("lin", "lora")                              # modes without a decoder


# -- one resolution ----------------------------------------------------------------------------------------------------

class StageOutput(NamedTuple):
    """One stage, finest first. feat (n, C); grid_coord (n, 3) int32; offset (S,) int64; cluster (n,) int64, the row of
    each voxel in the next coarser stage, None in the last. Coarser voxels are ordered by (scene, x, y, z). coord
    (n, 3) float32 metres from the middle of the scene where the network rotates, else None."""

    feat: Tensor
    grid_coord: Tensor
    offset: Tensor
    cluster: Tensor | None
    coord: Tensor | None = None


class Stage:
    """The voxels of one resolution, and what its blocks share: neighbours, sequences, patches; made when first used.

    coord (n, 3) float32 metres are the positions that blocks with a rotation turn by; None where there is none."""

    def __init__(self, grid_coord: Tensor, scene: Tensor, sizes: list[int], largest: int, orders: Sequence[str],
                 coord: Tensor | None = None):
        self.grid_coord, self.scene, self.sizes = grid_coord, scene, sizes           # (n, 3), (n,), S numbers
        self.coord = coord
        self.largest, self.depth, self.orders = largest, depth_of(largest), orders
        self.feat: Tensor | None = None                      # (n, C)
        self.cluster: Tensor | None = None                   # (n,)
        self._table: NeighbourTable | None = None
        self._sequences: dict[int, Serialization] = {}
        self._layouts: dict[int, PatchLayout] = {}
        self._patches: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def table(self) -> NeighbourTable:
        if self._table is None:
            self._table = neighbour_table(self.grid_coord, self.scene, largest=self.largest,
                                          num_scenes=len(self.sizes))
        return self._table

    def patches(self, block: int, patch_size: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """For the block of that index: the voxel of each slot (M,), the slot of each voxel (n,), the patches."""
        index = block % len(self.orders)
        if patch_size not in self._layouts:
            self._layouts[patch_size] = patch_layout(self.sizes, patch_size, self.grid_coord.device)
        layout = self._layouts[patch_size]
        if (index, patch_size) not in self._patches:
            if index not in self._sequences:
                self._sequences[index] = serialize(self.grid_coord, self.scene, [self.orders[index]], self.depth)
            order, inverse = self._sequences[index].order[0], self._sequences[index].inverse[0]
            self._patches[index, patch_size] = order[layout.slots], layout.unpad[inverse]
        return *self._patches[index, patch_size], layout.groups

    def offset(self) -> Tensor:
        return torch.tensor(self.sizes).cumsum(0).to(self.grid_coord.device, non_blocking=True)

    def coarser(self, orders: Sequence[str]) -> Stage:
        """The stage of half the resolution; sets `cluster`. Its positions are the means of those merged."""
        key, self.cluster = torch.unique(pack(self.grid_coord >> 1, self.scene, self.depth), return_inverse=True)
        grid_coord, scene = unpack(key, self.depth)
        ends = torch.searchsorted(scene, torch.arange(len(self.sizes), device=scene.device), right=True).tolist()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        coord = None if self.coord is None else mean_positions(self.coord, self.cluster, len(grid_coord))
        return Stage(grid_coord, scene, sizes, self.largest >> 1, orders, coord)


def take_parents(feat: Tensor, cluster: Tensor) -> Tensor:
    """Coarse feat (m, C), cluster (n,) -> (n, C). Deterministic backward: indexing sorts on CUDA, where index_select
    adds atomically; on the CPU index_select is the fast one, and adds in order."""
    return feat.index_select(0, cluster) if feat.device.type == "cpu" else feat[cluster]


def mean_positions(coord: Tensor, cluster: Tensor, size: int) -> Tensor:
    """coord (n, 3) float32, cluster (n,) int64 in 0..size - 1, all occupied -> (size, 3), the mean of each cluster.
    Deterministic, by the same choice as take_parents."""
    total = coord.new_zeros(size, 3)
    if coord.device.type == "cpu":
        total.index_add_(0, cluster, coord)
    else:
        total.index_put_((cluster,), coord, accumulate=True)
    return total / torch.bincount(cluster, minlength=size)[:, None]


def centred(coord: Tensor, scene: Tensor, num_scenes: int) -> Tensor:
    """Positions from the middle of their scene's bounding box: coord (n, 3) float, scene (n,) int64 -> (n, 3) float32.

    Rotations see differences alone; without this, float32 angles of map coordinates (1e6 m) would mean nothing.
    """
    place = scene[:, None].expand(-1, 3)
    low, high = (coord.new_zeros(num_scenes, 3).scatter_reduce(0, place, coord, reduce, include_self=False)
                 for reduce in ("amin", "amax"))
    return (coord - ((low + high) / 2)[scene]).float()


# -- layers ------------------------------------------------------------------------------------------------------------

class PointDropPath(nn.Module):
    """Drops the branch of each POINT with probability p in training and scales the others by 1 / (1 - p), as the
    official code does, which gives timm's DropPath a tensor (N, C)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(len(x), 1).bernoulli_(1 - self.p).div_(1 - self.p)
        return x * keep


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, pad: bool) -> Tensor:
    """scaled_dot_product_attention of (patches, heads, length, D); scale None: D^-0.5.

    pad: fill D up with zeros to a multiple of 8, which changes no score. CUDA's kernels that never hold the matrix of
    scores need that (float32 ones at least: not measured, for lack of a GPU); heads of 18 channels would miss them.
    """
    width = q.shape[-1]
    missing = -width % 8 if pad else 0
    if not missing:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    q, k, v = (F.pad(part, (0, missing)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=width ** -0.5 if scale is None else scale)[..., :width]


class PatchAttention(nn.Module):
    """Multi-head attention within the patches of a sequence; qkv rows ordered q, k, v, heads contiguous in each.

    With a rotation, q and k are turned by the voxels' positions. `lora` is a low-rank change of qkv (models/lora.py),
    where one was added."""

    def __init__(self, channels: int, num_heads: int, patch_size: int, qkv_bias: bool = True,
                 qk_scale: float | None = None, rotation: Rotation | None = None):
        super().__init__()
        self.num_heads, self.patch_size, self.scale = num_heads, patch_size, qk_scale
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.rope = None if rotation is None else PointRotary(channels // num_heads, rotation)
        self.lora: LowRankUpdate | None = None

    def forward(self, x: Tensor, stage: Stage, block: int) -> Tensor:
        voxel, slot, groups = stage.patches(block, self.patch_size)
        qkv = self.qkv(x)                                                            # (n, 3 C)
        if self.lora is not None:
            qkv = qkv + self.lora(x)
        if self.rope is not None:
            qkv = self.rotate(qkv, stage.coord)
        qkv = qkv.index_select(0, voxel)                                             # (M, 3 C)
        outputs = []
        parts = qkv.split([count * length for count, length in groups])              # whose gradients one copy joins,
        for part, (count, length) in zip(parts, groups, strict=True):                # as those of q, k and v
            q, k, v = (x.view(count, length, self.num_heads, -1).transpose(1, 2)     # (patches, heads, length, D)
                       for x in part.chunk(3, 1))
            out = attend(q, k, v, self.scale, pad=q.device.type == "cuda")
            outputs.append(out.transpose(1, 2).reshape(count * length, -1))          # (patches * length, C)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.proj(out.index_select(0, slot))                                  # (n, C)

    def rotate(self, qkv: Tensor, coord: Tensor) -> Tensor:
        """qkv (n, 3 C) with q and k turned by the positions coord (n, 3). A voxel keeps its position wherever it
        stands in a sequence, so this comes before voxels are put into patches."""
        qk, v = qkv.split([2 * qkv.shape[1] // 3, qkv.shape[1] // 3], 1)
        qk = self.rope(qk.unflatten(1, (2 * self.num_heads, -1)), coord)             # (n, 2 heads, D)
        return torch.cat([qk.flatten(1), v], 1)


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return by_parts(lambda part: self.fc2(F.gelu(self.fc1(part))), 4096, x)


class Block(nn.Module):
    """Conditional position encoding (sparse convolution), attention and MLP, each a residual branch."""

    def __init__(self, channels: int, num_heads: int, patch_size: int, index: int = 0, mlp_ratio: float = 4.0,
                 drop_path: float = 0.0, qkv_bias: bool = True, qk_scale: float | None = None,
                 rotation: Rotation | None = None):
        super().__init__()
        self.index = index
        self.cpe = nn.Sequential(SubMConv3d(channels, channels), nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.norm1 = nn.Sequential(nn.LayerNorm(channels))
        self.attn = PatchAttention(channels, num_heads, patch_size, qkv_bias, qk_scale, rotation)
        self.norm2 = nn.Sequential(nn.LayerNorm(channels))
        self.mlp = nn.Sequential(Mlp(channels, int(channels * mlp_ratio)))
        self.drop_path = PointDropPath(drop_path)

    def forward(self, x: Tensor, stage: Stage) -> Tensor:
        conv, linear, norm = self.cpe
        x = x + norm(linear(conv(x, stage.table())))
        x = x + self.drop_path(self.attn(self.norm1(x), stage, self.index))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Embedding(nn.Module):
    """Linear, LayerNorm, GELU; with a mask token where pre-training needs one."""

    def __init__(self, in_channels: int, channels: int, mask_token: bool):
        super().__init__()
        self.stem = nn.ModuleDict({"linear": nn.Linear(in_channels, channels), "norm": nn.LayerNorm(channels)})
        self.mask_token = nn.Parameter(torch.zeros(1, channels)) if mask_token else None

    def forward(self, feat: Tensor, mask: Tensor | None = None) -> Tensor:
        feat = F.gelu(self.stem["norm"](self.stem["linear"](feat)))
        if mask is None:
            return feat
        if self.mask_token is None:
            raise ValueError("the batch has a mask, but the model no mask_token; build it with mask_token: true")
        return torch.where(mask[:, None], self.mask_token.to(feat.dtype), feat)


class GridPooling(nn.Module):
    """Linear, the maximum over each 2 x 2 x 2 cell, LayerNorm, GELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm = nn.Sequential(nn.LayerNorm(out_channels))

    def forward(self, feat: Tensor, cluster: Tensor, size: int) -> Tensor:
        """feat (n, C_in), cluster (n,) int64 in 0..size - 1, all occupied -> (size, C_out)."""
        feat = self.proj(feat)
        pooled = feat.new_full((size, feat.shape[1]), -torch.inf)
        pooled = pooled.scatter_reduce(0, cluster[:, None].expand_as(feat), feat, "amax")
        return F.gelu(self.norm(pooled))


class GridUnpooling(nn.Module):
    """GELU(LN(Linear(skip))) + GELU(LN(Linear(coarse)))[cluster]."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.proj, self.proj_skip = (
            nn.Sequential(nn.Linear(width, out_channels), nn.LayerNorm(out_channels), nn.GELU())
            for width in (in_channels, skip_channels))

    def forward(self, feat: Tensor, skip_feat: Tensor, cluster: Tensor) -> Tensor:
        """feat (m, C_in), skip_feat (n, C_skip), cluster (n,) int64 -> (n, C_out)."""
        return self.proj_skip(skip_feat) + take_parents(self.proj(feat), cluster)


# -- the network -------------------------------------------------------------------------------------------------------

class PointTransformerV3(nn.Module):
    """Encoder of five (or any number of) stages, and a decoder unless enc_mode. See build_point_transformer.

    shuffle_orders: each stage draws its own permutation of the orders in every forward pass, also in eval mode:
    torch.randperm from torch's global CPU generator, once per stage, finest first. (Officially the switch reaches only
    the first stage.) gradient_checkpointing computes each block again in the backward pass instead of storing it.
    rope_base: base of the rotation in every attention, None for none; jitter_coords and rescale_coords: Rotation's.
    """

    def __init__(self, in_channels: int, order: Sequence[str], enc_depths: Sequence[int], enc_channels: Sequence[int],
                 enc_num_head: Sequence[int], enc_patch_size: Sequence[int], dec_depths: Sequence[int] = (),
                 dec_channels: Sequence[int] = (), dec_num_head: Sequence[int] = (), dec_patch_size: Sequence[int] = (),
                 mlp_ratio: float = 4.0, qkv_bias: bool = True, qk_scale: float | None = None, drop_path: float = 0.3,
                 shuffle_orders: bool = True, mask_token: bool = False, enc_mode: bool = False,
                 gradient_checkpointing: bool = False, rope_base: float | None = None,
                 jitter_coords: float | None = None, rescale_coords: float | None = None):
        super().__init__()
        rotation = Rotation(rope_base, jitter_coords, rescale_coords) if rope_base else None
        self.rotates = rotation is not None
        self.order, self.in_channels, self.enc_mode = tuple(order), in_channels, enc_mode
        self.shuffle_orders, self.gradient_checkpointing = shuffle_orders, gradient_checkpointing
        self.enc_channels, self.dec_channels = tuple(enc_channels), () if enc_mode else tuple(dec_channels)

        def layers(first, s, channels, heads, patches, rates):
            block = {f"block{i}": Block(channels[s], heads[s], patches[s], i, mlp_ratio, rate, qkv_bias, qk_scale,
                                        rotation)
                     for i, rate in enumerate(rates[s])}
            return nn.ModuleDict({**first, **block})

        self.embedding = Embedding(in_channels, enc_channels[0], mask_token)
        self.enc, rates = nn.ModuleDict(), _ramp(drop_path, enc_depths)
        for s in range(len(enc_depths)):
            down = {"down": GridPooling(enc_channels[s - 1], enc_channels[s])} if s else {}
            self.enc[f"enc{s}"] = layers(down, s, enc_channels, enc_num_head, enc_patch_size, rates)
        if not enc_mode:
            self.dec, rates = nn.ModuleDict(), [stage[::-1] for stage in _ramp(drop_path, dec_depths)]
            widths = [*dec_channels, enc_channels[-1]]
            for s in reversed(range(len(dec_depths))):
                up = {"up": GridUnpooling(widths[s + 1], enc_channels[s], widths[s])}
                self.dec[f"dec{s}"] = layers(up, s, dec_channels, dec_num_head, dec_patch_size, rates)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, batch: Mapping[str, Tensor], orders: Tensor | None = None) -> list[StageOutput]:
        """-> the stages, finest first: encoder features, or with a decoder its features (the coarsest stage has the
        encoder's). orders (num_stages, number of orders) int64 are the permutations to use instead of drawing them.
        ValueError for a batch that is not as this file's docstring says."""
        stages, restore = self.encode(batch, orders)
        return self.outputs(self.decode(stages) if not self.enc_mode else stages, restore)

    def encode(self, batch: Mapping[str, Tensor], orders: Tensor | None = None) -> tuple[list[Stage], Tensor]:
        """Stages in the order of their coordinates, with feat and cluster, and the place there of each voxel of the
        batch (N,)."""
        names = [[self.order[i] for i in row] for row in self._permutations(orders)]
        stage, order = _first_stage(batch, names[0], self.in_channels, self.rotates)
        mask = batch["mask"].index_select(0, order) if "mask" in batch else None
        feat = self.embedding(batch["feat"].index_select(0, order), mask)
        stages = []
        for s, layers in enumerate(self.enc.values()):
            if s:
                coarse = stage.coarser(names[s])
                feat = layers["down"](feat, stage.cluster, len(coarse.grid_coord))
                stage = coarse
            feat = stage.feat = self._blocks(layers, feat, stage)
            stages.append(stage)
        return stages, invert(order)

    def decode(self, stages: list[Stage]) -> list[Stage]:
        """Replace the encoder's features by the decoder's in all but the coarsest stage; returns the same list."""
        for s in reversed(range(len(stages) - 1)):
            layers, stage = self.dec[f"dec{s}"], stages[s]
            feat = layers["up"](stages[s + 1].feat, stage.feat, stage.cluster)
            stage.feat = self._blocks(layers, feat, stage)
        return stages

    def outputs(self, stages: list[Stage], restore: Tensor) -> list[StageOutput]:
        """Stages as forward returns them."""
        rows = [StageOutput(stage.feat, stage.grid_coord, stage.offset(), stage.cluster, stage.coord)
                for stage in stages]
        first = [None if part is None else part.index_select(0, restore)
                 for part in (rows[0].feat, rows[0].grid_coord, rows[0].cluster, rows[0].coord)]
        return [StageOutput(first[0], first[1], rows[0].offset, first[2], first[3]), *rows[1:]]

    def _blocks(self, layers: nn.ModuleDict, feat: Tensor, stage: Stage) -> Tensor:
        feat = feat.to(torch.promote_types(feat.dtype, torch.float32))       # the residual stream, also under autocast
        for name, block in layers.items():
            if name.startswith("block"):
                feat = checkpoint(block, feat, stage, use_reentrant=False) \
                    if self.gradient_checkpointing and torch.is_grad_enabled() else block(feat, stage)
        return feat

    def _permutations(self, orders: Tensor | None) -> list[list[int]]:
        count = len(self.order)
        if orders is None:
            return [torch.randperm(count).tolist() if self.shuffle_orders else list(range(count))
                    for _ in range(len(self.enc_channels))]
        orders = torch.as_tensor(orders).tolist()
        if len(orders) != len(self.enc_channels) or any(sorted(row) != list(range(count)) for row in orders):
            raise ValueError(f"orders: expected {len(self.enc_channels)} permutations of 0..{count - 1}, got {orders}")
        return orders


def _ramp(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop-path rates rising linearly from 0 to rate over all blocks, per stage."""
    rates = torch.linspace(0, rate, sum(depths), dtype=torch.float64, device="cpu").tolist()
    return [rates[sum(depths[:s]):sum(depths[:s + 1])] for s in range(len(depths))]


def _first_stage(batch: Mapping[str, Tensor], orders: Sequence[str], in_channels: int,
                 rotates: bool) -> tuple[Stage, Tensor]:
    """Check the batch; its voxels sorted by (scene, x, y, z), and the row in the batch of each, (N,)."""
    grid_coord, feat, offset = batch["grid_coord"], batch["feat"], batch["offset"]
    ends = offset.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if grid_coord.shape != (len(feat), 3) or feat.ndim != 2 or not ends or ends[-1] != len(feat) or min(sizes) < 1:
        raise ValueError(f"batch: grid_coord {tuple(grid_coord.shape)}, feat {tuple(feat.shape)} and offset "
                         f"{ends} do not fit; offset holds the cumulative ends of the scenes, none of them empty")
    if feat.shape[1] != in_channels:
        raise ValueError(f"batch: feat has {feat.shape[1]} channels, the model takes {in_channels}")
    largest = grid_range(grid_coord, len(sizes))
    depth = depth_of(largest)
    scene = torch.repeat_interleave(torch.arange(len(sizes), device=feat.device),
                                    torch.tensor(sizes).to(feat.device, non_blocking=True), output_size=len(feat))
    key, order = pack(grid_coord, scene, depth).sort(stable=True)
    sorted_grid, scene = unpack(key, depth)
    coord = None
    if rotates:
        coord = batch.get("coord")
        if coord is None or coord.shape != (len(feat), 3) or not coord.is_floating_point():
            found = "none" if coord is None else f"{tuple(coord.shape)} {coord.dtype}"
            raise ValueError(f"batch: this network turns queries and keys by positions; expected coord ({len(feat)}, "
                             f"3) float in metres, got {found}")
        coord = centred(coord.index_select(0, order), scene, len(sizes))
    return Stage(sorted_grid, scene, sizes, largest, orders, coord), order


def upcast(stages: Sequence[StageOutput]) -> Tensor:
    """Features of the finest of `stages` beside those of the coarser voxels it lies in: (n, C_0 + C_1 + ...), finest
    first. For Sonata 48 + 96 + 192 + 384 + 512."""
    feat = stages[-1].feat
    for stage in reversed(stages[:-1]):
        feat = torch.cat([stage.feat, take_parents(feat, stage.cluster)], 1)
    return feat


# -- from a config -----------------------------------------------------------------------------------------------------

FIXED = {"stride": 2, "attn_drop": 0, "proj_drop": 0, "pre_norm": True, "enable_rpe": False, "layer_scale": None}
IGNORED = ("type", "enable_flash", "upcast_attention", "upcast_softmax", "traceable", "freeze_encoder", "shift_coords",
           *FIXED)
KEYS = ("in_channels", "order", "enc_depths", "enc_channels", "enc_num_head", "enc_patch_size", "dec_depths",
        "dec_channels", "dec_num_head", "dec_patch_size", "mlp_ratio", "qkv_bias", "qk_scale", "drop_path",
        "shuffle_orders", "mask_token", "enc_mode", "gradient_checkpointing", "rope_base", "jitter_coords",
        "rescale_coords")


def build_point_transformer(config: Mapping[str, Any]) -> PointTransformerV3:
    """The network of a `config` as sonata.pth or utonia.pth stores it: the official constructor's arguments.

    rope_base absent, null or 0: no rotation. What a weight file rotates by is in its tensors, and read_sonata puts it
    into the config that it returns; upstream's two defaults (10 and 10000) contradict each other.

    Accepted and without effect: enable_flash, upcast_attention, upcast_softmax (attention is always the same function,
    with its softmax in float32), traceable (clusters are always returned), freeze_encoder (SonataSegmenter freezes by
    its mode), shift_coords (a common shift of positions changes nothing), type. stride 2, no dropout in attention,
    pre-norm, no relative positions, no layer scale are all there is. ValueError, naming the key, for unknown keys,
    other values of those, and lengths or widths that do not fit.
    """
    unknown = [key for key in config if key not in (*KEYS, *IGNORED)]
    if unknown:
        raise ValueError(f"model config: unknown key {', '.join(map(repr, unknown))}"
                         f"{did_you_mean(nearest(unknown[0], (*KEYS, *IGNORED)))}")
    missing = [key for key in KEYS[:6] if key not in config]
    if missing:
        raise ValueError(f"model config: {', '.join(missing)} missing")
    for key, only in FIXED.items():
        value = config.get(key, only)
        if any(v != only and (v or only) for v in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"model config: {key} is {value!r}; only {only!r} is supported")
    settings = {key: config[key] for key in KEYS if key in config}
    for name in settings["order"]:
        check_choice("model config: order", name, ORDERS)
    stages = len(settings["enc_channels"])
    for part, count in (("enc", stages), ("dec", stages - 1)):
        if part == "dec" and settings.get("enc_mode", False):
            continue
        values = {key: settings.get(key, ()) for key in KEYS if key.startswith(part + "_") and key != "enc_mode"}
        for key, value in values.items():
            if len(value) != count or min(value, default=1) < 1:
                raise ValueError(f"model config: {key} is {list(value)}; expected {count} numbers above 0"
                                 + (", or enc_mode: true for an encoder alone" if part == "dec" and not value else ""))
        for width, heads in zip(values[part + "_channels"], values[part + "_num_head"], strict=True):
            if width % heads:
                raise ValueError(f"model config: {part}_channels {width} is no multiple of {heads} heads")
    try:
        return PointTransformerV3(**settings)
    except ValueError as error:                             # of the rotation
        raise ValueError(f"model config: {error}") from None


def with_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of an encoder, with a decoder where it names none: the official one of a released network, else the
    formula in decoder_of."""
    return {**decoder_of(config)[0], **config, "enc_mode": False}


# -- segmentation ------------------------------------------------------------------------------------------------------

class SonataSegmenter(nn.Module):
    """A linear head on Point Transformer V3: seg_head on backbone, the names of the official DefaultSegmentorV2.

    mode: "lin" (frozen encoder, head on the up-cast features of all stages), "dec" (frozen encoder, trained decoder),
    "ft" (all trained), "lora" (as lin, with a low-rank change of every qkv of the encoder, trained: models/lora.py).
    forward(batch, orders=None) -> logits (N, num_classes) float32 in the order of the batch.

    In lin and lora each stage's slice of the head is applied at that stage's resolution and the scores are handed down,
    so that the N x 1232 matrix is never built; the same up to rounding. A frozen encoder runs under no_grad (in lora
    with gradients, which its updates need), but as upstream it follows train(): its drop path, and the jitter of a
    rotation, act during training. frozen_eval=True keeps it in eval mode.
    """

    def __init__(self, backbone: PointTransformerV3, num_classes: int, mode: str = "lin", frozen_eval: bool = False):
        super().__init__()
        check_choice("mode", mode, MODES)
        alone = mode in ENCODER_ONLY
        if backbone.enc_mode != alone:
            raise ValueError(f"mode {mode} needs a backbone {'without' if alone else 'with'} a decoder; set "
                             f"enc_mode accordingly")
        self.mode, self.frozen_eval, self.num_classes = mode, frozen_eval, num_classes
        # a network of one stage has nothing to decode
        width = sum(backbone.enc_channels) if alone else (*backbone.dec_channels, backbone.enc_channels[-1])[0]
        self.seg_head = nn.Linear(width, num_classes)
        self.backbone = backbone
        if mode == "lora":
            add_lora(backbone.enc)
        for module in self.frozen():
            module.requires_grad_(False)

    def frozen(self) -> list[nn.Module]:
        """The modules that are not trained; none of them contains a trained one. In lora the layers themselves, for
        the updates lie between them."""
        if self.mode == "ft":
            return []
        parts = [self.backbone.embedding, self.backbone.enc]
        if self.mode != "lora":
            return parts
        updates = {inner for part in parts for module in part.modules() if isinstance(module, LowRankUpdate)
                   for inner in module.modules()}
        return [module for part in parts for module in part.modules()
                if module not in updates and not list(module.children())]

    def frozen_names(self) -> set[str]:
        """Names of the parameters in frozen()."""
        frozen = {id(parameter) for module in self.frozen() for parameter in module.parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in frozen}

    def train(self, mode: bool = True) -> SonataSegmenter:
        super().train(mode)
        for module in self.frozen() if self.frozen_eval else ():
            module.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor], orders: Tensor | None = None) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode in ("ft", "lora")):
            stages, restore = self.backbone.encode(batch, orders)
        if self.mode not in ENCODER_ONLY:
            feat = self.backbone.decode(stages)[0].feat                              # (N, 64)
            return self.seg_head(feat).float().index_select(0, restore)
        slices = self.seg_head.weight.split(self.backbone.enc_channels, 1)
        scores = F.linear(stages[-1].feat, slices[-1], self.seg_head.bias).float()   # (n_4, C)
        for stage, weight in zip(stages[-2::-1], slices[-2::-1], strict=True):
            scores = F.linear(stage.feat, weight).float() + take_parents(scores, stage.cluster)
        return scores.index_select(0, restore)                                       # (N, C)


def build_segmenter(config: Mapping[str, Any], num_classes: int, mode: str = "lin", frozen_eval: bool = False,
                    **changes: Any) -> SonataSegmenter:
    """A SonataSegmenter from the config of a backbone (see build_point_transformer), whose decoder is added or left
    out as `mode` needs and whose mask token is left out; `changes` replace keys of the config."""
    check_choice("mode", mode, MODES)
    config = {**config, **changes, "mask_token": False}
    config = {**config, "enc_mode": True} if mode in ENCODER_ONLY else with_decoder(config)
    return SonataSegmenter(build_point_transformer(config), num_classes, mode, frozen_eval)
