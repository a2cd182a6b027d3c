"""What inspect_data.py collects about a data set, whatever its kind: findings, numbers, pictures, a plan; and the page.

A fault is what training refuses, or what is wrong whatever the settings are; a doubt is what training accepts and is
rarely meant, or what a setting of the plan settles; a note is good to know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from utils.checks import printable
from utils.report import data_uri, dot, notes_list, write_page

LEVELS = {"fault": "training refuses it, or it is wrong whatever the settings are",
          "doubt": "training accepts it, and it is rarely meant", "note": "good to know"}
SHOWN, NAMED = 3, 12                        # lines of one kind that are printed; names of further files
RARE_SHARE = 0.001                          # of the labelled elements; or in fewer than
RARE_FILES = 3                              # training files, and a tenth of them
UNEVEN = 20                                 # from this ratio of shares on, weights of classes are planned
CSS = """
pre { background: var(--card); border-radius: 10px; padding: 16px 20px; overflow-x: auto; font-size: 13px; }
.fault { color: #c0362c; } .doubt { color: var(--two); } .note { color: var(--soft); }
td.bar { width: 12%; min-width: 48px; } td.name { min-width: 11em; } td.level { font-weight: 600; vertical-align: top; }
td.text { overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 16px; }
.pictures img { display: block; width: 100%; background: #fff; } .pictures header span { font-size: 13px; }
"""


class Finding(NamedTuple):
    """level: fault, doubt or note; kind: groups alike ones; text: names the file and the setting; file: its name."""

    level: str
    kind: str
    text: str
    file: str = ""


class Picture(NamedTuple):
    """A picture of an item under a heading."""

    heading: str
    name: str
    caption: str
    image: Image.Image


@dataclass
class Inspection:
    """unit: pixels, faces or points. counts, presence {split: (C,)}: elements, and files, of each class; files {split:
    number}; ignored {split: share of the elements}; tables: (title, header, rows); pairs {split: files}, also of those
    that are not looked at; draw(): fills pictures; settings: what the plan needs."""

    title: str
    unit: str
    findings: list[Finding] = field(default_factory=list)
    facts: list[tuple[str, Any]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    palette: np.ndarray | None = None
    files: dict[str, int] = field(default_factory=dict)
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    presence: dict[str, np.ndarray] = field(default_factory=dict)
    ignored: dict[str, float] = field(default_factory=dict)
    tables: list[tuple[str, Sequence[str], list[Sequence]]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    draw: Callable[[], None] | None = None
    pairs: dict[str, list] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, level: str, kind: str, text: str, file: str | Path = "") -> None:
        self.findings.append(Finding(level, kind, printable(" ".join(str(text).split())), str(file)))

    def number(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)

    def summary(self) -> str:
        """"2 faults, 1 doubt, 0 notes"."""
        return ", ".join(f"{(count := self.number(level))} {level}{'s' * (count != 1)}" for level in LEVELS)

    def lines(self) -> list[str]:
        """The findings as lines, faults first, alike ones shortened."""
        grouped = defaultdict(list)
        for finding in self.findings:
            grouped[finding.level, finding.kind].append(finding)
        lines = []
        for (level, _), found in sorted(grouped.items(), key=lambda item: list(LEVELS).index(item[0][0])):
            lines += [f"{level}: {finding.text}" for finding in found[:SHOWN]]
            if len(found) > SHOWN:
                names = [Path(finding.file).name for finding in found[SHOWN:] if finding.file]
                more = f": {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''}" if names else ""
                lines.append(f"{level}: ... and {len(found) - SHOWN} more of this kind{more}")
        return lines


# -- what is common to all kinds of data -------------------------------------------------------------------------------

def check_classes(found: Inspection) -> None:
    """Notes and doubts about classes that are rare, absent, or only in some splits, and about how uneven they are."""
    train = found.counts["train"]
    names = found.class_names
    share = train / max(train.sum(), 1)
    for c, name in enumerate(names):
        others = [split for split in found.counts if split != "train" and found.counts[split][c]]
        if not train[c] and others:
            found.add("doubt", "class only outside train", f"class {c} ({name}) is in {' and '.join(others)} and in no "
                      f"training file, so that it cannot be learnt; move some of its files to train")
        elif not train[c]:
            found.add("note", "absent class", f"class {c} ({name}) is in no training file; lower the number of "
                      f"classes, or correct the class list, if it does not exist")
        elif found.presence["train"][c] < min(RARE_FILES, 0.1 * found.files["train"]):
            found.add("doubt", "rare class", f"rare class {c} ({name}): in {found.presence['train'][c]} of "
                      f"{found.files['train']} training files, {100 * share[c]:.2g} % of the {found.unit}; label more "
                      f"of it, merge it with another class (label map), or ignore it")
        elif share[c] < RARE_SHARE:
            found.add("note", "rare class", f"rare class {c} ({name}): {100 * share[c]:.2g} % of the training "
                      f"{found.unit}, in {found.presence['train'][c]} of {found.files['train']} files")
    for split, counts in found.counts.items():
        if split != "train" and counts.any() and (train > 0).sum() > (counts > 0).sum():
            absent = [names[c] for c in np.flatnonzero((counts == 0) & (train > 0))]
            found.add("note", "class absent from a split", f"{split} has no {', '.join(absent)}: not scored there")


def uneven(found: Inspection) -> float:
    """How many times the rarest class that occurs is rarer than the most frequent one."""
    counts = found.counts["train"]
    counts = counts[counts > 0]
    return float(counts.max() / counts.min()) if len(counts) else 1.0


def check_duplicates(found: Inspection, files: Sequence[tuple[str, Path]], contents: Sequence[object],
                     labels: Sequence[object]) -> None:
    """Files of the same content, in one split or in two; files: (split, path) of items, contents and labels: anything
    that is equal where they are, None where unknown."""
    first: dict[object, int] = {}
    for index, (split, path) in enumerate(files):
        if contents[index] is None:
            continue
        before = first.setdefault(contents[index], index)
        if before == index:
            continue
        other_split, other = files[before]
        differ = "" if labels[index] == labels[before] else " with other labels"
        if split != other_split:
            found.add("doubt", "duplicate across splits", f"{path} ({split}) has the same content as {other} "
                      f"({other_split}){differ}: a duplicate in two splits makes the score too good; remove one", path)
        else:
            found.add("doubt", "duplicate", f"{path} has the same content as {other}{differ}, a duplicate within "
                      f"{split}; remove one", path)


def check_names(found: Inspection, files: Sequence[tuple[str, Path]]) -> None:
    """Names that are in two splits: a few are a mistake, most of them a way of numbering."""
    by_split = defaultdict(dict)
    for split, path in files:
        by_split[split][path.stem] = path
    splits = list(by_split)
    for one, other in ((a, b) for i, a in enumerate(splits) for b in splits[i + 1:]):
        both = sorted(by_split[one].keys() & by_split[other].keys())
        smaller = min(len(by_split[one]), len(by_split[other]))
        if both and len(both) <= smaller / 2:
            for stem in both:
                found.add("doubt", "name in two splits", f"{by_split[other][stem]} ({other}) has the name of "
                          f"{by_split[one][stem]} ({one}): the same item in two splits? Remove or rename one",
                          by_split[other][stem])
        elif both:
            found.add("note", "name in two splits", f"{len(both)} of {smaller} names of {other} are in {one} too, as "
                      f"{both[0]}; of other content unless a line above says so")


def sampled(found: Inspection, items: Mapping[str, list], most: int, seed: int) -> dict[str, list]:
    """At most `most` items of all splits together, of each split its share, in their order, with a note that says
    so."""
    total = sum(map(len, items.values()))
    if total <= most:
        return dict(items)
    rng = np.random.default_rng(seed)
    chosen = {split: sorted(rng.permutation(len(listed))[:max(1, most * len(listed) // total)].tolist())
              for split, listed in items.items()}
    found.add("note", "sample", f"a random sample of {sum(map(len, chosen.values()))} of {total} items was looked at; "
              f"--max-items {total} looks at all")
    return {split: [items[split][i] for i in chosen[split]] for split in items}


def spread(values: Sequence[float], unit: str = "") -> str:
    """"0.3 to 1,200 m (median 5)" of numbers."""
    values = np.asarray(values, float)
    low, middle, high = (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
                         for value in (values.min(), np.median(values), values.max()))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit} (median {middle})"


# -- plan --------------------------------------------------------------------------------------------------------------

def plan_text(head: Sequence[str], sections: Mapping[str, Any]) -> str:
    """A YAML file with comments. sections {name: {key: value or (value, why)}}, or {name: (value, why)}."""
    lines = [f"# {line}".rstrip() for line in head]
    for name, content in sections.items():
        lines.append("")
        if not isinstance(content, Mapping):
            lines.append(_yaml_line(name, content, ""))
            continue
        lines.append(f"{name}:")
        lines += [_yaml_line(key, value, "  ") for key, value in content.items()]
    return "\n".join(lines) + "\n"


def _yaml_line(key, value, indent):
    value, why = value if isinstance(value, tuple) else (value, "")
    text = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    line = f"{indent}{key}: {text.removesuffix('...' + chr(10)).strip()}"
    return f"{line:<44}  # {why}" if why else line


# -- page --------------------------------------------------------------------------------------------------------------

def write_inspection(path: Path, found: Inspection, plans: Sequence[tuple[str, str]]) -> None:
    """The page: what was found, classes, tables, pictures, plans (title, text)."""
    body = [f"<h1>{escape(found.title)}</h1>", notes_list(found.facts), _findings(found), _classes(found)]
    body += [_table(*table) for table in found.tables]
    body.append(_pictures(found))
    body += [f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" for title, text in plans]
    write_page(path, found.title, [part for part in body if part], CSS)


def _findings(found):
    rows = "".join(f'<tr><td class="level {finding.level}">{finding.level}</td><td class="text">{escape(finding.text)}'
                   f"</td></tr>" for level in LEVELS for finding in found.findings if finding.level == level)
    if not rows:
        return '<h2>Findings</h2><p class="lead">Nothing odd was found.</p>'
    lead = "; ".join(f"a {level}: {what}" for level, what in LEVELS.items())
    return f'<h2>Findings</h2><p class="lead">{found.summary()} ({lead}).</p><table><tbody>{rows}</tbody></table>'


def _classes(found):
    if not found.counts:
        return ""
    header = "".join(f'<th class="n" colspan="2">{escape(split)}, %</th><th class="n">files</th>'
                     for split in found.counts)
    rows = []
    for c, name in enumerate(found.class_names):
        cells = "".join(_class_cells(found, split, c) for split in found.counts)
        color = "#{:02x}{:02x}{:02x}".format(*map(int, found.palette[c]))
        rows.append(f'<tr><td class="name">{dot(color)}{c} {escape(name)}</td>{cells}</tr>')
    cells = "".join(f'<td class="bar"></td><td class="n">{100 * share:.2f}</td><td class="n"></td>'
                    for share in found.ignored.values())
    rows.append(f'<tr><td class="name">{dot("rgb(150,150,150)")}unlabelled</td>{cells}</tr>')
    return (f'<h2>Classes</h2><p class="lead">Share of the labelled {found.unit} of each split, and the files that '
            f"have the class. Unlabelled: share of all {found.unit}.</p>"
            f'<div class="scroll"><table><thead><tr><th>class</th>{header}</tr></thead><tbody>{"".join(rows)}</tbody>'
            "</table></div>")


def _class_cells(found, split, c):
    share = 100 * found.counts[split][c] / max(found.counts[split].sum(), 1)
    return (f'<td class="bar"><svg viewBox="0 0 100 8" preserveAspectRatio="none"><rect width="100" height="8" '
            f'fill="var(--line)" opacity=".55"/><rect width="{share:.2f}" height="8" fill="var(--one)"/></svg></td>'
            f'<td class="n">{share:.2f}</td><td class="n small">{found.presence[split][c]}</td>')


def _table(title, header, rows):
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f'<td class="text">{escape(str(cell))}</td>' for cell in row) + "</tr>"
                   for row in rows)
    return (f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            "</table></div>")


def _pictures(found):
    if not found.pictures:
        return ""
    legend = "".join(f"<span>{dot('#{:02x}{:02x}{:02x}'.format(*map(int, color)))}{escape(name)}</span>"
                     for name, color in zip(found.class_names, found.palette, strict=True))
    parts = [f'<h2>Pictures</h2><div class="keys" style="margin-top:14px">{legend}</div>']
    for heading in dict.fromkeys(picture.heading for picture in found.pictures):
        cards = "".join(
            f"<figure><header><span>{escape(picture.name)}</span></header>"
            f'<img src="{data_uri(picture.image, jpeg=True)}" alt="{escape(picture.name)}" loading="lazy">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
            for picture in found.pictures if picture.heading == heading)
        parts.append(f'<h3>{escape(heading)}</h3><div class="pictures">{cards}</div>')
    return "".join(parts)
