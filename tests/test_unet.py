"""U-Net: the sizes and names of segmentation_models.pytorch, any size of image, checkpoints that load whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.resnet import ENCODERS, BasicBlock, ResNet
from models.unet import HEAD, UNet, is_unet, load_unet_weights, read_unet_weights

NAMES = (Path(__file__).parent / "golden" / "unet" / "resnet34_names.txt").read_text().splitlines()


def unet(num_classes=3, **more):
    return UNet(ResNet(BasicBlock, (1, 1, 1, 1), width=8), num_classes, **more)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return unet()


@pytest.mark.parametrize("classes", [1, 11, 19, 21])
def test_sizes_and_names_of_the_resnet34_unet(classes):
    with torch.device("meta"):
        model = UNet(ENCODERS["resnet34"](), classes)
    assert sum(p.numel() for p in model.parameters()) == 24_436_224 + 145 * classes
    assert sum(p.numel() for p in model.encoder.parameters()) == 21_284_672
    assert sum(p.numel() for p in model.decoder.parameters()) == 3_151_552
    assert list(model.state_dict()) == NAMES and len(NAMES) == 278


@pytest.mark.parametrize("size", [(64, 64), (61, 93), (33, 40), (16, 70)])
def test_any_size_of_image(network, size):
    assert network.eval()(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_the_upsampled_map_comes_before_the_skip(network):
    """A skip of zeros leaves what the first channels of the block's convolution see."""
    block, x = network.eval().decoder.blocks[0], torch.randn(1, 64, 2, 2)
    skip = torch.zeros(1, 32, 4, 4)
    with torch.no_grad():
        weight = block.conv1[0].weight
        expected = torch.nn.functional.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight[:, :64], padding=1)
        expected = block.conv2(torch.relu(block.conv1[1](expected)))
        assert torch.allclose(block(x, skip, (4, 4)), expected, atol=1e-5)


def test_dropout_acts_before_the_head_in_training_alone():
    torch.manual_seed(0)
    model = unet(dropout=0.9)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(image), model(image))
    assert not torch.equal(model.train()(image), model(image)) and not any("dropout" in name for name in model.state_dict())


def test_a_frozen_encoder_keeps_its_weights_and_statistics():
    torch.manual_seed(0)
    model = unet(freeze_encoder=True).train()
    assert not model.encoder.training and model.decoder.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(2, 3, 32, 32) + 3).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("encoder.") for name in changed) and "decoder.blocks.0.conv1.1.running_mean" in changed
    free = unet().train()
    free(torch.randn(2, 3, 32, 32) + 3)
    assert bool((free.encoder.bn1.running_mean != 0).any())


def test_a_gradient_reaches_every_parameter(network):
    network.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    network.zero_grad()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
                                  lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, lambda s: {"model": s, "epoch": 3}])
def test_checkpoints_load_in_every_wrapping(network, tmp_path, wrap):
    torch.save(wrap(network.state_dict()), tmp_path / "unet.pth")
    model = unet()
    line = load_unet_weights(model, tmp_path / "unet.pth")
    assert "matched 134/134" in line and "WARNING" not in line
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_hub_folder_loads(network, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_model_class": "Unet", "encoder_name": "resnet18", "classes": 3}))
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "model.safetensors")
    assert "matched 134/134" in load_unet_weights(unet(), tmp_path) and is_unet(read_unet_weights(tmp_path))
    for config in ({"_model_class": "FPN"}, {"decoder_interpolation": "bilinear"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"'{next(iter(config.values()))}' in config.json"):
            read_unet_weights(tmp_path)


def test_only_the_head_may_differ_and_that_is_said(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "unet.pth")
    model = unet(num_classes=5)
    head = model.segmentation_head[0].weight.clone()
    line = load_unet_weights(model, tmp_path / "unet.pth")
    assert "WARNING: but not the head" in line and f"{HEAD}0.weight" in line
    assert torch.equal(model.segmentation_head[0].weight, head)
    assert torch.equal(model.decoder.blocks[4].conv2[0].weight, network.decoder.blocks[4].conv2[0].weight)


def test_everything_else_that_differs_is_refused(network, tmp_path):
    state = network.state_dict()
    cases = {"decoder.blocks.1.attention1.attention.cSE.1.weight": ({**state, "decoder.blocks.1.attention1.attention.cSE.1.weight":
                                                                     torch.zeros(1)}, "scSE attention"),
             "missing": ({k: v for k, v in state.items() if k != "decoder.blocks.2.conv1.0.weight"}, "decoder.blocks.2.conv1.0.weight"),
             "more": ({**state, "encoder.layer1.1.conv1.weight": torch.zeros(1)}, "model.backbone"),
             "shape": ({**state, "decoder.blocks.2.conv1.0.weight": torch.zeros(1)}, "of another shape")}
    for name, (changed, message) in cases.items():
        torch.save(changed, tmp_path / f"{name}.pth")
        model = unet()
        before = model.encoder.conv1.weight.clone()
        with pytest.raises(ValueError, match=message):
            load_unet_weights(model, tmp_path / f"{name}.pth")
        assert torch.equal(model.encoder.conv1.weight, before)
