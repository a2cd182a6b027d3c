import pytest
import torch

import utils.memory as memory
from utils.memory import check_memory, free_memory

CPU = torch.device("cpu")
FILES = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n", "/sys/fs/cgroup/memory.max": "3000000\n",
         "/sys/fs/cgroup/memory.current": "1000000\n", "/proc/self/statm": "100 50 1"}


class Limits:
    RLIMIT_AS, RLIM_INFINITY = 9, -1

    def __init__(self, most):
        self.most = most

    def getrlimit(self, what):
        assert what == self.RLIMIT_AS
        return self.most, -1


@pytest.mark.parametrize("changes, most, expected", [
    ({}, -1, 2_000_000),                                                        # what the control group leaves
    ({"/sys/fs/cgroup/memory.max": "max"}, -1, 5000 * 1024),                    # ... which has no limit
    ({"/sys/fs/cgroup/memory.current": None}, -1, 5000 * 1024),
    ({}, 100 * 4096 + 7, 7),                                                    # what the address space leaves
    ({}, 4096, 0),                                                              # more is used than allowed
    ({"/sys/fs/cgroup/memory.current": "4000000"}, -1, 0),
    ({name: None for name in FILES}, 4096, None)])                              # not Linux
def test_the_least_of_what_the_system_leaves(monkeypatch, changes, most, expected):
    files = {**FILES, **changes}
    monkeypatch.setattr(memory, "_lines", lambda path: (files[path] or "").splitlines())
    monkeypatch.setattr(memory, "resource", Limits(most))
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_PAGESIZE": 4096}[name])
    assert free_memory(CPU) == expected


def test_memory_of_a_gpu(monkeypatch):
    """What the card has free, and what PyTorch keeps of it without using it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_memory(torch.device("cuda")) == 1200 and free_memory(torch.device("mps")) is None


def test_nine_tenths_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 ** 30)
    check_memory(int(0.9 * 2 ** 30), CPU, "it", "take less")
    with pytest.raises(ValueError, match="it needs about 0.91 GiB, and 1.00 GiB are free on cpu; take less"):
        check_memory(int(0.91 * 2 ** 30), CPU, "it", "take less")
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    check_memory(1 << 60, CPU, "it", "take less")
