"""Two versions of the project train the tiny runs; what they leave is compared entry by entry. For changes that must change nothing.

    python -m tests.compare_runs COMMIT                          # that commit against the files as they are here; 10 minutes
    python -m tests.compare_runs COMMIT --names sonata jepa --keep /tmp/runs

Each script trains undisturbed, with accumulated gradients, on two processes, and cut by a signal in the middle of an epoch; the cut run of
the old version is resumed by both. Compared are all checkpoint files but for `config`, and log.jsonl but for times. The entries of NEW may be
in one version's checkpoints alone; a line says so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.tiny_heads import SMALL
from tests.tiny_runs import NAMES, ROOT, tiny_run
from utils.checkpoint import load_checkpoint
from utils.log import read_log
from utils.training import Totals

ACCUMULATE = {"downstream": ["training.accumulation_steps=2"], "sonata": ["training.accumulation_steps=2"],
              "segmentation": ["training.accumulate_grad_batches=2"], "prototype": ["training.accumulate=3", "training.steps=[3,9,3]"],
              **{name: ["--accumulate", "2"] for name in NAMES if f"train_{name}" in SMALL}}
NEW = ("data", "amp_dtype")                        # entries that versions before issue 20 do not write
CUT = """
import importlib, os, signal, sys
sys.path.insert(0, os.getcwd())
import torch
from tests.tiny_runs import shrink
try:
    from utils.cli import run_main as run
except ImportError:                                # before it was called so
    from utils.cli import run
shrink()
step, count = torch.amp.GradScaler.step, []
def cut(self, *arguments):
    count.append(1)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *arguments)
torch.amp.GradScaler.step = cut
sys.argv = sys.argv[1:]
run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
"""


def start(tree: Path, words: list[str], out: Path, expected: int = 0) -> None:
    done = subprocess.run([sys.executable, *words], cwd=tree, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)})
    if done.returncode != expected:
        sys.exit(f"{tree}: {' '.join(words)[:200]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    (out / "stdout.txt").write_text(done.stdout)


def train(tree: Path, name: str, data: Path, out: Path, others_cut: Path | None) -> None:
    """All runs of a script in out/CASE."""
    cache = data / name / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    run = tiny_run(name, data, epochs=3, cache=cache)
    start(tree, run.command(out / "plain"), out)
    if name in ACCUMULATE:
        start(tree, run.command(out / "accumulated", *ACCUMULATE[name]), out)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start(tree, [*torchrun, *run.command(out / "two")], out)
    start(tree, ["-c", CUT, run.script, *run.argv(out / "cut")], out, expected=143)
    shutil.copytree(others_cut or out / "cut", out / "resumed")
    start(tree, run.command(out / "resumed", "--resume", "auto"), out)


def differences(first, second, where: str = "") -> list[str]:
    """The dotted places at which two trees of plain types and tensors differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = [f"{where}.{key} (in one alone)" for key in first.keys() ^ second.keys()]
        return found + [place for key in first.keys() & second.keys() for place in differences(first[key], second[key], f"{where}.{key}")]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [place for index, pair in enumerate(zip(first, second, strict=True)) for place in differences(*pair, f"{where}[{index}]")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [where]
    return [] if first == second or (first != first and second != second) else [where]


def content(path: Path) -> dict:
    """A checkpoint without its config; its totals in the present form, whichever version wrote them."""
    checkpoint = load_checkpoint(path)
    totals = Totals()
    totals.load_state_dict(checkpoint["totals"])
    return {**checkpoint, "config": None, "totals": totals.state_dict()}


def records(out: Path) -> list[dict]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in read_log(out / "log" / "log.jsonl")]


def compared(old: Path, new: Path) -> tuple[dict, dict, set[str]]:
    """Two checkpoint files without the entries of NEW that one alone has, and the names of those."""
    first, second = content(old), content(new)
    alone = {name for name in NEW if (name in first) != (name in second)}
    return *({name: value for name, value in entries.items() if name not in alone} for entries in (first, second)), alone


def compare(name: str, old: Path, new: Path) -> bool:
    same = True
    alone = set()
    for case in sorted(path.name for path in old.iterdir() if path.is_dir()):
        files = [sorted(path.name for path in (tree / case / "model").iterdir()) for tree in (old, new)]
        found = [f"files {files[0]} and {files[1]}"] if files[0] != files[1] else []
        for file in files[0] if not found else ():
            first, second, left_out = compared(*(tree / case / "model" / file for tree in (old, new)))
            found += [f"{file}{place}" for place in differences(first, second)]
            alone |= left_out
        found += [f"log.jsonl{place}" for place in differences(records(old / case), records(new / case))]
        print(f"{name:13} {case:12} {len(files[0])} files, {len(records(old / case))} lines: {'; '.join(found[:5]) or 'identical'}", flush=True)
        same &= not found
    if alone:
        print(f"{name:13} not compared, because one version alone writes them: {', '.join(sorted(alone))}", flush=True)
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--keep", type=Path, help="folder for the runs; those of the old version that it holds are used again")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    tree, same = folder / "tree", True
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), args.commit], cwd=ROOT, check=True, capture_output=True)
    for name in args.names:
        old, new = folder / "old" / name, folder / "new" / name
        if not (old / "resumed" / "model").exists():
            shutil.rmtree(old, ignore_errors=True)
            old.mkdir(parents=True)
            train(tree, name, folder / "data", old, None)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        train(ROOT, name, folder / "data", new, old / "cut")
        same &= compare(name, old, new)
    if args.keep is None:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
        shutil.rmtree(folder)
    sys.exit(0 if same else "the versions differ")


if __name__ == "__main__":
    main()
