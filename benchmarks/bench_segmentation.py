"""train_segmentation.py's data path and training step beside what its user would run instead, in one process.

    python benchmarks/bench_segmentation.py data      # crops a second, against Pillow alone in torchvision's manner
    python benchmarks/bench_segmentation.py step        # U-Net ResNet-34, against segmentation_models.pytorch
    python benchmarks/bench_segmentation.py step --bfloat16 --channels-last

step needs `pip install segmentation-models-pytorch` (and its torchvision); without it only our own row is printed.
Rounds take turns and the best counts. With one thread the CPU's times are CPU seconds, which other work disturbs less.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.images import Augmentation, SegmentationDataset  # noqa: E402
from models.resnet import ENCODERS  # noqa: E402
from models.unet import UNet  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import autocast, describe, pick_device  # noqa: E402

CLASSES = 11


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("data", "step"))
    parser.add_argument("--size", type=int, nargs=2, default=(360, 480), metavar=("H", "W"), help="of the photographs")
    parser.add_argument("--crop", type=int, default=352, help="side of a training crop")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", help="cpu, cuda; default: the best there is")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--channels-last", action="store_true", help="memory order of images and convolutions")
    return parser.parse_args(argv)


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 and not torch.cuda.is_initialized() else \
        time.perf_counter()


def write_photos(folder: Path, size, count=24) -> list[tuple[Path, Path]]:
    """Photographs with the detail of real ones (smoothed noise on large shapes), JPEG, and their masks."""
    rng, pairs = np.random.default_rng(0), []
    for index in range(count):
        blocks = Image.fromarray(rng.integers(0, CLASSES, (8, 10), dtype=np.uint8)).resize(size[::-1], Image.NEAREST)
        label = np.asarray(blocks)
        noise = Image.fromarray(rng.integers(0, 60, (size[0] // 2, size[1] // 2, 3), dtype=np.uint8)).resize(size[::-1])
        image = (label[..., None] * np.array([18, 15, 12]) + np.asarray(noise)).clip(0, 255).astype(np.uint8)
        pairs.append((folder / f"{index}.jpg", folder / f"{index}.png"))
        Image.fromarray(image).save(pairs[-1][0], quality=95)
        blocks.save(pairs[-1][1])
    return pairs


def reference_item(pair, crop: int, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """What a torchvision-style list of transforms does, with Pillow alone: decode whole, resize whole, crop, flip,
    brightness, contrast and saturation one by one, float tensor, normalise. Without hue, which costs it most."""
    image, mask = Image.open(pair[0]).convert("RGB"), Image.open(pair[1])
    scale = rng.uniform(0.5, 2.0) * crop / min(image.size)
    size = tuple(max(crop, round(length * scale)) for length in image.size)
    image, mask = image.resize(size, Image.BILINEAR), mask.resize(size, Image.NEAREST)
    left, top = (int(rng.integers(length - crop + 1)) for length in size)
    box = (left, top, left + crop, top + crop)
    image, mask = image.crop(box), mask.crop(box)
    if rng.random() < 0.5:
        image, mask = (part.transpose(Image.FLIP_LEFT_RIGHT) for part in (image, mask))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(rng.uniform(0.7, 1.3))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    values = (values - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None]
    return values, torch.from_numpy(np.array(mask)).long()


def data(args) -> dict:
    """Items a second of one process, everything from the file to a tensor."""
    settings = Augmentation((0.5, 2.0), cat_max_ratio=1.0, color="factors", brightness=0.3, contrast=0.3,
                            saturation=0.3, hue=0.05)
    best = {"ours": float("inf"), "reference": float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_photos(Path(folder), args.size)
        dataset = SegmentationDataset(pairs, args.crop, CLASSES, settings)
        rng = np.random.default_rng(0)
        for repeat in range(args.repeats):
            for name in best:
                dataset.set_epoch(repeat)
                begin = clock()
                for index, pair in enumerate(pairs):
                    dataset[index] if name == "ours" else reference_item(pair, args.crop, rng)
                best[name] = min(best[name], (clock() - begin) / len(pairs))
    height, width = args.size
    print(f"| data | {width} x {height} JPEG, crop {args.crop} | ours {1 / best['ours']:.0f} images/s | "
          f"Pillow reference {1 / best['reference']:.0f} images/s | {best['reference'] / best['ours']:.2f}x |")
    return best


def step(args) -> dict:
    """Forward, cross entropy, backward and AdamW of both networks, by turns; peak memory of each on its own."""
    device = pick_device(args.device)
    dtype = torch.bfloat16 if args.bfloat16 else None
    order = torch.channels_last if args.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    networks = {"ours": UNet(ENCODERS["resnet34"](), CLASSES)}
    try:
        import segmentation_models_pytorch as smp
        networks["smp"] = smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)
        networks["smp"].load_state_dict(networks["ours"].state_dict())
    except ImportError as error:
        print(f"without segmentation_models.pytorch ({error}): our own row alone")
    image = torch.randn(args.batch_size, 3, args.crop, args.crop, device=device).contiguous(memory_format=order)
    label = torch.randint(0, CLASSES, (args.batch_size, args.crop, args.crop), device=device)
    best, peak, losses, optimizers = {}, {}, {}, {}
    for name, network in networks.items():
        network.to(device, memory_format=order).train()
        optimizers[name] = torch.optim.AdamW(network.parameters())

    def one(name):
        begin = clock()
        with autocast(device, dtype):
            logits = networks[name](image)
        loss = F.cross_entropy(logits.float(), label)
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        losses.setdefault(name, loss.item())
        return clock() - begin

    for name in networks:                                   # ours first: on the CPU peaks can only grow
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one(name)
        peak[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for _ in range(args.repeats):
        for name in networks:
            best[name] = min(best.get(name, float("inf")), one(name))
    if "smp" in losses and abs(losses["ours"] - losses["smp"]) > 1e-3 * losses["ours"]:
        raise RuntimeError(f"the first losses differ: {losses}")
    for name, seconds in best.items():
        print(f"| step | {name} | {args.batch_size} x {args.crop} x {args.crop}, "
              f"{'bfloat16' if dtype else 'float32'}{', channels last' * args.channels_last} | {seconds:.2f} s | peak "
              f"{peak[name]:.2f} GiB | {seconds / best['ours']:.2f} of our time |")
    print(describe(device))
    return best


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    return {"data": data, "step": step}[args.part](args)


if __name__ == "__main__":
    run_main(main)
