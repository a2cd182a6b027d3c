"""What inspect_data.py finds in meshes and clouds: nothing in good ones, and each fault that is planted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.inspect_clouds import inspect_clouds
from data.inspect_meshes import inspect_meshes
from data.inspect_shapes import _one_off
from data.mesh_io import read_mesh
from data.synthetic import make_mesh_set
from data.synthetic_points import make_point_set
from tests.tiny_meshes import write_obj, write_set

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MESHES, CLOUDS = SHARED / "mesh", SHARED / "points" / "tabletop_mosd"
FLAGS = dict.fromkeys(("classes", "num_classes", "label_map"))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    make_mesh_set(folder, 10, 3, 0, 0, (300, 400))
    return folder


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rooms")
    make_point_set(folder, 8, 3, 0, 0, 3000)
    return folder


def inspected_meshes(root):
    return inspect_meshes({split: (str(root / split), None) for split in ("train", "val")}, dict(FLAGS), 1000, 1, 0)


def inspected_clouds(root):
    return inspect_clouds(str(root), dict(FLAGS), 1000, 1, 0)


# -- planting: meshes --------------------------------------------------------------------------------------------------

def meshes(root, split="train"):
    return sorted((root / split).glob("*.obj"), key=lambda path: path.stem[-3:])


def label_of(path):
    return np.loadtxt(path.with_suffix(".txt"), int)


def relabel(edit, wanted=slice(3, 4)):
    def plant(root):
        for path in [*meshes(root), *meshes(root, "val")][wanted]:
            path.with_suffix(".txt").write_text("\n".join(map(str, edit(label_of(path)))) + "\n")
    return plant


def reshape(edit, number=3):
    def plant(root):
        path = meshes(root)[number]
        mesh = read_mesh(path)
        write_obj(path, *edit(mesh.vertices.copy(), mesh.faces.copy()))
    return plant


def some_turned(vertices, faces):
    faces[::5] = faces[::5, ::-1]
    return vertices, faces


def without_area(vertices, faces):
    faces[:4, 2] = faces[:4, 1]
    return vertices, faces


def with_nan(vertices, faces):
    vertices[7, 1] = np.nan
    return vertices, faces


def speck(root):
    path = meshes(root)[3]
    mesh = read_mesh(path)
    extra = mesh.vertices.max(0) * 3 + 0.01 * np.eye(3)
    write_obj(path, np.concatenate([mesh.vertices, extra]), np.concatenate([mesh.faces, [[len(mesh.vertices) + k for k in range(3)]]]))
    path.with_suffix(".txt").write_text("\n".join(map(str, [*label_of(path), 0])) + "\n")


def copy_mesh(split, name="copied", factor=1.0):
    def plant(root):
        source = meshes(root)[4]
        mesh = read_mesh(source)
        write_obj(root / split / f"{name}.obj", mesh.vertices * factor, mesh.faces)
        if factor == 1:
            shutil.copy(source, root / split / f"{name}.obj")
        shutil.copy(source.with_suffix(".txt"), root / split / f"{name}.txt")
    return plant


def upright_set(edit):
    """All figures stand alike (their classes along z), then one is changed."""
    def plant(root):
        for number, path in enumerate([*meshes(root), *meshes(root, "val")]):
            rng = np.random.default_rng(number)
            mesh, label = read_mesh(path), label_of(path)
            centroid = mesh.vertices[mesh.faces].mean(1)
            label = np.digitize(centroid[:, 2], np.quantile(centroid[:, 2], [0.2, 0.45, 0.7]))
            path.with_suffix(".txt").write_text("\n".join(map(str, label)) + "\n")
            vertices = mesh.vertices * rng.uniform(0.9, 1.1)
            write_obj(path, edit(vertices) if number == 3 else vertices, mesh.faces)
        (root / "classes.json").unlink()
    return plant


def same_size(root):
    """Labels of two meshes exchanged, of equal numbers of faces."""
    a, b = meshes(root)[2], meshes(root)[5]
    few = min(len(label_of(a)), len(label_of(b)))
    for path in (a, b):
        mesh = read_mesh(path)
        write_obj(path, mesh.vertices, mesh.faces[:few])
        path.with_suffix(".txt").write_text("\n".join(map(str, label_of(path)[:few])) + "\n")
    kept = a.with_suffix(".txt").read_text()
    a.with_suffix(".txt").write_text(b.with_suffix(".txt").read_text())
    b.with_suffix(".txt").write_text(kept)


def per_vertex(root):
    for path in [*meshes(root), *meshes(root, "val")]:
        mesh, label = read_mesh(path), label_of(path)
        values = np.zeros(len(mesh.vertices), int)
        values[mesh.faces] = label[:, None]
        path.with_suffix(".txt").write_text("\n".join(map(str, values)) + "\n")


def gone(suffix):
    return lambda root: meshes(root)[3].with_suffix(suffix).unlink()


MESH_FAULTS = {
    "label count": (relabel(lambda label: label[:-5]), "fault", "_003", "labels, but"),
    "labels missing": (gone(".txt"), "fault", "_003", "no labels"),
    "labels from 1": (relabel(lambda label: label + 1, slice(None)), "doubt", "", "label_offset: -1"),
    "negative labels": (relabel(lambda label: np.where(label == 3, -1, label), slice(None)), "doubt", "", "ignore_labels: [-1]"),
    "label 255": (relabel(lambda label: np.where(label == 3, 255, label), slice(0, 6)), "doubt", "", "ignore_labels: [255]"),
    "unknown label": (relabel(lambda label: np.where(label == 3, 41, label)), "fault", "_003", "41"),
    "one file from 1": (relabel(lambda label: label + 1), "fault", "_003", "count from 1"),
    "numbers of their own": (relabel(lambda label: label * 10 + 11, slice(None)), "doubt", "", "11:0,21:1"),
    "a label a vertex": (per_vertex, "doubt", "", "data.label_kind: vertex"),
    "swapped pair": (same_size, "fault", "_002", "swapped"),
    "order of faces": (relabel(lambda label: np.random.default_rng(0).permutation(label)), "fault", "_003", "another order"),
    "constant labels": (relabel(np.zeros_like), "doubt", "_003", "constant labels"),
    "millimetres": (reshape(lambda v, f: (1000 * v, f)), "doubt", "_003", "another unit"),
    "y up": (upright_set(lambda v: v[:, [0, 2, 1]] * [1, 1, -1]), "doubt", "_003", "y up among files with z up"),
    "inside out": (reshape(lambda v, f: (v, f[:, ::-1])), "doubt", "_003", "inside out"),
    "winding": (reshape(some_turned), "doubt", "_003", "opposite winding"),
    "NaN": (reshape(with_nan), "fault", "_003", "NaN"),
    "zero-area faces": (reshape(without_area), "doubt", "_003", "zero-area"),
    "stray speck": (speck, "doubt", "_003", "stray"),
    "truncated": (lambda root: meshes(root)[3].write_text(meshes(root)[3].read_text()[:4000]), "fault", "_003", ""),
    "empty": (lambda root: meshes(root)[3].write_text(""), "fault", "_003", "no "),
    "duplicate across splits": (copy_mesh("val"), "doubt", "copied", "two splits"),
    "duplicate within": (copy_mesh("train"), "doubt", "", "duplicate within"),
    "scaled copy": (copy_mesh("val", "scaled", 2.5), "doubt", "scaled", "near-duplicate"),
    "only in val": (relabel(lambda label: np.where(label == 7, 0, label), slice(0, 10)), "doubt", "", "no training file"),
}

# -- planting: clouds --------------------------------------------------------------------------------------------------


def clouds(root, split="train"):
    return sorted((root / split).glob("*.npz"))


def recloud(edit, wanted=slice(3, 4)):
    def plant(root):
        for path in [*clouds(root), *clouds(root, "val")][wanted]:
            arrays = dict(np.load(path))
            edit(arrays)
            np.savez(path, **arrays)
    return plant


def setting(name, value):
    """An edit: arrays[name] becomes value(array)."""
    return lambda arrays: arrays.update({name: value(arrays[name])})


def y_up(arrays):
    for name in ("coord", "normal"):
        arrays[name] = arrays[name][:, [0, 2, 1]] * np.array([1, 1, -1], np.float32)


def part_of(arrays):
    for name in list(arrays):
        arrays[name] = arrays[name][:0]


def copy_cloud(root):
    shutil.copy(clouds(root)[2], root / "val" / "copied.npz")


def with_nan_points(coord):
    coord[5, 0] = np.nan
    return coord


CLOUD_FAULTS = {
    "millimetres": (recloud(setting("coord", lambda v: 1000 * v)), "doubt", "room_003", "another unit"),
    "y up": (recloud(y_up), "doubt", "room_003", "y up among files with z up"),
    "all y up": (recloud(y_up, slice(None)), "doubt", "", "data.up: y"),
    "flipped normals": (recloud(setting("normal", lambda v: -v)), "doubt", "room_003", "flipped normals"),
    "no normals": (recloud(lambda arrays: arrays.pop("normal")), "doubt", "room_003", "no normals"),
    "two label fields": (recloud(lambda arrays: arrays.update({"class": arrays["segment"]}), slice(None)), "doubt", "room_0",
                         "labels in segment, class"),
    "zero normals": (recloud(setting("normal", lambda v: np.where(np.arange(len(v))[:, None] % 9, v, 0))), "doubt", "room_003",
                     "normals are zero or NaN"),
    "no colours": (recloud(lambda arrays: arrays.pop("color")), "doubt", "room_003", "no colours"),
    "colours 0..1": (recloud(setting("color", lambda v: v.astype(np.float32) / 255)), "doubt", "room_003", "taken as 0..1"),
    "NaN": (recloud(setting("coord", with_nan_points)), "fault", "room_003", "NaN"),
    "empty": (recloud(part_of), "fault", "room_003", "at least one point"),
    "truncated": (lambda root: clouds(root)[3].write_bytes(clouds(root)[3].read_bytes()[:9000]), "fault", "room_003", "cannot be read"),
    "no labels": (recloud(lambda arrays: arrays.pop("segment")), "fault", "room_003", "no labels"),
    "label count": (recloud(setting("segment", lambda v: v[:-1])), "fault", "room_003", "one row a point"),
    "labels from 1": (recloud(setting("segment", lambda v: np.where(v < 0, v, v + 1)), slice(None)), "doubt", "", "data.label_offset: -1"),
    "label 255": (recloud(setting("segment", lambda v: np.where(v < 0, 255, v)), slice(None)), "doubt", "", "255"),
    "NaN for unlabelled": (recloud(setting("segment", lambda v: np.where(v < 0, np.nan, v))), "doubt", "room_003", "data.ignore_labels: [-1, 'nan']"),
    "few points": (recloud(lambda arrays: arrays.update({name: value[:20] for name, value in arrays.items()})), "doubt", "room_003", "cut short"),
    "unknown label": (recloud(setting("segment", lambda v: np.where(v == 2, 77, v))), "fault", "room_003", "77"),
    "one file from 1": (recloud(setting("segment", lambda v: np.where(v < 0, v, v + 1))), "fault", "room_003", ""),
    "order of points": (recloud(setting("segment", lambda v: np.random.default_rng(0).permutation(v))), "fault", "room_003", "another order"),
    "duplicate across splits": (copy_cloud, "doubt", "copied", "two splits"),
    "only in val": (recloud(setting("segment", lambda v: np.where(v == 5, 0, v)), slice(0, 8)), "doubt", "", "no training file"),
}


def test_shifted_labels_are_named_by_the_shares_of_the_classes():
    share = np.tile([0.4, 0.05, 0.3, 0.2, 0.05], (9, 1)) + np.random.default_rng(0).normal(0, 0.01, (9, 5))
    share[4] = np.roll(share[4], 1)
    assert _one_off(share) == {4: -1}


@pytest.mark.parametrize("spots, apart", [(1, 0.01), (500, 0.05)])
def test_points_that_are_there_twice_have_a_distance_too(tmp_path, spots, apart):
    """Scans that were joined twice: neighbours are at distance 0, their places are not."""
    place = np.stack(np.meshgrid(np.arange(25), np.arange(20), [0]), -1).reshape(-1, 3)[:spots] * 0.05
    (tmp_path / "train").mkdir()
    np.savez(tmp_path / "train" / "a.npz", coord=np.repeat(place, 2, 0), segment=np.zeros(2 * spots, int))
    assert inspected_clouds(tmp_path).settings["spacing"] == pytest.approx(apart)


def check_named(found, level, file, words):
    named = [f"{finding.level}: {finding.text}" for finding in found.findings]
    assert any(line.startswith(level) and file in line and words in line for line in named), named
    others = [finding.text for finding in found.findings if finding.level != "note" and words not in finding.text]
    assert len(others) <= 2, named                             # what follows from it, and no cloud of alarms


@pytest.mark.parametrize("name", MESH_FAULTS)
def test_a_fault_planted_in_a_mesh_is_named(name, figures, tmp_path):
    plant, *expected = MESH_FAULTS[name]
    root = Path(shutil.copytree(figures, tmp_path / "figures"))
    plant(root)
    check_named(inspected_meshes(root), *expected)


@pytest.mark.parametrize("name", CLOUD_FAULTS)
def test_a_fault_planted_in_a_cloud_is_named(name, rooms, tmp_path):
    plant, *expected = CLOUD_FAULTS[name]
    root = Path(shutil.copytree(rooms, tmp_path / "rooms"))
    plant(root)
    check_named(inspected_clouds(root), *expected)


def test_a_coarse_mesh_is_no_fault_and_its_labels_in_disorder_are(tmp_path):
    """80 faces among 320: twice the share of neighbours lies across a border."""
    train = write_set(tmp_path / "train", 6)
    assert len(label_of(train / "mesh_01.obj")) == 80 and len(label_of(train / "mesh_02.obj")) == 320

    def faults():
        found = inspect_meshes({"train": (str(train), None)}, dict(FLAGS), 1000, 1, 0)
        return [Path(finding.file).name for finding in found.findings if finding.kind == "labels in disorder"]
    assert faults() == []
    np.random.default_rng(0).shuffle(label := label_of(train / "mesh_01.obj"))
    (train / "mesh_01.txt").write_text("\n".join(map(str, label)))
    assert faults() == ["mesh_01.obj"]


def test_nothing_is_named_on_good_sets(figures, rooms):
    for found in (inspected_meshes(figures), inspected_clouds(rooms)):
        assert [finding for finding in found.findings if finding.level != "note"] == []
        assert found.class_names == json.loads((figures / "classes.json").read_text()) or found.unit == "points"


@pytest.mark.slow                                              # 500 files
@pytest.mark.parametrize("name", ["humanbody_1500", "lod3_ingolstadt_textured", "tabletop_mosd"])
def test_nothing_is_named_on_real_sets(name):
    root = CLOUDS if name == CLOUDS.name else MESHES / name
    if not root.is_dir():
        pytest.skip(f"{name} is not there")
    if root == CLOUDS:
        found = inspected_clouds(root)
    else:
        folders = {split: (str(root / split), None) for split in ("train", "test") if (root / split).is_dir()}
        found = inspect_meshes(folders, dict(FLAGS), 1000, 2, 0)
    assert [finding for finding in found.findings if finding.level != "note"] == []
