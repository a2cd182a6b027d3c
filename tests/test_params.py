"""utils/params.py: every trainable parameter in one group, with the rate and the decay it should have."""

import re

import pytest
import torch
from torch import nn

from utils.params import freeze, layerwise_groups, split_decay, unfreeze_last


class Encoder(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 7, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.query_embed = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(depth))
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(4, 2)


def layer_id(name):
    """0 for the embeddings, 1..3 for the blocks and, with the last, the norm; 4 for the head."""
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else 3 if name.startswith("encoder.norm") else 4 if name.startswith("head") else 0


def names_in(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_split_decay_by_hand():
    model = Model()
    decay, no_decay = split_decay(model.named_parameters(), 0.05)
    assert (decay["weight_decay"], decay["name"]) == (0.05, "decay")
    assert (no_decay["weight_decay"], no_decay["name"]) == (0.0, "no_decay")
    linear = {"encoder.embed.weight", "head.weight", *(f"encoder.blocks.{i}.1.weight" for i in range(3))}
    assert names_in(model, decay) == linear
    assert names_in(model, decay) | names_in(model, no_decay) == {name for name, _ in model.named_parameters()}
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))
    torch.optim.AdamW([decay, no_decay], lr=1e-3)


def test_split_decay_matches_whole_parts_of_a_name():
    weight = nn.Parameter(torch.zeros(2, 2))
    for name, decays in [("a.query_embed.weight", False), ("my_query_embed_proj.weight", True), ("level_embed", False),
                         ("w.bias", False), ("unbiased.weight", True)]:
        assert split_decay([(name, weight)], 0.1)[0]["weight_decay"] == (0.1 if decays else 0.0), name


def test_split_decay_leaves_out_frozen_parameters_and_empty_groups():
    model = Model()
    freeze(model.encoder)
    groups = split_decay(model.named_parameters(), 0.05)
    assert [names_in(model, group) for group in groups] == [{"head.weight"}, {"head.bias"}]
    model.head.bias.requires_grad_(False)
    assert [group["name"] for group in split_decay(model.named_parameters(), 0.05)] == ["decay"]
    weight = nn.Parameter(torch.zeros(2, 2))
    assert [len(group["params"]) for group in split_decay([("a", weight), ("b", weight)], 0.05)] == [1]      # tied


def test_layerwise_rates_by_hand():
    model = Model()
    groups = layerwise_groups(model, 1e-3, 0.05, layer_id, num_layers=4, layer_decay=0.5, head_lr_mult=10.0)
    rates = {name: group["lr"] for group in groups for name in names_in(model, group)}
    assert rates["head.weight"] == rates["head.bias"] == pytest.approx(1e-2)
    assert rates["encoder.blocks.2.1.weight"] == rates["encoder.norm.weight"] == pytest.approx(5e-4)
    assert rates["encoder.blocks.0.1.weight"] == pytest.approx(1.25e-4)
    assert rates["encoder.embed.weight"] == rates["encoder.pos_embed"] == pytest.approx(6.25e-5)
    layers, kinds = ("layer0", "layer1", "layer2", "layer3", "head"), ("decay", "no_decay")
    assert [group["name"] for group in groups] == [f"{layer}_{kind}" for layer in layers for kind in kinds]
    assert all(group["weight_decay"] == (0.0 if "no_decay" in group["name"] else 0.05) for group in groups)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_trainable_parameter_is_in_one_group(frozen):
    model = Model()
    if frozen:
        freeze(model.encoder)
        unfreeze_last(model.encoder.blocks, 1)
    groups = layerwise_groups(model, 1e-3, 0.05, layer_id, num_layers=4)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["lr"] for group in groups} == {1e-3}
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("kwargs, message", [
    ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"), ({"layer_decay": 2.0}, "layer_decay"),
    ({"head_lr_mult": 0.0}, "head_lr_mult must be above 0, got 0.0"),
    ({"num_layers": 3}, r"parameter head.weight got layer 4, outside 0\.\.3"),
    ({"layer_id": lambda name: -1}, r"got layer -1, outside 0\.\.4")])
def test_layerwise_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        layerwise_groups(Model(), 1e-3, 0.05, **{"layer_id": layer_id, "num_layers": 4, **kwargs})


def test_freeze():
    model = Model()
    assert freeze(model.encoder) is model.encoder
    assert not model.encoder.training and not any(p.requires_grad for p in model.encoder.parameters())
    assert model.head.training and model.head.weight.requires_grad


@pytest.mark.parametrize("k, expected", [(0, set()), (1, {"blocks.2", "norm"}), (2, {"blocks.1", "blocks.2", "norm"}),
                                         (3, {"blocks.0", "blocks.1", "blocks.2", "norm"}),
                                         ("all", {"blocks.0", "blocks.1", "blocks.2", "norm"})])
def test_unfreeze_last(k, expected):
    encoder = freeze(Encoder())
    count = unfreeze_last(encoder.blocks, k, encoder.norm)
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert {re.match(r"blocks\.\d+|\w+", name)[0] for name in trainable} == expected
    assert count == sum(p.numel() for p in trainable.values())
    parts = ("blocks.0", "blocks.1", "blocks.2", "norm")
    assert {name for name in parts if encoder.get_submodule(name).training} == expected
    assert not encoder.embed.training


@pytest.mark.parametrize("k", [4, -1, True, 1.0, "every", None])
def test_unfreeze_last_errors(k):
    with pytest.raises(ValueError, match=rf"must be 'all' or 0\.\.3, got {k!r}"):
        unfreeze_last(Encoder().blocks, k)
