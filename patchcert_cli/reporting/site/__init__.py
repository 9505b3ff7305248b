"""The zoo as one web page, made from the model cards alone: no torch, no network, and nothing is loaded by the page."""

from patchcert_cli.reporting.site.page import INDEX, render, write

__all__ = ["INDEX", "render", "write"]
