"""Weights of EoMT: the backbone to start from, whole released networks, and released differences to a backbone.

The DINOv2 networks were released whole. Those on DINOv3 hold differences, because DINOv3's weights may not be passed on
freely: they are added to the backbone they were made from, and mean nothing without it. Nothing in a file says which of
the two it is, so the norms' weights decide. Two ways of naming the tensors are read, the official one and that of
transformers, besides our own checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.dinov3 import VisionTransformer, resize_positions, rope_periods
from models.dinov3_weights import NORMALIZATIONS, fetch, load_head, read_file, to_official_names
from models.eomt import PATCH_SIZE, EoMT, eomt_config
from utils.weights import strip_prefixes

TRANSFORMERS_NAMES = [(re.compile(pattern), name) for pattern, name in (      # -> official, in this order
    (r"^query\.", "q."),
    (r"^class_predictor\.", "class_head."),
    (r"^mask_head\.fc([123])\.", lambda match: f"mask_head.{2 * int(match[1]) - 2}."),
    (r"^upscale_block\.block\.", "upscale."),
    (r"\.layernorm2d\.", ".norm."),
    (r"^embeddings\.position_embeddings\.weight$", "encoder.backbone.embeddings.position_embeddings"),
    (r"^(embeddings|layernorm)\.", r"encoder.backbone.\1."),
    (r"^layers\.", "encoder.backbone.blocks."),
    (r"\.attention\.out_proj\.", ".attention.o_proj."),
)]
HEADS = ("q.", "class_head.", "mask_head.", "upscale.")


# -- the backbone ------------------------------------------------------------------------------------------------------

def trainable_vit(vit: VisionTransformer, name: str, image_size: int) -> VisionTransformer:
    """The backbone `name` as it is fine-tuned on squares of image_size pixels: DINOv2 resampled to patches of 16."""
    config = eomt_config(name, image_size)
    if config == vit.config:
        return vit
    resampled = VisionTransformer(config)
    resampled.load_state_dict(resample_dinov2(vit.state_dict(), config.pos_grid))
    return resampled


def blank_vit(name: str, state: Mapping[str, Tensor]) -> VisionTransformer:
    """The ViT, on no device, of an EoMT on the backbone `name` whose tensors are `state`: with their grid of positions.
    """
    position = state.get("encoder.pos_embed")
    side = 0 if position is None else math.isqrt(position.shape[1])
    with torch.device("meta"):
        return VisionTransformer(eomt_config(name, PATCH_SIZE * side))


def resample_dinov2(state: Mapping[str, Tensor], grid: tuple[int, int], patch_size: int = 16) -> dict[str, Tensor]:
    """A published DINOv2 (official names) for other patches, and positions for a grid (h, w) of them.

    The kernel is the one whose answer to an enlarged patch comes nearest to the old one's (pseudo-inverse of the
    bicubic resize with antialias; Beyer et al. 2023, FlexiViT, section 3.4), as timm does it. The class position is
    added to the class token: pos_embed (1, h w, C) is that of the patches alone.
    """
    kernel = state["patch_embed.proj.weight"]                                            # (C, 3, s, s)
    old = kernel.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    resize = F.interpolate(basis, (patch_size, patch_size), mode="bicubic", antialias=True).flatten(1)   # (s s, S S)
    resampled = kernel.double().flatten(2) @ torch.linalg.pinv(resize).T
    position = state["pos_embed"]
    side = math.isqrt(position.shape[1] - 1)
    return {**state, "cls_token": state["cls_token"] + position[:, :1],
            "pos_embed": resize_positions(position[:, 1:], (side, side), True, size=grid),
            "patch_embed.proj.weight": resampled.unflatten(2, (patch_size, patch_size)).to(kernel.dtype)}


# -- whole networks and differences ------------------------------------------------------------------------------------

def to_eomt_names(content: Mapping[str, Any], source: str | Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors of an EoMT under the names of models.eomt.EoMT, and its number of joint blocks where the file has it.

    ValueError where `content` is no EoMT. What is not a weight (masks' shares, the pixels' mean) is dropped.
    """
    content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {str(key).replace("_orig_mod.", ""): tensor for key, tensor in content.items()
             if isinstance(tensor, Tensor)}
    state = strip_prefixes({key: tensor for key, tensor in state.items() if not key.startswith("criterion.")},
                           ("module.", "network.", "model."))
    shares = state.pop("attn_mask_probs", None)
    if "encoder.cls_token" in state:
        return state, None
    if "query.weight" in state:
        state = {_renamed(key): tensor for key, tensor in state.items()}
    if "q.weight" not in state:
        raise ValueError(f"{source}: no EoMT; it holds {', '.join(list(state)[:3])} ... Use a released file, official "
                         f"or of transformers, or a checkpoint of train_eomt.py.")
    vit = {key.removeprefix("encoder.backbone."): tensor for key, tensor in state.items()
           if key.startswith("encoder.backbone.")}
    vit = {re.sub(r"^patch_embed\.(cls_token|register_tokens|patch_embeddings)", r"embeddings.\1", key): tensor
           for key, tensor in vit.items()}
    vit = {"register_tokens" if key == "reg_token" else key: tensor for key, tensor in vit.items()}
    vit, _ = to_official_names(vit, source)
    vit.pop("mask_token", None)
    if "pos_embed" in vit:
        vit["pos_embed"] = vit["pos_embed"].reshape(1, -1, vit["pos_embed"].shape[-1])
    heads = {key: tensor for key, tensor in state.items() if key.startswith(HEADS)}
    state = {**heads, **{f"encoder.{key}": tensor for key, tensor in vit.items()}}
    return state, None if shares is None else shares.numel()


def _renamed(key: str) -> str:
    for pattern, replacement in TRANSFORMERS_NAMES:
        key = pattern.sub(replacement, key)
    return key


def holds_differences(state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> bool:
    """Whether `state` (names of EoMT) is a difference to a backbone rather than a network.

    With the state of the backbone, `base`: whether the weights of the ViT's norms are nearer to 0 than to those of the
    base. Without: a network's are positive almost everywhere and rarely small, differences are neither.
    """
    names = [key for key in state if re.fullmatch(r"encoder\.(.*\.)?norm\d?\.weight", key)]
    own = torch.cat([state[key].float() for key in names])
    if base is not None:
        other = torch.cat([base[key].float() for key in names])
        return bool(own.norm() < (own - other).norm())
    return bool((own > 0).float().mean() < 0.9 or own.abs().median() < 0.1)


def load_network(model: EoMT, path: str | Path, base: Mapping[str, Any] | None,
                 normalization: str = "auto") -> tuple[dict | None, list[str]]:
    """Fill an EoMT from a released file or a checkpoint of ours; returns the checkpoint's `encoder` entry (None if it
    is no checkpoint) and lines for the log.

    base: the entry of the backbone that model.encoder holds, which a file of differences is added to; None where it
    holds nothing. Positions are resized to the model's grid; a class layer for other classes starts anew. ValueError,
    in one line, for differences without a base, a whole network with one, a file of another size, with other joint
    blocks or another normalization (unless "auto"); what read_weights raises.
    """
    content = read_file(fetch(path))
    ours = content.get("script") == "train_eomt.py"
    state, joint_blocks = to_eomt_names(content, path)
    if ours:
        joint_blocks = content["config"]["model"]["joint_blocks"]
    if joint_blocks not in (None, model.joint_blocks):
        raise ValueError(f"{path}: has queries in its last {joint_blocks} blocks, not {model.joint_blocks}: "
                         f"--joint-blocks {joint_blocks}")
    if ours and normalization not in ("auto", content["encoder"]["normalization"]):
        raise ValueError(f"{path}: trained with --normalization {content['encoder']['normalization']}, not "
                         f"{normalization}; leave the flag out")
    own = model.state_dict()
    if unfit := [key for key, tensor in own.items() if key.startswith("encoder.blocks.") and
                 (key not in state or state[key].shape != tensor.shape)]:
        raise ValueError(f"{path}: {len(unfit)} tensors of the blocks are missing or of another shape ({unfit[0]}). "
                         f"Is it of this --backbone?")
    lines = []
    if holds_differences(state, None if base is None else own):
        _check_base(path, base)
        state |= {key: own[key] + state[key] for key in own.keys() & state.keys() if key.startswith("encoder.")}
        lines = [f"added the differences in {path} to the backbone"]
    elif base is not None:
        raise ValueError(f"{path}: holds a whole network, no differences to a backbone: leave --backbone-weights out")
    if "encoder.rope_embed.periods" in own:
        state.setdefault("encoder.rope_embed.periods", rope_periods(model.encoder.config))
    elif "encoder.pos_embed" in state:
        state["encoder.pos_embed"] = _fitted(state["encoder.pos_embed"], model.encoder.config.pos_grid, path)
    lines += load_head(model, state, path, "class_head.", extra=1)
    return content["encoder"] if ours else None, lines


def _check_base(path: str | Path, base: Mapping[str, Any] | None) -> None:
    if base is None:
        raise ValueError(f"{path}: holds differences to a backbone's weights, as the released files for DINOv3 do: "
                         f"give these weights, --backbone-weights FILE, and they are added")
    if base["file"] is None or base["normalization"] == "sat493m":
        what = "random weights" if base["file"] is None else "weights trained on satellite images (SAT-493M)"
        raise ValueError(f"{path}: holds differences to the weights that DINOv3 learnt from web images (LVD-1689M), "
                         f"and --backbone-weights names {what}; name that file")


def _fitted(position: Tensor, grid: tuple[int, int], path: str | Path) -> Tensor:
    """Positions (1, n, C) of a square grid, resized where `grid` is another."""
    side = math.isqrt(position.shape[1])
    if position.shape[1] == grid[0] * grid[1]:
        return position
    if side * side != position.shape[1]:
        raise ValueError(f"{path}: its {position.shape[1]} positions are those of no square")
    return resize_positions(position, (side, side), True, size=grid)


def released_entry(name: str, path: str | Path, normalization: str) -> dict[str, Any]:
    """The entry for checkpoints of a run that starts from a released network: trained with ImageNet's mean and std."""
    kind = "imagenet" if normalization == "auto" else normalization
    mean, std = NORMALIZATIONS[kind]
    return {"name": name, "file": str(path), "sha256": "", "seed": 0, "normalization": kind, "mean": mean, "std": std}
