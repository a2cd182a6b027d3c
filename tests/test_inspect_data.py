"""inspect_data.py as a user runs it: the summary, the page, the exit status, and a plan that trains."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import inspect_data
from data.synthetic import make_mesh_set
from data.synthetic_images import make_image_set
from tests.tiny_clouds import write_classes, write_clouds
from tests.tiny_images import shrink_unet
from tests.tiny_meshes import write_set
from utils import inspection_plans
from utils.inspection import Inspection, plan_text, spread

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ["--device", "cpu", "--limit-batches", "2", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shrink_unet(monkeypatch)


def inspected(*flags):
    return inspect_data.main([*map(str, flags), "--device", "cpu", "--num-workers", "1", "--minutes", "1", "--output-dir", "out"])


def trained(script, *overrides):
    config = yaml.safe_load(Path("out/plan.yaml").read_text())
    result = importlib.import_module(script).main(["out/plan.yaml", *SMOKE, "--output-dir", "run", *overrides])
    assert np.isfinite(result["loss"]) and Path("run/model/model_last.pth").is_file()
    return config


def image_flags(root, *splits):
    for split in splits:
        prefix = "" if split == "train" else f"{split}-"
        yield from (f"--{prefix}image-paths", root / "images" / split, f"--{prefix}mask-paths", root / "masks" / split)


def test_images_are_inspected_and_the_plan_trains(tmp_path, capsys):
    make_image_set(tmp_path / "streets", 12, 4, 0, 1, (96, 72))
    result = inspected(*image_flags(tmp_path / "streets", "train", "val"))
    shown = capsys.readouterr().out
    assert result["faults"] == result["doubts"] == 0 and "12 train, 4 val" in shown and "0 faults" in shown
    config = trained("train_segmentation", "training.epochs=1")
    assert config["dataset"]["num_classes"] == 7 and config["dataset"]["root"] == str(tmp_path / "streets")
    command = Path("out/plan.sh").read_text()
    assert "--num-classes 7" in command and "--classes" in command
    importlib.import_module("train_linear_head").parse_args(command.replace("\\\n", "").split()[2:])


def test_photographs_elsewhere_get_links_and_a_validation_part(tmp_path):
    make_image_set(tmp_path / "streets", 12, 0, 0, 1, (96, 72))
    for kind in ("images", "masks"):
        (tmp_path / "streets" / kind / "train").rename(tmp_path / f"my_{kind}")
    inspected("--image-paths", tmp_path / "my_images", "--mask-paths", tmp_path / "my_masks", "--num-classes", "7")
    root = Path(trained("train_segmentation", "training.epochs=1")["dataset"]["root"])
    assert len(list((root / "images" / "train").iterdir())) == 11 and len(list((root / "masks" / "val").iterdir())) == 1
    assert all(path.is_symlink() for path in (root / "images" / "train").iterdir())


def test_colour_masks_get_a_class_file_that_trains(tmp_path):
    make_image_set(tmp_path / "streets", 10, 2, 0, 1, (96, 72))
    (tmp_path / "streets" / "classes.json").unlink()
    for path in (tmp_path / "streets" / "masks").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    result = inspected(*image_flags(tmp_path / "streets", "train", "val"))
    assert result["faults"] == 0 and result["doubts"] >= 1 and Path("out/classes.json").is_file()
    assert trained("train_segmentation", "training.epochs=1")["dataset"]["classes"] == "out/classes.json"


def test_meshes_are_inspected_and_the_plan_trains(tmp_path, capsys):
    make_mesh_set(tmp_path / "figures", 5, 2, 2, 0, (200, 240))
    flags = [f"--{prefix}mesh-dir={tmp_path / 'figures' / split}" for prefix, split in (("", "train"), ("val-", "val"), ("test-", "test"))]
    assert inspected(*flags)["faults"] == 0
    assert "5 train, 2 val, 2 test" in capsys.readouterr().out
    config = trained("train_downstream", "training.epochs=1", "model.embedding_dim=16")
    assert config["model"]["encoder"] == "diffusion_net" and config["augmentation"]["mode"] == "so3"


def test_labels_from_1_and_open_surfaces_train_as_planned(tmp_path):
    write_set(tmp_path / "meshes", 6)
    for path in (tmp_path / "meshes").glob("*"):
        lines = path.read_text().splitlines()
        faces = [i for i, line in enumerate(lines) if line.startswith("f ")] if path.suffix == ".obj" else range(len(lines))
        kept = [line for i, line in enumerate(lines) if i not in set(faces) or (i - faces[0]) % 5]
        path.write_text("\n".join(kept if path.suffix == ".obj" else [str(int(line) + 1) for line in kept]) + "\n")
    inspected("--mesh-dir", tmp_path / "meshes")
    config = trained("train_downstream", "training.epochs=1")
    assert config["data"]["label_offset"] == -1 and "encoder" not in config["model"] and config["model"]["n_classes"] == 3


def test_clouds_are_inspected_and_the_plan_trains(tmp_path, capsys):
    write_clouds(tmp_path / "clouds" / "train", 5)
    write_clouds(tmp_path / "clouds" / "val", 2, 9)
    write_classes(tmp_path / "clouds")
    inspected("--cloud-root", tmp_path / "clouds")
    assert "5 train, 2 val" in capsys.readouterr().out
    config = trained("train_sonata", "training.epochs=1", "training.eval_epochs=1")
    assert config["data"]["class_names"] == ["floor", "box", "ball"] and config["model"]["num_classes"] == 3


def test_clouds_without_splits_get_lists(tmp_path):
    write_clouds(tmp_path / "clouds", 6)
    for path in (tmp_path / "clouds").iterdir():                # balls become rare
        arrays = dict(np.load(path))
        ball = np.flatnonzero(arrays["segment"] == 2)
        arrays["segment"][ball[4:]] = 0
        np.savez(path, **arrays)
    inspected("--cloud-root", tmp_path / "clouds")
    config = trained("train_sonata", "training.epochs=1", "training.eval_epochs=1")
    assert config["training"]["class_weights"] == "sqrt_median_frequency"
    assert (config["data"]["train"], config["data"]["val"]) == ("out/train.json", "out/val.json")


@pytest.mark.parametrize("kind, epochs", [("images", [115, 230]), ("meshes", [8, 17]), ("clouds", [8, 16])])
def test_the_planned_epochs_fill_the_minutes(kind, epochs, tmp_path, monkeypatch):
    """2 s a step: of 5 meshes or clouds 13 s an epoch with the overhead; clouds train in pieces of 8 epochs."""
    monkeypatch.setattr(inspection_plans, "measured", lambda step, device, repeats=3: 2.0)
    if kind == "images":
        make_image_set(tmp_path / "set", 12, 4, 0, 1, (96, 72))
        flags = [*map(str, image_flags(tmp_path / "set", "train", "val"))]
    elif kind == "meshes":
        make_mesh_set(tmp_path / "set", 5, 2, 0, 0, (200, 240))
        flags = [f"--mesh-dir={tmp_path}/set/train", f"--val-mesh-dir={tmp_path}/set/val"]
    else:
        write_clouds(tmp_path / "set" / "train", 5)
        write_clouds(tmp_path / "set" / "val", 2, 9)
        write_classes(tmp_path / "set")
        flags = [f"--cloud-root={tmp_path}/set"]
    for minutes, expected in zip(("2", "4"), epochs, strict=True):
        inspect_data.main([*flags, "--device", "cpu", "--num-workers", "1", "--minutes", minutes, "--output-dir", "out"])
        assert yaml.safe_load(Path("out/plan.yaml").read_text())["training"]["epochs"] == expected


def test_the_page_loads_nothing_and_escapes_names(tmp_path):
    make_image_set(tmp_path / "streets", 8, 0, 0, 1, (96, 72))
    hostile = '<script src="http://x">'
    (tmp_path / "streets" / "classes.json").write_text(f'{{"classes": {["a", "b", "c", "d", "e", "f", hostile]}}}'.replace("'", '"').replace(
        '"http://x"', '\\"http://x\\"').replace('"<script src=\\"', '"<script src=\\"'))
    inspected(*image_flags(tmp_path / "streets", "train"))
    page = Path("out/report.html").read_text()
    assert "default-src 'none'" in page and "<script" not in page and "&lt;script" in page
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)', page))
    assert page.count("<img ") > 8 and "Plan: train_segmentation.py" in page


def test_faults_are_listed_and_the_exit_status_is_1(tmp_path):
    write_set(tmp_path / "meshes", 3)
    (tmp_path / "meshes" / "mesh_01.txt").write_text("0\n1\n")
    (tmp_path / "meshes" / "mesh_02.obj").write_text("v 0 0 nan\nf 1 1 1\n")
    done = subprocess.run([sys.executable, ROOT / "inspect_data.py", "--mesh-dir", "meshes", "--num-workers", "1", "--minutes", "1",
                           "--device", "cpu"], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("fault: ")]
    assert done.returncode == 1 and done.stderr == ""
    assert len(lines) == 2 and "mesh_01" in "".join(lines) and "mesh_02" in "".join(lines)
    assert "2 faults" in done.stdout and Path("exp/inspection/report.html").is_file()


def test_a_plan_is_yaml_with_its_values_and_reasons():
    sections = {"name": ("a: b", "why"), "data": {"share": 1e-5, "list": [0.5, "nan", None], "text": ("1", "not a number"), "nested": {"on": True}}}
    text = plan_text(["first line"], sections)
    assert text.startswith("# first line\n") and "# not a number" in text
    assert yaml.safe_load(text) == {"name": "a: b", "data": {"share": 1e-5, "list": [0.5, "nan", None], "text": "1", "nested": {"on": True}}}


def test_numbers_are_written_as_people_write_them():
    assert spread([64280, 58460.5, 44730]) == "44,730 to 64,280 (median 58,460)"
    assert spread([0.25, 1.23456, 1200], " m") == "0.25 to 1,200 m (median 1.23)"
    assert spread([360, 360], " px") == "360 px"


def test_lines_of_one_kind_are_shortened_and_faults_come_first():
    found = Inspection("title", "pixels")
    found.add("note", "a", "good to know")
    for number in range(20):
        found.add("fault", "b", f"{number}.png: wrong\nin two lines", f"masks/{number}.png")
    lines = found.lines()
    assert lines[0] == "fault: 0.png: wrong in two lines" and lines[-1] == "note: good to know" and len(lines) == 5
    assert lines[3].startswith("fault: ... and 17 more of this kind: 3.png, 4.png") and lines[3].endswith(" ...")


def test_where_nothing_can_be_read_there_is_no_plan(tmp_path, capsys):
    make_image_set(tmp_path / "streets", 3, 0, 0, 1, (96, 72))
    for path in (tmp_path / "streets" / "masks" / "train").iterdir():
        path.write_bytes(b"no mask")
    assert inspected(*image_flags(tmp_path / "streets", "train"))["faults"] == 3
    assert "and no plan" in capsys.readouterr().out and not Path("out/plan.yaml").exists()


def test_a_plan_that_training_refuses_is_a_fault_and_no_end(tmp_path, capsys, monkeypatch):
    def refused(found, script, args, device, output):
        (output / "plan.yaml").write_text("half a plan")
        raise ValueError("mesh_03.obj: too odd")
    monkeypatch.setitem(inspect_data.PLANS, "meshes", ("train_downstream", refused))
    write_set(tmp_path / "meshes", 3)
    assert inspected("--mesh-dir", tmp_path / "meshes")["faults"] == 1
    shown = capsys.readouterr().out
    assert "no plan, as train_downstream.py says: mesh_03.obj: too odd" in shown and not Path("out/plan.yaml").exists()
    assert "too odd" in Path("out/report.html").read_text()


def test_more_items_than_asked_for_are_sampled(tmp_path, capsys):
    make_image_set(tmp_path / "streets", 12, 4, 0, 1, (96, 72))
    inspected(*image_flags(tmp_path / "streets", "train", "val"), "--max-items", "8")
    shown = capsys.readouterr().out
    assert "a random sample of 8 of 16 items" in shown and "6 train, 2 val" in shown


@pytest.mark.parametrize("flags, words", [([], "expected --image-paths"), (["--mesh-dir", "a", "--cloud-root", "b"], "--mesh-dir and --cloud-root"),
                                          (["--image-paths", "a"], "belong together")])
def test_a_wrong_command_line_is_refused(flags, words):
    with pytest.raises(ValueError, match=re.escape(words).replace("meshes", "--mesh-dir")):
        inspect_data.main(flags)
