"""Point clouds in the formats of scanners and of other programs, as named columns: LAS and LAZ (by laspy), PCD, text,
KITTI's .bin with .label, and .pth scenes of old Pointcept.

A reader takes (path, columns, wanted, warnings) and returns {name: (N,) or, for coord and color, (N, 3)}. columns: what
the user calls the columns of files that do not name them (data.columns), or (). wanted(name) says whether a column is
needed. Doubts are appended to `warnings`. Raises ValueError for damaged files and files that need another reading.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np

from utils.weights import read_torch_file

CHUNK = 1_000_000                           # points of a LAS file in memory at a time
TEXT_SUFFIXES = (".xyz", ".txt", ".pts", ".csv")
NORMAL_NAMES = ("nx", "ny", "nz")
COLOR_NAMES = ("red", "green", "blue")
# Of files that name no columns, after x y z.
PLAIN_COLUMNS = {3: (), 4: ("label",), 6: COLOR_NAMES, 7: (*COLOR_NAMES, "label"), 9: (*COLOR_NAMES, *NORMAL_NAMES),
                 10: (*COLOR_NAMES, *NORMAL_NAMES, "label")}
PTS_COLUMNS = {4: ("intensity",), 7: ("intensity", *COLOR_NAMES)}
UNLIKE = 10                                 # times higher a column goes than another that is no colour like it
DARK = 16                                   # and lower than this of 255 only counts go
MANY_LABELS = 50                            # more in a column of a matrix are rather a colour
INTENSITY = ("intensity", "strength", "reflectance", "remission")       # one field by four names
SHORT = {"r": "red", "g": "green", "b": "blue"}
PCD_TYPES = {("F", 4): "f4", ("F", 8): "f8", **{(kind, size): f"{kind.lower()}{size}" for kind in "IU"
                                                for size in (1, 2, 4, 8)}}
LAS_HEADER = 247                            # bytes in which all counts are; the smallest header and a point of 20 bytes
PACKING = 100                               # a LAZ file does not hold more than so many times its own size
CLASS_LIMIT = 31                            # of these point formats of LAS; those they become hold 255
SCAN_ANGLE = 0.006                          # degrees: the unit of theirs
LATER_FORMATS = {0: 6, 1: 6, 2: 7, 3: 7, 4: 9, 5: 10}


def plain_name(name: str) -> str:
    """A column's name as it is compared: lower case, without the `scalar_` of CloudCompare; r, g, b in full."""
    name = name.strip().strip('"\'').lower().replace(" ", "_").removeprefix("scalar_")
    return SHORT.get(name, name)


def by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """{plain name: name}; of several the first, which is a file's own (red before scalar_Red, a copy of it)."""
    return {plain_name(name): name for name in reversed([*names])}


def check_columns(columns: Sequence[str]) -> None:
    """ValueError unless data.columns is empty or names x, y, z and everything else once (`_` is skipped)."""
    names = [plain_name(name) for name in columns if name != "_"]
    if columns and (len(set(names)) < len(names) or not {"x", "y", "z"} <= {*names}):
        raise ValueError(f"data.columns={list(columns)}: expected x, y and z among the names, each name once; _ skips "
                         f"a column")


def matrix_columns(array: np.ndarray, columns: Sequence[str], warnings: list[str], path: Path,
                   plain: dict = PLAIN_COLUMNS) -> dict[str, np.ndarray]:
    """The columns of a matrix (N, K) by `columns`, or else as K says. Where K alone is misleading, values decide, with
    a warning: ShapeNet and ModelNet have normals of length 1 where others have colours, KITTI an intensity in place of
    a label, PointNet's S3DIS places in the room in place of normals. ValueError for another number of columns."""
    if columns:
        if array.ndim != 2 or array.shape[1] != len(columns):
            raise ValueError(f"a matrix of shape {array.shape}, but data.columns names {len(columns)} columns")
        return {plain_name(name): array[:, i] for i, name in enumerate(columns) if name != "_"}
    if array.ndim != 2 or array.shape[1] not in plain:
        raise ValueError(f"a matrix of shape {array.shape}; columns are x y z [r g b] [nx ny nz] [label]; name others "
                         f"in data.columns, such as [x, y, z, intensity, r, g, b]")
    names = ["x", "y", "z", *plain[array.shape[1]]]
    if names[3:6] == [*COLOR_NAMES] and len(names) < 9 and _unit_length(array[:, 3:6]):
        names[3:6] = NORMAL_NAMES
        warnings.append(f"{path}: columns 4 to 6 have length 1, taken as normals, not colours; data.columns ends this")
    elif names[6:9] == [*NORMAL_NAMES] and not _unit_length(array[:, 6:9]) and _in_unit_cube(array[:, 6:9]):
        names[6:9] = ("_place_x", "_place_y", "_place_z")
        warnings.append(f"{path}: columns 7 to 9 are all in 0..1 and not of length 1, so no normals: left out; "
                        f"data.columns ends this")
    elif names[3:] == ["label"] and array.dtype.kind == "f" and (array[:, 3] != np.floor(array[:, 3]))[
            np.isfinite(array[:, 3])].any():
        names[3] = "intensity"
        warnings.append(f"{path}: column 4 holds fractions, taken as intensity, not as label; data.columns ends this")
    elif names[6:] == ["label"] and (count := len(np.unique(array[:CHUNK, 6]))) > MANY_LABELS:
        warnings.append(f"{path}: column 7, taken as label, holds {count} different numbers; if it is blue, set "
                        f"data.columns=[x, y, z, intensity, r, g, b]")
    if "red" in names and len(array):
        red = names.index("red")
        highest = array[:, red:red + 3].max(0).astype(np.float64)
        if highest.min() * UNLIKE < highest.max() or 1 < highest.max() < DARK:
            warnings.append(f"{path}: columns {red + 1} to {red + 3}, taken as colours, have {highest[0]:g}, "
                            f"{highest[1]:g} and {highest[2]:g} for their highest; if they are something else, name "
                            f"the columns in data.columns")
    return {"coord": array[:, :3], **{name: array[:, i] for i, name in enumerate(names) if i > 2}}


def _unit_length(values):
    if values.dtype.kind != "f":
        return False
    length = np.einsum("nc,nc->n", values, values)
    return bool(len(values)) and bool((np.abs(length - 1) < 0.01).all())


def _in_unit_cube(values):
    return bool(len(values)) and values.min() >= 0 and values.max() <= 1


# -- text --------------------------------------------------------------------------------------------------------------

def read_text(path: Path, columns: Sequence[str], wanted: Callable, warnings: list[str]) -> dict[str, np.ndarray]:
    """.xyz, .txt, .pts, .csv: one point a line, numbers separated by blanks, commas or semicolons, with or without a
    header (also behind // or #, as CloudCompare writes it). A first line that is the number of points is skipped.
    Labels may be in NAME.labels, one a line (Semantic3D, whose seven columns are x y z intensity r g b). ValueError for
    fewer points than announced, for other labels than points, and for a header of more or fewer columns."""
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with open(path, encoding=encoding, errors="replace") as file:
        header, first, announced = _text_start(file)
        separator = next((mark for mark in (",", ";") if mark in first), None)
        count = len(_tokens(first, separator))
        names = list(columns) or _header_names(header, separator, count)
        if columns and len(columns) != count:
            raise ValueError(f"{count} columns, but data.columns names {len(columns)}")
        use = [i for i, name in enumerate(names) if name != "_" and wanted(plain_name(name))] if names else None
        if names and not {"x", "y", "z"} <= {*map(plain_name, names)}:
            raise ValueError(f"no column x, y or z in its header ({' '.join(names)[:80]}); name them in data.columns")
        rows = chain([first], file)
        if separator and _tokens(first, separator) == [*map(str, range(count))]:            # as pandas names columns
            warnings.append(f"{path}: its first line counts the columns from 0, so it is taken as a header")
            rows = file
        array = np.loadtxt(rows, np.float64, comments=None, delimiter=separator, usecols=use, ndmin=2)
    if len(array) < announced:
        raise ValueError(f"{len(array)} of {announced} points")
    labels = path.with_suffix(".labels")
    if names:
        first = by_plain_name(names)
        found = {plain_name(names[i]): array[:, place] for place, i in enumerate(use)
                 if first[plain_name(names[i])] == names[i]}
    else:
        with_intensity = path.suffix.lower() == ".pts" or labels.is_file()
        found = matrix_columns(array, (), warnings, path, {**PLAIN_COLUMNS, **PTS_COLUMNS} if with_intensity
                               else PLAIN_COLUMNS)
    if wanted("label") and "label" not in found and labels.is_file():
        found["label"] = np.loadtxt(labels, np.int64, ndmin=1)
        if len(found["label"]) != len(array):
            raise ValueError(f"{labels} has {len(found['label'])} labels for {len(array)} points")
    return found


def _text_start(file: Iterator[str]) -> tuple[str, str, int]:
    """(the last line before the first point that is no number of points, the first point, the number of points or 0);
    the file is then at the second point."""
    header, announced = "", 0
    for number, line in enumerate(file):
        text = line.strip()
        row = bool(text) and not text.startswith(("#", "//")) and not text.isdigit()        # or a header
        if row and all(map(_is_number, re.split(r"[,;\s]+", text))):
            return header, text, announced
        if number > 100 or (row and header and not header.startswith(("#", "//"))):
            raise ValueError(f"line {number + 1}: {text[:60]!r} is not a row of numbers")
        announced = int(text) if text.isdecimal() else announced
        header = text if text and not text.isdigit() else header
    raise ValueError("no row of numbers in it")


def _is_number(token):
    try:
        float(token or "nan")
    except ValueError:
        return False
    return True


def _tokens(line, separator):
    return [token.strip() for token in line.split(separator)]


def _header_names(header, separator, count):
    names = _tokens(header.lstrip("#/ "), separator)
    if len(names) != count:
        names = re.split(r"[,;\s]+", header.lstrip("#/ ").strip())
    listed = not header.startswith(("#", "//")) or plain_name(names[0]) == "x"          # no sentence about the file
    if len(names) != count and listed and {"x", "y", "z"} <= {*map(plain_name, names)}:
        raise ValueError(f"{count} columns, but its header names {len(names)} ({' '.join(names)[:80]}); name them in "
                         f"data.columns")
    return names if len(names) == count and not all(map(_is_number, names)) else []


# -- PCD ---------------------------------------------------------------------------------------------------------------

def read_pcd(path: Path, columns: Sequence[str], wanted: Callable, warnings: list[str]) -> dict[str, np.ndarray]:
    """.pcd of the Point Cloud Library: ASCII, binary or compressed; `rgb` of packed bytes becomes colours."""
    data = path.read_bytes()
    start = re.search(rb"^DATA[ \t]+(\w+)[^\n]*\n", data, re.MULTILINE)
    if start is None:
        raise ValueError("no line DATA in its header")
    header = {words[0]: words[1:] for words in map(str.split, data[:start.start()].decode("latin-1").splitlines())
              if words}
    count = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    widths = [int(width) for width in header.get("COUNT", ["1"] * len(header["FIELDS"]))]
    kinds = [PCD_TYPES[kind, int(size)] for kind, size in zip(header["TYPE"], header["SIZE"], strict=True)]
    names = [name if name != "_" else f"_{i}" for i, name in enumerate(header["FIELDS"])]
    row = np.dtype([(name, f"<{kind}", (width,)) for name, kind, width in zip(names, kinds, widths, strict=True)])
    body = data[start.end():]
    form = start[1].decode()
    if form == "ascii":
        fields = np.loadtxt(body.decode("latin-1").splitlines(), row)
        found = {name: fields[name].reshape(-1, width) for name, width in zip(names, widths, strict=True)}
    elif form == "binary":
        fields = np.frombuffer(body, row, count)
        found = {name: fields[name] for name in names}
    else:
        packed, size = np.frombuffer(body, "<u4", 2).tolist()
        if form != "binary_compressed" or size != count * row.itemsize:
            raise ValueError(f"DATA {form} of {size} bytes for {count} points of {row.itemsize}")
        body = lzf_decompress(body[8:8 + packed], size)
        found, at = {}, 0
        for name in names:                                          # column after column
            found[name] = np.frombuffer(body, row[name].base, count * row[name].shape[0], at).reshape(count, -1)
            at += found[name].nbytes
    if any(len(values) != count for values in found.values()):
        raise ValueError(f"{min(map(len, found.values()))} of {count} points")
    single = {plain_name(name): values[:, 0] for name, values in found.items() if values.shape[1] == 1}
    for name in ("rgb", "rgba"):
        if name in single and single[name].dtype.itemsize == 4:
            packed = np.ascontiguousarray(single.pop(name))
            if form == "ascii" and packed.dtype.kind == "f":
                packed = _packed_from_text(packed, name)
            packed = packed.view("<u4")
            single["color"] = np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], 1).astype(np.uint8)
    return single


def _packed_from_text(values, name):
    """Colours that ASCII files have as a floating-point number: its bits, or, written by others, the number itself."""
    if np.isnan(values).any():
        raise ValueError(f"{name} of {np.isnan(values).sum()} points is NaN, which holds no colour; export it as an "
                         f"unsigned integer (TYPE U)")
    return values.astype("<u4") if values.max(initial=0) >= 1 else values


def lzf_decompress(data: bytes, size: int) -> bytes:
    """The `size` bytes of an LZF stream (M. Lehmann's format); ValueError where it does not hold as many."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) < size:
        control = data[at]
        at += 1
        if control < 32:                                            # so many + 1 bytes as they are
            out += data[at:at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[at]
            at += 1
        begin = len(out) - ((control & 31) << 8) - data[at] - 1
        at += 1
        if begin < 0:
            raise ValueError("damaged compressed data")
        piece = out[begin:begin + length + 2]
        while len(piece) < length + 2:                              # overlaps what it writes
            piece += piece[:length + 2 - len(piece)]
        out += piece
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes after decompression, {size} announced")
    return bytes(out)


# -- KITTI, Pointcept --------------------------------------------------------------------------------------------------

def read_kitti(path: Path, columns: Sequence[str], wanted: Callable, warnings: list[str]) -> dict[str, np.ndarray]:
    """.bin of KITTI: rows of float32, x y z intensity unless data.columns names others (nuScenes has a fifth). Labels
    are in NAME.label beside it or in ../labels (SemanticKITTI): uint32, whose lower half is the class."""
    columns = columns or ("x", "y", "z", "intensity")
    values = np.fromfile(path, "<f4")
    if path.stat().st_size % (4 * len(columns)):
        raise ValueError(f"{path.stat().st_size} bytes are no rows of {len(columns)} float32 "
                         f"({' '.join(columns)}); name the columns in data.columns")
    found = matrix_columns(values.reshape(-1, len(columns)), columns, warnings, path)
    if "intensity" in found and (found["intensity"] < 0).any():
        raise ValueError(f"a negative intensity: its rows are not {' '.join(columns)}; name the columns in "
                         f"data.columns (nuScenes: [x, y, z, intensity, ring])")
    places = (path.with_suffix(".label"), path.parent.parent / "labels" / f"{path.stem}.label")
    label = next((place for place in places if place.is_file()), None)
    if label is not None and wanted("label"):
        found["label"] = (np.fromfile(label, "<u4") & 0xFFFF).astype(np.int64)
        found["label"][found["label"] == 0xFFFF] = -1               # of those who write -1
        if len(found["label"]) != len(values) // len(columns):
            raise ValueError(f"{label} has {len(found['label'])} labels for {len(values) // len(columns)} points")
    return found


def read_pth(path: Path, columns: Sequence[str], wanted: Callable, warnings: list[str]) -> dict[str, np.ndarray]:
    """A scene as Pointcept kept it before 1.5.2: a dict of arrays or tensors (coord, color, normal, semantic_gt20)."""
    content = read_torch_file(path, "Fetch it again.", old_format=True, numpy_scalars=True)
    if not isinstance(content, dict) or "coord" not in content:
        raise ValueError("no dict with coord in it; a scene is expected, not weights")
    content = {str(name).replace("semantic_gt", "segment"): value for name, value in content.items()}
    try:
        return {name: np.asarray(value) for name, value in content.items()
                if hasattr(value, "shape") or isinstance(value, list) and wanted(plain_name(name))}
    except TypeError as error:                                      # a tensor of bfloat16, or a sparse one
        raise ValueError(f"{error}") from error


# -- LAS, LAZ ----------------------------------------------------------------------------------------------------------

def _laspy(path):
    try:
        import laspy
    except ImportError as error:
        raise ValueError(f"{path}: LAS and LAZ files need laspy: pip install laspy lazrs") from error
    return laspy


def _las_chunks(path: Path) -> Iterator[tuple]:
    """(header, points) of each CHUNK points of a LAS or LAZ file. ValueError where laspy is absent or fails."""
    laspy = _laspy(path)
    with open(path, "rb") as file:
        start = file.read(LAS_HEADER)
    if start[:4] != b"LASF" or len(start) < LAS_HEADER:
        raise ValueError("no LAS header")
    later = 60 * struct.unpack_from("<I", start, 243)[0] if start[25] >= 4 else 0           # records behind the points
    if 54 * struct.unpack_from("<I", start, 100)[0] + later > path.stat().st_size:          # laspy would make them all
        raise ValueError("more records in its header than bytes in the file")
    try:
        with laspy.open(path) as file:
            size = file.header.point_count * file.header.point_format.size
            packing = 1 if path.suffix.lower() == ".las" else PACKING
            if size > packing * path.stat().st_size:
                raise ValueError(f"{file.header.point_count:,} points announced in {path.stat().st_size:,} bytes")
            for points in file.chunk_iterator(CHUNK):
                yield file.header, points
    except (laspy.errors.LaspyException, struct.error, RuntimeError) as error:      # RuntimeError: of lazrs
        advice = "; LAZ files need lazrs: pip install lazrs" if "Backend" in str(error) else ""
        raise ValueError(f"{' '.join(str(error).split())[:150]}{advice}") from error


def read_las(path: Path, columns: Sequence[str], wanted: Callable, warnings: list[str]) -> dict[str, np.ndarray]:
    """.las and .laz: coordinates in float64, colours (16 bits) and all dimensions that are wanted, by their LAS names
    (classification, intensity, return_number, number_of_returns, scan_angle ...), extra ones too."""
    found: dict[str, np.ndarray] = {}
    begin = 0
    for header, points in _las_chunks(path):
        names = [name for name in header.point_format.dimension_names if name not in ("X", "Y", "Z")]
        values = {"coord": np.stack([points.x, points.y, points.z], 1)}
        if {*COLOR_NAMES} <= {*names}:
            values["color"] = np.stack([points[name] for name in COLOR_NAMES], 1)
        values |= {name: np.array(points[name]) for name in names
                   if name not in COLOR_NAMES and wanted(plain_name(name))}
        for name, part in values.items():
            if not begin:
                found[name] = np.empty((header.point_count, *part.shape[1:]), part.dtype)
            found[name][begin:begin + len(part)] = part
        begin += len(points)
    if found and begin != len(found["coord"]):
        raise ValueError(f"{begin:,} of {len(found['coord']):,} points")
    if "color" in found and not found["color"].any():       # a format with such fields in a file without colours
        del found["color"]
    return found


def write_las(target: IO, source: Path, label: np.ndarray, field: str | None = None) -> None:
    """Write to `target` a copy of the LAS or LAZ file `source` with label (N,) in its classification field and, where
    there is one, in the dimension `field`; all else stays, but for the point format where label goes beyond its
    classes, and the octree of a COPC file. ValueError for labels outside 0..255, and for those that `field` does not
    hold."""
    laspy = _laspy(source)
    if label.min() < 0 or label.max() > 255:
        raise ValueError(f"{source}: labels {label.min()} to {label.max()}; the classification field holds 0 to 255")
    begin = 0
    with contextlib.ExitStack() as stack:
        file = None
        for header, points in _las_chunks(source):
            las = _of_format_for(laspy.LasData(header, points), label.max())
            for name in las.point_format.dimension_names:
                if name == "classification" or field is not None and plain_name(name) == plain_name(field):
                    las[name] = _fitting(label[begin:begin + len(points)], las[name], name)
            if file is None:
                las.header.vlrs = _without_octree(las.header.vlrs)
                file = stack.enter_context(laspy.open(
                    target, mode="w", header=las.header, closefd=False, encoding_errors="ignore",    # as they are
                    do_compress=source.suffix.lower() == ".laz"))
            file.write_points(las.points)
            begin += len(points)
        if header.evlrs:
            file.write_evlrs(_without_octree(header.evlrs))


def _without_octree(records):
    """Records of a LAS file but those of COPC, which say where in the file points are."""
    return type(records)([record for record in records if record.user_id != "copc"])


def _fitting(label, values, name):
    """The labels in the type of a dimension's values."""
    found = label.astype(np.array(values).dtype)
    if (found != label).any():
        raise ValueError(f"label {label[(found != label).argmax()]} does not fit into the field {name} ({found.dtype})")
    return found


def _of_format_for(las, highest):
    """A laspy.LasData, in a later point format where a class of the highest number needs it, and a later version of LAS
    than 1.0, which laspy does not write."""
    if las.header.version.minor == 0:
        las = _laspy("").convert(las, file_version="1.1")
    if highest > CLASS_LIMIT and las.header.point_format.id in LATER_FORMATS:
        degrees = np.array(las.scan_angle_rank)
        las = _laspy("").convert(las, point_format_id=LATER_FORMATS[las.header.point_format.id])
        las.scan_angle = np.round(degrees / SCAN_ANGLE)
    return las


READERS = {".las": read_las, ".laz": read_las, ".pcd": read_pcd, ".bin": read_kitti, ".pth": read_pth,
           **dict.fromkeys(TEXT_SUFFIXES, read_text)}
