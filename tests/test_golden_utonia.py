"""The rotation of Utonia in attention, encoder and decoder, names of Utonia and Concerto, against the official code.

The numbers come from github.com/Pointcept/Utonia at 323e61313e2f (Apache-2.0) and Pointcept at d74c646db6ab (MIT), on
random weights: tests/golden/utonia. The second half plants mistakes and checks that these numbers notice each.
"""

import gzip
import io
import json
from pathlib import Path

import pytest
import torch

import models.point_transformer
from models.point_networks import NETWORKS, network_config, network_name
from models.point_rotary import PointRotary, Rotation, frequencies
from models.point_transformer import (
    Block,
    PatchAttention,
    PointTransformerV3,
    Stage,
    build_point_transformer,
    centred,
    upcast,
    with_decoder,
)

GOLDEN = Path(__file__).parent / "golden" / "utonia"
ORDERS = ["z", "z-trans", "hilbert", "hilbert-trans"]
SCHEMA = json.loads(gzip.decompress((GOLDEN / "key_schema.json.gz").read_bytes()))["models"]


def load(name):
    return torch.load(io.BytesIO(gzip.decompress((GOLDEN / f"{name}.pt.gz").read_bytes())), weights_only=True)


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


def stage_of(given):
    sizes = torch.diff(given["offset"], prepend=given["offset"].new_zeros(1))
    scene = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    coord = centred(given["coord"], scene, len(sizes))
    return Stage(given["grid_coord"], scene, sizes.tolist(), int(given["grid_coord"].max()), ORDERS, coord)


def gradients(module, output, feat):
    """Of sum(output * w) with the README's weights, for feat and all parameters."""
    weight = torch.cos(1 + torch.arange(output.numel(), dtype=torch.float64)) / output.numel() ** 0.5
    names, parameters = zip(*module.named_parameters(), strict=True)
    scalar = (output * weight.view_as(output).float()).sum()
    found = torch.autograd.grad(scalar, [*([] if feat is None else [feat]), *parameters], allow_unused=True)
    return found[0] if feat is not None else None, dict(zip(names, found[len(found) - len(names):], strict=True))


# -- rotation and attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", range(4))
def test_rotation(variant):
    golden = load("rope")
    case, given, expected = (golden[part]["variants" if part != "inputs" else "qk"][variant] for part in ("config", "inputs", "outputs"))
    rotary = PointRotary(case["head_dim"], Rotation(case["base"], 1.1, 1.2)).eval()
    assert_close(rotary.inv_freq, expected["inv_freq"], golden["tolerance"])
    for name in ("q", "k"):
        assert_close(rotary(given[name], golden["inputs"]["xyz"]), expected[name], golden["tolerance"])
    if "cos" in expected:                                    # each angle stands twice in its chunk
        angle = rotary.angles(golden["inputs"]["xyz"]).repeat(1, 1, 2).flatten(1)
        assert_close(angle.cos(), expected["cos"], golden["tolerance"])
        assert_close(angle.sin(), expected["sin"], golden["tolerance"])


def attention_of(golden, jitter=None, rescale=None):
    config = golden["config"]
    rotation = Rotation(config["rope_base"], jitter, rescale)
    attention = PatchAttention(config["channels"], config["heads"], config["patch_size"], rotation=rotation)
    attention.load_state_dict({name: tensor.float() for name, tensor in golden["state_dict"].items()})
    return attention


def check_attention():
    golden = load("attention")
    given, expected, tolerance = golden["inputs"], golden["outputs"], golden["tolerance"]
    attention, feat = attention_of(golden).eval(), given["feat"].requires_grad_()
    out = attention(feat, stage_of(given), golden["config"]["order_index"])
    assert_close(out, expected["feat"], tolerance)
    grad_feat, grad = gradients(attention, out, feat)
    assert_close(grad_feat, expected["grad_feat"], tolerance)
    for name, value in expected["grad_parameters"].items():
        assert_close(grad[name], value, tolerance)


def test_attention():
    check_attention()


def check_attention_training():
    """The recorded factors of a training step in place of drawn ones; none in eval mode."""
    golden = load("attention_training")
    given, expected = golden["inputs"], golden["outputs"]
    attention, stage, order = attention_of(golden, 1.1, 1.2), stage_of(given), golden["config"]["order_index"]
    drawn = iter([given["log_jitter"], given["log_rescale"]])
    uniform, asked = torch.Tensor.uniform_, []

    def recorded(self, low, high):
        asked.append((tuple(self.shape), low, high))
        return self.copy_(next(drawn))

    torch.Tensor.uniform_ = recorded
    try:
        with torch.no_grad():
            found = {"train": attention.train()(given["feat"], stage, order)}
            found["eval"] = attention.eval()(given["feat"], stage, order)
    finally:
        torch.Tensor.uniform_ = uniform
    log = torch.tensor([1.1, 1.2], dtype=torch.float64).log().tolist()
    assert asked == [((3,), pytest.approx(-log[0]), pytest.approx(log[0])), ((1,), pytest.approx(-log[1]), pytest.approx(log[1]))]
    for name, out in found.items():
        assert_close(out, expected[name], golden["tolerance"])


def test_attention_in_training():
    check_attention_training()


def check_block():
    golden = load("block")
    given, expected, tolerance, config = golden["inputs"], golden["outputs"], golden["tolerance"], golden["config"]
    block = Block(config["channels"], config["heads"], config["patch_size"], config["order_index"], rotation=Rotation(config["rope_base"]))
    block.load_state_dict({name: tensor.float() for name, tensor in golden["state_dict"].items()})
    feat = given["feat"].requires_grad_()
    out = block.eval()(feat, stage_of(given))
    assert_close(out, expected["feat"], tolerance)
    grad_feat, grad = gradients(block, out, feat)
    assert_close(grad_feat, expected["grad_feat"], tolerance)
    for name, value in expected["grad_parameters"].items():
        assert_close(grad[name], value, tolerance)
    for name, value in expected["grad_norms"].items():
        assert grad[name].norm().item() == pytest.approx(value, rel=1e-3)


def test_block():
    check_block()


# -- networks --------------------------------------------------------------------------------------------------------


def network(golden):
    model = build_point_transformer(golden["config"])
    model.load_state_dict(golden["state_dict"])              # float16 without loss, inv_freq float32
    return model.eval()


def with_coord(given):
    return {**given, "coord": given["feat"][:, :3].contiguous()}


def middle(coord, offset):
    """The middle of the box of each row's scene, as positions inside the network are relative to it."""
    ends = offset.tolist()
    rows = []
    for first, last in zip([0, *ends], ends, strict=False):
        part = coord[first:last]
        rows.append(((part.amin(0) + part.amax(0)) / 2).expand(last - first, 3))
    return torch.cat(rows)


def check_encoder(case):
    golden = load("encoder")
    given, expected, tolerance = golden["inputs"][case], golden["outputs"][case], golden["tolerance"]
    with torch.no_grad():
        stages = network(golden)(with_coord(given), given["order_permutation"])
    shift = middle(given["feat"][:, :3], given["offset"])
    for stage, goal in zip(stages, expected["stages"], strict=True):
        assert torch.equal(stage.grid_coord, goal["grid_coord"].int()) and torch.equal(stage.offset, goal["offset"])
        scene_shift = shift[torch.diff(given["offset"], prepend=given["offset"].new_zeros(1)).cumsum(0) - 1]
        rows = torch.repeat_interleave(scene_shift, torch.diff(stage.offset, prepend=stage.offset.new_zeros(1)), 0)
        assert_close(stage.coord + rows, goal["coord"], tolerance)
        assert_close(stage.feat, goal["feat"], tolerance)
    for fine, coarse in zip(stages[:-1], expected["stages"][1:], strict=True):
        assert torch.equal(fine.cluster, coarse["cluster"].long())
    if "upcast_feat" in expected:
        assert_close(upcast(stages)[::4], expected["upcast_feat"], tolerance)


@pytest.mark.parametrize("case", ["one_scene", "two_scenes"])
def test_encoder(case):
    check_encoder(case)


def check_decoder(case):
    golden = load("decoder")
    given, expected, tolerance = golden["inputs"][case], golden["outputs"][case], golden["tolerance"]
    model = network(golden)
    stages = model(with_coord(given), given["order_permutation"])
    for s in range(4):
        assert_close(stages[s].feat, expected["stages"][f"dec{s}"], tolerance)
    _, grad = gradients(model, stages[0].feat, None)
    for name, norm in expected["grad_norms"].items():
        assert grad[name].norm().item() == pytest.approx(norm, rel=tolerance["grad_relative_norm"]), name
    for name, value in expected["grad"].items():
        assert (grad[name] - value).norm() <= tolerance["grad_relative_norm"] * value.norm(), name


@pytest.mark.parametrize("case", ["one_scene", "two_scenes"])
def test_decoder(case):
    check_decoder(case)


# -- names and shapes at full size -----------------------------------------------------------------------------------

NAMES = {"utonia": "utonia", "utonia_small (distillation config)": "utonia_small", "utonia_tiny (distillation config)": "utonia_tiny",
         "concerto_large": "concerto_large", "concerto_base": "sonata", "concerto_small": "sonata_small"}
TOTALS = {"utonia": (477, 137_253_744), "concerto_large": (453, 207_667_456), "concerto_base": (453, 108_461_376), "concerto_small": (273, 38_648_992),
          "utonia with decoder (dec, ft)": (660, 157_734_054), "concerto_large with decoder (dec, ft)": (628, 224_162_752),
          "concerto_base with decoder (dec, ft)": (628, 124_792_848)}


def check_schema(config, expected):
    with torch.device("meta"):
        model = build_point_transformer(config)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == expected["keys"] and list(found) == list(expected["keys"]) and len(found) == expected["entries"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
    assert sum(buffer.numel() for buffer in model.buffers()) == expected["buffer_elements"]


@pytest.mark.parametrize("key", SCHEMA)
def test_names_and_shapes(key):
    expected = SCHEMA[key]
    check_schema(expected["config"], expected)
    assert TOTALS.get(key, (expected["entries"], expected["parameters"])) == (expected["entries"], expected["parameters"])


@pytest.mark.parametrize("key, name", NAMES.items())
def test_our_table_of_networks_is_the_official_one(key, name):
    config = network_config(name)
    check_schema(config, SCHEMA[key])
    assert config == {argument: SCHEMA[key]["config"][argument] for argument in config}
    assert network_name(SCHEMA[key]["config"]) == name


@pytest.mark.parametrize("name", ["utonia", "concerto_large", "concerto_base"])
def test_decoders_are_the_official_ones(name):
    """Never derived from the encoder: Concerto large has 64, 96, 192, 384, not 64, 128, 256, 512."""
    expected = SCHEMA[f"{name} with decoder (dec, ft)"]
    config = with_decoder({**SCHEMA[name]["config"], "mask_token": False})
    assert {key: config[key] for key in config if key.startswith("dec_")} == \
        {key: value for key, value in expected["config"].items() if key.startswith("dec_")}
    check_schema(config, expected)


def test_networks_are_told_apart_by_the_rotation_too():
    assert len({network[:3] for network in NETWORKS.values()}) == len(NETWORKS)
    assert network_name({**network_config("utonia"), "rope_base": None}) is None
    assert network_name({**network_config("sonata"), "enc_depths": [1, 1, 1, 1, 1]}) is None


# -- planted mistakes ------------------------------------------------------------------------------------------------
# Each changes one line of ours to what its name says; the numbers above must notice.


def no_rotation(patch):
    patch.setattr(PatchAttention, "rotate", lambda self, qkv, coord: qkv)


def other_base(patch):
    patch.setattr(PointRotary, "angles", lambda self, coord: coord.float()[:, :, None] * frequencies(6 * len(self.inv_freq), 10_000))


def axes_reversed(patch):
    angles = PointRotary.angles
    patch.setattr(PointRotary, "angles", lambda self, coord: angles(self, coord.flip(1)))


def times_two_pi(patch):
    angles = PointRotary.angles
    patch.setattr(PointRotary, "angles", lambda self, coord: angles(self, coord) * 2 * torch.pi)


def the_other_way_round(patch):
    angles = PointRotary.angles
    patch.setattr(PointRotary, "angles", lambda self, coord: -angles(self, coord))


def pairs_instead_of_halves(patch):
    def forward(self, vectors, coord):
        angle = self.angles(coord)[:, None]
        first, second = vectors.unflatten(2, (3, -1, 2)).unbind(4)
        return torch.stack([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 4).flatten(2)
    patch.setattr(PointRotary, "forward", forward)


def halves_of_the_whole_head(patch):
    def forward(self, vectors, coord):
        angle = self.angles(coord).flatten(1)[:, None]       # (n, 1, D / 2)
        first, second = vectors.chunk(2, 2)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], 2)
    patch.setattr(PointRotary, "forward", forward)


def query_only(patch):
    rotate = PatchAttention.rotate

    def change(self, qkv, coord):
        third = qkv.shape[1] // 3
        return torch.cat([rotate(self, qkv, coord)[:, :third], qkv[:, third:]], 1)
    patch.setattr(PatchAttention, "rotate", change)


def value_too(patch):
    rotate = PatchAttention.rotate

    def change(self, qkv, coord):
        third = qkv.shape[1] // 3
        value = qkv[:, 2 * third:]
        return torch.cat([rotate(self, qkv, coord)[:, :2 * third], rotate(self, torch.cat([value, value, value], 1), coord)[:, :third]], 1)
    patch.setattr(PatchAttention, "rotate", change)


def positions_in_bfloat16(patch):
    angles = PointRotary.angles
    patch.setattr(PointRotary, "angles", lambda self, coord: angles(self, coord.bfloat16()))


def cell_indices_instead_of_metres(patch):
    patch.setattr(models.point_transformer.Block, "forward", with_positions(lambda stage: stage.grid_coord.float()))


def with_positions(positions):
    forward = models.point_transformer.Block.forward

    def change(self, x, stage):
        kept, stage.coord = stage.coord, positions(stage)
        out = forward(self, x, stage)
        stage.coord = kept
        return out
    return change


def positions_twice_as_large(patch):
    patch.setattr(models.point_transformer.Block, "forward", with_positions(lambda stage: 2 * stage.coord))


def first_point_instead_of_the_mean(patch):
    def first(coord, cluster, size):
        place = torch.full((size,), len(coord)).scatter_reduce(0, cluster, torch.arange(len(coord)), "amin")
        return coord[place]
    patch.setattr(models.point_transformer, "mean_positions", first)


def mean_of_the_finest_points(patch):
    """Weighted by the number of finest voxels instead of the mean of the means."""
    counts = {}

    def weighted(coord, cluster, size):
        weight = counts.get(len(coord), torch.ones(len(coord)))
        total = torch.zeros(size).index_add_(0, cluster, weight)
        counts[size] = total
        return torch.zeros(size, 3).index_add_(0, cluster, coord * weight[:, None]) / total[:, None]
    patch.setattr(models.point_transformer, "mean_positions", weighted)


def decoder_without_rotation(patch):
    decode = PointTransformerV3.decode

    def change(self, stages):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(PatchAttention, "rotate", lambda self, qkv, coord: qkv)
            return decode(self, stages)
    patch.setattr(PointTransformerV3, "decode", change)


def no_jitter_in_training(patch):
    patch.setattr(PointRotary, "factors", lambda self, device: None)


def jitter_added(patch):
    factors = PointRotary.factors
    forward = PointRotary.angles

    def angles(self, coord):
        factor = factors(self, coord.device)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(PointRotary, "factors", lambda self, device: None)
            return forward(self, coord if factor is None else coord + factor)
    patch.setattr(PointRotary, "angles", angles)


def exponent_missing(patch):
    factors = PointRotary.factors

    def change(self, device):
        factor = factors(self, device)
        return None if factor is None else 1 + factor.log()
    patch.setattr(PointRotary, "factors", change)


def jitter_in_evaluation(patch):
    factors = PointRotary.factors

    def change(self, device):
        self.training, before = True, self.training
        try:
            return factors(self, device) if before else torch.tensor([1.05, 0.95, 1.02])
        finally:
            self.training = before
    patch.setattr(PointRotary, "factors", change)


def coarse_first_upcast(patch):
    def change(stages):
        feat = stages[-1].feat
        for stage in reversed(stages[:-1]):
            feat = torch.cat([feat[stage.cluster], stage.feat], 1)
        return feat
    patch.setitem(globals(), "upcast", change)


def permutations_ignored(patch):
    patch.setattr(PointTransformerV3, "_permutations", lambda self, orders: [[0, 1, 2, 3]] * len(self.enc_channels))


def one_scene():
    check_encoder("one_scene")


def two_scenes():
    check_encoder("two_scenes")


def decoder():
    check_decoder("one_scene")


MISTAKES = [(mistake, check_attention) for mistake in (no_rotation, other_base, axes_reversed, times_two_pi, pairs_instead_of_halves,
                                                       halves_of_the_whole_head, query_only, value_too, positions_in_bfloat16)]
MISTAKES += [(mistake, one_scene) for mistake in (no_rotation, cell_indices_instead_of_metres, positions_twice_as_large,
                                                  first_point_instead_of_the_mean, mean_of_the_finest_points, coarse_first_upcast)]
MISTAKES += [(permutations_ignored, two_scenes), (decoder_without_rotation, decoder)]
MISTAKES += [(mistake, check_attention_training) for mistake in (no_jitter_in_training, jitter_added, exponent_missing, jitter_in_evaluation)]


@pytest.mark.parametrize("mistake, check", MISTAKES, ids=lambda function: function.__name__)
def test_a_planted_mistake_is_noticed(monkeypatch, mistake, check):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_the_sense_of_the_rotation_is_noticed(monkeypatch):
    """Attention sees differences alone: turning both the other way is the mirror image, which only the vectors show."""
    the_other_way_round(monkeypatch)
    with pytest.raises(AssertionError):
        test_rotation(0)
