"""Which output of a model each class of a data set is: matched by names, never by position alone.

Class folders are sorted by name, and a model's outputs are in the order of its training data: equal positions mean nothing. An
output may have several names, such as a WordNet id and the words for it.

Shapes: K outputs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from patchcert_cli.errors import DataError

WNID = re.compile(r"n\d{8}")  # a WordNet id, the name of an ImageNet folder
MAX_SHOWN = 3  # names in an error message

Names = tuple[tuple[str, ...], ...]  # the names of each output


def read(path: Path) -> Names:
    """The names of K outputs from a text file with K lines, in the order of the outputs; tabs separate names of one output.

    Raises:
        DataError: there is no such file, or a line is empty or occurs twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(
            f"--classes '{path}' cannot be read ({type(problem).__name__}).",
            hint="Give a text file with one line per output of the model.",
        ) from problem
    names = tuple(tuple(filter(None, map(str.strip, line.split("\t")))) for line in lines)
    if not names or not all(names):
        at = "it is empty" if not names else f"line {names.index(()) + 1} is empty"
        raise DataError(f"--classes '{path}': {at}.", hint="Give one line per output of the model.")
    first: dict[str, int] = {}
    for number, one in enumerate(names, 1):
        if (before := first.setdefault(folded(one[0]), number)) != number:
            raise DataError(f"--classes '{path}': lines {before} and {number} are both '{one[0]}'.", hint="Tell them apart.")
    return names


def match(classes: Sequence[str], outputs: Names, *, data: str, model: str, count: int) -> list[int]:
    """For each class of a data set the output of the model that has its name.

    Args:
        classes: names of the classes, those of their folders.
        outputs: the names of the model's outputs; empty if they are unknown.
        data: name of the data set, for messages.
        model: name of the model, for messages.
        count: K.

    Raises:
        DataError: names are unknown, missing or ambiguous, or their number is not K; the message says what to type.
    """
    remedy = "Pass --classes names.txt (one line per output)"
    remedy += f", or --weights with a {len(classes)}-way head." if len(classes) != count else "."
    if not outputs:
        raise DataError(
            f"{len(classes)} classes in {data}, and nothing says what the {count} outputs of {model} are called.",
            hint=f"Classes are never matched by position. {remedy}",
        )
    if len(outputs) != count:
        raise DataError(f"{len(outputs)} class names, but {model} has {count} outputs.", hint="Give one line per output.")
    exact, loose = _index(outputs, str), _index(outputs, folded)
    found = [sorted(exact.get(name) or loose.get(folded(name)) or ()) for name in classes]
    strange = [name for name, at in zip(classes, found, strict=True) if not at]
    if strange:
        raise DataError(
            f"{len(classes)} classes in {data}, {len(strange)} of them none of the {count} outputs of {model}"
            f" ({_some(strange)} is not among {_some(' = '.join(one[:2]) for one in outputs)}).",
            hint=remedy,
        )
    several = [name for name, at in zip(classes, found, strict=True) if len(at) > 1]
    if several:
        which = " and ".join(outputs[at][0] for at in found[classes.index(several[0])])
        raise DataError(
            f"class '{several[0]}' of {data} names more than one output of {model}: {which}.", hint="Rename its folder to one."
        )
    chosen = [at for (at,) in found]
    twice = [name for at, name in zip(chosen, classes, strict=True) if chosen.count(at) > 1]
    if twice:
        raise DataError(
            f"classes {' and '.join(twice[:2])} of {data} are the same output of {model}.", hint="Join their folders into one."
        )
    return chosen


def words(outputs: Names) -> tuple[str, ...]:
    """The name of each output for people: its first one that is not a WordNet id, with the id where several share it."""
    spoken = [next((name for name in names if not WNID.fullmatch(name)), names[0]) for names in outputs]
    count = Counter(spoken)
    return tuple(
        one if count[one] == 1 or one == names[0] else f"{one} ({names[0]})" for one, names in zip(spoken, outputs, strict=True)
    )


def folded(name: str) -> str:
    """A name without case, and with single spaces for hyphens and underscores."""
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))


def _index(outputs: Names, key: Callable[[str], str]) -> Mapping[str, set[int]]:
    index: dict[str, set[int]] = {}
    for at, names in enumerate(outputs):
        for name in names:
            index.setdefault(key(name), set()).add(at)
    return index


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:MAX_SHOWN]) + (", ..." if len(listed) > MAX_SHOWN else "")
