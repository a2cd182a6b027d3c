"""Reading masks as people have them: one number a pixel, whatever the file does with it.

Masks are grey (1 to 16 bits) or palette images whose numbers count, or colour images: three equal channels hold a
number, other colours are those of the class file. What changes numbers silently is refused: JPEG and other lossy
formats, stacks of pages. C classes, H, W of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.label_map import LabelMap
from data.photos import ASSOCIATED, EXTRA_SAMPLES, ORIENTATION, depth_of, opened, rawmode_of
from utils.checks import check_range
from utils.fingerprint import digest
from utils.losses import IGNORE_INDEX

OUT_OF_RANGE = -1                           # in label_table: a file value that is no class
UNLABELLED = 255                            # in the codes of masks with a label map: what is ignored
MASK_MODES = ("L", "P", "1")                # grey, palette index, black and white
LOSSY_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "JPEG2000": "JPEG 2000", "AVIF": "AVIF"}
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")  # compressions
MOST_VALUES = 1000                          # of a mask that the check keeps; more are a photograph
SHOWN = 5                                   # wrong values or colours that an error lists


def label_table(num_classes: int, ignore_label: int = 255, reduce_zero_label: bool = False) -> np.ndarray:
    """(256,) int64: the label of every file value: 0..C-1, IGNORE_INDEX, or OUT_OF_RANGE for what is no class.

    reduce_zero_label: 0 is unlabelled too, and k is class k - 1. ValueError for more classes than 8 bits hold.
    """
    first = int(reduce_zero_label)
    if not 1 <= num_classes <= 256 - first:
        raise ValueError(f"num_classes={num_classes}: 8-bit masks hold 1 to {256 - first} classes")
    check_range("ignore_label", ignore_label, 0, 255)
    table = np.full(256, OUT_OF_RANGE, np.int64)
    table[first:first + num_classes] = np.arange(num_classes)
    table[ignore_label] = IGNORE_INDEX
    if reduce_zero_label:
        table[0] = IGNORE_INDEX
    return table


def checked_table(table, num_classes: int, ignore_label: int, reduce_zero_label: bool) -> np.ndarray:
    """The table given, if it is one, or else label_table's."""
    if table is None:
        return label_table(num_classes, ignore_label, reduce_zero_label)
    table = np.asarray(table)
    if table.shape != (256,) or table.dtype.kind != "i" or not np.isin(
            table, [IGNORE_INDEX, OUT_OF_RANGE, *range(num_classes)]).all():
        raise ValueError(f"table of labels: expected 256 integers, each {IGNORE_INDEX} (unlabelled), {OUT_OF_RANGE} "
                         f"(no class) or one of {num_classes} classes, got {table.dtype} of shape {table.shape}")
    return table.astype(np.int64)


def label_to_file(label: np.ndarray, ignore_label: int = 255, reduce_zero_label: bool = False,
                  label_map: LabelMap | None = None) -> np.ndarray:
    """Labels (H, W) integer in the numbers of the masks, uint8: the inverse of label_table; with a label map uint16 or
    int32 where its numbers need it."""
    label = label.astype(np.int64)                          # 8 bits would wrap
    if label_map is not None:
        values = label_map.to_values(label, ignore_label)
        numbers = label_map.class_values()
        return values.astype(next((kind for kind in (np.uint8, np.uint16) if np.iinfo(kind).max >= max(
            numbers.max(), values.max(initial=0)) and min(numbers.min(), values.min(initial=0)) >= 0), np.int32))
    values = np.where(label == IGNORE_INDEX, ignore_label, label + int(reduce_zero_label))
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"labels {label.min()} to {label.max()} do not fit into an 8-bit mask")
    return values.astype(np.uint8)


# -- files -------------------------------------------------------------------------------------------------------------

def lossy_format(image: Image.Image, path: str | Path) -> str | None:
    """The name of a format that changes numbers, or None."""
    if image.format in LOSSY_FORMATS:
        return LOSSY_FORMATS[image.format]
    if image.format == "TIFF":
        return "TIFF with lossy compression" if image.info.get("compression") in LOSSY_TIFF else None
    return "lossy WebP" if image.format == "WEBP" and _is_lossy_webp(path) else None


def _is_lossy_webp(path):
    """Whether a WebP holds a chunk `VP8 ` (lossy) and not `VP8L`."""
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            if head[:4] in (b"VP8 ", b"VP8L"):
                return head[:4] == b"VP8 "
            size = int.from_bytes(head[4:], "little")
            file.seek(size + size % 2, 1)
    return True


def load_mask(path: str | Path,
              max_pixels: float | None = None) -> tuple[tuple[int, int], Image.Image | None, str | None]:
    """((width, height), image, problem) of a mask: an image of mode L or P, of whole numbers of more bits, or RGB, with
    the file's own numbers as pixels; or None and what is wrong with it. ValueError where it cannot be read."""
    with opened(path, "mask", max_pixels) as mask:
        size, lossy = mask.size, lossy_format(mask, path)
        if lossy:
            return size, None, (f"a {lossy} mask: this format changes the class ids at every edge; store masks as PNG, "
                                f"from their source, not from this file")
        rawmode, depth, mode = rawmode_of(mask), depth_of(mask), mask.mode
        associated = mask.format == "TIFF" and ASSOCIATED in mask.tag_v2.get(EXTRA_SAMPLES, ())
        orientation = mask.tag_v2.get(ORIENTATION, 1) if mask.format == "TIFF" else None       # gone once it is loaded
        mask.load()
        orientation = mask.getexif().get(ORIENTATION, 1) if orientation is None else orientation
    if orientation not in (0, 1):
        return size, None, (f"EXIF orientation {orientation}, so that it may not lie on its photograph's pixels; "
                            f"store it as it is to be read, without the tag")
    if mode in ("1", "L"):
        return size, _as_stored(mask, rawmode), None
    if mode == "P":
        return size, mask, None
    if depth != "uint8":
        return (size, mask, None) if mode.startswith("I") else (size, None, _depth_problem(mode))
    if mode in ("RGBA", "LA") and not associated and mask.getchannel("A").getextrema() == (255, 255):
        mask = mask.convert(mode.removesuffix("A"))
    if mask.mode in ("L", "RGB"):
        return size, mask, None
    return size, None, _color_problem(mode)


def _as_stored(mask, rawmode):
    """Undo Pillow's scaling of 1, 2 and 4 bits to 255, and its inversion where white is 0 (TIFF)."""
    bits = 1 if mask.mode == "1" else int(rawmode[2]) if rawmode[:3] in ("L;2", "L;4") else 8
    inverted = ";" in rawmode and "I" in rawmode.partition(";")[2]
    if bits == 8 and not inverted:
        return mask
    most = 2 ** bits - 1
    values = np.asarray(mask).astype(np.uint8) // (1 if bits == 1 else 255 // most)
    return Image.fromarray(most - values if inverted else values)


def _depth_problem(mode):
    return (f"a mask of more than 8 bits (mode {mode}); store its ids as 8-bit PNG: "
            f"Image.fromarray(np.array(mask).astype('uint8')).save(...), or say which id is which class in a label_map "
            f"(--label-map)")


def _color_problem(mode):
    return (f"a colour mask (mode {mode}); replace each colour by its class id: masks are 8-bit grey or palette images "
            f"of class ids. Opaque colours are read where the class file (--classes, classes.json) has a palette of "
            f"them")


def color_keys(colors: np.ndarray) -> np.ndarray:
    """(..., 3) of 0 to 255 -> one integer each."""
    colors = colors.astype(np.int64)
    return colors[..., 0] << 16 | colors[..., 1] << 8 | colors[..., 2]


def color_of(key: int) -> tuple[int, int, int]:
    return key >> 16, key >> 8 & 255, key & 255


def examine_mask(path: str | Path, max_pixels: float | None = None) -> dict:
    """What the check of a data set has to know of a mask, in plain types, independent of all settings: mask_size; kind
    (ids, deep, colors), histogram {value: pixels}, colors {key: pixels}, palette {value: key} behind the values used;
    or mask_problem; digest: of the values."""
    size, image, problem = load_mask(path, max_pixels)
    record = {"mask_size": list(size), "histogram": {}}
    if problem is not None:
        return record | {"mask_problem": problem}
    values = np.asarray(image)
    record["digest"] = digest(values)
    if image.mode == "RGB":
        keys, counts = np.unique(color_keys(values), return_counts=True)
        most = slice(None, MOST_VALUES)
        pairs = zip(keys[most], counts[most], strict=True)
        record |= {"kind": "colors", "colors": {int(key): int(count) for key, count in pairs}}
        if len(keys) <= MOST_VALUES and all(len(set(color_of(int(key)))) == 1 for key in keys):
            record["histogram"] = {int(key) & 255: int(count) for key, count in zip(keys, counts, strict=True)}
        return record
    if image.mode in MASK_MODES:
        counts = image.histogram()
        record |= {"kind": "ids", "histogram": {value: int(count) for value, count in enumerate(counts) if count}}
        palette = _used_palette(image, record["histogram"])
        return record | ({"palette": palette} if palette else {})
    found, counts = np.unique(values, return_counts=True)
    return record | {"kind": "deep", "mode": image.mode, "histogram": {
        int(value): int(count) for value, count in zip(found[:MOST_VALUES], counts[:MOST_VALUES], strict=True)}}


def _used_palette(image, histogram):
    """{index: colour key} behind the indices that occur; None for grey images and for palettes of greys in their order,
    which show nothing."""
    if image.mode != "P":
        return None
    colors = np.zeros((256, 3), np.uint8)
    own = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    colors[:len(own)] = own
    if (colors[:len(own)] == np.arange(len(own))[:, None]).all():
        return None
    keys = color_keys(colors)
    return {index: int(keys[index]) for index in histogram}


# -- numbers as labels -------------------------------------------------------------------------------------------------

class MaskReader:
    """How the masks of a data set become labels.

    num_classes, ignore_label, reduce_zero_label: see label_table; table (256,): labels of the file values in its place.
    label_map: what each number of the files is, in place of both. colors (C, 3): those of the class file, which
    colors_from names; None: masks in colours are refused. as_colors: RGB masks with three equal channels are colours
    too, which check_set decides. max_pixels: see PhotoFormat. `table` turns the pixels of opened masks into labels.
    """

    def __init__(self, num_classes: int, ignore_label: int = 255, reduce_zero_label: bool = False,
                 table: np.ndarray | None = None, label_map: LabelMap | None = None, colors: np.ndarray | None = None,
                 colors_from: str | Path = "the class file", max_pixels: float | None = None) -> None:
        self.label_map = None
        self.max_pixels = max_pixels
        self.as_colors = False
        self.colors = None if colors is None else np.asarray(colors)
        self.colors_from = colors_from
        self.table = checked_table(table, num_classes, ignore_label, reduce_zero_label)
        if label_map is not None:
            if label_map.num_classes != num_classes or num_classes >= UNLABELLED:
                raise ValueError(f"the label map has {label_map.num_classes} classes, num_classes={num_classes}; at "
                                 f"most {UNLABELLED - 1} are possible")
            self.label_map = label_map.ignoring([ignore_label])
            self.table = label_table(num_classes, UNLABELLED)

    def key(self) -> str:
        """Text that names what a cache of labels depends on besides `table`; "" where that is all."""
        return f" {self.label_map.text()}" if self.label_map is not None else ""

    def open(self, path: str | Path) -> Image.Image:
        """A mask as a loaded Pillow image (mode L or P) whose pixels `table` turns into labels. ValueError for others,
        and with a label map or in colours for pixels that are no class."""
        _, image, problem = load_mask(path, self.max_pixels)
        if problem is not None:
            raise ValueError(f"{path}: {problem}")
        if image.mode == "RGB":
            values = np.asarray(image)
            grey = (values == values[..., :1]).all()
            if self.as_colors or (not grey and self.colors is not None):
                return self._of_colors(values, path)
            if not grey:
                raise ValueError(f"{path}: {_color_problem('RGB')}")
            image = Image.fromarray(values[..., 0])
        if image.mode not in MASK_MODES and self.label_map is None:
            raise ValueError(f"{path}: {_depth_problem(image.mode)}")
        if self.label_map is None:
            return image
        label = self.label_map.to_labels(np.asarray(image), path)
        return Image.fromarray(np.where(label == IGNORE_INDEX, UNLABELLED, label).astype(np.uint8))

    def _of_colors(self, values, path):
        keys = color_keys(values)
        order = np.argsort(own := color_keys(self.colors), kind="stable")
        place = np.searchsorted(own[order], keys).clip(max=len(own) - 1)
        wrong = own[order][place] != keys
        if wrong.any():
            found, counts = np.unique(keys[wrong], return_counts=True)
            problem = self._unknown_colors(dict(zip(found.tolist(), counts.tolist(), strict=True)))
            raise ValueError(f"{path}: {problem}")
        codes = np.array([np.flatnonzero(self.table == c)[0] for c in range(len(own))], np.uint8)
        return Image.fromarray(codes[order][place])

    def _unknown_colors(self, counts):
        wrong = sorted(counts.items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"({', '.join(map(str, color_of(key)))}) at {count} pixels" for key, count in wrong[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        one = len(wrong) == 1
        return (f"the {'colour' if one else 'colours'} {shown}{more} {'is' if one else 'are'} in no class of "
                f"{self.colors_from}; add {'it' if one else 'them'} to its palette, or store class ids as 8-bit PNG")

    # -- a whole set ---------------------------------------------------------------------------------------------------

    def check_set(self, records: Sequence[Mapping]) -> list[tuple[str, str] | None]:
        """Decide what RGB masks mean, for the set, and return (kind, text) of the first thing that is wrong with each
        record of examine_mask (with its path under "mask"), None where nothing is."""
        in_colors = [record for record in records if record.get("kind") == "colors"]
        known = None if self.colors is None else set(color_keys(self.colors).tolist())
        has_colors = any(not record["histogram"] for record in in_colors)
        ids = not has_colors and all(self._range_problem(record) is None for record in in_colors)
        colors = known is not None and all(set(record["colors"]) <= known for record in in_colors)
        self.as_colors = bool(in_colors) and known is not None and (has_colors or (colors and not ids))
        self._check_duplicates(in_colors)
        found = [self._mask_problem(record, known) for record in records]
        if ids and colors and in_colors and not any(found):
            self._check_same_meaning(in_colors)
        return found

    def check_palettes(self, records: Sequence[Mapping]) -> None:
        """ValueError, naming two files, where an index has one colour in a palette mask and another in the next, or in
        the class file: an editor that reorders palettes makes other numbers of the same picture."""
        first: dict[int, tuple[int, str]] = {}
        remedy = ("numbers of palette masks count, and tools that write new palettes (\"convert to indexed colours\") "
                  "change them; store the masks again with one palette")
        for record in records:
            for index, key in record.get("palette", {}).items():
                c = self._label_of(index)
                if self.colors is not None and 0 <= c < len(self.colors) and key != color_keys(self.colors[c]):
                    raise ValueError(f"{record['mask']} and {self.colors_from}: index {index} of the palette is "
                                     f"{color_of(key)}, the class has {tuple(map(int, self.colors[c]))}; {remedy}, or "
                                     f"correct the palette of {self.colors_from}")
        for record in records:
            for index, key in record.get("palette", {}).items():
                before, path = first.setdefault(index, (key, record["mask"]))
                if before != key:
                    raise ValueError(f"{path} and {record['mask']}: index {index} of their palettes is "
                                     f"{color_of(before)} in one and {color_of(key)} in the other; {remedy}")

    def count(self, records: Sequence[Mapping], num_classes: int) -> tuple[np.ndarray, int]:
        """(pixels of each class (C,) int64, unlabelled pixels) of checked records."""
        counts = np.zeros(num_classes, np.int64)
        ignored = 0
        classes = {} if self.colors is None else {int(key): c for c, key in enumerate(color_keys(self.colors))}
        for record in records:
            if self.as_colors and record.get("kind") == "colors":
                pairs = [(classes[key], count) for key, count in record["colors"].items()]
            else:
                pairs = [(self._label_of(value), count) for value, count in record["histogram"].items()]
            for c, count in pairs:
                if c >= 0:
                    counts[c] += count
                elif c == IGNORE_INDEX:
                    ignored += count
        return counts, ignored

    def doubts(self, records: Sequence[Mapping]) -> list[str]:
        """A warning where the number for unlabelled may be an object's, in all files or in some, of checked records."""
        values = [set(record["histogram"]) for record in records]
        labels = {value: self._label_of(value) for value in sorted(set().union(*values))}
        void = [value for value, c in labels.items() if c == IGNORE_INDEX]
        classes = int((self.table >= 0).sum())
        if self.label_map is not None or self.as_colors or len(void) != 1 or classes < 2:
            return []
        unlabelled = [place for place, own in enumerate(values) if void[0] in own]
        remedy = "for masks of 0 and 255, set label_map: 0:0,255:1 (--label-map 0:0,255:1)"
        if len(labels) == 2:
            return [f"WARNING: {records[unlabelled[0]]['mask']}: masks hold {min(labels)} and {max(labels)} alone, and "
                    f"{void[0]} is unlabelled, so that a single class is scored; {remedy}"]
        objects = [place for place, own in enumerate(values) if any(labels[value] == 1 for value in own)]
        if classes > 2 or len(labels) > 3 or set(unlabelled) & set(objects) or not objects:
            return []
        return [f"WARNING: {records[unlabelled[0]]['mask']}: {len(unlabelled)} of {len(records)} masks hold {void[0]}, "
                f"which is unlabelled, others hold class 1, and none holds both; if {void[0]} is an object, {remedy} "
                f"with 1:1 in it"]

    def _label_of(self, value):
        if self.label_map is not None:
            return self.label_map.targets.get(value, OUT_OF_RANGE)
        return int(self.table[value]) if 0 <= value < len(self.table) else OUT_OF_RANGE

    def _mask_problem(self, record, known):
        if "mask_problem" in record:
            return record["mask_problem"][:16], record["mask_problem"]
        if "kind" not in record:
            return None                                     # it cannot be read, which others say
        if record["kind"] == "colors" and (self.as_colors or not record["histogram"]):
            if known is None:
                return "mode", _color_problem("RGB")
            wrong = {key: count for key, count in record["colors"].items() if key not in known}
            return ("color", self._unknown_colors(wrong)) if wrong else None
        if record["kind"] == "deep" and self.label_map is None:
            return "mode", _depth_problem(record["mode"])
        problem = self._range_problem(record)
        return problem and ("range", problem)

    def _range_problem(self, record):
        if self.label_map is not None:
            return self.label_map.problem(record["histogram"])
        return range_problem(record["histogram"], self.table)

    def _check_duplicates(self, in_colors):
        if not self.as_colors:
            return
        keys = color_keys(self.colors).tolist()
        twice = next((c for c, key in enumerate(keys) if key in keys[:c]), None)
        if twice is not None:
            raise ValueError(f"{self.colors_from}: classes {keys.index(keys[twice])} and {twice} have the same colour, "
                             f"and {in_colors[0]['mask']} is a mask in colours; give each class its own")

    def _check_same_meaning(self, in_colors):
        classes = {int(key): c for c, key in enumerate(color_keys(self.colors))}
        for record in in_colors:
            for value in record["histogram"]:
                if classes[value << 16 | value << 8 | value] != self._label_of(value):
                    raise ValueError(f"{record['mask']}: ({value}, {value}, {value}) can be the number {value} and a "
                                     f"colour of {self.colors_from}; store the masks as 8-bit PNG of class ids, or "
                                     f"leave the palette out of {self.colors_from}")


def open_mask(path: str | Path) -> Image.Image:
    """A mask as a loaded Pillow image whose pixels are the file's numbers (mode L or P). ValueError for others."""
    return MaskReader(1).open(path)


def to_label(mask: Image.Image, table: np.ndarray, path: str | Path) -> np.ndarray:
    """Pixels of an opened mask as labels (H, W) int64; ValueError for values that label_table does not know."""
    label = table[np.asarray(mask)]
    if (label == OUT_OF_RANGE).any():
        raise ValueError(f"{path}: {range_problem(dict(enumerate(mask.histogram())), table)}")
    return label


def range_problem(histogram: Mapping[int, int], table: np.ndarray) -> str | None:
    """None, or what is wrong with the values of a mask; histogram: {value: pixels}."""
    wrong = {value: count for value, count in histogram.items()
             if count and (not 0 <= value < len(table) or table[value] == OUT_OF_RANGE)}
    if not wrong:
        return None
    known = np.flatnonzero(table >= 0)
    ignored = np.flatnonzero(table == IGNORE_INDEX)
    shown = ", ".join(map(str, list(wrong)[:SHOWN]))
    if len(wrong) > SHOWN:
        shown += " ..."
    return (f"{'value' if len(wrong) == 1 else 'values'} {shown} at {sum(wrong.values())} pixels; expected "
            f"{known.min()} to {known.max()}, for unlabelled {' or '.join(map(str, ignored[:9])) or 'none'}; check "
            f"num_classes, ignore_label and reduce_zero_label, or say what each number is in a label_map (--label-map)")
