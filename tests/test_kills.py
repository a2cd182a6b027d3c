"""Every training script killed, stopped, out of disk and with damaged checkpoints: what it goes on to is what an undisturbed run ends with.

The default suite does a little of each on the cheapest scripts; `pytest -m slow` (or scripts/faults.sh) does all of it on all seven.
Kills are SIGKILL to a forked child: at a share of its processor time, or in a call of one of POINTS.
"""

import collections
import errno
import functools
import importlib
import os
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

import models.prototype_push as prototype_push
import utils.files
import utils.jepa_scripts as jepa_scripts
import utils.log
from tests.tiny_runs import NAMES, ROOT, Forked, TinyRun, last_checkpoint, report, run_forked, tiny_run
from tests.whole_runs import assert_equal
from utils.checkpoint import load_checkpoint
from utils.log import read_log

KILLS = 25


def everywhere(default: int, *cases: tuple) -> list:
    """Every script with every case; the default suite takes the cheapest script with the first `default` cases."""
    return [pytest.param(name, *case, marks=[] if name == "segmentation" and number < default else pytest.mark.slow)
            for name in NAMES for number, case in enumerate(cases)]


# -- where to strike ---------------------------------------------------------------------------------------------------

def points(script: str) -> dict[str, list[tuple]]:
    """Name of the moment -> the functions (owner, name) that are called then."""
    module = sys.modules[Path(script).stem]
    scored = {"train_jepa.py": [(jepa_scripts, "measure")],
              "train_prototype.py": [(module, "evaluate_photos"), (module, "finish_push"), (module, "finish_prune")]}
    return {"prepare": [(module, "build_dataset")],
            "step": [(torch.optim.AdamW, "step"), (torch.optim.Adam, "step")],
            "epoch": [(module, "train_until" if script == "train_prototype.py" else "train_one_epoch")],
            "evaluate": scored.get(script, [(module, "evaluate")]),
            "log": [(utils.log.RunLog, "evaluation")],
            "save": [(torch, "save")],
            "copy": [(shutil, "copyfileobj")],
            "rename": [(os, "replace")],
            "scan": [(prototype_push.PushTable, "update"), (prototype_push.NearestPatches, "update")]}


def patch(script: str, point: str, around) -> None:
    """Let around(original, arguments) take the place of each function of the point, for good."""
    def wrapped(original):
        def call(*arguments, **more):
            return around(functools.partial(original, **more), arguments)
        return call

    for owner, name in points(script)[point]:
        setattr(owner, name, wrapped(getattr(owner, name)))


def counting(script: str, file: Path):
    """A hook that writes down each call of all points."""
    def hook():
        for point in points(script):
            def counted(original, arguments, point=point):
                with open(file, "a") as counts:
                    counts.write(point + "\n")
                return original(*arguments)
            patch(script, point, counted)
    return hook


def striking(script: str, point: str, number: int, when: float, signum: int = signal.SIGKILL):
    """A hook that sends itself the signal in the `number`-th call of a point: 0 before it, 1 after it, between them in its middle."""
    calls = []

    def struck(original, arguments):
        calls.append(1)
        if len(calls) != number:
            return original(*arguments)
        if when == 0:
            os.kill(os.getpid(), signum)
        elif when < 1 and point in ("save", "copy"):               # the file on the disk ends in its middle
            arguments = [arguments[0], HalfWritten(arguments[1], when, signum), *arguments[2:]]
        elif when < 1:
            threading.Timer(0.03 * when, os.kill, (os.getpid(), signum)).start()
        result = original(*arguments)
        if when == 1:
            os.kill(os.getpid(), signum)
        return result
    return lambda: patch(script, point, struck)


class HalfWritten:
    """Passes on what is written to `file`, and strikes somewhere in it."""

    def __init__(self, file, share, signum):
        self.file, self.left, self.signum = file, int(share * 20_000), signum

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            self.file.write(bytes(data)[:len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), self.signum)
            self.left = 1 << 60
            return self.file.write(bytes(data)[len(data) // 2:])
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


# -- the undisturbed run, and comparing with it ------------------------------------------------------------------------

class Reference:
    """The undisturbed run of a script, how long it takes, and how often each point is called in it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.out = name, folder, folder / name / "reference"
        self.run = tiny_run(name, folder)
        counts, self.seconds = folder / name / "calls", 0.0
        child = Forked(self.fresh("reference"), self.out, hook=counting(self.run.script, counts))
        while child.running():
            self.seconds = max(self.seconds, child.cpu_seconds())
            time.sleep(0.005)
        assert child.code == 0, child.stderr
        self.calls = collections.Counter(counts.read_text().split())

    def fresh(self, label: str, **changes) -> TinyRun:
        """The run with a cache of its own, so that it prepares the data, too."""
        return tiny_run(self.name, self.folder, cache=self.folder / self.name / f"cache_{label}", **changes)

    def assert_same_end(self, out: Path) -> None:
        """Every checkpoint file with all its entries, each line of log.jsonl, and the pages; no temporary file is left."""
        names = [sorted(path.name for path in (folder / "model").iterdir()) for folder in (self.out, out)]
        assert names[0] == names[1], f"files {names}"
        for name in names[0]:
            first, second = (last_checkpoint(folder, name) for folder in (self.out, out))
            assert_equal({**first, "config": None}, {**second, "config": None}, name)
        assert_equal(evaluations(self.out), evaluations(out), "log.jsonl")
        pages = [{path.name: path.read_bytes() for path in sorted((folder / "prototypes").glob("*"))} for folder in (self.out, out)]
        assert pages[0] == pages[1], f"pages {[name for name in pages[0] if pages[0][name] != pages[1].get(name)]}"
        assert not list(out.rglob("*.tmp")), f"left: {list(out.rglob('*.tmp'))}"


def evaluations(out: Path) -> list[dict]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in read_log(out / "log" / "log.jsonl")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """name -> Reference, each made once."""
    made, folder = {}, tmp_path_factory.mktemp("kills")

    def make(name):
        if name not in made:
            made[name] = Reference(name, folder)
        return made[name]
    return make


@pytest.fixture
def out(reference, tmp_path):
    yield tmp_path / "out"
    shutil.rmtree(tmp_path, ignore_errors=True)     # hundreds of runs of up to 70 MB


# -- SIGKILL -----------------------------------------------------------------------------------------------------------

def kill_at(child: Forked, seconds: float) -> bool:
    """SIGKILL when it has used that much processor time; False where it ended before."""
    while child.running() and child.cpu_seconds() < seconds:
        time.sleep(0.004)
    child.signal(signal.SIGKILL)
    return child.wait().code == -signal.SIGKILL


def killed(ref: Reference, run: TinyRun, out: Path, rng: random.Random, where: str, *more) -> bool:
    if where == "any":
        return kill_at(Forked(run, out, *more), rng.random() * ref.seconds)
    hook = striking(run.script, where, rng.randint(1, ref.calls[where]), rng.choice((0, rng.random(), rng.random(), 1)))
    return run_forked(run, out, *more, hook=hook).code == -signal.SIGKILL


def one_trial(ref: Reference, out: Path, seed: int, where: str) -> int:
    """Kill a fresh run, its resumes sometimes again, let the last one finish, compare. Returns the number of kills."""
    rng = random.Random(f"{ref.name} {seed}")
    run, kills = ref.fresh(f"trial_{seed}", workers=int(seed % 5 == 4)), 0
    done, more = killed(ref, run, out, rng, where), []
    while done:
        kills, more = kills + 1, ["--resume", "auto"]
        done = kills < 4 and rng.random() < 0.4 and killed(ref, run, out, rng, rng.choice(("any", "save", "step", where)), *more)
    end = run_forked(run, out, "--resume", "auto")
    assert end.code == 0, end.stderr
    ref.assert_same_end(out)
    return kills


def plan(ref: Reference, kills: int) -> list[str]:
    """Where the kills fall: a third anywhere, the others in each point that the run has, in turn; writing more often."""
    turn = [point for point in ("save", "step", "evaluate", "rename", "log", "copy", "scan", "prepare", "save") if ref.calls[point]]
    return [("any" if i % 3 == 0 else turn[(i - i // 3 - 1) % len(turn)]) for i in range(kills)]


def trials(ref: Reference, folder: Path, kills: int) -> None:
    survived, struck, failures = 0, 0, []
    for seed, where in enumerate(plan(ref, kills)):
        try:
            struck += one_trial(ref, folder / f"{seed}", seed, where)
            survived += 1
        except AssertionError as error:
            failures.append(f"kills {ref.run.script}: trial {seed} ({where}) FAILED: {str(error)[:600]}")
            report(failures[-1])
        for path in (folder / f"{seed}", folder / f"{seed}.child", ref.folder / ref.name / f"cache_trial_{seed}"):
            shutil.rmtree(path, ignore_errors=True)
    report(f"kills {ref.run.script}: survived {survived} of {kills} ({struck} kills in all)")
    assert not failures, "\n".join(failures)
    assert struck >= 0.7 * kills


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_25_times_ends_in_the_same_weights(reference, tmp_path, name):
    trials(reference(name), tmp_path, KILLS)


@pytest.mark.parametrize("name, where", [("segmentation", "save"), ("sonata", "any")])
def test_killed_once(reference, tmp_path, name, where):
    assert one_trial(reference(name), tmp_path / "out", 7, where) >= 0


@pytest.mark.parametrize("name", everywhere(1, ()))
def test_killed_before_the_first_save_behind_another_runs_checkpoint(reference, out, name):
    """--resume PATH into a new folder: --resume auto goes on from there, not from the start."""
    ref = reference(name)
    first = min(ref.out.glob("model/*.pth"), key=place_of)
    hook = striking(ref.run.script, "step", 1, 1)
    assert run_forked(ref.run, out, "--resume", first, hook=hook).code == -signal.SIGKILL
    assert place_of(out / "model" / "model_last.pth") == place_of(first)
    end = run_forked(ref.run, out, "--resume", "auto")
    assert end.code == 0 and f"resuming from {out}" in end.stdout
    assert_equal(*(last_checkpoint(folder)["model"] for folder in (ref.out, out)), "model")


# -- SIGTERM and Ctrl-C ------------------------------------------------------------------------------------------------

def go_on_line(child: Forked, saved: bool) -> str:
    """The command of the last line; there is at most one line before it, and no traceback."""
    lines = child.stderr.splitlines()
    assert len(lines) == 1 + saved, child.stderr
    return lines[-1].partition(" with: ")[2]


def carry_out(ref: Reference, command: str, out: Path, in_a_shell: bool) -> None:
    """In a shell where the script needs no smaller networks, otherwise the same words in a forked child."""
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", ref.run.script)
    if in_a_shell:
        done = subprocess.run(["bash", "-c", f"{sys.executable}{command.removeprefix('python')}"], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    else:
        place = words.index("--output-dir")
        assert words[place + 1] == str(out)
        done = run_forked(TinyRun(script, words[:place] + words[place + 2:], ref.run.data), out)
        assert done.code == 0, done.stderr


@pytest.mark.parametrize("name, point, share, signum", everywhere(
    3, ("prepare", 0, signal.SIGTERM), ("step", 0.5, signal.SIGINT), ("evaluate", 0.5, signal.SIGTERM), ("prepare", 1, signal.SIGINT),
    ("epoch", 0, signal.SIGTERM), ("step", 0.7, signal.SIGTERM), ("log", 0.2, signal.SIGINT), ("scan", 0.4, signal.SIGTERM),
    ("evaluate", 1, signal.SIGTERM)))
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(reference, out, name, point, share, signum):
    """share: which of the calls; the very last evaluation is not worth a stop, the run ends by itself, but for pages of prototypes."""
    ref = reference(name)
    if not ref.calls[point]:
        pytest.skip("the script has no prototypes")
    number, run = 1 + round(share * (ref.calls[point] - 1)), ref.fresh(f"signal_{point}_{signum}")
    stopped = run_forked(run, out, hook=striking(run.script, point, number, 0, signum))
    if (point, share) == ("evaluate", 1) and name != "prototype":
        assert stopped.code == 0, stopped.stderr
    else:
        assert stopped.code == 128 + signum, stopped.stderr
        saved = point != "prepare"
        command = go_on_line(stopped, saved)
        assert saved == (out / "model" / "model_last.pth").exists() and saved == ("--resume" in command)
        assert point != "step" or last_checkpoint(out)["step"] == number
        carry_out(ref, command, out, in_a_shell=(point, signum) == ("step", signal.SIGTERM) and name in ("jepa", "downstream", "sonata"))
    ref.assert_same_end(out)


@pytest.mark.parametrize("name", ["m2f_head", "upernet_head"])
def test_the_line_to_go_on_with_wins_over_how_the_run_was_resumed(name):
    module = importlib.import_module(f"train_{name}")
    assert module.parse_args(["--resume-checkpoint", "other.pth", "--resume", "auto"]).resume == "auto"


# -- full and read-only disks ------------------------------------------------------------------------------------------

class Full:
    """A file on a disk with room for `left` bytes."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


def full_at(number: int, left: int):
    """A hook: the `number`-th checkpoint file meets a full disk after `left` bytes."""
    def hook():
        count = []

        def opened(path, mode="r", **more):
            written = "x" in mode and ".pth." in str(path)
            count.append(written)
            file = open(path, mode, **more)
            return Full(file, left) if written and sum(count) == number else file
        utils.files.open = opened
    return hook


def assert_refused(child: Forked, *words: str) -> None:
    assert child.code == 2, child.stderr
    lines = child.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), child.stderr


def assert_only_good_files(out: Path) -> None:
    assert not list(out.rglob("*.tmp"))
    for path in out.glob("model/*.pth"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", everywhere(1, ()))
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_good(reference, out, name):
    ref = reference(name)
    for number, left in ((1, 0), (2, 5_000), (5, 9_000)):
        failed = run_forked(ref.run, out, "--resume", "auto", hook=full_at(number, left))
        assert_refused(failed, ".pth: not written", "No space left on device")
        assert_only_good_files(out)
    assert (out / "model" / "model_last.pth").exists()
    assert run_forked(ref.run, out, "--resume", "auto").code == 0
    ref.assert_same_end(out)


@pytest.fixture
def small_disk(tmp_path):
    """mount(size) -> a tmpfs of that many bytes; size may be changed."""
    disk = tmp_path / "disk"

    def mount(size, more="size"):
        mounted = os.path.ismount(disk)
        disk.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{'remount,' * mounted}{more}={size}" if size else "ro", "tmpfs", str(disk)],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return disk
    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_real_disk_that_runs_full(reference, small_disk, name):
    """Too small for the settings, for the log, for the first checkpoint, for the second; at last large enough."""
    ref, out = reference(name), None
    one = (ref.out / "model" / "model_last.pth").stat().st_size
    for size in (8_192, 24_576, one // 2 + 40_000, int(1.5 * one) + 60_000):
        out = small_disk(size) / "out"
        failed = run_forked(ref.run, out.parent.parent / "out", "--output-dir", out, "--resume", "auto")
        assert_refused(failed, "No space left on device")
        assert_only_good_files(out)
    small_disk("1G")
    end = run_forked(ref.run, out.parent.parent / "out", "--output-dir", out, "--resume", "auto")
    assert end.code == 0, end.stderr
    ref.assert_same_end(out)


@pytest.mark.parametrize("name", everywhere(1, ()))
def test_an_output_folder_that_cannot_be_written(reference, small_disk, tmp_path, name):
    """A file in its place; a disk mounted read-only, which stops even root."""
    ref = reference(name)
    (tmp_path / "file").write_text("mine")
    assert_refused(run_forked(ref.run, tmp_path / "1", "--output-dir", tmp_path / "file"), f"{tmp_path}/file", "choose another output folder")
    assert (tmp_path / "file").read_text() == "mine"
    disk = small_disk(None)
    assert_refused(run_forked(ref.run, tmp_path / "2", "--output-dir", disk / "out"), f"{disk}", "choose another output folder")


# -- damaged checkpoints -----------------------------------------------------------------------------------------------

def damage(path: Path, how: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    entry = next(entry for entry in entries if entry.filename.endswith("/data.pkl")) if how == "pickle" else \
        max(entries, key=lambda entry: entry.file_size)
    lengths = struct.unpack("<HH", content[entry.header_offset + 26:entry.header_offset + 30])      # of the name and of the padding
    start = {"directory": directory + 46, "data": entry.header_offset + 30 + sum(lengths), "pickle": entry.header_offset + 30 + sum(lengths)}
    if how in start:                               # in the directory: in the first entry's name
        span = 8 if how == "directory" else entry.file_size
        content[start[how] + rng.randrange(span)] ^= 1 << rng.randrange(7)
    path.write_bytes(content[:{"empty": 0, "truncated": rng.randrange(1, len(content))}.get(how)])


@pytest.mark.parametrize("name, how", everywhere(2, ("data",), ("truncated",), ("empty",), ("pickle",), ("directory",)))
def test_a_damaged_checkpoint_is_refused_and_auto_takes_the_one_before(reference, out, name, how):
    ref, rng = reference(name), random.Random(f"{name} {how}")
    shutil.copytree(ref.out, out)
    newest = max(place_of(path) for path in out.glob("model/*.pth"))
    for path in [path for path in out.glob("model/*.pth") if place_of(path) == newest]:
        damage(path, how, rng)
    last = out / "model" / "model_last.pth"
    assert_refused(run_forked(ref.run, out, "--resume", last), str(last), "--resume auto")
    end = run_forked(ref.run, out, "--resume", "auto")
    assert end.code == 0, end.stderr
    assert f"skipped {last}: " in end.stdout and "resuming from" in end.stdout
    ref.assert_same_end(out)


def place_of(path: Path) -> tuple[int, int]:
    checkpoint = load_checkpoint(path)
    return checkpoint["epoch"], checkpoint["step"]
