"""Predictions on meshes as files: labels in file order, coloured meshes, a page to turn them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.mesh_io import write_glb, write_labels, write_ply
from utils.files import Together
from utils.viewer import viewer_html


def write_mesh_result(stem: Path, prediction: Mapping, colors: Mapping[str, np.ndarray], labels: str = "txt",
                      picture: str = "ply", html: bool = False, legend: Sequence = (), up: str = "auto") -> list[Path]:
    """Write STEM.txt (or .npy) and, for each ending in colors ("" for the classes, "_pca" ...), STEM + ending .ply or
    .glb, and .html. Returns the paths.

    prediction: label (P,) one a face line of the input, vertices (V, 3), faces (F, 3), face_label (F,). colors
    {ending: (F, 3) uint8}. picture ply | glb | none. legend, of the page of the classes, and up: see viewer_html.
    """
    vertices, faces = prediction["vertices"], prediction["faces"]
    with Together(stem) as files:
        write_labels(files.new(f".{labels}"), prediction["label"])
        for ending, color in colors.items():
            if picture == "ply":
                write_ply(files.new(f"{ending}.ply"), vertices, faces, color,
                          None if ending else prediction["face_label"])
            elif picture == "glb":
                write_glb(files.new(f"{ending}.glb"), vertices, faces, color)
            if html:
                page = viewer_html(vertices, faces, color, f"{stem.name}{ending}", () if ending else legend, up)
                files.new(f"{ending}.html").write_text(page, encoding="utf-8", errors="replace")     # of the name
    return files.paths
