"""models/point_rotary.py and positions in models/point_transformer.py: oracles by hand, invariants, errors. Parity: test_golden_utonia."""

import math

import numpy as np
import pytest
import torch

from data.points import PointSpec, collate_points, evaluation_sample
from models.point_networks import data_warning, decoder_of, describe_network, network_config
from models.point_rotary import PointRotary, Rotation, frequencies
from models.point_transformer import build_point_transformer, build_segmenter, centred, mean_positions
from tests.test_point_transformer import CONFIG, batch_of, scene, strong
from tests.tiny_clouds import tiny_cloud

ROTATING = {**CONFIG, "enc_channels": [18, 36, 36], "enc_num_head": [1, 2, 2], "dec_channels": [18, 36], "rope_base": 10.0, "jitter_coords": 1.1,
            "rescale_coords": 1.2}
IDENTITY = torch.arange(4).repeat(3, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def placed(count=150, seed=0, side=12):
    given = scene(count, side, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    return {**given, "coord": given["grid_coord"] * 0.02 + 0.02 * torch.rand(count, 3, generator=generator)}


def together(*scenes):
    return {**batch_of(*scenes), "coord": torch.cat([scene["coord"] for scene in scenes])}


def network(**changes):
    return strong(build_point_transformer({**ROTATING, **changes})).eval()


# -- the rotation ------------------------------------------------------------------------------------------------------


def test_frequencies():
    assert frequencies(18, 10).tolist() == pytest.approx([1, 10 ** (-1 / 3), 10 ** (-2 / 3)])
    assert frequencies(24, 16).tolist() == pytest.approx([1, 0.5, 0.25, 0.125]) and frequencies(6, 10).tolist() == [1]


def test_a_rotation_by_hand():
    """One pair an axis: (x, y) of a pair at 0.5 m along its axis turns by half a radian."""
    rotary = PointRotary(6, Rotation(10.0)).eval()
    turned = rotary(torch.tensor([[[1.0, 0, 0, 2, 3, 0]]]), torch.tensor([[0.5, math.pi / 2, math.pi]]))
    expected = [math.cos(0.5), math.sin(0.5), -2, 0, -3, 0]
    torch.testing.assert_close(turned.flatten(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_only_differences_of_positions_count_and_lengths_stay():
    rotary, vectors = PointRotary(18, Rotation(10.0)).eval(), torch.randn(40, 4, 18)
    coord = torch.rand(40, 3) * 5
    one, other = rotary(vectors, coord), rotary(vectors, coord + torch.tensor([3.0, -2, 1]))
    scores = [torch.einsum("nhd,mhd->hnm", turned, turned) for turned in (one, other)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.norm(dim=2), vectors.norm(dim=2))
    assert not torch.allclose(one, other)


def test_factors_follow_train_and_stay_in_their_ranges():
    rotary = PointRotary(18, Rotation(10.0, 1.1, 1.2))
    drawn = torch.stack([rotary.train().factors(torch.device("cpu")) for _ in range(2000)]).log()
    common = drawn.mean(1)
    assert drawn.abs().max() <= math.log(1.1 * 1.2) and drawn.std(0).min() > 0.05 and drawn.mean().abs() < 0.02
    assert (drawn - common[:, None]).abs().max() > 0.05                      # an axis has its own factor
    both = PointRotary(18, Rotation(10.0, None, 1.2)).factors(torch.device("cpu"))
    assert both.unique().numel() == 1                                        # all axes the same
    state = torch.get_rng_state()
    assert rotary.eval().factors(torch.device("cpu")) is None
    assert PointRotary(18, Rotation(10.0)).train().factors(torch.device("cpu")) is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("width, rotation, message", [
    (16, Rotation(10.0), "heads of 16 channels cannot be rotated"), (18, Rotation(-1.0), "rope_base is -1.0"), (18, Rotation("ten"), "rope_base is 'ten'"),
    (18, Rotation(math.nan), "rope_base is nan"), (18, Rotation(10.0, 0.9), "jitter_coords is 0.9"), (18, Rotation(10.0, None, [0.9, 1.1]), "rescale_coords is")])
def test_impossible_rotations_are_refused(width, rotation, message):
    with pytest.raises(ValueError, match=message):
        PointRotary(width, rotation)


# -- positions ---------------------------------------------------------------------------------------------------------


def test_means_and_middles_by_loops():
    coord, cluster = torch.rand(50, 3), torch.cat([torch.arange(9), torch.randint(0, 9, (41,))])
    expected = torch.stack([coord[cluster == c].mean(0) for c in range(9)])
    torch.testing.assert_close(mean_positions(coord, cluster, 9), expected)
    number = torch.tensor([0] * 20 + [1] * 30)
    found = centred(coord, number, 2)
    for part in (slice(0, 20), slice(20, 50)):
        low, high = coord[part].amin(0), coord[part].amax(0)
        torch.testing.assert_close(found[part], coord[part] - (low + high) / 2)


def test_stages_carry_the_mean_of_the_stage_before():
    given = together(placed(150), placed(90, 1))
    stages = network(enc_mode=True)(given, IDENTITY)
    for fine, coarse in zip(stages[:-1], stages[1:], strict=True):
        expected = torch.stack([fine.coord[fine.cluster == c].mean(0) for c in range(len(coarse.coord))])
        torch.testing.assert_close(coarse.coord, expected, atol=1e-6, rtol=1e-5)
    moved = stages[0].coord - given["coord"]
    torch.testing.assert_close(moved[:150], moved[:1].expand(150, 3), atol=1e-6, rtol=0)


def test_order_of_the_voxels_in_the_batch_does_not_matter():
    model, given, permutation = network(), placed(200), torch.randperm(200)
    shuffled = {key: value if key == "offset" else value[permutation] for key, value in given.items()}
    one, other = model(given, IDENTITY), model(shuffled, IDENTITY)
    torch.testing.assert_close(other[0].feat, one[0].feat[permutation], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other[0].coord, one[0].coord[permutation])


def test_scenes_do_not_mix():
    model, scenes = network(), [placed(n, n) for n in (20, 150, 33)]
    for piece in scenes:
        piece["grid_coord"][0] = 11                          # equal depths, or the Hilbert curves differ
    together_feat = model(together(*scenes), IDENTITY)
    for level in range(3):
        alone = torch.cat([model(piece, IDENTITY)[level].feat for piece in scenes])
        torch.testing.assert_close(together_feat[level].feat, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift, tolerance", [((30.0, -20, 5), 1e-4), ((452_000.0, 5_411_000, 300), 1e-3)])
def test_map_coordinates_give_the_same_features(shift, tolerance):
    """In float64, moved to the scene before they are rounded; so also under autocast, whose dtype no angle takes."""
    model, given = network(), placed(200)
    far = {**given, "coord": given["coord"].double() + torch.tensor(shift, dtype=torch.float64)}
    one, other = model(given, IDENTITY), model(far, IDENTITY)
    for near, moved in zip(one, other, strict=True):
        torch.testing.assert_close(near.feat, moved.feat, atol=tolerance, rtol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        near, moved = model(given, IDENTITY)[0].feat, model(far, IDENTITY)[0].feat
    assert (near - moved).norm() < 0.01 * near.norm()
    assert (near - one[0].feat).norm() < 0.05 * near.norm()


def test_angles_are_float32_under_autocast(monkeypatch):
    seen, angles = [], PointRotary.angles
    monkeypatch.setattr(PointRotary, "angles", lambda self, coord: seen.append(angles(self, coord)) or seen[-1])
    with torch.autocast("cpu", torch.bfloat16):
        network()(placed(), IDENTITY)
    assert len(seen) == 4 + 3 and all(angle.dtype == torch.float32 for angle in seen)


# -- training ----------------------------------------------------------------------------------------------------------


def test_every_attention_draws_once_for_the_whole_batch(monkeypatch):
    drawn, factors = [], PointRotary.factors
    monkeypatch.setattr(PointRotary, "factors", lambda self, device: drawn.append(factors(self, device)) or drawn[-1])
    network().train()(together(placed(150), placed(90, 1)), IDENTITY)
    assert len(drawn) == 4 + 3 and all(factor.shape == (3,) for factor in drawn)
    assert len({tuple(factor.tolist()) for factor in drawn}) == 7


def test_a_frozen_encoder_jitters_unless_it_is_in_eval_mode():
    given = placed()
    for frozen_eval in (False, True):
        model = strong(build_segmenter({**ROTATING, "drop_path": 0.0}, 5, "lin", frozen_eval)).train()
        assert torch.equal(model(given, IDENTITY), model(given, IDENTITY)) is frozen_eval
        model.eval()
        assert torch.equal(model(given, IDENTITY), model(given, IDENTITY))


@pytest.mark.parametrize("mode", ["enc", "dec"])
def test_checkpointing_draws_the_same_factors_again(mode):
    given, results = placed(), []
    for checkpointing in (False, True):
        model = network(enc_mode=mode == "enc", gradient_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        model(given, IDENTITY)[0 if mode == "dec" else -1].feat.square().sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, msg=name)


# -- with the data path ------------------------------------------------------------------------------------------------


def test_the_batches_of_the_data_path_hold_the_positions():
    cloud = {name: values.astype(np.float32) if name != "segment" else values for name, values in tiny_cloud(0).items()}
    cloud["label"] = cloud.pop("segment")
    given = collate_points([evaluation_sample(cloud, PointSpec(0.05))])
    torch.testing.assert_close(given["coord"], given["feat"][:, :3])
    assert network(in_channels=9)(given, IDENTITY)[0].coord.shape == given["coord"].shape


@pytest.mark.parametrize("coord, message", [(None, "got none"), (torch.zeros(149, 3), r"got \(149, 3\)"), (torch.zeros(150, 3).int(), r"got \(150, 3\) torch.int32")])
def test_a_batch_without_positions_is_refused(coord, message):
    given = {key: value for key, value in placed().items() if key != "coord"} | ({} if coord is None else {"coord": coord})
    with pytest.raises(ValueError, match=r"expected coord \(150, 3\) float in metres, " + message):
        network()(given, IDENTITY)


def test_networks_without_rotation_ask_for_no_positions():
    stages = strong(build_point_transformer(CONFIG)).eval()(scene(100), IDENTITY)
    assert all(stage.coord is None for stage in stages)
    assert not any("rope" in name for name in build_point_transformer(CONFIG).state_dict())


def test_bad_rotations_in_a_config():
    for changes, message in [({"rope_base": 10}, "model config: heads of 16 channels cannot be rotated"),
                             ({"rope_base": -1, "enc_num_head": [1, 1, 1]}, "model config: .*"), ({"rope_bas": 1}, "unknown key 'rope_bas'; did you mean rope_base")]:
        with pytest.raises(ValueError, match=message):
            build_point_transformer({**CONFIG, **changes})
    assert not build_point_transformer({**CONFIG, "rope_base": None, "shift_coords": None, "jitter_coords": 1.1, "rescale_coords": 1.2}).rotates


# -- what the log is told ----------------------------------------------------------------------------------------------


def test_networks_are_described():
    lines = describe_network(network_config("utonia"), "dec")
    assert "the size of Utonia (54 108 216 432 576)" in lines[0] and "base 10; jitter_coords 1.1, rescale_coords 1.2" in lines[0]
    assert "CC BY-NC 4.0" in lines[1] and "Apache-2.0" in lines[1] and lines[2] == "decoder: 54 108 216 432 channels, the official one"
    assert describe_network(network_config("concerto_large"), "ft")[2] == "decoder: 64 96 192 384 channels, the official one"
    assert describe_network(network_config("utonia_tiny"), "ft")[2].endswith("not official: none is known")
    own = describe_network(CONFIG, "dec")
    assert own == ["network: of no released size (16 32 32)", "decoder: 16 32 channels, given in the config"]
    assert len(describe_network(network_config("sonata"), "lin")) == 2


@pytest.mark.parametrize("name, grid_size, scale, expected", [
    ("utonia", 0.02, 1.0, "grid_size=0.01 with data.scale 0.5 for rooms"), ("utonia_tiny", 0.05, 0.2, "data.scale=0.2; it was"), ("utonia", 0.01, 0.5, None),
    ("utonia", 0.01, "object", None), ("utonia", 0.01, 1.0, None), ("sonata", 0.02, 1.0, None), ("concerto_large", 0.02, 0.5, "grid_size=0.02 with data.scale=1"),
    ("sonata", 0.05, 1.0, "the size of Sonata or Concerto base, but data.grid_size=0.05")])
def test_voxels_of_another_size_are_warned_of(name, grid_size, scale, expected):
    found = data_warning(network_config(name), grid_size, scale)
    assert found is None if expected is None else found.startswith("WARNING: ") and expected in found
    assert data_warning(CONFIG, grid_size, scale) is None


def test_unknown_encoders_that_rotate_get_their_own_widths():
    decoder, official = decoder_of({key: value for key, value in ROTATING.items() if not key.startswith("dec_")})
    assert not official and decoder["dec_channels"] == [18, 36] and decoder["dec_num_head"] == [1, 2]
    model = build_segmenter({**network_config("utonia_tiny"), "enc_patch_size": [64] * 5, **decoder_of(network_config("utonia_tiny"))[0]}, 3, "dec")
    assert model.backbone.dec_channels == (18, 36, 72, 144)
    assert decoder_of(network_config("sonata_small"))[0]["dec_channels"] == [64, 64, 128, 256]           # as before Utonia
