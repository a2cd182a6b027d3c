"""A network trained with rotations keeps its accuracy on turned, moved and scaled figures, and beats what needs no network (slow)."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sklearn.ensemble import RandomForestClassifier

import evaluate
import train_downstream
from data.mesh_features import face_features, normalize_vertices
from data.mesh_io import list_meshes, read_labels, read_mesh
from data.synthetic import make_mesh_set
from tests.tiny_meshes import write_obj

ROOT = Path(__file__).resolve().parents[1]
SIMPLE = ("centroid", "corners", "normal", "area")                          # 16 columns, those of the original program


def simple_features(folder):
    features, labels = [], []
    for path in list_meshes(folder):
        mesh = read_mesh(path)
        features.append(face_features(normalize_vertices(mesh.vertices, mesh.faces), mesh.faces, SIMPLE))
        labels.append(read_labels(path.with_suffix(".txt"), mesh))
    return np.concatenate(features), np.concatenate(labels)


@pytest.mark.slow
def test_rotation_translation_scale_and_baselines(tmp_path):
    make_mesh_set(tmp_path, 40, 4, 6, seed=3)
    rng, moved = np.random.default_rng(0), tmp_path / "moved"
    moved.mkdir()
    for path in list_meshes(tmp_path / "test"):
        mesh = read_mesh(path)
        write_obj(moved / path.name, mesh.vertices @ Rotation.random(rng=rng).as_matrix().T * 1000 + 1e5, mesh.faces)
        (moved / path.with_suffix(".txt").name).write_text(path.with_suffix(".txt").read_text())

    train_downstream.main([str(ROOT / "configs" / "mesh_demo.yaml"), "--output-dir", str(tmp_path / "run"), "--device", "cpu",
                           "--num-workers", "0", "training.epochs=15", f"paths.mesh_dir={tmp_path / 'train'}",
                           f"paths.val_mesh_dir={tmp_path / 'val'}", f"paths.cache_dir={tmp_path / 'cache'}"])
    checkpoint = str(tmp_path / "run" / "model" / "model_best.pth")
    plain, turned = (evaluate.main([checkpoint, "--data-dir", str(folder), "--output-dir", str(tmp_path / "scores"), "--device", "cpu"])
                     for folder in (tmp_path / "test", moved))

    features, label = simple_features(tmp_path / "train")
    test_features, test_label = simple_features(tmp_path / "test")
    forest = RandomForestClassifier(60, random_state=0, n_jobs=2).fit(features, label)
    forest_accuracy = (forest.predict(test_features) == test_label).mean()
    majority = (test_label == np.bincount(label).argmax()).mean()
    print(f"plain {plain['overall_accuracy']:.3f}, turned {turned['overall_accuracy']:.3f}, forest {forest_accuracy:.3f}, "
          f"majority {majority:.3f}")
    assert abs(plain["overall_accuracy"] - turned["overall_accuracy"]) < 0.05
    assert plain["overall_accuracy"] > max(forest_accuracy, majority) + 0.1
