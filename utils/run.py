"""What every training run does around its method: device and processes, resume, log, checkpoints, stopping.

Run never calls the network, never looks into a batch and has no hooks: what happens in a step stands in the script.
train_upernet_head.py shows its use, train_prototype.py another policy of saving and stopping.
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

from utils.checkpoint import CheckpointKeeper, EarlyStopping, RunFolder, entry_of, find_resume
from utils.cli import ArgumentParser, AtLeast, Given, StopRequested, StopSignal
from utils.config import Config
from utils.device import AMP_DTYPES, amp_settings, autocast, describe, slow_dtype
from utils.distributed import EpochBatchSampler, all_agree_max, broadcast_buffers, cleanup, is_main, join
from utils.log import RunLog
from utils.metrics import single_numbers
from utils.run_folder import check_same_data, claim_folder, open_checkpoint, restore_scaler, write_run_files
from utils.seed import seed_everything
from utils.step_times import StepTimes
from utils.training import Totals, check_finite, check_same_run, optimizer_step, restore_rng, rng_entries
from utils.weights import load_weights


def add_run_flags(parser: ArgumentParser, script: str, num_workers: int | None = 4) -> None:
    """The flags of a run, the same in all scripts. They are no part of the experiment, so not of its config."""
    add = parser.add_argument
    folder = f"exp/{script.removeprefix('train_').removesuffix('.py')}"
    add("--output-dir", action=Given, default=folder, help="run folder")
    add("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: the run folder's newest")
    add("--data-changed", action="store_true", help="go on although files or labels are not the checkpoint's")
    add("--test-only", action="store_true", help="score the --resume checkpoint and stop")
    add("--seed", type=int, default=0)
    add("--deterministic", action="store_true", help="deterministic GPU kernels, slower")
    add("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    add("--amp-dtype", choices=tuple(AMP_DTYPES), help="default: bfloat16 on CUDA, else float32; "
        "of --test-only on a CPU that computes in bfloat16: what the checkpoint was trained in")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--threads", type=AtLeast(1), metavar="N", help="of PyTorch's on a CPU; default: OMP_NUM_THREADS or all cores")
    add("--num-workers", type=AtLeast(0), default=num_workers, help="loader processes; 0: load in the main process")
    add("--limit-batches", type=AtLeast(0), default=0, metavar="N", help="N batches per epoch or evaluation; 0: all")
    add("--profile", type=AtLeast(1), default=0, metavar="N", help="also print where the time of N steps goes")
    add("--wandb", action="store_true", help="also log to Weights & Biases")
    add("--debug", action="store_true", help="show the traceback of an error")


class Run:
    """The state and the bookkeeping of one training run.

    args: the flags of add_run_flags. script: the name in checkpoints, "train_sonata.py". defaults: of its settings.
    checkpoint_dir, log_dir: in place of OUTPUT_DIR/model and /log. needs_checkpoint: what to say where --test-only has
    no checkpoint; None: it needs none. Call in this order: plan, restore, wrap, track, training, epochs, steps.
    Attributes: device, rank, world, amp_dtype, scaler, folder; checkpoint and resume_path (None on a fresh start);
    messages for the top of the log; epoch, batch, step: epochs finished, batches of the next one, optimiser steps;
    totals of the epoch so far; entries of a checkpoint, whose values a script may replace. Raises ValueError, OSError.
    """

    def __init__(self, args: argparse.Namespace, script: str, defaults: Mapping, checkpoint_dir: str | None = None,
                 log_dir: str | None = None, needs_checkpoint: str | None = "--test-only needs a checkpoint") -> None:
        self.args = args
        self.script = script
        torch.set_num_threads(args.threads or torch.get_num_threads())
        self.device, self.rank, self.world = join(args.device)
        seed_everything(args.seed, args.deterministic)
        self.folder = RunFolder(args.output_dir, checkpoint_dir, log_dir)
        self.lock = claim_folder(self.folder, script, args)
        self.resume_path, self.messages = find_resume(args.resume, self.folder.model, script)
        self.checkpoint = open_checkpoint(args, self.resume_path, script, defaults, self.folder.model,
                                          needs_checkpoint if args.test_only else None)
        amp_dtype = args.amp_dtype or ("native" if args.test_only and self.checkpoint else None)    # as evaluate.py
        self.amp_dtype, self.scaler = amp_settings(self.device, amp_dtype, self.checkpoint)
        self.messages += slow_dtype(self.device, self.amp_dtype)
        self.epoch = self.batch = self.step = 0
        self.data: dict = {}
        self.numbers: dict = {}                             # of the last evaluation
        self.stop = StopSignal()
        self.times = StepTimes(args.profile, self.device)

    def autocast(self, width: int | None = None) -> contextlib.AbstractContextManager:
        return self.times.forward(autocast(self.device, self.amp_dtype, width))

    def check_data(self, **datasets: Any) -> None:
        """Keep the fingerprint() of the run's data sets in checkpoints. ValueError where a resumed run had others."""
        self.data = {name: dataset.fingerprint() for name, dataset in datasets.items() if dataset is not None}
        if self.checkpoint is not None:
            self.messages += check_same_data(self.checkpoint, self.data, self.args.data_changed)

    def plan(self, num_items: int, config: Config, *, batch_size: int, epochs: int, accumulate: int = 1,
             drop_last: bool = False, compare: Sequence[str] = (), free: Sequence[str] = (),
             batch_of_all_processes: bool = False) -> EpochBatchSampler:
        """Fix the number of steps; returns the sampler. batch_size: items of a micro-batch in this process. compare:
        sections of the config in which a resumed run must agree (ValueError where it does not); free: section.key among
        them that may differ. batch_of_all_processes: see check_same_run."""
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
        """Fill the model from the resumed checkpoint; False on a fresh start. ValueError unless all fits."""
        if self.checkpoint is None:
            return False
        self.messages.append(load_weights(model, self.checkpoint["model"], self.resume_path, what="model"))
        return True

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model to the device; returns what to call in training: with SyncBatchNorm (CUDA), compiled, DDP."""
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
        save_interval: epochs between checkpoints that stay; keep_top_k: best ones besides model_best.pth; 0: none.
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
            stateful = {"optimizer": optimizer, "scheduler": scheduler, "best": self.keeper, "totals": self.totals,
                        **self.entries}
            for name, part in stateful.items():
                if hasattr(part, "load_state_dict"):
                    part.load_state_dict(entry_of(self.checkpoint, name, self.resume_path))
            self.messages += restore_scaler(self.scaler, self.checkpoint, self.amp_dtype)
            self.epoch, self.batch, self.step = (self.checkpoint[name] for name in ("epoch", "batch", "step"))
        restore_rng(self.checkpoint, self.args.seed, self.step)

    @contextlib.contextmanager
    def training(self, *lines: str, log_interval: int, tensorboard: bool = True) -> Iterator[None]:
        """The run folder, which no other run may have, the log with `lines` on top, Ctrl-C, SIGTERM and SIGHUP as a
        request to stop, the last line."""
        self.log_interval = log_interval
        at = None if self.checkpoint is None else self.step
        wandb = {"project": "segheads", "name": self.config.get("experiment_name"), "config": self.config.to_dict()}
        with self.lock:
            if is_main():
                self.messages += write_run_files(self.folder, self.config, self.device, self.args.seed, at is not None)
            self.log = RunLog(self.folder.log, self.rank, tensorboard, total_steps=self.total_steps, resume_step=at,
                              wandb=wandb if self.args.wandb else None)
            for line in (*self.lock.messages, *self.messages, *lines):
                self.log.info(line)
            if self.resume_path not in (None, self.folder.model / "model_last.pth"):   # what --resume auto goes on from
                self.save(None if self.batch else self.epoch)
            with StopSignal() as self.stop, self.log:
                yield
                self.log.info(f"Best {self.monitor}: {self.keeper.best()}; checkpoints in {self.folder.model}")
        cleanup()

    def epochs(self, dataset: Any, sampler: EpochBatchSampler, stopping: EarlyStopping | None = None) -> Iterator[int]:
        """The epochs still to do, by number. StopRequested after one in which a stop was asked for. dataset needs
        set_epoch(epoch)."""
        while self.epoch < self.num_epochs and not (stopping is not None and stopping.reached):
            self._started = time.monotonic()
            dataset.set_epoch(self.epoch)
            sampler.set_epoch(self.epoch, self.batch)
            yield (before := self.epoch)
            assert self.epoch > before, "the body has to go through run.steps to its end; --limit-batches shortens it"
            if stopping is not None and stopping.reached:
                self.log.info(f"No better score for {stopping.patience} evaluations: stopped early.")
            elif self.epoch < self.num_epochs:
                self.stop_if_asked(f"after epoch {self.epoch}")

    def steps(self, loader: DataLoader) -> Iterator[list]:
        """The micro-batches of each remaining optimiser step of the epoch, for backward and update. After each:
        counters, totals, log, and if a stop was asked for a checkpoint and StopRequested."""
        remaining = len(loader.batch_sampler) - self.batch
        limit = self.args.limit_batches or len(loader.batch_sampler)
        micro_batches: list = []
        self.times.enter("data")
        for batch in loader if self.batch < limit else ():  # not where the run was stopped right at the limit
            self.times.enter("prepare")
            remaining -= 1
            micro_batches.append(batch)
            if len(micro_batches) < self.accumulate and remaining:
                self.times.enter("data")
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
        is given (one number for the whole step). terms: this micro-batch's parts of what is logged, summed like the
        loss, which is among them as `total` or `loss`; default: the loss alone.
        """
        assert terms is None or {"total", "loss"} & terms.keys(), "terms need the loss, as `total` or `loss`"
        scaled = loss * self.world                          # DistributedDataParallel takes the mean over the processes
        if weight is not None:
            weight = weight.clamp(min=1e-12)
            scaled = scaled / weight
        self.times.enter("backward")
        self.scaler.scale(scaled).backward()
        self.times.enter("prepare")
        self.totals.collect(terms or {"loss": loss}, 1 if weight is None else weight)

    def update(self, clip_norm: float = 0.0) -> None:
        """See optimizer_step."""
        self.times.enter("update")
        optimizer_step(self.optimizer, self.scheduler, self.scaler, clip_norm)

    def count_step(self) -> None:
        """Count the step; every log_interval steps log its terms, where Run waits for the GPU, and between them, where
        that takes long, that the run goes on. FloatingPointError where the loss is not finite."""
        self.step += 1
        self.totals.end_step()
        if table := self.times.end_step(self.step):
            self.log.info(table)
        if self.step % self.log_interval:
            return self.log.still_running(self.step)
        means = self.totals.step_means()
        loss = means.pop("total") if "total" in means else means.pop("loss")
        rate = max(self.scheduler.get_last_lr())            # of the group with the largest rate
        check_finite(loss, self.step, rate, self.args.output_dir)
        self.log.train_step(self.step, loss=loss, **means, lr=rate)

    def due(self, interval: int) -> bool:
        """Whether something is due after this epoch: every `interval` epochs (0: never) and after the last."""
        return interval > 0 and (self.epoch % interval == 0 or self.epoch == self.num_epochs)

    def end_epoch(self, result: Mapping | None, shown: Mapping[str, str], score: str = "miou",
                  more: Mapping[str, float] | None = None) -> dict:
        """log_epoch, then save, as the best where the number named `score` is."""
        train = self.log_epoch(result, shown, more)
        self.save(self.epoch, None if result is None else self.numbers[score])
        return train

    def log_epoch(self, result: Mapping | None, shown: Mapping[str, str], more: Mapping | None = None) -> dict:
        """Log the epoch's totals, whose means it returns, and an evaluation (metrics, loss, seconds; or None). shown:
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
        return {**single_numbers(self.numbers), "best": self.keeper.best_score, "best_epoch": self.keeper.best_epoch}

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
                "total_steps": self.total_steps, "seed": self.args.seed, "data": self.data,
                "amp_dtype": str(self.amp_dtype or torch.float32), "epoch": self.epoch, "batch": self.batch,
                "step": self.step}

    def save(self, epoch: int | None = None, score: float | None = None) -> None:
        """Write model_last.pth, the file of a finished epoch where one is due, model_best.pth where `score` is the best
        so far. Every process has to call it; rank 0 writes."""
        snapshot = self.snapshot()
        if is_main() and self.keeper.save_all(snapshot, epoch, score):
            self.log.info(f"New best {self.monitor}: {score:.4f}. Checkpoint saved.")
        self.log.pause(self.step)
        self.times.pause()

    def stop_requested(self) -> int:
        """The signal by which any process was asked to stop, else 0. Every process has to call it."""
        return all_agree_max(self.stop.requested or 0)

    def stop_if_asked(self, where: str) -> None:
        """Raise StopRequested, with the command that goes on, if a stop was requested. Save first."""
        if signum := self.stop_requested():
            command = shlex.join(["python", *sys.argv, "--resume", "auto"])
            raise StopRequested(signum, f"stopped {where}, saved; go on with: {command}")
