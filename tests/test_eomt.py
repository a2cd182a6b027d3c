"""models/eomt.py and models/eomt_weights.py against transformers (skipped where it is not installed), and what no golden file holds."""

import importlib.util

import pytest
import torch

from models.dinov3 import VisionTransformer, ViTConfig, rope_periods
from models.eomt import EoMT
from models.eomt_weights import to_eomt_names

IMAGE = 64
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": IMAGE, "patch_size": 16, "num_register_tokens": 4,
         "num_blocks": 2, "num_queries": 6, "num_upscale_blocks": 2, "num_labels": 7, "train_num_points": 48}
oracle = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install transformers")


def theirs(name):
    """A random network of transformers, every parameter away from its initial value."""
    import transformers
    torch.manual_seed(5)
    if name == "dinov3":
        model = transformers.EomtDinov3ForUniversalSegmentation(transformers.EomtDinov3Config(
            **SMALL, intermediate_size=48, layer_norm_eps=1e-5, pos_embed_rescale=None))
    else:
        model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**SMALL, mlp_ratio=2))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = torch.randn_like(parameter)
            positive = "norm" in key and key.endswith("weight") or "lambda1" in key
            parameter.copy_(1 + 0.2 * spread if positive else spread * parameter.numel() ** -0.25 if parameter.ndim > 1 else 0.3 * spread)
    return model.eval()


def ours(state, name):
    config = ViTConfig(32, 4, 2, "mlp", 48 if name == "dinov3" else 64)
    if name == "dinov2":
        config = config._replace(norm_eps=1e-6, pos_grid=(4, 4), pos_class=False, pos_antialias=True)
    model = EoMT(VisionTransformer(config), 7, 6, 2)
    state, joint_blocks = to_eomt_names(state, "transformers")
    if name == "dinov3":
        state.setdefault("encoder.rope_embed.periods", rope_periods(config))
    model.load_state_dict(state)
    assert joint_blocks == 2
    return model


@oracle
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["dinov3", "dinov2"])
def test_predictions_are_those_of_transformers(name, masked):
    model = theirs(name)
    model.attn_mask_probs.fill_(float(masked))
    mine = ours(model.state_dict(), name)
    image = torch.randn(2, 3, IMAGE, IMAGE)
    with torch.no_grad():
        expected = model(pixel_values=image)
        found = mine(image, [torch.ones(())] * 2 if masked else None)
    torch.testing.assert_close(found["pred_logits"], expected.class_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["pred_masks"], expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    off = mine(image, None if masked else [torch.ones(())] * 2)["pred_masks"]
    assert (off - found["pred_masks"]).abs().max() > 0.01                    # the masks matter here


def tiny(**more):
    torch.manual_seed(0)
    return EoMT(VisionTransformer(ViTConfig(32, 4, 2, "mlp", 48)), 7, 6, 2, **more)


def test_gradient_checkpointing_changes_nothing():
    image, gradients = torch.randn(2, 3, 48, 64), []
    for checkpointing in (False, True):
        model = tiny(gradient_checkpointing=checkpointing)
        outputs = model(image, [torch.tensor(0.5), None])
        sum(output["pred_masks"].square().mean() for output in (outputs, *outputs["aux_outputs"])).backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if "class_head" not in name])
    torch.testing.assert_close(*gradients)


def test_without_masks_a_network_says_the_same_each_time_and_whatever_its_mode():
    model, image = tiny(), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        first, second = model.train()(image, [None, None]), model.eval()(image, aux=False)
        half = [model(image, [torch.tensor(0.5)] * 2)["pred_masks"] for _ in range(2)]
    assert torch.equal(first["pred_masks"], second["pred_masks"]) and len(first["aux_outputs"]) == 2 and "aux_outputs" not in second
    assert not torch.equal(*half)                                       # drawn anew each time


def test_a_wrong_number_of_joint_blocks():
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"joint_blocks is {count}, must be from 1 to the ViT's 4"):
            EoMT(VisionTransformer(ViTConfig(32, 4, 2, "mlp", 48)), 7, 6, count)
