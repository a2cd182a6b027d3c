"""EoMT: a fine-tuned DINOv3 (or DINOv2) whose last blocks also process queries, and a small head.

    python train_eomt.py --image-paths "images/*.jpg" --mask-paths "masks/*.png" --validate \\
        --backbone dinov3_vitl16 --backbone-weights dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth
    python train_eomt.py ... --device cpu --limit-batches 2 --epochs 1               # smoke run
    torchrun --nproc_per_node=4 train_eomt.py ... --batch-size 4                     # several GPUs
    python train_eomt.py ... --resume auto                        # go on, bit for bit
    python train_eomt.py --resume exp/eomt/model/model_best.pth --test-only
    python train_eomt.py ... --network-weights FILE               # start from a released EoMT
    python train_eomt.py --test-only --network-weights FILE --backbone dinov2_vitl14_reg \\
        --val-image-paths ... --val-mask-paths ... --reduce-zero-label                # ADE20K

Kerssies et al. 2025. Against train_m2f_head.py: the backbone is trained, there is no adapter, no
pixel decoder and no decoder; masks steer the queries in training only and are switched off block by
block, so that what remains is a plain ViT. Checkpoints hold the whole network: a licence of the
backbone's weights (DINOv3's) reaches them. A released file for DINOv3 holds differences to the
backbone and needs --backbone-weights too. Every number logged and every deviation from the paper:
docs/eomt.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

from pathlib import Path

import numpy as np
import torch

from data.image_splits import read_classes
from data.images import list_images
from models.dinov3 import BACKBONES, VisionTransformer, backbone_name
from models.eomt import JOINT_BLOCKS, PATCH_SIZE, EoMT, annealing_periods, eomt_config
from models.eomt_weights import blank_vit, load_network, released_entry, trainable_vit
from models.query_masks import mask_probability
from utils import image_scripts as photos
from utils.checks import check_range
from utils.cli import ArgumentParser, AtLeast, flags_config, flags_defaults, given_flags, run_main
from utils.config import Config
from utils.distributed import all_reduce_sum
from utils.image_inference import build_normalizer
from utils.mask_losses import SetCriterion
from utils.params import describe_parameters
from utils.run import Run, add_run_flags
from utils.schedule import build_two_warmups
from utils.seed import seed_everything
from utils.training import build_loader, micro_steps
from utils.weights import load_weights

SCRIPT = Path(__file__).name
# As published: learning rate, shares of the run in which the heads and then the backbone warm up.
RECIPES = {"dinov3": {"lr": 2e-4, "head_warmup": 0.1, "encoder_warmup": 0.15},
           "dinov2": {"lr": 1e-4, "head_warmup": 0.0125, "encoder_warmup": 0.025}}
SHOWN = {"mIoU": "miou", "Acc": "overall_accuracy", "mAcc": "mean_accuracy"}
# For predict.py, default first.
RESULTS = {**photos.PHOTO_RESULTS, "pca": False}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    photos.add_photo_flags(parser)
    model = parser.add_argument_group("model")
    photos.add_backbone_flags(model)
    model.add_argument("--num-queries", type=AtLeast(1), default=100)
    model.add_argument("--joint-blocks", type=AtLeast(1), metavar="N",
                       help="last blocks with queries; default: S, B 3, L 4, larger 5")
    model.add_argument("--freeze-blocks", type=AtLeast(0), default=0, metavar="K",
                       help="train without the embeddings and the first K blocks; 0: all")
    model.add_argument("--network-weights", metavar="FILE|URL|DIR",
                       help="start from a released EoMT or a checkpoint, or score it (--test-only)")
    model.add_argument("--gradient-checkpointing", action="store_true",
                       help="less memory, a third more time")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=AtLeast(1), default=30)
    training.add_argument("--batch-size", type=AtLeast(1), default=8,
                          help="images per process and micro-step; published: 16 in all")
    training.add_argument("--accumulate", type=AtLeast(1), default=1, metavar="N",
                          help="micro-steps per optimiser step")
    training.add_argument("--lr", type=float, help="default: DINOv3 2e-4, DINOv2 1e-4")
    training.add_argument("--layer-decay", type=float, default=0.8,
                          help="factor of the rate from each block to the one before it")
    training.add_argument("--undecayed-blocks", type=AtLeast(0), metavar="N",
                          help="last blocks at the full rate; default: DINOv3 the joint ones, "
                               "DINOv2 0")
    training.add_argument("--weight-decay", type=AtLeast(0, float), default=0.05)
    training.add_argument("--head-warmup", type=float, metavar="SHARE",
                          help="of the run; default: DINOv3 0.1, DINOv2 0.0125")
    training.add_argument("--encoder-warmup", type=float, metavar="SHARE",
                          help="after it; default: DINOv3 0.15, DINOv2 0.025")
    training.add_argument("--clip-grad", type=AtLeast(0, float), default=0.01,
                          help="largest norm of the whole gradient; 0: none")
    training.add_argument("--num-points", type=AtLeast(1), default=12544,
                          help="points a mask is compared at")
    training.add_argument("--ignore-in-mask-loss", action="store_true",
                          help="points on ignored pixels do not count (original: background)")
    training.add_argument("--log-interval", type=AtLeast(1), default=10, metavar="STEPS")
    training.add_argument("--save-interval", type=AtLeast(0), default=10, metavar="EPOCHS")
    photos.add_evaluation_flags(parser)
    add_run_flags(parser, SCRIPT)
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
    """Errors that can be seen in the flags alone; fills in what depends on the backbone. Raises
    ValueError."""
    model, training = config.model, config.training
    model.backbone = backbone_name(model.backbone)
    depth = BACKBONES[model.backbone].depth
    if model.joint_blocks is None:
        model.joint_blocks = min(JOINT_BLOCKS.get(depth, 5), depth)
    at_full_rate = model.joint_blocks if has_rotary(model.backbone) else 0
    recipe = RECIPES["dinov3" if has_rotary(model.backbone) else "dinov2"]
    for key, value in {**recipe, "undecayed_blocks": at_full_rate}.items():
        if training[key] is None:
            training[key] = value
    photos.check_flags(config)
    for flag, count in (("--joint-blocks", model.joint_blocks),
                        ("--freeze-blocks", model.freeze_blocks),
                        ("--undecayed-blocks", training.undecayed_blocks)):
        if count > depth:
            raise ValueError(f"{flag} {count}: {model.backbone} has {depth} blocks")
    check_range("--layer-decay", training.layer_decay, 0.01, 1)
    check_range("--head-warmup", training.head_warmup, 0, 0.9)
    check_range("--encoder-warmup", training.encoder_warmup, 0,
                round(0.9 - training.head_warmup, 6))
    if config.data.image_size % PATCH_SIZE:
        raise ValueError(f"--image-size {config.data.image_size}: must be a multiple of "
                         f"{PATCH_SIZE}")
    if config.data.cache_features:
        raise ValueError("--cache-features: the backbone is trained, so its features change; leave "
                         "the flag out")
    if model.network_weights is not None and model.backbone_weights == "random":
        raise ValueError("--backbone-weights random is overwritten by --network-weights: leave one "
                         "of them out")


def has_rotary(backbone: str) -> bool:
    """Of DINOv3; DINOv2 has learned positions."""
    return BACKBONES[backbone].pos_grid is None


def build_model(config: Config, vit: VisionTransformer) -> EoMT:
    model = config.model
    network = EoMT(vit, config.data.num_classes, model.num_queries, model.joint_blocks,
                   model.gradient_checkpointing)
    network.freeze_blocks(model.freeze_blocks)
    return network


def open_network(config: Config, args) -> tuple[EoMT, dict, list[str]]:
    """The network that a run starts from, the backbone's entry for checkpoints, lines for the log.
    """
    model = config.model
    path = model.network_weights
    if path is not None and model.backbone_weights is None:
        entry, lines = None, []                                     # the file overwrites the ViT
        vit = VisionTransformer(eomt_config(model.backbone, config.data.image_size))
    else:
        backbone, line = photos.open_backbone(model, seed=args.seed)
        entry, lines = backbone.entry, [line]
        vit = trainable_vit(backbone.vit, model.backbone, config.data.image_size)
    # The rest starts the same, however the backbone came.
    seed_everything(args.seed, args.deterministic)
    network = build_model(config, vit)
    if path is not None:
        stored, more = load_network(network, path, entry, model.normalization)
        entry = stored or entry or released_entry(model.backbone, path, model.normalization)
        lines += more
    return network, entry, lines


def build_criterion(config: Config) -> SetCriterion:
    return SetCriterion(config.data.num_classes, config.training.num_points, divide_by_pairs=True,
                        ignore_in_mask_loss=config.training.ignore_in_mask_loss)


def compute_loss(criterion: SetCriterion, outputs: dict, label, counts, present=None) -> dict:
    """The weighted `total` of all predictions, and the last one's terms; counts (2,): of the step;
    present (B, C): the classes in each image, where they are known already."""
    losses = criterion.sums(outputs, label, counts, present=present)
    return {"total": losses["total"], "class": losses["class_0"], "mask": losses["mask_0"],
            "dice": losses["dice_0"]}


def build_optimizer(model: EoMT, config: Config) -> torch.optim.Optimizer:
    """AdamW in groups of one learning rate: the full one for queries, heads, the final norm and the
    last --undecayed-blocks; block i of D has layer_decay^(D - 1 - i) of it, and what is before
    block 0 as much as block 0. Weight decay on everything, as published."""
    training, depth = config.training, model.encoder.config.depth
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = layer_of(name, depth, training.undecayed_blocks)
            groups.setdefault((name.startswith("encoder."), layer), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": training.lr * training.layer_decay ** (depth - 1 - layer),
          "name": f"encoder {layer}" if of_encoder else "head"}
         for (of_encoder, layer), parameters in sorted(groups.items())],
        weight_decay=training.weight_decay)


def layer_of(name: str, depth: int, undecayed_blocks: int) -> int:
    """The block, of `depth`, whose learning rate a parameter has."""
    if not name.startswith("encoder.") or name.startswith("encoder.norm."):
        return depth - 1
    block = int(name.split(".")[2]) if name.startswith("encoder.blocks.") else 0
    return block if block < depth - undecayed_blocks else depth - 1


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int):
    head, encoder = (int(config.training[key] * total_steps)
                     for key in ("head_warmup", "encoder_warmup"))
    is_encoder = [group["name"] != "head" for group in optimizer.param_groups]
    return build_two_warmups(optimizer, is_encoder, total_steps, head, encoder)


def masks_of_step(run: Run, config: Config) -> list[torch.Tensor | None]:
    """What EoMT takes as `shares`: for each joint block the share of queries with a mask."""
    periods = annealing_periods(config.model.joint_blocks, has_rotary(config.model.backbone))
    shares = [mask_probability(run.step / run.total_steps, *period) for period in periods]
    return [torch.full((), share, device=run.device) if share else None for share in shares]


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, normalize, loader, criterion, config: Config) -> None:
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # Numbers of masks and of queries are those of the step.
        counts = sum(criterion.label_weights(batch["label"], config.model.num_queries)
                     for batch in micro_batches)
        counts = all_reduce_sum(counts.to(run.device, non_blocking=True))
        shares = masks_of_step(run, config)
        for batch in micro_steps(network, micro_batches):
            image = normalize(batch["image"].to(run.device, non_blocking=True))    # (B, 3, S, S)
            label = batch["label"].to(run.device, non_blocking=True)
            with run.autocast():
                outputs = network(image, shares)    # (B, Q, C + 1), (B, Q, S/4, S/4), ...
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


def attach_settings(model: EoMT, entry: dict, config: Config, class_names: list[str],
                    palette) -> None:
    photos.attach(model, config, class_names, np.array(palette, np.uint8), masks=config.data,
                  view=photos.evaluation_view(config), multiple=PATCH_SIZE,
                  normalize=build_normalizer(entry["mean"], entry["std"]))


def load_model(checkpoint: dict, device: torch.device) -> EoMT:
    """The network of a checkpoint in eval mode; no other file is needed."""
    config = Config(checkpoint["config"])
    with torch.device("meta"):                      # overwritten by the checkpoint
        model = build_model(config, blank_vit(config.model.backbone, checkpoint["model"]))
    model.to_empty(device="cpu")
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    attach_settings(model, checkpoint["encoder"], config, checkpoint["class_names"],
                    checkpoint["palette"])
    return model.to(device).eval()


def score_released(run: Run, config: Config, given: set[str]) -> dict:
    """Score the network of --network-weights, as it is."""
    split, dataset = photos.tested_split(run, config, given)
    model, entry, lines = open_network(config, run.args)
    print(*lines, sep="\n", flush=True)
    names, palette = read_classes(config.data.classes, config.data.num_classes,
                                  config.data.label_map)
    attach_settings(model, entry, config, names, palette)
    return photos.score_split(run, model.to(run.device).eval(), split, dataset,
                              config.model.network_weights)


# -- main ------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    needed = "--test-only needs a checkpoint (or --network-weights FILE)"
    run = Run(args, SCRIPT, DEFAULTS, args.checkpoint_dir, args.log_dir,
              needs_checkpoint=None if args.network_weights else needed)
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
                       compare=("data", "model", "training"),
                       free=(*photos.FREE_ON_RESUME, "model.network_weights"))

    # model: the backbone and what is trained with it
    if run.checkpoint is None:
        model, entry, messages = open_network(config, args)
        run.messages += messages
    else:
        entry = run.checkpoint["encoder"]
        model = build_model(config, blank_vit(config.model.backbone, run.checkpoint["model"]))
        run.restore(model.to_empty(device="cpu"))
    attach_settings(model, entry, config, class_names, palette)
    network = run.wrap(model)

    # loss, optimiser, schedule
    criterion = build_criterion(config).to(run.device)
    optimizer = build_optimizer(model, config)
    scheduler = build_lr_scheduler(optimizer, config, run.total_steps)
    run.track(config=config, class_names=class_names, palette=palette.tolist(),
              optimizer=optimizer, scheduler=scheduler, save_interval=training.save_interval,
              encoder=entry, ema=None)

    loader = build_loader(train_set, sampler, args.num_workers, run.device)
    licence = "; DINOv3's licence reaches them" if has_rotary(config.model.backbone) else ""
    lines = (photos.describe_data(train_set, val_set),
             f"checkpoints hold the whole network, {describe_parameters(model)}{licence}",
             run.description)
    with run.training(*lines, log_interval=training.log_interval):
        for _ in run.epochs(train_set, sampler):
            train_one_epoch(run, network, model.normalize, loader, criterion, config)
            result = None
            if val_set is not None and run.due(config.evaluation.val_interval):
                result = evaluate(network, val_set, run.device, run.amp_dtype,
                                  num_workers=args.num_workers, limit_batches=args.limit_batches)
            run.end_epoch(result, SHOWN, score="miou")
    return run.summary()


if __name__ == "__main__":
    run_main(main)
