"""Work on a part of the data at a time, for the cache of a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor


def elements_at_once(device: torch.device, gpu: int) -> int:
    """How many float32 numbers to make at a time: 8 MiB for each thread of a CPU, which mostly stay in a cache; `gpu`
    of a GPU."""
    return 2**21 * torch.get_num_threads() if device.type == "cpu" else gpu


def rows_at_once(x: Tensor, rows: int) -> int:
    """`rows` for each thread of a CPU. A GPU, and torch.compile, whose graph would hold every part, take all of x."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():                  # which cannot ask for the threads
        return len(x)
    return rows * torch.get_num_threads()


def by_parts(function: Callable[[Tensor], Tensor], rows: int, x: Tensor) -> Tensor:
    """function(x), for rows_at_once: what lies between its layers, often several times as wide as x, then stays in the
    cache, and its pages are used again. No row may depend on another one."""
    size = rows_at_once(x, rows)
    return function(x) if len(x) <= size else torch.cat([function(part) for part in x.split(size)])
