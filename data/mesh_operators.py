"""Operators on the vertices of a triangle mesh: areas, Laplacian, its eigenpairs, gradients, heat-kernel signature.

What models/diffusion_net.py works with, as the network's paper prepares a mesh (Sharp, Attaiki, Crane and Ovsjanikov,
"DiffusionNet: Discretization Agnostic Learning on Surfaces", ACM Transactions on Graphics 41(3), 2022; reference code
github.com/nmwsharp/diffusion-net, MIT): positions in the unit ball, the plain cotangent Laplacian, lumped areas. The
weights of its authors were trained on exactly these numbers. Deviations, none of which changes a label on clean meshes:
cotangents above 1000 are cut (`corner_cotangents`), stray specks do not decide about centre and scale
(`center_and_radius`), vertices that no face uses are left out of everything, and every connected component is solved
on its own.

Input positions are float64 or float32, results float32, linear algebra float64. All functions are deterministic: equal
input gives equal bits, in any process. V vertices, F faces, k eigenpairs, E entries of a gradient matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import eigh
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from threadpoolctl import threadpool_limits

from utils.memory import check_memory

OPERATORS_VERSION = 1           # of what is cached: raise it when mesh_operators computes something else
NUM_EIGENPAIRS = 128            # what the official weights were trained with
DENSE_BELOW = 1000              # vertices; a dense solve is faster and exact here
ALL_PAIRS_UP_TO = 60_000        # vertices; 128 pairs of them take about 12 CPU seconds, of 250,000 more than a minute
FEWER_PAIRS = 64                # beyond that
LARGEST = 250_000               # vertices
BYTES_A_VERTEX = 6_000          # of the eigensolver (measured: 0.35 GiB for 60,000 vertices, 1.4 GiB for 250,000)
MAX_COTANGENT = 1000.0          # of an angle of 0.06 degrees
MAIN_PART = 0.95                # of the area: what lies outside the largest components that hold it may be stray
STRAY_BEYOND = 1.05             # times the radius of the main part
TINY = 1e-30

# Constants of the reference code; its weights hang on them.
DIAGONAL = 1e-8                 # added to the diagonal of the Laplacian
MASS_FLOOR = 1e-8               # of the mean vertex area, added to every vertex area
GRADIENT_DAMPING = 1e-5         # added to the diagonal of the 2 x 2 normal equations, in squared lengths (unit ball)
NORMAL_EPS = 1e-6               # added to lengths before dividing by them
SHIFT = -1e-2                   # of the eigensolver: the matrix it factors is positive definite, and far from singular


class MeshOperators(NamedTuple):
    """What `mesh_operators` makes of a mesh of V vertices. float32 unless said otherwise.

    vertices (V, 3) in the unit ball; normals (V, 3) unit; mass (V,) vertex areas; eigenvalues (k,) ascending, of
    1 / length^2; eigenvectors (V, k) with x^T M x = 1; gradient_index (2, E) int32 rows and columns, sorted;
    gradient_x, gradient_y (E,): derivatives along the two axes of a vertex's tangent plane, in 1 / length; note: what
    was unusual about the mesh, for the user to read, or "". A vertex that no face uses lies at 0 and has no area.
    """

    vertices: np.ndarray
    normals: np.ndarray
    mass: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    gradient_index: np.ndarray
    gradient_x: np.ndarray
    gradient_y: np.ndarray
    note: str = ""


def mesh_operators(vertices: np.ndarray, faces: np.ndarray, num_eigenpairs: int = NUM_EIGENPAIRS) -> MeshOperators:
    """vertices (V, 3) in any unit, faces (F, 3) with consistent winding if there is one -> MeshOperators.

    Weld the mesh first (data/mesh_features.weld): every vertex of a triangle soup is a component of its own. Fewer
    vertices than eigenpairs give one pair a vertex. Beyond 60,000 vertices there are 64 eigenpairs at most, and `note`
    gives the error: by the law of Weyl, what the missing pairs add to the signature is estimated at its smallest time.
    Raises ValueError for more than 250,000 vertices, for more than memory holds, and where the eigensolver fails.
    """
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    if used.sum() > LARGEST:
        raise ValueError(f"operators of {used.sum():,} vertices take minutes and gigabytes (limit {LARGEST:,}); "
                         f"simplify the mesh")
    check_memory(BYTES_A_VERTEX * int(used.sum()), torch.device("cpu"), f"the eigensolver for {used.sum():,} vertices",
                 "simplify the mesh")
    number = np.cumsum(used) - 1
    faces = number[faces]
    unit_ball, note = unit_ball_positions(vertices[used], faces)
    position = unit_ball.astype(np.float64)
    k = num_eigenpairs if len(position) <= ALL_PAIRS_UP_TO else min(num_eigenpairs, FEWER_PAIRS)
    stiffness, mass = laplacian(position, faces)
    eigenvalues, eigenvectors = eigenpairs(stiffness, mass, faces, k)
    if k < min(num_eigenpairs, len(position)):
        note = "; ".join(filter(None, (note, _missing_pairs(eigenvalues, num_eigenpairs, len(position)))))
    frames = vertex_frames(position, faces)
    row, column, along_x, along_y = gradient(position, frames, stiffness)

    def put_back(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(vertices), *values.shape[1:]), np.float32)
        out[used] = values
        return out

    normals = put_back(frames[:, 2])
    normals[~used] = (0, 0, 1)
    original = np.flatnonzero(used).astype(np.int32)
    return MeshOperators(put_back(unit_ball), normals, put_back(mass), eigenvalues.astype(np.float32),
                         put_back(eigenvectors), np.stack([original[row], original[column]]),
                         along_x.astype(np.float32), along_y.astype(np.float32), note)


def _missing_pairs(eigenvalues: np.ndarray, wanted: int, num_vertices: int) -> str:
    """eigenvalues grow in proportion to their number (Weyl): what the pairs beyond the last add to the mean signature
    at its smallest time, as a share of the whole."""
    slope, shortest = eigenvalues[-1] / len(eigenvalues), signature_times()[0]
    kept = np.exp(-eigenvalues * shortest).sum()
    missing = np.exp(-slope * shortest * np.arange(len(eigenvalues) + 1, wanted + 1)).sum()
    return (f"{num_vertices:,} vertices: {len(eigenvalues)} eigenpairs instead of {wanted}, by which the heat-kernel "
            f"signature is about {missing / (kept + missing):.1%} too small at its smallest time")


# -- positions ---------------------------------------------------------------------------------------------------------

def unit_ball_positions(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, str]:
    """Positions (V, 3) float32 in the unit ball about 0, and `center_and_radius`'s line for the user."""
    center, radius, _ = center_and_radius(vertices, faces)
    # An offset of more than half the size goes off in float64; without one, 32 bits come first, as in the reference
    # code: the diagonal of a gradient is a sum in which 1e-7 counts. A power of two moves no bit of 32-bit positions.
    vertices = (vertices - np.rint(center / radius) * radius) / 2.0 ** np.rint(np.log2(radius))
    vertices = vertices.astype(np.float32).astype(np.float64)
    center, radius, note = center_and_radius(vertices, faces)
    return ((vertices - center) / radius).astype(np.float32), note


def center_and_radius(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, float, str]:
    """Mean (3,) float64 of the vertices in use, their largest distance from it, and a line for the user or "".

    Deviation from the reference code, which takes all vertices: where the components beyond the largest ones, those
    that together hold 95 % of the area, stick out by more than a twentieth, the largest ones alone decide. A speck two
    radii away halves the scale of the body, and takes the official network from 90 to 47 per cent. A mesh of one point
    has radius 1.
    """
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    center, radius = _ball(vertices[used])
    count, component = vertex_components(faces, len(vertices))
    if count == 1 or not len(faces):
        return center, radius, ""
    area = np.bincount(component[faces[:, 0]], _doubled_area(vertices[faces] - center), count)
    order = np.argsort(-area, kind="stable")
    main = np.zeros(count, bool)
    main[order[:1 + np.searchsorted(np.cumsum(area[order]), MAIN_PART * area.sum())]] = True
    body = used & main[component]
    body_center, body_radius = _ball(vertices[body])
    outside = used & ~body
    reach = np.linalg.norm(vertices[outside] - body_center, axis=1).max(initial=0.0)
    if not area.any() or reach <= STRAY_BEYOND * body_radius:
        return center, radius, ""
    return body_center, body_radius, (
        f"{outside.sum()} of {used.sum()} vertices are stray parts, up to {reach / body_radius:.1f} radii from the "
        f"body's centre: centre and scale are those of the body; remove them")


def _ball(vertices):
    # float64: an offset of 5e6 m costs no digits
    center = vertices.mean(0, dtype=np.float64) if len(vertices) else np.zeros(3)
    return center, float(np.linalg.norm(vertices - center, axis=1).max(initial=0.0)) or 1.0


def _doubled_area(corner: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)


def rotation_from_uniforms(uniforms: np.ndarray) -> np.ndarray:
    """Three numbers (3,), uniform in 0..1 -> rotation (3, 3), uniform over all (Arvo, "Fast Random Rotation Matrices",
    Graphics Gems III, 1992): a turn about z, then a reflection that takes the pole to a random place, times -1.

    Applied as `vertices @ rotation`, it is the augmentation of the official coordinates network.
    """
    turn, around, height = uniforms * (2 * np.pi, 2 * np.pi, 2)
    about_z = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    axis = np.array([np.sin(around) * np.sqrt(height), np.cos(around) * np.sqrt(height), np.sqrt(2 - height)])
    return (np.outer(axis, axis) - np.eye(3)) @ about_z


# -- Laplacian ---------------------------------------------------------------------------------------------------------

def corner_cotangents(vertices: np.ndarray, faces: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents (F, 3) at the corners of every face, and twice its area (F,).

    A cotangent above `largest` becomes `largest`, so that a needle or a face without area cannot swallow the spectrum,
    and the smallest of that face what cot A cot B + cot B cot C + cot C cot A = 1 then gives, so that the Laplacian
    stays semi-definite.
    """
    corner = vertices.take(faces, 0)
    along = [(corner[:, (k + 1) % 3] - corner[:, k], corner[:, (k + 2) % 3] - corner[:, k]) for k in range(3)]
    doubled_area = np.linalg.norm(np.cross(*along[0]), axis=1)
    exact = np.stack([(a * b).sum(1) for a, b in along], axis=1) / np.maximum(doubled_area, TINY)[:, None]
    cotangent = np.minimum(exact, largest)
    needle = (exact > largest).any(1)
    larger = np.sort(cotangent[needle], axis=1)[:, 1:]
    cotangent[needle, exact[needle].argmin(1)] = (1 - larger.prod(1)) / larger.sum(1)
    return cotangent, doubled_area


def laplacian(vertices: np.ndarray, faces: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """Cotangent stiffness matrix (V, V) and lumped vertex areas (V,) (Pinkall and Polthier 1993), float64.

    The matrix is positive semi-definite; weights of obtuse angles stay negative, and entries that sum to 0 stay in the
    pattern, which is every ordered pair of vertices of a face and the diagonal. A mesh without area gets equal areas.
    """
    cotangent, doubled_area = corner_cotangents(vertices, faces, MAX_COTANGENT)
    i, j = faces[:, [1, 2, 0]].T.ravel(), faces[:, [2, 0, 1]].T.ravel()         # the edge opposite of each corner
    weight = cotangent.T.ravel() / 2
    stiffness = sp.coo_matrix((np.r_[-weight, -weight, weight, weight], (np.r_[i, j, i, j], np.r_[j, i, i, j])),
                              (len(vertices),) * 2).tocsr()
    mass = np.bincount(faces.ravel(), np.repeat(doubled_area / 6, 3), len(vertices))
    if not mass.any():
        return stiffness, np.full(len(vertices), 1 / max(len(vertices), 1))
    return stiffness, mass + MASS_FLOOR * mass.mean()


# -- eigenpairs --------------------------------------------------------------------------------------------------------

def vertex_components(faces: np.ndarray, num_vertices: int) -> tuple[int, np.ndarray]:
    """Number of connected components and the component (V,) of every vertex; unused vertices are one each."""
    edges = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = sp.coo_matrix((np.ones(len(edges)), edges.T), shape=(num_vertices,) * 2)
    return connected_components(graph, directed=False)


def component_parts(faces: np.ndarray, num_vertices: int,
                    at_least: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(members (Vc,), their faces (Fc, 3) counted within them) of every connected component of at_least vertices."""
    count, component = vertex_components(faces, num_vertices)
    by_component = np.argsort(component, kind="stable")
    bounds = np.searchsorted(component[by_component], np.arange(count + 1))
    faces_by_component = np.argsort(component[faces[:, 0]], kind="stable")
    face_bounds = np.searchsorted(component[faces[faces_by_component, 0]], np.arange(count + 1))
    local = np.empty(num_vertices, np.int64)
    for c in np.flatnonzero(np.diff(bounds) >= at_least):
        members = by_component[bounds[c]:bounds[c + 1]]
        local[members] = np.arange(len(members))
        yield members, local[faces[faces_by_component[face_bounds[c]:face_bounds[c + 1]]]]


def smallest_eigenpairs(symmetric: sp.spmatrix, k: int, sigma: float,
                        ordered: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest eigenvalues (k,), ascending, and unit eigenvectors (V, k) of a semi-definite matrix (V, V).

    Dense below 1,000 vertices, else Lanczos around the shift sigma < 0 from a fixed start vector. ordered: factor with
    a minimum-degree ordering, a fifth faster than SciPy's own choice. Raises LinAlgError or ArpackError.
    """
    if symmetric.shape[0] < DENSE_BELOW or k >= symmetric.shape[0]:
        with threadpool_limits(1):                          # too small for threads; loaders run beside one another
            return eigh(symmetric.toarray(), subset_by_index=[0, k - 1])
    matrix, start, inverse = symmetric.tocsc(), np.cos(np.arange(symmetric.shape[0])), None
    if ordered:
        factor = splu((matrix - sigma * sp.eye(len(start))).tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0,
                      options={"SymmetricMode": True})
        inverse = LinearOperator(matrix.shape, matvec=factor.solve, dtype=np.float64)
    return eigsh(matrix, k=k, sigma=sigma, which="LM", v0=start, OPinv=inverse)


def eigenpairs(stiffness: sp.csr_matrix, mass: np.ndarray, faces: np.ndarray,
               num_eigenpairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest solutions of (L + 1e-8 I) x = lambda M x: lambda (k,) >= 0 ascending, x (V, k) with x^T M x = 1.

    k is num_eigenpairs, or V where there are fewer vertices. The constant vector is among them, once a component. Sign,
    and rotations inside equal eigenvalues, are arbitrary, but the same every time. Every component of the mesh is
    solved on its own: a solver that does not know them may miss one of many equal eigenvalues. Raises ValueError where
    the solver fails.
    """
    inverse_root = 1 / np.sqrt(mass)
    matrix = sp.diags(inverse_root) @ (stiffness + DIAGONAL * sp.eye(len(mass))) @ sp.diags(inverse_root)
    matrix, values, solved = matrix.tocsr(), [], []
    for members, _ in component_parts(faces, len(mass)):
        k = min(num_eigenpairs, len(members))
        try:
            value, vector = smallest_eigenpairs(matrix[members][:, members], k, SHIFT)
        except (np.linalg.LinAlgError, RuntimeError) as error:          # ARPACK errors are RuntimeErrors
            raise ValueError(f"no eigenpairs of a component of {len(members)} vertices ({error}); repair or simplify "
                             f"the mesh") from error
        values.append(value)
        solved.append((members, vector * inverse_root[members, None]))
    owner = np.repeat(np.arange(len(values)), [len(value) for value in values])
    column = np.concatenate([np.arange(len(value)) for value in values])
    value = np.concatenate(values)
    smallest = np.argsort(value, kind="stable")[:num_eigenpairs]
    out = np.zeros((len(mass), len(smallest)))
    for c, (members, vector) in enumerate(solved):
        chosen = np.flatnonzero(owner[smallest] == c)
        if len(chosen):
            out[members[:, None], chosen] = vector[:, column[smallest[chosen]]]
    return np.maximum(value[smallest], 0), out


# -- gradient ----------------------------------------------------------------------------------------------------------

def vertex_frames(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Axes X, Y and normal N of every vertex, as rows: (V, 3, 3), right-handed, Y = N x X.

    N is the sum of the unit normals of the faces, whatever their size, to length 1; (0, 0, 1) where it vanishes (the
    reference code draws one). X is the first world axis, or the second where N is close to the first, taken into the
    plane of N. The network does not depend on X.
    """
    corner = vertices[faces]
    normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + NORMAL_EPS
    total = np.stack([np.bincount(faces.ravel(), np.repeat(normal[:, d], 3), len(vertices)) for d in range(3)], axis=1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    normal = np.where(length > TINY, total / np.maximum(length, TINY), (0.0, 0.0, 1.0))
    axis = np.where(np.abs(normal[:, :1]) < 0.9, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    x = axis - normal * (normal * axis).sum(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + NORMAL_EPS
    return np.stack([x, np.cross(normal, x), normal], axis=1)


def gradient(vertices: np.ndarray, frames: np.ndarray,
             pattern: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The gradient of a function on the vertices as two matrices of one pattern: rows (E,), columns (E,), values along
    X (E,), values along Y (E,); sorted by row, then column.

    At a vertex it is the least-squares fit to the differences to its neighbours (all of equal weight) in the tangent
    plane of `frames`, with 1e-5 on the diagonal of the normal equations. pattern (V, V): `laplacian`'s.
    """
    row = np.repeat(np.arange(len(vertices)), np.diff(pattern.indptr))
    column = pattern.indices
    edge = vertices[column] - vertices[row]                                      # 0 on the diagonal: adds nothing
    x, y = ((frames[row, axis] * edge).sum(1) for axis in (0, 1))
    xx, xy, yy = (np.bincount(row, product, len(vertices)) for product in (x * x, x * y, y * y))
    xx, yy = xx + GRADIENT_DAMPING, yy + GRADIENT_DAMPING
    determinant = (xx * yy - xy * xy)[row]
    along_x = (yy[row] * x - xy[row] * y) / determinant
    along_y = (xx[row] * y - xy[row] * x) / determinant
    diagonal = row == column
    along_x[diagonal] = -np.bincount(row, along_x, len(vertices))[row[diagonal]]
    along_y[diagonal] = -np.bincount(row, along_y, len(vertices))[row[diagonal]]
    return row, column, along_x, along_y


# -- signature ---------------------------------------------------------------------------------------------------------

def signature_times(count: int = 16) -> np.ndarray:
    """Times (count,) of the signature, evenly spaced in the logarithm from 0.01 to 1, in squared lengths."""
    return np.logspace(-2, 0, count)


def plain_signature(eigenvalues: np.ndarray, eigenvectors: np.ndarray, count: int = 16) -> np.ndarray:
    """Heat-kernel signature (Sun, Ovsjanikov, Guibas 2009): sum over k of exp(-lambda_k t) x_k^2, (V, count) float32.

    eigenvalues (k,), eigenvectors (V, k). All pairs count, the constant one too; no logarithm, no division by the heat
    trace, times of `signature_times`. The "hks" of data/mesh_features.py is another one: scale-free, in the logarithm.
    """
    decay = np.exp(-eigenvalues[:, None].astype(np.float64) * signature_times(count))
    return (np.square(eigenvectors, dtype=np.float64) @ decay).astype(np.float32)
