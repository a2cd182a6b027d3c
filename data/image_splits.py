"""From the `data` flags of the image scripts to checked pairs of photographs and masks, class names and colours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.images import Augmentation, PairSummary, SegmentationDataset, check_pairs, find_files, pair_files
from utils.render import palette


def read_classes(path: str | None, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours (C, 3) uint8 of --classes, a JSON file {"classes": [...], "palette": [[r, g, b], ...]}; the
    palette may be missing, the file too: then "class 0" ... ValueError where their number is not num_classes."""
    names, colors = [f"class {c}" for c in range(num_classes)], palette(num_classes)
    if path is None:
        return names, colors
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [str(name) for name in content["classes"]]
        colors = np.array(content.get("palette", colors), dtype=np.int64)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'--classes {path}: expected {{"classes": [names], "palette": [[r, g, b], ...]}} '
                         f"({type(error).__name__}: {error})") from error
    if len(names) != num_classes or colors.shape != (num_classes, 3) or colors.min() < 0 or colors.max() > 255:
        raise ValueError(f"--classes {path}: {len(names)} names and a palette of shape {colors.shape} for "
                         f"--num-classes {num_classes}; give one name and one colour (0 to 255 each) per class")
    return names, colors.astype(np.uint8)


def split_pairs(data: Mapping, split: str) -> list[tuple[Path, Path]]:
    """The (photograph, mask) pairs of train, val or test, by file name.

    Without --val-image-paths the validation pairs are taken out of the training pairs: every n-th by name, n = 1 /
    --val-share. Neighbouring frames of one film are then on both sides, and the score is too good.
    """
    prefix = "" if split == "train" else f"{split}_"
    names = [f"--{prefix}image-paths".replace("_", "-"), f"--{prefix}mask-paths".replace("_", "-")]
    patterns = [data[f"{prefix}image_paths"], data[f"{prefix}mask_paths"]]
    if bool(patterns[0]) != bool(patterns[1]):
        raise ValueError(f"{names[0]} and {names[1]} belong together; only one of them is given")
    if not patterns[0] and split != "val":
        raise ValueError(f"{names[0]} and {names[1]} are needed: the photographs and masks of the {split} split")
    if patterns[0] and split != "train":
        return _pairs(patterns, names)
    if split == "val" and not data["val_share"]:
        raise ValueError("there is no validation split: name --val-image-paths and --val-mask-paths, or --val-share")
    pairs = _pairs([data["image_paths"], data["mask_paths"]], ["--image-paths", "--mask-paths"])
    if data["val_image_paths"] or not data["val_share"]:
        return pairs
    every = max(2, round(1 / data["val_share"]))
    held_out = pairs[every - 1::every]
    if not held_out:
        raise ValueError(f"--val-share {data['val_share']} leaves no validation image of {len(pairs)}; name "
                         f"--val-image-paths and --val-mask-paths, or raise it")
    return held_out if split == "val" else [pair for i, pair in enumerate(pairs) if i % every != every - 1]


def _pairs(patterns, names):
    return pair_files(find_files(patterns[0], names[0]), find_files(patterns[1], names[1]), tuple(names))


def checked_dataset(data: Mapping, pairs, num_workers: int = 2, seed: int = 0, views: str = "whole",
                    augmentation: Augmentation | None = None) -> tuple[SegmentationDataset, PairSummary]:
    """All files are looked at before the first step, in parallel, and what was found is remembered in --cache-dir."""
    summary = check_pairs(pairs, data["num_classes"], data["ignore_label"], data["reduce_zero_label"],
                          data["cache_dir"] or None, max(1, num_workers))
    dataset = SegmentationDataset(pairs, data["image_size"], data["num_classes"], augmentation, data["ignore_label"],
                                  data["reduce_zero_label"], seed, views)
    return dataset, summary
