"""benchmarks/gpu_check.py runs, at a tiny size on the CPU, and its table says what failed."""

import re

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Row, Table, insert


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """What shrink and the runs change in this process."""
    import models.dinov3 as dinov3
    import models.unet
    from models.resnet import ENCODERS
    threads = torch.get_num_threads()
    monkeypatch.setitem(dinov3.BACKBONES, "dinov3_tiny", dinov3.BACKBONES.get("dinov3_vits16"))
    monkeypatch.setitem(ENCODERS, "resnet18", ENCODERS["resnet18"])
    monkeypatch.setattr(models.unet, "DECODER_CHANNELS", models.unet.DECODER_CHANNELS)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.slow                    # ten seconds, of a benchmark
def test_every_speed_is_measured(capsys, tmp_path):
    rows = gpu_check.main(["--tiny", "--device", "cpu", "--parts", "tests", "speed", "--output", str(tmp_path / "gpu.md")])
    assert [row.result for row in rows if row.passed is False] == []
    assert len(rows) == 8 and all(any(unit in row.result for unit in ("/s", " ms", "not run")) for row in rows)
    page = (tmp_path / "gpu.md").read_text()
    assert "## cpu\n" in page and "| Sonata, 500 voxels, bfloat16 | encoder " in page and "0 of 8 rows failed" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_check.NAMES)
def test_every_run_is_compared(name, capsys):
    rows = gpu_check.main(["--tiny", "--device", "cpu", "--parts", "runs", "--scripts", name])
    assert [row for row in rows if not row.passed] == [], rows
    assert len(rows) == len(gpu_check.VARIANTS) - (name in gpu_check.NOT_COMPILED)
    assert "the same bits twice" in rows[3].result


def test_shares_of_the_peak_are_rows(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.roofline, "CASES", {"mesh clusters": gpu_check.roofline.CASES["mesh clusters"]})
    row, = gpu_check.main(["--tiny", "--device", "cpu", "--parts", "roofline"])
    assert row.what == "roofline, mesh clusters, bfloat16" and row.passed is None
    assert re.fullmatch(r"step \d+% \([\d.]+ GFLOP; .+ \d+%\); prediction \d+% \(.+\)", row.result)


def test_an_error_is_a_row_and_the_rest_goes_on(capsys):
    table = Table(1.0, torch.device("cpu"), debug=False)
    table.add("a", lambda: "fast")
    table.add("b", lambda: ("loss 1 | CPU 2", False))
    table.add("c", lambda: torch.zeros(2) @ torch.zeros(3))
    table.end = 0.0
    table.add("d", lambda: "never")
    assert table.rows[0] == Row("a", "fast") and table.rows[1].passed is False and table.rows[3] == Row("d", "not run: out of time")
    assert table.rows[2].result.startswith("RuntimeError: ") and table.rows[2].passed is False
    assert "| b | loss 1 / CPU 2 | **failed** |" in table.markdown()


def test_a_card_has_one_section(tmp_path):
    path = tmp_path / "gpu.md"
    path.write_text("# On a GPU\n\nWords.\n\n**Not yet run on a GPU.**\n")
    for title, text in (("Card A", "old"), ("Card B", "other"), ("Card A", "new")):
        insert(path, title, text)
    page = path.read_text()
    assert page.startswith("# On a GPU\n\nWords.\n") and page.count("## Card A") == page.count("## Card B") == 1
    assert "new" in page and "old" not in page and "other" in page and "Not yet" not in page
