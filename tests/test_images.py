import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import images
from data.images import (
    Augmentation,
    SegmentationDataset,
    check_pairs,
    color_matrix,
    find_files,
    label_table,
    label_to_file,
    list_images,
    pair_files,
    read_image,
)
from data.masks import OUT_OF_RANGE, open_mask
from tests.tiny_images import read_mask
from utils.losses import IGNORE_INDEX

STILL = Augmentation((1.0, 1.0), cat_max_ratio=1.0, flip=0, brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0)


def save(path, array, mode=None, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_pair(folder, name="a", image=None, mask=None, suffix=".png"):
    image = noise(20, 30) if image is None else image
    mask = np.arange(20 * 30).reshape(20, 30) % 3 if mask is None else mask
    return save(folder / "images" / f"{name}{suffix}", image), save(folder / "masks" / f"{name}.png", mask.astype(np.uint8))


def coordinates(height, width):
    """A photograph that holds x in red and y in green, and a mask that holds the cell of 16 x 16 pixels: x // 16 + 8 (y // 16)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8), (x // 16 + 8 * (y // 16)).astype(np.uint8)


# --- finding and pairing -----------------------------------------------------------------------------------------

def test_files_folders_and_globs(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.tif", "deep/er/d.webp"):
        save(tmp_path / name, noise(2, 2))
    (tmp_path / "notes.txt").write_text("")
    save(tmp_path / ".hidden.png", noise(2, 2))
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    names = [path.name for path in find_files([f"{tmp_path}/**/*", str(tmp_path / "a.jpg")], "--image-paths")]
    assert names == ["a.jpg", "b.PNG", "c.tif", "d.webp"]                                  # each once
    assert find_files([tmp_path / "deep"], "--x") == [tmp_path / "deep" / "c.tif"]
    bracket = save(tmp_path / "x[1].png", noise(2, 2))
    assert find_files([bracket], "--x") == [bracket]


@pytest.mark.parametrize("pattern, message", [("gone.png", "no such file"), ("*.bmp", "no image file matches"), ("empty", "no images .* in this folder")])
def test_a_pattern_that_finds_nothing_names_the_flag(tmp_path, pattern, message):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "a.png", noise(2, 2))
    with pytest.raises(ValueError, match=f"--val-mask-paths .*{message}"):
        find_files([str(tmp_path / "a.png"), str(tmp_path / pattern)], "--val-mask-paths")


def test_pairs_are_made_by_name_not_by_order():
    """Trap 32: two sorted lists do not always match."""
    found = pair_files([Path("i/a.jpg"), Path("i/b.jpg")], [Path("m/b.png"), Path("m/a.png")])
    assert found == [(Path("i/a.jpg"), Path("m/a.png")), (Path("i/b.jpg"), Path("m/b.png"))]
    names = [f"x{number}" for number in range(10)]
    photos = [Path(f"{name}.jpg") for name in names]
    with pytest.raises(ValueError, match=r"--image-paths: 5 of 10 files have no partner .* --mask-paths: x1.jpg, x3.jpg, x5.jpg \.\.\."):
        pair_files(photos, [Path(f"{name}.png") for name in names[::2]])
    with pytest.raises(ValueError, match="--m: 1 of 2 files have no partner .* --i: b.png"):
        pair_files([Path("a.jpg")], [Path("a.png"), Path("b.png")], ("--i", "--m"))
    with pytest.raises(ValueError, match="--image-paths: u/a.jpg and v/a.png have the same name"):
        pair_files([Path("u/a.jpg"), Path("v/a.png")], [Path("a.png")])


def test_a_photograph_is_not_its_own_mask():
    with pytest.raises(ValueError, match="--image-paths and --mask-paths: i/b.png is in both; name the masks in one"):
        pair_files([Path("i/a.png"), Path("i/b.png")], [Path("m/a.png"), Path("i/b.png")])


def test_one_name_in_two_unicode_forms_is_one_name():
    """Archives made on a Mac hold e and an accent where others hold one letter."""
    image, mask = Path("caf\u00e9.jpg"), Path("cafe\u0301.png")
    assert pair_files([image], [mask]) == [(image, mask)]
    with_suffix = Path("cafe\u0301_mask.png")
    assert pair_files([image], [with_suffix], suffixes=["_mask"]) == [(image, with_suffix)]
    with pytest.raises(ValueError, match="have the same name"):
        pair_files([image, image.with_name("cafe\u0301.tif")], [mask])


# --- reading -----------------------------------------------------------------------------------------------------

def test_photographs_of_every_kind_become_rgb(tmp_path):
    """Trap 29: red first, 0 to 255."""
    pixel = np.array([[[250, 20, 5]]], np.uint8)
    assert np.array(read_image(save(tmp_path / "rgb.png", pixel))).tolist() == [[[250, 20, 5]]]
    assert np.array(read_image(save(tmp_path / "grey.png", pixel[..., 0]))).tolist() == [[[250] * 3]]
    assert np.array(read_image(save(tmp_path / "deep.png", np.array([[0x1234, 0xFFFF]], np.uint16)))).tolist() == [[[0x12] * 3, [255] * 3]]
    clear = np.array([[[250, 20, 5, 255], [250, 20, 5, 0]]], np.uint8)
    assert np.array(read_image(save(tmp_path / "clear.png", clear))).tolist() == [[[250, 20, 5], [255] * 3]]
    palette = Image.fromarray(np.array([[1]], np.uint8))
    palette.putpalette([0, 0, 0, 250, 20, 5])
    palette.save(tmp_path / "palette.png")
    assert np.array(read_image(tmp_path / "palette.png")).tolist() == [[[250, 20, 5]]]
    cmyk = save(tmp_path / "cmyk.jpg", np.full((8, 8, 3), 200, np.uint8), "CMYK")
    assert read_image(cmyk).mode == "RGB" and abs(np.array(read_image(cmyk)).astype(int) - 200).max() < 4
    with pytest.raises(ValueError, match="float.tif: .*floating-point"):
        read_image(save(tmp_path / "float.tif", np.zeros((2, 2), np.float32)))


def test_exif_orientation_only_on_request(tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    path = save(tmp_path / "turned.jpg", noise(8, 16), exif=exif)
    assert read_image(path).size == (16, 8) and read_image(path, exif=True).size == (8, 16)


def test_masks_are_indices_and_never_colours(tmp_path):
    """Trap 31."""
    values = np.array([[0, 1, 2, 255]], np.uint8)
    palette = Image.fromarray(values)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    for path in (tmp_path / "palette.png", save(tmp_path / "grey.png", values)):
        label = read_mask(path, 3)
        assert label.tolist() == [[0, 1, 2, IGNORE_INDEX]] and label.dtype == np.int64
    few = Image.fromarray(np.array([[3, 0, 2]], np.uint8))
    few.putpalette([9] * 12)
    few.save(tmp_path / "few.png", bits=2)                                                 # four colours: 2 bits a pixel
    assert read_mask(tmp_path / "few.png", 4).tolist() == [[3, 0, 2]]
    assert read_mask(save(tmp_path / "bit.png", np.array([[True, False]])), 2).tolist() == [[1, 0]]
    with pytest.raises(ValueError, match=r"rgb.png: a colour mask \(mode RGB\)"):
        read_mask(save(tmp_path / "rgb.png", noise(2, 2)), 3)
    with pytest.raises(ValueError, match="deep.png: .*more than 8 bits.*astype"):
        read_mask(save(tmp_path / "deep.png", np.zeros((2, 2), np.uint16)), 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_a_turned_mask_is_refused(tmp_path, suffix):
    """Viewers turn it and readers do not, or the other way round: of a square mask nobody would notice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    ids = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(np.dstack([ids] * 3)).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    Image.fromarray(np.dstack([ids] * 3)).save(tmp_path / "i.png")
    for read in (lambda: open_mask(path), lambda: check_pairs([(tmp_path / "i.png", path)], 3)):
        with pytest.raises(ValueError, match=f"m.{suffix}: EXIF orientation 6, so that it may not lie on its photograph's pixels"):
            read()


def test_zero_label_is_reduced_without_wrapping(tmp_path):
    """Trap 5: {0, 1, 255} -> {ignored, 0, ignored}, in any width of integers."""
    path = save(tmp_path / "m.png", np.array([[0, 1, 150, 255]], np.uint8))
    label = read_mask(path, 150, reduce_zero_label=True)
    assert label.tolist() == [[IGNORE_INDEX, 0, 149, IGNORE_INDEX]]
    assert label_to_file(label, reduce_zero_label=True).tolist() == [[255, 1, 150, 255]]
    assert label_to_file(np.array([[254]], np.uint8), reduce_zero_label=True).tolist() == [[255]]
    with pytest.raises(ValueError, match="do not fit"):
        label_to_file(np.array([[255]], np.uint8), reduce_zero_label=True)
    with pytest.raises(ValueError, match="m.png: value 150 at 1 pixels; expected 1 to 149, for unlabelled 0 or 255"):
        read_mask(path, 149, reduce_zero_label=True)


@pytest.mark.parametrize("ignore_label, reduce", [(255, False), (0, False), (255, True), (200, True)])
def test_file_numbers_there_and_back(ignore_label, reduce):
    table = label_table(19, ignore_label, reduce)
    values = np.flatnonzero(table != OUT_OF_RANGE)
    back = label_to_file(table[values], ignore_label, reduce)
    assert (table[back] == table[values]).all() and (back[table[values] >= 0] == values[table[values] >= 0]).all()
    assert table[ignore_label] == IGNORE_INDEX and table[254] == OUT_OF_RANGE


def test_impossible_numbers_of_classes():
    for arguments in ((0,), (257,), (256, 255, True)):
        with pytest.raises(ValueError, match=f"num_classes={arguments[0]}"):
            label_table(*arguments)


# --- checking ----------------------------------------------------------------------------------------------------

def test_counts_of_a_good_set(tmp_path):
    pairs = [make_pair(tmp_path, "a"), make_pair(tmp_path, "b", noise(4, 6), np.full((4, 6), 255)),
             make_pair(tmp_path, "c", noise(4, 6), np.eye(4, 6) > 0)]
    Image.fromarray(np.eye(4, 6) > 0).save(pairs[2][1])                                    # a mask of one bit
    summary = check_pairs(pairs, 3)
    assert summary.sizes.tolist() == [[20, 30], [4, 6], [4, 6]]
    assert summary.class_counts.tolist() == [220, 204, 200] and summary.ignored == 24


def test_a_table_of_labels(tmp_path):
    table = np.full(256, IGNORE_INDEX)
    table[[7, 8, 33]] = [0, 1, 2]
    table[99] = OUT_OF_RANGE
    pair = make_pair(tmp_path, mask=np.resize([7, 8, 33, 0, 255, 7], (20, 30)))
    summary = check_pairs([pair], 3, table=table)
    assert summary.class_counts.tolist() == [200, 100, 100] and summary.ignored == 200
    for views, changes in (("whole", None), ("windows", None), ("crops", STILL)):
        label = SegmentationDataset([pair], (20, 30), 3, changes, views=views, table=table)[0]["label"]
        assert (label.numpy() == np.resize([0, 1, 2, IGNORE_INDEX, IGNORE_INDEX, 0], (20, 30))).all()
    for wrong, message in ((table[:255], "expected 256 integers"), (table.astype(float), "expected 256 integers"), (np.arange(256), "one of 3 classes")):
        with pytest.raises(ValueError, match=message):
            check_pairs([pair], 3, table=wrong)
        with pytest.raises(ValueError, match=message):
            SegmentationDataset([pair], 20, 3, views="whole", table=wrong)
    save(pair[1], np.full((20, 30), 99, np.uint8))
    with pytest.raises(ValueError, match="value 99 at 600 pixels; expected 7 to 33"):
        check_pairs([pair], 3, table=table)


def empty_png(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def broken(kind, image, mask):
    """Damage a pair of files in one way."""
    if kind == "cut":
        image.write_bytes(image.read_bytes()[:-300])
    elif kind == "gone":
        mask.unlink(missing_ok=True)
    elif kind == "text":
        mask.write_text("not an image")
    elif kind == "empty":
        empty_png(image)
    elif kind == "colour":
        save(mask, noise(20, 30))
    elif kind == "deep":
        save(mask, np.zeros((20, 30), np.uint16))
    elif kind == "size":
        save(mask, np.zeros((30, 20), np.uint8))
    elif kind == "range":
        save(mask, np.full((20, 30), 7, np.uint8))
    elif kind == "turned":
        exif = Image.Exif()
        exif[images.ORIENTATION] = 3
        save(image, noise(20, 30), exif=exif)


@pytest.mark.parametrize("kind, message", [
    ("cut", "images/b.jpg: this image cannot be read"), ("gone", "masks/b.png: this mask cannot be read"),
    ("text", "masks/b.png: this mask cannot be read"), ("empty", "images/b.jpg: this image cannot be read"),
    ("colour", r"masks/b.png: a colour mask \(mode RGB\); replace each colour by its class id"),
    ("deep", r"masks/b.png: a mask of more than 8 bits \(mode I;16\); store its ids as 8-bit PNG"),
    ("size", "masks/b.png: 20x30 pixels, but .*images/b.jpg has 30x20"),
    ("range", "masks/b.png: value 7 at 600 pixels; expected 0 to 2, for unlabelled 255; check num_classes"),
    ("turned", "images/b.jpg: EXIF orientation 3.*exif_transpose"),
])
def test_every_defect_is_one_line_with_the_file(tmp_path, kind, message):
    """Traps 7 and 28."""
    pairs = [make_pair(tmp_path, name, suffix=".jpg") for name in "abc"]
    for damaged, ending in ((pairs[1:2], "$"), (pairs[1:], r"\(and 1 more file\)$")):
        for pair in damaged:
            broken(kind, *pair)
        with pytest.raises(ValueError, match=message) as error:
            check_pairs(pairs, 3, workers=2)
        assert "\n" not in str(error.value)
        assert ("more file" in str(error.value)) == ("more" in ending)


def test_a_set_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not one pixel of 1 masks"):
        check_pairs([make_pair(tmp_path, mask=np.zeros((20, 30)))], 3, reduce_zero_label=True)


def test_what_was_read_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    pairs, scanned = [make_pair(tmp_path, name) for name in "ab"], []
    original = images._scan
    monkeypatch.setattr(images, "_scan", lambda pair, **more: scanned.append(pair) or original(pair, **more))
    first = check_pairs(pairs, 3, cache_dir=tmp_path / "cache")
    again = check_pairs(pairs, 3, cache_dir=tmp_path / "cache")
    assert len(scanned) == 2 and (first.sizes == again.sizes).all() and (first.class_counts == again.class_counts).all()
    assert check_pairs(pairs, 2, 2, cache_dir=tmp_path / "cache").ignored == 400 and len(scanned) == 2      # other settings
    with pytest.raises(ValueError, match="value 2 at"):
        check_pairs(pairs, 2, cache_dir=tmp_path / "cache")
    save(pairs[0][1], np.zeros((20, 30), np.uint8))
    assert check_pairs(pairs, 3, cache_dir=tmp_path / "cache").class_counts.tolist() == [800, 200, 200]
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) == 2
    for entry in entries:
        entry.write_text(json.dumps([{"size": 1}]))
    assert check_pairs(pairs, 3, cache_dir=tmp_path / "cache").class_counts.tolist() == [800, 200, 200]     # damaged: read again


# --- augmentation ------------------------------------------------------------------------------------------------

def shown_colors(settings, seed, pixels):
    image = Image.fromarray(np.array([pixels], np.uint8))
    return np.array(image.convert("RGB", color_matrix(settings, np.random.default_rng(seed))))[0].astype(int)


def test_no_change_of_colours_is_exact():
    assert (shown_colors(STILL, 0, noise(16, 16).reshape(-1, 3)) == noise(16, 16).reshape(-1, 3)).all()


def test_each_change_of_colours():
    pixels, seeds = [[60, 100, 120], [90, 90, 90]], range(40)
    results = {}
    for name, value in {"brightness": 0.1, "contrast": (1.2, 1.2), "saturation": (0.5, 0.5), "hue": 0.1}.items():
        results[name] = np.array([shown_colors(STILL._replace(**{name: value}), seed, pixels) for seed in seeds])
        changed = (results[name] != pixels).any((1, 2))
        assert 8 < changed.sum() < 32                                                     # each in half of the crops
        results[name] = results[name][changed] - np.array(pixels)
    steps = results["brightness"]
    assert (np.ptp(steps, axis=(1, 2)) <= 1).all() and abs(steps).max() <= 26 and steps.min() < -15 and steps.max() > 15
    assert abs(results["contrast"] - 0.2 * np.array(pixels)).max() <= 1
    luma = np.array([0.299, 0.587, 0.114])
    for name in ("saturation", "hue"):                                                    # grey stays grey, the light the same
        assert abs(results[name][:, 1]).max() <= 1 and abs(results[name][:, 0] @ luma).max() <= 1
    grey = np.array(pixels[0]) @ luma
    assert abs(results["saturation"][:, 0] - 0.5 * (grey - np.array(pixels[0]))).max() <= 1
    assert abs(results["hue"][:, 0]).max() > 10


def test_hue_turns_by_the_share_of_the_circle():
    """A whole third of the circle takes red to green or blue, as near as the chroma plane of YIQ allows."""
    turned = [shown_colors(STILL._replace(hue=1 / 3), seed, [[160, 90, 90]])[0] for seed in range(60)]
    assert {int(color.argmax()) for color in turned} == {0, 1, 2}


def blended(pixels, other, factor):
    return factor * pixels + (1 - factor) * other


@pytest.mark.parametrize("name, change", [
    ("brightness", lambda pixels, luma, factor: blended(pixels, 0, factor)),
    ("contrast", lambda pixels, luma, factor: blended(pixels, luma.mean(), factor)),
    ("saturation", lambda pixels, luma, factor: blended(pixels, luma[..., None], factor))])
def test_factors_are_those_of_torchvision(tmp_path, name, change):
    """Each as in its functions adjust_brightness ...; contrast around the mean of the crop, not of the photograph."""
    pixels = noise(12, 24) // 2 + 40
    pixels[:, 12:] //= 2
    pair = make_pair(tmp_path, image=pixels, mask=np.zeros((12, 24)))
    dataset = SegmentationDataset([pair], (12, 10), 1, STILL._replace(scale_of="photo", color="factors", **{name: 0.3}))
    found = []
    for epoch in range(40):
        dataset.set_epoch(epoch)
        shown = dataset[0]["image"].permute(1, 2, 0).numpy()
        errors = {}
        for left in range(15):
            crop = pixels[:, left:left + 10].astype(float)
            for factor in np.linspace(0.7, 1.3, 121):
                wanted = change(crop, crop @ [0.299, 0.587, 0.114], factor).clip(0, 255)
                errors[factor, left] = abs(shown - wanted).max()
        best = min(errors, key=errors.get)
        assert errors[best] < 2
        found.append(best[0])
    assert min(found) < 0.76 and max(found) > 1.24 and len(set(found)) > 25                # in all crops, not in half of them


def test_all_four_factors_make_one_matrix():
    settings = STILL._replace(color="factors", brightness=0.2, contrast=0.2, saturation=(0.5, 0.5), hue=0.1)
    rows = np.array(color_matrix(settings, np.random.default_rng(3), 100.0)).reshape(3, 4)
    brightness, contrast, _, hue = np.random.default_rng(3).uniform([-0.2, 0.8, 0.5, -0.1], [0.2, 1.2, 0.5, 0.1])
    grey = contrast * (1 + brightness) * 60 + (1 - contrast) * (1 + brightness) * 100
    np.testing.assert_allclose(rows @ [60, 60, 60, 1], np.full(3, grey))                  # grey has neither saturation nor hue
    i, q = (images.YIQ @ rows[:, :3] @ np.linalg.inv(images.YIQ))[1:, 1]                  # where the first chroma axis goes
    assert np.hypot(i, q) == pytest.approx(0.5 * contrast * (1 + brightness)) and np.arctan2(q, i) == pytest.approx(2 * np.pi * hue)


def test_one_number_is_a_range_of_factors():
    ranges = [color_matrix(STILL._replace(contrast=value, saturation=value), np.random.default_rng(2)) for value in (0.4, (0.6, 1.4))]
    assert ranges[0] == ranges[1] != color_matrix(STILL, np.random.default_rng(2))


# --- data set ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, crop, size, more", [
    (".png", True, 64, {}), (".jpg", True, 64, {}), (".png", False, 64, {}), (".jpg", False, 64, {}), (".png", False, (40, 90), {}),
    (".png", True, (48, 80), {"scale_of": "photo", "padding": 12, "vertical_flip": 0.5}), (".jpg", True, (80, 48), {"padding": 9})])
def test_image_and_mask_stay_in_step(tmp_path, suffix, crop, size, more):
    """Traps 6 and 7: through 300 augmentations every pixel's label says the place that the photograph shows there."""
    y, x = np.mgrid[:96, :125].astype(np.uint8)
    image = save(tmp_path / f"a{suffix}", np.stack([x, y, 0 * x], -1), **({"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}))
    changes = Augmentation((0.3, 2.0), crop, 1.0, 0.5, 0, (1, 1), (1, 1), 0, **more)
    datasets = [SegmentationDataset([(image, save(tmp_path / f"{name}.png", values))], size, 125, changes)
                for name, values in (("x", x), ("y", y))]
    flipped = [0, 0]
    for epoch in range(300):
        for channel, dataset in enumerate(datasets):                                       # the same crop: same seed, epoch and item
            dataset.set_epoch(epoch)
            item = dataset[0]
            label, shown = item["label"].numpy(), item["image"].numpy().astype(float)
            inside = label != IGNORE_INDEX
            off = (shown[channel] - label)[inside]
            assert abs(off).max() < 4 and abs(off.mean()) < 0.6, (epoch, off.min(), off.max(), off.mean())   # rounding: up to 0.5
            assert (shown[:, ~inside] == np.array(images.PADDING)[:, None]).all()
            first, last = label[inside][[0, -1]] if channel else label.T[inside.T][[0, -1]]   # top and bottom, left and right
            flipped[channel] += first > last
    assert 110 < flipped[0] < 190 and (110 < flipped[1] < 190 if "vertical_flip" in more else flipped[1] == 0)


def test_masks_are_never_blended(tmp_path):
    mask = np.where(np.arange(2400).reshape(40, 60) % 7 > 3, 200, 3)
    dataset = SegmentationDataset([make_pair(tmp_path, image=noise(40, 60), mask=mask)], 48, 256, Augmentation())
    for epoch in range(50):
        dataset.set_epoch(epoch)
        assert set(dataset[0]["label"].unique().tolist()) <= {IGNORE_INDEX, 3, 200}


def test_a_jpeg_decoded_smaller_stays_in_step(tmp_path):
    """Sizes that are no multiple of 8: the decoder rounds up, the crop must not be stretched."""
    y, x = np.mgrid[:331, :435]
    image = np.stack([x / 435 * 255, y / 331 * 255, 0 * x], -1).astype(np.uint8)
    mask = (x * 10 // 435 + 10 * (y * 10 // 331)).astype(np.uint8)
    pair = (save(tmp_path / "a.jpg", image, quality=95), save(tmp_path / "m.png", mask))
    assert Image.open(pair[0]).draft(None, (50, 40))[1][2] < 435 / 2
    dataset = SegmentationDataset([pair], 40, 100, STILL)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        item = dataset[0]
        for channel, cells in ((0, item["label"] % 10), (1, item["label"] // 10)):
            off = item["image"][channel].float() / 25.5 - (cells + 0.5)
            assert abs(off).max() < 0.75 and abs(off.mean()) < 0.06


def test_a_part_is_a_cut_of_the_whole_resized_image():
    image = Image.fromarray(noise(50, 70))
    whole = np.asarray(image.resize((49, 35), Image.Resampling.BILINEAR)).astype(int)
    part = images.take_part(image, image.size, (49, 35), (10, 3, 20, 30), Image.Resampling.BILINEAR)
    assert abs(np.asarray(part) - whole[3:33, 10:30]).max() <= 1


def test_scale_crop_and_padding(tmp_path):
    pair = make_pair(tmp_path, image=noise(40, 60), mask=np.arange(2400).reshape(40, 60) % 3)
    item = SegmentationDataset([pair], 40, 3, STILL)[0]
    assert item["image"].shape == (3, 40, 40) and item["image"].dtype == torch.uint8 and item["label"].dtype == torch.int64
    columns = [left for left in range(21) if (item["image"].permute(1, 2, 0).numpy() == noise(40, 60)[:, left:left + 40]).all()]
    assert len(columns) == 1                                                              # pixels untouched at scale 1
    half = SegmentationDataset([pair], 40, 3, STILL._replace(scale_range=(0.5, 0.5)))[0]
    assert (half["label"][:20, :30] >= 0).all() and (half["label"][20:] == IGNORE_INDEX).all() and (half["label"][:, 30:] == IGNORE_INDEX).all()
    whole = SegmentationDataset([pair], 40, 3, STILL._replace(crop=False))[0]
    assert (whole["label"][:27] >= 0).all() and (whole["label"][27:] == IGNORE_INDEX).all()
    drawn = []
    dataset = SegmentationDataset([pair], 40, 3, STILL._replace(scale_range=(0.5, 1.0)))
    for epoch in range(60):
        dataset.set_epoch(epoch)
        drawn.append(int((dataset[0]["label"][:, 0] >= 0).sum()))
    assert min(drawn) <= 22 and max(drawn) >= 38 and all(20 <= rows <= 40 for rows in drawn)


def labelled_sizes(pair, size, changes, epochs=40):
    """(rows, columns) of the part of each crop that is photograph."""
    dataset, found = SegmentationDataset([pair], size, 3, changes), []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        inside = dataset[0]["label"] >= 0
        found.append((int(inside.any(1).sum()), int(inside.any(0).sum())))
        assert inside.sum() == math.prod(found[-1]) and inside.shape == torch.Size(dataset.size)
    return set(found)


def test_a_rectangular_crop_is_covered_by_the_photograph(tmp_path):
    pair = make_pair(tmp_path, image=noise(40, 60), mask=np.arange(2400).reshape(40, 60) % 3)
    assert labelled_sizes(pair, (20, 50), STILL) == {(20, 50)}                            # x 50 / 60: 33 rows, 20 of them shown
    assert labelled_sizes(pair, [20, 50], STILL._replace(scale_range=(0.6, 0.6))) == {(20, 30)}     # then x 0.6: 20 rows
    assert labelled_sizes(pair, (50, 20), STILL) == {(50, 20)}                            # x 50 / 40
    assert labelled_sizes(pair, (20, 50), STILL._replace(crop=False)) == {(20, 30)}       # all of it: x 20 / 40


def test_scale_of_the_photograph_itself_in_steps(tmp_path):
    pair = make_pair(tmp_path, image=noise(40, 60), mask=np.arange(2400).reshape(40, 60) % 3)
    photo = STILL._replace(scale_of="photo")
    item = SegmentationDataset([pair], (40, 60), 3, photo)[0]
    assert (item["image"].permute(1, 2, 0).numpy() == noise(40, 60)).all()
    deeplab = photo._replace(scale_range=(0.5, 1.5), scale_step=0.25)
    assert labelled_sizes(pair, (60, 90), deeplab) == {(20, 30), (30, 45), (40, 60), (50, 75), (60, 90)}
    assert len(labelled_sizes(pair, (60, 90), deeplab._replace(scale_step=0.0))) > 20


@pytest.mark.parametrize("flips", [{}, {"flip": 1.0}, {"vertical_flip": 1.0}])
def test_padding_on_all_sides(tmp_path, flips):
    """torchvision's RandomCrop(padding): every place of the crop in the padded photograph occurs, and no other."""
    pair = make_pair(tmp_path, image=noise(10, 14), mask=np.arange(140).reshape(10, 14) % 3)
    padded = np.full((16, 20, 3), images.PADDING, np.uint8)
    padded[3:13, 3:17] = noise(10, 14)
    labels = np.full((16, 20), IGNORE_INDEX)
    labels[3:13, 3:17] = np.arange(140).reshape(10, 14) % 3
    if flips:
        axis = 1 if "flip" in flips else 0
        padded, labels = np.flip(padded, axis), np.flip(labels, axis)
    known = {(padded[y:y + 12, x:x + 16].tobytes(), labels[y:y + 12, x:x + 16].tobytes()) for y in range(5) for x in range(5)}
    dataset = SegmentationDataset([pair], (12, 16), 3, STILL._replace(scale_of="photo", padding=3, **flips))
    shown = set()
    for epoch in range(250):
        dataset.set_epoch(epoch)
        item = dataset[0]
        shown.add((item["image"].permute(1, 2, 0).numpy().tobytes(), item["label"].numpy().tobytes()))
    assert shown == known                                                                 # 25 places


def test_what_is_too_small_lies_in_the_corner_mirrored_or_not(tmp_path):
    pair = make_pair(tmp_path, image=noise(10, 14), mask=np.zeros((10, 14)))
    for flips in ({}, {"flip": 1.0}, {"vertical_flip": 1.0}):
        item = SegmentationDataset([pair], 20, 3, STILL._replace(scale_of="photo", **flips))[0]
        shown = np.flip(noise(10, 14), int("flip" in flips)) if flips else noise(10, 14)
        assert (item["image"][:, :10, :14].permute(1, 2, 0).numpy() == shown).all() and (item["label"][:10, :14] == 0).all()


def test_crops_avoid_one_class(tmp_path):
    mask = np.zeros((40, 400), np.uint8)
    mask[:, 180:220] = 1
    pair = make_pair(tmp_path, image=noise(40, 400), mask=mask)
    mixed = {}
    for ratio in (0.75, 1.0):
        dataset = SegmentationDataset([pair], 40, 2, STILL._replace(cat_max_ratio=ratio))
        mixed[ratio] = 0
        for epoch in range(100):
            dataset.set_epoch(epoch)
            mixed[ratio] += 0.25 < dataset[0]["label"].float().mean() < 0.75
    assert mixed[1.0] < 25 and 60 < mixed[0.75]                                           # 0.17 each; at least once in ten
    mask[:, :360] = 255
    save(pair[1], mask)                                                                   # unlabelled pixels do not count
    dataset = SegmentationDataset([pair], 40, 2, STILL)
    labelled = 0
    for epoch in range(50):
        dataset.set_epoch(epoch)
        labelled += int((dataset[0]["label"] >= 0).any())
    assert labelled > 25                                                                  # 0.11 of all places


def test_windows_show_every_pixel(tmp_path):
    image, mask = coordinates(96, 125)
    pairs = [(save(tmp_path / "a.png", image), save(tmp_path / "m.png", mask)), make_pair(tmp_path, image=noise(50, 40), mask=np.ones((50, 40)))]
    dataset = SegmentationDataset(pairs, 48, 48, views="windows")
    shown = [(item["label"].numpy(), item["image"][0].numpy()) for item in dataset]
    assert len(dataset) == len(shown) == 2 + 2 and len(dataset.files) == 2               # 48 x 62 and 60 x 48 pixels
    assert dataset[3]["index"] == 3 and all(label.shape == (48, 48) and (label >= 0).all() for label, _ in shown)
    assert shown[0][1][0, 0] <= 1 and shown[1][1][0, -1] >= 123                           # both ends of the photograph
    assert abs(float(shown[1][1][0, 0]) - 14 * 125 / 62) < 2                              # the last one moved back by 34
    assert set(np.unique(np.concatenate([shown[0][0], shown[1][0]]))) == set(np.unique(mask))
    wide = SegmentationDataset(pairs[:1], (24, 48), 48, views="windows")                  # 37 x 48 pixels: two, one above the other
    assert [item["label"].shape for item in wide] == [(24, 48)] * 2
    assert wide[0]["image"][1, 0, 0] <= 2 and wide[1]["image"][1, -1, 0] >= 93 and wide[0]["image"][0, 0, -1] >= 122
    dataset.set_epoch(5)
    assert (dataset[1]["label"].numpy() == shown[1][0]).all()


def test_whole_photographs_are_untouched(tmp_path):
    pair = make_pair(tmp_path)
    item = SegmentationDataset([pair], 16, 3, views="whole")[0]
    assert (item["image"].permute(1, 2, 0).numpy() == noise(20, 30)).all() and item["index"] == 0
    assert (item["label"].numpy() == read_mask(pair[1], 3)).all()


def test_items_depend_on_seed_epoch_and_item_alone(tmp_path):
    pairs = [make_pair(tmp_path, f"p{i}", noise(40, 50, i), np.arange(2000).reshape(40, 50) % 3) for i in range(4)]

    def epoch(number, workers=0, seed=0):
        dataset = SegmentationDataset(pairs, 32, 3, Augmentation(), seed=seed)
        dataset.set_epoch(number)
        return next(iter(DataLoader(dataset, 4, num_workers=workers)))["image"]

    first = epoch(0)
    torch.manual_seed(7)
    np.random.seed(7)
    assert torch.equal(first, epoch(0, workers=2)) and torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1)) and not torch.equal(first, epoch(0, seed=1))
    same = SegmentationDataset([pairs[0]] * 2, 32, 3, Augmentation())
    assert not torch.equal(same[0]["image"], same[1]["image"])


def test_wrong_files_are_named_when_met(tmp_path):
    pair = make_pair(tmp_path)
    for mask, message in ((np.full((20, 30), 9), "a.png: value 9 at"), (np.zeros((10, 30)), "30x10 pixels, but .*a.png has 30x20")):
        save(pair[1], mask.astype(np.uint8))
        for views, changes in (("crops", STILL), ("whole", None), ("windows", None)):
            with pytest.raises(ValueError, match=message):
                SegmentationDataset([pair], 20, 3, changes, views=views)[0]
    pair[0].write_bytes(b"nothing")
    with pytest.raises(ValueError, match="images/a.png: this image cannot be read"):
        SegmentationDataset([pair], 20, 3, views="windows")


def test_a_palette_image_without_palette_is_refused(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"PLTE") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + data[start + 12 + int.from_bytes(data[start:start + 4]):])
    with pytest.raises(ValueError, match="a.png: this image cannot be read"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("changes, message", [
    ({"scale_range": (2.0, 0.5)}, "scale_range"), ({"scale_range": (0, 1)}, "scale_range"), ({"contrast": (-1, 1)}, "contrast"),
    ({"saturation": (1,)}, "saturation"), ({"flip": 1.5}, "flip"), ({"hue": -0.1}, "hue"), ({"contrast": 1.5}, "contrast"),
    ({"scale_of": "image"}, "scale_of"), ({"color": "factor"}, "color"), ({"vertical_flip": 2}, "vertical_flip"), ({"padding": -1}, "padding"),
    ({"scale_range": (0.5, 1.5), "scale_step": 0.3}, "scale_step=0.3: does not lead from 0.5 to 1.5"),
    ({"crop": False, "padding": 4}, "crop"), ({"crop": False, "scale_of": "photo"}, "crop"), ({"padding": 32}, "padding=32: a crop")])
def test_wrong_augmentation(changes, message):
    with pytest.raises(ValueError, match=f"augmentation.{message}"):
        SegmentationDataset([], 32, 3, Augmentation(**changes))


@pytest.mark.parametrize("arguments, message", [
    ({"views": "crop"}, "did you mean crops"), ({"views": "crops"}, "needs an augmentation"),
    ({"views": "windows", "augmentation": STILL}, "leave out the augmentation"), ({"views": "whole", "image_size": 0}, "image_size"),
    ({"views": "whole", "image_size": (4, 0)}, "image_size"), ({"views": "whole", "image_size": (4, 4, 3)}, "height and width")])
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationDataset([], **{"image_size": 32, "num_classes": 3, **arguments})


def test_a_picture_that_announces_more_than_the_memory_holds_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(ValueError, match=r"a\.png: this mask announces more than the memory holds"), images.opened(path, "mask"):
        raise MemoryError


def test_the_default_augmentation_is_the_published_one():
    """MMSegmentation's RandomResize, RandomCrop, RandomFlip and PhotoMetricDistortion (brightness 32 of 255, hue 18 of 360 degrees)."""
    assert Augmentation()[:8] == ((0.5, 2.0), True, 0.75, 0.5, 32 / 255, (0.5, 1.5), (0.5, 1.5), 0.05)
