"""ResNets: torchvision's sizes and names, its files load whole but for the classifier, other input channels."""

import pytest
import torch
from torch import nn

from models.resnet import ENCODERS, BasicBlock, ResNet, adapt_input, load_resnet_weights, read_resnet_weights

# torchvision's published totals with 1000 classes, less the classifier: 513,000 or 2,049,000
PARAMETERS = {"resnet18": 11_689_512 - 513_000, "resnet34": 21_797_672 - 513_000, "resnet50": 25_557_032 - 2_049_000,
              "resnet101": 44_549_160 - 2_049_000}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return tiny()


def tiny(**more):
    return ResNet(BasicBlock, (2, 1, 1, 1), width=8, **more)


def torchvision_file(path, encoder, features=64, **more):
    """What torchvision's file of an encoder holds: its tensors, and those of the classifier."""
    state = {name: torch.full_like(value, 0.25) for name, value in encoder.state_dict().items()}
    torch.save({**state, "fc.weight": torch.zeros(1000, features), "fc.bias": torch.zeros(1000), **more}, path)
    return path


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_torchvisions(name):
    with torch.device("meta"):
        encoder = ENCODERS[name]()
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS[name]
    depth = {"resnet18": 2, "resnet34": 6, "resnet50": 6, "resnet101": 23}[name]
    assert len(encoder.layer3) == depth and "layer2.0.downsample.1.running_mean" in encoder.state_dict()
    assert ("layer1.0.downsample.0.weight" in encoder.state_dict()) == (name in ("resnet50", "resnet101"))


def test_bottlenecks_stride_in_the_3x3_convolution():
    with torch.device("meta"):
        block = ENCODERS["resnet50"]().layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


@pytest.mark.parametrize("size, expected", [((64, 96), [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]),
                                            ((65, 33), [(33, 17), (17, 9), (9, 5), (5, 3), (3, 2)])])
def test_five_maps_at_rounded_up_halves(small, size, expected):
    maps = small.eval()(torch.randn(1, 3, *size))
    assert [tuple(m.shape[-2:]) for m in maps] == expected and [m.shape[1] for m in maps] == small.channels == [8, 8, 16, 32, 64]


def test_the_classifier_is_dropped_and_nothing_else(small, tmp_path):
    path = torchvision_file(tmp_path / "r.pth", small)
    state, dropped = read_resnet_weights(path)
    assert dropped == ["fc.weight", "fc.bias"] and state.keys() == small.state_dict().keys()
    encoder = tiny()
    line = load_resnet_weights(encoder, path)
    assert "matched 84/84" in line and "dropped fc.weight, fc.bias" in line
    assert all(bool((value == (0 if "tracked" in name else 0.25)).all()) for name, value in encoder.state_dict().items())


def test_old_files_without_counters_and_wrapped_ones_load(small, tmp_path):
    state = {name: value for name, value in small.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "old.pth")
    encoder = tiny()
    assert "matched 70/70" in load_resnet_weights(encoder, tmp_path / "old.pth")
    assert torch.equal(encoder.layer4[0].conv2.weight, small.layer4[0].conv2.weight)


def test_files_of_another_resnet_are_refused_whole(small, tmp_path):
    deeper = ResNet(BasicBlock, (2, 1, 2, 1), width=8)
    torch.save(deeper.state_dict(), tmp_path / "deeper.pth")
    torch.save({name: value for name, value in small.state_dict().items() if name != "layer3.0.bn1.bias"}, tmp_path / "cut.pth")
    before = small.conv1.weight.clone()
    for file, message in (("deeper.pth", "layer3.1.*model.backbone"), ("cut.pth", "layer3.0.bn1.bias")):
        with pytest.raises(ValueError, match=message):
            load_resnet_weights(small, tmp_path / file)
    assert torch.equal(small.conv1.weight, before)


def test_other_input_channels(small, tmp_path):
    weight = torch.randn(4, 3, 2, 2)
    assert torch.allclose(adapt_input(weight, 1), weight[:, :1] + weight[:, 1:2] + weight[:, 2:])
    assert torch.allclose(adapt_input(weight, 5), torch.cat([weight, weight[:, :2]], 1) * 3 / 5)
    assert torch.allclose(adapt_input(weight, 2), weight[:, :2] * 1.5) and adapt_input(weight, 3) is weight
    path, encoder = torchvision_file(tmp_path / "r.pth", small), tiny(in_channels=1)
    load_resnet_weights(encoder, path)
    assert isinstance(encoder, nn.Module) and torch.allclose(encoder.conv1.weight, torch.full((8, 1, 7, 7), 0.75))
