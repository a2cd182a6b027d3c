"""Semantic segmentation of images from one YAML file: a U-Net on a ResNet (or DeepLab v2), trained end to end.

    python train_segmentation.py configs/segmentation_camvid.yaml                                # or --config CONFIG
    python train_segmentation.py CONFIG --pretrained_path resnet34-b627a593.pth model.pretrained=true   # ImageNet
    python train_segmentation.py CONFIG training.epochs=200 optimizer.lr=1e-4 model.backbone=resnet18
    python train_segmentation.py CONFIG --device cpu --limit-batches 2 training.epochs=1            # smoke run
    torchrun --nproc_per_node=4 train_segmentation.py CONFIG                                        # several GPUs
    python train_segmentation.py CONFIG --resume auto                                       # go on, bit for bit
    python train_segmentation.py CONFIG --resume exp/segmentation/model/model_best.pth --test-only  # score a checkpoint

Ronneberger et al. 2015 (U-Net) on He et al. 2016, with the names of torchvision and segmentation_models.pytorch, whose
files load. Photographs lie in ROOT/images/SPLIT, masks of class ids in ROOT/masks/SPLIT, 255 is ignored. Against
train_upernet_head.py: nothing is frozen, and no pre-trained weights are needed. All keys are in DEFAULTS. Every number
logged, every choice and deviation: docs/segmentation.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from data.image_results import example_pair, write_image_result
from data.image_splits import class_info, folder_pairs
from data.images import Augmentation, SegmentationDataset, check_pairs, list_images, pair_files, read_image
from models.deeplab import DeepLabV2, MultiScale, load_deeplab_weights
from models.resnet import ENCODERS, FILES, URL, load_resnet_weights
from models.unet import UNet, is_unet, load_unet_weights, read_unet_weights
from utils.checkpoint import CheckpointKeeper, EarlyStopping, RunFolder, check_writable, find_resume, load_checkpoint
from utils.checks import check_positive, check_range
from utils.cli import ArgumentParser, StopRequested, StopSignal, given_flags, run
from utils.config import Config, Required, Setting, load_config
from utils.device import amp_settings, autocast, describe, pick_device
from utils.distributed import (
    EpochBatchSampler,
    all_agree_max,
    all_reduce_sum,
    barrier,
    broadcast_buffers,
    cleanup,
    init_distributed,
    is_main,
    unwrap,
    world_size,
)
from utils.ema import EMA
from utils.image_inference import TTA_SCALES, View, evaluate_images, segment_image
from utils.log import RunLog
from utils.losses import WeightedLoss, lovasz_softmax_loss, soft_dice_loss
from utils.metrics import metrics_table
from utils.params import split_decay
from utils.postprocess import crf_refine, morphology
from utils.schedule import SCHEDULES, build_scheduler
from utils.seed import seed_everything, seed_worker
from utils.training import (
    LossTotals,
    check_same_run,
    micro_steps,
    optimizer_step,
    restore_rng,
    rng_entries,
    write_run_files,
)
from utils.weights import load_weights

SCRIPT = Path(__file__).name
# For predict.py, default first.
RESULTS = {"labels": ("png", "npy"), "picture": ("png", "none"), "html": False, "pca": False}
# Names in the config -> in the result of an evaluation.
MONITORS = {"val/mIoU": "miou", "val/loss": "loss", "val/accuracy": "overall_accuracy", "val/FWIoU": "fw_iou",
            "val/Dice": "mean_f1", "val/mAcc": "mean_accuracy"}
MODES = ("max", "min")
SET_LOSSES = {"dice": soft_dice_loss, "lovasz": lovasz_softmax_loss}            # of a whole micro-batch, not of a pixel
AT_LEAST = {0: ("optimizer.weight_decay", "optimizer.momentum", "scheduler.warmup_epochs", "scheduler.min_lr",
                "training.gradient_clip_val", "training.num_workers", "training.ema", "checkpointing.save_top_k",
                "checkpointing.save_interval", "augmentations.color_jitter.brightness", "losses.ce", "losses.dice",
                "losses.focal", "losses.lovasz"),
            1: ("training.epochs", "training.batch_size", "training.accumulate_grad_batches",
                "evaluation.interval", "logging.log_every_n_steps", "model.base_width"),
            2: ("dataset.num_classes",)}                    # softmax of one class is always 1: nothing would be learnt
FREE_ON_RESUME = ("dataset.test_split", "dataset.classes", "dataset.cache_dir", "model.weights", "model.pretrained",
                  "training.batch_size", "training.num_workers", "training.resume")       # steps are compared as well

DEFAULTS = {
    "experiment_name": Setting(None, (str,)),               # the run folder is exp/NAME, unless --output-dir is given
    "dataset": {
        "root": Required((str,)),                           # with images/SPLIT and masks/SPLIT
        "train_split": "train",
        "val_split": "val",
        "test_split": Setting(None, (str,)),                # of --test-only, evaluate.py; None: test, or val without it
        "num_classes": Required((int,)),
        "classes": Setting(None, (str,)),                   # names, colours; None: root/classes.json or .txt
        "image_size": Setting(512, (int, list)),            # photographs cover [height, width]; one number: both
        "normalization": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "ignore_label": 255,                                # the masks' value for unlabelled
        "reduce_zero_label": False,                         # 0 is unlabelled too, classes count from 1
        "cache_dir": Setting(".cache/images", (str, type(None))),           # what the check of all files found
    },
    "augmentations": {
        "horizontal_flip": True,
        "vertical_flip": False,
        "color_jitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},    # as torchvision's
        "random_crop": {"size": Setting(None, (int, list)), "padding": 0},                     # None: image_size
        "scale_range": [1.0, 1.0],                          # factors of image_size
    },
    "model": {
        "name": Setting("unet", (str,), ("unet", "deeplab_v2")),
        "backbone": Setting("resnet34", (str,), tuple(ENCODERS)),           # of unet
        "pretrained": Setting(None, (bool,)),               # true: weights have to be named; false: from scratch
        "weights": Setting(None, (str,)),                   # the same as --pretrained_path
        "dropout": 0.0,                                     # of whole channels, before the head; of unet
        "freeze_encoder": False,                            # of unet
        "n_blocks": [3, 4, 23, 3],                          # of deeplab_v2: ResNet-101
        "base_width": 64,                                   # of deeplab_v2
    },
    "optimizer": {
        "name": Setting("adamw", (str,), ("adamw", "adam", "sgd")),
        "lr": 3e-4,
        "weight_decay": 0.01,
        "momentum": 0.9,                                    # of sgd
    },
    "scheduler": {
        "name": Setting("cosine", (str,), SCHEDULES),
        "warmup_epochs": 0.0,
        "max_epochs": Setting(None, (int,)),                # where the schedule ends; None: training.epochs
        "min_lr": 1e-6,
        "power": 0.9,                                       # of poly
        "milestones": Setting(None, (list,)),               # of step, in epochs; None: 2/3 and 8/9
        "gamma": 0.1,                                       # of step
        "pct_start": 0.1, "div_factor": 10.0, "final_div_factor": 1000.0,       # of onecycle
    },
    "losses": {                                             # weights of the terms
        "ce": 1.0, "dice": 0.0, "focal": 0.0, "lovasz": 0.0,
        "class_weights": Setting(None, (list, str)),        # of ce, focal; or median_frequency, sqrt_median_frequency
        "label_smoothing": 0.0,                             # of ce
        "gamma": 2.0,                                       # of focal
    },
    "training": {
        "epochs": 100,
        "batch_size": 8,                                    # images per process and micro-step
        "accumulate_grad_batches": 1,                       # micro-steps per optimiser step
        "num_workers": 4,                                   # loader processes; 0 loads in the main process
        "amp": Setting(True, (bool, str), (True, False, "bfloat16", "float16", "float32")),   # true: bfloat16 on CUDA
        "seed": 0,
        "deterministic": False,
        "gradient_clip_val": 0.0,                           # largest norm of the whole gradient; 0: none
        "ema": 0.0,                                         # decay of the averaged weights; 0: none
        "channels_last": False,                             # memory order of images and convolutions
        "early_stopping": {"patience": 0, "metric": Setting("val/mIoU", (str,), tuple(MONITORS)),
                           "mode": Setting("max", (str,), MODES)},          # patience in evaluations; 0: never
        "resume": False,                                    # the same as --resume auto
    },
    "evaluation": {
        "mode": Setting("whole", (str,), ("whole", "slide")),
        "size": Setting(None, (int,)),                      # short side; None: as in training; 0: no change
        "window": Setting(None, (int,)),                    # side of the sliding window; None: that of a training crop
        "stride": Setting(None, (int,)),                    # None: two thirds of the window
        "tta": False,                                       # five scales and their mirror images
        "interval": 1,                                      # epochs between evaluations
    },
    "postprocess": {                                        # of predictions, see utils/postprocess.py; 0: not this step
        "crf": {"use": False, "appearance": 1.0, "smoothness": 1.0, "color_std": 10.0, "position_std": 3.0,
                "radius": 3, "dilation": 1, "iterations": 5, "shrink": 1},
        "opening": 0, "closing": 0,                         # sides of squares, odd
        "closing_order": [],                                # numbers of the classes that may grow, first to last
        "mode": 0, "min_area": 0,
    },
    "checkpointing": {
        "dir": Setting(None, (str,)),                       # None: OUTPUT_DIR/model
        "save_top_k": 0,                                    # best checkpoints kept besides model_best.pth
        "monitor": Setting("val/mIoU", (str,), tuple(MONITORS)),
        "mode": Setting("max", (str,), MODES),
        "save_interval": 0,                                 # epochs between checkpoints that stay; 0: none
    },
    "logging": {"dir": Setting(None, (str,)), "log_every_n_steps": 50, "tensorboard": True},
}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    # data
    parser.add_argument("inputs", nargs="*", metavar="CONFIG [section.key=value]",
                        help="YAML, TOML or JSON file, then changes to it")
    parser.add_argument("--config", metavar="CONFIG", help="the same file, as a flag")
    parser.add_argument("--num-workers", type=int, help="in place of training.num_workers")
    # model
    parser.add_argument("--pretrained_path", help="ResNet of torchvision, or a U-Net (or DeepLab): model.weights")
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

    return parser


def parse_args(argv=None):
    """The flags, with `config` and `overrides` out of the arguments without one."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [text for text in args.inputs if "=" not in text] + [args.config] * (args.config is not None)
    if len(names) != 1:
        parser.error(f"expected one CONFIG file and section.key=value, got {' and '.join(names) or 'no file'}")
    args.config, args.overrides = names[0], [text for text in args.inputs if "=" in text]
    return args


def read_config(args, argv) -> Config:
    """The checked config, with the flags that are given written into it; sets args.seed and args.output_dir."""
    config, given = load_config(args.config, DEFAULTS, args.overrides), given_flags(make_parser(), argv)
    config.model.weights = args.pretrained_path or config.model.weights
    for key in {"num_workers", "seed", "deterministic"} & given:
        config.training[key] = getattr(args, key)
    if args.amp_dtype:
        config.training.amp = args.amp_dtype
    if "output_dir" not in given and config.experiment_name:
        args.output_dir = f"exp/{config.experiment_name}"
    check_config(config)
    return config


# -- the pieces of this method -----------------------------------------------------------------------------------------

def look_up(config: Config, name: str):
    for part in name.split("."):
        config = config[part]
    return config


def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    for lowest, names in AT_LEAST.items():
        for name in names:
            check_range(name, look_up(config, name), lowest)
    check_range("model.dropout", config.model.dropout, 0, 1)
    check_positive("optimizer.lr", config.optimizer.lr)
    data = config.dataset
    if data.ignore_label < data.num_classes + data.reduce_zero_label:
        raise ValueError(f"dataset.ignore_label={data.ignore_label} is one of the {data.num_classes} classes in the "
                         f"masks; for masks that mean unlabelled by 0, use dataset.reduce_zero_label")
    for name, size in (("dataset.image_size", data.image_size),
                       ("augmentations.random_crop.size", config.augmentations.random_crop.size)):
        sides = [size] if isinstance(size, int) else size
        if sides is not None and not (1 <= len(sides) <= 2 and all(type(side) is int and side >= 16 for side in sides)):
            raise ValueError(f"{name}={size}: expected [height, width] or one number, pixels, at least 16")
    for name, values in data.normalization.items():
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"dataset.normalization.{name}={values}: one number per channel, red, green and blue")
    for place, metric, mode in (("checkpointing", config.checkpointing.monitor, config.checkpointing.mode),
                                ("training.early_stopping", config.training.early_stopping.metric,
                                 config.training.early_stopping.mode)):
        if mode != ("min" if metric == "val/loss" else "max"):
            raise ValueError(f"{place}.mode={mode}: {metric} is better when it is "
                             f"{'smaller' if metric == 'val/loss' else 'larger'}")
    schedule, epochs = config.scheduler, config.training.epochs
    if schedule.name == "onecycle" and (schedule.warmup_epochs or (schedule.max_epochs or epochs) < epochs):
        raise ValueError(f"scheduler.warmup_epochs={schedule.warmup_epochs}, max_epochs={schedule.max_epochs}: "
                         f"onecycle has its own warm-up (pct_start; set 0), and cannot end before the {epochs} epochs")
    view = evaluation_view(config)
    if (config.evaluation.size or 16) < 16 or not 1 <= view.stride <= (view.window or view.stride):
        raise ValueError(f"evaluation.size={config.evaluation.size}, window={config.evaluation.window}, stride="
                         f"{config.evaluation.stride}: a size of at least 16 (or 0) and a stride from 1 to the "
                         f"window's side are needed")
    build_criterion(config, np.ones(data.num_classes))
    build_lr_scheduler(torch.optim.SGD([torch.zeros(1)], config.optimizer.lr), config, steps_per_epoch=1)
    augmentation(config).check()
    refine = refine_function(config)
    if refine is not None:                                  # the settings are checked where they are used
        refine(torch.full((data.num_classes, 1, 1), 1 / data.num_classes), torch.zeros(3, 1, 1, dtype=torch.uint8))


def doubts(config: Config, names: list[str], counts: np.ndarray) -> list[str]:
    """Warnings for the log of what can be trained but is rarely meant; counts (C,): pixels of the training masks.
    ValueError where all of them are of one class: the score would be perfect."""
    absent = [names[c] for c in np.flatnonzero(counts == 0)]
    last, epochs = config.scheduler.max_epochs, config.training.epochs
    ignored = f"{config.dataset.ignore_label} (dataset.ignore_label) is unlabelled, not a class"
    if len(absent) == len(names) - 1:
        raise ValueError(f"dataset.root={config.dataset.root}: all labelled pixels of the training masks are "
                         f"{names[int(counts.argmax())]}, so that there is nothing to learn; {ignored}: for masks of "
                         f"0 and 255, write 1 in place of 255")
    lines = [f"WARNING: no pixel of the training masks is {', '.join(absent)}; {ignored}"] * bool(absent)
    if (last or epochs) < epochs:
        lines.append(f"WARNING: the schedule ends at scheduler.max_epochs={last}; the last {epochs - last} of {epochs} "
                     f"epochs keep its last rate")
    return lines


def two_sides(size) -> tuple[int, int]:
    """(height, width) of a size in the config: [height, width] or one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def crop_size(config: Config) -> tuple[int, int]:
    return two_sides(config.augmentations.random_crop.size or config.dataset.image_size)


def augmentation(config: Config) -> Augmentation:
    settings = config.augmentations
    return Augmentation(tuple(settings.scale_range), cat_max_ratio=1.0, flip=0.5 * settings.horizontal_flip,
                        vertical_flip=0.5 * settings.vertical_flip, padding=settings.random_crop.padding,
                        cover=two_sides(config.dataset.image_size), color="factors", **settings.color_jitter)


def loss_terms(config: Config) -> dict[str, float]:
    return {name: config.losses[name] for name in WeightedLoss.NAMES}


def class_weights(config: Config, counts: np.ndarray) -> list[float] | None:
    """Weights of the classes from their pixels (C,) in the training set. median_frequency (Eigen and Fergus 2015, but
    over all pixels): median share / share; sqrt_...: its root. A class without pixels gets 1."""
    weights = config.losses.class_weights
    if isinstance(weights, list) or weights is None:
        return weights
    powers = {"median_frequency": 1.0, "sqrt_median_frequency": 0.5}
    if weights not in powers:
        raise ValueError(f"losses.class_weights={weights}: expected a list, null, {' or '.join(powers)}")
    share = np.where(counts > 0, counts, np.median(counts[counts > 0]))
    return ((np.median(counts[counts > 0]) / share) ** powers[weights]).tolist()


def build_unet(config: Config) -> UNet:
    model = config.model
    return UNet(ENCODERS[model.backbone](), config.dataset.num_classes, model.dropout, model.freeze_encoder)


class DeepLabClassifier(nn.Module):
    """DeepLab v2 as an ordinary classifier: image (B, 3, H, W) -> logits (B, C, H, W), enlarged bilinearly."""

    def __init__(self, num_classes: int, n_blocks: tuple[int, ...], base_width: int) -> None:
        super().__init__()
        self.network = MultiScale(DeepLabV2(num_classes, n_blocks, base_width))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.network(image)                                             # (B, C, H/8, W/8)
        return F.interpolate(logits.float(), image.shape[-2:], mode="bilinear")


def build_deeplab(config: Config) -> DeepLabClassifier:
    return DeepLabClassifier(config.dataset.num_classes, tuple(config.model.n_blocks), config.model.base_width)


MODELS = {"unet": build_unet, "deeplab_v2": build_deeplab}


def build_model(config: Config) -> nn.Module:
    """A network without its weights: image (B, 3, H, W) normalised -> logits (B, C, H, W)."""
    return MODELS[config.model.name](config)


def load_pretrained(model: nn.Module, config: Config) -> str:
    """Load what model.weights names, as model.pretrained says; returns the line for the log. Nothing is downloaded."""
    settings = config.model
    if settings.weights is None and settings.pretrained:
        known = URL + FILES.get(settings.backbone if settings.name == "unet" else "resnet101", "")
        raise ValueError(f"model.pretrained=true needs a file of weights: fetch {known} and name it, --pretrained_path "
                         f"FILE (or model.weights); model.pretrained=false trains from scratch")
    if settings.weights is not None and settings.pretrained is False:
        raise ValueError(f"model.pretrained=false, but {settings.weights} is named; set it to true, or leave out "
                         f"the file")
    if settings.weights is None:
        return "WARNING: the network is randomly initialised; ImageNet weights (--pretrained_path) make a better start"
    if settings.name == "deeplab_v2":
        return load_deeplab_weights(model.network, settings.weights)
    if Path(settings.weights).is_dir() or is_unet(read_unet_weights(settings.weights)):
        return load_unet_weights(model, settings.weights)
    return load_resnet_weights(model.encoder, settings.weights)


def build_criterion(config: Config, counts: np.ndarray) -> WeightedLoss:
    losses, weights = config.losses, class_weights(config, counts)
    if weights is not None and len(weights) != config.dataset.num_classes:
        raise ValueError(f"losses.class_weights: {len(weights)} numbers for {config.dataset.num_classes} classes; "
                         f"give one per class")
    return WeightedLoss(loss_terms(config), weights, label_smoothing=losses.label_smoothing, class_dim=1,
                        gamma=losses.gamma)


def compute_loss(criterion: WeightedLoss, logits, label, normalizer, share: float) -> dict:
    """Terms and their weighted `total`. Sums over pixels (ce, focal) are divided by normalizer, the weight of all
    pixels of the step; dice and lovasz are of this micro-batch, and count with its share of the step."""
    terms = {}
    for name in criterion.terms:
        if name in SET_LOSSES:
            terms[name] = share * SET_LOSSES[name](logits, label, class_dim=1)
        else:
            terms[name] = getattr(criterion, name).sum_and_weight(logits, label)[0] / normalizer.clamp(min=1e-6)
    return {**terms, "total": sum(criterion.terms[name] * value for name, value in terms.items())}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """No decay for norms and biases."""
    settings = config.optimizer
    groups = split_decay(model.named_parameters(), settings.weight_decay)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, settings.momentum)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.name](groups, settings.lr)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int):
    """Stepped after each optimiser step; its epochs count whole ones. Behind max_epochs the last rate stays."""
    settings = config.scheduler
    total = (settings.max_epochs or config.training.epochs) * steps_per_epoch
    milestones = settings.milestones and [round(epoch * steps_per_epoch) for epoch in settings.milestones]
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total - 1)
    return build_scheduler(optimizer, settings.name, total, warmup, settings.min_lr, settings.power,
                           milestones=milestones, gamma=settings.gamma, pct_start=settings.pct_start,
                           div_factor=settings.div_factor, final_div_factor=settings.final_div_factor)


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None) -> SegmentationDataset:
    """split train (random crops) | val | test, or the photographs of data_dir with masks in label_dir; all but train
    are whole photographs. Every file is checked before the first step; `class_counts` are the pixels of each class."""
    data = config.dataset
    if data_dir is not None:
        if label_dir is None:
            raise ValueError("--label-dir is needed: the folder of the masks of --data-dir")
        pairs = pair_files(list_images(data_dir), list_images(label_dir), ("--data-dir", "--label-dir"))
    else:
        pairs = folder_pairs(data.root, data[f"{split}_split"] or split)
    train = split == "train" and data_dir is None
    arguments = (data.num_classes, data.ignore_label, data.reduce_zero_label)
    summary = check_pairs(pairs, *arguments, data.cache_dir or None, max(1, config.training.num_workers))
    dataset = SegmentationDataset(pairs, crop_size(config), data.num_classes, augmentation(config) if train else None,
                                  *arguments[1:], seed, "crops" if train else "whole")
    dataset.class_counts = summary.class_counts
    return dataset


def normalizer(config: Config):
    """A function: image (B, 3, H, W) uint8 -> float32, normalised, in the memory order of the config."""
    values = config.dataset.normalization
    mean, std = (torch.tensor(values[name])[:, None, None] for name in ("mean", "std"))
    order = memory_format(config)

    def normalize(image):
        image = image.contiguous(memory_format=order)
        return (image.float() / 255 - mean.to(image.device)) / std.to(image.device)
    return normalize


def memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.training.channels_last else torch.contiguous_format


# -- one epoch, one evaluation -----------------------------------------------------------------------------------------

def train_one_epoch(model, loader, criterion, optimizer, scheduler, scaler, ema, totals, state, config, args, device,
                    amp_dtype, log, stop):
    """Steps of one epoch from state["batch"] on. totals collects the loss terms; returns False if stopped."""
    model.train()
    normalize, world, micro_batches = normalizer(config), world_size(), []
    remaining = len(loader.batch_sampler) - state["batch"]
    if args.limit_batches and state["batch"] >= args.limit_batches:              # stopped right there, and resumed
        return True
    for batch in loader:
        remaining -= 1
        micro_batches.append(batch)
        if len(micro_batches) < config.training.accumulate_grad_batches and remaining:
            continue
        # Means are over all labelled pixels of the step, whatever the number of micro-batches and processes.
        weights = [criterion.label_weight(b["label"].to(device, non_blocking=True)) for b in micro_batches]
        weight, terms = all_reduce_sum(sum(weights)), {}
        for batch in micro_steps(model, micro_batches):
            image = normalize(batch["image"].to(device, non_blocking=True))      # (B, 3, S, T) float32
            label = batch["label"].to(device, non_blocking=True)                 # (B, S, T)
            with autocast(device, amp_dtype):
                logits = model(image)                                            # (B, C, S, T)
            losses = compute_loss(criterion, logits, label, weight, 1 / (world * len(micro_batches)))
            scaler.scale(losses["total"] * world).backward()                     # DDP takes the mean over the ranks
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + value.detach()
        optimizer_step(optimizer, scheduler, scaler, config.training.gradient_clip_val)
        if device.type != "cuda":                            # there SyncBatchNorm has the same statistics everywhere
            broadcast_buffers(model)
        if ema is not None:
            ema.update(model)
        state["step"] += 1
        state["batch"] += len(micro_batches)
        micro_batches = []
        totals.add(terms)
        if state["step"] % config.logging.log_every_n_steps == 0:                # the only place that waits for the GPU
            means = {name: float(all_reduce_sum(value)) for name, value in terms.items()}
            if not np.isfinite(means["total"]):
                raise FloatingPointError(f"the loss is {means['total']} at step {state['step']} (learning rate "
                                         f"{scheduler.get_last_lr()[0]:.2e}); lower optimizer.lr or use training.amp="
                                         f"float32; {args.output_dir} holds the last good checkpoint")
            log.train_step(state["step"], loss=means.pop("total"), **means, lr=scheduler.get_last_lr()[0])
        if all_agree_max(stop.requested or 0):
            return False
        if args.limit_batches and state["batch"] >= args.limit_batches:
            break
    return True


def evaluation_view(config: Config) -> View:
    settings = config.evaluation
    size = two_sides(config.dataset.image_size) if settings.size is None else settings.size
    window = max(crop_size(config)) if settings.window is None else settings.window
    stride = -(-2 * window // 3) if settings.stride is None else settings.stride
    return View(size or None, window if settings.mode == "slide" else None, stride,
                TTA_SCALES if settings.tta else (1.0,), settings.tta)


def refine_function(config: Config):
    """The post-processing as a function of probability (C, H, W) and image (3, H, W) uint8 -> label (H, W), or None."""
    settings = {**config.postprocess}
    crf = {**settings.pop("crf")}
    use_crf = crf.pop("use")
    if not use_crf and not any(settings[name] for name in ("opening", "closing", "mode", "min_area")):
        return None

    def refine(probability, image):
        if use_crf:
            probability = crf_refine(probability, image, **crf)
        label = probability.argmax(0)                                            # (H, W)
        return torch.from_numpy(morphology(label.cpu().numpy(), len(probability), **settings)).to(label.device)
    return refine


def score_function(model: nn.Module, device: torch.device, amp_dtype):
    """image (B, 3, h, w) normalised, any size -> logits (B, C, h, w) float32."""
    def score(image):
        with autocast(device, amp_dtype):
            return model(image).float()
    return score


def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=4, num_workers=0, limit_batches=0) -> dict:
    """Score every labelled pixel once; used in training, by --test-only and by evaluate.py. See evaluate_images."""
    model = unwrap(model).eval()
    device = device or next(model.parameters()).device
    return evaluate_images(score_function(model, device, amp_dtype), normalizer(model.config), dataset,
                           model.config.dataset.num_classes, evaluation_view(model.config), device, batch_size,
                           num_workers, limit_batches, refine_function(model.config))


def log_epoch(log: RunLog, state: dict, train: dict, result: dict | None, seconds: float, averaged: bool) -> None:
    """An epoch on the console, in log.jsonl and in TensorBoard; result None: an epoch without evaluation."""
    terms = ", ".join(f"{name} {value:.4f}" for name, value in train.items() if name != "total")
    line = f"Epoch {state['epoch']}: Train Loss: {train['total']:.4f} ({terms})"
    log.evaluation(state["epoch"], state["step"], "train", {**train, "loss": train["total"]})
    if result is not None:
        val = result["metrics"]
        line += (f"\n          Val mIoU: {val['miou']:.4f}, Val Acc: {val['overall_accuracy']:.4f}, Val Dice: "
                 f"{val['mean_f1']:.4f}, Val FWIoU: {val['fw_iou']:.4f}, Val NLL: {result['loss']:.4f}"
                 f"{' (averaged weights)' * averaged} (evaluation {result['seconds']:.2f} s)")
        log.evaluation(state["epoch"], state["step"], "val", {**val, "loss": result["loss"]})
    log.info(f"{line} ({seconds:.2f} s)")


# -- what evaluate.py and predict.py call ------------------------------------------------------------------------------

list_inputs = list_images                                   # the files of a folder that predict can read


def has_test_split(config: Config) -> bool:
    return config.dataset.test_split is not None or (Path(config.dataset.root) / "images" / "test").is_dir()


def attach(model: nn.Module, config: Config, names, colors) -> None:
    """What evaluation needs besides the weights, and the memory order."""
    model.config, model.class_names, model.palette = config, names, colors
    model.to(memory_format=memory_format(config))


def load_model(checkpoint: dict, device: torch.device) -> nn.Module:
    """The network of a checkpoint of this script, with its averaged weights where it has them, in eval mode."""
    config = Config(checkpoint["config"])
    model = build_model(config)
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    if checkpoint.get("ema") is not None:
        average = EMA(model)
        average.load_state_dict(checkpoint["ema"])
        average.copy_to(model)
    attach(model, config, checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


def predict(model: nn.Module, path: str | Path, amp_dtype=None) -> dict:
    """Label a photograph: label (H, W) int64 and confidence (H, W) at its own size (as displayed: an EXIF orientation
    is applied), and the photograph itself."""
    device, photo = next(model.parameters()).device, read_image(path, exif=True)
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).to(device)                   # (3, H, W) uint8
    result = segment_image(score_function(model, device, amp_dtype), normalizer(model.config), image,
                           evaluation_view(model.config), refine=refine_function(model.config))
    return {"label": result["label"].cpu().numpy(), "confidence": result["confidence"].cpu().numpy(), "photo": photo}


def write_prediction(model: nn.Module, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in the numbers of the training masks, an overlay."""
    data = model.config.dataset
    return write_image_result(stem, prediction, model.palette, options.labels, options.picture, data.ignore_label,
                              data.reduce_zero_label)


def example_pictures(model: nn.Module, dataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction, over the photograph."""
    return example_pair(dataset, index, pred, model.palette)


# -- set-up and resume -------------------------------------------------------------------------------------------------

def value_of(result: dict, monitor: str) -> float:
    return result["loss"] if MONITORS[monitor] == "loss" else result["metrics"][MONITORS[monitor]]


def headline(result: dict) -> dict:
    """What main returns of an evaluation: the single numbers, and the loss."""
    return {**{key: value for key, value in result["metrics"].items() if isinstance(value, float)},
            "loss": result["loss"]}


def test_only(args, config, checkpoint, path, device, amp_dtype) -> dict:
    """Score a checkpoint, as this config says, on the test split, or on validation where there is none."""
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model",), except_keys=FREE_ON_RESUME)
    checkpoint["config"] = config.to_dict()
    split = "test" if has_test_split(config) else "val"
    dataset, model = build_dataset(config, split), load_model(checkpoint, device)
    result = evaluate(model, dataset, device, amp_dtype, num_workers=config.training.num_workers,
                      limit_batches=args.limit_batches)
    if is_main():
        lines = [f"{path} on the {split} split:", metrics_table(result["metrics"], model.class_names)]
        lines += [f"{name}: mIoU {100 * other['miou']:.2f}" for name, other in result["tables"].items()]
        print(*lines, sep="\n", flush=True)
    cleanup()
    return headline(result)


# -- main --------------------------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    check_range("--limit-batches", args.limit_batches, 0)
    config = read_config(args, argv)
    training, amp = config.training, config.training.amp
    args.seed, args.deterministic = training.seed, training.deterministic
    args.amp_dtype = amp if isinstance(amp, str) else None if amp else "float32"
    # device and processes                                                        # same in all scripts
    device = pick_device(args.device)
    rank, local_rank, world = init_distributed(device.type)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
    amp_dtype, scaler = amp_settings(device, args.amp_dtype)
    seed_everything(args.seed, args.deterministic)

    folder = RunFolder(args.output_dir, config.checkpointing.dir, config.logging.dir)
    resume_path, messages = find_resume(args.resume or ("auto" if training.resume else None), folder.model, SCRIPT)
    if args.test_only and resume_path is None:
        raise ValueError(f"--test-only needs --resume PATH, or auto where {folder.model} has a checkpoint: a network "
                         f"that was never trained has no score")
    checkpoint = load_checkpoint(resume_path, SCRIPT) if resume_path else None
    if args.test_only:
        return test_only(args, config, checkpoint, resume_path, device, amp_dtype)
    check_writable(folder.model, folder.log, folder.config)

    # data: every file is checked before the first step, by rank 0, and remembered
    names, colors = class_info(config.dataset.root, config.dataset.classes, config.dataset.num_classes)
    for turn in (True, False):
        if is_main() == turn:
            train_set, val_set = build_dataset(config, "train", args.seed), build_dataset(config, "val")
        barrier()
    messages += doubts(config, names, train_set.class_counts)
    sampler = EpochBatchSampler(len(train_set), training.batch_size, args.seed, drop_last=True,
                                group=training.accumulate_grad_batches)
    batches = min(len(sampler), args.limit_batches or len(sampler))
    steps_per_epoch = -(-batches // training.accumulate_grad_batches)
    total_steps = training.epochs * steps_per_epoch
    if checkpoint is not None:
        check_same_run(checkpoint, config, total_steps, ("dataset", "augmentations", "model", "optimizer", "scheduler",
                       "losses", "training"), args.seed, FREE_ON_RESUME)

    # model
    model = build_model(config)
    messages.append(load_weights(model, checkpoint["model"], resume_path, what="model") if checkpoint is not None else
                    load_pretrained(model, config))
    attach(model, config, names, colors)
    model.to(device)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(model) if world > 1 and device.type == "cuda" else model
    network = torch.compile(network) if args.compile else network
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [local_rank] if device.type == "cuda" else None)

    # loss, optimiser, schedule
    criterion = build_criterion(config, train_set.class_counts).to(device)
    optimizer = build_optimizer(model, config)
    scheduler = build_lr_scheduler(optimizer, config, steps_per_epoch)
    ema = EMA(model, training.ema) if training.ema else None
    keep, patience = config.checkpointing, training.early_stopping
    keeper = CheckpointKeeper(folder.model, keep.save_top_k, keep.save_interval, keep.mode)
    stopping = EarlyStopping(patience.patience, patience.mode)
    state = {"epoch": 0, "batch": 0, "step": 0}             # epochs finished, batches of the next one, optimiser steps
    totals = LossTotals()

    # resume
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema"])
        keeper.load_state_dict(checkpoint["best"])
        stopping.load_state_dict(checkpoint["stopping"])
        state = {key: checkpoint[key] for key in state}
        totals.load_state_dict(checkpoint["totals"])
    restore_rng(checkpoint, args.seed, state["step"])

    def saved_state() -> dict:
        return {"script": SCRIPT, "config": config.to_dict(), "class_names": names, "palette": colors.tolist(),
                "model": model.state_dict(), "ema": None if ema is None else ema.state_dict(),
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict(), "stopping": stopping.state_dict(), "total_steps": total_steps,
                "seed": args.seed, "totals": totals.state_dict(), **rng_entries(), **state}

    def save(snapshot, epoch=None):
        if is_main():
            if epoch is not None:                           # before model_last, which a resume goes on from
                keeper.save_epoch(epoch, snapshot)
            keeper.save_last(snapshot)

    if is_main():
        write_run_files(folder, config, device, args.seed, resumed=checkpoint is not None)
    log = RunLog(folder.log, rank, config.logging.tensorboard, total_steps=total_steps,
                 resume_step=state["step"] if checkpoint is not None else None,
                 wandb={"project": "segheads", "name": config.experiment_name, "config": config.to_dict()}
                 if args.wandb else None)
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad >= wanted) for wanted in (False, True)]
    for line in (*messages, f"{len(train_set)} training and {len(val_set)} validation images",
                 f"{config.model.name}: {sizes[0]:,} parameters, {sizes[1]:,} trained; effective batch "
                 f"{training.batch_size * training.accumulate_grad_batches * world} on {describe(device)}, "
                 f"{amp_dtype or torch.float32}, seed {args.seed}"):
        log.info(line)

    if resume_path not in (None, folder.model / "model_last.pth"):          # what --resume auto goes on from
        save(saved_state(), None if state["batch"] else state["epoch"])
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=training.num_workers, worker_init_fn=seed_worker,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    go_on = f"go on with: {shlex.join(['python', *sys.argv, '--resume', 'auto'])}"
    result = {}
    with StopSignal() as stop, log:
        finished = 0 < stopping.patience <= stopping.waited
        while state["epoch"] < training.epochs and not finished:
            started = time.monotonic()
            train_set.set_epoch(state["epoch"])
            sampler.set_epoch(state["epoch"], state["batch"])
            if not train_one_epoch(network, loader, criterion, optimizer, scheduler, scaler, ema, totals, state, config,
                                   args, device, amp_dtype, log, stop):
                save(saved_state())
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped at step {state['step']} of {total_steps}, saved; {go_on}")
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            train, last = totals.means(), state["epoch"] == training.epochs
            if state["epoch"] % config.evaluation.interval and not last:
                log_epoch(log, state, train, None, time.monotonic() - started, False)
                save(saved_state(), state["epoch"])
            else:
                with ema.applied(model) if ema is not None else torch.no_grad():
                    result = evaluate(network, val_set, device, amp_dtype, num_workers=training.num_workers,
                                      limit_batches=args.limit_batches)
                log_epoch(log, state, train, result, time.monotonic() - started, ema is not None)
                score = value_of(result, keep.monitor)
                finished = stopping.update(value_of(result, patience.metric))
                snapshot = saved_state()                    # in every process: it gathers what they have
                if is_main() and keeper.save_best_if(score, snapshot):
                    log.info(f"New best {keep.monitor}: {score:.4f}. Checkpoint saved.")
                save(snapshot, state["epoch"])
            if finished:
                log.info(f"No better {patience.metric} for {stopping.patience} evaluations: stopped early.")
            elif all_agree_max(stop.requested or 0) and not last:
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped after epoch {state['epoch']}, saved; {go_on}")
        best = "none" if keeper.best_score is None else f"{keeper.best_score:.4f} (epoch {keeper.best_epoch})"
        log.info(f"Best {keep.monitor}: {best}; checkpoints in {folder.model}")
    cleanup()
    return {**(headline(result) if result else {}), "best": keeper.best_score, "best_epoch": keeper.best_epoch}


if __name__ == "__main__":
    run(main)
