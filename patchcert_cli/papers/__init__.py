"""Papers as data: what they publish, row by row, and what follows from the zoo's records for each row. No torch here."""

from patchcert_cli.papers.paper import NOT_KNOWN, Paper, Row, Table, load, names

__all__ = ["NOT_KNOWN", "Paper", "Row", "Table", "load", "names"]
