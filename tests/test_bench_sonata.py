"""benchmarks/bench_sonata.py at tiny size: its arithmetic, and that every part runs."""

import pytest
import torch

from benchmarks import bench_sonata
from models.point_transformer import build_point_transformer


def test_the_network_is_sonata():
    with torch.device("meta"):
        model = build_point_transformer({**bench_sonata.SONATA, "mask_token": True})
    assert len(model.state_dict()) == 453
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 108_461_376


def test_batch_is_the_middle_of_a_hall_or_a_whole_room():
    batch = bench_sonata.make_batch(500, 5000)
    assert len(batch["grid_coord"]) == len(batch["feat"]) == int(batch["offset"][-1]) == 500
    whole = bench_sonata.make_batch(4000, 5000)["coord"].norm(dim=1)
    assert batch["coord"].norm(dim=1).max() <= whole.sort().values[500]
    assert 900 < len(bench_sonata.make_batch(None, 1000)["feat"]) <= 1000
    with pytest.raises(ValueError, match="the hall has"):
        bench_sonata.make_batch(6000, 5000)


def test_timed_parts_count_each_second_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_sonata, "clock", lambda device: now[0])

    class Owner:
        def outer(self):
            now[0] += 1
            self.inner()
            now[0] += 2

        def inner(self):
            now[0] += 10

    original = Owner.outer
    monkeypatch.setattr(bench_sonata, "TIMED", {"outer": [(Owner, "outer")], "inner": [(Owner, "inner")]})
    with bench_sonata.timed_parts(torch.device("cpu")) as seconds:
        Owner().outer()
        Owner().inner()
    assert seconds == {"outer": 3, "inner": 20} and Owner.outer is original


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_parts_and_gpu(capsys, threads):
    size = ["--tiny", "--voxels", "600", "--repeats", "1"]
    assert bench_sonata.main(["parts", *size])[600] > 0
    parts = capsys.readouterr().out
    expected = [name for name in bench_sonata.TIMED if name != "rotation of q and k"]           # Sonata has none
    for name in expected:
        assert name in parts
    shares = [float(line.split()[-2]) for line in parts.splitlines() if line.endswith("%")]
    assert len(shares) == len(expected) + 1 and min(shares) >= 0 and abs(sum(shares) - 100) < 1
    bench_sonata.main(["gpu", "--device", "cpu", *size])               # bfloat16; memory is the process' own
    assert capsys.readouterr().out.count("GiB at the peak") == 2


@pytest.mark.slow                    # ten seconds, of a benchmark
def test_features_run_in_processes(capfd):
    bench_sonata.main(["features", "--network", "utonia_tiny", "sonata_small", "--voxels", "300", "--repeats", "1"])
    lines = [line for line in capfd.readouterr().out.splitlines() if "GiB at the peak" in line]
    assert [line.split()[:2] for line in lines] == [["utonia_tiny", "9.3"], ["sonata_small", "38.6"]]


@pytest.mark.parametrize("limit", [pytest.param(8, marks=pytest.mark.slow), 0.2])       # four seconds each, of a benchmark
def test_modes_and_memory_run_in_processes(capfd, limit):
    bench_sonata.main(["modes", "--tiny", "--room", "10000", "--mode", "ft", "--limit-gib", str(limit)])
    out = capfd.readouterr().out
    assert "GiB at the peak" in out if limit == 8 else "more than 0.2 GiB" in out
