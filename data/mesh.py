"""Labelled meshes as batches of clustered faces: preparing, caching, augmenting, collating.

One mesh file goes this way:
    read_mesh (faces in file order) -> weld, normalise, neighbours, heat-kernel signature: `prepare_mesh`, with a cache
    -> augment the vertices (training) -> face_features -> clusters: `MeshDataset.__getitem__`
    -> pad to the longest: `custom_collate_fn`; `face_index` says which face of the file every slot holds.
Shapes: B meshes, N clusters, F face slots of a cluster, Dg features of a face.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.label_map import LabelMap
from data.mesh_clusters import connected_clusters, recursive_bisection
from data.mesh_features import face_features, normalize_vertices
from data.mesh_io import Mesh, find_label_file, read_labels, read_mesh
from data.mesh_planes import shares
from data.mesh_prepare import MeshSpec, PreparedMesh, cached_arrays, prepare_mesh
from utils.array_file import checksum, load_checked, new_array, write_checks
from utils.checks import check_range
from utils.files import remove_leftovers_once, replacing
from utils.fingerprint import digest, fingerprint
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.seed import derived_seed

LABEL_VERSION = 3                   # raise it when read_labels gives something else
STATISTICS_ITEMS = 200              # items that feature_statistics looks at
UNITS_A_MESH = 100                  # square root of the area in model.unit; more, or less than 1 / 100, is a doubt
MOST_CLUSTERS = 1 << 14             # in one attention, whose time grows with their square
FACES_IN_MEMORY = 20_000_000        # prepared meshes beyond this are read again from the cache
PADDING = {"features": 0.0, "embedding": 0.0, "centroid": 0.0, "area": 0.0, "label": IGNORE_INDEX, "mask": False,
           "face_index": -1, "polygon": -1, "share": 0.0, "descriptors": 0.0, "texture_sequences": 0.0,
           "texture_masks": False}


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the vertices, before any feature is computed. The defaults leave the mesh as it is.

    Raises ValueError for amounts that are negative, shares above 1 and ranges that are not (lowest, highest).
    """

    mode: str = "none"                                      # rotation: none | z (about the up axis) | so3 (any)
    rotation_range: tuple[float, float] = (-180.0, 180.0)   # degrees, mode z
    scale_range: tuple[float, float] = (1.0, 1.0)           # factor per axis, before the rotation
    deformation: float = 0.0                                # smooth: amplitude of 4 random sine waves, in length units
    noise_std: float = 0.0                                  # vertex jitter in mean edge lengths
    hks_noise: float = 0.0                                  # of the log signature: an offset, and half as much per time
    flip_probability: float = 0.0                           # mirror, with the winding turned round
    recluster: bool = False                                 # other cluster borders every time
    cluster_dropout: float = 0.0                            # hide up to this share of the clusters (labels too)
    color_jitter: float = 0.0                               # of the texture: each channel of a mesh times 1 +- this
    size_range: tuple[float, float] = (1.0, 1.0)            # DiffusionNet: factor of the whole mesh in its unit ball

    def __post_init__(self) -> None:
        for name in ("rotation_range", "scale_range", "size_range"):
            ends = getattr(self, name)
            factors = name != "rotation_range"
            if len(ends) != 2 or ends[0] > ends[1] or (factors and ends[0] <= 0):
                both = ", both above 0" if factors else ""
                raise ValueError(f"augmentation.{name}={list(ends)}: expected [lowest, highest]{both}")
        for name in ("deformation", "noise_std", "hks_noise", "flip_probability", "cluster_dropout",
                     "color_jitter"):
            most = 1 if name in ("flip_probability", "cluster_dropout", "color_jitter") else math.inf
            check_range(f"augmentation.{name}", getattr(self, name), 0, most)

    @property
    def active(self) -> bool:
        return self != Augmentation()


# -- parts of a data set ----------------------------------------------------------------------------------------------

def hold_out(files: Sequence[Path], patterns: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(the other files, those whose name without suffix matches one of the patterns). Raises ValueError for a pattern
    that matches none: it is misspelt, or the file is gone."""
    for pattern in patterns:
        if not _matching(files, [pattern]):
            raise ValueError(f"data.test_split: {pattern!r} matches none of the {len(files)} meshes, as "
                             f"{files[0].stem!r}")
    held = _matching(files, patterns)
    return [file for file in files if file not in held], held


def _matching(files, patterns):
    """Patterns with a / are compared with as many folders as they have, as scene_01/*."""
    def name(file, pattern):
        return "/".join([*file.parent.parts, file.stem][-pattern.count("/") - 1:])

    return [file for file in files
            if any(fnmatch.fnmatchcase(name(file, pattern), pattern) for pattern in map(str, patterns))]


def split_meshes(files: Sequence[Path], val_split: Sequence[str | float] | float) -> tuple[list[Path], list[Path]]:
    """(training, validation) files. val_split: patterns of names without suffix ("faust_08*"), or one number, a share:
    0.15 (or [0.15]) takes every seventh file. Raises ValueError where either part would be empty."""
    val_split = [val_split] if isinstance(val_split, float) else val_split
    if len(val_split) == 1 and isinstance(val_split[0], float) and 0 < val_split[0] < 1:
        every = max(2, round(1 / val_split[0]))
        val = list(files[every - 1::every])
    else:
        val = _matching(files, val_split)
    train = [file for file in files if file not in val]
    if not val or not train:
        raise ValueError(f"data.val_split={list(val_split)} leaves {len(train)} training and {len(val)} validation "
                         f"meshes of {len(files)}; set it to name patterns or a share such as 0.15, or set "
                         f"paths.val_mesh_dir")
    return train, val


def repeated(files: Sequence[Path], patterns: Sequence[str], times: int) -> list[Path]:
    """The files, and once more (times - 1) times those whose name without suffix matches one of the patterns: sources
    with few meshes among sequences of many alike. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not _matching(files, [pattern]):
            raise ValueError(f"data.repeat: {pattern!r} matches none of the {len(files)} training meshes, as "
                             f"{files[0].stem!r}")
    return [*files, *(times - 1) * _matching(files, patterns)]


# -- augmentation ------------------------------------------------------------------------------------------------------

def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) rotation, uniform over SO(3), from a normal quaternion."""
    w, x, y, z = (quaternion := rng.normal(size=4)) / np.linalg.norm(quaternion)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                     [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                     [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])


def rotation_about_z(degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1.0]])


def augment(mesh: PreparedMesh, settings: Augmentation, unit: float | None, rng: np.random.Generator) -> PreparedMesh:
    """A randomly scaled, mirrored, jittered and rotated copy. The heat-kernel signature is kept: it is exact under
    rotation and mirroring, and taken as a good approximation under the small other changes."""
    vertices, faces, neighbors = mesh.vertices.astype(np.float64), mesh.faces, mesh.neighbors
    vertices = vertices * rng.uniform(*settings.scale_range, size=3)
    if settings.deformation:
        wave, phase = rng.normal(size=(4, 3)) * 2, rng.uniform(0, 2 * np.pi, size=4)
        vertices = vertices + np.sin(vertices @ wave.T + phase) @ (rng.normal(size=(4, 3)) * settings.deformation)
    if rng.random() < settings.flip_probability:
        vertices = vertices * (-1, 1, 1)
        faces = faces[:, ::-1]                              # corners 2, 1, 0: edges 2-1, 1-0, 0-2 are the old 1, 0, 2
        neighbors = None if neighbors is None else neighbors[:, [1, 0, 2]]
    if settings.noise_std:
        edge = np.linalg.norm(vertices[faces[:, 0]] - vertices[faces[:, 1]], axis=1).mean()
        vertices = vertices + rng.normal(size=vertices.shape) * settings.noise_std * edge
    if settings.mode == "so3":
        vertices = vertices @ random_rotation(rng).T
    elif settings.mode == "z":
        vertices = vertices @ rotation_about_z(rng.uniform(*settings.rotation_range)).T
    vertices = normalize_vertices(vertices, faces, None) if unit is None else vertices
    hks = mesh.hks
    if settings.hks_noise and hks is not None:
        offset = rng.normal() + 0.5 * rng.normal(size=hks.shape[1])
        hks = hks + (settings.hks_noise * offset).astype(np.float32)
    return mesh._replace(vertices=vertices.astype(np.float32), faces=faces, neighbors=neighbors, hks=hks)


# -- data set ----------------------------------------------------------------------------------------------------------

@dataclass
class MeshDataset(Dataset):
    """Meshes with one label a face.

    files: mesh files in a fixed order; label_dir: where find_label_file looks, None = no labels (all IGNORE_INDEX).
    Item of a training set (augmentation set, views 0): one mesh, or a crop of clusters_per_batch clusters; a mesh of
    N clusters gives max(1, N // clusters_per_batch) items an epoch, or with every_part its parts, as below. Item of
    an evaluation set (views >= 1): one (mesh, view, part), in order; view 0 is the mesh as it is, others are turned
    as the augmentation's mode and rotation_range say and clustered anew, always the same way; the parts of a view
    hold every face exactly once.
    Randomness depends on (seed, epoch, item) alone: not on workers, batch size or what ran before.
    All files are read, checked and cached at construction, so that wrong data is found before training. A file is
    parsed once, or not at all where the cache has its geometry and its labels. Raises what prepare_mesh and read_labels
    raise, and ValueError where label_dir has no label but IGNORE_INDEX. `notes` has a line for every mesh that is odd.
    """

    files: Sequence[Path]
    label_dir: str | Path | None
    spec: MeshSpec
    num_classes: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    views: int = 0
    label_offset: int = 0
    ignore_labels: Sequence[int] = ()
    label_kind: str = "auto"
    label_field: str | None = None          # this and the next two: see read_labels
    label_names: Sequence[str] = ()
    label_map: LabelMap | None = None
    root: str | Path | None = None          # label_dir has the folders that the files are in, below this one
    cache_dir: str | Path | None = None
    seed: int = 0
    description: str = "preparing meshes"
    descriptors: bool = False               # items also have `descriptors` (N, F, 64), the targets of pre-training
    every_part: bool = False                # views 0: no random crops, but parts that hold every face exactly once
    read: Callable[[Path], Mesh] = read_mesh            # parses a file; predict hands over the mesh it has parsed

    def __post_init__(self) -> None:
        self._check_augmentation()
        self.epoch = 0
        self.files = [Path(file) for file in self.files]
        self.labels: list[np.ndarray] = []
        self._prepared: dict[int, PreparedMesh] = {}
        self._last_view: tuple = (None, None)
        kept = 0
        self.num_faces: list[int] = []                      # triangles
        self.num_polygons: list[int] = []                   # faces of the file
        self.notes: list[str] = []
        read = lru_cache(1)(self.read)                      # geometry and labels share one parse of a file
        for index, path in enumerate(progress(self.files, self.description)):
            mesh = prepare_mesh(path, self.spec, self.cache_dir, self.descriptors, read)
            self.labels.append(self._read_labels(path, len(mesh.faces), read))
            self.num_faces.append(len(mesh.faces))
            self.num_polygons.append(len(mesh.faces) if mesh.polygon is None else int(mesh.polygon[-1]) + 1)
            self._check_clusters(path, self._num_clusters(len(mesh.faces)))
            self._note_sizes(path, mesh)
            kept += len(mesh.faces)
            if kept <= FACES_IN_MEMORY or self.cache_dir is None:
                self._prepared[index] = mesh
        if self.label_dir is not None and not any((label != IGNORE_INDEX).any() for label in self.labels):
            raise ValueError(f"{self.files[0]}: not one face of {len(self.files)} meshes is labelled; check "
                             f"data.ignore_labels and the label files")
        self.items = []                                     # (mesh, view, part)
        for index, count in enumerate(self.num_faces):
            clusters = self._num_clusters(count)
            if self.views or self.every_part:
                parts = -(-clusters // self.limit)
            else:
                parts = max(1, clusters // self.limit)
            self.items += [(index, view, part) for view in range(max(1, self.views)) for part in range(parts)]

    def _check_augmentation(self):
        if tuple(self.augmentation.size_range) != (1.0, 1.0):
            raise ValueError("augmentation.size_range is for model.encoder: diffusion_net; clusters of faces have "
                             "augmentation.scale_range")

    @property
    def limit(self) -> int:
        """The most clusters of an item."""
        return self.spec.clusters_per_batch or MOST_CLUSTERS

    def _check_clusters(self, path, clusters):
        if clusters <= MOST_CLUSTERS or self.spec.clusters_per_batch:
            return
        what = f"{path}: {clusters:,} clusters, and the network compares all with all"
        if not (self.views or self.every_part):
            raise ValueError(f"{what}; set training.clusters_per_batch, to 4096 for example, or raise "
                             f"model.faces_per_cluster")
        self.notes.append(f"{what}: taken in parts of {MOST_CLUSTERS:,} (training.clusters_per_batch)")

    def _note_sizes(self, path, mesh):
        if mesh.note:
            self.notes.append(f"{path}: {mesh.note}")
        if self.spec.unit and not 1 / UNITS_A_MESH <= (width := float(np.sqrt(mesh.area.sum()))) <= UNITS_A_MESH:
            self.notes.append(f"{path}: as large as a square of side {width:.2g} model.unit; is it in another unit "
                              f"than the training meshes (millimetres, metres)? Scale it")

    def _read_labels(self, path, num_faces, read):
        if self.label_dir is None:
            return np.full(num_faces, IGNORE_INDEX, np.int64)
        folder = Path(self.label_dir)
        if self.root is not None:
            folder = folder / path.parent.relative_to(self.root)
        file = find_label_file(path, folder, self.label_kind, self.label_field)
        settings = [self.num_classes, self.label_offset, list(self.ignore_labels), self.label_kind, self.label_field,
                    list(self.label_names)]
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        key = ["labels", LABEL_VERSION, file.suffix.lower(), content, *settings,
               self.label_map and self.label_map.text()]
        return cached_arrays(path, key, ("label",), self.cache_dir,
                             lambda: {"label": read_labels(file, read(path), *settings, self.label_map)})["label"]

    def _num_clusters(self, num_faces):
        if self.spec.n_clusters:
            return min(num_faces, self.spec.n_clusters)
        return -(-num_faces // self.spec.faces_per_cluster)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch; evaluation sets ignore it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def mesh(self, index: int) -> PreparedMesh:
        """The prepared mesh of files[index]."""
        if index not in self._prepared:
            return prepare_mesh(self.files[index], self.spec, self.cache_dir, self.descriptors, self.read)
        return self._prepared[index]

    def faces_of_file(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One triangle of each face of files[index], (P,) int64, and the whole area of that face (P,)."""
        mesh = self.mesh(index)
        if mesh.polygon is None:
            return np.arange(len(mesh.faces)), mesh.area
        return np.flatnonzero(np.diff(mesh.polygon, prepend=-1)), np.bincount(mesh.polygon, mesh.area)

    def _polygons(self, mesh):
        """{} where all faces of all files are triangles, else polygon (F,) and share (F,) of a mesh's triangles."""
        if self.num_faces == self.num_polygons:
            return {}
        polygon = np.arange(len(mesh.faces)) if mesh.polygon is None else mesh.polygon
        return {"polygon": polygon, "share": shares(polygon, mesh.area)}

    @property
    def input_key(self) -> str:
        """What a network sees of an item besides its features, centroid and face_index: see CachedFeatures."""
        return ""

    def fingerprint(self) -> dict:
        """Names, sizes in bytes and digests of the labels of the files, see utils.fingerprint."""
        sizes = [path.stat().st_size for path in self.files]
        return fingerprint(self.files, sizes, [digest(label) for label in self.labels])

    @staticmethod
    def collate_fn(batch: Sequence[dict]) -> dict:
        """A batch of items of this kind of data set."""
        return custom_collate_fn(batch)

    def __getitem__(self, item: int) -> dict:
        """features (N, F, Dg) float32, label (N, F) int64, mask (N, F) bool, face_index (N, F) int64 (-1 = padding),
        centroid (N, F, 3) and area (N, F; of the mesh before augmentation) float32, index of the mesh in `files`; with
        `descriptors` these as well (N, F, 64; of the mesh before augmentation). Where a file of the data set has
        polygons, polygon (N, F) int64, the face of the file that a triangle is of, and share (N, F) float32, which part
        of its area (-1 and 0 = padding)."""
        index, view, part = self.items[item]
        augmentation = self.augmentation
        recluster = augmentation.recluster
        drawn = (self.seed, self.epoch, index if self.every_part else item)
        if self.views:
            turn = (augmentation.mode, augmentation.rotation_range) if view else ()
            augmentation = Augmentation(*turn)
            recluster = view > 0
            drawn = (view,)
        rng = np.random.default_rng(derived_seed(*drawn))
        if not (self.views or self.every_part):
            face_index, values = self._tokens(index, augmentation, recluster, rng)
        else:
            if self._last_view[0] != (index, *drawn):        # the parts of a view follow one another
                self._last_view = (index, *drawn), self._tokens(index, augmentation, recluster, rng)
            face_index, values = self._last_view[1]
        face_index = self._part(face_index, values["centroid"], part, rng)
        if not self.views and self.augmentation.cluster_dropout:
            keep = rng.random(len(face_index)) >= rng.uniform(0, self.augmentation.cluster_dropout)
            face_index = face_index[keep if keep.any() else slice(1)]
        mask = face_index >= 0
        gather = torch.from_numpy(np.where(mask, face_index, 0))                 # (N, F)
        mask = torch.from_numpy(mask)

        def pick(name):
            chosen = torch.from_numpy(values[name])[gather]                      # (N, F, ...)
            return torch.where(mask.view(mask.shape + (1,) * (chosen.ndim - 2)), chosen, PADDING[name])

        return {**{name: pick(name) for name in values}, "mask": mask,
                "face_index": torch.from_numpy(face_index), "index": index}

    def _tokens(self, index, augmentation, recluster, rng):
        """face_index (N, F) of a mesh, and for all its faces in file order features, label, centroid and area."""
        mesh = self.mesh(index)
        if augmentation.active:
            mesh = augment(mesh, augmentation, self.spec.unit, rng)
        centroid = mesh.vertices.take(mesh.faces, 0).mean(1)                     # (F, 3)
        face_index = self._clusters(centroid, mesh.neighbors, rng if recluster else None)
        features = face_features(mesh.vertices, mesh.faces, self.spec.features, mesh.neighbors, mesh.hks, mesh.plane)
        values = {"features": features, "label": self.labels[index], "centroid": centroid, "area": mesh.area,
                  **self._polygons(mesh)}
        return face_index, values if mesh.descriptors is None else {**values, "descriptors": mesh.descriptors}

    def _clusters(self, centroid, neighbors, rng):
        size = self.spec.faces_per_cluster
        count = self._num_clusters(len(centroid))
        if self.spec.clustering != "bisection":
            farthest = self.spec.clustering == "fps"
            return connected_clusters(centroid, neighbors, size, rng, count, farthest_points=farthest)
        return recursive_bisection(centroid, size, rng, count)

    def _part(self, face_index, centroid, part, rng):
        limit = self.limit
        if len(face_index) <= limit:
            return face_index
        if self.views or self.every_part:
            return face_index[part * limit:(part + 1) * limit]                   # neighbours are consecutive
        center = np.stack([centroid[row[row >= 0]].mean(0) for row in face_index])
        nearest = ((center - center[rng.integers(len(center))]) ** 2).sum(1).argsort(kind="stable")[:limit]
        return face_index[np.sort(nearest)]


class CachedFeatures(Dataset):
    """A data set of fixed views with the embeddings of a frozen encoder in place of its features.

    embed maps one item's batch of one to (1, N, F, E). All items are embedded once, into a memory-mapped array; key
    names what they depend on besides the meshes (the encoder's weights), and with it the file in folder (None: kept in
    memory). Items: embedding (N, F, E), label, mask, face_index, index. Raises ValueError for a data set that changes
    from epoch to epoch.
    """

    def __init__(self, dataset: MeshDataset, embed: Callable[[dict], torch.Tensor], key: str,
                 folder: str | Path | None) -> None:
        if not dataset.views and (dataset.augmentation.active or dataset.spec.clusters_per_batch):
            raise ValueError("training.cache_features needs inputs that never change: switch the augmentation off and "
                             "leave training.clusters_per_batch empty, or train without the cache")
        self.dataset = dataset
        self._rest = []
        digest = hashlib.sha256((key + dataset.input_key).encode())
        for item in range(len(dataset)):
            sample = dataset[item]
            names = ("label", "mask", "face_index", "index", "polygon", "share")
            self._rest.append({name: sample[name] for name in names if name in sample})
            digest.update(str(sample["features"].shape).encode())
            for name in ("features", "centroid", "face_index"):
                digest.update(sample[name].numpy().tobytes())
        self._bounds = np.cumsum([0] + [rest["mask"].numel() for rest in self._rest])
        path = None if folder is None else Path(folder) / f"embedding_{digest.hexdigest()[:32]}.npy"
        self._embedding = self._load(path)
        self.was_stored = self._embedding is not None
        if not self.was_stored:
            self._embedding = self._compute(embed, path)

    def _load(self, path):
        if path is None:
            return None
        remove_leftovers_once(path.parent)
        stored = load_checked(path)                                              # None: absent or damaged
        return stored if stored is not None and len(stored) == self._bounds[-1] else None

    def _compute(self, embed, path):
        if path is None:
            return self._fill(embed, lambda shape: np.empty(shape, np.float32))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            out = self._fill(embed, lambda shape: new_array(file, np.float32, shape))
            out.flush()
            write_checks(file, [checksum(out)])
        return np.load(path, mmap_mode="r")

    def _fill(self, embed, allocate):
        out = None
        for item in progress(range(len(self)), "embedding"):
            batch = self.dataset.collate_fn([self.dataset[item]])
            embedding = embed(batch)[0].flatten(0, 1).float().cpu().numpy()      # (N F, E)
            if out is None:
                out = allocate((int(self._bounds[-1]), embedding.shape[1]))
            out[self._bounds[item]:self._bounds[item + 1]] = embedding
        return out

    def __getattr__(self, name: str):
        if name == "dataset":                                                    # not there while a worker unpickles
            raise AttributeError(name)
        return getattr(self.dataset, name)                                       # files, items, labels, mesh() ...

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, item: int) -> dict:
        rest = self._rest[item]
        flat = torch.from_numpy(self._embedding[self._bounds[item]:self._bounds[item + 1]].copy())
        return {"embedding": flat.view(*rest["mask"].shape, -1), **rest}


def custom_collate_fn(batch: Sequence[dict]) -> dict:
    """Pad the items to the longest: features [B,N,F,Dg], label [B,N,F] (padding IGNORE_INDEX), mask [B,N,F] (True = a
    face), face_index [B,N,F] (padding -1), centroid [B,N,F,3], area [B,N,F], index [B]; embedding [B,N,F,E] in place of
    features, centroid and area where it is cached."""
    N, slots = (max(item["mask"].shape[axis] for item in batch) for axis in (0, 1))
    out = {"index": torch.tensor([item["index"] for item in batch])}
    for name in batch[0].keys() - {"index"}:
        first = batch[0][name]
        out[name] = first.new_full((len(batch), N, slots, *first.shape[2:]), PADDING[name])
        for row, item in zip(out[name], batch, strict=True):
            row[:item[name].shape[0], :item[name].shape[1]] = item[name]
    return out


def each_face_once(values: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values (B, N, F, K) of the triangles of a batch: (P, K) of the faces of the files, for a polygon the mean by
    area of its triangles in the batch, and their labels (P,)."""
    mask = batch["mask"]
    values, label = values[mask], batch["label"][mask]
    if "polygon" not in batch:
        return values, label
    polygon, share = batch["polygon"], batch["share"][mask][:, None]
    own = torch.arange(len(mask), device=mask.device)[:, None, None] * (polygon.max() + 1) + polygon
    number = own[mask].unique(return_inverse=True)[1]
    weighted = torch.cat([values * share, share], 1)
    total = weighted.new_zeros(int(number.max()) + 1, weighted.shape[1]).index_add_(0, number, weighted)
    mean = total[:, :-1] / total[:, -1:].clamp(min=1e-12)
    return mean, label.new_zeros(len(mean)).index_copy_(0, number, label)


def feature_statistics(dataset: MeshDataset, name: str = "features") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (Dg,) of the features, or of another entry of the items, over the faces of up to
    200 evenly spaced items, as training sees them. A constant feature gets 1 for its deviation."""
    total = square = count = 0
    for item in range(0, len(dataset), max(1, -(-len(dataset) // STATISTICS_ITEMS))):
        sample = dataset[item]
        values = sample[name][sample["mask"]].double()                     # (faces, Dg)
        total, square, count = total + values.sum(0), square + (values**2).sum(0), count + len(values)
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()
