"""Mask2Former head on a frozen DINOv3 (or DINOv2): adapter, pixel decoder and masked-attention decoder are trained.

    python train_m2f_head.py --image-paths "train/images/*.jpg" --mask-paths "train/masks/*.png" --num-classes 150 \\
        --backbone dinov3_vitl16 --backbone-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth --validate
    python train_m2f_head.py ... --device cpu --limit-batches 2 --epochs 1                       # smoke run
    torchrun --nproc_per_node=4 train_m2f_head.py ...                                           # several GPUs
    python train_m2f_head.py ... --resume auto                                                  # go on, bit for bit
    python train_m2f_head.py --resume exp/m2f_head/model/model_best.pth --test-only              # score a checkpoint
    python train_m2f_head.py --test-only --backbone dinov3_vit7b16 --backbone-weights FILE.pth --hidden-dim 2048 \\
        --head-weights dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth --val-image-paths ... --val-mask-paths ... \\
        --reduce-zero-label --eval-size 896 --eval-stride 596 [--tta]                  # the released ADE20K head

Cheng et al. 2022 (Mask2Former) on the features of Simeoni et al. 2025 (DINOv3, section 6.3.2), which released a head
but no code to train one. Masks hold class ids, 255 is ignored. The backbone never changes and is not in the
checkpoints; their weights have the official names. Against train_upernet_head.py: queries matched to the classes of an
image instead of a class per pixel. Every number logged and every deviation from the papers: docs/dinov3_heads.md.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from data.frozen_backbone import (
    FREE_ON_RESUME,
    build_dataset,
    cache_features,
    check_flags,
    evaluation_view,
    label_photo,
    open_backbone,
    prepare,
    report_pictures,
    score_function,
    tested_config,
    write_files,
)
from data.image_splits import read_classes
from data.images import list_images
from models.dinov3 import FrozenBackbone
from models.dinov3_adapter import DINOv3_Adapter
from models.dinov3_weights import read_released_head
from models.mask2former import Mask2FormerHead, Mask2FormerSegmenter
from utils.checkpoint import CheckpointKeeper, RunFolder, check_writable, find_resume, load_checkpoint
from utils.checks import check_range
from utils.cli import ArgumentParser, StopRequested, StopSignal, flags_config, flags_defaults, given_flags, run
from utils.config import Config
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
from utils.image_inference import evaluate_images
from utils.log import RunLog
from utils.mask_losses import SetCriterion
from utils.metrics import metrics_table
from utils.params import split_decay
from utils.schedule import build_scheduler
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
RESULTS = {"labels": ("png", "npy"), "picture": ("png", "none"), "html": False}       # for predict.py, default first


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--image-paths", nargs="+", metavar="PATH", help="training images: files, folders or globs")
    data.add_argument("--mask-paths", nargs="+", metavar="PATH", help="their masks, of the same file names")
    data.add_argument("--val-image-paths", nargs="+", metavar="PATH", help="validation images")
    data.add_argument("--val-mask-paths", nargs="+", metavar="PATH")
    data.add_argument("--val-share", type=float, default=0.0, metavar="SHARE",
                      help="without --val-image-paths: share of the training images held out (0.1 with --validate)")
    data.add_argument("--test-image-paths", nargs="+", metavar="PATH", help="read by --test-only and evaluate.py alone")
    data.add_argument("--test-mask-paths", nargs="+", metavar="PATH")
    data.add_argument("--num-classes", type=int, default=150)
    data.add_argument("--classes", metavar="FILE", help='class names and colours: {"classes": [...], "palette": [...]}')
    data.add_argument("--ignore-label", type=int, default=255, help="the masks' value for unlabelled")
    data.add_argument("--reduce-zero-label", action="store_true", help="0 is unlabelled too, classes count from 1")
    data.add_argument("--image-size", type=int, default=512, help="side of a training crop, a multiple of 32")
    data.add_argument("--augment", choices=("crops", "windows"), default="crops",
                      help="crops: random scale, crop, flip, colours; windows: fixed views, every pixel once an epoch")
    data.add_argument("--cache-features", action="store_true", help="run the backbone once; needs --augment windows")
    data.add_argument("--cache-dir", default=".cache/images", help="file check and cached features; '' for no check")
    model = parser.add_argument_group("model")
    model.add_argument("--backbone", default="dinov3_vits16", help="dinov3_vits16 to dinov3_vit7b16, dinov2_vits14 ...")
    model.add_argument("--backbone-weights", metavar="FILE|URL|DIR|random",
                       help="official .pth, Hugging Face file or folder; random: untrained, to try the machinery")
    model.add_argument("--normalization", choices=("auto", "imagenet", "sat493m"), default="auto")
    model.add_argument("--hidden-dim", type=int, help="default: 256, for the 7B 2048")
    model.add_argument("--ffn-dim", type=int, default=4096)
    model.add_argument("--num-queries", type=int, default=100)
    model.add_argument("--head-weights", metavar="FILE", help="start from a released head, or score it (--test-only)")
    model.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=100)
    training.add_argument("--warmup-epochs", type=float, default=1.0)
    training.add_argument("--batch-size", type=int, default=8, help="images per process and micro-step")
    training.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-steps per optimiser step")
    training.add_argument("--lr", type=float, default=1e-4)
    training.add_argument("--weight-decay", type=float, default=0.05)
    training.add_argument("--scheduler", choices=("poly", "cosine", "constant"), default="poly")
    training.add_argument("--clip-grad", type=float, default=0.01, help="largest norm of the whole gradient; 0: none")
    training.add_argument("--num-points", type=int, default=12544, help="points a mask is compared at")
    training.add_argument("--ignore-in-mask-loss", action="store_true",
                          help="points on ignored pixels do not count (original: they are background)")
    training.add_argument("--log-interval", type=int, default=10, metavar="STEPS")
    training.add_argument("--save-interval", type=int, default=10, metavar="EPOCHS")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--validate", action="store_true", help="score after every --val-interval epochs")
    evaluation.add_argument("--val-interval", type=int, default=1, metavar="EPOCHS")
    evaluation.add_argument("--eval-mode", choices=("slide", "whole"), default="slide")
    evaluation.add_argument("--eval-size", type=int, help="short side; default: --image-size; 0: as it is")
    evaluation.add_argument("--eval-stride", type=int, help="of the sliding window; default: two thirds of it")
    evaluation.add_argument("--tta", action="store_true", help="average five scales and their mirror images")
    paths = parser.add_argument_group("paths")
    paths.add_argument("--checkpoint-dir", help="default: OUTPUT_DIR/model")
    paths.add_argument("--log-dir", help="default: OUTPUT_DIR/log")
    parser.add_argument("--num-workers", type=int, default=4, help="loader processes; 0 loads in the main process")
    parser.add_argument("--compile", action="store_true", help="torch.compile the trained part")
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

    parser.add_argument("--resume-checkpoint", dest="resume", metavar="PATH|auto", help="the same as --resume")
    return parser


DEFAULTS = flags_defaults(make_parser())


def parse_args(argv=None):
    return make_parser().parse_args(argv)


# -- the pieces of this method -----------------------------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that can be seen in the flags alone. Raises ValueError."""
    check_flags(config, {"model.num_queries": 1, "model.ffn_dim": 1, "training.num_points": 1})
    if config.model.hidden_dim is None:
        config.model.hidden_dim = 2048 if config.model.backbone == "dinov3_vit7b16" else 256
    if config.model.hidden_dim < 32 or config.model.hidden_dim % 32:
        raise ValueError(f"--hidden-dim {config.model.hidden_dim}: must be a multiple of 32")
    multiple = 224 if config.model.backbone.startswith("dinov2") else 32
    if config.data.image_size % multiple:
        raise ValueError(f"--image-size {config.data.image_size}: must be a multiple of {multiple} for "
                         f"{config.model.backbone} and the adapter")


def build_model(config: Config, embed_dim: int, patch_size: int) -> Mask2FormerSegmenter:
    adapter = DINOv3_Adapter(embed_dim, patch_size, gradient_checkpointing=config.model.gradient_checkpointing)
    head = Mask2FormerHead(embed_dim, config.data.num_classes, config.model.hidden_dim, config.model.num_queries,
                           ffn_dim=config.model.ffn_dim, gradient_checkpointing=config.model.gradient_checkpointing)
    return Mask2FormerSegmenter(adapter, head)


def build_criterion(config: Config) -> SetCriterion:
    return SetCriterion(config.data.num_classes, config.training.num_points,
                        ignore_in_mask_loss=config.training.ignore_in_mask_loss)


def compute_loss(criterion: SetCriterion, outputs: dict, label: torch.Tensor, normalizer: torch.Tensor) -> dict:
    """All terms and their weighted `total`; normalizer (2,) belongs to the whole step, whatever this micro-batch is."""
    return criterion.sums(outputs, label, normalizer)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no decay for norms, biases and embeddings. The backbone is not part of the model."""
    return torch.optim.AdamW(split_decay(model.named_parameters(), config.training.weight_decay), config.training.lr)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int):
    warmup = min(round(config.training.warmup_epochs * total_steps / config.training.epochs), total_steps - 1)
    return build_scheduler(optimizer, config.training.scheduler, total_steps, warmup, min_lr=0.0)


# -- one epoch, one evaluation -----------------------------------------------------------------------------------------

def train_one_epoch(model, backbone, loader, criterion, optimizer, scheduler, scaler, totals, state, config, args,
                    device, amp_dtype, log, stop):
    """Steps of one epoch from state["batch"] on. totals collects the loss terms; returns False if stopped."""
    model.train()
    world, accumulate, micro_batches = world_size(), config.training.accumulate, []
    remaining = len(loader.batch_sampler) - state["batch"]
    if args.limit_batches and state["batch"] >= args.limit_batches:              # stopped right there, and resumed
        return True
    for batch in loader:
        remaining -= 1
        micro_batches.append(batch)
        if len(micro_batches) < accumulate and remaining:
            continue
        # Numbers of masks and of queries are those of the step, whatever the number of micro-batches and processes.
        normalizer = all_reduce_sum(sum(criterion.label_weights(b["label"], config.model.num_queries)
                                        for b in micro_batches).to(device))
        terms = {}
        for batch in micro_steps(model, micro_batches):
            image, taps, label = prepare(batch, backbone, device)
            with autocast(device, amp_dtype):
                outputs = model(image, taps)                                     # (B, Q, C + 1), (B, Q, S/4, S/4), ...
            losses = compute_loss(criterion, outputs, label, normalizer)
            scaler.scale(losses["total"] * world).backward()                     # DDP takes the mean over the ranks
            for name in ("total", "class", "mask", "dice"):                      # of the last layer, but for the total
                value = losses["total"] if name == "total" else losses[f"{name}_0"]
                terms[name] = terms.get(name, 0.0) + value.detach()
        optimizer_step(optimizer, scheduler, scaler, config.training.clip_grad)
        state["step"] += 1
        state["batch"] += len(micro_batches)
        micro_batches = []
        totals.add(terms)
        if state["step"] % config.training.log_interval == 0:                    # the only place that waits for the GPU
            means = {name: float(all_reduce_sum(value)) for name, value in terms.items()}
            if not np.isfinite(means["total"]):
                raise FloatingPointError(f"the loss is {means['total']} at step {state['step']} (learning rate "
                                         f"{scheduler.get_last_lr()[-1]:.2e}); lower --lr or use --amp-dtype float32; "
                                         f"{args.output_dir} holds the last good checkpoint")
            log.train_step(state["step"], loss=means.pop("total"), **means, lr=scheduler.get_last_lr()[-1])
        if all_agree_max(stop.requested or 0):
            return False
        if args.limit_batches and state["batch"] >= args.limit_batches:
            break
    return True


def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=4, num_workers=0, limit_batches=0) -> dict:
    """Score every labelled pixel once; used in training, by --test-only and by evaluate.py. See evaluate_images."""
    model = unwrap(model).eval()
    device = device or next(model.parameters()).device
    return evaluate_images(score_function(model, device, amp_dtype), model.backbone.normalize, dataset,
                           model.config.data.num_classes, evaluation_view(model.config), device, batch_size,
                           num_workers, limit_batches)


def log_epoch(log: RunLog, state: dict, train: dict, result: dict | None, seconds: float) -> None:
    """An epoch on the console, in log.jsonl and in TensorBoard; result None: an epoch without evaluation."""
    line = (f"Epoch {state['epoch']}: Train Loss: {train['total']:.4f} (last layer: class {train['class']:.4f}, mask "
            f"{train['mask']:.4f}, dice {train['dice']:.4f})")
    log.evaluation(state["epoch"], state["step"], "train", {**train, "loss": train["total"]})
    if result is not None:
        val = result["metrics"]
        line += (f"\n          Val mIoU: {val['miou']:.4f}, Val Acc: {val['overall_accuracy']:.4f}, Val mAcc: "
                 f"{val['mean_accuracy']:.4f}, Val NLL: {result['loss']:.4f}")
        log.evaluation(state["epoch"], state["step"], "val", {**val, "loss": result["loss"]})
        line += f" (evaluation {result['seconds']:.2f} s)"
    log.info(f"{line} ({seconds:.2f} s)")


# -- what evaluate.py and predict.py call ------------------------------------------------------------------------------

list_inputs = list_images                                   # the files of a folder that predict can read
predict, write_prediction, example_pictures = label_photo, write_files, report_pictures


def has_test_split(config: Config) -> bool:
    return bool(config.data.test_image_paths)


def attach(model: nn.Module, backbone: FrozenBackbone, config: Config, names, colors) -> None:
    """What evaluation needs besides the weights. FrozenBackbone is no nn.Module: it does not become part of model."""
    model.backbone, model.config, model.class_names, model.palette = backbone, config, names, colors
    model.multiple = backbone.multiple


def load_model(checkpoint: dict, device: torch.device) -> Mask2FormerSegmenter:
    """The network of a checkpoint of this script in eval mode, with the frozen backbone it was trained on."""
    config = Config(checkpoint["config"])
    backbone, _ = open_backbone(config.model, checkpoint["encoder"])
    model = build_model(config, backbone.embed_dim, backbone.patch_size)
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    attach(model, backbone, config, checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


# -- set-up and resume -------------------------------------------------------------------------------------------------

def config_of(args) -> Config:
    """The flags as a checked config."""
    config = flags_config(make_parser(), args)
    check_config(config)
    return config


def load_head(model: Mask2FormerSegmenter, path: str) -> list[str]:
    """Start from a released head, or from another run's; its class layer stays out where the classes differ."""
    state, own, lines = read_released_head(path), model.state_dict(), []
    for name in [name for name in state if ".class_embed." in name and name in own]:
        stored, here = state[name].shape, own[name].shape
        if stored != here and stored[1:] == here[1:]:
            lines = [f"the class layer starts anew: {stored[0] - 1} classes in the file, {here[0] - 1} here"]
            state[name] = own[name]
    return [load_weights(model, state, path, what="head"), *lines]


def headline(result: dict) -> dict:
    """What main returns of an evaluation: the single numbers, and the loss."""
    return {**{key: value for key, value in result["metrics"].items() if isinstance(value, float)},
            "loss": result["loss"]}


def test_only(args, argv, checkpoint, path, device, amp_dtype) -> dict:
    """Score a checkpoint (with its own settings, changed by the flags that are given) or a released head, on the test
    split, or the validation split where there is none."""
    config, given = config_of(args), given_flags(make_parser(), argv)
    if checkpoint is not None:
        config = tested_config(checkpoint, config, given)
        check_config(config)
    asked_for_val = "val_image_paths" in given and "test_image_paths" not in given
    split = "test" if has_test_split(config) and not asked_for_val else "val"
    dataset = build_dataset(config, split, num_workers=args.num_workers)
    if checkpoint is not None:
        model = load_model(checkpoint, device)
    else:
        backbone, message = open_backbone(config.model, seed=args.seed)
        model = build_model(config, backbone.embed_dim, backbone.patch_size).to(device).eval()
        print(message, load_weights(model, read_released_head(path), path, what="head"), sep="\n", flush=True)
        attach(model, backbone, config, *read_classes(config.data.classes, config.data.num_classes))
    result = evaluate(model, dataset, device, amp_dtype, num_workers=args.num_workers,
                      limit_batches=args.limit_batches)
    if is_main():
        print(f"{path} on the {split} split:\n{metrics_table(result['metrics'], model.class_names)}", flush=True)
    cleanup()
    return headline(result)


# -- main --------------------------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    check_range("--limit-batches", args.limit_batches, 0)
    check_range("--num-workers", args.num_workers, 0)
    # device and processes                                                        # same in all scripts
    device = pick_device(args.device)
    rank, local_rank, world = init_distributed(device.type)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
    amp_dtype, scaler = amp_settings(device, args.amp_dtype)
    seed_everything(args.seed, args.deterministic)

    folder = RunFolder(args.output_dir, args.checkpoint_dir, args.log_dir)
    resume_path, messages = find_resume(args.resume, folder.model, SCRIPT)
    checkpoint = load_checkpoint(resume_path, SCRIPT) if resume_path else None
    if args.test_only and checkpoint is None and messages:
        raise ValueError(f"--test-only --resume auto: there is no checkpoint in {folder.model}")
    if args.test_only and checkpoint is None and args.head_weights is None:
        raise ValueError("--test-only needs --resume PATH|auto or --head-weights FILE: a head that was never trained "
                         "has no score")
    if args.test_only:
        return test_only(args, argv, checkpoint, resume_path or args.head_weights, device, amp_dtype)
    config = config_of(args)
    check_writable(folder.model, folder.log, folder.config)

    # data: every file is checked before the first step, by rank 0, and remembered
    names, colors = read_classes(config.data.classes, config.data.num_classes)
    for turn in (True, False):
        if is_main() == turn:
            train_set = build_dataset(config, "train", args.seed, num_workers=args.num_workers)
            val_set = build_dataset(config, "val", num_workers=args.num_workers) if config.evaluation.validate else None
        barrier()
    sampler = EpochBatchSampler(len(train_set), config.training.batch_size, args.seed, group=config.training.accumulate)
    batches = min(len(sampler), args.limit_batches or len(sampler))
    total_steps = config.training.epochs * -(-batches // config.training.accumulate)
    if checkpoint is not None:
        check_same_run(checkpoint, config, total_steps, ("data", "model", "training"), args.seed, FREE_ON_RESUME)

    # model: the frozen backbone, and what is trained on its features
    backbone, message = open_backbone(config.model, checkpoint and checkpoint["encoder"], args.seed)
    backbone.to(device, amp_dtype)
    messages.append(message)
    if config.data.cache_features:
        train_set, message = cache_features(train_set, backbone, device, amp_dtype, config.data.cache_dir,
                                            config.training.batch_size, args.num_workers)
        messages.append(message)
    seed_everything(args.seed, args.deterministic)          # the head's start does not depend on how the backbone came
    model = build_model(config, backbone.embed_dim, backbone.patch_size)
    if checkpoint is not None:
        messages.append(load_weights(model, checkpoint["model"], resume_path, what="model"))
    elif config.model.head_weights is not None:
        messages += load_head(model, config.model.head_weights)
    attach(model, backbone, config, names, colors)
    model.to(device)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(model) if world > 1 and device.type == "cuda" else model
    network = torch.compile(network) if args.compile else network
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [local_rank] if device.type == "cuda" else None)

    # loss, optimiser, schedule
    criterion = build_criterion(config).to(device)
    optimizer = build_optimizer(model, config)
    scheduler = build_lr_scheduler(optimizer, config, total_steps)
    keeper = CheckpointKeeper(folder.model, 0, config.training.save_interval)
    state = {"epoch": 0, "batch": 0, "step": 0}             # epochs finished, batches of the next one, optimiser steps
    totals = LossTotals()

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
        return {"script": SCRIPT, "config": config.to_dict(), "class_names": names, "palette": colors.tolist(),
                "model": model.state_dict(), "ema": None, "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(), "encoder": backbone.entry,
                "total_steps": total_steps, "seed": args.seed, "totals": totals.state_dict(), **rng_entries(), **state}

    def save(snapshot, epoch=None):
        if is_main():
            if epoch is not None:                           # before model_last, which a resume goes on from
                keeper.save_epoch(epoch, snapshot)
            keeper.save_last(snapshot)

    if is_main():
        write_run_files(folder, config, device, args.seed, resumed=checkpoint is not None)
    if not config.evaluation.validate:
        messages.append("no validation during training: --validate is not given, and no model_best.pth will be written")
    log = RunLog(folder.log, rank, total_steps=total_steps,
                 resume_step=state["step"] if checkpoint is not None else None,
                 wandb={"project": "segheads", "config": config.to_dict()} if args.wandb else None)
    trained = sum(parameter.numel() for parameter in model.parameters())
    for line in (*messages, f"{len(train_set.files)} training and {len(val_set.files) if val_set else 0} validation "
                 f"images, {len(train_set)} views an epoch", f"{trained:,} parameters trained; effective batch "
                 f"{config.training.batch_size * config.training.accumulate * world} on {describe(device)}, seed "
                 f"{args.seed}"):
        log.info(line)

    if resume_path not in (None, folder.model / "model_last.pth"):          # what --resume auto goes on from
        save(saved_state(), None if state["batch"] else state["epoch"])
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=args.num_workers, worker_init_fn=seed_worker,
                        pin_memory=device.type == "cuda", generator=torch.Generator())
    go_on = f"go on with: {shlex.join(['python', *sys.argv, '--resume', 'auto'])}"
    result = {}
    with StopSignal() as stop, log:
        while state["epoch"] < config.training.epochs:
            started = time.monotonic()
            train_set.set_epoch(state["epoch"])
            sampler.set_epoch(state["epoch"], state["batch"])
            if not train_one_epoch(network, backbone, loader, criterion, optimizer, scheduler, scaler, totals, state,
                                   config, args, device, amp_dtype, log, stop):
                save(saved_state())
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped at step {state['step']} of {total_steps}, saved; {go_on}")
            if device.type != "cuda":                       # there SyncBatchNorm has the same statistics everywhere
                broadcast_buffers(model)
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            train = totals.means()
            last = state["epoch"] == config.training.epochs
            if val_set is None or (state["epoch"] % config.evaluation.val_interval and not last):
                log_epoch(log, state, train, None, time.monotonic() - started)
                save(saved_state(), state["epoch"])
            else:
                result = evaluate(network, val_set, device, amp_dtype, num_workers=args.num_workers,
                                  limit_batches=args.limit_batches)
                log_epoch(log, state, train, result, time.monotonic() - started)
                snapshot = saved_state()                    # in every process: it gathers what they have
                if is_main() and keeper.save_best_if(result["metrics"]["miou"], snapshot):
                    log.info(f"New best mIoU: {result['metrics']['miou']:.4f}. Checkpoint saved.")
                save(snapshot, state["epoch"])
            if all_agree_max(stop.requested or 0) and not last:
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped after epoch {state['epoch']}, saved; {go_on}")
        best = "none" if keeper.best_score is None else f"{keeper.best_score:.4f} (epoch {keeper.best_epoch})"
        log.info(f"Best mIoU: {best}; checkpoints in {folder.model}")
    cleanup()
    return {**(headline(result) if result else {}), "best": keeper.best_score, "best_epoch": keeper.best_epoch}


if __name__ == "__main__":
    run(main)
