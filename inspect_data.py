"""Look at labelled data before training: what is read, what is odd, and a plan to start from.

    python inspect_data.py --image-paths "train/images/*.jpg" --mask-paths "train/masks/*.png" \\
        --val-image-paths "val/images/*.jpg" --val-mask-paths "val/masks/*.png"
    python inspect_data.py --mesh-dir meshes --label-dir labels --test-mesh-dir test_meshes
    python inspect_data.py --cloud-root clouds                # folders or splits.json: train, val, test
    python inspect_data.py ... --minutes 60 --device cuda     # plan a run of an hour on a GPU

Prints a summary and writes OUTPUT_DIR/report.html, one page with pictures, and OUTPUT_DIR/plan.yaml, a
config that the training script loads unchanged; for images plan.sh too, a command line of
train_linear_head.py. Files are read and refused by the code of the training scripts. A fault is what
training would refuse, or what is wrong whatever the settings; then the exit status is 1. A doubt is
accepted and rarely meant; a note is good to know. docs/inspect_data.md lists what is looked for.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

import train_segmentation
from data.inspect_images import inspect_images
from models.resnet import ENCODERS
from models.unet import UNet
from utils.checkpoint import check_writable
from utils.cli import ArgumentParser, AtLeast, run_main
from utils.config import load_config
from utils.device import amp_settings, autocast, describe, pick_device
from utils.inspection import LEVELS, UNEVEN, Inspection, plan_text, uneven, write_inspection
from utils.memory import free_memory

EPOCHS = 25, 1200               # least passes over the data and least steps, or a size is lowered
MOST_EPOCHS = 300
EVALUATE_EVERY = 5              # epochs
TRAINING_SHARE = 0.95           # of the minutes; the rest is reading and saving
SIZES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)        # of the photographs' short side
BYTES_PER_PIXEL = 2500          # of a U-Net in training, an upper bound
MEMORY = 4 << 30                # where the system does not say


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # data: images
    for prefix in ("", "val-", "test-"):
        add(f"--{prefix}image-paths", nargs="+", metavar="PATH", help="files, folders or globs")
        add(f"--{prefix}mask-paths", nargs="+", metavar="PATH")
    add("--mask-suffix", nargs="+", metavar="TEXT",
        help="what masks' names have behind the images': _mask; default: found out")
    add("--classes", metavar="FILE", help="class names and colours; default: one above the images")
    add("--num-classes", type=AtLeast(1), help="default: counted")
    add("--label-map", metavar="PAIRS|FILE", help="classes of the files' numbers: 0:0,255:1,4:ignore")
    # data: meshes
    for prefix in ("", "val-", "test-"):
        add(f"--{prefix}mesh-dir", metavar="DIR")
        add(f"--{prefix}label-dir", metavar="DIR", help="default: beside the meshes")
    # data: clouds
    add("--cloud-root", metavar="DIR", help="folder with train, val ... or splits.json")
    # plan
    add("--minutes", type=AtLeast(1, float), default=40.0, help="of training, on --device")
    # run
    add("--max-items", type=AtLeast(1), default=1000, help="of more, a random sample is looked at")
    add("--output-dir", default="exp/inspection")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    add("--num-workers", type=AtLeast(0), default=min(8, os.cpu_count() or 1), help="parallel readers")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


# -- images ----------------------------------------------------------------------------------------

def image_inputs(args) -> tuple[dict, dict]:
    """({split: (image patterns, mask patterns)}, settings of the files that flags give)."""
    splits = {}
    for split in ("train", "val", "test"):
        prefix = "" if split == "train" else f"{split}_"
        patterns = getattr(args, f"{prefix}image_paths"), getattr(args, f"{prefix}mask_paths")
        if bool(patterns[0]) != bool(patterns[1]):
            raise ValueError(f"--{prefix}image-paths and --{prefix}mask-paths belong together; "
                             f"only one of them is given".replace("_", "-"))
        if patterns[0]:
            splits[split] = patterns
    return splits, {name: getattr(args, name)
                    for name in ("mask_suffix", "classes", "num_classes", "label_map")}


def dataset_root(pairs: dict, output: Path) -> Path:
    """The folder with images/SPLIT and masks/SPLIT: where the files lie so, else one of links in
    the output folder, with every tenth pair for val where there is no val."""
    if "val" not in pairs:
        train = pairs["train"]
        pairs = {**pairs, "train": [pair for i, pair in enumerate(train) if i % 10 != 9] if len(train) > 9
                 else train, "val": train[9::10] or train[-1:]}
    root = pairs["train"][0][0].parent.parent.parent
    folders = {(kind, split): [pair[place] for pair in listed] for split, listed in pairs.items()
               for place, kind in enumerate(("images", "masks"))}
    if all(file.parent == root / kind / split for (kind, split), files in folders.items()
           for file in files) and all(len(list((root / kind / split).iterdir())) == len(files)
                                      for (kind, split), files in folders.items()):
        return root
    for (kind, split), files in folders.items():
        folder = output / "data" / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        for old in filter(Path.is_symlink, list(folder.iterdir())):
            old.unlink()
        for file in files:
            (folder / file.name).symlink_to(file.resolve())
    return output / "data"


def segmentation_seconds(backbone: str, num_classes: int, device: torch.device) -> float:
    """Measured: a training step of the U-Net, of one megapixel."""
    order = torch.channels_last
    model = UNet(ENCODERS[backbone](), num_classes).to(device, memory_format=order)
    image = torch.rand(4, 3, 160, 160, device=device).to(memory_format=order)
    label = torch.zeros(4, 160, 160, dtype=torch.int64, device=device)
    amp_dtype, _ = amp_settings(device, "native")

    def step():
        with autocast(device, amp_dtype):
            logits = model(image)
        torch.nn.functional.cross_entropy(logits.float(), label).backward()
    return measured(step, device) / (label.numel() / 1e6)


def measured(step, device: torch.device, repeats: int = 3) -> float:
    """The least seconds of a step; on a CPU those that its threads work, whatever else runs."""
    cpu = device.type == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    seconds = []
    for _ in range(repeats + 1):                            # the first warms up
        started = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(clock() - started)
    return min(seconds[1:]) / (torch.get_num_threads() if cpu else 1)


def plan_images(found: Inspection, args, device: torch.device, root: Path) -> str:
    """A config of train_segmentation.py: the largest size at which the network sees the data often
    enough in the minutes."""
    data = found.settings
    number, scored = found.files["train"], found.files.get("val", found.files["train"] // 10)
    backbone = "resnet34" if device.type == "cuda" else "resnet18"
    seconds = segmentation_seconds(backbone, data["num_classes"], device)
    memory = (free_memory(device) or MEMORY) / 2
    for share in SIZES:
        side = max(64, int(share * data["short_side"]) // 4 * 4)
        batch_size = int(np.clip(memory // (BYTES_PER_PIXEL * side ** 2), 2, min(8, max(2, number // 4))))
        steps = max(1, number // batch_size)
        scoring = scored * seconds / 3 * data["megapixels"] * (side / data["short_side"]) ** 2
        epoch = seconds * batch_size * steps * side ** 2 / 1e6 + scoring / EVALUATE_EVERY
        epochs = int(np.clip(60 * TRAINING_SHARE * args.minutes / epoch, 1, MOST_EPOCHS))
        if epochs >= EPOCHS[0] and epochs * steps >= EPOCHS[1]:
            break
    ratio = uneven(found)
    return plan_text(plan_head(found, "train_segmentation.py", args, device), {
        "experiment_name": "planned",
        "dataset": {
            "root": str(root),
            "num_classes": (data["num_classes"], f"of {'the class file' if data['classes'] else 'the masks'}"),
            **given("classes", data["classes"] and str(data["classes"]), "names and colours"),
            **given("mask_suffix", data["mask_suffix"], "what masks' names have behind the images'"),
            **given("label_map", data["label_map"], "which number of the masks is which class"),
            **given("reduce_zero_label", data["reduce_zero_label"], "labels count from 1"),
            "ignore_label": (255, f"{100 * found.ignored['train']:.1f} % of the training pixels are unlabelled"),
            "image_size": (side, f"short side; of the photographs' {data['short_side']} the largest with "
                                 f"{EPOCHS[0]} epochs and {EPOCHS[1]} steps in the time")},
        "augmentations": {
            "horizontal_flip": (True, "false where left and right differ in meaning"),
            "color_jitter": {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05},
            "random_crop": {"size": side},
            "scale_range": ([0.75, 1.75], "[1.0, 1.0] where the size of things is fixed")},
        "model": {"name": "unet",
                  "backbone": (backbone, "a GPU is there" if backbone == "resnet34" else "the smallest, for a CPU"),
                  "pretrained": (False, "true, and --pretrained_path FILE, is better: ImageNet weights")},
        "optimizer": {"name": "adamw", "lr": 1.5e-3, "weight_decay": 0.02},
        "scheduler": {"name": "onecycle", "pct_start": 0.15, "div_factor": 20.0, "final_div_factor": 200.0},
        "losses": {"ce": 1.0, "lovasz": (0.5, "of the score itself, mIoU"),
                   **given("class_weights", "sqrt_median_frequency" if ratio > UNEVEN else None,
                           f"the most frequent class has {ratio:.0f} times the pixels of the rarest")},
        "training": {
            "epochs": (epochs, f"{epochs * steps} steps, {epoch:.3g} s an epoch, measured: {args.minutes:g} minutes"),
            "batch_size": (batch_size, f"{memory / 2**29:.1f} GiB are free"),
            "num_workers": args.num_workers if device.type == "cuda" else 0,
            "amp": (True, "bfloat16 where the device computes in it"),
            "gradient_clip_val": 1.0, "ema": (0.995, "averaged weights"), "channels_last": True},
        "evaluation": {"interval": EVALUATE_EVERY if epochs >= 4 * EVALUATE_EVERY else 1},
        "logging": {"log_every_n_steps": 10}})


def linear_head_command(found: Inspection, args) -> str:
    """A command line of train_linear_head.py."""
    data = found.settings
    parts = ["python", "train_linear_head.py"]
    for name in ("image_paths", "mask_paths", "val_image_paths", "val_mask_paths", "test_image_paths",
                 "test_mask_paths", "mask_suffix"):
        values = getattr(args, name) if name != "mask_suffix" else data["mask_suffix"]
        if values:
            parts += [f"--{name.replace('_', '-')}", *values]
    parts += ["--num-classes", data["num_classes"], "--validate", "--image-size",
              max(64, min(512, data["short_side"] // 32 * 32))]
    for flag, value in (("--classes", data["classes"]), ("--label-map", data["label_map"]),
                        ("--class-weights", uneven(found) > UNEVEN and "sqrt_median_frequency")):
        parts += [flag, value] if value else []
    parts += ["--reduce-zero-label"] if data["reduce_zero_label"] else []
    parts += ["--backbone", "dinov3_vits16", "--backbone-weights", "FILE"]
    return " ".join(shlex.quote(str(part)) for part in parts).replace(" --", " \\\n    --") + "\n"


# -- all kinds -------------------------------------------------------------------------------------

def given(key: str, value, why: str) -> dict:
    return {key: (value, why)} if value else {}


def plan_head(found: Inspection, script: str, args, device: torch.device) -> list[str]:
    """The comment on top of a plan."""
    faults = found.number("fault")
    return [f"A plan for these data by inspect_data.py: {args.minutes:g} minutes on {describe(device)}. Start it with",
            f"  python {script} {Path(args.output_dir) / 'plan.yaml'}",
            *([f"{faults} faults were found; most of them stop the training until they are fixed (report.html)."]
              if faults else [])]


def main(argv=None) -> dict:
    args = parse_args(argv)
    started = time.monotonic()
    device = pick_device(args.device)
    output = Path(args.output_dir)
    check_writable(output)
    output.mkdir(parents=True, exist_ok=True)
    splits, data = image_inputs(args)
    found = inspect_images(splits, data, args.max_items, args.num_workers, args.seed)
    if "class_text" in found.settings:
        (output / "classes.json").write_text(found.settings["class_text"], encoding="utf-8")
        found.settings["classes"] = output / "classes.json"
    plans = [("Plan: train_segmentation.py", plan_images(found, args, device, dataset_root(found.pairs, output)))]
    (output / "plan.yaml").write_text(plans[0][1], encoding="utf-8")
    train_segmentation.check_config(load_config(output / "plan.yaml", train_segmentation.DEFAULTS))
    plans.append(("Or: train_linear_head.py", linear_head_command(found, args)))
    (output / "plan.sh").write_text(plans[1][1], encoding="utf-8")
    found.facts.append(("time", f"{time.monotonic() - started:.1f} s on {describe(device)}"))
    write_inspection(output / "report.html", found, plans)
    for key, value in found.facts:
        print(f"{key}: {value}")
    print("\n".join(found.lines()))
    print(f"{found.number('fault')} faults, {found.number('doubt')} doubts, {found.number('note')} notes\n"
          f"wrote {output / 'report.html'} and {output / 'plan.yaml'}")
    return {**{f"{level}s": found.number(level) for level in LEVELS}, "page": str(output / "report.html")}


if __name__ == "__main__":
    run_main(lambda: sys.exit(1 if main()["faults"] else 0))
