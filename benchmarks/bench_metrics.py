"""What one evaluated element costs in the confusion matrix: ours, torchmetrics, and scikit-learn given every pixel.

    python benchmarks/bench_metrics.py                       # half a minute on an idle CPU
    python benchmarks/bench_metrics.py --device cuda --repeats 20

Every method counts the same predictions and labels (int64, as argmax makes them; 10 % ignored) and must arrive at the
same matrix, or the benchmark fails. Columns: nanoseconds per element, the best of --repeats rounds in which the methods
take turns, and how many times as long as ours. torchmetrics (pip install torchmetrics) is not needed to use SegHeads;
without it its rows are skipped.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import confusion_matrix

sys.path.insert(0, str(Path(__file__).parents[1]))
from utils.cli import ArgumentParser
from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix

try:
    import torchmetrics
    from torchmetrics.classification import MulticlassConfusionMatrix
except ImportError:
    torchmetrics = None

CASES = [("8 images 512 x 512, 19 classes", (8, 512, 512), 19), ("8 images 512 x 512, 150 classes", (8, 512, 512), 150),
         ("a scan of 100,000 points, 20 classes", (100_000,), 20), ("a mesh of 4,000 faces, 8 classes", (4_000,), 8)]


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the best counts")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch; default: its own")
    return parser.parse_args(argv)


def methods(num_classes, device):
    """{name: function of (pred, label) -> (C, C) array}, each with the object its user would make once."""
    ours = ConfusionMatrix(num_classes, device=device)

    def run_ours(pred, label):
        ours.reset()
        ours.update(pred, label)
        return ours.counts

    def run_scikit_learn(pred, label):
        pred, label = pred.cpu().numpy().ravel(), label.cpu().numpy().ravel()
        keep = label != IGNORE_INDEX
        return confusion_matrix(label[keep], pred[keep], labels=np.arange(num_classes))

    functions = {"SegHeads": run_ours}
    if torchmetrics is not None:
        for name, checks in (("torchmetrics", True), ("torchmetrics, checks off", False)):
            metric = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE_INDEX, validate_args=checks).to(device)

            def run(pred, label, metric=metric):
                metric.reset()
                metric.update(pred, label)
                return metric.confmat

            functions[name] = run
    functions["scikit-learn, every element"] = run_scikit_learn
    return functions


def measure(shape, num_classes, device, repeats):
    """-> {method: best seconds} over `repeats` rounds in turns; raises where a matrix differs from ours."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, num_classes, shape, generator=generator)
    pred = torch.where(torch.rand(shape, generator=generator) < 0.7, label,
                       torch.randint(0, num_classes, shape, generator=generator))
    label[torch.rand(shape, generator=generator) < 0.1] = IGNORE_INDEX
    pred, label = pred.to(device), label.to(device)
    functions, best, expected = methods(num_classes, device), {}, None
    for _ in range(repeats + 1):                             # the first round warms up and compares the results
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            result = function(pred, label)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            if expected is None or name not in best:
                result = result.cpu().numpy() if isinstance(result, torch.Tensor) else result
                expected = result if expected is None else expected
                if not np.array_equal(result, expected):
                    raise RuntimeError(f"{name} counts another matrix than SegHeads")
                best[name] = float("inf")
            else:
                best[name] = min(best[name], seconds)
    return best


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    version = "not installed, skipped" if torchmetrics is None else torchmetrics.__version__
    print(f"{name}; torch {torch.__version__}; torchmetrics {version}; best of {args.repeats}")
    results = {}
    for title, shape, num_classes in CASES:
        best = measure(shape, num_classes, device, args.repeats)
        results[title] = {method: 1e9 * seconds / np.prod(shape) for method, seconds in best.items()}
        print(f"\n{title:<40}{'ns/element':>12}{'x ours':>10}")
        for method, cost in results[title].items():
            print(f"  {method:<38}{cost:>12.2f}{cost / results[title]['SegHeads']:>10.1f}")
    return results


if __name__ == "__main__":
    main()
