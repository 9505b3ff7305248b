"""HTML by construction: whatever is not marked as HTML already is escaped, so that no text of a card can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from urllib.parse import quote

Attribute = str | int | float | None

# Controls, lone surrogates and marks that turn the direction of writing: a card could hide or reorder text with them.
UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffe\uffff]"
)
LINES = {"article", "caption", "dd", "details", "div", "dl", "dt", "figure", "footer", "h1", "h2", "h3", "h4", "header", "li"}
LINES |= {"main", "meta", "nav", "ol", "option", "p", "pre", "script", "section", "style", "summary", "svg", "table", "tbody"}
LINES |= {"g", "head", "path", "td", "text", "th", "thead", "title", "tr", "ul"}
VOID = {"br", "input", "meta"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Text as HTML, fit for elements and for quoted attributes."""
    return text if isinstance(text, Html) else Html(html.escape(UNSHOWABLE.sub("\ufffd", text), quote=True))


def join(parts: Iterable[str], between: str = "") -> Html:
    """Parts in a row, each escaped unless it is HTML already."""
    return Html(escape(between).join(escape(part) for part in parts))


def tag(name: str, /, *children: str, **attributes: Attribute) -> Html:
    """An element; ``class_`` is the class, ``data_value`` becomes ``data-value``, and an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    end = "\n" if name in LINES else ""
    return Html(f"<{name}{written}>{end}" if name in VOID else f"<{name}{written}>{join(children)}</{name}>{end}")


def fragment(*parts: str) -> str:
    """An ``id`` without blanks, which behind a ``#`` is its own address: the quoted parts, joined by slashes."""
    return "/".join(quote(part, safe=":", errors="surrogatepass") for part in parts)


def code(text: str) -> Html:
    """A name or number as one types it."""
    return tag("code", text)


def prose(text: str) -> Html:
    """A card's paragraph: what stands between two backticks is code."""
    parts = re.split(r"`([^`\n]+)`", text)
    return join(code(part) if i % 2 else part for i, part in enumerate(parts))


def block(text: str) -> Html:
    """Lines to copy."""
    return tag("pre", tag("code", text), tabindex=0)


def facts(rows: Iterable[tuple[str, str]]) -> Html:
    """Names and what they are; rows without text are left out."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in rows if text), class_="facts")


def scrolling(table: Html, label: str) -> Html:
    """A table that scrolls by itself where the window is narrower."""
    return tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def percent(count: int, total: int) -> str:
    """A share in percent with two digits, without the sign."""
    return f"{100 * count / total:.2f}"
