"""What train_downstream.py does with a trained network: class probabilities of every face, averaged over the views of a
mesh, scores of a data set, labels and pictures of files, and embeddings that are computed once.

This module stands above data/ and models/; only scripts import it. model: a DownstreamClassifier with the attributes
that the script's `attach` gives it. C classes, P faces of a mesh in the order of its file, N clusters of F face slots.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from data.label_map import LabelMap, read_label_map
from data.mesh import CachedFeatures, MeshDataset, each_face_once
from data.mesh_io import LABEL_KINDS, NAMED_KINDS, label_names, read_mesh
from data.mesh_planes import plane_units, pooled
from data.mesh_results import write_mesh_result
from data.mesh_surfaces import open_meshes
from data.upright import UP
from models.downstream import DownstreamClassifier, SurfaceClassifier, face_logits, share_of, texture_of
from utils.config import Config, Setting
from utils.device import autocast
from utils.distributed import all_reduce_sum, main_first, own_share
from utils.log import progress
from utils.metrics import ConfusionMatrix, miou_of_labels, segmentation_metrics
from utils.render import label_colors, pca_colors, render_mesh
from utils.seed import seed_worker
from utils.training import to_device

# Keys of `data` that say what labels and files mean; of train_downstream.py and train_jepa.py alike.
LABEL_SETTINGS = {
    "recursive": False,                             # also the folders below mesh_dir; labels likewise
    "up": Setting("auto", (str,), UP),              # the files' up axis; auto: y in .glb, else z
    "label_offset": 0,                              # added to the files' values: -1: they count from 1
    "label_map": Setting(None, (str, dict)),        # or value -> class: 0:0,31:1,32:2, or a file
    "ignore_labels": [],                            # the files' values for "not labelled", as 255
    "label_kind": Setting("auto", (str,), LABEL_KINDS),
    "label_field": Setting(None, (str,)),           # the property of a PLY; None: label, labels, class
}


def class_names(config: Config) -> list[str]:
    """data.class_names, else those of data.label_map, else class 0, class 1 ..."""
    label_map = mesh_label_map(config)
    names = list(config.data.class_names) or (label_map and label_map.names)
    return names or [f"class {c}" for c in range(config.model.n_classes)]


def mesh_label_map(config: Config) -> LabelMap | None:
    return None if config.data.label_map is None else read_label_map(config.data.label_map)


def check_labels(config: Config) -> None:
    """ValueError for settings of labels that do not go together. A label map in a file becomes part of the config."""
    data = config.data
    named = data.label_kind in NAMED_KINDS
    if data.label_map is not None:
        if named or data.label_offset:
            raise ValueError("data.label_map: leave it out with data.label_offset, and with data.label_kind: material "
                             "or group, whose classes are data.class_names")
        if (given := mesh_label_map(config).num_classes) != config.model.n_classes:
            raise ValueError(f"data.label_map has {given} classes and model.n_classes={config.model.n_classes}; set "
                             f"model.n_classes to {given}")
        data.label_map = mesh_label_map(config).text()
    if named and data.label_offset:
        raise ValueError(f"data.label_offset={data.label_offset}: names of data.label_kind: {data.label_kind} are no "
                         f"numbers; leave it out")
    if not named and any(isinstance(value, str) for value in data.ignore_labels):
        raise ValueError(f"data.ignore_labels={data.ignore_labels}: expected numbers; names are for data.label_kind: "
                         f"material or group")


def check_same_up(checkpoint: Mapping | None, config: Config) -> None:
    """ValueError where the resumed run saw its meshes turned in another way."""
    before = config.data.up if checkpoint is None else checkpoint["config"]["data"].get("up", config.data.up)
    if before != config.data.up:
        raise ValueError(f"data.up={config.data.up}: the resumed run has {before}; resume with that")


def name_classes(config: Config, find_files: Callable[[], Sequence[Path]]) -> None:
    """With data.label_kind material or group and no data.class_names: take the names in the files found, sorted.
    ValueError where they are not model.n_classes."""
    data = config.data
    if data.label_kind not in NAMED_KINDS or data.class_names:
        return
    names = label_names(find_files(), data.label_kind, data.ignore_labels)
    if len(names) != config.model.n_classes:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"data.label_kind: {data.label_kind}: the meshes have {len(names)} names ({shown}) and "
                         f"model.n_classes={config.model.n_classes}; correct that, or choose by data.class_names")
    data.class_names = names


def label_options(config: Config) -> dict:
    """What MeshDataset has to know of labels."""
    data = config.data
    return {"num_classes": config.model.n_classes, "label_offset": data.label_offset, "label_kind": data.label_kind,
            "label_field": data.label_field, "label_map": mesh_label_map(config), "ignore_labels": data.ignore_labels,
            "label_names": list(data.class_names) if data.label_kind in NAMED_KINDS else ()}


def values_in_files(config: Config, label: np.ndarray) -> np.ndarray:
    """Classes in the numbers of the training labels' files."""
    label_map = mesh_label_map(config)
    return label - config.data.label_offset if label_map is None else label_map.to_values(label)


@torch.no_grad()
def mesh_probabilities(model: DownstreamClassifier, dataset: MeshDataset, device: torch.device,
                       amp_dtype: torch.dtype | None = None, batch_size: int = 8, num_workers: int = 0,
                       limit_batches: int = 0,
                       criterion: nn.Module | None = None) -> Iterator[tuple[int, Tensor, float, float]]:
    """Yield (index, probability (P, C) in file order, loss sum, loss weight) of every mesh of this process's share.

    The probability is the mean over the views of the mesh, with evaluation.pool_planes over each of its planes, and
    over the triangles of a polygon, by area; the loss (0 without criterion) is that of the first view.
    """
    if model.training:                                      # a walk through all modules for each of many small files
        model.eval()
    mine = set(own_share(len(dataset.files)))
    items = [item for item, (index, _, _) in enumerate(dataset.items) if index in mine]
    loader = DataLoader(Subset(dataset, items), batch_size, collate_fn=dataset.collate_fn, num_workers=num_workers,
                        worker_init_fn=seed_worker, generator=torch.Generator())
    current = None                                          # [index, sum of probabilities, loss sum, loss weight]
    done = 0
    for number, batch in enumerate(progress(loader, "evaluating")):
        if limit_batches and number >= limit_batches:
            break
        batch = to_device(batch, device)
        with autocast(device, amp_dtype):
            logits = face_logits(model, batch).float()                                        # (B, N, F, C)
        probabilities = logits.softmax(-1).cpu()
        face_index = batch["face_index"].cpu()
        mask = batch["mask"].cpu()
        for b, index in enumerate(batch["index"].tolist()):
            if current is None or index != current[0]:
                if current is not None:
                    yield _finished(current, dataset, model.config.evaluation.pool_planes)
                current = [index, torch.zeros(dataset.num_faces[index], model.num_classes), 0.0, 0.0]
            current[1][face_index[b][mask[b]]] += probabilities[b][mask[b]]      # a mesh's items are consecutive
            if criterion is not None and dataset.items[items[done]][1] == 0:
                share = {name: value[b] for name, value in share_of(batch).items()}
                total, weight = criterion.sum_and_weight(logits[b], batch["label"][b], batch["mask"][b], **share)
                current[2] += total.item()
                current[3] += weight.item()
            done += 1
    if current is not None:
        yield _finished(current, dataset, model.config.evaluation.pool_planes)


def _finished(current, dataset, pool_planes):
    index, total, loss, weight = current
    probability = total / total.sum(1, keepdim=True).clamp(min=1e-12)
    if pool_planes:
        mesh = dataset.mesh(index)
        unit = plane_units(mesh.vertices, mesh.faces, pool_planes)
        probability = torch.from_numpy(pooled(probability.numpy(), unit, mesh.area))
    if dataset.num_polygons[index] < dataset.num_faces[index]:
        mesh = dataset.mesh(index)
        probability = torch.from_numpy(pooled(probability.numpy(), mesh.polygon, mesh.area))
    return index, probability, loss, weight


def face_predictions(logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of a batch in training, of one shape, every face of the files once."""
    if "polygon" not in batch:
        return logits.argmax(-1), batch["label"]
    probability, label = each_face_once(logits.detach().float().softmax(-1), batch)
    return probability.argmax(-1), label


def evaluate_meshes(model: DownstreamClassifier, dataset: MeshDataset, device: torch.device,
                    amp_dtype: torch.dtype | None, batch_size: int, num_workers: int, limit_batches: int,
                    criterion: nn.Module) -> dict:
    """Score every face of a data set exactly once, a polygon as one face.

    Returns metrics (by number of faces, the headline), tables {"by area": metrics by surface}, loss (per face, first
    view), matrix, examples [(index, name, mIoU)] and predictions {index: (P,) int64 of the triangles in file order} of
    this process, and seconds.
    """
    started = time.monotonic()
    C = model.num_classes
    loss = weight = 0.0
    examples = []
    predictions = {}
    faces = []                                                  # prediction, label and area of the faces of each file
    for index, probability, loss_sum, loss_weight in mesh_probabilities(
            model, dataset, device, amp_dtype, batch_size, num_workers, limit_batches, criterion):
        pred = probability.argmax(1).numpy()                                                # (P,)
        first, area = dataset.faces_of_file(index)
        faces.append((pred[first], dataset.labels[index][first], area))
        predictions[index] = pred
        loss += loss_sum
        weight += loss_weight
        examples.append((index, dataset.files[index].stem, miou_of_labels(*faces[-1][:2], C)))
    # Counted all at once: a call per mesh would cost a tenth of the time of small meshes.
    by_count, by_area = ConfusionMatrix(C), ConfusionMatrix(C)
    if faces:
        pred, label, area = (torch.from_numpy(np.concatenate(values)) for values in zip(*faces, strict=True))
        by_count.update(pred, label)
        by_area.update(pred, label, area)
    matrix = by_count.all_reduce().matrix()
    area_matrix = by_area.all_reduce().matrix()
    return {"metrics": segmentation_metrics(matrix), "tables": {"by area": segmentation_metrics(area_matrix)},
            "loss": all_reduce_sum(loss) / max(all_reduce_sum(weight), 1e-12), "matrix": matrix,
            "examples": examples, "predictions": predictions, "seconds": time.monotonic() - started}


# -- files -------------------------------------------------------------------------------------------------------------

def label_mesh(model: DownstreamClassifier, path: str | Path, amp_dtype: torch.dtype | None = None) -> dict:
    """Label a mesh file: label and confidence (L,) for the face lines of the file, in its order (a polygon has one),
    and for drawing vertices (V, 3) as in the file, faces (P, 3) and their face_label (P,)."""
    device = next(model.parameters()).device
    mesh = read_mesh(path)
    dataset = open_meshes([path], None, model.spec, model.texture_samples, augmentation=model.augmentation,
                          views=model.config.evaluation.views, cache_dir=model.config.paths.cache_dir,
                          read=lambda _: mesh)
    for note in dataset.notes:
        print(note, flush=True)
    if model.texture_samples is not None and not dataset.num_colored:
        print(f"{path}: no face has a texture or a colour; labelled by geometry alone", flush=True)
    (_, probability, _, _), = mesh_probabilities(model, dataset, device, amp_dtype, batch_size=1)
    confidence, label = (values.numpy() for values in probability.max(1))
    first, _ = dataset.faces_of_file(0)
    return {"label": label[first], "confidence": confidence[first], "vertices": mesh.vertices, "faces": mesh.faces,
            "face_label": label}


def write_mesh_label(model: DownstreamClassifier, path: Path, prediction: dict, stem: Path, options) -> list[Path]:
    """Write what predict.py's options ask for as STEM.*, labels in the numbers of the training labels' files."""
    colors = {"": label_colors(prediction["face_label"], model.palette)}
    if options.pca:
        colors["_pca"] = pca_colors(embed_mesh(model, path))
    counts = np.bincount(prediction["face_label"], minlength=len(model.class_names))
    legend = [(name, color, count) for name, color, count in zip(model.class_names, model.palette, counts, strict=True)
              if count]
    in_files = {name: values_in_files(model.config, prediction[name]) for name in ("label", "face_label")}
    return write_mesh_result(stem, {**prediction, **in_files}, colors, options.labels, options.picture, options.html,
                             legend, drawn_up(model))


def drawn_up(model: DownstreamClassifier) -> str:
    """What `up` of render_mesh is for meshes as the network reads them."""
    return "auto" if model.spec.up == "auto" and not getattr(model.spec, "unit", None) else "z"


def mesh_pictures(model: DownstreamClassifier, dataset: MeshDataset, index: int, pred: np.ndarray):
    """Two pictures for the report: the truth (None without labels) and the prediction (P,) of one mesh."""
    mesh = dataset.mesh(index)
    label = dataset.labels[index]
    truth, drawn = (render_mesh(mesh.vertices, mesh.faces, label_colors(values, model.palette), up=drawn_up(model))
                    for values in (label, pred))
    return (truth if (label >= 0).any() else None), drawn


# -- embeddings --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def embed_mesh(model: DownstreamClassifier, path: str | Path) -> np.ndarray:
    """The encoder's embedding (P, E) float32 of every face of a mesh file, in file order."""
    device = next(model.parameters()).device
    dataset = open_meshes([path], None, model.spec, model.texture_samples, views=1,
                          cache_dir=model.config.paths.cache_dir)
    out = np.zeros((dataset.num_faces[0], model.encoder.embed_dim), np.float32)
    for item in range(len(dataset)):
        batch = to_device(dataset.collate_fn([dataset[item]]), device)
        embedding = model.embed(batch["features"], batch["mask"], batch["centroid"], **texture_of(batch))
        mask = batch["mask"]
        out[batch["face_index"][mask].cpu().numpy()] = embedding[mask].float().cpu().numpy()
    return out


def cache_embeddings(model: DownstreamClassifier, datasets: Sequence[MeshDataset], device: torch.device,
                     amp_dtype: torch.dtype | None) -> tuple[list[CachedFeatures], str]:
    """The data sets with the embeddings of the frozen encoder in place of their features, and a line for the log.
    ValueError where the encoder is not frozen."""
    if not model.encoder_is_frozen:
        raise ValueError("training.cache_features needs a frozen encoder without texture: set "
                         "training.num_unfrozen_encoder_layers=0 and give a --pretrained_path")
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in model.encoder.state_dict().values())
    heads = 0 if isinstance(model, SurfaceClassifier) else model.encoder.blocks[0].local_layer.attn.num_heads
    key = hashlib.sha256(weights + f"{heads} {device.type} {amp_dtype}".encode()).hexdigest()

    def embed(batch: dict) -> Tensor:
        with autocast(device, amp_dtype):                   # as in training: the embeddings are the same to the bit
            return model.embed(*(batch[name].to(device) for name in ("features", "mask", "centroid")))

    started = time.monotonic()
    with main_first():
        cached = [CachedFeatures(dataset, embed, key, model.config.paths.cache_dir) for dataset in datasets]
    how = "read" if cached[0].was_stored else "embedded"
    return cached, (f"cached features: {sum(map(len, cached))} items {how} in {time.monotonic() - started:.1f} s; the "
                    f"encoder does not run again")
