"""Every case of tests/bad_inputs.py: refused in one line that names place and remedy, or accepted, and nothing of the user's touched."""

import contextlib
import hashlib
import io
import os
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests.bad_inputs import CASES, DOWN, MESHES, PREDICT, SETTINGS, SONATA, UNET, Case, document, run_in
from tests.tiny_heads import add_tiny_backbone
from tests.tiny_images import shrink_unet
from utils.cli import run_main

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20                                                # of processor time; a bomb is refused in less
ROOM = 3 << 30                                              # bytes of address space beyond those in use
TRIED, HELD = Counter(), Counter()                          # refused, accepted


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    add_tiny_backbone(monkeypatch)
    shrink_unet(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def report():
    """The line of the summary, in the file that SEGHEADS_FAULTS_REPORT names."""
    yield
    if TRIED and (path := os.environ.get("SEGHEADS_FAULTS_REPORT")):
        with open(path, "a") as file:
            file.write("bad inputs: " + ", ".join(f"{kind} {HELD[kind]} of {TRIED[kind]}" for kind in ("refused", "accepted")) + "\n")


def listing(folder: Path) -> dict[str, str]:
    """{path: hash, target or kind} of the user's own: everything but what is in the cache and in the run folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        top, *rest = path.relative_to(folder).parts
        if top != "cache" and not (top == "out" and (rest or path.is_dir())):
            found[str(path.relative_to(folder))] = (
                os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder")
    return found


@contextlib.contextmanager
def little_room():
    """Memory beyond ROOM cannot be had, so that a bomb that goes off is a MemoryError here and not the end of the machine."""
    if sys.platform != "linux":
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(case: Case, folder: Path):
    """(exit status, lines on stderr, what main returned, seconds) of a case, in this process."""
    argv = case.make(folder)
    before, stderr, returned, status, begin = listing(folder), io.StringIO(), [], 0, time.process_time()
    with contextlib.redirect_stderr(stderr), little_room(), warnings.catch_warnings(action="default"):
        try:
            run_main(lambda: returned.append(run_in(folder, case.script, argv)))
        except SystemExit as stop:
            status = stop.code
    seconds = time.process_time() - begin
    assert listing(folder) == before, "files of the user's were changed"
    return status, stderr.getvalue().splitlines(), returned, seconds


@pytest.mark.parametrize("case", CASES, ids=[f"{case.script.removesuffix('.py')}-{case.name}"[:70] for case in CASES])
def test_refused_in_one_line_or_accepted(case, tmp_path):
    outcome = "accepted" if case.check else "refused"
    TRIED[outcome] += 1
    status, lines, returned, seconds = attempt(case, tmp_path)
    if case.check is not None:
        assert status == 0 and case.check(tmp_path, returned[0]), lines
    else:
        assert seconds < SECONDS                            # what is accepted may compute for longer
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1200, lines
        assert case.place in lines[0] and case.remedy in lines[0]
        left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".part") or path.name == "executed"]
        assert left == []
    HELD[outcome] += 1


@pytest.mark.slow
@pytest.mark.parametrize("script, name", [(DOWN, "an unknown key"), (SONATA, "a bomb of aliases (billion laughs)"), (UNET, "1,000 brackets deep"),
                                          (DOWN, "NaN for a coordinate"), (DOWN, "a width of a billion")])
def test_a_real_process_says_the_same(script, name, tmp_path):
    """Status 2, the line alone on stderr, nothing on stdout."""
    case = next(case for case in (*SETTINGS, *MESHES) if (case.script, case.name) == (script, name))
    done = subprocess.run([sys.executable, ROOT / script, *case.make(tmp_path)], cwd=tmp_path, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 << 30,) * 2))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and case.place in done.stderr and case.remedy in done.stderr


@pytest.mark.slow
def test_names_that_are_not_utf_8_in_a_real_process(tmp_path):
    """Python cannot print such a name as it is: neither the results nor the message may be lost over that."""
    case = next(case for case in MESHES if case.name == "a name that is not UTF-8")
    done = subprocess.run([sys.executable, ROOT / PREDICT, *case.make(tmp_path)], cwd=tmp_path, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    assert case.check(tmp_path, None) and b"wrote 1 result" in done.stdout


def test_the_table_is_large_and_covers_every_script():
    assert len({(case.script, case.name, case.kind) for case in CASES}) == len(CASES) > 300
    scripts = {path.name for path in ROOT.glob("train_*.py")} | {"evaluate.py", "predict.py", "export.py", "inspect_data.py",
               "scripts/preprocess_s3dis.py",
               *(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("download_*.py"))}
    assert scripts <= {case.script for case in CASES}
    assert all(case.check or (case.place and case.remedy) for case in CASES)


def test_the_document_is_up_to_date():
    assert (ROOT / "docs" / "bad_inputs.md").read_text(encoding="utf-8") == document(), "python -m tests.bad_inputs > docs/bad_inputs.md"
