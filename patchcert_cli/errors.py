"""Every error that a user can meet: a message and a hint, each a full sentence, and a documented exit code."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 24  # names that an error lists
FOREIGN = (Exception, SystemExit)  # what code of users and other packages may raise; a script may end with sys.exit


class PatchcertError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: the exit code of the command line.
        message: one line: what is wrong, and what was given.
        hint: one line: what is allowed, or what to type next. It begins with a capital letter or a command; may be empty.
        of_first: the first of several processes has the same error, and reports it.
    """

    code = 1
    of_first = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(PatchcertError):
    """An option or argument that is invalid."""

    code = 2


class UnsupportedThreat(UsageError):
    """The defense has no certificate for this threat model."""


class UnknownName(PatchcertError):
    """A model, data set, defense or recipe that does not exist."""

    code = 3


class HubError(PatchcertError):
    """The Hub is out of reach or refuses."""

    code = 4


class IntegrityError(PatchcertError):
    """Weights or configuration that are not what they claim to be."""

    code = 5


class DataError(PatchcertError):
    """Images or labels that are missing or do not fit the model."""

    code = 6


class MachineError(PatchcertError):
    """The machine cannot do it: no such device, out of memory, disk full, broken install."""

    code = 7


class ClaimError(PatchcertError):
    """A published or computed claim that did not hold, such as a certified image that an attack flipped."""

    code = 8


class Interrupted(PatchcertError):
    """Stopped by Ctrl-C; what was done so far is on disk."""

    code = 130


def unknown(kind: str, given: str, known: Iterable[str], *, see: str = "") -> UnknownName:
    """An :class:`UnknownName` with suggestions: substring matches first, then close spellings; ``-`` and ``_`` are the same."""
    names = sorted(known)
    folded, alike = _folded(given), {_folded(name): name for name in reversed(names)}
    near = [name for name in names if folded and (folded in _folded(name) or _folded(name) in folded)][:3]
    near = near or [alike[one] for one in get_close_matches(folded, alike, 3, 0.6)]
    hint = f"Did you mean {', '.join(near)}?" if near else ""
    if not near and (len(names) <= LISTED or not see):
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        hint = f"Known: {', '.join(names[:LISTED]) or 'none'}{more}."
    if see:
        hint += f" See: {see}" if hint else f"See: {see}"
    return UnknownName(f"no {kind} '{given}'.", hint=hint)


def first_line(problem: BaseException) -> str:
    """The first line of any exception, without its full stop; the exception's type if it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(problem).__name__


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")


def of_code(code: int) -> type[PatchcertError]:
    """The class of errors of an exit code."""
    kinds = [kind for kind in PatchcertError.__subclasses__() if kind.code == code]
    return kinds[0] if kinds else PatchcertError


def on_all_ranks(problem: PatchcertError) -> PatchcertError:
    """The same error, which every process of a job has alike."""
    problem.of_first = True
    return problem
