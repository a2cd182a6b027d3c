import numpy as np
import pytest
from PIL import Image

from data import cityscapes
from data.images import SegmentationDataset, check_pairs, to_label
from utils.losses import IGNORE_INDEX


def make_cityscapes(root, values=((7, 0, 33), (255, 26, 30))):
    for city, name in (("ulm", "ulm_000001_000019"), ("aachen", "aachen_000002_000019"), ("aachen", "aachen_000000_000019")):
        for kind, ending, picture in (("leftImg8bit", "leftImg8bit", np.zeros((2, 3, 3), np.uint8)),
                                      ("gtFine", "gtFine_labelIds", np.array(values, np.uint8)),
                                      ("gtFine", "gtFine_color", np.zeros((2, 3, 3), np.uint8))):
            folder = root / kind / "train" / city
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{name}_{ending}.png")
    return root


def test_classes():
    assert len(cityscapes.CLASS_NAMES) == 19 and cityscapes.PALETTE.shape == (19, 3) and cityscapes.PALETTE.dtype == np.uint8
    assert [cityscapes.CLASS_NAMES[c] for c in (0, 6, 10, 13, 18)] == ["road", "traffic light", "sky", "car", "bicycle"]
    assert cityscapes.PALETTE[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]] and len(np.unique(cityscapes.PALETTE, axis=0)) == 19


def test_label_ids_to_train_ids_and_back():
    table = cityscapes.LABEL_TABLE
    assert table.shape == (256,) and table.dtype == np.int64
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16,
                 32: 17, 33: 18}
    assert [table[k] for k in range(34)] == [train_ids.get(k, IGNORE_INDEX) for k in range(34)] and table[255] == IGNORE_INDEX
    assert (table[cityscapes.LABEL_IDS] == np.arange(19)).all()
    with pytest.raises(ValueError, match="34"):                               # no label id: another kind of file
        to_label(Image.fromarray(np.full((1, 1), 34, np.uint8)), table, "m.png")


def test_pairs_are_photographs_and_label_ids(tmp_path):
    pairs = cityscapes.pairs(make_cityscapes(tmp_path), "train")
    assert [image.name for image, _ in pairs] == [f"{name}_leftImg8bit.png" for name in ("aachen_000000_000019", "aachen_000002_000019",
                                                                                        "ulm_000001_000019")]
    assert all(mask == tmp_path / "gtFine" / "train" / image.parent.name / image.name.replace("leftImg8bit", "gtFine_labelIds")
               for image, mask in pairs)
    assert check_pairs(pairs, 19, table=cityscapes.LABEL_TABLE).class_counts[[0, 13, 18]].tolist() == [3, 3, 3]
    label = SegmentationDataset(pairs, 8, 19, views="whole", table=cityscapes.LABEL_TABLE)[0]["label"]
    assert label.tolist() == [[0, IGNORE_INDEX, 18], [IGNORE_INDEX, 13, IGNORE_INDEX]]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"leftImg8bit/train: no such folder; unpack leftImg8bit_trainvaltest\.zip.*download_datasets\.py"):
        cityscapes.pairs(tmp_path, "train")
    make_cityscapes(tmp_path)
    with pytest.raises(ValueError, match="val"):
        cityscapes.pairs(tmp_path, "vall")
    with pytest.raises(ValueError, match="keeps the labels of test"):
        cityscapes.pairs(tmp_path, "test")
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / kind / "val").mkdir()
    with pytest.raises(ValueError, match=r"leftImg8bit/val: no CITY/"):
        cityscapes.pairs(tmp_path, "val")
    (tmp_path / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"ulm_000001_000019_gtFine_labelIds\.png: no such file, and 1 of 3"):
        cityscapes.pairs(tmp_path, "train")
