"""Checkpoints: plain types, one rename, checked when read; the run folder; which files to keep; pre-trained weights.

torch.load does not compare the checksums that torch.save writes (a flipped bit in a weight loads without a word), so every
archive is read once through `zipfile`, which does, before torch sees it.
"""

import hashlib
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = "segheads-1"
CHECKED_SECTIONS = ("model", "ema", "optimizer")   # floating tensors in these must be finite


class RunFolder:
    """The paths of one run: `<output_dir>/{model,log,config}`; the first two can be placed elsewhere."""

    def __init__(self, output_dir: str | Path, checkpoint_dir: str | Path | None = None,
                 log_dir: str | Path | None = None):
        self.root = Path(output_dir)
        self.model = Path(checkpoint_dir) if checkpoint_dir else self.root / "model"
        self.log = Path(log_dir) if log_dir else self.root / "log"
        self.config = self.root / "config"

    def create(self) -> "RunFolder":
        """Make the folders (also where they exist already) and return self."""
        for folder in (self.model, self.log, self.config):
            folder.mkdir(parents=True, exist_ok=True)
        return self


# -- writing -------------------------------------------------------------------

def save_checkpoint(path: str | Path, *, script: str, config: Mapping, class_names: Sequence[str] | None,
                    palette: Any, model: Mapping[str, Tensor], **state: Any) -> None:
    """Write one checkpoint, so that a killed job leaves the old file or the new one, never half of one.

    `state` holds whatever else a resume needs (optimizer, scheduler, scaler, ema, epoch, step, best, rng, encoder). Values are
    dicts, lists, tuples, tensors, str, int, float, bool, None; anything else is a TypeError naming its place. FloatingPointError
    names the first tensor of model, ema or optimizer with a NaN or an infinity. OSError where the disk refuses; in each case
    the old file stays as it was. In a distributed run only rank 0 calls this.
    """
    path = Path(path)
    content = {"format": FORMAT, "script": script, "config": config, "class_names": class_names, "palette": palette,
               "model": model, **state}
    content = {key: _plain(value, key) for key, value in content.items()}
    for section in CHECKED_SECTIONS:
        for name, tensor in _tensors(content.get(section), section):
            if not _is_finite(tensor):
                raise FloatingPointError(f"{path}: not written, {name} holds NaN or infinite values (epoch "
                                         f"{state.get('epoch')}, step {state.get('step')}). Resume from the file before, "
                                         f"with a lower learning rate or another --amp-dtype.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _replacing(path) as file:
            torch.save(content, file)
    except RuntimeError as error:                  # torch's archive writer hides the OSError (disk full, quota) in one of its own
        if isinstance(error.__context__, OSError):
            raise OSError(f"{path}: could not be written ({error.__context__}); the old file is intact") from error
        raise


class _replacing:
    """Open `path` for writing under a temporary name beside it; on success flush to the disk and rename, else remove."""

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")

    def __enter__(self):
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind, error, traceback):
        try:
            with self.file:
                if kind is None:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)
        if kind is None and os.name == "posix":    # the rename itself must survive a power cut, too
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def _plain(value: Any, where: str) -> Any:
    """The same value in types that weights_only=True reads back: subclasses become their base, parameters plain tensors."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        value = value.detach()
        if value.untyped_storage().nbytes() > value.numel() * value.element_size():
            value = value.clone()                  # a view of a large tensor would be saved with all of it
        return value
    if isinstance(value, Mapping):
        return {_plain(key, f"{where} (key)"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    for base in (int, float, str):                 # e.g. numpy.float64, IntEnum
        if isinstance(value, base):
            return base(value)
    raise TypeError(f"checkpoint entry {where} is a {type(value).__module__}.{type(value).__qualname__}, which could not be "
                    f"read back safely. Store tensors, str, int, float, bool, None, and dicts, lists, tuples of them.")


def _tensors(tree: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield where, tree
    elif isinstance(tree, dict | list | tuple):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(item, f"{where}.{key}")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())   # the sum is fast; it may overflow, then look


# -- reading -------------------------------------------------------------------

def load_checkpoint(path: str | Path, script: str | None = None, map_location: Any = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; `script` (such as "train_sonata.py") is the only one whose files are wanted.

    Keep the default `map_location`: random generators take their states from the CPU, and load_state_dict moves the rest.
    FileNotFoundError / IsADirectoryError where there is no file; ValueError in one line where it is truncated or damaged, is
    no checkpoint of this project, holds more than plain types (nothing in it is ever executed), or is another script's.
    """
    checkpoint = _read(path, map_location)
    if not isinstance(checkpoint, dict) or not str(checkpoint.get("format", "")).startswith("segheads-"):
        raise ValueError(f"{path}: not a checkpoint of these scripts (no `format` entry). Pre-trained weights go to the "
                         f"flag for them, not to --resume or --checkpoint.")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format {checkpoint['format']!r}, this code reads {FORMAT!r}. "
                         f"Use the version of the code that wrote it.")
    absent = [key for key in ("script", "config", "class_names", "palette", "model") if key not in checkpoint]
    if absent or not isinstance(checkpoint["model"], dict):
        raise ValueError(f"{path}: incomplete checkpoint, without {', '.join(absent) or 'weights in `model`'}. Use another file.")
    if script is not None and Path(str(checkpoint["script"])).stem != Path(script).stem:
        raise ValueError(f"{path}: checkpoint of {checkpoint['script']}, but this is {script}. "
                         f"Continue it with {checkpoint['script']}, or name a file of {script}.")
    return checkpoint


def find_resume(resume: str | Path | None, model_dir: str | Path,
                script: str | None = None) -> tuple[Path | None, list[str]]:
    """Which checkpoint `--resume` means, and what to tell the user about it.

    None -> None. A path must exist and be whole (errors of `load_checkpoint`). "auto": model_last.pth, else the newest readable
    checkpoint_*_N.pth, else model_best.pth, with one message per file passed over; an empty folder -> None, a fresh start. Files
    there but none readable is a ValueError: starting afresh would overwrite a run without a word.
    """
    if resume is None:
        return None, []
    if str(resume) != "auto":
        load_checkpoint(resume, script, map_location="meta")     # checksums and structure, without keeping the weights
        return Path(resume), []
    folder = Path(model_dir)
    numbered = sorted(folder.glob("checkpoint_*.pth"), key=lambda path: (_number(path), path.name), reverse=True)
    candidates = [path for path in (folder / "model_last.pth", *numbered, folder / "model_best.pth") if path.is_file()]
    messages = []
    for path in candidates:
        try:
            load_checkpoint(path, script, map_location="meta")
        except ValueError as error:
            messages.append(f"skipped: {error}")
        else:
            return path, [*messages, f"resuming from {path}"]
    if candidates:
        raise ValueError(f"--resume auto: none of the {len(candidates)} checkpoints in {folder} can be used. "
                         f"Move them away to start afresh. First: {messages[0].removeprefix('skipped: ')}")
    return None, [f"--resume auto: no checkpoint in {folder} yet, starting afresh"]


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else -1


def read_weights(path: str | Path) -> dict[str, Any]:
    """Somebody else's weights: a .safetensors file, or a .pth / .pt file (also of old torch) with weights_only=True.

    Returns the dict in the file as it is, on the CPU. Errors as for `load_checkpoint`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        content = _read(path, "cpu", old_format=True)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds a {type(content).__name__}, not a dict of tensors. Save a state_dict.")
        return content
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    _check_is_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, damaged or no safetensors file ({_one_line(error)}). Fetch it again.") from error


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder. Name a file in it, such as model_last.pth.")
    if not path.exists():
        near = sorted(other.name for other in path.parent.glob("*" + path.suffix)) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: no such file. " + (f"That folder holds {', '.join(near[:5])}." if near
                                                            else "Check the path."))


def _read(path: str | Path, map_location: Any, old_format: bool = False) -> Any:
    """torch.load(weights_only=True) after a check of the archive; every failure is one line that names the file."""
    path = Path(path)
    _check_is_file(path)
    advice = "Fetch it again." if old_format else "Use another checkpoint of the run (--resume auto finds the newest)."
    if zipfile.is_zipfile(path):
        _check_archive(path, advice)
    elif not old_format:
        raise ValueError(f"{path}: truncated, or not written by torch.save ({path.stat().st_size} bytes). {advice}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:                     # damaged bytes make the unpickler fail in any way; nothing is swallowed
        unsafe = re.search(r"(?:GLOBAL|global:?) ([\w.]+) was not an allowed global", str(error))
        if unsafe or isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            what = f"Python objects ({unsafe[1]})" if unsafe else "Python objects"
            raise ValueError(f"{path}: holds {what}; only tensors and plain types are read, because others can run code. "
                             f"If you trust the file, save its state_dict alone once with torch.save.") from error
        raise ValueError(f"{path}: truncated, damaged or not a PyTorch file ({_one_line(error)}). {advice}") from error


def _check_archive(path: Path, advice: str) -> None:
    """Compare every checksum of a zip archive; refuse compressed entries, which torch.save never writes (zip bombs are)."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            damaged = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            if damaged is None and any(entry.CRC for entry in entries):   # all 0: written without (set_crc32_options(False))
                damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:                     # zipfile on damaged bytes: BadZipFile, RuntimeError, NotImplementedError, ...
        raise ValueError(f"{path}: truncated or damaged ({_one_line(error)}). {advice}") from error
    if damaged is not None:
        raise ValueError(f"{path}: damaged, entry {damaged} does not match its checksum or is compressed. {advice}")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


# -- what to keep --------------------------------------------------------------

class CheckpointKeeper:
    """Which checkpoints of a run stay on disk: model_last, model_best, one every `save_interval` epochs, the `keep_top_k` best.

    `state` is the dict of keyword arguments of `save_checkpoint`. Its entry `best` is filled in here, as it is when the file is
    written; after a resume give it back: `keeper.load_state_dict(checkpoint["best"])`. Saving one `state` object under
    several names copies the bytes of the first file (never a link: the copies are there for the day one is damaged), so
    make a new dict after each change. `save_interval=0` keeps no epochs, `keep_top_k=0` no top.
    """

    def __init__(self, model_dir: str | Path, keep_top_k: int = 0, save_interval: int = 5, mode: str = "max"):
        if mode not in ("max", "min"):
            raise ValueError(f"mode {mode!r}: use 'max' (a score) or 'min' (a loss)")
        if keep_top_k < 0 or save_interval < 0:
            raise ValueError(f"keep_top_k {keep_top_k}, save_interval {save_interval}: neither may be negative; 0 switches off")
        self.folder, self.keep_top_k, self.save_interval, self.mode = Path(model_dir), keep_top_k, save_interval, mode
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.top: list[list] = []                  # [score, epoch], best first
        self._state, self._key, self._written = None, None, []      # the last state, when, and the files that hold it

    def save_last(self, state: dict) -> None:
        self._save(self.folder / "model_last.pth", state)

    def save_epoch(self, epoch: int, state: dict) -> bool:
        """Write checkpoint_epoch_{epoch}.pth where epoch is a multiple of save_interval; True if written."""
        due = self.save_interval > 0 and epoch % self.save_interval == 0
        if due:
            self._save(self.folder / f"checkpoint_epoch_{epoch}.pth", state)
        return due

    def save_best_if(self, score: float, state: dict) -> bool:
        """Write model_best.pth if `score` is strictly better than all before, and the top-k file; True if best. NaN never is."""
        score, epoch, before = float(score), state.get("epoch"), self.state_dict()
        if not math.isfinite(score):
            return False
        best = _better(score, self.best_score, self.mode)
        paths = [self.folder / "model_best.pth"] if best else []
        if best:
            self.best_score, self.best_epoch = score, epoch
        if self.keep_top_k:
            sign = -1 if self.mode == "max" else 1
            entries = sorted([*self.top, [score, epoch]], key=lambda entry: sign * entry[0])          # stable: older first
            self.top = [entry for i, entry in enumerate(entries) if entry[1] not in [e for _, e in entries[:i]]]
            self.top = self.top[:self.keep_top_k]
            if [score, epoch] in self.top and [score, epoch] not in before["top"]:
                paths.append(self._top_path(epoch))
        if self._state is state and paths:         # files of this very state were written before its score: renew their `best`
            paths += [path for path in self._written if path not in paths]
        try:
            for path in paths:
                self._save(path, state)
        except BaseException:
            self.load_state_dict(before)
            raise
        for _, old in before["top"]:
            if old not in [e for _, e in self.top]:
                self._top_path(old).unlink(missing_ok=True)
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.best_score, "epoch": self.best_epoch, "top": [list(entry) for entry in self.top]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best_score, self.best_epoch = state["score"], state["epoch"]
        self.top = [list(entry) for entry in state["top"]]

    def _top_path(self, epoch: int | None) -> Path:
        if epoch is None:
            raise ValueError("keep_top_k names its files by epoch: put `epoch` into the state")
        return self.folder / f"checkpoint_top_{epoch}.pth"

    def _save(self, path: Path, state: dict) -> None:
        key = [state.get("epoch"), state.get("step"), self.state_dict(),
               [tensor._version for tensor in state["model"].values()]]    # in-place changes of the weights count up
        if self._state is state and self._key == key and self._written[-1].is_file():
            if path not in self._written:
                with open(self._written[-1], "rb") as source, _replacing(path) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        else:
            save_checkpoint(path, **{**state, "best": self.state_dict()})
            self._written = []
        self._state, self._key = state, key
        self._written = [*(other for other in self._written if other != path), path]


class EarlyStopping:
    """Stop after `patience` evaluations in a row without an improvement by more than `min_delta`; 0 or None never stops."""

    def __init__(self, patience: int | None, mode: str = "max", min_delta: float = 0.0):
        if mode not in ("max", "min"):
            raise ValueError(f"mode {mode!r}: use 'max' (a score) or 'min' (a loss)")
        if (patience or 0) < 0 or min_delta < 0:
            raise ValueError(f"early stopping: patience {patience}, min_delta {min_delta}: neither may be negative")
        self.patience, self.mode, self.min_delta = patience or 0, mode, min_delta
        self.best: float | None = None
        self.waited = 0

    def update(self, score: float) -> bool:
        """Record one evaluation; True when it is time to stop. NaN is no improvement."""
        score = float(score)
        if _better(score, self.best, self.mode, self.min_delta):
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def _better(score: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    if not math.isfinite(score) or best is None:
        return math.isfinite(score)
    return score > best + min_delta if mode == "max" else score < best - min_delta


# -- pre-trained weights -------------------------------------------------------

def strip_prefixes(state_dict: Mapping[str, Any], prefixes: Sequence[str] = ("module.", "_orig_mod.")) -> dict[str, Any]:
    """Undo what wrappers (DistributedDataParallel, torch.compile) do to names: drop a prefix as long as EVERY key has it.

    A prefix that only some keys have is a real name (a submodule called `module`) and stays.
    """
    result = dict(state_dict)
    while prefix := next((p for p in prefixes if result and all(key.startswith(p) for key in result)), None):
        result = {key[len(prefix):]: value for key, value in result.items()}
    return result


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path, what: str = "encoder",
                 layout: str = "") -> str:
    """Load all of `module` from `state_dict`, or nothing; names must already be those of the module.

    Every parameter and persistent buffer must be there with equal shape, else a ValueError that counts and names the tensors
    that are not; the module is then unchanged. Tensors of the file that the module has no place for are counted in the line
    that is returned: "matched 452/452 encoder tensors from FILE (layout: ...)". `num_batches_tracked` may be missing from a file
    without any: torch before 0.4.1 did not write it, and nothing depends on it unless momentum is None.
    """
    own = module.state_dict()
    counter = "num_batches_tracked"
    if not any(name.endswith(counter) for name in state_dict):
        own = {name: tensor for name, tensor in own.items() if not name.endswith(counter)}
    missing = [name for name in own if not isinstance(state_dict.get(name), Tensor)]
    unexpected = [name for name in state_dict if name not in own]
    shapes = [f"{name}: file {tuple(state_dict[name].shape)}, model {tuple(tensor.shape)}"
              for name, tensor in own.items() if name not in missing and state_dict[name].shape != tensor.shape]
    matched = len(own) - len(missing) - len(shapes)
    origin = f"{source} (layout: {layout})" if layout else f"{source}"
    if missing or shapes or not own:
        raise ValueError(f"{origin}: matched {matched}/{len(own)} {what} tensors; {_some('missing', missing)}; "
                         f"{_some('unexpected', unexpected)}; {_some('of another shape', shapes)}. "
                         f"Is the file of this model and size?")
    module.load_state_dict({**module.state_dict(), **{name: state_dict[name] for name in own}}, strict=True)
    unused = f"; {len(unexpected)} others in the file not used" if unexpected else ""
    return f"matched {matched}/{len(own)} {what} tensors from {origin}{unused}"


def _some(label: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {label}" + (f" ({shown})" if names else "")


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
