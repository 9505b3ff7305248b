"""Proofs: pure tensors in, pure tensors out."""
