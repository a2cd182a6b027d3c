"""The device, its number format, and a record of both."""

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from utils.checks import check_choice

AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pillow", "trimesh", "tqdm", "pyyaml", "tensorboard",
            "safetensors")


def pick_device(name: str | None = None) -> torch.device:
    """'cpu', 'cuda', 'cuda:1' or 'mps' -> device; None takes CUDA where there is one, else MPS, else the CPU.

    ValueError in one line for an unknown name or a device that this machine, or this build of PyTorch, does not have.
    """
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    check_choice("--device", kind, ("cpu", "cuda", "mps"))
    if index and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(f"--device: {name!r} is not a device; expected cpu, cuda, cuda:0, cuda:1, ... or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no usable GPU or driver found"
        raise ValueError(f"--device: {name} is not available ({why}); use --device cpu or leave it out")
    count = torch.cuda.device_count()
    if kind == "cuda" and index and int(index) >= count:
        raise ValueError(f"--device: there is no {name}; this machine has cuda:0 to cuda:{count - 1}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device: mps is not available on this machine; use --device cpu or leave it out")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def amp_settings(device: torch.device, amp_dtype: str | None = None) -> tuple[torch.dtype | None, torch.amp.GradScaler]:
    """The autocast dtype (None: plain float32) and a GradScaler, which is enabled for float16 only: one code path.

    amp_dtype: float32 | bfloat16 | float16, or None for bfloat16 on CUDA (where the card computes in it) and float32
    elsewhere; float16 is never the default, because it overflows. ValueError for another name.
    """
    if amp_dtype is None:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp_dtype = "bfloat16" if native else "float32"
    dtype = AMP_DTYPES[check_choice("--amp-dtype", amp_dtype, AMP_DTYPES)]
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """torch.autocast for `dtype`, or a context that does nothing for None. May be entered again and again."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@functools.cache
def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it, such as Apple's (MPS)."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except TypeError:                                       # "Cannot convert a MPS Tensor to float64 dtype ..."
        return torch.float32
    return torch.float64


def trim_memory() -> None:
    """Give free memory of the C library back to the system, where it is glibc's: tensors of ever different sizes, as
    point clouds make them, leave holes in its heap, which grows from step to step. Milliseconds."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def describe(device: torch.device) -> str:
    """One line for the log: 'cuda: NVIDIA H200, 139.8 GiB, CUDA 12.8' or 'cpu: Intel Xeon, 8 of 16 threads'."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    return f"{device}: {_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def environment() -> dict[str, Any]:
    """What a run depended on, as JSON types: versions, git commit, whether files differ from it, machine, command."""
    cuda = torch.cuda.is_available()
    commit = _git("rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "processor": _processor(),
        "platform": platform.platform(),
        "num_threads": torch.get_num_threads(),
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in this repository; None without git or outside a repository (an unpacked archive)."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
