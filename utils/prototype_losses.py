"""The two losses that prototype segmentation (Sacha et al. 2023) adds to cross entropy, and its labels on the grid."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.losses import IGNORE_INDEX


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """label (B, H, W) -> (B, h, w): the pixel at the middle of each cell, as Pillow's nearest chooses it.

    Torch's "nearest" takes other pixels nearly everywhere, "nearest-exact" some at sizes such as 256 -> 33.
    """
    rows, cols = (_nearest(*lengths, label.device) for lengths in zip(label.shape[-2:], size, strict=True))
    return label[:, rows[:, None], cols]


@lru_cache(maxsize=1024)
def _nearest(length: int, cells: int, device: torch.device) -> Tensor:
    """Source index of every cell (cells,). Pillow adds up the positions step by step, and so do we: rounding counts."""
    step = length / cells
    position = step / 2
    indices = []
    for _ in range(cells):
        indices.append(int(position))
        position += step
    return torch.tensor(indices, device=device)


def prototype_divergence(distances: Tensor, label: Tensor, class_identity: Tensor,
                         published: bool = False) -> tuple[Tensor, Tensor]:
    """How alike the prototypes of a class are spread over its cells: (sum of exp(-J) over pairs, number of pairs).

    distances (B, P, h, w) squared, label (B, h, w) int64 on the same grid, class_identity (P, C) one-hot -> two
    float32 scalars; the loss is their quotient, in (0, 1], 1 for identical prototypes. For each image and class, each
    prototype of the class is a softmax of its DISTANCES over the cells of the class (as published; near cells get
    little), and J is Jeffreys' divergence of two of them, half the sum of both Kullback-Leibler divergences. Classes
    with less than two cells or prototypes have no pairs; without any the sum is 0, with a graph. Cells with
    IGNORE_INDEX count nowhere.

    published: the loss as the published code computed it, on labels one too high: prototypes of class c on the cells
    of class c - 1, those of class 0 on the ignored cells, the last class's cells nowhere.
    """
    num_classes = class_identity.shape[1]
    label = label.flatten(1)                                                                   # (B, N)
    group = torch.where(label == IGNORE_INDEX, 0, label + 1) if published else label
    group = torch.where((group >= 0) & (group < num_classes), group, num_classes)              # ignored: a class more
    members, real = _members(class_identity)                                                   # (C + 1, K)
    with torch.autocast(distances.device.type, enabled=False):
        own = distances.float().flatten(2).gather(1, members[group].transpose(1, 2))           # (B, K, N)
        onehot = F.one_hot(group, num_classes + 1).float()                                     # (B, N, C + 1)
        inside = group[:, None].expand_as(own)
        highest = own.new_zeros(*own.shape[:2], num_classes + 1).scatter_reduce(
            2, inside, own.detach(), "amax", include_self=False)                               # (B, K, C + 1)
        # A class with cells has a sum of at least 1; products with one-hot matrices give the same bits in every run.
        total = ((own - highest.gather(2, inside)).exp() @ onehot).clamp(min=0.5)
        logs = own - (highest + total.log()) @ onehot.transpose(1, 2)                          # (B, K, N)
        cross = (logs.exp()[:, :, None] * logs[:, None]) @ onehot[:, None]                     # (B, K, K, C + 1)
        same = cross.diagonal(dim1=1, dim2=2).transpose(1, 2)                                  # (B, K, C + 1)
        divergence = (same[:, :, None] + same[:, None] - cross - cross.transpose(1, 2)) / 2
        pairs = (real[:, :, None] & real[:, None]).triu(1).permute(1, 2, 0)                    # (K, K, C + 1)
        pairs = pairs & (onehot.sum(1) >= 2)[:, None, None]                                    # (B, K, K, C + 1)
        return ((-divergence).exp() * pairs).sum(), pairs.sum(dtype=torch.float32)


def _members(class_identity: Tensor) -> tuple[Tensor, Tensor]:
    """class_identity (P, C) -> prototypes of each class and of no class (C + 1, K) int64, and which are not padding."""
    real = F.pad(class_identity.T > 0, (0, 0, 0, 1))                                           # (C + 1, P)
    most = int(real.sum(1).max())
    real, members = real.to(torch.uint8).sort(dim=1, descending=True, stable=True)
    return members[:, :most], real[:, :most].bool()


def off_class_l1(weight: Tensor, class_identity: Tensor) -> Tensor:
    """Sum of |weight| over prototypes of other classes: weight (C, P), class_identity (P, C) one-hot -> scalar."""
    return (weight * (1 - class_identity.T)).abs().sum()
