"""Normals of clouds that have none: the direction in which a point's neighbours vary least, and to which side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree

NORMAL_NEIGHBORS = 16
GRAPH_NEIGHBORS = 8                     # of them, those that must look to the same side
NORMAL_VIEWS = ("inside", "above", "neighbours")
EYE_HEIGHT = 1.5                        # metres above the lowest point: where a room is supposed to be seen from
STEEP, LEVEL = 0.5, 0.7                 # |z| of the normals that look up for sure from above, and of the ground's
COLUMNS = 128                           # at most, along the longer side of a cloud: the lowest point of each is ground
MOST_BELOW = 0.02                       # share of the ground that may look down in a cloud seen from inside
NO_WEIGHT = 1e-9                        # of an edge (0 would be none)

WORDS = {"inside": "turned to a viewpoint 1.5 m above the lowest point (data.normal_view=inside)",
         "above": "turned up (data.normal_view=above)",
         "neighbours": "the ground turned up and neighbours to one side (data.normal_view=neighbours)"}


def describe_view(view: str | Sequence[float]) -> str:
    """Words for a message."""
    return WORDS[view] if isinstance(view, str) else f"turned to {' '.join(f'{value:g}' for value in view)}"


def estimate_normals(coord: np.ndarray, view: str | Sequence[float] = "inside") -> np.ndarray:
    """(N, 3) float32 unit normals: the direction in which a point's 16 nearest points vary least (PCA; Hoppe et al.
    1992), turned by `view`. Fewer than three points, or all on one spot: straight up.

    inside      to a viewpoint 1.5 m above the lowest point, in the middle: floors and tables look up, ceilings down,
                walls into the room
    (x, y, z)   to this viewpoint
    above       up; what is upright looks to the side that its neighbours lead to
    neighbours  the lowest level points of the columns up, all others to the side that their neighbours lead to
    """
    coord = coord.astype(np.float64)
    if len(coord) < 3:
        return np.tile(np.float32([0, 0, 1]), (len(coord), 1))
    normal, index = _principal(coord)
    if view in ("above", "neighbours"):
        if view == "above":
            sure = np.abs(normal[:, 2]) > STEEP
        else:
            sure = np.zeros(len(coord), bool)
            sure[ground(coord, normal)] = True
        normal[sure & (normal[:, 2] < 0)] *= -1
        return _spread(normal, index[:, 1:1 + GRAPH_NEIGHBORS], sure).astype(np.float32)
    if view == "inside":
        low, high = coord.min(0), coord.max(0)
        view = [*(low + high)[:2] / 2, low[2] + EYE_HEIGHT]
    away = ((np.asarray(view) - coord) * normal).sum(1) < 0
    normal[away] *= -1
    return normal.astype(np.float32)


def _principal(coord):
    """Normals (N, 3) of either side, and the neighbours (N, k) that they were found from."""
    _, index = cKDTree(coord).query(coord, min(NORMAL_NEIGHBORS, len(coord)))       # (N, k)
    normal = np.empty_like(coord)
    for begin in range(0, len(coord), 1 << 17):                                     # bounded memory
        rows = slice(begin, begin + (1 << 17))
        around = coord[index[rows]]                                                 # (n, k, 3)
        around -= around.mean(1, keepdims=True)
        normal[rows] = np.linalg.eigh(around.swapaxes(1, 2) @ around)[1][:, :, 0]
        flat = np.abs(around).max((1, 2)) == 0
        normal[rows][flat] = (0, 0, 1)
    return normal, index


def ground(coord: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Indices of the points that must look up: the lowest of each column, where level. Along the longer side are 128
    columns, or as many as give them about 64 points each."""
    flat = coord[:, :2].astype(np.float64) - coord[:, :2].min(0)
    columns = min(COLUMNS, 1 + int(len(coord) ** 0.5 / 8))
    cell = np.floor(flat * (columns / max(flat.max(), 1e-12))).astype(np.int64)
    column = cell[:, 0] * (columns + 1) + cell[:, 1]
    order = np.lexsort((coord[:, 2], column))
    lowest = order[np.diff(column[order], prepend=-1) > 0]
    return lowest[np.abs(normal[lowest, 2]) > LEVEL]


def share_below(coord: np.ndarray, normal: np.ndarray) -> float:
    """Which share of the ground looks down: where it is not close to 0, normals are those of another view."""
    level = ground(coord, normal)
    return float((normal[level, 2] < 0).mean()) if len(level) else 0.0


def _spread(normal, index, sure):
    """Turn the normals (N, 3) that are not `sure` along a minimum spanning tree of the neighbours index (N, k), whose
    edges weigh 1 - |cosine| (Hoppe et al. 1992), from those that are. Pieces without any look up on the whole."""
    count = len(normal)
    begin = np.repeat(np.arange(count), index.shape[1])
    end = index.ravel()
    weight = 1 - np.abs((normal[begin] * normal[end]).sum(1)) + 1e-6
    seeds = np.flatnonzero(sure)                                                    # hang on one root, node N
    begin, end = np.concatenate([begin, np.full(len(seeds), count)]), np.concatenate([end, seeds])
    weight = np.concatenate([weight.clip(1e-6), np.full(len(seeds), NO_WEIGHT)])
    nodes = (count + 1, count + 1)
    tree = minimum_spanning_tree(coo_array((weight, (begin, end)), nodes).tocsr()).tocoo()
    _, piece = connected_components(tree, directed=False)
    first = np.unique(piece, return_index=True)[1]
    first = first[piece[first] != piece[count]]
    hung = (np.concatenate([tree.row, np.full(len(first), count)]), np.concatenate([tree.col, first]))
    tree = coo_array((np.ones(len(hung[0])), hung), nodes).tocsr()
    _, parent = breadth_first_order(tree, count, directed=False)
    parent = np.where(parent[:count] == count, np.arange(count), parent[:count])
    sign = np.where((normal * normal[parent]).sum(1) < 0, -1.0, 1.0)                # relative to the parent
    while (sign != 1).any() and not (parent == parent[parent]).all():               # to the parent's parent, and so on
        sign, parent = sign * sign[parent], parent[parent]
    normal = normal * sign[:, None]
    upward = np.bincount(piece[:count], normal[:, 2], piece.max() + 1)
    upward[piece[count]] = 0
    normal[upward[piece[:count]] < 0] *= -1
    return normal
