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
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.checks import check_choice

AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names in /proc/cpuinfo of what computes in bfloat16: Intel, AMD; ARM.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
NARROW = 32                     # pixels: where the coarsest maps are a single column
SLOWER = 1.2                    # from how many times the time of float32 on a warning is due
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pillow", "trimesh", "tqdm", "pyyaml", "tensorboard",
            "safetensors")


def pick_device(name: str | None = None) -> torch.device:
    """'cpu', 'cuda', 'cuda:1' or 'mps' -> device; None takes CUDA where there is one, else MPS, else the CPU.

    A CUDA device with a number becomes the current one, on which PyTorch puts what names none. ValueError in one line
    for an unknown name or a device that this machine, or this build of PyTorch, does not have.
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
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))
    return torch.device(kind, int(index)) if index else torch.device(kind)


def amp_settings(device: torch.device, amp_dtype: str | None = None,
                 checkpoint: Mapping | None = None) -> tuple[torch.dtype | None, torch.amp.GradScaler]:
    """The autocast dtype (None: plain float32) and a GradScaler, which is enabled for float16 only: one code path.

    amp_dtype: float32 | bfloat16 | float16; native: bfloat16 where the device computes in it, else float32, and float32
    for the checkpoint of a CPU that was in another format, or did not note it; None: native on CUDA, float32 elsewhere;
    float16 is never the default, because it overflows. float32 is that, and not TF32: PyTorch's default for
    convolutions on CUDA is switched off. ValueError for another name.
    """
    if amp_dtype is None:
        amp_dtype = "native" if device.type == "cuda" else "float32"
    if amp_dtype == "native":
        as_before = device.type == "cuda" or checkpoint is None or checkpoint.get("amp_dtype") == str(torch.bfloat16)
        amp_dtype = "bfloat16" if as_before and native_bfloat16(device) else "float32"
    dtype = AMP_DTYPES[check_choice("--amp-dtype", amp_dtype, AMP_DTYPES)]
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = dtype is not None
    return dtype, torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, instead of turning every number into float32 and back."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and not BFLOAT16_FLAGS.isdisjoint(_processor_flags())


def slow_dtype(device: torch.device, dtype: torch.dtype | None) -> list[str]:
    """A line of warning where bfloat16 was asked for on a CPU that does not compute in it and is slower so, measured
    here, in tenths of a second; else none."""
    if device.type != "cpu" or dtype is not torch.bfloat16 or native_bfloat16(device):
        return []
    ratio = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
    if ratio < SLOWER:
        return []
    return [f"WARNING: this processor does not compute in bfloat16 (none of {', '.join(sorted(BFLOAT16_FLAGS))} in "
            f"/proc/cpuinfo): a product of matrices just took {ratio:.1f} times as long as in float32; use float32"]


def product_seconds(dtype: torch.dtype, side: int = 512, repeats: int = 3) -> float:
    """The least time of a product of two matrices."""
    matrix = torch.ones(side, side, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):                            # the first warms up
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def autocast(device: torch.device, dtype: torch.dtype | None,
             width: int | None = None) -> contextlib.AbstractContextManager:
    """torch.autocast for `dtype`, or a context that does nothing for None. May be entered again and again, except with
    width, of the images that go through: a strided convolution in bfloat16 whose output is a single column reads
    memory that nobody wrote in oneDNN 3.12 (PyTorch 2.13) on CPUs with AMX. Narrow images go without oneDNN."""
    if dtype is None:
        return contextlib.nullcontext()
    cast = torch.autocast(device.type, dtype=dtype)
    narrow = width is not None and width <= NARROW and device.type == "cpu" and dtype is torch.bfloat16
    return _without_onednn(cast) if narrow else cast


@contextlib.contextmanager
def _without_onednn(cast):
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        with cast:
            yield
    finally:
        torch.backends.mkldnn.enabled = before


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
        "packages": {**{name: _version(name) for name in PACKAGES}, "torch": str(torch.__version__)},
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


def _cpuinfo(*fields: str) -> list[str]:
    """The values of these fields in /proc/cpuinfo, of all cores; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in fields]


def _processor_flags() -> set[str]:
    flags = _cpuinfo("flags", "Features")                   # x86; ARM
    return set(flags[0].split()) if flags else set()


def _processor() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()
