"""What the tests of whole training runs share: two runs compared to the last bit, and a signal in the middle of a step."""

import os
import signal

import torch


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
