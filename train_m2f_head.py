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

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import math
from pathlib import Path

import torch
from torch import nn

from data.image_splits import read_classes
from data.images import list_images
from models.dinov3 import BACKBONES
from models.dinov3_adapter import DINOv3_Adapter
from models.dinov3_weights import load_head, read_released_head
from models.mask2former import Mask2FormerHead, Mask2FormerSegmenter
from utils import image_scripts as photos
from utils.cli import ArgumentParser, AtLeast, flags_config, flags_defaults, given_flags, run_main
from utils.config import Config
from utils.distributed import all_reduce_sum
from utils.mask_losses import SetCriterion
from utils.params import describe_parameters, split_decay
from utils.run import Run, add_run_flags
from utils.seed import seed_everything
from utils.training import build_loader, micro_steps
from utils.weights import load_weights

SCRIPT = Path(__file__).name
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "mAcc": "mean_accuracy"}
RESULTS = photos.PHOTO_RESULTS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    photos.add_photo_flags(parser)
    model = parser.add_argument_group("model")
    photos.add_backbone_flags(model)
    model.add_argument("--hidden-dim", type=int, help="default: 256, for the 7B 2048")
    model.add_argument("--ffn-dim", type=AtLeast(1), default=4096)
    model.add_argument("--num-queries", type=AtLeast(1), default=100)
    model.add_argument("--head-weights", metavar="FILE",
                       help="start from a released head, or score it (--test-only)")
    model.add_argument("--gradient-checkpointing", action="store_true",
                       help="less memory, a third more time")
    training = photos.add_training_flags(parser, lr=1e-4, weight_decay=0.05, clip_grad=0.01)
    training.add_argument("--num-points", type=AtLeast(1), default=12544,
                          help="points a mask is compared at")
    training.add_argument("--ignore-in-mask-loss", action="store_true",
                          help="points on ignored pixels do not count (original: background)")
    photos.add_evaluation_flags(parser)
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
    photos.check_flags(config)
    if model.hidden_dim is None:
        model.hidden_dim = 2048 if model.backbone == "dinov3_vit7b16" else 256
    if model.hidden_dim < 32 or model.hidden_dim % 32:
        raise ValueError(f"--hidden-dim {model.hidden_dim}: must be a multiple of 32")
    if config.data.image_size % size_multiple(config):
        raise ValueError(f"--image-size {config.data.image_size}: must be a multiple of "
                         f"{size_multiple(config)} for {model.backbone} and the adapter")


def size_multiple(config: Config) -> int:
    """The sides of an image are padded to a multiple of this."""
    return math.lcm(BACKBONES[config.model.backbone].patch_size, 32)


def build_model(config: Config) -> Mask2FormerSegmenter:
    model = config.model
    embed_dim = BACKBONES[model.backbone].embed_dim
    adapter = DINOv3_Adapter(embed_dim, BACKBONES[model.backbone].patch_size,
                             gradient_checkpointing=model.gradient_checkpointing)
    head = Mask2FormerHead(embed_dim, config.data.num_classes, model.hidden_dim, model.num_queries,
                           ffn_dim=model.ffn_dim,
                           gradient_checkpointing=model.gradient_checkpointing)
    return Mask2FormerSegmenter(adapter, head)


def build_criterion(config: Config) -> SetCriterion:
    return SetCriterion(config.data.num_classes, config.training.num_points,
                        ignore_in_mask_loss=config.training.ignore_in_mask_loss)


def compute_loss(criterion: SetCriterion, outputs: dict, label, counts, present=None) -> dict:
    """The weighted `total` of all layers, and the last layer's terms; counts (2,): of the step;
    present (B, C): the classes in each image, where they are known already."""
    losses = criterion.sums(outputs, label, counts, present=present)
    return {"total": losses["total"], "class": losses["class_0"], "mask": losses["mask_0"],
            "dice": losses["dice_0"]}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no decay for norms, biases and embeddings. The backbone is not part of the model."""
    groups = split_decay(model.named_parameters(), config.training.weight_decay)
    return torch.optim.AdamW(groups, config.training.lr)


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, backbone, loader, criterion, config: Config) -> None:
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # Numbers of masks and of queries are those of the step, whatever the number of
        # micro-batches and processes.
        counts = sum(criterion.label_weights(batch["label"], config.model.num_queries)
                     for batch in micro_batches)
        counts = all_reduce_sum(counts.to(run.device, non_blocking=True))
        for batch in micro_steps(network, micro_batches):
            image, taps, label = photos.prepare(batch, backbone, run.device)
            with run.autocast():
                outputs = network(image, taps)      # (B, Q, C + 1), (B, Q, S/4, S/4), ...
            present = criterion.present(batch["label"])
            losses = compute_loss(criterion, outputs, label, counts, present)
            run.backward(losses["total"], losses)
        run.update(config.training.clip_grad)


# -- what evaluate.py and predict.py call (docs/adapt.md lists it) ---------------------------------

build_dataset = photos.build_dataset
evaluate = photos.evaluate_photos
predict = photos.label_photo
write_prediction = photos.write_photo_label
example_pictures = photos.photo_pictures
list_inputs = list_images
has_test_split = photos.has_test_photos


def load_model(checkpoint: dict, device: torch.device) -> Mask2FormerSegmenter:
    """The network of a checkpoint in eval mode, with the frozen backbone it was trained on."""
    config = Config(checkpoint["config"])
    backbone, _ = photos.open_backbone(config.model, checkpoint["encoder"])
    model = build_model(config)
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    photos.attach_backbone(model, backbone, config, checkpoint["class_names"],
                           checkpoint["palette"], size_multiple(config))
    return model.to(device).eval()


def load_released(config: Config, run: Run) -> Mask2FormerSegmenter:
    """A network with the head of --head-weights, as it is."""
    path = config.model.head_weights
    backbone, message = photos.open_backbone(config.model, seed=run.args.seed)
    model = build_model(config).to(run.device).eval()
    line = load_weights(model, read_released_head(path), path, what="head")
    print(message, line, sep="\n", flush=True)
    names, palette = read_classes(config.data.classes, config.data.num_classes,
                                  config.data.label_map)
    photos.attach_backbone(model, backbone, config, names, palette, size_multiple(config))
    return model


def score_released(run: Run, config: Config, given: set[str]) -> dict:
    """Score the head of --head-weights."""
    split, dataset = photos.tested_split(run, config, given)
    model = load_released(config, run)
    return photos.score_split(run, model, split, dataset, config.model.head_weights)


# -- main ------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    needed = "--test-only needs a checkpoint (or --head-weights FILE)" if args.test_only else None
    run = Run(args, SCRIPT, DEFAULTS, args.checkpoint_dir, args.log_dir,
              needs_checkpoint=None if args.head_weights else needed)
    if args.test_only:
        given = given_flags(make_parser(), argv)
        if run.checkpoint is None:
            return score_released(run, config_of(args), given)
        return photos.score_checkpoint(run, config_of(args), given, check_config, load_model)
    config = config_of(args)
    training = config.training

    # data: every file is checked before the first step, and remembered
    class_names, palette, train_set, val_set = photos.open_data(run, config, build_dataset)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, accumulate=training.accumulate,
                       compare=("data", "model", "training"), free=photos.FREE_ON_RESUME)

    # model: the frozen backbone, and what is trained on its features
    backbone, train_set = photos.open_features(run, config, train_set)
    # The head starts the same, however the backbone came.
    seed_everything(args.seed, args.deterministic)
    model = build_model(config)
    if not run.restore(model) and config.model.head_weights is not None:
        path = config.model.head_weights
        run.messages += load_head(model, read_released_head(path), path, ".class_embed.", extra=1)
    photos.attach_backbone(model, backbone, config, class_names, palette, size_multiple(config))
    network = run.wrap(model)

    # loss, optimiser, schedule
    criterion = build_criterion(config).to(run.device)
    optimizer = build_optimizer(model, config)
    scheduler = photos.build_schedule(optimizer, training, run.total_steps)
    run.track(config=config, class_names=class_names, palette=palette.tolist(),
              optimizer=optimizer, scheduler=scheduler, save_interval=training.save_interval,
              encoder=backbone.entry, ema=None)

    loader = build_loader(train_set, sampler, args.num_workers, run.device)
    lines = (photos.describe_data(train_set, val_set),
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
