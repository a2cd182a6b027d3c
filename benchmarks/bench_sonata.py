"""Time and memory of Point Transformer V3 in Sonata's size, random weights, on made-up rooms at 2 cm.

    python benchmarks/bench_sonata.py parts             # encoder forward at 30,000 voxels, by parts
    python benchmarks/bench_sonata.py features          # up-cast features of Sonata's, Concerto's and Utonia's sizes
    python benchmarks/bench_sonata.py modes             # all modes, forward + backward, on a room of 100,000 points
    python benchmarks/bench_sonata.py memory            # their peak memory from 25,000 to 200,000 voxels
    python benchmarks/bench_sonata.py gpu               # bfloat16 on CUDA: forward and a whole ft step, ms and peak GiB
    python benchmarks/bench_sonata.py memory --mode ft --gradient-checkpointing --voxels 200000

Each row of features, modes and memory runs in a process of its own, so that its peak is its own; modes and memory give
up at --limit-gib.
Times on the CPU are CPU seconds with one thread, wall-clock seconds with more: other work disturbs the first little.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models.point_transformer as network  # noqa: E402
from data.points import PointSpec, collate_points, evaluation_sample  # noqa: E402
from data.synthetic_points import POINT_CLASSES, make_room  # noqa: E402
from models.point_networks import NETWORKS, network_config  # noqa: E402
from models.point_transformer import MODES, build_point_transformer, build_segmenter, upcast  # noqa: E402
from models.sparse_conv import neighbour_table  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import AMP_DTYPES, autocast, describe, pick_device  # noqa: E402
from utils.losses import MaskedCrossEntropyLoss, lovasz_softmax_loss  # noqa: E402

SONATA = {"in_channels": 9, "order": ["z", "z-trans", "hilbert", "hilbert-trans"], "enc_depths": [3, 3, 3, 12, 3],
          "enc_channels": [48, 96, 192, 384, 512], "enc_num_head": [3, 6, 12, 24, 32], "enc_patch_size": [1024] * 5,
          "drop_path": 0.3, "enc_mode": True}
TINY = {**SONATA, "enc_depths": [1, 1, 1], "enc_channels": [16, 32, 48], "enc_num_head": [1, 2, 3],
        "enc_patch_size": [64] * 3}
HALL, HALL_POINTS = (10.0, 8.0, 2.6), 500_000           # metres; about 4 of 26 neighbours occupied
ROOM_POINTS = 100_000
SIZES = {"parts": [30_000], "features": [30_000], "memory": [25_000, 50_000, 100_000, 200_000],
         "gpu": [30_000, 100_000, 200_000]}
TIMED = {"neighbour tables": [(network, "neighbour_table")],
         "serialisation, patches": [(network.Stage, "patches")],
         "sparse convolution": [(network.SubMConv3d, "forward")],
         "attention: softmax(q k) v": [(network.F, "scaled_dot_product_attention")],
         "attention: linear, gather": [(network.PatchAttention, "forward")],
         "rotation of q and k": [(network.PatchAttention, "rotate")],
         "MLP": [(network.Mlp, "forward")],
         "pooling": [(network.Stage, "coarser"), (network.GridPooling, "forward")]}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("parts", "features", "memory", "modes", "gpu", "one"),
                        help="one: a single row of features, memory or modes, in this process")
    parser.add_argument("--network", choices=tuple(NETWORKS), nargs="+",
                        help="features: default sonata, concerto_large, utonia; parts: one, default sonata")
    parser.add_argument("--voxels", type=int, nargs="+", help="default: as above")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--gradient-checkpointing", action="store_true", help="ft and dec: blocks computed twice")
    parser.add_argument("--room", type=int, metavar="POINTS", help="one: a whole room, not cut to --voxels")
    parser.add_argument("--limit-gib", type=float, default=12.0, help="most memory of a process on the CPU")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--device", help="parts: default cpu; gpu: default cuda")
    parser.add_argument("--amp-dtype", choices=tuple(AMP_DTYPES), help="default: float32; gpu: bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a network of three stages, to try this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def make_batch(num_voxels: int | None, num_points: int = HALL_POINTS) -> dict[str, torch.Tensor]:
    """The num_voxels voxels nearest to the middle of a hall, or a whole room (None) of num_points points."""
    room = make_room(np.random.default_rng(0), num_points, None if num_voxels is None else HALL)
    cloud = {"coord": room.coord, "color": room.color.astype(np.float32), "normal": room.normal, "label": room.label}
    sample = evaluation_sample(cloud, PointSpec())
    keep = torch.arange(len(sample["coord"]))
    if num_voxels is not None:
        if num_voxels > len(keep):
            raise ValueError(f"--voxels {num_voxels}: the hall has {len(keep)}")
        keep = sample["coord"].square().sum(1).argsort()[:num_voxels]
    return collate_points([{name: sample[name][keep] for name in ("coord", "grid_coord", "feat", "label")}])


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # kilobytes on Linux


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


@contextlib.contextmanager
def timed_parts(device: torch.device):
    """Yields {part: seconds} of what runs inside; a part within another counts for itself alone."""
    seconds, inner, originals = defaultdict(float), [0.0], []

    def wrap(name, function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            inner.append(0.0)
            start = clock(device)
            result = function(*args, **kwargs)
            elapsed = clock(device) - start
            seconds[name] += elapsed - inner.pop()
            inner[-1] += elapsed
            return result
        return wrapped

    for name, places in TIMED.items():
        for owner, attribute in places:
            originals.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, wrap(name, originals[-1][2]))
    try:
        yield seconds
    finally:
        for owner, attribute, function in originals:
            setattr(owner, attribute, function)


def forward_parts(args, device, batch, amp_dtype) -> float:
    """Print the parts of an encoder forward; returns its seconds without the clocks in between."""
    size = network_config(args.network[0]) if args.network else TINY if args.tiny else SONATA
    model = build_point_transformer({**size, "shuffle_orders": False}).to(device).eval()
    best, total = {}, float("inf")
    with torch.no_grad(), autocast(device, amp_dtype):
        model(batch)
        plain = fastest(args.repeats, device, lambda: model(batch))
        for _ in range(args.repeats):
            with timed_parts(device) as seconds:
                elapsed = fastest(1, device, lambda: model(batch))
            if elapsed < total:
                total, best = elapsed, dict(seconds)
    best["embedding, norms, the rest"] = total - sum(best.values())
    for name, seconds in best.items():
        print(f"    {name:<28}{1000 * seconds:>9.1f} ms{100 * seconds / total:>7.1f} %")
    print(f"    {'forward':<28}{1000 * plain:>9.1f} ms", flush=True)
    return plain


def fastest(repeats: int, device: torch.device, function) -> float:
    times = []
    for _ in range(repeats):
        start = clock(device)
        function()
        times.append(clock(device) - start)
    return min(times)


def parts(args) -> dict:
    device, found = pick_device(args.device or "cpu"), {}
    print(f"Encoder forward, {describe(device)}, {args.amp_dtype or 'float32'}")
    for voxels in args.voxels or SIZES["parts"]:
        batch = {name: value.to(device) for name, value in make_batch(voxels).items()}
        table = neighbour_table(batch["grid_coord"], dense=False)
        pairs = 2 * sum(len(centre) for centre, _ in table.pairs)
        print(f"  {voxels:,} voxels, {pairs / voxels:.1f} neighbours each")
        found[voxels] = forward_parts(args, device, batch, AMP_DTYPES[args.amp_dtype or "float32"])
    return found


def build(args, mode: str):
    checkpointing = args.gradient_checkpointing and mode != "lin"
    return build_segmenter(TINY if args.tiny else SONATA, len(POINT_CLASSES), mode,
                           gradient_checkpointing=checkpointing).train()


def step(model, batch, device, amp_dtype=None, optimizer=None) -> None:
    """Forward, cross entropy + Lovasz, backward; with an optimizer its step too."""
    with autocast(device, amp_dtype):
        logits = model(batch)
    loss = MaskedCrossEntropyLoss()(logits, batch["label"]) + lovasz_softmax_loss(logits, batch["label"])
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def one_features(args) -> dict:
    """The up-cast features of one network on the CPU, and what they took."""
    device, name = torch.device("cpu"), args.network[0]
    torch.manual_seed(0)
    batch = make_batch(args.voxels[0])
    model = build_point_transformer(network_config(name, shuffle_orders=False)).eval()
    before = peak_gib()
    with torch.no_grad():
        seconds = fastest(args.repeats, device, lambda: upcast(model(batch)))
    peak = peak_gib()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"  {name:<15}{millions:>7.1f} M{args.voxels[0]:>9,} voxels{peak:>8.2f} GiB at the peak{before:>7.2f} before"
          f"{seconds:>8.2f} s", flush=True)
    return {"peak": peak, "seconds": seconds}


def one(args) -> dict:
    """A forward + backward of one mode on the CPU, and what it took."""
    if args.network:
        return one_features(args)
    mode, device = args.mode[0], torch.device("cpu")
    torch.manual_seed(0)
    batch = make_batch(None, args.room) if args.room else make_batch(args.voxels[0])
    model, voxels = build(args, mode), len(batch["coord"])
    before = peak_gib()
    name = mode + (", checkpointing" if args.gradient_checkpointing and mode != "lin" else "")
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit_gib * 2**30),) * 2)
    try:
        seconds = fastest(1, device, lambda: step(model, batch, device))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        print(f"  {name:<20}{voxels:>9,} voxels   more than {args.limit_gib:g} GiB", flush=True)
        return {"peak": None}
    peak = peak_gib()
    print(f"  {name:<20}{voxels:>9,} voxels{peak:>8.2f} GiB at the peak{before:>7.2f} before"
          f"{(peak - before) * 2**20 / voxels:>8.1f} KiB a voxel{seconds:>8.1f} s", flush=True)
    return {"peak": peak, "before": before, "voxels": voxels}


def rows(args, more: list[list[str]]) -> None:
    """Run `one` for each mode and each list of further flags, each in a process of its own. ValueError if one dies."""
    print(f"Forward + backward, {describe(torch.device('cpu'))}, float32", flush=True)
    same = ["--limit-gib", str(args.limit_gib), "--threads", str(args.threads), *["--tiny"] * args.tiny,
            *["--gradient-checkpointing"] * args.gradient_checkpointing, *["--debug"] * args.debug]
    for mode in args.mode:
        for extra in more:
            code = subprocess.run([sys.executable, __file__, "one", *same, "--mode", mode, *extra]).returncode
            if code:
                raise ValueError(f"{mode} {' '.join(extra)} ended with {code}"
                                 f"{': killed, the machine has too little memory' if code == -9 else ''}")


def features(args) -> None:
    """A row for each network, each in a process of its own. ValueError if one dies."""
    print(f"Up-cast features, {describe(torch.device('cpu'))}, float32, the fastest of {args.repeats}", flush=True)
    for name in args.network or ("sonata", "concerto_large", "utonia"):
        for voxels in args.voxels or SIZES["features"]:
            code = subprocess.run([sys.executable, __file__, "one", "--network", name, "--voxels", str(voxels),
                                   "--threads", str(args.threads), "--repeats", str(args.repeats)]).returncode
            if code:
                raise ValueError(f"{name} ended with {code}")


def memory(args) -> None:
    rows(args, [["--voxels", str(voxels)] for voxels in args.voxels or SIZES["memory"]])


def modes(args) -> None:
    rows(args, [["--room", str(args.room or ROOM_POINTS)]])


def gpu(args) -> None:
    """Forward by parts, and a step of ft, after a first one of each that does not count."""
    device, amp_dtype = pick_device(args.device or "cuda"), AMP_DTYPES[args.amp_dtype or "bfloat16"]
    cuda = device.type == "cuda"
    print(f"{describe(device)}, {args.amp_dtype or 'bfloat16'}")

    def report(name, function):
        function()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        seconds = fastest(args.repeats, device, function)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else peak_gib()
        print(f"    {name:<28}{1000 * seconds:>9.1f} ms{peak:>8.2f} GiB at the peak", flush=True)

    for voxels in args.voxels or SIZES["gpu"]:
        batch = {name: value.to(device) for name, value in make_batch(voxels).items()}
        print(f"  {voxels:,} voxels; the encoder's forward")
        forward_parts(args, device, batch, amp_dtype)
        model = build(args, "ft").to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

        def forward(model=model, batch=batch):
            with torch.no_grad(), autocast(device, amp_dtype):
                model(batch)

        report("encoder and decoder, forward", forward)
        report("ft, whole step with AdamW",
               lambda model=model, batch=batch, optimizer=optimizer: step(model, batch, device, amp_dtype, optimizer))
        del model, optimizer, forward


def main(argv=None):
    args = parse_args(argv)
    if args.part == "one" and not (args.voxels or args.room):
        raise ValueError("one: give --voxels N or --room POINTS")
    torch.set_num_threads(args.threads)
    part = {"parts": parts, "features": features, "memory": memory, "modes": modes, "gpu": gpu, "one": one}[args.part]
    return part(args)


if __name__ == "__main__":
    run_main(main)
