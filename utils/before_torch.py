"""Answers --help, and a mistake in the command line or the config, before PyTorch is imported, which takes seconds.

A script imports this module first. Then its parse_args, and load_config where it has a config, run once with stand-ins
for the large packages. Where all is well, or a value of such a package is needed, everything that saw a stand-in is
forgotten, and the script goes on with the real packages. Other importers of this module start nothing.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

if sys.version_info < (3, 11):  # noqa: UP036  older ones, which setup.sh refuses too, come this far
    print(f"error: Python {sys.version.split()[0]} is too old; SegHeads needs 3.11 or newer", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).parents[1]
LARGE = ("torch", "scipy", "sklearn", "trimesh", "safetensors", "threadpoolctl")
SMALL = ("numpy", "PIL.Image", "yaml", "tqdm")      # are never forgotten: NumPy cannot be imported twice


class NoValue(Exception):
    """More than the name of something in a large package is needed."""


class StandIn(ModuleType):
    """Anything in a large package. It can be imported, called and subclassed, but has no value to look at."""

    def __getattr__(self, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name)

    def __call__(self, *args, **kwargs) -> "StandIn":
        return StandIn("")

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()

    def _no_value(self, *args):
        raise NoValue

    __hash__ = ModuleType.__hash__
    __or__ = __ror__ = __getitem__ = __call__           # of annotations: Tensor | None
    __bool__ = __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __iter__ = __len__ = _no_value
    __str__ = __repr__ = __format__ = __int__ = __float__ = __index__ = _no_value


class Finder:
    """Of sys.meta_path: finds stand-ins; gives up where a package is installed of which nothing is known."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if package in LARGE:
            return ModuleSpec(name, Finder, is_package=True)
        if package not in sys.modules and package not in sys.stdlib_module_names:
            spec = PathFinder.find_spec(package)
            if spec is not None and not _is_ours(spec.origin or list(spec.submodule_search_locations)[0]):
                raise NoValue
        return None

    @staticmethod
    def create_module(spec: ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module: StandIn) -> None:
        pass


def _is_ours(file: str | None) -> bool:
    return file is not None and Path(file).is_relative_to(ROOT) and "site-packages" not in file


def _forget(names: set[str]) -> None:
    for name in names:
        module = sys.modules[name]
        if isinstance(module, StandIn) or _is_ours(getattr(module, "__file__", None)):
            del sys.modules[name]
            package, _, rest = name.rpartition(".")
            if package in sys.modules:
                vars(sys.modules[package]).pop(rest, None)


def answer(script: Path) -> None:
    """Exit, as the script would, where its command line or its config is wrong or asks for help; else return."""
    for name in SMALL:
        importlib.import_module(name)
    known = set(sys.modules)
    sys.meta_path.insert(0, Finder)
    try:
        from utils.cli import run_main
        module = importlib.import_module(script.stem)
        run_main(lambda: _check(module))
    except Exception:           # whatever it is: the script, which begins now, meets it too, with the real packages
        pass
    finally:
        sys.meta_path.remove(Finder)
        _forget(set(sys.modules) - known)


def _check(script: ModuleType) -> None:
    from utils.config import load_config
    args = script.parse_args()
    if hasattr(args, "config"):
        load_config(args.config, script.DEFAULTS, args.overrides)


_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
if (ROOT / _script.name).is_file() and "torch" not in sys.modules and "WORLD_SIZE" not in os.environ:
    answer(_script)
