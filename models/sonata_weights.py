"""Find the encoder of Point Transformer V3 in a weight file, whoever wrote it, and load it completely or not at all.

What users have: sonata.pth, concerto_large.pth, utonia.pth and their like (config and bare names), a raw pre-training
checkpoint (student and teacher), a downstream checkpoint of Pointcept or of train_sonata.py (backbone., seg_head.),
each with or without the module. of DistributedDataParallel. Upstream a wrong prefix loads nothing without a word and
trains on a random, frozen encoder; here it is an error. So is a tensor of the encoder or decoder that the network has
no place for: a network without it would run, and give wrong numbers.

Whether a network rotates (Utonia) is read from its `inv_freq` buffers and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.lora import UPDATE
from models.point_networks import ORDER, PATCH_SIZE, ROTATION
from models.point_rotary import frequencies
from models.point_transformer import PointTransformerV3
from utils.checkpoint import FORMAT
from utils.weights import load_weights, read_weights, strip_prefixes

CONTAINERS = ("state_dict", "model")
MARK = "embedding.stem.linear.weight"                   # every backbone has it; what stands before it is the prefix
BUFFER = ".attn.rope.inv_freq"                          # of each attention that rotates
UTONIA_WIDTH = 18                                       # channels of a head; only networks that rotate have it
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}        # of frequencies as stored
DECODER_LINKS = {f"up.{name}.{part}.{kind}" for name in ("proj", "proj_skip") for part in (0, 1)
                 for kind in ("weight", "bias")}


class SonataWeights(NamedTuple):
    """state: tensors by the names of PointTransformerV3. config: constructor arguments, where the file stores them,
    else None; rope_base in it is the one of the tensors. layout: what kind of file it is, for the line that is printed.
    """

    state: dict[str, Tensor]
    config: dict[str, Any] | None
    layout: str


def read_sonata(path: str | Path) -> SonataWeights:
    """The backbone in a file. Of a pre-training checkpoint the student, as upstream (the teacher is its average).

    The config of a checkpoint of our own is at ["encoder"]["config"].
    Raises what read_weights raises; ValueError for a file without such a backbone (saying what it holds), with several
    that are neither student nor teacher, for weights that are not finite, and where config and tensors contradict each
    other about the rotation.
    """
    content = read_weights(path, numpy_scalars=True)
    state, container = _state(content)
    prefixes = [name[:-len(MARK)] for name in state if name.endswith(MARK)]
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if "student" in prefix.split(".")] or prefixes
    if len(prefixes) != 1:
        found = f"several backbones ({', '.join(map(repr, prefixes))})" if prefixes else _describe(state, content)
        if any(UPDATE in name for name in state):
            raise ValueError(f"{path}: holds low-rank updates without their encoder; write a plain encoder first: "
                             f"python scripts/merge_lora.py {path} ENCODER.pth")
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
    config = _with_rotation(config, state, path, own) if isinstance(config, Mapping) else None
    return SonataWeights(state, config, layout)


def load_sonata(model: PointTransformerV3, path: str | Path) -> str:
    """Load the encoder from a file into `model`; returns load_weights' line. A decoder stays as it is.

    A mask token is read only where the model has one; low-rank updates of the model stay as they are. Raises as
    read_sonata; ValueError, and the model is unchanged, unless every tensor of the encoder is in the file in its shape,
    the encoder and decoder in the file have no other tensors than such a network has, and the rotations agree.
    """
    found = read_sonata(path)
    state = {name: tensor for name, tensor in found.state.items() if name.startswith(("embedding.", "enc."))
             and (model.embedding.mask_token is not None or name != "embedding.mask_token")}
    target = nn.ModuleDict({"embedding": model.embedding, "enc": model.enc})
    own = target.state_dict()
    missing = [name for name in own if UPDATE not in name and name not in state]
    if not missing:                                         # else load_weights names both
        _check_unknown(found.state, model, path)
        differing = [name for name in own if name.endswith(BUFFER) and not _close(own[name], state[name])]
        if differing:
            raise ValueError(f"{path}: {differing[0]} is {_numbers(state[differing[0]])}, but the network was built "
                             f"with rope_base for {_numbers(own[differing[0]])}; take rope_base out of model.encoder")
    return load_weights(target, state, path, "encoder", found.layout, keep=UPDATE)


def guess_config(state: Mapping[str, Tensor], source: str | Path = "weights") -> dict[str, Any]:
    """The config of a backbone from its tensors, for files that store none.

    Heads have 6 channels for each number of the rotation's buffers (Utonia: 18), without buffers 16. What tensors do
    not tell is as in all released models: patches of 1024, four orders, the ranges of Utonia's jitter. ValueError,
    naming `source`, where tensors are left that belong to no block found (with a renamed one among them the network
    would be cut short), and where widths are no multiple of the heads'.
    """
    config: dict[str, Any] = {"in_channels": state[MARK].shape[1], "order": list(ORDER), "drop_path": 0.3,
                              "mask_token": "embedding.mask_token" in state, "enc_mode": True}
    turns = _buffer(state, source)
    head_width = 16 if turns is None else 6 * len(turns)
    if turns is not None:
        config |= {**ROTATION, "rope_base": _base(turns)}
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
        odd = next((width for width in channels if width % head_width), None)
        if odd is not None:
            raise ValueError(f"{source}: it stores no config, and a stage of {odd} channels has no whole number of "
                             f"heads of {head_width}" + ("; was the rotation (inv_freq) left out of this file?"
                                                         if turns is None else ""))
        if depths:
            config |= {f"{part}_depths": depths, f"{part}_channels": channels,
                       f"{part}_num_head": [width // head_width for width in channels],
                       f"{part}_patch_size": [PATCH_SIZE] * len(depths), "enc_mode": part == "enc"}
    return config


# -- the rotation ------------------------------------------------------------------------------------------------------

def _buffer(state: Mapping[str, Tensor], source: str | Path) -> Tensor | None:
    """The frequencies (D / 6,) of a backbone's rotation, None where nothing rotates. ValueError unless all attentions
    have the same, or where they are not those of any base."""
    blocks = [name.removesuffix("qkv.weight") for name in state if name.endswith(".attn.qkv.weight")]
    buffers = {name: state[name] for name in state if name.endswith(BUFFER)}
    if not buffers:
        return None
    first, turns = next(iter(buffers.items()))
    without = next((name for name in blocks if f"{name}rope.inv_freq" not in buffers), None)
    if without is not None:
        raise ValueError(f"{source}: {first} is there, but {without}rope.inv_freq is missing: attention rotates in all "
                         f"blocks or in none. Fetch the file again")
    other = next((name for name, tensor in buffers.items() if not torch.equal(tensor, turns)), None)
    if other is not None:
        raise ValueError(f"{source}: {first} and {other} are different rotations; a network has one")
    if turns.ndim != 1 or not len(turns) or not _close(turns, frequencies(6 * len(turns), _base(turns))):
        raise ValueError(f"{source}: {first} is {_numbers(turns)}; expected 1, f, f^2, ... of a rotation")
    return turns


def _base(turns: Tensor) -> float:
    """The base of frequencies (K,): f_1 = base^(-1 / K). Of a single one (heads of 6 channels) every base has f_0 = 1;
    10 stands for it."""
    if len(turns) < 2 or not turns[1] > 0:
        return 10.0
    return float(f"{float(turns[1]) ** -len(turns):.5g}")


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = max(ROUNDING.get(tensor.dtype, 1e-4) for tensor in (one, other))
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=tolerance, atol=0)


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.flatten()[:6].tolist()) + "]"


def _with_rotation(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str | Path,
                   own: bool) -> dict[str, Any]:
    """A file's config with the rotation of its tensors. A config without rope_base, or with null, gets the buffers'
    base, and the published ranges of jitter and rescaling where it has no such key. ValueError where it contradicts the
    tensors, and for heads of 18 channels without buffers, unless the file is a checkpoint of ours, which says so."""
    config, turns = dict(config), _buffer(state, source)
    named = config.get("rope_base")
    if named is not None and not isinstance(named, int | float):
        raise ValueError(f"{source}: its config has rope_base {named!r}; expected a number")
    lists = [(config.get(f"{part}_channels"), config.get(f"{part}_num_head")) for part in ("enc", "dec")]
    widths = [(width, heads) for channels, num_head in lists if isinstance(channels, list | tuple)
              and isinstance(num_head, list | tuple) for width, heads in zip(channels, num_head, strict=False)
              if isinstance(width, int) and isinstance(heads, int) and heads > 0]
    if turns is None:
        if named:
            raise ValueError(f"{source}: its config has rope_base {named}, but no tensor of the rotation "
                             f"(enc.enc0.block0{BUFFER}) is in the file; fetch the complete file")
        if not own and any(width == UTONIA_WIDTH * heads for width, heads in widths):
            raise ValueError(f"{source}: heads of {UTONIA_WIDTH} channels are Utonia's, but no tensor of its rotation "
                             f"(enc.enc0.block0{BUFFER}) is in the file: without it all numbers would be wrong. Fetch "
                             f"the complete file")
        return config
    if len(turns) > 1 and named is not None and \
            not (named > 0 and _close(turns, frequencies(6 * len(turns), named))):
        raise ValueError(f"{source}: its config has rope_base {named}, but its tensors rotate with base "
                         f"{_base(turns):g}; one of them is not of this file")
    odd = next(((width, heads) for width, heads in widths if width != 6 * len(turns) * heads), None)
    if odd is not None:
        raise ValueError(f"{source}: {odd[0]} channels of {odd[1]} heads, but its rotation is for heads of "
                         f"{6 * len(turns)} channels; config and tensors are of different networks")
    return {**ROTATION, **config, "rope_base": float(named) if named else _base(turns)}


def _check_unknown(state: Mapping[str, Tensor], model: PointTransformerV3, source: str | Path) -> None:
    """ValueError for tensors under embedding., enc. or dec. for which the network, or a decoder of it, has no place."""
    own = set(model.state_dict()) | {"embedding.mask_token"}
    layers = {name.split(".", 3)[3] for name in own if name.startswith("enc.enc0.block0.") and UPDATE not in name}

    def known(name: str) -> bool:
        parts = name.split(".", 3)
        if parts[0] != "dec":
            return name in own and UPDATE not in name
        return len(parts) == 4 and (f"{parts[2]}.{parts[3]}" in DECODER_LINKS or
                                    (parts[2].startswith("block") and parts[3] in layers))

    unknown = [name for name in state if not known(name)]
    if any(UPDATE in name for name in unknown):
        raise ValueError(f"{source}: holds low-rank updates ({unknown[0]}, ...); write a plain encoder first: python "
                         f"scripts/merge_lora.py {source} ENCODER.pth")
    if unknown:
        raise ValueError(f"{source}: {len(unknown)} tensors of its encoder or decoder have no place in this network "
                         f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}): without them every number "
                         f"would be wrong. Is the file of this model and size?")


# -- heads -------------------------------------------------------------------------------------------------------------


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
