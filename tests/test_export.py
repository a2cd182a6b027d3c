"""export.py and examples/run_onnx.py: the written file computes what the network computes, at every size, and nothing else gets its name."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
import models.dinov3 as dinov3
import predict
from models.upernet import pool, window_weights
from tests.bad_inputs import checkpoint
from tests.tiny_heads import add_tiny_backbone
from tests.tiny_images import TINY, shrink_unet, tiny_picture
from tests.tiny_runs import tiny_run
from utils.render import IGNORE_COLOR

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "examples" / "run_onnx.py"
missing = [name for name in export.PACKAGES if not export.importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"pip install {' '.join(missing)}")


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    add_tiny_backbone(monkeypatch)
    shrink_unet(monkeypatch)


def write(script, output, *more):
    result = export.main([str(checkpoint(f"{script}.py")), "--output", str(output), *more])
    assert output.is_file() and [path.name for path in output.parent.iterdir()] == [output.name]
    return result


def photo(path, size):
    Image.fromarray(tiny_picture(7, size)[0]).save(path)
    return path


@needs_onnx
def test_the_runner_labels_as_predict_does(tmp_path, capsys):
    """At sizes that the check did not try: larger than in training, shrunk, and not whole patches."""
    (tmp_path / "model").mkdir()
    result = write("train_linear_head", tmp_path / "model" / "linear.onnx")
    assert result["difference"] < 1e-5 and result["same"] == 1
    assert "same class at 100 % of pixels" in capsys.readouterr().out
    photos = [photo(tmp_path / f"{height}_{width}.png", (height, width)) for height, width in ((64, 64), (141, 187))]
    done = subprocess.run([sys.executable, RUNNER, tmp_path / "model" / "linear.onnx", *photos, "--output", tmp_path / "labels"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predict.main([str(checkpoint("train_linear_head.py")), "evaluation.eval_mode=whole", *map(str, photos), "--output",
                  str(tmp_path / "expected"), "--device", "cpu"])
    for path in photos:
        label, expected = (Image.open(tmp_path / folder / path.name) for folder in ("labels", "expected"))
        assert label.mode == expected.mode == "P" and label.getpalette() == expected.getpalette()
        assert (np.asarray(label) == np.asarray(expected)).mean() >= 0.999, path
    Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(deep := tmp_path / "deep.png")     # Pillow would make it white
    done = subprocess.run([sys.executable, RUNNER, tmp_path / "model" / "linear.onnx", deep, "--output", tmp_path / "labels"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "deep.png: grey of more than 8 bits" in done.stderr


def test_the_runner_is_small_and_needs_three_packages():
    lines = RUNNER.read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    names = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
             for node in ast.walk(ast.parse(RUNNER.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


@needs_onnx
def test_metadata_of_masks_with_numbers_of_their_own(tmp_path):
    import onnx
    write("train_segmentation", tmp_path / "unet.onnx", "--size", "64", "96", 'dataset.label_map=0:0,40:1,200:2')
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load(tmp_path / "unet.onnx").metadata_props}
    assert entries["mask_values"] == [0, 40, 200] and entries["class_names"] == ["sky", "ground", "box"]
    assert entries["palette"][40] == [60, 160, 60] and entries["palette"][41] == list(IGNORE_COLOR)
    assert entries["short_side"] == [64, 64] and entries["fixed_size"] == [64, 96] and entries["script"] == "train_segmentation.py"
    assert entries["mean"] == pytest.approx([0.485, 0.456, 0.406]) and entries["std"] == pytest.approx([0.229, 0.224, 0.225])


def test_torch_export_of_any_size(tmp_path):
    result = write("train_segmentation", tmp_path / "model.pt2")
    assert result["difference"] < 1e-5 and result["same"] == 1
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=files)
    assert json.loads(files["metadata.json"])["class_names"] == ["sky", "ground", "box"]
    image = torch.zeros(1, 3, 70, 65, dtype=torch.uint8)
    assert program.module()(image).shape == (1, 3, 70, 65)


def test_learned_positions_need_a_size(tmp_path, monkeypatch):
    """As of DINOv2: resized from the grid that they were learned for to that of the size."""
    monkeypatch.setitem(dinov3.BACKBONES, "dinov3_tiny", TINY._replace(pos_grid=5, pos_offset=0.1, num_registers=0))
    checkpoint = functools.cache(fresh_linear)(tmp_path)
    with pytest.raises(ValueError, match="--size H W is missing: this backbone has learned positions"):
        export.main([checkpoint, "--output", str(tmp_path / "model.pt2")])
    result = export.main([checkpoint, "--output", str(tmp_path / "model.pt2"), "--size", "64", "90"])
    assert result["difference"] < 1e-5 and result["same"] == 1


def fresh_linear(folder):
    import train_linear_head
    run = tiny_run("linear_head", folder, epochs=1)
    train_linear_head.main(run.argv(folder / "out", "--limit-batches", "1"))
    return str(folder / "out" / "model" / "model_last.pth")


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_pt2", lambda program, path, metadata: path.write_bytes(b"") * 0 or (
        lambda image: program.module()(image).numpy() + 0.01))
    with pytest.raises(ValueError, match="model.pt2: not written, it does not compute what .* largest difference 1.0e-02 of scores up to"):
        write("train_segmentation", tmp_path / "model.pt2", "--size", "64", "64")
    assert list(tmp_path.iterdir()) == []


def test_what_compare_sees():
    scores = torch.tensor([[3.0, 0.0, 1.0], [1.0, 2.0, 0.0]])[None, :, None]                        # (1, 2 classes, 1, 3 pixels)
    results = [export.compare(lambda image: scores, lambda image, change=change: change(scores.numpy()), [None]) for change in (
        lambda x: x, lambda x: x + [0, 0, -1.5], lambda x: x[..., :-1], lambda x: x * np.nan)]
    assert [result["difference"] for result in results] == [0, 1.5, np.inf, np.inf] and results[0]["largest"] == 3
    assert [result["same"] for result in results] == pytest.approx([1, 1, 0, 0])
    assert export.compare(lambda image: scores, lambda image: -scores.numpy(), [None, None])["same"] == 0


def test_missing_packages_and_too_many_weights_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime; or choose .pt2"):
        export.main(["model.pth", "--output", str(tmp_path / "model.onnx")])
    monkeypatch.setattr(export, "PACKAGES", ())
    monkeypatch.setattr(export, "ONNX_BYTES", 64 << 20)
    with pytest.raises(ValueError, match="0.0 GiB of weights, and an ONNX file holds 2; use --output model.pt2"):
        write("train_segmentation", tmp_path / "model.onnx")


@pytest.mark.parametrize("side", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 4), (7, 13)])
def test_pooling_by_weights_is_adaptive_pooling(side, shape):
    maps = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    rows, columns = (window_weights(length, side) for length in shape)
    torch.testing.assert_close(rows @ maps @ columns.T, pool(maps, side))


ALL = {"train_segmentation": [], "deeplab": [], "train_linear_head": [], "train_upernet_head": [], "pyramid": [], "train_m2f_head": [],
       "train_pmt_head": [], "train_eomt": [], "train_prototype": []}
OTHER = {"deeplab": ("train_segmentation", ["model.name=deeplab_v2", "model.n_blocks=[1,1,1,1]", "model.base_width=8"]),
         "pyramid": ("train_upernet_head", ["--neck", "pyramid"])}


@needs_onnx
@pytest.mark.slow                       # minutes together, most of them for the symbolic sizes of deformable attention
@pytest.mark.parametrize("network", list(ALL))
def test_every_network_as_onnx_of_any_size(network, tmp_path):
    script, more = OTHER.get(network, (network, []))
    run = tiny_run(script.removeprefix("train_"), tmp_path, epochs=1)
    export.importlib.import_module(script).main(run.argv(tmp_path / "out", "--limit-batches", "1", *more))
    result = export.main([str(tmp_path / "out" / "model" / "model_last.pth"), "--output", str(tmp_path / "model.onnx")])
    assert result["difference"] < 1e-4 * max(1, result["largest"]) and result["same"] > 0.9999
