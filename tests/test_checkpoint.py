import io
import math
import multiprocessing
import os
import resource
import signal
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import (
    FORMAT,
    CheckpointKeeper,
    EarlyStopping,
    RunFolder,
    find_resume,
    load_checkpoint,
    save_checkpoint,
)
from utils.distributed import EpochBatchSampler
from utils.seed import rng_state, seed_everything, set_rng_state
from utils.weights import read_weights

SCRIPT = "train_downstream.py"


def make_state(value=1.0, **more):
    return {"script": SCRIPT, "config": {"lr": 1e-3, "layers": [1, 2]}, "class_names": ["wall", "floor"],
            "palette": [[0, 0, 0], [255, 0, 0]], "model": {"weight": torch.full((4, 3), value)}, **more}


def save(path, value=1.0, **more):
    save_checkpoint(path, **make_state(value, **more))
    return Path(path)


def value_in(path):
    return load_checkpoint(path)["model"]["weight"][0, 0].item()


def flip_weight(path, value=1.0):
    """Flip one bit in the middle of the weights, as a bad disk does."""
    content = bytearray(path.read_bytes())
    place = content.find(np.full(12, value, dtype=np.float32).tobytes())
    assert place > 0
    content[place + 20] ^= 4
    path.write_bytes(content)


def in_child(function, *arguments):
    """Run in a forked process and return its exit code: negative is the signal that killed it."""
    def target():
        torch.set_num_threads(1)                   # OpenMP's threads do not survive a fork
        function(*arguments)
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(60)
    return child.exitcode


# -- run folder ----------------------------------------------------------------

def test_run_folder(tmp_path):
    run = RunFolder(tmp_path / "run").create()
    assert (run.model, run.log, run.config) == tuple(tmp_path / "run" / name for name in ("model", "log", "config"))
    assert run.model.is_dir() and run.log.is_dir() and run.config.is_dir()
    run.create()                                   # an existing folder is no error
    elsewhere = RunFolder(tmp_path / "run2", checkpoint_dir=tmp_path / "c", log_dir=str(tmp_path / "l")).create()
    assert elsewhere.model == tmp_path / "c" and elsewhere.log == tmp_path / "l"
    assert not (tmp_path / "run2" / "model").exists()


# -- what is written -----------------------------------------------------------

def test_round_trip_of_everything_a_resume_needs(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    generator = torch.Generator().manual_seed(3)
    path = tmp_path / "new folder" / "a.pth"
    state = make_state(optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), scaler=scaler.state_dict(),
                       epoch=3, step=7, rng=rng_state(generator), encoder={"sha256": "00", "name": None})
    state["model"] = net.state_dict()
    save_checkpoint(path, **state)
    loaded = load_checkpoint(path, SCRIPT)
    assert loaded["format"] == FORMAT and loaded["epoch"] == 3 and loaded["encoder"] == {"sha256": "00", "name": None}
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert loaded["scheduler"] == scheduler.state_dict() and loaded["scaler"] == scaler.state_dict()
    assert list(tmp_path.joinpath("new folder").iterdir()) == [path]       # no temporary file left


class Settings(dict):
    pass


def test_subclasses_become_plain(tmp_path):
    path = tmp_path / "a.pth"
    state = make_state(score=np.float64(0.5), names=("a", np.str_("b")), count=signal.SIGINT)
    state["config"] = Settings(model=Settings(depth=3), flag=True, nothing=None)
    state["model"] = OrderedDict(weight=nn.Parameter(torch.ones(2)))
    save_checkpoint(path, **state)
    loaded = load_checkpoint(path)
    assert type(loaded["config"]) is dict and type(loaded["config"]["model"]) is dict
    assert loaded["config"] == {"model": {"depth": 3}, "flag": True, "nothing": None}
    assert loaded["config"]["flag"] is True
    assert type(loaded["score"]) is float and loaded["names"] == ("a", "b") and type(loaded["names"][1]) is str
    assert loaded["count"] == 2 and type(loaded["count"]) is int
    assert type(loaded["model"]) is dict and type(loaded["model"]["weight"]) is torch.Tensor
    assert not loaded["model"]["weight"].requires_grad


class OwnTensor(torch.Tensor):
    pass


@pytest.mark.parametrize("value", [np.int64(3), np.zeros(2), Path("x"), SimpleNamespace(a=1), {1, 2}, b"x",
                                   torch.zeros(2).as_subclass(OwnTensor)], ids=lambda value: type(value).__name__)
def test_other_types_are_refused_with_their_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"best\.deep\.1 is a .*" + type(value).__name__):
        save(tmp_path / "a.pth", best={"deep": [0, value]})
    assert list(tmp_path.iterdir()) == []


def test_view_is_saved_alone_and_shared_weights_once(tmp_path):
    table = torch.randn(1000, 1000)
    path = save(tmp_path / "view.pth", part=table[:2, :2], tied=[table[0], table[0]])
    assert path.stat().st_size < 20_000
    assert torch.equal(load_checkpoint(path)["part"], table[:2, :2])
    whole = torch.randn(100_000)
    assert save(tmp_path / "tied.pth", tied=[whole, whole]).stat().st_size < 500_000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("section", ["model", "ema", "optimizer"])
def test_non_finite_weights_are_refused_and_the_old_file_stays(tmp_path, section, bad):
    path = save(tmp_path / "a.pth")
    before = path.read_bytes()
    tensor = torch.zeros(3, 3)
    tensor[1, 2] = bad
    with pytest.raises(FloatingPointError, match=section + r"\.head\.w .*epoch 4, step 9"):
        save_checkpoint(path, **{**make_state(epoch=4, step=9), section: {"head": {"w": tensor}}})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_large_finite_weights_are_not_refused(tmp_path):
    huge = torch.full((100,), 6e4, dtype=torch.float16)                    # their sum overflows float16
    save(tmp_path / "a.pth", ema={"w": huge, "i": torch.ones(2, dtype=torch.int64)}, best={"score": math.nan})


# -- killed, full, failing -----------------------------------------------------

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die_inside(path):
    def half(content, file):
        buffer = io.BytesIO()
        torch_save(content, buffer)
        file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
        file.flush()
        die()
    torch_save, torch.save = torch.save, half
    save(path, 2.0)


def save_and_die_before_rename(path):
    os.replace = die
    save(path, 2.0)


def save_and_die_after_rename(path):
    replace = os.replace
    os.replace = lambda *names: (replace(*names), die())
    save(path, 2.0)


@pytest.mark.parametrize("child, expected", [(save_and_die_inside, 1.0), (save_and_die_before_rename, 1.0),
                                             (save_and_die_after_rename, 2.0)])
def test_kill_leaves_the_old_or_the_new_file(tmp_path, child, expected):
    path = save(tmp_path / "model_last.pth", 1.0)
    assert in_child(child, path) == -signal.SIGKILL
    assert value_in(path) == expected
    assert find_resume("auto", tmp_path)[0] == path
    save(path, 3.0)                                # what the killed process left is in nobody's way
    assert value_in(path) == 3.0 and list(tmp_path.iterdir()) == [path]


def save_on_full_disk(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(OSError, match="model_last.pth: not written .*intact") as caught:
        save(path, 2.0, ema={"w": torch.randn(100_000)})
    assert "\n" not in str(caught.value)


def test_full_disk_leaves_the_old_file(tmp_path):
    path = save(tmp_path / "model_last.pth")
    assert in_child(save_on_full_disk, path) == 0
    assert value_in(path) == 1.0 and list(tmp_path.iterdir()) == [path]


def test_disk_error_while_flushing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "model_last.pth")
    def refuse(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="model_last.pth: not written .*No space left.*intact"):
        save(path, 2.0)
    assert value_in(path) == 1.0 and list(tmp_path.iterdir()) == [path]


def test_error_or_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "model_last.pth")
    for error in (KeyboardInterrupt, RuntimeError("bug")):
        def fail(content, file, error=error):
            file.write(b"half")
            raise error
        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
            save(path, 2.0)
        assert list(tmp_path.iterdir()) == [path]
        monkeypatch.undo()
        assert value_in(path) == 1.0


# -- damaged, foreign, hostile -------------------------------------------------

def one_line_error(path, script=None, kind=ValueError):
    with pytest.raises(kind) as caught:
        load_checkpoint(path, script)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and \
            all(same(first[key], second[key]) for key in first)
    return first == second


def test_every_truncation_is_refused(tmp_path):
    path = save(tmp_path / "a.pth")
    whole = path.read_bytes()
    for length in [0, 1, *range(7, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "truncated" in one_line_error(path)


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    path = save(tmp_path / "a.pth")
    whole, original = path.read_bytes(), load_checkpoint(path)
    refused = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert same(original, load_checkpoint(path)), f"byte {place} changed the content"   # padding, dates
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_flipped_weight_names_the_damage(tmp_path):
    path = save(tmp_path / "a.pth")
    flip_weight(path)
    assert torch.load(path, weights_only=True)["model"]["weight"].unique().numel() == 2    # torch does not notice
    assert "not what its checksum" in one_line_error(path)


def test_weight_that_became_a_folder_is_refused(tmp_path):
    """One bit of the archive's directory makes an entry a folder, for which torch returns whatever is in memory."""
    path = save(tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x01\x02", 0, content.rfind(b"archive/data/0")) + 38] ^= 0x10
    path.write_bytes(content)
    assert "archive/data/0" in one_line_error(path)


def test_missing_file_and_folder(tmp_path):
    save(tmp_path / "model_best.pth")
    assert "no such file" in one_line_error(tmp_path / "model_lost.pth", kind=FileNotFoundError)
    assert "model_best.pth" in one_line_error(tmp_path / "model_lost.pth", kind=FileNotFoundError)
    assert "no such file" in one_line_error(tmp_path / "no" / "a.pth", kind=FileNotFoundError)
    assert "is a folder" in one_line_error(tmp_path, kind=IsADirectoryError)


def test_foreign_files(tmp_path):
    path = tmp_path / "a.pth"
    path.write_text("<html>404</html>")
    assert "not written by torch.save" in one_line_error(path)
    for content in ({"state_dict": {}}, [1, 2], torch.ones(2), {"format": 3}, {"format": "segheads-0", "model": {}}):
        torch.save(content, path)
        assert "not a checkpoint of this code" in one_line_error(path)
    torch.save({"format": FORMAT, "script": SCRIPT, "config": {}, "palette": [], "model": {}}, path)
    assert "incomplete, no class_names" in one_line_error(path)
    torch.save({**make_state(), "format": FORMAT, "model": 3}, path)
    assert "incomplete, no dicts in config, model" in one_line_error(path)


def test_other_script(tmp_path):
    path = save(tmp_path / "a.pth")
    message = one_line_error(path, script="train_sonata.py")
    assert SCRIPT in message and "train_sonata.py" in message
    load_checkpoint(path, script=SCRIPT)
    save_checkpoint(path, **{**make_state(), "script": "evil\n\x1b[2Jtrain.py"})
    assert "\x1b" not in one_line_error(path, script=SCRIPT)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("archive", [True, False])
def test_hostile_pickle_is_not_executed(tmp_path, archive):
    path, proof = tmp_path / "a.pth", tmp_path / "executed"
    for call in ((os.system, f"touch {proof}"), (eval, f"open({str(proof)!r}, 'w')"), (os.mkdir, str(proof))):
        torch.save({"format": FORMAT, **make_state(), "best": Hostile(*call)}, path,
                   _use_new_zipfile_serialization=archive)
        message = one_line_error(path)
        assert "Python objects" in message if archive else "not written by torch.save" in message
        with pytest.raises(ValueError):
            find_resume(path, tmp_path)
        with pytest.raises(ValueError, match="Python objects"):
            read_weights(path)
        assert not proof.exists()


# -- resume --------------------------------------------------------------------

def test_find_resume_none_and_path(tmp_path):
    path = save(tmp_path / "model_last.pth")
    assert find_resume(None, tmp_path) == (None, [])
    assert find_resume(str(path), tmp_path / "other") == (path, [])
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_resume(tmp_path / "no.pth", tmp_path)
    with pytest.raises(ValueError, match="train_sonata"):
        find_resume(path, tmp_path, script="train_sonata.py")
    flip_weight(path)
    with pytest.raises(ValueError, match="damaged"):
        find_resume(path, tmp_path)


def test_auto_fresh_start(tmp_path):
    for folder in (tmp_path, tmp_path / "not there"):
        path, messages = find_resume("auto", folder)
        assert path is None and "starting afresh" in messages[0]


def test_auto_falls_back_to_the_newest_readable(tmp_path):
    last = save(tmp_path / "model_last.pth", epoch=12)
    ten, nine = (save(tmp_path / f"checkpoint_epoch_{epoch}.pth", epoch=epoch) for epoch in (10, 9))
    best = save(tmp_path / "model_best.pth", epoch=4)
    assert find_resume("auto", tmp_path) == (last, [f"resuming from {last}"])
    flip_weight(last)
    path, messages = find_resume("auto", tmp_path)
    assert path == ten                             # not 9, which sorts behind it as text
    assert "damaged" in messages[0] and str(last) in messages[0] and messages[-1] == f"resuming from {ten}"
    ten.write_bytes(ten.read_bytes()[:500])
    path, messages = find_resume("auto", tmp_path)
    assert path == nine and len(messages) == 3 and "truncated" in messages[1]
    save(best, epoch=11)
    assert find_resume("auto", tmp_path)[0] == best
    last.unlink()
    nine.unlink()
    best.unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* can be used.*truncated"):
        find_resume("auto", tmp_path)


def test_auto_starts_afresh_beside_pretrained_weights(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "resnet50.pth")
    path, messages = find_resume("auto", tmp_path)
    assert path is None and "starting afresh" in messages[0]
    save(tmp_path / "warmup.pth")
    assert find_resume("auto", tmp_path)[0] == tmp_path / "warmup.pth"


def test_auto_does_not_overwrite_another_scripts_run(tmp_path):
    save(tmp_path / "model_last.pth")
    with pytest.raises(ValueError, match="train_downstream.py"):
        find_resume("auto", tmp_path, script="train_sonata.py")


def train(path, steps, resume=None):
    """A run with everything that has a state: dropout, batch norm, AdamW, schedule, shuffling, NumPy, Python."""
    seed_everything(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    sampler = EpochBatchSampler(20, 4, seed=0)
    start = 0
    if resume:
        checkpoint = load_checkpoint(resume)
        for part, name in ((net, "model"), (optimizer, "optimizer"), (scheduler, "scheduler")):
            part.load_state_dict(checkpoint[name])
        set_rng_state(checkpoint["rng"])
        start = checkpoint["step"]
    losses = []
    for epoch in range(start // 5, 3):
        sampler.set_epoch(epoch, start_batch=start % 5 if epoch == start // 5 else 0)
        for step, batch in enumerate(sampler, start=max(start, epoch * 5) + 1):
            noise = torch.from_numpy(np.random.randn(len(batch), 3)).float()
            loss = net(data[batch] + noise).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if step == steps:
                state = make_state(optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
                                   step=step, rng=rng_state())
                save_checkpoint(path, **{**state, "model": net.state_dict()})
                return losses


@pytest.mark.parametrize("stop", [1, 7, 10])
def test_resume_is_exact_also_inside_an_epoch(tmp_path, stop):
    straight = train(tmp_path / "straight.pth", 12)
    first = train(tmp_path / "broken.pth", stop)
    second = train(tmp_path / "resumed.pth", 12, resume=tmp_path / "broken.pth")
    assert first + second == straight
    assert same(load_checkpoint(tmp_path / "straight.pth"), load_checkpoint(tmp_path / "resumed.pth"))


# -- what is kept --------------------------------------------------------------

def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("order", ["best first", "last first"])
def test_keeper_run(tmp_path, order):
    keeper = CheckpointKeeper(tmp_path, keep_top_k=2, save_interval=3)
    bests = []
    for epoch, score in enumerate([0.2, 0.5, math.nan, 0.5, 0.1, 0.4, 0.3], start=1):
        state = make_state(float(epoch), epoch=epoch)
        if order == "last first":
            keeper.save_last(state)
        bests.append(keeper.save_best_if(score, state))
        assert keeper.save_epoch(epoch, state) == (epoch % 3 == 0)
        if order == "best first":
            keeper.save_last(state)
        assert load_checkpoint(tmp_path / "model_last.pth")["best"] == keeper.state_dict()
    assert bests == [True, True, False, False, False, False, False]        # a tie is no improvement, NaN neither
    assert keeper.state_dict() == {"score": 0.5, "epoch": 2, "top": [[0.5, 2], [0.5, 4]]}
    assert names_in(tmp_path) == ["checkpoint_epoch_3.pth", "checkpoint_epoch_6.pth", "checkpoint_top_2.pth",
                                  "checkpoint_top_4.pth", "model_best.pth", "model_last.pth"]
    assert value_in(tmp_path / "model_best.pth") == 2 and value_in(tmp_path / "model_last.pth") == 7
    assert value_in(tmp_path / "checkpoint_top_4.pth") == 4 and value_in(tmp_path / "checkpoint_epoch_6.pth") == 6


def test_keeper_resumed_goes_on_as_if_never_stopped(tmp_path):
    scores = [0.3, 0.2, 0.5, 0.4, 0.5, 0.1]
    for folder in (tmp_path / "straight", tmp_path / "broken"):
        keeper = CheckpointKeeper(folder, keep_top_k=2, save_interval=0, mode="min")
        for epoch, score in enumerate(scores, start=1):
            state = make_state(float(epoch), epoch=epoch)
            keeper.save_best_if(score, state)
            keeper.save_last(state)
            if folder.name == "broken":
                keeper = CheckpointKeeper(folder, keep_top_k=2, save_interval=0, mode="min")
                keeper.load_state_dict(load_checkpoint(folder / "model_last.pth")["best"])
    assert keeper.state_dict() == {"score": 0.1, "epoch": 6, "top": [[0.1, 6], [0.2, 2]]}
    assert names_in(tmp_path / "straight") == names_in(tmp_path / "broken") == \
        ["checkpoint_top_2.pth", "checkpoint_top_6.pth", "model_best.pth", "model_last.pth"]
    assert value_in(tmp_path / "broken" / "model_best.pth") == 6


def test_keeper_writes_one_state_once_and_the_copies_are_independent(tmp_path, monkeypatch):
    written, torch_save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: (written.append(1), torch_save(*arguments)))
    keeper = CheckpointKeeper(tmp_path, keep_top_k=1, save_interval=1)
    state = make_state(epoch=1)
    keeper.save_best_if(0.5, state)
    keeper.save_epoch(1, state)
    keeper.save_last(state)
    assert len(written) == 1 and len(names_in(tmp_path)) == 4
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with open(tmp_path / "model_last.pth", "r+b") as file:
        file.truncate(100)
    assert find_resume("auto", tmp_path)[0].name.startswith("checkpoint_")


def test_keeper_notices_that_a_reused_state_has_changed(tmp_path):
    keeper = CheckpointKeeper(tmp_path, save_interval=1)
    state = make_state(1.0)
    keeper.save_last(state)
    with torch.no_grad():
        state["model"]["weight"].add_(1)
    keeper.save_epoch(1, state)
    assert value_in(tmp_path / "checkpoint_epoch_1.pth") == 2 and value_in(tmp_path / "model_last.pth") == 1
    (tmp_path / "checkpoint_epoch_1.pth").unlink()
    keeper.save_last(state)                        # its copy is gone: written again
    assert value_in(tmp_path / "model_last.pth") == 2


def test_keeper_refused_write_changes_nothing(tmp_path):
    keeper = CheckpointKeeper(tmp_path, keep_top_k=1)
    keeper.save_best_if(0.5, make_state(1.0, epoch=1))
    before, files = keeper.state_dict(), {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FloatingPointError):
        keeper.save_best_if(0.9, make_state(math.nan, epoch=2))
    assert keeper.state_dict() == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_keeper_scores_one_epoch_twice(tmp_path):
    keeper = CheckpointKeeper(tmp_path, keep_top_k=1, save_interval=0)
    for epoch, score in ((1, 0.5), (2, 0.6), (2, 0.4), (3, 0.45)):
        keeper.save_best_if(score, make_state(score, epoch=epoch))
    assert keeper.top == [[0.45, 3]] and names_in(tmp_path) == ["checkpoint_top_3.pth", "model_best.pth"]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_keeper_never_keeps_a_score_that_is_not_finite(tmp_path, score):
    keeper = CheckpointKeeper(tmp_path, keep_top_k=3)
    assert not keeper.save_best_if(score, make_state(epoch=1))
    assert keeper.state_dict() == {"score": None, "epoch": None, "top": []} and names_in(tmp_path) == []


def test_keeper_errors(tmp_path):
    with pytest.raises(ValueError, match="mode 'best'"):
        CheckpointKeeper(tmp_path, mode="best")
    with pytest.raises(ValueError, match="keep_top_k -1"):
        CheckpointKeeper(tmp_path, keep_top_k=-1)
    with pytest.raises(ValueError, match="by epoch"):
        CheckpointKeeper(tmp_path, keep_top_k=1).save_best_if(0.5, make_state())


def test_early_stopping():
    stopping = EarlyStopping(2, min_delta=0.1)
    assert [stopping.update(score) for score in (0.5, 0.55, 0.7, math.nan, 0.79)] == [False, False, False, False, True]
    down = EarlyStopping(1, mode="min")
    assert [down.update(score) for score in (3.0, 2.0, 2.0)] == [False, False, True]
    resumed = EarlyStopping(2, min_delta=0.1)
    resumed.load_state_dict({"best": 0.7, "waited": 1})
    assert resumed.update(0.75) and resumed.state_dict() == {"best": 0.7, "waited": 2}
    for never in (0, None):
        assert not any(EarlyStopping(never).update(0.0) for _ in range(5))
    never = EarlyStopping(0)
    assert not any([never.update(0.0) for _ in range(5)])
    for bad in ({"patience": -1}, {"patience": 1, "min_delta": -0.1}, {"patience": 1, "mode": "up"}):
        with pytest.raises(ValueError):
            EarlyStopping(**bad)
