"""--profile N: what counts in which phase, and that a run does not change by it."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.test_run import entries, same, train
from tests.tiny_runs import NAMES, run_forked, same_weights, tiny_run
from utils import step_times
from utils.step_times import PHASES, StepTimes


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: now.seconds)
    return now


def step(times, clock, seconds, number):
    """A step of two micro-batches whose phases take the given seconds, each."""
    for phase in ("data", "prepare"):
        times.enter(phase)
        clock.seconds += seconds[phase]
    for micro_batch in range(2):
        with times.forward(torch.no_grad()):
            assert not torch.is_grad_enabled()
            clock.seconds += seconds["forward"]
        for phase in ("loss", "backward", *(["prepare"] if micro_batch == 0 else [])):
            times.enter(phase)
            clock.seconds += seconds[phase]
    times.enter("update")
    clock.seconds += seconds["update"]
    return times.end_step(number)


def test_means_and_shares_without_the_first_step(clock):
    times = StepTimes(2, torch.device("cpu"))
    slow = dict.fromkeys(PHASES, 50.0)
    seconds = {"data": 1.0, "prepare": 0.25, "forward": 0.5, "loss": 0.125, "backward": 1.0, "update": 0.5}
    assert step(times, clock, slow, 7) is None and step(times, clock, seconds, 8) is None
    clock.seconds += 1000                                       # an evaluation
    times.pause()
    title, *lines = step(times, clock, {**seconds, "data": 2.0}, 9).splitlines()
    assert "steps 8 to 9" in title
    rows = {line[:24].strip(): [float(number) for number in re.findall(r"[0-9.]+", line[24:])] for line in lines}
    means = dict(zip(PHASES.values(), (1.5, 0.5, 1.0, 0.25, 2.0, 0.5), strict=True))
    total = sum(means.values())
    assert rows == {name: [mean, pytest.approx(100 * mean / total, abs=0.06)] for name, mean in {**means, "total": total}.items()}
    times.enter("data")                                         # and then nothing is measured any more
    clock.seconds += 5
    assert step(times, clock, seconds, 10) is None and sum(times.seconds.values()) == 2 * total


def test_nothing_is_measured_unless_asked(clock):
    times = StepTimes(0, torch.device("cpu"))
    assert step(times, clock, dict.fromkeys(PHASES, 1.0), 1) is None and not any(times.seconds.values())


def test_a_profiled_run_is_the_same_run(tmp_path, capsys):
    train(tmp_path / "plain")
    assert "where the time" not in capsys.readouterr().out
    train(tmp_path / "timed", "--profile", 2)
    printed = capsys.readouterr().out.splitlines()
    at, = (number for number, line in enumerate(printed) if line.startswith("where the time of steps 2 to 3 went"))
    assert [line[:24].strip() for line in printed[at + 1:at + 8]] == [*PHASES.values(), "total"]
    assert printed[at + 8].startswith("step 3/4")
    same(entries(tmp_path / "plain"), entries(tmp_path / "timed"))
    assert (tmp_path / "plain/log/log.jsonl").read_bytes() == (tmp_path / "timed/log/log.jsonl").read_bytes()


# The others are slow: two runs of every script take a minute.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "prototype" else pytest.mark.slow) for name in NAMES])
def test_every_script_shows_where_its_time_goes(name, tmp_path):
    run = tiny_run(name, tmp_path)
    timed, plain = run_forked(run, tmp_path / "timed", "--profile", "1"), run_forked(run, tmp_path / "plain")
    assert timed.code == plain.code == 0, timed.stderr
    lines = timed.stdout[timed.stdout.index("where the time of steps 2 to 2 went"):].splitlines()[1:8]
    seconds = {line[:24].strip(): float(line[24:].split()[0]) for line in lines}
    assert list(seconds) == [*PHASES.values(), "total"] and min(seconds["forward"], seconds["backward"], seconds["update"]) > 0
    assert same_weights(tmp_path / "timed", tmp_path / "plain")
