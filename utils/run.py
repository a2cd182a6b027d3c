"""What every training run does around its method: device and processes, resume, log, checkpoints, stopping.

Run never calls the network, never looks into a batch and has no hooks: what happens in a step, and in which order,
stands in the script. train_upernet_head.py shows its use. For another policy of saving or stopping call save and
stop_if_asked there, as train_prototype.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.checkpoint import CheckpointKeeper, EarlyStopping, RunFolder, check_writable, find_resume, load_checkpoint
from utils.cli import ArgumentParser, AtLeast, StopRequested, StopSignal
from utils.config import Config, override_config
from utils.device import AMP_CHOICES, amp_settings, autocast, describe, slow_dtype
from utils.distributed import EpochBatchSampler, all_agree_max, broadcast_buffers, cleanup, is_main, join
from utils.log import RunLog
from utils.metrics import single_numbers
from utils.seed import seed_everything
from utils.training import Totals, check_same_run, optimizer_step, restore_rng, rng_entries, write_run_files
from utils.weights import load_weights


def add_run_flags(parser: ArgumentParser, script: str, num_workers: int | None = 4) -> None:
    """The flags of a run, the same in all scripts. They are no part of the experiment, so not of its config."""
    add = parser.add_argument
    add("--output-dir", default=f"exp/{script.removeprefix('train_').removesuffix('.py')}", help="run folder")
    add("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: the run folder's newest")
    add("--test-only", action="store_true", help="score the --resume checkpoint and stop")
    add("--seed", type=int, default=0)
    add("--deterministic", action="store_true", help="deterministic GPU kernels, slower")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    add("--amp-dtype", choices=AMP_CHOICES, help="default: bfloat16 on CUDA, else float32; native: bfloat16 "
                                                "wherever the device computes in it, a CPU, too")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--num-workers", type=AtLeast(0), default=num_workers, help="loader processes; 0: load in the main process")
    add("--limit-batches", type=AtLeast(0), default=0, metavar="N", help="only N batches per epoch or evaluation")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    add("--debug", action="store_true", help="show the traceback of an error")


def headline(result: Mapping) -> dict[str, float]:
    """The single numbers of an evaluation, and its loss."""
    return {**single_numbers(result["metrics"]), "loss": result["loss"]}


class Run:
    """The state and the bookkeeping of one training run.

    args: the flags of add_run_flags. script: the name in checkpoints, "train_sonata.py". defaults: of its settings.
    checkpoint_dir, log_dir: in place of OUTPUT_DIR/model and /log. needs_checkpoint: default: with --test-only.
    Attributes: device, rank, world, amp_dtype, scaler, folder; checkpoint and resume_path (None on a fresh start);
    messages, lines for the top of the log; epoch, batch, step: epochs finished, batches of the next one, optimiser
    steps; totals of the epoch so far; entries, what a checkpoint holds besides, whose values a script may replace.
    Raises ValueError and OSError: a device, folder or checkpoint that cannot be used, none where one is needed.
    """

    def __init__(self, args: argparse.Namespace, script: str, defaults: Mapping, checkpoint_dir: str | None = None,
                 log_dir: str | None = None, needs_checkpoint: bool | None = None) -> None:
        self.args = args
        self.script = script
        self.device, self.rank, self.world = join(args.device)
        self.amp_dtype, self.scaler = amp_settings(self.device, args.amp_dtype)
        seed_everything(args.seed, args.deterministic)
        self.folder = RunFolder(args.output_dir, checkpoint_dir, log_dir)
        self.resume_path, self.messages = find_resume(args.resume, self.folder.model, script)
        self.messages += slow_dtype(self.device, self.amp_dtype)
        needed = args.test_only if needs_checkpoint is None else needs_checkpoint
        if needed and self.resume_path is None:
            there = f"there is no checkpoint in {self.folder.model}; " if args.resume == "auto" else ""
            raise ValueError(f"--test-only needs a checkpoint: {there}add --resume PATH or --resume auto; a network "
                             f"that was never trained has no score")
        self.checkpoint = load_checkpoint(self.resume_path, script) if self.resume_path else None
        if self.checkpoint is not None:                     # keys that are newer than it have their defaults
            self.checkpoint["config"] = override_config(self.checkpoint["config"], defaults, []).to_dict()
        if not args.test_only:
            check_writable(self.folder.model, self.folder.log, self.folder.config)
        self.epoch = self.batch = self.step = 0
        self.numbers: dict = {}                             # of the last evaluation
        self.stop = StopSignal()                            # takes signals in training only

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.device, self.amp_dtype)

    def plan(self, num_items: int, config: Config, *, batch_size: int, epochs: int, accumulate: int = 1,
             drop_last: bool = False, compare: Sequence[str] = (), free: Sequence[str] = (),
             batch_of_all_processes: bool = False) -> EpochBatchSampler:
        """Fix the number of steps; returns the sampler. batch_size: items of a micro-batch in this process. compare,
        free, batch_of_all_processes: of check_same_run, which refuses the checkpoint of another run (ValueError)."""
        sampler = EpochBatchSampler(num_items, batch_size, self.args.seed, drop_last=drop_last, group=accumulate)
        batches = min(len(sampler), self.args.limit_batches or len(sampler))
        self.num_epochs = epochs
        self.accumulate = accumulate
        self.steps_per_epoch = math.ceil(batches / accumulate)
        self.total_steps = epochs * self.steps_per_epoch
        self.description = (f"effective batch {batch_size * accumulate * self.world} on {describe(self.device)}, "
                            f"{self.amp_dtype or torch.float32}, seed {self.args.seed}")
        if self.checkpoint is not None:
            check_same_run(self.checkpoint, config, self.total_steps, compare, self.args.seed, free,
                           batch_of_all_processes)
        return sampler

    def restore(self, model: nn.Module) -> bool:
        """Fill the model from the resumed checkpoint; False on a fresh start. ValueError unless all tensors fit."""
        if self.checkpoint is None:
            return False
        self.messages.append(load_weights(model, self.checkpoint["model"], self.resume_path, what="model"))
        return True

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to the device; returns the network to call in training: with synchronised batch norms (on
        CUDA), compiled, under DistributedDataParallel, as flags and processes ask."""
        self.model = model.to(self.device)
        network = self.model
        devices = [self.device] if self.device.type == "cuda" else None
        if self.world > 1 and devices:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        if self.args.compile:
            network = torch.compile(network)
        return nn.parallel.DistributedDataParallel(network, devices) if self.world > 1 else network

    def track(self, *, config: Config, class_names: Sequence[str] | None, palette: Any,
              optimizer: torch.optim.Optimizer | None, scheduler: Any, save_interval: int, keep_top_k: int = 0,
              monitor: str = "mIoU", mode: str = "max", num_classes: int | None = None,
              leave_out: Collection[str] = (), **entries: Any) -> None:
        """Name everything that a checkpoint holds, and restore it from the resumed one.

        monitor, mode: the score's name in messages; "max" or "min" is best. num_classes: the totals count a confusion
        matrix. leave_out: tensors of the model that come from another file. entries: more of a checkpoint, plain
        values as they are, objects (EMA, EarlyStopping) by their state_dict.
        """
        self.config = config
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.monitor = monitor
        self.leave_out = frozenset(leave_out)
        self.entries = {"class_names": class_names, "palette": palette, **entries}
        self.keeper = CheckpointKeeper(self.folder.model, keep_top_k, save_interval, mode)
        self.totals = Totals(num_classes, self.device)
        if self.checkpoint is not None:
            stateful = {"optimizer": optimizer, "scheduler": scheduler, "scaler": self.scaler, "best": self.keeper,
                        "totals": self.totals, **self.entries}
            for name, part in stateful.items():
                if hasattr(part, "load_state_dict"):
                    part.load_state_dict(self.checkpoint[name])
            self.epoch, self.batch, self.step = (self.checkpoint[name] for name in ("epoch", "batch", "step"))
        restore_rng(self.checkpoint, self.args.seed, self.step)

    @contextlib.contextmanager
    def training(self, *lines: str, log_interval: int, tensorboard: bool = True) -> Iterator[None]:
        """The run folder, the log with `lines` on top (one every log_interval steps follows), Ctrl-C and SIGTERM as a
        request to stop, the last line."""
        self.log_interval = log_interval
        resumed = self.checkpoint is not None
        if is_main():
            write_run_files(self.folder, self.config, self.device, self.args.seed, resumed)
        wandb = {"project": "segheads", "name": self.config.get("experiment_name"), "config": self.config.to_dict()}
        self.log = RunLog(self.folder.log, self.rank, tensorboard, total_steps=self.total_steps,
                          resume_step=self.step if resumed else None, wandb=wandb if self.args.wandb else None)
        for line in (*self.messages, *lines):
            self.log.info(line)
        if self.resume_path not in (None, self.folder.model / "model_last.pth"):       # what --resume auto goes on from
            self.save(None if self.batch else self.epoch)
        with StopSignal() as self.stop, self.log:
            yield
            self.log.info(f"Best {self.monitor}: {self.keeper.best()}; checkpoints in {self.folder.model}")
        cleanup()

    def epochs(self, dataset: Any, sampler: EpochBatchSampler, stopping: EarlyStopping | None = None) -> Iterator[int]:
        """The epochs still to do, by number. StopRequested behind one in which a stop was asked for."""
        while self.epoch < self.num_epochs and not (stopping is not None and stopping.reached):
            self._started = time.monotonic()
            dataset.set_epoch(self.epoch)
            sampler.set_epoch(self.epoch, self.batch)
            yield self.epoch
            if stopping is not None and stopping.reached:
                self.log.info(f"No better score for {stopping.patience} evaluations: stopped early.")
            elif self.epoch < self.num_epochs:
                self.stop_if_asked(f"after epoch {self.epoch}")

    def steps(self, loader: DataLoader) -> Iterator[list]:
        """The micro-batches of each optimiser step that the epoch still has. Behind each, for which the script has
        called backward and update: counters, totals, log, and where a stop was asked for a checkpoint and
        StopRequested. Behind the last, the epoch is counted."""
        remaining = len(loader.batch_sampler) - self.batch
        limit = self.args.limit_batches or len(loader.batch_sampler)
        micro_batches: list = []
        for batch in loader if self.batch < limit else ():  # not where the run was stopped right at the limit
            remaining -= 1
            micro_batches.append(batch)
            if len(micro_batches) < self.accumulate and remaining:
                continue
            yield micro_batches
            self.batch += len(micro_batches)
            self.count_step()
            micro_batches = []
            if self.stop_requested():
                self.save()
                self.stop_if_asked(f"at step {self.step} of {self.total_steps}")
            if self.batch >= limit:
                break
        broadcast_buffers(self.model)
        self.epoch += 1
        self.batch = 0

    def backward(self, loss: Tensor, terms: Mapping[str, Tensor] | None = None, weight: Tensor | None = None) -> None:
        """Add the gradient of a micro-batch, and its terms to those of the step.

        loss: a part of the step's loss, which is the sum over micro-batches and processes, divided by `weight` where it
        is given (one number for the whole step). terms: what is logged, default the loss; `total` is the loss, too.
        """
        scaled = loss * self.world                          # DistributedDataParallel takes the mean over the processes
        if weight is not None:
            weight = weight.clamp(min=1e-12)
            scaled = scaled / weight
        self.scaler.scale(scaled).backward()
        self.totals.collect(terms or {"loss": loss}, 1 if weight is None else weight)

    def update(self, clip_norm: float = 0.0) -> None:
        """One optimiser step; see optimizer_step."""
        optimizer_step(self.optimizer, self.scheduler, self.scaler, clip_norm)

    def count_step(self) -> None:
        """Count the step and its terms, and log them every log_interval steps, where Run waits for the GPU.
        FloatingPointError where the loss is not finite."""
        self.step += 1
        self.totals.end_step()
        if self.step % self.log_interval:
            return
        means = self.totals.step_means()
        loss = means.pop("total") if "total" in means else means.pop("loss")
        rate = max(self.scheduler.get_last_lr())            # of the group with the largest rate
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step} (learning rate {rate:.2e}); lower the "
                                     f"learning rate or use --amp-dtype float32; {self.args.output_dir} holds the last "
                                     f"good checkpoint")
        self.log.train_step(self.step, loss=loss, **means, lr=rate)

    def due(self, interval: int) -> bool:
        """Whether something happens behind this epoch: every `interval` epochs (0: never) and behind the last."""
        return interval > 0 and (self.epoch % interval == 0 or self.epoch == self.num_epochs)

    def end_epoch(self, result: Mapping | None, shown: Mapping[str, str], score: str = "miou",
                  more: Mapping[str, float] | None = None) -> dict:
        """log_epoch, then save, as the best where the number named `score` is."""
        train = self.log_epoch(result, shown, more)
        self.save(self.epoch, None if result is None else self.numbers[score])
        return train

    def log_epoch(self, result: Mapping | None, shown: Mapping[str, str], more: Mapping | None = None) -> dict:
        """Log the epoch's totals, whose record it returns, and an evaluation (metrics, loss, seconds; or None). shown:
        {label on the console: name of a metric}. more: numbers of the evaluation besides its metrics."""
        terms = tuple(self.totals.terms)
        train = self.totals.means()
        train.setdefault("loss", train.get("total"))
        place = (self.epoch, self.step, time.monotonic() - self._started)
        if result is None:
            self.log.epoch(*place, shown, terms, train)
            return train
        self.numbers = {**result["metrics"], "loss": result["loss"], **(more or {})}
        self.log.epoch(*place, shown, terms, train, self.numbers, result["seconds"])
        return train

    def summary(self) -> dict:
        """What main returns: the numbers of the last evaluation, the best score and its epoch."""
        best = {"best": self.keeper.best_score, "best_epoch": self.keeper.best_epoch}
        return {**single_numbers(self.numbers), **best}

    def report(self, *lines: str) -> None:
        """Print what --test-only found, in one process, and leave the process group."""
        if is_main():
            print(*lines, sep="\n", flush=True)
        cleanup()

    def snapshot(self) -> dict:
        """Everything a resume needs, as checkpoint entries. Every process has to call it: it gathers what they have."""
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler,
                 "totals": self.totals, **self.entries}
        states = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
        weights = {name: value for name, value in self.model.state_dict().items() if name not in self.leave_out}
        return {"script": self.script, "config": self.config.to_dict(), "model": weights, **states, **rng_entries(),
                "total_steps": self.total_steps, "seed": self.args.seed, "epoch": self.epoch, "batch": self.batch,
                "step": self.step}

    def save(self, epoch: int | None = None, score: float | None = None) -> None:
        """Write model_last.pth; of the end of an epoch its own file where one is due, and model_best.pth where `score`
        is the best so far. Every process has to call it; rank 0 writes."""
        snapshot = self.snapshot()
        if is_main() and self.keeper.save_all(snapshot, epoch, score):
            self.log.info(f"New best {self.monitor}: {score:.4f}. Checkpoint saved.")

    def stop_requested(self) -> int:
        """The signal by which any process was asked to stop, else 0. Every process has to call it."""
        return all_agree_max(self.stop.requested or 0)

    def stop_if_asked(self, where: str) -> None:
        """Raise StopRequested, with the command that goes on, where a stop was requested; all is saved by then."""
        if signum := self.stop_requested():
            command = shlex.join(["python", *sys.argv, "--resume", "auto"])
            raise StopRequested(signum, f"stopped {where}, saved; go on with: {command}")
