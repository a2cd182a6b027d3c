"""What train_prototype.py needs besides its method: how far its stages are and what they save, passes over whole
photographs for push and pruning, what describes and shows the prototypes, and why a pixel has its class.

This module stands above data/ and models/; only scripts import it. model: a PPNet with the attributes that `attach` of
utils/image_scripts.py gives it. P prototypes, C classes, h x w cells of the feature grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from data import cityscapes, voc
from data.image_splits import check_file_settings, class_info
from data.images import SegmentationDataset
from data.label_map import label_map_of
from data.photos import Photo, photo_format, read_image
from data.prototype_results import explain_pixels, prototype_colors, write_gallery, write_prototype_prediction
from models.ppnet import PPNet
from models.prototype_push import NearestPatches, PushTable, patch_box, provenance, prune_keep, purity, push
from utils.checkpoint import save_checkpoint
from utils.checks import check_positive
from utils.config import Config
from utils.device import autocast, describe
from utils.distributed import EpochBatchSampler, all_gather, is_main, own_share
from utils.image_inference import photo_rows, resize_image
from utils.image_scripts import label_photo
from utils.log import progress
from utils.prototype_metrics import PrototypeStatistics, noise_stability
from utils.run import Run
from utils.seed import seed_worker
from utils.training import build_loader

MOST_EXPLAINED = 1 << 24                # pixels of a photograph whose distances are found in one pass
DATASETS = {"cityscapes": cityscapes, "pascal": voc}
STAGES = ("warmup", "joint", "push", "finetune", "prune", "refinetune")
PHASE = {"warmup": 0, "joint": 1, "push": 1, "finetune": 2, "prune": 2, "refinetune": 2}
SCANS = ("push", "prune")               # passes over whole photographs; the others train


# -- settings ----------------------------------------------------------------------------------------------------------

def class_list(config: Config) -> tuple[list[str], np.ndarray]:
    """Class names and colours (C, 3) uint8."""
    data = config.dataset
    if data.name in DATASETS:
        known = DATASETS[data.name]
        return list(known.CLASS_NAMES), np.array(known.PALETTE, np.uint8)
    return class_info(data.root, data.classes, config.model.num_classes, data.label_map)


def check_settings(config: Config) -> None:
    """Errors that need more than one key to see, but for the augmentation's. Raises ValueError."""
    dataset = config.dataset
    model = config.model
    for key in ("backbone_lr", "aspp_lr", "prototype_lr", "last_layer_lr", "finetune_lr", "power"):
        check_positive(f"optimizer.{key}", config.optimizer[key])
    shape = model.prototype_shape
    if len(shape) != 4 or shape[2:] != [1, 1] or min(shape) < 1 or shape[0] % model.num_classes:
        raise ValueError(f"model.prototype_shape={shape}: expected [P, D, 1, 1] with P a multiple of "
                         f"model.num_classes={model.num_classes}")
    known = {"cityscapes": 19, "pascal": 21}.get(dataset.name, model.num_classes)
    if model.num_classes != known:
        raise ValueError(f"model.num_classes={model.num_classes}: dataset.name={dataset.name} has {known} classes")
    check_file_settings(dataset, model.num_classes)
    if dataset.name in DATASETS and (dataset.label_map or dataset.mask_suffix):
        raise ValueError(f"dataset.label_map, mask_suffix: dataset.name={dataset.name} has its own numbers and names; "
                         f"leave them out")
    if len(model.n_blocks) != 4 or min(model.n_blocks) < 1:
        raise ValueError(f"model.n_blocks={model.n_blocks}: the number of blocks of four stages")
    if not all(isinstance(scale, int | float) and 0 < scale <= 2 for scale in model.scales):
        raise ValueError(f"model.scales={model.scales}: factors above 0, such as [0.5, 0.75]; [] for one scale")
    if len(dataset.mean) != 3 or len(dataset.std) != 3 or min(dataset.std) <= 0:
        raise ValueError(f"dataset.mean={dataset.mean}, std={dataset.std}: red, green and blue, std above 0")
    _check_stages(config)
    _check_sizes(config)


def _check_stages(config: Config) -> None:
    training = config.training
    for key in ("steps", "train_last_layer"):
        if len(training[key]) != 3:
            raise ValueError(f"training.{key}={training[key]}: one value for each of the three phases")
    lengths = {f"training.steps[{i}]": steps for i, steps in enumerate(training.steps)}
    lengths["evaluation.interval"] = config.evaluation.interval
    for name, steps in lengths.items():
        if not isinstance(steps, int) or steps < 0 or steps % training.accumulate:
            raise ValueError(f"{name}={steps}: micro-steps, a multiple of training.accumulate={training.accumulate}")
    # what would otherwise fail after the push, or in the pruning
    if not training.train_last_layer[2] and training.steps[2]:
        raise ValueError("training.train_last_layer: fine-tuning trains nothing else, so the third must be true (or "
                         "training.steps[2]=0)")
    if training.prune_threshold > training.prune_neighbors:
        raise ValueError(f"training.prune_threshold={training.prune_threshold}: at most training.prune_neighbors="
                         f"{training.prune_neighbors}, or no prototype is left")


def _check_sizes(config: Config) -> None:
    dataset = config.dataset
    evaluation = config.evaluation
    for name, size in (("dataset.window_size", dataset.window_size), ("evaluation.squash", evaluation.squash)):
        if size is None:
            continue
        if len(size) != 2 or not all(isinstance(side, int) and side >= 8 for side in size):
            raise ValueError(f"{name}={size}: [height, width] in pixels")
    side = max(dataset.window_size) * min([1, *config.model.scales])
    if config.training.batch_size == 1 and side < 8 and not config.model.freeze_bn:
        raise ValueError(f"training.batch_size=1 and dataset.window_size={dataset.window_size}: batch norm cannot "
                         f"train on one cell; set one of them larger")
    for name in ("window", "size"):
        if evaluation.squash and evaluation[name]:
            raise ValueError(f"evaluation.squash and evaluation.{name}: squashing is of whole photographs; name one")


# -- how far a run is --------------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """How far the run is. stage: index into STAGES. done: micro-steps or photographs of the stage. waited,
    best_in_stage: of early stopping."""

    stage: int = 0
    done: int = 0
    waited: int = 0
    best_in_stage: float = -1.0


class Job:
    """What the stages share: the run, the model, the data, and how far they are.

    datasets: of train, val and push. lengths: micro-steps or photographs of each stage. ValueError for a --phase whose
    turn it is not in the resumed run.
    """

    def __init__(self, run: Run, model: PPNet, criterion: torch.nn.Module, datasets: tuple, sampler: EpochBatchSampler,
                 lengths: dict[str, int]) -> None:
        self.run = run
        self.config = model.config
        self.model = model
        self.criterion = criterion
        self.train_set, self.val_set, self.push_set = datasets
        self.sampler = sampler
        self.lengths = lengths
        self.loader = build_loader(self.train_set, sampler, run.args.num_workers, run.device)
        self.progress = Progress()
        self.resumed = run.checkpoint           # until a stage has taken what it needs of it
        if self.resumed is not None:
            values = {name: self.resumed[name] for name in asdict(self.progress)}
            self.progress = Progress(**values)
            self.next_stage()                   # refuses a --phase that is not its turn

    def next_stage(self) -> str | None:
        """The stage to go on with, None where all are done, or all of --phase. ValueError for a --phase whose turn has
        not come."""
        phase = self.run.args.phase
        left = [name for name in STAGES[self.progress.stage:] if self.lengths[name]]
        if not left or (phase is not None and PHASE[left[0]] > phase):
            return None
        if phase is not None and PHASE[left[0]] < phase:
            raise ValueError(f"--phase {phase}: the checkpoint is in {left[0]}, phase {PHASE[left[0]]}; finish that "
                             f"first")
        self.progress.stage = STAGES.index(left[0])
        return left[0]

    def save(self, score: float | None = None, finished: str | None = None) -> None:
        """Write model_last.pth; model_best.pth where the score is the best of its kind of model; and the end of the
        stage `finished` under its name."""
        run = self.run
        run.epoch = self.progress.stage
        # In the middle of a training stage another number of processes is refused.
        run.batch = self.progress.done if run.optimizer is not None else 0
        run.entries |= {**asdict(self.progress), "prototypes": self.model.provenance}
        snapshot = run.snapshot()               # in every process: it gathers what they have
        if not is_main():
            return
        if score is not None and run.keeper.save_best_if(score, snapshot):
            run.log.info(f"New best mIoU: {score:.4f}. Checkpoint saved.")
        if finished is not None:                # before model_last, which passes on to the next
            save_checkpoint(run.folder.model / f"{finished}.pth", **snapshot, best=run.keeper.state_dict())
        run.keeper.save_last(snapshot)

    def stop_if_asked(self, name: str) -> None:
        self.run.stop_if_asked(f"in {name} after {self.progress.done} of {self.lengths[name]}")

    def end_stage(self, name: str, result: dict) -> None:
        """The next stage starts with an empty optimiser; save, and stop where that was asked."""
        done = self.progress.done
        self.progress = Progress(self.progress.stage + 1)
        self.run.optimizer = self.run.scheduler = self.run.entries["table"] = None
        self.save(result["metrics"]["miou"], finished=name)
        if self.next_stage() is not None:
            self.run.stop_if_asked(f"after {name}: {done} of {self.lengths[name]}")

    def describe(self) -> list[str]:
        """Lines for the log."""
        training = self.config.training
        images = training.batch_size * self.run.world
        stages = [f"{name} {length:,} images" if name in SCANS else
                  f"{name} {length:,} steps = {length // training.accumulate:,} updates"
                  for name, length in self.lengths.items() if length]
        return [f"{len(self.train_set)} training, {len(self.val_set)} validation and {len(self.push_set)} push images",
                f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {len(self.model.class_identity)} "
                f"prototypes of {len(self.model.class_names)} classes; {images} images a micro-step, "
                f"{images * training.accumulate} an update, on {describe(self.run.device)}, seed {self.run.args.seed}",
                f"stages: {', '.join(stages)}"]


def keep_resumed(run: Run) -> None:
    """Make a checkpoint that was resumed from elsewhere what --resume auto goes on from."""
    checkpoint = run.checkpoint
    last = run.folder.model / "model_last.pth"
    if run.resume_path in (None, last):
        return
    run.resume_path = last
    if not is_main():
        return
    run.folder.create()
    taken = {name: value for name, value in checkpoint.items() if name not in ("format", "best")}
    end = run.folder.model / f"{STAGES[checkpoint['stage'] - 1]}.pth"
    # Lost where a kill came right after model_best.pth.
    if checkpoint["stage"] and not checkpoint["done"] and not end.is_file():
        save_checkpoint(end, **taken, best=checkpoint["best"])
    run.keeper.save_last(taken)


def log_evaluation(run: Run, place: Progress, train: dict | None, result: dict, seconds: float) -> None:
    """An evaluation on the console and in log.jsonl; train: means of the training since the last one, None after a push
    or pruning."""
    name = STAGES[place.stage]
    line = f"{name} (phase {PHASE[name]}), {place.done} steps:"
    if train is not None:
        line += (f" Train Loss: {train['total']:.4f}, Train mIoU: {train['miou']:.4f}, Train Acc: "
                 f"{train['overall_accuracy']:.4f} (ce {train['ce']:.4f}, kld {train['kld']:.4f}, l1 "
                 f"{train['l1']:.1f})")
        run.log.evaluation(place.stage, run.step, "train", {**train, "loss": train["total"], "stage_name": name})
    val = result["metrics"]
    run.log.evaluation(place.stage, run.step, "val", {**val, "loss": result["loss"], "stage_name": name})
    run.log.info(f"{line}\n          Val mIoU: {val['miou']:.4f}, Val Acc: {val['overall_accuracy']:.4f}, Val Loss: "
                 f"{result['loss']:.4f} (evaluation {result['seconds']:.2f} s) ({seconds:.2f} s)")


# -- passes over whole photographs -------------------------------------------------------------------------------------

def new_table(name: str, model: PPNet) -> PushTable | NearestPatches:
    """What the scan `name`, push or prune, fills."""
    P, D = model.prototype_vectors.shape[:2]
    if name == "push":
        return PushTable(P, D)
    return NearestPatches(P, model.config.training.prune_neighbors)


@torch.no_grad()
def scan(run: Run, model: PPNet, dataset: SegmentationDataset, table: PushTable | NearestPatches, begin: int, end: int,
         name: str) -> int:
    """Show the photographs begin..end-1 (shared among the processes) at their own size to a
    PushTable or NearestPatches; returns where it stopped, `end` unless a signal came. Afterwards
    every process's table holds what all of them saw."""
    model.eval()
    mine = [begin + i for i in own_share(end - begin)]
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=run.args.num_workers,
                        worker_init_fn=seed_worker, generator=torch.Generator())
    items = iter(loader)
    done = begin
    for turn in progress(range(-(-(end - begin) // run.world)), name):
        if turn < len(mine):
            item = next(items)
            image = model.normalize(item["image"][None].to(run.device))
            features = model.features_of(image)                     # (1, D, h, w) after the sigmoid
            distances = model.prototype_distances(features)         # (1, P, h, w)
            label = item["label"].to(run.device)
            seen = (features[0], distances[0]) if isinstance(table, PushTable) else (distances[0],)
            table.update(mine[turn], *seen, label, model.class_identity)
        done = min(end, begin + (turn + 1) * run.world)
        if run.stop_requested() and done < end:
            break
    table.merge(all_gather(table.state_dict()))
    return done


@torch.no_grad()
def self_activations(model: PPNet, dataset: SegmentationDataset) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (prototype, its similarities (h, w) on the photograph it comes from, label (H, W) of
    that); prototypes without a patch, or whose photograph is not in `dataset`, are left out."""
    model.eval()
    device = next(model.parameters()).device
    places = {str(file): index for index, file in enumerate(dataset.files)}
    by_image: dict[int | None, list[int]] = {}
    for prototype, entry in enumerate(model.provenance):
        by_image.setdefault(places.get(entry["image"]), []).append(prototype)
    by_image.pop(None, None)
    for index, prototypes in by_image.items():
        item = dataset[index]
        features = model.features_of(model.normalize(item["image"][None].to(device)))
        similarity = model.similarity(model.prototype_distances(features))[0].cpu()     # (P, h, w)
        for prototype in prototypes:
            yield prototype, similarity[prototype], item["label"]


def finish_push(model: PPNet, table: PushTable, dataset: SegmentationDataset) -> list[str]:
    """Overwrite the prototypes by the patches that were found, drop duplicates, and note where each
    comes from; returns lines for the log."""
    entries = model.provenance = provenance(model, table, dataset.files)
    report = push(model, table)
    for prototype, similarity, label in self_activations(model, dataset):
        entry = model.provenance[prototype]
        entry["box"] = patch_box(similarity, entry["cell"], label == entry["class"])
    lines = [f"push: {len(entries)} prototypes, {len(report.unpushed)} without a patch, "
             f"{len(report.duplicates)} duplicates removed, {len(report.kept)} left"]
    if report.unpushed:
        absent = sorted({model.class_names[entries[p]["class"]] for p in report.unpushed})
        lines.append(f"WARNING: {len(report.unpushed)} prototypes found no patch and keep their learned vector: "
                     f"{', '.join(absent)} never {'occurs' if len(absent) == 1 else 'occur'} in the push set")
    return lines


def finish_prune(model: PPNet, table: NearestPatches) -> list[str]:
    """Drop the prototypes with too few neighbours of their class; returns lines for the log."""
    keep = prune_keep(table, model.class_identity, model.config.training.prune_threshold)
    before = model.class_identity.sum(0).int()
    after = model.class_identity[keep].sum(0).int()
    model.remove(keep)
    lines = [f"pruning: {int(before.sum())} prototypes, {len(keep)} left"]
    lost = [model.class_names[c] for c in range(len(after)) if before[c] and not after[c]]
    if lost:
        lines.append(f"WARNING: no prototype is left of {', '.join(lost)}: they cannot be "
                     f"predicted any more")
    return lines


# -- what a trained network is, and why -------------------------------------------------------------------------------

@torch.no_grad()
def describe_prototypes(model: PPNet, dataset: SegmentationDataset, limit: int = 0) -> dict:
    """Purity, diversity, sparsity, noise stability and use of the prototypes over a labelled
    split."""
    device = next(model.parameters()).device
    nearest = new_table("prune", model)
    statistics = PrototypeStatistics(model)
    for index in progress(own_share(min(len(dataset), limit or len(dataset))), "prototypes"):
        item = dataset[index]
        image = model.normalize(item["image"][None].to(device))
        label = item["label"].to(device)
        distances = model.prototype_distances(model.features_of(image))[0]              # (P, h, w)
        nearest.update(index, distances, label, model.class_identity)
        statistics.update(distances, label)
        statistics.add_stability(noise_stability(model, image, index))
    nearest.merge(all_gather(nearest.state_dict()))
    result = statistics.result()
    return {**result.pop("sparsity"), **result,
            "purity": purity(nearest, model.class_identity).tolist()}


@torch.no_grad()
def label_with_distances(model: PPNet, path: str | Path, amp_dtype: torch.dtype | None = None) -> dict:
    """Label a photograph, see label_photo, with the squared distances (P, h, w) of the grid cells
    to the prototypes. They are those behind the label unless evaluation.size, window or tta change
    how it is made: they are of one pass over the whole photograph, which is reduced to
    MOST_EXPLAINED pixels where it is larger."""
    device = next(model.parameters()).device
    prediction = label_photo(model, path, amp_dtype)
    photo = shown_image(prediction["photo"], device)                            # (1, 3, H, W)
    with autocast(device, amp_dtype, photo.shape[-1]):
        features = model.features_of(model.shown(model.normalize(photo)))       # (1, D, h, w)
    distances = model.prototype_distances(features)[0]                          # (P, h, w)
    return {**prediction, "distances": distances.cpu()}


def shown_image(photo: Photo, device: torch.device) -> Tensor:
    """A photograph as one image (1, 3, H, W) uint8, of at most about MOST_EXPLAINED pixels."""
    image = photo_rows(photo, device)
    scale = min(1.0, (MOST_EXPLAINED / (photo.size[0] * photo.size[1])) ** 0.5)
    shape = tuple(max(1, int(length * scale)) for length in image.shape)
    return resize_image(image, shape).read(0, shape[0])[None]


def write_explained(model: PPNet, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM*: labels in the numbers of the masks, an
    overlay, the map of the winning prototypes, and for --explain the prototypes that decided at the
    named pixels."""
    data = model.config.dataset
    identity = model.class_identity.cpu().numpy()
    weight = model.last_layer.weight.detach().cpu()
    similarity = model.similarity(prediction["distances"])                      # (P, h, w)
    of_cell = torch.einsum("cp,phw->hwc", weight, similarity).argmax(-1)        # (h, w)
    winner = (similarity * weight[of_cell].permute(2, 0, 1)).argmax(0).numpy()  # (h, w)
    explained = []
    if options.explain:                 # first: a pixel outside of the photograph leaves no files
        explained = explain_pixels(stem, prediction["photo"].image(), options.explain, weight.numpy(),
                                   similarity.numpy(), model.class_names, identity,
                                   model.provenance, partial(read_source, data))
    return explained + write_prototype_prediction(
        stem, {**prediction, "winner": winner}, model.palette,
        prototype_colors(identity, model.palette), options.labels, options.picture,
        data.ignore_label, data.reduce_zero_label,
        model.file_ids, label_map_of(data),
        options.confidence)


def read_source(data: Mapping, entry: dict):
    """The photograph that an entry of model.provenance names, read as `data`, a section of the settings, says, or None
    where it is gone."""
    if entry["image"] and Path(entry["image"]).is_file():
        return read_image(entry["image"], photos=photo_format(data))
    return None


def write_pages(run: Run, model: PPNet, dataset: SegmentationDataset) -> Path:
    """OUTPUT_DIR/prototypes: the page of all prototypes with their purity over the push set, and
    prototypes.json, where each comes from. All processes have to call it; the first writes."""
    folder = Path(run.args.output_dir) / "prototypes"
    end = min(len(dataset), run.args.limit_batches or len(dataset))
    nearest = new_table("prune", model)
    if scan(run, model, dataset, nearest, 0, end, "prototypes") < end:
        run.stop_if_asked("after all stages, before the page of prototypes")
    if is_main():
        activations = {p: similarity.numpy()
                       for p, similarity, _ in self_activations(model, dataset)}
        write_gallery(folder, model.provenance, model.class_names, model.palette,
                      partial(read_source, model.config.dataset),
                      activations, model.last_layer.weight.detach().cpu().numpy(),
                      purity(nearest, model.class_identity).numpy())
        (folder / "prototypes.json").write_text(json.dumps(model.provenance, indent=1) + "\n",
                                                encoding="utf-8")
    return folder / "index.html"
