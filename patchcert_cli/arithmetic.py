"""What is known of rounding in a certificate; these words are defined here alone. No torch here."""

from __future__ import annotations

import enum
from collections.abc import Iterable


class Arithmetic(enum.StrEnum):
    """How a certificate accounts for rounding, the strongest first."""

    EXACT = "exact"
    BOUNDED = "bounded"
    MEASURED = "measured"

    @property
    def meaning(self) -> str:
        """One sentence for a reader of results."""
        return MEANING[self]


MEANING = {
    Arithmetic.EXACT: "what the proof reads was computed without any rounding error",
    Arithmetic.BOUNDED: "rounding errors are bounded by proof, and counted against the certificate",
    Arithmetic.MEASURED: (
        "the proof takes each label as computed; that rounding cannot alter one was measured on this network, not proven"
    ),
}
FORMER = {  # defenses, by the arithmetic of what was recorded before records said it
    **dict.fromkeys(("bagcert", "smoothing", "clipped", "patchguard", "partition", "roots"), Arithmetic.EXACT),
    "ibp": Arithmetic.BOUNDED,
}


def former(defense: str) -> Arithmetic:
    """The arithmetic of records, results and cards of ``defense`` that do not say it; of an unknown one ``measured``."""
    return FORMER.get(defense, Arithmetic.MEASURED)


def weakest(said: Iterable[str]) -> Arithmetic:
    """The least that some certificates, at least one, have in common."""
    return max((Arithmetic(one) for one in said), key=list(Arithmetic).index)
