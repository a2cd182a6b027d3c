"""Masks and photographs as people have them: read as what they mean, or refused in one line. Whole runs of the image scripts at the end."""

import io
import json
import struct

import numpy as np
import pytest
import yaml
from PIL import Image

import evaluate
import predict
import train_eomt
import train_linear_head
import train_m2f_head
import train_pmt_head
import train_prototype
import train_segmentation
import train_upernet_head
from data.image_results import write_labels
from data.image_splits import check_file_settings, checked_dataset, mask_reader, training_doubts
from data.images import SegmentationDataset, check_pairs, label_table, pair_files, to_label
from data.label_map import read_label_map
from data.masks import MaskReader, label_to_file, open_mask
from data.photo_values import photo_doubts
from data.photos import PhotoFormat, photo_format, read_image
from data.tiff import tiff_pages
from tests.tiny_heads import SMALL, add_tiny_backbone
from tests.tiny_images import COLORS, shrink_unet, tiny_picture, write_classes, write_pictures
from utils.checkpoint import load_checkpoint
from utils.losses import IGNORE_INDEX

IDS = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)


def tiff(path, bands, *, extra=None, planar=False, signed=False, photometric=None, pages=1, bits=None):
    """A TIFF as other tools write it, uncompressed and little-endian: bands (K, H, W) of 8, 16 or 32 bits, or (H, W)."""
    bands = np.atleast_3d(np.asarray(bands).T).T if np.asarray(bands).ndim == 2 else np.asarray(bands)
    count, height, width = bands.shape
    bits = bits or 8 * bands.itemsize
    data = bands.tobytes() if planar else bands.transpose(1, 2, 0).tobytes()
    if bits in (1, 2, 4):                                                  # rows are packed, the first pixel in the highest bits
        flat = np.unpackbits(bands[0][..., None], axis=-1)[..., 8 - bits:].reshape(height, -1)
        data = np.packbits(flat, axis=1).tobytes()
    out, place = io.BytesIO(), 8
    out.write(b"II*\0" + struct.pack("<I", 8))
    for page in range(pages):
        tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * count), 259: (3, [1]),
                262: (3, [photometric if photometric is not None else 2 if count >= 3 else 1]), 277: (3, [count]), 278: (4, [height]),
                284: (3, [2 if planar else 1])}
        if extra is not None:
            tags[338] = (3, [extra] * (count - 3 if count > 3 else 1))
        if signed:
            tags[339] = (3, [2] * count)
        strips = count if planar else 1
        tags[273], tags[279] = (4, [0] * strips), (4, [len(data) // strips] * strips)
        directory = 2 + 12 * len(tags) + 4
        rest = place + directory
        long = {}
        for tag, (kind, values) in tags.items():
            size = len(values) * (2 if kind == 3 else 4)
            if size > 4:
                long[tag], rest = rest, rest + size
        tags[273] = (4, [rest + i * len(data) // strips for i in range(strips)])
        out.seek(place)
        out.write(struct.pack("<H", len(tags)))
        for tag in sorted(tags):
            kind, values = tags[tag]
            raw = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
            out.write(struct.pack("<HHI", tag, kind, len(values)) + (struct.pack("<I", long[tag]) if tag in long else raw.ljust(4, b"\0")))
        following = rest + len(data)
        out.write(struct.pack("<I", following if page < pages - 1 else 0))
        for tag in sorted(long):
            kind, values = tags[tag]
            out.seek(long[tag])
            out.write(struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values))
        out.seek(rest)
        out.write(data)
        place = following
    path.write_bytes(out.getvalue())
    return path


def noise(height=6, width=8, bands=3, seed=0, high=256, kind=np.uint8):
    return np.random.default_rng(seed).integers(0, high, (height, width, bands)).astype(kind)


def save(path, array, mode=None, palette=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def pair(folder, name, mask, image=None, suffix=".png", **options):
    mask = np.asarray(mask)
    image = noise(*mask.shape[:2], seed=len(name)) if image is None else image
    return save(folder / "images" / f"{name}.png", image), save(folder / "masks" / f"{name}{suffix}", mask, **options)


# -- numbers of masks --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_tiffs_of_few_bits_hold_their_own_numbers(tmp_path, bits, photometric):
    values = IDS & 2 ** bits - 1
    assert (np.asarray(open_mask(tiff(tmp_path / "m.tif", values, bits=bits, photometric=photometric))) == values).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pngs_of_few_bits_hold_their_own_numbers(tmp_path, bits):
    """Pillow writes grey PNG of 8 bits only: the header and the rows of another are made here."""
    import zlib

    values = IDS * (1 if bits == 2 else 2 ** bits // 4) % 2 ** bits
    rows = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., 8 - bits:].reshape(2, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0))
                                     + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    assert (np.asarray(open_mask(tmp_path / "m.png")) == values).all()
    assert check_pairs([(save(tmp_path / "i.png", noise(2, 4)), tmp_path / "m.png")], 16).class_counts.sum() == 8


@pytest.mark.parametrize("name, options, said", [
    ("m.jpg", {"quality": 100}, "a JPEG mask"), ("m.webp", {"quality": 90}, "a lossy WebP mask"), ("m.png", {"format": "JPEG"}, "a JPEG mask"),
    ("m.tif", {"compression": "jpeg"}, "a TIFF with lossy compression mask")])
def test_lossy_masks_are_refused_whatever_they_hold(tmp_path, name, options, said):
    path = save(tmp_path / name, np.zeros((16, 16), np.uint8), **options)
    with pytest.raises(ValueError, match=f"{name}: {said}: .*store masks as PNG"):
        open_mask(path)
    with pytest.raises(ValueError, match=f"{name}: {said}: .*store masks as PNG"):
        check_pairs([(save(tmp_path / "i.bmp", noise(16, 16)), path)], 3)


def test_lossless_webp_and_equal_channels_are_ids(tmp_path):
    for path in (save(tmp_path / "m.webp", np.stack([IDS] * 3, -1), lossless=True), save(tmp_path / "m.png", np.stack([IDS] * 3, -1)),
                 save(tmp_path / "a.png", np.dstack([IDS, IDS, IDS, np.full_like(IDS, 255)])), save(tmp_path / "la.png", IDS, "LA")):
        assert (np.asarray(open_mask(path)) == IDS).all()
    with pytest.raises(ValueError, match=r"c.png: a colour mask \(mode RGB\); replace each colour"):
        open_mask(save(tmp_path / "c.png", noise()))
    clear = np.dstack([IDS, IDS, IDS, np.full_like(IDS, 100)])
    with pytest.raises(ValueError, match=r"t.png: a colour mask \(mode RGBA\)"):
        open_mask(save(tmp_path / "t.png", clear))
    with pytest.raises(ValueError, match=r"f.tif: this mask cannot be read \(a TIFF of 1 band of 5 bits; store its class ids as 8-bit PNG\)"):
        open_mask(tiff(tmp_path / "f.tif", IDS, bits=5))
    with pytest.raises(ValueError, match="d.png: a mask of more than 8 bits.*label_map"):
        open_mask(save(tmp_path / "d.png", IDS.astype(np.uint16)))


def reader_of(tmp_path, colors=COLORS, num_classes=3, **more):
    (tmp_path / "classes.json").write_text(json.dumps({"classes": list("abcdef"[:num_classes]), "palette": np.asarray(colors).tolist()}))
    return mask_reader({"root": tmp_path, "ignore_label": 255, "reduce_zero_label": False, **more}, num_classes)


@pytest.mark.parametrize("more", [{}, {"reduce_zero_label": True}, {"label_map": "0:0,100:1,255:2"}])
def test_masks_in_the_colours_of_the_class_file(tmp_path, more):
    label = IDS % 3
    pairs = [pair(tmp_path, "a", COLORS[label].astype(np.uint8)), pair(tmp_path, "b", COLORS[[[0, 0, 0, 0]] * 2].astype(np.uint8))]
    masks = reader_of(tmp_path, **more)
    summary = check_pairs(pairs, 3, masks=masks)
    assert summary.class_counts.tolist() == [4 + 8 - 0 if (label == 0).sum() == 4 else -1, 2, 2]
    dataset = SegmentationDataset(pairs, 4, 3, views="whole", masks=masks)
    assert (dataset[0]["label"].numpy() == label).all() and (dataset[1]["label"] == 0).all()


def test_an_unknown_colour_is_an_error_with_its_count(tmp_path):
    colors = COLORS[IDS % 3].astype(np.uint8)
    colors[0, :2] = (1, 2, 3)
    pairs = [pair(tmp_path, "a", COLORS[IDS % 3].astype(np.uint8)), pair(tmp_path, "b", colors)]
    with pytest.raises(ValueError, match=r"b.png: the colour \(1, 2, 3\) at 2 pixels is in no class of .*classes.json"):
        check_pairs(pairs, 3, masks=reader_of(tmp_path))
    with pytest.raises(ValueError, match=r"the colour \(1, 2, 3\) at 2 pixels"):
        reader_of(tmp_path).open(pairs[1][1])


def test_greys_that_may_be_numbers_or_colours(tmp_path):
    """Black and white masks stored as RGB: 255 is a class by its colour, where it is no number; both at once is an error."""
    black_white = np.stack([np.where(IDS % 2, 255, 0)] * 3, -1).astype(np.uint8)
    masks = reader_of(tmp_path, [[0, 0, 0], [255, 255, 255], [9, 9, 8]], ignore_label=200)
    assert check_pairs([pair(tmp_path, "a", black_white)], 3, masks=masks).class_counts.tolist() == [4, 4, 0] and masks.as_colors
    masks = reader_of(tmp_path, [[1, 1, 1], [0, 0, 0], [9, 9, 8]])
    with pytest.raises(ValueError, match=r"b.png: \(0, 0, 0\) can be the number 0 and a colour of .*classes.json"):
        check_pairs([pair(tmp_path, "b", np.stack([IDS % 2] * 3, -1))], 3, masks=masks)
    masks = reader_of(tmp_path, [[0, 0, 0], [0, 0, 0], [9, 9, 8]])
    with pytest.raises(ValueError, match="classes 0 and 1 have the same colour"):
        check_pairs([pair(tmp_path, "c", np.full((2, 2, 3), (9, 9, 8), np.uint8))], 3, masks=masks)


def test_palettes_are_compared_over_the_set_and_with_the_class_file(tmp_path):
    label = IDS % 3
    turned = [2, 0, 1]                                                     # an editor's order: the same picture, other numbers
    first = pair(tmp_path, "a", label, palette=COLORS)
    other = pair(tmp_path, "b", np.argsort(turned)[label].astype(np.uint8), palette=COLORS[turned])
    assert (np.array(Image.open(first[1]).convert("RGB")) == np.array(Image.open(other[1]).convert("RGB"))).all()
    with pytest.raises(ValueError, match=r"a.png and .*b.png: index 0 of their palettes is \(40, 60, 200\) in one and"):
        check_pairs([first, other], 3)
    with pytest.raises(ValueError, match=r"b.png and .*classes.json: index 0 of the palette is \(200, 50, 40\), the class has"):
        check_pairs([first, other], 3, masks=reader_of(tmp_path))
    plain = pair(tmp_path, "c", label)                                     # grey masks and palettes of greys show nothing
    grey = pair(tmp_path, "d", label, palette=np.arange(3)[:, None].repeat(3, 1))
    longer = pair(tmp_path, "e", label, palette=np.vstack([COLORS, [[7, 7, 7]]]))                   # differs where nothing is
    assert check_pairs([first, plain, grey, longer], 3, masks=reader_of(tmp_path)).class_counts.sum() == 32


# -- label maps --------------------------------------------------------------------------------------------------------

def test_a_label_map_of_masks_there_and_back(tmp_path):
    values = np.array([[0, 255, 4], [255, 0, 0]], np.uint8)
    masks = MaskReader(2, label_map=read_label_map("0:0,255:1,4:ignore"))
    pairs = [pair(tmp_path, "a", values), pair(tmp_path, "b", np.stack([values] * 3, -1))]
    summary = check_pairs(pairs, 2, masks=masks)
    assert summary.class_counts.tolist() == [6, 4] and summary.ignored == 2
    for item in SegmentationDataset(pairs, 4, 2, views="whole", masks=masks):
        assert item["label"].tolist() == [[0, 1, IGNORE_INDEX], [1, 0, 0]]
        write_labels(tmp_path / "out.png", item["label"].numpy(), COLORS[:2].astype(np.uint8), label_map=masks.label_map)
        assert (np.array(Image.open(tmp_path / "out.png")) == values).all()
        assert np.array(Image.open(tmp_path / "out.png").convert("RGB"))[0, 1].tolist() == COLORS[1].tolist()
        if len(pairs) > 2:
            break
        pairs = pairs * 2                                                  # the loop ends by IndexError otherwise


def test_numbers_of_16_bits_need_a_label_map(tmp_path):
    values = np.array([[11, 1100, 48]], np.uint16)
    found = read_label_map("11:0,48:1,1100:2")
    masks = MaskReader(3, label_map=found)
    only = pair(tmp_path, "a", values)
    assert check_pairs([only], 3, masks=masks, cache_dir=tmp_path / "cache").class_counts.tolist() == [1, 1, 1]
    assert check_pairs([only], 3, masks=masks, cache_dir=tmp_path / "cache").class_counts.tolist() == [1, 1, 1]     # of the cache
    assert to_label(masks.open(only[1]), masks.table, only[1]).tolist() == [[0, 2, 1]]
    back = label_to_file(np.array([[0, 2, 1]]), label_map=found)
    assert back.dtype == np.uint16 and (back == values).all()
    write_labels(tmp_path / "out.png", np.array([[0, 2, 1]]), COLORS, label_map=found)
    assert (np.array(Image.open(tmp_path / "out.png")) == values).all()
    with pytest.raises(ValueError, match="npy"):
        write_labels(tmp_path / "out.png", np.array([[0, 1, 1]]), COLORS, label_map=read_label_map("-5:0,1:1"))


def test_numbers_that_are_not_in_the_map_are_listed_with_counts(tmp_path):
    masks = MaskReader(2, label_map=read_label_map("0:0,2:1"))
    pairs = [pair(tmp_path, "a", IDS), pair(tmp_path, "b", IDS)]
    with pytest.raises(ValueError, match=r"a.png: values 1 \(2 times\), 3 \(2 times\) not in the label map .* \(and 1 more file\)"):
        check_pairs(pairs, 2, masks=masks)
    with pytest.raises(ValueError, match=r"a.png: values 1 \(2 times\), 3"):
        masks.open(pairs[0][1])


def test_settings_of_files_are_checked_and_kept_as_text(tmp_path):
    (tmp_path / "map.json").write_text('{"0": "background", "255": "object"}')
    data = {"label_map": str(tmp_path / "map.json"), "reduce_zero_label": False, "ignore_label": 255}
    check_file_settings(data, 2)
    (tmp_path / "map.json").unlink()
    assert read_label_map(data["label_map"]).names == ["background", "object"]
    for changes, message in (({"label_map": "0:0,1:1,2:2"}, "has 3 classes and num_classes=2; set num_classes to 3"),
                             ({"reduce_zero_label": True}, "both say what 0 is"), ({"value_range": [5, 5]}, "value_range"),
                             ({"value_range": [0, float("nan")]}, "value_range"), ({"bands": [1, 2]}, "three bands"), ({"bands": [0, 1, 2]}, "three bands"),
                             ({"mask_suffix": [""]}, "mask_suffix"), ({"mask_suffix": [3]}, "mask_suffix")):
        with pytest.raises(ValueError, match=message):
            check_file_settings({**data, **changes}, 2)
    assert photo_format({}) == PhotoFormat() == photo_format({"value_range": [], "bands": []})


# -- pairs -------------------------------------------------------------------------------------------------------------

def test_names_of_masks_with_an_ending(tmp_path):
    photos, masks = [tmp_path / f"{name}.jpg" for name in "ab"], [tmp_path / f"{name}_mask.png" for name in "ba"]
    expected = [(photos[0], masks[1]), (photos[1], masks[0])]
    assert pair_files(photos, masks, suffixes=["_mask"]) == expected
    both = [*photos, *masks]
    assert pair_files(both, both, suffixes=["_mask", "_gt"]) == expected     # in one folder
    cityscapes = [tmp_path / "x_leftImg8bit.png"], [tmp_path / "x_gtFine_color.png", tmp_path / "x_gtFine_labelIds.png"]
    assert pair_files(*cityscapes, suffixes=["_leftImg8bit", "_gtFine_labelIds"]) == [(cityscapes[0][0], cityscapes[1][1])]
    odd = [tmp_path / "a_mask.jpg"], [tmp_path / "a_mask_mask.png"]
    assert pair_files(*odd, suffixes=["_mask"]) == [(odd[0][0], odd[1][0])]
    with pytest.raises(ValueError, match=r"2 of 2 files have no partner .*; set mask_suffix: _mask \(--mask-suffix _mask\)"):
        pair_files(photos, masks)
    with pytest.raises(ValueError, match="no file has a name that ends in _gt"):
        pair_files(photos, masks, suffixes=["_gt"])
    with pytest.raises(ValueError, match="1 of 2 files have no partner"):
        pair_files(photos, masks[:1], suffixes=["_mask"])


# -- photographs -------------------------------------------------------------------------------------------------------

def pixels(path, **settings):
    return np.asarray(read_image(path, photos=PhotoFormat(**settings))).astype(int)


@pytest.mark.parametrize("write", [
    lambda path, v: tiff(path.with_suffix(".tif"), v.transpose(2, 0, 1)), lambda path, v: tiff(path.with_suffix(".tif"), v.transpose(2, 0, 1)[:1])])
def test_12_bits_in_16(tmp_path, write):
    values = noise(high=4096, kind=np.uint16)
    values[0, 0] = 4095
    path = write(tmp_path / "a", values)
    shown = values if Image.open(path).mode == "RGB" else values[..., :1].repeat(3, 2)
    assert np.abs(pixels(path, value_range=(0, 4095)) - shown * (255 / 4095)).max() <= 0.5
    assert (pixels(path) == shown >> 8).all()
    (doubt,) = photo_doubts(path, PhotoFormat())
    assert "uint16 pixels use" in doubt and "less than an eighth" in doubt and "value_range: [0, 4095]" in doubt
    assert photo_doubts(path, PhotoFormat(value_range=(0, 4095))) == []


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_16_bit_colours_keep_their_lower_byte(tmp_path, compression):
    """Also of compressed files, which another decoder of Pillow's reads; of PNG, with and without transparency."""
    import zlib

    values = noise(high=1000, kind=np.uint16)
    grey = save(tmp_path / "g.tif", values[..., 0], compression=compression)
    assert np.abs(pixels(grey, value_range=(0, 1000)) - values[..., :1] * 0.255).max() <= 0.5

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, channels in ((2, values), (6, np.dstack([values, np.full((6, 8), 65535, np.uint16)])),
                           (4, np.dstack([values[..., 0], np.full((6, 8), 65535, np.uint16)]))):
        raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 6, 16, kind, 0, 0, 0))
                                         + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
        expected = values if kind != 4 else values[..., :1]
        assert np.abs(pixels(tmp_path / "a.png", value_range=(0, 1000)) - expected * 0.255).max() <= 0.5
        assert (pixels(tmp_path / "a.png") == expected >> 8).all()


def test_signed_and_32_bit_files_have_one_scale(tmp_path):
    dark = np.full((4, 4), 200)
    bright = dark.copy()
    bright[0, 0] = 256
    for kind, signed in ((np.int16, True), (np.int32, True), (np.uint32, False), (np.uint16, False)):
        paths = [tiff(tmp_path / f"{name}.tif", values.astype(kind), signed=signed) for name, values in (("dark", dark), ("bright", bright))]
        for settings in ({}, {"value_range": (0, 1000)}, {"value_range": (-100, 400)}):
            first, second = (pixels(path, **settings) for path in paths)
            assert (first[1:] == second[1:]).all()
        assert pixels(paths[1], value_range=(0, 510))[0, 0].tolist() == [128] * 3
    assert pixels(tiff(tmp_path / "a.tif", np.array([[-32768, -1, 0, 32767]], np.int16), signed=True))[0, :, 0].tolist() == [0, 127, 128, 255]
    with pytest.raises(ValueError, match="floating-point pixels have no known range.*value_range"):
        read_image(save(tmp_path / "f.tif", dark.astype(np.float32)))
    assert np.abs(pixels(tmp_path / "f.tif", value_range=(0, 400)) - 127.5).max() <= 0.5


def test_a_set_that_uses_less_than_an_eighth_stops_with_the_range_and_the_setting(tmp_path):
    def pairs_of(high, name):
        folder = tmp_path / name
        folder.mkdir()
        return [(tiff(folder / f"{n}.tif", noise(2, 4, seed=n, high=high, kind=np.uint16).transpose(2, 0, 1)), save(folder / f"{n}.png", IDS)) for n in range(3)]
    narrow = pairs_of(4000, "narrow")
    with pytest.raises(ValueError, match=r"0.tif: uint16 pixels use \d+ to 3\d\d\d of 0 to 65535.*value_range: \[0, 4095\] \(--value-range 0 4095\).*3 files"):
        check_pairs(narrow, 4)
    for settings in ({"value_range": (0, 4095)}, {"value_range": (0, 65535)}):
        assert check_pairs(narrow, 4, photos=PhotoFormat(**settings)).class_counts.sum() == 24
    wide = pairs_of(60000, "wide")
    assert check_pairs([*narrow, *wide], 4).class_counts.sum() == 48       # one scale: dark files of a set are dark
    dataset = SegmentationDataset(narrow, 4, 4, views="whole", photos=PhotoFormat((0, 4095)))
    assert (dataset[0]["image"].numpy() == pixels(narrow[0][0], value_range=(0, 4095)).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("extra", [0, 1, 2, None])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_fourth_band_of_a_tiff_is_not_blended(tmp_path, extra, kind):
    """Unassociated is what tools write by default; only associated transparency is transparency."""
    values = noise(bands=4, high=np.iinfo(kind).max + 1, kind=kind)
    path = tiff(tmp_path / "a.tif", values.transpose(2, 0, 1), extra=extra)
    eight = values.astype(int) >> (0 if kind is np.uint8 else 8)
    if extra == 1 and kind is np.uint16:
        with pytest.raises(ValueError, match="multiplied by their transparency"):
            read_image(path)
        return
    if extra != 1:
        assert (pixels(path) == eight[..., :3]).all()
        assert (pixels(path, bands=(4, 1, 2)) == eight[..., [3, 0, 1]]).all()
        assert len(photo_doubts(path, PhotoFormat())) == (0 if extra == 0 else 1)
        assert photo_doubts(path, PhotoFormat(bands=(1, 2, 3))) == []
    with pytest.raises(ValueError, match=r"a.tif: .*4 bands; bands: \[5, 1, 2\] names band 5"):
        read_image(path, photos=PhotoFormat(bands=(5, 1, 2)))


def test_transparency_of_a_png_is_white_and_a_fourth_band_in_it_is_not(tmp_path):
    values = noise(40, 40, bands=4)
    assert (pixels(save(tmp_path / "nir.png", values)) == values[..., :3]).all()
    cut_out = values.copy()
    cut_out[..., 3] = 255
    cut_out[:20, :, 3] = 0
    cut_out[20, :, 3] = np.arange(40) * 6                                   # a soft edge
    path = save(tmp_path / "cut.png", cut_out)
    assert (pixels(path)[:20] == 255).all() and (pixels(path)[21:] == values[21:, :, :3]).all()
    assert (pixels(path, bands=(1, 2, 3)) == values[..., :3]).all()
    pairs = [(save(tmp_path / "nir.png", values), save(tmp_path / "m.png", values[..., 0] % 4)), (path, tmp_path / "m.png")]
    assert "a fourth band that is no transparency is not shown; bands: [1, 2, 3]" in check_pairs(pairs[:1], 4).doubts[0]
    with pytest.raises(ValueError, match=r"nir.png and .*cut.png: the fourth band is transparency in one.*bands: \[1, 2, 3\]"):
        check_pairs(pairs, 4)
    assert check_pairs(pairs, 4, photos=PhotoFormat(bands=(1, 2, 3))).doubts == []
    grey = save(tmp_path / "grey.png", values[..., 0])
    assert (pixels(grey, bands=(1, 1, 1)) == values[..., :1]).all()
    with pytest.raises(ValueError, match=r"grey.png: .*1 band"):
        check_pairs([(grey, tmp_path / "m.png")], 4, photos=PhotoFormat(bands=(1, 2, 3)))


def test_tiffs_that_pillow_cannot_read_say_what_they_hold(tmp_path, monkeypatch):
    for module in ("rasters", "photos"):
        monkeypatch.setattr(f"data.{module}.library", lambda: None)
    five = tiff(tmp_path / "five.tif", noise(bands=5).transpose(2, 0, 1), photometric=1)
    with pytest.raises(ValueError, match="five.tif: .*a TIFF of 5 bands of 8 bits; install rasterio .* or write the three bands"):
        read_image(five)
    planar = noise(high=65536, kind=np.uint16).transpose(2, 0, 1)
    with pytest.raises(ValueError, match="planar.tif: .*band by band.*; install rasterio"):
        read_image(tiff(tmp_path / "planar.tif", planar, planar=True))
    eight = noise()
    assert (pixels(tiff(tmp_path / "p8.tif", eight.transpose(2, 0, 1), planar=True)) == eight).all()


def test_a_stack_of_pages_is_refused_with_their_number(tmp_path):
    for path in (tiff(tmp_path / "s.tif", noise().transpose(2, 0, 1), pages=5), save(
            tmp_path / "s.webp", noise(), save_all=True, append_images=[Image.fromarray(noise(seed=n)) for n in range(1, 5)]), save(
            tmp_path / "s.png", noise(), save_all=True, append_images=[Image.fromarray(noise(seed=n)) for n in range(1, 5)])):
        for read in (read_image, open_mask):
            with pytest.raises(ValueError, match=rf"{path.name}: this \w+ cannot be read \(a stack of 5 pages"):
                read(path)
    assert read_image(tiff(tmp_path / "one.tif", noise().transpose(2, 0, 1))).size == (8, 6)
    phone = save(tmp_path / "phone.jpg", noise(16, 16), format="MPO", save_all=True, append_images=[Image.fromarray(noise(16, 16, seed=1))])
    assert Image.open(phone).format == "MPO" and read_image(phone).size == (16, 16)
    overview = io.BytesIO()                                                # a GeoTIFF with an overview is one page
    Image.fromarray(noise()).save(overview, "TIFF", save_all=True, append_images=[Image.fromarray(noise(3, 4))])
    data = bytearray(overview.getvalue())
    assert len(list(images_pages(tmp_path, data))) == 2


def images_pages(tmp_path, data):
    (tmp_path / "two.tif").write_bytes(data)
    return tiff_pages(tmp_path / "two.tif")


# -- whole runs --------------------------------------------------------------------------------------------------------

SCRIPTS = {"segmentation": train_segmentation, "prototype": train_prototype, "linear_head": train_linear_head, "eomt": train_eomt,
           "upernet_head": train_upernet_head, "pmt_head": train_pmt_head, "m2f_head": train_m2f_head}


@pytest.fixture(params=list(SCRIPTS)[:4])              # the other heads read files with the same code as the linear one
def script(request, monkeypatch):
    add_tiny_backbone(monkeypatch)
    shrink_unet(monkeypatch)
    return request.param


def write_set(root, values=(0, 1, 2), suffix=""):
    """images/SPLIT and masks/SPLIT of small pictures, whose classes 0, 1, 2 have these values in the masks."""
    for split, first in (("train", 0), ("val", 100), ("test", 200)):
        write_pictures(root / split, 4 if split == "train" else 1, first)
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (root / split / kind).rename(root / kind / split)
        (root / split).rmdir()
        for path in (root / "masks" / split).iterdir():
            mask = np.array(Image.open(path))
            mask = np.select([mask == c for c in range(3)], values, 255 if 255 not in values else values[0])
            path.unlink()
            save(path.with_name(f"{path.stem}{suffix}.png"), mask.astype(np.uint8))
    return root


def train(script, root, out, num_classes=3, **settings):
    if f"train_{script}" in SMALL:
        more = [word for key, value in settings.items() for word in
                (f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)]))]
        return SCRIPTS[script].main([
            "--image-paths", f"{root}/images/train", "--mask-paths", f"{root}/masks/train", "--val-image-paths", f"{root}/images/val",
            "--val-mask-paths", f"{root}/masks/val", "--validate", "--num-classes", str(num_classes), "--backbone", "tiny", "--backbone-weights",
            "random", "--image-size", "64", "--batch-size", "2", "--epochs", "1", "--num-workers", "0", "--device", "cpu", "--cache-dir", "",
            "--output-dir", str(out), *SMALL[f"train_{script}"], *more])
    config = {"dataset": {"root": str(root), "cache_dir": None, **settings}, "logging": {"tensorboard": False}}
    if script == "segmentation":
        config["dataset"] |= {"num_classes": num_classes, "image_size": 64}
        config |= {"model": {"backbone": "resnet18"}, "training": {"epochs": 1, "batch_size": 2, "num_workers": 0}}
    else:
        config["dataset"]["window_size"] = [41, 49]
        config |= {"model": {"num_classes": num_classes, "prototype_shape": [2 * num_classes, 8, 1, 1], "weights": "random", "n_blocks": [1, 1, 1, 1],
                             "base_width": 8, "freeze_bn": False}, "training": {"steps": [2, 2, 2], "accumulate": 1}, "evaluation": {"interval": 2}}
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return SCRIPTS[script].main([str(path), "--device", "cpu", "--num-workers", "0", "--output-dir", str(out)])


def test_masks_of_one_class_alone_are_refused(script, tmp_path):
    root = write_set(tmp_path / "data", (0, 255, 0))
    with pytest.raises(ValueError, match="all labelled pixels of the training masks are class 0.*255 .ignore_label. is unlabelled.*--label-map 0:0,255:1"):
        train(script, root, tmp_path / "out", 2)


def test_masks_of_0_and_255_beside_others_are_a_warning_wherever_they_are_scored(script, tmp_path, capsys):
    """255 is unlabelled: where the masks of validation or test hold 0 and 255, only the background would be scored."""
    root = write_set(tmp_path / "data", (0, 1, 0))
    for path in (root / "masks").glob("*/*.png"):
        mask = np.array(Image.open(path)) == 1
        save(path, mask.astype(np.uint8) * (1 if path.parent.name == "train" else 255))
    train(script, root, tmp_path / "out", 2)
    said = f"WARNING: {root}/masks/val/picture_100.png: masks hold 0 and 255 alone, and 255 is unlabelled, so that a single class is scored"
    assert said in capsys.readouterr().out
    evaluate.main([str(tmp_path / "out/model/model_last.pth"), "--device", "cpu", "--output-dir", str(tmp_path / "scores"),
                   "--data-dir", f"{root}/images/val", "--label-dir", f"{root}/masks/val"])
    assert said in capsys.readouterr().out


def test_binary_masks_of_two_kinds_are_a_warning(tmp_path):
    halves = [pair(tmp_path, name, (IDS % 2 * factor).astype(np.uint8)) for name, factor in (("a", 1), ("b", 255))]
    assert "b.png: 1 of 2 masks hold 255, which is unlabelled, others hold class 1, and none holds both" in check_pairs(halves, 2).doubts[0]
    both = pair(tmp_path, "c", np.array([[0, 1, 255, 0]], np.uint8))
    assert check_pairs([*halves, both], 2).doubts == check_pairs(halves, 3).doubts == check_pairs(halves[:1], 2).doubts == []
    mapped = MaskReader(2, label_map=read_label_map("0:0,1:1,255:1"))
    summary = check_pairs(halves, 2, masks=mapped)
    assert summary.doubts == [] and summary.class_counts.tolist() == [8, 8]


def test_classes_that_never_occur_are_named(script, tmp_path, capsys):
    root = write_set(tmp_path / "data")
    train(script, root, tmp_path / "out", 5)
    assert "WARNING: no pixel of the training masks is class 3, class 4; 255 (ignore_label) is unlabelled" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_a_label_map_from_training_to_prediction(script, tmp_path, capsys):
    """Trained on 10, 255 and 20 like on 0, 1 and 2; evaluate.py reads, and predict.py writes, the numbers of the files."""
    plain = train(script, write_set(tmp_path / "plain"), tmp_path / "plain_out")
    root = write_set(tmp_path / "data", (10, 255, 20), suffix="_mask")
    for path in root.glob("masks/*/*.png"):                                # unlabelled pixels became 10: as in the plain set
        name = path.name.replace("_mask", "")
        mask, clean = np.array(Image.open(path)), np.array(Image.open(tmp_path / "plain" / "masks" / path.parent.name / name))
        mask[clean == 255] = 4
        save(path, mask)
    (tmp_path / "map.yaml").write_text("10: sky\n255: ground\n20: box\n4: ignore\n")
    mapped = train(script, root, tmp_path / "out", label_map=str(tmp_path / "map.yaml"), mask_suffix=["_mask"])
    (tmp_path / "map.yaml").unlink()
    assert mapped["miou"] == plain["miou"] and mapped["loss"] == plain["loss"]
    checkpoint = tmp_path / "out" / "model" / "model_last.pth"
    assert load_checkpoint(checkpoint)["class_names"] == ["sky", "ground", "box"]
    scored = evaluate.main([str(checkpoint), "--split", "val", "--device", "cpu", "--output-dir", str(tmp_path / "scores")])
    assert scored["miou"] == pytest.approx(mapped["miou"])
    predict.main([str(checkpoint), str(root / "images" / "test"), "--output", str(tmp_path / "labels"), "--device", "cpu"])
    predict.main([str(tmp_path / "plain_out/model/model_last.pth"), str(root / "images" / "test"), "--output", str(tmp_path / "ids"), "--device", "cpu"])
    numbers, ids = (np.array(Image.open(tmp_path / name / "picture_200.png")) for name in ("labels", "ids"))
    assert (numbers == np.array([10, 255, 20])[ids]).all()


def test_masks_in_colours_train_like_ids(script, tmp_path):
    plain = train(script, write_set(tmp_path / "plain"), tmp_path / "plain_out", **classes_of(tmp_path / "plain"))
    root = write_set(tmp_path / "data")
    for path in root.glob("masks/*/*.png"):
        mask = np.array(Image.open(path))
        save(path, COLORS[np.where(mask == 255, 0, mask)].astype(np.uint8))
        clean = tmp_path / "plain" / path.relative_to(root)
        save(clean, np.where(mask == 255, 0, mask).astype(np.uint8))
    plain = train(script, tmp_path / "plain", tmp_path / "again", **classes_of(tmp_path / "plain"))
    colored = train(script, root, tmp_path / "out", **classes_of(root))
    assert colored["miou"] == plain["miou"] and colored["loss"] == plain["loss"]


def classes_of(root):
    return {"classes": str(write_classes(root / "classes.json"))}


def test_12_bit_photographs_from_training_to_prediction(script, tmp_path, capsys):
    """Sixteen times the values of the 8-bit pictures: with value_range the same numbers come out."""
    clean = write_set(tmp_path / "clean")
    plain = train(script, clean, tmp_path / "plain_out")
    root = write_set(tmp_path / "data")
    for path in root.glob("images/*/*.png"):
        tiff(path.with_suffix(".tif"), np.array(Image.open(path)).astype(np.uint16).transpose(2, 0, 1) * 16)
        path.unlink()
    with pytest.raises(ValueError, match=r"uint16 pixels use .* set value_range: \[0, 4095\]"):
        train(script, root, tmp_path / "out")
    deep = train(script, root, tmp_path / "out", value_range=[0, 4080])
    assert deep["miou"] == plain["miou"] and deep["loss"] == plain["loss"]
    checkpoint = str(tmp_path / "out" / "model" / "model_last.pth")
    for source, name in ((root / "images" / "test" / "picture_200.tif", "deep"), (clean / "images" / "test" / "picture_200.png", "eight")):
        predict.main([checkpoint, str(source), "--output", str(tmp_path / name), "--device", "cpu"])
    assert (np.array(Image.open(tmp_path / "deep" / "picture_200.png")) == np.array(Image.open(tmp_path / "eight" / "picture_200.png"))).all()
    capsys.readouterr()
    predict.main([str(tmp_path / "plain_out/model/model_last.pth"), str(root / "images/test/picture_200.tif"), "--output", str(tmp_path / "x"), "--device", "cpu"])
    assert "WARNING" in (said := capsys.readouterr().out) and "value_range: [0, 4095]" in said


def test_label_maps_of_sets_with_their_own_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset.label_map, mask_suffix: dataset.name=pascal has its own"):
        train("prototype", tmp_path, tmp_path / "out", 21, name="pascal", label_map=",".join(f"{c}:{c}" for c in range(21)))


def test_a_crop_that_batch_norm_cannot_train_on_is_refused(tmp_path, monkeypatch):
    shrink_unet(monkeypatch)
    root = write_set(tmp_path / "data")
    config = {"dataset": {"root": str(root), "num_classes": 3, "cache_dir": None}, "model": {"backbone": "resnet18"},
              "training": {"epochs": 1, "batch_size": 1, "num_workers": 0}, "logging": {"tensorboard": False}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def start(*more):
        return train_segmentation.main([str(tmp_path / "c.yaml"), "--device", "cpu", "--output-dir", str(tmp_path / "out"), "--limit-batches", "1", *more])
    with pytest.raises(ValueError, match="training.batch_size=1 and dataset.image_size=32: batch norm cannot train on one cell"):
        start("dataset.image_size=32")
    with pytest.raises(ValueError, match="training.batch_size=1 and augmentations.random_crop.size=16"):
        start("dataset.image_size=64", "augmentations.random_crop.size=16")
    for more in (("dataset.image_size=33",), ("dataset.image_size=32", "training.batch_size=2"), ("dataset.image_size=32", "model.freeze_encoder=true")):
        assert start(*more)["loss"] > 0


def test_a_window_that_batch_norm_cannot_train_on_is_refused(tmp_path):
    config = {"dataset": {"root": "x", "window_size": [12, 12]}, "training": {"batch_size": 1},
              "model": {"num_classes": 3, "prototype_shape": [6, 8, 1, 1], "scales": [0.5], "freeze_bn": False}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"training.batch_size=1 and dataset.window_size=\[12, 12\]: batch norm"):
        train_prototype.main([str(tmp_path / "c.yaml"), "--device", "cpu", "--output-dir", str(tmp_path / "out")])


def test_a_head_starts_from_another_and_more_epochs_name_the_flag(tmp_path, monkeypatch, capsys):
    add_tiny_backbone(monkeypatch)
    root = write_set(tmp_path / "data")
    train("upernet_head", root, tmp_path / "first")
    weights = str(tmp_path / "first" / "model" / "model_last.pth")
    with pytest.raises(ValueError, match="from these weights, --head-weights FILE"):
        train("upernet_head", root, tmp_path / "first", epochs=3, resume="auto")
    train("upernet_head", root, tmp_path / "second", head_weights=weights, lr=1e-12)
    before, after = (load_checkpoint(tmp_path / name / "model" / "model_last.pth")["model"] for name in ("first", "second"))
    name = next(name for name in before if name.endswith("conv.weight"))
    assert np.allclose(before[name], after[name], atol=1e-6)
    train("upernet_head", root, tmp_path / "third", 5, head_weights=weights)
    assert "the class layer starts anew: 3 classes in the file, 5 here" in capsys.readouterr().out
    with pytest.raises(ValueError, match="matched"):
        train("upernet_head", root, tmp_path / "fourth", head_weights=weights, hidden_dim=8)


def test_training_doubts_say_which_setting(tmp_path):
    pairs = [pair(tmp_path, "a", IDS % 2)]
    data = {"image_size": 8, "num_classes": 3, "ignore_label": 255, "reduce_zero_label": False, "cache_dir": "", "label_map": "0:0,1:1,7:2"}
    dataset, summary = checked_dataset(data, pairs)
    assert summary.class_counts.tolist() == [4, 4, 0]
    assert training_doubts(list("abc"), dataset, None, data) == ["WARNING: no pixel of the training masks is c; the label map is 0:0,1:1,7:2"]
    assert (label_table(3)[:3] == np.arange(3)).all() and tiny_picture(0)[1].max() == 255
