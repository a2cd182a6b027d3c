"""Per-face semantic segmentation of triangle meshes: a head on a pre-trained mesh encoder, I-JEPA's
or DiffusionNet.

    python train_downstream.py config.yaml --pretrained_path exp/jepa/model/model_last.pth
    python train_downstream.py config.yaml                     # the same network from scratch
    python train_downstream.py configs/mesh_humanbody_official.yaml \\
        --pretrained_path human_seg_hks_4x128.pth              # DiffusionNet's own weights and head
    python train_downstream.py config.yaml --device cpu --limit-batches 2 training.epochs=1
    torchrun --nproc_per_node=4 train_downstream.py config.yaml --pretrained_path P
    python train_downstream.py config.yaml --resume auto                       # go on, bit for bit
    python train_downstream.py config.yaml --resume exp/downstream/model/model_best.pth --test-only

One config file holds the experiment (configs/mesh_*.yaml; all keys are in DEFAULTS),
`section.key=value` changes it. The encoder is frozen unless training.num_unfrozen_encoder_layers
says otherwise, or there is no pre-trained file. What to expect, every number logged and every
deviation from the documents: docs/meshes.md; DiffusionNet (Sharp et al. 2022):
docs/diffusion_net.md.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.label_map import unread_classes
from data.mesh import (
    Augmentation,
    MeshDataset,
    MeshSpec,
    feature_statistics,
    hold_out,
    repeated,
    split_meshes,
)
from data.mesh_io import MESH_SUFFIXES, list_meshes
from data.mesh_surfaces import SurfaceSpec, open_meshes
from models.diffusion_net import DiffusionNet
from models.downstream import DownstreamClassifier, SurfaceClassifier, face_logits, share_of
from models.mesh_texture import (
    FUSIONS,
    IntegratedDownstreamClassifier,
    IntegratedTextureGeometryModel,
    TexturedSurfaceClassifier,
)
from models.nomeformer import Nomeformer
from models.pretrained_mesh import (
    check_features,
    load_diffusion_net,
    read_diffusion_net,
    read_encoder,
)
from utils.checkpoint import EarlyStopping
from utils.checks import check_choice, check_names, check_positive, check_range
from utils.cli import ArgumentParser, run_main
from utils.config import Config, Required, Setting, command_line_wins, load_config, not_needed_lines
from utils.distributed import all_reduce_sum, main_first, unwrap
from utils.ema import EMA, averaged, load_averaged
from utils.log import shortened
from utils.losses import MaskedCrossEntropyLoss
from utils.mesh_scripts import (
    LABEL_SETTINGS,
    cache_embeddings,
    check_labels,
    check_same_up,
    class_names,
    evaluate_meshes,
    face_predictions,
    label_mesh,
    label_options,
    mesh_pictures,
    name_classes,
    write_mesh_label,
)
from utils.metrics import headline, metrics_table
from utils.params import describe_parameters, layerwise_groups
from utils.render import palette
from utils.run import Run, add_run_flags
from utils.schedule import SCHEDULES, build_scheduler
from utils.training import build_loader, check_same_run, micro_steps, to_device
from utils.weights import load_weights, sha256_file

SCRIPT = Path(__file__).name
SHOWN = {"Acc": "overall_accuracy", "F1": "mean_f1", "mIoU": "miou",
         "Acc by area": "area_overall_accuracy", "mIoU by area": "area_miou"}
MONITORS = {"mean_f1": "F1", "miou": "mIoU", "overall_accuracy": "accuracy"}
# For predict.py, default first.
RESULTS = {"labels": ("txt", "npy"), "picture": ("ply", "glb", "none"), "html": True,
           "recursive": True}
COMPARED = ("model", "training", "optimizer", "scheduler", "class_weights", "augmentation")
# Steps are compared as well.
FREE_ON_RESUME = ("training.batch_size", "training.resume", "training.cache_features")
# Keys that other code wants; they are accepted, and a line says so.
NOT_NEEDED = {
    "paths.json_dir": "clusters are computed, not read",
    "paths.val_json_dir": "clusters are computed, not read",
    "paths.texture_dir": "a mesh file names its textures",
    "paths.val_texture_dir": "a mesh file names its textures",
    "model.texture_patch_size": "texture samples are single points",
}

DEFAULTS = {
    "paths": {
        "mesh_dir": Required((str,)),
        "label_dir": Setting(None, (str,)),             # None: beside the meshes
        "val_mesh_dir": Setting(None, (str,)),          # None: out of mesh_dir, see data.val_split
        "val_label_dir": Setting(None, (str,)),
        "test_mesh_dir": Setting(None, (str,)),         # read by --test-only and evaluate.py alone
        "test_label_dir": Setting(None, (str,)),
        "checkpoint_pretrain": Setting(None, (str,)),   # the same as --pretrained_path
        "json_dir": Setting(None, (str,)),              # this and the next three: NOT_NEEDED
        "val_json_dir": Setting(None, (str,)),
        "texture_dir": Setting(None, (str,)),
        "val_texture_dir": Setting(None, (str,)),
        "checkpoint_dir": Setting(None, (str,)),        # None: OUTPUT_DIR/model
        "log_dir": Setting(None, (str,)),               # None: OUTPUT_DIR/log
        "cache_dir": Setting(".cache/meshes", (str, type(None))),       # null: no cache
    },
    "data": {
        "suffixes": [],                     # [.obj]: leave other kinds of files in a folder alone
        "test_split": [],                   # name patterns: kept out of mesh_dir for --test-only
        "val_split": Setting([], (list, float)),    # name patterns ("faust_08*") or a share (0.1)
        "repeat": [],                       # patterns of training meshes, so many times an epoch:
        "repeat_times": Setting(4, (int,), low=1),
        "class_names": [],
        **LABEL_SETTINGS,                   # recursive, up, label_map ...: utils/mesh_scripts.py
    },
    "model": {
        "n_classes": Required((int,), low=1),
        "encoder": Setting("nomeformer", (str,), ("nomeformer", "diffusion_net")),
        "features": ["corners", "normal", "area", "angles", "curvature", "dihedral"],
        "feature_dim": Setting(None, (int,)),       # only checked against the features
        "embedding_dim": Setting(96, (int,), low=1),
        "num_heads": 4,
        "num_attention_blocks": 6,
        "num_diffusion_blocks": Setting(4, (int,), low=1),  # this and the next two: DiffusionNet's
        "num_eigenpairs": 128,
        "hks_scale": 1.0,                           # times the signature; 0.1 beside coordinates
        "mlp_ratio": 2.0,
        "dropout": 0.1,                             # of the head
        "encoder_dropout": 0.0,
        "drop_path": 0.1,
        "use_pe": True,                             # position codes
        "head": Setting("mlp", (str,), ("mlp", "linear")),
        "faces_per_cluster": 32,
        "n_clusters": Setting(None, (int,)),
        "clustering": Setting("bisection", (str,), ("bisection", "connected", "fps")),
        "unit": Setting(None, (float,)),            # metres per length unit (10 for houses)
        "gradient_checkpointing": False,            # less memory, a third more time
        "include_normals": Setting(None, (bool,)),  # with or without "normal" in features
        "additional_geometrical_features": Setting(None, (bool,)),      # the same for "ground"
        "num_attention_blocks_predictor": Setting(None, (int,)),        # train_jepa.py's
        "use_texture": False,                       # colours of the faces beside their geometry
        "texture_embed_dim": Setting(32, (int,), low=1),
        "fusion_method": Setting("gated", (str,), FUSIONS),
        "max_texture_pixels": Setting(16, (int,), low=1),       # texture samples a face
        "texture_patch_size": Setting(None, (int,)),            # NOT_NEEDED
    },
    "masking": {},                          # of train_jepa.py: one file can serve both scripts
    "loss": {},
    "training": {
        "epochs": Setting(50, (int,), low=0),       # 0: score the file's own head, pretrained_head
        "batch_size": Setting(8, (int,), low=1),    # meshes (or crops) per process and micro-step
        "clusters_per_batch": Setting(None, (int,)),    # crops of so many clusters: large meshes
        "accumulation_steps": Setting(1, (int,), low=1),
        "num_unfrozen_encoder_layers": Setting(0, (int, str)),      # 0 | k | all; from scratch: all
        "pretrained_head": False,           # DiffusionNet: the file's last layer is the head
        "use_pretrained": Setting(None, (bool,)),   # true: a file is a must; false: ignore it
        "resume": False,                            # the same as --resume auto
        "weight_decay": Setting(0.05, (float,), low=0),
        "layer_wise_lr_decay": [1.0, 1.0],  # head rate x first; each block before it / second
        "use_ema": True,
        "ema_decay": 0.998,
        "gradient_clip_val": Setting(1.0, (float,), low=0),
        "label_smoothing": 0.0,
        "ignore_index": Setting(None, (int,)),      # one more value of data.ignore_labels
        "cache_features": False,            # frozen encoder, no augmentation: embed every face once
    },
    "optimizer": {
        "type": Setting("adamw", (str,), ("adamw",)),
        "learning_rate": 1e-3,
        "warmup": Setting(None, (float,)),          # epochs; the same as scheduler.warmup_epochs
        "start_lr": Setting(None, (float,)),        # rate at the first step; None: a hundredth
    },
    "scheduler": {
        "name": Setting("cosine", (str,), SCHEDULES),
        "warmup_epochs": 2.0,
        "min_lr": 1e-6,
    },
    "class_weights": {"class_percentages": []},     # share of each class; weights 1 / share, mean 1
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
        "size_range": [1.0, 1.0],                   # DiffusionNet: of the mesh in its unit ball
    },
    "evaluation": {
        "views": Setting(1, (int,), low=1),         # average over so many rotations and clusterings
        "pool_planes": Setting(0.0, (float,), low=0),   # degrees: one mean a flat piece; 0: off
        "interval": Setting(1, (int,), low=1),      # epochs
        "monitor": Setting("mean_f1", (str,), tuple(MONITORS)),
        "batch_size": Setting(8, (int,), low=1),
    },
    "checkpointing": {
        "save_interval": Setting(5, (int,), low=0),
        "save_top_k": Setting(0, (int,), low=0),
    },
    "early_stopping": {"patience": Setting(0, (int,), low=0)},      # evaluations; 0: never
    "logging": {"log_interval": Setting(20, (int,), low=1), "tensorboard": True},
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the config")
    parser.add_argument("--pretrained_path",
                        help="encoder: train_jepa.py's, a state dict, or a downstream checkpoint")
    add_run_flags(parser, SCRIPT, num_workers=2)
    return parser.parse_args(argv)


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    training = config.training
    check_positive("optimizer.learning_rate", config.optimizer.learning_rate)
    check_range("model.dropout", config.model.dropout, 0, 1)
    for suffix in config.data.suffixes:
        check_choice("data.suffixes", suffix, MESH_SUFFIXES)
    if config.data.test_split and config.paths.test_mesh_dir:
        raise ValueError("data.test_split and paths.test_mesh_dir both say what the test meshes "
                         "are; give one of them")
    build_augmentation(config)
    check_encoder(config)
    check_labels(config)
    mesh_spec(config).check(config.model.feature_dim, config.augmentation.mode)
    names = check_names("data.class_names", config.data.class_names)
    weights = config.class_weights.class_percentages
    for key, values in (("data.class_names", names),
                        ("class_weights.class_percentages", weights)):
        if values and len(values) != config.model.n_classes:
            raise ValueError(f"{key} has {len(values)} entries for model.n_classes="
                             f"{config.model.n_classes}; give one per class")
    if weights and min(weights) <= 0:
        raise ValueError(f"class_weights.class_percentages: {min(weights)} is not above 0; give "
                         f"classes without faces a small value")
    unfrozen = training.num_unfrozen_encoder_layers
    if isinstance(unfrozen, str) and unfrozen != "all":
        raise ValueError(f"training.num_unfrozen_encoder_layers={unfrozen!r}: expected a number of "
                         f"blocks or all")
    rates = training.layer_wise_lr_decay
    if len(rates) != 2 or min(rates) <= 0:
        raise ValueError(f"training.layer_wise_lr_decay={rates}: expected [head factor, decay per "
                         f"block], as [10, 2]")


def check_encoder(config: Config) -> None:
    """ValueError for settings that the encoder, or the head of its file, does not go with."""
    model = config.model
    training = config.training
    if training.pretrained_head and (model.encoder, model.head) != ("diffusion_net", "linear"):
        raise ValueError("training.pretrained_head takes the last layer of a DiffusionNet: set "
                         "model.encoder: diffusion_net and model.head: linear")
    if training.epochs == 0 and not training.pretrained_head:
        raise ValueError("training.epochs=0 scores a file's own head: set "
                         "training.pretrained_head=true, or 1 epoch and more")
    if model.encoder != "diffusion_net":
        return
    for name in ("model.n_clusters", "model.unit", "training.clusters_per_batch"):
        section, key = name.split(".")
        if config[section][key] is not None:
            raise ValueError(f"{name} is for clusters of faces; leave it out with model.encoder: "
                             f"diffusion_net, which sees whole meshes in their own unit ball")
    if model.use_texture and training.cache_features:
        raise ValueError("training.cache_features needs an encoder without texture")


def mesh_spec(config: Config) -> MeshSpec | SurfaceSpec:
    model = config.model
    if model.encoder == "diffusion_net":
        return SurfaceSpec(tuple(model.features), model.num_eigenpairs, model.hks_scale,
                           up=config.data.up)
    features = list(model.features)
    for name, wanted in (("normal", model.include_normals),
                         ("ground", model.additional_geometrical_features)):
        if wanted is not None:
            features = [feature for feature in features if feature != name]
        if wanted:
            features.append(name)
    return MeshSpec(tuple(features), model.faces_per_cluster, model.n_clusters, model.clustering,
                    config.training.clusters_per_batch, model.unit, up=config.data.up)


def build_augmentation(config: Config) -> Augmentation:
    return Augmentation(**{key: tuple(value) if isinstance(value, list) else value
                           for key, value in config.augmentation.items()})


def split_files(config: Config, split: str) -> tuple[list[Path], str, str]:
    """Mesh files, their folder, and the label folder, of train | val | test."""
    paths = config.paths
    data = config.data
    for name, mesh_dir, label_dir in (("val", paths.val_mesh_dir, paths.val_label_dir),
                                      ("test", paths.test_mesh_dir, paths.test_label_dir)):
        if split == name and mesh_dir is not None:
            files = list_meshes(mesh_dir, data.suffixes, data.recursive)
            return files, mesh_dir, label_dir or mesh_dir
    files, held_out = hold_out(list_meshes(paths.mesh_dir, data.suffixes, data.recursive),
                               data.test_split)
    if split == "test":
        if not held_out:
            raise ValueError("there is no test split: set paths.test_mesh_dir (and "
                             "paths.test_label_dir) or data.test_split")
        files = held_out
    elif paths.val_mesh_dir is None:
        files = split_meshes(files, data.val_split)[0 if split == "train" else 1]
    if split == "train":
        files = repeated(files, data.repeat, data.repeat_times)
    return files, paths.mesh_dir, paths.label_dir or paths.mesh_dir


def build_dataset(config: Config, split: str, seed: int = 0, data_dir: str | None = None,
                  label_dir: str | None = None) -> MeshDataset:
    """split train | val | test, or the meshes of `data_dir`. All but "train" give every face
    exactly once a view."""
    if data_dir is not None:
        files = list_meshes(data_dir, config.data.suffixes, config.data.recursive)
        root, label_dir = data_dir, label_dir or data_dir
    else:
        files, root, label_dir = split_files(config, split)
    labels = label_options(config)
    if config.training.ignore_index is not None:
        labels["ignore_labels"] = [*labels["ignore_labels"], config.training.ignore_index]
    return open_meshes(files, label_dir, mesh_spec(config), texture_samples(config), root=root,
                       augmentation=build_augmentation(config),
                       views=0 if split == "train" else config.evaluation.views,
                       cache_dir=config.paths.cache_dir, seed=seed,
                       description=f"{split} meshes", **labels)


def texture_samples(config: Config) -> int | None:
    return config.model.max_texture_pixels if config.model.use_texture else None


def build_model(config: Config, unfrozen_layers: int | str) -> DownstreamClassifier:
    model = config.model
    if model.encoder == "diffusion_net":
        encoder = DiffusionNet(mesh_spec(config).feature_dim, None, model.embedding_dim,
                               model.num_diffusion_blocks, dropout=model.encoder_dropout,
                               gradient_checkpointing=model.gradient_checkpointing)
        parts = (encoder, model.n_classes, model.head, model.dropout, unfrozen_layers)
        if not model.use_texture:
            return SurfaceClassifier(*parts)
        return TexturedSurfaceClassifier(*parts, texture_embed_dim=model.texture_embed_dim,
                                         fusion=model.fusion_method)
    sizes = (mesh_spec(config).feature_dim, model.embedding_dim, model.num_heads,
             model.num_attention_blocks, model.mlp_ratio, model.encoder_dropout, model.drop_path,
             model.use_pe, model.gradient_checkpointing)
    if not model.use_texture:
        return DownstreamClassifier(Nomeformer(*sizes), model.n_classes, model.head, model.dropout,
                                    unfrozen_layers)
    encoder = IntegratedTextureGeometryModel(*sizes, texture_embed_dim=model.texture_embed_dim,
                                             fusion=model.fusion_method)
    return IntegratedDownstreamClassifier(encoder, model.n_classes, model.head, model.dropout,
                                          unfrozen_layers)


def load_pretrained(model: DownstreamClassifier, path: str, config: Config) -> tuple[dict, str]:
    """Fill the encoder (and training.pretrained_head) from a file, whole or not at all. Returns the
    checkpoint's `encoder` entry and a log line."""
    spec = mesh_spec(config)
    entry = {"name": type(model.encoder).__name__, "file": str(path), "sha256": sha256_file(path)}
    if isinstance(model, SurfaceClassifier):
        state, layout, feature_spec = read_diffusion_net(path)
        check_features(feature_spec, spec.features, path, hks_scale=spec.hks_scale)
        head = model.head if config.training.pretrained_head else None
        return entry, load_diffusion_net(model.encoder, state, path, layout, head)
    state, layout, feature_spec = read_encoder(path)
    heads = model.encoder.blocks[0].local_layer.attn.num_heads
    check_features(feature_spec, spec.features, path, heads, unit=spec.unit)
    fresh = {}
    if not any(name.startswith("texture_") for name in state):
        fresh = {name: tensor for name, tensor in model.encoder.state_dict().items()
                 if name.startswith("texture_")}
    line = load_weights(model.encoder, {**fresh, **state}, path, layout=layout)
    if fresh:
        line += (f"; {len(fresh)} of them, the texture's, are not in the file and start afresh")
    return entry, line


def start_model(run: Run, config: Config, train_set: MeshDataset):
    """(model, its `encoder` entry in checkpoints, unfrozen layers): filled from the resumed
    checkpoint, with the pre-trained encoder, or as it starts from scratch."""
    check_same_up(run.checkpoint, config)
    given = run.args.pretrained_path
    pretrained = given or config.paths.checkpoint_pretrain
    wanted = config.training.use_pretrained
    unfrozen = config.training.num_unfrozen_encoder_layers
    if wanted and not pretrained:
        raise ValueError("training.use_pretrained is true, but there is neither --pretrained_path "
                         "nor paths.checkpoint_pretrain")
    if wanted is False:
        pretrained = None
    if not pretrained and (wanted is None or unfrozen != 0):
        unfrozen = "all"        # use_pretrained=false and 0: a frozen random encoder, a baseline
    if run.checkpoint is not None:
        model = build_model(config, run.checkpoint["unfrozen_layers"])
        run.restore(model)
        entry = run.checkpoint["encoder"]
        sha256 = entry["sha256"] if entry else None
        if given and Path(given).is_file() and sha256_file(given) != sha256:
            raise ValueError(f"--pretrained_path {given}: the run in {run.resume_path} started "
                             f"from {entry['file'] if entry else 'no file'} with other content; "
                             f"leave the flag out to go on with that run, or --resume to start "
                             f"afresh in another --output-dir")
        return model, entry, run.checkpoint["unfrozen_layers"]
    model = build_model(config, unfrozen)
    if pretrained:
        entry, line = load_pretrained(model, pretrained, config)
        run.messages.append(line)
        return model, entry, unfrozen
    if not isinstance(model, SurfaceClassifier):
        model.encoder.feature_mean[:], model.encoder.feature_std[:] = feature_statistics(train_set)
    return model, None, unfrozen


def parameter_groups(model: DownstreamClassifier, config: Config) -> list[dict]:
    """Rates that fall from the head to the input, see layerwise_groups."""
    head_factor, decay = config.training.layer_wise_lr_decay
    return layerwise_groups(model, config.optimizer.learning_rate, config.training.weight_decay,
                            model.layer_id, model.num_layers, layer_decay=1 / decay,
                            head_lr_mult=head_factor)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int):
    settings = config.optimizer
    scheduler = config.scheduler
    epochs = scheduler.warmup_epochs if settings.warmup is None else settings.warmup
    warmup = min(round(epochs * total_steps / max(config.training.epochs, 1)), total_steps - 1)
    if scheduler.name == "onecycle":                    # which has its own
        warmup = 0
    start = 0.01 if settings.start_lr is None else settings.start_lr / settings.learning_rate
    return build_scheduler(optimizer, scheduler.name, total_steps, warmup, scheduler.min_lr,
                           start_factor=start)


def build_criterion(config: Config) -> MaskedCrossEntropyLoss:
    weight = None
    if config.class_weights.class_percentages:
        share = torch.tensor(config.class_weights.class_percentages, dtype=torch.float32)
        weight = 1 / share
        weight = weight / weight.mean()
    return MaskedCrossEntropyLoss(weight, label_smoothing=config.training.label_smoothing,
                                  num_classes=config.model.n_classes)


# -- one epoch, one evaluation ---------------------------------------------------------------------

def train_one_epoch(run: Run, network, loader, criterion, ema: EMA | None, clip_grad: float):
    network.train()
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for micro_batches in run.steps(loader):
        # The loss is the mean over all valid faces of the step, whatever the number of
        # micro-batches and processes; a triangle counts as its share of its polygon.
        weight = sum(criterion.label_weight(batch["label"], batch["mask"], **share_of(batch))
                     for batch in micro_batches)
        weight = all_reduce_sum(weight.to(run.device, non_blocking=True))
        for batch in micro_steps(network, micro_batches):
            batch = to_device(batch, run.device)
            with run.autocast():
                logits = face_logits(network, batch)                # (B, N, F, C)
            loss, _ = criterion.sum_and_weight(logits, batch["label"], batch["mask"],
                                               **share_of(batch))
            run.backward(loss, weight=weight)
            run.totals.matrix.update(*face_predictions(logits, batch))
        run.update(clip_grad)
        if ema is not None:
            ema.update(network)


def evaluate(model, dataset, device=None, amp_dtype=None, batch_size=8, num_workers=0,
             limit_batches=0) -> dict:
    """Score every face of a data set exactly once; used in training, by --test-only and by
    evaluate.py. See evaluate_meshes."""
    model = unwrap(model)
    device = device or next(model.parameters()).device
    criterion = build_criterion(model.config).to(device)
    return evaluate_meshes(model, dataset, device, amp_dtype, batch_size, num_workers,
                           limit_batches, criterion)


def by_area(result: dict) -> dict:
    return {f"area_{name}": value for name, value in result["tables"]["by area"].items()}


def log_curves(run: Run, train: dict, result: dict | None) -> None:
    """TensorBoard's curves Loss, F1 and Accuracy, of training and validation in one picture."""
    splits = {"train": train} if result is None else {"train": train, "val": headline(result)}
    for split, numbers in splits.items():
        run.log.scalars(run.step, {f"Loss/{split}": numbers["loss"],
                                   f"F1/{split}": numbers["mean_f1"],
                                   f"Accuracy/{split}": numbers["overall_accuracy"]})


# -- what evaluate.py and predict.py call besides --------------------------------------------------

predict = label_mesh
write_prediction = write_mesh_label
example_pictures = mesh_pictures
list_inputs = partial(list_meshes, unique=False)            # predict.py looks at the results' names


def has_test_split(config: Config) -> bool:
    return config.paths.test_mesh_dir is not None or bool(config.data.test_split)


def attach(model: DownstreamClassifier, config: Config, names: list[str],
           colors: np.ndarray) -> None:
    """What evaluation and labelling need besides the weights."""
    model.config = config
    model.spec = mesh_spec(config)
    model.augmentation = build_augmentation(config)     # of the views that are averaged
    model.texture_samples = texture_samples(config)
    model.class_names = names
    model.palette = colors


def load_model(checkpoint: dict, device: torch.device) -> DownstreamClassifier:
    """The network of a checkpoint of this script, with its averaged weights where it has them, in
    eval mode."""
    config = Config(checkpoint["config"])
    model = build_model(config, checkpoint["unfrozen_layers"])
    load_averaged(model, checkpoint)
    attach(model, config, checkpoint["class_names"], np.array(checkpoint["palette"], np.uint8))
    trained_on = checkpoint["spec"]["features"]
    if sorted(model.spec.features) != sorted(trained_on):
        raise ValueError(f"model.features is {list(model.spec.features)}, but the network was "
                         f"trained on {list(trained_on)}; use those")
    return model.to(device).eval()


def score_untrained(run: Run, network, val_set: MeshDataset, config: Config) -> None:
    """training.epochs=0: score what the file holds, and keep it as a checkpoint."""
    result = evaluate(network, val_set, run.device, run.amp_dtype, config.evaluation.batch_size,
                      run.args.num_workers, run.args.limit_batches)
    run.numbers = {**headline(result), **by_area(result)}
    run.log.evaluation(0, 0, "val", run.numbers)
    run.log.info(f"without training: Val Acc: {run.numbers['overall_accuracy']:.4f}, Val mIoU: "
                 f"{run.numbers['miou']:.4f}")
    run.save(0, run.numbers[config.evaluation.monitor])


def test_only(run: Run, config: Config) -> dict:
    """Score a checkpoint on the test split, or the validation split where there is none."""
    check_same_run(run.checkpoint, config, run.checkpoint["total_steps"], ("model",))
    model = load_model(run.checkpoint, run.device)
    split = "test" if has_test_split(config) else "val"
    dataset = build_dataset(config, split)
    result = evaluate(model, dataset, run.device, run.amp_dtype, config.evaluation.batch_size,
                      run.args.num_workers, run.args.limit_batches)
    area = result["tables"]["by area"]
    run.report(*shortened(dataset.notes),
               f"{run.resume_path} on the {split} split, by number of faces:",
               metrics_table(result["metrics"], model.class_names),
               f"by area: accuracy {100 * area['overall_accuracy']:.2f}, mIoU "
               f"{100 * area['miou']:.2f}")
    return headline(result)


# -- main ------------------------------------------------------------------------------------------

def describe_data(train_set: MeshDataset, val_set: MeshDataset, names: list[str]) -> list[str]:
    """Lines for the log."""
    unread = unread_classes(names, train_set.files[0].parent, "set data.class_names")
    faces = [sum(dataset.num_polygons) for dataset in (train_set, val_set)]
    line = (f"{len(train_set.files)} training and {len(val_set.files)} validation meshes, "
            f"{faces[0]:,} and {faces[1]:,} faces")
    for name, dataset in (("training", train_set), ("validation", val_set)):
        if hasattr(dataset, "num_colored"):
            share = dataset.num_colored / sum(dataset.num_faces)
            line += (f", {share:.1%} of the {name} faces have a texture or a "
                     f"colour")
    return [*shortened([*train_set.notes, *val_set.notes]), *unread, line]


def main(argv=None) -> dict:
    args = parse_args(argv)
    config = load_config(args.config, DEFAULTS, args.overrides)
    check_config(config)
    training = config.training
    if training.resume and not args.resume:
        args.resume = "auto"
    command_line_wins(config, args, "paths.checkpoint_dir", "paths.log_dir")
    run = Run(args, SCRIPT, DEFAULTS, config.paths.checkpoint_dir, config.paths.log_dir)
    name_classes(config, lambda: split_files(config, "train")[0])
    if args.test_only:
        return test_only(run, config)
    run.messages += not_needed_lines(config, NOT_NEEDED)

    # data: rank 0 fills the cache of prepared meshes, the others read it
    with main_first():
        val_set = build_dataset(config, "val")
        train_set = build_dataset(config, "train", args.seed) if training.epochs else val_set
    run.check_data(train=train_set, val=val_set)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, accumulate=training.accumulation_steps,
                       compare=COMPARED, free=FREE_ON_RESUME)

    # model
    names = class_names(config)
    model, encoder_entry, unfrozen = start_model(run, config, train_set)
    attach(model, config, names, palette(config.model.n_classes))
    data_lines = describe_data(train_set, val_set, names)
    if training.cache_features:
        (train_set, val_set), line = cache_embeddings(model.to(run.device), (train_set, val_set),
                                                      run.device, run.amp_dtype)
        run.messages.append(line)
    network = run.wrap(model)

    # loss, optimiser, schedule, average
    criterion = build_criterion(config).to(run.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    scheduler = build_lr_scheduler(optimizer, config, max(run.total_steps, 1))
    ema = EMA(model, training.ema_decay) if training.use_ema else None
    stopping = EarlyStopping(config.early_stopping.patience)
    monitor = config.evaluation.monitor
    run.track(config=config, class_names=names, palette=model.palette.tolist(), optimizer=optimizer,
              scheduler=scheduler, save_interval=config.checkpointing.save_interval,
              keep_top_k=config.checkpointing.save_top_k, monitor=MONITORS[monitor],
              num_classes=config.model.n_classes, ema=ema, stopping=stopping, encoder=encoder_entry,
              unfrozen_layers=unfrozen, spec=mesh_spec(config).to_dict())

    loader = build_loader(train_set, sampler, args.num_workers, run.device,
                          train_set.collate_fn)
    lines = (*data_lines, f"{describe_parameters(model)}; {run.description}")
    with run.training(*lines, log_interval=config.logging.log_interval,
                      tensorboard=config.logging.tensorboard):
        for _ in run.epochs(train_set, sampler, stopping):
            train_one_epoch(run, network, loader, criterion, ema, training.gradient_clip_val)
            result = None
            if run.due(config.evaluation.interval):
                with averaged(ema, model):              # what is saved is both
                    result = evaluate(network, val_set, run.device, run.amp_dtype,
                                      config.evaluation.batch_size, args.num_workers,
                                      args.limit_batches)
                stopping.update(result["metrics"][monitor])
            train = run.log_epoch(result, SHOWN, by_area(result) if result else None)
            log_curves(run, train, result)
            run.save(run.epoch, result["metrics"][monitor] if result else None)
        if training.epochs == 0:
            score_untrained(run, network, val_set, config)
    return run.summary()


if __name__ == "__main__":
    run_main(main)
