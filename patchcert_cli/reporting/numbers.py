"""How accuracies and intervals are written, in tables, on the web page and in the README."""

from __future__ import annotations


def percent(fraction: float) -> str:
    """A fraction in percent with two digits, without the sign: ``61.85``."""
    return f"{100 * fraction:.2f}"


def share(count: int, total: int) -> str:
    """A count among a total, in percent: ``61.85 % (6185/10000)``; of no images 0 %."""
    return f"{percent(count / max(total, 1))} % ({count}/{total})"


def interval(ends: tuple[float, float] | list[float]) -> str:
    """Two fractions in percent: ``60.89 to 62.80``."""
    low, high = ends
    return f"{percent(low)} to {percent(high)}"


def plural(count: int, thing: str) -> str:
    """``1 pixel``, ``4 pixels``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
