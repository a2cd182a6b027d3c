"""What scripts that train a head on a frozen image backbone have in common and no reader of the method needs: their
flags checked, the backbone opened, its features kept, photographs scored and labelled.

config has the sections data, model, training and evaluation of such a script's flags. A model here is the trained part,
called with (image, taps), with `scores(image, taps)` -> (B, C, H, W), and with the attributes that the scripts' attach
gives it: backbone, config, palette, and multiple, of which the sides of an image must be multiples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.feature_cache import CachedTaps
from data.image_results import example_pair, write_image_result
from data.image_splits import checked_dataset, read_classes, split_pairs
from data.images import Augmentation, SegmentationDataset, read_image
from models.dinov3 import FrozenBackbone, backbone_name
from models.dinov3_weights import load_backbone, restore_backbone
from utils.checks import check_positive, check_range
from utils.config import Config
from utils.device import autocast
from utils.distributed import barrier, is_main
from utils.image_inference import TTA_SCALES, View, pad_to_multiple, resized_shape, segment_image

AT_LEAST = {"data.num_classes": 1, "data.image_size": 64, "training.epochs": 1, "training.batch_size": 1,
            "training.accumulate": 1, "training.warmup_epochs": 0, "training.clip_grad": 0, "training.weight_decay": 0,
            "training.save_interval": 0, "training.log_interval": 1, "evaluation.val_interval": 1}
FREE_ON_RESUME = ("training.batch_size", "training.log_interval", "training.save_interval", "model.backbone_weights",
                  "data.val_image_paths", "data.val_mask_paths", "data.test_image_paths", "data.test_mask_paths",
                  "data.classes", "data.cache_dir", "data.cache_features")                  # steps are compared as well


# -- settings ----------------------------------------------------------------------------------------------------------

def check_flags(config: Config, at_least: Mapping[str, float]) -> None:
    """Errors that can be seen in the flags alone, as ValueError; at_least: further {section.key: smallest value}.

    Changes config: the backbone's full name, lists of paths that are not given, the share of --validate.
    """
    data, evaluation = config.data, config.evaluation
    for name, lowest in {**AT_LEAST, **at_least}.items():
        section, key = name.split(".")
        check_range(f"--{key.replace('_', '-')}", config[section][key], lowest)
    check_range("--val-share", data.val_share, 0, 0.5)
    check_range("--ignore-label", data.ignore_label, 0, 255)
    check_positive("--lr", config.training.lr)
    if data.ignore_label < data.num_classes + data.reduce_zero_label:
        raise ValueError(f"--ignore-label {data.ignore_label} is one of the {data.num_classes} classes in the masks; "
                         f"for masks that mean unlabelled by 0, use --reduce-zero-label")
    view = evaluation_view(config)
    if (view.size or 32) < 32 or not 1 <= view.stride <= (view.window or view.stride):
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
    """The checkpoint's config under the flags that are `given`, also written back into the checkpoint; ValueError for a
    flag that would make it another network."""
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


def evaluation_view(config: Config) -> View:
    size = config.data.image_size if config.evaluation.eval_size is None else config.evaluation.eval_size
    window = size or config.data.image_size
    whole = config.evaluation.eval_mode == "whole"
    stride = -(-2 * window // 3) if config.evaluation.eval_stride is None else config.evaluation.eval_stride
    return View(size or None, None if whole else window, stride, TTA_SCALES if config.evaluation.tta else (1.0,),
                config.evaluation.tta)


# -- data and backbone -------------------------------------------------------------------------------------------------

def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None, label_dir: str | None = None,
                  num_workers: int = 2) -> SegmentationDataset:
    """The training views, or whole photographs of val, test or `data_dir` with masks in `label_dir`."""
    if data_dir is not None:
        if label_dir is None:
            raise ValueError("--label-dir is needed: the folder of the masks of --data-dir")
        pairs = split_pairs({**config.data, "val_image_paths": [data_dir], "val_mask_paths": [label_dir]}, "val")
        return checked_dataset(config.data, pairs, num_workers)[0]
    pairs = split_pairs(config.data, split)
    if split != "train":
        return checked_dataset(config.data, pairs, num_workers)[0]
    crops = config.data.augment == "crops"
    return checked_dataset(config.data, pairs, num_workers, seed, config.data.augment,
                           Augmentation() if crops else None)[0]


def open_backbone(model: Mapping, entry: Mapping | None = None, seed: int = 0) -> tuple[FrozenBackbone, str]:
    """The backbone that the flags of the section `model` name, and a line that says what it is. With a checkpoint's
    `entry`: the one in there, from where it was or from another place that --backbone-weights names. Raises as
    load_backbone and restore_backbone; ValueError without --backbone-weights."""
    weights = model["backbone_weights"]
    if entry is not None:
        return restore_backbone(entry, None if weights in ("random", None, entry["file"]) else weights), \
            f"frozen backbone as before: {entry['file'] or 'randomly initialised'}"
    if weights is None:
        raise ValueError("--backbone-weights is missing: name the official .pth file, a Hugging Face file or folder, "
                         "or a URL; `random` tries the machinery on an untrained backbone")
    return load_backbone(model["backbone"], None if weights == "random" else weights, seed, model["normalization"])


def cache_features(dataset: SegmentationDataset, backbone: FrozenBackbone, device: torch.device,
                   amp_dtype: torch.dtype | None, folder: str, batch_size: int,
                   num_workers: int) -> tuple[CachedTaps, str]:
    """The training set with the backbone's features in its items, see CachedTaps, and a line for the log."""
    key = f"{backbone.sha256()} {backbone.taps} {backbone.mean} {backbone.std} {device.type} {amp_dtype}"
    started = time.monotonic()
    for turn in (True, False):                              # rank 0 computes, the others read
        if is_main() == turn:
            cached = CachedTaps(dataset, lambda image: backbone(backbone.normalize(image.to(device))), key, folder,
                                batch_size, num_workers)
        barrier()
    return cached, (f"cached features: {len(cached)} views {'read from' if cached.was_stored else 'embedded into'} "
                    f"{cached.path} ({cached.path.stat().st_size / 2**20:.0f} MiB) in {time.monotonic() - started:.1f} "
                    f"s; the backbone does not run again")


def prepare(batch: dict, backbone: FrozenBackbone, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
    """A batch on the device: normalised image (B, 3, S, S), four feature maps (computed, or from the cache), label."""
    image = backbone.normalize(batch["image"].to(device, non_blocking=True))                # (B, 3, S, S) float32
    taps = [tap.to(device, non_blocking=True) for tap in batch["taps"]] if "taps" in batch else backbone(image)
    return image, taps, batch["label"].to(device, non_blocking=True)


# -- photographs -------------------------------------------------------------------------------------------------------

def score_function(model: nn.Module, device: torch.device, amp_dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """image (B, 3, h, w) normalised, any size -> scores (B, C, h, w) float32."""
    model.backbone.to(device, amp_dtype)

    def score(image):
        height, width = image.shape[-2:]
        image = pad_to_multiple(image, model.multiple)
        with autocast(device, amp_dtype):
            return model.scores(image, model.backbone(image))[..., :height, :width]
    return score


def label_photo(model: nn.Module, path: str | Path, amp_dtype: torch.dtype | None = None) -> dict:
    """Label a photograph: label (H, W) int64 and confidence (H, W) at its own size (as displayed: an EXIF orientation
    is applied), and the photograph itself."""
    device, photo = next(model.parameters()).device, read_image(path, exif=True)
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).to(device)                   # (3, H, W) uint8
    result = segment_image(score_function(model, device, amp_dtype), model.backbone.normalize, image,
                           evaluation_view(model.config))
    return {"label": result["label"].cpu().numpy(), "confidence": result["confidence"].cpu().numpy(), "photo": photo}


def write_files(model: nn.Module, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in the numbers of the training masks, an overlay."""
    taps = None
    if options.pca:
        device = next(model.parameters()).device
        photo, size = prediction["photo"], evaluation_view(model.config).size      # not larger than the network sees it
        height, width = resized_shape(photo.height, photo.width, size)
        image = torch.from_numpy(np.array(photo.resize((width, height)))).permute(2, 0, 1)[None].to(device)
        taps = model.backbone(pad_to_multiple(model.backbone.normalize(image), model.backbone.multiple))
    return write_image_result(stem, prediction, model.palette, options.labels, options.picture,
                              model.config.data.ignore_label, model.config.data.reduce_zero_label,
                              None if taps is None else taps[-1][0].float().cpu().numpy(), model.backbone.patch_size)


def report_pictures(model: nn.Module, dataset: SegmentationDataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction, over the photograph."""
    return example_pair(dataset, index, pred, model.palette)
