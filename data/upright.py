"""Which way is up in a file: meshes and clouds are looked at with z up."""

from __future__ import annotations

import numpy as np

UP = ("auto", "z", "y")                     # data.up: the files' up axis; auto: y in a .glb, as glTF has it, else z


def z_up(vectors: np.ndarray) -> np.ndarray:
    """Points or directions (N, 3) of a file whose y points up, turned about x; of the same type."""
    return np.ascontiguousarray(vectors[:, [0, 2, 1]] * np.array((1, -1, 1), vectors.dtype))
