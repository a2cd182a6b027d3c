"""What inspect_data.py looks at in photographs and masks: pairs, numbers, colours, duplicates, and whether each mask
lies on its photograph.

The readers and refusals are those of training (data/images.py, data/masks.py, data/photos.py). Whether a mask belongs
to its photograph is measured: how well the colour of a pixel predicts its class, from all other photographs, and how
much colour and class say about each other within one. Both drop where a mask is mirrored, turned, moved or another's.
N photographs, C classes, K colours, h x w pixels of small copies.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.image_pairs import common_ending, find_files, stems_of
from data.image_results import overlay
from data.image_splits import check_counts, class_file, mask_reader, mask_suffixes, read_class_file, read_classes
from data.images import pair_problems, read_part, scan_pairs
from data.label_map import read_label_map
from data.masks import MaskReader, color_of, load_mask, to_label
from data.photo_values import set_doubts
from data.photos import photo_format, read_image
from utils.inspection import Inspection, Picture, check_classes, check_duplicates, check_names, sampled, spread
from utils.log import progress
from utils.losses import IGNORE_INDEX

SIDE = 96                                   # longest side of the small copies
GRID = (24, 32)                             # points of every photograph at which all masks are tried
LEVELS = 5                                  # of each channel: 125 colours; or
GREYS = 32                                  # of grey photographs
ROWS = 3                                    # upper, middle and lower part of a photograph
TURNS = {"mirrored left to right": lambda a: a[:, ::-1], "upside down": lambda a: a[::-1],
         "rotated by 180 degrees": lambda a: a[::-1, ::-1]}
QUARTERS = {"rotated by 90 degrees": lambda a: np.rot90(a), "rotated by 270 degrees": lambda a: np.rot90(a, 3),
            "transposed": lambda a: a.T, "transposed and rotated by 180 degrees": lambda a: np.rot90(a.T, 2)}
MOVES = [(y, x) for y in range(-6, 7, 2) for x in range(-6, 7, 2)]      # small pixels, of a whole set
FAR_MOVES = [(y, x) for y in (-6, 0, 6) for x in (-6, 0, 6)]            # of single files
# Calibrated on road scenes: the largest gains of right masks are below 0 for turns, moves and swaps, 0.16 for a shift.
TURN_GAIN = 0.08, 0.03                      # of the mean log likelihood ratio of a pixel, of the mutual information
SWAP_GAIN, EACH_GAIN, SHIFT_GAIN, MOVE_GAIN = 0.2, 0.06, 0.5, 0.04
SAME_VIEW = 0.995                           # correlation of two photographs that show the same
SAME_LABELS, RESIZED_LABELS = 0.995, 0.93    # their equal labels, of the same size and of another
SET_FILES = 60                              # of which finer moves are tried
SET_GAIN, SET_ERRORS, SET_SHARE = 0.02, 5, 0.8      # of the whole set: mean, in standard errors, share of photographs
MANY_VALUES, FEW_PIXELS = 8, 0.01           # of a mask, most of them at less than 1 % of its pixels: blurred?
MOST_NAMED = 12                             # pictures of files that a fault or doubt names
UNLABELLED = (255, 65535, -1)               # numbers that usually are no class
MASK_KINDS = {"ids": "of class ids", "deep": "of more than 8 bits", "colors": "in colours"}
FEW = 6                                     # photographs: below this nothing is said of how masks lie
NEAR_EMPTY, MOSTLY_UNLABELLED = 0.001, 0.95


def inspect_images(splits: Mapping[str, tuple], data: dict, most: int, workers: int, seed: int) -> Inspection:
    """splits {train: (image patterns, mask patterns), ...}; data: the settings of files as --classes, --label-map ...
    give them, None where they are to be found out: they are, and are `settings` of the result."""
    found = Inspection("Photographs and masks", "pixels")
    pairs = {split: _pairs(found, split, *patterns, data) for split, patterns in splits.items()}
    files = [(split, image) for split, listed in pairs.items() for image, _ in listed]
    check_names(found, files)
    found.pairs = pairs
    pairs = sampled(found, pairs, most, seed)
    listed = [(split, *pair) for split in pairs for pair in pairs[split]]
    records = scan_pairs([pair[1:] for pair in listed], workers=workers)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        hashes = list(pool.map(lambda pair: _file_hash(pair[1]), listed))
    settings = {**data, "ignore_label": 255, "reduce_zero_label": False}
    blurred = [_is_blurred(record) for record in records]
    _find_classes(found, [pair[1:] for pair in listed], settings)
    _find_meaning(found, [record for record, bad in zip(records, blurred, strict=True) if not bad], settings)
    masks, photos = _reader(settings), photo_format(settings)
    good = _check_files(found, listed, records, blurred, masks, photos)
    check_duplicates(found, [pair[:2] for pair in listed], hashes, [record.get("digest") for record in records])
    _check_masks_of_two(found, listed, records, hashes)
    by_file = _count(found, listed, records, good, masks, settings)
    _check_photos(found, records)
    small = _small_copies(found, listed, records, good, masks, photos, workers)
    good = [i for i in good if i in small]
    check_copies(found, [pair[:2] for pair in listed], small, hashes, [record.get("size") for record in records])
    odd = check_alignment(found, [pair[1:] for pair in listed], small, len(found.class_names)) if small else {}
    _facts(found, pairs, records)
    found.draw = partial(_add_pictures, found, listed, good, by_file, odd, masks, photos, seed)
    found.settings |= settings
    return found


# -- pairs -------------------------------------------------------------------------------------------------------------

def _pairs(found, split, image_patterns, mask_patterns, data):
    prefix = "" if split == "train" else f"{split}-"
    flags = f"--{prefix}image-paths", f"--{prefix}mask-paths"
    images, masks = (find_files(patterns, flag) for patterns, flag in zip((image_patterns, mask_patterns), flags,
                                                                          strict=True))
    by_stem, same = stems_of(images, masks, flags, mask_suffixes(data))
    both = by_stem[0].keys() & by_stem[1].keys()
    ending = None if mask_suffixes(data) else common_ending(*map(list, by_stem))
    if len(both) * 2 < len(images) and ending:
        found.add("doubt", "mask suffix", f"{flags[1]}: the names of masks end in {ending}; set mask_suffix: {ending} "
                  f"(--mask-suffix {ending})")
        data["mask_suffix"] = [ending]
        by_stem, same = stems_of(images, masks, flags, [ending])
        both = by_stem[0].keys() & by_stem[1].keys()
    for path, before, flag in same:
        found.add("fault", "same name", f"{flag}: {before} and {path} have the same name without ending, by which "
                  f"photographs and masks are paired; rename one", path)
    for here, what, other in ((by_stem[0], "mask is missing: this photograph has no mask", flags[1]),
                              (by_stem[1], "extra mask: it has no photograph", flags[0])):
        for stem in sorted(here.keys() - both):
            found.add("fault", what, f"{here[stem]}: {what} of the same name in {other}; add it, or remove the file",
                      here[stem])
    if not both:
        raise ValueError(f"{flags[0]}: not one of {len(images)} files has a partner of the same name in {flags[1]} "
                         f"({images[0].name}, {masks[0].name} ...); set --mask-suffix where masks' names end in more")
    return [(path, by_stem[1][stem]) for stem, path in by_stem[0].items() if stem in both]


def _file_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


# -- what the numbers of masks mean ------------------------------------------------------------------------------------

def _find_classes(found, pairs, settings):
    """The class file that is given, or lies above the photographs."""
    if settings["classes"] is None and pairs:
        above = [folder for folder in pairs[0][0].parents[:3] if folder in pairs[0][1].parents or
                 folder == pairs[0][0].parent]
        settings["classes"] = next(filter(None, (class_file(folder, None) for folder in above)), None)
    if settings["classes"] is not None:
        settings["classes"] = str(settings["classes"])
        names, colors = read_class_file(settings["classes"])
        settings["num_classes"] = settings["num_classes"] or len(names)
        found.facts.append(("class file", f"{settings['classes']}: {len(names)} names"
                            f"{'' if colors is None else ' and colours'}"))


def _find_meaning(found, records, settings):
    """Set num_classes, label_map and reduce_zero_label by the numbers that the masks hold, with a line of each
    decision."""
    colors = [record for record in records if record.get("kind") == "colors" and not record["histogram"]]
    files = Counter(value for record in records for value in record["histogram"])
    if settings["label_map"]:
        settings["num_classes"] = settings["num_classes"] or read_label_map(settings["label_map"]).num_classes
        return
    if colors and not files:
        _colors_as_classes(found, colors, settings)
        return
    values = [value for value in sorted(files) if not _is_stray(value, files, len(records))]
    void = [value for value in values if value in UNLABELLED]
    others = [value for value in values if value not in UNLABELLED]
    if 255 in values and len(others) > 1:
        found.add("note", "unlabelled value", f"255 is read as unlabelled (ignore_label: 255), in {files[255]} of "
                  f"{len(records)} masks")
    if settings["num_classes"] or not values:
        settings["num_classes"] = settings["num_classes"] or 2
        return
    deep = any(record.get("kind") == "deep" for record in records)
    ignored = "".join(f",{value}:ignore" for value in void)
    if void and len(others) < 2:
        rest = "".join(f",{value}:ignore" for value in void[:-1])
        settings |= {"label_map": f"{others[0] if others else 0}:0,{void[-1]}:1{rest}", "num_classes": 2}
        found.add("doubt", "binary masks", f"masks hold {' and '.join(map(str, values))} alone, and {void[-1]} usually "
                  f"means unlabelled; planned: label_map {settings['label_map']} (--label-map), two classes")
    elif deep or max(others) > max(1.5 * len(others), len(others) + 3):
        pairs = ",".join(f"{value}:{c}" for c, value in enumerate(others))
        settings |= {"label_map": pairs + ignored, "num_classes": len(others)}
        why = "masks have more than 8 bits" if deep else f"masks hold {len(others)} numbers up to {max(others)}"
        found.add("doubt", "numbers of their own", f"{why}; planned: label_map {settings['label_map'][:200]} "
                  f"(--label-map), which says which number is which class")
    elif min(others) == 1:
        settings |= {"reduce_zero_label": True, "num_classes": max(others)}
        found.add("doubt", "labels from 1", f"labels count from 1 ({min(others)} to {max(others)}, and no 0); planned: "
                  f"reduce_zero_label: true (--reduce-zero-label)")
    else:
        settings["num_classes"] = max(2, max(others) + 1)


def _reader(settings):
    """How training reads the masks as planned."""
    if "class_text" in settings:
        return MaskReader(settings["num_classes"], colors=np.array(json.loads(settings["class_text"])["palette"]))
    return mask_reader(settings, settings["num_classes"])


def _is_stray(value, files, total):
    """A number beyond a gap that is in one file, or in hardly any: a mistake, and no class."""
    return value != 255 and total >= 5 and files[value] <= max(1, 0.02 * total) and value - 1 not in files and value > 1


def _colors_as_classes(found, records, settings):
    counts = Counter()
    for record in records:
        counts.update(record["colors"])
    if settings["classes"] and read_class_file(settings["classes"])[1] is not None:
        return
    keys = sorted(counts, key=lambda key: -counts[key])[:settings["num_classes"] or 254]
    settings["num_classes"] = len(keys)
    settings["class_text"] = json.dumps({"classes": [f"class {c}" for c in range(len(keys))],
                                         "palette": [list(map(int, color_of(key))) for key in keys]}, indent=1)
    found.add("doubt", "colour masks", f"masks are in colours ({len(counts)} of them, the most frequent "
              f"{', '.join(str(color_of(key)) for key in keys[:5])}), which training reads where a class file has them "
              f"as its palette; planned: the classes.json beside the plan, in which you name them (--classes)")


# -- files -------------------------------------------------------------------------------------------------------------

def _is_blurred(record):
    """Whether a mask has many numbers that are nearly all single pixels: interpolated, or lossy once."""
    counts = np.array(list(record["histogram"].values()))
    if len(counts) < MANY_VALUES or 2 * (counts < FEW_PIXELS * counts.sum()).sum() < len(counts):
        return False
    values = np.asarray(load_mask(record["mask"])[1].convert("L"))
    alone = np.ones(values.shape, bool)
    same = values[:, 1:] == values[:, :-1]
    alone[:, 1:] &= ~same
    alone[:, :-1] &= ~same
    same = values[1:] == values[:-1]
    alone[1:] &= ~same
    alone[:-1] &= ~same
    share = np.bincount(values[alone], minlength=256) / np.bincount(values.ravel(), minlength=256).clip(min=1)
    return 2 * (share > 0.5).sum() > len(counts)


def _check_files(found, listed, records, blurred, masks, photos):
    """Report what training refuses; returns the places of the files that it takes."""
    good = []
    for i, (problem, record) in enumerate(zip(pair_problems(records, masks, photos), records, strict=True)):
        path = listed[i][2]
        if blurred[i]:
            found.add("fault", "blurred mask", f"{path}: {len(record['histogram'])} numbers, most of them single "
                      f"pixels at edges: a mask that was resized with interpolation or was a JPEG before; store it "
                      f"again from its source, resized to the nearest pixel", path)
        elif problem is None:
            good.append(i)
        else:
            kind, text = problem
            if kind == "size" and record["size"] == record["mask_size"][::-1]:
                text += "; width and height are exchanged: is it transposed or rotated by 90 degrees?"
            found.add("fault", kind, text, path if kind not in ("orientation", "unreadable", "bands") else listed[i][1])
    palettes = [i for i in good if records[i].get("palette")]
    usual = Counter(json.dumps(records[i]["palette"]) for i in palettes).most_common(1)
    reference = next((records[i] for i in palettes if json.dumps(records[i]["palette"]) == usual[0][0]), None)
    for i in palettes:
        if _attempt(found, "wrong palette", masks.check_palettes, [reference, records[i]], file=listed[i][2]):
            good.remove(i)
    _attempt(found, "numbers of photographs", lambda: [
        found.add("doubt", "bands and values", line.removeprefix("WARNING: "))
        for line in set_doubts([records[i] for i in good], photos)])
    for line in masks.doubts([records[i] for i in good]):
        found.add("doubt", "binary masks", line.removeprefix("WARNING: "))
    return good


def _attempt(found, kind, check, *args, file=""):
    """Whether a check of training refuses, which is reported."""
    try:
        check(*args)
    except ValueError as error:
        found.add("fault", kind, str(error), file)
        return True
    return False


def _check_masks_of_two(found, listed, records, hashes):
    """One mask for two photographs."""
    first = {}
    for i, record in enumerate(records):
        if len(record["histogram"]) < 2 and "colors" not in record:
            continue
        before = first.setdefault((record["digest"], *record["mask_size"]), i)
        if before != i and hashes[before] != hashes[i]:
            found.add("doubt", "one mask of two photographs", f"{listed[i][2]} is the same mask as {listed[before][2]} "
                      f"of another photograph: is one of them the mask of another image?", listed[i][2])


def _count(found, listed, records, good, masks, settings):
    """Class names, counts and presence by split, masks of one class, unlabelled ones."""
    C = settings["num_classes"]
    found.class_names, found.palette = read_classes(settings["classes"], C, settings["label_map"])
    if settings.get("class_text"):
        found.palette = np.array(json.loads(settings["class_text"])["palette"], np.uint8)
    by_file = np.zeros((len(records), C + 1), np.int64)                 # the last: unlabelled
    for i in good:
        by_file[i, :C], by_file[i, C] = masks.count([records[i]], C)
    share = by_file / by_file.sum(1, keepdims=True).clip(min=1)
    constant = [i for i in good if (by_file[i, :C] > 0).sum() == 1]
    usual = len(constant) > 0.1 * len(good)
    for i in [] if usual else constant:
        c = int(by_file[i, :C].argmax())
        found.add("doubt", "constant mask", f"{listed[i][2]}: a constant mask, all labelled pixels are class {c} "
                  f"({found.class_names[c]}); is it empty by mistake?", listed[i][2])
    if usual and constant:
        found.add("note", "constant mask", f"{len(constant)} of {len(good)} masks are constant, all labelled pixels of "
                  f"one class, as {listed[constant[0]][2]}")
    for i in good:
        rest = 1 - share[i, :C].max() - share[i, C]
        if share[i, C] > MOSTLY_UNLABELLED and np.median(share[good, C]) < 0.5:
            found.add("doubt", "unlabelled", f"{listed[i][2]}: {100 * share[i, C]:.1f} % of its pixels are unlabelled; "
                      f"near-empty masks teach nothing: label it, or remove it", listed[i][2])
        elif i not in constant and rest < NEAR_EMPTY and not usual:
            found.add("doubt", "near-empty mask", f"{listed[i][2]}: a near-empty mask, all but {100 * rest:.2g} % of "
                      f"its pixels are of one class", listed[i][2])
    for split in dict.fromkeys(pair[0] for pair in listed):
        own = by_file[[i for i in good if listed[i][0] == split]]
        found.files[split] = len(own)
        found.counts[split], found.presence[split] = own[:, :C].sum(0), (own[:, :C] > 0).sum(0)
        found.ignored[split] = float(own[:, C].sum() / max(own.sum(), 1))
    if good:
        check_classes(found)
        _attempt(found, "one class", check_counts, found.class_names, found.counts["train"], "look at the masks")
    return by_file[:, :C]


def _check_photos(found, records):
    """Depths, bands, sizes and transparency that differ from file to file."""
    readable = [record for record in records if "depth" in record]
    for kind, level, of, why in (
            ("depth", "doubt", lambda r: r["depth"], "set value_range, or convert it, if its black and white are not "
             "those of its type"),
            ("bands", "doubt", lambda r: "grey" if r["bands"] <= 2 else "colour", "grey beside colour photographs: "
             "convert them alike if one is a mistake"),
            ("alpha", "doubt", lambda r: "with transparency (alpha)" if r["alpha"] == "transparency" else "opaque",
             "transparent parts are shown white")):
        counts = Counter(map(of, readable))
        usual = counts.most_common(1)[0][0] if counts else None
        for record in readable:
            if of(record) != usual:
                found.add(level, kind, f"{record['image']}: {of(record)}, others are {usual}; {why}", record["image"])
    if readable and usual != "opaque":
        found.add("note", "alpha", f"photographs have transparency (alpha), shown white, as {readable[0]['image']}")
    found.tables.append(("Sizes and numbers", ("width x height", "depth", "bands", "files"), [
        (f"{size[0]} x {size[1]}", depth, bands, count) for (size, depth, bands), count in Counter(
            (tuple(record["size"]), record["depth"], record["bands"]) for record in readable).most_common(12)]))


# -- does each mask lie on its photograph? -----------------------------------------------------------------------------

def check_copies(found: Inspection, files: Sequence[tuple[str, Path]], small: Mapping[int, tuple],
                 hashes: Sequence[object], sizes: Sequence[object]) -> None:
    """Report photographs that show the same and are labelled alike: at another size, or stored again.

    files: (split, photograph); small: see check_alignment; what has the same hash was reported before. Frames of a film
    that stands still differ in their labels.
    """
    places = list(small)
    if len(places) < 2:
        return
    grey = np.stack([_at(small[i][0], GRID).mean(2).ravel() for i in places])
    label = np.stack([_at(small[i][1], GRID).ravel() for i in places])
    grey = grey - grey.mean(1, keepdims=True)
    grey = (grey / np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1e-6)).astype(np.float32)
    for a, b in np.argwhere(np.triu(grey @ grey.T, 1) > SAME_VIEW):
        i, j = places[a], places[b]
        same = SAME_LABELS if sizes[i] == sizes[j] else RESIZED_LABELS
        if hashes[i] != hashes[j] and (label[a] == label[b]).mean() > same:
            across = files[i][0] != files[j][0]
            found.add("doubt", "near-duplicate", f"{files[j][1]} ({files[j][0]}) is a near-duplicate of {files[i][1]} "
                      f"({files[i][0]}), of another size or stored again"
                      f"{': a duplicate in two splits makes the score too good' if across else ''}; remove one",
                      files[j][1])


def _small_copies(found, listed, records, good, masks, photos, workers):
    """{place: (photograph (h, w, 3) uint8, label (h, w))} of files that training takes."""
    def read(i):
        _, image_path, mask_path = listed[i]
        width, height = records[i]["size"]
        size = tuple(max(8, round(side * SIDE / max(width, height))) for side in (width, height))
        try:
            shown, _ = read_part(image_path, size, (0, 0, *size), photos.shown())
            label = to_label(masks.open(mask_path), masks.table, mask_path)
        except ValueError as error:
            found.add("fault", "unreadable", str(error), image_path)
            return i, None
        return i, (np.asarray(shown), _at(label, size[::-1]))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return {i: small for i, small in progress(pool.map(read, good), "looking at images", len(good)) if small}


def _at(values, counts):
    """Values (H, W, ...) at a grid of (h, w) places."""
    rows, columns = (((np.arange(count) + 0.5) * length / count).astype(int)
                     for count, length in zip(counts, values.shape[:2], strict=True))
    return values[rows[:, None], columns]


def check_alignment(found: Inspection, pairs: Sequence[tuple[Path, Path]], small: Mapping[int, tuple],
                    num_classes: int) -> dict[int, float]:
    """Report masks that fit their photograph better when they are turned, moved, numbered otherwise, or exchanged with
    another's, of each file and of the whole set; returns the fit of every file, low where it is odd.

    small {place in pairs: (photograph (h, w, 3) uint8, label (h, w) int64)}. Nothing is said of fewer than FEW files.
    """
    if len(small) < FEW or num_classes < 2:
        return {}
    places = list(small)
    labels = [np.where(small[i][1] == IGNORE_INDEX, num_classes, small[i][1]) for i in places]
    colors, K = _color_bins([small[i][0] for i in places])
    placed = [color + K * (np.arange(len(color)) * ROWS // len(color))[:, None] for color in colors]
    joint = np.stack([_joint(color, label, ROWS * K, num_classes) for color, label in zip(placed, labels, strict=True)])
    total = joint.sum(0, dtype=np.float64)                              # (ROWS K, C)
    information, likelihood, tables = [], [], []
    for color, place, label, own in zip(colors, placed, labels, joint, strict=True):
        ratio = _log_ratio(total - own)                                 # (ROWS K, C + 1), of all other files
        turned = [label, *(turn(label) for turn in _turns(label).values())]
        information.append([_mutual_information(_joint(color, other, K, num_classes)) for other in turned])
        likelihood.append([ratio[place, other].mean() for other in turned])
        tables.append(ratio)
    if _check_all_turned(found, pairs, places, labels, information):
        return dict.fromkeys(places, 0.0)
    turned = {place: gain for place, label, own, fits in zip(places, labels, information, likelihood, strict=True)
              if (gain := _turn_gain(label, own, fits))}
    swapped = _check_swaps(found, pairs, places, turned, placed, labels, tables)
    for place in turned.keys() - swapped:
        found.add("fault", "turned mask", f"{pairs[place][1]}: the mask seems {turned[place][1]}: turned back it fits "
                  f"{pairs[place][0].name} better; look at both, and turn it back", pairs[place][1])
    _check_shift(found, pairs, places, turned.keys() | swapped, joint, tables)
    _check_moves(found, pairs, places, turned.keys() | swapped, colors, labels, K, num_classes)
    return {place: fits[0] for place, fits in zip(places, likelihood, strict=True)}


def _turns(label):
    return {**TURNS, **QUARTERS} if label.shape[0] == label.shape[1] else TURNS


def _color_bins(images):
    """A number below K for the colour of every pixel."""
    if all((image == image[..., :1]).all() for image in images):
        return [image[..., 0].astype(np.int64) * GREYS // 256 for image in images], GREYS
    levels = [image.astype(np.int64) * LEVELS // 256 for image in images]
    return [level @ np.array([LEVELS * LEVELS, LEVELS, 1]) for level in levels], LEVELS ** 3


def _joint(color, label, K, num_classes):
    """(K, C) pixels of each colour and class; label num_classes counts nowhere."""
    return np.bincount((color * (num_classes + 1) + label).ravel(), minlength=K * (num_classes + 1)).reshape(
        K, num_classes + 1)[:, :num_classes].astype(np.int32)


def _log_ratio(joint):
    """log P(class | colour) / P(class), (K, C + 1); 0 for what is unlabelled."""
    C = joint.shape[1]
    given = (joint + 0.5) / (joint.sum(1, keepdims=True) + 0.5 * C)
    prior = (joint.sum(0) + 1) / (joint.sum() + C)
    return np.pad(np.log(given) - np.log(prior), ((0, 0), (0, 1))).astype(np.float32)


def _mutual_information(joint):
    """In nats, of colour and class of one photograph."""
    share = joint / max(joint.sum(), 1)
    expected = share.sum(1, keepdims=True) * share.sum(0)
    there = share > 0
    return float((share[there] * np.log(share[there] / expected[there])).sum())


def _is_strong(gains):
    """Whether the gains (N,) of a change of all masks hold for the whole set."""
    error = gains.std() / np.sqrt(len(gains))
    return gains.mean() > max(SET_GAIN, SET_ERRORS * error) and (gains > 0).mean() > SET_SHARE


def _check_all_turned(found, pairs, places, labels, information):
    """Report and return whether masks of the whole set are turned."""
    names = list(_turns(labels[0]))
    if any(list(_turns(label)) != names for label in labels):
        names = list(TURNS)
    gains = np.array([np.subtract(own[1:1 + len(names)], own[0]) for own in information])       # (N, turns)
    k = int(gains.mean(0).argmax())
    if not _is_strong(gains[:, k]):
        return False
    found.add("fault", "turned masks", f"masks are {names[k]} in {(gains[:, k] > 0).sum()} of {len(gains)} files, as "
              f"{pairs[places[int(gains[:, k].argmax())]][1]}: turned back they fit the edges and colours of their "
              f"photographs better; turn them back")
    return True


def _turn_gain(label, information, likelihood):
    """(gain, name) of the turn that a mask fits its photograph better by, None where none is clear."""
    gains = np.subtract(likelihood[1:], likelihood[0])
    clear = np.minimum(gains / TURN_GAIN[0], np.subtract(information[1:], information[0]) / TURN_GAIN[1])
    k = int(clear.argmax())
    return (float(gains[k]), list(_turns(label))[k]) if clear[k] > 1 else None


def _check_shift(found, pairs, places, told, joint, tables):
    """Report files whose numbers are one off, others than those told of."""
    for place, own, ratio in zip(places, joint, tables, strict=True):
        if place in told or own.sum() == 0:
            continue
        fits = own.T @ ratio[:, :-1] / own.sum()                        # (C, C): pixels of class c read as c'
        for step in (-1, 1):
            moved, there = np.trace(fits, step), own.sum(0)[::step][:-1].sum() / own.sum()
            if there > 0.99 and moved - np.trace(fits) > SHIFT_GAIN and moved > 0.1 > np.trace(fits):
                found.add("fault", "shifted labels", f"{pairs[place][1]}: shifted labels: each number "
                          f"{'plus' if step > 0 else 'minus'} 1 fits the photograph and all other files better; "
                          f"number it as the others", pairs[place][1])


def _check_swaps(found, pairs, places, turned, colors, labels, tables):
    """Report two photographs whose masks fit better exchanged, and more so than turned; returns their places."""
    seen = np.stack([ratio[_at(color, GRID)].ravel() for ratio, color in zip(tables, colors, strict=True)])
    C = tables[0].shape[1]
    hot = np.stack([np.eye(C, dtype=np.float32)[_at(label, GRID)].ravel() for label in labels])
    fits = seen @ hot.T / np.prod(GRID)                                 # (N, N): photograph i with mask j
    own = np.diag(fits)
    gains = fits + fits.T - own[:, None] - own
    done = set()
    for flat in np.argsort(-gains, axis=None)[:len(places)]:
        i, j = divmod(int(flat), len(places))
        both = {places[i], places[j]}
        least = [max(EACH_GAIN, turned.get(place, (0.0,))[0]) for place in (places[i], places[j])]
        if (gains[i, j] < SWAP_GAIN or done & both or fits[i, j] - own[i] < least[0]
                or fits[j, i] - own[j] < least[1]):
            continue
        done |= both
        found.add("fault", "swapped masks", f"{pairs[places[i]][1]} and {pairs[places[j]][1]} seem swapped: each fits "
                  f"the other's photograph better (a swapped pair); look at both, and exchange the masks",
                  pairs[places[i]][1])
    return done


def _check_moves(found, pairs, places, told, colors, labels, K, num_classes):
    """Report masks that lie beside what they show: all of them, else single files that are not told of."""
    chosen = range(0, len(labels), max(1, len(labels) // SET_FILES))
    gains = np.array([_move_gains(colors[i], labels[i], MOVES, K, num_classes) for i in chosen])
    best = int(gains.mean(0).argmax())
    if not told and _is_strong(gains[:, best]):
        found.add("fault", "moved masks", f"masks of the whole set seem shifted: moved {_direction(MOVES[best])} they "
                  f"fit their photographs better; store them again unmoved")
        return
    for place, color, label in zip(places, colors, labels, strict=True):
        gains = _move_gains(color, label, FAR_MOVES, K, num_classes)
        if gains.max() > MOVE_GAIN and place not in told:
            found.add("fault", "moved mask", f"{pairs[place][1]}: the mask seems shifted: moved "
                      f"{_direction(FAR_MOVES[int(gains.argmax())])} it fits {pairs[place][0].name} better; look at "
                      f"both, and store it unmoved", pairs[place][1])


def _direction(move):
    y, x = (round(100 * step / SIDE) for step in move)
    parts = [f"by about {abs(x)} % to the {'right' if x > 0 else 'left'}"] * bool(x) + [
        f"by about {abs(y)} % {'down' if y > 0 else 'up'}"] * bool(y)
    return f"{' and '.join(parts)} (of the longest side)"


def _move_gains(color, label, moves, K, num_classes):
    """Mutual information of colour and class for masks moved (down, right), minus that of the mask as it is."""
    height, width = label.shape
    fits = []
    for y, x in moves:
        here = np.s_[max(0, y):height + min(0, y), max(0, x):width + min(0, x)]
        there = np.s_[max(0, -y):height + min(0, -y), max(0, -x):width + min(0, -x)]
        fits.append(_mutual_information(_joint(color[here], label[there], K, num_classes)))
    return np.array(fits) - fits[moves.index((0, 0))]


# -- facts and pictures ------------------------------------------------------------------------------------------------

def _facts(found, pairs, records):
    readable = [record for record in records if "size" in record]
    if not readable:
        return
    sides = np.array([record["size"] for record in readable]).reshape(-1, 2)
    found.settings |= {"short_side": int(np.median(sides.min(1))), "megapixels": float(np.median(sides.prod(1))) / 1e6}
    found.facts[:0] = [("pairs", ", ".join(f"{len(listed)} {split}" for split, listed in pairs.items())),
                       ("short side", spread(sides.min(1), " px")),
                       ("classes", len(found.class_names)),
                       ("depth", ", ".join(sorted({record.get("depth", "unreadable") for record in records}))),
                       ("masks", ", ".join(f"{count} {kind}" for kind, count in Counter(
                           MASK_KINDS.get(record.get("kind"), "refused") for record in records).items())),
                       ("masks with a palette", sum("palette" in record for record in records))]
    deep = [np.array(record["values"]) for record in readable if record.get("values")]
    if deep:
        found.facts.append(("values of more than 8 bits", f"{min(ends.min() for ends in deep):g} to "
                                                          f"{max(ends.max() for ends in deep):g}"))


def _add_pictures(found, listed, good, by_file, odd, masks, photos, seed):
    rng = np.random.default_rng(seed)
    train = [i for i in good if listed[i][0] == "train"]
    kinds = {finding.file: finding.kind for finding in found.findings if finding.file and finding.level != "note"}
    named = [(i, kinds.get(str(listed[i][2]), kinds.get(str(listed[i][1])))) for i in good]
    chosen = [("Named above", i, kind) for i, kind in named if kind][:MOST_NAMED]
    chosen += [("Random items", i, "") for i in sorted(rng.permutation(train)[:6].tolist())]
    for c, name in enumerate(found.class_names[:40]):
        if train and by_file[train, c].any():
            i = train[int(by_file[train, c].argmax())]
            chosen.append(("Most of each class", i, f"{c} {name}"))
    chosen += [("Oddest: the colours of the photograph fit its mask least", i, f"fit {odd[i]:.2f}, where the usual is "
                f"{np.median(list(odd.values())):.2f}") for i in sorted(odd, key=odd.get)[:6]]
    for heading, i, caption in chosen:
        split, image_path, mask_path = listed[i]
        image = read_image(image_path, photos=photos)
        label = to_label(masks.open(mask_path), masks.table, mask_path)
        shown = overlay(image, label, found.palette, 0.5)
        shown.thumbnail((320, 320))
        image.thumbnail((320, 320))
        both = Image.new("RGB", (shown.width, 2 * shown.height + 4), "white")
        both.paste(image, (0, 0))
        both.paste(shown, (0, shown.height + 4))
        found.pictures.append(Picture(heading, image_path.name, f"{split}; {caption}".removesuffix("; "), both))
