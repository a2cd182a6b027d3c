"""Run settings from a YAML, TOML or JSON file, checked against the script's defaults, changed from the command line.

A script states its settings once, as a nested dict of defaults; each default gives its own type:

    DEFAULTS = {
        "data": {"train": Required(str), "num_points": 4096},
        "optim": {"lr": 1e-3, "schedule": Setting("cosine", str, ("cosine", "poly")), "clip": Setting(None, float)},
        "encoder_args": {},                                    # empty: takes any mapping
    }
    config = load_config("configs/mesh.yaml", DEFAULTS, ["optim.lr=1e-4", "data.num_points=2048"])
    config.optim.lr                                            # 0.0001

How files are read, and which of YAML's traps are closed, is in utils/config_file.py.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from utils.checks import check_choice, check_range, did_you_mean, nearest, printable, show
from utils.config_file import read_mapping, read_yaml, to_plain, write_yaml

TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list",
              dict: "a mapping"}


class Setting(NamedTuple):
    """A setting of several types, of fixed choices (for a list: of its items), or null: a None default allows null.
    low: the smallest number allowed. items: the types of a list's items, where they are not those of the default's."""

    default: Any
    types: type | tuple[type, ...]
    choices: tuple | None = None
    low: float | None = None
    items: tuple[type, ...] = ()


class Required(NamedTuple):
    """A setting without default. load_config reports all those that are missing at once."""

    types: type | tuple[type, ...]
    choices: tuple | None = None
    low: float | None = None


def command_line_wins(config: Mapping, args: Any, *names: str) -> None:
    """Take folders that the config names (section.key) out of it where the command line says where the run goes, by
    --output-dir or experiment_name=..., unless it names them as well; args.notes are lines for the log. ValueError
    where it says both."""
    given = [text.partition("=")[0] for text in args.overrides]
    ways = ["--output-dir"] * getattr(args, "output_dir_given", False)
    ways += ["experiment_name"] * ("experiment_name" in given)
    if len(ways) > 1:
        raise ValueError("--output-dir and experiment_name both name the run folder; give one of them")
    args.notes = []
    for name in names if ways else ():
        section, key = name.split(".")
        folder = config[section][key]
        if folder is not None and name not in given:
            args.notes.append(f"{name}: {folder} of the config is not used, because {ways[0]} is on the command line")
            config[section][key] = None


class Config(dict):
    """A dict whose keys are attributes too, in all dicts below it (not those in lists): config.model.embed_dim.

    Copies, pickles and compares as a dict. AttributeError names a missing key and its nearest neighbours.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.update(*args, **kwargs)

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(f"config has no key {key!r}{did_you_mean(nearest(key, self))}")
        return self[key]

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, Config(value) if type(value) is dict else value)

    def update(self, *args, **kwargs) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def copy(self) -> "Config":
        return Config(self)

    def to_dict(self) -> dict:
        """A deep copy in plain dicts and lists, as checkpoints need it. ValueError for a value that is not plain."""
        return to_plain(self)


def load_config(path: str | os.PathLike, defaults: Mapping, overrides: Sequence[str] = ()) -> Config:
    """Read a settings file, lay it over `defaults`, then lay `section.key=value` overrides over both.

    path: .yaml, .yml, .toml or .json; an empty file means all defaults. defaults: nested dict; a plain value gives its
    type by example, a dict with content is a section, an empty dict takes any mapping; see also Setting, Required.
    An integer is accepted for a number and becomes a float; true and false are never numbers, NaN is refused. A list's
    items must be like the default's, where those are all of one type. The value of an override is read as YAML.

    Raises FileNotFoundError; ValueError for a file that read_mapping refuses, for an unknown section or key, a wrong
    type, a bad choice, a bad override, and for missing required keys, all in one message. The message names the file or
    override, the dotted key, the value, what is expected, and the nearest names.
    """
    return _resolve(read_mapping(path), str(path), defaults, overrides)


def override_config(config: Mapping, defaults: Mapping, overrides: Sequence[str]) -> Config:
    """A changed copy of settings that were loaded before (those in a checkpoint, say); ValueErrors as for load_config.

    Keys that the defaults have and the settings lack, because an older version wrote them, get their defaults.
    """
    return _resolve(to_plain(config), "the settings in the checkpoint", defaults, overrides)


def not_needed_lines(config: Mapping, table: Mapping[str, str]) -> list[str]:
    """Lines for the log about keys that are accepted and have no effect; table: {section.key: why}."""
    return [f"{name} is not needed: {why}" for name, why in table.items() if _look_up(config, name) is not None]


def save_config(config: Mapping, path: str | os.PathLike) -> None:
    """Write settings as YAML that load_config reads back the same. An old file stays until the new one is complete."""
    write_yaml(config, path)


def _resolve(given: Mapping, where: str, defaults: Mapping, overrides: Sequence[str]) -> Config:
    """`defaults` under `given` (read from `where`) under `overrides`, complete."""
    known = list(_dotted_names(defaults))
    config = Config(_defaults(defaults))
    _lay_over(config, given, defaults, where, "", known)
    for text in overrides:
        _lay_over(config, _parse_override(text), defaults, f"override {show(text)}", "", known)
    missing = [name for name in known if isinstance(_look_up(config, name), Required)]
    if missing:
        raise ValueError(f"{where}: required but not given: {', '.join(missing)}; add them to the file or as KEY=VALUE")
    return config


def _dotted_names(defaults: Mapping, prefix: str = "") -> Iterator[str]:
    for key, spec in defaults.items():
        assert not hasattr(Config, key), f"defaults: key {prefix}{key} would hide a method of dict; rename it"
        if isinstance(spec, dict) and spec:
            yield from _dotted_names(spec, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _defaults(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {key: _defaults(value) for key, value in spec.items()}
    return spec if isinstance(spec, Required) else to_plain(spec.default if isinstance(spec, Setting) else spec)


def _look_up(config: Mapping, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _parse_override(text: str) -> dict:
    """'optim.lr=1e-4' -> {"optim": {"lr": 0.0001}}."""
    name, equals, value = text.partition("=")
    parts = name.split(".")
    if not equals or not all(part.isidentifier() for part in parts):
        raise ValueError(f"override {show(text)}: expected section.key=value")
    try:
        result = to_plain(read_yaml(value))
    except ValueError as error:
        raise ValueError(f"override {show(text)}: {error}") from error
    for part in reversed(parts):
        result = {part: result}
    return result


def _lay_over(config: Config, given: Mapping, defaults: Mapping, where: str, prefix: str, known: list[str]) -> None:
    """Check `given` against `defaults` and write it into `config`, section by section."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in defaults:
            here = [f"{prefix}{near}" for near in nearest(key, defaults)]
            elsewhere = [other for other in known if other.rpartition(".")[2] == key]
            hint = did_you_mean([*here, *elsewhere]) or f"; {prefix[:-1] or 'the top level'} has {', '.join(defaults)}"
            kind = "section" if isinstance(value, dict) else "key"
            raise ValueError(f"{where}: unknown {kind} {printable(name)}{hint}")
        spec = defaults[key]
        if not isinstance(spec, dict):
            config[key] = _checked(value, spec, f"{where}: {name}")
        elif not isinstance(value, dict | None):
            raise ValueError(f"{where}: {name}: expected a section (`key: value` lines below it), got {show(value)}")
        elif spec:
            _lay_over(config[key], value or {}, spec, where, f"{name}.", known)
        else:
            _merge(config[key], value or {})


def _merge(config: Config, given: Mapping) -> None:
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = value


def _checked(value: Any, spec: Any, what: str) -> Any:
    """Return `value` in the type that `spec` (a Setting, a Required or an example) asks for, or raise ValueError."""
    if not isinstance(spec, Setting | Required):
        kind = list if isinstance(spec, tuple) else type(spec)
        assert kind in TYPE_NAMES, f"{what}: default {spec!r} gives no type; write Setting({spec!r}, (type, ...))"
        spec = Setting(spec, kind)
    default = spec.default if isinstance(spec, Setting) else ()
    types = spec.types if isinstance(spec.types, tuple) else (spec.types,)
    if value is None and (default is None or type(None) in types):
        return None
    if type(value) is int and float in types and int not in types:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{what}: a whole number of {value.bit_length()} bits is too large") from None
    if type(value) not in types or value != value:             # NaN differs from itself: the right type, but no use
        names = [TYPE_NAMES.get(kind, "null") for kind in types] + ["null"] * (default is None)
        hint = "; put it in quotes to make it text" if str in types and isinstance(value, bool | int | float) else ""
        hint += " (YAML reads no, off as false and yes, on as true)" if hint and isinstance(value, bool) else ""
        raise ValueError(f"{what}: expected {' or '.join(names)}, got {show(value)}{hint}")
    if isinstance(value, list) and getattr(spec, "items", ()):
        value = [_checked(item, Required(spec.items), f"{what}[{index}]") for index, item in enumerate(value)]
    elif isinstance(value, list) and isinstance(default, list | tuple) and default:
        kinds = {type(item) for item in default}
        if len(kinds) == 1 or kinds == {int, float}:
            example = default[0] if len(kinds) == 1 else 0.0
            value = [_checked(item, example, f"{what}[{index}]") for index, item in enumerate(value)]
    if spec.choices is not None:
        for item in value if isinstance(value, list) else [value]:
            check_choice(what, item, spec.choices)
    if spec.low is not None and isinstance(value, int | float):
        check_range(what, value, spec.low)
    return value
