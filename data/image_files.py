"""Pictures and label maps written strip by strip, so that they need not be in memory: PNG, NumPy and (Geo)TIFF.

Each writer takes strips of rows from top to bottom, (R, W) or (R, W, 3), of the type that `rows` has: uint8, or for one
band also uint16.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.rasters import Georeference, library

COMPRESSION = 4                             # of zlib, 1 to 9: label maps are as small as with 9, in a third of the time
GREY, RGB, INDEX = 0, 2, 3                  # colour types of PNG
UP = 2                                      # its filter "minus the row above"


def write_rows(path: Path, rows: Iterable[np.ndarray], size: tuple[int, int], kind: type | np.dtype = np.uint8,
               bands: int = 1, palette: np.ndarray | None = None, georeference: Georeference | None = None) -> None:
    """Write strips of an image of size (W, H) as the ending of path says, .png, .npy or .tif. palette (256, 3) uint8:
    colours of the indices of a PNG or TIFF; georeference: of a TIFF."""
    if path.suffix == ".png":
        _write_png(path, rows, size, np.dtype(kind), bands, palette)
    elif path.suffix == ".npy":
        _write_npy(path, rows, size, np.dtype(kind), bands)
    else:
        _write_tiff(path, rows, size, np.dtype(kind), bands, palette, georeference)


def _write_png(path, rows, size, kind, bands, palette):
    color = RGB if bands == 3 else GREY if palette is None else INDEX
    packer = zlib.compressobj(COMPRESSION)
    above = None
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        _chunk(file, b"IHDR", struct.pack(">IIBBBBB", *size, 8 * kind.itemsize, color, 0, 0, 0))
        if palette is not None:
            _chunk(file, b"PLTE", palette.astype(np.uint8).tobytes())
        for strip in rows:
            data = np.ascontiguousarray(strip, kind.newbyteorder(">")).reshape(len(strip), -1).view(np.uint8)
            if color != INDEX:                              # neighbours of a photograph are alike, indices are not
                before = np.zeros_like(data[:1]) if above is None else above
                above = data[-1:].copy()
                data = data - np.concatenate([before, data[:-1]])
            marked = np.full((len(data), data.shape[1] + 1), 0 if color == INDEX else UP, np.uint8)
            marked[:, 1:] = data
            packed = packer.compress(marked)
            if packed:
                _chunk(file, b"IDAT", packed)
        _chunk(file, b"IDAT", packer.flush())
        _chunk(file, b"IEND", b"")


def _chunk(file, name, data):
    file.write(struct.pack(">I", len(data)) + name)
    file.write(data)
    file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))


def _write_npy(path, rows, size, kind, bands):
    shape = size[::-1] if bands == 1 else (*size[::-1], bands)
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for strip in rows:
            file.write(np.ascontiguousarray(strip, kind))


def _write_tiff(path, rows, size, kind, bands, palette, georeference):
    rasterio = library()
    place = {}
    if georeference is not None:
        place = {"crs": georeference.crs, "transform": georeference.transform}
        if georeference.gcps:
            place = {"crs": georeference.crs, "gcps": list(georeference.gcps)}
    options = {"driver": "GTiff", "width": size[0], "height": size[1], "count": bands, "dtype": kind.name,
               "compress": "deflate", "bigtiff": "if_safer", "interleave": "pixel", "blockysize": 16}
    if bands == 3:
        options["photometric"] = "rgb"
    with rasterio.open(path, "w", **options, **place) as file:
        if palette is not None:
            file.write_colormap(1, {index: tuple(map(int, color)) for index, color in enumerate(palette)})
        top = 0
        for strip in rows:
            window = ((top, top + len(strip)), (0, size[0]))
            file.write(np.atleast_3d(strip).transpose(2, 0, 1), window=window)
            top += len(strip)
