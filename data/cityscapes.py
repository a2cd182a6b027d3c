"""Cityscapes (Cordts et al. 2016) in its native layout: leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY below one folder.

The labels are those of *_gtFine_labelIds.png, 34 ids of which 19 classes are trained and scored; nothing has to be
converted beforehand. Download with a login, see scripts/download_datasets.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.masks import OUT_OF_RANGE
from utils.checks import check_choice
from utils.losses import IGNORE_INDEX

SPLITS = ("train", "val")                   # 2,975 and 500 photographs of 1024 x 2048; the labels of test are secret
CLASSES = {                                 # by train id: name, label id in the files, colour
    "road": (7, (128, 64, 128)), "sidewalk": (8, (244, 35, 232)), "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)), "fence": (13, (190, 153, 153)), "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)), "traffic sign": (20, (220, 220, 0)), "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)), "sky": (23, (70, 130, 180)), "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)), "car": (26, (0, 0, 142)), "truck": (27, (0, 0, 70)), "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)), "motorcycle": (32, (0, 0, 230)), "bicycle": (33, (119, 11, 32))}
CLASS_NAMES = list(CLASSES)
PALETTE = np.array([color for _, color in CLASSES.values()], np.uint8)                       # (19, 3)
LABEL_IDS = np.array([label_id for label_id, _ in CLASSES.values()])                         # (19,) for the test server
# (256,) file value -> train id; the other ids up to 33, and -1 (licence plate), which 8 bits hold as 255, are ignored
LABEL_TABLE = np.full(256, OUT_OF_RANGE, np.int64)
LABEL_TABLE[[*range(34), 255]] = IGNORE_INDEX
LABEL_TABLE[LABEL_IDS] = np.arange(len(LABEL_IDS))


def pairs(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """The (photograph, labelIds mask) pairs of a split, by city and name.

    ValueError for test and unknown splits, folders that are missing or empty, photographs without a mask.
    """
    if split == "test":
        raise ValueError("Cityscapes keeps the labels of test: label leftImg8bit/test with predict.py, and send the "
                         "files to its server")
    check_choice("split", split, SPLITS)
    photos, masks = (Path(root) / kind / split for kind in ("leftImg8bit", "gtFine"))
    for folder in (photos, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; unpack {folder.parent.name}_trainvaltest.zip into {root} "
                             f"(python scripts/download_datasets.py cityscapes tells where to get it)")
    ending = "_leftImg8bit.png"
    found = [(path, masks / path.parent.name / path.name.replace(ending, "_gtFine_labelIds.png"))
             for path in sorted(photos.glob(f"*/*{ending}"))]
    if not found:
        raise ValueError(f"{photos}: no CITY/*{ending}; unpack leftImg8bit_trainvaltest.zip again")
    missing = [mask for _, mask in found if not mask.is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file, and {len(missing)} of {len(found)} photographs in {photos} have "
                         f"no mask; unpack gtFine_trainvaltest.zip again")
    return found
