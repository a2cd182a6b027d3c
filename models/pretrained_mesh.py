"""Find the encoder in a file of pre-trained mesh weights, whoever wrote it, and say which layout it had.

What users have: a file of train_jepa.py or of another I-JEPA (keys encoder, target_encoder, predictor, opt, epoch,
loss), a checkpoint of train_downstream.py (names encoder.* under `model`), or a plain state dict, as DiffusionNet's
official ones are; any of them with the `module.` of DistributedDataParallel or the `_orig_mod.` of torch.compile before
every name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.diffusion_net import DiffusionNet
from models.nomeformer import Nomeformer
from utils.weights import load_weights, read_weights, sha256_file, strip_prefixes

# The files of github.com/nmwsharp/diffusion-net, experiments/human_segmentation_original/pretrained_models (MIT; some
# of the meshes they were trained on are for research only): sha256 -> the vertex features they were trained on.
OFFICIAL_DIFFUSION_NETS = {
    "060cda072f9c25d82640fd91d6dd46b091eb3d8215bc315aee2cbc2231a516a7": ["hks"],
    "dc56642b7da26d8c7afc838c9eec774daff5fc79ebd0021131bbc70d65c49be6": ["xyz"],
}
ENCODERS = ("target_encoder", "encoder")                # the teacher first: it is what I-JEPA evaluates
CONTAINERS = ("model", "model_state_dict", "state_dict")


def read_encoder(path: str | Path) -> tuple[dict[str, Tensor], str, dict[str, Any] | None]:
    """The weights of a Nomeformer, by its own names: (state_dict, layout, feature_spec).

    Of a file with target_encoder and encoder, the first. layout: where in the file they were, for the line that
    load_weights prints. feature_spec {names, widths, mean, std}: what the encoder was trained on (see
    `check_features`), None where the file does not say. Load with utils.checkpoint.load_weights, which wants every
    tensor. Raises what read_weights raises; ValueError for a file without a Nomeformer (saying what it holds instead)
    and for weights that are not finite.
    """
    content = read_weights(path, numpy_scalars=True)
    for layout, state in _candidates(content, ENCODERS[0]):
        state = strip_prefixes(state)
        if _is_nomeformer(state):
            bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
            if bad is not None:
                raise ValueError(f"{path}: {bad} in {layout} is not finite; that run had diverged. "
                                 f"Use an earlier checkpoint.")
            return state, layout, _feature_spec(content)
    raise ValueError(f"{path}: no mesh encoder in this file; {_describe(content)}. "
                     f"Expected the tensors of a Nomeformer under target_encoder, encoder or model, or as a plain "
                     f"state dict.")


def read_diffusion_net(path: str | Path) -> tuple[dict[str, Tensor], str, dict[str, Any] | None]:
    """The weights of a DiffusionNet, by its own names, the last layer with them where the file has it: (state_dict,
    layout, feature_spec), as read_encoder.

    Files: the official ones, other plain state dicts, checkpoints of train_downstream.py. Raises what read_weights
    raises; ValueError for a file without a DiffusionNet (saying what it holds instead) and for weights that are not
    finite.
    """
    content = read_weights(path, numpy_scalars=True)
    for layout, state in _candidates(content, "encoder"):
        state = strip_prefixes(state)
        if "first_lin.weight" not in state or not any(str(name).startswith("block_0.") for name in state):
            continue
        if layout.endswith(": encoder.*"):                  # the head of a checkpoint of ours is its last layer
            outer = strip_prefixes(_tensors(content[layout.partition(":")[0]]))
            state |= {f"last_lin.{name}": outer[f"head.{name}"] for name in ("weight", "bias")
                      if f"head.{name}" in outer}
        bad = next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)
        if bad is not None:
            raise ValueError(f"{path}: {bad} in {layout} is not finite; that run had diverged. "
                             f"Use an earlier checkpoint.")
        official = OFFICIAL_DIFFUSION_NETS.get(sha256_file(path))
        return state, layout, {"names": official} if official else _feature_spec(content)
    raise ValueError(f"{path}: no DiffusionNet in this file; {_describe(content)}. Expected first_lin, block_0, "
                     f"block_1, ... in a plain state dict, or under encoder in a checkpoint of train_downstream.py.")


def load_diffusion_net(network: DiffusionNet, state: Mapping[str, Tensor], source: str | Path, layout: str = "",
                       head: nn.Linear | None = None) -> str:
    """Load all of a DiffusionNet from `read_diffusion_net`'s state, or nothing. Returns the line to print.

    A network without last layer leaves that of the file aside, and the line says so, or takes it as `head`. Every other
    name of the file must be the network's (a file of five blocks is not loaded into four), in its shape: ValueError,
    which compares the two architectures. The modules are then unchanged.
    """
    last = {name: tensor for name, tensor in state.items() if name.startswith("last_lin.")}
    body = state if network.last_lin is not None else {n: t for n, t in state.items() if n not in last}
    own, theirs = describe_diffusion_net(network.state_dict()), describe_diffusion_net(body)
    unexpected = sorted(set(body) - set(network.state_dict()))
    if own != theirs or unexpected:
        extra = f"; it also has {', '.join(unexpected[:5])}" if unexpected else ""
        raise ValueError(f"{source}: the file has a DiffusionNet of {theirs}, the model is one of {own}{extra}. Set "
                         f"model.features, model.embedding_dim and the number of blocks to those of the file.")
    if head is None:
        line = load_weights(network, body, source, layout=layout)
        return f"{line}; its last layer is not used" if last and network.last_lin is None else line
    if not last:
        raise ValueError(f"{source}: the file has no last layer (last_lin) for the head")
    classes = len(last["last_lin.weight"])
    if classes != head.out_features:
        raise ValueError(f"{source}: its last layer knows {classes} classes, model.n_classes is {head.out_features}; "
                         f"leave the file's head out, or correct model.n_classes")
    both = {**{f"encoder.{name}": tensor for name, tensor in body.items()},
            **{name.replace("last_lin.", "head."): tensor for name, tensor in last.items()}}
    return load_weights(nn.ModuleDict({"encoder": network, "head": head}), both, source, "encoder and head", layout)


def describe_diffusion_net(state: Mapping[str, Tensor]) -> str:
    """The architecture that the shapes of a state dict tell, in words."""
    blocks = {name.split(".")[0] for name in state if name.startswith("block_")}
    width, channels = state["first_lin.weight"].shape
    hidden = [len(tensor) for name, tensor in sorted(state.items())
              if name.startswith("block_0.mlp.") and name.endswith("weight")][:-1]
    gradients = "gradients with rotations" if "block_0.gradient_features.A_re.weight" in state else \
        "gradients without rotations" if "block_0.gradient_features.A.weight" in state else "no gradients"
    classes = f", {len(state['last_lin.weight'])} classes" if "last_lin.weight" in state else ""
    return f"{channels} input channels, {len(blocks)} blocks of width {width}, hidden {hidden}, {gradients}{classes}"


def check_features(feature_spec: Mapping[str, Any] | None, features: Sequence[str], source: str | Path,
                   num_heads: int | None = None, **sizes: float | None) -> None:
    """ValueError, with both lists, unless the encoder was trained on exactly these features, and with num_heads heads
    and the `sizes` unit or hks_scale of the features (which the shape of no tensor tells).

    Their order does not matter, because the columns are always in that of data/mesh_features.FEATURES. A file that does
    not say (None) passes.
    """
    if feature_spec is not None and sorted(feature_spec["names"]) != sorted(features):
        raise ValueError(f"{source}: trained on the features {list(feature_spec['names'])}, but model.features is "
                         f"{list(features)}. Set model.features to the list of the file, or pre-train with yours.")
    heads = None if feature_spec is None else feature_spec.get("num_heads")
    if None not in (heads, num_heads) and heads != num_heads:
        raise ValueError(f"{source}: trained with {heads} attention heads; set model.num_heads={heads} instead of "
                         f"{num_heads}")
    known = {} if feature_spec is None else feature_spec.get("sizes", {})
    for name, value in sizes.items():
        if known.get(name, value) != value:
            theirs, ours = ("null" if size is None else size for size in (known[name], value))
            raise ValueError(f"{source}: trained with model.{name}={theirs}, so its features have other sizes; set "
                             f"model.{name}={theirs} instead of {ours}")


def _feature_spec(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """feature_spec of a train_jepa.py file, or the same out of what train_downstream.py saves."""
    spec, own = content.get("feature_spec"), content.get("spec")
    if isinstance(spec, Mapping) and "names" in spec:
        clusters = content.get("cluster_spec")
        known = isinstance(clusters, Mapping) and "unit" in clusters
        return {**spec, "sizes": {"unit": clusters["unit"]}} if known else dict(spec)
    if isinstance(own, Mapping) and "features" in own:
        return {"names": list(own["features"]), "num_heads": content["config"]["model"]["num_heads"],
                "sizes": {name: own[name] for name in ("unit", "hks_scale") if name in own}}
    return None


def _candidates(content: Mapping[str, Any], which: str):
    """(layout, {name: tensor}) in the order of preference."""
    flat = _tensors(strip_prefixes(content))
    order = sorted(ENCODERS, key=lambda name: name != which)
    nested = [(name, _tensors(content[name])) for name in (*order, *CONTAINERS)
              if isinstance(content.get(name), Mapping)]
    for name, state in nested:
        if name in ENCODERS:
            yield name, state
    for name, state in [*((name, state) for name, state in nested if name in CONTAINERS), ("", flat)]:
        state = strip_prefixes(state)
        for prefix in order:
            dotted = f"{prefix}."
            inner = {key.removeprefix(dotted): value for key, value in state.items() if key.startswith(dotted)}
            yield f"{name}: {prefix}.*" if name else f"{prefix}.*", inner
        yield name or "plain state dict", state


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _is_nomeformer(state: Mapping[str, Tensor]) -> bool:
    """At least half of the names of a one-block Nomeformer: what is missing beyond that, load_weights lists."""
    own = Nomeformer(feature_dim=1, embed_dim=4, num_heads=1, num_attention_blocks=1).state_dict()
    return 2 * sum(name in state for name in own) >= len(own)


def _describe(content: Mapping[str, Any]) -> str:
    if not content:
        return "it is empty"
    if content.get("format") and content.get("script"):
        if Path(str(content["script"])).stem == "train_downstream":
            return "a checkpoint of train_downstream.py whose encoder was frozen, and so not copied into it; use the " \
                   "pre-trained file that it names under encoder"
        return f"it is a checkpoint of {content['script']}"
    names = [str(name) for name in content]
    return f"it holds {len(names)} entries ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
