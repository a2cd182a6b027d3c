"""Thousands of steps of every training script: memory, open files, threads and files of the run folder do not grow.

Each script runs in a child of this process, which is measured from within, every 20 optimiser steps: so a measurement never falls into
the writing of a checkpoint. An epoch has 50 steps, then come an evaluation and the checkpoints: 40 of each.
"""

import itertools
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.tiny_heads import SMALL
from tests.tiny_runs import NAMES, report, run_forked, tiny_run
from utils.prototype_scripts import STAGES

STEPS, EVERY, EPOCHS = 2000, 20, 40
FIELDS = ("step", "memory", "handles", "threads", "files", "logged")
GROWTH = 0.02                           # of the memory: 10 MB, or 8 kB a step
MORE = {"downstream": ["checkpointing.save_interval=0", "checkpointing.save_top_k=2"], "jepa": ["checkpointing.save_interval=0", "probe.interval=5"],
        "sonata": ["checkpointing.save_interval=0"], "segmentation": ["checkpointing.save_interval=0", "checkpointing.save_top_k=2"],
        "prototype": [f"training.steps=[{EVERY},{STEPS},{EVERY}]", f"evaluation.interval={STEPS // EPOCHS}"],        # all measured is its longest stage
        **{name: ["--save-interval", "0", "--log-interval", "10"] for name in NAMES if f"train_{name}" in SMALL}}
LOG = {"segmentation": ["logging.log_every_n_steps=10", "logging.tensorboard=true"],
       **{name: ["logging.log_interval=10", "logging.tensorboard=true"] for name in ("downstream", "jepa", "sonata", "prototype")}}


def measure(out: Path, into: Path, leak=None):
    """The hook of a child: a line of FIELDS in `into` every EVERY steps; leak(step) does harm at every step."""
    count, page = itertools.count(1), os.sysconf("SC_PAGESIZE")
    file = open(into, "w", buffering=1)
    tempfile.tempdir = str(into.parent / "temporary")
    os.mkdir(tempfile.tempdir)

    def after_step(*_):
        step = next(count)
        if leak is not None:
            leak(step)
        if step % EVERY == 0:
            found = [path for path in out.rglob("*") if path.is_file()]
            logged = sum(path.stat().st_size for path in found if path.parent.name == "log")
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * page
            print(step, memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(found), logged, file=file)

    register_optimizer_step_post_hook(after_step)


def windows(rows: list[dict], steps: int) -> list[list[dict]]:
    """An early window, after the warm-up, and the last one."""
    return [[row for row in rows if start * steps <= row["step"] <= (start + 0.2) * steps] for start in (0.2, 0.8)]


def growth(rows: list[dict], name: str, steps: int = STEPS, of=max) -> tuple[float, float]:
    return tuple(of(row[name] for row in window) for window in windows(rows, steps))


def problems(rows: list[dict], steps: int = STEPS) -> list[str]:
    """What grew from the early to the last window; rows: a dict of FIELDS every EVERY steps."""
    if not rows or rows[-1]["step"] < steps - EVERY:
        return [f"measured up to step {rows[-1]['step'] if rows else 0} of {steps}"]
    found = []
    before, after = growth(rows, "memory", steps, statistics.median)
    if after > before * (1 + GROWTH):
        found.append(f"memory {after / before - 1:+.1%}")
    for name in ("handles", "threads", "files"):
        before, after = growth(rows, name, steps)
        if after > before:
            found.append(f"{name} {before} -> {after}")
    before, after = (window[-1]["logged"] - window[0]["logged"] for window in windows(rows, steps))
    if not 0 < after < 1.3 * before + 1000:
        found.append(f"log {before} -> {after} bytes in {steps // 5} steps")
    return found


def multiply(data: Path, count: int) -> None:
    """Copies of the training files, images with their masks, until there are `count`."""
    for folder in (path for path in data.rglob("*") if path.is_dir() and "train" in path.relative_to(data).parts):
        stems = sorted({file.stem for file in folder.iterdir() if file.is_file()})
        for number in range(len(stems), count):
            for file in folder.glob(f"{stems[number % len(stems)]}.*") if stems else ():
                shutil.copy(file, folder / f"copy_{number:03d}{file.suffix}")


def long_run(name: str, folder: Path, workers: int = 0, steps: int = STEPS, leak=None) -> tuple[Path, list[dict]]:
    run = tiny_run(name, folder, epochs=EPOCHS * steps // STEPS, batch_size=2, workers=workers)
    multiply(run.data, 2 * STEPS // EPOCHS)
    out, into = folder / "out", folder / "measured.txt"
    done = run_forked(run, out, *LOG.get(name, []), *MORE[name], hook=lambda: measure(out, into, leak), timeout=3600)
    assert done.code == 0, done.stderr
    return out, [dict(zip(FIELDS, map(int, line.split()), strict=True)) for line in into.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name, workers", [*((name, 0) for name in NAMES), ("segmentation", 1)])
def test_nothing_grows(tmp_path, name, workers):
    out, rows = long_run(name, tmp_path, workers)
    (memory, later), (handles, more) = growth(rows, "memory", of=statistics.median), growth(rows, "handles")
    report(f"long run train_{name}.py{f', {workers} worker' * bool(workers)}: {STEPS} steps, memory {later / memory - 1:+.1%}, handles {more - handles:+d}")
    assert problems(rows) == []
    kept = {path.name for path in (out / "model").iterdir()} - {f"{stage}.pth" for stage in STAGES}
    assert {"model_best.pth", "model_last.pth"} <= kept and len(kept) <= 4                          # and the 2 best where asked for
    assert not list(out.rglob("*tmp*")) and len(list((tmp_path / "temporary").iterdir())) <= workers    # the socket of a worker
    assert (out / "log" / "train.log").stat().st_size < 300 * (STEPS // 10) + 3000 * (EPOCHS + 10)
    assert (out / "log" / "log.jsonl").stat().st_size < 5000 * (EPOCHS + 10)


@pytest.mark.slow
def test_a_planted_leak_is_found(tmp_path):
    """130 kB at every step, at every 50th an open file and a file too many."""
    kept = []

    def leak(step):
        kept.append([float(step + i) for i in range(4000)])
        if step % 50 == 0:
            kept.append(open(os.devnull))
            (tmp_path / "out" / f"left_{step}").touch()

    _, rows = long_run("downstream", tmp_path, steps=STEPS // 4, leak=leak)
    found = problems(rows, STEPS // 4)
    assert [problem.split()[0] for problem in found] == ["memory", "handles", "files"], found


def steady(**growth):
    """Rows as a good run gives them, but `growth` of each field with every step."""
    base = {"step": 0, "memory": 4e8, "handles": 20, "threads": 5, "files": 9, "logged": 0}
    return [{name: base[name] + {"step": 1, "logged": 30, **growth}.get(name, 0) * step for name in FIELDS} for step in range(EVERY, STEPS + 1, EVERY)]


def test_what_grows_is_told():
    assert problems(steady()) == []
    for name, growth in (("memory", 8000), ("handles", 0.01), ("threads", 0.01), ("files", 0.02)):
        assert [problem.split()[0] for problem in problems(steady(**{name: growth}))] == [name]
    quadratic = [{**row, "logged": row["step"] ** 2} for row in steady()]
    assert [problem.split()[0] for problem in problems(quadratic)] == ["log"]
    assert "measured up to step" in problems(steady()[:50])[0]
