"""Prototypes that are real image patches: push (Chen et al. 2019, ProtoPNet), their boxes, and pruning.

As Sacha et al. 2023 (ProtoSeg) do it for segmentation: each prototype becomes the nearest feature vector, over whole
photographs at their own size, among the cells of its class; pruning looks at the nearest cells of any class. A table
is filled image by image, in any order, by one process or several. It lives on the CPU and is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.ppnet import PPNet
from utils.losses import IGNORE_INDEX
from utils.prototype_losses import resize_label
from utils.prototype_metrics import TOP_SHARE

MARGIN = 5                       # pixels around the active part of a patch


def cell_classes(label: Tensor, size: tuple[int, int], num_classes: int) -> Tensor:
    """label (H, W) int64 -> (C, h, w) bool: which classes have a pixel in the cell; it may be several, or none.

    Pixel (y, x) is in cell (int(y / (H / h)), int(x / (W / w))), as published, in double precision.
    """
    (H, W), (h, w) = label.shape, size
    row = (torch.arange(H, dtype=torch.float64) / (H / h)).int().to(label.device)              # on the CPU: MPS has
    column = (torch.arange(W, dtype=torch.float64) / (W / w)).int().to(label.device)           # no double precision
    place = label.int().clamp_(min=-1).mul_(h * w)                     # (H, W), those of ignored pixels below 0
    place += ((row + h) * w)[:, None]
    place += column
    return place.flatten().bincount(minlength=(num_classes + 1) * h * w).view(num_classes + 1, h, w)[1:] > 0


class PatchTable:
    """Tensors with a row per prototype, by name, on the CPU; what PushTable and NearestPatches have in common."""

    FIELDS: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors."""
        return {name: getattr(self, name).clone() for name in self.FIELDS}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the tensors of state_dict(). ValueError where the names or shapes are not this table's."""
        ours = {name: tuple(getattr(self, name).shape) for name in self.FIELDS}
        theirs = {name: tuple(value.shape) for name, value in state.items()}
        if ours != theirs:
            raise ValueError(f"the saved {type(self).__name__} has {theirs}, this one {ours}; it belongs to a run with "
                             f"other prototypes or neighbours")
        for name in self.FIELDS:
            setattr(self, name, state[name].clone())

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Add what other tables have seen, given their state_dict(); the order, and seeing an image twice, changes
        nothing."""
        for state in states:
            self._add({name: state[name] for name in self.FIELDS})

    def _add(self, new: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


class PushTable(PatchTable):
    """The nearest patch of each prototype among the cells of its class, over the images seen so far.

    distance (P,) float32, infinite where none was found; vector (P, D) the features there; image (P,), cell (P, 2)
    row and column, grid (P, 2) = h, w, size (P, 2) = H, W, all int64 and -1 where none was found. Equal distances: the
    lower image wins, then the upper, then the left cell, so that the order of the images does not matter.
    """

    FIELDS = ("distance", "vector", "image", "cell", "grid", "size")

    def __init__(self, num_prototypes: int, channels: int):
        self.distance = torch.full((num_prototypes,), math.inf)
        self.vector = torch.zeros(num_prototypes, channels)
        self.image = torch.full((num_prototypes,), -1)
        self.cell, self.grid, self.size = (torch.full((num_prototypes, 2), -1) for _ in range(3))

    @torch.no_grad()
    def update(self, index: int, features: Tensor, distances: Tensor, label: Tensor, class_identity: Tensor) -> None:
        """Look at image `index`: features (D, h, w) after the sigmoid, distances (P, h, w), label (H, W) int64,
        class_identity (P, C) one-hot, all on one device."""
        grid = distances.shape[1:]
        own = cell_classes(label, grid, class_identity.shape[1])[class_identity.argmax(1)]     # (P, h, w)
        distances = torch.where(own, distances.float(), math.inf).flatten(1)                   # (P, h * w)
        place = distances.argmin(1)                                    # the first of equal ones, says torch
        found = distances.gather(1, place[:, None])[:, 0].cpu()
        vector, place = features.flatten(1).float()[:, place].T.cpu(), place.cpu()             # (P, D)
        self._add({"distance": found, "vector": vector, "image": torch.full_like(place, index),
                   "cell": torch.stack([place // grid[1], place % grid[1]], 1),
                   "grid": torch.tensor(grid).expand(len(place), 2),
                   "size": torch.tensor(label.shape).expand(len(place), 2)})

    def _add(self, new: Mapping[str, Tensor]) -> None:
        tie = (new["distance"] == self.distance) & (new["image"] < self.image)   # in unfilled rows image is -1: none
        better = (new["distance"] < self.distance) | tie
        for name in self.FIELDS:
            getattr(self, name)[better] = new[name][better].to(getattr(self, name).dtype)


class PushReport(NamedTuple):
    """What push did; all indices are those from before it."""

    kept: Tensor                 # (P',) int64, ascending
    unpushed: list[int]          # no pixel of their class in any image: they keep their learned vector
    duplicates: list[int]        # removed: equal to a prototype with a lower index


@torch.no_grad()
def push(model: PPNet, table: PushTable) -> PushReport:
    """Overwrite each prototype with its patch in `table`, then remove all but the first of equal prototypes.

    As published, duplicates are found across classes too: of two classes that share a cell, the higher loses the
    prototype. Different from upstream, prototypes of a class that never occurs keep their vector instead of becoming
    zero. The last layer's columns and model.provenance are cut alike; parameters are new objects if anything goes.
    """
    found = table.distance.isfinite()
    model.prototype_vectors[found.to(model.prototype_vectors.device)] = \
        table.vector[found][..., None, None].to(model.prototype_vectors)
    first: dict[tuple, int] = {}
    for p, vector in enumerate(model.prototype_vectors.flatten(1).tolist()):
        first.setdefault(tuple(vector), p)
    kept = torch.tensor(list(first.values()))
    duplicates = sorted(set(range(len(found))) - set(kept.tolist()))
    if duplicates:
        model.remove(kept)
    return PushReport(kept, (~found).nonzero()[:, 0].tolist(), duplicates)


def cell_box(cell: Sequence[int], grid: Sequence[int], size: Sequence[int]) -> list[int]:
    """Pixels of a cell as [y0, x0, y1, x1], the ends outside, edges rounded outwards.

    Not the receptive field, which is far larger. As published, in double precision, where an edge on a whole pixel
    takes the next pixel in too; different from upstream, boxes end where the image does.
    """
    sides = [length / cells for cells, length in zip(grid, size, strict=True)]
    begin = [int(place * side) for place, side in zip(cell, sides, strict=True)]
    return begin + [min(int(place * side + side) + 1, length)
                    for place, side, length in zip(cell, sides, size, strict=True)]


def patch_box(similarity: Tensor, cell: Sequence[int], own: Tensor) -> list[int]:
    """The part of the image that a prototype responds to around its cell, as [y0, x0, y1, x1], the ends outside.

    similarity (h, w) of one prototype, own (H, W) bool the pixels of its class. The map is resized to the image
    (bicubic). From the cell's box, with the row and column behind its end, the box grows up, down, left and right in
    turn, a row or column at a time, while that has a pixel of the class in the top 5 % of the whole map; a side without
    one has grown for good. 5 pixels are added at the end. As published, up to rounding.
    """
    H, W = own.shape
    top, left, bottom, right = cell_box(cell, similarity.shape, own.shape)      # the last two are in the box from here
    resized = F.interpolate(similarity[None, None].float(), (H, W), mode="bicubic")[0, 0].detach().cpu().numpy()
    active = (resized >= np.quantile(resized, 1 - TOP_SHARE)) & own.cpu().numpy()
    up = down = leftwards = rightwards = True
    while up or down or leftwards or rightwards:
        up = up and top > 0 and bool(active[top - 1, left:right + 1].any())
        top -= up
        down = down and bottom + 1 < H and bool(active[bottom + 1, left:right + 1].any())
        bottom += down
        leftwards = leftwards and left > 0 and bool(active[top:bottom + 1, left - 1].any())
        left -= leftwards
        rightwards = rightwards and right + 1 < W and bool(active[top:bottom + 1, right + 1].any())
        right += rightwards
    return [max(top - MARGIN, 0), max(left - MARGIN, 0), min(bottom + 1 + MARGIN, H), min(right + 1 + MARGIN, W)]


def provenance(model: PPNet, table: PushTable, files: Sequence[str | Path]) -> list[dict]:
    """Where each prototype's patch comes from, as plain values; call it before push, files[i] being image i.

    Entries: image (file name), index, cell, grid [h, w], size [H, W], cell_box, box (the cell's too; patch_box knows
    the better one), distance (before the push), class, prototype (its number before the push), pushed. Without a
    patch: image and distance None, pushed False, all else -1.
    """
    classes = model.class_identity.argmax(1).tolist()
    entries = []
    for p, index in enumerate(table.image.tolist()):
        found = index >= 0
        cell, grid, size = (getattr(table, name)[p].tolist() for name in ("cell", "grid", "size"))
        box = cell_box(cell, grid, size) if found else [-1] * 4
        entries.append({"image": str(files[index]) if found else None, "index": index, "cell": cell, "grid": grid,
                        "size": size, "cell_box": box, "box": list(box),
                        "distance": table.distance[p].item() if found else None, "class": classes[p], "prototype": p,
                        "pushed": found})
    return entries


class NearestPatches(PatchTable):
    """The k nearest patches of each prototype, of any class, at most one per image, nearest first.

    distance (P, k) float32, image (P, k) and patch_class (P, k) int64, cell (P, k, 2); infinite and -1 where there
    are fewer images. Cells whose middle pixel is ignored are left out. The class of a patch (its cell_box without the
    pixels added behind its ends, as published) is the prototype's own where any of its pixels is, else that of most
    pixels, -1 where most are ignored.
    """

    FIELDS = ("distance", "image", "cell", "patch_class")

    def __init__(self, num_prototypes: int, k: int = 6):
        self.distance = torch.full((num_prototypes, k), math.inf)
        self.image, self.patch_class = (torch.full((num_prototypes, k), -1) for _ in range(2))
        self.cell = torch.full((num_prototypes, k, 2), -1)

    @torch.no_grad()
    def update(self, index: int, distances: Tensor, label: Tensor, class_identity: Tensor) -> None:
        """Look at image `index`: distances (P, h, w), label (H, W) int64, class_identity (P, C), all on one device."""
        grid = distances.shape[1:]
        void = resize_label(label[None], grid)[0] == IGNORE_INDEX                              # (h, w)
        distances = distances.float().masked_fill(void, math.inf).flatten(1)                   # (P, h * w)
        place = distances.argmin(1)
        found, place = distances.gather(1, place[:, None]).cpu(), place.cpu()[:, None]         # (P, 1) each
        self._add({"distance": found, "image": torch.where(found.isfinite(), index, -1),
                   "cell": torch.stack([place // grid[1], place % grid[1]], 2),
                   "patch_class": self._classes(place[:, 0].tolist(), grid, label.cpu(), class_identity)[:, None]})

    @staticmethod
    def _classes(places: list[int], grid: Sequence[int], label: Tensor, class_identity: Tensor) -> Tensor:
        """Classes (P,) of the patches at cells `places`: label (H, W) on the CPU."""
        classes = class_identity.argmax(1).tolist()
        counted = torch.where(label == IGNORE_INDEX, -1, label) + 1
        height, width = label.shape[0] / grid[0], label.shape[1] / grid[1]
        for p, place in enumerate(places):
            y, x = divmod(place, grid[1])
            patch = counted[int(y * height):int((y + 1) * height), int(x * width):int((x + 1) * width)]
            counts = patch.flatten().bincount(minlength=class_identity.shape[1] + 1)
            if not counts[classes[p] + 1]:
                classes[p] = int(counts.argmax()) - 1                  # ignored first: it wins ties, as published
        return torch.tensor(classes)

    def _add(self, new: Mapping[str, Tensor]) -> None:
        k = self.distance.shape[1]
        both = {name: torch.cat([getattr(self, name), new[name]], 1) for name in self.FIELDS}
        self._reorder(both, both["image"].argsort(dim=1, stable=True))
        again = both["image"][:, 1:] == both["image"][:, :-1]          # the same image, seen by two of the tables
        both["distance"][:, 1:].masked_fill_(again, math.inf)
        self._reorder(both, both["distance"].argsort(dim=1, stable=True))  # stable: the lower image first
        empty = both["distance"].isinf()
        for name in self.FIELDS[1:]:
            both[name][empty] = -1
        for name in self.FIELDS:
            setattr(self, name, both[name][:, :k].clone())

    @staticmethod
    def _reorder(tensors: dict[str, Tensor], order: Tensor) -> None:
        rows = torch.arange(len(order))[:, None]
        for name in tensors:
            tensors[name] = tensors[name][rows, order]


def _own_and_found(nearest: NearestPatches, class_identity: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each prototype's patches are of its class, and how many there are: (P,) int64 each, on the CPU."""
    own = class_identity.argmax(1).cpu()[:, None]
    return (nearest.patch_class == own).sum(1), (nearest.image >= 0).sum(1)


def purity(nearest: NearestPatches, class_identity: Tensor) -> Tensor:
    """Share of each prototype's nearest patches that are of its class (P,) float32; NaN where there are none."""
    own, found = _own_and_found(nearest, class_identity)
    return own / found


def prune_keep(nearest: NearestPatches, class_identity: Tensor, threshold: int = 3) -> Tensor:
    """The prototypes to keep, int64 ascending: at least `threshold` of their k nearest patches are of their class.

    With fewer than k images (trial runs) the same share of those there are. ValueError where none is left.
    """
    own, found = _own_and_found(nearest, class_identity)
    k = nearest.distance.shape[1]
    keep = (own * k >= threshold * found).nonzero()[:, 0]
    if not len(keep):
        raise ValueError(f"pruning would remove all {len(own)} prototypes: none has {threshold} of its {k} nearest "
                         f"patches in its own class. Train longer, or lower training.prune_threshold")
    return keep
