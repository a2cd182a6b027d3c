"""Arrays as large as a photograph, which do not stay in memory: in a temporary file that ends with them."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

import numpy as np

IN_MEMORY = 1 << 27                         # bytes; larger arrays are in files


def scratch_array(shape: Sequence[int], dtype: np.dtype | type) -> np.ndarray:
    """An array of zeros, memory-mapped from an unnamed file in TMPDIR (or /var/tmp, which is on a disk where /tmp may
    be memory) if it is larger than IN_MEMORY. ValueError where the disk has no room for it."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, dtype)
    folder = tempfile.gettempdir() if "TMPDIR" in os.environ or not os.path.isdir("/var/tmp") else "/var/tmp"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)      # a full disk is found here, not by a signal later
            return np.memmap(file, dtype, "w+", shape=tuple(shape))
    except OSError as error:
        raise ValueError(f"{folder}: no room for {size / 2**30:.1f} GiB of temporary files ({error.strerror}); set the "
                         f"environment variable TMPDIR to a folder that has it") from error


def release(*arrays: np.ndarray) -> None:
    """Let go of the memory behind arrays of scratch_array; what is in them stays, and is read from the file again."""
    for array in arrays:
        pages = getattr(array, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
