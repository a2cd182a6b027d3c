"""What the tests of whole training runs share: two runs compared to the last bit, a signal in the middle of a step, errors of the user."""

import contextlib
import os
import re
import signal

import pytest
import torch


@contextlib.contextmanager
def refused(capsys, message):
    """An error of the user that matches: raised by the script, or a line of its parser on stderr."""
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        yield
    text = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
    assert re.search(message, text), text


def assert_equal(first, second, where=""):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert first == second, where


def sigterm_in_call(patch, owner, method, number):
    """A real SIGTERM while `owner.method`, which runs once an optimiser step, is called for the given time."""
    original, count = getattr(owner, method), []

    def kill_and_call(self, *arguments):
        count.append(1)
        if len(count) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    patch.setattr(owner, method, kill_and_call)
