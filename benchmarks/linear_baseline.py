"""Raw per-face features and multinomial logistic regression: what a config's data and features give without a network.

    python benchmarks/linear_baseline.py configs/mesh_humanbody.yaml                  # scored on the validation meshes
    python benchmarks/linear_baseline.py configs/mesh_humanbody.yaml --split test
    python benchmarks/linear_baseline.py configs/mesh_lod3.yaml --forest training.clusters_per_batch=null

Same meshes, features, augmentation and metrics as train_downstream.py; the majority class is printed beside it. Of a
texture it gets the mean and the deviation of the samples of a face. --forest: a random forest of 60 trees instead.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_downstream import DEFAULTS, build_dataset, class_names  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.metrics import metrics_table, segmentation_metrics  # noqa: E402


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--forest", action="store_true", help="a random forest instead of logistic regression")
    parser.add_argument("--faces", type=int, default=120_000, help="training faces, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def faces_of(dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (P, Dg), labels (P,) and areas (P,) of all labelled faces of a data set."""
    features, label, area = [], [], []
    for item in (dataset[i] for i in range(len(dataset))):
        keep = item["mask"] & (item["label"] >= 0)
        columns = [item["features"][keep]]
        if "texture_sequences" in item:
            samples = item["texture_sequences"][keep]                            # (P, T, 3)
            columns += [samples.mean(1), samples.std(1, correction=0)]
        features.append(torch.cat(columns, dim=1).numpy())
        label.append(item["label"][keep].numpy())
        area.append(item["area"][keep].numpy())
    return np.concatenate(features), np.concatenate(label), np.concatenate(area)


def main(argv=None) -> dict:
    args = parse_args(argv)
    config = load_config(args.config, DEFAULTS, args.overrides)
    started = time.perf_counter()
    features, label, _ = faces_of(build_dataset(config, "train", args.seed))
    test_features, test_label, area = faces_of(build_dataset(config, args.split))
    chosen = np.random.default_rng(args.seed).permutation(len(label))[:args.faces]
    mean, std = features.mean(0), features.std(0) + 1e-6
    name = "random forest" if args.forest else "logistic regression"
    model = RandomForestClassifier(60, random_state=args.seed) if args.forest else LogisticRegression(max_iter=500)
    pred = model.fit((features[chosen] - mean) / std, label[chosen]).predict((test_features - mean) / std)

    C = config.model.n_classes
    majority = np.full_like(test_label, np.bincount(label).argmax())
    result = {}
    for model_name, guess in (("majority class", majority), (name, pred)):
        metrics, by_area = (segmentation_metrics(np.bincount(test_label * C + guess, weight, C * C).reshape(C, C))
                            for weight in (None, area))
        result[model_name] = metrics
        print(f"{model_name}: accuracy {100 * metrics['overall_accuracy']:.2f}, mIoU {100 * metrics['miou']:.2f}; by "
              f"area {100 * by_area['overall_accuracy']:.2f}, {100 * by_area['miou']:.2f}")
    print(f"\n{metrics_table(result[name], class_names(config))}\n\n{len(chosen)} of {len(label)} "
          f"training faces, {features.shape[1]} features, {args.split} split, seed {args.seed}, "
          f"{time.perf_counter() - started:.0f} s")
    return result


if __name__ == "__main__":
    run_main(main)
