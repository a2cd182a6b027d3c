"""Every script on a GPU that is not here (tests/fake_device.py), once as CUDA and once as Apple's: nothing that the device would refuse."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import NAMES, ROOT, report_tests, run_forked, tiny_run

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(shutil.which("g++") is None, reason="tests/fake_device.py needs g++ (apt install g++), which is not here")]
KINDS = ("cuda", "mps")


@pytest.fixture(scope="module", autouse=True)
def row(request):
    """A line for the table of scripts/faults.sh."""
    yield from report_tests(request, "devices that are not here: {} of {} tests passed")


def in_child(words: list[str], kind: str, folder: Path, expected: int = 0) -> tuple[str, list[dict]]:
    """`python words` with FAKE_DEVICE=kind -> (stdout and stderr, what fake_device.report said of each script)."""
    record = folder / "report.jsonl"
    record.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "FAKE_DEVICE": kind, "FAKE_DEVICE_REPORT": str(record), "OMP_NUM_THREADS": "1"})
    assert done.returncode == expected, done.stdout[-4000:]
    return done.stdout, [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def on_device(kind: str, folder: Path, *runs: list[str]) -> tuple[str, list[dict]]:
    """Scripts with their arguments, one after another in one child."""
    words = [word for run in runs for word in ("//", *map(str, run))][1:]
    return in_child(["-m", "tests.fake_device", *words], kind, folder)


def train_words(run, kind: str, out: Path, *more) -> list[str]:
    words = run.argv(out, *more)
    words[words.index("--device") + 1] = kind
    return [run.script, *words]


def stored(out: Path) -> list[Path]:
    return sorted((out / "model").glob("*.pth"))


# -- the device itself -------------------------------------------------------------------------------------------------

CHECKS = """
from tests import fake_device as device
import torch
import torch.nn.functional as F
kind = device.KIND
def refused(what, error, part):
    try:
        what()
    except error as found:
        assert part in str(found), found
    else:
        raise AssertionError(f"{what} was not refused")
def waits(what):
    device.report()
    what()
    return sum(device.report()["waits"].values())
with device.fake_device():
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0, device=kind).view(2, 3)
    assert there.device == torch.device(kind, 0) and here.device.type == "cpu"
    assert torch.equal((there * 2 + 1).cpu(), here * 2 + 1)                       # values are real
    refused(lambda: here + there, device.DeviceMismatch, "same device")
    refused(lambda: here.add_(there), device.DeviceMismatch, "writes into a CPU tensor")
    refused(lambda: here[there.long()], device.DeviceMismatch, "indices should be")
    refused(there.numpy, TypeError, "Use Tensor.cpu()")
    refused(lambda: torch.rand(2, device=kind, generator=torch.Generator()), device.DeviceMismatch, "generator")
    assert (there + torch.tensor(1.0)).device.type == kind                         # a scalar of the CPU is allowed
    layer = torch.nn.Linear(3, 1).to(kind)
    weight = layer.weight.detach().cpu().clone()
    layer(there).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert layer.weight.device.type == kind and torch.allclose(layer.weight.detach().cpu(), weight - 0.1 * here.sum(0))
    with torch.autocast(kind, dtype=torch.bfloat16):
        assert layer(there).dtype == torch.bfloat16
    device.report()
    assert waits(lambda: there.sum().item()) == 1 and waits(lambda: there.cpu()) == 1 and waits(lambda: there.tolist()) == 1
    assert waits(lambda: here.to(kind)) == 1 and waits(lambda: here.to(kind, non_blocking=True)) == 0
    assert waits(lambda: there[there > 1]) >= 1 and waits(lambda: there.masked_fill(there > 1, 0)) == 0
    assert waits(lambda: there * 2) == 0
    assert "tests" not in str(device.report()["waits"])
    if kind == "mps":
        refused(lambda: there.double(), TypeError, "doesn't support float64")
        assert torch.backends.mps.is_available() and not torch.cuda.is_available()
    else:
        assert there.double().dtype == torch.float64
        from utils.losses import MaskedCrossEntropyLoss
        from utils.metrics import ConfusionMatrix
        label, pred = torch.tensor([0, 1, 2, -100, 2]), torch.tensor([0, 2, 2, 7, 1])
        matrix, expected = ConfusionMatrix(3, kind), ConfusionMatrix(3)
        own_label, own_pred = label.to(kind), pred.to(kind)
        assert waits(lambda: [matrix.update(own_pred, own_label) for _ in range(2)]) == 0
        expected.update(pred, label)
        assert (matrix.matrix() == 2 * expected.matrix()).all()
        matrix.update(own_pred, own_label + 1)
        refused(matrix.matrix, ValueError, "3 labels or predictions outside 0..2")
        criterion = MaskedCrossEntropyLoss([1.0, 2.0, 3.0]).to(kind)             # its weights are there, its check is here
        assert waits(lambda: criterion.label_weight(label)) == 0
        torch.use_deterministic_algorithms(True)
        image = torch.rand(1, 1, 4, 4, device=kind, requires_grad=True)
        refused(lambda: F.adaptive_avg_pool2d(image, 3).sum().backward(), RuntimeError, "deterministic")
        refused(lambda: F.grid_sample(image, torch.zeros(1, 2, 2, 2, device=kind), align_corners=False).sum().backward(), RuntimeError, "deterministic")
        F.interpolate(image, (8, 8), mode="bilinear").sum().backward()             # PyTorch has a deterministic form of its own
        torch.use_deterministic_algorithms(False)
        query = torch.zeros(device.MAX_SEQUENCES + 1, 1, 1, 4, device=kind)
        refused(lambda: F.scaled_dot_product_attention(query, query, query), RuntimeError, "invalid configuration")
assert not torch.cuda.is_available()                                               # all is as it was
print("all checked")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_device_refuses_and_counts(kind, tmp_path):
    output, _ = in_child(["-c", CHECKS], kind, tmp_path)
    assert output.endswith("all checked\n")


# -- every script ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name): its tiny run, and the folder of one made on the CPU."""
    folder, made = tmp_path_factory.mktemp("cpu"), {}

    def train(name):
        if name not in made:
            made[name] = tiny_run(name, folder), folder / name / "out"
            done = run_forked(*made[name])
            assert done.code == 0, done.stderr
        return made[name]
    return train


def prediction_words(script, checkpoint: Path, data: Path, out: Path, kind: str, amp_dtype: str) -> list[list[str]]:
    """predict.py in all formats, with all options that the script knows."""
    split = data / "test" if (data / "test").is_dir() else data / "images" / "test"
    inputs = split / "images" if (split / "images").is_dir() else split
    if script.__name__ == "train_sonata":
        inputs = sorted(inputs.iterdir())[0]
    flags = ["--html"] * script.RESULTS["html"] + ["--pca"] * script.RESULTS.get("pca", True)
    if script.RESULTS.get("explain"):
        flags += ["--explain", "3,4"]
    labels, pictures = script.RESULTS["labels"], script.RESULTS["picture"]
    return [["predict.py", checkpoint, inputs, "--output", out / label / picture, "--labels", label, "--picture", picture, *flags,
             "--device", kind, "--amp-dtype", amp_dtype] for label, picture in zip(labels * 2, pictures, strict=False)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_script_on_the_device(name, kind, trained, tmp_path):
    """In bfloat16 from a checkpoint of the CPU, in float16 from the start; each with validation and checkpoints; evaluate.py; predict.py."""
    run, cpu = trained(name)
    script = importlib.import_module(run.script.removesuffix(".py"))
    half_way = cpu / "model" / ("warmup.pth" if name == "prototype" else "checkpoint_epoch_1.pth")
    resumed, fresh = tmp_path / "bfloat16", tmp_path / "float16"
    runs = [train_words(run, kind, resumed, "--amp-dtype", "bfloat16", "--resume", half_way),
            train_words(run, kind, fresh, "--amp-dtype", "float16")]
    if name == "jepa":
        runs.append(train_words(run, kind, fresh, "--resume", "auto", "--test-only"))
    else:
        for out, amp_dtype in ((resumed, "bfloat16"), (fresh, "float16")):
            last = out / "model" / "model_last.pth"
            runs.append(["evaluate.py", last, "--output-dir", tmp_path / "scores" / amp_dtype, "--device", kind, "--amp-dtype", amp_dtype,
                         "--num-workers", "0"])
            runs += prediction_words(script, last, run.data, tmp_path / "predicted" / amp_dtype, kind, amp_dtype)
    on_device(kind, tmp_path, *runs)
    assert {path.name for path in stored(resumed)} >= {"model_last.pth"} and {path.name for path in stored(fresh)} >= {path.name for path in stored(cpu)}
    if name != "jepa":
        assert json.loads((tmp_path / "scores" / "bfloat16" / "metrics.json").read_text())["device"].startswith(kind)
        assert len([path for path in (tmp_path / "predicted").rglob("*") if path.is_file()]) >= len(runs) - 2
    back = tmp_path / "back"                                                       # and what the device stored goes on on the CPU
    assert run_forked(run, back, "--resume", resumed / "model" / "model_last.pth", "--test-only").code == 0


# How often the host waits for the device from one optimiser step to the next, where nothing is logged. Mask2Former: the matching costs,
# once. I-JEPA: how many clusters are visible and hidden. Prototypes: how many a class has. Sonata: sizes of pooled and sorted clouds
# of each resolution, and the classes of Lovasz's loss.
WAITS = {"downstream": 0, "jepa": 2, "m2f_head": 1, "upernet_head": 0, "sonata": 14, "segmentation": 0, "prototype": 1}
QUIET = {"segmentation": ["logging.log_every_n_steps=1000"], "m2f_head": ["--log-interval", "1000"], "upernet_head": ["--log-interval", "1000"]}


@pytest.mark.parametrize("more", [[], ["--deterministic"]], ids=["default", "deterministic"])
def test_how_often_a_step_waits_for_the_gpu_and_that_all_is_deterministic(more, tmp_path):
    runs = [tiny_run(name, tmp_path, epochs=1) for name in NAMES]
    words = [train_words(run, "cuda", tmp_path / name / "out", *QUIET.get(name, ["logging.log_interval=1000"]), *more)
             for name, run in zip(NAMES, runs, strict=True)]
    _, found = on_device("cuda", tmp_path, *words)
    for name, record in zip(NAMES, found, strict=True):
        waits = min(record["per_step"])                    # the others have the end of a stage between them
        assert waits <= WAITS[name], (name, record)


def test_what_a_monitor_copies(tmp_path):
    """models/jepa_monitors.py once copied each parameter: 810 waits in two epochs."""
    run = tiny_run("jepa", tmp_path, epochs=2)
    _, (record,) = on_device("cuda", tmp_path, train_words(run, "cuda", tmp_path / "out"))
    assert sum(count for what, count in record["waits"].items() if "jepa_monitors" in what) < 120, record["waits"]
