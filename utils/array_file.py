"""Arrays in .npy files with checksums behind them, for caches: damage is refused or computed again, never used."""

from __future__ import annotations

import tokenize
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

MODULUS = 1 << 64
# What NumPy raises for the header of a damaged file, which it parses as Python.
DAMAGED = (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, SyntaxError, OverflowError, MemoryError,
           tokenize.TokenError, zipfile.BadZipFile)


def checksum(array: np.ndarray) -> int:
    """The sum of an array's bytes as 64-bit words, modulo 2^64: at the speed of memory, and any one changed word shows.
    What was zeroed shows unless it was zero."""
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    words = len(content) // 8 * 8
    rest = int.from_bytes(content[words:].tobytes(), "little")
    return (int(content[:words].view(np.uint64).sum(dtype=np.uint64)) + rest) % MODULUS


def new_array(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A memory-mapped array to be filled, in an empty file that is open for reading and writing; see write_checks."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    return np.memmap(file, dtype, "w+", file.tell(), shape)


def write_checks(file: IO[bytes], checks: list[int]) -> None:
    """Add checksums behind the array."""
    file.seek(0, 2)
    np.lib.format.write_array(file, np.array(checks, np.uint64))


def save_checked(file: IO[bytes], array: np.ndarray) -> None:
    """Write an array with the checksum of the whole, for load_checked."""
    np.lib.format.write_array(file, np.ascontiguousarray(array))
    write_checks(file, [checksum(array)])


def open_array(path: str | Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The array, memory-mapped, and the checksums behind it; None where the file is absent or cut short."""
    try:
        array = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            return array, np.lib.format.read_array(file)
    except DAMAGED:
        return None


def load_checked(path: str | Path) -> np.ndarray | None:
    """The array of save_checked, memory-mapped, all of it read once; None where it is absent or damaged."""
    found = open_array(path)
    return found[0] if found is not None and [checksum(found[0])] == found[1].tolist() else None
