"""Finding the mesh encoder in files of every layout; refusing files that have none."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.diffusion_net import DiffusionNet
from models.downstream import DownstreamClassifier
from models.nomeformer import Nomeformer
from models.pretrained_mesh import check_features, read_diffusion_net, read_encoder
from utils.checkpoint import save_checkpoint
from utils.weights import load_weights


def encoder(seed=0):
    torch.manual_seed(seed)
    return Nomeformer(feature_dim=7, embed_dim=8, num_heads=2, num_attention_blocks=2)


def saved(tmp_path, content, name="weights.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def assert_equal(state, module):
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


STUDENT, TEACHER = encoder(1), encoder(2)


def test_jepa_layout_gives_the_teacher(tmp_path):
    path = saved(tmp_path, {"encoder": STUDENT.state_dict(), "target_encoder": TEACHER.state_dict(), "predictor": {},
                            "opt": {}, "epoch": 3, "loss": 0.1, "feature_spec": {"names": ["corners"], "widths": [9]}})
    state, layout, spec = read_encoder(path)
    assert_equal(state, TEACHER)
    assert layout == "target_encoder" and spec == {"names": ["corners"], "widths": [9]}


LAYOUTS = {
    "encoder only": ({"encoder": STUDENT.state_dict()}, "encoder"),
    "target only": ({"target_encoder": STUDENT.state_dict(), "epoch": 1}, "target_encoder"),
    "plain": (STUDENT.state_dict(), "plain state dict"),
    "wrapped": ({f"module.{k}": v for k, v in STUDENT.state_dict().items()}, "plain state dict"),
    "wrapped twice": ({"encoder": {f"module._orig_mod.{k}": v for k, v in STUDENT.state_dict().items()}}, "encoder"),
    "state_dict": ({"state_dict": STUDENT.state_dict(), "epoch": 2}, "state_dict"),
    "downstream": ({"model_state_dict": {f"module.{k}": v for k, v in DownstreamClassifier(
        STUDENT, 3, unfrozen_layers="all").state_dict().items()}}, "model_state_dict: encoder.*"),
    "flat prefix": ({f"encoder.{k}": v for k, v in STUDENT.state_dict().items()}, "encoder.*"),
}


@pytest.mark.parametrize("content, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts(tmp_path, content, layout):
    state, found, spec = read_encoder(saved(tmp_path, content))
    assert_equal(state, STUDENT)
    assert found == layout and spec is None


def test_numpy_numbers_beside_the_weights_are_no_hindrance(tmp_path):
    """As a loop writes them that takes means with numpy."""
    for number in (np.float64(0.1), np.float32(2), np.int64(3), np.bool_(True)):
        path = saved(tmp_path, {"encoder": STUDENT.state_dict(), "epoch": 3, "loss": number, "history": [{"loss": number}]})
        assert_equal(read_encoder(path)[0], STUDENT)
    net = DiffusionNet(3, width=4, num_blocks=1)
    state, _, _ = read_diffusion_net(saved(tmp_path, {"state_dict": net.state_dict(), "accuracy": np.float64(0.9)}))
    assert state.keys() == net.state_dict().keys()
    with pytest.raises(ValueError, match="holds Python objects"):
        read_encoder(saved(tmp_path, {"encoder": STUDENT.state_dict(), "args": Namespace(lr=1)}))


def test_our_own_downstream_checkpoint_and_safetensors(tmp_path):
    model = DownstreamClassifier(STUDENT, 3, unfrozen_layers="all")
    save_checkpoint(tmp_path / "a.pth", script="train_downstream.py", config={}, class_names=["a", "b", "c"],
                    palette=None, model=model.state_dict(), encoder={"source": "jepa.pth", "sha256": "0"})
    assert_equal(read_encoder(tmp_path / "a.pth")[0], STUDENT)
    save_file(STUDENT.state_dict(), tmp_path / "a.safetensors")
    assert_equal(read_encoder(tmp_path / "a.safetensors")[0], STUDENT)


def test_what_is_missing_is_named_when_loading(tmp_path):
    state = STUDENT.state_dict()
    del state["norm.weight"]
    state, layout, _ = read_encoder(saved(tmp_path, {"encoder": state}))
    with pytest.raises(ValueError, match=r"1 missing \(norm.weight\)"):
        load_weights(encoder(), state, "file", layout=layout)


def frozen_checkpoint():
    head = {f"head.{k}": v for k, v in torch.nn.Linear(8, 3).state_dict().items()}
    return {"format": "segheads-1", "script": "train_downstream.py", "model": head, "encoder": {"source": "jepa.pth"}}


REFUSED = {
    "empty": ({}, "it is empty"),
    "empty encoder": ({"encoder": {}, "epoch": 1}, "2 entries"),
    "foreign network": ({"blocks.0.norm1.weight": torch.ones(4), "norm.weight": torch.ones(4)}, "blocks.0.norm1.weig"),
    "other script": ({"format": "segheads-1", "script": "train_sonata.py", "model": {"a": torch.ones(1)}}, "sonata"),
    "frozen encoder": (frozen_checkpoint(), "frozen"),
    "not finite": ({**STUDENT.state_dict(), "norm.bias": torch.full((8,), float("nan"))}, "norm.bias .* not finite"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_encoder(saved(tmp_path, content))
    assert "weights.pth" in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_encoder(tmp_path / "none.pth")


def test_features_of_another_list_are_refused_with_both():
    check_features(None, ["normal"], "a.pth")
    check_features({"names": ("normal", "area")}, ["area", "normal"], "a.pth")
    with pytest.raises(ValueError, match=r"a.pth.*'hks'.*'normal'"):
        check_features({"names": ["hks"]}, ["normal"], "a.pth")
    for sizes in ({}, {"sizes": {"unit": 10.0}}, {"sizes": {"hks_scale": 1.0}}):
        check_features({"names": ["normal"], **sizes}, ["normal"], "a.pth", unit=10)
    with pytest.raises(ValueError, match="a.pth: trained with model.hks_scale=0.1, .*set model.hks_scale=0.1 instead of 1"):
        check_features({"names": ["hks"], "sizes": {"hks_scale": 0.1}}, ["hks"], "a.pth", hks_scale=1)
