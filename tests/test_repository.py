"""Promises that hold for every script: they have tests, the flags everybody expects, equal shared blocks and complete configs."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
FLAGS = ("--resume", "--test-only", "--seed", "--device", "--amp-dtype", "--compile", "--output-dir", "--num-workers", "--limit-batches",
         "--debug")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_tests_flags_and_a_readme_row(script):
    assert (ROOT / "tests" / f"test_{script}.py").is_file(), f"write tests/test_{script}.py: it runs the script"
    source = (ROOT / f"{script}.py").read_text()
    assert [flag for flag in FLAGS if f'"{flag}"' not in source] == []
    assert f"`{script}.py`" in (ROOT / "README.md").read_text()
    module = importlib.import_module(script)
    assert all(callable(getattr(module, name)) for name in ("parse_args", "build_model", "load_model", "main"))


def shared_blocks(script):
    """The lines from a `# same in all scripts` marker to the next blank line."""
    source = (ROOT / f"{script}.py").read_text()
    return re.findall(r"^.*# same in all scripts\n((?:.+\n)+)", source, re.MULTILINE)


def test_shared_blocks_are_the_same():
    blocks = {script: shared_blocks(script) for script in SCRIPTS}
    first = blocks[SCRIPTS[0]]
    assert len(first) >= 2, "the markers are gone"
    for script, own in blocks.items():
        for mine, other in zip(own, first, strict=True):
            common = min(len(mine.splitlines()), len(other.splitlines()))
            assert mine.splitlines()[:common] == other.splitlines()[:common], f"{script} differs from {SCRIPTS[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load(path):
    scripts = {"jepa_": "train_jepa", "mesh_": "train_downstream", "prototype_": "train_prototype", "segmentation_": "train_segmentation",
               "sonata/": "train_sonata"}
    script = next(name for prefix, name in scripts.items() if str(path.relative_to(ROOT / "configs")).startswith(prefix))
    module = importlib.import_module(script)
    module.check_config(load_config(path, module.DEFAULTS))


def test_data_package_is_not_ignored_by_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "check-ignore", "data/mesh.py", "data/new_file.py", "models/x.py"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout == ""


def test_scripts_import_without_side_effects():
    """Nothing runs on import, and --help of the shared tools does not wait for what it does not need."""
    for script in (*SCRIPTS, "evaluate", "predict"):
        source = (ROOT / f"{script}.py").read_text()
        assert source.rstrip().endswith('if __name__ == "__main__":\n    run(main)'), script
