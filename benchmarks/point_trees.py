"""Gradient-boosted trees on the features of points: what a config's data and features give without a network.

    python benchmarks/point_trees.py configs/sonata/tabletop-ft.yaml                  # scored on the validation clouds
    python benchmarks/point_trees.py configs/sonata/tabletop-ft.yaml --split test data.features=[normal,height,shape]

The same clouds, features and metrics as train_sonata.py, one training point a voxel of data.grid_size, every labelled
raw point scored. Of `coord` the trees get all three columns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.label_map import label_map_of  # noqa: E402
from data.point_files import find_clouds  # noqa: E402
from data.point_transforms import stack_features  # noqa: E402
from data.points import PointDataset, placed  # noqa: E402
from train_sonata import DEFAULTS, class_names, point_spec  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.metrics import metrics_table, segmentation_metrics  # noqa: E402


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--points", type=int, default=150_000, help="training points, drawn at random")
    parser.add_argument("--clouds", type=int, help="the first this many training clouds of a random order; default all")
    parser.add_argument("--forest", action="store_true", help="a random forest instead")
    parser.add_argument("--balanced", action="store_true", help="each class weighs the same in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def points_of(config, split: str, voxels: bool, chosen=slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Features (P, C) and labels (P,) of all labelled points of a split, or of one point a voxel."""
    data = config.data
    dataset = PointDataset(np.array(find_clouds(data.root, data[split]))[chosen], point_spec(config),
                           config.model.num_classes, None, data.label_field, tuple(data.ignore_labels),
                           config.paths.cache_dir, description=f"{split} clouds", label_map=label_map_of(data))
    features, label = [], []
    for index in range(len(dataset.files)):
        if voxels:
            item = dataset[index]
            values, truth = item["feat"].numpy(), item["label"].numpy()
        else:
            cloud = placed(dataset.cloud(index), dataset.spec, z=True)
            values, truth = stack_features(cloud, dataset.spec.features), cloud["label"]
        features.append(values[truth >= 0])
        label.append(truth[truth >= 0])
    return np.concatenate(features), np.concatenate(label)


def main(argv=None) -> dict:
    args = parse_args(argv)
    config = load_config(args.config, DEFAULTS, args.overrides)
    started = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    count = len(find_clouds(config.data.root, config.data.train))
    clouds = np.sort(rng.permutation(count)[:args.clouds])
    features, label = points_of(config, "train", True, clouds)
    chosen = rng.permutation(len(label))[:args.points]
    kind = RandomForestClassifier if args.forest else HistGradientBoostingClassifier
    model = kind(random_state=args.seed, class_weight="balanced" if args.balanced else None)
    model.fit(features[chosen], label[chosen])
    test_features, test_label = points_of(config, args.split, False)
    pred = model.predict(test_features)

    C = config.model.num_classes
    matrix = np.bincount(test_label * C + pred, minlength=C * C).reshape(C, C)
    metrics = segmentation_metrics(matrix)
    print(f"{metrics_table(metrics, class_names(config))}\n\n{len(chosen)} of {len(label)} training points of "
          f"{len(clouds)} clouds, {features.shape[1]} features, {args.split} split, seed {args.seed}, "
          f"{time.perf_counter() - started:.0f} s")
    return {**metrics, "matrix": matrix}


if __name__ == "__main__":
    run_main(main)
