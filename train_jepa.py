"""I-JEPA pre-training of the mesh encoder (Assran et al. 2023, on clusters of faces): no labels needed.

    python train_jepa.py configs/jepa_humanbody.yaml                                   # then train_downstream.py loads
    python train_downstream.py CONFIG --pretrained_path exp/jepa/model/model_last.pth  # ... its teacher
    python train_jepa.py configs/jepa_demo.yaml --device cpu                           # about a minute on two cores
    torchrun --nproc_per_node=4 train_jepa.py CONFIG                                   # several GPUs
    python train_jepa.py CONFIG --resume auto                                          # go on, bit for bit
    python train_jepa.py CONFIG --resume auto --test-only                              # monitors and probe alone

The student sees most clusters of a mesh and predicts what its teacher (a moving average of itself) makes of the hidden
ones. The loss says nothing about quality: watch the monitors, which stop a run that collapses, and the probe, which
says whether the encoder is better than a random one. Often it is not: read docs/jepa.md before spending a night on it.
Differs from train_downstream.py: masks, teacher and predictor for labels and head; a weight decay that grows.
"""

from __future__ import annotations

import copy
import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data.mesh import Augmentation, MeshDataset, MeshSpec, custom_collate_fn, feature_statistics, split_meshes
from data.mesh_features import FEATURES, NUM_DESCRIPTORS
from data.mesh_io import list_meshes
from data.mesh_masks import MaskedMeshes, MaskSpec, masked_collate_fn
from models.jepa import Jepa, momentum_at, prediction_loss, start_momentum, variance_covariance, weight_decay_at
from models.jepa_monitors import check_monitors, measure
from models.nomeformer import Nomeformer
from utils.checkpoint import CheckpointKeeper, RunFolder, check_writable, find_resume, load_checkpoint
from utils.checks import check_positive
from utils.cli import ArgumentParser, StopRequested, StopSignal, run
from utils.config import Config, Required, Setting, check_range, load_config
from utils.device import amp_settings, autocast, describe, pick_device
from utils.distributed import (
    EpochBatchSampler,
    all_agree_max,
    all_reduce_sum,
    barrier,
    cleanup,
    init_distributed,
    is_main,
    world_size,
)
from utils.log import RunLog
from utils.params import split_decay
from utils.probe import METHODS, majority, probe, probe_table
from utils.schedule import SCHEDULES, build_scheduler
from utils.seed import derived_seed, seed_everything, seed_worker
from utils.training import check_same_run, optimizer_step, restore_rng, rng_entries, write_run_files
from utils.weights import load_weights

SCRIPT = Path(__file__).name
LAYOUT_VERSION = 1                                          # of what a checkpoint holds beside the common entries
AT_LEAST = {1: ("model.embedding_dim", "model.num_heads", "model.num_attention_blocks",
                "model.num_attention_blocks_predictor", "training.epochs", "training.batch_size", "monitor.meshes",
                "probe.max_faces", "logging.log_interval"),
            0: ("loss.alpha", "loss.beta", "loss.gamma", "loss.delta", "training.gradient_clip_val",
                "scheduler.warmup_epochs", "monitor.interval", "monitor.warmup_epochs", "probe.interval",
                "checkpointing.save_interval")}
COMPARED_ON_RESUME = ("data", "model", "masking", "loss", "ema", "training", "optimizer", "scheduler", "augmentation")
FREE_ON_RESUME = ("training.batch_size", "training.resume")            # steps are compared as well

DEFAULTS = {
    "paths": {
        "mesh_dir": Required((str,)),
        "label_dir": Setting(None, (str,)),                 # only the probe reads labels; None: beside the meshes
        "val_mesh_dir": Setting(None, (str,)),              # None: taken out of mesh_dir, see data.val_split
        "val_label_dir": Setting(None, (str,)),
        "checkpoint_dir": Setting(None, (str,)),            # default OUTPUT_DIR/model
        "log_dir": Setting(None, (str,)),                   # default OUTPUT_DIR/log
        "cache_dir": Setting(".cache/meshes", (str, type(None))),      # prepared meshes; null: no cache
    },
    "data": {
        "val_split": [],                                    # as in train_downstream.py; [] and no probe: none
        "label_offset": 0,
        "ignore_labels": [],
        "label_kind": Setting("auto", (str,), ("auto", "face", "polygon", "vertex", "edge")),
    },
    "model": {
        "n_classes": Setting(None, (int,)),                 # only for the probe
        "features": ["corners", "normal", "area", "angles", "curvature", "dihedral"],
        "feature_dim": Setting(None, (int,)),               # only checked against the features
        "embedding_dim": 96,
        "num_heads": 4,
        "num_attention_blocks": 6,
        "num_attention_blocks_predictor": 3,
        "mlp_ratio": 2.0,
        "encoder_dropout": 0.0,
        "drop_path": 0.0,
        "use_pe": True,                                     # position codes; the predictor has them in any case
        "faces_per_cluster": 32,
        "n_clusters": Setting(None, (int,)),
        "clustering": Setting("bisection", (str,), ("bisection", "connected", "fps")),
        "unit": Setting(None, (float,)),                    # metres per length unit (10 for houses)
        "gradient_checkpointing": False,                    # less memory, a third more time
    },
    "masking": {
        "num_mask_blocks": 4,                               # target blocks of a mesh
        "target_scale": [0.15, 0.20],                       # share of the clusters in one of them
        "context_scale": [0.85, 1.0],                       # share in the context, before the targets are taken out
        "whole_share": 0.75,                                # of the meshes: shown whole, only their descriptors count
    },
    "loss": {
        "alpha": 1.0,                                       # I-JEPA: smooth-L1 to the teacher's embedding
        "beta": 0.0,                                        # VICReg's variance term on the student's output; 0 = off
        "gamma": 0.0,                                       # VICReg's covariance term; its paper: beta 25, gamma 1
        "delta": 1.0,                                       # smooth-L1 to descriptors of all faces; 0 = I-JEPA alone
    },
    "ema": {"momentum": Setting("auto", (str, float))},     # at the start, rising to 1; auto: 1 - 10 / steps
    "training": {
        "epochs": 300,
        "batch_size": 16,                                   # meshes (or crops) per process
        "clusters_per_batch": Setting(None, (int,)),        # crops of that many clusters, for large meshes
        "resume": False,                                    # the same as --resume auto
        "weight_decay": [0.04, 0.4],                        # first and last
        "gradient_clip_val": 1.0,
    },
    "optimizer": {"type": Setting("adamw", (str,), ("adamw",)), "learning_rate": 1e-3},
    "scheduler": {"name": Setting("cosine", (str,), SCHEDULES), "warmup_epochs": 20.0, "min_lr": 1e-6},
    "augmentation": {
        "mode": Setting("none", (str,), ("none", "z", "so3")),
        "rotation_range": [-180.0, 180.0],
        "scale_range": [1.0, 1.0],
        "deformation": 0.0,
        "noise_std": 0.0,
        "hks_noise": 0.0,
        "flip_probability": 0.0,
        "recluster": True,
    },
    "monitor": {                                            # what each value means: docs/jepa.md
        "interval": 1,                                      # epochs
        "meshes": 16,
        "stop": True,                                       # stop the run beyond a bound, or only say so
        "warmup_epochs": 20.0,                              # bounds hold after these, or a fifth of a short run
        "min_target_std": Setting(0.1, (float, type(None))),    # null: not checked
        "min_target_std_ratio": Setting(0.2, (float, type(None))),
        "min_prediction_std": Setting(0.01, (float, type(None))),
        "min_prediction_ratio": Setting(0.2, (float, type(None))),
        "max_share_mesh": Setting(0.5, (float, type(None))),
        "min_share_face": Setting(0.03, (float, type(None))),
        "max_position_r2": Setting(0.7, (float, type(None))),
        "min_content": Setting(0.05, (float, type(None))),
        "min_effective_rank": Setting(4.0, (float, type(None))),
        "min_teacher_moved": Setting(0.01, (float, type(None))),
        "min_teacher_follow": Setting(0.2, (float, type(None))),
        "max_teacher_student": Setting(1.0, (float, type(None))),
    },
    "probe": {
        "interval": 0,                                      # epochs; 0 = no probe, no labels
        "method": Setting("linear", (str,), METHODS),
        "max_faces": 50_000,                                # to fit on, of evenly spaced training meshes
    },
    "checkpointing": {"save_interval": 50},
    "logging": {"log_interval": 20, "tensorboard": True},
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    # data
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--num-workers", type=int, default=2, help="loader processes; 0 loads in the main process")
    # model
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    # run                                                                         # same in all scripts
    parser.add_argument("--output-dir", default=f"exp/{Path(SCRIPT).stem.removeprefix('train_')}", help="run folder")
    parser.add_argument("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: the run folder's newest")
    parser.add_argument("--test-only", action="store_true", help="score the --resume checkpoint and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action="store_true", help="deterministic GPU kernels, slower")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--amp-dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--limit-batches", type=int, default=0, metavar="N",
                        help="only N batches per epoch or evaluation")
    parser.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


# -- the pieces of this method -----------------------------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    for lowest, keys in AT_LEAST.items():
        for section, key in (name.split(".") for name in keys):
            check_range(f"{section}.{key}", config[section][key], lowest)
    check_positive("optimizer.learning_rate", config.optimizer.learning_rate)
    if config.model.n_classes is not None:
        check_range("model.n_classes", config.model.n_classes, 2)
    augmentation(config)
    spec = mesh_spec(config)
    if config.model.feature_dim not in (None, spec.feature_dim):
        raise ValueError(f"model.feature_dim={config.model.feature_dim}, but model.features {list(spec.features)} are "
                         f"{spec.feature_dim} wide; correct one of them (feature_dim may be left out)")
    if len(config.training.weight_decay) != 2 or min(config.training.weight_decay) < 0:
        raise ValueError(f"training.weight_decay={config.training.weight_decay}: expected the first and the last "
                         f"value, such as [0.04, 0.4]")
    if config.probe.interval and not config.model.n_classes:
        raise ValueError("probe.interval is set, but model.n_classes is not; the probe has to know how many there are")
    mask_spec(config)
    if config.masking.whole_share and not config.loss.delta:
        raise ValueError("masking.whole_share shows meshes without a target, which teach nothing where loss.delta=0; "
                         "change one of them")
    start_momentum(config.ema.momentum, 1000)


def mesh_spec(config: Config) -> MeshSpec:
    model = config.model
    return MeshSpec(tuple(model.features), model.faces_per_cluster, model.n_clusters, model.clustering,
                    config.training.clusters_per_batch, model.unit)


def augmentation(config: Config) -> Augmentation:
    return Augmentation(**{key: tuple(value) if isinstance(value, list) else value
                           for key, value in config.augmentation.items()})


def mask_spec(config: Config) -> MaskSpec:
    masking = config.masking
    for key in ("target_scale", "context_scale"):
        if len(masking[key]) != 2:
            raise ValueError(f"masking.{key}={masking[key]}: expected the smallest and the largest share")
    return MaskSpec(masking.num_mask_blocks, tuple(masking.target_scale), tuple(masking.context_scale),
                    masking.whole_share)


def split_files(config: Config) -> tuple[list[Path], list[Path]]:
    """Training and validation meshes: two folders, or mesh_dir divided by data.val_split, or no validation."""
    paths, files = config.paths, list_meshes(config.paths.mesh_dir)
    if paths.val_mesh_dir is not None:
        return files, list_meshes(paths.val_mesh_dir)
    split = config.data.val_split
    if not split and not config.probe.interval:
        return files, []
    return split_meshes(files, split)


def build_dataset(config: Config, files: list[Path], seed: int = 0, **more) -> MeshDataset:
    """Training meshes, without labels unless `more` has a label_dir."""
    settings = {"label_dir": None, "augmentation": augmentation(config), **more}
    return MeshDataset(files, spec=mesh_spec(config), num_classes=config.model.n_classes,
                       label_offset=config.data.label_offset, ignore_labels=config.data.ignore_labels,
                       label_kind=config.data.label_kind, cache_dir=config.paths.cache_dir, seed=seed, **settings)


def fixed_dataset(config: Config, files: list[Path], label_dir: str | None) -> MeshDataset:
    """For monitors and probe: every mesh turned its own way, always the same, every face once, and not changed
    otherwise. As they lie in their files, all figures may stand upright, and position alone would tell a head from a
    foot."""
    turned = Augmentation(config.augmentation.mode, tuple(config.augmentation.rotation_range), recluster=True)
    return build_dataset(config, files, label_dir=label_dir, augmentation=turned, every_part=True)


def random_encoder(config: Config, seed: int, trained: Nomeformer | None = None) -> Nomeformer:
    """The encoder as it starts, the same for the same seed: what the student begins with, and the probe's baseline.

    trained: take the mean and deviation of the features from this one."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed))
        encoder = Nomeformer(mesh_spec(config).feature_dim, model.embedding_dim, model.num_heads,
                             model.num_attention_blocks, model.mlp_ratio, model.encoder_dropout, model.drop_path,
                             model.use_pe, model.gradient_checkpointing)
    if trained is not None:
        encoder.feature_mean.copy_(trained.feature_mean)
        encoder.feature_std.copy_(trained.feature_std)
    return encoder


def build_model(config: Config, encoder: Nomeformer) -> Jepa:
    model = config.model
    return Jepa(copy.deepcopy(encoder), model.num_attention_blocks_predictor, model.num_heads, model.mlp_ratio,
                NUM_DESCRIPTORS if config.loss.delta else 0)


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def forward(network: nn.Module, batch: dict):
    return network(batch["features"], batch["mask"], batch["centroid"], batch["visible"], batch["target"],
                   batch.get("descriptors"))


def compute_loss(out, config: Config) -> dict:
    """The step's loss and its parts. Prediction and descriptors are means over the faces of all processes (VICReg's
    terms are per process)."""
    parts = {"prediction": global_mean(*prediction_loss(out.prediction, out.target, out.valid))}
    loss = config.loss.alpha * parts["prediction"]
    if config.loss.delta:
        parts["descriptors"] = global_mean(*prediction_loss(out.described, out.descriptors, out.described_valid))
        loss = loss + config.loss.delta * parts["descriptors"]
    if config.loss.beta or config.loss.gamma:
        parts["variance"], parts["covariance"] = variance_covariance(out.context, out.seen)
        loss = loss + config.loss.beta * parts["variance"] + config.loss.gamma * parts["covariance"]
    return {"loss": loss, **parts}


def global_mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total * world_size() / all_reduce_sum(count).clamp(min=1)             # DDP takes the mean over processes


# -- one epoch ---------------------------------------------------------------------------------------------------------

def train_one_epoch(network, model, loader, optimizer, scheduler, scaler, totals, state, total_steps, config, args,
                    device, amp_dtype, log, stop):
    """Steps of one epoch from state["batch"] on. totals sums the losses of the epoch; returns False if stopped."""
    network.train()
    momentum = start_momentum(config.ema.momentum, total_steps)
    if args.limit_batches and state["batch"] >= args.limit_batches:              # stopped right there, and resumed
        return True
    for batch in loader:
        batch = to_device(batch, device)
        for group in optimizer.param_groups:
            if group["name"] == "decay":
                group["weight_decay"] = weight_decay_at(state["step"], total_steps, *config.training.weight_decay)
        with autocast(device, amp_dtype):
            out = forward(network, batch)
        parts = compute_loss(out, config)
        scaler.scale(parts["loss"]).backward()
        optimizer_step(optimizer, scheduler, scaler, config.training.gradient_clip_val)
        model.update_target(momentum_at(state["step"], total_steps, momentum))   # after the optimiser's step
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + value.detach().double()
        totals["steps"] += 1
        state["step"] += 1
        state["batch"] += 1
        if state["step"] % config.logging.log_interval == 0:                     # the only wait for the GPU
            loss = float(all_reduce_sum(parts["loss"].detach())) / world_size()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {state['step']} (learning rate "
                                         f"{scheduler.get_last_lr()[-1]:.2e}); lower optimizer.learning_rate or use "
                                         f"--amp-dtype float32, then --resume auto goes on from the last good "
                                         f"checkpoint in {args.output_dir}")
            log.train_step(state["step"], loss=loss, lr=scheduler.get_last_lr()[-1])
        if all_agree_max(stop.requested or 0):
            return False
        if args.limit_batches and state["batch"] >= args.limit_batches:
            break
    return True


# -- monitors and probe ------------------------------------------------------------------------------------------------

def monitor_batch(config: Config, files: list[Path], seed: int) -> dict:
    """A fixed batch of up to monitor.meshes evenly spaced meshes (or crops) with fixed masks."""
    chosen = files[::-(-len(files) // config.monitor.meshes)]
    dataset = MaskedMeshes(fixed_dataset(config, chosen, None), replace(mask_spec(config), whole_share=0.0), seed)
    items = range(0, len(dataset), -(-len(dataset) // config.monitor.meshes))
    return masked_collate_fn([dataset[item] for item in items])


class Probe:
    """Scores encoders by a classifier on frozen embeddings, fitted on training and scored on validation meshes."""

    def __init__(self, config: Config, train_files: list[Path], val_files: list[Path], num_faces: list[int]) -> None:
        paths, self.config = config.paths, config
        label_dir = paths.label_dir or paths.mesh_dir
        val_label_dir = label_dir if paths.val_mesh_dir is None else paths.val_label_dir or paths.val_mesh_dir
        every = -(-sum(num_faces) // config.probe.max_faces)                     # num_faces of the training meshes
        self.train = fixed_dataset(config, train_files[::every], label_dir)
        self.val = fixed_dataset(config, val_files, val_label_dir)
        self.baselines: dict[str, dict] = {}

    @torch.no_grad()
    def embed(self, dataset: MeshDataset, encoder: Nomeformer | None) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (T, E) float32, or raw features, and labels (T,) of all labelled faces."""
        embeddings, labels = [], []
        for batch in DataLoader(dataset, self.config.training.batch_size, collate_fn=custom_collate_fn):
            chosen, x = batch["label"] >= 0, batch["features"]                   # (B, N, F), (B, N, F, Dg)
            if encoder is not None:
                batch = to_device(batch, next(encoder.parameters()).device)
                x = encoder(batch["features"], batch["mask"], batch["centroid"]).cpu()       # (B, N, F, E)
            embeddings.append(x[chosen].float().numpy())
            labels.append(batch["label"].cpu()[chosen].numpy())
        return np.concatenate(embeddings), np.concatenate(labels)

    def score(self, encoder: Nomeformer | None) -> dict:
        train, val = self.embed(self.train, encoder), self.embed(self.val, encoder)
        return probe(train, val, self.config.model.n_classes, self.config.probe.method)

    def prepare(self, start: Nomeformer, device: torch.device) -> None:
        """The baselines, once a run. Pre-training that does not beat all of them has not helped."""
        train, val = (label[label >= 0] for label in (np.concatenate(part.labels) for part in (self.train, self.val)))
        self.baselines = {"random encoder": self.score(copy.deepcopy(start).to(device).eval()),
                          "raw features": self.score(None),
                          "majority class": majority(train, val, self.config.model.n_classes)}

    def report(self, scores: dict, epoch: int) -> str:
        return (f"probe at epoch {epoch} ({self.config.probe.method}, fitted on {sum(self.train.num_faces):,} faces of "
                f"{len(self.train.files)} meshes, scored on {sum(self.val.num_faces):,} of {len(self.val.files)} "
                f"others)\n{probe_table({'pre-trained': scores, **self.baselines})}")


# -- what evaluate.py and others call ----------------------------------------------------------------------------------

def load_model(checkpoint: dict, device: torch.device) -> Jepa:
    """The whole network of a checkpoint of this script, in eval mode."""
    config = Config(checkpoint["config"])
    model = build_model(config, random_encoder(config, checkpoint["seed"]))
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    return model.to(device).eval()


# -- main --------------------------------------------------------------------------------------------------------------

def count_steps(config, args, train_set) -> tuple[int, EpochBatchSampler]:
    """Optimiser steps of the whole run, and the sampler."""
    sampler = EpochBatchSampler(len(train_set), config.training.batch_size, args.seed)
    return config.training.epochs * min(len(sampler), args.limit_batches or len(sampler)), sampler


def momentum_advice(momentum: float, steps: int) -> str:
    constant = 1 / (1 - momentum)
    text = f"momentum {momentum:.5g} -> 1: a time constant of {constant:.0f} of {steps} steps"
    if momentum and constant > steps / 5:
        text += "; slower than steps / 5, the teacher will hardly leave its start"
    elif constant < steps / 20:
        text += "; faster than steps / 20, which may collapse"
    return text + ("; so few steps rarely teach anything, some thousand are the least" if steps < 2000 else "")


def describe_input(model: Jepa, config: Config) -> dict:
    """What the encoder was trained on: feature_spec and cluster_spec of a checkpoint."""
    spec = mesh_spec(config)
    names = [name for name in FEATURES if name in spec.features]                 # the order of the columns
    return {"feature_spec": {"names": names, "widths": [FEATURES[name] for name in names],
                             "mean": model.encoder.feature_mean.tolist(), "std": model.encoder.feature_std.tolist(),
                             "num_heads": config.model.num_heads},
            "cluster_spec": {"method": spec.clustering, "N": spec.n_clusters, "F": spec.faces_per_cluster,
                             "clusters_per_batch": spec.clusters_per_batch, "unit": spec.unit}}


def monitor_line(values: dict) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def results(loss, values: dict, scores: dict) -> dict:
    """What main returns."""
    return {"loss": loss, **{f"monitor_{name}": value for name, value in values.items()},
            **{f"probe_{name}": value for name, value in scores.items()}}


def test_only(args, config, checkpoint, path, device, amp_dtype) -> dict:
    """Monitors and probe of a checkpoint."""
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model", "masking", "loss"))
    model = load_model(checkpoint, device)
    start = random_encoder(config, checkpoint["seed"], model.encoder)
    train_files, val_files = split_files(config)
    values, scores = measure(model, start, monitor_batch(config, val_files or train_files, args.seed), args.seed), {}
    if is_main():
        print(f"{path}: {monitor_line(values)}", flush=True)
    if config.probe.interval and is_main():
        prober = Probe(config, train_files, val_files, build_dataset(config, train_files).num_faces)
        prober.prepare(start, device)
        scores = prober.score(model.target_encoder)
        print(prober.report(scores, checkpoint["epoch"]), flush=True)
    cleanup()
    return results(checkpoint["loss"], values, scores)


def mean_totals(totals: dict) -> dict:
    """Every sum as its mean over the processes, which all of them then carry on with."""
    return {name: value if name == "steps" else all_reduce_sum(value) / world_size() for name, value in totals.items()}


def main(argv=None) -> dict:
    args = parse_args(argv)
    check_range("--limit-batches", args.limit_batches, 0)
    check_range("--num-workers", args.num_workers, 0)
    config = load_config(args.config, DEFAULTS, args.overrides)
    check_config(config)
    # device and processes                                                        # same in all scripts
    device = pick_device(args.device)
    rank, local_rank, world = init_distributed(device.type)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
    amp_dtype, scaler = amp_settings(device, args.amp_dtype)
    seed_everything(args.seed, args.deterministic)
    folder = RunFolder(args.output_dir, config.paths.checkpoint_dir, config.paths.log_dir)
    resume = args.resume or ("auto" if config.training.resume else None)
    resume_path, messages = find_resume(resume, folder.model, SCRIPT)
    if args.test_only and resume_path is None:
        raise ValueError(f"--test-only needs --resume PATH, or auto where {folder.model} has a checkpoint: a network "
                         f"that was never trained has no score")
    checkpoint = load_checkpoint(resume_path, SCRIPT) if resume_path else None
    if args.test_only:
        return test_only(args, config, checkpoint, resume_path, device, amp_dtype)
    check_writable(folder.model, folder.log, folder.config)

    # data: rank 0 fills the cache of prepared meshes, the others read it
    for turn in (True, False):
        if is_main() == turn:
            train_files, val_files = split_files(config)
            meshes = build_dataset(config, train_files, args.seed, descriptors=config.loss.delta > 0)
            train_set = MaskedMeshes(meshes, mask_spec(config), args.seed)
            watched = monitor_batch(config, val_files or train_files, args.seed)
        barrier()
    total_steps, sampler = count_steps(config, args, train_set)
    if checkpoint is not None:
        check_same_run(checkpoint, config, total_steps, COMPARED_ON_RESUME, args.seed, FREE_ON_RESUME)

    # model
    start = random_encoder(config, args.seed, None if checkpoint is None else load_model(checkpoint, device).encoder)
    if checkpoint is None:
        start.feature_mean[:], start.feature_std[:] = feature_statistics(meshes)
    model = build_model(config, start)
    if checkpoint is None and config.loss.delta:
        model.descriptor_mean[:], model.descriptor_std[:] = feature_statistics(meshes, "descriptors")
    model = model.to(device)
    untrained = measure(model, start, watched, args.seed)
    if checkpoint is not None:
        messages.append(load_weights(model, checkpoint["model"], resume_path, what="model"))
    prober = None
    if config.probe.interval and is_main():
        prober = Probe(config, train_files, val_files, meshes.num_faces)
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [local_rank] if device.type == "cuda" else None)

    # optimiser, schedule
    optimizer = torch.optim.AdamW(split_decay(model.named_parameters(), config.training.weight_decay[0]),
                                  config.optimizer.learning_rate)
    warmup = min(round(config.scheduler.warmup_epochs * total_steps / config.training.epochs), total_steps - 1)
    scheduler = build_scheduler(optimizer, config.scheduler.name, total_steps,
                                0 if config.scheduler.name == "onecycle" else warmup, config.scheduler.min_lr)
    keeper = CheckpointKeeper(folder.model, 0, config.checkpointing.save_interval)
    state = {"epoch": 0, "batch": 0, "step": 0}             # epochs finished, batches of the next one, optimiser steps
    totals, loss = {"steps": 0}, None

    # resume
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        keeper.load_state_dict(checkpoint["best"])
        state = {key: checkpoint[key] for key in state}
        totals, loss = {**checkpoint["totals"]}, checkpoint["loss"]
    restore_rng(checkpoint, args.seed, state["step"])

    def saved_state() -> dict:
        # `model` is everything; encoder, target_encoder and predictor are the same tensors again, by the names that
        # users of I-JEPA know: torch.save writes shared tensors once.
        parts = {name: getattr(model, name).state_dict() for name in ("encoder", "target_encoder", "predictor")}
        return {"script": SCRIPT, "config": config.to_dict(), "class_names": None, "palette": None,
                "model": model.state_dict(), **parts, **describe_input(model, config), "version": LAYOUT_VERSION,
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict(), **rng_entries(), "totals": mean_totals(totals), "loss": loss,
                "total_steps": total_steps, "seed": args.seed, "baselines": prober.baselines if prober else {},
                **state}

    def save(snapshot, epoch=None):
        if is_main():
            if epoch is not None:                           # before model_last, which a resume goes on from
                keeper.save_epoch(epoch, snapshot)
            keeper.save_last(snapshot)

    if is_main():
        write_run_files(folder, config, device, args.seed, resumed=checkpoint is not None)
    log = RunLog(folder.log, rank, config.logging.tensorboard, total_steps=total_steps,
                 resume_step=state["step"] if checkpoint is not None else None,
                 wandb={"project": "segheads", "config": config.to_dict()} if args.wandb else None)
    for line in (*messages, f"{len(train_files)} training and {len(val_files)} validation meshes, "
                 f"{sum(meshes.num_faces):,} faces to train on",
                 f"{sum(p.numel() for p in model.encoder.parameters()):,} parameters in the encoder, "
                 f"{sum(p.numel() for p in model.predictor.parameters()):,} in the predictor; effective batch "
                 f"{config.training.batch_size * world} on {describe(device)}, seed {args.seed}",
                 momentum_advice(start_momentum(config.ema.momentum, total_steps), total_steps),
                 f"untrained: {monitor_line(untrained)}"):
        log.info(line)
    if prober is not None:
        prober.baselines = checkpoint["baselines"] if checkpoint is not None else {}
        if not prober.baselines:
            prober.prepare(start, device)

    if resume_path not in (None, folder.model / "model_last.pth"):          # what --resume auto goes on from
        save(saved_state(), None if state["batch"] else state["epoch"])
    loader = DataLoader(train_set, batch_sampler=sampler, collate_fn=masked_collate_fn, num_workers=args.num_workers,
                        worker_init_fn=seed_worker, pin_memory=device.type == "cuda", generator=torch.Generator())
    go_on = f"go on with: {shlex.join(['python', *sys.argv, '--resume', 'auto'])}"
    values, scores = {}, {}
    with StopSignal() as stop, log:
        while state["epoch"] < config.training.epochs:
            started = time.monotonic()
            train_set.set_epoch(state["epoch"])
            sampler.set_epoch(state["epoch"], state["batch"])
            if not train_one_epoch(network, model, loader, optimizer, scheduler, scaler, totals, state, total_steps,
                                   config, args, device, amp_dtype, log, stop):
                save(saved_state())
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped at step {state['step']} of {total_steps}, saved; {go_on}")
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            steps, totals = totals["steps"], mean_totals(totals)
            train = {name: float(value) / steps for name, value in totals.items() if name != "steps"}
            loss, totals, last = train["loss"], {"steps": 0}, state["epoch"] == config.training.epochs
            log.info(f"Epoch {state['epoch']}: " + ", ".join(f"{name} {value:.4f}" for name, value in train.items())
                     + f" ({time.monotonic() - started:.1f} s)")
            log.evaluation(state["epoch"], state["step"], "train", train)

            beyond = []
            if config.monitor.interval and (state["epoch"] % config.monitor.interval == 0 or last):
                values = measure(model, start, watched, args.seed)
                log.info(f"          {monitor_line(values)}")
                log.evaluation(state["epoch"], state["step"], "monitor", values)
                if state["epoch"] > min(config.monitor.warmup_epochs, config.training.epochs / 5):
                    beyond = check_monitors(values, config.monitor, untrained)
            score = float("nan")
            if prober is not None and (state["epoch"] % config.probe.interval == 0 or last):
                scores = prober.score(model.target_encoder)
                score = scores["miou"]
                log.info(prober.report(scores, state["epoch"]))
                log.evaluation(state["epoch"], state["step"], "probe", {**scores, **prober.baselines})
            snapshot = saved_state()                        # in every process: it gathers what they have
            if is_main():
                keeper.save_best_if(score, snapshot)        # by the probe: the lowest loss is a collapsed network's
            save(snapshot, state["epoch"])
            for line in beyond:
                log.info(line)
            if all_agree_max(bool(beyond)) and config.monitor.stop:
                raise FloatingPointError(f"{beyond[0] if beyond else 'another process stopped'} (epoch "
                                         f"{state['epoch']}). docs/jepa.md says what helps; monitor.stop=false with "
                                         f"--resume auto goes on regardless")
            if all_agree_max(stop.requested or 0) and not last:
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped after epoch {state['epoch']}, saved; {go_on}")
        log.info(f"checkpoints in {folder.model}; next: python train_downstream.py CONFIG --pretrained_path "
                 f"{folder.model / 'model_last.pth'}")
    cleanup()
    return results(loss, values, scores)


if __name__ == "__main__":
    run(main)
