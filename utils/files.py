"""Files that are there whole or not at all, folders with one run at a time, and what killed processes left of both.

Everything that writes a file under a temporary name does so through `replacing`. The name holds the machine and the
process, so that `remove_leftovers` knows what nobody will finish; it is new each time and opened exclusively: two
processes never write into one file, and nothing is written through a link that lies there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:                                # Windows
    fcntl = None

LOCK = "run.lock"
TEMPORARY = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}\.tmp$")
_cleaned: set[tuple[int, Path]] = set()            # (process, folder): see remove_leftovers_once
_held: set[Path] = set()                           # locks of this process


# -- processes ---------------------------------------------------------------------------------------------------------

def started(pid: int) -> int:
    """When a process of this machine began, in clock ticks, so that a number given twice is not taken for the same
    process; 0 where the system does not say. ProcessLookupError: there is none, or only its exit status is left."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if os.name == "posix":
            with contextlib.suppress(PermissionError):      # another user's
                os.kill(pid, 0)
        return 0
    if state in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[18])


def is_running(pid: int, began: int) -> bool:
    """Whether the process with this number that began then is alive on this machine."""
    try:
        return started(pid) in (0, began) or not began
    except ProcessLookupError:
        return False


def _host_digest() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


# -- writing -----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path: str | Path, text: bool = False, sync: bool = False) -> Iterator[IO]:
    """Opens a new file beside `path`, for bytes (reading, too) or text in UTF-8, with the permissions that the umask
    gives; renames it to `path` on success, and removes it on any error, Ctrl-C included.

    sync: what `path` names is on the disk when this returns, also after a power cut.
    """
    path = Path(path)
    (remove_leftovers if sync else remove_leftovers_once)(path.parent)
    temporary, file = _new_file(path, text)
    try:
        try:
            with file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if sync and os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:                       # of a write: a full disk has no name
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _new_file(path: Path, text: bool) -> tuple[Path, IO]:
    own = f"{_host_digest()}-{os.getpid()}-{started(os.getpid())}"
    while True:
        temporary = path.with_name(f"{path.name}.{own}-{secrets.token_hex(4)}.tmp")
        with contextlib.suppress(FileExistsError):  # a link, too: exclusive creation follows none
            if text:
                return temporary, open(temporary, "x", encoding="utf-8", errors="backslashreplace")
            return temporary, open(temporary, "x+b")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the half-written files of `replacing` whose process has ended; those of other machines stay."""
    with contextlib.suppress(OSError):             # no such folder, or not ours to clean
        for name in os.listdir(folder):
            owner = TEMPORARY.search(name)
            if owner and owner["host"] == _host_digest() and not is_running(int(owner["pid"]), int(owner["started"])):
                Path(folder, name).unlink(missing_ok=True)


def remove_leftovers_once(folder: str | Path) -> None:
    """remove_leftovers, at the first call for this folder in this process: cheap enough for each entry of a cache."""
    key = (os.getpid(), Path(folder))
    if key not in _cleaned:
        _cleaned.add(key)
        remove_leftovers(folder)


# -- one run at a time -------------------------------------------------------------------------------------------------

class RunLock:
    """`with lock:` holds a file run.lock in each of the folders that a training run writes into.

    It names the process and the machine. ValueError, when made and when entered, where another live process of this
    machine, or any of another machine, holds one of them; and when entered where the file `watched`, from which the
    run goes on, was written since the lock was made. The lock of a process that has ended is taken over, and `messages`
    says so.
    """

    def __init__(self, script: str, folders: Sequence[str | Path], watched: Path | None = None) -> None:
        self.messages: list[str] = []
        self._script = script
        self._paths = [Path(folder) / LOCK for folder in dict.fromkeys(map(Path, folders))]
        self._watched = watched
        self._text: str | None = None
        for path in self._paths:
            if os.path.lexists(path):
                _left_over(path)                   # refused at once, before data are prepared
        self._seen = self._stamp()

    def _stamp(self) -> tuple | None:
        if self._watched is None or not self._watched.exists():
            return None
        state = self._watched.stat()
        return state.st_ino, state.st_mtime_ns, state.st_size

    def __enter__(self) -> RunLock:
        own = {"script": self._script, "pid": os.getpid(), "host": socket.gethostname(),
               "started": started(os.getpid()), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        self._text = json.dumps(own | {"token": secrets.token_hex(4)})
        try:
            for path in self._paths:
                self._take(path)
            if self._stamp() != self._seen:
                raise ValueError(f"{self._watched}: written by another run while this one prepared; start it again")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _take(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if os.path.lexists(path):
                line = _left_over(path)
                with contextlib.suppress(FileNotFoundError):    # released this moment
                    path.unlink()
                    self.messages.append(line)
            try:
                with open(path, "x", encoding="utf-8") as file:
                    _held.add(path.resolve())
                    file.write(self._text)
            except OSError as error:               # a full disk has no name
                error.filename = str(path)
                raise

    def __exit__(self, *exception) -> None:
        for path in self._paths:
            with contextlib.suppress(OSError):
                if path.resolve() in _held and path.read_text(encoding="utf-8") in (self._text, ""):
                    _held.discard(path.resolve())
                    path.unlink()
        self._seen = self._stamp()


class Together:
    """Files STEM + ending that appear together, or not at all on an error or Ctrl-C: `with Together(stem) as files`.

    They are written under names that hide them, and renamed at the end, the first one last: where that is, all are.
    A folder for each group would take longer than a small file. paths: under their own names, in order.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.paths: list[Path] = []
        self._temporary: list[Path] = []
        self._token = secrets.token_hex(4)

    def new(self, ending: str) -> Path:
        """Where to write STEM + ending."""
        self.paths.append(self.stem.with_name(f"{self.stem.name}{ending}"))      # not with_suffix: names may have dots
        self._temporary.append(self.stem.with_name(f".writing_{self._token}{ending}"))
        return self._temporary[-1]

    def __enter__(self) -> Together:
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            moves = list(zip(self._temporary, self.paths, strict=True)) if kind is None else []
            for temporary, path in (*moves[1:], *moves[:1]):
                temporary.replace(path)
        finally:
            for temporary in self._temporary:
                temporary.unlink(missing_ok=True)


def read_lock(path: Path) -> dict[str, Any]:
    """What a run.lock says; {} for one that was cut short when its process was killed."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        holder["pid"], holder["started"] = int(holder["pid"]), int(holder["started"])
        return holder if 0 < holder["pid"] < 1 << 31 else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _left_over(path: Path) -> str:
    """A line about a lock that nobody holds. ValueError for one that is held, or may be."""
    holder = read_lock(path)
    if holder and holder.get("host") != socket.gethostname():
        raise ValueError(f"{path.parent}: in use by {_described(holder)} on {holder.get('host')}; wait for it or "
                         f"choose another --output-dir; if it no longer runs there, remove {path}")
    held = bool(holder) and is_running(holder["pid"], holder["started"])
    if holder.get("pid") == os.getpid():           # this process's, unless its number was another's before
        held = path.resolve() in _held
    if held:
        raise ValueError(f"{path.parent}: in use by {_described(holder)}; wait for it, stop it, or choose another "
                         f"--output-dir")
    return f"{path}: taken over from {_described(holder)}, which ended without removing it"


def _described(holder: dict) -> str:
    if not holder:
        return "a process"
    return f"{holder.get('script')} (process {holder['pid']}, since {holder.get('since')})"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time looks at a lock and takes it."""
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if handle is not None:
            with contextlib.suppress(OSError):     # a file system without it
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)
