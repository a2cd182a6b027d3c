"""utils/prototype_metrics.py against loops over pairs, cells and prototypes, and values by hand."""

import math

import pytest
import torch
from torch import nn

from models.ppnet import PPNet
from utils import prototype_metrics
from utils.losses import IGNORE_INDEX
from utils.prototype_metrics import PrototypeStatistics, active_cells, noise_stability

C, K, D = 3, 4, 5


def network(similarity="log", seed=0):
    torch.manual_seed(seed)
    model = PPNet(nn.Identity(), C, K, D, similarity).eval()
    model.last_layer.weight.data.uniform_(-0.5, 1.0)
    return model


def images(count=4, seed=1):
    """(distances (P, h, w), label (H, W)): classes 0 and 2, then 1 alone, ..., each with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        label = torch.full((16, 20), i % 2)
        label[:, 10:], label[:4] = (1 if i % 2 else 2), IGNORE_INDEX
        result.append((8 * torch.rand(C * K, 4 + i, 6, generator=generator), label))
    return result


def statistics(model, data):
    result = PrototypeStatistics(model)
    for distances, label in data:
        result.update(distances, label)
    return result


def test_active_cells_by_hand():
    distances = torch.arange(40.0).flip(0).reshape(1, 5, 8)
    assert active_cells(distances).nonzero()[:, 1].tolist() == [38, 39]                # 5 % of 40
    assert active_cells(distances[:, :, :1]).sum() == 1                                # at least one
    distances[0, 0, 0] = 1.0                                                           # as near as the second
    assert active_cells(distances).nonzero()[:, 1].tolist() == [0, 38, 39]


def test_diversity_equals_a_loop_over_pairs():
    model, data = network(), images()
    values = []
    for c in range(C):
        for i in range(c * K, (c + 1) * K):
            for j in range(i + 1, (c + 1) * K):
                shared = union = 0
                for distances, label in data:
                    if (label == c).any():
                        first, second = active_cells(distances)[[i, j]]
                        shared, union = shared + int((first & second).sum()), union + int((first | second).sum())
                values.append(shared / union)
    assert 0 < sum(values) < len(values)
    assert statistics(model, data).result()["diversity"] == pytest.approx(1 - sum(values) / len(values), abs=1e-12)


def test_diversity_ends():
    model = network()
    same, apart = torch.rand(1, 8, 8).repeat(C * K, 1, 1), torch.ones(C * K, 8, 8)
    for p in range(C * K):
        apart[p, p % 8, p // 8 * 4:][:4] = 0.0
    label = torch.arange(C).repeat(4, 4)
    assert statistics(model, [(same, label)]).result()["diversity"] == 0.0
    assert statistics(model, [(apart, label)]).result()["diversity"] == 1.0
    apart[1] = apart[0]                                              # 1 of 18 pairs, or of the 6 of class 0
    assert statistics(model, [(apart, None)]).result()["diversity"] == pytest.approx(17 / 18)
    assert statistics(model, [(apart, label * 0)]).result()["diversity"] == pytest.approx(5 / 6)
    void = statistics(model, [(apart, torch.full_like(label, IGNORE_INDEX))])
    assert math.isnan(void.result()["diversity"])


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_use_and_number_of_prototypes_equal_a_loop(kind):
    model, data = network(kind), images()
    wins, needed = [0] * (C * K), []
    for distances, _ in data:
        added = model.similarity(distances.flatten(1).T)[:, None] * model.last_layer.weight      # (cells, C, P)
        for cell in added.tolist():
            logits = [sum(row) for row in cell]
            parts = cell[logits.index(max(logits))]
            wins[parts.index(max(parts))] += 1
            if max(logits) > 0:
                ordered = sorted(parts, reverse=True)
                needed.append(next(n for n in range(1, C * K + 1) if sum(ordered[:n]) >= 0.9 * max(logits)))
    result = statistics(model, data).result()
    assert result["usage"] == pytest.approx([count / sum(wins) for count in wins]) and len(set(wins)) > 3
    assert result["sparsity"]["prototypes_for_90_percent"] == pytest.approx(sum(needed) / len(needed))
    assert len(set(needed)) > 1 and (len(needed) < sum(wins)) == (kind == "linear")    # some logits are below 0


def test_sparsity_of_the_weights():
    model = PPNet(nn.Identity(), 19, 10, D)
    assert PrototypeStatistics(model).result()["sparsity"]["off_class_l1"] == 1710
    weight = model.last_layer.weight.data.zero_()
    weight[0, 0], weight[1, 0], weight[2, 0] = 5.0, -2.0, 0.05
    sparsity = PrototypeStatistics(model).result()["sparsity"]
    assert sparsity["off_class_l1"] == pytest.approx(2.05) and sparsity["prototypes"] == 190
    assert sparsity["weights_above_005"] == pytest.approx(2 / (19 * 190))
    model.remove(torch.tensor([0, 11, 12]))
    result = PrototypeStatistics(model).result()
    assert result["prototypes_per_class"] == [1, 2] + [0] * 17 and result["sparsity"]["prototypes"] == 3


def test_nothing_seen():
    result = PrototypeStatistics(network()).result()
    assert math.isnan(result["diversity"]) and math.isnan(result["noise_stability"])
    assert math.isnan(result["sparsity"]["prototypes_for_90_percent"])


def test_processes_add_up(monkeypatch):
    model, data = network(), images(5)
    alone, first, second, none = (statistics(model, part) for part in (data, data[:1], data[1:], []))
    steadiness = torch.rand(5, C * K)
    for i, iou in enumerate(steadiness):
        alone.add_stability(iou)
        (first if i < 1 else second).add_stability(iou)
    expected = alone.result()
    assert expected["noise_stability"] == pytest.approx(steadiness.mean().item())
    sent = {second: [], none: []}
    for process, values in sent.items():
        monkeypatch.setattr(prototype_metrics, "all_reduce_sum", lambda value, to=values: to.append(value) or value)
        process.result()
    theirs = zip(*sent.values(), strict=True)
    monkeypatch.setattr(prototype_metrics, "all_reduce_sum", lambda value: value + sum(next(theirs)))
    result = first.result()
    for name in ("diversity", "noise_stability", "usage"):
        assert result[name] == pytest.approx(expected[name])
    assert result["sparsity"] == pytest.approx(expected["sparsity"])


def test_noise_stability():
    model = network()
    model.features = nn.Conv2d(3, D, 1)
    nn.init.zeros_(model.features.weight[:, 1:])
    image = torch.randn(1, 3, 12, 15)
    stability = noise_stability(model, image, 7)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(7)) * 0.2
    before, after = (active_cells(model(x)[1][0]) for x in (image, image + noise))
    for p in range(C * K):
        shared, either = int((before[p] & after[p]).sum()), int((before[p] | after[p]).sum())
        assert stability[p] == pytest.approx(shared / either)
    assert 0 < stability.mean() < 1
    assert torch.equal(noise_stability(model, image, 7), stability)
    assert not torch.equal(noise_stability(model, image, 8), stability)
    nn.init.normal_(model.features.weight[:, 0], std=50)             # noise is nothing beside it
    model.features.weight.data *= 0.01
    assert noise_stability(model, image * 100, 7).mean() > 0.9
