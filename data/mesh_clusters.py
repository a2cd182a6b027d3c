"""Partition the faces of a mesh into clusters: the tokens of the encoder's global attention.

Both functions return face_index (N, F) int64, -1 where a cluster is shorter than the longest; every face occurs exactly
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
        extent = [np.ptp(axis[member]) for axis in centroid]
        order = np.argpartition(centroid[int(np.argmax(extent))][member], cut)
        stack += [(member[order[:cut]], first, left), (member[order[cut:]], first + left, count - left)]
    return _pad(parts)


def fps_bfs(centroid: np.ndarray, neighbors: np.ndarray, faces_per_cluster: int,
            rng: np.random.Generator | None = None, num_clusters: int | None = None) -> np.ndarray:
    """Grow connected clusters from farthest-point seeds, breadth first over shared edges, all at the same pace.

    centroid (F, 3), neighbors (F, 3) from `face_neighbors` -> (N, F'), N as in recursive_bisection; here too,
    consecutive clusters are neighbours in space. Clusters are connected, but of unequal size: F' is 1.6 to 2.3 times
    the mean, and padding costs attention. Faces that no seed reaches join the cluster of the nearest reached face.
    """
    num_faces = len(centroid)
    num_clusters = num_clusters or max(1, -(-num_faces // faces_per_cluster))
    seeds = _farthest_points(centroid, num_clusters, rng or np.random.default_rng(0))
    seeds = seeds[recursive_bisection(centroid[seeds], 1)[:, 0]]           # far from one another until here
    owner = np.full(num_faces, -1, np.int64)
    owner[seeds] = np.arange(len(seeds))
    front = seeds
    while len(front):
        reached = neighbors[front]                                         # (front, 3)
        source = np.repeat(owner[front], 3)[reached.ravel() >= 0]
        reached = reached.ravel()[reached.ravel() >= 0]
        fresh = owner[reached] < 0
        front, first = np.unique(reached[fresh], return_index=True)        # the earliest source wins
        owner[front] = source[fresh][first]
    lost = np.flatnonzero(owner < 0)
    if len(lost):
        found = np.flatnonzero(owner >= 0)
        owner[lost] = owner[found[cKDTree(centroid[found]).query(centroid[lost])[1]]]
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, len(seeds)))
    return _pad(np.split(order, bounds))


def _farthest_points(centroid, count, rng):
    pool = rng.choice(len(centroid), min(len(centroid), max(FPS_POOL, 2 * count)), replace=False)
    point = centroid[pool]
    chosen = np.zeros(count, np.int64)
    distance = np.full(len(pool), np.inf)
    for i in range(1, count):
        distance = np.minimum(distance, ((point - point[chosen[i - 1]]) ** 2).sum(1))
        distance[chosen[i - 1]] = -1                                       # duplicate faces share a centre: never twice
        chosen[i] = int(np.argmax(distance))
    return pool[chosen]


def _pad(parts):
    parts = [part for part in parts if len(part)] or [np.empty(0, np.int64)]
    face_index = np.full((len(parts), max(1, max(map(len, parts)))), -1, np.int64)
    for row, part in zip(face_index, parts, strict=True):
        row[:len(part)] = part
    return face_index
