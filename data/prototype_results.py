"""What a prototype network has learned and why it decides as it does: a page of all prototypes, explained pixels.

All from plain arrays. P prototypes, C classes, h x w grid of cells, H x W photograph. A provenance entry is one of
models.prototype_push.provenance; `read_photo` maps an entry to its photograph, or to None where that is gone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.image_results import palette_by_number, write_image_result
from data.label_map import LabelMap
from utils.report import data_uri, dot, notes_list, write_page

THUMBNAIL = 200                             # longest side of a picture, pixels
TOP = 5                                     # prototypes of an explained pixel that are told one by one
BOX_COLOR, CELL_COLOR = (255, 214, 10), (255, 255, 255)
# Colours of a heat map from lowest to highest, as in the well-known "jet".
HEAT = np.array([[0, 0, 130], [0, 70, 255], [0, 230, 255], [130, 255, 120], [255, 230, 0], [255, 60, 0], [130, 0, 0]])
CSS = """
h2 + p.lead { margin-top: 4px; } .gallery { margin-top: 12px; }
.pair img { aspect-ratio: 4 / 3; object-fit: contain; background: var(--card); }
figure.none { border-style: dashed; } td img { display: block; width: 144px; height: 108px; object-fit: contain; }
main > img { display: block; max-width: 100%; }
"""


def prototype_colors(class_identity: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colours (P, 3) uint8: shades of the class's colour, dark to light, no two of a class alike.

    class_identity (P, C) one-hot, palette (C, 3) uint8. The only prototype of a class has the class's own colour; many
    lie evenly between 20 and 80 % of the way from black through that colour to white.
    """
    classes = class_identity.argmax(1)
    colors = palette[classes].astype(np.uint8)
    for c in np.unique(classes):
        own = np.flatnonzero(classes == c)
        if len(own) > 1:
            way = np.array([[0, 0, 0], palette[c], [255, 255, 255]], float)
            length = np.concatenate([[0], np.linalg.norm(np.diff(way, axis=0), axis=1).cumsum()])
            places = np.linspace(0.2, 0.8, len(own)) * length[-1]
            colors[own] = np.stack([np.interp(places, length, way[:, i]) for i in range(3)], 1).round()
    return colors


# -- pictures of a prototype -------------------------------------------------------------------------------------------

def heat_overlay(photo: Image.Image, values: np.ndarray) -> Image.Image:
    """Half the photograph, half a heat map of values (h, w), lowest blue, the highest 1 % red, enlarged bilinearly: on
    its own photograph a prototype meets itself in one cell, beside which all else would be blue."""
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    scaled = ((values - low) / (high - low)).clip(max=1) if high > low else np.zeros(values.shape)
    places = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(photo.size, Image.Resampling.BILINEAR))
    heat = np.stack([np.interp(places, np.linspace(0, 1, len(HEAT)), HEAT[:, i]) for i in range(3)], -1)  # (H, W, 3)
    return Image.fromarray((0.5 * np.asarray(photo.convert("RGB")) + 0.5 * heat).round().astype(np.uint8))


def _thumbnail(photo):
    photo = photo.convert("RGB")
    photo.thumbnail((THUMBNAIL, THUMBNAIL))
    return photo


def crop_and_place(photo: Image.Image, entry: Mapping) -> tuple[Image.Image, Image.Image]:
    """The patch of a provenance entry, and the whole photograph with the patch's box and its cell drawn into it."""
    y0, x0, y1, x1 = entry["box"]
    crop, whole = _thumbnail(photo.crop((x0, y0, x1, y1))), _thumbnail(photo)
    draw = ImageDraw.Draw(whole)
    scale = (whole.width / photo.width, whole.height / photo.height)
    for box, color in ((entry["cell_box"], CELL_COLOR), (entry["box"], BOX_COLOR)):
        top, left, bottom, right = (round(edge * scale[i % 2 == 0]) for i, edge in enumerate(box))
        right, bottom = max(left, right - 1), max(top, bottom - 1)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0))        # seen on any photograph
        draw.rectangle((left, top, right, bottom), outline=color)
    return crop, whole


def source_photo(entry: Mapping, read_photo: Callable) -> Image.Image | None:
    """The photograph a prototype was cut from; None for one that was not pushed, and where the file is gone or has
    another size than then, so that it cannot be the same photograph."""
    photo = read_photo(entry) if entry["pushed"] else None
    return photo if photo is not None and [photo.height, photo.width] == list(entry["size"]) else None


def _img(image, text):
    return f'<img src="{data_uri(image, jpeg=True)}" alt="{escape(text)}">'


def _name(p, entry):
    """#3, and the number it had before others were removed."""
    return f"#{p}" if entry["prototype"] == p else f"#{p} (was {entry['prototype']})"


# -- page of all prototypes --------------------------------------------------------------------------------------------

def write_gallery(folder: str | Path, provenance: Sequence[Mapping], class_names: Sequence[str], palette: np.ndarray,
                  read_photo: Callable[[Mapping], Image.Image | None], activations: Mapping[int, np.ndarray],
                  weights: np.ndarray, purity: Sequence[float] | None = None) -> Path:
    """Write FOLDER/index.html, a page that needs no other file: all prototypes by class, each with its patch, where it
    lies in its photograph and where else on it the prototype responds.

    provenance: P entries; palette (C, 3); activations: prototype -> (h, w) its similarities on its own photograph;
    weights (C, P) of the last layer; purity (P,) in [0, 1] or None. ValueError where these are not of P prototypes.
    """
    P, C = len(provenance), len(class_names)
    if weights.shape != (C, P) or (purity is not None and len(purity) != P):
        raise ValueError(f"{folder}: {P} places of prototypes and {C} classes, but weights {weights.shape} and "
                         f"{P if purity is None else len(purity)} purities; they are of different networks")
    colors = ["#{:02x}{:02x}{:02x}".format(*map(int, color)) for color in palette]
    unpushed = sum(not entry["pushed"] for entry in provenance)
    notes = [("prototypes", P), ("classes", C), ("photographs they come from", len({e["index"] for e in provenance
                                                                                   if e["pushed"]}))]
    if unpushed:
        notes.append(("without a patch", unpushed))
    if purity is not None:
        notes.append(("mean purity", f"{100 * np.nanmean(purity):.1f} %"))
    body = ["<h1>Prototypes</h1>", '<p class="lead">A cell of an image is compared with these patches of training '
            "images; its class follows from how similar it is to each. The yellow box is the part of the photograph "
            "that a prototype responds to around its own cell, the white one. Purity: share of the nearest patches of "
            "the training images that are of the prototype's class. Weight: what one unit of similarity adds to its "
            "class.</p>", notes_list(notes)]
    for c, name in enumerate(class_names):
        own = [p for p, entry in enumerate(provenance) if entry["class"] == c]
        cards = "".join(_card(p, provenance[p], read_photo, activations.get(p), weights[:, p], class_names,
                              None if purity is None else float(purity[p])) for p in own)
        count = "no prototype is left"
        if own:
            count = "1 prototype" if len(own) == 1 else f"{len(own)} prototypes"
        body.append(f'<h2>{dot(colors[c])}{escape(name)}</h2><p class="lead">{count}</p>'
                    f'<div class="gallery">{cards}</div>')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / "index.html", "Prototypes", body, CSS)
    return folder / "index.html"


def _card(p, entry, read_photo, activation, weights, names, purity):
    """One prototype: header, three pictures, caption. weights (C,): its column of the last layer."""
    photo = source_photo(entry, read_photo)
    right = ""
    if purity is not None and math.isfinite(purity):
        right = f"<b>purity {100 * purity:.0f} %</b>"
    texts = [f"weight {weights[entry['class']]:.2f}"]
    texts += [f"{weight:.2f} for {names[c]}" for c, weight in enumerate(weights) if weight > 0 and c != entry["class"]]
    if entry["pushed"]:
        y, x = entry["cell"]
        texts = [f"{Path(entry['image']).name}, cell {x}, {y}", f"distance {entry['distance']:.4f} when pushed", *texts]
    pictures = []
    if photo is not None:
        crop, whole = crop_and_place(photo, entry)
        pictures = [("patch", crop), ("where it lies", whole)]
        if activation is not None:
            pictures.append(("where it responds", heat_overlay(_thumbnail(photo), activation)))
    elif entry["pushed"]:
        texts.append("its photograph is gone, or is another one now")
    else:
        texts.append("not a patch: no training image shows its class, it is the vector that training left")
    pair = "".join(f"<div><p>{text}</p>{_img(image, f'{text}, prototype {p}')}</div>" for text, image in pictures)
    return (f"<figure{'' if pictures else ' class=none'}><header><span>{_name(p, entry)}</span>{right}</header>"
            f'<div class="pair">{pair}</div><figcaption>{escape(" · ".join(texts))}</figcaption></figure>')


# -- predictions and their reasons -------------------------------------------------------------------------------------

def write_prototype_prediction(stem: Path, prediction: Mapping, palette: np.ndarray, colors: np.ndarray,
                               labels: str = "png", picture: str = "png", ignore_label: int = 255,
                               reduce_zero_label: bool = False, file_ids: np.ndarray | None = None,
                               label_map: LabelMap | None = None, confidence: bool = False) -> list[Path]:
    """data.image_results.write_image_result, with STEM_prototypes unless picture is "none": over the photograph, in
    `colors` (P, 3), the prototype that won each cell. Returns the paths.

    prediction: as there, and winner (h, w) integer; palette (C, 3) uint8. file_ids (C,): the number of
    each class in the mask files where it is not its place (Cityscapes).
    """
    shown = prediction
    if file_ids is not None:
        known = prediction["label"] >= 0
        shown = {**prediction, "label": np.where(known, file_ids[prediction["label"] * known], prediction["label"])}
        palette = palette_by_number(palette, file_ids)
    return write_image_result(stem, shown, palette, labels, picture, ignore_label, reduce_zero_label,
                              label_map=label_map, confidence=confidence, winner=(prediction["winner"], colors))


def at_pixel(maps: np.ndarray, size: tuple[int, int], x: int, y: int) -> np.ndarray:
    """Values (K,) float64 of maps (K, h, w) at pixel (x, y) of an image of size (H, W), to which they are enlarged
    bilinearly (torch's align_corners=False)."""
    near, share = [], []
    for place, length, cells in zip((y, x), size, maps.shape[1:], strict=True):
        position = min(max((place + 0.5) * cells / length - 0.5, 0), cells - 1)
        near.append([int(position), min(int(position) + 1, cells - 1)])
        share.append([1 - position % 1, position % 1])
    corners = maps[:, near[0]][:, :, near[1]].astype(np.float64)                                # (K, 2, 2)
    return np.einsum("kij,i,j->k", corners, *share)


def explain_pixel(x: int, y: int, size: tuple[int, int], weights: np.ndarray, similarity: np.ndarray,
                  class_names: Sequence[str], class_identity: np.ndarray,
                  provenance: Sequence[Mapping] | None) -> dict:
    """Why pixel (x, y) has its class, in plain types: the class and its logit, the TOP prototypes by the size of what
    they contribute, and the sum of all others; together exactly the logit, which has no other terms.

    Logits are enlarged to the image bilinearly, so those of a pixel come from the equally enlarged similarities.
    ValueError for a pixel outside of size (H, W). Other arguments as for explain_pixels.
    """
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise ValueError(f"pixel {x},{y} is not on the photograph, whose columns are 0 to {size[1] - 1} and rows 0 to "
                         f"{size[0] - 1}; correct --explain")
    values = at_pixel(similarity, size, x, y)                                                   # (P,)
    logits = weights.astype(np.float64) @ values
    c = int(logits.argmax())
    contributions = weights[c] * values
    top = np.argsort(-abs(contributions), kind="stable")[:TOP]
    prototypes = []
    for p in top.tolist():
        own = int(class_identity[p].argmax())
        prototypes.append({"prototype": p, "class": own, "class_name": class_names[own],
                           "similarity": float(values[p]), "weight": float(weights[c, p]),
                           "contribution": float(contributions[p]),
                           "source": dict(provenance[p]) if provenance is not None else None})
    return {"x": x, "y": y, "class": c, "class_name": class_names[c], "logit": float(logits[c]),
            "prototypes": prototypes,
            "other_prototypes": {"count": len(values) - len(top),
                                 "contribution": float(np.delete(contributions, top).sum())}}


def explain_pixels(stem: Path, photo: Image.Image, pixels: Sequence[tuple[int, int]], weights: np.ndarray,
                   similarity: np.ndarray, class_names: Sequence[str], class_identity: np.ndarray,
                   provenance: Sequence[Mapping] | None,
                   read_photo: Callable[[Mapping], Image.Image | None]) -> list[Path]:
    """Write STEM_explain.json and the page STEM_explain.html: for each pixel (x, y) of `photo` what explain_pixel says,
    on the page with the patches beside it. Returns the paths.

    weights (C, P) of the last layer, similarity (P, h, w), class_identity (P, C) one-hot; provenance None: not pushed.
    ValueError for a pixel that is not on the photograph.
    """
    found = [explain_pixel(x, y, (photo.height, photo.width), weights, similarity, class_names, class_identity,
                           provenance) for x, y in pixels]
    written = [stem.with_name(f"{stem.name}_explain.{ending}") for ending in ("json", "html")]
    record = {"image": stem.name, "size": [photo.height, photo.width], "pixels": found}
    written[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    body = [f"<h1>{escape(stem.name)}</h1>", '<p class="lead">The logit of a pixel is the sum of what the prototypes '
            "contribute: similarity times weight.</p>", _img(_marked(photo, pixels), "the photograph, pixels marked")]
    body += [_explanation(number, pixel, read_photo) for number, pixel in enumerate(found, 1)]
    write_page(written[1], stem.name, body, CSS)
    return written


def _marked(photo, pixels):
    """The photograph, at most 1024 long, with a numbered ring around each pixel."""
    picture = photo.convert("RGB")
    picture.thumbnail((1024, 1024))
    draw = ImageDraw.Draw(picture)
    for number, (x, y) in enumerate(pixels, 1):
        column, row = ((place + 0.5) * shown / length for place, shown, length
                       in zip((x, y), picture.size, photo.size, strict=True))
        for radius, color, width in ((9, (0, 0, 0), 4), (8, BOX_COLOR, 2)):
            draw.ellipse((column - radius, row - radius, column + radius, row + radius), outline=color, width=width)
        left = column + 12 if column + 28 < picture.width else column - 24
        draw.text((left, row - 8), str(number), fill=BOX_COLOR, stroke_width=2, stroke_fill=(0, 0, 0), font_size=15)
    return picture


def _explanation(number, pixel, read_photo):
    """One explained pixel as a table of its prototypes."""
    others = pixel["other_prototypes"]
    largest = max([abs(row["contribution"]) for row in (*pixel["prototypes"], others)] + [1e-30])

    def bar(value):
        color = "--one" if value >= 0 else "--two"
        return (f'<td class="n">{value:+.3f}</td><td class="bar"><svg viewBox="0 0 100 8" preserveAspectRatio="none">'
                f'<rect width="{100 * abs(value) / largest:.2f}" height="8" fill="var({color})"/></svg></td>')

    rows = ""
    for row in pixel["prototypes"]:
        entry = row["source"]
        pictures = []
        place = "not a patch of a training image"
        if entry is not None and entry["pushed"]:
            place = f"{Path(entry['image']).name}, cell {entry['cell'][1]}, {entry['cell'][0]}"
            photo = source_photo(entry, read_photo)
            pictures = crop_and_place(photo, entry) if photo is not None else []
        title = f"#{row['prototype']}" if entry is None else _name(row["prototype"], entry)
        cells = "".join(f"<td>{_img(picture, place)}</td>" for picture in pictures) or '<td colspan="2"></td>'
        rows += (f'<tr>{cells}<td class="name">{title} {escape(row["class_name"])}<br><span class="small">'
                 f'{escape(place)}</span></td><td class="n">{row["similarity"]:.3f}</td>'
                 f'<td class="n">{row["weight"]:.3f}</td>{bar(row["contribution"])}</tr>')
    rows += (f'<tr><td colspan="5">{others["count"]} other prototypes</td>{bar(others["contribution"])}</tr>'
             f'<tr><td colspan="5"><b>logit</b></td><td class="n"><b>{pixel["logit"]:+.3f}</b></td><td></td></tr>')
    return (f'<h2>{number}: pixel {pixel["x"]}, {pixel["y"]} is {escape(pixel["class_name"])}</h2><div class="scroll">'
            '<table><thead><tr><th>patch</th><th>where it lies</th><th>prototype</th><th class="n">similarity</th>'
            f'<th class="n">weight</th><th class="n" colspan="2">contribution</th></tr></thead><tbody>{rows}</tbody>'
            '</table></div>')
