"""What a face belongs to: size, border and height of the flat piece and of the connected part around it.

A window is known by the frame it is part of, not by a triangle. All is measured with exact integrals over triangles, so
the numbers do not depend on how a surface is cut into triangles. F faces, V vertices; piece (F,) int numbers the pieces
from 0; lengths as the vertices have them.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

LEAST_LENGTH = 1e-3             # of a size; smaller ones, and those of a piece without area, count as this
MOST_BORDER = 1e3               # of a border, in square roots of the area


def connected_parts(neighbors: np.ndarray) -> np.ndarray:
    """The number of its part for each face, (F,) int: parts are joined over edges that two faces alone share, as
    neighbors (F, 3) of `face_neighbors` has them. Where a frame touches a wall, edges have more than two faces, so
    that the frame is a part of its own."""
    face, edge = np.nonzero(neighbors >= 0)
    graph = sp.coo_matrix((np.ones(len(face), bool), (face, neighbors[face, edge])), shape=(len(neighbors),) * 2)
    return connected_components(graph, directed=False)[1]


def piece_sizes(corner: np.ndarray, area: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """log of area, length, width and thickness of each face's piece, (F, 4): corner (F, 3, 3), area and piece (F,).

    The sizes are those of the solid box with the second moments of the surface: sqrt(12 times the eigenvalues of its
    covariance), so exactly length and width of a flat rectangle. Neither a rotation nor a subdivision changes them.
    """
    count = int(piece.max(initial=-1)) + 1
    total = np.bincount(piece, area, count)                                     # (pieces,)
    weight = area / np.where(total > 0, total, 1.0)[piece]                      # (F,) sum 1 over a piece

    def mean(values):
        return np.bincount(piece, values * weight, count)

    axes = np.ascontiguousarray(corner.T, np.float64)                           # (3 axes, 3 corners, F)
    axes -= np.stack([mean(middle) for middle in axes.mean(1)])[:, None, piece]
    summed = axes.sum(1)
    covariance = np.empty((count, 3, 3))
    for i in range(3):
        for j in range(i + 1):
            # Over a triangle, the mean of x y is 1 / 12 of (sum of the corners' x y + sum of x times sum of y).
            both = (axes[i] * axes[j]).sum(0) + summed[i] * summed[j]
            covariance[:, i, j] = covariance[:, j, i] = mean(both) / 12
    sizes = np.sqrt(12 * np.linalg.eigvalsh(covariance)[:, ::-1].clip(min=0))   # (pieces, 3), largest first
    logs = np.log(np.maximum(np.column_stack([np.sqrt(total), sizes]), LEAST_LENGTH)) * (2, 1, 1, 1)
    return logs[piece]


def piece_borders(corner: np.ndarray, faces: np.ndarray, area: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """log(1 + length) of the border of each face's piece, in square roots of its area: edges of one face, and edges of
    three faces or more, (F, 2)."""
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()              # (3F,), edges 3f..3f+2 of face f
    key = np.minimum(start, end) * (int(faces.max(initial=0)) + 1) + np.maximum(start, end)
    _, edge, count = np.unique(key, return_inverse=True, return_counts=True)
    shared = count[edge]
    length = np.linalg.norm(corner - np.roll(corner, -1, axis=1), axis=2).ravel().astype(np.float64)
    of_edge = np.repeat(piece, 3)
    pieces = int(piece.max(initial=-1)) + 1
    border = np.stack([np.bincount(of_edge, length * kind, pieces) for kind in (shared == 1, shared > 2)], axis=1)
    root = np.sqrt(np.bincount(piece, area, pieces))[:, None]
    return np.log1p(np.minimum(border / np.maximum(root, LEAST_LENGTH), MOST_BORDER))[piece]


def piece_heights(corner: np.ndarray, pieces: list[np.ndarray]) -> np.ndarray:
    """How far the lowest corner of a face lies above the lowest of the mesh, and its highest below the highest of the
    mesh; then the same of its piece in each of `pieces`: (F, 2 + 2 per entry)."""
    low, high = corner[:, :, 2].min(1).astype(np.float64), corner[:, :, 2].max(1).astype(np.float64)
    columns = [low, high]
    for piece in pieces:
        count = int(piece.max(initial=-1)) + 1
        lowest, highest = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(lowest, piece, low)
        np.maximum.at(highest, piece, high)
        columns += [lowest[piece], highest[piece]]
    heights = np.stack(columns, axis=1)
    heights[:, ::2] -= low.min(initial=np.inf)
    heights[:, 1::2] = high.max(initial=-np.inf) - heights[:, 1::2]
    return heights
