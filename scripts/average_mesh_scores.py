"""Scores of mesh checkpoints, and of several whose class probabilities are averaged, with the chance in them.

    python scripts/average_mesh_scores.py A0.pth A1.pth A2.pth                    # one network, three seeds
    python scripts/average_mesh_scores.py A0.pth+B0.pth A1.pth+B1.pth             # pairs of networks, two seeds
    python scripts/average_mesh_scores.py A0.pth A1.pth --split val evaluation.views=4

Every argument is a row: a checkpoint of train_downstream.py, or several joined by "+", of any encoder and any features,
whose probabilities are averaged. Below the rows: their mean, the standard deviation over rows (seeds), and the average
of all checkpoints. Intervals are 95 % bootstrap intervals over meshes: the chance in the meshes, not in the seed.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import load  # noqa: E402
from utils.cli import ArgumentParser, AtLeast, run_main  # noqa: E402
from utils.device import pick_device  # noqa: E402
from utils.mesh_scripts import mesh_probabilities  # noqa: E402
from utils.metrics import segmentation_metrics  # noqa: E402

NUM_RESAMPLES = 10_000
SHOWN = {"accuracy": "overall_accuracy", "mIoU": "miou"}


def face_probabilities(path: str, split: str, overrides: list[str], device: torch.device):
    """(names, labels (P,) int64, class names, probabilities (P, C)) of a split: lists over its meshes."""
    script, model, _ = load(path, overrides, device)
    if script.__name__ != "train_downstream":
        raise ValueError(f"{path}: written by {script.__name__}.py; this script averages train_downstream.py's")
    dataset = script.build_dataset(model.config, split)
    found = {index: probability.numpy() for index, probability, _, _ in mesh_probabilities(model, dataset, device)}
    names = [file.stem for file in dataset.files]
    return names, dataset.labels, model.class_names, [found[index] for index in range(len(names))]


def confusion_matrices(probabilities: list[np.ndarray], labels: list[np.ndarray]) -> np.ndarray:
    """(M, C, C) counts, one matrix a mesh, rows the label. Faces with a negative label do not count."""
    matrices = []
    for probability, label in zip(probabilities, labels, strict=True):
        C = probability.shape[1]
        pairs = (label * C + probability.argmax(1))[label >= 0]
        matrices.append(np.bincount(pairs, minlength=C * C).reshape(C, C))
    return np.stack(matrices)


def bootstrap(rows: np.ndarray, num_resamples: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """rows (R, M, C, C), R networks on the same M meshes -> for accuracy and mIoU the 2.5 and 97.5 percentiles of the
    mean over networks, over meshes drawn with replacement."""
    rng = np.random.default_rng(seed)
    M = rows.shape[1]
    counts = rng.multinomial(M, np.full(M, 1 / M), size=num_resamples)                     # (S, M)
    drawn = np.einsum("sm,rmij->srij", counts, rows)                                       # (S, R, C, C)
    correct = np.diagonal(drawn, axis1=2, axis2=3)                                         # (S, R, C)
    union = drawn.sum(2) + drawn.sum(3) - correct
    iou = np.divide(correct, union, out=np.full(correct.shape, np.nan), where=union > 0)
    values = {"accuracy": correct.sum(2) / drawn.sum((2, 3)), "mIoU": np.nanmean(iou, axis=2)}
    return {name: tuple(np.percentile(value.mean(1), (2.5, 97.5))) for name, value in values.items()}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="CHECKPOINT[+CHECKPOINT...]",
                        help="and section.key=value, changes to the config in every checkpoint")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--resamples", type=AtLeast(1), default=NUM_RESAMPLES, help="of the bootstrap over meshes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    """-> {"rows": metrics of each, "mean", "std": accuracy and mIoU over rows, "interval", "all": of all averaged}."""
    args = parse_args(argv)
    overrides = [text for text in args.rows if re.match(r"[a-z_]+\.[a-z_]+=", text)]
    members = [text.split("+") for text in args.rows if text not in overrides]
    device = pick_device(args.device)
    scored = {path: face_probabilities(path, args.split, overrides, device) for path in dict.fromkeys(sum(members, []))}
    first, (names, labels, classes, _) = next(iter(scored.items()))
    for path, other in scored.items():
        same_labels = all(np.array_equal(a, b) for a, b in zip(labels, other[1], strict=False))
        if other[0] != names or list(other[2]) != list(classes) or not same_labels:
            raise ValueError(f"{path} and {first}: other meshes, labels or classes; probabilities of these cannot be "
                             f"averaged")

    def matrices(paths):
        mean = [sum(each) / len(paths) for each in zip(*(scored[path][3] for path in paths), strict=True)]
        return confusion_matrices(mean, labels)

    rows = np.stack([matrices(paths) for paths in members])                                # (R, M, C, C)
    every = matrices(list(scored))
    metrics = [segmentation_metrics(row.sum(0)) for row in rows]
    values = {name: np.array([float(row[key]) for row in metrics]) for name, key in SHOWN.items()}
    interval = bootstrap(rows, args.resamples)
    print(f"{args.split} split: {len(names)} meshes, {sum(map(len, labels)):,} faces\n{'accuracy':>10}{'mIoU':>10}")
    for index, paths in enumerate(members):
        print("".join(f"{100 * values[name][index]:10.2f}" for name in SHOWN) + "   " + " + ".join(paths))
    std = {name: float(value.std(ddof=1)) if len(members) > 1 else float("nan") for name, value in values.items()}
    for name, value in values.items():
        low, high = interval[name]
        spread = f", standard deviation over {len(members)} rows {100 * std[name]:.2f}" if len(members) > 1 else ""
        print(f"{name}: mean {100 * value.mean():.2f}{spread}, 95 % interval over meshes {100 * low:.2f} to "
              f"{100 * high:.2f}")
    together = segmentation_metrics(every.sum(0))
    ends = bootstrap(every[None], args.resamples)
    print("all checkpoints averaged: " + ", ".join(
        f"{name} {100 * float(together[key]):.2f} ({100 * ends[name][0]:.2f} to {100 * ends[name][1]:.2f})"
        for name, key in SHOWN.items()))
    iou = " ".join(f"{name} {100 * float(value):.1f}" for name, value in zip(classes, together["iou"], strict=True))
    print(f"their IoU: {iou}")
    return {"rows": metrics, "mean": {name: float(value.mean()) for name, value in values.items()}, "std": std,
            "interval": interval, "all": together}


if __name__ == "__main__":
    run_main(main)
