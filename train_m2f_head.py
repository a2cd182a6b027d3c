"""Mask2Former head on a frozen DINOv3 (or DINOv2): adapter, pixel decoder and decoder are trained.

    python train_m2f_head.py --image-paths "images/*.jpg" --mask-paths "masks/*.png" --validate \\
        --backbone dinov3_vitl16 --backbone-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth
    python train_m2f_head.py ... --device cpu --limit-batches 2 --epochs 1           # smoke run
    torchrun --nproc_per_node=4 train_m2f_head.py ...                                # several GPUs
    python train_m2f_head.py ... --resume auto                    # go on, bit for bit
    python train_m2f_head.py --resume exp/m2f_head/model/model_best.pth --test-only
    python train_m2f_head.py --test-only --backbone dinov3_vit7b16 --backbone-weights FILE.pth \\
        --hidden-dim 2048 --head-weights dinov3_vit7b16_ade20k_m2f_head-bf307cb1.pth \\
        --val-image-paths ... --val-mask-paths ... --reduce-zero-label --eval-size 896  # ADE20K

Cheng et al. 2022 (Mask2Former) on the features of Simeoni et al. 2025 (DINOv3, section 6.3.2), who
released a head but no code to train one. Masks hold class ids, 255 is ignored. The backbone never
changes and is not in the checkpoints; their weights have the official names. Against
train_upernet_head.py: queries matched to the classes of an image instead of a class per pixel.
Every number logged and every deviation from the papers: docs/dinov3_heads.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.image_splits import read_classes, training_doubts
from data.images import list_images
from models.dinov3 import FrozenBackbone
from models.dinov3_adapter import DINOv3_Adapter
from models.dinov3_weights import load_head, read_released_head
from models.mask2former import Mask2FormerHead, Mask2FormerSegmenter
from utils.cli import ArgumentParser, AtLeast, flags_config, flags_defaults, given_flags, run_main
from utils.config import Config
from utils.distributed import all_reduce_sum
from utils.image_scripts import (
    FREE_ON_RESUME,
    PHOTO_RESULTS,
    add_backbone_flags,
    add_evaluation_flags,
    add_photo_flags,
    attach,
    build_dataset,
    cache_features,
    check_flags,
    describe_data,
    evaluate_photos,
    evaluation_view,
    has_test_photos,
    label_photo,
    open_backbone,
    photo_pictures,
    prepare,
    score_split,
    tested_config,
    tested_split,
    write_photo_label,
)
from utils.mask_losses import SetCriterion
from utils.params import describe_parameters, split_decay
from utils.run import Run, add_run_flags, main_first
from utils.schedule import build_scheduler
from utils.seed import seed_everything
from utils.training import build_loader, micro_steps
from utils.weights import load_weights

SCRIPT = Path(__file__).name
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "mAcc": "mean_accuracy"}
RESULTS = PHOTO_RESULTS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_photo_flags(parser)
    model = parser.add_argument_group("model")
    add_backbone_flags(model)
    model.add_argument("--hidden-dim", type=int, help="default: 256, for the 7B 2048")
    model.add_argument("--ffn-dim", type=AtLeast(1), default=4096)
    model.add_argument("--num-queries", type=AtLeast(1), default=100)
    model.add_argument("--head-weights", metavar="FILE",
                       help="start from a released head, or score it (--test-only)")
    model.add_argument("--gradient-checkpointing", action="store_true",
                       help="less memory, a third more time")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=AtLeast(1), default=100)
    training.add_argument("--warmup-epochs", type=AtLeast(0, float), default=1.0)
    training.add_argument("--batch-size", type=AtLeast(1), default=8,
                          help="images per process and micro-step")
    training.add_argument("--accumulate", type=AtLeast(1), default=1, metavar="N",
                          help="micro-steps per optimiser step")
    training.add_argument("--lr", type=float, default=1e-4)
    training.add_argument("--weight-decay", type=AtLeast(0, float), default=0.05)
    training.add_argument("--scheduler", choices=("poly", "cosine", "constant"), default="poly")
    training.add_argument("--clip-grad", type=AtLeast(0, float), default=0.01,
                          help="largest norm of the whole gradient; 0: none")
    training.add_argument("--num-points", type=AtLeast(1), default=12544,
                          help="points a mask is compared at")
    training.add_argument("--ignore-in-mask-loss", action="store_true",
                          help="points on ignored pixels do not count (original: background)")
    training.add_argument("--log-interval", type=AtLeast(1), default=10, metavar="STEPS")
    training.add_argument("--save-interval", type=AtLeast(0), default=10, metavar="EPOCHS")
    add_evaluation_flags(parser)
    add_run_flags(parser, SCRIPT)
    parser.add_argument("--resume-checkpoint", dest="resume", metavar="PATH|auto",
                        help="the same as --resume")
    return parser


DEFAULTS = flags_defaults(make_parser())


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def config_of(args) -> Config:
    """The flags as a checked config."""
    config = flags_config(make_parser(), args)
    check_config(config)
    return config


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that can be seen in the flags alone. Raises ValueError."""
    model = config.model
    check_flags(config)
    if model.hidden_dim is None:
        model.hidden_dim = 2048 if model.backbone == "dinov3_vit7b16" else 256
    if model.hidden_dim < 32 or model.hidden_dim % 32:
        raise ValueError(f"--hidden-dim {model.hidden_dim}: must be a multiple of 32")
    multiple = 224 if model.backbone.startswith("dinov2") else 32
    if config.data.image_size % multiple:
        raise ValueError(f"--image-size {config.data.image_size}: must be a multiple of {multiple} "
                         f"for {model.backbone} and the adapter")


def build_model(config: Config, embed_dim: int, patch_size: int) -> Mask2FormerSegmenter:
    model = config.model
    adapter = DINOv3_Adapter(embed_dim, patch_size,
                             gradient_checkpointing=model.gradient_checkpointing)
    head = Mask2FormerHead(embed_dim, config.data.num_classes, model.hidden_dim, model.num_queries,
                           ffn_dim=model.ffn_dim,
                           gradient_checkpointing=model.gradient_checkpointing)
    return Mask2FormerSegmenter(adapter, head)


def build_criterion(config: Config) -> SetCriterion:
    return SetCriterion(config.data.num_classes, config.training.num_points,
                        ignore_in_mask_loss=config.training.ignore_in_mask_loss)


def compute_loss(criterion: SetCriterion, outputs: dict, label: torch.Tensor,
                 counts: torch.Tensor) -> dict:
    """The weighted `total` of all layers, and the last layer's terms; counts (2,): of the step."""
    losses = criterion.sums(outputs, label, counts)
    return {"total": losses["total"], "class": losses["class_0"], "mask": losses["mask_0"],
            "dice": losses["dice_0"]}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no decay for norms, biases and embeddings. The backbone is not part of the model."""
    groups = split_decay(model.named_parameters(), config.training.weight_decay)
    return torch.optim.AdamW(groups, config.training.lr)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int):
    training = config.training
    warmup = min(round(training.warmup_epochs * total_steps / training.epochs), total_steps - 1)
    return build_scheduler(optimizer, training.scheduler, total_steps, warmup, min_lr=0.0)


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, backbone, loader, criterion, config: Config) -> None:
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # Numbers of masks and of queries are those of the step, whatever the number of
        # micro-batches and processes.
        counts = sum(criterion.label_weights(batch["label"], config.model.num_queries)
                     for batch in micro_batches)
        counts = all_reduce_sum(counts.to(run.device))
        for batch in micro_steps(network, micro_batches):
            image, taps, label = prepare(batch, backbone, run.device)
            with run.autocast():
                outputs = network(image, taps)      # (B, Q, C + 1), (B, Q, S/4, S/4), ...
            losses = compute_loss(criterion, outputs, label, counts)
            run.backward(losses["total"], losses)
        run.update(config.training.clip_grad)


# -- what evaluate.py and predict.py call (docs/adapt.md lists it) ---------------------------------

evaluate = evaluate_photos
predict = label_photo
write_prediction = write_photo_label
example_pictures = photo_pictures
list_inputs = list_images
has_test_split = has_test_photos


def attach_backbone(model: Mask2FormerSegmenter, backbone: FrozenBackbone, config: Config,
                    class_names: list[str], palette: np.ndarray) -> None:
    attach(model, config, class_names, palette, masks=config.data, view=evaluation_view(config),
           normalize=backbone.normalize, multiple=backbone.multiple, backbone=backbone)


def load_model(checkpoint: dict, device: torch.device) -> Mask2FormerSegmenter:
    """The network of a checkpoint in eval mode, with the frozen backbone it was trained on."""
    config = Config(checkpoint["config"])
    backbone, _ = open_backbone(config.model, checkpoint["encoder"])
    model = build_model(config, backbone.embed_dim, backbone.patch_size)
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    attach_backbone(model, backbone, config, checkpoint["class_names"],
                    np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


def load_released(config: Config, run: Run) -> Mask2FormerSegmenter:
    """A network with the head of --head-weights, as it is."""
    path = config.model.head_weights
    backbone, message = open_backbone(config.model, seed=run.args.seed)
    model = build_model(config, backbone.embed_dim, backbone.patch_size).to(run.device).eval()
    line = load_weights(model, read_released_head(path), path, what="head")
    print(message, line, sep="\n", flush=True)
    names, palette = read_classes(config.data.classes, config.data.num_classes,
                                  config.data.label_map)
    attach_backbone(model, backbone, config, names, palette)
    return model


def test_only(run: Run, argv) -> dict:
    """Score a checkpoint, with its own settings but for the given flags, or a released head."""
    given = given_flags(make_parser(), argv)
    config = config_of(run.args)
    if run.checkpoint is not None:
        config = tested_config(run.checkpoint, config, given)
        check_config(config)
        run.checkpoint["config"] = config.to_dict()
    split, dataset = tested_split(run, config, given)
    if run.checkpoint is None:
        model = load_released(config, run)
        return score_split(run, model, split, dataset, config.model.head_weights)
    model = load_model(run.checkpoint, run.device)
    return score_split(run, model, split, dataset, run.resume_path)


# -- main ------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    needed = "--test-only needs a checkpoint (or --head-weights FILE)" if args.test_only else None
    run = Run(args, SCRIPT, DEFAULTS, args.checkpoint_dir, args.log_dir,
              needs_checkpoint=None if args.head_weights else needed)
    if args.test_only:
        return test_only(run, argv)
    config = config_of(args)
    training = config.training

    # data: every file is checked before the first step, by rank 0, and remembered
    class_names, palette = read_classes(config.data.classes, config.data.num_classes,
                                        config.data.label_map)
    val_set = None
    with main_first():
        train_set = build_dataset(config, "train", args.seed, num_workers=args.num_workers)
        if config.evaluation.validate:
            val_set = build_dataset(config, "val", num_workers=args.num_workers)
    run.messages += training_doubts(class_names, train_set, config.data)
    run.check_data(train=train_set, val=val_set)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, accumulate=training.accumulate,
                       compare=("data", "model", "training"), free=FREE_ON_RESUME)

    # model: the frozen backbone, and what is trained on its features
    entry = run.checkpoint["encoder"] if run.checkpoint else None
    backbone, message = open_backbone(config.model, entry, args.seed)
    backbone.to(run.device, run.amp_dtype)
    run.messages.append(message)
    if config.data.cache_features:
        train_set, message = cache_features(train_set, backbone, run.device, run.amp_dtype,
                                            config.data.cache_dir, training.batch_size,
                                            args.num_workers)
        run.messages.append(message)
    # The head starts the same, however the backbone came.
    seed_everything(args.seed, args.deterministic)
    model = build_model(config, backbone.embed_dim, backbone.patch_size)
    if not run.restore(model) and config.model.head_weights is not None:
        path = config.model.head_weights
        run.messages += load_head(model, read_released_head(path), path, ".class_embed.", extra=1)
    attach_backbone(model, backbone, config, class_names, palette)
    network = run.wrap(model)

    # loss, optimiser, schedule
    criterion = build_criterion(config).to(run.device)
    optimizer = build_optimizer(model, config)
    scheduler = build_lr_scheduler(optimizer, config, run.total_steps)
    run.track(config=config, class_names=class_names, palette=palette.tolist(),
              optimizer=optimizer, scheduler=scheduler, save_interval=training.save_interval,
              encoder=backbone.entry, ema=None)

    loader = build_loader(train_set, sampler, args.num_workers, run.device)
    lines = (describe_data(train_set, val_set),
             f"{describe_parameters(model)}; {run.description}")
    with run.training(*lines, log_interval=training.log_interval):
        for _ in run.epochs(train_set, sampler):
            train_one_epoch(run, network, backbone, loader, criterion, config)
            result = None
            if val_set is not None and run.due(config.evaluation.val_interval):
                result = evaluate(network, val_set, run.device, run.amp_dtype,
                                  num_workers=args.num_workers, limit_batches=args.limit_batches)
            run.end_epoch(result, SHOWN, score="miou")
    return run.summary()


if __name__ == "__main__":
    run_main(main)
