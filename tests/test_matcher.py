"""utils/matcher.py against values by hand, grid_sample of dense masks, torch's own losses and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.losses import IGNORE_INDEX
from utils.matcher import hungarian, labelled_points, matching_cost, sample_label, sample_points, softplus_sum


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- sampling -------------------------------------------------------------------------------------------------------


def test_sample_points_by_hand():
    maps = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])                              # height 2, width 3
    points = torch.tensor([[[1 / 6, 1 / 4], [5 / 6, 1 / 4], [1 / 3, 1 / 2], [0.0, 0.0], [1.0, 3 / 4]]])
    torch.testing.assert_close(sample_points(maps, points), torch.tensor([[[1.0, 3.0, 3.0, 1 / 4, 6 / 2]]]))


@pytest.mark.parametrize("channels", [1, 7, 16, 17, 100])
def test_sample_points_equals_grid_sample(channels):
    maps = torch.randn(2, channels, 5, 9, generator=generator(), requires_grad=True)
    points = torch.rand(2, 11, 2, generator=generator(1))
    expected = F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]
    values = sample_points(maps, points)
    torch.testing.assert_close(values, expected)
    for ours, theirs in zip(*(torch.autograd.grad(v.square().sum(), maps) for v in (values, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def label_maps(dtype=torch.int64):
    label = torch.randint(0, 4, (3, 7, 12), generator=generator(), dtype=dtype)
    if dtype == torch.int64:
        label[0, 2:5, 3:9] = IGNORE_INDEX
    return label


def edges_and_random(rows):
    edges = torch.tensor(list(itertools.product((0.0, 0.5, 1 - 1e-7, 1.0), repeat=2)))
    return torch.cat([edges.expand(rows, -1, -1), torch.rand(rows, 60, 2, generator=generator(1))], 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_sample_label_equals_grid_sample_of_masks(dtype):
    label, points = label_maps(dtype), edges_and_random(3)
    classes = torch.tensor([[0, 1, 2, 3], [3, 1, -1, -1], [2, -1, -1, -1]])
    masks = (label[:, None] == classes[..., None, None]).float()                             # (3, 4, 7, 12)
    expected = F.grid_sample(masks, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]
    torch.testing.assert_close(sample_label(label, points, classes), expected, atol=1e-5, rtol=0)
    assert expected[1, 2:].eq(0).all() and 0 < expected[0].mean() < 1
    rows = torch.tensor([2, 0, 0, 1])                                                        # label maps by number
    torch.testing.assert_close(sample_label(label, points[rows], classes[rows], rows), expected[rows], atol=1e-5, rtol=0)


def test_labelled_points():
    label, points = label_maps(), edges_and_random(3)
    nearest = F.grid_sample((label != IGNORE_INDEX).float()[:, None], 2 * points[:, None] - 1, mode="nearest", padding_mode="border",
                            align_corners=False)[:, 0, 0]
    assert torch.equal(labelled_points(label, points), nearest)
    rows = torch.tensor([1, 0])
    assert torch.equal(labelled_points(label, points[rows], rows), nearest[rows]) and nearest[0].mean() < 1


# -- cost -----------------------------------------------------------------------------------------------------------


def brute_cost(pred_logits, point_logits, classes, point_targets, weights):
    """One pair at a time, in float64."""
    cost = torch.empty(len(pred_logits), len(classes), dtype=torch.float64)
    for q, n in itertools.product(range(len(pred_logits)), range(len(classes))):
        x, t = point_logits[q].double(), point_targets[n].double()
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        cost[q, n] = (weights[1] * F.binary_cross_entropy_with_logits(x, t) + weights[2] * dice
                      - weights[0] * pred_logits[q].double().softmax(0)[classes[n]])
    return cost


def problem(num_points, scale=3.0):
    g = generator(num_points)
    return (torch.randn(5, 8, generator=g), scale * torch.randn(5, num_points, generator=g), torch.tensor([6, 0, 3]),
            torch.rand(3, num_points, generator=g))


@pytest.mark.parametrize("num_points", [1, 37, 48, 640])
@pytest.mark.parametrize("weights", [(2.0, 5.0, 5.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_cost_equals_brute_force(num_points, weights):
    given = problem(num_points)
    torch.testing.assert_close(matching_cost(*given, weights).double(), brute_cost(*given, weights), atol=2e-6, rtol=1e-5)


def test_cost_of_a_batch_and_of_labelled_points():
    first, second = problem(48), problem(49)
    second = (second[0], second[1][:, :48], second[2], second[3][:, :48])
    labelled = (torch.rand(2, 48, generator=generator()) < 0.6).float()
    together = matching_cost(*(torch.stack(pair) for pair in zip(first, second, strict=True)), labelled=labelled)
    for b, (logits, x, classes, t) in enumerate((first, second)):
        keep = labelled[b].bool()
        torch.testing.assert_close(together[b], matching_cost(logits, x[:, keep], classes, t[:, keep]))
    none = matching_cost(*first, labelled=torch.zeros(48))                                   # mask costs: 0 and 0
    torch.testing.assert_close(none, -2 * first[0].softmax(1)[:, first[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost_is_finite_for_large_logits(dtype):
    logits, x, classes, t = problem(12544)
    logits, x = (1e4 * value.sign().to(dtype) for value in (logits, x))
    cost = matching_cost(logits, x, classes, t)
    assert cost.dtype == torch.float32 and cost.isfinite().all()
    torch.testing.assert_close(cost.double(), brute_cost(logits, x, classes, t, (2.0, 5.0, 5.0)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [0.0, 0.1, 10.0, 200.0])
def testsoftplus_sum(scale):
    x = scale * torch.randn(3, 12544, generator=generator())
    torch.testing.assert_close(softplus_sum(x, x.sigmoid()).double(), F.softplus(x.double()).sum(1), rtol=2e-6, atol=0)
    assert softplus_sum(torch.zeros(128), torch.full((128,), 0.5)).item() == pytest.approx(128 * math.log(2), rel=1e-6)


# -- assignment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries, targets", [(5, 3), (3, 5), (4, 4), (4, 0)])
def test_hungarian_is_the_cheapest_assignment(queries, targets):
    cost = torch.randn(queries, targets, generator=generator())
    query, target = hungarian(cost)
    assert len(query) == len(target) == min(queries, targets) == len(set(target.tolist()))
    assert query.tolist() == sorted(set(query.tolist()))
    wide = cost.numpy() if queries <= targets else cost.numpy().T
    best = min(sum(wide[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(wide.shape[1]), len(wide)))
    assert cost[query, target].sum().item() == pytest.approx(best, abs=1e-6)


def test_hungarian_of_a_diverged_network():
    cost = np.array([[np.nan, np.inf], [1.0, -np.inf], [0.0, 2.0]])
    query, target = hungarian(cost)
    assert query.tolist() == [1, 2] and target.tolist() == [1, 0]
