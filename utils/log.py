"""What a run leaves to read: lines on the terminal and in train.log, one JSON line per evaluation, TensorBoard."""

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from utils.distributed import is_main
from utils.files import replacing

QUIET = 30.0            # seconds: something is printed at least this often


class RunLog:
    """Writes `train.log` (text), `log.jsonl` (one line per evaluation) and TensorBoard events into `log_dir`.

    rank: only 0 prints or writes. tensorboard: off leaves the events out. resume_step: continue the files of an earlier
    run at this step: records and TensorBoard points after it are dropped, so that curves do not double; a record at it
    that comes again is replaced. None: files of an earlier run are moved to `log_dir/previous_N`.
    total_steps: for "120/3000" and the ETA.
    wandb: None, or the keyword arguments of wandb.init; ValueError where wandb or tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike, rank: int = 0, tensorboard: bool = True,
                 total_steps: int | None = None, wandb: Mapping[str, Any] | None = None,
                 resume_step: int | None = None):
        self.dir = Path(log_dir)
        self.rank = rank
        self.total_steps = total_steps
        self._text = self._records = self._board = self._wandb = None
        self._start = self._last = (time.monotonic(), resume_step or 0)      # (seconds, step)
        self._printed = time.monotonic()
        self._resumed_at = set()                                             # the records at resume_step
        self._gone = False                                                   # noted: the terminal, or the pipe
        self._recent: deque[float] = deque(maxlen=9)                         # seconds per step, last intervals
        if rank != 0:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            kept = _rewrite(self.dir / "log.jsonl", lambda record: record["step"] <= resume_step)
            self._resumed_at = {_key(record) for record in kept if record["step"] == resume_step}
        else:
            set_aside(self.dir, "train.log", "log.jsonl", "events.out.tfevents.*")
        self._text = open(self.dir / "train.log", "ab", buffering=0)
        self._records = open(self.dir / "log.jsonl", "ab", buffering=0)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(f"TensorBoard cannot be imported ({error}): pip install tensorboard") from error
            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(self.dir), purge_step=purge)
        if wandb is not None:
            try:
                import wandb as wandb_module
            except ImportError as error:
                raise ValueError(f"--wandb: wandb cannot be imported ({error}): pip install wandb") from error
            self._wandb = wandb_module.init(**wandb)

    def info(self, message: str) -> None:
        """Print a line at once, also into a pipe, and add it with the time to train.log. OSError names the file that
        cannot be written; a terminal or pipe that has gone is noted there once (see utils.cli.Output)."""
        if self.rank != 0:
            return
        print(message, flush=True)
        self._printed = time.monotonic()
        self._add(message)
        if (gone := getattr(sys.stdout, "gone", None)) and not self._gone:
            self._gone = True
            self._add(f"note: nothing can be printed any more ({gone}); the run goes on, this file has every line")

    def _add(self, line: str) -> None:
        _append(self._text, f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")

    def train_step(self, step: int, **scalars: float) -> None:
        """Print one line; the scalars also go to TensorBoard as train/NAME.

        s/step is the median over the last lines, without evaluations (see pause); the ETA uses the mean since the
        start, which counts them. A tensor is read here, which waits for the GPU.
        """
        if self.rank != 0:
            return
        now = time.monotonic()
        scalars = {name: _number(value) for name, value in scalars.items()}
        if step > self._last[1]:
            self._recent.append((now - self._last[0]) / (step - self._last[1]))
        self._print_step(step, [f"{name} {_format(name, value)}" for name, value in scalars.items()], now)
        self._last = (now, step)
        self.scalars(step, {f"train/{name}": value for name, value in scalars.items()})

    def still_running(self, step: int) -> None:
        """Print a line without numbers, of a step that train_step leaves out, where nothing was for QUIET seconds."""
        if self.rank == 0 and time.monotonic() - self._printed >= QUIET:
            self._print_step(step, [], time.monotonic())

    def pause(self, step: int) -> None:
        """What was done since `step` (an evaluation, a checkpoint) counts in no s/step."""
        self._last = (time.monotonic(), step)

    def _print_step(self, step: int, parts: list[str], now: float) -> None:
        parts = [f"step {step}" if self.total_steps is None else f"step {step}/{self.total_steps}", *parts]
        if step > self._last[1]:
            seconds = statistics.median(self._recent or [(now - self._last[0]) / (step - self._last[1])])
            parts.append(f"{seconds:.2f} s/step" if seconds >= 0.1 else f"{seconds:.2g} s/step")
            if self.total_steps is not None:
                pace = (now - self._start[0]) / (step - self._start[1])
                parts.append(f"ETA {timedelta(seconds=round(pace * max(self.total_steps - step, 0)))}")
        self.info("  ".join(parts))

    def evaluation(self, epoch: int, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Add {"epoch", "step", "split", **metrics} to log.jsonl; single numbers also go to TensorBoard as SPLIT/NAME.

        metrics: numbers, text, lists, dicts, arrays, tensors. Not a number and infinite become null.
        """
        if self.rank != 0:
            return
        taken = {"epoch", "step", "split"} & set(metrics)
        assert not taken, f"metrics may not be named {taken}: log.jsonl has these keys"
        record = _plain({"epoch": epoch, "step": step, "split": split, **metrics})
        if _key(record) in self._resumed_at:       # it ended after writing this record and before its checkpoint
            self._records.close()
            _rewrite(self.dir / "log.jsonl", lambda other: _key(other) != _key(record))
            self._records = open(self.dir / "log.jsonl", "ab", buffering=0)
        _append(self._records, json.dumps(record, allow_nan=False) + "\n")
        numbers = {name: record[name] for name in metrics if type(record[name]) in (int, float)}
        self.scalars(step, {f"{split}/{name}": value for name, value in numbers.items()})

    def epoch(self, epoch: int, step: int, seconds: float, shown: Mapping[str, str], terms: Iterable[str],
              train: Mapping[str, Any], val: Mapping[str, Any] | None = None, val_seconds: float = 0.0) -> None:
        """Records of an epoch's training and of its evaluation, if there was one, and a line for each on the console
        with the loss and the metrics named by shown, {label: name}; of training also the `terms` of its loss."""
        self.evaluation(epoch, step, "train", train)
        parts = ", ".join(f"{name} {train[name]:.4f}" for name in terms if name not in ("loss", "total"))
        line = f"Epoch {epoch}: {_shown('Train', shown, train)}{f' ({parts})' if parts else ''}"
        if val is not None:
            self.evaluation(epoch, step, "val", val)
            line += f"\n          {_shown('Val', shown, val)} (evaluation {val_seconds:.2f} s)"
        self.info(f"{line} ({seconds:.2f} s)")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """TensorBoard only (and wandb): {"Loss/train": 0.4, ...} at `step`."""
        if self.rank != 0:
            return
        values = {name: _number(value) for name, value in values.items()}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Write out and close everything; a second call does nothing."""
        for part in (self._text, self._records, self._board):
            if part is not None:
                part.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._text = self._records = self._board = self._wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def progress(iterable: Iterable, description: str, total: int | None = None) -> Iterable:
    """A tqdm bar on stderr, or, where that is no terminal, a line every QUIET seconds; in the first process only."""
    if is_main() and not sys.stderr.isatty():
        return _with_lines(iterable, description, total)
    return tqdm(iterable, description, total, disable=not is_main(), mininterval=2, leave=False, file=sys.stderr)


def _with_lines(iterable: Iterable, description: str, total: int | None) -> Iterator:
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    printed = time.monotonic()
    for number, item in enumerate(iterable):
        if time.monotonic() - printed >= QUIET:
            print(f"{description}: {number}{'' if total is None else f' of {total}'}", file=sys.stderr, flush=True)
            printed = time.monotonic()
        yield item


def shortened(lines: Sequence[str], most: int = 10) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:most], *([f"... and {len(lines) - most} more such lines"] if len(lines) > most else [])]


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a log.jsonl, each a dict with its step. A last line cut off by a crash is left out; ValueError
    names a broken line before."""
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError("a record with its step is expected")
                records.append(record)
        except (ValueError, RecursionError) as error:
            if number < len(lines):                            # a whole line ends with a newline, so that "" follows it
                raise ValueError(f"{path}: line {number} is not a record ({error}): {line[:60]!r}") from error
    return records


def _shown(split: str, shown: Mapping[str, str], numbers: Mapping[str, Any]) -> str:
    names = {"Loss": "loss", **shown}
    return ", ".join(f"{split} {label}: {numbers[name]:.4f}" for label, name in names.items() if name in numbers)


def _key(record: Mapping) -> tuple:
    return tuple(record.get(name) for name in ("epoch", "step", "split"))


def _rewrite(path: Path, keep: Callable[[dict], bool]) -> list[dict]:
    """Drop the records that `keep` is false for, and a torn last line, in one rename; returns the others."""
    if not path.exists():
        return []
    records = [record for record in read_log(path) if keep(record)]
    with replacing(path, text=True) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    return records


def set_aside(folder: Path, *patterns: str) -> Path | None:
    """Move an earlier run's files into the first free folder/previous_N, in case --resume was only forgotten; returns
    that folder, or None where there are none."""
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    if not found:
        return None
    number = 1
    while (folder / f"previous_{number}").exists():
        number += 1
    aside = folder / f"previous_{number}"
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


def _append(file: IO[bytes], text: str) -> None:
    """Write at once, without a buffer that would be tried again when the file is closed."""
    content = text.encode("utf-8", "backslashreplace")      # names of files need not be UTF-8
    try:
        while content:
            content = content[file.write(content):]
    except OSError as error:                                # a full disk has no name
        error.filename = file.name
        raise


def _number(value: Any) -> float:
    return value.item() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value


def _format(name: str, value: float) -> str:
    if isinstance(value, int):
        return str(value)
    small = 0 < abs(value) < 1e-3 or abs(value) >= 1e5
    return f"{value:.2e}" if small or "lr" in name.split("_") else f"{value:.4f}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
