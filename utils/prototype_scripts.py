"""What train_prototype.py does with its prototypes: passes over whole photographs for push and pruning, what describes
and shows them, and why a pixel has its class.

This module stands above data/ and models/; only scripts import it. model: a PPNet with the attributes that `attach` of
utils/image_scripts.py gives it. P prototypes, C classes, h x w cells of the feature grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from data import cityscapes, voc
from data.image_splits import label_map_of
from data.images import SegmentationDataset
from data.photos import Photo, photo_format, read_image
from data.prototype_results import explain_pixels, prototype_colors, write_gallery, write_prototype_prediction
from models.ppnet import PPNet
from models.prototype_push import NearestPatches, PushTable, patch_box, provenance, prune_keep, purity, push
from utils.device import autocast
from utils.distributed import all_gather, is_main, own_share
from utils.image_inference import photo_rows, resize_image
from utils.image_scripts import label_photo
from utils.log import progress
from utils.prototype_metrics import PrototypeStatistics, noise_stability
from utils.run import Run
from utils.seed import seed_worker

MOST_EXPLAINED = 1 << 24                # pixels of a photograph whose distances are found in one pass
DATASETS = {"cityscapes": cityscapes, "pascal": voc}


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
    with autocast(device, amp_dtype):
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
        getattr(DATASETS.get(data.name), "LABEL_IDS", None), label_map_of(data),
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
