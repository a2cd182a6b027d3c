"""Changes of a finished prediction for an image: morphology of the label map, refinement of the probabilities by a CRF.

Neither is right by itself: both take away thin things together with the noise, and a CRF can raise the pixel accuracy
while it lowers the mIoU. benchmarks/bench_postprocess.py shows the score before and after. H, W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from utils.checks import check_range

SQUARE = np.ones((3, 3), int)               # neighbours of a pixel, the diagonal ones too


def build_refine(settings: Mapping) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Both, as the section `postprocess` of a config says, as a function of probability (C, H, W) and image (3, H, W)
    uint8 -> label (H, W); None where nothing is to be done."""
    squares = {name: value for name, value in settings.items() if name != "crf"}
    crf = {name: value for name, value in settings["crf"].items() if name != "use"}
    use_crf = settings["crf"]["use"]
    if not use_crf and not any(squares[name] for name in ("opening", "closing", "mode", "min_area")):
        return None

    def refine(probability: Tensor, image: Tensor) -> Tensor:
        if use_crf:
            probability = crf_refine(probability, image, **crf)
        label = probability.argmax(0)                                                       # (H, W)
        return torch.from_numpy(morphology(label.cpu().numpy(), len(probability), **squares)).to(label.device)
    return refine


# -- morphology --------------------------------------------------------------------------------------------------------

def morphology(label: np.ndarray, num_classes: int, opening: int = 0, closing: int = 0,
               closing_order: Sequence[int] = (), mode: int = 0, min_area: int = 0) -> np.ndarray:
    """A label map without specks, in the order of the arguments; 0 leaves a step out. opening, closing and mode are the
    side of a square, odd; a pixel outside the image never speaks against a class.

    label (H, W) integer, 0..C-1 -> the same shape and type, a new array.
    opening: binary opening of every class; what it takes away goes to the nearest pixel that stays. closing: binary
    closing of the classes of closing_order, one after the other, each over whatever is there. mode: the most frequent
    class of the square, the pixel's own where it is one of several. min_area: components (8 neighbours) of fewer pixels
    go to the nearest other pixel. Where nothing would stay, nothing is changed.
    """
    label = np.array(label)
    for name, side in (("opening", opening), ("closing", closing), ("mode", mode)):
        if side != 0 and (side < 3 or side % 2 == 0):
            raise ValueError(f"{name}={side}: the side of a square in pixels, 3, 5, 7 ..., or 0 for none")
    if label.ndim != 2 or label.size == 0 or label.dtype.kind not in "iu":
        raise ValueError(f"label: expected (H, W) integers, got {label.dtype} of shape {label.shape}")
    if not 0 <= label.min() <= label.max() < num_classes:
        raise ValueError(f"label: expected 0 to {num_classes - 1}, got {label.min()} to {label.max()}; a prediction "
                         f"has nothing unlabelled")
    if closing and not len(closing_order):
        raise ValueError("closing needs closing_order: the classes that may grow over others, first to last")
    if any(c not in range(num_classes) for c in closing_order):                  # names neither
        raise ValueError(f"closing_order={list(closing_order)}: expected classes, 0 to {num_classes - 1}")
    check_range("min_area", min_area, 0)
    if opening:
        label = _opened(label, opening)
    for c in closing_order if closing else ():
        grown = ndimage.maximum_filter((label == c).view(np.uint8), closing, mode="constant", cval=0)
        label[ndimage.minimum_filter(grown, closing, mode="constant", cval=1) == 1] = c
    if mode:
        label = _most_frequent(label, num_classes, mode)
    return _without_small(label, min_area) if min_area > 1 else label


def _opened(label, side):
    """All classes at once: where a whole square is of one class, that square stays."""
    core = ndimage.minimum_filter(label, side, mode="nearest") == ndimage.maximum_filter(label, side, mode="nearest")
    return _filled(label, ndimage.maximum_filter(core.view(np.uint8), side, mode="constant", cval=0) == 0)


def _filled(label, removed):
    """The removed pixels take the label of the nearest one that is not."""
    if not removed.any() or removed.all():
        return label
    nearest = ndimage.distance_transform_edt(removed, return_distances=False, return_indices=True)
    return label[tuple(nearest)]


def _most_frequent(label, num_classes, side):
    own, most, winner = np.zeros(label.shape, np.int32), np.zeros(label.shape, np.int32), label.copy()
    for c in np.flatnonzero(np.bincount(label.ravel(), minlength=num_classes)):
        count = (label == c).astype(np.int32)
        for axis in (0, 1):
            count = ndimage.correlate1d(count, np.ones(side), axis, mode="constant")
        own[label == c] = count[label == c]
        better = count > most
        winner[better], most[better] = c, count[better]
    return np.where(own == most, label, winner)


def _without_small(label, min_area):
    removed = np.zeros(label.shape, bool)
    for c, box in enumerate(ndimage.find_objects(label.astype(np.int64) + 1)):
        if box is not None:
            components, _ = ndimage.label(label[box] == c, SQUARE)
            small = np.bincount(components.ravel()) < min_area
            small[0] = False                                # whatever is of other classes
            removed[box] |= small[components]
    return _filled(label, removed)


# -- CRF ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def crf_refine(probability: Tensor, image: Tensor, appearance: float = 3.0, smoothness: float = 0.0,
               color_std: float = 10.0, position_std: float = 3.0, radius: int = 3, dilation: int = 1,
               iterations: int = 5, shrink: int = 1) -> Tensor:
    """Probabilities that follow the edges of the image: mean field of the dense CRF of Krahenbuhl and Koltun (2011)
    with Potts' compatibility, within a square window (Teichmann and Cipolla 2018).

    probability (C, H, W), image (3, H, W) uint8 RGB -> (C, H, W) float32 on the device of probability, summing to one.
    appearance, smoothness: weight of the kernel over place and colour, and of that over place alone, which costs thin
    things most and is off by default; 0 and 0 change nothing. color_std: of the image's 256 steps; position_std:
    pixels, of both kernels. The window reaches radius * dilation pixels to each side, in steps of dilation. shrink: the
    neighbours' opinion is found at 1 / shrink of the size, with these numbers in pixels of the smaller image, and added
    at full size. Kernels are normalised symmetrically by their sums over the window; the pixel itself is not in it.
    Memory: 2 * radius * (radius + 1) maps of the size of one class. ValueError for shapes and settings that cannot be.
    """
    if probability.ndim != 3 or image.shape != (3, *probability.shape[1:]) or image.dtype != torch.uint8:
        raise ValueError(f"expected probability (C, H, W) and image (3, H, W) uint8, got {tuple(probability.shape)} "
                         f"and {tuple(image.shape)} {image.dtype}")
    for name, value in (("appearance", appearance), ("smoothness", smoothness)):
        check_range(f"crf.{name}", value, 0)
    for name, value in (("color_std", color_std), ("position_std", position_std)):
        check_range(f"crf.{name}", value, 1e-3)
    for name, value in (("radius", radius), ("dilation", dilation), ("iterations", iterations), ("shrink", shrink)):
        check_range(f"crf.{name}", value, 1)
    unary = probability.float().clamp_min(1e-20).log()
    small, colors = unary, image.to(unary.device).float()
    if shrink > 1:
        size = [max(1, round(length / shrink)) for length in image.shape[1:]]
        small = F.interpolate(probability.float()[None], size, mode="area")[0].clamp_min(1e-20).log()     # (C, h, w)
        colors = F.interpolate(colors[None], size, mode="area")[0]                                         # (3, h, w)
    kernels = _kernels(colors, appearance, smoothness, color_std, position_std, radius, dilation)
    message = torch.zeros_like(small)
    for _ in range(iterations):
        believed = torch.softmax(small + message, 0)
        message.zero_()
        for here, there, kernel in kernels:
            message[here].addcmul_(kernel, believed[there])
            message[there].addcmul_(kernel, believed[here])
    if shrink > 1:
        message = F.interpolate(message[None], unary.shape[1:], mode="bilinear")[0]
    return torch.softmax(unary + message, 0)


def _kernels(colors, appearance, smoothness, color_std, position_std, radius, dilation):
    """[(index of one pixel of each pair, index of the other, their kernel (h', w'))], one for each half of the window:
    a pair of pixels has one kernel in both directions."""
    height, width = colors.shape[1:]
    reach = [step * dilation for step in range(-radius, radius + 1)]
    pairs = []
    for y, x in ((y, x) for y in reach for x in reach if (y, x) > (0, 0) and y < height and abs(x) < width):
        rows = slice(0, height - y), slice(y, height)
        columns = slice(max(0, -x), width - max(0, x)), slice(max(0, x), width - max(0, -x))
        here, there = (..., rows[0], columns[0]), (..., rows[1], columns[1])
        place = torch.tensor(-(y * y + x * x) / (2 * position_std ** 2), device=colors.device)
        color = (colors[here] - colors[there]).square().sum(0) / (2 * color_std ** 2)                    # (h', w')
        pairs.append((here, there, (place - color).exp(), place.exp()))
    total = torch.full((2, height, width), 1e-12, device=colors.device)        # sum of each kernel over a window
    for here, there, *both in pairs:
        for own, kernel in zip(total, both, strict=True):
            own[here] += kernel
            own[there] += kernel
    total = total.rsqrt_()
    for here, there, near, place in pairs:
        near.mul_(appearance * total[0][here]).mul_(total[0][there])
        near.add_(smoothness * place * total[1][here] * total[1][there])
    return [pair[:3] for pair in pairs]
