"""Matching of queries with the classes of an image at random points (Mask2Former, Cheng et al. 2022, section 3).

A target of an image is one class id of its label map. A point is (x, y) in [0, 1], (0, 0) the outer corner of the
first pixel; maps are read there bilinearly with zeros outside, as grid_sample(align_corners=False) does.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from utils.bilinear import read_at
from utils.losses import IGNORE_INDEX


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps (N, C, h, w) float at points (N, P, 2) -> (N, C, P); differentiable in the maps."""
    N, C, h, w = maps.shape
    # Up to 16 channels a row of the batch: their maps fit a cache, and rows are what grid_sample spreads over cores.
    groups = next(g for g in range(-(-C // 16), C + 1) if C % g == 0)
    grid = points.mul(2).sub_(1).unsqueeze(1).expand(-1, groups, -1, -1).flatten(0, 1)        # (N * groups, P, 2)
    values = read_at(maps.reshape(N * groups, C // groups, h, w), grid.unsqueeze(1))
    return values.view(N, C, points.shape[1])


def sample_label(label: Tensor, points: Tensor, classes: Tensor, image: Tensor | None = None) -> Tensor:
    """Masks `label == class`, 0 or 1, read bilinearly at points from the four label pixels around: no mask is built.

    label (B, H, W) integer; points (N, P, 2); classes (N, T), -1 matches nothing; image (N,) int64, the label map that
    each row reads, None where N is B -> (N, T, P) float32, equal to grid_sample of the float masks.
    """
    H, W = label.shape[-2:]
    image = torch.arange(len(label), device=label.device) if image is None else image
    padded = F.pad(label.int(), (1, 1, 1, 1), value=IGNORE_INDEX).flatten()       # outside is no class: no bounds
    size = points.new_empty(2)                             # filled there: a copy would wait for the GPU
    size[0].fill_(W)
    size[1].fill_(H)
    pixel = points * size + 0.5                                                   # (N, P, 2), in the padded map
    low = pixel.floor()
    x, y = (pixel - low).unsqueeze(1).unbind(-1)                                  # (N, 1, P)
    left, top = low.int().unbind(-1)                                              # floats cannot count a large image
    first = left + top * (W + 2) + image[:, None].int() * ((H + 2) * (W + 2))     # (N, P) int32, and so is all below
    classes = classes.int().unsqueeze(2)
    rows = []
    for start in (0, W + 2):
        ids = [padded[start + step:].index_select(0, first.flatten()).view_as(first).unsqueeze(1) for step in (0, 1)]
        rows.append(torch.lerp(*((i == classes).float() for i in ids), x))            # (N, T, P)
    return torch.lerp(*rows, y)


def labelled_points(label: Tensor, points: Tensor, image: Tensor | None = None) -> Tensor:
    """Where the pixel that a point lies in is not ignored: arguments as sample_label -> (N, P) float32 of 0 and 1."""
    H, W = label.shape[-2:]
    image = torch.arange(len(label), device=label.device) if image is None else image
    x = (points[..., 0] * W).long().clamp(max=W - 1)
    y = (points[..., 1] * H).long().clamp(max=H - 1)
    return (label[image[:, None], y, x] != IGNORE_INDEX).float()


def matching_cost(pred_logits: Tensor, point_logits: Tensor, classes: Tensor, point_targets: Tensor,
                  weights: tuple[float, float, float] = (2.0, 5.0, 5.0), labelled: Tensor | None = None) -> Tensor:
    """Cost of each pair of a query and a target, (..., Q, T) float32, finite for finite logits.

    pred_logits (..., Q, K + 1), the last one "no object"; point_logits (..., Q, P), mask logits at the points;
    classes (..., T), -1 stands for nothing; point_targets (..., T, P) in [0, 1]; weights of the three costs: minus the
    probability of the class, mean binary cross-entropy, and dice 1 - (2 p.t + 1) / (sum p + sum t + 1), p the sigmoid.
    labelled (..., P) of 0 and 1: points where it is 0 count nowhere; None counts all. No gradient is meant to pass.
    """
    class_weight, mask_weight, dice_weight = weights
    x, targets = point_logits.float(), point_targets.float()
    count = x.shape[-1]
    if labelled is not None:                               # a logit of -inf would do, but 0 * inf is not a number
        x = torch.where(labelled.bool().unsqueeze(-2), x, -1e4)                      # sigmoid and softplus: exactly 0
        targets, count = targets * labelled.unsqueeze(-2), labelled.sum(-1).clamp_min(1)[..., None, None]
    prob = x.sigmoid()
    inside, overlap = ((targets @ values.transpose(-1, -2)).transpose(-1, -2) for values in (x, prob))
    cross_entropy = (softplus_sum(x, prob).unsqueeze(-1) - inside) / count                    # (..., Q, T)
    dice = 1 - (2 * overlap + 1) / (prob.sum(-1).unsqueeze(-1) + targets.sum(-1).unsqueeze(-2) + 1)
    of_class = classes.clamp_min(0).unsqueeze(-2).expand(cross_entropy.shape)
    class_prob = pred_logits.float().softmax(-1).gather(-1, of_class)
    return mask_weight * cross_entropy + dice_weight * dice - class_weight * class_prob


def softplus_sum(x: Tensor, prob: Tensor) -> Tensor:
    """Sum of log(1 + exp(x)) over the last dimension, from prob = sigmoid(x): one logarithm for up to 64 points.

    log(1 + exp(x)) = max(x, 0) - log max(prob, 1 - prob). The last maximum is at least 1/2, so that a product of 64
    of them is no smaller than 2^-64.
    """
    products = (prob - 0.5).abs_().add_(0.5).unflatten(-1, (math.gcd(x.shape[-1], 64), -1)).prod(-2)
    return x.relu().sum(-1) - products.log_().sum(-1)


def hungarian(cost: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest one-to-one pairs of a cost (Q, T): (query, target), each (min(Q, T),) int64, queries ascending.

    Values that are not finite count as very dear instead of failing, so that a network that has diverged is reported
    by its loss.
    """
    cost = cost.cpu().numpy() if isinstance(cost, Tensor) else cost
    return linear_sum_assignment(np.nan_to_num(cost, nan=1e9, posinf=1e9, neginf=-1e9))
