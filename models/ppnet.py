"""Prototype network for segmentation (Sacha et al. 2023, ProtoSeg): every cell is compared with learned prototypes.

image -> features in (0, 1) -> squared distance to each prototype -> similarity -> linear read-out without bias. Names
of parameters are the published ones, so its state dicts load. Not the ProtoSeg of Zhou et al. 2022, which clusters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.weights import load_weights

EPSILON = 1e-4                   # highest similarity: ln(1 / EPSILON) = 9.21
SIMILARITIES = ("log", "linear")


class PPNet(nn.Module):
    """forward(image (B, 3, H, W)) -> (logits (B, h, w, C), channels last, distances (B, P, h, w)), both float32.

    `features` maps an image to (B, channels, h, w); where it returns a list (models.deeplab.MultiScale in training),
    forward returns a list of such pairs. Prototypes start uniform in [0, 1), prototypes_per_class in a row belong to
    one class; the read-out starts at 1 for a class's own prototypes and -0.5 for the others. Different from upstream,
    class_identity (P, C), one-hot, is a buffer: after remove() nothing else tells which class a prototype has.
    `provenance` is one entry per prototype, or None: where a pushed prototype came from. `squash` (height, width), or
    None: `shown` and `scores` resize every image to that, whatever its shape.
    """

    squash: tuple[int, int] | None = None

    def __init__(self, features: nn.Module, num_classes: int, prototypes_per_class: int = 10, channels: int = 64,
                 similarity: str = "log"):
        super().__init__()
        if similarity not in SIMILARITIES:
            raise ValueError(f"unknown similarity {similarity!r}; choose from {', '.join(SIMILARITIES)}")
        identity = torch.eye(num_classes).repeat_interleave(prototypes_per_class, 0)          # (P, C)
        self.features = features
        self.similarity_kind = similarity
        self.provenance: list[dict] | None = None
        self.last_layer = nn.Linear(len(identity), num_classes, bias=False)
        self._set_prototypes(torch.rand(len(identity), channels, 1, 1), identity, 1.5 * identity.T - 0.5)

    def _set_prototypes(self, vectors: Tensor, identity: Tensor, weight: Tensor) -> None:
        """vectors (P, D, 1, 1), identity (P, C), weight (C, P), as new parameters and buffers."""
        trains = getattr(self, "prototype_vectors", self.last_layer.weight).requires_grad
        self.prototype_vectors = nn.Parameter(vectors.detach().clone(), trains)
        self.register_buffer("ones", torch.ones_like(vectors.detach()))      # unused; upstream's state dicts have it
        self.register_buffer("class_identity", identity.clone())
        self.last_layer.weight = nn.Parameter(weight.detach().clone(), self.last_layer.weight.requires_grad)
        self.last_layer.in_features = len(vectors)

    def features_of(self, image: Tensor) -> Tensor | list[Tensor]:
        """image (B, 3, H, W) -> features after the sigmoid (B, D, h, w) float32, or a list of them."""
        maps = self.features(image)
        return [m.float().sigmoid() for m in maps] if isinstance(maps, list) else maps.float().sigmoid()

    def prototype_distances(self, features: Tensor) -> Tensor:
        """features (B, D, h, w) after the sigmoid -> squared Euclidean distances (B, P, h, w), >= 0, float32.

        Computed as |x|^2 - 2 x.p + |p|^2, whose rounding leaves up to 2e-5 where a feature is the prototype itself (at
        64 channels). Without autocast, and by a matrix product: convolutions are TF32 on a GPU unless told otherwise.
        """
        with torch.autocast(features.device.type, enabled=False):
            features, vectors = features.float(), self.prototype_vectors.flatten(1).float()
            product = torch.einsum("bdhw,pd->bphw", features, vectors)
            squares = vectors.square().sum(1)[:, None, None]                                  # (P, 1, 1)
            return (features.square().sum(1, keepdim=True) - 2 * product + squares).relu()

    def similarity(self, distances: Tensor) -> Tensor:
        """Squared distances, any shape -> ln((d + 1) / (d + EPSILON)), or -d where the network was made "linear"."""
        if self.similarity_kind == "linear":
            return -distances
        return torch.log((distances + 1) / (distances + EPSILON))

    def classify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, D, h, w) after the sigmoid -> logits (B, h, w, C) and distances (B, P, h, w)."""
        distances = self.prototype_distances(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.last_layer(self.similarity(distances).permute(0, 2, 3, 1)), distances

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor] | list[tuple[Tensor, Tensor]]:
        features = self.features_of(image)
        return [self.classify(f) for f in features] if isinstance(features, list) else self.classify(features)

    def shown(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) as the network is shown it."""
        if self.squash is None:
            return image
        return F.interpolate(image, self.squash, mode="bilinear", antialias=True)

    def scores(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) -> logits (B, C, H, W) float32, bilinear. In eval mode."""
        shown = self.shown(image)
        logits, _ = self(shown)
        logits = F.interpolate(logits.permute(0, 3, 1, 2), shown.shape[-2:], mode="bilinear")
        return logits if self.squash is None else F.interpolate(logits, image.shape[-2:], mode="bilinear")

    def remove(self, keep: Tensor) -> None:
        """Keep only the prototypes `keep` (P',) int64, in this order, with their classes, weights and provenance.

        Parameters become new objects: make a new optimiser. ValueError for none, repeated or unknown indices.
        """
        indices = keep.tolist()
        if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(range(len(self.class_identity))):
            raise ValueError(f"the prototypes to keep must be different indices in 0..{len(self.class_identity) - 1}, "
                             f"at least one, got {indices}")
        keep = keep.to(self.class_identity.device)
        self._set_prototypes(self.prototype_vectors[keep], self.class_identity[keep], self.last_layer.weight[:, keep])
        if self.provenance is not None:
            self.provenance = [self.provenance[i] for i in indices]


def ppnet_from_state(features: nn.Module, state: Mapping[str, Tensor], similarity: str = "log",
                     source: str = "state dict") -> PPNet:
    """A PPNet of the size of the tensors in `state`, loaded with them: from our checkpoints, pruned or not, and from
    published state dicts.

    Those hold no class_identity: prototypes are taken to belong to the classes in equal blocks. ValueError where they
    cannot (the network was pruned), and where a tensor is missing or does not fit.
    """
    vectors, weight = state.get("prototype_vectors"), state.get("last_layer.weight")
    if vectors is None or weight is None:
        raise ValueError(f"{source}: no prototype network (prototype_vectors, last_layer.weight), it holds "
                         f"{', '.join(list(state)[:3])}, ...")
    num_classes, count = weight.shape
    identity = state.get("class_identity")
    if identity is None:
        if count % num_classes:
            raise ValueError(f"{source}: {count} prototypes of {num_classes} classes and no class_identity; which "
                             f"prototype belongs to which class is lost. Use the state dict from before the pruning.")
        identity = torch.eye(num_classes).repeat_interleave(count // num_classes, 0)
    model = PPNet(features, num_classes, 1, vectors.shape[1], similarity)
    model._set_prototypes(vectors, identity, weight)
    load_weights(model, {**state, "class_identity": identity}, source, "model")
    return model


def parameter_groups(model: PPNet, phase: int, rates: Mapping[str, float], weight_decay: float = 5e-4,
                     train_last_layer: bool | None = None, freeze_bn: bool = True) -> list[dict]:
    """Optimiser groups {"params", "lr", "weight_decay", "name"} of a phase; exactly these get requires_grad.

    phase 0, warm-up: aspp and prototypes. 1, joint: backbone (weights of its convolutions), aspp, prototypes. 2,
    fine-tuning: the last layer. `rates`: learning rate by group name ("backbone", "aspp", "prototypes", "last_layer").
    train_last_layer: also in phases 0 and 1, where the published code leaves it; None is the published choice.
    Weight decay acts on backbone and aspp. freeze_bn False adds "backbone_norm" to phase 1, at the backbone's rate
    without decay, for training from scratch; the published code never trains batch norm. A parameter of `features`
    belongs to aspp where its name has that part. ValueError: unknown phase, a rate missing, nothing to train.
    """
    if phase not in (0, 1, 2):
        raise ValueError(f"unknown phase {phase!r}; choose 0 (warm-up), 1 (joint) or 2 (fine-tuning)")
    if train_last_layer is None:
        train_last_layer = phase == 2
    named = dict(model.features.named_parameters())
    norms = {f"{name}.{part}" for name, layer in model.features.named_modules()
             if isinstance(layer, nn.modules.batchnorm._BatchNorm) for part in ("weight", "bias")}
    aspp = [name for name in named if "aspp" in name.split(".")]
    trunk = [name for name in named if name not in norms and name not in aspp]
    groups = {"backbone": ([named[name] for name in trunk], phase == 1),
              "backbone_norm": ([named[name] for name in named if name in norms], phase == 1 and not freeze_bn),
              "aspp": ([named[name] for name in aspp], phase < 2),
              "prototypes": ([model.prototype_vectors], phase < 2),
              "last_layer": ([model.last_layer.weight], train_last_layer)}
    groups = {name: parameters for name, (parameters, trained) in groups.items() if trained and parameters}
    if not groups:
        raise ValueError(f"phase {phase} has nothing to train; switch the last layer on")
    missing = [name for name in groups if name.removesuffix("_norm") not in rates]
    if missing:
        raise ValueError(f"no learning rate for {', '.join(missing)} in phase {phase}; the rates are {dict(rates)}")
    model.requires_grad_(False)
    result = []
    for name, parameters in groups.items():
        for parameter in parameters:
            parameter.requires_grad_(True)
        result.append({"params": parameters, "lr": rates[name.removesuffix("_norm")], "name": name,
                       "weight_decay": weight_decay if name in ("backbone", "aspp") else 0.0})
    return result
