"""models/dinov3.py and models/dinov3_weights.py against outputs, names and sizes of the official modules."""

import json
from pathlib import Path

import pytest
import torch

from models.dinov3 import BACKBONES, VisionTransformer, ViTConfig
from models.dinov3_weights import load_vit

GOLDEN = Path(__file__).parent / "golden" / "dinov3"
SCHEMA = json.loads((GOLDEN / "key_schema.json").read_text())["models"]
DINOV3 = ("vit_mlp", "vit_swiglu", "vit_7b_like")
DINOV2 = ("dinov2_reg0", "dinov2_reg4", "dinov2_reg4_swiglu")
LAYOUTS = ("state_dict", "state_dict_hf", "state_dict_hf_model_layer", "state_dict_hf_model_prefix")


def read(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def config_of(c):
    hidden = c.get("ffn_hidden", 64 if c["ffn"] == "swiglu_fused" else 4 * c["dim"])
    common = ViTConfig(c["dim"], c["depth"], c["heads"], c["ffn"], hidden, c["taps"], c["patch_size"], norm_eps=c["norm_eps"])
    if "registers" not in c:
        return common._replace(num_registers=c["storage_tokens"], qkv_bias=c["qkv_bias"], rope_base=c["rope_base"])
    return common._replace(num_registers=c["registers"], pos_grid=c["pretrain_image_size"] // c["patch_size"],
                           pos_offset=c["pos_embed_offset"], pos_antialias=c["pos_embed_antialias"])


def load(case, layout="state_dict"):
    return load_vit(config_of(case["config"]), {key: value.clone() for key, value in case[layout].items()}, f"{case['name']}.pt")


@torch.no_grad()
def check(vit, case, image, expected):
    close = {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}
    torch.testing.assert_close(vit(image), expected["final"], **close)
    taps = case["config"]["taps"]
    flat, maps = (vit.get_intermediate_layers(image, taps, reshape=reshape) for reshape in (False, True))
    for tokens, feature, tap in zip(flat, maps, expected["taps"], strict=True):
        torch.testing.assert_close(tokens, tap["patch_tokens"], **close)
        height, width = (side // vit.patch_size for side in image.shape[-2:])
        grid = tap["patch_tokens"].reshape(len(image), height, width, -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(feature, grid, **close)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DINOV3)
def test_dinov3_in_each_layout(name, layout):
    case = read(name)
    vit, message = load(case, layout)
    count = len(vit.state_dict())
    kind = "DINOv3" if layout == "state_dict" else "Hugging Face"
    assert message == f"matched {count}/{count} backbone tensors from {name}.pt (layout: {kind})"
    check(vit, case, case["inputs"]["image"], case["outputs"])
    check(vit.train(), case, case["inputs"]["image"], case["outputs"])


def test_rope_periods_of_the_file_are_used():
    case = read("vit_mlp")
    case["state_dict"]["rope_embed.periods"] = case["inputs"]["rope_periods_bf16"]
    expected = case["outputs"]["final_with_bf16_periods"]
    vit, _ = load(case)
    with torch.no_grad():
        torch.testing.assert_close(vit(case["inputs"]["image"]), expected, atol=1e-4, rtol=1e-4)
        vit.rope_embed.periods.copy_(read("vit_mlp")["state_dict"]["rope_embed.periods"])     # no stale angles
        check(vit, case, case["inputs"]["image"], case["outputs"])


@pytest.mark.parametrize("name", DINOV2)
def test_dinov2(name):
    case = read(name)
    vit, message = load(case)
    assert "layout: DINOv2" in message and "not used" not in message
    for size in ("image", "native"):
        check(vit, case, case["inputs"][size], case["outputs"][size])


@pytest.mark.parametrize("name", [name for name in SCHEMA if name.startswith("dinov") and "head" not in name])
def test_names_shapes_and_sizes_of_the_released_models(name):
    with torch.device("meta"):
        vit = VisionTransformer(BACKBONES[name.removesuffix("_sat493m")])
    expected = {key: tuple(shape) for key, shape in SCHEMA[name]["keys"].items() if "bias_mask" not in key and "local_cls_norm" not in key}
    assert {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()} == expected
    local = 2 * vit.embed_dim if "local_cls_norm.weight" in SCHEMA[name]["keys"] else 0
    assert sum(p.numel() for p in vit.parameters()) + local == SCHEMA[name]["parameters"]
    adapter = SCHEMA.get(f"adapter_{name}")
    assert adapter is None or list(vit.config.taps) == adapter["taps"]


def test_parameter_totals_of_the_paper():
    """Simeoni et al. 2025, table 14: 21M, 29M, 86M, 0.3B, 0.84B, 6.7B (counted exactly on the official models)."""
    totals = {"vits16": 21_601_152, "vits16plus": 28_697_472, "vitb16": 85_669_632, "vitl16": 303_154_176, "vitl16plus": 403_915_776,
              "vith16plus": 840_633_600, "vit7b16": 6_716_043_264 - 2 * 4096}                 # less local_cls_norm
    for name, total in totals.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in VisionTransformer(BACKBONES[f"dinov3_{name}"]).parameters()) == total


def test_every_backbone_has_a_schema():
    assert set(BACKBONES) <= set(SCHEMA)
