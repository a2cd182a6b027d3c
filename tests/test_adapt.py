"""docs/adapt.md cannot go stale: its diff is applied to the script as it stands; the result trains, resumes, is scored and labels photographs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_images import write_classes, write_pictures
from utils.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts beside the project's folders, with the script of the page."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("models", "data", "utils"):
        (folder / name).symlink_to(ROOT / name)
    for path in ROOT.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    (folder / "train_my_head.py").write_text((ROOT / "train_linear_head.py").read_text())
    diff, = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "adapt.md").read_text(), re.DOTALL)
    done = subprocess.run(["git", "apply"], input=diff, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(project, *commands):
    """Commands (script, argument, ...) one after the other, in one process of the copy; what they print, by command."""
    code = "import importlib, sys\nfor script, *arguments in " + repr([list(map(str, command)) for command in commands]) + ":\n" \
           "    importlib.import_module(script.removesuffix('.py')).main(arguments)\n    print('-- end --')"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.split("-- end --")


def test_the_adapted_script_trains_resumes_is_scored_and_predicts(project, tmp_path):
    data = write_pictures(tmp_path / "data", 4)
    write_classes(data / "classes.json")
    common = ["--image-paths", data / "images", "--mask-paths", data / "masks", "--num-classes", "3", "--classes", data / "classes.json",
              "--backbone", "dinov3_vits16", "--backbone-weights", "random", "--image-size", "64", "--batch-size", "2", "--device", "cpu",
              "--num-workers", "0", "--cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out", "--lr", "0.01", "--epochs", "2"]
    last = tmp_path / "out" / "model" / "model_last.pth"
    printed, scored, *_ = run(
        project, ("train_my_head.py", *common, "--val-image-paths", data / "images", "--val-mask-paths", data / "masks", "--validate"),
        ("evaluate.py", last, "--data-dir", data / "images", "--label-dir", data / "masks", "--device", "cpu"),
        ("predict.py", last, data / "images", "--output", tmp_path / "pred", "--device", "cpu"))
    assert "Val mIoU" in printed
    checkpoint = load_checkpoint(last, "train_my_head.py")
    assert checkpoint["step"] == 4 and {"conv.weight", "up.0.weight", "up.2.weight"} < checkpoint["model"].keys()
    assert "overall accuracy" in scored and (tmp_path / "out" / "evaluation" / "report.html").is_file()
    for path in (data / "images").iterdir():
        assert np.array(Image.open(tmp_path / "pred" / f"{path.stem}.png")).max() < 3


def test_the_diff_touches_the_method_alone():
    """The page promises that the run is not in the way: nothing of main is changed, and few lines elsewhere."""
    diff, = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "adapt.md").read_text(), re.DOTALL)
    added, removed = (len(re.findall(rf"^{sign}(?![+-]{{2}})", diff, re.MULTILINE)) for sign in (r"\+", "-"))
    assert added <= 25 and removed <= 15 and "def main" not in diff and "run.track" not in diff
