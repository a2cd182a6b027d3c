"""Prototype segmentation: what its vectorised parts cost beside the literal loops they replace, with equal results.

    python benchmarks/bench_prototype.py kld       # divergence of prototypes, as for two 513 x 513 crops of Cityscapes

A part prints one line: milliseconds of both, best of --repeats rounds by turns, their ratio, and how far apart the
results are. Too far is an error.
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.cli import ArgumentParser, run  # noqa: E402
from utils.prototype_losses import prototype_divergence  # noqa: E402


def best_times(repeats, *functions):
    """[(seconds, result)] of each function: the shortest of `repeats` rounds in which they take turns."""
    results = [(float("inf"), None)] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            result = function()
            results[i] = min(results[i][0], time.perf_counter() - start), result
    return results


def pairwise_divergence(distances, label, class_identity):
    """The definition: mean over images, classes and pairs of prototypes, with two calls of kl_div for each pair."""
    values = []
    for image, cells in zip(distances, label, strict=True):
        for c in range(class_identity.shape[1]):
            if (inside := cells == c).sum() < 2:
                continue
            logs = [image[p][inside].log_softmax(0) for p in class_identity[:, c].nonzero()[:, 0]]
            for i, first in enumerate(logs):
                for second in logs[i + 1:]:
                    there = F.kl_div(first, second, reduction="sum", log_target=True)
                    back = F.kl_div(second, first, reduction="sum", log_target=True)
                    values.append((-(there + back) / 2).exp())
    return torch.stack(values).mean()


def kld(args):
    """Value and gradient at the paper's size: 19 classes of 10 prototypes, all classes in both images."""
    num_classes, per_class, side = (19, 10, 65) if not args.tiny else (4, 3, 9)
    torch.manual_seed(0)
    distances = torch.rand(2, num_classes * per_class, side, side) * 8
    label = torch.randint(0, num_classes, (2, side, side))
    identity = torch.eye(num_classes).repeat_interleave(per_class, 0)

    def matrices(leaf):
        total, count = prototype_divergence(leaf, label, identity)
        return total / count

    def measured(function):
        leaf = distances.clone().requires_grad_()
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    ours, loop = best_times(args.repeats, lambda: measured(matrices),
                            lambda: measured(lambda leaf: pairwise_divergence(leaf, label, identity)))
    (value, grad), (loop_value, loop_grad) = ours[1], loop[1]
    error, slope = float((value - loop_value).abs()), float((grad - loop_grad).abs().max() / loop_grad.abs().max())
    if not (error < 1e-6 and slope < 1e-4):
        raise RuntimeError(f"kld: the values differ by {error:.1e}, the gradients by {slope:.1e} of the largest")
    print(f"| kld | {1e3 * ours[0]:.1f} ms | pairwise loop {1e3 * loop[0]:.1f} ms | {loop[0] / ours[0]:.0f}x | "
          f"{error:.0e}, gradient {slope:.0e} of its largest |")
    return {"seconds": ours[0], "loop_seconds": loop[0], "error": error}


PARTS = {"kld": kld}


def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--tiny", action="store_true", help="a small size, to try the benchmark itself")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return PARTS[args.part](args)


if __name__ == "__main__":
    run(main)
