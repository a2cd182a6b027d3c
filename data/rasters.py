"""TIFF, GeoTIFF and JPEG 2000 through rasterio, where it is installed: any number of bands, windows, georeferences.

rasterio is optional (pip install rasterio). TIFFs whose numbers need more than reading (palettes, CMYK, inverted grey,
packed bits, multiplied transparency, a turned orientation) are left to Pillow.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.tiff import (
    ASSOCIATED,
    BITS,
    COMPRESSION,
    EXTRA_SAMPLES,
    ORIENTATION,
    PHOTOMETRIC,
    count_pages,
    first_page,
)

JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")        # how a file begins: in its boxes, or bare
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6      # of PHOTOMETRIC
JPEG = 7                                    # of COMPRESSION: YCbCr becomes RGB
COLORS = ("red", "green", "blue")           # as GDAL names them
CACHE_MEGABYTES = 128                       # of decoded blocks, in place of a share of the machine's memory


class Georeference(NamedTuple):
    """Where a raster lies: coordinate system and transform of rasterio, and ground control points."""

    crs: object
    transform: object
    gcps: tuple


@cache
def library():
    """The module rasterio, None where it is not installed."""
    try:
        import rasterio
    except ImportError:
        return None
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)        # what matters comes as an exception, too
    return rasterio


class Raster:
    """An opened file. size (W, H); count: its bands; depth: the type of its numbers, such as "uint16"; has_extra: a
    fourth band that may be transparency or not; has_palette: whether its numbers are indices; fill: the number of
    pixels without data (nodata), or None; order: the bands, from 1, that the file declares as red, green and blue, or
    None; georeference: None where there is none."""

    def __init__(self, dataset, has_extra: bool) -> None:
        self.dataset = dataset
        self.size = (dataset.width, dataset.height)
        self.count = dataset.count
        self.depth = dataset.dtypes[0]
        self.has_extra = has_extra
        self.fill = dataset.nodata
        names = [color.name for color in dataset.colorinterp]
        self.has_palette = names[0] == "palette"
        self.order = [names.index(color) + 1 for color in COLORS] if set(COLORS) <= set(names) else None
        points, points_crs = dataset.gcps
        placed = dataset.crs is not None or not dataset.transform.is_identity or points
        found = Georeference(dataset.crs or points_crs, dataset.transform, tuple(points))
        self.georeference = found if placed else None

    def read(self, box: tuple[int, int, int, int], bands: Sequence[int] | None = None) -> np.ndarray:
        """The file's own numbers (rows, columns, K) in box (left, top, right, bottom); bands from 1, None: all."""
        left, top, right, bottom = box
        with library().Env(GDAL_CACHEMAX=CACHE_MEGABYTES):
            window = ((top, bottom), (left, right))
            values = self.dataset.read(list(bands) if bands else None, window=window)
        return np.moveaxis(values, 0, -1)


@contextmanager
def opened_raster(path: str | Path) -> Iterator[Raster | None]:
    """A Raster, or None where the file is left to Pillow. Whatever is wrong with the file is a ValueError, also while
    it is read inside."""
    found = _bands_with_extra(path)
    rasterio = library() if found is not None else None
    if rasterio is None:
        yield None
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.Env(GDAL_CACHEMAX=CACHE_MEGABYTES), rasterio.open(path) as dataset:
                raster = Raster(dataset, found)
                if np.dtype(raster.depth).kind not in "iuf":
                    raise ValueError(f"{path}: this image cannot be read ({raster.depth} numbers; write real ones)")
                if raster.has_palette:
                    raise ValueError(f"{path}: this image cannot be read (its numbers are indices of a colour table; "
                                     f"store its colours, such as gdal_translate -expand rgb IN OUT)")
                yield raster
    except rasterio.errors.RasterioError as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path}: this image cannot be read ({' '.join(str(reason).split())})") from error


def _bands_with_extra(path):
    """None for a file that is left to Pillow, else whether its fourth band may be transparency."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return None
    if head.startswith(JPEG_2000):
        return False
    if head[:2] not in (b"II", b"MM"):
        return None
    tags = first_page(path)
    if not tags or count_pages(path) != 1:
        return None
    colors = tags.get(PHOTOMETRIC, (0,))[0]
    plain = colors in (BLACK_IS_ZERO, RGB) or (colors == YCBCR and tags.get(COMPRESSION, (1,))[0] == JPEG)
    whole = set(tags.get(BITS, (1,))) <= {8, 16, 32, 64} and tags.get(ORIENTATION, (1,))[0] == 1
    extra = tags.get(EXTRA_SAMPLES, ())
    if not plain or not whole or ASSOCIATED in extra:
        return None
    return extra[:1] != (0,)
