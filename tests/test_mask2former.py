"""models/mask2former.py: masked attention, predictions, scores, gradients. Parity: test_golden_mask2former.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.dinov3_adapter import DINOv3_Adapter
from models.mask2former import (
    Attention,
    Mask2FormerHead,
    Mask2FormerSegmenter,
    TransformerDecoder,
    semantic_scores,
)


def make_head(seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"hidden_dim": 32, "num_queries": 6, "num_heads": 4, "ffn_dim": 48, "encoder_layers": 2} | kwargs
    return Mask2FormerHead(8, 5, **settings)


def make_features(height=64, width=96, batch=2):
    return {str(i + 1): torch.randn(batch, 8, height // s, width // s) for i, s in enumerate((4, 8, 16, 32))}


@pytest.mark.parametrize("height, width", [(64, 96), (96, 32)])
def test_shapes_and_number_of_outputs(height, width):
    outputs = make_head()(make_features(height, width))
    assert sorted(outputs) == ["aux_outputs", "pred_logits", "pred_masks"] and len(outputs["aux_outputs"]) == 9
    for output in (outputs, *outputs["aux_outputs"]):
        assert output["pred_logits"].shape == (2, 6, 6) and output["pred_masks"].shape == (2, 6, height // 4, width // 4)


def test_gradient_reaches_every_parameter():
    head = make_head()
    for name, parameter in head.named_parameters():        # they start at 0, which lets nothing through to the queries
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=0.1)
    outputs = head(make_features())
    loss = sum((o[key] * torch.randn_like(o[key])).sum() for o in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_masks"))
    loss.backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in head.parameters())


@torch.no_grad()
def test_permuted_queries_permute_the_outputs():
    head, features, order = make_head(), make_features(), torch.tensor([3, 0, 5, 1, 4, 2])
    before = head(features)
    for table in (head.predictor.query_feat, head.predictor.query_embed):
        table.weight.copy_(table.weight[order])
    after = head(features)
    for key in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(after[key], before[key][:, order], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_equals_pytorchs_with_a_mask():
    torch.manual_seed(0)
    ours, reference = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    reference.load_state_dict(ours.state_dict())           # the same names
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    allowed = torch.rand(2, 5, 7) < 0.5
    allowed[..., 0] = True
    expected = reference(query, key, value, attn_mask=~allowed.repeat_interleave(4, 0), need_weights=False)[0]
    torch.testing.assert_close(ours(query, key, value, allowed), expected)
    torch.testing.assert_close(ours(query, key, value), reference(query, key, value, need_weights=False)[0])


@torch.no_grad()
def test_one_pixel_mask_sees_only_that_cell():
    decoder = TransformerDecoder(5, 32, 6, 4, 48, 1)
    embedded = torch.zeros(1, 6, 32)
    embedded[..., 0] = 1
    features = torch.full((1, 32, 12), -1.0)
    features[0, 0, 7] = 1                                  # mask logits 1 at cell 7, -1 elsewhere
    allowed = decoder._allowed(embedded, features)
    assert allowed.shape == (1, 6, 12) and allowed.sum(-1).eq(1).all() and allowed[..., 7].all()
    attention = decoder.transformer_cross_attention_layers[0].multihead_attn
    query, key, value = torch.randn(1, 6, 32), torch.randn(1, 12, 32), torch.randn(1, 12, 32)
    expected = attention.out_proj(F.linear(value[:, 7], attention.in_proj_weight[64:], attention.in_proj_bias[64:]))
    torch.testing.assert_close(attention(query, key, value, allowed), expected[:, None].expand(1, 6, 32))


@torch.no_grad()
def test_fully_blocked_queries_see_everything():
    features = torch.ones(1, 32, 12)
    embedded = torch.stack([torch.full((32,), -100.0), torch.full((32,), 0.0)])[None]       # probability 0 and one half
    assert TransformerDecoder._allowed(embedded, features).all()
    head, inputs = make_head(), make_features()
    head.pixel_decoder.mask_feature.weight.zero_()
    head.pixel_decoder.mask_feature.bias.fill_(-1.0)
    head.predictor.mask_embed.layers[2].weight.zero_()
    head.predictor.mask_embed.layers[2].bias.fill_(100 / 32)                                # every mask logit is -100
    outputs = head(inputs)
    torch.testing.assert_close(outputs["pred_masks"], torch.full((2, 6, 16, 24), -100.0))
    assert outputs["pred_logits"].isfinite().all()


def test_masks_of_each_step_block_the_next_one(monkeypatch):
    """The mask of attention i is prediction i resized to level i mod 3 (coarse to fine), as if resized from full size."""
    head, seen, original = make_head(), [], Attention.forward

    def record(self, query, key, value, allowed=None):
        if allowed is not None:
            seen.append(allowed)
        return original(self, query, key, value, allowed)

    monkeypatch.setattr(Attention, "forward", record)
    outputs = head(make_features())
    assert [tuple(a.shape) for a in seen] == [(2, 6, 6), (2, 6, 24), (2, 6, 96)] * 3
    agree = []
    for i, (allowed, output) in enumerate(zip(seen, outputs["aux_outputs"], strict=True)):
        size = [(2, 3), (4, 6), (8, 12)][i % 3]
        logits = F.interpolate(output["pred_masks"], size=size, mode="bilinear", align_corners=False)
        expected = (logits.sigmoid() >= 0.5).flatten(2)
        expected |= ~expected.any(-1, keepdim=True)
        agree.append((allowed == expected).float().mean())
        assert not allowed.requires_grad
    assert min(agree) > 0.99 and any(not a.all() for a in seen)


def test_pixel_decoder_is_float32_under_autocast():
    head, features = make_head(), make_features()
    plain, _ = head.pixel_decoder(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, maps = head.pixel_decoder(features)
        outputs = head({name: x.bfloat16() for name, x in features.items()})
    assert torch.equal(mixed, plain) and all(m.dtype == torch.float32 for m in maps)
    assert outputs["pred_masks"].isfinite().all() and outputs["pred_logits"].isfinite().all()


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    features, results = make_features(), []
    for checkpointing in (False, True):
        head = make_head(gradient_checkpointing=checkpointing)
        outputs = head(features)
        (outputs["pred_masks"].square().mean() + outputs["pred_logits"].square().mean()).backward()
        results.append((outputs["pred_masks"], {name: p.grad for name, p in head.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("hidden_dim, num_heads", [(48, 16), (96, 64)])
def test_width_must_fit_the_norms_and_heads(hidden_dim, num_heads):
    with pytest.raises(ValueError, match=f"multiple of 32 .* the {num_heads} heads, got {hidden_dim}"):
        make_head(hidden_dim=hidden_dim, num_heads=num_heads)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    """Two queries, one sure of class 1, one sure of "no object" (the last class): only the first one counts."""
    logits = torch.tensor([[[0.0, 60.0, 0.0], [0.0, 0.0, 60.0]]])
    masks = torch.tensor([[[[2.0, -2.0]], [[50.0, 50.0]]]])
    scores = semantic_scores(logits, masks, (1, 2))
    expected = torch.stack([torch.zeros(1, 2), torch.tensor([[2.0, -2.0]]).sigmoid()])[None]
    torch.testing.assert_close(scores, expected)
    assert masks[0, 0, 0, 0] == 2                          # the input is left alone
    wide = semantic_scores(logits, masks, (1, 4))[0, 1, 0]
    torch.testing.assert_close(wide, torch.tensor([2.0, 1.0, -1.0, -2.0]).sigmoid())       # logits resized, not masks


def make_model():
    torch.manual_seed(0)
    return Mask2FormerSegmenter(DINOv3_Adapter(8, conv_inplane=4, deform_num_heads=4), make_head()).eval()


@torch.no_grad()
def test_segmenter_scores_at_image_size():
    model, image, taps = make_model(), torch.randn(2, 3, 64, 96), [torch.randn(2, 8, 4, 6) for _ in range(4)]
    model.backbone = lambda image: taps
    outputs, scores = model(image, taps), model.scores(image)
    expected = semantic_scores(outputs["pred_logits"], outputs["pred_masks"], (64, 96))
    assert scores.dtype == torch.float32 and scores.shape == (2, 5, 64, 96)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.scores(image).dtype == torch.float32


def test_segmenter_holds_adapter_and_head_only():
    prefixes = {".".join(key.split(".")[:3]) for key in make_model().state_dict()}
    assert {p for p in prefixes if p.startswith("segmentation_model.1.")} == {"segmentation_model.1.pixel_decoder", "segmentation_model.1.predictor"}
    assert not any("backbone" in key for key in make_model().state_dict())
