"""What the numbers of photographs may mean: ranges, fill values, rare values, orders of bands, white at 0."""

import numpy as np
import pytest

from data.images import check_pairs, scan_pairs
from data.photo_values import photo_doubts, set_doubts, usual_doubt
from data.photos import PhotoFormat, read_image
from tests.test_odd_images import noise, save

rasterio = pytest.importorskip("rasterio")
GREY = noise(40, 30, 1, high=3000, kind=np.uint16)[..., 0]                  # 12 bits


def gdal(path, bands, interp=None, colormap=None, **options):
    """A file as GDAL writes it: bands (H, W) or (H, W, K)."""
    bands = np.atleast_3d(bands).transpose(2, 0, 1)
    with rasterio.open(path, "w", driver="GTiff", width=bands.shape[2], height=bands.shape[1], count=len(bands), dtype=bands.dtype.name, **options) as file:
        file.write(bands)
        if interp:
            file.colorinterp = [rasterio.enums.ColorInterp[name] for name in interp]
        if colormap:
            file.write_colormap(1, colormap)
    return path


def records(*paths):
    mask = save(paths[0].with_name("mask.png"), np.eye(2, dtype=np.uint8))
    return scan_pairs([(path, mask) for path in paths])


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("kind, fill", [(np.int16, -9999), (np.int16, -32768), (np.uint16, 65535), (np.int32, -2147483648)])
def test_a_fill_value_is_no_part_of_the_range(tmp_path, monkeypatch, kind, fill, library):
    """Scenes of 12 bits look as if they used their whole type where a corner has no data."""
    if not library:
        monkeypatch.setattr("data.rasters.library", lambda: None)
    values = GREY.astype(kind)
    values[:5, :5] = fill
    path = gdal(tmp_path / "a.tif", values, nodata=fill)
    with pytest.raises(ValueError, match=r"a.tif: u?int\d+ pixels use \d+ to 29\d\d of .*value_range: \[0, 4095\]"):
        set_doubts(records(path), PhotoFormat())
    assert "value_range: [0, 4095]" in photo_doubts(path, PhotoFormat())[0]
    assert set_doubts(records(path), PhotoFormat((0, 4095))) == photo_doubts(path, PhotoFormat((0, 4095))) == []


def test_the_fill_value_of_floating_point_numbers(tmp_path):
    values = (GREY / 3000).astype(np.float32)
    for fill in (-3.4e38, np.nan):
        values[:5, :5] = fill
        with pytest.raises(ValueError, match=r"no known range.*set value_range: \[0\.\d+, 0\.99\d*\]|\[0, 0\.99\d*\]"):
            set_doubts(records(gdal(tmp_path / "a.tif", values, nodata=fill)), PhotoFormat())


def test_few_bright_pixels_do_not_hide_that_a_range_is_not_used(tmp_path):
    values = np.repeat(np.repeat(GREY, 4, 0), 4, 1)
    values[3, 4] = 60000
    for path in (save(tmp_path / "hot.png", values), gdal(tmp_path / "hot.tif", np.dstack([values] * 3))):
        for found in (set_doubts(records(path), PhotoFormat()), photo_doubts(path, PhotoFormat())):
            assert "nearly all uint16 pixels lie between" in found[0] and "set value_range: [0, 4095] (--value-range 0 4095)" in found[0]
        assert set_doubts(records(path), PhotoFormat((0, 65535))) == []
        bright = save(tmp_path / f"bright_{path.suffix[1:]}.png", (values.astype(int) * 20).clip(max=65535).astype(np.uint16))
        assert set_doubts(records(path, bright), PhotoFormat()) == []           # dark files of a set are dark


def test_14_bits_are_a_warning_for_a_set_and_none_for_a_dark_photograph(tmp_path):
    path = save(tmp_path / "a.png", noise(40, 30, 1, high=2 ** 14, kind=np.uint16)[..., 0])
    assert "set value_range: [0, 16383]" in set_doubts(records(path), PhotoFormat())[0]
    assert photo_doubts(path, PhotoFormat()) == []
    assert usual_doubt("uint16", 0, 8190) and not usual_doubt("uint16", 0, 8192) and usual_doubt("float32", 0, 1) is None


def test_an_order_of_bands_that_the_file_declares_is_a_doubt(tmp_path):
    values = noise(40, 30, bands=4)
    path = gdal(tmp_path / "a.tif", values, ["blue", "green", "red", "undefined"], photometric="minisblack")
    for found in (set_doubts(records(path), PhotoFormat()), photo_doubts(path, PhotoFormat())):
        assert any("its bands 3, 2, 1 are declared as red, green and blue" in line and "--bands 3 2 1" in line for line in found)
    assert (np.asarray(read_image(path, photos=PhotoFormat(bands=(3, 2, 1)))) == values[..., 2::-1]).all()
    assert set_doubts(records(path), PhotoFormat(bands=(1, 2, 3))) == []
    plain = gdal(tmp_path / "b.tif", values[..., :3], photometric="rgb")
    assert photo_doubts(plain, PhotoFormat()) == set_doubts(records(plain), PhotoFormat()) == []


def test_white_at_0_is_white_at_any_depth(tmp_path):
    values = noise(bands=1)[..., 0]
    for kind, factor in ((np.uint8, 1), (np.uint16, 257)):
        path = gdal(tmp_path / "a.tif", values.astype(kind) * kind(factor), photometric="miniswhite")
        assert (np.asarray(read_image(path)) == 255 - values[..., None]).all()
    path = gdal(tmp_path / "a.tif", values.astype(np.uint16), photometric="miniswhite")
    assert (np.asarray(read_image(path, photos=PhotoFormat((0, 255)))) == 255 - values[..., None]).all()


def test_numbers_that_are_no_colours_are_refused_with_the_file(tmp_path):
    values = noise(bands=1)[..., 0]
    table = gdal(tmp_path / "table.tif", values, colormap={0: (255, 0, 0, 255), 1: (0, 255, 0, 255)})
    with pytest.raises(ValueError, match=r"table.tif: this image cannot be read \(its numbers are indices of a colour table"):
        read_image(table)
    with pytest.raises(ValueError, match=r"complex.tif: this image cannot be read \(complex64 numbers"):
        read_image(gdal(tmp_path / "complex.tif", values.astype(np.complex64)))
    with pytest.raises(ValueError, match=r"long.tif: uint64 pixels have no known range"):
        check_pairs([(gdal(tmp_path / "long.tif", values.astype(np.uint64)), save(tmp_path / "m.png", values % 2))], 2)
