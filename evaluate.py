"""Score a checkpoint of any train_*.py on a labelled split: a table, metrics.json and a report.

    python evaluate.py exp/downstream/model/model_best.pth   # test split, or validation without one
    python evaluate.py CHECKPOINT --split val
    python evaluate.py CHECKPOINT --data-dir MESHES --label-dir LABELS     # other data of the kind
    python evaluate.py CHECKPOINT paths.test_mesh_dir=datasets/new/test evaluation.views=8
    python evaluate.py CHECKPOINT --data-dir images/test --label-dir masks/test evaluation.tta=true
    torchrun --nproc_per_node=4 evaluate.py CHECKPOINT

A checkpoint names the script that wrote it. That script, which must lie in this folder as
train_*.py, does the scoring with the same `evaluate` as in training, so the numbers cannot differ.
This file knows no method.
"""

from __future__ import annotations

import utils.before_torch  # noqa: F401  answers --help and mistakes in the command line

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from utils.checkpoint import check_writable, load_checkpoint
from utils.cli import ArgumentParser, AtLeast, run_main
from utils.config import override_config
from utils.device import AMP_DTYPES, amp_settings, describe, environment, slow_dtype
from utils.distributed import cleanup, is_main, join
from utils.log import read_log, shortened
from utils.metrics import metrics_table, single_numbers
from utils.report import write_report
from utils.weights import sha256_file

CHECKPOINT_FIRST = "name the checkpoint first, without a flag"
CONFIG_INSIDE = "leave it out: the checkpoint holds its config, section.key=value changes it"
# Flags of other programs.
INSTEAD = {"--checkpoint": CHECKPOINT_FIRST, "--options": CHECKPOINT_FIRST,
           "--config": CONFIG_INSIDE, "--config-file": CONFIG_INSIDE}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__, instead=INSTEAD)
    # data
    parser.add_argument("checkpoint", help="file written by a train_*.py of this folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the config in the checkpoint")
    parser.add_argument("--split", choices=("val", "test"),
                        help="default: test where the config names one, else val")
    parser.add_argument("--data-dir", help="score this folder instead of a split of the config")
    parser.add_argument("--label-dir", help="labels of --data-dir; default: beside the data")
    parser.add_argument("--num-workers", type=AtLeast(0), default=0,
                        help="loader processes; 0 loads in the main process")
    # evaluation
    parser.add_argument("--batch-size", type=AtLeast(1), default=8)
    parser.add_argument("--limit-batches", type=AtLeast(0), default=0, metavar="N",
                        help="only N batches; 0: all")
    parser.add_argument("--examples", type=AtLeast(0), default=6, metavar="N",
                        help="pictures of the N worst and N best in the report")
    # run
    parser.add_argument("--output-dir", help="default: the folder `evaluation` of the run")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: the best there is")
    parser.add_argument("--amp-dtype", choices=tuple(AMP_DTYPES),
                        help="default: bfloat16 on CUDA and, where the CPU computes in it, for "
                             "what was trained so; else float32")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def script_of(checkpoint: dict, path: str | Path) -> ModuleType:
    """The module train_*.py that wrote a checkpoint. ValueError for every other name, and where
    that script is gone."""
    name = str(checkpoint["script"])
    here = Path(__file__).resolve().parent
    if not re.fullmatch(r"train_[A-Za-z0-9_]+\.py", name) or not (here / name).is_file():
        raise ValueError(f"{path}: written by {name!r}, and there is no such train_*.py beside "
                         f"{Path(__file__).name}; put the script there")
    return importlib.import_module(name.removesuffix(".py"))


def load(path: str, overrides, device: torch.device):
    """(script, model, checkpoint) of a checkpoint file, with `overrides` applied to the config
    inside."""
    checkpoint = load_checkpoint(path)
    script = script_of(checkpoint, path)
    if not hasattr(script, "predict"):
        raise ValueError(f"{path}: {checkpoint['script']} trains an encoder; it has no classes to "
                         f"score or predict")
    config = override_config(checkpoint["config"], script.DEFAULTS, overrides)
    script.check_config(config)
    checkpoint["config"] = config.to_dict()
    return script, script.load_model(checkpoint, device), checkpoint


def gather_examples(model, script, dataset, result, count) -> list[dict]:
    """The worst and the best, with pictures, for the report."""
    kept = [example for example in result["examples"] if example[0] in result["predictions"]]
    ranked = sorted((example for example in kept if np.isfinite(example[2])),
                    key=lambda example: example[2])
    chosen = ranked if len(ranked) <= 2 * count else ranked[:count] + ranked[-count:]
    examples = []
    for index, name, score in chosen:
        truth, pred = script.example_pictures(model, dataset, index, result["predictions"][index])
        examples.append({"name": name, "score": score, "truth": truth, "pred": pred,
                         "caption": f"mIoU {100 * score:.1f}"})
    return examples


def print_scores(result: dict, class_names: list[str]) -> None:
    print(f"{metrics_table(result['metrics'], class_names)}")
    for name, other in result["tables"].items():
        print(f"\n{name}: overall accuracy {100 * other['overall_accuracy']:.2f}, mIoU "
              f"{100 * other['miou']:.2f}, mean F1 {100 * other['mean_f1']:.2f}, mean accuracy "
              f"{100 * other['mean_accuracy']:.2f}")
    for title, values in result.get("extra", {}).items():   # numbers only this method has
        numbers = ", ".join(f"{name} {show_number(value)}" for name, value in values.items())
        print(f"\n{title}: {numbers}")


def record_of(args, what: str, result: dict, model, dataset, checkpoint: dict, device) -> dict:
    """What metrics.json holds."""
    metrics = result["metrics"]
    per_class = {name: {key: float(metrics[key][c]) for key in ("iou", "f1", "accuracy")}
                 for c, name in enumerate(model.class_names)}
    return {"checkpoint": str(args.checkpoint), "sha256": sha256_file(args.checkpoint),
            "script": checkpoint["script"], "epoch": checkpoint.get("epoch"),
            "step": checkpoint.get("step"), "data": what, "files": len(dataset.files),
            "limit_batches": args.limit_batches, "seconds": result["seconds"],
            "device": describe(device), "loss": result["loss"], **single_numbers(metrics),
            "per_class": per_class,
            **{name: single_numbers(other) for name, other in result["tables"].items()},
            **result.get("extra", {}), "confusion_matrix": result["matrix"].tolist(),
            "config": checkpoint["config"], "environment": environment()}


def facts_of(record: dict, result: dict, checkpoint: dict) -> list[tuple]:
    """The lines at the top of the report."""
    encoder = checkpoint.get("encoder") or {"file": "trained with the head"}
    facts = [("checkpoint", record["checkpoint"]), ("sha256", record["sha256"][:16]),
             ("epoch", record["epoch"]), ("encoder", encoder["file"] or "random weights"),
             ("data", record["data"]), ("files", record["files"]),
             ("elements", int(result["matrix"].sum())),
             ("time", f"{result['seconds']:.1f} s on {record['device']}")]
    for name, other in result["tables"].items():
        facts.append((name, f"accuracy {100 * other['overall_accuracy']:.2f}, mIoU "
                            f"{100 * other['miou']:.2f}"))
    for values in result.get("extra", {}).values():
        facts += [(name, show_number(value)) for name, value in values.items()]
    return facts


def main(argv=None) -> dict:
    args = parse_args(argv)
    if args.data_dir and args.split:
        raise ValueError("--split and --data-dir: name one of them, a split of the config or other "
                         "data")
    if args.label_dir and not args.data_dir:
        raise ValueError("--label-dir names the labels of --data-dir; the labels of a split are "
                         "named in the config")
    device, _, _ = join(args.device)
    script, model, checkpoint = load(args.checkpoint, args.overrides, device)
    amp_dtype, _ = amp_settings(device, args.amp_dtype or "native", checkpoint)
    if is_main():
        for line in slow_dtype(device, amp_dtype):
            print(line, flush=True)
    split = args.split or ("test" if script.has_test_split(model.config) else "val")
    run_folder = Path(args.checkpoint).resolve().parent.parent
    output = Path(args.output_dir) if args.output_dir else run_folder / "evaluation"
    check_writable(output)
    dataset = script.build_dataset(model.config, split, data_dir=args.data_dir,
                                   label_dir=args.label_dir)
    if is_main():
        for note in shortened(dataset.notes):
            print(note, flush=True)
    result = script.evaluate(model, dataset, device, amp_dtype, args.batch_size, args.num_workers,
                             args.limit_batches)
    if is_main():
        what = args.data_dir or f"{split} split"
        print(f"{args.checkpoint} on {what}: {len(dataset.files)} files; means over the classes "
              f"that occur\n")
        print_scores(result, model.class_names)
        record = record_of(args, what, result, model, dataset, checkpoint, device)
        examples = gather_examples(model, script, dataset, result, args.examples)
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.json").write_text(json.dumps(without_nan(record), indent=1) + "\n",
                                             encoding="utf-8")
        log_path = run_folder / "log" / "log.jsonl"
        write_report(output / "report.html", f"{checkpoint['script']} on {what}",
                     model.class_names, model.palette, result["metrics"], result["matrix"],
                     read_log(log_path) if log_path.is_file() else [], examples,
                     facts_of(record, result, checkpoint))
        print(f"\nwrote {output / 'metrics.json'} and {output / 'report.html'}")
    cleanup()
    return single_numbers(result["metrics"])


def show_number(value) -> str:
    """A number, or the mean and range of several."""
    if not isinstance(value, list | tuple | np.ndarray | torch.Tensor):
        return f"{value:.4g}"
    value = np.asarray(value, dtype=np.float64)
    if not value.size:
        return "none"
    return f"{np.nanmean(value):.3g} ({np.nanmin(value):.3g} to {np.nanmax(value):.3g})"


def without_nan(value):
    """The same JSON tree with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


if __name__ == "__main__":
    run_main(main)
