"""GeoTIFF and JPEG 2000 through rasterio: windows, bands, value ranges and georeferences, in the readers and in whole runs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import evaluate
import predict
import train_m2f_head
import train_prototype
import train_segmentation
from data.images import SegmentationDataset, check_pairs
from data.photo_values import photo_doubts
from data.photos import PhotoFormat, open_photo, read_image
from data.rasters import library, opened_raster
from models.deeplab import DeepLabClassifier, load_deeplab_weights
from models.resnet import ResNet
from tests.test_odd_images import noise, save, tiff
from tests.tiny_images import COLORS, shrink_unet, tiny_picture
from utils.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
rasterio = library()
needs_rasterio = pytest.mark.skipif(rasterio is None, reason="rasterio, an optional package, is not installed")


def geotiff(path, values, *, crs="EPSG:32633", origin=(500_000.0, 5_400_000.0), **options):
    """values (H, W, K) of any type as a GeoTIFF with pixels of 0.25 m; options of GDAL's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = values.shape
    place = {} if crs is None else {"crs": crs, "transform": rasterio.transform.from_origin(*origin, 0.25, 0.25)}
    with rasterio.open(path, "w", driver="GTiff", width=width, height=height, count=count, dtype=values.dtype.name, **place, **options) as file:
        file.write(values.transpose(2, 0, 1))
    return path


# -- readers -----------------------------------------------------------------------------------------------------------

@needs_rasterio
@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "zstd"}, {"interleave": "band"},
                                     {"BIGTIFF": "YES", "compress": "lzw", "predictor": 2}])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int8, np.uint32])
def test_rows_are_the_files_own_numbers(tmp_path, kind, options):
    ends = np.iinfo(kind)
    values = np.random.default_rng(0).integers(ends.min, ends.max, (40, 33, 5), endpoint=True).astype(kind)
    path = geotiff(tmp_path / "a.tif", values, **options)
    upper = ((values.astype(np.int64) - ends.min) >> (8 * values.itemsize - 8)).astype(np.uint8)
    for bands in (None, (5, 1, 1, 3), (2,)):
        photo = open_photo(path, photos=PhotoFormat(bands=bands))
        expected = upper[..., :3] if bands is None else upper[..., [band - 1 for band in bands]]
        assert photo.size == (33, 40) and (photo.rows() == expected).all() and (photo.rows(7, 9) == expected[7:9]).all()
    scaled = open_photo(path, photos=PhotoFormat((0, 100), (1, 2, 3))).rows()
    if kind is not np.uint8:
        assert (scaled == np.floor((values[..., :3].astype(float) * 2.55).clip(0, 255) + 0.5)).all()
    assert photo.georeference.crs.to_epsg() == 32633
    with pytest.raises(ValueError, match=r"a.tif: this image cannot be read \(5 bands; bands: \[6\] names band 6\)"):
        open_photo(path, photos=PhotoFormat(bands=(6,)))


@needs_rasterio
def test_what_pillow_reads_is_read_alike(tmp_path):
    """Without bands or values that need it, the pixels do not depend on rasterio."""
    values = noise(40, 33)
    paths = [save(tmp_path / "a.tif", values), save(tmp_path / "lzw.tif", values, compression="tiff_lzw"), save(tmp_path / "grey.tif", values[..., 0]),
             save(tmp_path / "palette.tif", values[..., 0], "P"), save(tmp_path / "cmyk.tif", values, "CMYK"), save(tmp_path / "bits.tif", values[..., 0], "1"),
             tiff(tmp_path / "white.tif", values[..., 0], photometric=0), tiff(tmp_path / "deep.tif", values.astype(np.uint16).transpose(2, 0, 1) * 200),
             tiff(tmp_path / "unspecified.tif", noise(40, 33, 4).transpose(2, 0, 1), extra=0),
             tiff(tmp_path / "nir.tif", noise(40, 33, 4).transpose(2, 0, 1), extra=2), save(tmp_path / "jpeg.tif", values, compression="jpeg")]
    for path in paths:
        read, doubts = np.asarray(read_image(path)).astype(int), photo_doubts(path, PhotoFormat())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.rasters.library", lambda: None)
            assert abs(np.asarray(read_image(path)).astype(int) - read).max() <= (2 if path.stem == "jpeg" else 0), path
            assert photo_doubts(path, PhotoFormat()) == doubts, path
    left = {}
    for path in paths:
        with opened_raster(path) as raster:
            left[path.stem] = raster is None
    assert [name for name, by_pillow in left.items() if by_pillow] == ["palette", "cmyk", "bits", "white"]


@needs_rasterio
def test_jpeg_2000(tmp_path):
    values = noise(64, 48, high=4096, kind=np.uint16)
    for count, options in ((3, {}), (1, {})):
        path = tmp_path / f"{count}.jp2"
        with rasterio.open(path, "w", driver="JP2OpenJPEG", width=48, height=64, count=count, dtype="uint16", QUALITY=100, REVERSIBLE="YES", YCBCR420="NO",
                           crs="EPSG:4326", transform=rasterio.transform.from_origin(8, 49, 0.01, 0.01), **options) as file:
            file.write(values[..., :count].transpose(2, 0, 1))
        photo = open_photo(path, photos=PhotoFormat((0, 4095)))
        assert (photo.rows() == np.floor(values[..., [0, 1, 2] if count == 3 else [0] * 3] * (255 / 4095) + 0.5)).all()
        assert photo.georeference.crs.to_epsg() == 4326
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.rasters.library", lambda: None)
        with pytest.raises(ValueError, match="3.jp2: .*JPEG 2000 colours of more than 8 bits.*install rasterio"):
            read_image(tmp_path / "3.jp2")


@pytest.mark.parametrize("write, said", [
    (lambda path: tiff(path, noise(bands=5).transpose(2, 0, 1), photometric=1), "5 bands of 8 bits"),
    (lambda path: tiff(path, noise(high=65536, kind=np.uint16).transpose(2, 0, 1), planar=True), "planar"),
    (lambda path: tiff(path, noise(kind=np.int16).transpose(2, 0, 1), signed=True), "3 bands of 16 signed bits"),
    (lambda path: tiff(path, noise(kind=np.int8, high=127)[..., 0], signed=True), "signed numbers of 8 bits")])
def test_where_pillow_alone_would_be_wrong_rasterio_is_named(tmp_path, monkeypatch, write, said):
    path = write(tmp_path / "a.tif")
    if rasterio is not None:
        assert open_photo(path).rows().shape == (6, 8, 3)
    for module in ("rasters", "photos"):
        monkeypatch.setattr(f"data.{module}.library", lambda: None)
    with pytest.raises(ValueError, match=rf"a.tif: .*{said}.*install rasterio \(pip install rasterio\)"):
        read_image(path)


@needs_rasterio
def test_only_windows_of_a_large_raster_are_read(tmp_path, monkeypatch):
    values = noise(300, 260, 4)
    path = geotiff(tmp_path / "images" / "a.tif", values, crs=None, tiled=True, blockxsize=16, blockysize=16)
    mask = save(tmp_path / "masks" / "a.png", np.zeros((300, 260), np.uint8))
    monkeypatch.setattr("data.images.WINDOWED", 100)
    boxes, read = [], type(open_raster(path)).read

    def noted(self, box, bands=None):
        boxes.append(box)
        return read(self, box, bands)
    monkeypatch.setattr("data.rasters.Raster.read", noted)
    photos = PhotoFormat(bands=(4, 2, 3, 1))
    for size in (32, 150):
        dataset = SegmentationDataset([(path, mask)], size, 1, views="windows", photos=photos)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.images.WINDOWED", 1 << 30)
            whole = [item["image"] for item in dataset]
        boxes.clear()
        parts = [dataset[i]["image"] for i in range(len(dataset))]
        assert max((right - left) * (bottom - top) for left, top, right, bottom in boxes) < 0.95 * 300 * 260
        assert len(parts) == len(whole) > 1 and all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(parts, whole, strict=True))


def open_raster(path):
    with opened_raster(path) as raster:
        return raster


@needs_rasterio
def test_damaged_and_too_large_rasters_are_refused(tmp_path):
    path = geotiff(tmp_path / "a.tif", noise(200, 200, 4), compress="deflate")
    path.write_bytes(path.read_bytes()[:-30_000])
    with pytest.raises(ValueError, match="a.tif: this image cannot be read"):
        open_photo(path).rows()
    with pytest.raises(ValueError, match="a.tif: this image cannot be read"):
        check_pairs([(path, save(tmp_path / "m.png", np.zeros((200, 200), np.uint8)))], 2)
    with pytest.raises(ValueError, match="200 x 200 = 40000 pixels, above the limit of 39999"):
        open_photo(path, photos=PhotoFormat(max_pixels=39_999))
    with pytest.raises(ValueError, match="floating-point pixels have no known range"):
        open_photo(geotiff(tmp_path / "f.tif", noise(20, 20).astype(np.float32)))
    numbers = noise(20, 20).astype(np.float64)
    numbers[0, 0] = np.nan
    assert open_photo(geotiff(tmp_path / "d.tif", numbers), photos=PhotoFormat((0, 255))).rows()[0, 0].tolist() == [0, 0, 0]


@needs_rasterio
def test_a_set_of_rasters_is_checked_like_others(tmp_path):
    mask = save(tmp_path / "m.png", np.zeros((40, 40), np.uint8))
    narrow = geotiff(tmp_path / "narrow.tif", noise(40, 40, 4, high=3000, kind=np.uint16), photometric="rgb", alpha="yes")
    with pytest.raises(ValueError, match=r"narrow.tif: uint16 pixels use \d+ to 2\d\d\d of 0 to 65535.*value_range: \[0, 4095\]"):
        check_pairs([(narrow, mask)], 2)
    assert check_pairs([(narrow, mask)], 2, photos=PhotoFormat((0, 4095), (1, 2, 3, 4))).doubts == []
    assert "a fourth band that is no transparency" in check_pairs([(narrow, mask)], 2, photos=PhotoFormat((0, 4095))).doubts[0]
    with pytest.raises(ValueError, match=r"narrow.tif: this image has 4 bands, and bands: \[5, 1, 2\] names others"):
        check_pairs([(narrow, mask)], 2, photos=PhotoFormat((0, 4095), (5, 1, 2)))


# -- networks of more bands --------------------------------------------------------------------------------------------

def test_imagenet_weights_are_repeated_over_the_extra_bands(tmp_path, monkeypatch):
    from models.resnet import ENCODERS, BasicBlock

    shrink_unet(monkeypatch)
    torch.manual_seed(0)
    weights = ENCODERS["resnet18"]().state_dict()
    torch.save(weights, tmp_path / "resnet.pth")
    config = settings(tmp_path, "unet", bands=[1, 2, 3, 4])
    config.model.weights = str(tmp_path / "resnet.pth")
    model = train_segmentation.build_model(config)
    train_segmentation.load_pretrained(model, config)
    first, three = model.encoder.conv1.weight, weights["conv1.weight"]
    torch.testing.assert_close(first.detach(), three[:, [0, 1, 2, 0]] * 0.75)
    assert isinstance(ResNet(BasicBlock, (1, 1, 1, 1), 4, 8).conv1.weight, torch.Tensor) and first.shape[1] == 4
    source = DeepLabClassifier(3, (1, 1, 1, 1), 8).network
    torch.save({f"base.{name}": value for name, value in source.base.state_dict().items()}, tmp_path / "deeplab.pth")
    model = train_segmentation.build_model(settings(tmp_path, "deeplab_v2", bands=[1, 2, 3, 4, 5]))
    assert "matched" in load_deeplab_weights(model.network, tmp_path / "deeplab.pth")
    torch.testing.assert_close(model.network.base.layer1.conv1.conv.weight.detach(), source.base.layer1.conv1.conv.weight.detach()[:, [0, 1, 2, 0, 1]] * 0.6)
    assert model(torch.rand(1, 5, 33, 40)).shape == (1, 3, 33, 40)


def settings(root, name, **data):
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config_of(root, {"name": name, "backbone": "resnet18", "n_blocks": [1, 1, 1, 1], "base_width": 8}, **data)))
    return train_segmentation.read_config(train_segmentation.parse_args([str(path)]), [str(path)])


def config_of(root, model, **data):
    return {"dataset": {"root": str(root), "num_classes": 3, "image_size": 32, "cache_dir": None, **data}, "model": model, "logging": {"tensorboard": False},
            "training": {"epochs": 12, "batch_size": 2, "num_workers": 0, "amp": False}, "optimizer": {"lr": 0.01}, "evaluation": {"interval": 12, "mode": "slide", "size": 0}}


@pytest.mark.parametrize("changes, message", [
    ({"bands": [1, 2, 3, 4], "normalization": {"mean": [0.5] * 5, "std": [0.5] * 4}}, "mean.*of 4 bands"), ({"bands": [0, 1]}, "bands"), ({"max_pixels": 0}, "max_pixels")])
def test_settings_that_do_not_go_together(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, "unet", **changes)


def test_saturation_of_four_bands_is_refused(tmp_path):
    config = settings(tmp_path, "unet", bands=[1, 2, 3, 4])
    config.augmentations.color_jitter.saturation = 0.1
    with pytest.raises(ValueError, match="color_jitter: saturation and hue are of three colours, dataset.bands names 4"):
        train_segmentation.check_config(config)


def test_networks_that_take_three_bands_say_so(tmp_path, capsys):
    message = r"bands=\[1, 2, 3, 4\]: expected three bands.*this network takes red, green and blue"
    with pytest.raises(ValueError, match=message):
        train_m2f_head.main(["--image-paths", "a", "--mask-paths", "b", "--bands", "1", "2", "3", "4", "--output-dir", str(tmp_path / "run"), "--device", "cpu"])
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"dataset": {"root": str(tmp_path), "bands": [1, 2, 3, 4]}, "model": {"num_classes": 2, "weights": "random"}}))
    with pytest.raises(ValueError, match=message):
        train_prototype.main([str(tmp_path / "p.yaml"), "--output-dir", str(tmp_path / "run"), "--device", "cpu"])


# -- whole runs --------------------------------------------------------------------------------------------------------

def near_infrared(seed, size=(48, 64)):
    """A picture whose classes only the fourth band tells apart: 12-bit numbers (H, W, 4) uint16, label (H, W) uint8."""
    label = tiny_picture(seed, size)[1]
    rng = np.random.default_rng(seed)
    values = rng.integers(500, 900, (*size, 4))
    values[..., 3] = np.array([200, 2000, 3800])[label.clip(0, 2)] + rng.integers(-100, 100, size)
    return values.astype(np.uint16), label


@needs_rasterio
def test_four_bands_of_16_bits_from_training_to_the_georeferenced_result(tmp_path, monkeypatch, capsys):
    shrink_unet(monkeypatch)
    for split, seeds in (("train", range(4)), ("val", [10]), ("test", [20])):
        for seed in seeds:
            values, label = near_infrared(seed)
            geotiff(tmp_path / "images" / split / f"tile_{seed}.tif", values, interleave="band" if seed % 2 else "pixel")
            save(tmp_path / "masks" / split / f"tile_{seed}.png", label)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_of(tmp_path, {"backbone": "resnet18"}, bands=[1, 2, 3, 4], value_range=[0, 4095])))
    out = tmp_path / "run"
    trained = train_segmentation.main([str(tmp_path / "c.yaml"), "--device", "cpu", "--output-dir", str(out)])
    checkpoint = out / "model" / "model_last.pth"
    stored = load_checkpoint(checkpoint)["config"]["dataset"]
    assert stored["value_range"] == [0, 4095] and stored["bands"] == [1, 2, 3, 4] and trained["miou"] > 0.6
    scores = evaluate.main([str(checkpoint), "--device", "cpu"])
    assert scores["overall_accuracy"] > 0.8                    # without the fourth band there is nothing to see

    photo = tmp_path / "images" / "test" / "tile_20.tif"
    label = predict.main([str(checkpoint), str(photo), "--output", str(tmp_path / "out"), "--device", "cpu", "--confidence"])[str(photo)]
    truth = near_infrared(20)[1]
    assert (label == truth)[truth != 255].mean() == pytest.approx(scores["overall_accuracy"])
    with rasterio.open(photo) as source:
        for name, count in (("tile_20.tif", 1), ("tile_20_overlay.tif", 3), ("tile_20_confidence.tif", 1)):
            with rasterio.open(tmp_path / "out" / name) as file:
                assert file.crs == source.crs and file.transform == source.transform and (file.width, file.height, file.count) == (64, 48, count)
                if name == "tile_20.tif":
                    assert (file.read(1) == label).all() and file.dtypes == ("uint8",)
                    assert file.colormap(1)[1][:3] == tuple(stored_palette(checkpoint)[1])
    for wrong in ("dataset.value_range=[0,65535]", "dataset.bands=[1,2,3,1]"):         # it is the checkpoint's that counts
        other = predict.main([str(checkpoint), str(photo), wrong, "--output", str(tmp_path / "other"), "--device", "cpu", "--labels", "png", "--picture", "png"])
        assert (other[str(photo)] == truth)[truth != 255].mean() < 0.7
    assert (np.asarray(Image.open(tmp_path / "other" / "tile_20.png")) == other[str(photo)]).all()
    skipped = predict.main([str(checkpoint), str(photo.parent), "--output", str(tmp_path / "out"), "--device", "cpu", "--skip-existing"])
    assert skipped == {}


def stored_palette(checkpoint):
    return load_checkpoint(checkpoint)["palette"]


@needs_rasterio
def test_ground_control_points_come_along(tmp_path):
    from rasterio.control import GroundControlPoint

    from data.image_results import write_labels

    points = [GroundControlPoint(row, column, 8 + column / 1000, 49 - row / 1000) for row, column in ((0, 0), (0, 9), (9, 0), (9, 9))]
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=10, height=10, count=3, dtype="uint8", gcps=points, crs="EPSG:4326") as file:
        file.write(noise(10, 10).transpose(2, 0, 1))
    photo = open_photo(tmp_path / "a.tif")
    write_labels(tmp_path / "b.tif", np.zeros((10, 10), np.uint8), COLORS.astype(np.uint8), georeference=photo.georeference)
    with rasterio.open(tmp_path / "b.tif") as file:
        found, crs = file.gcps
    assert [(point.row, point.col, point.x, point.y) for point in found] == [(point.row, point.col, point.x, point.y) for point in points]
    assert crs.to_epsg() == 4326


def test_without_rasterio_the_missing_georeference_is_said_and_tif_refused(tmp_path, monkeypatch):
    path = tmp_path / "geo.tif"
    if rasterio is None:
        Image.fromarray(noise(20, 20)).save(path, tiffinfo={34735: (1, 1, 0, 1, 1024, 0, 1, 1)})
    else:
        geotiff(path, noise(20, 20))
    monkeypatch.setattr("data.rasters.library", lambda: None)
    monkeypatch.setattr("data.photo_values.library", lambda: None)
    monkeypatch.setattr("predict.library", lambda: None)
    assert photo_doubts(path, PhotoFormat()) == ["it is georeferenced, and its labels are not: install rasterio (pip install rasterio)"]
    args = predict.parse_args(["c", "i", "--output", "o", "--labels", "tif"])
    with pytest.raises(ValueError, match="tif is written through rasterio, which is not installed: pip install rasterio"):
        predict.check_results(args, train_segmentation.RESULTS)


def test_rasterio_is_imported_for_rasters_alone(tmp_path):
    save(tmp_path / "a.png", noise(20, 20))
    code = ("import sys; sys.modules['rasterio'] = None; from data.photos import open_photo; "
            f"print(open_photo({str(tmp_path / 'a.png')!r}).rows().shape)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "(20, 20, 3)", done.stderr
