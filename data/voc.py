"""PASCAL VOC 2012 (Everingham et al.) in its native layout, also with the augmented masks (Hariharan et al. 2011).

Below ROOT, ROOT/VOC2012 or ROOT/VOCdevkit/VOC2012: JPEGImages; SegmentationClass (palette images, whose indices are the
classes); ImageSets/Segmentation/SPLIT.txt, bare ids; and where they were added, SegmentationClassAug (grey images) with
ImageSets/SegmentationAug/SPLIT.txt, the paths of photograph and mask a line. scripts/download_voc.py makes both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.images import label_table

OFFICIAL = ("train", "val", "trainval")     # 1,464, 1,449 and 2,913 photographs; train_aug has 10,582
CLASS_NAMES = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
               "tvmonitor"]                 # masks also hold 255: borders and what is too hard


def color_map(num_colors: int) -> np.ndarray:
    """The benchmark's colours (N, 3) uint8: bits 0, 3, 6 of the class make the highest bits of red, bits 1, 4, 7 those
    of green, bits 2, 5 those of blue."""
    index = np.arange(num_colors)
    return np.stack([sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(8))
                     for channel in range(3)], axis=1).astype(np.uint8)


PALETTE = color_map(len(CLASS_NAMES))                                                        # (21, 3)
LABEL_TABLE = label_table(len(CLASS_NAMES))                                                  # (256,), 255 is ignored


def find_root(root: str | Path) -> Path:
    """The folder VOC2012 in `root`, or root itself. ValueError where none of them holds JPEGImages."""
    for folder in (Path(root, "VOCdevkit", "VOC2012"), Path(root, "VOC2012"), Path(root)):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise ValueError(f"{root}: no VOCdevkit/VOC2012/JPEGImages in it; download it with python scripts/download_voc.py "
                     f"--root {root}")


def read_ids(path: Path) -> list[list[str]]:
    """The lines of a list, split into words; empty ones are left out."""
    return [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def pairs(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """The (photograph, mask) pairs of a list, in its order: train, val, trainval, train_aug, or any list there is.

    The official list of a name comes before the augmented one. Bare ids of train, val and trainval have their mask in
    SegmentationClass, those of other lists in SegmentationClassAug. ValueError: folders, lists or files that are
    missing, lines of more than two words, an empty list.
    """
    folder = find_root(root)
    lists = [folder / "ImageSets" / kind / f"{split}.txt" for kind in ("Segmentation", "SegmentationAug")]
    path = next((file for file in lists if file.is_file()), None)
    if path is None:
        there = sorted({file.stem for kind in lists for file in kind.parent.glob("*.txt")})
        raise ValueError(f"{lists[0]}: no such list, nor {lists[1]}; there are {', '.join(there) or 'none'}. "
                         f"scripts/download_voc.py fetches the official lists, with --aug those of train_aug")
    masks = "SegmentationClass" if split in OFFICIAL else "SegmentationClassAug"
    found = []
    for words in read_ids(path):
        if len(words) > 2:
            raise ValueError(f"{path}: a line has {len(words)} words, '{' '.join(words)[:60]}'; expected an id, or the "
                             f"paths of photograph and mask")
        if len(words) == 1:
            words = [f"JPEGImages/{words[0]}.jpg", f"{masks}/{words[0]}.png"]
        found.append(tuple(folder / word.lstrip("/") for word in words))
    if not found:
        raise ValueError(f"{path}: the list is empty; fetch it again with scripts/download_voc.py")
    missing = [file for pair in found for file in pair if not file.is_file()]
    if missing:
        aug = " --aug" if missing[0].parent.name == "SegmentationClassAug" else ""
        raise ValueError(f"{missing[0]}: no such file, named by {path} ({len(missing)} of {2 * len(found)} are "
                         f"missing); fetch them with scripts/download_voc.py{aug}")
    return found
