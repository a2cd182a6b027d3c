"""Losses over labelled elements, mesh faces, points or pixels, with one implementation for all of them.

Every loss takes `logits` with the classes along `class_dim` (last for faces and points, 1 for images), an integer
`label` of the same shape without that dimension, and an optional `mask` of label's shape (True = real, False =
padding). An element counts where the mask is True and the label is not `ignore_index`; the others change neither the
value nor any gradient, even where their logits are NaN. A batch where nothing counts has loss 0 and zero gradients.
All is computed in float32 (float64 stays float64), also under autocast. ValueError: a counting label out of range,
shapes that disagree.
"""

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.bilinear import resize_weights
from utils.parts import elements_at_once

IGNORE_INDEX = -100          # PyTorch's own default; data/ translates every file's convention to it


def counting(label: Tensor, mask: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Where an element counts: label integer (*), mask (*) bool or 0/1, or None -> (*) bool."""
    if mask is not None and mask.shape != label.shape:
        raise ValueError(f"the mask {tuple(mask.shape)} must have the shape of the labels {tuple(label.shape)}")
    keep = label.long() != ignore_index          # long: in uint8, 156 == -100 is true
    return keep if mask is None else keep & mask.bool()


def check_labels(label: Tensor, num_classes: int | None, ignore_index: int = IGNORE_INDEX,
                 mask: Tensor | None = None) -> None:
    """Raise ValueError if a counting label is outside 0..num_classes-1: clearer than a device-side assert.

    label integer (*), mask (*) or None; num_classes None looks for negative labels only. Labels on a GPU are not looked
    at, because the program would have to wait for it: check them before they go there, as label_weight does.
    """
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise ValueError(f"labels have dtype {label.dtype}; give class ids as integers (int64)")
    if label.device.type != "cpu":
        return
    label = label.long()
    bad = label < 0 if num_classes is None else (label < 0) | (label >= num_classes)
    bad &= counting(label, mask, ignore_index)
    if bad.any():
        last = "" if num_classes is None else num_classes - 1
        raise ValueError(f"{int(bad.sum())} labels outside 0..{last}, values {label[bad].unique()[:5].tolist()}; "
                         f"correct the number of classes, or map unused ids to the ignore value {ignore_index}")


def _flat(logits: Tensor, label: Tensor, mask: Tensor | None, class_dim: int, ignore_index: int):
    """Check, and bring to one layout with the classes along dimension 1.

    -> logits (P, C) from class-last, else (B, C, P), float32, what is ignored finite; label (P) or (B, P),
    IGNORE_INDEX where ignored; keep, bool of label's shape.
    """
    num_classes, class_dim = logits.shape[class_dim], class_dim % logits.ndim
    if label.shape != logits.shape[:class_dim] + logits.shape[class_dim + 1:]:
        raise ValueError(f"labels {tuple(label.shape)} do not fit logits {tuple(logits.shape)} with the classes along "
                         f"dimension {class_dim}")
    keep = counting(label, mask, ignore_index)
    check_labels(label, num_classes, ignore_index, mask)
    if class_dim == logits.ndim - 1:                                             # a view: nothing is moved
        logits, label, keep = logits.reshape(-1, num_classes), label.reshape(-1), keep.reshape(-1)
    else:
        logits, label, keep = logits.movedim(class_dim, 1).flatten(2), label.flatten(1), keep.flatten(1)
    # `where`, not a product: its gradient is 0 even where an ignored logit is NaN. Where none is, it would change
    # nothing, and on a CPU copying all logits, and their gradient, takes longer than to look.
    if logits.device.type != "cpu" or not logits.detach().sum(dtype=torch.float32).isfinite():
        logits = torch.where(keep.unsqueeze(1), logits, 0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, label.long().masked_fill(~keep, IGNORE_INDEX), keep


def _divide(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight; 0 with zero gradient where nothing counts (weight 0)."""
    return total / torch.where(weight > 0, weight, torch.ones_like(weight))


class MaskedCrossEntropyLoss(nn.Module):
    """Cross entropy averaged over the counting elements, each with the weight of its class.

    F.cross_entropy(reduction="mean"), label smoothing with class weights included, but 0 instead of NaN when nothing
    counts. class_weights (C,) or None; label_smoothing in [0, 1). forward(logits, label, mask=None) -> scalar.

    gamma > 0 makes it the focal loss, the mean of -w (1 - p)^gamma log p with p the label's probability (Lin et al.
    2017, eq. 5). Deviations: one softmax over the classes instead of a sigmoid each; divided by the sum of the class
    weights w.

    num_classes: with it label_weight, to which a training loop gives labels that are not on the GPU yet, refuses those
    of no class; without it and without class weights, negative ones alone.

    A mean over several micro-batches or processes is exact when sums are added first: `total, weight =
    loss.sum_and_weight(...)`, then sum of totals / sum of weights. `label_weight` knows that weight before the
    forward pass.
    """

    def __init__(self, class_weights: Tensor | Sequence[float] | None = None, ignore_index: int = IGNORE_INDEX,
                 label_smoothing: float = 0.0, class_dim: int = -1, gamma: float = 0.0,
                 num_classes: int | None = None):
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")
        if gamma and label_smoothing:
            raise ValueError("the focal loss knows no label smoothing; set gamma or label_smoothing to 0")
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights, dtype=torch.float32)
            if class_weights.ndim != 1 or not bool(((class_weights >= 0) & class_weights.isfinite()).all()):
                raise ValueError(f"class_weights must be a finite number >= 0 per class, got {class_weights.tolist()}")
            num_classes = len(class_weights)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.host_weights = class_weights                  # stay on the CPU, where the loader's labels are
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self.label_smoothing = label_smoothing
        self.gamma = gamma

    def forward(self, logits: Tensor, label: Tensor, mask: Tensor | None = None) -> Tensor:
        return _divide(*self.sum_and_weight(logits, label, mask))

    def sum_and_weight(self, logits: Tensor, label: Tensor, mask: Tensor | None = None,
                       share: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (sum of weighted element losses, sum of weights), two scalars whose quotient is forward's value. share, of
        label's shape or None: as how much of one element each counts."""
        weights = self.class_weights
        if weights is not None and len(weights) != logits.shape[self.class_dim]:
            raise ValueError(f"{len(weights)} class weights for {logits.shape[self.class_dim]} classes; one per class")
        logits, label, keep = _flat(logits, label, mask, self.class_dim, self.ignore_index)
        weights = None if weights is None else weights.to(logits)
        element_weight = self._element_weight(label, keep, weights)
        # reduction="none" and a sum: "sum" itself has no deterministic CUDA kernel for images.
        if self.gamma == 0:
            element = F.cross_entropy(logits, label, weights, reduction="none",
                                      label_smoothing=self.label_smoothing)
        else:
            nll = F.cross_entropy(logits, label, reduction="none")
            # 1 - p by expm1 keeps its digits near p = 1; the floor keeps the gradient finite there for gamma < 1.
            element = element_weight * (-torch.expm1(-nll)).clamp_min(1e-12) ** self.gamma * nll
        if share is not None:
            share = share.reshape(keep.shape)
            element, element_weight = element * share, element_weight * share
        return element.sum(), element_weight.sum().to(element.dtype)

    def resized_sum(self, logits: Tensor, label: Tensor) -> Tensor:
        """The sum of sum_and_weight for F.interpolate(logits, label.shape[1:], mode="bilinear"), logits (B, C, h, w),
        label (B, H, W), class_dim 1. A strip of rows at a time: what is made of C numbers a pixel, in the backward
        pass too, is never there for all pixels. Equal up to rounding; first derivatives only."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _ResizedSum.apply(logits, label, self)

    def label_weight(self, label: Tensor, mask: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        """The weight sum_and_weight will return for these labels (*), mask and share: float32 scalar, no logits needed.
        """
        weights = None if self.host_weights is None else self.host_weights.to(label.device)
        check_labels(label, self.num_classes, self.ignore_index, mask)
        weight = self._element_weight(label.long(), counting(label, mask, self.ignore_index), weights)
        return (weight if share is None else weight * share).sum().float()

    @staticmethod
    def _element_weight(label: Tensor, keep: Tensor, weights: Tensor | None) -> Tensor:
        return keep if weights is None else weights[label.masked_fill(~keep, 0)] * keep


class _ResizedSum(torch.autograd.Function):
    """The gradient of each strip is made with its value, and waits for the backward pass at the size of the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, label: Tensor, criterion: MaskedCrossEntropyLoss) -> Tensor:
        B, C, h, w = logits.shape
        H, W = label.shape[-2:]
        kind = {"device": logits.device, "dtype": logits.dtype, "non_blocking": True}
        along = resize_weights(w, W)[1].to(**kind)                                                       # (W, w)
        rows = max(1, elements_at_once(logits.device, 2**26) // (B * C * W))
        total = logits.new_zeros(())
        grad = torch.zeros_like(logits)
        for begin in range(0, H, rows):
            end = min(begin + rows, H)
            first, blend = resize_weights(h, H, begin, end)
            blend = blend.to(**kind)                                                                     # (R, k)
            read = slice(first, first + blend.shape[1])
            with torch.autocast(logits.device.type, enabled=False):
                strip = blend @ (logits[:, :, read] @ along.T)                                           # (B, C, R, W)
                with torch.enable_grad():
                    value, _ = criterion.sum_and_weight(strip.requires_grad_(), label[:, begin:end])
                total += value.detach()
                if ctx.needs_input_grad[0]:
                    of_strip, = torch.autograd.grad(value, strip)
                    grad[:, :, read] += blend.T @ of_strip @ along
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor, None, None]:
        grad, = ctx.saved_tensors
        return grad * grad_total, None, None


def soft_dice_loss(logits: Tensor, label: Tensor, mask: Tensor | None = None, class_dim: int = -1,
                   ignore_index: int = IGNORE_INDEX, eps: float = 1e-6) -> Tensor:
    """1 - mean over classes of 2|P.T| / (|P| + |T|), P the softmax (Milletari et al. 2016 square the terms below; we
    do not).

    Shapes as above -> scalar in [0, 1]. Sums run over the whole batch. The mean is over the classes that occur in the
    labels, as Lovasz's: an absent class would be nearly 1 whatever is predicted.
    """
    logits, label, keep = _flat(logits, label, mask, class_dim, ignore_index)
    prob = logits.softmax(1) * keep.unsqueeze(1)                             # (P, C) or (B, C, P)
    ids = torch.arange(prob.shape[1], device=label.device).view(-1, *[1] * (label.ndim - 1))
    truth = (label.unsqueeze(1) == ids).to(prob.dtype)                       # as prob; 0 everywhere where ignored
    dims = [d for d in range(prob.ndim) if d != 1]
    overlap, size, count = (prob * truth).sum(dims), (prob + truth).sum(dims), truth.sum(dims)       # (C,) each
    loss = 1 - (2 * overlap + eps) / (size + eps)
    return _divide(loss[count > 0].sum(), (count > 0).sum())


def lovasz_softmax_loss(logits: Tensor, label: Tensor, mask: Tensor | None = None, class_dim: int = -1,
                        ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Lovasz extension of 1 - IoU, mean over the classes that occur in the labels (Berman et al. 2018, eq. 8 to 11).

    Shapes as above -> scalar in [0, 1]. The whole batch is one set, not each image, as in Sonata's recipe.
    """
    logits, label, keep = _flat(logits, label, mask, class_dim, ignore_index)
    where = keep.nonzero(as_tuple=True)      # once: a mask as index would be searched, and waited for, at each use
    prob, label = logits.softmax(1).movedim(1, -1)[where], label[where]      # (P, C), (P,): counting elements only
    present = label.unique().tolist()
    total = prob.sum() * 0                                                   # keeps a graph if no class is present
    for c in present:
        truth = label == c                                                   # (P,)
        error = torch.where(truth, 1 - prob[:, c], prob[:, c])               # (P,)
        total = total + (error * _lovasz_slope(error.detach(), truth)).sum()
    return total / max(len(present), 1)


def _worst_first(error: Tensor) -> Tensor:
    """error.argsort(descending=True, stable=True) of error (P,) >= 0. On a CPU PyTorch sorts whole numbers by their
    digits, three times as fast as others, and the bits of floats that are not negative have the floats' order."""
    if error.device.type == "cpu" and error.dtype == torch.float32:
        return (torch.iinfo(torch.int32).max - error.view(torch.int32)).argsort(stable=True)
    return error.argsort(descending=True, stable=True)


def _lovasz_slope(error: Tensor, truth: Tensor) -> Tensor:
    """Slope of the extension for each element (P,): what the Jaccard loss gains as elements turn wrong, worst first.

    The paper subtracts neighbouring Jaccard losses; for a million elements such a step is 1e-6 and float32 keeps one
    digit of it. The same step in closed form loses nothing: 1 / union where an element of the class turns wrong,
    intersection / (union (union - 1)) where another element does.
    """
    order = _worst_first(error)
    truth = truth[order]
    intersection = truth.sum() - truth.cumsum(0)                                 # int64, exact at any size
    union = truth.sum() + (~truth).cumsum(0)
    inverse = 1 / union.to(error.dtype)
    step = torch.where(truth, inverse, inverse * intersection / (union - 1).clamp_min(1))
    return torch.empty_like(error).scatter_(0, order, step)


class WeightedLoss(nn.Module):
    """The terms of a weighted sum of losses, such as {"ce": 1.0, "dice": 0.5}, with the names ce, focal, dice, lovasz.

    terms: {name: weight} of those above 0; ce and focal: their MaskedCrossEntropyLoss. class_weights act on ce and
    focal, label_smoothing on ce, gamma on focal. num_classes: see there. Raises ValueError for unknown names and
    negative weights.

    The caller adds up. ce and focal are sums over elements, so their sum_and_weight makes exact means over
    micro-batches. Dice and Lovasz are functions of a whole set: averaged over micro-batches or processes they are NOT
    the value of the whole batch.
    """

    NAMES = ("ce", "focal", "dice", "lovasz")

    def __init__(self, terms: Mapping[str, float], class_weights: Tensor | Sequence[float] | None = None,
                 label_smoothing: float = 0.0, class_dim: int = -1, gamma: float = 2.0,
                 num_classes: int | None = None):
        super().__init__()
        for name, factor in terms.items():
            if name not in self.NAMES:
                near = difflib.get_close_matches(str(name), self.NAMES, 1, 0.0)[0]
                raise ValueError(f"unknown loss {name!r}, did you mean {near!r}? Choose from {', '.join(self.NAMES)}")
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < math.inf:
                raise ValueError(f"the weight of loss {name!r} must be a finite number >= 0, got {factor!r}")
        self.terms = {name: float(factor) for name, factor in terms.items() if factor > 0}
        if not self.terms:
            raise ValueError(f"no loss with a weight above 0 in {dict(terms)}; choose from {', '.join(self.NAMES)}")
        self.ce = MaskedCrossEntropyLoss(class_weights, label_smoothing=label_smoothing, class_dim=class_dim,
                                         num_classes=num_classes)
        self.focal = MaskedCrossEntropyLoss(class_weights, class_dim=class_dim, gamma=gamma)

    def label_weight(self, label: Tensor, mask: Tensor | None = None) -> Tensor:
        """As MaskedCrossEntropyLoss.label_weight."""
        return self.ce.label_weight(label, mask)


def class_weights(weights: Sequence[float] | str | None, counts: np.ndarray,
                  what: str = "class_weights") -> list[float] | None:
    """The weights of the setting `what` themselves (a list, or text: 1,0.5,2), or made from the classes' elements in
    the training set, counts (C,). median_frequency (Eigen and Fergus 2015, but over all elements): median share /
    share; sqrt_median_frequency: its root. A class without elements gets 1. ValueError for another name, a list of
    another length, weights that are not finite numbers >= 0, or all 0."""
    powers = {"median_frequency": 1.0, "sqrt_median_frequency": 0.5}
    if isinstance(weights, str) and weights in powers:
        median = np.median(counts[counts > 0])
        share = np.where(counts > 0, counts, median)
        return ((median / share) ** powers[weights]).tolist()
    if weights is None:
        return None
    try:
        numbers = [float(weight) for weight in (weights.split(",") if isinstance(weights, str) else weights)]
    except (TypeError, ValueError):
        raise ValueError(f"{what}={weights}: expected a number for each class, {' or '.join(powers)}") from None
    if len(numbers) != len(counts):
        raise ValueError(f"{what}: {len(numbers)} numbers for {len(counts)} classes; give one per class")
    if not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(f"{what}={weights}: expected finite numbers from 0, at least one of them above 0")
    return numbers
