"""Web pages that load nothing: the zoo, from the model cards alone, and a user's own runs (``runs.py``, which needs torch)."""

from patchcert_cli.reporting.site.page import INDEX, page_path, render, write

__all__ = ["INDEX", "page_path", "render", "write"]
