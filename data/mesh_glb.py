"""The triangles of a binary glTF 2.0 file (.glb), which Khronos' specification describes: what its scene shows.

Meshes come in the order of the file, each once for every node that shows it, nodes in the order of the file. Materials,
skins, animations and morph targets change no face and are passed over.
"""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from trimesh.transformations import quaternion_matrix

INSTANCING = "EXT_mesh_gpu_instancing"             # without it, one of many copies would be there
UNDERSTOOD = ("KHR_mesh_quantization",)
NO_GEOMETRY = ("KHR_materials_", "KHR_texture_", "EXT_texture_", "MSFT_texture_", "KHR_lights_", "EXT_lights_",
               "KHR_xmp", "KHR_animation_")
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC3": 3}                  # of the accessors that are read: indices and positions
ELEMENTS_A_BYTE = 20                               # of an accessor that begins as zeros, for the whole file
LINES = (0, 1, 2, 3)                               # modes of a primitive that has no triangles


def glb_triangles(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64, faces (F, 3) int64. Raises whatever a damaged file leads to, and NotImplementedError,
    naming them, for extensions without which the file cannot be understood."""
    tree, buffers = _contents(path)
    unknown = [name for name in tree.get("extensionsRequired", [])
               if name not in UNDERSTOOD and not str(name).startswith(NO_GEOMETRY)]
    if unknown:
        raise NotImplementedError(f"needs the extension {', '.join(map(str, unknown))}")
    places = _places(tree)
    vertices, faces, total = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], 0
    for number, mesh in enumerate(tree.get("meshes", [])):
        shown = places.get(number, ())
        parts = [part for primitive in mesh["primitives"] if shown
                 for part in [_primitive(tree, buffers, primitive)] if part is not None]
        for matrix in shown:
            for points, corner in parts:
                vertices.append(points @ matrix[:3, :3].T + matrix[:3, 3])
                # a reflection turns the winding round
                faces.append(total + (corner if np.linalg.det(matrix[:3, :3]) >= 0 else corner[:, ::-1]))
                total += len(points)
    return np.concatenate(vertices), np.concatenate(faces)


def outside_buffers(path: Path, data: bytes) -> list[Path]:
    """The files in which a .glb of this content keeps buffers; [] for other files, and for a damaged one."""
    if path.suffix.lower() != ".glb" or b'"uri"' not in data:
        return []
    try:
        found = [_outside(path, buffer.get("uri")) for buffer in _chunks(data)[0]["buffers"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []                                          # the reader says what is wrong
    return [file for file in found if file is not None and file.is_file()]


def _outside(path, uri):
    return None if uri is None or uri.startswith("data:") else path.parent / unquote(uri)


def _chunks(data):
    """The JSON tree, and the binary part or None."""
    if data[:4] != b"glTF":
        raise ValueError("no glTF header")
    tree, binary, at = None, None, 12
    while at + 8 <= len(data):
        length, kind = struct.unpack_from("<I4s", data, at)
        if length > len(data) - at - 8:
            raise ValueError(f"a chunk of {length} bytes, {len(data) - at - 8} are left")
        chunk = data[at + 8:at + 8 + length]
        if kind == b"JSON" and tree is None:
            tree = json.loads(chunk)
        elif kind == b"BIN\0" and binary is None:
            binary = chunk
        at += 8 + length
    return tree, binary


def _contents(path):
    """The JSON tree and the buffers, None for one without data."""
    data = path.read_bytes()
    tree, binary = _chunks(data)
    buffers = []
    for number, buffer in enumerate(tree.get("buffers", [])):
        uri = buffer.get("uri")
        if uri is None:
            buffers.append(binary if number == 0 else None)
        elif uri.startswith("data:"):
            buffers.append(base64.b64decode(uri.partition(",")[2]))
        else:
            buffers.append(_outside(path, uri).read_bytes())
    zeros = [accessor["count"] for accessor in tree.get("accessors", []) if "bufferView" not in accessor]
    if max(zeros, default=0) > ELEMENTS_A_BYTE * len(data):
        raise ValueError(f"an accessor counts more elements than the file can hold in its {len(data)} bytes")
    return tree, buffers


def _places(tree):
    """{mesh: [matrices (4, 4) of the nodes of the scene that show it, in the order of the nodes]}."""
    nodes = tree.get("nodes", [])
    scenes = tree.get("scenes", [])
    roots = scenes[tree.get("scene", 0)].get("nodes", []) if scenes else range(len(nodes))
    children = {child for node in nodes for child in node.get("children", [])}
    stack = [(root, np.eye(4)) for root in roots if scenes or root not in children]
    placed = {}
    while stack:
        number, above = stack.pop()
        if number in placed:
            raise ValueError(f"node {number} hangs in two places")
        node = nodes[number]
        placed[number] = above @ _matrix(node)
        stack += [(child, placed[number]) for child in node.get("children", [])]
    found = {}
    for number in sorted(placed):
        if "mesh" in nodes[number]:
            if INSTANCING in nodes[number].get("extensions", {}):          # the file need not require it
                raise NotImplementedError(f"needs the extension {INSTANCING}")
            found.setdefault(nodes[number]["mesh"], []).append(placed[number])
    return found


def _matrix(node):
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T             # column by column in the file
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    matrix = quaternion_matrix((w, x, y, z))
    matrix[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), float)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _primitive(tree, buffers, primitive):
    """Positions (V, 3) and triangles (F, 3) int64 of a primitive; None where it has no triangles."""
    mode = primitive.get("mode", 4)
    if mode in LINES or "POSITION" not in primitive["attributes"]:
        return None
    accessor = tree["accessors"][primitive["attributes"]["POSITION"]]
    if not {"bufferView", "sparse"} & set(accessor):
        raise _without_data(primitive)
    points = _values(tree, buffers, accessor).astype(np.float64)
    if accessor.get("normalized"):
        points = np.maximum(points / np.iinfo(COMPONENTS[accessor["componentType"]]).max, -1)
    if "indices" in primitive:
        corner = _values(tree, buffers, tree["accessors"][primitive["indices"]]).ravel().astype(np.int64)
    else:
        corner = np.arange(len(points))
    if len(corner) and corner.max() >= len(points):
        raise ValueError(f"an index {corner.max()} into {len(points)} vertices")
    if mode == 4:
        return points, corner.reshape(-1, 3)
    step = np.arange(len(corner) - 2)
    if mode == 5:                                          # a strip: every second triangle is turned
        order = np.stack([step, step + 1 + step % 2, step + 2 - step % 2], 1)
    elif mode == 6:
        order = np.stack([0 * step, step + 1, step + 2], 1)
    else:
        raise ValueError(f"a primitive of mode {mode}")
    return points, corner[order]


def _without_data(owner):
    names = ", ".join(owner.get("extensions", {}))
    what = f"data of the extension {names} alone" if names else "a buffer view without data"
    return NotImplementedError(f"has {what}")


def _values(tree, buffers, accessor):
    """(count, 1 or 3) values of an accessor, whole numbers as they are."""
    kind, width, count = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]], accessor["count"]
    if "bufferView" in accessor:
        values = _elements(tree, buffers, accessor, kind, width, count)
    else:
        values = np.zeros((count, width), kind)
    if sparse := accessor.get("sparse"):
        changed = np.dtype(COMPONENTS[sparse["indices"]["componentType"]])
        where = _elements(tree, buffers, sparse["indices"], changed, 1, sparse["count"]).ravel()
        values = values.copy()
        values[where] = _elements(tree, buffers, sparse["values"], kind, width, sparse["count"])
    return values


def _elements(tree, buffers, source, kind, width, count):
    view = tree["bufferViews"][source["bufferView"]]
    start = view.get("byteOffset", 0) + source.get("byteOffset", 0)
    stride = view.get("byteStride", width * kind.itemsize)
    buffer = buffers[view["buffer"]]
    if buffer is None:
        raise _without_data(view)
    return np.ndarray((count, width), kind, buffer, start, (stride, kind.itemsize))    # TypeError beyond its end
