"""From the data settings of the image scripts to checked pairs of photographs and masks, class names and colours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.images import Augmentation, PairSummary, SegmentationDataset, check_pairs, find_files, list_images, pair_files
from data.label_map import label_map_of, read_label_map, unread_classes
from data.masks import MaskReader
from data.photos import photo_format
from utils.checks import check_names, check_range
from utils.render import palette

SHOWN_NAMES = 10                            # of the classes that never occur


def read_class_file(path: str | Path) -> tuple[list[str], np.ndarray | None]:
    """Names and colours (C, 3) int64, None where the file has none. FILE.json: {"classes": [...], "palette": [[r, g,
    b], ...]}; other files: a line per class, with its number ("0 background", in any order) or without. ValueError for
    a file that is neither, for numbers other than 0, 1, 2 ..., for colours that are not 0 to 255."""
    path = Path(path)
    is_json = path.suffix.lower() == ".json"
    try:
        text = path.read_text(encoding="utf-8-sig")         # editors of Windows put a mark in front
        content = json.loads(text) if is_json else {"classes": []}
        names = [str(name) for name in _listed(content["classes"])]
        colors = np.array(content["palette"], dtype=np.int64) if "palette" in content else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path}: expected {{"classes": [names], "palette": [[r, g, b], ...]}} in a .json file, lines '
                         f'such as "0 background" in others ({type(error).__name__}: {error})') from error
    if not is_json:
        names = _numbered_names(path, [line.strip() for line in text.splitlines() if line.strip()])
    if colors is not None and (colors.shape != (len(names), 3) or colors.tolist() != content["palette"]
                               or colors.min() < 0 or colors.max() > 255):
        raise ValueError(f"{path}: {len(names)} names and a palette of shape {colors.shape}; give one name and one "
                         f"colour (whole numbers, 0 to 255 each) per class")
    return check_names(f"{path}", names), colors


def _listed(names):
    if not isinstance(names, list):
        raise TypeError(f"{type(names).__name__} in place of a list of names")
    return names


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


def read_classes(path: str | Path | None, num_classes: int,
                 label_map: str | None = None) -> tuple[list[str], np.ndarray]:
    """Names and colours (C, 3) uint8 of a class file, see read_class_file; colours of our own where it has none;
    without a file the names of the label map, else "class 0" ... ValueError where their number is not num_classes."""
    if path is None:
        names = read_label_map(label_map).names if label_map else None
        return names or [f"class {c}" for c in range(num_classes)], palette(num_classes)
    names, colors = read_class_file(path)
    if len(names) != num_classes:
        raise ValueError(f"{path}: {len(names)} names for num_classes={num_classes}; give one name per class")
    return names, palette(num_classes) if colors is None else colors.astype(np.uint8)


def class_file(root: str | Path | None, path: str | Path | None) -> str | Path | None:
    """The class file named, or else root/classes.json or root/classes.txt where there is one."""
    if path or root is None:
        return path or None
    return next((file for file in (Path(root) / "classes.json", Path(root) / "classes.txt") if file.is_file()), None)


def class_info(root: str | Path, path: str | Path | None, num_classes: int,
               label_map: str | None = None) -> tuple[list[str], np.ndarray]:
    """read_classes of class_file."""
    return read_classes(class_file(root, path), num_classes, label_map)


# -- what the files mean -----------------------------------------------------------------------------------------------

def check_file_settings(data: Mapping, num_classes: int, any_bands: bool = False) -> None:
    """Check label_map, value_range, bands, max_pixels and mask_suffix of a section of the settings. A label map is
    replaced by its text, so that a checkpoint needs no file. any_bands: the network takes as many as are named. Raises
    ValueError, FileNotFoundError."""
    photos = photo_format(data)
    ignored = data.get("ignore_label", 255)
    if not 0 <= ignored <= 255:
        raise ValueError(f"ignore_label={ignored}: expected a number from 0 to 255; other numbers of the masks are "
                         f"written into a label map, such as 0:0,1:1,{ignored}:ignore (--label-map)")
    if photos.channels != 3 and not any_bands:
        raise ValueError(f"bands={list(photos.bands)}: expected three bands, counted from 1, such as [1, 2, 3]; this "
                         f"network takes red, green and blue, as it was pre-trained (train_segmentation.py takes any "
                         f"number of bands)")
    check_range("max_pixels", photos.max_pixels or 1, 1)
    if any(not isinstance(suffix, str) or not suffix for suffix in mask_suffixes(data)):
        raise ValueError(f"mask_suffix={data['mask_suffix']}: expected endings of names such as _mask")
    if not data.get("label_map"):
        return
    label_map = read_label_map(data["label_map"])
    if label_map.num_classes != num_classes:
        raise ValueError(f"the label map {label_map.text()[:80]} has {label_map.num_classes} classes and num_classes="
                         f"{num_classes}; set num_classes to {label_map.num_classes}, or correct the map")
    if data.get("reduce_zero_label"):
        raise ValueError("reduce_zero_label and a label map both say what 0 is; leave out reduce_zero_label and write "
                         "0:ignore into the map")
    data["label_map"] = label_map.text()


def mask_suffixes(data: Mapping) -> list[str]:
    given = data.get("mask_suffix") or []
    return [given] if isinstance(given, str) else list(given)


def mask_reader(data: Mapping, num_classes: int, table: np.ndarray | None = None) -> MaskReader:
    """How the masks of a section of the settings are read; table: of a data set that has its own numbers. Colours are
    those of the class file, where it is still there and has a palette of num_classes."""
    path, colors = class_file(data.get("root"), data.get("classes")), None
    if table is None and path is not None and Path(path).is_file():
        colors = read_class_file(path)[1]
        colors = None if colors is None or len(colors) != num_classes else colors
    return MaskReader(num_classes, data["ignore_label"], data["reduce_zero_label"], table, label_map_of(data), colors,
                      path or "the class file", data.get("max_pixels"))


# -- pairs -------------------------------------------------------------------------------------------------------------

def given_pairs(data_dir: str | Path, label_dir: str | Path | None, data: Mapping) -> list[tuple[Path, Path]]:
    """The pairs of evaluate.py's --data-dir and --label-dir. ValueError without the second."""
    if label_dir is None:
        raise ValueError("--label-dir is needed: the folder of the masks of --data-dir")
    return pair_files(list_images(data_dir), list_images(label_dir), ("--data-dir", "--label-dir"), mask_suffixes(data))


def folder_pairs(root: str | Path, split: str, suffixes: Sequence[str] = ()) -> list[tuple[Path, Path]]:
    """The (photograph, mask) pairs of root/images/SPLIT and root/masks/SPLIT, by file name; suffixes: see pair_files.
    ValueError for a folder that is missing or empty and for files without a partner."""
    folders = [Path(root) / kind / split for kind in ("images", "masks")]
    for folder in folders:
        if not folder.is_dir():
            there = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
            raise ValueError(f"{folder}: no such folder; expected images/SPLIT and masks/SPLIT in {root}"
                             f"{', with SPLIT ' + ' or '.join(there) if there else ''}")
    return pair_files(*(find_files([folder], "data set") for folder in folders), tuple(map(str, folders)), suffixes)


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
        return _pairs(patterns, names, data)
    if split == "val" and not data["val_share"]:
        raise ValueError("there is no validation split: name --val-image-paths and --val-mask-paths, or --val-share")
    pairs = _pairs([data["image_paths"], data["mask_paths"]], ["--image-paths", "--mask-paths"], data)
    if data["val_image_paths"] or not data["val_share"]:
        return pairs
    every = max(2, round(1 / data["val_share"]))
    held_out = pairs[every - 1::every]
    if not held_out:
        raise ValueError(f"--val-share {data['val_share']} leaves no validation image of {len(pairs)}; name "
                         f"--val-image-paths and --val-mask-paths, or raise it")
    return held_out if split == "val" else [pair for i, pair in enumerate(pairs) if i % every != every - 1]


def _pairs(patterns, names, data):
    return pair_files(find_files(patterns[0], names[0]), find_files(patterns[1], names[1]), tuple(names),
                      mask_suffixes(data))


def checked_dataset(data: Mapping, pairs, num_workers: int = 2, seed: int = 0, views: str = "whole",
                    augmentation: Augmentation | None = None, *, size: int | tuple[int, int] | None = None,
                    num_classes: int | None = None,
                    table: np.ndarray | None = None) -> tuple[SegmentationDataset, PairSummary]:
    """All files are looked at before the first step, in parallel, and what was found is remembered in --cache-dir.

    size, num_classes: image_size and num_classes of `data` unless given; table: see mask_reader. The data set has the
    pixels of each class, class_counts, and `doubts`, warnings of what may be read wrongly."""
    num_classes = data["num_classes"] if num_classes is None else num_classes
    masks, photos = mask_reader(data, num_classes, table), photo_format(data)
    summary = check_pairs(pairs, num_classes, cache_dir=data["cache_dir"] or None, workers=max(1, num_workers),
                          masks=masks, photos=photos)
    dataset = SegmentationDataset(pairs, data["image_size"] if size is None else size, num_classes, augmentation,
                                  seed=seed, views=views, masks=masks, photos=photos, checked=summary)
    dataset.class_counts = summary.class_counts
    return dataset, summary


def check_counts(names: list[str], counts: np.ndarray, ignored: str) -> list[str]:
    """Warnings of what can be trained but is rarely meant; counts (C,): pixels of the training masks; ignored says
    which value is not a class. ValueError where all of them are of one class: the score would be perfect."""
    absent = [names[c] for c in np.flatnonzero(counts == 0)]
    if len(absent) == len(names) - 1:
        raise ValueError(f"all labelled pixels of the training masks are {names[int(counts.argmax())]}, so that there "
                         f"is nothing to learn; {ignored}: for masks of 0 and 255, set label_map: 0:0,255:1 "
                         f"(--label-map 0:0,255:1), or write 1 in place of 255")
    if len(absent) > SHOWN_NAMES:
        absent[SHOWN_NAMES:] = [f"... ({len(absent) - SHOWN_NAMES} more; {len(names) - len(absent)} of {len(names)} "
                                f"classes occur: check num_classes)"]
    return [f"WARNING: no pixel of the training masks is {', '.join(absent)}; {ignored}"] if absent else []


def _validation_doubts(dataset, val_set):
    doubts = [doubt for doubt in val_set.notes if doubt not in dataset.notes]
    both = {path.resolve() for path in dataset.files} & {path.resolve() for path in val_set.files}
    if both:
        doubts.append(f"WARNING: {len(both)} of {len(val_set.files)} validation photographs are training photographs "
                      f"too, such as {min(both)}, so that the score is too good")
    return doubts


def training_doubts(names: list[str], dataset: SegmentationDataset, val_set: SegmentationDataset | None,
                    data: Mapping) -> list[str]:
    """Warnings about a training set of checked_dataset, see check_counts, and its validation set, if there is one.
    `data` has the settings of their files."""
    ignored = f"{data['ignore_label']} (ignore_label) is unlabelled, not a class"
    if data["reduce_zero_label"]:
        ignored = f"0 (reduce_zero_label) and {data['ignore_label']} (ignore_label) are unlabelled, not classes"
    if data.get("label_map"):
        ignored = f"the label map is {data['label_map'][:200]}"
    unread = unread_classes(names, dataset.files[0].parent, "name it with --classes or, in a config, dataset.classes")
    of_validation = [] if val_set is None else _validation_doubts(dataset, val_set)
    return [*dataset.notes, *of_validation, *check_counts(names, dataset.class_counts, ignored), *unread]
