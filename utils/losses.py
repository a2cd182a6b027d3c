"""Losses over labelled elements: mesh faces, points or pixels, with one implementation for all of them.

Every loss takes `logits` with the classes along `class_dim` (last for faces and points, 1 for images), `label` of the same
shape without that dimension, and an optional `mask` of label's shape (True = real, False = padding). An element counts where
the mask is True and the label is not `ignore_index`; the others change neither the value nor any gradient, NaN included.
A batch where nothing counts has loss 0 and zero gradients. Everything is computed in float32 (float64 stays), also under autocast.
"""

import difflib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100          # PyTorch's own default; data/ translates every file's convention to it


def check_labels(label: Tensor, num_classes: int | None, ignore_index: int = IGNORE_INDEX, mask: Tensor | None = None) -> None:
    """Raise ValueError where a counting label is outside 0..num_classes-1, before a CUDA kernel asserts without saying where.

    label integer (*), mask (*) or None. num_classes None checks for negative labels only. Waits for the device once.
    """
    if label.dtype.is_floating_point or label.dtype.is_complex or label.dtype == torch.bool:
        raise ValueError(f"labels have dtype {label.dtype}; give class ids as integers (int64)")
    bad = (label < 0) if num_classes is None else (label < 0) | (label >= num_classes)
    bad &= label != ignore_index
    if mask is not None:
        bad &= mask.bool()
    if bad.any():
        values = label[bad].unique()[:5].tolist()
        upper = "" if num_classes is None else num_classes - 1
        raise ValueError(f"{int(bad.sum())} labels outside 0..{upper}, values {values}; correct the number of classes or the "
                         f"labels, or map unused ids to the ignore value {ignore_index}")


def _prepare(logits: Tensor, label: Tensor, mask: Tensor | None, class_dim: int, ignore_index: int):
    """-> logits (P, C) or (B, C, P) float32 with zeros where ignored, label (P) or (B, P) int64 with IGNORE_INDEX, keep (same) bool."""
    num_classes = logits.shape[class_dim]
    last = class_dim % logits.ndim == logits.ndim - 1
    shape = logits.shape[:class_dim % logits.ndim] + logits.shape[class_dim % logits.ndim + 1:]
    if label.shape != shape:
        raise ValueError(f"logits {tuple(logits.shape)} with classes along dimension {class_dim} need labels {tuple(shape)}, "
                         f"got {tuple(label.shape)}")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"the mask {tuple(mask.shape)} must have the shape of the labels {tuple(shape)}")
    check_labels(label, num_classes, ignore_index, mask)
    keep = label != ignore_index
    if mask is not None:
        keep = keep & mask.bool()
    if last:                                                                     # a view: nothing is copied or moved
        logits, label, keep = logits.reshape(-1, num_classes), label.reshape(-1), keep.reshape(-1)
    else:
        logits = logits.movedim(class_dim, 1).flatten(2)                         # (B, C, P)
        label, keep = label.flatten(1), keep.flatten(1)                          # (B, P)
    # `where` rather than a product: its gradient is 0 even where an ignored logit is NaN or infinite.
    logits = torch.where(keep.unsqueeze(1), logits, 0).to(torch.promote_types(logits.dtype, torch.float32))
    return logits, label.long().masked_fill(~keep, IGNORE_INDEX), keep


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _class_weights(class_weights: Tensor | Sequence[float] | None) -> Tensor | None:
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights, dtype=torch.float32)
    if weights.ndim != 1 or not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(f"class weights must be one finite number >= 0 per class, got {class_weights}")
    return weights


def _divide(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, and 0 with zero gradient where nothing counts (weight 0)."""
    return total / torch.where(weight > 0, weight, torch.ones_like(weight))


class MaskedCrossEntropyLoss(nn.Module):
    """Cross entropy averaged over the counting elements, each weighted by its class: F.cross_entropy(reduction="mean") without NaN.

    class_weights (C) or None; label_smoothing in [0, 1), smoothed and weighted as torch does. gamma > 0 makes it the focal loss
    (see focal_loss). forward(logits, label, mask=None) -> scalar. Raises ValueError for labels out of range and shapes that disagree.

    A mean over more than one call (micro-batches, processes) is exact when the sums are added first:
    `total, weight = loss.sum_and_weight(...)`, then sum of totals / sum of weights. `label_weight` gives the weight before the forward pass.
    """

    def __init__(self, class_weights: Tensor | Sequence[float] | None = None, ignore_index: int = IGNORE_INDEX,
                 label_smoothing: float = 0.0, class_dim: int = -1, gamma: float = 0.0):
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not (math.isfinite(gamma) and gamma >= 0.0):
            raise ValueError(f"gamma must be >= 0, got {gamma}")
        if gamma and label_smoothing:
            raise ValueError("the focal loss knows no label smoothing; set gamma or label_smoothing to 0")
        self.register_buffer("class_weights", _class_weights(class_weights), persistent=False)
        self.ignore_index, self.label_smoothing, self.class_dim, self.gamma = ignore_index, label_smoothing, class_dim, gamma

    def forward(self, logits: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        return _divide(*self.sum_and_weight(logits, label, mask))

    def sum_and_weight(self, logits: Tensor, label: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (sum of weighted element losses, sum of weights): two scalars; their quotient is forward's value."""
        weights = self.class_weights
        if weights is not None and len(weights) != logits.shape[self.class_dim]:
            raise ValueError(f"{len(weights)} class weights for {logits.shape[self.class_dim]} classes; give one per class")
        with _no_autocast(logits):
            logits, label, keep = _prepare(logits, label, mask, self.class_dim, self.ignore_index)
            weights = None if weights is None else weights.to(logits)
            element_weight = self._element_weight(label, keep, weights)
            if self.gamma:
                nll = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="none")
                # 1 - p without cancellation; the floor keeps the gradient finite at p = 1 when gamma < 1.
                element = element_weight * (-torch.expm1(-nll)).clamp_min(1e-12) ** self.gamma * nll
            else:
                # Not reduction="sum": on CUDA that is not deterministic for images.
                element = F.cross_entropy(logits, label, weights, ignore_index=IGNORE_INDEX, reduction="none",
                                          label_smoothing=self.label_smoothing)
            return element.sum(), element_weight.sum().to(element.dtype)

    def label_weight(self, label: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weight that sum_and_weight would return for these labels (*) and mask (*), a float32 scalar, without logits."""
        check_labels(label, None if self.class_weights is None else len(self.class_weights), self.ignore_index, mask)
        keep = label != self.ignore_index
        if mask is not None:
            keep = keep & mask.bool()
        weights = None if self.class_weights is None else self.class_weights.to(label.device)
        return self._element_weight(label.long(), keep, weights).sum().float()

    @staticmethod
    def _element_weight(label: Tensor, keep: Tensor, weights: Tensor | None) -> Tensor:
        return keep if weights is None else weights[label.masked_fill(~keep, 0)] * keep


def focal_loss(logits: Tensor, label: Tensor, mask: Tensor | None = None, class_dim: int = -1, gamma: float = 2.0,
               class_weights: Tensor | Sequence[float] | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean of -w (1 - p)^gamma log p over the counting elements, p the softmax probability of the label (Lin et al. 2017, eq. 5).

    logits (*, C, *), label (*) int64 -> scalar. Deviation: one softmax over the classes instead of a sigmoid each, and divided by the
    sum of weights w, so that gamma 0 is MaskedCrossEntropyLoss.
    """
    return MaskedCrossEntropyLoss(class_weights, ignore_index, class_dim=class_dim, gamma=gamma).to(logits.device)(logits, label, mask)


def soft_dice_loss(logits: Tensor, label: Tensor, mask: Tensor | None = None, class_dim: int = -1,
                   ignore_index: int = IGNORE_INDEX, classes: str = "present", eps: float = 1e-6) -> Tensor:
    """1 - mean over classes of 2|P.T| / (|P| + |T|), with P the softmax (Milletari et al. 2016 square the terms below; we do not).

    logits (*, C, *), label (*) int64 -> scalar in [0, 1]; the sums run over the whole batch. classes "present": the mean runs over the
    classes that occur in the labels, as in lovasz_softmax_loss; "all": an absent class counts too (as 1, almost whatever is predicted).
    """
    if classes not in ("present", "all"):
        raise ValueError(f"classes must be 'present' or 'all', got {classes!r}")
    with _no_autocast(logits):
        logits, label, keep = _prepare(logits, label, mask, class_dim, ignore_index)
        prob = logits.softmax(1) * keep.unsqueeze(1)                             # (P, C) or (B, C, P)
        truth = torch.zeros_like(prob).scatter_(1, label.masked_fill(~keep, 0).unsqueeze(1), 1) * keep.unsqueeze(1)
        dims = [d for d in range(prob.ndim) if d != 1]
        overlap, count = (prob * truth).sum(dims), truth.sum(dims)               # (C,), (C,)
        loss = 1 - (2 * overlap + eps) / (prob.sum(dims) + count + eps)
        return loss.mean() if classes == "all" else _divide((loss * (count > 0)).sum(), (count > 0).sum())


def lovasz_softmax_loss(logits: Tensor, label: Tensor, mask: Tensor | None = None, class_dim: int = -1,
                        ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Lovasz extension of 1 - IoU, averaged over the classes present in the labels (Berman et al. 2018, eq. 9 and 11, algorithm 1).

    logits (*, C, *), label (*) int64 -> scalar in [0, 1]. The whole batch is one set (not per image), as in Sonata's recipe.
    """
    with _no_autocast(logits):
        logits, label, keep = _prepare(logits, label, mask, class_dim, ignore_index)
        prob = logits.softmax(1).movedim(1, -1)[keep]                            # (P, C), counting elements only
        label = label[keep]                                                      # (P,)
        present = label.unique().tolist()
        total = prob.sum() * 0                                                   # keeps the graph when no class is present
        for c in present:
            truth = label == c                                                   # (P,)
            error = torch.where(truth, 1 - prob[:, c], prob[:, c])               # (P,)
            total = total + (error * _lovasz_slope(error.detach(), truth)).sum()
        return total / max(len(present), 1)


def _lovasz_slope(error: Tensor, truth: Tensor) -> Tensor:
    """Growth of the Jaccard loss as elements (P,) turn wrong in the order of falling error: the slope of the extension for each.

    Berman's reference takes differences of neighbouring Jaccard losses, which cancel for millions of elements in float32 (a step is 1e-7
    there); a step in closed form does not: 1 / union for an element of the class, intersection / (union (union - 1)) for another.
    """
    order = error.argsort(descending=True, stable=True)
    truth = truth[order]
    intersection = truth.sum() - truth.cumsum(0)                                 # int64: exact at any size
    union = truth.sum() + (~truth).cumsum(0)
    inverse = 1 / union.to(error.dtype)
    step = torch.where(truth, inverse, inverse * intersection / (union - 1).clamp_min(1))
    return torch.empty_like(error).scatter_(0, order, step)


class WeightedLoss(nn.Module):
    """Weighted sum of losses: terms {"ce": 1.0, "dice": 0.5} with the names ce, focal, dice, lovasz.

    forward(logits, label, mask=None) -> (total, {name: detached unweighted value}). class_weights act on ce and focal, label_smoothing on ce.
    Cross entropy and focal loss are sums over elements: with only these, sum_and_weight gives exact means over several micro-batches.
    Dice and Lovasz are functions of a whole set: over several micro-batches or processes they are means of the parts' values, which is NOT
    the value of the whole, so sum_and_weight refuses them.
    """

    NAMES = ("ce", "focal", "dice", "lovasz")

    def __init__(self, terms: Mapping[str, float], class_weights: Tensor | Sequence[float] | None = None,
                 ignore_index: int = IGNORE_INDEX, label_smoothing: float = 0.0, class_dim: int = -1, gamma: float = 2.0):
        super().__init__()
        for name, factor in terms.items():
            if name not in self.NAMES:
                near = difflib.get_close_matches(str(name), self.NAMES, 1, 0.0)[0]
                raise ValueError(f"unknown loss {name!r}; did you mean {near!r}? Choose from {', '.join(self.NAMES)}")
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"the weight of loss {name!r} must be a number >= 0, got {factor!r}")
        self.terms = {name: float(factor) for name, factor in terms.items() if factor > 0}
        if not self.terms:
            raise ValueError(f"no loss has a weight above 0 in {dict(terms)}; choose from {', '.join(self.NAMES)}")
        self.ce = MaskedCrossEntropyLoss(class_weights, ignore_index, label_smoothing, class_dim)
        self.focal = MaskedCrossEntropyLoss(class_weights, ignore_index, 0.0, class_dim, gamma)
        self.class_dim, self.ignore_index = class_dim, ignore_index

    def forward(self, logits: Tensor, label: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        functions = {"ce": self.ce, "focal": self.focal,
                     "dice": lambda *a: soft_dice_loss(*a, self.class_dim, self.ignore_index),
                     "lovasz": lambda *a: lovasz_softmax_loss(*a, self.class_dim, self.ignore_index)}
        values = {name: functions[name](logits, label, mask) for name in self.terms}
        total = sum(self.terms[name] * value for name, value in values.items())
        return total, {name: value.detach() for name, value in values.items()}

    def sum_and_weight(self, logits: Tensor, label: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (weighted sum of the terms' sums, sum of weights); ValueError if a term is not a sum over elements."""
        sets = [name for name in self.terms if name not in ("ce", "focal")]
        if sets:
            raise ValueError(f"loss {sets[0]!r} is not a sum over elements; call the loss per micro-batch instead of sum_and_weight")
        parts = {name: getattr(self, name).sum_and_weight(logits, label, mask) for name in self.terms}
        return sum(self.terms[name] * total for name, (total, _) in parts.items()), next(iter(parts.values()))[1]

    def label_weight(self, label: Tensor, mask: Tensor | None = None) -> Tensor:
        """As MaskedCrossEntropyLoss.label_weight."""
        return self.ce.label_weight(label, mask)
