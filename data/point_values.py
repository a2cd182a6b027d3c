"""What the numbers in a file of points mean: colours of any range, normals of any length, labels of any numbering."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path

import numpy as np

from data.label_map import LabelMap, label_map_of
from utils.losses import IGNORE_INDEX

NAN_LABEL = int(np.iinfo(np.int64).min)     # NaN among the labels of a file, once they are integers
NOISE = 0.002                               # share of the range by which rounding (float16: 0.001) may leave it
MOST_ZERO = 0.01                            # share of the normals that may be zero or NaN without a word
DOUBTFUL = 2                                # floating-point colours below this are not those of a scan in 0..255


def as_color(color: np.ndarray | None, path: str | Path, warnings: list[str],
             color_range: Sequence[float] | None = None) -> np.ndarray | None:
    """Colours (N, 3) of a file in 0..255: uint8 as they are, others as float32.

    color_range (lowest, highest): what becomes 0 and 255. None: 0..1 where no value reaches 2 (floating point) or
    exceeds 1, else 0..255; a line in `warnings` where that can be wrong. What rounding has moved outside is cut.
    ValueError for other colours outside the range.
    """
    if color is None or (color.dtype == np.uint8 and color_range is None):
        return color
    kind = color.dtype
    with np.errstate(over="ignore"):                        # infinite: refused below
        color = color.astype(np.float32)
    lowest, highest = float(color.min()), float(color.max())
    low, high = color_range or (0, 255)
    most = high + NOISE * (high - low)
    if color_range is None and kind.kind == "f" and 1 + NOISE < highest < DOUBTFUL:
        warnings.append(f"{path}: colours up to {highest:g}, taken as 0..1 and cut at 1; set data.color_range=1, or "
                        f"255")
        high, most = 1, DOUBTFUL
    elif color_range is None and 0 < highest <= (1 + NOISE if kind.kind == "f" else 1):
        warnings.append(f"{path}: no colour above 1, taken as 0..1 instead of 0..255")
        high, most = 1, 1 + NOISE
    elif color_range is None and kind.kind == "u" and highest <= 255:
        warnings.append(f"{path}: {8 * kind.itemsize}-bit colours up to {highest:g}, taken as 0..255; set "
                        f"data.color_range=255, or 65535 where the scan is dark")
    if not (lowest >= low - NOISE * (high - low) and highest <= most):      # NaN too
        expected = "0..255 (or 0..1)" if color_range is None else f"{low:g}..{high:g}, as data.color_range says"
        other = ("; another range: data.color_range=[lowest, highest]; other columns than colours: data.columns"
                 if color_range is None else "")
        raise ValueError(f"{path}: colours from {lowest:g} to {highest:g}; expected {expected}{other}")
    return ((color - np.float32(low)) * np.float32(255 / (high - low))).clip(0, 255)


def as_unit(normal: np.ndarray, path: str | Path, warnings: list[str]) -> np.ndarray | None:
    """Unit normals (N, 3) float32, 0 for those that are 0, NaN or beyond all sizes; None where all are. A line in
    `warnings` where most have another length than 1, or some have none."""
    with np.errstate(over="ignore"):
        normal = normal.astype(np.float32)
        length = np.linalg.norm(normal, axis=1, keepdims=True)
    usable = np.isfinite(length) & (length > 0)
    if not usable.any():
        return None
    if (missing := len(usable) - usable.sum()) > MOST_ZERO * len(usable):
        warnings.append(f"{path}: {missing} of {len(usable)} normals are zero or NaN; without the field all are "
                        f"estimated")
    if (np.abs(length[usable] - 1) > 0.1).mean() > 0.5:
        warnings.append(f"{path}: normals of length {length[usable].min():.2g} to {length[usable].max():.2g}, scaled "
                        f"to 1; are these columns something else?")
    return np.where(usable, normal / np.where(usable, length, 1), np.float32(0))


def as_integers(label: np.ndarray, path: str | Path) -> np.ndarray:
    """Labels (N,) of a file as int64, NaN as NAN_LABEL. ValueError for fractions and numbers beyond all sizes."""
    if label.dtype.kind == "f":
        missing = np.isnan(label)
        wrong = ~((np.abs(label) < np.float64(2 ** 53)) & (label == np.floor(label)) | missing)
        if wrong.any():
            raise ValueError(f"{path}: label {label[wrong.argmax()]} of point {wrong.argmax()} ({wrong.sum()} in all) "
                             f"is not a whole number")
        return np.where(missing, NAN_LABEL, np.where(missing, 0, label).astype(np.int64))
    return label.astype(np.int64)


def to_labels(label: np.ndarray, num_classes: int, ignore_labels: Sequence[int | str], path: str | Path,
              offset: int = 0, label_map: LabelMap | None = None) -> np.ndarray:
    """Labels of a file (of as_integers) as they are in memory: ignore_labels, in which "nan" is NaN, become
    IGNORE_INDEX, the others are looked up in label_map or moved by offset. ValueError where another is outside
    0..num_classes - 1 or not in the map: it names the file, the value and the count."""
    ignored = [NAN_LABEL if value == "nan" else value for value in ignore_labels]
    if NAN_LABEL not in ignored and (count := (label == NAN_LABEL).sum()):
        raise ValueError(f"{path}: label nan at {count} of {len(label)} points; if it means unlabelled, set "
                         f"data.ignore_labels=[{', '.join(map(str, (*ignore_labels, 'nan')))}]")
    if label_map is not None:
        return label_map.ignoring(ignored).to_labels(label, path)
    label = np.where(np.isin(label, ignored), IGNORE_INDEX, label + offset)
    wrong = label[(label != IGNORE_INDEX) & ((label < 0) | (label >= num_classes))]
    if len(wrong):
        values, counts = np.unique(wrong, return_counts=True)
        more = f" (and {len(values) - 1} more such values)" if len(values) > 1 else ""
        count_from_1 = not offset and values[-1] == num_classes and not (label == 0).any()
        raise ValueError(f"{path}: label {values[0] - offset} at {counts[0]} of {len(label)} points{more}, expected "
                         f"{-offset}..{num_classes - 1 - offset} or {', '.join(map(str, ignore_labels))} (ignored); "
                         f"set model.num_classes or data.ignore_labels, or data.label_map"
                         f"{'. Do the files count from 1? Then data.label_offset=-1' if count_from_1 else ''}")
    return label


def check_label_settings(data: MutableMapping, num_classes: int) -> None:
    """Check ignore_labels, label_map and label_offset of a section of the settings. A label map is replaced by its
    text, so that a checkpoint needs no file. Raises ValueError."""
    for value in data["ignore_labels"]:
        if isinstance(value, str) and value != "nan":
            raise ValueError(f"data.ignore_labels: {value!r}; expected integers, and nan where NaN means unlabelled")
    label_map = label_map_of(data)
    if label_map is None:
        return
    if data.get("label_offset"):
        raise ValueError("data.label_offset and data.label_map both say which class a number is; leave one out")
    if label_map.num_classes != num_classes:
        raise ValueError(f"data.label_map has {label_map.num_classes} classes and model.num_classes={num_classes}; set "
                         f"one to the other")
    data["label_map"] = label_map.text()


def file_labels(label: np.ndarray, data: MutableMapping) -> np.ndarray:
    """Predicted classes in the numbers of the label files: label_map and label_offset of the settings undone."""
    label_map = label_map_of(data)
    return label - (data.get("label_offset") or 0) if label_map is None else label_map.to_values(label)
