"""Matching and mask losses against transformers' Mask2FormerLoss, at recorded points: costs, pairs, losses, gradients."""

from pathlib import Path

import pytest
import torch

from utils.losses import IGNORE_INDEX
from utils.mask_losses import SetCriterion
from utils.matcher import hungarian, matching_cost, sample_label, sample_points

GOLDEN = Path(__file__).parent / "golden" / "dinov3"
CASES = ("m2f_loss", "m2f_loss_all_empty")


def read(name):
    """-> golden dict, criterion, outputs with gradients, label (B, H, W); an image without a label map is all ignored."""
    golden = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    config = golden["config"]
    criterion = SetCriterion(**{key: config[key] for key in ("num_classes", "oversample_ratio", "importance_ratio", "class_weight",
                                                             "mask_weight", "dice_weight", "no_object_weight")}, num_points=config["points"])
    predictions = [{key: value.clone().requires_grad_() for key, value in p.items()} for p in golden["inputs"]["predictions"]]
    maps = [t["label_map"] if t["label_map"] is not None else torch.full(config["label_size"], 255, dtype=torch.uint8)
            for t in golden["inputs"]["targets"]]
    label = torch.stack(maps).long()
    label[label == config["ignore_value"]] = IGNORE_INDEX
    return golden, criterion, {**predictions[0], "aux_outputs": predictions[1:]}, label


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(name):
    golden, criterion, outputs, label = read(name)
    expected, tolerance = golden["outputs"], golden["tolerance"]
    terms = criterion(outputs, label, golden["inputs"]["points"])
    torch.testing.assert_close(terms["total"], expected["total"], **tolerance)
    assert len(terms) == 3 * len(expected["per_output"]) + 1
    terms["total"].backward()
    for o, (out, prediction) in enumerate(zip(expected["per_output"], [outputs, *outputs["aux_outputs"]], strict=True)):
        for term in ("class", "mask", "dice"):
            torch.testing.assert_close(terms[f"{term}_{o}"], out[f"loss_{term}"], **tolerance)
        for key in ("pred_logits", "pred_masks"):
            torch.testing.assert_close(prediction[key].grad, out[f"grad_{key}"], **tolerance)
    assert int(criterion.label_weights(label, golden["config"]["queries"])[0]) == (expected["num_masks"] if name == "m2f_loss" else 0)


def test_costs_and_pairs():
    golden, criterion, outputs, label = read("m2f_loss")
    points, tolerance = golden["inputs"]["points"], golden["tolerance"]
    predictions = [outputs, *outputs["aux_outputs"]]
    rows = criterion.match(predictions, label, criterion.present(label), points)
    differ = set()
    for o, (prediction, out) in enumerate(zip(predictions, golden["outputs"]["per_output"], strict=True)):
        pairs = []
        for b, target in enumerate(golden["inputs"]["targets"]):
            at, classes = points[o]["matcher"][b][None], target["classes"][None]
            truth = sample_label(label[b:b + 1], at, classes)
            torch.testing.assert_close(truth[0], sample_points(target["masks"][:, None].float(), at.expand(len(target["masks"]), -1, -1))[:, 0])
            sampled = sample_points(prediction["pred_masks"][b:b + 1].detach(), at)
            for name, weights in (("cost", (2.0, 5.0, 5.0)), ("cost_mask", (0.0, 1.0, 0.0)), ("cost_dice", (0.0, 0.0, 1.0))):
                cost = matching_cost(prediction["pred_logits"][b:b + 1].detach(), sampled, classes, truth, weights)[0]
                torch.testing.assert_close(cost, out[name][b], **tolerance)
            query, matched = hungarian(out["cost"][b])
            assert query.tolist() == out["assignment"][b]["query"].tolist()
            assert matched.tolist() == out["assignment"][b]["target"].tolist()
            pairs += [(b, q, int(target["classes"][t])) for q, t in zip(query, matched, strict=True)]
        assert rows[:, o].T.tolist() == [list(pair) for pair in pairs]
        differ.add(tuple(pairs))
    assert len(differ) > 1                                   # one matching for all outputs would not do


def test_points_of_the_losses():
    golden, criterion, outputs, label = read("m2f_loss")
    for o, prediction in enumerate([outputs, *outputs["aux_outputs"]]):
        out, recorded = golden["outputs"]["per_output"][o], golden["inputs"]["points"][o]
        image = torch.tensor([b for b, pairs in enumerate(out["assignment"]) for _ in pairs["query"]])
        masks = prediction["pred_masks"][image, torch.cat([pairs["query"] for pairs in out["assignment"]])][:, None]
        points = criterion._loss_points(masks, label, image, recorded)
        assert not points.requires_grad
        for ours, theirs in zip(points.tolist(), out["selected_points"].tolist(), strict=True):
            assert sorted(ours) == sorted(theirs)
