"""Look at labelled data before training: what is read, what is odd, and a plan to start from.

    python inspect_data.py --image-paths "train/images/*.jpg" --mask-paths "train/masks/*.png" \\
        --val-image-paths "val/images/*.jpg" --val-mask-paths "val/masks/*.png"
    python inspect_data.py --mesh-dir meshes --label-dir labels --test-mesh-dir test_meshes
    python inspect_data.py --cloud-root clouds           # folders, or splits.json: train, val, test
    python inspect_data.py ... --minutes 60 --device cuda         # plan a run of an hour on a GPU

Prints a summary and writes OUTPUT_DIR/report.html, one page with pictures, and plan.yaml beside it,
a config that the training script loads unchanged; for images also plan.sh, a command line of
train_linear_head.py. Files are read and refused by the code of the training scripts. A fault is
what training refuses, or what is wrong whatever the settings are; with one, the exit status is 1.
A doubt is accepted and rarely meant; a note is good to know. What is looked for:
docs/inspect_data.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import importlib
import os
import sys
import time
from pathlib import Path

from data.inspect_clouds import inspect_clouds
from data.inspect_images import inspect_images
from data.inspect_meshes import inspect_meshes
from data.label_map import read_label_map
from utils.checkpoint import check_writable
from utils.cli import ArgumentParser, AtLeast, run_main
from utils.config import load_config
from utils.device import describe, pick_device
from utils.inspection import LEVELS, Inspection, write_inspection
from utils.inspection_plans import linear_head_command, plan_clouds, plan_images, plan_meshes

SPLITS = {"train": "", "val": "val_", "test": "test_"}      # prefixes of the flags
PLANS = {"images": ("train_segmentation", plan_images), "meshes": ("train_downstream", plan_meshes),
         "clouds": ("train_sonata", plan_clouds)}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # data: images
    for prefix in ("", "val-", "test-"):
        add(f"--{prefix}image-paths", nargs="+", metavar="PATH", help="files, folders or globs")
        add(f"--{prefix}mask-paths", nargs="+", metavar="PATH", help="masks of the same names")
    add("--mask-suffix", nargs="+", metavar="TEXT",
        help="what masks' names have behind the images': _mask; default: found out")
    # data: meshes, clouds
    for prefix in ("", "val-", "test-"):
        add(f"--{prefix}mesh-dir", metavar="DIR", help="folder of meshes")
        add(f"--{prefix}label-dir", metavar="DIR", help="default: beside the meshes")
    add("--cloud-root", metavar="DIR", help="folder with train, val and test, or splits.json")
    # what labels mean
    add("--classes", metavar="FILE",
        help="class names and colours; default: classes.json beside or above the data")
    add("--num-classes", type=AtLeast(1), help="default: counted")
    add("--label-map", metavar="PAIRS|FILE",
        help="classes of the files' numbers: 0:0,255:1,4:ignore; default: found out")
    # plan
    add("--minutes", type=AtLeast(1, float), default=40.0,
        help="length of the planned training on --device")
    # run
    add("--max-items", type=AtLeast(1), default=1000, help="of more, a random sample is read")
    add("--output-dir", default="exp/inspection")
    add("--seed", type=int, default=0, help="of samples and pictures")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    add("--num-workers", type=AtLeast(1), default=min(8, os.cpu_count() or 1),
        help="files that are read at once")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    args.kind = kind_of(args)
    return args


def kind_of(args) -> str:
    """images, meshes or clouds; ValueError for none of them and for two."""
    flags = {"--image-paths": "images", "--mesh-dir": "meshes", "--cloud-root": "clouds"}
    asked = [flag for flag in flags if getattr(args, flag[2:].replace("-", "_"))]
    if len(asked) != 1:
        raise ValueError(f"expected --image-paths and --mask-paths, --mesh-dir or --cloud-root; "
                         f"got {' and '.join(asked) or 'none of them'}")
    return flags[asked[0]]


def inspect(args) -> Inspection:
    """All that is found out about the data of the flags, without pictures."""
    label_map = args.label_map and read_label_map(args.label_map)
    data = {"classes": args.classes, "num_classes": args.num_classes,
            "label_map": label_map and label_map.text()}
    shared = args.max_items, args.num_workers, args.seed
    kind = args.kind
    if kind == "clouds":
        return inspect_clouds(args.cloud_root, data, *shared)
    names = ("image_paths", "mask_paths") if kind == "images" else ("mesh_dir", "label_dir")
    splits = {split: tuple(getattr(args, prefix + name) for name in names)
              for split, prefix in SPLITS.items()}
    for split, values in splits.items():
        if kind == "images" and bool(values[0]) != bool(values[1]):
            flags = (f"--{SPLITS[split]}{name}".replace("_", "-") for name in names)
            raise ValueError(f"{' and '.join(flags)} belong together; only one of them is given")
    splits = {split: values for split, values in splits.items() if values[0]}
    if kind == "images":
        return inspect_images(splits, {**data, "mask_suffix": args.mask_suffix}, *shared)
    return inspect_meshes(splits, data, *shared)


def write_plans(args, found: Inspection, device, output: Path) -> list[tuple[str, str]]:
    """(title, text) of what was written: a config, for images a command line too; nothing where not
    one training file can be read."""
    if not found.files["train"]:
        return []
    name, plan = PLANS[args.kind]
    script = importlib.import_module(name)
    try:
        texts = {"plan.yaml": plan(found, script, args, device, output)}
    except ValueError as error:
        (output / "plan.yaml").unlink(missing_ok=True)
        found.add("fault", "refused by training", f"no plan, as {script.SCRIPT} says: {error}")
        return []
    if args.kind == "images":
        texts["plan.sh"] = linear_head_command(found, args)
    for file, text in texts.items():
        (output / file).write_text(text, encoding="utf-8")
    script.check_config(load_config(output / "plan.yaml", script.DEFAULTS))
    titles = (f"Plan: {script.SCRIPT}", "Or: train_linear_head.py")
    return list(zip(titles, texts.values(), strict=False))


def main(argv=None) -> dict:
    args = parse_args(argv)
    started = time.monotonic()
    device = pick_device(args.device)
    output = Path(args.output_dir)
    check_writable(output)
    found = inspect(args)
    found.draw()
    output.mkdir(parents=True, exist_ok=True)
    plans = write_plans(args, found, device, output)
    found.facts.append(("time", f"{time.monotonic() - started:.1f} s on {describe(device)}"))
    write_inspection(output / "report.html", found, plans)
    for key, value in found.facts:
        print(f"{key}: {value}")
    print(*found.lines(), sep="\n")
    print(f"{found.summary()}\nwrote {output / 'report.html'} and "
          f"{output / 'plan.yaml' if plans else 'no plan'}")
    return {**{f"{level}s": found.number(level) for level in LEVELS},
            "page": str(output / "report.html")}


if __name__ == "__main__":
    run_main(lambda: sys.exit(1 if main()["faults"] else 0))
