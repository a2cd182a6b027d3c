"""I-JEPA pre-training of the mesh encoder (Assran et al. 2023, on clusters of faces): no labels.

    python train_jepa.py configs/jepa_humanbody.yaml    # then train_downstream.py loads its result
    python train_downstream.py CONFIG --pretrained_path exp/jepa/model/model_last.pth
    python train_jepa.py configs/jepa_demo.yaml --device cpu           # about a minute on two cores
    torchrun --nproc_per_node=4 train_jepa.py CONFIG                   # several GPUs
    python train_jepa.py CONFIG --resume auto                          # go on, bit for bit
    python train_jepa.py CONFIG --resume auto --test-only              # monitors and probe alone

The student sees most clusters of a mesh and predicts its teacher's (a moving average of itself)
embeddings of the hidden ones. The loss says nothing about quality: watch the monitors, which stop a
run that collapses, and the probe, which says whether the encoder is better than a random one. Often
it is not: read docs/jepa.md before spending a night on it. Differs from train_downstream.py: masks,
teacher and predictor for labels and head; a weight decay that grows.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from data.mesh import Augmentation, MeshDataset, MeshSpec, feature_statistics, split_meshes
from data.mesh_features import FEATURES, NUM_DESCRIPTORS
from data.mesh_io import list_meshes
from data.mesh_masks import MaskedMeshes, MaskSpec, masked_collate_fn
from models.jepa import (
    Jepa,
    momentum_at,
    prediction_loss,
    start_momentum,
    variance_covariance,
    weight_decay_at,
)
from models.jepa_monitors import measure
from models.nomeformer import Nomeformer
from utils.checks import check_positive
from utils.cli import ArgumentParser, run_main
from utils.config import Config, Required, Setting, command_line_wins, load_config
from utils.distributed import all_reduce_sum, is_main, main_first, world_size
from utils.jepa_scripts import Monitors, Probe, monitor_line
from utils.log import shortened
from utils.mesh_scripts import LABEL_SETTINGS, check_labels, label_options, name_classes
from utils.params import split_decay
from utils.probe import METHODS
from utils.run import Run, add_run_flags
from utils.schedule import SCHEDULES, build_scheduler
from utils.seed import derived_seed
from utils.training import build_loader, check_same_run, to_device
from utils.weights import load_weights

SCRIPT = Path(__file__).name
LAYOUT_VERSION = 1                          # of what a checkpoint holds beside the common entries
COMPARED = ("data", "model", "masking", "loss", "ema", "training", "optimizer", "scheduler",
            "augmentation")
FREE_ON_RESUME = ("training.batch_size", "training.resume")             # steps are compared as well

DEFAULTS = {
    "paths": {
        "mesh_dir": Required((str,)),
        "label_dir": Setting(None, (str,)),     # only the probe reads labels; None: beside meshes
        "val_mesh_dir": Setting(None, (str,)),  # None: taken out of mesh_dir, see data.val_split
        "val_label_dir": Setting(None, (str,)),
        "checkpoint_dir": Setting(None, (str,)),        # default OUTPUT_DIR/model
        "log_dir": Setting(None, (str,)),               # default OUTPUT_DIR/log
        "cache_dir": Setting(".cache/meshes", (str, type(None))),       # null: no cache
    },
    "data": {
        "val_split": Setting([], (list, float)),    # as train_downstream.py; [], no probe: none
        "class_names": [],              # only with label_kind material or group
        **LABEL_SETTINGS,               # recursive, up, label_map ...: utils/mesh_scripts.py
    },
    "model": {
        "n_classes": Setting(None, (int,), low=2),      # only for the probe
        "features": ["corners", "normal", "area", "angles", "curvature", "dihedral"],
        "feature_dim": Setting(None, (int,)),           # only checked against the features
        "embedding_dim": Setting(96, (int,), low=1),
        "num_heads": Setting(4, (int,), low=1),
        "num_attention_blocks": Setting(6, (int,), low=1),
        "num_attention_blocks_predictor": Setting(3, (int,), low=1),
        "mlp_ratio": 2.0,
        "encoder_dropout": 0.0,
        "drop_path": 0.0,
        "use_pe": True,                 # position codes; the predictor has them in any case
        "faces_per_cluster": 32,
        "n_clusters": Setting(None, (int,)),
        "clustering": Setting("bisection", (str,), ("bisection", "connected", "fps")),
        "unit": Setting(None, (float,)),                # metres per length unit (10 for houses)
        "gradient_checkpointing": False,                # less memory, a third more time
    },
    "masking": {
        "num_mask_blocks": 4,           # target blocks of a mesh
        "target_scale": [0.15, 0.20],   # share of the clusters in one of them
        "context_scale": [0.85, 1.0],   # share in the context, before the targets are taken out
        "whole_share": 0.75,            # of the meshes: shown whole, only their descriptors count
    },
    "loss": {
        # I-JEPA: smooth-L1 to the teacher's embedding
        "alpha": Setting(1.0, (float,), low=0),
        # VICReg's variance and covariance terms on the student's output; its paper: 25 and 1
        "beta": Setting(0.0, (float,), low=0),
        "gamma": Setting(0.0, (float,), low=0),
        # smooth-L1 to descriptors of all faces; 0: I-JEPA alone
        "delta": Setting(1.0, (float,), low=0),
    },
    "ema": {"momentum": Setting("auto", (str, float))},     # at the start; auto: 1 - 10 / steps
    "training": {
        "epochs": Setting(300, (int,), low=1),
        "batch_size": Setting(16, (int,), low=1),           # meshes (or crops) per process
        "clusters_per_batch": Setting(None, (int,)),    # crops of so many clusters: large meshes
        "resume": False,                                    # the same as --resume auto
        "weight_decay": [0.04, 0.4],                        # first and last
        "gradient_clip_val": Setting(1.0, (float,), low=0),
    },
    "optimizer": {"type": Setting("adamw", (str,), ("adamw",)), "learning_rate": 1e-3},
    "scheduler": {
        "name": Setting("cosine", (str,), SCHEDULES),
        "warmup_epochs": Setting(20.0, (float,), low=0),
        "min_lr": 1e-6,
    },
    "augmentation": {
        "mode": Setting("none", (str,), ("none", "z", "so3")),
        "rotation_range": [-180.0, 180.0],
        "scale_range": [1.0, 1.0],
        "deformation": 0.0,
        "noise_std": 0.0,
        "hks_noise": 0.0,
        "flip_probability": 0.0,
        "recluster": True,
    },
    "monitor": {                        # what each value means: docs/jepa.md; null: not checked
        "interval": Setting(1, (int,), low=0),              # epochs; 0: never
        "meshes": Setting(16, (int,), low=1),
        "stop": True,                   # stop the run beyond a bound, or only say so
        "warmup_epochs": Setting(20.0, (float,), low=0),    # or a fifth of a short run: no bounds
        "min_target_std": Setting(0.1, (float, type(None))),
        "min_target_std_ratio": Setting(0.2, (float, type(None))),
        "min_prediction_std": Setting(0.01, (float, type(None))),
        "min_prediction_ratio": Setting(0.2, (float, type(None))),
        "max_share_mesh": Setting(0.5, (float, type(None))),
        "min_share_face": Setting(0.03, (float, type(None))),
        "max_position_r2": Setting(0.7, (float, type(None))),
        "min_content": Setting(0.05, (float, type(None))),
        "min_effective_rank": Setting(4.0, (float, type(None))),
        "min_teacher_moved": Setting(0.01, (float, type(None))),
        "min_teacher_follow": Setting(0.2, (float, type(None))),
        "max_teacher_student": Setting(1.0, (float, type(None))),
    },
    "probe": {
        "interval": Setting(0, (int,), low=0),              # epochs; 0: no probe, no labels
        "method": Setting("linear", (str,), METHODS),
        "max_faces": Setting(50_000, (int,), low=1),    # to fit on, of evenly spaced meshes
    },
    "checkpointing": {"save_interval": Setting(50, (int,), low=0)},
    "logging": {"log_interval": Setting(20, (int,), low=1), "tensorboard": True},
}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML, TOML or JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the config")
    add_run_flags(parser, SCRIPT, num_workers=2)
    return parser.parse_args(argv)


# -- the pieces of this method ---------------------------------------------------------------------

def check_config(config: Config) -> None:
    """Errors that need more than one key to see. Raises ValueError."""
    decay = config.training.weight_decay
    check_positive("optimizer.learning_rate", config.optimizer.learning_rate)
    build_augmentation(config)
    mesh_spec(config).check(config.model.feature_dim, config.augmentation.mode)
    if len(decay) != 2 or min(decay) < 0:
        raise ValueError(f"training.weight_decay={decay}: expected the first and the last value, "
                         f"such as [0.04, 0.4]")
    if config.probe.interval and not config.model.n_classes:
        raise ValueError("probe.interval is set, but model.n_classes is not; the probe has to know "
                         "how many there are")
    if config.probe.interval:
        check_labels(config)
    mask_spec(config)
    if config.masking.whole_share and not config.loss.delta:
        raise ValueError("masking.whole_share shows meshes without a target, which teach nothing "
                         "where loss.delta=0; change one of them")
    start_momentum(config.ema.momentum, 1000)


def mesh_spec(config: Config) -> MeshSpec:
    model = config.model
    return MeshSpec(tuple(model.features), model.faces_per_cluster, model.n_clusters,
                    model.clustering, config.training.clusters_per_batch, model.unit,
                    up=config.data.up)


def build_augmentation(config: Config) -> Augmentation:
    return Augmentation(**{key: tuple(value) if isinstance(value, list) else value
                           for key, value in config.augmentation.items()})


def mask_spec(config: Config) -> MaskSpec:
    masking = config.masking
    for key in ("target_scale", "context_scale"):
        if len(masking[key]) != 2:
            raise ValueError(f"masking.{key}={masking[key]}: expected the smallest and the largest "
                             f"share")
    return MaskSpec(masking.num_mask_blocks, tuple(masking.target_scale),
                    tuple(masking.context_scale), masking.whole_share)


def split_files(config: Config) -> tuple[list[Path], list[Path]]:
    """Training and validation meshes: two folders, or mesh_dir divided by data.val_split, or no
    validation."""
    recursive = config.data.recursive
    files = list_meshes(config.paths.mesh_dir, recursive=recursive)
    if config.paths.val_mesh_dir is not None:
        return files, list_meshes(config.paths.val_mesh_dir, recursive=recursive)
    if not config.data.val_split and not config.probe.interval:
        return files, []
    return split_meshes(files, config.data.val_split)


def build_dataset(config: Config, files: list[Path], seed: int = 0, **more) -> MeshDataset:
    """Training meshes, without labels unless `more` has a label_dir."""
    settings = {"label_dir": None, "augmentation": build_augmentation(config), **more}
    return MeshDataset(files, spec=mesh_spec(config), cache_dir=config.paths.cache_dir, seed=seed,
                       **label_options(config), **settings)


def fixed_dataset(config: Config, files: list[Path], label_dir: str | None,
                  root: str | None = None) -> MeshDataset:
    """For monitors and probe: every mesh turned its own way, always the same, every face once, and
    not changed otherwise. As they lie in their files, all figures may stand upright, and position
    alone would tell a head from a foot."""
    settings = config.augmentation
    turned = Augmentation(settings.mode, tuple(settings.rotation_range), recluster=True)
    return build_dataset(config, files, label_dir=label_dir, root=root, augmentation=turned,
                         every_part=True)


def random_encoder(config: Config, seed: int, trained: Nomeformer | None = None) -> Nomeformer:
    """The encoder as it starts, the same for the same seed: what the student begins with, and the
    probe's baseline.

    trained: take the mean and deviation of the features from this one."""
    model = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed))
        encoder = Nomeformer(mesh_spec(config).feature_dim, model.embedding_dim, model.num_heads,
                             model.num_attention_blocks, model.mlp_ratio, model.encoder_dropout,
                             model.drop_path, model.use_pe, model.gradient_checkpointing)
    if trained is not None:
        encoder.feature_mean.copy_(trained.feature_mean)
        encoder.feature_std.copy_(trained.feature_std)
    return encoder


def build_model(config: Config, encoder: Nomeformer) -> Jepa:
    model = config.model
    return Jepa(copy.deepcopy(encoder), model.num_attention_blocks_predictor, model.num_heads,
                model.mlp_ratio, NUM_DESCRIPTORS if config.loss.delta else 0)


def forward(network: nn.Module, batch: dict):
    return network(batch["features"], batch["mask"], batch["centroid"], batch["visible"],
                   batch["target"], batch.get("descriptors"))


def compute_loss(out, config: Config) -> dict:
    """This process's part of the step's `loss` and of its terms. Prediction and descriptors are
    means over the faces of all processes, VICReg's terms of each process by itself."""
    weights = config.loss
    terms = {"prediction": global_mean(*prediction_loss(out.prediction, out.target, out.valid))}
    loss = weights.alpha * terms["prediction"]
    if weights.delta:
        terms["descriptors"] = global_mean(*prediction_loss(out.described, out.descriptors,
                                                            out.described_valid))
        loss = loss + weights.delta * terms["descriptors"]
    if weights.beta or weights.gamma:
        variance, covariance = variance_covariance(out.context, out.seen)
        terms["variance"] = variance / world_size()
        terms["covariance"] = covariance / world_size()
        loss = loss + weights.beta * terms["variance"] + weights.gamma * terms["covariance"]
    return {"loss": loss, **terms}


def global_mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return total / all_reduce_sum(count).clamp(min=1)


# -- one epoch -------------------------------------------------------------------------------------

def train_one_epoch(run: Run, network, loader, config: Config) -> None:
    network.train()
    momentum = start_momentum(config.ema.momentum, run.total_steps)
    # After each step: counts, logs, on Ctrl-C saves and stops.
    for (batch,) in run.steps(loader):
        batch = to_device(batch, run.device)
        decay = weight_decay_at(run.step, run.total_steps, *config.training.weight_decay)
        for group in run.optimizer.param_groups:
            if group["name"] == "decay":
                group["weight_decay"] = decay
        with run.autocast():
            out = forward(network, batch)
        losses = compute_loss(out, config)
        run.backward(losses["loss"], losses)
        run.update(config.training.gradient_clip_val)
        run.model.update_target(momentum_at(run.step, run.total_steps, momentum))


# -- what monitors and probe look at ---------------------------------------------------------------

def monitor_batch(config: Config, files: list[Path], seed: int) -> dict:
    """A fixed batch of up to monitor.meshes evenly spaced meshes (or crops) with fixed masks."""
    most = config.monitor.meshes
    chosen = files[::-(-len(files) // most)]
    spec = replace(mask_spec(config), whole_share=0.0)
    dataset = MaskedMeshes(fixed_dataset(config, chosen, None), spec, seed)
    items = range(0, len(dataset), -(-len(dataset) // most))
    return masked_collate_fn([dataset[item] for item in items])


def build_probe(config: Config, train_files: list[Path], val_files: list[Path],
                num_faces: list[int]) -> Probe:
    """num_faces: of the training meshes, of which it is fitted on evenly spaced ones."""
    paths = config.paths
    label_dir = paths.label_dir or paths.mesh_dir
    val_label_dir = label_dir
    if paths.val_mesh_dir is not None:
        val_label_dir = paths.val_label_dir or paths.val_mesh_dir
    every = -(-sum(num_faces) // config.probe.max_faces)
    name_classes(config, lambda: train_files)
    val_root = paths.val_mesh_dir or paths.mesh_dir
    return Probe(config, fixed_dataset(config, train_files[::every], label_dir, paths.mesh_dir),
                 fixed_dataset(config, val_files, val_label_dir, val_root))


# -- checkpoints -----------------------------------------------------------------------------------

def load_model(checkpoint: dict, device: torch.device) -> Jepa:
    """The whole network of a checkpoint of this script, in eval mode."""
    config = Config(checkpoint["config"])
    model = build_model(config, random_encoder(config, checkpoint["seed"]))
    load_weights(model, checkpoint["model"], "the checkpoint", what="model")
    return model.to(device).eval()


def checkpoint_entries(model: Jepa, config: Config) -> dict:
    """What a checkpoint holds beside the common entries. `model` is everything; encoder,
    target_encoder and predictor are the same tensors again, by the names that users of I-JEPA know:
    torch.save writes shared tensors once. feature_spec and cluster_spec: what the encoder was
    trained on."""
    spec = mesh_spec(config)
    names = [name for name in FEATURES if name in spec.features]    # the order of the columns
    return {
        "encoder": model.encoder.state_dict(),
        "target_encoder": model.target_encoder.state_dict(),
        "predictor": model.predictor.state_dict(),
        "feature_spec": {"names": names, "widths": [FEATURES[name] for name in names],
                         "mean": model.encoder.feature_mean.tolist(),
                         "std": model.encoder.feature_std.tolist(),
                         "num_heads": config.model.num_heads},
        "cluster_spec": {"method": spec.clustering, "N": spec.n_clusters,
                         "F": spec.faces_per_cluster, "clusters_per_batch": spec.clusters_per_batch,
                         "unit": spec.unit},
        "version": LAYOUT_VERSION,
    }


def results(loss, values: dict, scores: dict) -> dict:
    """What main returns."""
    return {"loss": loss, **{f"monitor_{name}": value for name, value in values.items()},
            **{f"probe_{name}": value for name, value in scores.items()}}


def test_only(run: Run, config: Config) -> dict:
    """Monitors and probe of a checkpoint."""
    checkpoint = run.checkpoint
    check_same_run(checkpoint, config, checkpoint["total_steps"], ("model", "masking", "loss"))
    model = load_model(checkpoint, run.device)
    start = random_encoder(config, checkpoint["seed"], model.encoder)
    train_files, val_files = split_files(config)
    watched = monitor_batch(config, val_files or train_files, run.args.seed)
    values = measure(model, start, watched, run.args.seed)
    lines = [f"{run.resume_path}: {monitor_line(values)}"]
    scores = {}
    if config.probe.interval and is_main():
        num_faces = build_dataset(config, train_files).num_faces
        prober = build_probe(config, train_files, val_files, num_faces)
        prober.prepare(start, run.device)
        scores = prober.score(model.target_encoder)
        lines.append(prober.report(scores, checkpoint["epoch"]))
    run.report(*lines)
    return results(checkpoint["loss"], values, scores)


# -- main ------------------------------------------------------------------------------------------

def momentum_advice(momentum: float, steps: int) -> str:
    constant = 1 / (1 - momentum)
    text = f"momentum {momentum:.5g} -> 1: a time constant of {constant:.0f} of {steps} steps"
    if momentum and constant > steps / 5:
        text += "; slower than steps / 5, the teacher will hardly leave its start"
    elif constant < steps / 20:
        text += "; faster than steps / 20, which may collapse"
    if steps < 1000:
        text += "; so few steps teach little, a thousand are the least"
    return text


def start_model(run: Run, config: Config, meshes: MeshDataset) -> tuple[Jepa, Nomeformer]:
    """The network as it starts, whatever is resumed, and a copy of its encoder."""
    if run.checkpoint is not None:
        trained = load_model(run.checkpoint, run.device)
        start = random_encoder(config, run.args.seed, trained.encoder)
        return build_model(config, start).to(run.device), start
    start = random_encoder(config, run.args.seed)
    start.feature_mean[:], start.feature_std[:] = feature_statistics(meshes)
    model = build_model(config, start)
    if config.loss.delta:
        statistics = feature_statistics(meshes, "descriptors")
        model.descriptor_mean[:], model.descriptor_std[:] = statistics
    return model.to(run.device), start


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: Config, total_steps: int):
    settings = config.scheduler
    warmup = round(settings.warmup_epochs * total_steps / config.training.epochs)
    warmup = min(warmup, total_steps - 1)
    if settings.name == "onecycle":                     # which has its own
        warmup = 0
    return build_scheduler(optimizer, settings.name, total_steps, warmup, settings.min_lr)


def describe_start(run: Run, config: Config, model: Jepa, train_set: MaskedMeshes,
                   val_files: list[Path]) -> list[str]:
    """Lines for the log."""
    meshes = train_set.dataset
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor)]
    return [*shortened(meshes.notes),
            f"{len(meshes.files)} training and {len(val_files)} validation meshes, "
            f"{sum(meshes.num_faces):,} faces to train on",
            f"{sizes[0]:,} parameters in the encoder, {sizes[1]:,} in the predictor; "
            f"{run.description}",
            momentum_advice(start_momentum(config.ema.momentum, run.total_steps), run.total_steps)]


def main(argv=None) -> dict:
    args = parse_args(argv)
    config = load_config(args.config, DEFAULTS, args.overrides)
    check_config(config)
    training = config.training
    if training.resume and not args.resume:
        args.resume = "auto"
    command_line_wins(config, args, "paths.checkpoint_dir", "paths.log_dir")
    run = Run(args, SCRIPT, DEFAULTS, config.paths.checkpoint_dir, config.paths.log_dir)
    if args.test_only:
        return test_only(run, config)

    # data: rank 0 fills the cache of prepared meshes, the others read it
    with main_first():
        train_files, val_files = split_files(config)
        meshes = build_dataset(config, train_files, args.seed, descriptors=config.loss.delta > 0)
        train_set = MaskedMeshes(meshes, mask_spec(config), args.seed)
        watched = monitor_batch(config, val_files or train_files, args.seed)
    run.check_data(train=meshes)
    sampler = run.plan(len(train_set), config, batch_size=training.batch_size,
                       epochs=training.epochs, compare=COMPARED, free=FREE_ON_RESUME)

    # model, and what watches it
    model, start = start_model(run, config, meshes)
    monitors = Monitors(config, model, start, watched, args.seed)
    run.restore(model)
    prober = None
    if config.probe.interval and is_main():
        prober = build_probe(config, train_files, val_files, meshes.num_faces)
        prober.baselines = run.checkpoint["baselines"] if run.checkpoint else {}
    network = run.wrap(model)

    # optimiser, schedule
    groups = split_decay(model.named_parameters(), training.weight_decay[0])
    optimizer = torch.optim.AdamW(groups, config.optimizer.learning_rate)
    scheduler = build_lr_scheduler(optimizer, config, run.total_steps)
    run.track(config=config, class_names=None, palette=None, optimizer=optimizer,
              scheduler=scheduler, save_interval=config.checkpointing.save_interval,
              monitor="mIoU of the probe", loss=run.checkpoint["loss"] if run.checkpoint else None,
              baselines=prober.baselines if prober else {}, **checkpoint_entries(model, config))
    if prober is not None and not prober.baselines:
        run.entries["baselines"] = prober.prepare(start, run.device)

    loader = build_loader(train_set, sampler, args.num_workers, run.device, masked_collate_fn)
    lines = (*describe_start(run, config, model, train_set, val_files),
             f"untrained: {monitor_line(monitors.untrained)}")
    scores = {}
    with run.training(*lines, log_interval=config.logging.log_interval,
                      tensorboard=config.logging.tensorboard):
        for _ in run.epochs(train_set, sampler):
            train_one_epoch(run, network, loader, config)
            run.entries["loss"] = run.log_epoch(None, {})["loss"]
            beyond = monitors.look(run)
            score = None
            if prober is not None and run.due(config.probe.interval):
                scores = prober.score(model.target_encoder)
                score = scores["miou"]
                prober.log(run, scores)
            # The best is chosen by the probe: the lowest loss is a collapsed network's.
            run.save(run.epoch, score)
            monitors.stop_if(run, beyond)
        run.log.info(f"next: python train_downstream.py CONFIG --pretrained_path "
                     f"{run.folder.model / 'model_last.pth'}")
    return results(run.entries["loss"], monitors.values, scores)


if __name__ == "__main__":
    run_main(main)
