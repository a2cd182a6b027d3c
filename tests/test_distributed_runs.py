"""Whole runs of several processes against one: `pytest -m slow tests/test_distributed_runs.py`; the cheapest of all run by default.

Most pairs of processes are forked from the tests (see Forked) with the environment that torchrun would give them; where a launcher has
something to do (deaths, signals, restarts, two machines), it is the real one.
"""

import contextlib
import functools
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import models.nomeformer
import models.pmt
import models.point_transformer
import models.upernet
import utils.image_inference
import utils.run
from tests.tiny_runs import (
    NAMES,
    ROOT,
    TinyRun,
    last_checkpoint,
    report,
    run_forked,
    run_pair,
    same_weights,
    start_pair,
    tiny_run,
)
from utils.distributed import world_size
from utils.log import read_log

# Runs that say the same in one process and in two: no dropout (a generator per process), no clouds mixed within a batch.
STILL = {"downstream": ["model.encoder_dropout=0", "model.drop_path=0"], "jepa": ["model.encoder_dropout=0", "model.drop_path=0"],
         "sonata": ["augmentation.mix_probability=0"]}
BOARD = {"segmentation": "logging.tensorboard=true", "downstream": "logging.tensorboard=true", "jepa": "logging.tensorboard=true",
         "sonata": "logging.tensorboard=true", "prototype": "logging.tensorboard=true"}
ACCUMULATE = {"downstream": "training.accumulation_steps=", "sonata": "training.accumulation_steps=", "prototype": "training.accumulate=",
              "segmentation": "training.accumulate_grad_batches=", "m2f_head": "--accumulate=", "upernet_head": "--accumulate=",
              "linear_head": "--accumulate=", "pmt_head": "--accumulate=", "eomt": "--accumulate="}
WEIGHTS = 1e-3                                     # of the largest weight of a tensor, after 4 to 12 steps in float32
HELD: dict[str, list[bool]] = {}                   # of each script: which equalities held, for the summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("data")
    for name, held in HELD.items():
        report(f"distributed train_{name}.py: held {sum(held)} of {len(held)} equalities")


def check(name: str, held, what: str) -> None:
    HELD.setdefault(name, []).append(bool(held))
    assert held, what


# -- two processes equal one -------------------------------------------------------------------------------------------

class SumOfAll(torch.autograd.Function):
    """The sum over the processes, which each of them can differentiate; the identity in one."""

    @staticmethod
    def forward(context, value):
        value = value.clone()
        if world_size() > 1:
            dist.all_reduce(value)
        return value

    backward = forward


def batch_norm_of_all(self, x):
    """What SyncBatchNorm does on GPUs; it has no CPU kernels."""
    if not self.training:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    dims = [0, *range(2, x.ndim)]
    count = SumOfAll.apply(torch.tensor(float(x[:, 0].numel())))
    mean = SumOfAll.apply(x.sum(dims, keepdim=True)) / count
    var = SumOfAll.apply((x - mean).square().sum(dims, keepdim=True)) / count
    with torch.no_grad():
        self.running_mean.lerp_(mean.flatten(), self.momentum)
        self.running_var.lerp_(var.flatten() * count / (count - 1).clamp(min=1), self.momentum)
        self.num_batches_tracked += 1
    shape = [1, -1] + [1] * (x.ndim - 2)
    return (x - mean) / (var + self.eps).sqrt() * self.weight.view(shape) + self.bias.view(shape)


def still() -> None:
    """In a child: nothing is drawn by a process for itself, and batch norm is that of the whole batch. AdamW's eps is raised, because a step
    in which it divides the rounding error of a gradient of 0 by itself is as large as any other."""
    F.dropout = F.dropout2d = lambda x, *_, **__: x
    for kind in (models.nomeformer.DropPath, models.point_transformer.PointDropPath):
        kind.forward = lambda self, x, *_: x
    nn.BatchNorm1d.forward = nn.BatchNorm2d.forward = models.upernet.BatchNorm2d.forward = batch_norm_of_all
    allowed_patches = models.pmt.allowed_patches
    models.pmt.allowed_patches = lambda masks, grid, _: allowed_patches(masks, grid, 1.0)      # annealing draws in each process
    torch.randperm = lambda count, **_: torch.arange(count)                                # orders of Point Transformer
    rand = torch.rand

    def fixed_points(*size, **more):                                                       # of a mask: (rows, points, 2)
        return torch.quasirandom.SobolEngine(2).draw(size[1]).expand(*size) if len(size) == 3 and size[2] == 2 else rand(*size, **more)

    torch.rand = fixed_points
    for optimizer in ("Adam", "AdamW"):
        setattr(torch.optim, optimizer, functools.partial(getattr(torch.optim, optimizer), eps=1e-3))


def odd_run(name: str, folder: Path, **sizes) -> TinyRun:
    """7 training and 3 validation items, so that two processes get unequal shares."""
    run = tiny_run(name, folder, **sizes)
    for split, count in (("train", 7), ("val", 3)):
        for kind in ("images", "masks"):
            for place in (run.data / split / kind, run.data / kind / split):
                files = sorted(place.glob("*.png"))
                for i in range(count - len(files) if files else 0):
                    shutil.copy(files[i], place / f"x{i}.png")
    return run


def curves(out: Path) -> list[dict]:
    """The numbers of every record of log.jsonl, but for times."""
    return [{key: value for key, value in record.items() if "second" not in key} for record in read_log(out / "log" / "log.jsonl")]


def distance(first: dict, second: dict) -> float:
    """The largest difference of a weight, relative to the largest weight of its tensor (at least 0.01: biases begin at 0)."""
    assert first.keys() == second.keys()
    return max((float((first[name].double() - second[name].double()).abs().max() / first[name].double().abs().max().clamp(min=1e-2))
                for name in first if first[name].numel()), default=0.0)


@pytest.fixture(scope="module")
def both(folder):
    """A function: name -> the folders of the same run in one process with the double batch and in two."""
    @functools.cache
    def make(name):
        run = odd_run(name, folder, batch_size=4)
        half = tiny_run(name, folder, batch_size=4 if name == "sonata" else 2)
        more = [*STILL.get(name, []), *([BOARD[name]] if name in BOARD else [])]
        # Lovasz-softmax is of the clouds of one process: two micro-batches of one process hold the same clouds.
        alone = ["training.batch_size=2", "training.accumulation_steps=2"] if name == "sonata" else []
        one, two = folder / name / "one", folder / name / "two"
        done = run_forked(run, one, *more, *alone, hook=still)
        assert done.code == 0, done.stderr
        run_pair(half, two, *more, hook=still)
        return one, two
    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one_with_the_double_batch(both, name):
    one, two = both(name)
    records = [curves(out) for out in (one, two)]
    losses = [[record["loss"] for record in part if "loss" in record] for part in records]
    difference = distance(last_checkpoint(one)["model"], last_checkpoint(two)["model"])
    check(name, losses[0] == pytest.approx(losses[1], rel=1e-5), f"losses {losses}")
    check(name, difference < WEIGHTS, f"weights differ by {difference}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rank_0_alone_writes(both, name):
    """As many records, checkpoints and TensorBoard files as of one process, and nothing set aside as an earlier run's."""
    def files(out):
        return sorted("events" if "tfevents" in path.name else str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())

    one, two = both(name)
    check(name, files(one) == files(two) and files(two).count("events") == 1, f"{files(one)} {files(two)}")
    lines = [[line.split()[2:5] for line in (out / "log" / "train.log").read_text().splitlines() if " step " in line] for out in (one, two)]
    check(name, [[words[1] for words in part] for part in lines] == [[words[1] for words in lines[0]]] * 2 and lines[0], f"{lines}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("jepa", "sonata")])
def test_accumulation_in_two_processes_equals_one(tmp_path, name):
    """Micro-batches of one photograph or mesh in each of two processes, and of two in one."""
    more = [*STILL.get(name, []), f"{ACCUMULATE[name]}2"]
    more += ["training.steps=[2,6,2]", "evaluation.interval=2"] if name == "prototype" else []
    more += ["--seed", "1"] if name == "segmentation" else []              # with 0, rounding moves one value across a ReLU's kink
    done = run_forked(tiny_run(name, tmp_path, batch_size=2), tmp_path / "one", *more, hook=still)
    assert done.code == 0, done.stderr
    run_pair(tiny_run(name, tmp_path, batch_size=1), tmp_path / "two", *more, hook=still)
    difference = distance(last_checkpoint(tmp_path / "one")["model"], last_checkpoint(tmp_path / "two")["model"])
    check(name, difference < WEIGHTS, f"weights differ by {difference}")
    records = [curves(tmp_path / which) for which in ("one", "two")]
    losses = [[record["loss"] for record in part if "loss" in record] for part in records]
    check(name, losses[0] == pytest.approx(losses[1], rel=1e-5), f"losses {losses}")


# -- evaluation --------------------------------------------------------------------------------------------------------

def scores(folder: Path) -> tuple[dict, dict]:
    """metrics.json: what follows from whole numbers, and what is a sum of fractions."""
    record = json.loads((folder / "metrics.json").read_text())
    for key in ("seconds", "environment", "device"):
        del record[key]
    fractions = {key: record.pop(key) for key in ("loss", "by area", "prototypes") if key in record}
    return record, fractions


def numbers(value) -> list[float]:
    values = value.values() if isinstance(value, dict) else value
    return [number for item in values for number in numbers(item)] if isinstance(value, dict | list) else [value]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "jepa"])
def test_evaluate_in_two_processes_scores_as_one_does(both, tmp_path, name):
    """3 items: one process has two of them. Also what training logged of them."""
    one, two = both(name)
    run = TinyRun("evaluate.py", [f"{two}/model/model_last.pth", "--split", "val", "--device", "cpu"], two)
    done = run_forked(run, tmp_path / "one", hook=still)
    assert done.code == 0, done.stderr
    pair = run_pair(run, tmp_path / "two", hook=still)
    alone, together = scores(tmp_path / "one"), scores(tmp_path / "two")
    check(name, alone[0] == together[0], f"{alone[0]} {together[0]}")
    check(name, numbers(alone[1]) == pytest.approx(numbers(together[1]), rel=1e-9, nan_ok=True), f"{alone[1]} {together[1]}")
    check(name, "wrote" in pair[0].stdout and pair[1].stdout == "", pair[1].stdout)
    logged = [record for record in curves(two) if record["split"] == "val"][-1]
    check(name, logged["miou"] == alone[0]["miou"], f"{logged['miou']} in training, {alone[0]['miou']} alone")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_test_only_in_two_processes(both, folder, tmp_path, name):
    _, two = both(name)
    run = tiny_run(name, folder, batch_size=4)
    more = [*STILL.get(name, []), "--resume", two / "model" / "model_last.pth", "--test-only"]
    done = run_forked(run, tmp_path / "one", *more)
    assert done.code == 0, done.stderr
    pair = run_pair(run, tmp_path / "two", *more)
    check(name, done.stdout == pair[0].stdout != "" and pair[1].stdout == "", done.stdout + pair[0].stdout + pair[1].stdout)
    assert not (tmp_path / "two").exists()


# -- checkpoints -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_pass_between_one_process_and_two(both, folder, tmp_path, name):
    """From the same checkpoint one process and two come to the same weights, whichever of them wrote it; two after two to the last bit."""
    def without_lovasz():                                    # of the clouds of one process: see `both`
        still()
        if name == "sonata":
            importlib.import_module("train_sonata").lovasz_softmax_loss = lambda logits, label: 0.0 * logits.sum()

    more, (one, two) = STILL.get(name, []), both(name)
    middle = "push.pth" if name == "prototype" else "checkpoint_epoch_1.pth"
    full, half = (tiny_run(name, folder, batch_size=size) for size in (4, 4 if name == "sonata" else 2))
    ends = {}
    for writer in (two,) if name == "sonata" else (one, two):
        again = [*more, "--resume", writer / "model" / middle]
        done = run_forked(full, tmp_path / f"{writer.name}-one", *again, hook=without_lovasz)
        assert done.code == 0, done.stderr
        run_pair(half, tmp_path / f"{writer.name}-two", *again, hook=without_lovasz)
        ends[writer.name] = [last_checkpoint(tmp_path / f"{writer.name}-{reader}")["model"] for reader in ("one", "two")]
        check(name, distance(*ends[writer.name]) < WEIGHTS, f"{writer.name}: {distance(*ends[writer.name])}")
    if name != "sonata":
        check(name, distance(ends["one"][1], last_checkpoint(one)["model"]) < WEIGHTS, "one, then two: not as one")
        check(name, distance(ends["two"][1], last_checkpoint(two)["model"]) == 0, "two, then two: not to the last bit")


# -- what is computed once ---------------------------------------------------------------------------------------------

CACHES = {"downstream": ["training.cache_features=true", "training.use_pretrained=false", "training.num_unfrozen_encoder_layers=0",
                         "augmentation.mode=none", "augmentation.recluster=false", "augmentation.scale_range=[1.0,1.0]"],
          **{name: ["--augment", "windows", "--cache-features"] for name in NAMES if name.endswith("_head")}}


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_features_are_cached_once_for_both(folder, tmp_path, name):
    """The same run without the cache, with an empty one and with a filled one: bit for bit the same."""
    run, ends, stored = odd_run(name, folder, cache=tmp_path / "cache"), [], []
    for more in ([word for word in CACHES[name] if "cache" not in word], CACHES[name], CACHES[name]):
        out = tmp_path / str(len(ends))
        pair = run_pair(run, out, *more, "--seed", "3")
        ends.append(last_checkpoint(out)["model"])
        stored.append([(path.name, path.stat().st_mtime_ns) for path in sorted((tmp_path / "cache").rglob("*")) if path.is_file()])
    check(name, distance(ends[0], ends[1]) == 0 == distance(ends[1], ends[2]), f"{distance(ends[0], ends[1])}")
    check(name, stored[1] == stored[2] and len(stored[1]) > len(stored[0]), f"{stored}")
    check(name, " read " in pair[0].stdout, pair[0].stdout)


# -- a process that ends ------------------------------------------------------------------------------------------------

def at_step(number: int, act, rank: int = 1):
    """A hook: before the given optimiser step of one of the processes, `act` is called."""
    def hook():
        count, step = [], utils.run.optimizer_step

        def act_and_step(*arguments):
            count.append(1)
            if len(count) == number and os.environ["RANK"] == str(rank):
                act()
            step(*arguments)
        utils.run.optimizer_step = act_and_step
    return hook


def kill_me(number: int) -> None:
    os.kill(os.getpid(), number)


def complain() -> None:
    raise ValueError("mask_3.png: label 7 is out of range")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """A function: name -> the run folder of two processes whom nothing happens, dropout included."""
    @functools.cache
    def make(name):
        out = folder / name / "undisturbed"
        run_pair(tiny_run(name, folder, epochs=3, batch_size=2), out)
        return out
    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act", ["error", "kill"])
def test_one_process_never_waits_for_another_that_has_ended(folder, tmp_path, name, act):
    """Without a launcher that would end it. In each of the scripts the other one says in one line why it ends."""
    hook = at_step(2, complain if act == "error" else functools.partial(kill_me, signal.SIGKILL))
    pair = start_pair(tiny_run(name, folder), tmp_path / "out", hook=hook)
    codes = [child.wait(120).code for child in pair]
    assert codes == [2, 2 if act == "error" else -9], pair[0].stderr
    assert pair[0].stderr.startswith("error: another process of this run has ended") and pair[0].stderr.count("\n") == 1
    if act == "error":
        assert re.fullmatch("error: .*mask_3.png: label 7 is out of range.*\n", pair[1].stderr)


@pytest.mark.slow
def test_evaluation_never_waits_for_a_process_that_has_ended(both, folder, tmp_path):
    """evaluate.py, and the early end of --test-only."""
    def breaks_off():
        if os.environ["RANK"] == "1":
            utils.image_inference.segment_dataset = lambda *_, **__: complain()

    _, two = both("upernet_head")
    last = f"{two}/model/model_last.pth"
    for run in (TinyRun("evaluate.py", [last, "--split", "val", "--device", "cpu"], two),
                tiny_run("upernet_head", folder)._replace(arguments=[*tiny_run("upernet_head", folder).arguments, "--test-only", "--resume", last])):
        pair = start_pair(run, tmp_path / run.script, hook=breaks_off)
        assert [child.wait(120).code for child in pair] == [2, 2], pair[0].stderr
        assert pair[0].stderr.startswith("error: another process") and "label 7 is out of range" in pair[1].stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sigterm_to_one_process_stops_both_after_the_same_step(folder, undisturbed, tmp_path, name):
    run = tiny_run(name, folder, epochs=3, batch_size=2)
    pair = start_pair(run, tmp_path / "out", hook=at_step(2, functools.partial(kill_me, signal.SIGTERM)))
    assert [child.wait(120).code for child in pair] == [143, 143], pair[0].stderr
    checkpoint = last_checkpoint(tmp_path / "out")
    assert checkpoint["step"] == 2 and all("saved; go on with" in child.stderr for child in pair)
    run_pair(run, tmp_path / "out", "--resume", "auto")
    check(name, same_weights(tmp_path / "out", undisturbed(name)), "stopped and resumed: not the weights of the run that was not")


@pytest.mark.slow
def test_a_signal_to_the_group_of_a_process_is_not_for_its_loader(folder, tmp_path):
    """torchrun sends it so: a loader process that died of it would break off the step, and with it the checkpoint. (From the parent's hand
    it would leave quietly.)"""
    hook = at_step(1, lambda: subprocess.run(["kill", "-TERM", "--", f"-{os.getpgid(0)}"]))
    pair = start_pair(tiny_run("segmentation", folder, batch_size=1, workers=1), tmp_path / "out", hook=hook)
    assert [child.wait(120).code for child in pair] == [143, 143], pair[1].stderr
    assert last_checkpoint(tmp_path / "out")["step"] == 1


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_are_told(folder, tmp_path):
    """A machine of its own data, and one that does not see the checkpoint of the others."""
    def other_files():
        if os.environ["RANK"] == "1":
            importlib.import_module("train_downstream").list_meshes = lambda *more: list_meshes(*more)[:-1]

    list_meshes = importlib.import_module("train_downstream").list_meshes
    run = tiny_run("downstream", folder)
    pair = start_pair(run, tmp_path / "out", hook=other_files)
    assert [child.wait(120).code for child in pair] == [2, 2] and "see 5 and 6 training items" in pair[0].stderr, pair[0].stderr
    assert run_forked(run, tmp_path / "first", "training.epochs=1", "training.batch_size=4").code == 0

    def other_folder():
        if os.environ["RANK"] == "1":
            utils.run.find_resume = lambda *_: (None, [])

    pair = start_pair(run, tmp_path / "first", "training.epochs=1", "--resume", "auto", hook=other_folder)
    assert [child.wait(120).code for child in pair] == [2, 2] and "go on from different steps (0, 2)" in pair[0].stderr, pair[0].stderr


# -- the launcher ------------------------------------------------------------------------------------------------------

def launch(command: list, *options, prefix=(), **environment) -> subprocess.Popen:
    """torchrun with two processes, its own words and theirs in one pipe."""
    start = [*prefix, sys.executable, "-m", "torch.distributed.run", *(options or ["--standalone", "--nproc_per_node=2"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([*start, *map(str, command)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of one of its two."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


def when_saved(out: Path, launcher: subprocess.Popen, seconds: float = 400) -> None:
    """Until the first checkpoint of `out` is there, and a little longer."""
    end = time.monotonic() + seconds
    while not (out / "model" / "model_last.pth").is_file():
        assert launcher.poll() is None and time.monotonic() < end, launcher.stdout.read()
        time.sleep(0.02)


def ended(launcher: subprocess.Popen, seconds: float = 400) -> tuple[int, str]:
    try:
        words, _ = launcher.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.returncode, words


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_process_is_started_again_and_the_run_goes_on(folder, undisturbed, tmp_path, name):
    run, options = tiny_run(name, folder, epochs=3, batch_size=2), ["--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    launcher = launch(run.command(tmp_path / "out", "--resume", "auto"), *options)
    when_saved(tmp_path / "out", launcher)
    os.kill(worker(launcher, rank=1), signal.SIGKILL)
    code, words = ended(launcher)
    assert code == 0, words
    check(name, "resuming from" in words and same_weights(tmp_path / "out", undisturbed(name)), words)


RESTARTED = """
import os, signal, time
from utils.distributed import all_reduce_sum, init_distributed
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if os.environ["RANK"] == "0" and not first:
    time.sleep(3)
init_distributed("cpu")
all_reduce_sum(1)
if os.environ["RANK"] == "1" and first:
    os.kill(os.getpid(), signal.SIGKILL)
print("joined", flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_restarted_process_does_not_call_a_dead_one(tmp_path):
    """Rank 1 is ready first after the restart, and finds the address that rank 0 had before it."""
    (tmp_path / "script.py").write_text(RESTARTED)
    code, words = ended(launch([tmp_path / "script.py"], "--standalone", "--nproc_per_node=2", "--max-restarts=1"))
    assert code == 0 and "refused" not in words and words.count("joined") >= 2, words


@pytest.mark.slow
def test_the_launcher_shows_the_users_line_and_fails(folder, tmp_path):
    """A label of 9 in a mesh of 3 classes: rank 0 reads it first, the other waits for it."""
    run = tiny_run("downstream", tmp_path)
    labels = run.data / "train" / "mesh_03.txt"
    labels.write_text(labels.read_text().replace("1", "9"))
    code, words = ended(launch(run.command(tmp_path / "out")))
    assert code != 0 and re.search("^error: .*mesh_03.*9", words, re.MULTILINE), words
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_with_loader_processes(folder, undisturbed, tmp_path):
    """torchrun passes it on to the process groups of its processes, which are not those of their loaders."""
    run = tiny_run("segmentation", folder, epochs=3, batch_size=2, workers=1)
    launcher = launch(run.command(tmp_path / "out"))
    when_saved(tmp_path / "out", launcher)
    launcher.send_signal(signal.SIGTERM)
    code, words = ended(launcher)
    assert code != 0 and words.count("saved; go on with") == 2 and "Traceback" not in words.partition("saved; go on")[0], words
    run_pair(run, tmp_path / "out", "--resume", "auto")
    check("segmentation", same_weights(tmp_path / "out", undisturbed("segmentation")), "stopped by SIGTERM: other weights")


@contextlib.contextmanager
def two_networks():
    """Two network namespaces, joined by a cable of 10.231.0.1 and 10.231.0.2; skips the test where that is not allowed."""
    names = [f"segheads-{os.getpid()}-{node}" for node in range(2)]
    setup = [f"netns add {name}" for name in names] + [f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}"]
    for node, name in enumerate(names):
        setup += [f"-n {name} address add 10.231.0.{node + 1}/24 dev cable{node}", f"-n {name} link set cable{node} up", f"-n {name} link set lo up"]
    try:
        for line in setup:
            if not shutil.which("ip") or subprocess.run(["ip", *line.split()], capture_output=True).returncode:
                pytest.skip(f"ip {line} is not allowed")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def run_machines(run: TinyRun, out: Path, endpoint: str, machines: list[tuple]) -> None:
    """A launcher with one process on each of the machines (prefix of the command, further options, environment)."""
    launchers = [launch(run.command(out), "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=pair",
                        f"--rdzv_endpoint={endpoint}", *options, prefix=prefix, **environment)
                 for node, (prefix, options, environment) in enumerate(machines)]
    results = [ended(launcher) for launcher in launchers]
    assert [code for code, _ in results] == [0, 0], results


@pytest.mark.slow
def test_two_launchers_on_one_machine_train_as_one(folder, undisturbed, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    run_machines(tiny_run("segmentation", folder, epochs=3), tmp_path / "out", f"localhost:{port}", [((), (), {})] * 2)
    check("segmentation", same_weights(tmp_path / "out", undisturbed("segmentation")), "two launchers: other weights")


@pytest.mark.slow
def test_two_networks_train_as_one(folder, undisturbed, tmp_path):
    """Two machines but for the processor and the disk: neither can reach the other by its own name, only by the cable."""
    with two_networks() as names:
        machines = [(("ip", "netns", "exec", name), [f"--local_addr=10.231.0.{node + 1}", f"--rdzv_conf=is_host={node == 0}"], {"GLOO_SOCKET_IFNAME": f"cable{node}"})
                    for node, name in enumerate(names)]
        run_machines(tiny_run("downstream", folder, epochs=3), tmp_path / "out", "10.231.0.1:29500", machines)
    check("downstream", same_weights(tmp_path / "out", undisturbed("downstream")), "two networks: other weights")


# -- float16 -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name if name == "downstream" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_a_skipped_step_does_not_advance_the_schedule(folder, tmp_path, name):
    """The second of the steps overflows, as float16 does; what counts steps goes on."""
    def overflow():
        calls, scale, step, begin = [], torch.amp.GradScaler.scale, LRScheduler.step, LRScheduler._initial_step

        def infinite_once(self, loss):
            calls.append(1)
            return scale(self, loss) * (float("inf") if len(calls) == 2 else 1)

        torch.amp.GradScaler.scale = infinite_once
        LRScheduler.step = lambda self, *more: (print("schedule goes on"), step(self, *more))
        LRScheduler._initial_step = lambda self: (print("schedule begins"), begin(self))
        utils.run.amp_settings = lambda *_: (None, torch.amp.GradScaler("cpu"))

    done = run_forked(tiny_run(name, folder, epochs=1), tmp_path / "out", hook=overflow)
    assert done.code == 0, done.stderr
    checkpoint = last_checkpoint(tmp_path / "out")
    assert checkpoint["scaler"]["scale"] == 2.0 ** 15 and checkpoint["step"] >= 3
    begins, steps = (done.stdout.count(f"schedule {word}\n") for word in ("begins", "goes on"))       # the first is a step of its own
    assert begins >= 1 and steps == begins + checkpoint["step"] - 1
