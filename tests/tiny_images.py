"""Small labelled pictures and a tiny backbone for tests of whole runs on images."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

import models.unet
from data.images import label_table, open_mask, to_label
from models.dinov3 import ViTConfig
from models.resnet import ENCODERS, BasicBlock, ResNet

TINY = ViTConfig(32, 4, 2, "mlp", 64, taps=(0, 1, 2, 3))       # 4 blocks of 32 channels, patches of 16 pixels
COLORS = np.array([[40, 60, 200], [60, 160, 60], [200, 50, 40]])


def read_mask(path, num_classes: int, ignore_label: int = 255, reduce_zero_label: bool = False) -> np.ndarray:
    """A mask file as labels (H, W), through the steps a data set takes."""
    return to_label(open_mask(path), label_table(num_classes, ignore_label, reduce_zero_label), path)


def tiny_picture(seed: int, size: tuple[int, int] = (64, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Sky above ground with a red box: image (H, W, 3) uint8 with some noise, label (H, W) uint8 of 0, 1, 2 and 255 along the horizon."""
    rng, (height, width) = np.random.default_rng(seed), size
    label = np.zeros(size, np.uint8)
    horizon = rng.integers(height // 3, 2 * height // 3)
    label[horizon:] = 1
    top, left = rng.integers(2, height // 2), rng.integers(2, width // 2)
    label[top:top + height // 3, left:left + width // 3] = 2
    image = np.clip(COLORS[label] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    label[horizon - 1][label[horizon - 1] != 2] = 255
    return image, label


def write_pictures(folder: Path, count: int, first_seed: int = 0, size: tuple[int, int] = (64, 64)) -> Path:
    """folder/images/NAME.png and folder/masks/NAME.png; returns folder."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + count):
        image, label = tiny_picture(seed, size)
        Image.fromarray(image).save(folder / "images" / f"picture_{seed:03d}.png")
        Image.fromarray(label).save(folder / "masks" / f"picture_{seed:03d}.png")
    return folder


def write_classes(path: Path) -> Path:
    path.write_text(json.dumps({"classes": ["sky", "ground", "box"], "palette": COLORS.tolist(), "ignore_index": 255}))
    return path


def shrink_unet(monkeypatch) -> None:
    """model.backbone resnet18 becomes a small network of that name, with a small decoder."""
    monkeypatch.setitem(ENCODERS, "resnet18", lambda in_channels=3: ResNet(BasicBlock, (1, 1, 1, 1), in_channels, width=8))
    monkeypatch.setattr(models.unet, "DECODER_CHANNELS", (32, 16, 16, 8, 8))
