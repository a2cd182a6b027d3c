"""Linear head on a frozen DINOv3 (or DINOv2): a batch norm and a 1 x 1 convolution are trained.

    python train_linear_head.py --image-paths "train/images/*.jpg" \\
        --mask-paths "train/masks/*.png" --num-classes 150 --validate --backbone dinov3_vitl16 \\
        --backbone-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth
    python train_linear_head.py ... --augment windows --cache-features   # the backbone runs once
    python train_linear_head.py ... --device cpu --limit-batches 2 --epochs 1        # smoke run
    torchrun --nproc_per_node=4 train_linear_head.py ...                             # several GPUs
    python train_linear_head.py ... --resume auto                     # go on, bit for bit
    python train_linear_head.py --resume exp/linear_head/model/model_best.pth --test-only

Simeoni et al. 2025 (DINOv3, table 3) measure their backbones by this head: start here, then see
what the others add. Masks hold class ids, 255 is ignored. Checkpoints hold the head alone. Numbers
logged, deviations from the paper: docs/dinov3_heads.md. To make it yours: docs/adapt.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

from pathlib import Path

import torch
from torch import nn

from data.images import list_images
from models.dinov3 import BACKBONES
from models.dinov3_weights import load_head, read_head
from models.upernet import classifier, resize
from utils import image_scripts as photos
from utils.checks import check_range
from utils.cli import ArgumentParser, flags_config, flags_defaults, given_flags, run_main
from utils.config import Config
from utils.distributed import all_reduce_sum
from utils.losses import MaskedCrossEntropyLoss, class_weights
from utils.params import describe_parameters, split_decay
from utils.run import Run, add_run_flags
from utils.seed import seed_everything
from utils.training import build_loader, micro_steps
from utils.weights import load_weights

SCRIPT = Path(__file__).name
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "mAcc": "mean_accuracy"}
# For predict.py, default first.
RESULTS = photos.PHOTO_RESULTS


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    photos.add_photo_flags(parser)
    model = parser.add_argument_group("model")
    photos.add_backbone_flags(model)
    model.add_argument("--layers", type=int, choices=(1, 4), default=1,
                       help="patch tokens of the last block, or of the last four side by side")
    model.add_argument("--dropout", type=float, default=0.1, help="of whole channels")
    model.add_argument("--head-weights", metavar="FILE", help="start from the head of another run")
    photos.add_class_weights(photos.add_training_flags(
        parser, epochs=32, batch_size=16, lr=1e-3, weight_decay=1e-3, scheduler="cosine"))
    photos.add_evaluation_flags(parser)
    add_run_flags(parser, SCRIPT)
    return parser


DEFAULTS = flags_defaults(make_parser())


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def config_of(args) -> Config:
    """The flags in groups, as a checked config: --lr of training is config.training.lr."""
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
                         f"{size_multiple(config)} for {config.model.backbone}")


def size_multiple(config: Config) -> int:
    """The sides of an image are padded to a multiple of this: of the backbone's patch."""
    return BACKBONES[config.model.backbone].patch_size


class LinearSegmenter(nn.Module):
    """Batch norm and a 1 x 1 convolution on the feature maps of the frozen backbone."""

    backbone = None                     # set by photos.attach; not a module, so in no checkpoint

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.batchnorm_layer = nn.BatchNorm2d(channels)
        self.conv = classifier(channels, num_classes)

    def forward(self, taps: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(taps, 1).contiguous()     # (B, D or 4 D, S/16, S/16), as cached ones are
        return self.conv(self.batchnorm_layer(self.dropout(x)))     # (B, C, S/16, S/16)

    def scores(self, image: torch.Tensor) -> torch.Tensor:
        return resize(self(self.backbone(image)).float(), image.shape[-2:])     # (B, C, H, W)


def build_model(config: Config) -> LinearSegmenter:
    channels = config.model.layers * BACKBONES[config.model.backbone].embed_dim
    return LinearSegmenter(channels, config.data.num_classes, config.model.dropout)


def taps_of(config: Config) -> range:
    """The blocks of the backbone whose features the head sees."""
    depth = BACKBONES[config.model.backbone].depth
    return range(depth - config.model.layers, depth)


def compute_loss(criterion: MaskedCrossEntropyLoss, logits: torch.Tensor, label: torch.Tensor,
                 labelled: torch.Tensor) -> dict:
    """labelled: the labelled pixels of the step, each with the weight of its class, divide all."""
    return {"total": criterion.resized_sum(logits, label) / labelled.clamp(min=1e-6)}


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; no decay for norms and biases. The backbone is not part of the model."""
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
            _, taps, label = photos.prepare(batch, backbone, run.device)
            with run.autocast():
                logits = network(taps)              # (B, C, S/16, S/16)
            # Parts of the step's numbers; `total` is what is minimised.
            losses = compute_loss(criterion, logits, label, labelled)
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


def load_model(checkpoint: dict, device: torch.device) -> LinearSegmenter:
    """The network of a checkpoint in eval mode, with the frozen backbone it was trained on."""
    config = Config(checkpoint["config"])
    backbone, _ = photos.open_backbone(config.model, checkpoint["encoder"], taps=taps_of(config))
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
    weight = class_weights(training.class_weights, train_set.class_counts, "--class-weights")
    criterion = MaskedCrossEntropyLoss(weight, class_dim=1, num_classes=len(class_names))
    criterion.to(run.device)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, accumulate=training.accumulate,
                       compare=("data", "model", "training"), free=photos.FREE_ON_RESUME)

    # model: the frozen backbone, and what is trained on its features
    backbone, train_set = photos.open_features(run, config, train_set, taps_of(config))
    # The head starts the same, however the backbone came.
    seed_everything(args.seed, args.deterministic)
    model = build_model(config)
    if not run.restore(model) and config.model.head_weights is not None:
        path = config.model.head_weights
        run.messages += load_head(model, read_head(path), path, "conv.")
    photos.attach_backbone(model, backbone, config, class_names, palette, size_multiple(config))
    network = run.wrap(model)

    # optimiser, schedule
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
            train_one_epoch(run, network, backbone, loader, criterion, training.clip_grad)
            result = None
            if val_set is not None and run.due(config.evaluation.val_interval):
                result = evaluate(network, val_set, run.device, run.amp_dtype,
                                  num_workers=args.num_workers, limit_batches=args.limit_batches)
            run.end_epoch(result, SHOWN, score="miou")
    return run.summary()


if __name__ == "__main__":
    run_main(main)
