#!/usr/bin/env python3
"""Scores on folds over the LOD3 buildings: of a network, or of a random forest on the same features.

    python scripts/lod3_folds.py configs/mesh_lod3_planes.yaml --output-dir exp/lod3_folds --device cpu
    python scripts/lod3_folds.py configs/mesh_lod3_planes.yaml --forest
    python scripts/lod3_folds.py configs/mesh_lod3.yaml --forest model.use_texture=false

The files 4018149a and 4018149b are parts of one building: a building is the first seven characters. Every sixth
building makes a fold, whose faces are labelled by what was trained on the other folds; each face is scored once. The
network is that of the last epoch, on complete buildings. Runs that are there are continued, or only scored.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.ensemble import RandomForestClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_downstream  # noqa: E402
from benchmarks.linear_baseline import faces_of  # noqa: E402
from data.mesh_io import list_meshes  # noqa: E402
from evaluate import load  # noqa: E402
from utils.cli import ArgumentParser, AtLeast, run_main  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.device import pick_device  # noqa: E402
from utils.metrics import segmentation_metrics  # noqa: E402

AS_THEY_ARE = ("augmentation.mode=none", "augmentation.flip_probability=0", "augmentation.scale_range=[1,1]",
               "augmentation.recluster=false", "training.clusters_per_batch=null", "evaluation.views=1")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output-dir", type=Path, help="of a network: its runs go to DIR/fold0, DIR/fold1 ...")
    parser.add_argument("--forest", action="store_true", help="a random forest of 60 trees on 120,000 faces")
    parser.add_argument("--folds", type=AtLeast(2), default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="of a network")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def held_out(names: list[str], folds: int) -> list[list[str]]:
    """Patterns of data.val_split for each fold."""
    buildings = sorted({name[:7] for name in names})
    if len(buildings) < folds:
        raise ValueError(f"--folds {folds}: the files are of {len(buildings)} buildings; take as many folds or fewer")
    return [[f"{building}*" for building in buildings[fold::folds]] for fold in range(folds)]


def forest_scores(args, overrides: list[str]) -> list[np.ndarray]:
    """`matrices` of a forest on the held-out buildings."""
    config = load_config(args.config, train_downstream.DEFAULTS, [*overrides, *AS_THEY_ARE])
    (features, label, _), (val_features, val_label, area) = (
        faces_of(train_downstream.build_dataset(config, split, args.seed)) for split in ("train", "val"))
    mean, std = features.mean(0), features.std(0) + 1e-6
    chosen = np.random.default_rng(args.seed).permutation(len(label))[:120_000]
    forest = RandomForestClassifier(60, random_state=args.seed).fit((features[chosen] - mean) / std, label[chosen])
    return matrices(val_label, forest.predict((val_features - mean) / std), area, config.model.n_classes)


def network_scores(args, overrides: list[str], folder: Path) -> list[np.ndarray]:
    """The same of a network, trained in `folder`."""
    device = ["--device", args.device] if args.device else []
    train_downstream.main([args.config, "--output-dir", str(folder), "--resume", "auto", "--seed", str(args.seed),
                           "--num-workers", "0", *device, "evaluation.interval=1000000", *overrides])
    _, model, _ = load(folder / "model" / "model_last.pth", [*overrides, "training.clusters_per_batch=null"],
                       pick_device(args.device))
    dataset = train_downstream.build_dataset(model.config, "val")
    parts = []                                              # label, prediction and area of the labelled faces of a mesh
    for index, pred in train_downstream.evaluate(model, dataset)["predictions"].items():
        first, area = dataset.faces_of_file(index)
        label = dataset.labels[index][first]
        parts.append([values[label >= 0] for values in (label, pred[first], area)])
    return matrices(*map(np.concatenate, zip(*parts, strict=True)), model.num_classes)


def matrices(label: np.ndarray, pred: np.ndarray, area: np.ndarray, C: int) -> list[np.ndarray]:
    """Confusion matrices (C, C), rows the label, of classes (P,) by number and by area."""
    return [np.bincount(label * C + pred, weight, C * C).reshape(C, C) for weight in (None, area)]


def main(argv=None) -> dict:
    """-> {"by face", "by area": {"folds": metrics of each, "sum": of the summed confusion matrices}}."""
    args = parse_args(argv)
    if args.forest == (args.output_dir is not None):
        raise ValueError("give --output-dir for a network, or --forest")
    config = load_config(args.config, train_downstream.DEFAULTS, args.overrides)
    names = [file.stem for file in list_meshes(config.paths.mesh_dir, config.data.suffixes, config.data.recursive)]
    scores = []
    for fold, patterns in enumerate(held_out(names, args.folds)):
        overrides = [*args.overrides, "data.test_split=[]", f"data.val_split={json.dumps(patterns)}"]
        scores.append(forest_scores(args, overrides) if args.forest
                      else network_scores(args, overrides, args.output_dir / f"fold{fold}"))
    result = {}
    for what, each in zip(("by face", "by area"), zip(*scores, strict=True), strict=True):
        folds, total = [segmentation_metrics(matrix) for matrix in each], segmentation_metrics(sum(each))
        result[what] = {"folds": folds, "sum": total}
        for name, key in (("accuracy", "overall_accuracy"), ("mIoU", "miou")):
            values = 100 * np.array([metrics[key] for metrics in folds])
            print(f"{what}, {name}: mean {values.mean():.1f} of the folds {' '.join(f'{v:.1f}' for v in values)}; "
                  f"of all faces together {100 * total[key]:.1f}")
        print("  IoU: " + ", ".join(f"{name} {100 * iou:.1f}" for name, iou in
                                    zip(train_downstream.class_names(config), total["iou"], strict=True)))
    return result


if __name__ == "__main__":
    run_main(main)
