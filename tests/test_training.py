"""What scripts and utils/run.py share around a step: totals of an epoch in the present and in earlier forms, micro-steps, the optimiser's step."""

import numpy as np
import pytest
import torch
from torch import nn

import utils.training
from utils.device import widest_dtype
from utils.training import Totals, build_loader, micro_steps, optimizer_step


def term(value):
    return torch.tensor(value, requires_grad=True)


def test_totals_are_means_over_steps_of_sums_over_micro_batches():
    totals = Totals()
    for micro_batches in ([(1.0, 2.0), (3.0, 0.5)], [(5.0, 0.0)]):
        for ce, total in micro_batches:
            totals.collect({"ce": term(ce), "total": term(total)})
        totals.end_step()
    assert totals.step_means() == {"ce": 5.0, "total": 0.0}                     # of the last step
    assert totals.means() == {"ce": 4.5, "total": 1.25}
    assert totals.means() == {} and totals.state_dict() == {"terms": {}, "steps": 0}


def test_totals_with_a_weight_are_means_over_elements():
    totals = Totals()
    for loss, weight in ((6.0, 3.0), (1.0, 1.0)):
        totals.collect({"loss": term(loss)}, torch.tensor(weight))
        totals.end_step()
    assert totals.step_means() == {"loss": 1.0} and totals.means() == {"loss": 7 / 4}


def test_totals_with_classes_hold_the_metrics_of_the_epoch():
    totals = Totals(num_classes=2)
    assert torch.equal(totals.state_dict()["counts"], torch.zeros(2, 2, dtype=torch.int64))
    totals.collect({"loss": term(1.0)})
    totals.matrix.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, -100]))
    totals.end_step()
    copy = Totals(num_classes=2)
    copy.load_state_dict(totals.state_dict())
    for each in (totals, copy):
        means = each.means()
        assert means["loss"] == 1.0 and means["overall_accuracy"] == pytest.approx(2 / 3) and means["miou"] == 0.5


@pytest.mark.parametrize("state, means", [
    ({"terms": {"ce": 2.0, "total": 3.0}, "steps": 2}, {"ce": 1.0, "total": 1.5}),
    ({"loss": 6.0, "weight": 4.0, "counts": torch.tensor([[3, 1], [0, 0]])}, {"loss": 1.5, "overall_accuracy": 0.75}),
    ({"steps": 4, "loss": torch.tensor(2.0, dtype=torch.float64), "prediction": torch.tensor(1.0, dtype=torch.float64)},
     {"loss": 0.5, "prediction": 0.25}),
    ({"steps": 0}, {}), ({"loss": 0.0, "weight": 0.0, "counts": torch.zeros(2, 2, dtype=torch.int64)}, {})],
    ids=["terms", "matrix", "flat", "flat, empty", "matrix, empty"])
def test_totals_read_what_earlier_versions_saved(state, means):
    totals = Totals(num_classes=2 if "counts" in state else None)
    totals.load_state_dict(state)
    read = totals.means()
    assert {name: read[name] for name in means} == means and ("loss" in read) == ("loss" in means)


def test_totals_that_counted_no_classes_start_to():
    """A run of a version that did not count goes on with one that does: it counts from there."""
    totals = Totals(2)
    totals.load_state_dict({"terms": {"loss": 3.0}, "steps": 2})
    totals.matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    means = totals.means()
    assert means["loss"] == 1.5 and means["overall_accuracy"] == pytest.approx(2 / 3)


def test_totals_where_there_is_no_float64(monkeypatch):
    """As on MPS: float32 on the device, and no float64 is asked for."""
    zeros = torch.zeros

    def refusing(*shape, dtype=None, device=None, **more):
        if dtype is torch.float64 and device == torch.device("meta"):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return zeros(*shape, dtype=dtype, device=device, **more)

    monkeypatch.setattr(torch, "zeros", refusing)
    widest_dtype.cache_clear()
    assert widest_dtype(torch.device("meta")) is torch.float32 and widest_dtype(torch.device("cpu")) is torch.float64
    widest_dtype.cache_clear()
    monkeypatch.setattr(utils.training, "widest_dtype", lambda device: torch.float32)
    totals = Totals()
    totals.collect({"loss": term(0.5)}, torch.tensor(2.0))
    totals.end_step()
    assert totals.terms["loss"].dtype is torch.float32 and totals.means() == {"loss": 0.25}


def test_restored_totals_go_on_where_there_is_no_float64(monkeypatch):
    monkeypatch.setattr(utils.training, "widest_dtype", lambda device: torch.float32)
    totals = Totals(device="meta")
    totals.load_state_dict({"terms": {"loss": 2.0}, "steps": 1})
    totals.collect({"loss": torch.zeros((), device="meta")})
    totals.end_step()
    assert totals.terms["loss"].dtype is torch.float32 and totals.terms["loss"].device.type == "meta"


def test_sums_of_a_long_epoch_stay_exact():
    totals = Totals()
    for _ in range(20_000):
        totals.collect({"loss": torch.tensor(0.1)})
        totals.end_step()
    assert totals.means()["loss"] == pytest.approx(float(np.float32(0.1)), abs=1e-12)


def test_micro_steps_outside_of_ddp_are_the_batches():
    assert list(micro_steps(nn.Linear(1, 1), [1, 2, 3])) == [1, 2, 3]


def test_an_optimizer_step_clips_the_whole_gradient():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    (weight * torch.tensor([3.0, 4.0])).sum().backward()
    optimizer_step(optimizer, scheduler, torch.amp.GradScaler(enabled=False), 1.0)
    torch.testing.assert_close(weight.data, torch.tensor([-0.6, -0.8]))
    assert weight.grad is None and scheduler.last_epoch == 1


def test_the_loader_draws_nothing_from_this_process():
    data = [torch.tensor(i) for i in range(4)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = build_loader(data, [[0, 1], [2, 3]], 0, torch.device("cpu"))
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]] and torch.equal(torch.get_rng_state(), before)
