"""data/point_transforms.py: oracles by loops, invariants, edges. Parity with the official code: test_golden_points."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data import point_transforms as transforms
from data.point_transforms import PointAugmentation

STILL = PointAugmentation(dropout=0, rotation_probability=0, scale_range=(1, 1), flip_probability=0, jitter=0,
                          elastic_probability=0, contrast_probability=0, color_shift_probability=0,
                          color_jitter_probability=0, crop_points=None)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make_cloud(rng, n=500, size=2.0):
    normal = rng.normal(size=(n, 3))
    return {"coord": rng.uniform(0, size, (n, 3)).astype(np.float32),
            "color": rng.integers(0, 256, (n, 3)).astype(np.float32),
            "normal": (normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32),
            "label": rng.integers(0, 5, n)}


# -- geometry ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("turn", [lambda c: transforms.rotate(c, 33, "z", (0, 0, 0)),
                                  lambda c: transforms.rotate(c, -12, "x"), lambda c: transforms.rotate(c, 71, "y"),
                                  lambda c: transforms.flip(c, True, False), lambda c: transforms.flip(c, False, True)])
def test_normals_turn_with_their_surface(rng, turn):
    normal = np.float32([0.36, 0.48, 0.8])
    plane = rng.normal(size=(50, 2)) @ np.array([[0.8, -0.6, 0], [-0.48, -0.64, 0.6]])   # orthogonal to the normal
    cloud = turn({"coord": plane.astype(np.float32), "normal": np.tile(normal, (50, 1))})
    edges = cloud["coord"][1:] - cloud["coord"][0]
    np.testing.assert_allclose((edges * cloud["normal"][1:]).sum(1), 0, atol=1e-5)
    assert np.abs(cloud["normal"] - normal).max() > 0.1                                 # it did turn
    np.testing.assert_allclose(np.linalg.norm(edges, axis=1), np.linalg.norm(plane[1:] - plane[0], axis=1), rtol=1e-4)


def test_a_turn_about_z_keeps_vertical_normals_and_goes_counter_clockwise():
    cloud = {"coord": np.float32([[1, 0, 2]]), "normal": np.float32([[0, 0, 1]])}
    turned = transforms.rotate(cloud, 90, "z", (0, 0, 0))
    np.testing.assert_allclose(turned["coord"], [[0, 1, 2]], atol=1e-6)
    np.testing.assert_allclose(turned["normal"], [[0, 0, 1]], atol=1e-7)


def test_stretched_normals_stay_upright_on_their_surface(rng):
    cloud = {"coord": np.float32([[1, 2, 3]]), "normal": np.float32([[0.6, 0, 0.8]]), "height": np.float32([[0.5]])}
    stretched = transforms.stretch(cloud, (2, 1, 0.5))
    np.testing.assert_array_equal(stretched["coord"], [[2, 2, 1.5]])
    np.testing.assert_allclose(stretched["normal"], np.array([[0.3, 0, 1.6]]) / np.hypot(0.3, 1.6), rtol=1e-6)
    assert stretched["height"] == 0.25
    moved = transforms.augment(make_cloud(rng), replace(STILL, stretch=0.3), np.random.default_rng(1))["coord"]
    factors = moved / transforms.augment(make_cloud(np.random.default_rng(0)), STILL, np.random.default_rng(1))["coord"]
    np.testing.assert_allclose(factors, factors[:1].repeat(500, 0), rtol=1e-4)
    assert np.ptp(factors[0]) > 0.02 and (np.abs(factors - 1) <= 0.3 + 1e-4).all()
    with pytest.raises(ValueError, match="stretch"):
        PointAugmentation(stretch=1.0)


def test_elastic_distortion_is_smooth_and_bounded_by_its_magnitude(rng):
    cloud = make_cloud(rng, 2000)
    moved = transforms.elastic_distortion(cloud, 0.5, 0.4, rng)["coord"] - cloud["coord"]
    assert 0.01 < np.abs(moved).mean() < 0.4 * 3
    distance = np.linalg.norm(cloud["coord"][:, None] - cloud["coord"][None], axis=2)
    near = np.argwhere((distance > 0) & (distance < 0.05))
    difference = np.linalg.norm(moved[near[:, 0]] - moved[near[:, 1]], axis=1)
    far = np.linalg.norm(moved[rng.permutation(2000)] - moved, axis=1)
    assert difference.mean() < 0.3 * far.mean()


@pytest.mark.parametrize("sides", [(178, 178, 30), (4000, 5000, 2500), (1e7, 0, 0), (0.1, 0, 0)])
def test_elastic_distortion_of_any_extent(rng, sides):
    cloud = {"coord": (rng.random((500, 3)) * sides).astype(np.float32)}
    cell = transforms.noise_cell(sides, 0.2)
    assert (cell > 0.2) == (sides[0] > 1) and cell < 0.2 + max(sides) / 50
    moved = transforms.elastic_distortion(cloud, 0.2, 0.4, rng)["coord"] - cloud["coord"]
    assert np.isfinite(moved).all() and np.abs(moved).max() < 1.1 and 0.01 < np.abs(moved).mean()
    assert transforms.noise_cell((40, 30, 4), 0.2) == 0.2                                # as always, where it fits


@pytest.mark.parametrize("sides", [(10, 4, 3), (130, 120, 25), (0.3, 0.3, 0.3)])
def test_no_augmentation_makes_a_cloud_larger_than_told(rng, sides):
    cloud = {"coord": (rng.random((60, 3)) * sides).astype(np.float32)}
    cloud["coord"][:8] = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * sides
    settings = PointAugmentation(stretch=0.2, elastic=((4.0, 0.4),))
    told = transforms.largest_sides(sides, settings)
    seen = np.max([np.ptp(transforms.augment(cloud, settings, rng)["coord"], 0) for _ in range(60)], 0)
    assert (seen <= told).all() and (told < 1.6 * np.linalg.norm(sides) + 1).all() and seen.max() > (told.max() - 0.9) / 2
    assert transforms.largest_sides(sides, STILL).tolist() == pytest.approx([max(sides[:2])] * 2 + [sides[2]])


def test_clouds_too_wide_for_the_grid_are_refused_in_one_line():
    cloud = {"coord": np.float32([[0, 0, 0], [4000, 5000, 2500]])}
    with pytest.raises(ValueError, match="250001 voxels of 0.02 m.*at most 65535.*millimetres"):
        transforms.voxelize(cloud["coord"], 0.02)


def test_auto_contrast_leaves_a_channel_of_one_value(rng):
    color = rng.uniform(50, 100, (30, 3)).astype(np.float32)
    color[:, 1] = 7
    stretched = transforms.auto_contrast({"color": color}, 1.0)["color"]
    assert (stretched[:, 1] == 7).all()
    np.testing.assert_allclose(stretched[:, [0, 2]].min(0), 0, atol=1e-4)
    np.testing.assert_allclose(stretched[:, [0, 2]].max(0), 255, atol=1e-3)


# -- voxels ------------------------------------------------------------------------------------------------------------

def test_voxelize_equals_a_dictionary(rng):
    coord = rng.uniform(-1, 1, (800, 3)).astype(np.float32)
    voxels = transforms.voxelize(coord, 0.25)
    cells = {}
    for i, cell in enumerate(np.floor(coord.astype(np.float64) / 0.25).astype(int)):
        cells.setdefault(tuple(cell), []).append(i)
    low = np.array(list(cells)).min(0)
    assert len(voxels.grid_coord) == len(cells) and voxels.grid_coord.dtype == np.int32
    for voxel, grid in enumerate(voxels.grid_coord):
        members = cells[tuple(grid + low)]
        begin = voxels.start[voxel]
        assert voxels.order[begin:begin + voxels.count[voxel]].tolist() == members
        assert (voxels.inverse[members] == voxel).all()


def test_far_apart_voxels_stay_apart_without_memory():
    voxels = transforms.voxelize(np.float32([[0, 0, 0], [1300, 1300, 1300], [0, 0, 0.001]]), 0.02)
    assert sorted(voxels.count) == [1, 2] and voxels.grid_coord.max() == 65000


def test_fragments_show_every_point_and_fill_every_voxel(rng):
    voxels = transforms.voxelize(rng.uniform(0, 1, (500, 3)), 0.3)
    index = np.stack(list(transforms.fragments(voxels)))
    assert index.shape == (voxels.count.max(), len(voxels.count))
    assert set(index.ravel()) == set(range(500))
    assert (voxels.inverse[index] == np.arange(len(voxels.count))).all()


def test_representatives_are_members_and_all_equally_likely(rng):
    voxels = transforms.voxelize(np.float32([[0, 0, 0]] * 3 + [[1, 1, 1]] * 2), 0.1)
    draws = np.stack([transforms.representatives(voxels, rng) for _ in range(3000)])
    assert (voxels.inverse[draws] == np.arange(2)).all()
    share = np.bincount(draws.ravel(), minlength=5) / 3000
    np.testing.assert_allclose(share, [1 / 3] * 3 + [1 / 2] * 2, atol=0.04)


def test_sphere_crop_keeps_the_nearest(rng):
    cloud = make_cloud(rng)
    center = cloud["coord"][17]
    cropped = transforms.sphere_crop(cloud, 100, center)
    distance = np.linalg.norm(cloud["coord"] - center, axis=1)
    np.testing.assert_allclose(np.linalg.norm(cropped["coord"] - center, axis=1), np.sort(distance)[:100], rtol=1e-5)
    assert (cropped["coord"][0] == center).all() and len(cropped["label"]) == 100
    assert len(transforms.sphere_crop(cloud, 500, center)["coord"]) == 500


def test_mix_offsets():
    for ends, mixed in (([4], [4]), ([3, 8], [8]), ([2, 8, 11], [8, 11]), ([1, 3, 6, 10, 15], [3, 10, 15])):
        assert transforms.mix_offsets(torch.tensor(ends)).tolist() == mixed


# -- shape -------------------------------------------------------------------------------------------------------------

def test_height_is_measured_from_the_fullest_layer():
    z = [0.5] * 5 + [0.502] + [0.55, 0.7, 0.3]                      # a table at 0.5, things on it, one point below
    coord = np.c_[np.arange(9), np.arange(9), z].astype(np.float32)
    height = transforms.height_over_plane(coord)
    assert height.shape == (9, 1) and height.dtype == np.float32
    np.testing.assert_allclose(height[:, 0], np.array(z) - 0.5, atol=1e-6)
    assert transforms.height_over_plane(coord[:1]) == 0
    np.testing.assert_allclose(transforms.stack_features({"height": height}, ["height"]), 10 * height)     # decimetres
    np.testing.assert_allclose(transforms.scale({"coord": coord, "height": height}, 2)["height"], 2 * height)


def test_local_shape_of_four_points():
    """Covariance of the corners of a cube's corner: 3/16 on the diagonal, -1/16 beside it; eigenvalues 1/16, 1/4, 1/4."""
    coord = np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    shape = transforms.local_shape(coord, [0.5])
    assert shape.shape == (4, 4) and shape.dtype == np.float32
    np.testing.assert_allclose(shape[:, 0], 1, rtol=1e-5)                               # 3 sqrt((1/16) / (9/16))
    np.testing.assert_allclose(shape[:, 1], [-3 ** 0.5] + [3 ** -0.5] * 3, rtol=1e-5)   # the origin lies behind
    np.testing.assert_allclose(shape[:, 2:], 0, atol=1e-6)                              # all four have one normal
    assert not transforms.local_shape(coord[:3], [0.5]).any()
    assert not transforms.local_shape(np.tile(coord, (3, 1)), [10]).any()               # one cell


def test_local_shape_tells_plane_cylinder_and_ball_apart(rng):
    u, v = rng.uniform(-1, 1, (2, 20_000))
    side = np.sqrt(1 - v ** 2)
    surfaces = {"plane": np.c_[0.5 * u, v * 0, 0.5 * v],
                "cylinder": np.c_[np.cos(np.pi * u / 3), np.sin(np.pi * u / 3), v],
                "ball": np.c_[side * np.cos(np.pi * u), side * np.sin(np.pi * u), v]}
    median = {name: np.median(transforms.local_shape(0.1 * points, [0.01]), 0) for name, points in surfaces.items()}
    np.testing.assert_allclose(median["plane"], 0, atol=1e-6)
    thickness, bend, first, second = median["cylinder"]
    assert thickness > 0.05 and abs(bend) > 0.06 and first > 0.1 and second < 0.3 * first
    thickness, bend, first, second = median["ball"]
    assert thickness > 0.05 and abs(bend) > 0.06 and second > 0.7 * first > 0.07
    ball = 0.1 * surfaces["ball"]
    turned = transforms.rotate({"coord": ball.astype(np.float32)}, 90, "z", (0, 0, 0))["coord"]
    np.testing.assert_allclose(np.median(transforms.local_shape(turned, [0.01]), 0), median["ball"], rtol=0.1)


# -- the recipe --------------------------------------------------------------------------------------------------------

def test_arrays_stay_in_step_through_the_whole_recipe(rng):
    """The label is written into the colour (kept by a recipe without colour changes) and a second array."""
    settings = PointAugmentation(contrast_probability=0, color_shift_probability=0, color_jitter_probability=0,
                                 crop_share=0.6, crop_points=200)
    for _ in range(30):
        cloud = make_cloud(rng)
        cloud["color"][:] = cloud["label"][:, None] * 50
        sample = transforms.training_sample(cloud, 0.05, settings, rng)
        np.testing.assert_array_equal(sample["color"][:, 0], sample["label"] * 50)
        assert len({len(values) for values in sample.values()}) == 1 and len(sample["coord"]) <= 200
        np.testing.assert_allclose(np.linalg.norm(sample["normal"], axis=1), 1, atol=1e-5)
        assert sample["coord"].dtype == np.float32 and sample["grid_coord"].dtype == np.int32


def test_without_augmentation_a_voxel_is_one_of_its_points_not_their_mean(rng):
    cloud = make_cloud(rng)
    sample = transforms.training_sample(cloud, 0.5, STILL, rng)
    raw = [(cloud["normal"] == normal).all(1).nonzero()[0].item() for normal in sample["normal"]]
    for name in ("color", "label"):
        np.testing.assert_array_equal(sample[name], cloud[name][raw])
    moved = sample["coord"] - cloud["coord"][raw]
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], moved.shape), atol=1e-6)  # centred, nothing else
    assert len(np.unique(sample["grid_coord"], axis=0)) == len(sample["coord"]) == 64      # 4 x 4 x 4 cells


def test_center_shift_after_the_crop_and_grid_left_alone(rng):
    cloud = make_cloud(rng, 2000)
    settings = PointAugmentation(**{**vars(STILL), "crop_points": 50})
    sample = transforms.training_sample(cloud, 0.1, settings, rng)
    low, high = sample["coord"].min(0), sample["coord"].max(0)
    np.testing.assert_allclose((low + high)[:2], 0, atol=1e-5)
    lows = [transforms.training_sample(cloud, 0.1, settings, rng)["grid_coord"].min() for _ in range(10)]
    assert max(lows) > 0                                                                 # not moved back to zero


@pytest.mark.parametrize("share, most, expected", [(0.6, None, 38), (0.6, 20, 20), (None, 20, 20), (None, None, 64)])
def test_crops_of_both_data_sets(rng, share, most, expected):
    settings = PointAugmentation(**{**vars(STILL), "crop_share": share, "crop_points": most})
    assert len(transforms.training_sample(make_cloud(rng), 0.5, settings, rng)["coord"]) == expected


def test_each_random_change_happens_as_often_as_it_should(rng):
    cloud = transforms.center_shift(make_cloud(rng, 60), z=True)
    off = vars(STILL)
    for changes, name, expected in (({"rotation_probability": 0.5, "rotation_xy": 0.0}, "normal", 0.5),
                                    ({"flip_probability": 0.5}, "normal", 0.75),
                                    ({"elastic_probability": 0.95}, "coord", 0.95),
                                    ({"contrast_probability": 0.2}, "color", 0.2),
                                    ({"color_shift_probability": 0.95}, "color", 0.95),
                                    ({"color_jitter_probability": 0.95}, "color", 0.95)):
        settings = PointAugmentation(**{**off, **changes})
        changed = [np.abs(transforms.augment(cloud, settings, rng)[name] - cloud[name]).max() > 1e-3 for _ in range(200)]
        assert abs(np.mean(changed) - expected) < 0.1, changes
    dropped = transforms.augment(cloud, PointAugmentation(**{**off, "dropout": 0.2}), rng)
    assert len(dropped["coord"]) == 48                                                   # always
    same = transforms.augment(cloud, STILL, rng)
    for name, values in cloud.items():
        np.testing.assert_allclose(same[name], values, atol=1e-6)


@pytest.mark.parametrize("name", ["color", "normal"])
def test_colours_or_normals_are_dropped_as_often_as_asked(rng, name):
    cloud = transforms.center_shift(make_cloud(rng, 60), z=True)
    settings = PointAugmentation(**{**vars(STILL), f"drop_{name}": 0.4})
    found = [transforms.augment(cloud, settings, rng) for _ in range(300)]
    dropped = [(sample[name] == 0).all() for sample in found]
    assert 0.3 < np.mean(dropped) < 0.5
    other = {"color": "normal", "normal": "color"}[name]
    for sample, empty in zip(found, dropped, strict=True):
        np.testing.assert_allclose(sample[other], cloud[other], atol=1e-6)
        assert empty or np.allclose(sample[name], cloud[name], atol=1e-6)
    only_coord = {key: cloud[key] for key in ("coord", "label")}
    assert set(transforms.augment(only_coord, settings, rng)) == {"coord", "label"}


def test_without_dropping_the_random_numbers_are_those_of_before():
    """A run that was made before drop_color and drop_normal existed draws the same numbers: a digest made by that code."""
    rng = np.random.default_rng(5)
    cloud = make_cloud(rng, 400)
    sample = transforms.training_sample(cloud, 0.05, PointAugmentation(crop_points=200), rng)
    assert [len(sample["coord"]), int(sample["grid_coord"].sum()), rng.integers(1 << 30)] == [200, 11995, 630426501]
    assert sample["color"].sum(dtype=np.float64) == pytest.approx(79686.613, rel=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_clouds_keep_their_place_where_asked(rng, center):
    cloud = make_cloud(rng)
    cloud["coord"] += np.float32([5, -3, 2])
    sample = transforms.training_sample(cloud, 0.05, STILL, rng, center)
    low, high = sample["coord"].min(0), sample["coord"].max(0)
    expected = [0, 0, 1] if center else [6, -2, 3]
    np.testing.assert_allclose((low + high) / 2, expected, atol=0.1)
    assert sample["grid_coord"].min() == 0


@pytest.mark.parametrize("changes, message", [({"dropout": 1.5}, "augmentation.dropout"), ({"dropout": 1.0}, "no point"),
                                              ({"jitter": -1}, "augmentation.jitter"), ({"crop_points": 0}, "no point"),
                                              ({"scale_range": (1.1, 0.9)}, "lowest, highest"),
                                              ({"elastic": ((0, 1),)}, "granularity above 0"),
                                              ({"mix_probability": 2}, "mix_probability"), ({"drop_color": 1.5}, "drop_color"),
                                              ({"drop_normal": -0.1}, "drop_normal")])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PointAugmentation(**changes)


def test_thirteen_views():
    assert len(transforms.VIEWS) == len(set(transforms.VIEWS)) == 13
    assert [view.degrees for view in transforms.VIEWS[:4]] == [0, 90, 180, 270]
    assert transforms.VIEWS[4].factor == 0.95 and transforms.VIEWS[12].mirrored
