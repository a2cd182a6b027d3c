"""What the tests of the scripts train_*_head.py and train_eomt.py share: pictures, a tiny backbone, small heads, runs and their scores."""

from pathlib import Path

import torch

import evaluate
import models.dinov3 as dinov3
from tests.tiny_images import TINY, write_classes, write_pictures
from utils.checkpoint import load_checkpoint

SMALL = {"train_m2f_head": ["--hidden-dim", "32", "--ffn-dim", "64", "--num-queries", "8", "--num-points", "256"],
         "train_upernet_head": ["--hidden-dim", "16"], "train_linear_head": [],
         "train_pmt_head": ["--num-queries", "8", "--num-points", "256"],
         "train_eomt": ["--joint-blocks", "2", "--num-queries", "8", "--num-points", "256", "--lr", "0.003"]}


def add_tiny_backbone(patch) -> None:
    """`--backbone tiny` is known while `patch`, pytest's monkeypatch, lasts."""
    patch.setitem(dinov3.BACKBONES, "dinov3_tiny", TINY)


def write_data(folder: Path) -> Path:
    write_pictures(folder / "train", 6)
    write_pictures(folder / "val", 2, first_seed=100, size=(70, 93))
    write_pictures(folder / "test", 2, first_seed=200, size=(48, 50))
    write_classes(folder / "classes.json")
    return folder


def write_backbone(path: Path) -> str:
    """The tiny backbone as a file with the official names."""
    torch.manual_seed(3)
    torch.save(dinov3.VisionTransformer(TINY).state_dict(), path)
    return str(path)


def flags(script, data, output, *more):
    return ["--image-paths", f"{data}/train/images/*.png", "--mask-paths", f"{data}/train/masks", "--num-classes", "3",
            "--classes", f"{data}/classes.json", "--backbone", "tiny", "--backbone-weights", "random", "--image-size", "64",
            "--batch-size", "2", "--epochs", "2", "--log-interval", "1", "--num-workers", "0", "--device", "cpu", "--cache-dir",
            f"{data}/cache", "--output-dir", str(output), *SMALL[script.__name__], *map(str, more)]


def val(data):
    return ["--validate", "--val-image-paths", f"{data}/val/images", "--val-mask-paths", f"{data}/val/masks"]


def train(script, data, output, *more):
    return script.main(flags(script, data, output, *more))


def weights(output, name="model_last.pth"):
    return load_checkpoint(Path(output) / "model" / name)


def score(output, folder, *more):
    """evaluate.py on the last checkpoint of the run `output`, with folder/images and folder/masks; files go to output/scores."""
    return evaluate.main([f"{output}/model/model_last.pth", "--data-dir", f"{folder}/images", "--label-dir", f"{folder}/masks", "--device",
                          "cpu", "--output-dir", f"{output}/scores", *more])
