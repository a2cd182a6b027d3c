"""train_sonata.py with files like Concerto's and Utonia's, in all modes, with and without colours: what is frozen stays, a resumed
run is the same run, low-rank updates merge into a plain file."""

import numpy as np
import pytest
import torch

import train_sonata as SCRIPT
from models.lora import LowRankUpdate
from models.point_networks import NETWORKS
from scripts import merge_lora
from tests.tiny_clouds import UTONIA, tiny_cloud, write_classes, write_clouds, write_config, write_encoder
from tests.whole_runs import assert_equal, sigterm_in_call
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import StopRequested

CPU = torch.device("cpu")
TRAINED = {"lin": ("seg_head.",), "dec": ("seg_head.", "backbone.dec."), "lora": ("seg_head.", ".attn.lora."), "ft": ("",)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Clouds with colours and normals, and the same without."""
    folder = tmp_path_factory.mktemp("clouds")
    for split, count, seed in (("train", 4, 0), ("val", 1, 100)):
        write_clouds(folder / "all" / split, count, seed, 150)
        (folder / "coord" / split).mkdir(parents=True)
        for number in range(seed, seed + count):
            cloud = tiny_cloud(number, 150 + 7 * (number % 5))
            np.savez(folder / "coord" / split / f"cloud_{number:03d}.npz", coord=cloud["coord"], segment=cloud["segment"])
    return {name: write_classes(folder / name) for name in ("all", "coord")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {"concerto": write_encoder(folder / "concerto.pth"), "utonia": write_encoder(folder / "utonia.pth", **UTONIA)}


def config_of(tmp_path, root, mode, **sections):
    return write_config(tmp_path / "c.yaml", root, **{
        "model": {"mode": mode, "encoder": {}}, "training": {"use_pretrained": None, "epochs": 2, "eval_epochs": 2, "batch_size": 2},
        "data": {"root": str(root), "grid_size": 0.05, "missing_normal": "zeros"}, "augmentation": {"elastic": [[0.2, 0.05]], "drop_color": 0.5}, **sections})


def train(config, output, file, *more):
    return SCRIPT.main([config, "--device", "cpu", "--num-workers", "0", "--output-dir", str(output), "--pretrained_path", file, *map(str, more)])


def last(output):
    return load_checkpoint(output / "model" / "model_last.pth")


@pytest.mark.parametrize("data", ["all", "coord"])
@pytest.mark.parametrize("name", ["concerto", "utonia"])
@pytest.mark.parametrize("mode", ["lin", "dec", "ft", "lora"])
def test_frozen_parts_stay_and_a_resumed_run_is_the_same(roots, weights, tmp_path, monkeypatch, capsys, mode, name, data):
    config = config_of(tmp_path, roots[data], mode)
    train(config, tmp_path / "whole", weights[name])
    assert ("no colors" in capsys.readouterr().out) is (data == "coord")
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, torch.optim.AdamW, "step", 2)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "cut", weights[name])
    assert 1 < last(tmp_path / "cut")["step"] < 4
    train(config, tmp_path / "cut", weights[name], "--resume", "auto")
    whole, cut = last(tmp_path / "whole"), last(tmp_path / "cut")
    assert whole["step"] == cut["step"] == 4
    for part in ("model", "optimizer", "scheduler", "rng"):
        assert_equal(whole[part], cut[part])

    stored = torch.load(weights[name], weights_only=True)["state_dict"]
    model = SCRIPT.load_model(whole, CPU)
    for key, tensor in model.state_dict().items():
        inner = key.removeprefix("backbone.")
        buffer = key.endswith("inv_freq")
        trained = any(word in key for word in TRAINED[mode]) and not buffer
        if inner in stored:
            assert torch.equal(tensor, stored[inner]) is not trained, key
        assert (key in whole["model"]) is (trained or buffer or mode == "ft"), key
    assert model.backbone.rotates is (name == "utonia")


@pytest.mark.parametrize("name", ["concerto", "utonia"])
def test_low_rank_updates_merge_into_a_plain_file(roots, weights, tmp_path, capsys, name):
    config = config_of(tmp_path, roots["all"], "lora", optimizer={"lr": 0.01, "block_lr": 0.01})
    train(config, tmp_path / "out", weights[name])
    checkpoint, merged = tmp_path / "out" / "model" / "model_last.pth", tmp_path / "merged.pth"
    assert merge_lora.main([str(checkpoint), str(merged)])["merged"] == 3
    stored = torch.load(merged, weights_only=True)
    assert not any("lora" in key for key in stored["state_dict"]) and stored["config"]["enc_mode"] is True
    lin = config_of(tmp_path, roots["all"], "lin")
    train(lin, tmp_path / "lin", str(merged), f"paths.head={merged}", "optimizer.lr=1e-12", "optimizer.block_lr=1e-12")
    before, after = (SCRIPT.load_model(load_checkpoint(path), CPU) for path in (checkpoint, tmp_path / "lin" / "model" / "model_last.pth"))
    results = [SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "val"), precise=False) for model in (before, after)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)
    for update in before.backbone.modules():                 # the updates matter: without them the loss is another
        if isinstance(update, LowRankUpdate):
            torch.nn.init.zeros_(update.b)
    without = SCRIPT.evaluate(before, SCRIPT.build_dataset(before.config, "val"), precise=False)
    assert abs(without["loss"] - results[0]["loss"]) > 1e-3
    with pytest.raises(ValueError, match=r"merged\.pth exists"):
        merge_lora.main([str(checkpoint), str(merged)])
    with pytest.raises(ValueError, match="model.mode=lin has no low-rank updates"):
        merge_lora.main([str(tmp_path / "lin" / "model" / "model_last.pth"), str(tmp_path / "other.pth")])
    assert not (tmp_path / "other.pth").exists()
    with pytest.raises(ValueError, match="low-rank updates without their encoder"):
        train(lin, tmp_path / "again", str(checkpoint))


def test_a_utonia_file_without_rope_base_runs_with_its_rotation(roots, weights, tmp_path):
    """Fault 2: it was accepted, and ran without. With and without the keys the run is the same to the bit."""
    content = torch.load(weights["utonia"], weights_only=True)
    for key in ("rope_base", "jitter_coords", "rescale_coords"):
        del content["config"][key]
    torch.save(content, tmp_path / "other.pth")
    config = config_of(tmp_path, roots["all"], "lin")
    for output, file in (("one", weights["utonia"]), ("two", str(tmp_path / "other.pth"))):
        train(config, tmp_path / output, file)
    assert_equal(last(tmp_path / "one")["model"], last(tmp_path / "two")["model"])
    assert last(tmp_path / "two")["encoder"]["config"]["rope_base"] == 10.0


def test_first_lines_say_what_the_file_is_and_warn_of_other_voxels(roots, tmp_path, capsys):
    file = write_encoder(tmp_path / "tiny.pth", enc_depths=[2, 2, 2, 6, 2], enc_channels=[18, 36, 72, 144, 216], enc_num_head=[1, 2, 4, 8, 12],
                         enc_patch_size=[64] * 5, rope_base=10.0, jitter_coords=1.1, rescale_coords=1.2)
    config = config_of(tmp_path, roots["coord"], "lin", training={"use_pretrained": None, "epochs": 1, "eval_epochs": 1, "batch_size": 4})
    train(config, tmp_path / "out", file)
    out = capsys.readouterr().out
    assert "the size of Utonia tiny (18 36 72 144 216), positions in metres turn queries and keys (base 10;" in out
    assert "augmentation.drop_color: 50 % of the training items lose all colors" in out
    assert "CC BY-NC 4.0" in out and "WARNING: the size of Utonia tiny, but data.grid_size=0.05 and data.scale=1.0" in out
    train(config, tmp_path / "two", file, "data.scale=0.5", "data.grid_size=0.01")
    assert "WARNING: the size of" not in capsys.readouterr().out


def test_scale_reaches_training_and_evaluation(roots, weights, tmp_path):
    """A room of twice the size under scale 0.5 is the same run; without scale it is another."""
    for split in ("train", "val"):
        (tmp_path / "twice" / split).mkdir(parents=True)
        for file in (roots["all"] / split).glob("*.npz"):
            cloud = dict(np.load(file))
            np.savez(tmp_path / "twice" / split / file.name, **{**cloud, "coord": cloud["coord"] * 2})
    write_classes(tmp_path / "twice")
    for output, root, scale in (("one", roots["all"], 1.0), ("half", tmp_path / "twice", 0.5), ("other", tmp_path / "twice", 1.0)):
        config = config_of(tmp_path, root, "lin")
        train(config, tmp_path / output, weights["utonia"], f"data.scale={scale}")
    one, half, other = (last(tmp_path / name)["model"]["seg_head.weight"] for name in ("one", "half", "other"))
    assert torch.equal(one, half) and not torch.equal(one, other)


def test_checkpoints_from_before_the_new_keys_go_on(roots, weights, tmp_path, monkeypatch):
    """Old checkpoints lack data.scale, data.center and augmentation.drop_*: resumed and scored as if they held the defaults."""
    config = config_of(tmp_path, roots["all"], "dec", augmentation={"elastic": [[0.2, 0.05]]})
    train(config, tmp_path / "whole", weights["concerto"])
    with monkeypatch.context() as patch:
        sigterm_in_call(patch, torch.optim.AdamW, "step", 2)
        with pytest.raises(StopRequested):
            train(config, tmp_path / "cut", weights["concerto"])
    path = tmp_path / "cut" / "model" / "model_last.pth"
    checkpoint = load_checkpoint(path)
    for section, key in (("data", "scale"), ("data", "center"), ("augmentation", "drop_color"), ("augmentation", "drop_normal")):
        del checkpoint["config"][section][key]
    for key in [key for key in checkpoint["encoder"]["config"] if key.startswith("dec_")]:
        del checkpoint["encoder"]["config"][key]             # nor did they name the decoder; ENCODER is of no released size
    save_checkpoint(path, **checkpoint)
    model = SCRIPT.load_model(load_checkpoint(path), CPU)
    assert np.isfinite(SCRIPT.evaluate(model, SCRIPT.build_dataset(model.config, "val"), precise=False)["loss"])
    train(config, tmp_path / "cut", weights["concerto"], "--resume", "auto")
    assert_equal(last(tmp_path / "whole")["model"], last(tmp_path / "cut")["model"])


def test_every_network_has_an_owner_that_the_documents_name():
    text = (SCRIPT.Path(SCRIPT.__file__).parent / "docs" / "sonata.md").read_text()
    for network in NETWORKS.values():
        assert network.owner.split(" or ")[-1] in text, network.owner
