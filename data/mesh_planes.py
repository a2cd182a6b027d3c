"""Planes as units: the faces of a flat piece of a mesh, and one prediction for all of them.

CAD models cut a wall or a roof into triangles as it suits the file. On the LOD3 buildings of docs/meshes.md a majority
label a plane (half a degree) is right for 97 % of the faces and 99 % of the area: nearly no plane has two classes.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from data.mesh_features import face_neighbors

TINY = 1e-30


def plane_units(vertices: np.ndarray, faces: np.ndarray, degrees: float) -> np.ndarray:
    """vertices (V, 3), welded, faces (F, 3) with consistent winding -> the number of its plane for each face, (F,) int.

    Two faces belong together where they alone share an edge and their normals differ by less than `degrees`, and so on
    from face to face: a surface that bends by less from each face to the next is one unit. A face without area is a
    unit of its own.
    """
    corner = vertices.astype(np.float64)[faces]                                            # (F, 3, 3)
    cross = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normal = cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), TINY)
    F = len(faces)
    face, edge = np.nonzero((neighbor := face_neighbors(faces)) >= 0)
    other = neighbor[face, edge]
    flat = (normal[face] * normal[other]).sum(1) > np.cos(np.radians(degrees))
    graph = sp.coo_matrix((np.ones(flat.sum(), bool), (face[flat], other[flat])), shape=(F, F))
    return connected_components(graph, directed=False)[1]


def pooled(probability: np.ndarray, unit: np.ndarray, area: np.ndarray) -> np.ndarray:
    """probability (F, C), unit (F,) int and area (F,) of the faces -> (F, C): the mean over each unit, by area (by
    number where a unit has none)."""
    weight, total = _weights(unit, area)
    mean = np.stack([np.bincount(unit, weight * column, len(total)) for column in probability.T], axis=1)
    return (mean / total[:, None])[unit].astype(probability.dtype)


def shares(unit: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Which part of its unit a face is, (F,) float32 with sum 1 over each unit: by area, as `pooled`."""
    weight, total = _weights(unit, area)
    return (weight / total[unit]).astype(np.float32)


def _weights(unit, area):
    num_units = int(unit.max(initial=-1)) + 1
    total = np.bincount(unit, area, num_units)
    weight = np.where(total[unit] > 0, area, 1.0)
    return weight, np.bincount(unit, weight, num_units)
