"""What every training script does around its network: the optimiser's step, an epoch's totals, a resumed run that is
the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from utils.device import widest_dtype
from utils.distributed import EpochBatchSampler, all_gather, all_reduce_sum, is_main, rank, world_size
from utils.metrics import ConfusionMatrix, segmentation_metrics
from utils.seed import derived_seed, rng_state, seed_worker, set_rng_state


def build_loader(dataset: Dataset, sampler: EpochBatchSampler, num_workers: int, device: torch.device,
                 collate_fn: Callable | None = None) -> DataLoader:
    """The loader of the training batches; its workers draw nothing from the generators of this process."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate_fn,
                      worker_init_fn=seed_worker, pin_memory=device.type == "cuda", generator=torch.Generator())


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def micro_steps(network: nn.Module, batches: Sequence) -> Iterator:
    """The micro-batches of an optimiser step, for a loop with their forward and backward passes. Only in the last one
    DistributedDataParallel adds up the gradients of the processes; the others leave theirs where they are."""
    for batch in batches:
        alone = batch is not batches[-1] and isinstance(network, nn.parallel.DistributedDataParallel)
        with network.no_sync() if alone else contextlib.nullcontext():
            yield batch


def optimizer_step(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler,
                   scaler: torch.amp.GradScaler, clip_norm: float = 0.0) -> None:
    """Clip the norm of the whole gradient (0: do not), update the weights, go on in the schedule, clear the gradient.

    Where a float16 gradient overflowed, weights and schedule stay as they are; step counters and weight averages still
    advance, so a run keeps its planned number of steps.
    """
    scaler.unscale_(optimizer)
    if clip_norm:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    scale = scaler.get_scale()                              # 1, without waiting for the GPU, unless in float16
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:                         # the scale falls after an overflow only
        scheduler.step()
    optimizer.zero_grad(set_to_none=True)


def check_finite(loss: float, step: int, rate: float, folder: str) -> None:
    """FloatingPointError for a loss that is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step} (learning rate {rate:.2e}); lower the learning "
                                 f"rate or use --amp-dtype float32; {folder} holds the last good checkpoint")


class Totals:
    """Sums of named terms over the steps of the epoch so far and, with num_classes, the confusion matrix of its
    predictions (`matrix`); saved with a checkpoint in the middle of an epoch."""

    def __init__(self, num_classes: int | None = None, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.terms: dict[str, Tensor | float] = {}
        self.weight: Tensor | float = 0
        self.matrix = None if self.num_classes is None else ConfusionMatrix(self.num_classes, device=self.device)
        self.step: dict[str, Tensor] = {}                   # terms of the micro-batches so far
        self.step_weight: Tensor | float = 1

    def collect(self, terms: Mapping[str, Tensor], weight: Tensor | float = 1) -> None:
        """A micro-batch. terms: this process's part of each, added up over micro-batches and processes. weight: what
        these sums are divided by, of the whole step: 1, or its number of labelled elements."""
        for name, value in terms.items():
            self.step[name] = self.step.get(name, 0.0) + value.detach()
        self.step_weight = weight

    def end_step(self) -> None:
        """Add the step to the epoch."""
        for name, value in self.step.items():
            self.terms[name] = self.terms.get(name, 0.0) + widened(value)
        weight = self.step_weight
        self.weight = self.weight + (widened(weight) if isinstance(weight, Tensor) else weight)
        self.last = (self.step, weight)
        self.step = {}

    def step_means(self) -> dict[str, float]:
        """The terms of the last step. Every process has to call it; it waits for the GPU."""
        terms, weight = self.last
        return {name: float(all_reduce_sum(value)) / float(weight) for name, value in terms.items()}

    def means(self) -> dict:
        """The mean of each term, and segmentation_metrics of the matrix; then everything starts again at 0. Every
        process has to call it."""
        weight = max(float(self.weight), 1e-12)
        means = {name: float(all_reduce_sum(value)) / weight for name, value in self.terms.items()}
        if self.matrix is not None:
            means |= segmentation_metrics(self.matrix.all_reduce().matrix())
        self.reset()
        return means

    def state_dict(self) -> dict:
        """Plain types, summed over the processes: every process has to call it."""
        steps = float(self.weight) if isinstance(self.weight, Tensor) else self.weight
        state = {"terms": {name: float(all_reduce_sum(value)) for name, value in self.terms.items()}, "steps": steps}
        if self.matrix is not None:
            counts = self.matrix.counts
            if counts is None:
                counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
            state["counts"] = all_reduce_sum(counts).cpu()
        return state

    def load_state_dict(self, state: Mapping) -> None:
        """The first process carries on what all had; the number of processes may have changed. Files of earlier
        versions, without `terms`, hold the sums beside the weight (or the number of steps); some have no `counts`."""
        self.reset()
        beside = {name: value for name, value in state.items() if name not in ("steps", "weight", "counts")}
        terms = state["terms"] if "terms" in state else beside
        self.weight = state["steps"] if "steps" in state else state["weight"]
        if self.weight:
            device = torch.device(self.device)
            wide = {"dtype": widest_dtype(device), "device": device}
            self.terms = {name: torch.tensor(float(value) if is_main() else 0.0, **wide)
                          for name, value in terms.items()}
        if self.matrix is not None and is_main() and "counts" in state:
            self.matrix.counts = state["counts"].to(self.device)


def widened(value: Tensor) -> Tensor:
    """In float64, in which the sum of an epoch is exact enough; in float32 where the device has none."""
    return value.to(widest_dtype(value.device))


def rng_entries() -> dict:
    """The random states of all processes as checkpoint entries: rng of the first, rng_others. All have to call it."""
    rng, *others = all_gather(rng_state())
    return {"rng": rng, "rng_others": others}


def restore_rng(checkpoint: Mapping | None, seed: int, step: int) -> None:
    """Every process goes on with the state it had; where it had none (a fresh start, more processes than before), all
    but the first draw their own random numbers, so that each drops out different elements. ValueError where they go on
    from different steps."""
    if len(steps := {*all_gather(step)}) > 1:
        raise ValueError(f"the processes go on from different steps ({', '.join(map(str, sorted(steps)))}): the output "
                         f"folder must be the same for all of them, on a file system that the machines share")
    others = [] if checkpoint is None else checkpoint.get("rng_others", [])
    if checkpoint is not None and is_main():
        set_rng_state(checkpoint["rng"])
    elif len(others) == world_size() - 1 and not is_main():
        set_rng_state(others[rank() - 1])
    elif not is_main():
        torch.manual_seed(derived_seed(seed, rank(), step))


# The flag that starts a new run from the weights of a checkpoint.
FROM_WEIGHTS = {"train_segmentation.py": "--pretrained_path", "train_upernet_head.py": "--head-weights",
                "train_m2f_head.py": "--head-weights", "train_linear_head.py": "--head-weights",
                "train_pmt_head.py": "--head-weights", "train_eomt.py": "--network-weights"}


def check_same_run(checkpoint: Mapping, config: Mapping, total_steps: int, sections: Sequence[str],
                   seed: int | None = None, except_keys: Sequence[str] = (),
                   batch_of_all_processes: bool = False) -> None:
    """A resumed run must be the same run: ValueError where `sections` of the config (but for except_keys, written as
    section.key), the seed, the number of steps, or the items a batch over all processes differ. The last may differ at
    the end of an epoch where only the number of processes changed.

    seed None: the checkpoint is only tested, in batches of any size. batch_of_all_processes: training.batch_size
    counts the items of all processes together, not of one.
    """
    advice = "resume with the same config and data, or start afresh in another --output-dir"
    flag = FROM_WEIGHTS.get(checkpoint.get("script"))
    if checkpoint["total_steps"] < total_steps and flag and config["model"].get("name") != "deeplab_v2":
        advice += f" from these weights, {flag} FILE"
    for section in sections:
        stored = checkpoint["config"].get(section, {})
        for key, value in config[section].items():
            before = stored.get(key, value)                     # a setting that is newer than the checkpoint
            if before != value and f"{section}.{key}" not in except_keys:
                raise ValueError(f"{section}.{key} is {value!r}, but {before!r} in the checkpoint; {advice}")
    if seed is not None and checkpoint["seed"] != seed:
        raise ValueError(f"--seed {seed}, but {checkpoint['seed']} in the checkpoint; {advice}")
    if checkpoint["total_steps"] != total_steps:
        raise ValueError(f"this run has {total_steps} steps, that of the checkpoint {checkpoint['total_steps']} "
                         f"(epochs, batch size, processes, number of files); {advice}")
    before, now = checkpoint["config"]["training"]["batch_size"], config["training"]["batch_size"]
    within = checkpoint.get("batch") or before != now
    if not batch_of_all_processes:
        before, now = before * (1 + len(checkpoint.get("rng_others", []))), now * world_size()
    if seed is not None and within and before != now:
        raise ValueError(f"the checkpoint is of {before} items a batch, over all processes, and now there would be "
                         f"{now}; {advice}")
