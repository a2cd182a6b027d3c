"""The loss of Mask2Former (Cheng et al. 2022): queries matched with each image's classes, class and mask losses."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.losses import IGNORE_INDEX, check_labels
from utils.matcher import hungarian, labelled_points, matching_cost, sample_label, sample_points, softplus_sum

IMAGES_AT_ONCE = {"cpu": 1}          # matched together: the points of one image fit a cache; a GPU wants more, 8


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to `masks` is known already: nothing else waits for the backward pass."""

    @staticmethod
    def forward(ctx, masks: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return upstream * ctx.saved_tensors[0], None, None


class SetCriterion(nn.Module):
    """Matching and the three losses for each supervised output of a mask classification head.

    outputs: "pred_logits" (B, Q, K + 1) with "no object" last, "pred_masks" (B, Q, h, w) logits, and "aux_outputs", a
    list of such dicts; label (B, H, W) int64 with IGNORE_INDEX. A target is one class of an image's label map. For
    each output anew, queries are matched with targets (utils/matcher.py) at num_points random points of the image. Then
    class  cross-entropy over all queries, unmatched ones are "no object" with weight no_object_weight; divided by the
           sum of the weights
    mask   binary cross-entropy, mean over points, sum over matched pairs / number of targets (at least 1); with
           divide_by_pairs, as PMT and EoMT do, / number of pairs: less where an image has more targets than queries
    dice   1 - (2 sum(p t) + 1) / (sum p + sum t + 1), likewise
    Each pair has points of its own: of oversample_ratio * num_points random ones the importance_ratio * num_points
    whose predicted logit is nearest to 0, and random ones for the rest (PointRend, Kirillov et al. 2020, section 3.2).

    Everything is computed in float32. As in the original, ignored pixels are outside every mask; deviation on request:
    ignore_in_mask_loss drops points in ignored pixels from the mask and dice losses and from the matching, and takes
    uncertain points among the labelled ones first.
    Random numbers come from the generator of label's device, in this order: for each output and image (P, 2) points of
    the matching; then for each output the candidates (R, oversample_ratio * P, 2) of all its R pairs, and the rest.
    ValueError: labels outside 0..K-1, settings out of range.
    """

    def __init__(self, num_classes: int, num_points: int = 12544, oversample_ratio: float = 3.0,
                 importance_ratio: float = 0.75, class_weight: float = 2.0, mask_weight: float = 5.0,
                 dice_weight: float = 5.0, no_object_weight: float = 0.1, ignore_in_mask_loss: bool = False,
                 divide_by_pairs: bool = False):
        super().__init__()
        if num_points < 1 or oversample_ratio < 1 or not 0 <= importance_ratio <= 1:
            raise ValueError(f"num_points {num_points}, oversample_ratio {oversample_ratio} and importance_ratio "
                             f"{importance_ratio} must be at least 1, at least 1, and from 0 to 1")
        self.num_classes = num_classes
        self.num_points = num_points
        self.no_object_weight = no_object_weight
        self.num_candidates, self.num_uncertain = int(oversample_ratio * num_points), int(importance_ratio * num_points)
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.ignore_in_mask_loss = ignore_in_mask_loss
        self.divide_by_pairs = divide_by_pairs
        element_weight = torch.ones(num_classes + 1)
        element_weight[-1] = no_object_weight
        self.register_buffer("element_weight", element_weight, persistent=False)

    def forward(self, outputs: Mapping, label: Tensor, points: Sequence[Mapping] | None = None) -> dict[str, Tensor]:
        """The loss of a whole batch: `sums` with the batch's own normalizer."""
        return self.sums(outputs, label, None, points)

    def label_weights(self, label: Tensor, num_queries: int) -> Tensor:
        """What the sums are divided by, known before the forward pass: label (B, H, W) -> float32 (2,): the number of
        targets (or pairs), and the sum of the weights of all queries' classes. Add them up over micro-batches and
        processes.
        """
        count = self.present(label).sum(1)
        matched = count.clamp_max(num_queries)             # with more targets than queries some stay without
        weight = matched + self.no_object_weight * (num_queries - matched)
        return torch.stack([(matched if self.divide_by_pairs else count).sum(), weight.sum()]).float()

    def sums(self, outputs: Mapping, label: Tensor, normalizer: Tensor | None = None,
             points: Sequence[Mapping] | None = None, present: Tensor | None = None) -> dict[str, Tensor]:
        """-> "class_o", "mask_o", "dice_o" for each output o, 0 the last one of the decoder, and the weighted "total".

        Scalars; only the total has a gradient, once: it is worked out in the forward pass, so that no point is kept.
        normalizer: label_weights of the whole batch where this is a part of it; the losses of the parts then add up.
        points: for each output {"matcher": for each image (P, 2), "oversampled": (R, ., 2), "random": (R, ., 2)}
        instead of random ones, rows in the order of images and, within, of matched queries.
        present: that of the labels, made before they went to the GPU; then all this waits for it once, for the costs of
        all outputs together.
        """
        predictions = [outputs, *outputs.get("aux_outputs", ())]
        if present is None:
            present = self.present(label)
        num_queries = outputs["pred_logits"].shape[1]
        if normalizer is None:
            normalizer = self.label_weights(label, num_queries)
        num_masks, sum_of_weights = normalizer[0].clamp_min(1), normalizer[1].clamp_min(1e-6)
        with torch.autocast(label.device.type, enabled=False):
            image, query, label_id = self.match(predictions, label, present, points)                   # (O, R) each
            terms = {}
            total = 0
            for o, prediction in enumerate(predictions):
                rows, drawn = (image[o], query[o], label_id[o]), None if points is None else points[o]
                class_loss = self._class_loss(prediction["pred_logits"], *rows) / sum_of_weights
                weighted, *parts = self._mask_losses(prediction["pred_masks"], label, *rows, drawn)
                values = (class_loss.detach(), *(part / num_masks for part in parts))
                terms.update({f"{name}_{o}": value for name, value in zip(self.weights, values, strict=True)})
                total = total + self.weights["class"] * class_loss + weighted / num_masks
            terms["total"] = total
        return terms

    @torch.no_grad()
    def match(self, predictions: Sequence[Mapping], label: Tensor, present: Tensor,
              points: Sequence[Mapping] | None = None) -> Tensor:
        """Matched rows of each output: (3, O, R) int64, R pairs of image, query and class id; images ascending."""
        present = present.cpu()
        found = [row.nonzero().flatten() for row in present]                       # class ids of each image, ascending
        width = max(len(ids) for ids in found)
        classes = torch.stack([F.pad(ids, (0, width - len(ids)), value=-1) for ids in found])             # (B, T)
        classes = classes.to(label.device, non_blocking=True)
        images_at_once = IMAGES_AT_ONCE.get(label.device.type, 8)
        costs = []
        for o, prediction in enumerate(predictions):
            drawn = torch.stack(list(points[o]["matcher"])) if points is not None else \
                torch.rand(len(label), self.num_points, 2, device=label.device)
            for part in torch.arange(len(label)).split(images_at_once):
                part = slice(int(part[0]), int(part[-1]) + 1)
                costs.append(self._cost(prediction, label, classes, drawn, part))
        costs = torch.cat(costs).cpu().numpy()                       # (O * B, Q, T): one wait for all outputs
        rows = []
        for cost, (_, b) in zip(costs, np.ndindex(len(predictions), len(found)), strict=True):
            query, target = hungarian(cost[:, :len(found[b])])
            rows.append(np.stack([np.full_like(query, b), query, found[b].numpy()[target]]))           # (3, pairs)
        rows = torch.from_numpy(np.concatenate(rows, 1)).to(label.device, non_blocking=True)
        return rows.view(3, len(predictions), -1)

    def _cost(self, prediction: Mapping, label: Tensor, classes: Tensor, points: Tensor, part: slice) -> Tensor:
        label, classes, points = label[part], classes[part], points[part]
        logits = sample_points(prediction["pred_masks"][part].detach().float(), points)                # (b, Q, P)
        labelled = labelled_points(label, points) if self.ignore_in_mask_loss else None
        return matching_cost(prediction["pred_logits"][part], logits, classes, sample_label(label, points, classes),
                             tuple(self.weights.values()), labelled)

    def present(self, label: Tensor) -> Tensor:
        """Which classes occur in each image: label (B, H, W) -> (B, K) bool, where label is."""
        check_labels(label, self.num_classes)
        ids = torch.where(label == IGNORE_INDEX, self.num_classes, label).flatten(1)
        present = torch.zeros(len(label), self.num_classes + 1, dtype=torch.bool, device=label.device)
        return present.scatter_(1, ids, True)[:, :-1]

    def _class_loss(self, pred_logits: Tensor, image: Tensor, query: Tensor, label_id: Tensor) -> Tensor:
        truth = torch.full(pred_logits.shape[:2], self.num_classes, device=pred_logits.device)
        truth[image, query] = label_id
        return F.cross_entropy(pred_logits.float().flatten(0, 1), truth.flatten(), self.element_weight,
                               reduction="none").sum()

    def _mask_losses(self, pred_masks: Tensor, label: Tensor, image: Tensor, query: Tensor, label_id: Tensor,
                     points: Mapping | None) -> tuple[Tensor, Tensor, Tensor]:
        """-> weighted sum, with its gradient, and cross-entropy and dice without: sums over the R matched pairs."""
        masks = pred_masks.flatten(0, 1).index_select(0, image * pred_masks.shape[1] + query)          # (R, h, w)
        masks = masks.float().unsqueeze(1)
        leaf = masks.detach().requires_grad_(masks.requires_grad)
        points = self._loss_points(leaf, label, image, points)                                         # (R, P, 2)
        sampled = sample_points(leaf, points).squeeze(1)                                               # (R, P)
        with torch.no_grad():
            truth = sample_label(label, points, label_id[:, None], image).squeeze(1)
            logits = sampled
            count = points.shape[1]
            if self.ignore_in_mask_loss:
                labelled = labelled_points(label, points, image)
                truth, count = truth * labelled, labelled.sum(1, keepdim=True).clamp_min(1)
                logits = torch.where(labelled.bool(), logits, -1e4)      # sigmoid and softplus: exactly 0
            prob = logits.sigmoid()
            cross_entropy = (softplus_sum(logits, prob).unsqueeze(1) - (logits * truth).sum(1, keepdim=True)) / count
            above = 2 * (prob * truth).sum(1, keepdim=True) + 1
            below = prob.sum(1, keepdim=True) + truth.sum(1, keepdim=True) + 1
            sums = cross_entropy.sum(), (1 - above / below).sum()
            weighted = self.weights["mask"] * sums[0] + self.weights["dice"] * sums[1]
            if leaf.requires_grad:
                slope = self.weights["mask"] / count * (prob - truth)    # of the two losses, with respect to the logits
                slope += self.weights["dice"] * prob * (1 - prob) * (above / below - 2 * truth) / below
        if leaf.requires_grad:
            weighted = _WithGradient.apply(masks, weighted, torch.autograd.grad(sampled, leaf, slope)[0])
        return weighted, *sums

    @torch.no_grad()
    def _loss_points(self, masks: Tensor, label: Tensor, image: Tensor, points: Mapping | None) -> Tensor:
        """Points for each of the masks (R, 1, h, w): the most uncertain candidates, then the random ones, (R, P, 2)."""
        if points is None:
            candidates = torch.rand(len(masks), self.num_candidates, 2, device=masks.device)
            rest = torch.rand(len(masks), self.num_points - self.num_uncertain, 2, device=masks.device)
        else:
            candidates, rest = points["oversampled"], points["random"]
        distance = sample_points(masks, candidates).squeeze(1).abs_()                                  # (R, candidates)
        if self.ignore_in_mask_loss:                       # or they might all be where nothing can be learnt
            distance.masked_fill_(labelled_points(label, candidates, image) == 0, torch.inf)
        chosen = distance.topk(self.num_uncertain, largest=False, sorted=False).indices
        return torch.cat([candidates.gather(1, chosen.unsqueeze(2).expand(-1, -1, 2)), rest], 1)
