"""What a falling I-JEPA loss cannot show: whether the teacher's embedding collapsed, or became a code of position.

The letters (a) to (e) are those of docs/jepa.md. Shapes: B meshes, N clusters, F face slots, E width, T faces.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.jepa import Jepa, prediction_loss
from models.nomeformer import Nomeformer, PositionCode

FACES_PER_INPUT = 10        # fewer faces for each input of the linear map, and its R^2 would be overfitting

# A random encoder can be beyond these bounds already (on a sphere, normals are positions); then its own value, with a
# tenth to spare, is the bound.
RELATIVE = ("share_mesh", "share_face", "position_r2")

# name: (config key of its bound, which side is wrong, what it means)
MONITORS = {
    "target_std": ("min_target_std", "below", "the teacher embeds all faces (almost) alike: constant collapse"),
    "target_std_ratio": ("min_target_std_ratio", "below", "the teacher's spread is shrinking: it collapses"),
    "prediction_std": ("min_prediction_std", "below", "the predictor answers with a constant"),
    "prediction_ratio": ("min_prediction_ratio", "below", "the predictor answers with the mean, whatever the context"),
    "share_mesh": ("max_share_mesh", "above", "one code per mesh: the embedding tells meshes apart, not faces"),
    "share_face": ("min_share_face", "below", "all faces of a cluster get the same embedding"),
    "position_r2": ("max_position_r2", "above", "the embedding is a code of position, which the predictor is given"),
    "content": ("min_content", "below", "the embedding hardly depends on the features of the faces"),
    "effective_rank": ("min_effective_rank", "below", "few directions are left in the embedding: dimensional collapse"),
    "teacher_moved": ("min_teacher_moved", "below", "the teacher is still at its start: nothing has been learnt"),
    "teacher_follow": ("min_teacher_follow", "below", "the teacher does not follow the student: ema.momentum too slow"),
    "teacher_student": ("max_teacher_student", "above", "the student ran away from its teacher: too high a learning "
                                                        "rate, or ema.momentum too slow"),
}


@torch.no_grad()
def measure(model: Jepa, start: Nomeformer, batch: Mapping[str, Tensor], seed: int = 0) -> dict[str, float]:
    """Loss and all monitors of one batch of masked_collate_fn, on the model's device, without side effects.

    start: the encoder before training. Beside what monitor_values returns:
    target_std_ratio     target_std over that of `start`;
    prediction_std (a)   standard deviation over the predicted faces, mean over dimensions;
    prediction_ratio     that over the deviation of what they should be (layer-normed targets);
    teacher_moved (e)    |teacher - start| / |start| over all parameters;
    teacher_student (e)  |teacher - student| / |teacher|;
    teacher_follow (e)   |teacher - start| / |student - start|.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    swapped = batch["features"].cpu().clone()
    generator = torch.Generator().manual_seed(seed)
    for b, mask in enumerate(batch["mask"].cpu()):
        own = swapped[b, mask]
        swapped[b, mask] = own[torch.randperm(len(own), generator=generator)]
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    start = copy.deepcopy(start).to(device, non_blocking=True).eval()
    features, masks, centroid = batch["features"], batch["mask"], batch["centroid"]
    swapped = swapped.to(device, non_blocking=True)
    out = model(features, masks, centroid, batch["visible"], batch["target"])
    total, count = prediction_loss(out.prediction, out.target, out.valid)
    values = monitor_values(out.output, masks, centroid, model.target_encoder(swapped, masks, centroid))
    before = monitor_values(start(features, masks, centroid), masks, centroid)
    values["target_std_ratio"] = values["target_std"] / max(before["target_std"], 1e-12)
    if count > 1:
        wanted = out.target[out.valid].std(0).mean().item()
        values["prediction_std"] = out.prediction[out.valid].std(0).mean().item()
        values["prediction_ratio"] = values["prediction_std"] / max(wanted, 1e-12)
    student = parameter_distance(start, model.encoder)
    values["teacher_moved"] = parameter_distance(start, model.target_encoder)
    values["teacher_student"] = parameter_distance(model.target_encoder, model.encoder)
    values["teacher_follow"] = values["teacher_moved"] / student if student else float("nan")
    model.train(training)
    return {"loss": (total / count.clamp(min=1)).item(), **values}


@torch.no_grad()
def monitor_values(output: Tensor, masks: Tensor, centroid: Tensor, shuffled: Tensor | None = None) -> dict[str, float]:
    """Statistics of the teacher's outputs, before any normalisation of targets; computed in float64 on the CPU.

    output (B, N, F, E), masks (B, N, F) True = a face, centroid (B, N, F, 3) ->
    target_std (a)       standard deviation over all T faces, mean over dimensions;
    share_mesh, share_cluster, share_face (b)   shares of the variance between meshes, between the clusters of a mesh
                         and inside clusters; they sum to 1;
    position_r2 (c)      R^2 of the best linear map from the encoder's position code to the output; NaN for few faces;
    effective_rank (d)   exp of the entropy of the normalised singular values (Roy and Vetterli 2007): scale-free, so it
                         misses a constant collapse and is never enough alone;
    content              with `shuffled`, the output where the faces of each mesh swapped their features: the mean
                         squared change over twice the variance. 0: features are ignored, 1: nothing else counts.
    """
    output, masks, centroid = output.cpu(), masks.cpu(), centroid.cpu()
    B, N = masks.shape[:2]
    cluster = torch.arange(B * N).view(B, N, 1).expand_as(masks)[masks]          # (T,)
    x = output[masks].double()                                                   # (T, E)
    x = x - x.mean(0)
    total = x.square().sum().clamp(min=1e-30)
    in_cluster = x - _group_means(x, cluster, B * N)
    in_mesh = x - _group_means(x, cluster // N, B)
    share_face = float(in_cluster.square().sum() / total)
    share_mesh = 1 - float(in_mesh.square().sum() / total)
    values = {"target_std": float(x.square().mean(0).sqrt().mean()), "share_mesh": share_mesh,
              "share_cluster": 1 - share_mesh - share_face, "share_face": share_face,
              "position_r2": _position_r2(x, centroid[masks].double()), "effective_rank": _effective_rank(x)}
    if shuffled is not None:
        change = output[masks].double() - shuffled.cpu()[masks].double()
        values["content"] = float(change.square().sum() / (2 * total))
    return values


def _group_means(x, group, count):
    """The mean of its group for every row. x (T, E), group (T,) -> (T, E)."""
    size = torch.bincount(group, minlength=count).clamp(min=1)[:, None]
    return (torch.zeros(count, x.shape[1], dtype=x.dtype).index_add_(0, group, x) / size)[group]


def _position_r2(x, position):
    phase = (position[..., None] * PositionCode(1).frequency.double()).flatten(-2)
    code = torch.cat([phase.sin(), phase.cos(), torch.ones_like(phase[:, :1])], dim=-1)      # (T, 37)
    if len(x) < FACES_PER_INPUT * code.shape[1]:
        return float("nan")
    gram = code.T @ code
    gram.diagonal().add_(1e-9 * len(x))                              # a flat mesh has columns that are multiples
    rest = x - code @ torch.linalg.solve(gram, code.T @ x)
    return 1 - float(rest.square().sum() / x.square().sum().clamp(min=1e-30))


def _effective_rank(x):
    singular = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    return float(torch.special.entr(singular / singular.sum().clamp(min=1e-30)).sum().exp())


@torch.no_grad()
def parameter_distance(first: nn.Module, second: nn.Module) -> float:
    """(e) |first - second| / |first| over all parameters; both must be the same kind of module."""
    pairs = list(zip(_on_cpu(first), _on_cpu(second), strict=True))
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return math.sqrt(difference / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-30))


def _on_cpu(module: nn.Module) -> list[Tensor]:
    """All parameters, flat, in float64: one copy from the GPU."""
    parameters = [parameter.detach().flatten() for parameter in module.parameters()]
    return [part.double() for part in torch.cat(parameters).cpu().split([len(part) for part in parameters])]


def check_monitors(values: Mapping[str, float], bounds: Mapping[str, float | None],
                   untrained: Mapping[str, float]) -> list[str]:
    """One line for every value beyond its bound (`bounds`: the config's section `monitor`; None: not checked).

    It names the value, the bound and what it means. untrained: the values before training, see RELATIVE. NaN is beyond
    every bound, except for position_r2, which cannot be measured on few faces.
    """
    lines = []
    for name, (key, side, meaning) in MONITORS.items():
        value, bound = values.get(name), bounds.get(key)
        if value is None or bound is None or (name == "position_r2" and math.isnan(value)):
            continue
        limit = bound
        shown = f"{bound:g}"
        if name in RELATIVE and name in untrained:
            limit = min(bound, 0.9 * untrained[name]) if side == "below" else max(bound, 1.1 * untrained[name])
            shown += "" if limit == bound else f" (here {limit:.3g}, as it was {untrained[name]:.3g} before training)"
        if not (value >= limit if side == "below" else value <= limit):
            lines.append(f"monitor {name} = {value:.3g} is {side} its bound monitor.{key} = {shown}: {meaning}")
    return lines
