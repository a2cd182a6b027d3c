"""A layer on a part of its rows at a time, for the cache of a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor


def by_parts(function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """function(*tensors), on a CPU for `rows` of their rows a thread at a time: what lies between its layers, often
    several times as wide as the rows, then stays in the cache, and its pages are used again. No row may depend on
    another one. A GPU, and torch.compile, take all at once."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():         # which cannot ask for the threads
        return function(*tensors)
    rows *= torch.get_num_threads()
    if len(tensors[0]) <= rows:
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True)])
