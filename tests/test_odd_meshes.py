"""Meshes and labels as people have them, through train_downstream.py, evaluate.py and predict.py whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
import yaml

import data.mesh
import evaluate
import inspect_data
import predict
import train_downstream
import train_jepa
from data.mesh import MeshDataset, MeshSpec
from data.mesh_io import read_mesh
from data.mesh_surfaces import SurfaceDataset, SurfaceSpec
from tests.tiny_meshes import CLASSES, tiny_mesh, write_obj, write_set
from utils.checkpoint import load_checkpoint

MODEL = {"n_classes": 3, "features": ["centroid", "normal", "area"], "embedding_dim": 16, "num_heads": 2, "num_attention_blocks": 2, "faces_per_cluster": 16}


def settings(folder, **data):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({
        "paths": {"mesh_dir": str(folder / "meshes"), "cache_dir": None}, "data": {"val_split": 0.34, **data}, "model": MODEL,
        "training": {"epochs": 1, "batch_size": 2}, "optimizer": {"learning_rate": 0.01}, "logging": {"tensorboard": False}}))
    return str(path)


def train(folder, *more, **data):
    out = folder / "run"
    result = train_downstream.main([settings(folder, **data), "--output-dir", str(out), "--device", "cpu", "--num-workers", "0", *more])
    return result, str(out / "model" / "model_last.pth")


def prism(seed, sides, rings=4):
    """A tube of quads, both ends n-gons of a star's outline (concave), cut at random corners: text of an OBJ and labels."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(sides) / sides
    outline = np.c_[np.cos(angle), np.sin(angle)] * np.where(np.arange(sides) % 2, 0.5, 1.0)[:, None]
    vertices = [(x, y, z) for z in np.linspace(-1, 1, rings) for x, y in outline + 0.01 * rng.normal(size=outline.shape)]
    faces = [[r * sides + i, r * sides + (i + 1) % sides, (r + 1) * sides + (i + 1) % sides, (r + 1) * sides + i]
             for r in range(rings - 1) for i in range(sides)]
    label = [int(r >= rings // 2) for r in range(rings - 1) for _ in range(sides)]
    faces += [list(range(sides))[::-1], list(range((rings - 1) * sides, rings * sides))]
    label += [0, 2]
    a, b, c, d = faces[3]
    faces, label = [*faces[:3], [a, b, c], [a, c, d], *faces[4:]], [*label[:3], label[3], label[3], *label[4:]]     # triangles, too
    faces = [np.roll(face, rng.integers(len(face))) for face in faces]
    return ("".join(f"v {x:.6g} {y:.6g} {z:.6g}\n" for x, y, z in vertices) + "".join("f " + " ".join(map(str, f + 1)) + "\n" for f in faces), label,
            np.array(vertices), faces)


@pytest.mark.parametrize("more", [(), ("evaluation.views=2", "training.clusters_per_batch=3", "evaluation.pool_planes=1"),
                                  ("model.encoder=diffusion_net", "model.features=[xyz]", "model.num_eigenpairs=8", "model.head=linear")])
def test_a_polygon_is_one_face_in_training_scoring_and_prediction(tmp_path, more):
    (tmp_path / "meshes").mkdir()
    truth = {}
    for i in range(3):
        text, label, vertices, faces = prism(i, 8 + 2 * i)
        (tmp_path / "meshes" / f"m{i}.obj").write_text(text)
        (tmp_path / "meshes" / f"m{i}.txt").write_text("\n".join(map(str, label)))
        truth[f"m{i}"] = np.array(label), [outline_area(vertices[face]) for face in faces]
    (trained, checkpoint) = train(tmp_path, *more)
    scored = evaluate.main([checkpoint, "--data-dir", str(tmp_path / "meshes"), "--device", "cpu", "--output-dir", str(tmp_path / "scores"), "--batch-size", "1"])
    record = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    found = predict.main([checkpoint, str(tmp_path / "meshes"), "--device", "cpu", "--output", str(tmp_path / "out")])
    matrix, by_area = np.zeros((3, 3), int), np.zeros(2)
    for path, pred in found.items():
        label, area = truth[Path(path).stem]
        assert len(pred) == len(label) and (np.loadtxt(tmp_path / "out" / f"{Path(path).stem}.txt", dtype=int) == pred).all()
        np.add.at(matrix, (label, pred), 1)
        area = np.array(area) / (sum(area) if "unit" not in str(more) else 1)                  # each mesh by its own size
        by_area += [area[pred == label].sum(), area.sum()]
    assert record["confusion_matrix"] == matrix.tolist() and matrix.sum() == sum(len(label) for label, _ in truth.values())
    assert scored["overall_accuracy"] == np.trace(matrix) / matrix.sum()
    assert record["by area"]["overall_accuracy"] == pytest.approx(by_area[0] / by_area[1], rel=1e-3)
    log = [json.loads(line) for line in (tmp_path / "run" / "log" / "log.jsonl").read_text().splitlines()]
    counted = next(entry for entry in log if entry["split"] == "train")["overall_accuracy"] * sum(len(truth[f"m{i}"][0]) for i in (0, 1))
    assert "clusters_per_batch" in str(more) or counted == pytest.approx(round(counted), abs=1e-6)      # so many of the training faces


def outline_area(points):
    """Of a planar polygon in space."""
    return np.linalg.norm(np.cross(points - points[0], np.roll(points, -1, axis=0) - points[0]).sum(0)) / 2


# -- labels ----------------------------------------------------------------------------------------------------------

def test_folders_in_folders(tmp_path):
    """One folder a patient, all files of one name; dental numbers in JSON, one a vertex."""
    numbers = np.array([0, 31, 32])
    for i in range(4):
        vertices, faces, label = tiny_mesh(i)
        folder = tmp_path / "meshes" / f"patient{i}" / "scan"
        folder.mkdir(parents=True)
        write_obj(folder / "lower.obj", vertices, faces)
        at_vertex = np.zeros(len(vertices), int)
        at_vertex[faces.ravel()] = np.repeat(label, 3)
        (folder / "lower.json").write_text(json.dumps({"labels": numbers[at_vertex].tolist()}))
    options = {"label_kind": "vertex", "label_map": {0: "gum", 31: "low", 32: "high"}, "val_split": ["patient1/scan/*"]}
    with pytest.raises(ValueError, match="no mesh in this folder"):
        train(tmp_path, **options)
    result, checkpoint = train(tmp_path, recursive=True, **options)
    assert load_checkpoint(checkpoint)["class_names"] == ["gum", "low", "high"] and 0 < result["best"] <= 1
    found = predict.main([checkpoint, str(tmp_path / "meshes"), "--device", "cpu", "--output", str(tmp_path / "out")])
    assert len(found) == 4
    for path, label in found.items():
        name = Path(path).parent.relative_to(tmp_path / "meshes")
        assert (np.loadtxt(tmp_path / "out" / name / "lower.txt") == numbers[label]).all()
        assert read_mesh(tmp_path / "out" / name / "lower.ply").properties["face"]["label"].tolist() == numbers[label].tolist()
    labels = tmp_path / "labels"
    for path in (tmp_path / "meshes").rglob("*.json"):                      # a folder of labels that repeats the folders
        (labels / path.parent.relative_to(tmp_path / "meshes")).mkdir(parents=True)
        path.rename(labels / path.relative_to(tmp_path / "meshes"))
    scored = evaluate.main([checkpoint, "--data-dir", str(tmp_path / "meshes"), "--label-dir", str(labels), "--device", "cpu", "--output-dir", str(tmp_path / "s")])
    assert 0 < scored["overall_accuracy"] <= 1


def write_materials(folder):
    folder.mkdir(exist_ok=True)
    for i in range(3):
        vertices, faces, label = tiny_mesh(i)
        write_obj(folder / f"m{i}.obj", vertices, faces[:0])
        with open(folder / f"m{i}.obj", "a") as file:
            for face, c in zip(faces + 1, label, strict=True):
                file.write(f"usemtl {CLASSES[c]}\nf {' '.join(map(str, face))}\n")


def test_materials_become_classes(tmp_path):
    write_materials(tmp_path / "meshes")
    _, checkpoint = train(tmp_path, label_kind="material")
    stored = load_checkpoint(checkpoint)
    assert stored["class_names"] == ["cap", "high", "low"] == stored["config"]["data"]["class_names"]
    evaluate.main([checkpoint, "--data-dir", str(tmp_path / "meshes"), "--device", "cpu", "--output-dir", str(tmp_path / "s")])
    matrix = json.loads((tmp_path / "s" / "metrics.json").read_text())["confusion_matrix"]
    label = np.concatenate([tiny_mesh(i)[2] for i in range(3)])
    assert np.array(matrix).sum(1).tolist() == np.bincount(label, minlength=3)[::-1].tolist()
    with pytest.raises(ValueError, match="the meshes have 3 names .cap, high, low. and model.n_classes=2"):
        train(tmp_path, "model.n_classes=2", label_kind="material")
    train(tmp_path, "model.n_classes=2", label_kind="material", ignore_labels=["cap"])
    with pytest.raises(ValueError, match="m[02].obj: material 'cap' .* is none of data.class_names: low, high"):
        train(tmp_path, "model.n_classes=2", label_kind="material", class_names=["low", "high"])


@pytest.mark.parametrize(("options", "message"), [
    ({"label_map": "0:0,1:1"}, "data.label_map has 2 classes and model.n_classes=3; set model.n_classes to 2"),
    ({"label_map": "0:0,1:1,2:2", "label_offset": -1}, "data.label_map: leave it out with data.label_offset"),
    ({"label_map": "0:0,1:1,2:2", "label_kind": "group"}, "data.label_map: leave it out"),
    ({"label_map": "zero"}, "label map 'zero'"), ({"ignore_labels": ["wall"]}, "data.ignore_labels=.*expected numbers"),
    ({"label_kind": "group", "label_offset": -1}, "data.label_offset=-1: names of data.label_kind: group are no numbers"),
    ({"up": "x"}, "data.up.*expected one of auto, z, y")])
def test_settings_that_do_not_go_together(tmp_path, options, message):
    write_set(tmp_path / "meshes", 3)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)


def test_what_a_checkpoint_needs_is_in_it(tmp_path):
    """The label map in its file may change, the meshes it was trained on may go; how they are turned may not change."""
    write_set(tmp_path / "meshes", 3)
    for path in (tmp_path / "meshes").glob("*.txt"):
        np.savetxt(path, np.array([5, 7, 9])[np.loadtxt(path, int)], "%d")
    (tmp_path / "map.json").write_text(json.dumps({"5": 0, "7": 1, "9": 2}))
    _, checkpoint = train(tmp_path, label_map=str(tmp_path / "map.json"))
    with pytest.raises(ValueError, match="data.up=y: the resumed run has auto"):
        train_downstream.main([settings(tmp_path, label_map=str(tmp_path / "map.json")), "--output-dir", str(tmp_path / "run"), "--device", "cpu",
                               "--num-workers", "0", "--resume", checkpoint, "data.up=y"])
    (tmp_path / "map.json").unlink()
    (tmp_path / "meshes").rename(tmp_path / "new")
    for _ in range(2):                                      # results in the folder are no input of the next call
        found = predict.main([checkpoint, str(tmp_path / "new"), "--device", "cpu", "--output", str(tmp_path / "new" / "out"), "--picture", "glb"])
        assert len(found) == 3
    assert {*np.loadtxt(next((tmp_path / "new" / "out").glob("*.txt")), int)} <= {5, 7, 9}


def test_pretraining_knows_the_same_labels(tmp_path):
    """The probe of train_jepa.py: folders in folders, numbers of its own, polygons once."""
    for i in range(3):
        text, label, *_ = prism(i, 16, 5)
        (tmp_path / "meshes" / f"p{i}").mkdir(parents=True)
        (tmp_path / "meshes" / f"p{i}" / "m.obj").write_text(text)
        (tmp_path / "meshes" / f"p{i}" / "m_labels.txt").write_text("\n".join(f"{3 + c}  # class {c}" for c in label))
    path = tmp_path / "jepa.yaml"
    path.write_text(yaml.safe_dump({
        "paths": {"mesh_dir": str(tmp_path / "meshes"), "cache_dir": None}, "model": {**MODEL, "num_attention_blocks_predictor": 1},
        "data": {"val_split": ["p1/*"], "recursive": True, "label_map": "3:0,4:1,5:2"}, "training": {"epochs": 1, "batch_size": 2},
        "monitor": {"stop": False}, "probe": {"interval": 1}, "logging": {"tensorboard": False}}))
    result = train_jepa.main([str(path), "--output-dir", str(tmp_path / "run"), "--device", "cpu", "--num-workers", "0"])
    assert 0 <= result["probe_miou"] <= 1
    assert f"scored on {len(prism(1, 16, 5)[1])} of 1 others" in (tmp_path / "run" / "log" / "train.log").read_text()


# -- up --------------------------------------------------------------------------------------------------------------

def write_both(folder):
    """A house, z up as an OBJ and y up as a GLB."""
    box = trimesh.creation.box((4, 5, 3)).vertices * (1, 1, 1.0)
    faces = np.array(trimesh.creation.box().faces)
    write_obj(folder / "z.obj", box, faces)
    turned = box[:, [0, 2, 1]] * (1, 1, -1)
    write_obj(folder / "y.obj", turned, faces)
    trimesh.Trimesh(turned, faces, process=False).export(folder / "a.glb")
    return faces


@pytest.mark.parametrize("kind", ["clusters", "surface"])
def test_a_glb_stands_upright(tmp_path, kind):
    faces = write_both(tmp_path)
    dataset, spec = (MeshDataset, lambda up: MeshSpec(("centroid", "ground"), unit=1.0, up=up)) if kind == "clusters" else \
        (SurfaceDataset, lambda up: SurfaceSpec(("xyz", "normal"), 8, up=up))

    def features(name, up):
        for _ in range(2):                                  # the second time from the cache
            data = dataset([tmp_path / name], None, spec(up), views=1, cache_dir=tmp_path / "cache")
        item = data[0]
        if kind == "surface":
            return item["features"][item["faces"]].numpy()
        return item["features"][0][item["face_index"][0].argsort()].numpy()

    expected = features("z.obj", "auto")
    for name, up in (("a.glb", "auto"), ("a.glb", "y"), ("y.obj", "y"), ("z.obj", "z")):
        np.testing.assert_allclose(features(name, up), expected, atol=1e-5, err_msg=f"{name} {up}")
    for name, up in (("a.glb", "z"), ("y.obj", "auto"), ("z.obj", "y")):
        assert not np.allclose(features(name, up), expected, atol=0.1), (name, up)
    assert len(expected) == len(faces)


def test_the_result_lies_where_the_input_lies(tmp_path):
    write_set(tmp_path / "meshes", 3)
    _, checkpoint = train(tmp_path)
    vertices, faces, _ = tiny_mesh(5)
    write_obj(tmp_path / "z.obj", vertices, faces)
    trimesh.Trimesh(vertices[:, [0, 2, 1]] * (1, 1, -1), faces, process=False).export(tmp_path / "a.glb")
    upright, lying = (predict.main([checkpoint, str(tmp_path / name), "--device", "cpu", "--output", str(tmp_path / "out"), *more])[str(tmp_path / name)]
                      for name, more in (("z.obj", ()), ("a.glb", ("--html", ))))
    assert (upright == lying).mean() > 0.98                 # coordinates in 32 bits
    for name in ("z.obj", "a.glb"):
        before, after = read_mesh(tmp_path / name), read_mesh(tmp_path / "out" / Path(name).with_suffix(".ply"))
        np.testing.assert_array_equal(before.vertices[before.faces], after.vertices[after.faces])


# -- sizes -----------------------------------------------------------------------------------------------------------

def test_a_mesh_in_another_unit_is_named_where_the_size_counts(tmp_path, capsys):
    write_set(tmp_path / "meshes", 3)
    _, checkpoint = train(tmp_path, "model.unit=1")
    assert "another unit" not in capsys.readouterr().out
    vertices, faces, label = tiny_mesh(5)
    for name, factor, asked in (("same", 1, ()), ("mm", 1000, ()), ("km", 0.001, ()), ("free", 1000, ("model.unit=null",))):
        (tmp_path / name).mkdir()
        write_obj(tmp_path / name / "a.obj", factor * vertices, faces)
        (tmp_path / name / "a.txt").write_text("\n".join(map(str, label)))
        predict.main([checkpoint, *asked, str(tmp_path / name), "--device", "cpu", "--output", str(tmp_path / "out"), "--picture", "none"])
        assert ("a.obj: as large as a square of" in capsys.readouterr().out) == (name in ("mm", "km")), name
    evaluate.main([checkpoint, "--data-dir", str(tmp_path / "mm"), "--device", "cpu", "--output-dir", str(tmp_path / "scores"), "--examples", "0"])
    assert "a.obj: as large as a square of" in capsys.readouterr().out


def test_coordinates_that_32_bits_round_are_named(tmp_path, capsys):
    """UTM metres: text keeps the surface, floats have steps of half a metre; so has a text of such floats."""
    vertices, faces, label = tiny_mesh(5)
    far = 4 * vertices + (3.5e6, 5.4e6, 300)
    (tmp_path / "far").mkdir()
    notes = {}
    for name, points in (("near", np.float32(vertices)), ("far", far), ("rounded", np.float32(far)), ("point", np.ones((len(vertices), 3)))):
        path = tmp_path / "far" / f"{name}.obj"
        path.write_text("".join(f"v {x!r} {y!r} {z!r}\n" for x, y, z in points.tolist()) + "".join(f"f {a} {b} {c}\n" for a, b, c in faces + 1))
        for _ in range(2):                                  # computed, then from the cache
            for kind, spec in ((MeshDataset, MeshSpec()), (SurfaceDataset, SurfaceSpec(("xyz",), 4))):
                notes[name] = kind([path], None, spec, views=1, cache_dir=tmp_path / "cache").notes
                assert bool(notes[name]) == (name == "rounded"), notes
        path.with_suffix(".txt").write_text("\n".join(map(str, label)))
    assert "rounded.obj: coordinates up to 5,400,00" in notes["rounded"][0] and "in 32 bits go in steps of 0.5, and edges are" in notes["rounded"][0]
    inspect_data.main(["--mesh-dir", str(tmp_path / "far"), "--output-dir", str(tmp_path / "report"), "--device", "cpu", "--num-workers", "1"])
    found = [line for line in capsys.readouterr().out.splitlines() if "in 32 bits" in line]
    assert len(found) == 1 and found[0].startswith("doubt: ") and "rounded.obj" in found[0]


# -- many clusters ---------------------------------------------------------------------------------------------------

def test_more_clusters_than_one_attention_takes(tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "meshes", 3)
    _, checkpoint = train(tmp_path)
    mesh = tmp_path / "meshes" / "mesh_00.obj"
    monkeypatch.setattr(data.mesh, "MOST_CLUSTERS", 4)
    F = len(read_mesh(mesh).faces)
    whole = MeshDataset([mesh], None, MeshSpec(faces_per_cluster=16), views=2)
    assert max(len(whole[i]["mask"]) for i in range(len(whole))) <= 4
    assert sorted(face for i in range(len(whole)) for face in whole[i]["face_index"].ravel().tolist() if face >= 0) == sorted(2 * list(range(F)))
    found = predict.main([checkpoint, str(mesh), "--device", "cpu", "--output", str(tmp_path / "out")])
    assert len(found[str(mesh)]) == F and f"mesh_00.obj: {-(-F // 16)} clusters, and the network compares all with all: taken in parts of 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="clusters, and the network compares all with all; set training.clusters_per_batch"):
        train(tmp_path)
    train(tmp_path, "training.clusters_per_batch=3")
