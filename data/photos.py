"""Reading photographs as people have them: what the numbers in a file mean is one decision for a data set.

A photograph becomes 8-bit RGB, or as many bands of 8 bits as `bands` names. Files of 8 bits are taken as they are;
deeper ones are scaled from the full range of their type, or from `value_range`, which is the same for all files and
never that of one file. Pillow reads; TIFF and JPEG 2000 are read through rasterio where it is installed.
H, W of the photograph, K bands.
"""

from __future__ import annotations

import math
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.rasters import WHITE_IS_ZERO, Georeference, Raster, library, opened_raster
from data.tiff import (
    ASSOCIATED,
    BITS,
    EXTRA_SAMPLES,
    INSTALL,
    PHOTOMETRIC,
    PLANAR,
    SAMPLE_FORMAT,
    count_pages,
    describe_tiff,
)
from utils.scratch import release, scratch_array

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, AssertionError, Image.DecompressionBombError)
ORIENTATION = 0x0112                        # the EXIF tag
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
SIDEWAYS = tuple(UPRIGHT[number] for number in (5, 6, 7, 8))
MOST_PIXELS = 178_956_970                   # of a file that nobody named (Pillow's limit): a small file may claim many
MANY_PAGES = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")         # not MPO: phones add a depth map to their JPEG
RANGES = {"uint8": (0, 2 ** 8 - 1), "uint12": (0, 2 ** 12 - 1), "uint16": (0, 2 ** 16 - 1), "uint32": (0, 2 ** 32 - 1),
          "int8": (-2 ** 7, 2 ** 7 - 1), "int16": (-2 ** 15, 2 ** 15 - 1), "int32": (-2 ** 31, 2 ** 31 - 1)}
STRIP_PIXELS = 1 << 22                      # of a photograph, converted or read at once
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
SOFT_VALUES, SOFT_SHARE = 16, 0.1           # more values between 0 and 255, at more of the pixels: no transparency
OTHER_BYTE = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class PhotoFormat(NamedTuple):
    """value_range: (low, high) that become 0 and 255, None: the full range of a file's type; files of 8 bits have no
    other. bands: those of the file that are read, counted from 1; None: the first three, where a fourth that is
    transparency shows white. max_pixels: a file of more is refused; None: MOST_PIXELS."""

    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None
    max_pixels: float | None = None

    @property
    def channels(self) -> int:
        return 3 if self.bands is None else len(self.bands)

    def shown(self) -> PhotoFormat:
        """The same with three bands, for a picture: the first three, or the only one."""
        if self.channels == 3:
            return self
        return self._replace(bands=self.bands[:3] if len(self.bands) > 3 else self.bands[:1] * 3)


AS_STORED = PhotoFormat()


class BandImage:
    """A photograph of any number of bands (Pillow has at most four): a Pillow image of 8 bits for each."""

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands = list(bands)
        self.size = self.bands[0].size

    def _each(self, name, *args):
        return BandImage([getattr(band, name)(*args) for band in self.bands])

    def resize(self, *args) -> BandImage:
        return self._each("resize", *args)

    def crop(self, box: tuple[int, int, int, int]) -> BandImage:
        return self._each("crop", box)

    def transpose(self, turn: Image.Transpose) -> BandImage:
        return self._each("transpose", turn)


Picture = Image.Image | BandImage


def pixels_of(image: Picture) -> np.ndarray:
    """(H, W, K) uint8 of an RGB image or of bands."""
    if isinstance(image, BandImage):
        return np.stack([np.asarray(band) for band in image.bands], -1)
    return np.asarray(image)


def picture_of(pixels: np.ndarray) -> Picture:
    """The inverse of pixels_of."""
    if pixels.shape[-1] == 3:
        return Image.fromarray(pixels)
    return BandImage([Image.fromarray(np.ascontiguousarray(pixels[..., k])) for k in range(pixels.shape[-1])])


def photo_format(data: Mapping) -> PhotoFormat:
    """The format that a section of the settings asks for. ValueError for a range or bands that are none."""
    limits, bands = data.get("value_range") or None, data.get("bands") or None
    if limits is not None and not (len(limits) == 2 and all(type(end) in (int, float) for end in limits)
                                   and -math.inf < limits[0] < limits[1] < math.inf):
        raise ValueError(f"value_range={list(limits)}: expected [low, high], the values that become black and white")
    if bands is not None and not all(type(band) is int and band >= 1 for band in bands):
        raise ValueError(f"bands={list(bands)}: expected three bands, counted from 1, such as [1, 2, 3]")
    return PhotoFormat(limits and tuple(limits), bands and tuple(bands), data.get("max_pixels") or None)


# -- files -------------------------------------------------------------------------------------------------------------

OPENING = threading.Lock()                  # Pillow has one limit for all threads


def _pillow_open(path):
    """Image.open without its own limit of pixels, which check_pixels has."""
    with OPENING:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_pixels(size: tuple[int, int], max_pixels: float | None) -> None:
    """ValueError where (width, height) is more than max_pixels, None: MOST_PIXELS."""
    most = max_pixels or MOST_PIXELS
    if size[0] * size[1] > most:
        raise ValueError(f"{size[0]} x {size[1]} = {size[0] * size[1]} pixels, above the limit of {most}, which "
                         f"protects from files that claim more than they hold; to read it, name the file itself to "
                         f"predict.py, or set max_pixels (--max-pixels {size[0] * size[1]})")


@contextmanager
def opened(path: str | Path, what: str = "image", max_pixels: float | None = None) -> Iterator[Image.Image]:
    """Image.open, with one clear ValueError for whatever is wrong with the file, also while it is decoded inside, for a
    stack of several pages and for more than max_pixels (None: MOST_PIXELS)."""
    try:
        with _pillow_open(path) as image:
            check_pixels(image.size, max_pixels)
            pages = page_count(image)
            if pages > 1:
                raise ValueError(f"a stack of {pages} pages, of which only the first would be seen; store each page as "
                                 f"a file of its own")
            yield image
    except UnidentifiedImageError as error:
        known = describe_tiff(path)
        reason = f"{known}; {_remedy(what)}" if known else error
        raise ValueError(f"{path}: this {what} cannot be read ({reason})") from error
    except READ_ERRORS as error:
        raise ValueError(f"{path}: this {what} cannot be read ({error})") from error
    except MemoryError:                                     # such as a PNG whose last part claims two gigabytes
        raise ValueError(f"{path}: this {what} announces more than the memory holds; is it damaged?") from None


def _remedy(what):
    """What to do with a TIFF that Pillow does not know."""
    if what == "mask":
        return "store its class ids as 8-bit PNG"
    install = f"{INSTALL}, or " if library() is None else ""
    return (f"{install}write the three bands that the network is to see as an RGB file of 8 or 16 bits, such as "
            f"gdal_translate -b 1 -b 2 -b 3 -colorinterp red,green,blue IN OUT")


def page_count(image: Image.Image) -> int:
    """Pages of a TIFF, overviews and masks not counted, or pictures of an animation; 1 for other formats."""
    if image.format not in MANY_PAGES:
        return 1
    if image.format == "TIFF" and image.filename:
        return count_pages(image.filename)
    return getattr(image, "n_frames", 1)


# -- pixels ------------------------------------------------------------------------------------------------------------

def read_image(path: str | Path, exif: bool = False, photos: PhotoFormat = AS_STORED) -> Image.Image:
    """A photograph as Pillow's RGB image, 8 bits a channel; exif: turned upright as its EXIF orientation says.

    See PhotoFormat (of other than three bands, `shown` of it); 16 bits keep their upper 8 without a value_range.
    ValueError for a file that cannot be read, a stack of pages, bands that it does not have, and for floating-point
    pixels without a value_range.
    """
    return Image.fromarray(open_photo(path, exif, photos.shown()).rows())


class Photo:
    """A photograph that is read by rows. size (W, H); georeference: of a raster, or None."""

    def __init__(self, size: tuple[int, int], read: Callable[[int, int], np.ndarray],
                 georeference: Georeference | None = None) -> None:
        self.size = size
        self._read = read
        self.georeference = georeference

    def rows(self, top: int = 0, bottom: int | None = None) -> np.ndarray:
        """Rows top..bottom-1, (R, W, K) uint8; all without arguments."""
        return self._read(top, self.size[1] if bottom is None else bottom)

    def shown(self, top: int = 0, bottom: int | None = None) -> np.ndarray:
        """Rows as (R, W, 3), to be looked at."""
        rows = self.rows(top, bottom)
        return rows[..., :3] if rows.shape[-1] >= 3 else rows[..., :1].repeat(3, -1)

    def image(self) -> Image.Image:
        """The whole of it in RGB."""
        return Image.fromarray(self.shown())


def strips(width: int, height: int, begin: int = 0) -> Iterator[tuple[int, int]]:
    """(first row, row behind the last) of strips of about STRIP_PIXELS."""
    rows = max(1, STRIP_PIXELS // max(width, 1))
    for top in range(begin, height, rows):
        yield top, min(top + rows, height)


def open_photo(path: str | Path, exif: bool = False, photos: PhotoFormat = AS_STORED) -> Photo:
    """A photograph as read_image describes it, of all bands of `photos`. Rows of a file that rasterio reads come from
    the file as they are asked for; others are decoded as a whole, and large ones wait in a temporary file."""
    with opened_raster(path) as raster:
        if raster is not None:
            check_raster(raster, path, photos)
            return Photo(raster.size, lambda top, bottom: _rows_of_raster(path, photos, top, bottom),
                         raster.georeference)
    with opened(path, max_pixels=photos.max_pixels) as image:
        read = part_reader(image, photos)               # loads it: a TIFF is upright after that, and has no orientation
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION)) if exif else None
        size = image.size
        upright = size[::-1] if turn in SIDEWAYS else size
        pixels = scratch_array((*upright[::-1], photos.channels), np.uint8)
        for top, bottom in strips(*upright):
            part = read(_box_before(turn, size, top, bottom))
            pixels[top:bottom] = pixels_of(part if turn is None else part.transpose(turn))
            release(pixels)

    def rows(top, bottom):
        copy = np.array(pixels[top:bottom])
        release(pixels)
        return copy
    return Photo(upright, rows)


def _box_before(turn, size, top, bottom):
    """Where rows top..bottom-1 of a turned image are in the image before it is turned, of this size."""
    width, height = size
    if turn in (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270):
        return top, 0, bottom, height
    if turn in SIDEWAYS:
        return width - bottom, 0, width - top, height
    if turn in (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM):
        return 0, height - bottom, width, height - top
    return 0, top, width, bottom


def check_raster(raster: Raster, path: str | Path, photos: PhotoFormat) -> None:
    """ValueError for too many pixels, bands that the file does not have and numbers without a known range."""
    try:
        check_pixels(raster.size, photos.max_pixels)
        bands_of(raster.count, photos.bands)
        if raster.depth != "uint8" and photos.value_range is None:
            _range_of(raster.depth)
    except ValueError as error:
        raise ValueError(f"{path}: this image cannot be read ({error})") from error


def raster_part(raster: Raster, photos: PhotoFormat, box: tuple[int, int, int, int]) -> np.ndarray:
    """A box (left, top, right, bottom) of a raster, see check_raster, as (h, w, K) uint8."""
    values = raster.read(box, bands_of(raster.count, photos.bands))
    if raster.depth != "uint8":
        values = _scaled(values, raster.depth, photos.value_range)
    return values if photos.bands is not None or values.shape[-1] == 3 else values.repeat(3, -1)


def _rows_of_raster(path, photos, top, bottom):
    with opened_raster(path) as raster:
        return raster_part(raster, photos, (0, top, raster.size[0], bottom))


def to_bands(image: Image.Image, photos: PhotoFormat = AS_STORED) -> Picture:
    """An opened Pillow image, not loaded yet, as RGB or as the bands of `photos`, see read_image."""
    return part_reader(image, photos)(None)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened Pillow image, not loaded yet, in the mode RGB, see read_image."""
    return to_bands(image)


def part_reader(image: Image.Image, photos: PhotoFormat = AS_STORED) -> Callable[[tuple | None], Picture]:
    """Load an opened Pillow image; returns a function: box (left, top, right, bottom), None: all -> see to_bands.

    What holds for the whole image, such as the meaning of a fourth band, is decided here."""
    check_pillow(image)
    if depth_of(image) != "uint8":
        whole = _of_deep(image, photos)
        return lambda box: whole if box is None else whole.crop(box)
    convert = _converter(image, photos.bands)
    return lambda box: convert(image if box is None else image.crop(box))


def _converter(image, bands):
    """A function that makes RGB, or bands, of an 8-bit image, which is loaded, and of parts of it."""
    if bands is not None:
        if image.mode == "RGB" and rawmode_of(image) == "RGBX" and max(bands) > 3:
            _decode_as(image, "RGBA", "RGBA")               # the fourth band of such a TIFF
        image.load()

        def chosen(part):
            if part.mode not in ("L", "LA", "RGB", "RGBA"):
                part = part.convert("L" if part.mode == "1" else "RGB")
            channels = part.split()
            found = [channels[band - 1] for band in bands_of(len(channels), bands)]
            return Image.merge("RGB", found) if len(found) == 3 else BandImage(found)
        return chosen
    has_alpha = image.mode in ALPHA_MODES
    if image.has_transparency_data and (not has_alpha or alpha_of(image) != "data"):
        return lambda part: _on_white(part.convert("RGBA"))
    image.load()                                            # convert of an RGB file would read it lazily
    return lambda part: part if part.mode == "RGB" else part.convert("RGB")


def _of_deep(image, photos):
    depth, has_alpha = depth_of(image), image.mode in ALPHA_MODES       # not of an RGBX TIFF, whose fourth band is data
    values = deep_values(image, depth)                                                       # (H, W, K)
    chosen = values[..., [band - 1 for band in bands_of(values.shape[-1], photos.bands)]]
    scaled = _scaled(chosen, depth, photos.value_range)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC, 1) == WHITE_IS_ZERO:     # Pillow turns 8 bits alone
        scaled = 255 - scaled
    if photos.bands is not None:
        return picture_of(scaled)
    rgb = Image.fromarray(scaled[..., 0] if scaled.shape[-1] == 1 else scaled).convert("RGB")
    if has_alpha:
        alpha = Image.fromarray((values[..., -1] >> 8).astype(np.uint8))
        if alpha_kind(image, alpha.histogram()) == "transparency":
            return _on_white(Image.merge("RGBA", (*rgb.split(), alpha)))
    return rgb


def _on_white(image):
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def check_pillow(image: Image.Image) -> None:
    """ValueError for files that Pillow reads wrongly and rasterio does not."""
    if image.format == "JPEG2000" and image.mode in ("RGB", "RGBA") and _bits_of_jpeg2000(image.filename) > 8:
        raise ValueError(f"JPEG 2000 colours of more than 8 bits, of which Pillow keeps 8; {INSTALL}")
    if image.format == "TIFF" and image.mode in ("L", "RGB") and image.tag_v2.get(SAMPLE_FORMAT, (1,))[0] == 2:
        raise ValueError(f"signed numbers of 8 bits, which Pillow takes for unsigned ones; {INSTALL}")


def _bits_of_jpeg2000(path):
    """Bits of the first component, from the box ihdr or the marker SIZ."""
    with open(path, "rb") as file:
        head = file.read(4096)
    place = head.find(b"ihdr") + 14 if not head.startswith(b"\xff\x4f") else 42
    return (head[place] & 127) + 1 if place < len(head) and head[place] != 255 else 8


def bands_of(count, bands):
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
    whole = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
    return alpha_kind(image, whole.getchannel("A").histogram())


def alpha_kind(image, histogram):
    """histogram (256,) of the pixels of the fourth band, in 8 bits."""
    counts = np.array(histogram)
    soft = counts[1:255]
    if counts[255] == counts.sum():
        return "opaque"
    if image.format == "TIFF":                              # writers tag any fourth band as unassociated
        return "transparency" if ASSOCIATED in image.tag_v2.get(EXTRA_SAMPLES, ()) else "data"
    return "data" if (soft > 0).sum() >= SOFT_VALUES and soft.sum() > SOFT_SHARE * counts.sum() else "transparency"


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
        raise ValueError(f"16-bit colours that lie band by band (planar), which Pillow reads wrongly; {INSTALL}, or "
                         f"store them pixel by pixel: gdal_translate -co INTERLEAVE=PIXEL IN OUT")
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
    with _pillow_open(image.filename) as again:
        _decode_as(again, image.mode, other)
        low = np.asarray(again)
    return np.asarray(image).astype(np.uint16) << 8 | low


def _range_of(depth):
    """(lowest, highest) number of a type; ValueError for those that have no known range."""
    if depth not in RANGES:
        kind = "floating-point pixels" if depth.startswith("float") else f"{depth} pixels"
        raise ValueError(f"{kind} have no known range; convert them to 8 bits, or set value_range: [low, high], the "
                         f"values that become black and white")
    return RANGES[depth]


def _scaled(values, depth, value_range):
    """Numbers of a type in 0 to 255, uint8: of its full range the upper 8 bits, of value_range linear and rounded."""
    if value_range is None:
        low, high = _range_of(depth)
        bits = (high - low).bit_length()
        return ((values.astype(np.int64) - low) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    low, high = value_range
    if depth == "uint16":                                   # a table is faster than arithmetic on every pixel
        return _linear(np.arange(2 ** 16), low, high)[values]
    return _linear(values, low, high)


def _linear(values, low, high):
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(np.nan_to_num(scaled, nan=0.0).clip(0, 255) + 0.5).astype(np.uint8)
