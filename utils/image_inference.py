"""Segment photographs of any size with a network that takes crops: sliding window, several scales, flips; and score a
split that way.

A network is given as `score(image)`: normalised float32 (B, 3, h, w) of any size -> scores (B, C, h, w), larger is
more likely (logits, or Mask2Former's sums). One photograph goes through in the order of the DINOv3 evaluation (Simeoni
et al. 2025, section 6.3.2): resize it, run the windows, average the scores where they overlap, resize the *scores* to
the photograph's own size, softmax over the classes, average the views (scales, flips), take the largest. Labels are
never resized.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from utils.distributed import all_reduce_sum, own_share
from utils.log import progress
from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix, miou_of_each, segmentation_metrics
from utils.seed import seed_worker

TTA_SCALES = (0.9, 0.95, 1.0, 1.05, 1.1)      # each also mirrored: the ten views of DINOv3's ADE20K evaluation
KEPT = 32                                     # best and worst images whose predictions are kept, for a report
Refine = Callable[[Tensor, Tensor], Tensor]   # probability (C, H, W), image (3, H, W) uint8 -> label (H, W) int64
STRIP_ELEMENTS = 1 << 25                      # scores held at once at the photograph's own size: 128 MiB of float32


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
    multiples. What comes out for it is cropped to [:H, :W]: nothing is resized, nothing shifted."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


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


def resize_rows(scores: Tensor, shape: tuple[int, int], begin: int, end: int) -> Tensor:
    """Rows begin..end-1 of F.interpolate(scores, shape, mode="bilinear"), without making the others.

    scores (C, h, w) float -> (C, end - begin, W).
    """
    source_height = scores.shape[1]
    if tuple(scores.shape[1:]) == tuple(shape):
        return scores[:, begin:end]
    rows = torch.arange(begin, end, device=scores.device, dtype=torch.float32)
    rows = ((rows + 0.5) * (source_height / shape[0]) - 0.5).clamp(min=0)               # (R,) in source rows
    upper = rows.floor().long().clamp(max=source_height - 1)
    lower = (upper + 1).clamp(max=source_height - 1)
    first, last = int(upper[0]), int(lower[-1]) + 1
    part = F.interpolate(scores[None, :, first:last], (last - first, shape[1]), mode="bilinear")[0]   # (C, r, W)
    share = (rows - upper).to(scores.dtype)[:, None]
    return torch.lerp(part[:, upper - first], part[:, lower - first], share)


def slide(score: Callable[[Tensor], Tensor], image: Tensor, window: int | None, stride: int | None,
          batch_size: int = 1) -> Tensor:
    """Scores (C, H, W) float32 of one image (3, H, W): the mean over all windows that see a pixel.

    Windows are window x window, or as large as the image where that is smaller; batch_size of them go through at once.
    ValueError for a stride that would leave pixels out.
    """
    if window is not None and stride is not None and not 1 <= stride <= window:
        raise ValueError(f"a sliding window of {window} pixels needs a stride from 1 to {window}, got {stride}")
    height, width = image.shape[1:]
    tall, wide = min(window or height, height), min(window or width, width)
    places = [(top, left) for top in window_starts(height, tall, stride) for left in window_starts(width, wide, stride)]
    if len(places) == 1:
        return score(image[None])[0].float()
    total, count = None, image.new_zeros(height, width)
    for begin in range(0, len(places), batch_size):
        part = places[begin:begin + batch_size]
        scores = score(torch.stack([image[:, y:y + tall, x:x + wide] for y, x in part])).float()    # (b, C, h, w)
        if total is None:
            total = scores.new_zeros(scores.shape[1], height, width)
        for (y, x), one in zip(part, scores, strict=True):
            total[:, y:y + tall, x:x + wide] += one
            count[y:y + tall, x:x + wide] += 1
    return total / count


def build_normalizer(mean: Sequence[float], std: Sequence[float],
                     order: torch.memory_format = torch.contiguous_format) -> Callable[[Tensor], Tensor]:
    """A function: image (B, 3, H, W) uint8 -> float32, (image / 255 - mean) / std, in this memory order."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def normalize(image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=order)
        own_mean, own_std = (values.to(image.device, non_blocking=True) for values in (mean, std))
        return (image.float() / 255 - own_mean) / own_std
    return normalize


# -- one photograph ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def segment_image(score: Callable[[Tensor], Tensor], normalize: Callable[[Tensor], Tensor], image: Tensor, view: View,
                  batch_size: int = 1, label: Tensor | None = None, refine: Refine | None = None) -> dict:
    """Label every pixel of a photograph (3, H, W) uint8, on the device where `score` computes.

    Returns label (H, W) int64, confidence (H, W) float32, the mean over the views of the class's softmax, and with a
    true `label` (H, W) given, nll: the sum of -log of that mean at the true class, over the pixels that count. What
    has the photograph's own size is done in strips of rows; scores at the size of `view` are held whole. With `refine`
    (post-processing of the whole probability map) label is what it returns, confidence that label's, and
    unrefined (H, W) what there was before.
    """
    height, width = image.shape[1:]
    views = []
    for scale in view.scales:
        shape = resized_shape(height, width, view.size, scale)
        resized = image[None]
        if shape != (height, width):
            resized = F.interpolate(resized.float(), shape, mode="bilinear", antialias=True).round_().clamp_(0, 255)
        resized = normalize(resized.byte())[0]                                                  # (3, h, w) float32
        window = min(shape) if view.window and max(shape) < view.window else view.window
        views.append(slide(score, resized, window, view.stride, batch_size))
        if view.flip:
            views.append(slide(score, resized.flip(-1), window, view.stride, batch_size).flip(-1))
    rows = max(1, STRIP_ELEMENTS // (views[0].shape[0] * width))
    labels, confidences, probabilities, nll = [], [], [], 0.0
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        strips = [resize_rows(scores, (height, width), begin, end).softmax(0) for scores in views]      # (C, R, W) each
        probability = strips[0] if len(strips) == 1 else torch.stack(strips).mean(0)
        confidence, pred = probability.max(0)
        labels.append(pred)
        confidences.append(confidence)
        if refine is not None:
            probabilities.append(probability)
        if label is not None:
            truth = label[begin:end]
            at_truth = probability.gather(0, truth.clamp(min=0)[None])[0]
            nll -= float(at_truth.clamp(min=1e-12).log()[truth != IGNORE_INDEX].cpu().double().sum())
    result = {"label": torch.cat(labels), "confidence": torch.cat(confidences), "nll": nll}
    if refine is not None:
        probability = torch.cat(probabilities, 1)                                               # (C, H, W)
        label = refine(probability, image)
        result |= {"label": label, "unrefined": result["label"], "confidence": probability.gather(0, label[None])[0]}
    return result


# -- a split -----------------------------------------------------------------------------------------------------------

def segment_dataset(score, normalize, dataset, view: View, device: torch.device, batch_size: int = 1,
                    num_workers: int = 0, limit: int = 0, refine: Refine | None = None) -> Iterator[tuple]:
    """Yield (index, true label (H, W) int64, result of segment_image) of this process's share of a data set of whole
    photographs; at most `limit` of them, 0 for all."""
    mine = list(own_share(len(dataset)))
    loader = DataLoader(Subset(dataset, mine[:limit] if limit else mine), batch_size=None, num_workers=num_workers,
                        worker_init_fn=seed_worker, generator=torch.Generator())
    for item in progress(loader, "evaluating"):
        yield int(item["index"]), item["label"], segment_image(score, normalize, item["image"].to(device), view,
                                                               batch_size, item["label"].to(device), refine)


def evaluate_images(score, normalize, dataset, num_classes: int, view: View, device: torch.device, batch_size: int = 1,
                    num_workers: int = 0, limit: int = 0, refine: Refine | None = None) -> dict:
    """Score every labelled pixel of a data set of whole photographs exactly once, at the photograph's own size.

    Returns metrics, tables (with `refine`, the metrics before it), loss (mean -log probability of the true class),
    matrix, examples [(index, name, mIoU)] of this process, predictions {index: (H, W) uint8 or int16} of its KEPT best
    and KEPT worst, and seconds.
    """
    started, C = time.monotonic(), num_classes
    confusion, unrefined, examples, predictions, nll, pixels = ConfusionMatrix(C), ConfusionMatrix(C), [], {}, 0.0, 0
    for index, label, result in segment_dataset(score, normalize, dataset, view, device, batch_size, num_workers, limit,
                                                refine):
        pred = result["label"].cpu()
        if refine is not None:
            unrefined.update(result["unrefined"].cpu(), label)
        before = 0 if confusion.counts is None else confusion.counts
        confusion.update(pred, label)
        own = (confusion.counts - before).numpy()
        examples.append((index, dataset.files[index].stem, float(miou_of_each(own[None])[0])))
        predictions[index] = pred.numpy().astype(np.uint8 if C <= 256 else np.int16)
        if len(predictions) > 2 * KEPT:                     # a split of photographs is gigabytes of labels
            ranked = sorted((score if score == score else -1, i) for i, _, score in examples if i in predictions)
            del predictions[ranked[0 if ranked[0][0] < 0 else KEPT][1]]
        nll, pixels = nll + result["nll"], pixels + int(own.sum())
    matrix = confusion.all_reduce().matrix()
    tables = {} if refine is None else \
        {"before post-processing": segmentation_metrics(unrefined.all_reduce().matrix())}
    return {"metrics": segmentation_metrics(matrix), "tables": tables,
            "loss": all_reduce_sum(nll) / max(all_reduce_sum(pixels), 1), "matrix": matrix, "examples": examples,
            "predictions": predictions, "seconds": time.monotonic() - started}
