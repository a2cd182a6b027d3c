"""A polygon is one face: triangles that cover it exactly, one label, one vote, one weight, its whole area."""

import numpy as np
import pytest
import torch

from data.mesh import CachedFeatures, MeshDataset, MeshSpec, each_face_once
from data.mesh_io import read_mesh
from data.mesh_polygons import triangulate
from data.mesh_surfaces import SurfaceDataset, SurfaceSpec
from data.mesh_texture import read_texture
from utils.losses import MaskedCrossEntropyLoss

U = [(6, 0), (6, 5), (5, 5), (5, 1), (1, 1), (1, 5), (0, 5), (0, 0)]                        # area 14, clockwise or not
KEYHOLE = [(0, 0), (10, 0), (10, 10), (0, 10), (0, 0), (3, 3), (3, 6), (6, 6), (6, 3), (3, 3)]      # 100 - 9: a hole on a bridge
EDGE = [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (1, 1), (0, 1)]                    # an L of area 3 with flat corners
COMB = [(0, 0), (9, 0), *[(i, 5 if i % 2 else 1) for i in range(9, -1, -1)]]


def area(points):
    x, y = np.array(points, float).T
    return (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2


def star(seed, corners):
    """Corners around 0 at random distances."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * (np.arange(corners) + rng.random(corners) * 0.9) / corners
    return (np.c_[np.cos(angle), np.sin(angle)] * rng.uniform(0.1, 1, corners)[:, None]).tolist()


def tilted(points, offset=0.0):
    """Points (n, 2) on a plane in space, far away."""
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
    return np.c_[points, np.zeros(len(points))] @ turn.T + offset, turn[:, 2] * np.linalg.det(turn)


@pytest.mark.parametrize("points", [U, U[::-1], KEYHOLE, EDGE, COMB, *(star(seed, n) for seed in range(6) for n in (5, 9, 30))])
@pytest.mark.parametrize("offset", [0.0, 5e6])
def test_triangles_cover_a_polygon_once_whichever_corner_is_first(points, offset):
    vertices, normal = tilted(points, offset)
    for first in range(len(points)):
        row = np.roll(np.arange(len(points)), -first)
        slot, polygon = triangulate(vertices, row, np.array([len(points)]))
        corner = vertices[row[slot]]
        vector = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]) / 2                       # (n - 2, 3)
        assert polygon.tolist() == [0] * (len(points) - 2)
        tolerance = 1e-6 if offset else 1e-9
        assert np.linalg.norm(vector, axis=1).sum() == pytest.approx(abs(area(points)), abs=20 * tolerance)
        assert (vector @ normal * np.sign(area(points)) > -tolerance).all()                                  # none is turned over


def test_convex_polygons_are_fans_and_triangles_are_left_alone():
    angle = 2 * np.pi * np.arange(7) / 7
    vertices = np.c_[np.cos(angle), np.sin(angle), 0.05 * np.cos(3 * angle)]
    slot, polygon = triangulate(vertices, np.array([0, 2, 1, *range(7), 4, 5, 6]), np.array([3, 7, 3]))
    assert slot.tolist() == [[0, 1, 2], *([3, 4 + i, 5 + i] for i in range(5)), [10, 11, 12]] and polygon.tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert triangulate(vertices, np.array([0, 2, 1]), np.array([3]))[1] is None


@pytest.mark.parametrize("points", [[(0, 0), (1, 1), (1, 0), (0, 1)], [(0, 0)] * 5, [(0, 0), (1, 0), (2, 0), (3, 0)], [(0, 0), (2, 0), (0, 0), (1, 1), (1, 0)],
                                    [(np.cos(a), np.sin(a)) for a in 4 * np.pi * np.arange(5) / 5], [(0, 0), (4, 0), (4, 4), (2, -1), (0, 4)]])
def test_polygons_that_cross_themselves_or_have_no_area_give_triangles_all_the_same(points):
    slot, _ = triangulate(tilted(points)[0], np.arange(len(points)), np.array([len(points)]))
    edges = [(a, b) for f in slot.tolist() for a, b in zip(f, f[1:] + f[:1], strict=True)]
    assert len(slot) == len(points) - 2 and {(i, (i + 1) % len(points)) for i in range(len(points))} <= set(edges)


def test_texture_coordinates_follow_the_triangles(tmp_path):
    """u and v are x and y: they still are, behind the cut of a concave polygon that begins at a bad corner."""
    points = np.roll(np.array(U, float), 3, axis=0)
    (tmp_path / "m.mtl").write_text("newmtl a\nKd 1 0 0\n")
    (tmp_path / "a.obj").write_text("mtllib m.mtl\nusemtl a\n" + "".join(f"v {x} {y} 0\nvt {x} {y}\n" for x, y in points)
                                    + "f " + " ".join(f"{i}/{i}" for i in range(1, 9)) + "\nf 1/1 2/2 3/3\n")
    mesh, texture = read_mesh(tmp_path / "a.obj"), read_texture(tmp_path / "a.obj")
    assert len(mesh.faces) == 7 and mesh.slot[0].tolist() != [0, 1, 2]
    np.testing.assert_array_equal(texture.uv, mesh.vertices[mesh.faces][..., :2])


# -- data sets -------------------------------------------------------------------------------------------------------

def write_wall(folder, name="wall"):
    """A U of area 14, a quad of 30, a triangle of 1: labels 0, 1, 2."""
    corners = [*((x, 0, y) for x, y in U), (0, 3, 0), (6, 3, 0), (6, 3, 5), (0, 3, 5), (9, 0, 0), (11, 0, 0), (9, 0, 1)]
    (folder / f"{name}.obj").write_text("".join(f"v {x} {y} {z}\n" for x, y, z in corners) + "f 4 5 6 7 8 1 2 3\nf 9 10 11 12\nf 13 14 15\n")
    (folder / f"{name}.txt").write_text("0\n1\n2\n")
    return folder / f"{name}.obj"


KINDS = {"clusters": (MeshDataset, MeshSpec(("area",), faces_per_cluster=4, unit=1.0)), "surface": (SurfaceDataset, SurfaceSpec(("xyz",), 8))}


def wall(tmp_path, kind="clusters", files=None, **options):
    dataset, spec = KINDS[kind]
    return dataset(files or [write_wall(tmp_path)], tmp_path, spec, 3, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_items_say_what_belongs_together(tmp_path, kind, cached):
    for _ in range(1 + cached):                             # the second time from the cache
        data = wall(tmp_path, kind, cache_dir=tmp_path / "cache" if cached else None, views=1)
    first, whole = data.faces_of_file(0)
    assert (data.num_faces, data.num_polygons) == ([9], [3]) and first.tolist() == [0, 6, 8]
    np.testing.assert_allclose(whole / whole.sum(), np.array([14, 30, 1]) / 45, rtol=1e-5)
    item = data.collate_fn([data[0]])
    mask = item["mask"]
    order = item["face_index"][mask].argsort()
    assert item["polygon"][mask][order].tolist() == [0] * 6 + [1] * 2 + [2] and item["label"][mask][order].tolist() == [0] * 6 + [1] * 2 + [2]
    share = item["share"][mask][order]
    np.testing.assert_allclose([share[:6].sum(), share[6:8].sum(), share[8]], 1, rtol=1e-5)
    np.testing.assert_allclose(share[6:8], 0.5, rtol=1e-5)
    assert (item["polygon"][~mask] == -1).all() and (item["share"][~mask] == 0).all()


def test_triangles_alone_have_no_such_entries_and_a_mixed_set_has_them_everywhere(tmp_path):
    triangles = tmp_path / "t.obj"
    triangles.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n")
    (tmp_path / "t.txt").write_text("0\n1\n")
    assert not {"polygon", "share"} & set(wall(tmp_path, files=[triangles])[0])
    both = wall(tmp_path, files=[triangles, write_wall(tmp_path)])
    batch = both.collate_fn([both[0], both[1]])
    assert batch["share"][0][batch["mask"][0]].tolist() == [1, 1] and batch["polygon"].max() == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_counts_a_polygon_once(tmp_path, kind):
    data = wall(tmp_path, kind, views=1)
    batch = data.collate_fn([data[0], data[0]])
    logits = torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1]])[batch["polygon"].clamp(min=0)]                 # the same within a polygon
    for weights in (None, [1.0, 2.0, 5.0]):
        loss = MaskedCrossEntropyLoss(weights)
        expected = loss(torch.tensor([[2.0, 0, 0], [0, 3, 0], [0, 0, 1]]), torch.tensor([0, 1, 2]))
        total, weight = loss.sum_and_weight(logits, batch["label"], batch["mask"], batch["share"])
        torch.testing.assert_close(total / weight, expected)
        torch.testing.assert_close(weight, loss.label_weight(batch["label"], batch["mask"], batch["share"]))
        assert weight.item() == pytest.approx(2 * sum(weights or [1, 1, 1]), rel=1e-5)


def test_each_face_once_by_hand():
    batch = {"mask": torch.tensor([[[True, True, True, False]], [[True, True, False, False]]]), "polygon": torch.tensor([[[0, 0, 1, -1]], [[0, 0, -1, -1]]]),
             "share": torch.tensor([[[0.25, 0.75, 1, 0]], [[0.5, 0.25, 0, 0]]]), "label": torch.tensor([[[2, 2, -100, -100]], [[1, 1, -100, -100]]])}
    values = torch.tensor([[[[8.0, 0], [0, 4], [5, 5], [9, 9]]], [[[3, 0], [0, 3], [7, 7], [7, 7]]]])          # the last polygon is cut by a crop
    mean, label = each_face_once(values, batch)
    torch.testing.assert_close(mean, torch.tensor([[2.0, 3], [5, 5], [2, 1]]))
    assert label.tolist() == [2, -100, 1]
    plain = {name: batch[name] for name in ("mask", "label")}
    assert each_face_once(values, plain)[1].tolist() == [2, 2, -100, 1, 1] and each_face_once(values, plain)[0].shape == (5, 2)


def test_kept_embeddings_keep_the_polygons(tmp_path):
    data = wall(tmp_path, views=1)
    kept = CachedFeatures(data, lambda batch: batch["features"].expand(-1, -1, -1, 4), "key", None)
    for name in ("polygon", "share", "label"):
        assert torch.equal(kept[0][name], data[0][name])
