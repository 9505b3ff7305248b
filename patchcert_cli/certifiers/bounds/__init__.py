"""Proofs from bounds of every activation, for every patch location at once."""
