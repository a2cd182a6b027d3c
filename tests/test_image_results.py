import numpy as np
import pytest
from PIL import Image

from data.image_results import example_pair, feature_picture, overlay, write_image_result, write_labels
from data.images import SegmentationDataset
from data.photos import Photo
from tests.tiny_images import read_mask
from utils.losses import IGNORE_INDEX
from utils.render import IGNORE_COLOR

COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
LABEL = np.array([[0, 1, 2], [2, IGNORE_INDEX, 0]])


def photo(height=2, width=3, value=100):
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


def as_read(image):
    return Photo(image.size, lambda top, bottom: np.asarray(image)[top:bottom])


@pytest.mark.parametrize("ignore_label, reduce", [(255, False), (255, True), (0, True), (9, False)])
def test_label_file_has_the_numbers_and_the_colours(tmp_path, ignore_label, reduce):
    write_labels(tmp_path / "a.png", LABEL, COLORS, ignore_label, reduce)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P" and np.array(image).tolist() == [[0 + reduce, 1 + reduce, 2 + reduce], [2 + reduce, ignore_label, 0 + reduce]]
    assert (read_mask(tmp_path / "a.png", 3, ignore_label, reduce) == LABEL).all()
    shown = np.array(image.convert("RGB"))
    assert (shown[LABEL >= 0] == COLORS[LABEL[LABEL >= 0]]).all() and tuple(shown[1, 1]) == IGNORE_COLOR


def test_overlay_mixes_and_leaves_unlabelled_pixels():
    shown = np.array(overlay(photo(), LABEL, COLORS, 0.25))
    assert shown[0, 0].tolist() == [125, 75, 75] and shown[1, 0].tolist() == [75, 75, 125]
    assert shown[1, 1].tolist() == [100, 100, 100]
    assert (np.array(overlay(photo(), LABEL, COLORS, 1.0))[0] == COLORS).all()
    with pytest.raises(ValueError, match="sizes differ"):
        overlay(photo(3, 3), LABEL, COLORS)


def test_features_as_colours_lie_on_their_pixels():
    features = np.random.default_rng(0).normal(size=(5, 2, 3))
    features[:, :, 2] = 50                                                    # a column that only covers padding
    whole = np.array(feature_picture(features, (30, 20)))
    assert whole.shape == (20, 30, 3) and (whole[:, 20:] == whole[0, 20]).all() and (whole[:10, :10] == whole[0, 0]).all()
    cut = np.array(feature_picture(features, (20, 13), cells=(2.0, 1.3)))
    assert cut.shape == (13, 20, 3) and (cut == whole[:13, :20]).all()


def test_written_files(tmp_path):
    prediction = {"label": LABEL, "photo": as_read(photo())}
    written = write_image_result(tmp_path / "street.01", prediction, COLORS, "png", "png", 255, True, np.ones((4, 1, 1)))
    assert [path.name for path in written] == ["street.01.png", "street.01_overlay.png", "street.01_pca.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert (read_mask(written[0], 3, reduce_zero_label=True) == LABEL).all()
    assert (np.array(Image.open(written[1])) == np.array(overlay(photo(), LABEL, COLORS))).all()
    assert Image.open(written[2]).size == (3, 2)
    only, = write_image_result(tmp_path / "b", prediction, COLORS, "npy", "none")
    assert np.load(only).tolist() == [[0, 1, 2], [2, 255, 0]] and np.load(only).dtype == np.uint8


def test_examples_for_a_report(tmp_path):
    photo(20, 2000).save(tmp_path / "i.png")
    Image.fromarray(np.zeros((20, 2000), np.uint8)).save(tmp_path / "m.png")
    Image.fromarray(np.full((20, 2000), 255, np.uint8)).save(tmp_path / "none.png")
    dataset = SegmentationDataset([(tmp_path / "i.png", tmp_path / "m.png"), (tmp_path / "i.png", tmp_path / "none.png")], 16, 3, views="whole")
    pred = np.full((20, 2000), 2, np.uint8)
    truth, shown = example_pair(dataset, 0, pred, COLORS)
    assert truth.size == shown.size == (800, 8)
    assert np.array(truth)[0, 0].argmax() == 0 and np.array(shown)[0, 0].argmax() == 2
    assert example_pair(dataset, 1, pred, COLORS)[0] is None


def test_nothing_half_written_stays(tmp_path):
    with pytest.raises(ValueError, match="sizes differ"):
        write_image_result(tmp_path / "a", {"label": LABEL, "photo": as_read(photo(5, 5))}, COLORS)
    assert list(tmp_path.iterdir()) == []
