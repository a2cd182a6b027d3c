import io
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import log as log_module
from utils.log import RunLog, progress, read_log


def curves(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds
    return wait


# -- text ----------------------------------------------------------------------


def test_info_prints_and_keeps_the_time_in_the_file_only(tmp_path, capsys):
    with RunLog(tmp_path / "a" / "log", tensorboard=False) as log:
        log.info("device cpu")
        assert capsys.readouterr().out == "device cpu\n"
        text = (tmp_path / "a" / "log" / "train.log").read_text()          # written at once, not only when closed
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d device cpu\n", text)


def test_a_printed_line_leaves_at_once_also_into_a_file(tmp_path, monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    RunLog(tmp_path, tensorboard=False).info("step 1")
    assert file.getvalue() == b"step 1\n"


def test_a_train_step_line(tmp_path, capsys, clock):
    log = RunLog(tmp_path, tensorboard=False, total_steps=3000)
    clock(25.2)
    log.train_step(120, loss=torch.tensor(0.43121), lr=1e-3)
    log.train_step(120, lr_backbone=0.5, grad_norm=np.float32(2), tiny=1.5e-5, n=7, zero=0.0)
    assert capsys.readouterr().out.splitlines() == [
        "step 120/3000  loss 0.4312  lr 1.00e-03  0.21 s/step  ETA 0:10:05",
        "step 120/3000  lr_backbone 5.00e-01  grad_norm 2.0000  tiny 1.50e-05  n 7  zero 0.0000"]


def test_pace_does_not_count_evaluations_but_the_eta_does(tmp_path, capsys, clock):
    """Every interval has one here, so that no median is rid of them."""
    log = RunLog(tmp_path, tensorboard=False, total_steps=60)
    for step in (10, 20, 30, 40):
        clock(0.5)
        log.pause(step - 5)
        clock(24.0)                                            # an evaluation
        log.pause(step - 5)
        clock(0.5)
        log.train_step(step)
    assert capsys.readouterr().out.splitlines()[-1] == "step 40/60  0.10 s/step  ETA 0:00:50"


def test_a_line_every_30_seconds_between_those_of_the_log_interval(tmp_path, capsys, clock):
    log = RunLog(tmp_path, tensorboard=False, total_steps=100)
    for step in range(1, 8):
        clock(12.0)
        log.still_running(step)
    log.train_step(8, loss=0.5)
    clock(29.0)
    log.still_running(9)
    RunLog(tmp_path / "other", rank=1).still_running(9)
    assert capsys.readouterr().out.splitlines() == ["step 3/100  12.00 s/step  ETA 0:19:24", "step 6/100  12.00 s/step  ETA 0:18:48",
                                                    "step 8/100  loss 0.5000  10.50 s/step  ETA 0:16:06"]
    assert not (tmp_path / "log.jsonl").read_text() and "step 6/100" in (tmp_path / "train.log").read_text()


def test_pace_after_resuming_counts_from_the_resumed_step(tmp_path, capsys, clock):
    log = RunLog(tmp_path, tensorboard=False, total_steps=1000, resume_step=900)
    clock(5.0)
    log.train_step(950)
    log.train_step(950)                                        # the same step again: no division by zero
    assert capsys.readouterr().out.splitlines() == ["step 950/1000  0.10 s/step  ETA 0:00:05", "step 950/1000"]


def test_without_a_total_there_is_no_eta(tmp_path, capsys, clock):
    log = RunLog(tmp_path, tensorboard=False)
    clock(1.0)
    log.train_step(3, loss=float("nan"))
    assert capsys.readouterr().out == "step 3  loss nan  0.33 s/step\n"


# -- records -------------------------------------------------------------------


def test_an_evaluation_is_one_strict_json_line(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    metrics = {"miou": np.float64(0.5), "iou": np.array([1.0, np.nan]), "accuracy": torch.tensor([0.25, torch.inf]),
               "loss": float("nan"), "matrix": np.eye(2, dtype=np.int64), "present": np.array([True, False]),
               "nested": {3: (np.int32(1), "x")}, "file": Path("a/b"), "note": None, "scalar": torch.tensor(2)}
    log.evaluation(2, 100, "val", metrics)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()  # before close
    assert len(lines) == 1
    assert json.loads(lines[0], parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) == {
        "epoch": 2, "step": 100, "split": "val", "miou": 0.5, "iou": [1.0, None], "accuracy": [0.25, None],
        "loss": None, "matrix": [[1, 0], [0, 1]], "present": [True, False], "nested": {"3": [1, "x"]}, "file": "a/b",
        "note": None, "scalar": 2}
    assert read_log(tmp_path / "log.jsonl") == [json.loads(lines[0])]


def test_a_metric_may_not_take_a_records_own_name(tmp_path):
    with pytest.raises(AssertionError, match="step"):
        RunLog(tmp_path, tensorboard=False).evaluation(1, 1, "val", {"step": 3})


def test_read_log_leaves_out_a_torn_last_line_only(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"step": 3, "mi')
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n2')
    assert read_log(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(ValueError, match="log.jsonl: line 2 is not a record"):
        read_log(path)
    path.write_text('{"step": 1}\n{"step": 2,\n')              # whole, but broken: no crash writes this
    with pytest.raises(ValueError, match="line 2"):
        read_log(path)
    for line in (b"5", b'{"epoch": 1}', b"\xff{}", b"[" * 5000, b'{"step": ' + b"1" * 5000 + b"}"):
        path.write_bytes(line + b'\n{"step": 1}\n')
        with pytest.raises(ValueError, match="log.jsonl: line 1 is not a record"):
            read_log(path)
    path.write_text("")
    assert read_log(path) == []
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "none.jsonl")


# -- TensorBoard ---------------------------------------------------------------


def test_tensorboard_has_all_curves(tmp_path):
    with RunLog(tmp_path) as log:
        log.train_step(1, loss=torch.tensor(0.5), lr=1e-2)
        log.scalars(1, {"Loss/train": np.float32(0.25)})
        log.evaluation(1, 2, "val", {"miou": 0.75, "iou": [1.0], "loss": float("nan"), "name": "x", "ok": True})
    assert curves(tmp_path) == {"train/loss": [(1, 0.5)], "train/lr": [(1, 0.01)], "Loss/train": [(1, 0.25)],
                                "val/miou": [(2, 0.75)]}


def test_tensorboard_can_be_left_out(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.train_step(1, loss=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "train.log"]


def test_tensorboard_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="TensorBoard cannot be imported .*: pip install tensorboard"):
        RunLog(tmp_path)


# -- continuing ----------------------------------------------------------------


def run_steps(folder, first, last, **options):
    with RunLog(folder, **options) as log:
        for step in range(first, last + 1):
            log.train_step(step, loss=step)
            log.evaluation(step, step, "val", {"miou": step / 100})


def test_resuming_at_an_earlier_step_leaves_no_double_curves(tmp_path):
    run_steps(tmp_path, 1, 6)                                  # ended at 6, last checkpoint at 4
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 7, "st')                         # and crashed while writing
    run_steps(tmp_path, 5, 8, resume_step=4)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == list(range(1, 9))
    found = curves(tmp_path)
    assert found["train/loss"] == [(step, float(step)) for step in range(1, 9)]
    assert found["val/miou"] == [(step, step / 100) for step in range(1, 9)]
    assert len((tmp_path / "train.log").read_text().splitlines()) == 6 + 4         # the text keeps its history


def test_a_record_whose_checkpoint_was_not_written_is_not_doubled(tmp_path):
    """A stage without steps of its own: killed between its record and its checkpoint, it comes again at the same step."""
    for push, later in ((0.5, []), (0.6, [(2, 6, 0.7)])):
        with RunLog(tmp_path, tensorboard=False, resume_step=4) as log:
            for epoch, step, miou in ([(0, 4, 0.4)] if not later else []) + [(1, 4, push), *later]:
                log.evaluation(epoch, step, "val", {"miou": miou})
    assert [(r["epoch"], r["step"], r["miou"]) for r in read_log(tmp_path / "log.jsonl")] == [(0, 4, 0.4), (1, 4, 0.6), (2, 6, 0.7)]
    assert not list(tmp_path.glob("*.tmp"))


def test_resuming_works_in_a_new_folder(tmp_path):
    run_steps(tmp_path / "a", 6, 6, tensorboard=False, resume_step=5)
    assert len(read_log(tmp_path / "a" / "log.jsonl")) == 1


def test_a_fresh_start_sets_the_old_files_aside(tmp_path):
    for last in (3, 2, 1):
        run_steps(tmp_path, 1, last)
    steps = [len(read_log(tmp_path / name / "log.jsonl")) for name in ("previous_1", "previous_2", ".")]
    assert steps == [3, 2, 1]
    assert len(curves(tmp_path / "previous_1")["val/miou"]) == 3
    events = [path for path in tmp_path.iterdir() if path.name.startswith("events.")]
    assert len(events) == 1 and len((tmp_path / "train.log").read_text().splitlines()) == 1


# -- other ranks, closing, wandb -----------------------------------------------


def test_other_ranks_print_and_write_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "log", rank=1, wandb={"project": "x"}) as log:
        log.info("x")
        log.train_step(1, loss=0.5)
        log.evaluation(1, 1, "val", {"miou": 0.5})
        log.scalars(1, {"a": 1.0})
    assert capsys.readouterr().out == "" and not (tmp_path / "log").exists()


def test_close_twice(tmp_path):
    log = RunLog(tmp_path)
    log.close()
    log.close()


def test_wandb_gets_the_scalars(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)),
                                finish=lambda: calls.append("finish"))

    def init(**options):
        calls.append(options)
        return run
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with RunLog(tmp_path, tensorboard=False, wandb={"project": "segheads"}) as log:
        log.train_step(1, loss=torch.tensor(0.5))
        log.evaluation(1, 2, "val", {"miou": 0.75})
        log.close()                                            # and once more at the end of the block
    assert calls == [{"project": "segheads"}, (1, {"train/loss": 0.5}), (2, {"val/miou": 0.75}), "finish"]


def test_wandb_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb: wandb cannot be imported .*: pip install wandb"):
        RunLog(tmp_path, tensorboard=False, wandb={})


# -- progress ------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, rank, shown", [(Terminal, 0, True), (Terminal, 1, False), (io.StringIO, 0, False)])
def test_a_bar_on_a_terminal_of_the_first_process_only(monkeypatch, capsys, stream, rank, shown):
    output = stream()
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(log_module, "is_main", lambda: rank == 0)
    assert list(progress(iter([1, 2, 3]), "val", total=3)) == [1, 2, 3]
    assert ("val:   0%" in output.getvalue()) == shown and bool(output.getvalue()) == shown
    assert capsys.readouterr().out == ""


def test_lines_in_place_of_the_bar_where_nobody_could_see_it(monkeypatch, capsys, clock):
    items = progress(iter("abcdef"), "evaluating", total=6)
    for item in items:
        assert item in "abcdef"
        clock(11.0)
    assert capsys.readouterr().err.splitlines() == ["evaluating: 3 of 6"]
    for _ in progress((number for number in range(4)), "push"):
        clock(16.0)
    assert capsys.readouterr().err.splitlines() == ["push: 2"]
