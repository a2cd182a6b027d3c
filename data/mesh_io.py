"""Reading and writing triangle meshes and their per-face labels, with faces ALWAYS in the order of the file.

Labels belong to faces by position alone, so a loader that reorders faces destroys them silently. trimesh reorders
faces of an OBJ with several materials (and of anything with quads), splits vertices of a textured PLY and refuses a
binary PLY that mixes triangles and quads, gives instances of a .glb in another order and leaves out solids of an .stl
that is cut short; all are therefore read here (data/mesh_formats.py, data/mesh_glb.py).
Degenerate, duplicate and non-manifold faces are kept: every one has a label.
"""

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trimesh

from data.columns import parse_npy, parse_numbers, plain_text, ply_properties
from data.label_map import LabelMap
from data.mesh_formats import obj_names, read_glb, read_obj, read_off, read_ply, read_stl
from data.mesh_polygons import triangulate
from utils.losses import IGNORE_INDEX

READERS = {".obj": read_obj, ".ply": read_ply, ".off": read_off, ".stl": read_stl, ".glb": read_glb}
MESH_SUFFIXES = tuple(READERS)
LABEL_FILES = ("{}.txt", "{}.npy", "{}_labels.npy", "{}.seg", "{}.eseg")
MORE_LABEL_FILES = ("{}_labels.txt", "{}.csv", "{}.json")
PLY_LABEL_NAMES = ("label", "labels", "class")
NAMED_KINDS = ("material", "group")
LABEL_KINDS = ("auto", "face", "polygon", "vertex", "edge", *NAMED_KINDS)


class Mesh(NamedTuple):
    """A mesh as its file has it, polygons cut into triangles."""
    vertices: np.ndarray            # (V, 3) float64
    faces: np.ndarray               # (F, 3) int64, in file order
    properties: dict | None         # of a PLY: {"vertex": {name: (V,)}, "face": {name: (polygons,)}}, raw
    polygon: np.ndarray | None      # (F,) int64, the file's face each triangle came from; None: triangles only
    path: str
    slot: np.ndarray | None = None  # (F, 3) int64, where the corners stand in the row of all the file's face corners


# --- meshes ---------------------------------------------------------------------------------------------------------

def read_mesh(path: str | Path) -> Mesh:
    """Read a mesh file (MESH_SUFFIXES) with its faces in file order.

    Polygons become triangles (data/mesh_polygons.py). Vertices of .stl (three per face in the file) are merged where
    exactly equal. A .glb gives its meshes in file order, each placed by its node (twice if two nodes show it).
    Raises FileNotFoundError, and ValueError for an unknown suffix, a corrupt file, a glTF extension that is not
    understood, no faces, a NaN or infinite coordinate, a face with fewer than three corners or with an index out of
    range.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        nearest = difflib.get_close_matches(suffix, MESH_SUFFIXES, 1, 0.5)
        raise ValueError(f"{path}: '{suffix}' is not a mesh suffix known here, use one of {' '.join(MESH_SUFFIXES)}"
                         + (f" (did you mean {nearest[0]}?)" if nearest else ""))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mesh file; check the path")
    vertices, corner, count, properties = READERS[suffix](path)
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
    slot, polygon = triangulate(vertices, corner, count)
    return Mesh(vertices, corner[slot], properties, polygon, str(path), slot)


def list_meshes(mesh_dir: str | Path, suffixes: Sequence[str] = (), recursive: bool = False,
                unique: bool = True) -> list[Path]:
    """The mesh files of a folder (no hidden ones), with recursive also those of its sub-folders, sorted; suffixes
    (".obj") chooses among MESH_SUFFIXES, () takes all.

    Raises FileNotFoundError, and ValueError for a folder without meshes and, if they shall be `unique`, with two meshes
    of one stem, which would share a label file.
    """
    mesh_dir = Path(mesh_dir)
    if not mesh_dir.is_dir():
        raise FileNotFoundError(f"{mesh_dir}: no such folder of meshes; check the path")
    paths = sorted(p for p in (mesh_dir.rglob("*") if recursive else mesh_dir.iterdir())
                   if p.suffix.lower() in (suffixes or MESH_SUFFIXES) and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(mesh_dir).parts))
    if not paths:
        below = not recursive and any(p.suffix.lower() in MESH_SUFFIXES for p in mesh_dir.glob("*/*"))
        raise ValueError(f"{mesh_dir}: no mesh in this folder (looked for {' '.join(suffixes or MESH_SUFFIXES)})"
                         + ("; the folders in it have some: data.recursive=true reads them" if below else ""))
    stems = {}
    for path in paths if unique else ():
        if stems.setdefault(path.with_suffix(""), path) != path:
            raise ValueError(f"{path.parent}: {stems[path.with_suffix('')].name} and {path.name} would share a label "
                             f"file; keep one, or choose the kind by data.suffixes, as [{path.suffix.lower()}]")
    return paths


# --- labels ---------------------------------------------------------------------------------------------------------

def find_label_file(mesh_path: str | Path, label_dir: str | Path, kind: str = "auto", field: str | None = None) -> Path:
    """Where the labels of a mesh are: a file in label_dir (LABEL_FILES, of which one may be there), else a PLY itself,
    else another file (MORE_LABEL_FILES).

    With a `field`, and for the kinds material and group, the mesh file itself. The mesh file is read for labels only
    where label_dir is its own folder: to name another one is to choose other labels. Raises FileNotFoundError for none,
    ValueError for two, for a mesh file that has no such field, and for settings that name the mesh file and another
    label_dir.
    """
    mesh_path, label_dir = Path(mesh_path), Path(label_dir)
    is_ply = mesh_path.suffix.lower() == ".ply"
    beside = label_dir.resolve() == mesh_path.parent.resolve()
    if kind in NAMED_KINDS or (field is not None and is_ply):
        if not beside:
            setting, other = (("label_kind", kind), "face") if kind in NAMED_KINDS else (("label_field", field), "null")
            raise ValueError(f"{mesh_path}: data.{'='.join(setting)} reads the labels in this file, not those in "
                             f"{label_dir}; leave that folder out, or set data.{setting[0]}={other}")
        return mesh_path
    properties = ply_properties(mesh_path) if is_ply else {}
    inside = is_ply and _ply_field(properties, kind, None) is not None
    for patterns in (LABEL_FILES, MORE_LABEL_FILES):
        names = [pattern.format(mesh_path.stem) for pattern in patterns]
        found = [label_dir / name for name in names if (label_dir / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{mesh_path}: {' and '.join(map(str, found))} both look like its labels; keep one")
        if found:
            return found[0]
        if inside and beside:
            return mesh_path
    names = [pattern.format(mesh_path.stem) for pattern in (*LABEL_FILES, *MORE_LABEL_FILES)]
    where = label_dir if label_dir.is_dir() else f"{label_dir} (no such folder)"
    hint = f" and in the PLY for {_no_field(properties, kind, None)}" if is_ply else ""
    if inside:
        hint = "; those in the PLY are read where no other folder is named"
    raise FileNotFoundError(f"{mesh_path}: no labels; looked in {where} for {', '.join(names)}{hint}")


def _ply_field(properties: Mapping[str, Collection[str]], kind: str, field: str | None) -> tuple[str, str] | None:
    """(element, property) of a PLY that holds its labels; without a `field` one of PLY_LABEL_NAMES in any case, or with
    CloudCompare's scalar_ before it."""
    for element in {"vertex": ("vertex",), "auto": ("face", "vertex")}.get(kind, ("face",)):
        for wanted in PLY_LABEL_NAMES if field is None else (field,):
            for name in properties.get(element, ()):
                if name == field or (field is None and name.lower().removeprefix("scalar_") == wanted):
                    return element, name
    return None


def _no_field(properties: Mapping[str, Collection[str]], kind: str, field: str | None) -> str:
    """What an error says of a PLY without labels."""
    element = "vertex" if kind == "vertex" else "face"
    there = [name for name in properties.get(element, ()) if name not in ("x", "y", "z")]
    return (f"a {element} property {field or ', '.join(PLY_LABEL_NAMES)}"
            + (f" (it has {', '.join(there)}: name one in data.label_field)" if there else ""))


def read_labels(path: str | Path, mesh: Mesh, num_classes: int | None = None, label_offset: int = 0,
                ignore_labels: Sequence[int | str] = (), kind: str = "auto", field: str | None = None,
                names: Sequence[str] = (), label_map: LabelMap | None = None) -> np.ndarray:
    """The label of every face of a mesh: (F,) int64 in 0..num_classes-1, or IGNORE_INDEX. A polygon is one face: its
    triangles have its label.

    path           .txt .seg .eseg .csv (numbers, white space or commas between, # begins a comment; `face label` pairs,
                   one a line), .npy, .json (a list, or one under "labels"), the mesh's own .ply or, by name, .obj.
    label_offset   added to the file's values: -1 for a file that counts classes from 1.
    ignore_labels  the file's values (before the offset) that become IGNORE_INDEX; -100 always does.
    kind           what the file labels. "auto": faces, or edges if it is an .eseg. "face", also one a triangle: then,
                   as for "vertex" (its corners) and "edge", a face takes the majority, of equally many the smallest.
                   Edges are those of the triangles, in order of first appearance, corners (0,1), (1,2), (2,0), as in
                   MeshCNN. "material", "group": names in an OBJ, whose place in `names` is their class.
    field          the property of a PLY; None: label, labels or class, of faces or, for "auto", vertices.
    label_map      value -> class, in place of label_offset.

    Labels are never shifted, cut or padded to fit: ValueError for a wrong number of them (names the likely cause),
    for a value outside 0..num_classes-1, and for anything that is not an integer.
    """
    path = Path(path)
    if kind not in LABEL_KINDS:
        raise ValueError(f"label_kind: {kind!r} is none of {', '.join(LABEL_KINDS)}")
    if kind in NAMED_KINDS:
        return _to_faces(_named_labels(path, kind, names, ignore_labels), mesh, "face", path)
    if path.suffix.lower() == ".ply":
        properties = (mesh if path == Path(mesh.path) else read_mesh(path)).properties
        found = _ply_field(properties, kind, field)
        if found is None:
            raise ValueError(f"{path}: no labels in it, it has not {_no_field(properties, kind, field)}; give a label "
                             f"file")
        kind = found[0]
        label = _as_integers(properties[kind][found[1]], path)
    else:
        counts = (len(mesh.faces), len(mesh.vertices), *(() if mesh.polygon is None else mesh.polygon[-1:] + 1))
        label = _as_integers(_read_label_file(path, counts), path)
    if label_map is not None:
        known = label != IGNORE_INDEX
        label[known] = label_map.ignoring(ignore_labels).to_labels(label[known], path)
        return _to_faces(label, mesh, kind, path)
    ignored = np.isin(label, [*ignore_labels, IGNORE_INDEX])
    label = np.where(ignored, IGNORE_INDEX, label + label_offset)
    check_label_range(label[~ignored], path, num_classes, label_offset)
    return _to_faces(label, mesh, kind, path)


def label_names(files: Sequence[Path], kind: str, ignored: Sequence[str] = ()) -> list[str]:
    """The materials or groups that faces of these OBJ files have, sorted."""
    found = set()
    for path in files:
        names, number = _names_of_faces(path, kind)
        found |= {names[i] for i in np.unique(number) if i >= 0}
    return sorted(found - set(ignored))


def _names_of_faces(path: Path, kind: str) -> tuple[list[str], np.ndarray]:
    if path.suffix.lower() != ".obj":
        raise ValueError(f"{path}: data.label_kind: {kind} reads the names in OBJ files; use another kind")
    return obj_names(path, kind)


def _named_labels(path: Path, kind: str, names: Sequence[str], ignored: Sequence[str]) -> np.ndarray:
    """The class of every face of an OBJ by its material or group, IGNORE_INDEX where it has none."""
    own, number = _names_of_faces(path, kind)
    classes = np.array([*(names.index(name) if name in names else IGNORE_INDEX for name in own), IGNORE_INDEX])
    for i in np.unique(number):
        if i >= 0 and classes[i] < 0 and own[i] not in ignored:
            raise ValueError(f"{path}: {kind} {own[i]!r} ({(number == i).sum()} faces) is none of data.class_names: "
                             f"{', '.join(names) or '(empty)'}; add it there or to data.ignore_labels")
    return classes[number]


def _read_label_file(path: Path, counts: Collection[int]) -> np.ndarray:
    """The numbers in a label file; counts: of labels that would fit the mesh."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such label file; check the path")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            label = parse_npy(np.memmap(path, np.uint8, "r"))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read as an array ({error}); save it with numpy.save") from error
        if label.dtype.kind not in "biuf" or max(label.shape, default=1) != label.size:
            raise ValueError(f"{path}: {label.dtype} {label.shape}; one number per face is expected, not scores")
        return label.reshape(-1)
    if suffix == ".json":
        return _json_labels(path)
    if suffix not in (".txt", ".seg", ".eseg", ".csv"):
        raise ValueError(f"{path}: '{path.suffix}' is no label suffix; use .txt .npy .seg .eseg .csv .json or a .ply "
                         f"with labels")
    text = plain_text(path).replace(b"\r", b"\n")
    text = re.sub(rb"#[^\n]*", b"", text).replace(b",", b" ").replace(b";", b" ")
    first, _, rest = text.lstrip().partition(b"\n")
    header = re.fullmatch(rb"[A-Za-z_][A-Za-z_ \t\"]*", first.strip())      # such as `face label`
    parsed = None if b"/" in text else parse_numbers(text, np.float64) or (header and parse_numbers(rest, np.float64))
    if parsed is not None:
        return _without_face_numbers(*parsed, counts, path)
    for number, line in enumerate(text.decode(errors="replace").split("\n"), 1):
        for word in line.split():
            try:
                float(word)
            except ValueError:
                raise ValueError(f"{path}: line {number}: {word[:40]!r} is not a number; labels are integers with "
                                 f"white space between them") from None
    raise ValueError(f"{path}: cannot be read as numbers")


def _without_face_numbers(value: np.ndarray, count: np.ndarray, counts: Collection[int], path: Path) -> np.ndarray:
    """The labels of `face label` lines, in the order of the faces: where every line has two numbers and the first ones
    are 0 to n-1, or 1 to n, and n labels fit the mesh or all the numbers would not. All numbers else; ValueError for n
    other lines where n labels fit and 2 n too, as of a mesh of quads with `label instance` lines."""
    n = len(value) // 2
    lines, numbers = n in counts, len(value) in counts
    if n == 0 or (numbers and not lines) or not np.isin(count, (0, 2)).all():
        return value
    face, label = value.reshape(-1, 2).T
    order = np.argsort(face, kind="stable")
    if np.array_equal(face[order] - face.min(), np.arange(n)) and face.min() in (0, 1):
        return label[order]
    if lines and numbers:
        raise ValueError(f"{path}: {n} lines of two numbers, and both {n} and {2 * n} labels would fit the mesh; write "
                         f"one label a line, or `face label` lines that name every face once")
    return value


def _json_labels(path: Path) -> np.ndarray:
    try:
        content = json.loads(plain_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({' '.join(str(error).split())[:120]})") from error
    label = content.get("labels") if isinstance(content, dict) else content
    if not isinstance(label, list) or not all(type(value) in (int, float) for value in label):
        raise ValueError(f"{path}: expected a list of numbers, or one under \"labels\"")
    return np.array(label, np.float64)


def _as_integers(label: np.ndarray, path: Path) -> np.ndarray:
    """label as int64; ValueError for an empty array and for values that are not whole numbers."""
    if len(label) == 0:
        raise ValueError(f"{path}: no labels in it; one label per face is expected")
    if label.dtype.kind == "f":
        label = label.astype(np.float64)                                   # 16 bits do not hold 2 ** 53
        wrong = ~(np.abs(label) < 2 ** 53) | (label != np.round(label))    # NaN too
        if wrong.any():
            raise ValueError(f"{path}: {wrong.sum()} of {len(label)} labels are no integers, the first is number "
                             f"{np.argmax(wrong)} (from 0): {label[wrong][0]:g}; labels are class numbers")
    return label.astype(np.int64)                   # a copy


def check_label_range(label: np.ndarray, path: Path, num_classes: int | None, label_offset: int) -> None:
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
        hint += "" if label_offset else "; if files have numbers of their own, label_map"
    raise ValueError(f"{path}: unknown label {shown}; {hint}")


def _edges(faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Number of the edge between corners (0,1), (1,2), (2,0) of each face, (F, 3), by first appearance; how many."""
    pair = np.sort(np.stack([faces, np.roll(faces, -1, 1)], -1).reshape(-1, 2), 1)
    _, first, inverse = np.unique(pair[:, 0] * (faces.max() + 1) + pair[:, 1], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].reshape(-1, 3), len(first)


def _majority(label: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The most frequent label of each group; of equally frequent ones the smallest that is not ignored. label (n,),
    group (n,) -> (G,), for groups 0..G-1 that all occur."""
    order = np.lexsort((label, group))
    label, group = label[order], group[order]
    first = np.flatnonzero((np.diff(label, prepend=label[0]) != 0) | (np.diff(group, prepend=-1) != 0))
    votes = np.diff(np.append(first, len(label)))
    label, group = label[first], group[first]
    order = np.lexsort((label, label == IGNORE_INDEX, -votes, group))
    return label[order][np.flatnonzero(np.diff(group[order], prepend=-1))]


def _to_faces(label: np.ndarray, mesh: Mesh, kind: str, path: Path) -> np.ndarray:
    """label per face of the file, triangle, vertex or edge -> (F,): all triangles of a polygon have one."""
    F, V, n = len(mesh.faces), len(mesh.vertices), len(label)
    polygon = np.arange(F) if mesh.polygon is None else mesh.polygon
    polygons = int(polygon[-1]) + 1
    if kind == "auto":
        kind = "edge" if path.suffix.lower() == ".eseg" else "face"
    expected = {"face": polygons, "polygon": polygons, "vertex": V}
    if Path(mesh.path).suffix.lower() == ".stl":                            # every reader numbers its vertices anew
        if kind == "vertex":
            raise ValueError(f"{path}: labels per vertex, but the vertices of {mesh.path} have no order; label its "
                             f"faces, or save the mesh that was labelled as .ply")
        del expected["vertex"]
    if kind == "face" and n == F:
        expected["face"] = F                                                # one a triangle
    if kind == "edge" or n != expected[kind]:
        edge, expected["edge"] = _edges(mesh.faces)
    if n != expected[kind]:
        same = [k for k in ("face", "vertex", "edge") if expected.get(k) == n]
        if same:
            cause = f"one per {same[0]}? Then label_kind: {same[0]}"
        elif abs(n - expected[kind]) <= max(10, expected[kind] // 100):
            cause = "did an exporter drop or add degenerate or duplicate faces? Label the mesh file itself"
        else:
            cause = "was the mesh simplified or changed after labelling?"
        things = "vertices" if kind == "vertex" else f"{kind}s"
        raise ValueError(f"{path}: {n} labels, but {mesh.path} has {expected[kind]} {things} "
                         f"({F} triangles, {V} vertices); {cause}")
    if kind == "vertex":
        group, corner = np.repeat(polygon, 3), mesh.faces.ravel()
        if mesh.polygon is not None:                                        # each corner votes once
            group, corner = np.divmod(np.unique(group * V + corner), V)
        label = _majority(label[corner], group)
    elif kind == "edge":
        label = _majority(label[edge].ravel(), np.repeat(polygon, 3))
    elif n == polygons:
        return label[polygon]
    else:
        label = _majority(label, polygon)
    return label[polygon]


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
