"""The prototype network, DeepLab v2 and their losses against the published modules on tiny deterministic weights."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.deeplab import DeepLabV2, MultiScale, freeze_batch_norm
from models.ppnet import PPNet, parameter_groups, ppnet_from_state
from utils.losses import IGNORE_INDEX
from utils.prototype_losses import off_class_l1, prototype_divergence, resize_label
from utils.schedule import build_scheduler

GOLDEN = Path(__file__).parent / "golden" / "prototype"


def load(name):
    golden = build(torch.load(GOLDEN / f"{name}.pt", weights_only=True))
    golden["state_dict"] = {**golden.get("state_dict_recipe", {}), **golden.get("state_dict", {})}
    return golden


def build(content):
    """Recipes of tensors, wherever they are, to tensors."""
    if isinstance(content, list):
        return [build(part) for part in content]
    if not isinstance(content, dict):
        return content
    if "fill" not in content:
        return {name: build(part) for name, part in content.items()}
    if content["fill"] == "constant":
        return torch.full(content["shape"], content["value"], dtype=getattr(torch, content["dtype"]))
    return hash_uniform(content["shape"], content["seed"], content["low"], content["high"])


def hash_uniform(shape, seed, low, high):
    x = (torch.arange(math.prod(shape)) + seed * 0x9E3779B1 % 2**32) % 2**32
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B % 2**32
    u = ((x ^ (x >> 16)) >> 8).double() / 2**24
    return (u * (high - low) + low).float().reshape(shape)


def same(ours, golden, name):
    """Compare ours, a tensor, number or nested list, with golden["output"][name] at its tolerance."""
    compare(ours, golden["output"][name], golden["tolerance"].get(name, golden["tolerance"]["*"]))


def compare(ours, expected, tolerance):
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            compare(a, b, tolerance)
        return
    ours, expected = torch.as_tensor(ours).detach(), torch.as_tensor(expected)
    assert ours.shape == expected.shape
    limits = {"atol": 0, "rtol": 0} if tolerance == "exact" else tolerance
    torch.testing.assert_close(ours, expected.to(ours.dtype), **limits)


def deeplab(golden):
    config = golden["config"]
    return MultiScale(DeepLabV2(config["n_features"], config["n_blocks"]), config["scales"])


@pytest.fixture(scope="module")
def single():
    golden = load("deeplab_single_scale")
    model = deeplab(golden)
    model.load_state_dict(golden["state_dict"])                  # strict
    return golden, model.eval()


def test_deeplab_single_scale(single):
    golden, model = single
    with torch.no_grad():
        same([model(image) for image in golden["input"]["images"]], golden, "features")
    assert sorted(model.state_dict()) == sorted(golden["output"]["state_dict_keys"])


def test_deeplab_multi_scale():
    golden = load("deeplab_multi_scale")
    model = deeplab(golden)
    model.load_state_dict(golden["state_dict"])
    with torch.no_grad():
        model.train()
        freeze_batch_norm(model)
        same([model(image) for image in golden["input"]["images"]], golden, "train")
        same([model.eval()(image) for image in golden["input"]["images"]], golden, "eval")


@pytest.mark.parametrize("name", ["head_small", "head_paper_size", "head_linear", "head_corners"])
def test_head(name):
    golden = load(name)
    model = ppnet_from_state(torch.nn.Identity(), golden["state_dict"], golden["config"]["activation"])
    features = golden["input"]["features"].clone().requires_grad_()
    logits, distances = model.classify(features)
    assert distances.min() >= 0
    same(distances, golden, "distances")
    same(model.similarity(distances).permute(0, 2, 3, 1), golden, "similarities")
    same(logits, golden, "logits")
    same(model.class_identity, golden, "class_identity")


def test_deeplab_gradients(single):
    golden, model = single
    image = golden["input"]["images"][0].clone().requires_grad_()
    model.zero_grad()
    (model(image) * golden["output"]["probe"]).sum().backward()
    same(image.grad, golden, "grad_image")
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    expected = golden["output"]["grad_l2"]
    assert norms.keys() == expected.keys()
    compare(list(norms.values()), [expected[name] for name in norms], golden["tolerance"]["grad_l2"])


def test_deeplab_full_depth():
    golden = load("deeplab_full_depth")
    model = deeplab(golden).eval()
    model.load_state_dict(golden["state_dict"])
    assert len(golden["state_dict"]) == 632
    with torch.no_grad():
        same([model(image) for image in golden["input"]["images"]], golden, "features")


def test_key_schema():
    schema = json.loads((GOLDEN / "key_schema.json").read_text())
    counts = schema["counts"]
    with torch.device("meta"):
        model = PPNet(MultiScale(DeepLabV2()), 19)
        voc = PPNet(MultiScale(DeepLabV2()), 21)
        coco = DeepLabV2()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.pop("class_identity") == [190, 19]
    assert shapes == schema["protoseg_cityscapes"] and len(shapes) == counts["protoseg_cityscapes"] == 635
    assert {name: list(voc.state_dict()[name].shape) for name in schema["protoseg_voc_differs"]} == schema["protoseg_voc_differs"]
    assert {f"features.{name}" for name in schema["deeplab_v2_voc"]} == {name for name in shapes if name.startswith("features.")}
    missing = coco.state_dict().keys() - schema["deeplab_v1_coco"].keys()
    assert (missing, len(missing)) == (set(schema["deeplab_v1_coco_missing"]), 8)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(norms) == counts["batch_norm_modules"] and {layer.eps for layer in norms} == {1e-5}
    aspp = sum(p.numel() for p in coco.aspp.parameters())
    assert aspp == counts["parameters_aspp"]
    assert sum(p.numel() for p in coco.parameters()) - aspp == counts["parameters_backbone_without_aspp"]
    assert sum(p.numel() for p in model.parameters()) == counts["parameters_cityscapes"] - counts["parameters_cityscapes_frozen"]


# -- prototype network ---------------------------------------------------------

def ppnet(golden, scales=None):
    config = golden["config"]
    features = MultiScale(DeepLabV2(config["n_features"], config["n_blocks"]), config["scales"] if scales is None else scales)
    return ppnet_from_state(features, golden["state_dict"])


def test_ppnet_end_to_end():
    golden = load("ppnet_end_to_end")
    images = golden["input"]["images"]
    with torch.no_grad():
        same([ppnet(golden, ()).eval()(image) for image in images], golden, "single")
        model = ppnet(golden).train()
        freeze_batch_norm(model)
        same([model(image) for image in images], golden, "train")
        same([model.eval()(image) for image in images], golden, "eval")
        scores = model.scores(images[0])
    same(scores, golden, "upsampled")
    prediction, clear = scores.argmax(1), golden["output"]["prediction"] != 255
    assert clear.float().mean() > 0.9
    assert torch.equal(prediction[clear], golden["output"]["prediction"][clear].long())
    assert set(golden["output"]["state_dict_keys"]) == model.state_dict().keys() - {"class_identity"}


def test_head_gradients():
    golden = load("head_small")
    model = ppnet_from_state(torch.nn.Identity(), golden["state_dict"])
    features = golden["input"]["features"].clone().requires_grad_()
    (model.classify(features)[0] * golden["input"]["probe"]).sum().backward()
    same(features.grad, golden, "grad_features")
    same(model.prototype_vectors.grad, golden, "grad_prototype_vectors")
    same(model.last_layer.weight.grad, golden, "grad_last_layer")


@pytest.mark.parametrize("name", ["head_small", "head_paper_size"])
def test_initial_head(name):
    golden = load(name)
    config = golden["config"]
    model = PPNet(torch.nn.Identity(), config["num_classes"], config["num_prototypes"] // config["num_classes"], config["dim"])
    assert torch.equal(model.last_layer.weight, golden["output"]["init_last_layer"])
    assert torch.equal(model.class_identity, golden["output"]["class_identity"])
    assert torch.equal(model.ones, golden["state_dict"]["ones"])


def test_similarity_table():
    golden = load("head_corners")
    table = golden["input"]["distance_table"]
    for kind in ("log", "linear"):
        same(PPNet(torch.nn.Identity(), 2, 2, 64, kind).similarity(table), golden, f"similarity_table_{kind}")


def test_pruned_head():
    golden = load("head_pruned")
    model = ppnet_from_state(torch.nn.Identity(), golden["state_dict"])
    keep = [i for i in range(len(model.class_identity)) if i not in golden["config"]["remove"]]
    assert keep == golden["output"]["kept"]
    model.remove(torch.tensor(keep))
    for name in ("class_identity", "prototype_vectors", "ones", "last_layer.weight"):
        same(model.state_dict()[name], golden, name)
    logits, distances = model.classify(golden["input"]["features"])
    same(logits, golden, "logits")
    same(distances, golden, "distances")


# -- losses --------------------------------------------------------------------

def terms(outputs, labels, model, published=False):
    """Cross entropy, KLD and L1, each a mean over the outputs, from pairs of logits and distances."""
    entropies, divergences = [], []
    for logits, distances in outputs:
        label = resize_label(labels, logits.shape[1:3])
        entropies.append(F.cross_entropy(logits.flatten(0, 2), label.flatten(), ignore_index=IGNORE_INDEX))
        total, count = prototype_divergence(distances, label, model.class_identity, published)
        divergences.append(total / count.clamp(min=1))
    l1 = off_class_l1(model.last_layer.weight, model.class_identity)
    return torch.stack(entropies).mean(), torch.stack(divergences).mean(), l1


@pytest.mark.parametrize("name", ["loss_single_scale", "loss_multi_scale", "loss_paper_size"])
def test_losses(name):
    golden = load(name)
    model = ppnet_from_state(torch.nn.Identity(), golden["state_dict"])
    labels = golden["input"]["labels"].long()
    maps = [m.clone().requires_grad_() for m in golden["input"]["maps"]]
    leaves = [model.prototype_vectors, model.last_layer.weight, *maps]
    values = {}
    for kind in ("correct", "legacy"):
        outputs = [model.classify(m.sigmoid()) for m in maps]
        entropy, divergence, l1 = terms(outputs, labels, model, published=kind == "legacy")
        values |= {"cross_entropy": entropy, f"kld_{kind}": divergence, "l1": l1,
                   f"total_{kind}": entropy + 0.25 * divergence + 1e-4 * l1}
    for term, value in values.items():
        same(value, golden, term)
        grads = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
        expected = golden["output"]["grad"][term]
        compare(list(grads), [expected["prototype_vectors"], expected["last_layer.weight"], *expected["maps"]],
                golden["tolerance"]["grad"])
    resized = [resize_label(labels, m.shape[-2:]) for m in maps]
    assert sum(int((label != IGNORE_INDEX).sum()) for label in resized) == golden["output"]["n_valid"]


def test_loss_edge_cases():
    golden = load("loss_edge_cases")
    for case, expected in zip(golden["input"]["cases"], golden["output"]["cases"], strict=True):
        for kind in ("correct", "legacy"):
            distances = case["distances"].clone().requires_grad_()
            total, count = prototype_divergence(distances, case["labels"].long(), expected["class_identity"], kind == "legacy")
            total.backward()
            if expected[f"kld_{kind}"] == "no pairs":
                assert (total, count) == (0, 0) and not distances.grad.any(), case["name"]
            else:
                compare(total / count, expected[f"kld_{kind}"], golden["tolerance"]["*"])
                compare(distances.grad / count, expected[f"grad_{kind}"], golden["tolerance"]["*"])


def test_label_resize():
    golden = load("label_resize")
    for case in golden["output"]["pairs"]:
        H, W, h, w = case["size"]
        index = torch.arange(H * W).view(1, H, W)
        expected = case["rows"].long()[:, None] * W + case["cols"].long()
        assert torch.equal(resize_label(index, (h, w))[0], expected), case["size"]
    example = resize_label(golden["input"]["labels_official"][None], golden["input"]["example_grid"])[0]
    assert torch.equal(example, golden["output"]["example"])


# -- optimisation --------------------------------------------------------------

def test_optimizer_groups():
    golden = load("optimizer_groups")
    config = golden["config"]
    with torch.device("meta"):
        model = PPNet(MultiScale(DeepLabV2(64, config["n_blocks"])), config["num_classes"], config["per_class"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {"backbone": 2.5e-5, "aspp": 2.5e-4, "prototypes": 2.5e-4, "last_layer": 1e-5}
    for phase, expected in enumerate(golden["output"].values()):
        groups = parameter_groups(model, phase, rates)
        table = {names[id(p)]: [group["lr"], group["weight_decay"]] for group in groups for p in group["params"]}
        assert table == expected["table"]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == table.keys()
        assert set(names.values()) - table.keys() == set(expected["in_no_group"]) - {"ones"}       # a buffer of ours


def test_polynomial_schedule():
    golden = load("poly_lr")
    for run in golden["output"]["runs"]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in golden["config"]["base_lr"]]
        optimizer = torch.optim.Adam(groups)
        scheduler = build_scheduler(optimizer, "poly", run["updates"], min_lr=0, power=golden["config"]["power"])
        rates = dict(zip(run["at"], run["lr"], strict=True))
        for update in range(min(run["updates"], 1001)):
            if update in rates:
                torch.testing.assert_close(torch.tensor(scheduler.get_last_lr(), dtype=torch.float64),
                                           torch.tensor(rates[update], dtype=torch.float64), atol=1e-15, rtol=1e-9)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("name, phases", [("train_steps", ("warmup", "joint", "finetune")),
                                          pytest.param("train_steps_multi_scale", ("joint", "joint_without_kld"),
                                                       marks=pytest.mark.slow)])         # twelve seconds
def test_train_steps(name, phases):
    golden = load(name)
    config = golden["config"]
    for run in phases:
        phase = run.removesuffix("_without_kld")
        weights = dict(zip(("cross_entropy", "kld", "l1"), config["loss_weights"], strict=True))
        weights["kld"] *= run == phase
        model = ppnet(golden)
        start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        rates = {{"layers": "backbone"}.get(part, part): lr for part, lr in config["lr"][phase].items()}
        groups = parameter_groups(model, ("warmup", "joint", "finetune").index(phase), rates, config["weight_decay"]["aspp"])
        optimizer = torch.optim.Adam(groups)
        scheduler = build_scheduler(optimizer, "poly" if phase == "joint" else "constant", config["total_updates"], min_lr=0)
        lr, losses = [scheduler.get_last_lr()], []
        for update in range(config["updates"]):
            model.train()
            freeze_batch_norm(model)
            means = torch.zeros(3)
            for batch in golden["input"]["micro_batches"][update * config["iter_size"]:][:config["iter_size"]]:
                outputs = model(batch["image"])
                parts = torch.stack(terms(outputs if isinstance(outputs, list) else [outputs], batch["labels"].long(), model, True))
                loss = (parts * torch.tensor(list(weights.values()))).sum()
                (loss / config["iter_size"]).backward()
                means += torch.stack([loss, *parts[:2]]).detach() / config["iter_size"]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            lr.append(scheduler.get_last_lr())
            losses.append(means)
        check_phase(golden, run, model.state_dict(), start, groups, lr, losses)


def check_phase(golden, run, state, start, groups, lr, losses):
    expected, tolerance = golden["output"][run], golden["tolerance"]
    changed = [key for key in state if not torch.equal(state[key], start[key])]
    assert sorted(changed) == sorted(expected["changed"])
    compare([losses[i][j] for j in range(3) for i in range(2)],
            [expected[term][i] for term in ("loss", "cross_entropy", "kld") for i in range(2)], tolerance["*"])
    columns = {"backbone": 0, "aspp": 1 if len(expected["lr"][0]) == 5 else 0, "prototypes": -1, "last_layer": 0}
    compare([[rates[i] for i in range(len(groups))] for rates in lr],
            [[rates[columns[group["name"]]] for group in groups] for rates in expected["lr"]], tolerance["lr"])
    for key in ("prototype_vectors", "last_layer.weight"):
        compare(state[key], expected[key], tolerance[key])
    for key in changed:
        change = state[key] - start[key]
        compare([change.abs().max(), change.abs().mean()], expected["delta"][key], tolerance["delta"])
        alignment = (change * start[key].sign()).mean() / change.abs().mean()
        compare(alignment, expected["alignment"][key], tolerance["alignment"])
