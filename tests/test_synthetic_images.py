import json

import numpy as np
import pytest
from PIL import Image
from sklearn.tree import DecisionTreeClassifier

from data import synthetic
from data.images import check_pairs, find_files, pair_files, read_image
from data.synthetic_images import CAR, IMAGE_CLASSES, IMAGE_PALETTE, PERSON, SKY, VOID, make_image_set, make_scene
from tests.tiny_images import read_mask

SIZES = {"train": 12, "val": 2, "test": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streets")
    assert make_image_set(folder, *SIZES.values(), seed=3, size=(96, 72)) == IMAGE_CLASSES
    return folder


def test_the_set_is_what_the_data_flags_expect(folder):
    classes = json.loads((folder / "classes.json").read_text())
    assert classes == {"classes": IMAGE_CLASSES, "palette": IMAGE_PALETTE, "ignore_index": VOID}
    for split, count in SIZES.items():
        pairs = pair_files(find_files([f"{folder}/images/{split}/*.jpg"], "-i"), find_files([f"{folder}/masks/{split}"], "-m"))
        summary = check_pairs(pairs, len(IMAGE_CLASSES))
        assert len(pairs) == count and (summary.sizes == [72, 96]).all()
        share = summary.class_counts / summary.class_counts.sum()
        assert (share > 0.002).all() and share.max() < 0.55
        assert 0.002 < summary.ignored / (count * 72 * 96) < 0.15
    mask = Image.open(pairs[0][1])
    assert mask.mode == "P" and mask.getpalette()[:21] == sum(IMAGE_PALETTE, [])


def test_same_seed_same_bytes_and_splits_are_independent(folder, tmp_path):
    make_image_set(tmp_path, 2, 0, 1, seed=3, size=(96, 72))
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(written) == 7
    assert all((tmp_path / path).read_bytes() == (folder / path).read_bytes() for path in written)
    first = (tmp_path / "images/train/street_000.jpg").read_bytes()
    make_image_set(tmp_path, 1, 0, 0, seed=4, size=(96, 72))
    assert (tmp_path / "images/train/street_000.jpg").read_bytes() != first
    assert (folder / "images/test/street_000.jpg").read_bytes() != (folder / "images/train/street_000.jpg").read_bytes()


def test_labels_lie_on_what_is_drawn():
    """Neighbouring pixels of one label differ less than neighbours across a border."""
    within, across = [], []
    for seed in range(6):
        image, label = make_scene(np.random.default_rng(seed), 160, 120)
        step = abs(np.diff(image.astype(float), axis=1)).sum(-1)
        same = label[:, 1:] == label[:, :-1]
        known = (label[:, 1:] != VOID) & (label[:, :-1] != VOID)
        within.append(step[same & known].mean())
        across.append(step[~same & known].mean())
    assert np.mean(across) > 2 * np.mean(within)


def test_cars_and_people_have_unlabelled_edges_and_the_sky_is_above():
    for seed in range(6):
        _, label = make_scene(np.random.default_rng(seed), 160, 120)
        for axis in (0, 1):
            one, other = np.moveaxis(label, axis, 0)[:-1], np.moveaxis(label, axis, 0)[1:]
            thing = np.isin(one, (CAR, PERSON)) | np.isin(other, (CAR, PERSON))
            assert not (thing & (one != other) & (one != VOID) & (other != VOID)).any()
        assert not (label[100:] == SKY).any()


def test_colour_alone_says_little(folder):
    """Or the set would show nothing about a segmentation head."""
    def pixels(split):
        image = [np.array(read_image(path)) for path in find_files([folder / "images" / split], "-i")]
        label = [read_mask(path, len(IMAGE_CLASSES)) for path in find_files([folder / "masks" / split], "-m")]
        image, label = np.concatenate([i.reshape(-1, 3) for i in image]), np.concatenate([x.ravel() for x in label])
        return image[label >= 0], label[label >= 0]

    x, y = pixels("train")
    x_test, y_test = pixels("test")
    pred = DecisionTreeClassifier(min_samples_leaf=50).fit(x, y).predict(x_test)
    matrix = np.zeros((len(IMAGE_CLASSES),) * 2)
    np.add.at(matrix, (y_test, pred), 1)
    miou = (np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))).mean()
    assert 0.05 < miou < 0.35


def test_mistakes_and_command_line(tmp_path, capsys):
    with pytest.raises(ValueError, match="num_val=-1"):
        make_image_set(tmp_path, 0, -1, 0)
    with pytest.raises(ValueError, match=r"size=\(20, 40\).*at least 32"):
        make_image_set(tmp_path, 1, 0, 0, size=(20, 40))
    command = ["image", str(tmp_path), "--num-train", "1", "--num-val", "0", "--num_test", "0", "--size", "64", "48"]
    assert synthetic.main(command) == IMAGE_CLASSES and "1 + 0 + 0 streets" in capsys.readouterr().out
    assert Image.open(tmp_path / "images/train/street_000.jpg").size == (64, 48)
