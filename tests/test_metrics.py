"""utils/metrics.py against values by hand, scikit-learn on the full arrays, and Pointcept's counts."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, recall_score

from utils import metrics
from utils.losses import IGNORE_INDEX
from utils.metrics import (
    ConfusionMatrix,
    absent_as_zero,
    metrics_table,
    miou_of_each,
    miou_of_labels,
    segmentation_metrics,
)

ROOT = Path(__file__).parents[1]


def counted(pred, label, num_classes, weight=None):
    confusion = ConfusionMatrix(num_classes)
    confusion.update(torch.as_tensor(pred), torch.as_tensor(label), weight)
    return confusion.matrix()


def random_split(num_classes=7, n=500, seed=0):
    """Predictions and labels (n,) that agree half the time; class num_classes - 1 occurs in neither; some ignored."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, num_classes - 1, (n,), generator=generator)
    pred = torch.where(torch.rand(n, generator=generator) < 0.5, label,
                       torch.randint(0, num_classes - 1, (n,), generator=generator))
    label[torch.rand(n, generator=generator) < 0.2] = IGNORE_INDEX
    return pred, label


# -- counting -------------------------------------------------------------------------------------------------------


def test_matrix_by_hand():
    matrix = counted([[0, 1, 1], [2, 0, 1]], [[0, 0, 1], [IGNORE_INDEX, 2, 1]], 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]                  # rows = truth
    assert matrix.dtype == np.int64


@pytest.mark.parametrize("chunk", [7, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_matrix_equals_scikit_learn(monkeypatch, chunk, dtype):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    pred, label = random_split()
    keep = label != IGNORE_INDEX
    expected = confusion_matrix(label[keep], pred[keep], labels=range(7))
    np.testing.assert_array_equal(counted(pred.to(dtype), label.to(dtype), 7), expected)


def test_updates_add_up():
    confusion, parts = ConfusionMatrix(7), [random_split(seed=seed, n=100 + seed) for seed in range(3)]
    for pred, label in parts:
        confusion.update(pred, label)
    confusion.update(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    pred, label = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    np.testing.assert_array_equal(confusion.matrix(), counted(pred, label, 7))
    confusion.reset()
    assert confusion.matrix().sum() == 0


def test_predictions_under_ignored_labels_do_not_matter():
    pred, label = random_split()
    keep = label != IGNORE_INDEX
    expected = confusion_matrix(label[keep], pred[keep], labels=range(7))
    pred[~keep & (torch.arange(len(pred)) % 2 == 0)] = 99    # half of them in range, half not
    np.testing.assert_array_equal(counted(pred, label, 7), expected)


def test_uint8_labels_are_not_taken_for_the_ignore_value():
    """In uint8, 156 == -100 is true."""
    matrix = counted(torch.tensor([156, 3], dtype=torch.uint8), torch.tensor([156, 156], dtype=torch.uint8), 200)
    assert matrix[156, 156] == 1 and matrix[156, 3] == 1 and matrix.sum() == 2


def test_nothing_counted():
    for matrix in (ConfusionMatrix(3).matrix(), counted([0, 1], [IGNORE_INDEX] * 2, 3)):
        assert matrix.tolist() == np.zeros((3, 3)).tolist() and matrix.dtype == np.int64


def test_weights_count_area():
    pred, label = random_split()
    weight = torch.rand(len(label)) * 1e-3
    keep = label != IGNORE_INDEX
    expected = confusion_matrix(label[keep], pred[keep], labels=range(7), sample_weight=weight[keep].double())
    weight[~keep] = float("nan")                             # padding has no area
    matrix = counted(pred, label, 7, weight)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix, expected, rtol=1e-12)


def test_counts_are_exact_where_float32_is_not():
    confusion = ConfusionMatrix(2)
    confusion.counts = torch.full((2, 2), 2 ** 53)           # float64 stops here, float32 at 2^24
    confusion.update(torch.tensor([1]), torch.tensor([0]))
    assert confusion.matrix()[0, 1] == 2 ** 53 + 1


def test_update_errors_leave_the_matrix_alone():
    confusion = ConfusionMatrix(3)
    good = torch.tensor([0, 1, 2, 2])
    confusion.update(good, good)
    before = confusion.matrix()
    nan = torch.tensor([1, 1, 1, float("nan")])
    for pred, label, weight, message in [
        (good, torch.tensor([0, 7, 255, 255]), None, r"^3 labels outside 0\.\.2, values \[7, 255\]; .*value -100"),
        (good, torch.tensor([0, 1, 1, -1]), None, r"^1 labels outside 0\.\.2, values \[-1\]"),
        (torch.tensor([0, 3, 3, 9]), torch.tensor([0, 1, 1, IGNORE_INDEX]), None, r"^2 predictions outside .*\[3\]"),
        (torch.tensor([0, 1, 1, -2]), good, None, r"^1 predictions outside 0\.\.2, values \[-2\]"),
        (good, good[:3], None, r"one shape, got \[\(4,\), \(3,\)\]"),
        (good, good, torch.ones(1), r"one shape, got \[\(4,\), \(4,\), \(1,\)\]"),
        (good.float(), good, None, "class ids .integers., got torch.float32 and torch.int64"),
        (good, good, torch.ones(4), "cannot be mixed"),
    ]:
        with pytest.raises(ValueError, match=message):
            confusion.update(pred, label, weight)
        np.testing.assert_array_equal(confusion.matrix(), before)
    for weight in (nan, -torch.ones(4), torch.full((4,), float("inf"))):
        with pytest.raises(ValueError, match="a weight is negative or not finite"):
            ConfusionMatrix(3).update(good, good, weight)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        ConfusionMatrix(0)


SUM_OVER_PROCESSES = """
import sys, torch
import torch.distributed as dist
from utils.metrics import ConfusionMatrix
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
label = torch.tensor([0, 1, 1, 2, 2])                        # shares of 3 and 2 samples, nothing padded
pred = torch.tensor([0, 1, 0, 2, 1])
plain, empty, area, nothing = (ConfusionMatrix(3) for _ in range(4))
plain.update(pred[rank::2], label[rank::2])
area.update(pred[rank::2], label[rank::2], torch.full((3 - rank,), 0.5))
if rank == 0:
    empty.update(pred, label, torch.ones(5))                 # the other process saw no sample
print([c.all_reduce().counts.tolist() for c in (plain, empty, area)], nothing.all_reduce().counts)
dist.destroy_process_group()
"""


def test_sum_over_processes(tmp_path):
    command = [sys.executable, "-c", SUM_OVER_PROCESSES]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    whole = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    ones, area = ([[n * weight for n in row] for row in whole] for weight in (1.0, 0.5))
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == f"{[whole, ones, area]} None"


# -- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    m = segmentation_metrics(np.array([[3, 1, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]))
    np.testing.assert_allclose(m["iou"], [3 / 5, 4 / 6, 0, 0])
    np.testing.assert_allclose(m["f1"], [6 / 8, 8 / 10, 0, 0])
    np.testing.assert_allclose(m["accuracy"], [3 / 4, 4 / 5, np.nan, 0])         # class 2 is only predicted
    assert m["present"].tolist() == [True] * 4
    assert m["miou"] == pytest.approx((3 / 5 + 4 / 6) / 4) and m["mean_f1"] == pytest.approx((6 / 8 + 8 / 10) / 4)
    assert m["mean_accuracy"] == pytest.approx((3 / 4 + 4 / 5) / 3)
    assert m["overall_accuracy"] == pytest.approx(7 / 10)
    assert m["fw_iou"] == pytest.approx((4 * 3 / 5 + 5 * 4 / 6 + 1 * 0) / 10)


def test_metrics_equal_scikit_learn():
    pred, label = random_split()
    keep = label != IGNORE_INDEX
    m = segmentation_metrics(counted(pred, label, 7))
    truth, guess = label[keep].numpy(), pred[keep].numpy()
    for key, score in (("iou", jaccard_score), ("f1", f1_score), ("accuracy", recall_score)):
        np.testing.assert_allclose(m[key][:6], score(truth, guess, labels=range(6), average=None), err_msg=key)
        assert np.isnan(m[key][6])                           # absent: NaN, and in no mean
    assert m["miou"] == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert m["mean_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    assert m["mean_accuracy"] == pytest.approx(recall_score(truth, guess, average="macro"))
    assert m["overall_accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert m["fw_iou"] == pytest.approx(jaccard_score(truth, guess, average="weighted"))
    assert m["present"].tolist() == [True] * 6 + [False]
    assert absent_as_zero(m["iou"]) == pytest.approx(m["miou"] * 6 / 7)


def test_an_ignored_class_is_in_no_mean_even_where_it_is_predicted():
    matrix = np.array([[0, 0, 0], [1, 8, 1], [0, 2, 8]])                         # class 0: never labelled, once predicted
    m = segmentation_metrics(matrix, ignored=[0])
    assert np.isnan(m["iou"][0]) and np.isnan(m["f1"][0]) and np.isnan(m["accuracy"][0])
    assert m["iou"][1:].tolist() == [8 / 12, 8 / 11] and m["miou"] == pytest.approx((8 / 12 + 8 / 11) / 2)
    assert m["overall_accuracy"] == 16 / 20 and segmentation_metrics(matrix)["miou"] == pytest.approx(m["miou"] * 2 / 3)


def test_nothing_to_score():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = segmentation_metrics(np.zeros((3, 3), dtype=np.int64))
    assert all(np.isnan(m[key]) for key in ("miou", "mean_f1", "mean_accuracy", "overall_accuracy", "fw_iou"))
    assert not m["present"].any() and absent_as_zero(m["iou"]) == 0
    assert segmentation_metrics(np.array([[5]]))["miou"] == 1                    # one class
    with pytest.raises(ValueError, match=r"square, got shape \(2, 3\)"):
        segmentation_metrics(np.zeros((2, 3)))


def test_metrics_equal_pointcept():
    golden = torch.load(ROOT / "tests" / "golden" / "metrics.pt", weights_only=True)
    expected = golden["output"]
    confusion = ConfusionMatrix(20)
    for scene in golden["input"]["scenes"]:                  # its files have -1 for unlabelled points
        confusion.update(scene["pred"], torch.where(scene["label"] == -1, IGNORE_INDEX, scene["label"]))
    matrix = confusion.matrix()
    np.testing.assert_array_equal(np.diag(matrix), expected["intersection"])
    np.testing.assert_array_equal(matrix.sum(1), expected["target"])
    m = segmentation_metrics(matrix)
    assert m["overall_accuracy"] == pytest.approx(expected["all_acc"], abs=1e-6)
    assert absent_as_zero(m["iou"]) == pytest.approx(expected["miou"], abs=1e-6)         # Pointcept counts absent as 0
    assert absent_as_zero(m["accuracy"]) == pytest.approx(expected["macc"], abs=1e-6)
    # its mean over "present" classes leaves out those without a label; ours keeps one that was wrongly predicted
    assert np.nanmean(m["iou"][matrix.sum(1) > 0]) == pytest.approx(expected["miou_of_present_classes"], abs=1e-6)


# -- table ----------------------------------------------------------------------------------------------------------


def test_table():
    scores = segmentation_metrics(np.array([[3, 1, 0], [1, 3, 0], [0, 0, 0]]))
    lines = metrics_table(scores, ["roof", "a longer name", "x"]).split("\n")
    assert lines[0].split() == ["class", "IoU", "F1", "accuracy"]
    assert lines[1].split() == ["roof", "60.00", "75.00", "75.00"]
    assert lines[3].split() == ["x", "-", "-", "-"]
    assert lines[5].split() == ["mean", "60.00", "75.00", "75.00"]
    assert lines[6].split() == ["overall", "accuracy", "75.00"] and lines[7].split()[-1] == "60.00"
    assert len({len(line) for line in lines[:6]}) == 1 and all(line.rstrip() == line for line in lines)
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        metrics_table(segmentation_metrics(np.eye(3)), ["a", "b"])


def test_miou_of_each_is_over_the_classes_of_the_labels():
    matrices = np.random.default_rng(0).integers(0, 5, (6, 4, 4))
    matrices[1, 2], matrices[1, :, 2], matrices[2], matrices[3, 0] = 0, 0, 0, 0     # absent; a matrix of nothing; only predicted
    expected = [segmentation_metrics(matrix)["iou"][matrix.sum(1) > 0].mean() if matrix.any() else np.nan for matrix in matrices]
    assert np.allclose(miou_of_each(matrices), expected, equal_nan=True) and np.isnan(expected[2])


def test_one_stray_element_does_not_decide_the_rank_of_an_item():
    label = np.array([0] * 50 + [1] * 50)
    good, poor = label.copy(), label.copy()
    good[0], poor[:20] = 2, 1                                              # one face of a class that the mesh does not have
    for miou in (lambda pred: miou_of_labels(pred, label, 3),
                 lambda pred: miou_of_each(np.histogram2d(label, pred, [[-0.5, 0.5, 1.5, 2.5]] * 2)[0][None])[0]):
        assert miou(good) == pytest.approx((49 / 50 + 1) / 2) and miou(poor) == pytest.approx((30 / 50 + 50 / 70) / 2)
    assert np.isnan(miou_of_labels(good, np.full(100, -100), 3))
