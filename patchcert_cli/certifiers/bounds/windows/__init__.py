"""Interval bounds in the windows that a patch can reach."""
