"""Per-face features of a triangle mesh: what the encoder sees of every face.

All features survive degenerate, duplicate and non-manifold faces (finite values, never NaN) and, on vertices normalised
by `normalize_vertices`, do not change when the mesh is moved or scaled. V vertices, F faces, Dg feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from data.mesh_operators import (
    ALL_PAIRS_UP_TO,
    FEWER_PAIRS,
    component_parts,
    corner_cotangents,
    smallest_eigenpairs,
)
from data.mesh_pieces import connected_parts, piece_borders, piece_heights, piece_sizes
from data.upright import UP, z_up
from utils.checks import check_choice, did_you_mean, nearest

HKS_TIMES = 16
HKS_EIGENPAIRS = 128
HKS_LARGEST = 250_000           # vertices; beyond that a mesh takes minutes (docs/meshes.md has the times)
MAX_COTANGENT = 20.0            # of an angle of 2.9 degrees
GROUND_BELOW, GROUND_ABOVE = 0.99, 0.01     # pull on the ground plane of what lies below it and above it
GROUND_CELL = 0.05              # roughness: cell of the grid, as a share of the mesh's diameter
TINY = 1e-12
HEAT_RADII = (0.1, 0.25, 0.5)   # of the surroundings in `surface_descriptors`, in square roots of the mesh's area
NUM_DESCRIPTORS = HKS_TIMES * (1 + len(HEAT_RADII))

# name -> width; the order here is the order of the columns. All but the last are computed from the augmented vertices.
FEATURES = {
    "centroid": 3,       # face centre; the only absolute one: leave it out, or rotate in training
    "corners": 9,        # corner - centre, in the file's corner order
    "normal": 3,         # unit normal, 0 for a face without area
    "area": 1,           # log(area / mean area), clipped to +-10
    "angles": 3,         # inner angles in units of pi, sorted
    "curvature": 3,      # corner normal . face normal, sorted (the cheap curvature of MeshMAE and SubdivNet)
    "dihedral": 4,       # signed angle to the neighbour over each edge / pi, sorted (convex > 0); share of open edges
    "ground": 3,         # height over the ground, slope, roughness; for meshes whose z axis points up (city models)
    "plane": 5,          # the flat piece around the face: log of area, length and width; its border
    "part": 6,           # the part connected over edges of two faces: log of area and three sizes; its border
    "height": 6,         # bottom and top of face, plane and part over the mesh's bottom and under its top; z up
    "hks": HKS_TIMES,    # heat kernel signature, log, 16 times (Sun et al. 2009); intrinsic: computed once a mesh
}
UPRIGHT = ("ground", "height")          # features of meshes whose z axis points up


def feature_width(names, known: Mapping[str, int] = FEATURES, where: str = "") -> int:
    """D of a list of feature names, those of `known`. Raises ValueError, which says `where`, for an unknown one."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"model.features: unknown {unknown}{where}; choose from {list(known)}"
                         f"{did_you_mean(nearest(unknown[0], known))}")
    return sum(known[name] for name in names)


@dataclass(frozen=True)
class FeatureSpec:
    """Which features a network sees: what MeshSpec (of faces) and SurfaceSpec (of vertices) have in common.

    up: the axis that points up in the files, z or y; auto: y in a .glb, as glTF has it, else z. Meshes whose y points
    up are turned. Raises ValueError for features that are unknown, none or named twice.
    """

    features: tuple[str, ...]
    up: str = field(default="auto", kw_only=True)

    known: ClassVar[Mapping[str, int]] = FEATURES
    where: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not self.feature_dim or len(set(self.features)) < len(self.features):
            raise ValueError(f"model.features={list(self.features)}: expected one feature or more, each named once")
        check_choice("data.up", self.up, UP)

    @property
    def feature_dim(self) -> int:
        return feature_width(self.features, self.known, self.where)

    def check(self, feature_dim: int | None, rotation: str) -> None:
        """ValueError where a config's model.feature_dim says something else (None says nothing), and where its
        augmentation.mode `rotation` turns meshes about whose features need upright."""
        upright = [name for name in UPRIGHT if name in self.features]
        if upright and rotation == "so3":
            raise ValueError(f"the feature {upright[0]} needs meshes whose z axis points up: set augmentation.mode to "
                             f"z or none")
        if feature_dim not in (None, self.feature_dim):
            raise ValueError(f"model.feature_dim={feature_dim}, but model.features {list(self.features)} are "
                             f"{self.feature_dim} wide; correct one of them (feature_dim may be left out)")

    def z_up(self, vertices: np.ndarray, path: str | Path) -> np.ndarray:
        """vertices (V, 3) of the file at `path`, turned about x where its y points up."""
        if self.up == "y" or (self.up == "auto" and Path(path).suffix.lower() == ".glb"):
            return z_up(vertices)
        return vertices

    def to_dict(self) -> dict:
        return {**asdict(self), "features": list(self.features)}


def normalize_vertices(vertices: np.ndarray, faces: np.ndarray, unit: float | None = None) -> np.ndarray:
    """Centre the mesh and divide by ONE length. vertices (V, 3) float64 -> (V, 3) float64.

    unit None: area-weighted centre and sqrt(total area), which, unlike a bounding box, neither a rotation nor a pose
    changes. unit in metres (10 for a house, 50 for a city tile): absolute size is information there; only the centre is
    taken off. A mesh without area falls back to its mean corner and its largest coordinate. Vertices that no face uses
    count for nothing.
    """
    origin = vertices.take(faces, 0).reshape(-1, 3).mean(0)            # float64: a UTM offset of 5e6 m costs no digits
    radius = np.abs(vertices.take(faces, 0) - origin).max() or 1.0
    vertices = (vertices - origin) / radius
    corner = vertices.take(faces, 0)                                            # (F, 3, 3)
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1) / 2
    total = area.sum()
    scale = 1.0
    if total > TINY:
        vertices = vertices - area @ (corner[:, 0] + corner[:, 1] + corner[:, 2]) / (3 * total)
        scale = np.sqrt(total)
    return vertices * (radius / unit) if unit else vertices / scale


def weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge vertices of exactly equal position (STL, UV seams), so that neighbours are found. Faces stay in order."""
    order = np.lexsort(vertices.T)
    ordered = vertices[order]
    is_new = np.ones(len(vertices), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    if is_new.all():
        return vertices, faces
    index = np.empty(len(vertices), np.int64)
    index[order] = np.cumsum(is_new) - 1
    return ordered[is_new], index[faces]


def face_neighbors(faces: np.ndarray) -> np.ndarray:
    """The face over each edge (0-1, 1-2, 2-0). faces (F, 3) -> (F, 3) int64, -1 unless two faces alone share the edge.

    A face that names a vertex twice has an edge twice; it is not its own neighbour.
    """
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()              # (3F,), edges 3f..3f+2 of face f
    key = np.minimum(start, end) * (int(faces.max(initial=0)) + 1) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    key = key[order]
    start = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    count = np.diff(np.r_[start, len(key)])
    first, second = order[start[count == 2]], order[start[count == 2] + 1]
    neighbor = np.full(faces.size, -1, np.int64)
    neighbor[first], neighbor[second] = second // 3, first // 3
    neighbor[neighbor == np.arange(faces.size) // 3] = -1
    return neighbor.reshape(-1, 3)


def face_geometry(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre (F, 3), unit normal (F, 3; 0 for a face without area) and area (F,) of every face."""
    corner = vertices.take(faces, 0)                                            # (F, 3, 3)
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    length = np.linalg.norm(normal, axis=1)
    unit = np.divide(normal, length[:, None], out=np.zeros_like(normal), where=length[:, None] > TINY)
    return (corner[:, 0] + corner[:, 1] + corner[:, 2]) / 3, unit, length / 2


def face_features(vertices: np.ndarray, faces: np.ndarray, names, neighbors: np.ndarray | None = None,
                  hks: np.ndarray | None = None, plane: np.ndarray | None = None) -> np.ndarray:
    """The columns of `names`, in the order of FEATURES: vertices (V, 3) normalised, faces (F, 3) -> (F, Dg) float32.

    neighbors (F, 3) from `face_neighbors` is needed for "dihedral", "part" and "height", hks (F, 16) from
    `heat_kernel_signature` for "hks", plane (F,) from `data.mesh_planes.plane_units` for "plane" and "height".
    All values are finite. How much of a mesh moved by 1e6 diameters or scaled is left as rounding: tests, about 1e-4.
    """
    vertices = vertices.astype(np.float32, copy=False)
    corner = vertices.take(faces, 0)                                            # (F, 3, 3)
    centroid, normal, area = face_geometry(vertices, faces)
    columns = []
    if "centroid" in names:
        columns.append(centroid)
    if "corners" in names:
        columns.append((corner - centroid[:, None]).reshape(-1, 9))
    if "normal" in names:
        columns.append(normal)
    if "area" in names:
        mean = area.mean() if len(area) else 0.0
        columns.append(np.log(np.maximum(area, TINY) / max(mean, TINY)).clip(-10, 10)[:, None])
    if "angles" in names:
        columns.append(np.sort(_inner_angles(corner, area), axis=1) / np.pi)
    if "curvature" in names:
        columns.append(np.sort(_corner_curvature(faces, normal, area, len(vertices)), axis=1))
    if "dihedral" in names:
        columns.append(_dihedral(corner, normal, centroid, neighbors))
    if "ground" in names:
        columns.append(_ground(centroid, normal, area))
    if "plane" in names:
        columns += [piece_sizes(corner, area, plane)[:, :3], piece_borders(corner, faces, area, plane)]
    part = connected_parts(neighbors) if {"part", "height"} & set(names) else None
    if "part" in names:
        columns += [piece_sizes(corner, area, part), piece_borders(corner, faces, area, part)]
    if "height" in names:
        columns.append(piece_heights(corner, [plane, part]))
    if "hks" in names:
        columns.append(hks)
    features = np.concatenate(columns, axis=1, dtype=np.float32)
    assert np.isfinite(features).all(), "a face feature is not finite"
    return features


def _inner_angles(corner, area):
    edge = np.roll(corner, -1, axis=1) - corner                                 # (F, 3, 3): 0->1, 1->2, 2->0
    cosine = -(edge * np.roll(edge, 1, axis=1)).sum(2)                          # times both lengths, as the sine
    return np.arctan2(2 * area[:, None], cosine)                                # (F, 3), 0 at a collapsed edge


def _corner_curvature(faces, normal, area, num_vertices):
    weighted = normal * area[:, None]
    total = np.stack([np.bincount(faces.ravel(), np.repeat(weighted[:, k], 3), num_vertices) for k in range(3)], axis=1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    vertex_normal = np.divide(total, length, out=np.zeros_like(total), where=length > TINY).astype(np.float32)
    return np.einsum("fkd,fd->fk", vertex_normal[faces], normal)                # (F, 3) in [-1, 1]


def _dihedral(corner, normal, centroid, neighbors):
    open_edge = neighbors < 0                                                   # (F, 3): boundary or non-manifold
    other = np.where(open_edge, 0, neighbors)
    own, across = normal[:, None], normal[other]                                # (F, 1, 3), (F, 3, 3)
    angle = 2 * np.arctan2(np.linalg.norm(own - across, axis=2), np.linalg.norm(own + across, axis=2))  # exact near 0
    middle = (corner + np.roll(corner, -1, axis=1)) / 2                         # (F, 3, 3) middle of each edge
    concave = np.einsum("fd,fkd->fk", normal, centroid[other] - middle) > 0
    flat = open_edge | ~normal.any(1, keepdims=True) | ~across.any(2)           # a face without area has no normal
    angle = np.where(flat, 0.0, np.where(concave, -angle, angle)) / np.pi       # (F, 3) in [-1, 1]
    return np.concatenate([np.sort(angle, axis=1), open_edge.mean(1, keepdims=True)], axis=1)


def _ground(centroid, normal, area):
    """Height over the ground, slope (0 up, 1/2 a wall, 1 down) and roughness of the faces, (F, 3); lengths as vertices.

    The ground is the plane of an asymmetric least-squares fit to the face centres, weighted by area: what lies above
    pulls with 1/99 of the force of what lies below (expectiles, Newey and Powell 1987), so roofs hardly lift it.
    Roughness is the standard deviation of the heights around a face. Deviation from the usual search of a kd-tree (all
    faces within 5 % of the diagonal): neighbours count with the bilinear weights of an x-y grid of that spacing, which
    costs O(F) whatever the density of the mesh. A turn about z changes neither height nor slope, roughness a little.
    """
    centroid = centroid.astype(np.float64) - centroid.mean(0, dtype=np.float64)
    extent = np.sqrt((centroid**2).sum(1).max(initial=0.0)) or 1.0
    x, y, z = centroid.T / extent                                               # (F,) each, in [-1, 1]
    design = np.stack([x, y, np.ones_like(z)], axis=1)
    weight = area / area.sum() if area.any() else np.full(len(area), 1 / max(len(area), 1))
    above = np.zeros(len(z), bool)
    for _ in range(50):                                                         # ends after about 5
        weighted = design * (weight * np.where(above, GROUND_ABOVE, GROUND_BELOW))[:, None]
        # The 1e-4 keeps the plane of a single wall, or of a line, level across it.
        plane = np.linalg.solve(weighted.T @ design + np.diag([1e-4, 1e-4, TINY]), weighted.T @ z)
        height = z - design @ plane
        if np.array_equal(above, height > 0):
            break
        above = height > 0

    u, v = x / (2 * GROUND_CELL), y / (2 * GROUND_CELL)
    cells = int(np.ceil(0.5 / GROUND_CELL)) + 1                                 # on each side of the middle
    nodes, shares = [], []
    for i in (0, 1):
        for j in (0, 1):
            nodes.append(((np.floor(u) + i + cells) * (2 * cells + 1) + np.floor(v) + j + cells).astype(np.int64))
            shares.append(np.abs(1 - i - u % 1) * np.abs(1 - j - v % 1))
    moments = [np.bincount(np.concatenate(nodes), np.concatenate([s * m for s in shares]), (2 * cells + 1) ** 2)
               for m in (np.ones_like(z), z, z**2)]
    count, mean, square = (sum(s * m[n] for n, s in zip(nodes, shares, strict=True)) for m in moments)
    roughness = np.sqrt(np.maximum(square / count - (mean / count) ** 2, 0))
    slope = np.arctan2(np.hypot(normal[:, 0], normal[:, 1]), normal[:, 2]) / np.pi
    return np.stack([height * extent, slope, roughness * extent], axis=1)


# -- heat kernel signature ---------------------------------------------------------------------------------------------

def cotangent_laplacian(vertices: np.ndarray, faces: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """Positive semi-definite cotangent stiffness matrix (V, V), lumped vertex areas (V,) (Pinkall and Polthier 1993).

    Deviation: cotangents are cut at 20 (`corner_cotangents`).
    """
    num_vertices = len(vertices)
    cotangent, doubled_area = corner_cotangents(vertices, faces, MAX_COTANGENT)
    i, j = faces[:, [1, 2, 0]].T.ravel(), faces[:, [2, 0, 1]].T.ravel()         # the edge opposite of each corner
    weight = cotangent.T.ravel() / 2
    adjacency = sp.coo_matrix((np.r_[weight, weight], (np.r_[i, j], np.r_[j, i])), (num_vertices,) * 2).tocsr()
    stiffness = sp.diags(np.asarray(adjacency.sum(1)).ravel()) - adjacency
    mass = np.bincount(faces.ravel(), np.repeat(doubled_area / 6, 3), num_vertices)
    return stiffness.tocsr(), mass


def heat_kernel_signature(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """log of the scale-invariant heat kernel signature (Sun, Ovsjanikov, Guibas 2009), mean of the three corners.

    vertices (V, 3), faces (F, 3) -> (F, 16) float32. Every connected component is solved on its own, scaled to area 1;
    the 16 times are log-spaced from 4 ln 10 / lambda_max to 4 ln 10 / lambda_min; each time is divided by the heat
    trace. Components of fewer than 8 vertices, or where the solver fails, get 0 (the value of a constant signature).
    Of a component of more than 60,000 vertices only 64 eigenpairs are computed, and lambda_max is estimated from them.
    Raises ValueError for a mesh of more than 250,000 vertices.
    """
    if len(vertices) > HKS_LARGEST:
        raise ValueError(f"heat-kernel signatures of {len(vertices)} vertices take minutes (limit {HKS_LARGEST}); "
                         f"take \"hks\" out of model.features or simplify the mesh")
    signature = np.zeros((len(vertices), HKS_TIMES))
    for members, part in component_parts(faces, len(vertices), at_least=8):
        signature[members] = _component_signature(vertices[members], part)
    return signature[faces].mean(1).astype(np.float32)


def _component_signature(vertices, faces):
    stiffness, mass = cotangent_laplacian(vertices, faces)
    total = mass.sum()
    if total <= 0:
        return 0.0
    inverse_root = 1 / np.sqrt(np.maximum(mass / total, 1e-9))                  # area 1; stiffness has no unit
    symmetric = sp.diags(inverse_root) @ stiffness @ sp.diags(inverse_root)
    fewer = len(vertices) > ALL_PAIRS_UP_TO
    k = FEWER_PAIRS if fewer else min(HKS_EIGENPAIRS, len(vertices) - 1)
    try:
        value, vector = smallest_eigenpairs(symmetric, k, sigma=-1e-3, ordered=fewer)
    except (np.linalg.LinAlgError, RuntimeError):                               # ARPACK errors are RuntimeErrors
        return 0.0
    keep = value > 1e-6
    if keep.sum() < 4:
        return 0.0
    value, squared = value[keep], (vector[:, keep] * inverse_root[:, None]) ** 2            # (K,), (V, K)
    largest = value.max() * (HKS_EIGENPAIRS - 1) / len(value) if fewer else value.max()      # Weyl: they grow linearly
    times = np.geomspace(4 * np.log(10) / largest, 4 * np.log(10) / value.min(), HKS_TIMES)
    decay = np.exp(-value[:, None] * times)                                     # (K, 16)
    return np.log(np.maximum(squared @ decay / decay.sum(0), 1e-6))


# -- targets of pre-training -------------------------------------------------------------------------------------------

def surface_descriptors(vertices: np.ndarray, faces: np.ndarray, hks: np.ndarray) -> np.ndarray:
    """What lies around a face, near and far: its heat-kernel signature, and the signature averaged over surroundings of
    growing radius. vertices (V, 3), faces (F, 3), hks (F, 16) -> (F, 64) float32.

    The average is one implicit step of heat diffusion on the surface, (M + t L) x = M signature with t = radius^2 / 4
    (the step of Crane et al. 2013, "Geodesics in Heat"); what is not connected does not mix.
    """
    stiffness, mass = cotangent_laplacian(vertices.astype(np.float64), faces)
    weight = face_geometry(vertices, faces)[2].astype(np.float64) + TINY        # (F,)
    total = np.bincount(faces.ravel(), np.repeat(weight, 3), len(mass))
    signature = np.stack([np.bincount(faces.ravel(), np.repeat(weight * column, 3), len(mass)) for column in hks.T],
                         axis=1) / np.maximum(total, TINY)[:, None]             # (V, 16)
    area = mass.sum()
    if area <= 0:
        return np.tile(hks, len(HEAT_RADII) + 1)
    mass = np.maximum(mass, 1e-9 * area / len(mass))                            # unused vertices have none
    out = [hks]
    for radius in HEAT_RADII:
        step = splu((sp.diags(mass) + radius**2 / 4 * area * stiffness).tocsc())
        out.append(step.solve(mass[:, None] * signature)[faces].mean(1))
    return np.concatenate(out, axis=1, dtype=np.float32)
