"""Every page that is written, opened in a headless browser: no word in its console, nothing asked of the network."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from data.prototype_results import write_gallery
from tests import test_prototype_results as prototypes
from tests.test_report import HISTORY, MATRIX, NAMES
from utils.inspection import Inspection, Picture, write_inspection
from utils.metrics import segmentation_metrics
from utils.render import palette
from utils.report import write_report
from utils.viewer import viewer_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
         "--enable-logging=stderr", "--v=0", "--window-size=1200,800", "--dump-dom"]
BROWSERS_OWN = "not an origin"                              # initiator of what the browser itself asks for
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")


def opened(page: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """The document once its scripts have run, the lines of the console, the addresses that the browser asked for."""
    done = subprocess.run([BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    started = [event["params"] for event in json.loads((folder / "net.json").read_text())["events"] if "url" in event.get("params", {})]
    asked = {one["url"] for one in started if one.get("initiator", BROWSERS_OWN) != BROWSERS_OWN}
    return done.stdout, console, sorted(asked)


def report(folder: Path) -> Path:
    picture = Image.new("RGB", (8, 8), (200, 60, 60))
    examples = [{"name": "a <b>", "score": 0.5, "truth": picture, "pred": picture, "caption": "mIoU 50.0"}]
    write_report(folder / "report.html", title="walls", class_names=NAMES, palette=palette(len(NAMES)), matrix=MATRIX,
                 metrics=segmentation_metrics(MATRIX), history=HISTORY, examples=examples, notes=[("encoder", "random weights")])
    return folder / "report.html"


def gallery(folder: Path) -> Path:
    entries = [prototypes.entry(p, pushed=p != 2) for p in range(6)]
    activations = {p: np.linspace(0, 9, 12).reshape(3, 4) for p in range(6)}
    return write_gallery(folder / "gallery", entries, prototypes.NAMES, prototypes.COLORS, lambda _: prototypes.PHOTO, activations,
                         prototypes.WEIGHTS, [0.5, 1, np.nan, 0, 1, 1])


def viewer(folder: Path) -> Path:
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 2]], float)
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
    colors, page = palette(2), folder / "viewer.html"
    page.write_text(viewer_html(corners, faces, colors[[0, 0, 1, 1]], "a <b>", [("base & </script>", colors[0], 2), ("roof", colors[1], 2)]))
    return page


def inspection(folder: Path) -> Path:
    found = Inspection("Photographs", "pixels", class_names=["a <b>", "c"], palette=palette(2), files={"train": 2})
    found.counts, found.presence, found.ignored = {"train": np.array([9, 1])}, {"train": np.array([2, 1])}, {"train": 0.5}
    found.add("fault", "missing", "<img src=http://127.0.0.1:9/a.png>: mask is missing")
    found.pictures.append(Picture("Random items", "a.png", "train", Image.new("RGB", (8, 8))))
    write_inspection(folder / "inspection.html", found, [("Plan", "data: {root: <b>}")])
    return folder / "inspection.html"


PAGES = {"report": (report, "random weights"), "gallery": (gallery, "Prototypes"), "viewer": (viewer, "Drag to turn"),
         "inspection": (inspection, "mask is missing")}


@needs_browser
@pytest.mark.parametrize("name", list(PAGES))
def test_a_page_runs_without_a_word_and_alone(name, tmp_path):
    write, text = PAGES[name]
    document, console, addresses = opened(write(tmp_path), tmp_path)
    assert text in document and console == [] and addresses == []


@needs_browser
def test_what_a_bad_page_does_is_seen(tmp_path):
    (tmp_path / "page.html").write_text('<!doctype html><title>x</title><img src="http://127.0.0.1:9/a.png"><script>lost()</script>')
    _, console, addresses = opened(tmp_path / "page.html", tmp_path)
    assert any("lost is not defined" in line for line in console) and "http://127.0.0.1:9/a.png" in addresses


def test_the_viewer_says_what_is_where():
    """Coordinates in the unit ball, upright; shares of all faces; names that do no harm."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 2]], float) + 1e6
    text = viewer_html(corners, np.array([[0, 1, 2]] * 4), np.full((4, 3), 9, np.uint8), "</title><b>", [("</script>", (1, 2, 3), 3)], up="z")
    assert "<b>" not in text and text.count("</script>") == 2 and "75.0 %" in text and "rgb(1, 2, 3)" in text and "4 faces" in text
    content = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    place = np.frombuffer(base64.b64decode(content["place"]), "<i2").reshape(4, 3, 3) / 32767
    assert np.abs(place[0] * np.sqrt(1.25) - [[-0.5, 0, -1], [0.5, 0, -1], [-0.5, 0, 1]]).max() < 1e-4        # right, depth, up
    assert len(base64.b64decode(content["color"])) == 12 and content["view"] == pytest.approx([0.436, 0.262], abs=1e-3)
    flat = viewer_html(corners * [9, 9, 1], np.array([[0, 1, 2]]), np.zeros((1, 3), np.uint8), up="z")
    assert '"view": [0.436' in flat and "0.785" in flat                     # from higher up
    assert viewer_html(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3), np.uint8)).count("<tr") == 0


def test_a_report_names_what_its_encoder_is():
    record = {"checkpoint": "m.pth", "sha256": "0" * 64, "epoch": 1, "data": "test split", "files": 2, "device": "cpu"}
    result = {"matrix": np.eye(2), "seconds": 1.0, "tables": {}}
    shown = [dict(evaluate.facts_of(record, result, {"encoder": entry}))["encoder"] for entry in (
        {"file": None}, {"file": "dinov3.pth"}, None)]
    assert shown == ["random weights", "dinov3.pth", "trained with the head"]
