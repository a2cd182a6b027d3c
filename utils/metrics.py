"""One confusion matrix per split and every segmentation metric from it.

Counts are summed over the whole split and all processes, never averaged per batch or image. Metrics are in [0, 1]; only metrics_table
prints them times 100. A class in neither labels nor predictions is NaN and left out of the means.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from utils.losses import IGNORE_INDEX


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over a split, rows = truth, without the elements labelled ignore_index.

    update() counts the pairs on the device where they are; scikit-learn makes the matrix from C * C weighted pairs (and not from every
    pixel, which costs 20 times more than counting).
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, device: torch.device | str = "cpu"):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes, self.ignore_index, self.device = num_classes, ignore_index, torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.counts: Tensor | None = None        # (C, C): int64, or float64 once weighted

    def update(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """Add predictions and labels, integers of one shape on one device; weight of that shape (face areas, say) or None.

        Raises ValueError for shapes that differ, a label or a prediction (where the label counts) outside 0..num_classes-1 with the
        values found, negative or non-finite weights, and weighted after unweighted updates or the reverse.
        """
        if pred.shape != label.shape or (weight is not None and weight.shape != label.shape):
            shapes = [tuple(t.shape) for t in (pred, label, weight) if t is not None]
            raise ValueError(f"predictions, labels (and weights) must have one shape, got {shapes}")
        if pred.is_floating_point() or label.is_floating_point():
            raise ValueError(f"predictions and labels must be class ids (integers), got {pred.dtype} and {label.dtype}")
        if weight is not None:                   # on the CPU: float additions on CUDA have no fixed order
            pred, label, weight = pred.cpu(), label.cpu(), weight.cpu().double().flatten()
            if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
                raise ValueError("weights must be finite and >= 0; a degenerate face has area 0, not NaN")
        counts = self._count(pred.flatten(), label.flatten(), weight).to(self.device)
        if self.counts is None:
            self.counts = torch.zeros_like(counts)
        if self.counts.dtype != counts.dtype:
            raise ValueError("weighted and unweighted updates cannot be mixed; use one ConfusionMatrix for each")
        self.counts += counts

    def _count(self, pred: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """(P,), (P,) -> (C, C) int64 or float64. Ids are clamped to -1..C, so that every wrong id falls into a border of the table."""
        C, side = self.num_classes, self.num_classes + 2
        keep = label != self.ignore_index
        row = torch.where(keep, label.long(), -1).clamp_(-1, C)
        column = torch.where(keep, pred.long(), 0).clamp_(-1, C)
        table = torch.bincount((row + 1) * side + (column + 1), weight, minlength=side * side).view(side, side)
        inner = table[1:-1, 1:-1]
        hits = torch.bincount((row + 1) * side + (column + 1), minlength=side * side) if weight is not None else table
        if int(hits.view(side, side)[1:-1, 1:-1].sum()) != int(keep.sum()):
            self._raise(pred[keep], label[keep])
        return inner

    def _raise(self, pred: Tensor, label: Tensor) -> None:
        for name, ids in (("labels", label), ("predictions", pred)):
            bad = ids[(ids < 0) | (ids >= self.num_classes)]
            if len(bad):
                raise ValueError(f"{len(bad)} {name} outside 0..{self.num_classes - 1}, values {bad.unique()[:5].tolist()}; correct the "
                                 f"number of classes, or map unused ids to the ignore value {self.ignore_index}")

    def all_reduce(self) -> "ConfusionMatrix":
        """Sum the counts of all processes into each; once, after the last update. Returns self."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A process whose shard was empty has no dtype of its own yet: take the one the others have.
            weighted = torch.tensor([self.counts is not None and self.counts.is_floating_point()], dtype=torch.int64, device=self.device)
            dist.all_reduce(weighted, op=dist.ReduceOp.MAX)
            dtype = torch.float64 if bool(weighted.item()) else torch.int64
            counts = torch.zeros(self.num_classes, self.num_classes, dtype=dtype, device=self.device)
            self.counts = counts if self.counts is None else self.counts.to(dtype)
            dist.all_reduce(self.counts)
        return self

    def matrix(self) -> np.ndarray:
        """-> (C, C) int64 (float64 if weighted), rows = truth, columns = prediction."""
        from sklearn.metrics import confusion_matrix      # here: it takes a second to import, and --help need not wait

        C = self.num_classes
        counts = np.zeros((C, C), dtype=np.int64) if self.counts is None else self.counts.cpu().numpy()
        label, pred = np.indices((C, C)).reshape(2, -1)                          # every pair once, also those never seen
        return confusion_matrix(label, pred, labels=np.arange(C), sample_weight=counts.ravel())


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole in float64, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    """Mean without NaN, NaN (and no warning) if nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def segmentation_metrics(matrix: np.ndarray) -> dict:
    """Every metric of a confusion matrix (C, C), rows = truth; values in [0, 1].

    Arrays (C,): iou, f1 (= Dice; NaN where absent from truth and prediction), accuracy (recall; NaN where absent from truth),
    present (bool: in truth or prediction). Floats: miou, mean_f1, mean_accuracy (means over classes that are not NaN),
    overall_accuracy, fw_iou (IoU weighted by the frequency in the labels). NaN where there is nothing to score.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is square, got shape {matrix.shape}")
    hit, truth, pred = np.diag(matrix), matrix.sum(1), matrix.sum(0)            # (C,) each
    iou, f1, accuracy = _ratio(hit, truth + pred - hit), _ratio(2 * hit, truth + pred), _ratio(hit, truth)
    total = matrix.sum()
    return {
        "iou": iou, "f1": f1, "accuracy": accuracy, "present": truth + pred > 0,
        "miou": _mean(iou), "mean_f1": _mean(f1), "mean_accuracy": _mean(accuracy),
        "overall_accuracy": float(_ratio(hit.sum(), total)),
        "fw_iou": float(_ratio(np.nansum(truth * iou), total)),
    }


def absent_as_zero(values: np.ndarray) -> float:
    """Mean of per-class values (C,) over ALL classes with NaN as 0, as ScanNet200's protocol has it; print it beside the usual mean."""
    return float(np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0).mean())


def metrics_table(metrics: dict, class_names: Sequence[str]) -> str:
    """Aligned text of segmentation_metrics, times 100, a line per class and the means below; a dash for NaN.

    Raises ValueError if the number of names is not the number of classes.
    """
    if len(class_names) != len(metrics["iou"]):
        raise ValueError(f"{len(class_names)} class names for {len(metrics['iou'])} classes; give one name per class")
    means = {"mean": ("miou", "mean_f1", "mean_accuracy"), "overall accuracy": ("overall_accuracy",), "frequency-weighted IoU": ("fw_iou",)}
    width = max(len(name) for name in ("class", *class_names, *means))

    def line(name: str, values: Sequence[float]) -> str:
        return f"{name:<{width}}" + "".join(f"{'-' if np.isnan(v) else format(100 * v, '.2f'):>10}" for v in values)

    head = f"{'class':<{width}}{'IoU':>10}{'F1':>10}{'accuracy':>10}"
    per_class = zip(class_names, metrics["iou"], metrics["f1"], metrics["accuracy"], strict=True)
    lines = [head, *(line(name, values) for name, *values in per_class), "-" * len(head)]
    return "\n".join(lines + [line(name, [metrics[key] for key in keys]) for name, keys in means.items()])
