import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from utils import device as device_module
from utils.device import (
    amp_settings,
    autocast,
    describe,
    environment,
    native_bfloat16,
    pick_device,
    product_seconds,
    slow_dtype,
    trim_memory,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=2, mps=True): pretend that there are so many GPUs, and Apple's."""
    def pretend(cuda=0, mps=False, built="12.8", bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: pretend.current.append(index))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    pretend.current = []
    allowed = torch.backends.cudnn.allow_tf32
    yield pretend
    torch.backends.cudnn.allow_tf32 = allowed


# -- pick_device ---------------------------------------------------------------


@pytest.mark.parametrize("there, expected", [({}, "cpu"), ({"cuda": 1}, "cuda"), ({"mps": True}, "mps"),
                                             ({"cuda": 1, "mps": True}, "cuda")])
def test_the_default_is_the_best_there_is(machine, there, expected):
    machine(**there)
    assert pick_device(None) == pick_device() == torch.device(expected)


def test_a_named_device(machine):
    machine(cuda=2, mps=True)
    names = ["cpu", "cuda", "cuda:0", "cuda:1", "mps"]
    assert [pick_device(name) for name in names] == [torch.device(name) for name in names]
    assert machine.current == [0, 1]                           # what names no device goes to that of --device


@pytest.mark.parametrize("there, name, message", [
    ({}, "cdua", "--device: expected one of cpu, cuda, mps; got 'cdua'; did you mean cuda?"),
    ({}, "", "--device: expected one of cpu, cuda, mps; got ''"),
    ({}, "cuda", "--device: cuda is not available (no usable GPU or driver found); use --device cpu or leave it out"),
    ({"built": None}, "cuda:0", "--device: cuda:0 is not available (this PyTorch is built without CUDA); "
                                "use --device cpu or leave it out"),
    ({"cuda": 2}, "cuda:2", "--device: there is no cuda:2; this machine has cuda:0 to cuda:1"),
    ({"cuda": 2}, "cuda:x", "--device: 'cuda:x' is not a device; expected cpu, cuda, cuda:0, cuda:1, ... or mps"),
    ({"cuda": 2}, "cuda:-1", "--device: 'cuda:-1' is not a device; expected cpu, cuda, cuda:0, cuda:1, ... or mps"),
    ({}, "cpu:1", "--device: 'cpu:1' is not a device; expected cpu, cuda, cuda:0, cuda:1, ... or mps"),
    ({}, "mps", "--device: mps is not available on this machine; use --device cpu or leave it out"),
])
def test_a_device_that_is_not_there_is_one_line(machine, there, name, message):
    machine(**there)
    with pytest.raises(ValueError) as error:
        pick_device(name)
    assert str(error.value) == message


# -- amp_settings, autocast ----------------------------------------------------


@pytest.mark.parametrize("device, amp_dtype, dtype", [
    (CPU, None, None), (CPU, "float32", None), (CPU, "bfloat16", torch.bfloat16), (CPU, "float16", torch.float16),
    (CUDA, None, torch.bfloat16), (CUDA, "float32", None), (CUDA, "float16", torch.float16),
    (torch.device("cuda", 1), None, torch.bfloat16), (torch.device("mps"), None, None),
])
def test_dtype_and_scaler(machine, device, amp_dtype, dtype):
    machine(cuda=2)
    picked, scaler = amp_settings(device, amp_dtype)
    assert picked is dtype and scaler.is_enabled() == (dtype is torch.float16)


def test_a_card_that_only_emulates_bfloat16_computes_in_float32(machine):
    machine(cuda=1, bf16=False)
    assert amp_settings(CUDA)[0] is None and amp_settings(CUDA, "bfloat16")[0] is torch.bfloat16


def test_float32_on_a_card_is_not_tf32(machine):
    machine(cuda=1)
    for amp_dtype, allowed in (("float32", False), ("bfloat16", True), ("float32", False), (None, True)):
        amp_settings(CUDA, amp_dtype)
        assert torch.backends.cudnn.allow_tf32 is allowed
    assert not torch.backends.cuda.matmul.allow_tf32           # PyTorch's default


# -- bfloat16 of a CPU ---------------------------------------------------------

INTEL = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu avx512f {}\nbugs\t\t:\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {}\nCPU part\t: 0xd40\n"


@pytest.fixture
def processor(monkeypatch):
    """processor(text, ratio): pretend that /proc/cpuinfo holds text (None: there is no such file), and how much slower bfloat16 is."""
    def pretend(text, ratio=8.0):
        def cpuinfo(path, *args, **kwargs):
            assert str(path) == "/proc/cpuinfo"
            if text is None:
                raise FileNotFoundError(path)
            return text
        monkeypatch.setattr(device_module.Path, "read_text", cpuinfo)
        monkeypatch.setattr(device_module, "product_seconds", lambda dtype: ratio if dtype is torch.bfloat16 else 1.0)
    return pretend


@pytest.mark.parametrize("text, native", [(INTEL.format("avx512_bf16 amx_tile"), True), (INTEL.format("amx_bf16"), True), (ARM.format("i8mm bf16"), True),
                                          (INTEL.format("avx512_vnni"), False), (ARM.format("asimddp"), False), (None, False)])
def test_the_processor_says_whether_it_computes_in_bfloat16(processor, text, native):
    processor(text)
    assert native_bfloat16(CPU) is native and not native_bfloat16(torch.device("mps"))
    assert amp_settings(CPU, "native")[0] is (torch.bfloat16 if native else None)
    assert amp_settings(CPU)[0] is None                        # the default of a CPU stays float32
    for stored in ({}, {"amp_dtype": "torch.float32"}, {"amp_dtype": "torch.bfloat16"}):     # a run goes on as it was
        computed = native and stored == {"amp_dtype": "torch.bfloat16"}
        assert amp_settings(CPU, "native", stored)[0] is (torch.bfloat16 if computed else None)
    lines = slow_dtype(CPU, torch.bfloat16)
    assert len(lines) == (not native)
    if lines:
        assert "took 8.0 times as long as in float32" in lines[0] and lines[0].startswith("WARNING")


def test_no_warning_where_bfloat16_costs_nothing(processor):
    processor(None, ratio=0.9)                                 # such as a processor of Apple
    assert slow_dtype(CPU, torch.bfloat16) == slow_dtype(CPU, None) == slow_dtype(CUDA, torch.bfloat16) == []


def test_a_product_takes_time():
    state = torch.get_rng_state()
    assert 0 < product_seconds(torch.float32, side=64) < 1 and torch.equal(torch.get_rng_state(), state)


def test_an_unknown_dtype():
    with pytest.raises(ValueError) as error:
        amp_settings(CPU, "bf16")
    assert str(error.value).startswith("--amp-dtype: expected one of float32, bfloat16, float16; got 'bf16'")


@pytest.mark.parametrize("amp_dtype, computed", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_one_code_path_for_every_dtype(amp_dtype, computed):
    weight = torch.nn.Parameter(torch.full((4, 4), 0.5))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    dtype, scaler = amp_settings(CPU, amp_dtype)
    context = autocast(CPU, dtype)
    for _ in range(2):                                         # the same context twice
        with context:
            product = torch.ones(2, 4) @ weight
        assert product.dtype is computed
        loss = product.float().mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.allclose(weight, torch.full((4, 4), 0.0))     # gradient 1/4 in each of 2 steps
    assert (torch.ones(1, 4) @ weight).dtype is torch.float32  # autocast has ended


def test_a_map_of_one_column_is_convolved_right_in_bfloat16():
    """oneDNN 3.12 reads memory that nobody wrote there, on processors with AMX (seen in values up to 1e38)."""
    torch.manual_seed(0)
    conv, image = torch.nn.Conv2d(3, 32, 7, 2, 3), torch.randn(1, 3, 40, 1)
    deep, maps = torch.nn.Conv2d(32, 64, 3, 2, 1), torch.randn(1, 32, 80, 2)
    with torch.no_grad():
        for layer, shown in ((conv, image), (deep, maps)):
            expected = layer(shown)
            for _ in range(5):
                torch.full((np.random.randint(1, 200000),), 1e30).sum()     # leaves large numbers in memory
                with autocast(torch.device("cpu"), torch.bfloat16, shown.shape[-1]):
                    assert torch.allclose(layer(shown).float(), expected, atol=0.05)
                assert torch.backends.mkldnn.enabled


def test_float16_scales_the_loss_and_skips_an_overflow():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    _, scaler = amp_settings(CPU, "float16")
    scaler.scale((weight * torch.tensor([1.0, torch.inf])).sum()).backward()
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.data, torch.ones(2)) and scaler.get_scale() < before


# -- describe, environment -----------------------------------------------------


def test_describe_the_cpu():
    line = describe(CPU)
    assert line.startswith("cpu: ") and line.endswith("threads") and f", {torch.get_num_threads()} of " in line


def test_describe_a_gpu(machine, monkeypatch):
    machine(cuda=1)
    properties = types.SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert describe(CUDA) == "cuda: NVIDIA H200, 139.7 GiB, CUDA 12.8"


def test_environment_is_json_and_names_the_versions():
    record = environment()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["packages"]["torch"] == torch.__version__ and record["packages"]["numpy"] == np.__version__
    assert all(record["packages"].values()), "a name in PACKAGES that is not installed as requirements.txt says"
    assert record["num_threads"] == torch.get_num_threads() and record["command"] and record["platform"]


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_commit_and_changes(tmp_path, monkeypatch):
    (tmp_path / "utils").mkdir()
    source = tmp_path / "utils" / "device.py"
    source.write_text("a")
    monkeypatch.setattr(device_module, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    record = environment()
    assert record["git_commit"] is None and record["git_dirty"] is None       # an unpacked archive
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    (tmp_path / "notes.txt").write_text("untracked files do not count")
    record = environment()
    assert record["git_commit"] == git(tmp_path, "rev-parse", "HEAD") and record["git_dirty"] is False
    source.write_text("b")
    assert environment()["git_dirty"] is True
    monkeypatch.setenv("PATH", "")                             # no git at all
    assert environment()["git_commit"] is None


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    monkeypatch.setattr(device_module, "PACKAGES", ("torch", "no-such-package"))
    assert environment()["packages"] == {"torch": torch.__version__, "no-such-package": None}


@pytest.mark.gpu
def test_a_real_gpu():
    device = pick_device()
    dtype, scaler = amp_settings(device)
    with autocast(device, dtype):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype is dtype
    assert torch.cuda.get_device_name() in describe(device) and environment()["devices"]
    assert not scaler.is_enabled()
    with pytest.raises(ValueError, match="there is no cuda:99"):
        pick_device("cuda:99")


def test_trim_memory_gives_holes_back():
    """Half of many blocks freed, each between two that stay: only trimming returns them to the system."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    trim_memory()
    before, blocks = resident(), [torch.ones(16_000) for _ in range(2_000)]            # 2,000 x 64 kB, below the size of a mapping
    del blocks[::2]
    held = resident()
    trim_memory()
    assert held - before > 80 and resident() < held - 30
