"""utils/files.py: whole files under names nobody guesses, one run a folder, and what killed processes leave of both."""

import json
import os
import signal
import socket
import stat
import time
from pathlib import Path

import pytest

import utils.files as files
from utils.files import LOCK, RunLock, Together, is_running, read_lock, remove_leftovers, replacing, started


def in_child(call) -> int:
    """The number of a child that has ended after call()."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return pid


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# -- writing -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [True, False])
def test_whole_or_not_at_all(tmp_path, text):
    path = tmp_path / "a.json"
    content = "é\udcff" if text else b"\x00\xff"
    for error in (None, KeyboardInterrupt, ValueError):
        try:
            with replacing(path, text=text) as file:
                file.write(content if error is None else content[:1])
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError):
            assert error is not None
        assert path.read_bytes() == ("é\\udcff".encode() if text else content) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_link_under_a_temporary_name_is_never_written_through(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    tokens = iter(["00000000", "00000000", "11111111"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: next(tokens))
    with replacing(tmp_path / "a") as file:                    # finds out the name
        first = file.name
    os.symlink(mine, first)
    os.symlink(mine, tmp_path / "a.tmp")                       # and the name that versions before took
    with replacing(tmp_path / "a") as file:
        file.write(b"new")
        assert file.name != first
    assert mine.read_text() == "precious" and (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()
    assert os.path.islink(first)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first.name != second.name
        first.write(b"first" * 1000)
        second.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first" * 1000 and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*a'"):
        with replacing(tmp_path / "a", sync=True) as file:
            file.write(b"x")
    assert not list(tmp_path.iterdir())


# -- what killed processes left ----------------------------------------------------------------------------------------

def write_and_die(path):
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        die()


def test_half_written_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    in_child(lambda: write_and_die(tmp_path / "a.npy"))
    left, = tmp_path.iterdir()
    assert left.name.startswith("a.npy.") and left.name.endswith(".tmp")
    others = [left.name.replace(files._host_digest(), "0" * 8), "own.tmp", "a.npy.tmp"]        # another machine's, and the user's own
    for name in others:
        (tmp_path / name).write_text("x")
    with replacing(tmp_path / "b"):                            # removes it, and keeps what is being written
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == len(others) + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "b"])
    remove_leftovers(tmp_path / "none")


def test_a_number_that_was_given_again_is_another_process():
    own = os.getpid()
    assert is_running(own, started(own)) and is_running(own, 0)
    if started(own):                                           # Linux
        assert not is_running(own, started(own) + 1)
    gone = in_child(lambda: None)
    assert not is_running(gone, 0) and not is_running(gone, 1)
    zombie = os.fork()
    if zombie == 0:
        os._exit(0)
    time.sleep(0.1)
    assert not os.path.exists("/proc") or not is_running(zombie, 0)     # it has ended, and nobody has asked for its status
    os.waitpid(zombie, 0)


# -- one run at a time -------------------------------------------------------------------------------------------------

def test_a_lock_is_there_while_it_is_held(tmp_path):
    folders = [tmp_path / "run" / "model", tmp_path / "run" / "log", tmp_path / "run" / "model"]
    lock = RunLock("train_x.py", folders)
    assert not list(tmp_path.iterdir())                        # nothing before a run begins to write
    for error in (None, KeyboardInterrupt, ValueError):
        try:
            with lock:
                assert lock.messages == [] and all((folder / LOCK).is_file() for folder in folders)
                holder = read_lock(folders[0] / LOCK)
                assert (holder["pid"], holder["host"], holder["script"]) == (os.getpid(), socket.gethostname(), "train_x.py")
                if error is not None:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
        assert not list(tmp_path.rglob(LOCK))
    with RunLock("train_x.py", ()):
        pass


def answer_of_child(tmp_path, call):
    """What the ValueError says that call raises in a child, "" without one."""
    def body():
        try:
            call()
        except ValueError as error:
            (tmp_path / "answer").write_text(str(error))
    (tmp_path / "answer").write_text("")
    in_child(body)
    return (tmp_path / "answer").read_text()


def test_a_second_process_is_refused_and_the_first_keeps_its_lock(tmp_path):
    early = RunLock("train_z.py", [tmp_path / "b", tmp_path / "a"])     # before the first began
    with RunLock("train_x.py", [tmp_path / "a"]):
        for call in (lambda: RunLock("train_y.py", [tmp_path / "b", tmp_path / "a"]), early.__enter__):
            answer = answer_of_child(tmp_path, call)
            assert answer.startswith(f"{tmp_path}/a: in use by train_x.py (process {os.getpid()}, since 2")
            assert "choose another --output-dir" in answer and (tmp_path / "a" / LOCK).exists() and not (tmp_path / "b" / LOCK).exists()
        with pytest.raises(ValueError, match="in use by train_x.py"):   # in the same process, too
            early.__enter__()
        assert (tmp_path / "a" / LOCK).exists() and not (tmp_path / "b" / LOCK).exists()


def test_a_run_that_prepared_while_another_one_wrote_does_not_go_on_from_what_it_read(tmp_path):
    watched = tmp_path / "model_last.pth"
    for before in (False, True):
        lock = RunLock("train_x.py", [tmp_path], watched)
        watched.write_text(f"another run's {before}")
        with pytest.raises(ValueError, match="model_last.pth: written by another run while this one prepared; start it again"):
            lock.__enter__()
        assert not (tmp_path / LOCK).exists()
    lock = RunLock("train_x.py", [tmp_path], watched)
    for _ in range(2):                                         # its own writing is no reason
        with lock:
            watched.write_text("own")
            time.sleep(0.01)


def hold_and_die(folder):
    RunLock("train_x.py", [folder]).__enter__()
    die()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path):
    pid = in_child(lambda: hold_and_die(tmp_path))
    assert (tmp_path / LOCK).exists()
    with RunLock("train_y.py", [tmp_path]) as lock:
        line, = lock.messages
        assert line.startswith(f"{tmp_path / LOCK}: taken over from train_x.py (process {pid}, since") and "which ended" in line
        assert read_lock(tmp_path / LOCK)["script"] == "train_y.py"
    assert not (tmp_path / LOCK).exists()


def edited(path, **changes):
    """The lock as a process like this one holds it, but for the changes."""
    with RunLock("train_x.py", [path.parent]):
        holder = json.loads(path.read_text())
    path.write_text(json.dumps({**holder, **changes}))


def test_a_process_with_the_number_of_the_dead_one_goes_on(tmp_path):
    """As the first process of a container that starts again."""
    edited(tmp_path / LOCK, started=12345)
    with RunLock("train_y.py", [tmp_path]) as lock:
        assert "taken over" in lock.messages[0]
    edited(tmp_path / LOCK, pid=os.getppid(), started=12345)
    if started(os.getpid()):
        with RunLock("train_y.py", [tmp_path]) as lock:
            assert "taken over" in lock.messages[0]


def test_the_lock_of_another_machine_is_refused_with_what_to_do(tmp_path):
    edited(tmp_path / LOCK, host="elsewhere")
    before = (tmp_path / LOCK).read_text()
    with pytest.raises(ValueError, match=rf"in use by train_x.py .* on elsewhere; .*if it no longer runs there, remove {tmp_path / LOCK}"):
        RunLock("train_y.py", [tmp_path])
    assert (tmp_path / LOCK).read_text() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": -1, "host": "x", "started": 0}', b'{"pid": 99999999999, "started": 0}'])
def test_a_lock_that_was_cut_short_blocks_nobody(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with RunLock("train_x.py", [tmp_path]) as lock:
        assert len(lock.messages) == 1


def test_a_link_in_place_of_a_lock_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("precious")
    for target in ("mine", "nowhere"):
        os.symlink(tmp_path / target, tmp_path / LOCK)
        with RunLock("train_x.py", [tmp_path]):
            pass
        assert (tmp_path / "mine").read_text() == "precious" and sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_of_many_that_take_over_at_once_one_has_it(tmp_path):
    """Eight processes find the same lock of a dead one."""
    in_child(lambda: hold_and_die(tmp_path))
    begin, children = time.monotonic() + 0.3, []
    for number in range(8):
        pid = os.fork()
        if pid == 0:
            time.sleep(max(0, begin - time.monotonic()))
            try:
                with RunLock(f"train_{number}.py", [tmp_path]):
                    (tmp_path / f"have_{number}").touch()
                    time.sleep(1.5)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert len(list(tmp_path.glob("have_*"))) == 1 and not (tmp_path / LOCK).exists()


# -- several files as one -------------------------------------------------------------------------------------------------

def test_files_that_appear_together(tmp_path):
    stem = tmp_path / f"{'n' * 240}.v2"                                    # as long as names may be, and no suffix
    (tmp_path / f"{stem.name}.txt").write_text("old")
    with Together(stem) as group:
        group.new(".txt").write_text("labels")
        group.new("_overlay.ply").write_text("picture")
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [f"{stem.name}.txt"]
        assert (tmp_path / f"{stem.name}.txt").read_text() == "old"
    assert [path.name for path in group.paths] == [f"{stem.name}.txt", f"{stem.name}_overlay.ply"]
    assert sorted(tmp_path.iterdir()) == sorted(group.paths) and group.paths[0].read_text() == "labels"


def test_the_first_file_appears_last(tmp_path, monkeypatch):
    order, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, other: order.append(other.name) or replace(path, other))
    with Together(tmp_path / "a") as group:
        for ending in (".txt", ".ply", ".html"):
            group.new(ending).write_text("")
    assert order == ["a.ply", "a.html", "a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_none_appears_where_one_fails(tmp_path, error):
    with pytest.raises(error), Together(tmp_path / "a") as group:
        group.new(".txt").write_text("labels")
        group.new(".ply")                                                  # not even begun
        raise error
    assert not list(tmp_path.iterdir())
