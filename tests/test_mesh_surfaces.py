"""The data set of whole meshes with operators: items, cache, augmentation, batches; and a classifier that learns from it."""

import numpy as np
import pytest
import torch
import trimesh

import data.mesh_surfaces as mesh_surfaces
from data.mesh import Augmentation, CachedFeatures, MeshDataset, MeshSpec
from data.mesh_io import list_meshes
from data.mesh_operators import gradient, laplacian, mesh_operators, plain_signature, vertex_frames
from data.mesh_surfaces import (
    SurfaceDataset,
    Surfaces,
    SurfaceSpec,
    SurfaceTextureDataset,
    prepare_operators,
    resized,
    turned,
    vertex_features,
)
from models.diffusion_net import DiffusionNet
from models.downstream import SurfaceClassifier
from models.mesh_texture import TexturedSurfaceClassifier
from tests.tiny_meshes import tiny_mesh, write_obj, write_set, write_textured_set
from utils.ema import EMA
from utils.losses import IGNORE_INDEX, MaskedCrossEntropyLoss
from utils.params import layerwise_groups
from utils.surface_operators import Operators


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("meshes"), 6)


def dataset(folder, tmp_path=None, features=("hks", "xyz"), **options):
    spec = SurfaceSpec(features, num_eigenpairs=options.pop("num_eigenpairs", 24), hks_scale=options.pop("hks_scale", 1.0))
    return SurfaceDataset(list_meshes(folder), folder, spec, 3, cache_dir=tmp_path, **options)


def equal(a, b):
    if isinstance(a, Operators):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same(first, second):
    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


# -- spec ------------------------------------------------------------------------------------------------------------

def test_spec_travels_as_plain_types():
    spec = SurfaceSpec(("hks", "xyz", "normal"), 64, 0.1)
    assert spec.feature_dim == 22 and type(spec.to_dict()["features"]) is list


@pytest.mark.parametrize("options, message", [
    ({"features": ("hsk",)}, r"unknown \['hsk'\] for vertices; choose from \['hks', 'xyz', 'normal'\]; did you mean hks?"), ({"features": ()}, "one feature or more"),
    ({"features": ("xyz", "xyz")}, "each named once"), ({"num_eigenpairs": 0}, "expected numbers above 0"), ({"hks_scale": 0.0}, "above 0")])
def test_wrong_specs(options, message):
    with pytest.raises(ValueError, match=message):
        SurfaceSpec(**options)


# -- items -----------------------------------------------------------------------------------------------------------

def test_item_is_the_mesh_in_file_order(folder):
    data = dataset(folder, views=1)
    assert len(data) == 6 and data.items == [(i, 0, 0) for i in range(6)]
    for index in range(6):
        vertices, faces, label = tiny_mesh(index)
        item, operators = data[index], mesh_operators(np.float64(np.vectorize(lambda x: f"{x:.9g}")(vertices)), faces, 24)
        F = len(faces)
        assert item["index"] == index and torch.equal(item["faces"], torch.from_numpy(faces)) and torch.equal(item["face_index"][0], torch.arange(F))
        assert torch.equal(item["label"][0], torch.from_numpy(label)) and item["mask"].all() and item["mask"].shape == (1, F)
        np.testing.assert_allclose(item["features"][:, :16], plain_signature(operators.eigenvalues, operators.eigenvectors), rtol=1e-5)
        assert np.array_equal(item["features"][:, 16:], operators.vertices) and np.array_equal(item["operators"].mass, operators.mass)
        assert item["area"].shape == (1, F) and item["centroid"].shape == (1, F, 3)


def test_columns_and_scale(folder):
    both = dataset(folder, features=("normal", "hks"), hks_scale=0.1, views=1)[0]["features"]
    alone = dataset(folder, features=("hks",), views=1)[0]["features"]
    assert both.shape[1] == 19
    torch.testing.assert_close(both[:, :16], 0.1 * alone)
    torch.testing.assert_close(both[:, 16:].norm(dim=1), torch.ones(len(both)))


def test_labels_of_a_mesh_set_and_of_clusters_are_the_same(folder):
    clusters = MeshDataset(list_meshes(folder), folder, MeshSpec(), 3, views=1)
    assert all(np.array_equal(a, b) for a, b in zip(clusters.labels, dataset(folder, views=1).labels, strict=True))


def test_without_labels(folder):
    data = SurfaceDataset(list_meshes(folder)[:1], None, SurfaceSpec(num_eigenpairs=8), views=1)
    assert (data[0]["label"] == IGNORE_INDEX).all()


def test_unusual_meshes_are_noted(tmp_path):
    folder = write_set(tmp_path / "meshes", 2)
    vertices, faces, label = tiny_mesh(5)
    speck = trimesh.creation.icosahedron()
    write_obj(folder / "mesh_05.obj", np.r_[vertices, speck.vertices * 0.01 + 9], np.r_[faces, speck.faces + len(vertices)])
    (folder / "mesh_05.txt").write_text("\n".join(map(str, [*label, *[0] * 20])) + "\n")
    for _ in range(2):                                                           # also from the cache
        notes = dataset(folder, tmp_path / "cache").notes
        assert len(notes) == 1 and notes[0].startswith(f"{folder / 'mesh_05.obj'}: 12 of {len(vertices) + 12} vertices are stray parts")


# -- cache -----------------------------------------------------------------------------------------------------------

def test_cached_operators_are_those_computed(folder, tmp_path, monkeypatch):
    path = list_meshes(folder)[0]
    fresh = prepare_operators(path, SurfaceSpec(num_eigenpairs=24))
    stored = prepare_operators(path, SurfaceSpec(num_eigenpairs=24), tmp_path)
    monkeypatch.setattr(mesh_surfaces, "mesh_operators", None)                   # not called again
    again = prepare_operators(path, SurfaceSpec(num_eigenpairs=24), tmp_path)
    for other in (stored, again):
        assert all(np.array_equal(a, b) and type(a) is type(b) for a, b in zip(fresh, other, strict=True))


def test_cache_knows_file_number_of_pairs_and_version(folder, tmp_path, monkeypatch):
    path, other = list_meshes(folder)[:2]
    first = prepare_operators(path, SurfaceSpec(num_eigenpairs=24), tmp_path)
    assert prepare_operators(path, SurfaceSpec(num_eigenpairs=12), tmp_path).eigenvectors.shape[1] == 12 and first.eigenvectors.shape[1] == 24
    assert len(list(tmp_path.glob("*.npz"))) == 2
    monkeypatch.setattr(mesh_surfaces, "OPERATORS_VERSION", 99)
    prepare_operators(path, SurfaceSpec(num_eigenpairs=24), tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert not np.array_equal(prepare_operators(other, SurfaceSpec(num_eigenpairs=24), tmp_path).mass, first.mass)


def test_damaged_cache_is_written_again(folder, tmp_path):
    path = list_meshes(folder)[0]
    first = prepare_operators(path, SurfaceSpec(num_eigenpairs=24), tmp_path)
    entry, = tmp_path.glob("*.npz")
    entry.write_bytes(entry.read_bytes()[:300])
    assert np.array_equal(prepare_operators(path, SurfaceSpec(num_eigenpairs=24), tmp_path).mass, first.mass) and entry.stat().st_size > 300


def test_what_memory_does_not_keep_comes_from_the_cache(folder, tmp_path, monkeypatch):
    kept = dataset(folder, tmp_path, views=1)
    monkeypatch.setattr(mesh_surfaces, "BYTES_IN_MEMORY", 1)
    data = dataset(folder, tmp_path, views=1)
    assert not data._operators and all(same(data[i], kept[i]) for i in range(6))


def test_errors_name_the_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("data.mesh_operators.LARGEST", 10)
    with pytest.raises(ValueError, match=r"mesh_00.obj: operators of \d+ vertices take minutes"):
        dataset(folder)


# -- augmentation ----------------------------------------------------------------------------------------------------

def test_training_items_depend_on_seed_epoch_and_item_alone(folder):
    settings = Augmentation(mode="so3", flip_probability=0.5, noise_std=0.1)
    first, second = (dataset(folder, augmentation=settings, seed=1) for _ in range(2))
    assert same(first[3], second[3]) and same(first[3], first[3])
    second.set_epoch(1)
    assert not same(first[3], second[3])
    assert not same(first[3], dataset(folder, augmentation=settings, seed=2)[3])


def test_rotation_turns_the_features_and_keeps_the_operators(folder):
    plain = dataset(folder, features=("hks", "xyz", "normal"))[0]
    for settings in (Augmentation(mode="so3"), Augmentation(mode="z")):
        turned_item = dataset(folder, features=("hks", "xyz", "normal"), augmentation=settings)[0]
        assert equal(plain["operators"], turned_item["operators"]) and torch.equal(plain["features"][:, :16], turned_item["features"][:, :16])
        turn = torch.linalg.lstsq(plain["features"][:, 16:19], turned_item["features"][:, 16:19]).solution
        torch.testing.assert_close(turn @ turn.T, torch.eye(3), atol=1e-4, rtol=0)
        assert torch.linalg.det(turn) > 0.99 and (turn - torch.eye(3)).abs().max() > 0.1
        torch.testing.assert_close(plain["features"][:, 19:] @ turn, turned_item["features"][:, 19:], atol=1e-4, rtol=0)
        if settings.mode == "z":
            torch.testing.assert_close(turned_item["features"][:, 18], plain["features"][:, 18])
        torch.testing.assert_close(turned_item["centroid"][0], turned_item["features"][turned_item["faces"], 16:19].mean(1))


@pytest.mark.parametrize("turn", [np.diag((-1.0, 1, 1)), np.diag((1.0, -1, 1)) @ mesh_surfaces.rotation_from_uniforms(np.array([0.1, 0.8, 0.6]))])
def test_turned_operators_are_those_of_the_turned_mesh(turn):
    """Compared through a network, which does not depend on the choice of tangent axes; a mirrored one needs the sign of y."""
    vertices, faces, _ = tiny_mesh(1)
    original = mesh_operators(vertices, faces, 32)
    exact, cheap = mesh_operators(vertices @ turn, faces[:, ::-1], 32), turned(original, turn)
    np.testing.assert_allclose(cheap.vertices, exact.vertices, atol=1e-5)
    np.testing.assert_allclose(cheap.normals, exact.normals, atol=1e-4)
    torch.manual_seed(0)
    net, spec = DiffusionNet(22, 3, 8, 2).eval(), SurfaceSpec(("hks", "xyz", "normal"))
    for block in net.blocks:
        block.diffusion.diffusion_time.data.fill_(0.05)

    def output(operators):
        tensors = Operators(*(torch.from_numpy(getattr(operators, name)) for name in Operators._fields))
        return net(torch.from_numpy(vertex_features(operators, spec)), tensors)

    difference = (output(cheap) - output(exact)).abs().max()
    wrong = (output(cheap._replace(gradient_y=original.gradient_y)) - output(exact)).abs().max()
    assert difference < 2e-3 and wrong > 10 * difference


@pytest.mark.parametrize("settings", [Augmentation(scale_range=(0.5, 2.0)), Augmentation(deformation=0.2), Augmentation(noise_std=0.3)])
def test_other_shapes_have_other_operators(folder, settings, tmp_path):
    """Made of the augmented vertices, and never written to the cache."""
    dataset(folder, tmp_path)
    entries = set(tmp_path.iterdir())
    plain, changed = dataset(folder, tmp_path)[0], dataset(folder, tmp_path, augmentation=settings)[0]
    assert not torch.equal(plain["operators"].eigenvalues, changed["operators"].eigenvalues)
    assert (plain["operators"].mass / changed["operators"].mass - 1).abs().max() > 0.05
    assert set(tmp_path.iterdir()) == entries
    features = changed["features"]                                               # of the same mesh as the operators
    decay = torch.exp(-changed["operators"].eigenvalues[:, None] * torch.logspace(-2, 0, 16))
    torch.testing.assert_close(features[:, :16], changed["operators"].eigenvectors**2 @ decay, rtol=1e-4, atol=1e-4)


def test_resized_operators_are_those_of_the_larger_mesh():
    vertices, faces, _ = tiny_mesh(1)
    original = mesh_operators(vertices, faces, 32)
    larger = resized(original, 1.5)
    position = 1.5 * original.vertices.astype(np.float64)
    stiffness, mass = laplacian(position, faces)
    vectors = larger.eigenvectors.astype(np.float64)
    np.testing.assert_allclose(larger.mass, mass, rtol=1e-5)
    np.testing.assert_allclose(vectors.T @ (mass[:, None] * vectors), np.eye(32), atol=1e-5)
    np.testing.assert_allclose(vectors.T @ (stiffness @ vectors), np.diag(larger.eigenvalues), atol=1e-3)
    row, column, along_x, along_y = gradient(position, vertex_frames(position, faces), stiffness)
    assert np.array_equal(larger.gradient_index, np.stack([row, column]))
    np.testing.assert_allclose(larger.gradient_x, along_x, atol=2e-3)
    np.testing.assert_allclose(larger.gradient_y, along_y, atol=2e-3)
    assert np.array_equal(larger.vertices, position.astype(np.float32)) and np.array_equal(larger.normals, original.normals)


def test_sizes_are_drawn_from_the_range_and_leave_shape_and_other_draws_alone(folder):
    plain, resizing = (dataset(folder, augmentation=Augmentation(mode="so3", size_range=ends)) for ends in ((1, 1), (0.5, 2)))
    factors = []
    for index in range(6):
        before, after = plain[index], resizing[index]
        ratio = after["features"][:, 16:] / before["features"][:, 16:]            # the same rotation
        factors.append(float(ratio.mean()))
        torch.testing.assert_close(ratio, torch.full_like(ratio, factors[-1]), rtol=1e-3, atol=0)
        torch.testing.assert_close(after["operators"].mass, before["operators"].mass * factors[-1] ** 2)
        decay = torch.exp(-after["operators"].eigenvalues[:, None] * torch.logspace(-2, 0, 16))
        torch.testing.assert_close(after["features"][:, :16], after["operators"].eigenvectors**2 @ decay, rtol=1e-4, atol=1e-4)
    assert 0.5 < min(factors) < 0.9 and 1.1 < max(factors) < 2
    views = dataset(folder, views=2, augmentation=Augmentation(size_range=(0.5, 2.0)))
    assert same(views[1], views[0])                                              # never in evaluation


def test_clusters_of_faces_have_no_size(folder):
    with pytest.raises(ValueError, match="augmentation.size_range is for model.encoder: diffusion_net"):
        MeshDataset(list_meshes(folder), folder, MeshSpec(), 3, augmentation=Augmentation(size_range=(0.5, 2.0)))


@pytest.mark.parametrize("name, value", [("hks_noise", 0.1), ("recluster", True), ("cluster_dropout", 0.1)])
def test_augmentations_of_clusters_are_refused(folder, name, value):
    with pytest.raises(ValueError, match=f"augmentation.{name} is for networks on clusters of faces; leave it out"):
        dataset(folder, augmentation=Augmentation(**{name: value}))


def test_views_of_evaluation(folder):
    data = dataset(folder, views=3, augmentation=Augmentation(mode="so3", scale_range=(0.5, 2.0)))
    plain = dataset(folder, views=1)
    assert len(data) == 18 and same(data[0], plain[0])
    assert equal(data[1]["operators"], plain[0]["operators"]) and not torch.equal(data[1]["features"], data[2]["features"])
    data.set_epoch(5)
    again = dataset(folder, views=3, augmentation=Augmentation(mode="so3"), seed=9)
    assert all(same(data[i], again[i]) for i in range(6))


# -- batches ---------------------------------------------------------------------------------------------------------

def test_batch_of_meshes_of_different_size(folder):
    data = dataset(folder, views=1)
    items = [data[i] for i in range(6)]
    batch = data.collate_fn(items)
    sizes = [len(item["faces"]) for item in items]
    assert len(set(sizes)) > 1 and batch["label"].shape == batch["mask"].shape == (6, 1, max(sizes))
    assert isinstance(batch["features"], Surfaces) and [len(s.faces) for s in batch["features"]] == sizes
    for b, size in enumerate(sizes):
        assert batch["mask"][b, 0, :size].all() and not batch["mask"][b, 0, size:].any()
        assert (batch["label"][b, 0, size:] == IGNORE_INDEX).all() and (batch["face_index"][b, 0, size:] == -1).all()
    assert batch.keys() == {"features", "label", "mask", "face_index", "centroid", "area", "index"}


def test_loader_processes_give_the_same(folder):
    data = dataset(folder, augmentation=Augmentation(mode="so3"))
    here, there = (list(torch.utils.data.DataLoader(data, 2, collate_fn=data.collate_fn, num_workers=workers)) for workers in (0, 1))
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x.features, y.features) and equal(x.operators, y.operators) for x, y in zip(a["features"], b["features"], strict=True))
        assert torch.equal(a["label"], b["label"]) and type(b["features"]) is Surfaces


# -- a classifier on it ----------------------------------------------------------------------------------------------

def classifier(unfrozen="all", head="linear", features=19):
    torch.manual_seed(0)
    return SurfaceClassifier(DiffusionNet(features, width=16, num_blocks=2, dropout=0.1), 3, head, unfrozen_layers=unfrozen)


def train(model, data, epochs, lr=1e-2):
    groups = layerwise_groups(model, lr, 0.01, model.layer_id, model.encoder.num_blocks + 1)
    optimizer, criterion, average = torch.optim.AdamW(groups), MaskedCrossEntropyLoss(), EMA(model, 0.9)
    for epoch in range(epochs):
        data.set_epoch(epoch)
        model.train()
        for start in range(0, len(data), 3):
            batch = data.collate_fn([data[i] for i in range(start, min(start + 3, len(data)))])
            logits = model(batch.get("features"), batch["mask"], batch.get("centroid"), embedding=batch.get("embedding"))
            total, weight = criterion.sum_and_weight(logits, batch["label"], batch["mask"])
            optimizer.zero_grad()
            (total / weight).backward()
            optimizer.step()
            average.update(model)
    average.copy_to(model)
    return model.eval()


def accuracy(model, data):
    batch = data.collate_fn([data[i] for i in range(len(data))])
    with torch.no_grad():
        logits = model(batch.get("features"), batch["mask"], batch.get("centroid"), embedding=batch.get("embedding"))
    return (logits.argmax(-1) == batch["label"])[batch["mask"]].double().mean().item()


@pytest.mark.parametrize("unfrozen, least", [("all", 0.85), (1, 0.75)])
def test_it_learns(folder, tmp_path, unfrozen, least):
    settings = Augmentation(mode="z", noise_std=0.02)
    model = train(classifier(unfrozen), dataset(folder, tmp_path, augmentation=settings, hks_scale=0.1), 12)
    held_out = dataset(write_set(tmp_path / "held_out", 3, first_seed=50), views=1, hks_scale=0.1)
    label = np.concatenate(held_out.labels)
    assert accuracy(model, held_out) > max(least, np.bincount(label).max() / len(label) + 0.2)


def test_training_is_repeatable(folder):
    def weights():
        torch.manual_seed(5)
        return train(classifier(), dataset(folder, augmentation=Augmentation(mode="so3")), 1).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stored", [False, True])
def test_cached_features_of_a_frozen_encoder_change_no_bit(folder, tmp_path, stored):
    data, model = dataset(folder, tmp_path), classifier(0, "mlp")
    data.views = 1

    def embed(batch):
        return model.embed(*(batch[name].to(torch.device("cpu")) for name in ("features", "mask", "centroid")))

    cached = CachedFeatures(data, embed, "weights", tmp_path if stored else None)
    if stored:
        assert CachedFeatures(data, None, "weights", tmp_path).was_stored
    plain_batch = data.collate_fn([data[i] for i in range(6)])
    batch = cached.collate_fn([cached[i] for i in range(6)])
    assert torch.equal(batch["embedding"], model.embed(plain_batch["features"], plain_batch["mask"]))
    assert torch.equal(batch["label"], plain_batch["label"]) and "features" not in batch
    trained = [train(classifier(0), source, 2).state_dict() for source in (data, cached)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_cached_features_know_the_operators(folder, tmp_path):
    """Coordinates do not tell how many eigenpairs there are: another number must give another entry."""
    model = classifier(0, features=3)

    def embed(batch):
        return model.embed(batch["features"], batch["mask"])

    found = [CachedFeatures(dataset(folder, features=("xyz",), num_eigenpairs=k, views=1), embed, "weights", tmp_path) for k in (24, 8)]
    assert not found[1].was_stored


# -- textures --------------------------------------------------------------------------------------------------------

def textured(folder, **options):
    return SurfaceTextureDataset(list_meshes(folder), folder, SurfaceSpec(("hks",), 16), 2, texture_samples=4, **options)


def textured_classifier(unfrozen):
    torch.manual_seed(0)
    encoder = DiffusionNet(16, width=16, num_blocks=2, dropout=0.0)
    return TexturedSurfaceClassifier(encoder, 2, "mlp", unfrozen_layers=unfrozen, texture_embed_dim=8)


@pytest.mark.parametrize("unfrozen", [0, "all"])
def test_texture_tells_what_geometry_cannot(tmp_path, unfrozen):
    data = textured(write_textured_set(tmp_path / "train", 4))
    assert data[0]["texture_sequences"].shape == (1, data.num_faces[0], 4, 3) and data.num_colored == sum(data.num_faces)
    model = textured_classifier(unfrozen)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    groups = layerwise_groups(model, 1e-2, 0.01, model.layer_id, 3)
    optimizer, criterion = torch.optim.AdamW(groups), MaskedCrossEntropyLoss()
    for epoch in range(12):
        data.set_epoch(epoch)
        batch = data.collate_fn([data[i] for i in range(4)])
        colors = {name: batch[name] for name in ("texture_sequences", "texture_masks")}
        total, weight = criterion.sum_and_weight(model(batch["features"], batch["mask"], None, **colors), batch["label"], batch["mask"])
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items()) == (unfrozen == 0)
    held_out = textured(write_textured_set(tmp_path / "test", 2, first_seed=30), views=1)
    batch = held_out.collate_fn([held_out[i] for i in range(2)])
    with torch.no_grad():
        logits = model.eval()(batch["features"], batch["mask"], None, batch.get("embedding"), texture_sequences=batch["texture_sequences"],
                              texture_masks=batch["texture_masks"])
    assert (logits.argmax(-1) == batch["label"])[batch["mask"]].double().mean() > 0.9


def test_faces_without_texture_keep_their_geometry(tmp_path):
    data, model = textured(write_textured_set(tmp_path, 1), views=1), textured_classifier("all").eval()
    batch = data.collate_fn([data[0]])
    masks = batch["texture_masks"].clone()
    masks[:, :, ::2] = False
    plain = model.embed(batch["features"], batch["mask"])
    mixed = model.embed(batch["features"], batch["mask"], None, batch["texture_sequences"], masks)
    assert torch.equal(mixed[:, :, ::2], plain[:, :, ::2]) and not torch.equal(mixed[:, :, 1::2], plain[:, :, 1::2])
