"""What only train_eomt.py has: rates, annealing, frozen blocks, released files, checkpoints that need no other file. Other whole runs:
tests/test_image_scripts.py."""

import json
from pathlib import Path

import pytest
import torch

import models.dinov3 as dinov3
import train_eomt as script
from models.eomt import EoMT, annealing_periods
from models.query_masks import mask_probability
from tests.test_golden_eomt import read, vit_config
from tests.tiny_heads import add_tiny_backbone, flags, score, train, val, weights, write_backbone, write_data
from utils.config import Config
from utils.log import read_log


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def data(pictures, monkeypatch):
    add_tiny_backbone(monkeypatch)
    config = dinov3.ViTConfig(32, 4, 2, "mlp", 64, taps=(0, 1, 2, 3), **dinov3._V2_REG)
    monkeypatch.setitem(dinov3.BACKBONES, "dinov2_small", config._replace(pos_grid=5))
    return pictures


# -- rates -------------------------------------------------------------------------------------------------------------

CASE, CLOSE = read("optimizer")


def rates(backbone, setting):
    """Our optimiser: the rate of each parameter under the official names, and the schedule's factors of encoder and heads."""
    c, setting = CASE["config"], CASE["config"]["settings"][setting]
    model = EoMT(dinov3.VisionTransformer(vit_config({**c, "backbone": backbone})), c["num_classes"], c["queries"], c["blocks"])
    config = Config({"training": {"lr": setting["lr"], "layer_decay": setting["llrd"], "weight_decay": 0.05,
                                  "undecayed_blocks": 0 if setting["llrd_l2_enabled"] else c["blocks"],
                                  **{key: steps / c["total_steps"] for key, steps in
                                     zip(("head_warmup", "encoder_warmup"), setting["warmup_steps"], strict=True)}}})
    optimizer = script.build_optimizer(model, config)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}
    of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    names = {name: of[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(of) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    scheduler = script.build_lr_scheduler(optimizer, config, c["total_steps"])
    factors = [[factor(step) for factor in scheduler.lr_lambdas] for step in c["steps"]]
    head = [group["name"] for group in optimizer.param_groups].index("head")
    encoder = [[row[i] for i in range(len(row)) if i != head] for row in factors]
    assert all(len(set(row)) == 1 for row in encoder)
    return names, torch.tensor([row[0] for row in encoder]).double(), torch.tensor([row[head] for row in factors]).double()


def our_name(name):
    for old, new in (("encoder.backbone.", "encoder."), ("patch_embed.cls_", "cls_"), ("patch_embed.register_", "storage_"), ("reg_token", "register_tokens"),
                     ("patch_embeddings", "proj"), ("attention.o_proj", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
                     ("layer_scale2.lambda1", "ls2.gamma"), ("up_proj", "fc1"), ("down_proj", "fc2"), *((f"attention.{part}_proj", "attn.qkv") for part in "qkv")):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("setting", CASE["config"]["settings"])
@pytest.mark.parametrize("backbone", ["dinov3", "dinov2"])
def test_rates_are_those_of_the_official_optimiser(backbone, setting):
    expected = CASE["outputs"][f"{backbone}_{setting}"]
    names, encoder, heads = rates(backbone, setting)
    assert {our_name(name) for name in expected["base_lr"]} == set(names) - {"encoder.rope_embed.periods"}
    for name, rate in expected["base_lr"].items():
        assert names[our_name(name)] == pytest.approx(rate, rel=CLOSE["rtol"]), name
    torch.testing.assert_close(encoder, expected["vit"], **CLOSE)
    torch.testing.assert_close(heads, expected["heads"], **CLOSE)


def test_factors_of_the_fact_sheet():
    """10,000 steps, warm-ups of 500 and 1,000."""
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}], 1.0)
    encoder, head = script.build_two_warmups(optimizer, [True, False], 10_000, 500, 1000).lr_lambdas
    for step, of_head, of_encoder in ((250, 0.5, 0), (1000, 0.952504, 0.5), (1500, 0.904744, 1), (5000, 0.561205, 0.620292),
                                      (9999, 0.000263, 0.000291)):
        assert head(step) == pytest.approx(of_head, abs=1e-6) and encoder(step) == pytest.approx(of_encoder, abs=1e-6)


@pytest.mark.parametrize("mistake", ["a block too far", "the norm decayed", "a step late", "one warm-up"])
def test_a_mistake_in_the_rates_is_noticed(mistake, monkeypatch):
    if mistake in ("a block too far", "the norm decayed"):
        original = script.build_optimizer

        def wrong(model, config):
            optimizer = original(model, config)
            groups = {group["name"]: group for group in optimizer.param_groups}
            if mistake == "a block too far":
                for group in optimizer.param_groups:
                    group["lr"] *= config.training.layer_decay if group["name"] != "head" else 1
            else:
                groups["encoder 0"]["params"].append(groups["encoder 11"]["params"].pop(-1))
            return optimizer
        monkeypatch.setattr(script, "build_optimizer", wrong)
    else:
        original = script.build_two_warmups

        def late(optimizer, is_encoder, *steps):
            scheduler = original(optimizer, is_encoder if mistake == "a step late" else [False] * len(is_encoder), *steps)
            if mistake == "a step late":
                scheduler.lr_lambdas = [lambda step, fn=fn: fn(step + 1) for fn in scheduler.lr_lambdas]
            return scheduler
        monkeypatch.setattr(script, "build_two_warmups", late)
    with pytest.raises(AssertionError):
        test_rates_are_those_of_the_official_optimiser("dinov3", "default")


# -- annealing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("total, starts, ends", [
    (39_120, (6520, 13040, 19560, 26080), (13040, 19560, 26080, 32600)), (88_692, (14782, 36955, 59128), (29564, 51737, 73910)),
    (88_692, (14782, 25869, 36955, 48042, 59128), (29564, 40651, 51737, 62824, 73910)), (19_902, (3317, 6634, 9951, 13268), (6634, 9951, 13268, 16585))])
def test_annealing_is_the_published_one_at_the_published_lengths(total, starts, ends):
    periods = annealing_periods(len(starts), first_at_once=False)
    for column, steps in zip(zip(*periods, strict=True), (starts, ends), strict=True):
        assert [total * share for share in column] == pytest.approx(steps, abs=1)
    with_dinov3 = annealing_periods(len(starts), first_at_once=True)
    assert with_dinov3[0] == (0, 0.15) and with_dinov3[1:] == periods[1:]


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("total", [12, 100, 5000])
def test_masks_go_out_before_the_end_however_short_the_run(blocks, total):
    for first_at_once in (False, True):
        periods = annealing_periods(blocks, first_at_once)
        shares = torch.tensor([[mask_probability(step / total, *period) for period in periods] for step in range(total)])
        assert (shares[0] == 1).all() and (shares[-1] == 0).all() and (shares.diff(dim=0) <= 0).all()


def test_first_loss_is_of_the_known_size(data, tmp_path):
    """About 11 to 15 for each of the three outputs of an untrained network."""
    train(script, data, tmp_path, "--limit-batches", "1", "--epochs", "1", "--num-queries", "100")
    assert 24 < read_log(tmp_path / "log" / "log.jsonl")[0]["loss"] < 48


# -- what is trained ---------------------------------------------------------------------------------------------------

def start_and_end(data, tmp_path, *more, steps=3):
    """The weights before the first and after the last of `steps` steps."""
    config = script.config_of(script.parse_args(flags(script, data, tmp_path, *more)))
    before = script.open_network(config, script.parse_args(flags(script, data, tmp_path, *more)))[0].state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    train(script, data, tmp_path, *more, "--epochs", "1", "--limit-batches", steps)
    return before, weights(tmp_path)["model"]


def test_every_part_is_trained(data, tmp_path):
    before, after = start_and_end(data, tmp_path, "--head-warmup", "0", "--encoder-warmup", "0", "--batch-size", "1")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"encoder.rope_embed.periods"}
    for block in range(4):                                              # but the keys' bias, which DINOv3 does not have
        assert not after[f"encoder.blocks.{block}.attn.qkv.bias"].chunk(3)[1].any()


@pytest.mark.parametrize("frozen", [1, 3, 4])
def test_frozen_blocks_stay_as_they_are_to_the_last_bit(data, tmp_path, frozen):
    before, after = start_and_end(data, tmp_path, "--freeze-blocks", frozen, "--head-warmup", "0", "--encoder-warmup", "0", "--batch-size", "1")
    same = {name for name in before if torch.equal(before[name], after[name])}
    trained = [f"encoder.blocks.{block}." for block in range(frozen, 4)] + ["encoder.norm.", "q.", "class_head.", "mask_head.", "upscale."]
    assert same == {name for name in before if not name.startswith(tuple(trained))}
    assert sum(len(group["params"]) for group in weights(tmp_path)["optimizer"]["param_groups"]) < len(before)


def test_the_backbone_waits_for_the_heads(data, tmp_path):
    """Five steps, three of the heads alone, then the first of the backbone's warm-up, at a rate of 0."""
    train(script, data, tmp_path, "--head-warmup", "0.6", "--encoder-warmup", "0.2", "--epochs", "5", "--limit-batches", "1", "--save-interval", "1")
    first, fourth, last = (weights(tmp_path, f"checkpoint_epoch_{epoch}.pth")["model"] for epoch in (1, 4, 5))
    encoder = {name for name in first if name.startswith("encoder.") and "rope" not in name}
    assert all(torch.equal(first[name], fourth[name]) for name in encoder) and not torch.equal(first["q.weight"], fourth["q.weight"])
    assert not any(torch.equal(fourth[name], last[name]) for name in encoder)


# -- files -------------------------------------------------------------------------------------------------------------

def official(model, names):
    """The weights of a DINOv2 EoMT in the layout of a released file."""
    state = {}
    for key, tensor in model.state_dict().items():
        if names == "official":
            state["network." + key.replace("encoder.", "encoder.backbone.", 1).replace("register_tokens", "reg_token")] = tensor
            continue
        for old, new in (("encoder.blocks", "layers"), ("encoder.norm", "layernorm"), ("encoder.patch_embed.proj", "embeddings.patch_embeddings.projection"),
                         ("encoder.pos_embed", "embeddings.position_embeddings.weight"), ("encoder.", "embeddings."), ("q.weight", "query.weight"),
                         ("class_head", "class_predictor"), ("mask_head.0", "mask_head.fc1"), ("mask_head.2", "mask_head.fc2"), ("mask_head.4", "mask_head.fc3"),
                         (".ls1.gamma", ".layer_scale1.lambda1"), (".ls2.gamma", ".layer_scale2.lambda1"), ("attn.proj", "attention.out_proj")):
            key = key.replace(old, new, 1) if key.startswith(("encoder", "q.", "class", "mask", old)) or old in key else key
        if key.startswith("upscale."):
            key = key.replace("upscale", "upscale_block.block").replace(".norm.", ".layernorm2d.")
        if ".attn.qkv." in key:
            state |= {key.replace("attn.qkv", f"attention.{part}_proj"): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            state[key] = tensor[0] if "position_embeddings" in key else tensor
    prefix = "network." if names == "official" else ""
    return {**state, f"{prefix}attn_mask_probs": torch.zeros(2), "criterion.empty_weight": torch.ones(4)}


@pytest.mark.parametrize("names", ["official", "transformers"])
def test_a_whole_file_is_scored_and_continued(data, tmp_path, names, capsys):
    dinov2 = ["--backbone", "dinov2_small"]
    result = train(script, data, tmp_path / "run", *val(data), *dinov2, "--epochs", "1")
    model = script.load_model(weights(tmp_path / "run"), torch.device("cpu"))
    torch.save(official(model, names), tmp_path / "released.bin")
    command = flags(script, data, tmp_path / "none", *val(data)[1:], *dinov2, "--network-weights", tmp_path / "released.bin")
    at = command.index("--backbone-weights")
    command = [*command[:at], *command[at + 2:]]
    assert script.main([*command, "--test-only"])["miou"] == result["miou"]
    (tmp_path / "four.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"]}))
    script.main([*command, "--output-dir", str(tmp_path / "next"), "--num-classes", "4", "--classes", str(tmp_path / "four.json"), "--epochs", "1",
                 "--lr", "1e-12", "--image-size", "96"])
    assert "class layer starts anew: 3 classes in the file, 4 here" in capsys.readouterr().out
    first, second = weights(tmp_path / "run")["model"], weights(tmp_path / "next")["model"]
    assert torch.allclose(first["mask_head.0.weight"], second["mask_head.0.weight"], atol=1e-6)
    assert second["encoder.pos_embed"].shape[1] == 36                    # a grid of 6 x 6, resized from 4 x 4
    for more, message in ((["--joint-blocks", "3"], "last 2 blocks, not 3: --joint-blocks 2"),
                          (["--backbone-weights", write_backbone(tmp_path / "tiny.pth"), "--backbone", "tiny"], "--backbone|shape"),
                          (["--backbone-weights", "random"], "leave one of them out"), (["--num-queries", "9"], r"q.weight: file \(8, 32\)")):
        with pytest.raises(ValueError, match=message):
            script.main([*command, *more, "--test-only"])


def test_a_file_of_differences_needs_its_backbone(data, tmp_path):
    backbone = write_backbone(tmp_path / "tiny.pth")
    result = train(script, data, tmp_path / "run", *val(data), "--backbone-weights", backbone, "--epochs", "1", "--lr", "1e-3", "--head-warmup", "0",
                   "--encoder-warmup", "0")
    state, base = weights(tmp_path / "run")["model"], torch.load(backbone, weights_only=True)
    changed = {name: tensor - base[name.removeprefix("encoder.")] if name.startswith("encoder.") else tensor for name, tensor in state.items()}
    network = {}
    for key, tensor in changed.items():
        for old, new in (("encoder.cls_token", "encoder.patch_embed.cls_token"), ("encoder.storage_tokens", "encoder.patch_embed.register_tokens"),
                         ("patch_embed.proj", "patch_embed.patch_embeddings"), ("attn.proj", "attention.o_proj"), ("ls1.gamma", "layer_scale1.lambda1"),
                         ("ls2.gamma", "layer_scale2.lambda1"), ("fc1", "up_proj"), ("fc2", "down_proj"), ("encoder.", "encoder.backbone.")):
            key = key.replace(old, new)
        parts = [key.replace("attn.qkv", f"attention.{part}_proj") for part in "qkv"] if "attn.qkv" in key else [key]
        network |= {f"network.{part}": rows for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True)}
    network = {key: tensor for key, tensor in network.items() if "k_proj.bias" not in key and "periods" not in key}
    network |= {"network.attn_mask_probs": -torch.ones(2), "network.encoder.pixel_mean": torch.zeros(1, 3, 1, 1)}
    torch.save({"state_dict": network}, tmp_path / "delta.bin")
    command = flags(script, data, tmp_path / "none", *val(data)[1:], "--network-weights", tmp_path / "delta.bin", "--test-only")
    at = command.index("--backbone-weights")
    without = [*command[:at], *command[at + 2:]]
    assert script.main([*without, "--backbone-weights", backbone])["miou"] == pytest.approx(result["miou"], abs=1e-9)
    with pytest.raises(ValueError, match="differences to a backbone's weights.*--backbone-weights FILE"):
        script.main(without)
    satellite = write_backbone(tmp_path / "dinov3_tiny_sat493m.pth")
    with pytest.raises(ValueError, match="satellite"):
        script.main([*without, "--backbone-weights", satellite])
    whole = [*without[:without.index("--network-weights")], "--network-weights", str(tmp_path / "run" / "model" / "model_last.pth"), "--test-only"]
    assert script.main(whole)["miou"] == result["miou"]                 # a checkpoint of ours is whole
    for more, message in ((["--backbone-weights", backbone], "holds a whole network.*leave --backbone-weights out"),
                          (["--normalization", "sat493m"], "trained with --normalization imagenet")):
        with pytest.raises(ValueError, match=message):
            script.main([*whole, *more])
    with pytest.raises(ValueError, match="no EoMT; it holds cls_token"):
        script.main([*without, "--network-weights", backbone])


def test_a_checkpoint_needs_no_other_file(data, tmp_path, capsys):
    backbone = write_backbone(tmp_path / "tiny.pth")
    result = train(script, data, tmp_path / "run", *val(data), "--backbone-weights", backbone)
    assert "checkpoints hold the whole network" in (printed := capsys.readouterr().out) and "licence" in printed
    Path(backbone).unlink()
    checkpoint = weights(tmp_path / "run")
    assert checkpoint["encoder"]["file"] == backbone and "mask_token" not in str(list(checkpoint["model"]))
    assert score(tmp_path / "run", data / "val")["miou"] == pytest.approx(result["miou"], abs=1e-9)


def test_dinov2_is_resampled_and_takes_photographs_of_any_size(data, tmp_path, capsys):
    train(script, data, tmp_path, "--backbone", "dinov2_small", "--epochs", "1", "--image-size", "80")
    assert weights(tmp_path)["model"]["encoder.pos_embed"].shape == (1, 25, 32)
    for more in ([], ["data.image_size=160"]):                           # 70 x 93: resized, in windows
        assert score(tmp_path, data / "val", *more)["miou"] > 0
    model = script.load_model(weights(tmp_path), torch.device("cpu"))
    assert model.scores(torch.zeros(1, 3, 48, 96)).shape == (1, 3, 48, 96)
