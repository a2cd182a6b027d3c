"""--help of everything that has a command line shows the defaults, once each."""

import importlib
import re
from pathlib import Path

import pytest

from utils.cli import ArgumentParser, AtLeast

ROOT = Path(__file__).resolve().parents[1]
WITH_FLAGS = sorted(path.relative_to(ROOT) for folder in (".", "scripts", "benchmarks", "data") for path in (ROOT / folder).glob("*.py")
                    if re.search(r"(?<!argparse\.)\bArgumentParser\(description", path.read_text()))


class Reached(Exception):
    pass


def help_of(path, monkeypatch) -> tuple[ArgumentParser, str]:
    def stop(parser, *_):
        raise Reached(parser)
    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    with pytest.raises(Reached) as reached:
        getattr(module, "parse_args", module.main)([])
    parser = reached.value.args[0]
    return parser, re.sub(r"\n {12,}", "  ", parser.format_help())      # the help of a long flag is on a line of its own


@pytest.mark.parametrize("path", WITH_FLAGS, ids=str)
def test_help_shows_the_defaults(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    parser, text = help_of(path, monkeypatch)
    assert type(parser) is ArgumentParser
    lines = {line.split()[0].rstrip(","): line for line in text.splitlines() if line.startswith("  ") and line.strip()}
    for action in parser.actions:
        line = lines.get((action.option_strings or [action.dest])[0], "")
        if action.default not in (None, False, "", "==SUPPRESS==") and action.default != []:
            assert len(re.findall(r"\bdefault\b", line)) == 1, line or text
        else:
            assert "default: None" not in line and "default: False" not in line


def test_who_does_without_this_parser():
    """scripts/mutants.py imports nothing of the repository: the tests that it runs take that from a copy."""
    assert [path.stem for folder in (".", "scripts", "benchmarks", "data") for path in (ROOT / folder).glob("*.py")
            if "argparse.ArgumentParser(" in path.read_text()] == ["mutants"]


def test_defaults_in_the_help(capsys):
    parser = ArgumentParser(prog="train.py")
    group = parser.add_argument_group("data")
    group.add_argument("--sides", nargs=2, default=[3, 4], help="in pixels")
    group.add_argument("--share", default="10%")
    group.add_argument("--lr", type=float, default=1e-4, help="default: by weights")
    parser.add_argument("--seed", type=AtLeast(0), default=0)
    parser.add_argument("--device")
    parser.add_argument("--flag", action="store_true")
    assert parser.parse_args([]).sides == [3, 4]
    text = re.sub("[ \n]+", " ", parser.format_help())
    for line in ("--sides SIDES SIDES", "in pixels; default: 3 4", "--share SHARE default: 10%", "--lr LR default: by weights",
                 "--seed SEED default: 0", "--device DEVICE", "--flag"):
        assert line in text, text
    assert text.count("default") == 4
