"""Find the encoder of Point Transformer V3 in a weight file, whoever wrote it, and load it completely or not at all.

What users have: sonata.pth and sonata_small.pth (config and bare names), a raw pre-training checkpoint (student and
teacher), a downstream checkpoint of Pointcept or of train_sonata.py (backbone., seg_head.), each with or without the
module. of DistributedDataParallel. Upstream a wrong prefix loads nothing without a word and trains on a random, frozen
encoder; here it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.point_transformer import PointTransformerV3
from utils.checkpoint import FORMAT
from utils.weights import load_weights, read_weights, strip_prefixes

CONTAINERS = ("state_dict", "model")
MARK = "embedding.stem.linear.weight"                   # every backbone has it; what stands before it is the prefix
SONATA_ORDER = ("z", "z-trans", "hilbert", "hilbert-trans")


class SonataWeights(NamedTuple):
    """state: tensors by the names of PointTransformerV3. config: constructor arguments, where the file stores them,
    else None. layout: what kind of file it is, for the line that is printed."""

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    layout: str


def read_sonata(path: str | Path) -> SonataWeights:
    """The backbone in a file. Of a pre-training checkpoint the student, as upstream (the teacher is its average).

    The config of a checkpoint of our own is at ["encoder"]["config"].
    Raises what read_weights raises; ValueError for a file without such a backbone (saying what it holds), with several
    that are neither student nor teacher, and for weights that are not finite.
    """
    content = read_weights(path, numpy_scalars=True)
    state, container = _state(content)
    prefixes = [name[:-len(MARK)] for name in state if name.endswith(MARK)]
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if "student" in prefix.split(".")] or prefixes
    if len(prefixes) != 1:
        found = f"several backbones ({', '.join(map(repr, prefixes))})" if prefixes else _describe(state, content)
        raise ValueError(f"{path}: expected one Point Transformer V3 in this file, found {found}. Use sonata.pth, a "
                         f"checkpoint of Sonata's pre-training, or one trained from it.")
    prefix = prefixes[0]
    state = {name[len(prefix):]: tensor for name, tensor in state.items()
             if name.startswith(prefix) and name[len(prefix):].startswith(("embedding.", "enc.", "dec."))}
    bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{path}: {prefix}{bad} is not finite. Use another checkpoint, or fetch the file again.")
    own = content.get("format") == FORMAT
    config = (content.get("encoder") or {}).get("config") if own else content.get("config")
    layout = ("SegHeads checkpoint, " if own else f"{container}, ") + (f"prefix {prefix!r}" if prefix else "no prefix")
    return SonataWeights(state, dict(config) if isinstance(config, Mapping) else None, layout)


def load_sonata(model: PointTransformerV3, path: str | Path) -> str:
    """Load the encoder from a file into `model`; returns load_weights' line. A decoder stays as it is.

    A mask token is read only where the model has one. Raises as read_sonata; ValueError, and the model is unchanged,
    unless every tensor of the encoder is in the file in its shape.
    """
    found = read_sonata(path)
    state = {name: tensor for name, tensor in found.state.items() if name.startswith(("embedding.", "enc."))
             and (model.embedding.mask_token is not None or name != "embedding.mask_token")}
    target = nn.ModuleDict({"embedding": model.embedding, "enc": model.enc})
    return load_weights(target, state, path, "encoder", found.layout)


def guess_config(state: Mapping[str, Tensor], source: str | Path = "weights") -> dict[str, Any]:
    """The config of a backbone from the shapes of its tensors, for files that store none.

    What shapes do not tell is as in all released models: heads of 16 channels, patches of 1024, four orders.
    ValueError, naming `source`, where tensors are left that belong to no block found: with a renamed one among them
    the network would be cut short.
    """
    config: dict[str, Any] = {"in_channels": state[MARK].shape[1], "order": list(SONATA_ORDER), "drop_path": 0.3,
                              "mask_token": "embedding.mask_token" in state, "enc_mode": True}
    for part, link in (("enc", "down"), ("dec", "up")):
        depths, channels, known = [], [], set()
        while f"{part}.{part}{len(depths)}.block0.cpe.0.weight" in state:
            stage, depth = f"{part}.{part}{len(depths)}", 0
            while f"{stage}.block{depth}.cpe.0.weight" in state:
                depth += 1
            known |= {f"{stage}.{name}" for name in (link, *(f"block{i}" for i in range(depth)))}
            depths.append(depth)
            channels.append(state[f"{stage}.block0.cpe.0.weight"].shape[0])
        left = next((name for name in state if name.startswith(f"{part}.")
                     and ".".join(name.split(".")[:3]) not in known), None)
        if left is not None:
            raise ValueError(f"{source}: {left} belongs to none of the {len(depths)} stages of {depths} blocks that "
                             f"the names tell; is a cpe.0.weight renamed? Use sonata.pth")
        if depths:
            config |= {f"{part}_depths": depths, f"{part}_channels": channels,
                       f"{part}_num_head": [width // 16 for width in channels],
                       f"{part}_patch_size": [1024] * len(depths), "enc_mode": part == "enc"}
    return config


def read_linear_head(path: str | Path) -> dict[str, Tensor]:
    """seg_head.weight (classes, width) and seg_head.bias (classes,) from the released linear-probe head or from any
    downstream checkpoint. Raises as read_sonata."""
    content = read_weights(path, numpy_scalars=True)
    state, _ = _state(content)
    head = {"seg_head." + part: [tensor for name, tensor in state.items()
                                 if name == f"seg_head.{part}" or name.endswith(f".seg_head.{part}")]
            for part in ("weight", "bias")}
    if any(len(found) != 1 for found in head.values()):
        raise ValueError(f"{path}: expected one seg_head.weight and one seg_head.bias, found "
                         f"{_describe(state, content)}. Use sonata_linear_prob_head_sc.pth or a downstream checkpoint.")
    return {name: found[0] for name, found in head.items()}


def _state(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The state dict in a file's content without wrappers' prefixes, and where it was."""
    where = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
    state = strip_prefixes(content if where is None else content[where])
    return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}, \
        where or "plain state dict"


def _describe(state: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    names: Sequence[str] = list(state or content)
    return f"{len(names)} {'tensors' if state else 'entries'} ({', '.join(map(str, names[:3]))}, ...)"
