import base64
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.prototype_results import (
    at_pixel,
    crop_and_place,
    explain_pixel,
    explain_pixels,
    heat_overlay,
    prototype_colors,
    write_gallery,
    write_prototype_prediction,
)
from models.prototype_push import cell_box
from tests.test_image_results import as_read
from tests.test_report import Page
from tests.tiny_images import read_mask

NAMES = ["<b>sky</b>", 'tree "old"', "road"]
COLORS = np.array([[0, 0, 0], [0, 128, 0], [128, 64, 128]], np.uint8)
IDENTITY = np.eye(3)[[0, 0, 1, 1, 2, 2]]
WEIGHTS = (1.5 * IDENTITY.T - 0.5).astype(np.float32)
PHOTO = Image.fromarray(np.fromfunction(lambda y, x, _: 7 * x + 40 * (y > 8), (24, 32, 3)).astype(np.uint8))     # tells where a patch is from
GRID = (3, 4)


def entry(p, pushed=True, image="photos/a<i>.jpg", cell=(1, 2), size=(24, 32)):
    """Where prototype p comes from, its number before number 1 was removed."""
    box = cell_box(cell, GRID, size) if pushed else [-1] * 4
    return {"image": image if pushed else None, "index": 0 if pushed else -1, "cell": list(cell), "grid": list(GRID), "size": list(size),
            "cell_box": box, "box": [box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2] if pushed else box, "distance": 0.25 if pushed else None,
            "class": int(IDENTITY[p].argmax()), "prototype": p + (p > 0), "pushed": pushed}


def pictures(text):
    return [Image.open(io.BytesIO(base64.b64decode(code))) for code in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]


def test_shades_of_a_class_differ_and_one_prototype_has_its_colour():
    identity = np.eye(3)[[0] * 30 + [1] * 12 + [2]]                           # 12 > 10: not counted modulo ten
    colors = prototype_colors(identity, COLORS)
    assert colors.dtype == np.uint8 and colors[-1].tolist() == COLORS[2].tolist()
    assert len(np.unique(colors[:30], axis=0)) == 30 and len(np.unique(colors[30:42], axis=0)) == 12
    assert (np.diff(colors[30:42].sum(1).astype(int)) > 0).all()              # dark to light
    assert (colors[30:42, 1] >= colors[30:42, [0, 2]].max(1)).all()           # and all green
    permuted = prototype_colors(identity[::-1], COLORS)
    assert permuted[0].tolist() == COLORS[2].tolist()


def test_heat_is_where_the_values_are():
    values = np.zeros((2, 4))
    values[1, 3] = 5
    black = Image.new("RGB", (40, 20))
    heat = np.asarray(heat_overlay(black, values))
    assert heat[-1, -1].tolist() == [65, 0, 0] and heat[0, 0].tolist() == [0, 0, 65]           # half of dark red, dark blue
    assert np.asarray(heat_overlay(black, np.ones((2, 2)))).std((0, 1)).max() == 0             # one value: one colour
    assert np.asarray(heat_overlay(Image.new("RGB", (40, 20), "white"), values))[-1, -1].tolist() == [192, 128, 128]


def test_patch_and_its_place():
    photo = Image.fromarray(np.full((240, 320, 3), 90, np.uint8))
    photo.paste((250, 0, 0), (100, 40, 140, 60))                              # x 100..139, y 40..59
    crop, whole = crop_and_place(photo, {"box": [40, 100, 60, 140], "cell_box": [48, 110, 57, 119]})
    assert crop.size == (40, 20) and (np.asarray(crop) == [250, 0, 0]).all()
    shown = np.asarray(whole)
    assert whole.size == (200, 150) and shown[25, 75].tolist() == [255, 214, 10]               # 0.625: the box is y 25 to 37, x 62 to 87
    rows, columns = np.nonzero((shown == [255, 214, 10]).all(-1))
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [25, 37, 62, 87]
    rows, columns = np.nonzero((shown == [255, 255, 255]).all(-1))
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == [30, 35, 69, 73]
    assert np.asarray(photo)[40, 100].tolist() == [250, 0, 0] and photo.size == (320, 240)     # nothing was drawn into it


def test_gallery_page(tmp_path):
    entries = [entry(0), entry(1, cell=(0, 0)), entry(2), entry(3, pushed=False), entry(4, size=(99, 32)), entry(5, image="gone.jpg")]
    entries[1]["box"] = entries[1]["cell_box"]
    weights, asked = WEIGHTS.copy(), []
    weights[2, 0] = 0.25

    def read(source):
        asked.append(source["image"])
        return None if source["image"] == "gone.jpg" else PHOTO
    activations = {p: np.eye(3, 4) for p in range(6)}
    path = write_gallery(tmp_path / "new", entries, NAMES, COLORS, read, activations, weights, [0.5, 1, np.nan, 0, 1, 1])
    assert [file.name for file in path.parent.iterdir()] == ["index.html"] == [path.name]
    text = path.read_text()
    page, shown = Page(text), pictures(text)
    assert len(shown) == 9                                                    # three with photographs: patch, place, response
    assert shown[0].size == (13, 15)                                          # cell 1, 2 is x 16 to 24, y 8 to 16; wider by 2 and 3
    assert abs(np.asarray(shown[0]) - np.asarray(PHOTO.crop((14, 5, 27, 20)), float)).mean() < 4
    assert all(max(image.size) <= 200 and image.format == "JPEG" for image in shown)
    whole = "".join(data for _, data in page.texts)
    assert all(part in whole for part in ("#0", "#1 (was 2)", "purity 50 %", 'tree "old"', "<b>sky</b>", "a<i>.jpg, cell 2, 1", "weight 1.00",
                                          "0.25 for road", "distance 0.2500 when pushed", "mean purity", "70.0 %"))
    assert whole.count("0.25 for road") == 1 and "photos/" not in whole
    assert whole.count("not a patch") == 1 and whole.count("is gone, or is another one now") == 2
    assert "<b>sky" not in text and "<i>.jpg" not in text and "http" not in re.sub("http-equiv", "", text)
    assert [tag for tag, _ in page.tags].count("figure") == 6 and None not in asked


def test_gallery_of_a_pruned_class_and_of_other_arrays(tmp_path):
    text = write_gallery(tmp_path, [entry(0)], NAMES, COLORS, lambda _: PHOTO, {}, WEIGHTS[:, :1]).read_text()
    assert text.count("no prototype is left") == 2 and len(pictures(text)) == 2 and "purity 5" not in text
    with pytest.raises(ValueError, match="different networks"):
        write_gallery(tmp_path, [entry(0)], NAMES, COLORS, lambda _: PHOTO, {}, WEIGHTS)
    with pytest.raises(ValueError, match="2 purities"):
        write_gallery(tmp_path, [entry(0)], NAMES, COLORS, lambda _: PHOTO, {}, WEIGHTS[:, :1], [1, 1])


def test_prediction_files(tmp_path):
    label = np.zeros((24, 32), int)
    label[:, 16:] = 2
    prediction = {"label": label, "photo": as_read(PHOTO), "winner": np.array([[0, 4], [1, 5]])}
    colors = prototype_colors(IDENTITY, COLORS)
    written = write_prototype_prediction(tmp_path / "street.1", prediction, COLORS, colors)
    assert [path.name for path in written] == ["street.1.png", "street.1_overlay.png", "street.1_prototypes.png"]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    shown = np.asarray(Image.open(written[2]), float)
    for rows, columns, p in ((slice(12), slice(16), 0), (slice(12), slice(16, 32), 4), (slice(12, 24), slice(16), 1), (slice(12, 24), slice(16, 32), 5)):
        mixed = 0.45 * np.asarray(PHOTO)[rows, columns] + 0.55 * colors[p]
        assert abs(shown[rows, columns] - mixed).max() < 0.51
    only, = write_prototype_prediction(tmp_path / "b", prediction, COLORS, colors, "npy", "none")
    assert (np.load(only) == label).all()


def test_prediction_in_the_numbers_of_the_data_set(tmp_path):
    label = np.array([[0, 1], [2, -100]])
    prediction = {"label": label, "photo": as_read(PHOTO.crop((0, 0, 2, 2))), "winner": np.zeros((1, 1), int)}
    written = [write_prototype_prediction(tmp_path / name, prediction, COLORS, prototype_colors(IDENTITY, COLORS), ignore_label=0, file_ids=ids)
               for name, ids in (("ids", np.array([7, 3, 11])), ("plain", None))]
    mask = Image.open(written[0][0])
    assert np.asarray(mask).tolist() == [[7, 3], [11, 0]]
    assert (np.asarray(mask.convert("RGB"))[label >= 0] == COLORS).all()
    assert (np.asarray(Image.open(written[0][1])) == np.asarray(Image.open(written[1][1]))).all()
    assert (label == [[0, 1], [2, -100]]).all() and (read_mask(written[1][0], 3, 9) == np.array([[0, 1], [2, 0]])).all()


@pytest.mark.parametrize("size", [(24, 32), (23, 35), (2, 3), (3, 4)])
def test_values_of_a_pixel_are_those_of_the_enlarged_map(size):
    maps = np.random.default_rng(1).normal(size=(5, *GRID)).astype(np.float32)
    whole = F.interpolate(torch.from_numpy(maps)[None].double(), size, mode="bilinear")[0].numpy()
    ours = np.array([[at_pixel(maps, size, x, y) for x in range(size[1])] for y in range(size[0])])      # (H, W, K)
    assert abs(ours.transpose(2, 0, 1) - whole).max() < 1e-9


def similarity_maps():
    return np.random.default_rng(2).uniform(0, 9, (6, *GRID)).astype(np.float32)


def test_contributions_sum_to_the_logit_of_the_label_map():
    similarity = similarity_maps()
    weights = np.random.default_rng(3).normal(size=(3, 6)).astype(np.float32)
    logits = F.interpolate(torch.from_numpy(np.einsum("cp,phw->chw", weights, similarity))[None], (24, 32), mode="bilinear")[0].numpy()
    for x, y in ((0, 0), (31, 23), (13, 8)):
        found = explain_pixel(x, y, (24, 32), weights, similarity, NAMES, IDENTITY, None)
        c = logits[:, y, x].argmax()
        assert (found["class"], found["class_name"]) == (c, NAMES[c]) and abs(found["logit"] - logits[c, y, x]) < 1e-4
        rows, others = found["prototypes"], found["other_prototypes"]
        assert abs(sum(row["contribution"] for row in rows) + others["contribution"] - found["logit"]) < 1e-9
        assert len(rows) == 5 and others["count"] == 1
        for row in rows:
            assert abs(row["similarity"] * row["weight"] - row["contribution"]) < 1e-9
            assert row["weight"] == weights[c, row["prototype"]] and row["class"] == IDENTITY[row["prototype"]].argmax()
        sizes = [abs(row["contribution"]) for row in rows]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= abs(others["contribution"]) and rows[0]["source"] is None


def test_explained_pixels_as_page_and_json(tmp_path):
    entries = [entry(p, pushed=p != 3) for p in range(6)]
    similarity = similarity_maps()
    similarity[3], similarity[0] = 8.0, 7.0                                   # both are told of
    written = explain_pixels(tmp_path / "street.1", PHOTO, [(3, 20), (31, 0)], WEIGHTS, similarity, NAMES, IDENTITY, entries, lambda _: PHOTO)
    assert [path.name for path in written] == ["street.1_explain.json", "street.1_explain.html"]
    record = json.loads(written[0].read_text())
    assert record["size"] == [24, 32] and [(pixel["x"], pixel["y"]) for pixel in record["pixels"]] == [(3, 20), (31, 0)]
    first = record["pixels"][0]
    source = next(row for row in first["prototypes"] if row["prototype"] == 0)["source"]
    assert source == entries[0]                                               # the picture, cell and box of that prototype, no other
    text = written[1].read_text()
    page = "".join(data for _, data in Page(text).texts)
    told = sum(row["prototype"] != 3 for pixel in record["pixels"] for row in pixel["prototypes"])
    assert len(pictures(text)) == 1 + 2 * told and "not a patch of a training image" in page and "#1 (was 2)" in page
    assert f"1: pixel 3, 20 is {first['class_name']}" in page and f"{first['logit']:+.3f}" in page and "1 other prototypes" in page
    assert "<b>sky" not in text and "<i>.jpg" not in text


def test_pixels_of_an_unpushed_network_and_outside(tmp_path):
    arguments = (WEIGHTS, similarity_maps(), NAMES, IDENTITY, None, lambda _: PHOTO)
    written = explain_pixels(tmp_path / "a", PHOTO, [(0, 0)], *arguments)
    assert len(pictures(written[1].read_text())) == 1
    for pixel in ((32, 0), (0, 24), (-1, 0)):
        with pytest.raises(ValueError, match=r"pixel -?\d+,\d+ is not on the photograph.*0 to 31 and rows 0 to 23"):
            explain_pixels(tmp_path / "b", PHOTO, [(0, 0), pixel], *arguments)
    assert not list(tmp_path.glob("b*"))
