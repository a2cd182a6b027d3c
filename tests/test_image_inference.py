"""Sliding window, strips, views and the score of a split against explicit loops and PyTorch's own resize."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from utils.image_inference import (
    View,
    evaluate_images,
    pad_to_multiple,
    resize_image,
    resize_rows,
    resized_shape,
    rows_of,
    segment_image,
    slide,
    window_starts,
)
from utils.losses import IGNORE_INDEX


def joined(blocks):
    return torch.cat([block.clone() for block in blocks], 1)


def as_float(image):
    return image.float()


def rgb_score(image):
    """Three classes: the channel that is largest."""
    return image


@pytest.mark.parametrize("length, window, stride", [(10, 4, 3), (11, 4, 4), (4, 4, 3), (3, 4, 3), (9, 4, 1), (100, 32, 31)])
def test_windows_cover_everything_and_stay_inside(length, window, stride):
    starts = window_starts(length, window, stride)
    seen = np.zeros(length, int)
    for start in starts:
        assert start >= 0 and (start + window <= length or starts == [0])
        seen[start:start + window] += 1
    assert (seen >= 1).all() and len(set(starts)) == len(starts)
    assert all(b - a <= stride for a, b in zip(starts[:-1], starts[1:], strict=True))


@pytest.mark.parametrize("length, expected", [(24, [0]), (17, [0]), (25, [0, 1]), (48, [0, 24]), (49, [0, 12, 25]), (76, [0, 17, 34, 52])])
def test_evenly_spread_windows_are_as_few_as_cover_the_image(length, expected):
    assert window_starts(length, 24, None) == expected
    scores = joined(slide(as_float, torch.rand(3, 24, length), 24, None))
    assert scores.shape == (3, 24, length) and scores.isfinite().all()                     # every pixel was seen


def test_slide_averages_overlaps():
    image = torch.rand(3, 11, 14)
    calls = []

    def score(part):                                           # adds the number of the call: windows must be averaged, not overwritten
        calls.append(part.shape)
        return part + len(calls)

    result = joined(slide(score, image, window=6, stride=4))
    total, count, number = torch.zeros(3, 11, 14), torch.zeros(11, 14), 0
    for y in (0, 4, 5):
        for x in (0, 4, 8):
            number += 1
            total[:, y:y + 6, x:x + 6] += image[:, y:y + 6, x:x + 6] + number
            count[y:y + 6, x:x + 6] += 1
    torch.testing.assert_close(result, total / count)
    assert len(calls) == 9 and count.min() == 1


@pytest.mark.parametrize("window", [None, 5, 8, 50])
def test_a_pointwise_network_does_not_see_the_windows(window):
    image = torch.rand(3, 13, 17)
    torch.testing.assert_close(joined(slide(rgb_score, image, window, 3, batch_size=4)), image)


def test_a_single_window_is_the_whole_image():
    image, calls = torch.rand(3, 12, 12), []
    joined(slide(lambda part: calls.append(part.shape) or part, image, 12, 8))
    assert calls == [(1, 3, 12, 12)]


@pytest.mark.parametrize("source, target", [((7, 9), (31, 20)), ((30, 20), (11, 13)), ((5, 5), (5, 5)), ((1, 4), (9, 3))])
def test_strips_equal_interpolate(source, target):
    scores = torch.randn(4, *source)
    expected = F.interpolate(scores[None], target, mode="bilinear")[0]
    rows = [resize_rows(scores, target, begin, min(begin + 3, target[0])) for begin in range(0, target[0], 3)]
    torch.testing.assert_close(torch.cat(rows, 1), expected, atol=1e-5, rtol=1e-5)          # torch computes the coordinates in float32


def test_resized_shape():
    assert resized_shape(360, 480, 180) == (180, 240)
    assert resized_shape(480, 360, None) == (480, 360)
    assert min(resized_shape(600, 1000, 896, 0.9)) == 832              # rounded up to a multiple of 32
    assert min(resized_shape(600, 1000, 896, 1.05)) == 940             # larger scales are not
    for height, width, expected in ((120, 160, (96, 128)), (768, 1024, (96, 128)), (100, 100, (128, 128)), (300, 200, (192, 128))):
        assert resized_shape(height, width, (96, 128)) == expected     # as training crops are cut out of it


def test_padding_is_at_the_right_and_bottom():
    image = torch.rand(1, 3, 33, 64)
    padded = pad_to_multiple(image, 32)
    assert padded.shape == (1, 3, 64, 64) and torch.equal(padded[..., :33, :], image) and not padded[..., 33:, :].any()


def test_segment_image_is_the_formula(monkeypatch):
    """Resize, score, resize the scores, softmax, mean of the views, argmax; in strips of a few rows."""
    image, label = torch.randint(0, 256, (3, 19, 26), dtype=torch.uint8), torch.randint(0, 3, (19, 26))
    label[:4] = IGNORE_INDEX
    view = View(size=32, window=None, stride=1, scales=(1.0, 1.25), flip=True)
    kernel = torch.randn(3, 3, 3, 3)

    def score(part):                                           # not symmetric: a mirrored view must be mirrored back
        return F.conv2d(part / 255, kernel, padding=1)

    monkeypatch.setattr("utils.image_inference.elements_at_once", lambda device, gpu: 3 * 26 * 4)
    result = segment_image(score, as_float, image, view, label=label)
    probability = 0
    for size in (32, 40):
        resized = F.interpolate(image[None].float(), (size, int(26 * size / 19)), mode="bilinear", antialias=True).round().clamp(0, 255)
        for flip in (False, True):
            scores = score(resized.flip(-1)).flip(-1) if flip else score(resized)
            probability = probability + F.interpolate(scores, (19, 26), mode="bilinear")[0].softmax(0) / 4
    assert (result["label"] == probability.argmax(0).numpy()).mean() > 0.99
    torch.testing.assert_close(torch.from_numpy(result["confidence"]), probability.max(0).values, atol=1e-5, rtol=1e-4)
    counted = label != IGNORE_INDEX
    nll = -probability.gather(0, label.clamp(min=0)[None])[0].log()[counted].sum()
    assert result["nll"] == pytest.approx(nll.item(), rel=1e-4)


def test_a_constant_network_gives_a_constant_map():
    image = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8)
    bias = torch.tensor([0.0, 2.0, 1.0])[None, :, None, None]
    result = segment_image(lambda part: bias.expand(len(part), 3, *part.shape[-2:]), as_float, image, View(32, 16, 7, (0.9, 1.0), True))
    assert (result["label"] == 1).all()
    torch.testing.assert_close(torch.from_numpy(result["confidence"]), bias.softmax(1)[0, 1].expand(37, 53), atol=1e-6, rtol=1e-5)


class Photos(Dataset):
    """Images of different sizes, labelled by their largest channel, with some mistakes and some pixels ignored."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for number, shape in enumerate([(9, 12), (10, 7), (16, 16)]):
            image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
            label = image.float().argmax(0)
            label[:number + 1] = 2
            label[-2:] = IGNORE_INDEX
            self.items.append({"image": image, "label": label, "index": number})
        self.files = [Path(f"photo_{number}.png") for number in range(3)]

    def is_large(self, index):
        return False

    def __len__(self):
        return len(self.items)

    def __getitem__(self, item):
        return self.items[item]


def test_a_split_is_one_confusion_matrix():
    photos = Photos()
    result = evaluate_images(rgb_score, as_float, photos, 3, View(None, 5, 4), torch.device("cpu"))
    label = torch.cat([item["label"].flatten() for item in photos.items])
    pred = torch.cat([item["image"].float().argmax(0).flatten() for item in photos.items])
    kept = label != IGNORE_INDEX
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (label[kept].numpy(), pred[kept].numpy()), 1)
    assert (result["matrix"] == expected).all() and result["matrix"].sum() == kept.sum()
    iou = np.diag(expected) / (expected.sum(0) + expected.sum(1) - np.diag(expected))
    assert result["metrics"]["miou"] == pytest.approx(iou.mean())
    assert [name for _, name, _ in result["examples"]] == ["photo_0", "photo_1", "photo_2"]
    assert (result["predictions"][1] == photos.items[1]["image"].float().argmax(0).numpy()).all()
    per_image = np.mean([score for _, _, score in result["examples"]])
    assert result["metrics"]["miou"] != pytest.approx(per_image, abs=1e-6)         # the mean over images is another number


def test_a_limit_counts_photographs():
    result = evaluate_images(rgb_score, as_float, Photos(), 3, View(None, None, 1), torch.device("cpu"), limit=2)
    assert len(result["examples"]) == 2


@pytest.mark.parametrize("stride", [0, -3, 17])
def test_a_stride_that_leaves_pixels_out_is_refused(stride):
    with pytest.raises(ValueError, match="stride from 1 to 16"):
        slide(rgb_score, torch.rand(3, 40, 60), 16, stride)


def test_only_the_best_and_worst_predictions_are_kept(monkeypatch):
    monkeypatch.setattr("utils.image_inference.KEPT", 1)
    photos = Photos()
    photos.items += [{**Photos().items[2], "index": 3}, {**Photos().items[0], "index": 4}]
    photos.items[3]["label"] = photos.items[3]["image"].float().argmax(0)              # faultless
    photos.items[4]["label"] = torch.full_like(photos.items[4]["label"], IGNORE_INDEX)  # without a score
    photos.files = [Path(f"photo_{number}.png") for number in range(5)]
    result = evaluate_images(rgb_score, as_float, photos, 3, View(None, 5, 4), torch.device("cpu"))
    scores = {index: score for index, _, score in result["examples"]}
    finite = [index for index in scores if np.isfinite(scores[index])]
    assert set(result["predictions"]) == {min(finite, key=scores.get), max(finite, key=scores.get)} and len(scores) == 5


@pytest.mark.parametrize("shape", [(30, 40), (16, 16), (60, 20)])
def test_photographs_smaller_than_the_window_are_seen_whole(shape):
    """A stride that suits the window is too long for them."""
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    result = segment_image(lambda part: part, as_float, image, View(None, 50, 45), 2)
    assert (result["label"] == image.float().argmax(0).numpy()).mean() > 0.99 and np.isfinite(result["confidence"]).all()


def test_a_photograph_resized_in_strips_has_no_column_of_its_own(monkeypatch):
    image = torch.randint(0, 256, (3, 70, 93), dtype=torch.uint8)
    whole = resize_image(rows_of(image), (64, 85)).read(0, 64)
    for limit in (1680, 4000, 8000):                                      # of some, one column would be left
        monkeypatch.setattr("utils.image_inference.RESIZE_BYTES", limit)
        assert torch.equal(resize_image(rows_of(image), (64, 85)).read(0, 64), whole)
