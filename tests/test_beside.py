"""Runs that cannot hurt one another: two in one folder, two scripts in one checkpoint folder, data that change under a stopped run, a
terminal that goes, a full disk under the log, caches that rot. The cheapest script stands for all where the mechanism is utils/'s."""

import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_m2f_head
import train_segmentation
import train_upernet_head
import utils.log
from data.feature_cache import CachedTaps
from data.mesh import CachedFeatures, MeshDataset, MeshSpec
from data.mesh_io import list_meshes
from models.downstream import DownstreamClassifier
from tests.test_feature_cache import embedder, open_set
from tests.test_kills import patch, striking
from tests.test_run import entries, train
from tests.tiny_heads import add_tiny_backbone
from tests.tiny_heads import train as train_head
from tests.tiny_heads import write_data as write_head_data
from tests.tiny_images import write_pictures
from tests.tiny_meshes import write_set
from tests.tiny_runs import (
    NAMES,
    ROOT,
    Forked,
    TinyRun,
    last_checkpoint,
    report_tests,
    run_forked,
    same_weights,
    tiny_run,
)
from tests.whole_runs import assert_equal
from utils.checkpoint import check_folder, load_checkpoint, save_checkpoint, written_by
from utils.cli import StopRequested
from utils.config import Config, command_line_wins
from utils.files import LOCK, read_lock

SCRIPT = "train_segmentation.py"


@pytest.fixture(scope="module", autouse=True)
def row(request):
    """A line for the table of scripts/faults.sh."""
    yield from report_tests(request, "runs beside each other: {} of {} attacks did no harm")


def everywhere() -> list:
    return [pytest.param(name, marks=[] if name == "segmentation" else pytest.mark.slow) for name in NAMES]


def locks(folder: Path) -> list[Path]:
    return list(folder.rglob(LOCK))


def halted(flag: Path, script: str = SCRIPT, point: str = "step", number: int = 2):
    """A hook: the run stands still in that call, and makes `flag`, until the flag is removed."""
    calls = []

    def hook():
        def around(original, arguments):
            calls.append(1)
            if len(calls) == number:
                flag.touch()
                end = time.monotonic() + 60
                while flag.exists() and time.monotonic() < end:
                    time.sleep(0.01)
            return original(*arguments)
        patch(script, point, around)
    return hook


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.01)


def refused(child: Forked, *words: str) -> None:
    assert child.code == 2, child.stderr
    line, = child.stderr.splitlines()
    assert line.startswith("error: ") and [word for word in words if word not in line] == [], line


# -- two runs in one folder --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", everywhere())
def test_a_second_run_in_the_folder_is_refused_unless_it_only_evaluates(tmp_path, name):
    run, flag, out = tiny_run(name, tmp_path), tmp_path / "flag", tmp_path / "out"
    assert run_forked(run, tmp_path / "alone").code == 0
    first = Forked(run, out, hook=halted(flag, run.script))
    try:
        wait_for(flag)
        assert {path.parent.name for path in locks(out)} == {"model", "log", "config"} and read_lock(locks(out)[0])["pid"] == first.pid
        for more in ((), ("--resume", "auto")):
            refused(run_forked(run, tmp_path / "second", "--output-dir", out, *more), f"{out}/model: in use by {run.script} (process {first.pid}")
        evaluated = run_forked(run, tmp_path / "third", "--output-dir", out, "--resume", tmp_path / "alone/model/model_last.pth", "--test-only")
        assert evaluated.code == 0, evaluated.stderr
        assert not (out / "model" / "previous_1").exists() and len(locks(out)) == 3
    finally:
        flag.unlink(missing_ok=True)
        first.wait()
    assert first.code == 0 and same_weights(out, tmp_path / "alone") and locks(out) == []


def test_two_runs_that_share_only_the_folder_of_checkpoints(tmp_path):
    run, flag = tiny_run("segmentation", tmp_path), tmp_path / "flag"
    shared = f"checkpointing.dir={tmp_path / 'shared'}"
    first = Forked(run, tmp_path / "a", shared, hook=halted(flag))
    try:
        wait_for(flag)
        refused(run_forked(run, tmp_path / "b", shared), f"{tmp_path}/shared: in use by")
        assert not (tmp_path / "b").exists()                   # refused before anything is made
    finally:
        flag.unlink(missing_ok=True)
        first.wait()
    assert first.code == 0 and {path.name for path in (tmp_path / "shared").iterdir()} >= {"model_last.pth"}


@pytest.mark.parametrize("name", everywhere())
def test_the_lock_of_a_killed_run_blocks_nobody(tmp_path, name):
    run, out = tiny_run(name, tmp_path), tmp_path / "out"
    killed = run_forked(run, out, hook=striking(run.script, "step", 2, 0))
    assert killed.code == -signal.SIGKILL and len(locks(out)) == 3
    again = run_forked(run, out, "--resume", "auto")
    assert again.code == 0, again.stderr
    assert f"run.lock: taken over from {run.script} (process {killed.pid}, since" in again.stdout and locks(out) == []


def test_the_lock_of_another_machine_is_the_users_to_remove(tmp_path):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    (out / "model").mkdir(parents=True)
    lock = out / "model" / LOCK
    lock.write_text(json.dumps({"script": SCRIPT, "pid": 1, "started": 0, "host": "other", "since": "today"}))
    refused(run_forked(run, out), "on other", f"remove {lock}")
    lock.unlink()
    assert run_forked(run, out).code == 0


@pytest.mark.parametrize("how, code", [("end", 0), ("data", 2), ("settings", 2), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129),
                                       ("prepare", 143), ("bug", 1)])
def test_no_lock_is_left_however_a_run_ends(tmp_path, how, code):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    hook, more = None, ()
    if how == "data":
        next((run.data / "masks" / "train").iterdir()).write_bytes(b"no image")
    elif how == "settings":
        more = ("model.dropout=7",)
    elif how == "prepare":
        hook = striking(SCRIPT, "prepare", 1, 0, signal.SIGTERM)
    elif how == "bug":
        def hook():
            train_segmentation.compute_loss = None
    elif how != "end":
        hook = striking(SCRIPT, "step", 2, 0, how)
    done = run_forked(run, out, *more, hook=hook)
    assert done.code == code, done.stderr
    assert locks(tmp_path) == []
    assert out.exists() == (how not in ("data", "settings", "prepare"))     # and nothing that was made for it


def test_nothing_is_written_through_a_link_under_a_temporary_name(tmp_path):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    mine = tmp_path / "mine"
    mine.write_text("precious")
    names = [out / "model" / "model_last.pth.tmp", out / "model" / "model_best.pth.tmp", out / "log" / "log.jsonl.tmp", out / "config" / "config.yaml.tmp"]
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(mine, name)
    assert run_forked(run, out).code == 0 and run_forked(run, out, "--resume", "auto").code == 0
    assert mine.read_text() == "precious" and load_checkpoint(out / "model" / "model_last.pth")["epoch"] == 2


def test_half_written_files_of_a_killed_run_are_removed_by_the_next(tmp_path):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    assert run_forked(run, out, hook=striking(SCRIPT, "save", 2, 0.5)).code == -signal.SIGKILL
    (out / "model" / "model_best.pth.tmp").touch()             # a version before named it so
    assert len(list(out.rglob("*.tmp"))) == 2
    assert run_forked(run, out, "--resume", "auto").code == 0
    assert list(out.rglob("*.tmp")) == []


# -- another script's checkpoints --------------------------------------------------------------------------------------

def tiny_checkpoint(path: Path, script: str, **config) -> None:
    save_checkpoint(path, script=script, config=config, class_names=None, palette=None, model={"w": torch.ones(2)})


def test_who_wrote_a_file(tmp_path):
    tiny_checkpoint(tmp_path / "a.pth", "train_x.py")
    torch.save({"w": torch.ones(2)}, tmp_path / "b.pth")
    torch.save({"format": "other", "script": "train_x.py"}, tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"PK\x03\x04")
    (tmp_path / "e.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:200])
    torch.save([1], tmp_path / "f.pth", _use_new_zipfile_serialization=False)
    assert [written_by(path) for path in sorted(tmp_path.iterdir())] == ["train_x.py", None, None, None, None, None]
    assert written_by(tmp_path / "none.pth") is None
    check_folder(tmp_path, "train_x.py", "advice")
    with pytest.raises(ValueError, match=r"holds checkpoints of train_x.py \(a.pth\), and this is train_y.py; advice"):
        check_folder(tmp_path, "train_y.py", "advice")


def test_two_heads_do_not_share_a_folder_of_checkpoints(tmp_path, monkeypatch):
    """Fresh, resumed by auto, and resumed from elsewhere; testing is free."""
    add_tiny_backbone(monkeypatch)
    data, shared = write_head_data(tmp_path / "data"), ("--checkpoint-dir", tmp_path / "checkpoints", "--epochs", 1)
    train_head(train_m2f_head, data, tmp_path / "m2f", *shared)
    train_head(train_upernet_head, data, tmp_path / "upernet", "--epochs", 1)
    own = tmp_path / "upernet" / "model" / "model_last.pth"
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    for more in ((), ("--resume", "auto"), ("--resume", own)):
        with pytest.raises(ValueError, match=r"checkpoints: holds checkpoints of train_m2f_head.py \(model_last.pth\), .*--checkpoint-dir"):
            train_head(train_upernet_head, data, tmp_path / "upernet", *shared, *more)
    train_head(train_upernet_head, data, tmp_path / "upernet", *shared, "--resume", own, "--test-only", "--test-image-paths",
               f"{data}/test/images", "--test-mask-paths", f"{data}/test/masks")
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    train_head(train_m2f_head, data, tmp_path / "m2f", *shared)         # its own are moved, as ever
    assert (tmp_path / "checkpoints" / "previous_1" / "model_last.pth").is_file()
    assert f"moved the checkpoints of an earlier run to {tmp_path}/checkpoints/previous_1" in (tmp_path / "m2f" / "log" / "train.log").read_text()


# -- data that change --------------------------------------------------------------------------------------------------

def stopped(run, out):
    point = "scan" if run.script == "train_prototype.py" else "step"
    done = run_forked(run, out, hook=striking(run.script, point, 2, 0, signal.SIGTERM))
    assert done.code == 143, done.stderr


def edit_label(data: Path) -> str:
    """Change one label of the training set; returns the name of its file, or of what it belongs to."""
    masks = sorted([*data.glob("masks/train/*.png"), *data.glob("train/masks/*.png")])
    if masks:
        label = np.array(Image.open(masks[1]))
        label[0, 0] = (label[0, 0] + 1) % 3
        Image.fromarray(label).save(masks[1])
        return masks[1].name
    clouds = sorted(data.glob("train/*.npz"))
    if clouds:
        with np.load(clouds[1]) as file:
            arrays = dict(file)
        arrays["segment"][7] = (arrays["segment"][7] + 1) % 3
        np.savez(clouds[1], **arrays)
        return clouds[1].name
    path = data / "train" / "mesh_01.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["1" if lines[0] == "0" else "0", *lines[1:]]) + "\n")
    return "mesh_01.obj"


LABELLED = [name for name in everywhere() if name.values[0] != "jepa"]       # which reads no labels


@pytest.mark.parametrize("name", LABELLED)
def test_an_edited_label_is_seen_by_a_resumed_run(tmp_path, name):
    run, out = tiny_run(name, tmp_path), tmp_path / "out"
    stopped(run, out)
    before = (out / "model" / "model_last.pth").read_bytes()
    file = edit_label(run.data)
    refused(run_forked(run, out, "--resume", "auto"), f"{file} (", "labels) changed", "--data-changed")
    assert (out / "model" / "model_last.pth").read_bytes() == before and locks(out) == []
    going_on = run_forked(run, out, "--resume", "auto", "--data-changed")
    assert going_on.code == 0, going_on.stderr
    line, = [line for line in going_on.stdout.splitlines() if "WARNING: the data are not those of the checkpoint (--data-changed)" in line]
    assert file in line
    assert run_forked(run, out, "--resume", "auto").code == 0  # from now on these are its data


@pytest.mark.parametrize("name", everywhere())
def test_a_renamed_file_is_seen_by_a_resumed_run(tmp_path, name):
    run, out = tiny_run(name, tmp_path), tmp_path / "out"
    stopped(run, out)
    renamed = []
    for path in [path for path in run.data.rglob("*_00*") if "train" in path.parts and path.stem.endswith(("_00", "_000"))]:
        renamed.append((path.name, f"zz{path.suffix}"))
        path.rename(path.with_name(f"zz{path.suffix}"))
    assert renamed
    child = run_forked(run, out, "--resume", "auto")
    refused(child, "train: ", "is gone", "zz.", "is new")
    assert any(f"{old} is gone, {new} is new" in child.stderr for old, new in renamed)


def test_validation_data_are_compared_too(tmp_path):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    stopped(run, out)
    mask = sorted((run.data / "masks" / "val").iterdir())[0]
    original = mask.read_bytes()
    label = np.array(Image.open(mask))
    label[0, 0] = (label[0, 0] + 1) % 3
    Image.fromarray(label).save(mask)
    refused(run_forked(run, out, "--resume", "auto"), f"val: {mask.name} (", "changed")
    mask.write_bytes(original)
    assert run_forked(run, out, "--resume", "auto").code == 0


def test_a_checkpoint_that_knows_nothing_of_its_data_goes_on(tmp_path):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    stopped(run, out)
    shutil.copytree(out, tmp_path / "old")
    path = tmp_path / "old" / "model" / "model_last.pth"
    checkpoint = load_checkpoint(path)
    for name in ("format", "data", "amp_dtype"):
        del checkpoint[name]
    save_checkpoint(path, **checkpoint)
    for folder in (out, tmp_path / "old"):
        assert run_forked(run, folder, "--resume", "auto").code == 0
    assert_equal(*({**last_checkpoint(folder), "config": None} for folder in (out, tmp_path / "old")))


# -- the terminal goes, the run stays ----------------------------------------------------------------------------------

def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


NOTE = "note: nothing can be printed any more (Broken pipe)"


@pytest.mark.parametrize("both", [pytest.param(False, id="stdout", marks=pytest.mark.slow), pytest.param(True, id="stdout and stderr")])
def test_a_closed_pipe_does_not_end_a_run(tmp_path, both):
    """`python train_segmentation.py ... | head -n 1`, and a tee that died."""
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    process = subprocess.Popen([sys.executable, *run.command(out)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT if both else subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert both or process.stderr.read() == ""
    log = (out / "log" / "train.log").read_text()
    assert log.count(NOTE) == 1 and "Best val/mIoU" in log
    assert load_checkpoint(out / "model" / "model_last.pth")["epoch"] == 2


def test_output_into_a_full_disk_does_not_end_a_run(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *run.command(out)], cwd=ROOT, env=environment(), stdout=full, stderr=full)
    assert done.returncode == 0
    assert (out / "log" / "train.log").read_text().count("note: nothing can be printed any more (No space left on device)") == 1


@pytest.mark.parametrize("signals", [[signal.SIGHUP], [signal.SIGHUP, signal.SIGHUP], [signal.SIGHUP, signal.SIGTERM]], ids=str)
def test_a_hangup_saves_and_stops(tmp_path, signals):
    """It comes twice from a closing terminal, and together with SIGTERM from a session that ends: neither aborts the save."""
    run, out, flag = tiny_run("segmentation", tmp_path), tmp_path / "out", tmp_path / "flag"
    child = Forked(run, out, hook=halted(flag))
    wait_for(flag)
    for number in signals:
        child.signal(number)
        time.sleep(0.05)
    flag.unlink()
    assert child.wait().code == 129, child.stderr
    assert child.stderr.splitlines()[0].startswith("SIGHUP: finishing the step, then saving") and "--resume auto" in child.stderr.splitlines()[-1]
    assert last_checkpoint(out)["step"] == 2
    assert run_forked(run, out, "--resume", "auto").code == 0


def test_a_hangup_while_data_are_prepared(tmp_path):
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"
    done = run_forked(run, out, hook=striking(SCRIPT, "prepare", 1, 0, signal.SIGHUP))
    assert done.code == 129 and done.stderr.startswith("stopped with nothing to save") and locks(out) == []


def test_nohup_stays_nohup(tmp_path):
    run, out, flag = tiny_run("segmentation", tmp_path), tmp_path / "out", tmp_path / "flag"
    pause = halted(flag)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)      # inherited by the child, as under nohup
    try:
        child = Forked(run, out, hook=pause)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(flag)
    child.signal(signal.SIGHUP)
    time.sleep(0.05)
    flag.unlink()
    assert child.wait().code == 0, child.stderr


def test_a_terminal_that_is_closed(tmp_path):
    """A real one: the run is its session leader, the other side is closed, and with it go stdout and stderr."""
    run, out = tiny_run("segmentation", tmp_path, epochs=200), tmp_path / "out"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)           # also where the tests themselves run under nohup
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *run.command(out)], environment())
    wait_for(out / "log" / "log.jsonl")
    end = time.monotonic() + 60
    while not (out / "log" / "log.jsonl").read_text() and time.monotonic() < end:
        os.read(terminal, 1 << 16)
    os.close(terminal)
    code = None
    while code is None and time.monotonic() < end + 60:
        done, status = os.waitpid(pid, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.02)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert code == 129
    assert last_checkpoint(out)["step"] >= 3 and locks(out) == []


@pytest.mark.parametrize("name", ["train.log", "log.jsonl"])
def test_a_full_disk_under_the_log_names_the_file(tmp_path, name):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    run, out = tiny_run("segmentation", tmp_path), tmp_path / "out"

    def hook():
        utils.log.set_aside = lambda folder, *patterns: os.symlink("/dev/full", folder / name)

    refused(run_forked(run, out, hook=hook), f"No space left on device: {out}/log/{name}")
    assert locks(out) == []


# -- numbers and settings ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first, second", [("float32", "float16"), ("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")])
def test_another_number_format_goes_on_with_a_line(tmp_path, capsys, first, second):
    with pytest.raises(StopRequested):
        train(tmp_path, "--amp-dtype", first, after_step=lambda run: run.step == 1 and signal.raise_signal(signal.SIGTERM))
    capsys.readouterr()
    run, _ = train(tmp_path, "--amp-dtype", second, "--resume", "auto")
    assert f"--amp-dtype is {second} now and was {first} before: going on in {second}" in capsys.readouterr().out
    assert run.step == 4 and entries(tmp_path)["amp_dtype"] == f"torch.{second}" and bool(entries(tmp_path)["scaler"]) == (second == "float16")
    train(tmp_path, "--amp-dtype", second, "--resume", "auto")
    assert "--amp-dtype" not in capsys.readouterr().out


@pytest.mark.parametrize("name", everywhere())
def test_a_whole_run_goes_on_in_float16(tmp_path, name):
    run, out = tiny_run(name, tmp_path), tmp_path / "out"
    stopped(run, out)
    done = run_forked(run, out, "--resume", "auto", "--amp-dtype", "float16")
    assert done.code == 0, done.stderr
    assert "--amp-dtype is float16 now and was float32 before" in done.stdout


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        run, _ = train(tmp_path, "--threads", 2)
        assert torch.get_num_threads() == 2 and "2 of " in run.description
    finally:
        torch.set_num_threads(before)


class Arguments:
    def __init__(self, *overrides, output_dir=False):
        self.overrides = list(overrides)
        if output_dir:
            self.output_dir_given = True


@pytest.mark.parametrize("args, left, words", [
    (Arguments(), ["file/c", "file/l"], []),
    (Arguments(output_dir=True), [None, None], ["checkpointing.dir: file/c", "logging.dir: file/l", "--output-dir"]),
    (Arguments("experiment_name=new"), [None, None], ["experiment_name is on the command line"]),
    (Arguments("checkpointing.dir=own", output_dir=True), ["file/c", None], ["logging.dir"])])
def test_what_the_command_line_says_wins(args, left, words):
    config = Config({"checkpointing": {"dir": "file/c"}, "logging": {"dir": "file/l"}})
    command_line_wins(config, args, "checkpointing.dir", "logging.dir")
    assert [config.checkpointing.dir, config.logging.dir] == left and [word for word in words if word not in " ".join(args.notes)] == []


def test_a_folder_named_twice_on_the_command_line():
    with pytest.raises(ValueError, match="--output-dir and experiment_name both name the run folder"):
        command_line_wins(Config({}), Arguments("experiment_name=x", output_dir=True))


class NoFolder(TinyRun):
    """A run without --output-dir."""

    def argv(self, out, *more):
        return self.arguments


def test_the_folder_of_the_config_gives_way_and_two_experiments_do_not_share_one(tmp_path):
    run, shared = tiny_run("segmentation", tmp_path, epochs=1), tmp_path / "shared"
    config = Path(run.arguments[0])
    config.write_text(config.read_text().replace("checkpointing:\n", f"checkpointing:\n  dir: {shared}\n"))
    named = run._replace(arguments=[*run.arguments, "experiment_name=first"])
    done = run_forked(run, tmp_path / "out")                  # --output-dir is on the command line
    assert done.code == 0 and f"checkpointing.dir: {shared} of the config is not used" in done.stdout
    assert (tmp_path / "out" / "model" / "model_last.pth").is_file() and not shared.exists()
    refused(run_forked(named, tmp_path / "out"), "--output-dir and experiment_name both")
    for name, found in (("first", None), ("second", "first")):
        config.write_text(f"experiment_name: {name}\n" + "".join(line for line in config.read_text().splitlines(True) if "experiment_name" not in line))
        done = run_forked(NoFolder(*run), tmp_path / name)
        shutil.rmtree(ROOT / "exp" / name, ignore_errors=True)
        assert (done.code == 0) == (found is None), done.stderr
        assert found is None or f"{shared}: holds checkpoints of the experiment 'first', and this is 'second'" in done.stderr
    assert not (shared / "previous_1").exists()


# -- caches ------------------------------------------------------------------------------------------------------------

def zero(path: Path, start: int, count: int) -> None:
    """As a disk leaves blocks that were lost."""
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(count))


def test_zeroed_features_are_not_used(tmp_path):
    dataset = open_set(write_pictures(tmp_path / "data", 3))
    cached = CachedTaps(dataset, embedder(), "key", tmp_path / "cache", batch_size=2)
    good = [cached[item] for item in range(len(cached))]
    records = np.load(cached.path, mmap_mode="r")
    zero(cached.path, records.offset + records.dtype.itemsize, 16)     # in the taps of the second entry
    again = CachedTaps(dataset, embedder(), "key", tmp_path / "cache")
    assert again.was_stored and all(torch.equal(a, b) for a, b in zip(again[0]["taps"], good[0]["taps"], strict=True))
    with pytest.raises(ValueError, match=rf"{cached.path}: entry 1 is damaged, .*remove the file, and the next run computes it again"):
        again[1]
    cached.path.unlink()
    third = CachedTaps(dataset, embedder(), "key", tmp_path / "cache", batch_size=2)
    assert not third.was_stored and all(torch.equal(a, b) for a, b in zip(third[1]["taps"], good[1]["taps"], strict=True))
    zero(cached.path, 200, cached.path.stat().st_size - 200)           # the checksums, too
    assert not CachedTaps(dataset, embedder(), "key", tmp_path / "cache").was_stored


def test_zeroed_mesh_entries_are_prepared_again(tmp_path):
    """Whatever part of any cached file is zeroed: the data set is the same."""
    folder, cache = write_set(tmp_path / "data", 2), tmp_path / "cache"

    def items():
        dataset = MeshDataset(list_meshes(folder), folder, MeshSpec(("normal", "hks")), 3, cache_dir=cache)
        return [{name: value for name, value in dataset[item].items()} for item in range(2)]

    good = items()
    for entry in sorted(cache.glob("*.npz")):
        size = entry.stat().st_size
        for start in range(0, size, size // 7):
            zero(entry, start, size // 7)
            assert_equal(items(), good)


def test_zeroed_embeddings_are_computed_again(tmp_path):
    folder, cache = write_set(tmp_path / "data", 2), tmp_path / "cache"
    dataset = MeshDataset(list_meshes(folder), folder, MeshSpec(("normal",)), 3)
    calls = []

    def embed(batch):
        calls.append(1)
        return batch["features"] * 2 + 1

    first = CachedFeatures(dataset, embed, "key", cache)
    good = [first[item]["embedding"] for item in range(2)]
    path, = cache.iterdir()
    assert CachedFeatures(dataset, embed, "key", cache).was_stored and len(calls) == 2
    zero(path, path.stat().st_size // 2, 64)
    again = CachedFeatures(dataset, embed, "key", cache)
    assert not again.was_stored and all(torch.equal(again[item]["embedding"], good[item]) for item in range(2))


def test_cached_files_follow_the_umask_and_killed_runs_leave_none(tmp_path):
    """All caches of three kinds of data: readable for the group, and what a kill left is gone after the next run."""
    before = os.umask(0o002)
    try:
        for name in ("downstream", "sonata", "upernet_head"):
            cache = tmp_path / f"cache_{name}"
            run = tiny_run(name, tmp_path, epochs=1, cache=cache)
            more = {"upernet_head": ["--augment", "windows", "--cache-features"], "sonata": ["data.missing_normal=estimate"]}.get(name, [])
            if name == "sonata":
                for path in run.data.glob("*/*.npz"):
                    with np.load(path) as file:
                        arrays = {key: file[key] for key in file if key != "normal"}
                    np.savez(path, **arrays)
            killed = run_forked(run, tmp_path / f"out_{name}", *more, hook=striking(run.script, "rename", 1, 0))
            # one for each thread that was at it
            assert killed.code == -signal.SIGKILL and list(cache.glob("*.tmp"))
            assert run_forked(run, tmp_path / f"out_{name}", *more).code == 0
            files = list(cache.iterdir())
            assert len(files) > 1 and not list(cache.glob("*.tmp"))
            assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o664}, name
    finally:
        os.umask(before)


# -- many classes ------------------------------------------------------------------------------------------------------

def test_5000_classes_need_no_matrix_per_mesh(tmp_path, monkeypatch):
    """A matrix of 200 MB for each of 40 meshes would be 8 GB."""
    import resource
    import tracemalloc

    from utils import mesh_scripts

    folder = write_set(tmp_path / "data", 40)
    dataset = MeshDataset(list_meshes(folder), folder, MeshSpec(("normal",)), 5000, views=1)
    rng = np.random.default_rng(0)

    def probabilities(model, dataset, *_):
        for index, count in enumerate(dataset.num_faces):
            scores = torch.zeros(count, 5000)
            scores[torch.arange(count), torch.from_numpy(rng.integers(0, 4, count))] = 1
            yield index, scores, 0.0, 0.0

    monkeypatch.setattr(mesh_scripts, "mesh_probabilities", probabilities)
    model = DownstreamClassifier.__new__(DownstreamClassifier)
    torch.nn.Module.__init__(model)
    model.num_classes = 5000
    tracemalloc.start()
    result = mesh_scripts.evaluate_meshes(model, dataset, torch.device("cpu"), None, 8, 0, 0, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5e9 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6, peak
    assert len(result["examples"]) == 40 and result["matrix"].shape == (5000, 5000)
    index, _, score = result["examples"][3]
    pred, label = result["predictions"][index], dataset.labels[index]
    ious = [((pred == c) & (label == c)).sum() / ((pred == c) | (label == c)).sum() for c in np.unique(label[label >= 0])]
    assert score == pytest.approx(np.mean(ious))
