"""How close every script's training step and prediction come to what the machine can compute, and where the rest goes.

    python benchmarks/roofline.py                               # all rows, one thread: half an hour
    python benchmarks/roofline.py "Mask2Former head" --operators 15
    python benchmarks/roofline.py --device cuda                 # bfloat16, as in training there
    python benchmarks/roofline.py --speedup 2                   # two threads beside one, wall-clock
    python benchmarks/roofline.py --kept                        # freed memory kept, beside given back to the system

The peak is the rate of a product of square matrices, measured in the same process: peak and step take turns, and what
is printed is the median of their ratios with the lowest and the highest, so that other work on the machine matters
little. The step is what the script's train_one_epoch does with a batch that is in memory; the prediction is what
predict.py calls of the network. Rows and their sizes: benchmarks/roofline_cases.py.

FLOP  of matrix products, convolutions, attention (5 products backward, one of them computed again) and bilinear
      reading, as torch.utils.flop_counter counts them, which leaves out attention on a CPU, bilinear reading and sparse
      products, and counts the gradient of a grouped convolution as if it had one group. A multiplication and an
      addition are two.
GB    of all operators' inputs and outputs, each read or written once: what has to move where nothing stays in a cache.
exp   share of the time that the exponentials of attention take, one a score (backward again), at the rate of torch.exp
      in a cache: narrow heads have the fewest FLOP a score. On a GPU memory limits that rate: the share is too large.
rest  shares of the time of one more step under torch.profiler, by groups of operators (GROUPS); --operators N names
      the operators themselves. Products, convolutions and attention, with the share of the peak that they reach, first.
"""

from __future__ import annotations

import ctypes
import functools
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.bench_dinov3 import clock  # noqa: E402
from benchmarks.roofline_cases import CASES, build  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.device import AMP_DTYPES, amp_settings, describe, pick_device, trim_memory  # noqa: E402

aten = torch.ops.aten
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4 # of mallopt(3)
MATRIX = "products, convolutions, attention"
GROUPS = {                              # of operators, by their names; the first that fits
    "bilinear reading": "grid_sampler|upsample",
    MATRIX: r"mm_?$|mv$|conv(?!ert)|attention|linear",
    "norms": "(layer|batch|group)_norm",
    "gathering and scattering rows": "index|gather|scatter|take|embedding|where|masked|nonzero|sele|slice",
    "sorting and searching": "sort|topk|unique|search|cumsum|bincount",
    "activations and softmax": "elu|sigmoid|soft|tanh|threshold|exp_?$|log|dropout|bernoulli|uniform|rand|sin|cos",
    "copies": "copy|clone|cat$|stack|pad|fill|zero|contiguous|empty",
    "additions, multiplications": "add|sub|mul|div|neg|lerp|sqrt|clamp|pow|floor|abs|reciprocal|rsub|foreach|adam",
    "sums, maxima": "sum|mean|max|min|norm|any|all$",
}
BETWEEN = "Python and autograd between the operators"


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="ROW", help=f"of: {', '.join(CASES)}; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="turns of peak, step and prediction")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="also the N longest operators of a step")
    parser.add_argument("--speedup", type=int, metavar="N", help="instead: the step with N threads beside one thread")
    parser.add_argument("--kept", action="store_true", help="instead: the step with the memory of freed tensors kept "
                        "beside given back, as is usual (glibc)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp-dtype", choices=tuple(AMP_DTYPES), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if wrong := set(args.cases) - set(CASES):
        parser.error(f"no row {min(wrong)!r}; there are {', '.join(CASES)}")
    return args


# -- counting ----------------------------------------------------------------------------------------------------------

def product_flops(matrix, other, *rest, **more) -> int:
    """Of `matrix` (m, k), which may be sparse, with `other` (k, n)."""
    return 2 * (matrix._nnz() if matrix.is_sparse else matrix.numel()) * other.shape[1]


def attention_flops(query, key, value, *rest, **more) -> int:
    """The scores, and the sum of the values. query (B, heads, L, d), key (B, heads, S, d), value (B, heads, S, v)."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def attention_gradient_flops(grad, query, key, value, *rest, **more) -> int:
    """The scores again, and the gradients of scores, values, queries and keys."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def convolution_gradient_flops(grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
                               mask, **more) -> int:
    """Each gradient, of the input and of the weight, costs what the convolution does."""
    return (mask[0] + mask[1]) * conv_flop_count(x.shape, weight.shape, grad.shape, transposed)


def reading_flops(maps, grid, *rest, **more) -> int:
    """Four weighted neighbours of every value that is read. maps (N, C, H, W), grid (N, h, w, 2)."""
    return 8 * maps.shape[1] * grid.shape[:-1].numel()


def reading_gradient_flops(grad, maps, grid, *rest, **more) -> int:
    """The four neighbours' gradients, and the place's along both axes."""
    return 3 * reading_flops(maps, grid)


FLOPS = {
    aten.mm: product_flops,
    aten.addmm: lambda bias, *matrices, **more: product_flops(*matrices),
    aten._sparse_addmm: lambda bias, *matrices, **more: product_flops(*matrices),
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_gradient_flops,
    aten.convolution_backward: convolution_gradient_flops,
    aten.grid_sampler_2d: reading_flops,
    aten.grid_sampler_2d_backward: reading_gradient_flops,
}


class Counting(TorchDispatchMode):
    """Adds up `flops` and `bytes` of the operators that run inside, also in backward passes and custom functions, and
    the `scores` of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()                # of each operator
        self.bytes = self.scores = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = f"aten::{packet.__name__}"
        if packet in FLOPS:
            self.flops[name] += FLOPS[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.flops[name] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        if "attention" in name:
            query, key = args["backward" in name:][:2]
            self.scores += query.shape[:-1].numel() * key.shape[-2]
        if not func.is_view and packet is not aten._unsafe_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(tensor_bytes(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        return out


def tensor_bytes(tensor: torch.Tensor) -> int:
    if tensor.is_sparse:
        return tensor._nnz() * (tensor.element_size() + 8 * tensor.sparse_dim())
    return tensor.numel() * tensor.element_size()


def count(call: Callable) -> Counting:
    with Counting() as counter:
        call()
    return counter


# -- measuring ---------------------------------------------------------------------------------------------------------

def seconds_of(call: Callable, device: torch.device) -> float:
    started = clock(device)
    call()
    return clock(device) - started


def product_rate(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...]) -> float:
    """FLOP a second of products of square matrices, the most of these sizes."""
    rates = []
    for side in sides:
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        calls = max(1, 2**31 // (2 * side**3))              # small ones are over before a clock has seen them
        seconds = seconds_of(lambda: [torch.mm(matrix, matrix) for _ in range(calls)], device)  # noqa: B023
        rates.append(2 * side**3 * calls / seconds)
    return max(rates)


def exponential_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Exponentials a second of numbers that stay in a cache; on a GPU of so many that it is busy, in its memory."""
    numbers = torch.linspace(-8, 0, 2**26 if device.type == "cuda" else 2**13, device=device, dtype=dtype)
    out, calls = torch.empty_like(numbers), 1 if device.type == "cuda" else 500
    return calls * len(numbers) / seconds_of(lambda: [torch.exp(numbers, out=out) for _ in range(calls)], device)


def operator_times(call: Callable, device: torch.device, seconds: float) -> Counter:
    """{operator: its share of one call}, without what it calls; BETWEEN: the rest of the time.

    seconds: of a call without the profiler; on a GPU what no kernel fills of it.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function("call"):
        seconds_of(call, device)                            # which waits for a GPU
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = Counter()
    for event in profile.key_averages():
        if event.device_type == torch.profiler.DeviceType.CPU:              # kernels also stand there by themselves
            times[event.key if event.key.startswith("aten::") else BETWEEN] += getattr(event, which) / 1e6
    if cuda:
        times[BETWEEN] += max(0.0, seconds - times.total())
    total = times.total()
    return Counter({name: value / total for name, value in times.items()})


def group_of(name: str) -> str:
    if name == BETWEEN:
        return BETWEEN
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other operators")


class Measured(NamedTuple):
    """Of a step or a prediction: {operator: FLOP}, bytes, the ratios to the peak, the shares of the time that moving
    all bytes and the exponentials of attention would take, {operator: share of the time}."""

    operator_flops: Counter
    bytes: int
    shares: list[float]
    moving: float
    exponentials: float
    operators: Counter

    @property
    def flops(self) -> int:
        return self.operator_flops.total()

    @property
    def share(self) -> float:
        return statistics.median(self.shares)

    def groups(self) -> Counter:
        groups = Counter()
        for name, share in self.operators.items():
            groups[group_of(name)] += share
        return groups

    def rest(self) -> str:
        """The four longest groups besides the products."""
        groups = self.groups()
        del groups[MATRIX]
        return ", ".join(f"{name} {share:.0%}" for name, share in groups.most_common(4) if share > 0.02)

    def cells(self) -> str:
        """FLOP, GB, share of the peak, moving, products, exponentials, rest."""
        products = self.groups()[MATRIX]
        part = sum(flops for name, flops in self.operator_flops.items() if group_of(name) == MATRIX) / self.flops
        rate = f" at {self.share * part / products:.0%}" if products else ""
        return (f"{self.flops / 1e9:.3g} | {self.bytes / 1e9:.2g} | **{self.share:.0%}** ({min(self.shares):.0%} to "
                f"{max(self.shares):.0%}) | {self.moving:.0%} | {products:.0%}{rate} | {self.exponentials:.0%} | "
                f"{self.rest()} |")

    def longest(self, number: int) -> str:
        """A line for each of the longest operators; of those whose FLOP are known, how much of the peak they reach."""
        lines = []
        for name, share in self.operators.most_common(number):
            reached = self.share * self.operator_flops[name] / self.flops / share if share else 0
            lines.append(f"    {share:6.1%} {name}" + (f", at {reached:.0%} of the peak" if reached else ""))
        return "\n".join(lines)

    def summary(self) -> str:
        return f"{self.share:.0%} ({self.flops / 1e9:.3g} GFLOP; {self.rest()})"


def measure(calls: dict[str, Callable], device: torch.device, dtype: torch.dtype, repeats: int,
            tiny: bool) -> dict[str, Measured]:
    """Peak, memory and calls by turns, then a call of each under the profiler."""
    sides = (256,) if tiny else (1024, 2048) if device.type == "cpu" else (4096, 8192)
    counts = {name: count(call) for name, call in calls.items()}
    for call in calls.values():                             # the counter changes which kernels are warm
        call()
    data = torch.ones(2**20 if tiny else 2**26, device=device)
    copy = torch.empty_like(data)
    product_rate(device, dtype, sides)
    shares, moving, exponentials, seconds = ({name: [] for name in calls} for _ in range(4))
    for _ in range(repeats):
        for name, call in calls.items():
            peak = product_rate(device, dtype, sides)
            bandwidth = 2 * data.nbytes / seconds_of(lambda: copy.copy_(data), device)
            rate = exponential_rate(device, dtype)
            took, counted = seconds_of(call, device), counts[name]
            seconds[name].append(took)
            shares[name].append(counted.flops.total() / took / peak)
            moving[name].append(counted.bytes / bandwidth / took)
            exponentials[name].append(counted.scores / rate / took)
    return {name: Measured(counts[name].flops, counts[name].bytes, shares[name], statistics.median(moving[name]),
                           statistics.median(exponentials[name]),
                           operator_times(call, device, statistics.median(seconds[name])))
            for name, call in calls.items()}


# -- the tables --------------------------------------------------------------------------------------------------------

def give_memory_back() -> None:
    """What the C library does by itself once it has met large tensors: larger ones are mappings of their own."""
    set_malloc({M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20})


def keep_memory() -> None:
    """MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1: what is freed waits for the next tensor."""
    set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def set_malloc(values: dict[int, int]) -> None:
    for parameter, value in values.items():
        ctypes.CDLL(None).mallopt(parameter, value)
    trim_memory()


def speedup(calls: dict[str, Callable], settings: Sequence[Callable], repeats: int) -> str:
    """Wall-clock of a call after the first of two settings over that after the second, by turns."""
    cells = []
    for call in calls.values():
        ratios = []
        for _ in range(repeats):
            seconds = []
            for setting in settings:
                setting()
                call()                                      # warms up
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return " | ".join(cells) + " |"


def main(argv=None) -> dict[str, dict[str, Measured]]:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    amp_dtype, _ = amp_settings(device, args.amp_dtype)
    dtype = amp_dtype or torch.float32
    print(f"{describe(device)}, {dtype}, PyTorch {torch.__version__}, median of {args.repeats}\n", flush=True)
    settings = ()
    if args.speedup:
        settings = [functools.partial(torch.set_num_threads, count) for count in (1, args.speedup)]
        print(f"| | step, {args.speedup} threads over one | prediction |\n|---|---|---|", flush=True)
    elif args.kept:
        settings = [give_memory_back, keep_memory]
        print("| | step, given back over kept | prediction |\n|---|---|---|", flush=True)
    else:
        print("| | GFLOP | GB | share of the peak | moving GB | products | exp | the rest of the time |\n"
              + "|---" * 8 + "|", flush=True)
    found = {}
    for row in args.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            calls = build(row, args.tiny, device, amp_dtype, folder)
            if settings:
                print(f"| {row} | {speedup(calls, settings, args.repeats)}", flush=True)
                continue
            found[row] = measure(calls, device, dtype, args.repeats, args.tiny)
        for name, measured in found[row].items():
            print(f"| {row}, {name} | {measured.cells()}", flush=True)
            if args.operators:
                print(measured.longest(args.operators), flush=True)
    return found


if __name__ == "__main__":
    run_main(main)
