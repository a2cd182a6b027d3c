"""data/point_transforms.py and data/points.py against numbers computed once by Pointcept's data pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data import point_transforms as transforms
from data.point_files import PointCloud
from data.points import PointSpec, PreciseTest, collate_points, to_cloud

GOLDEN = Path(__file__).parent / "golden" / "sonata"


def load(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


class Recorded:
    """Stands in for a Generator: hands out the recorded draws in order."""

    def __init__(self, *draws):
        self.draws = [np.asarray(draw) for draw in draws]

    def standard_normal(self, shape, dtype=np.float64):
        draw = self.draws.pop(0)
        assert draw.shape == tuple(shape)
        return draw.astype(dtype)

    random = standard_normal


def apply_named(name, cloud, settings, draws):
    if name.startswith("center_shift"):
        return transforms.center_shift(cloud, settings["apply_z"])
    if name.startswith("rotate"):
        return transforms.rotate(cloud, settings["angle"][0] * 180, settings["axis"], settings.get("center"))
    match name:
        case "scale":
            return transforms.scale(cloud, settings["scale"][0])
        case "flip":
            return transforms.flip(cloud, True, True)
        case "jitter":
            return transforms.jitter(cloud, settings["sigma"], settings["clip"], Recorded(*draws[name]))
        case "elastic":
            rng = Recorded(*draws[name])
            for granularity, magnitude in settings["distortion_params"]:
                cloud = transforms.elastic_distortion(cloud, granularity, magnitude, rng)
            return cloud
        case "auto_contrast":
            return transforms.auto_contrast(cloud, settings["blend_factor"])
        case "chromatic_translation":
            return transforms.color_translation(cloud, settings["ratio"], Recorded(draws[name][1]))
        case "chromatic_jitter":
            return transforms.color_jitter(cloud, settings["std"], Recorded(draws[name][1]))
        case "normalize_color":
            return {**cloud, "color": transforms.stack_features(cloud, ["color"])}
        case "sphere_crop_middle_point":
            cloud = {**cloud, "index": np.arange(len(cloud["coord"]))}
            return transforms.sphere_crop(cloud, settings["point_max"], cloud["coord"][len(cloud["coord"]) // 2])
    raise AssertionError(f"no counterpart of {name}")


@pytest.mark.parametrize("name", list(load("transforms")["config"]))
def test_transform_equals_the_official_one(name):
    golden = load("transforms")
    cloud = {key: value.numpy() for key, value in golden["input"]["cloud"].items() if key != "segment"}
    before = {key: value.copy() for key, value in cloud.items()}
    result = apply_named(name, cloud, golden["config"][name], golden["input"]["draws"])
    expected = {**cloud, **{key: value.numpy() for key, value in golden["output"][name].items()}}
    for key, value in expected.items():
        if key == "index":
            np.testing.assert_array_equal(result[key], value)
        else:
            atol = {"coord": 1e-5, "normal": 1e-6, "color": 1e-3}[key]
            np.testing.assert_allclose(result[key], value, atol=atol, rtol=0)
            assert result[key].dtype == np.float32
    for key, value in before.items():
        np.testing.assert_array_equal(cloud[key], value)                     # the input is left alone


def test_grid_sampling_equals_the_official_one():
    golden = load("grid_sample")
    output = {key: value.numpy() for key, value in golden["output"].items() if key != "train"}
    voxels = transforms.voxelize(golden["input"]["coord"].numpy(), golden["config"]["grid_size"])
    np.testing.assert_array_equal(voxels.grid_coord, output["voxel_grid_coord"])
    np.testing.assert_array_equal(voxels.inverse, output["voxel_of_point"])
    np.testing.assert_array_equal(np.stack(list(transforms.fragments(voxels))), output["fragment_index"])

    class Draws:
        def integers(self, low, high):
            return golden["input"]["train_draw"].numpy() % high

    train = golden["output"]["train"]
    index = transforms.representatives(voxels, Draws())
    np.testing.assert_array_equal(index, train["index"].numpy())
    np.testing.assert_array_equal(golden["input"]["segment"].numpy()[index], train["segment"].numpy())


def test_views_fragments_and_votes_equal_the_official_ones():
    golden = load("test_views")
    source, output = golden["input"], golden["output"]
    cloud = PointCloud(source["coord"].numpy(), source["color"].numpy(), source["normal"].numpy(), None)
    spec = PointSpec(grid_size=golden["config"]["voxelize"]["grid_size"])
    test = PreciseTest(to_cloud(cloud, spec), spec, source["fragment_logits"][0].shape[1])
    batches = list(test)
    assert len(batches) == len(output["fragments"]) == 39
    for batch, expected, logits in zip(batches, output["fragments"], source["fragment_logits"], strict=True):
        torch.testing.assert_close(batch["index"], expected["index"].long(), atol=0, rtol=0)
        torch.testing.assert_close(batch["grid_coord"], expected["grid_coord"], atol=0, rtol=0)
        torch.testing.assert_close(batch["feat"], expected["feat"], atol=1e-5, rtol=0)
        assert batch["offset"].tolist() == [len(batch["index"])]
        test.add(batch, logits)
    torch.testing.assert_close(test.votes, output["votes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(test.prediction(), output["pred"], atol=0, rtol=0)


@pytest.mark.parametrize("name", list(load("mix3d")["input"]))
def test_mix3d_equals_the_official_one(name):
    golden = load("mix3d")
    source, output = golden["input"][name], golden["output"][name]
    samples = [{"coord": feat, "feat": feat, "label": label, "mix_draw": 0.5}
               for feat, label in zip(source["feat"], source["segment"], strict=True)]
    for probability, key in ((0.4, "offset_plain"), (0.6, "offset_mixed")):
        batch = collate_points(samples, probability)
        assert batch["offset"].tolist() == output[key].tolist() and batch["offset"].dtype == torch.int64
        torch.testing.assert_close(batch["feat"], output["feat"], atol=0, rtol=0)
        torch.testing.assert_close(batch["label"], output["segment"], atol=0, rtol=0)
