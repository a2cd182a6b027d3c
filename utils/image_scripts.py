"""Plumbing shared by the scripts on photographs: the flags of those without a config file, the frozen backbone and its
features, scoring, labelling and drawing photographs.

This module stands above data/ and models/; only scripts import it. Scoring and labelling serve any network with
`scores(image)`: normalised images (B, 3, H, W) whose sides are multiples of `multiple` -> (B, C, H, W). What they need
besides is attached to the network by `attach`. config is that of the flags below, in the sections data, model,
training and evaluation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from data.feature_cache import CachedTaps
from data.image_results import example_pair, write_image_result
from data.image_splits import (
    check_file_settings,
    checked_dataset,
    given_pairs,
    read_classes,
    split_pairs,
    training_doubts,
)
from data.images import Augmentation, SegmentationDataset
from data.label_map import label_map_of
from data.photo_values import photo_doubts
from data.photos import open_photo, photo_format
from models.dinov3 import FrozenBackbone, backbone_name
from models.dinov3_weights import load_backbone, restore_backbone
from utils.checks import check_positive, check_range
from utils.cli import ArgumentParser, AtLeast
from utils.config import Config
from utils.device import autocast
from utils.distributed import main_first, unwrap
from utils.image_inference import (
    TTA_SCALES,
    View,
    evaluate_images,
    pad_to_multiple,
    photo_rows,
    resized_shape,
    segment_image,
)
from utils.losses import class_weights
from utils.metrics import headline, metrics_table
from utils.run import Run
from utils.schedule import build_scheduler

FREE_ON_RESUME = ("training.batch_size", "training.log_interval", "training.save_interval", "model.backbone_weights",
                  "data.val_image_paths", "data.val_mask_paths", "data.test_image_paths", "data.test_mask_paths",
                  "data.classes", "data.max_pixels", "data.cache_dir",
                  "data.cache_features")                                                    # steps are compared as well

# For predict.py, default first.
PHOTO_RESULTS = {"labels": ("auto", "png", "npy", "tif"), "picture": ("auto", "png", "tif", "none"), "html": False,
                 "confidence": True, "recursive": True}


# -- flags -------------------------------------------------------------------------------------------------------------

def add_photo_flags(parser: ArgumentParser) -> None:
    """The group `data`: photographs, masks and classes."""
    data = parser.add_argument_group("data")
    data.add_argument("--image-paths", nargs="+", metavar="PATH", help="training images: files, folders or globs")
    data.add_argument("--mask-paths", nargs="+", metavar="PATH", help="their masks, of the same file names")
    data.add_argument("--val-image-paths", nargs="+", metavar="PATH", help="validation images")
    data.add_argument("--val-mask-paths", nargs="+", metavar="PATH")
    data.add_argument("--val-share", type=float, default=0.0, metavar="SHARE",
                      help="without --val-image-paths: share of the training images held out (0.1 with --validate)")
    data.add_argument("--test-image-paths", nargs="+", metavar="PATH", help="read by --test-only and evaluate.py alone")
    data.add_argument("--test-mask-paths", nargs="+", metavar="PATH")
    data.add_argument("--mask-suffix", nargs="+", metavar="TEXT",
                      help="what masks' names have behind the images': _mask")
    data.add_argument("--num-classes", type=AtLeast(1), default=150)
    data.add_argument("--classes", metavar="FILE", help='class names and colours: {"classes": [...], "palette": [...]}')
    data.add_argument("--ignore-label", type=int, default=255, help="the masks' value for unlabelled")
    data.add_argument("--reduce-zero-label", action="store_true", help="0 is unlabelled too, classes count from 1")
    data.add_argument("--label-map", metavar="PAIRS|FILE",
                      help="classes of the masks' numbers: 0:0,255:1,4:ignore, or a .json or .yaml file with names")
    data.add_argument("--value-range", nargs="+", type=float, metavar="VALUE",
                      help="LOW HIGH: black and white of images of more than 8 bits; default: the range of their type")
    data.add_argument("--bands", nargs="+", type=int, metavar="N",
                      help="the three that the network sees, from 1; default: the first three")
    data.add_argument("--max-pixels", type=AtLeast(1), metavar="N",
                      help="images of more are refused; default: 178956970, which small files cannot claim by mistake")
    data.add_argument("--image-size", type=AtLeast(64), default=512, help="side of a training crop, a multiple of 32")
    data.add_argument("--augment", choices=("crops", "windows"), default="crops",
                      help="crops: random scale, crop, flip, colours; windows: fixed views, every pixel once an epoch")
    data.add_argument("--cache-features", action="store_true", help="run the backbone once; needs --augment windows")
    data.add_argument("--cache-dir", default=".cache/images", help="file check and cached features; '' for no check")


def add_backbone_flags(model: argparse._ArgumentGroup) -> None:
    model.add_argument("--backbone", default="dinov3_vits16", help="dinov3_vits16 to dinov3_vit7b16, dinov2_vits14 ...")
    model.add_argument("--backbone-weights", metavar="FILE|URL|DIR|random",
                       help="official .pth, Hugging Face file or folder; random: untrained, to try the machinery")
    model.add_argument("--normalization", choices=("auto", "imagenet", "sat493m"), default="auto")


def add_training_flags(parser: ArgumentParser, *, lr: float, weight_decay: float, epochs: int = 100,
                       batch_size: int = 8, scheduler: str = "poly", clip_grad: float = 0.0,
                       warmup_epochs: float | None = 1.0) -> argparse._ArgumentGroup:
    """The group `training`, with these defaults; returns it, for flags of the method. warmup_epochs None: the script
    works it out from --epochs."""
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=AtLeast(1), default=epochs)
    training.add_argument("--warmup-epochs", type=AtLeast(0, float), default=warmup_epochs,
                          help="default: 30 %% of --epochs" if warmup_epochs is None else None)
    training.add_argument("--batch-size", type=AtLeast(1), default=batch_size, help="images per process and micro-step")
    training.add_argument("--accumulate", type=AtLeast(1), default=1, metavar="N",
                          help="micro-steps per optimiser step")
    training.add_argument("--lr", type=float, default=lr)
    training.add_argument("--weight-decay", type=AtLeast(0, float), default=weight_decay)
    training.add_argument("--scheduler", choices=("poly", "cosine", "constant"), default=scheduler)
    training.add_argument("--clip-grad", type=AtLeast(0, float), default=clip_grad,
                          help="largest norm of the whole gradient; 0: none")
    training.add_argument("--log-interval", type=AtLeast(1), default=10, metavar="STEPS")
    training.add_argument("--save-interval", type=AtLeast(0), default=10, metavar="EPOCHS")
    return training


def add_class_weights(training: argparse._ArgumentGroup) -> None:
    training.add_argument("--class-weights", metavar="NAME|W,W,...",
                          help="of the loss: median_frequency, sqrt_median_frequency, or a number for each class, such "
                               "as 1,0.5,2; default: all 1")


def add_evaluation_flags(parser: ArgumentParser) -> None:
    """The groups `evaluation` and `paths`."""
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--validate", action="store_true", help="score after every --val-interval epochs")
    evaluation.add_argument("--val-interval", type=AtLeast(1), default=1, metavar="EPOCHS")
    evaluation.add_argument("--eval-mode", choices=("slide", "even", "whole"), default="slide",
                            help="slide: windows every --eval-stride; even: as few as cover the image, evenly spread")
    evaluation.add_argument("--eval-size", type=int, help="short side; default: --image-size; 0: as it is")
    evaluation.add_argument("--eval-stride", type=int, help="of the sliding window; default: two thirds of it")
    evaluation.add_argument("--tta", action="store_true", help="average five scales and their mirror images")
    paths = parser.add_argument_group("paths")
    paths.add_argument("--checkpoint-dir", help="default: OUTPUT_DIR/model")
    paths.add_argument("--log-dir", help="default: OUTPUT_DIR/log")


def check_flags(config: Config) -> None:
    """Errors that need more than one flag to see, as ValueError.

    Changes config: the backbone's full name, lists of paths that are not given, the share of --validate.
    """
    data, evaluation = config.data, config.evaluation
    check_range("--val-share", data.val_share, 0, 0.5)
    check_positive("--lr", config.training.lr)
    if "class_weights" in config.training:
        class_weights(config.training.class_weights, np.ones(data.num_classes), "--class-weights")
    data |= {key: data[key] or [] for key in ("mask_suffix", "value_range", "bands")}
    check_file_settings(data, data.num_classes)
    if not data.label_map and data.ignore_label < data.num_classes + data.reduce_zero_label:
        raise ValueError(f"--ignore-label {data.ignore_label} is one of the {data.num_classes} classes in the masks; "
                         f"for masks that mean unlabelled by 0, use --reduce-zero-label")
    view = evaluation_view(config)
    stride = 1 if view.stride is None else view.stride           # None: found for each image
    if (view.size or 32) < 32 or not 1 <= stride <= (view.window or stride):
        raise ValueError(f"--eval-size {evaluation.eval_size} --eval-stride {evaluation.eval_stride}: a size of at "
                         f"least 32 (or 0) and a stride from 1 to the window's side are needed")
    config.model.backbone = backbone_name(config.model.backbone)
    if data.cache_features and data.augment != "windows":
        raise ValueError("--cache-features needs fixed views: add --augment windows, or train without the cache")
    if data.cache_features and not data.cache_dir:
        raise ValueError("--cache-features needs a --cache-dir to keep the features in")
    data |= {key: value or [] for key, value in data.items() if key.endswith("_paths")}
    if evaluation.validate and not data.val_image_paths and not data.val_share:
        data.val_share = 0.1


def tested_config(checkpoint: dict, config: Config, given: set[str]) -> Config:
    """The checkpoint's config under the flags that are `given`, class names and colours also in the checkpoint;
    ValueError for a flag that would make it another network."""
    stored = checkpoint["config"]
    for key in config.model:
        if key in given and key != "backbone_weights" and config.model[key] != stored["model"][key]:
            raise ValueError(f"--{key.replace('_', '-')} {config.model[key]}: the checkpoint has "
                             f"{stored['model'][key]}, and a trained network cannot be changed; leave the flag out")
    for section in ("data", "evaluation", "model"):
        stored[section] |= {key: config[section][key] for key in config[section] if key in given}
    if "classes" in given:
        names, colors = read_classes(config.data.classes, stored["data"]["num_classes"])
        checkpoint |= {"class_names": names, "palette": colors.tolist()}
    return Config(stored)


def tested_split(run: Run, config: Config, given: set[str]) -> tuple[str, SegmentationDataset]:
    """What --test-only scores: the test split, or validation where there is none or it alone is among the flags that
    are `given`."""
    asked_for_val = "val_image_paths" in given and "test_image_paths" not in given
    split = "test" if has_test_photos(config) and not asked_for_val else "val"
    return split, build_dataset(config, split, num_workers=run.args.num_workers)


def score_checkpoint(run: Run, config: Config, given: set[str], check_config: Callable, load_model: Callable) -> dict:
    """--test-only: score the run's checkpoint by its own settings under the flags that are `given`; check_config and
    load_model are the script's."""
    config = tested_config(run.checkpoint, config, given)
    check_config(config)
    run.checkpoint["config"] = config.to_dict()
    split, dataset = tested_split(run, config, given)           # before a network is loaded
    return score_split(run, load_model(run.checkpoint, run.device), split, dataset, run.resume_path)


def score_split(run: Run, model: nn.Module, split: str, dataset: SegmentationDataset, source: object) -> dict:
    """--test-only: print the scores of the model from the file `source`; returns the single numbers."""
    result = evaluate_photos(model, dataset, run.device, run.amp_dtype, num_workers=run.args.num_workers,
                             limit_batches=run.args.limit_batches)
    run.report(*dataset.notes, f"{source} on the {split} split:", metrics_table(result["metrics"], model.class_names))
    return headline(result)


def has_test_photos(config: Config) -> bool:
    return bool(config.data.test_image_paths)


def evaluation_view(config: Config) -> View:
    size = config.data.image_size if config.evaluation.eval_size is None else config.evaluation.eval_size
    window = size or config.data.image_size
    mode = config.evaluation.eval_mode
    stride = -(-2 * window // 3) if config.evaluation.eval_stride is None else config.evaluation.eval_stride
    return View(size or None, None if mode == "whole" else window, None if mode == "even" else stride,
                TTA_SCALES if config.evaluation.tta else (1.0,), config.evaluation.tta)


# -- data and backbone -------------------------------------------------------------------------------------------------

def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None, label_dir: str | None = None,
                  num_workers: int = 2) -> SegmentationDataset:
    """The training views, or whole photographs of val, test or `data_dir` with masks in `label_dir`."""
    if data_dir is not None:
        return checked_dataset(config.data, given_pairs(data_dir, label_dir, config.data), num_workers)[0]
    pairs = split_pairs(config.data, split)
    if split != "train":
        return checked_dataset(config.data, pairs, num_workers)[0]
    crops = config.data.augment == "crops"
    return checked_dataset(config.data, pairs, num_workers, seed, config.data.augment,
                           Augmentation() if crops else None)[0]


def open_data(run: Run, config: Config, build_dataset: Callable) -> tuple:
    """Class names, palette (C, 3), training and validation set (None without --validate) of a run, with the script's
    build_dataset. Every file is checked before the first step, by rank 0, and remembered."""
    class_names, palette = read_classes(config.data.classes, config.data.num_classes, config.data.label_map)
    val_set = None
    with main_first():
        train_set = build_dataset(config, "train", run.args.seed, num_workers=run.args.num_workers)
        if config.evaluation.validate:
            val_set = build_dataset(config, "val", num_workers=run.args.num_workers)
    run.messages += training_doubts(class_names, train_set, val_set, config.data)
    run.check_data(train=train_set, val=val_set)
    return class_names, palette, train_set, val_set


def open_backbone(model: Mapping, entry: Mapping | None = None, seed: int = 0, taps: Sequence[int] | None = None,
                  prefix: bool = False) -> tuple[FrozenBackbone, str]:
    """The backbone that the flags of the section `model` name, and a line that says what it is. With a checkpoint's
    `entry`: the one in there, from where it was or from another place that --backbone-weights names. taps, prefix:
    which blocks it returns, default those of the adapter, and whether all their tokens, see FrozenBackbone. Raises as
    load_backbone and restore_backbone; ValueError without --backbone-weights."""
    weights = model["backbone_weights"]
    if entry is not None:
        backbone = restore_backbone(entry, None if weights in ("random", None, entry["file"]) else weights)
        message = f"frozen backbone as before: {entry['file'] or 'randomly initialised'}"
    elif weights is None:
        raise ValueError("--backbone-weights is missing: name the official .pth file, a Hugging Face file or folder, "
                         "or a URL; `random` tries the machinery on an untrained backbone")
    else:
        backbone, message = load_backbone(model["backbone"], None if weights == "random" else weights, seed,
                                          model["normalization"])
    if taps is not None:
        stored = backbone.entry.setdefault("taps", list(taps))
        if stored != list(taps):
            raise ValueError(f"the head was trained on the blocks {stored} of the backbone, not on {list(taps)}, and "
                             f"would give wrong numbers on these without a word; leave the setting out")
        backbone.taps = tuple(taps)
    backbone.prefix = prefix
    return backbone, message


def open_features(run: Run, config: Config, train_set: SegmentationDataset, taps: Sequence[int] | None = None,
                  prefix: bool = False) -> tuple[FrozenBackbone, SegmentationDataset | CachedTaps]:
    """The frozen backbone of a run on its device (a resumed one: that of the checkpoint), see open_backbone, and the
    training set, with --cache-features with the backbone's features in its items."""
    entry = run.checkpoint["encoder"] if run.checkpoint else None
    backbone, message = open_backbone(config.model, entry, run.args.seed, taps, prefix)
    backbone.to(run.device, run.amp_dtype)
    run.messages.append(message)
    if config.data.cache_features:
        train_set, message = cache_features(train_set, backbone, run.device, run.amp_dtype, config.data.cache_dir,
                                            config.training.batch_size, run.args.num_workers)
        run.messages.append(message)
    return backbone, train_set


def cache_features(dataset: SegmentationDataset, backbone: FrozenBackbone, device: torch.device,
                   amp_dtype: torch.dtype | None, folder: str, batch_size: int,
                   num_workers: int) -> tuple[CachedTaps, str]:
    """The training set with the backbone's features in its items, see CachedTaps, and a line for the log."""
    key = (f"{backbone.sha256()} {backbone.taps} {backbone.mean} {backbone.std} {device.type} {amp_dtype}"
           f"{' all tokens' if backbone.prefix else ''}{reading_key(dataset)}")
    started = time.monotonic()
    with main_first():
        cached = CachedTaps(dataset, lambda image: backbone(backbone.normalize(image.to(device))), key, folder,
                            batch_size, num_workers)
    return cached, (f"cached features: {len(cached)} views {'read from' if cached.was_stored else 'embedded into'} "
                    f"{cached.path} ({cached.path.stat().st_size / 2**20:.0f} MiB) in {time.monotonic() - started:.1f} "
                    f"s; the backbone does not run again")


def reading_key(dataset: SegmentationDataset) -> str:
    """What cached features depend on besides the files: how they are read, "" where nothing is set."""
    limits, bands, _ = dataset.photos
    photos = "" if limits is None and bands is None else f" PhotoFormat(value_range={limits}, bands={bands})"
    return f"{photos}{dataset.masks.key()}{' colours' if dataset.masks.as_colors else ''}"


def prepare(batch: dict, backbone: FrozenBackbone, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """A batch on the device: normalised image (B, 3, S, S), taps (of the backbone, or from the cache), label."""
    image = backbone.normalize(batch["image"].to(device, non_blocking=True))                # (B, 3, S, S) float32
    taps = [tap.to(device, non_blocking=True) for tap in batch["taps"]] if "taps" in batch else backbone(image)
    return image, taps, batch["label"].to(device, non_blocking=True)


def build_schedule(optimizer: torch.optim.Optimizer, training: Mapping, total_steps: int, **more) -> LRScheduler:
    """The schedule that the flags of the section `training` name, down to 0; more: of build_scheduler."""
    warmup = min(round(training["warmup_epochs"] * total_steps / training["epochs"]), total_steps - 1)
    return build_scheduler(optimizer, training["scheduler"], total_steps, warmup, **{"min_lr": 0.0, **more})


def describe_data(train_set: SegmentationDataset | CachedTaps, val_set: SegmentationDataset | None) -> str:
    """A line for the log."""
    validation = 0 if val_set is None else len(val_set.files)
    line = f"{len(train_set.files)} training and {validation} validation images, {len(train_set)} views an epoch"
    if val_set is None:
        line += "\nno validation during training: --validate is not given, and no model_best.pth will be written"
    return line


# -- any network with scores(image) ------------------------------------------------------------------------------------

def attach(model: nn.Module, config: Config, class_names: list[str], palette: np.ndarray, *, masks: Mapping, view: View,
           normalize: Callable[[Tensor], Tensor], multiple: int = 1, refine: Callable | None = None,
           backbone: FrozenBackbone | None = None) -> None:
    """Give a network what scoring and labelling need besides its weights, as attributes of these names.

    palette (C, 3) uint8. masks: the section of config with ignore_label, label_map and what else says how files are
    read. normalize: image (B, 3, H, W) uint8 -> what the network takes. refine: see segment_image. backbone: a frozen
    one that `scores` runs.
    """
    model.config = config
    model.class_names = class_names
    model.palette = palette
    model.masks = masks
    model.max_pixels = masks.get("max_pixels")
    model.view = view
    model.normalize = normalize
    model.multiple = multiple
    model.refine = refine
    model.backbone = backbone


def attach_backbone(model: nn.Module, backbone: FrozenBackbone, config: Config, class_names: list[str],
                    palette: Sequence, multiple: int) -> None:
    """`attach` for a network whose `scores` runs a frozen backbone; palette (C, 3): array, or list of a checkpoint."""
    attach(model, config, class_names, np.array(palette, np.uint8), masks=config.data, view=evaluation_view(config),
           normalize=backbone.normalize, multiple=multiple, backbone=backbone)


def score_function(model: nn.Module, device: torch.device, amp_dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """image (B, 3, h, w) normalised, any size -> scores (B, C, h, w) float32."""
    if model.backbone is not None:
        model.backbone.to(device, amp_dtype)

    def score(image):
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, model.multiple)
        with autocast(device, amp_dtype, image.shape[-1]):
            return model.scores(image).float()[..., :height, :width]
    return score


def evaluate_photos(model: nn.Module, dataset: SegmentationDataset, device: torch.device | None = None,
                    amp_dtype: torch.dtype | None = None, batch_size: int = 4, num_workers: int = 0,
                    limit_batches: int = 0) -> dict:
    """Score every labelled pixel once; used in training, by --test-only and by evaluate.py. See evaluate_images."""
    model = unwrap(model).eval()
    device = device or next(model.parameters()).device
    return evaluate_images(score_function(model, device, amp_dtype), model.normalize, dataset, len(model.class_names),
                           model.view, device, batch_size, num_workers, limit_batches, model.refine)


def label_photo(model: nn.Module, path: str | Path, amp_dtype: torch.dtype | None = None) -> dict:
    """Label a photograph: label (H, W) and confidence (H, W), see segment_image, at its own size (as displayed: an EXIF
    orientation is applied), photo, the photograph itself as a data.photos.Photo, and doubts, warnings of what may be
    read wrongly. Files of more than model.max_pixels are refused."""
    device = next(model.parameters()).device
    photos = photo_format(model.masks)._replace(max_pixels=model.max_pixels)
    photo = open_photo(path, exif=True, photos=photos)
    result = segment_image(score_function(model, device, amp_dtype), model.normalize, photo_rows(photo, device),
                           model.view, refine=model.refine)
    return {"label": result["label"], "confidence": result["confidence"], "photo": photo,
            "doubts": photo_doubts(path, photos)}


def write_photo_label(model: nn.Module, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in the numbers of the training masks, an overlay, the
    frozen backbone's features as colours."""
    features = cells = None
    if options.pca:
        device = next(model.parameters()).device
        photo = prediction["photo"].image()
        height, width = resized_shape(photo.height, photo.width, model.view.size)  # not larger than the network sees it
        image = torch.from_numpy(np.array(photo.resize((width, height)))).permute(2, 0, 1)[None].to(device)
        image = pad_to_multiple(model.normalize(image), model.backbone.multiple)
        features = model.backbone.last_map(image)[0].float().cpu().numpy()                  # (D, h, w)
        cells = (width / model.backbone.patch_size, height / model.backbone.patch_size)
    return write_image_result(stem, prediction, model.palette, options.labels, options.picture,
                              model.masks.ignore_label, model.masks.reduce_zero_label, features, cells,
                              label_map_of(model.masks), options.confidence)


def photo_pictures(model: nn.Module, dataset: SegmentationDataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction, over the photograph."""
    return example_pair(dataset, index, pred, model.palette)
