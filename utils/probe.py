"""How much a frozen embedding knows about the labels: a linear and a nearest-neighbour classifier on it."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from utils.metrics import ConfusionMatrix, segmentation_metrics

METHODS = ("linear", "knn")
ITERATIONS = 200            # of L-BFGS; the loss is convex, and the score moves by less than 0.1 points after 100
NEIGHBORS = 20


def probe(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], num_classes: int,
          method: str = "linear") -> dict[str, float]:
    """Fit on `train`, score on `val`; each is (embedding (T, E) float, label (T,) int in 0..num_classes-1).

    Embeddings are standardised with the mean and deviation of `train`. "linear": multinomial logistic regression with
    L2 penalty 1 (scikit-learn's default); "knn": majority of the 20 nearest. Nothing is random. Returns the dict of
    `scores`. Raises ValueError for an unknown method, and where there are no two classes to tell apart.
    """
    from sklearn.exceptions import ConvergenceWarning  # here: a second of imports, which most runs do without
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method not in METHODS:
        raise ValueError(f"probe.method: expected one of {', '.join(METHODS)}, got {method!r}")
    classes = np.unique(train[1])
    if len(classes) < 2 or not len(val[1]):
        raise ValueError(f"a probe needs labelled faces of two classes or more to fit on, and some to score: there are "
                         f"{len(train[1])} of classes {classes.tolist()}, and {len(val[1])}. Set probe.interval=0 for "
                         f"meshes without labels")
    classifier = KNeighborsClassifier(NEIGHBORS) if method == "knn" else LogisticRegression(max_iter=ITERATIONS)
    model = make_pipeline(StandardScaler(), classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*train)
    return scores(model.predict(val[0]), val[1], num_classes)


def majority(train_label: np.ndarray, val_label: np.ndarray, num_classes: int) -> dict[str, float]:
    """The scores of always answering with the most frequent class of train."""
    return scores(np.full(len(val_label), np.bincount(train_label).argmax()), val_label, num_classes)


def scores(pred: np.ndarray, label: np.ndarray, num_classes: int) -> dict[str, float]:
    """The single numbers of segmentation_metrics, of predictions (T,) against labels (T,)."""
    matrix = ConfusionMatrix(num_classes)
    matrix.update(torch.from_numpy(np.asarray(pred, np.int64)), torch.from_numpy(np.asarray(label, np.int64)))
    metrics = segmentation_metrics(matrix.matrix())
    return {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def probe_table(rows: dict[str, dict[str, float]]) -> str:
    """Aligned text, x100: the first row against the others; under it whether the first beats the best of the others.

    Baselines that are no competitors (a majority class) do no harm: the best baseline by mIoU counts.
    """
    lines = [f"  {'':<16}{'accuracy':>9}{'mIoU':>9}{'mean F1':>9}"]
    for name, values in rows.items():
        numbers = (100 * values[key] for key in ("overall_accuracy", "miou", "mean_f1"))
        lines.append(f"  {name:<16}" + "".join(f"{number:9.2f}" for number in numbers))
    first, *others = rows
    best = max(others, key=lambda name: rows[name]["miou"])
    gain = 100 * (rows[first]["miou"] - rows[best]["miou"])
    verdict = "helps" if gain > 0 else "does NOT help"
    return "\n".join([*lines, f"  pre-training {verdict}: {gain:+.2f} mIoU points against {best}"])
