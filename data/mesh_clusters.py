"""Partition the faces of a mesh into clusters: the tokens of the encoder's global attention.

All functions return face_index (N, F) int64, -1 where a cluster is shorter than the longest; every face occurs exactly
once.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

FPS_POOL = 20_000       # farthest-point sampling over a random pool of this size costs the same for every mesh


def recursive_bisection(centroid: np.ndarray, faces_per_cluster: int, rng: np.random.Generator | None = None,
                        num_clusters: int | None = None) -> np.ndarray:
    """Halve along the longest axis until the parts are small enough: O(F log N), no padding to speak of.

    centroid (F, 3) -> (N, F') with N = ceil(F / faces_per_cluster), or num_clusters (1..F) instead; no cluster is
    larger than ceil(F / N), consecutive clusters are neighbours in space. Works on triangle soup. With `rng` the axes
    are turned at random, so that the borders run elsewhere every time (re-clustering as augmentation).
    """
    num_faces = len(centroid)
    num_clusters = num_clusters or max(1, -(-num_faces // faces_per_cluster))
    if rng is not None:
        centroid = centroid @ np.linalg.qr(rng.normal(size=(3, 3)))[0]
    centroid = np.ascontiguousarray(centroid.T)                            # (3, F): columns are read axis by axis
    parts: list[np.ndarray] = [np.empty(0, np.int64)] * num_clusters
    stack = [(np.arange(num_faces), 0, num_clusters)]
    while stack:
        member, first, count = stack.pop()
        if count == 1:
            parts[first] = np.sort(member)
            continue
        left = count // 2
        cut = round(len(member) * left / count)                            # within what `left` clusters can hold
        points = centroid.take(member, 1)                                  # (3, faces of this part)
        extent = points.max(1) - points.min(1)
        order = points[extent.argmax()].argpartition(cut)
        stack += [(member[order[:cut]], first, left), (member[order[cut:]], first + left, count - left)]
    return _pad(parts)


def connected_clusters(centroid: np.ndarray, neighbors: np.ndarray, faces_per_cluster: int,
                       rng: np.random.Generator | None = None, num_clusters: int | None = None,
                       farthest_points: bool = False) -> np.ndarray:
    """Grow clusters from the middles of a recursive bisection, breadth first over shared edges, all at the same pace.

    centroid (F, 3), neighbors (F, 3) from `face_neighbors` -> (N, F'), N and order as in recursive_bisection. Clusters
    are connected, but of unequal size: F' is 1.4 to 2 times the mean, and padding costs attention. Faces that no seed
    reaches stay with the part they were in. farthest_points takes the seeds by farthest-point sampling instead; they
    lie evenly in space, not among the faces, so that a finely meshed tree beside a coarse wall can become one cluster
    of 200 times the mean: for evenly meshed surfaces only. There, unreached faces join the nearest reached one.
    """
    parts = recursive_bisection(centroid, faces_per_cluster, rng, num_clusters)
    real = parts >= 0
    point = np.where(real[..., None], centroid[parts], 0)                  # (N, F', 3)
    middle = point.sum(1, keepdims=True) / real.sum(1)[:, None, None]
    distance = np.where(real, ((point - middle) ** 2).sum(-1), np.inf)
    # One seed in every part, any of the quarter nearest its middle: not always on the same side of a thin wall.
    rank = (rng or np.random.default_rng(0)).integers(0, (real.sum(1) + 3) // 4)
    front = parts[np.arange(len(parts)), distance.argsort(1)[np.arange(len(parts)), rank]]
    home = np.empty(len(centroid), np.int64)
    home[parts[real]] = np.nonzero(real)[0]
    if farthest_points:
        front = _farthest_points(centroid, len(parts), rng or np.random.default_rng(0))
        front = front[home[front].argsort(kind="stable")]                  # consecutive clusters stay neighbours
    owner = np.full(len(centroid), -1, np.int64)
    owner[front] = np.arange(len(parts))
    while len(front):
        reached = neighbors[front]                                         # (front, 3)
        source = np.repeat(owner[front], 3)[reached.ravel() >= 0]
        reached = reached.ravel()[reached.ravel() >= 0]
        fresh = owner[reached] < 0
        front, first = np.unique(reached[fresh], return_index=True)        # the earliest source wins
        owner[front] = source[fresh][first]
    if farthest_points and (owner < 0).any():
        found = np.flatnonzero(owner >= 0)
        home = owner[found[cKDTree(centroid[found]).query(centroid)[1]]]
    owner = np.where(owner < 0, home, owner)
    order = np.argsort(owner, kind="stable")
    return _pad(np.split(order, np.searchsorted(owner[order], np.arange(1, len(parts)))))


def _farthest_points(centroid, count, rng):
    """Indices (count,) of faces, each the farthest of a random pool from all before it; a face is never taken twice."""
    pool = rng.choice(len(centroid), min(len(centroid), max(FPS_POOL, 2 * count)), replace=False)
    point = centroid[pool]
    distance = np.full(len(pool), np.inf)
    chosen = np.zeros(count, np.int64)
    for i in range(1, count):
        distance = np.minimum(distance, ((point - point[chosen[i - 1]]) ** 2).sum(1))
        distance[chosen[i - 1]] = -1                                       # duplicate faces share a centre
        chosen[i] = int(np.argmax(distance))
    return pool[chosen]


def _pad(parts):
    parts = [part for part in parts if len(part)] or [np.empty(0, np.int64)]
    face_index = np.full((len(parts), max(1, max(map(len, parts)))), -1, np.int64)
    for row, part in zip(face_index, parts, strict=True):
        row[:len(part)] = part
    return face_index
