"""What only real data shows; skipped where it is absent (datasets/ or a folder `shared` beside the checkout)."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data.mesh import MeshDataset, MeshSpec
from data.mesh_io import list_meshes, read_labels, read_mesh
from utils.metrics import ConfusionMatrix, segmentation_metrics

ROOT = Path(__file__).resolve().parents[1]


def real(name):
    places = [ROOT / "datasets" / name, ROOT.parent / "shared" / "data" / "mesh" / name]
    return next((place for place in places if place.is_dir()), None)


HUMANBODY, LOD3 = real("humanbody_1500"), real("lod3_ingolstadt_textured")
needs_humanbody = pytest.mark.skipif(HUMANBODY is None, reason="HumanBody (1,500 faces) is not here")
needs_lod3 = pytest.mark.skipif(LOD3 is None, reason="the LOD3 buildings are not here")


def shape_hash(path):
    """The same for a mesh and its moved, turned or renumbered copy: all edge lengths over their mean, sorted."""
    mesh = read_mesh(path)
    corner = mesh.vertices[mesh.faces]
    length = np.sort(np.linalg.norm(corner - np.roll(corner, 1, axis=1), axis=2).ravel())
    return hashlib.sha256(np.round(length / length.mean(), 4).tobytes()).hexdigest()


@needs_humanbody
def test_no_figure_is_in_both_parts():
    train, test = ({shape_hash(path) for path in list_meshes(HUMANBODY / part)} for part in ("train", "test"))
    assert len(train) == 381 and len(test) == 18 and not train & test


@needs_lod3
def test_oracle_on_buildings_of_many_materials_is_perfect_and_area_differs_from_count(tmp_path):
    """Labels that go through clusters, padding and back to file order are the file's; windows are most faces, walls most area."""
    files = sorted((LOD3 / "train").glob("*.obj"))[:8]
    spec = MeshSpec(features=("corners", "normal", "area", "dihedral"), faces_per_cluster=64, unit=10.0)
    dataset = MeshDataset(files, LOD3 / "train", spec, num_classes=9, views=1, cache_dir=tmp_path)
    oracle, majority, by_area = ConfusionMatrix(9), ConfusionMatrix(9), ConfusionMatrix(9)
    for item, (index, _, _) in enumerate(dataset.items):
        sample = dataset[item]
        assert torch.isfinite(sample["features"]).all()
        found = torch.full((dataset.num_faces[index],), -7)
        found[sample["face_index"][sample["mask"]]] = sample["label"][sample["mask"]]
        label = torch.from_numpy(read_labels(files[index].with_suffix(".txt"), read_mesh(files[index]), 9))
        oracle.update(found, label)
        windows = torch.full_like(label, 5)
        majority.update(windows, label)
        by_area.update(windows, label, torch.from_numpy(dataset.mesh(index).area))
    count, area = (segmentation_metrics(m.matrix())["overall_accuracy"] for m in (majority, by_area))
    assert segmentation_metrics(oracle.matrix())["overall_accuracy"] == 1.0
    assert count > 0.5 and area < 0.15, (count, area)
