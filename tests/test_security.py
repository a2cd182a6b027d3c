"""Hostile files: pickles never run, archives never leave their folder, YAML makes no objects, names stay text in pages, logs and shells.

What a user sees of it is in tests/bad_inputs.py; here every reader and every writer is met by itself.
"""

import ast
import hashlib
import io
import json
import pickle
import re
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import predict
import train_prototype
import train_segmentation
from data.feature_cache import CachedTaps
from data.mesh import cached_arrays
from data.mesh_io import read_labels, read_mesh
from data.mesh_texture import _stored_texels
from data.point_files import find_clouds, read_cloud
from data.points import _cached_normals
from tests.bad_inputs import Bomb, image_base, object_array
from tests.tiny_images import shrink_unet
from utils import download
from utils.checkpoint import find_resume, load_checkpoint
from utils.config_file import read_yaml
from utils.download import extract, extract_flat, fetch
from utils.log import RunLog
from utils.report import write_page
from utils.viewer import viewer_html
from utils.weights import read_weights

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(path for pattern in ("*.py", "data/*.py", "models/*.py", "utils/*.py", "scripts/*.py") for path in ROOT.glob(pattern))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """The working directory, where a bomb that goes off would leave `executed`."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


# -- what the product never does ---------------------------------------------------------------------------------------

def forbidden(source: str) -> list[str]:
    """Calls and imports that run what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in ("pickle", "dill", "marshal", "shelve", "cPickle")]
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "torch.package", "joblib.load",
                    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "subprocess.getoutput") or name.startswith("os.spawn"):
            found.append(name)
        if name.endswith("import_module") and "script_of" not in source:
            found.append(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        if name == "np.load" and options.get("allow_pickle", "False") != "False" or "shell" in options:
            found.append(f"{name} with {options}")
        if name.endswith("extractall") and name != "file.extractall":
            found.append(name)
    return found


def test_nothing_that_is_read_can_run():
    assert len(PRODUCT) > 70
    found = {path.relative_to(ROOT).as_posix(): forbidden(path.read_text(encoding="utf-8")) for path in PRODUCT}
    # These two import modules that they name themselves, and the script that the user started.
    assert {path: names for path, names in found.items() if names} == {
        "inspect_data.py": ["importlib.import_module"], "utils/before_torch.py": ["importlib.import_module"] * 2}


@pytest.mark.parametrize("source", ["eval(x)", "import pickle", "from pickle import loads", "torch.load(x)", "torch.load(x, weights_only=False)",
                                    "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "yaml.load(x, Loader)", "os.system(x)",
                                    "importlib.import_module(x)", "tar.extractall(x)"])
def test_the_check_above_finds(source):
    assert forbidden(source)


def test_the_only_extraction_of_tar_files_has_a_filter_and_shells_quote_their_variables():
    source = (ROOT / "utils" / "download.py").read_text()
    assert source.count("extractall") == 2 and 'extractall(folder, filter="data")' in source
    for path in (ROOT / "scripts").glob("*.sh"):
        assert not re.search(r"(?m)^[^#]*\beval\b|curl[^\n]*\|\s*(ba)?sh", path.read_text()), path


# -- pickles -----------------------------------------------------------------------------------------------------------

def torch_file(value, zipped=True):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


PICKLES = {**{f"protocol {number}": pickle.dumps({"model": Bomb()}, number) for number in range(6)},
           "torch zip": torch_file({"format": "segheads-1", "model": Bomb()}), "torch old": torch_file({"model": Bomb()}, False),
           "key": torch_file({"a": torch.zeros(1), Bomb(): 1}), "array": object_array()}


def test_the_bomb_goes_off_where_it_is_unpickled():
    np.load(io.BytesIO(object_array()), allow_pickle=True)
    Path("executed").rmdir()                                    # FileNotFoundError, had it not


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("read", [read_weights, load_checkpoint, lambda path: find_resume(path, "."), read_cloud], ids=["weights", "checkpoint", "resume", "cloud"])
def test_a_pickle_is_refused_and_never_run(read, name):
    for suffix in (".pth", ".pt", ".safetensors", ".npz", ".npy", ".ply"):
        path = Path(f"file{suffix}")
        path.write_bytes(PICKLES[name])
        with pytest.raises(ValueError, match=re.escape(path.name)):
            read(path)


def test_arrays_of_objects_are_never_unpickled():
    quad = Path("quad.obj")
    quad.write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nf 1 2 3\n")
    Path("labels.npy").write_bytes(object_array())
    with pytest.raises(ValueError, match=r"labels\.npy"):
        read_labels("labels.npy", read_mesh(quad), 3)
    for name in ("coord", "segment"):                           # in archives, and in folders as Pointcept has them
        Path("scene").mkdir(exist_ok=True)
        np.save("scene/coord.npy", np.zeros((1, 3)))
        Path(f"scene/{name}.npy").write_bytes(object_array())
        with zipfile.ZipFile("cloud.npz", "w") as archive:
            for file in Path("scene").iterdir():
                archive.write(file, file.name)
        for path in ("scene", "cloud.npz"):
            with pytest.raises(ValueError, match=path):
                read_cloud(path)


def test_the_own_caches_hold_nothing_that_runs():
    """A cache in a folder that others may write to: what is not a plain array is computed anew."""
    quad = Path("quad.obj")
    quad.write_text("v 0 0 0\n")
    arrays = {"vertices": np.ones((1, 3))}
    cached_arrays(quad, [1], ["vertices"], "cache", lambda: arrays)
    entry, = Path("cache").iterdir()
    with zipfile.ZipFile(entry, "w") as archive:
        archive.writestr("vertices.npy", object_array())
    assert (cached_arrays(quad, [1], ["vertices"], "cache", lambda: arrays)["vertices"] == 1).all()

    points = np.random.default_rng(0).random((20, 3)).astype(np.float32)
    first = _cached_normals(points, "normals")
    entry, = Path("normals").iterdir()
    entry.write_bytes(object_array())
    np.testing.assert_array_equal(_cached_normals(points, "normals"), first)

    Path("texture.npy").write_bytes(object_array())
    assert _stored_texels(Path("texture.npy"), 1) is None
    taps = CachedTaps.__new__(CachedTaps)
    taps.path, taps.dataset = Path("texture.npy"), [0]
    assert not taps._is_whole()


# -- archives ----------------------------------------------------------------------------------------------------------

def tar_with(**attributes):
    """A tar file of one good file and one member with these attributes."""
    with tarfile.open("a.tar", "w") as file:
        good = tarfile.TarInfo("good")
        good.size = 1
        file.addfile(good, io.BytesIO(b"x"))
        member = tarfile.TarInfo("member")
        for name, value in attributes.items():
            setattr(member, name, value)
        file.addfile(member, io.BytesIO(bytes(member.size)))
    return Path("a.tar")


@pytest.mark.parametrize("attributes", [
    {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}, {"type": tarfile.LNKTYPE, "linkname": "../../outside"}, {"type": tarfile.BLKTYPE},
    {"type": tarfile.FIFOTYPE}, {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, {"name": "good/../../outside"}, {"name": "/outside"}], ids=str)
def test_links_devices_and_pipes_in_a_tar_file_write_nothing(attributes):
    with pytest.raises(ValueError, match="do not trust it"):
        extract(tar_with(**attributes), Path("to"))
    assert not list(Path("to").iterdir()) and not Path("outside").exists()


def test_bits_that_make_a_file_of_the_superusers_are_taken_off():
    extract(tar_with(mode=0o6777, size=1), Path("to"))
    assert Path("to/member").stat().st_mode & 0o7022 == 0


def test_a_link_in_a_zip_archive_is_a_file_of_text():
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile("a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
        file.writestr("folder/name.txt", "x")
    extract(Path("a.zip"), Path("to"))
    assert not Path("to/link").is_symlink() and Path("to/link").read_text() == "/etc/passwd"
    extract_flat(Path("a.zip"), Path("flat"), ".txt")
    assert [path.name for path in Path("flat").iterdir()] == ["name.txt"]


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch):
    monkeypatch.setattr(download, "BOMB_SIZE", 1 << 20)
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros.txt", bytes(3 << 20))
    with tarfile.open("a.tar", "w:gz") as file:
        member = tarfile.TarInfo("zeros.txt")
        member.size = 3 << 20
        file.addfile(member, io.BytesIO(bytes(member.size)))
    for action in (lambda: extract(Path("a.zip"), Path("to")), lambda: extract(Path("a.tar"), Path("to")),
                   lambda: extract_flat(Path("a.zip"), Path("to"), ".txt")):
        with pytest.raises(ValueError, match=r"bytes that would become 3,145,728 or more; do not trust it"):
            action()
    assert not list(Path("to").iterdir())


def test_what_is_downloaded_counts_only_with_its_hash(tmp_path):
    """fetch() of a file: address, so that no server is needed; tests/test_download.py has one."""
    Path("server.bin").write_bytes(b"other")
    wrong = ("sha256", hashlib.sha256(b"content").hexdigest())
    with pytest.raises(ValueError, match=r"instead of"):
        fetch([(tmp_path / "server.bin").as_uri()], "file.bin", digest=wrong)
    assert not list(tmp_path.glob("file.bin*"))
    assert fetch([(tmp_path / "server.bin").as_uri()], "file.bin", digest=("sha256", hashlib.sha256(b"other").hexdigest())).is_file()


# -- YAML and JSON -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [executed]", "!!python/object/new:os.mkdir [executed]", "!!python/name:os.system",
                                  "!!python/module:os", "!!python/object:os.mkdir {}", "{a: !!python/object/apply:os.mkdir {args: [executed]}}",
                                  "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [executed]", "!!map {? !!python/tuple [1] : 2}"])
def test_yaml_makes_no_objects(text):
    with pytest.raises(ValueError, match="not valid YAML: line 1"):
        read_yaml(text)


# -- names in pages, logs and files ------------------------------------------------------------------------------------

NAMES = ["<script>alert(1)</script>", "\" onerror='alert(1)' x=\"", "$(mkdir executed);`mkdir executed`&amp;"]
FILES = ["-rf", "<img src=x onerror=alert(1)>", "a\"b'c&lt;", "$(mkdir executed)", "new\nline", "dir\x1b[2J", "${HOME}%s{0}"]


class Page(HTMLParser):
    """Tags that run or load something, and addresses that are not in the page itself."""

    def __init__(self, path: Path):
        super().__init__()
        self.bad, self.tags = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "audio", "video"):
            self.bad.append(tag)
        for name, value in attributes:
            if name.startswith("on") or (name in ("src", "href", "srcset", "action", "data", "xlink:href") and not (value or "").startswith(("data:image/", "#"))):
                self.bad.append((tag, name, value))
            if name == "style" and "url(" in (value or ""):
                self.bad.append((tag, name, value))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The tiny pictures with hostile class names and a test set of hostile file names."""
    shrink_unet(monkeypatch)
    image_base(tmp_path)
    content = json.loads((tmp_path / "classes.json").read_text())
    (tmp_path / "classes.json").write_text(json.dumps({**content, "classes": NAMES}))
    for kind in ("images", "masks"):
        source, = (tmp_path / kind / "test").iterdir()
        for name in FILES:
            (tmp_path / kind / "test" / f"{name}.png").write_bytes(source.read_bytes())
        source.unlink()
    return tmp_path


def assert_harmless(folder: Path, pages: int):
    found = sorted(folder.rglob("*.html"))
    assert len(found) == pages
    for path in found:
        page = Page(path)
        assert page.bad == [] and "img" in page.tags, path
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text and "onerror=alert" not in text.replace("&lt;img src=x onerror=alert", "")
        assert "default-src 'none'" in text                     # what was overlooked would still not run


def test_names_in_the_report_the_log_and_the_results(pictures, capsys):
    flags = ["--device", "cpu", "--output-dir", "out"]
    train_segmentation.main(["config.yaml", *flags, "--limit-batches", "1"])
    evaluate.main(["out/model/model_last.pth", "--device", "cpu"])
    predict.main(["out/model/model_last.pth", "images/test", "--output", "predictions", "--device", "cpu"])
    assert_harmless(Path("out"), 1)
    report = Path("out/evaluation/report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report and "&lt;img src=x" in report and "&amp;amp;" in report
    assert json.loads(Path("out/evaluation/metrics.json").read_text())["per_class"].keys() == set(NAMES)
    assert {path.name for path in Path("predictions").iterdir()} >= {f"{name}.png" for name in FILES}
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "new\\nline.png" in printed and "dir\\x1b[2J.png" in printed
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in Path("out/log/train.log").read_text().splitlines() if "alert" in line and "error" in line)


def test_names_in_the_pages_of_prototypes(pictures):
    train = pictures / "images" / "train"
    for kind in ("images", "masks"):
        (pictures / kind / "train" / "picture_000.png").rename(pictures / kind / "train" / f"{FILES[1]}.png")
        (pictures / kind / "train" / "picture_001.png").rename(pictures / kind / "train" / f"{FILES[2]}.png")
    assert len(list(train.iterdir())) == 4
    flags = ["prototype.yaml", "--device", "cpu", "--num-workers", "0", "--output-dir", "out"]
    train_prototype.main(flags)
    train_prototype.main([*flags, "--resume", "auto", "--gallery"])
    predict.main(["out/model/model_last.pth", "images/test", "--output", "predictions", "--device", "cpu", "--explain", "3,3"])
    assert_harmless(Path("out"), 1)
    assert_harmless(Path("predictions"), len(FILES))


def test_every_page_escapes_its_title_and_the_mesh_viewer_loads_nothing(tmp_path):
    write_page(tmp_path / "page.html", NAMES[0], ["<p></p><img src='data:image/png;base64,'>"])
    assert Page(tmp_path / "page.html").bad == []
    text = viewer_html(np.eye(3), np.array([[0, 1, 2]]), np.full((1, 3), 200, np.uint8))
    for address in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", text):
        assert address.startswith(("data:", "#")), address[:80]
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//""", text)


def test_a_log_line_is_one_line_a_command_and_no_shell(tmp_path):
    log = RunLog(tmp_path / "log", tensorboard=False)
    log.info("name_\udcff $(mkdir executed)")
    log.close()
    assert (tmp_path / "log" / "train.log").read_text().endswith("name_\\udcff $(mkdir executed)\n")


def test_splits_name_files_of_the_data_set_alone(tmp_path):
    """A list of clouds from elsewhere may name ../../secret.npz: it is read as a cloud or refused, never run."""
    (tmp_path / "train").mkdir()
    (tmp_path / "secret.npz").write_bytes(PICKLES["protocol 2"])
    (tmp_path / "splits.json").write_text('{"train": ["secret"]}')
    with pytest.raises(ValueError, match="secret"):
        read_cloud(find_clouds(tmp_path, "train")[0])
