"""What inspect_data.py looks at in clouds with one label a point: see data/inspect_shapes.py for what meshes share.

The readers and refusals are those of training (data/point_files.py, data/point_values.py). P points.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from data.inspect_shapes import ERRORS, add_pictures, class_names, classes_of, compare, examined, labels_of, shape_of
from data.point_files import CLOUD_SUFFIXES, clouds_in, find_clouds, read_cloud
from utils.fingerprint import digest
from utils.inspection import Inspection, check_names, sampled
from utils.render import label_colors, render_mesh

NEIGHBORS_SEEN = 2000                       # points whose nearest neighbour's label is looked at
FACING = 1.25                               # squares that face the viewer are drawn darker by so much
SLICE = 10_000                              # points among which neighbours are looked for
POINTS_SHOWN = 20_000                       # of a picture


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
    records = examined([(path,) for _, path in files], examine_cloud, workers, "looking at clouds")
    names = class_names(data["classes"], [root], settings)
    compare(found, files, records, names, [-1])
    _check_points(found, files, records)
    good = [i for i, record in enumerate(records) if "values" in record]
    spacing = [records[i]["spacing"] for i in good if records[i]["spacing"]]
    settings |= {"spacing": float(np.median(spacing)) if spacing else 0.01,
                 "sides": np.median([records[i]["sides"] for i in good], 0).tolist() if good else [1.0] * 3,
                 "elements": [records[i]["elements"] for i in good],
                 "has": [name for name in ("color", "normal") if good and np.mean(
                     [name in records[i]["has"] for i in good]) > 0.5]}
    draw = partial(_draw_cloud, colors=found.palette, meaning=settings["meaning"])
    found.draw = partial(add_pictures, found, files, records, seed, draw)
    return found


def examine_cloud(path: Path, label_field: str | None = None) -> dict:
    """A record of a cloud; `problem`: why training refuses it."""
    record = {"file": path}
    try:
        cloud = read_cloud(path, label_field)
    except ERRORS as error:
        return record | {"problem": str(error) or type(error).__name__}
    coord = cloud.coord.astype(np.float64)
    middle = np.median(coord, 0)
    shape = shape_of(coord, middle)
    rng = np.random.default_rng(0)
    part = _slice(coord)
    chosen = rng.permutation(part)[:NEIGHBORS_SEEN]
    tree = cKDTree(coord[part], balanced_tree=False, compact_nodes=False)
    distance, nearest = tree.query(coord[chosen], min(2, len(part)))
    distance, nearest = distance.reshape(len(chosen), -1), part[nearest.reshape(len(chosen), -1)]
    peaks = [np.histogram(coord[:, axis], 100)[0].max() / len(coord) for axis in range(3)]
    far = np.quantile(np.linalg.norm(coord - middle, axis=1), 0.99) * 3
    record |= {
        **shape, "elements": len(coord), "warnings": cloud.warnings, "spacing": _spacing(coord[part], distance[:, -1]),
        "twice": float((distance[:, -1] == 0).mean()), "peaks": peaks, "digest": digest(cloud.coord),
        "stray": int((np.linalg.norm(coord - middle, axis=1) > far).sum()) if far else 0,
        "has": [name for name in ("color", "normal", "label") if getattr(cloud, name) is not None]}
    if cloud.normal is not None:
        out = np.sign((cloud.normal * (coord - middle)).sum(1)).mean()
        record |= {"outward": float(out), "upward": float(cloud.normal[:, 2].mean())}
    if cloud.label is None:
        return record | {"label_problem": f"{path}: no labels"}
    scale = max(float(np.linalg.norm(shape["sides"])) / 2, 1e-12)
    return record | labels_of(cloud.label, (coord - middle) / scale, np.stack([chosen, nearest[:, -1]]))


def _spacing(coord, distance):
    """The median distance of neighbouring points; of neighbouring places, where most points are there twice. 0: all
    are in one."""
    if (usual := float(np.median(distance))) or len(places := np.unique(coord, axis=0)) < 2:
        return usual
    return float(np.median(cKDTree(places).query(places[:NEIGHBORS_SEEN], 2)[0][:, 1]))


def _slice(coord):
    """Places of all points, or of SLICE of them in the middle of the longest side: a tree of all takes too long."""
    along = coord[:, np.ptp(coord, 0).argmax()]
    if len(along) <= SLICE:
        return np.arange(len(along))
    order = np.argpartition(along, ((len(along) - SLICE) // 2, (len(along) + SLICE) // 2))
    return order[(len(along) - SLICE) // 2:(len(along) + SLICE) // 2]


def _check_points(found, files, records):
    """Colours, normals, duplicate and stray points, up axis of clouds."""
    good = [i for i, record in enumerate(records) if "has" in record]
    for name, remedy in (("color", "data.missing_color"), ("normal", "data.missing_normal")):
        without = [i for i in good if name not in records[i]["has"]]
        word = "colours" if name == "color" else "normals"
        if 0 < len(without) < len(good):
            few = without if 2 * len(without) <= len(good) else [i for i in good if i not in without]
            what = f"no {word}, which" if few is without else f"it has {word}, which none of the"
            for i in few:
                found.add("doubt", f"no {word}", f"{files[i][1]}: {what} {len(good) - len(few)} other clouds have; "
                          f"{remedy} says what takes the place of missing ones", files[i][1])
        elif without:
            found.add("note", f"no {word}", f"clouds have no {word}"
                      f"{'; planned: data.missing_normal: estimate' if name == 'normal' else ''}")
    warned = Counter(" ".join(line.partition(": ")[2].split()[:3]) for i in good for line in records[i]["warnings"])
    for i in good:
        for line in records[i]["warnings"]:
            kind = " ".join(line.partition(": ")[2].split()[:3])
            all_alike = warned[kind] >= 0.9 * len(good) and "data.label_field" not in line
            found.add("note" if all_alike else "doubt", kind, line + (
                "" if all_alike or "colour" not in line else "; other clouds have another range of colours: make them "
                "alike, or set data.color_range"), files[i][1])
        if records[i]["twice"] > 0.05:
            found.add("note", "points twice", f"{files[i][1]}: {100 * records[i]['twice']:.0f} % of its points have "
                      f"another in the same place", files[i][1])
        if 0 < records[i]["stray"] < 0.005 * records[i]["elements"]:
            found.add("note", "stray points", f"{files[i][1]}: {records[i]['stray']} stray points, far from the rest; "
                      f"remove them if they are noise", files[i][1])
    for name in ("outward", "upward"):
        turned = np.array([records[i].get(name, 0.0) for i in good])
        usual = np.median(turned) if len(turned) else 0.0
        against = turned * usual < -0.5 * usual**2         # the other way, by more than half as much
        for i in [i for i, odd in zip(good, against, strict=True) if odd and abs(usual) > 0.1]:
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
    color = label_colors(classes_of(cloud.label[chosen], meaning), colors)
    color = np.minimum(color * FACING, 255).astype(np.uint8)
    return render_mesh(vertices, faces, np.concatenate([color, color]), size=240, view=(20.0, 35.0), up="z")
