"""Reading photographs as people have them: what the numbers in a file mean is one decision for a data set.

A photograph becomes 8-bit RGB. Files of 8 bits are taken as they are; deeper ones are scaled from the full range of
their type, or from `value_range`, which is the same for all files and never that of one file. `bands` chooses three.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, AssertionError, Image.DecompressionBombError)
ORIENTATION = 0x0112                        # the EXIF tag
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
# TIFF tags, and how many bytes a value of each of its types has
SUBFILE, BITS, SAMPLES, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT = 254, 258, 277, 284, 338, 339
MOST_PAGES, MOST_TAGS = 1000, 4096          # more are damage, or malice
READ_TAGS = (SUBFILE, BITS, SAMPLES, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT)
TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
REDUCED, TRANSPARENCY_MASK = 1, 4           # bits of SUBFILE: an overview, not a page
ASSOCIATED = 1                              # of EXTRA_SAMPLES: the only fourth band that is transparency for certain
MANY_PAGES = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")         # not MPO: phones add a depth map to their JPEG
RANGES = {"uint8": (0, 2 ** 8 - 1), "uint12": (0, 2 ** 12 - 1), "uint16": (0, 2 ** 16 - 1), "uint32": (0, 2 ** 32 - 1),
          "int16": (-2 ** 15, 2 ** 15 - 1), "int32": (-2 ** 31, 2 ** 31 - 1)}
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
LEAST_USED = 1 / 8                          # of its type's range, or the numbers mean something else
SOFT_VALUES, SOFT_SHARE = 16, 0.1           # more values between 0 and 255, at more of the pixels: no transparency
OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class PhotoFormat(NamedTuple):
    """value_range: (low, high) that become 0 and 255, None: the full range of a file's type; files of 8 bits have no
    other. bands: three, counted from 1; None: the first three, where a fourth that is transparency shows white."""

    value_range: tuple[float, float] | None = None
    bands: tuple[int, int, int] | None = None


AS_STORED = PhotoFormat()


def photo_format(data: Mapping) -> PhotoFormat:
    """The format that a section of the settings asks for. ValueError for a range or bands that are none."""
    limits, bands = data.get("value_range") or None, data.get("bands") or None
    if limits is not None and not (len(limits) == 2 and all(type(end) in (int, float) for end in limits)
                                   and -math.inf < limits[0] < limits[1] < math.inf):
        raise ValueError(f"value_range={list(limits)}: expected [low, high], the values that become black and white")
    if bands is not None and (len(bands) != 3 or not all(type(band) is int and band >= 1 for band in bands)):
        raise ValueError(f"bands={list(bands)}: expected three bands, counted from 1, such as [1, 2, 3]; the network "
                         f"takes red, green and blue")
    return PhotoFormat(limits and tuple(limits), bands and tuple(bands))


# -- files -------------------------------------------------------------------------------------------------------------

@contextmanager
def opened(path: str | Path, what: str = "image") -> Iterator[Image.Image]:
    """Image.open, with one clear ValueError for whatever is wrong with the file, also while it is decoded inside, and
    for a stack of several pages."""
    try:
        with Image.open(path) as image:
            pages = page_count(image)
            if pages > 1:
                raise ValueError(f"a stack of {pages} pages, of which only the first would be seen; store each page as "
                                 f"a file of its own")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: this {what} cannot be read ({_unknown_tiff(path) or error})") from error
    except READ_ERRORS as error:
        raise ValueError(f"{path}: this {what} cannot be read ({error})") from error
    except MemoryError:                                     # such as a PNG whose last part claims two gigabytes
        raise ValueError(f"{path}: this {what} announces more than the memory holds; is it damaged?") from None


def page_count(image: Image.Image) -> int:
    """Pages of a TIFF, overviews and masks not counted, or pictures of an animation; 1 for other formats."""
    if image.format not in MANY_PAGES:
        return 1
    if image.format == "TIFF" and image.filename:
        pages = list(tiff_pages(image.filename))
        return sum(not tags.get(SUBFILE, (0,))[0] & (REDUCED | TRANSPARENCY_MASK) for tags in pages)
    return getattr(image, "n_frames", 1)


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


def _unknown_tiff(path):
    """What is in a TIFF that Pillow does not know, in words; None for other files."""
    try:
        tags = next(tiff_pages(path), None)
    except (OSError, struct.error):
        return None
    if not tags:
        return None
    bands = tags.get(SAMPLES, (1,))[0]
    bits = "/".join(map(str, sorted(set(tags.get(BITS, (1,))))))
    kind = {1: "", 2: "signed ", 3: "floating-point "}.get(tags.get(SAMPLE_FORMAT, (1,))[0], "")
    return (f"a TIFF of {bands} {'band' if bands == 1 else 'bands'} of {bits} {kind}bits; write the three bands that "
            f"the network is to see as an RGB file of 8 or 16 bits, such as gdal_translate -b 1 -b 2 -b 3 -colorinterp "
            f"red,green,blue IN OUT")


# -- pixels ------------------------------------------------------------------------------------------------------------

def read_image(path: str | Path, exif: bool = False, photos: PhotoFormat = AS_STORED) -> Image.Image:
    """A photograph as Pillow's RGB image, 8 bits a channel; exif: turned upright as its EXIF orientation says.

    See PhotoFormat; 16 bits keep their upper 8 without a value_range. ValueError for a file that cannot be read, a
    stack of pages, bands that it does not have, and for floating-point pixels without a value_range.
    """
    with opened(path) as image:
        rgb = to_rgb(image, photos)
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION)) if exif else None      # TIFF is upright once it is loaded
        return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image, photos: PhotoFormat = AS_STORED) -> Image.Image:
    """An opened Pillow image, not loaded yet, in the mode RGB, see read_image."""
    depth = depth_of(image)
    if depth == "uint8":
        return _rgb_of_bytes(image, photos.bands)
    has_alpha = image.mode in ALPHA_MODES                   # not an RGBX TIFF, of whose fourth band that is said
    values = deep_values(image, depth)                                                       # (H, W, K)
    chosen = values[..., [band - 1 for band in _bands_of(values.shape[-1], photos.bands)]]
    scaled = _scaled(chosen, depth, photos.value_range)
    rgb = Image.fromarray(scaled[..., 0] if scaled.shape[-1] == 1 else scaled).convert("RGB")
    if photos.bands is None and has_alpha:
        alpha = (values[..., -1] >> 8).astype(np.uint8)
        if _alpha_kind(image, alpha) == "transparency":
            return _on_white(Image.merge("RGBA", (*rgb.split(), Image.fromarray(alpha))))
    return rgb


def _rgb_of_bytes(image, bands):
    if bands is not None:
        channels = byte_channels(image, max(bands))
        chosen = [channels[band - 1] for band in _bands_of(len(channels), bands)]
        return Image.merge("RGB", chosen)
    has_alpha = image.mode in ALPHA_MODES
    if image.has_transparency_data and (not has_alpha or alpha_of(image) != "data"):
        return _on_white(image.convert("RGBA"))
    image.load()                                            # convert of an RGB file would read it lazily
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image):
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def byte_channels(image: Image.Image, needed: int = 3) -> list[Image.Image]:
    """The channels of an 8-bit image, the fourth one of an RGBX TIFF too where it is `needed`."""
    if image.mode == "RGB" and rawmode_of(image) == "RGBX" and needed > 3:
        _decode_as(image, "RGBA", "RGBA")
    image.load()
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return list(image.split())


def _bands_of(count, bands):
    """The bands (from 1) to show of `count`; ValueError where one is not there."""
    if bands is None:
        return (1, 2, 3) if count >= 3 else (1,)
    if max(bands) > count:
        raise ValueError(f"{count} {'band' if count == 1 else 'bands'}; bands: {list(bands)} names band {max(bands)}"
                         f"{'; of a grey photograph bands: [1, 1, 1] takes the one there is' if count == 1 else ''}")
    return bands


def alpha_of(image: Image.Image) -> str:
    """none, opaque, transparency, or data: a fourth band that means something else and is never blended."""
    if image.mode not in ALPHA_MODES:
        return "none"
    return _alpha_kind(image, np.asarray(image.convert("RGBA").getchannel("A")))


def _alpha_kind(image, alpha):
    counts = np.bincount(alpha.ravel(), minlength=256)
    soft = counts[1:255]
    if counts[255] == alpha.size:
        return "opaque"
    if image.format == "TIFF":                              # writers tag any fourth band as unassociated
        return "transparency" if ASSOCIATED in image.tag_v2.get(EXTRA_SAMPLES, ()) else "data"
    return "data" if (soft > 0).sum() >= SOFT_VALUES and soft.sum() > SOFT_SHARE * alpha.size else "transparency"


def rawmode_of(image):
    """How Pillow unpacks the file, such as "RGB;16L"; "" once it is loaded."""
    tile = getattr(image, "tile", None)
    if not tile:
        return ""
    args = tile[0].args
    return str(args[0] if isinstance(args, tuple) else args)


def _decode_as(image, mode, rawmode):
    """Have an image that is not loaded yet unpacked in another way. Only between layouts of as many bits a pixel."""
    image._mode = mode
    image.tile = [tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
                  for tile in image.tile]


def depth_of(image):
    """The type of the file's numbers, a key of RANGES or float32. CMYK counts as 8 bits."""
    if image.mode == "F":
        return "float32"
    if image.mode.startswith("I"):
        if image.format == "TIFF":
            signed = image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2
            return f"{'int' if signed else 'uint'}{image.tag_v2.get(BITS, (16,))[0]}"
        return "int32" if image.mode == "I" else "uint16"
    rawmode = rawmode_of(image)                               # of one band, without its bits, in a planar TIFF
    deep = ";16" in rawmode or (rawmode and image.format == "TIFF" and max(image.tag_v2.get(BITS, (8,))) == 16)
    return "uint16" if deep and image.mode != "CMYK" else "uint8"


def deep_values(image: Image.Image, depth: str) -> np.ndarray:
    """The file's own numbers (H, W, K) of an opened image of more than 8 bits; K: 1, 2 with transparency, 3 or 4.

    Pillow keeps the upper byte of colours of 16 bits; unpacked in the other order of bytes it gives the lower one.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)[..., None]
        return values.view(np.uint32) if depth == "uint32" else values
    rawmode = rawmode_of(image)
    if image.format == "TIFF" and image.tag_v2.get(PLANAR, 1) == 2:
        raise ValueError("16-bit colours that lie band by band (planar), which Pillow reads wrongly; store them pixel "
                         "by pixel: gdal_translate -co INTERLEAVE=PIXEL IN OUT")
    if rawmode.startswith("RGBa"):
        raise ValueError("16-bit colours multiplied by their transparency, which lose bits when they are read; store "
                         "them without transparency")
    if rawmode == "LA;16B":                                 # four bytes: upper and lower of grey, of transparency
        _decode_as(image, "RGBA", "RGBA")
        parts = np.asarray(image).astype(np.uint16)
        return parts[..., 0::2] << 8 | parts[..., 1::2]
    other = rawmode[:-1] + OTHER_BYTE[rawmode[-1]]
    if rawmode.startswith("RGBX"):
        rawmode, other = (name.replace("RGBX", "RGBA") for name in (rawmode, other))
        _decode_as(image, "RGBA", rawmode)
    with Image.open(image.filename) as again:
        _decode_as(again, image.mode, other)
        low = np.asarray(again)
    return np.asarray(image).astype(np.uint16) << 8 | low


def _scaled(values, depth, value_range):
    """Numbers of a type in 0 to 255, uint8: of its full range the upper 8 bits, of value_range linear and rounded."""
    if value_range is None:
        if depth not in RANGES:
            raise ValueError("floating-point pixels have no known range; convert them to 8 bits, or set value_range: "
                             "[low, high], the values that become black and white")
        low, high = RANGES[depth]
        bits = (high - low).bit_length()
        return ((values.astype(np.int64) - low) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    low, high = value_range
    if depth == "uint16":                                   # a table is faster than arithmetic on every pixel
        return _linear(np.arange(2 ** 16), low, high)[values]
    return _linear(values, low, high)


def _linear(values, low, high):
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(np.nan_to_num(scaled, nan=0.0).clip(0, 255) + 0.5).astype(np.uint8)


# -- what a file, or a set of them, may mean ---------------------------------------------------------------------------

def examine(image: Image.Image) -> dict:
    """What the check of a data set has to know of an opened image, whose pixels are all decoded: depth, bands, values
    ([lowest, highest] of each band, of files of more than 8 bits), alpha (see alpha_of)."""
    depth = depth_of(image)
    if depth == "uint8":
        alpha = alpha_of(image)
        if image.mode == "RGB" and rawmode_of(image) == "RGBX":
            bands = 4
        else:
            bands = len(image.getbands()) if image.mode in ("L", "LA", "RGB", "RGBA") else 1 if image.mode == "1" else 3
        _rgb_of_bytes(image, None)
        return {"depth": depth, "bands": bands, "alpha": alpha}
    has_alpha = image.mode in ALPHA_MODES
    values = deep_values(image, depth)
    if not values.size:
        return {"depth": depth, "bands": values.shape[-1], "alpha": "none", "values": []}
    finite = np.where(np.isfinite(values), values, np.nan) if depth == "float32" else values
    lowest, highest = (np.atleast_1d(f(finite, axis=(0, 1))).tolist() for f in (np.nanmin, np.nanmax)) \
        if not np.isnan(finite).all() else ([0.0], [0.0])
    alpha = _alpha_kind(image, values[..., -1] >> 8) if has_alpha else "none"
    return {"depth": depth, "bands": values.shape[-1], "alpha": alpha,
            "values": [list(pair) for pair in zip(lowest, highest, strict=True)]}


def used_range(record: Mapping, photos: PhotoFormat) -> tuple[float, float] | None:
    """(lowest, highest) value of the bands shown of a file of more than 8 bits, from examine; None for others."""
    if not record.get("values"):
        return None
    bands = _bands_of(record["bands"], photos.bands)
    pairs = [record["values"][band - 1] for band in bands]
    return min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)


def range_doubt(depth: str, low: float, high: float) -> str | None:
    """What is odd about numbers of a type that lie between low and high, with the setting to give; None if nothing."""
    if depth not in RANGES:
        return (f"floating-point pixels have no known range; convert them to 8 bits, or set value_range: [{low:g}, "
                f"{high:g}], the range that was found (--value-range {low:g} {high:g})")
    least, most = RANGES[depth]
    if high - low >= LEAST_USED * (most - least):
        return None
    low, high = int(low), int(high)
    below = 0 if low >= 0 and (low == high or low <= 3 * (high - low)) else low
    above = 2 ** high.bit_length() - 1 if below == 0 else high
    below, above = (below, above) if below < above else (below, below + 1)
    return (f"{depth} pixels use {low} to {high} of {least} to {most}, less than an eighth, so that they would be "
            f"nearly one grey; set value_range: [{below}, {above}] (--value-range {below} {above}), the values that "
            f"become black and white")


def band_doubt(alpha: str) -> str | None:
    if alpha != "data":
        return None
    return "a fourth band that is no transparency is not shown; bands: [1, 2, 3] (--bands 1 2 3) says so"


def photo_doubts(path: str | Path, photos: PhotoFormat) -> list[str]:
    """What may be read wrongly in a single photograph, for a warning."""
    with opened(path) as image:
        plain = depth_of(image) == "uint8"
        if plain and alpha_of(image) == "none" or photos.value_range is not None and photos.bands is not None:
            return []
        record = examine(image) if not plain else {"alpha": alpha_of(image)}
        limits = used_range(record, photos) if photos.value_range is None else None
        doubts = [range_doubt(record["depth"], *limits) if limits else None,
                  band_doubt(record["alpha"]) if photos.bands is None else None]
        return [doubt for doubt in doubts if doubt]


def set_doubts(records: Sequence[Mapping], photos: PhotoFormat) -> list[str]:
    """Warnings about the photographs of a set, from `examine` and with their path under "image". ValueError where it
    uses less than an eighth of the range of its type and value_range is not set, and where the fourth band is
    transparency in one file and something else in another."""
    if photos.value_range is None:
        found: dict[str, list] = {}
        for record in records:
            limits = used_range(record, photos)
            if limits is not None:
                found.setdefault(record["depth"], []).append((*limits, record["image"]))
        for depth, limits in found.items():
            doubt = range_doubt(depth, min(pair[0] for pair in limits), max(pair[1] for pair in limits))
            if doubt:
                raise ValueError(f"{limits[0][2]}: {doubt} ({len(limits)} {'file' if len(limits) == 1 else 'files'})")
    if photos.bands is not None:
        return []
    data, clear = ([record["image"] for record in records if record.get("alpha") == kind]
                   for kind in ("data", "transparency"))
    if data and clear:
        raise ValueError(f"{data[0]} and {clear[0]}: the fourth band is transparency in one and something else in the "
                         f"other; set bands: [1, 2, 3] (--bands 1 2 3) to show no file transparent")
    return [f"WARNING: {data[0]}: {band_doubt('data')} ({len(data)} files)"] if data else []
