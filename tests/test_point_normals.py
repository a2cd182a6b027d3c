"""data/point_normals.py: floors, rooms and hills look to the side that they were scanned from; what the data set makes of it."""

import numpy as np
import pytest

from data import point_normals
from data.point_files import read_cloud
from data.point_normals import estimate_normals, share_below
from data.points import PointDataset, PointSpec, complete


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def hills(rng, count=6000, width=120.0):
    """A hilly plane 15 m high and on it the true upward normals."""
    x, y = rng.uniform(0, width, (2, count))
    z = 8 * np.sin(x / 15) * np.cos(y / 20) + 0.05 * x
    normal = np.stack([-8 / 15 * np.cos(x / 15) * np.cos(y / 20) - 0.05, 8 / 20 * np.sin(x / 15) * np.sin(y / 20), np.ones(count)], 1)
    return np.stack([x, y, z + rng.normal(0, 0.02, count)], 1), normal / np.linalg.norm(normal, axis=1, keepdims=True)


def room(rng, count=3000, size=(5.0, 4.0, 2.6)):
    """A closed room and the normals that look into it: six walls, as densely sampled."""
    coord, normal = [], []
    for axis in range(3):
        u, v = (other for other in range(3) if other != axis)
        for side in (0, 1):
            wall = np.zeros((int(count * size[u] * size[v] / 20), 3))
            wall[:, [u, v]] = rng.uniform(0, 1, (len(wall), 2)) * (size[u], size[v])
            wall[:, axis] = side * size[axis]
            coord.append(wall)
            normal.append(np.eye(3)[[axis] * len(wall)] * (1 - 2 * side))
    return np.concatenate(coord), np.concatenate(normal)


def right(found, expected):
    return ((found * expected).sum(1) > 0).mean()


def test_a_closed_room_is_seen_from_inside_by_three_ways(rng):
    coord, inward = room(rng)
    for view in ("inside", "neighbours", (1.0, 3.0, 0.5)):
        found = estimate_normals(coord, view)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert right(found, inward) > 0.999, view
    assert right(estimate_normals(coord, (1.0, 3.0, 9.0)), inward) < 0.9                 # from above the ceiling
    assert share_below(coord, estimate_normals(coord)) == 0


def test_hills_look_up_from_above_and_by_neighbours_but_not_from_inside(rng):
    coord, upward = hills(rng)
    for view in ("above", "neighbours", (60.0, 60.0, 900.0)):
        assert right(estimate_normals(coord, view), upward) > 0.999, view
    inside = estimate_normals(coord)
    assert right(inside, upward) < 0.7 and share_below(coord, inside) > 0.3


def test_houses_and_trees_on_hills_do_not_turn_the_ground_over(rng):
    ground, upward = hills(rng)
    houses, outward = zip(*(room(rng, 250, (8.0, 6.0, 5.0)) for _ in range(8)), strict=True)
    crowns = [rng.normal(0, 1.2, (120, 3)) + [0, 0, 5] for _ in range(15)]
    places = ground[rng.integers(0, len(ground), 23)] - [0, 0, 0.2]
    parts = [part + place for part, place in zip((*houses, *crowns), places, strict=True)]
    coord = np.concatenate([ground, *parts])
    for view in ("above", "neighbours"):
        found = estimate_normals(coord, view)
        cosine = (found[:len(ground)] * upward).sum(1)
        assert (cosine[np.abs(cosine) > 0.7] > 0).mean() > 0.999, view                   # but where a wall stands on it
    roofs = np.flatnonzero((np.concatenate(outward) == (0, 0, -1)).all(1))               # of the rooms: ceilings
    assert (estimate_normals(coord, "above")[len(ground) + roofs, 2] > 0).mean() > 0.99


def test_walls_follow_the_ground_that_they_stand_on(rng):
    """A step: two level planes and the riser between them, which from above has no side of its own."""
    flat = np.c_[rng.uniform(0, 4, (4000, 2)), np.zeros(4000)]
    flat[:, 2] = np.where(flat[:, 0] > 2, 1.0, 0.0)
    riser = np.c_[np.full(1500, 2.0), rng.uniform(0, 4, 1500), rng.uniform(0, 1, 1500)]
    for view in ("above", "neighbours"):
        found = estimate_normals(np.concatenate([flat, riser]), view)
        assert (found[:4000, 2] > -0.1).mean() > 0.99 and (found[4000:, 0] < 0).mean() > 0.95, view


def test_pieces_far_apart_and_repeated_points(rng):
    plane = np.c_[rng.uniform(0, 1, (300, 2)), np.zeros(300)]
    coord = np.concatenate([plane + [40 * i, 0, 3 * i] for i in range(5)] + [np.full((60, 3), 7.0)])
    for view in ("above", "neighbours"):
        found = estimate_normals(coord, view)
        assert np.isfinite(found).all() and (found[:1500, 2] > 0.99).all() and (found[1500:] == (0, 0, 1)).all()


@pytest.mark.parametrize("view", ["inside", "above", "neighbours", (0.0, 0.0, 5.0)])
def test_tiny_clouds(rng, view):
    plane = np.c_[rng.uniform(0, 1, (50, 2)), np.zeros(50)]
    for coord in (plane[:1], plane[:2], np.zeros((20, 3)), plane[:3], plane):
        found = estimate_normals(coord, view)
        np.testing.assert_allclose(np.abs(found), np.tile([0, 0, 1], (len(coord), 1)), atol=1e-6)
        assert (found[:, 2] > 0).all() or view == "inside"


# -- what the data set makes of it -------------------------------------------------------------------------------------

def save(path, coord, **more):
    np.savez(path, coord=coord, segment=np.zeros(len(coord), int), **more)
    return path


def test_clouds_choose_their_view_together_and_say_so(tmp_path, rng):
    coord, upward = hills(rng, 3000)
    hilly = [save(tmp_path / f"hill_{i}.npz", coord) for i in range(2)]
    inner, inward = room(rng, 1000)
    rooms = [save(tmp_path / f"room_{i}.npz", inner) for i in range(3)]

    dataset = PointDataset(hilly, PointSpec(0.5), 1, cache_dir=tmp_path / "cache")
    assert right(dataset.cloud(1)["normal"], upward) > 0.999 and dataset.spec.normal_view == "neighbours"
    assert any("data.normal_view=neighbours: seen from inside, more than 2 % of the ground looks down in 2 of 2" in line
               for line in dataset.notes)
    assert any("estimated from neighbours, the ground turned up" in line for line in dataset.notes)

    dataset = PointDataset(rooms, PointSpec(0.5), 1)
    assert right(dataset.cloud(0)["normal"], inward) > 0.999 and dataset.spec.normal_view == "inside"
    assert any("1.5 m above the lowest point (data.normal_view=inside)" in line for line in dataset.notes)

    dataset = PointDataset([*rooms, hilly[0]], PointSpec(0.5), 1)                        # one odd cloud changes no other
    assert dataset.spec.normal_view == "inside" and right(dataset.cloud(3)["normal"], upward) < 0.7
    dataset = PointDataset([rooms[0], *hilly], PointSpec(0.5), 1)
    assert dataset.spec.normal_view == "neighbours" and right(dataset.cloud(0)["normal"], inward) > 0.999
    for view, share in (("above", 1), ("inside", 0.7)):
        spec = PointSpec(0.5, normal_view=view)
        dataset = PointDataset(hilly, spec, 1, cache_dir=tmp_path / "cache")
        assert dataset.spec == spec and right(dataset.cloud(0)["normal"], upward) <= share


def test_roofs_of_a_flat_tile_look_up(tmp_path, rng):
    """The ground alone is seen well from inside, the one house in twenty squares is not."""
    coord = np.c_[rng.uniform(0, 100, (8000, 2)), rng.normal(0, 0.02, 8000)]
    roof = (np.abs(coord[:, :2] - 40) < 11).all(1)
    coord[roof, 2] += 6
    dataset = PointDataset([save(tmp_path / "a.npz", coord)], PointSpec(0.5), 1)
    assert dataset.spec.normal_view == "neighbours" and (dataset.cloud(0)["normal"][:, 2] > 0).mean() > 0.99
    dataset = PointDataset([save(tmp_path / "b.npz", coord[~roof])], PointSpec(0.5), 1)
    assert dataset.spec.normal_view == "inside" and (dataset.cloud(0)["normal"][:, 2] > 0).mean() > 0.99


def test_a_viewpoint_and_coordinates_without_a_sign(tmp_path, rng):
    coord = np.c_[rng.integers(0, 3000, (100, 3))].astype(np.uint32) + np.uint32(50_000)           # mm
    np.savez(tmp_path / "a.npz", coord=coord)
    normals = [PointDataset([tmp_path / "a.npz"], PointSpec(0.05, unit=0.001, up="y", normal_view=(5e4, 5e4, 9e4)))]
    np.savez(tmp_path / "a.npz", coord=coord.astype(np.float64))
    normals += [PointDataset([tmp_path / "a.npz"], PointSpec(0.05, unit=0.001, up="y", normal_view=(5e4, 5e4, 9e4)))]
    np.testing.assert_array_equal(normals[0].cloud(0)["normal"], normals[1].cloud(0)["normal"])


def test_a_viewpoint_has_the_coordinates_of_the_file(tmp_path, rng):
    """Map coordinates in centimetres, which are moved near 0 and scaled: the scanner is moved with them."""
    coord, inward = room(rng, 800)
    far = coord * 100 + [5e7, 4e8, 3e4]
    scanner = tuple(np.array([2.0, 2.0, 1.0]) * 100 + [5e7, 4e8, 3e4])
    cloud = read_cloud(save(tmp_path / "a.npz", far))
    cloud, _ = complete(cloud, PointSpec(0.5, unit=0.01, normal_view=scanner))
    assert right(cloud.normal, inward) > 0.999 and cloud.normal_view == scanner
    assert "turned to 5.00002e+07" in point_normals.describe_view(cloud.normal_view)
    outside, _ = complete(read_cloud(tmp_path / "a.npz"), PointSpec(0.5, unit=0.01, normal_view=(0.0, 0.0, 0.0)))
    assert right(outside.normal, inward) < 0.6


def test_views_are_checked():
    for view, message in (("up", "data.normal_view"), ((1.0, 2.0), r"normal_view=\[1.0, 2.0\]: expected inside . above . neighbours or")):
        with pytest.raises(ValueError, match=message):
            PointSpec(normal_view=view)
