"""Predictions on meshes as files: labels in file order, coloured meshes, a page to turn them in."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.mesh_io import write_glb, write_labels, write_ply
from utils.files import move_results
from utils.viewer import viewer_html


def write_mesh_result(stem: Path, prediction: Mapping, colors: Mapping[str, np.ndarray], labels: str = "txt",
                      picture: str = "ply", html: bool = False, legend: Sequence = (), up: str = "auto") -> list[Path]:
    """Write STEM.txt (or .npy) and, for each ending in colors ("" for the classes, "_pca" ...), STEM + ending .ply or
    .glb, and .html. Returns the paths.

    prediction: label (P,) one a face line of the input, vertices (V, 3), faces (F, 3), face_label (F,). colors
    {ending: (F, 3) uint8}. picture ply | glb | none. legend, of the page of the classes, and up: see viewer_html.
    """
    vertices, faces = prediction["vertices"], prediction["faces"]
    with tempfile.TemporaryDirectory(prefix=".writing_", dir=stem.parent) as folder:     # whole files, or none
        written = [Path(folder, f"{stem.name}.{labels}")]                        # not with_suffix: names may have dots
        write_labels(written[0], prediction["label"])
        for ending, color in colors.items():
            if picture == "ply":
                written.append(Path(folder, f"{stem.name}{ending}.ply"))
                write_ply(written[-1], vertices, faces, color,
                          None if ending else prediction["face_label"])
            elif picture == "glb":
                written.append(Path(folder, f"{stem.name}{ending}.glb"))
                write_glb(written[-1], vertices, faces, color)
            if html:
                written.append(Path(folder, f"{stem.name}{ending}.html"))
                page = viewer_html(vertices, faces, color, f"{stem.name}{ending}", () if ending else legend, up)
                written[-1].write_text(page, encoding="utf-8", errors="replace")          # names may not be UTF-8
        return move_results(written, stem.parent)
