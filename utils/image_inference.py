"""Segment photographs of any size with a network that takes crops: sliding window, several scales, flips; and score a
split that way.

A network is given as `score(image)`: normalised float32 (B, 3, h, w) of any size -> scores (B, C, h, w), larger is
more likely (logits, or Mask2Former's sums). One photograph goes through in the order of the DINOv3 evaluation (Simeoni
et al. 2025, section 6.3.2): resize it, run the windows, average the scores where they overlap, resize the *scores* to
the photograph's own size, softmax over the classes, average the views (scales, flips), take the largest. Labels are
never resized.

Nothing but labels and confidences has the size of the photograph: windows go through row by row, their scores add up in
a strip as high as a window, and finished rows become labels. Shapes: C classes, H, W of the photograph, h, w of a view,
K bands.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from utils.bilinear import resize_weights, source_rows
from utils.distributed import all_reduce_sum, own_share
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix, miou_of_each, segmentation_metrics
from utils.parts import elements_at_once
from utils.scratch import release, scratch_array
from utils.seed import seed_worker

TTA_SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)      # each also mirrored: the ten views of DINOv3's ADE20K evaluation
KEPT = 32                                     # best and worst images whose predictions are kept, for a report
KEPT_PIXELS = 1 << 28                         # of them together
Refine = Callable[[Tensor, Tensor], Tensor]   # probability (C, H, W), image (3, H, W) uint8 -> label (H, W) int64
RESIZE_BYTES = 1 << 28                        # of float32 pixels that are resized at once


class View(NamedTuple):
    """How a photograph is shown to the network.

    size: its short side is resized to that, or all of it until it covers (height, width), None leaves it; window and
    stride of the sliding window in pixels, window None: the whole image at once, stride None: as few windows as cover
    the image, evenly spread; scales multiply size; flip adds the mirrored image of each scale.
    """

    size: int | tuple[int, int] | None
    window: int | None
    stride: int | None
    scales: Sequence[float] = (1.0,)
    flip: bool = False


# -- geometry ----------------------------------------------------------------------------------------------------------

def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(B, 3, H, W) -> the same with zeros (the mean colour, once normalised) at the right and bottom, up to the next
    multiples. What comes out for it is cropped to [:H, :W]: nothing is resized, nothing shifted. Rounded up without a
    negative number, which ONNX divides in another way."""
    height, width = image.shape[-2:]
    right, bottom = ((side + multiple - 1) // multiple * multiple - side for side in (width, height))
    return F.pad(image, (0, right, 0, bottom))


def window_starts(length: int, window: int, stride: int | None) -> list[int]:
    """First pixels of windows that cover 0..length-1: every `stride`, the last one moved back inside; None: as few
    windows as there can be, evenly spread (EoMT, PMT)."""
    if window >= length:
        return [0]
    if stride is None:
        gaps = -(-length // window) - 1
        return [j * (length - window) // gaps for j in range(gaps + 1)]
    return [*range(0, length - window, stride), length - window]


def resized_shape(height: int, width: int, size: int | tuple[int, int] | None, scale: float = 1.0) -> tuple[int, int]:
    """(height, width) with the short side at size * scale, in its proportions; a shrunken side is rounded up to a
    multiple of 32, as the official evaluation does. size (h, w): as large as it just covers h x w, and that * scale."""
    short = min(height, width)
    if isinstance(size, tuple):
        size = round(short * max(size[0] / height, size[1] / width))
    wanted = (size or short) * scale
    wanted = math.ceil(wanted / 32) * 32 if scale < 1 else int(wanted)
    return max(1, int(height * wanted / short)), max(1, int(width * wanted / short))


def resize_rows(scores: Tensor, shape: tuple[int, int], begin: int, end: int, first: int = 0,
                source_height: int | None = None) -> Tensor:
    """Rows begin..end-1 of F.interpolate(scores, shape, mode="bilinear"), without making the others.

    scores (C, h, w) float -> (C, end - begin, W). They may be rows first, first + 1, ... alone, of source_height ones.
    """
    source_height = scores.shape[1] if source_height is None else source_height
    if (source_height, scores.shape[2]) == tuple(shape):
        return scores[:, begin - first:end - first]
    top, blend = resize_weights(source_height, shape[0], begin, end)                        # (R, k)
    part = scores[:, top - first:top - first + blend.shape[1]]
    return blend.to(scores) @ F.interpolate(part, shape[1], mode="linear")                  # (C, R, W)


class Rows(NamedTuple):
    """Something (..., H, W) of which rows top..bottom-1 are read by read(top, bottom) -> (..., R, W)."""

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]


def rows_of(tensor: Tensor | Rows) -> Rows:
    if isinstance(tensor, Rows):
        return tensor
    return Rows(tuple(tensor.shape[-2:]), lambda top, bottom: tensor[..., top:bottom, :])


def resize_image(image: Rows, shape: tuple[int, int]) -> Rows:
    """A photograph (K, H, W) uint8 resized to shape (h, w), bilinearly with antialiasing, and rounded.

    What is larger than RESIZE_BYTES in float32 is resized along its rows in strips of rows, then along its columns in
    strips of columns, which is what PyTorch does on the CPU: no pixel is another.
    """
    height, width = image.shape
    if tuple(shape) == tuple(image.shape):
        return image
    bands = image.read(0, 1).shape[0]

    def resize(part, size):
        return F.interpolate(part, size, mode="bilinear", antialias=True)
    if 4 * bands * height * width <= RESIZE_BYTES:
        return rows_of(resize(image.read(0, height)[None].float(), shape).round_().clamp_(0, 255).byte()[0])
    resized = torch.from_numpy(scratch_array((bands, *shape), np.uint8))
    columns = max(2, RESIZE_BYTES // (8 * bands * height))
    while shape[1] % columns == 1 < shape[1]:               # PyTorch resizes a single column in another way
        columns += 1
    rows = max(1, RESIZE_BYTES // (8 * bands * max(width, shape[1])))
    for left in range(0, shape[1], columns):
        right, strips = min(left + columns, shape[1]), []
        for top in range(0, height, rows):
            strip = image.read(top, min(top + rows, height))[None].float()
            strips.append(resize(strip, (strip.shape[2], shape[1]))[..., left:right].clone())
        narrow = torch.cat(strips, 2)                                                   # (1, K, H, columns)
        del strips
        resized[:, :, left:right] = resize(narrow, (shape[0], right - left)).round_().clamp_(0, 255).byte()[0].cpu()
    device = narrow.device
    return Rows(tuple(shape), lambda top, bottom: resized[:, top:bottom].to(device))


def slide(score: Callable[[Tensor], Tensor], image: Tensor | Rows, window: int | None, stride: int | None,
          batch_size: int = 1, normalize: Callable[[Tensor], Tensor] | None = None,
          flip: bool = False) -> Iterator[Tensor]:
    """Scores of one image (K, H, W), the mean over all windows that see a pixel: yields blocks of finished rows
    (C, R, W) float32, from top to bottom. A block is good until the next one is asked for.

    Windows are window x window, or as large as the image where that is smaller; batch_size of them go through at once.
    normalize: (B, K, h, w) of the image -> what `score` takes; flip: the mirrored image is shown, and its scores turned
    back. ValueError for a stride that would leave pixels out.
    """
    if window is not None and stride is not None and not 1 <= stride <= window:
        raise ValueError(f"a sliding window of {window} pixels needs a stride from 1 to {window}, got {stride}")
    image = rows_of(image)
    height, width = image.shape
    tall, wide = min(window or height, height), min(window or width, width)
    places = [(top, left) for top in window_starts(height, tall, stride) for left in window_starts(width, wide, stride)]
    blocks = _slide(score, image, places, (tall, wide), batch_size, normalize or (lambda part: part), flip)
    return (block.flip(-1) for block in blocks) if flip else blocks


def _slide(score, image, places, window, batch_size, normalize, flip):
    """The blocks of `slide`, of the mirrored image where `flip` says so."""
    (tall, wide), (height, width) = window, image.shape
    if len(places) == 1:
        whole = normalize(image.read(0, height)[None])
        yield score(whole.flip(-1) if flip else whole)[0].float()
        return
    batches = [places[begin:begin + batch_size] for begin in range(0, len(places), batch_size)]
    depth = max(batch[-1][0] + tall - batch[0][0] for batch in batches)
    total = count = seen = None
    first = 0                                               # the row of the image that total and count begin with
    for batch, following in zip(batches, [*(batch[0][0] for batch in batches[1:]), height], strict=True):
        ends = batch[0][0], batch[-1][0] + tall
        if ends != seen:
            rows, seen = image.read(*ends), ends
            rows = rows.flip(-1) if flip else rows
        parts = torch.stack([rows[:, y - ends[0]:y - ends[0] + tall, x:x + wide] for y, x in batch])
        scores = score(normalize(parts).contiguous()).float()                           # (b, C, tall, wide)
        if total is None:
            total, count = scores.new_zeros(scores.shape[1], depth, width), scores.new_zeros(depth, width)
        for (y, x), one in zip(batch, scores, strict=True):
            total[:, y - first:y - first + tall, x:x + wide] += one
            count[y - first:y - first + tall, x:x + wide] += 1
        ready = following - first                           # rows that no later window sees
        if ready:
            yield total[:, :ready].div_(count[:ready])
            for values in (total, count):
                for row in range(0, depth - ready, ready):  # in pieces that do not overlap
                    last = min(row + ready, depth - ready)
                    values[..., row:last, :] = values[..., row + ready:last + ready, :]
                values[..., max(0, depth - ready):, :] = 0
            first = following


class _View:
    """The scores of one view, given as blocks of rows, at the photograph's own size."""

    def __init__(self, blocks: Iterator[Tensor], source: tuple[int, int], shape: tuple[int, int]) -> None:
        self.blocks, self.source, self.shape = blocks, source, shape
        self.kept: Tensor | None = None                     # source rows first..end-1
        self.first = self.end = 0
        self.upper, self.lower, _ = source_rows(source[0], shape[0])
        if source == shape:
            self.upper = self.lower = torch.arange(shape[0])

    def ready(self) -> int:
        """How many rows can be made of what is there."""
        return int(torch.searchsorted(self.lower, self.end))

    def advance(self, begin: int) -> None:
        """Take the next block; rows above `begin` are not needed any more."""
        needed = min(int(self.upper[begin]), self.end)
        rest = None if self.kept is None or needed == self.end else self.kept[:, needed - self.first:].clone()
        self.kept = None
        block = next(self.blocks)
        self.kept, self.first = (block, self.end) if rest is None else (torch.cat([rest, block], 1), needed)
        self.end += block.shape[1]

    def rows(self, begin: int, end: int) -> Tensor:
        return resize_rows(self.kept, self.shape, begin, end, self.first, self.source[0])


def build_normalizer(mean: Sequence[float], std: Sequence[float],
                     order: torch.memory_format = torch.contiguous_format,
                     bands: int = 3) -> Callable[[Tensor], Tensor]:
    """A function: image (B, bands, H, W) uint8 -> float32, (image / 255 - mean) / std, in this memory order. mean, std:
    one number a band; fewer are repeated."""
    mean, std = (torch.tensor(np.resize(values, bands).tolist())[:, None, None] for values in (mean, std))

    def normalize(image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=order)
        own_mean, own_std = (values.to(image.device, non_blocking=True) for values in (mean, std))
        return (image.float() / 255 - own_mean) / own_std
    return normalize


# -- one photograph ----------------------------------------------------------------------------------------------------

def probabilities(score: Callable[[Tensor], Tensor], normalize: Callable[[Tensor], Tensor], image: Rows, view: View,
                  batch_size: int = 1) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (begin, end, probability (C, end - begin, W) float32) of strips of a photograph from top to bottom, the
    mean over the views of the softmax. Under torch.no_grad()."""
    height, width = image.shape
    views = []
    for scale in view.scales:
        shape = resized_shape(height, width, view.size, scale)
        resized = resize_image(image, shape)
        window = min(shape) if view.window and max(shape) < view.window else view.window
        stride = view.stride if None in (view.stride, window) else min(view.stride, window)
        for flip in (False, True)[:1 + view.flip]:
            blocks = slide(score, resized, window, stride, batch_size, normalize, flip)
            views.append(_View(blocks, shape, (height, width)))
    begin = 0
    while begin < height:
        for one in views:
            while one.ready() <= begin:
                one.advance(begin)
        ready = min(one.ready() for one in views)
        kept = views[0].kept
        rows = max(1, elements_at_once(kept.device, 2**25) // (len(kept) * width))      # at most 128 MiB
        for start in range(begin, ready, rows):
            end = min(start + rows, ready)
            strips = [one.rows(start, end).softmax(0) for one in views]                         # (C, R, W) each
            yield start, end, strips[0] if len(strips) == 1 else torch.stack(strips).mean(0)
        begin = ready


@torch.no_grad()
def segment_image(score: Callable[[Tensor], Tensor], normalize: Callable[[Tensor], Tensor], image: Tensor | Rows,
                  view: View, batch_size: int = 1, label: Tensor | Rows | None = None, refine: Refine | None = None,
                  confusion: ConfusionMatrix | None = None) -> dict:
    """Label every pixel of a photograph (K, H, W) uint8, on the device where `score` computes.

    Returns label (H, W) uint8, or int16 of more than 256 classes, and confidence (H, W) float32, the mean over the
    views of the class's softmax, both NumPy arrays of utils.scratch; and with a true `label` (H, W) given, nll: the sum
    of -log of that mean at the true class, over the pixels that count; these are counted in `confusion`. With `refine`
    (post-processing of the whole probability map, which is then in memory) label is what it returns, confidence that
    label's, and unrefined (H, W) what there was before.
    """
    image = rows_of(image)
    truths = None if label is None else rows_of(label)
    labels, confidences, kept, nll = None, scratch_array(image.shape, np.float32), [], 0.0
    for begin, end, probability in probabilities(score, normalize, image, view, batch_size):
        if labels is None:
            labels = scratch_array(image.shape, np.uint8 if probability.shape[0] <= 256 else np.int16)
        confidence, pred = probability.max(0)
        labels[begin:end] = pred.cpu().numpy()
        confidences[begin:end] = confidence.cpu().numpy()
        if refine is not None:
            kept.append(probability.clone())
        if truths is not None:
            truth = truths.read(begin, end).to(pred.device)
            at_truth = probability.gather(0, truth.clamp(min=0)[None])[0]
            nll -= float(at_truth.clamp(min=1e-12).log()[truth != IGNORE_INDEX].cpu().double().sum())
            if confusion is not None:
                confusion.update(pred.cpu(), truth.cpu())
        release(labels, confidences)
    result = {"label": labels, "confidence": confidences, "nll": nll}
    if refine is not None:
        probability = torch.cat(kept, 1)                                                        # (C, H, W)
        refined = refine(probability, image.read(0, image.shape[0])[:3])
        result |= {"label": refined.cpu().numpy(), "unrefined": labels,
                   "confidence": probability.gather(0, refined[None])[0].cpu().numpy()}
    return result


# -- a split -----------------------------------------------------------------------------------------------------------

def segment_dataset(score, normalize, dataset, view: View, device: torch.device, batch_size: int = 1,
                    num_workers: int = 0, limit: int = 0, refine: Refine | None = None,
                    confusion: ConfusionMatrix | None = None) -> Iterator[tuple]:
    """Yield (index, true label as Rows (H, W) int64, result of segment_image) of this process's share of a data set of
    whole photographs; at most `limit` of them, 0 for all. Large ones (dataset.is_large) are read strip by strip."""
    mine = list(own_share(len(dataset)))
    mine = mine[:limit] if limit else mine
    large = [index for index in mine if dataset.is_large(index)]
    loader = DataLoader(Subset(dataset, [index for index in mine if index not in set(large)]), batch_size=None,
                        num_workers=num_workers, worker_init_fn=seed_worker, generator=torch.Generator())
    items = ((int(item["index"]), item["image"].to(device), rows_of(item["label"])) for item in loader)
    for index, image, label in progress(itertools.chain(items, _large_items(dataset, large, device)), "evaluating",
                                        len(mine)):
        yield index, label, segment_image(score, normalize, image, view, batch_size, label, refine, confusion)


def _large_items(dataset, indices, device):
    for index in indices:
        photo, labels = dataset.open_whole(index)
        yield index, photo_rows(photo, device), Rows(photo.size[::-1], partial(_as_tensor, labels))


def _as_tensor(labels, top, bottom):
    return torch.from_numpy(labels(top, bottom))


def photo_rows(photo, device: torch.device) -> Rows:
    """A photograph of data.photos.Photo as (K, H, W) uint8 on the device."""
    return Rows(photo.size[::-1], lambda top, bottom: torch.from_numpy(photo.rows(top, bottom)).permute(2, 0, 1).to(
        device))


def evaluate_images(score, normalize, dataset, num_classes: int, view: View, device: torch.device, batch_size: int = 1,
                    num_workers: int = 0, limit: int = 0, refine: Refine | None = None) -> dict:
    """Score every labelled pixel of a data set of whole photographs exactly once, at the photograph's own size.

    Returns metrics, tables (with `refine`, the metrics before it), loss (mean -log probability of the true class),
    matrix, examples [(index, name, mIoU)] of this process, predictions {index: (H, W) uint8 or int16} of its KEPT best
    and KEPT worst (fewer where they are large), and seconds.
    """
    started, C = time.monotonic(), num_classes
    counted, confusion, examples, predictions, nll, pixels = ConfusionMatrix(C), ConfusionMatrix(C), [], {}, 0.0, 0
    before = 0                                              # `counted` counts what segment_image labels, unrefined
    for index, label, result in segment_dataset(score, normalize, dataset, view, device, batch_size, num_workers, limit,
                                                refine, counted):
        if refine is not None:
            confusion.update(torch.from_numpy(result["label"]), label.read(0, label.shape[0]))
        after = (counted if refine is None else confusion).counts
        own = (after - before).numpy()
        before = after
        examples.append((index, dataset.files[index].stem, float(miou_of_each(own[None])[0])))
        predictions[index] = result["label"].astype(np.uint8 if C <= 256 else np.int16, copy=False)
        while len(predictions) > 2 * KEPT or (
                len(predictions) > 2 and sum(pred.size for pred in predictions.values()) > KEPT_PIXELS):
            ranked = sorted((score if score == score else -1, i) for i, _, score in examples if i in predictions)
            del predictions[ranked[0 if ranked[0][0] < 0 else len(ranked) // 2][1]]
        nll, pixels = nll + result["nll"], pixels + int(own.sum())
    unrefined, confusion = (None, counted) if refine is None else (counted, confusion)
    matrix = confusion.all_reduce().matrix()
    tables = {} if unrefined is None else \
        {"before post-processing": segmentation_metrics(unrefined.all_reduce().matrix())}
    return {"metrics": segmentation_metrics(matrix), "tables": tables,
            "loss": all_reduce_sum(nll) / max(all_reduce_sum(pixels), 1), "matrix": matrix, "examples": examples,
            "predictions": predictions, "seconds": time.monotonic() - started}
