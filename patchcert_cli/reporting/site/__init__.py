"""The zoo as one web page, made from the model cards alone. Needs no torch and no network; the page loads nothing."""

from patchcert_cli.reporting.site.page import INDEX, render, write

__all__ = ["INDEX", "render", "write"]
