"""Objects with rows: a small HTML table in a notebook (``_repr_html_``), and a pandas DataFrame (``to_pandas``).

pandas is optional, the extra ``pandas``, and is imported when it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any

from patchcert_cli.errors import MachineError

SHOWN = 10  # rows in a notebook; to_pandas() has them all
Columns = Mapping[str, Sequence[Any]]


class Tabular(ABC):
    """An object that a notebook shows as a caption and its first rows."""

    @abstractmethod
    def columns(self) -> Columns:
        """The rows, by column: values of plain Python, as many in each column."""

    @abstractmethod
    def caption(self) -> str:
        """All rows in one line."""

    def to_pandas(self) -> Any:
        """All rows as a ``pandas.DataFrame``.

        Raises:
            MachineError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as problem:
            raise MachineError(
                "to_pandas() needs pandas, which is not installed.", hint="Type: pip install 'patchcert[pandas]'"
            ) from problem
        return pandas.DataFrame(dict(self.columns()))

    def _repr_html_(self) -> str:
        columns = self.columns()
        rows = list(zip(*columns.values(), strict=True))
        more = f"<p>and {len(rows) - SHOWN} more rows; to_pandas() has all of them</p>" if len(rows) > SHOWN else ""
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows[:SHOWN])
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p>{escape(self.caption())}</p>{table}{more}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
