import hashlib
import http.server
import io
import re
import socket
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import voc
from scripts import download_datasets, download_voc
from utils import download
from utils.download import extract, extract_flat, fetch

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
DIGEST = ("sha256", hashlib.sha256(CONTENT).hexdigest())


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes} on the loopback. mode: range | ignore (Range) | wrong (range) | a status; cuts: bytes after which the
    next answers break off; asked: (path, Range) of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.mode, self.cuts, self.asked, self.slept = {}, "range", [], [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path)
        if content is None or isinstance(server.mode, int):
            self.send_error(404 if content is None else server.mode)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.mode != "ignore" else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        if server.mode == "wrong" and start:
            start -= 1
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:server.cuts.pop(0) if server.cuts else None])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        monkeypatch.setattr(download.time, "sleep", running.slept.append)
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        running.files["/data.bin"] = CONTENT
        yield running
        running.shutdown()


def fetched(server, folder, *urls):
    path = fetch(urls or [f"{server.url}/data.bin"], folder / "data.bin", len(CONTENT), DIGEST)
    assert path.read_bytes() == CONTENT and [file.name for file in folder.iterdir()] == ["data.bin"]
    return [wanted for _, wanted in server.asked]


def test_fresh_and_then_nothing_more(server, tmp_path):
    assert fetched(server, tmp_path / "new") == [None]
    assert fetched(server, tmp_path / "new") == [None]                        # verified, and not asked for again


def test_resumed_from_half(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:150_000])
    assert fetched(server, tmp_path) == ["bytes=150000-"]


def test_range_ignored_starts_over(server, tmp_path):
    server.mode = "ignore"
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:150_000])
    assert fetched(server, tmp_path) == ["bytes=150000-"]


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    server.mode = "wrong"
    (tmp_path / "data.bin.part").write_bytes(CONTENT[:150_000])
    assert fetched(server, tmp_path) == ["bytes=150000-", None]


def test_connection_that_breaks_off_goes_on(server, tmp_path):
    server.cuts = [100_000, 50_000, 0, 10_000, 0, 0]                          # six failures, but never four in a row
    wanted = [None, "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=160000-", "bytes=160000-", "bytes=160000-"]
    assert fetched(server, tmp_path) == wanted


def test_gives_up_and_keeps_what_arrived(server, tmp_path):
    server.cuts = [100_000] + 9 * [0]
    with pytest.raises(ValueError, match=r"data\.bin could not be downloaded: .*broke off.*offline.*to go on"):
        fetched(server, tmp_path)
    assert len(server.asked) == 1 + download.TRIES and server.slept == [0.5, 1, 2, 4]
    assert (tmp_path / "data.bin.part").read_bytes() == CONTENT[:100_000] and not (tmp_path / "data.bin").exists()
    server.cuts = []
    assert fetched(server, tmp_path)[-1] == "bytes=100000-"


def test_damage_before_the_break_is_found_and_fetched_again(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(bytes(150_000))
    assert fetched(server, tmp_path) == ["bytes=150000-", None]
    (tmp_path / "data.bin").unlink()
    (tmp_path / "data.bin.part").write_bytes(bytes(len(CONTENT)))             # as long as the file, and not the file
    assert fetched(server, tmp_path)[2:] == [None]
    (tmp_path / "data.bin").unlink()
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"more")
    assert fetched(server, tmp_path)[3:] == ["bytes=300004-", None]


def test_corrupted_file_is_deleted_and_the_mirror_tried(server, tmp_path):
    server.files["/bad.bin"] = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    server.files["/short.bin"] = CONTENT[:-1]
    with pytest.raises(ValueError, match=r"bad\.bin \(damaged, sha256 [0-9a-f]{64} instead of.*short\.bin \(damaged, 299,999 bytes"):
        fetched(server, tmp_path, f"{server.url}/bad.bin", f"{server.url}/short.bin")
    assert list(tmp_path.iterdir()) == [] and len(server.asked) == 2
    assert len(fetched(server, tmp_path, *(f"{server.url}/{name}.bin" for name in ("none", "bad", "data")))) == 5


def test_refusals_go_to_the_next_address_and_busy_servers_are_asked_again(server, tmp_path):
    with pytest.raises(ValueError, match=r"/none \(Not Found\)"):
        fetched(server, tmp_path, f"{server.url}/none")
    assert len(server.asked) == 1
    server.mode = 503
    with pytest.raises(ValueError, match="Service Unavailable"):
        fetched(server, tmp_path)
    assert len(server.asked) == 1 + download.TRIES


def test_file_of_that_name_that_is_another_one_is_left_alone(server, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"data\.bin: 4 bytes instead of 300,000; delete it"):
        fetched(server, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine" and server.asked == []


def test_without_size_and_digest(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)                         # whole; only the server knows
    assert fetch([f"{server.url}/data.bin"], tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.asked == [("/data.bin", "bytes=300000-")]
    assert fetch([f"{server.url}/data.bin"], tmp_path / "b", digest=("sha256", DIGEST[1][:8])).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="instead of 0000"):
        fetch([f"{server.url}/data.bin"], tmp_path / "c", digest=("sha256", "0000"))


def test_offline(server, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))                                         # bound and not listening: refused
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/data.bin"
        with pytest.raises(ValueError, match=rf"{url} \(.*refused\)\. Is this computer offline\?.*put it here as .*data\.bin$"):
            fetched(server, tmp_path, url)
    assert list(tmp_path.iterdir()) == []


# -- archives ----------------------------------------------------------------------------------------------------------

def tar_bytes(members):
    """members: {name: bytes, or a link's target, or None for a device}."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.mode = 0o644
            if content is None:
                info.type = tarfile.CHRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            file.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


def zip_bytes(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("members", [{"../evil": b"x"}, {"/tmp/evil": b"x"}, {"a/../../evil": b"x"}, {"a": "/etc"}, {"a": "../.."}, {"a": None}],
                         ids=str)
def test_malicious_tar_writes_nothing(tmp_path, members):
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_bytes({"good": b"x", **members}))
    with pytest.raises(ValueError, match=r"a\.tar: .*do not trust it"):
        extract(archive, tmp_path / "in" / "to")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..\\evil"])
def test_malicious_zip_writes_nothing(tmp_path, name):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zip_bytes({"good": b"x", name: b"x"}))
    with pytest.raises(ValueError, match="do not trust it"):
        extract(archive, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    extract_flat(archive, tmp_path / "flat", "evil")                          # base names only: nothing can lead outside
    assert [path.name for path in (tmp_path / "flat").iterdir()] == ["evil"]


def test_archives_are_unpacked_and_damage_is_told(tmp_path):
    for name, content in (("a.tar", tar_bytes({"x/y": b"1", "x/z": "y"})), ("a.zip", zip_bytes({"x/y": b"1"}))):
        (tmp_path / name).write_bytes(content)
        extract(tmp_path / name, tmp_path / f"{name}.d")
        assert (tmp_path / f"{name}.d" / "x" / "y").read_bytes() == b"1"
        (tmp_path / name).write_bytes(b"<html>busy</html>" * 90)
        for action in (lambda path: extract(path, tmp_path / "d"), lambda path: extract_flat(path, tmp_path / "d", "")):
            with pytest.raises(ValueError, match=rf"{name}: damaged .*delete it"):
                action(tmp_path / name)


# -- scripts -----------------------------------------------------------------------------------------------------------

def png(value):
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def voc_server(server, monkeypatch):
    """A VOC 2012 of three photographs with the counts to match; its address is that of all hosts."""
    base, ids = "VOCdevkit/VOC2012", ("a", "b", "c")
    members = {f"{base}/JPEGImages/{name}.jpg": b"jpeg" for name in ids} | {f"{base}/SegmentationClass/{name}.png": png(1) for name in "ab"}
    members |= {f"{base}/ImageSets/Segmentation/{split}.txt": text for split, text in
                (("train", b"a\n"), ("val", b"b\n"), ("trainval", b"a\nb\n"))}
    archive = tar_bytes(members)
    server.files = {f"/voc/{download_voc.ARCHIVE}": archive, "/SegmentationClassAug.zip": zip_bytes(
        {f"SegmentationClassAug/{name}.png": png(2) for name in ids} | {"__MACOSX/SegmentationClassAug/._a.png": b""}), "/list.zip": zip_bytes(
        {"list/train_aug.txt": "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in "ac")})}
    settings = {"SIZE": len(archive), "DIGEST": ("sha256", hashlib.sha256(archive).hexdigest()), "HOSTS": (f"{server.url}/voc",),
                "AUG_LISTS": f"{server.url}/list.zip", "AUG_MASKS": f"{server.url}/SegmentationClassAug.zip",
                "FILES": {"JPEGImages/*.jpg": 3, "SegmentationClass/*.png": 2},
                "LISTS": {"Segmentation/train": 1, "Segmentation/val": 1, "Segmentation/trainval": 2},
                "AUG_FILES": {"SegmentationClassAug/*.png": 3}, "AUG_LISTED": {"SegmentationAug/train_aug": 2}}
    for name, value in settings.items():
        assert type(getattr(download_voc, name)) is type(value)
        monkeypatch.setattr(download_voc, name, value)
    return server


def test_voc_is_downloaded_unpacked_and_readable(voc_server, tmp_path, capsys):
    download_voc.main(["--root", str(tmp_path)])
    assert [image.stem for image, _ in voc.pairs(tmp_path, "trainval")] == ["a", "b"] and len(voc_server.asked) == 1
    with pytest.raises(ValueError, match="--aug those of train_aug"):
        voc.pairs(tmp_path, "train_aug")
    (tmp_path / download_voc.ARCHIVE).unlink()
    download_voc.main(["--root", str(tmp_path), "--aug"])
    assert [path for path, _ in voc_server.asked[1:]] == ["/list.zip", "/SegmentationClassAug.zip"]           # the rest is there, complete
    assert [image.stem for image, _ in voc.pairs(tmp_path, "train_aug")] == ["a", "c"]
    assert "VOC2012: VOCtrainval_11-May-2012.tar is there, complete" in capsys.readouterr().out


def test_voc_mirror_first_and_no_extract(voc_server, tmp_path):
    voc_server.files[f"/mine/{download_voc.ARCHIVE}"] = voc_server.files[f"/voc/{download_voc.ARCHIVE}"]
    download_voc.main(["--root", str(tmp_path), "--mirror", f"{voc_server.url}/mine/", "--no-extract"])
    assert [path for path, _ in voc_server.asked] == [f"/mine/{download_voc.ARCHIVE}"]
    assert [path.name for path in tmp_path.iterdir()] == [download_voc.ARCHIVE]
    download_voc.main(["--root", str(tmp_path)])                              # from the archive that is there
    assert len(voc_server.asked) == 1 and len(voc.pairs(tmp_path, "train")) == 1


def test_voc_that_is_not_complete_is_an_error(voc_server, tmp_path, monkeypatch):
    monkeypatch.setitem(download_voc.FILES, "JPEGImages/*.jpg", 4)
    monkeypatch.setitem(download_voc.LISTS, "Segmentation/val", 7)
    with pytest.raises(ValueError, match=r"3 of 4 JPEGImages/\*\.jpg, 1 of 7 Segmentation/val after unpacking.*delete"):
        download_voc.main(["--root", str(tmp_path)])


def test_numbers_of_the_real_files():
    """Published facts, which nothing else here would notice."""
    assert download_voc.SIZE == 1999639040 and len(download_voc.DIGEST[1]) == 64
    assert list(download_voc.FILES.values()) == [17125, 2913] and list(download_voc.LISTS.values()) == [1464, 1449, 2913]
    assert list(download_voc.AUG_FILES.values()) == [10582 + 1449] and list(download_voc.AUG_LISTED.values()) == [10582]
    assert download_voc.HOSTS[0].startswith("https://thor.robots.ox.ac.uk/")


def test_free_things_are_fetched_and_cityscapes_is_explained(voc_server, tmp_path, monkeypatch, capsys):
    weights = b"weights"
    name = f"resnet34-{hashlib.sha256(weights).hexdigest()[:8]}.pth"
    ade = zip_bytes({f"ADEChallengeData2016/{kind}/{split}/1.{ending}": b"x" for kind, ending in (("images", "jpg"), ("annotations", "png"))
                     for split in ("training", "validation")})
    voc_server.files |= {f"/{name}": weights, "/ade.zip": ade}
    monkeypatch.setattr(download_datasets, "URL", f"{voc_server.url}/")
    monkeypatch.setitem(download_datasets.FILES, "resnet34", name)
    monkeypatch.setattr(download_datasets, "ADE20K", f"{voc_server.url}/ade.zip")
    monkeypatch.setattr(download_datasets, "ADE20K_DIGEST", ("sha1", hashlib.sha1(ade).hexdigest()))
    monkeypatch.setattr(download_datasets, "ADE20K_FILES", dict.fromkeys(download_datasets.ADE20K_FILES, 1))
    download_datasets.main(["resnet34", "voc", "ade20k", "cityscapes", "--root", str(tmp_path)])
    assert (tmp_path / "weights" / name).read_bytes() == weights and len(voc.pairs(tmp_path / "voc", "train_aug")) == 2
    assert (tmp_path / "ade20k/ADEChallengeData2016/images/validation/1.jpg").is_file()
    text = capsys.readouterr().out
    assert "needs an account" in text and f"csDownload -d {tmp_path / 'cityscapes'} gtFine" in text and not (tmp_path / "cityscapes").exists()
    asked = len(voc_server.asked)
    download_datasets.main(["resnet34", "voc", "ade20k", "--root", str(tmp_path)])
    assert len(voc_server.asked) == asked


def test_without_a_name_they_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    download_datasets.main([])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [*download_datasets.DATASETS, *download_datasets.FILES] and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="vocc.*did you mean voc"):
        download_datasets.main(["vocc"])
