"""I-JEPA on mesh clusters: predict the embedding of hidden clusters from visible ones (Assran et al. 2023).

    context = encoder(mesh, visible)                      the student sees the visible clusters alone
    output  = target_encoder(mesh)                        the teacher, a moving average of the student, sees all
    loss    = smooth-L1(predictor(context, where the targets are), layer_norm(output) at the targets)

Nothing in the loss forbids that all embeddings become one constant, or a code of position: see models/jepa_monitors.py.
Shapes: B meshes, N clusters, F face slots, E embedding width, P = E/2 predictor width, M target blocks, K target
clusters of the whole batch (a cluster in two blocks counts twice), T faces. Masks come from data/mesh_masks.py.
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


class Predictor(nn.Module):
    """From the context's embeddings and the places of the targets to the targets' embeddings.

    1. pool: one local layer makes a token of every visible cluster; 2. `depth` global layers over these and, at every
    target cluster of one block, the mask token; both have their position added; 3. per face: mask token + face position
    + the cluster's token through two MLP layers. Faces of a target do not see one another: their centres together would
    draw the surface that is to be predicted. target "cluster" leaves step 3 out.
    """

    def __init__(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 2.0,
                 target: str = "face") -> None:
        super().__init__()
        P = embed_dim // 2
        if P % num_heads or embed_dim % 2:
            raise ValueError(f"the predictor's width is model.embedding_dim / 2 = {embed_dim / 2:g}, which is not a "
                             f"multiple of model.num_heads={num_heads}; choose a multiple of {2 * num_heads}")
        self.target = target
        self.embed = nn.Linear(embed_dim, P)
        self.summary_token = nn.Parameter(torch.zeros(P))
        self.mask_token = nn.Parameter(torch.randn(P) * 0.02)
        self.position = PositionCode(P)
        self.pool = Layer(P, num_heads, mlp_ratio, 0.0, 0.0)
        self.blocks = nn.ModuleList(Layer(P, num_heads, mlp_ratio, 0.0, 0.0) for _ in range(depth))
        if target == "face":
            self.face_token = nn.Parameter(torch.randn(P) * 0.02)
            self.face_position = PositionCode(P)
            self.decode = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(P), nn.Linear(P, 2 * P), nn.GELU(), nn.Linear(2 * P, P))
                for _ in range(DECODE_LAYERS))
        self.norm = nn.LayerNorm(P)
        self.proj = nn.Linear(P, embed_dim)
        self.apply(init_weights)

    def forward(self, context: Tensor, masks: Tensor, centroid: Tensor, visible: Tensor,
                target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """context (B, N, F, E), masks (B, N, F), centroid (B, N, F, 3), visible (B, N), target (B, M, N) ->
        prediction (K, F, E), or (K, E) per cluster, and the index (b, m, n) of the K target clusters."""
        (B, N, slots, _), M = context.shape, target.shape[1]
        faces = self.embed(context)                                              # (B, N, F, P)
        P = faces.shape[-1]
        tokens = torch.cat([self.summary_token.expand(B, N, 1, P), faces], dim=2).view(B * N, slots + 1, P)
        valid = F.pad(masks & visible[..., None], (1, 0), value=True).view(B * N, slots + 1)
        summary = self.pool(tokens, valid)[:, 0].view(B, 1, N, P)
        x = torch.where(visible[:, None, :, None], summary, self.mask_token).expand(B, M, N, P)
        x = x + self.position(cluster_center(centroid, masks))[:, None]          # (B, M, N, P)
        x, keys = x.reshape(B * M, N, P), (visible[:, None] | target).view(B * M, N)
        keys = keys | ~keys.any(1, keepdim=True)                                 # a softmax over nothing would be NaN
        for block in self.blocks:
            x = block(x, keys)
        b, m, n = index = target.nonzero(as_tuple=True)
        x = x.view(B, M, N, P)[b, m, n]                                          # (K, P)
        if self.target == "face":
            x = x[:, None] + self.face_token + self.face_position(centroid[b, n])            # (K, F, P)
            for layer in self.decode:
                x = x + layer(x)
        return self.proj(self.norm(x)), index


class JepaOutput(NamedTuple):
    """prediction, target (K, F, E) or (K, E), target layer-normed; valid (K, F) or (K,); context (B, N, F, E) the
    student's output; output (B, N, F, E) the teacher's, before any normalisation."""

    prediction: Tensor
    target: Tensor
    valid: Tensor
    context: Tensor
    output: Tensor


class Jepa(nn.Module):
    """Student `encoder`, teacher `target_encoder` (eval mode, no gradient, whatever train() says) and `predictor`.

    target: "face" predicts the embedding of every face of the target clusters, "cluster" their mean.
    """

    def __init__(self, encoder: Nomeformer, depth: int = 3, num_heads: int = 4, mlp_ratio: float = 2.0,
                 target: str = "face") -> None:
        super().__init__()
        self.encoder = encoder
        self.target_encoder = freeze(copy.deepcopy(encoder))
        self.predictor = Predictor(encoder.embed_dim, depth, num_heads, mlp_ratio, target)

    def train(self, mode: bool = True) -> Jepa:
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, features: Tensor, masks: Tensor, centroid: Tensor, visible: Tensor, target: Tensor) -> JepaOutput:
        """features (B, N, F, Dg), masks (B, N, F) True = a face, centroid (B, N, F, 3); visible (B, N) and target
        (B, M, N) are disjoint and never hold a padded cluster."""
        with torch.no_grad():
            output = self.target_encoder(features, masks, centroid)              # (B, N, F, E), all clusters
        context = self.encoder(features, masks, centroid, visible)
        prediction, (b, _, n) = self.predictor(context, masks, centroid, visible, target)
        goal, valid = output.float(), masks[b, n]
        if self.predictor.target == "cluster":
            goal = goal.sum(2)              # (B, N, E): padded slots are 0, and layer_norm takes the count out
            valid = valid.any(-1)
        goal = F.layer_norm(goal, goal.shape[-1:])[b, n]
        return JepaOutput(prediction.float(), goal, valid, context, output)

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

    prediction, target (K, F, E) or (K, E); valid (K, F) or (K,) bool. No slot at all: 0 with a zero gradient, no NaN.
    """
    slot = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)       # (K, F) or (K,)
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
