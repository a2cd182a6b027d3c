"""What inspect_data.py does with meshes and clouds alike: what their numbers mean, and which files stand out by their
labels, sizes and directions.

Each file becomes a record of plain numbers, in a process of its own; what is odd is seen by comparing the records.
N files, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from data.image_splits import read_class_file
from data.label_map import read_label_map
from data.mesh_features import face_neighbors, weld
from data.mesh_io import check_label_range, read_mesh
from data.point_files import read_classes
from data.point_values import NAN_LABEL, to_labels
from utils.fingerprint import digest
from utils.inspection import Inspection, Picture, check_classes, check_duplicates, spread
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.render import palette

ERRORS = (ValueError, OSError, MemoryError)
ROUGH = 0.15                                # so much less agreement of neighbours than usual, see _order, is odd
MOST_COARSE = 2                             # times as rough as usual, of meshes of a quarter of the faces and fewer
UNIT_RATIO, FEW_SHARE = 30, 0.06            # sizes that differ by more are other units; of fewer files a mistake
FEW_ELEMENTS = 0.01                         # of the usual number of faces or points: cut short?
TURN_RATIO = 0.4                            # distance to the others after a turn, over that before
QUANTILES = np.linspace(0, 1, 33)
SAME_SHAPE = 2e-5                           # largest difference of the quantiles of two copies
UPRIGHT_RATIO = 1.2                         # how far classes lie apart, over how far files differ: all have one axis up
PICTURES = 6                                # of a kind


def examined(files: Sequence[tuple], examine: Callable, workers: int, what: str) -> list[dict]:
    """examine(*arguments) of every file, in so many processes; what: said on a terminal meanwhile."""
    if workers < 2 or len(files) < 8:
        return [examine(*arguments) for arguments in progress(files, what)]
    with ProcessPoolExecutor(workers) as pool:
        return list(progress(pool.map(examine, *zip(*files, strict=True), chunksize=4), what, len(files)))


def shape_of(points: np.ndarray, middle: np.ndarray) -> dict:
    """Sides, and quantiles of the distances from the middle, which no turn, shift or scale changes."""
    distance = np.linalg.norm(points - middle, axis=1)
    return {"sides": np.ptp(points, axis=0).tolist(),
            "quantiles": (np.quantile(distance, QUANTILES) / max(float(np.sqrt((distance ** 2).mean())), 1e-30))}


def labels_of(label: np.ndarray, position: np.ndarray, pairs: np.ndarray) -> dict:
    """values {number: elements}, places {number: mean position (3,)}, smooth: share of neighbours (2, n) of one label,
    rolled: the same where labels move by one element."""
    values, inverse, counts = np.unique(label, return_inverse=True, return_counts=True)
    places = np.stack([np.bincount(inverse, position[:, axis]) for axis in range(3)], 1) / counts[:, None]

    def agreement(values):
        return float((values[pairs[0]] == values[pairs[1]]).mean()) if pairs.shape[1] else 1.0
    return {"values": dict(zip(values.tolist(), counts.tolist(), strict=True)), "label_digest": digest(label),
            "places": dict(zip(values.tolist(), places, strict=True)), "smooth": agreement(label),
            "rolled": max(agreement(np.roll(label, step)) for step in (-1, 1))}


def class_names(given: str | None, folders: Sequence[str], settings: dict) -> tuple | None:
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


def find_numbers(found: Inspection, files: Sequence[tuple[str, Path]], records: Sequence[Mapping],
                 names: Sequence[str] | None, ignored: Sequence[int]) -> None:
    """Set num_classes, label_offset, label_map and ignore_labels in found.settings by the numbers in the files."""
    settings = found.settings
    values = Counter(value for record in records for value in record.get("values", {}))
    total = sum("values" in record for record in records)
    known = [value for value in sorted(values) if value not in (IGNORE_INDEX, NAN_LABEL)
             and not (total >= 5 and values[value] == 1 and value not in (-1, 255) and
                      (value < 0 or value - 1 not in values) and value > 1 or value < -1 and values[value] == 1)]
    settings["ignore_labels"] = list(ignored)
    if settings["label_map"]:
        settings |= {"num_classes": read_label_map(settings["label_map"]).num_classes, "label_offset": 0}
        return
    beyond = [value for value in known if value < 0 or (value == 255 and 254 not in values)]
    for value in [value for value in beyond if value not in ignored]:
        settings["ignore_labels"].append(value)
        what = "negative labels" if value < 0 else "label 255 beyond the classes"
        found.add("doubt", "unlabelled value", f"{what}: {value} in {values[value]} of {total} files, usually "
                  f"unlabelled; planned: data.ignore_labels: {settings['ignore_labels']}",
                  _with_value(files, records, value))
    if NAN_LABEL in values:
        settings["ignore_labels"].append("nan")
        found.add("doubt", "unlabelled value", f"labels are NaN in {values[NAN_LABEL]} of {total} files, as in "
                  f"{_with_value(files, records, NAN_LABEL)}, usually unlabelled; planned: data.ignore_labels: "
                  f"{settings['ignore_labels']}")
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
        settings |= {"num_classes": len(known), "label_map": ",".join(f"{value}:{c}" for c, value in enumerate(known))}
        found.add("doubt", "numbers of their own", f"labels are {len(known)} numbers up to {max(known)}; planned: "
                  f"data.label_map: {settings['label_map'][:200]}")
        settings["label_map"] += "".join(f",{value}:ignore" for value in beyond)


def _with_value(files, records, value):
    return next(path for (_, path), record in zip(files, records, strict=True) if value in record.get("values", {}))


def compare(found: Inspection, files: Sequence[tuple[str, Path]], records: Sequence[Mapping], names: tuple | None,
            ignored: Sequence[int]) -> None:
    """Everything that is alike for meshes and clouds: faults of single files, the meaning of numbers, classes, and what
    stands out. names: of class_names; ignored: values that training ignores without being told."""
    settings = found.settings
    for (_, path), record in zip(files, records, strict=True):
        for kind in ("problem", "label_problem"):
            if kind in record:
                found.add("fault", kind, record[kind], path)
    find_numbers(found, files, records, names[0] if names else None, [*ignored, *_integers(names)])
    C = settings["num_classes"]
    if names is None and settings["label_map"] and (own := read_label_map(settings["label_map"]).names):
        names = own, None, ()
    use_names = names is not None and len(names[0]) == C
    found.class_names = list(names[0]) if use_names else [f"class {c}" for c in range(C)]
    found.palette = np.asarray(names[1], np.uint8) if use_names and names[1] is not None else palette(C)
    if names is not None and not use_names:
        found.add("doubt", "class file", f"{settings['classes']} names {len(names[0])} classes, the labels are {C}; "
                  f"correct the list, or give --num-classes")
    settings["names"] = found.class_names if use_names else None
    meaning = settings["meaning"] = _meaning(settings)
    _check_labels(found, files, records)
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
    if found.counts["train"].any():
        check_classes(found)
    check_duplicates(found, files, [record.get("digest") for record in records],
                     [record.get("label_digest") for record in records])
    good = [i for i, record in enumerate(records) if "values" in record]
    settings["bad_files"] = {path for i, (_, path) in enumerate(files) if i not in good}
    _check_copies(found, files, records)
    _check_units(found, files, records)
    _check_few(found, files, records)
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
    """{number in files: class}, of what is a class."""
    if settings["label_map"]:
        targets = read_label_map(settings["label_map"]).targets
        return {value: c for value, c in targets.items() if c != IGNORE_INDEX}
    return {c - settings["label_offset"]: c for c in range(settings["num_classes"])
            if c - settings["label_offset"] not in settings["ignore_labels"]}


def _check_labels(found, files, records):
    """What training refuses of the numbers, once their meaning is settled."""
    settings = found.settings
    offset, C = settings["label_offset"], settings["num_classes"]
    label_map = settings["label_map"] and read_label_map(settings["label_map"]).ignoring(
        [value for value in settings["ignore_labels"] if value != "nan"])
    for (_, path), record in zip(files, records, strict=True):
        values = np.array([value for value in record.get("values", {}) if value != IGNORE_INDEX], np.int64)
        counts = [record["values"][value] for value in values.tolist()]
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


def _check_few(found, files, records):
    """Files of hardly any elements, which may be cut short."""
    count = {i: record["elements"] for i, record in enumerate(records) if "elements" in record}
    usual = np.median(list(count.values()) or [0])
    for i, number in count.items():
        if number < FEW_ELEMENTS * usual:
            found.add("doubt", "few elements", f"{files[i][1]}: {number} {found.unit}, where the usual number is "
                      f"{usual:.0f}: is it cut short?", files[i][1])


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
    order = np.array([order_of(records[i], records[i]["smooth"]) for i in good])
    usual, low = np.median(order), np.quantile(order, 0.1 if len(good) >= 20 else 0.25)
    count = np.array([records[i]["elements"] for i in good])
    # The share of elements at a border falls with the root of their number: a coarse mesh is no fault.
    coarse = np.sqrt(np.median(count) / count).clip(1, MOST_COARSE) if found.unit == "faces" else np.ones(len(good))
    least = 1 - coarse * (1 - usual + max(ROUGH, 6 * (usual - low)))
    rough = [i for i, value, limit in zip(good, order, least, strict=True) if value < limit]
    for i in rough:
        why = "are they of another file, or in another order?"
        if order_of(records[i], records[i]["rolled"]) > order_of(records[i], records[i]["smooth"]) + ROUGH:
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
    return order_of(other, same) > usual - ROUGH


def order_of(record: Mapping, agreement: float) -> float:
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
              and other[n].min() < min(TURN_RATIO * away[n, k], 4 * typical)]
    few = len(turned) <= max(1, FEW_SHARE * len(good))
    found.settings["upright"] = k if few else None
    for n in turned[:None if few else 1]:
        axis = f"{'-' if other[n].argmin() > 2 else ''}{'xyz'[int(other[n].argmin()) % 3]}"
        path = files[good[n]][1]
        rest = ("turn it" if few else f"so it is in {len(turned)} files; planned: augmentation.mode: so3, by which the "
                "direction does not matter")
        found.add("doubt" if few else "note", "turned file", f"{path}: its {axis} is what {'xyz'[k]} is in most files, "
                  f"by where its classes lie ({axis[-1]} up among files with {'xyz'[k]} up?); {rest}", path)


def add_pictures(found: Inspection, files: Sequence[tuple[str, Path]], records: Sequence[Mapping], seed: int,
                 draw: Callable) -> None:
    """Pictures of named files, random ones, of each class and of the oddest; draw(path, record) makes one."""
    good = [i for i, record in enumerate(records) if "values" in record]
    train = [i for i in good if files[i][0] == "train"]
    rng = np.random.default_rng(seed)
    kinds = {finding.file: finding.kind for finding in found.findings if finding.file and finding.level != "note"}
    chosen = [("Named above", i, kinds[str(files[i][1])]) for i in good if str(files[i][1]) in kinds][:2 * PICTURES]
    chosen += [("Random items", i, "") for i in sorted(rng.permutation(train)[:PICTURES].tolist())]
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


def classes_of(label: np.ndarray, meaning: Mapping[int, int]) -> np.ndarray:
    """Numbers of a file as classes, -1 for what is none."""
    values, inverse = np.unique(label, return_inverse=True)
    return np.array([meaning.get(value, -1) for value in values.tolist()])[inverse]
