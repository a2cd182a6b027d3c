"""The mesh encoder: who influences whom, padding, empty clusters, gradients."""

import math

import pytest
import torch
from torch import nn

from models import nomeformer
from models.nomeformer import Attention, DropPath, Layer, Nomeformer, PositionCode

DG, E, N, SLOTS = 5, 16, 4, 6


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    model = Nomeformer(DG, **{"embed_dim": E, "num_heads": 2, "num_attention_blocks": 2, **changes})
    nn.init.normal_(model.summary_token)
    return model.eval()


def mesh(seed=0, clusters=N, slots=SLOTS, short=True):
    """A batch of one; the last cluster has two faces fewer than the others."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, clusters, slots, DG, generator=generator)
    centroid = torch.randn(1, clusters, slots, 3, generator=generator) * 0.3
    masks = torch.ones(1, clusters, slots, dtype=torch.bool)
    if short:
        masks[0, -1, -2:] = False
    return features, masks, centroid


def pad(features, masks, centroid, clusters, slots, value=0.0):
    """The same mesh in a larger frame, its padding filled with `value`."""
    def frame(x, fill):
        out = x.new_full((1, clusters, slots, *x.shape[3:]), fill)
        out[:, :x.shape[1], :x.shape[2]] = x
        return out

    masks = frame(masks, False)
    features, centroid = frame(features, value), frame(centroid, value)
    return (torch.where(masks[..., None], features, value), masks, torch.where(masks[..., None], centroid, value))


# --- who influences whom --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use_position", [True, False])
def test_every_face_hears_of_every_other(use_position):
    """A per-face MLP, and an encoder whose clusters never communicate, give exactly 0 here."""
    model, (features, masks, centroid) = encoder(use_position=use_position), mesh()
    changed = features.clone()
    changed[0, 0, 0] += 1
    change = (model(changed, masks, centroid) - model(features, masks, centroid)).detach().abs().amax(-1)[0]      # (N, F)
    assert (change[masks[0]] > 1e-4).all()
    assert change[0, 0] == change.max()


def test_more_clusters_than_attention_on_cuda_takes_at_once(monkeypatch):
    """CUDA refuses more than 65,535 sequences; chunks of fewer give the same, padding and gradient included."""
    model, (features, masks, centroid) = encoder(), mesh(clusters=5)
    wanted = model(features, masks, centroid)
    gradient = torch.autograd.grad(wanted.square().sum(), model.blocks[0].local_layer.attn.qkv.weight)[0]
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nomeformer, "CHUNK", 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, *args, **more: (seen.append(len(query)), attention(query, *args, **more))[1])
    found = model(features, masks, centroid)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), model.blocks[0].local_layer.attn.qkv.weight)[0], gradient)
    assert max(seen) == 2 and seen[:3] == [2, 2, 1]


@pytest.mark.parametrize("depth, expected", [(1, False), (2, True), (3, True)])
def test_clusters_communicate_from_two_blocks_on(depth, expected):
    model, (features, masks, centroid) = encoder(num_attention_blocks=depth), mesh()
    changed = features.clone()
    changed[0, 0] += 1
    change = (model(changed, masks, centroid) - model(features, masks, centroid))[0, 1:].abs().max()
    assert (change > 1e-4) == expected


def test_position_counts_only_where_asked():
    features, masks, centroid = mesh()
    for use_position in (True, False):
        model = encoder(use_position=use_position)
        same = torch.equal(model(features, masks, centroid), model(features, masks, centroid + 0.2))
        assert same != use_position


def test_order_of_clusters_and_of_faces_in_them_means_nothing():
    model, (features, masks, centroid) = encoder(), mesh(short=False)
    expected = model(features, masks, centroid)
    for axis in (1, 2):
        order = torch.randperm(features.shape[axis], generator=torch.Generator().manual_seed(1))
        permuted = model(*(x.index_select(axis, order) for x in (features, masks, centroid)))
        torch.testing.assert_close(permuted, expected.index_select(axis, order), atol=1e-5, rtol=0)


# --- padding --------------------------------------------------------------------------------------------------------

def test_padding_does_not_leak():
    model, one = encoder(), mesh()
    other = mesh(seed=1, clusters=7, slots=9)
    framed = pad(*one, 7, 9)
    batched = model(*(torch.cat(pair) for pair in zip(framed, other, strict=True)))
    torch.testing.assert_close(batched[:1, :N, :SLOTS], model(*one), atol=1e-5, rtol=0)
    torch.testing.assert_close(batched[1:], model(*other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [1e3, math.nan, math.inf])
def test_what_fills_the_padding_does_not_matter(value):
    model, one = encoder(), mesh()
    expected = model(*pad(*one, N + 2, SLOTS + 3))
    dirty = pad(*one, N + 2, SLOTS + 3, value)
    torch.testing.assert_close(model(*dirty), expected, atol=0, rtol=0)
    model.train()(*dirty).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padded_slots_come_out_as_zero():
    one = pad(*mesh(), N + 1, SLOTS + 1)
    assert (encoder()(*one)[~one[1]] == 0).all()


def test_padding_may_lie_anywhere():
    features, masks, centroid = mesh(short=False)
    masks[0, 1] = False
    masks[0, 0, 2] = False
    keep = [0, 2, 3]
    model = encoder()
    torch.testing.assert_close(model(features, masks, centroid)[:, keep],
                               model(features[:, keep], masks[:, keep], centroid[:, keep]), atol=1e-5, rtol=0)


def test_hidden_clusters_are_as_good_as_absent():
    model, (features, masks, centroid) = encoder(), mesh(short=False)
    visible = torch.tensor([[True, False, True, True]])
    out = model(features, masks, centroid, visible)
    keep = [0, 2, 3]
    alone = model(features[:, keep], masks[:, keep], centroid[:, keep])
    torch.testing.assert_close(out[:, keep], alone, atol=1e-5, rtol=0)
    assert (out[:, 1] == 0).all()
    features[0, 1], centroid[0, 1] = math.nan, 1e6
    assert torch.equal(model(features, masks, centroid, visible), out)


def test_nothing_visible_at_all():
    features, masks, centroid = mesh()
    out = encoder()(features, masks, centroid, torch.zeros(1, N, dtype=torch.bool))
    assert (out == 0).all()
    one_empty = torch.cat([features] * 2), torch.cat([masks, ~masks & masks]), torch.cat([centroid] * 2)
    out = encoder()(*one_empty)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[:1], encoder()(features, masks, centroid), atol=1e-5, rtol=0)


def test_a_single_face():
    features, masks, centroid = mesh(clusters=1, slots=1, short=False)
    assert encoder()(features, masks, centroid).isfinite().all()


# --- standardising, dropout, gradients ------------------------------------------------------------------------------

def test_features_are_standardised_with_what_the_state_dict_carries():
    model, (features, masks, centroid) = encoder(), mesh()
    expected = model(features, masks, centroid)
    model.feature_mean[:], model.feature_std[:] = torch.arange(DG), torch.arange(DG) + 1
    torch.testing.assert_close(model(features * model.feature_std + model.feature_mean, masks, centroid), expected,
                               atol=1e-5, rtol=0)
    assert {"feature_mean", "feature_std"} <= model.state_dict().keys()


def test_dropout_obeys_eval_and_acts_in_training():
    model, inputs = encoder(dropout=0.3, drop_path=0.3), mesh()
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))
    torch.testing.assert_close(encoder(dropout=0.3, drop_path=0.3)(*inputs), encoder()(*inputs))   # eval: no dropout


def test_attention_dropout_alone_obeys_eval():
    torch.manual_seed(0)
    attention, x, valid = Attention(E, 2, 0.5), torch.randn(3, 7, E), torch.ones(3, 7, dtype=torch.bool)
    assert not torch.equal(attention(x, valid), attention(x, valid))
    assert torch.equal(attention.eval()(x, valid), attention(x, valid))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 1)
    out = DropPath(0.25)(x)
    torch.testing.assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert (out[:, 0] == out[:, 1]).all()                                        # both tokens of a group together
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert DropPath(0.25).eval()(x) is x


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("use_position", [True, False])
def test_gradient_reaches_every_parameter(depth, use_position):
    model = encoder(num_attention_blocks=depth, use_position=use_position).train()
    weight = torch.randn(1, N, SLOTS, E, generator=torch.Generator().manual_seed(3))
    (model(*mesh()) * weight).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, without


@pytest.mark.parametrize("visible", [None, torch.tensor([[True, False, True, True]])])
def test_gradient_checkpointing_changes_nothing(visible):
    inputs, gradients = mesh(), []
    for again in (False, True):
        model = encoder(gradient_checkpointing=again, num_attention_blocks=3).train()
        out = model(*inputs, visible)
        out.square().sum().backward()
        gradients.append([out, *(p.grad for p in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    counted = []
    model.blocks[0].local_layer.register_forward_hook(lambda *_: counted.append(1))
    model(*inputs).sum().backward()
    assert len(counted) == 2                             # computed again for the gradient


def test_attention_against_the_formula():
    torch.manual_seed(0)
    attention = Attention(E, 2, 0.0)
    x, valid = torch.randn(2, 5, E), torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    expected = torch.zeros(2, 5, E)
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    for head in range(2):
        part = slice(head * E // 2, (head + 1) * E // 2)
        score = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(E / 2)
        expected[..., part] = score.masked_fill(~valid[:, None], -math.inf).softmax(-1) @ value[..., part]
    torch.testing.assert_close(attention(x, valid), attention.proj(expected))


def test_layer_is_residual():
    layer = Layer(E, 2, 2.0, 0.0, 0.0)
    for parameter in (*layer.attn.proj.parameters(), *layer.mlp[-1].parameters()):
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3, E)
    torch.testing.assert_close(layer(x, torch.ones(2, 3, dtype=torch.bool)), x)


def test_position_code_has_wavelengths_4_to_one_eighth():
    code = PositionCode(8)
    position = torch.rand(10, 3)
    torch.testing.assert_close(code(position + 4.0), code(position), atol=1e-4, rtol=0)
    only = torch.zeros(10, 36)                           # sines of x, y, z in 6 octaves, then cosines
    only[:, 5] = torch.sin(2 * torch.pi * position[:, 0] * 8)
    only[:, 18] = torch.cos(2 * torch.pi * position[:, 0] / 4)
    weight = torch.zeros(8, 36)
    weight[0, 5], weight[1, 18] = 1, 1
    code.proj.weight.data, code.proj.bias.data = weight, torch.zeros(8)
    torch.testing.assert_close(code(position)[:, :2], only[:, [5, 18]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings, message", [
    ({"embed_dim": 16, "num_heads": 3}, "model.embedding_dim=16 is not a multiple of model.num_heads=3"),
    ({"num_attention_blocks": 0}, "model.num_attention_blocks=0 must be at least 1"),
    ({"drop_path": 1.0}, r"model.drop_path=1.0 in \[0, 1\)")])
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Nomeformer(DG, **settings)


def test_bfloat16_is_close():
    model, inputs = encoder(), mesh()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs)
    assert (out.float() - model(*inputs)).abs().max() < 0.2


def test_memory_is_linear_in_the_faces():
    """No score matrix: 16 times the faces in one cluster of 16 times the size would hold 256 times the scores."""
    model = encoder()
    largest = []
    for slots in (64, 1024):
        sizes = []
        handles = [m.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(out.numel()))
                   for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm | Attention)]
        model(*mesh(clusters=2, slots=slots))
        largest.append(max(sizes))
        for handle in handles:
            handle.remove()
    assert largest[1] <= 16.5 * largest[0]
