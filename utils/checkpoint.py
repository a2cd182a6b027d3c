"""Checkpoints: plain types, written whole or not at all, checked when read; the run folder; which files to keep."""

import contextlib
import itertools
import math
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from utils.checks import check_names
from utils.files import replacing
from utils.weights import read_torch_file

FORMAT = "segheads-1"
FINITE_SECTIONS = ("model", "ema", "optimizer")    # no NaN or infinity in their tensors


def check_writable(*folders: str | Path) -> None:
    """ValueError where a folder (which need not exist yet) cannot be made or written into: before the work, not after
    it. Nothing is made."""
    for folder in map(Path, folders):
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "may not be written into" if parent.is_dir() else "is a file, not a folder"
            raise ValueError(f"{folder}: results cannot go there, {parent} {what}; choose another output folder")


class RunFolder:
    """The paths of one run: `<output_dir>/{model,log,config}`; the first two can be placed elsewhere."""

    def __init__(self, output_dir: str | Path, checkpoint_dir: str | Path | None = None,
                 log_dir: str | Path | None = None):
        self.root = Path(output_dir)
        self.model = Path(checkpoint_dir) if checkpoint_dir else self.root / "model"
        self.log = Path(log_dir) if log_dir else self.root / "log"
        self.config = self.root / "config"

    def check_writable(self) -> None:
        """See check_writable."""
        check_writable(self.model, self.log, self.config)

    def create(self) -> "RunFolder":
        """Make the folders where they do not exist yet; returns self."""
        for folder in (self.model, self.log, self.config):
            folder.mkdir(parents=True, exist_ok=True)
        return self


# -- writing -------------------------------------------------------------------

def save_checkpoint(path: str | Path, *, script: str, config: Mapping, class_names: Sequence[str] | None,
                    palette: Any, model: Mapping[str, Tensor], **state: Any) -> None:
    """Write one checkpoint. Whatever happens meanwhile, the file at `path` is the old one or the new one, whole.

    `state` is what else a resume needs (optimizer, scheduler, scaler, ema, epoch, step, best, rng, encoder). Values
    are tensors, str, int, float, bool, None, and dicts, lists, tuples of them; anything else is a TypeError that
    names its place. FloatingPointError names the first tensor of model, ema or optimizer that is not finite (a mask
    with -inf belongs in a buffer that is not persistent). OSError where the disk refuses. In a distributed run only
    rank 0 calls this.
    """
    path = Path(path)
    content = _plain({"script": script, "config": config, "class_names": class_names, "palette": palette,
                      "model": model, **state})
    for section in FINITE_SECTIONS:
        for name, tensor in _tensors(content.get(section), section):
            if not _is_finite(tensor):
                raise FloatingPointError(f"{path}: not written, {name} is not finite at epoch {state.get('epoch')}, "
                                         f"step {state.get('step')}. Resume from an older checkpoint with a lower "
                                         f"learning rate or in float32.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """utils.files.replacing, onto the disk, with an error that says what became of the file."""
    try:
        with replacing(path, sync=True) as file:
            yield file
    except (OSError, RuntimeError) as error:       # torch hides the OSError of a full disk behind one of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path}: not written ({cause.strerror or cause}); an older file there is intact") from error


def _plain(value: Any, where: str = "") -> Any:
    """The same value in types that weights_only=True reads back: subclasses become their base type."""
    if isinstance(value, Tensor):
        value = value.detach()
        if type(value) is Tensor:                  # a view of a larger tensor would be saved with all of it
            whole = value.untyped_storage().nbytes() <= value.numel() * value.element_size()
            return value if whole else value.clone()
    if isinstance(value, Mapping):
        return {_plain(key, f"{where}.{key}"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    for base in (bool, int, float, str):           # also numpy.float64 and IntEnum, which are subclasses
        if isinstance(value, base):
            return base(value)
    if value is not None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"checkpoint entry {where.strip('.')} is a {kind}, which cannot be read back. Store tensors, "
                        f"str, int, float, bool, None, or dicts, lists and tuples of them.")
    return None


def _tensors(tree: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield where, tree
    elif isinstance(tree, dict | list | tuple):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(item, f"{where}.{key}")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())   # the sum is faster, but may overflow


# -- reading -------------------------------------------------------------------

def load_checkpoint(path: str | Path, script: str | None = None, map_location: Any = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; with `script`, such as "train_sonata.py", only files of that script.

    Keep the default `map_location`: random generators take their state from the CPU, and load_state_dict moves the
    rest. FileNotFoundError or IsADirectoryError where there is no file; ValueError, in one line, where it is
    truncated or damaged, holds more than plain types (nothing in it is executed), is no checkpoint of this project,
    holds weights that are not finite, or is another script's.
    """
    advice = "Use another checkpoint of the run; --resume auto finds the newest."
    checkpoint = read_torch_file(path, advice, map_location)
    written = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if written != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this code (format {written!r}, expected {FORMAT!r}). "
                         f"Pre-trained weights have a flag of their own; another version's file needs that version.")
    absent = [key for key in ("script", "config", "class_names", "palette", "model") if key not in checkpoint]
    if absent or not all(isinstance(checkpoint[key], dict) for key in ("config", "model")):
        raise ValueError(f"{path}: incomplete, no {', '.join(absent) or 'dicts in config, model'}. Use another file.")
    check_names(f"{path}: class_names", checkpoint["class_names"] or [])
    for name, tensor in _tensors(checkpoint["model"], "model"):
        if not tensor.is_meta and not _is_finite(tensor):
            raise ValueError(f"{path}: {name} is not finite, which save_checkpoint never writes. {advice}")
    if script is not None and Path(str(checkpoint["script"])).stem != Path(script).stem:
        raise ValueError(f"{path}: a checkpoint of {checkpoint['script']!r}, not of {script!r}. "
                         f"Run the script that wrote it, or name another file.")
    return checkpoint


def entry_of(checkpoint: Mapping, name: str, path: object) -> Any:
    """checkpoint[name]; ValueError where it has none, as one of an earlier version of a script."""
    if checkpoint.get(name) is None:
        raise ValueError(f"{path} has no entry {name!r}, which this run keeps; start afresh in another --output-dir")
    return checkpoint[name]


def find_resume(resume: str | Path | None, model_dir: str | Path,
                script: str | None = None) -> tuple[Path | None, list[str]]:
    """Which checkpoint `--resume` means (None: a fresh start), and the lines to tell the user about the choice.

    A path must pass `load_checkpoint`, whose errors it raises. "auto" takes model_last.pth or, where that cannot be
    read, the newest of the readable checkpoint_*.pth, model_best.pth and others, with a line for each file passed
    over. An empty folder is a fresh start, as is one of files with other names that are no checkpoints; otherwise files
    of which none can be read are a ValueError, because a fresh start would overwrite that run.
    """
    if resume is None:
        return None, []
    if Path(resume).suffix == ".ckpt" and not Path(resume).exists():        # Lightning's
        raise FileNotFoundError(f"{resume}: no such file; a run is saved as {Path(model_dir) / 'model_last.pth'}, from "
                                f"which --resume auto goes on")
    if str(resume) != "auto":
        load_checkpoint(resume, script, map_location="meta")   # "meta": checksums and structure, no weights in memory
        return Path(resume), []
    folder, messages, found = Path(model_dir), [], []
    numbered = sorted(folder.glob("checkpoint_*.pth"), key=lambda path: (_number(path), path.name), reverse=True)
    groups = [[folder / "model_last.pth"], numbered, [folder / "model_best.pth"]]
    others = {*filter(Path.is_file, folder.glob("*.pth"))}.difference(*groups)      # such as a stage's
    groups.append(sorted(others, key=lambda path: path.stat().st_mtime, reverse=True))
    for group in groups:
        for path in filter(Path.is_file, group):
            try:
                checkpoint = load_checkpoint(path, script, map_location="meta")
            except ValueError as error:
                if group is not groups[-1]:        # whose names may be anybody's, such as pre-trained weights
                    messages.append(f"skipped {error}")
                continue
            if group is groups[0]:
                return path, [f"resuming from {path}"]
            found.append((checkpoint.get("epoch") or 0, checkpoint.get("step") or 0, path))
            break
    if found:
        path = max(found, key=lambda entry: entry[:2])[-1]
        return path, [*messages, f"resuming from {path}"]
    if messages:
        raise ValueError(f"--resume auto: no checkpoint in {folder} can be used; move them away to start afresh. "
                         f"The first: {messages[0]}")
    return None, [f"--resume auto: no checkpoint in {folder} yet, starting afresh"]


def written_by(path: Path) -> str | None:
    """The script that wrote a checkpoint, from its first bytes; None for other files, and for damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                head = file.read(1 << 12)          # {"format": FORMAT, "script": ...}; nothing in it is executed
        texts = (value for code, value, _ in pickletools.genops(head) if code.name.endswith("BINUNICODE"))
        written, key, script = itertools.islice((text for text in texts if text != "format"), 3)
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, RuntimeError):
        return None
    return script if (written, key) == (FORMAT, "script") else None


def check_folder(folder: Path, script: str, advice: str, experiment: str | None = None) -> None:
    """ValueError where checkpoints of another script, or of an `experiment` of another name, lie in a run's folder:
    the run would write over them, or move them away. advice: which flag names another folder."""
    others: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.pth")):
        writer = written_by(path)
        if writer is not None and Path(writer).stem != Path(script).stem:
            others.setdefault(writer, []).append(path.name)
    if others:
        shown = "; ".join(f"{writer} ({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"
                          for writer, names in others.items())
        raise ValueError(f"{folder}: holds checkpoints of {shown}, and this is {Path(script).stem}.py; {advice}")
    last = folder / "model_last.pth"
    found = None
    if experiment is not None and written_by(last) is not None:
        with contextlib.suppress(ValueError):      # damaged: --resume says so
            found = load_checkpoint(last, script, map_location="meta")["config"].get("experiment_name")
    if found not in (None, experiment):
        raise ValueError(f"{folder}: holds checkpoints of the experiment {found!r}, and this is {experiment!r}; "
                         f"{advice}")


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", f"-1 {path.stem}")[-1])


# -- what to keep --------------------------------------------------------------

class CheckpointKeeper:
    """Which checkpoints of a run are kept: the last, the best, each `save_interval`-th epoch, the `keep_top_k` best.

    `state` is the dict of keyword arguments of `save_checkpoint`. Its entry `best` is filled in here, as of the
    moment of writing: after a resume, `keeper.load_state_dict(checkpoint["best"])`. Where one and the same `state`
    object goes to several names, the first file is copied (not linked: a second copy is for the day when the first is
    damaged); so make a new dict for each new state. 0 epochs or top-k: none.
    """

    def __init__(self, model_dir: str | Path, keep_top_k: int = 0, save_interval: int = 5, mode: str = "max"):
        if keep_top_k < 0 or save_interval < 0:
            raise ValueError(f"keep_top_k {keep_top_k}, save_interval {save_interval}: use 0 for none, or more")
        self.folder, self.keep_top_k, self.save_interval = Path(model_dir), keep_top_k, save_interval
        self.sign = _sign(mode)
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.counted = "epoch"                     # what the state's `epoch` counts
        self.top: list[list] = []                  # [score, epoch], best first
        self._state, self._key, self._files = None, None, []   # the last state, its version, and the files that hold it

    def save_all(self, state: dict, epoch: int | None = None, score: float | None = None) -> bool:
        """save_best_if where there is a score, save_epoch where there is an epoch, then save_last, from which a resume
        goes on; True where the score is the best."""
        best = score is not None and self.save_best_if(score, state)
        if epoch is not None:
            self.save_epoch(epoch, state)
        self.save_last(state)
        return best

    def best(self) -> str:
        """For the log: the best score and when it was reached."""
        return "none" if self.best_score is None else f"{self.best_score:.4f} ({self.counted} {self.best_epoch})"

    def save_last(self, state: dict) -> None:
        """Write model_last.pth."""
        self._save("model_last.pth", state)

    def save_epoch(self, epoch: int, state: dict) -> bool:
        """Write checkpoint_epoch_{epoch}.pth if `epoch` is a multiple of save_interval; True where written. Also
        checkpoint_top_{epoch}.pth, where a kill in the very first save left only model_best.pth to resume from."""
        due, top = self.save_interval > 0 and epoch % self.save_interval == 0, f"checkpoint_top_{epoch}.pth"
        if due:
            self._save(f"checkpoint_epoch_{epoch}.pth", state)
        if epoch in [kept for _, kept in self.top] and not (self.folder / top).is_file():
            self._save(top, state)
        return due

    def save_best_if(self, score: float, state: dict) -> bool:
        """Write model_best.pth if `score` is strictly better than all before; True where written.

        Among the `keep_top_k` best it also becomes checkpoint_top_{epoch}.pth, and the one that drops out is removed;
        that needs `epoch` in the state (ValueError). A score that is not finite is never good.
        """
        score, epoch, before = float(score), state.get("epoch"), self.state_dict()
        if not math.isfinite(score):
            return False
        if self.keep_top_k and epoch is None:
            raise ValueError("keep_top_k names its files by epoch, and the state has none")
        best = self.best_score is None or self.sign * (score - self.best_score) > 0
        if best:
            self.best_score, self.best_epoch = score, epoch
        if self.keep_top_k:
            others = [entry for entry in self.top if entry[1] != epoch]
            self.top = sorted([*others, [score, epoch]], key=lambda entry: -self.sign * entry[0])[:self.keep_top_k]
        names = ["model_best.pth"] * best + [f"checkpoint_top_{epoch}.pth"] * ([score, epoch] in self.top)
        if names and self._state is state:         # saved before it was scored: bring `best` in those files up to date
            names += [name for name in self._files if name not in names]
        try:
            for name in names:
                self._save(name, state)
        except BaseException:
            self.load_state_dict(before)
            raise
        for _, old in before["top"]:
            if old not in [kept for _, kept in self.top]:
                (self.folder / f"checkpoint_top_{old}.pth").unlink(missing_ok=True)
        return best

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.best_score, "epoch": self.best_epoch, "top": [list(entry) for entry in self.top]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best_score, self.best_epoch = state["score"], state["epoch"]
        self.top = [list(entry) for entry in state["top"]]

    def _save(self, name: str, state: dict) -> None:
        key = [state.get("epoch"), state.get("step"), self.state_dict(),    # _version counts in-place changes
               [tensor.is_inference() or tensor._version for tensor in state["model"].values()]]
        if self._state is not state or self._key != key or not (self.folder / self._files[-1]).is_file():
            save_checkpoint(self.folder / name, **{**state, "best": self.state_dict()})
            self._files = []
        elif name not in self._files:
            with open(self.folder / self._files[-1], "rb") as source, _replacing(self.folder / name) as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        self._state, self._key = state, key
        self._files = [*(other for other in self._files if other != name), name]


class EarlyStopping:
    """Stop after `patience` evaluations in a row without an improvement by more than `min_delta`; 0 or None: never."""

    def __init__(self, patience: int | None, mode: str = "max", min_delta: float = 0.0):
        if (patience or 0) < 0 or min_delta < 0:
            raise ValueError(f"early stopping: patience {patience}, min_delta {min_delta}: neither may be negative")
        self.patience, self.min_delta, self.sign = patience or 0, min_delta, _sign(mode)
        self.best: float | None = None
        self.waited = 0

    @property
    def reached(self) -> bool:
        """True when it is time to stop."""
        return 0 < self.patience <= self.waited

    def update(self, score: float) -> bool:
        """Take the score of one evaluation (NaN is no improvement); True when it is time to stop."""
        if math.isfinite(score) and (self.best is None or self.sign * (score - self.best) > self.min_delta):
            self.best, self.waited = float(score), 0
        else:
            self.waited += 1
        return self.reached

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def _sign(mode: str) -> int:
    if mode not in ("max", "min"):
        raise ValueError(f"mode {mode!r}: use 'max' for a score or 'min' for a loss")
    return 1 if mode == "max" else -1
