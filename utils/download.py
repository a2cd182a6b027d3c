"""Downloading large published files: resumed where they broke off, verified before they count, unpacked safely."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

BLOCK = 1 << 20
TIMEOUT = 30                     # seconds without a byte
PAUSE = 1.0                      # seconds before the second try, then twice that ...
TRIES = 4                        # in a row that bring nothing new, for each address
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
BOMB_SIZE, BOMB_RATIO = 1 << 30, 100        # more than a GiB out of less than a hundredth of it is no data set
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


def mismatch(path: Path, size: int | None, digest: tuple[str, str] | None) -> str | None:
    """What tells a file from the published one, None if nothing does; digest: (hashlib's name, its first digits)."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size:,} bytes instead of {size:,}"
    if digest is not None:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, digest[0]).hexdigest()
        if not found.startswith(digest[1]):
            return f"{digest[0]} {found} instead of {digest[1]}"
    return None


def fetch(urls: Sequence[str], path: str | Path, size: int | None = None,
          digest: tuple[str, str] | None = None) -> Path:
    """Download `path` from the first of `urls` that gives the right file; a file that is there already is kept.

    What has arrived lies in PATH.part, from which the next call goes on, and becomes PATH once size and digest are
    verified, where they are given; otherwise it is deleted, and begun anew. ValueError: a file of this name that is
    another one, no address that gives the right one.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        if problem := mismatch(path, size, digest):
            raise ValueError(f"{path}: {problem}; delete it, and run this again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        again = True
        while again:
            again = part.exists()                           # damage may be old: then once more from the start
            try:
                _download(url, part, size)
            except NETWORK_ERRORS as error:
                failures.append(f"{url} ({getattr(error, 'reason', None) or error or type(error).__name__})")
                break
            if (problem := mismatch(part, size, digest)) is None:
                os.replace(part, path)
                return path
            part.unlink()
            failures.append(f"{url} (damaged, {problem})")
    raise ValueError(f"{path.name} could not be downloaded: {', '.join(failures)}. Is this computer offline? Run this "
                     f"again to go on, or fetch the file elsewhere and put it here as {path}")


def _download(url, part, size):
    """Append what is missing to `part`, until it is whole as far as the server tells."""
    failed = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have == size:
            return
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                whole = _receive(response, part, have, size)
            if whole:
                return
            error = ConnectionError("the connection broke off")
        except urllib.error.HTTPError as refused:
            error = refused
            if refused.code == 416:                         # nothing behind `have`: the whole file, or another one
                if refused.headers.get("Content-Range", "").endswith(f"*/{have}"):
                    return
                part.unlink()
            elif refused.code < 500 and refused.code != 429:
                raise
        except NETWORK_ERRORS as broken:
            error = broken
        failed = 0 if part.exists() and part.stat().st_size > have else failed + 1
        if failed == TRIES:
            raise error
        time.sleep(PAUSE * 2 ** (failed - 1))


def _receive(response, part, have, size):
    """Write an answer behind the first `have` bytes, or over them where the server sends all; whether it was whole."""
    place = response.headers.get("Content-Range", "")
    start = have if response.status == 206 and place.startswith(f"bytes {have}-") else 0
    if response.status == 206 and start != have:
        part.unlink()                                       # some other range; the next try asks for everything
        return False
    length = response.headers.get("Content-Length")
    total = None if length is None else start + int(length)
    with open(part, "ab" if start else "wb") as file, tqdm(desc=part.stem, total=total or size, initial=start, unit="B",
                                                           unit_scale=True, leave=False, disable=None) as bar:
        while block := response.read(BLOCK):
            file.write(block)
            bar.update(len(block))
    return total is None or part.stat().st_size == total


# -- archives ----------------------------------------------------------------------------------------------------------

def extract(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip file into `folder`. ValueError, before anything is written, for members that would land
    outside of it or are links out of it or devices, for a bomb, and for a damaged archive."""
    total = 0
    size = archive.stat().st_size

    def check(name, unpacked):
        nonlocal total
        total += unpacked
        _check_size(archive, size, total)
        if PurePosixPath(name).is_absolute() or ".." in name.replace("\\", "/").split("/"):
            raise ValueError(f"{archive}: its member {name!r} would be written outside of {folder}; do not trust it")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                for info in file.infolist():
                    check(info.filename, info.file_size)
                file.extractall(folder)
            return
        with tarfile.open(archive) as file:
            for member in file:
                check(member.name, member.size)
                tarfile.data_filter(member, str(folder))
            file.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise ValueError(f"{archive}: {error}; do not trust it") from error
    except BROKEN as error:
        raise ValueError(f"{archive}: damaged ({_first_line(error)}); delete it, and run this again") from error


def extract_flat(archive: Path, folder: Path, ending: str) -> None:
    """Unpack the files of a zip archive whose names end in `ending` right into `folder`, whatever folders they are in.
    ValueError for a bomb and for a damaged archive."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as file:
            _check_size(archive, archive.stat().st_size, sum(info.file_size for info in file.infolist()))
            for member in file.namelist():
                name = member.replace("\\", "/").rsplit("/", 1)[-1]
                if name.endswith(ending) and not name.startswith("."):               # ._NAME is macOS's
                    (folder / name).write_bytes(file.read(member))
    except BROKEN as error:
        raise ValueError(f"{archive}: damaged ({_first_line(error)}); delete it, and run this again") from error


def _check_size(archive, packed, unpacked):
    if unpacked > max(BOMB_SIZE, BOMB_RATIO * packed):
        raise ValueError(f"{archive}: {packed:,} bytes that would become {unpacked:,} or more; do not trust it")


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
