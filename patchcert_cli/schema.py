"""The one validator: plain values, as JSON and YAML know them, to frozen dataclasses and back, every problem listed at once.

:func:`read` is the door: it returns an object whose fields all have the types and limits of their annotations, or raises
:class:`Invalid`. A field's annotation says all there is to say:

- ``Annotated[int, Must(lambda n: n > 0, "1 or more")]`` has a limit;
- ``Literal["adam", "sgd"]`` and an ``Enum`` list what is allowed;
- ``Annotated[Threat, Parsed(parse_threat)]`` is text in files and an object in Python; ``str`` of the object is the text.

A dataclass lists the rules between its fields as ``rules``: functions whose parameters are names of fields and which yield what
is wrong. A rule is applied if its own fields are valid, also where others are not.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from patchcert_cli.errors import PatchcertError

Kind = TypeVar("Kind")
Rule = Callable[..., Iterable[str]]
WORDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "any value"}
LONGEST_SHOWN = 60  # characters of a value that a problem quotes
LARGEST_SEED = 2**32 - 1  # seeds of epochs and images are made from it, in 64 bits


class Invalid(ValueError):
    """Values that are not what they should be.

    Attributes:
        problems: everything that is wrong, each with the path of its entry.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True)
class Must:
    """A limit of a field: what is accepted, and the limit as text."""

    accepts: Callable[[Any], bool]
    expected: str


@dataclass(frozen=True)
class Parsed:
    """A field that is text in files: the function that reads it. It raises ``ValueError`` or an error of this package."""

    parse: Callable[[str], Any]


Count = Annotated[int, Must(lambda n: n >= 0, "0 or more")]
Positive = Annotated[int, Must(lambda n: n >= 1, "1 or more")]
Bits = Annotated[int, Must(lambda n: 1 <= n <= 16, "from 1 to 16")]
Fraction = Annotated[float, Must(lambda p: 0 <= p < 1, "in [0, 1)")]
NonNegative = Annotated[float, Must(lambda v: v >= 0, "0 or more")]
Seed = Annotated[int, Must(lambda n: 0 <= n <= LARGEST_SEED, f"from 0 to {LARGEST_SEED}")]


def read(kind: type[Kind], value: Any, at: str = "") -> Kind:
    """``value`` as ``kind``; ``at`` is the path of the value in its file, for messages.

    Raises:
        Invalid: with every problem.
    """
    problems: list[str] = []
    result = _read(kind, value, at, problems)
    if problems:
        raise Invalid(problems)
    return cast(Kind, result)


def read_fields(kind: Any, values: Mapping[str, Any], at: str = "") -> tuple[dict[str, Any], list[str]]:
    """The valid fields of dataclass ``kind``, defaults included, and everything that is wrong with the others.

    For a dataclass that checks itself when it is made; everything else uses :func:`read`.
    """
    prefix = f"{at}." if at else ""
    hints, known = _hints(kind), {item.name: item for item in fields(kind) if item.init}
    problems = [f"{prefix}{name} is not a known entry" for name in values if name not in known]
    valid: dict[str, Any] = {}
    for name, item in known.items():
        if name in values:
            result = _read(hints[name], values[name], prefix + name, problems)
            if result is not MISSING:
                valid[name] = result
        elif item.default is not MISSING:
            valid[name] = item.default
        elif item.default_factory is not MISSING:
            valid[name] = item.default_factory()
        else:
            problems.append(f"{prefix}{name} is missing")
    for rule in getattr(kind, "rules", ()):
        needed = _parameters(rule)
        if all(name in valid for name in needed):
            problems += [prefix + text for text in rule(**{name: valid[name] for name in needed})]
    return valid, problems


def plain(value: Any) -> Any:
    """Inverse of :func:`read`: dataclasses as tables, tuples as lists, and as text what has a text form of its own."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        if type(value).__str__ is not object.__str__:
            return str(value)
        return {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.init}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Entry:
    """What a field of a dataclass takes: its name, what is allowed as text, and its default; ``required`` if it has none."""

    name: str
    allowed: str
    default: Any = None
    required: bool = False


def entries(kind: Any) -> list[Entry]:
    """The fields of a dataclass, for documents and listings."""
    hints = _hints(kind)
    listed = []
    for item in (one for one in fields(kind) if one.init):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        required = default is MISSING
        listed.append(Entry(item.name, allowed(hints[item.name]), None if required else plain(default), required))
    return listed


def knows(kind: Any) -> bool:
    """Whether :func:`read` can read a type: numbers, text, choices, dataclasses and tuples of them; of unions and tables no."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return knows(arguments[0])
    if origin is tuple:
        return all(knows(one) for one in arguments if one is not ...)
    return bool(_choices(kind)) or (origin is None and (is_dataclass(kind) or kind in WORDS))


def allowed(kind: Any) -> str:
    """What a type takes, as text, such as ``a whole number, 1 or more``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit.expected for limit in arguments[1:] if isinstance(limit, Must)]
        return ", ".join([allowed(arguments[0]), *limits])
    if origin in (Union, types.UnionType):
        return " or ".join("nothing" if one is type(None) else allowed(one) for one in arguments)
    if choices := _choices(kind):
        return _or([str(choice) for choice in choices])
    if origin in (tuple, list, Sequence):
        return "a list of " + allowed(arguments[0])
    return WORDS.get(kind, "text" if inspect.isclass(kind) and not is_dataclass(kind) and origin is None else "a table")


def _read(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    """``value`` as ``kind``, or ``MISSING`` after what is wrong was added to ``problems``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _limited(arguments[0], arguments[1:], value, at, problems)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, at, problems)
    if choices := _choices(kind):
        return _chosen(kind, choices, value, at, problems)
    if origin is tuple:
        return _sequence(arguments, value, at, problems)
    if origin is dict:
        return _table(arguments[1], value, at, problems)
    if is_dataclass(kind):
        return _record(kind, value, at, problems)
    return _scalar(kind, value, at, problems)


def _limited(kind: Any, limits: Sequence[Any], value: Any, at: str, problems: list[str]) -> Any:
    parsers = [limit for limit in limits if isinstance(limit, Parsed)]
    if parsers:
        return _parsed(kind, parsers[0], value, at, problems)
    result = _read(kind, value, at, problems)
    if result is MISSING:
        return MISSING
    refused = [limit for limit in limits if isinstance(limit, Must) and not limit.accepts(result)]
    problems += [f"{at} is {shown(value)}, not {limit.expected}" for limit in refused]
    return MISSING if refused else result


def _parsed(kind: Any, parser: Parsed, value: Any, at: str, problems: list[str]) -> Any:
    if inspect.isclass(kind) and isinstance(value, kind):
        return value
    if not isinstance(value, str):
        problems.append(f"{at} is {shown(value)}, not text")
        return MISSING
    try:
        return parser.parse(value)
    except (ValueError, PatchcertError) as problem:
        problems.append(f"{at} is {shown(value)}: {' '.join(str(problem).split()).rstrip('.')}")
        return MISSING


def _choices(kind: Any) -> tuple[Any, ...]:
    """What a ``Literal`` or an ``Enum`` allows; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(one.value for one in kind) if inspect.isclass(kind) and issubclass(kind, Enum) else ()


def _chosen(kind: Any, choices: Sequence[Any], value: Any, at: str, problems: list[str]) -> Any:
    plain_value = value.value if isinstance(value, Enum) else value
    if not any(plain_value == choice and type(plain_value) is type(choice) for choice in choices):
        problems.append(f"{at} is {shown(value)}, not {_or([str(choice) for choice in choices])}")
        return MISSING
    return value if get_origin(kind) is Literal else kind(plain_value)


def _sequence(kinds: tuple[Any, ...], value: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(value, list | tuple):
        problems.append(f"{at} is {shown(value)}, not a list")
        return MISSING
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        problems.append(f"{at} has {len(value)} entries, not {len(kinds)}")
        return MISSING
    items = [_read(kind, item, f"{at}[{i}]", problems) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))]
    return MISSING if any(item is MISSING for item in items) else tuple(items)


def _table(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{at} is {shown(value)}, not a table")
        return MISSING
    items = {str(key): _read(kind, item, f"{at}.{key}", problems) for key, item in value.items()}
    return MISSING if any(item is MISSING for item in items.values()) else items


def _record(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        problems.append(f"{at or 'the whole'} is {shown(value)}, not a table")
        return MISSING
    valid, wrong = read_fields(kind, value, at)
    problems += wrong
    return MISSING if wrong else kind(**valid)


def _scalar(kind: type, value: Any, at: str, problems: list[str]) -> Any:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if isinstance(value, bool) and kind is not bool:
        fits = False
    if not fits or (kind is float and not math.isfinite(value)):
        problems.append(f"{at} is {shown(value)}, not {WORDS[kind]}")
        return MISSING
    return float(value) if kind is float else value


def differences(then: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What differs in ``now``, as text; of mappings only the entries that differ."""
    for key, value in now.items():
        before = then.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            yield from differences(before, value, f"{within}{key}.")
        elif before != value:
            yield f"{within}{key} {shown(before)}, not {shown(value)}"
    if within:
        yield from (f"{within}{key} {shown(then[key])}, not None" for key in then if key not in now)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _parameters(rule: Any) -> tuple[str, ...]:
    """The fields that a rule is about."""
    return tuple(inspect.signature(rule).parameters)


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def shown(value: Any) -> str:
    """``repr`` of a value, shortened to ``LONGEST_SHOWN`` characters."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
