"""Proofs about sums of votes, each from a cell that sees a part of the image."""
