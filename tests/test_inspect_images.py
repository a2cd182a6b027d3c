"""What inspect_data.py finds in photographs and masks: nothing in good ones, and each fault that is planted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.inspect_images import inspect_images
from data.synthetic_images import IMAGE_PALETTE, make_image_set
from tests.test_inspect_shapes import check_named
from tests.tiny_images import write_pictures

CAMVID = Path(__file__).resolve().parents[2] / "shared" / "data" / "image" / "camvid"
SEED = 5


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streets")
    make_image_set(folder, 24, 8, 0, SEED, (128, 96))
    return folder


def inspected(root, **settings):
    splits = {split: ([str(root / "images" / split)], [str(root / "masks" / split)]) for split in ("train", "val")}
    data = dict.fromkeys(("mask_suffix", "classes", "num_classes", "label_map")) | settings
    return inspect_images(splits, data, 1000, 2, 0)


# -- planting ----------------------------------------------------------------------------------------------------------

def masks(root, split="train"):
    return sorted((root / "masks" / split).iterdir())


def images(root, split="train"):
    return sorted((root / "images" / split).iterdir())


def change(path, edit, **save):
    """Rewrite a mask's numbers, with its palette."""
    with Image.open(path) as image:
        palette = image.getpalette()
        values = edit(np.array(image))
    result = Image.fromarray(values.astype(np.uint8))
    if palette:
        result.putpalette(palette)
    result.save(path, **save)


def each(edit, wanted=slice(None)):
    def plant(root):
        for path in [*masks(root), *masks(root, "val")][wanted]:
            change(path, edit)
    return plant


def one(edit, number=3):
    def plant(root):
        change(masks(root)[number], edit)
    return plant


def shift(values):
    return np.where(values == 255, 255, values + 1)


def without_palette(root):
    for path in [*masks(root), *masks(root, "val")]:
        Image.fromarray(np.array(Image.open(path))).save(path)
    (root / "classes.json").unlink()


def swap(root):
    a, b = masks(root)[2], masks(root)[9]
    kept = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(kept)


def copy_to_val(root):
    for kind in (images, masks):
        source = kind(root)[4]
        shutil.copy(source, source.parent.parent / "val" / f"copied{source.suffix}")


def copy_within(root):
    for kind in (images, masks):
        source = kind(root)[4]
        shutil.copy(source, source.with_name(f"copied{source.suffix}"))


def small_copy(root):
    for kind, resample in ((images, Image.Resampling.BICUBIC), (masks, Image.Resampling.NEAREST)):
        Image.open(kind(root)[4]).resize((96, 72), resample).save(root / kind.__name__ / "val" / "copied.png")


def same_name(root):
    for kind in (images, masks):
        for number, path in enumerate(kind(root, "val")):
            path.rename(path.with_name(f"{'street_011' if number == 3 else f'val_{number}'}{path.suffix}"))


def reordered_palette(root):
    order = np.random.default_rng(0).permutation(7)
    path = masks(root)[5]
    values = np.array(Image.open(path))
    result = Image.fromarray(np.where(values == 255, 255, order[np.minimum(values, 6)]).astype(np.uint8))
    palette = np.zeros((256, 3), np.uint8)
    palette[order] = IMAGE_PALETTE
    result.putpalette(palette.tobytes())
    result.save(path)


def jpeg_mask(root):
    path = masks(root)[3]
    Image.fromarray(np.array(Image.open(path))).save(path.with_suffix(".jpg"))
    path.unlink()


def blurred(root):
    without_palette(root)
    path = masks(root)[3]
    Image.fromarray(np.minimum(np.array(Image.open(path)), 7) * 20).resize((64, 48), Image.BILINEAR).resize((128, 96), Image.BILINEAR).save(path)


def turned_mask(root):
    path = masks(root)[3]
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


def orientation(root):
    path = images(root)[3]
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)


def replace_image(convert, suffix=".png"):
    def plant(root):
        path = images(root)[3]
        convert(Image.open(path)).save(path.with_suffix(suffix))
        if suffix != path.suffix:
            path.unlink()
    return plant


def deep(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def alpha(image):
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, 40, 40))
    image.putalpha(mask)
    return image


def drop(kind, number=3):
    return lambda root: kind(root)[number].unlink()


def truncate(kind, number=3):
    def plant(root):
        path = kind(root)[number]
        path.write_bytes(path.read_bytes()[:400])
    return plant


def binary(root):
    without_palette(root)
    each(lambda v: np.where(v == 2, 255, 0))(root)


def suffixed(root):
    for path in [*masks(root), *masks(root, "val")]:
        path.rename(path.with_name(f"{path.stem}_mask.png"))


def colours(root):
    without_palette(root)
    for path in [*masks(root), *masks(root, "val")]:
        values = np.array(Image.open(path))
        Image.fromarray(np.array([*IMAGE_PALETTE, (0, 0, 0)], np.uint8)[np.minimum(values, 7)]).save(path)


def numbers_apart(root):
    without_palette(root)
    each(lambda v: np.where(v == 255, 255, 10 * v + 7))(root)


def from_one(root):
    without_palette(root)
    each(shift)(root)


def sixteen_bit(root):
    without_palette(root)
    for path in [*masks(root), *masks(root, "val")]:
        Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 100).save(path)


def same_mask(root):
    shutil.copy(masks(root)[3], masks(root)[7])


FAULTS = {
    "wrong palette": (reordered_palette, "fault", "street_005.png", "palette"),
    "mirrored mask": (one(lambda v: v[:, ::-1]), "fault", "street_003.png", "mirrored left to right"),
    "upside-down mask": (one(lambda v: v[::-1]), "fault", "street_003.png", "upside down"),
    "mask turned by 180": (one(lambda v: v[::-1, ::-1]), "fault", "street_003.png", "rotated by 180"),
    "all mirrored": (each(lambda v: v[:, ::-1]), "fault", "", "mirrored left to right"),
    "all upside down": (each(lambda v: v[::-1]), "fault", "", "upside down"),
    "all moved": (each(lambda v: np.roll(v, 11, 1)), "fault", "", "shifted"),
    "moved mask": (one(lambda v: np.roll(v, 9, 1)), "fault", "street_003.png", "shifted: moved by about 6 % to the left"),
    "small copy": (small_copy, "doubt", "copied.png", "near-duplicate"),
    "swapped pair": (swap, "fault", "street_009.png", "swapped"),
    "shifted labels": (one(lambda v: np.where(v < 6, v + 1, 255)), "fault", "street_003.png", "shifted labels"),
    "labels from 1": (from_one, "doubt", "", "labels count from 1"),
    "transposed size": (turned_mask, "fault", "street_003.png", "transposed"),
    "another size": (one(lambda v: v[:90]), "fault", "street_003.png", "128x90"),
    "JPEG mask": (jpeg_mask, "fault", "street_003.jpg", "JPEG"),
    "blurred mask": (blurred, "fault", "street_003.png", "interpolation"),
    "missing mask": (drop(masks), "fault", "street_003.jpg", "mask is missing"),
    "extra mask": (drop(images), "fault", "street_003.png", "extra mask"),
    "duplicate across splits": (copy_to_val, "doubt", "copied.jpg", "two splits"),
    "duplicate within": (copy_within, "doubt", "street_004.jpg", "duplicate within"),
    "name in two splits": (same_name, "doubt", "street_011.jpg", "has the name"),
    "one mask twice": (same_mask, "doubt", "street_007.png", "mask of another image"),
    "constant mask": (one(np.zeros_like), "doubt", "street_003.png", "constant mask"),
    "unlabelled mask": (one(lambda v: np.where(np.arange(v.size).reshape(v.shape) < 300, v, 255)), "doubt", "street_003.png", "unlabelled"),
    "0 and 255": (binary, "doubt", "", "0:0,255:1"),
    "value out of range": (one(lambda v: np.where(v == 2, 37, v)), "fault", "street_003.png", "37"),
    "only in val": (each(lambda v: np.where(v == 4, 1, v), slice(24)), "doubt", "", "no training file"),
    "rare class": (each(lambda v: np.where(v == 4, 1, v), slice(1, 24)), "doubt", "", "rare class"),
    "16-bit image": (replace_image(deep), "doubt", "street_003.png", "uint16"),
    "alpha": (replace_image(alpha), "doubt", "street_003.png", "alpha"),
    "grey beside colour": (replace_image(lambda image: image.convert("L"), ".jpg"), "doubt", "street_003.jpg", "grey beside colour"),
    "EXIF orientation": (orientation, "fault", "street_003.jpg", "orientation 6"),
    "truncated image": (truncate(images), "fault", "street_003.jpg", "cannot be read"),
    "truncated mask": (truncate(masks), "fault", "street_003.png", "cannot be read"),
    "mask suffix": (suffixed, "doubt", "", "--mask-suffix _mask"),
    "colour masks": (colours, "doubt", "", "colours"),
    "numbers of their own": (numbers_apart, "doubt", "", "7:0,17:1"),
    "16-bit masks": (sixteen_bit, "doubt", "", "label_map 0:0,100:1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name, streets, tmp_path):
    plant, *expected = FAULTS[name]
    root = Path(shutil.copytree(streets, tmp_path / "streets"))
    plant(root)
    check_named(inspected(root), *expected)


def tiny_set(root, masks_as, suffix=".png", photos_as=lambda image: image):
    """Three pictures, whose masks (classes 0, 1, 2 and 255) and photographs are changed."""
    write_pictures(root, 3)
    for kind, change in (("masks", masks_as), ("images", photos_as)):
        for path in sorted((root / kind).iterdir()):
            values = change(np.array(Image.open(path)))
            path.unlink()
            Image.fromarray(values).save(path.with_suffix(suffix))
    splits = {"train": ([str(root / "images")], [str(root / "masks")])}
    return inspect_images(splits, dict.fromkeys(("mask_suffix", "classes", "num_classes", "label_map")), 10, 1, 0)


@pytest.mark.parametrize("values, kind, label_map", [
    ((0, 300, 7, 65535), np.uint16, "0:0,7:1,300:2,65535:ignore"), ((0, 1, 2, -1), np.int32, "0:0,1:1,2:2,-1:ignore"),
    ((0, 65535, 0, 0), np.uint16, "0:0,65535:1"), ((0, 1, 1, 65535), np.uint16, "0:0,1:1,65535:ignore")])
def test_numbers_that_usually_are_no_class_are_planned_as_unlabelled(tmp_path, values, kind, label_map):
    found = tiny_set(tmp_path, lambda mask: np.select([mask == c for c in (0, 1, 2)], values[:3], values[3]).astype(kind), ".tif")
    assert found.settings["label_map"] == label_map


def test_masks_of_one_class_and_of_two_kinds_are_named(tmp_path):
    found = tiny_set(tmp_path / "one", np.zeros_like)
    assert any("all labelled pixels of the training masks are class 0" in finding.text for finding in found.findings if finding.level == "fault")
    assert found.settings["num_classes"] == 2
    place = iter((1, 255, 1))
    found = tiny_set(tmp_path / "two", lambda mask: (mask == 1).astype(np.uint8) * next(place))
    assert any("1 of 3 masks hold 255" in finding.text for finding in found.findings if finding.level == "doubt")


def test_photographs_without_a_known_range_do_not_end_the_inspection(tmp_path):
    found = tiny_set(tmp_path, lambda mask: mask, ".tif", lambda image: (image[..., 0] / 255).astype(np.float32))
    assert any("set value_range: [0" in finding.text for finding in found.findings if finding.level == "fault")
    found.draw()


def test_nothing_is_named_on_a_good_set(streets):
    found = inspected(streets)
    assert [finding for finding in found.findings if finding.level != "note"] == []
    assert found.settings["num_classes"] == 7 and found.files == {"train": 24, "val": 8}


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not there")
@pytest.mark.slow                                              # 700 photographs
def test_nothing_is_named_on_camvid():
    splits = {split: ([str(CAMVID / "images" / split)], [str(CAMVID / "masks" / split)]) for split in ("train", "val", "test")}
    found = inspect_images(splits, dict.fromkeys(("mask_suffix", "classes", "num_classes", "label_map")), 1000, 2, 0)
    assert [finding for finding in found.findings if finding.level != "note"] == []
