"""What inspect_data.py looks at in meshes and clouds: files, labels, sizes, orientation, surfaces, duplicates.

The readers and refusals are those of training (data/mesh_io.py, data/point_files.py, data/point_values.py). Each file
becomes a record of plain numbers in a process of its own; what is odd is seen by comparing the records.
F faces, P points, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from data.image_splits import read_class_file
from data.label_map import LabelMap
from data.mesh_features import face_geometry, face_neighbors, weld
from data.mesh_io import MESH_SUFFIXES, check_label_range, find_label_file, list_meshes, read_labels, read_mesh
from data.mesh_operators import center_and_radius
from data.point_files import CLOUD_SUFFIXES, clouds_in, find_clouds, read_classes, read_cloud
from data.point_values import NAN_LABEL, to_labels
from utils.fingerprint import digest
from utils.inspection import (
    Inspection,
    Picture,
    check_classes,
    check_duplicates,
    check_names,
    sampled,
    spread,
)
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.render import label_colors, palette, render_mesh

ERRORS = (ValueError, OSError, MemoryError)
FAR_OFFSET = 1 << 40                        # so that read_labels takes negative numbers; it is taken off again
SMALL_AREA = 1e-12                          # of the square of the largest side: a face without area
MANY_ZERO = 0.005                           # share of such faces that is a doubt
NEIGHBORS_SEEN = 2000                       # points whose nearest neighbour's label is looked at
ROUGH = 0.15                                # so much less agreement of neighbours than usual, see _order, is odd
UNIT_RATIO, FEW_SHARE = 30, 0.06            # sizes that differ by more are other units; of fewer files a mistake
TURN_RATIO = 0.4                            # distance to the others after a turn, over that before
QUANTILES = np.linspace(0, 1, 33)
SAME_SHAPE = 2e-5                           # largest difference of the quantiles of two copies
UPRIGHT_RATIO = 1.2                         # how far classes lie apart, over how far files differ: all have one axis up
FACING = 1.25                               # squares that face the viewer are drawn darker by so much
PICTURES, POINTS_SHOWN, FACES_SHOWN = 6, 20_000, 150_000


# -- one file ----------------------------------------------------------------------------------------------------------

def examine_mesh(path: Path, label_dir: Path) -> dict:
    """A record of a mesh and its labels; `problem`, `label_problem`: why training refuses it."""
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
        **_shape(used, middle), "elements": len(faces), "stray": note, "area": float(area.sum()),
        "zero": int((area <= SMALL_AREA * np.ptp(used, axis=0).max() ** 2).sum()), "open": float((neighbor < 0).mean()),
        "turned": _wrong_winding(faces, neighbor), "digest": digest(used, faces),
        "volume": float(np.einsum("fi,fi->", centroid - middle, normal * area[:, None]) / 3),
        "parts": len(np.unique(faces)) / max(1, len(faces)), "textured": _has_texture(path)}
    try:
        label = read_labels(find_label_file(path, label_dir), mesh, label_offset=FAR_OFFSET)
    except ERRORS as error:
        return record | {"label_problem": str(error)}
    label = np.where(label == IGNORE_INDEX, IGNORE_INDEX, label - FAR_OFFSET)
    pairs = np.stack([np.repeat(np.arange(len(faces)), 3), neighbor.ravel()])[:, neighbor.ravel() >= 0]
    return record | _labels(label, (centroid - middle) / radius, pairs) | {"label": label}


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


def examine_cloud(path: Path, label_field: str | None = None) -> dict:
    """A record of a cloud; `problem`: why training refuses it."""
    record = {"file": path}
    try:
        cloud = read_cloud(path, label_field)
    except ERRORS as error:
        return record | {"problem": str(error) or type(error).__name__}
    coord = cloud.coord.astype(np.float64)
    middle = np.median(coord, 0)
    shape = _shape(coord, middle)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(coord))[:NEIGHBORS_SEEN]
    distance, nearest = cKDTree(coord, balanced_tree=False, compact_nodes=False).query(coord[chosen], min(2, len(coord)))
    distance, nearest = distance.reshape(len(chosen), -1), nearest.reshape(len(chosen), -1)
    peaks = [np.histogram(coord[:, axis], 100)[0].max() / len(coord) for axis in range(3)]
    far = np.quantile(np.linalg.norm(coord - middle, axis=1), 0.99) * 3
    record |= {
        **shape, "elements": len(coord), "warnings": cloud.warnings, "spacing": float(np.median(distance[:, -1])),
        "twice": float((distance[:, -1] == 0).mean()), "peaks": peaks, "digest": digest(cloud.coord),
        "stray": int((np.linalg.norm(coord - middle, axis=1) > far).sum()) if far else 0,
        "has": [name for name in ("color", "normal", "label") if getattr(cloud, name) is not None]}
    if cloud.normal is not None:
        out = np.sign((cloud.normal * (coord - middle)).sum(1)).mean()
        record |= {"outward": float(out), "upward": float(cloud.normal[:, 2].mean()),
                   "no_normal": int((cloud.normal == 0).all(1).sum())}
    if cloud.label is None:
        return record | {"label_problem": f"{path}: no labels"}
    scale = max(float(np.linalg.norm(shape["sides"])) / 2, 1e-12)
    return record | _labels(cloud.label, (coord - middle) / scale, np.stack([chosen, nearest[:, -1]]))


def _shape(points, middle):
    """Sides, and quantiles of the distances from the middle, which no turn, shift or scale changes."""
    distance = np.linalg.norm(points - middle, axis=1)
    return {"sides": np.ptp(points, axis=0).tolist(),
            "quantiles": (np.quantile(distance, QUANTILES) / max(float(np.sqrt((distance ** 2).mean())), 1e-30))}


def _labels(label, position, pairs):
    """values {number: elements}, places {number: mean position (3,)}, smooth: share of neighbours (2, n) of one label,
    rolled: the same where labels move by one element."""
    values, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
    places = np.stack([np.bincount(inverse, position[:, axis]) for axis in range(3)], 1) / counts[:, None]

    def agreement(values):
        return float((values[pairs[0]] == values[pairs[1]]).mean()) if pairs.shape[1] else 1.0
    return {"values": dict(zip(values.tolist(), counts.tolist(), strict=True)), "label_digest": digest(label),
            "places": dict(zip(values.tolist(), places, strict=True)), "smooth": agreement(label),
            "rolled": max(agreement(np.roll(label, step)) for step in (-1, 1))}


def _examined(files: Sequence[tuple], examine: Callable, workers: int, what: str) -> list[dict]:
    if workers < 2 or len(files) < 8:
        return [examine(*arguments) for arguments in progress(files, what)]
    with ProcessPoolExecutor(workers) as pool:
        return list(progress(pool.map(examine, *zip(*files, strict=True), chunksize=4), what, len(files)))


# -- data sets ---------------------------------------------------------------------------------------------------------

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
    records = _examined([(path, place) for (_, path), place in zip(files, places, strict=True)], examine_mesh, workers,
                        "looking at meshes")
    names = _class_names(data["classes"], [folder for folder, _ in folders.values()], settings)
    _compare(found, files, records, names, "model.n_classes", [])
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
    found.draw = partial(_add_pictures, found, files, records, seed, draw)
    return found


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


def inspect_clouds(root: str, data: dict, most: int, workers: int, seed: int) -> Inspection:
    """Clouds of the splits train, val and test of a root as train_sonata.py has it; data: see inspect_meshes."""
    found = Inspection("Point clouds", "points")
    settings = found.settings = dict(data)
    for split in ("train", "val", "test"):
        try:
            found.pairs[split] = find_clouds(root, split)
        except ValueError as error:
            if split == "train" and not Path(root, "train").exists() and not Path(root, "splits.json").exists():
                found.pairs[split] = clouds_in(Path(root))
                found.add("note", "no splits", f"{root}: no folder train and no splits.json; all its clouds are taken "
                          f"for training; planned: a splits.json beside the plan")
            elif split == "train" or not any(words in str(error) for words in ("no split", "is empty")):
                raise
    if not found.pairs["train"]:
        raise ValueError(f"{root}: no clouds; expected {' '.join(CLOUD_SUFFIXES)} files or folders with coord.npy in "
                         f"train, val ... or named by splits.json")
    files = [(split, path) for split, listed in found.pairs.items() for path in listed]
    check_names(found, files)
    files = [(split, path) for split, listed in sampled(found, found.pairs, most, seed).items() for path in listed]
    records = _examined([(path,) for _, path in files], examine_cloud, workers, "looking at clouds")
    names = _class_names(data["classes"], [root], settings)
    _compare(found, files, records, names, "model.num_classes", [-1])
    _check_points(found, files, records)
    good = [i for i, record in enumerate(records) if "values" in record]
    settings |= {"spacing": float(np.median([records[i]["spacing"] for i in good])) if good else 0.01,
                 "sides": np.median([records[i]["sides"] for i in good], 0).tolist() if good else [1.0] * 3,
                 "elements": [records[i]["elements"] for i in good],
                 "has": [name for name in ("color", "normal") if good and np.mean(
                     [name in records[i]["has"] for i in good]) > 0.5]}
    draw = partial(_draw_cloud, colors=found.palette, meaning=settings["meaning"])
    found.draw = partial(_add_pictures, found, files, records, seed, draw)
    return found


def _class_names(given, folders, settings):
    """Names and colours of the class file that is given, or lies in a folder of the data or above it."""
    places = [Path(folder) / up / "classes.json" for folder in folders for up in ("", "..")]
    path = Path(given) if given else next((place for place in places if place.is_file()), None)
    settings["classes"] = path
    if path is None:
        return None
    if path.suffix.lower() != ".json":
        return (*read_class_file(path), ())
    listed = read_classes(path)
    return listed.names, listed.palette, listed.ignore_labels


# -- what numbers mean -------------------------------------------------------------------------------------------------

def find_numbers(found: Inspection, files: Sequence[tuple[str, Path]], records: Sequence[Mapping],
                 names: Sequence[str] | None, ignored: Sequence[int], key: str) -> None:
    """Set num_classes, label_offset, label_map and ignore_labels in found.settings by the numbers in the files."""
    settings = found.settings
    values = Counter(value for record in records for value in record.get("values", {}))
    total = sum("values" in record for record in records)
    known = [value for value in sorted(values) if value not in (IGNORE_INDEX, NAN_LABEL)
             and not (total >= 5 and values[value] == 1 and value not in (-1, 255) and
                      (value < 0 or value - 1 not in values) and value > 1 or value < -1 and values[value] == 1)]
    settings["ignore_labels"] = list(ignored)
    if settings["label_map"]:
        settings["num_classes"] = settings["num_classes"] or len({
            pair.partition(":")[2] for pair in settings["label_map"].split(",") if not pair.endswith("ignore")})
        return
    beyond = [value for value in known if value < 0 or (value == 255 and 254 not in values)]
    for value in [value for value in beyond if value not in ignored]:
        settings["ignore_labels"].append(value)
        what = "negative labels" if value < 0 else "label 255 beyond the classes"
        found.add("doubt", "unlabelled value", f"{what}: {value} in {values[value]} of {total} files, usually "
                  f"unlabelled; planned: data.ignore_labels: {settings['ignore_labels']}",
                  _with_value(files, records, value))
    known = [value for value in known if value not in beyond]
    settings["label_offset"] = 0
    count = settings["num_classes"] or (len(names) if names else 0)
    if not known:
        settings["num_classes"] = count or 1
        return
    dense = max(known) <= max(1.5 * len(known), len(known) + 3)
    if min(known) == 1 and (not count or max(known) == count):
        settings |= {"label_offset": -1, "num_classes": count or max(known)}
        found.add("doubt", "labels from 1", f"labels count from 1 ({min(known)} to {max(known)}, and no 0); planned: "
                  f"data.label_offset: -1")
    elif dense or (count and max(known) < count):
        settings["num_classes"] = count or max(known) + 1
    else:
        settings |= {"num_classes": len(known), "label_offset": 0,
                     "label_map": ",".join(f"{value}:{c}" for c, value in enumerate(known))}
        found.add("doubt", "numbers of their own", f"labels are {len(known)} numbers up to {max(known)}; planned: "
                  f"data.label_map: {settings['label_map'][:200]}")
    if len(settings["ignore_labels"]) and settings["label_map"] and beyond:
        settings["label_map"] += "".join(f",{value}:ignore" for value in beyond)


def _with_value(files, records, value):
    return next(path for (_, path), record in zip(files, records, strict=True) if value in record.get("values", {}))


def _compare(found, files, records, names, key, ignored):
    """Everything that is alike for meshes and clouds."""
    settings = found.settings
    for (_, path), record in zip(files, records, strict=True):
        for kind in ("problem", "label_problem"):
            if kind in record:
                found.add("fault", kind, record[kind], path)
    find_numbers(found, files, records, names[0] if names else None, [*ignored, *_integers(names)], key)
    C = settings["num_classes"]
    use_names = names is not None and len(names[0]) == C
    found.class_names = list(names[0]) if use_names else [f"class {c}" for c in range(C)]
    found.palette = np.asarray(names[1], np.uint8) if use_names and names[1] is not None else palette(C)
    if names is not None and not use_names:
        found.add("doubt", "class file", f"{settings['classes']} names {len(names[0])} classes, the labels are {C}; "
                  f"correct the list, or give --num-classes")
    settings["names"] = found.class_names if use_names else None
    meaning = settings["meaning"] = _meaning(settings)
    _check_labels(found, files, records, meaning, names)
    by_file = np.zeros((len(records), C + 1), np.int64)
    for i, record in enumerate(records):
        for value, count in record.get("values", {}).items():
            c = meaning.get(value)
            by_file[i, C if c is None or not 0 <= c < C else c] += count
    for split in found.pairs:
        own = by_file[[i for i, (own_split, _) in enumerate(files) if own_split == split and "values" in records[i]]]
        found.files[split] = len(own)
        found.counts[split], found.presence[split] = own[:, :C].sum(0), (own[:, :C] > 0).sum(0)
        found.ignored[split] = float(own[:, C].sum() / max(own.sum(), 1))
    check_classes(found)
    check_duplicates(found, files, [record.get("digest") for record in records],
                     [record.get("label_digest") for record in records])
    good = [i for i, record in enumerate(records) if "values" in record]
    settings["bad_files"] = {path for i, (_, path) in enumerate(files) if i not in good}
    _check_copies(found, files, records)
    _check_units(found, files, records)
    _check_one_class(found, files, good, by_file[:, :C])
    _check_label_places(found, files, records, good, by_file[:, :C], meaning)
    sides = np.array([record["sides"] for record in records if "sides" in record]).reshape(-1, 3)
    elements = [record["elements"] for record in records if "elements" in record]
    found.facts += [("files", ", ".join(f"{len(listed)} {split}" for split, listed in found.pairs.items())),
                    ("classes", C), *([(found.unit, spread(elements))] if elements else []),
                    *((f"size along {axis}", spread(sides[:, k])) for k, axis in enumerate("xyz") if len(sides))]


def _integers(names):
    return [value for value in (names[2] if names else ()) if isinstance(value, int) and value != -1]


def _meaning(settings):
    """A mapping {number in files: class}; get() gives None for what is no class."""
    if settings["label_map"]:
        pairs = (pair.split(":") for pair in settings["label_map"].split(","))
        return {int(value): int(c) for value, c in pairs if c != "ignore"}
    return {c - settings["label_offset"]: c for c in range(settings["num_classes"])
            if c - settings["label_offset"] not in settings["ignore_labels"]}


def _check_labels(found, files, records, meaning, names):
    """What training refuses of the numbers, once their meaning is settled."""
    settings = found.settings
    offset, C = settings["label_offset"] if not settings["label_map"] else 0, settings["num_classes"]
    for (_, path), record in zip(files, records, strict=True):
        values = np.array([value for value in record.get("values", {}) if value != IGNORE_INDEX], np.int64)
        counts = [record["values"][value] for value in values.tolist()]
        label_map = settings["label_map"] and LabelMap({**meaning, **dict.fromkeys(
            settings["ignore_labels"], IGNORE_INDEX)})
        try:
            if found.unit == "points":
                to_labels(np.repeat(values, counts), C, settings["ignore_labels"], path, offset, label_map)
            elif label_map:
                label_map.to_labels(np.repeat(values, counts), path)
            else:
                kept = ~np.isin(values, settings["ignore_labels"])
                check_label_range(np.repeat(values, counts)[np.repeat(kept, counts)] + offset, path, C, offset)
        except ValueError as error:
            found.add("fault", "unknown label", str(error), path)


# -- what stands out ---------------------------------------------------------------------------------------------------

def _check_copies(found, files, records):
    """Files whose shape is that of another in another size, place or direction."""
    places = [i for i, record in enumerate(records) if "quantiles" in record]
    if not places:
        return
    tree = cKDTree(np.stack([records[i]["quantiles"] for i in places]))
    for a, b in sorted(tree.query_pairs(SAME_SHAPE, np.inf)):
        i, j = places[a], places[b]
        if records[i]["digest"] != records[j]["digest"] and records[i]["elements"] == records[j]["elements"]:
            across = files[i][0] != files[j][0]
            found.add("doubt", "near-duplicate", f"{files[j][1]} ({files[j][0]}) is a near-duplicate of {files[i][1]} "
                      f"({files[i][0]}), the same shape in another size, place or direction"
                      f"{', in two splits: the score is too good' if across else ''}; remove one", files[j][1])


def _check_units(found, files, records):
    places = [i for i, record in enumerate(records) if max(record.get("sides", [0])) > 0]
    size = np.array([max(records[i]["sides"]) for i in places])
    found.settings |= {"size": float(np.median(size)) if len(size) else 1.0, "one_unit": len(size) > 0}
    if len(places) < 3:
        return
    ratio = size / np.median(size)
    odd = np.flatnonzero((ratio > UNIT_RATIO) | (ratio < 1 / UNIT_RATIO))
    few = len(odd) <= max(1, FEW_SHARE * len(places))
    found.settings["one_unit"] = not len(odd)
    for k in odd[:1] if not few else odd:
        level, path = "doubt" if few else "note", files[places[k]][1]
        more = "" if few else f", and so are {len(odd) - 1} other files"
        found.add(level, "unit", f"{path}: {ratio[k]:.3g} times as large as the median of the set{more}: is it in "
                  f"another unit (millimetres among metres)? Scale it to the others'", path)


def _check_one_class(found, files, good, by_file):
    single = [i for i in good if (by_file[i] > 0).sum() <= 1]
    usual = len(single) > 0.1 * len(good)
    for i in single[:1] if usual else single:
        c = int(by_file[i].argmax())
        text = f"all labels are class {c} ({found.class_names[c]})" if by_file[i].any() else "nothing is labelled"
        found.add("note" if usual else "doubt", "constant labels", f"{files[i][1]}: constant labels, {text}"
                  f"{f'; so it is in {len(single)} files' if usual else '; is it unlabelled?'}", files[i][1])


def _check_label_places(found, files, records, good, by_file, meaning):
    """Labels that are rough, one off, or lie in another direction than in the other files."""
    found.settings["upright"] = None
    if len(good) < 5:
        return
    order = np.array([_order(records[i], records[i]["smooth"]) for i in good])
    usual, low = np.median(order), np.quantile(order, 0.1 if len(good) >= 20 else 0.25)
    rough = [i for i, value in zip(good, order, strict=True) if value < usual - max(ROUGH, 6 * (usual - low))]
    for i in rough:
        why = "are they of another file, or in another order?"
        if _order(records[i], records[i]["rolled"]) > _order(records[i], records[i]["smooth"]) + ROUGH:
            why = "moved by one element they do: are they shifted by one?"
        for j in rough if found.unit == "faces" else ():
            if j != i and records[j]["elements"] == records[i]["elements"] and _agrees(records[i], records[j], usual):
                why = f"those of {files[j][1].name} do: are the two swapped (a swapped pair)?"
        found.add("fault", "labels in disorder", f"{files[i][1]}: its labels do not lie together on its surface "
                  f"({100 * records[i]['smooth']:.0f} % of neighbours agree, in most files "
                  f"{100 * np.median([records[k]['smooth'] for k in good]):.0f} %); {why}", files[i][1])
    share = by_file[good] / by_file[good].sum(1, keepdims=True).clip(min=1)
    shift = _one_off(share)
    for k, step in shift.items():
        found.add("fault", "shifted labels", f"{files[good[k]][1]}: shifted labels: each number "
                  f"{'minus' if step < 0 else 'plus'} 1 gives the usual shares of the classes; number it as the others",
                  files[good[k]][1])
    _check_turned(found, files, records, [i for k, i in enumerate(good) if k not in shift and i not in rough], meaning)


def _agrees(record, other, usual):
    """Whether the labels of another file lie together on a mesh as is usual."""
    mesh = read_mesh(record["file"])
    neighbor = face_neighbors(weld(mesh.vertices, mesh.faces)[1])
    label = other["label"]
    same = (label[:, None] == label[neighbor])[neighbor >= 0].mean()
    return _order(other, same) > usual - ROUGH


def _order(record, agreement):
    """How far neighbours agree beyond what they would by chance, 1: always."""
    share = np.array(list(record["values"].values())) / record["elements"]
    chance = float((share ** 2).sum())
    return (agreement - chance) / (1 - chance) if chance < 0.99 else 1.0


def _one_off(share):
    """{row: step} of the rows of shares (N, C) that are near the median of all once classes are moved by step."""
    middle = np.median(share, 0)
    before = np.abs(share - middle).sum(1)
    found = {}
    for step in (-1, 1):
        moved = np.roll(share, step, 1)
        after = np.abs(moved - middle).sum(1)
        for k in np.flatnonzero((after < 0.4 * before) & (before > 4 * np.median(before)) & (before > 0.3)):
            found[int(k)] = step
    return found


def _check_turned(found, files, records, good, meaning):
    """Files whose classes lie along another axis than in the others; settings["upright"]: the axis along which the
    classes of most files lie apart in the same way, None where there is none."""
    C = found.settings["num_classes"]
    place = np.full((len(good), C, 3), np.nan)
    for row, i in zip(place, good, strict=True):
        for value, position in records[i]["places"].items():
            if (c := meaning.get(value)) is not None:
                row[c] = position
    seen = ~np.isnan(place).all((0, 2))
    if seen.sum() < 2:
        return
    place = place[:, seen]                                              # (N, C, 3)
    usual = np.nanmedian(place, 0)
    away = np.sqrt(np.nanmean((place - usual) ** 2, 1))                 # (N, 3)
    k = int((usual.std(0) / np.maximum(np.median(away, 0), 1e-9)).argmax())
    typical = float(np.median(away[:, k]))
    if usual[:, k].std() < UPRIGHT_RATIO * typical:                     # they lie in all directions
        return
    sides = np.concatenate([place, -place], 2) - usual[:, k, None]      # (N, C, 6): the file's +x to -z as axis k
    other = np.sqrt(np.nanmean(sides ** 2, 1))
    turned = [n for n in range(len(good)) if away[n, k] > 2 * typical
              and other[n].min() < min(TURN_RATIO * away[n, k], 1.5 * typical)]
    few = len(turned) <= max(1, FEW_SHARE * len(good))
    found.settings["upright"] = k if few else None
    for n in turned[:None if few else 1]:
        axis = f"{'-' if other[n].argmin() > 2 else ''}{'xyz'[int(other[n].argmin()) % 3]}"
        path = files[good[n]][1]
        rest = ("turn it" if few else f"so it is in {len(turned)} files; planned: augmentation.mode: so3, by which the "
                "direction does not matter")
        found.add("doubt" if few else "note", "turned file", f"{path}: its {axis} is what {'xyz'[k]} is in most files, "
                  f"by where its classes lie ({axis[-1]} up among files with {'xyz'[k]} up?); {rest}", path)


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


def _check_points(found, files, records):
    """Colours, normals, duplicate and stray points, up axis of clouds."""
    good = [i for i, record in enumerate(records) if "has" in record]
    for name, remedy in (("color", "data.missing_color"), ("normal", "data.missing_normal")):
        without = [i for i in good if name not in records[i]["has"]]
        word = "colours" if name == "color" else "normals"
        if without and len(without) < len(good):
            for i in without:
                found.add("doubt", f"no {word}", f"{files[i][1]}: no {word}, which {len(good) - len(without)} other "
                          f"clouds have; {remedy} says what takes their place", files[i][1])
        elif without:
            found.add("note", f"no {word}", f"clouds have no {word}"
                      f"{'; planned: data.missing_normal: estimate' if name == 'normal' else ''}")
    warned = Counter(" ".join(line.partition(": ")[2].split()[:3]) for i in good for line in records[i]["warnings"])
    for i in good:
        for line in records[i]["warnings"]:
            kind = " ".join(line.partition(": ")[2].split()[:3])
            all_alike = warned[kind] >= 0.9 * len(good)
            found.add("note" if all_alike else "doubt", kind, line + (
                "" if all_alike or "colour" not in line else "; other clouds have another range of colours: make them "
                "alike, or set data.color_range"), files[i][1])
        if records[i]["twice"] > 0.05:
            found.add("note", "points twice", f"{files[i][1]}: {100 * records[i]['twice']:.0f} % of its points have "
                      f"another in the same place", files[i][1])
        if records[i].get("no_normal", 0) > 0.01 * records[i]["elements"]:
            found.add("doubt", "zero normals", f"{files[i][1]}: {records[i]['no_normal']} normals are zero or NaN; "
                      f"remove the field, and they are estimated", files[i][1])
        if 0 < records[i]["stray"] < 0.005 * records[i]["elements"]:
            found.add("note", "stray points", f"{files[i][1]}: {records[i]['stray']} stray points, far from the rest; "
                      f"remove them if they are noise", files[i][1])
    for name in ("outward", "upward"):
        turned = np.array([records[i].get(name, 0.0) for i in good])
        usual = np.median(turned) if len(turned) else 0.0
        for i in [i for i, value in zip(good, turned, strict=True) if abs(usual) > 0.1 and value < -0.5 * usual
                  and usual > 0 or abs(usual) > 0.1 and value > -0.5 * usual and usual < 0]:
            found.add("doubt", "flipped normals", f"{files[i][1]}: flipped normals: they point {name} where those of "
                      f"other clouds do not, or the other way round; turn them, or remove the field", files[i][1])
    peaks = np.array([records[i]["peaks"] for i in good]).reshape(-1, 3)
    axis = Counter(peaks.argmax(1).tolist()).most_common(1)
    if axis and len(good) >= 3:
        k, count = axis[0]
        others = np.delete(peaks, k, 1).max(1)
        clear = (peaks[:, k] > 2 * others).mean() > 0.8
        if k == 1 and clear:
            found.settings["up"] = "y"
            found.add("doubt", "up axis", f"y up: in {count} of {len(good)} clouds most points lie in a level across "
                      f"y, as on a floor; planned: data.up: y")
        for i, row in zip(good, peaks, strict=True):
            if clear and k == 2 and row[2] < 0.5 * row[:2].max():
                found.add("doubt", "turned file", f"{files[i][1]}: {'xy'[int(row[:2].argmax())]} up among files with "
                          f"z up: most of its points lie in a level across it; turn it", files[i][1])


# -- pictures ----------------------------------------------------------------------------------------------------------

def _add_pictures(found, files, records, seed, draw):
    good = [i for i, record in enumerate(records) if "values" in record]
    train = [i for i in good if files[i][0] == "train"]
    rng = np.random.default_rng(seed)
    chosen = [("Random items", i, "") for i in sorted(rng.permutation(train)[:PICTURES].tolist())]
    for value, c in sorted(found.settings["meaning"].items(), key=lambda pair: pair[1])[:40]:
        share = {i: records[i]["values"].get(value, 0) / records[i]["elements"] for i in train}
        if share and max(share.values()):
            chosen.append(("Most of each class", max(share, key=share.get), f"{c} {found.class_names[c]}"))
    sizes = {i: float(np.log(max(max(records[i]["sides"]), 1e-30))) for i in good}
    middle = np.median(list(sizes.values())) if sizes else 0.0
    odd = sorted(good, key=lambda i: (records[i]["smooth"], -abs(sizes[i] - middle)))[:PICTURES]
    chosen += [("Oddest: labels least in one piece", i, f"{100 * records[i]['smooth']:.0f} % of neighbours agree")
               for i in odd]
    drawn = {}
    for heading, i, caption in chosen:
        if i not in drawn:
            drawn[i] = draw(files[i][1], records[i])
        sides = " x ".join(f"{side:.3g}" for side in records[i]["sides"])
        found.pictures.append(Picture(heading, files[i][1].name, f"{files[i][0]}; {caption or sides}", drawn[i]))


def _draw_mesh(path, record, colors, meaning, up):
    mesh = read_mesh(path)
    keep = slice(None, None, max(1, len(mesh.faces) // FACES_SHOWN))
    return render_mesh(mesh.vertices, mesh.faces[keep], label_colors(_classes(record["label"][keep], meaning), colors),
                       size=240, up=up)


def _classes(label, meaning):
    values, inverse = np.unique(label, return_inverse=True)
    return np.array([meaning.get(value, -1) for value in values.tolist()])[inverse]


def _draw_cloud(path, record, colors, meaning):
    """Each point as a small square that faces the viewer."""
    cloud = read_cloud(path)
    chosen = np.random.default_rng(0).permutation(len(cloud.coord))[:POINTS_SHOWN]
    coord = cloud.coord[chosen].astype(np.float64)
    side = np.ptp(coord, 0).max() / 110
    square = side * np.array([[-0.5, 0, -0.5], [0.5, 0, -0.5], [0.5, 0, 0.5], [-0.5, 0, 0.5]])
    vertices = (coord[:, None] + square).reshape(-1, 3)
    first = 4 * np.arange(len(coord))[:, None]
    faces = np.concatenate([first + [0, 1, 2], first + [0, 2, 3]])
    color = label_colors(_classes(cloud.label[chosen], meaning), colors)
    color = np.minimum(color * FACING, 255).astype(np.uint8)
    return render_mesh(vertices, faces, np.concatenate([color, color]), size=240, view=(20.0, 35.0), up="z")
