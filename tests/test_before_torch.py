"""--help and a wrong command line are answered without the large packages; a right one reaches the script as it is."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
WITH_CONFIG = ("train_downstream.py", "train_jepa.py", "train_prototype.py", "train_segmentation.py", "train_sonata.py")
LARGE = ("torch", "scipy", "sklearn", "trimesh", "safetensors", "tensorboard")
# Runs each command line in a child of its own, with what is small imported once.
FORKS = """
import json, os, runpy, sys, PIL.Image, numpy, tqdm, yaml
sys.path.insert(0, os.getcwd())
answers = []
for index, argv in enumerate(json.loads(sys.stdin.read())):
    if not (pid := os.fork()):
        sys.argv = argv
        sys.modules["__main__"].__file__ = argv[0]
        for number in (1, 2):
            os.dup2(os.open(f"{sys.argv_out}/{index}.{number}", os.O_WRONLY | os.O_CREAT), number)
        runpy.run_path(argv[0], run_name="__main__")
        os._exit(99)
    answers.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(answers))
"""


def answers(commands, tmp_path) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each command, where an import of a large package is an error."""
    for name in LARGE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    code = FORKS.replace("{sys.argv_out}", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps([list(map(str, c)) for c in commands]), cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    texts = [[(tmp_path / f"{index}.{number}").read_text() for number in (1, 2)] for index in range(len(commands))]
    return [(status, *text) for status, text in zip(json.loads(done.stdout), texts, strict=True)]


def test_help_of_every_script(tmp_path):
    for script, (status, out, error) in zip(SCRIPTS, answers([(script, "--help") for script in SCRIPTS], tmp_path), strict=True):
        assert status == 0 and out.startswith(f"usage: {script}") and error == "", (script, error)


def test_mistakes_of_every_script(tmp_path):
    commands = [(script, "--no-such-flag") for script in SCRIPTS] + [(script, "no.yaml") for script in WITH_CONFIG]
    words = ["unknown flag --no-such-flag"] * len(SCRIPTS) + ["no.yaml: no such settings file"] * len(WITH_CONFIG)
    for command, word, (status, out, error) in zip(commands, words, answers(commands, tmp_path), strict=True):
        assert status == 2 and out == "" and error.count("\n") == 1 and error.startswith("error: ") and word in error, (command, error)


def test_the_answer_is_that_of_the_script(tmp_path, capfd, monkeypatch):
    from importlib import import_module

    from utils.cli import run_main
    commands = [("train_segmentation.py", "configs/segmentation_camvid.yaml", "optimizer.lr=1e-4", "optimizer.name=adamm"),
                ("train_linear_head.py", "--batch-sise", "2")]
    for argv, (status, _, error) in zip(commands, answers(commands, tmp_path), strict=True):
        monkeypatch.setattr(sys, "argv", list(argv))
        with pytest.raises(SystemExit) as left:
            run_main(lambda argv=argv: import_module(argv[0].removesuffix(".py")).main(argv[1:]))
        assert (left.value.code, capfd.readouterr().err) == (status, error)


CHECK = """
import sys
from pathlib import Path
from utils import before_torch
before = set(sys.modules)
sys.argv = {argv}
sys.path.insert(0, {folder!r})
before_torch.answer(Path({script!r}))
import utils
left = set(sys.modules) - before
assert not any(isinstance(module, before_torch.StandIn) for module in sys.modules.values())
assert not left & {{"utils.cli", "evaluate", "data", "data.images", {stem!r}}}, left
assert not any(isinstance(value, type(sys)) and value.__name__.startswith("utils.cli") for value in vars(utils).values())
assert sys.meta_path[0] is not before_torch.Finder
"""


def check(script, argv, folder=ROOT):
    code = CHECK.format(script=script, stem=script.removesuffix(".py"), argv=[script, *argv], folder=str(folder))
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_nothing_stays_where_the_command_line_is_right():
    done = check("predict.py", ["model.pth", "photos", "--output", "out"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("default", ["torch.get_num_threads()", "unknown_package.SIDE", "1 / 0"])
def test_a_script_whose_flags_need_a_large_package_or_that_is_wrong_is_left_to_itself(tmp_path, default):
    """Its --help would show a stand-in: no answer, so that the real packages give it."""
    (tmp_path / "unknown_package.py").write_text("SIDE = 3\n")
    lines = ("import torch", "import unknown_package", "from utils.cli import ArgumentParser", "class Net(torch.nn.Module): pass",
             "def parse_args(argv=None):", "    parser = ArgumentParser()",
             f"    parser.add_argument('--x', default={default}, help='default %(default)s')", "    return parser.parse_args(argv)")
    if "unknown" not in default:
        lines = [line for line in lines if "unknown" not in line]
    (tmp_path / "train_own.py").write_text("\n".join(lines) + "\n")
    done = check("train_own.py", ["--help"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_first_import_of_every_script():
    for script in SCRIPTS:
        lines = [line for line in (ROOT / script).read_text().splitlines() if line.startswith(("import ", "from "))]
        assert lines[0] == "from __future__ import annotations" and lines[1].startswith("import utils.before_torch  # noqa: F401"), script


def test_importing_a_script_takes_only_what_every_run_needs():
    code = ("import sys, {}\nlate = {{'sklearn', 'tensorboard', 'torch._dynamo', 'trimesh', 'rasterio', 'laspy', 'matplotlib', 'wandb'}}\n"
            "print(sorted(late & set(sys.modules)))\nimport {}\nprint(sorted(late & set(sys.modules)))")
    meshes = ["train_downstream", "train_jepa", "inspect_data"]
    others = [script.removesuffix(".py") for script in SCRIPTS if script.removesuffix(".py") not in meshes]
    done = subprocess.run([sys.executable, "-c", code.format(", ".join(others), ", ".join(meshes))], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['trimesh']"], done.stdout + done.stderr


def test_a_python_that_is_too_old_is_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "utils" / "before_torch.py"))
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.startswith("error: Python ") and shown.endswith("needs 3.11 or newer\n")
