"""Readers and algorithms on input made at random (Hypothesis; the same examples in every run).

Damaged files: a small valid file with bytes, numbers, words or lines changed, lost or multiplied, also inside its
archive or below its checksum. A reader gives a valid result, or ValueError or OSError: one line that names the file. No
other exception, no warning, no hang, no memory beyond that of a small file.
Made files: random valid meshes, clouds, labels, whose content must come back. Then the algorithms on random input.
"""

import contextlib
import io
import json
import re
import resource
import shutil
import signal
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes

import train_sonata
import train_upernet_head
from data.image_splits import read_class_file
from data.images import check_pairs, read_image
from data.mesh import Augmentation, MeshDataset, MeshSpec
from data.mesh_io import Mesh, read_labels, read_mesh, write_glb, write_labels, write_ply
from data.mesh_texture import read_mtl, read_pyramid, read_texture
from data.point_files import find_clouds, read_classes, read_cloud, write_cloud
from data.point_files import write_ply as write_cloud_ply
from data.point_transforms import fragments, representatives, voxelize
from models.sparse_conv import SubMConv3d, neighbour_table
from tests.tiny_clouds import tiny_cloud
from tests.tiny_images import read_mask, tiny_picture
from tests.tiny_runs import report
from utils.checkpoint import find_resume, load_checkpoint, save_checkpoint
from utils.cli import user_message
from utils.config import load_config, override_config, save_config
from utils.log import read_log
from utils.losses import IGNORE_INDEX
from utils.metrics import ConfusionMatrix, segmentation_metrics
from utils.postprocess import crf_refine, morphology
from utils.weights import read_weights

FEW, MANY = 50, 1000                    # examples a reader: in every run, and in the slow one
SECONDS, MEGABYTES = 5, 200             # of processor time and of address space for one small file
NUMBERS = [b"nan", b"-inf", b"1e400", b"-1", b"0", b"1", b"255", b"1e-320", b"0.5", b"2147483648", b"4294967295", b"9223372036854775808",
           b"-9223372036854775809", b"18446744073709551616", b"1000000000000", b"1e18", b"9" * 400, b"0x10", b"1_000", b"", b"1e", b"\xd9\xa3",
           b"1" * 5000]
WORDS = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b" ", b"#", b"\\\n", b"/", b"//", b"../../x", b"{", b"[", b"]}", b'"', b"'", b",", b":", b"&a ",
         b"*a", b"!!python/name:os.system ", b"\\ud800", b"\x1b[2J", b"-", b"%", b"=", b"[" * 2000, b"A" * 3000]
WHOLE = [struct.pack(form, value) for form, value in (("<I", 0xFFFFFFFF), ("<I", 0x7FFFFFFF), (">I", 0x7FFFFFFF), ("<I", 1000000), ("<Q", 10**12),
                                                      ("<d", np.nan), ("<f", np.inf), ("<d", 1e300), ("<f", -1e38), ("<Q", 2**63), ("<I", 0))]


# --- damage -----------------------------------------------------------------------------------------------------------

class Reader(NamedTuple):
    """Valid files: parts, and what joins (changed) parts to the bytes of a file; read: path -> result, which it checks.
    megabytes: more where a library asks for address space by what a header says, and never touches it."""
    name: str
    read: Callable[[Path], object]
    files: list[tuple[list[bytes], Callable[[list[bytes]], bytes]]]
    megabytes: int = MEGABYTES


class Hang(BaseException):
    """Too much processor time: nothing catches it by chance."""


def plain(*contents):
    return [([content if isinstance(content, bytes) else content.encode()], b"".join) for content in contents]


EDIT = st.tuples(st.sampled_from(["flip", "delete", "insert", "cut", "repeat", "overwrite", "number", "word", "swap", "line"]),
                 st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1))


def damage(data: bytes, edits) -> bytes:
    """The edits one after the other; a number in them picks a place (as a share of the length) or one of a list."""
    for kind, where, what, length in edits:
        at, length = where * len(data) >> 16, 1 + length % 24
        if kind in ("number", "word", "swap", "line"):
            data = damage_text(data, kind, where, what, length)
        elif kind == "flip":
            data = data[:at] + bytes(byte ^ (1 + what % 255) for byte in data[at:at + 1]) + data[at + 1:]
        elif kind == "delete":
            data = data[:at] + data[at + length:]
        elif kind == "insert":
            data = data[:at] + (WORDS + NUMBERS)[what % (len(WORDS) + len(NUMBERS))] + data[at:]
        elif kind == "cut":
            data = data[:at]
        elif kind == "repeat":
            data = data[:at] + data[at:at + length] * (2 + what % 300) + data[at + length:]
        else:
            value = WHOLE[what % len(WHOLE)]
            at -= at % 4 * (length % 2)                         # where numbers usually stand, or anywhere
            data = data[:at] + value + data[at + len(value):]
    return data


def damage_text(data: bytes, kind: str, where: int, what: int, length: int) -> bytes:
    words = data.splitlines(True) if kind == "line" else re.split(rb'([\s,:=\[\]"]+)', data)
    chosen = [i for i, word in enumerate(words) if kind != "number" or re.fullmatch(rb"[-+.\de/]+", word)]
    if chosen:
        i, j = chosen[where * len(chosen) >> 16], what % len(words)
        if kind == "number":
            words[i] = NUMBERS[what % len(NUMBERS)]
        elif kind == "word":
            words[i] = WORDS[what % len(WORDS)]
        elif kind == "swap" or length % 3 == 0:
            words[i], words[j] = words[j], words[i]
        elif length % 3 == 1:
            words[i:i + 1] = [words[i]] * (length % 5)          # 0: it is gone
        else:
            words.insert(i, words[j])
    return b"".join(words)


@contextlib.contextmanager
def limited(megabytes: int):
    """Hang after SECONDS of processor time; MemoryError for more address space than there is and `megabytes`."""
    def stop(*_):
        raise Hang(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")         # about odd files: rightly
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def check_refusal(error: Exception, path: Path) -> None:
    """One line of our own that names the file (or its folder, or a third file that a mesh names) and says something."""
    text = str(error)
    assert str(path.parent) in text or "a mesh names it" in text, f"no file named: {text!r}"
    assert len(text.splitlines()) == 1 and len(text) < 8000, f"not one line: {text!r}"
    assert not any(hint in text for hint in ("MemoryError", "allocate", "out of memory")), f"tried to allocate: {text!r}"
    assert "--debug shows" not in (user_message(error) or ""), f"not a message of ours: {user_message(error)!r}"
    text.encode()                                               # a lone surrogate cannot be printed


def read_damaged(reader: Reader, path: Path) -> bool:
    """Whether the file is accepted; anything but a valid result or a proper refusal is raised."""
    with limited(reader.megabytes):
        try:
            reader.read(path)
        except (ValueError, OSError) as error:
            check_refusal(error, path)
            return False
    return True


def run_examples(examples: int, tally: Counter, *strategies):
    """As a decorator: call the function at once with as many examples of the strategies; a failure counts in the tally."""
    def decorate(function):
        @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.tuples(*strategies))
        def run(values):
            tally["examples"] += 1
            function(*values)

        tally["tests"] += 1
        tally["crashes"] += 1                                   # taken back if all goes well
        run()
        tally["crashes"] -= 1
    return decorate


# --- the readers, and what a valid result is ----------------------------------------------------------------------------

OBJ = """mtllib a.mtl
# six vertices
v 0 0 0
v 1 0 0.5
v 1 1 0
v 0 1 1e-1
vt 0 0
vt 0.5 1
v -0.25 2 3 0.1 0.2 0.3
usemtl red
f 1/1 2/2 3/1
f 1 3 4 \\
 5
usemtl blue #2
f -1//1 -2//1 -3//1
"""
MTL = "newmtl red\nKd 1 0 0\nmap_Kd -clamp on -s 1 2 1 -o 0.5 0 0 a.png\nnewmtl blue #2\nKd 0.1 0.2 1.0\nNs 10\n"
PLY = """ply
format ascii 1.0
comment TextureFile a.png
element vertex 4
property float x
property float y
property double z
element face 3
property list uchar int vertex_indices
property list uchar float texcoord
property int texnumber
property int label
end_header
0 0 0
1 0 0
1 1 0.5
0 1 1
3 0 1 2 6 0 0 0.5 1 1 1 0 2
4 0 1 2 3 0 0 1
3 1 2 3 0 0 0
"""
OFF = "OFF\n# a comment\n4 2 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0.5\n3 0 1 2 255 0 0\n4 0 1 2 3\n"
TRIANGLES = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[1, 0, 0], [1, 1, 0], [0, 1, 0.5]]], "<f4")
STL = "solid a\n" + "".join("facet normal 0 0 1\nouter loop\n" + "".join(f"vertex {x} {y} {z}\n" for x, y, z in face) + "endloop\nendfacet\n"
                            for face in TRIANGLES) + "endsolid a\n"
STL_ROWS = np.zeros(2, [("normal", "<f4", 3), ("corner", "<f4", (3, 3)), ("extra", "<u2")])
STL_ROWS["corner"] = TRIANGLES
GLTF = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0, "translation": [1, 2, 3]}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}], "buffers": [{"byteLength": 84}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 6, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 1]},
                      {"bufferView": 1, "componentType": 5123, "count": 6, "type": "SCALAR"}],
        "bufferViews": [{"buffer": 0, "byteOffset": 0, "byteLength": 72}, {"buffer": 0, "byteOffset": 72, "byteLength": 12}]}
YAML = """data: {root: here, grid_size: 0.05, unit: 1}   # metres
model:
  mode: ft
  num_classes: 3
training: {use_pretrained: false, epochs: 4, batch_size: 3}
optimizer:
  lr: 1e-3
  block_lr: 2e-4
augmentation: {elastic: [[0.2, 0.05], [1, 2.5]], scale_range: [0.9, 1.1]}
logging: &log {log_interval: 1, tensorboard: no}
"""
TOML = ('[data]\nroot = "here"\ngrid_size = 0.05\n[model]\nmode = "ft"\nnum_classes = 3\n[training]\nuse_pretrained = false\nepochs = 4\n'
        '[augmentation]\nelastic = [[0.2, 0.05], [1.0, 2.5]]\n')
JSON = json.dumps({"data": {"root": "here", "grid_size": 0.05}, "model": {"mode": "ft", "num_classes": 3}, "training": {"epochs": 4}}, indent=1)
LABELLED = Mesh(np.zeros((5, 3)), np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4], [1, 2, 3]]), None, np.array([0, 0, 1, 2]), "a.obj")


def glb(parts):
    document, binary = (part + b" " * (-len(part) % 4) for part in parts)
    chunks = struct.pack("<I4s", len(document), b"JSON") + document + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def archive(names):
    """What writes members of these names to a zip, with checksums that fit them."""
    def join(parts):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as out:
            for name, part in zip(names, parts, strict=True):
                out.writestr(name, part)
        return file.getvalue()
    return join


def unzipped(data: bytes):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [file.read(name) for name in file.namelist()], archive(file.namelist())


def npy(array) -> bytes:
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def torch_bytes(value, **how) -> bytes:
    torch.save(value, file := io.BytesIO(), **how)
    return file.getvalue()


def safetensors_parts(tensors):
    data = safetensors_bytes(tensors)
    end = 8 + int.from_bytes(data[:8], "little")
    return [data[8:end], data[end:]], lambda parts: struct.pack("<Q", len(parts[0])) + parts[0] + parts[1]


def png(parts):
    """Header and filtered rows (and the palette) as a PNG whose checksums fit."""
    header, rows, palette = parts
    chunks = [(b"IHDR", header), *([(b"PLTE", palette)] if palette else []), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                                           for kind, body in chunks)


def picture(mode, kind, **how):
    image, label = tiny_picture(0, (12, 16))
    Image.fromarray(image if mode == "RGB" else label % 3).convert(mode).save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def png_parts(kind, palette=b""):
    return [struct.pack(">IIBBBBB", 16, 12, 8, kind, 0, 0, 0), (b"\0" + bytes(range(3)) * 5 + b"\1") * 12, palette], png


def in_range(index, count, lowest=0):
    return not index.size or lowest <= index.min() <= index.max() < count


def check_mesh(path):
    mesh = read_mesh(path)
    F = len(mesh.faces)
    assert mesh.vertices.dtype == np.float64 and mesh.vertices.shape[1:] == (3,) and np.isfinite(mesh.vertices).all()
    assert mesh.faces.dtype == np.int64 and mesh.faces.shape == (F, 3) and F and in_range(mesh.faces, len(mesh.vertices))
    assert mesh.slot.shape == (F, 3) and (mesh.properties is None or set(mesh.properties) == {"vertex", "face"})
    assert mesh.polygon is None or mesh.polygon.shape == (F,) and set(np.diff(mesh.polygon)) <= {0, 1} and mesh.polygon[0] == 0
    return mesh


def check_texture(path):
    mesh, texture = read_mesh(path), read_texture(path)
    assert texture.uv.dtype == np.float32 and texture.uv.shape == (len(mesh.faces), 3, 2) and not np.isinf(texture.uv).any()
    assert texture.material.shape == (len(mesh.faces),) and in_range(texture.material, len(texture.materials), -1)
    for material in texture.materials:
        if material.image is not None:
            check_picture(material.image)


def check_picture(path):
    pyramid = read_pyramid(path)
    assert pyramid.texels.shape == (sum(h * w for h, w in pyramid.sizes), 3) and pyramid.texels.dtype == np.uint8


def check_mtl(path):
    for name, material in read_mtl(path).items():
        assert isinstance(name, str) and (material.color is None or np.isfinite(material.color).all())
        assert np.isfinite([*material.scale, *material.offset]).all()


def check_labels(path):
    label = read_labels(path, LABELLED, num_classes=3, ignore_labels=[7], kind="vertex" if path.suffix == ".seg" else "auto")
    assert label.dtype == np.int64 and label.shape == (4,) and ((label == IGNORE_INDEX) | (label >= 0) & (label < 3)).all()


def check_cloud(path):
    cloud = read_cloud(path)
    N = len(cloud.coord)
    assert N and cloud.coord.dtype == np.float32 and cloud.coord.shape == (N, 3) and np.isfinite(cloud.coord).all()
    assert cloud.color is None or cloud.color.shape == (N, 3) and 0 <= cloud.color.min() <= cloud.color.max() <= 255
    assert cloud.normal is None or cloud.normal.shape == (N, 3) and np.isfinite(cloud.normal).all() and np.abs(cloud.normal).max() < 1.001
    assert cloud.label is None or cloud.label.dtype == np.int64 and cloud.label.shape == (N,)


def check_cloud_folder(path):
    """The file as coord.npy or segment.npy of a folder."""
    folder = path.parent / "cloud"
    folder.mkdir(exist_ok=True)
    np.save(folder / "coord.npy", np.zeros((4, 3), np.float32))
    (folder / path.name).write_bytes(path.read_bytes())
    check_cloud(folder)


def check_class_lists(path):
    classes = read_classes(path)
    assert classes.names and all(isinstance(name, str) for name in classes.names) and -1 in classes.ignore_labels
    assert classes.palette is None or classes.palette.shape == (len(classes.names), 3) and classes.palette.dtype == np.uint8


def check_class_file(path):
    names, colors = read_class_file(path)
    assert all(isinstance(name, str) for name in names) and (colors is None or colors.shape == (len(names), 3) and in_range(colors, 256))


def check_split(path):
    (path.parent / "a.npz").touch()
    assert find_clouds(path.parent, path.name) == [path.parent / "a.npz"]


def check_image(path):
    image = read_image(path, exif=True)
    assert image.mode == "RGB" and min(image.size) > 0 and len(image.tobytes()) == 3 * image.width * image.height


def check_mask(path):
    label = read_mask(path, 3)
    assert label.dtype == np.int64 and label.ndim == 2 and label.size and ((label == IGNORE_INDEX) | (label >= 0) & (label < 3)).all()


def check_image_pair(path):
    """The file as photograph and as mask, beside a good one."""
    good = path.parent / "good.png"
    good.write_bytes(picture("L", "PNG"))
    for pair in ((path, good), (good, path)):
        summary = check_pairs([pair], 3, workers=1)
        assert summary.sizes.tolist() == [[12, 16]] and summary.class_counts.sum() + summary.ignored == 12 * 16


def check_config(path):
    config = load_config(path, train_sonata.DEFAULTS, ["data.root=here"])
    save_config(config, path.parent / "saved.yaml")
    assert load_config(path.parent / "saved.yaml", train_sonata.DEFAULTS) == config


def check_checkpoint(path):
    checkpoint = load_checkpoint(path, "train_sonata.py")
    assert {"script", "config", "model"} <= set(checkpoint) and isinstance(checkpoint["model"], dict)


def check_resume(path):
    """As model_last.pth beside a good checkpoint: a resume always finds one of the two."""
    good = path.parent / "run" / "checkpoint_epoch_1.pth"
    if not good.exists():
        save_checkpoint(good, **CHECKPOINT)
    (good.parent / "model_last.pth").write_bytes(path.read_bytes())
    assert find_resume("auto", good.parent, "train_sonata.py")[0] in (good, good.parent / "model_last.pth")


def check_weights(path):
    weights = read_weights(path, numpy_scalars=True)
    assert isinstance(weights, dict)
    for value in weights.values():
        if isinstance(value, torch.Tensor):
            value.clone()                                       # its memory is there


def check_log(path):
    assert isinstance(read_log(path), list)


PCD = b"FIELDS x y z label\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\nPOINTS 2\nDATA "
PCD_BODY = struct.pack("<II", 34, 32) + bytes([15]) + np.float32([1, 2, 3, 4]).tobytes() + bytes([15]) + np.float32([5, 6, 7, 8]).tobytes()
CLOUD = {name: values[:9] for name, values in tiny_cloud(0, 20).items()}
CHECKPOINT = {"script": "train_sonata.py", "config": {"a": [1, 2.5, None]}, "class_names": ["a", "b"], "palette": None,
              "model": {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3)}, "epoch": 2, "step": 20}
TORCH = torch_bytes({"format": "segheads-1", **CHECKPOINT})
BINARY_PLY = [PLY[:PLY.index("end_header") + 11].replace("ascii", f"binary_{order}_endian").encode() + b"".join(
    np.array([(0, 0, 0.5), (1, 0, 0), (1, 1, 0), (0, 1, 1)], f"{sign}f4,{sign}f4,{sign}f8").tobytes() if i == 0 else
    struct.pack(f"{sign}B{n}iB{uv}fii", n, *range(n), uv, *[0.5] * uv, 0, 2) for i, n, uv in ((0, 0, 0), (1, 3, 6), (1, 4, 0), (1, 3, 0)))
    for order, sign in (("little", "<"), ("big", ">"))]
CLOUD_ROWS = np.zeros(9, [(axis, "<f8") for axis in "xyz"] + [(color, "u1") for color in ("red", "green", "blue")] + [("label", "<i4")])
CLOUD_PLY = ("ply\nformat ascii 1.0\nelement vertex 3\n" + "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
             + "property uchar red\nproperty uchar green\nproperty uchar blue\nproperty int label\nend_header\n"
             + "0 0 0 0 0 1 255 0 0 1\n1 0 0.5 0 1 0 0 0 9 -1\n0 1 1 1 0 0 1 2 3 0\n")
READERS = [
    Reader("a.obj", check_mesh, plain(OBJ, OBJ.replace("\n", "\r\n"))),
    Reader("a.ply", check_mesh, plain(PLY, *BINARY_PLY)),
    Reader("a.off", check_mesh, plain(OFF)),
    Reader("a.stl", check_mesh, plain(STL, bytes(80) + struct.pack("<I", 2) + STL_ROWS.tobytes())),
    Reader("a.glb", check_mesh, [([json.dumps(GLTF).encode(), TRIANGLES.tobytes() + struct.pack("<6H", *range(6))], glb)]),
    Reader("textured.obj", check_texture, plain(OBJ)),
    Reader("textured.ply", check_texture, plain(PLY, *BINARY_PLY)),
    Reader("b.mtl", check_mtl, plain(MTL)),
    Reader("labels.txt", check_labels, plain("0 1 2 1\n", "0\n1\n-100\n2\n", "0.0 1e0 7")),
    Reader("labels.seg", check_labels, plain("0 1 2 1 7\n")),
    Reader("labels.npy", check_labels, plain(npy(np.array([0, 1, 2, 7])), npy(np.array([0.0, 1, -100])))),
    Reader("cloud.npz", check_cloud, [([npy(values) for values in CLOUD.values()], archive([f"{name}.npy" for name in CLOUD]))]),
    Reader("cloud.npy", check_cloud, plain(npy(np.arange(70.0).reshape(10, 7)), npy(CLOUD_ROWS))),
    Reader("cloud.ply", check_cloud, plain(CLOUD_PLY)),
    Reader("cloud.txt", check_cloud, plain(b"// x y z label\n1 2 3 0\n4 5 6.5 1\n", b"3\n1,2,3\n4,5,-6e1\n7,8,9\n")),
    Reader("cloud.pcd", check_cloud, plain(PCD + b"ascii\n1 2 3 1\n4 5 6 2\n", PCD + b"binary\n" + np.float32([1, 2, 3, 4] * 2).tobytes(),
                                           PCD + b"binary_compressed\n" + PCD_BODY)),
    Reader("cloud.bin", check_cloud, plain(np.float32([[1, 2, 3, 4]] * 3).tobytes())),
    Reader("coord.npy", check_cloud_folder, plain(npy(np.arange(12).reshape(4, 3)), npy(np.zeros((4, 3), ">f8")))),
    Reader("segment.npy", check_cloud_folder, plain(npy(np.array([1, 2, 3, -1])), npy(np.array([1.0, 2, 3, 4])))),
    Reader("classes.json", check_class_lists, plain('["floor", "wall"]', '{"classes": ["a", "b"], "ignore_index": [-1, 255], "palette": [[0, 1, 2], [3, 4, 255]]}')),
    Reader("names.json", check_class_file, plain('{"classes": ["a", "b"], "palette": [[0, 1, 2], [3, 4, 255]]}')),
    Reader("names.txt", check_class_file, plain("0 background\n1 car, red\n2: tree\n", "road\nsky\n")),
    Reader("split.json", check_split, plain('["a.npz"]', '["a"]')),
    Reader("a.png", check_image, [*plain(picture("RGB", "PNG"), picture("P", "PNG")), png_parts(0), png_parts(3, bytes(range(9)))], 1000),
    Reader("a.jpg", check_image, plain(picture("RGB", "JPEG", quality=60), picture("L", "JPEG")), 1000),
    Reader("a.tif", check_image, plain(picture("RGB", "TIFF"), picture("L", "TIFF", compression="tiff_lzw")), 1000),
    Reader("a.bmp", check_image, plain(picture("RGB", "BMP"), picture("P", "BMP")), 1000),
    Reader("a.webp", check_image, plain(picture("RGB", "WEBP"), picture("RGB", "WEBP", lossless=True)), 1000),
    Reader("mask.png", check_mask, [*plain(picture("L", "PNG"), picture("P", "PNG")), png_parts(0), png_parts(3, bytes(range(9)))], 1000),
    Reader("pair.png", check_image_pair, [*plain(picture("L", "PNG")), png_parts(0), png_parts(3, bytes(range(9)))], 1000),
    Reader("c.yaml", check_config, plain(YAML)),
    Reader("c.toml", check_config, plain(TOML)),
    Reader("c.json", check_config, plain(JSON)),
    Reader("c.pth", check_checkpoint, [*plain(TORCH), unzipped(TORCH)]),
    Reader("last.pth", check_resume, [*plain(TORCH), unzipped(TORCH)]),
    Reader("w.pth", check_weights, [*plain(TORCH, torch_bytes(CHECKPOINT, _use_new_zipfile_serialization=False)),
                                    unzipped(torch_bytes({"miou": np.float64(0.5), "epoch": np.int64(3), "w": torch.ones(2)}))], 5000),
    Reader("w.safetensors", check_weights, [safetensors_parts({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])})]),
    Reader("log.jsonl", check_log, plain('{"epoch": 1, "step": 10, "miou": 0.5}\n{"epoch": 2, "step": 20, "miou": null}\n')),
]


@pytest.fixture
def folder(tmp_path):
    """Where the files lie that others name: a material file and a picture."""
    (tmp_path / "a.mtl").write_text(MTL)
    (tmp_path / "a.png").write_bytes(picture("RGB", "PNG"))
    return tmp_path


@pytest.fixture(scope="module")
def tally():
    counts = Counter()
    yield counts
    report(f"fuzz: {counts['examples']} examples over {counts['tests']} readers and algorithms, {counts['crashes']} crashes")


examples = pytest.mark.parametrize("examples", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)])


@examples
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_damaged_file(reader, folder, examples, tally):
    path = folder / reader.name
    for parts, join in reader.files:
        path.write_bytes(join(parts))
        reader.read(path)                                       # valid as it is; and what is imported late is there now

    @run_examples(examples, tally, st.integers(0, len(reader.files) - 1), st.integers(0, 2**16 - 1), st.lists(EDIT, min_size=1, max_size=4))
    def run(which, part, edits):
        parts, join = reader.files[which]
        i = part % (len(parts) + 1)                             # a part of it, or the whole file
        whole = join([damage(content, edits) if k == i else content for k, content in enumerate(parts)])
        path.write_bytes(whole if i < len(parts) else damage(whole, edits))
        read_damaged(reader, path)


@pytest.mark.parametrize("read, problem", [
    (lambda path: bytes(10**9), MemoryError), (lambda path: [1][2], IndexError), (lambda path: np.float32(1e300), RuntimeWarning),
    (lambda path: float("half"), AssertionError), (lambda path: open(path.parent / "none"), None)])
def test_the_harness_sees_what_a_reader_does_wrong(tmp_path, read, problem):
    with pytest.raises(problem) if problem else contextlib.nullcontext():
        read_damaged(Reader("a", read, []), tmp_path / "a")


def test_the_harness_ends_what_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_fuzz.SECONDS", 0.1)
    with pytest.raises(Hang):
        read_damaged(Reader("a", lambda path: sum(0 for _ in iter(int, 1)), []), tmp_path / "a")


# --- made files: what was written comes back ----------------------------------------------------------------------------

ORDINARY = st.one_of(st.integers(-1000, 1000).map(float), st.floats(-1e6, 1e6), st.sampled_from([0.0, -0.0, 1e-300, 5e6 + 0.125]))


@st.composite
def meshes(draw, number=ORDINARY, sides=(3, 6), most=12):
    """vertices (V, 3) and polygons, lists of corners: degenerate, double and unused ones among them."""
    vertices = draw(st.lists(st.tuples(number, number, number), min_size=1, max_size=9))
    corner = st.integers(0, len(vertices) - 1)
    return np.array(vertices), draw(st.lists(st.lists(corner, min_size=sides[0], max_size=sides[1]), min_size=1, max_size=most))


def fans(polygons):
    return [[p[0], p[i], p[i + 1]] for p in polygons for i in range(1, len(p) - 1)]


def of_each(values, polygons):
    return [value for value, p in zip(values, polygons, strict=True) for _ in range(len(p) - 2)]


def obj_file(vertices, polygons, draw):
    """With indices from the front or the back, texture and normal numbers, materials, comments, indents, broken lines."""
    lines, corner = [f"v {' '.join(map(repr, map(float, v)))}" for v in vertices], draw(st.sampled_from(["%d", "%d/1", "%d//1", "%d/1/1"]))
    lines += ["vt 0 0", "vn 0 0 1"]
    for p in polygons:
        shift = draw(st.sampled_from([1, -len(vertices)]))
        lines += draw(st.sampled_from([[], ["usemtl a"], ["g b"], ["# f 1 2 3"], [""]]))
        lines.append(draw(st.sampled_from(["f ", "f\t", " f  "])) + draw(st.sampled_from([" ", "\t", " \\\n "])).join(corner % (i + shift) for i in p))
    return (draw(st.sampled_from(["\n", "\r\n"])).join(lines) + draw(st.sampled_from(["", "\n", " # end"]))).encode()


def off_file(vertices, polygons, draw=None):
    head, color = (draw(st.sampled_from(choices)) if draw else choices[0] for choices in (["OFF", "OFF # x", "COFF", "\nOFF"], ["", " 255 0 0", " 0.5 0.5 0.5"]))
    return "\n".join([head, f"{len(vertices)} {len(polygons)} 0", *(" ".join(map(repr, map(float, v))) for v in vertices),
                      *(f"{len(p)} {' '.join(map(str, p))}{color}" for p in polygons)]).encode()


def ply_file(vertices, polygons, draw, label=None):
    """ASCII or binary of either order, with other properties around those that count."""
    kind, (index, code) = draw(st.sampled_from(["ascii", "<", ">"])), draw(st.sampled_from([("int", "i"), ("uchar", "B"), ("ushort", "H"), ("uint", "I")]))
    extra = draw(st.booleans())
    name = {"ascii": "ascii", "<": "binary_little_endian", ">": "binary_big_endian"}[kind]
    header = ["ply", f"format {name} 1.0", "comment x", f"element vertex {len(vertices)}", *(f"property double {axis}" for axis in "xyz"),
              *["property uchar red"] * extra, f"element face {len(polygons)}", *["property float quality"] * extra,
              f"property list uchar {index} vertex_indices", *["property int label"] * (label is not None), "end_header\n"]
    rows = [("d" * 3 + "B" * extra, [*map(float, v), *[7] * extra]) for v in vertices]
    rows += [("f" * extra + f"B{len(p)}{code}" + "i" * (label is not None), [*[0.5] * extra, len(p), *p, *([] if label is None else [label[i]])])
             for i, p in enumerate(polygons)]
    body = ("\n".join(" ".join(map(repr, values)) for _, values in rows).encode() if kind == "ascii" else
            b"".join(struct.pack(kind + form, *values) for form, values in rows))
    return "\n".join(header).encode() + body


@examples
def test_made_meshes_come_back(tmp_path, examples, tally):
    @run_examples(examples, tally, st.data(), meshes(), st.sampled_from(["obj", "off", "ply"]))
    def run(data, made, suffix):
        vertices, polygons = made
        label = data.draw(st.one_of(st.none(), st.lists(st.integers(-2**31, 2**31 - 1), min_size=len(polygons), max_size=len(polygons))))
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(ply_file(*made, data.draw, label) if suffix == "ply" else (obj_file if suffix == "obj" else off_file)(*made, data.draw))
        mesh = check_mesh(path)
        np.testing.assert_array_equal(mesh.vertices, vertices)
        at = 0
        for p in polygons:                                      # triangles that have every edge of the polygon once
            slots = (mesh.slot[at:at + len(p) - 2] - mesh.slot[at:at + len(p) - 2].min()).tolist()
            edges = Counter(tuple(ends) for a, b, c in slots for ends in ((a, b), (b, c), (c, a)))
            assert all(edges[i, (i + 1) % len(p)] == 1 for i in range(len(p))) and sum(edges.values()) == 3 * len(p) - 6
            assert mesh.faces[at:at + len(p) - 2].tolist() == [[p[i] for i in triangle] for triangle in slots]
            at += len(p) - 2
        assert mesh.polygon is None and all(len(p) == 3 for p in polygons) or mesh.polygon.tolist() == of_each(range(len(polygons)), polygons)
        if label is not None and suffix == "ply":
            assert mesh.properties["face"]["label"].tolist() == label


@examples
def test_written_meshes_come_back(tmp_path, examples, tally):
    @run_examples(examples, tally, meshes(st.integers(-100, 100).map(lambda n: n / 8), (3, 3)), st.sampled_from(["ply", "glb", "stl", "text.stl"]))
    def run(made, kind):
        vertices, faces = made[0], np.array(made[1])
        corner, path = vertices[faces], tmp_path / f"a.{kind}"                                      # (F, 3, 3)
        color = np.arange(3 * len(faces), dtype=np.uint8).reshape(-1, 3)
        if kind == "ply":
            write_ply(path, vertices, faces, color, faces[:, 0])
        elif kind == "glb":
            write_glb(path, vertices, faces, color)
        elif kind == "stl":
            rows = np.zeros(len(faces), STL_ROWS.dtype)
            rows["corner"] = corner
            path.write_bytes(bytes(80) + struct.pack("<I", len(rows)) + rows.tobytes())
        else:
            path.write_text("solid a\n" + "".join(f"facet normal 0 0 1\nouter loop\n{''.join(f'vertex {x} {y} {z}{chr(10)}' for x, y, z in face)}"
                                                  "endloop\nendfacet\n" for face in corner) + "endsolid a\n")
        mesh = check_mesh(path)
        np.testing.assert_allclose(mesh.vertices[mesh.faces], corner, rtol=0, atol=0 if kind != "glb" else 1e-5)
        if kind == "ply":
            assert mesh.properties["face"]["label"].tolist() == faces[:, 0].tolist()
        if kind == "stl":
            assert len(mesh.vertices) == len(np.unique(corner.reshape(-1, 3) + 0.0, axis=0))


@examples
def test_made_labels_come_to_the_right_faces(tmp_path, examples, tally):
    @run_examples(examples, tally, st.data(), meshes(), st.sampled_from(["face", "polygon", "vertex", "edge"]), st.sampled_from([".txt", ".npy"]))
    def run(data, made, kind, suffix):
        vertices, polygons = made
        faces = fans(polygons)
        mesh = Mesh(vertices, np.array(faces), None, np.array(of_each(range(len(polygons)), polygons)), "a.off")
        edges = {}
        for face in faces:
            for ends in zip(face, face[1:] + face[:1], strict=True):
                edges.setdefault(tuple(sorted(ends)), len(edges))
        count = {"face": len(faces), "polygon": len(polygons), "vertex": len(vertices), "edge": len(edges)}[kind]
        label = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        write_labels(tmp_path / f"a{suffix}", np.array(label))
        votes = []                                              # of each polygon
        for number, p in enumerate(polygons):
            own = [i for i, polygon in enumerate(of_each(range(len(polygons)), polygons)) if polygon == number]
            if kind == "polygon" or count == len(polygons) and kind == "face":
                votes.append([label[number]])
            elif kind == "face":
                votes.append([label[i] for i in own])
            elif kind == "vertex":
                votes.append([label[i] for i in set(p)])
            else:
                votes.append([label[edges[tuple(sorted(e))]] for i in own for e in zip(faces[i], faces[i][1:] + faces[i][:1], strict=True)])
        # of equally many the smallest; 3 is unlabelled, so not it
        expected = of_each([max(sorted(set(values)), key=values.count) for values in votes], polygons)
        found = read_labels(tmp_path / f"a{suffix}", mesh, 3, ignore_labels=[3], kind=kind)
        assert found.tolist() == [IGNORE_INDEX if value == 3 else value for value in expected]


@examples
def test_made_clouds_come_back(tmp_path, examples, tally):
    @run_examples(examples, tally, st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(["a.npz", "a.npy", "rows.npy", "a.ply", "folder"]))
    def run(seed, count, name):
        rng, path = np.random.default_rng(seed), tmp_path / name
        coord = rng.uniform(-1, 1, (count, 3)).astype(np.float32) * np.float32(10.0 ** rng.integers(-3, 4))
        color, label = rng.integers(0, 256, (count, 3)).astype(np.uint8), rng.integers(-1, 300, count)
        if name == "a.npz":
            np.savez_compressed(path, xyz=coord, rgb=color, labels=label.astype(np.int16))
        elif name == "a.npy":
            np.save(path, np.asfortranarray(np.hstack([coord, color, label[:, None]])))
        elif name == "rows.npy":
            rows = np.zeros(count, [("z", "f4"), ("label", "f8"), ("y", ">f4"), ("x", "f4"), ("blue", "u1"), ("red", "u1"), ("green", "u1")])
            for i, column in enumerate("xyz"):
                rows[column], rows[("red", "green", "blue")[i]] = coord[:, i], color[:, i]
            rows["label"] = label
            np.save(path, rows)
        elif name == "a.ply":
            write_cloud_ply(path, coord, color, label)
        else:
            shutil.rmtree(path, ignore_errors=True)
            write_cloud(path, coord=coord, color=color, segment=label)
        cloud = read_cloud(path)
        np.testing.assert_array_equal(cloud.coord, coord)
        np.testing.assert_array_equal(cloud.label, label)
        if color.max() > 1 or cloud.color.dtype == np.uint8:    # else taken as 0..1, with a warning
            np.testing.assert_array_equal(cloud.color, color)


# --- settings and command lines -------------------------------------------------------------------------------------------

SECTIONS = [f"{section}.{key}" for section, keys in train_sonata.DEFAULTS.items() if isinstance(keys, dict) for key in keys]
VALUE = st.lists(st.sampled_from(["1", "-1", "0.5", "1e-3", "nan", "1e400", "true", "no", "null", "[", "]", "{", "}", ",", ": ", "a", "'", '"', "&a ", "*a", "!!int ",
                                  "!!python/name:os.system ", "2024-01-31", " ", "\n", "\0", "\x1b", "\ud800", "é", "- ", "? ", "| ", "%", "9" * 50]), max_size=5).map("".join)


@examples
def test_overrides(examples, tally):
    base = override_config({"data": {"root": "here"}}, train_sonata.DEFAULTS, ["model.num_classes=3"])

    @run_examples(examples, tally, st.sampled_from([*SECTIONS, "data", "datas.root", "", ".", "model.encoder.enc_depths"]), st.sampled_from(["=", "", "==", " = "]), VALUE)
    def run(name, equals, value):
        with limited(MEGABYTES):
            try:
                config = override_config(base, train_sonata.DEFAULTS, [name + equals + value])
            except ValueError as error:
                assert len(str(error).splitlines()) == 1 and "override" in str(error)
                assert "--debug shows" not in user_message(error)
                return
        assert override_config(config, train_sonata.DEFAULTS, []) == config


@examples
def test_command_lines(examples, tally, capsys):
    flags = ["--seed", "--epochs", "--lr", "--image-size", "--image_paths", "--mask-paths", "--num-classes", "--output-dir", "--resume", "--amp-dtype", "--devise", "--",
             "--validate", "-h2", "data.root=x", "--image-paths=a", "--seed=", "--help"]

    @run_examples(examples, tally, st.lists(st.one_of(st.sampled_from(flags), VALUE.filter(lambda text: "\0" not in text)), max_size=8))
    def run(argv):
        with limited(MEGABYTES):
            try:
                train_upernet_head.parse_args(argv)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
            except SystemExit as stop:
                text = capsys.readouterr().err
                assert stop.code == 0 and "--help" in argv or stop.code == 2 and text.startswith("error: "), text


# --- algorithms -----------------------------------------------------------------------------------------------------------

FEATURES = [("corners", "normal", "area", "angles", "curvature", "dihedral", "ground", "centroid"), ("normal", "hks"), ("plane", "part", "height")]


@examples
def test_meshes_become_tokens(tmp_path, examples, tally):
    """Whatever the mesh: all numbers finite, and every face in exactly one place."""
    @run_examples(examples // 2, tally, meshes(most=40), st.sampled_from(["bisection", "connected", "fps"]), st.integers(1, 9), st.booleans(), st.integers(0, 99),
                  st.sampled_from(FEATURES), st.sampled_from([None, 10.0]))
    def run(made, clustering, size, fixed, seed, features, unit):
        path = tmp_path / "a.off"
        path.write_bytes(off_file(*made))
        spec = MeshSpec(features, faces_per_cluster=size, n_clusters=size if fixed else None, clustering=clustering, unit=unit)
        changes = Augmentation("so3", scale_range=(0.7, 1.3), deformation=0.05, noise_std=0.1, flip_probability=0.5, recluster=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            for augmentation in (Augmentation(), changes):
                item = MeshDataset([path], None, spec, augmentation=augmentation, seed=seed)[0]
                assert item["features"][item["mask"]].isfinite().all() and item["centroid"].isfinite().all() and (item["area"] >= 0).all()
                assert sorted(item["face_index"][item["mask"]].tolist()) == list(range(len(fans(made[1]))))


@examples
def test_metrics_equal_scikit_learn(examples, tally):
    @run_examples(examples, tally, st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 60))
    def run(seed, num_classes, count):
        rng = np.random.default_rng(seed)
        label, pred = rng.integers(-1, num_classes, count), rng.integers(0, num_classes, count)
        label[label < 0] = IGNORE_INDEX
        confusion = ConfusionMatrix(num_classes)
        for part in np.array_split(np.arange(count), 3):
            confusion.update(torch.from_numpy(pred[part]), torch.from_numpy(label[part]))
        metrics, keep = segmentation_metrics(confusion.matrix()), label != IGNORE_INDEX
        label, pred = label[keep], pred[keep]
        present = sorted({*label, *pred})
        assert metrics["present"].tolist() == [c in present for c in range(num_classes)]
        if len(label):
            every = {"average": None, "labels": present, "zero_division": 0}
            np.testing.assert_allclose(metrics["iou"][present], sklearn.metrics.jaccard_score(label, pred, **every))
            np.testing.assert_allclose(metrics["f1"][present], sklearn.metrics.f1_score(label, pred, **every))
            assert metrics["overall_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(label, pred))
            assert metrics["mean_accuracy"] == pytest.approx(np.mean([(pred[label == c] == c).mean() for c in {*label}]))
        else:
            assert np.isnan(metrics["miou"])


@examples
def test_voxels_hold_every_point_once(examples, tally):
    @run_examples(examples, tally, st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([0.01, 0.3, 7.0]), st.sampled_from([0.0, -5.0, 4e5]))
    def run(seed, count, grid_size, offset):
        rng = np.random.default_rng(seed)
        coord = (rng.integers(-20, 20, (count, 3)) * 0.1 + offset).astype(np.float32)
        voxels = voxelize(coord, grid_size)
        assert sorted(voxels.order) == list(range(count)) and voxels.count.sum() == count and voxels.grid_coord.min() == 0
        assert len(np.unique(voxels.grid_coord, axis=0)) == len(voxels.grid_coord)
        cell = np.floor(coord.astype(np.float64) / grid_size).astype(np.int64)
        np.testing.assert_array_equal(voxels.grid_coord[voxels.inverse], cell - cell.min(0))
        np.testing.assert_array_equal(voxels.inverse[representatives(voxels, rng)], np.arange(len(voxels.count)))
        assert set(np.concatenate(list(fragments(voxels)))) == set(range(count))


@examples
def test_sparse_convolution_equals_a_dense_one(examples, tally):
    @run_examples(examples, tally, st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1, 3, 5]), st.booleans())
    def run(seed, count, kernel, dense):
        generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(2 * 5**3, generator=generator)[:count]
        scene, grid = place // 125, torch.stack([place % 125 // 25, place % 25 // 5, place % 5], 1)
        conv, x = SubMConv3d(2, 3, kernel).double(), torch.randn(count, 2, dtype=torch.float64, generator=generator)
        volume = torch.zeros(2, 2, 5, 5, 5, dtype=torch.float64)
        volume[scene, :, grid[:, 0], grid[:, 1], grid[:, 2]] = x
        expected = torch.nn.functional.conv3d(volume, conv.weight.permute(0, 4, 1, 2, 3), conv.bias, padding=kernel // 2)
        found = conv(x, neighbour_table(grid.int(), scene, kernel, dense))
        torch.testing.assert_close(found, expected[scene, :, grid[:, 0], grid[:, 1], grid[:, 2]])


@examples
def test_postprocessing_keeps_to_the_classes_there_are(examples, tally):
    @run_examples(examples, tally, st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.sampled_from([0, 3, 5]), st.sampled_from([0, 3, 7]),
                  st.integers(0, 9))
    def run(seed, height, width, num_classes, side, mode, min_area):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, num_classes, (height, width)).astype(np.uint8)
        before = label.copy()
        changed = morphology(label, num_classes, opening=side, closing=side, closing_order=range(num_classes), mode=mode, min_area=min_area)
        assert changed.shape == label.shape and changed.dtype == label.dtype and set(changed.ravel()) <= set(label.ravel())
        np.testing.assert_array_equal(label, before)
        probability = torch.from_numpy(rng.dirichlet(np.full(num_classes, 0.1), (height, width))).permute(2, 0, 1).float()
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
        refined = crf_refine(probability, image, smoothness=1.0, radius=1 + seed % 3, iterations=2, shrink=1 + seed % 2)
        assert refined.shape == probability.shape and (refined >= 0).all() and torch.allclose(refined.sum(0), torch.ones(height, width))
