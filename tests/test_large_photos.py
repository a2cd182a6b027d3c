"""Photographs larger than memory should hold: bounded prediction equals the unbounded one, files come out as they went in,
and predict.py's flags for many and large files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import predict
from data.image_files import write_rows
from data.image_results import overlay, write_confidence
from data.images import SegmentationDataset, check_pairs, list_images
from data.photos import MOST_PIXELS, Photo, PhotoFormat, open_photo, read_image
from tests.test_odd_images import noise, save, write_set
from tests.test_odd_images import train as train_script
from tests.tiny_images import shrink_unet
from utils import image_inference, scratch
from utils.image_inference import (
    Rows,
    View,
    evaluate_images,
    resize_image,
    resized_shape,
    rows_of,
    segment_image,
    window_starts,
)
from utils.losses import IGNORE_INDEX

VIEWS = [View(None, 32, 20), View(None, 32, 32), View(48, 32, 21), View((60, 60), 24, 16, (0.9, 1.1), True), View(None, None, 1), View(130, 40, 27)]


def network(classes=5, seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(8, classes, 5, padding=2)).eval()

    @torch.no_grad()
    def score(image):
        return 20 * net(image)
    return score


def normalize(image):
    return image.float() / 255 - 0.4


def unbounded(score, image, view, batch_size=1):
    """Everything at once, as it is defined: whole score maps, of all classes at the photograph's size. -> labels (H, W), confidence."""
    height, width = image.shape[1:]
    probability = []
    for scale in view.scales:
        shape = resized_shape(height, width, view.size, scale)
        shown = image[None]
        if shape != (height, width):
            shown = F.interpolate(shown.float(), shape, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        window = min(shape) if view.window and max(shape) < view.window else view.window
        for flip in (False, True)[:1 + view.flip]:
            seen = normalize(shown)[0].flip(-1) if flip else normalize(shown)[0]
            tall, wide = min(window or shape[0], shape[0]), min(window or shape[1], shape[1])
            places = [(y, x) for y in window_starts(shape[0], tall, view.stride) for x in window_starts(shape[1], wide, view.stride)]
            total, count = 0, torch.zeros(shape)
            for begin in range(0, len(places), batch_size):
                part = places[begin:begin + batch_size]
                scores = score(torch.stack([seen[:, y:y + tall, x:x + wide] for y, x in part]))
                total = torch.zeros(scores.shape[1], *shape) if begin == 0 else total
                for (y, x), one in zip(part, scores, strict=True):
                    total[:, y:y + tall, x:x + wide] += one
                    count[y:y + tall, x:x + wide] += 1
            scores = total / count
            scores = scores.flip(-1) if flip else scores
            probability.append(F.interpolate(scores[None], (height, width), mode="bilinear")[0].softmax(0))
    confidence, label = torch.stack(probability).mean(0).max(0)
    return label.numpy(), confidence.numpy()


# -- bounded and unbounded ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_labels_are_those_of_the_unbounded_way_to_the_last_pixel(monkeypatch, view, batch_size):
    image, score = torch.randint(0, 256, (3, 95, 121), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)), network()
    label, confidence = unbounded(score, image, view, batch_size)
    for elements, memory in ((1 << 25, 1 << 27), (5 * 121 * 3, 100)):       # as it comes; strips of three rows, everything in files
        monkeypatch.setattr(image_inference, "elements_at_once", lambda device, gpu, elements=elements: elements)
        monkeypatch.setattr(image_inference, "RESIZE_BYTES", 1 << 28 if elements > 1e6 else 1 << 15)
        monkeypatch.setattr(scratch, "IN_MEMORY", memory)
        read: list[int] = []
        rows = Rows((95, 121), lambda top, bottom, read=read: read.append(bottom - top) or image[:, top:bottom])
        result = segment_image(score, normalize, rows, view, batch_size)
        assert (result["label"] == label).all() and np.abs(result["confidence"] - confidence).max() < 1e-5
        assert result["label"].dtype == np.uint8 and isinstance(result["label"], np.memmap) == (memory == 100)
    if view.size is None and view.window is not None and batch_size == 1:
        assert max(read) <= view.window                        # never the whole photograph


@pytest.mark.parametrize("source, target", [((301, 403), (97, 130)), ((120, 90), (151, 133)), ((203, 97), (20, 96))])
def test_a_photograph_resized_in_parts_is_the_same(monkeypatch, source, target):
    image = torch.randint(0, 256, (3, *source), dtype=torch.uint8)
    whole = F.interpolate(image[None].float(), target, mode="bilinear", antialias=True).round().clamp(0, 255).byte()[0]
    monkeypatch.setattr(image_inference, "RESIZE_BYTES", 50_000)
    parts = resize_image(rows_of(image), target)
    assert parts.shape == target and torch.equal(parts.read(0, target[0]), whole) and torch.equal(parts.read(5, 9), whole[:, 5:9])


def test_more_than_256_classes_and_refinement(monkeypatch):
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    result = segment_image(network(300), normalize, image, View(None, 16, 11))
    assert result["label"].dtype == np.int16 and result["label"].max() > 255
    refined = segment_image(network(), normalize, image, View(None, 16, 11), refine=lambda probability, shown: (probability.argmax(0) + 1) % 5)
    plain = segment_image(network(), normalize, image, View(None, 16, 11))
    assert (refined["label"] == (plain["label"].astype(int) + 1) % 5).all() and (refined["unrefined"] == plain["label"]).all()


def labelled_set(folder, count=3):
    pairs = []
    for number in range(count):
        label = np.random.default_rng(number).integers(0, 5, (70, 90)).astype(np.uint8)
        label[:number + 1] = 255
        pairs.append((save(folder / "images" / f"{number}.png", noise(70, 90, seed=number)), save(folder / "masks" / f"{number}.png", label)))
    return SegmentationDataset(pairs, 32, 5, views="whole", checked=check_pairs(pairs, 5))


def test_large_photographs_are_scored_as_small_ones(monkeypatch, tmp_path):
    dataset, results = labelled_set(tmp_path), []
    for large in (1 << 25, 70 * 90 - 1):
        monkeypatch.setattr("data.images.LARGE", large)
        assert dataset.is_large(0) == (large < 1e6)
        with monkeypatch.context() as patch:
            if large < 1e6:
                patch.setattr(SegmentationDataset, "__getitem__", None)        # no item is made
            results.append(evaluate_images(network(), normalize, dataset, 5, View(None, 32, 20), torch.device("cpu"), 4))
    first, second = results
    assert (first["matrix"] == second["matrix"]).all() and first["loss"] == pytest.approx(second["loss"], rel=1e-12)
    assert first["matrix"].sum() == sum((dataset[i]["label"] != IGNORE_INDEX).sum() for i in range(3))
    assert all((first["predictions"][i] == second["predictions"][i]).all() for i in range(3)) and first["examples"] == second["examples"]


def test_predictions_kept_for_a_report_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(image_inference, "KEPT_PIXELS", 2 * 70 * 90)
    result = evaluate_images(network(), normalize, labelled_set(tmp_path, 5), 5, View(None, 32, 20), torch.device("cpu"))
    ranked = sorted(result["examples"], key=lambda example: example[2])
    assert set(result["predictions"]) == {ranked[0][0], ranked[-1][0]} and len(ranked) == 5


def test_scratch_arrays(monkeypatch, tmp_path):
    monkeypatch.setattr(scratch, "IN_MEMORY", 100)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    array = scratch.scratch_array((30, 50), np.uint16)
    assert isinstance(array, np.memmap) and not array.any() and list(tmp_path.iterdir()) == []       # nameless
    array[3:7] = 9
    scratch.release(array, np.zeros(3), array + 1)
    assert array.sum() == 4 * 50 * 9
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match=r"no room for .* GiB of temporary files \(No space left on device\); set the environment variable TMPDIR"):
        scratch.scratch_array((30, 50), np.uint16)


# -- photographs by rows -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_rows_of_a_photograph_are_upright(monkeypatch, tmp_path, orientation, suffix):
    image = Image.fromarray(noise(13, 9))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, **({"exif": exif} if suffix == "png" else {"tiffinfo": {0x0112: orientation}} if orientation else {}))
    monkeypatch.setattr("data.rasters.library", lambda: None)             # Pillow reads
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    monkeypatch.setattr("data.photos.STRIP_PIXELS", 20)
    photo = open_photo(path, exif=True)
    assert photo.size == expected.shape[1::-1] and (photo.rows() == expected).all() and (photo.rows(2, 5) == expected[2:5]).all()
    if suffix == "png":                                                   # Pillow itself turns a TIFF when it is loaded
        assert (np.asarray(read_image(path)) == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_strips_of_every_mode_are_the_whole(monkeypatch, tmp_path, mode):
    values = noise(12, 10, bands=4)
    values[:6, :, 3] = 255
    values[6:, :, 3] = 0
    image = Image.fromarray(noise(12, 10, bands=1, high=65536, kind=np.uint16)[..., 0]) if mode == "I;16" else Image.fromarray(values).convert(mode)
    image.save(path := tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    whole = open_photo(path).rows()
    monkeypatch.setattr("data.photos.STRIP_PIXELS", 20)
    monkeypatch.setattr(scratch, "IN_MEMORY", 10)
    assert (open_photo(path).rows() == whole).all() and (np.asarray(read_image(path)) == whole).all()


def test_more_than_three_bands_without_rasterio(monkeypatch, tmp_path):
    monkeypatch.setattr("data.rasters.library", lambda: None)
    values = noise(12, 10, bands=4)
    path = save(tmp_path / "a.png", values)
    photos = PhotoFormat(bands=(4, 1, 2, 3, 4))
    assert (open_photo(path, photos=photos).rows() == values[..., [3, 0, 1, 2, 3]]).all()
    assert (np.asarray(read_image(path, photos=photos)) == values[..., [3, 0, 1]]).all()
    assert (np.asarray(read_image(path, photos=PhotoFormat(bands=(2,)))) == values[..., [1, 1, 1]]).all()
    dataset = SegmentationDataset([(path, save(tmp_path / "m.png", np.zeros((12, 10), np.uint8)))], 8, 1, views="windows", photos=photos)
    assert dataset[0]["image"].shape == (5, 8, 8)
    with pytest.raises(ValueError, match="names band 5"):
        open_photo(path, photos=PhotoFormat(bands=(1, 5))).rows()


def test_the_limit_of_pixels_and_what_lifts_it(monkeypatch, tmp_path):
    image, mask = save(tmp_path / "i.png", noise(30, 40)), save(tmp_path / "m.png", np.zeros((30, 40), np.uint8))
    monkeypatch.setattr("data.photos.MOST_PIXELS", 1199)
    for path in (image, mask):
        with pytest.raises(ValueError, match=rf"{path.name}: this image cannot be read \(40 x 30 = 1200 pixels, above the limit of 1199.*"
                                             r"name the file itself to predict.py, or set max_pixels \(--max-pixels 1200\)"):
            read_image(path)
    with pytest.raises(ValueError, match="max_pixels"):
        check_pairs([(image, mask)], 2)
    assert check_pairs([(image, mask)], 2, photos=PhotoFormat(max_pixels=1200)).class_counts.tolist() == [1200, 0]
    assert MOST_PIXELS == 178_956_970 and Image.MAX_IMAGE_PIXELS is not None


# -- files that are written --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, bands", [(np.uint8, 1), (np.uint16, 1), (np.uint8, 3)])
@pytest.mark.parametrize("step", [1, 5, 100])
def test_strips_become_the_file(tmp_path, kind, bands, step):
    values = np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, (23, 17, bands)).astype(kind)
    values = values[..., 0] if bands == 1 else values
    for ending in ("png", "npy"):
        write_rows(path := tmp_path / f"a.{ending}", (values[top:top + step] for top in range(0, 23, step)), (17, 23), kind, bands)
        read = np.load(path) if ending == "npy" else np.asarray(Image.open(path))
        assert read.dtype == kind and (read == values).all()
    colors = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
    if kind is np.uint8 and bands == 1:
        write_rows(tmp_path / "p.png", iter([values]), (17, 23), palette=colors)
        image = Image.open(tmp_path / "p.png")
        assert image.mode == "P" and (np.asarray(image) == values).all() and (np.asarray(image.convert("RGB")) == colors[values]).all()


def test_confidence_files(tmp_path):
    confidence = np.random.default_rng(0).random((8, 9)).astype(np.float32)
    confidence[0, :2] = 0, 1
    for name in ("c.png", "c.npy"):
        write_confidence(tmp_path / name, confidence)
    shown = np.asarray(Image.open(tmp_path / "c.png"))
    assert shown.dtype == np.uint16 and shown[0, :2].tolist() == [0, 65535] and np.abs(shown / 65535 - confidence).max() <= 0.51 / 65535
    assert (np.load(tmp_path / "c.npy") == confidence).all()


def test_overlay_in_8_bits_is_the_rounded_mixture():
    image, label = noise(40, 50), np.random.default_rng(0).integers(-1, 4, (40, 50))
    colors = noise(1, 4, seed=5)[0]
    mixed = ((1 - 0.55) * image + 0.55 * colors[label.clip(0, 3)]).round()
    expected = np.where(((label >= 0) & (label < 4))[..., None], mixed, image)
    assert (np.asarray(overlay(Image.fromarray(image), label, colors)) == expected).all()
    assert (np.asarray(overlay(Image.fromarray(image), label.clip(0).astype(np.uint8), np.resize(colors, (256, 3)))) ==
            ((1 - 0.55) * image + 0.55 * colors[label.clip(0)]).round()).all()


# -- predict.py --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    with pytest.MonkeyPatch.context() as patch:
        shrink_unet(patch)
        train_script("segmentation", write_set(folder / "data"), folder / "run")
        yield folder / "run" / "model" / "model_last.pth"


def label_files(checkpoint, *arguments):
    return predict.main([str(checkpoint), *map(str, arguments), "--device", "cpu"])


def test_photographs_in_folders_inside(checkpoint, tmp_path, capsys):
    for place in ("a.png", "in/a.png", "in/deep/b.png", ".hidden/c.png", "in/out/old.png"):
        save(tmp_path / "photos" / place, noise(40, 50, seed=len(place)))
    photos, out = tmp_path / "photos", tmp_path / "photos" / "in" / "out"
    label_files(checkpoint, photos, "--output", out)
    assert f"{photos}: 2 more in 2 folders inside; --recursive labels them too" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"a.png", "a_overlay.png", "old.png"}
    result = label_files(checkpoint, photos, "--output", out, "--recursive", "--picture", "none")
    assert sorted(result) == sorted(str(photos / name) for name in ("a.png", "in/a.png", "in/deep/b.png"))
    for name in ("a.png", "in/a.png", "in/deep/b.png"):
        assert (np.asarray(Image.open(out / name)) == result[str(photos / name)]).all()
    with pytest.raises(ValueError, match="nothing in this folder .* 1 more in 1 folders inside; --recursive"):
        label_files(checkpoint, save(tmp_path / "up" / "in" / "a.png", noise(40, 50)).parent.parent, "--output", tmp_path / "o")
    assert [path.name for path in list_images(photos / "in")] == ["a.png"]


def test_a_broken_photograph_does_not_stop_the_others(checkpoint, tmp_path, capsys):
    for name in "abc":
        save(tmp_path / "photos" / f"{name}.png", noise(40, 50))
    broken, out = tmp_path / "photos" / "b.png", tmp_path / "out"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"1 of 3 files have no result, the first: {broken}: ") as error:
        label_files(checkpoint, broken.parent, "--output", out, "--picture", "none")
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png"]
    shown = capsys.readouterr().out
    assert f"no result: {broken}: " in shown and f"wrote 2 results to {out}" in shown
    with pytest.raises(ValueError) as alone:
        label_files(checkpoint, broken, "--output", out)
    assert str(alone.value) == str(error.value).partition("the first: ")[2]


def test_skip_existing_goes_on_where_it_stopped(checkpoint, tmp_path, capsys, monkeypatch):
    for name in "abc":
        save(tmp_path / "photos" / f"{name}.png", noise(40, 50, seed=ord(name)))
    common = (tmp_path / "photos", "--output", tmp_path / "out", "--skip-existing")
    original = predict.summary

    def stop_at_second(*args):
        if (tmp_path / "out" / "b.png").exists():
            raise KeyboardInterrupt
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict, "summary", stop_at_second)
        label_files(checkpoint, *common)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "c_overlay.png").write_bytes(b"")      # a picture alone is no result: labels are written last
    assert [path[-5:] for path in label_files(checkpoint, *common)] == ["c.png"]
    assert "2 of 3 have results already" in capsys.readouterr().out
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert len(label_files(checkpoint, *common[:-1])) == 3


def test_confidence_is_written(checkpoint, tmp_path):
    photo = save(tmp_path / "a.png", noise(40, 50))
    label_files(checkpoint, photo, "--output", tmp_path / "out", "--confidence")
    confidence = np.load(tmp_path / "out" / "a_confidence.npy")
    shown = np.asarray(Image.open(tmp_path / "out" / "a_confidence.png"))
    assert confidence.shape == (40, 50) and confidence.dtype == np.float32 and 1 / 3 <= confidence.min() and confidence.max() <= 1
    assert (shown == np.floor(confidence * 65535 + 0.5)).all()


def test_named_photographs_may_have_any_size(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("data.photos.MOST_PIXELS", 1999)
    photo = save(tmp_path / "photos" / "a.png", noise(40, 50))
    assert label_files(checkpoint, photo, "--output", tmp_path / "out")[str(photo)].shape == (40, 50)
    with pytest.raises(ValueError, match=r"a.png: .*--max-pixels 2000"):
        label_files(checkpoint, photo.parent, "--output", tmp_path / "out")
    for more in (["--max-pixels", "2000"], ["dataset.max_pixels=2000"]):
        assert len(label_files(checkpoint, photo.parent, *more, "--output", tmp_path / "out")) == 1
    with pytest.raises(ValueError, match="max_pixels"):
        label_files(checkpoint, photo.parent, "--max-pixels", "1999", "--output", tmp_path / "out")


def test_photo_shown():
    rows = noise(5, 6, bands=5)
    assert (Photo((6, 5), lambda top, bottom: rows[top:bottom]).shown(1, 3) == rows[1:3, :, :3]).all()
    assert (np.asarray(Photo((6, 5), lambda top, bottom: rows[top:bottom, :, :2]).image()) == rows[..., [0, 0, 0]]).all()
