"""Semantic segmentation of point clouds on Sonata (Point Transformer V3): linear probe, decoder, full fine-tuning.

    python train_sonata.py configs/sonata/semseg-sonata-v1m1-0a-scannet-lin.yaml --pretrained_path sonata.pth
    python train_sonata.py CONFIG --pretrained_path sonata.pth --device cpu --limit-batches 2        # smoke run
    python train_sonata.py CONFIG model.mode=ft training.use_pretrained=false                    # from scratch
    torchrun --nproc_per_node=4 train_sonata.py CONFIG --pretrained_path sonata.pth              # several GPUs
    python train_sonata.py CONFIG --resume auto                                                  # go on, bit for bit
    python train_sonata.py CONFIG --resume exp/sonata/model/model_best.pth --test-only              # precise test

Wu et al. 2025 (Sonata, arXiv 2503.16429), as released in Pointcept, in plain PyTorch. model.mode: lin trains a linear
head on the frozen encoder's features, dec a decoder on them, ft everything. Validation is scored on raw points; the
precise test votes over 13 views and all fragments. All keys are in DEFAULTS, `section.key=value` changes one. What to
expect, every number logged and every deviation from upstream: docs/sonata.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from data.point_classes import BENCHMARKS
from data.point_results import example_clouds, write_point_result
from data.point_transforms import PointAugmentation
from data.points import (
    ClassList,
    PointDataset,
    PointSpec,
    PreciseTest,
    collate_points,
    complete,
    evaluation_sample,
    find_clouds,
    is_cloud,
    read_classes,
    read_cloud,
    to_cloud,
)
from models.point_transformer import MODES, SonataSegmenter, build_segmenter, upcast
from models.sonata_weights import guess_config, load_sonata, read_linear_head, read_sonata
from utils.checkpoint import CheckpointKeeper, RunFolder, check_writable, find_resume, load_checkpoint
from utils.checks import check_names, check_positive, check_range
from utils.cli import ArgumentParser, StopRequested, StopSignal, run
from utils.config import Config, Required, Setting, load_config
from utils.device import amp_settings, autocast, describe, pick_device, trim_memory
from utils.distributed import (
    EpochBatchSampler,
    all_agree_max,
    all_reduce_sum,
    barrier,
    cleanup,
    init_distributed,
    is_main,
    shard_indices,
    unwrap,
    world_size,
)
from utils.distributed import (
    rank as this_rank,
)
from utils.log import RunLog, progress
from utils.losses import MaskedCrossEntropyLoss, lovasz_softmax_loss
from utils.metrics import ConfusionMatrix, absent_as_zero, metrics_table, miou_of_each, segmentation_metrics
from utils.render import palette, pca_colors
from utils.schedule import build_scheduler
from utils.seed import seed_everything, seed_worker
from utils.training import (
    EpochTotals,
    check_same_run,
    micro_steps,
    optimizer_step,
    restore_rng,
    rng_entries,
    write_run_files,
)
from utils.weights import load_weights, sha256_file

SCRIPT = Path(__file__).name
RESULTS = {"labels": ("npy", "txt"), "picture": ("ply", "none"), "html": False}         # for predict.py, default first
OFFICIAL = "all classes, absent ones as 0 (the official mean)"
AT_LEAST = {0: ("training.clip_grad", "optimizer.weight_decay", "checkpointing.save_interval"),
            1: ("model.num_classes", "training.epochs", "training.eval_epochs", "training.batch_size",
                "training.accumulation_steps", "evaluation.interval", "logging.log_interval")}
FREE_ON_RESUME = ("training.resume", "training.use_pretrained")                         # steps are compared as well

DEFAULTS = {
    "paths": {
        "checkpoint_pretrain": Setting(None, (str,)),       # the same as --pretrained_path
        "head": Setting(None, (str,)),                      # start from a released linear head
        "checkpoint_dir": Setting(None, (str,)),            # default OUTPUT_DIR/model
        "log_dir": Setting(None, (str,)),                   # default OUTPUT_DIR/log
        "cache_dir": Setting(".cache/points", (str, type(None))),       # estimated normals
    },
    "data": {
        "root": Required((str,)),
        "train": Setting("train", (str, list)),             # folder(s) of root, key(s) of root/splits.json, or a .json
        "val": Setting("val", (str, list)),
        "test": Setting(None, (str, list)),                 # read by --test-only and evaluate.py; None: val
        "benchmark": Setting(None, (str,), tuple(BENCHMARKS)),           # class names and label file; or:
        "label_field": Setting(None, (str,)),
        "class_names": [],                                  # else from root/classes.json
        "ignore_labels": [-1],                              # besides those in root/classes.json
        "grid_size": 0.02,                                  # metres
        "unit": 1.0,                                        # metres of one length unit of the files
        "features": ["coord", "color", "normal"],
        "missing_normal": Setting("estimate", (str,), ("estimate", "zeros", "error")),
        "missing_color": Setting("zeros", (str,), ("zeros", "error")),
        "test_grid_size": Setting(None, (float,)),          # S3DIS: 0.01
    },
    "model": {
        "mode": Setting("lin", (str,), MODES),
        "num_classes": Required((int,)),
        "frozen_eval": False,                               # true: no drop path in a frozen encoder; upstream has it
        "encoder": {},                                      # the network's arguments, over those in the weights' file
    },
    "training": {
        "epochs": 800,                                      # passes over the training clouds
        "eval_epochs": 100,                                 # pieces they are done in, each ending with a validation
        "batch_size": 24,                                   # clouds of all processes together
        "accumulation_steps": 1,                            # Lovasz and Mix3D see one micro-batch: not the big batch
        "clip_grad": 3.0,
        "use_pretrained": Setting(None, (bool,)),           # false: a random encoder, in lin and dec a frozen one
        "resume": False,                                    # the same as --resume auto
    },
    "optimizer": {"lr": 0.002, "block_lr": 0.0002, "weight_decay": 0.02},
    "scheduler": {"pct_start": 0.05, "div_factor": 10.0, "final_div_factor": 1000.0},
    "augmentation": {                                       # of data/point_transforms.py's PointAugmentation
        **{name: list(value) if isinstance(value, tuple) else value
           for name, value in asdict(PointAugmentation()).items()},
        "elastic": [list(step) for step in PointAugmentation().elastic],
        "crop_share": Setting(None, (float,)),
        "crop_points": Setting(102_400, (int, type(None))),
    },
    "evaluation": {"interval": 1, "precise": True},         # precise: 13 views in --test-only, evaluate.py, predict.py
    "checkpointing": {"save_interval": 10},
    "logging": {"log_interval": 10, "tensorboard": True},
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    # data
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--num-workers", type=int, default=4, help="loader processes; 0 loads in the main process")
    # model
    parser.add_argument("--pretrained_path", help="sonata.pth, sonata_small.pth, a pre-training or a downstream run")
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
    for key in ("lr", "block_lr"):
        check_positive(f"optimizer.{key}", config.optimizer[key])
    point_spec(config), augmentation(config)
    if config.training.epochs % config.training.eval_epochs:
        raise ValueError(f"training.epochs={config.training.epochs} is no multiple of training.eval_epochs="
                         f"{config.training.eval_epochs}, the pieces that end with a validation")
    names = check_names("data.class_names", class_names(config))
    if len(names) != config.model.num_classes:
        raise ValueError(f"{len(names)} class names for model.num_classes={config.model.num_classes}; correct "
                         f"data.class_names, data.benchmark or model.num_classes")


def point_spec(config: Config) -> PointSpec:
    data = config.data
    return PointSpec(data.grid_size, data.unit, tuple(data.features), data.missing_normal, data.missing_color,
                     data.test_grid_size)


def augmentation(config: Config) -> PointAugmentation:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.augmentation.items()}
    return PointAugmentation(**{**values, "elastic": tuple(tuple(step) for step in config.augmentation.elastic)})


def class_names(config: Config) -> list[str]:
    if config.data.class_names or config.data.benchmark:
        return list(config.data.class_names) or list(BENCHMARKS[config.data.benchmark].names)
    listed = class_list(config)
    return [f"class {c}" for c in range(config.model.num_classes)] if listed is None else list(listed.names)


def class_list(config: Config) -> ClassList | None:
    path = Path(config.data.root) / "classes.json"
    return read_classes(path) if path.is_file() else None


def class_colors(config: Config) -> np.ndarray:
    listed, C = class_list(config), config.model.num_classes
    return palette(C) if listed is None or listed.palette is None or len(listed.names) != C else listed.palette


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None) -> PointDataset:
    """split train | val | test, or the clouds of `data_dir`, which hold their labels. All but "train" are whole."""
    data = config.data
    if label_dir is not None:
        raise ValueError("--label-dir: clouds hold their labels themselves; leave it out")
    if data_dir is not None:
        files = list_inputs(data_dir)
    else:
        if data[split] is None:
            raise ValueError("data.test names no clouds; set data.test=SPLIT, or score the val split")
        files = find_clouds(data.root, data[split])
    field = data.label_field or (BENCHMARKS[data.benchmark].field if data.benchmark else None)
    train, listed = split == "train" and data_dir is None, class_list(config)
    ignored = sorted({*data.ignore_labels, *(listed.ignore_labels if listed else ())})
    return PointDataset(files, point_spec(config), config.model.num_classes, augmentation(config) if train else None,
                        field, tuple(ignored), config.paths.cache_dir, seed,
                        config.training.epochs // config.training.eval_epochs if train else 1, f"{split} clouds")


def build_model(config: Config, encoder_config: dict) -> SonataSegmenter:
    """encoder_config: the network's arguments as sonata.pth stores them."""
    return build_segmenter(encoder_config, config.model.num_classes, config.model.mode, config.model.frozen_eval)


def open_encoder(config: Config) -> tuple[dict, dict | None]:
    """(the network's arguments, the `encoder` entry of checkpoints or None) of the file in paths.checkpoint_pretrain,
    under model.encoder; without a file model.encoder is all there is. Raises ValueError."""
    path, given = config.paths.checkpoint_pretrain, config.model.encoder.to_dict()
    if config.training.use_pretrained is False or path is None:
        if config.training.use_pretrained or (config.model.mode != "ft" and config.training.use_pretrained is None):
            raise ValueError(f"model.mode={config.model.mode} needs --pretrained_path FILE (sonata.pth); "
                             f"training.use_pretrained=false takes a random encoder, to compare with")
        if not given:
            raise ValueError("without --pretrained_path the size of the network must be given: set model.encoder")
        arguments, entry = given, None
    else:
        found = read_sonata(path)
        stored = found.config or guess_config(found.state, path)
        if stored.get("enc_mode"):                          # an encoder alone: its dec_ keys describe nothing
            stored = {key: value for key, value in stored.items() if not key.startswith("dec_")}
        arguments = {**stored, **given}
        entry = {"name": "PointTransformerV3", "file": str(path), "sha256": sha256_file(path), "config": arguments}
    channels = 3 * len(config.data.features)
    if arguments.get("in_channels", channels) != channels:
        raise ValueError(f"data.features={config.data.features} are {channels} channels, the encoder takes "
                         f"{arguments['in_channels']} (in_channels{f' in {path}' if entry else ' of model.encoder'})")
    return arguments, entry


def parameter_groups(model: SonataSegmenter, config: Config) -> list[dict]:
    """Two rates: parameters of the blocks, and the rest. Decay for all, as upstream. The frozen are in neither."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [{"params": [p for name, p in trained if ("block" in name) == blocks], "name": "block" if blocks else
               "rest", "lr": config.optimizer.block_lr if blocks else config.optimizer.lr} for blocks in (False, True)]
    return [group for group in groups if group["params"]]


def frozen_names(model: SonataSegmenter) -> set[str]:
    frozen = {id(parameter) for module in model.frozen() for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in frozen}


def compute_loss(criterion, logits, label, weight, share) -> torch.Tensor:
    """Cross entropy over the labelled voxels of the whole step (their number is `weight`) plus Lovasz-softmax of this
    micro-batch, which counts with its `share` of the step."""
    total, _ = criterion.sum_and_weight(logits, label)
    return total / weight.clamp(min=1) + share * lovasz_softmax_loss(logits, label)


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


# -- one epoch, one evaluation -----------------------------------------------------------------------------------------

def train_one_epoch(model, loader, criterion, optimizer, scheduler, scaler, totals, state, config, args, device,
                    amp_dtype, log, stop):
    """Steps of one epoch from state["batch"] on. totals collects loss and predictions; returns False if stopped."""
    model.train()
    world, accumulate, micro_batches = world_size(), config.training.accumulation_steps, []
    remaining = len(loader.batch_sampler) - state["batch"]
    if args.limit_batches and state["batch"] >= args.limit_batches:              # stopped right there, and resumed
        return True
    for batch in loader:
        remaining -= 1
        micro_batches.append(batch)
        if len(micro_batches) < accumulate and remaining:
            continue
        weight = all_reduce_sum(sum(criterion.label_weight(b["label"]) for b in micro_batches).to(device))
        loss_sum = torch.zeros((), device=device)
        for batch in micro_steps(model, micro_batches):
            batch = to_device(batch, device)
            with autocast(device, amp_dtype):
                logits = model(batch)                                            # (N, C) float32
            loss = compute_loss(criterion, logits, batch["label"], weight, 1 / (world * len(micro_batches)))
            scaler.scale(loss * world).backward()                                # DDP takes the mean over the ranks
            loss_sum += loss.detach()
            totals.matrix.update(logits.argmax(-1), batch["label"])
        optimizer_step(optimizer, scheduler, scaler, config.training.clip_grad)
        totals.add(loss_sum, torch.ones(()))
        state["step"] += 1
        state["batch"] += len(micro_batches)
        micro_batches = []
        if state["step"] % config.logging.log_interval == 0:
            trim_memory()
            mean = float(all_reduce_sum(loss_sum))
            if not np.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {state['step']} (learning rate "
                                         f"{scheduler.get_last_lr()[0]:.2e}); lower optimizer.lr or use --amp-dtype "
                                         f"float32; {args.output_dir} holds the last good checkpoint")
            log.train_step(state["step"], loss=mean, lr=scheduler.get_last_lr()[0])
        if all_agree_max(stop.requested or 0):
            return False
        if args.limit_batches and state["batch"] >= args.limit_batches:
            break
    return True


def fixed_orders(model: SonataSegmenter, index: int) -> torch.Tensor:
    """The permutations of the serialisation orders for cloud `index`: drawn as upstream draws them, but the same in
    every evaluation."""
    stages, orders = len(model.backbone.enc_channels), len(model.backbone.order)
    if not model.backbone.shuffle_orders:
        return torch.arange(orders).repeat(stages, 1)
    generator = torch.Generator().manual_seed(index)
    return torch.stack([torch.randperm(orders, generator=generator) for _ in range(stages)])


@torch.no_grad()
def label_cloud(model: SonataSegmenter, cloud: dict | None, precise: bool, index: int = 0, sample: dict | None = None):
    """A raw cloud -> (label (R,) int64, its mean probability (R,), the voxels' logits of the single view).

    precise: votes of 13 views and all their fragments; else one view, one point a voxel, copied to the voxel's points;
    `sample` is then evaluation_sample(cloud), where that is done. In float32 without autocast, as upstream.
    """
    device, orders = next(model.parameters()).device, fixed_orders(model, index)
    if precise:
        test = PreciseTest(cloud, model.spec, model.num_classes)
        for batch in test:
            test.add(batch, model(to_device(batch, device), orders))
        share = (test.votes / test.votes.sum(1, keepdim=True)).max(1).values.cpu()
        return test.prediction(), share if test.inverse is None else share[test.inverse], None
    sample = evaluation_sample(cloud, model.spec) if sample is None else sample
    batch = collate_points([sample])
    logits = model(to_device(batch, device), orders).cpu()
    confidence, label = logits.softmax(1).max(1)
    return label[sample["inverse"]], confidence[sample["inverse"]], logits


def only_item(items: list) -> dict:
    return items[0]


@torch.no_grad()
def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=1, num_workers=0, limit_batches=0,
             criterion=None, precise=None) -> dict:
    """Score every labelled raw point exactly once; used in training, by --test-only and by evaluate.py.

    precise None: as evaluation.precise says. Returns metrics (means over the classes that occur), tables {OFFICIAL:
    means over all classes, absent ones 0}, loss (per labelled voxel of the single view, NaN for the precise test),
    matrix, examples, predictions {index: (R,)} of this process, and seconds.
    """
    started, model = time.monotonic(), unwrap(model).eval()
    precise, C = model.config.evaluation.precise if precise is None else precise, model.num_classes
    criterion, confusion = MaskedCrossEntropyLoss(), ConfusionMatrix(C)
    mine = list(shard_indices(len(dataset.files), this_rank(), world_size()))
    mine = mine[:limit_batches] if limit_batches else mine
    loader = mine if precise else DataLoader(Subset(dataset, mine), 1, collate_fn=only_item, num_workers=num_workers,
                                             worker_init_fn=seed_worker, generator=torch.Generator())
    examples, predictions, loss, weight = [], {}, 0.0, 0.0
    for index, item in zip(mine, progress(loader, "evaluating"), strict=True):
        if precise:
            cloud = dataset.cloud(index)
            (label, _, _), truth = label_cloud(model, cloud, True, index), torch.from_numpy(cloud["label"])
        else:
            (label, _, logits), truth = label_cloud(model, None, False, index, item), item["raw_label"]
            part = criterion.sum_and_weight(logits, item["label"])
            loss, weight = loss + float(part[0]), weight + float(part[1])
        before = 0 if confusion.counts is None else confusion.counts
        confusion.update(label, truth)
        own, file = (confusion.counts - before).numpy(), dataset.files[index]
        examples.append((index, file.name if file.is_dir() else file.stem, float(miou_of_each(own[None])[0])))
        predictions[index] = label.numpy().astype(np.int16)
    matrix = confusion.all_reduce().matrix()
    metrics = segmentation_metrics(matrix)
    official = {**metrics, "miou": absent_as_zero(metrics["iou"]), "mean_f1": absent_as_zero(metrics["f1"]),
                "mean_accuracy": absent_as_zero(metrics["accuracy"])}
    weight = all_reduce_sum(weight)
    return {"metrics": metrics, "tables": {OFFICIAL: official},
            "loss": all_reduce_sum(loss) / weight if weight else float("nan"), "matrix": matrix, "examples": examples,
            "predictions": predictions, "seconds": time.monotonic() - started}


def log_epoch(log: RunLog, state: dict, train: dict, result: dict | None, seconds: float) -> None:
    """An epoch on the console, in log.jsonl and in TensorBoard; result None: an epoch without evaluation."""
    line = (f"Epoch {state['epoch']}: Train Loss: {train['loss']:.4f}, Train Acc: {train['overall_accuracy']:.4f}, "
            f"Train mIoU: {train['miou']:.4f}")
    log.evaluation(state["epoch"], state["step"], "train", train)
    if result is not None:
        val, official = result["metrics"], result["tables"][OFFICIAL]
        line += (f"\n          Val mIoU: {official['miou']:.4f} (present classes {val['miou']:.4f}), Val mAcc: "
                 f"{official['mean_accuracy']:.4f}, Val Acc: {val['overall_accuracy']:.4f}, Val Loss: "
                 f"{result['loss']:.4f} (evaluation {result['seconds']:.2f} s)")
        log.evaluation(state["epoch"], state["step"], "val", {
            **val, "loss": result["loss"], "official_miou": official["miou"]})
    log.info(f"{line} ({seconds:.2f} s)")


# -- what evaluate.py and predict.py call ------------------------------------------------------------------------------

def list_inputs(folder: str | Path) -> list[Path]:
    """The clouds of a folder, or the folder itself where it is one (Pointcept's layout)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = [folder] if is_cloud(folder) else sorted(path for path in folder.iterdir() if is_cloud(path))
    if not files:
        raise ValueError(f"{folder}: no clouds in this folder")
    return files


def has_test_split(config: Config) -> bool:
    return config.data.test is not None


def attach(model: SonataSegmenter, config: Config, names, colors) -> None:
    """What evaluation needs besides the weights."""
    model.config, model.spec, model.class_names, model.palette = config, point_spec(config), names, colors


def load_model(checkpoint: dict, device: torch.device) -> SonataSegmenter:
    """The network of a checkpoint of this script in eval mode. A frozen encoder comes from the file it was read from,
    or from paths.checkpoint_pretrain where that has moved; ValueError where its content is another."""
    config, entry = Config(checkpoint["config"]), checkpoint["encoder"]
    model = build_model(config, entry["config"])
    fill_model(model, config, checkpoint, "the checkpoint")
    attach(model, config, checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


def fill_model(model: SonataSegmenter, config: Config, checkpoint: dict, source) -> str:
    """Load a checkpoint into the model, with the frozen encoder that is not in it; returns a line for the log."""
    entry, own, lines = checkpoint["encoder"], model.state_dict(), []
    missing = [name for name in own if name not in checkpoint["model"]]
    if missing and set(missing) != frozen_names(model):
        raise ValueError(f"{source}: {len(missing)} tensors are missing ({missing[0]}, ...); is it of this mode?")
    if missing:
        path = config.paths.checkpoint_pretrain or entry["file"]
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file, but the frozen encoder comes from it; name its new place: "
                                    f"paths.checkpoint_pretrain=FILE (or --pretrained_path)")
        if sha256_file(path) != entry["sha256"]:
            raise ValueError(f"{path}: not the encoder of {source} (its content differs); name the file of the run: "
                             f"paths.checkpoint_pretrain=FILE")
        lines.append(load_sonata(model.backbone, path))
        own = model.state_dict()
    lines.append(load_weights(model, {**{name: own[name] for name in missing}, **checkpoint["model"]}, source,
                              what="model"))
    return "\n".join(lines)


def predict(model: SonataSegmenter, path: str | Path, amp_dtype=None) -> dict:
    """Label a cloud file: label (R,) int64 and confidence (R,) of every raw point in file order, and coord (R, 3)."""
    raw, missing = complete(read_cloud(path), model.spec, path, model.config.paths.cache_dir)
    for line in (*raw.warnings, *(f"{path}: no {name}s in the file" for name in missing)):
        print(line, flush=True)
    cloud = {name: value for name, value in to_cloud(raw, model.spec).items() if name != "label"}
    label, confidence, _ = label_cloud(model, cloud, model.config.evaluation.precise)
    return {"label": label.numpy(), "confidence": confidence.numpy(), "coord": raw.coord, "cloud": cloud}


def write_prediction(model: SonataSegmenter, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in file order, the coloured cloud, PCA colours."""
    colors = {"": model.palette[prediction["label"]]}
    if options.pca:
        sample = evaluation_sample(prediction["cloud"], model.spec)
        batch = to_device(collate_points([sample]), next(model.parameters()).device)
        with torch.no_grad():
            stages, restore = model.backbone.encode(batch, fixed_orders(model, 0))
            features = upcast(model.backbone.outputs(stages, restore)).float().cpu().numpy()
        colors["_pca"] = pca_colors(features)[sample["inverse"].numpy()]
    return write_point_result(stem, prediction, colors, options.labels, options.picture)


def example_pictures(model: SonataSegmenter, dataset: PointDataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction (R,) of one cloud."""
    return example_clouds(dataset.cloud(index), pred, model.palette)


# -- set-up and resume -------------------------------------------------------------------------------------------------

def prepare_model(config, encoder, checkpoint, resume_path, messages) -> tuple[SonataSegmenter, dict]:
    """The model and its `encoder` entry: from the resumed checkpoint, or else of `encoder` (open_encoder's), with
    pre-trained weights or from scratch."""
    if checkpoint is not None:
        model = build_model(config, checkpoint["encoder"]["config"])
        messages.append(fill_model(model, config, checkpoint, resume_path))
        return model, checkpoint["encoder"]
    arguments, entry = encoder
    model = build_model(config, arguments)
    if entry is not None:
        messages.append(load_sonata(model.backbone, entry["file"]))
    else:
        frozen = "" if config.model.mode == "ft" else ", and stays so: a baseline"
        messages.append(f"WARNING: the encoder is randomly initialised{frozen}")
    if config.paths.head is not None:
        messages.append(load_weights(model.seg_head, {name.removeprefix("seg_head."): value for name, value in
                                                      read_linear_head(config.paths.head).items()},
                                     config.paths.head, what="head"))
    return model, entry or {"name": "PointTransformerV3", "file": None, "sha256": None, "config": arguments}


def headline(result: dict) -> dict:
    """What main returns of an evaluation: the single numbers, the official mean and the loss."""
    return {**{key: value for key, value in result["metrics"].items() if isinstance(value, float)},
            "official_miou": result["tables"][OFFICIAL]["miou"], "loss": result["loss"]}


def test_only(args, config, checkpoint, path, device) -> dict:
    """The precise test (evaluation.precise) of a checkpoint on the test split, or on validation where there is none."""
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model",))
    checkpoint["config"] = config.to_dict()
    model = load_model(checkpoint, device)
    split = "test" if has_test_split(config) else "val"
    result = evaluate(model, build_dataset(config, split), device, num_workers=args.num_workers,
                      limit_batches=args.limit_batches)
    if is_main():
        official = result["tables"][OFFICIAL]
        print(f"{path} on the {split} split, {'precise test' if config.evaluation.precise else 'single view'}, raw "
              f"points; means over the classes that occur:\n{metrics_table(result['metrics'], model.class_names)}\n"
              f"over {OFFICIAL}: mIoU {100 * official['miou']:.2f}, mAcc {100 * official['mean_accuracy']:.2f}",
              flush=True)
    cleanup()
    return headline(result)


# -- main --------------------------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    check_range("--limit-batches", args.limit_batches, 0)
    check_range("--num-workers", args.num_workers, 0)
    config = load_config(args.config, DEFAULTS, args.overrides)
    check_config(config)
    if args.pretrained_path:
        if config.training.use_pretrained is False:
            raise ValueError(f"--pretrained_path {args.pretrained_path}, but training.use_pretrained=false would not "
                             f"read it; leave the flag out, or set training.use_pretrained=true")
        config.paths.checkpoint_pretrain = args.pretrained_path
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
        return test_only(args, config, checkpoint, resume_path, device)
    check_writable(folder.model, folder.log, folder.config)
    if config.training.batch_size % world:
        raise ValueError(f"training.batch_size={config.training.batch_size} clouds cannot be shared among {world} "
                         f"processes; take a multiple")

    encoder = open_encoder(config) if checkpoint is None else None          # a wrong file is told before all is read

    # data: rank 0 fills the cache of estimated normals, the others read it
    for turn in (True, False):
        if is_main() == turn:
            train_set, val_set = build_dataset(config, "train", args.seed), build_dataset(config, "val")
        barrier()
    if both := {*train_set.files} & {*val_set.files}:
        messages.append(f"WARNING: {len(both)} of {len(val_set.files)} validation clouds are in training too, such as "
                        f"{min(both)}: their score says nothing about new clouds")
    accumulate = config.training.accumulation_steps
    sampler = EpochBatchSampler(len(train_set), config.training.batch_size // world, args.seed, drop_last=True,
                                group=accumulate)
    batches = min(len(sampler), args.limit_batches or len(sampler))
    total_steps = config.training.eval_epochs * -(-batches // accumulate)
    if checkpoint is not None:
        check_same_run(checkpoint, config, total_steps, ("data", "model", "training", "optimizer", "scheduler",
                       "augmentation"), args.seed, FREE_ON_RESUME, batch_of_all_processes=True)

    # model
    model, encoder_entry = prepare_model(config, encoder, checkpoint, resume_path, messages)
    attach(model, config, class_names(config), class_colors(config))
    model.to(device)
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [local_rank] if device.type == "cuda" else None)
    left_out = frozen_names(model) if encoder_entry["file"] else set()          # not copied into every checkpoint

    # loss, optimiser, schedule
    criterion = MaskedCrossEntropyLoss().to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.optimizer.weight_decay)
    scheduler = build_scheduler(optimizer, "onecycle", total_steps, **config.scheduler)
    keeper = CheckpointKeeper(folder.model, 0, config.checkpointing.save_interval)
    state = {"epoch": 0, "batch": 0, "step": 0}             # epochs finished, batches of the next one, optimiser steps
    totals = EpochTotals(config.model.num_classes, device)

    # resume
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        keeper.load_state_dict(checkpoint["best"])
        state = {key: checkpoint[key] for key in state}
        totals.load_state_dict(checkpoint["totals"])
    restore_rng(checkpoint, args.seed, state["step"])

    def saved_state() -> dict:
        weights = {name: value for name, value in model.state_dict().items() if name not in left_out}
        return {"script": SCRIPT, "config": config.to_dict(), "class_names": model.class_names,
                "palette": model.palette.tolist(), "model": weights, "ema": None, "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(), "encoder": encoder_entry,
                "total_steps": total_steps, "seed": args.seed, "totals": totals.state_dict(), **rng_entries(), **state}

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
    sizes = [sum(p.numel() for p in model.parameters() if p.requires_grad >= wanted) for wanted in (False, True)]
    for line in (*train_set.messages, *val_set.messages, *messages,
                 f"{len(train_set.files)} training and {len(val_set.files)} validation clouds, "
                 f"{sum(train_set.num_points):,} and {sum(val_set.num_points):,} points",
                 f"mode {config.model.mode}: {sizes[0]:,} parameters, {sizes[1]:,} trained; "
                 f"{config.training.batch_size} clouds a step on {describe(device)}, seed {args.seed}"):
        log.info(line)

    if resume_path not in (None, folder.model / "model_last.pth"):          # what --resume auto goes on from
        save(saved_state(), None if state["batch"] else state["epoch"])
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=args.num_workers, worker_init_fn=seed_worker,
                        collate_fn=partial(collate_points, mix_probability=config.augmentation.mix_probability),
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    go_on = f"go on with: {shlex.join(['python', *sys.argv, '--resume', 'auto'])}"
    result = {}
    with StopSignal() as stop, log:
        while state["epoch"] < config.training.eval_epochs:
            started = time.monotonic()
            train_set.set_epoch(state["epoch"])
            sampler.set_epoch(state["epoch"], state["batch"])
            if not train_one_epoch(network, loader, criterion, optimizer, scheduler, scaler, totals, state, config,
                                   args, device, amp_dtype, log, stop):
                save(saved_state())
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped at step {state['step']} of {total_steps}, saved; {go_on}")
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            train, last = totals.metrics(), state["epoch"] == config.training.eval_epochs
            if state["epoch"] % config.evaluation.interval and not last:
                log_epoch(log, state, train, None, time.monotonic() - started)
                save(saved_state(), state["epoch"])
            else:
                result = evaluate(network, val_set, device, num_workers=args.num_workers,
                                  limit_batches=args.limit_batches, precise=False)
                log_epoch(log, state, train, result, time.monotonic() - started)
                score, snapshot = result["tables"][OFFICIAL]["miou"], saved_state()
                if is_main() and keeper.save_best_if(score, snapshot):
                    log.info(f"New best mIoU: {score:.4f}. Checkpoint saved.")
                save(snapshot, state["epoch"])
            if all_agree_max(stop.requested or 0) and not last:
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped after epoch {state['epoch']}, saved; {go_on}")
        best = "none" if keeper.best_score is None else f"{keeper.best_score:.4f} (epoch {keeper.best_epoch})"
        log.info(f"Best mIoU: {best}; checkpoints in {folder.model}; the precise test: python evaluate.py "
                 f"{folder.model / 'model_best.pth'}")
    cleanup()
    return {**(headline(result) if result else {}), "best": keeper.best_score, "best_epoch": keeper.best_epoch}


if __name__ == "__main__":
    run(main)
