"""What a TIFF says about itself: its directories, read without its pixels."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

# tags, and how many bytes a value of each of their types has
SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 254, 258, 259, 262, 274, 277
PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT, GEO_KEYS = 284, 338, 339, 34735
NODATA = 42113                              # of GDAL, as text
READ_TAGS = (SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT,
             GEO_KEYS)
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
MOST_PAGES, MOST_TAGS = 1000, 4096          # more are damage, or malice
REDUCED, TRANSPARENCY_MASK = 1, 4           # bits of SUBFILE: an overview, not a page
ASSOCIATED = 1                              # of EXTRA_SAMPLES: the only fourth band that is transparency for certain
INSTALL = "install rasterio (pip install rasterio), with which it is read"


def tiff_pages(path: str | Path) -> Iterator[dict[int, tuple[int, ...]]]:
    """The whole-number tags of each page of a TIFF or BigTIFF, read from its directories alone; it ends where the file
    is damaged."""
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16:
            return
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        place = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]
        count, entry, field = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
        seen = set()
        while place and place not in seen and place < 2 ** 62 and len(seen) < MOST_PAGES:
            seen.add(place)
            file.seek(place)
            start = file.read(struct.calcsize(order + count))
            if len(start) < struct.calcsize(order + count):
                return
            number = struct.unpack(order + count, start)[0]
            if number > MOST_TAGS:
                return
            size = struct.calcsize(order + entry) + field
            table = file.read(number * size + field)
            if len(table) < number * size + field:
                return
            rows = [table[i * size:(i + 1) * size] for i in range(number)]
            yield dict(pair for row in rows if (pair := _tag(file, order, row, entry, field)) is not None)
            place = int.from_bytes(table[-field:], "little" if order == "<" else "big")


def _tag(file, order, raw, entry, field):
    """(tag, values) of a directory entry that matters here, None for others."""
    tag, kind, count = struct.unpack(order + entry, raw[:-field])
    letter = TIFF_TYPES.get(kind)
    if tag not in READ_TAGS or letter is None or not 0 < count <= 1024:
        return None
    size = count * struct.calcsize(order + letter)
    data = raw[-field:]
    if size > field:
        file.seek(min(int.from_bytes(data, "little" if order == "<" else "big"), 2 ** 62))
        data = file.read(size)
    return (tag, struct.unpack(f"{order}{count}{letter}", data[:size])) if len(data) >= size else None


def first_page(path: str | Path) -> dict[int, tuple[int, ...]]:
    """The tags of the first page; {} for files that are no TIFF, or damaged."""
    try:
        return next(tiff_pages(path), {})
    except (OSError, struct.error):
        return {}


def count_pages(path: str | Path) -> int:
    """Pages of a TIFF, overviews and masks not counted."""
    return sum(not tags.get(SUBFILE, (0,))[0] & (REDUCED | TRANSPARENCY_MASK) for tags in tiff_pages(path))


def describe_tiff(path: str | Path) -> str | None:
    """What is in a TIFF that Pillow does not know, in words; None for other files."""
    tags = first_page(path)
    if not tags:
        return None
    bands = tags.get(SAMPLES, (1,))[0]
    bits = "/".join(map(str, sorted(set(tags.get(BITS, (1,))))))
    kind = {1: "", 2: "signed ", 3: "floating-point "}.get(tags.get(SAMPLE_FORMAT, (1,))[0], "")
    return f"a TIFF of {bands} {'band' if bands == 1 else 'bands'} of {bits} {kind}bits"
