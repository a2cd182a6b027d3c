"""From the data settings of the image scripts to checked pairs of photographs and masks, class names and colours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.images import Augmentation, PairSummary, SegmentationDataset, check_pairs, find_files, pair_files
from utils.checks import check_names
from utils.render import palette


def read_class_file(path: str | Path) -> tuple[list[str], np.ndarray | None]:
    """Names and colours (C, 3) int64, None where the file has none. FILE.json: {"classes": [...], "palette": [[r, g,
    b], ...]}; other files: a line per class, with its number ("0 background", in any order) or without. ValueError for
    a file that is neither, for numbers other than 0, 1, 2 ..., for colours that are not 0 to 255."""
    path = Path(path)
    is_json = path.suffix.lower() == ".json"
    try:
        text = path.read_text(encoding="utf-8-sig")         # editors of Windows put a mark in front
        content = json.loads(text) if is_json else {"classes": []}
        names = [str(name) for name in content["classes"]]
        colors = np.array(content["palette"], dtype=np.int64) if "palette" in content else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path}: expected {{"classes": [names], "palette": [[r, g, b], ...]}} in a .json file, lines '
                         f'such as "0 background" in others ({type(error).__name__}: {error})') from error
    if not is_json:
        names = _numbered_names(path, [line.strip() for line in text.splitlines() if line.strip()])
    if colors is not None and (colors.shape != (len(names), 3) or colors.min() < 0 or colors.max() > 255):
        raise ValueError(f"{path}: {len(names)} names and a palette of shape {colors.shape}; give one name and one "
                         f"colour (0 to 255 each) per class")
    return check_names(f"{path}", names), colors


def _numbered_names(path, lines):
    found = [re.fullmatch(r"([0-9]{1,9})[\s:,;=]+(.+)", line) for line in lines]
    if not any(found):
        return lines
    if not all(found):
        raise ValueError(f'{path}: "{lines[found.index(None)][:60]}" has no number in front, other lines have; number '
                         f'all classes ("0 background") or none')
    names = {int(match[1]): match[2] for match in found}
    if sorted(names) != list(range(len(lines))):
        raise ValueError(f"{path}: the numbers of {len(lines)} classes are {', '.join(match[1] for match in found)}; "
                         f"expected each of 0 to {len(lines) - 1} once, and no line for what is unlabelled")
    return [names[c] for c in range(len(lines))]


def read_classes(path: str | Path | None, num_classes: int) -> tuple[list[str], np.ndarray]:
    """Names and colours (C, 3) uint8 of a class file, see read_class_file; colours of our own where it has none,
    "class 0" ... without a file. ValueError where their number is not num_classes."""
    if path is None:
        return [f"class {c}" for c in range(num_classes)], palette(num_classes)
    names, colors = read_class_file(path)
    if len(names) != num_classes:
        raise ValueError(f"{path}: {len(names)} names for num_classes={num_classes}; give one name per class")
    return names, palette(num_classes) if colors is None else colors.astype(np.uint8)


def class_info(root: str | Path, path: str | Path | None, num_classes: int) -> tuple[list[str], np.ndarray]:
    """read_classes of the file named, or else of root/classes.json or root/classes.txt where there is one."""
    own = (file for file in (Path(root) / "classes.json", Path(root) / "classes.txt") if file.is_file())
    return read_classes(path or next(own, None), num_classes)


def folder_pairs(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """The (photograph, mask) pairs of root/images/SPLIT and root/masks/SPLIT, by file name. ValueError for a folder
    that is missing or empty and for files without a partner."""
    folders = [Path(root) / kind / split for kind in ("images", "masks")]
    for folder in folders:
        if not folder.is_dir():
            there = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
            raise ValueError(f"{folder}: no such folder; expected images/SPLIT and masks/SPLIT in {root}"
                             f"{', with SPLIT ' + ' or '.join(there) if there else ''}")
    return pair_files(*(find_files([folder], "data set") for folder in folders), tuple(map(str, folders)))


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
                                  data["reduce_zero_label"], seed, views, checked=summary)
    return dataset, summary


def check_counts(names: list[str], counts: np.ndarray, ignored: str) -> list[str]:
    """Warnings of what can be trained but is rarely meant; counts (C,): pixels of the training masks; ignored says
    which value is not a class. ValueError where all of them are of one class: the score would be perfect."""
    absent = [names[c] for c in np.flatnonzero(counts == 0)]
    if len(absent) == len(names) - 1:
        raise ValueError(f"all labelled pixels of the training masks are {names[int(counts.argmax())]}, so that there "
                         f"is nothing to learn; {ignored}: for masks of 0 and 255, write 1 in place of 255")
    return [f"WARNING: no pixel of the training masks is {', '.join(absent)}; {ignored}"] if absent else []
