"""Clusters: every face exactly once, never too large, near one another, connected where promised, fast."""

import time

import numpy as np
import pytest
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from data.mesh_clusters import connected_clusters, recursive_bisection
from data.mesh_features import face_neighbors


def sphere(subdivisions):
    mesh = trimesh.creation.icosphere(subdivisions)
    return np.array(mesh.triangles_center), face_neighbors(np.array(mesh.faces))


def soup(num_faces, seed=0):
    """Faces without any neighbour."""
    return np.random.default_rng(seed).normal(size=(num_faces, 3)), np.full((num_faces, 3), -1)


def clusters(method, centroid, neighbors, size, rng=None, num_clusters=None):
    if method == "connected":
        return connected_clusters(centroid, neighbors, size, rng, num_clusters)
    return recursive_bisection(centroid, size, rng, num_clusters)


def check(face_index, num_faces):
    """Every face exactly once, no empty cluster, padding behind the faces only."""
    assert face_index.dtype == np.int64
    used = face_index >= 0
    np.testing.assert_array_equal(np.sort(face_index[used]), np.arange(num_faces))
    assert used.any(1).all() and used.any(0).all()
    assert (used[:, 1:] <= used[:, :-1]).all() and (face_index[~used] == -1).all()


SIZES = [(1, 32), (2, 32), (7, 1), (31, 32), (32, 32), (33, 32), (320, 24), (320, 32), (1000, 24), (1001, 333)]


@pytest.mark.parametrize("method", ["bisection", "connected"])
@pytest.mark.parametrize("rng", [None, 0, 1])
@pytest.mark.parametrize("num_faces, size", SIZES)
def test_every_face_exactly_once(method, rng, num_faces, size):
    rng = None if rng is None else np.random.default_rng(rng)
    face_index = clusters(method, *soup(num_faces), size, rng)
    check(face_index, num_faces)
    assert len(face_index) == -(-num_faces // size)
    if method == "bisection":                            # no cluster larger than asked, with rng too
        assert face_index.shape[1] <= size


@pytest.mark.parametrize("method", ["bisection", "connected"])
@pytest.mark.parametrize("num_faces, count", [(10, 6), (10, 10), (320, 7), (320, 64), (1, 1)])
def test_a_fixed_number_of_clusters_is_exact(method, num_faces, count):
    face_index = clusters(method, *soup(num_faces), 3, num_clusters=count)
    check(face_index, num_faces)
    assert len(face_index) == count
    if method == "bisection":
        assert face_index.shape[1] == -(-num_faces // count)


def test_bisection_by_hand():
    centroid = np.array([[5, 0, 0], [1, 0, 0], [0, 1, 0], [4, 1, 0], [9, 0, 0], [8, 1, 0.0]])
    np.testing.assert_array_equal(recursive_bisection(centroid, 2), [[1, 2], [0, 3], [4, 5]])
    np.testing.assert_array_equal(recursive_bisection(centroid, 4), [[1, 2, 3], [0, 4, 5]])
    tall = centroid[:, [1, 2, 0]]                        # the longest axis, whichever it is
    np.testing.assert_array_equal(recursive_bisection(tall, 2), [[1, 2], [0, 3], [4, 5]])


def test_bisection_makes_balanced_compact_clusters():
    centroid, _ = sphere(4)                              # 5120 faces
    face_index = recursive_bisection(centroid, 33)
    size = (face_index >= 0).sum(1)
    assert size.max() - size.min() <= 2                  # hardly any padding
    spread = np.array([centroid[row[row >= 0]].std(0).sum() for row in face_index])
    assert spread.max() < 4 * np.sqrt(4 * np.pi / len(face_index))


@pytest.mark.parametrize("method", ["bisection", "connected"])
def test_consecutive_clusters_are_neighbours(method):
    """The crops of an evaluation are runs of clusters; scattered ones would be nothing like those of training."""
    centroid, neighbors = sphere(4)
    face_index = clusters(method, centroid, neighbors, 40)
    center = np.array([centroid[row[row >= 0]].mean(0) for row in face_index])
    step = np.linalg.norm(np.diff(center, axis=0), axis=1).mean()
    shuffled = np.random.default_rng(0).permutation(center)
    assert step < 0.4 * np.linalg.norm(np.diff(shuffled, axis=0), axis=1).mean()


@pytest.mark.parametrize("method", ["bisection", "connected"])
def test_the_same_call_gives_the_same_and_another_rng_other_borders(method):
    centroid, neighbors = sphere(3)                      # 1280 faces, 40 clusters of exactly 32: no slack anywhere

    def borders(rng):
        face_index = clusters(method, centroid, neighbors, 32, rng and np.random.default_rng(rng))
        owner = np.empty(len(centroid), int)
        owner[face_index[face_index >= 0]] = np.nonzero(face_index >= 0)[0]
        return owner[:, None] != owner[neighbors]        # (F, 3) edges between two clusters

    np.testing.assert_array_equal(borders(None), borders(None))
    np.testing.assert_array_equal(borders(7), borders(7))
    plain, first, second = borders(None), borders(7), borders(8)
    for one, other in ((plain, first), (first, second)):
        assert (one != other)[one | other].mean() > 0.3


def test_grown_clusters_are_connected():
    centroid, neighbors = sphere(4)
    face_index = connected_clusters(centroid, neighbors, 40)
    check(face_index, len(centroid))
    owner = np.empty(len(centroid), int)
    owner[face_index[face_index >= 0]] = np.nonzero(face_index >= 0)[0]
    f, k = np.nonzero(owner[:, None] == owner[neighbors])
    graph = coo_matrix((np.ones(len(f)), (f, neighbors[f, k])), shape=(len(centroid),) * 2)
    assert connected_components(graph, directed=False)[0] == len(face_index)
    assert face_index.shape[1] < 2 * 40


def test_grown_clusters_are_not_too_unequal():
    face_index = connected_clusters(*sphere(5), 16)      # from the edges of the parts it would be 2.5
    assert face_index.shape[1] / (face_index >= 0).sum(1).mean() < 1.9


def test_padding_is_never_a_seed():
    ring = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0.0]])            # around 0, where padding would be
    centroid = np.r_[ring, ring + (10, 0, 0), [[10, 0, 0]]]                      # parts of 4 and 5 faces
    neighbors = np.full((9, 3), -1)
    neighbors[:4, 0], neighbors[4:, 0] = [1, 2, 3, 0], [5, 6, 7, 8, 4]
    face_index = connected_clusters(centroid, neighbors, 5)
    np.testing.assert_array_equal(np.sort(face_index, axis=1), [[-1, 0, 1, 2, 3], [4, 5, 6, 7, 8]])


def test_clusters_grow_over_the_surface_not_through_the_air():
    """Two sheets 0.01 apart: by distance they would share clusters, over their edges they cannot."""
    grid = trimesh.creation.box((4, 4, 0))
    for _ in range(3):
        grid = grid.subdivide()
    grid = grid.submesh([np.flatnonzero(grid.face_normals[:, 2] > 0.5)], append=True)
    one, two = np.array(grid.triangles_center), np.array(grid.triangles_center) + (0, 0, 0.01)
    neighbors = face_neighbors(np.r_[grid.faces, grid.faces + len(grid.vertices)])
    face_index = connected_clusters(np.r_[one, two], neighbors, 16)
    check(face_index, 2 * len(one))
    for row in face_index:
        assert len(set(row[row >= 0] >= len(one))) == 1


def test_parts_without_a_seed_join_a_near_cluster():
    centroid, neighbors = sphere(2)
    island = np.array([[0, 0, 1.2], [0, 0, -1.2]])
    face_index = connected_clusters(np.r_[centroid, island], np.r_[neighbors, np.full((2, 3), -1)], 161)    # 322 faces, 2 clusters
    check(face_index, 322)
    for face in (320, 321):
        row = face_index[(face_index == face).any(1)][0]
        others = row[(row >= 0) & (row < 320)]
        near = np.argmin(((centroid - np.r_[centroid, island][face]) ** 2).sum(1))
        assert near in others


def test_a_fine_object_beside_a_coarse_one_does_not_become_one_cluster():
    """Padding goes with the longest cluster; of seeds that lie evenly in space, one would get the whole fine sphere."""
    coarse, fine = trimesh.creation.box((10, 10, 5)).subdivide().subdivide(), trimesh.creation.icosphere(4, radius=0.1)
    faces = np.r_[coarse.faces, fine.faces + len(coarse.vertices)]
    centroid = np.r_[coarse.vertices, fine.vertices + 20][faces].mean(1)
    face_index = connected_clusters(centroid, face_neighbors(faces), 64)
    check(face_index, len(faces))
    assert face_index.shape[1] < 2 * 64


@pytest.mark.parametrize("method", ["bisection", "connected"])
def test_faces_in_one_place(method):
    for rng in (None, np.random.default_rng(0)):
        face_index = clusters(method, np.zeros((50, 3)), np.full((50, 3), -1), 8, rng)
        check(face_index, 50)
        assert len(face_index) == 7


@pytest.mark.parametrize("method", ["bisection", "connected"])
def test_large_meshes_do_not_take_quadratic_time(method):
    """k-means takes 6 s here. Processor time, so that a busy machine does not fail the test."""
    centroid, neighbors = sphere(6)                      # 81,920 faces
    begin = time.process_time()
    face_index = clusters(method, centroid, neighbors, 256)
    assert time.process_time() - begin < 3
    check(face_index, len(centroid))


def test_farthest_points_are_spread_and_their_clusters_whole_and_connected():
    sphere = trimesh.creation.icosphere(subdivisions=4)
    centroid, neighbors = sphere.triangles_center, face_neighbors(np.asarray(sphere.faces))
    face_index = connected_clusters(centroid, neighbors, 64, farthest_points=True)
    assert np.array_equal(np.sort(face_index[face_index >= 0]), np.arange(len(centroid)))
    assert len(face_index) == len(centroid) // 64 and (face_index >= 0).sum(1).max() < 2.4 * 64
    owner = np.empty(len(centroid), int)
    for cluster, row in enumerate(face_index):
        owner[row[row >= 0]] = cluster
    for row in face_index:                                                  # one piece: grow from its first face inside it
        row = row[row >= 0]
        seen, front = {int(row[0])}, [int(row[0])]
        while front:
            front = [int(n) for f in front for n in neighbors[f] if owner[n] == owner[row[0]] and int(n) not in seen]
            seen.update(front)
        assert len(seen) == len(row)


def test_farthest_points_on_loose_triangles_and_duplicates_use_every_face_once():
    centroid = np.repeat(np.random.default_rng(0).normal(size=(30, 3)), 2, axis=0)
    face_index = connected_clusters(centroid, np.full((60, 3), -1), 7, farthest_points=True)
    assert np.array_equal(np.sort(face_index[face_index >= 0]), np.arange(60)) and len(face_index) == 9
