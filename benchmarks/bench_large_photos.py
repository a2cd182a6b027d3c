"""Peak memory and time of predict.py and evaluate.py on photographs of 1 to 300 million pixels, with a tiny network.

    python benchmarks/bench_large_photos.py                     # 1, 16, 100 and 300 MP, PNG and, with rasterio, GeoTIFF
    python benchmarks/bench_large_photos.py --megapixels 1 16 --suffixes png

A DeepLab v2 of 4 channels is trained for one step, and photographs are labelled at their own size in windows of 512
pixels side by side: 19 classes in predict.py with --confidence, 150 in evaluate.py on 16 MP. Memory is the largest
resident set of the whole process, of which Python, PyTorch and the network have what the row of 1 MP shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.image_files import write_rows  # noqa: E402
from data.rasters import library  # noqa: E402
from utils.cli import ArgumentParser  # noqa: E402

TILE = 500


def write_photo(path: Path, width: int, height: int) -> Path:
    """A made-up photograph: a tile of coloured squares with noise, over and over."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (10, 10, 3)).repeat(TILE // 10, 0).repeat(TILE // 10, 1)
    tile = (squares + rng.normal(0, 8, squares.shape)).clip(0, 255).astype(np.uint8)
    row = np.tile(tile, (1, -(-width // TILE), 1))[:, :width]
    write_rows(path, (row[:min(TILE, height - top)] for top in range(0, height, TILE)), (width, height), bands=3)
    return path


def write_mask(path: Path, width: int, height: int, num_classes: int) -> None:
    values = (np.arange(height)[:, None] // 40 + np.arange(width) // 40) % num_classes
    Image.fromarray(values.astype(np.uint8)).save(path)


def train(folder: Path, num_classes: int) -> Path:
    """The checkpoint of one step."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        write_photo(folder / "images" / split / "a.png", 512, 512)
        write_mask(folder / "masks" / split / "a.png", 512, 512, num_classes)
    config = {"dataset": {"root": str(folder), "num_classes": num_classes, "image_size": 512, "cache_dir": None},
              "model": {"name": "deeplab_v2", "n_blocks": [1, 1, 1, 1], "base_width": 4},
              "training": {"epochs": 1, "batch_size": 1, "num_workers": 0}, "logging": {"tensorboard": False},
              "evaluation": {"mode": "slide", "size": 0, "stride": 512}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run([ROOT / "train_segmentation.py", folder / "config.yaml", "--device", "cpu", "--output-dir", folder / "run"])
    return folder / "run" / "model" / "model_last.pth"


def run(command: list) -> tuple[float, float]:
    """(GiB of the largest resident set, seconds) of a Python command. RuntimeError if it fails."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(errors.decode()[-2000:])
    return usage.ru_maxrss / 2 ** 20, time.monotonic() - started


def main(argv=None) -> list[tuple]:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--megapixels", type=int, nargs="+", default=[1, 16, 100, 300])
    parser.add_argument("--suffixes", nargs="+", choices=("png", "tif"),
                        default=["png", "tif"] if library() else ["png"])
    parser.add_argument("--eval-megapixels", type=int, default=16, help="0: evaluate.py is left out")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        folder = Path(name)
        checkpoint = train(folder / "set_19", 19)
        print("| command | file | size | MP | peak GiB | seconds |\n|---|---|---|---|---|---|", flush=True)

        def row(what, suffix, shape, command):
            rows.append((what, suffix, *shape, *run(command)))
            print(f"| {what} | {suffix} | {shape[0]:,} x {shape[1]:,} | {shape[0] * shape[1] / 1e6:.0f} | "
                  f"{rows[-1][-2]:.2f} | {rows[-1][-1]:.0f} |", flush=True)
        for suffix in args.suffixes:
            for megapixels in args.megapixels:
                height = round((megapixels * 750_000) ** 0.5)
                shape = (round(megapixels * 1e6 / height), height)      # 4 : 3; 300 MP are 20,000 x 15,000
                photo = write_photo(folder / f"photo.{suffix}", *shape)
                row("predict.py, 19 classes", suffix, shape, [ROOT / "predict.py", checkpoint, photo, "--output",
                                                              folder / "out", "--device", "cpu", "--confidence"])
        if args.eval_megapixels:
            side = round((args.eval_megapixels * 1e6) ** 0.5)
            for kind in ("images", "masks"):
                (folder / kind).mkdir()
            write_photo(folder / "images" / "a.png", side, side)
            write_mask(folder / "masks" / "a.png", side, side, 150)
            checkpoint = train(folder / "set_150", 150)
            for batch_size in ("1", "4"):
                row(f"evaluate.py --batch-size {batch_size}, 150 classes", "png", (side, side), [
                    ROOT / "evaluate.py", checkpoint, "--data-dir", folder / "images", "--label-dir", folder / "masks",
                    "--device", "cpu", "--output-dir", folder / "scores", "--batch-size", batch_size])
    return rows


if __name__ == "__main__":
    main()
