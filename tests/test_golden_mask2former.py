"""models/mask2former.py against outputs and names of the official head."""

import json
from pathlib import Path

import torch

from models.dinov3_adapter import DINOv3_Adapter
from models.mask2former import Mask2FormerHead, Mask2FormerSegmenter, semantic_scores

GOLDEN = Path(__file__).parent / "golden" / "dinov3"
SCHEMA = json.loads((GOLDEN / "key_schema.json").read_text())["models"]


def read(name):
    case = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    return case, {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}


def test_head_with_blocked_rows():
    case, close = read("m2f_head")
    c, expected = case["config"], case["outputs"]
    head = Mask2FormerHead(c["in_channels"], c["num_classes"], c["hidden_dim"], c["queries"], c["heads"], c["encoder_ffn"],
                           c["encoder_layers"], c["decoder_layers"], c["points"])
    head.load_state_dict(case["state_dict"])
    with torch.no_grad():
        mask_features, maps = head.pixel_decoder(case["inputs"]["features"])
        outputs = head(case["inputs"]["features"])
        final = head(case["inputs"]["features"], aux=False)
    torch.testing.assert_close(mask_features, expected["pixel_decoder"]["mask_features"], **close)
    torch.testing.assert_close(maps, list(expected["pixel_decoder"]["multi_scale"]), **close)
    for key in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(outputs[key], expected[key], **close)
        torch.testing.assert_close(final[key], expected[key], **close)
        torch.testing.assert_close([o[key] for o in outputs["aux_outputs"]], [o[key] for o in expected["aux_outputs"]], **close)
    assert "aux_outputs" not in final


def test_queries_to_a_semantic_map():
    case, close = read("semantic_inference")
    inputs, expected = case["inputs"], case["outputs"]
    scores = semantic_scores(inputs["pred_logits"], inputs["pred_masks"], expected["scores"].shape[2:])
    torch.testing.assert_close(scores, expected["scores"], **close)
    assert torch.equal(scores.argmax(1), expected["label_map"].long())


def test_names_and_shapes_of_the_released_head():
    expected = SCHEMA["dinov3_vit7b16_ade20k_m2f_head"]
    with torch.device("meta"):
        model = Mask2FormerSegmenter(DINOv3_Adapter(4096), Mask2FormerHead(4096, expected["num_classes"], expected["hidden_dim"]))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
