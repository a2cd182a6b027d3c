"""Per-face semantic segmentation of triangle meshes: a head on a pre-trained (I-JEPA) mesh encoder.

    python train_downstream.py config.yaml --pretrained_path exp/jepa/model/model_last.pth   # frozen encoder + head
    python train_downstream.py config.yaml                                               # the same network from scratch
    python train_downstream.py config.yaml --device cpu --limit-batches 2 training.epochs=1    # smoke run
    torchrun --nproc_per_node=4 train_downstream.py config.yaml --pretrained_path P            # several GPUs
    python train_downstream.py config.yaml --resume auto                                       # go on, bit for bit
    python train_downstream.py config.yaml --resume exp/downstream/model/model_best.pth --test-only

One config file holds the experiment (configs/mesh_*.yaml; all keys are in DEFAULTS), `section.key=value` changes it.
The encoder is frozen unless training.num_unfrozen_encoder_layers says otherwise, or there is no pre-trained file.
What to expect, every number logged and every deviation from the documents: docs/meshes.md.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from data.mesh import (
    Augmentation,
    CachedFeatures,
    MeshDataset,
    MeshSpec,
    custom_collate_fn,
    feature_statistics,
    hold_out,
    split_meshes,
)
from data.mesh_io import MESH_SUFFIXES, list_meshes, read_mesh
from data.mesh_results import write_mesh_result
from data.mesh_texture import MeshTextureDataset
from models.downstream import DownstreamClassifier
from models.mesh_texture import FUSIONS, IntegratedDownstreamClassifier, IntegratedTextureGeometryModel
from models.nomeformer import Nomeformer
from models.pretrained_mesh import check_features, read_encoder
from utils.checkpoint import (
    CheckpointKeeper,
    EarlyStopping,
    RunFolder,
    check_writable,
    find_resume,
    load_checkpoint,
)
from utils.checks import check_choice, check_names, check_positive
from utils.cli import ArgumentParser, StopRequested, StopSignal, run
from utils.config import Config, Required, Setting, check_range, load_config
from utils.device import amp_settings, autocast, describe, pick_device
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
from utils.ema import EMA
from utils.log import RunLog, progress
from utils.losses import MaskedCrossEntropyLoss
from utils.metrics import ConfusionMatrix, metrics_table, miou_of_each, segmentation_metrics
from utils.params import layerwise_groups
from utils.render import label_colors, palette, pca_colors, render_mesh
from utils.schedule import SCHEDULES, build_scheduler
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
AT_LEAST = {1: ("model.n_classes", "model.embedding_dim", "model.texture_embed_dim", "model.max_texture_pixels",
                "training.epochs", "training.batch_size", "evaluation.views",
                "training.accumulation_steps", "evaluation.interval", "evaluation.batch_size", "logging.log_interval"),
            0: ("training.weight_decay", "training.gradient_clip_val", "early_stopping.patience",
                "checkpointing.save_interval", "checkpointing.save_top_k")}
FREE_ON_RESUME = ("training.batch_size", "training.resume", "training.cache_features")     # steps are compared as well
RESULTS = {"labels": ("txt", "npy"), "picture": ("ply", "glb", "none"), "html": True}   # for predict.py, default first
MONITOR_NAMES = {"mean_f1": "F1", "miou": "mIoU", "overall_accuracy": "accuracy"}

DEFAULTS = {
    "paths": {
        "mesh_dir": Required((str,)),
        "label_dir": Setting(None, (str,)),                 # None: beside the meshes
        "val_mesh_dir": Setting(None, (str,)),              # None: taken out of mesh_dir, see data.val_split
        "val_label_dir": Setting(None, (str,)),
        "test_mesh_dir": Setting(None, (str,)),             # read by --test-only and evaluate.py alone
        "test_label_dir": Setting(None, (str,)),
        "checkpoint_pretrain": Setting(None, (str,)),       # the same as --pretrained_path
        "json_dir": Setting(None, (str,)),                  # not needed: clusters are computed, not read
        "val_json_dir": Setting(None, (str,)),
        "texture_dir": Setting(None, (str,)),               # not needed: a mesh file names its textures
        "val_texture_dir": Setting(None, (str,)),
        "checkpoint_dir": Setting(None, (str,)),            # default OUTPUT_DIR/model
        "log_dir": Setting(None, (str,)),                   # default OUTPUT_DIR/log
        "cache_dir": Setting(".cache/meshes", (str, type(None))),      # prepared meshes; null switches the cache off
    },
    "data": {
        "suffixes": [],                                     # [.obj]: leave other kinds of files in a folder alone
        "test_split": [],                                   # name patterns: kept out of mesh_dir for --test-only
        "val_split": [],                                    # name patterns ("faust_08*") or one number, a share
        "class_names": [],
        "label_offset": 0,                                  # added to the files' values: -1 for files that count from 1
        "ignore_labels": [],                                # the files' values for "not labelled", such as 255
        "label_kind": Setting("auto", (str,), ("auto", "face", "polygon", "vertex", "edge")),
    },
    "model": {
        "n_classes": Required((int,)),
        "features": ["corners", "normal", "area", "angles", "curvature", "dihedral"],
        "feature_dim": Setting(None, (int,)),               # only checked against the features
        "embedding_dim": 96,
        "num_heads": 4,
        "num_attention_blocks": 6,
        "mlp_ratio": 2.0,
        "dropout": 0.1,                                     # of the head
        "encoder_dropout": 0.0,
        "drop_path": 0.1,
        "use_pe": True,                                     # position codes
        "head": Setting("mlp", (str,), ("mlp", "linear")),
        "faces_per_cluster": 32,
        "n_clusters": Setting(None, (int,)),
        "clustering": Setting("bisection", (str,), ("bisection", "connected", "fps")),
        "unit": Setting(None, (float,)),                    # metres per length unit (10 for houses)
        "gradient_checkpointing": False,                    # less memory, a third more time
        "include_normals": Setting(None, (bool,)),          # with or without "normal", whatever features says
        "additional_geometrical_features": Setting(None, (bool,)),      # the same for "ground"
        "num_attention_blocks_predictor": Setting(None, (int,)),        # train_jepa.py's
        "use_texture": False,                               # colours of the faces beside their geometry
        "texture_embed_dim": 32,
        "fusion_method": Setting("gated", (str,), FUSIONS),
        "max_texture_pixels": 16,                           # texture samples a face
        "texture_patch_size": Setting(None, (int,)),        # not needed: samples are single points
    },
    "masking": {},                                          # train_jepa.py's, so that one file can serve both scripts
    "loss": {},
    "training": {
        "epochs": 50,
        "batch_size": 8,                                    # meshes (or crops) per process and micro-step
        "clusters_per_batch": Setting(None, (int,)),        # crops of that many clusters, for large meshes
        "accumulation_steps": 1,
        "num_unfrozen_encoder_layers": Setting(0, (int, str)),      # 0 | k | all; without a pre-trained file: all
        "use_pretrained": Setting(None, (bool,)),           # true: refuse to start without a file; false: ignore it
        "resume": False,                                    # the same as --resume auto
        "weight_decay": 0.05,
        "layer_wise_lr_decay": [1.0, 1.0],                  # head rate x first, each block nearer the input / second
        "use_ema": True,
        "ema_decay": 0.998,
        "gradient_clip_val": 1.0,
        "label_smoothing": 0.0,
        "ignore_index": Setting(None, (int,)),              # one more value of data.ignore_labels
        "cache_features": False,                            # frozen encoder without augmentation: embed every face once
    },
    "optimizer": {
        "type": Setting("adamw", (str,), ("adamw",)),
        "learning_rate": 1e-3,
        "warmup": Setting(None, (float,)),                  # epochs; the same as scheduler.warmup_epochs
        "start_lr": Setting(None, (float,)),                # rate at the first step; None: a hundredth
    },
    "scheduler": {"name": Setting("cosine", (str,), SCHEDULES), "warmup_epochs": 2.0, "min_lr": 1e-6},
    "class_weights": {"class_percentages": []},             # share of each class; weights 1 / share, mean 1
    "augmentation": {
        "mode": Setting("none", (str,), ("none", "z", "so3")),
        "rotation_range": [-180.0, 180.0],
        "scale_range": [1.0, 1.0],
        "deformation": 0.0,
        "noise_std": 0.0,
        "hks_noise": 0.0,
        "flip_probability": 0.0,
        "recluster": False,
        "cluster_dropout": 0.0,
        "color_jitter": 0.0,
    },
    "evaluation": {
        "views": 1,                                         # average over that many rotations and clusterings
        "interval": 1,                                      # epochs
        "monitor": Setting("mean_f1", (str,), tuple(MONITOR_NAMES)),
        "batch_size": 8,
    },
    "checkpointing": {"save_interval": 5, "save_top_k": 0},
    "early_stopping": {"patience": 0},                      # evaluations without improvement; 0 = never
    "logging": {"log_interval": 20, "tensorboard": True},
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    # data
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--num-workers", type=int, default=2, help="loader processes; 0 loads in the main process")
    # model
    parser.add_argument("--pretrained_path", help="encoder: train_jepa.py's, a state dict, or a downstream checkpoint")
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
    check_positive("optimizer.learning_rate", config.optimizer.learning_rate)
    check_range("model.dropout", config.model.dropout, 0, 1)
    for suffix in config.data.suffixes:
        check_choice("data.suffixes", suffix, MESH_SUFFIXES)
    if config.data.test_split and config.paths.test_mesh_dir:
        raise ValueError("data.test_split and paths.test_mesh_dir both say what the test meshes are; give one of them")
    augmentation(config)
    spec = mesh_spec(config)
    if "ground" in spec.features and config.augmentation.mode == "so3":
        raise ValueError("the feature ground needs meshes whose z axis points up: set augmentation.mode to z or none")
    if config.model.feature_dim not in (None, spec.feature_dim):
        raise ValueError(f"model.feature_dim={config.model.feature_dim}, but model.features {list(spec.features)} are "
                         f"{spec.feature_dim} wide; correct one of them (feature_dim may be left out)")
    names, weights = check_names("data.class_names", config.data.class_names), config.class_weights.class_percentages
    for key, values in (("data.class_names", names), ("class_weights.class_percentages", weights)):
        if values and len(values) != config.model.n_classes:
            raise ValueError(f"{key} has {len(values)} entries for model.n_classes={config.model.n_classes}; "
                             f"give one per class")
    if weights and min(weights) <= 0:
        raise ValueError(f"class_weights.class_percentages: {min(weights)} is not above 0; give classes without faces "
                         f"a small value")
    unfrozen = config.training.num_unfrozen_encoder_layers
    if isinstance(unfrozen, str) and unfrozen != "all":
        raise ValueError(f"training.num_unfrozen_encoder_layers={unfrozen!r}: expected a number of blocks or all")
    rates = config.training.layer_wise_lr_decay
    if len(rates) != 2 or min(rates) <= 0:
        raise ValueError(f"training.layer_wise_lr_decay={rates}: expected [head factor, decay per block], as [10, 2]")


def mesh_spec(config: Config) -> MeshSpec:
    model, features = config.model, list(config.model.features)
    for name, wanted in (("normal", model.include_normals), ("ground", model.additional_geometrical_features)):
        if wanted is not None:
            features = [feature for feature in features if feature != name] + [name] * wanted
    return MeshSpec(features=tuple(features), faces_per_cluster=model.faces_per_cluster, n_clusters=model.n_clusters,
                    clustering=model.clustering, clusters_per_batch=config.training.clusters_per_batch,
                    unit=model.unit)


def augmentation(config: Config) -> Augmentation:
    return Augmentation(**{key: tuple(value) if isinstance(value, list) else value
                           for key, value in config.augmentation.items()})


def class_names(config: Config) -> list[str]:
    return list(config.data.class_names) or [f"class {c}" for c in range(config.model.n_classes)]


def split_files(config: Config, split: str) -> tuple[list[Path], str]:
    """Mesh files and label folder of train | val | test."""
    paths, data = config.paths, config.data
    for name, mesh_dir, label_dir in (("val", paths.val_mesh_dir, paths.val_label_dir),
                                      ("test", paths.test_mesh_dir, paths.test_label_dir)):
        if split == name and mesh_dir is not None:
            return list_meshes(mesh_dir, data.suffixes), label_dir or mesh_dir
    files, held_out = hold_out(list_meshes(paths.mesh_dir, data.suffixes), data.test_split)
    if split == "test":
        if not held_out:
            raise ValueError("there is no test split: set paths.test_mesh_dir (and paths.test_label_dir) or "
                             "data.test_split")
        files = held_out
    elif paths.val_mesh_dir is None:
        files = split_meshes(files, data.val_split)[0 if split == "train" else 1]
    return files, paths.label_dir or paths.mesh_dir


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None) -> MeshDataset:
    """split train | val | test, or the meshes of `data_dir`. All but "train" give every face exactly once a view."""
    if data_dir is not None:
        files, label_dir = list_meshes(data_dir, config.data.suffixes), label_dir or data_dir
    else:
        files, label_dir = split_files(config, split)
    ignore = list(config.data.ignore_labels)
    if config.training.ignore_index is not None:
        ignore.append(config.training.ignore_index)
    return make_dataset(config, files, label_dir, config.model.n_classes, augmentation(config),
                        views=0 if split == "train" else config.evaluation.views, label_offset=config.data.label_offset,
                        ignore_labels=ignore, label_kind=config.data.label_kind, seed=seed,
                        description=f"{split} meshes")


def make_dataset(config: Config, files: list[Path], label_dir: str | None, *args, **options) -> MeshDataset:
    """The meshes with texture where the config wants it; without labels where label_dir is None."""
    options["cache_dir"], spec = config.paths.cache_dir, mesh_spec(config)
    if config.model.use_texture:
        return MeshTextureDataset(files, label_dir, spec, *args, **options,
                                  texture_samples=config.model.max_texture_pixels)
    return MeshDataset(files, label_dir, spec, *args, **options)


def build_model(config: Config, unfrozen_layers: int | str) -> DownstreamClassifier:
    model = config.model
    sizes = (mesh_spec(config).feature_dim, model.embedding_dim, model.num_heads, model.num_attention_blocks,
             model.mlp_ratio, model.encoder_dropout, model.drop_path, model.use_pe, model.gradient_checkpointing)
    if not model.use_texture:
        return DownstreamClassifier(Nomeformer(*sizes), model.n_classes, model.head, model.dropout, unfrozen_layers)
    encoder = IntegratedTextureGeometryModel(*sizes, texture_embed_dim=model.texture_embed_dim,
                                             fusion=model.fusion_method)
    return IntegratedDownstreamClassifier(encoder, model.n_classes, model.head, model.dropout, unfrozen_layers)


def load_pretrained(model: DownstreamClassifier, path: str, spec: MeshSpec) -> tuple[dict, str]:
    """Fill the encoder from a file, whole or not at all. Returns the checkpoint's `encoder` entry and a log line."""
    state, layout, feature_spec = read_encoder(path)
    check_features(feature_spec, spec.features, path, model.encoder.blocks[0].local_layer.attn.num_heads)
    own = model.encoder.state_dict()
    fresh = {} if any(name.startswith("texture_") for name in state) else \
        {name: tensor for name, tensor in own.items() if name.startswith("texture_")}
    line = load_weights(model.encoder, {**fresh, **state}, path, layout=layout)
    if fresh:
        line += f"; {len(fresh)} of them, the texture's, are not in the file and start afresh"
    return {"name": type(model.encoder).__name__, "file": str(path), "sha256": sha256_file(path)}, line


def parameter_groups(model: DownstreamClassifier, config: Config) -> list[dict]:
    depth, (head_multiplier, decay) = len(model.encoder.blocks), config.training.layer_wise_lr_decay

    def layer_id(name):
        if name.startswith(("head.", "encoder.texture_")):
            return depth + 2
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return depth + 1 if name.startswith("encoder.norm.") else 0

    return layerwise_groups(model, config.optimizer.learning_rate, config.training.weight_decay, layer_id, depth + 2,
                            layer_decay=1 / decay, head_lr_mult=head_multiplier)


def make_scheduler(optimizer, config: Config, total_steps: int):
    warmup_epochs = config.scheduler.warmup_epochs if config.optimizer.warmup is None else config.optimizer.warmup
    warmup = min(round(warmup_epochs * total_steps / config.training.epochs), total_steps - 1)
    start = 0.01 if config.optimizer.start_lr is None else config.optimizer.start_lr / config.optimizer.learning_rate
    return build_scheduler(optimizer, config.scheduler.name, total_steps,
                           0 if config.scheduler.name == "onecycle" else warmup, config.scheduler.min_lr,
                           start_factor=start)


def make_criterion(config: Config, device: torch.device) -> MaskedCrossEntropyLoss:
    weight = None
    if config.class_weights.class_percentages:
        weight = 1 / torch.tensor(config.class_weights.class_percentages, dtype=torch.float32)
        weight = weight / weight.mean()
    return MaskedCrossEntropyLoss(weight, label_smoothing=config.training.label_smoothing).to(device)


def forward(model: nn.Module, batch: dict) -> torch.Tensor:
    """Logits (B, N, F, C) of a collated batch, on the embeddings where they were computed before."""
    return model(batch.get("features"), batch["mask"], batch.get("centroid"), embedding=batch.get("embedding"),
                 **texture_of(batch))


def texture_of(batch: dict) -> dict:
    return {name: batch[name] for name in ("texture_sequences", "texture_masks") if name in batch}


def to_device(batch: dict, device: torch.device) -> dict:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


# -- one epoch, one evaluation -----------------------------------------------------------------------------------------

def train_one_epoch(model, loader, criterion, optimizer, scheduler, scaler, ema, totals, state, config, args, device,
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
        # The loss is the mean over all valid faces of the step, whatever the number of micro-batches and processes.
        weight = all_reduce_sum(sum(criterion.label_weight(b["label"], b["mask"]) for b in micro_batches).to(device))
        loss_sum = torch.zeros((), device=device)
        for batch in micro_steps(model, micro_batches):
            batch = to_device(batch, device)
            with autocast(device, amp_dtype):
                logits = forward(model, batch)                                   # (B, N, F, C)
            loss, _ = criterion.sum_and_weight(logits, batch["label"], batch["mask"])
            scaler.scale(loss * world / weight.clamp(min=1e-12)).backward()      # DDP takes the mean over the ranks
            loss_sum += loss.detach()
            totals.matrix.update(logits.argmax(-1), batch["label"])
        optimizer_step(optimizer, scheduler, scaler, config.training.gradient_clip_val)
        if ema is not None:
            ema.update(model)
        totals.add(loss_sum, weight)
        state["step"] += 1
        state["batch"] += len(micro_batches)
        micro_batches = []
        if state["step"] % config.logging.log_interval == 0:                     # the only place that waits for the GPU
            mean = (all_reduce_sum(loss_sum) / weight.clamp(min=1e-12)).item()
            if not np.isfinite(mean):
                raise FloatingPointError(f"the loss is {mean} at step {state['step']} (learning rate "
                                         f"{scheduler.get_last_lr()[-1]:.2e}); lower optimizer.learning_rate or use "
                                         f"--amp-dtype float32; {args.output_dir} holds the last good checkpoint")
            log.train_step(state["step"], loss=mean, lr=scheduler.get_last_lr()[-1])
        if all_agree_max(stop.requested or 0):
            return False
        if args.limit_batches and state["batch"] >= args.limit_batches:
            break
    return True


@torch.no_grad()
def mesh_probabilities(model, dataset, device, amp_dtype=None, batch_size=8, num_workers=0, limit_batches=0,
                       criterion=None):
    """Yield (index, probability (F, C) in file order, loss sum, loss weight) of every mesh of this process's share.

    The probability is the mean over the views of the mesh; the loss is that of the first view.
    """
    model.eval()
    mine = set(shard_indices(len(dataset.files), this_rank(), world_size()))
    items = [item for item, (index, _, _) in enumerate(dataset.items) if index in mine]
    loader = DataLoader(Subset(dataset, items), batch_size, collate_fn=custom_collate_fn, num_workers=num_workers,
                        worker_init_fn=seed_worker, generator=torch.Generator())
    current, done = None, 0
    for number, batch in enumerate(progress(loader, "evaluating")):
        if limit_batches and number >= limit_batches:
            break
        batch = to_device(batch, device)
        with autocast(device, amp_dtype):
            logits = forward(model, batch).float()                               # (B, N, F, C)
        probabilities, face_index, mask = logits.softmax(-1).cpu(), batch["face_index"].cpu(), batch["mask"].cpu()
        for b, index in enumerate(batch["index"].tolist()):
            if current is None or index != current[0]:
                if current is not None:
                    yield finished(current)
                current = [index, torch.zeros(dataset.num_faces[index], model.num_classes), 0.0, 0.0]
            current[1][face_index[b][mask[b]]] += probabilities[b][mask[b]]      # a mesh's items are consecutive
            if criterion is not None and dataset.items[items[done]][1] == 0:
                part = criterion.sum_and_weight(logits[b], batch["label"][b], batch["mask"][b])
                current[2], current[3] = current[2] + part[0].item(), current[3] + part[1].item()
            done += 1
    if current is not None:
        yield finished(current)


def finished(current):
    index, total, loss, weight = current
    return index, total / total.sum(1, keepdim=True).clamp(min=1e-12), loss, weight


def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=8, num_workers=0, limit_batches=0,
             criterion=None) -> dict:
    """Score every face of a data set exactly once; used in training, by --test-only and by evaluate.py.

    Returns metrics (by number of faces, the headline), tables {"by area": metrics by surface}, loss (per face, first
    view), matrix, examples [(index, name, mIoU)] and predictions {index: (F,) int64 in file order} of this process,
    and seconds.
    """
    started, model = time.monotonic(), unwrap(model)
    device = device or next(model.parameters()).device
    criterion = criterion or make_criterion(model.config, device)
    C, loss, weight, pairs, predictions = model.num_classes, 0.0, 0.0, [], {}
    for index, probability, loss_sum, loss_weight in mesh_probabilities(model, dataset, device, amp_dtype, batch_size,
                                                                        num_workers, limit_batches, criterion):
        pred, label = probability.argmax(1).numpy(), dataset.labels[index]                  # (F,), (F,)
        predictions[index] = pred
        loss, weight = loss + loss_sum, weight + loss_weight
        pairs.append(np.bincount((label * C + pred)[label >= 0], minlength=C * C).reshape(C, C))
    # Counted all at once: a call per mesh would cost a tenth of the time of small meshes.
    by_count, by_area = ConfusionMatrix(C), ConfusionMatrix(C)
    examples = []
    if predictions:
        examples = [(index, dataset.files[index].stem, float(score))
                    for index, score in zip(predictions, miou_of_each(np.stack(pairs)), strict=True)]
        pred, label = (torch.from_numpy(np.concatenate([values[index] for index in predictions]))
                       for values in (predictions, dataset.labels))
        by_count.update(pred, label)
        area = np.concatenate([dataset.mesh(index).area for index in predictions])
        by_area.update(pred, label, torch.from_numpy(area))
    matrix, area_matrix = by_count.all_reduce().matrix(), by_area.all_reduce().matrix()
    return {"metrics": segmentation_metrics(matrix), "tables": {"by area": segmentation_metrics(area_matrix)},
            "loss": all_reduce_sum(loss) / max(all_reduce_sum(weight), 1e-12), "matrix": matrix,
            "examples": examples, "predictions": predictions, "seconds": time.monotonic() - started}


def log_epoch(log: RunLog, state: dict, train: dict, result: dict | None, seconds: float) -> None:
    """An epoch on the console, in log.jsonl and in TensorBoard; result None: an epoch without evaluation."""
    line = (f"Epoch {state['epoch']}: Train Loss: {train['loss']:.4f}, Train Acc: {train['overall_accuracy']:.4f}, "
            f"Train F1: {train['mean_f1']:.4f}")
    log.evaluation(state["epoch"], state["step"], "train", train)
    splits = {"train": train}
    if result is None:
        log.info(f"{line} ({seconds:.2f} s)")
    else:
        val, area = result["metrics"], result["tables"]["by area"]
        log.info(f"{line}\n          Val Loss: {result['loss']:.4f}, Val Acc: {val['overall_accuracy']:.4f}, "
                 f"Val F1: {val['mean_f1']:.4f}, Val mIoU: {val['miou']:.4f}, by area: Acc "
                 f"{area['overall_accuracy']:.4f}, mIoU {area['miou']:.4f} ({seconds:.2f} s, evaluation "
                 f"{result['seconds']:.2f} s)")
        splits["val"] = {**val, "loss": result["loss"]}
        log.evaluation(state["epoch"], state["step"], "val", {
            **splits["val"], **{f"area_{key}": value for key, value in area.items()}})
    for split, metrics in splits.items():
        log.scalars(state["step"], {f"{name}/{split}": metrics[key] for name, key in (
            ("Loss", "loss"), ("F1", "mean_f1"), ("Accuracy", "overall_accuracy"))})


# -- what evaluate.py and predict.py call ------------------------------------------------------------------------------

list_inputs = list_meshes                                   # the files of a folder that predict can read


def has_test_split(config: Config) -> bool:
    return config.paths.test_mesh_dir is not None or bool(config.data.test_split)


def load_model(checkpoint: dict, device: torch.device) -> DownstreamClassifier:
    """The network of a checkpoint of this script, with its averaged weights where it has them, in eval mode.

    `config`, `spec`, `class_names` and `palette` of the checkpoint become its attributes."""
    config = Config(checkpoint["config"])
    model = build_model(config, checkpoint["unfrozen_layers"])
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    if checkpoint.get("ema") is not None:
        average = EMA(model)
        average.load_state_dict(checkpoint["ema"])
        average.copy_to(model)
    model.config, model.spec, trained_on = config, mesh_spec(config), checkpoint["spec"]["features"]
    if sorted(model.spec.features) != sorted(trained_on):
        raise ValueError(f"model.features is {list(model.spec.features)}, but the network was trained on "
                         f"{list(trained_on)}; use those")
    model.class_names, model.palette = checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8)
    return model.to(device).eval()


def predict(model: DownstreamClassifier, path: str | Path, amp_dtype=None) -> dict:
    """Label a mesh file: label and confidence (P,) for the face lines of the file, in its order (a quad has one label,
    that of its triangles together), and for drawing vertices (V, 3), faces (F, 3) and their face_label (F,)."""
    device, mesh = next(model.parameters()).device, read_mesh(path)
    dataset = make_dataset(model.config, [path], None, augmentation=augmentation(model.config),
                           views=model.config.evaluation.views, read=lambda _: mesh)
    if model.config.model.use_texture and not dataset.num_colored:
        print(f"{path}: no face has a texture or a colour; labelled by geometry alone", flush=True)
    (_, probability, _, _), = mesh_probabilities(model, dataset, device, amp_dtype, batch_size=1)
    line = torch.arange(len(mesh.faces)) if mesh.polygon is None else torch.from_numpy(mesh.polygon)
    total = torch.zeros(int(line[-1]) + 1, model.num_classes).index_add_(0, line, probability)
    confidence, label = (total / torch.bincount(line)[:, None].clamp(min=1)).max(1)
    return {"label": label.numpy(), "confidence": confidence.numpy(), "vertices": mesh.vertices, "faces": mesh.faces,
            "face_label": label[line].numpy()}


def write_prediction(model: DownstreamClassifier, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM.*, labels in the numbers of the training labels' files."""
    colors = {"": label_colors(prediction["face_label"], model.palette)}
    if options.pca:
        colors["_pca"] = pca_colors(embed_mesh(model, path))
    return write_mesh_result(stem, prediction, colors, options.labels, options.picture, options.html,
                             model.config.data.label_offset)


def example_pictures(model: DownstreamClassifier, dataset: MeshDataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction (F,), of one mesh."""
    mesh, label = dataset.mesh(index), dataset.labels[index]
    up = "z" if model.spec.unit else "auto"
    truth, drawn = (render_mesh(mesh.vertices, mesh.faces, label_colors(values, model.palette), up=up)
                    for values in (label, pred))
    return (truth if (label >= 0).any() else None), drawn


@torch.no_grad()
def embed_mesh(model: DownstreamClassifier, path: str | Path) -> np.ndarray:
    """The encoder's embedding (F, E) float32 of every face of a mesh file, in file order."""
    dataset = make_dataset(model.config, [path], None, views=1)
    out = np.zeros((dataset.num_faces[0], model.encoder.embed_dim), np.float32)
    for item in range(len(dataset)):
        batch = to_device(custom_collate_fn([dataset[item]]), next(model.parameters()).device)
        embedding = model.embed(batch["features"], batch["mask"], batch["centroid"], **texture_of(batch))
        out[batch["face_index"][batch["mask"]].cpu().numpy()] = embedding[batch["mask"]].float().cpu().numpy()
    return out


# -- set-up and resume -------------------------------------------------------------------------------------------------

def count_steps(config, args, train_set) -> tuple[int, EpochBatchSampler]:
    """Optimiser steps of the whole run, and the sampler."""
    accumulate = config.training.accumulation_steps
    sampler = EpochBatchSampler(len(train_set), config.training.batch_size, args.seed, group=accumulate)
    batches = min(len(sampler), args.limit_batches or len(sampler))
    return config.training.epochs * -(-batches // accumulate), sampler


def prepare_model(args, config, checkpoint, resume_path, train_set, messages):
    """(model, its `encoder` entry in checkpoints, unfrozen layers): filled from the resumed checkpoint, with the
    pre-trained encoder, or as it starts from scratch."""
    pretrained = args.pretrained_path or config.paths.checkpoint_pretrain
    if config.training.use_pretrained and not pretrained:
        raise ValueError("training.use_pretrained is true, but there is neither --pretrained_path nor "
                         "paths.checkpoint_pretrain")
    if config.training.use_pretrained is False:
        pretrained = None
    unfrozen = config.training.num_unfrozen_encoder_layers if pretrained else "all"
    if config.training.use_pretrained is False and config.training.num_unfrozen_encoder_layers == 0:
        unfrozen = 0                                        # the frozen random encoder, the baseline of every probe
    if checkpoint is not None:
        unfrozen = checkpoint["unfrozen_layers"]
    model, encoder_entry = build_model(config, unfrozen), None
    if checkpoint is not None:
        messages.append(load_weights(model, checkpoint["model"], resume_path, what="model"))
        encoder_entry = checkpoint["encoder"]
        before = encoder_entry or {"file": "no file", "sha256": None}
        if args.pretrained_path and Path(args.pretrained_path).is_file() \
                and sha256_file(args.pretrained_path) != before["sha256"]:
            raise ValueError(f"--pretrained_path {args.pretrained_path}: the run in {resume_path} started from "
                             f"{before['file']} with other content; leave the flag out to go on with that run, or "
                             f"--resume to start afresh in another --output-dir")
    elif pretrained:
        encoder_entry, line = load_pretrained(model, pretrained, train_set.spec)
        messages.append(line)
    else:
        model.encoder.feature_mean[:], model.encoder.feature_std[:] = feature_statistics(train_set)
    return model, encoder_entry, unfrozen


def cache_features(config, model, train_set, val_set, amp_dtype, messages):
    """Replace both data sets by their embeddings where training.cache_features asks for it."""
    if not config.training.cache_features:
        return train_set, val_set
    if not model.encoder_is_frozen:
        raise ValueError("training.cache_features needs a frozen encoder without texture: set "
                         "training.num_unfrozen_encoder_layers=0 and give a --pretrained_path")
    device = next(model.parameters()).device
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in model.encoder.state_dict().values())
    heads = model.encoder.blocks[0].local_layer.attn.num_heads
    key = hashlib.sha256(weights + f"{heads} {device.type} {amp_dtype}".encode()).hexdigest()

    def embed(batch):
        with autocast(device, amp_dtype):                   # as in training: the embeddings are the same to the bit
            return model.embed(*(batch[name].to(device) for name in ("features", "mask", "centroid")))

    started, cached = time.monotonic(), []
    for turn in (True, False):                              # rank 0 computes, the others read
        if is_main() == turn:
            for dataset in (train_set, val_set):
                cached.append(CachedFeatures(dataset, embed, key, config.paths.cache_dir))
        barrier()
    seconds, stored = time.monotonic() - started, cached[0].was_stored
    messages.append(f"cached features: {sum(map(len, cached))} items {'read' if stored else 'embedded'} in "
                    f"{seconds:.1f} s{'' if stored else ', about what every epoch saves'}; the encoder "
                    f"does not run again")
    return cached


def describe_run(config, args, model, train_set, val_set, device) -> tuple[str, str]:
    sizes = [[parameter.numel() for parameter in model.parameters() if parameter.requires_grad >= wanted]
             for wanted in (False, True)]
    batch = config.training.batch_size * config.training.accumulation_steps * world_size()
    faces = [sum(data.num_faces) for data in (train_set, val_set)]
    texture = "".join(f", {data.num_colored / count:.1%} of the {name} faces have a texture or a colour"
                      for name, data, count in zip(("training", "validation"), (train_set, val_set), faces, strict=True)
                      if config.model.use_texture)
    return (f"{len(train_set.files)} training and {len(val_set.files)} validation meshes, "
            f"{faces[0]:,} and {faces[1]:,} faces{texture}",
            f"{sum(sizes[0]):,} parameters, {sum(sizes[1]):,} trained; effective batch {batch} on {describe(device)}, "
            f"seed {args.seed}")


def headline(result: dict) -> dict:
    """What main returns of an evaluation: the single numbers by count of faces, and the loss."""
    return {**{key: value for key, value in result["metrics"].items() if isinstance(value, float)},
            "loss": result["loss"]}


def test_only(args, config, checkpoint, path, device, amp_dtype) -> dict:
    """Score a checkpoint on the test split, or the validation split where there is none."""
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model",))
    model = load_model(checkpoint, device)
    split = "test" if has_test_split(config) else "val"
    result = evaluate(model, build_dataset(config, split), device, amp_dtype, config.evaluation.batch_size,
                      args.num_workers, args.limit_batches)
    if is_main():
        area = result["tables"]["by area"]
        print(f"{path} on the {split} split, by number of faces:\n"
              f"{metrics_table(result['metrics'], model.class_names)}\n"
              f"by area: accuracy {100 * area['overall_accuracy']:.2f}, mIoU {100 * area['miou']:.2f}", flush=True)
    cleanup()
    return headline(result)


# -- main --------------------------------------------------------------------------------------------------------------

def main(argv=None) -> dict:
    args = parse_args(argv)
    check_range("--limit-batches", args.limit_batches, 0)
    check_range("--num-workers", args.num_workers, 0)
    config = load_config(args.config, DEFAULTS, args.overrides)
    check_config(config)
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
        return test_only(args, config, checkpoint, resume_path, device, amp_dtype)
    check_writable(folder.model, folder.log, folder.config)

    # data: rank 0 fills the cache of prepared meshes, the others read it
    for turn in (True, False):
        if is_main() == turn:
            train_set, val_set = build_dataset(config, "train", args.seed), build_dataset(config, "val")
        barrier()
    total_steps, sampler = count_steps(config, args, train_set)
    if checkpoint is not None:
        check_same_run(checkpoint, config, total_steps, ("model", "training", "optimizer", "scheduler",
                       "class_weights", "augmentation"), args.seed, FREE_ON_RESUME)

    # model
    model, encoder_entry, unfrozen = prepare_model(args, config, checkpoint, resume_path, train_set, messages)
    model.to(device)
    train_set, val_set = cache_features(config, model, train_set, val_set, amp_dtype, messages)
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [local_rank] if device.type == "cuda" else None)

    # optimiser, schedule, average
    criterion = make_criterion(config, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    scheduler = make_scheduler(optimizer, config, total_steps)
    ema = EMA(model, config.training.ema_decay) if config.training.use_ema else None
    keeper = CheckpointKeeper(folder.model, config.checkpointing.save_top_k, config.checkpointing.save_interval)
    stopping = EarlyStopping(config.early_stopping.patience)
    state = {"epoch": 0, "batch": 0, "step": 0}             # epochs finished, batches of the next one, optimiser steps
    totals = EpochTotals(config.model.n_classes, device)

    # resume
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema"])
        keeper.load_state_dict(checkpoint["best"])
        stopping.load_state_dict(checkpoint["stopping"])
        state = {key: checkpoint[key] for key in state}
        totals.load_state_dict(checkpoint["totals"])
    restore_rng(checkpoint, args.seed, state["step"])

    def saved_state() -> dict:
        return {"script": SCRIPT, "config": config.to_dict(), "class_names": class_names(config),
                "palette": palette(config.model.n_classes).tolist(), "model": model.state_dict(),
                "ema": None if ema is None else ema.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(), "stopping": stopping.state_dict(),
                "encoder": encoder_entry, "unfrozen_layers": unfrozen, "spec": mesh_spec(config).to_dict(),
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
    for line in (*messages, *describe_run(config, args, model, train_set, val_set, device)):
        log.info(line)

    if resume_path not in (None, folder.model / "model_last.pth"):          # what --resume auto goes on from
        save(saved_state(), None if state["batch"] else state["epoch"])
    loader = DataLoader(train_set, batch_sampler=sampler, collate_fn=custom_collate_fn, num_workers=args.num_workers,
                        worker_init_fn=seed_worker, pin_memory=device.type == "cuda", generator=torch.Generator())
    go_on = f"go on with: {shlex.join(['python', *sys.argv, '--resume', 'auto'])}"
    result = {}
    with StopSignal() as stop, log:
        finished = 0 < stopping.patience <= stopping.waited
        while state["epoch"] < config.training.epochs and not finished:
            started = time.monotonic()
            train_set.set_epoch(state["epoch"])
            sampler.set_epoch(state["epoch"], state["batch"])
            if not train_one_epoch(network, loader, criterion, optimizer, scheduler, scaler, ema, totals, state, config,
                                   args, device, amp_dtype, log, stop):
                save(saved_state())
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped at step {state['step']} of {total_steps}, saved; {go_on}")
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
            train = totals.metrics()
            last = state["epoch"] == config.training.epochs
            if state["epoch"] % config.evaluation.interval and not last:
                log_epoch(log, state, train, None, time.monotonic() - started)
                save(saved_state(), state["epoch"])
                continue

            # Evaluation uses the averaged weights; what is saved is both.
            with ema.applied(model) if ema is not None else torch.no_grad():
                result = evaluate(network, val_set, device, amp_dtype, config.evaluation.batch_size, args.num_workers,
                                  args.limit_batches, criterion)
            log_epoch(log, state, train, result, time.monotonic() - started)
            score = result["metrics"][config.evaluation.monitor]
            finished = stopping.update(score)
            snapshot = saved_state()                        # in every process: it gathers what they have
            if is_main() and keeper.save_best_if(score, snapshot):
                log.info(f"New best {MONITOR_NAMES[config.evaluation.monitor]}: {score:.4f}. Checkpoint saved.")
            save(snapshot, state["epoch"])
            if finished:
                log.info(f"No better {config.evaluation.monitor} for {stopping.patience} evaluations: stopped early.")
            if all_agree_max(stop.requested or 0) and not last and not finished:
                raise StopRequested(all_agree_max(stop.requested or 0),
                                    f"stopped after epoch {state['epoch']}, saved; {go_on}")
        best = "none" if keeper.best_score is None else f"{keeper.best_score:.4f} (epoch {keeper.best_epoch})"
        log.info(f"Best {config.evaluation.monitor}: {best}; checkpoints in {folder.model}")
    cleanup()
    return {**(headline(result) if result else {}), "best": keeper.best_score, "best_epoch": keeper.best_epoch}


if __name__ == "__main__":
    run(main)
