"""models/deformable_attention.py and models/dinov3_adapter.py against outputs and names of the official modules."""

import json
from pathlib import Path

import pytest
import torch

from models.deformable_attention import MSDeformAttn
from models.dinov3 import BACKBONES, ViTConfig
from models.dinov3_adapter import DINOv3_Adapter
from models.dinov3_weights import load_vit

GOLDEN = Path(__file__).parent / "golden" / "dinov3"
SCHEMA = json.loads((GOLDEN / "key_schema.json").read_text())["models"]


def read(name):
    case = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    return case, {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}


@pytest.mark.parametrize("name", ["msdeform_1level", "msdeform_3levels"])
def test_deformable_attention_forward_and_backward(name):
    case, close = read(name)
    c, inputs, expected = case["config"], case["inputs"], case["outputs"]
    attention = MSDeformAttn(c["dim"], c["levels"], c["heads"], c["points"], c["ratio"])
    attention.load_state_dict(case["state_dict"])
    query, value = inputs["query"].requires_grad_(), inputs["value"].requires_grad_()
    shapes = [tuple(shape) for shape in inputs["spatial_shapes"].tolist()]
    output = attention(query, inputs["reference_points"], value, shapes)
    output.backward(inputs["grad_output"])
    torch.testing.assert_close(output, expected["output"], **close)
    torch.testing.assert_close(query.grad, expected["grad_query"], **close)
    torch.testing.assert_close(value.grad, expected["grad_value"], **close)
    grads = {name: parameter.grad for name, parameter in attention.named_parameters()}
    torch.testing.assert_close(grads, expected["grad_parameters"], **close)


def test_adapter_over_its_backbone():
    case, close = read("adapter")
    c, b, state = case["config"], case["config"]["backbone"], case["state_dict"]
    config = ViTConfig(b["dim"], b["depth"], b["heads"], b["ffn"], b["ffn_hidden"], c["taps"], b["patch_size"],
                       b["storage_tokens"], b["norm_eps"], b["qkv_bias"], b["rope_base"])
    prefix = "backbone."
    vit, _ = load_vit(config, {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}, "adapter.pt")
    adapter = DINOv3_Adapter(b["dim"], b["patch_size"], c["conv_inplane"], c["points"], c["deform_heads"], c["drop_path"],
                             c["cffn_ratio"], c["deform_ratio"])
    adapter.load_state_dict({key: value for key, value in state.items() if not key.startswith(prefix)})
    image = case["inputs"]["image"]
    with torch.no_grad():
        maps = adapter.eval()(image, vit.get_intermediate_layers(image, c["taps"]))
    assert list(maps) == ["1", "2", "3", "4"]
    torch.testing.assert_close(maps, case["outputs"]["maps"], **close)


@pytest.mark.parametrize("name", [name for name in SCHEMA if name.startswith("adapter_")])
def test_names_shapes_and_taps_of_every_size(name):
    config, expected = BACKBONES[name.removeprefix("adapter_")], SCHEMA[name]
    with torch.device("meta"):
        adapter = DINOv3_Adapter(config.embed_dim)
    assert {key: list(value.shape) for key, value in adapter.state_dict().items()} == expected["keys"]
    assert sum(p.numel() for p in adapter.parameters()) == expected["parameters"]
    assert list(config.taps) == expected["taps"]
