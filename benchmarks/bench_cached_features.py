"""Epoch time of a head on a frozen encoder, with the embeddings computed once (training.cache_features) and without.

    python benchmarks/bench_cached_features.py configs/mesh_humanbody.yaml       # random encoder: the time is the same
    python benchmarks/bench_cached_features.py configs/mesh_demo.yaml --epochs 5

Both runs see the same inputs (augmentation off) and end with the same weights, bit for bit, which is checked.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_downstream  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import describe, pick_device  # noqa: E402

FIXED = ["training.use_pretrained=false", "training.num_unfrozen_encoder_layers=0", "augmentation.mode=none",
         "augmentation.scale_range=[1.0,1.0]", "augmentation.deformation=0", "augmentation.noise_std=0",
         "augmentation.hks_noise=0", "augmentation.flip_probability=0", "augmentation.recluster=false",
         "augmentation.cluster_dropout=0", "logging.tensorboard=false"]


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--device")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def epoch_times(folder: Path) -> tuple[list[float], list[float]]:
    """(training, evaluation) seconds of every epoch but the first, from train.log."""
    text = (folder / "log" / "train.log").read_text()
    found = re.findall(r"\(([\d.]+) s, evaluation ([\d.]+) s\)", text)[1:]
    return [float(total) - float(part) for total, part in found], [float(part) for _, part in found]


def main(argv=None) -> dict:
    args = parse_args(argv)
    times, weights = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("uncached", "cached"):
            train_downstream.main([
                args.config, "--output-dir", f"{folder}/{name}", "--num-workers", "0",
                *(["--device", args.device] if args.device else []), *FIXED, f"training.epochs={args.epochs}",
                "scheduler.warmup_epochs=0", f"training.cache_features={name == 'cached'}",
                f"paths.cache_dir={folder}/cache", *args.overrides])
            times[name] = epoch_times(Path(folder) / name)
            weights[name] = load_checkpoint(f"{folder}/{name}/model/model_last.pth")["model"]
        embedding = re.search(r"embedded in ([\d.]+) s", (Path(folder) / "cached" / "log" / "train.log").read_text())[1]
    same = all(torch.equal(tensor, weights["cached"][key]) for key, tensor in weights["uncached"].items())
    median = {name: [statistics.median(part) for part in parts] for name, parts in times.items()}
    print(f"\n{'seconds per epoch':<22}{'training':>12}{'evaluation':>12}")
    for name, (train, evaluation) in median.items():
        print(f"{name:<22}{train:>12.2f}{evaluation:>12.2f}")
    speedup = sum(median["uncached"]) / max(sum(median["cached"]), 1e-9)
    print(f"{'uncached / cached':<22}{speedup:>12.1f} x\nembedding everything once: {embedding} s; "
          f"final weights identical: {same}; {describe(pick_device(args.device))}")
    return {"speedup": speedup, "identical": same}


if __name__ == "__main__":
    run_main(main)
