"""Predictions on photographs as files and pictures: label maps in the masks' own numbers, overlays, feature colours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data.image_files import write_rows
from data.images import SegmentationDataset
from data.label_map import LabelMap
from data.masks import label_to_file
from data.photos import Photo, read_image, strips
from data.rasters import Georeference
from utils.files import Together
from utils.losses import IGNORE_INDEX
from utils.render import IGNORE_COLOR, pca_colors
from utils.scratch import release

REPORT_SIDE = 800                           # longest side of a report's picture


def write_labels(path: Path, label: np.ndarray, palette: np.ndarray, ignore_label: int = 255,
                 reduce_zero_label: bool = False, label_map: LabelMap | None = None,
                 georeference: Georeference | None = None) -> None:
    """A label map in the numbers of the masks, as the ending of path says: .png and .tif of 8 bits have the classes'
    colours as their palette; numbers of a label map above 255 make grey ones of 16 bits; .npy has any.

    label (H, W) integer with IGNORE_INDEX, palette (C, 3) uint8. What is no class is grey. ValueError for numbers that
    16 bits do not hold, where the format has no more.
    """
    def to_file(part):
        return label_to_file(part, ignore_label, reduce_zero_label, label_map)
    height, width = label.shape
    unlabelled = label.dtype.kind == "i" and (label < 0).any()          # whose number may need more bits
    kind = to_file(np.full((1, 1), IGNORE_INDEX) if unlabelled else label[:0]).dtype
    if kind == np.int32 and path.suffix != ".npy":
        raise ValueError(f"the label map has numbers below 0 or above 65535, which a {path.suffix[1:].upper()} cannot "
                         f"hold; use --labels npy")
    rows = (to_file(label[top:bottom]) for top, bottom in strips(width, height))
    colors = file_palette(palette, ignore_label, reduce_zero_label, label_map) if kind == np.uint8 else None
    write_rows(path, released(rows, label), (width, height), kind, palette=colors, georeference=georeference)


def file_palette(palette: np.ndarray, ignore_label: int = 255, reduce_zero_label: bool = False,
                 label_map: LabelMap | None = None) -> np.ndarray:
    """(256, 3) uint8: the colour of every number of the masks; grey for those of no class."""
    colors = np.tile(np.array(IGNORE_COLOR, np.uint8), (256, 1))
    if label_map is not None:
        colors[label_map.class_values()] = palette
    else:
        first = int(reduce_zero_label)
        colors[first:first + len(palette)] = palette[:256 - first]
        colors[[ignore_label, *[0] * first]] = IGNORE_COLOR
    return colors


def palette_by_number(palette: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(largest number + 1, 3) uint8: colours by the number of each class in the files, where that is not its place."""
    colors = np.zeros((max(numbers) + 1, 3), np.uint8)
    colors[numbers] = palette
    return colors


def released(rows: Iterable[np.ndarray], *arrays: np.ndarray) -> Iterator[np.ndarray]:
    """The same strips; the arrays that they are made of do not stay in memory."""
    for strip in rows:
        release(*arrays)
        yield strip


def overlay_table(palette: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """(C + 1, 3, 256) uint8: what a value of each channel becomes under each class; the last row is for no class."""
    values = np.arange(256)
    mixed = (1 - alpha) * values + alpha * palette.astype(np.float64)[:, :, None]               # (C, 3, 256)
    return np.concatenate([mixed.round().astype(np.uint8), np.broadcast_to(values.astype(np.uint8), (1, 3, 256))])


def overlay_rows(photo: np.ndarray, label: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Rows of an overlay, see there, by an overlay_table: photo (R, W, 3) uint8, label (R, W) -> (R, W, 3) uint8."""
    label = label.astype(np.intp)
    place = np.where((label >= 0) & (label < len(table) - 1), label, len(table) - 1)
    return np.stack([table[place, channel, photo[..., channel]] for channel in range(3)], -1)


def overlay(image: Image.Image, label: np.ndarray, palette: np.ndarray, alpha: float = 0.55) -> Image.Image:
    """Class colours over a photograph, alpha of the colour; pixels without a class show the photograph.

    label (H, W) integer of the photograph's size, palette (C, 3) uint8.
    """
    photo = np.asarray(image.convert("RGB"))
    check_same_size(image.size, label)
    table = overlay_table(palette, alpha)
    return Image.fromarray(np.concatenate([overlay_rows(photo[top:bottom], label[top:bottom], table)
                                           for top, bottom in strips(*image.size)]))


def check_same_size(size: tuple[int, int], label: np.ndarray) -> None:
    if tuple(size[::-1]) != label.shape:
        raise ValueError(f"overlay of a label map {label.shape} on a photograph {size[::-1]}: sizes differ")


def write_overlay(path: Path, photo: Photo, label_rows: Callable[[int, int], np.ndarray], palette: np.ndarray) -> None:
    """An overlay as a .png or .tif, strip by strip; label_rows(top, bottom) gives the labels (R, W) of rows."""
    table = overlay_table(palette)
    rows = (overlay_rows(photo.shown(top, bottom), label_rows(top, bottom), table)
            for top, bottom in strips(*photo.size))
    write_rows(path, rows, photo.size, bands=3, georeference=photo.georeference)


def enlarged_rows(cells: np.ndarray, size: tuple[int, int]) -> Callable[[int, int], np.ndarray]:
    """Rows top..bottom-1 of cells (h, w) enlarged to size (W, H), each pixel from the cell that it lies in."""
    places = [((np.arange(length) + 0.5) * count / length).astype(np.intp)
              for length, count in zip(size[::-1], cells.shape, strict=True)]
    return lambda top, bottom: cells[places[0][top:bottom, None], places[1]]


def write_confidence(path: Path, confidence: np.ndarray, georeference: Georeference | None = None) -> None:
    """Probabilities (H, W) float32: .npy as they are, .png and .tif in 16 bits, of which 65535 is 1."""
    height, width = confidence.shape
    parts = (confidence[top:bottom] for top, bottom in strips(width, height))
    if path.suffix == ".npy":
        write_rows(path, released(parts, confidence), (width, height), np.float32)
        return
    rows = (np.floor(part * 65535 + 0.5).astype(np.uint16) for part in parts)
    write_rows(path, released(rows, confidence), (width, height), np.uint16, georeference=georeference)


def feature_picture(features: np.ndarray, size: tuple[int, int],
                    cells: tuple[float, float] | None = None) -> Image.Image:
    """Features (E, h, w) as colours, see utils.render.pca_colors, enlarged to size (width, height).

    cells: how many columns and rows of them show the photograph, which was padded at the right and bottom; None: all.
    """
    channels, height, width = features.shape
    colors = pca_colors(features.reshape(channels, -1).T).reshape(height, width, 3)
    box = (0, 0, *((width, height) if cells is None else cells))
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST, box)


def chosen_format(asked: str, georeference: Georeference | None) -> str:
    """auto, the default, is tif for a photograph with a georeference, else png."""
    return asked if asked != "auto" else "png" if georeference is None else "tif"


def write_image_result(stem: Path, prediction: Mapping, palette: np.ndarray, labels: str = "png", picture: str = "png",
                       ignore_label: int = 255, reduce_zero_label: bool = False, features: np.ndarray | None = None,
                       cells: tuple[float, float] | None = None, label_map: LabelMap | None = None,
                       confidence: bool = False, winner: tuple[np.ndarray, np.ndarray] | None = None) -> list[Path]:
    """Write STEM.png or .tif (with a palette) or STEM.npy, in the numbers of the masks; STEM_overlay.png or .tif unless
    picture is "none"; STEM_confidence.png (or .tif) and .npy with `confidence`, STEM_pca.png where features (E, h, w)
    are given; with a picture and a `winner`, (prototype of each cell (h, w), colours (P, 3) uint8), STEM_prototypes in
    its format. Returns the paths. The labels come into the folder last: where they are, everything is.

    prediction: label (H, W) integer, photo, a data.photos.Photo of that size, confidence (H, W) float32.
    """
    label, photo = prediction["label"], prediction["photo"]
    labels, picture = (chosen_format(asked, photo.georeference) for asked in (labels, picture))
    place = photo.georeference if labels == "tif" else None
    with Together(stem) as files:
        write_labels(files.new(f".{labels}"), label, palette, ignore_label, reduce_zero_label, label_map, place)
        if picture != "none":
            check_same_size(photo.size, label)
            write_overlay(files.new(f"_overlay.{picture}"), photo, lambda top, bottom: label[top:bottom], palette)
            release(label)
            if winner is not None:
                nearest, colors = winner
                write_overlay(files.new(f"_prototypes.{picture}"), photo, enlarged_rows(nearest, photo.size), colors)
        if features is not None:
            feature_picture(features, photo.size, cells).save(files.new("_pca.png"))
        if confidence:
            ending = f"_confidence.{'tif' if labels == 'tif' else 'png'}"
            write_confidence(files.new(ending), prediction["confidence"], place)
            write_confidence(files.new("_confidence.npy"), prediction["confidence"])
    return files.paths


def example_pair(dataset: SegmentationDataset, index: int, pred: np.ndarray,
                 palette: np.ndarray) -> tuple[Image.Image | None, Image.Image]:
    """Two pictures for a report: the truth (None without a labelled pixel) and the prediction over photograph `index`
    of a data set of whole photographs, at most REPORT_SIDE long. pred (H, W) integer."""
    label, photo = dataset[index]["label"].numpy(), read_image(dataset.files[index], photos=dataset.photos)
    pictures = []
    for values in (label, pred):
        picture = overlay(photo, values.astype(np.int64), palette)
        picture.thumbnail((REPORT_SIDE, REPORT_SIDE))
        pictures.append(picture)
    return (pictures[0] if (label != IGNORE_INDEX).any() else None), pictures[1]
