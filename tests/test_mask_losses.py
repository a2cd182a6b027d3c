"""utils/mask_losses.py against values by hand, a loop over pairs and points, and the invariants of set prediction."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from utils import mask_losses
from utils.losses import IGNORE_INDEX
from utils.mask_losses import SetCriterion


def batch(num_outputs=3, num_queries=6, num_classes=4, batch_size=2, seed=0, dtype=torch.float32, scale=2.0):
    """outputs with gradients and label (B, 20, 28) with ignored pixels; class 3 is absent from the first image."""
    g = torch.Generator().manual_seed(seed)
    predictions = [{"pred_logits": torch.randn(batch_size, num_queries, num_classes + 1, generator=g).to(dtype).requires_grad_(),
                    "pred_masks": (scale * torch.randn(batch_size, num_queries, 5, 7, generator=g)).to(dtype).requires_grad_()}
                   for _ in range(num_outputs)]
    label = torch.randint(0, num_classes, (batch_size, 4, 4), generator=g).repeat_interleave(5, 1).repeat_interleave(7, 2)
    label[0, label[0] == 3] = 0
    label[:, :5, :7] = IGNORE_INDEX
    return {**predictions[0], "aux_outputs": predictions[1:]}, label


def each(outputs):
    return [outputs, *outputs["aux_outputs"]]


def draw(criterion, outputs, label):
    """Points in the documented order, from the seed that is set."""
    P, Q = criterion.num_points, outputs["pred_logits"].shape[1]
    R = sum(min(Q, len(set(ids.unique().tolist()) - {IGNORE_INDEX})) for ids in label)
    matcher = [[torch.rand(P, 2) for _ in label] for _ in each(outputs)]
    return [{"matcher": own, "oversampled": torch.rand(R, criterion.num_candidates, 2),
             "random": torch.rand(R, P - criterion.num_uncertain, 2)} for own in matcher]


def grads(loss, outputs):
    names = ("pred_logits", "pred_masks")
    return [dict(zip(names, torch.autograd.grad(loss, [p[n] for n in names], retain_graph=True), strict=True)) for p in each(outputs)]


# -- values ---------------------------------------------------------------------------------------------------------


def test_class_loss_by_hand():
    """Two queries, one target: weights 1 and 0.1, divided by 1.1 and not by 2."""
    criterion = SetCriterion(num_classes=1, num_points=8)
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]])              # (3/4, 1/4), (1/2, 1/2)
    masks = torch.stack([torch.full((2, 2), 9.0), torch.full((2, 2), -9.0)])[None]
    label = torch.zeros(1, 4, 4, dtype=torch.int64)
    assert criterion.label_weights(label, 2).tolist() == pytest.approx([1.0, 1.1])
    terms = criterion({"pred_logits": logits, "pred_masks": masks}, label)   # no aux_outputs: one output
    assert sorted(terms) == ["class_0", "dice_0", "mask_0", "total"]
    assert terms["class_0"].item() == pytest.approx((math.log(4 / 3) + 0.1 * math.log(2)) / 1.1)


def read_mask(mask, x, y):
    """Bilinear value of a nested list, zeros outside; pixel (0, 0) has its middle at 0.5 / width, 0.5 / height."""
    H, W = len(mask), len(mask[0])
    x, y = x * W - 0.5, y * H - 0.5
    value = 0
    for i, j in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= i < H and 0 <= j < W:
            value = value + (1 - abs(y - i)) * (1 - abs(x - j)) * mask[i][j]
    return value


def mask_costs(mask, truth, points):
    """Mean cross-entropy and dice of a mask (h, w) and a 0/1 mask (H, W) over points, one at a time."""
    x = torch.stack([read_mask(mask, *point) for point in points.tolist()])
    t = torch.tensor([float(read_mask(truth.tolist(), *point)) for point in points.tolist()], dtype=x.dtype)
    cross_entropy = -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x)).mean()
    return cross_entropy, 1 - (2 * (x.sigmoid() * t).sum() + 1) / (x.sigmoid().sum() + t.sum() + 1)


def test_two_queries_equal_loops():
    """The whole loss by its definition: all matchings tried, points chosen by sorting, sums over pairs."""
    outputs, label = batch(1, num_queries=2, num_classes=2, batch_size=1, seed=4)
    criterion = SetCriterion(2, num_points=16, importance_ratio=0.5)
    points, = draw(criterion, outputs, label)
    logits, masks = outputs["pred_logits"][0].double(), outputs["pred_masks"][0].double()
    truth = [(label[0] == c).double() for c in range(2)]
    cost = {}
    for q, c in itertools.product(range(2), range(2)):
        cross_entropy, dice = mask_costs(masks[q], truth[c], points["matcher"][0])
        cost[q, c] = 5 * cross_entropy + 5 * dice - 2 * logits[q].softmax(0)[c]
    straight = cost[0, 0] + cost[1, 1] < cost[0, 1] + cost[1, 0]
    pairs = [(0, 0), (1, 1)] if straight else [(0, 1), (1, 0)]
    total = 2 * sum(-logits[q].log_softmax(0)[c] for q, c in pairs) / 2
    for r, (q, c) in enumerate(pairs):
        order = sorted(points["oversampled"][r].tolist(), key=lambda point, q=q: abs(read_mask(masks[q].tolist(), *point)))
        cross_entropy, dice = mask_costs(masks[q], truth[c], torch.cat([torch.tensor(order[:8]), points["random"][r]]))
        total = total + (5 * cross_entropy + 5 * dice) / 2
    terms = criterion(outputs, label, [points])
    torch.testing.assert_close(terms["total"].double(), total, rtol=1e-5, atol=1e-5)
    for name, gradient in grads(terms["total"], outputs)[0].items():
        torch.testing.assert_close(gradient, torch.autograd.grad(total, outputs[name], retain_graph=True)[0], rtol=1e-4, atol=1e-5)


def test_thirty_terms_and_their_sum_at_the_start_of_training():
    g = torch.Generator().manual_seed(0)
    predictions = [{"pred_logits": 0.1 * torch.randn(1, 100, 21, generator=g), "pred_masks": 0.1 * torch.randn(1, 100, 8, 8, generator=g)}
                   for _ in range(10)]
    label = torch.arange(3).repeat_interleave(8)[None, None, :].expand(1, 16, 24)
    torch.manual_seed(0)
    terms = SetCriterion(20)({**predictions[0], "aux_outputs": predictions[1:]}, label)
    total = terms.pop("total")
    assert sorted(terms) == sorted(f"{name}_{o}" for name in ("class", "mask", "dice") for o in range(10))
    weights = {"class": 2, "mask": 5, "dice": 5}
    assert not any(value.requires_grad for value in terms.values())
    torch.testing.assert_close(total, sum(weights[name.split("_")[0]] * value for name, value in terms.items()))
    assert 110 < total < 135


# -- invariants -----------------------------------------------------------------------------------------------------


def test_order_of_queries_does_not_matter_and_unmatched_masks_have_no_gradient():
    outputs, label = batch()
    criterion = SetCriterion(4, num_points=64)
    points = draw(criterion, outputs, label)
    rows = criterion.match(each(outputs), label, criterion.present(label), points)
    loss = criterion(outputs, label, points)["total"]
    for (image, query, _), gradient in zip(rows.unbind(1), grads(loss, outputs), strict=True):
        matched = torch.zeros(2, 6, dtype=torch.bool)
        matched[image, query] = True
        assert torch.equal(gradient["pred_masks"].flatten(2).abs().sum(2) > 0, matched) and not matched.all()
        assert gradient["pred_logits"].abs().sum(2).gt(0).all()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = [{key: p[key][:, order] for key in ("pred_logits", "pred_masks")} for p in each(outputs)]
    swapped = []                                             # each pair keeps its own points: rows are sorted by query
    for (image, query, _), own in zip(rows.unbind(1), points, strict=True):
        new = torch.argsort(image * 6 + order.argsort()[query])
        swapped.append({**own, "oversampled": own["oversampled"][new], "random": own["random"][new]})
    again = criterion({**moved[0], "aux_outputs": moved[1:]}, label, swapped)["total"]
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)


def test_each_output_has_its_own_matching():
    """Perfect predictions, the second output with its two queries swapped: both cost nothing."""
    label = torch.zeros(1, 8, 8, dtype=torch.int64)
    label[:, :, 4:] = 1
    masks = torch.where(torch.stack([label == 0, label == 1], 1), 50.0, -50.0)
    logits = 50 * torch.eye(3)[None, :2]
    outputs = {"pred_logits": logits, "pred_masks": masks, "aux_outputs": [{"pred_logits": logits.flip(1), "pred_masks": masks.flip(1)}]}
    criterion = SetCriterion(2, num_points=512, importance_ratio=0.0)
    rows = criterion.match(each(outputs), label, criterion.present(label))
    assert rows[1].tolist() == [[0, 1], [0, 1]] and rows[2].tolist() == [[0, 1], [1, 0]]
    terms = criterion(outputs, label)
    assert terms["class_0"] < 1e-6 and terms["class_1"] < 1e-6 and terms["dice_1"] < 0.1


def test_image_without_targets():
    """An image of ignored pixels: its queries are all "no object", its masks have no loss; the other is as if alone."""
    outputs, label = batch()
    label[1] = IGNORE_INDEX
    criterion = SetCriterion(4, num_points=32)
    points = draw(criterion, outputs, label)
    loss = criterion(outputs, label, points)
    alone = [{key: p[key][:1] for key in ("pred_logits", "pred_masks")} for p in each(outputs)]
    single = criterion({**alone[0], "aux_outputs": alone[1:]}, label[:1], [{**own, "matcher": own["matcher"][:1]} for own in points])
    for o, gradient in enumerate(grads(loss["total"], outputs)):
        torch.testing.assert_close(loss[f"mask_{o}"], single[f"mask_{o}"])
        torch.testing.assert_close(loss[f"dice_{o}"], single[f"dice_{o}"])
        assert gradient["pred_masks"][1].eq(0).all() and gradient["pred_logits"].isfinite().all()
        assert gradient["pred_logits"][1, :, 4].lt(0).all()              # each pulled towards "no object"
    label[:] = IGNORE_INDEX
    loss = criterion(outputs, label)
    assert all(loss[f"{name}_{o}"] == 0 for name in ("mask", "dice") for o in range(3))
    assert all(value.isfinite().all() for gradient in grads(loss["total"], outputs) for value in gradient.values())


def test_images_matched_together_or_one_by_one(monkeypatch):
    outputs, label = batch(batch_size=3)
    criterion = SetCriterion(4, num_points=32)
    points = draw(criterion, outputs, label)
    single = criterion.match(each(outputs), label, criterion.present(label), points)
    monkeypatch.setattr(mask_losses, "IMAGES_AT_ONCE", {"cpu": 2})       # as on a GPU, with a remainder
    assert torch.equal(criterion.match(each(outputs), label, criterion.present(label), points), single)


def test_more_classes_than_queries():
    outputs, label = batch(num_queries=2)
    criterion = SetCriterion(4, num_points=32)
    assert criterion.label_weights(label, 2).tolist() == [7, 4]
    terms = criterion(outputs, label)
    rows = criterion.match(each(outputs), label, criterion.present(label))
    assert rows.shape == (3, 3, 4) and terms["total"].isfinite()


def test_masks_divided_by_pairs_are_divided_by_the_pairs():
    """Seven classes in two images of two queries: four pairs; the class loss is the same."""
    outputs, label = batch(num_queries=2)
    per_target, per_pair = SetCriterion(4, num_points=32), SetCriterion(4, num_points=32, divide_by_pairs=True)
    assert per_pair.label_weights(label, 2).tolist() == [4, 4] and per_pair.label_weights(label, 100)[0] == 7
    points = draw(per_target, outputs, label)
    first, second = (criterion(outputs, label, points) for criterion in (per_target, per_pair))
    for name in first:
        share = {"class": 1, "mask": 7 / 4, "dice": 7 / 4}.get(name[:-2])
        assert share is None or second[name] == pytest.approx(share * float(first[name]), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_finite_for_large_bfloat16_logits(autocast):
    outputs, label = batch(dtype=torch.bfloat16)
    for prediction in each(outputs):
        for key in ("pred_logits", "pred_masks"):
            prediction[key] = (1e4 * prediction[key].detach().sign()).requires_grad_()
    criterion = SetCriterion(4, num_points=64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = criterion(outputs, label)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(value.isfinite().all() for gradient in grads(terms["total"], outputs) for value in gradient.values())


def test_parts_of_a_batch_add_up():
    outputs, label = batch()
    criterion = SetCriterion(4, num_points=32)
    points = draw(criterion, outputs, label)
    whole = criterion(outputs, label, points)
    normalizer = sum(criterion.label_weights(label[b:b + 1], 6) for b in range(2))
    torch.testing.assert_close(normalizer, criterion.label_weights(label, 6))
    first = int(criterion.label_weights(label[:1], 6)[0])                # rows of the first image
    parts = []
    for b, rows in ((0, slice(first)), (1, slice(first, None))):
        own = [{key: p[key][b:b + 1] for key in ("pred_logits", "pred_masks")} for p in each(outputs)]
        drawn = [{"matcher": [p["matcher"][b]], "oversampled": p["oversampled"][rows], "random": p["random"][rows]} for p in points]
        parts.append(criterion.sums({**own[0], "aux_outputs": own[1:]}, label[b:b + 1], normalizer, drawn))
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


# -- points ---------------------------------------------------------------------------------------------------------


def test_points_are_the_most_uncertain_and_random_ones():
    criterion = SetCriterion(1)
    label, image = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    ramp = torch.linspace(-1, 1, 64).expand(2, 1, 64, 64)                # the logit is 0 in the middle column
    torch.manual_seed(0)
    points = criterion._loss_points(ramp.clone().requires_grad_(), label, image, None)
    assert points.shape == (2, 12544, 2) and not points.requires_grad
    distance = (points[..., 0] - 0.5).abs()
    uncertain = distance[:, :9408]                                       # a quarter of the width, and the fading border
    assert (uncertain < 0.13).float().mean() > 0.97 and uncertain.mean().item() == pytest.approx(0.0625, abs=0.004)
    assert distance[:, 9408:].mean().item() == pytest.approx(0.25, abs=0.01) and points[..., 1].mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(points[0], points[1])


def test_random_numbers_come_in_the_documented_order():
    outputs, label = batch()
    criterion = SetCriterion(4, num_points=32)
    torch.manual_seed(7)
    random = criterion(outputs, label)
    torch.manual_seed(7)
    given = criterion(outputs, label, draw(criterion, outputs, label))
    assert all(torch.equal(random[name], given[name]) for name in random)
    assert not torch.equal(criterion(outputs, label)["total"], random["total"])


def test_ignored_pixels_as_option():
    """Half the image is ignored: as in the original it is outside every mask, with the option nothing there matters."""
    outputs, label = batch()
    label[:, :, :14] = IGNORE_INDEX
    changed = [{**p, "pred_masks": p["pred_masks"].detach().clone()} for p in each(outputs)]
    for prediction in changed:
        prediction["pred_masks"][..., :3] = 8.0                          # columns 0 to 2 of 7: read left of the middle only
    changed = {**changed[0], "aux_outputs": changed[1:]}
    for option in (False, True):
        criterion = SetCriterion(4, num_points=64, ignore_in_mask_loss=option)
        points = draw(criterion, outputs, label)
        values = [criterion(p, label, points)["total"] for p in (outputs, changed)]
        assert torch.equal(values[0], values[1]) == option
    plain = SetCriterion(4, num_points=64, importance_ratio=0.0)
    option = SetCriterion(4, num_points=64, importance_ratio=0.0, ignore_in_mask_loss=True)
    points = draw(plain, outputs, label)
    halves = [torch.cat([own["random"][:, :32]] * 2, 1) for own in points]
    scale, shift = torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0])    # to the left half, and on to the right one
    inside = [{**own, "matcher": [m * scale + shift for m in own["matcher"]], "random": half * scale + shift}
              for own, half in zip(points, halves, strict=True)]
    mixed = [{**own, "random": torch.cat([own["random"][:, :32], own["random"][:, 32:] - shift], 1)} for own in inside]
    for o in range(3):
        expected, value = plain(outputs, label, inside)[f"mask_{o}"], option(outputs, label, mixed)[f"mask_{o}"]
        torch.testing.assert_close(value, expected)                      # the mean over the labelled half of the points
    pointless = [{**own, "matcher": [torch.zeros(64, 2)] * 2, "oversampled": 0 * own["oversampled"], "random": 0 * own["random"]}
                 for own in points]                                      # every point is ignored
    terms = criterion(outputs, label, pointless)
    assert all(terms[f"{name}_{o}"] == 0 for name in ("mask", "dice") for o in range(3)) and terms["class_0"] > 0


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors():
    outputs, label = batch()
    label[0, 0, 0] = 4
    with pytest.raises(ValueError, match=r"^1 labels outside 0\.\.3, values \[4\]"):
        SetCriterion(4)(outputs, label)
    with pytest.raises(ValueError, match=r"^1 labels outside 0\.\.3, values \[4\]"):
        SetCriterion(4).label_weights(label, 6)
    for settings in ({"num_points": 0}, {"oversample_ratio": 0.5}, {"importance_ratio": 1.5}):
        with pytest.raises(ValueError, match="must be at least 1, at least 1, and from 0 to 1"):
            SetCriterion(4, **settings)


def test_no_weights_in_checkpoints():
    assert not SetCriterion(4).state_dict()


@pytest.mark.gpu
def test_cuda_equals_cpu():
    outputs, label = batch(batch_size=11)
    criterion = SetCriterion(4, num_points=64)
    points = draw(criterion, outputs, label)
    cuda = torch.utils._pytree.tree_map(lambda value: value.cuda(), (outputs, points))
    terms = criterion.cuda()(cuda[0], label.cuda(), cuda[1])
    for name, value in criterion.cpu()(outputs, label, points).items():
        torch.testing.assert_close(terms[name].cpu(), value, rtol=1e-4, atol=1e-5)
