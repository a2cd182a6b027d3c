"""One HTML file with everything about an evaluation: numbers, classes, confusions, learning curves, pictures.

Nothing is loaded from elsewhere: no script, no font, no network; charts are SVG, pictures are inside as base64. It can
be mailed, printed and read on a phone, in light and dark. Names and texts are escaped, and the page's own policy
forbids scripts, so that a class name from a stranger's checkpoint stays text.
"""

import base64
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from utils.files import replacing

MAX_PNG = 100_000        # bytes; a photograph above this is kept as JPEG

HEADLINE = [("miou", "mIoU"), ("mean_f1", "mean F1"), ("mean_accuracy", "mean accuracy"),
            ("overall_accuracy", "overall accuracy"), ("fw_iou", "freq.-weighted IoU")]
SCORES = [("miou", "mIoU"), ("mean_f1", "mean F1"), ("overall_accuracy", "overall accuracy")]

CSS = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f8; --ink: #16191d; --soft: #5a646e; --line: #e2e5e9;
  --one: #1b66b0; --two: #d0690a; --three: #12805f; --tint: #a9c8e8; --on: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1d2126; --ink: #e9ebee; --soft: #9ca6b0; --line: #30363d;
    --one: #67a9ea; --two: #f2a154; --three: #4cc3a0; --tint: #35608b; --on: #0d1217; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 32px 72px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 32px; }
h2 { font-size: 19px; font-weight: 620; margin: 64px 0 4px; }
h3 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 24px 0 8px; }
h1, dd, header span { overflow-wrap: anywhere; }
p { margin: 0; } p.lead { color: var(--soft); margin-bottom: 20px; max-width: 68ch; }
svg { display: block; } svg text { fill: var(--soft); font-size: 12px; }
.tiles { display: grid; grid-template-columns: 1.5fr 1fr 1fr 1fr 1.25fr; border: 1px solid var(--line);
  border-radius: 10px; }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: 18px 20px 16px;
  border-left: 1px solid var(--line); }
.tiles div:first-child { border-left: 0; }
.tiles b { font-size: 27px; line-height: 1.3; font-weight: 600; letter-spacing: -.02em; }
.tiles div:first-child b { font-size: 44px; line-height: 1.1; color: var(--one); }
.tiles span, dt, th, figcaption, .keys, .small, .pair p { color: var(--soft); font-size: 13px; }
dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px 32px; margin: 28px 0 0; } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; white-space: nowrap; }
th, td { padding: 8px 20px 8px 0; border-bottom: 1px solid var(--line); } tr > :last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; } td.name { min-width: 9em; }
td.bar { width: 24%; min-width: 72px; padding-right: 10px; } td.bar svg { width: 100%; height: 8px; }
i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 9px; vertical-align: -1px; }
.two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 16px 48px; }
.confusion { grid-template-columns: minmax(0, auto) minmax(240px, 1fr); }
.chart { display: flex; flex-direction: column; break-inside: avoid; }
.chart > svg { width: 100%; height: auto; margin-top: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 14px; } .keys b { color: var(--ink); }
.keys span { white-space: nowrap; } .keys svg { display: inline; margin-right: 7px; vertical-align: 3px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 20px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; break-inside: avoid; }
figure header { display: flex; justify-content: space-between; gap: 16px; padding: 10px 16px; }
figure header { border-bottom: 1px solid var(--line); } figcaption { padding: 7px 16px 8px; }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); }
.pair div + div { border-left: 1px solid var(--line); } .pair p { padding: 6px 16px; }
.pair img { display: block; width: 100%; background: #fff; }
@media (max-width: 760px) {
  main { padding: 28px 18px 48px; } h1 { font-size: 24px; margin-bottom: 20px; } h2 { margin-top: 44px; }
  .tiles, dl { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } .two { grid-template-columns: minmax(0, 1fr); }
  .tiles div { padding: 12px 16px; border-top: 1px solid var(--line); } .tiles div:nth-child(2n) { border-left: 0; }
  .tiles div:first-child { grid-column: 1 / -1; border-top: 0; } .tiles b { font-size: 22px; }
  th, td { padding-right: 10px; } td.name { min-width: 7em; } td.bar { min-width: 40px; }
  td.f1 { width: 0; min-width: 0; padding: 0; } td.f1 svg { display: none; } .keys span { white-space: normal; } }
@media print {
  :root { color-scheme: light; --page: #fff; --card: #f5f6f8; --ink: #000; --soft: #444; --line: #ccc;
    --one: #1b66b0; --two: #c2610a; --three: #12805f; --tint: #a9c8e8; --on: #fff; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } main { padding: 0; max-width: none; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; } }
"""


def write_report(path: str | os.PathLike, title: str, class_names: Sequence[str], palette: np.ndarray | Sequence,
                 metrics: Mapping[str, Any], matrix: np.ndarray, history: Sequence[Mapping] = (),
                 examples: Sequence[Mapping] = (), notes: Sequence[tuple[str, Any]] = ()) -> None:
    """Write the report of one evaluation to `path`.

    class_names C names; palette (C, 3) in 0..255; metrics: what segmentation_metrics returns; matrix (C, C), rows =
    truth; history: records of log.jsonl; examples: dicts of name, score (higher is better), truth (picture or None),
    pred (picture), caption; notes: (key, value) rows.
    ValueError where names, colours, matrix and metrics do not have the same number of classes.
    """
    matrix = np.asarray(matrix)
    C = len(class_names)
    if len(palette) != C or matrix.shape != (C, C) or len(metrics["iou"]) != C:
        raise ValueError(f"{path}: {C} class names, {len(palette)} colours, {len(metrics['iou'])} scores and a matrix "
                         f"{matrix.shape}; a report needs one name, colour, score and row per class")
    colors = ["#{:02x}{:02x}{:02x}".format(*map(int, color)) for color in palette]
    body = [f"<h1>{escape(title)}</h1>", _headline(metrics), notes_list(notes),
            _classes(class_names, colors, metrics, matrix), _confusion(class_names, matrix),
            _curves(history), _gallery(class_names, colors, examples)]
    write_page(path, title, [part for part in body if part])


def write_page(path: str | os.PathLike, title: str, body: Sequence[str], css: str = "") -> None:
    """Write one page: parts of HTML in this file's style, with rules of its own behind it. Texts in `body` must be
    escaped already; the title is plain."""
    page = ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta http-equiv="Content-Security-Policy" '
            'content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">\n'
            f"<title>{escape(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(body) + "\n</main>\n</body>\n</html>\n")
    with replacing(path, text=True) as file:
        file.write(page)


# -----------------------------------------------------------------------------------------------------------------
# Numbers and tables
# -----------------------------------------------------------------------------------------------------------------

def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or value >= 1000 else f"{value:.3g}"


def _headline(metrics: Mapping[str, Any]) -> str:
    tiles = (f"<div><b>{_percent(metrics[key])}</b><span>{name}</span></div>" for key, name in HEADLINE)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def notes_list(notes: Sequence[tuple[str, Any]]) -> str:
    """(key, value) pairs as a list of terms."""
    rows = "".join(f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>" for key, value in notes)
    return f"<dl>{rows}</dl>" if rows else ""


def dot(color: str) -> str:
    """A small square of a CSS colour."""
    return f'<i style="background:{color}"></i>'


def _classes(names: Sequence[str], colors: Sequence[str], metrics: Mapping[str, Any], matrix: np.ndarray) -> str:
    def bar(key: str, c: int, fill: str) -> str:
        width = 100 * np.nan_to_num(metrics[key][c])
        return (f'<td class="bar {key}"><svg viewBox="0 0 100 8" preserveAspectRatio="none">'
                '<rect width="100" height="8" fill="var(--line)" opacity=".55"/>'
                f'<rect width="{width:.2f}" height="8" fill="var({fill})"/></svg></td>')

    share = matrix.sum(1) / max(matrix.sum(), 1e-30)
    rows = "".join(
        f'<tr><td class="name">{dot(colors[c])}{escape(name)}</td><td class="n small">{_percent(share[c], 1)}</td>'
        f'{bar("iou", c, "--one")}<td class="n">{_percent(metrics["iou"][c])}</td>'
        f'{bar("f1", c, "--tint")}<td class="n">{_percent(metrics["f1"][c])}</td>'
        f'<td class="n">{_percent(metrics["accuracy"][c])}</td></tr>' for c, name in enumerate(names))
    return ('<h2>Classes</h2><p class="lead">All values in percent. Share: part of the labelled elements. A dash: '
            "nothing to score, and left out of the means.</p>"
            '<div class="scroll"><table><thead><tr><th>class</th><th class="n">share</th><th colspan="2">IoU</th>'
            f'<th colspan="2">F1</th><th class="n">accuracy</th></tr></thead><tbody>{rows}</tbody></table></div>')


# -----------------------------------------------------------------------------------------------------------------
# Charts
# -----------------------------------------------------------------------------------------------------------------

def _confusion(names: Sequence[str], matrix: np.ndarray) -> str:
    """Heat map of the rows' shares, and beside it the largest mistakes."""
    C = len(names)
    side = min(max(560 / C, 4), 46)
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    labelled = side >= 11
    angle = 45 if side >= 18 else 90                       # of the column names
    left = 7.2 * max(map(len, short)) + 14 if labelled else 4
    top = left * math.sin(math.radians(angle)) + 6 if labelled else 4
    width, height = left + C * side + (top if labelled and angle < 90 else 8), top + C * side + 4
    total = matrix.sum(1)
    share = matrix / np.maximum(total, 1e-30)[:, None]
    parts = [f'<rect x="{left}" y="{top}" width="{C * side}" height="{C * side}" fill="var(--card)"/>']
    for row in range(C) if labelled else ():
        middle = top + (row + 0.5) * side
        parts.append(f'<text x="{left - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(short[row])}</text>')
        x = left + (row + 0.5) * side
        parts.append(f'<text transform="translate({x + 3:.1f} {top - 7}) rotate(-{angle})">{escape(short[row])}</text>')
    for row, column in np.argwhere(matrix > 0):
        x, y = left + column * side, top + row * side
        value = share[row, column]
        hint = f"{names[row]} taken for {names[column]}" if row != column else f"{names[row]} found"
        hint += f": {_percent(value)} %, {_count(matrix[row, column])} of {_count(total[row])}"
        parts.append(f'<g><title>{escape(hint)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" '
                     f'height="{side:.1f}" fill="var(--one)" fill-opacity="{0.03 + 0.97 * value:.3f}"/>')
        if side >= 28 and value >= 0.005:
            ink = "var(--on)" if value > 0.5 else "var(--ink)"
            parts.append(f'<text x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}" text-anchor="middle" '
                         f'style="fill:{ink}">{100 * value:.0f}</text>')
        parts.append("</g>")
    svg = (f'<svg width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
           f'aria-label="confusion matrix">{"".join(parts)}</svg>')

    mistakes = matrix * (1 - np.eye(C))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:8]
    rows = "".join(f'<tr><td>{escape(names[i])} → {escape(names[j])}</td><td class="n">{_percent(share[i, j], 1)}</td>'
                   f'<td class="n small">{_count(matrix[i, j])}</td></tr>'
                   for i, j in zip(*np.unravel_index(order, matrix.shape), strict=True) if mistakes[i, j] > 0)
    table = ('<div><h3>Largest mistakes</h3><table><thead><tr><th>truth → prediction</th><th class="n">% of truth</th>'
             f'<th class="n">elements</th></tr></thead><tbody>{rows}</tbody></table></div>') if rows else ""
    return ('<h2>Confusion matrix</h2><p class="lead">A row is a true class, a column a predicted one; a row sums to '
            "100 %. Point at a cell for counts.</p>"
            f'<div class="two confusion"><div class="scroll">{svg}</div>{table}</div>')


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) whose first and last enclose low..high."""
    high = high if high > low else low + max(abs(low), 1e-9)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _curves(history: Sequence[Mapping]) -> str:
    """Loss and scores by epoch, from the records of log.jsonl."""
    def points(split: str, key: str, scale: float = 1) -> list[tuple[float, float]]:
        rows = ((r.get("epoch", r.get("step")), r.get(key)) for r in history if r.get("split") == split)
        return sorted((x, scale * y) for x, y in rows if _is_number(x) and _is_number(y))

    splits = list(dict.fromkeys(str(r.get("split")) for r in history))
    scored = "val" if "val" in splits else next((s for s in splits if s != "train"), "train")
    losses = [(split, points(split, "loss")) for split in sorted(splits, key=lambda split: (split == "train", split))]
    scores = [(name, points(scored, key, 100)) for key, name in SCORES]
    charts = _chart("Loss", losses, min, 3) + _chart(f"Scores on {scored}, percent", scores, max, 2)
    return f'<h2>Training</h2><div class="two">{charts}</div>' if charts else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _chart(title: str, series: Sequence[tuple[str, list[tuple[float, float]]]], best: Callable, digits: int) -> str:
    """Lines over epochs, with a legend that tells each line's best value. series: (name, sorted points)."""
    series = [(name, points) for name, points in series if points]
    if not series:
        return ""
    x_all, y_all = ([p[i] for _, points in series for p in points] for i in (0, 1))
    x_ticks = [x for x in nice_ticks(min(x_all), max(x_all), 6) if min(x_all) <= x <= max(x_all) and x == int(x)]
    y_ticks = nice_ticks(min(y_all), max(y_all))
    width, height = 440, 256
    left, right, top, bottom = 46, 10, 8, 36
    x_span, y_span = (max(x_all) - min(x_all)) or 1, y_ticks[-1] - y_ticks[0]
    decimals = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))

    def px(x: float) -> float:
        return left + (x - min(x_all)) / x_span * (width - left - right)

    def py(y: float) -> float:
        return height - bottom - (y - y_ticks[0]) / y_span * (height - top - bottom)

    parts = [f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="var(--line)"/>'
             f'<text x="{left - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.{decimals}f}</text>' for y in y_ticks]
    parts += [f'<text x="{px(x):.1f}" y="{height - bottom + 17}" text-anchor="middle">{x:.0f}</text>' for x in x_ticks]
    parts.append(f'<text x="{width - right}" y="{height - 4}" text-anchor="end">epoch</text>')
    keys = []
    styles = [("--one", ""), ("--two", "6 4"), ("--three", "2 3"), ("--soft", "8 3 2 3")]    # told apart without colour
    for number, (name, points) in enumerate(series):
        color, dash = styles[number % len(styles)]
        line = f'stroke="var({color})" stroke-width="2" fill="none" stroke-linejoin="round" stroke-dasharray="{dash}"'
        path = "M" + "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        x_best, y_best = best(points, key=lambda point: point[1])
        hint = f"<title>{escape(name)}: {y_best:.{digits}f} in epoch {x_best:g}</title>"
        parts.append(f'<path d="{path}" {line}/><circle cx="{px(x_best):.1f}" cy="{py(y_best):.1f}" r="4" '
                     f'fill="var({color})" stroke="var(--page)" stroke-width="1.5">{hint}</circle>')
        keys.append(f'<span><svg width="22" height="3"><path d="M0 1.5H22" {line}/></svg>{escape(name)} '
                    f"<b>{y_best:.{digits}f}</b> in epoch {x_best:g}</span>")
    return (f'<div class="chart"><h3>{escape(title)}</h3><div class="keys">{"".join(keys)}</div>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></div>')


# -----------------------------------------------------------------------------------------------------------------
# Pictures
# -----------------------------------------------------------------------------------------------------------------

def data_uri(image: Image.Image, jpeg: bool = False) -> str:
    """The picture as text for an img tag: PNG, or JPEG on request and where PNG is too large; the latter never loses
    transparency."""
    kind = "png"
    stream = io.BytesIO()
    if not jpeg:
        image.save(stream, "PNG", optimize=True)
    if jpeg or (stream.tell() > MAX_PNG and "A" not in image.mode):
        kind = "jpeg"
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _gallery(names: Sequence[str], colors: Sequence[str], examples: Sequence[Mapping]) -> str:
    """Worst examples first; the lower half of the scores under one heading, the upper half under another."""
    if not examples:
        return ""

    def card(example: Mapping) -> str:
        name = escape(str(example["name"]))
        pictures = [("truth", example.get("truth")), ("prediction", example["pred"])]
        pair = "".join(f'<div><p>{word}</p><img src="{data_uri(image)}" alt="{word}, {name}"></div>'
                       for word, image in pictures if image is not None)
        caption = f'<figcaption>{escape(str(example["caption"]))}</figcaption>' if example.get("caption") else ""
        return (f"<figure><header><span>{name}</span><b>{_percent(example['score'], 1)}</b></header>"
                f'<div class="pair">{pair}</div>{caption}</figure>')

    ranked = sorted(examples, key=lambda example: (math.isnan(example["score"]), example["score"]))
    half = (len(ranked) + 1) // 2
    groups = [("Lowest scores", ranked[:half]), ("Highest scores", ranked[half:][::-1])]
    legend = "".join(f"<span>{dot(color)}{escape(name)}</span>" for name, color in zip(names, colors, strict=True))
    sections = "".join(f'<h3>{heading}</h3><div class="gallery">{"".join(map(card, group))}</div>'
                       for heading, group in groups if group)
    return f'<h2>Examples</h2><div class="keys" style="margin-top:14px">{legend}</div>{sections}'
