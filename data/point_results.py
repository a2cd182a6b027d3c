"""Predictions on point clouds as files and pictures: labels in file order, coloured clouds, a view for the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data.point_files import write_ply
from utils.files import Together

GREY = np.array([[200, 200, 200]], np.uint8)            # of points without a label
SUPERSAMPLE = 2


def write_point_result(stem: Path, prediction: Mapping, colors: Mapping[str, np.ndarray], labels: str = "npy",
                       picture: str = "ply") -> list[Path]:
    """Write STEM.npy (int16, or int32 for larger numbers) or STEM.txt, one label a point in file order, and for each
    ending in colors ("" for the classes, "_pca" ...) the cloud as STEM + ending .ply unless picture is "none". Returns
    the paths.

    prediction: label (R,) and coord (R, 3); colors {ending: (R, 3) uint8}.
    """
    with Together(stem) as files:
        path = files.new(f".{labels}")
        if labels == "npy":
            large = np.abs(prediction["label"]).max(initial=0) > np.iinfo(np.int16).max
            np.save(path, prediction["label"].astype(np.int32 if large else np.int16))
        else:
            np.savetxt(path, prediction["label"], fmt="%d")
        for ending, color in colors.items() if picture == "ply" else ():
            write_ply(files.new(f"{ending}.ply"), prediction["coord"], color, None if ending else prediction["label"])
    return files.paths


def render_points(coord: np.ndarray, color: np.ndarray, size: int = 360, azimuth: float = 35.0,
                  elevation: float = 40.0) -> Image.Image:
    """Picture of a cloud with z up: coord (R, 3), color (R, 3) uint8; nearer points cover farther ones, no perspective.

    azimuth and elevation of the camera in degrees. A point is as wide as the mean distance of neighbours looks.
    """
    side = size * SUPERSAMPLE
    canvas = np.full((side, side, 3), 255, np.uint8)
    turn, tilt = np.radians([azimuth, elevation])
    right = np.array([np.cos(turn), np.sin(turn), 0])
    forward = np.array([-np.sin(turn) * np.cos(tilt), np.cos(turn) * np.cos(tilt), -np.sin(tilt)])
    up = np.cross(right, forward)
    flat = coord.astype(np.float64) @ np.stack([right, -up, forward]).T                   # (R, 3): x, y down, depth
    low, high = flat.min(0), flat.max(0)
    scale = 0.94 * side / max(*(high - low)[:2], 1e-9)
    pixel = (flat - (low + high) / 2)[:, :2] * scale + side / 2
    covered = (high - low)[:2].prod() * scale ** 2
    width = int(np.clip(np.ceil(np.sqrt(covered / len(coord))), 1, side // 16))
    order = np.argsort(-flat[:, 2], kind="stable")                                        # far to near
    corner = (pixel[order] - width / 2).astype(int)
    for dy in range(width):                             # of equal indices NumPy keeps the last: the nearest point
        for dx in range(width):
            x, y = (corner + [dx, dy]).T
            inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
            canvas[y[inside], x[inside]] = color[order][inside]
    return Image.fromarray(canvas).resize((size, size), Image.Resampling.BOX)


def example_clouds(cloud: Mapping, pred: np.ndarray, palette: np.ndarray) -> tuple[Image.Image | None, Image.Image]:
    """Two pictures for a report: the truth (None without labels) and the prediction (R,) of a raw cloud."""
    colors = np.concatenate([palette, GREY])
    label = cloud.get("label")
    labelled = label is not None and (label >= 0).any()
    truth = render_points(cloud["coord"], colors[np.where(label >= 0, label, len(palette))]) if labelled else None
    return truth, render_points(cloud["coord"], colors[pred])
