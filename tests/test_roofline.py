"""benchmarks/roofline.py counts what an analytic count gives, has a row for every script, and its shares add up."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.roofline import BETWEEN, GROUPS, MATRIX, Measured, group_of, operator_times
from benchmarks.roofline_cases import CASES
from models.deformable_attention import _WeightedRead
from models.sparse_conv import SubMConv3d, neighbour_table
from utils.surface_operators import Operators

ROOT = Path(__file__).resolve().parents[1]


def count(call):
    counted = roofline.count(call)
    return counted.flops.total(), counted.bytes, counted.scores


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_products_and_convolutions():
    """Backward of a product: two of its size. Of a convolution likewise, also in groups, of which each sees a part of the channels."""
    x, weight = leaf(5, 7), leaf(7, 3)
    assert count(lambda: x @ weight)[0] == 2 * 5 * 7 * 3
    assert count(lambda: (x @ weight).sum().backward())[0] == 3 * 2 * 5 * 7 * 3
    assert count(lambda: F.linear(leaf(2, 5, 7), weight.t(), leaf(3)))[0] == 2 * 2 * 5 * 7 * 3
    image, outputs = leaf(2, 6, 8, 9), 2 * 8 * 9
    for groups in (1, 3, 6):
        kernel = leaf(12, 6 // groups, 3, 3)
        forward = 2 * outputs * 12 * (6 // groups) * 9
        assert count(lambda: F.conv2d(image, kernel, padding=1, groups=groups))[0] == forward                                   # noqa: B023
        assert count(lambda: F.conv2d(image, kernel, padding=1, groups=groups).sum().backward())[0] == 3 * forward              # noqa: B023
        assert count(lambda: F.conv2d(image.detach(), kernel, padding=1, groups=groups).sum().backward())[0] == 2 * forward     # noqa: B023


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    """On a CPU, where PyTorch's own counter sees nothing: as many products as with the scores written out, and one more backward."""
    query, key, value = leaf(2, 3, 5, 8), leaf(2, 3, 11, 8), leaf(2, 3, 11, 8)
    mask = torch.rand(2, 1, 1, 11) > 0.3 if masked else None
    one = 2 * 2 * 3 * 5 * 11 * 8                            # one product, over batch and heads
    assert count(lambda: F.scaled_dot_product_attention(query, key, value, mask))[0] == 2 * one
    assert count(lambda: F.scaled_dot_product_attention(query, key, value, mask).sum().backward())[0] == (2 + 5) * one
    scores = [count(lambda: F.scaled_dot_product_attention(query, key, value, mask))[2],
              count(lambda: F.scaled_dot_product_attention(query, key, value, mask).sum().backward())[2]]
    assert scores == [2 * 3 * 5 * 11, 2 * 2 * 3 * 5 * 11]       # exponentials
    assert count(lambda: ((query @ key.mT).softmax(-1) @ value).sum().backward())[0] == (2 + 4) * one


def test_custom_functions_are_seen():
    grid = torch.stack(torch.meshgrid(*[torch.arange(4)] * 3, indexing="ij"), -1).flatten(0, 2)
    table = neighbour_table(grid, dense=False)
    pairs = 2 * sum(len(centre) for centre, _ in table.pairs) + len(grid)           # each tap, its mirror image, and the centre
    assert pairs == (4 + 2 * 3) ** 3                        # along an axis 4 cells have themselves, and 3 a neighbour on each side
    conv, x = SubMConv3d(5, 6), leaf(64, 5)
    assert count(lambda: conv(x, table))[0] == 2 * pairs * 5 * 6
    assert count(lambda: conv(x, table).sum().backward())[0] == 3 * 2 * pairs * 5 * 6

    maps, points, weight = leaf(2, 3, 16), torch.rand(2, 1, 4, 7, 2).requires_grad_(), leaf(2, 1, 4, 7)
    values = 2 * 3 * 4 * 7                                  # images, channels, points, queries; each of four neighbours
    read = lambda: _WeightedRead.apply(maps, points, weight, ((4, 4),))             # noqa: E731
    assert count(read)[0] == 8 * values
    assert count(lambda: read().sum().backward())[0] == (1 + 1 + 3) * 8 * values    # backward reads again


def test_a_sparse_product_counts_its_entries():
    V = 20
    index = torch.stack([torch.arange(V).repeat_interleave(3), torch.arange(3 * V) % V])
    operators = Operators(torch.ones(V), torch.ones(4), torch.ones(V, 4), index, torch.ones(3 * V), torch.ones(3 * V))
    x = leaf(V, 8)
    assert count(lambda: torch.sparse.mm(operators.gradient(), x).sum().backward())[0] == 2 * 2 * (6 * V) * 8


def test_bytes_are_those_of_inputs_and_outputs():
    x, y = torch.zeros(10, 4), torch.zeros(10, 4, dtype=torch.float64)
    assert count(lambda: x.t().view(4, 10))[1] == 0         # views move nothing
    assert count(lambda: x + y)[1] == 40 * (4 + 8 + 8)
    assert count(lambda: x.t().reshape(40))[1] == 2 * 40 * 4


def test_every_script_has_a_row():
    assert {script for script, _, _ in CASES.values()} == {path.stem for path in ROOT.glob("train_*.py")}


def test_groups():
    names = {"addmm": MATRIX, "convolution_backward": MATRIX, "_scaled_dot_product_flash_attention_for_cpu_backward": MATRIX,
             "upsample_bilinear2d": "bilinear reading", "index_select": "gathering and scattering rows", "copy_": "copies",
             "native_layer_norm": "norms", "linalg_vector_norm": "sums, maxima", "topk": "sorting and searching",
             "gelu_backward": "activations and softmax", "clamp_min": "additions, multiplications", "view": "other operators"}
    assert {name: group_of(f"aten::{name}") for name in names} == names
    assert group_of(BETWEEN) == BETWEEN and set(names.values()) - {"other operators"} == set(GROUPS)


def test_operator_times_are_all_of_the_time():
    matrix = torch.rand(600, 600)
    times = operator_times(lambda: matrix @ matrix, torch.device("cpu"), 0.0)
    assert times.total() == pytest.approx(1) and times["aten::mm"] > 0.3 and times[BETWEEN] > 0
    with torch.profiler.profile() as profile:
        matrix + matrix
    assert all(hasattr(event, "self_device_time_total") for event in profile.key_averages())       # what a GPU's are read from


def test_what_is_printed():
    measured = Measured(Counter({"aten::mm": 3_000_000_000, "aten::grid_sampler_2d": 1_000_000_000}), 5e9, [0.4, 0.5, 0.6], 0.25, 0.07,
                        Counter({"aten::mm": 0.6, "aten::grid_sampler_2d": 0.3, "aten::copy_": 0.1}))
    assert measured.cells() == "4 | 5 | **50%** (40% to 60%) | 25% | 60% at 62% | 7% | bilinear reading 30%, copies 10% |"
    assert measured.longest(2) == "     60.0% aten::mm, at 62% of the peak\n     30.0% aten::grid_sampler_2d, at 42% of the peak"
    assert measured.summary() == "50% (4 GFLOP; bilinear reading 30%, copies 10%)"


def test_a_row_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        roofline.main(["mask2former"])
    assert "no row 'mask2former'; there are linear head" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch):
    import models.unet
    from models import dinov3
    from models.resnet import ENCODERS
    from tests.tiny_runs import shrink
    threads = torch.get_num_threads()
    monkeypatch.setitem(dinov3.BACKBONES, "dinov3_tiny", None)
    monkeypatch.setitem(ENCODERS, "resnet18", ENCODERS["resnet18"])
    monkeypatch.setattr(models.unet, "DECODER_CHANNELS", models.unet.DECODER_CHANNELS)
    shrink()
    yield
    torch.set_num_threads(threads)


def check(row):
    found = roofline.main(["--tiny", "--repeats", "1", row])[row]
    assert set(found) == {"step", "prediction"}
    for measured in found.values():
        assert measured.flops > 0 and measured.bytes > 0 and 0 < measured.share < 1 and sum(measured.groups().values()) == pytest.approx(1)
    assert found["step"].flops > found["prediction"].flops                          # forward and backward


def test_a_row_is_measured(small, capsys):
    check("mesh clusters")
    assert "| mesh clusters, step | " in capsys.readouterr().out


@pytest.mark.slow                    # a second or two for each of the benchmark's rows
@pytest.mark.parametrize("row", [row for row in CASES if row != "mesh clusters"])
def test_every_row_is_measured(small, row):
    check(row)


@pytest.mark.slow                    # a second or two, of a benchmark
@pytest.mark.parametrize("flags", [["--speedup", "2"], ["--kept"]])
def test_settings_are_compared(small, capsys, flags):
    roofline.main(["--tiny", "--repeats", "1", *flags, "mesh pre-training"])
    assert "| mesh pre-training | " in capsys.readouterr().out and torch.get_num_threads() == (2 if "2" in flags else 1)
