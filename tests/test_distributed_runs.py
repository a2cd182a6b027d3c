"""Whole runs of several processes against one: `pytest -m slow tests/test_distributed_runs.py`; the cheapest of all run by default.

Most pairs of processes are forked from the tests (see Forked) with the environment that torchrun would give them; where a launcher has
something to do (deaths, signals, restarts, two machines), it is the real one.
"""

import importlib

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from tests.tiny_runs import NAMES, last_checkpoint, run_forked, tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


# -- float16 -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name if name == "downstream" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_a_skipped_step_does_not_advance_the_schedule(folder, tmp_path, name):
    """The second of the steps overflows, as float16 does; what counts steps goes on."""
    def overflow():
        calls, scale, step, begin = [], torch.amp.GradScaler.scale, LRScheduler.step, LRScheduler._initial_step

        def infinite_once(self, loss):
            calls.append(1)
            return scale(self, loss) * (float("inf") if len(calls) == 2 else 1)

        torch.amp.GradScaler.scale = infinite_once
        LRScheduler.step = lambda self, *more: (print("schedule goes on"), step(self, *more))
        LRScheduler._initial_step = lambda self: (print("schedule begins"), begin(self))
        importlib.import_module(f"train_{name}").amp_settings = lambda *_: (None, torch.amp.GradScaler("cpu"))

    done = run_forked(tiny_run(name, folder, epochs=1), tmp_path / "out", hook=overflow)
    assert done.code == 0, done.stderr
    checkpoint = last_checkpoint(tmp_path / "out")
    assert checkpoint["scaler"]["scale"] == 2.0 ** 15 and checkpoint["step"] >= 3
    begins, steps = (done.stdout.count(f"schedule {word}\n") for word in ("begins", "goes on"))       # the first is a step of its own
    assert begins >= 1 and steps == begins + checkpoint["step"] - 1
