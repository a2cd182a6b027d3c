"""Write the network of an image checkpoint as one file: ONNX, or PyTorch's own torch.export format.

    python export.py exp/linear_head/model/model_best.pth --output model.onnx
    python export.py CHECKPOINT --output model.onnx --size 512 768      # images of one size alone
    python export.py CHECKPOINT --output model.pt2                      # torch.export
    python examples/run_onnx.py model.onnx photo.jpg --output label.png

The file takes images (1, 3, H, W) of 8-bit RGB and gives scores (1, classes, H, W); a frozen
backbone, the normalisation and the padding to whole patches are inside. Before it gets its name it
runs beside the original on three images, and where the two differ it is not written. Needs the
packages onnx, onnxscript and onnxruntime for .onnx. This file knows no method. docs/export.md
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import contextlib
import importlib.util
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.image_results import file_palette, palette_by_number
from data.label_map import label_map_of
from data.masks import label_to_file
from data.photos import photo_format
from evaluate import load
from models.dinov3 import VisionTransformer
from utils.checkpoint import check_writable
from utils.cli import ArgumentParser, AtLeast, run_main
from utils.image_inference import pad_to_multiple

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SMALLEST = 64                       # side of an image, in pixels; below, maps of one cell occur
ONNX_BYTES = 2 << 30                # an ONNX file is a protocol buffer, which can hold no more
# Beyond these the file is not written; what is usual is a hundredth of both (docs/export.md).
DIFFERENCE = 1e-3                   # of the largest score, at least of 1
SAME_CLASS = 0.999                  # share of pixels


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="file written by a train_*.py of this folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the config in the checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE", help="NAME.onnx or NAME.pt2")
    parser.add_argument("--size", nargs=2, type=AtLeast(SMALLEST), metavar=("H", "W"),
                        help="height and width of every image; default: any, from 64 pixels; a "
                             "backbone with learned positions (DINOv2) needs it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


class Exported(nn.Module):
    """image (1, bands, H, W) uint8 -> scores (1, C, H, W) float32, as predict.py computes them for
    one window in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.frozen = model.backbone and model.backbone.vit         # its weights go into the file

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        shown = pad_to_multiple(self.model.normalize(image), self.model.multiple)
        scores = self.model.scores(shown).float()                   # (1, C, H, W), padded
        # A slice, [:height, :width], has strides that depend on whether there was any padding.
        return scores.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))


# -- before the work -------------------------------------------------------------------------------

def check_request(output: Path) -> None:
    """ValueError for an ending that is not known, a place that cannot be written, and packages that
    are missing."""
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--output {output}: expected a name that ends in .onnx or .pt2")
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; name a file")
    check_writable(output.parent)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if output.suffix == ".onnx" and missing:
        raise ValueError(f"--output {output}: needs packages that are not installed: pip install "
                         f"{' '.join(missing)}; or choose .pt2")


def check_network(model: nn.Module, args) -> None:
    """ValueError for a network that is not of images, needs --size or does not fit into a file."""
    if not hasattr(model, "scores"):
        raise ValueError(f"{args.checkpoint}: not a network of images; meshes and point clouds "
                         f"have no fixed layout to export, use predict.py")
    network = Exported(model)
    learned = any(isinstance(module, VisionTransformer) and module.config.pos_grid is not None
                  for module in network.modules())
    if learned and not args.size:
        raise ValueError("--size H W is missing: this backbone has learned positions, which are "
                         "resized to one size of images")
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if args.output.endswith(".onnx") and size > ONNX_BYTES - (64 << 20):
        raise ValueError(f"--output {args.output}: {size / 2**30:.1f} GiB of weights, and an ONNX "
                         f"file holds 2; use --output {Path(args.output).stem}.pt2")


# -- export and check ------------------------------------------------------------------------------

def check_sizes(model: nn.Module, size: list[int] | None) -> list[tuple[int, int]]:
    """(height, width) of the three images that the file is tried on: about as large as predict.py
    shows them to the network, of other proportions, and not whole patches."""
    if size:
        return [tuple(size)] * 3
    short = model.view.window or model.view.size or 512
    short = max(SMALLEST, min(short) if isinstance(short, tuple) else short)
    return [(short, short), (short, short * 4 // 3 + 5), (short * 5 // 4 + 3, short)]


def made_image(height: int, width: int, bands: int, seed: int) -> Tensor:
    """Soft patches of colour with some noise: (1, bands, height, width) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, bands, 7, 9, generator=generator) * 255
    image = F.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.randn(image.shape, generator=generator) * 10
    return (image + noise).clamp(0, 255).byte()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' remarks on themselves and on packages that no script needs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(action="ignore"):
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def trace(network: Exported, size: tuple[int, int], fixed: bool,
          bands: int) -> torch.export.ExportedProgram:
    """torch.export of the network, for images of that size or of any. Sizes are reasoned about as
    symbols; what PyTorch cannot prove of them becomes a check when the program runs."""
    sides = {axis: torch.export.Dim(name, min=SMALLEST) for axis, name in ((2, "height"),
                                                                           (3, "width"))}
    return torch.export.export(network, (made_image(*size, bands, 0),),
                               dynamic_shapes=None if fixed else (sides,),
                               prefer_deferred_runtime_asserts_over_guards=True)


def metadata_of(model: nn.Module, script: str, sizes: dict) -> dict:
    """What a runner needs to know besides the graph, plain values by name (docs/export.md)."""
    masks, C = model.masks, len(model.class_names)
    options = (masks["ignore_label"], masks.get("reduce_zero_label", False), label_map_of(masks))
    normalize = model.normalize
    black, white = (normalize(torch.full((1, photo_format(masks).channels, 1, 1), value,
                                         dtype=torch.uint8)).flatten() for value in (0, 255))
    std = 1 / (white - black)
    numbers, colors = label_to_file(np.arange(C), *options), model.palette
    if getattr(model, "file_ids", None) is not None:                # Cityscapes has its own
        numbers, colors = model.file_ids, palette_by_number(colors, model.file_ids)
    palette = file_palette(colors, *options).tolist() if numbers.max() < 256 else None
    return {"script": script, "class_names": model.class_names,
              "mask_values": numbers.tolist(), "palette": palette,
              "short_side": model.view.size, "multiple": model.multiple,
              "mean": (-black * std).tolist(), "std": std.tolist(), **sizes}


def write_onnx(program, path: Path, metadata: dict) -> Callable[[Tensor], np.ndarray]:
    """Write the file; returns what onnxruntime makes of it: image -> scores."""
    import onnxruntime
    # Not optimised here, which takes minutes for deformable attention: every runner does it anyway.
    onnx = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False,
                             input_names=["image"], output_names=["scores"])
    for node in onnx.model.graph:
        node.metadata_props.clear()                                 # stack traces, with local paths
    onnx.model.metadata_props.update({name: json.dumps(metadata[name]) for name in metadata})
    onnx.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"image": image.numpy()})[0]


def write_pt2(program, path: Path, metadata: dict) -> Callable[[Tensor], np.ndarray]:
    """The same of a torch.export file; the metadata are one JSON object in it."""
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
    module = torch.export.load(path).module()
    return lambda image: module(image).numpy()


def compare(network: Exported, run: Callable[[Tensor], np.ndarray],
            images: list[Tensor]) -> dict[str, float]:
    """Largest difference of the file's scores from the network's, largest score, share of pixels
    of the same class, and seconds that each took."""
    difference, largest, same, pixels, seconds = 0.0, 0.0, 0, 0, [0.0, 0.0]
    for image in images:
        begin = time.perf_counter()
        expected = network(image).numpy()
        middle = time.perf_counter()
        scores = run(image)
        seconds = [seconds[0] + middle - begin, seconds[1] + time.perf_counter() - middle]
        if scores.shape != expected.shape or not np.isfinite(scores).all():
            return {"difference": float("inf"), "largest": 1.0, "same": 0.0, "seconds": seconds}
        difference = max(difference, float(np.abs(scores - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        same += int((scores.argmax(1) == expected.argmax(1)).sum())
        pixels += expected[0, 0].size
    return {"difference": difference, "largest": largest, "same": same / pixels, "seconds": seconds}


# -- main ------------------------------------------------------------------------------------------

@torch.no_grad()
def main(argv=None) -> dict:
    args = parse_args(argv)
    output = Path(args.output)
    check_request(output)
    script, model, _ = load(args.checkpoint, args.overrides, torch.device("cpu"))
    check_network(model, args)
    network, bands = Exported(model).eval(), photo_format(model.masks).channels
    sizes = check_sizes(model, args.size)
    images = [made_image(*size, bands, seed) for seed, size in enumerate(sizes)]
    output.parent.mkdir(parents=True, exist_ok=True)
    part, begin = output.with_name(f".{output.stem}.part{output.suffix}"), time.monotonic()
    try:
        with quiet():
            program = trace(network, sizes[-1], bool(args.size), bands)
            metadata = metadata_of(model, f"{script.__name__}.py",
                                   {"fixed_size": args.size, "smallest_side": SMALLEST})
            write = write_onnx if output.suffix == ".onnx" else write_pt2
            result = compare(network, write(program, part, metadata), images)
        line = (f"largest difference {result['difference']:.1e} of scores up to "
                f"{result['largest']:.3g}, same class at {100 * result['same']:.4g} % of pixels")
        if (result["difference"] > DIFFERENCE * max(1, result["largest"])
                or result["same"] < SAME_CLASS):
            raise ValueError(f"{output}: not written, it does not compute what {args.checkpoint} "
                             f"computes: {line}")
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    shown = " ".join(f"{height}x{width}" for height, width in sizes)
    print(f"tried on {shown}: {line}; {result['seconds'][1]:.2f} s, PyTorch "
          f"{result['seconds'][0]:.2f} s")
    print(f"wrote {output} ({output.stat().st_size / 2**20:.1f} MiB) in "
          f"{time.monotonic() - begin:.0f} s")
    return result


if __name__ == "__main__":
    run_main(main)
