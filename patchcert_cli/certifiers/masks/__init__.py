"""Proofs from predictions behind masks."""
