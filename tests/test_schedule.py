"""utils/schedule.py against torch's own schedules, values by hand, and the rates of Pointcept's OneCycle."""

import math
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from utils.schedule import SCHEDULES, build_scheduler, build_two_warmups

GOLDEN = Path(__file__).parent / "golden" / "one_cycle.pt"


def make_optimizer(*rates):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates_of(optimizer, scheduler, steps):
    """The rate of each group during each step: list of lists."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def rates(name, total_steps, lr=1e-3, **kwargs):
    optimizer = make_optimizer(lr)
    return [r for r, in rates_of(optimizer, build_scheduler(optimizer, name, total_steps, **kwargs), total_steps)]


@pytest.mark.parametrize("name, kwargs, oracle", [
    ("cosine", {"min_lr": 1e-5}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=19, eta_min=1e-5)),
    ("poly", {"min_lr": 0.0, "power": 0.9}, lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=0.9)),
    ("half_cosine", {"min_lr": 1e-6}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=1e-6)),
    ("constant", {"warmup_steps": 5, "start_factor": 0.1}, lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5)),
    ("step", {"milestones": [5, 12], "gamma": 0.5}, lambda o: lr_scheduler.MultiStepLR(o, [5, 12], gamma=0.5)),
    ("step", {}, lambda o: lr_scheduler.MultiStepLR(o, [13, 17], gamma=0.1)),
    ("onecycle", {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4},
     lambda o: lr_scheduler.OneCycleLR(o, 1e-3, 20)),
])
def test_equals_torch(name, kwargs, oracle):
    optimizer = make_optimizer(1e-3)
    expected = [r for r, in rates_of(optimizer, oracle(optimizer), 20)]
    assert rates(name, 20, **kwargs) == pytest.approx(expected, rel=1e-9)


def test_cosine_by_hand():
    values = rates("cosine", 15, lr=1.0, warmup_steps=4, min_lr=0.1, start_factor=0.2)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])                # warm-up, peak at step 4
    assert values[9] == pytest.approx(0.55) and values[14] == pytest.approx(0.1, rel=1e-12)
    assert all(a > b for a, b in zip(values[4:], values[5:], strict=False))


def test_last_step_is_at_the_minimum_and_the_source_documents_schedule_is_not():
    assert rates("cosine", 100)[-1] == pytest.approx(1e-6, rel=1e-9)
    assert 1e-6 < rates("poly", 100)[-1] < 2e-5
    climbing = rates("half_cosine", 100)
    assert climbing[50] == pytest.approx(1e-6) and climbing[-1] > 0.99e-3


def test_poly_floor_and_warmup():
    values = rates("poly", 12, lr=1.0, warmup_steps=2, min_lr=0.5, power=2.0, start_factor=0.5)
    assert values == pytest.approx([0.5, 0.75] + [0.5 + 0.5 * (1 - t / 10) ** 2 for t in range(10)])


def test_step_stays_above_the_minimum():
    assert rates("step", 9, lr=1.0, milestones=[3, 6], min_lr=0.05) == pytest.approx([1] * 3 + [0.1] * 3 + [0.05] * 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_groups_keep_their_proportions(name):
    optimizer = make_optimizer(1e-3, 1e-4, 1e-2)
    scheduler = build_scheduler(optimizer, name, 30, warmup_steps=0 if name == "onecycle" else 3)
    values = rates_of(optimizer, scheduler, 30)
    for first, second, third in values:
        assert second == pytest.approx(first / 10) and third == pytest.approx(first * 10)
    if name == "cosine":
        assert max(values[-1]) == pytest.approx(1e-6)        # the floor of the largest


@pytest.mark.parametrize("name", SCHEDULES)
def test_resume_in_the_middle(name, tmp_path):
    def build():
        optimizer = make_optimizer(1e-3, 1e-4)
        return optimizer, build_scheduler(optimizer, name, 20, warmup_steps=0 if name == "onecycle" else 4)

    whole = rates_of(*build(), 20)
    optimizer, scheduler = build()
    rates_of(optimizer, scheduler, 11)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "last.pth")
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    optimizer, scheduler = build()
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert rates_of(optimizer, scheduler, 9) == whole[11:]
    # A schedule built on an optimiser that was loaded before has the initial rates in mind, not the decayed ones.
    optimizer = make_optimizer(1e-3, 1e-4)
    optimizer.load_state_dict(state["optimizer"])
    scheduler = build_scheduler(optimizer, name, 20, warmup_steps=0 if name == "onecycle" else 4)
    assert name != "onecycle" or [group["max_lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-4])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert rates_of(optimizer, scheduler, 9) == [pytest.approx(pair) for pair in whole[11:]]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_trial_runs_of_a_few_steps(name, steps):
    values = rates(name, steps)
    assert len(values) == steps and all(0 < rate <= 1e-3 for rate in values)
    if name not in ("onecycle", "step"):
        assert values[0] == 1e-3 and (steps == 1 or rates(name, steps, warmup_steps=1)[1] == 1e-3)
    if name == "onecycle" and steps > 2:
        assert max(values) == values[1] == pytest.approx(1e-3)


def test_onecycle_equals_pointcept():
    expected = torch.load(GOLDEN, weights_only=True)["output"]                   # rates during each of 100 steps
    optimizer = make_optimizer(0.002, 0.0002)
    scheduler = build_scheduler(optimizer, "onecycle", 100)
    lr, beta1 = [], []
    for _ in range(100):
        lr.append([group["lr"] for group in optimizer.param_groups])
        beta1.append([group["betas"][0] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(torch.tensor(lr, dtype=torch.float64), expected["lr"], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(beta1, dtype=torch.float64), expected["beta1"], rtol=0, atol=1e-6)


def test_onecycle_can_leave_beta1_alone():
    optimizer = make_optimizer(1e-3)
    scheduler = build_scheduler(optimizer, "onecycle", 20, cycle_momentum=False)
    rates_of(optimizer, scheduler, 10)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("kwargs, message", [
    ({"name": "cosin"}, "unknown schedule 'cosin', did you mean 'cosine'.*half_cosine"),
    ({"total_steps": 0}, "total_steps is 0, needs at least 1"),
    ({"warmup_steps": 10}, r"warmup_steps is 10, must be in 0\.\.9 for 10 steps"),
    ({"warmup_steps": -1}, "warmup_steps is -1"),
    ({"min_lr": 0.1}, r"min_lr is 0.1, must be in 0\.\.0.001"),
    ({"min_lr": -1e-6}, "min_lr is -1e-06"),
    ({"start_factor": -0.1}, r"start_factor must be in \[0, 1\], got -0.1"),
    ({"name": "poly", "power": 0.0}, "power must be above 0, got 0.0"),
    ({"name": "step", "gamma": 1.5}, r"gamma must be in \(0, 1\], got 1.5"),
    ({"lr": 0.0}, "learning rate must be above 0, got 0.0"), ({"lr": math.inf}, "learning rate"),
    ({"name": "onecycle", "warmup_steps": 3}, "own warm-up .pct_start=0.05.; set warmup_steps=3 to 0"),
    ({"name": "onecycle", "pct_start": 1.0}, r"pct_start must be in \(0, 1\), got 1.0"),
    ({"name": "onecycle", "div_factor": 0.0}, "div_factor and final_div_factor must be above 0, got 0.0 and 1000.0"),
])
def test_errors(kwargs, message):
    kwargs = {"name": "cosine", "total_steps": 10, **kwargs}
    optimizer = make_optimizer(kwargs.pop("lr", 1e-3))
    with pytest.raises(ValueError, match=message):
        build_scheduler(optimizer, **kwargs)


def test_two_warmups_need_a_step_behind_them():
    for head, encoder in ((6, 4), (-1, 2), (12, 0)):
        with pytest.raises(ValueError, match=f"warm-ups of {head} and {encoder} steps leave none of 10"):
            build_two_warmups(make_optimizer(1e-3), [True], 10, head, encoder)


def test_two_warmups_of_a_run_of_one_step():
    optimizer = make_optimizer(1e-3)
    scheduler = build_two_warmups(optimizer, [True], 1, 0, 0)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3                       # no step follows
