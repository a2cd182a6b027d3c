"""models/dinov3.py: names, positions, taps, train mode, number formats, the frozen wrapper. Parity is in test_golden_dinov3.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.dinov3 import BACKBONES, FrozenBackbone, RopePositions, VisionTransformer, ViTConfig, backbone_name, rotate

TINY = ViTConfig(32, 4, 2, "mlp", 64, (0, 1, 2, 3))
TINY_V2 = ViTConfig(24, 2, 3, "swiglu_fused", 32, (0, 1), 14, 0, 1e-6, pos_grid=4, pos_offset=0.1)


def tiny(config=TINY, seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(config)


def frozen(config=TINY, seed=0):
    return FrozenBackbone(tiny(config, seed), config.taps, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], {"name": "tiny"})


def photo(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# -- table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, name", [("vits16", "dinov3_vits16"), ("dinov3_vit7b16", "dinov3_vit7b16"), ("vitg14_reg", "dinov2_vitg14_reg"),
                                        ("dinov2_vits14", "dinov2_vits14")])
def test_backbone_name(text, name):
    assert backbone_name(text) == name


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(ValueError, match=r"expected one of dinov3_vits16, .*; got 'vits61'; did you mean .*vits16"):
        backbone_name("vits61")


@pytest.mark.parametrize("name, eps", [("dinov3_vits16", 1e-5), ("dinov2_vits14", 1e-6), ("dinov2_vits14_reg", 1e-6)])
def test_layer_norm_eps(name, eps):
    """The two families differ in it, and random weights of ordinary size would not show it."""
    with torch.device("meta"):
        vit = VisionTransformer(BACKBONES[name])
    norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 25 and {module.eps for module in norms} == {eps}


# -- rotary positions --------------------------------------------------------------------------------------------------


def test_rope_angles_by_hand():
    """Grid 2 x 3, head dim 8: periods 1 and 10; y = -1/2, 1/2; x = -2/3, 0, 2/3; the y angles come first, both tiled."""
    cos, sin = RopePositions(ViTConfig(16, 1, 2, "mlp", 16))(2, 3, num_prefix=5)
    assert cos.shape == sin.shape == (11, 1, 1, 8) and cos.dtype == torch.float32
    assert (cos[:5] == 1).all() and (sin[:5] == 0).all()
    angles = torch.tensor([2 * math.pi * v for v in (-1 / 2, -1 / 20, 2 / 3, 2 / 30)])            # patch in row 0, column 2
    torch.testing.assert_close(cos[5 + 2, 0, 0], angles.cos().repeat(2))
    torch.testing.assert_close(sin[5 + 2, 0, 0], torch.cat([-angles.sin(), angles.sin()]))


def test_rotation_pairs_the_halves_and_keeps_the_prefix():
    qk = photo(1, 3, 2, 1, 4)
    angle = torch.tensor([[0.0, 0.0], [0.3, -1.2], [2.0, 0.5]])
    cos, sin = angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], -1)
    rotated = rotate(qk, cos[:, None, None], sin[:, None, None])
    assert torch.equal(rotated[:, 0], qk[:, 0])
    pairs = torch.complex(qk[..., :2], qk[..., 2:]) * torch.polar(torch.ones(3, 2), angle)[:, None, None]
    torch.testing.assert_close(rotated, torch.cat([pairs.real, pairs.imag], -1))
    assert rotate(qk.bfloat16(), cos[:, None, None], sin[:, None, None]).dtype == torch.bfloat16


def test_learned_positions_fit_every_grid():
    vit = tiny(TINY_V2._replace(pos_grid=37, depth=1))
    for height in range(1, 80):                              # resized by a factor: rounding down must not lose a row
        assert vit._position(height, 81 - height).shape == (1, 1 + height * (81 - height), 24)
    assert vit._position(37, 37) is vit.pos_embed


# -- the transformer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["DINOv3", "DINOv2"])
def test_train_mode_changes_nothing(config):
    """Also not between two calls: the official DINOv3 rescales positions at random in train mode."""
    vit, image = tiny(config), photo(2, 3, 2 * config.patch_size, 3 * config.patch_size)
    expected = vit.eval()(image)
    vit.train()
    for _ in range(2):
        assert all(torch.equal(value, expected[name]) for name, value in vit(image).items())


def test_taps():
    vit, image = tiny().eval(), photo(2, 3, 32, 48)
    all_four = vit.get_intermediate_layers(image, 4)
    assert all(feature.shape == (2, 32, 2, 3) for feature in all_four)
    some = vit.get_intermediate_layers(image, (2, 0))
    assert torch.equal(some[0], all_four[2]) and torch.equal(some[1], all_four[0])
    torch.testing.assert_close(vit.get_intermediate_layers(image)[0].flatten(2).transpose(1, 2), vit(image)["patch_tokens"])
    raw = vit._run(image, [1])[0]
    torch.testing.assert_close(vit.norm(raw)[:, -6:], vit.get_intermediate_layers(image, [1], reshape=False)[0])
    assert not torch.allclose(raw, vit.norm(raw))


def test_blocks_behind_the_last_tap_are_not_run():
    vit = tiny()
    vit.blocks[2].register_forward_pre_hook(lambda *_: pytest.fail("a block was run for nothing"))
    vit.get_intermediate_layers(photo(1, 3, 16, 16), [1])


@pytest.mark.parametrize("n", [[], [4], [-1], 5, 0])
def test_unknown_blocks(n):
    with pytest.raises(ValueError, match="expected indices from 0 to 3"):
        tiny().get_intermediate_layers(photo(1, 3, 16, 16), n)


@pytest.mark.parametrize("image, message", [(torch.zeros(1, 3, 32, 40), "32 x 40 pixels.*multiples of the patch size 16"),
                                            (torch.zeros(1, 3, 0, 16), "0 x 16"), (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
                                            (torch.zeros(1, 4, 32, 32), r"\(1, 4, 32, 32\)"),
                                            (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8")])
def test_wrong_images(image, message):
    with pytest.raises(ValueError, match=message):
        tiny()(image)


def test_untrained_weights_follow_the_seed():
    first, again, other = (tiny(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert first["blocks.0.attn.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("config", [TINY._replace(depth=1), TINY._replace(depth=1, ffn="swiglu"), TINY_V2], ids=["mlp", "swiglu", "fused"])
def test_gradients_survive_the_operations_in_place(config):
    vit = tiny(config).double()
    image = photo(1, 3, config.patch_size, 2 * config.patch_size).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vit(x)["patch_tokens"], image, fast_mode=True)


def test_registers_are_dropped_and_seen():
    """Patch tokens depend on the registers; none of the prefix tokens is among them."""
    vit, image = tiny().eval(), photo(1, 3, 32, 32)
    before = vit(image)
    assert before["storage_tokens"].shape == (1, 4, 32) and before["patch_tokens"].shape == (1, 4, 32)
    with torch.no_grad():
        vit.storage_tokens += 1
    assert not torch.equal(vit(image)["patch_tokens"], before["patch_tokens"])


# -- the frozen wrapper ------------------------------------------------------------------------------------------------


def test_frozen_backbone_returns_taps_without_gradients():
    backbone, image = frozen(), photo(2, 3, 32, 64)
    features = backbone(image)
    assert [tuple(feature.shape) for feature in features] == [(2, 32, 2, 4)] * 4
    assert not any(feature.requires_grad for feature in features)
    assert not any(parameter.requires_grad for parameter in backbone.vit.parameters()) and not backbone.vit.training
    expected = backbone.vit.get_intermediate_layers(image, TINY.taps)
    assert all(torch.equal(feature, tap) for feature, tap in zip(features, expected, strict=True))
    assert not isinstance(backbone, nn.Module)
    assert (backbone.multiple, frozen(TINY_V2).multiple, backbone.embed_dim, backbone.patch_size) == (32, 224, 32, 16)


def test_normalisation_of_one_pixel():
    pixel = torch.tensor([255, 128, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225]
    backbone = frozen()
    result = backbone.normalize(pixel)
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    satellite = FrozenBackbone(backbone.vit, (0,), [0.430, 0.411, 0.296], [0.213, 0.156, 0.143], {})
    assert satellite.normalize(pixel).flatten().tolist() == pytest.approx([0.57 / 0.213, (128 / 255 - 0.411) / 0.156, -0.296 / 0.143], abs=1e-6)
    with pytest.raises(ValueError, match="expected uint8 from 0 to 255, got torch.float32"):
        backbone.normalize(pixel.float() / 255)


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["DINOv3", "DINOv2"])
def test_weights_held_in_bfloat16_give_what_autocast_gives(config):
    image = photo(1, 3, 2 * config.patch_size, 3 * config.patch_size)
    reference, half = frozen(config), frozen(config).to("cpu", torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference.vit.get_intermediate_layers(image, config.taps)
    assert all(torch.equal(feature, tap) for feature, tap in zip(half(image), expected, strict=True))
    full = reference(image)
    assert not torch.equal(full[-1], half(image)[-1])
    torch.testing.assert_close(half(image)[-1].float(), full[-1], atol=0.05, rtol=0.05)
    dtypes = {name: parameter.dtype for name, parameter in half.vit.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == \
        {name for name in dtypes if any(part in name for part in ("attn.", "mlp.", "patch_embed."))}
    half.to("cpu", torch.bfloat16)
    for dtype in (None, torch.float16):
        with pytest.raises(ValueError, match="held in torch.bfloat16; load it again"):
            half.to("cpu", dtype)


def test_sha256_is_of_the_float32_weights():
    first, again = frozen(), frozen()
    digest = first.sha256()
    assert len(digest) == 64 and again.to("cpu", torch.bfloat16).sha256() == digest
    assert frozen(seed=1).sha256() != digest
    for name in ("rope_embed.periods", "blocks.3.ls2.gamma"):
        changed = frozen()
        with torch.no_grad():
            changed.vit.state_dict()[name][-1].nextafter_(torch.tensor(9.0))       # one bit
        assert changed.sha256() != digest


@pytest.mark.gpu
def test_gpu_gives_the_same():
    image = photo(2, 3, 64, 96)
    expected = frozen()(image)
    for feature, tap in zip(frozen().to("cuda")(image.cuda()), expected, strict=True):
        torch.testing.assert_close(feature.cpu(), tap, atol=2e-3, rtol=2e-3)
    half = frozen().to("cuda", torch.bfloat16)(image.cuda())
    assert F.mse_loss(half[-1].float().cpu(), expected[-1]) < 1e-3
