"""Semantic segmentation of images from one YAML file: a U-Net on a ResNet (or DeepLab v2), trained
end to end.

    python train_segmentation.py configs/segmentation_camvid.yaml              # or --config CONFIG
    python train_segmentation.py CONFIG --pretrained_path resnet34-b627a593.pth        # ImageNet
    python train_segmentation.py CONFIG training.epochs=200 optimizer.lr=1e-4
    python train_segmentation.py CONFIG --device cpu --limit-batches 2 training.epochs=1
    torchrun --nproc_per_node=4 train_segmentation.py CONFIG                          # several GPUs
    python train_segmentation.py CONFIG --resume auto                          # go on, bit for bit
    python train_segmentation.py CONFIG --resume exp/segmentation/model/model_best.pth --test-only

Ronneberger et al. 2015 (U-Net) on He et al. 2016, with the names of torchvision and
segmentation_models.pytorch, whose files load. Photographs lie in ROOT/images/SPLIT, masks of class
ids in ROOT/masks/SPLIT, 255 is ignored. Against train_upernet_head.py: nothing is frozen, and no
pre-trained weights are needed. All keys are in DEFAULTS. Every number logged, every choice and
deviation: docs/segmentation.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.image_splits import (
    check_file_settings,
    checked_dataset,
    class_info,
    folder_pairs,
    given_pairs,
    mask_suffixes,
    training_doubts,
)
from data.images import Augmentation, SegmentationDataset, list_images
from data.photos import photo_format
from models.deeplab import DeepLabClassifier, load_deeplab_weights
from models.resnet import ENCODERS, FILES, URL, load_resnet_weights
from models.unet import UNet, is_unet, load_unet_weights, read_unet_weights
from utils.checkpoint import EarlyStopping
from utils.checks import check_positive, check_range
from utils.cli import ArgumentParser, given_flags, run_main
from utils.config import Config, Required, Setting, command_line_wins, load_config
from utils.device import AMP_DTYPES
from utils.distributed import all_reduce_sum, broadcast_buffers, main_first
from utils.ema import EMA, averaged, load_averaged
from utils.image_inference import TTA_SCALES, View, build_normalizer
from utils.image_scripts import (
    PHOTO_RESULTS,
    attach,
    evaluate_photos,
    label_photo,
    photo_pictures,
    write_photo_label,
)
from utils.losses import WeightedLoss, class_weights, lovasz_softmax_loss, soft_dice_loss
from utils.metrics import headline, metrics_table
from utils.params import describe_parameters, split_decay
from utils.postprocess import build_refine
from utils.run import Run, add_run_flags
from utils.schedule import SCHEDULES, build_scheduler
from utils.training import build_loader, check_same_run, micro_steps

SCRIPT = Path(__file__).name
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "Dice": "mean_f1", "FWIoU": "fw_iou"}
RESULTS = {**PHOTO_RESULTS, "pca": False}
# Names in the config -> in the result of an evaluation.
MONITORS = {"val/mIoU": "miou", "val/loss": "loss", "val/accuracy": "overall_accuracy",
            "val/FWIoU": "fw_iou", "val/Dice": "mean_f1", "val/mAcc": "mean_accuracy"}
MODES = ("max", "min")
# Of a whole micro-batch, not of a pixel.
SET_LOSSES = {"dice": soft_dice_loss, "lovasz": lovasz_softmax_loss}
COMPARED = ("dataset", "augmentations", "model", "optimizer", "scheduler", "losses", "training")
# Steps are compared as well.
FREE_ON_RESUME = ("dataset.test_split", "dataset.classes", "dataset.max_pixels",
                  "dataset.cache_dir", "model.weights", "model.pretrained",
                  "training.batch_size", "training.num_workers",
                  "training.amp", "training.resume")

DEFAULTS = {
    "experiment_name": Setting(None, (str,)),   # the run folder is exp/NAME, or --output-dir
    "dataset": {
        "root": Required((str,)),               # with images/SPLIT and masks/SPLIT
        "train_split": "train",
        "val_split": "val",
        "test_split": Setting(None, (str,)),    # of --test-only, evaluate.py; None: test, else val
        "num_classes": Required((int,), low=2),     # softmax of one class teaches nothing
        "classes": Setting(None, (str,)),       # names, colours; None: root/classes.json or .txt
        "image_size": Setting(512, (int, list)),    # photographs cover [height, width] or a square
        "normalization": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "ignore_label": 255,                    # the masks' value for unlabelled
        "reduce_zero_label": False,             # 0 is unlabelled too, classes count from 1
        "label_map": Setting(None, (str, dict)),    # 0:0,255:1,4:ignore, or a file; None: class ids
        "mask_suffix": Setting([], (list, str)),    # masks' names have it behind the images': _mask
        "value_range": Setting(None, (list,)),      # black and white of images of more than 8 bits
        "bands": Setting(None, (list,)),        # those to see, any number, from 1; None: 1, 2, 3
        "max_pixels": Setting(None, (int, float), low=1),   # larger images are refused; None: 179e6
        "cache_dir": Setting(".cache/images", (str, type(None))),   # what the check of files found
    },
    "augmentations": {
        "horizontal_flip": True,
        "vertical_flip": False,
        "color_jitter": {                       # as torchvision's
            "brightness": Setting(0.0, (float,), low=0),
            "contrast": 0.0,
            "saturation": 0.0,
            "hue": 0.0,
        },
        "random_crop": {"size": Setting(None, (int, list)), "padding": 0},      # None: image_size
        "scale_range": [1.0, 1.0],              # factors of image_size
    },
    "model": {
        "name": Setting("unet", (str,), ("unet", "deeplab_v2")),
        "backbone": Setting("resnet34", (str,), tuple(ENCODERS)),       # of unet
        "pretrained": Setting(None, (bool,)),   # true: weights must be named; false: from scratch
        "weights": Setting(None, (str,)),       # the same as --pretrained_path
        "dropout": 0.0,                         # of whole channels, before the head; of unet
        "freeze_encoder": False,                # of unet
        "n_blocks": [3, 4, 23, 3],              # of deeplab_v2: ResNet-101
        "base_width": Setting(64, (int,), low=1),       # of deeplab_v2
    },
    "optimizer": {
        "name": Setting("adamw", (str,), ("adamw", "adam", "sgd")),
        "lr": 3e-4,
        "weight_decay": Setting(0.01, (float,), low=0),
        "momentum": Setting(0.9, (float,), low=0),      # of sgd
    },
    "scheduler": {
        "name": Setting("cosine", (str,), SCHEDULES),
        "warmup_epochs": Setting(0.0, (float,), low=0),
        "max_epochs": Setting(None, (int,)),    # where the schedule ends; None: training.epochs
        "min_lr": Setting(1e-6, (float,), low=0),
        "power": 0.9,                           # of poly
        "milestones": Setting(None, (list,)),   # of step, in epochs; None: 2/3 and 8/9
        "gamma": 0.1,                           # of step
        "pct_start": 0.1,                       # this and the next two: of onecycle
        "div_factor": 10.0,
        "final_div_factor": 1000.0,
    },
    "losses": {                                 # weights of the terms
        "ce": Setting(1.0, (float,), low=0),
        "dice": Setting(0.0, (float,), low=0),
        "focal": Setting(0.0, (float,), low=0),
        "lovasz": Setting(0.0, (float,), low=0),
        "class_weights": Setting(None, (list, str)),    # of ce, focal; or [sqrt_]median_frequency
        "label_smoothing": 0.0,                 # of ce
        "gamma": 2.0,                           # of focal
    },
    "training": {
        "epochs": Setting(100, (int,), low=1),
        "batch_size": Setting(8, (int,), low=1),        # images per process and micro-step
        "accumulate_grad_batches": Setting(1, (int,), low=1),       # micro-steps per optimiser step
        "num_workers": Setting(4, (int,), low=0),       # loader processes; 0: in the main process
        # true: bfloat16 where the device computes in it, a CPU with AVX512-BF16 or AMX, too
        "amp": Setting(True, (bool, str), (True, False, *AMP_DTYPES)),
        "seed": 0,
        "deterministic": False,
        "gradient_clip_val": Setting(0.0, (float,), low=0),     # largest gradient norm; 0: none
        "ema": Setting(0.0, (float,), low=0),   # decay of the averaged weights; 0: none
        "channels_last": False,                 # memory order of images and convolutions
        "early_stopping": {                     # patience in evaluations; 0: never
            "patience": 0,
            "metric": Setting("val/mIoU", (str,), tuple(MONITORS)),
            "mode": Setting("max", (str,), MODES),
        },
        "resume": False,                        # the same as --resume auto
    },
    "evaluation": {
        "mode": Setting("whole", (str,), ("whole", "slide")),
        "size": Setting(None, (int,)),          # short side; None: as in training; 0: no change
        "window": Setting(None, (int,)),        # side of the window; None: that of a training crop
        "stride": Setting(None, (int,)),        # None: two thirds of the window
        "tta": False,                           # five scales and their mirror images
        "interval": Setting(1, (int,), low=1),  # epochs between evaluations
    },
    "postprocess": {                            # see utils/postprocess.py; 0: not this step
        "crf": {"use": False, "appearance": 1.0, "smoothness": 1.0, "color_std": 10.0,
                "position_std": 3.0, "radius": 3, "dilation": 1, "iterations": 5, "shrink": 1},
        "opening": 0,                           # this and closing: sides of squares, odd
        "closing": 0,
        "closing_order": [],                    # the classes that may grow, first to last
        "mode": 0,
        "min_area": 0,
    },
    "checkpointing": {
        "dir": Setting(None, (str,)),           # None: OUTPUT_DIR/model
        "save_top_k": Setting(0, (int,), low=0),        # best checkpoints besides model_best.pth
        "monitor": Setting("val/mIoU", (str,), tuple(MONITORS)),
        "mode": Setting("max", (str,), MODES),
        "save_interval": Setting(0, (int,), low=0),     # epochs between those that stay; 0: none
    },
    "logging": {
        "dir": Setting(None, (str,)),
        "log_every_n_steps": Setting(50, (int,), low=1),
        "tensorboard": True,
    },
}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="*", metavar="CONFIG [section.key=value]",
                        help="YAML, TOML or JSON file, then changes to it")
    parser.add_argument("--config", metavar="CONFIG", help="the same file, as a flag")
    parser.add_argument("--pretrained_path",
                        help="ResNet of torchvision, or a U-Net (or DeepLab): model.weights")
    add_run_flags(parser, SCRIPT, num_workers=None)     # None: that of the config
    return parser


def parse_args(argv=None):
    """The flags, with `config` and `overrides` out of the arguments without one."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = [text for text in args.inputs if "=" not in text]
    if args.config is not None:
        names.append(args.config)
    if len(names) != 1:
        parser.error(f"expected one CONFIG file and section.key=value, got "
                     f"{' and '.join(names) or 'no file'}")
    args.config = names[0]
    args.overrides = [text for text in args.inputs if "=" in text]
    return args


def read_config(args, argv) -> Config:
    """The checked config with the given flags written into it, and those flags of a run that it
    sets: seed, deterministic, amp_dtype, num_workers, output_dir, resume."""
    config = load_config(args.config, DEFAULTS, args.overrides)
    given = given_flags(make_parser(), argv)
    training = config.training
    config.model.weights = args.pretrained_path or config.model.weights
    for key in {"num_workers", "seed", "deterministic"} & given:
        training[key] = getattr(args, key)
    if args.amp_dtype:
        training.amp = args.amp_dtype
    check_config(config)
    if "output_dir" not in given and config.experiment_name:
        args.output_dir = f"exp/{config.experiment_name}"
    args.experiment = config.experiment_name
    if training.resume and not args.resume:
        args.resume = "auto"
    args.seed = training.seed
    args.deterministic = training.deterministic
    args.num_workers = training.num_workers
    args.amp_dtype = {True: "native", False: "float32"}.get(training.amp, training.amp)
    return config


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    data = config.dataset
    schedule = config.scheduler
    epochs = config.training.epochs
    check_range("model.dropout", config.model.dropout, 0, 1)
    check_positive("optimizer.lr", config.optimizer.lr)
    check_file_settings(data, data.num_classes, any_bands=True)
    if not data.label_map and data.ignore_label < data.num_classes + data.reduce_zero_label:
        raise ValueError(f"dataset.ignore_label={data.ignore_label} is one of the "
                         f"{data.num_classes} classes in the masks; for masks that mean unlabelled "
                         f"by 0, use dataset.reduce_zero_label")
    for name, size in (("dataset.image_size", data.image_size),
                       ("augmentations.random_crop.size", config.augmentations.random_crop.size)):
        sides = [size] if isinstance(size, int) else size
        if sides is None:
            continue
        whole = all(type(side) is int and side >= 16 for side in sides)
        if not whole or not 1 <= len(sides) <= 2:
            raise ValueError(f"{name}={size}: expected [height, width] or one number, pixels, at "
                             f"least 16")
    bands = photo_format(data).channels
    for name, values in data.normalization.items():
        if len(values) not in (3, bands) or (name == "std" and min(values) <= 0):
            raise ValueError(f"dataset.normalization.{name}={values}: one number per channel, red, "
                             f"green and blue, or one for each of {bands} bands")
    jitter = config.augmentations.color_jitter
    if bands != 3 and (jitter.saturation or jitter.hue):
        raise ValueError(f"augmentations.color_jitter: saturation and hue are of three colours, "
                         f"dataset.bands names {bands}; leave them at 0")
    stopping = config.training.early_stopping
    for place, metric, mode in (
            ("checkpointing", config.checkpointing.monitor, config.checkpointing.mode),
            ("training.early_stopping", stopping.metric, stopping.mode)):
        best, word = ("min", "smaller") if metric == "val/loss" else ("max", "larger")
        if mode != best:
            raise ValueError(f"{place}.mode={mode}: {metric} is better when it is {word}")
    short = (schedule.max_epochs or epochs) < epochs
    if schedule.name == "onecycle" and (schedule.warmup_epochs or short):
        raise ValueError(f"scheduler.warmup_epochs={schedule.warmup_epochs}, max_epochs="
                         f"{schedule.max_epochs}: onecycle has its own warm-up (pct_start; set 0), "
                         f"and cannot end before the {epochs} epochs")
    view = evaluation_view(config)
    if (config.evaluation.size or 16) < 16 or not 1 <= view.stride <= (view.window or view.stride):
        raise ValueError(f"evaluation.size={config.evaluation.size}, window="
                         f"{config.evaluation.window}, stride={config.evaluation.stride}: a size "
                         f"of at least 16 (or 0) and a stride from 1 to the window's side are "
                         f"needed")
    # The other settings are checked where they are used.
    build_criterion(config, np.ones(data.num_classes))
    build_lr_scheduler(torch.optim.SGD([torch.zeros(1)], config.optimizer.lr), config, 1)
    build_augmentation(config).check()
    refine = build_refine(config.postprocess)
    if refine is not None:
        refine(torch.full((data.num_classes, 1, 1), 1 / data.num_classes),
               torch.zeros(min(3, len(data.bands or (1, 2, 3))), 1, 1, dtype=torch.uint8))


def check_batch_norm(config: Config) -> None:
    """ValueError where the deepest map of a training batch has a single value per channel."""
    one_cell = config.model.name == "unet" and max(crop_size(config)) <= 32
    if one_cell and config.training.batch_size == 1 and not config.model.freeze_encoder:
        name = "augmentations.random_crop.size" if config.augmentations.random_crop.size else \
            "dataset.image_size"
        raise ValueError(f"training.batch_size=1 and {name}={max(crop_size(config))}: batch norm "
                         f"cannot train on one cell; set training.batch_size=2 or more, or {name} "
                         f"above 32")


def schedule_doubts(config: Config) -> list[str]:
    last = config.scheduler.max_epochs
    epochs = config.training.epochs
    if (last or epochs) >= epochs:
        return []
    return [f"WARNING: the schedule ends at scheduler.max_epochs={last}; the last {epochs - last} "
            f"of {epochs} epochs keep its last rate"]


def two_sides(size) -> tuple[int, int]:
    """(height, width) of a size in the config: [height, width] or one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def crop_size(config: Config) -> tuple[int, int]:
    return two_sides(config.augmentations.random_crop.size or config.dataset.image_size)


def build_augmentation(config: Config) -> Augmentation:
    settings = config.augmentations
    return Augmentation(tuple(settings.scale_range), cat_max_ratio=1.0,
                        flip=0.5 * settings.horizontal_flip,
                        vertical_flip=0.5 * settings.vertical_flip,
                        padding=settings.random_crop.padding,
                        cover=two_sides(config.dataset.image_size), color="factors",
                        **settings.color_jitter)


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None) -> SegmentationDataset:
    """split train (random crops) | val | test, or the photographs of data_dir with masks in
    label_dir; all but train are whole photographs. Every file is checked before the first step;
    `class_counts` are the pixels of each class."""
    data = config.dataset
    if data_dir is not None:
        pairs = given_pairs(data_dir, label_dir, data)
    else:
        pairs = folder_pairs(data.root, data[f"{split}_split"] or split, mask_suffixes(data))
    train = split == "train" and data_dir is None
    return checked_dataset(data, pairs, config.training.num_workers, seed,
                           "crops" if train else "whole",
                           build_augmentation(config) if train else None, size=crop_size(config))[0]


def build_model(config: Config) -> nn.Module:
    """A network without its weights: image (B, bands, H, W) normalised -> logits (B, C, H, W)."""
    model = config.model
    bands = photo_format(config.dataset).channels
    C = config.dataset.num_classes
    if model.name == "unet":
        build = ENCODERS[model.backbone]
        encoder = build() if bands == 3 else build(bands)
        return UNet(encoder, C, model.dropout, model.freeze_encoder)
    return DeepLabClassifier(C, tuple(model.n_blocks), model.base_width, bands)


def load_pretrained(model: nn.Module, config: Config) -> str:
    """Load what model.weights names, as model.pretrained says; returns the line for the log.
    Nothing is downloaded."""
    settings = config.model
    if settings.weights is None and settings.pretrained:
        file = FILES.get(settings.backbone if settings.name == "unet" else "resnet101", "")
        raise ValueError(f"model.pretrained=true needs a file of weights: fetch {URL}{file} and "
                         f"name it, --pretrained_path FILE (or model.weights); "
                         f"model.pretrained=false trains from scratch")
    if settings.weights is not None and settings.pretrained is False:
        raise ValueError(f"model.pretrained=false, but {settings.weights} is named; set it to "
                         f"true, or leave out the file")
    if settings.weights is None:
        return ("WARNING: the network is randomly initialised; ImageNet weights "
                "(--pretrained_path) make a better start")
    if settings.name == "deeplab_v2":
        return load_deeplab_weights(model.network, settings.weights)
    if Path(settings.weights).is_dir() or is_unet(read_unet_weights(settings.weights)):
        return load_unet_weights(model, settings.weights)
    return load_resnet_weights(model.encoder, settings.weights)


def build_criterion(config: Config, counts: np.ndarray) -> WeightedLoss:
    losses = config.losses
    weights = class_weights(losses.class_weights, counts, "losses.class_weights")
    terms = {name: losses[name] for name in WeightedLoss.NAMES}
    return WeightedLoss(terms, weights, label_smoothing=losses.label_smoothing, class_dim=1,
                        gamma=losses.gamma, num_classes=config.dataset.num_classes)


def compute_loss(criterion: WeightedLoss, logits, label, weight, share: float) -> dict:
    """Terms and their weighted `total`. Sums over pixels (ce, focal) are divided by `weight`, that
    of all pixels of the step; dice and lovasz are of this micro-batch, which is `share` of it."""
    terms = {}
    for name in criterion.terms:
        if name in SET_LOSSES:
            terms[name] = share * SET_LOSSES[name](logits, label, class_dim=1)
        else:
            total, _ = getattr(criterion, name).sum_and_weight(logits, label)
            terms[name] = total / weight.clamp(min=1e-6)
    total = sum(criterion.terms[name] * value for name, value in terms.items())
    return {**terms, "total": total}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """No decay for norms and biases."""
    settings = config.optimizer
    groups = split_decay(model.named_parameters(), settings.weight_decay)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, settings.momentum)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    return kinds[settings.name](groups, settings.lr)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int):
    """Stepped after each optimiser step. Behind max_epochs the last rate stays."""
    settings = config.scheduler
    total = (settings.max_epochs or config.training.epochs) * steps_per_epoch
    milestones = None
    if settings.milestones:
        milestones = [round(epoch * steps_per_epoch) for epoch in settings.milestones]
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total - 1)
    return build_scheduler(optimizer, settings.name, total, warmup, settings.min_lr, settings.power,
                           milestones=milestones, gamma=settings.gamma,
                           pct_start=settings.pct_start, div_factor=settings.div_factor,
                           final_div_factor=settings.final_div_factor)


def memory_format(config: Config) -> torch.memory_format:
    return torch.channels_last if config.training.channels_last else torch.contiguous_format


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, loader, criterion, ema: EMA | None, clip_grad: float):
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # Means are over all labelled pixels of the step, whatever the number of micro-batches and
        # processes.
        weight = sum(criterion.label_weight(batch["label"]) for batch in micro_batches)
        weight = all_reduce_sum(weight.to(run.device, non_blocking=True))
        share = 1 / (run.world * len(micro_batches))
        for batch in micro_steps(network, micro_batches):
            image = batch["image"].to(run.device, non_blocking=True)
            label = batch["label"].to(run.device, non_blocking=True)        # (B, S, T)
            with run.autocast():
                logits = network(run.model.normalize(image))                # (B, C, S, T)
            losses = compute_loss(criterion, logits, label, weight, share)
            run.backward(losses["total"], losses)
        run.update(clip_grad)
        broadcast_buffers(network)      # before they are averaged
        if ema is not None:
            ema.update(network)


# -- evaluation, and what else evaluate.py and predict.py call -------------------------------------

evaluate = evaluate_photos
predict = label_photo
write_prediction = write_photo_label
example_pictures = photo_pictures
list_inputs = list_images


def has_test_split(config: Config) -> bool:
    folder = Path(config.dataset.root) / "images" / "test"
    return config.dataset.test_split is not None or folder.is_dir()


def evaluation_view(config: Config) -> View:
    settings = config.evaluation
    size = two_sides(config.dataset.image_size) if settings.size is None else settings.size
    window = max(crop_size(config)) if settings.window is None else settings.window
    stride = -(-2 * window // 3) if settings.stride is None else settings.stride
    return View(size or None, window if settings.mode == "slide" else None, stride,
                TTA_SCALES if settings.tta else (1.0,), settings.tta)


def attach_settings(model: nn.Module, config: Config, class_names, palette: np.ndarray) -> None:
    """What evaluation needs besides the weights, and the memory order."""
    attach(model, config, class_names, palette, masks=config.dataset, view=evaluation_view(config),
           normalize=build_normalizer(**config.dataset.normalization, order=memory_format(config),
                                      bands=photo_format(config.dataset).channels),
           refine=build_refine(config.postprocess))
    model.to(memory_format=memory_format(config))


def load_model(checkpoint: dict, device: torch.device) -> nn.Module:
    """The network of a checkpoint, with its averaged weights where it has them, in eval mode."""
    config = Config(checkpoint["config"])
    model = build_model(config)
    load_averaged(model, checkpoint)
    attach_settings(model, config, checkpoint["class_names"],
                    np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


def test_only(run: Run, config: Config) -> dict:
    """Score a checkpoint, as this config says, on the test split, or on validation without one."""
    checkpoint = run.checkpoint
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model",),
                   except_keys=FREE_ON_RESUME)
    checkpoint["config"] = config.to_dict()
    split = "test" if has_test_split(config) else "val"
    dataset = build_dataset(config, split)
    model = load_model(checkpoint, run.device)
    result = evaluate(model, dataset, run.device, run.amp_dtype, num_workers=run.args.num_workers,
                      limit_batches=run.args.limit_batches)
    run.report(*dataset.notes, f"{run.resume_path} on the {split} split:",
               metrics_table(result["metrics"], model.class_names),
               *(f"{name}: mIoU {100 * other['miou']:.2f}"
                 for name, other in result["tables"].items()))
    return headline(result)


# -- main ------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    config = read_config(args, argv)
    command_line_wins(config, args, "checkpointing.dir", "logging.dir")
    run = Run(args, SCRIPT, DEFAULTS, config.checkpointing.dir, config.logging.dir)
    if args.test_only:
        return test_only(run, config)
    training = config.training
    check_batch_norm(config)

    # data: every file is checked before the first step, by rank 0, and remembered
    data = config.dataset
    class_names, palette = class_info(data.root, data.classes, data.num_classes, data.label_map)
    with main_first():
        train_set = build_dataset(config, "train", args.seed)
        val_set = build_dataset(config, "val")
    run.messages += training_doubts(class_names, train_set, val_set, data)
    run.check_data(train=train_set, val=val_set)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, accumulate=training.accumulate_grad_batches,
                       drop_last=True, compare=COMPARED, free=FREE_ON_RESUME)

    # model
    model = build_model(config)
    if not run.restore(model):
        run.messages.append(load_pretrained(model, config))
    attach_settings(model, config, class_names, palette)
    network = run.wrap(model)

    # loss, optimiser, schedule, average
    criterion = build_criterion(config, train_set.class_counts).to(run.device)
    optimizer = build_optimizer(model, config)
    scheduler = build_lr_scheduler(optimizer, config, run.steps_per_epoch)
    ema = EMA(model, training.ema) if training.ema else None
    keep = config.checkpointing
    patience = training.early_stopping
    stopping = EarlyStopping(patience.patience, patience.mode)
    run.track(config=config, class_names=class_names, palette=palette.tolist(), optimizer=optimizer,
              scheduler=scheduler, save_interval=keep.save_interval, keep_top_k=keep.save_top_k,
              monitor=keep.monitor, mode=keep.mode, ema=ema, stopping=stopping)

    loader = build_loader(train_set, sampler, args.num_workers, run.device)
    lines = (f"{len(train_set)} training and {len(val_set)} validation images",
             f"{config.model.name}: {describe_parameters(model)}; {run.description}",
             *schedule_doubts(config))
    with run.training(*lines, log_interval=config.logging.log_every_n_steps,
                      tensorboard=config.logging.tensorboard):
        for _ in run.epochs(train_set, sampler, stopping):
            train_one_epoch(run, network, loader, criterion, ema, training.gradient_clip_val)
            result = None
            if run.due(config.evaluation.interval):
                with averaged(ema, model):
                    result = evaluate(network, val_set, run.device, run.amp_dtype,
                                      num_workers=args.num_workers,
                                      limit_batches=args.limit_batches)
                numbers = headline(result)
                stopping.update(numbers[MONITORS[patience.metric]])
            run.end_epoch(result, SHOWN, score=MONITORS[keep.monitor])
    return run.summary()


if __name__ == "__main__":
    run_main(main)
