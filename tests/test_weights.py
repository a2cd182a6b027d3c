import hashlib
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from utils.weights import _one_line, load_weights, read_torch_file, read_weights, sha256_file, strip_prefixes


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False))


# -- reading -------------------------------------------------------------------

@pytest.mark.parametrize("form", ["archive", "old format", "no checksums", "safetensors"])
def test_reads_each_format(tmp_path, form):
    weights = {"a": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(weights, path)
    else:
        torch.serialization.set_crc32_options(form != "no checksums")
        torch.save(weights, path, _use_new_zipfile_serialization=form != "old format")
        torch.serialization.set_crc32_options(True)
    loaded = read_weights(path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
               for name, tensor in weights.items())


def test_nested_dict_is_returned_as_it_is(tmp_path):
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pt")
    assert read_weights(tmp_path / "w.pt")["epoch"] == 3


def refused(path, kind=ValueError):
    with pytest.raises(kind) as caught:
        read_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name, old", [("w.pth", False), ("w.pth", True), ("w.safetensors", False)])
def test_truncated_and_foreign_files(tmp_path, name, old):
    path, weights = tmp_path / name, {"a": torch.randn(30, 40)}
    if path.suffix == ".pth":
        torch.save(weights, path, _use_new_zipfile_serialization=not old)
    else:
        save_file(weights, path)
    whole = path.read_bytes()
    for length in (0, 1, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "truncated, damaged or no" in refused(path) or "truncated or damaged" in refused(path)
    path.write_bytes(b"<html>404 not found</html>" * 10)
    assert "Fetch it again" in refused(path)


def test_flipped_bit(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(bytes(4000)) + 2000] = 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["a"].any()       # torch does not notice
    assert "damaged" in refused(path) and "data/0" in refused(path)


def test_damaged_pickle_is_one_line_without_torchs_advice(tmp_path):
    """torch answers with a paragraph that explains how to switch the protection off; the cause is at its end."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    content = bytearray(path.read_bytes())
    place = content.find(b"ctorch._utils")         # an opcode
    content[place] = 0xFF
    path.write_bytes(content)
    message = refused(path)
    assert "UnpicklingError: Unsupported operand 255" in message and "weights_only" not in message
    assert _one_line(ValueError("a\x1b[2J\nb")) == "ValueError: a [2J b"


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("extra, named", [(Namespace(lr=1), "argparse.Namespace"), (np.float64(0.5), "numpy"),
                                          (nn.Linear(1, 1), "torch.nn.modules.linear.Linear")])
def test_python_objects_are_refused_with_a_way_out(tmp_path, extra, named, old):
    path = tmp_path / "w.pth"
    torch.save({"model": {}, "args": extra}, path, _use_new_zipfile_serialization=not old)
    assert f"Python objects ({named}" in refused(path) and "state_dict alone" in refused(path)


def test_other_content(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "w.pth")
    assert "holds a list" in refused(tmp_path / "w.pth")
    assert "w.pth" in refused(tmp_path / "x.pth", FileNotFoundError)
    assert "Check the path" in refused(tmp_path / "x.safetensors", FileNotFoundError)
    refused(tmp_path, IsADirectoryError)


def test_compressed_archive_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert "archive/data.pkl" in refused(path)


def test_old_format_only_where_asked(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not written by torch.save \(\d+ bytes\). Do this"):
        read_torch_file(tmp_path / "w.pth", "Do this.")


def test_sha256(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"abc" * 1_000_000)
    assert sha256_file(path) == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


# -- prefixes ------------------------------------------------------------------

def test_strip_prefixes():
    assert strip_prefixes({"module._orig_mod.a.w": 1, "module._orig_mod.b": 2}) == {"a.w": 1, "b": 2}
    assert strip_prefixes({"_orig_mod.module.a": 1}) == {"a": 1}
    assert strip_prefixes({"module.w": 1, "head.w": 2}) == {"module.w": 1, "head.w": 2}    # a submodule called module
    assert strip_prefixes({"a.module.w": 1}) == {"a.module.w": 1}
    assert strip_prefixes({"encoder.w": 1}, ("encoder.",)) == {"w": 1}
    assert strip_prefixes({}) == {}


def test_strip_prefixes_undoes_real_wrappers():
    net = small_net()
    wrapped = torch.compile(nn.DataParallel(net))
    assert strip_prefixes(wrapped.state_dict()).keys() == net.state_dict().keys()


# -- into a module -------------------------------------------------------------

def test_load_weights_loads_all_and_says_so():
    source, net = small_net(), small_net()
    source[1].running_mean.fill_(3)
    line = load_weights(net, source.state_dict(), "enc.pth", layout="plain")
    assert line == "matched 8/8 encoder tensors from enc.pth (layout: plain)"
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), source.state_dict().values(), strict=True))
    line = load_weights(net, {**source.state_dict(), "head.w": torch.ones(1)}, "f.pth", what="backbone")
    assert line == "matched 8/8 backbone tensors from f.pth; 1 others in the file not used"


def test_load_weights_half_covered_fails_and_loads_nothing():
    net = small_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    given = {name: torch.full_like(tensor, 7) for name, tensor in before.items()}
    del given["1.running_var"], given["1.num_batches_tracked"], given["2.weight"]
    given |= {"0.weight": torch.ones(4, 3, 5, 5), "2.kernel": torch.ones(1), "1.num_batches_tracked": torch.tensor(3)}
    with pytest.raises(ValueError) as caught:
        load_weights(net, given, "enc.pth", layout="plain")
    message = str(caught.value)
    assert message.startswith("enc.pth (layout: plain): matched 5/8 encoder tensors; 2 missing (1.running_var, "
                              "2.weight); 1 unexpected (2.kernel); 1 of another shape (0.weight: file (4, 3, 5, 5), "
                              "model (4, 3, 3, 3)). ")
    assert "\n" not in message
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


def test_load_weights_shows_five_examples():
    net = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    with pytest.raises(ValueError, match=r"matched 0/8 .* 8 missing \(0.weight, 0.bias, 1.weight, 1.bias, 2.weight, "
                                         r"\.\.\.\); 0 unexpected; 0 of another shape\."):
        load_weights(net, {}, "f.pth")


def test_load_weights_foreign_entries_are_not_tensors():
    with pytest.raises(ValueError, match="1 missing .weight.; 1 unexpected .3."):
        load_weights(nn.Linear(1, 1, bias=False), {"weight": "text", 3: torch.ones(1)}, "f.pth")
    with pytest.raises(ValueError, match="matched 0/0"):
        load_weights(nn.ReLU(), {}, "f.pth")


def test_load_weights_quantised_is_refused_but_half_precision_converted():
    net = nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match=r"weight: file \(1, 2\) int8, model \(1, 2\)"):
        load_weights(net, {"weight": torch.ones(1, 2, dtype=torch.int8)}, "f.pth")
    load_weights(net, {"weight": torch.full((1, 2), 0.5, dtype=torch.float16)}, "f.pth")
    assert net.weight.dtype == torch.float32 and net.weight.tolist() == [[0.5, 0.5]]


def test_load_weights_of_old_torch_without_batch_counters():
    source, net = small_net(), small_net()
    given = {name: tensor for name, tensor in source.state_dict().items() if "num_batches" not in name}
    assert load_weights(net, given, "f.pth").startswith("matched 7/7")
    assert torch.equal(net[0].weight, source[0].weight)
    two = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    given = {name: tensor for name, tensor in two.state_dict().items() if name != "1.num_batches_tracked"}
    with pytest.raises(ValueError, match="1 missing .1.num_batches_tracked"):      # a new file that lost one
        load_weights(two, given, "f.pth")


def test_load_weights_leaves_buffers_that_are_not_saved():
    net = nn.Linear(1, 1)
    net.register_buffer("mask", torch.ones(3), persistent=False)
    assert load_weights(net, nn.Linear(1, 1).state_dict(), "f.pth").startswith("matched 2/2")
