"""The 6-fold score of S3DIS: the counts of six models, each tested on the area it never saw, added up and then scored.

    for area in 1 2 3 4 5 6; do
        AREA=$area bash scripts/s3dis_linear.sh
        python evaluate.py exp/sonata/semseg-sonata-v1m1-0-base-3a-s3dis-lin-area$area/model/model_best.pth
    done
    python scripts/s3dis_6fold.py exp/sonata/semseg-sonata-v1m1-0-base-3a-s3dis-lin-area*/evaluation/metrics.json

Reads the metrics.json that evaluate.py writes, one per held-out area. The confusion matrices are pooled first; IoU and
means come from the sum. This is NOT the mean of the six folds' mIoUs, which weighs areas, and classes rare in an area,
otherwise and is no published protocol.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.metrics import absent_as_zero, metrics_table, segmentation_metrics  # noqa: E402

AREAS = tuple(f"Area_{k}" for k in range(1, 7))


def read_fold(path: Path) -> dict:
    """One metrics.json -> area, matrix (C, C) int64, names, sha256, protocol. ValueError where it is not the score of
    one area by a model that was trained on others."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        matrix, names, sha256 = np.array(record["confusion_matrix"]), tuple(record["per_class"]), record["sha256"]
        data, config = str(record["data"]), record["config"]
        train, val, test = (config["data"][key] for key in ("train", "val", "test"))
        protocol = {key: config[key] for key in ("model", "evaluation")}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a metrics.json that evaluate.py wrote for train_sonata.py") from error
    if matrix.shape != (len(names), len(names)) or matrix.dtype.kind != "i" or matrix.min() < 0 or not matrix.any():
        raise ValueError(f"{path}: confusion_matrix holds no counts of {len(names)} classes; run evaluate.py again")
    if record.get("limit_batches"):
        raise ValueError(f"{path}: scored on {record['limit_batches']} rooms alone (--limit-batches); run evaluate.py "
                         f"on the whole area")
    split = {"val split": val, "test split": test}.get(data, Path(data).name)
    area = split[0] if isinstance(split, list) and len(split) == 1 else split
    if area not in AREAS:
        raise ValueError(f"{path}: scored on {area}, expected one of {', '.join(AREAS)}")
    if area in ([train] if isinstance(train, str) else train):
        raise ValueError(f"{path}: scored on {area}, which is among its training areas {train}")
    return {"area": area, "matrix": matrix, "names": names, "sha256": sha256, "protocol": protocol, "path": path}


def check_folds(folds: list[dict], allow_missing: bool) -> None:
    """ValueError unless the folds are six different areas and checkpoints, of the same classes, model and protocol."""
    first = folds[0]
    for index, fold in enumerate(folds):
        for other in folds[:index]:
            for key, what in (("area", fold["area"]), ("sha256", "the same checkpoint")):
                if fold[key] == other[key]:
                    raise ValueError(f"{fold['path']} and {other['path']}: both are of {what}; give each area once")
        for key, what in (("names", "classes"), ("protocol", "model or evaluation settings")):
            if fold[key] != first[key]:
                numbers = f" ({len(fold[key])} and {len(first[key])})" if key == "names" else ""
                raise ValueError(f"{fold['path']} and {first['path']}: other {what}{numbers}; they cannot be pooled")
    missing = [area for area in AREAS if area not in {fold["area"] for fold in folds}]
    if missing and not allow_missing:
        raise ValueError(f"{len(folds)} of 6 folds: {', '.join(missing)} missing; evaluate them too, or give "
                         f"--allow-missing for a score of those that are there")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.json of each held-out area, in any order")
    parser.add_argument("--allow-missing", action="store_true", help="pool fewer than six; not the 6-fold score")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    """-> segmentation_metrics of the pooled counts, and official_miou, official_macc with absent classes as 0."""
    args = parse_args(argv)
    folds = sorted((read_fold(path) for path in args.metrics), key=lambda fold: fold["area"])
    check_folds(folds, args.allow_missing)
    pooled = segmentation_metrics(sum(fold["matrix"] for fold in folds))
    pooled |= {"official_miou": absent_as_zero(pooled["iou"]), "official_macc": absent_as_zero(pooled["accuracy"])}
    print(f"{'area':<10}{'mIoU':>10}{'mAcc':>10}{'accuracy':>10}{'points':>14}   each alone, not for the mean of them")
    for fold in folds:
        alone = segmentation_metrics(fold["matrix"])
        print(f"{fold['area']:<10}" + "".join(f"{100 * value:10.2f}" for value in (
            absent_as_zero(alone["iou"]), absent_as_zero(alone["accuracy"]), alone["overall_accuracy"])) +
              f"{fold['matrix'].sum():14,}")
    print(f"\n{len(folds)} areas pooled; means over the classes that occur:\n"
          f"{metrics_table(pooled, folds[0]['names'])}\n"
          f"{'6-fold' if len(folds) == 6 else f'{len(folds)} of 6 folds'}, all classes, absent ones as 0 (the official "
          f"mean): mIoU {100 * pooled['official_miou']:.2f}, mAcc {100 * pooled['official_macc']:.2f}, accuracy "
          f"{100 * pooled['overall_accuracy']:.2f}")
    return pooled


if __name__ == "__main__":
    run_main(main)
