"""Small checks of what a user typed, with messages that name the place, the value and the nearest right one."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

# C0, C1, lone surrogates, line and paragraph separators, and what turns the direction of writing
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")


def check_choice(what: str, value: Any, choices: Iterable) -> Any:
    """Return `value` if it is one of `choices`; otherwise ValueError names `what` (key or flag), value, choices."""
    choices = list(choices)
    if value not in choices:
        expected = ", ".join(map(str, choices))
        hint = did_you_mean(nearest(value, choices))
        raise ValueError(f"{what}: expected one of {expected}; got {show(value)}{hint}")
    return value


def check_range(what: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` if low <= value <= high; otherwise (NaN too) ValueError names `what`, value and range."""
    if not low <= value <= high:
        raise ValueError(f"{what}: expected a number from {low} to {high}, got {value}")
    return value


def check_positive(what: str, value: float) -> float:
    """Return `value` if it is finite and above 0; otherwise (NaN too) ValueError names `what` and value."""
    if not 0 < value < math.inf:
        raise ValueError(f"{what}={value}: must be a number above 0")
    return value


def check_names(what: str, names: Sequence[str]) -> Sequence[str]:
    """Return `names` if each is text on one line; otherwise ValueError names `what` and the name: line breaks and
    control characters would forge lines of logs and steer terminals."""
    bad = next((name for name in names if not isinstance(name, str) or CONTROL.search(name)), None)
    if bad is not None:
        raise ValueError(f"{what}: the name {show(bad)} is not text on one line; put a number in quotes, "
                         "and leave control characters out")
    return names


def nearest(name: Any, known: Iterable) -> list[str]:
    """Up to three of `known` that a misspelt `name` may have meant, best first."""
    return difflib.get_close_matches(str(name), [str(candidate) for candidate in known])


def did_you_mean(names: Sequence[str]) -> str:
    """['a', 'b'] -> '; did you mean a or b?' to end an error message with; '' without names."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def printable(text: str) -> str:
    """`text` with line breaks and control characters as \\n, \\x1b ...: the name of a file neither forges a line nor
    steers a terminal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def show(value: Any) -> str:
    """`value` as a settings file would have it, cut at 60 characters: 'text', 1.5, true, null."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
