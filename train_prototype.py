"""Prototype segmentation: a DeepLab v2 whose classes are read off similarities to learned, then real, image patches.

    python train_prototype.py configs/prototype_voc.yaml --pretrained_path resnet101-63fe2227.pth
    python train_prototype.py CONFIG model.weights=random --device cpu --limit-batches 10           # smoke run
    python train_prototype.py CONFIG --phase 1                            # one phase, from where phase 0 ended
    torchrun --nproc_per_node=4 train_prototype.py CONFIG ...                                    # several GPUs
    python train_prototype.py CONFIG --resume auto              # go on, bit for bit, in any phase, also in the push
    python train_prototype.py CONFIG --resume exp/prototype/model/model_best.pth --test-only     # score a checkpoint
    python train_prototype.py CONFIG --resume exp/prototype/model/model_best.pth --gallery    # a page of all prototypes

Sacha et al. 2023 (ProtoSeg), after Chen et al. 2019 (ProtoPNet). Warm-up trains ASPP and prototypes, joint training
everything; the push replaces each prototype by the nearest feature of its class in the training set; fine-tuning
trains the last layer alone; pruning (training.prune) drops prototypes whose neighbours are of other classes, and
fine-tunes again. Steps are micro-steps of batch_size images, `accumulate` of them make an update. All keys are in
DEFAULTS, `section.key=value` changes one. Every number logged, every deviation from the paper: docs/prototype.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

from data import cityscapes, voc
from data.image_results import example_pair
from data.image_splits import class_info, folder_pairs
from data.images import Augmentation, SegmentationDataset, check_pairs, list_images, pair_files, read_image
from data.prototype_results import explain_pixels, prototype_colors, write_gallery, write_prototype_prediction
from models.deeplab import DeepLabV2, MultiScale, freeze_batch_norm, load_deeplab_weights
from models.ppnet import PPNet, parameter_groups, ppnet_from_state
from models.prototype_push import NearestPatches, PushTable, patch_box, provenance, prune_keep, purity, push
from utils.checkpoint import CheckpointKeeper, RunFolder, check_writable, find_resume, load_checkpoint, save_checkpoint
from utils.checks import check_positive, check_range
from utils.cli import ArgumentParser, StopRequested, StopSignal, run
from utils.config import Config, Required, Setting, load_config
from utils.device import amp_settings, autocast, describe, pick_device
from utils.distributed import (
    EpochBatchSampler,
    all_agree_max,
    all_gather,
    all_reduce_sum,
    barrier,
    broadcast_buffers,
    cleanup,
    init_distributed,
    is_main,
    shard_indices,
    this_rank,
    unwrap,
    world_size,
)
from utils.image_inference import TTA_SCALES, View, evaluate_images, segment_image
from utils.log import RunLog, progress
from utils.losses import MaskedCrossEntropyLoss
from utils.metrics import metrics_table
from utils.prototype_losses import off_class_l1, prototype_divergence, resize_label
from utils.prototype_metrics import PrototypeStatistics, noise_stability
from utils.schedule import build_scheduler
from utils.seed import seed_everything, seed_worker
from utils.training import LossTotals, check_same_run, optimizer_step, restore_rng, rng_entries, write_run_files
from utils.weights import sha256_file

SCRIPT = Path(__file__).name
STAGES = ("warmup", "joint", "push", "finetune", "prune", "refinetune")
PHASE = {"warmup": 0, "joint": 1, "push": 1, "finetune": 2, "prune": 2, "refinetune": 2}
SCANS = ("push", "prune")                                   # passes over whole photographs; the others train
SCAN_CHUNK = 200                                            # photographs between two saves of a scan
DATASETS = {"cityscapes": cityscapes, "pascal": voc}
RESULTS = {"labels": ("png", "npy"), "picture": ("png", "none"), "html": False, "pca": False,
           "explain": True}                                 # for predict.py, default first
FREE_ON_RESUME = ("training.prune", "training.patience", "training.resume", "model.weights", "dataset.cache_dir",
                  "dataset.test_split", "training.batch_size")            # items of all processes together are compared

DEFAULTS = {
    "dataset": {
        "name": Setting("folder", (str,), ("folder", *DATASETS)),           # folder: images/SPLIT and masks/SPLIT
        "root": Required((str,)),
        "train_split": "train",
        "val_split": "val",
        "test_split": Setting(None, (str,)),                # of --test-only, evaluate.py; None: they score val
        "push_split": Setting(None, (str,)),                # whose patches become prototypes; None: train_split
        "classes": Setting(None, (str,)),                   # folder: classes.json or classes.txt; None: that of root
        "window_size": [513, 513],                          # height and width of a training crop
        "scale_range": [0.5, 1.5],                          # times the photograph's own size
        "scale_step": 0.0,                                  # 0.25: DeepLab's steps
        "flip": 0.5,                                        # probability
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "ignore_label": 255,                                # folder: the masks' value for unlabelled
        "reduce_zero_label": False,                         # folder: 0 is unlabelled too, classes count from 1
        "cache_dir": Setting(".cache/images", (str, type(None))),           # what the check of all files found
    },
    "model": {
        "num_classes": Required((int,)),
        "prototype_shape": [190, 64, 1, 1],                 # prototypes of all classes together, channels
        "similarity": Setting("log", (str,), ("log", "linear")),
        "weights": Setting(None, (str,)),                   # as --pretrained_path; "random": train from scratch
        "n_blocks": [3, 4, 23, 3],                          # ResNet-101
        "base_width": 64,
        "stride_in_1x1": True,                              # as published; false: where torchvision's weights had it
        "scales": [],                                       # Pascal VOC: [0.5, 0.75], the maximum over scales
        "freeze_bn": True,                                  # false: batch norm learns in the joint phase (from scratch)
    },
    "training": {
        "steps": [15_000, 150_000, 10_000],                 # micro-steps of the three phases; 0 leaves a phase out
        "batch_size": 2,                                    # images per process and micro-step
        "accumulate": 5,                                    # micro-steps per update
        "train_last_layer": [True, True, True],             # per phase; the paper: [false, false, true]
        "patience": 0,                                      # fine-tuning ends after so many evaluations; 0: never early
        "prune": False,
        "prune_neighbors": 6,
        "prune_threshold": 3,                               # of them must be of the prototype's class
        "resume": False,                                    # the same as --resume auto
    },
    "optimizer": {
        "backbone_lr": 2.5e-5,
        "aspp_lr": 2.5e-4,
        "prototype_lr": 2.5e-4,
        "last_layer_lr": 2.5e-4,                            # in phases 0 and 1
        "finetune_lr": 1e-5,
        "weight_decay": 5e-4,                               # of backbone and ASPP
        "power": 0.9,                                       # of the polynomial schedule of the joint phase
    },
    "loss": {
        "ce": 1.0,
        "l1": 1e-4,
        "kld": 0.25,
        "kld_labels": Setting("correct", (str,), ("correct", "published")),          # published: off by one class
    },
    "evaluation": {
        "interval": 5000,                                   # micro-steps; also when progress is saved
        "size": Setting(None, (int, type(None))),           # short side; None: the photograph's own
        "window": Setting(None, (int, type(None))),         # of a sliding window; None: the whole photograph
        "squash": Setting(None, (list, type(None))),        # [513, 513]: to that, whatever its shape (paper, VOC)
        "tta": False,
        "interpretability": True,                           # evaluate.py: purity, diversity, sparsity, stability
    },
    "logging": {"log_interval": 10, "tensorboard": True},   # updates
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    # data
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--num-workers", type=int, default=4, help="loader processes; 0 loads in the main process")
    # model
    parser.add_argument("--pretrained_path", help="ResNet or DeepLab weights for the backbone (model.weights)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    # method
    parser.add_argument("--phase", type=int, choices=(0, 1, 2), help="only this phase: warm-up, joint and push, "
                        "fine-tuning (and pruning); from --resume or from where the phase before ended")
    parser.add_argument("--gallery", action="store_true", help="write OUTPUT_DIR/prototypes of --resume and stop")
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
    dataset, model, training = config.dataset, config.model, config.training
    for name, lowest in (("training.batch_size", 1), ("training.accumulate", 1), ("training.patience", 0),
                         ("training.prune_neighbors", 1), ("training.prune_threshold", 0), ("model.base_width", 1),
                         ("model.num_classes", 1), ("evaluation.interval", 1), ("logging.log_interval", 1),
                         ("loss.ce", 0), ("loss.l1", 0), ("loss.kld", 0), ("optimizer.weight_decay", 0)):
        section, key = name.split(".")
        check_range(name, config[section][key], lowest)
    for key in ("backbone_lr", "aspp_lr", "prototype_lr", "last_layer_lr", "finetune_lr", "power"):
        check_positive(f"optimizer.{key}", config.optimizer[key])
    shape = model.prototype_shape
    if len(shape) != 4 or shape[2:] != [1, 1] or min(shape) < 1 or shape[0] % model.num_classes:
        raise ValueError(f"model.prototype_shape={shape}: expected [P, D, 1, 1] with P a multiple of "
                         f"model.num_classes={model.num_classes}")
    known = {"cityscapes": 19, "pascal": 21}.get(dataset.name, model.num_classes)
    if model.num_classes != known:
        raise ValueError(f"model.num_classes={model.num_classes}: dataset.name={dataset.name} has {known} classes")
    for key, length in (("steps", 3), ("train_last_layer", 3)):
        if len(training[key]) != length:
            raise ValueError(f"training.{key}={training[key]}: one value for each of the three phases")
    for name, steps in (*((f"training.steps[{i}]", s) for i, s in enumerate(training.steps)),
                        ("evaluation.interval", config.evaluation.interval)):
        if not isinstance(steps, int) or steps < 0 or steps % training.accumulate:
            raise ValueError(f"{name}={steps}: micro-steps, a multiple of training.accumulate={training.accumulate}")
    # what would otherwise fail after the push, or in the pruning
    if not training.train_last_layer[2] and training.steps[2]:
        raise ValueError("training.train_last_layer: fine-tuning trains nothing else, so the third must be true (or "
                         "training.steps[2]=0)")
    if training.prune_threshold > training.prune_neighbors:
        raise ValueError(f"training.prune_threshold={training.prune_threshold}: at most training.prune_neighbors="
                         f"{training.prune_neighbors}, or no prototype is left")
    if len(model.n_blocks) != 4 or min(model.n_blocks) < 1:
        raise ValueError(f"model.n_blocks={model.n_blocks}: the number of blocks of four stages")
    if not all(isinstance(scale, int | float) and 0 < scale <= 2 for scale in model.scales):
        raise ValueError(f"model.scales={model.scales}: factors above 0, such as [0.5, 0.75]; [] for one scale")
    if len(dataset.mean) != 3 or len(dataset.std) != 3 or min(dataset.std) <= 0:
        raise ValueError(f"dataset.mean={dataset.mean}, std={dataset.std}: red, green and blue, std above 0")
    for name, size in (("dataset.window_size", dataset.window_size), ("evaluation.squash", config.evaluation.squash)):
        if size is not None and (len(size) != 2 or not all(isinstance(n, int) and n >= 8 for n in size)):
            raise ValueError(f"{name}={size}: [height, width] in pixels")
    for name in ("window", "size"):
        check_range(f"evaluation.{name}", config.evaluation[name] or 8, 8)
        if config.evaluation.squash and config.evaluation[name]:
            raise ValueError(f"evaluation.squash and evaluation.{name}: squashing is of whole photographs; name one")
    augmentation(config).check()


def augmentation(config: Config) -> Augmentation:
    """DeepLab's: scale of the photograph itself, crop, mirror image; no colours, any classes in a crop."""
    data = config.dataset
    return Augmentation(tuple(data.scale_range), cat_max_ratio=1.0, flip=data.flip, brightness=0.0,
                        contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0.0, scale_of="photo",
                        scale_step=data.scale_step)


def class_list(config: Config) -> tuple[list[str], np.ndarray]:
    """Class names and colours (C, 3) uint8."""
    data = config.dataset
    if data.name in DATASETS:
        return list(DATASETS[data.name].CLASS_NAMES), np.array(DATASETS[data.name].PALETTE, np.uint8)
    return class_info(data.root, data.classes, config.model.num_classes)


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None, num_workers: int = 4) -> SegmentationDataset:
    """split train (random crops) | val | test | push, or the photographs of data_dir with masks in label_dir; all but
    train are whole photographs. Every file is checked once."""
    data, table = config.dataset, None
    if data_dir is not None:
        if label_dir is None:
            raise ValueError("--label-dir is needed: the folder of the masks of --data-dir")
        pairs = pair_files(list_images(data_dir), list_images(label_dir), ("--data-dir", "--label-dir"))
    else:
        name = {"train": data.train_split, "val": data.val_split, "test": data.test_split,
                "push": data.push_split or data.train_split}[split]
        if name is None:
            raise ValueError("there is no test split: set dataset.test_split, or score the validation split")
        pairs = (DATASETS[data.name].pairs if data.name in DATASETS else folder_pairs)(data.root, name)
    if data.name in DATASETS:
        table = DATASETS[data.name].LABEL_TABLE
    arguments = (config.model.num_classes, data.ignore_label, data.reduce_zero_label)
    check_pairs(pairs, *arguments, data.cache_dir, max(1, num_workers), table=table)
    return SegmentationDataset(pairs, tuple(data.window_size), arguments[0],
                               augmentation(config) if split == "train" else None, *arguments[1:], seed,
                               "crops" if split == "train" else "whole", table=table)


def build_model(config: Config, state: dict | None = None) -> PPNet:
    """The network from random numbers, or with the tensors of a checkpoint, which may hold fewer prototypes."""
    model = config.model
    P, D = model.prototype_shape[:2]
    backbone = DeepLabV2(D, tuple(model.n_blocks), model.base_width, model.stride_in_1x1)
    features = MultiScale(backbone, tuple(model.scales))
    if state is not None:
        return ppnet_from_state(features, state, model.similarity, "the checkpoint")
    return PPNet(features, model.num_classes, P // model.num_classes, D, model.similarity)


def stage_lengths(config: Config, num_images: int, limit: int) -> dict[str, int]:
    """Micro-steps of the training stages and photographs of the scans; 0 for a stage that is left out."""
    training, most = config.training, limit or sys.maxsize
    if limit:
        most = -(-limit // training.accumulate) * training.accumulate
    steps = dict(zip(("warmup", "joint", "finetune"), (min(s, most) for s in training.steps), strict=True))
    images = min(num_images, limit or num_images)
    steps |= {"push": images, "prune": images * training.prune, "refinetune": steps["finetune"] * training.prune}
    return {name: steps[name] for name in STAGES}


def start_stage(name: str, model: PPNet, config: Config, updates: int):
    """Optimiser and schedule of a training stage; only its parameters get a gradient."""
    phase, settings = PHASE[name], config.optimizer
    rates = {"backbone": settings.backbone_lr, "aspp": settings.aspp_lr, "prototypes": settings.prototype_lr,
             "last_layer": settings.finetune_lr if phase == 2 else settings.last_layer_lr}
    optimizer = torch.optim.Adam(parameter_groups(model, phase, rates, settings.weight_decay,
                                                  config.training.train_last_layer[phase], config.model.freeze_bn))
    schedule = "poly" if name == "joint" else "constant"
    return optimizer, build_scheduler(optimizer, schedule, updates, min_lr=0.0, power=settings.power)


def set_train_mode(model: nn.Module, name: str, config: Config) -> None:
    """Batch norm learns in the joint phase, and only where it is not frozen altogether."""
    model.train()
    if config.model.freeze_bn or name != "joint":
        freeze_batch_norm(model)


def compute_loss(criterion: MaskedCrossEntropyLoss, model: PPNet, outputs, label: torch.Tensor, config: Config) -> dict:
    """This process's part of the terms of a micro-step and of their weighted `total`, a mean over the scales.

    Cross entropy is over the labelled cells of each scale's own grid, the divergence over the pairs of prototypes, both
    of all processes together.
    """
    scales, terms = outputs if isinstance(outputs, list) else [outputs], {"ce": 0.0, "kld": 0.0}
    for logits, distances in scales:                                                # (B, h, w, C), (B, P, h, w)
        cells = resize_label(label, logits.shape[1:3])                              # (B, h, w)
        total, weight = criterion.sum_and_weight(logits.float(), cells)
        terms["ce"] = terms["ce"] + total / all_reduce_sum(weight).clamp(min=1) / len(scales)
        total, pairs = prototype_divergence(distances, cells, model.class_identity,
                                            config.loss.kld_labels == "published")
        terms["kld"] = terms["kld"] + total / all_reduce_sum(pairs.float()).clamp(min=1) / len(scales)
    terms["l1"] = off_class_l1(model.last_layer.weight, model.class_identity) / world_size()
    return {**terms, "total": sum(config.loss[name] * value for name, value in terms.items())}


def normalizer(config: Config):
    """A function: image (B, 3, H, W) uint8 -> float32, normalised."""
    mean, std = (torch.tensor(config.dataset[name])[:, None, None] for name in ("mean", "std"))

    def normalize(image):
        return (image.float() / 255 - mean.to(image.device)) / std.to(image.device)
    return normalize


# -- training, push and pruning ----------------------------------------------------------------------------------------

def micro_batches(loader, dataset, sampler, stage: int, begin: int, end: int):
    """The micro-batches begin..end-1 of a stage, epoch after epoch. Their order depends on (seed, stage, place)."""
    while begin < end:
        epoch, first = divmod(begin, len(sampler))
        dataset.set_epoch(stage * 1_000_000 + epoch)
        sampler.set_epoch(stage * 1_000_000 + epoch, first)
        for batch in itertools.islice(loader, end - begin):
            yield batch
            begin += 1


def train_until(network, batches, criterion, optimizer, scheduler, scaler, totals, state, config, args, device,
                amp_dtype, log, stop):
    """Updates on `batches`. totals collects the loss terms; returns False if stopped, which is between two updates."""
    model, world, accumulate = unwrap(network), world_size(), config.training.accumulate
    name, normalize, terms = STAGES[state["stage"]], normalizer(config), {}
    set_train_mode(network, name, config)
    for batch in batches:
        image = normalize(batch["image"].to(device, non_blocking=True))             # (B, 3, H, W) float32
        label = batch["label"].to(device, non_blocking=True)                        # (B, H, W)
        complete = (state["done"] + 1) % accumulate == 0
        with contextlib.nullcontext() if complete or world == 1 else network.no_sync():
            with autocast(device, amp_dtype):
                outputs = network(image)
            losses = compute_loss(criterion, model, outputs, label, config)
            scaler.scale(losses["total"] * (world / accumulate)).backward()         # DDP takes the mean over the ranks
        for key, value in losses.items():
            terms[key] = terms.get(key, 0.0) + value.detach() / accumulate
        state["done"] += 1
        if not complete:
            continue
        optimizer_step(optimizer, scheduler, scaler)
        state["step"] += 1
        totals.add(terms)
        if state["step"] % config.logging.log_interval == 0:                     # the only place that waits for the GPU
            means = {key: float(all_reduce_sum(value)) for key, value in terms.items()}
            if not np.isfinite(means["total"]):
                raise FloatingPointError(f"the loss is {means['total']} at update {state['step']} ({name}, learning "
                                         f"rate {scheduler.get_last_lr()[0]:.2e}); lower the optimizer's rates or use "
                                         f"--amp-dtype float32; {args.output_dir} holds the last good checkpoint")
            log.train_step(state["step"], loss=means.pop("total"), **means, lr=scheduler.get_last_lr()[0])
        terms = {}
        if all_agree_max(stop.requested or 0):
            return False
    return True


@torch.no_grad()
def scan(model, dataset, table, state, end, config, args, device, stop=None) -> bool:
    """Show the photographs state["done"]..end-1 (shared among the processes) at their own size to a PushTable or
    NearestPatches; False if stopped. Afterwards every process's table holds what all of them saw."""
    model.eval()
    normalize, begin, world = normalizer(config), state["done"], world_size()
    mine = [begin + i for i in shard_indices(end - begin, this_rank(), world)]
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=args.num_workers,
                        worker_init_fn=seed_worker, generator=torch.Generator())
    rounds, items = -(-(end - begin) // world), iter(loader)
    for turn in progress(range(rounds), STAGES[state["stage"]]):
        if turn < len(mine):
            item = next(items)
            features = model.features_of(normalize(item["image"][None].to(device)))  # (1, D, h, w) after the sigmoid
            distances = model.prototype_distances(features)                          # (1, P, h, w)
            label = item["label"].to(device)
            if isinstance(table, PushTable):
                table.update(mine[turn], features[0], distances[0], label, model.class_identity)
            else:
                table.update(mine[turn], distances[0], label, model.class_identity)
        state["done"] = min(end, begin + (turn + 1) * world)
        if all_agree_max((stop and stop.requested) or 0) and state["done"] < end:
            break
    table.merge(all_gather(table.state_dict()))
    return state["done"] == end


@torch.no_grad()
def self_activations(model: PPNet, dataset, device):
    """Yield (prototype, its similarities (h, w) on the photograph it comes from, label (H, W) of that); prototypes
    without a patch, or whose photograph is not in `dataset`, are left out."""
    model.eval()
    normalize, places, by_image = normalizer(model.config), {str(f): i for i, f in enumerate(dataset.files)}, {}
    for prototype, entry in enumerate(model.provenance):
        by_image.setdefault(places.get(entry["image"]), []).append(prototype)
    by_image.pop(None, None)
    for index, prototypes in by_image.items():
        item = dataset[index]
        features = model.features_of(normalize(item["image"][None].to(device)))
        similarity = model.similarity(model.prototype_distances(features))[0].cpu()             # (P, h, w)
        yield from ((prototype, similarity[prototype], item["label"]) for prototype in prototypes)


def finish_push(model, table, dataset, device, messages: list) -> None:
    """Overwrite the prototypes by the patches that were found, drop duplicates, and note where each comes from."""
    entries = model.provenance = provenance(model, table, dataset.files)
    report = push(model, table)
    for prototype, similarity, label in self_activations(model, dataset, device):
        entry = model.provenance[prototype]
        entry["box"] = patch_box(similarity, entry["cell"], label == entry["class"])
    if report.unpushed:
        absent = sorted({model.class_names[entries[p]["class"]] for p in report.unpushed})
        messages.append(f"WARNING: {len(report.unpushed)} prototypes found no patch and keep their learned vector: "
                        f"{', '.join(absent)} never occur{'s' * (len(absent) == 1)} in the push set")
    messages.append(f"push: {len(entries)} prototypes, {len(report.unpushed)} without a patch, "
                    f"{len(report.duplicates)} duplicates removed, {len(report.kept)} left")


def finish_prune(model, table, config, messages: list) -> None:
    keep = prune_keep(table, model.class_identity, config.training.prune_threshold)
    before, after = model.class_identity.sum(0).int(), model.class_identity[keep].sum(0).int()
    model.remove(keep)
    lost = [model.class_names[c] for c in range(len(after)) if before[c] and not after[c]]
    messages.append(f"pruning: {int(before.sum())} prototypes, {len(keep)} left")
    if lost:
        messages.append(f"WARNING: no prototype is left of {', '.join(lost)}: they cannot be predicted any more")


# -- evaluation --------------------------------------------------------------------------------------------------------

def evaluation_view(config: Config) -> View:
    view, tta = config.evaluation, config.evaluation.tta
    return View(view.size, view.window, -(-2 * (view.window or 3) // 3), TTA_SCALES if tta else (1.0,), tta)


def squashed(image, config: Config):
    """image (B, 3, H, W) normalised -> as the network is shown it: of the size evaluation.squash, where that is set."""
    size = config.evaluation.squash
    return image if size is None else F.interpolate(image, tuple(size), mode="bilinear", antialias=True)


def score_function(model: PPNet, device: torch.device, amp_dtype):
    """image (B, 3, h, w) normalised, any size -> logits (B, C, h, w) float32."""
    def score(image):
        with autocast(device, amp_dtype):
            scores = model.scores(squashed(image, model.config))
        return scores if scores.shape[-2:] == image.shape[-2:] else \
            F.interpolate(scores, image.shape[-2:], mode="bilinear")
    return score


def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=4, num_workers=0, limit_batches=0,
             interpretability=None) -> dict:
    """Score every labelled pixel once; used in training, by --test-only and by evaluate.py. See evaluate_images.

    interpretability None: as the config says; then `extra` holds what describes the prototypes, see docs/prototype.md.
    """
    model = unwrap(model).eval()
    device = device or next(model.parameters()).device
    result = evaluate_images(score_function(model, device, amp_dtype), normalizer(model.config), dataset,
                             model.config.model.num_classes, evaluation_view(model.config), device, batch_size,
                             num_workers, limit_batches)
    if model.config.evaluation.interpretability if interpretability is None else interpretability:
        result["extra"] = {"prototypes": describe_prototypes(model, dataset, device, limit_batches)}
    return result


@torch.no_grad()
def describe_prototypes(model: PPNet, dataset, device, limit: int = 0) -> dict:
    """Purity, diversity, sparsity, noise stability and use of the prototypes over a labelled split."""
    normalize = normalizer(model.config)
    nearest = NearestPatches(len(model.class_identity), model.config.training.prune_neighbors)
    statistics = PrototypeStatistics(model)
    mine = list(shard_indices(min(len(dataset), limit or len(dataset)), this_rank(), world_size()))
    for index in progress(mine, "prototypes"):
        item = dataset[index]
        image, label = normalize(item["image"][None].to(device)), item["label"].to(device)
        distances = model.prototype_distances(model.features_of(image))[0]                      # (P, h, w)
        nearest.update(index, distances, label, model.class_identity)
        statistics.update(distances, label)
        statistics.add_stability(noise_stability(model, image, index))
    nearest.merge(all_gather(nearest.state_dict()))
    result = statistics.result()
    return {**result.pop("sparsity"), **result, "purity": purity(nearest, model.class_identity).tolist()}


def log_evaluation(log: RunLog, state: dict, name: str, train: dict | None, result: dict, seconds: float) -> None:
    """An evaluation on the console, in log.jsonl and in TensorBoard; train None: after a push or pruning."""
    line = f"{name} (phase {PHASE[name]}), {state['done']} steps:"
    if train is not None:
        line += (f" Train Loss: {train['total']:.4f} (ce {train['ce']:.4f}, kld {train['kld']:.4f}, l1 "
                 f"{train['l1']:.1f})")
        log.evaluation(state["stage"], state["step"], "train", {**train, "loss": train["total"], "stage_name": name})
    val = result["metrics"]
    log.evaluation(state["stage"], state["step"], "val", {**val, "loss": result["loss"], "stage_name": name})
    log.info(f"{line}\n          Val mIoU: {val['miou']:.4f}, Val Acc: {val['overall_accuracy']:.4f}, Val NLL: "
             f"{result['loss']:.4f} (evaluation {result['seconds']:.2f} s) ({seconds:.2f} s)")


# -- what evaluate.py and predict.py call ------------------------------------------------------------------------------

list_inputs = list_images                                   # the files of a folder that predict can read


def has_test_split(config: Config) -> bool:
    return config.dataset.test_split is not None


def attach(model: nn.Module, config: Config, names, colors) -> None:
    """What evaluation needs besides the weights."""
    model.config, model.class_names, model.palette = config, names, colors


def load_model(checkpoint: dict, device: torch.device) -> PPNet:
    """The network of a checkpoint of this script in eval mode, with as many prototypes as it has left."""
    model = build_model(Config(checkpoint["config"]), checkpoint["model"])
    model.provenance = checkpoint["prototypes"]
    attach(model, Config(checkpoint["config"]), checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


@torch.no_grad()
def predict(model: PPNet, path: str | Path, amp_dtype=None) -> dict:
    """Label a photograph: label (H, W) int64 and confidence (H, W) at its own size, the photograph itself, and the
    squared distances (P, h, w) of the grid cells to the prototypes. The distances are those behind the label unless
    evaluation.size, window or tta change how it is made: they are of one pass over the whole photograph."""
    device, photo = next(model.parameters()).device, read_image(path, exif=True)
    image, normalize = torch.from_numpy(np.array(photo)).permute(2, 0, 1).to(device), normalizer(model.config)
    result = segment_image(score_function(model, device, amp_dtype), normalize, image, evaluation_view(model.config))
    with autocast(device, amp_dtype):
        features = model.features_of(squashed(normalize(image[None]), model.config))            # (1, D, h, w)
    distances = model.prototype_distances(features)[0]                                          # (P, h, w)
    return {"label": result["label"].cpu().numpy(), "confidence": result["confidence"].cpu().numpy(), "photo": photo,
            "distances": distances.cpu()}


def write_prediction(model: PPNet, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in the numbers of the masks, an overlay, the map of the
    winning prototypes, and for --explain the prototypes that decided at the named pixels."""
    data, identity = model.config.dataset, model.class_identity.cpu().numpy()
    weight, similarity = model.last_layer.weight.detach().cpu(), model.similarity(prediction["distances"])   # (P, h, w)
    of_cell = torch.einsum("cp,phw->hwc", weight, similarity).argmax(-1)                        # (h, w)
    winner = (similarity * weight[of_cell].permute(2, 0, 1)).argmax(0).numpy()                  # (h, w)
    explained = []
    if options.explain:                                     # first: a pixel outside of the photograph leaves no files
        explained = explain_pixels(stem, prediction["photo"], options.explain, weight.numpy(), similarity.numpy(),
                                   model.class_names, identity, model.provenance, read_source)
    return explained + write_prototype_prediction(
        stem, {**prediction, "winner": winner}, model.palette, prototype_colors(identity, model.palette),
        options.labels, options.picture, data.ignore_label, data.reduce_zero_label,
        getattr(DATASETS.get(data.name), "LABEL_IDS", None))


def example_pictures(model: PPNet, dataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction, over the photograph."""
    return example_pair(dataset, index, pred, model.palette)


def read_source(entry: dict):
    """The photograph that an entry of model.provenance names, or None where it is gone."""
    return read_image(entry["image"]) if entry["image"] and Path(entry["image"]).is_file() else None


def write_pages(model: PPNet, dataset, config: Config, args, device, stop=None) -> Path:
    """OUTPUT_DIR/prototypes: the page of all prototypes with their purity over the push set, and prototypes.json, where
    each comes from. All processes have to call it; the first writes."""
    folder, end = Path(args.output_dir) / "prototypes", min(len(dataset), args.limit_batches or len(dataset))
    nearest = new_table("prune", model, config)
    if not scan(model, dataset, nearest, {"stage": STAGES.index("prune"), "done": 0}, end, config, args, device, stop):
        raise StopRequested(all_agree_max(stop.requested or 0), f"all stages are done and saved; make the page of "
                            f"prototypes with: {shlex.join(['python', *sys.argv, '--resume', 'auto'])}")
    if is_main():
        activations = {p: similarity.numpy() for p, similarity, _ in self_activations(model, dataset, device)}
        write_gallery(folder, model.provenance, model.class_names, model.palette, read_source, activations,
                      model.last_layer.weight.detach().cpu().numpy(), purity(nearest, model.class_identity).numpy())
        (folder / "prototypes.json").write_text(json.dumps(model.provenance, indent=1) + "\n", encoding="utf-8")
    return folder / "index.html"


# -- set-up and resume -------------------------------------------------------------------------------------------------

def headline(result: dict) -> dict:
    """What main returns of an evaluation: the single numbers, and the loss."""
    return {**{key: value for key, value in result["metrics"].items() if isinstance(value, float)},
            "loss": result["loss"]}


def prepare_model(config: Config, checkpoint: dict | None, names, colors) -> tuple[PPNet, dict, list[str]]:
    """The model, its `encoder` entry and lines for the log: resumed, on given weights, or from scratch."""
    if checkpoint is not None:
        model, entry = build_model(config, checkpoint["model"]), checkpoint["encoder"]
        model.provenance, messages = checkpoint["prototypes"], []
    else:
        model, weights = build_model(config), config.model.weights
        entry = {"name": "DeepLabV2", "file": None, "sha256": None}
        if weights is None:
            raise ValueError("model.weights (or --pretrained_path) is missing: name a ResNet file such as "
                             "resnet101-63fe2227.pth or a DeepLab file; model.weights=random trains from scratch")
        if weights == "random":
            messages = ["WARNING: the backbone is randomly initialised" +
                        ", and batch norm is frozen: set model.freeze_bn=false" * config.model.freeze_bn]
        else:
            messages = [load_deeplab_weights(model.features, weights)]
            entry |= {"file": str(weights), "sha256": sha256_file(weights)}
    attach(model, config, names, colors)
    return model, entry, messages


def begin_of_phase(args, folder: RunFolder, config: Config) -> tuple[Path | None, list[str]]:
    """Which checkpoint to start from: --resume, or for --phase 1 and 2 where the phase before ended."""
    resume = args.resume or ("auto" if config.training.resume else None)
    path, messages = find_resume(resume, folder.model, SCRIPT)
    if path is None and (args.phase == 2 or args.phase == 1 and config.training.steps[0]):
        path = folder.model / f"{('warmup', 'push')[args.phase - 1]}.pth"
        if not path.is_file():
            raise ValueError(f"--phase {args.phase}: there is no {path}; run --phase {args.phase - 1} first, or name "
                             f"a checkpoint with --resume")
    return path, messages


def test_only(args, config, checkpoint, path, device, amp_dtype) -> dict:
    """Score a checkpoint on the test split, or on validation where there is none; or write its pages."""
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model",), except_keys=FREE_ON_RESUME)
    checkpoint["config"] = config.to_dict()
    model = load_model(checkpoint, device)
    if args.gallery:
        if model.provenance is None:
            raise ValueError(f"{path}: its prototypes are not pushed yet, so there are no patches to show")
        page = write_pages(model, build_dataset(config, "push", num_workers=args.num_workers), config, args, device)
        if is_main():
            print(f"wrote {page}", flush=True)
        cleanup()
        return {}
    split = "test" if has_test_split(config) else "val"
    result = evaluate(model, build_dataset(config, split, num_workers=args.num_workers), device, amp_dtype,
                      num_workers=args.num_workers, limit_batches=args.limit_batches)
    if is_main():
        print(f"{path} on the {split} split:\n{metrics_table(result['metrics'], model.class_names)}", flush=True)
    cleanup()
    return headline(result)


# -- main --------------------------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    check_range("--limit-batches", args.limit_batches, 0)
    check_range("--num-workers", args.num_workers, 0)
    config = load_config(args.config, DEFAULTS, args.overrides)
    if args.pretrained_path:
        config.model.weights = args.pretrained_path
    check_config(config)
    # device and processes                                                        # same in all scripts
    device = pick_device(args.device)
    rank, local_rank, world = init_distributed(device.type)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
    amp_dtype, scaler = amp_settings(device, args.amp_dtype)
    seed_everything(args.seed, args.deterministic)

    folder = RunFolder(args.output_dir)
    resume_path, messages = begin_of_phase(args, folder, config)
    if (args.test_only or args.gallery) and resume_path is None:
        raise ValueError("--test-only and --gallery need --resume PATH|auto: there is nothing to look at yet")
    checkpoint = load_checkpoint(resume_path, SCRIPT) if resume_path else None
    if args.test_only or args.gallery:
        return test_only(args, config, checkpoint, resume_path, device, amp_dtype)
    check_writable(folder.model, folder.log, folder.config)

    # data: every file is checked before the first step, by rank 0, and remembered
    names, colors = class_list(config)
    for turn in (True, False):
        if is_main() == turn:
            train_set, val_set, push_set = (build_dataset(config, split, args.seed, num_workers=args.num_workers)
                                            for split in ("train", "val", "push"))
        barrier()
    sampler = EpochBatchSampler(len(train_set), config.training.batch_size, args.seed, drop_last=True)
    lengths = stage_lengths(config, len(push_set), args.limit_batches)
    updates = {name: length // config.training.accumulate for name, length in lengths.items() if name not in SCANS}
    total_steps = sum(updates.values())
    if checkpoint is not None:
        same = config.training.prune == checkpoint["config"]["training"]["prune"]      # may be decided afterwards
        check_same_run(checkpoint, config, total_steps if same else checkpoint["total_steps"],
                       ("dataset", "model", "training", "optimizer", "loss"), args.seed, FREE_ON_RESUME)

    # model
    model, encoder_entry, lines = prepare_model(config, checkpoint, names, colors)
    messages += lines
    model.to(device)
    criterion = MaskedCrossEntropyLoss()
    keeper = CheckpointKeeper(folder.model, 0, 0)
    state = {"stage": 0, "done": 0, "step": 0, "waited": 0, "best_in_stage": -1.0}      # done: in the stage
    totals, table, optimizer, scheduler = LossTotals(), None, None, None

    # resume
    if checkpoint is not None:
        keeper.load_state_dict(checkpoint["best"])
        state = {key: checkpoint[key] for key in state}
        totals.load_state_dict(checkpoint["totals"])
        next_stage(state, lengths, args.phase)              # refuses a --phase that is not its turn, before any change
    restore_rng(checkpoint, args.seed, state["step"])

    def saved_state() -> dict:
        optimizing = optimizer is not None
        return {"script": SCRIPT, "config": config.to_dict(), "class_names": names, "palette": colors.tolist(),
                "model": model.state_dict(), "ema": None, "prototypes": model.provenance, "encoder": encoder_entry,
                "optimizer": optimizer.state_dict() if optimizing else None,
                "scheduler": scheduler.state_dict() if optimizing else None, "scaler": scaler.state_dict(),
                "table": None if table is None else table.state_dict(), "epoch": state["stage"], "seed": args.seed,
                "batch": state["done"] if optimizing else 0,              # where another number of processes is refused
                "total_steps": total_steps, "totals": totals.state_dict(), **rng_entries(), **state}

    def wrapped() -> nn.Module:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(model) if world > 1 and device.type == "cuda" else model
        network = torch.compile(network) if args.compile else network
        if world > 1:
            network = nn.parallel.DistributedDataParallel(network, [local_rank] if device.type == "cuda" else None)
        return network

    def stop_here():
        raise StopRequested(all_agree_max(stop.requested or 0), f"stopped in {name} after {state['done']} of "
                            f"{lengths[name]}, saved; go on with: "
                            f"{shlex.join(['python', *sys.argv, '--resume', 'auto'])}")

    if is_main():
        write_run_files(folder, config, device, args.seed, resumed=checkpoint is not None)
    log = RunLog(folder.log, rank, config.logging.tensorboard, total_steps=total_steps,
                 resume_step=state["step"] if checkpoint is not None else None,
                 wandb={"project": "segheads", "config": config.to_dict()} if args.wandb else None)
    for line in (*messages, f"{len(train_set)} training, {len(val_set)} validation and {len(push_set)} push images",
                 f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(model.class_identity)} prototypes "
                 f"of {len(names)} classes; {config.training.batch_size * world} images a micro-step, "
                 f"{config.training.batch_size * world * config.training.accumulate} an update, on {describe(device)}, "
                 f"seed {args.seed}", "stages: " + ", ".join(
                     f"{name} {length:,} {'images' if name in SCANS else f'steps = {updates[name]:,} updates'}"
                     for name, length in lengths.items() if length)):
        log.info(line)

    if is_main() and resume_path not in (None, folder.model / "model_last.pth"):     # what auto goes on from
        taken = {key: value for key, value in checkpoint.items() if key not in ("format", "best")}
        end = folder.model / f"{STAGES[checkpoint['stage'] - 1]}.pth"           # lost in a kill behind model_best.pth
        if checkpoint["stage"] and not checkpoint["done"] and not end.is_file():
            save_checkpoint(end, **taken, best=checkpoint["best"])
        keeper.save_last(taken)
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=args.num_workers, worker_init_fn=seed_worker,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    result, network = {}, None
    with StopSignal() as stop, log:
        while (name := next_stage(state, lengths, args.phase)) is not None:
            started, train = time.monotonic(), None
            if name in SCANS:
                if table is None:
                    table = new_table(name, model, config)
                    if checkpoint is not None and checkpoint["table"] is not None:
                        table.load_state_dict(checkpoint["table"])
                end = min(lengths[name], (state["done"] // SCAN_CHUNK + 1) * SCAN_CHUNK)
                finished = scan(model, push_set, table, state, end, config, args, device, stop)
            else:
                if network is None:                         # the stage begins, or is resumed
                    optimizer, scheduler = start_stage(name, model, config, updates[name])
                    if checkpoint is not None and checkpoint["optimizer"] is not None:
                        optimizer.load_state_dict(checkpoint["optimizer"])
                        scheduler.load_state_dict(checkpoint["scheduler"])
                        scaler.load_state_dict(checkpoint["scaler"])
                    network = wrapped()
                interval = config.evaluation.interval
                end = min(lengths[name], (state["done"] // interval + 1) * interval)
                finished = train_until(network, micro_batches(loader, train_set, sampler, state["stage"], state["done"],
                                                              end), criterion, optimizer, scheduler, scaler, totals,
                                       state, config, args, device, amp_dtype, log, stop)
                if device.type != "cuda":                   # there SyncBatchNorm has the same statistics everywhere
                    broadcast_buffers(model)
            checkpoint = None                               # what it held is in use now
            complete = state["done"] == lengths[name]
            if not finished or (name in SCANS and not complete):
                snapshot = saved_state()
                if is_main():
                    keeper.save_last(snapshot)
                if not finished or all_agree_max(stop.requested or 0):
                    stop_here()
                continue

            # after a push, a pruning, or the steps of an interval
            if name in SCANS:
                lines = []
                finish_push(model, table, push_set, device, lines) if name == "push" else \
                    finish_prune(model, table, config, lines)
                for line in lines:
                    log.info(line)
                keeper.load_state_dict({"score": None, "epoch": None, "top": []})            # another kind of model
            else:
                train = totals.means()
            result = evaluate(model, val_set, device, amp_dtype, num_workers=args.num_workers,
                              limit_batches=args.limit_batches, interpretability=False)
            log_evaluation(log, state, name, train, result, time.monotonic() - started)
            if name in ("finetune", "refinetune") and stops_early(state, result, config):
                log.info(f"{name}: the accuracy has not risen for {config.training.patience} evaluations, ending it")
                complete = True
            if complete:                                    # of the stage: the next one starts with an empty optimiser
                state |= {"stage": state["stage"] + 1, "done": 0, "waited": 0, "best_in_stage": -1.0}
                table = optimizer = scheduler = network = None
            snapshot = saved_state()                        # in every process: it gathers what they have
            if is_main():
                if keeper.save_best_if(result["metrics"]["miou"], snapshot):
                    log.info(f"New best mIoU: {result['metrics']['miou']:.4f}. Checkpoint saved.")
                if complete:                                # before model_last, which passes on to the next stage
                    save_checkpoint(folder.model / f"{name}.pth", **snapshot, best=keeper.state_dict())
                keeper.save_last(snapshot)
            if all_agree_max(stop.requested or 0) and next_stage(state, lengths, args.phase) is not None:
                stop_here()
        log.info(f"Best mIoU: {'none' if keeper.best_score is None else f'{keeper.best_score:.4f}'}; checkpoints in "
                 f"{folder.model}")
        if model.provenance is not None:
            log.info(f"all prototypes: {write_pages(model, push_set, config, args, device, stop)}")
    cleanup()
    return {**(headline(result) if result else {}), "best": keeper.best_score, "prototypes": len(model.class_identity)}


def next_stage(state: dict, lengths: dict, phase: int | None) -> str | None:
    """The stage to go on with: leaves out those without steps; None where all, or those of `phase`, are done."""
    left = [name for name in STAGES[state["stage"]:] if lengths[name]]
    if not left or (phase is not None and PHASE[left[0]] > phase):
        return None
    if phase is not None and PHASE[left[0]] < phase:
        raise ValueError(f"--phase {phase}: the checkpoint is in {left[0]}, phase {PHASE[left[0]]}; finish that first")
    state["stage"] = STAGES.index(left[0])
    return left[0]


def new_table(name: str, model: PPNet, config: Config):
    P, D = model.prototype_vectors.shape[:2]
    return PushTable(P, D) if name == "push" else NearestPatches(P, config.training.prune_neighbors)


def stops_early(state: dict, result: dict, config: Config) -> bool:
    """Count the evaluations of a fine-tuning without a better accuracy; True where training.patience is reached."""
    accuracy = result["metrics"]["overall_accuracy"]
    state["waited"] = 0 if accuracy > state["best_in_stage"] else state["waited"] + 1
    state["best_in_stage"] = max(accuracy, state["best_in_stage"])
    return 0 < config.training.patience <= state["waited"]


if __name__ == "__main__":
    run(main)
