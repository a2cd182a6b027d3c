"""Which clusters of a mesh I-JEPA's context encoder sees and which it has to predict: mask sampler and data set.

N clusters of a mesh, M target blocks. A block is a cluster and its nearest neighbours: one region of the surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data.mesh import MeshDataset, custom_collate_fn
from utils.seed import derived_seed

TRIES = 20              # draws before the complement of the targets becomes the context
MASK_STREAM = 1         # keeps the masks' random numbers apart from the augmentation's, which use (seed, epoch, item)


@dataclass(frozen=True)
class MaskSpec:
    """How masks are drawn; the defaults are I-JEPA's (Assran et al. 2023, section 4)."""

    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.20)        # share of the clusters in one target block
    context_scale: tuple[float, float] = (0.85, 1.0)        # share of them in the context, before the targets go
    whole_share: float = 0.0                                # of the meshes: they are shown whole, and have no targets

    def __post_init__(self) -> None:
        if self.num_targets < 1:
            raise ValueError(f"masking.num_mask_blocks={self.num_targets}: at least one block has to be predicted")
        for name, (low, high) in (("target_scale", self.target_scale), ("context_scale", self.context_scale)):
            if not 0 < low <= high <= 1:
                raise ValueError(f"masking.{name}={[low, high]}: expected two shares, 0 < low <= high <= 1")
        if not 0 <= self.whole_share <= 1:
            raise ValueError(f"masking.whole_share={self.whole_share}: expected a share from 0 to 1")


def sample_masks(center: np.ndarray, spec: MaskSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw context and target blocks of one mesh: center (N, 3) -> visible (N,) bool, target (M, N) bool, disjoint.

    Each target block is the nearest 15-20 % of the clusters to a random one, the context the nearest 85-100 % to
    another, less all targets; where that leaves fewer than max(4, 10 %) clusters, everything is drawn again, and after
    20 tries the context is whatever is no target. A mesh of few clusters may then have empty blocks (all False), never
    an empty context: blocks that would hide the last visible cluster are given up. The first block is never empty.
    Deviations from I-JEPA: regions on a surface for rectangles in a grid; sizes are drawn per block, not once a batch.
    Raises ValueError for fewer than two clusters.
    """
    N = len(center)
    if N < 2:
        raise ValueError(f"{N} cluster in a mesh: nothing is left to predict from. Lower model.faces_per_cluster, so "
                         f"that every mesh has two or more")
    distance = ((center[:, None] - center[None]) ** 2).sum(-1) if N <= 512 else None         # (N, N)

    def nearest(count: int) -> np.ndarray:
        seed = int(rng.integers(N))
        row = distance[seed] if distance is not None else ((center - center[seed]) ** 2).sum(-1)
        mask = np.zeros(N, bool)
        mask[np.argsort(row, kind="stable")[:count]] = True
        return mask

    enough = max(4, int(np.ceil(0.1 * N)))
    for _ in range(TRIES):
        target = np.stack([nearest(_count(N, spec.target_scale, rng, N - 1)) for _ in range(spec.num_targets)])
        visible = nearest(_count(N, spec.context_scale, rng, N)) & ~target.any(0)
        if visible.sum() >= enough:
            return visible, target
    hidden = np.zeros(N, bool)
    for block in target:
        if (hidden | block).all():
            block[:] = False
        hidden |= block
    return ~hidden, target


def _count(N, scale, rng, most):
    """A whole number of clusters within the two shares of N, or the one nearest to a share where none is."""
    low, high = int(np.ceil(scale[0] * N - 1e-9)), int(np.floor(scale[1] * N + 1e-9))
    count = rng.integers(low, high + 1) if low <= high else round(rng.uniform(*scale) * N)
    return int(np.clip(count, 1, most))


class MaskedMeshes(Dataset):
    """A mesh data set whose items also have visible (N,) and target (M, N), bool.

    Masks depend on (seed, epoch, item) alone; where `dataset` is an evaluation set (views >= 1), on (seed, item).
    Raises ValueError, naming the first such file, where a mesh has a single cluster.
    """

    def __init__(self, dataset: MeshDataset, spec: MaskSpec, seed: int) -> None:
        self.dataset = dataset
        self.spec = spec
        self.seed = seed
        self.epoch = 0
        size = min(dataset.spec.clusters_per_batch or 2, dataset.spec.n_clusters or 2)
        for path, faces in zip(dataset.files, dataset.num_faces, strict=True):
            if size < 2 or faces <= (1 if dataset.spec.n_clusters else dataset.spec.faces_per_cluster):
                raise ValueError(f"{path}: its {faces} faces make one cluster, and nothing is left to predict from. "
                                 f"Lower model.faces_per_cluster, raise clusters_per_batch, or take the file out")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int) -> dict:
        sample = self.dataset[item]
        mask, centroid = sample["mask"].numpy(), sample["centroid"].numpy()
        center = centroid.sum(1) / mask.sum(1, keepdims=True).clip(min=1)                     # (N, 3)
        visible = np.ones(1, bool)
        target = np.zeros((self.spec.num_targets, 1), bool)
        if len(center) > 1:                                 # one cluster: the last part of a mesh, all context
            epoch = 0 if self.dataset.views else self.epoch
            rng = np.random.default_rng(derived_seed(self.seed, epoch, item, MASK_STREAM))
            visible, target = sample_masks(center, self.spec, rng)
            if rng.random() < self.spec.whole_share:
                visible[:] = True
                target[:] = False
        return {**sample, "visible": torch.from_numpy(visible), "target": torch.from_numpy(target)}


def masked_collate_fn(batch: Sequence[dict]) -> dict:
    """custom_collate_fn, and visible [B,N], target [B,M,N]; padded clusters are in neither."""
    out = custom_collate_fn([{name: value for name, value in sample.items() if name not in ("visible", "target")}
                             for sample in batch])
    B, N = out["mask"].shape[:2]
    out["visible"] = torch.zeros(B, N, dtype=torch.bool)
    out["target"] = torch.zeros(B, len(batch[0]["target"]), N, dtype=torch.bool)
    for b, sample in enumerate(batch):
        out["visible"][b, :len(sample["visible"])] = sample["visible"]
        out["target"][b, :, :sample["target"].shape[1]] = sample["target"]
    return out
