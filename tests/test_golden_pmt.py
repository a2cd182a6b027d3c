"""models/pmt.py, models/query_masks.py and what train_pmt_head.py takes from utils/ against outputs of the official decoder on tiny random
weights, and mistakes that these files notice. In decoder*.pt the outputs hold no tokens between blocks, to be smaller."""

import inspect
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import models.dinov3 as dinov3
import models.dinov3_weights as dinov3_weights
import models.mask2former as mask2former
import models.pmt as pmt
import models.query_masks as query_masks
import utils.image_inference as image_inference
import utils.mask_losses as mask_losses
import utils.schedule as schedule
from models.dinov3 import FrozenBackbone, RopePositions, ViTConfig
from models.dinov3_weights import NORMALIZATIONS
from models.pmt import PMTSegmenter

GOLDEN = Path(__file__).parent / "golden" / "pmt"
DECODERS = ("decoder", "decoder_annealed", "decoder_other_grid", "decoder_patch14")


def read(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def build(case) -> PMTSegmenter:
    """The network of a case, with the tensors that it has."""
    c = case["config"]
    ffn_dim = c["ffn_hidden"] or 4 * c["dim"]
    model = PMTSegmenter(c["dim"], c["heads"], c["patch_size"], c["num_classes"], c["queries"], ffn_dim, c["taps"], c["blocks"])
    state = case["state_dict"].get("head", case["state_dict"])
    if "norm1.weight" in state:                                            # one block alone
        state = {f"decoder.blocks.0.{name}": tensor for name, tensor in state.items()}
    found = model.load_state_dict(state, strict=False)
    assert found.unexpected_keys == []
    return model


def scalar(outputs) -> torch.Tensor:
    """What the stored gradients are of."""
    total = 0
    for output in outputs:
        w = torch.cos(1 + torch.arange(output.numel(), dtype=torch.float64)) / math.sqrt(output.numel())
        total = total + (output.flatten() * w.float()).sum()
    return total


def close(case, got, expected, what=""):
    torch.testing.assert_close(got, expected, **case["tolerance"], msg=lambda text: f"{what}: {text}")


def gradients_close(case, model, expected, prefix=""):
    named = dict(model.named_parameters())
    for name, gradient in expected.items():
        close(case, named[prefix + name].grad, gradient, name)


# -- taps --------------------------------------------------------------------------------------------------------------

def check_lateral():
    case = read("lateral")
    for mode in ("eval", "train"):
        model, expected = build(case).train(mode == "train"), case["outputs"][mode]
        normed = model.normalize_taps(case["inputs"]["taps"])
        decoder = model.decoder
        parts = zip(normed, decoder.lateral_projections, decoder.scalers, strict=True)
        lateral = [(tap + project(tap)) * scale for tap, project, scale in parts]
        fused = decoder.fuse(normed)
        close(case, normed, expected["normed"], f"{mode}: normed")
        close(case, fused, expected["sum"], f"{mode}: sum")
        close(case, lateral, expected["lateral"], f"{mode}: lateral")
    scalar([fused]).backward()
    gradients_close(case, model, expected["grad_parameters"])
    state = model.state_dict()
    close(case, {name: state[name] for name in expected["running"]}, expected["running"], "running")


# -- positions and blocks ----------------------------------------------------------------------------------------------

def check_rope():
    case = read("rope")
    for c, expected in zip(case["config"]["cases"], case["outputs"]["tables"], strict=True):
        cos, sin = RopePositions(ViTConfig(c["dim"], 1, c["heads"], "mlp", 1))(*c["grid"], 0)
        half = cos.shape[-1] // 2
        close(case, cos[:, 0, 0], expected["cos"], "cos")
        close(case, torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, 0, 0], expected["sin"], "sin")     # minus signs are in the table


def check_block():
    case = read("block")
    c, inputs = case["config"], case["inputs"]
    Q, count = c["queries"], c["grid"][0] * c["grid"][1]
    outside = inputs["mask"].clone()
    outside[:, :Q, -count:] = True
    assert outside.all()                                                     # queries' rows and patches' columns alone are masked
    for name, expected in case["outputs"].items():
        model = build(case)
        block = model.decoder.blocks[0]
        rope = model.decoder.rope(*c["grid"], Q + c["prefix_tokens"])
        x = (inputs["x"] * (0.02 if name == "small_input" else 1)).requires_grad_()
        allowed = inputs["mask"][:, :Q, -count:] if name == "masked" else None
        seen = []
        block.attention.register_forward_hook(lambda *arguments, seen=seen: seen.append(arguments[-1]))
        y = block(x, rope, allowed)
        scalar([y]).backward()
        close(case, seen[0], expected["attention"], f"{name}: attention")
        close(case, y, expected["x"], f"{name}: x")
        close(case, x.grad, expected["grad_x"], f"{name}: gradient of x")
        gradients_close(case, block, expected["grad_parameters"])


# -- masks and predictions ---------------------------------------------------------------------------------------------

def check_attention_mask():
    case = read("attention_mask")
    c, inputs = case["config"], case["inputs"]
    Q, count = c["queries"], c["grid"][0] * c["grid"][1]
    for probability, random, expected in zip(c["probs"], inputs["random"], case["outputs"]["masks"], strict=True):
        allowed = query_masks.allowed_patches(inputs["mask_logits"], tuple(c["grid"]), probability, random)
        assert torch.equal(allowed, expected[:, :Q, -count:])
        outside = expected.clone()
        outside[:, :Q, -count:] = True
        assert outside.all()


def check_predict():
    case = read("predict")
    model, expected = build(case), case["outputs"]
    x, decoder, seen = case["inputs"]["x"].clone().requires_grad_(), model.decoder, {}
    for name, module in (("normed", decoder.decoder_norm), ("mask_embedding", decoder.mask_head), ("0", decoder.upscale[0]), ("1", decoder.upscale[1])):
        module.register_forward_hook(lambda *arguments, name=name: seen.update({name: arguments[-1]}))
    outputs = decoder.predict(x, tuple(case["config"]["grid"]))
    upscaled = [seen[name].permute(0, 3, 1, 2) for name in "01"]
    close(case, [seen["normed"], seen["mask_embedding"]], [expected["normed"], expected["mask_embedding"]])
    close(case, upscaled, expected["upscaled"], "upscaled")
    close(case, [outputs["pred_masks"], outputs["pred_logits"]], [expected["mask_logits"], expected["class_logits"]], "outputs")
    scalar(outputs.values()).backward()
    gradients = dict(case["outputs"]["grad"])
    close(case, x.grad, gradients.pop("x"), "gradient of x")
    gradients_close(case, model, gradients)


# -- the whole decoder -------------------------------------------------------------------------------------------------

def run_decoder(case, name, patch):
    """-> masks and classes of all outputs, first one first, and what each block allowed."""
    c, inputs = case["config"], case["inputs"]
    model, allowed = build(case), []
    with torch.no_grad():
        model.decoder.attn_mask_probs.copy_(torch.tensor(c["probs"]))
    model.train(name == "masked")
    drawn = iter([*inputs["random"], *[torch.zeros(len(inputs["taps"][0]), c["queries"])] * c["blocks"]])
    original = pmt.allowed_patches

    def given(*arguments):
        allowed.append(original(*arguments, next(drawn)))
        return allowed[-1]

    patch.setattr(pmt, "allowed_patches", given)
    image = torch.empty(len(inputs["taps"][0]), 3, *(side * c["patch_size"] for side in inputs["grid"]))
    outputs = model(image, inputs["taps"], aux=name != "unmasked")
    patch.setattr(pmt, "allowed_patches", original)
    outputs = [*outputs.get("aux_outputs", []), outputs]
    return model, [o["pred_masks"] for o in outputs], [o["pred_logits"] for o in outputs], allowed


def check_decoder(name, patch):
    case = read(name)
    for run in case["config"]["runs"]:
        if (expected := case["outputs"].get(run)) is None:
            continue
        model, masks, classes, allowed = run_decoder(case, run, patch)
        assert len(allowed) == len(expected.get("attention_masks", []))
        assert all(torch.equal(*pair) for pair in zip(allowed, expected.get("attention_masks", []), strict=True)), "attention masks"
        close(case, masks, expected["mask_logits"], f"{run}: masks")
        close(case, classes, expected["class_logits"], f"{run}: classes")
        if "grad_parameters" in expected:
            scalar([*masks, *classes]).backward()
            gradients_close(case, model, expected["grad_parameters"])
            assert all(p.grad is not None for p in model.parameters())


def check_end_to_end():
    case = read("end_to_end")
    c, expected = case["config"], case["outputs"]
    config = ViTConfig(c["dim"], c["depth"], c["heads"], "mlp", c["vit_ffn_hidden"], c["tap_blocks"])
    vit, _ = dinov3_weights.load_vit(config, case["state_dict"]["vit"], "golden")
    backbone = FrozenBackbone(vit, c["tap_blocks"], *NORMALIZATIONS["imagenet"], {})
    backbone.prefix = True
    image = backbone.normalize(case["inputs"]["image"])
    taps = backbone(image)
    close(case, taps, expected["taps"], "taps")
    model = build({**case, "config": {**c, "patch_size": 16}}).eval()
    with torch.no_grad():
        outputs = model(image, taps)
    outputs = [*outputs["aux_outputs"], outputs]
    close(case, [o["pred_masks"] for o in outputs], expected["mask_logits"], "masks")
    close(case, [o["pred_logits"] for o in outputs], expected["class_logits"], "classes")


# -- loss, schedule, scores --------------------------------------------------------------------------------------------

def check_loss():
    case = read("loss")
    c, expected, random = case["config"], case["outputs"], iter(case["inputs"]["random"])
    criterion = mask_losses.SetCriterion(c["num_classes"], c["num_points"], divide_by_pairs=True)
    predictions = [{"pred_logits": p["class_logits"].clone().requires_grad_(), "pred_masks": p["mask_logits"].clone().requires_grad_()}
                   for p in case["inputs"]["predictions"]]
    points = []
    for _ in predictions:
        matcher = [next(random)[0] for _ in range(len(case["inputs"]["label"]))]
        points.append({"matcher": matcher, "oversampled": next(random), "random": next(random)})
    label = case["inputs"]["label"].long()
    outputs = {**predictions[0], "aux_outputs": predictions[1:]}
    terms = criterion(outputs, label, points)
    terms["total"].backward()
    close(case, terms["total"], expected["total"], "total")
    for o, (prediction, own) in enumerate(zip(predictions, expected["per_output"], strict=True)):
        close(case, [terms[f"{name}_{o}"] for name in ("class", "mask", "dice")], [own[name] for name in ("cross_entropy", "mask", "dice")])
        close(case, prediction["pred_masks"].grad, own["grad_mask_logits"], "gradient of the masks")
        close(case, prediction["pred_logits"].grad, own["grad_class_logits"], "gradient of the classes")


def check_schedule():
    case = read("schedule")
    for name, steps in case["inputs"]["steps"].items():
        c, expected = case["config"][name], case["outputs"][name]
        probabilities = [[query_masks.mask_probability(int(step), *share) for share in zip(c["start"], c["end"], strict=True)] for step in steps]
        close(case, torch.tensor(probabilities), expected["probabilities"], name)
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], c["lr"])
        scheduler = schedule.build_scheduler(optimizer, "cosine", c["total"], c["warmup"], c["min_lr"], start_factor=0, reach_min=False)
        rates = torch.tensor([c["lr"] * scheduler.lr_lambdas[0](int(step)) for step in steps], dtype=torch.float64)
        close(case, rates, expected["lr"], f"{name}: rate")


def check_semantic_inference():
    """The crops are equal to the bit where Pillow makes the picture small, as upstream does; ours is PyTorch's filter, one grey value off."""
    case = read("semantic_inference")
    inputs, expected, window = case["inputs"], case["outputs"], case["config"]["window"][0]
    scores = mask2former.semantic_scores(inputs["class_logits"], inputs["mask_logits"], (window, window))
    close(case, scores, expected["crop_scores"], "scores of the windows")
    seen = []

    def score(crops):
        seen.extend(crops)
        return scores[len(seen) - len(crops):len(seen)]

    for image, size, final in zip(inputs["images"], expected["resized_size"].tolist(), expected["scores"], strict=True):
        resized = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], Image.Resampling.BILINEAR))
        ours = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True).round_()[0]
        blocks = image_inference.slide(score, torch.from_numpy(resized).permute(2, 0, 1).float(), window, None, batch_size=2)
        whole = torch.cat([block.clone() for block in blocks], 1)
        assert (ours - torch.from_numpy(resized).permute(2, 0, 1)).abs().max() <= 1
        close(case, image_inference.resize_rows(whole, tuple(image.shape[1:]), 0, image.shape[1]), final, "scores at the picture's size")
    assert torch.equal(torch.stack(seen).byte(), expected["crops"])


CHECKS = {"lateral": check_lateral, "rope": check_rope, "block": check_block, "attention_mask": check_attention_mask,
          "predict": check_predict, "end_to_end": check_end_to_end, "loss": check_loss, "schedule": check_schedule,
          "semantic_inference": check_semantic_inference}


@pytest.mark.parametrize("name", CHECKS)
def test_part(name):
    CHECKS[name]()


@pytest.mark.parametrize("name", DECODERS)
def test_whole_decoder(name, monkeypatch):
    check_decoder(name, monkeypatch)


def test_names_and_shapes_of_the_released_decoders():
    models = json.loads((GOLDEN / "key_schema.json").read_text())["models"]
    for name, expected in models.items():
        c = expected["config"]
        with torch.device("meta"):
            model = PMTSegmenter(c["dim"], c["heads"], c["patch_size"], c["num_classes"], c["queries"])
        keys = expected.get("keys", expected)
        while "same as" in keys:
            keys = models[keys["same as"]]["keys"]
        assert {f"network.{key}": list(value.shape) for key, value in model.state_dict().items()} == keys, name
        assert len(model.state_dict()) == expected["entries"] and pmt.default_taps(c["depth"]) == tuple(c["taps"])
        assert sum(p.numel() for p in model.parameters()) == expected["parameters"]


# -- mistakes that these files notice ----------------------------------------------------------------------------------

def changed_source(module, name, *changes):
    """The function or class `name` of a module, from its source with the changes (old, new) made."""
    source = textwrap.dedent(inspect.getsource(getattr(module, name)))
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    space = dict(vars(module))
    exec(source, space)                                                       # noqa: S102
    return space[name]


# what is wrong, the check that notices it, module, what is changed in it, (old, new) ...
MISTAKES = [
    ("batch norm over patches alone", "decoder", pmt, "PMTSegmenter", ("norm(tap.flatten(0, 1)).view_as(tap)", "torch.cat([tap[:, :5], norm(tap[:, 5:].flatten(0, 1)).view_as(tap[:, 5:])], 1)")),
    ("one batch norm for all taps", "lateral", pmt, "PMTSegmenter", ("zip(self.bn, taps", "zip([self.bn[0]] * len(taps), taps")),
    ("batch statistics in evaluation", "lateral", pmt, "PMTSegmenter", ("norm(tap.flatten(0, 1))", "norm.train()(tap.flatten(0, 1))")),
    ("a projection without its residual", "lateral", pmt, "Decoder", ("(tap + project(tap)) * scale", "project(tap) * scale")),
    ("the scale on the projection alone", "lateral", pmt, "Decoder", ("(tap + project(tap)) * scale", "tap + project(tap) * scale")),
    ("the mean of the taps", "lateral", pmt, "Decoder", ("return sum(", "return 1 / 4 * sum(")),
    ("queries after class token and registers", "decoder", pmt, "Decoder", ("torch.cat([self.q.weight.to(x.dtype).expand(len(x), -1, -1), x], 1)", "torch.cat([x[:, :5], self.q.weight.expand(len(x), -1, -1), x[:, 5:]], 1)")),
    ("no norm before the predictions", "predict", pmt, "Decoder", ("x = self.decoder_norm(x)", "x = x + 0 * self.decoder_norm(x)")),
    ("the masks of the first prediction for all blocks", "decoder", pmt, "Decoder", ('outputs[-1]["pred_masks"].detach()', 'outputs[0]["pred_masks"].detach()')),
    ("normed tokens as the stream", "decoder", pmt, "Decoder", ("x = self._maybe_checkpoint(block, x, rope, allowed)", "x = self._maybe_checkpoint(block, self.decoder_norm(x), rope, allowed)")),
    ("a block without annealing", "decoder_annealed", pmt, "Decoder", ("grid, probability)", "grid, torch.ones(()))")),
    ("rotated values", "block", pmt, "Attention", ("v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))", "v = rotate(torch.stack([self.v_proj(x)] * 2, 2).unflatten(-1, (self.num_heads, -1)), *rope)[:, :, 0]")),
    ("queries alone rotated", "block", pmt, "Attention", ("q, k = rotate(qk, *rope).unbind(2)", "q, k = rotate(qk, *rope)[:, :, 0], qk[:, :, 1]")),
    ("q and k exchanged", "block", pmt, "Attention", ("[self.q_proj(x), self.k_proj(x)]", "[self.k_proj(x), self.q_proj(x)]")),
    ("norms after the branches", "block", pmt, "Block", ("self.attention(self.norm1(x), rope, allowed)", "self.norm1(self.attention(x, rope, allowed))")),
    ("eps 1e-6 in the blocks", "block", pmt, "Block", ("1e-5", "1e-6")),
    ("no LayerScale", "block", pmt, "LayerScale", ("torch.addcmul(x, branch, self.lambda1)", "x + branch + 0 * self.lambda1")),
    ("base 10,000", "rope", dinov3, "rope_periods", ("config.rope_base", "10000")),
    ("x before y", "rope", dinov3, "RopePositions", ("for n in (height, width))", "for n in (height, width))\n        y, x = x[:1].expand(height), y[:1].expand(width)")),
    ("a reversed attention mask", "block", query_masks, "attend", ("F.pad(allowed,", "F.pad(~allowed,")),
    ("class token and registers hidden from queries", "block", query_masks, "attend", (".unsqueeze(1)", "[:, None]\n    mask[..., 6:11] = False")),
    ("queries blind to each other", "block", query_masks, "attend", (".unsqueeze(1)", "[:, None]\n    mask[..., :6] = torch.eye(6, dtype=torch.bool)")),
    ("scores over the root of the whole width", "block", query_masks, "attend", ("    if allowed is None", "    q = q / q.shape[1] ** 0.5\n    if allowed is None")),
    ("a sigmoid before the comparison with 0", "attention_mask", query_masks, "allowed_patches", ("mask_logits.float(), grid", "mask_logits.sigmoid(), grid")),
    ("an antialiased resize", "attention_mask", query_masks, "allowed_patches", ("align_corners=False", "antialias=True")),
    ("corners aligned", "attention_mask", query_masks, "allowed_patches", ("align_corners=False", "align_corners=True")),
    ("blocked rows opened", "attention_mask", query_masks, "allowed_patches", ("(small > 0).flatten(2) |", "(small > 0).flatten(2) | ~(small > 0).flatten(2).any(-1, keepdim=True) |")),
    ("annealing reversed", "attention_mask", query_masks, "allowed_patches", ("random > probability", "random <= probability")),
    ("one draw for the batch", "attention_mask", query_masks, "allowed_patches", ("(random > probability)", "(random[:1] > probability)")),
    ("kernels transposed", "predict", query_masks, "UpscaleStep", ("permute(2, 3, 1, 0)", "permute(3, 2, 1, 0)")),
    ("the norm before the convolution", "predict", query_masks, "UpscaleStep", ("self.norm(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))", "self.conv2(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)")),
    ("eps 1e-5 in the upscaling", "predict", query_masks, "UpscaleStep", ("1e-6", "1e-5")),
    ("two upscaling steps at patches of 14", "decoder_patch14", query_masks, "upscale_steps", ("patch_size.bit_length() - 3", "2")),
    ("linear annealing", "schedule", query_masks, "mask_probability", ("** power", "** 1")),
    ("annealing one step late", "schedule", query_masks, "mask_probability", ("step - start", "step - 1 - start")),
    ("a cosine that ends in the last step", "schedule", schedule, "build_scheduler", ("span - reach_min", "span - 1")),
    ("divided by the targets", "loss", mask_losses, "SetCriterion", ("matched if self.divide_by_pairs else count", "count")),
    ("'no object' weighs 1", "loss", mask_losses, "SetCriterion", ("no_object_weight: float = 0.1", "no_object_weight: float = 1.0")),
    ("matched once", "loss", mask_losses, "SetCriterion", ("(image[o], query[o], label_id[o])", "(image[0], query[0], label_id[0])")),
    ("'no object' dropped before the softmax", "semantic_inference", mask2former, "semantic_scores", (".softmax(-1)[..., :-1]", "[..., :-1].softmax(-1)")),
    ("masks resized after the sigmoid", "semantic_inference", mask2former, "semantic_scores", ("pred_masks.float()", "pred_masks.sigmoid()"), (".sigmoid_()", "")),
    ("starts rounded", "semantic_inference", image_inference, "window_starts", ("j * (length - window) // gaps", "round(j * (length - window) / gaps)")),
    ("the last window wins", "semantic_inference", image_inference, "_slide", ("x:x + wide] += one", "x:x + wide] = one"), ("x:x + wide] += 1", "x:x + wide] = 1")),
    ("one block late", "end_to_end", dinov3, "VisionTransformer", ("if index in wanted:", "if index - 1 in wanted or index == 3:"), ("kept[index] = x", "kept[index - 1 if index < 3 else 3] = x")),
    ("taps without the final norm", "end_to_end", dinov3, "VisionTransformer", ("outputs = [self.norm(x) for x", "outputs = [x for x")),
    ("an image that is not normalised", "end_to_end", dinov3, "FrozenBackbone", (".sub_(255 * mean).div_(255 * std)", ".div_(255)")),
]


@pytest.mark.parametrize("what, check, module, name, changes", [(*mistake[:4], mistake[4:]) for mistake in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_planted_mistake_is_noticed(what, check, module, name, changes, monkeypatch):
    original, wrong = getattr(module, name), changed_source(module, name, *changes)
    for place in (module, pmt, dinov3_weights, sys.modules[__name__]):                        # wherever it is known by its name
        if getattr(place, name, None) is original:
            monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError):
        check_decoder(check, monkeypatch) if check in DECODERS else CHECKS[check]()
