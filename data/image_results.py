"""Predictions on photographs as files and pictures: label maps in the masks' own numbers, overlays, feature colours."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import SegmentationDataset
from data.label_map import LabelMap
from data.masks import label_to_file
from data.photos import read_image
from utils.losses import IGNORE_INDEX
from utils.render import IGNORE_COLOR, label_colors, pca_colors

REPORT_SIDE = 800                           # longest side of a report's picture


def write_label_png(path: str | Path, label: np.ndarray, palette: np.ndarray, ignore_label: int = 255,
                    reduce_zero_label: bool = False, label_map: LabelMap | None = None) -> None:
    """An 8-bit palette PNG: its indices are the numbers of the masks, its colours those of the classes. Numbers of a
    label map above 255 make a grey PNG of 16 bits.

    label (H, W) integer with IGNORE_INDEX, palette (C, 3) uint8. What is no class is grey. ValueError for numbers that
    16 bits do not hold.
    """
    values = label_to_file(label, ignore_label, reduce_zero_label, label_map)
    if values.dtype == np.int32:
        raise ValueError("the label map has numbers below 0 or above 65535, which a PNG cannot hold; use --labels npy")
    image = Image.fromarray(values)
    if values.dtype == np.uint16:
        image.save(path, "PNG")
        return
    colors = np.tile(np.array(IGNORE_COLOR, np.uint8), (256, 1))
    if label_map is not None:
        colors[label_map.class_values()] = palette
    else:
        first = int(reduce_zero_label)
        colors[first:first + len(palette)] = palette[:256 - first]
        colors[[ignore_label, *[0] * first]] = IGNORE_COLOR
    image.putpalette(colors.tobytes())                      # turns the mode L into P
    image.save(path, "PNG")


def overlay(image: Image.Image, label: np.ndarray, palette: np.ndarray, alpha: float = 0.55) -> Image.Image:
    """Class colours over a photograph, alpha of the colour; pixels without a class show the photograph.

    label (H, W) integer of the photograph's size, palette (C, 3) uint8.
    """
    photo = np.asarray(image.convert("RGB"))
    if photo.shape[:2] != label.shape:
        raise ValueError(f"overlay of a label map {label.shape} on a photograph {photo.shape[:2]}: sizes differ")
    mixed = (1 - alpha) * photo + alpha * label_colors(label, palette)                           # (H, W, 3)
    known = (label >= 0) & (label < len(palette))
    return Image.fromarray(np.where(known[..., None], mixed.round().astype(np.uint8), photo))


def feature_picture(features: np.ndarray, size: tuple[int, int], patch_size: int | None = None) -> Image.Image:
    """Features (E, h, w) as colours, see utils.render.pca_colors, enlarged to size (width, height).

    patch_size: pixels of a cell, where the photograph was padded at the right and bottom; None: the cells cover it.
    """
    channels, height, width = features.shape
    colors = pca_colors(features.reshape(channels, -1).T).reshape(height, width, 3)
    box = (0, 0, width, height) if patch_size is None else (0, 0, size[0] / patch_size, size[1] / patch_size)
    return Image.fromarray(colors).resize(size, Image.Resampling.NEAREST, box)


def write_image_result(stem: Path, prediction: Mapping, palette: np.ndarray, labels: str = "png", picture: str = "png",
                       ignore_label: int = 255, reduce_zero_label: bool = False, features: np.ndarray | None = None,
                       patch_size: int | None = None, label_map: LabelMap | None = None) -> list[Path]:
    """Write STEM.png (palette) or STEM.npy (uint8, or more where the label map needs it), both in the numbers of the
    masks, STEM_overlay.png unless picture is "none", and STEM_pca.png where features (E, h, w) are given. Returns the
    paths.

    prediction: label (H, W) integer and photo, a Pillow image of that size.
    """
    with tempfile.TemporaryDirectory(prefix=".writing_", dir=stem.parent) as folder:             # whole files, or none
        written = [Path(folder, f"{stem.name}.{labels}")]                        # not with_suffix: names may have dots
        if labels == "npy":
            np.save(written[0], label_to_file(prediction["label"], ignore_label, reduce_zero_label, label_map))
        else:
            write_label_png(written[0], prediction["label"], palette, ignore_label, reduce_zero_label, label_map)
        pictures = {}
        if picture != "none":
            pictures["overlay"] = overlay(prediction["photo"], prediction["label"], palette)
        if features is not None:
            pictures["pca"] = feature_picture(features, prediction["photo"].size, patch_size)
        for ending, image in pictures.items():
            written.append(Path(folder, f"{stem.name}_{ending}.png"))
            image.save(written[-1])
        return [path.replace(stem.parent / path.name) for path in written]


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
