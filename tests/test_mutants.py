"""scripts/mutants.py: which mistakes it plants and where, that they are the same for a seed, and that failing tests are told from passing ones."""

import ast

import pytest

from scripts import mutants
from scripts.mutants import ROOT, changed, draw, places, planted, run_tests

EXPRESSIONS = [("a < b", "a <= b"), ("a >= b", "a > b"), ("a == b", "a != b"), ("a in b", "a not in b"), ("a is None", "a is not None"),
               ("a + b", "a - b"), ("a * b", "a / b"), ("a // b", "a * b"), ("a and b", "a or b"), ("not a", "a"), ("-a", "a"), ("3", "4"),
               ("0.0", "1.0"), ("1.5", "3.0"), ("True", "False")]


@pytest.mark.parametrize("before, after", EXPRESSIONS)
def test_mistakes(before, after):
    node = ast.parse(before, mode="eval").body
    assert ast.unparse(changed(node)) == after
    assert planted("x.py", f"ä = (1,\n     {before})\n", ast.parse(f"ä = (1,\n     {before})\n").body[0].value.elts[1]).source \
        == f"ä = (1,\n     ({after}))\n"


def test_what_is_no_place_for_one():
    source = '''
def f(x: tuple[int, 3] = None, *, y: "a < b") -> list[2]:
    """1 < 2"""
    assert x < 3
    if y:
        raise ValueError("%d" % 4)
    return f"{x + 5}"
'''
    assert [node for node in places(ast.parse(source)) if changed(node) is None] == places(ast.parse(source)) == []
    assert len(places(ast.parse("z = -f(1) < 2 or g[3]"))) == 6


def test_the_same_seed_plants_the_same_mistakes_all_of_which_are_programs():
    only = ["utils/c", "utils/l", "data/tiff.py"]
    first = draw(40, 1, only)
    assert first == draw(40, 1, only) != draw(40, 2, only) and len({(m.path, m.line, m.old, m.new) for m in first}) > 30
    for mutant in first:
        original = (ROOT / mutant.path).read_text()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(original))
        assert len(mutant.source.splitlines()) <= len(original.splitlines())
    assert {mutant.path for mutant in first} > {"utils/losses.py", "data/tiff.py"}


def test_every_module_has_tests():
    own, others = mutants.tests_of("utils/losses.py")
    assert own[0] == "tests/test_losses.py" and not {*own} & {*others}
    assert "tests/test_golden_pmt.py" in mutants.tests_of("models/pmt.py")[0]
    modules = [path.relative_to(ROOT) for folder in mutants.FOLDERS for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert [str(path) for path in modules if not mutants.tests_of(str(path))] == []


def test_failing_and_endless_tests_have_noticed_it(tmp_path):
    (tmp_path / "test_of_it.py").write_text("import it_is\ndef test():\n    while it_is.VALUE == 2: pass\n    assert it_is.VALUE == 0\n")
    for value, passes, limit in ((0, True, 100), (1, False, 100), (2, False, 1)):
        (tmp_path / "it_is.py").write_text(f"VALUE = {value}\n")
        assert run_tests(tmp_path, ("test_of_it.py",), limit) is passes, (tmp_path / "output.txt").read_text()
