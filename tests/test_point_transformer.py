import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.point_transformer import (
    GridPooling,
    PatchAttention,
    PointDropPath,
    Stage,
    attend,
    build_point_transformer,
    build_segmenter,
    upcast,
)
from utils.losses import IGNORE_INDEX, MaskedCrossEntropyLoss, lovasz_softmax_loss

ORDERS = ["z", "z-trans", "hilbert", "hilbert-trans"]
CONFIG = {"in_channels": 6, "order": ORDERS, "enc_depths": [1, 2, 1], "enc_channels": [16, 32, 32],
          "enc_num_head": [1, 2, 2], "enc_patch_size": [32, 32, 32], "dec_depths": [2, 1], "dec_channels": [16, 32],
          "dec_num_head": [1, 2], "dec_patch_size": [32, 32], "drop_path": 0.3, "shuffle_orders": True}


def scene(count, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(side ** 3, generator=generator)[:count]
    grid = torch.stack([flat // side ** 2, flat // side % side, flat % side], 1).int()
    return {"grid_coord": grid, "feat": torch.randn(count, 6, generator=generator), "offset": torch.tensor([count]),
            "label": torch.randint(0, 5, (count,), generator=generator)}


def batch_of(*scenes):
    parts = {key: torch.cat([scene[key] for scene in scenes]) for key in ("grid_coord", "feat", "label")}
    return {**parts, "offset": torch.cat([scene["offset"] for scene in scenes]).cumsum(0)}


def strong(model, seed=0):
    """Weights large enough for every branch, norm and bias to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = (3.0 if "qkv" in name else 1.0) / parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def network(**changes):
    return strong(build_point_transformer({**CONFIG, **changes})).eval()


def segmenter(mode, **changes):
    return strong(build_segmenter({**CONFIG, **changes}, 5, mode))


IDENTITY = torch.arange(4).repeat(3, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- attention -------------------------------------------------------------------------------------------------------


def line(count):
    """Voxels along z, whose order on the curve z is the obvious one."""
    grid = torch.zeros(count, 3, dtype=torch.int32)
    grid[:, 2] = torch.arange(count)
    return Stage(grid, torch.zeros(count, dtype=torch.long), [count], count - 1, ["z"])


def naive_attention(attention, x, patch_size):
    """Softmax of each place over its patch, written out."""
    q, k, v = attention.qkv(x).view(len(x), 3, attention.num_heads, -1).unbind(1)
    rows = []
    for i in range(len(x)):
        first = 0 if len(x) <= patch_size else min(i // patch_size * patch_size, len(x) - patch_size)
        keys, values = k[first:first + patch_size], v[first:first + patch_size]
        score = torch.einsum("hd,nhd->hn", q[i], keys) / q.shape[-1] ** 0.5
        rows.append(torch.einsum("hn,nhd->hd", score.softmax(-1), values).flatten())
    return attention.proj(torch.stack(rows))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 40])
def test_attention_with_a_borrowed_tail(count):
    attention = strong(PatchAttention(32, 2, 8))
    x = torch.randn(count, 32, requires_grad=True)
    out, expected = attention(x, line(count), 0), naive_attention(attention, x, 8)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((value * weights).sum(), x)[0] for value in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [16, 18, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_padded_heads_attend_alike(width, scale):
    q, k, v = torch.randn(3, 2, 4, 20, width).mul(2).requires_grad_().unbind(0)
    plain, padded = attend(q, k, v, scale, pad=False), attend(q, k, v, scale, pad=True)
    assert padded.shape == plain.shape
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded, plain) or width % 8


def test_attention_stays_in_its_patch():
    attention, stage = strong(PatchAttention(16, 1, 8)), line(16)
    x = 0.2 * torch.randn(16, 16)                            # or the softmax would look at one voxel only
    before = attention(x, stage, 0)
    x[8] += 1                                                # the nearest neighbour of voxel 7, in the next patch
    after = attention(x, stage, 0)
    assert torch.equal(before[:8], after[:8])
    assert (before[8:] != after[8:]).any(1).all()


def test_scenes_of_any_size_do_not_mix():
    """Scenes shorter and longer than the patch in one batch: each as if it were alone."""
    model, scenes = network(), [scene(n, seed=n) for n in (20, 150, 20, 1, 33)]
    for piece in scenes:
        piece["grid_coord"][0] = 11                          # equal depths, or the Hilbert curves differ
    together = model(batch_of(*scenes), IDENTITY)
    for level in range(3):
        alone = torch.cat([model(piece, IDENTITY)[level].feat for piece in scenes])
        torch.testing.assert_close(together[level].feat, alone, rtol=1e-4, atol=1e-5)


# -- the network -----------------------------------------------------------------------------------------------------


def test_order_of_the_voxels_in_the_batch_does_not_matter():
    model, given, permutation = network(), scene(200), torch.randperm(200)
    shuffled = {key: value if key == "offset" else value[permutation] for key, value in given.items()}
    one, other = model(given, IDENTITY), model(shuffled, IDENTITY)
    torch.testing.assert_close(other[0].feat, one[0].feat[permutation], rtol=1e-4, atol=1e-5)
    assert torch.equal(other[0].cluster, one[0].cluster[permutation])
    assert torch.equal(one[0].grid_coord, given["grid_coord"]) and one[2].cluster is None
    assert torch.equal(one[1].grid_coord[one[0].cluster], given["grid_coord"] >> 1)


def test_doubled_voxels_are_deterministic_and_pool_together():
    given = batch_of(scene(120, 6), scene(120, 6, 1))
    given["offset"] = given["offset"][1:]                    # Mix3D: two scenes in one grid
    model = network()
    stages = model(given, IDENTITY)
    assert len(given["grid_coord"].unique(dim=0)) < 240 == len(stages[0].feat)
    assert len(stages[1].feat) == len((given["grid_coord"] >> 1).unique(dim=0))
    assert all(torch.equal(a.feat, b.feat) for a, b in zip(stages, model(given, IDENTITY), strict=True))


def test_pooling_takes_the_maximum_after_the_projection():
    pool = strong(GridPooling(4, 8))
    pool.norm, cluster = nn.Identity(), torch.tensor([1, 0, 1, 1, 2])
    feat = torch.randn(5, 4)
    projected = pool.proj(feat)
    expected = torch.stack([projected[cluster == c].amax(0) for c in range(3)])
    torch.testing.assert_close(pool(feat, cluster, 3), nn.functional.gelu(expected))


def test_random_orders():
    model, given = network(), scene(200)
    torch.manual_seed(3)
    first = model(given)[0].feat
    torch.manual_seed(3)
    drawn = torch.stack([torch.randperm(4) for _ in range(3)])
    assert torch.equal(model(given, drawn)[0].feat, first)
    assert not torch.equal(model(given, drawn.flip(0))[0].feat, first)
    model.shuffle_orders = False
    state = torch.get_rng_state()
    assert torch.equal(model(given)[0].feat, model(given, IDENTITY)[0].feat)
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_path_of_points():
    drop, x = PointDropPath(0.3).train(), torch.ones(20_000, 3)
    out = drop(x)
    assert torch.equal(out[:, 0], out[:, 2])
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])              # points of one scene differ
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("mode", ["enc", "dec"])
def test_checkpointing_changes_nothing(mode):
    given, results = scene(150), []
    for checkpointing in (False, True):
        model = network(enc_mode=mode == "enc", gradient_checkpointing=checkpointing).train()
        torch.manual_seed(0)                                 # the same drop path, also in the second computation
        model(given, IDENTITY)[0 if mode == "dec" else -1].feat.square().sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert results[0].keys() == results[1].keys() and all(value is not None for value in results[0].values())
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, msg=name)


def test_mask_token():
    model, given = network(mask_token=True, enc_mode=True), scene(100)
    mask = torch.arange(100) < 40
    plain = model(given, IDENTITY)[0].feat
    masked = model({**given, "mask": mask}, IDENTITY)[0].feat
    assert not torch.allclose(plain, masked)
    hidden = {**given, "feat": torch.where(mask[:, None], 7.0, given["feat"]), "mask": mask}
    torch.testing.assert_close(model(hidden, IDENTITY)[0].feat, masked)
    with pytest.raises(ValueError, match="no mask_token"):
        network()({**given, "mask": mask})


def test_autocast_stays_close():
    model, given = network(enc_mode=True), scene(200)
    expected = model(given, IDENTITY)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(given, IDENTITY)
    for one, other in zip(found, expected, strict=True):
        assert one.feat.dtype == torch.float32               # the residual stream
        assert (one.feat - other.feat).norm() < 0.05 * other.feat.norm()


def test_upcast():
    stages = network(enc_mode=True)(scene(200), IDENTITY)
    feat = upcast(stages)
    assert feat.shape == (200, 80)
    parts = feat.split([16, 32, 32], 1)
    assert all(part.std(0).min() > 0 for part in parts)
    cluster = stages[0].cluster
    assert torch.equal(parts[0], stages[0].feat) and torch.equal(parts[1], stages[1].feat[cluster])
    assert torch.equal(parts[2], stages[2].feat[stages[1].cluster[cluster]])
    assert torch.equal(upcast(stages[:2]), feat[:, :48]) and upcast(stages[1:]).shape == (len(stages[1].feat), 64)


# -- segmentation ----------------------------------------------------------------------------------------------------


def test_split_head_equals_the_head_on_the_upcast_features():
    model, given = segmenter("lin").eval(), batch_of(scene(150), scene(90, seed=1))
    logits = model(given, IDENTITY)
    expected = model.seg_head(upcast(model.backbone(given, IDENTITY)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for columns in (slice(0, 16), slice(16, 48), slice(48, 80)):             # no stage is without effect
        weight = model.seg_head.weight.detach().clone()
        with torch.no_grad():
            model.seg_head.weight[:, columns] = 0
            assert not torch.allclose(model(given, IDENTITY), logits, atol=1e-2)
            model.seg_head.weight.copy_(weight)


def sonata_loss(logits, label):
    return MaskedCrossEntropyLoss()(logits, label) + lovasz_softmax_loss(logits, label)


@pytest.mark.parametrize("mode", ["lin", "dec", "ft"])
def test_a_step_changes_what_it_should(mode):
    model, given = segmenter(mode).train(), batch_of(scene(150), scene(90, seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    sonata_loss(model(given), given["label"]).backward()
    optimizer.step()
    frozen = {"lin": ("backbone.",), "dec": ("backbone.embedding.", "backbone.enc."), "ft": ()}[mode]
    for name, parameter in model.named_parameters():
        unchanged = torch.equal(parameter, before[name])
        assert unchanged == name.startswith(frozen), name
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_the_frozen_encoder_follows_train_unless_told():
    given = scene(150)
    for frozen_eval in (False, True):
        model = strong(build_segmenter(CONFIG, 5, "lin", frozen_eval)).train()
        assert model.backbone.enc.training is not frozen_eval and model.seg_head.training
        same = torch.equal(model(given, IDENTITY), model(given, IDENTITY))
        assert same is frozen_eval                           # drop path is on, or not
        model.eval()
        assert torch.equal(model(given, IDENTITY), model(given, IDENTITY))
    model = strong(build_segmenter(CONFIG, 5, "dec", True)).train()
    assert not model.backbone.enc.training and model.backbone.dec.training


def test_learns():
    torch.manual_seed(0)
    given = batch_of(scene(150), scene(120, seed=1))
    given["label"] = (given["feat"][:, 0] > 0).long() + 2 * (given["grid_coord"][:, 2] > 5).long()
    given["label"][::10] = IGNORE_INDEX
    model = build_segmenter(CONFIG, 5, "ft").train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    for _ in range(40):
        optimizer.zero_grad()
        sonata_loss(model(given), given["label"]).backward()
        optimizer.step()
    keep = given["label"] >= 0
    correct = model.eval()(given, IDENTITY).argmax(1)[keep] == given["label"][keep]
    assert correct.float().mean() > 0.8                      # four classes, the largest 0.27


def test_decoder_by_default():
    config = {key: value for key, value in CONFIG.items() if not key.startswith("dec_")} | {"enc_mode": True}
    model = build_segmenter(config, 5, "dec")
    assert model.backbone.dec_channels == (64, 32) and model.seg_head.in_features == 64
    assert model(scene(50)).shape == (50, 5)


def test_a_network_of_one_stage_has_its_head_on_the_encoder():
    one = {key: value[:1] if key.startswith("enc_") else value
           for key, value in CONFIG.items() if not key.startswith("dec_")}
    model, given = strong(build_segmenter(one, 5, "ft")).eval(), scene(50)
    assert not model.backbone.dec and model.seg_head.in_features == 16
    stages, restore = model.backbone.encode(given, IDENTITY[:1])
    expected = model.seg_head(stages[0].feat).index_select(0, restore)
    torch.testing.assert_close(model(given, IDENTITY[:1]), expected, rtol=0, atol=0)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, message", [
    ({"enc_dephts": [1]}, r"unknown key 'enc_dephts'; did you mean enc_depths"),
    ({"enable_rpe": True}, r"enable_rpe is True; only False is supported"),
    ({"stride": [2, 4]}, r"stride is \[2, 4\]; only 2"), ({"pre_norm": False}, "pre_norm is False; only True"),
    ({"attn_drop": 0.1}, "attn_drop is 0.1; only 0"), ({"layer_scale": 1e-5}, "layer_scale is 1e-05"),
    ({"order": ["z", "hillbert"]}, "order: expected one of .*did you mean hilbert"),
    ({"enc_depths": [1, 2]}, r"enc_depths is \[1, 2\]; expected 3 numbers"),
    ({"dec_depths": []}, r"dec_depths is \[\]; expected 2 numbers above 0, or enc_mode: true"),
    ({"enc_num_head": [1, 3, 2]}, "enc_channels 32 is no multiple of 3 heads")])
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match="^model config: " + message):
        build_point_transformer({**CONFIG, **changes})


def test_other_errors():
    with pytest.raises(ValueError, match="model config: in_channels, order missing"):
        build_point_transformer({key: value for key, value in CONFIG.items() if key not in ("order", "in_channels")})
    build_point_transformer({**CONFIG, "enable_flash": True, "type": "PT-v3m2", "traceable": True, "stride": [2, 2],
                             "layer_scale": None, "freeze_encoder": True, "upcast_softmax": True})
    with pytest.raises(ValueError, match="mode: expected one of lin, dec, ft, lora"):
        build_segmenter(CONFIG, 5, "linear")
    model, given = network(), scene(30)
    for change, message in [({"offset": torch.tensor([29])}, r"offset \[29\] do not fit"),
                            ({"offset": torch.tensor([0, 30])}, "none of them empty"),
                            ({"feat": given["feat"][:, :5]}, "feat has 5 channels, the model takes 6"),
                            ({"grid_coord": given["grid_coord"] - 3}, "smallest index is -3"),
                            ({"grid_coord": given["grid_coord"] + 66_000}, "expected 0..65534; is the scene in milli")]:
        with pytest.raises(ValueError, match=message):
            model({**given, **change})
    with pytest.raises(ValueError, match=r"orders: expected 3 permutations of 0\.\.3"):
        model(given, IDENTITY[:2])


def test_runs_where_the_usual_extensions_are_refused():
    """spconv, torch_scatter, flash_attn and the rest are not even tried."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"spconv", "torch_scatter", "flash_attn", "pointops", "timm", "addict"}:
            raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
from tests.test_point_transformer import network, scene, segmenter
import models.sonata_weights
network()(scene(40))
segmenter("ft")(scene(40)).sum().backward()
print("done")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("mode", ["lin", "dec", "ft", "lora"])
def test_deterministic_on_cuda(mode, rotates):
    given = batch_of(scene(1500, 24), scene(1500, 24, 1), scene(20, seed=2))
    given["coord"] = given["grid_coord"] * 0.02
    given["offset"] = given["offset"][1:]                    # Mix3D
    changes = {"enc_channels": [18, 36, 36], "dec_channels": [18, 36], "rope_base": 10.0, "jitter_coords": 1.1, "rescale_coords": 1.2}
    model, results = segmenter(mode, **(changes if rotates else {})), []
    expected = model.eval()(given, IDENTITY)
    model, given = model.cuda(), {key: value.cuda() for key, value in given.items()}
    torch.testing.assert_close(model(given, IDENTITY).cpu(), expected, rtol=1e-3, atol=1e-3)
    for _ in range(4):
        torch.manual_seed(0)
        model.train().zero_grad()
        logits = model(given)
        nn.functional.cross_entropy(logits, given["label"]).backward()
        results.append([logits, *[p.grad for p in model.parameters() if p.grad is not None]])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
