"""One confusion matrix per split, and every segmentation metric from it.

Counts are summed over the whole split and all processes, never averaged per batch or image. Metrics are in [0, 1]; only
metrics_table prints them times 100. A class in neither labels nor predictions is NaN and left out of the means.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.distributed import all_agree_max, all_reduce_sum
from utils.losses import IGNORE_INDEX

CHUNK = 1 << 16    # elements counted at once on a CPU: temporary tensors stay in its cache (up to twice as fast)


class ConfusionMatrix:
    """Counts of (label, prediction) pairs over a split, without the elements whose label is IGNORE_INDEX.

    update() counts pairs where the tensors are; matrix() has scikit-learn make the matrix from the distinct pairs
    weighted with their counts, which is the same as, and far cheaper than, giving it every pixel.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.device = torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.counts: Tensor | None = None        # (C, C), rows = truth: int64, or float64 once weighted
        self.lost: Tensor | int = 0              # elements on a GPU that should count, but have no place in it

    def update(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """Add predicted and true class ids, integers of one shape; weight (face areas, say) of that shape or None.

        ValueError: shapes that differ; a label, or a prediction whose label counts, outside 0..num_classes-1; a
        weight that is negative or not finite; weighted after unweighted updates or the reverse. The matrix is then as
        before the call. On CUDA nothing waits for the predictions; ids out of range are an error of matrix().
        """
        if pred.shape != label.shape or (weight is not None and weight.shape != label.shape):
            shapes = [tuple(t.shape) for t in (pred, label, weight) if t is not None]
            raise ValueError(f"predictions, labels and weights must have one shape, got {shapes}")
        if pred.is_floating_point() or label.is_floating_point():
            raise ValueError(f"predictions and labels must be class ids (integers), got {pred.dtype} and {label.dtype}")
        if self.counts is not None and self.counts.is_floating_point() != (weight is not None):
            raise ValueError("weighted and unweighted updates cannot be mixed; use one ConfusionMatrix for each")
        pred, label = pred.flatten().long(), label.flatten().long()      # long: in uint8, 156 == -100 is true
        counts = self._count(pred, label)
        ignored = label == IGNORE_INDEX
        if label.device.type == "cuda" and weight is None:
            self.lost = self.lost + len(label) - (counts.sum() + ignored.sum())
        elif int(counts.sum() + ignored.sum()) != len(label):
            self._raise_out_of_range(pred[~ignored], label[~ignored])
        if weight is not None:                   # on the CPU: float sums on CUDA have no fixed order
            weight = weight.flatten().cpu().double()
            if not bool(((weight >= 0) & weight.isfinite() | ignored.cpu()).all()):
                raise ValueError("a weight is negative or not finite; give a degenerate face the area 0")
            counts = self._count(pred.cpu(), label.cpu(), weight)
        self.counts = counts.to(self.device) if self.counts is None else self.counts + counts.to(self.device)

    def _count(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """(P,) each -> (C, C) int64, or float64 with weights; ids out of range and ignored labels are not in it."""
        C = self.num_classes
        side = self.num_classes + 2
        table = torch.zeros(side * side, dtype=torch.int64 if weight is None else torch.float64, device=label.device)
        chunk = max(CHUNK, side * side) if label.device.type == "cpu" else max(len(label), 1)
        for begin in range(0, len(label), chunk):
            part = slice(begin, begin + chunk)
            # Clamped to -1..C, all wrong ids (and IGNORE_INDEX) fall into the border of the table.
            pair = pred[part].clamp(-1, C).add_(label[part].clamp(-1, C), alpha=side).add_(side + 1)
            if label.device.type == "cuda":      # whose bincount waits, to know the largest
                table.scatter_add_(0, pair, torch.ones_like(pair))
            else:
                table += torch.bincount(pair, None if weight is None else weight[part], minlength=side * side)
        return table.view(side, side)[1:-1, 1:-1].clone()

    def _raise_out_of_range(self, pred: Tensor, label: Tensor) -> None:
        for name, ids in (("labels", label), ("predictions", pred)):
            bad = ids[(ids < 0) | (ids >= self.num_classes)]
            if len(bad):
                raise ValueError(f"{len(bad)} {name} outside 0..{self.num_classes - 1}, values "
                                 f"{bad.unique()[:5].tolist()}; correct the number of classes, or map unused ids to "
                                 f"the ignore value {IGNORE_INDEX}")

    def all_reduce(self) -> "ConfusionMatrix":
        """Sum the counts of all processes into each of them; once, after the last update. Returns self."""
        # A process whose share was empty has no dtype of its own: it takes the others'.
        kind = 0
        if self.counts is not None:
            kind = 2 if self.counts.is_floating_point() else 1
        kind = all_agree_max(kind)
        if kind:
            empty = torch.zeros(self.num_classes, self.num_classes, device=self.device,
                                dtype=torch.float64 if kind == 2 else torch.int64)
            self.counts = all_reduce_sum(empty if self.counts is None else self.counts)
        return self

    def matrix(self) -> np.ndarray:
        """-> (C, C) int64 (float64 if weighted), rows = truth, columns = prediction. ValueError: see update."""
        from sklearn.metrics import confusion_matrix  # here: it takes a second to import, and --help need not wait

        C = self.num_classes
        if int(self.lost):
            raise ValueError(f"{int(self.lost)} labels or predictions outside 0..{C - 1}; correct the number of "
                             f"classes, or map unused ids to the ignore value {IGNORE_INDEX}")
        counts = np.zeros((C, C), dtype=np.int64) if self.counts is None else self.counts.cpu().numpy()
        if not counts.any():                              # scikit-learn refuses to count nothing
            return counts
        label, pred = counts.nonzero()
        return confusion_matrix(label, pred, labels=np.arange(C), sample_weight=counts[label, pred])


def segmentation_metrics(matrix: np.ndarray, ignored: Sequence[int] = ()) -> dict:
    """All metrics of a confusion matrix (C, C), rows = truth; values in [0, 1], NaN where there is nothing to score.

    Arrays (C,): iou, f1 (= Dice; both NaN where absent from truth and prediction), accuracy (recall; NaN where absent
    from truth), present (bool: in truth or prediction). Floats: miou, mean_f1, mean_accuracy (means of those without
    NaN), overall_accuracy, fw_iou (IoU weighted with the class's share of the labels). ignored: classes that no label
    can have, NaN even where they are predicted (which is wrong for the labelled class). ValueError unless the matrix is
    square.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a confusion matrix is square, got shape {matrix.shape}")
    hit, truth, pred = np.diag(matrix), matrix.sum(1), matrix.sum(0)            # (C,) each
    iou, f1, accuracy = _ratio(hit, truth + pred - hit), _ratio(2 * hit, truth + pred), _ratio(hit, truth)
    for values in (iou, f1):
        values[list(ignored)] = np.nan
    return {
        "iou": iou, "f1": f1, "accuracy": accuracy, "present": truth + pred > 0,
        "miou": _mean(iou), "mean_f1": _mean(f1), "mean_accuracy": _mean(accuracy),
        "overall_accuracy": float(_ratio(hit.sum(), truth.sum())),
        "fw_iou": float(_ratio(np.nansum(truth * iou), truth.sum())),
    }


def single_numbers(metrics: Mapping) -> dict[str, float]:
    """The floats among them."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def headline(result: Mapping) -> dict[str, float]:
    """The single numbers of an evaluation, and its loss."""
    return {**single_numbers(result["metrics"]), "loss": result["loss"]}


def miou_of_each(matrices: np.ndarray) -> np.ndarray:
    """The mIoU (M,) of M confusion matrices (M, C, C), each over the classes of its labels; NaN where it has none.

    segmentation_metrics also counts a class that is only predicted, as 0. In the ranking of single items that would
    weigh one stray element as much as a whole class.
    """
    hit, support = np.diagonal(matrices, axis1=1, axis2=2), matrices.sum(2)     # (M, C)
    union = matrices.sum(1) + support - hit
    return _ratio(_ratio(hit, np.maximum(union, 1)).sum(1), (support > 0).sum(1))


def miou_of_labels(pred: np.ndarray, label: np.ndarray, num_classes: int) -> float:
    """The same for one item, from its class ids (P,) themselves and without a matrix: labels below 0 are ignored."""
    pred, label = pred[label >= 0], label[label >= 0]
    hit, support, found = (np.bincount(ids, minlength=num_classes) for ids in (label[pred == label], label, pred))
    union = support + found - hit
    return float(_ratio(_ratio(hit, np.maximum(union, 1)).sum(), (support > 0).sum()))


def absent_as_zero(values: np.ndarray) -> float:
    """Mean of per-class values (C,) over all C classes, NaN as 0 (ScanNet200's protocol)."""
    return float(np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0).mean())


def metrics_table(metrics: dict, class_names: Sequence[str]) -> str:
    """segmentation_metrics as aligned text, times 100: a line per class, the means below, "-" for NaN.

    Raises ValueError where the number of names is not the number of classes.
    """
    if len(class_names) != len(metrics["iou"]):
        raise ValueError(f"{len(class_names)} class names for {len(metrics['iou'])} classes; give one per class")
    means = {"mean": ("miou", "mean_f1", "mean_accuracy"), "overall accuracy": ("overall_accuracy",),
             "frequency-weighted IoU": ("fw_iou",)}
    width = max(len(name) for name in (*class_names, *means))

    def line(name: str, values: Sequence[float]) -> str:
        return f"{name:<{width}}" + "".join("         -" if np.isnan(v) else f"{100 * v:10.2f}" for v in values)

    head = f"{'class':<{width}}{'IoU':>10}{'F1':>10}{'accuracy':>10}"
    rows = [line(name, [metrics[key][c] for key in ("iou", "f1", "accuracy")]) for c, name in enumerate(class_names)]
    return "\n".join([head, *rows, "-" * len(head), *(line(n, [metrics[k] for k in ks]) for n, ks in means.items())])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN, without a warning, if that is nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
