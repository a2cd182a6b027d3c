"""Time and memory of the mesh path: preparing 1 M faces by stages, their textures, clustering, the encoder from 1.5 k
to 1 M faces.

    python benchmarks/bench_meshes.py                  # all; a few minutes on two cores
    python benchmarks/bench_meshes.py prepare --faces 200000

The mesh is a noisy sphere, written as OBJ. Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.mesh import MeshDataset, MeshSpec, custom_collate_fn  # noqa: E402
from data.mesh_clusters import connected_clusters, recursive_bisection  # noqa: E402
from data.mesh_features import face_features, face_neighbors, normalize_vertices, weld  # noqa: E402
from data.mesh_io import read_mesh  # noqa: E402
from data.mesh_texture import fixed_weights, random_weights, read_pyramid, read_texture, sample_faces  # noqa: E402
from models.nomeformer import Nomeformer  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import describe, pick_device  # noqa: E402

PARTS = ("prepare", "texture", "clusters", "encoder")
FEATURES = ("corners", "normal", "area", "angles", "curvature", "dihedral")
SIZES = ((1_500, 24), (100_000, 256), (1_000_000, 512))            # faces, faces per cluster


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all, one after another")
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--faces-per-cluster", type=int, default=512)
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def noisy_sphere(num_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """vertices (V, 3), faces (num_faces, 3) in random order: a subdivided icosahedron, cut to the number of faces."""
    rng, level = np.random.default_rng(0), int(np.ceil(np.log(num_faces / 20) / np.log(4)))
    mesh = trimesh.creation.icosphere(subdivisions=level)
    upper = np.argsort(mesh.vertices[mesh.faces].mean(1)[:, 2])[-num_faces:]
    faces = np.asarray(mesh.faces)[rng.permutation(upper)]
    return np.asarray(mesh.vertices) * (1 + 1e-4 * rng.normal(size=(len(mesh.vertices), 1))), faces


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    with open(path, "w") as file:
        np.savetxt(file, vertices, "v %.7f %.7f %.7f")
        np.savetxt(file, faces + 1, "f %d %d %d")


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # kilobytes on Linux


def prepare(args) -> None:
    """Every stage from the file to clustered features, then the whole through MeshDataset without and with cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sphere.obj"
        writer = ("from pathlib import Path; from benchmarks.bench_meshes import noisy_sphere, write_obj; "
                  f"write_obj(Path({str(path)!r}), *noisy_sphere({args.faces}))")
        subprocess.run([sys.executable, "-c", writer], check=True, cwd=Path(__file__).resolve().parents[1])
        base, rows = peak_gib(), []

        def stage(name, function, *arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            rows.append((name, time.perf_counter() - start))
            return result

        mesh = stage("read OBJ", read_mesh, path)
        vertices, faces = stage("weld", weld, mesh.vertices, mesh.faces)
        vertices = stage("normalise", normalize_vertices, vertices, faces)
        neighbors = stage("neighbours", face_neighbors, faces)
        features = stage("features", face_features, vertices, faces, FEATURES, neighbors)
        centroid = vertices[faces].mean(1)
        stage("clusters", recursive_bisection, centroid, args.faces_per_cluster)
        total = sum(seconds for _, seconds in rows)
        peak = peak_gib()
        for name, seconds in rows:
            print(f"  {name:<28}{seconds:>8.2f} s")
        print(f"  {'total':<28}{total:>8.2f} s   {len(faces):,} faces, {features.shape[1]} features, peak "
              f"{peak:.2f} GiB (of which {base:.2f} before)")
        spec = MeshSpec(FEATURES, faces_per_cluster=args.faces_per_cluster)
        for name in ("MeshDataset item, cold cache", "MeshDataset item, warm cache"):
            start = time.perf_counter()
            custom_collate_fn([MeshDataset([path], None, spec, views=1, cache_dir=folder)[0]])
            print(f"  {name:<28}{time.perf_counter() - start:>8.2f} s   peak {peak_gib():.2f} GiB")


def texture(args) -> None:
    """Reading the texture coordinates of an OBJ with four pictures, and 32 samples of every face."""
    rng, F = np.random.default_rng(0), args.faces
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "textured.obj"
        uv = (rng.uniform(0, 8, (F, 1, 2)) + rng.uniform(0, 0.05, (F, 3, 2))).reshape(-1, 2)       # 1,300 texels a face
        with open(path, "w") as file:
            file.write("mtllib textured.mtl\n" + "v 0 0 0\n" * 3)
            np.savetxt(file, uv, "vt %.5f %.5f")
            for i, part in enumerate(np.array_split(np.arange(1, 3 * F + 1).reshape(F, 3), 4)):
                file.write(f"usemtl m{i}\n")
                np.savetxt(file, part, "f 1/%d 2/%d 3/%d")
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (1024, 1024, 3), np.uint8)).save(Path(folder) / f"{i}.jpg")
        path.with_suffix(".mtl").write_text("".join(f"newmtl m{i}\nmap_Kd {i}.jpg\n" for i in range(4)))
        found = timed("read OBJ, vt and usemtl", read_texture, path, folder)
        pyramids = timed("4 pictures of 1024 x 1024", lambda: [read_pyramid(m.image, folder) for m in found.materials])
        timed("32 samples a face, fixed", sample_faces, found, pyramids, np.arange(F), fixed_weights(32))
        weights = timed("32 random points a face", random_weights, rng, F, 32)
        timed("32 samples a face, random", sample_faces, found, pyramids, np.arange(F), weights)
        timed("coordinates from the cache", read_texture, path, folder)
        print(f"  {F:,} faces, peak {peak_gib():.2f} GiB")


def timed(name, function, *inputs):
    start, cpu = time.perf_counter(), time.process_time()
    result = function(*inputs)
    print(f"  {name:<28}{time.perf_counter() - start:>8.2f} s{time.process_time() - cpu:>8.2f} s of CPU", flush=True)
    return result


def clusters(args) -> None:
    for num_faces in sorted({100_000, args.faces}):
        vertices, faces = noisy_sphere(num_faces)
        centroid, neighbors = vertices[faces].mean(1), face_neighbors(faces)
        for name, function, inputs in (("bisection", recursive_bisection, (centroid, 400)),
                                       ("connected", connected_clusters, (centroid, neighbors, 400))):
            start = time.perf_counter()
            face_index = function(*inputs)
            seconds = time.perf_counter() - start
            full = (face_index >= 0).sum(1)
            print(f"  {name:<22}{num_faces:>10,} faces{seconds:>8.2f} s   longest / mean cluster "
                  f"{full.max() / full.mean():.2f}")


def encoder(args) -> None:
    """Forward passes of one size without gradient; run once per size."""
    device = pick_device(args.device)
    torch.manual_seed(0)
    N, slots = -(-args.faces // args.faces_per_cluster), args.faces_per_cluster
    model = Nomeformer(26, args.embed_dim, 4, 5).to(device).eval()
    features, centroid = torch.randn(1, N, slots, 26, device=device), torch.rand(1, N, slots, 3, device=device)
    masks = torch.ones(1, N, slots, dtype=torch.bool, device=device)
    before, times = peak_gib(), []
    with torch.no_grad():
        for _ in range(max(2, min(20, 200_000 // args.faces))):
            start = time.perf_counter()
            model(features, masks, centroid).sum().item()
            times.append(time.perf_counter() - start)
    print(f"  {args.faces:>10,} faces, {slots:>3} a cluster{args.faces / min(times):>12,.0f} faces/s   "
          f"{peak_gib() - before:>6.2f} GiB more at the peak")


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.part is not None:
        return {"prepare": prepare, "texture": texture, "clusters": clusters, "encoder": encoder}[args.part](args)
    print(describe(pick_device(args.device)), flush=True)
    for title, part, more in (("Preparing a mesh", "prepare", [[]]), ("Textures of a mesh", "texture", [[]]),
                              ("Clustering, 400 faces a cluster", "clusters", [[]]),
                              ("Encoder forward, 5 blocks, E 64", "encoder",
                               [["--faces", str(faces), "--faces-per-cluster", str(size)] for faces, size in SIZES])):
        print(title, flush=True)
        for extra in more:
            subprocess.run([sys.executable, __file__, part, "--faces", str(args.faces), "--device", args.device,
                            "--embed-dim", str(args.embed_dim), *extra], check=True)


if __name__ == "__main__":
    run_main(main)
