"""models/dinov3_weights.py: every file people have, what goes wrong with them, and finding them again from a checkpoint."""

import hashlib
import http.server
import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.dinov3 import BACKBONES, VisionTransformer, ViTConfig
from models.dinov3_weights import (
    NORMALIZATIONS,
    fetch,
    load_backbone,
    read_released_head,
    restore_backbone,
    to_official_names,
)

GOLDEN = Path(__file__).parent / "golden" / "dinov3"
TINY = ViTConfig(32, 4, 2, "mlp", 128, (0, 1, 2, 3))
SAT = NORMALIZATIONS["sat493m"]


@pytest.fixture(autouse=True)
def tiny_backbones(monkeypatch):
    monkeypatch.setitem(BACKBONES, "dinov3_tiny16", TINY)
    monkeypatch.setitem(BACKBONES, "dinov3_other16", TINY._replace(depth=2))


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "vit_mlp.pt", weights_only=True)


@pytest.fixture
def file(tmp_path, golden):
    torch.save(golden["state_dict"], tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def folder(path, state, preprocessor=None):
    path.mkdir()
    save_file({name: tensor.clone() for name, tensor in state.items()}, path / "model.safetensors")
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


def check_golden(backbone, golden):
    for feature, tap in zip(backbone(golden["inputs"]["image"]), golden["outputs"]["taps"], strict=True):
        torch.testing.assert_close(feature.flatten(2).transpose(1, 2), tap["patch_tokens"], atol=1e-4, rtol=1e-4)


# -- files -------------------------------------------------------------------------------------------------------------


def test_official_file(file, golden):
    backbone, message = load_backbone("tiny16", file)
    assert message == (f"matched 64/64 backbone tensors from {file} (layout: DINOv3); normalisation imagenet: "
                       f"mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225]")
    check_golden(backbone, golden)
    assert backbone.entry == {"name": "dinov3_tiny16", "file": str(file), "sha256": backbone.sha256(), "seed": 0, "normalization": "imagenet",
                              "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("wrap", [lambda s: {"model": s}, lambda s: {"state_dict": {"module." + k: v for k, v in s.items()}, "epoch": 3}])
def test_containers_and_wrappers(tmp_path, golden, wrap):
    torch.save(wrap(golden["state_dict"]), tmp_path / "w.pth")
    check_golden(load_backbone("tiny16", tmp_path / "w.pth")[0], golden)


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "file"])
def test_hugging_face_folders(tmp_path, golden, form):
    state = golden["state_dict_hf"]
    path = folder(tmp_path / "hf", state)
    if form != "safetensors" and form != "file":
        (path / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, path / "pytorch_model.bin")
    if form == "shards":
        where = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(state)}
        for shard in set(where.values()):
            save_file({name: state[name].clone() for name in state if where[name] == shard}, path / shard)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    backbone, message = load_backbone("dinov3_tiny16", path / "model.safetensors" if form == "file" else path)
    assert "layout: Hugging Face" in message and "not used" not in message
    check_golden(backbone, golden)
    official, _ = to_official_names(golden["state_dict"], "x")
    own = backbone.vit.state_dict()
    assert all(torch.equal(own[name], official[name]) for name in own if name != "rope_embed.periods")


@pytest.mark.parametrize("name", ["dinov2_reg0", "dinov2_reg4", "dinov2_reg4_swiglu"])
def test_hugging_face_names_of_dinov2(name):
    """As Dinov2Model and Dinov2WithRegistersModel save them (transformers 5.23)."""
    state = torch.load(GOLDEN / f"{name}.pt", weights_only=True)["state_dict"]
    renamed = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[key.replace("blocks.", "encoder.layer.").replace("attn.qkv", f"attention.attention.{part}")] = third
            continue
        for old, new in (("blocks.", "encoder.layer."), ("attn.proj", "attention.output.dense"), ("ls1.gamma", "layer_scale1.lambda1"),
                         ("ls2.gamma", "layer_scale2.lambda1"), ("mlp.w12", "mlp.weights_in"), ("mlp.w3", "mlp.weights_out")):
            key = key.replace(old, new)
        if key.startswith("norm."):
            key = "layernorm" + key[4:]
        if not key.startswith(("encoder", "layernorm")):
            key = "embeddings." + key.replace("pos_embed", "position_embeddings").replace("patch_embed.proj", "patch_embeddings.projection")
        renamed[key] = tensor
    back, layout = to_official_names(renamed, "x")
    assert layout == "Hugging Face" and back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("mask", [None, float("nan")], ids=["as saved", "never initialised"])
def test_bias_mask_switches_the_key_bias_off(tmp_path, golden, mask):
    state = {name: torch.full_like(tensor, mask) if mask and name.endswith("bias_mask") else tensor for name, tensor in golden["state_dict"].items()}
    assert all(state[name].chunk(3)[1].ne(0).all() for name in state if name.endswith("qkv.bias"))   # the file's key bias is not zero
    torch.save(state, tmp_path / "w.pth")
    backbone, _ = load_backbone("tiny16", tmp_path / "w.pth")
    query, key, value = backbone.vit.blocks[1].attn.qkv.bias.chunk(3)
    assert (key == 0).all() and (query != 0).any() and (value != 0).any()
    check_golden(backbone, golden)


def test_periods_come_from_the_file(tmp_path, golden):
    state = {**golden["state_dict"], "rope_embed.periods": golden["inputs"]["rope_periods_bf16"]}
    torch.save(state, tmp_path / "w.pth")
    assert torch.equal(load_backbone("tiny16", tmp_path / "w.pth")[0].vit.rope_embed.periods, golden["inputs"]["rope_periods_bf16"])


def test_half_precision_files_become_float32(tmp_path, golden):
    torch.save({name: tensor.bfloat16() for name, tensor in golden["state_dict"].items()}, tmp_path / "w.pth")
    assert {p.dtype for p in load_backbone("tiny16", tmp_path / "w.pth")[0].vit.parameters()} == {torch.float32}


# -- defects -----------------------------------------------------------------------------------------------------------


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize("change, message", [
    (without("blocks.2.ls1.gamma"), r"matched 63/64 backbone tensors; 1 missing \(blocks.2.ls1.gamma\)"),
    (without("blocks.1.attn.qkv.bias"), r"1 missing \(blocks.1.attn.qkv.bias\)"),
    (lambda state: {**state, "norm.weight": torch.ones(31)}, r"1 of another shape \(norm.weight: file \(31,\), model \(32,\)\)"),
    (lambda state: {**state, "norm.weight": torch.full((32,), float("nan"))}, "norm.weight is not finite"),
    (lambda state: {"downsample_layers.0.0.weight": torch.ones(2)}, "no DINOv3 or DINOv2 vision transformer; it holds downsample_layers"),
    (lambda state: {key: tensor for key, tensor in state.items() if "blocks.2" not in key and "blocks.3" not in key},
     "holds dinov3_other16, not dinov3_tiny16. Choose that backbone"),
])
def test_defective_files(tmp_path, golden, change, message):
    torch.save(change(golden["state_dict"]), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_backbone("tiny16", tmp_path / "w.pth")
    assert "w.pth" in str(error.value) and "\n" not in str(error.value)


def test_hugging_face_file_without_a_part(tmp_path, golden):
    path = folder(tmp_path / "hf", without("layer.0.attention.k_proj.weight")(golden["state_dict_hf"]))
    with pytest.raises(ValueError, match="1 missing .blocks.0.attn.qkv.weight"):
        load_backbone("tiny16", path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_backbone("tiny16", tmp_path / "w.pth")
    with pytest.raises(ValueError, match="a folder without model.safetensors"):
        load_backbone("tiny16", tmp_path)
    with pytest.raises(ValueError, match="normalization: expected one of auto, imagenet, sat493m; got 'sat'"):
        load_backbone("tiny16", None, normalization="sat")


def test_released_sizes_are_told_apart(tmp_path):
    """A ViT-B file under the name of ViT-S: the message says which it is."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisionTransformer(BACKBONES["dinov2_vitb14_reg"]).state_dict().items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds dinov2_vitb14_reg, not dinov2_vits14"):
        load_backbone("vits14", tmp_path / "w.pth")


# -- normalisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "renamed-a6675841.pth", "my_sat493m.pth"])
def test_satellite_weights_by_file_name(tmp_path, golden, name):
    torch.save(golden["state_dict"], tmp_path / name)
    backbone, message = load_backbone("tiny16", tmp_path / name)
    assert (backbone.entry["mean"], backbone.entry["std"]) == SAT and "normalisation sat493m: mean [0.43, 0.411, 0.296]" in message
    torch.testing.assert_close(backbone.mean.flatten(), torch.tensor(SAT[0]))
    backbone, message = load_backbone("tiny16", tmp_path / name, normalization="imagenet")
    assert "WARNING: normalisation imagenet is set, but this file looks like sat493m" in message
    assert (backbone.entry["mean"], backbone.entry["std"]) == NORMALIZATIONS["imagenet"]
    assert "WARNING" not in load_backbone("tiny16", tmp_path / name, normalization="sat493m")[1]


def test_satellite_vitl_by_its_extra_norm(tmp_path, golden, monkeypatch):
    extra = {"local_cls_norm.weight": torch.ones(32), "local_cls_norm.bias": torch.ones(32)}
    torch.save({**golden["state_dict"], **extra}, tmp_path / "renamed.pth")
    monkeypatch.setitem(BACKBONES, "dinov3_vitl16", TINY)
    backbone, message = load_backbone("vitl16", tmp_path / "renamed.pth")
    assert backbone.entry["normalization"] == "sat493m" and "not used" not in message
    assert load_backbone("tiny16", tmp_path / "renamed.pth")[0].entry["normalization"] == "imagenet"     # the 7B has it in both


@pytest.mark.parametrize("mean, std, kind", [(*SAT, "sat493m"), (*NORMALIZATIONS["imagenet"], "imagenet"), ([0.5] * 3, [0.25] * 3, "preprocessor_config.json")])
def test_normalisation_from_the_preprocessor_file(tmp_path, golden, mean, std, kind):
    path = folder(tmp_path / "dinov3-sat493m", golden["state_dict_hf"], {"image_mean": mean, "image_std": std})
    entry = load_backbone("tiny16", path)[0].entry
    assert (entry["normalization"], entry["mean"], entry["std"]) == (kind, mean, std)
    (path / "preprocessor_config.json").unlink()
    assert load_backbone("tiny16", path)[0].entry["normalization"] == "sat493m"


# -- no weights, URLs --------------------------------------------------------------------------------------------------


def test_random_weights_warn_and_follow_the_seed():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, message = load_backbone("tiny16", None, seed=3)
    assert message.startswith("WARNING: dinov3_tiny16 is randomly initialised (seed 3)")
    assert torch.equal(torch.rand(3), expected)                  # the caller's random numbers go on as if nothing was drawn
    assert load_backbone("tiny16", None, seed=3)[0].sha256() == first.sha256() != load_backbone("tiny16", None, seed=4)[0].sha256()
    assert first.entry["file"] is None


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on tmp_path/www and an empty torch.hub folder; its address."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "www").mkdir()
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "www")) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_download(tmp_path, file, golden, server):
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    file.rename(tmp_path / "www" / f"tiny-{digits}.pth")
    url = f"{server}/tiny-{digits}.pth?Signature=SECRET"
    backbone, message = load_backbone("tiny16", url)
    check_golden(backbone, golden)
    kept = tmp_path / "hub" / "checkpoints" / f"tiny-{digits}.pth"
    assert backbone.entry["file"] == str(kept) and kept.is_file() and "SECRET" not in message
    (tmp_path / "www" / kept.name).unlink()
    assert fetch(url) == kept                                    # not fetched again
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"does not start with {digits}.*Delete it"):
        fetch(url)


@pytest.mark.parametrize("case, message", [("missing", "the server refuses it .HTTP 404"), ("hash", "invalid hash value"), ("dead", "cannot be downloaded .*refused")])
def test_failed_downloads_are_one_line(tmp_path, file, server, case, message):
    file.rename(tmp_path / "www" / "tiny-00000000.pth")
    url = {"missing": f"{server}/other.pth", "hash": f"{server}/tiny-00000000.pth", "dead": "http://127.0.0.1:9/tiny.pth"}[case]
    with pytest.raises(ValueError, match=message) as error:
        load_backbone("tiny16", url + "?Signature=SECRET")
    text = str(error.value)
    assert "\n" not in text and "SECRET" not in text and "given out on request" in text and not list((tmp_path / "hub" / "checkpoints").iterdir())


# -- from a checkpoint -------------------------------------------------------------------------------------------------


def test_restore(tmp_path, file, golden):
    backbone, _ = load_backbone("tiny16", file, normalization="sat493m")
    entry = json.loads(json.dumps(backbone.entry))               # plain types only
    again = restore_backbone(entry)
    check_golden(again, golden)
    assert again.entry == entry and torch.equal(again.mean, backbone.mean) and again.sha256() == backbone.sha256()
    moved = file.rename(tmp_path / "moved.pth")
    with pytest.raises(ValueError, match="tiny.pth: no such file, .*not stored in checkpoints; .*--backbone-weights PATH .model.backbone_weights=PATH"):
        restore_backbone(entry)
    assert restore_backbone(entry, moved).entry == {**entry, "file": str(moved)}
    torch.save({**golden["state_dict"], "norm.bias": torch.zeros(32)}, file)
    with pytest.raises(ValueError, match="not the dinov3_tiny16 weights that the checkpoint was trained on"):
        restore_backbone(entry)


def test_restore_random_weights():
    entry = load_backbone("tiny16", None, seed=7)[0].entry
    assert restore_backbone(entry).sha256() == entry["sha256"]
    with pytest.raises(ValueError, match="random weights: these are not"):
        restore_backbone({**entry, "seed": 8})


def test_released_head(tmp_path):
    schema = json.loads((GOLDEN / "key_schema.json").read_text())["models"]["dinov3_vit7b16_ade20k_m2f_head"]["keys"]
    state = {name: torch.zeros(1) for name in schema}
    torch.save({**state, "segmentation_model.0.backbone.norm.weight": torch.ones(1)}, tmp_path / "head.pth")
    head = read_released_head(tmp_path / "head.pth")
    assert head.keys() == state.keys() and len(head) == 479
    for other in ({name: tensor for name, tensor in state.items() if "model.0." in name}, {"norm.weight": torch.ones(1)}):
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="no released Mask2Former head; it holds"):
            read_released_head(tmp_path / "other.pth")
