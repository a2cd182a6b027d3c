"""Run settings from a YAML, TOML or JSON file: checked against the script's defaults, changed from the command line.

A script states its settings once, as a nested dict of defaults; each default gives its own type:

    DEFAULTS = {
        "data": {"train": Required(str), "num_points": 4096},
        "optim": {"lr": 1e-3, "schedule": Setting("cosine", (str,), ("cosine", "poly"))},
        "encoder_args": {},                                    # empty: takes any mapping
    }
    config = load_config("configs/mesh.yaml", DEFAULTS, ["optim.lr=1e-4", "data.num_points=2048"])
    config.optim.lr                                            # 0.0001

YAML is read with the numbers of YAML 1.2: `1e-4` is a number (PyYAML alone reads text), `010` and `12:30` and
`2024-01-31` are text (PyYAML alone reads 8, 750 and a date). `yes`, `no`, `on`, `off` still mean true and false.
"""

import copy
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 1_000_000       # a settings file is a few kB; more is the wrong file
MAX_VALUES = 100_000        # after aliases are written out: a "billion laughs" file is small but expands without end
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}


class Setting(NamedTuple):
    """One setting whose default does not say it all: several types, null allowed (a None default), or fixed choices.

    Choices hold for a list's every item.
    """

    default: Any
    types: tuple[type, ...]
    choices: tuple | None = None


class Required(NamedTuple):
    """A setting without default: load_config reports all those that are missing at once. `types` is a type or a tuple."""

    types: type | tuple[type, ...]
    choices: tuple | None = None


REQUIRED = Required((bool, int, float, str, list, dict))      # required, of any type


class Config(dict):
    """A dict whose keys are also attributes, at every depth: config.model.embed_dim. AttributeError names a missing key."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.update(*args, **kwargs)

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"config has no key {key!r}{_hint(key, self)}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        if key not in self:
            raise AttributeError(f"config has no key {key!r}{_hint(key, self)}")
        del self[key]

    def __setitem__(self, key, value) -> None:
        super().__setitem__(key, Config(value) if type(value) is dict else value)

    def update(self, *args, **kwargs) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def copy(self) -> "Config":
        return Config(self)

    def to_dict(self) -> dict:
        """The same as plain dicts and lists, sharing nothing: what a checkpoint may hold."""
        return _plain(self)


def load_config(path: str | os.PathLike, defaults: Mapping, overrides: Sequence[str] = ()) -> Config:
    """Read a settings file, lay it over `defaults`, then lay `section.key=value` overrides over both.

    path: .yaml, .yml, .toml or .json; an empty file means all defaults. defaults: nested dict; a plain value gives its
    type by example, a dict with content is a section, an empty dict takes any mapping, see also Setting, Required.
    An integer is accepted for a number and becomes a float; true/false never counts as a number. The items of a list
    must be like the default's items where those are all of one type. Override values are read as YAML.

    Raises FileNotFoundError; ValueError for a file that cannot be read as its suffix says, repeats a key or is too
    large, for an unknown section or key, a wrong type, a bad choice, a bad override, missing required keys. The
    message names the file or override, the dotted key, the value, what is expected, and the nearest names.
    """
    known = _known(defaults)
    config = Config(_defaults(defaults))
    _lay_over(config, read_mapping(path), defaults, str(path), "", known)
    for text in overrides:
        _lay_over(config, _parse_override(text), defaults, f"override {text!r}", "", known)
    missing = [name for name in known if isinstance(_lookup(config, name), Required)]
    if missing:
        raise ValueError(f"{path}: {len(missing)} required setting{'s' * (len(missing) > 1)} missing: {', '.join(missing)}")
    return config


def save_config(config: Mapping, path: str | os.PathLike) -> None:
    """Write settings as YAML, keys in their order, so that load_config reads the same back. All or nothing (one rename)."""
    text = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_choice(what: str, value: Any, choices: Iterable) -> Any:
    """Return `value` if it is one of `choices`; otherwise ValueError names `what` (a key or flag), value, choices, nearest."""
    choices = list(choices)
    if value not in choices:
        expected = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{what}: {_show(value)} is not a choice{_hint(str(value), choices)}; expected one of {expected}")
    return value


def check_range(what: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` if low <= value <= high; otherwise (also for NaN) ValueError names `what`, the value and the range."""
    if not low <= value <= high:
        raise ValueError(f"{what}: {value} is out of range; expected {low} to {high}")
    return value


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of `known` that a misspelt `name` may have meant, best first. A dotted name's last part alone counts."""
    known = [str(candidate) for candidate in known]
    leaf = name.rpartition(".")[2]
    same_leaf = [candidate for candidate in known if candidate != name and candidate.rpartition(".")[2] == leaf]
    return list(dict.fromkeys(same_leaf + difflib.get_close_matches(name, known, count)))[:count]


def read_mapping(path: str | os.PathLike) -> dict:
    """Read a .yaml, .yml, .toml or .json file that holds one mapping -> plain dict. Raises as load_config does."""
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.*")]) if path.parent.is_dir() else []
        what = "is a folder, not a settings file" if path.is_dir() else "no such settings file"
        raise FileNotFoundError(f"{path}: {what}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes is too large for settings (at most {MAX_BYTES}); wrong file?")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix in (".yaml", ".yml"):
            data = _read_yaml(text)
        elif path.suffix == ".toml":
            data = tomllib.loads(text)
        elif path.suffix == ".json":
            data = json.loads(text, object_pairs_hook=_unique) if text.strip() else None
        else:
            raise ValueError(f"suffix {path.suffix!r} is not known; expected .yaml, .yml, .toml or .json")
    except (ValueError, RecursionError) as error:
        problem = "nested too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: {problem}") from error
    if not isinstance(data, dict | None):
        raise ValueError(f"{path}: expected `key: value` lines at the top, found {_describe(data)}")
    return data or {}


# -- reading -------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader (plain types only) with the numbers of YAML 1.2, that refuses a key given twice."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads: lists on one line, text in quotes where it would read as a number, no aliases."""

    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))
for _name, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})$"), list(_first))


def _read_yaml(text: str) -> Any:
    """YAML text -> plain types, or one ValueError line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"not valid YAML: {where}{problem or ' '.join(str(error).split())}") from error


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Number of values below `node` with aliases written out, counted without doing so. ValueError above MAX_VALUES."""
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias holds itself")
        return counts[id(node)]
    counts[id(node)] = 0                                       # under way
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    children = [child for pair in children for child in pair] if isinstance(node, yaml.MappingNode) else children
    counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    if counts[id(node)] > MAX_VALUES:
        raise ValueError(f"line {node.start_mark.line + 1}: aliases expand to more than {MAX_VALUES} values")
    return counts[id(node)]


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return result


def _parse_override(text: str) -> dict:
    """'optim.lr=1e-4' -> {"optim": {"lr": 0.0001}}."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or any(part.startswith("-") for part in parts):
        raise ValueError(f"override {text!r} is not of the form section.key=value")
    try:
        result = _read_yaml(value)
    except ValueError as error:
        raise ValueError(f"override {text!r}: value {value!r} is {error}") from error
    for part in reversed(parts):
        result = {part: result}
    return result


# -- checking ------------------------------------------------------------------


def _is_section(spec: Any) -> bool:
    return isinstance(spec, dict) and bool(spec)


def _known(defaults: Mapping, prefix: str = "") -> list[str]:
    """Dotted names of all settings, in order."""
    names = []
    for key, spec in defaults.items():
        assert not hasattr(dict, key), f"defaults: key {prefix}{key} hides a dict method; rename it"
        names += _known(spec, f"{prefix}{key}.") if _is_section(spec) else [f"{prefix}{key}"]
    return names


def _defaults(spec: Any) -> Any:
    if isinstance(spec, Setting):
        return _plain(copy.deepcopy(spec.default))
    if isinstance(spec, dict):
        return {key: _defaults(value) for key, value in spec.items()}
    return spec if isinstance(spec, Required) else _plain(copy.deepcopy(spec))


def _lay_over(config: Config, given: Mapping, defaults: Mapping, where: str, prefix: str, known: list[str]) -> None:
    """Check `given` against `defaults` and write it into `config`, section by section."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in defaults:
            section = f"section {prefix[:-1]!r}" if prefix else "the top level"
            names = [candidate for candidate in defaults] if not prefix else known
            hint = _hint(name, [*known, *names]) or f"; {section} has {', '.join(map(str, defaults))}"
            raise ValueError(f"{where}: unknown {'section' if isinstance(value, dict) else 'key'} {name!r}{hint}")
        spec = defaults[key]
        if isinstance(spec, dict):
            if not isinstance(value, dict | None):
                raise ValueError(f"{where}: {name} is a section, expected `key: value` below it, got {_describe(value)}")
            if spec:
                _lay_over(config[key], value or {}, spec, where, f"{name}.", known)
            else:
                _merge(config[key], value or {})
        else:
            config[key] = _checked(value, spec, f"{where}: {name}")


def _merge(config: Config, given: Mapping) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value


def _checked(value: Any, spec: Any, what: str) -> Any:
    """Return `value` in the type that `spec` (a Setting, a Required or an example) asks for, or raise ValueError."""
    if not isinstance(spec, Setting | Required):
        spec = _by_example(spec, what)
    types = spec.types if isinstance(spec.types, tuple) else (spec.types,)
    null = type(None) in types or (isinstance(spec, Setting) and spec.default is None)
    types = tuple(kind for kind in types if kind is not type(None))
    if value is None and null:
        return None
    if type(value) is int and float in types and int not in types:
        value = float(value)
    if type(value) not in types:
        expected = " or ".join([TYPE_NAMES.get(kind, kind.__name__) for kind in types] + ["null"] * null)
        quote = isinstance(value, bool | int | float) and str in types
        hint = "; put text in quotes where it looks like a number or a yes/no word" if quote else ""
        raise ValueError(f"{what}: expected {expected}, got {_describe(value)}{hint}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{what}: expected a number, got nan")
    if isinstance(value, list) and isinstance(spec, Setting) and spec.default:
        kinds = {type(item) for item in spec.default}
        if kinds == {int, float}:
            kinds = {float}
        if len(kinds) == 1 and kinds != {type(None)}:
            example = Setting(kinds.pop()(), ())
            example = example._replace(types=(type(example.default),))
            value = [_checked(item, example, f"{what}[{index}]") for index, item in enumerate(value)]
    if spec.choices is not None:
        for item in value if isinstance(value, list) else [value]:
            check_choice(what, item, spec.choices)
    return value


def _by_example(example: Any, what: str) -> Setting:
    kind = list if isinstance(example, tuple) else type(example)
    assert kind in TYPE_NAMES, f"{what}: default {example!r} gives no type; write Setting({example!r}, (type, ...))"
    return Setting(example, (kind,))


# -- small helpers -------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, Required):
        return [_plain(item) for item in value]
    return value


def _lookup(config: Mapping, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return f"{_show(value)} ({TYPE_NAMES.get(type(value), type(value).__name__)})"


def _hint(name: str, known: Iterable) -> str:
    near = nearest(name, [str(candidate) for candidate in known])
    return f"; did you mean {' or '.join(near)}?" if near else ""
