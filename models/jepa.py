"""I-JEPA on mesh clusters, tied to geometry: predict the embedding of hidden clusters from visible ones (Assran et al.
2023), and what the surface is like there and here (after MaskFeat, Wei et al. 2022).

    context   = encoder(mesh, visible)                    the student sees the visible clusters alone
    output    = target_encoder(mesh)                      the teacher, a moving average of the student, sees all
    embedding, descriptors = predictor(context, where)    of the hidden faces
    descriptors = linear(context)                         of the visible ones
    loss = alpha smooth-L1(embedding, layer_norm(output)) + delta smooth-L1(descriptors, the true ones)

Nothing in the first term forbids that all embeddings become one constant, or a code of position; the second does.
models/jepa_monitors.py measures both. The descriptors of a face are its features and its `surface_descriptors`
(data/mesh_features.py). Shapes: B meshes, N clusters, F face slots, K visible clusters of a mesh at most, E embedding
width, P = E/2 predictor width, M target blocks, T target clusters of the whole batch (a cluster in two blocks counts
twice), D descriptors, S faces with descriptors to predict. Masks come from data/mesh_masks.py.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nomeformer import Layer, Nomeformer, PositionCode, init_weights
from utils.params import freeze

DECODE_LAYERS = 2           # MLPs from a cluster's predicted token and a face's position to the face's embedding
STD_EPS = 1e-4              # inside the root of VICReg's standard deviation (Bardes et al. 2022)


# -- network ----------------------------------------------------------------------------------------------------------

def cluster_center(centroid: Tensor, masks: Tensor) -> Tensor:
    """Mean of the face centres of every cluster: centroid (B, N, F, 3), masks (B, N, F) -> (B, N, 3)."""
    return torch.where(masks[..., None], centroid, 0.0).sum(2) / masks.sum(2, keepdim=True).clamp(min=1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Some clusters of every mesh: values (B, N, ...), index (B, K) -> (B, K, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


class Predictor(nn.Module):
    """From the context's embeddings and the places of the targets to what the targets are.

    1. pool: one local layer makes a token of every visible cluster; 2. `depth` global layers over these and, at every
    target cluster of one block, the mask token; both have their position added; 3. per face: mask token + face position
    + the cluster's token through two MLP layers, and a linear layer each for embedding and descriptors. Faces of a
    target do not see one another: their centres together would draw the surface that is to be predicted.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 2.0,
                 num_descriptors: int = 0) -> None:
        super().__init__()
        P = embed_dim // 2
        if P % num_heads or embed_dim % 2:
            raise ValueError(f"the predictor's width is model.embedding_dim / 2 = {embed_dim / 2:g}, which is not a "
                             f"multiple of model.num_heads={num_heads}; choose a multiple of {2 * num_heads}")
        self.embed = nn.Linear(embed_dim, P)
        self.summary_token = nn.Parameter(torch.zeros(P))
        self.mask_token = nn.Parameter(torch.randn(P) * 0.02)
        self.position = PositionCode(P)
        self.pool = Layer(P, num_heads, mlp_ratio, 0.0, 0.0)
        self.blocks = nn.ModuleList(Layer(P, num_heads, mlp_ratio, 0.0, 0.0) for _ in range(depth))
        self.face_token = nn.Parameter(torch.randn(P) * 0.02)
        self.face_position = PositionCode(P)
        self.decode = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(P), nn.Linear(P, 2 * P), nn.GELU(), nn.Linear(2 * P, P))
            for _ in range(DECODE_LAYERS))
        self.norm = nn.LayerNorm(P)
        self.proj = nn.Linear(P, embed_dim)
        self.describe = nn.Linear(P, num_descriptors) if num_descriptors else None
        self.apply(init_weights)

    def forward(self, context: Tensor, seen: Tensor, index: Tensor, masks: Tensor, centroid: Tensor, visible: Tensor,
                target: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor]]:
        """context (B, K, F, E) and seen (B, K, F) bool of the visible clusters index (B, K), masks (B, N, F), centroid
        (B, N, F, 3), visible (B, N), target (B, M, N) -> embedding (T, F, E), descriptors (T, F, D) or None, and the
        index (b, m, n) of the T target clusters."""
        (B, K, slots, _), (M, N) = context.shape, target.shape[1:]
        faces = self.embed(context)                                              # (B, K, F, P)
        P = faces.shape[-1]
        tokens = torch.cat([self.summary_token.expand(B, K, 1, P), faces], dim=2).view(B * K, slots + 1, P)
        valid = F.pad(seen, (1, 0), value=True).view(B * K, slots + 1)
        summary = self.pool(tokens, valid, queries=1).view(B, K, P)
        summary = summary.new_zeros(B, N, P).scatter(1, index[..., None].expand(-1, -1, P), summary)
        x = torch.where(visible[..., None], summary, self.mask_token)[:, None].expand(B, M, N, P)
        x = x + self.position(cluster_center(centroid, masks))[:, None]          # (B, M, N, P)
        x = x.reshape(B * M, N, P)
        keys = (visible[:, None] | target).view(B * M, N)
        keys = keys | ~keys.any(1, keepdim=True)                                 # a softmax over nothing would be NaN
        for block in self.blocks:
            x = block(x, keys)
        b, m, n = where = target.nonzero(as_tuple=True)
        x = x.view(B, M, N, P)[b, m, n]                                          # (T, P)
        x = x[:, None] + self.face_token + self.face_position(centroid[b, n])    # (T, F, P)
        for layer in self.decode:
            x = x + layer(x)
        x = self.norm(x)
        return self.proj(x), None if self.describe is None else self.describe(x), where


class JepaOutput(NamedTuple):
    """prediction, target (T, F, E), target layer-normed; valid (T, F); described, descriptors (S, D), described_valid
    (S,): the hidden faces and then the visible ones, None without descriptors; context (B, K, F, E) the student's
    output, seen (B, K, F) where it is a face; output (B, N, F, E) the teacher's, before any normalisation."""

    prediction: Tensor
    target: Tensor
    valid: Tensor
    described: Tensor | None
    descriptors: Tensor | None
    described_valid: Tensor | None
    context: Tensor
    seen: Tensor
    output: Tensor


class Jepa(nn.Module):
    """Student `encoder`, teacher `target_encoder` (eval mode, no gradient, whatever train() says) and `predictor`.

    num_surface: how many surface descriptors a face has; 0 = embeddings alone are predicted, as in I-JEPA. They are
    standardised with `descriptor_mean` and `descriptor_std`, the features as the encoder does.
    """

    def __init__(self, encoder: Nomeformer, depth: int = 3, num_heads: int = 4, mlp_ratio: float = 2.0,
                 num_surface: int = 0) -> None:
        super().__init__()
        D = num_surface + encoder.feature_dim if num_surface else 0
        self.encoder = encoder
        self.target_encoder = freeze(copy.deepcopy(encoder))
        self.predictor = Predictor(encoder.embed_dim, depth, num_heads, mlp_ratio, D)
        self.describe = nn.Linear(encoder.embed_dim, D) if D else None
        self.register_buffer("descriptor_mean", torch.zeros(num_surface))
        self.register_buffer("descriptor_std", torch.ones(num_surface))

    def train(self, mode: bool = True) -> Jepa:
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, features: Tensor, masks: Tensor, centroid: Tensor, visible: Tensor, target: Tensor,
                descriptors: Tensor | None = None) -> JepaOutput:
        """features (B, N, F, Dg), masks (B, N, F) True = a face, centroid (B, N, F, 3), descriptors (B, N, F,
        num_surface) or None; visible (B, N) and target (B, M, N) are disjoint and never hold a padded cluster."""
        with torch.no_grad():
            output = self.target_encoder(features, masks, centroid)              # (B, N, F, E), all clusters
        # The student computes its own clusters only: the same as hiding the others, in half the time.
        index = visible.byte().argsort(dim=1, descending=True, stable=True)[:, :int(visible.sum(1).max())]   # (B, K)
        shown = take(visible, index)
        seen = take(masks, index) & shown[..., None]                             # (B, K, F)
        context = self.encoder(take(features, index), seen, take(centroid, index), shown)
        prediction, hidden, (b, _, n) = self.predictor(context, seen, index, masks, centroid, visible, target)
        goal = F.layer_norm(output.float(), output.shape[-1:])[b, n]
        valid = masks[b, n]
        if descriptors is None:
            return JepaOutput(prediction.float(), goal, valid, None, None, None, context, seen, output)
        known = torch.cat([(features - self.encoder.feature_mean) / self.encoder.feature_std,
                           (descriptors - self.descriptor_mean) / self.descriptor_std], dim=-1)     # (B, N, F, D)
        described = torch.cat([hidden.flatten(0, 1), self.describe(context).flatten(0, 2)])         # (S, D)
        known = torch.cat([known[b, n].flatten(0, 1), take(known, index).flatten(0, 2)])
        return JepaOutput(prediction.float(), goal, valid, described.float(), known,
                          torch.cat([valid.flatten(), seen.flatten()]), context, seen, output)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, buffers are copied; after optimizer.step()."""
        student, teacher = list(self.encoder.parameters()), list(self.target_encoder.parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        for new, old in zip(self.encoder.buffers(), self.target_encoder.buffers(), strict=True):
            old.copy_(new)


# -- loss and schedules -----------------------------------------------------------------------------------------------

def prediction_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Smooth-L1 (beta 1) summed over the valid slots, mean over features, and the number of valid slots: (sum, count).

    prediction, target (T, F, E) or (S, D); valid (T, F) or (S,) bool. No slot at all: 0 with a zero gradient, no NaN.
    """
    slot = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)       # (T, F) or (S,)
    return torch.where(valid, slot, 0.0).sum(), valid.sum()


def variance_covariance(embedding: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """VICReg's two regularisers (Bardes et al. 2022, eq. 1 to 4) over all valid faces of this process: two scalars.

    embedding (..., E), valid (...) bool. variance: mean over dimensions of max(0, 1 - std); covariance: sum of the
    squared off-diagonal covariances / E. Fewer than two faces: 0.
    """
    x = embedding[valid].float()                                                 # (T, E)
    if len(x) < 2:
        return embedding.sum() * 0.0, embedding.sum() * 0.0
    x = x - x.mean(0)
    covariance = x.T @ x / (len(x) - 1)                                          # (E, E)
    diagonal = covariance.diagonal()
    variance = F.relu(1 - (diagonal + STD_EPS).sqrt()).mean()
    return variance, (covariance - torch.diag(diagonal)).square().sum() / len(diagonal)


def start_momentum(value: float | str, total_steps: int) -> float:
    """m0 of the moving average. "auto": a time constant 1 / (1 - m0) of a tenth of the run; slower, and the teacher
    stays where it started; faster, and it collapses. A number is kept. Raises ValueError outside [0, 1)."""
    if value == "auto":
        return max(0.0, 1 - 10 / total_steps)
    if isinstance(value, str) or not 0 <= value < 1:
        raise ValueError(f"ema.momentum={value!r}: expected auto or a number from 0 to below 1, such as 0.996")
    return float(value)


def momentum_at(step: int, total_steps: int, start: float) -> float:
    """Linear from `start` at step 0 to 1 at total_steps."""
    return start + (1 - start) * min(step / total_steps, 1.0)


def weight_decay_at(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at total_steps."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))
