"""Load the weights of DINOv3 and DINOv2 backbones, whoever saved them, and find them again from a checkpoint.

What users have: the official .pth files (a path, or the link from the access e-mail), a folder or file of Hugging Face
(three ways of naming DINOv3's tensors are in use, one for DINOv2), or nothing, for a first try. Each is brought to the
official names, then loaded completely or not at all. Satellite (SAT-493M) weights want another normalisation.
"""

from __future__ import annotations

import json
import re
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from models.dinov3 import BACKBONES, FrozenBackbone, VisionTransformer, ViTConfig, backbone_name, rope_periods
from utils.checks import check_choice
from utils.weights import load_weights, read_weights, sha256_file, strip_prefixes

NORMALIZATIONS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "sat493m": ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143]),
}
SATELLITE = re.compile(r"sat493m|eadcf0ff|a6675841")       # in the names of the files: data set, or hash of L and 7B
GATED = ("DINOv3's weights are given out on request: ask at https://ai.meta.com/resources/models-and-libraries/"
         "dinov3-downloads/ or on huggingface.co/facebook, download the file and give its path "
         "(links from the e-mail expire; DINOv2's files are open)")
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

HF_NAMES = [(re.compile(pattern), name) for pattern, name in (       # Hugging Face -> official, in this order
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda match: f".attention.{match[1][0]}_proj."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
)]
HF_MLP = {"up_proj": "fc1", "down_proj": "fc2"}
HF_GATED_MLP = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}


# -- backbones ---------------------------------------------------------------------------------------------------------

def load_backbone(name: str, weights: str | Path | None, seed: int = 0,
                  normalization: str = "auto") -> tuple[FrozenBackbone, str]:
    """The backbone `name` (see backbone_name) with `weights`, on the CPU in float32, and a line that says what it is.

    weights: path of a file or of a Hugging Face folder, a URL, or None: random from `seed` (the message then starts
    with WARNING). normalization: "imagenet", "sat493m", or "auto": what preprocessor_config.json beside the file says,
    else sat493m where the file's name or content shows it, else imagenet. Raises what read_weights raises; ValueError,
    in one line, for an unknown name, a failed download, a file of another model or size, weights that are not finite.
    """
    name = backbone_name(name)
    check_choice("normalization", normalization, ("auto", *NORMALIZATIONS))
    config = BACKBONES[name]
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)      # torch.manual_seed would seed the GPUs too
            vit = VisionTransformer(config)
        file = None
        found = ("imagenet", *NORMALIZATIONS["imagenet"])
        message = (f"WARNING: {name} is randomly initialised (seed {seed}), as --backbone-weights random asks for. "
                   f"Good for trying things out; results mean nothing")
    else:
        file = fetch(weights)
        content = read_file(file)
        vit, message = load_vit(config, content, file, name)
        found = _normalization(file, name, content)
    if normalization != "auto":
        if weights is not None and found[0] != normalization:
            message += f"; WARNING: normalisation {normalization} is set, but this file looks like {found[0]}"
        found = (normalization, *NORMALIZATIONS[normalization])
    kind, mean, std = found
    entry = {"name": name, "file": None if file is None else str(file), "sha256": "", "seed": seed,
             "normalization": kind, "mean": mean, "std": std}
    backbone = FrozenBackbone(vit, config.taps, mean, std, entry)
    entry["sha256"] = backbone.sha256()
    return backbone, f"{message}; normalisation {kind}: mean {mean}, std {std}"


def restore_backbone(entry: Mapping[str, Any], weights: str | Path | None = None) -> FrozenBackbone:
    """The backbone that a checkpoint's `entry` (see load_backbone) names; `weights` where its file is elsewhere now.

    ValueError where there is no such file, or its weights are not the ones of the checkpoint.
    """
    file = weights or entry["file"]
    advice = ("The frozen backbone is not stored in checkpoints; give the file it was trained with: "
              "--backbone-weights PATH (model.backbone_weights=PATH)")
    if weights is None and file is not None and not Path(file).exists():
        raise ValueError(f"{file}: no such file, but the checkpoint needs the {entry['name']} weights in it. {advice}")
    backbone, _ = load_backbone(entry["name"], file, entry["seed"])
    if backbone.sha256() != entry["sha256"]:
        raise ValueError(f"{file or 'random weights'}: these are not the {entry['name']} weights that the checkpoint "
                         f"was trained on (sha256 {backbone.sha256()[:8]}, not {entry['sha256'][:8]}). {advice}")
    kept = {**entry, "file": backbone.entry["file"], "mean": list(entry["mean"]), "std": list(entry["std"])}
    result = FrozenBackbone(backbone.vit, backbone.taps, kept["mean"], kept["std"], kept)
    result._sha256 = backbone.sha256()
    return result


def load_vit(config: ViTConfig, content: Mapping[str, Any], source: str | Path,
             name: str = "") -> tuple[VisionTransformer, str]:
    """A ViT with the weights of `content` (as read from a file), and load_weights' line. Raises as load_backbone."""
    state, layout = to_official_names(content, source)
    sizes = _sizes(state)
    if name and sizes and name not in sizes:
        raise ValueError(f"{source}: holds {' or '.join(sizes)}, not {name}. Choose that backbone, or another file.")
    bad = next((key for key, tensor in state.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{source}: {bad} is not finite. Fetch the file again.")
    if config.pos_grid is None:
        state.setdefault("rope_embed.periods", rope_periods(config))
    with torch.device("meta"):                             # initialising what is overwritten takes minutes for 7B
        vit = VisionTransformer(config)
    return vit, load_weights(vit.to_empty(device="cpu"), state, source, "backbone", layout)


def to_official_names(content: Mapping[str, Any], source: str | Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a ViT under their official names, and the layout they had: DINOv3, DINOv2 or Hugging Face.

    The key part of the qkv bias is set to zero where the file has the buffer `bias_mask` that says so (its values are
    not read: they are NaN in files of a model that was never initialised). ValueError where `content` is no such ViT.
    """
    content = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {str(key): tensor for key, tensor in strip_prefixes(content).items() if isinstance(tensor, Tensor)}
    layout = "DINOv2" if "pos_embed" in state else "DINOv3"
    unprefixed = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    if "embeddings.cls_token" in unprefixed:
        state = _from_hugging_face(unprefixed)
        layout = "Hugging Face"
    if "cls_token" not in state or "patch_embed.proj.weight" not in state:
        raise ValueError(f"{source}: no DINOv3 or DINOv2 vision transformer; it holds {', '.join(list(state)[:3])} ... "
                         f"(ConvNeXt and timm's files are not read). Use an official or a Hugging Face file.")
    for key in [key for key in state if key.endswith("bias_mask")]:
        del state[key]
        if (bias := key.removesuffix("_mask")) in state:   # otherwise load_weights reports it as missing
            query, _, value = state[bias].chunk(3)
            state[bias] = torch.cat([query, torch.zeros_like(query), value])
    return {key: tensor for key, tensor in state.items() if not key.startswith("local_cls_norm.")}, layout


def _from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of DINOv3ViTModel or Dinov2Model, "model." already dropped: renamed; q, k and v joined, a missing bias
    of k is zero."""
    gated = any(".gate_proj." in key for key in state)
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for pattern, replacement in HF_NAMES:
            key = pattern.sub(replacement, key)
        for old, new in (HF_GATED_MLP if gated else HF_MLP).items():
            key = key.replace(f".mlp.{old}.", f".mlp.{new}.")
        result[key] = tensor.reshape(1, -1) if key == "mask_token" else tensor
    if "pos_embed" not in result and "register_tokens" in result:
        result["storage_tokens"] = result.pop("register_tokens")
    for key in [key for key in result if ".attention.q_proj." in key]:
        parts = [result.pop(key.replace("q_proj", part), None) for part in ("q_proj", "k_proj", "v_proj")]
        parts = [torch.zeros_like(parts[0]) if part is None and key.endswith("bias") else part for part in parts]
        if all(part is not None for part in parts):        # otherwise load_weights reports the tensor as missing
            result[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return result


def _sizes(state: Mapping[str, Tensor]) -> list[str]:
    """The BACKBONES that these tensors (official names) can be, by their width, depth, patch and feed-forward."""
    ffn = next((kind for part, kind in ((".fc1.", "mlp"), (".w1.", "swiglu"), (".w12.", "swiglu_fused"))
                if any(part in key for key in state)), None)
    tokens = state.get("storage_tokens", state.get("register_tokens"))
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    found = (dim, sum(key.endswith(".attn.qkv.weight") for key in state), ffn, patch,
             0 if tokens is None else tokens.shape[1])
    return [name for name, c in BACKBONES.items()
            if (c.embed_dim, c.depth, c.ffn, c.patch_size, c.num_registers) == found]


def _normalization(file: Path, name: str, content: Mapping[str, Any]) -> tuple[str, Sequence[float], Sequence[float]]:
    """(kind, mean, std) that suit a file of weights, see load_backbone."""
    folder = file if file.is_dir() else file.parent
    config = folder / "preprocessor_config.json"
    if config.is_file():
        values = json.loads(config.read_text())
        mean, std = values.get("image_mean"), values.get("image_std")
        if mean and std:
            kind = next((kind for kind, known in NORMALIZATIONS.items() if known == (mean, std)), config.name)
            return kind, mean, std
    satellite = (SATELLITE.search((folder if file.name in FOLDER_FILES else file).name)
                 or name == "dinov3_vitl16" and any("local_cls_norm." in str(key) for key in content))
    kind = "sat493m" if satellite else "imagenet"
    return kind, *NORMALIZATIONS[kind]


# -- files -------------------------------------------------------------------------------------------------------------

def fetch(weights: str | Path) -> Path:
    """A path as it is; a URL downloaded once, to torch.hub's folder, and compared with the hash in its file name.

    ValueError, in one line, where the download fails or the file's hash is another. The part of a URL behind "?" (a
    signature) is never printed or stored.
    """
    if not str(weights).startswith(("https://", "http://")):
        return Path(weights).expanduser()
    url = urlsplit(str(weights))
    shown = f"{url.scheme}://{url.netloc}{url.path}"
    name = Path(url.path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    prefix = digits[1] if digits else ""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(str(weights), str(path), hash_prefix=prefix or None)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{shown}: the server refuses it (HTTP {error.code} {error.reason}). {GATED}.") from error
        except (OSError, RuntimeError) as error:           # no network, no space; RuntimeError: the hash is another
            raise ValueError(f"{shown}: cannot be downloaded ({getattr(error, 'reason', error)}). Download it "
                             f"elsewhere and give its path. {GATED}.") from error
    elif not sha256_file(path).startswith(prefix):
        raise ValueError(f"{path}: its sha256 does not start with {prefix}, as its name says: damaged. Delete it.")
    return path


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file, or of a Hugging Face folder (one file, or several with an index)."""
    if not path.is_dir():
        return read_weights(path)
    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path}: a folder without {' or '.join(FOLDER_FILES)}. Name a file or a Hugging Face folder.")
    if file.suffix != ".json":
        return read_weights(file)
    parts = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    return {key: tensor for part in parts for key, tensor in read_weights(path / part).items()}


def read_head(path: str | Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint of ours (path or URL), or of a file of tensors, by their names. Raises what
    read_weights raises."""
    content = read_weights(fetch(path))
    return strip_prefixes(content["model"] if isinstance(content.get("model"), dict) else content)


def load_head(model: nn.Module, state: dict[str, Tensor], path: str | Path, class_layer: str,
              extra: int = 0) -> list[str]:
    """Fill the trained part of a model from `state`, read from `path`; returns lines for the log. Tensors with
    class_layer in their names that are for other classes stay as they are; extra: of their rows, what is no class.
    ValueError for every other difference."""
    state = dict(state)
    lines = []
    for name, own in model.state_dict().items():
        stored = state.get(name)
        if class_layer in name and stored is not None and stored.shape != own.shape and \
                stored.shape[1:] == own.shape[1:]:
            lines = [f"the class layer starts anew: {len(stored) - extra} classes in the file, {len(own) - extra} here"]
            state[name] = own
    return [load_weights(model, state, path, what="head"), *lines]


def read_released_head(path: str | Path) -> dict[str, Tensor]:
    """Adapter and Mask2Former head of the released ADE20K model (path or URL), by the names of Mask2FormerSegmenter.

    They start with "segmentation_model.0." (adapter) and "segmentation_model.1." (head); tensors of a backbone are
    dropped. Raises what read_weights raises; ValueError for another file.
    """
    state = {key: tensor for key, tensor in read_head(path).items() if ".backbone." not in key}
    parts = {key[:21] for key in state}
    if parts != {"segmentation_model.0.", "segmentation_model.1."}:
        raise ValueError(f"{path}: no released Mask2Former head; it holds {', '.join(list(state)[:3])} ...")
    return state
