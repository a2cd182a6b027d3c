"""utils/ema.py: the closed form, what is averaged and what is not, and that applying it leaves no trace."""

import copy

import pytest
import torch
from torch import nn

from utils.ema import EMA


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2)])
        self.plain_norm = nn.BatchNorm1d(3, affine=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)


class Model(nn.Module):
    """A frozen backbone with statistics of its own, and a head with a BatchNorm, one without weights, and dropout."""

    def __init__(self):
        super().__init__()
        self.encoder = Backbone().requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5),
                                  nn.Linear(4, 2))

    def forward(self, x):
        for block in self.encoder.blocks:
            x = block(x)
        return self.head(self.encoder.plain_norm(x))


HEAD = {"head.0.weight", "head.0.bias", "head.4.weight", "head.4.bias", "head.1.weight", "head.1.bias",
        *(f"head.{i}.{name}" for i in (1, 2) for name in ("running_mean", "running_var", "num_batches_tracked"))}


def make(seed=0):
    torch.manual_seed(seed)
    return Model()


def train_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    loss = model(torch.randn(8, 3, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_closed_form():
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = EMA(model, decay=0.2)
    expected = snapshot(model)
    for t in range(12):
        train_step(model, optimizer, t)
        ema.update(model)
        decay = min(0.2, (1 + t) / (10 + t))                                     # 0.1, 0.18.., then 0.2
        for name, tensor in model.state_dict().items():
            live = tensor.clone()
            expected[name] = decay * expected[name] + (1 - decay) * live if live.is_floating_point() else live
        for name, shadow in ema.shadow.items():
            torch.testing.assert_close(shadow, expected[name])
    assert ema.updates == 12 and ema.shadow.keys() == HEAD
    assert ema.shadow["head.1.num_batches_tracked"] == 12                        # copied, not averaged
    assert not torch.equal(ema.shadow["head.4.weight"], model.head[4].weight)


def test_warmup_forgets_the_initial_weights():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    ema = EMA(model, 0.9999)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(100):
        ema.update(model)
    assert ema.shadow["weight"].item() == pytest.approx(1, abs=1e-3)             # 99 if 0.9999 held from the start


def test_only_what_is_trained_is_held():
    model = make()
    assert EMA(model).shadow.keys() == HEAD
    model.encoder.blocks[1].requires_grad_(True)             # now only the first block is a frozen part
    extra = {f"encoder.blocks.1.{name}" for name in model.encoder.blocks[1].state_dict()}
    norm = {f"encoder.plain_norm.{name}" for name in model.encoder.plain_norm.state_dict()}
    assert EMA(model).shadow.keys() == HEAD | extra | norm   # and no non-persistent table
    assert EMA(model.requires_grad_(False)).shadow == {}


def test_applied_restores_exactly_also_after_an_exception():
    model = make()
    ema = EMA(model, 0.5)
    train_step(model, torch.optim.SGD(model.head.parameters(), lr=0.1), 0)
    ema.update(model)
    live, shadow = snapshot(model), {name: tensor.clone() for name, tensor in ema.shadow.items()}
    with ema.applied(model):
        inside = snapshot(model)
        model.train()(torch.randn(8, 3))                     # moves the BatchNorm statistics
    assert all(torch.equal(inside[name], shadow[name]) for name in HEAD)
    assert all(torch.equal(inside[name], live[name]) for name in live if name not in HEAD)
    assert equal(snapshot(model.head), {name[5:]: live[name] for name in live if name.startswith("head.")})
    assert equal(ema.shadow, shadow)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the evaluation"), ema.applied(model):
        raise RuntimeError("in the evaluation")
    assert equal(snapshot(model), before)
    with ema.applied(model):                                 # not left in the applied state
        for misuse in (lambda: ema.update(model), lambda: ema.applied(model).__enter__()):
            with pytest.raises(AssertionError, match="inside EMA.applied"):
                misuse()


def test_training_does_not_notice_the_average():
    runs = []
    for evaluates in (False, True):
        model = make()
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.1)
        ema = EMA(model)
        for t in range(4):
            train_step(model, optimizer, t)
            ema.update(model)
            if evaluates:
                with ema.applied(model), torch.no_grad():
                    model.eval()(torch.randn(2, 3))
                model.train()
        runs.append(snapshot(model))
    assert equal(*runs)


def test_resume_is_exact(tmp_path):
    def run(steps, model, ema, optimizer):
        for t in steps:
            train_step(model, optimizer, t)
            ema.update(model)

    model = make()
    optimizer, ema = torch.optim.SGD(model.head.parameters(), lr=0.1), EMA(model)
    run(range(3), model, ema, optimizer)
    torch.save({"ema": ema.state_dict(), "model": model.state_dict()}, tmp_path / "last.pth")
    run(range(3, 6), model, ema, optimizer)

    again = make(seed=1)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    again.load_state_dict(state["model"])
    resumed = EMA(again)
    resumed.load_state_dict(state["ema"])
    run(range(3, 6), again, resumed, torch.optim.SGD(again.head.parameters(), lr=0.1))
    assert equal(resumed.shadow, ema.shadow) and resumed.updates == 6


def test_copy_to():
    model = make()
    ema = EMA(model)
    other = make(seed=1)
    ema.copy_to(other)
    assert equal(snapshot(other.head), snapshot(model.head))
    assert not equal(snapshot(other.encoder), snapshot(model.encoder))


def test_half_precision_weights_have_a_float32_shadow():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, 0.999)
    ema.updates = 100_000                                    # long after the warm-up
    nn.init.constant_(model.weight, 2.0)
    for _ in range(10):
        ema.update(model)                                    # 1 + 0.001 is 1 in bfloat16
    assert ema.shadow["weight"].item() == pytest.approx(2 - 0.999 ** 10)
    with ema.applied(model):
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 2


def test_wrapped_model_has_the_same_names():
    model, compiled = make(), nn.Module()
    compiled._orig_mod = model                               # what torch.compile returns, without its slow import
    ema = EMA(compiled)
    assert ema.shadow.keys() == HEAD
    ema.update(compiled)
    with ema.applied(model):                                 # either way
        pass


def test_errors():
    model = make()
    ema = EMA(model)
    unfrozen = copy.deepcopy(model)
    unfrozen.encoder.blocks[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"differ: 4 names only in the first \['encoder.blocks.1.0.bias', .*a new EMA"):
        ema.update(unfrozen)
    with pytest.raises(ValueError, match=r"differ: 0 names .*, 1 only in the second \['head.0.bias'\]"):
        ema.load_state_dict({"updates": 1, "shadow": {n: t for n, t in ema.shadow.items() if n != "head.0.bias"}})
    wrong = {**ema.shadow, "head.4.weight": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"head.4.weight is \(3, 4\) in the saved .* and \(2, 4\) in this model"):
        ema.load_state_dict({"updates": 1, "shadow": wrong})
    assert ema.updates == 0
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
            EMA(model, decay)
