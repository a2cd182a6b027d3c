"""Also the worker of its own two-process run: `torchrun --nproc_per_node=2 tests/test_distributed.py FOLDER`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from utils import distributed
from utils.distributed import EpochBatchSampler, all_reduce_sum, own_share, unwrap

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ITEMS, CLASSES = 21, 3                             # 21 = 2 full global batches of 8, then 5: shares of 2 and 3


def train(batch_size, group, steps_seen):
    """Two epochs of a linear model; the loss is the mean over the valid labels of the whole optimiser step."""
    torch.manual_seed(0)
    net = nn.Linear(4, CLASSES).double()
    data = torch.randn(ITEMS, 4, dtype=torch.float64)
    label = torch.randint(CLASSES, (ITEMS,))
    label[torch.rand(ITEMS) < 0.3] = -100          # so that the batches differ in what is valid
    world = distributed.world_size()
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    sampler = EpochBatchSampler(ITEMS, batch_size, seed=5, group=group)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        steps = [batches[begin:begin + group] for begin in range(0, len(batches), group)]
        for step in steps:
            steps_seen.append([item for batch in step for item in batch])
            weight = all_reduce_sum(float(sum((label[batch] != -100).sum() for batch in step)))
            optimizer.zero_grad()
            for batch in step:                     # DistributedDataParallel takes the mean over processes: undo it
                loss = nn.functional.cross_entropy(model(data[batch]), label[batch], reduction="sum")
                (loss * world / weight).backward()
            optimizer.step()
    return {name: tensor.clone() for name, tensor in unwrap(model).state_dict().items()}


def worker(folder):
    rank, local_rank, world = distributed.init_distributed("cpu")
    again = distributed.init_distributed("cpu")    # joining twice is no error
    steps, tensor = [], torch.tensor([rank, 1])
    half = torch.arange(6, dtype=torch.float16).reshape(2, 3).T + rank
    result = {
        "started": [rank, local_rank, world, *again, distributed.rank(), distributed.world_size()],
        "main": distributed.is_main(),
        "int": all_reduce_sum(2**53 + rank), "float": all_reduce_sum(0.1 * (rank + 1)), "bool": all_reduce_sum(True),
        "tensor": all_reduce_sum(tensor), "unchanged": tensor,
        "half": all_reduce_sum(half.contiguous() if rank else half),      # another layout on each rank
        "double": all_reduce_sum(torch.tensor(1e-17 + rank, dtype=torch.float64)),
        "gradient": all_reduce_sum(torch.ones(2, requires_grad=True)).requires_grad,
        "flag": distributed.all_agree_max(2 + 13 * rank),
        "gathered": distributed.all_gather({"rank": rank}),
        "shard": list(own_share(7)),
        "weights": train(2, 2, steps), "steps": steps,
    }
    if rank == 1:
        (folder / "before barrier").touch()
    distributed.barrier()
    result["barrier"] = (folder / "before barrier").exists()
    calls, barrier = [], distributed.barrier
    distributed.barrier = lambda: (calls.append("barrier"), barrier())
    for turn in range(2):
        with distributed.main_first():
            if rank == 0:                          # prepares something, for longer than a look at the store takes
                time.sleep(3 * distributed.POLL)
                (folder / f"prepared {turn}").touch()
            calls.append((folder / f"prepared {turn}").exists())
    distributed.barrier = barrier
    result["first"] = calls
    torch.save(result, folder / f"{rank}.pth")
    distributed.cleanup()
    assert distributed.world_size() == 1
    distributed.cleanup()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes under torchrun has seen."""
    folder = tmp_path_factory.mktemp("two")
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, __file__, folder], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


def test_torchrun_environment(two):
    assert [result["started"] for result in two] == [[0, 0, 2, 0, 0, 2, 0, 2], [1, 1, 2, 1, 1, 2, 1, 2]]
    assert [result["main"] for result in two] == [True, False]


def test_sums_over_processes(two):
    for rank, result in enumerate(two):
        assert result["int"] == 2**54 + 1          # would be rounded as a float
        assert result["float"] == 0.1 + 0.2 and type(result["float"]) is float
        assert result["bool"] == 2
        assert result["tensor"].tolist() == [1, 2] and result["tensor"].dtype == torch.int64
        assert result["unchanged"].tolist() == [rank, 1]
        assert result["half"].dtype == torch.float16 and result["half"].tolist() == [[1, 7], [3, 9], [5, 11]]
        assert result["double"].dtype == torch.float64 and result["double"].shape == ()
        assert not result["gradient"]


def test_the_main_process_goes_first_and_the_others_wait_in_no_barrier(two):
    """That of nccl would end the job after two hours."""
    assert [result["first"] for result in two] == [[True, "barrier", True, "barrier"]] * 2


def test_agreement_gathering_barrier_shards(two):
    assert [result["flag"] for result in two] == [15, 15]
    assert [result["gathered"] for result in two] == [[{"rank": 0}, {"rank": 1}]] * 2
    assert [result["barrier"] for result in two] == [True, True]
    assert sorted(two[0]["shard"] + two[1]["shard"]) == list(range(7))


def test_two_processes_train_as_one(two):
    """1 process x 8 equals 2 processes x 2 with 2 micro-batches: same items a step, same weights after two epochs."""
    steps = []
    weights = train(8, 1, steps)
    for own, first, second in zip(steps, two[0]["steps"], two[1]["steps"], strict=True):
        assert sorted(own) == sorted(first + second)
    assert steps[0] != steps[3]                    # the second epoch has another order
    for result in two:
        for name, tensor in weights.items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=1e-12, atol=1e-12)


# -- one process ---------------------------------------------------------------

def test_one_process_is_the_identity(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert distributed.init_distributed("cpu") == (0, 0, 1)
    assert distributed.is_main() and distributed.rank() == 0 and distributed.world_size() == 1
    assert all_reduce_sum(3) == 3 and type(all_reduce_sum(3)) is int and all_reduce_sum(0.25) == 0.25
    ones = torch.ones(2)
    assert all_reduce_sum(ones).add_(1).tolist() == [2, 2] and ones.tolist() == [1, 1]
    assert distributed.all_agree_max(2) == 2 and distributed.all_gather("x") == ["x"]
    distributed.barrier()
    with distributed.main_first():
        pass
    distributed.cleanup()
    monkeypatch.setenv("WORLD_SIZE", "1")          # torchrun --nproc_per_node=1
    assert distributed.init_distributed("cuda") == (0, 0, 1)


def test_start_errors(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in TORCHRUN[1:]:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set, but not RANK, LOCAL_RANK.*torchrun"):
        distributed.init_distributed("cpu")
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: there are 1"):
        distributed.init_distributed("cuda")


def test_unwrap():
    net = nn.Linear(1, 1)
    compiled = torch.compile(net)
    assert unwrap(net) is net and unwrap(compiled) is net
    owner = nn.Module()
    owner.module = net                             # a submodule that happens to be called module is no wrapper
    assert unwrap(owner) is owner


# -- which items ---------------------------------------------------------------

@pytest.mark.parametrize("num_items, world", [(7, 3), (2, 3), (0, 2), (5, 1)])
def test_shards_hold_every_item_once(num_items, world, monkeypatch):
    shards = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        shards.append(list(own_share(num_items)))
    assert sorted(item for shard in shards for item in shard) == list(range(num_items))


def batches_of(num_items, batch_size, world=1, group=1, epoch=0, start=0, **more):
    """The batches of each rank."""
    samplers = [EpochBatchSampler(num_items, batch_size, seed=3, rank=rank, world=world, group=group, **more)
                for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch, start)
    return [list(sampler) for sampler in samplers]


def test_sampler_hand_computed():
    assert batches_of(10, 4, shuffle=False) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]
    assert batches_of(10, 4, shuffle=False, drop_last=True) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert batches_of(11, 2, world=2, shuffle=False) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9, 10]]]
    assert batches_of(9, 2, world=2, shuffle=False) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]   # 8 alone: left out
    assert batches_of(13, 2, world=2, group=2, shuffle=False) == \
        [[[0, 1], [4, 5], [8], [10]], [[2, 3], [6, 7], [9], [11, 12]]]           # the last 5: evenly, not 4 and 1
    assert batches_of(13, 2, world=2, group=2, shuffle=False, drop_last=True) == \
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert batches_of(3, 8, shuffle=False, drop_last=True) == [[[0, 1, 2]]]      # better than an empty epoch


@pytest.mark.parametrize("batch_size, world, group", [(1, 1, 1), (4, 1, 1), (4, 2, 1), (1, 3, 2), (2, 2, 3), (3, 4, 1)])
def test_sampler_invariants(batch_size, world, group):
    for num_items in range(world, 60):
        ranks = batches_of(num_items, batch_size, world, group)
        sizes = [[len(batch) for batch in batches] for batches in ranks]
        seen = [item for batches in ranks for batch in batches for item in batch]
        assert len({len(batches) for batches in ranks}) == 1           # equally many, or ranks wait for each other
        assert len(set(seen)) == len(seen) > num_items - world         # none twice, fewer than `world` left out
        assert all(1 <= size <= batch_size for rank in sizes for size in rank)
        assert all(max(column) - min(column) <= 1 for column in zip(*sizes, strict=True))


@pytest.mark.parametrize("cut", [(4, 2, 1), (2, 2, 2), (1, 8, 1), (2, 4, 1), (1, 2, 4), (4, 1, 2)])
@pytest.mark.parametrize("num_items", [64, 70])
def test_every_cut_sees_the_same_items_in_each_step(num_items, cut):
    batch_size, world, group = cut
    whole = batches_of(num_items, 8, drop_last=True)[0]
    ranks = batches_of(num_items, batch_size, world, group, drop_last=True)
    for step, items in enumerate(whole):
        own = [batches[step * group + micro] for batches in ranks for micro in range(group)]
        assert sorted(item for batch in own for item in batch) == sorted(items)
    assert len(ranks[0]) == len(whole) * group


def test_order_depends_on_seed_and_epoch_only():
    sampler = EpochBatchSampler(50, 8, seed=3)
    orders = {}
    for seed in (3, 4):
        for epoch in (0, 1, 2):
            torch.manual_seed(epoch * seed)
            np.random.seed(epoch)
            sampler = EpochBatchSampler(50, 8, seed=seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = str(list(sampler))
            assert str(list(sampler)) == orders[seed, epoch]           # a second pass is the same
    assert len(set(orders.values())) == 6
    assert sorted(sum(batches_of(50, 8)[0], [])) == list(range(50))
    assert str(list(EpochBatchSampler(50, 8, seed=3))) == orders[3, 0]


class Loaded(TensorDataset):
    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index)


def test_start_batch_skips_without_loading():
    full = batches_of(22, 4, epoch=2)[0]
    assert batches_of(22, 4, epoch=2, start=3)[0] == full[3:]
    assert batches_of(22, 4, epoch=2, start=6)[0] == []
    dataset = Loaded(torch.arange(22))
    dataset.seen = []
    sampler = EpochBatchSampler(22, 4, seed=3)
    sampler.set_epoch(2, start_batch=4)
    loader = DataLoader(dataset, batch_sampler=sampler)
    assert [batch.tolist() for (batch,) in loader] == full[4:] and len(loader) == 6
    assert dataset.seen == full[4] + full[5]
    sampler.set_epoch(3)
    assert len(list(loader)) == 6


def test_sampler_errors():
    for bad in ({"batch_size": 0}, {"group": 0}, {"rank": 2, "world": 2}, {"rank": -1, "world": 2}):
        with pytest.raises(ValueError, match="need at least 1"):
            EpochBatchSampler(**{"num_items": 8, "batch_size": 4, "seed": 0, **bad})
    for num_items in (0, 1):
        with pytest.raises(ValueError, match=f"{num_items} training items for 2 processes"):
            EpochBatchSampler(num_items, 4, seed=0, rank=0, world=2)
    sampler = EpochBatchSampler(8, 4, seed=0)
    for start in (-1, 3):
        with pytest.raises(ValueError, match=f"start_batch {start}: the epoch has 2 batches"):
            sampler.set_epoch(0, start)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
