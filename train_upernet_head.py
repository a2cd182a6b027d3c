"""UPerNet head on a frozen DINOv3 (or DINOv2): neck, pooling pyramid and FPN are trained.

    python train_upernet_head.py --image-paths "train/images/*.jpg" \\
        --mask-paths "train/masks/*.png" --num-classes 150 --validate --backbone dinov3_vitl16 \\
        --backbone-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth
    python train_upernet_head.py ... --neck pyramid --augment windows --cache-features
    python train_upernet_head.py ... --device cpu --limit-batches 2 --epochs 1       # smoke run
    torchrun --nproc_per_node=4 train_upernet_head.py ...                            # several GPUs
    python train_upernet_head.py ... --resume auto                    # go on, bit for bit
    python train_upernet_head.py --resume exp/upernet_head/model/model_best.pth --test-only

Xiao et al. 2018 (UPerNet), in the widths of mmsegmentation, on the features of Simeoni et al. 2025
(DINOv3). Masks hold class ids, 255 is ignored. The backbone never changes and is not in the
checkpoints; with --cache-features it runs once. Against train_m2f_head.py: a class per pixel with
cross entropy instead of queries, so it learns faster and needs less memory. Every number logged and
every deviation from the papers: docs/dinov3_heads.md. To make it yours: docs/adapt.md.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.image_splits import read_classes, training_doubts
from data.images import list_images
from models.dinov3 import FrozenBackbone
from models.dinov3_adapter import DINOv3_Adapter
from models.dinov3_weights import load_head, read_head
from models.upernet import FCNHead, FeaturePyramidNeck, UPerHead, UPerNetSegmenter
from utils.checks import check_range
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
from utils.losses import MaskedCrossEntropyLoss, class_weights
from utils.params import describe_parameters, split_decay
from utils.run import Run, add_run_flags, main_first
from utils.schedule import build_scheduler
from utils.seed import seed_everything
from utils.training import build_loader, micro_steps
from utils.weights import load_weights

SCRIPT = Path(__file__).name
AUX_WEIGHT = 0.4                        # of the auxiliary head's loss (mmsegmentation)
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "mAcc": "mean_accuracy"}
RESULTS = PHOTO_RESULTS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add_photo_flags(parser)
    model = parser.add_argument_group("model")
    add_backbone_flags(model)
    model.add_argument("--neck", choices=("adapter", "pyramid"), default="adapter",
                       help="adapter: deformable attention and a stem on the image; "
                            "pyramid: four resized feature maps")
    model.add_argument("--hidden-dim", type=AtLeast(1), default=512)
    model.add_argument("--dropout", type=float, default=0.1, help="of the classifiers' input")
    model.add_argument("--head-weights", metavar="FILE", help="start from the head of another run")
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
    training.add_argument("--weight-decay", type=AtLeast(0, float), default=0.01)
    training.add_argument("--scheduler", choices=("poly", "cosine", "constant"), default="poly")
    training.add_argument("--class-weights", metavar="NAME|W,W,...",
                          help="of the loss: median_frequency, sqrt_median_frequency, or a number "
                               "for each class, such as 1,0.5,2; default: all 1")
    training.add_argument("--clip-grad", type=AtLeast(0, float), default=0.0,
                          help="largest norm of the whole gradient; 0: none")
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
    """The flags as a checked config: --lr of the group training is config.training.lr. Flags
    outside of the groups are not stored."""
    config = flags_config(make_parser(), args)
    check_config(config)
    return config


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that can be seen in the flags alone. Raises ValueError."""
    check_flags(config)
    check_range("--dropout", config.model.dropout, 0, 1)
    patch_size = 14 if config.model.backbone.startswith("dinov2") else 16
    pyramid = config.model.neck == "pyramid"
    multiple = patch_size if pyramid else math.lcm(patch_size, 32)
    if config.data.image_size % multiple:
        raise ValueError(f"--image-size {config.data.image_size}: must be a multiple of {multiple} "
                         f"for {config.model.backbone} and --neck {config.model.neck}")
    build_criterion(config, np.ones(config.data.num_classes))


def build_model(config: Config, embed_dim: int, patch_size: int) -> UPerNetSegmenter:
    model = config.model
    C = config.data.num_classes
    if model.neck == "adapter":
        neck = DINOv3_Adapter(embed_dim, patch_size,
                              gradient_checkpointing=model.gradient_checkpointing)
    else:
        neck = FeaturePyramidNeck(embed_dim)
    head = UPerHead([embed_dim] * 4, C, model.hidden_dim, dropout=model.dropout)
    return UPerNetSegmenter(neck, head, FCNHead(embed_dim, C, dropout=model.dropout))


def build_criterion(config: Config, counts: np.ndarray) -> MaskedCrossEntropyLoss:
    """The mean over labelled pixels; mmsegmentation divides by all: sparse labels count less.
    counts (C,): training pixels of each class."""
    weights = class_weights(config.training.class_weights, counts, "--class-weights")
    return MaskedCrossEntropyLoss(weights, class_dim=1)


def compute_loss(criterion: MaskedCrossEntropyLoss, outputs: dict, label: torch.Tensor,
                 labelled: torch.Tensor) -> dict:
    """Terms and their weighted `total`; labelled: the labelled pixels of the step, each with the
    weight of its class, divide all."""
    terms = {}
    for name, logits in (("ce", outputs["logits"]), ("aux", outputs["aux_logits"])):
        logits = F.interpolate(logits.float(), label.shape[-2:], mode="bilinear")  # (B, C, S, S)
        loss_sum, _ = criterion.sum_and_weight(logits, label)       # over this micro-batch
        terms[name] = loss_sum / labelled.clamp(min=1e-6)
    return {**terms, "total": terms["ce"] + AUX_WEIGHT * terms["aux"]}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no decay for norms, biases and embeddings. The backbone is not part of the model."""
    groups = split_decay(model.named_parameters(), config.training.weight_decay)
    return torch.optim.AdamW(groups, config.training.lr)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int):
    training = config.training
    warmup = min(round(training.warmup_epochs * total_steps / training.epochs), total_steps - 1)
    return build_scheduler(optimizer, training.scheduler, total_steps, warmup, min_lr=0.0,
                           power=1.0)


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, backbone, loader, criterion, clip_grad: float) -> None:
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # The loss is the mean over all labelled pixels of the step, whatever the number of
        # micro-batches and processes.
        labelled = sum(criterion.label_weight(batch["label"]) for batch in micro_batches)
        labelled = all_reduce_sum(labelled.to(run.device))
        for batch in micro_steps(network, micro_batches):
            # (B, 3, S, S), four feature maps (B, D, S/16, S/16) of the backbone, (B, S, S)
            image, taps, label = prepare(batch, backbone, run.device)
            with run.autocast():
                outputs = network(image, taps)      # (B, C, S/4, S/4), (B, C, S/16, S/16)
            # Parts of the step's numbers; `total` is what is minimised.
            losses = compute_loss(criterion, outputs, label, labelled)
            run.backward(losses["total"], losses)
        run.update(clip_grad)


# -- what evaluate.py and predict.py call (docs/adapt.md lists it) ---------------------------------

evaluate = evaluate_photos
predict = label_photo
write_prediction = write_photo_label
example_pictures = photo_pictures
list_inputs = list_images
has_test_split = has_test_photos


def attach_backbone(model: UPerNetSegmenter, backbone: FrozenBackbone, config: Config,
                    class_names: list[str], palette: np.ndarray) -> None:
    # The sides of an image are padded to a multiple of this.
    multiple = backbone.multiple if config.model.neck == "adapter" else backbone.patch_size
    attach(model, config, class_names, palette, masks=config.data, view=evaluation_view(config),
           normalize=backbone.normalize, multiple=multiple, backbone=backbone)


def load_model(checkpoint: dict, device: torch.device) -> UPerNetSegmenter:
    """The network of a checkpoint in eval mode, with the frozen backbone it was trained on."""
    config = Config(checkpoint["config"])
    backbone, _ = open_backbone(config.model, checkpoint["encoder"])
    model = build_model(config, backbone.embed_dim, backbone.patch_size)
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    attach_backbone(model, backbone, config, checkpoint["class_names"],
                    np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


def test_only(run: Run, argv) -> dict:
    """Score a checkpoint, with its own settings but for the flags that are given."""
    given = given_flags(make_parser(), argv)
    config = tested_config(run.checkpoint, config_of(run.args), given)
    check_config(config)
    run.checkpoint["config"] = config.to_dict()
    split, dataset = tested_split(run, config, given)
    model = load_model(run.checkpoint, run.device)
    return score_split(run, model, split, dataset, run.resume_path)


# -- main ------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    run = Run(args, SCRIPT, DEFAULTS, args.checkpoint_dir, args.log_dir)
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
    criterion = build_criterion(config, train_set.class_counts).to(run.device)
    run.check_data(train=train_set, val=val_set)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, accumulate=training.accumulate,
                       compare=("data", "model", "training"), free=FREE_ON_RESUME)

    # model: the frozen backbone, and what is trained on its features
    # entry: which file the backbone is; checkpoints hold this in place of its weights.
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
        run.messages += load_head(model, read_head(path), path, ".classifier.")
    attach_backbone(model, backbone, config, class_names, palette)
    network = run.wrap(model)

    # optimiser, schedule
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
            train_one_epoch(run, network, backbone, loader, criterion, training.clip_grad)
            result = None
            if val_set is not None and run.due(config.evaluation.val_interval):
                result = evaluate(network, val_set, run.device, run.amp_dtype,
                                  num_workers=args.num_workers, limit_batches=args.limit_batches)
            run.end_epoch(result, SHOWN, score="miou")
    return run.summary()


if __name__ == "__main__":
    run_main(main)
