"""Morphology of label maps and the CRF against plain loops and cases by hand."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks import bench_postprocess
from tests.tiny_images import tiny_picture
from utils.losses import IGNORE_INDEX
from utils.postprocess import crf_refine, morphology


def blobs(seed, num_classes=4, size=(40, 50)):
    """Patches of a few pixels with single wrong pixels in them."""
    rng = np.random.default_rng(seed)
    label = ndimage.zoom(rng.integers(num_classes, size=(8, 10)), (5, 5), order=0)[:size[0], :size[1]]
    return np.where(rng.random(label.shape) < 0.05, rng.integers(num_classes, size=label.shape), label)


# --- morphology --------------------------------------------------------------------------------------------------

def test_no_step_is_a_copy():
    label = blobs(0).astype(np.uint8)
    same = morphology(label, 4)
    assert same is not label and same.dtype == np.uint8 and (same == label).all()
    before = label.copy()
    assert morphology(label, 4, 3, 3, [1], 3, 9).dtype == np.uint8 and (label == before).all()


@pytest.mark.parametrize("side", [3, 5])
def test_opening_is_that_of_every_class(side):
    """SciPy's, class by class; only what no opening keeps may change, to the label of a nearest pixel that is kept."""
    label, square = blobs(1), np.ones((side, side))
    kept = np.zeros(label.shape, bool)
    for c in range(4):
        core = ndimage.binary_erosion(label == c, square, border_value=1)
        kept |= ndimage.binary_dilation(core, square)
    opened = morphology(label, 4, opening=side)
    assert 0.2 < kept.mean() < 0.95 and (opened[kept] == label[kept]).all()
    places = np.argwhere(kept)
    for y, x in np.argwhere(~kept)[::7]:
        distance = ((places - (y, x)) ** 2).sum(1)
        assert opened[y, x] in label[tuple(places[distance == distance.min()].T)]


def test_opening_by_hand():
    label = np.zeros((12, 12), np.int64)
    label[:3, :3] = 1                                       # a square in the corner fits
    label[6:9, 5:8] = 2
    label[0, 8] = label[11, 11] = label[5, 11] = 3          # specks, also on the border
    label[9:11, 1:9] = 1                                    # two pixels thin
    opened = morphology(label, 4, opening=3)
    assert (opened[:3, :3] == 1).all() and (opened == 1).sum() == 9 and (opened == 2).sum() >= 9 and not (opened == 3).any()
    checkers = np.indices((6, 6)).sum(0) % 2
    assert (morphology(checkers, 2, opening=3) == checkers).all()                         # nothing stays: nothing is changed


def test_closing_in_order():
    label = np.zeros((9, 15), np.int64)
    label[3:6, 2:5] = label[3:6, 6:9] = 1                   # a gap of one pixel
    label[3:6, 10:13] = 2
    closed = morphology(label, 3, closing=3, closing_order=[1])
    assert (closed[3:6, 5] == 1).all() and (closed != label).sum() == 3
    assert (morphology(label, 3, closing=3, closing_order=[2]) == label).all()
    stripes = np.tile([0, 0, 1, 2, 1, 2, 0, 0], (6, 1))     # each could fill the gap of the other
    first, second = (morphology(stripes, 3, closing=3, closing_order=order) for order in ([1, 2], [2, 1]))
    assert (first == [0, 0, 1, 1, 1, 2, 0, 0]).all() and (second == [0, 0, 1, 2, 2, 2, 0, 0]).all()
    plain = np.random.default_rng(0).random((30, 40)) < 0.4
    padded = ndimage.binary_closing(np.pad(plain, 4), np.ones((3, 3)))[4:-4, 4:-4]
    inner = morphology(plain.astype(np.int64), 2, closing=3, closing_order=[1]) == 1
    assert (inner[1:-1, 1:-1] == padded[1:-1, 1:-1]).all() and (inner >= plain).all()


@pytest.mark.parametrize("side", [3, 5])
def test_mode_of_a_square(side):
    label, reach = blobs(2, size=(20, 23)), side // 2
    wanted = np.empty_like(label)
    for y, x in np.ndindex(label.shape):
        counts = np.bincount(label[max(0, y - reach):y + reach + 1, max(0, x - reach):x + reach + 1].ravel(), minlength=4)
        wanted[y, x] = label[y, x] if counts[label[y, x]] == counts.max() else counts.argmax()
    assert (morphology(label, 4, mode=side) == wanted).all() and (wanted != label).any()


def test_small_components():
    label = np.zeros((10, 12), np.int64)
    label[2, 2] = label[3, 3] = label[4, 4] = 1             # one component of three, over the corners
    label[7, 7:9] = 2
    label[0, 8:] = 3
    assert (morphology(label, 4, min_area=3) == np.where(label == 2, 0, label)).all()
    assert (np.unique(morphology(label, 4, min_area=4)) == [0, 3]).all()
    assert (morphology(label, 4, min_area=200) == label).all()                            # nothing stays: nothing is changed
    halves = np.repeat([[0] * 4 + [1] * 8], 10, 0)
    halves[5, 1] = halves[5, 10] = 2
    assert (morphology(halves, 3, min_area=2) == np.repeat([[0] * 4 + [1] * 8], 10, 0)).all()   # each to its surroundings


def test_steps_follow_one_another():
    label, one_by_one = blobs(3), blobs(3)
    steps = [{"opening": 3}, {"closing": 5, "closing_order": (2, 0)}, {"mode": 5}, {"min_area": 20}]
    for step in steps:
        changed = morphology(one_by_one, 4, **step)
        assert (changed != one_by_one).any()
        one_by_one = changed
    assert (morphology(label, 4, **{name: value for step in steps for name, value in step.items()}) == one_by_one).all()


@pytest.mark.parametrize("label, more, message", [
    (np.zeros((4, 4), int), {"opening": 4}, "opening=4: the side of a square"), (np.zeros((4, 4), int), {"mode": 1}, "mode=1"),
    (np.zeros((4, 4), int), {"closing": 3}, "needs closing_order"), (np.zeros((4, 4), int), {"closing": 3, "closing_order": [3]}, "expected classes, 0 to 2"),
    (np.zeros((4, 4), int), {"closing": 3, "closing_order": ["road"]}, "expected classes, 0 to 2"),
    (np.zeros((4, 4), int), {"min_area": -1}, "min_area"), (np.full((4, 4), IGNORE_INDEX), {}, "expected 0 to 2, got -100"),
    (np.full((4, 4), 3), {}, "expected 0 to 2, got 3"), (np.zeros((4, 4)), {}, "expected .H, W. integers"), (np.zeros(4, int), {}, "shape")])
def test_wrong_morphology(label, more, message):
    with pytest.raises(ValueError, match=message):
        morphology(label, 3, **more)


# --- CRF ---------------------------------------------------------------------------------------------------------

def random_case(height, width, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.softmax(2 * torch.randn(num_classes, height, width, generator=generator), 0),
            torch.randint(100, 130, (3, height, width), generator=generator).to(torch.uint8))


def mean_field(probability, image, appearance, smoothness, color_std, position_std, radius, dilation, iterations):
    """Krahenbuhl and Koltun's update for one pair of pixels after the other."""
    p, colors = probability.double().numpy(), image.numpy().astype(float)
    places = list(np.ndindex(p.shape[1:]))
    kernels = np.zeros((2, len(places), len(places)))
    for a, (y, x) in enumerate(places):
        for b, (v, u) in enumerate(places):
            if a != b and all(step % dilation == 0 and abs(step) <= radius * dilation for step in (y - v, x - u)):
                place = np.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * position_std ** 2))
                kernels[:, a, b] = place * np.exp(-((colors[:, y, x] - colors[:, v, u]) ** 2).sum() / (2 * color_std ** 2)), place
    total = np.sqrt(np.maximum(kernels.sum(2), 1e-12))
    kernel = sum(weight * k / t[:, None] / t[None] for weight, k, t in zip((appearance, smoothness), kernels, total, strict=True))
    believed = p.reshape(len(p), -1)
    for _ in range(iterations):
        scores = np.log(p.reshape(len(p), -1)) + believed @ kernel
        believed = np.exp(scores) / np.exp(scores).sum(0)
    return believed.reshape(p.shape)


@pytest.mark.parametrize("arguments", [(2.0, 0.0, 12.0, 1.5, 1, 1, 1), (2.0, 1.5, 12.0, 1.5, 2, 1, 3), (0.0, 1.0, 5.0, 3.0, 1, 2, 2), (4.0, 1.0, 20.0, 2.0, 3, 2, 2)])
def test_mean_field_pair_by_pair(arguments):
    probability, image = random_case(5, 7)
    refined = crf_refine(probability, image, *arguments)
    np.testing.assert_allclose(refined.numpy(), mean_field(probability, image, *arguments), atol=1e-5)
    assert (refined - probability).abs().max() > 0.1


def test_no_weight_is_the_identity():
    probability, image = random_case(20, 30)
    torch.testing.assert_close(crf_refine(probability, image, 0.0, 0.0), probability)
    torch.testing.assert_close(crf_refine(probability, image, 0.0, 0.0, shrink=2), probability)


def test_a_uniform_image_is_only_smoothed():
    probability, image = random_case(20, 30)
    image[:] = 90
    torch.testing.assert_close(crf_refine(probability, image, 2.0, 0.0), crf_refine(probability, image, 0.0, 2.0))
    doubtful = probability ** 0.2 / (probability ** 0.2).sum(0)
    before, after = (p.argmax(0) for p in (doubtful, crf_refine(doubtful, image, 4.0)))
    assert (after[:, 1:] != after[:, :-1]).sum() < 0.5 * (before[:, 1:] != before[:, :-1]).sum()


@pytest.mark.parametrize("shrink", [1, 2])
def test_labels_snap_to_the_edge_of_two_colours(shrink):
    """The edge of the prediction is 2 pixels off, and a quarter of the pixels is doubtful: with colours both are mended."""
    generator = torch.Generator().manual_seed(1)
    truth = (torch.arange(40) >= 22).long().expand(30, 40)
    image = torch.where(truth == 1, 150, 100).to(torch.uint8).expand(3, 30, 40)
    said = torch.where(torch.arange(40) >= 20, 0.7, 0.3).expand(30, 40)
    said = torch.where(torch.rand(30, 40, generator=generator) < 0.25, 1 - said, said)
    probability = torch.stack([1 - said, said])
    refined = crf_refine(probability, image, appearance=6.0, shrink=shrink).argmax(0)
    blind = crf_refine(probability, image, appearance=0.0, smoothness=6.0, shrink=shrink).argmax(0)
    assert (probability.argmax(0) != truth).float().mean() > 0.25
    assert (refined != truth).float().mean() < 0.01 < 0.03 < (blind != truth).float().mean()


@pytest.mark.parametrize("height, width, shrink", [(1, 1, 1), (1, 9, 1), (2, 3, 1), (3, 2, 2), (1, 1, 3), (33, 47, 2), (17, 5, 4)])
def test_any_size_gives_probabilities(height, width, shrink):
    probability, image = random_case(height, width, 5)
    refined = crf_refine(probability.half(), image, smoothness=1.0, dilation=2, shrink=shrink)
    assert refined.shape == probability.shape and refined.dtype == torch.float32
    torch.testing.assert_close(refined.sum(0), torch.ones(height, width))


def test_certain_pixels_and_lone_colours_stay_finite():
    probability = torch.nn.functional.one_hot(torch.arange(48).view(6, 8) % 3, 3).permute(2, 0, 1).float()
    image = (torch.arange(48).view(6, 8) * 5).to(torch.uint8).expand(3, 6, 8)
    refined = crf_refine(probability, image, color_std=0.01)                              # no neighbour is like any pixel
    torch.testing.assert_close(refined, probability)
    assert crf_refine(probability, image, appearance=50.0).isfinite().all()


@pytest.mark.parametrize("probability, image, more, message", [
    ((3, 4, 5), (3, 4, 6), {}, "image .3, H, W. uint8"), ((1, 3, 4, 5), (3, 4, 5), {}, "probability .C, H, W."),
    ((3, 4, 5), (3, 4, 5), {"appearance": -1}, "crf.appearance"), ((3, 4, 5), (3, 4, 5), {"color_std": 0}, "crf.color_std"),
    ((3, 4, 5), (3, 4, 5), {"shrink": 0}, "crf.shrink"), ((3, 4, 5), (3, 4, 5), {"iterations": 0}, "crf.iterations")])
def test_wrong_settings(probability, image, more, message):
    with pytest.raises(ValueError, match=message):
        crf_refine(torch.rand(probability), torch.zeros(image, dtype=torch.uint8), **more)
    with pytest.raises(ValueError, match="uint8"):
        crf_refine(torch.rand(3, 4, 5), torch.zeros(3, 4, 5))


# --- the benchmark -----------------------------------------------------------------------------------------------

def test_the_benchmark_scores_before_and_after():
    items = []
    for seed in range(2):
        image, label = tiny_picture(seed)
        label = np.where(label == 255, IGNORE_INDEX, label.astype(np.int64))
        items.append({"image": torch.from_numpy(image).permute(2, 0, 1), "label": torch.from_numpy(label)})
    probability = bench_postprocess.degraded(items[0]["label"], 3, 8, 0.1, np.random.default_rng(0))
    torch.testing.assert_close(probability.sum(0), torch.ones(64, 64))
    scores = {name: metrics["miou"] for name, (metrics, _) in bench_postprocess.measure(items, 3, 8, 0.1, 0).items()}
    assert 0.5 < scores["none"] < scores["mode 3"] < 1 and scores["none"] < scores["min_area 16"] and set(scores) > set(bench_postprocess.OPTIONS)
