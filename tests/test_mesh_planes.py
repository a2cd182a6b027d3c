"""Planes as units: faces of a box, a folded sheet, faces without area; pooled probabilities by hand."""

import numpy as np
import pytest
import trimesh

from data.mesh_planes import plane_units, pooled


def test_a_box_has_six_planes_however_it_is_cut():
    box = trimesh.creation.box().subdivide().subdivide()
    unit = plane_units(np.array(box.vertices), np.array(box.faces), 0.5)
    side = np.round(box.face_normals).astype(int)
    assert len(np.unique(unit)) == 6
    assert all(len(np.unique(side[unit == u], axis=0)) == 1 for u in range(6))


@pytest.mark.parametrize("degrees, units", [(0.5, 2), (5.5, 1)])
def test_a_fold_of_five_degrees(degrees, units):
    rise = np.tan(np.radians(5))
    vertices = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [2, 0, rise], [2, 1, rise]])
    faces = np.array([[0, 2, 1], [1, 2, 3], [2, 4, 3], [3, 4, 5]])
    unit = plane_units(vertices, faces, degrees)
    assert len(np.unique(unit)) == units and unit[0] == unit[1] and unit[2] == unit[3]


def test_planes_that_do_not_touch_and_faces_without_area_stay_apart():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 0, 0], [6, 0, 0], [5, 1, 0], [0.5, 0, 0]])
    faces = np.array([[0, 1, 2], [3, 4, 5], [0, 6, 1]])                          # the last: three points of a line
    assert len(np.unique(plane_units(vertices, faces, 90))) == 3


def test_pooled_by_hand():
    probability = np.array([[1.0, 0.0], [0.0, 1.0], [0.2, 0.8], [0.6, 0.4], [0.0, 1.0]])
    mean = pooled(probability, np.array([1, 1, 0, 2, 2]), np.array([3.0, 1.0, 2.0, 0.0, 0.0]))
    np.testing.assert_allclose(mean, [[0.75, 0.25], [0.75, 0.25], [0.2, 0.8], [0.3, 0.7], [0.3, 0.7]])
