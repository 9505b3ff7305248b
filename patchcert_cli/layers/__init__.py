"""What networks and proofs both know: preprocessing, and networks that compute without rounding error."""
