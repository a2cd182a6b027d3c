"""Cost of the heads on a frozen backbone, and of EoMT: parameters, the head alone, inference, a training step, memory.

    python benchmarks/bench_heads.py                                # ViT-S, 150 classes, 256 and 512 px
    python benchmarks/bench_heads.py --shapes 512x1 --heads m2f pmt --repeats 5

Every head at the defaults of its script. The head alone is its forward pass in evaluation, on given features, to logits
at its own resolution. Inference is `scores` of that script: backbone, head, scores of all classes at the image's size,
which for masks of queries cost more than PMT itself. A step is what its train_one_epoch does: backbone, head, loss,
backward, clipping, optimiser. Heads take turns in one process; the ratios are to the first of --heads. The peak memory
is that of a process each, above what it held before. Times on the CPU are CPU seconds with one thread, wall-clock
seconds with more.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.bench_dinov3 import by_turns, patches_of_classes, peak_mib  # noqa: E402
from utils import image_scripts as photos  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import AMP_DTYPES, autocast, describe, pick_device  # noqa: E402
from utils.image_inference import build_normalizer  # noqa: E402
from utils.losses import MaskedCrossEntropyLoss  # noqa: E402
from utils.training import Totals, optimizer_step  # noqa: E402

MEASURED = ("head", "inference", "step")
# Name: script, its flags, options for open_backbone from its config.
HEADS = {
    "m2f": ("train_m2f_head", [], {}),
    "upernet": ("train_upernet_head", [], {}),
    "pyramid": ("train_upernet_head", ["--neck", "pyramid"], {}),
    "pmt": ("train_pmt_head", [], {"prefix": True}),
    "linear": ("train_linear_head", [], {}),
    "eomt": ("train_eomt", [], {}),                         # trains the backbone
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--backbone", default="dinov3_vits16")
    parser.add_argument("--shapes", nargs="+", metavar="SIDExBATCH", default=["256x1", "512x1"], help="of the images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp-dtype", choices=tuple(AMP_DTYPES), default="float32", help="number format of autocast")
    parser.add_argument("--of", choices=MEASURED, help="print the peak memory of this, of one head")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out: half of the time")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


class OneStep:
    """Stands in for Run: an epoch of one step, which nothing logs or saves. amp_dtype: of autocast, None: float32."""

    step, total_steps, world = 1, 1000, 1

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device,
                 amp_dtype: torch.dtype | None = None, num_classes: int | None = None) -> None:
        self.model, self.optimizer, self.device, self.amp_dtype = model, optimizer, device, amp_dtype
        self.scheduler = SimpleNamespace(step=lambda: None)
        self.totals = Totals(num_classes, device)

    def steps(self, loader):
        return iter(loader)

    def autocast(self):
        return autocast(self.device, self.amp_dtype)

    def backward(self, loss, terms=None, weight=None):
        (loss if weight is None else loss / weight).backward()

    def update(self, clip_grad=0.0):
        optimizer_step(self.optimizer, self.scheduler, torch.amp.GradScaler(enabled=False), clip_grad)


def build(name: str, args: argparse.Namespace, size: int, batch: int) -> dict:
    """-> the calls that are MEASURED of a head, and its number of trained parameters."""
    script, flags, options = HEADS[name]
    script = importlib.import_module(script)
    config = script.config_of(script.parse_args([*flags, "--backbone", args.backbone, "--backbone-weights", "random",
                                                 "--image-size", str(size)]))
    device = pick_device(args.device)
    if name == "eomt":
        model, entry, _ = script.open_network(config, SimpleNamespace(seed=0, deterministic=False))
        backbone = normalize = build_normalizer(entry["mean"], entry["std"])
    else:
        taps = script.taps_of(config) if hasattr(script, "taps_of") else config.model.get("taps")
        backbone, _ = photos.open_backbone(config.model, taps=taps, **options)
        normalize = backbone.to(device).normalize
        torch.manual_seed(0)
        model = script.build_model(config)
        model.backbone = backbone
    model.to(device)
    masks = "num_queries" in config.model                   # whose epoch takes the config
    criterion = script.build_criterion(config) if masks else MaskedCrossEntropyLoss(class_dim=1)
    amp_dtype = AMP_DTYPES[args.amp_dtype]
    run = OneStep(model, script.build_optimizer(model, config), device, amp_dtype)
    data = {"image": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8),
            "label": patches_of_classes(batch, size)}

    def step():
        script.train_one_epoch(run, model, backbone, [[data]], criterion.to(device),
                               config if masks else config.training.clip_grad)

    image = normalize(data["image"].to(device))
    features = [image]
    if name != "eomt":                                      # its head is not to be had alone: the whole network
        features = [backbone(image)] if name == "linear" else [image, backbone(image)]

    @torch.no_grad()
    def head():
        with autocast(device, amp_dtype):
            model.eval()(*features, **({"aux": False} if masks else {}))

    @torch.no_grad()
    def inference():
        with autocast(device, amp_dtype):
            model.eval().scores(normalize(data["image"].to(device)))

    return {"head": head, "step": step, "inference": inference,
            "parameters": sum(p.numel() for p in model.parameters())}


def peak_alone(name: str, of: str, args: argparse.Namespace, shape: str) -> float:
    """The peak of two calls, in MiB, in a process of its own."""
    words = [sys.executable, __file__, "--of", of, "--heads", name, "--shapes", shape, "--backbone", args.backbone,
             "--device", args.device, "--threads", str(args.threads), "--amp-dtype", args.amp_dtype]
    return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split("peak ")[1])


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device, rows = pick_device(args.device), []
    if args.of:
        call = build(args.heads[0], args, *map(int, args.shapes[0].split("x")))[args.of]
        before = peak_mib(device, reset=True)
        call()
        call()
        print(f"peak {peak_mib(device) - before:.1f}")
        return []
    print(f"{args.backbone} on {describe(device)}, {args.threads} threads, median of {args.repeats}; seconds an image "
          f"(ratio to {args.heads[0]}, peak memory)", flush=True)
    for shape in args.shapes:
        size, batch = map(int, shape.split("x"))
        heads = {name: build(name, args, size, batch) for name in args.heads}
        seconds = {of: {name: statistics.median(found) / batch for name, found in
                        by_turns({name: head[of] for name, head in heads.items()}, args.repeats, device).items()}
                   for of in MEASURED}
        for name, head in heads.items():
            row = {"name": name, "shape": shape, "parameters": head["parameters"]}
            for of, found in seconds.items():
                row[of] = found[name]
                row[f"{of}_ratio"] = found[name] / found[args.heads[0]]
                row[f"{of}_mib"] = float("nan") if args.no_memory else peak_alone(name, of, args, shape)
            rows.append(row)
            print(f"  {shape} {name:8s} {row['parameters'] / 1e6:6.2f} M   " + "   ".join(
                f"{of} {row[of]:.2f} s ({row[f'{of}_ratio']:.3f}, {row[f'{of}_mib']:.0f} MiB)" for of in seconds),
                flush=True)
    return rows


if __name__ == "__main__":
    run_main(main)
