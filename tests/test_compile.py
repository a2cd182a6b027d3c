"""--compile: graphs and recompilations; the checkpoint is that of the plain network, and resumes to the last bit.

Backend aot_eager, which traces forward and backward as the real one does and generates no code; once the real one.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.tiny_runs import last_checkpoint, run_forked, same_weights, tiny_run
from utils.log import read_log

pytestmark = pytest.mark.slow
EPOCHS = 3
# name: (graphs of the network at most, the last step at which one may be made: 1, the second shape). I-JEPA's masks decide about sizes
# (`nonzero`), which cut its network into pieces; one of the sizes first changes later.
GRAPHS = {"downstream": (1, 1), "jepa": (5, 3), "m2f_head": (1, 1), "upernet_head": (1, 1), "linear_head": (1, 1), "pmt_head": (1, None),
          "segmentation": (1, 1), "prototype": (1, None), "eomt": (1, None)}


def watch(into: Path, backend: str = "aot_eager"):
    """The hook of a child: torch.compile with this backend; in `into` the optimiser step at which each graph was made."""
    from torch._dynamo.backends.registry import lookup_backend
    torch._dynamo.reset()
    make, original, at, done = lookup_backend(backend), torch.compile, [], []

    def compile_graph(graph, inputs, **options):
        at.append(len(done))
        return make(graph, inputs, **options)

    def after_step(*_):
        done.append(1)
        into.write_text(json.dumps({"at": at, "steps": len(done)}))

    torch.compile = lambda network: original(network, backend=compile_graph)
    register_optimizer_step_post_hook(after_step)


def compiled(run, out: Path, *more, backend: str = "aot_eager") -> dict:
    done = run_forked(run, out, "--compile", *more, hook=lambda: watch(out.with_suffix(".json"), backend))
    assert done.code == 0, done.stderr
    return json.loads(out.with_suffix(".json").read_text())


def train_losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_log(out / "log" / "log.jsonl") if record["split"] == "train"]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_compiled_run(name, tmp_path):
    run = tiny_run(name, tmp_path, epochs=EPOCHS, batch_size=4)    # of 6 items: batches of 4 and 2, but where the last one is dropped
    assert run_forked(run, tmp_path / "plain").code == 0
    found = compiled(run, tmp_path / "out")
    graphs, last = GRAPHS[name]
    assert found["at"].count(0) <= graphs, found
    if last is not None:                                   # prototype: each stage trains other parameters; EoMT: masks go out by block
        assert max(found["at"]) <= last, found             # the second shape makes sizes variable; later ones compile nothing
    plain, own = (last_checkpoint(tmp_path / folder)["model"] for folder in ("plain", "out"))
    assert plain.keys() == own.keys()                      # no _orig_mod
    assert train_losses(tmp_path / "out") == pytest.approx(train_losses(tmp_path / "plain"), rel=1e-2)
    half_way = tmp_path / "out" / "model" / ("warmup.pth" if name == "prototype" else "checkpoint_epoch_1.pth")
    compiled(run, tmp_path / "resumed", "--resume", half_way)
    if name == "upernet_head":                             # the first shape has a graph of its own, which rounds differently
        assert train_losses(tmp_path / "resumed")[-1] == pytest.approx(train_losses(tmp_path / "out")[-1], rel=1e-5)
    else:
        assert same_weights(tmp_path / "out", tmp_path / "resumed")
    scored = run_forked(run, tmp_path / "scored", "--resume", tmp_path / "out" / "model" / "model_last.pth", "--test-only")
    assert scored.code == 0, scored.stderr                 # without --compile


def test_clouds_of_ever_different_sizes_are_not_compiled(tmp_path):
    done = run_forked(tiny_run("sonata", tmp_path), tmp_path / "out", "--compile")
    assert done.code == 2 and done.stderr.count("\n") == 1 and "--compile" in done.stderr and "every size" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ (apt install g++), which is not here")
def test_the_real_backend(tmp_path):
    """Its kernels round differently; the loss is that of the plain run."""
    run = tiny_run("segmentation", tmp_path, epochs=1)
    plain = run_forked(run, tmp_path / "plain")
    found = compiled(run, tmp_path / "out", backend="inductor")
    assert plain.code == 0 and found["steps"] == 3 and set(found["at"]) == {0}
    assert train_losses(tmp_path / "out") == pytest.approx(train_losses(tmp_path / "plain"), rel=1e-2)
