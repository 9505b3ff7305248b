"""Block voting for patchcert: found by the entry points in ``pyproject.toml``, without a change of patchcert."""
