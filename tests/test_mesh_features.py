"""Per-face features: hand-computed values, loops as oracles, invariances, and meshes nobody would call clean."""

import numpy as np
import pytest
import scipy.linalg
import trimesh
from scipy.spatial import cKDTree

import data.mesh_features as mesh_features
from data.mesh_features import (
    FEATURES,
    HKS_TIMES,
    cotangent_laplacian,
    face_features,
    face_geometry,
    face_neighbors,
    feature_width,
    heat_kernel_signature,
    normalize_vertices,
    surface_descriptors,
    weld,
)
from data.mesh_planes import plane_units

GEOMETRY = [name for name in FEATURES if name != "hks"]
TETRAHEDRON = (np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]]),
               np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]))
SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]]), np.array([[0, 1, 2], [0, 2, 3]])


def shape(mesh):
    return np.array(mesh.vertices, np.float64), np.array(mesh.faces, np.int64)


def cube():
    return shape(trimesh.creation.box())


def bumpy_sphere(subdivisions=2, seed=0):
    vertices, faces = shape(trimesh.creation.icosphere(subdivisions))
    return vertices * (1 + 0.1 * np.random.default_rng(seed).normal(size=(len(vertices), 1))), faces


def all_features(vertices, faces, names=GEOMETRY, unit=None):
    """What prepare_mesh and a data set do with a mesh, without a file."""
    vertices, faces = weld(vertices, faces)
    vertices = normalize_vertices(vertices, faces, unit)
    hks = heat_kernel_signature(vertices, faces) if "hks" in names else None
    return face_features(vertices, faces, names, face_neighbors(faces), hks, plane_units(vertices, faces, 0.5))


def feature(name, mesh, **settings):
    return all_features(*mesh, names=[name], **settings)


def nasty_mesh():
    """Everything a city model has: degenerate, duplicate, flipped and isolated faces, a fin, parts, a stray vertex."""
    vertices, faces = bumpy_sphere(1)
    V = len(vertices)
    extra = np.array([[3, 0, 0], [4, 0, 0], [3, 1, 0], [5, 0, 0], [4, 0, 1], [4, 0, -1], [900, 900, 900.0]])
    more = np.array([[0, 1, 2], [1, 2, 3], [1, 2, 0], [0, 0, 1], [2, 2, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]) + V
    return np.r_[vertices, extra], np.r_[faces, more, faces[:3], faces[4:6, ::-1]]


def flat_line():
    """No face has an area."""
    return np.array([[i, 2.0 * i, 0] for i in range(5)]), np.array([[0, 1, 2], [1, 2, 3], [2, 2, 4]])


# --- widths and columns ---------------------------------------------------------------------------------------------

def test_width_is_what_comes_out():
    for name, width in FEATURES.items():
        assert feature(name, cube()).shape == (12, width), name
        assert feature_width([name]) == width
    features = all_features(*cube(), names=[*FEATURES])
    assert features.shape == (12, feature_width(FEATURES)) and features.dtype == np.float32


def test_columns_come_in_the_order_of_FEATURES_whatever_the_order_asked_for():
    names = ["dihedral", "corners", "area"]
    np.testing.assert_array_equal(all_features(*cube(), names), all_features(*cube(), names[::-1]))
    np.testing.assert_array_equal(all_features(*cube(), names)[:, :9], feature("corners", cube()))


def test_unknown_feature_is_named():
    with pytest.raises(ValueError, match=r"unknown \['colour'\]; choose from \['centroid'"):
        feature_width(["area", "colour"])


# --- hand-computed values -------------------------------------------------------------------------------------------

def test_cube():
    mesh = cube()
    np.testing.assert_allclose(feature("angles", mesh), [[1 / 4, 1 / 4, 1 / 2]] * 12, atol=1e-6)
    np.testing.assert_allclose(feature("dihedral", mesh), [[0, 1 / 2, 1 / 2, 0]] * 12, atol=1e-6)
    np.testing.assert_allclose(feature("area", mesh), 0, atol=1e-6)
    np.testing.assert_allclose(feature("normal", mesh), mesh_normals(*mesh), atol=1e-6)
    centroid = feature("centroid", mesh)                                         # surface 6, so the half edge is
    np.testing.assert_allclose(np.abs(centroid).max(1), 0.5 / np.sqrt(6), rtol=1e-6)
    corners = feature("corners", mesh).reshape(12, 3, 3)
    np.testing.assert_allclose(corners.sum(1), 0, atol=1e-6)
    np.testing.assert_allclose(corners + centroid[:, None], mesh[0][mesh[1]] / np.sqrt(6), atol=1e-6)


def mesh_normals(vertices, faces):
    normals = [np.cross(b - a, c - a) for a, b, c in vertices[faces]]
    return [n / np.linalg.norm(n) for n in normals]


def test_tetrahedron_and_icosahedron():
    np.testing.assert_allclose(feature("angles", TETRAHEDRON), 1 / 3, atol=1e-6)
    np.testing.assert_allclose(feature("curvature", TETRAHEDRON), 1 / 3, atol=1e-6)
    np.testing.assert_allclose(feature("dihedral", TETRAHEDRON), [[np.arccos(-1 / 3) / np.pi] * 3 + [0]] * 4, atol=1e-6)
    icosahedron = shape(trimesh.creation.icosahedron())
    inradius = (3 + np.sqrt(5)) / np.sqrt(3) / 4 * 2 / np.sqrt((5 + np.sqrt(5)) / 2)     # to the circumradius
    np.testing.assert_allclose(feature("curvature", icosahedron), inradius, atol=1e-6)
    np.testing.assert_allclose(feature("dihedral", icosahedron), [[np.arccos(np.sqrt(5) / 3) / np.pi] * 3 + [0]] * 20,
                               atol=1e-6)


def test_flat_square():
    np.testing.assert_allclose(feature("normal", SQUARE), [[0, 0, 1]] * 2, atol=1e-6)
    np.testing.assert_allclose(feature("dihedral", SQUARE), [[0, 0, 0, 2 / 3]] * 2, atol=1e-6)
    np.testing.assert_allclose(feature("curvature", SQUARE), 1, atol=1e-6)
    np.testing.assert_allclose(feature("centroid", SQUARE), np.array([[1, -1, 0], [-1, 1, 0]]) / 6, atol=1e-6)


@pytest.mark.parametrize("degrees", [0.01, 30, 90, 179])
@pytest.mark.parametrize("side", [1, -1])
def test_two_triangles_with_a_known_dihedral(degrees, side):
    angle = np.radians(degrees)                          # the second wing turned down (a ridge) or up (a valley)
    vertices = np.array([[0, 0, 0], [0, 1, 0], [-1, 0.5, 0], [np.cos(angle), 0.5, -side * np.sin(angle)]])
    found = feature("dihedral", (vertices, np.array([[0, 1, 2], [1, 0, 3]])))
    expected = sorted([0, 0, side * degrees / 180])
    np.testing.assert_allclose(found, [[*expected, 2 / 3]] * 2, atol=2e-6)


def test_area_is_relative_to_the_mean_and_clipped():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0], [3, 0, 0], [0, 1, 0.0], [2, 2, 2]])
    faces = np.array([[0, 1, 2], [3, 4, 5]])                                     # areas 1/2 and 3/2, mean 1
    np.testing.assert_allclose(feature("area", (vertices, faces))[:, 0], np.log([0.5, 1.5]), atol=1e-6)
    flat = np.r_[faces, [[6, 6, 6]]]
    assert feature("area", (vertices, flat))[2, 0] == -10


def test_curvature_against_loops():
    vertices, faces = bumpy_sphere()
    total = np.zeros_like(vertices)
    normal = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    for face, n in zip(faces, normal, strict=True):
        total[face] += n
    total /= np.linalg.norm(total, axis=1, keepdims=True)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    expected = [sorted(total[face] @ n) for face, n in zip(faces, normal, strict=True)]
    np.testing.assert_allclose(feature("curvature", (vertices, faces)), expected, atol=1e-5)


# --- neighbours and welding -----------------------------------------------------------------------------------------

def neighbors_by_loops(faces):
    users = {}
    for f, face in enumerate(faces.tolist()):
        for k in range(3):
            users.setdefault(frozenset((face[k], face[k - 2])), []).append(f)
    answer = np.full(faces.shape, -1)
    for f, face in enumerate(faces.tolist()):
        for k in range(3):
            shared = users[frozenset((face[k], face[k - 2]))]
            if len(shared) == 2 and shared[0] != shared[1]:
                answer[f, k] = shared[0] if shared[1] == f else shared[1]
    return answer


@pytest.mark.parametrize("seed", range(5))
def test_neighbors_against_loops(seed):
    rng = np.random.default_rng(seed)                    # degenerate, duplicate and non-manifold faces among them
    faces = rng.integers(0, 12, (40, 3))
    np.testing.assert_array_equal(face_neighbors(faces), neighbors_by_loops(faces))


def test_neighbors_of_clean_and_nasty_meshes():
    np.testing.assert_array_equal(face_neighbors(SQUARE[1]), [[-1, -1, 1], [0, -1, -1]])
    faces = bumpy_sphere()[1]
    neighbors = face_neighbors(faces)
    assert (neighbors >= 0).all()
    assert all(f in neighbors[g] for f in range(len(faces)) for g in neighbors[f])
    faces = nasty_mesh()[1]
    np.testing.assert_array_equal(face_neighbors(faces), neighbors_by_loops(faces))
    np.testing.assert_array_equal(face_neighbors(np.array([[0, 1, 2]])), [[-1, -1, -1]])


def test_a_face_that_names_a_vertex_twice_is_not_its_own_neighbour():
    np.testing.assert_array_equal(face_neighbors(np.array([[0, 0, 1], [2, 3, 4]])), -np.ones((2, 3)))


def test_weld_makes_neighbours_of_triangle_soup():
    vertices, faces = cube()
    soup = vertices[faces].reshape(-1, 3)
    soup[soup == 0.5] += 0.0
    welded, new = weld(soup, np.arange(36).reshape(12, 3))
    assert len(welded) == 8
    np.testing.assert_array_equal(welded[new], vertices[faces])                  # faces in order, corners in order
    np.testing.assert_array_equal(face_neighbors(new), face_neighbors(faces))


def test_weld_takes_minus_zero_for_zero_and_leaves_clean_meshes_alone():
    vertices = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1], [-0.0, 1, -0.0], [5, 5, 5]])
    welded, faces = weld(vertices, np.array([[0, 1, 2], [3, 2, 4]]))
    assert len(welded) == 4 and faces[0, 0] == faces[1, 0]
    vertices, faces = cube()
    assert weld(vertices, faces)[0] is vertices and weld(vertices, faces)[1] is faces


# --- normalising and invariance -------------------------------------------------------------------------------------

def test_normalised_mesh_has_area_one_around_the_origin():
    vertices, faces = bumpy_sphere()
    normalized = normalize_vertices(vertices * [1, 2, 3] + 7, faces)
    centroid, _, area = face_geometry(normalized, faces)
    assert area.sum() == pytest.approx(1)
    np.testing.assert_allclose(area @ centroid, 0, atol=1e-12)
    ratio = np.ptp(normalized, axis=0) / np.ptp(vertices * [1, 2, 3], axis=0)
    np.testing.assert_allclose(ratio, ratio[0])                                  # one length for all axes


def test_a_vertex_no_face_uses_counts_for_nothing():
    vertices, faces = bumpy_sphere()
    stray = np.r_[vertices + 5e6, [[0, 0, 0]], [[9e9, 0, 0]]]                    # UTM, and two points left over
    np.testing.assert_allclose(normalize_vertices(stray, faces)[:-2], normalize_vertices(vertices, faces), atol=1e-8)


@pytest.mark.parametrize("shift, scale, tolerance", [
    (1e5, 1, 2e-5), (1e6, 1, 2e-4), (0, 1e3, 2e-5), (0, 1e-6, 2e-5), (-1e6, 1e3, 2e-5), (0, 1e150, 2e-5)])
def test_features_do_not_change_when_the_mesh_is_moved_or_scaled(shift, scale, tolerance):
    """The tolerance is absolute. At 1e6 the float64 coordinates of the file itself are good to 1e-10 only."""
    vertices, faces = bumpy_sphere()
    moved = all_features(vertices * scale + np.array([shift, -shift, shift / 3]), faces)
    np.testing.assert_allclose(moved, all_features(vertices, faces), atol=tolerance)


def test_rotation_moves_the_vectors_and_nothing_else():
    vertices, faces = bumpy_sphere()
    turn = trimesh.transformations.rotation_matrix(1.1, [1, 2, 3])[:3, :3]
    turned = vertices @ turn.T
    for name in ("area", "angles", "curvature", "dihedral", "plane", "part"):
        np.testing.assert_allclose(feature(name, (turned, faces)), feature(name, (vertices, faces)), atol=1e-5)
    for name in ("centroid", "normal"):
        np.testing.assert_allclose(feature(name, (turned, faces)), feature(name, (vertices, faces)) @ turn.T, atol=1e-5)


def test_mirrored_with_winding_turned_round_looks_the_same():
    vertices, faces = bumpy_sphere()
    mirrored, flipped = vertices * (-1, 1, 1), faces[:, ::-1]
    for name in ("area", "angles", "curvature", "dihedral", "plane", "part", "height"):
        np.testing.assert_allclose(feature(name, (mirrored, flipped)), feature(name, (vertices, faces)), atol=1e-6)
    expected = feature("normal", (vertices, faces)) * (-1, 1, 1)
    np.testing.assert_allclose(feature("normal", (mirrored, flipped)), expected, atol=1e-6)
    assert (feature("dihedral", (mirrored, faces)) < 0).any()                    # without it, inside out


def test_a_unit_in_metres_keeps_the_absolute_size():
    house, faces = cube()
    house = house * (8, 10, 6) + (690_000, 5_330_000, 500)
    extent = np.ptp(feature("centroid", (house, faces), unit=10.0), axis=0)
    np.testing.assert_allclose(extent, [0.8, 1.0, 0.6], atol=1e-6)
    np.testing.assert_allclose(feature("corners", (house * 2, faces), unit=10.0),
                               2 * feature("corners", (house, faces), unit=10.0), atol=1e-5)
    np.testing.assert_allclose(feature("corners", (house * 2, faces)), feature("corners", (house, faces)), atol=1e-5)
    vertices, faces = flat_line()                                                # a unit is a unit also without area
    assert np.ptp(normalize_vertices(vertices, faces, 10.0), axis=0) == pytest.approx([0.4, 0.8, 0])


def test_scaling_with_a_unit_keeps_what_has_no_length():
    mesh = bumpy_sphere()
    for name in ("normal", "area", "angles", "curvature", "dihedral"):
        np.testing.assert_allclose(feature(name, mesh, unit=50.0), feature(name, mesh), atol=1e-5)


# --- meshes nobody would call clean ---------------------------------------------------------------------------------

@pytest.mark.parametrize("mesh", [
    nasty_mesh(), flat_line(), (np.zeros((3, 3)), np.array([[0, 1, 2]])), (np.ones((1, 3)), np.array([[0, 0, 0]] * 9)),
    (SQUARE[0][:3], SQUARE[1][:1]), (np.r_[SQUARE[0], SQUARE[0] + 1e-9], np.r_[SQUARE[1], SQUARE[1] + 4]),
    (SQUARE[0] * 1e-200, SQUARE[1]), (SQUARE[0] * 1e200, SQUARE[1])])
@pytest.mark.parametrize("unit", [None, 10.0])
def test_every_feature_is_finite(mesh, unit):
    vertices, faces = mesh
    with np.errstate(all="raise", under="ignore"):
        features = all_features(vertices, faces, [*FEATURES], unit if np.abs(vertices).max() < 1e9 else None)
    assert features.shape == (len(faces), feature_width(FEATURES)) and np.isfinite(features).all()


def test_nasty_faces_do_not_change_the_clean_ones_of_another_part():
    vertices, faces = bumpy_sphere()
    extra = np.array([[0, 0, 5], [1, 0, 5], [0, 0, 5], [3, 0, 5.0]])             # a part without any area
    nasty = np.r_[faces, np.array([[0, 1, 2], [0, 1, 3]]) + len(vertices)]
    for name in ("angles", "normal", "curvature", "dihedral", "hks"):
        np.testing.assert_allclose(feature(name, (np.r_[vertices, extra], nasty))[:len(faces)],
                                   feature(name, (vertices, faces)), atol=1e-5)


def test_faces_without_area_have_no_normal_and_no_dihedral():
    vertices, faces = nasty_mesh()
    _, normal, area = face_geometry(vertices, faces)
    empty = area == 0
    assert empty.sum() == 3
    assert (normal[empty] == 0).all() and np.allclose(np.linalg.norm(normal[~empty], axis=1), 1)
    assert (all_features(vertices, faces, ["dihedral"])[empty, :3] == 0).all()


# --- heat kernel signature ------------------------------------------------------------------------------------------

def test_laplacian_of_a_square():
    stiffness, mass = cotangent_laplacian(*SQUARE)
    expected = np.array([[1, -0.5, 0, -0.5], [-0.5, 1, -0.5, 0], [0, -0.5, 1, -0.5], [-0.5, 0, -0.5, 1]])
    np.testing.assert_allclose(stiffness.toarray(), expected, atol=1e-12)        # cot 45 / 2; the diagonal faces cot 90
    np.testing.assert_allclose(mass, [1 / 3, 1 / 6, 1 / 3, 1 / 6])
    side = cotangent_laplacian(*TETRAHEDRON)[0].toarray()[0, 1]
    assert side == pytest.approx(-1 / np.sqrt(3))                                # two angles of 60 degrees


@pytest.mark.parametrize("mesh", [bumpy_sphere(), nasty_mesh(), flat_line(), (
    np.array([[0, 0, 0], [1, 0, 0], [0.5, 1e-4, 0], [0.5, -1, 0], [0.3, 1e-6, 0.0]]),
    np.array([[0, 1, 2], [1, 0, 3], [0, 2, 4], [4, 2, 1]]))])
def test_laplacian_is_semi_definite_also_with_needles(mesh):
    vertices, faces = mesh
    stiffness = cotangent_laplacian(normalize_vertices(vertices, faces), faces)[0].toarray()
    np.testing.assert_allclose(stiffness, stiffness.T)
    np.testing.assert_allclose(stiffness.sum(1), 0, atol=1e-9)
    assert np.linalg.eigvalsh(stiffness).min() > -1e-8


def test_signature_against_the_formula():
    vertices, faces = bumpy_sphere()
    vertices = normalize_vertices(vertices, faces)
    stiffness, mass = cotangent_laplacian(vertices, faces)
    value, vector = scipy.linalg.eigh(stiffness.toarray(), np.diag(mass / mass.sum()))
    value, vector = value[1:128], vector[:, 1:128]
    expected = np.zeros((len(vertices), HKS_TIMES))
    for i, t in enumerate(np.geomspace(4 * np.log(10) / value[-1], 4 * np.log(10) / value[0], HKS_TIMES)):
        heat = np.exp(-value * t)
        expected[:, i] = np.log((heat * vector**2).sum(1) / heat.sum())
    np.testing.assert_allclose(heat_kernel_signature(vertices, faces), expected[faces].mean(1), atol=1e-4)


def test_signature_of_a_sphere_is_constant():
    vertices, faces = shape(trimesh.creation.icosphere(3))
    signature = heat_kernel_signature(vertices, faces)
    assert np.abs(signature).max() < 0.1                                         # 0 for a true sphere
    assert np.abs(heat_kernel_signature(vertices * (1, 1, 3), faces)).max() > 1


def test_dense_and_sparse_solver_agree(monkeypatch):
    vertices, faces = bumpy_sphere(3)
    vertices = normalize_vertices(vertices, faces)
    dense = heat_kernel_signature(vertices, faces)
    monkeypatch.setattr("data.mesh_operators.DENSE_BELOW", 0)
    np.testing.assert_allclose(heat_kernel_signature(vertices, faces), dense, atol=1e-4)


def test_signature_is_intrinsic():
    """A sheet folded along its grid lines keeps all distances within it: the same signature, other geometry."""
    columns, rows = 13, 9
    i, j = np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij")
    sheet = np.stack([i * 0.3, j * 0.4, 0 * i], axis=-1).reshape(-1, 3)
    direction = np.cumsum(np.random.default_rng(0).uniform(-0.7, 0.7, columns))
    fold = np.cumsum(0.3 * np.stack([np.cos(direction), np.sin(direction)], 1), axis=0)
    folded = np.stack([fold[i, 0], j * 0.4, fold[i, 1]], axis=-1).reshape(-1, 3)
    corner = (i * rows + j)[:-1, :-1].ravel()
    faces = (corner[:, None, None] + [[0, rows, 1], [1, rows, rows + 1]]).reshape(-1, 3)
    np.testing.assert_allclose(feature("hks", (folded, faces)), feature("hks", (sheet, faces)), atol=1e-4)
    assert np.abs(feature("dihedral", (folded, faces)) - feature("dihedral", (sheet, faces))).max() > 0.05
    assert feature("hks", (sheet, faces)).std() > 0.1


def test_signature_of_parts_is_that_of_each_alone_whatever_its_size():
    body, faces = bumpy_sphere()
    other, other_faces = bumpy_sphere(1, seed=1)
    for scale in (1, 1e-3, 1e-6):
        both = np.r_[body, other * scale + 5], np.r_[faces, other_faces + len(body)]
        together = feature("hks", both)
        np.testing.assert_allclose(together[:len(faces)], feature("hks", (body, faces)), atol=1e-3)
        np.testing.assert_allclose(together[len(faces):], feature("hks", (other, other_faces)), atol=1e-3)
    assert (feature("hks", cube())[0] != 0).any() and (feature("hks", TETRAHEDRON) == 0).all()   # 8 and 4 vertices


def test_signature_survives_a_solver_that_fails(monkeypatch):
    def fail(*_, **__):
        raise np.linalg.LinAlgError("no convergence")

    monkeypatch.setattr("data.mesh_operators.eigh", fail)
    assert (heat_kernel_signature(*cube()) == 0).all()


def test_fewer_eigenpairs_of_a_large_mesh_change_the_signature_little(monkeypatch):
    """64 pairs instead of 128: an eighth of the spread over the mesh at the smallest time, less at all others."""
    vertices, faces = shape(trimesh.creation.icosphere(4))
    vertices = vertices * (1, 1.3, 2) * (1 + 0.2 * np.sin(3 * vertices[:, :1]))
    vertices = normalize_vertices(vertices, faces)
    every = heat_kernel_signature(vertices, faces)
    monkeypatch.setattr(mesh_features, "ALL_PAIRS_UP_TO", 2000)
    fewer = heat_kernel_signature(vertices, faces)
    error, spread = np.abs(fewer - every).max(0), every.std(0)
    assert 0 < error[0] and error.max() < 0.02 and (error < 0.15 * spread).all(), (error, spread)


def test_too_large_for_signatures(monkeypatch):
    monkeypatch.setattr(mesh_features, "HKS_LARGEST", 10)
    with pytest.raises(ValueError, match=r"of 162 vertices .* \(limit 10\); take \"hks\" out of model.features"):
        heat_kernel_signature(*bumpy_sphere())


# --- ground ---------------------------------------------------------------------------------------------------------

def town(slope=(0.0, 0.0), cells=40):
    """A terrain of 100 m x 100 m, and two houses on it, 6 m and 15 m high. Returns mesh, and per face what it is."""
    grid = np.linspace(0, 100, cells + 1)
    x, y = (a.ravel() for a in np.meshgrid(grid, grid, indexing="ij"))
    corner = (np.arange(cells)[:, None] * (cells + 1) + np.arange(cells)).ravel()
    below, beyond = corner + cells + 1, corner + cells + 2
    faces = [np.r_[np.stack([corner, below, corner + 1], 1), np.stack([corner + 1, below, beyond], 1)]]
    vertices, kind, count = [np.stack([x, y, 0 * x], 1)], [np.full(2 * cells**2, 0)], len(x)
    for k, (box, at) in enumerate((((20, 15, 6), (30, 30)), ((15, 25, 15), (70, 60)))):
        house = trimesh.creation.box(box).subdivide().subdivide()
        vertices.append(house.vertices + (*at, box[2] / 2))
        faces.append(house.faces + count)
        roof, wall = house.face_normals[:, 2] > 0.5, np.abs(house.face_normals[:, 2]) < 0.5
        kind.append(np.where(roof, 2 + k, np.where(wall, 1, 4)))
        count += len(house.vertices)
    vertices = np.concatenate(vertices)
    vertices[:, 2] += vertices[:, :2] @ slope
    return vertices, np.concatenate(faces), np.concatenate(kind)


@pytest.mark.parametrize("slope", [(0, 0), (0.1, -0.05)])
def test_height_over_the_ground(slope):
    vertices, faces, kind = town(slope)
    height = feature("ground", (vertices, faces), unit=1.0)[:, 0]
    assert np.abs(height[kind == 0]).max() < 0.5                                 # metres, on a slope of 10 m too
    assert np.abs(height[kind == 2] - 6).max() < 0.5 and np.abs(height[kind == 3] - 15).max() < 0.5


def test_ground_under_a_block_of_many_faces_and_more_than_half_the_area():
    terrain = shape(trimesh.creation.box((100, 100, 0)).subdivide())
    block = trimesh.creation.box((80, 80, 10))
    for _ in range(4):
        block = block.subdivide()
    vertices = np.r_[terrain[0], block.vertices + (0, 0, 5)]
    height = feature("ground", (vertices, np.r_[terrain[1], block.faces + len(terrain[0])]), unit=1.0)[:, 0]
    assert np.abs(height[:len(terrain[1])]).max() < 0.1 and height.max() == pytest.approx(10, abs=0.1)


def test_slope_and_roughness():
    vertices, faces, kind = town()
    _, slope, roughness = feature("ground", (vertices, faces), unit=1.0).T
    for value, kinds in ((0, (0, 2, 3)), (0.5, (1,)), (1, (4,))):
        np.testing.assert_allclose(slope[np.isin(kind, kinds)], value, atol=1e-6)
    centroid = vertices[faces].mean(1)
    far = kind == 0
    for house in ((30, 30), (70, 60)):
        far &= np.abs(centroid[:, :2] - house).max(1) > 30
    assert far.sum() > 500 and roughness[far].max() < 1e-5
    assert roughness[kind == 1].min() > 0.5
    ramp = feature("ground", town(slope=(0.2, 0))[:2], unit=1.0)
    assert np.allclose(ramp[kind == 0, 1], np.arctan(0.2) / np.pi)


def test_roughness_agrees_with_a_search_of_neighbours():
    rng = np.random.default_rng(0)
    vertices, faces, _ = town()
    calm = np.clip(vertices[:, :1] / 100, 0, 1)
    vertices = vertices + rng.normal(size=vertices.shape) * (0.1, 0.1, 2) * calm
    found = feature("ground", (vertices, faces), unit=1.0)[:, 2]
    centroid = vertices[faces].mean(1)
    radius = 0.05 * np.linalg.norm(np.ptp(vertices, axis=0))
    near = cKDTree(centroid[:, :2]).query_ball_point(centroid[:, :2], radius)
    expected = np.array([centroid[list(members), 2].std() for members in near])
    assert np.corrcoef(found, expected)[0, 1] > 0.95
    assert found.mean() == pytest.approx(expected.mean(), rel=0.1)


def test_ground_moves_with_the_mesh():
    vertices, faces, _ = town((0.05, 0.02))
    expected = feature("ground", (vertices, faces), unit=10.0)
    moved = feature("ground", (vertices + (5e5, 5e6, 300), faces), unit=10.0)
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    turn = trimesh.transformations.rotation_matrix(0.7, [0, 0, 1])[:3, :3]
    turned = feature("ground", (vertices @ turn.T, faces), unit=10.0)
    np.testing.assert_allclose(turned[:, :2], expected[:, :2], atol=1e-4)
    assert np.abs(turned[:, 2] - expected[:, 2]).mean() < 0.1 * expected[:, 2].mean()
    scaled = feature("ground", (vertices * 1000, faces))
    np.testing.assert_allclose(scaled, feature("ground", (vertices, faces)), atol=1e-5)


def test_ground_of_a_single_wall_is_level_across():
    """A wall that leans by a millimetre a metre: a plane through it would make every height 0."""
    vertices = SQUARE[0][:, [0, 2, 1]] * (5, 1, 4) + (7, 0, 2)
    vertices[:, 1] = 1e-3 * vertices[:, 2]
    wall = trimesh.Trimesh(vertices, SQUARE[1]).subdivide().subdivide()
    height = feature("ground", shape(wall), unit=1.0)[:, 0]
    centroid = wall.triangles_center[:, 2]
    np.testing.assert_allclose(height - height.mean(), centroid - centroid.mean(), atol=0.1)
    assert height.min() < 0.5


# -- targets of pre-training -------------------------------------------------------------------------------------------

def test_surface_descriptors_average_the_signature_over_growing_surroundings():
    sphere = trimesh.creation.icosphere(subdivisions=3)
    vertices, faces = np.asarray(sphere.vertices) * (1, 1, 2), np.asarray(sphere.faces)
    area = face_geometry(vertices, faces)[2]
    signature = np.random.default_rng(0).normal(size=(len(faces), 16)).astype(np.float32)
    scales = surface_descriptors(vertices, faces, signature).reshape(len(faces), 4, 16)
    assert scales.dtype == np.float32 and np.array_equal(scales[:, 0], signature)
    spread = scales.std(0).mean(-1)                                             # of the four scales
    assert (np.diff(spread) < 0).all() and spread[3] < 0.1 * spread[0]
    mean = (area[:, None, None] * scales).sum(0) / area.sum()                   # heat is conserved
    assert np.allclose(mean, mean[0], atol=2e-3)
    assert np.allclose(surface_descriptors(vertices * 7 + 3, faces, signature).reshape(scales.shape), scales, atol=1e-4)


def test_surface_descriptors_do_not_mix_what_is_not_connected_and_survive_no_area():
    ball = trimesh.creation.icosphere(subdivisions=2)
    faces = np.concatenate([ball.faces, ball.faces + len(ball.vertices)])
    vertices = np.concatenate([ball.vertices, ball.vertices + 0.1, [[9.0, 9, 9]]])         # and a vertex of no face
    half = np.repeat([[1.0], [2.0]], len(ball.faces), axis=0).astype(np.float32) * np.ones((1, 16), np.float32)
    assert np.allclose(surface_descriptors(vertices, faces, half), np.tile(half, 4), atol=1e-4)
    flat = surface_descriptors(np.zeros_like(vertices), faces, half)
    assert np.array_equal(flat, np.tile(half, 4))
