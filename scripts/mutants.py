"""How much do the tests notice? Plant random mistakes in models/, data/ and utils/, one at a time, and run the tests.

    bash scripts/mutants.sh 50                              # about half a minute each on one core
    bash scripts/mutants.sh 20 --seed 3 --only utils/losses.py data

A mistake is a changed comparison, sign, operator, constant, `and`, `or` or `not`. The same seed and code give the same
mistakes. Each one is planted in a temporary copy of the repository, in which the tests of its module then run:
tests/test_MODULE.py and the golden tests that import the module; where they pass, the other tests that import it. A
test that fails or does not end has noticed it. A survivor either changes nothing (an equivalent mutant) or needs a
test.
"""

import argparse
import ast
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("models", "data", "utils")
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
           ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Mod: ast.FloorDiv}


class Mutant(NamedTuple):
    path: str                       # models/x.py
    line: int
    old: str
    new: str
    source: str                     # of the file with the mistake


def changed(node: ast.AST) -> ast.AST | None:
    """The node with a mistake in it, or None where it has no place for one."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        return ast.Compare(node.left, [SWAPPED[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        return ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        return node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return ast.Constant(not node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        return ast.Constant(2 * node.value or 1.0)
    return None


def places(node: ast.AST) -> list[ast.AST]:
    """Nodes in which a mistake would be one of the program: not in annotations, messages, and assertions of our own."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.arg):
        return []
    children = [child for name, value in ast.iter_fields(node) if name not in ("annotation", "returns")
                for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
    here = [node] if changed(node) is not None else []
    return here + [place for child in children for place in places(child)]


def planted(path: str, source: str, node: ast.AST) -> Mutant:
    """The mutant of a file that has a mistake at `node`."""
    lines = source.encode().splitlines(keepends=True)
    begin = sum(map(len, lines[:node.lineno - 1])) + node.col_offset           # columns count bytes
    end = sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
    new = ast.unparse(ast.fix_missing_locations(changed(node)))
    text = source.encode()[:begin] + f"({new})".encode() + source.encode()[end:]
    return Mutant(path, node.lineno, " ".join(source.encode()[begin:end].decode().split()), new, text.decode())


def draw(count: int, seed: int, only: list[str]) -> list[Mutant]:
    """`count` mutants, or all there are, of the files whose path begins with one of `only`; ordered by file."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        name, source = str(path.relative_to(ROOT)), path.read_text()
        if not only or name.startswith(tuple(only)):
            found += [(name, source, node) for node in places(ast.parse(source))]
    chosen = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [planted(*found[index]) for index in sorted(chosen)]


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


def importers(path: str, of: str) -> list[str]:
    """Files that match the pattern `of` and import the module at `path`."""
    folder, name = Path(path).parent, Path(path).stem
    pattern = rf"(from|import) {folder}\.{name}\b|from {folder} import [^\n]*\b{name}\b"
    return sorted(str(other.relative_to(ROOT)) for other in ROOT.glob(of) if re.search(pattern, text_of(other)))


def tests_of(path: str) -> list[tuple[str, ...]]:
    """Groups of test files: those of the module, then all others that import it; without both, those of its users."""
    own = f"tests/test_{Path(path).stem}.py"
    own = dict.fromkeys([*([own] if (ROOT / own).is_file() else []), *importers(path, "tests/test_golden_*.py")])
    others = [test for test in importers(path, "tests/test_*.py") if test not in own]
    if not own and not others:
        users = [user for folder in (*FOLDERS, ".") for user in importers(path, f"{folder}/*.py")]
        others = [test for user in users if (ROOT / (test := f"tests/test_{Path(user).stem}.py")).is_file()]
    return [tuple(group) for group in (own, others) if group]


def preload() -> None:
    """What tests import, once for all runs, which are forked. Nothing of the repository: that comes from the copy."""
    import hypothesis  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import scipy.sparse.linalg  # noqa: F401
    import scipy.spatial  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import trimesh  # noqa: F401
    import yaml  # noqa: F401


def run_tests(copy: Path, tests: tuple[str, ...], limit: float) -> bool:
    """Whether they pass within `limit` seconds; in a child of this process, in the folder `copy`."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        for number in (1, 2):
            os.dup2(os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        import pytest

        os._exit(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={copy}/tmp", *tests]))
    end = time.monotonic() + limit
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.05)
    return done[1] == 0


def noticed(copy: Path, mutant: Mutant, seconds: dict) -> bool:
    """Whether a test fails with it. seconds: {group of test files: what it takes}, filled here by a run without it."""
    path = copy / mutant.path
    for tests in tests_of(mutant.path):
        if tests not in seconds:
            started = time.monotonic()
            if not run_tests(copy, tests, 3600):
                sys.exit(f"error: {' '.join(tests)} fail as it is: {(copy / 'output.txt').read_text()}")
            seconds[tests] = time.monotonic() - started
        original = path.read_text()
        path.write_text(mutant.source)
        passed = run_tests(copy, tests, 30 + 5 * seconds[tests])
        path.write_text(original)
        if not passed:
            return True
    return False


def git_files() -> list[str]:
    """What git tracks, and new files that it does not ignore."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="mistakes to plant")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATH", help="files or folders")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True          # a mutant of the size and second of the last one would be taken for it
    mutants = draw(args.count, args.seed, args.only)
    preload()
    survivors, seconds = [], {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        for name in git_files():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for number, mutant in enumerate(mutants, 1):
            seen = noticed(copy, mutant, seconds)
            survivors += [] if seen else [mutant]
            print(f"{number}/{len(mutants)} {'noticed ' if seen else 'SURVIVED'} {mutant.path}:{mutant.line}: "
                  f"{mutant.old}  ->  {mutant.new}", flush=True)
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} mistakes were noticed (seed {args.seed}). Not noticed:")
    for mutant in survivors:
        print(f"  {mutant.path}:{mutant.line}: {mutant.old}  ->  {mutant.new}")


if __name__ == "__main__":
    main()
