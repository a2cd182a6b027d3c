"""utils/run.py with a method of five lines: how steps are grouped, counted, logged, saved, resumed and stopped."""

import argparse
import json
import signal

import pytest
import torch
from torch import nn

from utils.checkpoint import EarlyStopping, load_checkpoint
from utils.cli import ArgumentParser, StopRequested
from utils.config import Config
from utils.ema import EMA
from utils.log import read_log
from utils.metrics import headline
from utils.run import Run, add_run_flags
from utils.training import build_loader, micro_steps

SCRIPT = "train_tiny.py"
DEFAULTS = {"training": {"batch_size": 2, "newer": 7}}


class Numbers(torch.utils.data.Dataset):
    """Items (x, 2 x); remembers the epochs it was told."""

    def __init__(self, count):
        self.count, self.epochs = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return torch.tensor([float(item)]), torch.tensor([2.0 * item])

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def flags(out, *more):
    parser = ArgumentParser()
    add_run_flags(parser, SCRIPT)
    return parser.parse_args(["--output-dir", str(out), "--device", "cpu", "--num-workers", "0", *map(str, more)])


def train(out, *more, items=7, epochs=2, accumulate=2, scores=(0.5, 0.4, 0.6, 0.7), patience=0, after_step=None, config=None):
    """A run with an average of the weights and early stopping; returns (run, main's result)."""
    run = Run(flags(out, *more), SCRIPT, DEFAULTS)
    data, config = Numbers(items), config or Config({"training": {"batch_size": 2, "newer": 7}})
    sampler = run.plan(len(data), config, batch_size=2, epochs=epochs, accumulate=accumulate, compare=("training",))
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    run.restore(model)
    network = run.wrap(model)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 1e-3}, {"params": [model.bias], "lr": 1e-2}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ema, stopping = EMA(model, 0.5), EarlyStopping(patience)
    run.track(config=config, class_names=["a"], palette=[[0, 0, 0]], optimizer=optimizer, scheduler=scheduler, save_interval=1, ema=ema,
              stopping=stopping, note="plain")
    loader = build_loader(data, sampler, 0, run.device)
    run.seen = []
    with run.training("a line", log_interval=1, tensorboard=False):
        for epoch in run.epochs(data, sampler, stopping):
            for micro_batches in run.steps(loader):
                run.seen.append([x.flatten().tolist() for x, _ in micro_batches])
                count = sum(len(x) for x, _ in micro_batches)
                for x, y in micro_steps(network, micro_batches):
                    loss = (network(x) - y).square().sum() / count / 100
                    run.backward(loss, {"square": loss, "total": loss})
                run.update(1.0)
                ema.update(network)
                if after_step is not None:
                    after_step(run)
            result = None
            if run.due(1):
                result = {"metrics": {"miou": scores[epoch], "iou": [1.0]}, "loss": 0.25, "seconds": 0.0}
                stopping.update(scores[epoch])
            run.end_epoch(result, {"mIoU": "miou"}, more={"extra": 3.0} if result else None)
    return run, run.summary()


def entries(out, name="model_last.pth"):
    return load_checkpoint(out / "model" / name, SCRIPT)


def same(first, second):
    assert first.keys() == second.keys()
    for name in ("model", "ema", "optimizer", "totals", "best", "stopping"):
        assert json.dumps(first[name], default=lambda t: t.tolist()) == json.dumps(second[name], default=lambda t: t.tolist()), name
    assert [first[name] for name in ("epoch", "batch", "step")] == [second[name] for name in ("epoch", "batch", "step")]


def test_steps_are_groups_of_micro_batches(tmp_path):
    run, result = train(tmp_path)
    assert [len(step) for step in run.seen] == [2, 2, 2, 2] and sorted(map(len, run.seen[1])) == [1, 2]
    assert sorted(sum(run.seen[0] + run.seen[1], [])) == list(range(7)) and run.seen[:2] != run.seen[2:]
    assert (run.step, run.epoch, run.batch, run.total_steps) == (4, 2, 0, 4)
    assert result == {"miou": 0.4, "loss": 0.25, "extra": 3.0, "best": 0.5, "best_epoch": 1}
    checkpoint = entries(tmp_path)
    assert checkpoint["note"] == "plain" and checkpoint["class_names"] == ["a"] and checkpoint["totals"]["steps"] == 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model_last.pth", "model_best.pth", "checkpoint_epoch_1.pth",
                                                                      "checkpoint_epoch_2.pth"}
    records = read_log(tmp_path / "log" / "log.jsonl")
    assert [(record["split"], record["epoch"]) for record in records] == [("train", 1), ("val", 1), ("train", 2), ("val", 2)]
    assert records[0].keys() - {"epoch", "step", "split"} == {"square", "total", "loss"} and records[1]["extra"] == 3.0


def test_the_logged_rate_is_that_of_the_group_with_the_largest(tmp_path, capsys):
    train(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("lr ")[1].split()[0] for line in lines] == ["5.00e-03", "3.33e-03", "2.50e-03", "2.00e-03"]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_run_stopped_behind_any_step_goes_on_to_the_same_end(tmp_path, step):
    whole, _ = train(tmp_path / "whole")

    def interrupt(run):
        if run.step == step - 1:                               # the step is counted behind it
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StopRequested, match="go on with: .* --resume auto") as stop:
        train(tmp_path / "cut", after_step=interrupt)
    assert stop.value.signum == signal.SIGTERM and entries(tmp_path / "cut")["step"] == step
    train(tmp_path / "cut", "--resume", "auto")
    same(entries(tmp_path / "whole"), entries(tmp_path / "cut"))
    logs = [read_log(tmp_path / name / "log" / "log.jsonl") for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_limit_batches_ends_an_epoch_and_a_resume_right_there_trains_no_step(tmp_path):
    run, _ = train(tmp_path, "--limit-batches", 2)
    assert len(run.seen) == run.total_steps == 2
    again, _ = train(tmp_path, "--limit-batches", 2, "--resume", "auto")
    assert again.seen == []


def test_early_stopping_ends_the_epochs(tmp_path, capsys):
    run, result = train(tmp_path, epochs=4, patience=1)
    assert run.epoch == 2 and result["best_epoch"] == 1 and "stopped early" in capsys.readouterr().out
    again, _ = train(tmp_path, "--resume", "auto", epochs=4, patience=1)
    assert again.seen == []


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2 .*learning rate"):
        train(tmp_path, after_step=lambda run: run.step == 0 and run.model.weight.data.fill_(float("nan")))


def test_a_checkpoint_from_elsewhere_is_what_auto_goes_on_from(tmp_path):
    train(tmp_path / "a")
    with pytest.raises(StopRequested):
        train(tmp_path / "b", "--resume", tmp_path / "a" / "model" / "checkpoint_epoch_1.pth", after_step=lambda run: signal.raise_signal(2))
    assert entries(tmp_path / "b")["step"] == 3
    train(tmp_path / "b", "--resume", "auto")
    same(entries(tmp_path / "a"), entries(tmp_path / "b"))


def test_keys_that_are_newer_than_a_checkpoint_have_their_defaults(tmp_path):
    train(tmp_path, config=Config({"training": {"batch_size": 2}}))
    run, _ = train(tmp_path, "--resume", "auto")
    assert run.checkpoint["config"]["training"] == {"batch_size": 2, "newer": 7}
    with pytest.raises(ValueError, match="training.newer is 8, but 7 in the checkpoint"):
        train(tmp_path, "--resume", "auto", config=Config({"training": {"batch_size": 2, "newer": 8}}))


def test_testing_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="--test-only needs a checkpoint: add --resume"):
        Run(flags(tmp_path, "--test-only"), SCRIPT, DEFAULTS)
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        Run(flags(tmp_path, "--test-only", "--resume", "auto"), SCRIPT, DEFAULTS)
    assert Run(flags(tmp_path, "--test-only"), SCRIPT, DEFAULTS, needs_checkpoint=None).checkpoint is None


def test_an_entry_that_the_checkpoint_lacks_is_named(tmp_path, monkeypatch):
    train(tmp_path)
    path = tmp_path / "model" / "model_last.pth"
    checkpoint = {**torch.load(path, weights_only=True), "ema": None}
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="has no entry 'ema'"):
        train(tmp_path, "--resume", "auto")


def test_the_loss_is_among_the_terms(tmp_path):
    run = Run(flags(tmp_path), SCRIPT, DEFAULTS)
    with pytest.raises(AssertionError, match="terms need the loss"):
        run.backward(torch.ones((), requires_grad=True), {"square": torch.ones(())})


def test_breaking_out_of_the_steps_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "end_epoch", lambda *more, **others: None)
    original = Run.steps

    def one_step(self, loader):
        for micro_batches in original(self, loader):
            yield micro_batches
            return

    monkeypatch.setattr(Run, "steps", one_step)
    with pytest.raises(AssertionError, match="has to go through run.steps to its end"):
        train(tmp_path)


def test_weights_that_come_from_another_file_are_left_out(tmp_path):
    run, _ = train(tmp_path)
    run.leave_out = frozenset({"bias"})
    assert list(run.snapshot()["model"]) == ["weight"]


@pytest.mark.parametrize("epoch, interval, due", [(1, 2, False), (2, 2, True), (3, 2, False), (5, 2, True), (4, 0, False), (5, 0, False)])
def test_due_every_interval_and_behind_the_last_epoch(tmp_path, epoch, interval, due):
    run = Run(flags(tmp_path), SCRIPT, DEFAULTS)
    run.epoch, run.num_epochs = epoch, 5
    assert run.due(interval) is due


def test_headline():
    assert headline({"metrics": {"miou": 0.5, "iou": [1.0], "present": True}, "loss": 2.0}) == {"miou": 0.5, "loss": 2.0}


@pytest.mark.parametrize("words, message", [(["--num-workers", "-1"], "expected a number from 0"), (["--limit-batches", "x"], "invalid int")])
def test_flags_have_bounds(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        flags(tmp_path, *words)
    assert message in capsys.readouterr().err


def test_flags_of_a_run_are_no_part_of_the_experiment():
    parser = ArgumentParser()
    add_run_flags(parser, "train_upernet_head.py")
    args = parser.parse_args([])
    assert isinstance(args, argparse.Namespace) and parser.groups == {} and args.output_dir == "exp/upernet_head"
