"""Which number in a label file is which class, where files do not count 0, 1, 2 ...: masks of 0 and 255, dental
numbers, SemanticKITTI, NYU40, LAS codes. Written as text, `0:0,255:1,4:ignore`, or as a JSON or YAML file, which may
name the classes. For labels of any kind: pixels, faces, points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.checks import check_names, show
from utils.config_file import read_mapping, read_yaml
from utils.losses import IGNORE_INDEX

IGNORED_NAMES = ("ignore", "ignored", "unlabelled", "unlabeled", "void")
SUFFIXES = (".json", ".yaml", ".yml")
SHOWN = 12                                  # unmapped values that an error lists
EXPECTED = ("expected VALUE:CLASS pairs such as 0:0,255:1,4:ignore, or a .json or .yaml file such as "
            '{"0": "background", "255": "object", "4": "ignore"}')


class LabelMap:
    """value -> class, or IGNORE_INDEX.

    targets: {value in the files: class 0..C-1 or IGNORE_INDEX}; several values may be one class. names: of the classes,
    or None. ValueError where the classes are not all of 0..C-1, or where names are not as many.
    """

    def __init__(self, targets: Mapping[int, int], names: Sequence[str] | None = None) -> None:
        self.targets = dict(targets)
        classes = sorted({c for c in self.targets.values() if c != IGNORE_INDEX})
        if not classes or classes != list(range(len(classes))):
            raise ValueError(f"label map: its classes are {', '.join(map(str, classes)) or 'none'}; expected each of "
                             f"0, 1, 2 ... to have a value")
        self.num_classes = len(classes)
        self.names = None if names is None else list(check_names("label map", names))
        if self.names is not None and len(self.names) != self.num_classes:
            raise ValueError(f"label map: {len(self.names)} names for {self.num_classes} classes; give one name per "
                             f"class")
        self._values = np.array(sorted(self.targets), np.int64)
        self._labels = np.array([self.targets[value] for value in sorted(self.targets)], np.int64)

    def ignoring(self, values: Sequence[int]) -> LabelMap:
        """The same map, in which values that it does not mention and that files use for unlabelled are ignored."""
        return LabelMap({**{value: IGNORE_INDEX for value in values}, **self.targets}, self.names)

    def to_labels(self, values: np.ndarray, where: str | Path) -> np.ndarray:
        """Labels int64 of the values of a file. ValueError, naming `where`, for values that are not in the map, which
        it lists with their counts."""
        values = np.asarray(values)
        place = np.searchsorted(self._values, values).clip(max=len(self._values) - 1)
        wrong = self._values[place] != values
        if wrong.any():
            found, counts = np.unique(values[wrong], return_counts=True)
            raise ValueError(f"{where}: {self.problem(dict(zip(found.tolist(), counts.tolist(), strict=True)))}")
        return self._labels[place]

    def problem(self, counts: Mapping[int, int]) -> str | None:
        """What an error says of {value: count} that holds values which are not in the map; None where all are."""
        wrong = {value: count for value, count in sorted(counts.items()) if count and value not in self.targets}
        if not wrong:
            return None
        shown = ", ".join(f"{value} ({count:,} times)" for value, count in list(wrong.items())[:SHOWN])
        if len(wrong) > SHOWN:
            shown += f" and {len(wrong) - SHOWN} more"
        return (f"{'value' if len(wrong) == 1 else 'values'} {shown} not in the label map ({self.text()[:200]}); add "
                f"{'it' if len(wrong) == 1 else 'them'}, as VALUE:CLASS or VALUE:ignore")

    def class_values(self) -> np.ndarray:
        """(C,) int64: the value in files of each class, the first of those the map has."""
        found = {}
        for value, c in self.targets.items():
            found.setdefault(c, value)
        return np.array([found[c] for c in range(self.num_classes)], np.int64)

    def ignored_value(self, preferred: int = 255) -> int:
        """The value for unlabelled: the map's own first, else `preferred`, or the next that is no class."""
        ignored = [value for value, c in self.targets.items() if c == IGNORE_INDEX]
        if preferred in ignored or preferred not in self.targets:
            return preferred
        return ignored[0] if ignored else int(max(self.targets) + 1)

    def to_values(self, label: np.ndarray, preferred: int = 255) -> np.ndarray:
        """Labels (any shape, integer, IGNORE_INDEX) in the numbers of the files, int64: the inverse of to_labels."""
        label = np.asarray(label, np.int64)
        known = label != IGNORE_INDEX
        if known.any() and not 0 <= label[known].min() <= label[known].max() < self.num_classes:
            raise ValueError(f"labels {label[known].min()} to {label[known].max()}: the label map has "
                             f"{self.num_classes} classes")
        return np.where(known, self.class_values()[np.where(known, label, 0)], self.ignored_value(preferred))

    def text(self) -> str:
        """The map on one line, as read_label_map reads it: VALUE:CLASS pairs, or JSON where there are names."""
        pairs = {value: "ignore" if c == IGNORE_INDEX else c for value, c in self.targets.items()}
        if self.names is None:
            return ",".join(f"{value}:{target}" for value, target in pairs.items())
        return json.dumps({"map": {str(value): target for value, target in pairs.items()}, "names": self.names})


def unread_classes(names: Sequence[str], folder: str | Path, remedy: str) -> list[str]:
    """A line for the log where the classes have no names, though a class file lies in `folder` or up to three folders
    above it (datasets/town of datasets/town/images/train). It is not read: it may belong to other data."""
    if list(names) != [f"class {c}" for c in range(len(names))]:
        return []
    folder = Path(folder).absolute()
    found = [path for place in (folder, *folder.parents[:3]) for path in (place / "classes.json", place / "classes.txt")
             if path.is_file()]
    return [f"note: the classes have no names; {found[0]} is not read: {remedy}"] if found else []


def read_label_map(given: str | Mapping | Path) -> LabelMap:
    """The label map that a flag or a setting gives: VALUE:CLASS pairs, a mapping (or its JSON), or a .json or .yaml
    file with one.

    A mapping has values for keys and classes for values ({255: 1, 4: ignore}, {0: background, 255: object}), or the
    other way round ({background: 0, object: [254, 255]}). Classes that have names instead of numbers count from 0 in
    their order. {map: ..., names: [...]} gives numbers and names; SemanticKITTI's own file (labels, learning_map,
    learning_ignore) and lists of {id: 255, name: object} are read as well. ValueError for everything else.
    """
    if isinstance(given, Mapping):
        return _checked(given, "label map")
    text = str(given).strip()
    if text.lower().endswith(SUFFIXES):
        return _checked(_file_content(Path(text)), text)
    try:
        content = read_yaml(text) if text[:1] in ("{", "[") else None
    except ValueError as error:
        raise ValueError(f"label map {show(text)}: {error}; {EXPECTED}") from None
    return _checked(_pairs(text) if content is None else content, "label map")


def label_map_of(data: Mapping) -> LabelMap | None:
    """The label map of a section of the settings."""
    return read_label_map(data["label_map"]) if data.get("label_map") else None


def _file_content(path):
    if path.suffix.lower() == ".json" and path.is_file() and path.stat().st_size < 1_000_000:
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(content, list):                   # which no settings file is
                return content
        except (ValueError, RecursionError):
            pass                                            # read_mapping says what is wrong with it
    return read_mapping(path)


def _pairs(text):
    found = {}
    for pair in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        value, colon, target = (part.strip() for part in pair.partition(":"))
        if not colon or not target or _integer(value) is None:
            raise ValueError(f"label map {show(text)}: {show(pair)} is not a VALUE:CLASS pair; {EXPECTED}")
        if _integer(value) in found:
            raise ValueError(f"label map {show(text)}: the value {value} is given twice")
        found[_integer(value)] = target
    if not found:
        raise ValueError(f"label map {show(text)}: {EXPECTED}")
    return found


def _integer(text: Any) -> int | None:
    if type(text) is int:
        return text
    if isinstance(text, float) and text.is_integer():
        return int(text)
    return int(text) if isinstance(text, str) and re.fullmatch(r"[-+]?[0-9]{1,9}", text.strip()) else None


def _is_ignored(target):
    return target is None or target == IGNORE_INDEX or (isinstance(target, str) and target.lower() in IGNORED_NAMES)


def _checked(content, where):
    try:
        return LabelMap(*_understood(content, where))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(where)) else f"{where}: {error}") from None


def _understood(content, where):
    """(targets, names) of what a file or a setting holds."""
    if isinstance(content, list):
        return _of_entries(content, where)
    if "learning_map" in content:
        return _of_semantic_kitti(content)
    names = next((content[key] for key in ("names", "classes", "class_names") if key in content
                  and isinstance(content[key], list) and not any(isinstance(name, Mapping) for name in content[key])),
                 None)
    inner = next((content[key] for key in ("map", "label_map", "labels", "classes", "categories") if key in content
                  and isinstance(content[key], Mapping | list) and content[key] is not names), None)
    if isinstance(inner, list):
        return _of_entries(inner, where)
    targets, own_names = _of_mapping(content if inner is None else inner, where)
    for value in content.get("ignore", []) if inner is not None and isinstance(content.get("ignore"), list) else []:
        targets[value] = IGNORE_INDEX
    return targets, own_names if names is None else names


def _of_entries(entries, where):
    """[{id: 255, name: object}, ...], also with id under `value` or `label`."""
    found = {}
    for entry in entries:
        value = next((_integer(entry[key]) for key in ("id", "value", "label") if key in entry), None) \
            if isinstance(entry, Mapping) else None
        if value is None or "name" not in entry or value in found:
            raise ValueError(f"{where}: {show(entry)}: expected entries such as {{id: 255, name: object}}, each id "
                             f"once")
        found[value] = entry["name"]
    return _of_mapping(found, where)


def _of_semantic_kitti(content):
    targets = {_integer(value): _integer(c) for value, c in content["learning_map"].items()}
    if None in targets or None in targets.values():
        raise ValueError("learning_map: expected {value: class}, both integers")
    ignored = {_integer(c) for c, is_ignored in (content.get("learning_ignore") or {}).items() if is_ignored}
    kept = sorted(set(targets.values()) - ignored)
    number = {c: place for place, c in enumerate(kept)}
    first = {_integer(c): _integer(value) for c, value in (content.get("learning_map_inv") or {}).items()}
    order = sorted(targets, key=lambda value: first.get(targets[value]) != value)     # a class is written as its own
    labels = {_integer(value): name for value, name in (content.get("labels") or {}).items()}
    names = [labels.get(first.get(c)) for c in kept]
    return {value: number.get(targets[value], IGNORE_INDEX) for value in order}, None if None in names else names


def _of_mapping(content, where):
    if not content:
        raise ValueError(f"{where}: empty; {EXPECTED}")
    if any(_integer(key) is None for key in content):       # {background: 0, object: [254, 255]}
        turned = {}
        for name, values in content.items():
            for value in values if isinstance(values, list) else [values]:
                if _integer(value) is None or _integer(value) in turned:
                    raise ValueError(f"{where}: {show(name)}: {show(value)}: not an integer that is there once; "
                                     f"{EXPECTED}")
                turned[_integer(value)] = str(name)
        content = turned
    pairs = {_integer(value): target for value, target in content.items()}
    wanted = [target for target in pairs.values() if not _is_ignored(target)]
    if all(_integer(target) is not None for target in wanted):
        return {value: IGNORE_INDEX if _is_ignored(c) else _integer(c) for value, c in pairs.items()}, None
    if not all(isinstance(target, str) and _integer(target) is None for target in wanted):
        raise ValueError(f"{where}: some classes have numbers and others names; {EXPECTED}")
    names = list(dict.fromkeys(wanted))
    return {value: IGNORE_INDEX if _is_ignored(c) else names.index(c) for value, c in pairs.items()}, names
