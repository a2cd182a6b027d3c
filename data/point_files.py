"""Files of labelled point clouds: reading and checking them, writing them, and finding those of a split."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.mesh_io import parse_npy, ply_columns
from data.point_values import as_color, as_integers, as_unit
from utils.checks import check_names, did_you_mean, nearest

CLOUD_SUFFIXES = (".npz", ".npy", ".ply")
FAR = 10_000                                # metres; float64 coordinates beyond this are moved before rounding
BOMB_SIZE, BOMB_RATIO = 1 << 30, 100        # more than a GiB out of less than a hundredth of it is no cloud
LARGEST = 1e15                              # float32 still squares it, int64 still counts its voxels
FIELDS = {"coord": ("coord", "coords", "xyz", "points", "pos"), "normal": ("normal", "normals"),
          "color": ("color", "colors", "colour", "colours", "rgb"),
          "label": ("segment", "label", "labels", "class", "semantic")}
COLUMNS = {"coord": ("x", "y", "z"), "color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
OTHER_COLUMNS = {"color": (("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")),
                 "normal": (("normal_x", "normal_y", "normal_z"),)}     # in capitals as well
PLAIN_COLUMNS = {3: (), 4: ("label",), 6: ("color",), 7: ("color", "label"), 9: ("color", "normal"),
                 10: ("color", "normal", "label")}      # of a .npy matrix, after x y z


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


def read_cloud(path: str | Path, label_field: str | None = None, labels: bool = True,
               color_range: Sequence[float] | None = None) -> PointCloud:
    """Read a cloud: a folder of .npy files (Pointcept's layout), .npz with the same names, .npy (a matrix x y z [r g b]
    [nx ny nz] [label], or a structured array) or .ply (vertex properties).

    label_field: the name of the labels, e.g. "segment200"; an absent one means no labels. None: the first of segment,
    label, labels, class, semantic, else segment20. labels False: whatever they are, they are not read. color_range: as
    in as_color. Map coordinates (beyond 10 km) are moved near 0, or in float32 left, with a warning. FileNotFoundError,
    and ValueError for an unknown suffix, a damaged file, no point, wrong shapes, NaN or infinite coordinates, colours
    outside their range and labels that are not whole numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such cloud; check the path")
    if not path.is_dir() and path.suffix.lower() not in CLOUD_SUFFIXES:
        raise ValueError(f"{path}: '{path.suffix}' is not a suffix known here, use {' '.join(CLOUD_SUFFIXES)} or a "
                         f"folder with coord.npy")
    try:
        raw = _read_fields(path, label_names(label_field) if labels else ())
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
    color = as_color(raw.get("color"), path, warnings, color_range)
    normal, label = raw.get("normal"), raw.get("label")
    normal = None if normal is None else as_unit(normal, path, warnings)
    return PointCloud(coord, color, normal, None if label is None else as_integers(label, path), tuple(warnings),
                      exact=None if np.array_equal(coord, raw["coord"]) else raw["coord"])


def _read_fields(path, labels):
    """{"coord": ..., "color": ..., "normal": ..., "label": ...} as far as the file has them; labels: its names."""
    if path.is_dir():
        return _named({file.stem: file for file in path.glob("*.npy")}, _read_npy, labels)
    if path.suffix.lower() == ".npz":
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_size > path.stat().st_size for entry in file.infolist()):
                raise ValueError("an entry that is larger than the file")      # zipfile would take the memory for it
            packed, unpacked = (sum(getattr(info, name) for info in file.infolist())
                                for name in ("compress_size", "file_size"))
            if unpacked > max(BOMB_SIZE, BOMB_RATIO * packed):
                raise ValueError(f"{unpacked:,} bytes of arrays in {packed:,} bytes of file")
            return _named({name.removesuffix(".npy"): name for name in file.namelist()},
                          lambda name: parse_npy(file.read(name)), labels)
    if path.suffix.lower() == ".ply":
        return _from_columns(read_ply_vertices(path), labels)
    array = _read_npy(path)
    if array.dtype.names:
        return _from_columns({name: array[name] for name in array.dtype.names}, labels)
    if array.ndim != 2 or array.shape[1] not in PLAIN_COLUMNS:
        raise ValueError(f"a matrix of shape {array.shape}; columns are x y z [r g b] [nx ny nz] [label]")
    raw = {"coord": array[:, :3]}
    begin = 3
    for name in PLAIN_COLUMNS[array.shape[1]]:
        width = 1 if name == "label" else 3
        raw[name], begin = array[:, begin:begin + width], begin + width
    return raw if labels else {name: values for name, values in raw.items() if name != "label"}


def _read_npy(path):
    return parse_npy(np.memmap(path, np.uint8, "r"))


def label_names(label_field: str | None) -> tuple[str, ...]:
    """The names under which labels are looked for, the first that is there is taken."""
    return (label_field,) if label_field else (*FIELDS["label"], "segment20")


def _named(keys, read, labels):
    names = {**FIELDS, "label": labels}
    found = {field: next((name for name in names[field] if name in keys), None) for field in names}
    return {field: read(keys[name]) for field, name in found.items() if name is not None}


def _from_columns(columns, labels):
    lower = {name.lower(): values for name, values in columns.items()}
    raw = {}
    for name, triple in COLUMNS.items():
        for names in (triple, *OTHER_COLUMNS.get(name, ())):
            if name not in raw and all(column in lower for column in names):
                raw[name] = np.stack([lower[column] for column in names], 1)
    name = next((name for name in labels if name in columns), None)
    return raw if name is None else {**raw, "label": columns[name]}


def read_ply_vertices(path: str | Path) -> dict[str, np.ndarray]:
    """The vertex properties of a PLY file (ASCII or binary), {name: (N,)}. ValueError where it is damaged or none."""
    columns = ply_columns(Path(path))[0].get("vertex")
    if columns is None:
        raise ValueError(f"{path}: cannot be read, a PLY file without vertices; is it damaged?")
    return {name: values for name, (values, lengths) in columns.items() if lengths is None}


def write_ply(path: str | Path, coord: np.ndarray, color: np.ndarray, label: np.ndarray | None = None) -> None:
    """A binary PLY cloud: coord (N, 3) in double precision where float32 does not hold them, color (N, 3) in 0..255,
    label (N,) written as int property `label`."""
    number = "<f4" if np.array_equal(coord.astype(np.float32), coord) else "<f8"
    fields = [(axis, number) for axis in COLUMNS["coord"]] + [(name, "u1") for name in COLUMNS["color"]]
    rows = np.empty(len(coord), fields + ([] if label is None else [("label", "<i4")]))
    for axis, name in enumerate(COLUMNS["coord"]):
        rows[name] = coord[:, axis]
    for channel, name in enumerate(COLUMNS["color"]):
        rows[name] = np.clip(color[:, channel], 0, 255)
    if label is not None:
        rows["label"] = label
    types = {"<f4": "float", "<f8": "double", "|u1": "uchar", "<i4": "int"}
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
        value = json.loads(path.read_text())
        value = {"classes": value} if isinstance(value, list) else value
        names, ignored, palette = value["classes"], value.get("ignore_index"), value.get("palette")
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("the class names must be texts, each once")
        if not isinstance(ignored, list):
            ignored = [] if ignored is None else [ignored]
        ignored = {-1, *("nan" if str(value).lower() == "nan" else int(value) for value in ignored)}
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
