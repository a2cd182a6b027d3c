"""The command line of every script: flags that suggest the nearest name, one-line errors, a clean stop on Ctrl-C.

    def parse_args(argv=None):
        parser = ArgumentParser(description=__doc__)
        parser.add_argument("--output-dir", required=True)     # also answers to --output_dir
        return parser.parse_args(argv)

    if __name__ == "__main__":
        run_main(main)
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.checks import did_you_mean, nearest, printable
from utils.config import Config, Setting

ROOT = Path(__file__).resolve().parents[1]
# torch.OutOfMemoryError by name (this module does without torch), CUDA's words, the CPU allocator's, NumPy's.
NO_MEMORY = re.compile("OutOfMemoryError|out of memory|can't allocate memory|MemoryError", re.IGNORECASE)
# gloo's words, the store's, NCCL's.
LOST_PROCESS = re.compile("connection (closed|reset) by peer|connection was likely closed|communicator was abort", re.I)


class AtLeast(NamedTuple):
    """The type of a flag with a smallest value: add_argument("--epochs", type=AtLeast(1))."""

    low: float
    kind: type = int

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {self.kind.__name__} value: {text!r}") from None
        if not value >= self.low:                              # NaN too
            raise argparse.ArgumentTypeError(f"expected a number from {self.low}, got {text}")
        return value


class Given(argparse.Action):
    """A flag that remembers, as NAME_given, that it stands on the command line, whatever its value."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations; `--a-b` and `--a_b` are the same flag; errors are one line with the nearest flag.

    Positional arguments may stand before, between and after flags (`train.py CONFIG --seed 1 optim.lr=1e-4`).
    A wrong command line prints `error: ...` to stderr and exits with status 2, as argparse does.
    instead: {flag of other programs, which is unknown here: what to write in its place}.
    """

    def __init__(self, *args, instead: Mapping[str, str] | None = None, **kwargs):
        self.instead = instead or {}
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        self.actions: list[argparse.Action] = []               # all, in the order of their declaration
        self.groups: dict[str, list[argparse.Action]] = {}     # those of each group made by add_argument_group
        super().__init__(*args, **kwargs)

    def add_argument(self, *args, **kwargs) -> argparse.Action:
        action = _with_default(super().add_argument(*args, **kwargs))
        self.actions.append(action)
        return action

    def add_argument_group(self, *args, **kwargs):
        group = super().add_argument_group(*args, **kwargs)
        declare = group.add_argument

        def add_argument(*more, **settings) -> argparse.Action:
            action = _with_default(declare(*more, **settings))
            self.actions.append(action)
            self.groups.setdefault(group.title, []).append(action)
            return action
        group.add_argument = add_argument
        return group

    def declared_flags(self) -> list[str]:
        return [flag for action in self.actions for flag in action.option_strings]

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        args, declared = self.respelt(sys.argv[1:] if args is None else args), self.declared_flags()
        # Before anything else, or a misspelt required flag would be reported as the other one missing.
        for flag in (token.partition("=")[0] for token in _before_separator(args) if token.startswith("--")):
            if flag not in declared and " " not in flag:
                hint = did_you_mean(nearest(flag, declared))
                if flag.replace("_", "-") in self.instead:
                    hint = f"; {self.instead[flag.replace('_', '-')]}"
                elif not hint and "." in flag:                   # the habit of other configuration tools
                    hint = f"; write {flag[2:]}=VALUE without hyphens"
                self.error(f"unknown flag {flag}{hint}")
        parsed, rest = self.parse_known_intermixed_args(args, namespace)
        if rest:
            self.error(f"unexpected argument{'s' * (len(rest) > 1)}: {' '.join(rest)}")
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.respelt(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def respelt(self, args: Sequence[str]) -> list[str]:
        """Replace each flag by the declared one that differs from it only in - and _."""
        flags = self.declared_flags()
        declared = {flag.replace("_", "-"): flag for flag in flags}
        args, result = list(args), []
        for token in _before_separator(args):
            flag, equals, value = token.partition("=")
            if token.startswith("--") and flag not in flags:
                flag = declared.get(flag.replace("_", "-"), flag)
            result.append(f"{flag}{equals}{value}")
        return result + args[len(result):]


def _with_default(action: argparse.Action) -> argparse.Action:
    """Add the default to the help, where there is one and the help has no word about it."""
    default, text = action.default, action.help or ""
    named = re.search(r"\bdefault\b", text) or text == argparse.SUPPRESS
    if not named and default is not None and default is not False and default not in ("", [], (), argparse.SUPPRESS):
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        action.help = f"{text}{'; ' if text else ''}default: {shown.replace('%', '%%')}"
    return action


def flags_config(parser: ArgumentParser, args: argparse.Namespace) -> Config:
    """The values of a script's flags as the config of its checkpoints: {group title: {flag: value}}, with the groups
    made by parser.add_argument_group; flags outside them (seed, device ...) are no part of the experiment."""
    return Config({title: {action.dest: getattr(args, action.dest) for action in actions}
                   for title, actions in parser.groups.items()})


def flags_defaults(parser: ArgumentParser) -> dict:
    """The defaults of the same flags with types and bounds, as utils.config checks overrides (`section.key=value`)."""
    def setting(action):
        low = None
        if action.nargs == 0:
            kind = bool
        elif action.nargs == "+":
            kind = list
        elif isinstance(action.type, AtLeast):
            kind, low = action.type.kind, action.type.low
        else:
            kind = action.type or str
        default = [] if kind is list and action.default is None else action.default
        return Setting(default, (kind,), None if action.choices is None else tuple(action.choices), low)
    return {title: {action.dest: setting(action) for action in actions} for title, actions in parser.groups.items()}


def given_flags(parser: ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """The names of the flags that really stand on the command line, whatever their values. `parser` loses its
    defaults: pass a fresh one."""
    for action in parser.actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def _before_separator(args: Sequence[str]) -> Sequence[str]:
    return args[:args.index("--")] if "--" in args else args


class StopRequested(Exception):
    """Raised by a script that stopped at a signal, after saving. message: how to go on, e.g. the --resume command."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum, self.message = int(signum), message


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP where no StopSignal takes it, or SIGTERM a second time."""

    def __init__(self, message: str = "", signum: int = signal.SIGTERM):
        super().__init__(*([message] if message else []))
        self.signum = int(signum)


class StopSignal:
    """Context manager that turns Ctrl-C, SIGTERM and SIGHUP into a request to stop after the current step.

        with StopSignal() as stop:
            for batch in loader:
                ...
                if stop.requested:                             # None, or the signal's number
                    save(); raise StopRequested(stop.requested, "continue with --resume auto")

    The first signal sets `requested` and prints one line. A second puts the previous handlers back and raises
    KeyboardInterrupt (SIGTERM: Terminated). Outside the main thread, where Python allows no handlers, it does nothing.
    SIGHUP, with which a terminal closes and an ssh session ends, is never a second signal nor followed by one: it comes
    twice, from the shell and from the system, or together with SIGTERM. Where it is ignored (nohup) it stays so.
    """

    def __init__(self):
        self.requested: int | None = None
        self._asked = False                                    # by the user: Ctrl-C, SIGTERM
        self._previous: dict[int, Any] = {}
        self._process = 0

    def __enter__(self) -> "StopSignal":
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, *hangup()):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self._process:       # a forked worker inherits this handler; the parent decides for it,
            if signum == signal.SIGTERM:       # also when to end it
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        if self._asked and signum not in hangup():
            self.__exit__()
            raise (Terminated if signum == signal.SIGTERM else KeyboardInterrupt)(
                "aborted within a step; --resume auto goes on from the last checkpoint")
        self._asked |= signum not in hangup()
        if self.requested is not None:
            return
        self.requested = signum
        # os.write: print() may not be entered again from a handler that interrupted it.
        with contextlib.suppress(OSError):                     # the terminal has gone
            os.write(2, f"{signal.Signals(signum).name}: finishing the step, then saving; again to abort\n".encode())


def hangup() -> tuple[int, ...]:
    """SIGHUP, where the system has it and it is not ignored."""
    number = getattr(signal, "SIGHUP", None)
    return () if number is None or signal.getsignal(number) is signal.SIG_IGN else (number,)


class Output(io.TextIOBase):
    """stdout or stderr of a run that goes on without it: what cannot be written any more (a pipe whose reader has
    ended, a terminal that was closed, a full disk) is dropped, and `gone` says why. Everything else is the stream's."""

    def __init__(self, stream):
        self.stream = stream
        self.gone: str | None = None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def isatty(self) -> bool:
        return self.gone is None and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return self.stream.encoding

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.gone is not None:
            return
        try:
            action()
        except OSError as error:
            self.gone = error.strerror or str(error)
            with contextlib.suppress(OSError):             # what is left in buffers goes nowhere
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


def run_main(main: Callable[[], Any]) -> None:
    """Call `main()` and turn what a user can cause and mend into one `error: ...` line on stderr.

    ValueError, OSError (a missing file, a full disk), FloatingPointError (the run diverged), memory used up: exit 2.
    StopRequested: prints its message, exit 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP). So do these signals where no
    StopSignal takes them, such as while data are prepared; under torchrun, which ends its other processes by SIGTERM,
    SIGTERM and SIGHUP keep their effect. Everything else is a bug and keeps its traceback, exit 1; so do all errors
    where --debug is on the command line. What cannot be printed any more is dropped (see Output).

    One of several processes (torchrun's WORLD_SIZE) leaves at once, whatever happened: what libraries do at the end of
    Python can wait there for another process, which may be gone or wait for this one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _run(main)
    status = 1
    try:
        _run(main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def ended_within(seconds: float):
    """In the body, Ctrl-C, SIGTERM and SIGHUP end the process after so many seconds also where a call does not return
    to Python, whose own handlers would wait for it (an attention over a whole mesh). For scripts that have nothing to
    save and no worker processes; outside the main thread, where Python allows no handlers, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    over = threading.Event()

    def watch():
        with signals:
            while number := signals.recv(1):                   # empty when the other end was closed
                if number[0] in (signal.SIGINT, signal.SIGTERM, *hangup()) and not over.wait(seconds):
                    os.write(2, f"{_start_again()}\n".encode())
                    os._exit(128 + number[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(previous)
        wakeup.close()
        watcher.join()


def _start_again() -> str:
    return f"stopped with nothing to save; start again with: {shlex.join(['python', *sys.argv])}"


def _run(main: Callable[[], Any]) -> None:
    process = os.getpid()

    def terminate(signum, frame):
        if os.getpid() != process:                 # a forked worker
            os._exit(128 + signum)
        if signum in hangup():                     # it comes twice, from the shell and from the system
            signal.signal(signum, signal.SIG_IGN)
        raise Terminated(signum=signum)

    alone = threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ
    previous = {number: signal.signal(number, terminate) for number in (signal.SIGTERM, *hangup()) if alone}
    streams = sys.stdout, sys.stderr
    for stream in streams:                                 # names that the terminal cannot show are no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in streams)
    try:
        main()
    except StopRequested as stop:
        _leave(128 + stop.signum, stop.message or "stopped")
    except KeyboardInterrupt as stop:
        _leave(128 + getattr(stop, "signum", signal.SIGINT), str(stop) or _start_again())
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        if "--debug" in sys.argv or not (message := user_message(error)):
            raise
        _leave(2, f"error: {printable(message)}")
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = streams
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def user_message(error: BaseException) -> str | None:
    """One line for an error that a user can mend, None for a bug.

    Where no `raise` of this repository made the message, it may be a bug after all: its type and place are added.
    """
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and (lost := LOST_PROCESS.search(text)):
        return f"another process of this run has ended ({lost[0]}); its own message says why"
    if isinstance(error, RuntimeError | MemoryError):
        if not NO_MEMORY.search(f"{type(error).__name__} {text}"):
            return None
        return f"out of memory{text and ': '}{text[:200]}; lower the batch or crop size, or use --amp-dtype bfloat16"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    if text.startswith("Caught ") and "Original Traceback" in text:      # from a loader's worker, with its traceback
        last_line = str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        return f"{last_line} (in a loader worker; --debug shows the traceback)"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).resolve().is_relative_to(ROOT) and "site-packages" not in frame.filename
    if ours and text and "raise " in (frame.line or ""):
        return text
    return f"{type(error).__name__}: {text} ({frame.filename}:{frame.lineno}; --debug shows the traceback)"


def _leave(status: int, message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)
