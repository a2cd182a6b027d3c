"""Semantic segmentation of point clouds on Sonata, Concerto or Utonia (Point Transformer V3):
linear probe, decoder, full fine-tuning, LoRA.

    python train_sonata.py configs/sonata/semseg-sonata-v1m1-0a-scannet-lin.yaml \\
        --pretrained_path sonata.pth
    python train_sonata.py CONFIG --pretrained_path sonata.pth --device cpu --limit-batches 2
    python train_sonata.py CONFIG model.mode=ft training.use_pretrained=false        # from scratch
    python train_sonata.py configs/sonata/utonia-scannet.yaml --pretrained_path utonia.pth
    torchrun --nproc_per_node=4 train_sonata.py CONFIG --pretrained_path sonata.pth  # several GPUs
    python train_sonata.py CONFIG --resume auto                               # go on, bit for bit
    python train_sonata.py CONFIG --resume exp/sonata/model/model_best.pth --test-only

Wu et al. 2025 (Sonata, arXiv 2503.16429), as released in Pointcept, in plain PyTorch, with the
weights of its successors too. model.mode: lin trains a linear head on the frozen encoder's
features, dec a decoder on them, ft everything, lora the head and low-rank updates of the encoder's
attention. Validation is scored on raw points; the precise test (--test-only) votes over 13 views
and all fragments. All keys are in DEFAULTS, `section.key=value` changes one. What to expect, every
number logged and every deviation from upstream: docs/sonata.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.label_map import label_map_of
from data.point_classes import BENCHMARKS
from data.point_files import ClassList, find_clouds, list_clouds, read_classes
from data.point_transforms import PointAugmentation
from data.point_values import check_label_settings
from data.points import PointDataset, PointSpec, collate_points, spec_of
from data.upright import UP
from models.point_networks import data_warning, describe_network
from models.point_transformer import MODES, SonataSegmenter, build_segmenter, with_decoder
from models.sonata_weights import guess_config, load_sonata, read_linear_head, read_sonata
from utils.checks import check_names, check_positive
from utils.cli import ArgumentParser, run_main
from utils.config import Config, Required, Setting, command_line_wins, load_config
from utils.device import trim_memory
from utils.distributed import all_reduce_sum, main_first
from utils.losses import MaskedCrossEntropyLoss, class_weights, lovasz_softmax_loss
from utils.metrics import headline, metrics_table
from utils.params import describe_parameters
from utils.point_scripts import (
    OFFICIAL,
    cloud_pictures,
    describe_data,
    describe_steps,
    evaluate_clouds,
    items_of_piece,
    label_cloud_file,
    which_test,
    write_cloud_label,
)
from utils.render import palette
from utils.run import Run, add_run_flags
from utils.schedule import build_scheduler
from utils.training import build_loader, check_same_run, micro_steps, to_device
from utils.weights import load_weights, sha256_file

SCRIPT = Path(__file__).name
# For predict.py, default first.
RESULTS = {"labels": ("npy", "txt"), "picture": ("ply", "none"), "html": False, "tile": True}
SHOWN = {"mIoU": "official_miou", "mIoU of present classes": "miou", "mAcc": "official_accuracy",
         "Acc": "overall_accuracy"}
CLASS_WEIGHTS = "training.class_weights"
COMPARED = ("data", "model", "training", "optimizer", "scheduler", "augmentation")
# steps are compared as well
FREE_ON_RESUME = ("training.resume", "training.use_pretrained", "data.normal_view")

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
        # folder(s) of root, key(s) of root/splits.json, or a .json
        "train": Setting("train", (str, list)),
        "val": Setting("val", (str, list)),
        "test": Setting(None, (str, list)),     # of --test-only and evaluate.py; None: val
        "benchmark": Setting(None, (str,), tuple(BENCHMARKS)),  # class names and label file; or:
        "label_field": Setting(None, (str,)),
        # Of matrices, text and .bin files without names: [x, y, z, r, g, b, label]; _ skips one.
        "columns": [],
        "class_names": [],                      # else from root/classes.json
        # besides those in root/classes.json; nan: NaN means unlabelled
        "ignore_labels": Setting([-1], (list,), items=(int, str)),
        "label_map": Setting(None, (str, dict)),            # 2:0,5:1,7:ignore, or a file
        # Added to the files' labels: -1 where they count from 1.
        "label_offset": Setting(None, (int,)),
        "grid_size": 0.02,                      # metres
        "unit": 1.0,                            # metres of one length unit of the files
        # What metres are multiplied by before voxels are made. Utonia: 0.5 indoors, 0.2 outdoors,
        # object (each cloud to radius 1).
        "scale": Setting(1.0, (float, str)),
        "center": True,                         # false, outdoors: the sensor stays at 0
        # Also height (over the plane most points lie on) and shape (how the surface bends, in
        # neighbourhoods of cells of shape_sizes metres): both from the coordinates. Or any field
        # of the files by its name, divided by a number: intensity/65535.
        "features": ["coord", "color", "normal"],
        "shape_sizes": [0.02, 0.04, 0.08],
        "missing_normal": Setting("estimate", (str,), ("estimate", "zeros", "error")),
        "up": Setting("auto", (str,), UP),                      # the files' up axis; auto: z
        # Estimated normals look to: inside | above | neighbours | [x, y, z], the scanner's place.
        # null: inside, or neighbours where the ground would look down (aerial clouds)
        "normal_view": Setting(None, (str, list), items=(float,)),
        "color_range": Setting(None, (float, list), items=(float,)),    # 255, 1, 65535 or [-1, 1]
        "missing_color": Setting("zeros", (str,), ("zeros", "error")),
        "test_grid_size": Setting(None, (float,)),          # S3DIS: 0.01
    },
    "model": {
        "mode": Setting("lin", (str,), MODES),
        "num_classes": Required((int,), low=1),
        "frozen_eval": False,           # true: no drop path in a frozen encoder; upstream has it
        "encoder": {},                  # the network's arguments, over those in the weights' file
    },
    "training": {
        "epochs": Setting(800, (int,), low=1),              # passes over the training clouds
        "steps": Setting(None, (int,), low=1),              # optimiser steps, in place of epochs
        "eval_epochs": Setting(100, (int,), low=1),         # pieces, each ending with a validation
        "batch_size": Setting(24, (int,), low=1),           # clouds of all processes together
        # Lovasz and Mix3D see one micro-batch: not the big batch
        "accumulation_steps": Setting(1, (int,), low=1),
        "clip_grad": Setting(3.0, (float,), low=0),
        # Of cross entropy: one number per class, or [sqrt_]median_frequency.
        "class_weights": Setting(None, (list, str)),
        # false: a random encoder, in lin, dec and lora a frozen one
        "use_pretrained": Setting(None, (bool,)),
        "resume": False,                                    # the same as --resume auto
    },
    "optimizer": {
        "lr": 0.002,
        "block_lr": 0.0002,
        "weight_decay": Setting(0.02, (float,), low=0),
    },
    "scheduler": {"pct_start": 0.05, "div_factor": 10.0, "final_div_factor": 1000.0},
    "augmentation": {                   # of data/point_transforms.py's PointAugmentation
        **{name: list(value) if isinstance(value, tuple) else value
           for name, value in asdict(PointAugmentation()).items()},
        "elastic": [list(step) for step in PointAugmentation().elastic],
        "crop_share": Setting(None, (float,)),
        "crop_points": Setting(102_400, (int, type(None))),
    },
    "evaluation": {
        "interval": Setting(1, (int,), low=1),
        "precise": True,                # 13 views in --test-only, evaluate.py, predict.py
        # Most passes of each view; more points of a voxel share them. null: one for each
        "max_fragments": Setting(None, (int,), low=1),
    },
    "checkpointing": {"save_interval": Setting(10, (int,), low=0)},
    "logging": {"log_interval": Setting(10, (int,), low=1), "tensorboard": True},
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the config")
    parser.add_argument("--pretrained_path",
                        help="sonata.pth, concerto_large.pth, utonia.pth, a pre-training or a "
                             "downstream run")
    add_run_flags(parser, SCRIPT)
    return parser.parse_args(argv)


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    training = config.training
    for key in ("lr", "block_lr"):
        check_positive(f"optimizer.{key}", config.optimizer[key])
    point_spec(config)
    build_augmentation(config)
    check_label_settings(config.data, config.model.num_classes)
    for key in ("epochs", "steps"):
        wanted = key == "steps" or training.steps is None
        if wanted and (training[key] or 0) % training.eval_epochs:
            raise ValueError(f"training.{key}={training[key]} is no multiple of "
                             f"training.eval_epochs={training.eval_epochs}, the pieces that end "
                             f"with a validation")
    names = check_names("data.class_names", class_names(config))
    if len(names) != config.model.num_classes:
        raise ValueError(f"{len(names)} class names for model.num_classes="
                         f"{config.model.num_classes}; correct data.class_names, data.benchmark or "
                         f"model.num_classes")


def point_spec(config: Config) -> PointSpec:
    return spec_of(config.data)


def build_augmentation(config: Config) -> PointAugmentation:
    settings = config.augmentation
    values = {key: tuple(value) if isinstance(value, list) else value
              for key, value in settings.items()}
    values["elastic"] = tuple(tuple(step) for step in settings.elastic)
    return PointAugmentation(**values)


def class_names(config: Config) -> list[str]:
    data = config.data
    if data.class_names:
        return list(data.class_names)
    if data.benchmark:
        return list(BENCHMARKS[data.benchmark].names)
    mapped = label_map_of(data)
    if mapped is not None and mapped.names is not None:
        return list(mapped.names)
    listed = class_list(config)
    if listed is None:
        return [f"class {c}" for c in range(config.model.num_classes)]
    return list(listed.names)


def class_list(config: Config) -> ClassList | None:
    path = Path(config.data.root) / "classes.json"
    return read_classes(path) if path.is_file() else None


def class_colors(config: Config) -> np.ndarray:
    listed = class_list(config)
    C = config.model.num_classes
    if listed is None or listed.palette is None or len(listed.names) != C:
        return palette(C)
    return listed.palette


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None) -> PointDataset:
    """split train | val | test, or the clouds of `data_dir`, which hold their labels. All but
    "train" are whole."""
    data = config.data
    if label_dir is not None:
        raise ValueError("--label-dir: clouds hold their labels themselves; leave it out")
    if data_dir is not None:
        files = list_inputs(data_dir)
    else:
        if data[split] is None:
            raise ValueError("data.test names no clouds; set data.test=SPLIT, or score the val "
                             "split")
        files = find_clouds(data.root, data[split])
    field = data.label_field
    if field is None and data.benchmark:
        field = BENCHMARKS[data.benchmark].field
    listed = class_list(config)
    ignored = sorted({*data.ignore_labels, *(listed.ignore_labels if listed else ())}, key=str)
    train = split == "train" and data_dir is None
    num_items = items_of_piece(config.training, len(files)) if train else None
    return PointDataset(files, point_spec(config), config.model.num_classes,
                        build_augmentation(config) if train else None, field, tuple(ignored),
                        config.paths.cache_dir, seed, num_items, f"{split} clouds",
                        data.get("label_offset") or 0, label_map_of(data))


def build_model(config: Config, encoder_config: dict) -> SonataSegmenter:
    """encoder_config: the network's arguments as sonata.pth stores them."""
    return build_segmenter(encoder_config, config.model.num_classes, config.model.mode,
                           config.model.frozen_eval)


def open_encoder(config: Config) -> tuple[dict, dict | None]:
    """(the network's arguments, the `encoder` entry of checkpoints or None) of the file in
    paths.checkpoint_pretrain, under model.encoder; without a file model.encoder is all there is.
    Raises ValueError."""
    path = config.paths.checkpoint_pretrain
    given = config.model.encoder.to_dict()
    wanted = config.training.use_pretrained
    entry = None
    if wanted is False or path is None:
        if wanted or (config.model.mode != "ft" and wanted is None):
            raise ValueError(f"model.mode={config.model.mode} needs --pretrained_path FILE "
                             f"(sonata.pth); training.use_pretrained=false takes a random encoder, "
                             f"to compare with")
        if not given:
            raise ValueError("without --pretrained_path the size of the network must be given: set "
                             "model.encoder")
        arguments = given
    else:
        found = read_sonata(path)
        stored = found.config or guess_config(found.state, path)
        if stored.get("enc_mode"):      # an encoder alone: its dec_ keys describe nothing
            stored = {key: value for key, value in stored.items() if not key.startswith("dec_")}
        arguments = {**stored, **given}
        if config.model.mode in ("dec", "ft"):      # recorded: a later default changes nothing
            arguments = with_decoder(arguments)
        entry = {"name": "PointTransformerV3", "file": str(path), "sha256": sha256_file(path),
                 "config": arguments}
    channels = point_spec(config).num_channels
    if arguments.get("in_channels", channels) != channels:
        where = f" in {path}" if entry else " of model.encoder"
        raise ValueError(f"data.features={config.data.features} are {channels} channels, the "
                         f"encoder takes {arguments['in_channels']} (in_channels{where})")
    return arguments, entry


def fill_model(model: SonataSegmenter, config: Config, checkpoint: dict, source) -> str:
    """Load a checkpoint into the model, with the frozen encoder that is not in it; returns a line
    for the log."""
    entry = checkpoint["encoder"]
    own = model.state_dict()
    lines = []
    missing = [name for name in own if name not in checkpoint["model"]]
    if missing and set(missing) != model.frozen_names():
        raise ValueError(f"{source}: {len(missing)} tensors are missing ({missing[0]}, ...); is it "
                         f"of this mode?")
    if missing:
        path = config.paths.checkpoint_pretrain or entry["file"]
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file, but the frozen encoder comes from it; "
                                    f"name its new place: paths.checkpoint_pretrain=FILE (or "
                                    f"--pretrained_path)")
        if sha256_file(path) != entry["sha256"]:
            raise ValueError(f"{path}: not the encoder of {source} (its content differs); name the "
                             f"file of the run: paths.checkpoint_pretrain=FILE")
        lines.append(load_sonata(model.backbone, path))
        own = model.state_dict()
    state = {**{name: own[name] for name in missing}, **checkpoint["model"]}
    lines.append(load_weights(model, state, source, what="model"))
    return "\n".join(lines)


def start_model(run: Run, config: Config, encoder) -> tuple[SonataSegmenter, dict]:
    """The model and its `encoder` entry: from the resumed checkpoint, or else of `encoder`
    (open_encoder's), with pre-trained weights or from scratch."""
    if run.checkpoint is not None:
        entry = run.checkpoint["encoder"]
        model = build_model(config, entry["config"])
        run.messages.append(fill_model(model, config, run.checkpoint, run.resume_path))
        return model, entry
    arguments, entry = encoder
    model = build_model(config, arguments)
    if entry is not None:
        run.messages.append(load_sonata(model.backbone, entry["file"]))
        run.messages += describe_network(entry["config"], config.model.mode)
        warning = data_warning(entry["config"], config.data.grid_size, config.data.scale)
        run.messages += [warning] if warning else []
    else:
        frozen = "" if config.model.mode == "ft" else ", and stays so: a baseline"
        run.messages.append(f"WARNING: the encoder is randomly initialised{frozen}")
        entry = {"name": "PointTransformerV3", "file": None, "sha256": None, "config": arguments}
    if config.paths.head is not None:
        head = {name.removeprefix("seg_head."): value
                for name, value in read_linear_head(config.paths.head).items()}
        run.messages.append(load_weights(model.seg_head, head, config.paths.head, what="head"))
    return model, entry


def parameter_groups(model: SonataSegmenter, config: Config) -> list[dict]:
    """Two rates: parameters of the blocks, and the rest. Decay for all, as upstream. The frozen are
    in neither."""
    trained = [(name, parameter) for name, parameter in model.named_parameters()
               if parameter.requires_grad]
    rest = [parameter for name, parameter in trained if "block" not in name]
    blocks = [parameter for name, parameter in trained if "block" in name]
    groups = [{"params": rest, "name": "rest", "lr": config.optimizer.lr},
              {"params": blocks, "name": "block", "lr": config.optimizer.block_lr}]
    return [group for group in groups if group["params"]]


def compute_loss(criterion, logits, label, weight, share) -> torch.Tensor:
    """Cross entropy over the labelled voxels of the whole step (their number is `weight`) plus
    Lovasz-softmax of this micro-batch, which counts with its `share` of the step."""
    total, _ = criterion.sum_and_weight(logits, label)
    return total / weight.clamp(min=1) + share * lovasz_softmax_loss(logits, label)


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, loader, criterion, clip_grad: float) -> None:
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        weight = sum(criterion.label_weight(batch["label"]) for batch in micro_batches)
        weight = all_reduce_sum(weight.to(run.device, non_blocking=True))
        share = 1 / (run.world * len(micro_batches))
        for batch in micro_steps(network, micro_batches):
            batch = to_device(batch, run.device)
            with run.autocast():
                logits = network(batch)                             # (N, C) float32
            loss = compute_loss(criterion, logits, batch["label"], weight, share)
            run.backward(loss)
            run.totals.matrix.update(logits.argmax(-1), batch["label"])
        run.update(clip_grad)
        if run.step % 10 == 0:
            trim_memory()               # clouds of ever different sizes leave holes in the heap


# -- what evaluate.py and predict.py call ----------------------------------------------------------

evaluate = evaluate_clouds
predict = label_cloud_file
write_prediction = write_cloud_label
example_pictures = cloud_pictures
list_inputs = list_clouds


def has_test_split(config: Config) -> bool:
    return config.data.test is not None


def attach(model: SonataSegmenter, config: Config, names: list[str], colors: np.ndarray) -> None:
    """What evaluation needs besides the weights."""
    model.config = config
    model.spec = point_spec(config)
    model.class_names = names
    model.palette = colors


def load_model(checkpoint: dict, device: torch.device) -> SonataSegmenter:
    """The network of a checkpoint of this script in eval mode. A frozen encoder comes from the file
    it was read from, or from paths.checkpoint_pretrain where that has moved; ValueError where its
    content is another."""
    config = Config(checkpoint["config"])
    model = build_model(config, checkpoint["encoder"]["config"])
    fill_model(model, config, checkpoint, "the checkpoint")
    attach(model, config, checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


def official_mean(result: dict) -> dict:
    return {"official_miou": result["tables"][OFFICIAL]["miou"]}


def test_only(run: Run, config: Config) -> dict:
    """Test a checkpoint (evaluation.precise: 13 views) on the test split, or else on validation."""
    check_same_run(run.checkpoint, config, run.checkpoint["total_steps"], ("model",))
    if config.data.normal_view is None:                     # as it was chosen in training
        config.data.normal_view = run.checkpoint["config"]["data"].get("normal_view")
    run.checkpoint["config"] = config.to_dict()
    model = load_model(run.checkpoint, run.device)
    split = "test" if has_test_split(config) else "val"
    dataset = build_dataset(config, split)
    result = evaluate(model, dataset, run.device, num_workers=run.args.num_workers,
                      limit_batches=run.args.limit_batches)
    official = result["tables"][OFFICIAL]
    run.report(*dataset.notes,
               f"{run.resume_path} on the {split} split, {which_test(config)}, raw points; "
               f"means over the classes that occur:",
               metrics_table(result["metrics"], model.class_names),
               f"over {OFFICIAL}: mIoU {100 * official['miou']:.2f}, mAcc "
               f"{100 * official['mean_accuracy']:.2f}")
    return {**headline(result), **official_mean(result)}


# -- main ------------------------------------------------------------------------------------------

def read_config(args) -> Config:
    """The checked config, with --pretrained_path and training.resume where they belong."""
    config = load_config(args.config, DEFAULTS, args.overrides)
    check_config(config)
    if args.pretrained_path:
        if config.training.use_pretrained is False:
            raise ValueError(f"--pretrained_path {args.pretrained_path}, but "
                             f"training.use_pretrained=false would not read it; leave the flag "
                             f"out, or set training.use_pretrained=true")
        config.paths.checkpoint_pretrain = args.pretrained_path
    if config.training.resume and not args.resume:
        args.resume = "auto"
    return config


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.compile:
        raise ValueError("--compile: every size of cloud would be compiled again, which takes "
                         "longer than it saves; leave it out")
    config = read_config(args)
    training = config.training
    command_line_wins(config, args, "paths.checkpoint_dir", "paths.log_dir")
    run = Run(args, SCRIPT, DEFAULTS, config.paths.checkpoint_dir, config.paths.log_dir)
    if args.test_only:
        return test_only(run, config)
    if training.batch_size % run.world:
        raise ValueError(f"training.batch_size={training.batch_size} clouds cannot be shared among "
                         f"{run.world} processes; take a multiple")
    # A wrong file is reported before the data are read.
    encoder = open_encoder(config) if run.checkpoint is None else None

    # data: rank 0 fills the cache of estimated normals, the others read it
    with main_first():
        train_set = build_dataset(config, "train", args.seed)
        if isinstance(train_set.spec.normal_view, str):
            config.data.normal_view = train_set.spec.normal_view    # chosen once, for all clouds
        val_set = build_dataset(config, "val")
    run.check_data(train=train_set, val=val_set)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size // run.world,
                       epochs=training.eval_epochs, accumulate=training.accumulation_steps,
                       drop_last=True, compare=COMPARED, free=FREE_ON_RESUME,
                       batch_of_all_processes=True)

    # model
    model, encoder_entry = start_model(run, config, encoder)
    attach(model, config, class_names(config), class_colors(config))
    network = run.wrap(model)
    # A frozen encoder that came from a file is not copied into every checkpoint.
    left_out = model.frozen_names() if encoder_entry["file"] else ()

    # loss, optimiser, schedule
    weights = class_weights(training.class_weights, train_set.class_counts, CLASS_WEIGHTS)
    criterion = MaskedCrossEntropyLoss(weights, num_classes=config.model.num_classes)
    criterion.to(run.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config),
                                  weight_decay=config.optimizer.weight_decay)
    scheduler = build_scheduler(optimizer, "onecycle", run.total_steps, **config.scheduler)
    run.track(config=config, class_names=model.class_names, palette=model.palette.tolist(),
              optimizer=optimizer, scheduler=scheduler, leave_out=left_out,
              save_interval=config.checkpointing.save_interval,
              num_classes=config.model.num_classes, encoder=encoder_entry, ema=None)

    collate = partial(collate_points, mix_probability=config.augmentation.mix_probability)
    loader = build_loader(train_set, sampler, args.num_workers, run.device, collate)
    lines = (*describe_data(train_set, val_set, model.class_names),
             *describe_steps(training, train_set, run.total_steps),
             f"mode {config.model.mode}: {describe_parameters(model)}; {run.description}")
    with run.training(*lines, log_interval=config.logging.log_interval,
                      tensorboard=config.logging.tensorboard):
        for _ in run.epochs(train_set, sampler):
            train_one_epoch(run, network, loader, criterion, training.clip_grad)
            result = None
            if run.due(config.evaluation.interval):
                result = evaluate(network, val_set, run.device, num_workers=args.num_workers,
                                  limit_batches=args.limit_batches, precise=False)
            more = official_mean(result) if result else None
            run.end_epoch(result, SHOWN, score="official_miou", more=more)
        run.log.info(f"{which_test(config)}: python evaluate.py {run.folder.model}/model_best.pth")
    return run.summary()


if __name__ == "__main__":
    run_main(main)
