"""models/lora.py: the update by hand, starts unchanged, trains nothing else, merges to the same numbers."""

import pytest
import torch

from models.lora import LowRankUpdate, add_lora, merge_lora
from models.point_networks import network_config
from models.point_transformer import PointDropPath, build_point_transformer, build_segmenter
from tests.test_point_rotary import IDENTITY, ROTATING, placed, strong
from tests.test_point_transformer import CONFIG
from train_sonata import compute_loss
from utils.losses import MaskedCrossEntropyLoss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def segmenter(config, **changes):
    return strong(build_segmenter({**config, **changes}, 5, "lora"))


def zero_updates(model):
    for module in model.modules():
        if isinstance(module, LowRankUpdate):
            torch.nn.init.zeros_(module.b)
    return model


def test_the_update_by_hand():
    update = LowRankUpdate(12, 36, rank=4, alpha=10.0, dropout=0.5)
    torch.nn.init.normal_(update.b)
    x = torch.randn(7, 12)
    expected = 2.5 * x @ update.a.T @ update.b.T
    torch.testing.assert_close(update.eval()(x), expected)
    torch.testing.assert_close(x @ update.product().float().T, expected, atol=1e-5, rtol=1e-4)
    average = torch.stack([update.train()(x) for _ in range(4000)]).mean(0)
    assert (average - expected).norm() < 0.1 * expected.norm() and not torch.equal(update(x), update(x))


@pytest.mark.parametrize("config", [CONFIG, ROTATING], ids=["concerto", "utonia"])
def test_the_network_starts_unchanged(config):
    plain = strong(build_segmenter(config, 5, "lin")).eval()
    model = build_segmenter(config, 5, "lora").eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".attn.lora." in name for name in missing) and len(missing) == 2 * 4
    assert torch.equal(model(placed(), IDENTITY), plain(placed(), IDENTITY))


@pytest.mark.parametrize("config", [CONFIG, ROTATING], ids=["concerto", "utonia"])
@pytest.mark.parametrize("frozen_eval", [False, True])
def test_a_step_changes_the_updates_and_the_head_alone(config, frozen_eval):
    model = zero_updates(strong(build_segmenter(config, 5, "lora", frozen_eval))).train()
    given = placed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.02)
    criterion = MaskedCrossEntropyLoss()
    for _ in range(2):                                       # A moves once B is no longer zero
        optimizer.zero_grad()
        compute_loss(criterion, model(given), given["label"], criterion.label_weight(given["label"]), 1.0).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        trained = ".attn.lora." in name or name.startswith("seg_head.")
        assert parameter.requires_grad is trained and (parameter.grad is not None) is trained, name
        assert torch.equal(parameter, before[name]) is not trained, name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_what_is_frozen():
    model = build_segmenter(ROTATING, 5, "lora", frozen_eval=True).train()
    frozen = {id(p) for module in model.frozen() for p in module.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in frozen} == {name for name, p in model.named_parameters() if not p.requires_grad}
    for module in model.backbone.modules():                  # drop path and jitter off, dropout of the updates on
        if isinstance(module, PointDropPath):
            assert not module.training
        if isinstance(module, LowRankUpdate):
            assert module.training
    assert all(not block["block0"].attn.rope.training for block in model.backbone.enc.values())
    with torch.device("meta"):
        large = build_segmenter(network_config("concerto_large"), 20, "lora")
    sizes = [p.numel() for name, p in large.named_parameters() if p.requires_grad and not name.startswith("seg_head.")]
    assert sum(sizes) == 313_344 and large.seg_head.in_features == 1728


@pytest.mark.parametrize("config", [CONFIG, ROTATING], ids=["concerto", "utonia"])
def test_merged_the_numbers_stay_and_the_names_are_the_official_ones(config):
    model, given = segmenter(config).eval(), placed()
    expected = model(given, IDENTITY)
    unchanged = zero_updates(segmenter(config)).eval()(given, IDENTITY)
    assert (expected - unchanged).norm() > 0.1 * unchanged.norm()            # the updates matter
    assert merge_lora(model.backbone.enc) == 4
    torch.testing.assert_close(model(given, IDENTITY), expected, atol=1e-4, rtol=1e-4)
    plain = build_point_transformer({**config, "enc_mode": True})
    assert list(model.backbone.state_dict()) == list(plain.state_dict()) and plain.load_state_dict(model.backbone.state_dict())
    assert merge_lora(model.backbone.enc) == 0


def test_gradients_reach_updates_through_checkpointing_and_autocast():
    for changes in ({}, {"gradient_checkpointing": True}):
        model, given = segmenter(ROTATING, **changes).train(), placed()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(given, IDENTITY)
        logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) is not (".lora." in name or name.startswith("seg_head.")), name
            assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any())


def test_add_lora_leaves_a_decoder_alone():
    model = build_point_transformer(CONFIG)
    add_lora(model.enc)
    assert all(name.startswith("enc.") for name in model.state_dict() if ".lora." in name)
    assert sum(".lora." in name for name in model.state_dict()) == 8
