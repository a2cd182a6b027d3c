"""models/dinov3_adapter.py: sizes, gradients, drop path, checkpointing and refusals. Parity: test_golden_adapter.py."""

import pytest
import torch

from models.dinov3_adapter import DINOv3_Adapter, DWConv


def case(height=64, width=96, batch=2, patch_size=16, dim=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    adapter = DINOv3_Adapter(dim, patch_size, conv_inplane=4, deform_num_heads=4, **kwargs)
    image = torch.randn(batch, 3, height, width)
    taps = [torch.randn(batch, dim, height // patch_size, width // patch_size) for _ in range(4)]
    return adapter, image, taps


@pytest.mark.parametrize("height, width, patch_size", [(64, 160, 16), (32, 32, 16), (224, 448, 14)])
def test_strides(height, width, patch_size):
    adapter, image, taps = case(height, width, patch_size=patch_size)
    maps = adapter.eval()(image, taps)
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        str(i + 1): (2, 16, height // stride, width // stride) for i, stride in enumerate((4, 8, 16, 32))}


@torch.no_grad()
def test_images_of_a_batch_do_not_mix_and_every_tap_counts():
    adapter, image, taps = case()
    maps = adapter.eval()(image, taps)
    alone = adapter(image[1:], [tap[1:] for tap in taps])
    for name in maps:
        torch.testing.assert_close(maps[name][1:], alone[name], atol=1e-5, rtol=1e-5)
    for i in range(4):
        other = adapter(image, [tap.flip(-1) if i == j else tap for j, tap in enumerate(taps)])
        assert not torch.allclose(other[str(i + 1)], maps[str(i + 1)], atol=1e-2)


def test_gradient_reaches_every_parameter():
    adapter, image, taps = case()
    for name, parameter in adapter.named_parameters():     # they start at 0, which lets nothing through to the queries
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    maps = adapter.eval()(image, taps)                     # in training a batch norm hides the biases before it
    sum((m * torch.randn_like(m)).sum() for m in maps.values()).backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(tap.grad is None and not tap.requires_grad for tap in taps)


def test_drop_path_only_in_training():
    adapter, image, taps = case()
    first, second = (adapter(image, taps)["4"] for _ in range(2))
    assert not torch.equal(first, second)
    adapter.eval()
    first, second = (adapter(image, taps)["4"] for _ in range(2))
    assert torch.equal(first, second)
    adapter, image, taps = case(drop_path=0.0)
    first, second = (adapter(image, taps)["4"] for _ in range(2))
    assert torch.equal(first, second)


def test_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        adapter, image, taps = case(gradient_checkpointing=checkpointing)
        torch.manual_seed(1)                               # the same branches are dropped
        maps = adapter(image, taps)
        sum(m.square().mean() * (i + 1) for i, m in enumerate(maps.values())).backward()
        results.append((maps, {name: p.grad for name, p in adapter.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)


def test_checkpointing_keeps_less():
    kept = []
    for checkpointing in (False, True):
        adapter, image, taps = case(gradient_checkpointing=checkpointing)
        count = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x, c=count: (c.__setitem__(0, c[0] + 1), x)[1], lambda x: x):
            adapter(image, taps)
        kept.append(count[0])
    assert kept[1] < 0.5 * kept[0]


@torch.no_grad()
def test_depthwise_convolution_treats_each_map_apart():
    layer, maps = DWConv(3), [torch.randn(2, 3, 4, 6), torch.randn(2, 3, 2, 3), torch.randn(2, 3, 1, 2)]
    tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
    expected = torch.cat([layer.dwconv(m).flatten(2).transpose(1, 2) for m in maps], 1)
    torch.testing.assert_close(layer(tokens, [(4, 6), (2, 3), (1, 2)]), expected)


def test_bfloat16_autocast_stays_close():
    adapter, image, taps = case()
    plain = adapter.eval()(image, taps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = adapter(image, [tap.bfloat16() for tap in taps])
    for name in plain:
        error = (mixed[name].float() - plain[name]).abs().mean() / plain[name].abs().mean()
        assert error < 0.03, (name, error)


def test_errors():
    adapter, image, taps = case()
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 80"):
        adapter(image[..., :80], taps)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 4, 5\) do not belong to images \(2, 3, 64, 96\).*patch size 16"):
        adapter(image, [*taps[:3], taps[3][..., :5]])
    with pytest.raises(ValueError, match="4 layers of the backbone, got 3"):
        adapter(image, taps[:3])
