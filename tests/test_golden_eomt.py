"""models/eomt.py and models/eomt_weights.py against outputs, names, gradients and rates of the official network."""

import json
import re
from pathlib import Path

import pytest
import torch

import models.eomt as eomt
import models.eomt_weights as eomt_weights
import models.query_masks as query_masks
from models.dinov3 import VisionTransformer, ViTConfig, rope_periods
from models.eomt import EoMT, eomt_config
from models.eomt_weights import holds_differences, load_network, resample_dinov2, to_eomt_names
from utils.image_inference import build_normalizer

GOLDEN = Path(__file__).parent / "golden" / "eomt"
SCHEMA = json.loads((GOLDEN / "key_schema.json").read_text())["models"]
BACKBONES = ("dinov3", "dinov2")
NORMALIZE = build_normalizer((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read(name):
    case = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    return case, {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}


def vit_config(c):
    config = ViTConfig(c["dim"], c["depth"], c["heads"], "mlp", c["ffn_hidden"], num_registers=c["prefix_tokens"] - 1)
    if c["backbone"] == "dinov3":
        return config
    return config._replace(norm_eps=1e-6, pos_grid=tuple(side // 16 for side in c["image"]), pos_class=False, pos_antialias=True)


def build(case):
    c = case["config"]
    model = EoMT(VisionTransformer(vit_config(c)), c["num_classes"], c["queries"], c["blocks"])
    state, joint_blocks = to_eomt_names(case["state_dict"], case["name"])
    assert joint_blocks == c["blocks"]
    if c["backbone"] == "dinov3":
        state["encoder.rope_embed.periods"] = rope_periods(model.encoder.config)
    model.load_state_dict(state)
    return model


def outputs_of(model, case, probs, patch, random=()):
    """All predictions in their order, the final one last; probs None: no masks, the final one alone."""
    draws = iter([*random, *[torch.zeros(2, 6)] * 9])
    patch.setattr(eomt.torch, "rand", lambda shape, device: next(draws))
    shares = None if probs is None else [torch.tensor(p) for p in probs]
    final = model(NORMALIZE(case["inputs"]["image"]), shares, aux=probs is not None)
    return [*final.pop("aux_outputs", ()), final]


def assert_equal_outputs(outputs, expected, close):
    assert len(outputs) == len(expected["mask_logits"]) == len(expected["class_logits"])
    for output, masks, classes in zip(outputs, expected["mask_logits"], expected["class_logits"], strict=True):
        torch.testing.assert_close(output["pred_masks"], masks, **close)
        torch.testing.assert_close(output["pred_logits"], classes, **close)


def check(case, close, patch, spoil=None):
    """All that the files hold but for gradients."""
    model = build(case)
    if spoil is not None:
        spoil(model, patch)
    with torch.no_grad():
        for name, probs in (("masked", [1.0, 1.0]), ("unmasked", None), ("annealed", case["config"]["probs"])):
            random = case["inputs"]["random"] if name == "annealed" else ()
            assert_equal_outputs(outputs_of(model, case, probs, patch, random), case["outputs"][name], close)


@pytest.mark.parametrize("name", BACKBONES)
def test_predictions_with_masks_annealed_and_without(name, monkeypatch):
    check(*read(name), monkeypatch)


# -- planted mistakes, each of which the files notice ------------------------------------------------------------------

def set_eps(modules, eps):
    for module in modules:
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps


def change_mask(patch, change):
    original = eomt.allowed_patches
    patch.setattr(eomt, "allowed_patches", lambda *arguments: change(original(*arguments)))


def change_resize(patch, change):
    original = query_masks.F.interpolate

    def resize(x, size, mode, **more):
        return original(x, size, mode=mode, **more) if mode == "bicubic" else change(x, size)
    patch.setattr(query_masks.F, "interpolate", resize)
    return original


def sigmoids(model, patch):
    original = change_resize(patch, lambda x, size: original(x.sigmoid(), size, mode="bilinear") - 0.5)


def nearest(model, patch):
    original = change_resize(patch, lambda x, size: original(x, size, mode="nearest"))


def antialiased(model, patch):
    original = change_resize(patch, lambda x, size: original(x, size, mode="bilinear", antialias=True))


def not_rotated(model, patch):
    if model.encoder.config.pos_grid is None:
        original = model.encoder.rope_embed.forward
        patch.setattr(model.encoder.rope_embed, "forward", lambda h, w, prefix: original(h, w, prefix) if prefix == 5 else
                      (torch.ones(prefix + h * w, 1, 1, 16), torch.zeros(prefix + h * w, 1, 1, 16)))
    else:                                                              # and DINOv2's positions: of the other axis first
        model.encoder.pos_embed.data = model.encoder.pos_embed.data.unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)


def reversed_annealing(model, patch):
    original = eomt.allowed_patches

    def free_where_kept(logits, grid, share):
        drawn = torch.rand(logits.shape[:2], device=None) if share < 1 else torch.zeros(logits.shape[:2])
        return original(logits, grid, 1 - share if share < 1 else share, 1 - drawn if share < 1 else drawn)
    patch.setattr(eomt, "allowed_patches", free_where_kept)


MISTAKES = {
    "eps of the ViT": lambda model, patch: set_eps(model.encoder.modules(), {1e-5: 1e-6, 1e-6: 1e-5}[model.encoder.norm.eps]),
    "eps of the upscaling": lambda model, patch: set_eps(model.upscale.modules(), 1e-4),
    "no norm before the heads": lambda model, patch: setattr(model.encoder, "norm", torch.nn.Identity()),
    "queries not rotated with the patches' angles, positions transposed": not_rotated,
    "masks ignored": lambda model, patch: change_mask(patch, torch.ones_like),
    "masks reversed": lambda model, patch: change_mask(patch, torch.logical_not),
    "a query without patches sees all": lambda model, patch: change_mask(patch, lambda allowed: allowed | ~allowed.any(-1, keepdim=True)),
    "queries do not see the prefix": lambda model, patch: patch.setattr(query_masks.F, "pad", lambda x, sides, value=0, original=query_masks.F.pad:
                                                                        original(x, sides, value=value and x.dtype != torch.bool)),
    "masks from resized sigmoids": sigmoids,
    "masks resized to the nearest": nearest,
    "masks resized with antialias": antialiased,
    "annealing reversed": reversed_annealing,
    "image not normalised": lambda model, patch: patch.setitem(globals(), "NORMALIZE", lambda image: image.float() / 255),
    "LayerScale missing": lambda model, patch: [block.ls1.gamma.data.fill_(1) for block in model.encoder.blocks],
    "tanh in the upscaling's GELU": lambda model, patch: patch.setattr(
        query_masks.F, "gelu", lambda x, original=query_masks.F.gelu, **_: original(x, approximate="tanh")),
    "queries after the prefix": lambda model, patch: patch.setattr(
        model, "_predict", lambda x, grid, original=model._predict: original(torch.cat([x[:, 5:11], x[:, :5], x[:, 11:]], 1), grid)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_planted_mistake_is_noticed(name, mistake, monkeypatch):
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(*read(name), monkeypatch, MISTAKES[mistake])


def official_gradients(model):
    """Under the official names: the joint qkv in its three parts, where the file has them."""
    rows = {}
    for name, parameter in model.named_parameters():
        name = name.replace("encoder.", "encoder.backbone.", 1)
        if model.encoder.config.pos_grid is not None:
            rows[name.replace("register_tokens", "reg_token")] = parameter.grad
            continue
        for old, new in (("backbone.cls_token", "backbone.patch_embed.cls_token"), ("backbone.storage_", "backbone.patch_embed.register_"),
                         ("patch_embed.proj.", "patch_embed.patch_embeddings."), (".attn.proj.", ".attention.o_proj."),
                         (".ls1.gamma", ".layer_scale1.lambda1"), (".ls2.gamma", ".layer_scale2.lambda1"), (".fc1.", ".up_proj."),
                         (".fc2.", ".down_proj.")):
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            rows |= {name.replace("attn.qkv", f"attention.{part}_proj"): grad for part, grad in zip("qkv", parameter.grad.chunk(3), strict=True)}
        else:
            rows[name] = parameter.grad
    return rows


def weight(output):
    i = torch.arange(output.numel(), dtype=torch.float64)
    return (torch.cos(1 + i) / output.numel() ** 0.5).float().view_as(output)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_of_every_parameter(name, monkeypatch):
    case, close = read(name)
    model, expected = build(case), case["outputs"]["masked"]
    outputs = outputs_of(model, case, [1.0, 1.0], monkeypatch)
    sum((value * weight(value)).sum() for output in outputs for value in output.values()).backward()
    gradients = official_gradients(model)
    for key, norm in expected["grad_norms"].items():
        torch.testing.assert_close(gradients[key].norm(), norm, **close)
    for key, grad in expected["grad"].items():
        torch.testing.assert_close(gradients[key], grad, **close)
    rest = gradients.keys() - expected["grad_norms"].keys()
    assert all(re.search(r"k_proj\.bias", key) and not gradients[key].any() for key in rest), rest      # DINOv3's keys have no bias
    assert (len(rest) > 0) == (name == "dinov3")


def test_published_dinov2_is_resampled_as_timm_does():
    case, close = read("dinov2_resample")
    result = resample_dinov2(case["state_dict"], (4, 6))
    result["reg_token"] = result.pop("register_tokens")
    for name, tensor in case["outputs"]["state_dict"].items():
        torch.testing.assert_close(result[name], tensor, **close)


def bilinear(position, grid, antialias, size):
    position = position.unflatten(1, grid).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(position, size, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("mistake", ["bilinear", "no antialias", "class position lost", "kernel resized like a picture"])
def test_a_mistake_in_resampling_is_noticed(mistake, monkeypatch):
    case, close = read("dinov2_resample")
    original = eomt_weights.resize_positions
    if mistake == "bilinear":
        monkeypatch.setattr(eomt_weights, "resize_positions", bilinear)
    elif mistake == "no antialias":
        monkeypatch.setattr(eomt_weights, "resize_positions", lambda position, grid, antialias, size: original(position, grid, False, size=size))
    result = resample_dinov2(case["state_dict"], (4, 6))
    if mistake == "class position lost":
        result["cls_token"] = case["state_dict"]["cls_token"]
    elif mistake == "kernel resized like a picture":
        result["patch_embed.proj.weight"] = torch.nn.functional.interpolate(case["state_dict"]["patch_embed.proj.weight"], (16, 16),
                                                                            mode="bicubic", antialias=True)
    names = [name for name, tensor in case["outputs"]["state_dict"].items() if name in result and not
             torch.allclose(result[name], tensor, **close)]
    assert names == [{"class position lost": "cls_token", "kernel resized like a picture": "patch_embed.proj.weight"}.get(mistake, "pos_embed")]


def test_differences_are_added_to_the_backbone(tmp_path):
    case, close = read("delta")
    c = case["config"]
    model = EoMT(VisionTransformer(vit_config(c)), c["num_classes"], c["queries"], c["blocks"])
    dummies = {"q.weight": torch.zeros(1)}
    base, _ = to_eomt_names({**case["state_dict"]["backbone"], **dummies}, "base")
    model.load_state_dict({key: tensor for key, tensor in base.items() if key.startswith("encoder.")}, strict=False)
    torch.save(case["state_dict"]["delta"], tmp_path / "delta.bin")
    load_network(model, tmp_path / "delta.bin", {"file": "base", "normalization": "imagenet"})
    expected, _ = to_eomt_names(case["outputs"]["state_dict"], "expected")
    assert len(expected) == len(model.state_dict()) - 1                 # the rotation's periods are no part of the files
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, **close)


def test_differences_are_recognised_with_and_without_the_backbone():
    case, _ = read("delta")
    delta, whole = (to_eomt_names(part, "file")[0] for part in (case["state_dict"]["delta"], case["outputs"]["state_dict"]))
    base, _ = to_eomt_names({**case["state_dict"]["backbone"], "q.weight": torch.zeros(1)}, "base")
    assert holds_differences(delta) and holds_differences(delta, base)
    assert not holds_differences(whole) and not holds_differences(whole, base)
    for name in BACKBONES:
        assert not holds_differences(to_eomt_names(read(name)[0]["state_dict"], name)[0])


@pytest.mark.parametrize("name", SCHEMA)
def test_names_and_shapes_of_the_released_networks(name):
    case = SCHEMA[name]
    c = case["config"]
    size = {384: "s", 768: "b", 1024: "l"}[c["dim"]]
    backbone = f"dinov3_vit{size}16" if c["backbone"] == "dinov3" else f"dinov2_vit{size}14_reg"
    config = eomt_config(backbone, c["image"][0])
    assert config._replace(taps=()) == vit_config(c)._replace(taps=())
    with torch.device("meta"):
        model = EoMT(VisionTransformer(config), c["num_classes"], c["queries"], eomt.JOINT_BLOCKS[config.depth])
        state, joint_blocks = to_eomt_names({key: torch.empty(shape) for key, shape in case["keys"].items()}, name)
    assert joint_blocks == model.joint_blocks == c["blocks"]
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key != "encoder.rope_embed.periods"}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    key_biases = c["dim"] * c["depth"] if c["backbone"] == "dinov3" else 0            # zeros, which are not in the files
    assert sum(p.numel() for p in model.parameters()) - key_biases == case["parameters"]
