"""Files of labelled point clouds: reading and checking them, writing them, and finding those of a split."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from data.columns import parse_npy, plain_text, ply_columns
from data.point_formats import INTENSITY, READERS, by_plain_name, matrix_columns, plain_name
from data.point_values import as_color, as_integers, as_unit
from utils.checks import check_names, did_you_mean, nearest

CLOUD_SUFFIXES = (".npz", ".npy", ".ply", *READERS)
UNSURE_SUFFIXES = (".txt", ".csv")          # which may hold something else
LABELS_OF_SCANNET = ".labels.ply"           # of NAME.ply in NAME.labels.ply
FAR = 10_000                                # metres; float64 coordinates beyond this are moved before rounding
BOMB_SIZE, BOMB_RATIO = 1 << 30, 100        # more than a GiB out of less than a hundredth of it is no cloud
BLOCK = 1 << 22                             # points that are looked at, or written, at a time
LARGEST = 1e15                              # float32 still squares it, int64 still counts its voxels
FIELDS = {"coord": ("coord", "coords", "xyz", "points", "pos"), "normal": ("normal", "normals"),
          "color": ("color", "colors", "colour", "colours", "rgb"),
          "label": ("segment", "label", "labels", "class", "semantic", "classification")}
COLUMNS = {"coord": ("x", "y", "z"), "color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
OTHER_COLUMNS = {"color": (("diffuse_red", "diffuse_green", "diffuse_blue"), ("rf", "gf", "bf")),
                 "normal": (("normal_x", "normal_y", "normal_z"), ("normalx", "normaly", "normalz"))}


# -- reading -----------------------------------------------------------------------------------------------------------

class PointCloud(NamedTuple):
    """A cloud as its file has it, points in file order: coord (N, 3) float32; color (N, 3) uint8 or float32 in 0..255,
    normal (N, 3) float32 and label (N,) int64 (raw values), each None where the file has none; warnings; exact (N, 3):
    the file's own coordinates where float32, or a move towards 0, has changed them, else None. From `complete`: height
    (N, 1) and shape (N, 4 S) float32, where they are features, and normal_view, how estimated normals were turned."""

    coord: np.ndarray
    color: np.ndarray | None
    normal: np.ndarray | None
    label: np.ndarray | None
    warnings: tuple[str, ...] = ()
    exact: np.ndarray | None = None
    height: np.ndarray | None = None
    shape: np.ndarray | None = None
    normal_view: str | tuple[float, ...] | None = None
    extra: Mapping[str, np.ndarray] = MappingProxyType({})      # (N,) numbers of other fields that were asked for


def read_cloud(path: str | Path, label_field: str | None = None, labels: bool = True,
               color_range: Sequence[float] | None = None, columns: Sequence[str] = (),
               fields: Sequence[str] = ()) -> PointCloud:
    """Read a cloud: a folder of .npy files (Pointcept's layout), .npz with the same names, .npy (a matrix x y z [r g b]
    [nx ny nz] [label], or a structured array), .ply (vertex properties), or a format of data/point_formats.py.

    label_field: the name of the labels, e.g. "segment200"; an absent one means no labels. None: the first of segment,
    label, labels, class, semantic, classification, else segment20. labels False: whatever they are, they are not read.
    color_range: as in as_color; 16 bits in LAS files. columns: names of the columns of files that do not name them, for
    matrices, text and .bin. fields: more fields to read, such as intensity. Map coordinates (beyond 10 km) are moved
    near 0, or in float32 left, with a warning. FileNotFoundError, and ValueError for an unknown suffix, a damaged file,
    no point, wrong shapes, NaN or infinite coordinates, colours outside their range, labels that are not whole numbers
    and an absent field.
    """
    path = Path(path)
    warnings: list[str] = []
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such cloud; check the path")
    if not path.is_dir() and path.suffix.lower() not in CLOUD_SUFFIXES:
        raise ValueError(f"{path}: '{path.suffix}' is not a suffix known here, use {' '.join(CLOUD_SUFFIXES)} or a "
                         f"folder with coord.npy")
    try:
        raw = _read_fields(path, label_names(label_field) if labels else (), columns, fields, warnings)
    except (ValueError, KeyError, IndexError, OSError, EOFError, RuntimeError, OverflowError, zipfile.BadZipFile,
            zlib.error) as error:
        if str(error).startswith(f"{path}: "):              # told already, by the reader of PLY files
            raise
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}); is it cut short or damaged?"
                         ) from error
    coord = raw.get("coord")
    if coord is None or coord.ndim != 2 or coord.shape[1] != 3 or not len(coord) or coord.dtype.kind not in "fiu":
        got = "none" if coord is None else f"{coord.dtype} {coord.shape}"
        raise ValueError(f"{path}: expected numeric coordinates (N, 3) of at least one point under one of the names "
                         f"{', '.join(FIELDS['coord'])}; got {got}")
    for name, value in raw.items():
        wide = name in ("coord", "color", "normal")
        raw[name] = value = value if wide else value.reshape(-1)
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{path}: {name} of type {value.dtype}; numbers are expected")
        if value.shape != ((len(coord), 3) if wide else (len(coord),)):
            raise ValueError(f"{path}: {name} of shape {value.shape} for {len(coord)} points; one row a point, in the "
                             f"order of the coordinates")
    coord, exact = _near_zero(coord, path, warnings)
    color, normal, label = (raw.pop(name, None) for name in ("color", "normal", "label"))
    if color is not None and color_range is None and path.suffix.lower() in (".las", ".laz") and color.max() > 255:
        color = (color // 257).astype(np.uint8)             # 16 bits, as the format says
    color = as_color(color, path, warnings, color_range)
    normal = None if normal is None else as_unit(normal, path, warnings)
    return PointCloud(coord, color, normal, None if label is None else as_integers(label, path), tuple(warnings),
                      exact=exact, extra={name: _finite(raw[name], name, path) for name in fields})


def _near_zero(coord, path, warnings):
    """(coordinates in float32, map coordinates moved near 0; what the file has where that is another number, or None).
    In blocks: of a hundred million points each array takes gigabytes. ValueError for those that are not finite."""
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, len(coord), BLOCK)]
    for rows in blocks:
        with np.errstate(over="ignore"):                                       # in float16, where LARGEST is infinity
            finite = ((coord[rows] > -LARGEST) & (coord[rows] < LARGEST)).all(1)
        if not finite.all():
            count = sum(int((~(np.abs(coord[rows].astype(np.float64)) < LARGEST).all(1)).sum()) for rows in blocks)
            raise ValueError(f"{path}: {count} of {len(coord)} points have a NaN or infinite coordinate, or one beyond "
                             f"{LARGEST:g}, the first is point {rows.start + finite.argmin()}; remove them")
    origin = None
    farthest = max(float(coord.max()), -float(coord.min()))
    if farthest > FAR and coord.dtype == np.float32:                       # rounded to centimetres
        step = np.spacing(np.float32(farthest))
        warnings.append(f"{path}: float32 coordinates up to {farthest:.0f} are rounded to {step:g}; export them in "
                        f"float64, or with an offset")
    elif farthest > FAR:
        origin = np.floor(coord.min(0).astype(np.float64))
        warnings.append(f"{path}: coordinates up to {farthest:.0f}; moved by {(-origin).tolist()}")
    near = np.empty(coord.shape, np.float32)
    for rows in blocks:
        near[rows] = coord[rows] if origin is None else coord[rows] - origin
    same = all(np.array_equal(near[rows], coord[rows]) for rows in blocks)
    return near, None if same else coord


def _finite(values, name, path):
    if not (finite := np.isfinite(values)).all():
        raise ValueError(f"{path}: {name} of point {finite.argmin()} ({(~finite).sum()} in all) is NaN or infinite")
    return values


def _read_fields(path, labels, columns, fields, warnings):
    """{"coord": ..., "color": ..., "normal": ..., "label": ...} as far as the file has them, and all of `fields`;
    labels: the names under which labels may be."""
    if path.is_dir():
        return _named({file.stem: file for file in path.glob("*.npy")}, _read_npy, labels, fields, path, warnings)
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_size > path.stat().st_size for entry in file.infolist()):
                raise ValueError("an entry that is larger than the file")      # zipfile would take the memory for it
            packed, unpacked = (sum(getattr(info, name) for info in file.infolist())
                                for name in ("compress_size", "file_size"))
            if unpacked > max(BOMB_SIZE, BOMB_RATIO * packed):
                raise ValueError(f"{unpacked:,} bytes of arrays in {packed:,} bytes of file")
            return _named({name.removesuffix(".npy"): name for name in file.namelist()},
                          lambda name: parse_npy(file.read(name)), labels, fields, path, warnings)
    if path.suffix.lower() == ".ply":
        return _from_columns(read_ply_vertices(path), labels, fields, path, warnings)
    if path.suffix.lower() in READERS:
        asked = {*fields, *(INTENSITY if {*fields} & {*INTENSITY} else ())}
        needed = {*sum((*COLUMNS.values(), *sum(OTHER_COLUMNS.values(), ())), ()), *map(plain_name, (*labels, *asked))}
        found = READERS[path.suffix.lower()](path, columns, needed.__contains__, warnings)
        return _from_columns(found, labels, fields, path, warnings)
    array = _read_npy(path)
    if array.dtype.names:
        return _from_columns({name: array[name] for name in array.dtype.names}, labels, fields, path,
                             warnings)
    return _from_columns(matrix_columns(array, columns, warnings, path), labels, fields, path, warnings)


def _read_npy(path):
    return parse_npy(np.memmap(path, np.uint8, "r"))


def label_names(label_field: str | None) -> tuple[str, ...]:
    """The names under which labels are looked for, the first that is there is taken."""
    return (label_field,) if label_field else (*FIELDS["label"], "segment20")


def _named(keys, read, labels, fields, path, warnings):
    found = {field: next((name for name in names if name in keys), None) for field, names in FIELDS.items()}
    found["label"] = _first_label([name for name in labels if name in keys], path, warnings)
    found |= {field: _find_field(field, keys) for field in fields}
    return {field: read(keys[name]) for field, name in found.items() if name is not None}


def _find_field(field, keys):
    """The one of keys that is meant by `field`, which intensity has under several names. ValueError where none is."""
    plain = by_plain_name(keys)
    names = (plain_name(field), *(INTENSITY if field in INTENSITY else ()))
    name = next((name for name in names if name in plain), None)
    if name is None:
        raise ValueError(f"no field {field} of data.features; there are {', '.join(map(str, keys))}"
                         f"{did_you_mean(nearest(field, plain))}")
    return plain[name]


def _first_label(found, path, warnings):
    """The first of the names under which a file has labels, None where it has none; a doubt where they are several."""
    if len(found) > 1:
        warnings.append(f"{path}: labels in {', '.join(found)}: {found[0]} is taken; data.label_field ends this")
    return found[0] if found else None


def _from_columns(columns, labels, fields, path, warnings):
    plain = by_plain_name(columns)
    raw = {}
    for field, names in FIELDS.items():                     # arrays of three columns, which may have any of the names
        wide = [name for name in names if name in columns and (name == field or columns[name].ndim == 2)]
        raw |= {field: columns[wide[0]]} if wide and field != "label" else {}
    for name, triple in COLUMNS.items():
        for names in (triple, *OTHER_COLUMNS.get(name, ())):
            if name not in raw and all(column in plain for column in names):
                raw[name] = np.stack([columns[plain[column]] for column in names], 1)
    names = {name: name if name in columns else plain.get(plain_name(name)) for name in labels}
    label = _first_label([name for name in dict.fromkeys(names.values()) if name is not None], path, warnings)
    if label is not None:
        raw["label"] = columns[label]
    return {**raw, **{field: columns[_find_field(field, columns)] for field in fields}}


def read_ply_vertices(path: str | Path) -> dict[str, np.ndarray]:
    """The vertex properties of a PLY file (ASCII or binary), {name: (N,)}. ValueError where it is damaged or none."""
    columns = ply_columns(Path(path))[0].get("vertex")
    if columns is None:
        raise ValueError(f"{path}: cannot be read, a PLY file without vertices; is it damaged?")
    return {name: values for name, (values, lengths) in columns.items() if lengths is None}


def write_ply(path: str | Path, coord: np.ndarray, color: np.ndarray, label: np.ndarray | None = None) -> None:
    """A binary PLY cloud: coord (N, 3) in double precision where float32 does not hold them, color (N, 3) in 0..255,
    label (N,) written as int property `label`."""
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, len(coord), BLOCK)]
    single = all(np.array_equal(coord[rows].astype(np.float32), coord[rows]) for rows in blocks)
    fields = [(axis, "<f4" if single else "<f8") for axis in COLUMNS["coord"]]
    fields += [(name, "u1") for name in COLUMNS["color"]] + ([] if label is None else [("label", "<i4")])
    types = {"<f4": "float", "<f8": "double", "u1": "uchar", "<i4": "int"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(coord)}",
             *(f"property {types[kind]} {name}" for name, kind in fields), "end_header\n"]
    with open(path, "wb") as file:
        file.write("\n".join(lines).encode())
        for rows in blocks:
            block = np.empty(len(coord[rows]), fields)
            for axis, name in enumerate(COLUMNS["coord"]):
                block[name] = coord[rows, axis]
            for channel, name in enumerate(COLUMNS["color"]):
                block[name] = np.clip(color[rows, channel], 0, 255)
            if label is not None:
                block["label"] = label[rows]
            file.write(block.tobytes())


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


# -- finding files -----------------------------------------------------------------------------------------------------

class ClassList(NamedTuple):
    """names; ignore_labels: values of files that mean nothing; palette (C, 3) uint8 or None."""

    names: list[str]
    ignore_labels: tuple[int | str, ...]
    palette: np.ndarray | None


def read_classes(path: str | Path) -> ClassList:
    """Read classes.json (or that file in the folder `path`): a list of names, or {"classes": names, "ignore_index": -1,
    "palette": [[r, g, b], ...]}. -1 is always ignored. ValueError for anything else."""
    path = Path(path)
    path = path / "classes.json" if path.is_dir() else path
    try:
        value = json.loads(path.read_bytes())
        value = {"classes": value} if isinstance(value, list) else value
        names, ignored, palette = value["classes"], value.get("ignore_index"), value.get("palette")
        if not isinstance(names, list):
            raise ValueError("the class names must be a list, in the order of their numbers")
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("the class names must be texts, each once")
        if not isinstance(ignored, list):
            ignored = [] if ignored is None else [ignored]
        ignored = {-1, *("nan" if str(value).lower() == "nan" else int(str(value)) for value in ignored)}
        if palette is not None:
            palette = np.array(palette).reshape(len(names), 3)
            if palette.dtype.kind not in "iu" or palette.min() < 0 or palette.max() > 255:
                raise ValueError("the colours of the palette must be whole numbers from 0 to 255")
            palette = palette.astype(np.uint8)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path}: expected a list of class names or {{"classes": [...], "ignore_index": -1}}; '
                         f"{type(error).__name__}: {error}") from error
    check_names(f"{path}", names)
    return ClassList(list(names), tuple(sorted(ignored, key=str)), palette)


def is_cloud(path: Path) -> bool:
    """Whether path is a folder with coord.npy or a file with a known suffix; hidden ones are not."""
    if path.name.startswith("."):
        return False
    return (path / "coord.npy").is_file() if path.is_dir() else path.suffix.lower() in CLOUD_SUFFIXES


def clouds_in(folder: Path) -> list[Path]:
    """The sorted clouds of a folder, or, where it has none itself, of the folders in it (scene/room) and those that it
    links to, at any depth. Files .txt and .csv, which may be lists and notes, count where there is nothing else."""
    top = folder.resolve()
    below, seen = [], {top, *top.parents}                   # each folder once, and no loops
    for path, folders, names in os.walk(folder, followlinks=True):
        scenes = [name for name in folders if is_cloud(Path(path, name))]
        inside = {Path(path, name).resolve(): name for name in sorted(folders, reverse=True)
                  if name not in scenes and not name.startswith(".")}
        folders[:] = [name for place, name in inside.items() if place not in seen]
        seen.update(inside)
        below += [Path(path, name) for name in (*scenes, *names) if name in scenes or is_cloud(Path(path, name))]
    below = [path for path in below if path.suffix.lower() not in UNSURE_SUFFIXES or path.is_dir()] or below
    known = {str(path) for path in below}
    if doubles := [name for name in known if name.endswith(LABELS_OF_SCANNET) and
                   name.removesuffix(LABELS_OF_SCANNET) + ".ply" in known]:
        raise ValueError(f"{min(doubles)}: the labels of another cloud (raw ScanNet), in the colours of their classes; "
                         f"make clouds of both by scripts/preprocess_scannet.py, or name the clouds you mean")
    return sorted([path for path in below if path.parent == folder] or below)


def list_clouds(folder: str | Path) -> list[Path]:
    """The clouds of a folder, or the folder itself where it is one (Pointcept's layout). FileNotFoundError, and
    ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = [folder] if is_cloud(folder) else clouds_in(folder)
    if not files:
        raise ValueError(f"{folder}: no clouds in this folder{_what_is_there(folder)}")
    return files


def _what_is_there(folder: Path) -> str:
    """"; there are 12 .e57 files and 3 folders", for an error."""
    found = Counter("folders" if path.is_dir() else f"{path.suffix or path.name} files" for path in folder.iterdir())
    return "; there are " + ", ".join(f"{count} {what}" for what, count in found.most_common(5)) if found else ""


def find_clouds(root: str | Path, split: str | Sequence[str]) -> list[Path]:
    """Sorted clouds of a split of the data set in folder `root`. A split (or each of several: ["Area_1", "Area_2"]) is
    a folder of clouds under root (train, Area_5 ...) or of folders of them, a key of root/splits.json
    {split: [names]}, the lines of root/SPLIT.txt, or a .json or .txt file (under root or anywhere) that lists clouds by
    their path under root, suffixes optional. Raises FileNotFoundError where there is no root, ValueError where a split
    is unknown, empty, none or names a missing cloud.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; set data.root")
    if not split:
        raise ValueError(f"{root}: no split is named; set data.train and data.val")
    listed = root / "splits.json"
    listed = _read_json(listed, dict, '{"train": [names], ...}') if listed.is_file() else {}
    found = []
    for name in [split] if isinstance(split, str) else split:
        file = next((file for file in (root / name, Path(name)) if name.endswith((".json", ".txt")) and file.is_file()),
                    None)
        if file is not None:
            clouds = [_locate(root, entry, file) for entry in _read_list(file)]
        elif name in listed:
            clouds = [_locate(root, entry, root / "splits.json") for entry in listed[name]]
        elif (root / name).is_dir():
            clouds = clouds_in(root / name)
        elif (file := root / f"{name}.txt").is_file():
            clouds = [_locate(root, entry, file) for entry in _read_list(file)]
        else:
            known = sorted({*listed, *(path.name for path in root.iterdir() if path.is_dir() and not is_cloud(path))})
            raise ValueError(f"{root}: no split {name!r}; there are {', '.join(known) or 'none'}"
                             f"{did_you_mean(nearest(name, known))}")
        if not clouds:
            there = _what_is_there(root / name) if (root / name).is_dir() else ""
            raise ValueError(f"{root}: split {name!r} is empty; clouds are {' '.join(CLOUD_SUFFIXES)} files or folders "
                             f"with coord.npy{there}")
        found += clouds
    return sorted({*found})                                 # a cloud that is listed twice counts once


def _read_list(file):
    if file.suffix == ".json":
        return _read_json(file, list, "a list of clouds")
    lines = plain_text(file).decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _read_json(path, kind, expected):
    try:
        value = json.loads(path.read_bytes())
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
