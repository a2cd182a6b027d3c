import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from utils.metrics import segmentation_metrics
from utils.report import nice_ticks, write_report

MATRIX = np.array([[8, 2, 0], [1, 5, 0], [0, 0, 0]])                    # no truth or prediction is of the third class
NAMES = ["wall", "door", "sign"]
COLORS = np.array([[255, 0, 0], [0, 128, 0], [0, 0, 16]], np.uint8)
HISTORY = [{"epoch": epoch, "step": 10 * epoch, "split": split, "loss": loss, "miou": miou, "mean_f1": 0.5,
            "overall_accuracy": 0.9}
           for epoch, loss, miou in ((1, 2.0, 0.2), (2, 0.5, 0.7), (3, 1.0, 0.6)) for split in ("train", "val")]


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a test asks for."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.texts = [], [], []
        self.feed(text)
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append((tuple(self.stack), data))

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k.strip("_")) == v for k, v in wanted.items())]

    def text(self, *path):
        return [data for stack, data in self.texts if stack[-len(path):] == path]


def page(tmp_path, **changes):
    arguments = {"title": "wall on test", "class_names": NAMES, "palette": COLORS, "matrix": MATRIX,
                 "metrics": segmentation_metrics(MATRIX), "history": HISTORY, **changes}
    write_report(tmp_path / "report.html", **arguments)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def example(name, score, truth=True, size=8):
    image = Image.new("RGB", (size, size), (int(100 * score), 0, 0))
    return {"name": name, "score": score, "truth": image if truth else None, "pred": image, "caption": f"of {name}"}


def test_headline_and_classes_by_hand(tmp_path):
    parsed, _ = page(tmp_path)
    # IoU 8/11 and 5/8; F1 16/19 and 10/13; recall 8/10 and 5/6; accuracy 13/16.
    frequency_weighted = 100 * (10 * 8 / 11 + 6 * 5 / 8) / 16
    assert parsed.text("div", "b") == ["67.61", "80.57", "81.67", "81.25", f"{frequency_weighted:.2f}"]
    cells = parsed.text("tbody", "tr", "td")
    assert cells[:15] == ["wall", "62.5", "72.73", "84.21", "80.00", "door", "37.5", "62.50", "76.92", "83.33",
                          "sign", "0.0", "–", "–", "–"]
    widths = [float(a["width"]) for a in parsed.all("rect", height="8") if a["fill"] != "var(--line)"]
    assert widths == pytest.approx([72.73, 84.21, 62.5, 76.92, 0, 0], abs=0.01)
    assert [a["style"] for a in parsed.all("i")] == ["background:#ff0000", "background:#008000", "background:#000010"]


def test_confusion_matrix_and_mistakes(tmp_path):
    parsed, _ = page(tmp_path)
    titles = parsed.text("g", "title")
    assert titles[:2] == ["wall found: 80.00 %, 8 of 10", "wall taken for door: 20.00 %, 2 of 10"] and len(titles) == 4
    shown = [float(a["fill-opacity"]) for a in parsed.all("rect") if "fill-opacity" in a]
    assert shown == pytest.approx([0.03 + 0.97 * x for x in (0.8, 0.2, 1 / 6, 5 / 6)], abs=1e-3)
    assert parsed.text("g", "text") == ["80", "20", "17", "83"]
    x, y = zip(*[(float(a["x"]), float(a["y"])) for a in parsed.all("rect") if "fill-opacity" in a], strict=True)
    assert x[0] == x[2] < x[1] == x[3] and y[0] == y[1] < y[2] == y[3]                 # a row is a true class
    assert parsed.text("tbody", "tr", "td")[15:] == ["wall → door", "20.0", "2", "door → wall", "16.7", "1"]
    weighted, _ = page(tmp_path, matrix=MATRIX * 0.25)
    assert "wall found: 80.00 %, 2 of 2.5" in weighted.text("g", "title")
    perfect, text = page(tmp_path, matrix=np.diag([3, 4, 0]))
    assert "Largest mistakes" not in text


def test_curves(tmp_path):
    parsed, text = page(tmp_path)
    paths = [a["d"] for a in parsed.all("path") if a["d"] != "M0 1.5H22"]
    assert len(paths) == 5                                                # val and train loss; mIoU, F1, accuracy
    points = [[tuple(map(float, p.split())) for p in d[1:].split("L")] for d in paths]
    x, y = zip(*points[0], strict=True)
    assert x[0] < x[1] < x[2] and x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[1] > y[2] > y[0]                                             # in SVG, down is more: a low loss lies low
    assert (y[2] - y[0]) / (y[1] - y[0]) == pytest.approx(1.0 / 1.5, abs=0.01)
    assert parsed.text("circle", "title")[0] == "val: 0.500 in epoch 2"
    assert parsed.text("circle", "title")[2] == "mIoU: 70.00 in epoch 2"
    assert "Scores on val, percent" in text


@pytest.mark.parametrize("history", [
    [], [{"epoch": 1, "split": "val"}], [{"epoch": 1, "step": 3, "split": "val", "loss": None, "miou": float("nan")}]])
def test_no_curves_without_numbers(tmp_path, history):
    _, text = page(tmp_path, history=history)
    assert "<h2>Training" not in text


def test_a_single_record_and_gaps(tmp_path):
    parsed, text = page(tmp_path, history=HISTORY[1:2])
    assert len(parsed.all("circle")) == 4 and "nan" not in text.lower()
    parsed, _ = page(tmp_path, history=[*HISTORY, {"epoch": 4, "split": "val", "loss": None, "miou": 0.9}])
    assert parsed.text("circle", "title")[:3] == ["val: 0.500 in epoch 2", "train: 0.500 in epoch 2",
                                                  "mIoU: 90.00 in epoch 4"]


def test_nice_ticks():
    assert nice_ticks(0.13, 2.06) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert nice_ticks(1, 40, 6) == [0, 10, 20, 30, 40]
    assert nice_ticks(-3, 11) == [-5, 0, 5, 10, 15]
    assert nice_ticks(0.0001, 0.0002) == pytest.approx([0.0001, 0.00012, 0.00014, 0.00016, 0.00018, 0.0002])
    for low, high in ((5, 5), (0, 0), (-2, -2)):
        ticks = nice_ticks(low, high)
        assert len(ticks) > 1 and ticks[0] <= low < ticks[-1]


def test_gallery_order_and_pictures(tmp_path):
    scores = {"a": 0.5, "b": 0.1, "c": 0.9, "d": 0.7}
    parsed, text = page(tmp_path, examples=[example(name, score, truth=name != "b") for name, score in scores.items()])
    assert parsed.text("header", "span") == ["b", "a", "c", "d"]
    assert parsed.text("header", "b") == ["10.0", "50.0", "90.0", "70.0"]
    places = [text.index(part) for part in ("Lowest scores", 'alt="prediction, b"', "Highest scores", ">c<")]
    assert places == sorted(places)
    images = parsed.all("img")
    pairs = [f"{word}, {name}" for name in "acd" for word in ("truth", "prediction")]
    assert [a["alt"] for a in images] == ["prediction, b", *pairs]
    kind, data = images[0]["src"].split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((3, 3)) == (10, 0, 0)
    assert len(parsed.all("i")) == 6                                       # the legend names every class once more
    one, text = page(tmp_path, examples=[example("only", 0.3)])
    assert "Highest scores" not in text


def test_a_photograph_becomes_jpeg_and_transparency_stays(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 4), np.uint8)
    for channels, kind in ((3, "image/jpeg"), (4, "image/png")):
        picture = {**example("noise", 0.5), "pred": Image.fromarray(noise[..., :channels]), "truth": None}
        parsed, _ = page(tmp_path, examples=[picture])
        assert parsed.all("img")[0]["src"].startswith(f"data:{kind};base64,")


def test_notes(tmp_path):
    parsed, _ = page(tmp_path, notes=[("epoch", 3), ("encoder", None)])
    assert parsed.text("div", "dt") == ["epoch", "encoder"] and parsed.text("div", "dd") == ["3", "None"]


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path):
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
    parsed, text = page(tmp_path, title=evil, class_names=[evil, "b" + evil, "c" + evil],
                        history=[{**HISTORY[0], "split": evil}, {**HISTORY[1], "split": evil}],
                        examples=[{**example(evil, 0.4), "caption": evil}], notes=[(evil, evil)])
    assert not parsed.all("script") and "onerror" not in {key for _, a in parsed.tags for key in a}
    assert all(a["src"].startswith("data:image/") for a in parsed.all("img")) and len(parsed.all("img")) == 2
    assert not re.search(r"(https?:)?//|url\(|@import|javascript:", re.sub(r"base64,[^\"]*", "", text))
    assert any(a.get("content", "").startswith("default-src 'none'") for a in parsed.all("meta"))
    assert {tag for tag, _ in parsed.tags} <= set(
        "html head meta title style body main h1 h2 h3 p div b span dl dt dd table thead tbody tr th td svg rect text "
        "g path line circle i figure header figcaption img".split())


@pytest.mark.parametrize("num_classes", [1, 2, 40, 200])
def test_any_number_of_classes(tmp_path, num_classes):
    rng = np.random.default_rng(0)
    matrix = np.diag(rng.integers(5, 90, num_classes)) + (rng.random((num_classes,) * 2) < 0.05)
    parsed, text = page(tmp_path, class_names=[f"class number {c}" for c in range(num_classes)], matrix=matrix,
                        palette=np.zeros((num_classes, 3)), metrics=segmentation_metrics(matrix))
    assert len(text) < 2_000_000 and len(parsed.text("g", "title")) == (matrix > 0).sum()


def test_empty_split(tmp_path):
    matrix = np.zeros((3, 3), int)
    parsed, text = page(tmp_path, matrix=matrix, metrics=segmentation_metrics(matrix))
    assert parsed.text("div", "b") == ["–"] * 5 and not re.search(r"\bnan\b", text)


def test_errors_and_replacing(tmp_path):
    page(tmp_path)
    with pytest.raises(ValueError, match="3 class names, 2 colours.*one name, colour, score and row per class"):
        page(tmp_path, palette=COLORS[:2])
    with pytest.raises(ValueError, match=r"a matrix \(2, 2\)"):
        page(tmp_path, matrix=MATRIX[:2, :2])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]   # the old one stays, no scrap beside it
