"""How much memory there is, and a refusal before it is gone."""

import os
from pathlib import Path

import torch

try:
    import resource
except ImportError:                                         # Windows
    resource = None

SHARE = 0.9                                                 # of what is free may be asked for


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get on the device; None where the system does not say (Windows, MPS).

    On the CPU the least of what Linux calls available, what its control group (a container's limit) leaves, and what a
    limit of the address space leaves.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdecimal():
        found.append(int(limit[0]) - int(used[0]))
    pages = _lines("/proc/self/statm")
    if resource is not None and pages:
        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            found.append(most - int(pages[0].split()[0]) * os.sysconf("SC_PAGESIZE"))
    return max(0, min(found)) if found else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def check_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """ValueError where `needed` bytes are more than nine tenths of what is free: before the work, not by the system's
    killer in the middle of it. what and remedy complete the sentence."""
    free = free_memory(device)
    if free is not None and needed > SHARE * free:
        raise ValueError(f"{what} needs about {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free on "
                         f"{device}; {remedy}")
