"""Photographs with one class id a pixel: checking, augmenting. data/image_pairs.py finds and pairs the files,
data/photos.py and data/masks.py read them.

In memory labels are int64 with IGNORE_INDEX; files keep their own numbers.
Shapes: H, W of the photograph, S, T height and width of a training crop, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data.image_pairs import find_files as find_files
from data.image_pairs import list_images as list_images
from data.image_pairs import pair_files as pair_files
from data.masks import MaskReader, examine_mask, to_label
from data.masks import label_table as label_table
from data.masks import label_to_file as label_to_file
from data.masks import open_mask as open_mask
from data.photo_values import examine, examine_raster, set_doubts
from data.photos import (
    AS_STORED,
    ORIENTATION,
    Photo,
    PhotoFormat,
    Picture,
    check_pixels,
    check_raster,
    open_photo,
    opened,
    picture_of,
    pixels_of,
    raster_part,
    to_bands,
)
from data.photos import read_image as read_image
from data.photos import to_rgb as to_rgb
from data.rasters import library, opened_raster
from utils.checks import check_choice, check_range
from utils.files import remove_leftovers_once, replacing
from utils.fingerprint import fingerprint
from utils.image_inference import window_starts
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.seed import derived_seed

PADDING = (124, 116, 104)                   # ImageNet's mean colour: about 0 once normalised
WINDOWED = 1 << 22                          # pixels of a raster of which parts are read as parts
LARGE = 1 << 25                             # pixels of a photograph that is scored without being an item
CROP_TRIES = 10                             # for one that no class dominates (MMSegmentation's number)
SCAN_VERSION = 4                            # raise it when _scan records something else
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
    pixels, ignored: unlabelled pixels, doubts: warnings of what may be read wrongly, fingerprint: of the files, see
    utils.fingerprint."""

    sizes: np.ndarray
    class_counts: np.ndarray
    ignored: int
    doubts: list[str]
    fingerprint: dict


# -- checking ----------------------------------------------------------------------------------------------------------

def check_pairs(pairs: Sequence[tuple[Path, Path]], num_classes: int, ignore_label: int = 255,
                reduce_zero_label: bool = False, cache_dir: str | Path | None = None, workers: int = 4,
                table: np.ndarray | None = None, masks: MaskReader | None = None,
                photos: PhotoFormat = AS_STORED) -> PairSummary:
    """Read every file once, before training, and count the classes. What was read is kept in cache_dir and holds as
    long as paths, sizes and times of the files do. masks: how masks are read, in place of a table (256,) of the labels
    of file values or of label_table's; what the set as a whole decides is written into it.

    Raises ValueError, one line with the first file and how many others are like it, for files that cannot be read,
    masks that hold no class ids or are not of the photograph's size, photographs with an EXIF orientation (their pixels
    and the mask may or may not be turned alike), ids out of range, palettes that disagree, photographs whose numbers
    have no known range (see data/photos.py), and where not one pixel is labelled.
    """
    masks = masks or MaskReader(num_classes, ignore_label, reduce_zero_label, table)
    records = scan_pairs(pairs, cache_dir, workers, photos.max_pixels)
    found = list(filter(None, pair_problems(records, masks, photos)))
    if found:
        others = sum(kind == found[0][0] for kind, _ in found[1:])
        more = f" (and {others} more {'file' if others == 1 else 'files'})" if others else ""
        raise ValueError(found[0][1] + more)
    masks.check_palettes(records)
    doubts = [*set_doubts(records, photos), *masks.doubts(records)]
    class_counts, ignored = masks.count(records, num_classes)
    if not class_counts.any():
        raise ValueError(f"{pairs[0][1] if pairs else 'no files'}: not one pixel of {len(pairs)} masks is labelled; "
                         f"check ignore_label and reduce_zero_label")
    sizes = np.array([record["size"][::-1] for record in records], np.int64)
    bytes_and_labels = ([record[name] for record in records] for name in ("bytes", "digest"))
    return PairSummary(sizes, class_counts, ignored, doubts,
                       fingerprint((record["image"] for record in records), *bytes_and_labels))


def pair_problems(records: Sequence[dict], masks: MaskReader, photos: PhotoFormat) -> list[tuple[str, str] | None]:
    """(kind, text) of the first thing that is wrong with each record of scan_pairs, None if nothing is."""
    return [_problem(record, wrong, photos) for record, wrong in zip(records, masks.check_set(records), strict=True)]


def _problem(record, wrong_mask, photos):
    """(kind, text) of the first thing that is wrong with a pair, None if nothing is."""
    if "unreadable" in record:
        return "unreadable", record["unreadable"]
    image, mask, size, mask_size = (record[name] for name in ("image", "mask", "size", "mask_size"))
    try:
        check_pixels(size, photos.max_pixels)               # a record in the cache may be of another limit
    except ValueError as error:
        return "unreadable", f"{image}: {error}"
    if wrong_mask and wrong_mask[0] != "range":
        return wrong_mask[0], f"{mask}: {wrong_mask[1]}"
    if record["orientation"] not in (0, 1):
        return "orientation", (f"{image}: EXIF orientation {record['orientation']}, so that its mask may not lie on "
                               f"its pixels; store it upright (PIL.ImageOps.exif_transpose), or without the tag if the "
                               f"mask was drawn on it as it is")
    if size != mask_size:
        return "size", _size_problem(mask, mask_size, image, size)
    if photos.bands is not None and max(photos.bands) > record["bands"]:
        return "bands", (f"{image}: this image has {record['bands']} band{'s' * (record['bands'] > 1)}, and bands: "
                         f"{list(photos.bands)} names others")
    return wrong_mask and ("range", f"{mask}: {wrong_mask[1]}")


def _size_problem(mask, mask_size, image, size):
    return (f"{mask}: {mask_size[0]}x{mask_size[1]} pixels, but {image} has {size[0]}x{size[1]}; a mask belongs to the "
            f"photograph's own pixels")


def _scan(pair, max_pixels=None):
    """What there is to know about a pair, in plain types, independent of all settings but the largest size."""
    record = {"image": str(pair[0]), "mask": str(pair[1]), "histogram": {}}
    try:
        record |= {**_scan_photo(pair[0], max_pixels), "bytes": os.path.getsize(pair[0])}
        return record | examine_mask(pair[1], max_pixels)
    except ValueError as error:
        return record | {"unreadable": str(error)}


def _scan_photo(path, max_pixels):
    with opened_raster(path) as raster:
        if raster is not None:
            check_raster(raster, path, PhotoFormat((0, 1), None, max_pixels))           # its range is another question
            return {"size": list(raster.size), "orientation": 1, **examine_raster(raster)}
    with opened(path, max_pixels=max_pixels) as image:
        size, orientation = list(image.size), image.getexif().get(ORIENTATION, 1)
        if 0 in size:
            raise ValueError("not one pixel")
        image.draft(None, (1, 1))                           # JPEG: all bytes are read, an eighth of the pixels made
        return {"size": size, "orientation": orientation, **examine(image)}


def _with_numbers(record):
    """JSON has text for keys."""
    numbers = {name: {int(value): count for value, count in record[name].items()}
               for name in ("histogram", "colors", "palette") if name in record}
    return {**record, **numbers}


def scan_pairs(pairs: Sequence[tuple[Path, Path]], cache_dir: str | Path | None = None, workers: int = 4,
               max_pixels: float | None = None) -> list[dict]:
    """What there is to know about each pair whatever the settings are, kept in cache_dir: paths, size, and what
    data.photo_values.examine and data.masks.examine_mask say; `unreadable`: why a file of it cannot be read."""
    entry = None
    if cache_dir is not None:
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns)
                 for pair in pairs for path in map(Path, pair) if path.exists()]
        key = hashlib.sha256(json.dumps([SCAN_VERSION, library() is not None, len(pairs), stats]).encode()).hexdigest()
        entry = Path(cache_dir) / f"checked_{key[:32]}.json"
        remove_leftovers_once(cache_dir)
        records = _read_records(entry)
        if records is not None:
            return records
    with ThreadPoolExecutor(max(1, workers)) as pool:       # Pillow decodes without Python's lock
        records = list(progress(pool.map(partial(_scan, max_pixels=max_pixels), pairs), "checking images", len(pairs)))
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
    return [_with_numbers(record) for record in json.loads(text)]


def _text_digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


# -- augmentation ------------------------------------------------------------------------------------------------------

def resized(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(width, height) times scale, rounded, at least one pixel."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def take_part(image: Picture, source: tuple[float, float], size: tuple[int, int], part: tuple[int, int, int, int],
              resample: Image.Resampling) -> Picture:
    """The part (left, top, width, height) of an image resized to `size`, without making the rest of it.

    source is (width, height) of the image, not rounded where it was decoded smaller than it is. An image and its mask
    stay in step whatever the sizes are, because each is sampled from the very same box.
    """
    left, top, width, height = part
    x, y = source[0] / size[0], source[1] / size[1]
    box = (left * x, top * y, min((left + width) * x, source[0]), min((top + height) * y, source[1]))
    return image.resize((width, height), resample, box)


def read_part(path: str | Path, size: tuple[int, int], part: tuple[int, int, int, int],
              photos: PhotoFormat = AS_STORED) -> tuple[Picture, tuple[int, int]]:
    """A part, as in take_part, of a photograph resized to `size` bilinearly with antialiasing, and the photograph's own
    (width, height). A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still no smaller than `size`."""
    with opened_raster(path) as raster:
        if raster is not None:
            check_raster(raster, path, photos)
            return _part_of_raster(raster, size, part, photos), raster.size
    with opened(path, max_pixels=photos.max_pixels) as image:
        original = source = image.size
        reduced = image.draft(None, size)
        if reduced is not None:
            source = reduced[1][2:]                         # exactly a half ...; the decoded size is rounded up
        image = to_bands(image, photos)
    return take_part(image, source, size, part, Image.Resampling.BILINEAR), original


def _part_of_raster(raster, size, part, photos):
    """read_part of a raster; of one of more than WINDOWED pixels only what the filter of the part sees is read."""
    left, top, width, height = part
    if raster.size[0] * raster.size[1] <= WINDOWED:         # Pillow's filter rounds by a hair otherwise elsewhere
        whole = picture_of(raster_part(raster, photos, (0, 0, *raster.size)))
        return take_part(whole, raster.size, size, part, Image.Resampling.BILINEAR)
    box, inside = [], []
    for start, length, whole, wanted in zip((left, top), (width, height), raster.size, size, strict=True):
        scale = whole / wanted
        reach = math.ceil(max(scale, 1)) + 1
        ends = start * scale, min((start + length) * scale, whole)
        outer = max(0, math.floor(ends[0]) - reach), min(whole, math.ceil(ends[1]) + reach)
        box.append(outer)
        inside.append((ends[0] - outer[0], ends[1] - outer[0]))
    pixels = raster_part(raster, photos, (box[0][0], box[1][0], box[0][1], box[1][1]))
    return picture_of(pixels).resize((width, height), Image.Resampling.BILINEAR,
                                     (inside[0][0], inside[1][0], inside[0][1], inside[1][1]))


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


def changed_colors(image: Picture, settings: Augmentation, rng: np.random.Generator) -> Picture:
    """An image with a color_matrix drawn for it. Of other than three bands all get its first factor and its addend,
    which brightness and contrast alone make."""
    if isinstance(image, Image.Image):
        luma = np.asarray(image.convert("L")).mean() if settings.color == "factors" else 0.0
        return image.convert("RGB", color_matrix(settings, rng, luma))
    pixels = pixels_of(image)
    factor, _, _, added = color_matrix(settings, rng, pixels.mean() if settings.color == "factors" else 0.0)[:4]
    return picture_of((pixels * factor + added + 0.5).clip(0, 255).astype(np.uint8))


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
    Item: image (K, H, W) uint8, RGB or the bands that `photos` names, label (H, W) int64, index: the item's number.
    Where a crop is larger than the image, PADDING and IGNORE_INDEX fill it at the right and bottom. Images are resized
    bilinearly with antialiasing, masks to the nearest pixel, both from the very same box. masks: how masks are read
    (check_pairs decides what it can only tell from the whole set), in place of a table (256,) of the labels of file
    values, or of label_table's; photos: how photographs are; checked: what check_pairs found of the pairs, whose doubts
    are `notes`. Randomness depends on (seed, epoch, item) alone. files and pairs are those given; ValueError for wrong
    settings, and for wrong files as they are met (see check_pairs).
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], image_size: int | tuple[int, int], num_classes: int,
                 augmentation: Augmentation | None = None, ignore_label: int = 255, reduce_zero_label: bool = False,
                 seed: int = 0, views: str = "crops", table: np.ndarray | None = None, masks: MaskReader | None = None,
                 photos: PhotoFormat = AS_STORED, checked: PairSummary | None = None) -> None:
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
        self.notes = [] if checked is None else checked.doubts
        self.epoch = 0
        self.augmentation = augmentation and augmentation.check()
        if augmentation is not None and augmentation.padding >= min(self.size):
            raise ValueError(f"augmentation.padding={augmentation.padding}: a crop of image_size={image_size} might "
                             f"show nothing else; choose less")
        self.masks = masks or MaskReader(num_classes, ignore_label, reduce_zero_label, table)
        self.table = self.masks.table
        self.photos = photos
        self._windows = list(self._find_windows()) if views == "windows" else None

    def fingerprint(self) -> dict:
        """Names and sizes of the photographs and digests of the masks, see utils.fingerprint, as check_pairs found
        them."""
        return self.checked.fingerprint

    def _find_windows(self):
        """(photograph, size it is resized to, part of it: left, top, width, height) of every window."""
        height, width = self.size
        for index, path in enumerate(self.files):
            with opened_raster(path) as raster, nullcontext() if raster is not None else opened(
                    path, max_pixels=self.photos.max_pixels) as image:
                full = (raster or image).size
                size = resized(full, max(width / full[0], height / full[1]))
            for top in window_starts(size[1], height, height):
                yield from ((index, size, (left, top, width, height))
                            for left in window_starts(size[0], width, width))

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch; fixed views ignore it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs if self._windows is None else self._windows)

    def is_large(self, index: int) -> bool:
        """Whether photograph `index` of "whole" views has more than LARGE pixels; then open_whole is for it."""
        return self.views == "whole" and self.checked is not None and int(np.prod(self.checked.sizes[index])) > LARGE

    def open_whole(self, index: int) -> tuple[Photo, Callable[[int, int], np.ndarray]]:
        """A photograph, and a function of its labels in rows top..bottom-1, (R, W) int64: neither is in memory as
        tensors. ValueError as for an item."""
        image_path, mask_path = self.pairs[index]
        photo = open_photo(image_path, photos=self.photos)
        mask = self.masks.open(mask_path)
        if photo.size != mask.size:
            raise ValueError(_size_problem(mask_path, mask.size, image_path, photo.size))

        def labels(top, bottom):
            return to_label(mask.crop((0, top, mask.width, bottom)), self.table, mask_path)
        return photo, labels

    def __getitem__(self, item: int) -> dict:
        index = item if self._windows is None else self._windows[item][0]
        image_path, mask_path = self.pairs[index]
        mask = self.masks.open(mask_path)
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
        image, source = read_part(image_path, size, part, self.photos)
        if source != mask.size:
            raise ValueError(_size_problem(mask_path, mask.size, image_path, source))
        if changes is not None:
            flip = rng.random() < changes.flip
            image = changed_colors(image, changes, rng)
            mirrored = rng.random() < changes.vertical_flip, flip                            # rows, columns
        image = pixels_of(image).transpose(2, 0, 1)                                          # (K, h, w)
        if changes is not None:
            image, label = self._padded(image, label, corner, mirrored)                      # (K, S, T), (S, T)
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
        """(K, h, w), (h, w) -> (K, S, T), (S, T), the first pixel at corner, (top, left), turned over where mirrored,
        (rows, columns), says so."""
        axes = [axis for axis in (0, 1) if mirrored[axis]]
        image, label = np.flip(image, [axis + 1 for axis in axes]), np.flip(label, axes)
        if label.shape == self.size:
            return image, label
        if self.augmentation.padding:                       # without it the filling stays at the right and bottom
            corner = [size - start - length if turned else start for size, start, length, turned
                      in zip(self.size, corner, label.shape, mirrored, strict=True)]
        rows, columns = (slice(start, start + length) for start, length in zip(corner, label.shape, strict=True))
        whole = np.empty((len(image), *self.size), np.uint8)
        whole[:] = np.resize(np.array(PADDING, np.uint8), len(image))[:, None, None]
        whole[:, rows, columns] = image
        labels = np.full(self.size, IGNORE_INDEX, np.int64)
        labels[rows, columns] = label
        return whole, labels
