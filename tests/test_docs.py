"""The pages: links and anchors lead somewhere, commands name files that exist, lab notes stay in docs/lab, the index is complete."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
USERS = [page for page in PAGES if DOCS / "lab" not in page.parents and page.name != "bad_inputs.md"]       # that one quotes messages
# What belongs into docs/lab: internal targets, history, the state of a machine.
BANNED = ("the aim of", "aim:", "goal:", "goals of", "that day", "earlier run", "measured later", "busy with other work", "beside other work",
          "busy machine", "at hand here")


def name(page):
    return str(page.relative_to(ROOT))


def fences(page):
    """The page's text outside its fenced code blocks, and inside."""
    parts = re.split(r"^ *```.*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return "\n".join(parts[::2]), "\n".join(parts[1::2])


def anchors(page):
    """As the usual forges make them: small letters, punctuation dropped, a hyphen for each blank, -1 behind the second of one name."""
    made = []
    for title in re.findall(r"^#+ +(.*)$", fences(page)[0], flags=re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        made.append(anchor + (f"-{made.count(anchor)}" if anchor in made else ""))
    return made


def links(page):
    """(path, anchor) of the page's relative links and pictures; the path is the page itself where a link has none."""
    for link in re.findall(r"\]\(([^)\s]+)\)", fences(page)[0]):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            yield ((page.parent / path).resolve() if path else page), anchor


def named_files(page):
    """Scripts, configs and modules that commands on the page name; not what a `cp` on the page makes."""
    text = page.read_text(encoding="utf-8")
    made = set(re.findall(r"\bcp \S+ (\S+?\.\w+)", text))
    names = set(re.findall(r"\b(?:python3?|bash|source) (\w[\w/.-]*\.(?:py|sh))\b", text)) | set(re.findall(r"\bconfigs/[\w/.-]*\.yaml\b", text))
    names |= {f"{script}.py" for script in re.findall(r"\btorchrun [^`\n]*?(\w+)\.py\b", text)}
    names |= {module.replace(".", "/") + ".py" for module in re.findall(r"\bpython -m ((?:data|tests|utils|benchmarks)\.[\w.]+)", text)}
    return {path for path in names - made if not Path(path).stem.isupper()}      # NAME.py stands for any


def lab_notes(text):
    """What a user's page should not hold: commit hashes (not those in names of weight files) and the words of BANNED."""
    hashes = [word for word in re.findall(r"(?<![\w-])[0-9a-f]{7,40}(?![\w-]|\.\w)", text) if re.search("[a-f]", word) and re.search("[0-9]", word)]
    return hashes + [words for words in BANNED if words in text.lower()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_a_file_and_an_anchor(page):
    found = list(links(page))
    assert [name(path) for path, _ in found if not path.exists()] == []
    assert [f"{name(path)}#{anchor}" for path, anchor in found if anchor and anchor not in anchors(path)] == []


# commands.md shows other projects' commands as well; tests/test_commands.py checks ours in it.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "commands.md"], ids=name)
def test_commands_name_files_that_exist(page):
    assert sorted(path for path in named_files(page) if not (ROOT / path).is_file()) == []


@pytest.mark.parametrize("page", USERS, ids=name)
def test_a_users_page_has_no_lab_notes(page):
    assert lab_notes(page.read_text(encoding="utf-8")) == []


def test_the_index_is_complete():
    linked = {path for path, _ in links(DOCS / "README.md")} | {path for path, _ in links(DOCS / "lab" / "README.md")}
    assert [name(page) for page in sorted(DOCS.rglob("*.md")) if page not in linked and page != DOCS / "README.md"] == []


def test_the_checks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b: c\n\n## A b, c\n\n[x](gone.md) [y](#a-b-c-1) [z](https://example.org)\n\n```bash\npython gone.py  # [no](link.md)\n"
                    "torchrun --n=4 lost.py\nbash scripts/gone.sh configs/gone.yaml\ncp a.py b.py; python b.py; python -m data.gone\n```\n")
    assert list(links(page)) == [(tmp_path / "gone.md", ""), (page, "a-b-c-1")]
    assert anchors(page) == ["a-b-c", "a-b-c-1"]
    assert named_files(page) == {"gone.py", "lost.py", "scripts/gone.sh", "configs/gone.yaml", "data/gone.py"}
    assert lab_notes("at e6e4dbb, The aim of 90; resnet34-b627a593.pth, 4194304") == ["e6e4dbb", "the aim of"]
