"""Small labelled clouds and a tiny Point Transformer for tests of whole runs on point clouds."""

import json
from pathlib import Path

import numpy as np
import torch
import yaml

from data.point_files import write_cloud, write_ply
from models.point_transformer import build_point_transformer

COLORS = np.array([[150, 140, 120], [40, 60, 200], [220, 60, 40]])
ENCODER = {"in_channels": 9, "order": ["z", "z-trans", "hilbert", "hilbert-trans"], "enc_depths": [1, 1, 1],
           "enc_channels": [16, 32, 48], "enc_num_head": [1, 2, 3], "enc_patch_size": [64, 64, 64], "dec_depths": [1, 1],
           "dec_channels": [16, 32], "dec_num_head": [1, 2], "dec_patch_size": [64, 64], "drop_path": 0.1}
UTONIA = {"enc_channels": [18, 36, 54], "rope_base": 10.0, "jitter_coords": 1.1, "rescale_coords": 1.2}    # changes of ENCODER
STILL = {"dropout": 0.0, "rotation_probability": 0.0, "scale_range": [1.0, 1.0], "flip_probability": 0.0, "jitter": 0.0,
         "elastic_probability": 0.0, "contrast_probability": 0.0, "color_shift_probability": 0.0,
         "color_jitter_probability": 0.0, "mix_probability": 0.0}          # no augmentation at all


def tiny_cloud(seed: int, points: int = 300) -> dict[str, np.ndarray]:
    """A floor of 1 m x 1 m (0) with a box (1) and a ball (2): coord (N, 3), color (N, 3) uint8, normal (N, 3), segment (N,) with
    some points of no class (-1). Colours and heights overlap a little."""
    rng = np.random.default_rng(seed)
    segment = rng.permutation(np.repeat([0, 1, 2], [points - 2 * (points // 4), points // 4, points // 4]))
    floor = np.c_[rng.random((points, 2)), rng.normal(0, 0.005, points)]
    sphere = rng.normal(size=(points, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    box = sphere / np.abs(sphere).max(1, keepdims=True)
    left = rng.random() < 0.5                                              # of the two, which stands at the lower x
    coord = np.choose(segment[:, None], [floor, box * 0.12 + [0.25 if left else 0.75, 0.3, 0.14],
                                         sphere * 0.15 + [0.75 if left else 0.25, 0.7, 0.16]])
    normal = np.choose(segment[:, None], [np.tile([0.0, 0, 1], (points, 1)), (np.abs(box) == 1) * box, sphere])
    color = np.clip(COLORS[segment] + rng.normal(0, 25, (points, 3)), 0, 255).astype(np.uint8)
    segment[:5] = -1
    return {"coord": coord.astype(np.float32), "color": color,
            "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32), "segment": segment}


def write_clouds(folder: Path, count: int, first_seed: int = 0, points: int = 300) -> Path:
    """folder/cloud_NNN.npz; returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + count):
        np.savez(folder / f"cloud_{seed:03d}.npz", **tiny_cloud(seed, points + 7 * (seed % 5)))
    return folder


def write_every_format(folder: Path) -> dict[str, dict]:
    """folder/{plain.npz, matrix.npy, scan.ply, scene0001_00/*.npy}, the last as Pointcept has it -> {name: the cloud's arrays}."""
    clouds = {name: tiny_cloud(seed, 200 + seed) for seed, name in enumerate(("plain.npz", "matrix.npy", "scan.ply", "scene0001_00"))}
    folder.mkdir(parents=True)
    np.savez(folder / "plain.npz", **clouds["plain.npz"])
    np.save(folder / "matrix.npy", np.hstack([clouds["matrix.npy"][name] for name in ("coord", "color", "normal")]))
    write_ply(folder / "scan.ply", clouds["scan.ply"]["coord"], clouds["scan.ply"]["color"])
    scene = clouds["scene0001_00"]
    write_cloud(folder / "scene0001_00", coord=scene["coord"], color=scene["color"], normal=scene["normal"], segment20=scene["segment"])
    return clouds


def write_classes(root: Path, names=("floor", "box", "ball")) -> Path:
    palette = np.resize(COLORS, (len(names), 3)).tolist()
    (root / "classes.json").write_text(json.dumps({"classes": list(names), "palette": palette, "ignore_index": -1}))
    return root


def write_config(path: Path, root: Path, **sections) -> str:
    """A config of a few steps on the clouds of `root`; sections as in train_sonata.DEFAULTS replace single keys."""
    config = {"data": {"root": str(root), "grid_size": 0.05}, "model": {"mode": "ft", "num_classes": 3, "encoder": ENCODER},
              "training": {"use_pretrained": False, "epochs": 4, "eval_epochs": 2, "batch_size": 3},
              "optimizer": {"lr": 0.004, "block_lr": 0.002}, "evaluation": {"precise": False},
              "augmentation": {"elastic": [[0.2, 0.05]]}, "logging": {"log_interval": 1, "tensorboard": False},
              "paths": {"cache_dir": str(root / "cache")}}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    path.write_text(yaml.safe_dump(config))
    return str(path)


def write_encoder(path: Path, seed: int = 3, **changes) -> str:
    """The tiny encoder as sonata.pth has it: config and state_dict, with a mask token; norms and attention as if trained.
    changes=UTONIA: as utonia.pth, with a rotation, whose frequencies no training changes."""
    config = {key: value for key, value in ENCODER.items() if not key.startswith("dec_")}
    config = {**config, "enc_mode": True, "mask_token": True, **changes}
    torch.manual_seed(seed)
    state = build_point_transformer(config).state_dict()
    state = {name: value if name.endswith("inv_freq") else value + 0.05 * torch.randn_like(value) for name, value in state.items()}
    torch.save({"config": config, "state_dict": state}, path)
    return str(path)
