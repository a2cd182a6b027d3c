"""Promises that hold for every script: they have tests, the flags everybody expects, a method that is not buried, complete configs."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from utils.config import load_config
from utils.run import Run

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
FLAGS = ("--resume", "--test-only", "--seed", "--device", "--amp-dtype", "--compile", "--output-dir", "--num-workers", "--limit-batches",
         "--debug")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_tests_flags_and_a_readme_row(script, capsys):
    assert (ROOT / "tests" / f"test_{script}.py").is_file(), f"write tests/test_{script}.py: it runs the script"
    assert f"`{script}.py`" in (ROOT / "README.md").read_text()
    module = importlib.import_module(script)
    assert all(callable(getattr(module, name)) for name in ("parse_args", "build_model", "load_model", "main"))
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert [flag for flag in FLAGS if f"{flag} " not in shown and f"{flag}]" not in shown] == []


# -- what evaluate.py and predict.py call of a script: the table of docs/adapt.md ---------------------------------------

CALLED = {"RESULTS": None, "DEFAULTS": None, "check_config": ("config",), "has_test_split": ("config",),
          "build_dataset": ("config", "split", "data_dir", "label_dir"), "load_model": ("checkpoint", "device"),
          "evaluate": ("model", "dataset", "device", "amp_dtype", "batch_size", "num_workers", "limit_batches"),
          "predict": ("model", "path", "amp_dtype"), "write_prediction": ("model", "path", "prediction", "stem", "options"),
          "example_pictures": ("model", "dataset", "index", "pred"), "list_inputs": ()}


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"train_jepa"}))
def test_a_script_has_what_evaluate_and_predict_call(script):
    module, page = importlib.import_module(script), (ROOT / "docs" / "adapt.md").read_text()
    for name, parameters in CALLED.items():
        assert hasattr(module, name) and f"`{name}" in page, name
        if parameters is not None:
            assert [p for p in parameters if p not in inspect.signature(getattr(module, name)).parameters] == [], name


def test_the_list_of_what_is_called_is_complete():
    called = set()
    for path in ("evaluate.py", "predict.py", "export.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "script":
                called.add(node.attr)
    assert called - {"__name__"} == set(CALLED)


# -- the method is not buried under the run -----------------------------------------------------------------------------

MOST_LINES = {"train_linear_head": 232, "train_upernet_head": 250, "train_m2f_head": 260, "train_pmt_head": 275, "train_eomt": 362,
              "train_jepa": 522, "train_sonata": 542, "train_segmentation": 600,
              "train_downstream": 674, "train_prototype": 622}


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_read_in_one_sitting(script):
    path = ROOT / f"{script}.py"
    assert len(path.read_text().splitlines()) <= MOST_LINES[script]
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= {"main": 70, "train_one_epoch": 25}.get(function.name, 70), f"{function.name} has {length} lines"
        if function.name != "build_dataset":                           # whose parameters evaluate.py passes by position
            assert len(function.args.args) <= 7, f"{function.name} has {len(function.args.args)} positional parameters"


@pytest.mark.parametrize("path", [*(f"{script}.py" for script in SCRIPTS), "evaluate.py", "predict.py", "export.py", "inspect_data.py"])
def test_scripts_have_lines_of_at_most_100_columns(path):
    assert [number for number, line in enumerate((ROOT / path).read_text().splitlines(), 1) if len(line) > 100] == []


def test_run_is_small_and_knows_no_method():
    source = (ROOT / "utils" / "run.py").read_text()
    assert len(source.splitlines()) <= 325
    code = "import sys, utils.run; print([name for name in sys.modules if name.split('.')[0] in ('models', 'data')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    hooks = [node.target.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)
             and isinstance(node.target, ast.Attribute) and "Callable" in ast.unparse(node.annotation)]
    parameters = [p for method in vars(Run).values() if inspect.isfunction(method) for p in inspect.signature(method).parameters.values()]
    assert hooks == [] and not any("Callable" in str(p.annotation) for p in parameters)


def test_data_and_models_stand_below_the_scripts():
    """data/ imports nothing of models/, models/ nothing of data/; modules above both are imported by scripts alone."""
    above = {"image_scripts", "jepa_scripts", "mesh_scripts", "point_scripts", "prototype_scripts", "inspection_plans"}
    for path in (*ROOT.glob("data/*.py"), *ROOT.glob("models/*.py"), *ROOT.glob("utils/*.py")):
        other = {"data": "models", "models": "data"}.get(path.parent.name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                first, _, second = node.module.partition(".")
                assert first != other, f"{path}: {node.module}"
                assert second not in above or path.stem in above, f"{path}: {node.module}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load(path):
    scripts = {"jepa_": "train_jepa", "mesh_": "train_downstream", "prototype_": "train_prototype", "segmentation_": "train_segmentation",
               "sonata/": "train_sonata", "clouds_": "train_sonata"}
    script = next(name for prefix, name in scripts.items() if str(path.relative_to(ROOT / "configs")).startswith(prefix))
    module = importlib.import_module(script)
    module.check_config(load_config(path, module.DEFAULTS))


def test_git_ignores_data_sets_and_runs_also_as_links_but_not_the_data_package():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "check-ignore", "data/mesh.py", "data/new_file.py", "models/x.py", "datasets", "exp"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.split() == ["datasets", "exp"]


def test_scripts_import_without_side_effects():
    """Nothing is printed, written or parsed on import; the guard is what runs them."""
    for script in (*SCRIPTS, "evaluate", "predict", "export"):
        tree = ast.parse((ROOT / f"{script}.py").read_text())
        assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    run_main(main)", script
        calls = [node for node in tree.body[:-1] if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)]
        assert calls == [], script
