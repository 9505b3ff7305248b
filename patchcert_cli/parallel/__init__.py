"""The processes of one job: ranks, and what they share."""
