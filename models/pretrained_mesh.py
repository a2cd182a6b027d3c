"""Find the encoder in a file of pre-trained mesh weights, whoever wrote it, and say which layout it had.

What users have: a file of train_jepa.py or of another I-JEPA (keys encoder, target_encoder, predictor, opt, epoch,
loss), a checkpoint of train_downstream.py (names encoder.* under `model`), or a plain state dict; any of them with the
`module.` of DistributedDataParallel or the `_orig_mod.` of torch.compile before every name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.nomeformer import Nomeformer
from utils.weights import read_weights, strip_prefixes

ENCODERS = ("target_encoder", "encoder")                # the teacher first: it is what I-JEPA evaluates
CONTAINERS = ("model", "model_state_dict", "state_dict")


def read_encoder(path: str | Path,
                 which: str = "target_encoder") -> tuple[dict[str, Tensor], str, dict[str, Any] | None]:
    """The weights of a Nomeformer, by its own names: (state_dict, layout, feature_spec).

    which: "target_encoder" or "encoder", where the file has both; a file with one of them gives that one. layout: where
    in the file they were, for the line that load_weights prints. feature_spec {names, widths, mean, std}: what the
    encoder was trained on (see `check_features`), None where the file does not say. Load with
    utils.checkpoint.load_weights, which wants every tensor. Raises what read_weights raises; ValueError for a file
    without a Nomeformer (saying what it holds instead) and for weights that are not finite.
    """
    if which not in ENCODERS:
        raise ValueError(f"which encoder: expected one of {', '.join(ENCODERS)}, got {which!r}")
    content = read_weights(path)
    for layout, state in _candidates(content, which):
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


def check_features(feature_spec: Mapping[str, Any] | None, features: Sequence[str], source: str | Path,
                   num_heads: int | None = None) -> None:
    """ValueError, with both lists, unless the encoder was trained on exactly these features, and with num_heads heads
    (which the shape of no tensor tells).

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


def _feature_spec(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """feature_spec of a train_jepa.py file, or the same out of what train_downstream.py saves."""
    spec, own = content.get("feature_spec"), content.get("spec")
    if isinstance(spec, Mapping) and "names" in spec:
        return dict(spec)
    if isinstance(own, Mapping) and "features" in own:
        return {"names": list(own["features"]), "num_heads": content["config"]["model"]["num_heads"]}
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
