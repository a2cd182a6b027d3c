"""docs/commands.md: our commands in it are understood; theirs, typed here, get a line that says ours."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "commands.md").read_text()
OURS = [code for line in PAGE.splitlines() if line.startswith("| ") for code in re.findall("`([^`]+)`", line.split(" | ")[1])]
PYTHON = re.compile(r"(?:python|torchrun --nproc_per_node=4) ((?:scripts/)?\w+)\.py(.*)")


@pytest.mark.parametrize("code", [code for code in OURS if PYTHON.fullmatch(code)])
def test_our_commands_are_understood(code):
    script, rest = PYTHON.fullmatch(code).groups()
    module = importlib.import_module(script.replace("/", "."))
    if "head" in script and not rest:                          # "with the same flags": those of the guide, in the first column
        rest, = re.findall(r"`python demo/train_m2f_head\.py (.*?)`", PAGE)
    argv = shlex.split(rest.replace("CONFIG", "configs/sonata/utonia-scannet.yaml"))
    module.parse_args(argv)
    for path in (word for word in argv if word.startswith("configs/")):
        assert (ROOT / path).is_file(), path


def test_files_and_settings_of_the_page_exist():
    for name in re.findall(r"bash (scripts/\w+\.sh)", " ".join(OURS)):
        assert (ROOT / name).is_file(), name
    for script, prefixes in (("train_downstream", ("model", "optimizer", "training", "paths")), ("train_segmentation", ("postprocess", "evaluation"))):
        defaults = importlib.import_module(script).DEFAULTS
        for section, key in re.findall(rf"`(?:\S+ )*({'|'.join(prefixes)})\.(\w+)", PAGE.split(f"`{script}.py`")[1].split("\n## ")[0]):
            assert key in defaults[section], (section, key)


@pytest.mark.parametrize("script, argv, answer", [
    ("predict", "--checkpoint best.ckpt --images photos --output out", "unknown flag --checkpoint; name the checkpoint first, without a flag"),
    ("predict", "model.pth --images photos --output out", "unknown flag --images; files and folders follow the checkpoint, without a flag"),
    ("predict", "model.pth photos --output out --image-size 512 512", "unknown flag --image-size; leave it out: results have the photograph's own"),
    ("predict", "model.pth photos --output out --image_size 512 512", "unknown flag --image_size; leave it out: results have the photograph's own"),
    ("evaluate", "--config-file c.py --options weight=a.pth", "unknown flag --config-file; leave it out: the checkpoint holds its config"),
    ("evaluate", "--checkpoint a.pth", "unknown flag --checkpoint; name the checkpoint first, without a flag")])
def test_flags_of_the_guides_that_are_none_here(script, argv, answer, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(argv.split())
    error = capsys.readouterr().err
    assert error.startswith(f"error: {answer}") and error.count("\n") == 1


def test_a_checkpoint_of_the_guide(tmp_path):
    from utils.checkpoint import find_resume
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt: no such file; a run is saved as .*model_last\.pth, from which --resume auto goes on"):
        find_resume("runs/checkpoints/seg_baseline/last.ckpt", tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"1")
    with pytest.raises(ValueError, match="last.ckpt: "):           # one that is there is read, and refused for what it is
        find_resume(tmp_path / "last.ckpt", tmp_path)
