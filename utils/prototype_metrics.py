"""Numbers that describe the prototypes of a network over a set of images: how different, how few, how steady they are.

`model` is a models.ppnet.PPNet. A prototype's active cells in an image are the 5 % of the feature grid nearest to it;
published code takes them from the map resized to the image. Part labels are not needed.
"""

import math

import torch
from torch import Tensor, nn

from utils.distributed import all_reduce_sum
from utils.prototype_losses import off_class_l1

TOP_SHARE = 0.05                 # of a map: where a prototype is active
SMALL_WEIGHT = 0.05              # ScaleProtoSeg's: weights up to it hardly count
EXPLAINED = 0.9                  # of the winning logit
NOISE = 0.2                      # standard deviation, on the normalised image


def active_cells(distances: Tensor) -> Tensor:
    """distances (P, h, w) -> (P, h * w) bool: the nearest ceil(5 %) of the cells of each map, and those as near."""
    distances = distances.flatten(1)
    return distances <= distances.kthvalue(math.ceil(TOP_SHARE * distances.shape[1]), 1, keepdim=True).values


@torch.no_grad()
def noise_stability(model: nn.Module, image: Tensor, seed: int) -> Tensor:
    """IoU (P,) of the active cells before and after normal noise on the normalised image (1, 3, H, W); eval mode.

    Noise of deviation 0.2 from `seed`, the same on every device. Not the part-based stability of the papers, which
    asks whether the same parts of objects stay active.
    """
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)) * NOISE
    before, after = (active_cells(model.prototype_distances(model.features_of(x))[0])
                     for x in (image, image + noise.to(image)))
    return (before & after).sum(1) / (before | after).sum(1)


class PrototypeStatistics:
    """Sums over images, in float64 on the CPU; result() adds up all processes, which may have seen unequal shares."""

    def __init__(self, model: nn.Module):
        self.model = model
        P = len(model.class_identity)
        self.overlap = torch.zeros(P, P, dtype=torch.float64)          # cells active for both; the diagonal: for one
        self.wins, self.stability = (torch.zeros(P, dtype=torch.float64) for _ in range(2))
        self.needed, self.explained, self.images = 0, 0, 0

    @torch.no_grad()
    def update(self, distances: Tensor, label: Tensor | None = None) -> None:
        """One image: distances (P, h, w); label (H, W) int64 says which classes are in it, None: any may be."""
        identity, weight = self.model.class_identity, self.model.last_layer.weight.float()     # (P, C), (C, P)
        active = active_cells(distances).float()                                               # (P, N)
        if label is not None:
            present = torch.isin(torch.arange(identity.shape[1], device=label.device), label).to(identity)
            active *= (identity @ present)[:, None]
        self.overlap += (active @ active.T).cpu().double()

        similarity = self.model.similarity(distances.float()).flatten(1).T                     # (N, P)
        logit, winner = (similarity @ weight.T).max(1)                                         # (N,)
        parts = (similarity * weight[winner]).sort(1, descending=True)                         # (N, P)
        self.wins += parts.indices[:, 0].bincount(minlength=len(identity)).cpu().double()
        positive = logit > 0
        short = parts.values.cumsum(1) < EXPLAINED * logit[:, None]    # partial sums below it, the first ones
        self.needed += int((short.sum(1) + 1)[positive].sum())
        self.explained += int(positive.sum())

    def add_stability(self, iou: Tensor) -> None:
        """What noise_stability (P,) gave for one image."""
        self.stability += iou.cpu().double()
        self.images += 1

    def result(self) -> dict:
        """Plain numbers and lists; NaN where there is nothing to count.

        diversity: 1 - IoU of the active cells of two prototypes of one class, in [0, 1]. Cells are added up over the
            images that have the class, then divided; the mean is over all pairs of all classes that occur.
        sparsity: prototypes (their number), off_class_l1, weights_above_005 (share of all last-layer weights whose
            absolute value is above 0.05), prototypes_for_90_percent (mean over cells with a positive winning logit:
            how many prototypes, from the largest contribution down, reach 90 % of it).
        noise_stability: mean of noise_stability over prototypes and images, in [0, 1].
        prototypes_per_class (C) int; usage (P) share of the cells where the prototype adds most to the winning class.
        """
        identity, weight = self.model.class_identity.cpu(), self.model.last_layer.weight.detach().float().cpu()
        overlap, wins, stability = (all_reduce_sum(x) for x in (self.overlap, self.wins, self.stability))
        needed, explained, images = (all_reduce_sum(x) for x in (self.needed, self.explained, self.images))
        area = overlap.diagonal()
        union = area[:, None] + area - overlap
        pairs = (identity @ identity.T).bool().triu(1) & (union > 0)
        return {"diversity": 1 - (overlap[pairs] / union[pairs]).mean().item(),
                "sparsity": {"prototypes": len(identity), "off_class_l1": off_class_l1(weight, identity).item(),
                             "weights_above_005": (weight.abs() > SMALL_WEIGHT).float().mean().item(),
                             "prototypes_for_90_percent": needed / explained if explained else math.nan},
                "noise_stability": stability.mean().item() / images if images else math.nan,
                "prototypes_per_class": identity.sum(0).long().tolist(),
                "usage": (wins / wins.sum()).tolist()}
