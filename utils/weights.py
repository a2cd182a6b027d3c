"""Read weight files without trusting them, and load pre-trained weights completely or not at all.

torch.load does not compare the checksums that torch.save writes (a flipped bit in a weight loads without a word), so
every archive is first read through `zipfile`, which does. Nothing in a file is ever executed: `weights_only=True`, and
the only allow-list, for numpy's numbers where asked for, puts readers of our own in the place of numpy's.
"""

import contextlib
import hashlib
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ONE_READER = threading.Lock()                      # torch's allow-list is the same for all threads
DOS_FOLDER = 0x10                                  # bit of a zip entry's external attributes


def read_weights(path: str | Path, numpy_scalars: bool = False) -> dict[str, Any]:
    """Somebody else's weights: a .safetensors file, or anything torch.save wrote (also the format before torch 1.6).

    Returns the dict in the file as it is, on the CPU; with numpy_scalars, numpy's numbers in it become Python's, and
    its arrays stay arrays.
    FileNotFoundError or IsADirectoryError where there is no file; ValueError, in one line, where it is truncated or
    damaged, holds Python objects beyond tensors and plain types, or holds no dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        _first_bytes(path)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated, damaged or no safetensors file ({_one_line(error)}). "
                             f"Fetch it again.") from error
    content = read_torch_file(path, old_format=True, advice="Fetch it again.", numpy_scalars=numpy_scalars)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dict of tensors. Save a state_dict.")
    return content


def read_torch_file(path: str | Path, advice: str, map_location: Any = "cpu", old_format: bool = False,
                    numpy_scalars: bool = False) -> Any:
    """torch.load with weights_only=True after a check of all checksums; each failure is one line that ends with
    `advice`.

    Raises as `read_weights`. `old_format` also takes files that are no zip archive (written before torch 1.6).
    """
    path = Path(path)
    if _first_bytes(path) == b"PK\x03\x04":        # a zip archive; what torch.load itself goes by
        _check_archive(path, advice)
    elif not old_format:
        raise ValueError(f"{path}: truncated, or not written by torch.save ({path.stat().st_size} bytes). {advice}")
    try:
        allowed = torch.serialization.safe_globals(NUMPY_NAMES) if numpy_scalars else contextlib.nullcontext()
        with ONE_READER, allowed, warnings.catch_warnings(action="ignore"):     # of pickle protocols: it loads or fails
            return torch.load(path, map_location=map_location, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                     # damaged bytes make the unpickler raise anything; none is swallowed
        # operand 149 begins what Python's own pickle.dump writes today; torch.save never does
        if forbidden := re.search(r"nsupported (?:(?:global: )?GLOBAL ([\w.]+)|operand 149\b)", str(error)):
            what = (forbidden[1] or "a pickle")[:60]
            raise ValueError(f"{path}: holds Python objects ({what}); only tensors and plain types are read, because "
                             f"objects can run code. If you trust the file, write its state_dict alone to a new one "
                             f"with torch.save.") from error
        raise ValueError(f"{path}: truncated, damaged or not a PyTorch file ({_one_line(error)}). {advice}") from error


class _NumpyDtype:
    """Stands in for numpy.dtype in a pickle: a bool, integer or float, and nothing else."""

    def __init__(self, name: str, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
            raise ValueError(f"numpy dtype {name!r} is no plain number")
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        self.name = (">" if state[1] == ">" else "<") + self.name[-2:]


def _numpy_number(dtype: _NumpyDtype, data: bytes) -> bool | int | float:
    """Stands in for numpy's own `scalar`."""
    value, = np.frombuffer(data, np.dtype(dtype.name))
    return value.item()


class _NumpyArray:
    """Stands in for numpy.ndarray in a pickle, and is one when asked (numpy.asarray); of plain numbers, copied."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, dtype, by_column, data = state
        self.array = np.frombuffer(data, np.dtype(dtype.name)).reshape(self.shape, order="F" if by_column else "C")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.array, dtype)


def _numpy_array(*_) -> _NumpyArray:
    """Stands in for numpy's own `_reconstruct`, whose arguments are always the same; the content comes afterwards."""
    return _NumpyArray()


NUMPY_NAMES = [(_NumpyDtype, "numpy.dtype"), (_numpy_number, "numpy.core.multiarray.scalar"),
               (_numpy_number, "numpy._core.multiarray.scalar"), (_NumpyArray, "numpy.ndarray"),
               (_numpy_array, "numpy.core.multiarray._reconstruct"),
               (_numpy_array, "numpy._core.multiarray._reconstruct")]


def _first_bytes(path: Path) -> bytes:
    """The first four bytes, after the errors for a file that is not there; PermissionError for one we may not read."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder. Name a file in it, such as {path / 'model_best.pth'}.")
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*" + path.suffix)) if path.suffix else []
        raise FileNotFoundError(f"{path}: no such file. " + (f"Its folder holds {_examples(near)}." if near
                                                            else "Check the path."))
    with open(path, "rb") as file:
        return file.read(4)


def _check_archive(path: Path, advice: str) -> None:
    """Compare all checksums of a zip archive; refuse entries that torch.save never writes: compressed ones (zip bombs)
    and folders, for which torch would return memory that nobody has filled."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            bad = next((entry.filename for entry in entries
                        if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & DOS_FOLDER), None)
            if bad is None and any(entry.CRC for entry in entries):   # all 0: torch can be told not to write checksums
                bad = archive.testzip()
    except Exception as error:                     # BadZipFile, RuntimeError, NotImplementedError, OSError, ...
        raise ValueError(f"{path}: truncated or damaged ({_one_line(error)}). {advice}") from error
    if bad is not None:
        raise ValueError(f"{path}: damaged, its entry {bad!r} is not what its checksum or header says. {advice}")


def _one_line(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[-1]     # behind torch's advice to switch off the protection
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return f"{type(error).__name__}: {' '.join(text.split())[:120]}"


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


# -- into a module -------------------------------------------------------------

def strip_prefixes(state_dict: Mapping[str, Any],
                   prefixes: Sequence[str] = ("module.", "_orig_mod.")) -> dict[str, Any]:
    """Undo what wrappers (DistributedDataParallel, torch.compile) do to names: drop a prefix as long as EVERY key has
    it.

    A prefix that only some keys have is a real name (a submodule called `module`) and stays.
    """
    result = dict(state_dict)
    while prefix := next((p for p in prefixes if result and all(str(key).startswith(p) for key in result)), None):
        result = {key[len(prefix):]: value for key, value in result.items()}
    return result


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path, what: str = "encoder",
                 layout: str = "", keep: str | None = None) -> str:
    """Load all of `module` from `state_dict`, whose names must already be the module's, or nothing.

    keep: tensors of the module with this text in their names stay as they are, and are not counted.

    Every parameter and persistent buffer must be there in its shape; otherwise ValueError counts and names the
    tensors that are not, and the module is unchanged. A weight stored as integers (quantised) counts as one of
    another shape; one that is not finite is an error, too. Returns "matched 452/452 encoder tensors from FILE
    (layout: ...)", and how many other tensors of the file were not used. `num_batches_tracked` may be missing from a
    file that has none: torch before 0.4.1 did not write it, and batch norm does not read it unless its momentum is
    None.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if keep is None or keep not in name}
    counter = "num_batches_tracked"
    needed = own if any(str(name).endswith(counter) for name in state_dict) else \
        {name: tensor for name, tensor in own.items() if not name.endswith(counter)}
    missing = [name for name in needed if not isinstance(state_dict.get(name), Tensor)]
    differing = [f"{name}: file {_kind(state_dict[name])}, model {_kind(tensor)}" for name, tensor in needed.items()
                 if name not in missing and not _fits(state_dict[name], tensor)]
    unexpected = [str(name) for name in state_dict if name not in own]
    origin = f"{source} (layout: {layout})" if layout else f"{source}"
    counts = f"matched {len(needed) - len(missing) - len(differing)}/{len(needed)} {what} tensors"
    if missing or differing or not needed:
        groups = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
        details = "; ".join(f"{len(names)} {label}" + (f" ({_examples(names)})" if names else "")
                            for label, names in groups.items())
        raise ValueError(f"{origin}: {counts}; {details}. Is the file of this model and size?")
    bad = next((name for name in needed if not state_dict[name].isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{origin}: {bad} is not finite: the run had diverged, or the file is damaged. Use another.")
    module.load_state_dict({**module.state_dict(), **{name: state_dict[name] for name in needed}}, strict=True)
    return f"{counts} from {origin}" + (f"; {len(unexpected)} others in the file not used" if unexpected else "")


def _fits(stored: Tensor, own: Tensor) -> bool:
    return stored.shape == own.shape and (stored.is_floating_point() or not own.is_floating_point())


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", ""))


def sha256_file(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes; the errors of `_first_bytes` for a file that is not there."""
    _first_bytes(Path(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
