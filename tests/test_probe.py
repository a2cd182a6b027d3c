"""Linear and nearest-neighbour probes on frozen embeddings."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score

from utils.probe import majority, probe, probe_table, scores


def blobs(seed, count=120):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    center = np.array([[0, 0, 1000.0], [4, 0, 1000.0], [0, 4, 1000.0]])              # a constant, large third feature
    return (center[label] + rng.normal(size=(count, 3)) * [0.5, 0.5, 0]).astype(np.float32), label


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_separable_classes_are_found_and_noise_is_not(method):
    assert probe(blobs(0), blobs(1), 3, method)["miou"] > 0.95
    noise = np.random.default_rng(2).normal(size=(120, 3)).astype(np.float32)
    assert probe((noise, blobs(0)[1]), (noise[::-1], blobs(1)[1]), 3, method)["overall_accuracy"] < 0.6
    assert probe(blobs(0), blobs(1), 3, method) == probe(blobs(0), blobs(1), 3, method)


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    pred, label = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    found = scores(pred, label, 4)
    assert found["overall_accuracy"] == pytest.approx(accuracy_score(label, pred))
    assert found["miou"] == pytest.approx(jaccard_score(label, pred, average="macro"))
    assert all(isinstance(value, float) for value in found.values())


def test_majority_class_by_hand():
    found = majority(np.array([1, 1, 0]), np.array([1, 0, 0, 2]), 3)
    assert found["overall_accuracy"] == 0.25 and found["miou"] == pytest.approx(0.25 / 3)


def test_nothing_to_tell_apart_or_unknown_method():
    x = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="two classes"):
        probe((x, np.array([1, 1, 1])), (x, np.array([1, 1, 1])), 2)
    with pytest.raises(ValueError, match="linear, knn"):
        probe(blobs(0), blobs(1), 3, "svm")


def test_table_says_plainly_whether_pre_training_helped():
    low, high = ({"overall_accuracy": v, "miou": v, "mean_f1": v} for v in (0.25, 0.5))
    assert "pre-training helps: +25.00 mIoU points against raw" in probe_table({"pre-trained": high, "raw": low})
    text = probe_table({"pre-trained": low, "random": high, "raw": low})
    assert "does NOT help: -25.00 mIoU points against random" in text
    assert "does NOT help" in probe_table({"pre-trained": low, "raw": low})
