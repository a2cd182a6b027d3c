"""From mesh file to batch: cache, augmentation, crops, views, collating, kept embeddings."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data.mesh
import data.mesh_io
import data.mesh_prepare
from data.mesh import (
    Augmentation,
    CachedFeatures,
    MeshDataset,
    MeshSpec,
    augment,
    custom_collate_fn,
    feature_statistics,
    hold_out,
    prepare_mesh,
    random_rotation,
    repeated,
    rotation_about_z,
    split_meshes,
)
from data.mesh_features import FEATURES, NUM_DESCRIPTORS, face_features, face_neighbors, feature_width
from data.mesh_io import read_mesh, write_ply
from models.downstream import DownstreamClassifier
from models.nomeformer import Nomeformer
from tests.tiny_meshes import tiny_mesh, write_set
from utils.losses import IGNORE_INDEX, MaskedCrossEntropyLoss

SPEC = MeshSpec(faces_per_cluster=16)
EVERYTHING = MeshSpec(features=tuple(FEATURES), faces_per_cluster=16)
ROUGH = Augmentation("so3", scale_range=(0.8, 1.25), noise_std=0.01, flip_probability=0.5, recluster=True,
                     cluster_dropout=0.3, deformation=0.02)


def write_obj(path, vertices, faces, label=None):
    """With all digits of a float64, which a mesh 1e6 from the origin needs."""
    path.write_text("".join("v {!r} {!r} {!r}\n".format(*map(float, v)) for v in vertices)
                    + "".join("f {} {} {}\n".format(*f) for f in np.asarray(faces) + 1))
    if label is not None:
        np.save(path.with_suffix(".npy"), label)
    return path


@pytest.fixture
def folder(tmp_path):
    """mesh_00 .. mesh_03, of 80 and 320 faces, with labels."""
    return write_set(tmp_path / "meshes", 4)


def dataset(folder, spec=SPEC, views=0, augmentation=None, labels=True, **settings):
    files = sorted(folder.glob("*.obj"))
    return MeshDataset(files, folder if labels else None, spec, 3, augmentation or Augmentation(), views, **settings)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


def classifier(spec, unfrozen=0, seed=0):
    torch.manual_seed(seed)
    return DownstreamClassifier(Nomeformer(spec.feature_dim, 16, 2, 2), 3, unfrozen_layers=unfrozen).eval()


def logits_in_file_order(model, meshes, view=0):
    """One (F, C) array a mesh, through the batches an evaluation makes."""
    out = [np.full((count, 3), np.nan) for count in meshes.num_faces]
    for batch in DataLoader(meshes, 3, collate_fn=custom_collate_fn):
        logits = model(batch["features"], batch["mask"], batch["centroid"]).detach()
        for b, index in enumerate(batch["index"].tolist()):
            out[index][batch["face_index"][b][batch["mask"][b]]] = logits[b][batch["mask"][b]]
    assert all(np.isfinite(logits).all() for logits in out)                      # every face got one
    return out


# --- what a spec may say --------------------------------------------------------------------------------------------

def test_spec_survives_a_checkpoint():
    spec = MeshSpec(("area", "normal"), 24, 64, "connected", 8, 10.0)
    saved = spec.to_dict()
    assert MeshSpec(**{**saved, "features": tuple(saved["features"])}) == spec and type(saved["features"]) is list
    assert spec.feature_dim == 4


@pytest.mark.parametrize("settings, message", [
    ({"features": ("area", "colour")}, r"unknown \['colour'\]"), ({"features": ()}, "one feature or more"),
    ({"features": ("area", "area")}, "each named once"), ({"faces_per_cluster": 0}, "faces_per_cluster=0"),
    ({"n_clusters": -1}, "n_clusters=-1: expected a number above 0"), ({"clusters_per_batch": 0}, "clusters_per_batch=0"),
    ({"unit": -1.0}, "unit=-1.0"), ({"clustering": "kmeans"}, "model.clustering: expected one of bisection, connected")])
def test_spec_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        MeshSpec(**settings)


def test_repeated_files_come_so_often():
    files = [Path(f"{name}.obj") for name in ("a_1", "a_2", "b_1")]
    assert repeated(files, [], 4) == files
    assert repeated(files, ["b_*"], 3) == [*files, files[2], files[2]]
    with pytest.raises(ValueError, match="data.repeat: 'c_.' matches none of the 3 training meshes, as 'a_1'"):
        repeated(files, ["c_*"], 2)


@pytest.mark.parametrize("settings, message", [
    ({"scale_range": (0.0, 1.0)}, r"augmentation.scale_range=\[0.0, 1.0\]: expected \[lowest, highest\], both above 0"),
    ({"size_range": (-1.0, 1.0)}, r"augmentation.size_range=\[-1.0, 1.0\]: expected \[lowest, highest\], both above 0"),
    ({"scale_range": (1.2, 0.8)}, "augmentation.scale_range"), ({"rotation_range": (90.0,)}, "augmentation.rotation_range"),
    ({"noise_std": -0.1}, "augmentation.noise_std"), ({"deformation": -0.1}, "augmentation.deformation"),
    ({"hks_noise": float("nan")}, "augmentation.hks_noise"), ({"flip_probability": 1.1}, "augmentation.flip_probability"),
    ({"cluster_dropout": 2.0}, "augmentation.cluster_dropout: expected a number from 0 to 1, got 2.0")])
def test_augmentation_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


# --- cache of prepared meshes ---------------------------------------------------------------------------------------

def same_mesh(one, other):
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_prepared_mesh_comes_from_the_cache(folder, tmp_path):
    path, cache = folder / "mesh_00.obj", tmp_path / "cache"
    first = prepare_mesh(path, EVERYTHING, cache)
    assert same_mesh(first, prepare_mesh(path, EVERYTHING))
    assert same_mesh(prepare_mesh(path, EVERYTHING, cache, read=lambda path: pytest.fail("read again")), first)
    assert [entry.suffix for entry in cache.iterdir()] == [".npz"]               # no temporary file is left
    assert first.hks.shape == (len(first.faces), FEATURES["hks"]) and first.area.sum() == pytest.approx(1)
    assert first.vertices.dtype == first.area.dtype == np.float32 and first.faces.dtype == np.int64


def test_another_mesh_of_the_same_name_is_another_entry(folder, tmp_path):
    path, cache = folder / "mesh_00.obj", tmp_path / "cache"
    prepare_mesh(path, SPEC, cache)
    path.write_bytes((folder / "mesh_01.obj").read_bytes())
    assert same_mesh(prepare_mesh(path, SPEC, cache), prepare_mesh(path, SPEC))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("one, other", [({}, {"unit": 10.0}), ({"unit": 1.0}, {"unit": 10.0}),
                                        ({"features": ("dihedral",)}, {"features": ("area",)}),
                                        ({"features": ("part",)}, {"features": ("part", "plane")}),
                                        ({"features": ("area",)}, {"features": ("area", "height")}),
                                        ({"features": ("area",)}, {"features": ("area", "hks")})])
def test_other_settings_are_another_entry(folder, tmp_path, one, other):
    path, cache = folder / "mesh_00.obj", tmp_path / "cache"
    for spec in (MeshSpec(**one), MeshSpec(**other)):
        assert same_mesh(prepare_mesh(path, spec, cache), prepare_mesh(path, spec))
    assert len(list(cache.iterdir())) == 2


def test_a_full_disk_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    def fail(file, **_):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        prepare_mesh(folder / "mesh_00.obj", SPEC, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_settings_that_prepare_alike_share_an_entry(folder, tmp_path):
    path, cache = folder / "mesh_00.obj", tmp_path / "cache"
    for spec in (SPEC, MeshSpec(faces_per_cluster=99), MeshSpec(("dihedral",)), MeshSpec(("area",), clustering="connected")):
        prepare_mesh(path, spec, cache)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "bit in the data", "other array", "no array", "text",
                                    "kind of compression"])
def test_damaged_cache_file_is_written_anew(folder, tmp_path, damage):
    path, cache = folder / "mesh_00.obj", tmp_path / "cache"
    good = prepare_mesh(path, SPEC, cache)
    entry, = cache.iterdir()
    content = bytearray(entry.read_bytes())
    if damage == "other array":
        np.savez(entry, vertices=good.vertices, faces=good.faces)
    elif damage == "no array":
        np.savez(entry)
    elif damage == "kind of compression":
        content[content.rindex(b"PK\x01\x02") + 10] = 77
        entry.write_bytes(content)
    else:
        content[400] ^= 4
        entry.write_bytes({"empty": b"", "cut": content[:len(content) // 2], "text": b"hello",
                           "bit in the data": content}[damage])
    assert same_mesh(prepare_mesh(path, SPEC, cache), good)
    stored = data.mesh_prepare._read_cache(entry, ("vertices", "faces", "neighbors", "area"))
    assert all(np.array_equal(value, getattr(good, name)) for name, value in stored.items())


def test_mesh_too_large_for_signatures_is_named(folder, monkeypatch):
    monkeypatch.setattr("data.mesh_features.HKS_LARGEST", 10)
    with pytest.raises(ValueError, match=r"mesh_00.obj: heat-kernel signatures of \d+ vertices"):
        prepare_mesh(folder / "mesh_00.obj", EVERYTHING)
    with pytest.raises(ValueError, match=r"mesh_00.obj: heat-kernel .* set loss.delta=0 and masking.whole_share=0"):
        prepare_mesh(folder / "mesh_00.obj", SPEC, descriptors=True)


def test_descriptors_from_the_cache_give_the_same_items(folder, tmp_path):
    """Signatures that are only computed for the descriptors must not take part: their noise would draw random numbers."""
    noisy = Augmentation("so3", hks_noise=0.4, recluster=True)
    first, again = (dataset(folder, augmentation=noisy, descriptors=True, cache_dir=tmp_path / "cache") for _ in "ab")
    assert first.mesh(0).hks is None and first[0]["descriptors"].shape[-1] == NUM_DESCRIPTORS
    assert all(equal(first[i], again[i]) for i in range(4))


def test_meshes_beyond_the_memory_are_read_again_from_the_cache(folder, tmp_path, monkeypatch):
    expected = dataset(folder)
    monkeypatch.setattr(data.mesh, "FACES_IN_MEMORY", 100)
    meshes = dataset(folder, cache_dir=tmp_path / "cache")
    assert len(meshes._prepared) < 4
    assert all(equal(meshes[i], expected[i]) for i in range(4))
    assert len(dataset(folder)._prepared) == 4                                   # without a cache they have to stay


# --- how often a file is parsed -------------------------------------------------------------------------------------

@pytest.fixture
def parsed(monkeypatch):
    """The names of the files that were parsed, once each time; tests empty it."""
    names = []

    def count(suffix):
        parse = data.mesh_io.READERS[suffix]

        def counted(path):
            names.append(path.name)
            return parse(path)

        monkeypatch.setitem(data.mesh_io.READERS, suffix, counted)

    count(".obj")
    count(".ply")
    return names


def write_labelled_ply(obj):
    """The mesh of an OBJ with its labels inside; the label file goes."""
    mesh, path = read_mesh(obj), obj.with_suffix(".ply")
    label = np.loadtxt(obj.with_suffix(".txt"), dtype=int)
    write_ply(path, mesh.vertices, mesh.faces, np.zeros((len(label), 3), np.uint8), label)
    obj.with_suffix(".txt").unlink()
    obj.unlink()
    return path


@pytest.mark.parametrize("suffix", [".obj", ".ply"])
def test_a_file_is_parsed_once_and_never_again(folder, tmp_path, parsed, suffix):
    if suffix == ".ply":
        for obj in sorted(folder.glob("*.obj")):
            write_labelled_ply(obj)
    files = sorted(folder.glob(f"*{suffix}"))

    def build(**settings):
        parsed.clear()
        return MeshDataset(files, folder, SPEC, 3, cache_dir=tmp_path / "cache", **settings)

    cold = build()
    assert parsed == [file.name for file in files]
    warm = build()
    assert parsed == [] and all(equal(cold[i], warm[i]) for i in range(4))
    assert all(np.array_equal(one, other) and one.dtype == other.dtype == np.int64
               for one, other in zip(cold.labels, warm.labels, strict=True))
    changed = build(ignore_labels=[0])                       # the labels need the mesh again, once
    assert parsed == [file.name for file in files] and (changed.labels[0][cold.labels[0] == 0] == IGNORE_INDEX).all()
    build(ignore_labels=[0])
    assert parsed == []


def test_without_a_cache_a_file_is_parsed_once(folder, parsed):
    dataset(folder)
    assert parsed == [f"mesh_0{i}.obj" for i in range(4)]


@pytest.mark.parametrize("kind", ["face", "vertex"])
def test_changed_labels_are_noticed_although_the_mesh_is_cached(folder, tmp_path, parsed, kind):
    cache, file, mesh = tmp_path / "cache", folder / "mesh_01.txt", read_mesh(folder / "mesh_01.obj")
    if kind == "vertex":
        for obj in folder.glob("*.obj"):
            obj.with_suffix(".txt").write_text("0\n" * len(read_mesh(obj).vertices))
    dataset(folder, cache_dir=cache, label_kind=kind)
    file.write_text("2\n" * len(mesh.faces if kind == "face" else mesh.vertices))
    parsed.clear()
    meshes = dataset(folder, cache_dir=cache, label_kind=kind)
    assert parsed == ["mesh_01.obj"] and (meshes.labels[1] == 2).all()
    file.write_text("2\n")
    with pytest.raises(ValueError, match="mesh_01.txt: 1 labels, but"):
        dataset(folder, cache_dir=cache, label_kind=kind)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="mesh_01.obj: no labels"):
        dataset(folder, cache_dir=cache, label_kind=kind)


def test_labels_of_another_mesh_with_the_same_label_file_are_checked(folder, tmp_path):
    """A mesh that changed below its labels: their number no longer fits."""
    dataset(folder, cache_dir=tmp_path / "cache")
    vertices, faces, _ = tiny_mesh(0)
    write_obj(folder / "mesh_00.obj", vertices, faces[1:])
    with pytest.raises(ValueError, match="mesh_00.txt: .* labels, but"):
        dataset(folder, cache_dir=tmp_path / "cache")


def test_a_mesh_that_is_read_already_is_not_parsed_again(folder, parsed):
    path = folder / "mesh_00.obj"
    mesh = read_mesh(path)
    parsed.clear()
    given = MeshDataset([path], folder, SPEC, 3, read=lambda _: mesh)
    assert parsed == [] and equal(given[0], dataset(folder)[0])


# --- splits ---------------------------------------------------------------------------------------------------------

def test_parts_by_name_share_no_mesh():
    files = [Path(f"house_{i}{part}.obj") for i in range(4) for part in "ab"]
    rest, test = hold_out(files, ["house_1*", "house_3b"])
    assert split_meshes(rest, 0.34) == split_meshes(rest, [0.34]) and len(split_meshes(rest, 0.34)[1]) == len(rest) // 3
    train, val = split_meshes(rest, ["house_2*"])
    assert [path.stem for path in test] == ["house_1a", "house_1b", "house_3b"]
    assert [path.stem for path in val] == ["house_2a", "house_2b"]
    assert [path.stem for path in train] == ["house_0a", "house_0b", "house_3a"]
    assert hold_out(files, []) == (files, [])
    with pytest.raises(ValueError, match="data.test_split: 'hause_1' matches none of the 8 meshes, as 'house_0a'"):
        hold_out(files, ["house_1*", "hause_1"])


# --- items ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clustering", ["bisection", "connected"])
def test_item_holds_the_mesh_at_its_face_index(folder, clustering):
    spec = MeshSpec(tuple(FEATURES), 16, clustering=clustering)
    meshes = dataset(folder, spec, views=1)
    for item in range(4):
        sample, mesh = meshes[item], meshes.mesh(item)
        mask, face_index = sample["mask"], sample["face_index"]
        assert sample["index"] == item and torch.equal(mask, face_index >= 0)
        assert sorted(face_index[mask].tolist()) == list(range(meshes.num_faces[item]))
        f = face_index[mask].numpy()
        expected = {"features": face_features(mesh.vertices, mesh.faces, spec.features, mesh.neighbors, mesh.hks,
                                              mesh.plane),
                    "label": meshes.labels[item], "centroid": mesh.vertices[mesh.faces].mean(1), "area": mesh.area}
        for name, values in expected.items():
            np.testing.assert_array_equal(sample[name][mask].numpy(), values[f], err_msg=name)
            padding = IGNORE_INDEX if name == "label" else 0
            assert (sample[name][~mask] == padding).all(), name
        assert sample["label"].dtype == torch.int64 and sample["features"].dtype == torch.float32


def test_labels_are_those_of_the_file_whatever_the_augmentation(folder):
    """The label as a code of the face's number: after mirroring, dropping, clustering it must still be on its face."""
    count = 0
    for path in sorted(folder.glob("*.obj")):
        path.with_suffix(".txt").unlink()
        faces = sum(line.startswith("f") for line in path.read_text().splitlines())
        np.save(path.with_suffix(".npy"), np.arange(faces))
        count += faces
    meshes = MeshDataset(sorted(folder.glob("*.obj")), folder, SPEC, None, ROUGH)
    for epoch in range(3):
        meshes.set_epoch(epoch)
        for sample in (meshes[item] for item in range(len(meshes))):
            assert torch.equal(sample["label"][sample["mask"]], sample["face_index"][sample["mask"]])


def test_labels_in_the_files_convention(folder):
    count = len((folder / "mesh_00.txt").read_text().split())
    (folder / "mesh_00.txt").write_text("\n".join(["1", "3", "255"] + ["2"] * (count - 3)) + "\n")
    meshes = MeshDataset([folder / "mesh_00.obj"], folder, SPEC, 3, label_offset=-1, ignore_labels=[255])
    assert meshes.labels[0][:4].tolist() == [0, 2, IGNORE_INDEX, 1]


def test_without_labels_all_are_ignored(folder):
    sample = dataset(folder, labels=False)[0]
    assert (sample["label"] == IGNORE_INDEX).all()


def test_one_label_too_few_is_an_error(folder):
    label = (folder / "mesh_02.txt").read_text().split()
    (folder / "mesh_02.txt").write_text("\n".join(label[:-1]) + "\n")
    with pytest.raises(ValueError, match=rf"mesh_02.txt: {len(label) - 1} labels, but .*mesh_02.obj has {len(label)} faces"):
        dataset(folder)


def strange_meshes(tmp_path):
    rng = np.random.default_rng(0)
    sphere, faces, _ = tiny_mesh(0)
    return [
        write_obj(tmp_path / "one.obj", np.eye(3), [[0, 1, 2]]),
        write_obj(tmp_path / "few.obj", sphere, faces[:5]),
        write_obj(tmp_path / "odd.obj", sphere, faces[:77]),
        write_obj(tmp_path / "soup.obj", rng.normal(size=(150, 3)), np.arange(150).reshape(50, 3)),
        write_obj(tmp_path / "double.obj", sphere, np.r_[faces[:40], faces[:40], faces[:20, ::-1]]),
        write_obj(tmp_path / "flat.obj", np.arange(9.0).reshape(3, 3), [[0, 1, 2], [0, 0, 1], [2, 2, 2]]),
    ]


@pytest.mark.parametrize("clustering", ["bisection", "connected", "fps"])
@pytest.mark.parametrize("sizes", [{"faces_per_cluster": 16}, {"n_clusters": 6}, {"n_clusters": 64},
                                   {"faces_per_cluster": 16, "clusters_per_batch": 2},
                                   {"n_clusters": 7, "clusters_per_batch": 3}, {"clusters_per_batch": 1}])
def test_every_face_exactly_once_in_every_view(tmp_path, clustering, sizes):
    meshes = MeshDataset(strange_meshes(tmp_path), None, MeshSpec(clustering=clustering, **sizes), views=2,
                         augmentation=Augmentation("so3"))
    limit = sizes.get("clusters_per_batch")
    seen = {}
    for item, (index, view, _) in enumerate(meshes.items):
        sample = meshes[item]
        assert sample["mask"].any(1).all() and sample["mask"].any(), "an empty item or cluster"
        assert not limit or len(sample["mask"]) <= limit
        seen.setdefault((index, view), []).append(sample["face_index"][sample["mask"]])
    assert len(seen) == 2 * len(meshes.files)
    for (index, _), parts in seen.items():
        assert torch.cat(parts).sort().values.tolist() == list(range(meshes.num_faces[index]))


def test_every_part_of_turned_meshes_holds_every_face_once(folder):
    spec, turned = MeshSpec(faces_per_cluster=8, clusters_per_batch=7), Augmentation("so3", recluster=True)
    meshes = dataset(folder, spec, augmentation=turned, every_part=True)
    assert len(meshes) > len(meshes.files)
    for index, count in enumerate(meshes.num_faces):
        parts = [meshes[i] for i, (mesh, _, _) in enumerate(meshes.items) if mesh == index]
        found = torch.cat([part["face_index"][part["mask"]] for part in parts])
        assert sorted(found.tolist()) == list(range(count)) and all(len(part["mask"]) <= 7 for part in parts)
    whole = [dataset(folder, SPEC, augmentation=turned, every_part=flag) for flag in (False, True)]
    assert all(equal(whole[0][i], whole[1][i]) for i in range(4))               # where a mesh is one item: no difference


def test_parts_of_a_view_are_prepared_once(folder, monkeypatch):
    meshes = dataset(folder, MeshSpec(faces_per_cluster=16, clusters_per_batch=3), views=2)
    calls = []
    monkeypatch.setattr(data.mesh, "face_features", lambda *args: calls.append(1) or face_features(*args))
    forwards = [meshes[item] for item in range(len(meshes))]
    assert len(calls) == 8 < len(meshes)                 # four meshes, two views
    assert all(equal(forwards[item], meshes[item]) for item in reversed(range(len(meshes))))


@pytest.mark.parametrize("spec", [EVERYTHING, MeshSpec(tuple(FEATURES), n_clusters=5, clustering="connected", unit=10.0)])
def test_strange_meshes_give_finite_logits(tmp_path, spec):
    meshes = MeshDataset(strange_meshes(tmp_path), None, spec, augmentation=ROUGH)
    for _ in range(2):
        batch = custom_collate_fn([meshes[item] for item in range(len(meshes))])
        assert batch["features"].isfinite().all()
        logits = classifier(spec, "all")(batch["features"], batch["mask"], batch["centroid"])
        assert logits.isfinite().all()
        meshes.set_epoch(1)


def test_n_clusters_is_the_number_of_clusters(folder):
    for count in (7, 33, 64):
        meshes = dataset(folder, MeshSpec(n_clusters=count), views=1)
        assert all(len(meshes[item]["mask"]) == count for item in range(4))


# --- randomness -----------------------------------------------------------------------------------------------------

def test_training_items_depend_on_seed_epoch_and_item_alone(folder):
    meshes, again = dataset(folder, augmentation=ROUGH, seed=5), dataset(folder, augmentation=ROUGH, seed=5)
    forwards = [meshes[item] for item in range(4)]
    backwards = [again[item] for item in reversed(range(4))][::-1]
    assert all(map(equal, forwards, backwards))
    for change in (lambda m: m.set_epoch(1), lambda m: setattr(m, "seed", 6)):
        change(again)
        assert not any(equal(forwards[item], again[item]) for item in range(4))
        again.epoch, again.seed = 0, 5
    alone = MeshDataset(meshes.files[:1] * 2, folder, SPEC, 3, ROUGH, seed=5)
    assert equal(alone[0], forwards[0]) and not equal({**alone[1], "index": 0}, forwards[0])


def test_workers_change_nothing(folder):
    meshes = dataset(folder, MeshSpec(faces_per_cluster=16, clusters_per_batch=4), augmentation=ROUGH)
    meshes.set_epoch(3)
    batches = [list(DataLoader(meshes, 2, collate_fn=custom_collate_fn, num_workers=n)) for n in (0, 2)]
    assert len(batches[0]) > 2 and all(map(equal, *batches))


def test_evaluation_ignores_epoch_and_seed_and_augmentation(folder):
    meshes, other = dataset(folder, views=3, augmentation=ROUGH), dataset(folder, views=3, augmentation=ROUGH, seed=9)
    other.set_epoch(4)
    assert all(equal(meshes[item], other[item]) for item in range(len(meshes)))
    plain = dataset(folder, views=1)
    assert all(equal(meshes[3 * item], plain[item]) for item in range(4))        # view 0: the mesh as it is


@pytest.mark.parametrize("mode", ["none", "z", "so3"])
def test_views_are_turned_and_clustered_anew(folder, mode):
    meshes = dataset(folder, MeshSpec(("centroid", "area")), views=3, augmentation=Augmentation(mode, (-20.0, 20.0)))
    first, second, third = (meshes[item] for item in range(3))
    assert not torch.equal(first["face_index"], second["face_index"])
    assert not torch.equal(second["face_index"], third["face_index"])
    by_face = [sample["features"][sample["mask"]][sample["face_index"][sample["mask"]].argsort()]
               for sample in (first, second, third)]
    torch.testing.assert_close(by_face[1][:, 3], by_face[0][:, 3], atol=1e-4, rtol=0)
    position, turned = by_face[0][:, :3], by_face[1][:, :3]
    if mode == "none":
        torch.testing.assert_close(turned, position)
    else:
        torch.testing.assert_close(turned.norm(dim=1), position.norm(dim=1), atol=1e-5, rtol=0)
        assert not torch.allclose(turned, position, atol=1e-2)
        assert torch.allclose(turned[:, 2], position[:, 2], atol=1e-5) == (mode == "z")
    if mode == "z":                                      # within the range that training turns by
        angle = torch.atan2(*turned[:, :2].T.flip(0)) - torch.atan2(*position[:, :2].T.flip(0))
        assert torch.rad2deg(torch.atan2(angle.sin(), angle.cos())).abs().max() < 20.1


# --- augmentation ---------------------------------------------------------------------------------------------------

def prepared(folder, spec=EVERYTHING, index=0):
    return prepare_mesh(sorted(folder.glob("*.obj"))[index], spec)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_no_augmentation_is_no_change(folder):
    mesh = prepared(folder)
    same = augment(mesh, Augmentation(), None, rng())
    np.testing.assert_allclose(same.vertices, mesh.vertices, atol=1e-6)
    assert same_mesh(same._replace(vertices=mesh.vertices), mesh) and not Augmentation().active and ROUGH.active


def test_augmenting_leaves_the_original_alone(folder):
    mesh = prepared(folder)
    before = [np.copy(values) for values in mesh]
    augment(mesh, Augmentation("so3", noise_std=0.1, flip_probability=1, hks_noise=1.0, deformation=0.1), None, rng())
    assert all(map(np.array_equal, mesh, before))


def test_mirrored_mesh_is_that_of_a_recomputation(folder):
    mesh = prepared(folder)
    mirrored = augment(mesh, Augmentation(flip_probability=1.0), None, rng())
    np.testing.assert_array_equal(mirrored.faces, mesh.faces[:, ::-1])
    np.testing.assert_array_equal(mirrored.neighbors, face_neighbors(mirrored.faces))
    np.testing.assert_allclose(mirrored.vertices, mesh.vertices * (-1, 1, 1), atol=1e-6)
    for name in ("area", "angles", "curvature", "dihedral", "plane", "part", "height", "hks"):
        one, other = (face_features(m.vertices, m.faces, [name], m.neighbors, m.hks, m.plane) for m in (mesh, mirrored))
        np.testing.assert_allclose(other, one, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_share_of_mirrored_meshes(folder, probability):
    mesh, generator = prepared(folder), rng()
    flipped = [augment(mesh, Augmentation(flip_probability=probability), None, generator).faces[0, 0] != mesh.faces[0, 0]
               for _ in range(200)]
    assert np.mean(flipped) == pytest.approx(probability, abs=0.1)


def test_scale_per_axis(folder):
    mesh = prepared(folder)
    factor = [np.ptp(augment(mesh, Augmentation(scale_range=(0.5, 2.0)), 1.0, rng(seed)).vertices, axis=0)
              / np.ptp(mesh.vertices, axis=0) for seed in range(50)]
    factor = np.array(factor)
    assert factor.min() >= 0.5 and factor.max() <= 2 and factor.std(0).min() > 0.2
    assert np.abs(factor[:, 0] - factor[:, 1]).mean() > 0.2
    normalized = augment(mesh, Augmentation(scale_range=(3.0, 3.0)), None, rng())
    np.testing.assert_allclose(normalized.vertices, mesh.vertices, atol=1e-6)    # one size for all, again


def test_jitter_is_measured_in_edges(folder):
    mesh = prepared(folder)
    moved = augment(mesh, Augmentation(noise_std=0.02), 1.0, rng()).vertices - mesh.vertices
    edge = np.linalg.norm(mesh.vertices[mesh.faces[:, 0]] - mesh.vertices[mesh.faces[:, 1]], axis=1).mean()
    assert moved.std() == pytest.approx(0.02 * edge, rel=0.2)


def test_deformation_is_smooth(folder):
    mesh = prepared(folder)
    for seed in range(5):                                # neighbours move alike, and the surface does not fold over
        moved = augment(mesh, Augmentation(deformation=0.02), 1.0, rng(seed)).vertices - mesh.vertices
        assert 0.005 < np.abs(moved).max() < 0.2
        edge, difference = (x[mesh.faces[:, 0]] - x[mesh.faces[:, 1]] for x in (mesh.vertices, moved))
        assert (np.linalg.norm(difference, axis=1) < 0.5 * np.linalg.norm(edge, axis=1)).all()


def test_noise_of_the_signature_is_the_same_for_all_faces(folder):
    mesh = prepared(folder)
    noise = np.array([augment(mesh, Augmentation(hks_noise=0.5), None, rng(s)).hks - mesh.hks for s in range(100)])
    assert np.ptp(noise, axis=1).max() < 1e-5
    assert noise[:, 0].std() == pytest.approx(0.5 * np.sqrt(1.25), rel=0.2)
    assert noise[:, 0].mean(1).std() == pytest.approx(0.5, rel=0.2)


def test_rotations():
    turns = np.array([random_rotation(rng(seed)) for seed in range(2000)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (2000, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert np.abs(turns.mean(0)).max() < 0.05 and np.allclose((turns**2).mean(0), 1 / 3, atol=0.03)     # uniform
    np.testing.assert_allclose(rotation_about_z(90) @ (1, 0, 5), (0, 1, 5), atol=1e-12)


@pytest.mark.parametrize("mode", ["z", "so3"])
def test_rotating_augmentation(folder, mode):
    mesh = prepared(folder)
    turned = augment(mesh, Augmentation(mode, (30.0, 30.0)), 1.0, rng()).vertices
    if mode == "z":
        np.testing.assert_allclose(turned, mesh.vertices @ rotation_about_z(30).T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(mesh.vertices, axis=1), atol=1e-5)
    assert np.abs(turned - mesh.vertices).max() > 0.1


def test_with_a_unit_augmentation_keeps_the_size(folder):
    mesh = prepared(folder, MeshSpec(unit=10.0))
    larger = augment(mesh, Augmentation("z", scale_range=(1.2, 1.2)), 10.0, rng())
    assert np.ptp(larger.vertices[:, 2]) == pytest.approx(1.2 * np.ptp(mesh.vertices[:, 2]), rel=1e-5)


def test_dropped_clusters(folder):
    meshes = dataset(folder, MeshSpec(faces_per_cluster=2), augmentation=Augmentation(cluster_dropout=0.4))
    whole = dataset(folder, MeshSpec(faces_per_cluster=2))
    share = []
    for epoch in range(50):
        meshes.set_epoch(epoch)
        share.append(1 - len(meshes[0]["mask"]) / len(whole[0]["mask"]))
    assert 0.12 < np.mean(share) < 0.28 and max(share) < 0.6                     # uniform between 0 and 0.4
    one = dataset(folder, MeshSpec(n_clusters=1), augmentation=Augmentation(cluster_dropout=1.0))
    for epoch in range(20):
        one.set_epoch(epoch)
        assert one[0]["mask"].any()


# --- crops ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clustering", ["bisection", "connected"])
def test_training_crops_are_neighbouring_clusters(folder, clustering):
    spec = MeshSpec(faces_per_cluster=8, clusters_per_batch=6, clustering=clustering)
    meshes = dataset(folder, spec)
    assert len(meshes) == sum(max(1, -(-count // 8) // 6) for count in meshes.num_faces)
    whole = dataset(folder, MeshSpec(faces_per_cluster=8, clustering=clustering))
    seen = set()
    for item, (index, _, _) in enumerate(meshes.items):
        sample, all_clusters = meshes[item], whole[index]
        assert len(sample["mask"]) == 6
        center = [c[m].mean(0) for c, m in zip(sample["centroid"], sample["mask"], strict=True)]
        others = [c[m].mean(0) for c, m in zip(all_clusters["centroid"], all_clusters["mask"], strict=True)]
        center, others = torch.stack(center), torch.stack(others)
        distance = torch.cdist(center, others)           # of some cluster of the crop, the crop is the nearest ones
        assert any(torch.allclose(row.sort().values[:6].max(), torch.cdist(center, center)[i].max(), atol=1e-6)
                   for i, row in enumerate(distance))
        seen.add(tuple(sample["face_index"].flatten().tolist()))
    assert len(seen) > len(meshes) / 2                   # not the same crop again and again


def test_crop_of_a_small_mesh_is_the_mesh(folder):
    meshes = dataset(folder, MeshSpec(faces_per_cluster=16, clusters_per_batch=100))
    assert all(equal(meshes[item], dataset(folder)[item]) for item in range(4))


# --- batches --------------------------------------------------------------------------------------------------------

def test_collating_pads_to_the_longest(folder):
    meshes = dataset(folder)
    samples = [meshes[item] for item in range(4)]
    batch = custom_collate_fn(samples)
    N, slots = (max(s["mask"].shape[axis] for s in samples) for axis in (0, 1))
    assert batch["features"].shape == (4, N, slots, SPEC.feature_dim) and batch["mask"].dtype == torch.bool
    assert batch["index"].tolist() == [0, 1, 2, 3]
    padding = {"features": 0, "label": IGNORE_INDEX, "mask": False, "face_index": -1, "centroid": 0, "area": 0}
    assert batch.keys() == padding.keys() | {"index"}
    for b, sample in enumerate(samples):
        n, s = sample["mask"].shape
        for name, value in padding.items():
            assert torch.equal(batch[name][b, :n, :s], sample[name])
            assert (batch[name][b, n:] == value).all() and (batch[name][b, :, s:] == value).all()


def test_padding_changes_neither_loss_nor_logits(folder):
    meshes, criterion = dataset(folder), MaskedCrossEntropyLoss()
    model = classifier(SPEC, "all")
    sample = meshes[0]
    larger = custom_collate_fn([sample, {name: value if name == "index" else value.repeat(
        3, 2, *[1] * (value.ndim - 2)) for name, value in meshes[1].items()}])
    losses = []
    for batch in (custom_collate_fn([sample]), {name: value[:1] for name, value in larger.items()}):
        logits = model(batch["features"], batch["mask"], batch["centroid"])
        losses.append(criterion(logits, batch["label"], batch["mask"]).item())
        n, s = sample["mask"].shape
        losses.append(logits[0, :n, :s][sample["mask"]].detach())
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)
    torch.testing.assert_close(losses[1], losses[3], atol=1e-5, rtol=0)


# --- predictions of a file ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift, scale", [(1e5, 1), (1e6, 1), (0, 1000), (0, 1e-3)])
def test_prediction_does_not_change_when_the_file_is_moved_or_scaled(tmp_path, shift, scale):
    vertices, faces, _ = tiny_mesh(0)
    spec = MeshSpec(tuple(FEATURES), 16)
    files = [write_obj(tmp_path / "a.obj", vertices, faces),
             write_obj(tmp_path / "b.obj", vertices * scale + (shift, -shift, shift), faces)]
    one, other = logits_in_file_order(classifier(spec), MeshDataset(files, None, spec, views=1))
    np.testing.assert_allclose(other, one, atol=1e-3 * np.abs(one).max())


@pytest.mark.parametrize("clustering", ["bisection", "connected"])
def test_prediction_goes_with_the_face_lines_of_the_file(tmp_path, clustering):
    vertices, faces, _ = tiny_mesh(1)
    spec = MeshSpec(tuple(FEATURES), 16 if clustering == "bisection" else 1000, clustering=clustering)
    order = rng().permutation(len(faces))
    files = [write_obj(tmp_path / "a.obj", vertices, faces), write_obj(tmp_path / "b.obj", vertices, faces[order])]
    one, other = logits_in_file_order(classifier(spec), MeshDataset(files, None, spec, views=1))
    np.testing.assert_allclose(other, one[order], atol=1e-4)
    assert np.abs(one - one.mean(0)).max() > 1e-2        # faces differ at all


# --- statistics -----------------------------------------------------------------------------------------------------

def test_feature_statistics(folder):
    spec = MeshSpec(("area", "angles", "centroid"), 17)                          # with padding
    meshes = dataset(folder, spec)
    mean, std = feature_statistics(meshes)
    values = torch.cat([meshes[item]["features"][meshes[item]["mask"]] for item in range(4)]).double()
    torch.testing.assert_close(mean, values.mean(0).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, values.std(0, unbiased=False).float(), atol=1e-6, rtol=0)


def test_a_constant_feature_has_deviation_one(tmp_path):
    write_obj(tmp_path / "flat.obj", np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]]), [[0, 1, 2], [0, 2, 3]])
    mean, std = feature_statistics(MeshDataset([tmp_path / "flat.obj"], None, MeshSpec(("normal",))))
    assert mean.tolist() == [0, 0, 1] and std.tolist() == [1, 1, 1]


def test_statistics_of_many_meshes_read_some(folder, monkeypatch):
    meshes = dataset(folder)
    meshes.items = meshes.items * 40                     # 160 items
    read = []
    original = MeshDataset.__getitem__
    monkeypatch.setattr(MeshDataset, "__getitem__", lambda self, item: read.append(item) or original(self, item))
    monkeypatch.setattr(data.mesh, "STATISTICS_ITEMS", 90)
    feature_statistics(meshes)
    assert 45 <= len(read) <= 90 and read[-1] >= 150     # evenly spaced, to the end


# --- kept embeddings ------------------------------------------------------------------------------------------------

def embed_with(model):
    return lambda batch: model.embed(batch["features"], batch["mask"], batch["centroid"])


def key_of(model):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.encoder.state_dict().values())).hexdigest()


def cached(meshes, model, folder):
    return CachedFeatures(meshes, embed_with(model), key_of(model), folder)


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("views", [0, 2])
def test_kept_embeddings_are_the_same_to_the_last_bit(folder, tmp_path, in_file, views):
    meshes, model = dataset(folder, EVERYTHING, views, Augmentation("so3") if views else None), classifier(EVERYTHING)
    kept = cached(meshes, model, tmp_path / "cache" if in_file else None)
    again = cached(meshes, model, tmp_path / "cache" if in_file else None)
    assert not kept.was_stored and again.was_stored == in_file and len(kept) == len(meshes)
    for dataset_ in (kept, again):
        for item in range(len(meshes)):
            sample, expected = dataset_[item], meshes[item]
            assert sample.keys() == {"embedding", "label", "mask", "face_index", "index"}
            assert torch.equal(sample["embedding"], embed_with(model)(custom_collate_fn([expected]))[0])
            assert all(equal({name: sample[name]}, {name: expected[name]}) for name in sample.keys() - {"embedding"})
    batch, plain = (custom_collate_fn([d[item] for item in range(4)]) for d in (kept, meshes))
    logits = model(None, batch["mask"], None, embedding=batch["embedding"])
    assert torch.equal(logits, model(plain["features"], plain["mask"], plain["centroid"]))      # padded, all together


def test_crops_of_an_evaluation_are_kept_too(folder, tmp_path):
    spec = MeshSpec(faces_per_cluster=16, clusters_per_batch=3)
    meshes, model = dataset(folder, spec, views=1), classifier(spec)
    kept = cached(meshes, model, tmp_path)
    batch, plain = (custom_collate_fn([d[item] for item in range(len(d))]) for d in (kept, meshes))
    assert torch.equal(batch["embedding"], embed_with(model)(plain))


def test_kept_embeddings_depend_on_everything(folder, tmp_path):
    def stored(spec=SPEC, model=None):
        spec_model = model or classifier(spec)
        return cached(dataset(folder, spec, views=1), spec_model, tmp_path / "cache").was_stored

    assert not stored() and stored()
    model = classifier(SPEC)
    with torch.no_grad():
        model.encoder.blocks[1].local_layer.mlp[0].bias[3] += 1e-3
    assert not stored(model=model)
    model.encoder.feature_mean[0] += 1
    assert not stored(model=model)
    assert not stored(MeshSpec(("normal",), 16)) and not stored(MeshSpec(("angles",), 16))      # of the same width
    assert not stored(MeshSpec(faces_per_cluster=17))
    assert not stored(MeshSpec(faces_per_cluster=16, unit=1.0))
    path = folder / "mesh_01.obj"
    path.write_text(path.read_text().replace("v ", "v 1.5 ", 1))                 # a vertex elsewhere, the same name
    assert not stored() and stored()


def test_the_same_faces_in_clusters_of_another_size_are_not_the_same(tmp_path):
    """Faces in a row, 2 x 3 or 3 x 2: all bytes agree, the clusters do not."""
    vertices = np.array([[x, y, 0.1 * x * y] for x in range(4) for y in (0.0, 1.0)])
    corner = np.arange(0, 6, 2)
    faces = np.stack([np.stack([corner, corner + 2, corner + 1], 1), np.stack([corner + 1, corner + 2, corner + 3], 1)], 1)
    path = write_obj(tmp_path / "strip.obj", vertices, faces.reshape(-1, 3))
    items = []
    for size in (2, 3):
        spec = MeshSpec(faces_per_cluster=size)
        meshes = MeshDataset([path], None, spec, views=1)
        items.append(meshes[0]["face_index"].flatten().tolist())
        assert not cached(meshes, classifier(spec), tmp_path / "cache").was_stored
    assert items[0] == items[1] == list(range(6))


@pytest.mark.parametrize("damage", ["cut", "empty", "another length"])
def test_damaged_embeddings_are_computed_again(folder, tmp_path, damage):
    meshes, model = dataset(folder, views=1), classifier(SPEC)
    kept = cached(meshes, model, tmp_path / "cache")
    path, = (tmp_path / "cache").iterdir()
    expected = [kept[item]["embedding"] for item in range(4)]
    if damage == "another length":
        np.save(path, np.zeros((3, 16), np.float32))
    else:
        path.write_bytes(path.read_bytes()[:200 if damage == "cut" else 0])
    again = cached(meshes, model, tmp_path / "cache")
    assert not again.was_stored and cached(meshes, model, tmp_path / "cache").was_stored
    assert all(torch.equal(again[item]["embedding"], expected[item]) for item in range(4))


def test_embeddings_cut_short_by_an_error_leave_no_file(folder, tmp_path):
    meshes, calls = dataset(folder, views=1), []

    def embed(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return torch.zeros(*batch["mask"].shape, 4)

    with pytest.raises(RuntimeError, match="out of memory"):
        CachedFeatures(meshes, embed, "key", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_inputs_that_change_cannot_be_kept(folder):
    model = classifier(SPEC)
    for meshes in (dataset(folder, augmentation=Augmentation(recluster=True)),
                   dataset(folder, MeshSpec(faces_per_cluster=16, clusters_per_batch=2))):
        with pytest.raises(ValueError, match="training.cache_features needs inputs that never change"):
            cached(meshes, model, None)
    cached(dataset(folder, views=1, augmentation=ROUGH), model, None)            # an evaluation never changes


def test_kept_embeddings_stand_in_for_the_data_set(folder, tmp_path):
    meshes = dataset(folder, views=1)
    kept = cached(meshes, classifier(SPEC), tmp_path)
    assert kept.files == meshes.files and kept.items == meshes.items and kept.num_faces == meshes.num_faces
    assert np.array_equal(kept.mesh(1).area, meshes.mesh(1).area)
    kept.set_epoch(3)
    assert meshes.epoch == 3
    with pytest.raises(AttributeError):
        kept.nothing_of_the_kind  # noqa: B018
    copy = pickle.loads(pickle.dumps(kept))              # as a worker process gets it
    assert torch.equal(copy[2]["embedding"], kept[2]["embedding"])


def test_width_of_all_features():
    assert EVERYTHING.feature_dim == feature_width(FEATURES) == 3 + 9 + 3 + 1 + 3 + 3 + 4 + 3 + 5 + 6 + 6 + 16
