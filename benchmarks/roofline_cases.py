"""A training step and a prediction of every script on made-up data of its users' size, for benchmarks/roofline.py.

The step is the script's own train_one_epoch (train_until of the prototypes) with a batch that is in memory, the
prediction what predict.py calls of the network. Stand-ins take the place of the run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import bench_heads, bench_meshes, bench_sonata  # noqa: E402
from benchmarks.bench_dinov3 import patches_of_classes  # noqa: E402
from data.points import collate_points  # noqa: E402
from models.downstream import face_logits  # noqa: E402
from tests.tiny_clouds import ENCODER, write_clouds  # noqa: E402
from utils.config import Config, load_config  # noqa: E402
from utils.device import AMP_DTYPES, autocast  # noqa: E402
from utils.ema import EMA  # noqa: E402
from utils.training import to_device  # noqa: E402


class Job(NamedTuple):
    """What a row is built with."""

    script: str
    tiny: bool
    device: torch.device
    amp_dtype: torch.dtype | None
    folder: Path

    @property
    def module(self):
        return importlib.import_module(self.script)

    def config(self, name: str, words: list[str]) -> Config:
        return load_config(ROOT / "configs" / name, self.module.DEFAULTS, words)

    def run(self, model, optimizer, num_classes=None) -> bench_heads.OneStep:
        return bench_heads.OneStep(model, optimizer, self.device, self.amp_dtype, num_classes)

    def calls(self, step: Callable, model: torch.nn.Module, predict: Callable) -> dict[str, Callable]:
        @torch.no_grad()
        def prediction():
            with autocast(self.device, self.amp_dtype):
                predict(model.eval())
        return {"step": step, "prediction": prediction}


def head_case(job: Job, name: str) -> dict[str, Callable]:
    """An image of 512 px, ViT-S; the head as its script has it by default."""
    words = ["--device", str(job.device), "--amp-dtype", next(k for k, v in AMP_DTYPES.items() if v is job.amp_dtype),
             "--backbone", "dinov3_tiny" if job.tiny else "dinov3_vits16"]
    calls = bench_heads.build(name, bench_heads.parse_args(words), 64 if job.tiny else 512, 1)
    return {"step": calls["step"], "prediction": calls["inference"]}


def unet_case(job: Job, name: str) -> dict[str, Callable]:
    """U-Net on a ResNet-34, 4 crops of 352 px."""
    size, batch = (64, 2) if job.tiny else (352, 4)
    script, config = job.module, job.config(name, [f"model.backbone=resnet{18 if job.tiny else 34}"])
    model = script.build_model(config).to(job.device, memory_format=script.memory_format(config))
    script.attach_settings(model, config, [], np.zeros((11, 3), np.uint8))
    criterion = script.build_criterion(config, np.ones(11)).to(job.device)
    run, ema = job.run(model, script.build_optimizer(model, config)), EMA(model, config.training.ema)
    data = {"image": torch.randint(256, (batch, 3, size, size), dtype=torch.uint8),
            "label": patches_of_classes(batch, size) % 11}
    image = data["image"].to(job.device)
    return job.calls(lambda: script.train_one_epoch(run, model, [[data]], criterion, ema, 1.0), model,
                     lambda model: model.scores(model.normalize(image)))


def prototype_case(job: Job, name: str) -> dict[str, Callable]:
    """A joint update of two micro-batches of two crops; prediction of one of them."""
    small = ["model.base_width=8", "model.n_blocks=[1,1,1,1]", "dataset.window_size=[65,65]"]
    script, config = job.module, job.config(name, small if job.tiny else [])
    size, model = config.dataset.window_size[0], script.build_model(config).to(job.device)
    script.attach_settings(model, config, [], np.zeros((11, 3), np.uint8))
    data = {"image": torch.randint(256, (2, 3, size, size), dtype=torch.uint8),
            "label": patches_of_classes(2, size) % 11}
    run = job.run(model, script.start_stage("joint", model, config, 10)[0], 11)
    run.count_step, run.stop_requested = run.totals.end_step, lambda: 0
    loader = [data] * config.training.accumulate
    criterion = script.build_criterion(config, np.ones(11)).to(job.device)
    places = Places(loader)
    state = SimpleNamespace(run=run, config=config, model=model, criterion=criterion, loader=loader, train_set=places,
                            sampler=places, progress=SimpleNamespace(stage=1, done=0))

    def step():
        state.progress.done = 0
        script.train_until(state, "joint", model, len(loader))

    image = data["image"].to(job.device)
    return job.calls(step, model, lambda model: model.scores(model.normalize(image)))


class Places(list):
    """Stands in for a data set and its sampler, which know the epoch."""

    def set_epoch(self, *place: int) -> None:
        pass


def write_meshes(job: Job, config: Config) -> None:
    """A batch of meshes of 1,500 faces in files, for the config, whose training reads, prepares and augments them."""
    vertices, faces = bench_meshes.noisy_sphere(100 if job.tiny else 1500)
    labels = "\n".join(map(str, np.random.default_rng(0).integers(0, config.model.n_classes, len(faces))))
    for index in range(config.training.batch_size):
        bench_meshes.write_obj(job.folder / f"{index}.obj", vertices, faces)
        (job.folder / f"{index}.txt").write_text(labels)
    folder, paths = str(job.folder), config.paths
    paths.mesh_dir, paths.val_mesh_dir, paths.cache_dir = folder, folder, str(job.folder / "cache")
    config.data.repeat = []


SMALL_MESHES = ["training.batch_size=2", "model.embedding_dim=16"]


def mesh_case(job: Job, name: str) -> dict[str, Callable]:
    """All of the network is trained, with the batch of the config."""
    script, config = job.module, job.config(name, SMALL_MESHES if job.tiny else [])
    write_meshes(job, config)
    dataset = script.build_dataset(config, "train")
    batch = dataset.collate_fn([dataset[index] for index in range(len(dataset))])
    model = script.build_model(config, "all").to(job.device)
    run = job.run(model, torch.optim.AdamW(script.parameter_groups(model, config)), config.model.n_classes)
    criterion = script.build_criterion(config).to(job.device)
    ema = EMA(model, config.training.ema_decay) if config.training.use_ema else None
    there = to_device(batch, job.device)
    return job.calls(lambda: script.train_one_epoch(run, model, [[batch]], criterion, ema,
                                                    config.training.gradient_clip_val),
                     model, lambda model: face_logits(model, there))


def jepa_case(job: Job, name: str) -> dict[str, Callable]:
    """A step of pre-training; the prediction is the embedding that train_downstream.py takes."""
    script, config = job.module, job.config(name, SMALL_MESHES if job.tiny else [])
    write_meshes(job, config)
    files = script.split_files(config)[0]
    meshes = script.build_dataset(config, files, descriptors=config.loss.delta > 0)
    dataset = script.MaskedMeshes(meshes, script.mask_spec(config), 0)
    batch = script.masked_collate_fn([dataset[index] for index in range(len(dataset))])
    model = script.build_model(config, script.random_encoder(config, 0)).to(job.device)
    groups = script.split_decay(model.named_parameters(), 0.05)
    run = job.run(model, torch.optim.AdamW(groups))
    there = to_device(batch, job.device)
    return job.calls(lambda: script.train_one_epoch(run, model, [[batch]], config), model,
                     lambda model: model.target_encoder(there["features"], there["mask"], there["centroid"]))


def cloud_case(job: Job, name: str) -> dict[str, Callable]:
    """Table-top scenes with the config's batch, everything trained."""
    script, config = job.module, job.config(name, [f"data.root={job.folder}", "paths.cache_dir=null"])
    count = 2 if job.tiny else config.training.batch_size
    write_clouds(job.folder / "train", count, points=300 if job.tiny else 57_000)
    dataset = script.build_dataset(config, "train")
    batch = collate_points([dataset[index] for index in range(count)])
    model = script.build_model(config, ENCODER if job.tiny else config.model.encoder.to_dict()).to(job.device)
    return cloud_calls(job, config, model, batch)


def sonata_case(job: Job, name: str) -> dict[str, Callable]:
    """Sonata's network, frozen, under a linear head: a room of 30,000 voxels."""
    classes = len(bench_sonata.POINT_CLASSES)
    config = job.config(name, ["data.root=.", f"model.num_classes={classes}"])
    network = bench_sonata.TINY if job.tiny else bench_sonata.SONATA
    model = job.module.build_model(config, network).to(job.device)
    return cloud_calls(job, config, model, bench_sonata.make_batch(500 if job.tiny else 30_000))


def cloud_calls(job: Job, config: Config, model: torch.nn.Module, batch: dict) -> dict[str, Callable]:
    script = job.module
    run = job.run(model, torch.optim.AdamW(script.parameter_groups(model, config)), config.model.num_classes)
    criterion = script.MaskedCrossEntropyLoss().to(job.device)
    there = to_device(batch, job.device)
    return job.calls(lambda: script.train_one_epoch(run, model, [[batch]], criterion, config.training.clip_grad), model,
                     lambda model: model(there))


# Row: script, what builds it, what that is given: a config of configs/, or a head of bench_heads.
CASES = {
    "linear head": ("train_linear_head", head_case, "linear"),
    "PMT head": ("train_pmt_head", head_case, "pmt"),
    "UPerNet head": ("train_upernet_head", head_case, "upernet"),
    "Mask2Former head": ("train_m2f_head", head_case, "m2f"),
    "EoMT": ("train_eomt", head_case, "eomt"),
    "U-Net": ("train_segmentation", unet_case, "segmentation_camvid.yaml"),
    "prototypes": ("train_prototype", prototype_case, "prototype_camvid.yaml"),
    "mesh clusters": ("train_downstream", mesh_case, "mesh_humanbody.yaml"),
    "DiffusionNet": ("train_downstream", mesh_case, "mesh_humanbody_diffusion.yaml"),
    "mesh pre-training": ("train_jepa", jepa_case, "jepa_humanbody.yaml"),
    "small cloud network": ("train_sonata", cloud_case, "sonata/tabletop-ft.yaml"),
    "Sonata, linear head": ("train_sonata", sonata_case, "sonata/semseg-sonata-v1m1-0a-scannet-lin.yaml"),
}


def build(row: str, tiny: bool, device: torch.device, amp_dtype: torch.dtype | None,
          folder: str) -> dict[str, Callable]:
    """The calls `step` and `prediction` of a row. folder: for its data."""
    script, function, given = CASES[row]
    torch.manual_seed(0)
    return function(Job(script, tiny, device, amp_dtype, Path(folder)), given)
