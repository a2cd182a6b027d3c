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

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.images import list_images
from models.dinov3 import BACKBONES
from models.dinov3_adapter import DINOv3_Adapter
from models.dinov3_weights import load_head, read_head
from models.upernet import FCNHead, FeaturePyramidNeck, UPerHead, UPerNetSegmenter
from utils import image_scripts as photos
from utils.checks import check_range
from utils.cli import ArgumentParser, AtLeast, flags_config, flags_defaults, given_flags, run_main
from utils.config import Config
from utils.distributed import all_reduce_sum
from utils.losses import MaskedCrossEntropyLoss, class_weights
from utils.params import describe_parameters, split_decay
from utils.run import Run, add_run_flags
from utils.seed import seed_everything
from utils.training import build_loader, micro_steps
from utils.weights import load_weights

SCRIPT = Path(__file__).name
AUX_WEIGHT = 0.4                        # of the auxiliary head's loss (mmsegmentation)
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "mAcc": "mean_accuracy"}
RESULTS = photos.PHOTO_RESULTS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    photos.add_photo_flags(parser)
    model = parser.add_argument_group("model")
    photos.add_backbone_flags(model)
    model.add_argument("--neck", choices=("adapter", "pyramid"), default="adapter",
                       help="adapter: deformable attention and a stem on the image; "
                            "pyramid: four resized feature maps")
    model.add_argument("--hidden-dim", type=AtLeast(1), default=512)
    model.add_argument("--dropout", type=float, default=0.1, help="of the classifiers' input")
    model.add_argument("--head-weights", metavar="FILE", help="start from the head of another run")
    model.add_argument("--gradient-checkpointing", action="store_true",
                       help="less memory, a third more time")
    photos.add_class_weights(photos.add_training_flags(parser, lr=1e-4, weight_decay=0.01))
    photos.add_evaluation_flags(parser)
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
    photos.check_flags(config)
    check_range("--dropout", config.model.dropout, 0, 1)
    if config.data.image_size % size_multiple(config):
        raise ValueError(f"--image-size {config.data.image_size}: must be a multiple of "
                         f"{size_multiple(config)} for {config.model.backbone} and "
                         f"--neck {config.model.neck}")


def size_multiple(config: Config) -> int:
    """The sides of an image are padded to a multiple of this."""
    patch_size = BACKBONES[config.model.backbone].patch_size
    return patch_size if config.model.neck == "pyramid" else math.lcm(patch_size, 32)


def build_model(config: Config) -> UPerNetSegmenter:
    model = config.model
    C = config.data.num_classes
    embed_dim = BACKBONES[model.backbone].embed_dim
    if model.neck == "adapter":
        neck = DINOv3_Adapter(embed_dim, BACKBONES[model.backbone].patch_size,
                              gradient_checkpointing=model.gradient_checkpointing)
    else:
        neck = FeaturePyramidNeck(embed_dim)
    head = UPerHead([embed_dim] * 4, C, model.hidden_dim, dropout=model.dropout)
    return UPerNetSegmenter(neck, head, FCNHead(embed_dim, C, dropout=model.dropout))


def build_criterion(config: Config, counts: np.ndarray) -> MaskedCrossEntropyLoss:
    """The mean over labelled pixels; mmsegmentation divides by all: sparse labels count less.
    counts (C,): training pixels of each class."""
    weights = class_weights(config.training.class_weights, counts, "--class-weights")
    return MaskedCrossEntropyLoss(weights, class_dim=1, num_classes=config.data.num_classes)


def compute_loss(criterion: MaskedCrossEntropyLoss, outputs: dict, label: torch.Tensor,
                 labelled: torch.Tensor) -> dict:
    """Terms and their weighted `total`; labelled: the labelled pixels of the step, each with the
    weight of its class, divide all."""
    terms = {}
    for name, logits in (("ce", outputs["logits"]), ("aux", outputs["aux_logits"])):
        # Over this micro-batch, at the label's size.
        terms[name] = criterion.resized_sum(logits, label) / labelled.clamp(min=1e-6)
    return {**terms, "total": terms["ce"] + AUX_WEIGHT * terms["aux"]}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no decay for norms, biases and embeddings. The backbone is not part of the model."""
    groups = split_decay(model.named_parameters(), config.training.weight_decay)
    return torch.optim.AdamW(groups, config.training.lr)


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, backbone, loader, criterion, clip_grad: float) -> None:
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # The loss is the mean over all labelled pixels of the step, whatever the number of
        # micro-batches and processes.
        labelled = sum(criterion.label_weight(batch["label"]) for batch in micro_batches)
        labelled = all_reduce_sum(labelled.to(run.device, non_blocking=True))
        for batch in micro_steps(network, micro_batches):
            # (B, 3, S, S), four feature maps (B, D, S/16, S/16) of the backbone, (B, S, S)
            image, taps, label = photos.prepare(batch, backbone, run.device)
            with run.autocast():
                outputs = network(image, taps)      # (B, C, S/4, S/4), (B, C, S/16, S/16)
            # Parts of the step's numbers; `total` is what is minimised.
            losses = compute_loss(criterion, outputs, label, labelled)
            run.backward(losses["total"], losses)
        run.update(clip_grad)


# -- what evaluate.py and predict.py call (docs/adapt.md lists it) ---------------------------------

build_dataset = photos.build_dataset
evaluate = photos.evaluate_photos
predict = photos.label_photo
write_prediction = photos.write_photo_label
example_pictures = photos.photo_pictures
list_inputs = list_images
has_test_split = photos.has_test_photos


def load_model(checkpoint: dict, device: torch.device) -> UPerNetSegmenter:
    """The network of a checkpoint in eval mode, with the frozen backbone it was trained on."""
    config = Config(checkpoint["config"])
    backbone, _ = photos.open_backbone(config.model, checkpoint["encoder"])
    model = build_model(config)
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    photos.attach_backbone(model, backbone, config, checkpoint["class_names"],
                           checkpoint["palette"], size_multiple(config))
    return model.to(device).eval()


# -- main ------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    run = Run(args, SCRIPT, DEFAULTS, args.checkpoint_dir, args.log_dir)
    if args.test_only:
        given = given_flags(make_parser(), argv)
        return photos.score_checkpoint(run, config_of(args), given, check_config, load_model)
    config = config_of(args)
    training = config.training

    # data: every file is checked before the first step, and remembered
    class_names, palette, train_set, val_set = photos.open_data(run, config, build_dataset)
    criterion = build_criterion(config, train_set.class_counts).to(run.device)
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
        run.messages += load_head(model, read_head(path), path, ".classifier.")
    photos.attach_backbone(model, backbone, config, class_names, palette, size_multiple(config))
    network = run.wrap(model)

    # optimiser, schedule
    optimizer = build_optimizer(model, config)
    scheduler = photos.build_schedule(optimizer, training, run.total_steps, power=1.0)
    run.track(config=config, class_names=class_names, palette=palette.tolist(),
              optimizer=optimizer, scheduler=scheduler, save_interval=training.save_interval,
              encoder=backbone.entry, ema=None)

    loader = build_loader(train_set, sampler, args.num_workers, run.device)
    lines = (photos.describe_data(train_set, val_set),
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
