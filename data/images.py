"""Photographs with one class id a pixel: finding, pairing, checking, reading, augmenting.

A mask is an 8-bit image of one channel (or a palette image, whose indices count); photograph and mask share the file
name without its ending. In memory a label map is int64 with IGNORE_INDEX; files keep their own numbers.
Shapes: H, W of the photograph, S, T height and width of a training crop, C classes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from utils.checks import check_choice, check_range
from utils.files import remove_leftovers_once, replacing
from utils.fingerprint import digest, fingerprint
from utils.image_inference import window_starts
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.seed import derived_seed

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, AssertionError, Image.DecompressionBombError)
MASK_MODES = ("L", "P", "1")                # grey, palette index, black and white
ORIENTATION = 0x0112                        # the EXIF tag
OUT_OF_RANGE = -1                           # in label_table: a file value that is no class
PADDING = (124, 116, 104)                   # ImageNet's mean colour: about 0 once normalised
CROP_TRIES = 10                             # for one that no class dominates (MMSegmentation's number)
SCAN_VERSION = 2                            # raise it when _scan records something else
# NTSC's luma and two chroma axes: saturation scales the chroma plane, hue turns it
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
COLORS = ("ssd", "factors")
SCALES_OF = ("image_size", "photo")


class Augmentation(NamedTuple):
    """Random changes of a training crop: scale, crop, mirror image, and colours, see color_matrix.

    scale_range: factor; the photograph is made to cover image_size and then multiplied by it (scale_of "image_size"),
    or multiplied by it as it is ("photo": DeepLab). crop False shows the whole image instead, no larger than
    image_size. cat_max_ratio: largest share of one class in a crop, where a few tries find one; at 1 crops only have
    to show something labelled. padding: pixels around the scaled image among which a crop may lie too, as
    torchvision's RandomCrop(padding) has it.
    """

    scale_range: tuple[float, float] = (0.5, 2.0)
    crop: bool = True
    cat_max_ratio: float = 0.75
    flip: float = 0.5                                       # probability, left to right
    brightness: float = 32 / 255                            # ssd: added, a share of the range; factors: 1 +- it
    contrast: tuple[float, float] | float = (0.5, 1.5)      # factor, or x for 1 - x to 1 + x
    saturation: tuple[float, float] | float = (0.5, 1.5)    # factor, or x for 1 - x to 1 + x
    hue: float = 18 / 360                                   # turn, up to this share of the circle
    scale_of: str = "image_size"                            # | photo
    cover: tuple[int, int] | None = None                    # (height, width) in place of image_size, if that is a part
    scale_step: float = 0.0                                 # factors lowest, lowest + step ... only; 0: any
    padding: int = 0
    color: str = "ssd"                                      # | factors
    vertical_flip: float = 0.0                              # probability, upside down

    def check(self) -> Augmentation:
        """Return itself; ValueError for ranges that are not (lowest, highest), negative amounts, shares above 1."""
        check_choice("augmentation.scale_of", self.scale_of, SCALES_OF)
        check_choice("augmentation.color", self.color, COLORS)
        for name in ("scale_range", "contrast", "saturation"):
            value = getattr(self, name)
            ends = value if name == "scale_range" else factor_range(value)
            if len(ends) != 2 or not 0 <= ends[0] <= ends[1] or (name == "scale_range" and ends[0] == 0):
                raise ValueError(f"augmentation.{name}={value}: expected [lowest, highest], neither below 0")
        for name in ("cat_max_ratio", "flip", "vertical_flip", "brightness", "hue"):
            check_range(f"augmentation.{name}", getattr(self, name), 0, 1)
        check_range("augmentation.padding", self.padding, 0)
        check_range("augmentation.scale_step", self.scale_step, 0)
        steps = (self.scale_range[1] - self.scale_range[0]) / self.scale_step if self.scale_step else 0
        if abs(steps - round(steps)) > 1e-6:
            raise ValueError(f"augmentation.scale_step={self.scale_step}: does not lead from {self.scale_range[0]} to "
                             f"{self.scale_range[1]} in whole steps")
        if not self.crop and (self.padding or self.scale_of == "photo"):
            raise ValueError("augmentation.crop=false fits the whole photograph into image_size: leave out padding and "
                             "scale_of=photo")
        return self


def factor_range(value: Sequence[float] | float) -> tuple[float, ...]:
    """(lowest, highest) factor of a colour: the two given, or 1 - x and 1 + x of one number x."""
    return (1 - value, 1 + value) if isinstance(value, int | float) else tuple(value)


class PairSummary(NamedTuple):
    """What check_pairs counted: sizes (N, 2) int64 height and width of every photograph, class_counts (C,) int64
    pixels, ignored: unlabelled pixels, fingerprint: of the files, see utils.fingerprint."""

    sizes: np.ndarray
    class_counts: np.ndarray
    ignored: int
    fingerprint: dict


# -- files -------------------------------------------------------------------------------------------------------------

def list_images(folder: str | Path) -> list[Path]:
    """The image files of a folder (not of folders in it, not hidden ones), sorted."""
    return sorted(path for path in Path(folder).iterdir() if _is_image(path))


def _is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def find_files(patterns: Sequence[str], what: str) -> list[Path]:
    """All files named by patterns, each a file, a folder or a glob (** goes into folders), sorted, none twice.

    Globs and folders give image files only. ValueError, naming `what` (the flag), for a pattern that finds nothing.
    """
    found = set()
    for pattern in map(str, patterns):
        if os.path.isdir(pattern):
            files = list_images(pattern)
        elif os.path.isfile(pattern):
            files = [Path(pattern)]
        else:
            files = [path for path in map(Path, glob.glob(pattern, recursive=True)) if _is_image(path)]
        if not files:
            if os.path.isdir(pattern):
                why = f"no images ({' '.join(SUFFIXES)}) in this folder"
            elif glob.has_magic(pattern):
                why = "no image file matches"
            else:
                why = "no such file or folder"
            raise ValueError(f"{what} {pattern}: {why}; name files, folders or globs such as 'images/*.jpg'")
        found.update(files)
    return sorted(found)


def pair_files(images: Sequence[Path], masks: Sequence[Path],
               names: tuple[str, str] = ("--image-paths", "--mask-paths")) -> list[tuple[Path, Path]]:
    """(photograph, mask) of the same file name without ending, in the order of `images`, whatever the order of masks.

    names are the flags an error tells of: ValueError for a name that occurs twice and for a file without its partner.
    """
    by_stem: list[dict[str, Path]] = [{}, {}]
    for known, files, name in zip(by_stem, (images, masks), names, strict=True):
        for path in map(Path, files):
            if path.stem in known:
                raise ValueError(f"{name}: {known[path.stem]} and {path} have the same name without ending, by which "
                                 f"photographs and masks are paired; rename one, or leave it out")
            known[path.stem] = path
    for one, other, here, there in ((*by_stem, *names), (*by_stem[::-1], *names[::-1])):
        missing = [path for stem, path in one.items() if stem not in other]
        if missing:
            shown = ", ".join(path.name for path in missing[:3])
            if len(missing) > 3:
                shown += " ..."
            example = next(iter(other.values()), None)
            hint = f" ({there} has {example.name} ...)" if example else ""
            raise ValueError(f"{here}: {len(missing)} of {len(one)} files have no partner of the same name in {there}: "
                             f"{shown}{hint}")
    return [(path, by_stem[1][stem]) for stem, path in by_stem[0].items()]


# -- reading -----------------------------------------------------------------------------------------------------------

@contextmanager
def opened(path: str | Path, what: str = "image") -> Iterator[Image.Image]:
    """Image.open, with one clear ValueError for whatever is wrong with the file, also while it is decoded inside."""
    try:
        with Image.open(path) as image:
            yield image
    except READ_ERRORS as error:
        raise ValueError(f"{path}: this {what} cannot be read ({error})") from error
    except MemoryError:                                     # such as a PNG whose last part claims two gigabytes
        raise ValueError(f"{path}: this {what} announces more than the memory holds; is it damaged?") from None


def read_image(path: str | Path, exif: bool = False) -> Image.Image:
    """A photograph as Pillow's RGB image, 8 bits a channel; exif: turned upright as its EXIF orientation says.

    16-bit grey keeps its upper 8 bits; what is transparent becomes white. ValueError for a file that cannot be read
    and for floating-point pixels.
    """
    with opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image) if exif else image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in the mode RGB, see read_image."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert them to 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        values = values >> 8 if image.mode != "I" or values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.load()                                            # convert of an RGB file would read it lazily
    return image if image.mode == "RGB" else image.convert("RGB")


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


def _checked_table(table, num_classes, ignore_label, reduce_zero_label):
    """The table given, if it is one, or else label_table's."""
    if table is None:
        return label_table(num_classes, ignore_label, reduce_zero_label)
    table = np.asarray(table)
    if table.shape != (256,) or table.dtype.kind != "i" or not np.isin(
            table, [IGNORE_INDEX, OUT_OF_RANGE, *range(num_classes)]).all():
        raise ValueError(f"table of labels: expected 256 integers, each {IGNORE_INDEX} (unlabelled), {OUT_OF_RANGE} "
                         f"(no class) or one of {num_classes} classes, got {table.dtype} of shape {table.shape}")
    return table.astype(np.int64)


def label_to_file(label: np.ndarray, ignore_label: int = 255, reduce_zero_label: bool = False) -> np.ndarray:
    """Labels (H, W) integer in the numbers of the masks, uint8: the inverse of label_table."""
    label = label.astype(np.int64)                          # 8 bits would wrap
    values = np.where(label == IGNORE_INDEX, ignore_label, label + int(reduce_zero_label))
    if values.size and (values.min() < 0 or values.max() > 255):
        raise ValueError(f"labels {label.min()} to {label.max()} do not fit into an 8-bit mask")
    return values.astype(np.uint8)


def open_mask(path: str | Path) -> Image.Image:
    """A mask as a loaded Pillow image whose pixels are the file's numbers (mode L or P). ValueError for others."""
    with opened(path, "mask") as mask:
        mask.load()
    if mask.mode not in MASK_MODES:
        raise ValueError(f"{path}: {_mode_problem(mask.mode)}")
    return Image.fromarray(np.asarray(mask).astype(np.uint8)) if mask.mode == "1" else mask


def _mode_problem(mode):
    if mode.startswith("I") or mode == "F":
        return (f"a mask of more than 8 bits (mode {mode}); store its ids as 8-bit PNG: "
                f"Image.fromarray(np.array(mask).astype('uint8')).save(...)")
    return (f"a colour mask (mode {mode}); replace each colour by its class id: masks are 8-bit grey or palette images "
            f"of class ids")


def to_label(mask: Image.Image, table: np.ndarray, path: str | Path) -> np.ndarray:
    """Pixels of an opened mask as labels (H, W) int64; ValueError for values that label_table does not know."""
    label = table[np.asarray(mask)]
    if (label == OUT_OF_RANGE).any():
        raise ValueError(f"{path}: {_range_problem(dict(enumerate(mask.histogram())), table, path)}")
    return label


def _range_problem(histogram, table, path):
    """None, or what is wrong with the values of a mask; histogram: {value: pixels}."""
    wrong = {value: count for value, count in histogram.items() if count and table[value] == OUT_OF_RANGE}
    if not wrong:
        return None
    known = np.flatnonzero(table >= 0)
    ignored = np.flatnonzero(table == IGNORE_INDEX)
    shown = ", ".join(map(str, list(wrong)[:5]))
    if len(wrong) > 5:
        shown += " ..."
    hint = "check num_classes, ignore_label and reduce_zero_label"
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        hint += "; JPEG changes the values: store masks as PNG"
    return (f"{'value' if len(wrong) == 1 else 'values'} {shown} at {sum(wrong.values())} pixels; expected "
            f"{known.min()} to {known.max()}, for unlabelled {' or '.join(map(str, ignored[:9])) or 'none'}; {hint}")


# -- checking ----------------------------------------------------------------------------------------------------------

def check_pairs(pairs: Sequence[tuple[Path, Path]], num_classes: int, ignore_label: int = 255,
                reduce_zero_label: bool = False, cache_dir: str | Path | None = None, workers: int = 4,
                table: np.ndarray | None = None) -> PairSummary:
    """Read every file once, before training, and count the classes. What was read is kept in cache_dir and holds as
    long as paths, sizes and times of the files do. table (256,): labels of the file values, for label_table's.

    Raises ValueError, one line with the first file and how many others are like it, for files that cannot be read,
    masks that are not 8-bit ids or not of the photograph's size, photographs with an EXIF orientation (their pixels
    and the mask may or may not be turned alike), ids out of range, and where not one pixel is labelled.
    """
    table = _checked_table(table, num_classes, ignore_label, reduce_zero_label)
    records = _scan_all(pairs, cache_dir, workers)
    found = [problem for record in records if (problem := _problem(record, table))]
    if found:
        others = sum(kind == found[0][0] for kind, _ in found[1:])
        more = f" (and {others} more {'file' if others == 1 else 'files'})" if others else ""
        raise ValueError(found[0][1] + more)
    counts = np.zeros(256, np.int64)
    for record in records:
        for value, count in record["histogram"].items():
            counts[value] += count
    class_counts = np.array([counts[table == c].sum() for c in range(num_classes)], np.int64)
    if not class_counts.any():
        raise ValueError(f"{pairs[0][1] if pairs else 'no files'}: not one pixel of {len(pairs)} masks is labelled; "
                         f"check ignore_label and reduce_zero_label")
    sizes = np.array([record["size"][::-1] for record in records], np.int64)
    bytes_and_labels = ([record[name] for record in records] for name in ("bytes", "digest"))
    return PairSummary(sizes, class_counts, int(counts[table == IGNORE_INDEX].sum()),
                       fingerprint((record["image"] for record in records), *bytes_and_labels))


def _problem(record, table):
    """(kind, text) of the first thing that is wrong with a pair, None if nothing is."""
    if "unreadable" in record:
        return "unreadable", record["unreadable"]
    image, mask, size, mask_size = (record[name] for name in ("image", "mask", "size", "mask_size"))
    if record["mode"] not in MASK_MODES:
        return "mode", f"{mask}: {_mode_problem(record['mode'])}"
    if record["orientation"] not in (0, 1):
        return "orientation", (f"{image}: EXIF orientation {record['orientation']}, so that its mask may not lie on "
                               f"its pixels; store it upright (PIL.ImageOps.exif_transpose), or without the tag if the "
                               f"mask was drawn on it as it is")
    if size != mask_size:
        return "size", _size_problem(mask, mask_size, image, size)
    problem = _range_problem(record["histogram"], table, mask)
    return problem and ("range", f"{mask}: {problem}")


def _size_problem(mask, mask_size, image, size):
    return (f"{mask}: {mask_size[0]}x{mask_size[1]} pixels, but {image} has {size[0]}x{size[1]}; a mask belongs to the "
            f"photograph's own pixels")


def _scan(pair):
    """What there is to know about a pair, in plain types, independent of all settings."""
    record = {"image": str(pair[0]), "mask": str(pair[1])}
    try:
        with opened(pair[0]) as image:
            record |= {"size": list(image.size), "orientation": image.getexif().get(ORIENTATION, 1)}
            if 0 in image.size:
                raise ValueError("not one pixel")
            image.draft(None, (1, 1))                       # JPEG: all bytes are read, an eighth of the pixels made
            to_rgb(image)
        with opened(pair[1], "mask") as mask:
            record |= {"mask_size": list(mask.size), "mode": mask.mode, "bytes": os.path.getsize(pair[0])}
            values = np.asarray(mask if mask.mode in MASK_MODES else [], np.uint8)
            counts = np.bincount(values.ravel(), minlength=256)
            record["digest"] = digest(values)
    except ValueError as error:
        return record | {"unreadable": str(error)}
    return record | {"histogram": {value: int(count) for value, count in enumerate(counts) if count}}


def _scan_all(pairs, cache_dir, workers):
    entry = None
    if cache_dir is not None:
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
                 for pair in pairs for path in map(Path, pair) if path.exists()]
        key = hashlib.sha256(json.dumps([SCAN_VERSION, len(pairs), stats]).encode()).hexdigest()
        entry = Path(cache_dir) / f"checked_{key[:32]}.json"
        remove_leftovers_once(cache_dir)
        records = _read_records(entry)
        if records is not None:
            return records
    with ThreadPoolExecutor(max(1, workers)) as pool:       # Pillow decodes without Python's lock
        records = list(progress(pool.map(_scan, pairs), "checking images", len(pairs)))
    if entry is not None and not any("unreadable" in record for record in records):
        entry.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(records)
        with replacing(entry, text=True) as file:
            file.write(f"{_text_digest(text)}\n{text}")
    return records


def _read_records(entry):
    """The records of an earlier check, None where they are absent or damaged: read again, and written over."""
    try:
        checksum, _, text = entry.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    if checksum != _text_digest(text):
        return None
    return [{**record, "histogram": {int(value): count for value, count in record["histogram"].items()}}
            for record in json.loads(text)]


def _text_digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


# -- augmentation ------------------------------------------------------------------------------------------------------

def resized(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) times scale, rounded, at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def take_part(image: Image.Image, source: tuple[float, float], size: tuple[int, int], part: tuple[int, int, int, int],
              resample: Image.Resampling) -> Image.Image:
    """The part (left, top, width, height) of an image resized to `size`, without making the rest of it.

    source is (width, height) of the image, not rounded where it was decoded smaller than it is. An image and its mask
    stay in step whatever the sizes are, because each is sampled from the very same box.
    """
    left, top, width, height = part
    x, y = source[0] / size[0], source[1] / size[1]
    box = (left * x, top * y, min((left + width) * x, source[0]), min((top + height) * y, source[1]))
    return image.resize((width, height), resample, box)


def read_part(path: str | Path, size: tuple[int, int],
              part: tuple[int, int, int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """A part, as in take_part, of a photograph resized to `size` bilinearly with antialiasing, and the photograph's own
    (width, height). A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still no smaller than `size`."""
    with opened(path) as image:
        original = source = image.size
        reduced = image.draft(None, size)
        if reduced is not None:
            source = reduced[1][2:]                         # exactly a half ...; the decoded size is rounded up
        image = to_rgb(image)
    return take_part(image, source, size, part, Image.Resampling.BILINEAR), original


def color_matrix(settings: Augmentation, rng: np.random.Generator, mean_luma: float = 0.0) -> tuple[float, ...]:
    """(12,) rows of a random affine change of RGB in 0..255, for Image.convert.

    "ssd": the four distortions of SSD (Liu et al. 2016), each in half of the crops: brightness is added. "factors":
    ColorJitter of torchvision, all four in every crop: brightness is a factor, contrast stretches around mean_luma, the
    mean of the crop's luma. Deviates from both: saturation and hue act on the chroma plane of YIQ instead of HSV
    (torchvision's saturation does as well), nothing is clipped between the steps, and their order is the one named
    here; torchvision shuffles it, SSD chooses the place of contrast, which makes no difference without clipping. Ten
    times faster.
    """
    ssd = settings.color == "ssd"
    on = rng.random(4) < 0.5 if ssd else np.full(4, True)
    contrasts, saturations = factor_range(settings.contrast), factor_range(settings.saturation)
    drawn = rng.uniform([-settings.brightness, contrasts[0], saturations[0], -settings.hue],
                        [settings.brightness, contrasts[1], saturations[1], settings.hue])
    brightness, contrast, saturation, hue = np.where(on, drawn, (0, 1, 1, 0))
    cosine, sine = saturation * math.cos(2 * math.pi * hue), saturation * math.sin(2 * math.pi * hue)
    chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    linear = contrast * np.linalg.inv(YIQ) @ chroma @ YIQ
    if ssd:
        return _rows(linear, contrast * brightness * 255)
    return _rows((1 + brightness) * linear, (1 - contrast) * (1 + brightness) * mean_luma)


def _rows(linear, added):
    return tuple(np.column_stack([linear, np.full(3, added)]).ravel().tolist())


def dominated(mask: Image.Image, table: np.ndarray, cat_max_ratio: float) -> bool:
    """Whether one class has cat_max_ratio or more of the labelled pixels, or there are none."""
    counts = np.array(mask.histogram())[table >= 0]
    return counts.max() >= cat_max_ratio * counts.sum() if cat_max_ratio < 1 else not counts.any()


# -- data set ----------------------------------------------------------------------------------------------------------

class SegmentationDataset(Dataset):
    """Photographs with their label maps.

    image_size: (height S, width T) of crops and windows, or one number for both. views: "crops": one random crop S x T
    of every photograph, see Augmentation; "windows": the photograph as small as it still covers S x T, cut into
    windows S x T, neighbours side by side and the last one moved back inside, so that every pixel is in an item and
    nothing is random; "whole": photograph and label map as they are, for scoring.
    Item: image (3, H, W) uint8 RGB, label (H, W) int64, index: the item's number. Where a crop is larger than the
    image, PADDING and IGNORE_INDEX fill it at the right and bottom. Images are resized bilinearly with antialiasing,
    masks to the nearest pixel, both from the very same box. table (256,): labels of the file values, for label_table's.
    Randomness depends on (seed, epoch, item) alone. files and pairs are those given; checked: what check_pairs found of
    them. ValueError for wrong settings, and for wrong files as they are met (see check_pairs).
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], image_size: int | tuple[int, int], num_classes: int,
                 augmentation: Augmentation | None = None, ignore_label: int = 255, reduce_zero_label: bool = False,
                 seed: int = 0, views: str = "crops", table: np.ndarray | None = None,
                 checked: PairSummary | None = None) -> None:
        check_choice("views", views, ("crops", "windows", "whole"))
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)       # (S, T)
        if len(self.size) != 2:
            raise ValueError(f"image_size={image_size}: expected a number of pixels, or height and width")
        check_range("image_size", min(self.size), 1)
        if (views == "crops") != (augmentation is not None):
            raise ValueError(f"views={views} {'needs an' if views == 'crops' else 'never change: leave out the'} "
                             f"augmentation")
        self.pairs = [(Path(image), Path(mask)) for image, mask in pairs]
        self.files = [image for image, _ in self.pairs]
        self.image_size = image_size
        self.seed = seed
        self.views = views
        self.checked = checked
        self.epoch = 0
        self.augmentation = augmentation and augmentation.check()
        if augmentation is not None and augmentation.padding >= min(self.size):
            raise ValueError(f"augmentation.padding={augmentation.padding}: a crop of image_size={image_size} might "
                             f"show nothing else; choose less")
        self.table = _checked_table(table, num_classes, ignore_label, reduce_zero_label)
        self._windows = list(self._find_windows()) if views == "windows" else None

    def fingerprint(self) -> dict:
        """Names and sizes of the photographs and digests of the masks, see utils.fingerprint, as check_pairs found
        them."""
        return self.checked.fingerprint

    def _find_windows(self):
        """(photograph, size it is resized to, part of it: left, top, width, height) of every window."""
        height, width = self.size
        for index, path in enumerate(self.files):
            with opened(path) as image:
                size = resized(image.size, max(width / image.size[0], height / image.size[1]))
            for top in window_starts(size[1], height, height):
                yield from ((index, size, (left, top, width, height))
                            for left in window_starts(size[0], width, width))

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch; fixed views ignore it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs if self._windows is None else self._windows)

    def __getitem__(self, item: int) -> dict:
        index = item if self._windows is None else self._windows[item][0]
        image_path, mask_path = self.pairs[index]
        mask = open_mask(mask_path)
        corner = (0, 0)
        changes = self.augmentation
        size = mask.size
        part = (0, 0, *size)
        if self.views == "windows":
            _, size, part = self._windows[item]
        elif self.views == "crops":
            rng = np.random.default_rng(derived_seed(self.seed, self.epoch, item))
            size, part, corner = self._random_part(mask, rng)
        label = to_label(take_part(mask, mask.size, size, part, Image.Resampling.NEAREST), self.table, mask_path)
        image, source = read_part(image_path, size, part)
        if source != mask.size:
            raise ValueError(_size_problem(mask_path, mask.size, image_path, source))
        if changes is not None:
            flip = rng.random() < changes.flip
            luma = np.asarray(image.convert("L")).mean() if changes.color == "factors" else 0.0
            image = image.convert("RGB", color_matrix(changes, rng, luma))
            mirrored = rng.random() < changes.vertical_flip, flip                            # rows, columns
        image = np.asarray(image).transpose(2, 0, 1)                                         # (3, h, w)
        if changes is not None:
            image, label = self._padded(image, label, corner, mirrored)                      # (3, S, T), (S, T)
        return {"image": torch.from_numpy(np.ascontiguousarray(image)),
                "label": torch.from_numpy(np.ascontiguousarray(label)), "index": item}

    def _random_part(self, mask, rng):
        """The size the photograph is resized to, the part of that to show, and its (top, left) in the crop."""
        height, width = self.size
        settings = self.augmentation
        low, high = settings.scale_range
        factor = (low + settings.scale_step * rng.integers(round((high - low) / settings.scale_step) + 1)
                  if settings.scale_step else rng.uniform(low, high))
        if not settings.crop:
            scale = min(width * min(factor, 1.0) / mask.size[0], height * min(factor, 1.0) / mask.size[1])
        elif settings.scale_of == "photo":
            scale = factor
        else:
            rows, columns = settings.cover or self.size
            scale = max(columns * factor / mask.size[0], rows * factor / mask.size[1])
        size = resized(mask.size, scale)
        around = settings.padding
        for _ in range(CROP_TRIES):
            # of the crop in the image, negative where it starts in the padding
            start = [int(rng.integers(max(0, length + 2 * around - shown) + 1)) - around
                     for length, shown in zip(size, (width, height), strict=True)]
            left, top = (max(0, place) for place in start)
            part = (left, top, min(start[0] + width, size[0]) - left, min(start[1] + height, size[1]) - top)
            shown = take_part(mask, mask.size, size, part, Image.Resampling.NEAREST)
            if not dominated(shown, self.table, settings.cat_max_ratio):
                break
        return size, part, (top - start[1], left - start[0])

    def _padded(self, image, label, corner, mirrored):
        """(3, h, w), (h, w) -> (3, S, T), (S, T), the first pixel at corner, (top, left), turned over where mirrored,
        (rows, columns), says so."""
        axes = [axis for axis in (0, 1) if mirrored[axis]]
        image, label = np.flip(image, [axis + 1 for axis in axes]), np.flip(label, axes)
        if label.shape == self.size:
            return image, label
        if self.augmentation.padding:                       # without it the filling stays at the right and bottom
            corner = [size - start - length if turned else start for size, start, length, turned
                      in zip(self.size, corner, label.shape, mirrored, strict=True)]
        rows, columns = (slice(start, start + length) for start, length in zip(corner, label.shape, strict=True))
        whole = np.empty((3, *self.size), np.uint8)
        whole[:] = np.array(PADDING, np.uint8)[:, None, None]
        whole[:, rows, columns] = image
        labels = np.full(self.size, IGNORE_INDEX, np.int64)
        labels[rows, columns] = label
        return whole, labels
