"""Interval bounds: the defense, its options, its loss and its regularizers."""

from patchcert_cli.defenses.ibp.defense import IntervalDefense

__all__ = ["IntervalDefense"]
