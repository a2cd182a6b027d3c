"""models/deeplab.py: grids, stride, initialisation, scales, frozen batch norm, and weight files made here."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.deeplab import DeepLabV2, MultiScale, freeze_batch_norm, load_deeplab_weights, read_deeplab_weights

SCHEMA = json.loads((Path(__file__).parent / "golden" / "prototype" / "key_schema.json").read_text())
RESNET_101 = (3, 4, 23, 3)


def tiny(out_channels=5, n_blocks=(1, 1, 1, 1), **settings):
    return DeepLabV2(out_channels, n_blocks, base_width=2, **settings)


def randomize(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith(("running_var", "bn.weight")) else tensor.normal_(std=0.3)
    return model


@pytest.mark.parametrize("size, grid", [((513, 513), (65, 65)), ((512, 512), (65, 65)), ((321, 321), (41, 41)),
                                        ((256, 256), (33, 33)), ((1024, 2048), (129, 257))])
def test_grid(size, grid):
    with torch.device("meta"):
        for in_1x1 in (True, False):
            assert tiny(stride_in_1x1=in_1x1)(torch.empty(1, 3, *size)).shape == (1, 5, *grid)


def test_scales_have_grids_of_their_own():
    with torch.device("meta"):
        maps = MultiScale(tiny(), (0.5, 0.75))(torch.empty(2, 3, 321, 321))
    assert [tuple(m.shape[-2:]) for m in maps] == [(41, 41), (21, 21), (31, 31), (41, 41)]


def test_one_stride_and_where_it_is():
    for in_1x1, place in ((True, "reduce"), (False, "conv3x3")):
        convs = {name: layer for name, layer in tiny(stride_in_1x1=in_1x1).named_modules() if isinstance(layer, torch.nn.Conv2d)}
        strided = {name for name, conv in convs.items() if conv.stride == (2, 2)}
        assert strided == {"layer1.conv1.conv", f"layer3.block1.{place}.conv", "layer3.block1.shortcut.conv"}
        dilated = {name: conv.dilation[0] for name, conv in convs.items() if conv.dilation != (1, 1)}
        assert dilated == {"layer4.block1.conv3x3.conv": 2, "layer5.block1.conv3x3.conv": 4, "aspp.c0": 6, "aspp.c1": 12,
                           "aspp.c2": 18, "aspp.c3": 24}


def test_base_width_scales_every_channel_number():
    with torch.device("meta"):
        small, official = DeepLabV2(64, base_width=16), DeepLabV2(64)
    for (name, a), b in zip(small.named_parameters(), official.parameters(), strict=True):
        expected = [n // 4 if i < 2 and not (name == "layer1.conv1.conv.weight" and i == 1) else n for i, n in enumerate(b.shape)]
        if name.startswith("aspp"):
            expected = [64] if b.ndim == 1 else [64, 512, 3, 3]
        assert list(a.shape) == expected, name


def test_initial_values_and_gradients():
    torch.manual_seed(0)
    model = DeepLabV2(8, (1, 1, 1, 1), base_width=16)
    conv, aspp = model.layer4.block1.conv3x3.conv.weight, model.aspp.c2
    assert abs(conv.std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02
    assert abs(aspp.weight.std() / 0.01 - 1) < 0.02 and not aspp.bias.any()
    model(torch.randn(2, 3, 65, 65)).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())


def test_n_blocks_is_checked():
    with pytest.raises(ValueError, match="four numbers"):
        DeepLabV2(n_blocks=(1, 1, 1))


def test_multi_scale_outputs():
    torch.manual_seed(0)
    base, image = randomize(tiny()).eval(), torch.randn(1, 3, 65, 97)
    assert torch.equal(MultiScale(base)(image), base(image))
    model = MultiScale(base, (0.5,)).train()
    freeze_batch_norm(model)
    full, half, highest = model(image)
    assert torch.equal(full, base(image))
    assert torch.equal(half, base(F.interpolate(image, scale_factor=0.5, mode="bilinear")))
    upsampled = F.interpolate(half, full.shape[-2:], mode="bilinear")
    assert torch.equal(highest, torch.maximum(full, upsampled)) and (highest > full).any() and (highest > upsampled).any()
    assert torch.equal(model.eval()(image), highest)


def test_frozen_batch_norm_stays_frozen():
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.train()
    freeze_batch_norm(model)
    model(torch.randn(2, 3, 65, 65))
    assert len(before) == 51 and all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    model(torch.randn(2, 3, 65, 65))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())


# -- weight files --------------------------------------------------------------

def save(tmp_path, state):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


def torchvision_file(counters=True):
    """A small network, and its backbone under torchvision's names as published, with the classifier."""
    model = randomize(tiny(n_blocks=RESNET_101))
    state, result = model.state_dict(), {"fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}
    for theirs, ours in SCHEMA["torchvision_to_deeplab"].items():
        if ours is not None and (counters or not theirs.endswith("num_batches_tracked")):
            result[theirs] = state[ours]
    return model, result


def same_backbone(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items()
               if not name.startswith("aspp.") and not name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("counters, count, prefix", [(True, 624, ""), (False, 520, "module.")])
def test_torchvision_file(tmp_path, counters, count, prefix):
    source, state = torchvision_file(counters)
    assert state.keys() == SCHEMA["torchvision_resnet101"].keys() or not counters
    path = save(tmp_path, {prefix + name: tensor for name, tensor in state.items()})
    model, image = MultiScale(tiny(n_blocks=RESNET_101)).eval(), torch.randn(1, 3, 33, 33)
    aspp = model.base.aspp.c0.weight.clone()
    before = model(image)
    message = load_deeplab_weights(model, path)
    assert message == f"matched {count}/{count} backbone tensors from {path} (layout: torchvision); " \
                      "dropped fc.weight, fc.bias; aspp starts from random values"
    assert same_backbone(source, model.base) and torch.equal(model.base.aspp.c0.weight, aspp)
    assert not torch.allclose(model(image), before)


def reference_resnet(state, image, blocks=(2, 1, 1, 1)):
    """A dilated ResNet in plain calls on tensors by torchvision's names, with the stride in the 3x3 convolution."""
    def conv_bn(x, conv, bn, **settings):
        x = F.conv2d(x, state[conv + ".weight"], **settings)
        return F.batch_norm(x, *(state[f"{bn}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.max_pool2d(conv_bn(image, "conv1", "bn1", stride=2, padding=3).relu(), 3, 2, 1, ceil_mode=True)
    for stage, (count, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
        for i in range(count):
            name, step = f"layer{stage + 1}.{i}", stride if i == 0 else 1
            y = conv_bn(x, f"{name}.conv1", f"{name}.bn1").relu()
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2", stride=step, padding=dilation, dilation=dilation).relu()
            y = conv_bn(y, f"{name}.conv3", f"{name}.bn3")
            x = (y + (conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=step) if i == 0 else x)).relu()
    return x


def test_torchvision_weights_compute_the_same_with_their_stride(tmp_path):
    torch.manual_seed(0)
    source = randomize(tiny(n_blocks=(2, 1, 1, 1))).state_dict()
    state = {theirs: source[ours] for theirs, ours in SCHEMA["torchvision_to_deeplab"].items() if ours in source}
    image, path = torch.randn(2, 3, 65, 49), save(tmp_path, state)
    expected = reference_resnet(state, image)
    for in_1x1 in (True, False):
        model = tiny(n_blocks=(2, 1, 1, 1), stride_in_1x1=in_1x1).eval()
        load_deeplab_weights(model, path)
        backbone = torch.nn.Sequential(*list(model.children())[:5])
        assert torch.allclose(backbone(image), expected, rtol=1e-4, atol=1e-4) is not in_1x1


@pytest.mark.parametrize("kind", ["deeplab_v1_coco", "deeplab_v2_voc"])
def test_deeplab_files(tmp_path, kind):
    """COCO initialisation (626 names, fc) and a network trained on VOC (632 names, prefix base., ASPP of 21 classes)."""
    source = randomize(tiny(21, RESNET_101))
    own = source.state_dict()
    state = {name: own.get(name.removeprefix("base."), torch.zeros(1)) for name in SCHEMA[kind]}
    path = save(tmp_path, state)
    model = MultiScale(tiny(5, RESNET_101))
    message = load_deeplab_weights(model, path)
    assert message.startswith(f"matched 624/624 backbone tensors from {path} (layout: deeplab); ")
    assert same_backbone(source, model.base) and not model.base.aspp.c0.bias.any()
    if kind == "deeplab_v1_coco":
        assert message.endswith("; dropped fc.weight, fc.bias; aspp starts from random values")
    else:
        assert message.endswith("; aspp starts from random values (the file's gives 21 channels, this model's 5)")
        assert load_deeplab_weights(same := tiny(21, RESNET_101), path).endswith("; aspp 8/8")
        assert torch.equal(same.aspp.c3.weight, source.aspp.c3.weight)


def test_backbone_of_a_whole_prototype_network(tmp_path):
    source = randomize(tiny())
    state = {"prototype_vectors": torch.zeros(2, 5, 1, 1), "last_layer.weight": torch.zeros(2, 2)}
    state |= {f"features.base.{name}": tensor for name, tensor in source.state_dict().items()}
    model = tiny()
    assert load_deeplab_weights(model, save(tmp_path, state)).endswith("; aspp 8/8")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True))


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    _, state = torchvision_file()
    path = save(tmp_path, {name: tensor for name, tensor in state.items() if not name.startswith("layer3.22.")})
    model = tiny(n_blocks=RESNET_101)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"matched 606/624 backbone tensors; 18 missing \(layer4.block23.reduce") as error:
        load_deeplab_weights(model, path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="matched 0/624|of another shape"):
        load_deeplab_weights(DeepLabV2(base_width=1), save(tmp_path, state))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_foreign_and_damaged_files(tmp_path):
    with pytest.raises(ValueError, match="neither torchvision's ResNet nor DeepLab v2, it holds patch_embed.weight"):
        read_deeplab_weights(save(tmp_path, {"patch_embed.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match="it holds nothing"):
        read_deeplab_weights(save(tmp_path, {}))
    _, state = torchvision_file()
    state["layer2.1.bn3.running_var"][0] = torch.nan
    with pytest.raises(ValueError, match="layer3.block2.increase.bn.running_var is not finite"):
        read_deeplab_weights(save(tmp_path, state))
