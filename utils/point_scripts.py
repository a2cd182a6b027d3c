"""What train_sonata.py does with a trained network: labels of raw clouds by one view or the precise test, scores of a
data set, labels and pictures of files.

This module stands above data/ and models/; only scripts import it. model: a SonataSegmenter with the attributes that
the script's `attach` gives it. R raw points of a cloud.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from data.label_map import unread_classes
from data.point_files import PointCloud
from data.point_formats import write_las
from data.point_normals import describe_view
from data.point_results import example_clouds, write_point_result
from data.point_tiles import part_of, split_tiles
from data.point_transforms import VIEWS
from data.point_values import file_labels
from data.points import WIDEST, PointDataset, PreciseTest, collate_points, complete, evaluation_sample, to_cloud
from models.point_transformer import SonataSegmenter, upcast
from utils.config import Config
from utils.distributed import all_reduce_sum, own_share, unwrap
from utils.files import replacing
from utils.log import progress
from utils.losses import MaskedCrossEntropyLoss
from utils.metrics import ConfusionMatrix, absent_as_zero, miou_of_each, segmentation_metrics
from utils.render import pca_colors
from utils.seed import seed_worker
from utils.training import to_device

FEW_STEPS = 300                         # fewer get a warning
MANY_PASSES = 500                       # of one cloud, that evaluations announce
OFFICIAL = "all classes, absent ones as 0 (the official mean)"


def items_of_piece(training: Config, num_clouds: int) -> int:
    """Training items between two validations: whole passes over the clouds, or as many as
    training.steps needs."""
    if training.steps is None:
        return num_clouds * (training.epochs // training.eval_epochs)
    batch = training.batch_size * training.accumulation_steps
    return training.steps // training.eval_epochs * batch


def describe_data(train_set: PointDataset, val_set: PointDataset, names: list[str]) -> list[str]:
    """Lines for the log."""
    lines = [*train_set.notes, *val_set.notes,
             *unread_classes(names, train_set.files[0].parent,
                             "move it to data.root, or write its names into data.class_names")]
    if both := {*train_set.files} & {*val_set.files}:
        lines.append(f"WARNING: {len(both)} of {len(val_set.files)} validation clouds are in "
                     f"training too, such as {min(both)}: their score says nothing about new "
                     f"clouds")
    for c in train_set.ignored_classes():
        lines.append(f"class {c} ({names[c]}) is ignored: not learnt, and in no mean")
    for name in ("color", "normal"):
        if share := getattr(train_set.augmentation, f"drop_{name}"):
            lines.append(f"augmentation.drop_{name}: {100 * share:g} % of the training items lose "
                         f"all {name}s, so that the network learns to do without")
    lines.append(f"{len(train_set.files)} training and {len(val_set.files)} validation clouds, "
                 f"{sum(train_set.num_points):,} and {sum(val_set.num_points):,} points")
    return lines


def which_test(config: Config) -> str:
    return "precise test" if config.evaluation.precise else "single-view test"


def describe_steps(training: Config, train_set: PointDataset, total_steps: int) -> list[str]:
    """How long the run is, in steps and in passes, for the log."""
    passes = total_steps * training.batch_size * training.accumulation_steps / len(train_set.files)
    lines = [f"{total_steps:,} optimiser steps, {passes:.4g} passes over the training clouds"]
    if total_steps < FEW_STEPS:
        lines.append(f"WARNING: {total_steps} steps are few: below {FEW_STEPS} a network is seldom "
                     f"trained to its end; set training.steps")
    return lines


def fixed_orders(model: SonataSegmenter, index: int) -> torch.Tensor:
    """The permutations of the serialisation orders for cloud `index`: drawn as upstream draws them,
    but the same in every evaluation."""
    stages = len(model.backbone.enc_channels)
    orders = len(model.backbone.order)
    if not model.backbone.shuffle_orders:
        return torch.arange(orders).repeat(stages, 1)
    generator = torch.Generator().manual_seed(index)
    return torch.stack([torch.randperm(orders, generator=generator) for _ in range(stages)])


@torch.no_grad()
def label_cloud(model: SonataSegmenter, cloud: dict | None, precise: bool, index: int = 0,
                sample: dict | None = None, name: str | Path = "", quiet: int = 0):
    """A raw cloud -> (label (R,) int64, its mean probability (R,), the voxels' logits of the single
    view).

    precise: votes of 13 views and all their fragments; else one view, one point a voxel, copied to
    the voxel's points; `sample` is then evaluation_sample(cloud), where that is done. In float32
    without autocast, as upstream. More passes than `quiet` are announced, for the cloud `name`.
    """
    device = next(model.parameters()).device
    orders = fixed_orders(model, index)
    if precise:
        most = model.config.evaluation.get("max_fragments")
        test = PreciseTest(cloud, model.spec, model.num_classes, most)
        if (passes := test.count_passes()) > quiet:
            print(f"{name}: {passes} passes through the network for the precise test (evaluation."
                  f"max_fragments={most or 'null'} bounds those of each of its {len(VIEWS)} views)", flush=True)
        for batch in test:
            test.add(batch, model(to_device(batch, device), orders))
        share = (test.votes / test.votes.sum(1, keepdim=True)).max(1).values.cpu()
        if test.inverse is not None:
            share = share[test.inverse]
        return test.prediction(), share, None
    if sample is None:
        sample = evaluation_sample(cloud, model.spec)
    batch = collate_points([sample])
    logits = model(to_device(batch, device), orders).cpu()
    confidence, label = logits.softmax(1).max(1)
    return label[sample["inverse"]], confidence[sample["inverse"]], logits


def only_item(items: list) -> dict:
    return items[0]


@torch.no_grad()
def evaluate_clouds(model: SonataSegmenter, dataset: PointDataset, device: torch.device | None = None,
                    amp_dtype: torch.dtype | None = None, batch_size: int = 1, num_workers: int = 0,
                    limit_batches: int = 0, precise: bool | None = None) -> dict:
    """Score every labelled raw point exactly once; used in training, by --test-only and by
    evaluate.py.

    precise None: as evaluation.precise says. Returns metrics (means over the classes that occur),
    tables {OFFICIAL: means over all classes but dataset.ignored_classes(), absent ones 0}, loss
    (per labelled voxel of the single view, NaN for the precise test), matrix, examples, predictions
    {index: (R,)} of this process, and seconds.
    """
    started = time.monotonic()
    model = unwrap(model).eval()
    if precise is None:
        precise = model.config.evaluation.precise
    criterion = MaskedCrossEntropyLoss()
    confusion = ConfusionMatrix(model.num_classes)
    mine = list(own_share(len(dataset.files)))
    if limit_batches:
        mine = mine[:limit_batches]
    loader = mine
    if not precise:
        loader = DataLoader(Subset(dataset, mine), 1, collate_fn=only_item, num_workers=num_workers,
                            worker_init_fn=seed_worker, generator=torch.Generator())
    examples = []
    predictions = {}
    loss = weight = 0.0
    for index, item in zip(mine, progress(loader, "evaluating"), strict=True):
        if precise:
            cloud = dataset.cloud(index)
            label, _, _ = label_cloud(model, cloud, True, index, name=dataset.files[index],
                                      quiet=MANY_PASSES)
            truth = torch.from_numpy(cloud["label"])
        else:
            label, _, logits = label_cloud(model, None, False, index, item)
            truth = item["raw_label"]
            total, voxels = criterion.sum_and_weight(logits, item["label"])
            loss += float(total)
            weight += float(voxels)
        before = 0 if confusion.counts is None else confusion.counts
        confusion.update(label, truth)
        own = (confusion.counts - before).numpy()
        file = dataset.files[index]
        examples.append((index, file.name if file.is_dir() else file.stem,
                         float(miou_of_each(own[None])[0])))
        predictions[index] = label.numpy().astype(np.int16)
    matrix = confusion.all_reduce().matrix()
    ignored = dataset.ignored_classes()
    metrics = segmentation_metrics(matrix, ignored)
    scored = np.setdiff1d(np.arange(model.num_classes), ignored)
    official = {**metrics, "miou": absent_as_zero(metrics["iou"][scored]),
                "mean_f1": absent_as_zero(metrics["f1"][scored]),
                "mean_accuracy": absent_as_zero(metrics["accuracy"][scored])}
    weight = all_reduce_sum(weight)
    mean_loss = all_reduce_sum(loss) / weight if weight else float("nan")
    return {"metrics": metrics, "tables": {OFFICIAL: official}, "loss": mean_loss, "matrix": matrix,
            "examples": examples, "predictions": predictions,
            "seconds": time.monotonic() - started}


def label_tiles(model: SonataSegmenter, raw: PointCloud, side: float, path: str | Path) -> tuple:
    """label_cloud in squares of `side` metres with a margin, each a cloud of its own: label (R,)
    int16 and confidence (R,) float32. Memory beyond the raw points is that of one square."""
    spec = model.spec
    if spec.scale == "object":
        raise ValueError("--tile: data.scale=object shrinks clouds to one size; a part of one has "
                         "another")
    label = np.empty(len(raw.coord), np.int16)
    confidence = np.empty(len(raw.coord), np.float32)
    count, tiles = split_tiles(raw.coord, side / spec.unit)
    if (extent := np.ptp(raw.coord, 0).max() * spec.unit) > WIDEST:
        print(f"{path}: the cloud is {extent:.0f} m wide; is it in millimetres? Set data.unit=0.001", flush=True)
    for number, (index, own) in enumerate(progress(tiles, f"{count} tiles", count)):
        part, missing = complete(part_of(raw, index), spec, path)
        if number == 0:                                     # what goes for all tiles
            print(*missing_lines(path, part, missing), sep="\n", end="\n" if missing else "", flush=True)
            spec = replace(spec, normal_view=part.normal_view or spec.normal_view)
        cloud = to_cloud(part, spec)
        pred, share, _ = label_cloud(model, cloud, model.config.evaluation.precise, name=path,
                                     quiet=MANY_PASSES)
        label[index[own]] = pred.numpy()[own]
        confidence[index[own]] = share.numpy()[own]
    return label, confidence


def missing_lines(path: str | Path, cloud: PointCloud, missing: Sequence[str]) -> list[str]:
    """What a file lacked, and how `complete` made up for it."""
    lines = [f"{path}: no {name}s in the file" for name in missing]
    if cloud.normal_view is not None:
        lines[-1] += f"; estimated, {describe_view(cloud.normal_view)}"
    return lines


def label_cloud_file(model: SonataSegmenter, path: str | Path, amp_dtype: torch.dtype | None = None,
                     tile: float = 0) -> dict:
    """Label a cloud file: label (R,) and confidence (R,) of every raw point in file order, and
    coord (R, 3) as the file has them. tile: the side of squares in metres, 0: the whole cloud at
    once, which is then in `cloud` too."""
    raw = model.spec.read(path, labels=False)
    if tile:
        print(*raw.warnings, sep="\n", end="\n" if raw.warnings else "", flush=True)
        label, confidence = label_tiles(model, raw, tile, path)
        return {"label": label, "confidence": confidence,
                "coord": raw.coord if raw.exact is None else raw.exact}
    raw, missing = complete(raw, model.spec, path, model.config.paths.cache_dir)
    lines = [*raw.warnings, *missing_lines(path, raw, missing)]
    print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    cloud = {name: value for name, value in to_cloud(raw, model.spec).items() if name != "label"}
    label, confidence, _ = label_cloud(model, cloud, model.config.evaluation.precise, name=path)
    return {"label": label.numpy(), "confidence": confidence.numpy(), "cloud": cloud,
            "coord": raw.coord if raw.exact is None else raw.exact}


def write_cloud_label(model: SonataSegmenter, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in file order and in the numbers of
    the training labels' files, the coloured cloud, PCA colours."""
    colors = {"": model.palette[prediction["label"]]}
    if options.pca:
        sample = evaluation_sample(prediction["cloud"], model.spec)
        batch = to_device(collate_points([sample]), next(model.parameters()).device)
        with torch.no_grad():
            stages, restore = model.backbone.encode(batch, fixed_orders(model, 0))
            features = upcast(model.backbone.outputs(stages, restore)).float().cpu().numpy()
        colors["_pca"] = pca_colors(features)[sample["inverse"].numpy()]
    numbers = file_labels(np.arange(model.num_classes), model.config.data)
    prediction = {**prediction, "label": numbers.astype(np.int32)[prediction["label"]]}
    written = []
    if path.suffix.lower() in (".las", ".laz") and options.picture != "none":
        if numbers.min() < 0 or numbers.max() > 255:
            print(f"{path}: classes from {numbers.min()} to {numbers.max()} do not fit into the classification field, "
                  f"which holds 0 to 255: no {path.suffix} is written", flush=True)
        else:
            written.append(stem.with_name(stem.name + path.suffix.lower()))
            with replacing(written[-1]) as file:
                write_las(file, path, prediction["label"], model.config.data.label_field)
    # the labels last: where they are, everything is
    return written + write_point_result(stem, prediction, colors, options.labels, options.picture)


def cloud_pictures(model: SonataSegmenter, dataset: PointDataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction (R,)."""
    return example_clouds(dataset.cloud(index), pred, model.palette)
