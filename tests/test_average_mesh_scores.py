"""scripts/average_mesh_scores.py: averaged probabilities, counts and intervals by hand, and on checkpoints of both encoders."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import evaluate
import train_downstream
from tests.tiny_meshes import write_set

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("average_mesh_scores", ROOT / "scripts" / "average_mesh_scores.py")
scores = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scores)


def test_confusion_matrices_by_hand():
    probabilities = [np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]), np.array([[0.3, 0.7]])]
    matrices = scores.confusion_matrices(probabilities, [np.array([0, 0, -1]), np.array([1])])
    assert matrices.tolist() == [[[1, 1], [0, 0]], [[0, 0], [0, 1]]]


def test_bootstrap_against_explicit_loops():
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 20, (2, 6, 3, 3)) + 30 * np.eye(3, dtype=int)
    drawn = {"accuracy": [], "mIoU": []}
    for counts in np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=200):
        each = [sum(count * matrix for count, matrix in zip(counts, row, strict=True)) for row in rows]
        drawn["accuracy"].append(np.mean([np.trace(m) / m.sum() for m in each]))
        drawn["mIoU"].append(np.mean([np.mean([m[c, c] / (m[c].sum() + m[:, c].sum() - m[c, c]) for c in range(3)]) for m in each]))
    for name, (low, high) in scores.bootstrap(rows, 200).items():
        np.testing.assert_allclose([low, high], np.percentile(drawn[name], (2.5, 97.5)))


def test_equal_meshes_leave_no_interval():
    rows = np.broadcast_to(np.array([[8, 2], [1, 9]]), (1, 5, 2, 2))
    low, high = scores.bootstrap(rows, 50)["accuracy"]
    assert low == high == pytest.approx(17 / 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network on vertices and one on clusters of faces, a few steps each."""
    folder = tmp_path_factory.mktemp("average")
    for name, count, seed in (("train", 4, 0), ("val", 2, 100), ("test", 3, 200)):
        write_set(folder / name, count, first_seed=seed)
    shared = {"paths": {"mesh_dir": str(folder / "train"), "val_mesh_dir": str(folder / "val"), "test_mesh_dir": str(folder / "test"),
                        "cache_dir": str(folder / "cache")},
              "data": {"class_names": ["low", "high", "cap"]}, "training": {"epochs": 2, "batch_size": 2},
              "optimizer": {"learning_rate": 0.01}, "logging": {"tensorboard": False}}
    models = {"vertices": {"encoder": "diffusion_net", "features": ["xyz"], "num_eigenpairs": 16, "embedding_dim": 8, "num_diffusion_blocks": 1},
              "clusters": {"features": ["normal", "centroid"], "embedding_dim": 16, "num_heads": 2, "num_attention_blocks": 1}}
    paths = {}
    for name, model in models.items():
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**shared, "model": {"n_classes": 3, **model}}))
        train_downstream.main([str(config), "--output-dir", str(folder / name), "--device", "cpu", "--num-workers", "0"])
        paths[name] = str(folder / name / "model" / "model_last.pth")
    return paths


def test_one_checkpoint_has_the_score_of_evaluate(trained, tmp_path, capsys):
    for path in trained.values():
        score = scores.main([path, "--device", "cpu", "--resamples", "20"])["mean"]
        expected = evaluate.main([path, "--split", "test", "--device", "cpu", "--output-dir", str(tmp_path)])
        assert (score["accuracy"], score["mIoU"]) == pytest.approx((expected["overall_accuracy"], expected["miou"]))


def test_probabilities_of_both_encoders_are_averaged(trained, capsys):
    first, second = trained.values()
    result = scores.main([first, f"{first}+{second}", "--device", "cpu", "--resamples", "20"])
    _, labels, _, one = scores.face_probabilities(first, "test", [], torch.device("cpu"))
    other = scores.face_probabilities(second, "test", [], torch.device("cpu"))[3]
    hits = [((a + b).argmax(1) == label).sum() for a, b, label in zip(one, other, labels, strict=True)]
    assert result["all"]["overall_accuracy"] == pytest.approx(sum(hits) / sum(map(len, labels)))
    alone, both = (float(row["overall_accuracy"]) for row in result["rows"])
    assert both == pytest.approx(float(result["all"]["overall_accuracy"])) and alone != both
    assert result["mean"]["accuracy"] == pytest.approx((alone + both) / 2)
    assert result["std"]["accuracy"] == pytest.approx(abs(alone - both) / 2**0.5)
    assert "3 meshes" in capsys.readouterr().out


def test_other_meshes_are_refused(trained, tmp_path, monkeypatch):
    first, second = trained.values()
    original = scores.face_probabilities

    def shortened(path, *rest):
        names, labels, classes, probabilities = original(path, *rest)
        return (names, labels, classes, probabilities) if path == first else (names[1:], labels[1:], classes, probabilities[1:])

    monkeypatch.setattr(scores, "face_probabilities", shortened)
    with pytest.raises(ValueError, match="other meshes, labels or classes"):
        scores.main([first, second, "--device", "cpu"])
