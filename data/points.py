"""Labelled point clouds as batches of voxels: reading, checking, data sets for training and validation, precise test.

One cloud goes this way:
    read_cloud (points in file order) -> missing normals estimated, missing colours zero: `PointDataset.cloud`
    training:   augment, one random point a voxel, crop -> collate_points with Mix3D
    validation: one fixed point a voxel; `inverse` maps voxels back to raw points, `raw_label` is what counts
    test:       13 views x fragments, probabilities added up for every raw point: `PreciseTest`
A batch: coord (N, 3) float32, grid_coord (N, 3) int32, feat (N, C) float32, label (N,) int64 and offset (S,) int64, the
ends of the scenes. S scenes, N voxels, R raw points.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.mesh_io import parse_npy, ply_columns
from data.point_transforms import (
    MAX_GRID_INDEX,
    NORMAL_NEIGHBORS,
    SHAPE_CHANNELS,
    VIEWS,
    Cloud,
    PointAugmentation,
    apply_view,
    center_shift,
    estimate_normals,
    fragments,
    height_over_plane,
    local_shape,
    mix_offsets,
    representatives,
    stack_features,
    take,
    training_sample,
    voxelize,
)
from utils.array_file import load_checked, save_checked
from utils.checks import check_choice, check_names, did_you_mean, nearest
from utils.files import remove_leftovers_once, replacing
from utils.fingerprint import digest, fingerprint
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.seed import derived_seed

CLOUD_SUFFIXES = (".npz", ".npy", ".ply")
POINTS_IN_MEMORY = 30_000_000               # about 1.2 GB; clouds beyond this are read again for every item
FAR = 10_000                                # metres; float64 coordinates beyond this are moved before rounding
BOMB_SIZE, BOMB_RATIO = 1 << 30, 100        # more than a GiB out of less than a hundredth of it is no cloud
LARGEST = 1e15                              # float32 still squares it, int64 still counts its voxels
WIDEST = 500.0                              # metres; a wider cloud is probably in millimetres or centimetres
FIELDS = {"coord": ("coord", "coords", "xyz", "points", "pos"), "color": ("color", "colors", "rgb"),
          "normal": ("normal", "normals"), "label": ("segment", "label", "labels", "class", "semantic")}
COLUMNS = {"coord": ("x", "y", "z"), "color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
PLAIN_COLUMNS = {3: (), 4: ("label",), 6: ("color",), 7: ("color", "label"), 9: ("color", "normal"),
                 10: ("color", "normal", "label")}      # of a .npy matrix, after x y z


FEATURES = ("coord", "color", "normal", "height", "shape")   # the last two are computed from the coordinates


@dataclass(frozen=True)
class PointSpec:
    """How clouds become voxels: the same in training and prediction, from the config in the checkpoint.

    Raises ValueError for unknown features or choices and for sizes that are not above 0.
    """

    grid_size: float = 0.02                             # metres, after `unit`
    unit: float = 1.0                                   # metres of one length unit of the files; 3 makes a cloud larger
    features: tuple[str, ...] = ("coord", "color", "normal")
    missing_normal: str = "estimate"                    # estimate | zeros | error
    missing_color: str = "zeros"                        # zeros | error
    test_grid_size: float | None = None                 # S3DIS: 0.01, one point a voxel of this size before the test
    scale: float | str = 1.0                            # what metres are multiplied by before voxels are made: Utonia
                                                        # 0.5 indoors, 0.2 outdoors, "object": each cloud to radius 1
    center: bool = True                                 # false, outdoors: the sensor stays at 0
    shape_sizes: tuple[float, ...] = (0.02, 0.04, 0.08)  # of the feature "shape": metres after unit, before scale

    def __post_init__(self) -> None:
        for name in self.features:
            check_choice("data.features", name, FEATURES)
        if not self.features or len(set(self.features)) < len(self.features):
            raise ValueError(f"data.features={list(self.features)}: expected one feature or more, each named once")
        check_choice("data.missing_normal", self.missing_normal, ("estimate", "zeros", "error"))
        check_choice("data.missing_color", self.missing_color, ("zeros", "error"))
        for name in ("grid_size", "unit", "test_grid_size"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"data.{name}={value}: expected a number above 0")
        if self.scale != "object" and (isinstance(self.scale, bool | str) or not 0 < self.scale < float("inf")):
            raise ValueError(f"data.scale={self.scale}: expected a number above 0, or object")
        if not self.shape_sizes or not all(size > 0 for size in self.shape_sizes):
            raise ValueError(f"data.shape_sizes={list(self.shape_sizes)}: expected lengths above 0")

    @property
    def num_channels(self) -> int:
        """Columns of `feat`: 3 each for coord, color and normal, 1 for height, 4 a size for shape."""
        width = {"height": 1, "shape": SHAPE_CHANNELS * len(self.shape_sizes)}
        return sum(width.get(name, 3) for name in self.features)


# -- reading -----------------------------------------------------------------------------------------------------------

class PointCloud(NamedTuple):
    """A cloud as its file has it, points in file order: coord (N, 3) float32; color (N, 3) uint8 or float32 in 0..255,
    normal (N, 3) float32 and label (N,) int64 (raw values), each None where the file has none; warnings."""

    coord: np.ndarray
    color: np.ndarray | None
    normal: np.ndarray | None
    label: np.ndarray | None
    warnings: tuple[str, ...] = ()
    height: np.ndarray | None = None        # (N, 1) and (N, 4 S) float32, from `complete` where they are features
    shape: np.ndarray | None = None


def read_cloud(path: str | Path, label_field: str | None = None) -> PointCloud:
    """Read a cloud: a folder of .npy files (Pointcept's layout), .npz with the same names, .npy (a matrix x y z [r g b]
    [nx ny nz] [label], or a structured array) or .ply (vertex properties).

    label_field: the name of the labels, e.g. "segment200"; an absent one means no labels. None: the first of segment,
    label, labels, class, semantic, else segment20. Colours that never exceed 1 are taken as 0..1 and multiplied by 255,
    and map coordinates (beyond 10 km) are moved near 0, or in float32 left, all with a warning. FileNotFoundError, and
    ValueError for an unknown suffix, a damaged file, no point, wrong shapes, NaN or infinite coordinates, colours
    outside 0..255 and labels that are not whole numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such cloud; check the path")
    if not path.is_dir() and path.suffix.lower() not in CLOUD_SUFFIXES:
        raise ValueError(f"{path}: '{path.suffix}' is not a suffix known here, use {' '.join(CLOUD_SUFFIXES)} or a "
                         f"folder with coord.npy")
    try:
        raw = _read_fields(path, label_field)
    except (ValueError, KeyError, IndexError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if str(error).startswith(f"{path}: "):              # told already, by the reader of PLY files
            raise
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}); is it cut short or damaged?"
                         ) from error
    coord = raw.get("coord")
    if coord is None or coord.ndim != 2 or coord.shape[1] != 3 or not len(coord) or coord.dtype.kind not in "fiu":
        got = "none" if coord is None else f"{coord.dtype} {coord.shape}"
        raise ValueError(f"{path}: expected numeric coordinates (N, 3) of at least one point under one of the names "
                         f"{', '.join(FIELDS['coord'])}; got {got}")
    for name in ("color", "normal", "label"):
        value = raw.get(name)
        if value is None:
            continue
        raw[name] = value = value.reshape(-1) if name == "label" else value
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} of type {value.dtype}; numbers are expected")
        if value.shape != ((len(coord),) if name == "label" else (len(coord), 3)):
            raise ValueError(f"{path}: {name} of shape {value.shape} for {len(coord)} points; one row a point, in the "
                             f"order of the coordinates")
    with np.errstate(over="ignore"):                                       # in float16, where LARGEST is infinity
        finite = ((coord > -LARGEST) & (coord < LARGEST)).all(1)
    if not finite.all():
        raise ValueError(f"{path}: {(~finite).sum()} of {len(coord)} points have a NaN or infinite coordinate, or one "
                         f"beyond {LARGEST:g}, the first is point {finite.argmin()}; remove them")
    warnings: list[str] = []
    if (farthest := np.abs(coord).max()) > FAR:                            # float32 rounds these to centimetres
        if coord.dtype == np.float32:
            warnings.append(f"{path}: float32 coordinates up to {farthest:.0f} are rounded to "
                            f"{np.spacing(farthest):g}; export them in float64, or with an offset")
        else:
            origin = np.floor(coord.min(0))
            warnings.append(f"{path}: coordinates up to {farthest:.0f}; moved by {(-origin).tolist()}")
            coord = coord - origin
    coord = coord.astype(np.float32)
    color = _as_color(raw.get("color"), path, warnings)
    normal, label = raw.get("normal"), raw.get("label")
    return PointCloud(coord, color, None if normal is None else _as_unit(normal),
                      None if label is None else _as_integers(label, path), tuple(warnings))


def _read_fields(path, label_field):
    """{"coord": ..., "color": ..., "normal": ..., "label": ...} as far as the file has them."""
    if path.is_dir():
        return _named({file.stem: file for file in path.glob("*.npy")}, _read_npy, label_field)
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_size > path.stat().st_size for entry in file.infolist()):
                raise ValueError("an entry that is larger than the file")      # zipfile would take the memory for it
            packed, unpacked = (sum(getattr(info, name) for info in file.infolist())
                                for name in ("compress_size", "file_size"))
            if unpacked > max(BOMB_SIZE, BOMB_RATIO * packed):
                raise ValueError(f"{unpacked:,} bytes of arrays in {packed:,} bytes of file")
            return _named({name.removesuffix(".npy"): name for name in file.namelist()},
                          lambda name: parse_npy(file.read(name)), label_field)
    if path.suffix.lower() == ".ply":
        return _from_columns(read_ply_vertices(path), label_field)
    array = _read_npy(path)
    if array.dtype.names:
        return _from_columns({name: array[name] for name in array.dtype.names}, label_field)
    if array.ndim != 2 or array.shape[1] not in PLAIN_COLUMNS:
        raise ValueError(f"a matrix of shape {array.shape}; columns are x y z [r g b] [nx ny nz] [label]")
    raw = {"coord": array[:, :3]}
    begin = 3
    for name in PLAIN_COLUMNS[array.shape[1]]:
        width = 1 if name == "label" else 3
        raw[name], begin = array[:, begin:begin + width], begin + width
    return raw


def _read_npy(path):
    return parse_npy(np.memmap(path, np.uint8, "r"))


def _label_names(label_field):
    return (label_field,) if label_field else (*FIELDS["label"], "segment20")


def _named(keys, read, label_field):
    names = {**FIELDS, "label": _label_names(label_field)}
    found = {field: next((name for name in names[field] if name in keys), None) for field in names}
    return {field: read(keys[name]) for field, name in found.items() if name is not None}


def _from_columns(columns, label_field):
    raw = {name: np.stack([columns[column] for column in triple], 1) for name, triple in COLUMNS.items()
           if all(column in columns for column in triple)}
    name = next((name for name in _label_names(label_field) if name in columns), None)
    return raw if name is None else {**raw, "label": columns[name]}


def read_ply_vertices(path: str | Path) -> dict[str, np.ndarray]:
    """The vertex properties of a PLY file (ASCII or binary), {name: (N,)}. ValueError where it is damaged or none."""
    columns = ply_columns(Path(path))[0].get("vertex")
    if columns is None:
        raise ValueError(f"{path}: cannot be read, a PLY file without vertices; is it damaged?")
    return {name: values for name, (values, lengths) in columns.items() if lengths is None}


def write_ply(path: str | Path, coord: np.ndarray, color: np.ndarray, label: np.ndarray | None = None) -> None:
    """A binary PLY cloud: coord (N, 3), color (N, 3) in 0..255, label (N,) written as int property `label`."""
    fields = [(axis, "<f4") for axis in COLUMNS["coord"]] + [(name, "u1") for name in COLUMNS["color"]]
    rows = np.empty(len(coord), fields + ([] if label is None else [("label", "<i4")]))
    for axis, name in enumerate(COLUMNS["coord"]):
        rows[name] = coord[:, axis]
    for channel, name in enumerate(COLUMNS["color"]):
        rows[name] = np.clip(color[:, channel], 0, 255)
    if label is not None:
        rows["label"] = label
    types = {"<f4": "float", "|u1": "uchar", "<i4": "int"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(coord)}",
             *(f"property {types[rows.dtype[name].str]} {name}" for name in rows.dtype.names), "end_header\n"]
    Path(path).write_bytes("\n".join(lines).encode() + rows.tobytes())


def write_cloud(folder: str | Path, **arrays: np.ndarray) -> None:
    """One .npy file an array in `folder`, which appears only when it is complete; ValueError where it exists."""
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it to write it again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:                                   # Ctrl-C too: leave nothing half written
        shutil.rmtree(temporary)
        raise


def _as_color(color, path, warnings):
    if color is None or color.dtype == np.uint8:
        return color
    with np.errstate(over="ignore"):                        # told below
        color = color.astype(np.float32)
    if not (color.min() >= 0 and color.max() <= 255):       # NaN too
        raise ValueError(f"{path}: colours from {color.min():g} to {color.max():g}; expected 0..255 (or 0..1)")
    if 0 < color.max() <= 1:
        warnings.append(f"{path}: no colour above 1, taken as 0..1 instead of 0..255")
        color = color * np.float32(255)
    return color


def _as_unit(normal):
    """Unit normals, 0 for those that are 0, NaN or beyond all sizes."""
    with np.errstate(over="ignore"):
        normal = normal.astype(np.float32)
        length = np.linalg.norm(normal, axis=1, keepdims=True)
    usable = np.isfinite(length) & (length > 0)
    return np.where(usable, normal / np.where(usable, length, 1), np.float32(0))


def _as_integers(label, path):
    if label.dtype.kind == "f":
        wrong = ~((np.abs(label) < 2 ** 53) & (label == np.floor(label)))               # NaN too
        if wrong.any():
            raise ValueError(f"{path}: label {label[wrong.argmax()]} of point {wrong.argmax()} ({wrong.sum()} in all) "
                             f"is not a whole number")
    return label.astype(np.int64)


def to_labels(label: np.ndarray, num_classes: int, ignore_labels: Sequence[int], path: str | Path) -> np.ndarray:
    """Labels of a file as they are in memory: ignore_labels become IGNORE_INDEX. ValueError where another is outside
    0..num_classes - 1: it names the file, the value and the count."""
    label = np.where(np.isin(label, list(ignore_labels)), IGNORE_INDEX, label)
    wrong = label[(label != IGNORE_INDEX) & ((label < 0) | (label >= num_classes))]
    if len(wrong):
        values, counts = np.unique(wrong, return_counts=True)
        raise ValueError(f"{path}: label {values[0]} at {counts[0]} of {len(label)} points"
                         f"{f' (and {len(values) - 1} more such values)' if len(values) > 1 else ''}, expected 0.."
                         f"{num_classes - 1} or {', '.join(map(str, ignore_labels))} (ignored); set "
                         f"model.num_classes or data.ignore_labels")
    return label


# -- finding files -----------------------------------------------------------------------------------------------------

class ClassList(NamedTuple):
    """names; ignore_labels: values of files that mean nothing; palette (C, 3) uint8 or None."""

    names: list[str]
    ignore_labels: tuple[int, ...]
    palette: np.ndarray | None


def read_classes(path: str | Path) -> ClassList:
    """Read classes.json (or that file in the folder `path`): a list of names, or {"classes": names, "ignore_index": -1,
    "palette": [[r, g, b], ...]}. -1 is always ignored. ValueError for anything else."""
    path = Path(path)
    path = path / "classes.json" if path.is_dir() else path
    try:
        value = json.loads(path.read_text())
        value = {"classes": value} if isinstance(value, list) else value
        names, ignored, palette = value["classes"], value.get("ignore_index"), value.get("palette")
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("the class names must be texts, each once")
        if not isinstance(ignored, list):
            ignored = [] if ignored is None else [ignored]
        ignored = {-1, *map(int, ignored)}
        if palette is not None:
            palette = np.array(palette).reshape(len(names), 3)
            if palette.dtype.kind not in "iu" or palette.min() < 0 or palette.max() > 255:
                raise ValueError("the colours of the palette must be whole numbers from 0 to 255")
            palette = palette.astype(np.uint8)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path}: expected a list of class names or {{"classes": [...], "ignore_index": -1}}; '
                         f"{type(error).__name__}: {error}") from error
    check_names(f"{path}", names)
    return ClassList(list(names), tuple(sorted(ignored)), palette)


def is_cloud(path: Path) -> bool:
    """Whether path is a folder with coord.npy or a file with a known suffix; hidden ones are not."""
    if path.name.startswith("."):
        return False
    return (path / "coord.npy").is_file() if path.is_dir() else path.suffix.lower() in CLOUD_SUFFIXES


def list_clouds(folder: str | Path) -> list[Path]:
    """The clouds of a folder, or the folder itself where it is one (Pointcept's layout). FileNotFoundError, and
    ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = [folder] if is_cloud(folder) else sorted(path for path in folder.iterdir() if is_cloud(path))
    if not files:
        raise ValueError(f"{folder}: no clouds in this folder")
    return files


def find_clouds(root: str | Path, split: str | Sequence[str]) -> list[Path]:
    """Sorted clouds of a split of the data set in folder `root`. A split (or each of several: ["Area_1", "Area_2"]) is
    a folder of clouds under root (train, Area_5 ...), a key of root/splits.json {split: [names]}, or a .json file
    (under root or anywhere) that lists clouds by their path under root, suffixes optional. Raises FileNotFoundError
    where there is no root, ValueError where a split is unknown, empty or names a missing cloud.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; set data.root")
    listed = root / "splits.json"
    listed = _read_json(listed, dict, '{"train": [names], ...}') if listed.is_file() else {}
    found = []
    for name in [split] if isinstance(split, str) else split:
        file = next((file for file in (root / name, Path(name)) if name.endswith(".json") and file.is_file()), None)
        if file is not None:
            clouds = [_locate(root, entry, file) for entry in _read_json(file, list, "a list of clouds")]
        elif name in listed:
            clouds = [_locate(root, entry, root / "splits.json") for entry in listed[name]]
        elif (root / name).is_dir():
            clouds = [path for path in (root / name).iterdir() if is_cloud(path)]
        else:
            known = sorted({*listed, *(path.name for path in root.iterdir() if path.is_dir() and not is_cloud(path))})
            raise ValueError(f"{root}: no split {name!r}; there are {', '.join(known) or 'none'}"
                             f"{did_you_mean(nearest(name, known))}")
        if not clouds:
            raise ValueError(f"{root}: split {name!r} is empty; clouds are {' '.join(CLOUD_SUFFIXES)} files or folders "
                             f"with coord.npy")
        found += clouds
    return sorted(found)


def _read_json(path, kind, expected):
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {expected}, got a {type(value).__name__}")
    return value


def _locate(root, entry, source):
    for suffix in ("", *CLOUD_SUFFIXES):
        if is_cloud(path := root / f"{entry}{suffix}") and path.exists():
            return path
    raise ValueError(f"{source} names {entry}, but there is no such cloud under {root}")


# -- data sets ---------------------------------------------------------------------------------------------------------

def complete(cloud: PointCloud, spec: PointSpec, path: str | Path = "cloud",
             cache_dir: str | Path | None = None) -> tuple[PointCloud, tuple[str, ...]]:
    """Fill in missing colours and normals as the spec says, and height and shape where they are features (height in
    metres after unit); -> cloud, and what was missing, for a message.

    Estimated normals and shape, for which a length is a metre whatever the spec's scale, are kept in cache_dir. A cloud
    wider than 500 m gets a warning. ValueError for one of more voxels along an axis than can be, and where the spec
    says "error".
    """
    extent = np.ptp(cloud.coord, 0).max() * spec.unit
    wide = f"{path}: the cloud is {extent:.0f} m wide; is it in millimetres? Set data.unit=0.001"
    if spec.scale != "object" and extent * spec.scale > MAX_GRID_INDEX * spec.grid_size:
        raise ValueError(f"{wide}, or a larger data.grid_size: {MAX_GRID_INDEX + 1} voxels of {spec.grid_size:g} m fit "
                         f"along an axis")
    if extent > WIDEST:
        cloud = cloud._replace(warnings=(*cloud.warnings, wide))
    missing = [name for name in ("color", "normal") if name in spec.features and getattr(cloud, name) is None]
    for name in missing:
        way = spec.missing_color if name == "color" else spec.missing_normal
        if way == "error":
            raise ValueError(f"{path}: no {name}s; set data.missing_{name} or take {name} out of data.features")
        if way == "estimate":
            cloud = cloud._replace(normal=_cached_normals(cloud.coord * np.float32(spec.unit), cache_dir))
        else:
            cloud = cloud._replace(**{name: np.zeros_like(cloud.coord)})
    if "height" in spec.features:
        cloud = cloud._replace(height=height_over_plane(cloud.coord * np.float32(spec.unit)))
    if "shape" in spec.features:
        shape = partial(local_shape, sizes=spec.shape_sizes)
        settings = bytes([NORMAL_NEIGHBORS]) + np.float64(spec.shape_sizes).tobytes()
        width = SHAPE_CHANNELS * len(spec.shape_sizes)
        coord = cloud.coord * np.float32(spec.unit)
        cloud = cloud._replace(shape=_cached("shape", shape, coord, width, settings, cache_dir))
    return cloud, tuple(missing)


def _cached_normals(coord, cache_dir):
    return _cached("normals", estimate_normals, coord, 3, bytes([NORMAL_NEIGHBORS]), cache_dir)


def _cached(name, compute, coord, width, settings, cache_dir):
    """compute(coord), (N, width); kept in cache_dir (None: not at all) under a hash of coord and settings (bytes)."""
    if cache_dir is None:
        return compute(coord)
    key = hashlib.sha256(coord.tobytes() + settings).hexdigest()[:32]
    entry = Path(cache_dir) / f"{name}_{key}.npy"
    remove_leftovers_once(cache_dir)
    stored = load_checked(entry)
    if stored is not None and stored.shape == (len(coord), width):
        return np.array(stored)
    values = compute(coord)                                 # absent or damaged: computed, and written over
    entry.parent.mkdir(parents=True, exist_ok=True)
    with replacing(entry) as file:
        save_checked(file, values)
    return values


@dataclass
class PointDataset(Dataset):
    """Clouds with one label a point.

    files: clouds in a fixed order. num_classes None, or a cloud without labels: all IGNORE_INDEX. Item of a training
    set (augmentation given): a random sample of cloud item modulo len(files), with `mix_draw`, the batch's coin for
    Mix3D; an epoch visits every cloud `repeat` times. Item of an evaluation set: one point of every voxel (always the
    same), `inverse` (R,) int64 from raw points to voxels and `raw_label` (R,) int64.
    Randomness depends on (seed, epoch, item) alone: not on workers, batch size or what ran before.
    All clouds are read and checked at construction, so that wrong data is found before training; `messages` says what
    is doubtful. Raises ValueError where the labels are out of range or no point of the whole set is labelled.
    """

    files: Sequence[Path]
    spec: PointSpec
    num_classes: int | None = None
    augmentation: PointAugmentation | None = None
    label_field: str | None = None
    ignore_labels: Sequence[int] = (-1,)
    cache_dir: str | Path | None = None
    seed: int = 0
    repeat: int = 1
    description: str = "reading clouds"

    def __post_init__(self) -> None:
        self.epoch = 0
        self.files = [Path(file) for file in self.files]
        self.num_points: list[int] = []
        self.class_counts = np.zeros(self.num_classes or 0, np.int64)
        self._kept: dict[int, PointCloud] = {}
        self._digests: list[int] = []
        missing: dict[str, list[Path]] = {"color": [], "normal": [], "label": []}
        warnings: list[str] = []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = progress(pool.map(self._read, self.files), self.description, len(self.files))
            for index, (cloud, lacking) in enumerate(read):
                warnings += cloud.warnings
                self.num_points.append(len(cloud.coord))
                self._digests.append(digest(cloud.label))
                for name in lacking:
                    missing[name].append(self.files[index])
                if self.num_classes:
                    counts = np.bincount(cloud.label[cloud.label >= 0], minlength=self.num_classes)
                    self.class_counts += counts
                    if not counts.any():
                        missing["label"].append(self.files[index])
                if sum(self.num_points) <= POINTS_IN_MEMORY:
                    self._kept[index] = cloud
        self.messages = warnings[:5]
        if len(warnings) > 5:
            self.messages.append(f"... and {len(warnings) - 5} more such lines")
        self._report(missing)

    def _report(self, missing):
        worse = "; expect worse results from weights that always had them, such as sonata.pth"
        ways = {"color": "black" + worse, "label": "nothing to learn or to score",
                "normal": "estimated from neighbours" if self.spec.missing_normal == "estimate" else "zero" + worse}
        for name, files in missing.items():
            if files:
                self.messages.append(f"{len(files)} of {len(self.files)} clouds have no {name}s ({ways[name]}), the "
                                     f"first is {files[0]}")
        if self.num_classes and not self.class_counts.any():
            raise ValueError(f"no labelled point in {len(self.files)} clouds, the first is {self.files[0]}; expected a "
                             f"field named {' or '.join(_label_names(self.label_field))}")

    def _read(self, path):
        cloud = read_cloud(path, self.label_field)
        label = np.full(len(cloud.coord), IGNORE_INDEX, np.int64)
        if self.num_classes and cloud.label is not None:
            label = to_labels(cloud.label, self.num_classes, self.ignore_labels, path)
        return complete(cloud._replace(label=label), self.spec, path, self.cache_dir)

    def fingerprint(self) -> dict:
        """Names, numbers of points and digests of the labels of the files, see utils.fingerprint."""
        return fingerprint(self.files, self.num_points, self._digests)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch; evaluation sets ignore it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files) * self.repeat

    def cloud(self, index: int) -> Cloud:
        """coord, color and normal (as far as features), label of files[index]: all raw points, in metres x scale."""
        cloud = self._kept[index] if index in self._kept else self._read(self.files[index])[0]
        return to_cloud(cloud, self.spec)

    def __getitem__(self, item: int) -> dict:
        """coord, grid_coord, feat, label (see the module); inverse and raw_label or mix_draw."""
        index = item % len(self.files)
        cloud = self.cloud(index)
        if self.augmentation is None:
            return evaluation_sample(cloud, self.spec)
        rng = np.random.default_rng(derived_seed(self.seed, self.epoch, item))
        mix_draw = float(rng.random())
        try:
            sample = training_sample(cloud, self.spec.grid_size, self.augmentation, rng, self.spec.center)
        except ValueError as error:
            raise ValueError(f"{self.files[index]}: {error}") from None
        return {**to_tensors(sample, self.spec), "mix_draw": mix_draw}


def to_cloud(cloud: PointCloud, spec: PointSpec) -> Cloud:
    """The arrays that the features need, in float32, coordinates in metres x scale; label where the cloud has it.

    Scale "object": the centre of mass at 0 and the farthest point at distance 1 (a cloud on one spot stays there)."""
    arrays = {"coord": cloud.coord * np.float32(spec.unit)}
    factor = 1.0 if spec.scale == "object" else spec.scale
    if spec.scale == "object":
        around = arrays["coord"] - arrays["coord"].mean(0, dtype=np.float64).astype(np.float32)
        radius = np.sqrt((around * around).sum(1).max())
        arrays["coord"] = around / radius if radius > 0 else around
        factor = 1 / radius if radius > 0 else 1.0
    elif spec.scale != 1:
        arrays["coord"] = arrays["coord"] * np.float32(spec.scale)
    arrays |= {name: getattr(cloud, name).astype(np.float32) for name in FEATURES[1:] if name in spec.features}
    if "height" in arrays:
        arrays["height"] = arrays["height"] * np.float32(factor)
    return arrays if cloud.label is None else {**arrays, "label": cloud.label}


def to_tensors(cloud: Cloud, spec: PointSpec) -> dict[str, torch.Tensor]:
    """coord, grid_coord, feat and, where there are any, label of a voxelised cloud."""
    arrays = {name: cloud[name] for name in ("coord", "grid_coord", "label") if name in cloud}
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in
            {**arrays, "feat": stack_features(cloud, spec.features)}.items()}


def placed(cloud: Cloud, spec: PointSpec, z: bool) -> Cloud:
    """center_shift, or the cloud as it is where the spec says that clouds keep their place."""
    return center_shift(cloud, z) if spec.center else cloud


def evaluation_sample(cloud: Cloud, spec: PointSpec) -> dict[str, torch.Tensor]:
    """A raw cloud as voxels, always the same: coord, grid_coord, feat, label, inverse (R,) and raw_label (R,)."""
    cloud = placed(cloud, spec, z=True)
    voxels = voxelize(cloud["coord"], spec.grid_size)
    sample = take(cloud, representatives(voxels, np.random.default_rng(0)))
    sample = placed({**sample, "grid_coord": voxels.grid_coord}, spec, z=False)
    rest = {"inverse": voxels.inverse} | ({"raw_label": cloud["label"]} if "label" in cloud else {})
    return {**to_tensors(sample, spec), **{name: torch.from_numpy(values) for name, values in rest.items()}}


def collate_points(samples: Sequence[dict], mix_probability: float = 0.0) -> dict[str, torch.Tensor]:
    """Join the voxels of items into a batch with offset (S,) int64. With the given probability (the first item's
    mix_draw decides) neighbouring scenes become one, Mix3D: mix_offsets."""
    batch = {name: torch.cat([sample[name] for sample in samples]) for name in ("coord", "grid_coord", "feat", "label")
             if name in samples[0]}
    offset = torch.tensor([len(sample["coord"]) for sample in samples]).cumsum(0)
    mixed = samples[0].get("mix_draw", 1.0) < mix_probability
    return {**batch, "offset": mix_offsets(offset) if mixed else offset}


# -- the precise test --------------------------------------------------------------------------------------------------

class PreciseTest:
    """Votes of all views and fragments of one raw cloud (Pointcept's precise evaluation).

        test = PreciseTest(dataset.cloud(i), spec, num_classes)
        for batch in test:
            test.add(batch, model(batch))           # logits (V, num_classes)
        pred = test.prediction()                    # (R,) int64, raw points

    A batch is one fragment: coord, grid_coord, feat, offset, and index (V,), the points it is made of. Every point is
    in at least one fragment of every view. With spec.test_grid_size the cloud is first thinned to one point a voxel of
    that size, and the prediction mapped back.
    """

    def __init__(self, cloud: Cloud, spec: PointSpec, num_classes: int) -> None:
        self.spec = spec
        self.cloud = placed({name: values for name, values in cloud.items() if name != "label"}, spec, z=True)
        self.inverse = None
        if spec.test_grid_size is not None:
            voxels = voxelize(self.cloud["coord"], spec.test_grid_size)
            self.cloud = take(self.cloud, representatives(voxels, np.random.default_rng(0)))
            self.inverse = torch.from_numpy(voxels.inverse)
        self.votes = torch.zeros(len(self.cloud["coord"]), num_classes)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for view in VIEWS:
            seen = apply_view(self.cloud, view)
            voxels = voxelize(seen["coord"], self.spec.grid_size)
            for index in fragments(voxels):
                fragment = placed({**take(seen, index), "grid_coord": voxels.grid_coord}, self.spec, z=False)
                yield {**to_tensors(fragment, self.spec), "offset": torch.tensor([len(index)]),
                       "index": torch.from_numpy(index)}

    def add(self, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        """Add the class probabilities of a fragment to its points."""
        if self.votes.device != logits.device:
            self.votes = self.votes.to(logits.device)
        self.votes[batch["index"].to(logits.device)] += logits.float().softmax(1)   # no point twice in a fragment

    def prediction(self) -> torch.Tensor:
        """(R,) int64 on the CPU: the class with the largest sum of probabilities, for every raw point."""
        pred = self.votes.argmax(1).cpu()
        return pred if self.inverse is None else pred[self.inverse]
