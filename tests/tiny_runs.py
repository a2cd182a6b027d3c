"""One tiny run per training script, seconds long on one core, for tests that kill it, split it over processes and feed it with rubbish.

    run = tiny_run("sonata", tmp_path, epochs=3)                        # writes tmp_path/sonata, where it is not there yet
    done = run_forked(run, tmp_path / "out", "--resume", "auto")        # in a child of this process: done.code, .stdout, .stderr
    subprocess.run([sys.executable, *run.command(tmp_path / "out")], cwd=ROOT)    # in a process of its own, also under torchrun

The networks of three scripts are smaller than their names say; `shrink` makes them so. Hence this file is also a program, which does
that and then runs the script named by its first argument, as if it had been started itself.
"""

import functools
import importlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

import models.dinov3 as dinov3
import models.unet
from models.resnet import ENCODERS, BasicBlock, ResNet
from tests.tiny_clouds import ENCODER, write_clouds
from tests.tiny_clouds import write_classes as write_cloud_classes
from tests.tiny_heads import SMALL
from tests.tiny_images import TINY, write_classes, write_pictures
from tests.tiny_meshes import CLASSES, write_set
from utils.checkpoint import load_checkpoint
from utils.cli import run_main

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("downstream", "jepa", "m2f_head", "upernet_head", "linear_head", "pmt_head", "eomt", "sonata", "segmentation", "prototype")
LOG = {"log_interval": 1, "tensorboard": False}
MESH_MODEL = {"n_classes": 3, "features": ["normal", "area"], "embedding_dim": 16, "num_heads": 2, "num_attention_blocks": 2,
              "faces_per_cluster": 16, "encoder_dropout": 0.1}
CONFIGS = {                                        # DATA stands for the folder with the data
    "downstream": {"paths": {"mesh_dir": "DATA/train", "val_mesh_dir": "DATA/val", "test_mesh_dir": "DATA/test"},
                   "data": {"class_names": CLASSES}, "model": MESH_MODEL, "optimizer": {"learning_rate": 0.01},
                   "augmentation": {"mode": "z", "scale_range": [0.9, 1.1], "recluster": True},
                   "checkpointing": {"save_interval": 1, "save_top_k": 1}, "logging": LOG},
    "jepa": {"paths": {"mesh_dir": "DATA/train", "val_mesh_dir": "DATA/val"},
             "model": {**MESH_MODEL, "num_attention_blocks_predictor": 1}, "scheduler": {"warmup_epochs": 0.5},
             "optimizer": {"learning_rate": 0.005}, "augmentation": {"mode": "z", "scale_range": [0.9, 1.1]},
             "monitor": {"stop": False}, "probe": {"interval": 1}, "checkpointing": {"save_interval": 1}, "logging": LOG},
    "sonata": {"data": {"root": "DATA", "grid_size": 0.05}, "model": {"mode": "ft", "num_classes": 3, "encoder": ENCODER},
               "training": {"use_pretrained": False}, "optimizer": {"lr": 0.004, "block_lr": 0.002}, "evaluation": {"precise": False},
               "augmentation": {"elastic": [[0.2, 0.05]]}, "checkpointing": {"save_interval": 1}, "logging": LOG},
    "segmentation": {"dataset": {"root": "DATA", "num_classes": 3, "image_size": 64},
                     "augmentations": {"scale_range": [0.8, 1.4], "color_jitter": {"brightness": 0.2}},
                     "model": {"backbone": "resnet18", "dropout": 0.1}, "training": {"ema": 0.9, "amp": False},
                     "checkpointing": {"save_interval": 1, "save_top_k": 1}, "logging": {"log_every_n_steps": 1, "tensorboard": False}},
    "prototype": {"dataset": {"root": "DATA", "window_size": [41, 49]},
                  "model": {"num_classes": 3, "prototype_shape": [12, 8, 1, 1], "weights": "random", "n_blocks": [1, 1, 1, 1],
                            "base_width": 8, "freeze_bn": False},
                  "training": {"accumulate": 1, "prune": True, "prune_neighbors": 3, "prune_threshold": 1},
                  "optimizer": {key: 3e-3 for key in ("backbone_lr", "aspp_lr", "prototype_lr", "last_layer_lr", "finetune_lr")},
                  "evaluation": {"interval": 3}, "logging": LOG}}
CACHE_DIR = {"downstream": "paths.cache_dir=", "jepa": "paths.cache_dir=", "sonata": "paths.cache_dir=", "segmentation": "dataset.cache_dir=",
             "prototype": "dataset.cache_dir=", "m2f_head": "--cache-dir=", "upernet_head": "--cache-dir=", "linear_head": "--cache-dir=",
             "pmt_head": "--cache-dir=", "eomt": "--cache-dir="}


class TinyRun(NamedTuple):
    script: str                                    # such as train_sonata.py
    arguments: list[str]                           # all but --output-dir and --resume
    data: Path                                     # the folder with train, val and test, or images/train, masks/train ...

    def argv(self, out: str | Path, *more) -> list[str]:
        return [*self.arguments, "--output-dir", str(out), *map(str, more)]

    def command(self, out: str | Path, *more) -> list[str]:
        """What follows `python`, or `torchrun --standalone ...`, to run it in a process of its own; in the folder ROOT."""
        return ["-m", "tests.tiny_runs", self.script, *self.argv(out, *more)]


def tiny_run(name: str, folder: Path, epochs: int = 2, batch_size: int = 2, workers: int = 0, cache: Path | None = None) -> TinyRun:
    """The run `name` of NAMES on 6 training and 2 or 3 validation items made in folder/NAME, with its config (if any) in config.yaml.

    epochs: passes over the training items; train_sonata.py counts evaluations of one pass each, train_prototype.py half an epoch of
    warm-up and of each fine-tuning to one of joint training, each of 3 steps. cache: where what is prepared is kept, default folder/NAME/cache.
    """
    root = Path(folder) / name
    data = root / "data"
    if not data.exists():
        write_data(name, data)
    more = ["--device", "cpu", "--num-workers", str(workers), f"{CACHE_DIR[name]}{cache or root / 'cache'}"]
    script = f"train_{name}.py"
    if name in CONFIGS:
        text = yaml.safe_dump(CONFIGS[name]).replace("DATA", str(data))
        (root / "config.yaml").write_text(text)
        sizes = {"sonata": [f"training.epochs={epochs}", f"training.eval_epochs={epochs}"],
                 "prototype": [f"training.steps=[{3 * epochs // 2},{3 * epochs},{3 * epochs // 2}]"]}
        more += sizes.get(name, [f"training.epochs={epochs}"])
        return TinyRun(script, [str(root / "config.yaml"), *more, f"training.batch_size={batch_size}"], data)
    splits = [word for flag, split in (("", "train"), ("val-", "val"), ("test-", "test"))
              for word in (f"--{flag}image-paths", f"{data}/{split}/images", f"--{flag}mask-paths", f"{data}/{split}/masks")]
    return TinyRun(script, [*splits, "--validate", "--num-classes", "3", "--classes", f"{data}/classes.json", "--backbone", "tiny",
                            "--backbone-weights", "random", "--image-size", "64", "--eval-stride", "64", "--log-interval", "1",
                            "--save-interval", "1", *SMALL[f"train_{name}"], "--epochs", str(epochs), "--batch-size", str(batch_size), *more], data)


def write_data(name: str, data: Path) -> None:
    """6 training, 2 (meshes and clouds: 3) validation and 2 test items; whole or not at all."""
    part = data.with_name("part")
    shutil.rmtree(part, ignore_errors=True)
    splits = (("train", 6, 0), ("val", 2, 100), ("test", 2, 200))
    for split, count, first in splits:
        if name in ("downstream", "jepa"):
            write_set(part / split, 3 if split == "val" else count, first)
        elif name == "sonata":
            write_clouds(part / split, 3 if split == "val" else count, first, points=200)
        elif f"train_{name}" in SMALL:
            write_pictures(part / split, count, first)
        else:
            write_pictures(part / split, count, first, (48, 64) if name == "prototype" else (64, 64))
            for kind in ("images", "masks"):
                (part / kind).mkdir(exist_ok=True)
                (part / split / kind).rename(part / kind / split)
            (part / split).rmdir()
    if name == "sonata":
        write_cloud_classes(part)
    elif name not in ("downstream", "jepa"):
        write_classes(part / "classes.json")
    part.rename(data)


def shrink() -> None:
    """`--backbone tiny` becomes known, resnet18 and the decoder of the U-Net small, in this process for good."""
    dinov3.BACKBONES["dinov3_tiny"] = TINY
    ENCODERS["resnet18"] = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), width=8)
    models.unet.DECODER_CHANNELS = (32, 16, 16, 8, 8)


# -- a run in a child of this process: no second of importing torch ----------------------------------------------------

class Forked:
    """A script that runs in a child; its output goes to files. `code` after wait(): the exit status, or minus the signal's number."""

    def __init__(self, run: TinyRun, out: str | Path, *more, hook: Callable[[], None] | None = None):
        self.folder = Path(f"{out}.child")
        self.folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        for module in (Path(run.script).stem, "torch._dynamo", "sklearn.metrics", "torch.utils.tensorboard"):
            importlib.import_module(module)                        # 2 s, which each child would need for itself
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            self._be_the_child(run, run.argv(out, *more), hook)

    def _be_the_child(self, run, argv, hook):
        status = 1
        try:
            os.setpgid(0, 0)                                       # Ctrl-C of the tests is not for it
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            torch.set_num_threads(1)                               # OpenMP's threads of the parent are not here
            sys.argv = [run.script, *argv]
            shrink()
            if hook is not None:
                hook()
            run_main(importlib.import_module(Path(run.script).stem).main)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def cpu_seconds(self) -> float:
        """What it has used up so far: a moment in its course that does not depend on what else the machine does."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        except OSError:
            return 0.0                                             # it has ended

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def signal(self, number: int) -> None:
        if self.running():
            os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> "Forked":
        """Until it has ended; TimeoutError, after killing it, where it does not."""
        end = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a run did not end in {timeout} s; its last words: {self.stdout[-500:]}{self.stderr[-500:]}")
            time.sleep(0.02)
        return self


def run_forked(run: TinyRun, out: str | Path, *more, hook: Callable[[], None] | None = None, timeout: float = 300) -> Forked:
    """`run` in a child process with one thread, until it ends: .code, .stdout, .stderr. hook is called in the child before the script:
    the place for patches, which stay there."""
    return Forked(run, out, *more, hook=hook).wait(timeout)


def start_pair(run: TinyRun, out: Path, *more, hook=None, world: int = 2) -> list[Forked]:
    """`run` in processes with the environment of torchrun, all writing to `out`, their output beside it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def join(rank):
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port)}
        if hook is not None:
            hook()

    return [Forked(run, f"{out}-{rank}", *more, "--output-dir", out, hook=functools.partial(join, rank)) for rank in range(world)]


def run_pair(run: TinyRun, out: Path, *more, hook=None, timeout: float = 300) -> list[Forked]:
    pair = start_pair(run, out, *more, hook=hook)
    try:
        for child in pair:
            child.wait(timeout)
    finally:
        for child in pair:
            child.signal(9)
    assert [child.code for child in pair] == [0, 0], pair[0].stderr[-2000:] + pair[1].stderr[-2000:]
    return pair


# -- what a run left ---------------------------------------------------------------------------------------------------

def last_checkpoint(out: str | Path, name: str = "model_last.pth") -> dict:
    return load_checkpoint(Path(out) / "model" / name)


def same_weights(a: str | Path, b: str | Path) -> bool:
    """Whether the last checkpoints of two run folders hold the same weights, to the last bit."""
    first, second = (last_checkpoint(out)["model"] for out in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def report(line: str) -> None:
    """Add a line such as `kills train_sonata.py: survived 25 of 25` to the summary of scripts/faults.sh, where it asks for one."""
    if path := os.environ.get("SEGHEADS_FAULTS_REPORT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


def report_tests(request, line: str) -> Iterator[None]:
    """The body of a module's fixture: `line` with the numbers of the module's tests that passed, and of all."""
    before = request.session.testsfailed
    yield
    count = sum(item.module is request.module for item in request.session.items)
    report(line.format(count - (request.session.testsfailed - before), count))


if __name__ == "__main__":
    shrink()
    sys.argv = sys.argv[1:]
    run_main(importlib.import_module(Path(sys.argv[0]).stem).main)
