"""Prototype segmentation: a DeepLab v2 whose classes are read off similarities to learned, then to
real, image patches.

    python train_prototype.py configs/prototype_voc.yaml --pretrained_path resnet101-63fe2227.pth
    python train_prototype.py CONFIG model.weights=random --device cpu --limit-batches 10
    python train_prototype.py CONFIG --phase 1            # one phase, from where phase 0 ended
    torchrun --nproc_per_node=4 train_prototype.py CONFIG ...                         # several GPUs
    python train_prototype.py CONFIG --resume auto        # go on, bit for bit, also in the push
    python train_prototype.py CONFIG --resume exp/prototype/model/model_best.pth --test-only
    python train_prototype.py CONFIG --resume exp/prototype/model/model_best.pth --gallery

Sacha et al. 2023 (ProtoSeg), after Chen et al. 2019 (ProtoPNet). Warm-up trains ASPP and
prototypes, joint training everything; the push replaces each prototype by the nearest feature of
its class in the training set; fine-tuning trains the last layer alone; pruning (training.prune)
drops prototypes whose neighbours are of other classes, and fine-tunes again. Steps are micro-steps
of batch_size images, `accumulate` of them make an update. All keys are in DEFAULTS,
`section.key=value` changes one. Every number logged, every deviation from the paper:
docs/prototype.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data.image_splits import (
    checked_dataset,
    folder_pairs,
    given_pairs,
    mask_suffixes,
    training_doubts,
)
from data.images import Augmentation, SegmentationDataset, list_images
from models.deeplab import DeepLabV2, MultiScale, freeze_batch_norm, load_deeplab_weights
from models.ppnet import PPNet, parameter_groups, ppnet_from_state
from utils.checkpoint import find_resume
from utils.cli import ArgumentParser, run_main
from utils.config import Config, Required, Setting, load_config
from utils.distributed import (
    EpochBatchSampler,
    all_reduce_sum,
    broadcast_buffers,
    main_first,
    world_size,
)
from utils.image_inference import TTA_SCALES, View, build_normalizer
from utils.image_scripts import PHOTO_RESULTS, attach, evaluate_photos, photo_pictures
from utils.losses import MaskedCrossEntropyLoss, check_labels, class_weights
from utils.metrics import headline, metrics_table
from utils.prototype_losses import off_class_l1, prototype_divergence, resize_label
from utils.prototype_scripts import (
    DATASETS,
    PHASE,
    SCANS,
    Job,
    Progress,
    check_settings,
    class_list,
    describe_prototypes,
    finish_prune,
    finish_push,
    keep_resumed,
    label_with_distances,
    log_evaluation,
    new_table,
    scan,
    write_explained,
    write_pages,
)
from utils.run import Run, add_run_flags
from utils.schedule import build_scheduler
from utils.training import check_same_run, micro_steps
from utils.weights import sha256_file

SCRIPT = Path(__file__).name
SCAN_CHUNK = 200                        # photographs between two saves of a scan
RESULTS = {**PHOTO_RESULTS, "pca": False, "explain": True}
COMPARED = ("dataset", "model", "training", "optimizer", "loss")
# Items of all processes together are compared as well.
FREE_ON_RESUME = ("model.weights", "dataset.max_pixels", "dataset.cache_dir", "dataset.test_split",
                  "training.prune", "training.patience", "training.resume", "training.batch_size")

DEFAULTS = {
    "dataset": {
        # folder: images/SPLIT and masks/SPLIT
        "name": Setting("folder", (str,), ("folder", *DATASETS)),
        "root": Required((str,)),
        "train_split": "train",
        "val_split": "val",
        "test_split": Setting(None, (str,)),    # of --test-only, evaluate.py; None: they score val
        "push_split": Setting(None, (str,)),    # whose patches become prototypes; None: train_split
        "classes": Setting(None, (str,)),       # folder: classes.json, .txt; None: that of root
        "window_size": [513, 513],              # height and width of a training crop
        "scale_range": [0.5, 1.5],              # times the photograph's own size
        "scale_step": 0.0,                      # 0.25: DeepLab's steps
        "flip": 0.5,                            # probability
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "ignore_label": 255,                    # folder: the masks' value for unlabelled
        "reduce_zero_label": False,             # folder: 0 is unlabelled too, classes count from 1
        "label_map": Setting(None, (str, dict)),    # folder: 0:0,255:1,4:ignore, or a file
        "mask_suffix": Setting([], (list, str)),    # folder: masks are NAME_mask
        "value_range": Setting(None, (list,)),      # black and white of images of more than 8 bits
        "bands": Setting(None, (list,)),        # the three to see, from 1; None: the first
        "max_pixels": Setting(None, (int, float), low=1),   # larger images are refused; None: 179e6
        "cache_dir": Setting(".cache/images", (str, type(None))),   # what the check of files found
    },
    "model": {
        "num_classes": Required((int,), low=1),
        "prototype_shape": [190, 64, 1, 1],     # prototypes of all classes together, channels
        "similarity": Setting("log", (str,), ("log", "linear")),
        "weights": Setting(None, (str,)),       # as --pretrained_path; "random": from scratch
        "n_blocks": [3, 4, 23, 3],              # ResNet-101
        "base_width": Setting(64, (int,), low=1),
        "stride_in_1x1": True,                  # as published; false: as in torchvision's weights
        "scales": [],                           # Pascal VOC: [0.5, 0.75], the maximum over scales
        "freeze_bn": True,              # false: batch norm learns in the joint phase (from scratch)
    },
    "training": {
        "steps": [15_000, 150_000, 10_000],     # micro-steps of the phases; 0 leaves one out
        "batch_size": Setting(2, (int,), low=1),        # images per process and micro-step
        "accumulate": Setting(5, (int,), low=1),        # micro-steps per update
        "train_last_layer": [True, True, True],         # per phase; the paper: [false, false, true]
        "patience": Setting(0, (int,), low=0),  # evaluations of fine-tuning; 0: never ended early
        "prune": False,
        "prune_neighbors": Setting(6, (int,), low=1),
        "prune_threshold": Setting(3, (int,), low=0),   # of them must be of the prototype's class
        "resume": False,                                # the same as --resume auto
    },
    "optimizer": {
        "backbone_lr": 2.5e-5,
        "aspp_lr": 2.5e-4,
        "prototype_lr": 2.5e-4,
        "last_layer_lr": 2.5e-4,                # in phases 0 and 1
        "finetune_lr": 1e-5,
        "weight_decay": Setting(5e-4, (float,), low=0),     # of backbone and ASPP
        "power": 0.9,                           # of the polynomial schedule of the joint phase
    },
    "loss": {
        "ce": Setting(1.0, (float,), low=0),
        "l1": Setting(1e-4, (float,), low=0),
        "kld": Setting(0.25, (float,), low=0),
        "class_weights": Setting(None, (list, str)),    # of ce; or [sqrt_]median_frequency
        # published: off by one class
        "kld_labels": Setting("correct", (str,), ("correct", "published")),
    },
    "evaluation": {
        "interval": Setting(5000, (int,), low=1),       # micro-steps; progress is saved then, too
        "size": Setting(None, (int, type(None)), low=8),        # short side; None: as it is
        "window": Setting(None, (int, type(None)), low=8),      # sliding; None: the whole image
        "squash": Setting(None, (list, type(None))),    # [513, 513]: to that, in any case (VOC)
        "tta": False,
        "interpretability": True,       # evaluate.py: purity, diversity, sparsity, stability
    },
    "logging": {"log_interval": Setting(10, (int,), low=1), "tensorboard": True},       # updates
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the config")
    parser.add_argument("--pretrained_path",
                        help="ResNet or DeepLab weights for the backbone (model.weights)")
    parser.add_argument("--phase", type=int, choices=(0, 1, 2),
                        help="only this phase: warm-up, joint and push, fine-tuning (and pruning); "
                             "from --resume or from where the phase before ended")
    parser.add_argument("--gallery", action="store_true",
                        help="write OUTPUT_DIR/prototypes of --resume and stop")
    add_run_flags(parser, SCRIPT)
    return parser.parse_args(argv)


def read_config(args) -> Config:
    """The checked config, with --pretrained_path and training.resume where they belong. --phase 1
    and 2 start where the phase before ended, unless there is something to resume."""
    config = load_config(args.config, DEFAULTS, args.overrides)
    if args.pretrained_path:
        config.model.weights = args.pretrained_path
    check_config(config)
    if config.training.resume and not args.resume:
        args.resume = "auto"
    if args.phase == 2 or args.phase == 1 and config.training.steps[0]:
        folder = Path(args.output_dir) / "model"
        if find_resume(args.resume, folder, SCRIPT)[0] is None:
            args.resume = folder / f"{('warmup', 'push')[args.phase - 1]}.pth"
            if not args.resume.is_file():
                raise ValueError(f"--phase {args.phase}: there is no {args.resume}; run --phase "
                                 f"{args.phase - 1} first, or name a checkpoint with --resume")
    return config


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    check_settings(config)
    build_augmentation(config).check()
    build_criterion(config, np.ones(config.model.num_classes))


def build_augmentation(config: Config) -> Augmentation:
    """DeepLab's: scale of the photograph itself, crop, mirror image; no colours, any classes in a
    crop."""
    data = config.dataset
    return Augmentation(tuple(data.scale_range), cat_max_ratio=1.0, flip=data.flip, brightness=0.0,
                        contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0.0, scale_of="photo",
                        scale_step=data.scale_step)


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None, num_workers: int = 4) -> SegmentationDataset:
    """split train (random crops) | val | test | push, or the photographs of data_dir with masks in
    label_dir; all but train are whole photographs. Every file is checked once."""
    data = config.dataset
    known = DATASETS.get(data.name)
    if data_dir is not None:
        pairs = given_pairs(data_dir, label_dir, data)
    else:
        names = {"train": data.train_split, "val": data.val_split, "test": data.test_split,
                 "push": data.push_split or data.train_split}
        if names[split] is None:
            raise ValueError("there is no test split: set dataset.test_split, or score the "
                             "validation split")
        pairs = (known.pairs(data.root, names[split]) if known else
                 folder_pairs(data.root, names[split], mask_suffixes(data)))
    train = split == "train"
    return checked_dataset(data, pairs, num_workers, seed, "crops" if train else "whole",
                           build_augmentation(config) if train else None,
                           size=tuple(data.window_size), num_classes=config.model.num_classes,
                           table=known.LABEL_TABLE if known else None)[0]


def build_model(config: Config, state: dict | None = None) -> PPNet:
    """The network from random numbers, or with the tensors of a checkpoint, which may hold fewer
    prototypes."""
    model = config.model
    P, D = model.prototype_shape[:2]
    backbone = DeepLabV2(D, tuple(model.n_blocks), model.base_width, model.stride_in_1x1)
    features = MultiScale(backbone, tuple(model.scales))
    if state is not None:
        return ppnet_from_state(features, state, model.similarity, "the checkpoint")
    return PPNet(features, model.num_classes, P // model.num_classes, D, model.similarity)


def stage_lengths(config: Config, num_images: int, limit: int) -> dict[str, int]:
    """Micro-steps of the training stages and photographs of the scans; 0: the stage is left out."""
    training = config.training
    most = sys.maxsize
    if limit:
        most = -(-limit // training.accumulate) * training.accumulate
    warmup, joint, finetune = (min(steps, most) for steps in training.steps)
    images = min(num_images, limit or num_images)
    return {"warmup": warmup, "joint": joint, "push": images, "finetune": finetune,
            "prune": images if training.prune else 0,
            "refinetune": finetune if training.prune else 0}


def start_stage(name: str, model: PPNet, config: Config, updates: int):
    """Optimiser and schedule of a training stage; only its parameters get a gradient."""
    phase = PHASE[name]
    settings = config.optimizer
    rates = {"backbone": settings.backbone_lr, "aspp": settings.aspp_lr,
             "prototypes": settings.prototype_lr, "last_layer": settings.last_layer_lr}
    if phase == 2:
        rates["last_layer"] = settings.finetune_lr
    groups = parameter_groups(model, phase, rates, settings.weight_decay,
                              config.training.train_last_layer[phase], config.model.freeze_bn)
    optimizer = torch.optim.Adam(groups)
    schedule = "poly" if name == "joint" else "constant"
    return optimizer, build_scheduler(optimizer, schedule, updates, min_lr=0.0,
                                      power=settings.power)


def set_train_mode(model: torch.nn.Module, name: str, config: Config) -> None:
    """Batch norm learns in the joint phase, and only where it is not frozen altogether."""
    model.train()
    if config.model.freeze_bn or name != "joint":
        freeze_batch_norm(model)


def build_criterion(config: Config, counts: np.ndarray) -> MaskedCrossEntropyLoss:
    """counts (C,): training pixels of each class."""
    return MaskedCrossEntropyLoss(class_weights(config.loss.class_weights, counts,
                                                "loss.class_weights"))


def compute_loss(criterion: MaskedCrossEntropyLoss, model: PPNet, outputs, label: torch.Tensor,
                 config: Config) -> dict:
    """This process's part of the terms of a micro-step and of their weighted `total`, a mean over
    the scales.

    Cross entropy is over the labelled cells of each scale's own grid, each with the weight of its
    class, the divergence over the pairs of prototypes, both of all processes together.
    """
    scales = outputs if isinstance(outputs, list) else [outputs]
    published = config.loss.kld_labels == "published"
    terms = {"ce": 0.0, "kld": 0.0}
    for logits, distances in scales:                            # (B, h, w, C), (B, P, h, w)
        cells = resize_label(label, logits.shape[1:3])          # (B, h, w)
        total, weight = criterion.sum_and_weight(logits.float(), cells)
        weight = all_reduce_sum(weight).clamp(min=1e-6)
        terms["ce"] = terms["ce"] + total / weight / len(scales)
        total, pairs = prototype_divergence(distances, cells, model.class_identity, published)
        pairs = all_reduce_sum(pairs.float()).clamp(min=1)
        terms["kld"] = terms["kld"] + total / pairs / len(scales)
    terms["l1"] = off_class_l1(model.last_layer.weight, model.class_identity) / world_size()
    total = sum(config.loss[name] * value for name, value in terms.items())
    return {**terms, "total": total}


# -- the stages ------------------------------------------------------------------------------------

def train_stage(job: Job, name: str) -> None:
    """Warm-up, joint training, fine-tuning or fine-tuning again, with an evaluation every
    evaluation.interval micro-steps."""
    if job.next_stage() != name:
        return
    run = job.run
    length = job.lengths[name]
    interval = job.config.evaluation.interval
    updates = length // job.config.training.accumulate
    run.optimizer, run.scheduler = start_stage(name, job.model, job.config, updates)
    if job.resumed is not None and job.resumed["optimizer"] is not None:
        run.optimizer.load_state_dict(job.resumed["optimizer"])
        run.scheduler.load_state_dict(job.resumed["scheduler"])
    job.resumed = run.checkpoint = None             # which frees it
    network = run.wrap(job.model)
    progress = job.progress
    ended = False
    while not ended:
        started = time.monotonic()
        # A run that was stopped right there still has to evaluate.
        missed_evaluation = progress.done % interval == 0 and run.totals.terms
        end = (progress.done // interval + 1) * interval
        if missed_evaluation:
            end = progress.done
        finished = train_until(job, name, network, min(length, end))
        broadcast_buffers(job.model)
        if not finished:
            job.save()
            job.stop_if_asked(name)
        result = evaluate_stage(job, run.totals.means(), started)
        ended = progress.done == length
        if name in ("finetune", "refinetune") and stops_early(progress, result, job.config):
            run.log.info(f"{name}: the accuracy has not risen for {job.config.training.patience} "
                         f"evaluations, ending it")
            ended = True
        if not ended:
            job.save(result["metrics"]["miou"])
            job.stop_if_asked(name)
    job.end_stage(name, result)


def train_until(job: Job, name: str, network, end: int) -> bool:
    """Updates up to micro-step `end` of the stage; False if stopped, which is between two."""
    run = job.run
    accumulate = job.config.training.accumulate
    set_train_mode(network, name, job.config)
    batches = stage_batches(job, end)
    while group := list(itertools.islice(batches, accumulate)):
        for batch in micro_steps(network, group):
            check_labels(batch["label"], job.config.model.num_classes)      # not on a GPU yet
            image = batch["image"].to(run.device, non_blocking=True)
            label = batch["label"].to(run.device, non_blocking=True)            # (B, H, W)
            with run.autocast():
                outputs = network(job.model.normalize(image))
            losses = compute_loss(job.criterion, job.model, outputs, label, job.config)
            count_cells(run, outputs, label)
            terms = {key: value / accumulate for key, value in losses.items()}
            run.backward(losses["total"] * (1 / accumulate), terms)
        run.update()
        job.progress.done += len(group)
        run.count_step()
        if job.progress.done < end and run.stop_requested():
            return False
    return True


def count_cells(run: Run, outputs, label: torch.Tensor) -> None:
    """Training accuracy and mIoU are over the labelled cells of the finest grid, before the
    update."""
    logits, _ = outputs[-1] if isinstance(outputs, list) else outputs       # (B, h, w, C)
    run.totals.matrix.update(logits.argmax(-1), resize_label(label, logits.shape[1:3]))


def stage_batches(job: Job, end: int):
    """The micro-batches of a stage that are still to do, up to `end`, epoch after epoch. Their
    order depends on (seed, stage, place)."""
    begin = job.progress.done
    while begin < end:
        epoch, first = divmod(begin, len(job.sampler))
        number = job.progress.stage * 1_000_000 + epoch
        job.train_set.set_epoch(number)
        job.sampler.set_epoch(number, first)
        for batch in itertools.islice(job.loader, end - begin):
            yield batch
            begin += 1


def stops_early(progress: Progress, result: dict, config: Config) -> bool:
    """Count the evaluations of a fine-tuning without a better accuracy; True where
    training.patience is reached."""
    accuracy = result["metrics"]["overall_accuracy"]
    progress.waited = 0 if accuracy > progress.best_in_stage else progress.waited + 1
    progress.best_in_stage = max(accuracy, progress.best_in_stage)
    return 0 < config.training.patience <= progress.waited


def scan_stage(job: Job, name: str) -> None:
    """Push or pruning: show all photographs of the push set to a table, saved every SCAN_CHUNK of
    them, then change the model by what it found."""
    if job.next_stage() != name:
        return
    run = job.run
    table = new_table(name, job.model)
    if job.resumed is not None and job.resumed["table"] is not None:
        table.load_state_dict(job.resumed["table"])
    job.resumed = run.checkpoint = None             # which frees it
    run.entries["table"] = table
    started = time.monotonic()
    while job.progress.done < job.lengths[name]:
        end = min(job.lengths[name], (job.progress.done // SCAN_CHUNK + 1) * SCAN_CHUNK)
        job.progress.done = scan(run, job.model, job.push_set, table, job.progress.done, end, name)
        if job.progress.done < job.lengths[name]:
            job.save()
            job.stop_if_asked(name)
    if name == "push":
        lines = finish_push(job.model, table, job.push_set)
    else:
        lines = finish_prune(job.model, table)
    for line in lines:
        run.log.info(line)
    run.keeper.load_state_dict({"score": None, "epoch": None, "top": []})   # another kind of model
    job.end_stage(name, evaluate_stage(job, None, started))


# -- evaluation ------------------------------------------------------------------------------------

def evaluation_view(config: Config) -> View:
    view = config.evaluation
    return View(view.size, view.window, -(-2 * (view.window or 3) // 3),
                TTA_SCALES if view.tta else (1.0,), view.tta)


def evaluate_stage(job: Job, train: dict | None, started: float) -> dict:
    """Score the validation split, and log that with the means of the training since the last
    time."""
    run = job.run
    result = evaluate_photos(job.model, job.val_set, run.device, run.amp_dtype,
                             num_workers=run.args.num_workers,
                             limit_batches=run.args.limit_batches)
    log_evaluation(run, job.progress, train, result, time.monotonic() - started)
    run.numbers = headline(result)
    return result


def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=4, num_workers=0,
             limit_batches=0) -> dict:
    """evaluate_photos, which training calls too; `extra` holds what describes the prototypes, see
    docs/prototype.md, unless evaluation.interpretability is false."""
    result = evaluate_photos(model, dataset, device, amp_dtype, batch_size, num_workers,
                             limit_batches)
    if model.config.evaluation.interpretability:
        result["extra"] = {"prototypes": describe_prototypes(model, dataset, limit_batches)}
    return result


# -- what evaluate.py and predict.py call besides --------------------------------------------------

predict = label_with_distances
write_prediction = write_explained
example_pictures = photo_pictures
list_inputs = list_images


def has_test_split(config: Config) -> bool:
    return config.dataset.test_split is not None


def attach_settings(model: PPNet, config: Config, names: list[str], palette: np.ndarray) -> None:
    """What evaluation needs besides the weights."""
    data = config.dataset
    attach(model, config, names, palette, masks=data, view=evaluation_view(config),
           normalize=build_normalizer(data.mean, data.std))
    model.file_ids = getattr(DATASETS.get(data.name), "LABEL_IDS", None)
    if config.evaluation.squash is not None:
        model.squash = tuple(config.evaluation.squash)


def load_model(checkpoint: dict, device: torch.device) -> PPNet:
    """The network of a checkpoint in eval mode, with as many prototypes as it has left."""
    config = Config(checkpoint["config"])
    model = build_model(config, checkpoint["model"])
    model.provenance = checkpoint["prototypes"]
    attach_settings(model, config, checkpoint["class_names"],
                    np.array(checkpoint["palette"], np.uint8))
    return model.to(device).eval()


# -- set-up and resume -----------------------------------------------------------------------------

def start_model(run: Run, config: Config) -> tuple[PPNet, dict]:
    """The model and its `encoder` entry: resumed, on given weights, or from scratch."""
    if run.checkpoint is not None:
        model = build_model(config, run.checkpoint["model"])
        model.provenance = run.checkpoint["prototypes"]
        return model, run.checkpoint["encoder"]
    weights = config.model.weights
    if weights is None:
        raise ValueError("model.weights (or --pretrained_path) is missing: name a ResNet file such "
                         "as resnet101-63fe2227.pth or a DeepLab file; model.weights=random trains "
                         "from scratch")
    model = build_model(config)
    if weights != "random":
        run.messages.append(load_deeplab_weights(model.features, weights))
        return model, {"name": "DeepLabV2", "file": str(weights), "sha256": sha256_file(weights)}
    frozen = ", and batch norm is frozen: set model.freeze_bn=false"
    run.messages.append(f"WARNING: the backbone is randomly initialised"
                        f"{frozen if config.model.freeze_bn else ''}")
    return model, {"name": "DeepLabV2", "file": None, "sha256": None}


def test_only(run: Run, config: Config) -> dict:
    """Score a checkpoint on the test split, or on validation where there is none; or write its
    pages."""
    args = run.args
    checkpoint = run.checkpoint
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model",),
                   except_keys=FREE_ON_RESUME)
    checkpoint["config"] = config.to_dict()
    model = load_model(checkpoint, run.device)
    if args.gallery:
        if model.provenance is None:
            raise ValueError(f"{run.resume_path}: no patches to show, prototypes not pushed yet")
        push_set = build_dataset(config, "push", num_workers=args.num_workers)
        run.report(f"wrote {write_pages(run, model, push_set)}")
        return {}
    split = "test" if has_test_split(config) else "val"
    dataset = build_dataset(config, split, num_workers=args.num_workers)
    result = evaluate(model, dataset, run.device, run.amp_dtype, num_workers=args.num_workers,
                      limit_batches=args.limit_batches)
    run.report(*dataset.notes, f"{run.resume_path} on the {split} split:",
               metrics_table(result["metrics"], model.class_names))
    return headline(result)


# -- main ------------------------------------------------------------------------------------------

def check_resumed(run: Run, config: Config) -> None:
    """ValueError where the resumed run was another one; pruning may be decided afterwards."""
    if run.checkpoint is None:
        return
    before = run.checkpoint["config"]["training"]["prune"]
    steps = run.total_steps
    if config.training.prune != before:
        steps = run.checkpoint["total_steps"]
    check_same_run(run.checkpoint, config, steps, COMPARED, run.args.seed, FREE_ON_RESUME)


def main(argv=None) -> dict:
    args = parse_args(argv)
    config = read_config(args)
    args.test_only = args.test_only or args.gallery
    needed = "--test-only and --gallery need a checkpoint"
    run = Run(args, SCRIPT, DEFAULTS, needs_checkpoint=needed)
    if args.test_only:
        return test_only(run, config)

    # data: every file is checked before the first step, by rank 0, and remembered
    class_names, palette = class_list(config)
    with main_first():
        datasets = tuple(build_dataset(config, split, args.seed, num_workers=args.num_workers)
                         for split in ("train", "val", "push"))
    train_set, val_set, push_set = datasets
    run.messages += training_doubts(class_names, train_set, val_set, config.dataset)
    sampler = EpochBatchSampler(len(train_set), config.training.batch_size, args.seed,
                                drop_last=True)
    lengths = stage_lengths(config, len(push_set), args.limit_batches)
    run.total_steps = sum(length // config.training.accumulate
                          for name, length in lengths.items() if name not in SCANS)
    run.check_data(train=train_set, val=val_set, push=push_set)
    check_resumed(run, config)

    # model; each training stage has an optimiser of its own
    model, encoder_entry = start_model(run, config)
    attach_settings(model, config, class_names, palette)
    run.model = model.to(run.device)
    criterion = build_criterion(config, train_set.class_counts).to(run.device)
    job = Job(run, model, criterion, datasets, sampler, lengths)
    run.track(config=config, class_names=class_names, palette=palette.tolist(), optimizer=None,
              scheduler=None, save_interval=0, num_classes=len(class_names),
              encoder=encoder_entry, ema=None, table=None)
    run.keeper.counted = "stage"
    with run.lock:
        keep_resumed(run)

    with run.training(*job.describe(), log_interval=config.logging.log_interval,
                      tensorboard=config.logging.tensorboard):
        train_stage(job, "warmup")
        train_stage(job, "joint")
        scan_stage(job, "push")
        train_stage(job, "finetune")
        scan_stage(job, "prune")
        train_stage(job, "refinetune")
        if model.provenance is not None:
            run.log.info(f"all prototypes: {write_pages(run, model, push_set)}")
    summary = run.summary()
    del summary["best_epoch"]           # which counts stages here
    return {**summary, "prototypes": len(model.class_identity)}


if __name__ == "__main__":
    run_main(main)
