"""PASCAL VOC 2012 for segmentation: download, verify, unpack; a broken download goes on where it stopped.

    python scripts/download_voc.py                       # datasets/voc/VOCdevkit/VOC2012, 2 GB and as much unpacked
    python scripts/download_voc.py --aug                 # also the augmented masks: train_aug, 10,582 photographs
    python scripts/download_voc.py --mirror https://example.org/voc --no-extract

Without a network: fetch the archive elsewhere, put it into --root, run this. Nothing is done twice. The terms of use
are those of the benchmark and of Flickr: http://host.robots.ox.ac.uk/pascal/VOC/voc2012
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.voc import read_ids  # noqa: E402
from utils.checkpoint import check_writable  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.download import extract, extract_flat, fetch  # noqa: E402

ARCHIVE = "VOCtrainval_11-May-2012.tar"
SIZE = 1_999_639_040
DIGEST = ("sha256", "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb")
HOSTS = ("https://thor.robots.ox.ac.uk/pascal/VOC/voc2012", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
         "https://d2l-data.s3-accelerate.amazonaws.com")
# No digest was ever published for these two: their content is counted instead.
AUG_LISTS = "https://github.com/kazuto1011/deeplab-pytorch/files/2945588/list.zip"
AUG_MASKS = "https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip?dl=1"
FILES = {"JPEGImages/*.jpg": 17125, "SegmentationClass/*.png": 2913}
LISTS = {"Segmentation/train": 1464, "Segmentation/val": 1449, "Segmentation/trainval": 2913}
AUG_FILES = {"SegmentationClassAug/*.png": 12031}
AUG_LISTED = {"SegmentationAug/train_aug": 10582}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="datasets/voc", metavar="DIR")
    parser.add_argument("--mirror", metavar="URL", help=f"folder to try first, which holds {ARCHIVE}")
    parser.add_argument("--no-extract", action="store_true", help="only download and verify")
    parser.add_argument("--aug", action="store_true", help="also SegmentationClassAug and its lists")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def incomplete(folder: Path, files: dict, lists: dict) -> str | None:
    """What the data set lacks, in words; None where it has all its files and all its lists their length."""
    found = {pattern: len(list(folder.glob(pattern))) for pattern in files}
    for name in lists:
        path = folder / "ImageSets" / f"{name}.txt"
        found[name] = len(read_ids(path)) if path.is_file() else 0
    wrong = [f"{found[name]:,} of {count:,} {name}" for name, count in {**files, **lists}.items()
             if found[name] != count]
    return ", ".join(wrong) or None


def main(argv=None) -> dict:
    args = parse_args(argv)
    root = Path(args.root)
    check_writable(root)
    folder = root / "VOCdevkit" / "VOC2012"
    jobs = [([ARCHIVE], FILES, LISTS)] + [(["list.zip", "SegmentationClassAug.zip"], AUG_FILES, AUG_LISTED)] * args.aug
    for archives, files, lists in jobs:
        if not args.no_extract and incomplete(folder, files, lists) is None:
            print(f"{folder}: {', '.join(archives)} is there, complete")
            continue
        paths = [download(root, name, args.mirror) for name in archives]
        if args.no_extract:
            continue
        for path in paths:
            unpack(path, root, folder)
        if problem := incomplete(folder, files, lists):
            raise ValueError(f"{folder}: {problem} after unpacking {', '.join(map(str, paths))}; delete these files "
                             f"and run this again")
        print(f"{folder}: unpacked and complete; {', '.join(map(str, paths))} may be deleted")
    return {"folder": str(folder)}


def download(root: Path, name: str, mirror: str | None) -> Path:
    """Download and verify one of the three archives."""
    print(f"{root / name}: downloading, unless it is there", flush=True)
    if name == ARCHIVE:
        hosts = [*([mirror.rstrip("/")] if mirror else []), *HOSTS]
        return fetch([f"{host}/{name}" for host in hosts], root / name, SIZE, DIGEST)
    return fetch([AUG_LISTS if name == "list.zip" else AUG_MASKS], root / name)


def unpack(path: Path, root: Path, folder: Path) -> None:
    """Unpack one of the three archives to its place in the data set."""
    print(f"{path}: unpacking", flush=True)
    if path.name == ARCHIVE:
        extract(path, root)
    elif path.name == "list.zip":
        extract_flat(path, folder / "ImageSets" / "SegmentationAug", ".txt")
    else:
        extract_flat(path, folder / "SegmentationClassAug", ".png")


if __name__ == "__main__":
    run_main(main)
