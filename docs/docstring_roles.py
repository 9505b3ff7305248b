"""A griffe extension: roles of docstrings, such as ``:class:`Claim```, become links where the site has an entry for the name."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<name>[\w.]+)`")


class DocstringRoles(Extension):
    """Reads the roles of every docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Replace the roles of one object's docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda role: linked(obj, role["name"]), obj.docstring.value)


def linked(obj: Object, name: str) -> str:
    """Markdown for a name: code, and a link if the site documents it."""
    first, dot, rest = name.partition(".")
    try:
        path = obj.resolve(first) + dot + rest
    except NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name.removeprefix("patchcert_cli.")}</code></autoref>'
