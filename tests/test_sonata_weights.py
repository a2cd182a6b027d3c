import pickle

import numpy as np
import pytest
import torch
from torch import nn

from models.point_networks import NETWORKS, network_config, network_name
from models.point_rotary import frequencies
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


# -- the rotation of Utonia ----------------------------------------------------------------------------------------------

UTONIA = {**CONFIG, "enc_channels": [18, 36], "rope_base": 10.0, "jitter_coords": 1.1, "rescale_coords": 1.2}
BUFFER = "enc.enc0.block0.attn.rope.inv_freq"


def save_utonia(path, config=UTONIA, seed=0, change=None):
    """A file like utonia.pth, whose config lacks what `config` lacks; `change` edits its tensors."""
    torch.manual_seed(seed)
    state = build_point_transformer(UTONIA).state_dict()
    if change is not None:
        change(state)
    torch.save({"config": config, "state_dict": state}, path)
    return state


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def batch(seed=0, count=60):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randperm(1000, generator=generator)[:count]
    grid = torch.stack([grid // 100, grid // 10 % 10, grid % 10], 1).int()
    coord = grid * 0.02 + 0.005 * torch.rand(count, 3, generator=generator)
    return {"grid_coord": grid, "coord": coord, "feat": torch.cat([coord, torch.rand(count, 3, generator=generator)], 1),
            "offset": torch.tensor([count])}


@pytest.mark.parametrize("config", [UTONIA, without(UTONIA, "rope_base"), without(UTONIA, "rope_base", "jitter_coords", "rescale_coords"),
                                    {**UTONIA, "rope_base": None}], ids=["all keys", "no base", "no key", "null"])
def test_the_rotation_is_read_from_the_tensors(tmp_path, config):
    """With or without rope_base in the config: the same network, the same numbers."""
    path = tmp_path / "utonia.pth"
    state = save_utonia(path, config)
    found = read_sonata(path).config
    assert (found["rope_base"], found["jitter_coords"], found["rescale_coords"]) == (10.0, 1.1, 1.2)
    model, expected = (build_point_transformer({**arguments, "shuffle_orders": False}).eval() for arguments in (found, UTONIA))
    message, count = load_sonata(model, path), len(state)
    assert message.startswith(f"matched {count}/{count} encoder tensors") and "not used" not in message
    expected.load_state_dict(state)
    for one, other in zip(model(batch()), expected(batch()), strict=True):
        assert torch.equal(one.feat, other.feat)


@pytest.mark.parametrize("base", [7.0, 10_000.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_base_is_recognised(tmp_path, base, dtype):
    torch.manual_seed(0)
    state = build_point_transformer({**UTONIA, "rope_base": base}).state_dict()
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "w.pth")
    found = guess_config(read_sonata(tmp_path / "w.pth").state)
    exact = dtype == torch.float32
    assert found["rope_base"] == pytest.approx(base, rel=1e-4 if exact else 0.02)
    model = build_point_transformer(found)
    load_sonata(model, tmp_path / "w.pth")
    assert torch.equal(model.enc["enc0"]["block0"].attn.rope.inv_freq, state[BUFFER].to(dtype).float())


@pytest.mark.parametrize("value", [None, 18, "18", [None], {"a": 1}, [[18]]])
def test_a_config_of_odd_types_is_read_and_refused_later(tmp_path, value):
    for config in (CONFIG, UTONIA):
        torch.manual_seed(0)
        torch.save({"config": {**config, "enc_channels": value, "enc_num_head": value}, "state_dict": build_point_transformer(config).state_dict()},
                   tmp_path / "w.pth")
        found = read_sonata(tmp_path / "w.pth").config
        assert found["enc_channels"] == value and network_name(found) is None


def test_a_null_range_stays_off(tmp_path):
    save_utonia(tmp_path / "w.pth", {**UTONIA, "jitter_coords": None})
    found = read_sonata(tmp_path / "w.pth").config
    assert found["jitter_coords"] is None and found["rescale_coords"] == 1.2


def drop_buffers(state):
    for name in [name for name in state if name.endswith("inv_freq")]:
        del state[name]


def drop_one(state):
    del state["enc.enc1.block1.attn.rope.inv_freq"]


def change_one(state):
    state[BUFFER] = state[BUFFER] * 1.5


def change_all(state):
    for name in state:
        if name.endswith("inv_freq"):
            state[name] = torch.tensor([1.0, 0.5, 0.1])


@pytest.mark.parametrize("config, change, message", [
    (UTONIA, drop_buffers, r"config has rope_base 10\.0, but no tensor of the rotation"),
    (without(UTONIA, "rope_base"), drop_buffers, "heads of 18 channels are Utonia's, but no tensor"),
    ({**CONFIG, "rope_base": 10}, drop_buffers, "config has rope_base 10, but no tensor"),
    ({**UTONIA, "rope_base": 7}, None, "config has rope_base 7, but its tensors rotate with base 10"),
    ({**UTONIA, "rope_base": 0}, None, "config has rope_base 0, but its tensors rotate with base 10"),
    ({**UTONIA, "rope_base": 10000}, None, "config has rope_base 10000, but its tensors rotate with base 10"),
    (UTONIA, drop_one, "enc1.block1.attn.rope.inv_freq is missing: attention rotates in all"), (UTONIA, change_one, "are different rotations"),
    (UTONIA, change_all, r"is \[1, 0\.5, 0\.1\]; expected 1, f, f\^2"),
    ({**UTONIA, "rope_base": "ten"}, None, "config has rope_base 'ten'; expected a number"),
    ({**UTONIA, "enc_num_head": [1, 3]}, None, "36 channels of 3 heads, but its rotation is for heads of 18")])
def test_contradictions_about_the_rotation_are_refused(tmp_path, config, change, message):
    path = tmp_path / "w.pth"
    save_utonia(path, config, change=change)
    with pytest.raises(ValueError, match=r"w\.pth: .*" + message):
        read_sonata(path)


@pytest.mark.parametrize("extra", ["enc.enc0.block0.attn.rope.inv_freq", "enc.enc0.block0.ls1.gamma", "enc.enc1.block1.attn.rpe.table",
                                   "enc.enc1.block2.norm1.0.weight", "enc.norm.weight", "dec.dec0.block0.attn.rope.inv_freq", "dec.dec0.block0.ls1.gamma",
                                   "dec.dec0.up.gate.weight", "dec.norm", "embedding.position"])
@pytest.mark.parametrize("decoder", [False, True])
def test_tensors_without_a_place_are_an_error(tmp_path, extra, decoder):
    """Whatever they are: a network that runs without them gives wrong numbers. The file is complete, and holds more."""
    path = tmp_path / "w.pth"
    torch.save({**build_segmenter(CONFIG, 5, "dec").backbone.state_dict(), extra: torch.ones(3)}, path)
    model = build_segmenter(CONFIG, 5, "dec" if decoder else "lin").backbone
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"w\.pth: 1 tensors of its encoder or decoder have no place .*{extra}"):
        load_sonata(model, path)
    assert same(model, before)
    if "inv_freq" in extra:
        with pytest.raises(ValueError, match="attention rotates in all blocks or in none"):
            guess_config(read_sonata(path).state)


def test_utonia_into_a_network_without_rotation_is_an_error(tmp_path):
    """Fault 2 of facts/concerto_utonia.md: it was accepted, with '5 others in the file not used', and 29 to 49 % off."""
    save_utonia(tmp_path / "w.pth")
    model = tiny(**{**UTONIA, "rope_base": None})
    with pytest.raises(ValueError, match=r"3 tensors of its encoder or decoder have no place .*inv_freq"):
        load_sonata(model, tmp_path / "w.pth")
    model = tiny(**{**UTONIA, "rope_base": 7.0})
    with pytest.raises(ValueError, match=r"inv_freq is \[1, 0\.4642, 0\.2154\], but the network was built .*take rope_base out"):
        load_sonata(model, tmp_path / "w.pth")
    model = tiny(**{**UTONIA, "enc_depths": [1, 1]})
    with pytest.raises(ValueError, match=r"tensors of its encoder or decoder have no place .*enc\.enc1\.block1"):
        load_sonata(model, tmp_path / "w.pth")


def test_own_checkpoints_keep_the_rotation(tmp_path):
    model = build_segmenter(UTONIA, 5, "dec")
    save_checkpoint(tmp_path / "w.pth", script="train_sonata", config={}, class_names=None, palette=None, model=model.state_dict(),
                    encoder={"config": without(UTONIA, "rope_base"), "file": None})
    assert read_sonata(tmp_path / "w.pth").config["rope_base"] == 10.0
    plain = {**CONFIG, "enc_channels": [18, 36]}             # heads of 18 without rotation, from scratch: ours, and it says so
    model = build_segmenter(plain, 5, "ft")
    save_checkpoint(tmp_path / "own.pth", script="train_sonata", config={}, class_names=None, palette=None, model=model.state_dict(),
                    encoder={"config": plain, "file": None})
    assert "rope_base" not in read_sonata(tmp_path / "own.pth").config
    load_sonata(build_segmenter(plain, 5, "lin").backbone, tmp_path / "own.pth")


@pytest.mark.parametrize("name", NETWORKS)
def test_raw_pre_training_checkpoints_give_the_heads_of_every_network(name):
    """Head widths 16 and 18: Utonia tiny's 144 channels are 8 heads, not 9, and 216 is no error."""
    config = network_config(name)
    with torch.device("meta"):
        state = build_point_transformer(config).state_dict()
    turns = frequencies(18, 10.0)
    found = guess_config({key: turns if key.endswith("inv_freq") else value for key, value in state.items()})
    assert found == config


def test_raw_checkpoint_of_head_width_18_without_buffers_is_refused():
    state = tiny(**UTONIA).state_dict()
    drop_buffers(state)
    with pytest.raises(ValueError, match=r"w\.pth: it stores no config, and a stage of 18 channels has no whole number of heads of 16; was the rot"):
        guess_config(state, "w.pth")


@pytest.mark.parametrize("width", [1232, 1728, 1386])
def test_linear_heads_of_all_networks(tmp_path, width):
    state = {"seg_head.weight": torch.randn(20, width), "seg_head.bias": torch.randn(20)}
    torch.save({"config": {"backbone_out_channels": width, "num_classes": 20}, "state_dict": state}, tmp_path / "head.pth")
    name = {1232: "sonata", 1728: "concerto_large", 1386: "utonia"}[width]
    with torch.device("meta"):
        model = build_segmenter(network_config(name), 20, "lin")
    head = read_linear_head(tmp_path / "head.pth")
    assert {f"seg_head.{key}": list(value.shape) for key, value in model.seg_head.state_dict().items()} == \
        {key: list(value.shape) for key, value in head.items()}


def test_updates_of_a_model_stay_and_those_of_a_file_are_refused(tmp_path):
    expected = written("sonata.pth", tmp_path / "w.pth")
    model = build_segmenter(CONFIG, 5, "lora").backbone
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message, count = load_sonata(model, tmp_path / "w.pth"), len(expected) - 1                  # without the mask token
    assert message.startswith(f"matched {count}/{count} encoder tensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if ".lora." in name else expected[name])
    torch.save(model.state_dict(), tmp_path / "lora.pth")
    for mode in ("lin", "lora"):
        with pytest.raises(ValueError, match=r"lora\.pth: holds low-rank updates .*scripts/merge_lora\.py"):
            load_sonata(build_segmenter(CONFIG, 5, mode).backbone, tmp_path / "lora.pth")


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
    np.str_("text"), np.datetime64("2020-01-01"), np.array(["text"]), np.array([None]), np.float64, np.array([(1,)], [("a", "i4")])[0],
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
