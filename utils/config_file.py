"""Reading settings files (YAML, TOML, JSON) strictly, and writing YAML: plain types only, one-line errors.

YAML is read with the numbers of YAML 1.2: `1e-4` is a number (PyYAML alone reads text), `010`, `12:30`, `2024-01-31`
are text (PyYAML alone reads 8, 750 and a date). `yes`, `no`, `on`, `off` still mean true and false.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.checks import did_you_mean, nearest, show
from utils.files import replacing

MAX_BYTES = 1_000_000       # a settings file has a few kB; more is the wrong file
TOO_DEEP = "nested too deep for settings; is it the wrong file?"
MAX_VALUES = 100_000        # with aliases written out: a "billion laughs" file is small but expands without end


def read_mapping(path: str | os.PathLike) -> dict:
    """Read a .yaml, .yml, .toml or .json file that holds one mapping -> plain dict, {} for an empty file.

    Raises FileNotFoundError with near names; ValueError naming the file, and the line where there is one, for a folder,
    another suffix, wrong syntax, a key given twice, a value that is no setting (a date), too many bytes or values.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected a .yaml, .yml, .toml or .json file")
    if not path.exists():
        siblings = [other.name for other in path.parent.glob("*.*") if other.exists()]       # no dangling link
        raise FileNotFoundError(f"{path}: no such settings file{did_you_mean(nearest(path.name, siblings))}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes, too large for settings; is it the wrong file?")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix in (".yaml", ".yml"):
            data = read_yaml(text)
        elif path.suffix == ".toml":
            data = tomllib.loads(text)
        elif path.suffix == ".json":
            data = json.loads(text, object_pairs_hook=_unique) if text.strip() else None
        else:
            raise ValueError(f"expected a .yaml, .yml, .toml or .json file, got suffix {path.suffix!r}")
        data = to_plain(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); is it the wrong file, or "
                         f"saved in another encoding?") from error
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: {TOO_DEEP}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict | None):
        raise ValueError(f"{path}: expected `key: value` lines at the top, got {show(data)}")
    return data or {}


def read_yaml(text: str) -> Any:
    """YAML text -> dicts, lists, text, numbers, None. ValueError with line and column for anything else."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > MAX_VALUES:
            raise ValueError(f"not valid settings: more than {MAX_VALUES} values once aliases (*name) are written out")
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"not valid YAML: {where}{problem or ' '.join(str(error).split())}") from error


def write_yaml(data: Mapping, path: str | os.PathLike) -> None:
    """Write a mapping of plain values, in its own order. The old file stays until the new one is complete."""
    text = yaml.dump(to_plain(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    with replacing(path, text=True) as file:
        file.write(text)


def to_plain(value: Any) -> Any:
    """A deep copy in dicts, lists, text, numbers, true/false, None; tuples become lists. ValueError for other types."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is not None and type(value) not in (bool, int, float, str):
        kind = type(value).__name__
        raise ValueError(f"{show(value)} ({kind}) is no setting; expected text, a number, a list, a mapping")
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key given twice (the second would win silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes a list on one line, no aliases, and quotes around text that any YAML reader would take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=e))(e[-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.I)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def _expanded_size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Number of values in `node` with aliases written out, without doing so; infinite where one holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"not valid JSON: key {key!r} is given twice")
        result[key] = value
    return result
