"""Reading and writing triangle meshes and their per-face labels, with faces ALWAYS in the order of the file.

Labels belong to faces by position alone, so a loader that reorders faces destroys them silently. trimesh reorders
faces of an OBJ with several materials (and of anything with quads), splits vertices of a textured PLY and refuses a
binary PLY that mixes triangles and quads; .obj, .ply and .off are therefore read here, .stl and .glb through trimesh.
Degenerate, duplicate and non-manifold faces are kept: every one has a label.
"""

import difflib
import io
import json
import logging
import math
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trimesh

from utils.losses import IGNORE_INDEX

MESH_SUFFIXES = (".obj", ".ply", ".off", ".stl", ".glb")
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
GLB_RATIO = 20                                     # elements a byte; Draco packs a few indices into one
LABEL_FILES = ("{}.txt", "{}.npy", "{}_labels.npy", "{}.seg", "{}.eseg")
LABEL_KINDS = ("auto", "face", "polygon", "vertex", "edge")
logging.getLogger("trimesh").setLevel(logging.CRITICAL)      # it warns with tracebacks
BOM = b"\xef\xbb\xbf"                              # what Windows editors put before UTF-8
PLY_LABEL_NAMES = ("label", "labels", "class")
PLY_CORNERS = ("vertex_indices", "vertex_index")
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
             "int64": "i8", "uint64": "u8", "float32": "f4", "float64": "f8"}


Parsed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
# vertices (V, 3); the corners of all faces in a row; how many each face has; label of each face (here still polygons)


class Mesh(NamedTuple):
    """A triangle mesh as its file has it, polygons cut into fans."""
    vertices: np.ndarray            # (V, 3) float64
    faces: np.ndarray               # (F, 3) int64, in file order
    label: np.ndarray | None        # (F,) int64, raw values of a PLY face property named label, labels or class
    polygon: np.ndarray | None      # (F,) int64, the file's face each triangle came from; None: triangles only
    path: str


# --- meshes ---------------------------------------------------------------------------------------------------------

def read_mesh(path: str | Path) -> Mesh:
    """Read a mesh file (MESH_SUFFIXES) with its faces in file order.

    Polygons become fans around their first corner. Vertices of .stl (three per face in the file) are merged where
    exactly equal. A .glb gives its meshes in file order, each placed by its node (twice if two nodes show it).
    Raises FileNotFoundError, and ValueError for an unknown suffix, a corrupt file, no faces, a NaN or infinite
    coordinate, a face with fewer than three corners or with an index out of range.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        nearest = difflib.get_close_matches(suffix, MESH_SUFFIXES, 1, 0.5)
        raise ValueError(f"{path}: '{suffix}' is not a mesh suffix known here, use one of {' '.join(MESH_SUFFIXES)}"
                         + (f" (did you mean {nearest[0]}?)" if nearest else ""))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh file; check the path")
    reader = {".obj": _read_obj, ".ply": _read_ply, ".off": _read_off}.get(suffix, _read_with_trimesh)
    vertices, corner, count, label = reader(path)
    if len(count) == 0:
        raise ValueError(f"{path}: no faces; a mesh is needed, is this a point cloud or cut short?")
    finite = np.isfinite(vertices).all(1)
    if not finite.all():
        raise ValueError(f"{path}: {(~finite).sum()} of {len(vertices)} vertices have a NaN or infinite coordinate, "
                         f"the first is vertex {np.argmin(finite)}; repair the file")
    if count.min() < 3:
        raise ValueError(f"{path}: face {np.argmax(count < 3)} has {count.min()} corners; a face needs three or more")
    outside = (corner < 0) | (corner >= len(vertices))
    if outside.any():
        first = np.argmax(outside)
        raise ValueError(f"{path}: face {np.searchsorted(np.cumsum(count), first, side='right')} uses vertex "
                         f"{corner[first]}, the file has vertices 0..{len(vertices) - 1}; is the file cut short?")
    faces, polygon = _fan(corner, count)
    if label is not None and polygon is not None:
        label = label[polygon]
    return Mesh(vertices, faces, label, polygon, str(path))


def _fan(corner: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Cut polygons (all corners in a row, and the number of each) into fans: faces (F, 3), polygon (F,) or None."""
    if (count == 3).all():
        return corner.reshape(-1, 3), None
    polygon = np.repeat(np.arange(len(count)), count - 2)
    step = np.arange(len(polygon)) - np.repeat(np.cumsum(count - 2) - (count - 2), count - 2)
    first = (np.cumsum(count) - count)[polygon]
    return np.stack([corner[first], corner[first + step + 1], corner[first + step + 2]], 1), polygon


def parse_numbers(text: bytes, dtype: type) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers of a text and how many each line has; of tokens like 7/1/3 the first. None: not all are numbers."""
    if not text.strip():
        return np.empty(0, dtype), np.zeros(text.count(b"\n"), np.int64)
    byte = np.frombuffer(text if text.endswith(b"\n") else text + b"\n", np.uint8)
    token, slash = byte > 32, byte == ord("/")
    digit = token & ~slash
    token_start, number_start = token.copy(), digit.copy()
    token_start[1:] &= ~token[:-1]
    number_start[1:] &= ~digit[:-1]
    count = np.diff(np.searchsorted(np.flatnonzero(token_start), np.flatnonzero(byte == ord("\n"))), prepend=0)
    with warnings.catch_warnings():                 # of text it cannot parse, fromstring returns the numbers before it
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            value = np.fromstring(np.where(slash, np.uint8(32), byte).tobytes(), dtype, sep=" ")
        except ValueError:
            return None
    if len(value) != number_start.sum():
        return None
    value = value[token_start[number_start]]
    return (value, count) if len(value) == count.sum() else None


def _read_obj(path: Path) -> Parsed:
    text = obj_text(path)
    parsed = _parse_obj(text)
    return parsed if parsed is not None else _parse_obj_by_line(text, path)


def obj_text(path: Path) -> bytes:
    """The bytes of an OBJ or MTL file with line ends as \\n and one at its end."""
    return path.read_bytes().removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\n"


def plain_lines(text: bytes) -> bytes:
    """An OBJ's text without comments and indents, continued lines joined. Lines of names (usemtl, mtllib) keep what
    follows a #: it may belong to the name, as in "Material #25"."""
    def comment(found):
        line = text[text.rfind(b"\n", 0, found.start()) + 1:found.start()].lstrip()
        return found[0] if line.startswith((b"usemtl", b"mtllib")) else b""

    if b"#" in text:
        text = re.sub(rb"#[^\n]*", comment, text)
    if b"\\" in text:
        text = re.sub(rb"\\[ \t]*\n", b" ", text)
    if b"\n " in text or b"\n\t" in text or text[:1] in (b" ", b"\t"):
        text = re.sub(rb"(?m)^[ \t]+", b"", text)
    return text


def _parse_obj(text: bytes) -> Parsed | None:
    """The `v` and `f` lines of an OBJ at numpy's speed. None where anything is odd, the slow parser's matter."""
    values, corners, sides = [], [], []
    seen = 0
    for block in _blocks(plain_lines(text) + b"\n", 1 << 20):              # of a size that stays in the cache
        byte = np.frombuffer(block, np.uint8)
        end = np.flatnonzero(byte == ord("\n")) + 1
        start = np.append(0, end[:-1])
        keyword, after = byte[start], byte[np.minimum(start + 1, len(byte) - 1)]
        after = (after == ord(" ")) | (after == ord("\t"))
        is_vertex, is_face = after & (keyword == ord("v")), after & (keyword == ord("f"))
        parsed = []
        for mask, dtype in ((is_vertex, np.float64), (is_face, np.int64)):
            length = (end - start)[mask]
            chosen = byte[np.repeat(mask, end - start)]
            chosen[np.cumsum(length) - length] = ord(" ")                  # the keyword itself
            parsed.append(parse_numbers(chosen.tobytes(), dtype))
            if parsed[-1] is None or parsed[-1][1].min(initial=3) < 3:
                return None
        (value, count), (corner, side) = parsed                            # x y z [w] [r g b] and i j k ...
        above = np.repeat(seen + np.cumsum(is_vertex)[is_face], side)      # vertices above the face's line
        seen += is_vertex.sum()
        values.append(value[(np.cumsum(count) - count)[:, None] + np.arange(3)])
        corners.append(np.where(corner < 0, corner + above, corner - 1))
        sides.append(side)
    vertices, corner, count = map(np.concatenate, (values, corners, sides))
    if not len(corner) or corner.min() < 0 or corner.max() >= len(vertices):
        return None
    return vertices, corner, count, None


def _blocks(text: bytes, size: int) -> Iterator[bytes]:
    """The text in pieces of about `size` bytes that end with a line."""
    at = 0
    while at < len(text):
        end = text.find(b"\n", at + size) + 1 or len(text)
        yield text[at:end]
        at = end


def _parse_obj_by_line(text: bytes, path: Path) -> Parsed:
    """The same, line by line (about ten times slower), raising with the number of the line that is wrong."""
    vertices, corner, count, line_of_face = [], [], [], []
    pending = b""
    for number, line in enumerate(text.split(b"\n"), 1):
        line = pending + line.split(b"#", 1)[0].rstrip()
        pending = line[:-1] + b" " if line.endswith(b"\\") else b""
        word = line.split()
        if pending or not word or word[0] not in (b"v", b"f"):
            continue
        try:
            if word[0] == b"v":
                vertices.append([float(word[1]), float(word[2]), float(word[3])])
                continue
            index = [int(w.split(b"/", 1)[0]) for w in word[1:]]
        except (ValueError, IndexError):
            raise ValueError(f"{path}: line {number} cannot be read: {line[:60].decode(errors='replace')!r}; "
                             f"'v x y z' or 'f a b c ...' is expected") from None
        if len(index) < 3:
            raise ValueError(f"{path}: line {number}: a face of {len(index)} corners; a face needs three or more")
        if 0 in index or min(index) < -len(vertices):
            raise ValueError(f"{path}: line {number}: face index {0 if 0 in index else min(index)} names no vertex "
                             f"({len(vertices)} so far; OBJ counts from 1, from -1 backwards)")
        corner += [i - 1 if i > 0 else i + len(vertices) for i in index]
        count.append(len(index))
        line_of_face.append(number)
    for c, number in zip(corner, np.repeat(line_of_face, count) if count else [], strict=True):
        if c >= len(vertices):
            raise ValueError(f"{path}: line {number}: face index {c + 1}, but the file has {len(vertices)} vertices; "
                             f"is the file cut short?")
    return np.array(vertices).reshape(-1, 3), np.array(corner, np.int64), np.array(count, np.int64), None


def _read_off(path: Path) -> Parsed:
    text = re.sub(rb"#[^\n]*", b"", path.read_bytes().removeprefix(BOM).replace(b"\r", b"\n"))
    header = re.match(rb"\s*(?:ST)?C?N?OFF(?!\s*BINARY)", text)
    if header is None:
        raise ValueError(f"{path}: does not begin with OFF, so it is no (text) OFF file; convert it")
    parsed = parse_numbers(text[header.end():], np.float64)
    if parsed is None:
        raise ValueError(f"{path}: holds something that is not a number; is it an OFF file?")
    value, count = parsed[0], parsed[1][parsed[1] > 0]                     # without empty lines
    start = np.cumsum(count) - count
    V, F = (int(v) for v in value[:2]) if len(count) and count[0] >= 2 and np.isfinite(value[:2]).all() else (-1, -1)
    if V < 0 or F < 0 or len(count) < 1 + V + F or (V and count[1:1 + V].min() < 3):
        raise ValueError(f"{path}: {len(count)} lines do not hold the {V} vertices and {F} faces of the first; "
                         f"is the file cut short?")
    vertices = value[start[1:1 + V, None] + np.arange(3)]
    start, count = start[1 + V:1 + V + F], count[1 + V:1 + V + F]
    sides = _indices(value[start], path)                                   # n i j k ... [colour]
    wrong = (sides < 0) | (sides >= count)
    if wrong.any():
        raise ValueError(f"{path}: face {np.argmax(wrong)} announces {sides[wrong][0]} corners, its line holds "
                         f"{count[wrong][0] - 1}")
    within = np.arange(sides.sum()) - np.repeat(np.cumsum(sides) - sides, sides)
    return vertices, _indices(value[np.repeat(start, sides) + 1 + within], path), sides, None


def _read_ply(path: Path) -> Parsed:
    columns = ply_columns(path)[0]
    if any(axis not in columns.get("vertex", {}) for axis in "xyz"):
        raise ValueError(f"{path}: cannot be read as PLY (no vertices with x, y and z); is it cut short or damaged?")
    vertices = np.stack([columns["vertex"][axis][0] for axis in "xyz"], 1).astype(np.float64)
    face = columns.get("face", {})
    index = next((face[n] for n in PLY_CORNERS if n in face), (np.empty(0), np.empty(0)))
    label = next((face[n][0] for n in PLY_LABEL_NAMES if n in face and face[n][1] is None), None)
    if label is not None and len(label):
        label = _as_integers(label, path)
    return vertices, _indices(index[0], path), _indices(index[1], path), label


def _indices(value: np.ndarray, path: Path) -> np.ndarray:
    """value as int64; ValueError for what cannot be the number of a vertex or of corners, as 1.5."""
    if value.dtype.kind == "f" and not ((np.abs(value) < 2 ** 53) & (value == np.round(value))).all():       # NaN too
        raise ValueError(f"{path}: a face has an index that is no whole number; repair the file")
    return value.astype(np.int64)


def ply_columns(path: Path) -> tuple[dict[str, dict], list[str]]:
    """{element: {property: (values, None)}}, for a list (values in a row, length of each); and the header's comments.
    Raises ValueError for a file that is no PLY or cut short."""
    data = path.read_bytes()
    with _ply_errors(path):
        format_, elements, comments, offset = _ply_header(data)
        if format_ == "ascii":                      # from here on like a binary file that holds doubles only
            parsed = parse_numbers(data[offset:], np.float64)
            if parsed is None:
                raise ValueError("something in the body is not a number")
            data = parsed[0].tobytes()
            offset = 0
        order = ">" if format_ == "binary_big_endian" else "<"
        columns = {}
        for name, length, properties in elements:
            types = [(n, *("f8" if format_ == "ascii" and t else t and order + t for t in ts)) for n, *ts in properties]
            columns[name], offset = _ply_element(data, offset, length, types)
    return columns, comments


@contextmanager
def _ply_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read as PLY ({type(error).__name__}: {str(error)[:120]}); "
                         f"is it cut short or damaged?") from error


def _has_ply_label(path: Path) -> bool:
    """Whether the header of a PLY names a label of its faces; the body is not parsed."""
    with _ply_errors(path):
        elements = _ply_header(path.read_bytes())[1]
    return any(element == "face" and name in PLY_LABEL_NAMES and size is None
               for element, _, properties in elements for name, _, size in properties)


def _ply_header(data: bytes) -> tuple[str, list, list[str], int]:
    """Format, elements as (name, length, [(property, type, type of the list's length or None)]), comments, offset of
    the body."""
    end = re.search(rb"^end_header[ \t]*(\r\n|\n|\r)", data, re.MULTILINE)
    lines = re.split(r"[\r\n]+", data[:end.start()].decode("latin-1")) if end else []
    if not lines or lines[0].strip() != "ply":
        raise ValueError("no PLY header")
    format_ = ""
    elements, comments = [], []
    for line in lines[1:]:
        word = line.split()
        if word[:1] == ["format"]:
            format_ = word[1]
        elif word[:1] == ["comment"]:
            comments.append(line.strip().removeprefix("comment").strip())
        elif word[:1] == ["element"]:
            elements.append((word[1], int(word[2]), []))
        elif word[:2] == ["property", "list"]:
            elements[-1][2].append((word[4], PLY_TYPES[word[3]], PLY_TYPES[word[2]]))
        elif word[:1] == ["property"]:
            elements[-1][2].append((word[2], PLY_TYPES[word[1]], None))
    if format_ not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"format {format_!r}")
    if any(length < 0 for _, length, _ in elements):
        raise ValueError("a negative number of elements")
    return format_, elements, comments, end.end()


def _ply_element(data: bytes, offset: int, length: int, properties: list) -> tuple[dict, int]:
    """One element's columns: {property: (values, None)}, of a list {property: (values in a row, length of each)}."""
    if length == 0:
        return {name: (np.empty(0), np.empty(0) if size else None) for name, _, size in properties}, offset
    fields, at = [], offset                         # suppose all lists to be as long as those of the first row
    for name, kind, size in properties:
        number = int(np.frombuffer(data, size, 1, at)[0]) if size else 1
        fields += [(name + " length", size), (name, kind, (number,))] if size else [(name, kind)]
        at += number * np.dtype(kind).itemsize + (np.dtype(size).itemsize if size else 0)
    row = np.dtype(fields)
    lists = [name for name, _, size in properties if size]
    if offset + length * row.itemsize <= len(data):
        table = np.frombuffer(data, row, length, offset)
        if all((table[f"{name} length"] == row[name].shape[0]).all() for name in lists):
            columns = {name: (table[name].reshape(-1), table[f"{name} length"] if name in lists else None)
                       for name, _, _ in properties}
            return columns, offset + length * row.itemsize
    columns = {name: ([], []) for name, _, _ in properties}
    for _ in range(length):                         # lists of several lengths: row by row
        for name, kind, size in properties:
            number = 1
            if size:
                number = int(np.frombuffer(data, size, 1, offset)[0])
                offset += np.dtype(size).itemsize
            columns[name][0].append(np.frombuffer(data, kind, number, offset))
            columns[name][1].append(number)
            offset += number * np.dtype(kind).itemsize
    return {name: (np.concatenate(columns[name][0]), np.array(columns[name][1]) if size else None)
            for name, _, size in properties}, offset


def _read_with_trimesh(path: Path) -> Parsed:
    try:
        if path.suffix.lower() == ".glb":
            _check_glb(path.read_bytes())
        scene = trimesh.load_scene(str(path), process=False, skip_materials=True)
        vertices = [np.empty((0, 3))]
        faces = [np.empty((0, 3), np.int64)]
        total = 0
        for name, mesh in scene.geometry.items():
            for node in scene.graph.geometry_nodes.get(name, []) if isinstance(mesh, trimesh.Trimesh) else []:
                vertices.append(trimesh.transform_points(mesh.vertices, scene.graph[node][0]))
                faces.append(np.asarray(mesh.faces) + total)
                total += len(mesh.vertices)
    except Exception as error:                      # a parser of somebody else's on a damaged file: anything may come
        # an ImportError is of what trimesh tries next where a file is not what it seems: no word about that
        why = "" if isinstance(error, ImportError) else f" ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:].upper()}{why}; is it cut short or damaged?"
                         ) from error
    vertices, faces = np.concatenate(vertices), np.concatenate(faces)
    if path.suffix.lower() == ".stl" and len(vertices):
        order = np.lexsort(vertices.T)
        new = np.append(True, (vertices[order[1:]] != vertices[order[:-1]]).any(1))
        merged = np.empty(len(vertices), np.int64)
        merged[order] = np.cumsum(new) - 1
        vertices, faces = vertices[order[new]], merged[faces]
    return vertices, faces.reshape(-1).astype(np.int64), np.full(len(faces), 3), None


def _check_glb(data: bytes) -> None:
    """ValueError where a chunk or an accessor announces more than the file holds: trimesh would take the memory.

    Accessors with a view of a buffer, which may be a file beside it, trimesh checks; those without one (Draco's, which
    are compressed) begin as zeros.
    """
    at = 12
    while at + 8 <= len(data):
        length, kind = struct.unpack_from("<I4s", data, at)
        if length > len(data) - at - 8:
            raise ValueError(f"a chunk of {length} bytes, {len(data) - at - 8} are left")
        tree = json.loads(data[at + 8:at + 8 + length]) if kind == b"JSON" else {}
        zeros = [accessor["count"] for accessor in tree.get("accessors", []) if "bufferView" not in accessor]
        if max(zeros, default=0) > GLB_RATIO * len(data):
            raise ValueError(f"an accessor counts more elements than the file can hold in its {len(data)} bytes")
        at += 8 + length


def list_meshes(mesh_dir: str | Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """The mesh files of a folder (not of its sub-folders, no hidden ones), sorted by name; suffixes (".obj") chooses
    among MESH_SUFFIXES, () takes all.

    Raises FileNotFoundError, and ValueError for a folder without meshes or with two meshes of one stem.
    """
    mesh_dir = Path(mesh_dir)
    if not mesh_dir.is_dir():
        raise FileNotFoundError(f"{mesh_dir}: no such folder of meshes; check the path")
    paths = sorted(p for p in mesh_dir.iterdir()
                   if p.suffix.lower() in (suffixes or MESH_SUFFIXES) and not p.name.startswith(".") and p.is_file())
    if not paths:
        raise ValueError(f"{mesh_dir}: no mesh in this folder (looked for {' '.join(suffixes or MESH_SUFFIXES)})")
    stems = {}
    for path in paths:
        if stems.setdefault(path.stem, path) != path:
            raise ValueError(f"{mesh_dir}: {stems[path.stem].name} and {path.name} would share a label file; keep one, "
                             f"or choose the kind by data.suffixes, as [{path.suffix.lower()}]")
    return paths


# --- labels ---------------------------------------------------------------------------------------------------------

def find_label_file(mesh_path: str | Path, label_dir: str | Path) -> Path:
    """The label file of a mesh: STEM.txt, .npy, _labels.npy, .seg or .eseg in label_dir, else the PLY mesh itself.

    Raises FileNotFoundError for none, ValueError for two.
    """
    mesh_path, label_dir = Path(mesh_path), Path(label_dir)
    names = [pattern.format(mesh_path.stem) for pattern in LABEL_FILES]
    found = [label_dir / name for name in names if (label_dir / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{mesh_path}: {' and '.join(map(str, found))} both look like its labels; keep one")
    if not found and mesh_path.suffix.lower() == ".ply" and _has_ply_label(mesh_path):
        return mesh_path
    if not found:
        raise FileNotFoundError(f"{mesh_path}: no labels; looked in {label_dir} for {', '.join(names)}"
                                + (f" and in the PLY for a face property {', '.join(PLY_LABEL_NAMES)}"
                                   if mesh_path.suffix.lower() == ".ply" else ""))
    return found[0]


def read_labels(path: str | Path, mesh: Mesh, num_classes: int | None = None, label_offset: int = 0,
                ignore_labels: Sequence[int] = (), kind: str = "auto") -> np.ndarray:
    """The label of every face of a mesh: (F,) int64 in 0..num_classes-1, or IGNORE_INDEX.

    path           .txt .seg .eseg (numbers, white space between), .npy, or a .ply with a face property (the mesh).
    label_offset   added to the file's values: -1 for a file that counts classes from 1.
    ignore_labels  the file's values (before the offset) that become IGNORE_INDEX; -100 always does.
    kind           what the file labels. "auto": faces, or polygons if their number fits, or edges if it is an .eseg.
                   "vertex", "edge": a face takes the majority of its three, of three different ones the smallest.
                   Edges are in order of first appearance over faces, corners (0,1), (1,2), (2,0), as in MeshCNN.

    Labels are never shifted, cut or padded to fit: ValueError for a wrong number of them (names the likely cause),
    for a value outside 0..num_classes-1, and for anything that is not an integer.
    """
    path = Path(path)
    if kind not in LABEL_KINDS:
        raise ValueError(f"label_kind: {kind!r} is none of {', '.join(LABEL_KINDS)}")
    if path.suffix.lower() == ".ply":
        label = (mesh if path == Path(mesh.path) else read_mesh(path)).label
        if label is None:
            raise ValueError(f"{path}: its faces have no property {', '.join(PLY_LABEL_NAMES)}; give a label file")
    else:
        label = _as_integers(_read_label_file(path), path)
    ignored = np.isin(label, [*ignore_labels, IGNORE_INDEX])
    label = np.where(ignored, IGNORE_INDEX, label + label_offset)
    _check_range(label[~ignored], path, num_classes, label_offset)
    return _to_faces(label, mesh, kind, path)


def _read_label_file(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file; check the path")
    if path.suffix.lower() == ".npy":
        try:
            label = parse_npy(np.memmap(path, np.uint8, "r"))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read as an array ({error}); save it with numpy.save") from error
        if label.dtype.kind not in "biuf" or max(label.shape, default=1) != label.size:
            raise ValueError(f"{path}: {label.dtype} {label.shape}; one number per face is expected, not scores")
        return label.reshape(-1)
    if path.suffix.lower() not in (".txt", ".seg", ".eseg"):
        raise ValueError(f"{path}: '{path.suffix}' is no label suffix; use .txt .npy .seg .eseg or a .ply with labels")
    text = path.read_bytes().removeprefix(BOM).replace(b"\r", b"\n")
    parsed = None if b"/" in text else parse_numbers(text, np.float64)
    if parsed is not None:
        return parsed[0]
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        for word in line.split():
            try:
                float(word)
            except ValueError:
                raise ValueError(f"{path}: line {number}: {word[:40]!r} is not a number; labels are integers with "
                                 f"white space between them") from None
    raise ValueError(f"{path}: cannot be read as numbers")


def parse_npy(data: bytes | np.ndarray) -> np.ndarray:
    """The array in the bytes of a .npy file, as a copy. ValueError for whatever is wrong with them; no memory is taken
    for more than they hold, and nothing is unpickled."""
    stream = io.BytesIO(bytes(data[:1 << 16]))
    try:
        shape, by_column, dtype = NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:                      # numpy has Python parse the header: SyntaxError, TokenError ...
        raise ValueError(f"damaged header: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
        raise ValueError(f"{dtype} {shape} needs more than its {len(data)} bytes; is it cut short?")
    array = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return array.reshape(shape, order="F" if by_column else "C").copy()


def _as_integers(label: np.ndarray, path: Path) -> np.ndarray:
    """label as int64; ValueError for an empty array and for values that are not whole numbers."""
    if len(label) == 0:
        raise ValueError(f"{path}: no labels in it; one label per face is expected")
    if label.dtype.kind == "f":
        wrong = ~(np.abs(label) < 2 ** 53) | (label != np.round(label))    # NaN too
        if wrong.any():
            raise ValueError(f"{path}: {wrong.sum()} of {len(label)} labels are no integers, the first is number "
                             f"{np.argmax(wrong)} (from 0): {label[wrong][0]:g}; labels are class numbers")
    return label.astype(np.int64)


def _check_range(label: np.ndarray, path: Path, num_classes: int | None, label_offset: int) -> None:
    wrong, count = np.unique(label[(label < 0) | (label >= (num_classes or np.inf))] - label_offset, return_counts=True)
    if len(wrong) == 0:
        return
    shown = ", ".join(f"{v} ({c} times)" for v, c in zip(wrong[:5], count[:5], strict=True))
    shown += ", ..." if len(wrong) > 5 else ""
    hint = f"known: 0..{num_classes - 1}" if num_classes else "classes count from 0"
    if label_offset:
        hint += f" after label_offset: {label_offset}"
    if num_classes in wrong and label.min() > 0 and not label_offset:
        hint += "; does the file count from 1? Then label_offset: -1"
        wrong = wrong[wrong != num_classes]
    if len(wrong):
        hint += f"; if {' '.join(map(str, wrong[:5]))} means 'not labelled', ignore_labels: {wrong[:5].tolist()}"
    raise ValueError(f"{path}: unknown label {shown}; {hint}")


def _edges(faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Number of the edge between corners (0,1), (1,2), (2,0) of each face, (F, 3), by first appearance; how many."""
    pair = np.sort(np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2), 1)
    _, first, inverse = np.unique(pair[:, 0] * (faces.max() + 1) + pair[:, 1], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].reshape(-1, 3), len(first)


def _majority(label: np.ndarray) -> np.ndarray:
    """(F, 3) -> (F,): the value two or three share, else the smallest that is not ignored."""
    a, b, c = label.T
    smallest = np.where(label == IGNORE_INDEX, np.iinfo(np.int64).max, label).min(1)
    return np.where((a == b) | (a == c), a, np.where(b == c, b, smallest))


def _to_faces(label: np.ndarray, mesh: Mesh, kind: str, path: Path) -> np.ndarray:
    """label per face, polygon, vertex or edge -> (F,) per face."""
    F, V, n = len(mesh.faces), len(mesh.vertices), len(label)
    polygons = F if mesh.polygon is None else int(mesh.polygon[-1]) + 1
    if kind == "auto" and path.suffix.lower() == ".eseg":
        kind = "edge"
    elif kind == "auto":
        kind = "polygon" if n == polygons != F else "face"
    expected = {"face": F, "polygon": polygons, "vertex": V}
    if kind == "edge" or n != expected[kind]:
        edge, expected["edge"] = _edges(mesh.faces)
    if n != expected[kind]:
        same = [k for k in ("face", "polygon", "vertex", "edge") if expected[k] == n]
        if same:
            cause = f"one per {same[0]}? Then label_kind: {same[0]}"
        elif abs(n - expected[kind]) <= max(10, expected[kind] // 100):
            cause = "did an exporter drop or add degenerate or duplicate faces? Label the mesh file itself"
        else:
            cause = "was the mesh simplified or changed after labelling?"
        things = "vertices" if kind == "vertex" else f"{kind}s"
        raise ValueError(f"{path}: {n} labels, but {mesh.path} has {expected[kind]} {things} "
                         f"({F} triangles, {V} vertices); {cause}")
    if kind == "edge":
        return _majority(label[edge])
    if kind == "vertex":
        return _majority(label[mesh.faces])
    return label[mesh.polygon] if kind == "polygon" and mesh.polygon is not None else label


# --- writing --------------------------------------------------------------------------------------------------------

def write_labels(path: str | Path, label: np.ndarray) -> None:
    """Write (F,) integers, one per line (.txt) or as int64 array (.npy). Values as the file has them, ignored too."""
    path = Path(path)
    label = np.asarray(label)
    if label.ndim != 1 or label.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels to write must be a row of integers, not {label.dtype} {label.shape}")
    if path.suffix.lower() == ".npy":
        np.save(path, label.astype(np.int64))
    elif path.suffix.lower() == ".txt":
        path.write_text("".join(f"{v}\n" for v in label.tolist()))
    else:
        raise ValueError(f"{path}: labels are written as .txt or .npy")


def write_ply(path: str | Path, vertices: np.ndarray, faces: np.ndarray, face_color: np.ndarray,
              label: np.ndarray | None = None) -> None:
    """Write a binary PLY with a colour, and an int property `label`, per face, faces in the given order.

    vertices (V, 3), kept as doubles; faces (F, 3); face_color (F, 3) uint8; label (F,), values as the file shall
    have them. MeshLab and trimesh show the colours; Blender knows colours of vertices only: give it write_glb's file.
    """
    _check_colors(path, faces, face_color)
    vertex = np.zeros(len(vertices), [(axis, "<f8") for axis in "xyz"])
    for i, axis in enumerate("xyz"):
        vertex[axis] = np.asarray(vertices)[:, i]
    fields = [("length", "u1"), ("corner", "<i4", 3), ("color", "u1", 3), ("label", "<i4")]
    face = np.zeros(len(faces), fields[:3] if label is None else fields)
    face["length"], face["corner"], face["color"] = 3, faces, face_color
    if label is not None:
        face["label"] = label
    header = ["ply", "format binary_little_endian 1.0",
              f"element vertex {len(vertex)}", *(f"property double {axis}" for axis in "xyz"),
              f"element face {len(face)}", "property list uchar int vertex_indices",
              *(f"property uchar {color}" for color in ("red", "green", "blue")),
              *([] if label is None else ["property int label"]), "end_header", ""]
    Path(path).write_bytes("\n".join(header).encode() + vertex.tobytes() + face.tobytes())


def write_glb(path: str | Path, vertices: np.ndarray, faces: np.ndarray, face_color: np.ndarray) -> None:
    """Write a GLB that shows the faces in their colours in any viewer; arguments as in write_ply, same order of faces.

    glTF knows colours of vertices only, so every face gets three vertices of its own. Its coordinates are 32-bit
    floats, so they are stored relative to the middle of the mesh and moved back by the node: UTM stays precise.
    (trimesh loads the colours with skip_materials=True only.)
    """
    _check_colors(path, faces, face_color)
    vertices = np.asarray(vertices, np.float64)
    middle = (vertices.min(0) + vertices.max(0)) / 2
    mesh = trimesh.Trimesh((vertices - middle)[faces].reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3),
                           vertex_colors=np.repeat(face_color, 3, axis=0), process=False)
    scene = trimesh.Scene()
    scene.add_geometry(mesh, transform=trimesh.transformations.translation_matrix(middle))

    def make_matt(tree: dict) -> None:              # without a material glTF's default applies: bare metal, one-sided
        tree["materials"] = [{"pbrMetallicRoughness": {"metallicFactor": 0.0}, "doubleSided": True}]
        for primitive in (p for m in tree["meshes"] for p in m["primitives"]):
            primitive["material"] = 0

    Path(path).write_bytes(scene.export(file_type="glb", tree_postprocessor=make_matt))


def _check_colors(path: str | Path, faces: np.ndarray, face_color: np.ndarray) -> None:
    if face_color.shape != (len(faces), 3) or face_color.dtype != np.uint8:
        raise ValueError(f"{path}: face_color must be uint8 ({len(faces)}, 3), "
                         f"not {face_color.dtype} {face_color.shape}")
