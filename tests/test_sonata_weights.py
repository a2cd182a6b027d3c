import pickle

import numpy as np
import pytest
import torch
from torch import nn

from models.point_transformer import build_point_transformer, build_segmenter
from models.sonata_weights import guess_config, load_sonata, read_linear_head, read_sonata
from utils.checkpoint import save_checkpoint
from utils.weights import read_weights

CONFIG = {"in_channels": 6, "order": ["z", "z-trans", "hilbert", "hilbert-trans"], "enc_depths": [1, 2],
          "enc_channels": [16, 32], "enc_num_head": [1, 2], "enc_patch_size": [1024, 1024], "mask_token": True,
          "enc_mode": True, "drop_path": 0.3}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return build_point_transformer({**CONFIG, **changes})


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def written(kind, path):
    """A file of that kind at `path`; returns the state of the encoder it holds."""
    encoder, other = tiny().state_dict(), tiny(1).state_dict()
    if kind == "sonata.pth":
        torch.save({"config": CONFIG, "state_dict": encoder}, path)
    elif kind == "plain":
        torch.save(encoder, path)
    elif kind.startswith("pretrain"):
        state = {f"teacher.backbone.{k}": v for k, v in other.items()} | {f"student.backbone.{k}": v for k, v in encoder.items()}
        state |= {"student.mask_head.mlp.0.weight": torch.ones(2, 2), "teacher.mask_head.mlp.0.weight": torch.ones(2, 2)}
        state = {f"module.{k}": v for k, v in state.items()} if kind == "pretrain, module" else state
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}}, "best_metric_value": np.float64(0.5)}, path)
    elif kind.startswith("downstream"):
        state = {"seg_head.weight": torch.ones(5, 48), "seg_head.bias": torch.ones(5)} | {f"backbone.{k}": v for k, v in encoder.items()}
        prefix = {"downstream": "", "downstream, module": "module.", "downstream, odd prefix": "net.model."}[kind]
        torch.save({"state_dict": {prefix + k: v for k, v in state.items()}, "best_metric_value": np.float32(0.5)}, path)
    else:
        model = build_segmenter(CONFIG, 5, "dec")
        encoder = model.backbone.state_dict()
        save_checkpoint(path, script="train_sonata", config={}, class_names=None, palette=None,
                        model=model.state_dict(), encoder={"config": CONFIG, "file": None})
    return encoder


KINDS = ["sonata.pth", "plain", "pretrain", "pretrain, module", "downstream", "downstream, module",
         "downstream, odd prefix", "own"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_loads(tmp_path, kind):
    expected = written(kind, tmp_path / "w.pth")
    found = read_sonata(tmp_path / "w.pth")
    assert found.config == (CONFIG if kind in ("sonata.pth", "own") else None)
    model = tiny(7, mask_token=False)
    message = load_sonata(model, tmp_path / "w.pth")
    assert same(model, expected)
    count = len(model.state_dict())
    assert message.startswith(f"matched {count}/{count} encoder tensors from {tmp_path / 'w.pth'} (layout: {found.layout})")
    assert "not used" not in message


def test_mask_token_where_the_model_has_one(tmp_path):
    expected = written("sonata.pth", tmp_path / "w.pth")
    model = tiny(7)
    load_sonata(model, tmp_path / "w.pth")
    assert same(model, expected)


@pytest.mark.parametrize("kind", ["sonata.pth", "own"])
def test_encoder_under_a_decoder_keeps_the_decoder(tmp_path, kind):
    encoder = written(kind, tmp_path / "w.pth")
    model = build_segmenter(CONFIG, 5, "dec").backbone
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_sonata(model, tmp_path / "w.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("dec.") else encoder[name])


@pytest.mark.parametrize("damage", ["missing", "renamed", "shape"])
def test_an_encoder_that_is_not_covered_is_an_error(tmp_path, damage):
    state = tiny().state_dict()
    name = "enc.enc1.block1.attn.qkv.weight"
    tensor = state.pop(name)
    if damage != "missing":
        state["enc.enc1.block1.attention.qkv.weight" if damage == "renamed" else name] = tensor if damage == "renamed" else tensor[:3]
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    model = tiny(7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"w\.pth .*matched \d+/\d+ encoder tensors.*" + name.replace(".", r"\.")):
        load_sonata(model, tmp_path / "w.pth")
    assert same(model, before)


def test_files_without_one_encoder(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"w\.pth: expected one Point Transformer V3 .* found 1 tensors \(a, \.\.\.\)"):
        read_sonata(path)
    state = tiny().state_dict()
    torch.save({f"{p}.{k}": v for p in ("a", "b") for k, v in state.items()}, path)
    with pytest.raises(ValueError, match=r"several backbones \('a\.', 'b\.'\)"):
        read_sonata(path)
    state["enc.enc0.block0.norm1.0.weight"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"enc\.enc0\.block0\.norm1\.0\.weight is not finite"):
        read_sonata(path)


def test_guessed_config():
    for config in (CONFIG, {**CONFIG, "mask_token": False}):
        guessed = guess_config(build_point_transformer(config).state_dict())
        assert guessed == config
    model = build_segmenter({**CONFIG, "drop_path": 0.3}, 5, "dec").backbone
    again = build_point_transformer(guess_config(model.state_dict()))
    assert again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("block, blocks", [("enc.enc0.block0", "0 stages of []"), ("enc.enc1.block0", "1 stages of [1]"),
                                           ("enc.enc1.block1", "2 stages of [1, 1]"), ("dec.dec0.block1", "1 stages of [1]")])
@pytest.mark.parametrize("whole", [False, True], ids=["one tensor", "the whole block"])
def test_a_guessed_config_is_never_cut_short(block, blocks, whole):
    state = build_segmenter(CONFIG, 5, "dec").backbone.state_dict()
    name = f"{block}." if whole else f"{block}.cpe.0.weight"
    state = {key.replace(name, f"{block[:3]}.odd."): tensor for key, tensor in state.items()}
    with pytest.raises(ValueError, match="^w.pth: .* belongs to none of the .* renamed") as error:
        guess_config(state, "w.pth")
    assert blocks in str(error.value)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_linear_head(tmp_path, prefix):
    path = tmp_path / "head.pth"
    state = {"seg_head.weight": torch.randn(20, 1232), "seg_head.bias": torch.randn(20)}
    torch.save({"config": {"backbone_out_channels": 1232, "num_classes": 20},
                "state_dict": {prefix + name: tensor for name, tensor in state.items()}}, path)
    head = read_linear_head(path)
    assert head.keys() == state.keys() and all(torch.equal(head[name], state[name]) for name in state)
    written("sonata.pth", path)
    with pytest.raises(ValueError, match=r"head\.pth: expected one seg_head\.weight .* found \d+ tensors \(embedding"):
        read_linear_head(path)


# -- numpy's numbers, and hostile pickles ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(1.5), np.float16(2.0), np.int64(-7), np.uint8(200),
                                    np.bool_(True), np.array(3.5, ">f8")[()]])
def test_numpy_numbers_become_plain_ones(tmp_path, number):
    torch.save({"value": number, "weight": torch.ones(2)}, tmp_path / "w.pth")
    value = read_weights(tmp_path / "w.pth", numpy_scalars=True)["value"]
    assert value == number.item() and type(value) in (bool, int, float)
    with pytest.raises(ValueError, match="Python objects"):
        read_weights(tmp_path / "w.pth")


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("value", [
    np.str_("text"), np.datetime64("2020-01-01"), np.ones(2), np.float64, np.array([(1,)], [("a", "i4")])[0],
    Call(np.dtype, "O"), Call(eval, "open('hacked', 'w')"), Call(exec, "open('hacked', 'w')"),
    Call(np.float64(1).__reduce__()[0], np.dtype("O"), pickle.dumps(Call(eval, "open('hacked', 'w')"))),
    Call(np.float64(1).__reduce__()[0], np.dtype("f8"), b"123"), Call(np.float64(1).__reduce__()[0], None, b"")])
def test_nothing_else_is_read(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    torch.save({"value": value, "state_dict": tiny().state_dict()}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: ") as caught:
        read_sonata("w.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "hacked").exists()


def test_modules_are_refused(tmp_path):
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="Python objects"):
        read_sonata(tmp_path / "w.pth")
