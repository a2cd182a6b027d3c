"""What the numbers of photographs may mean, in one file or in a set: ranges that a type does not tell, fill values,
fourth bands, orders of bands. What can be read wrongly is a doubt, with the setting that ends it. K bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.photos import (
    ALPHA_MODES,
    RANGES,
    PhotoFormat,
    alpha_kind,
    alpha_of,
    bands_of,
    check_pillow,
    deep_values,
    depth_of,
    opened,
    rawmode_of,
    strips,
)
from data.rasters import Raster, library, opened_raster
from data.tiff import GEO_KEYS, INSTALL, NODATA, first_page

LEAST_USED = 1 / 8                          # of its type's range, or the numbers mean something else
LEAST_OF_A_SET = 1 / 2                      # the same, of nearly all pixels of many photographs: a warning
RARE = 1e-3                                 # share of pixels that may lie above, or below, what is usual
SAMPLE = 1 << 16                            # pixels of a strip, or of a photograph, that say what is usual


def examine(image: Image.Image) -> dict:
    """What the check of a data set has to know of an opened image, whose pixels are all decoded: depth, bands, alpha
    (see alpha_of), and of files of more than 8 bits values and usual, [lowest, highest] of each band, of all pixels and
    of all but RARE at both ends, without those of the fill value (nodata)."""
    check_pillow(image)
    depth = depth_of(image)
    if depth == "uint8":
        alpha = alpha_of(image)
        if image.mode == "RGB" and rawmode_of(image) == "RGBX":
            bands = 4
        else:
            bands = len(image.getbands()) if image.mode in ("L", "LA", "RGB", "RGBA") else 1 if image.mode == "1" else 3
        image.load()
        return {"depth": depth, "bands": bands, "alpha": alpha}
    has_alpha = image.mode in ALPHA_MODES
    fill = _number(image.tag_v2.get(NODATA)) if image.format == "TIFF" else None
    values = deep_values(image, depth)
    if not values.size:
        return {"depth": depth, "bands": values.shape[-1], "alpha": "none", "values": []}
    alpha = "none"
    if has_alpha:
        alpha = alpha_kind(image, np.bincount((values[..., -1] >> 8).ravel(), minlength=256))
    return {"depth": depth, "bands": values.shape[-1], "alpha": alpha, **_ends([values], fill)}


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def examine_raster(raster: Raster) -> dict:
    """The same of a raster, which is read strip by strip; and order, see Raster."""
    width, height = raster.size
    alpha = "none" if raster.count <= 4 else "data"
    if raster.has_extra and raster.count in (2, 4):
        alpha = "opaque"
    most = np.iinfo(raster.depth).max if raster.depth in RANGES else None

    def read():
        nonlocal alpha
        for top, bottom in strips(width, height):
            values = raster.read((0, top, width, bottom))
            if alpha == "opaque" and (values[..., -1] != most).any():
                alpha = "data"
            yield values
    ends = _ends(read(), raster.fill)
    record = {"depth": raster.depth, "bands": raster.count, "alpha": alpha, "order": raster.order}
    return record if raster.depth == "uint8" else record | ends


def _ends(parts: Iterable[np.ndarray], fill: float | None) -> dict:
    """values and usual, see examine, of parts (h, w, K), of finite numbers other than fill; 0 where there are none."""
    ends, samples = [], []
    for values in parts:
        known = _known(values, fill)
        step = max(1, math.isqrt(values[..., 0].size // SAMPLE))
        few = values[::step, ::step]
        samples.append(np.where(_known(few, fill), few, np.nan).reshape(-1, values.shape[-1]))
        most, least = (values.dtype.type(end) for end in _type_ends(values.dtype))
        ends.append((values.min((0, 1), initial=most, where=known), values.max((0, 1), initial=least, where=known)))
    low, high = (np.stack(values).astype(np.float64) for values in zip(*ends, strict=True))
    values = zip(low.min(0).tolist(), high.max(0).tolist(), strict=True)
    usual = []
    for band in np.concatenate(samples).T:
        band = band[~np.isnan(band)]
        usual.append(np.quantile(band, (RARE, 1 - RARE), method="nearest").tolist() if band.size else [0.0, 0.0])
    return {"values": [list(pair) if pair[0] <= pair[1] else [0.0, 0.0] for pair in values], "usual": usual}


def _known(values, fill):
    """Where numbers are finite and not fill; True for everywhere."""
    if values.dtype.kind != "f":
        return True if fill is None else values != fill
    return np.isfinite(values) if fill is None else np.isfinite(values) & (values != values.dtype.type(fill))


def _type_ends(dtype):
    return (math.inf, -math.inf) if dtype.kind == "f" else (np.iinfo(dtype).max, np.iinfo(dtype).min)


# -- doubts ------------------------------------------------------------------------------------------------------------

def used_range(record: Mapping, photos: PhotoFormat, which: str = "values") -> tuple[float, float] | None:
    """(lowest, highest) value of the bands shown of a file of more than 8 bits, from examine; None for others."""
    if not record.get(which):
        return None
    pairs = [record[which][band - 1] for band in bands_of(record["bands"], photos.bands)]
    return min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)


def range_doubt(depth: str, low: float, high: float) -> str | None:
    """What is odd about numbers of a type that lie between low and high, with the setting to give; None if nothing."""
    if depth not in RANGES:
        kind = "floating-point" if depth.startswith("float") else depth
        return (f"{kind} pixels have no known range; convert them to 8 bits, or set value_range: [{low:g}, {high:g}], "
                f"the range that was found (--value-range {low:g} {high:g})")
    least, most = RANGES[depth]
    if high - low >= LEAST_USED * (most - least):
        return None
    return (f"{depth} pixels use {int(low)} to {int(high)} of {least} to {most}, less than an eighth, so that they "
            f"would be nearly one grey; {_remedy(low, high)}, the values that become black and white")


def usual_doubt(depth: str, low: float, high: float, share: float = LEAST_USED) -> str | None:
    """The same of the usual numbers, where few other ones hide how little of the type's range they use."""
    if depth not in RANGES:
        return None
    least, most = RANGES[depth]
    if high - low >= share * (most - least):
        return None
    return (f"nearly all {depth} pixels lie between {int(low)} and {int(high)} of {least} to {most}, so that much of "
            f"what is between black and white is not used; {_remedy(low, high)}, the values that become black and "
            f"white, or {least} and {most} if they are meant so")


def _remedy(low, high):
    low, high = int(low), int(high)
    below = 0 if low >= 0 and (low == high or low <= 3 * (high - low)) else low
    above = 2 ** high.bit_length() - 1 if below == 0 else high
    below, above = (below, above) if below < above else (below, below + 1)
    return f"set value_range: [{below}, {above}] (--value-range {below} {above})"


def band_doubt(alpha: str) -> str | None:
    if alpha != "data":
        return None
    return "a fourth band that is no transparency is not shown; bands: [1, 2, 3] (--bands 1 2 3) says so"


def order_doubt(order: Sequence[int] | None) -> str | None:
    """order: see Raster."""
    if order is None or list(order) == [1, 2, 3]:
        return None
    return (f"its bands {', '.join(map(str, order))} are declared as red, green and blue, and the first three are "
            f"shown; set bands: {list(order)} (--bands {' '.join(map(str, order))}), or [1, 2, 3] to keep them")


def photo_doubts(path: str | Path, photos: PhotoFormat) -> list[str]:
    """What may be read wrongly in a single photograph, for a warning."""
    settled = photos.value_range is not None and photos.bands is not None
    with opened_raster(path) as raster:
        if raster is not None:
            plain = raster.depth == "uint8" and (not raster.has_extra or raster.count not in (2, 4) or
                                                 photos.bands is not None)
            record = {"alpha": "data" if raster.count > 4 else "none"} if plain or settled else examine_raster(raster)
            return _doubts({"order": raster.order, **record}, photos)
    place = ([f"it is georeferenced, and its labels are not: {INSTALL.partition(',')[0]}"]
             if library() is None and GEO_KEYS in first_page(path) else [])
    with opened(path, max_pixels=photos.max_pixels) as image:
        plain = depth_of(image) == "uint8"
        if settled or (plain and alpha_of(image) == "none"):
            return place
        return [*_doubts({"alpha": alpha_of(image)} if plain else examine(image), photos), *place]


def _doubts(record, photos):
    doubts = []
    limits = used_range(record, photos) if photos.value_range is None else None
    if limits is not None:
        doubts.append(range_doubt(record["depth"], *limits) or usual_doubt(
            record["depth"], *used_range(record, photos, "usual")))
    if photos.bands is None:
        doubts += [band_doubt(record["alpha"]), order_doubt(record.get("order"))]
    return [doubt for doubt in doubts if doubt]


def set_doubts(records: Sequence[Mapping], photos: PhotoFormat) -> list[str]:
    """Warnings about the photographs of a set, from `examine` and with their path under "image". ValueError where it
    uses less than an eighth of the range of its type and value_range is not set, and where the fourth band is
    transparency in one file and something else in another."""
    found = _range_doubts(records, photos) if photos.value_range is None else []
    if photos.bands is not None:
        return found
    data, clear = ([record["image"] for record in records if record.get("alpha") == kind]
                   for kind in ("data", "transparency"))
    if data and clear:
        raise ValueError(f"{data[0]} and {clear[0]}: the fourth band is transparency in one and something else in the "
                         f"other; set bands: [1, 2, 3] (--bands 1 2 3) to show no file transparent")
    if data:
        found.append(f"WARNING: {data[0]}: {band_doubt('data')} ({_files(data)})")
    ordered = [record for record in records if order_doubt(record.get("order"))]
    if ordered:
        found.append(f"WARNING: {ordered[0]['image']}: {order_doubt(ordered[0]['order'])} ({_files(ordered)})")
    return found


def _range_doubts(records, photos):
    by_depth: dict[str, list[Mapping]] = {}
    for record in records:
        if record.get("values"):
            by_depth.setdefault(record["depth"], []).append(record)
    found = []
    for depth, deep in by_depth.items():
        ends, usual = (_union([used_range(record, photos, which) for record in deep]) for which in ("values", "usual"))
        doubt = range_doubt(depth, *ends)
        if doubt:
            raise ValueError(f"{deep[0]['image']}: {doubt} ({_files(deep)})")
        doubt = usual_doubt(depth, *usual, LEAST_OF_A_SET)
        if doubt:
            found.append(f"WARNING: {deep[0]['image']}: {doubt} ({_files(deep)})")
    return found


def _union(pairs):
    return min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)


def _files(listed):
    return f"{len(listed)} {'file' if len(listed) == 1 else 'files'}"
