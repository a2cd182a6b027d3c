"""Randomness that can be repeated: seeds, seeds derived from seeds, saving and restoring the state of generators."""

import hashlib
import operator
import os
import random
from typing import Any

import numpy as np
import torch

NUMPY_SEEDS = 2**32         # NumPy's legacy generator takes 32 bits


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, torch and all CUDA devices with `seed`, 0 <= seed < 2**63; ValueError otherwise.

    deterministic: refuse operations that are not (RuntimeError names the operation) and let cuDNN choose only
    deterministic kernels; slower. PyTorch promises equal results on one machine and version only.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed}")
    seed = operator.index(seed)                                # Python's generator refuses NumPy's integers
    random.seed(seed)
    np.random.seed(seed % NUMPY_SEEDS)
    torch.manual_seed(seed)                                    # also seeds every CUDA device
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # torch refuses cuBLAS without it
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)


def rng_state(generator: torch.Generator | None = None) -> dict[str, Any]:
    """State of this process's generators, and of `generator` (the loader's), in plain types and tensors.

    torch.load(weights_only=True) reads it, which refuses NumPy's own state. With several processes each has its own.
    """
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": {"name": str(name), "keys": torch.from_numpy(keys.astype(np.int64)), "position": int(position),
                  "has_gauss": int(has_gauss), "cached_gaussian": float(cached)},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "generator": None if generator is None else generator.get_state(),
    }


def set_rng_state(state: dict[str, Any], generator: torch.Generator | None = None) -> None:
    """Restore what rng_state returned, also after the state was moved to another device by a checkpoint's map_location.

    CUDA states are restored for the devices that exist here. ValueError where `state` is not such a state, or holds
    none for a given `generator`.
    """
    missing = [key for key in ("python", "numpy", "torch", "cuda", "generator") if key not in state]
    if missing:
        raise ValueError(f"random state lacks {', '.join(missing)}; the checkpoint is not from this version")
    if generator is not None and state["generator"] is None:
        raise ValueError("random state has none for the loader's generator; it was saved without one")
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"]))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for index, cuda_state in enumerate(state["cuda"][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), index)
    if generator is not None:
        generator.set_state(state["generator"].cpu())


def derived_seed(*integers: int) -> int:
    """Mix integers into one seed in [0, 2**63), the same on every machine and in every process.

    derived_seed(seed, epoch, index) makes a sample's augmentation depend on nothing else: not on the number of
    workers or processes, not on what was drawn before. BLAKE2b of the decimal text: order matters, (1, 23) != (12, 3).
    """
    if not integers:
        raise ValueError("derived_seed needs at least one integer")
    text = ",".join(str(operator.index(value)) for value in integers)    # NumPy integers too; TypeError for a float
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_worker(worker_id: int) -> None:
    """DataLoader's worker_init_fn: Python and NumPy follow the worker's torch seed; one thread per worker; and a
    process group of its own: a signal to the group of the main process (torchrun sends it so) is not for the workers,
    with which the main process finishes its step before it saves."""
    seed = torch.initial_seed()                                # the loader's base seed + worker_id
    random.seed(seed)
    np.random.seed(seed % NUMPY_SEEDS)
    torch.set_num_threads(1)                                   # or each worker starts a pool as large as the machine
    if torch.utils.data.get_worker_info() is not None and hasattr(os, "setpgid"):
        os.setpgid(0, 0)
