"""Plain values to frozen dataclasses, with every problem listed at once: types, limits of single fields, rules between fields.

A field's limits stand in its annotation, ``Annotated[int, Must(lambda n: n > 0, "1 or more")]``. A dataclass lists the rules
between its fields as ``rules``: functions whose parameters are names of fields and which yield what is wrong.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

Rule = Callable[..., Iterable[str]]
WORDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Must:
    """A limit of a field: what is accepted, and how to say so."""

    accepts: Callable[[Any], bool]
    expected: str


LARGEST_SEED = 2**32 - 1  # seeds of epochs and images are made from it, in 64 bits
Count = Annotated[int, Must(lambda n: n >= 0, "0 or more")]
Positive = Annotated[int, Must(lambda n: n >= 1, "1 or more")]
Fraction = Annotated[float, Must(lambda p: 0 <= p < 1, "in [0, 1)")]
NonNegative = Annotated[float, Must(lambda v: v >= 0, "0 or more")]


def decode(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    """``value`` as ``kind``; what is wrong is appended to ``problems``, and the result then means nothing."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _limited(arguments[0], arguments[1:], value, at, problems)
    if origin in (Union, types.UnionType):
        return None if value is None else decode(arguments[0], value, at, problems)
    if origin is tuple:
        return _sequence(arguments, value, at, problems)
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{at} is {_shown(value)}, not a table")
            return None
        return {str(key): decode(arguments[1], item, f"{at}.{key}", problems) for key, item in value.items()}
    if is_dataclass(kind):
        return _record(kind, value, at, problems)
    return _scalar(kind, value, at, problems)


def _limited(kind: Any, limits: Iterable[Must], value: Any, at: str, problems: list[str]) -> Any:
    before = len(problems)
    result = decode(kind, value, at, problems)
    if len(problems) == before:
        problems += [f"{at} is {_shown(value)}, not {limit.expected}" for limit in limits if not limit.accepts(result)]
    return result


def _sequence(kinds: tuple[Any, ...], value: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        problems.append(f"{at} is {_shown(value)}, not a list")
        return None
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        problems.append(f"{at} has {len(value)} entries, not {len(kinds)}")
        return None
    return tuple(decode(kind, item, f"{at}[{i}]", problems) for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _scalar(kind: type, value: Any, at: str, problems: list[str]) -> Any:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if isinstance(value, bool) and kind is not bool:
        fits = False
    if not fits or (kind is float and not math.isfinite(value)):
        problems.append(f"{at} is {_shown(value)}, not {WORDS[kind]}")
        return None
    return float(value) if kind is float else value


def _record(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{at or 'the whole'} is {_shown(value)}, not a table")
        return None
    prefix, before = f"{at}." if at else "", len(problems)
    hints, known = _hints(kind), {item.name: item for item in fields(kind)}
    problems += [f"{prefix}{name} is not a known entry" for name in value if name not in known]
    good: dict[str, Any] = {}
    for name, item in known.items():
        if name in value:
            already = len(problems)
            result = decode(hints[name], value[name], prefix + name, problems)
            if len(problems) == already:
                good[name] = result
        elif item.default is not MISSING:
            good[name] = item.default
        elif item.default_factory is not MISSING:
            good[name] = item.default_factory()
        else:
            problems.append(f"{prefix}{name} is missing")
    for rule in getattr(kind, "rules", ()):
        needed = _needed(rule)
        if all(name in good for name in needed):
            problems += [prefix + text for text in rule(**{name: good[name] for name in needed})]
    return kind(**good) if len(problems) == before else None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _needed(rule: Any) -> tuple[str, ...]:
    """The fields that a rule is about."""
    return tuple(inspect.signature(rule).parameters)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
