"""DiffusionNet against numbers of the official code: operators, layers, network, official weights, scores on real meshes.

Files without a licence (operators_humanbody.pt, end_to_end.pt, scores.json) and the official weights are read from a folder `shared`
in or beside the checkout; their tests are skipped where it is absent.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.mesh_io import read_labels, read_mesh
from data.mesh_operators import (
    center_and_radius,
    laplacian,
    mesh_operators,
    plain_signature,
    rotation_from_uniforms,
    signature_times,
    unit_ball_positions,
    vertex_frames,
)
from data.mesh_surfaces import SurfaceDataset, SurfaceSpec
from models.diffusion_net import (
    DiffusionNet,
    DiffusionNetBlock,
    LearnedTimeDiffusion,
    SpatialGradientFeatures,
    mini_mlp,
)
from models.downstream import SurfaceClassifier
from models.pretrained_mesh import load_diffusion_net, read_diffusion_net
from utils.metrics import ConfusionMatrix, segmentation_metrics
from utils.schedule import build_scheduler
from utils.surface_operators import Operators

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "diffusionnet"
SHARED = next((place for place in (ROOT / "shared", ROOT.parent / "shared") if place.is_dir()), ROOT / "shared")
HUMANBODY = next((place for place in (ROOT / "datasets" / "humanbody_1500", SHARED / "data" / "mesh" / "humanbody_1500") if place.is_dir()), None)
WEIGHTS = SHARED / "weights" / "diffusionnet"
needs_shared = pytest.mark.skipif(not WEIGHTS.is_dir() or HUMANBODY is None or not (SHARED / "golden" / "diffusionnet").is_dir(),
                                  reason="the official weights, the HumanBody meshes or the golden files made from them are not here")
CHANNELS = {"hks": 16, "xyz": 3}


def load(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def shared(name):
    return torch.load(SHARED / "golden" / "diffusionnet" / f"{name}.pt", weights_only=True)


def assert_close(actual, expected, tolerance, name="*", largest=False):
    """largest: the extra absolute tolerance of gradients, a share of the tensor's largest value."""
    bound = tolerance.get(name, tolerance.get("*"))
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    allowed = bound["atol"] + bound["rtol"] * expected.abs() + largest * bound["rtol"] * expected.abs().max()
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    worst = ((actual - expected).abs() / allowed).max()
    assert worst <= 1, f"{name}: off by {worst:.3g} tolerances"


def operators_of(stored):
    assert torch.equal(stored["gradX"]["index"], stored["gradY"]["index"])
    return Operators(stored["mass"], stored["evals"], stored["evecs"], stored["gradX"]["index"], stored["gradX"]["value"],
                     stored["gradY"]["value"])


def to_torch(operators):
    return Operators(*(torch.from_numpy(getattr(operators, name)) for name in Operators._fields))


def assert_gradients(loss, module, x, expected, tolerance, x_name="x"):
    found = torch.autograd.grad(loss, [x, *module.parameters()])
    names = [x_name, *(name for name, _ in module.named_parameters())]
    assert set(names) == set(expected)
    for name, gradient in zip(names, found, strict=True):
        assert_close(gradient, expected[name], tolerance, largest=True)


# -- operators -------------------------------------------------------------------------------------------------------

def mesh_of(golden):
    if "verts_raw" in golden["input"]:
        return golden["input"]["verts_raw"].numpy(), golden["input"]["faces"].numpy().astype(np.int64)
    path = HUMANBODY / "test" / golden["input"]["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == golden["input"]["sha256"]
    mesh = read_mesh(path)
    return mesh.vertices, mesh.faces


@pytest.mark.parametrize("case", ["closed", "open", "broken", pytest.param("humanbody", marks=needs_shared)])
def test_operators(case):
    golden = (shared if case == "humanbody" else load)(f"operators_{case}")
    vertices, faces = mesh_of(golden)
    expected, tolerance = golden["output"], golden["tolerance"]
    ours = mesh_operators(vertices, faces, golden["config"]["k"])
    assert ours.note == "" and all(value.dtype in (np.float32, np.int32) for value in ours[:-1])
    if case != "humanbody":                                                      # whose positions are not stored
        assert_close(ours.vertices, expected["verts"], tolerance, "verts")
        assert_close(vertex_frames(ours.vertices.astype(np.float64), faces), expected["frames"], tolerance, "frames")
        assert_close(ours.normals, expected["frames"][:, 2], tolerance, "frames")
    assert_close(ours.mass, expected["mass"], tolerance, "mass")
    stiffness = laplacian(ours.vertices.astype(np.float64), faces)[0].tocoo()
    assert np.array_equal(np.stack([stiffness.row, stiffness.col]), expected["L"]["index"])      # entries of 0 as well
    assert_close(stiffness.data, expected["L"]["value"], tolerance, "L")
    assert_close(ours.eigenvalues, expected["evals"], tolerance, "evals")
    for name, values in (("gradX", ours.gradient_x), ("gradY", ours.gradient_y)):
        assert np.array_equal(ours.gradient_index, expected[name]["index"])
        assert_close(values, expected[name]["value"], tolerance, name)
    assert_close(plain_signature(ours.eigenvalues, ours.eigenvectors), expected["hks"], tolerance, "hks")
    np.testing.assert_allclose(signature_times(), expected["hks_scales"], rtol=1e-5)
    # Eigenvectors: only what is unique, the equation they solve, their scale, and heat that flows for a while.
    value, vector, mass = ours.eigenvalues.astype(np.float64), ours.eigenvectors.astype(np.float64), ours.mass.astype(np.float64)
    residual = stiffness.tocsr() @ vector - mass[:, None] * vector * value
    assert np.abs(residual).max() < 1e-4 * np.abs(stiffness.tocsr() @ vector).max()
    np.testing.assert_allclose(vector.T @ (mass[:, None] * vector), np.eye(len(value)), atol=1e-5)
    signal, time = golden["input"]["heat_signal"].numpy(), golden["input"]["heat_time"].numpy()
    heat = vector @ (np.exp(-value[:, None] * time) * (vector.T @ (mass[:, None] * signal)))
    assert_close(heat, expected["heat"], tolerance, "heat")


def test_positions_are_those_of_one_way_to_normalise_out_of_three():
    golden = load("transforms")
    vertices, faces = golden["input"]["verts"].numpy(), golden["input"]["faces"].numpy()
    ours, note = unit_ball_positions(vertices, faces)
    ways = golden["output"]["normalize_positions"]
    assert note == ""
    assert_close(ours, ways["mean, max_rad"], golden["tolerance"])
    for other in ("bbox, max_rad", "mean, area"):
        assert np.abs(ours - ways[other].numpy()).max() > 0.01


def test_rotations_and_signatures_of_given_numbers():
    golden = load("transforms")
    rotation = np.stack([rotation_from_uniforms(row) for row in golden["input"]["rotation_uniforms"].numpy()])
    assert_close(rotation, golden["output"]["rotation"], golden["tolerance"])
    np.testing.assert_allclose(np.linalg.det(rotation), 1)
    positions = golden["output"]["normalize_positions"]["mean, max_rad"].numpy()
    assert_close(positions @ rotation[0], golden["output"]["verts_rotated"], golden["tolerance"])
    for count in (16, 5):
        ours = plain_signature(golden["input"]["evals"].numpy(), golden["input"]["evecs"].numpy(), count)
        assert_close(ours, golden["output"][f"hks_{count}"], {"*": {"atol": 1e-6, "rtol": 1e-5}})


def test_official_learning_rates_can_be_had():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = build_scheduler(optimizer, "step", 200, milestones=(50, 100, 150), gamma=0.5)       # a step an epoch
    rates = []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for epoch, rate in load("transforms")["output"]["learning_rate_of_epoch"].items():
        assert rates[int(epoch)] == pytest.approx(rate)


# -- layers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
def test_learned_time_diffusion(training):
    """The gradient of a clamped time is not 0; in training the parameter is clamped in place, else it stays."""
    golden = load("learned_time_diffusion")
    expected, operators = golden["output"]["spectral"], operators_of(golden["operators"])
    layer = LearnedTimeDiffusion(6).train(training)
    layer.load_state_dict(golden["state_dict"])
    x = golden["input"]["x"].requires_grad_()
    y = layer(x, *operators[:3])
    assert_close(y, expected["y"], golden["tolerance"])
    after = expected["time_after"] if training else golden["state_dict"]["diffusion_time"]
    assert torch.equal(layer.diffusion_time, after)
    assert_gradients((y * golden["input"]["probe"]).sum(), layer, x, expected["grad"], golden["tolerance"])


def test_to_the_basis_and_back():
    golden = load("learned_time_diffusion")
    operators, x = operators_of(golden["operators"]), golden["input"]["x"]
    spectrum = operators.eigenvectors.T @ (x * operators.mass[:, None])
    assert_close(spectrum, golden["output"]["to_basis"], golden["tolerance"])
    layer = LearnedTimeDiffusion(6)                                              # times of 0: there and back again
    assert_close(layer(x, *operators[:3]), golden["output"]["from_basis_to_basis"], {"*": {"atol": 2e-5, "rtol": 1e-4}})


@pytest.mark.parametrize("case", ["with_rotations", "without_rotations"])
def test_spatial_gradient_features(case):
    golden = load("spatial_gradient_features")
    layer = SpatialGradientFeatures(5, case == "with_rotations")
    layer.load_state_dict(golden["state_dict"][case])
    vectors, expected = golden["input"]["vectors"].requires_grad_(), golden["output"][case]
    y = layer(vectors)
    assert_close(y, expected["y"], golden["tolerance"])
    assert_gradients((y * golden["input"]["probe"]).sum(), layer, vectors, expected["grad"], golden["tolerance"], "vectors")


class Masks(nn.Module):
    """Dropout of given masks, in the order of the calls."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_mini_mlp(mode):
    golden = load("mini_mlp")
    layer = mini_mlp(golden["config"]["sizes"]).train(mode == "train")
    layer.load_state_dict(golden["state_dict"])
    if mode == "train":
        dropouts = [name for name, module in layer.named_children() if isinstance(module, nn.Dropout)]
        assert [layer.get_submodule(name).p for name in dropouts] == [0.5, 0.5] and len(golden["input"]["dropout_masks"]) == 2
        for name, mask in zip(dropouts, golden["input"]["dropout_masks"], strict=True):
            setattr(layer, name, Masks(mask))
    x, expected = golden["input"]["x"].requires_grad_(), golden["output"][mode]
    y = layer(x)
    assert_close(y, expected["y"], golden["tolerance"])
    assert_gradients((y * golden["input"]["probe"]).sum(), layer, x, expected["grad"], golden["tolerance"])


@pytest.mark.parametrize("case", ["full", "without_rotations", "without_gradients"])
def test_block(case):
    golden = load("block")
    block = DiffusionNetBlock(6, golden["config"]["hidden"], gradient_features=case != "without_gradients",
                              gradient_rotations=case == "full").eval()
    block.load_state_dict(golden["state_dict"][case])
    x, expected, operators = golden["input"]["x"].requires_grad_(), golden["output"][case], operators_of(golden["operators"])
    y = block(x, operators, operators.gradient())
    assert_close(y, expected["y"], golden["tolerance"])
    assert_gradients((y * golden["input"]["probe"]).sum(), block, x, expected["grad"], golden["tolerance"])


# -- network ---------------------------------------------------------------------------------------------------------

def small_network(golden):
    network = DiffusionNet(5, 4, 8, 3).eval()
    network.load_state_dict(golden["state_dict"], strict=True)
    return network


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["vertices", "edges", "faces", "global_mean", "faces_log_softmax"])
def test_network(case, checkpointing):
    golden = load("network")
    network, operators, expected = small_network(golden), golden["operators"], golden["output"][case]
    network.gradient_checkpointing = checkpointing
    x, where = golden["input"]["x"].requires_grad_(), case.removesuffix("_log_softmax")
    y = network(x, operators_of(operators), where, operators.get(where))
    if case == "faces_log_softmax":
        y = y.log_softmax(-1)
        loss = nn.functional.nll_loss(y, golden["input"]["label"])
    else:
        loss = (y * golden["input"]["probe"][case]).sum()
    assert_close(y, expected["y"].reshape(y.shape), golden["tolerance"])
    assert_close(loss, expected["loss"], golden["tolerance"])
    assert_gradients(loss, network, x, expected["grad"], golden["tolerance"])


def test_key_schema():
    for name, entry in json.loads((GOLDEN / "key_schema.json").read_text()).items():
        network = DiffusionNet(CHANNELS[name.split("_")[2]], 8)
        own = network.state_dict()
        assert {key: list(value.shape) for key, value in own.items()} == entry["shapes"] and list(own) == list(entry["shapes"])
        assert len(own) == entry["tensors"] == 40
        assert sum(p.numel() for p in network.parameters()) == entry["elements"]
        assert all(value.dtype == torch.float32 for value in own.values())


# -- official weights ------------------------------------------------------------------------------------------------

def official(name):
    network, path = DiffusionNet(CHANNELS[name], 8).eval(), WEIGHTS / f"human_seg_{name}_4x128.pth"
    state, layout, features = read_diffusion_net(path)
    line = load_diffusion_net(network, state, path, layout)
    assert line == f"matched 40/40 encoder tensors from {path} (layout: plain state dict)" and features == {"names": [name]}
    return network


@needs_shared
@pytest.mark.parametrize("file", ["shrec__1.obj", "shrec__14.obj"])
def test_end_to_end(file):
    golden = shared("end_to_end")
    path = HUMANBODY / "test" / file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == golden["input"][file]["sha256"]
    mesh = read_mesh(path)
    operators = mesh_operators(mesh.vertices, mesh.faces)
    signature = plain_signature(operators.eigenvalues, operators.eigenvectors)
    assert_close(signature, golden["output"][file]["hks_input"], golden["tolerance"], "hks")
    for name, features in (("hks", signature), ("xyz", operators.vertices)):
        expected = golden["output"][file][name]
        with torch.no_grad():
            logits = official(name)(torch.from_numpy(features), to_torch(operators), "faces", torch.from_numpy(mesh.faces))
        assert_close(logits.log_softmax(-1), expected["log_probability"], golden["tolerance"], "log_probability")
        sure = expected["margin"] > 0.1
        assert torch.equal(logits.argmax(-1)[sure], expected["pred"].long()[sure])
        label = torch.from_numpy(read_labels(path.with_suffix(".txt"), mesh, 8))
        assert (logits.argmax(-1) == label).double().mean() == pytest.approx(expected["accuracy"], abs=1e-3)


@needs_shared
@pytest.mark.slow
def test_scores_of_the_official_weights(tmp_path):
    """90.48 / 83.36 (signatures), 89.37 / 81.27 (coordinates), 90.78 / 83.86 (both): through data set, batches and classifier."""
    scores = json.loads((SHARED / "golden" / "diffusionnet" / "scores.json").read_text())
    files, matrices, total = [HUMANBODY / "test" / name for name in scores["meshes"]], {}, [0] * 18
    for name in CHANNELS:
        dataset = SurfaceDataset(files, HUMANBODY / "test", SurfaceSpec((name,)), 8, views=1, cache_dir=tmp_path)
        path = WEIGHTS / f"human_seg_{name}_4x128.pth"
        model = SurfaceClassifier(DiffusionNet(CHANNELS[name]), 8, "linear").eval()
        load_diffusion_net(model.encoder, read_diffusion_net(path)[0], path, head=model.head)
        matrices[name] = ConfusionMatrix(8)
        for start in range(0, 18, 4):
            batch = dataset.collate_fn([dataset[item] for item in range(start, min(start + 4, 18))])
            with torch.no_grad():
                probability = model(batch["features"], batch["mask"], batch["centroid"]).softmax(-1)
            matrices[name].update(probability.argmax(-1), batch["label"])
            for b, index in enumerate(batch["index"].tolist()):
                total[index] = total[index] + probability[b][batch["mask"][b]]
        assert np.array_equal(matrices[name].matrix(), scores["scores"][name]["confusion"])
    both = ConfusionMatrix(8)
    for index, probability in enumerate(total):
        both.update(probability.argmax(-1), torch.from_numpy(dataset.labels[index]))
    found = {name: segmentation_metrics(matrix.matrix()) for name, matrix in (*matrices.items(), ("both", both))}
    assert {name: (round(100 * m["overall_accuracy"], 2), round(100 * m["miou"], 2)) for name, m in found.items()} == {
        "hks": (90.48, 83.36), "xyz": (89.37, 81.27), "both": (90.78, 83.86)}
    assert int(both.matrix().sum()) == 27_000


def test_official_center_is_the_mean_of_the_vertices():
    golden = load("operators_broken")
    vertices, faces = mesh_of(golden)
    center, radius, note = center_and_radius(vertices, faces)                    # two large parts: neither is stray
    np.testing.assert_allclose(center, vertices.mean(0, dtype=np.float64))
    assert radius == pytest.approx(np.linalg.norm(vertices - center, axis=1).max()) and note == ""
