"""Everything a GPU has to show, in one table; bash scripts/gpu_check.sh runs it.

    bash scripts/gpu_check.sh                         # under 8 minutes on one card; the table goes into docs/gpu.md
    bash scripts/gpu_check.sh --tiny --device cpu     # the same on small networks, to try this file without a card

tests  those marked gpu
runs   the tiny run of every script in float32, bfloat16, float16, with --deterministic (twice: the same bits) and
       --compile; its training loss beside that of the CPU in float32, from which it may differ by TOLERANCE: dropout
       and random points are drawn by another generator
speed  a frozen ViT-L, a step of each head and network, Sonata by size of the cloud, the mesh encoder
roofline  step and prediction of every script as a share of the card's matrix product (benchmarks/roofline.py)

A row that fails says why and the rest goes on; the exit status is then 1. After --minutes no new row starts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import bench_dinov3, bench_prototype, bench_sonata, roofline  # noqa: E402
from models.dinov3 import BACKBONES, FrozenBackbone, VisionTransformer  # noqa: E402
from models.dinov3_adapter import DINOv3_Adapter  # noqa: E402
from models.nomeformer import Nomeformer  # noqa: E402
from models.resnet import ENCODERS  # noqa: E402
from models.unet import UNet  # noqa: E402
from models.upernet import FCNHead, UPerHead, UPerNetSegmenter  # noqa: E402
from tests.tiny_runs import NAMES, same_weights, shrink, tiny_run  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import amp_settings, autocast, describe, pick_device  # noqa: E402
from utils.log import read_log  # noqa: E402
from utils.losses import MaskedCrossEntropyLoss  # noqa: E402

PARTS = ("tests", "runs", "speed", "roofline")
TOLERANCE = 0.1
SCALE = 256.0                               # of losses in float16; at PyTorch's 65,536 all steps of a run overflow
VARIANTS = {"float32": ["--amp-dtype", "float32"], "bfloat16": ["--amp-dtype", "bfloat16"],
            "float16": ["--amp-dtype", "float16"], "--deterministic": ["--deterministic"], "--compile": ["--compile"]}
NOT_COMPILED = ("sonata",)                  # which refuses --compile
CLASSES = 19


class Row(NamedTuple):
    what: str
    result: str
    passed: bool | None = None              # None: nothing to pass, or not run


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try this file")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--scripts", choices=NAMES, nargs="+", default=list(NAMES), help="of the tiny runs")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new row starts after that")
    parser.add_argument("--output", type=Path, help="Markdown file; default: docs/gpu.md, with --tiny none")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.output is None and not args.tiny:
        args.output = ROOT / "docs" / "gpu.md"
    return args


class Table:
    """Rows as they come. add(what, function) runs it: a result, a pair (result, passed), or an error as the result."""

    def __init__(self, minutes: float, device: torch.device, debug: bool) -> None:
        self.rows: list[Row] = []
        self.end = time.monotonic() + 60 * minutes
        self.device = device
        self.debug = debug

    def add(self, what: str, function: Callable) -> None:
        if time.monotonic() > self.end:
            row = Row(what, "not run: out of time")
        else:
            row = self._measured(what, function)
        self.rows.append(row)
        print(f"{what}: {row.result}{'' if row.passed is None else ', ok' if row.passed else ', FAILED'}", flush=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measured(self, what: str, function: Callable) -> Row:
        try:
            found = function()
        except torch.OutOfMemoryError:
            return Row(what, "out of memory", False)
        except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError, OSError) as error:
            if self.debug:
                raise
            text = str(error).strip().splitlines()
            return Row(what, f"{type(error).__name__}: {text[0][:200] if text else ''}", False)
        return Row(what, *found) if isinstance(found, tuple) else Row(what, found)

    def markdown(self) -> str:
        marks = {None: "", True: "ok", False: "**failed**"}
        lines = [f"| {row.what} | {row.result.replace('|', '/')} | {marks[row.passed]} |" for row in self.rows]
        return "\n".join(["| what | result | |", "|---|---|---|", *lines])


# -- tests and runs ----------------------------------------------------------------------------------------------------

def marked_tests() -> tuple[str, bool]:
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.stdout.strip().splitlines()[-1].strip("= "), done.returncode == 0


def train_loss(run, device: str, out: Path, *more: str) -> float:
    """The training loss of epoch 1 of a tiny run: later, prototypes lie on patches that rounding has chosen."""
    words = run.argv(out, *more)
    words[words.index("--device") + 1] = device
    module = importlib.import_module(Path(run.script).stem)
    with contextlib.redirect_stdout(io.StringIO()):
        module.main(words)
    records = read_log(out / "log" / "log.jsonl")
    return next(record["loss"] for record in records if record["split"] == "train" and record["epoch"] == 1)


def tiny_rows(table: Table, args, folder: Path) -> None:
    compile_network, scaler = torch.compile, torch.amp.GradScaler
    torch.amp.GradScaler = functools.partial(scaler, init_scale=SCALE)
    if args.tiny:                                           # traces without a compiler
        torch.compile = functools.partial(compile_network, backend="aot_eager")
    try:
        for name in args.scripts:
            run = tiny_run(name, folder, epochs=1)
            reference = train_loss(run, "cpu", folder / name / "reference")
            for variant, flags in VARIANTS.items():
                if variant == "--compile" and name in NOT_COMPILED:
                    continue
                table.add(f"`{run.script}` {variant}",
                          functools.partial(tiny_row, run, table.device, folder / name / variant, flags, reference))
    finally:
        torch.compile, torch.amp.GradScaler = compile_network, scaler


def tiny_row(run, device: torch.device, out: Path, flags: list[str], reference: float) -> tuple[str, bool]:
    torch._dynamo.reset()
    loss = train_loss(run, str(device), out, *flags)
    difference = abs(loss - reference) / abs(reference)
    text = f"loss {loss:.4f}, CPU {reference:.4f}"
    passed = difference <= TOLERANCE
    if "--deterministic" in flags:
        again = out.with_name("again")
        train_loss(run, str(device), again, *flags)
        same = same_weights(out, again)
        text += ", the same bits twice" if same else ", other bits the second time"
        passed = passed and same
    return text, passed


# -- speed -------------------------------------------------------------------------------------------------------------

class Clock:
    """Times functions on a device, and their peak memory."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def measure(self, function: Callable) -> tuple[float, str]:
        """(median seconds, peak memory as text); two calls before do not count."""
        function()
        function()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        for _ in range(self.repeats):
            started = self.now()
            function()
            seconds.append(self.now() - started)
        if self.device.type != "cuda":
            return statistics.median(seconds), "memory not measured"
        return statistics.median(seconds), f"peak {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"


def matrix_peak(clock: Clock, side: int) -> float:
    """TFLOP/s of a product of square matrices in bfloat16, the most of three sizes."""
    best = 0.0
    for size in (side // 2, side, 2 * side):
        first, second = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
        seconds, _ = clock.measure(functools.partial(torch.mm, first, second))
        best = max(best, 2 * size ** 3 / seconds / 1e12)
    return best


def training_step(network, forward: Callable, loss: Callable, device: torch.device) -> Callable:
    """forward() under autocast, loss of its result, backward, AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
    network.train()

    def step():
        with autocast(device, torch.bfloat16):
            outputs = forward()
        loss(outputs).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


class Speed:
    """The rows of `speed`; sizes small with tiny."""

    def __init__(self, table: Table, tiny: bool) -> None:
        self.table, self.tiny, self.device = table, tiny, table.device
        self.clock = Clock(table.device, 2 if tiny else 10)
        self.backbone = "dinov3_tiny" if tiny else "dinov3_vitl16"
        self.size, self.batch = (64, 2) if tiny else (512, 8)
        self.peak = float("nan")

    def rows(self) -> None:
        add, px = self.table.add, f"{self.size} px, batch {self.batch}, bfloat16"
        add("matrix product, bfloat16", self.matrices)
        add(f"frozen ViT-L and Mask2Former, {px}", self.mask2former)
        add(f"UPerNet on a frozen ViT-L, {px}", self.upernet)
        add(f"U-Net on ResNet-34, {px}", self.unet)
        add("prototype network on DeepLab v2, ResNet-101, 2 x 513 px, bfloat16", self.prototype)
        for voxels in (500,) if self.tiny else (30_000, 100_000, 200_000):
            add(f"Sonata, {voxels:,} voxels, bfloat16", functools.partial(self.sonata, voxels))
        add("mesh encoder, bfloat16", self.meshes)

    def matrices(self) -> str:
        self.peak = matrix_peak(self.clock, 128 if self.tiny else 8192)
        return f"{self.peak:.3g} TFLOP/s"

    def mask2former(self) -> str:
        small = ["--hidden-dim", "32", "--num-heads", "4", "--ffn-dim", "64", "--num-points", "256"]
        args = bench_dinov3.parse_args(["gpu", "--backbone", self.backbone, "--shapes", f"{self.size}x{self.batch}",
                                        "--device", str(self.device), "--peak-tflops", str(self.peak),
                                        "--repeats", str(self.clock.repeats), *(small if self.tiny else [])])
        with contextlib.redirect_stdout(io.StringIO()):
            row = bench_dinov3.whole_steps(args, self.backbone, self.size, self.batch, self.device)
        return (f"backbone {row['step'] / row['share']:.1f} images/s, {100 * row['mfu']:.0f} % of the matrix product; "
                f"scores {row['forward']:.1f} images/s; step {row['step']:.1f} images/s, "
                f"{100 * row['share']:.0f} % of it the backbone, peak {row['peak']['step']:.1f} GiB")

    def upernet(self) -> str:
        config = BACKBONES[self.backbone]
        D = config.embed_dim
        hidden_dim = 16 if self.tiny else 512
        torch.manual_seed(0)
        backbone = FrozenBackbone(VisionTransformer(config), config.taps, [0.5] * 3, [0.25] * 3, {})
        backbone.to(self.device, torch.bfloat16)
        neck = DINOv3_Adapter(D, config.patch_size)
        network = UPerNetSegmenter(neck, UPerHead([D] * 4, CLASSES, hidden_dim), FCNHead(D, CLASSES)).to(self.device)
        image, label = self.images()
        return self.step_of(network, lambda: network(image, backbone(image)),
                            lambda outputs: sum(self.image_loss(logits, label) for logits in outputs.values()))

    def unet(self) -> str:
        torch.manual_seed(0)
        encoder = ENCODERS["resnet18" if self.tiny else "resnet34"]()
        network = UNet(encoder, CLASSES).to(self.device, memory_format=torch.channels_last)
        image, label = self.images()
        image = image.contiguous(memory_format=torch.channels_last)
        return self.step_of(network, lambda: network(image), lambda logits: self.image_loss(logits, label))

    def step_of(self, network, forward: Callable, loss: Callable) -> str:
        seconds, memory = self.clock.measure(training_step(network, forward, loss, self.device))
        return f"step {self.batch / seconds:.1f} images/s, {memory}"

    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.randint(0, CLASSES, (self.batch, self.size // 8, self.size // 8), device=self.device)
        label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return torch.randn(self.batch, 3, self.size, self.size, device=self.device), label

    def image_loss(self, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.interpolate(logits.float(), label.shape[-2:], mode="bilinear")
        return MaskedCrossEntropyLoss(class_dim=1)(logits, label)

    def prototype(self) -> str:
        words = ["model", "--device", str(self.device), "--bfloat16", "--repeats", str(self.clock.repeats)]
        with contextlib.redirect_stdout(io.StringIO()):
            found = bench_prototype.main([*words, *["--tiny"] * self.tiny])
        return f"step {2 / found['seconds']:.1f} images/s, peak {found['peak']:.1f} GiB"

    def sonata(self, voxels: int) -> str:
        words = ["gpu", "--device", str(self.device), "--repeats", "2" if self.tiny else "3", *["--tiny"] * self.tiny]
        args = bench_sonata.parse_args(words)
        batch = {name: value.to(self.device) for name, value in bench_sonata.make_batch(voxels).items()}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            forward = bench_sonata.forward_parts(args, self.device, batch, torch.bfloat16)
        parts = [line.split("  ") for line in output.getvalue().splitlines() if "%" in line]
        shares = sorted(((float(line[-1].strip(" %")), line[2].strip()) for line in parts), reverse=True)[:3]
        model = bench_sonata.build(args, "ft").to(self.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
        seconds, memory = self.clock.measure(
            lambda: bench_sonata.step(model, batch, self.device, torch.bfloat16, optimizer))
        return (f"encoder {1000 * forward:.0f} ms ({', '.join(f'{name} {share:.0f} %' for share, name in shares)}); "
                f"ft step {1000 * seconds:.0f} ms, {memory}")

    def meshes(self) -> str:
        clusters, faces = (8, 16) if self.tiny else (2048, 256)
        torch.manual_seed(0)
        network = Nomeformer(20, embed_dim=32 if self.tiny else 96, num_heads=4).to(self.device)
        features = torch.randn(1, clusters, faces, 20, device=self.device)
        mask = torch.ones(1, clusters, faces, dtype=torch.bool, device=self.device)
        centroid = torch.rand(1, clusters, faces, 3, device=self.device)
        step = training_step(network, lambda: network(features, mask, centroid),
                             lambda faces: faces.float().square().mean(), self.device)
        seconds, memory = self.clock.measure(step)
        with torch.no_grad(), autocast(self.device, torch.bfloat16):
            forward, _ = self.clock.measure(lambda: network(features, mask, centroid))
        count = clusters * faces
        return f"{count / forward:,.0f} faces/s forward, {count / seconds:,.0f} in training, {memory}"


def roofline_row(row: str, tiny: bool, device: torch.device) -> str:
    words = [row, "--device", str(device), "--amp-dtype", "bfloat16", *["--tiny", "--repeats", "1"] * tiny]
    with contextlib.redirect_stdout(io.StringIO()):
        found = roofline.main(words)[row]
    return "; ".join(f"{name} {measured.summary()}" for name, measured in found.items())


# -- the table ---------------------------------------------------------------------------------------------------------

def insert(path: Path, title: str, text: str) -> None:
    """Replace the section `## title` of a Markdown file, or add it at the end; the line that says that there is none
    yet goes."""
    page = path.read_text() if path.exists() else "# On a GPU\n"
    before, found, after = page.partition(f"## {title}\n")
    after = after.partition("\n## ")[2]
    kept = before.rstrip() + "\n\n" + (f"## {after.strip()}\n\n" if found and after else "")
    path.write_text(kept.replace("**Not yet run on a GPU.**\n", "") + f"## {title}\n\n{text}\n")


def main(argv=None) -> list[Row]:
    args = parse_args(argv)
    device = pick_device(args.device)
    amp_settings(device, "bfloat16")                        # TF32 as in training
    shrink()
    table = Table(args.minutes, device, args.debug)
    started = time.monotonic()
    if "tests" in args.parts:
        if device.type == "cuda":
            table.add("tests marked gpu", marked_tests)
        else:
            table.rows.append(Row("tests marked gpu", "not run: they need CUDA"))
    with tempfile.TemporaryDirectory() as folder:
        if "runs" in args.parts:
            tiny_rows(table, args, Path(folder))
    if "speed" in args.parts:
        Speed(table, args.tiny).rows()
    if "roofline" in args.parts:
        for row in roofline.CASES:
            table.add(f"roofline, {row}, bfloat16", functools.partial(roofline_row, row, args.tiny, device))
    failed = sum(row.passed is False for row in table.rows)
    facts = (f"{describe(device)}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}, "
             f"{(time.monotonic() - started) / 60:.1f} minutes, {failed} of {len(table.rows)} rows failed")
    print(f"\n{facts}\n\n{table.markdown()}", flush=True)
    if args.output is not None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        insert(args.output, name, f"{facts}\n\n{table.markdown()}")
        print(f"\nwrote {args.output}")
    if failed and argv is None:
        sys.exit(1)
    return table.rows


if __name__ == "__main__":
    run_main(main)
