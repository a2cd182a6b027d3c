"""utils/array_file.py: whatever is changed in a cached array shows."""

import io

import numpy as np
import pytest

from utils.array_file import checksum, load_checked, new_array, open_array, save_checked, write_checks

ARRAY = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


@pytest.mark.parametrize("dtype, shape", [(np.uint8, (13,)), (np.float32, (7, 5)), (np.int16, (3, 1)), (np.float64, (0, 3)), (np.bool_, (9,))])
def test_arrays_come_back(tmp_path, dtype, shape):
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    with open(tmp_path / "a.npy", "x+b") as file:
        save_checked(file, array)
    read = load_checked(tmp_path / "a.npy")
    assert read.dtype == dtype and read.shape == shape and (read == array).all()
    assert (np.load(tmp_path / "a.npy") == array).all()                 # for everybody else a plain .npy file


def test_every_changed_byte_shows(tmp_path):
    path = tmp_path / "a.npy"
    save_checked(stream := io.BytesIO(), ARRAY)
    good = stream.getvalue()
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        read = load_checked(path)
        assert read is None or (read.shape == ARRAY.shape and read.dtype == ARRAY.dtype and (read == ARRAY).all()), place   # spaces of a header
    for end in range(len(good)):
        path.write_bytes(good[:end])
        assert load_checked(path) is None
    path.write_bytes(bytes(len(good)))
    assert load_checked(path) is None and load_checked(tmp_path / "none.npy") is None


@pytest.mark.parametrize("zeroed", [slice(128, 148), slice(128, None), slice(200, 260)])
def test_zeroed_parts_show(tmp_path, zeroed):
    """As a disk leaves blocks that were never written."""
    save_checked(stream := io.BytesIO(), ARRAY)
    content = np.frombuffer(stream.getvalue(), np.uint8).copy()
    content[zeroed] = 0
    (tmp_path / "a.npy").write_bytes(content.tobytes())
    assert load_checked(tmp_path / "a.npy") is None


def test_an_array_that_is_filled_in_place(tmp_path):
    with open(tmp_path / "a.npy", "x+b") as file:
        out = new_array(file, np.dtype([("x", np.float32, (2, 3)), ("y", np.int16)]), (4,))
        out["x"], out["y"] = 1.5, np.arange(4)
        out.flush()
        write_checks(file, [checksum(out["x"][i]) for i in range(4)])
    array, checks = open_array(tmp_path / "a.npy")
    assert (array["x"] == 1.5).all() and array["y"].tolist() == [0, 1, 2, 3] and checks.tolist() == [checksum(array["x"][i]) for i in range(4)]


def test_checksum_of_odd_lengths_and_layouts():
    content = np.arange(1, 12, dtype=np.uint8)
    words = int.from_bytes(content[:8].tobytes(), "little") + int.from_bytes(content[8:].tobytes(), "little")
    assert checksum(content) == words and checksum(ARRAY.T.copy().T) == checksum(ARRAY) and checksum(np.zeros(0)) == 0
