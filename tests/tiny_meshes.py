"""Labelled meshes small enough for tests of whole training runs: bumpy spheres whose label is where a face lies."""

from pathlib import Path

import numpy as np
import trimesh

CLASSES = ["low", "high", "cap"]


def tiny_mesh(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """vertices (V, 3), faces (80..320, 3), label (F,): 0 below the middle, 1 above it, 2 close to the pole."""
    rng = np.random.default_rng(seed)
    sphere = trimesh.creation.icosphere(subdivisions=int(rng.integers(1, 3)))
    vertices = sphere.vertices * rng.uniform(0.8, 1.2, 3) * (1 + 0.05 * rng.normal(size=(len(sphere.vertices), 1)))
    height = vertices[sphere.faces].mean(1)[:, 2] / vertices[:, 2].max()
    return vertices, np.array(sphere.faces), (height > 0).astype(int) + (height > 0.6)


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    path.write_text("".join(f"v {x:.9g} {y:.9g} {z:.9g}\n" for x, y, z in vertices)
                    + "".join(f"f {a} {b} {c}\n" for a, b, c in faces + 1))


def write_set(folder: Path, count: int, first_seed: int = 0) -> Path:
    """folder/mesh_00.obj + .txt ..., returns folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        vertices, faces, label = tiny_mesh(first_seed + i)
        write_obj(folder / f"mesh_{i:02d}.obj", vertices, faces)
        (folder / f"mesh_{i:02d}.txt").write_text("\n".join(map(str, label)) + "\n")
    return folder
