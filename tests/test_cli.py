import argparse
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from utils.cli import (
    ROOT,
    ArgumentParser,
    StopRequested,
    StopSignal,
    Terminated,
    flags_config,
    flags_defaults,
    given_flags,
    run_main,
    user_message,
)
from utils.config import override_config


def make_parser():
    parser = ArgumentParser(prog="train.py", description="Train.\n\n    python train.py CONFIG")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--pretrained_path")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=int, default=4, help="per process")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--drop-last", action=argparse.BooleanOptionalAction, default=False)
    group.add_argument("--amp-dtype", choices=["float32", "bfloat16"])
    return parser


def failure(capsys, *argv, parser=None):
    with pytest.raises(SystemExit) as stop:
        (parser or make_parser()).parse_args(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err.strip()


# -- ArgumentParser ------------------------------------------------------------


@pytest.mark.parametrize("argv", [
    ["c.yaml", "--pretrained_path", "p", "--batch-size", "2"],
    ["c.yaml", "--pretrained-path", "p", "--batch_size", "2"],
    ["--batch_size=2", "c.yaml", "--pretrained-path=p"], ["--pretrained-path=p", "--batch-size=2", "c.yaml"],
])
def test_hyphens_and_underscores_are_the_same(argv):
    args = make_parser().parse_args(argv)
    assert (args.config, args.pretrained_path, args.batch_size, args.overrides) == ("c.yaml", "p", 2, [])


def test_values_keep_their_spelling_and_no_flags_have_both_spellings():
    args = make_parser().parse_args(["c", "--pretrained_path=a_b-c=d_e", "--no-amp", "--drop_last", "x.y_z=--a_b"])
    assert args.pretrained_path == "a_b-c=d_e" and args.overrides == ["x.y_z=--a_b"]
    assert args.amp is False and args.drop_last is True
    assert make_parser().parse_args(["c", "--no_drop_last"]).drop_last is False


def test_positional_arguments_may_stand_between_flags():
    argv = ["--amp", "c.yaml", "a.b=1", "--batch-size", "2", "c.d=-3", "--pretrained_path", "p", "e=f"]
    args = make_parser().parse_args(argv)
    assert (args.config, args.overrides, args.batch_size) == ("c.yaml", ["a.b=1", "c.d=-3", "e=f"], 2)


def test_after_two_hyphens_everything_is_positional():
    assert make_parser().parse_args(["c", "--", "--batch_size"]).overrides == ["--batch_size"]


def test_a_parser_without_positional_arguments_reads_sys_argv(monkeypatch):
    parser = ArgumentParser()
    parser.add_argument("--output-dir")
    monkeypatch.setattr(sys, "argv", ["x", "--output_dir", "o"])
    assert parser.parse_args().output_dir == "o"
    unknown = parser.parse_known_args(["--output_dir", "o", "--new_flag", "--output", "x"])[1]
    assert unknown == ["--new_flag", "--output", "x"]           # no abbreviations


@pytest.mark.parametrize("argv, expected", [
    (["c", "--batch-sizes", "2"], "unknown flag --batch-sizes; did you mean --batch-size?"),
    (["c", "--batch", "2"], "unknown flag --batch; did you mean --batch-size?"),
    (["c", "--no-am"], "unknown flag --no-am; did you mean --no-amp or --amp?"),
    (["--zzzzz=3", "c"], "unknown flag --zzzzz"),
    (["c", "--optim.lr=3"], "unknown flag --optim.lr; write optim.lr=VALUE without hyphens"),
    (["c", "-z"], "unexpected argument: -z"),
    ([], "the following arguments are required: config"),
    (["c", "--batch-size", "two"], "argument --batch-size: invalid int value: 'two'"),
])
def test_errors_are_one_line_with_the_nearest_flag(capsys, argv, expected):
    assert failure(capsys, *argv) == f"error: {expected} (see train.py --help)"


def test_a_misspelt_required_flag_is_not_reported_as_missing(capsys):
    parser = ArgumentParser(prog="train.py")
    parser.add_argument("--output-dir", required=True)
    assert failure(capsys, "--outptu-dir", "x", parser=parser) == (
        "error: unknown flag --outptu-dir; did you mean --output-dir? (see train.py --help)")
    assert failure(capsys, "stray", "--output-dir", "x", parser=parser) == (
        "error: unexpected argument: stray (see train.py --help)")


def test_help_keeps_the_layout_of_the_description(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "Train.\n\n    python train.py CONFIG\n" in out and "--batch-size BATCH_SIZE" in out
    assert "--batch_size" not in out                           # each flag once


# -- run -----------------------------------------------------------------------


def outcome(capsys, monkeypatch, error, argv=("train.py",)):
    """Exit status and stderr of run_main() for a main that raises `error`; the error itself where run lets it through."""
    def main():
        raise error
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(BaseException) as caught:
        run_main(main)
    return caught.value.code if isinstance(caught.value, SystemExit) else caught.value, capsys.readouterr().err


LESS_MEMORY = "lower the batch or crop size, or use --amp-dtype bfloat16"


def test_run_returns_after_success(capsys):
    assert run_main(lambda: {"miou": 0.5}) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error, line", [
    (ValueError("labels.npy: 3 labels\n  for 4 faces"), "error: labels.npy: 3 labels for 4 faces"),
    (FileNotFoundError("model.pth: no such checkpoint"), "error: model.pth: no such checkpoint"),
    (FileNotFoundError(2, "No such file or directory", "a/b.npy"), "error: No such file or directory: a/b.npy"),
    (PermissionError(13, "Permission denied", "/x"), "error: Permission denied: /x"),
    (IsADirectoryError(21, "Is a directory", "exp"), "error: Is a directory: exp"),
    (OSError(28, "No space left on device"), "error: No space left on device"),
    (FloatingPointError("loss is nan at step 7"), "error: loss is nan at step 7"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
     "error: out of memory: CUDA out of memory. Tried to allocate 2 GiB; " + LESS_MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "error: out of memory: DefaultCPUAllocator: can't allocate memory; " + LESS_MEMORY),
    (torch.OutOfMemoryError("Allocation on device"), "error: out of memory: Allocation on device; " + LESS_MEMORY),
    (MemoryError("Unable to allocate 8 TiB"), "error: out of memory: Unable to allocate 8 TiB; " + LESS_MEMORY),
])
def test_what_a_user_can_mend_is_one_line(capsys, monkeypatch, error, line):
    assert outcome(capsys, monkeypatch, error) == (2, line + "\n")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError("x"), RuntimeError("shapes"),
                                   ZeroDivisionError("x")])
def test_bugs_keep_their_traceback(capsys, monkeypatch, error):
    assert outcome(capsys, monkeypatch, error) == (error, "")


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError("x"), RuntimeError("CUDA out of memory")])
def test_debug_keeps_all_tracebacks(capsys, monkeypatch, error):
    assert outcome(capsys, monkeypatch, error, ["train.py", "--debug"]) == (error, "")


@pytest.mark.parametrize("error, status, line", [
    (StopRequested(signal.SIGINT, "stopped at step 5; go on with --resume auto"), 130,
     "stopped at step 5; go on with --resume auto\n"),
    (StopRequested(signal.SIGTERM), 143, "stopped\n"),
    (KeyboardInterrupt(), 130, "stopped with nothing to save; start again with: python train.py --debug\n"),
    (Terminated(), 143, "stopped with nothing to save; start again with: python train.py --debug\n"),
    (Terminated("aborted"), 143, "aborted\n"),
])
def test_stopping_exits_as_a_shell_expects(capsys, monkeypatch, error, status, line):
    assert outcome(capsys, monkeypatch, error, ["train.py", "--debug"]) == (status, line)


@pytest.mark.parametrize("main, message, file", [
    (lambda: np.zeros((2, 2)).reshape(3), "ValueError: cannot reshape array of size 4 into shape (3,)", __file__),
    (lambda: np.stack([]), "ValueError: need at least one array to stack", "shape_base.py"),
    (lambda: int("x"), "ValueError: invalid literal for int() with base 10: 'x'", __file__),
])
def test_an_error_that_is_not_our_own_says_where_it_came_from(capsys, monkeypatch, main, message, file):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        run_main(main)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message} (") and f"{file}:" in err
    assert err.endswith("; --debug shows the traceback)\n")


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError(f"mask_{index}.png: label 7 is out of range")


def test_an_error_in_a_loader_worker_is_one_line_too():
    with pytest.raises(ValueError) as error:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert len(str(error.value).splitlines()) > 5
    assert user_message(error.value) == (
        "mask_0.png: label 7 is out of range (in a loader worker; --debug shows the traceback)")


# -- StopSignal ----------------------------------------------------------------


def test_the_first_signal_asks_and_the_second_aborts(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt):
            assert stop.requested is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested == signal.SIGTERM and type(stop.requested) is int
            assert capfd.readouterr().err == "SIGTERM: finishing the step, then saving; again to abort\n"
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before      # at once
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert capfd.readouterr().err == ""


def test_handlers_are_put_back_also_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError), StopSignal() as stop:
        assert signal.getsignal(signal.SIGINT) == stop._handle
        raise ValueError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_nothing_is_installed():
    results = []

    def body():
        with StopSignal() as stop:
            results.append((stop.requested, signal.getsignal(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [(None, before)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_ignores_ctrl_c_and_dies_of_sigterm(capfd):
    with StopSignal() as stop:
        child = os.fork()
        if child == 0:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)
            os._exit(7)
        time.sleep(0.05)
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)         # still there
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert stop.requested is None
    assert capfd.readouterr().err == ""


SCRIPT = """
import os, sys, time
from utils.cli import StopRequested, StopSignal, run_main

def main():
    with StopSignal() as stop:
        print("ready", flush=True)
        for step in range(2000):
            time.sleep(0.01)
            if stop.requested and "deaf" not in sys.argv:
                raise StopRequested(stop.requested, "saved; go on with --resume auto")
    raise ValueError("bad value")

run_main(main)
"""


@pytest.mark.parametrize("signals, argv, status, last_line", [
    ([signal.SIGINT], [], 130, "saved; go on with --resume auto"),
    ([signal.SIGTERM], [], 143, "saved; go on with --resume auto"),
    ([signal.SIGINT, signal.SIGINT], ["deaf"], 130, "aborted within a step; --resume auto goes on from the last checkpoint"),
    ([signal.SIGINT, signal.SIGTERM], ["deaf"], 143, "aborted within a step; --resume auto goes on from the last checkpoint"),
])
def test_signals_to_a_real_process(signals, argv, status, last_line):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *argv], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    out, err = process.communicate(timeout=20)
    first_line = f"{signals[0].name}: finishing the step, then saving; again to abort"
    assert process.returncode == status and err.splitlines() == [first_line, last_line]


def test_exit_status_of_a_real_process():
    for code, status, stderr in (("raise ValueError('bad')", 2, "error: ValueError: bad (<string>:3; --debug"),
                                 ("1 / 0", 1, "Traceback"), ("pass", 0, "")):
        script = f"from utils.cli import run_main\ndef main():\n    {code}\nrun_main(main)"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and done.stderr.startswith(stderr)


def test_flags_become_a_config_with_types_and_choices():
    parser = ArgumentParser()
    data = parser.add_argument_group("data")
    data.add_argument("--paths", nargs="+")
    data.add_argument("--size", type=int, default=64)
    data.add_argument("--zero", action="store_true")
    data.add_argument("--kind", choices=("a", "b"), default="a")
    model = parser.add_argument_group("model")
    model.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)                 # no part of the experiment
    defaults = flags_defaults(parser)
    config = flags_config(parser, parser.parse_args(["--paths", "x", "y", "--zero", "--rate", "0.5"]))
    assert config == {"data": {"paths": ["x", "y"], "size": 64, "zero": True, "kind": "a"}, "model": {"rate": 0.5}}
    changed = override_config(config, defaults, ["data.size=32", "model.rate=1", "data.paths=[z]", "data.zero=false"])
    assert changed == {"data": {"paths": ["z"], "size": 32, "zero": False, "kind": "a"}, "model": {"rate": 1.0}}
    assert override_config({}, defaults, [])["model"]["rate"] is None
    for text, message in (("data.size=big", "integer"), ("data.kind=c", "expected one of a, b"), ("data.sise=1", "data.size")):
        with pytest.raises(ValueError, match=message):
            override_config(config, defaults, [text])


def test_given_flags_are_those_on_the_command_line():
    assert given_flags(make_parser(), ["config.yaml", "--batch-size", "4", "--no-amp"]) == {"config", "batch_size", "amp"}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work, message", [
    ("hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 9)", "stopped with nothing to save; start again with: python"),  # minutes, in one call
    ("__import__('time').sleep(60)", "cleaned up"), ("1", "done")])
def test_a_signal_ends_a_script_of_little_patience_anywhere(signum, work, message):
    code = ("import hashlib, signal, sys; from utils.cli import ended_within, run_main\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"              # ignored in a job in the background
            "@ended_within(0.3)\ndef main():\n"
            f"    try:\n        print('ready', flush=True)\n        {work}\n        print('done', file=sys.stderr)\n    finally:\n        print('cleaned up', file=sys.stderr)\n"
            "run_main(main)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        if work != "1":
            process.send_signal(signum)
            try:
                assert process.wait(timeout=10) == 128 + signum
            finally:
                process.kill()
        assert message in process.stderr.read()
