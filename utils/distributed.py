"""Several processes under torchrun: set-up, sums over processes, and which items each process gets.

Everything here also works, as the identity, in a single process without torchrun.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from utils.device import pick_device

# Others wait at a barrier while rank 0 writes; torchrun itself ends them when one dies, so be patient.
TIMEOUT = timedelta(hours=2)
POLL = 0.2                                         # seconds between two looks of main_first
_left_group = None                                 # see cleanup


def init_distributed(device_type: str) -> tuple[int, int, int]:
    """Join the process group that torchrun's environment describes: nccl for device_type "cuda", gloo otherwise.

    Returns (rank, local_rank, world_size); (0, 0, 1), and no group, without torchrun or with one process. On "cuda"
    the current device becomes local_rank. ValueError where the machine has fewer GPUs than processes, or the
    environment is incomplete.
    """
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 0, 1
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not {', '.join(absent)}. "
                         f"Start with `torchrun --nproc_per_node=N SCRIPT ...`, or unset WORLD_SIZE.")
    local_rank = int(os.environ["LOCAL_RANK"])
    device_id = None
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. "
                             f"Lower torchrun's --nproc_per_node, or use --device cpu.")
        device_id = torch.device("cuda", local_rank)
        torch.cuda.set_device(device_id)
    if not dist.is_initialized():
        how = {"backend": "nccl" if device_type == "cuda" else "gloo", "timeout": TIMEOUT, "device_id": device_id}
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun (PyTorch 2.13) keeps its store when it restarts, with the addresses of processes that are gone.
            # On several machines the counts can differ: docs/distributed.md.
            store, own_rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
            how |= {"store": dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store),
                    "rank": own_rank, "world_size": count}
        dist.init_process_group(**how)
    return rank(), local_rank, world_size()


def join(device: str | None) -> tuple[torch.device, int, int]:
    """(device, rank, world size) of this process: --device as pick_device has it, and of several processes on CUDA each
    its own GPU. Raises as pick_device and init_distributed."""
    picked = pick_device(device)
    own_rank, local_rank, world = init_distributed(picked.type)
    if picked.type == "cuda" and world > 1:
        picked = torch.device("cuda", local_rank)
    return picked, own_rank, world


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    return dist.get_world_size() if _active() else 1


def _place() -> tuple[int, int]:
    return rank(), world_size()


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    if _active():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The body runs in rank 0 first, and in the other processes when it is done there.

    They look into the store at which all have met, for as long as it takes: preparing a data set may take longer than
    TIMEOUT, after which a barrier of nccl ends the job.
    """
    if not _active():
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    done = f"main_first {all_gather(os.urandom(8).hex())[0]}"      # a name of its own, also after a restart
    while not is_main() and not store.check([done]):
        time.sleep(POLL)
    yield
    if is_main():
        store.set(done, "yes")
    barrier()


def cleanup() -> None:
    """Leave the process group; does nothing where there is none."""
    global _left_group
    if _active():
        # Were DistributedDataParallel the last to hold the group, it would end gloo's threads without giving Python's
        # lock away, and wait for ever on one that frees the tensor of the last all_reduce (PyTorch 2.13).
        _left_group = dist.group.WORLD
        dist.destroy_process_group()


def all_reduce_sum(value: Tensor | float) -> Tensor | float:
    """The sum of `value` over all processes, in all of them, of the same type; the argument itself is not changed.

    Tensors keep dtype and device (shapes must agree); a float is summed in float64, an int in int64. No gradient.
    """
    if isinstance(value, Tensor):
        own = value.detach().clone()
        return _reduced(own, dist.ReduceOp.SUM) if _active() else own
    if not _active():
        return value
    dtype = torch.int64 if isinstance(value, int) else torch.float64
    return _reduced(torch.tensor(value, dtype=dtype), dist.ReduceOp.SUM).item()


def all_agree_max(flag: int) -> int:
    """The largest `flag` over all processes, so that all of them stop (or go on) at the same step."""
    return int(_reduced(torch.tensor(int(flag)), dist.ReduceOp.MAX).item()) if _active() else int(flag)


def all_gather(value: Any) -> list:
    """The picklable `value` (such as a random state for the checkpoint) of every process, by rank, in all of them."""
    if not _active():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers: running statistics of batch norms. Not on CUDA, where SyncBatchNorm
    has the same statistics in all of them."""
    if _active():
        for buffer in module.buffers():
            if buffer.device.type != "cuda":
                dist.broadcast(buffer, 0)


def _reduced(tensor: Tensor, operation: dist.ReduceOp) -> Tensor:
    home = tensor.device
    if dist.get_backend() == "nccl":               # nccl knows GPU memory only
        tensor = tensor.to("cuda")
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, operation)
    return tensor.to(home)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DistributedDataParallel and torch.compile, in whatever order they were put around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):          # torch._dynamo's OptimizedModule
            model = model._orig_mod
        else:
            return model


def own_share(num_items: int) -> range:
    """The items this process evaluates: over all ranks every item exactly once, none twice to even the shares out."""
    return range(rank(), num_items, world_size())


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of indices for training, for DataLoader(batch_sampler=...); how many processes there are changes nothing.

    The order of an epoch depends on (seed, epoch) only. It is cut into optimiser steps of batch_size * world * group
    items, each step into `group` micro-batches (gradient accumulation; usually 1), each of those evenly into one
    batch per process. So 1 process x 8, 2 x 4 and 2 x 2 with group=2 see the same items in the same steps. All ranks
    have equally many batches.

    The last step may be smaller: it has as few micro-batches as hold it, cut evenly, so that shares differ by one
    item at most (weight losses by item, not by batch); what cannot give each rank one item (fewer than `world`) is
    left out. With drop_last=True an incomplete last step is left out altogether, unless it is the only one.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int, shuffle: bool = True, drop_last: bool = False,
                 rank: int | None = None, world: int | None = None, group: int = 1):
        self.num_items, self.batch_size, self.seed, self.shuffle = num_items, batch_size, seed, shuffle
        own_rank, own_world = _place()
        self.rank = own_rank if rank is None else rank
        self.world = own_world if world is None else world
        self.group = group
        if batch_size < 1 or group < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"batch_size {batch_size}, group {group}, rank {self.rank}, world {self.world}: "
                             f"need at least 1, and rank below world")
        if world is None and len(counts := {*all_gather(num_items)}) > 1:
            raise ValueError(f"the processes see {' and '.join(map(str, sorted(counts)))} training items: all machines "
                             f"need the same data")
        self.bounds = self._cut(drop_last)         # of each global micro-batch
        if not self.bounds:
            raise ValueError(f"{num_items} training items for {self.world} processes: each needs at least one. "
                             f"Add data or use fewer processes.")
        self.set_epoch(0)

    def _cut(self, drop_last: bool) -> list[tuple[int, int]]:
        micro, step = self.batch_size * self.world, self.batch_size * self.world * self.group
        bounds = [(begin, begin + micro) for begin in range(0, self.num_items // step * step, micro)]
        rest = self.num_items % step
        if rest and not (drop_last and bounds):
            begin, pieces = self.num_items - rest, -(-rest // micro)
            if rest < pieces * self.world:         # only for batch_size 1, or fewer items than ranks
                pieces, rest = pieces - 1, (pieces - 1) * micro
            edges = [begin + rest * i // max(pieces, 1) for i in range(pieces + 1)]
            bounds += zip(edges[:-1], edges[1:], strict=True)
        return bounds

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch's order; the next pass leaves out its first `start_batch` batches (done before a resume)."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch {start_batch}: the epoch has {len(self)} batches. Were the batch size, the "
                             f"number of processes or the data changed since the checkpoint?")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches per process of a whole epoch, whatever start_batch is."""
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_items) if self.shuffle \
            else np.arange(self.num_items)
        for begin, end in self.bounds[self.start_batch:]:
            first, last = (begin + (end - begin) * r // self.world for r in (self.rank, self.rank + 1))
            yield order[first:last].tolist()
