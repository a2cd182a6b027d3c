"""utils/prototype_losses.py against Pillow, a pairwise loop, and cases worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from utils.losses import IGNORE_INDEX
from utils.prototype_losses import off_class_l1, prototype_divergence, resize_label


def blocks(num_classes, per_class):
    return torch.eye(num_classes).repeat_interleave(per_class, 0)


def pairwise(distances, label, identity):
    """The definition, pair by pair with two calls of kl_div; float64."""
    values = []
    for image, cells in zip(distances.double(), label, strict=True):
        for c in range(identity.shape[1]):
            own = [image[p][cells == c] for p in range(len(identity)) if identity[p, c]]
            maps = [d.log_softmax(0) for d in own] if (cells == c).sum() > 1 else []
            for i in range(len(maps)):
                for j in range(i):
                    both = sum(F.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((maps[i], maps[j]), (maps[j], maps[i])))
                    values.append((-both / 2).exp())
    return sum(values), len(values)


def random_case(seed=0, num_classes=4, P=12, size=(7, 9)):
    torch.manual_seed(seed)
    label = torch.randint(0, num_classes, (3, *size))
    label[torch.rand(3, *size) < 0.2] = IGNORE_INDEX
    return (torch.rand(3, P, *size) * 6).requires_grad_(), label


@pytest.mark.parametrize("size", [(513, 513, 65, 65), (256, 256, 33, 33), (375, 500, 48, 63), (1024, 2048, 129, 257), (9, 9, 20, 5)])
def test_labels_are_resized_as_by_pillow(size):
    H, W, h, w = size
    label = np.random.default_rng(0).integers(0, 20, (H, W), np.uint8)
    expected = np.asarray(Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST))
    ours = resize_label(torch.from_numpy(label)[None].long(), (h, w))
    assert ours.shape == (1, h, w) and np.array_equal(ours[0].numpy(), expected)


@pytest.mark.parametrize("removed", [[], [0, 1, 6], [3, 4, 5]])         # the last: a class without prototypes
def test_divergence_equals_the_pairwise_loop(removed):
    distances, label = random_case()
    keep = [p for p in range(12) if p not in removed]
    identity = blocks(4, 3)[keep]
    total, count = prototype_divergence(distances[:, keep], label, identity)
    expected, pairs = pairwise(distances[:, keep], label, identity)
    assert count == pairs > 0
    torch.testing.assert_close(total.double() / count, expected / pairs, atol=1e-6, rtol=0)
    ours, = torch.autograd.grad(total, distances)
    loop, = torch.autograd.grad(expected, distances)
    torch.testing.assert_close(ours, loop, atol=1e-6, rtol=1e-4)


def test_two_prototypes_on_two_cells():
    distances = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
    total, count = prototype_divergence(distances, torch.zeros(1, 1, 2, dtype=torch.int64), blocks(1, 2))
    assert count == 1
    torch.testing.assert_close(total, torch.tensor(0.629949), atol=1e-6, rtol=0)


def test_identical_prototypes_give_one_and_diverse_ones_less():
    distances = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4) * 50
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    total, count = prototype_divergence(distances, label, blocks(1, 3))
    assert count == 3 and abs(total / count - 1) < 1e-6
    total, count = prototype_divergence(torch.rand(1, 3, 4, 4) * 50, label, blocks(1, 3))
    assert total / count < 0.5


def test_the_range_of_distances_does_not_matter():
    distances, label = random_case()
    total, _ = prototype_divergence(distances, label, blocks(4, 3))
    shifted, _ = prototype_divergence(distances + 300, label, blocks(4, 3))     # exp(300) is no float32
    torch.testing.assert_close(shifted, total, atol=1e-2, rtol=0)
    far = torch.where(torch.arange(9) < 4, distances, distances + 500)
    assert torch.autograd.grad(prototype_divergence(far, label, blocks(4, 3))[0], distances)[0].isfinite().all()


def test_only_the_prototypes_of_a_class_on_its_cells_have_gradients():
    distances, label = random_case()
    label = torch.where(torch.arange(9) < 5, 2, IGNORE_INDEX).expand_as(label)
    grad, = torch.autograd.grad(prototype_divergence(distances, label, blocks(4, 3))[0], distances)
    touched = grad != 0
    assert touched[:, 6:9, :, :5].all()
    touched[:, 6:9, :, :5] = False
    assert not touched.any()


def test_images_are_not_pooled():
    distances, label = random_case()
    parts = [prototype_divergence(d[None], l[None], blocks(4, 3)) for d, l in zip(distances, label, strict=True)]
    total, count = prototype_divergence(distances, label, blocks(4, 3))
    torch.testing.assert_close(total, sum(part[0] for part in parts))
    assert count == sum(part[1] for part in parts) == 3 * 4 * 3
    pooled, pairs = prototype_divergence(distances.transpose(0, 1).flatten(1)[None, :, None], label.flatten()[None, None], blocks(4, 3))
    assert abs(total / count - pooled / pairs) > 1e-3


def test_ignored_cells_change_nothing():
    distances, label = random_case()
    moved = torch.where(label[:, None] == IGNORE_INDEX, distances.detach() + 5, distances.detach()).requires_grad_()
    results = [prototype_divergence(d, label, blocks(4, 3))[0] for d in (distances, moved)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(total, d)[0] for total, d in zip(results, (distances, moved), strict=True)]
    assert torch.equal(*grads)
    assert not grads[0].transpose(0, 1)[:, label == IGNORE_INDEX].any()


@pytest.mark.parametrize("label, per_class", [(torch.full((1, 2, 2), IGNORE_INDEX), 2),                # all ignored
                                              (torch.tensor([[[0, 1], [2, IGNORE_INDEX]]]), 2),        # one cell each
                                              (torch.zeros(1, 2, 2, dtype=torch.int64), 1)])           # one prototype each
def test_nothing_to_compare(label, per_class):
    distances = torch.rand(1, 3 * per_class, 2, 2, requires_grad=True)
    total, count = prototype_divergence(distances, label, blocks(3, per_class))
    total.backward()
    assert (total, count) == (0, 0) and not distances.grad.any()


def test_published_labels_are_one_class_off():
    distances, label = random_case()
    shifted = torch.where(label == IGNORE_INDEX, 0, label + 1)
    shifted[shifted == 4] = IGNORE_INDEX                     # the last class is on no prototype's cells
    total, count = prototype_divergence(distances, label, blocks(4, 3), published=True)
    expected, pairs = prototype_divergence(distances, shifted, blocks(4, 3))
    assert torch.equal(total, expected) and torch.equal(count, pairs)
    assert abs(total - prototype_divergence(distances, label, blocks(4, 3))[0]) > 1e-2


def test_computed_in_float32_under_autocast():
    distances, label = random_case()
    expected, _ = prototype_divergence(distances.bfloat16().float(), label, blocks(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        total, count = prototype_divergence(distances.bfloat16(), label, blocks(4, 3))
    assert total.dtype == count.dtype == torch.float32 and torch.equal(total, expected)


@pytest.mark.parametrize("num_classes, expected", [(19, 1710), (21, 2100)])
def test_off_class_l1(num_classes, expected):
    identity = blocks(num_classes, 10)
    weight = (1.5 * identity.T - 0.5).requires_grad_()
    loss = off_class_l1(weight, identity)
    assert loss == expected
    loss.backward()
    assert torch.equal(weight.grad, identity.T - 1)          # -1 where it is off-class (negative), 0 on the own class
    with torch.no_grad():
        weight[3, 35] = 7
    assert off_class_l1(weight, identity) == expected
    with torch.no_grad():
        weight[3, 45] = 7
    assert off_class_l1(weight, identity) == expected + 6.5
