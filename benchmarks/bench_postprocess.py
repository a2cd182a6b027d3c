"""What post-processing does to the score: mIoU, accuracy and IoU of every class before and after each option.

    python benchmarks/bench_postprocess.py                                    # 6 made-up street scenes, a minute or two
    python benchmarks/bench_postprocess.py --data datasets/mine --split val --num-classes 11 --limit 20

The prediction is made from the labels: their shares in cells of --cell pixels, blown up bilinearly, which is what a
network with that stride would at best say; then the same with --noise of the pixels given a random class. This is not
a network's output: tune on predictions of your own before you believe a gain. Times are per image, on one CPU.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.image_splits import class_info, folder_pairs
from data.images import SegmentationDataset
from data.synthetic_images import IMAGE_CLASSES, make_image_set
from utils.cli import ArgumentParser
from utils.metrics import ConfusionMatrix, segmentation_metrics
from utils.postprocess import crf_refine, morphology

OPTIONS = {
    "opening 3": {"opening": 3}, "opening 5": {"opening": 5}, "mode 3": {"mode": 3}, "mode 5": {"mode": 5},
    "min_area 16": {"min_area": 16}, "min_area 64": {"min_area": 64}, "min_area 256": {"min_area": 256},
    "crf": {"crf": {}}, "crf, wide": {"crf": {"dilation": 2, "position_std": 6.0}},
    "crf, half size": {"crf": {"shrink": 2}}, "crf, smooth": {"crf": {"smoothness": 1.0}}}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of images/SPLIT and masks/SPLIT; default: made-up scenes, 480 x 360")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num-classes", type=int, default=len(IMAGE_CLASSES))
    parser.add_argument("--limit", type=int, default=6, help="images, evenly spaced")
    parser.add_argument("--cell", type=int, default=16, help="pixels")
    parser.add_argument("--noise", type=float, default=0.02, help="share of the pixels")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def degraded(label, num_classes, cell, noise, rng):
    """label (H, W) int64 -> probability (C, H, W) that sums to one."""
    one_hot = torch.stack([label == c for c in range(num_classes)]).float()[None]
    coarse = F.avg_pool2d(one_hot, cell, ceil_mode=True, count_include_pad=False) + 1e-3     # (1, C, h, w)
    size = [length * cell for length in coarse.shape[2:]]
    fine = F.interpolate(coarse, size, mode="bilinear")[0, :, :label.shape[0], :label.shape[1]]
    hit = torch.from_numpy(rng.random(label.shape) < noise)
    wrong = F.one_hot(torch.from_numpy(rng.integers(num_classes, size=label.shape)), num_classes).permute(2, 0, 1)
    return torch.where(hit, wrong * 0.9 + 0.1 / num_classes, fine / fine.sum(0))


def changed(probability, image, options):
    """Labels (H, W) after one entry of OPTIONS."""
    if "crf" in options:
        return crf_refine(probability, image, **options["crf"]).argmax(0)
    label = probability.argmax(0).numpy()
    return torch.from_numpy(morphology(label, len(probability), **options) if options else label)


def measure(dataset, num_classes, cell, noise, seed):
    """{option: (metrics, seconds per image)}."""
    options = {"none": {}, **OPTIONS}
    matrices, seconds = {name: ConfusionMatrix(num_classes) for name in options}, dict.fromkeys(options, 0.0)
    for index, item in enumerate(dataset):
        probability = degraded(item["label"], num_classes, cell, noise, np.random.default_rng([seed, index]))
        for name, chosen in options.items():
            start = time.perf_counter()
            label = changed(probability, item["image"], chosen)
            seconds[name] += (time.perf_counter() - start) / len(dataset)
            matrices[name].update(label, item["label"])
    return {name: (segmentation_metrics(matrices[name].matrix()), seconds[name]) for name in options}


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as scenes:
        if args.data is None:
            make_image_set(scenes, 0, 0, args.limit, args.seed, (480, 360))
        root = args.data or scenes
        pairs = folder_pairs(root, args.split if args.data else "test")
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(args.limit, len(pairs))).round().astype(int)]
        dataset = SegmentationDataset(pairs, 1, args.num_classes, views="whole")
        names = class_info(root, None, args.num_classes)[0]
        results = {}
        for noise in (0.0, args.noise):
            results[noise] = measure(dataset, args.num_classes, args.cell, noise, args.seed)
            print(f"\n{len(pairs)} images, cells of {args.cell} pixels, {100 * noise:g} % random pixels")
            print(f"{'':16}{'mIoU':>8}{'change':>8}{'accuracy':>10}{'ms':>7}   "
                  + "".join(f"{name[:9]:>10}" for name in names))
            before = results[noise]["none"][0]["miou"]
            for name, (metrics, seconds) in results[noise].items():
                print(f"{name:16}{100 * metrics['miou']:8.2f}{100 * (metrics['miou'] - before):+8.2f}"
                      f"{100 * metrics['overall_accuracy']:10.2f}{1000 * seconds:7.0f}   "
                      + "".join(f"{100 * value:10.1f}" for value in metrics["iou"]))
    return results


if __name__ == "__main__":
    main()
