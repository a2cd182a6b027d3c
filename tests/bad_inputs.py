"""What users feed the scripts by mistake or by malice, and the one line each gets: the table of docs/bad_inputs.md.

    python -m tests.bad_inputs > docs/bad_inputs.md

A case is refused with exit status 2 and one line `error: ...` that holds `place` (file, key, flag, value) and `remedy`,
or, where it has a `check`, accepted, because it is odd and yet right. tests/test_bad_inputs.py runs them all.
"""

import importlib
import io
import os
import pickle
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from models.pmt import PMTSegmenter
from models.resnet import ENCODERS
from tests import tiny_clouds, tiny_meshes
from tests.tiny_heads import SMALL, write_backbone
from tests.tiny_images import COLORS, write_classes, write_pictures

CPU = ["--device", "cpu", "--num-workers", "0"]
RUN = ["--output-dir", "out", *CPU, "--limit-batches", "1"]
MESH, CLOUD, IMAGE = "train/mesh_00.obj", "train/cloud_000.npz", "images/train/picture_000.png"
LABELS, MASK = "train/mesh_00.txt", "masks/train/picture_000.png"


class Case(NamedTuple):
    name: str                                   # what is wrong, for people
    script: str
    kind: str                                   # heading in the document
    make: Callable[[Path], list[str]]           # fills an empty folder -> the arguments, with paths as seen from there
    place: str                                  # the line holds this ...
    remedy: str                                 # ... and this; of an accepted case: what comes of it
    check: Callable[[Path, object], bool] | None = None        # accepted: (folder, what main returned) -> as it should be


# -- good data, one small folder a kind --------------------------------------------------------------------------------

def mesh_base(folder: Path) -> None:
    for split, count, first in (("train", 3, 0), ("val", 1, 100), ("test", 1, 200)):
        tiny_meshes.write_set(folder / split, count, first)
    config = {"paths": {"mesh_dir": "train", "val_mesh_dir": "val", "cache_dir": "cache"},
              "model": {"n_classes": 3, "features": ["centroid", "normal", "area"], "embedding_dim": 16, "num_heads": 2,
                        "num_attention_blocks": 1, "faces_per_cluster": 16},
              "training": {"epochs": 1, "batch_size": 2}, "logging": {"tensorboard": False}}
    jepa = {**config, "model": {**config["model"], "num_attention_blocks_predictor": 1}, "monitor": {"stop": False}}
    config["paths"] = {**config["paths"], "test_mesh_dir": "test"}
    config["data"] = {"class_names": tiny_meshes.CLASSES}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "jepa.yaml").write_text(yaml.safe_dump(jepa))


def textured_base(folder: Path) -> None:
    mesh_base(folder)
    for split in ("train", "val"):
        shutil.rmtree(folder / split)
        tiny_meshes.write_textured_set(folder / split, 2)
    change_yaml(folder, {"model": {"n_classes": 2, "use_texture": True, "texture_embed_dim": 8}, "data": {"class_names": []}})


def cloud_base(folder: Path) -> None:
    for split, count, first in (("train", 3, 0), ("val", 1, 100), ("test", 1, 200)):
        tiny_clouds.write_clouds(folder / split, count, first, points=120)
    tiny_clouds.write_classes(folder)
    tiny_clouds.write_config(folder / "config.yaml", Path("."), data={"root": ".", "grid_size": 0.05, "test": "test"},
                             training={"use_pretrained": False, "epochs": 1, "eval_epochs": 1, "batch_size": 2},
                             paths={"cache_dir": "cache"})
    tiny_clouds.write_encoder(folder / "encoder.pth")


def image_base(folder: Path) -> None:
    for split, count, first in (("train", 4, 0), ("val", 1, 100), ("test", 1, 200)):
        write_pictures(folder / split, count, first)
        for kind in ("images", "masks"):
            (folder / kind).mkdir(exist_ok=True)
            (folder / split / kind).rename(folder / kind / split)
        (folder / split).rmdir()
    write_classes(folder / "classes.json")
    write_backbone(folder / "backbone.pth")
    config = {"dataset": {"root": ".", "num_classes": 3, "image_size": 64, "cache_dir": "cache"}, "model": {"backbone": "resnet18"},
              "training": {"epochs": 1, "batch_size": 2, "num_workers": 0}, "logging": {"tensorboard": False}}
    prototype = {"dataset": {"root": ".", "window_size": [41, 49], "cache_dir": "cache"},
                 "model": {"num_classes": 3, "prototype_shape": [6, 8, 1, 1], "weights": "random", "n_blocks": [1, 1, 1, 1],
                           "base_width": 8, "freeze_bn": False},
                 "training": {"steps": [2, 2, 2], "accumulate": 1}, "evaluation": {"interval": 2}, "logging": {"tensorboard": False}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "prototype.yaml").write_text(yaml.safe_dump(prototype))


HEAD = ["--image-paths", "images/train", "--mask-paths", "masks/train", "--num-classes", "3", "--classes", "classes.json",
        "--backbone", "tiny", "--backbone-weights", "random", "--image-size", "64", "--batch-size", "2", "--epochs", "1",
        "--cache-dir", "cache"]
START = {"train_downstream.py": (mesh_base, ["config.yaml", *RUN]), "train_jepa.py": (mesh_base, ["jepa.yaml", *RUN]),
         "train_sonata.py": (cloud_base, ["config.yaml", *RUN]), "train_segmentation.py": (image_base, ["config.yaml", *RUN]),
         "train_prototype.py": (image_base, ["prototype.yaml", *RUN]),
         **{f"{name}.py": (image_base, [*HEAD, *SMALL[name], *RUN]) for name in SMALL}}

PHOTOGRAPHS = ["--image-paths", "images/train", "--mask-paths", "masks/train", "--output-dir", "out", "--device", "cpu"]
START["inspect_data.py"] = (image_base, PHOTOGRAPHS)


@cache
def workshop() -> tempfile.TemporaryDirectory:
    """Where the good data are kept until the process ends."""
    return tempfile.TemporaryDirectory(prefix="bad_inputs_")


@cache
def base(make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, made once."""
    folder = Path(tempfile.mkdtemp(dir=workshop().name))
    make(folder)
    return folder


@cache
def checkpoint(script: str) -> Path:
    """model_last.pth of a run of one step."""
    folder = Path(tempfile.mkdtemp(dir=workshop().name))
    make, argv = START[script]
    shutil.copytree(base(make), folder, dirs_exist_ok=True)
    run_in(folder, script, [*argv, *(["--validate", "--val-share", "0.25"] if "head" in script else [])])
    return folder / "out" / "model" / "model_last.pth"


def run_in(folder: Path, script: str, argv: list[str]):
    """main(argv) of a script with `folder` as the working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(argv)
    finally:
        os.chdir(before)


def start(script: str, edit=None, *more: str, data=None):
    """make() of a case: the script's good data and arguments, then `edit`, then more arguments."""
    def make(folder):
        kind, argv = START[script]
        shutil.copytree(base(data or kind), folder, dirs_exist_ok=True)
        if edit is not None:
            edit(folder)
        return [*argv, *more]
    return make


def trained(script: str, edit=None, *argv: str):
    """make() of a case that reads model.pth, which `script` wrote, beside its data."""
    def make(folder):
        shutil.copytree(base(START[script][0]), folder, dirs_exist_ok=True)
        shutil.copy(checkpoint(script), folder / "model.pth")
        if edit is not None:
            edit(folder)
        return [*argv, "--device", "cpu"]
    return make


def predict(script: str, edit=None, *argv: str):
    return trained(script, edit, "model.pth", "--output", "out", *argv)


def evaluate(script: str, edit=None, *argv: str):
    return trained(script, edit, "model.pth", "--output-dir", "out", *argv)


def export(script: str, edit=None, *argv: str):
    return lambda folder: trained(script, edit, "model.pth", *argv)(folder)[:-2]             # which has no --device


# -- damage ------------------------------------------------------------------------------------------------------------

def put(path: str, content: str | bytes):
    def edit(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return edit


def both(*edits):
    return lambda folder: [edit(folder) for edit in edits]


def cut(path: str, share: float = 0.5):
    return lambda folder: (folder / path).write_bytes((data := (folder / path).read_bytes())[:int(share * len(data))])


def gone(path: str):
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def folder_at(path: str):
    return lambda folder: ((folder / path).unlink(missing_ok=True), (folder / path).mkdir(parents=True))


def link(path: str, to: str):
    return lambda folder: ((folder / path).unlink(missing_ok=True), (folder / path).symlink_to(to))


def move(path: str, to: str):
    return lambda folder: ((folder / to).parent.mkdir(parents=True, exist_ok=True), (folder / path).rename(folder / to))


def swap(path: str, old: str, new: str):
    return lambda folder: (folder / path).write_text((folder / path).read_text().replace(old, new, 1))


def lines(path: str, change):
    """A text file with its list of lines changed."""
    return lambda folder: (folder / path).write_text("\n".join(change((folder / path).read_text().splitlines())) + "\n")


def change_yaml(folder: Path, sections: dict, name: str = "config.yaml") -> None:
    config = yaml.safe_load((folder / name).read_text())
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    (folder / name).write_text(yaml.safe_dump(config))


def array(path: str, **changes):
    """Entries of an .npz replaced (a function: of the old one) or, by None, removed."""
    def edit(folder):
        with np.load(folder / path) as file:
            content = dict(file)
        for name, change in changes.items():
            old = content.pop(name)
            if change is not None:
                content[name] = change(old) if callable(change) else change
        np.savez(folder / path, **content)
    return edit


def picture(path: str, change, **options):
    """A picture file replaced by change(of it), a Pillow image."""
    def edit(folder):
        with Image.open(folder / path) as image:
            image.load()
        change(image).save(folder / path, **options)
    return edit


def entry(path: str, change):
    """A checkpoint's dict changed in place."""
    def edit(folder):
        content = torch.load(folder / path, weights_only=True)
        change(content)
        torch.save(content, folder / path)
    return edit


def at(index, value):
    """An array with one entry replaced; `value` decides the type."""
    def change(old):
        new = old.astype(np.result_type(old, type(value)))
        new[index] = value
        return new
    return change


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds a handful of bytes: a bomb for whoever makes room first."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


class Bomb:
    """Whoever unpickles it writes a file, `executed`, into the working directory."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def object_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def tensors_on_disk(value, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def decoder() -> bytes:
    """A file as PMT's authors release them, of four queries."""
    state = PMTSegmenter(32, 2, 16, 3, num_queries=4).state_dict()
    return tensors_on_disk({"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}})


NPY_BOMB = (header := b"\x93NUMPY\1\0v\0{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,), }") + b" " * (127 - len(header)) + b"\n"
HTML = "<!DOCTYPE html><html><head><title>Access denied</title></head></html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True))

def pickle_bomb() -> bytes:
    return pickle.dumps({"state_dict": Bomb()}, protocol=4)


def spoil(tensors: dict) -> None:
    """NaN into the first weight."""
    next(tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim()).view(-1)[0] = torch.nan


def spoilt_resnet(folder: Path) -> None:
    state = ENCODERS["resnet18"]().state_dict()
    spoil(state)
    torch.save(state, folder / "resnet.pth")


def flipped(path: str):
    """One bit of the largest tensor's bytes changed."""
    def edit(folder):
        with zipfile.ZipFile(folder / path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        data = bytearray((folder / path).read_bytes())
        data[largest.header_offset + 200] ^= 1
        (folder / path).write_bytes(data)
    return edit


def zip_bomb(path: str):
    """An archive as torch.save writes it, but squeezed: zeros, a thousandth of their size."""
    def edit(folder):
        with zipfile.ZipFile(folder / path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.writestr("archive/data/0", bytes(50_000_000))
    return edit


def turned_photo(folder: Path) -> None:
    with Image.open(folder / IMAGE) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.convert("RGB").save((folder / IMAGE).with_suffix(".jpg"), exif=exif)
    (folder / IMAGE).unlink()


def turned_mask(folder: Path) -> None:
    with Image.open(folder / MASK) as mask:
        exif = mask.getexif()
        exif[0x0112] = 6
        mask.save(folder / MASK, exif=exif)


def palette_mask(mask: Image.Image, colors=None) -> Image.Image:
    result = Image.fromarray(np.asarray(mask), "P")
    own = np.random.default_rng(0).permutation(256).repeat(3).reshape(256, 3)
    if colors is not None:
        own[:len(colors)] = colors
    result.putpalette(own.ravel().tolist())
    return result


def colored(mask: Image.Image, colors=COLORS) -> Image.Image:
    """A mask in the colours of its classes; what is unlabelled becomes class 0."""
    ids = np.asarray(mask)
    return Image.fromarray(np.asarray(colors)[np.where(ids == 255, 0, ids)].astype(np.uint8))


def stack_of(path: str):
    """A picture replaced by a TIFF of three pages of it."""
    def edit(folder):
        with Image.open(folder / path) as image:
            image.load()
        image.save((folder / path).with_suffix(".tif"), save_all=True, append_images=[image, image])
        (folder / path).unlink()
    return edit


def twelve_bits(folder: Path) -> None:
    for path in (folder / "images").glob("*/*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path)


def binary_masks(folder: Path) -> None:
    for path in (folder / "masks").glob("*/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 2, 255, 0).astype(np.uint8)).save(path)
    (folder / "two.json").write_text('{"classes": ["a", "b"]}')


def photo_of(mode: str):
    """odd.png (or .tif) in a mode of Pillow's, 40 x 30 pixels."""
    def edit(folder):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
        image.save(folder / ("odd.tif" if mode == "CMYK" else "odd.png"))
    return edit


def photo_labelled(folder: Path, returned) -> bool:
    return Image.open(folder / "out" / "odd.png").size == (40, 30)


def resume(script: str, of: str, edit=None, *more: str):
    """make() of a case that goes on from model.pth, a checkpoint of the script `of`."""
    def make(folder):
        argv = start(script)(folder)
        shutil.copy(checkpoint(of), folder / "model.pth")
        if edit is not None:
            edit(folder)
        return [*argv, "--resume", "model.pth", *more]
    return make


def with_jepa(script: str, edit=None, *more: str):
    """make() of a case that loads jepa.pth, a checkpoint of train_jepa.py."""
    def make(folder):
        argv = start(script)(folder)
        shutil.copy(checkpoint(JEPA), folder / "jepa.pth")
        if edit is not None:
            edit(folder)
        return [*argv, "--pretrained_path", "jepa.pth", *more]
    return make


def with_network(edit, *more: str):
    """make() of a case that starts train_eomt.py from model.pth, a checkpoint of it, without a backbone's weights."""
    def make(folder):
        argv = [word for word in start(EOMT)(folder) if word not in ("--backbone-weights", "random")]
        shutil.copy(checkpoint(EOMT), folder / "model.pth")
        if edit is not None:
            edit(folder)
        return [*argv, "--network-weights", "model.pth", *more]
    return make


def as_differences(content: dict) -> None:
    """The norms of a network as those of differences to one: around 0."""
    for name, tensor in content["model"].items():
        if "norm" in name and name.endswith("weight"):
            tensor -= 1


LINEAR, PMT, EOMT = "train_linear_head.py", "train_pmt_head.py", "train_eomt.py"
DOWN, JEPA, SONATA, M2F, UPER = "train_downstream.py", "train_jepa.py", "train_sonata.py", "train_m2f_head.py", "train_upernet_head.py"
UNET, PROTO, EVAL, PREDICT, EXPORT = "train_segmentation.py", "train_prototype.py", "evaluate.py", "predict.py", "export.py"
LOOK = "inspect_data.py"
S3DIS, SCANNET, VOC, FREE = "scripts/preprocess_s3dis.py", "scripts/preprocess_scannet.py", "scripts/download_voc.py", "scripts/download_datasets.py"


def group(kind: str, *rows: tuple) -> list[Case]:
    """Rows (name, script, make, place, remedy[, check]) of one kind."""
    return [Case(name, script, kind, *rest) for name, script, *rest in rows]


def named(script: str, config: str, edit):
    """make() of a case whose settings file has another name."""
    return lambda folder: [config, *start(script, edit)(folder)[1:]]


def without(script: str, *words: str):
    """make() of a case with some of the arguments left out."""
    return lambda folder: [word for word in start(script)(folder) if word not in words]


SETTINGS = group(
    "Settings files",
    ("no such file; a near name is there", DOWN, start(DOWN, move("config.yaml", "konfig.yaml")), "config.yaml", "did you mean konfig.yaml"),
    ("a folder in its place", SONATA, start(SONATA, folder_at("config.yaml")), "config.yaml", "expected a .yaml"),
    ("a dangling link in its place", UNET, start(UNET, link("config.yaml", "nowhere.yaml")), "config.yaml", "no such settings file"),
    ("a loop of links in its place", UNET, start(UNET, link("config.yaml", "config.yaml")), "config.yaml", "no such settings file"),
    ("another suffix", PROTO, named(PROTO, "prototype.txt", move("prototype.yaml", "prototype.txt")), "prototype.txt", "expected a .yaml"),
    ("an empty file", JEPA, start(JEPA, put("jepa.yaml", "")), "jepa.yaml", "required but not given: paths.mesh_dir"),
    ("a list in place of keys", DOWN, start(DOWN, put("config.yaml", "- a\n- b\n")), "config.yaml", "expected `key: value` lines"),
    ("one line of text", SONATA, start(SONATA, put("config.yaml", "hello\n")), "config.yaml", "expected `key: value` lines"),
    ("tabs for indents", UNET, start(UNET, put("config.yaml", "dataset:\n\troot: .\n")), "config.yaml: not valid YAML: line 2", "cannot start any token"),
    ("a quote that never ends", PROTO, start(PROTO, put("prototype.yaml", 'dataset: {root: "x}\n')), "prototype.yaml: not valid YAML: line", "found unexpected end"),
    ("a Python tag that would run a command", DOWN, start(DOWN, put("config.yaml", "paths: !!python/object/apply:os.mkdir [executed]\n")), "config.yaml: not valid YAML: line 1", "could not determine a constructor"),
    ("a bomb of aliases (billion laughs)", SONATA, start(SONATA, put("config.yaml", LAUGHS)), "config.yaml", "more than 100000 values"),
    ("a list that holds itself", JEPA, start(JEPA, put("jepa.yaml", "paths: &a [*a]\n")), "jepa.yaml", "more than 100000 values"),
    ("1,000 brackets deep", UNET, start(UNET, put("config.yaml", "a: " + "[" * 1_000)), "config.yaml", "nested too deep"),
    ("a key given twice", PROTO, start(PROTO, put("prototype.yaml", "model: {num_classes: 3}\nmodel: {num_classes: 4}\n")), "prototype.yaml: not valid YAML: line 2", "'model' is given twice"),
    ("2 MB of something else", DOWN, start(DOWN, put("config.yaml", "x" * 2_000_000)), "config.yaml", "is it the wrong file?"),
    ("a picture in its place", UNET, start(UNET, put("config.yaml", png_header(4, 4))), "config.yaml: not UTF-8", "wrong file"),
    ("not UTF-8 (Latin-1)", SONATA, start(SONATA, put("config.yaml", "data: {root: Stühle}".encode("latin-1"))), "config.yaml: not UTF-8", "wrong file"),
    ("a date for a text", DOWN, start(DOWN, put("config.yaml", "paths: {mesh_dir: !!timestamp 2024-01-31}\n")), "config.yaml", "no setting"),
    ("JSON that is cut short", DOWN, named(DOWN, "config.json", put("config.json", '{"paths": {"mesh_dir": ')), "config.json: not valid JSON", "line 1"),
    ("TOML that is not valid", JEPA, named(JEPA, "config.toml", put("config.toml", "paths = [\n")), "config.toml", "not valid TOML"),
    ("an unknown key", DOWN, start(DOWN, lambda f: change_yaml(f, {"training": {"epoch": 3}})), "unknown key training.epoch", "did you mean training.epochs"),
    ("an unknown section", SONATA, start(SONATA, lambda f: change_yaml(f, {"optimiser": {"lr": 1}})), "unknown section optimiser", "did you mean optimizer"),
    ("a key of another section", UNET, start(UNET, None, "training.lr=0.1"), "unknown key training.lr", "optimizer.lr"),
    ("a key missing that must be there", DOWN, start(DOWN, swap("config.yaml", "n_classes: 3", "head: mlp")), "config.yaml", "required but not given: model.n_classes"),
    ("text for a number", JEPA, start(JEPA, None, "training.epochs=many"), "training.epochs", "expected an integer, got 'many'"),
    ("a fraction for a whole number", DOWN, start(DOWN, None, "training.epochs=1.5"), "training.epochs", "expected an integer, got 1.5"),
    ("a number in quotes", UNET, start(UNET, put("config.yaml", "dataset: {root: ., num_classes: 3}\noptimizer: {lr: '1e-3'}\n")), "optimizer.lr", "expected a number, got '1e-3'"),
    ("a number for a folder", SONATA, start(SONATA, None, "data.root=12"), "data.root", "put it in quotes"),
    ("true for a number", PROTO, start(PROTO, None, "training.batch_size=true"), "training.batch_size", "expected an integer, got true"),
    ("null for a number", DOWN, start(DOWN, None, "optimizer.learning_rate=null"), "optimizer.learning_rate", "expected a number, got null"),
    ("NaN for a number", SONATA, start(SONATA, None, "optimizer.lr=.nan"), "optimizer.lr", "expected a number, got nan"),
    ("an infinite learning rate", UNET, start(UNET, None, "optimizer.lr=.inf"), "optimizer.lr", "must be a number above 0"),
    ("an infinite learning rate", DOWN, start(DOWN, None, "optimizer.learning_rate=.inf"), "optimizer.learning_rate", "must be a number above 0"),
    ("an infinite learning rate", SONATA, start(SONATA, None, "optimizer.lr=.inf"), "optimizer.lr", "must be a number above 0"),
    ("an infinite learning rate", PROTO, start(PROTO, None, "optimizer.aspp_lr=.inf"), "optimizer.aspp_lr", "must be a number above 0"),
    ("an infinite learning rate", JEPA, start(JEPA, None, "optimizer.learning_rate=.inf"), "optimizer.learning_rate", "must be a number above 0"),
    ("a negative learning rate", DOWN, start(DOWN, None, "optimizer.learning_rate=-0.1"), "optimizer.learning_rate", "must be a number above 0"),
    ("a negative learning rate", SONATA, start(SONATA, None, "optimizer.lr=-0.1"), "optimizer.lr", "must be a number above 0"),
    ("a negative learning rate", PROTO, start(PROTO, None, "optimizer.backbone_lr=-0.1"), "optimizer.backbone_lr", "must be a number above 0"),
    ("a negative learning rate", JEPA, start(JEPA, None, "optimizer.learning_rate=-0.1"), "optimizer.learning_rate", "must be a number above 0"),
    ("a complete section as one number", JEPA, start(JEPA, lambda f: put("jepa.yaml", "model: 3\npaths: {mesh_dir: train}\n")(f)), "jepa.yaml: model", "expected a section"),
    ("no epochs", DOWN, start(DOWN, None, "training.epochs=0"), "training.epochs", "or 1 epoch and more"),
    ("a dropout of 2", UNET, start(UNET, None, "model.dropout=2"), "model.dropout", "from 0 to 1"),
    ("a misspelt choice", UNET, start(UNET, None, "scheduler.name=cosin"), "scheduler.name", "did you mean cosine"),
    ("an unknown feature", DOWN, start(DOWN, None, "model.features=[normals]"), "model.features", "did you mean normal"),
    ("a feature twice", SONATA, start(SONATA, None, "data.features=[coord, coord]"), "data.features", "each named once"),
    ("a width that is not the features'", DOWN, start(DOWN, None, "model.feature_dim=9"), "model.feature_dim=9", "feature_dim may be left out"),
    ("a width no head can share", DOWN, start(DOWN, None, "model.embedding_dim=17"), "embedding_dim", "num_heads"),
    ("a width of a billion", DOWN, start(DOWN, None, "model.embedding_dim=1000000000"), "out of memory", "lower"),
    ("crops of a billion pixels", UNET, start(UNET, None, "dataset.image_size=1000000000"), "out of memory", "lower"),
    ("class names for other classes", DOWN, start(DOWN, None, "model.n_classes=5"), "data.class_names has 3 entries", "give one per class"),
    ("no classes", SONATA, start(SONATA, None, "model.num_classes=0"), "model.num_classes", "expected a number from 1"),
    ("more classes than a mask can hold", UNET, start(UNET, None, "dataset.num_classes=300"), "300 classes", "dataset.ignore_label"),
    ("a share of 0 for a class", DOWN, start(DOWN, None, "class_weights.class_percentages=[0, 50, 50]"), "class_percentages", "small value"),
    ("two test sets", DOWN, start(DOWN, None, "data.test_split=[mesh_00]"), "data.test_split and paths.test_mesh_dir", "give one of them"),
    ("upright features of meshes turned about", DOWN, start(DOWN, None, "model.features=[ground]", "augmentation.mode=so3"), "ground", "set augmentation.mode to z or none"),
    ("upright features of meshes turned about", JEPA, start(JEPA, None, "model.features=[normal, ground]", "augmentation.mode=so3"), "the feature ground", "set augmentation.mode to z or none"),
    ("heights of meshes turned about", DOWN, start(DOWN, None, "model.features=[height]", "augmentation.mode=so3"), "the feature height", "set augmentation.mode to z or none"),
    ("a range the wrong way round", JEPA, start(JEPA, None, "masking.target_scale=[0.5, 0.1]"), "target_scale", "expected"),
    ("a range of three numbers", UNET, start(UNET, None, "augmentations.scale_range=[1, 2, 3]"), "scale_range", "[lowest, highest]"),
    ("a crop of three sides", UNET, start(UNET, None, "dataset.image_size=[1, 2, 3]"), "dataset.image_size=[1, 2, 3]", "expected [height, width]"),
    ("voxels of no size", SONATA, start(SONATA, None, "data.grid_size=0"), "data.grid_size=0", "expected a number above 0"),
    ("prototypes that classes cannot share", PROTO, start(PROTO, None, "model.prototype_shape=[7, 8, 1, 1]"), "prototype_shape", "class"),
    ("two phases for three", PROTO, start(PROTO, None, "training.steps=[1, 2]"), "training.steps", "three"),
    ("weights for other classes", UNET, start(UNET, None, "losses.class_weights=[1, 2]"), "losses.class_weights: 2 numbers", "give one per class"),
    ("weights for other classes", PROTO, start(PROTO, None, "loss.class_weights=[1, 2]"), "loss.class_weights: 2 numbers", "give one per class"),
    ("weights below 0", PROTO, start(PROTO, None, "loss.class_weights=[1, -2, 1]"), "loss.class_weights", "expected finite numbers from 0"),
    ("losses that are all off", UNET, start(UNET, None, "losses.ce=0"), "no loss with a weight above 0", "choose from ce, focal"),
    ("an argument the network does not have", SONATA, start(SONATA, None, "model.encoder.depth=3"), "depth", "did you mean"),
    ("heads that channels cannot share", SONATA, start(SONATA, None, "model.encoder.enc_num_head=[3, 2, 3]"), "enc_channels 16", "multiple of 3 heads"),
    ("a number without its name", DOWN, start(DOWN, None, "training.epochs"), "override 'training.epochs'", "expected section.key=value"),
    ("a bomb on the command line", DOWN, start(DOWN, None, "model={a: &a [x,x,x,x,x,x,x,x], b: &b [" + "*a," * 500 + "], c: [" + "*b," * 500 + "]}"), "override 'model=", "more than 100000 values"),
    ("deep brackets on the command line", DOWN, start(DOWN, None, "model=" + "[" * 1_000), "override 'model=", "nested too deep"),
    ("a byte order mark (Windows)", JEPA, start(JEPA, lambda f: put("jepa.yaml", b"\xef\xbb\xbf" + (f / "jepa.yaml").read_bytes())(f)), "", "read as without", lambda f, result: bool(result)),
)

FLAGS = group(
    "Flags",
    ("a misspelt flag", DOWN, start(DOWN, None, "--sead", "1"), "unknown flag --sead", "did you mean --seed"),
    ("a setting with hyphens", SONATA, start(SONATA, None, "--optimizer.lr=1"), "unknown flag --optimizer.lr", "write optimizer.lr=VALUE without hyphens"),
    ("text for a number", M2F, start(M2F, None, "--epochs", "ten"), "--epochs", "invalid int value: 'ten'"),
    ("a value that is not a choice", UPER, start(UPER, None, "--scheduler", "linear"), "--scheduler", "choose from"),
    ("a flag without its value", PROTO, start(PROTO, None, "--seed"), "--seed", "expected one argument"),
    ("no arguments at all", PREDICT, lambda f: [], "arguments are required", "--help"),
    ("loader processes below none", UNET, start(UNET, None, "--num-workers", "-1"), "--num-workers", "expected a number from 0"),
    ("batches below none", JEPA, start(JEPA, None, "--limit-batches", "-1"), "--limit-batches", "expected a number from 0"),
    ("a negative seed", DOWN, start(DOWN, None, "--seed", "-1"), "seed", "expected an integer from 0"),
    ("a seed above 64 bits", M2F, start(M2F, None, "--seed", "99999999999999999999999"), "seed", "expected an integer from 0"),
    ("a device that does not exist", SONATA, start(SONATA, None, "--device", "gpu"), "--device", "cuda"),
    ("a GPU that is not there", UPER, start(UPER, None, "--device", "cuda:9"), "--device", "cpu"),
    ("clouds compiled", SONATA, start(SONATA, None, "--compile"), "--compile", "every size of cloud"),
    ("to test what was never trained", UNET, start(UNET, None, "--test-only"), "--test-only needs a checkpoint", "add --resume PATH or --resume auto"),
    ("to test an empty run folder", SONATA, start(SONATA, None, "--test-only", "--resume", "auto"), "--test-only needs a checkpoint", "there is no checkpoint in out/model"),
    ("to go on from a file that is not there", PROTO, start(PROTO, None, "--resume", "out/model/model_last.pth"), "out/model/model_last.pth", "Check the path"),
    ("a checkpoint of Lightning that is not there", UNET, start(UNET, None, "--resume", "runs/last.ckpt"), "runs/last.ckpt: no such file", "--resume auto"),
    ("a flag of other programs for the input", PREDICT, predict(UNET, None, "--images", "photos"), "unknown flag --images", "follow the checkpoint"),
    ("a flag of other programs for the checkpoint", EVAL, evaluate(UNET, None, "--checkpoint", "a.pth"), "unknown flag --checkpoint", "name the checkpoint first"),
    ("to go on from a folder", DOWN, start(DOWN, None, "--resume", "train"), "train", "is a folder. Name a file in it"),
    ("results into a file", DOWN, start(DOWN, put("out", "notes")), "out", "choose another output folder"),
    ("results into a file", JEPA, start(JEPA, put("out", "notes")), "out", "choose another output folder"),
    ("results into a file", M2F, start(M2F, put("out", "notes")), "out", "choose another output folder"),
    ("results into a folder of a file", UNET, start(UNET, put("notes", ""), "--output-dir", "notes/out"), "notes/out", "choose another output folder"),
    ("backbone weights not named", M2F, without(M2F, "--backbone-weights", "random"), "--backbone-weights is missing", "name the official .pth file"),
    ("a misspelt backbone", UPER, start(UPER, None, "--backbone", "dinov3_vits15"), "dinov3_vits15", "did you mean"),
    ("photographs without masks", UPER, without(UPER, "--mask-paths", "masks/train"), "--mask-paths", "belong together"),
    ("a pattern that finds nothing", M2F, start(M2F, None, "--image-paths", "pictures/*.jpg"), "--image-paths pictures/*.jpg", "no image file matches"),
    ("the value of unlabelled is a class", M2F, start(M2F, None, "--ignore-label", "1"), "--ignore-label 1", "--reduce-zero-label"),
    ("a misspelt way to weigh classes", UPER, start(UPER, None, "--class-weights", "median"), "--class-weights=median", "median_frequency"),
    ("weights for other classes", UPER, start(UPER, None, "--class-weights", "1,2"), "--class-weights: 2 numbers", "give one per class"),
    ("a learning rate of NaN", UPER, start(UPER, None, "--lr", "nan"), "--lr", "a number above 0"),
    ("a share of 90 % for validation", UPER, start(UPER, None, "--val-share", "0.9"), "--val-share", "from 0 to 0.5"),
    ("a cache of views that change", M2F, start(M2F, None, "--cache-features"), "--cache-features", "--augment windows"),
    ("a stride of 0", M2F, start(M2F, None, "--eval-stride", "0"), "--eval-stride 0", "a stride from 1"),
    ("a crop that is too small", M2F, start(M2F, None, "--image-size", "32"), "--image-size", "from 64"),
    ("a crop that patches do not fill", LINEAR, start(LINEAR, None, "--image-size", "72"), "--image-size 72", "must be a multiple of 16"),
    ("a number of blocks that is not a choice", LINEAR, start(LINEAR, None, "--layers", "2"), "--layers", "choose from"),
    ("blocks that the backbone does not have", PMT, start(PMT, None, "--taps", "0", "4"), "--taps 0 4", "from 0 to 3"),
    ("blocks in another order", PMT, start(PMT, None, "--taps", "2", "0"), "--taps 2 0", "in their order"),
    ("heads that cannot share the width", M2F, start(M2F, None, "--hidden-dim", "30"), "--hidden-dim", "multiple"),
    ("features of a backbone that is trained", EOMT, start(EOMT, None, "--augment", "windows", "--cache-features"), "--cache-features", "leave the flag out"),
    ("a crop that is not a multiple of the patch", EOMT, start(EOMT, None, "--image-size", "72"), "--image-size 72", "multiple of 16"),
    ("more blocks with queries than there are", EOMT, start(EOMT, None, "--joint-blocks", "5"), "--joint-blocks 5", "has 4 blocks"),
    ("more frozen blocks than there are", EOMT, start(EOMT, None, "--freeze-blocks", "5"), "--freeze-blocks 5", "has 4 blocks"),
    ("warm-ups longer than the run", EOMT, start(EOMT, None, "--head-warmup", "0.6", "--encoder-warmup", "0.5"), "--encoder-warmup", "from 0 to 0.3"),
    ("a layer decay that grows", EOMT, start(EOMT, None, "--layer-decay", "1.2"), "--layer-decay", "from 0.01 to 1"),
    ("random weights under a trained network", EOMT, start(EOMT, None, "--network-weights", "model.pth"), "--backbone-weights random", "leave one of them out"),
    ("a phase whose turn it is not", PROTO, start(PROTO, None, "--phase", "2"), "--phase 2", "--resume"),
    ("a data set and a split at once", EVAL, evaluate(DOWN, None, "--split", "val", "--data-dir", "test"), "--split and --data-dir", "name one of them"),
    ("labels without data", EVAL, evaluate(DOWN, None, "--label-dir", "test"), "--label-dir", "labels of --data-dir"),
    ("a batch of none", EVAL, evaluate(DOWN, None, "--batch-size", "0"), "--batch-size", "from 1"),
    ("masks not named", EVAL, evaluate(M2F, None, "--data-dir", "images/test"), "--label-dir is needed", "folder of the masks"),
    ("nothing to predict", PREDICT, predict(DOWN, None), "INPUT", "required"),
    ("an input that is not there", PREDICT, predict(DOWN, None, "scans"), "scans", "no such file or folder"),
    ("an empty folder for meshes", PREDICT, predict(DOWN, folder_at("scans"), "scans"), "scans", "no mesh in this folder"),
    ("an empty folder for photographs", PREDICT, predict(UNET, folder_at("scans"), "scans"), "scans: nothing in this folder", "name another"),
    ("an empty folder for clouds", PREDICT, predict(SONATA, folder_at("scans"), "scans"), "scans", "cloud"),
    ("two inputs of one name", PREDICT, predict(DOWN, None, "train/mesh_00.obj", "test"), "would both write mesh_00", "two folders"),
    ("results beside the input", PREDICT, predict(UNET, None, "images/test", "--output", "images/test"), "--output images/test holds the input", "use another folder"),
    ("a page to turn a photograph in", PREDICT, predict(UNET, None, "images/test", "--html"), "--html", "leave it out"),
    ("reasons of a network that has none", PREDICT, predict(UNET, None, "images/test", "--explain", "1,1"), "--explain", "train_prototype.py"),
    ("text for a pixel", PREDICT, predict(PROTO, None, "images/test", "--explain", "here"), "--explain", "invalid pixel value"),
    ("a pixel outside of the photograph", PREDICT, predict(PROTO, None, "images/test", "--explain", "500,500"), "pixel 500,500 is not on the photograph", "correct --explain"),
    ("a format of other data", PREDICT, predict(UNET, None, "images/test", "--labels", "txt"), "--labels", "expected one of auto, png, npy, tif"),
    ("probabilities of a mesh", PREDICT, predict(DOWN, None, "test", "--confidence"), "--confidence", "leave it out"),
    ("clouds in folders inside", PREDICT, predict(SONATA, None, "test", "--recursive"), "--recursive", "name the folders"),
    ("photographs in folders inside alone", PREDICT, predict(UNET, None, "images"), "images: nothing in this folder", "--recursive"),
    ("a limit of no pixels", PREDICT, predict(UNET, None, "images/test", "--max-pixels", "0"), "--max-pixels", "expected a number from 1"),
    ("a setting the model does not have", PREDICT, predict(SONATA, None, "test", "evaluation.precice=false"), "evaluation.precice", "did you mean evaluation.precise"),
    ("results into a file", PREDICT, predict(UNET, put("out", ""), "images/test"), "out", "choose another output folder"),
    ("results into a file", EVAL, evaluate(SONATA, put("out", "")), "out", "choose another output folder"),
    ("a network of meshes as a file of images", EXPORT, export(DOWN, None, "--output", "net.pt2"), "model.pth: not a network of images", "use predict.py"),
    ("an encoder without classes as a file", EXPORT, export(JEPA, None, "--output", "net.pt2"), "model.pth: train_jepa.py", "no classes"),
    ("a format that is not written", EXPORT, export(UNET, None, "--output", "net.tflite"), "--output net.tflite", "ends in .onnx or .pt2"),
    ("a network into a folder", EXPORT, export(UNET, folder_at("net.pt2"), "--output", "net.pt2"), "--output net.pt2", "name a file"),
    ("a network into a file's folder", EXPORT, export(UNET, None, "--output", "config.yaml/net.pt2"), "config.yaml is a file", "choose another output folder"),
    ("an image of few pixels", EXPORT, export(UNET, None, "--output", "net.pt2", "--size", "64", "32"), "--size", "from 64"),
    ("one side of an image", EXPORT, export(UNET, None, "--output", "net.pt2", "--size", "64"), "--size", "expected 2 arguments"),
    ("a setting the exported network does not have", EXPORT, export(UNET, None, "--output", "net.pt2", "evaluation.sise=64"), "evaluation.sise", "did you mean evaluation.size"),
    ("a name nobody offers", FREE, lambda f: ["imagenet"], "imagenet", "expected one of"),
    ("no data", LOOK, lambda f: ["--output-dir", "out"], "--mesh-dir or --cloud-root", "got none of them"),
    ("two kinds of data", LOOK, start(LOOK, None, "--mesh-dir", "train"), "got --image-paths and --mesh-dir", "expected"),
    ("photographs without masks", LOOK, without(LOOK, "--mask-paths", "masks/train"), "--image-paths and --mask-paths belong together", "only one"),
    ("a glob without matches", LOOK, start(LOOK, None, "--val-image-paths", "x/*.jpg", "--val-mask-paths", "masks/train"), "--val-image-paths x/*.jpg", "no image file matches"),
    ("masks of other names", LOOK, start(LOOK, None, "--mask-paths", "masks/test"), "has a partner of the same name in --mask-paths", "--mask-suffix"),
    ("a folder of meshes that is not there", LOOK, lambda f: ["--mesh-dir", "gone", "--output-dir", "out"], "gone: no such folder of meshes", "check the path"),
    ("a folder without clouds", LOOK, lambda f: [folder_at("clouds")(f), "--output-dir", "out", "--cloud-root", "clouds"][1:], "clouds: no clouds", "or named by splits.json"),
    ("a label map without values", LOOK, start(LOOK, None, "--label-map", "object"), "label map 'object'", "VALUE:CLASS"),
    ("a class file that is none", LOOK, start(LOOK, put("names.json", "{}"), "--classes", "names.json"), "names.json", "expected"),
    ("no minutes", LOOK, start(LOOK, None, "--minutes", "0"), "--minutes", "expected a number from 1"),
    ("results into a file", LOOK, start(LOOK, put("out", "")), "out", "choose another output folder"),
)


# A quad as two triangles, in pieces for odd files
QUAD = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0.5\n"
PLY = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"

LABELLED_PLY = PLY.replace("end_header", "property int label\nend_header") + "0 0 0\n1 0 0\n0 1 0\n3 0 1 2 0\n"
STL = "".join(f"solid {name}\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\nendsolid {name}\n" for name in "ab")


def mesh_file(content: str | bytes, suffix: str = ".obj"):
    """make() of a case: predict.py on one file `odd`."""
    return predict(DOWN, put(f"odd{suffix}", content), f"odd{suffix}")


def glb_of(tree: str) -> bytes:
    """A GLB with this JSON and nothing else."""
    return struct.pack("<4s3I4s", b"glTF", 2, 20 + len(tree), len(tree), b"JSON") + tree.encode()


def labelled(folder: Path) -> np.ndarray:
    """What predict.py wrote for `odd`."""
    return np.loadtxt(folder / "out" / "odd.txt", ndmin=1)


def faces_labelled(count: int):
    return lambda folder, returned: len(labelled(folder)) == count and set(labelled(folder)) <= {0, 1, 2}


MESHES = group(
    "Meshes",
    ("no such folder", DOWN, start(DOWN, None, "paths.mesh_dir=trian"), "trian: no such folder of meshes", "check the path"),
    ("a folder without meshes", JEPA, start(JEPA, both(gone("train"), folder_at("train"))), "train: no mesh in this folder", "looked for .obj .ply"),
    ("an OBJ of 0 bytes", DOWN, start(DOWN, put(MESH, "")), f"{MESH}: no faces", "cut short"),
    ("an OBJ cut in the middle of a line", DOWN, start(DOWN, put(MESH, QUAD + "f 1 2 3\nf 1 3")), f"{MESH}: line 6", "three or more"),
    ("an OBJ without its last vertices", JEPA, start(JEPA, put(MESH, "v 0 0 0\nv 1 0 0\nf 1 2 3\n")), f"{MESH}: line 3", "is the file cut short?"),
    ("a face that names vertex 0", DOWN, start(DOWN, put(MESH, QUAD + "f 0 1 2\n")), f"{MESH}: line 5", "OBJ counts from 1"),
    ("a face that names vertex 10^30", PREDICT, mesh_file(QUAD + f"f 1 2 {10 ** 30}\n"), "odd.obj: line 5", "is the file cut short?"),
    ("a word for a coordinate", DOWN, start(DOWN, put(MESH, "v 0 zero 0\n" + QUAD + "f 1 2 3\n")), f"{MESH}: line 1", "'v x y z'"),
    ("NaN for a coordinate", DOWN, start(DOWN, put(MESH, "v nan 0 0\n" + QUAD + "f 1 2 3\n")), f"{MESH}: 1 of 5 vertices", "repair the file"),
    ("an infinite coordinate", JEPA, start(JEPA, put(MESH, QUAD + "v 0 0 1e999\nf 1 2 3\n")), f"{MESH}: 1 of 5 vertices", "repair the file"),
    ("a binary file that is called OBJ", DOWN, start(DOWN, put(MESH, bytes(range(256)) * 40)), f"{MESH}: no faces", "cut short"),
    ("a picture that is called PLY", PREDICT, mesh_file(png_header(8, 8), ".ply"), "odd.ply: cannot be read as PLY", "cut short or damaged"),
    ("a PLY cut short", PREDICT, mesh_file(PLY + "0 0 0\n1 0 0\n", ".ply"), "odd.ply: cannot be read as PLY", "cut short or damaged"),
    ("a PLY of 10^12 faces in 200 bytes", PREDICT, mesh_file(PLY.replace("face 1\n", "face 1000000000000\n") + "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", ".ply"), "odd.ply: cannot be read as PLY", "cut short or damaged"),
    ("a PLY of 10^12 empty elements", PREDICT, mesh_file(PLY.replace("element vertex", "element nothing 1000000000000\nelement vertex") + "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", ".ply"), "", "passed over", faces_labelled(1)),
    ("a PLY face of infinitely many corners", PREDICT, mesh_file(PLY + "0 0 0\n1 0 0\n0 1 0\ninf 0 1 2\n", ".ply"), "odd.ply: cannot be read as PLY", "cut short or damaged"),
    ("a PLY face of minus three corners", PREDICT, mesh_file(PLY + "0 0 0\n1 0 0\n0 1 0\n-3 0 1 2\n", ".ply"), "odd.ply: cannot be read as PLY", "cut short or damaged"),
    ("a point cloud as a mesh", PREDICT, mesh_file(PLY.replace("face 1\n", "face 0\n") + "0 0 0\n1 0 0\n0 1 0\n", ".ply"), "odd.ply: no faces", "is this a point cloud"),
    ("a PLY without z", PREDICT, mesh_file(PLY.replace("property float z\n", "") + "0 0\n1 0\n0 1\n3 0 1 2\n", ".ply"), "odd.ply: cannot be read as PLY (no vertices with x, y and z)", "damaged"),
    ("an OFF that announces NaN vertices", PREDICT, mesh_file("OFF\nnan 1 0\n0 0 0\n", ".off"), "odd.off", "is the file cut short?"),
    ("an OFF that announces infinitely many", PREDICT, mesh_file("OFF\ninf 1 0\n0 0 0\n", ".off"), "odd.off", "cut short"),
    ("an OFF of a trillion vertices", PREDICT, mesh_file("OFF\n1000000000000 1 0\n0 0 0\n", ".off"), "odd.off", "cut short"),
    ("an OFF without its header", PREDICT, mesh_file("3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", ".off"), "odd.off: does not begin with OFF", "convert it"),
    ("an STL of random bytes", PREDICT, mesh_file(bytes(range(200)), ".stl"), "odd.stl", "cut short or damaged"),
    ("an STL of 4 billion triangles in 84 bytes", PREDICT, mesh_file(bytes(80) + b"\xff" * 4, ".stl"), "odd.stl", "cut short or damaged"),
    ("a GLB cut short", PREDICT, mesh_file(b"glTF\2\0\0\0\xff\xff\xff\x7f\x10\0\0\0JSON{}", ".glb"), "odd.glb: cannot be read as GLB", "cut short or damaged"),
    ("a GLB compressed by Draco", PREDICT, mesh_file(glb_of('{"extensionsRequired": ["KHR_draco_mesh_compression"]}'), ".glb"), "odd.glb: needs the extension KHR_draco_mesh_compression", "export it again, uncompressed"),
    ("a GLB whose parts hang in one another", PREDICT, mesh_file(glb_of('{"nodes": [{"children": [1]}, {"children": [0]}], "scenes": [{"nodes": [0]}]}'), ".glb"), "odd.glb: cannot be read as GLB", "node 0 hangs in two places"),
    ("meshes in folders of their own", DOWN, start(DOWN, lambda f: (f / "train").rename(f / "sets") and (f / "train").mkdir() or (f / "sets").rename(f / "train/sets")), "train: no mesh in this folder", "data.recursive=true reads them"),
    ("more clusters than one attention takes", DOWN, start(DOWN, both(put(MESH, "v 0 0 0\nv 1 0 0\nv 0 1 0\n" + "f 1 2 3\n" * 16_385), put(LABELS, "0\n" * 16_385)), "model.faces_per_cluster=1"), f"{MESH}: 16,385 clusters", "set training.clusters_per_batch"),
    ("a suffix nobody knows", PREDICT, mesh_file("x", ".obi"), "odd.obi", "did you mean .obj?"),
    ("a folder that is called mesh.obj", PREDICT, predict(DOWN, folder_at("odd.obj"), "odd.obj"), "odd.obj: no mesh in this folder", "looked for"),
    ("a dangling link", PREDICT, predict(DOWN, link("odd.obj", "nowhere.obj"), "odd.obj"), "odd.obj", "no such file"),
    ("two meshes of one name", DOWN, start(DOWN, put("train/mesh_00.off", "OFF\n")), "mesh_00.obj and mesh_00.off", "keep one"),
    ("no texture coordinates", DOWN, start(DOWN, put(MESH, "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"), data=textured_base), f"{MESH}: line 4", "is the file cut short?"),
    ("a texture that is not a picture", DOWN, start(DOWN, put("train/red_00.png", "not a picture"), data=textured_base), "train/red_00.png", "cannot be read"),
    ("a texture of 10^10 pixels", DOWN, start(DOWN, put("train/red_00.png", png_header(100_000, 100_000)), data=textured_base), "train/red_00.png", "cannot be read"),
    ("a text STL without the end of its last solid", PREDICT, mesh_file(STL.replace("endsolid b\n", ""), ".stl"), "odd.stl: cannot be read as STL", "cut short or damaged"),
    ("a mesh without its library of materials", DOWN, start(DOWN, gone("train/mesh_00.mtl"), data=textured_base), "train/mesh_00", "mesh_00.mtl"),
    ("a mesh without its pictures", DOWN, start(DOWN, both(gone("train/red_00.png"), gone("train/blue_00.png")), data=textured_base), "train/blue_00.png: no such picture", "put it there"),
    ("a mesh with another number of features", PREDICT, predict(DOWN, None, "test", "model.features=[normal]"), "the checkpoint: matched 30/33", "Is the file of this model"),
    ("degenerate faces", PREDICT, mesh_file(QUAD + "f 1 2 3\nf 1 1 2\nf 2 2 2\n"), "", "labelled like any other", faces_labelled(3)),
    ("all vertices in one point", PREDICT, mesh_file("v 1 1 1\n" * 3 + "f 1 2 3\n"), "", "one face, one label", faces_labelled(1)),
    ("an edge of three faces (non-manifold)", PREDICT, mesh_file(QUAD + "v 0 0 1\nf 1 2 3\nf 1 2 4\nf 1 2 5\n"), "", "labelled", faces_labelled(3)),
    ("two bodies in one file", PREDICT, mesh_file(QUAD + "o second\nv 9 9 9\nv 8 9 9\nv 9 8 9\nf 1 2 3\nf 5 6 7\n"), "", "labelled in the order of the file", faces_labelled(2)),
    ("the same face twice", PREDICT, mesh_file(QUAD + "f 1 2 3\nf 1 2 3\nf 3 2 1\n"), "", "labelled", faces_labelled(3)),
    ("a polygon of four corners", PREDICT, mesh_file(QUAD + "f 1 2 3 4\n"), "", "one label a polygon", faces_labelled(1)),
    ("vertices that no face uses", PREDICT, mesh_file(QUAD + "v 1e3 1e3 1e3\nf 1 2 3\n"), "", "labelled", faces_labelled(1)),
    ("extents of 10^30", PREDICT, mesh_file("v 0 0 0\nv 1e30 0 0\nv 0 1e30 0\nf 1 2 3\n"), "", "labelled", faces_labelled(1)),
    ("extents of 10^308", PREDICT, mesh_file("v 0 0 0\nv 1e308 0 0\nv 1e308 1e308 0\nf 1 2 3\n"), "odd.obj: coordinates up to 1e+308", "repair the file"),
    ("Windows line ends and a byte order mark", PREDICT, mesh_file(b"\xef\xbb\xbf" + (QUAD + "f 1 2 3\n").replace("\n", "\r\n").encode()), "", "labelled", faces_labelled(1)),
    ("spaces and other alphabets in names", PREDICT, predict(DOWN, put("mein Stück 漢字/odd.obj", QUAD + "f 1 2 3\n"), "mein Stück 漢字/odd.obj"), "", "labelled", faces_labelled(1)),
    ("a name that is not UTF-8", PREDICT, predict(DOWN, put("odd_\udcff.obj", QUAD + "f 1 2 3\n"), "odd_\udcff.obj"), "", "labelled", lambda f, result: (f / "out" / "odd_\udcff.txt").is_file()),
    ("a loop of folders (links)", PREDICT, predict(DOWN, both(put("scans/odd.obj", QUAD + "f 1 2 3\n"), link("scans/again", "../scans")), "scans"), "", "each mesh once", faces_labelled(1)),
)

LABEL_CASES = group(
    "Labels of meshes",
    ("no label file", DOWN, start(DOWN, gone(LABELS)), f"{MESH}: no labels", "looked in train for mesh_00.txt"),
    ("two label files", DOWN, start(DOWN, put("train/mesh_00.seg", "0\n")), "train/mesh_00.txt and train/mesh_00.seg", "keep one"),
    ("an empty file", DOWN, start(DOWN, put(LABELS, "")), f"{LABELS}: no labels in it", "one label per face"),
    ("one label too few", DOWN, start(DOWN, lines(LABELS, lambda rows: rows[:-1])), f"{LABELS}: ", "did an exporter drop or add"),
    ("one label too many", DOWN, start(DOWN, lines(LABELS, lambda rows: [*rows, "0"])), f"{LABELS}: ", "did an exporter drop or add"),
    ("half of the labels", DOWN, start(DOWN, lines(LABELS, lambda rows: rows[::2])), f"{LABELS}: ", "simplified or changed after labelling"),
    ("a label a vertex", DOWN, start(DOWN, lambda f: put(LABELS, "0\n" * (f / MESH).read_text().count("v "))(f)), f"{LABELS}: ", "label_kind: vertex"),
    ("classes that count from 1", DOWN, start(DOWN, lines(LABELS, lambda rows: [str(int(row) + 1) for row in rows])), f"{LABELS}: unknown label 3", "label_offset: -1"),
    ("255 for unlabelled", DOWN, start(DOWN, lines(LABELS, lambda rows: ["255", *rows[1:]])), f"{LABELS}: unknown label 255 (1 times)", "ignore_labels: [255]"),
    ("a negative label", DOWN, start(DOWN, lines(LABELS, lambda rows: ["-7", *rows[1:]])), f"{LABELS}: unknown label -7", "ignore_labels: [-7]"),
    ("a label of 10^30", DOWN, start(DOWN, lines(LABELS, lambda rows: [str(10 ** 30), *rows[1:]])), f"{LABELS}: ", "labels are class numbers"),
    ("half a class", DOWN, start(DOWN, lines(LABELS, lambda rows: ["0.5", *rows[1:]])), f"{LABELS}: 1 of", "labels are class numbers"),
    ("NaN", DOWN, start(DOWN, lines(LABELS, lambda rows: ["nan", *rows[1:]])), f"{LABELS}: 1 of", "labels are class numbers"),
    ("names in place of numbers", DOWN, start(DOWN, lines(LABELS, lambda rows: [rows[0], "roof", *rows[2:]])), f"{LABELS}: line 2: 'roof'", "labels are integers"),
    ("a binary file that is called .txt", DOWN, start(DOWN, put(LABELS, bytes(range(256)))), f"{LABELS}: line", "labels are integers"),
    ("an array of Python objects, a virus", DOWN, start(DOWN, both(gone(LABELS), put("train/mesh_00.npy", object_array()))), "train/mesh_00.npy", "save it with numpy.save"),
    ("scores in place of labels", DOWN, start(DOWN, both(gone(LABELS), lambda f: np.save(f / "train/mesh_00.npy", np.zeros((80, 3))))), "train/mesh_00.npy: float64 (80, 3)", "one number per face"),
    ("an array cut short", DOWN, start(DOWN, both(gone(LABELS), lambda f: np.save(f / "train/mesh_00.npy", np.zeros(80, int)), cut("train/mesh_00.npy"))), "train/mesh_00.npy", "save it with numpy.save"),
    ("a header of an array of 10^15 numbers", DOWN, start(DOWN, both(gone(LABELS), put("train/mesh_00.npy", NPY_BOMB))), "train/mesh_00.npy", "save it with numpy.save"),
    ("a folder in its place", DOWN, start(DOWN, folder_at(LABELS)), f"{MESH}: no labels", "looked in train"),
    ("labels in a folder that is not there", EVAL, evaluate(DOWN, None, "--data-dir", "test", "--label-dir", "labels"), "test/mesh_00.obj: no labels", "looked in labels"),
    ("labels in the PLY, and a folder of labels that is not there", EVAL, evaluate(DOWN, put("plys/a.ply", LABELLED_PLY), "--data-dir", "plys", "--label-dir", "labels"), "plys/a.ply: no labels; looked in labels (no such folder)", "those in the PLY are read where no other folder is named"),
    ("names in the OBJ, and a folder of labels", EVAL, evaluate(DOWN, None, "data.label_kind=material", "--data-dir", "test", "--label-dir", "train"), "test/mesh_00.obj: data.label_kind=material reads the labels in this file, not those in train", "leave that folder out"),
    ("not one face labelled", DOWN, start(DOWN, lambda f: [lines(str(p.relative_to(f)), lambda rows: ["-100" for _ in rows])(f) for p in f.glob("*/*.txt")]), ": not one face of 1 meshes is labelled", "ignore_labels"),
    ("a property that the PLY has not", DOWN, start(DOWN, both(gone(MESH), put("train/mesh_00.ply", PLY + "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")), "data.label_field=quality"), "train/mesh_00.ply: no labels in it", "a face property quality"),
    ("materials that nobody named", DOWN, start(DOWN, put("val/mesh_00.obj", QUAD + "usemtl roof\nf 1 2 3\n"), "data.label_kind=material"), "val/mesh_00.obj: material 'roof' (1 faces) is none of data.class_names: low, high, cap", "add it there"),
    ("more materials than classes", DOWN, start(DOWN, put(MESH, QUAD + "usemtl roof\nf 1 2 3\n"), "data.label_kind=material", "data.class_names=[]"), "the meshes have 1 names (roof) and model.n_classes=3", "data.class_names"),
    ("a label map of other classes", DOWN, start(DOWN, None, "data.label_map=0:0,1:1"), "data.label_map has 2 classes", "set model.n_classes to 2"),
    ("a label that is not in the map", DOWN, start(DOWN, lines(LABELS, lambda rows: ["9", *rows[1:]]), "data.label_map=0:0,1:1,2:2"), f"{LABELS}: value 9 (1 times) not in the label map", "VALUE:ignore"),
    ("scores in JSON", DOWN, start(DOWN, both(gone(LABELS), put("train/mesh_00.json", '{"scores": [1]}'))), "train/mesh_00.json: expected a list of numbers", '"labels"'),
    ("labels for a probe of too few classes", JEPA, start(JEPA, None, "probe.interval=1", "model.n_classes=2"), "unknown label 2", "known: 0..1"),
    ("a probe that knows no number of classes", JEPA, start(JEPA, None, "probe.interval=1", "model.n_classes=null"), "model.n_classes", "the probe has to know"),
    ("whole numbers as 1.0", DOWN, start(DOWN, lines(LABELS, lambda rows: [f"{row}.0" for row in rows])), "", "read as 1", lambda f, result: result["miou"] >= 0),
)

CLOUD_FILE = "odd.npz"


def cloud_file(name: str = CLOUD_FILE, **arrays):
    """make() of a case: predict.py on one cloud `odd`."""
    def edit(folder):
        np.save(folder / name, arrays["matrix"]) if "matrix" in arrays else np.savez(folder / name, **arrays)
    return predict(SONATA, edit, name, "evaluation.precise=false")


def points_labelled(count: int):
    return lambda folder, returned: np.load(folder / "out" / "odd.npy").shape == (count,)


def random_points(count: int = 40, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).random((count, 3))).astype(np.float64)


def squeezed(path: str):
    """A cloud of a kilobyte that announces 3 GB."""
    def edit(folder):
        with zipfile.ZipFile(folder / path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("coord.npy", bytes(100_000))
            archive.infolist()[0].file_size = 3 << 30
    return edit


CLOUDS = group(
    "Point clouds",
    ("no such folder", SONATA, start(SONATA, None, "data.root=nowhere"), "nowhere: no such folder", "set data.root"),
    ("a misspelt split", SONATA, start(SONATA, None, "data.train=trian"), "no split 'trian'", "did you mean train"),
    ("an empty split", SONATA, start(SONATA, both(gone("val"), folder_at("val"))), "split 'val' is empty", "clouds are .npz"),
    ("a list without a split", SONATA, start(SONATA, None, "data.train=[]"), "data.train", "no split is named"),
    ("a list that names a missing cloud", SONATA, start(SONATA, put("splits.json", '{"train": ["train/cloud_007"]}')), "splits.json names train/cloud_007", "no such cloud"),
    ("a list of splits that is not JSON", SONATA, start(SONATA, put("splits.json", "train: cloud_000")), "splits.json", "line 1"),
    ("a list of splits that is 100,000 brackets deep", SONATA, start(SONATA, put("splits.json", "[" * 100_000)), "splits.json: cannot be read as JSON", "recursion"),
    ("a cloud cut short", SONATA, start(SONATA, cut(CLOUD)), f"{CLOUD}: cannot be read", "cut short or damaged"),
    ("a cloud of 0 bytes", SONATA, start(SONATA, put(CLOUD, "")), f"{CLOUD}: cannot be read", "cut short or damaged"),
    ("text that is called .npz", SONATA, start(SONATA, put(CLOUD, HTML)), f"{CLOUD}: cannot be read", "cut short or damaged"),
    ("a pickle that is called .npz, a virus", SONATA, start(SONATA, lambda f: put(CLOUD, pickle_bomb())(f)), f"{CLOUD}: cannot be read", "cut short or damaged"),
    ("an array of Python objects, a virus", PREDICT, predict(SONATA, put("odd.npy", object_array()), "odd.npy"), "odd.npy: cannot be read", "damaged"),
    ("weights in place of a cloud", PREDICT, predict(SONATA, move("encoder.pth", "odd.pth"), "odd.pth"), "odd.pth: cannot be read", "a scene is expected, not weights"),
    ("a scan of another format", PREDICT, predict(SONATA, put("odd.e57", "ASTM-E57"), "odd.e57"), "'.e57' is not a suffix known here", "use .npz .npy .ply .las"),
    ("an empty split with files of another format", SONATA, start(SONATA, both(gone("val"), put("val/a.e57", ""))), "split 'val' is empty", "there are 1 .e57 files"),
    ("text of words as a cloud", PREDICT, predict(SONATA, put("odd.txt", "chair\ntable\n"), "odd.txt"), "odd.txt: cannot be read", "not a row of numbers"),
    ("text with a row too short", PREDICT, predict(SONATA, put("odd.xyz", "1 2 3\n4 5\n"), "odd.xyz"), "odd.xyz: cannot be read", "number of columns changed"),
    ("five columns that nobody named", PREDICT, predict(SONATA, put("odd.txt", "1 2 3 4 5\n"), "odd.txt"), "odd.txt: cannot be read", "name others in data.columns"),
    ("names for other columns", PREDICT, predict(SONATA, put("odd.txt", "1 2 3 4 5\n"), "odd.txt", "data.columns=[x, y, z, label]"), "odd.txt: cannot be read", "5 columns, but data.columns names 4"),
    ("a header without a name for the row numbers (R)", PREDICT, predict(SONATA, put("odd.txt", "x y z r g b\n1 0 0 0 9 9 9\n"), "odd.txt"), "odd.txt: cannot be read", "7 columns, but its header names 6"),
    ("fewer points than the first line announces", PREDICT, predict(SONATA, put("odd.pts", "3\n0 0 0\n1 1 1\n"), "odd.pts"), "odd.pts: cannot be read", "2 of 3 points"),
    ("packed colours of NaN", PREDICT, predict(SONATA, put("odd.pcd", "VERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F F\nWIDTH 1\nHEIGHT 1\nDATA ascii\n0 0 0 nan\n"), "odd.pcd"), "odd.pcd: cannot be read", "holds no colour"),
    ("columns without z", SONATA, start(SONATA, None, "data.columns=[x, y, label]"), "data.columns", "expected x, y and z"),
    ("a PCD without a body", PREDICT, predict(SONATA, put("odd.pcd", "VERSION 0.7\nFIELDS x y z\n"), "odd.pcd"), "odd.pcd: cannot be read", "no line DATA"),
    ("a .bin of KITTI cut short", PREDICT, predict(SONATA, put("odd.bin", b"abcde"), "odd.bin"), "odd.bin: cannot be read", "no rows of 4 float32"),
    ("a feature that no file has", SONATA, start(SONATA, None, "data.features=[coord, strength]", "model.encoder.in_channels=4"), "no field strength of data.features", "there are coord"),
    ("a feature divided by 0", SONATA, start(SONATA, None, "data.features=[coord, strength/0]"), "data.features", "intensity/65535"),
    ("weights for other classes", SONATA, start(SONATA, None, "training.class_weights=[1, 2]"), "training.class_weights: 2 numbers", "give one per class"),
    ("steps that cannot be shared", SONATA, start(SONATA, None, "training.steps=7", "training.eval_epochs=2"), "training.steps=7 is no multiple", "training.eval_epochs=2"),
    ("tiles of no size", PREDICT, predict(SONATA, None, "test", "--tile", "0"), "--tile 0", "above 0"),
    ("a mesh in tiles", PREDICT, predict(DOWN, None, "test", "--tile", "50"), "--tile 50", "for point clouds alone"),
    ("a header of an array of 10^15 numbers", PREDICT, predict(SONATA, put("odd.npy", NPY_BOMB), "odd.npy"), "odd.npy", "cut short or damaged"),
    ("3 GB of zeros in a file of a kilobyte", PREDICT, predict(SONATA, squeezed("odd.npz"), "odd.npz"), "odd.npz: cannot be read (ValueError: 3,221,225,472 bytes of arrays in", "damaged"),
    ("no coordinates", SONATA, start(SONATA, array(CLOUD, coord=None)), f"{CLOUD}: expected numeric coordinates", "under one of the names coord"),
    ("coordinates in two columns", SONATA, start(SONATA, array(CLOUD, coord=lambda c: c[:, :2])), f"{CLOUD}: expected numeric coordinates (N, 3)", "got float32"),
    ("coordinates as text", SONATA, start(SONATA, array(CLOUD, coord=lambda c: c.astype(str))), f"{CLOUD}: expected numeric coordinates", "got <U"),
    ("NaN for a coordinate", SONATA, start(SONATA, array(CLOUD, coord=at(7, np.nan))), f"{CLOUD}: 1 of", "the first is point 7; remove them"),
    ("an infinite coordinate", SONATA, start(SONATA, array(CLOUD, coord=at((3, 1), np.inf))), f"{CLOUD}: 1 of", "the first is point 3; remove them"),
    ("no point at all", SONATA, start(SONATA, array(CLOUD, coord=np.zeros((0, 3)), color=None, normal=None, segment=None)), f"{CLOUD}: expected numeric coordinates (N, 3) of at least one point", "got float64 (0, 3)"),
    ("a matrix of five columns", PREDICT, cloud_file("odd.npy", matrix=np.zeros((9, 5))), "odd.npy: cannot be read", "columns are x y z"),
    ("one label too few", SONATA, start(SONATA, array(CLOUD, segment=lambda s: s[:-1])), f"{CLOUD}: label of shape", "one row a point"),
    ("one colour too many", SONATA, start(SONATA, array(CLOUD, color=lambda c: np.vstack([c, c[:1]]))), f"{CLOUD}: color of shape", "one row a point"),
    ("a colour of 300", SONATA, start(SONATA, array(CLOUD, color=at(0, 300))), f"{CLOUD}: colours from", "expected 0..255"),
    ("a negative colour", SONATA, start(SONATA, array(CLOUD, color=at(0, -1.0))), f"{CLOUD}: colours from -1", "expected 0..255"),
    ("a colour of NaN", SONATA, start(SONATA, array(CLOUD, color=at(0, np.nan))), f"{CLOUD}: colours from nan", "expected 0..255"),
    ("half a class", SONATA, start(SONATA, array(CLOUD, segment=at(9, 0.5))), f"{CLOUD}: label 0.5 of point 9", "not a whole number"),
    ("a class of 10^30", SONATA, start(SONATA, array(CLOUD, segment=at(9, 1e30))), f"{CLOUD}: label 1e+30 of point 9", "not a whole number"),
    ("classes that count from 1", SONATA, start(SONATA, array(CLOUD, segment=lambda s: s + 1)), f"{CLOUD}: label 3 at", "set model.num_classes or data.ignore_labels"),
    ("255 for unlabelled", SONATA, start(SONATA, array(CLOUD, segment=at(9, 255))), f"{CLOUD}: label 255 at 1 of", "data.ignore_labels"),
    ("NaN for a class", SONATA, start(SONATA, array(CLOUD, segment=at(9, np.nan))), f"{CLOUD}: label nan at 1 of", "set data.ignore_labels=[-1, nan]"),
    ("a label map of too few classes", SONATA, start(SONATA, None, "data.label_map=0:0,1:1"), "data.label_map has 2 classes", "set one to the other"),
    ("a label map without one of the labels", SONATA, start(SONATA, None, "data.label_map=0:0,1:1,7:2"), f"{CLOUD}: value 2", "not in the label map"),
    ("a label map and an offset", SONATA, start(SONATA, None, "data.label_map=0:0,1:1,2:2", "data.label_offset=-1"), "data.label_offset and data.label_map", "leave one out"),
    ("colours outside the range that was named", SONATA, start(SONATA, None, "data.color_range=1"), f"{CLOUD}: colours from", "expected 0..1, as data.color_range says"),
    ("normals that look nowhere", SONATA, start(SONATA, None, "data.normal_view=up"), "data.normal_view", "neighbours"),
    ("a cloud 3,000 m wide that turns could make wider", SONATA, start(SONATA, array(CLOUD, coord=at(0, 3000.0))), f"{CLOUD}: augmentation can make the cloud", "set data.grid_size=0.0"),
    ("labels of a name nobody knows", SONATA, start(SONATA, lambda f: [array(f"{p.parent.name}/{p.name}", segment=None)(f) for p in f.glob("*/*.npz")]), "no labelled point in 3 clouds", "expected a field named segment"),
    ("no normals where they are asked for", SONATA, start(SONATA, array(CLOUD, normal=None), "data.missing_normal=error"), f"{CLOUD}: no normals", "data.missing_normal"),
    ("a cloud 10^8 m wide", SONATA, start(SONATA, array(CLOUD, coord=at(0, 1e8))), f"{CLOUD}: the cloud is 1", "larger data.grid_size"),
    ("a cloud 10^300 m wide", SONATA, start(SONATA, array(CLOUD, coord=at(0, 1e300))), f"{CLOUD}: 1 of", "beyond 1e+15"),
    ("a PLY without vertices", PREDICT, predict(SONATA, put("odd.ply", "ply\nformat ascii 1.0\nelement face 0\nproperty list uchar int vertex_indices\nend_header\n"), "odd.ply"), "odd.ply: cannot be read", "damaged"),
    ("an ASCII PLY of more columns than its header has", PREDICT, predict(SONATA, put("odd.ply", "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\nend_header\n0 0 0 9\n1 1 1 9\n"), "odd.ply"), "odd.ply: cannot be read", "2 numbers more than its header announces"),
    ("two clouds of one name", PREDICT, predict(SONATA, None, "train/cloud_000.npz", "train"), "", "the same file twice counts once", lambda f, result: len(result) == 3),
    ("classes.json that is not JSON", SONATA, start(SONATA, put("classes.json", "floor, box, ball")), "classes.json: expected a list of class names", "JSONDecodeError"),
    ("classes.json 100,000 brackets deep", SONATA, start(SONATA, put("classes.json", "[" * 100_000)), "classes.json: expected a list of class names", "RecursionError"),
    ("classes.json with one name twice", SONATA, start(SONATA, put("classes.json", '["floor", "box", "box"]')), "classes.json", "each once"),
    ("classes.json with numbers for keys", SONATA, start(SONATA, put("classes.json", '{"classes": {"0": "floor", "2": "ball", "1": "box"}}')), "classes.json", "must be a list"),
    ("half a number to ignore", SONATA, start(SONATA, put("classes.json", '{"classes": ["floor", "box", "ball"], "ignore_index": 1.5}')), "classes.json", "'1.5'"),
    ("classes.json for other classes", SONATA, start(SONATA, put("classes.json", '["floor", "box"]')), "2 class names for model.num_classes=3", "correct data.class_names"),
    ("a test without a test split", EVAL, evaluate(SONATA, None, "data.test=null", "--split", "test"), "data.test names no clouds", "set data.test=SPLIT"),
    ("one point", PREDICT, cloud_file(coord=np.zeros((1, 3)), color=np.zeros((1, 3), np.uint8), normal=np.ones((1, 3))), "", "labelled", points_labelled(1)),
    ("all points in one place", PREDICT, cloud_file(coord=np.ones((50, 3)), color=np.zeros((50, 3), np.uint8)), "", "labelled, normals estimated", points_labelled(50)),
    ("neither colours nor normals", PREDICT, cloud_file(coord=random_points()), "", "labelled: colours black, normals estimated", points_labelled(40)),
    ("colours from 0 to 1", PREDICT, cloud_file(coord=random_points(), color=random_points()), "", "taken as 0..255, with a warning", points_labelled(40)),
    ("colours from 0 to 1.0000001", PREDICT, cloud_file(coord=random_points(), color=random_points() + 1e-7), "", "taken as 0..255, with a warning", points_labelled(40)),
    ("labels as text in a cloud to label", PREDICT, cloud_file(coord=random_points(), label=np.full(40, "tree")), "", "labelled: its own labels are not read", points_labelled(40)),
    ("map coordinates (5,000 km)", PREDICT, cloud_file(coord=random_points() + 5e6), "", "moved near 0", points_labelled(40)),
    ("normals of length 0 and NaN", PREDICT, cloud_file(coord=random_points(), normal=np.full((40, 3), np.nan)), "", "taken as no normal", points_labelled(40)),
    ("spaces and other alphabets in names", SONATA, start(SONATA, lambda f: [move(split, f"mein Stück 漢字/{split}")(f) for split in ("train", "val", "test")], "data.root=mein Stück 漢字", "data.class_names=[a, b, c]"), "", "trained", lambda f, result: result["miou"] >= 0),
)

PHOTOS = group(
    "Photographs and masks",
    ("no such folder", UNET, start(UNET, None, "dataset.root=nowhere"), "nowhere/images/train: no such folder", "expected images/SPLIT and masks/SPLIT"),
    ("an empty folder", UNET, start(UNET, both(gone("images/val"), folder_at("images/val"))), "images/val", "no images"),
    ("a misspelt split", PROTO, start(PROTO, None, "dataset.train_split=trian"), "images/trian: no such folder", "with SPLIT test or train or val"),
    ("a mask without its photograph", UNET, start(UNET, gone(IMAGE)), "masks/train: 1 of 4 files have no partner", "picture_000.png"),
    ("two photographs of one name", M2F, start(M2F, lambda f: shutil.copy(f / IMAGE, f / "images/train/picture_000.bmp")), "picture_000.bmp and", "rename one"),
    ("a photograph cut short", UNET, start(UNET, cut(IMAGE)), f"{IMAGE}: this image cannot be read", "truncated"),
    ("a mask cut short", PROTO, start(PROTO, cut(MASK)), f"{MASK}: this mask cannot be read", "truncated"),
    ("a photograph of 0 bytes", UPER, start(UPER, put(IMAGE, "")), f"{IMAGE}: this image cannot be read", "cannot identify"),
    ("an HTML page that is called .png", M2F, start(M2F, put(IMAGE, HTML)), f"{IMAGE}: this image cannot be read", "cannot identify"),
    ("a git-LFS pointer that is called .png", UNET, start(UNET, put(IMAGE, LFS)), f"{IMAGE}: this image cannot be read", "cannot identify"),
    ("a photograph of 10^10 pixels in 100 bytes", UNET, start(UNET, put(IMAGE, png_header(100_000, 100_000))), f"{IMAGE}: this image cannot be read", "above the limit of 178956970"),
    ("a mask of 8 * 10^7 pixels that are not there", UNET, start(UNET, put(MASK, png_header(9_000, 9_000))), f"{MASK}: this mask cannot be read", "truncated"),
    ("floating-point pixels", UNET, start(UNET, both(gone(IMAGE), lambda f: Image.fromarray(np.zeros((64, 64), np.float32)).save(f / "images/train/picture_000.tif"))), "picture_000.tif", "convert them to 8 bits"),
    ("a mask of another size", UNET, start(UNET, picture(MASK, lambda m: m.resize((32, 64)))), f"{MASK}: 32x64 pixels", "a mask belongs to the photograph's own pixels"),
    ("a mask in colours of no class", UNET, start(UNET, picture(MASK, lambda m: colored(m, [[1, 2, 3], *COLORS[1:]]))), f"{MASK}: the colour (1, 2, 3) at", "is in no class of classes.json"),
    ("a mask in colours without a palette of classes", UPER, start(UPER, both(put("classes.json", '{"classes": ["a", "b", "c"]}'), picture(MASK, colored))), f"{MASK}: a colour mask (mode RGB)", "replace each colour by its class id"),
    ("a mask with transparency", PROTO, start(PROTO, picture(MASK, lambda m: Image.merge("RGBA", (m, m, m, m)))), f"{MASK}: a colour mask (mode RGBA)", "replace each colour by its class id"),
    ("a palette mask whose colours were put in another order", M2F, start(M2F, picture(MASK, palette_mask)), f"{MASK} and classes.json: index", "store the masks again with one palette"),
    ("a mask that is a stack of 3 pages", UNET, start(UNET, stack_of(MASK)), "picture_000.tif: this mask cannot be read", "a stack of 3 pages"),
    ("a photograph that is a stack of 3 pages", PREDICT, predict(PROTO, stack_of("images/test/picture_200.png"), "images/test"), "picture_200.tif: this image cannot be read", "a stack of 3 pages"),
    ("photographs of 12 bits in files of 16", UPER, start(UPER, twelve_bits), "uint16 pixels use", "set value_range: [0, 4095] (--value-range 0 4095)"),
    ("binary masks of 0 and 255", UPER, start(UPER, binary_masks, "--num-classes", "2", "--classes", "two.json"), "all labelled pixels of the training masks are a", "--label-map 0:0,255:1"),
    ("binary masks of 0 and 255", PROTO, start(PROTO, binary_masks), "all labelled pixels of the training masks are sky", "label_map: 0:0,255:1"),
    ("masks of numbers that the label map does not have", M2F, start(M2F, None, "--label-map", "0:0,2:1,7:2"), f"{MASK}: value 1 (", "not in the label map"),
    ("a label map of other classes", UNET, start(UNET, None, "dataset.label_map=0:0,255:1"), "has 2 classes and num_classes=3", "set num_classes to 2"),
    ("a word for a label map", PROTO, start(PROTO, None, "dataset.label_map=zero"), "label map 'zero'", "VALUE:CLASS pairs such as 0:0,255:1"),
    ("masks whose names have an ending", UNET, start(UNET, lambda f: [p.rename(p.with_name(f"{p.stem}_mask.png")) for p in (f / "masks").glob("*/*.png")]), "4 of 4 files have no partner", "set mask_suffix: _mask (--mask-suffix _mask)"),
    ("a value range upside down", M2F, start(M2F, None, "--value-range", "9", "3"), "value_range=[9.0, 3.0]", "[low, high]"),
    ("four bands for a frozen backbone", M2F, start(M2F, None, "--bands", "1", "2", "3", "4"), "bands=[1, 2, 3, 4]: expected three bands", "train_segmentation.py takes any number"),
    ("four bands for a prototype network", PROTO, start(PROTO, None, "dataset.bands=[1,2,3,4]"), "bands=[1, 2, 3, 4]: expected three bands", "train_segmentation.py takes any number"),
    ("saturation of four bands", UNET, start(UNET, None, "dataset.bands=[1,2,3,4]", "augmentations.color_jitter.hue=0.1"), "augmentations.color_jitter: saturation and hue are of three colours", "leave them at 0"),
    ("a band that a photograph does not have", UNET, start(UNET, None, "dataset.bands=[4, 3, 2]"), f"{IMAGE}: this image has 3 bands", "names others"),
    ("batch norm on a crop of one cell", UNET, start(UNET, None, "training.batch_size=1", "dataset.image_size=32"), "training.batch_size=1 and dataset.image_size=32", "set training.batch_size=2 or more"),
    ("a 16-bit mask", M2F, start(M2F, picture(MASK, lambda m: Image.fromarray(np.asarray(m).astype(np.uint16)))), f"{MASK}: a mask of more than 8 bits", "store its ids as 8-bit PNG"),
    ("classes that count from 1", UPER, start(UPER, picture(MASK, lambda m: m.point(lambda v: v + 1 if v < 255 else v))), f"{MASK}: value 3", "reduce_zero_label"),
    ("masks stored as JPEG", UNET, start(UNET, lambda f: [(picture(f"masks/train/{p.name}", lambda m: m.point(lambda v: 20 * v))(f), Image.open(p).save(p.with_suffix(".jpg"), quality=40), p.unlink()) for p in (f / "masks/train").iterdir()]), "picture_000.jpg: a JPEG mask", "store masks as PNG"),
    ("not one pixel labelled", UNET, start(UNET, lambda f: [picture(f"masks/train/{p.name}", lambda m: m.point(lambda v: 255))(f) for p in (f / "masks/train").iterdir()]), "not one pixel of 4 masks is labelled", "check ignore_label"),
    ("a photograph lying on its side (EXIF)", UNET, start(UNET, turned_photo), "picture_000.jpg: EXIF orientation 6", "store it upright"),
    ("a mask lying on its side (EXIF)", M2F, start(M2F, turned_mask), f"{MASK}: EXIF orientation 6", "store it as it is to be read, without the tag"),
    ("65535 for unlabelled", UNET, start(UNET, None, "dataset.ignore_label=65535"), "ignore_label=65535: expected a number from 0 to 255", "0:0,1:1,65535:ignore"),
    ("a test without a test split", UNET, start(UNET, both(gone("images/test"), gone("masks/test")), "--test-only"), "--test-only", "--resume"),
    ("a test without a test split", EVAL, evaluate(PROTO, None, "--split", "test"), "test", "dataset.test_split"),
    ("class names that are no JSON", UNET, start(UNET, put("classes.json", "sky, ground, box")), "classes.json: expected", "JSONDecodeError"),
    ("a class file 100,000 brackets deep", M2F, start(M2F, put("classes.json", "[" * 100_000)), "classes.json: expected", "RecursionError"),
    ("names for other classes", PROTO, start(PROTO, put("classes.json", '{"classes": ["sky"]}')), "classes.json: 1 names for num_classes=3", "give one name per class"),
    ("a colour of 300", UPER, start(UPER, put("classes.json", '{"classes": ["a", "b", "c"], "palette": [[0, 0, 300], [1, 1, 1], [2, 2, 2]]}')), "classes.json: 3 names and a palette", "0 to 255"),
    ("colours from 0 to 1", PROTO, start(PROTO, put("classes.json", '{"classes": ["a", "b", "c"], "palette": [[0, 0, 0.5], [1, 0, 0], [0, 1, 0]]}')), "classes.json: 3 names and a palette", "whole numbers, 0 to 255"),
    ("names by number in place of a list", UNET, start(UNET, put("classes.json", '{"classes": {"0": "a", "1": "b", "2": "c"}}')), "classes.json: expected", "dict in place of a list of names"),
    ("a palette of text", UNET, start(UNET, put("classes.json", '{"classes": ["a", "b", "c"], "palette": "red"}')), "classes.json: expected", "palette"),
    ("no class file", M2F, start(M2F, gone("classes.json")), "classes.json: expected", "FileNotFoundError"),
    ("class numbers with a gap", UNET, start(UNET, both(gone("classes.json"), put("classes.txt", "0 sky\n1 ground\n3 box\n"))), "classes.txt: the numbers of 3 classes are 0, 1, 3", "each of 0 to 2 once"),
    ("a folder that is not VOC", PROTO, start(PROTO, None, "dataset.name=pascal", "model.num_classes=21", "model.prototype_shape=[21, 8, 1, 1]"), "no VOCdevkit/VOC2012/JPEGImages", "scripts/download_voc.py"),
    ("a folder that is not Cityscapes", PROTO, start(PROTO, None, "dataset.name=cityscapes", "model.num_classes=19", "model.prototype_shape=[19, 8, 1, 1]"), "leftImg8bit/train: no such folder", "download_datasets.py cityscapes"),
    ("a dangling link among the photographs", UNET, start(UNET, link(IMAGE, "nowhere.png")), "masks/train: 1 of 4 files have no partner", "picture_000.png"),
    *((f"a photograph in mode {mode}", PREDICT, predict(UNET, photo_of(mode), "odd.tif" if mode == "CMYK" else "odd.png"), "", outcome, photo_labelled)
      for mode, outcome in (("I;16", "the full range of 16 bits, or value_range, becomes 0 to 255"), ("CMYK", "as RGB"), ("P", "as RGB"), ("RGBA", "what a PNG declares transparent is white; a fourth band of a TIFF, or of many values, is not shown"), ("1", "black and white"), ("LA", "as RGBA"))),
    ("a photograph of one pixel", PREDICT, predict(UNET, lambda f: Image.new("RGB", (1, 1)).save(f / "odd.png"), "odd.png"), "", "labelled", lambda f, result: Image.open(f / "out/odd.png").size == (1, 1)),
    ("a photograph of 1 x 30 pixels", PREDICT, predict(M2F, lambda f: Image.new("RGB", (30, 1)).save(f / "odd.png"), "odd.png"), "", "labelled", lambda f, result: Image.open(f / "out/odd.png").size == (30, 1)),
    ("a mask as palette picture in the colours of the classes", UNET, start(UNET, picture(MASK, lambda m: palette_mask(m, COLORS))), "", "its indices count", lambda f, result: result["miou"] >= 0),
    ("masks in the colours of the classes", UPER, start(UPER, picture(MASK, colored)), "", "each colour is its class", lambda f, result: True),
    ("a mask of three equal channels", PROTO, start(PROTO, picture(MASK, lambda m: m.convert("RGB"))), "", "the ids count", lambda f, result: result["miou"] >= 0),
    ("a mask of 1 bit", UNET, start(UNET, lambda f: [picture(f"masks/{p.parent.name}/{p.name}", lambda m: m.point(lambda v: 255 * (v == 1)).convert("1"))(f) for p in f.glob("masks/*/*.png")]), "", "black is class 0, white class 1", lambda f, result: result["miou"] >= 0),
    ("spaces and other alphabets in names", UNET, start(UNET, lambda f: [move(kind, f"mein Stück 漢字/{kind}")(f) for kind in ("images", "masks")], "dataset.root=mein Stück 漢字"), "", "trained", lambda f, result: result["miou"] >= 0),
    ("links to photographs", UNET, start(UNET, both(move(IMAGE, "elsewhere.png"), link(IMAGE, "../../elsewhere.png"))), "", "followed", lambda f, result: result["miou"] >= 0),
)

WEIGHTS = group(
    "Weights and checkpoints",
    *((f"{what} as pre-trained weights", script, start(script, edit, *flag), "weights.pth", remedy)
      for script, flag in ((DOWN, ("--pretrained_path", "weights.pth")), (SONATA, ("training.use_pretrained=true", "--pretrained_path", "weights.pth")),
                           (UNET, ("--pretrained_path", "weights.pth")), (UPER, ("--backbone-weights", "weights.pth")))
      for what, edit, remedy in (("an HTML page", put("weights.pth", HTML), "Fetch it again"), ("a git-LFS pointer", put("weights.pth", LFS), "Fetch it again"),
                                 ("a pickle with a virus", lambda f: put("weights.pth", pickle_bomb())(f), "objects can run code"))),
    ("no such file of weights", DOWN, start(DOWN, None, "--pretrained_path", "encoder.pth"), "encoder.pth: no such file", "Check the path"),
    ("a folder as weights", M2F, start(M2F, folder_at("weights.pth"), "--head-weights", "weights.pth"), "weights.pth: is a folder", "Name a file in it"),
    ("a backbone as a decoder", PMT, start(PMT, None, "--head-weights", "backbone.pth"), "backbone.pth: no PMT decoder", "it holds"),
    ("a decoder trained on other blocks", PMT, start(PMT, put("weights.pth", decoder()), "--head-weights", "weights.pth", "--taps", "0", "3"), "weights.pth: trained on the blocks 0 1 2 3", "set --taps to these"),
    ("a decoder of other queries", PMT, start(PMT, put("weights.pth", decoder()), "--head-weights", "weights.pth"), "weights.pth: has 4 queries, not 8", "set --num-queries 4"),
    ("weights of 0 bytes", PROTO, start(PROTO, put("weights.pth", ""), "--pretrained_path", "weights.pth"), "weights.pth", "Fetch it again"),
    ("weights cut short", SONATA, start(SONATA, both(cut("encoder.pth")), "training.use_pretrained=true", "--pretrained_path", "encoder.pth"), "encoder.pth: truncated or damaged", "Fetch it again"),
    ("weights with a flipped bit", SONATA, start(SONATA, flipped("encoder.pth"), "training.use_pretrained=true", "--pretrained_path", "encoder.pth"), "encoder.pth: damaged", "Fetch it again"),
    ("a bomb of zeros as weights", UNET, start(UNET, zip_bomb("weights.pth"), "--pretrained_path", "weights.pth"), "weights.pth: damaged", "Fetch it again"),
    ("a list in place of tensors", UNET, start(UNET, put("weights.pth", tensors_on_disk([1, 2])), "--pretrained_path", "weights.pth"), "weights.pth: holds a list", "Save a state_dict"),
    ("a damaged safetensors file", UPER, start(UPER, put("weights.safetensors", b"\xff" * 64), "--backbone-weights", "weights.safetensors"), "weights.safetensors", "Fetch it again"),
    ("a header of 10^18 bytes as safetensors", M2F, start(M2F, put("weights.safetensors", struct.pack("<Q", 10 ** 18) + b"{}"), "--backbone-weights", "weights.safetensors"), "weights.safetensors", "Fetch it again"),
    ("weights of another network", DOWN, start(DOWN, put("weights.pth", tensors_on_disk({"fc.weight": torch.zeros(2, 2)})), "--pretrained_path", "weights.pth"), "weights.pth: no mesh encoder in this file", "Expected the tensors of a Nomeformer"),
    ("weights of another network", UNET, start(UNET, put("weights.pth", tensors_on_disk({"weight": torch.zeros(2, 2)})), "--pretrained_path", "weights.pth"), "weights.pth", "Is the file of this model"),
    ("a backbone of another size", M2F, start(M2F, None, "--backbone", "dinov3_vits16", "--backbone-weights", "backbone.pth"), "backbone.pth: holds dinov3_tiny, not dinov3_vits16", "Choose that backbone"),
    ("a backbone in place of a network", EOMT, with_network(None, "--network-weights", "backbone.pth"), "backbone.pth: no EoMT", "a checkpoint of train_eomt.py"),
    ("differences without their backbone", EOMT, with_network(entry("model.pth", as_differences)), "model.pth: holds differences", "--backbone-weights FILE"),
    ("a complete network as differences", EOMT, with_network(None, "--backbone-weights", "backbone.pth"), "model.pth: holds a whole network", "leave --backbone-weights out"),
    ("a network with other joint blocks", EOMT, with_network(None, "--joint-blocks", "3"), "model.pth: has queries in its last 2 blocks", "--joint-blocks 2"),
    ("a network on another backbone", EOMT, with_network(None, "--backbone", "dinov3_vits16"), "model.pth", "Is it of this --backbone?"),
    ("a backbone with NaN in it", UPER, start(UPER, entry("backbone.pth", spoil), "--backbone-weights", "backbone.pth"), "backbone.pth", "not finite"),
    ("an encoder with NaN in it", SONATA, start(SONATA, entry("encoder.pth", lambda c: spoil(c["state_dict"])), "training.use_pretrained=true", "--pretrained_path", "encoder.pth"), "encoder.pth", "not finite"),
    ("a ResNet with NaN in it", UNET, start(UNET, spoilt_resnet, "--pretrained_path", "resnet.pth"), "resnet.pth", "is not finite"),
    ("an encoder trained on other features", DOWN, with_jepa(DOWN, None, "model.features=[area]"), "jepa.pth: trained on the features", "Set model.features"),
    ("an encoder with NaN in it", DOWN, with_jepa(DOWN, entry("jepa.pth", lambda c: spoil(c["target_encoder"]))), "jepa.pth", "Use an earlier checkpoint"),
    ("weights wanted and none named", SONATA, start(SONATA, None, "training.use_pretrained=true"), "needs --pretrained_path FILE", "training.use_pretrained=false"),
    ("to score an encoder, which has no classes", EVAL, evaluate(JEPA), "model.pth: train_jepa.py trains an encoder", "no classes to score"),
    ("to go on from a file of another script", UNET, resume(UNET, PROTO), "model.pth: a checkpoint of 'train_prototype.py', not of 'train_segmentation.py'", "Run the script that wrote it"),
    ("to go on from a file of another script", DOWN, resume(DOWN, JEPA), "model.pth: a checkpoint of 'train_jepa.py'", "Run the script that wrote it"),
    ("to go on with other classes", SONATA, resume(SONATA, SONATA, None, "model.num_classes=4", "data.class_names=[a, b, c, d]"), "data.class_names is", "resume with the same config"),
    ("to go on with another network", DOWN, resume(DOWN, DOWN, None, "model.embedding_dim=32"), "model.embedding_dim", "checkpoint"),
    ("to go on with another seed", UNET, resume(UNET, UNET, None, "--seed", "5"), "seed", "resume with the same"),
    ("to go on from pre-trained weights", SONATA, start(SONATA, None, "--resume", "encoder.pth"), "encoder.pth: not a checkpoint of this code", "have a flag of their own"),
    ("to go on from a checkpoint cut short", UPER, resume(UPER, UPER, cut("model.pth")), "model.pth: truncated or damaged", "--resume auto"),
    ("to go on from a virus", PROTO, resume(PROTO, PROTO, lambda f: put("model.pth", pickle_bomb())(f)), "model.pth", "Use another checkpoint"),
    ("a run folder of damaged checkpoints alone", UNET, start(UNET, put("out/model/model_last.pth", "x"), "--resume", "auto"), "--resume auto: no checkpoint in out/model can be used", "move them away"),
    ("a checkpoint with a virus", PREDICT, predict(UNET, lambda f: torch.save({"format": "segheads-1", "model": Bomb()}, f / "model.pth"), "images/test"), "model.pth: holds Python objects", "objects can run code"),
    ("a checkpoint that names another file as its script", PREDICT, predict(UNET, entry("model.pth", lambda c: c.update(script="../../evil.py")), "images/test"), "model.pth: written by '../../evil.py'", "no such train_*.py"),
    ("a checkpoint of a script that is gone", EVAL, evaluate(UNET, entry("model.pth", lambda c: c.update(script="train_gone.py"))), "model.pth: written by 'train_gone.py'", "put the script there"),
    ("a checkpoint without its classes", PREDICT, predict(UNET, entry("model.pth", lambda c: c.pop("class_names")), "images/test"), "model.pth: incomplete, no class_names", "Use another file"),
    ("a checkpoint whose settings are text", PREDICT, predict(UNET, entry("model.pth", lambda c: c.update(config="none")), "images/test"), "model.pth: incomplete", "Use another file"),
    ("a checkpoint without one of its tensors", EVAL, evaluate(DOWN, entry("model.pth", lambda c: c["model"].popitem())), "matched", "Is the file of this model"),
    ("a checkpoint whose weights are not finite", PREDICT, predict(DOWN, entry("model.pth", lambda c: spoil(c["model"])), "test"), "model.pth", "not finite"),
    ("photographs for a network of meshes", PREDICT, predict(DOWN, lambda f: Image.new("RGB", (8, 8)).save(f / "odd.png"), "odd.png"), "odd.png: '.png' is not a mesh suffix", "use one of .obj"),
    ("a mesh for a network of photographs", PREDICT, predict(UNET, put("odd.obj", QUAD), "odd.obj"), "odd.obj: this image cannot be read", "cannot identify"),
    ("a model file that is text", EVAL, evaluate(SONATA, put("model.pth", "weights")), "model.pth: truncated, or not written by torch.save", "Use another checkpoint"),
)

ROOM = "raw/Area_1/office_1/Annotations/chair_1.txt"


def rooms(edit, *more: str):
    """make() of a case of raw S3DIS: one room of one chair."""
    return lambda folder: [put(ROOM, "0 0 0 1 2 3\n1 0 0 4 5 6\n")(folder), edit(folder)] and ["raw", "out", "--areas", "1", "--num-workers", "1", *more]


RAW = group(
    "Raw scans and downloads",
    ("a folder that is not S3DIS", S3DIS, rooms(gone("raw/Area_1")), "raw/Area_1: no ROOM/Annotations folders", "give the folder that holds Area_1"),
    ("a room without points", S3DIS, rooms(put(ROOM, "")), "raw/Area_1/office_1: no points", "is the download complete?"),
    ("a line of three numbers", S3DIS, rooms(put(ROOM, "1 2 3 4 5 6\n1 2 3\n")), f"{ROOM}, line 2", "correct it by hand"),
    ("a colour of 400", S3DIS, rooms(put(ROOM, "1 2 3 400 5 6\n")), "raw/Area_1/office_1: colours from 5 to 400", "expected 0..255"),
    ("NaN for a coordinate", S3DIS, rooms(put(ROOM, "nan 2 3 4 5 6\n")), "chair_1.txt", "correct it by hand"),
    ("no file of angles", S3DIS, rooms(put("raw/x", ""), "--align-angle"), "Area_1_alignmentAngle.txt", "No such file"),
    ("a file that holds no angles", S3DIS, rooms(put("raw/Area_1/Area_1_alignmentAngle.txt", HTML), "--align-angle"), "Area_1_alignmentAngle.txt", "room degrees"),
    ("a room without an angle", S3DIS, rooms(put("raw/Area_1/Area_1_alignmentAngle.txt", "hall_1 90\n"), "--align-angle"), "Area_1_alignmentAngle.txt has no angle", "office_1"),
    ("results into a file", S3DIS, rooms(put("out", "")), "out", "choose another output folder"),
    ("no split lists", SCANNET, lambda f: ["raw", "out", "--splits", "splits"], "scannetv2_train.txt is missing", "ScanNet's repository"),
    ("a scene that is not there", SCANNET, lambda f: [put("splits/scannetv2_train.txt", "scene0000_00\n")(f), put("splits/scannetv2_val.txt", "")(f)] and ["raw", "out", "--splits", "splits"], "scene0000_00_vh_clean_2.ply", "finish the download"),
    ("another file of the archive's name", VOC, lambda f: [put("voc/VOCtrainval_11-May-2012.tar", HTML)(f)] and ["--root", "voc"], "bytes instead of 1,999,639,040", "delete it"),
    ("a root that is a file", VOC, lambda f: [put("voc", "")(f)] and ["--root", "voc"], "voc: results cannot go there", "choose another output folder"),
    ("weights of another hash", FREE, lambda f: [put("sets/weights/resnet34-b627a593.pth", "weights")(f)] and ["resnet34", "--root", "sets"], "instead of b627a593", "delete it"),
    ("an archive of another hash", FREE, lambda f: [put("sets/ade20k/ADEChallengeData2016.zip", "PK")(f)] and ["ade20k", "--root", "sets"], "sha1", "delete it"),
)

NAMES = group(
    "Names that forge lines",
    *((f"a class name with {what}", script, start(script, put("classes.json", content), *more), place, "not text on one line")
      for what, name in (("a line break", "sky\\nerror: all lost"), ("a command to the terminal", "\\u001b[2J"))
      for script, content, more, place in (
          (UNET, f'{{"classes": ["a", "b", "{name}"]}}', (), "classes.json"), (SONATA, f'["a", "b", "{name}"]', (), "classes.json"),
          (M2F, f'{{"classes": ["a", "b", "{name}"]}}', (), "classes.json"), (DOWN, "", (f'data.class_names=[a, b, "{name}"]',), "data.class_names"))),
    ("a class name with a line break, in a checkpoint", PREDICT, predict(UNET, entry("model.pth", lambda c: c.update(class_names=["a", "b", "c\nd"])), "images/test"), "model.pth: class_names", "not text on one line"),
    ("a file name with a line break that is not there", PREDICT, predict(UNET, None, "a\nerror: b.png"), "a error: b.png", "no such file or folder"),
    ("numbers for class names", DOWN, start(DOWN, None, "data.class_names=[1, 2, 3]"), "data.class_names: the name 1", "not text on one line"),
)

CASES = [*NAMES, *SETTINGS, *FLAGS, *MESHES, *LABEL_CASES, *CLOUDS, *PHOTOS, *WEIGHTS, *RAW]


def document() -> str:
    """docs/bad_inputs.md."""
    refused, accepted = ([case for case in CASES if (case.check is None) == wanted] for wanted in (True, False))
    text = [f"""# Wrong, odd and hostile input

How the scripts answer {len(refused)} inputs that are wrong, and {len(accepted)} that are odd but right. A wrong input ends the script with exit status 2 and one line
`error: ...` on stderr that holds what the last two columns show: the place, and what is wrong or what to do. No file of yours is changed, and nothing
half-written stays. `--debug` shows where the error was raised.

`tests/bad_inputs.py` makes each input, and `tests/test_bad_inputs.py` runs it. How hostile pickles, archives and names are refused: `tests/test_security.py`.

Printed by `python -m tests.bad_inputs`; do not edit by hand."""]

    def cell(value):
        return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

    def code(value):
        return (f"`` {value} ``" if "`" in value else f"`{value}`").replace("|", "\\|")

    for kind in dict.fromkeys(case.kind for case in refused):
        text.append(f"\n## {kind}\n\n| input | script | the line holds | and |\n|---|---|---|---|")
        text += [f"| {cell(case.name)} | `{case.script}` | {code(case.place)} | {code(case.remedy)} |" for case in refused if case.kind == kind]
    text.append("\n## Odd, and accepted\n\n| input | script | |\n|---|---|---|")
    text += [f"| {cell(case.kind)}: {cell(case.name)} | `{case.script}` | {cell(case.remedy)} |" for case in accepted]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(document(), end="")
