"""Columns of numbers in files, without trusting them: text, .npy and PLY; for meshes and for clouds."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BOM = b"\xef\xbb\xbf"                              # what Windows editors put before UTF-8
BLOCK = 1 << 23                                    # bytes of text that are parsed in one call
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
             "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
             "int64": "i8", "uint64": "u8", "float32": "f4", "float64": "f8"}


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


# -- PLY ---------------------------------------------------------------------------------------------------------------

def ply_columns(path: Path) -> tuple[dict[str, dict], list[str]]:
    """{element: {property: (values, None)}}, for a list (values in a row, length of each); and the header's comments.
    Raises ValueError for a file that is no PLY or cut short, and for an ASCII file of more numbers than announced (rows
    of more columns than the header has)."""
    data = path.read_bytes()
    with ply_errors(path):
        format_, elements, comments, offset = ply_header(data)
        if format_ == "ascii":                      # from here on like a binary file that holds doubles only
            parsed = parse_numbers(data[offset:], np.float64)
            if parsed is None:
                raise ValueError("something in the body is not a number")
            data = parsed[0].tobytes()
            offset = 0
        order = ">" if format_ == "binary_big_endian" else "<"
        columns = {}
        for name, length, properties in elements:
            types = [(n, *("f8" if format_ == "ascii" and t else t and order + t for t in ts)) for n, *ts in properties]
            columns[name], offset = _ply_element(data, offset, length, types)
        if format_ == "ascii" and offset < len(data):
            raise ValueError(f"{(len(data) - offset) // 8} numbers more than its header announces")
    return columns, comments


def ply_properties(path: Path) -> dict[str, list[str]]:
    """{element: [its properties that are no lists]} of a PLY, whose body is not read; raises as ply_columns."""
    with ply_errors(path):
        return {element: [name for name, _, size in properties if size is None]
                for element, _, properties in ply_header(path.read_bytes())[1]}


@contextmanager
def ply_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: cannot be read as PLY ({type(error).__name__}: {str(error)[:120]}); "
                         f"is it cut short or damaged?") from error


def ply_header(data: bytes) -> tuple[str, list, list[str], int]:
    """Format, elements as (name, length, [(property, type, type of the list's length or None)]), comments, offset of
    the body."""
    end = re.search(rb"^end_header[ \t]*(\r\n|\n|\r)", data, re.MULTILINE)
    lines = re.split(r"[\r\n]+", data[:end.start()].decode("latin-1")) if end else []
    if not lines or lines[0].strip() != "ply":
        raise ValueError("no PLY header")
    format_ = ""
    elements, comments = [], []
    for line in lines[1:]:
        word = line.split()
        if word[:1] == ["format"]:
            format_ = word[1]
        elif word[:1] == ["comment"]:
            comments.append(line.strip().removeprefix("comment").strip())
        elif word[:1] == ["element"]:
            elements.append((word[1], int(word[2]), []))
        elif word[:2] == ["property", "list"]:
            elements[-1][2].append((word[4], PLY_TYPES[word[3]], PLY_TYPES[word[2]]))
        elif word[:1] == ["property"]:
            elements[-1][2].append((word[2], PLY_TYPES[word[1]], None))
    if format_ not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"format {format_!r}")
    if any(length < 0 for _, length, _ in elements):
        raise ValueError("a negative number of elements")
    return format_, elements, comments, end.end()


def _ply_element(data: bytes, offset: int, length: int, properties: list) -> tuple[dict, int]:
    """One element's columns: {property: (values, None)}, of a list {property: (values in a row, length of each)}."""
    if length == 0:
        return {name: (np.empty(0), np.empty(0) if size else None) for name, _, size in properties}, offset
    fields, at = [], offset                         # suppose all lists to be as long as those of the first row
    for name, kind, size in properties:
        number = int(np.frombuffer(data, size, 1, at)[0]) if size else 1
        fields += [(name + " length", size), (name, kind, (number,))] if size else [(name, kind)]
        at += number * np.dtype(kind).itemsize + (np.dtype(size).itemsize if size else 0)
    row = np.dtype(fields)
    lists = [name for name, _, size in properties if size]
    if offset + length * row.itemsize <= len(data):
        table = np.frombuffer(data, row, length, offset)
        if all((table[f"{name} length"] == row[name].shape[0]).all() for name in lists):
            columns = {name: (table[name].reshape(-1), table[f"{name} length"] if name in lists else None)
                       for name, _, _ in properties}
            return columns, offset + length * row.itemsize
    columns = {name: ([], []) for name, _, _ in properties}
    for _ in range(length):                         # lists of several lengths: row by row
        for name, kind, size in properties:
            number = 1
            if size:
                number = int(np.frombuffer(data, size, 1, offset)[0])
                offset += np.dtype(size).itemsize
            columns[name][0].append(np.frombuffer(data, kind, number, offset))
            columns[name][1].append(number)
            offset += number * np.dtype(kind).itemsize
    return {name: (np.concatenate(columns[name][0]), np.array(columns[name][1]) if size else None)
            for name, _, size in properties}, offset
