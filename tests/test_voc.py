import numpy as np
import pytest
from PIL import Image

from data import voc
from data.images import SegmentationDataset, check_pairs, to_label
from utils.losses import IGNORE_INDEX

LABEL = np.array([[0, 15, 255], [20, 1, 0]], np.uint8)


def write_mask(path, palette):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(LABEL)
    if palette:
        mask.putpalette(voc.color_map(256).tobytes())
    mask.save(path)


def make_voc(root, lists):
    """Four photographs with masks of both kinds; lists: {KIND/name: lines}."""
    for name in ("2007_000001", "2007_000002", "2008_000003", "2008_000004"):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 3, 3), 100, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        write_mask(root / "SegmentationClassAug" / f"{name}.png", palette=False)
        if name != "2008_000004":
            write_mask(root / "SegmentationClass" / f"{name}.png", palette=True)
    for name, text in lists.items():
        path = root / "ImageSets" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def names(pairs, root):
    return [(str(image.relative_to(root)), str(mask.relative_to(root))) for image, mask in pairs]


def test_names_and_colours_of_the_benchmark():
    assert len(voc.CLASS_NAMES) == 21 and voc.CLASS_NAMES[0] == "background" and voc.CLASS_NAMES[15] == "person"
    assert voc.CLASS_NAMES[1:] == sorted(voc.CLASS_NAMES[1:]) and voc.CLASS_NAMES[20] == "tvmonitor"
    known = {0: [0, 0, 0], 1: [128, 0, 0], 3: [128, 128, 0], 8: [64, 0, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    assert {c: voc.PALETTE[c].tolist() for c in known} == known
    assert voc.color_map(256)[255].tolist() == [224, 224, 192] and len(np.unique(voc.color_map(256), axis=0)) == 256


def test_lists_of_ids_and_of_paths(tmp_path):
    root = make_voc(tmp_path / "VOCdevkit" / "VOC2012", {
        "Segmentation/train": "2007_000002\n2007_000001\n\n",
        "SegmentationAug/train": "/JPEGImages/2008_000004.jpg /SegmentationClassAug/2008_000004.png\n",
        "SegmentationAug/train_aug": "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png\r\n"
                                     "/JPEGImages/2008_000004.jpg /SegmentationClassAug/2008_000004.png\r\n",
        "Segmentation/trainaug": "\ufeff2008_000004\r\n2007_000001\r\n"})
    official = [("JPEGImages/2007_000002.jpg", "SegmentationClass/2007_000002.png"),
                ("JPEGImages/2007_000001.jpg", "SegmentationClass/2007_000001.png")]
    augmented = [(f"JPEGImages/{name}.jpg", f"SegmentationClassAug/{name}.png") for name in ("2007_000001", "2008_000004")]
    for given in (tmp_path, tmp_path / "VOCdevkit", root):
        assert names(voc.pairs(given, "train"), root) == official
    assert names(voc.pairs(root, "train_aug"), root) == augmented
    assert names(voc.pairs(root, "trainaug"), root) == augmented[::-1]


def test_palette_masks_are_read_as_indices(tmp_path):
    root = make_voc(tmp_path, {"Segmentation/val": "2007_000001\n"})
    pairs = voc.pairs(root, "val")
    assert Image.open(pairs[0][1]).mode == "P"
    assert check_pairs(pairs, 21, table=voc.LABEL_TABLE).ignored == 1
    label = SegmentationDataset(pairs, 8, 21, views="whole", table=voc.LABEL_TABLE)[0]["label"].numpy()
    assert label.tolist() == [[0, 15, IGNORE_INDEX], [20, 1, 0]]
    with pytest.raises(ValueError, match="21"):
        to_label(Image.fromarray(np.full((1, 1), 21, np.uint8)), voc.LABEL_TABLE, "m.png")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no VOCdevkit/VOC2012/JPEGImages.*download_voc.py"):
        voc.pairs(tmp_path, "train")
    root = make_voc(tmp_path, {"Segmentation/train": "2007_000001\n2008_000004\n", "Segmentation/val": "\n", "Segmentation/x": "a b c\n",
                               "SegmentationAug/train_aug": "2007_000009\n"})
    with pytest.raises(ValueError, match=r"trainval\.txt: no such list.*there are train, train_aug, val, x\."):
        voc.pairs(root, "trainval")
    with pytest.raises(ValueError, match=r"SegmentationClass/2008_000004\.png: no such file.*\(1 of 4 are missing\).*download_voc\.py$"):
        voc.pairs(root, "train")
    with pytest.raises(ValueError, match=r"2007_000009\.jpg: no such file.*\(2 of 2"):
        voc.pairs(root, "train_aug")
    (root / "JPEGImages" / "2007_000009.jpg").touch()
    with pytest.raises(ValueError, match=r"SegmentationClassAug/2007_000009\.png.*--aug$"):
        voc.pairs(root, "train_aug")
    with pytest.raises(ValueError, match=r"val\.txt: the list is empty"):
        voc.pairs(root, "val")
    with pytest.raises(ValueError, match=r"x\.txt: a line has 3 words, 'a b c'"):
        voc.pairs(root, "x")
