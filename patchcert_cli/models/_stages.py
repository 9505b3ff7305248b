"""Lists of options with an entry for each stage of a network."""

from __future__ import annotations

from collections.abc import Sequence


def stages(**options: Sequence[int]) -> list[tuple[int, ...]]:
    """For each stage its entry of every list.

    Raises:
        ValueError: the lists are not of the same length, or empty.
    """
    if not all(options.values()):
        raise ValueError("there are no stages; give each list one entry for each stage")
    if len({len(entries) for entries in options.values()}) > 1:
        counts = ", ".join(f"{name} has {len(entries)}" for name, entries in options.items())
        raise ValueError(f"each list needs one entry for each stage: {counts}")
    return list(zip(*options.values(), strict=True))
