"""Rows of numbers in text and in .npy files, without trusting either."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BOM = b"\xef\xbb\xbf"                              # what Windows editors put before UTF-8
BLOCK = 1 << 23                                    # bytes of text that are parsed in one call
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def plain_text(path: Path) -> bytes:
    """The text of a file in UTF-8, which Windows programs may have written as UTF-16."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", errors="replace").encode()
    return data.removeprefix(BOM)


def parse_numbers(text: bytes, dtype: type) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers of a text and how many each line has; of tokens like 7/1/3 the first. None: not all are numbers."""
    parts = list(blocks(text, BLOCK)) if len(text) > 2 * BLOCK else []
    if len(parts) > 1:                              # numpy does not listen to signals while it parses
        parsed = [parse_numbers(part, dtype) for part in parts]
        return None if None in parsed else tuple(map(np.concatenate, zip(*parsed, strict=True)))
    if not text.strip():
        return np.empty(0, dtype), np.zeros(text.count(b"\n"), np.int64)
    byte = np.frombuffer(text if text.endswith(b"\n") else text + b"\n", np.uint8)
    token, slash = byte > 32, byte == ord("/")
    digit = token & ~slash
    token_start, number_start = token.copy(), digit.copy()
    token_start[1:] &= ~token[:-1]
    number_start[1:] &= ~digit[:-1]
    count = np.diff(np.searchsorted(np.flatnonzero(token_start), np.flatnonzero(byte == ord("\n"))), prepend=0)
    with warnings.catch_warnings():                 # of text it cannot parse, fromstring returns the numbers before it
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            value = np.fromstring(np.where(slash, np.uint8(32), byte).tobytes(), dtype, sep=" ")
        except ValueError:
            return None
    if len(value) != number_start.sum():
        return None
    value = value[token_start[number_start]]
    return (value, count) if len(value) == count.sum() else None


def blocks(text: bytes, size: int) -> Iterator[bytes]:
    """The text in pieces of about `size` bytes that end with a line."""
    at = 0
    while at < len(text):
        end = text.find(b"\n", at + size) + 1 or len(text)
        yield text[at:end]
        at = end


def parse_npy(data: bytes | np.ndarray) -> np.ndarray:
    """The array in the bytes of a .npy file, as a copy. ValueError for whatever is wrong with them; no memory is taken
    for more than they hold, and nothing is unpickled."""
    stream = io.BytesIO(bytes(data[:1 << 16]))
    try:
        shape, by_column, dtype = NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:                      # numpy has Python parse the header: SyntaxError, TokenError ...
        raise ValueError(f"damaged header: {type(error).__name__}: {' '.join(str(error).split())[:120]}") from error
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
        raise ValueError(f"{dtype} {shape} needs more than its {len(data)} bytes; is it cut short?")
    array = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    return array.reshape(shape, order="F" if by_column else "C").copy()
