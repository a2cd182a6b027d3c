"""Serialization, sparse convolution and Point Transformer V3 against numbers computed once by the official code."""

import gzip
import io
import json
from pathlib import Path

import pytest
import torch

from models.point_transformer import (
    Block,
    GridPooling,
    GridUnpooling,
    Stage,
    build_point_transformer,
    build_segmenter,
    upcast,
)
from models.sparse_conv import SubMConv3d, neighbour_table
from utils.losses import MaskedCrossEntropyLoss, lovasz_softmax_loss
from utils.schedule import build_scheduler
from utils.serialization import depth_of, encode, grid_range, patch_layout, serialize

GOLDEN = Path(__file__).parent / "golden" / "sonata"
ORDERS = ["z", "z-trans", "hilbert", "hilbert-trans"]


def load(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def more(name):
    """What the files above were cut to fit without, 1.3 MB: further cases, stages and gradients. Whole numbers int16."""
    content = gzip.decompress((GOLDEN / "more.pt.gz").read_bytes())
    return torch.load(io.BytesIO(content), weights_only=True)[name]


def scenes(offset):
    sizes = torch.diff(offset, prepend=offset.new_zeros(1))
    return torch.repeat_interleave(torch.arange(len(sizes)), sizes), sizes.tolist()


def gradients(module, output, grad_output, *inputs):
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(output, [*inputs, *parameters], grad_output)
    return found[:len(inputs)], dict(zip(names, found[len(inputs):], strict=True))


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


# -- serialization ---------------------------------------------------------------------------------------------------


def test_codes():
    golden = load("serialization")
    for case, given in golden["input"]["codes"].items():
        for order, expected in golden["output"]["codes"][case].items():
            code = encode(given["grid_coord"], given["batch"], order, given["depth"])
            assert code.dtype == torch.int64 and torch.equal(code, expected), (case, order)


@pytest.mark.parametrize("case", ["scenes", "scenes_shuffled"])
def test_order_and_inverse(case):
    golden = load("serialization")
    given, expected = golden["input"]["scenes"], golden["output"][case]
    orders = ORDERS if case == "scenes" else [ORDERS[i] for i in given["order_permutation"]]
    depth = depth_of(grid_range(given["grid_coord"], 2))
    assert depth == expected["depth"]
    result = serialize(given["grid_coord"], scenes(given["offset"])[0], orders, depth)
    for name in ("code", "order", "inverse"):
        assert torch.equal(getattr(result, name), expected[name].long()), name


def test_depth_rule():
    golden = load("serialization")
    found = [depth_of(index) for index in golden["input"]["depth_rule"]["largest_index"].tolist()]
    assert found == golden["output"]["depth_rule"]["depth"].tolist()


def test_patches():
    """Per place of the sequence: the set of places in the patch whose output it keeps."""
    golden = load("patches")
    for case, given in golden["input"].items():
        expected = golden["output"][case]
        bounds = expected["boundaries"].tolist()
        patches = [expected["pad"][a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
        owner = torch.bucketize(expected["unpad"], expected["boundaries"][1:], right=True)
        layout = patch_layout(given["scene_sizes"], given["patch_size"])
        ours, start = {}, 0
        for count, length in layout.groups:
            for patch in layout.slots[start:start + count * length].view(count, length).tolist():
                ours.update({slot: patch for slot in range(start, start + length)})
                start += length
        assert start == len(layout.slots) and torch.equal(layout.slots[layout.unpad], torch.arange(sum(given["scene_sizes"])))
        for place, slot in enumerate(layout.unpad.tolist()):
            assert sorted(ours[slot]) == sorted(patches[owner[place]]), (case, place)


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True], ids=["pairs", "dense"])
@pytest.mark.parametrize("name", ["subm_conv_k3", "subm_conv_k5"])
def test_submanifold_convolution(name, dense):
    golden = load(name)
    given, expected, tolerance = golden["input"], golden["output"], golden["tolerance"]
    conv = SubMConv3d(**golden["config"])
    conv.load_state_dict(golden["state_dict"])
    table = neighbour_table(given["indices"][:, 1:], given["indices"][:, 0], conv.kernel_size, dense)
    feat = given["feat"].requires_grad_()
    out = conv(feat, table)
    assert_close(out, expected["feat"], tolerance["feat"])
    (grad_feat,), grad = gradients(conv, out, given["grad_output"], feat)
    assert_close(grad_feat, expected["grad_feat"], tolerance["grad"])
    assert_close(grad["weight"], expected["grad_weight"], tolerance["grad"])
    assert_close(grad["bias"], expected["grad_bias"], tolerance["grad"])


def test_grid_pooling():
    golden = load("grid_pooling")
    given, expected, tolerance = golden["input"], golden["output"], golden["tolerance"]
    pool = GridPooling(golden["config"]["in_channels"], golden["config"]["out_channels"])
    pool.load_state_dict(golden["state_dict"])
    scene, sizes = scenes(given["offset"])
    stage = Stage(given["grid_coord"], scene, sizes, int(given["grid_coord"].max()), ORDERS)
    coarse = stage.coarser(ORDERS)
    assert torch.equal(coarse.grid_coord, expected["grid_coord"])
    assert torch.equal(coarse.scene, expected["batch"].long())
    assert torch.equal(coarse.offset(), expected["offset"])
    assert torch.equal(stage.cluster, expected["cluster"].long())
    feat = given["feat"].requires_grad_()
    out = pool(feat, stage.cluster, len(coarse.grid_coord))
    assert_close(out, expected["feat"], tolerance["feat"])
    (grad_feat,), grad = gradients(pool, out, given["grad_output"], feat)
    assert_close(grad_feat, expected["grad_feat"], tolerance["grad"])
    for key, value in expected["grad"].items():
        assert_close(grad[key], value, tolerance["grad"])


def test_grid_unpooling():
    golden = load("grid_unpooling")
    given, expected, tolerance = golden["input"], golden["output"], golden["tolerance"]
    config = golden["config"]
    unpool = GridUnpooling(config["in_channels"], config["skip_channels"], config["out_channels"])
    unpool.load_state_dict(golden["state_dict"])
    feat, skip = given["feat"].requires_grad_(), given["skip_feat"].requires_grad_()
    out = unpool(feat, skip, given["cluster"].long())
    assert_close(out, expected["feat"], tolerance["feat"])
    (grad_feat, grad_skip), grad = gradients(unpool, out, given["grad_output"], feat, skip)
    assert_close(grad_feat, expected["grad_feat"], tolerance["grad"])
    assert_close(grad_skip, expected["grad_skip_feat"], tolerance["grad"])
    for key, value in expected["grad"].items():
        assert_close(grad[key], value, tolerance["grad"])


def test_block():
    golden = load("block")
    given, expected, tolerance, config = golden["input"], golden["output"], golden["tolerance"], golden["config"]
    block = Block(config["channels"], config["num_heads"], config["patch_size"], config["order_index"])
    block.load_state_dict(golden["state_dict"])
    scene, sizes = scenes(given["offset"])
    stage = Stage(given["grid_coord"], scene, sizes, int(given["grid_coord"].max()), config["orders"])
    feat = given["feat"].requires_grad_()
    branches = {}
    for name, module in (("cpe_branch", block.cpe[2]), ("attn_branch", block.attn), ("mlp_branch", block.mlp)):
        module.register_forward_hook(lambda _, __, out, name=name: branches.update({name: out}))
    out = block(feat, stage)
    assert len(branches) == 3
    for name, branch in branches.items():
        assert_close(branch, expected[name], tolerance["feat"])
    assert_close(out, expected["feat"], tolerance["feat"])
    (grad_feat,), grad = gradients(block, out, given["grad_output"], feat)
    assert_close(grad_feat, expected["grad_feat"], tolerance["grad"])
    all_grad = expected["grad"] | more("block")["grad"]
    assert len(all_grad) == 18 == len(grad)
    for key, value in all_grad.items():
        assert_close(grad[key], value, tolerance["grad"])


# -- networks --------------------------------------------------------------------------------------------------------


def build(golden):
    model = build_point_transformer(golden["config"])
    model.load_state_dict(golden["state_dict"])
    return model.eval()


ENCODER_CASES = ["one_scene", "one_scene_shuffled", "two_scenes_shuffled", "small_scene", "room", "mixed_scenes", "one_point"]


def encoder_case(case):
    """(input, output by stage) of a case, from both files; the two cases of one scene share all but the features."""
    golden, added = load("encoder"), more("encoder")
    if case in golden["input"]:
        output = golden["output"][case]
        for stage, feat in added.get(case, {"feat": {}})["feat"].items():
            output[stage]["feat"] = feat
        return golden["input"][case], output
    given, output = added[case]["input"], added[case]["output"]
    if case == "one_scene_shuffled":
        given = added["one_scene"]["input"] | given
        output = {stage: added["one_scene"]["output"][stage] | values for stage, values in output.items()}
    whole = {name: values.int() for name, values in given.items() if name == "grid_coord"}
    return given | whole, {stage: values | {"grid_coord": values["grid_coord"].int()} for stage, values in output.items()}


@pytest.mark.parametrize("case", ENCODER_CASES)
def test_encoder(case):
    golden = load("encoder")
    (given, output), tolerance = encoder_case(case), golden["tolerance"]["feat"]
    model = build(golden)
    with torch.no_grad():
        stages = model(given, given["order_permutation"])
    assert len(stages) == 5
    for stage, expected in zip(stages, output.values(), strict=True):
        assert torch.equal(stage.grid_coord, expected["grid_coord"])
        assert torch.equal(stage.offset, expected["offset"])
        if "cluster" in expected:
            assert torch.equal(stage.cluster, expected["cluster"].long())
        assert_close(stage.feat, expected["feat"], tolerance)


def test_random_orders_are_the_official_ones():
    golden = load("encoder")
    given = golden["input"]["two_scenes_shuffled"]
    model = build(golden)
    torch.manual_seed(given["torch_seed"])
    with torch.no_grad():
        stages = model(given)
    expected = golden["output"]["two_scenes_shuffled"]["stage4"]["feat"]
    assert_close(stages[-1].feat, expected, golden["tolerance"]["feat"])


def segmenter(name, mode, case):
    golden, added = load(name), more(name).get(case, {"output": {}})
    model = build_segmenter(golden["config"]["backbone"], golden["config"]["num_classes"], mode)
    model.load_state_dict(golden["state_dict"])
    given = golden["input"].get(case) or {name: values.int() if name == "grid_coord" else values.long() if name == "segment" else values
                                          for name, values in added["input"].items()}
    return model.eval(), given, golden["output"].get(case, {}) | added["output"], golden["tolerance"]


def check_losses(logits, given, expected, tolerance):
    assert_close(logits, expected["seg_logits"], tolerance["seg_logits"])
    cross_entropy = MaskedCrossEntropyLoss(ignore_index=-1)(logits, given["segment"])
    lovasz = lovasz_softmax_loss(logits, given["segment"], ignore_index=-1)
    assert_close(cross_entropy + lovasz, expected["loss"], tolerance["loss"])
    assert_close(cross_entropy, expected["cross_entropy"], tolerance["loss"])
    assert_close(lovasz, expected["lovasz"], tolerance["loss"])
    return cross_entropy + lovasz


def assert_relative(actual, expected, bound):
    assert (actual - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("case", ["two_scenes_shuffled", "room"])
def test_linear_segmenter(case):
    model, given, expected, tolerance = segmenter("linear_segmentor", "lin", case)
    with torch.no_grad():
        feat = upcast(model.backbone(given, given["order_permutation"]))
    if "upcast_feat" in expected:
        assert_close(feat, expected["upcast_feat"], tolerance["feat"])
    check_losses(model(given, given["order_permutation"]), given, expected, tolerance).backward()
    bound = tolerance["grad"]["relative_norm"]
    for name, parameter in model.named_parameters():
        if name in expected["grad"]:
            assert_relative(parameter.grad, expected["grad"][name], bound)
        else:
            assert parameter.grad is None and not parameter.requires_grad


@pytest.mark.parametrize("case", ["two_scenes_shuffled", "room"])
@pytest.mark.parametrize("mode", ["dec", "ft"])
def test_decoder_segmenter(mode, case):
    model, given, expected, tolerance = segmenter("decoder_segmentor", mode, case)
    with torch.no_grad():
        stages = model.backbone(given, given["order_permutation"])
    for s in range(4):
        assert_close(stages[s].feat, expected[f"dec{s}"], tolerance["feat"])
    check_losses(model(given, given["order_permutation"]), given, expected, tolerance).backward()
    trained = 0
    for name, parameter in model.named_parameters():
        if mode == "dec" and name.startswith(("backbone.enc.", "backbone.embedding.")):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        trained += 1
        norm = expected["grad_norm"][name]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=tolerance["grad_norm"]["rtol"]), name
        if name in expected["grad"]:
            assert_relative(parameter.grad, expected["grad"][name], tolerance["grad"]["relative_norm"])
    assert trained == (len(expected["grad_norm"]) if mode == "ft" else 124)


@pytest.mark.parametrize("case", ["scannet-lin_40000", "s3dis-lin_25500"])
def test_schedules_at_full_length(case):
    """The recorded iterations of the whole OneCycle: rates and beta1 of both groups."""
    golden = more("one_cycle")[case]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.002, 0.0002)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    scheduler = build_scheduler(optimizer, "onecycle", golden["total_steps"])
    wanted, row = golden["iteration"].tolist(), 0
    optimizer.step()                                         # without gradients: the schedule alone moves
    for iteration in range(golden["total_steps"]):
        if iteration == wanted[row]:
            for g, group in enumerate(optimizer.param_groups):
                assert group["lr"] == pytest.approx(golden["lr"][row, g].item(), rel=1e-6), iteration
                assert group["betas"] == pytest.approx((golden["beta1"][row, g].item(), golden["beta2"][row, g].item()), abs=1e-6)
                assert group["weight_decay"] == golden["weight_decay"][row, g].item()
            row += 1
            if row == len(wanted):
                break
        scheduler.step()
    assert row == len(wanted)


# -- names and shapes at full size -------------------------------------------------------------------------------------

SCHEMA = json.loads((GOLDEN / "key_schema.json").read_text())


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name, tensors, elements", [("sonata.pth", 453, 108_461_376), ("sonata_small.pth", 273, 38_648_992)])
def test_released_names(name, tensors, elements):
    expected = SCHEMA[name]
    with torch.device("meta"):
        model = build_point_transformer(expected["config"])
    found = shapes(model)
    assert found == expected["state_dict"] and list(found) == list(expected["state_dict"])
    assert len(found) == tensors and sum(p.numel() for p in model.state_dict().values()) == elements


@pytest.mark.parametrize("mode, num_classes, key", [("lin", 20, "lin"), ("dec", 20, "dec"), ("ft", 20, "ft"),
                                                    ("lin", 200, "scannet200-lin"), ("lin", 13, "s3dis-lin")])
def test_segmenter_names(mode, num_classes, key):
    expected = SCHEMA[f"segmentor_{key}"]
    with torch.device("meta"):
        model = build_segmenter(SCHEMA["sonata.pth"]["config"], num_classes, mode)
    state = expected.get("state_dict") or SCHEMA["segmentor_lin" if mode == "lin" else "segmentor_dec"]["state_dict"]
    state = state | expected.get("state_dict_differs_from_lin_in", {})
    found = shapes(model)
    assert found == state and list(found) == list(state) and len(found) == expected["tensors"]
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == expected["trainable"]
    groups = expected["optimizer_groups"]
    for group, inside in (("with_keyword", True), ("without_keyword", False)):
        sizes = [size for name, size in trained.items() if ("block" in name) == inside]
        assert {"tensors": len(sizes), "elements": sum(sizes)} == groups[group]
    for name, block in expected.get("blocks", {}).items():
        found = model.backbone.get_submodule(name)
        assert found.drop_path.p == pytest.approx(block["drop_path"], abs=1e-6)
        assert found.index % 4 == block["order_index"]
