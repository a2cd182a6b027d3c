"""Prototype segmentation: what its vectorised parts cost beside the literal loops they replace, with equal results.

    python benchmarks/bench_prototype.py kld       # divergence of prototypes, as for two 513 x 513 crops of Cityscapes
    python benchmarks/bench_prototype.py push      # nearest patches in 8 photographs of CamVid's size
    python benchmarks/bench_prototype.py model     # the full-size network: parameters, file, a joint step on 513 x 513

kld and push print one line: milliseconds of both, best of --repeats rounds by turns, their ratio, and how far apart the
results are. Too far is an error. With one thread they are CPU time, which other work disturbs little, else wall-clock.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_prototype as script  # noqa: E402
from models.prototype_push import PushTable  # noqa: E402
from utils.cli import ArgumentParser, run_main  # noqa: E402
from utils.config import Config, load_config  # noqa: E402
from utils.device import autocast, describe, pick_device  # noqa: E402
from utils.losses import IGNORE_INDEX, MaskedCrossEntropyLoss  # noqa: E402
from utils.prototype_losses import prototype_divergence  # noqa: E402


def best_times(repeats, *functions):
    """[(seconds, result)] of each function: the shortest of `repeats` rounds in which they take turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    results = [(float("inf"), None)] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = clock()
            result = function()
            results[i] = min(results[i][0], clock() - start), result
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


def pixel_loop(images, owners):
    """Per prototype (distance, image, row, column): the cells of each class a pixel at a time, as published."""
    best = [(float("inf"), -1, -1, -1)] * len(owners)
    for index, (_, distances, label) in enumerate(images):
        (H, W), (h, w) = label.shape, distances.shape[1:]
        cells = [set() for _ in range(max(owners) + 1)]
        for y in range(H):
            for x in range(W):
                if (c := int(label[y, x])) != IGNORE_INDEX:
                    cells[c].add((int(y / (H / h)), int(x / (W / w))))
        for p, c in enumerate(owners):
            for row, column in sorted(cells[c]):
                if (distance := float(distances[p, row, column])) < best[p][0]:
                    best[p] = distance, index, row, column
    return best


def push(args):
    """Filling the table from features and distances that are there; the network's own time is in neither."""
    (H, W), grid, side, count = ((360, 480), (46, 61), 24, 8) if not args.tiny else ((33, 41), (5, 6), 4, 2)
    num_classes, per_class, channels = 11, 10, 64
    torch.manual_seed(0)
    identity = torch.eye(num_classes).repeat_interleave(per_class, 0)
    vectors, images = torch.rand(num_classes * per_class, channels), []
    for _ in range(count):
        features = torch.rand(channels, *grid)
        blocks = torch.randint(0, num_classes + 1, (H // side + 1, W // side + 1))
        label = torch.where(blocks < num_classes, blocks, IGNORE_INDEX).repeat_interleave(side, 0)
        distances = torch.cdist(vectors, features.flatten(1).T).square()                       # (P, h * w)
        images.append((features, distances.unflatten(1, grid), label.repeat_interleave(side, 1)[:H, :W].contiguous()))

    def scatter():
        table = PushTable(len(identity), channels)
        for index, image in enumerate(images):
            table.update(index, *image, identity)
        return table

    owners, arrays = identity.argmax(1).tolist(), [[part.numpy() for part in image] for image in images]
    ours, loop, quick = best_times(args.repeats, scatter, lambda: pixel_loop(images, owners),
                                   lambda: pixel_loop(arrays, owners))
    table, best = ours[1], loop[1]
    rows = zip(table.distance.tolist(), table.image.tolist(), *table.cell.T.tolist(), strict=True)
    if not (list(rows) == best == quick[1] and
            all(torch.equal(table.vector[p], images[i][0][:, y, x]) for p, (_, i, y, x) in enumerate(best))):
        raise RuntimeError("push: the tables differ")
    ms, loop_ms, quick_ms = (1e3 * seconds / count for seconds, _ in (ours, loop, quick))
    print(f"| push | {ms:.2f} ms an image | pixel loop {loop_ms:.0f} ms, {quick_ms:.0f} ms on NumPy arrays | "
          f"{loop_ms / ms:.0f}x, {quick_ms / ms:.0f}x | identical |")
    return {"seconds": ours[0], "loop_seconds": loop[0], "error": 0.0}


def model(args):
    """Forward, losses, backward and Adam on 2 crops; peak memory is the process's (CPU) or PyTorch's (CUDA)."""
    path = Path(__file__).resolve().parents[1] / "configs" / "prototype_cityscapes.yaml"
    tiny = ["model.n_blocks=[1,1,1,1]", "model.base_width=8", "dataset.window_size=[65,65]"] if args.tiny else []
    config: Config = load_config(path, script.DEFAULTS, ["model.weights=random", *tiny])
    device, criterion = pick_device(args.device), MaskedCrossEntropyLoss()
    dtype = torch.bfloat16 if args.bfloat16 else None
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    network = script.build_model(config).to(device)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(network.state_dict(), Path(folder, "model.pth"))
        size = Path(folder, "model.pth").stat().st_size / 2**20
    optimizer, _ = script.start_stage("joint", network, config, 10)
    script.set_train_mode(network, "joint", config)
    image = torch.randn(2, 3, *config.dataset.window_size, device=device)
    label = torch.randint(0, 19, (2, *config.dataset.window_size), device=device)

    def step():
        with autocast(device, dtype):
            outputs = network(image)
        script.compute_loss(criterion, network, outputs, label, config)["total"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()                                                  # Adam's averages and the libraries' buffers exist from here
    seconds = best_times(args.repeats, step)[0][0]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    height, width = config.dataset.window_size
    print(f"| model | {sum(p.numel() for p in network.parameters()):,} parameters, file {size:.0f} MiB | step of 2 x "
          f"{height} x {width}, {'bfloat16' if dtype else 'float32'}: {seconds:.2f} s, peak {peak:.2f} GiB | "
          f"{describe(device)}, {torch.get_num_threads()} thread(s) |")
    return {"seconds": seconds, "peak": peak}


PARTS = {"kld": kld, "push": push, "model": model}


def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", help="of `model`: cpu, cuda; default: the best there is")
    parser.add_argument("--bfloat16", action="store_true", help="autocast of `model`")
    parser.add_argument("--tiny", action="store_true", help="a small size, to try the benchmark itself")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return PARTS[args.part](args)


if __name__ == "__main__":
    run_main(main)
