"""Plane, part and height of a face: values by hand on boxes, frames and single faces; what must not change them."""

import numpy as np
import pytest
import trimesh

from data.mesh import Augmentation, augment
from data.mesh_features import face_features, face_geometry, face_neighbors, normalize_vertices
from data.mesh_pieces import connected_parts, piece_borders, piece_heights, piece_sizes
from data.mesh_planes import plane_units
from data.mesh_prepare import MeshSpec, prepare_mesh

NAMES = ("plane", "part", "height")
PLANE, PART, FACE_HEIGHT, PIECE_HEIGHT = (slice(*ends) for ends in ((0, 5), (5, 11), (11, 13), (13, 17)))


def box(extents=(4, 2, 1), at=(0, 0, 0)):
    mesh = trimesh.creation.box(extents)
    return np.array(mesh.vertices) + at, np.array(mesh.faces)


def together(*meshes):
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in meshes])
    faces = [f + start for (_, f), start in zip(meshes, starts[:-1], strict=True)]
    return np.concatenate([vertices for vertices, _ in meshes]), np.concatenate(faces)


def house():
    """Turned walls, a roof of two slopes, open below, and a chimney that touches nothing."""
    walls = np.array([[x, y, z] for z in (0, 3) for y in (0, 5) for x in (0, 8)] + [[0, 2.5, 5], [8, 2.5, 5]], float)
    faces = [[0, 1, 5], [0, 5, 4], [1, 3, 7], [1, 7, 5], [3, 2, 6], [3, 6, 7], [2, 0, 4], [2, 4, 6],
             [4, 8, 6], [5, 7, 9], [4, 5, 9], [4, 9, 8], [7, 6, 8], [7, 8, 9]]
    vertices, faces = together((walls, np.array(faces)), box((0.5, 0.7, 2), (2, 1, 6)))
    turn = trimesh.transformations.rotation_matrix(0.3, [0, 0, 1])[:3, :3]
    return vertices @ turn.T, faces


def features(vertices, faces, unit=1.0):
    vertices = normalize_vertices(np.asarray(vertices, float), faces, unit)
    return face_features(vertices, faces, NAMES, face_neighbors(faces), plane=plane_units(vertices, faces, 0.5))


def piece_arrays(vertices, faces):
    return vertices[faces], face_geometry(vertices, faces)[2]


# --- values by hand ---------------------------------------------------------------------------------------------------

def test_the_sides_of_a_box_have_their_own_lengths():
    vertices, faces = box()
    found = features(vertices, faces)[:, PLANE]
    axis = np.abs(face_geometry(vertices, faces)[1]).argmax(1)                   # of the normal
    for face, a in enumerate(axis):
        short, long = sorted(np.delete([4, 2, 1], a))
        np.testing.assert_allclose(found[face], [np.log(short * long), np.log(long), np.log(short), 0, 0], atol=1e-5)


def test_a_box_as_a_part():
    found = features(*box())[:, PART]
    area = 2 * (4 * 2 + 4 * 1 + 2 * 1)
    # Along x: the two ends of 2 x 1 lie at 2 from the middle, all else is spread evenly over a length of 4.
    variance = [2 * b * c * a**2 / 4 / area + (area - 2 * b * c) * a**2 / 12 / area
                for a, b, c in ((4, 2, 1), (2, 4, 1), (1, 4, 2))]
    expected = [np.log(area), *np.log(np.sqrt(12 * np.array(variance))), 0, 0]
    np.testing.assert_allclose(found, [expected] * 12, atol=1e-5)


def test_one_right_triangle():
    found, = features(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0.0]]), np.array([[0, 1, 2]]))
    sizes = [np.log(0.5), 0, np.log(1 / np.sqrt(3))]                             # moments 1/18 and -1/36: 1/12 and 1/36
    border = np.log1p((2 + np.sqrt(2)) / np.sqrt(0.5))
    np.testing.assert_allclose(found[PLANE], [*sizes, border, 0], atol=1e-6)
    np.testing.assert_allclose(found[PART], [*sizes, np.log(1e-3), border, 0], atol=1e-6)
    np.testing.assert_allclose(found[11:], 0, atol=1e-6)


def test_a_box_without_its_lid_has_an_open_border():
    vertices, faces = box()
    faces = faces[face_geometry(vertices, faces)[1][:, 2] < 0.5]
    found = features(vertices, faces)
    np.testing.assert_allclose(found[:, PART][:, 4:], [[np.log1p(12 / np.sqrt(20)), 0]] * 10, atol=1e-5)
    np.testing.assert_allclose(found[:, PLANE][:, 4], 0)
    floor = face_geometry(vertices, faces)[1][:, 2] < -0.5
    assert (found[floor, 3] == 0).all() and (found[~floor, 3] > 0.5).all()


def test_a_fin_on_a_wall_is_a_part_of_its_own():
    """Where it stands, three faces share an edge: a border of length 1 for the fin of area 2, and for both wall halves."""
    vertices = np.array([[x, 0, z] for x in (0, 1, 3) for z in (0, 1)] + [[1, 2, 0], [1, 2, 1]], float)
    faces = np.array([[0, 2, 3], [0, 3, 1], [2, 4, 5], [2, 5, 3], [2, 6, 7], [2, 7, 3]])
    assert (connected_parts(face_neighbors(faces)) == [0, 0, 1, 1, 2, 2]).all()
    border = features(vertices, faces)[:, PART][:, 4:]
    half, other, fin = [3, 1], np.array([5, 1]) / np.sqrt(2), np.array([5, 1]) / np.sqrt(2)
    np.testing.assert_allclose(border, np.log1p(np.repeat([half, other, fin], 2, axis=0)), atol=1e-5)


def test_heights_over_the_bottom_and_under_the_top():
    vertices, faces = together(box((4, 2, 1), (0, 0, 0.5)), box((1, 1, 2), (9, 0, 4)))       # z 0 to 1, and 3 to 5
    found = features(vertices, faces)[:, 11:]
    np.testing.assert_allclose(found[:12, 4:], [[0, 4]] * 12, atol=1e-5)         # the part
    np.testing.assert_allclose(found[12:, 4:], [[3, 0]] * 12, atol=1e-5)
    normal = face_geometry(vertices, faces)[1][:, 2]
    np.testing.assert_allclose(found[12:][normal[12:] > 0.5], [[5, 0, 5, 0, 3, 0]] * 2, atol=1e-5)
    np.testing.assert_allclose(found[:12][normal[:12] < -0.5], [[0, 5, 0, 5, 0, 4]] * 2, atol=1e-5)


# --- what must not change them ------------------------------------------------------------------------------------------

def test_order_of_faces_corners_and_vertices():
    vertices, faces = house()
    expected = features(vertices, faces)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(faces))
    np.testing.assert_allclose(features(vertices, faces[order]), expected[order], atol=1e-5)
    np.testing.assert_allclose(features(vertices, np.roll(faces, 1, axis=1)), expected, atol=1e-5)
    place = rng.permutation(len(vertices))
    np.testing.assert_allclose(features(vertices[np.argsort(place)], place[faces]), expected, atol=1e-5)


@pytest.mark.parametrize("axis, columns", [([0, 0, 1], slice(None)), ([1, 2, 3], slice(0, 11))])
def test_turned_and_moved(axis, columns):
    vertices, faces = house()
    turn = trimesh.transformations.rotation_matrix(1.1, axis)[:3, :3]
    np.testing.assert_allclose(features(vertices @ turn.T + (5e3, 2e3, 400), faces)[:, columns],
                               features(vertices, faces)[:, columns], atol=1e-4)


def test_scaled_without_a_unit():
    vertices, faces = house()
    np.testing.assert_allclose(features(vertices * 1000, faces, None), features(vertices, faces, None), atol=1e-5)
    longer = features(vertices * 2, faces) - features(vertices, faces)
    np.testing.assert_allclose(longer[:, [0, 1, 2, 5, 6, 7]], [np.log([4, 2, 2, 4, 2, 2])] * len(faces), atol=1e-5)


def test_finer_triangles():
    vertices, faces = house()
    finer, cut, children = trimesh.remesh.subdivide(vertices, faces, return_index=True)
    owner = np.empty(len(cut), int)
    for face, parts in children.items():
        owner[parts] = face
    keep = np.r_[PLANE, PART, PIECE_HEIGHT]
    np.testing.assert_allclose(features(finer, cut)[:, keep], features(vertices, faces)[owner][:, keep], atol=1e-5)


def test_another_part_changes_nothing_but_heights():
    vertices, faces = house()
    more = together((vertices, faces), box((1, 1, 1), (50, 0, 30)))
    np.testing.assert_allclose(features(*more)[:len(faces), :11], features(vertices, faces)[:, :11], atol=1e-5)
    shift = features(*more)[:len(faces), 11:] - features(vertices, faces)[:, 11:]
    np.testing.assert_allclose(shift, [[0, 23.5] * 3] * len(faces), atol=1e-4)   # the highest was 7, and is 30.5


# --- odd meshes ---------------------------------------------------------------------------------------------------------

def test_a_piece_without_area_has_the_least_sizes():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 5, 5], [6, 6, 6], [7, 7, 7.0]])
    faces = np.array([[0, 1, 2], [3, 4, 5], [3, 3, 3]])
    corner, area = piece_arrays(vertices, faces)
    with np.errstate(all="raise"):
        sizes = piece_sizes(corner, area, np.array([0, 1, 2]))
        borders = piece_borders(corner, faces, area, np.array([0, 1, 2]))
        heights = piece_heights(corner, [np.array([0, 1, 2])])
    np.testing.assert_allclose(sizes[1:], [np.log([1e-6, 1e-3, 1e-3, 1e-3])] * 2)
    np.testing.assert_allclose(borders[1:], [[np.log1p(1e3), 0], [0, 0]], atol=1e-6)         # the last: all edges of no length
    np.testing.assert_allclose(heights, [[0, 7, 0, 7], [5, 0, 5, 0], [5, 2, 5, 2]])


def test_planes_are_those_of_the_file_whatever_the_augmentation(tmp_path):
    """Jitter would cut every plane into its triangles."""
    mesh = trimesh.creation.box((4, 2, 1)).subdivide().subdivide()
    mesh.export(tmp_path / "box.obj")
    prepared = prepare_mesh(tmp_path / "box.obj", MeshSpec(NAMES, unit=1.0))
    rough = augment(prepared, Augmentation("z", noise_std=0.02, scale_range=(0.9, 1.1)), 1.0, np.random.default_rng(0))
    before, after = (face_features(m.vertices, m.faces, NAMES, m.neighbors, plane=m.plane) for m in (prepared, rough))
    assert len(np.unique(rough.plane)) == 6 and np.abs(after - before)[:, :11].max() < 0.3
    assert np.abs(after - before).max() > 1e-3
