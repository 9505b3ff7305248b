"""Proofs from masked predictions."""
