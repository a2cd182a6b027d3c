"""models/ppnet.py: distances, read-out, removal, state dicts, and what each phase trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.deeplab import DeepLabV2, MultiScale, freeze_batch_norm
from models.ppnet import EPSILON, PPNet, parameter_groups, ppnet_from_state

RATES = {"backbone": 1e-2, "aspp": 1e-2, "prototypes": 1e-2, "last_layer": 1e-2}


def network(scales=(), num_classes=3, per_class=4, channels=5, similarity="log", seed=0):
    torch.manual_seed(seed)
    model = PPNet(MultiScale(DeepLabV2(channels, (1, 1, 1, 1), base_width=2), scales), num_classes, per_class, channels, similarity)
    for aspp in model.features.base.aspp.children():
        nn.init.normal_(aspp.weight)                         # otherwise all features are close to 0.5
    return model


def head(num_classes=3, per_class=4, channels=5, similarity="log", seed=0):
    torch.manual_seed(seed)
    return PPNet(nn.Identity(), num_classes, per_class, channels, similarity)


def test_distances_are_squared_euclidean():
    model, features = head(channels=64), torch.rand(2, 64, 3, 4)
    direct = (features[:, None] - model.prototype_vectors[None, :, :, :]).square().sum(2)
    torch.testing.assert_close(model.prototype_distances(features), direct, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        model.prototype_vectors.zero_()
    assert (model.prototype_distances(torch.ones(1, 64, 1, 1)) == 64).all()


def test_a_prototype_on_a_cell_has_distance_nearly_zero_and_never_less():
    model, features = head(num_classes=19, per_class=10, channels=64), torch.rand(1, 64, 19, 10)
    with torch.no_grad():
        model.prototype_vectors.copy_(features[0].flatten(1).T[:, :, None, None])
    distances = model.prototype_distances(features)
    assert distances.min() >= 0
    own = distances[0].flatten(1).diagonal()
    assert own.max() < 5e-5 and model.similarity(own).min() > 8.7


def test_features_are_a_sigmoid_and_nothing_else():
    model = head()
    maps = torch.randn(2, 5, 3, 3)
    assert torch.equal(model.features_of(maps), maps.sigmoid())
    assert [name for name, _ in model.named_parameters()] == ["prototype_vectors", "last_layer.weight"]


def test_similarity():
    table = {0.0: 9.2103, 1e-4: 8.5173, 0.01: 4.6052, 0.1: 2.3969, 1.0: 0.6930, 5.0: 0.1823, 10.0: 0.0953, 64.0: 0.0155}
    expected = torch.tensor(list(table.values()))
    torch.testing.assert_close(head().similarity(torch.tensor(list(table))), expected, atol=6e-5, rtol=0)
    assert EPSILON == 1e-4
    assert torch.equal(head(similarity="linear").similarity(torch.tensor([2.0])), torch.tensor([-2.0]))
    with pytest.raises(ValueError, match="'cosine'; choose from log, linear"):
        head(similarity="cosine")


def test_initial_read_out():
    model = head(num_classes=19, per_class=10)
    weight = model.last_layer.weight
    assert weight.shape == (19, 190) and set(weight.unique().tolist()) == {1.0, -0.5}
    assert (weight.sum(1) == 10 - 0.5 * 180).all() and model.last_layer.bias is None
    assert torch.equal(model.class_identity.argmax(1), torch.arange(190) // 10)
    assert (weight.T[model.class_identity.bool()] == 1).all()
    assert 0 <= model.prototype_vectors.min() and 0.9 < model.prototype_vectors.max() < 1


@pytest.mark.parametrize("similarity", ["log", "linear"])
def test_weighted_similarities_sum_to_the_logits(similarity):
    """The read-out is linear and has no bias: what explanations rest on."""
    model = head(similarity=similarity)
    with torch.no_grad():
        model.last_layer.weight.normal_()
    logits, distances = model(torch.randn(2, 5, 3, 4))
    expected = sum(model.last_layer.weight[2, p] * model.similarity(distances[1, p, 0, 3]) for p in range(12))
    torch.testing.assert_close(logits[1, 0, 3, 2], expected, atol=1e-5, rtol=1e-5)


def test_maximum_over_scales_is_of_features_not_of_logits():
    model, image = network((0.5, 0.75)).train(), torch.randn(1, 3, 97, 129)
    freeze_batch_norm(model)
    outputs = model(image)
    assert len(outputs) == 4
    maps = model.features(image)
    full = [F.interpolate(m, maps[0].shape[-2:], mode="bilinear") for m in maps[:3]]
    expected, _ = model.classify(torch.stack(full).amax(0).sigmoid())
    torch.testing.assert_close(outputs[3][0], expected)
    of_logits = torch.stack([model.classify(m.sigmoid())[0] for m in full]).amax(0)
    assert not torch.allclose(outputs[3][0], of_logits, atol=1e-2)
    logits, distances = model.eval()(image)
    assert torch.equal(logits, outputs[3][0]) and distances.shape == (1, 12, 13, 17)
    scores = model.scores(image)
    assert scores.shape == (1, 3, 97, 129)
    assert torch.equal(scores, F.interpolate(logits.permute(0, 3, 1, 2), (97, 129), mode="bilinear", align_corners=False))


def test_autocast_leaves_the_head_in_float32():
    model, image = network().eval(), torch.randn(1, 3, 65, 65)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.features_of(image)
        logits, distances = model(image)
    assert features.dtype == logits.dtype == distances.dtype == torch.float32
    expected_logits, expected = model.classify(features)
    assert torch.equal(distances, expected) and torch.equal(logits, expected_logits)


# -- removal and state dicts ---------------------------------------------------

def test_remove_slices_everything_alike():
    model, keep = head(), [10, 1, 4, 5]
    with torch.no_grad():
        model.last_layer.weight.normal_()
    model.provenance = [{"prototype": i} for i in range(12)]
    features = torch.rand(1, 5, 2, 2)
    before, distances = {k: v.clone() for k, v in model.state_dict().items()}, model.prototype_distances(features)
    model.remove(torch.tensor(keep))
    assert torch.equal(model.prototype_vectors, before["prototype_vectors"][keep])
    assert torch.equal(model.class_identity, before["class_identity"][keep])
    assert torch.equal(model.last_layer.weight, before["last_layer.weight"][:, keep])
    assert model.ones.shape == (4, 5, 1, 1) and model.provenance == [{"prototype": i} for i in keep]
    logits, left = model.classify(features)
    torch.testing.assert_close(left, distances[:, keep])
    kept = torch.zeros(12).index_fill(0, torch.tensor(keep), 1.0)
    expected = torch.einsum("bphw,cp->bhwc", model.similarity(distances), before["last_layer.weight"] * kept)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert model.prototype_vectors.grad.any() and model.last_layer.weight.grad.any()
    assert repr(model.last_layer) == "Linear(in_features=4, out_features=3, bias=False)"


def test_remove_keeps_what_is_frozen_frozen():
    model = head()
    model.prototype_vectors.requires_grad_(False)
    model.remove(torch.arange(6))
    assert not model.prototype_vectors.requires_grad and model.last_layer.weight.requires_grad


@pytest.mark.parametrize("keep", [[], [0, 0], [12], [-1]])
def test_remove_refuses(keep):
    model = head()
    with pytest.raises(ValueError, match="different indices in 0..11"):
        model.remove(torch.tensor(keep, dtype=torch.int64))
    assert len(model.prototype_vectors) == 12


def test_a_pruned_network_is_restored_from_its_file_alone(tmp_path):
    model, image = network().eval(), torch.randn(1, 3, 65, 65)
    model.remove(torch.tensor([0, 5, 6, 7, 11]))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    restored = ppnet_from_state(network(seed=1).features, state).eval()
    for a, b in zip(model(image), restored(image), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.class_identity, restored.class_identity)
    assert restored.state_dict().keys() == state.keys()


def test_published_state_dict_without_class_identity():
    model = network(per_class=2)
    state = model.state_dict()
    identity = state.pop("class_identity")
    restored = ppnet_from_state(network(seed=1).features, state)
    assert torch.equal(restored.class_identity, identity)
    assert torch.equal(restored.prototype_vectors, model.prototype_vectors)
    pruned = {**state, "prototype_vectors": torch.rand(5, 5, 1, 1), "ones": torch.ones(5, 5, 1, 1), "last_layer.weight": torch.rand(3, 5)}
    with pytest.raises(ValueError, match="FILE: 5 prototypes of 3 classes and no class_identity"):
        ppnet_from_state(network().features, pruned, source="FILE")
    with pytest.raises(ValueError, match="FILE: no prototype network"):
        ppnet_from_state(network().features, {"fc.weight": torch.zeros(1)}, source="FILE")
    del state["features.base.layer2.block1.reduce.conv.weight"]
    with pytest.raises(ValueError, match="1 missing"):
        ppnet_from_state(network().features, state)


# -- phases --------------------------------------------------------------------

def train(model, groups, updates=3, freeze_bn=True, optimizer=None):
    """Updates with momentum; -> the names in the state dict that changed, as sets of their parts."""
    optimizer = optimizer or torch.optim.Adam(groups)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(updates):
        model.train()                                        # would thaw batch norm
        if freeze_bn:
            freeze_batch_norm(model)
        logits, distances = model(torch.randn(2, 3, 65, 65))
        loss = logits.square().mean() + distances.mean() + model.last_layer.weight.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def names_of(model, kind):
    norms = {name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    names = set(model.state_dict())
    chosen = {"aspp": {name for name in names if ".aspp." in name},
              "norm": {f"{name}.{part}" for name in norms for part in ("weight", "bias")},
              "statistics": {f"{name}.{part}" for name in norms for part in ("running_mean", "running_var", "num_batches_tracked")},
              "convs": {name for name in names if name.endswith("conv.weight")}}
    return chosen[kind]


@pytest.mark.parametrize("train_last_layer", [None, True])
@pytest.mark.parametrize("phase", [0, 1, 2])
def test_each_phase_changes_exactly_its_parameters(phase, train_last_layer):
    model = network()
    changed = train(model, parameter_groups(model, phase, RATES, train_last_layer=train_last_layer))
    expected = {"last_layer.weight"} if phase == 2 or train_last_layer else set()
    expected |= names_of(model, "aspp") | {"prototype_vectors"} if phase < 2 else set()
    expected |= names_of(model, "convs") if phase == 1 else set()
    assert changed == expected


def test_batch_norm_trains_on_request_only_in_the_joint_phase():
    model = network()
    groups = parameter_groups(model, 1, RATES, freeze_bn=False)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {"backbone": (1e-2, 5e-4), "backbone_norm": (1e-2, 0.0), "aspp": (1e-2, 5e-4), "prototypes": (1e-2, 0.0)}
    changed = train(model, groups, freeze_bn=False)
    assert changed >= names_of(model, "norm") | names_of(model, "statistics") | names_of(model, "convs")
    assert "last_layer.weight" not in changed
    assert "backbone_norm" not in {group["name"] for group in parameter_groups(model, 0, RATES, freeze_bn=False)}


def test_momentum_of_an_earlier_phase_moves_nothing():
    model = network()
    optimizer = torch.optim.Adam(parameter_groups(model, 1, RATES, train_last_layer=True))
    train(model, None, optimizer=optimizer)
    parameter_groups(model, 2, RATES)
    assert train(model, None, optimizer=optimizer) == {"last_layer.weight"}


def test_parameter_groups_errors():
    model = network()
    with pytest.raises(ValueError, match="phase 2 has nothing to train"):
        parameter_groups(model, 2, RATES, train_last_layer=False)
    with pytest.raises(ValueError, match="unknown phase 3"):
        parameter_groups(model, 3, RATES)
    with pytest.raises(ValueError, match="no learning rate for aspp in phase 0"):
        parameter_groups(model, 0, {"prototypes": 1e-3})
    assert all(p.requires_grad for p in model.parameters())
