"""What the image scripts train on and start from: what is free is fetched, what needs a login is explained.

    python scripts/download_datasets.py                     # lists what there is
    python scripts/download_datasets.py voc ade20k          # into datasets/voc, datasets/ade20k
    python scripts/download_datasets.py resnet101           # datasets/weights/resnet101-63fe2227.pth
    python scripts/download_datasets.py cityscapes          # explains how to get it

Broken downloads go on where they stopped; what is there is not fetched again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.resnet import FILES, URL  # noqa: E402
from scripts import download_voc  # noqa: E402
from utils.checkpoint import check_writable  # noqa: E402
from utils.checks import check_choice  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.download import extract, fetch  # noqa: E402

ADE20K = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE20K_DIGEST = ("sha1", "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7")
ADE20K_FILES = {"images/training/*.jpg": 20210, "annotations/training/*.png": 20210,
                "images/validation/*.jpg": 2000, "annotations/validation/*.png": 2000}
CITYSCAPES = """Cityscapes needs an account (free for research), so it is not fetched here:
1. register at https://www.cityscapes-dataset.com/register/
2. download gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip (11 GB) there, or with the official tool:
   pip install cityscapesscripts
   csDownload -d {folder} gtFine_trainvaltest.zip leftImg8bit_trainvaltest.zip
3. unpack both into {folder}, which then holds leftImg8bit/train/... and gtFine/train/..."""


DATASETS = {"voc": "PASCAL VOC 2012 with SBD's masks: 21 classes, 10,582 training images, 2.6 GB",
            "ade20k": "ADE20K (SceneParsing): 150 classes, 20,210 training images, 0.9 GB",
            "cityscapes": "19 classes, 2,975 training images, 11 GB; needs an account, so the steps are printed"}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*DATASETS, *FILES])}; none: list them")
    parser.add_argument("--root", default="datasets", metavar="DIR")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def get_ade20k(root: Path) -> None:
    """ADE20K's 150 classes: masks where 0 is unlabelled (reduce_zero_label)."""
    folder = root / "ADEChallengeData2016"
    if download_voc.incomplete(folder, ADE20K_FILES, {}) is not None:
        extract(fetch([ADE20K], root / "ADEChallengeData2016.zip", digest=ADE20K_DIGEST), root)
        if problem := download_voc.incomplete(folder, ADE20K_FILES, {}):
            raise ValueError(f"{folder}: {problem} after unpacking; delete it and run this again")
    print(f"{folder}: complete")


def main(argv=None) -> dict:
    args = parse_args(argv)
    for name in args.names:
        check_choice("name", name, (*DATASETS, *FILES))
    if not args.names:
        known = {**DATASETS, **{name: f"ImageNet weights of torchvision, {file}" for name, file in FILES.items()}}
        print("\n".join(f"{name:<12}{what}" for name, what in known.items()))
        return {"names": []}
    root = Path(args.root)
    check_writable(root)
    for name in args.names:
        if name == "voc":
            download_voc.main(["--root", str(root / "voc"), "--aug"])
        elif name == "ade20k":
            get_ade20k(root / "ade20k")
        elif name == "cityscapes":
            print(CITYSCAPES.format(folder=root / "cityscapes"))
        else:
            digits = FILES[name].removesuffix(".pth").split("-")[1]               # the first of its sha256
            path = fetch([URL + FILES[name]], root / "weights" / FILES[name], digest=("sha256", digits))
            print(f"{path}: verified")
    return {"names": args.names}


if __name__ == "__main__":
    run_main(main)
