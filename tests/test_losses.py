"""utils/losses.py against values by hand, torch's own losses, brute force and Pointcept's Lovasz + cross entropy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from utils import losses
from utils.losses import (
    IGNORE_INDEX,
    MaskedCrossEntropyLoss,
    WeightedLoss,
    _lovasz_slope,
    _worst_first,
    check_labels,
    class_weights,
    lovasz_softmax_loss,
    soft_dice_loss,
)

GOLDEN = Path(__file__).parent / "golden" / "losses.pt"
WEIGHTS = [0.2, 3.0, 0.5, 1.0]


def ce(logits, label, mask=None, class_dim=-1, **kwargs):
    return MaskedCrossEntropyLoss(class_dim=class_dim, **kwargs)(logits, label, mask)


def focal(logits, label, mask=None, class_dim=-1, gamma=2.0, **kwargs):
    return ce(logits, label, mask, class_dim, gamma=gamma, **kwargs)


def smoothed(logits, label, mask=None, class_dim=-1):
    return ce(logits, label, mask, class_dim, class_weights=WEIGHTS, label_smoothing=0.1)


LOSSES = [ce, smoothed, focal, soft_dice_loss, lovasz_softmax_loss]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)


def mesh_batch(seed=0, dtype=torch.float32):
    """logits (2, 3, 5, 4): clusters of faces, four classes, labels with ignored faces, mask with padded ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 5, 4, generator=generator, dtype=dtype)
    label = torch.randint(0, 4, (2, 3, 5), generator=generator)
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    label[0, 1, 2] = label[1, 0, 0] = IGNORE_INDEX
    mask[0, 2, 3:] = mask[1, 2] = False
    return logits, label, mask


# -- all losses -----------------------------------------------------------------------------------------------------


@every_loss
def test_faces_and_images_agree(loss):
    logits, label, mask = mesh_batch()
    last = loss(logits, label, mask)
    torch.testing.assert_close(loss(logits.movedim(-1, 1), label, mask, class_dim=1), last)
    torch.testing.assert_close(loss(logits.movedim(-1, 2), label, mask, class_dim=-2), last)
    torch.testing.assert_close(loss(logits.flatten(0, 2), label.flatten(), mask.flatten()), last)
    assert last.ndim == 0 and last > 0


def test_worst_first_is_the_stable_order_of_the_errors():
    torch.manual_seed(0)
    prob = (torch.randn(3000, 3) * 4).softmax(1)
    prob[::3] = (prob[::3] * 8).round() / 8                  # ties
    prob[:40, 1], prob[40:60, 1], prob[60:80, 1] = 0, 1, 1e-42
    for error in (prob[:, 1], 1 - prob[:, 1], prob[:, 1].double(), prob[:0, 1]):
        assert torch.equal(_worst_first(error), error.argsort(descending=True, stable=True))


@every_loss
@pytest.mark.parametrize("value", [50.0, float("nan"), float("inf")])
def test_ignored_elements_change_neither_value_nor_gradient(loss, value):
    logits, label, mask = mesh_batch()
    ignored = ~mask | (label == IGNORE_INDEX)
    changed = logits.clone()
    changed[ignored] = value
    label_changed = label.masked_fill(~mask, 99)             # padding may hold any label, also one out of range
    results = []
    for x, y in ((logits, label), (changed, label_changed)):
        x = x.requires_grad_()
        out = loss(x, y, mask)
        out.backward()
        results.append((out.detach(), x.grad))
    (value_1, grad_1), (value_2, grad_2) = results
    assert torch.equal(value_1, value_2) and torch.equal(grad_1, grad_2)
    assert (grad_1[ignored] == 0).all() and (grad_1[~ignored] != 0).any(-1).all()


@every_loss
def test_more_padding_changes_nothing(loss):
    logits, label, mask = mesh_batch()
    more = F.pad(logits, (0, 0, 0, 2, 0, 1), value=1e3), F.pad(label, (0, 2, 0, 1)), F.pad(mask, (0, 2, 0, 1))
    torch.testing.assert_close(loss(*more), loss(logits, label, mask))


@every_loss
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_nothing_counts(loss, class_dim):
    for shape in ((2, 4, 3, 4), (2, 4, 0, 4)):               # all ignored, and no element at all
        logits = torch.randn(shape, requires_grad=True)
        label = torch.full([n for d, n in enumerate(shape) if d != class_dim % 4], IGNORE_INDEX)
        out = loss(logits, label, class_dim=class_dim)
        out.backward()
        assert out == 0 and torch.equal(logits.grad, torch.zeros(shape))


@every_loss
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_gradcheck(loss, class_dim):
    logits, label, mask = mesh_batch(dtype=torch.float64)
    logits = logits.movedim(-1, class_dim).contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, label, mask, class_dim), logits, eps=1e-7, atol=1e-5, fast_mode=True)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(2, 4, 64, 64, generator=generator)).to(dtype)
    label = torch.randint(0, 4, (2, 64, 64), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(logits.requires_grad_(), label, class_dim=1)
    out.backward()
    assert out.dtype == torch.float32 and logits.grad.isfinite().all()
    torch.testing.assert_close(out.double(), loss(logits.detach().double(), label, class_dim=1), rtol=1e-4, atol=1e-5)


@every_loss
def test_narrow_labels(loss):
    """In uint8, 156 == -100 is true: class 156 must not count as ignored. In int8, 1 >= 200 is true."""
    logits = torch.randn(3, 200) if loss is not smoothed else torch.randn(3, 4)
    label = torch.tensor([156, 1, 7]) % logits.shape[1]
    torch.testing.assert_close(loss(logits, label.to(torch.uint8)), loss(logits, label))
    torch.testing.assert_close(loss(logits, label.fmod(100).to(torch.int8)), loss(logits, label.fmod(100)))
    assert loss is not ce or ce(logits, torch.full((3,), 156, dtype=torch.uint8)) > 0


@every_loss
def test_errors(loss):
    logits, label, mask = mesh_batch()
    wrong = label.clone()
    wrong[0, 0, :2] = 4
    with pytest.raises(ValueError, match=r"^2 labels outside 0\.\.3, values \[4\]; .*ignore value -100"):
        loss(logits, wrong, mask)
    wrong[0, 0, 0] = -1
    with pytest.raises(ValueError, match=r"^2 labels outside 0\.\.3, values \[-1, 4\]"):
        loss(logits, wrong, mask)
    with pytest.raises(ValueError, match=r"labels \(2, 3, 4\) do not fit logits \(2, 3, 5, 4\).*dimension 3"):
        loss(logits, label[..., :4], mask)
    with pytest.raises(ValueError, match=r"mask \(2, 3\) must have the shape of the labels \(2, 3, 5\)"):
        loss(logits, label, mask[..., 0])
    with pytest.raises(ValueError, match=r"dtype torch.float32; give class ids"):
        loss(logits, label.float(), mask)


@pytest.mark.gpu
@every_loss
def test_deterministic_on_cuda(loss):
    logits = torch.randn(2, 4, 32, 32, device="cuda", requires_grad=True)
    label = torch.randint(0, 4, (2, 32, 32), device="cuda")
    label[0, :5] = IGNORE_INDEX
    torch.use_deterministic_algorithms(True)
    try:
        loss(logits, label, class_dim=1).backward()          # raises where a kernel is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(loss(logits, label, class_dim=1).cpu(), loss(logits.cpu(), label.cpu(), class_dim=1))


# -- cross entropy --------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0], [9.0, 0.0]]])          # (3/4, 1/4), (1/2, 1/2), padding
    label, mask = torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]])
    mean, weighted_mean = (math.log(4 / 3) + math.log(2)) / 2, (3 * math.log(4 / 3) + math.log(2)) / 4
    assert ce(logits, label, mask).item() == pytest.approx(mean)
    assert ce(logits, label, mask.int()).item() == pytest.approx(mean)                       # a 0/1 mask
    assert ce(logits, label, mask, class_weights=[3.0, 1.0]).item() == pytest.approx(weighted_mean)
    assert ce(logits[0, :1], torch.tensor([0])).item() == pytest.approx(math.log(4 / 3))     # class 0 counts


@pytest.mark.parametrize("weights", [None, [0.2, 3.0, 0.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(weights, smoothing):
    logits, label, mask = mesh_batch()
    flat = label.masked_fill(~mask, IGNORE_INDEX).flatten()
    weight = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(logits.flatten(0, 2), flat, weight, ignore_index=IGNORE_INDEX, label_smoothing=smoothing)
    settings = {"class_weights": weights, "label_smoothing": smoothing}
    torch.testing.assert_close(ce(logits, label, mask, **settings), expected)
    label[label == IGNORE_INDEX] = 255
    torch.testing.assert_close(ce(logits, label, mask, **settings, ignore_index=255), expected)


@pytest.mark.parametrize("loss", [MaskedCrossEntropyLoss(), MaskedCrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
                                  MaskedCrossEntropyLoss(WEIGHTS, gamma=2.0)],
                         ids=["ce", "smoothed", "focal"])
def test_sums_over_micro_batches_are_exact(loss):
    logits, label, mask = mesh_batch(dtype=torch.float64)
    parts = [loss.sum_and_weight(logits[b], label[b], mask[b]) for b in range(2)]
    assert parts[0][1] != parts[1][1]                        # or the mean of means would do as well
    torch.testing.assert_close(sum(p[0] for p in parts) / sum(p[1] for p in parts), loss(logits, label, mask))
    for b in range(2):
        torch.testing.assert_close(loss.label_weight(label[b], mask[b]).double(), parts[b][1].double())


def test_label_weight_checks_labels():
    with pytest.raises(ValueError, match=r"^1 labels outside 0\.\., values \[-7\]"):
        MaskedCrossEntropyLoss().label_weight(torch.tensor([0, -7, IGNORE_INDEX, 900]))
    with pytest.raises(ValueError, match=r"^1 labels outside 0\.\.1, values \[2\]"):
        MaskedCrossEntropyLoss([1.0, 1.0]).label_weight(torch.tensor([0, 2]))


@pytest.mark.parametrize("kwargs, message", [
    ({"class_weights": [1.0, -1.0]}, "class_weights must be"), ({"class_weights": [1.0, math.nan]}, "class_weights"),
    ({"class_weights": [[1.0]]}, "class_weights must be"), ({"label_smoothing": 1.0}, "label_smoothing must be in"),
    ({"gamma": -1.0}, "gamma must be"), ({"gamma": math.nan}, "gamma must be"),
    ({"gamma": 1.0, "label_smoothing": 0.1}, "knows no label smoothing")])
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MaskedCrossEntropyLoss(**kwargs)


def test_class_weights_of_a_setting():
    counts = np.array([100, 400, 25, 0])
    for setting, expected in ((None, None), ([1, 2, 3, 4], [1, 2, 3, 4]), ("1,2,0.5,4", [1, 2, 0.5, 4]),
                              ("median_frequency", [1.0, 0.25, 4.0, 1.0]), ("sqrt_median_frequency", [1.0, 0.5, 2.0, 1.0])):
        assert class_weights(setting, counts) == expected
    for setting, message in (("median", "weights=median: .*, median_frequency or sqrt"), ([1, 2], "weights: 2 numbers for 4 classes"),
                             ("1,2", "weights: 2 numbers"), ([1, "two", 3, 4], "expected a number for each class"), ("1,,2,3", "a number for each"),
                             ([[1], 2, 3, 4], "a number for each"), ([1, -1, 1, 1], "from 0"), ("1,nan,1,1", "from 0"), ([0, 0, 0, 0], "above 0")):
        with pytest.raises(ValueError, match=message):
            class_weights(setting, counts, "weights")


def test_class_weights_must_fit_and_are_not_saved():
    loss = MaskedCrossEntropyLoss([1.0, 2.0])
    assert not loss.state_dict()
    with pytest.raises(ValueError, match="2 class weights for 4 classes"):
        loss(*mesh_batch())


# -- focal loss -----------------------------------------------------------------------------------------------------


def test_focal_by_hand():
    logits, label = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    expected = (0.25 ** 2 * math.log(4 / 3) + 0.5 ** 2 * math.log(2)) / 2
    assert focal(logits, label).item() == pytest.approx(expected)
    expected = (3 * 0.25 * math.log(4 / 3) + 0.5 * math.log(2)) / 4
    assert focal(logits, label, gamma=1.0, class_weights=[3.0, 1.0]).item() == pytest.approx(expected)


def test_focal_with_gamma_zero_is_cross_entropy_and_is_smooth_near_one():
    logits, label, mask = mesh_batch()
    for gamma in (0.0, 1e-7):
        torch.testing.assert_close(focal(logits, label, mask, gamma=gamma, class_weights=WEIGHTS),
                                   ce(logits, label, mask, class_weights=WEIGHTS))
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal(sure, torch.tensor([0]), gamma=0.5).backward()          # (1 - p)^(gamma - 1) is infinite here
    assert sure.grad.isfinite().all()


# -- dice -----------------------------------------------------------------------------------------------------------


def test_dice_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0, -math.inf], [0.0, 0.0, -math.inf]])  # (3/4, 1/4, 0), (1/2, 1/2, 0)
    label = torch.tensor([0, 1])
    first, second = 2 * 0.75 / (1.25 + 1), 2 * 0.5 / (0.75 + 1)
    assert soft_dice_loss(logits, label).item() == pytest.approx(1 - (first + second) / 2, abs=1e-5)


def test_dice_and_lovasz_bounds():
    label = torch.tensor([[0, 1, 1, 2]])
    right = 40 * F.one_hot(label, 4).float()
    wrong = 40 * F.one_hot((label + 1) % 4, 4).float()
    for loss in (soft_dice_loss, lovasz_softmax_loss):
        assert loss(right, label).item() == pytest.approx(0, abs=1e-6)
        assert loss(wrong, label).item() == pytest.approx(1, abs=1e-6)


# -- Lovasz ---------------------------------------------------------------------------------------------------------


def jaccard_loss(wrong: set, truth: set) -> float:
    """Berman et al. 2018, eq. 4 and 6: the Jaccard loss of one class as a function of its wrong elements."""
    return len(wrong) / len(truth | wrong) if truth | wrong else 0.0


def lovasz_by_definition(logits, label):
    """Eq. 8 and 9 word for word, with sets: sort the errors, weigh each by the growth of the loss of the sets."""
    values = []
    for c in sorted(set(label.tolist())):
        truth = {i for i, y in enumerate(label.tolist()) if y == c}
        prob = logits.softmax(-1)[:, c].tolist()
        error = [1 - p if i in truth else p for i, p in enumerate(prob)]
        wrong, value = set(), 0.0
        for i in sorted(range(len(error)), key=lambda i: -error[i]):
            value += error[i] * (jaccard_loss(wrong | {i}, truth) - jaccard_loss(wrong, truth))
            wrong |= {i}
        values.append(value)
    return sum(values) / len(values)


def test_lovasz_equals_its_definition():
    for seed in range(3):
        logits, label, _ = mesh_batch(seed, torch.float64)
        logits, label = logits.flatten(0, 2), label.flatten().clamp(0, 2)            # class 3 is absent
        loss = lovasz_softmax_loss(logits, label)
        assert loss.item() == pytest.approx(lovasz_by_definition(logits, label), rel=1e-12)


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    label, pred = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    iou = [2 / 3, 1 / 3, 1 / 2]
    loss = lovasz_softmax_loss(60 * F.one_hot(pred, 3).float(), label)
    assert loss.item() == pytest.approx(1 - sum(iou) / 3, abs=1e-6)


def test_lovasz_slope_keeps_its_digits():
    """Differences of Jaccard losses would be off by tens of per cent here; in closed form float32 is good to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(300_000, generator=generator)
    truth = torch.rand(300_000, generator=generator) < 0.3
    slope = _lovasz_slope(error, truth).double()
    torch.testing.assert_close(slope, _lovasz_slope(error.double(), truth), rtol=1e-6, atol=0)
    assert slope.sum().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("case", ["twenty_classes", "two_hundred_classes", "nothing_ignored", "one_class_present",
                                  "confident_and_right", "one_point", "four_points_by_hand"])
def test_lovasz_and_cross_entropy_equal_pointcept(case):
    golden = torch.load(GOLDEN, weights_only=True)
    logits, label, expected = *golden["input"][case].values(), golden["output"][case]
    logits.requires_grad_()
    lovasz = lovasz_softmax_loss(logits, label, ignore_index=-1)
    gradient, = torch.autograd.grad(lovasz, logits)
    torch.testing.assert_close(lovasz, expected["lovasz"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected["grad_lovasz"], rtol=0, atol=1e-7)
    cross_entropy = ce(logits, label, ignore_index=-1)
    total = cross_entropy + lovasz_softmax_loss(logits, label, ignore_index=-1)
    torch.testing.assert_close(cross_entropy, expected["cross_entropy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected["total"], rtol=1e-5, atol=1e-6)
    if "grad_total" in expected:
        torch.testing.assert_close(torch.autograd.grad(total, logits)[0], expected["grad_total"], rtol=0, atol=1e-6)


# -- weighted sum ---------------------------------------------------------------------------------------------------


def test_weighted_loss_has_the_terms_above_zero_with_their_settings():
    logits, label, mask = mesh_batch()
    loss = WeightedLoss({"ce": 1, "dice": 0.5, "focal": 2.0, "lovasz": 0.0}, WEIGHTS, label_smoothing=0.1, gamma=1.0)
    assert loss.terms == {"ce": 1.0, "dice": 0.5, "focal": 2.0}
    assert torch.equal(loss.ce(logits, label, mask), smoothed(logits, label, mask))
    assert torch.equal(loss.focal(logits, label, mask), focal(logits, label, mask, gamma=1.0, class_weights=WEIGHTS))
    assert torch.equal(loss.label_weight(label, mask), loss.ce.label_weight(label, mask))


def test_weighted_loss_errors():
    with pytest.raises(ValueError, match=r"unknown loss 'dise', did you mean 'dice'\?"):
        WeightedLoss({"dise": 1.0})
    for factor in (-1.0, math.nan, math.inf, True, "1"):
        with pytest.raises(ValueError, match="weight of loss 'ce' must be a finite number >= 0"):
            WeightedLoss({"ce": factor})
    with pytest.raises(ValueError, match="no loss with a weight above 0"):
        WeightedLoss({"ce": 0.0})


def test_a_training_loop_checks_labels_before_they_go_to_the_gpu():
    """On a GPU a look at them would wait for it: label_weight looks on the loader's side, with the same words."""
    label = torch.tensor([[0, 7, IGNORE_INDEX]])
    with pytest.raises(ValueError) as late:
        MaskedCrossEntropyLoss()(torch.zeros(1, 3, 4), label)
    for criterion in (MaskedCrossEntropyLoss(num_classes=4), MaskedCrossEntropyLoss([1.0] * 4),
                      WeightedLoss({"dice": 1.0}, class_dim=1, num_classes=4)):
        with pytest.raises(ValueError) as early:
            criterion.label_weight(label)
        assert str(early.value) == str(late.value)
    check_labels(label.to("meta"), 4)                                # a device whose values nobody can see


# -- at the label's size, a strip at a time ----------------------------------------------------------------------------

RESIZED = [((2, 4, 3, 5), (37, 50), {}), ((1, 3, 8, 8), (32, 32), {"class_weights": WEIGHTS[:3]}), ((2, 4, 5, 1), (5, 1), {}),
           ((1, 4, 1, 1), (9, 7), {"class_weights": WEIGHTS, "label_smoothing": 0.1}), ((1, 2, 6, 9), (4, 5), {}),
           ((2, 4, 7, 6), (20, 30), {"gamma": 2.0})]


def to_resize(shape, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, generator=generator, dtype=dtype, requires_grad=True)
    label = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    label[0, :2] = IGNORE_INDEX
    return logits, label


@pytest.mark.parametrize("strip", [1, 200, 2**21])
@pytest.mark.parametrize("shape, size, settings", RESIZED)
def test_resized_sum(shape, size, settings, strip, monkeypatch):
    monkeypatch.setattr(losses, "elements_at_once", lambda device, gpu: strip)
    criterion = MaskedCrossEntropyLoss(class_dim=1, **settings)
    logits, label = to_resize(shape, size)
    value = criterion.resized_sum(logits, label)
    gradient, = torch.autograd.grad(3 * value, logits)
    expected, _ = criterion.sum_and_weight(F.interpolate(logits, size, mode="bilinear"), label)
    expected_gradient, = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)        # the blend is float32 in both
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(criterion.resized_sum(logits, label), value)


def test_resized_sum_is_float32_under_autocast():
    criterion = MaskedCrossEntropyLoss(class_dim=1)
    logits, label = to_resize((1, 4, 3, 3), (24, 24), torch.float32)
    expected = criterion.resized_sum(logits, label)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion.resized_sum(logits, label), expected)
    assert criterion.resized_sum(logits.bfloat16(), label).dtype == torch.float32


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_resized_sum_is_never_whole(monkeypatch):
    monkeypatch.setattr(losses, "elements_at_once", lambda device, gpu: 4 * 64 * 8)     # eight rows
    logits, label = to_resize((1, 4, 4, 4), (64, 64), torch.float32)
    with Largest() as largest:
        MaskedCrossEntropyLoss(class_dim=1).resized_sum(logits, label).backward()
    assert largest.elements == 4 * 64 * 8


def test_resized_sum_refuses():
    logits, label = to_resize((1, 4, 3, 3), (6, 6))
    with pytest.raises(ValueError, match="1 labels outside 0..3, values"):
        MaskedCrossEntropyLoss(class_dim=1).resized_sum(logits, label.index_put((torch.tensor([0]), torch.tensor([5]), torch.tensor([5])), torch.tensor(4)))
