"""What inspect_data.py looks at in meshes with one label a face: see data/inspect_shapes.py for what clouds share.

The readers and refusals are those of training (data/mesh_io.py). F faces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from data.inspect_shapes import (
    ERRORS,
    add_pictures,
    class_names,
    classes_of,
    compare,
    examined,
    labels_of,
    shape_of,
)
from data.mesh_features import face_geometry, face_neighbors, weld
from data.mesh_io import MESH_SUFFIXES, find_label_file, list_meshes, read_labels, read_mesh
from data.mesh_operators import center_and_radius
from data.mesh_prepare import coarse_coordinates
from utils.fingerprint import digest
from utils.inspection import Inspection, check_names, sampled
from utils.losses import IGNORE_INDEX
from utils.render import label_colors, render_mesh

FAR_OFFSET = 1 << 40                        # so that read_labels takes negative numbers; it is taken off again
SMALL_AREA = 1e-12                          # of the square of the largest side: a face without area
MANY_ZERO = 0.005                           # share of such faces that is a doubt
FACES_SHOWN = 150_000                       # of a picture


def inspect_meshes(folders: Mapping[str, tuple], data: dict, most: int, workers: int, seed: int) -> Inspection:
    """folders {train: (mesh folder, label folder or None), ...}; data: num_classes, label_map, classes as flags give
    them, None where they are to be found out."""
    found = Inspection("Meshes", "faces")
    settings = found.settings = {**data, "suffixes": [], "recursive": False}
    for split, (folder, _) in folders.items():
        found.pairs[split] = _mesh_files(found, Path(folder), settings)
    label_dirs = {split: Path(label_dir or folder) for split, (folder, label_dir) in folders.items()}
    files = [(split, path) for split, listed in found.pairs.items() for path in listed]
    check_names(found, files)
    files = [(split, path) for split, listed in sampled(found, found.pairs, most, seed).items() for path in listed]
    places = [label_dirs[split] / path.parent.relative_to(folders[split][0]) for split, path in files]
    arguments = [(path, place) for (_, path), place in zip(files, places, strict=True)]
    records = examined(arguments, examine_mesh, workers, "looking at meshes")
    kind = _other_kind(records)
    if kind:
        settings["label_kind"] = kind
        found.add("doubt", "kind of labels", f"labels are one a {kind}, as of {files[0][1]}; planned: data.label_kind: "
                  f"{kind}")
        records = examined([(*pair, kind) for pair in arguments], examine_mesh, workers, "looking at meshes again")
    names = class_names(data["classes"], [folder for folder, _ in folders.values()], settings)
    compare(found, files, records, names, [])
    _check_surfaces(found, files, records)
    good = [i for i, record in enumerate(records) if "values" in record]
    textured = [records[i]["textured"] for i in good]
    middle = {name: float(np.median([records[i][name] for i in good] or [0.0])) for name in ("smooth", "open")}
    settings |= {"textured": sum(textured) > 0.5 * len(textured), "connected": middle["smooth"] > 0 and
                 middle["open"] < 0.02, "elements": [records[i]["elements"] for i in good]}
    found.facts += [("textured", f"{sum(textured)} of {len(textured)}"),
                    ("closed", f"{sum(records[i]['open'] == 0 for i in good)} of {len(good)}")]
    up = "auto" if settings["upright"] is None else "xyz"[settings["upright"]]
    draw = partial(_draw_mesh, colors=found.palette, meaning=settings["meaning"], up=up)
    found.draw = partial(add_pictures, found, files, records, seed, draw)
    return found


def _other_kind(records):
    """The data.label_kind that the refusals of most files propose, None where they do not."""
    proposed = Counter(match[1] for record in records
                       if (match := re.search(r"Then label_kind: (\w+)", record.get("label_problem", ""))))
    kind, count = next(iter(proposed.most_common(1)), (None, 0))
    return kind if 2 * count > len(records) else None


def _mesh_files(found, folder, settings):
    below = folder.is_dir() and not any(path.suffix.lower() in MESH_SUFFIXES for path in folder.iterdir())
    settings["recursive"] |= below and any(path.suffix.lower() in MESH_SUFFIXES for path in folder.glob("*/*"))
    try:
        return list_meshes(folder, settings["suffixes"], settings["recursive"])
    except ValueError:
        listed = list_meshes(folder, recursive=settings["recursive"], unique=False)
        counts = Counter(path.suffix.lower() for path in listed)
        settings["suffixes"] = [max(sorted(counts), key=counts.get)]
        found.add("note", "kinds of files", f"{folder}: files of one name with several endings "
                  f"({', '.join(f'{count} {suffix}' for suffix, count in counts.items())}); planned: data.suffixes: "
                  f"{settings['suffixes']}")
        return list_meshes(folder, settings["suffixes"], settings["recursive"])


def examine_mesh(path: Path, label_dir: Path, kind: str = "auto") -> dict:
    """A record of a mesh and its labels, of this data.label_kind; `problem`, `label_problem`: why training refuses
    it."""
    record = {"file": path}
    try:
        mesh = read_mesh(path)
        vertices, faces = weld(mesh.vertices, mesh.faces)
    except ERRORS as error:
        return record | {"problem": str(error) or type(error).__name__}
    centroid, normal, area = face_geometry(vertices, faces)
    neighbor = face_neighbors(faces)
    used = vertices[np.unique(faces)]
    middle, radius, note = center_and_radius(vertices, faces)
    record |= {
        **shape_of(used, middle), "elements": len(faces), "stray": note, "area": float(area.sum()),
        "coarse": coarse_coordinates(mesh.vertices, mesh.faces),
        "zero": int((area <= SMALL_AREA * np.ptp(used, axis=0).max() ** 2).sum()), "open": float((neighbor < 0).mean()),
        "turned": _wrong_winding(faces, neighbor), "digest": digest(used, faces),
        "volume": float(np.einsum("fi,fi->", centroid - middle, normal * area[:, None]) / 3),
        "parts": len(np.unique(faces)) / max(1, len(faces)), "textured": _has_texture(path)}
    try:
        label = read_labels(find_label_file(path, label_dir, kind), mesh, label_offset=FAR_OFFSET, kind=kind)
    except ERRORS as error:
        return record | {"label_problem": str(error)}
    label = np.where(label == IGNORE_INDEX, IGNORE_INDEX, label - FAR_OFFSET)
    pairs = np.stack([np.repeat(np.arange(len(faces)), 3), neighbor.ravel()])[:, neighbor.ravel() >= 0]
    return record | labels_of(label, (centroid - middle) / radius, pairs) | {"label": label}


def _wrong_winding(faces, neighbor):
    """Share of the neighbours that go round their common edge in the same direction."""
    face, edge = np.nonzero(neighbor >= 0)
    if not len(face):
        return 0.0
    other = faces[neighbor[face, edge]]
    start, end = faces[face, edge], faces[face, (edge + 1) % 3]
    same = ((other == start[:, None]) & (np.roll(other, -1, 1) == end[:, None])).any(1)
    return float(same.mean())


def _has_texture(path):
    """Whether an OBJ or PLY names pictures and has texture coordinates."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    return (b"mtllib" in head and b"\nvt " in head) or (path.suffix.lower() == ".ply" and b"TextureFile" in head[:4000])


def _check_surfaces(found, files, records):
    """Faces without area, windings, stray parts, openings."""
    good = [i for i, record in enumerate(records) if "area" in record]
    open_share = np.array([records[i]["open"] for i in good])
    closed = [i for i in good if records[i]["open"] < 0.01]
    inside_out = [i for i in closed if records[i]["volume"] < 0]
    wrong = np.array([records[i]["turned"] for i in good])
    for i, turned in zip(good, wrong, strict=True):
        split, path, record = *files[i], records[i]
        if record["zero"]:
            level = "doubt" if record["zero"] > MANY_ZERO * record["elements"] else "note"
            found.add(level, "zero-area faces", f"{path}: {record['zero']} of {record['elements']} zero-area faces; "
                      f"they are kept and labelled, and teach nothing", path)
        if record["coarse"]:
            found.add("doubt", "rounded coordinates", f"{path}: {record['coarse']}", path)
        if record["stray"]:
            found.add("doubt", "stray parts", f"{path}: stray specks: {record['stray']}", path)
        if turned > 0.02 and np.median(wrong) < 0.005:
            found.add("doubt", "winding", f"{path}: flipped normals: {100 * turned:.0f} % of neighbouring faces have "
                      f"opposite winding; repair it, or leave out the feature normal", path)
    few = len(inside_out) < 0.5 * len(closed)
    for i in inside_out if few else inside_out[:1]:
        split, path = files[i]
        found.add("doubt" if few and split == "train" else "note", "inside out", f"{path} ({split}): flipped normals: "
                  f"the closed surface is inside out{'' if few else f', as {len(inside_out)} of {len(closed)} are'}; "
                  f"turn its faces round, or leave out the feature normal", path)
    if len(good) > 4 and np.median(open_share) == 0:
        for i in np.flatnonzero(open_share > 0.02):
            found.add("note", "holes", f"{files[good[i]][1]}: {100 * open_share[i]:.0f} % of its edges are open or "
                      f"shared by three faces, others are closed", files[good[i]][1])


def _draw_mesh(path, record, colors, meaning, up):
    mesh = read_mesh(path)
    keep = slice(None, None, max(1, len(mesh.faces) // FACES_SHOWN))
    color = label_colors(classes_of(record["label"][keep], meaning), colors)
    return render_mesh(mesh.vertices, mesh.faces[keep], color, size=240, up=up)
