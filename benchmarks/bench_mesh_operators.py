"""Time and memory of DiffusionNet's operators, and of its network on them, from 750 to 250,000 vertices.

    OMP_NUM_THREADS=1 python benchmarks/bench_mesh_operators.py               # all sizes; three minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/bench_mesh_operators.py --vertices 60000 --eigenpairs 64

The mesh is a bumpy torus. Times are processor seconds. Every size runs in a process of its own, so that its largest
resident memory is its own.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import mesh_operators as operators_module  # noqa: E402
from data.mesh_operators import NUM_EIGENPAIRS, mesh_operators, plain_signature  # noqa: E402
from models.diffusion_net import DiffusionNet  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import describe, pick_device  # noqa: E402
from utils.surface_operators import Operators  # noqa: E402

SIZES = (750, 5_000, 20_000, 60_000, 250_000)
TRAINED_UP_TO = 60_000              # vertices; a training step beyond that takes 14 GiB


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--vertices", type=int, help="only about that many; default: all sizes, one after another")
    parser.add_argument("--eigenpairs", type=int, default=NUM_EIGENPAIRS)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def bumpy_torus(num_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """vertices (V, 3), faces (2V, 3): a closed surface of one part, V close to num_vertices and never above it."""
    n = int(np.sqrt(num_vertices / 3))
    m = num_vertices // n
    u, v = np.meshgrid(np.arange(m) * 2 * np.pi / m, np.arange(n) * 2 * np.pi / n, indexing="ij")
    r = 0.3 * (1 + 0.2 * np.sin(3 * u + 1) + 0.1 * np.cos(2 * v + u))
    vertices = np.stack([(1 + r * np.cos(v)) * np.cos(u), (1 + r * np.cos(v)) * np.sin(u), r * np.sin(v)], axis=-1)
    vertices = vertices.reshape(-1, 3) + np.random.default_rng(0).normal(size=(m * n, 3)) * 0.1 / m
    i, j = (a.ravel() for a in np.meshgrid(np.arange(m), np.arange(n), indexing="ij"))
    a, b = i * n + j, (i + 1) % m * n + j
    c, d = (i + 1) % m * n + (j + 1) % n, i * n + (j + 1) % n
    return vertices, np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])


def seconds(function, *arguments):
    started = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - started


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(num_vertices: int, num_eigenpairs: int) -> str:
    vertices, faces = bumpy_torus(num_vertices)
    solver = {"seconds": 0.0}

    def timed(*arguments):
        result, solver["seconds"] = seconds(solve, *arguments)
        return result

    solve, operators_module.eigenpairs = operators_module.eigenpairs, timed
    operators, total = seconds(mesh_operators, vertices, faces, num_eigenpairs)
    memory = peak_gib()
    signature, signature_seconds = seconds(plain_signature, operators.eigenvalues, operators.eigenvectors)
    tensors = Operators(*(torch.from_numpy(getattr(operators, name)) for name in Operators._fields))
    features, faces = torch.from_numpy(signature), torch.from_numpy(faces)
    network = DiffusionNet(signature.shape[1], 8)

    def infer():
        with torch.no_grad():
            network.eval()(features, tensors, "faces", faces)

    def step():
        network.train()(features, tensors, "faces", faces).square().mean().backward()

    _, inference = seconds(infer)
    training = f"{seconds(step)[1]:9.2f}" if len(vertices) <= TRAINED_UP_TO else f"{'-':>9}"
    size = sum(value.nbytes for value in operators[:-1]) / 2**20
    note = f"\n    {operators.note}" if operators.note else ""
    rest = total - solver["seconds"]
    return (f"{len(vertices):9,} {len(operators.eigenvalues):5} {solver['seconds']:8.2f} {rest:7.2f} "
            f"{signature_seconds:7.3f} {inference:9.2f} {training} {memory:8.2f} {peak_gib():8.2f} {size:7.1f}{note}")


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.vertices:
        print(measure(args.vertices, args.eigenpairs), flush=True)
        return {}
    print(f"{describe(pick_device('cpu'))}; processor seconds, GiB of the process (0.25 torch), MiB in the cache\n"
          f" vertices pairs  eigsolv    rest   sign. inference train.step operators      all   cache", flush=True)
    for size in SIZES:
        subprocess.run([sys.executable, __file__, "--vertices", str(size), "--eigenpairs", str(args.eigenpairs)],
                       check=True)
    return {}


if __name__ == "__main__":
    run_main(main)
