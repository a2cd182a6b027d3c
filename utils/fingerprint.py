"""What a run's data were: names, sizes and digests of the labels of its files, by which a resumed run sees others."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

SHOWN = 3                   # files named in the line


def digest(*arrays: np.ndarray) -> int:
    """A number that changes with the content of arrays, or their type."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array), zlib.crc32(str(array.dtype).encode(), value))
    return value


def fingerprint(files: Iterable[Path], sizes: Sequence[int], labels: Sequence[int]) -> dict:
    """A data set as an entry of a checkpoint: the names of its files (without folders: data may move), and for each a
    size (bytes, points ...) and the digest of its labels."""
    sizes, labels = (torch.tensor(list(values), dtype=torch.int64) for values in (sizes, labels))
    return {"names": "\0".join(Path(file).name for file in files), "sizes": sizes, "labels": labels}


def changes(before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> str | None:
    """What differs between the data sets of two runs, {name: fingerprint}, in one line; None where nothing does. A data
    set that only one of them has is not compared."""
    found = [f"{name}: {difference}" for name in now if name in before
             if (difference := _difference(before[name], now[name]))]
    return "; ".join(found) or None


def _difference(before: Mapping, now: Mapping) -> str | None:
    names = [part["names"].split("\0") if part["names"] else [] for part in (before, now)]
    gone, new = ([name for name in one if name not in other]
                 for one, other in zip(names, (set(names[1]), set(names[0])), strict=True))
    parts = [f"{_listed(listed)} {what}" for listed, what in ((gone, "is gone"), (new, "is new")) if listed]
    if parts:
        return ", ".join(parts)
    if names[0] != names[1]:
        return "the same files in another order"
    changed = []
    differ = {part: (before[key] != now[key]).tolist() for part, key in (("size", "sizes"), ("labels", "labels"))}
    for index, name in enumerate(names[0]):
        what = " and ".join(part for part, flags in differ.items() if flags[index])
        if what:
            changed.append(f"{name} ({what})")
    return f"{_listed(changed)} changed" if changed else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
