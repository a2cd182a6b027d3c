"""Labelled meshes small enough for tests of whole training runs: bumpy spheres whose label is where a face lies."""

from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

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


def write_textured_set(folder: Path, count: int, first_seed: int = 0) -> Path:
    """As write_set, but the label of a face is a coin's fall, and the face's picture shows it: noise in red, or in blue."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(first_seed + i)
        vertices, faces, _ = tiny_mesh(first_seed + i)
        label = rng.integers(0, 2, len(faces))
        for c, name in enumerate(("red", "blue")):
            picture = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            picture[..., 2 * c] += 120
            Image.fromarray(picture).save(folder / f"{name}_{i:02d}.png")
        (folder / f"mesh_{i:02d}.mtl").write_text("".join(f"newmtl {n}\nmap_Kd {n}_{i:02d}.png\n" for n in ("red", "blue")))
        write_obj(folder / f"mesh_{i:02d}.obj", vertices, faces[:0])
        with open(folder / f"mesh_{i:02d}.obj", "a") as file:
            file.write(f"mtllib mesh_{i:02d}.mtl\n" + "".join(f"vt {u:.4f} {v:.4f}\n" for u, v in rng.uniform(-3, 3, (9, 2))))
            for (a, b, c), which in zip(faces + 1, label, strict=True):
                s, t, u = rng.integers(1, 10, 3)
                file.write(f"usemtl {('red', 'blue')[which]}\nf {a}/{s} {b}/{t} {c}/{u}\n")
        (folder / f"mesh_{i:02d}.txt").write_text("\n".join(map(str, label)) + "\n")
    return folder
