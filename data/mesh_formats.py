"""The parsers behind data/mesh_io.py: what is written in an OBJ, OFF, PLY, STL or GLB file, polygons as they are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from data.columns import BOM, blocks, parse_numbers, ply_columns
from data.mesh_glb import glb_triangles

PLY_CORNERS = ("vertex_indices", "vertex_index")
STL_FACET = np.dtype([("normal", "<f4", 3), ("corner", "<f4", (3, 3)), ("attribute", "<u2")])
STL_TEXT = re.compile(rb"(?i)\bfacet(?:\s+normal(?:\s+\S+){3})?\s+outer\s+loop"
                      + 3 * rb"\s+vertex[ \t]+(\S+[ \t]+\S+[ \t]+\S+)" + rb"\s+endloop\s+endfacet\b")
NAMING = (b"usemtl", b"mtllib", b"g", b"o")                   # keywords of an OBJ with a name behind them

Parsed = tuple[np.ndarray, np.ndarray, np.ndarray, dict | None]
# vertices (V, 3); the corners of all faces in a row; how many each face has; the columns of a PLY, see Mesh.properties


def read_obj(path: Path) -> Parsed:
    text = obj_text(path)
    parsed = _parse_obj(text)
    return parsed if parsed is not None else _parse_obj_by_line(text, path)


def obj_text(path: Path) -> bytes:
    """The bytes of an OBJ or MTL file with line ends as \\n and one at its end."""
    return path.read_bytes().removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\n"


def plain_lines(text: bytes) -> bytes:
    """An OBJ's text without comments and indents, continued lines joined. Lines of names (NAMING) keep what follows a
    #: it may belong to the name, as in "Material #25"."""
    def comment(found):
        line = text[text.rfind(b"\n", 0, found.start()) + 1:found.start()].split(None, 1)
        return found[0] if line[:1] and line[0] in NAMING else b""

    if b"#" in text:
        text = re.sub(rb"#[^\n]*", comment, text)
    if b"\\" in text:
        text = re.sub(rb"\\[ \t]*\n", b" ", text)
    if b"\n " in text or b"\n\t" in text or text[:1] in (b" ", b"\t"):
        text = re.sub(rb"(?m)^[ \t]+", b"", text)
    return text


def obj_names(path: Path, kind: str) -> tuple[list[str], np.ndarray]:
    """The names in an OBJ, and the number of each face's name, (P,) int64, -1 for none, as after a keyword without a
    name. kind material (usemtl) or group (g, or o where there is no g)."""
    text = plain_lines(obj_text(path))
    keyword = b"usemtl" if kind == "material" else b"g" if re.search(rb"(?m)^g(?!\S)", text) else b"o"
    names, number, current = {}, [], -1
    for match in re.finditer(rb"(?m)^(f|" + keyword + rb")(?!\S)([^\n]*)", text):
        if match[1] == b"f":
            number.append(current)
        else:
            name = text_name(match[2])
            current = names.setdefault(name, len(names)) if name else -1
    return list(names), np.array(number, np.int64)


def text_name(text: bytes) -> str:
    """A name in a file: UTF-8, else Latin-1; no quotes, / for a backslash. Only a # between blanks begins a comment."""
    try:
        text = text.decode()
    except UnicodeDecodeError:
        text = text.decode("latin-1")
    return re.sub(r"(^|\s)#(\s.*)?$", "", text).strip().strip('"').replace("\\", "/")


def _parse_obj(text: bytes) -> Parsed | None:
    """The `v` and `f` lines of an OBJ at numpy's speed. None where anything is odd, the slow parser's matter."""
    values, corners, sides = [], [], []
    seen = 0
    for block in blocks(plain_lines(text) + b"\n", 1 << 20):              # of a size that stays in the cache
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


def read_off(path: Path) -> Parsed:
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


def read_ply(path: Path) -> Parsed:
    columns = ply_columns(path)[0]
    if any(axis not in columns.get("vertex", {}) for axis in "xyz"):
        raise ValueError(f"{path}: cannot be read as PLY (no vertices with x, y and z); is it cut short or damaged?")
    vertices = np.stack([columns["vertex"][axis][0] for axis in "xyz"], 1).astype(np.float64)
    face = columns.get("face", {})
    index = next((face[n] for n in PLY_CORNERS if n in face), (np.empty(0), np.empty(0)))
    properties = {element: {name: values for name, (values, length) in columns.get(element, {}).items()
                            if length is None} for element in ("vertex", "face")}
    return vertices, _indices(index[0], path), _indices(index[1], path), properties


def _indices(value: np.ndarray, path: Path) -> np.ndarray:
    """value as int64; ValueError for what cannot be the number of a vertex or of corners, as 1.5."""
    if value.dtype.kind == "f" and not ((np.abs(value) < 2 ** 53) & (value == np.round(value))).all():       # NaN too
        raise ValueError(f"{path}: a face has an index that is no whole number; repair the file")
    return value.astype(np.int64)


def read_stl(path: Path) -> Parsed:
    data = path.read_bytes()
    count = int.from_bytes(data[80:84], "little")
    if len(data) == 84 + count * STL_FACET.itemsize:                       # binary, even where it begins with "solid"
        vertices = np.frombuffer(data, STL_FACET, count, 84)["corner"].reshape(-1, 3).astype(np.float64)
    else:
        vertices = _stl_text(data, path)
    faces = np.arange(len(vertices))
    if len(vertices):                               # three a face in the file: merged where exactly equal
        order = np.lexsort(vertices.T)
        new = np.append(True, (vertices[order[1:]] != vertices[order[:-1]]).any(1))
        faces[order] = np.cumsum(new) - 1
        vertices = vertices[order[new]]
    return vertices, faces, np.full(len(faces) // 3, 3), None


def _stl_text(data: bytes, path: Path) -> np.ndarray:
    """The corners (3 F, 3) of all facets of all solids of a text file. Lines of names may hold any words."""
    corners = []
    body, named = re.subn(rb"(?im)^[ \t]*(end)?solid(?!\S)[^\n]*", b"", data.removeprefix(BOM).replace(b"\r", b"\n"))
    rest = STL_TEXT.sub(lambda facet: corners.extend(facet.groups()) or b"", body)
    odd = re.search(rb"(?i)\b(facet|vertex|outer|loop|endloop|endfacet)\b", rest)
    parsed = parse_numbers(b"\n".join(corners), np.float64)
    if not named or named % 2 or odd or parsed is None or (parsed[1] != 3).any():
        raise ValueError(f"{path}: cannot be read as STL (neither binary of the size in its header, nor text in which "
                         f"each facet has three vertices and each solid its endsolid); is it cut short or damaged?")
    return parsed[0].reshape(-1, 3)


def read_glb(path: Path) -> Parsed:
    try:
        vertices, faces = glb_triangles(path)
    except NotImplementedError as error:
        raise ValueError(f"{path}: {error}, which cannot be read here; export it again, uncompressed") from error
    except Exception as error:                      # whatever a damaged file leads to
        raise ValueError(f"{path}: cannot be read as GLB ({type(error).__name__}: {error}); is it cut short or damaged?"
                         ) from error
    return vertices, faces.reshape(-1), np.full(len(faces), 3), None
