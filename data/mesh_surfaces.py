"""Labelled meshes for networks on the vertices of a surface: operators, vertex features, one label a face.

Beside data/mesh.py, which cuts meshes into clusters of faces: here a mesh is always whole. Every entry of an item that
belongs to faces has the shape of one cluster, (1, F, ...), so that losses, metrics and caches of the two kinds of data
set are the same. V vertices, F faces, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from data.mesh import Augmentation, MeshDataset, MeshSpec, augment, cached_arrays, custom_collate_fn, rotation_about_z
from data.mesh_features import FeatureSpec, weld
from data.mesh_io import read_mesh
from data.mesh_operators import (
    NUM_EIGENPAIRS,
    OPERATORS_VERSION,
    MeshOperators,
    mesh_operators,
    plain_signature,
    rotation_from_uniforms,
)
from data.mesh_texture import MeshTextureDataset
from utils.log import progress
from utils.seed import derived_seed
from utils.surface_operators import Operators

BYTES_IN_MEMORY = 2 << 30           # operators beyond this are read again from the cache

# name -> width; the order here is the order of the columns
VERTEX_FEATURES = {
    "hks": 16,      # heat-kernel signature, plain (data/mesh_operators.plain_signature); intrinsic
    "xyz": 3,       # position in the unit ball; rotate in training
    "normal": 3,    # unit normal; rotate in training
}
WHOLE_MESH = MeshSpec(features=("centroid",), n_clusters=1)       # what data/mesh.py prepares: vertices, faces, areas


@dataclass(frozen=True)
class SurfaceSpec(FeatureSpec):
    """Which vertex features a network sees, and of how many eigenpairs. It travels in every checkpoint.

    Raises ValueError for features that are unknown, none or named twice, and for numbers that are not above 0.
    """

    features: tuple[str, ...] = ("hks",)
    num_eigenpairs: int = NUM_EIGENPAIRS
    hks_scale: float = 1.0                  # times the signature, 5 to 33 at its smallest time: 0.1 beside others

    known: ClassVar[Mapping[str, int]] = VERTEX_FEATURES
    where: ClassVar[str] = " for vertices"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_eigenpairs < 1 or not self.hks_scale > 0:
            raise ValueError(f"model.num_eigenpairs={self.num_eigenpairs}, model.hks_scale={self.hks_scale}: expected "
                             f"numbers above 0")


class Surface(NamedTuple):
    """One mesh as a network sees it: features (V, D), its operators, faces (F, 3) int64."""

    features: torch.Tensor
    operators: Operators
    faces: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Surface:
        return Surface(self.features.to(device, non_blocking=non_blocking), self.operators.to(device, non_blocking),
                       self.faces.to(device, non_blocking=non_blocking))


class Surfaces(list):
    """The meshes of a batch, of different size: a list of Surface that moves as a tensor does."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Surfaces:
        return Surfaces(surface.to(device, non_blocking) for surface in self)


def prepare_operators(path: str | Path, spec: SurfaceSpec, cache_dir: str | Path | None = None) -> MeshOperators:
    """The operators of a mesh file, its vertices welded; from the cache where file, settings and version are the same.

    Raises what read_mesh raises, and ValueError, with the path, where the mesh is too large or the solver fails.
    """
    def compute() -> dict[str, np.ndarray]:
        mesh = read_mesh(path)
        try:
            operators = mesh_operators(*weld(spec.z_up(mesh.vertices, path), mesh.faces), spec.num_eigenpairs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return {**operators._asdict(), "note": np.array(operators.note)}

    arrays = cached_arrays(path, ["operators", OPERATORS_VERSION, spec.num_eigenpairs, spec.up],
                           MeshOperators._fields, cache_dir, compute)
    return MeshOperators(**{**arrays, "note": str(arrays["note"])})


def vertex_features(operators: MeshOperators, spec: SurfaceSpec) -> np.ndarray:
    """The columns of spec.features, in the order of VERTEX_FEATURES: (V, D) float32."""
    columns = []
    if "hks" in spec.features:
        columns.append(spec.hks_scale * plain_signature(operators.eigenvalues, operators.eigenvectors))
    if "xyz" in spec.features:
        columns.append(operators.vertices)
    if "normal" in spec.features:
        columns.append(operators.normals)
    return np.concatenate(columns, axis=1, dtype=np.float32)


def turned(operators: MeshOperators, turn: np.ndarray) -> MeshOperators:
    """The operators of the mesh whose vertices are `vertices @ turn`, turn (3, 3) orthogonal: exact, without a solve.

    A reflection, with the winding of the faces turned round as data.mesh.augment does it, changes the sign of the
    tangent planes' second axis. The axes themselves may differ from those that mesh_operators would choose; no
    network output does.
    """
    mirrored = np.linalg.det(turn) < 0
    return operators._replace(vertices=(operators.vertices @ turn).astype(np.float32),
                              normals=(operators.normals @ turn).astype(np.float32),
                              gradient_y=-operators.gradient_y if mirrored else operators.gradient_y)


def resized(operators: MeshOperators, factor: float) -> MeshOperators:
    """The operators of the mesh whose vertices are `vertices * factor`, factor above 0: without a solve, exact but for
    the constants that mesh_operators adds to areas and gradients."""
    factor = np.float32(factor)
    return operators._replace(vertices=operators.vertices * factor, mass=operators.mass * factor**2,
                              eigenvalues=operators.eigenvalues / factor**2,
                              eigenvectors=operators.eigenvectors / factor,
                              gradient_x=operators.gradient_x / factor, gradient_y=operators.gradient_y / factor)


@dataclass
class SurfaceDataset(MeshDataset):
    """Whole meshes with one label a face, as vertex features and operators. Arguments of MeshDataset; spec is a
    SurfaceSpec.

    Rotations (mode, rotation_range) and mirroring turn the features and keep the cached operators, which they do not
    change; size_range scales both, by a factor whose logarithm is uniform, because figures fill the unit ball
    differently and signatures know absolute lengths. scale_range, deformation and noise_std change the surface, so
    operators are computed again for every item (0.1 s for 750 vertices). The other augmentations are those of clusters:
    ValueError. `notes` has a line for every mesh that is unusual (stray parts, fewer eigenpairs).
    """

    def __post_init__(self) -> None:
        self.surface_spec: SurfaceSpec = self.spec
        self.spec = replace(WHOLE_MESH, up=self.spec.up)
        super().__post_init__()
        self._operators: dict[int, MeshOperators] = {}
        kept = 0
        for index, path in enumerate(progress(self.files, f"operators of {self.description}")):
            operators = prepare_operators(path, self.surface_spec, self.cache_dir)
            if operators.note:
                self.notes.append(f"{path}: {operators.note}")
            kept += sum(value.nbytes for value in operators[:-1])
            if kept <= BYTES_IN_MEMORY or self.cache_dir is None:
                self._operators[index] = operators

    def _check_augmentation(self):
        for name in ("hks_noise", "recluster", "cluster_dropout"):
            if getattr(self.augmentation, name):
                raise ValueError(f"augmentation.{name} is for networks on clusters of faces; leave it out with "
                                 f"model.encoder: diffusion_net")

    @property
    def input_key(self) -> str:
        return f"operators {OPERATORS_VERSION}, {self.surface_spec.num_eigenpairs} eigenpairs"

    def operators(self, index: int) -> MeshOperators:
        """The operators of files[index], as the file has it."""
        if index not in self._operators:
            return prepare_operators(self.files[index], self.surface_spec, self.cache_dir)
        return self._operators[index]

    def __getitem__(self, item: int) -> dict:
        """features (V, D) float32, operators (utils.surface_operators.Operators), faces (F, 3) int64; and as in
        MeshDataset, with one cluster that holds the faces in file order: label, mask, face_index (1, F), centroid
        (1, F, 3) and area (1, F; before augmentation), index."""
        index, view, _ = self.items[item]
        mesh, operators = self.mesh(index), self.operators(index)
        if self.views:
            rng = np.random.default_rng(derived_seed(view))
            turned_only = Augmentation(self.augmentation.mode, self.augmentation.rotation_range)
            settings = turned_only if view else Augmentation()
        else:
            rng = np.random.default_rng(derived_seed(self.seed, self.epoch, item))
            settings = self.augmentation
        shape_only = replace(settings, mode="none", flip_probability=0.0, color_jitter=0.0, size_range=(1.0, 1.0))
        if shape_only.active:
            mesh = augment(mesh, shape_only, None, rng)
            operators = mesh_operators(mesh.vertices, mesh.faces, self.surface_spec.num_eigenpairs)
        turn = np.diag((-1.0, 1.0, 1.0)) if rng.random() < settings.flip_probability else np.eye(3)
        if settings.mode == "so3":
            turn = turn @ rotation_from_uniforms(rng.random(3))
        elif settings.mode == "z":
            turn = turn @ rotation_about_z(rng.uniform(*settings.rotation_range)).T
        if not np.array_equal(turn, np.eye(3)):
            operators = turned(operators, turn)
        if tuple(settings.size_range) != (1.0, 1.0):
            operators = resized(operators, np.exp(rng.uniform(*np.log(settings.size_range))))
        F = len(mesh.faces)
        polygons = {name: torch.from_numpy(value)[None] for name, value in self._polygons(mesh).items()}
        return {**polygons, "features": torch.from_numpy(vertex_features(operators, self.surface_spec)),
                "operators": Operators(*(torch.from_numpy(getattr(operators, name)) for name in Operators._fields)),
                "faces": torch.from_numpy(mesh.faces), "label": torch.from_numpy(self.labels[index])[None],
                "mask": torch.ones(1, F, dtype=torch.bool), "face_index": torch.arange(F)[None],
                "centroid": torch.from_numpy(operators.vertices[mesh.faces].mean(1))[None],
                "area": torch.from_numpy(mesh.area)[None], "index": index}

    @staticmethod
    def collate_fn(batch: Sequence[dict]) -> dict:
        """What custom_collate_fn makes of the entries that belong to faces, and features: Surfaces of the meshes. Items
        of CachedFeatures have an embedding instead."""
        if "embedding" in batch[0]:
            return custom_collate_fn(batch)
        own = ("features", "operators", "faces")
        faces = [{name: value for name, value in item.items() if name not in own} for item in batch]
        surfaces = Surfaces(Surface(*(item[name] for name in own)) for item in batch)
        return {**custom_collate_fn(faces), "features": surfaces}


class SurfaceTextureDataset(MeshTextureDataset, SurfaceDataset):
    """SurfaceDataset whose items also hold texture_sequences (1, F, T, 3) and texture_masks (1, F, T), as
    MeshTextureDataset's."""


def open_meshes(files: Sequence[Path], label_dir: str | Path | None, spec: MeshSpec | SurfaceSpec,
                texture_samples: int | None = None, **options) -> MeshDataset:
    """The data set of the kind that `spec` asks for, with so many texture samples a face; options: further ones of
    MeshDataset."""
    surfaces = isinstance(spec, SurfaceSpec)
    if texture_samples is None:
        return (SurfaceDataset if surfaces else MeshDataset)(files, label_dir, spec, **options)
    kind = SurfaceTextureDataset if surfaces else MeshTextureDataset
    return kind(files, label_dir, spec, texture_samples=texture_samples, **options)
