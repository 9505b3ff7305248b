"""The whole page, and writing it.

The page loads nothing: its style and its script are inside, and its Content-Security-Policy allows these two alone, by their
hashes. Equal cards and an equal version give equal bytes; the date is that of the newest measurement. Every text of a card is
escaped by the templates.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml
from markupsafe import Markup

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards import Card, Measured, Published
from patchcert_cli.errors import UsageError
from patchcert_cli.reporting import figure_style, numbers
from patchcert_cli.reporting.site.charts import Chart, charts, looks
from patchcert_cli.reporting.site.leaderboards import describe, difficulty, leaderboards, own, paper_for, title
from patchcert_cli.storage import files
from patchcert_cli.threats import Guarantee, as_options
from patchcert_cli.version import __version__

INDEX = "index.html"
GENERATOR = "patchcert report zoo"
# Controls, lone surrogates and marks that change the direction of writing: a card could hide or reorder text with them.
UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Unmeasured:
    """A table of models without a test measurement.

    Attributes:
        id: its address.
        name: its heading.
        about: its caption.
        threat: the heading of the column of threats.
        command: what the command on the card does with the model; empty if it is not shown.
        cards: the models.
    """

    id: str
    name: str
    about: str
    threat: str
    command: str
    cards: tuple[Card, ...]


def render(cards: Iterable[Card], *, version: str = __version__) -> str:
    """The page about these cards.

    Raises:
        MachineError: matplotlib is not installed.
    """
    models = sorted(cards, key=lambda card: card.name)
    boards = leaderboards(models)
    return filled(
        "page.html",
        GENERATOR,
        script="script.js",
        version=version,
        cards=models,
        measured=sum(bool(card.results) for card in models),
        newest=max((one.date for card in models for one in card.results), default=""),
        boards=boards,
        looks=looks({entry.card.name: entry.card for board in boards for entry in board.entries}.values()),
        datasets=list(dict.fromkeys(board.dataset for board in boards)),
        threats=list(dict.fromkeys(str(board.threat) for board in sorted(boards, key=lambda board: difficulty(board.threat)))),
        charts=charts(boards),
        unmeasured=unmeasured(models),
    )


def filled(
    template: str,
    generator: str,
    *,
    script: str = "",
    images: bool = False,
    filters: Mapping[str, Any] | None = None,
    **values: Any,
) -> str:
    """A page from a template, with the style sheet inside.

    Args:
        template: its name.
        generator: the command that writes the page, by which :func:`write_page` knows its own pages.
        script: the name of the script inside, if there is one.
        filters: functions that the template calls besides those of the zoo's page.
        images: whether the page may show images that are in it as ``data:`` addresses.
        values: what the template shows; ``version`` is by default this version.

    Raises:
        MachineError: matplotlib is not installed.
    """
    figure_style.require()
    environment = templates().overlay()
    environment.filters = {**environment.filters, **(filters or {})}
    style = Markup(environment.get_template("style.css").render(palette=figure_style.PALETTE))
    code = Markup(_source(environment, script)) if script else Markup("")
    return environment.get_template(template).render(
        **{"version": __version__, **values},
        policy=policy(style, code, images=images),
        style=style,
        script=code,
        generator=generator,
        arithmetics=list(Arithmetic),
    )


def write(cards: Iterable[Card], folder: Path, *, force: bool = False) -> Path:
    """Write the page as ``index.html`` into a folder, which is made if it does not exist; returns its path.

    Raises:
        UsageError: the folder is a file or below one, or has an ``index.html`` that is not such a page, without ``force``.
        MachineError: it cannot be written, or matplotlib is not installed.
    """
    path = page_path(folder, GENERATOR, force=force)
    files.write_named(path, render(cards).encode())
    return path


def page_path(folder: Path, generator: str, *, force: bool = False) -> Path:
    """``index.html`` of a folder that a page is to be written into, by the command ``generator``; nothing is changed.

    Raises:
        UsageError: the folder is a file or below one, or has an ``index.html`` that is not a page of this command, without
            ``force``.
        MachineError: nothing can be written there.
    """
    path = folder / INDEX
    files.check_folder(folder, "--out")
    keep_others(path, f'content="{generator} ', force=force)
    return path


def keep_others(path: Path, mark: str, *, force: bool = False) -> None:
    """Refuse to replace a file that this command did not write: its first bytes lack the command's ``mark``.

    Raises:
        UsageError: it is not a regular file, or lacks the mark, without ``force``.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(f"'{path}' is not a regular file.", hint="Choose another --out.")
    if not force and not _has(path, mark):
        raise UsageError(f"'{path}' was not written by this command.", hint="Choose another --out, or replace it with --force.")


def _has(path: Path, mark: str) -> bool:
    try:
        with path.open("rb") as stream:
            return mark.encode() in stream.read(2000)
    except OSError:
        return False


def policy(style: str, script: str = "", *, images: bool = False) -> str:
    """The Content-Security-Policy: nothing but this style and this script, and images inside the page if it has any."""
    parts = ["default-src 'none'"]
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        parts += [f"{name} 'sha256-{digest}'"] if text else []
    return "; ".join([*parts, *(["img-src data:"] if images else []), "base-uri 'none'", "form-action 'none'"])


def unmeasured(cards: Sequence[Card]) -> list[Unmeasured]:
    """Recipes without weights, public weights, and models without a test measurement, a table each."""
    recipes = tuple(card for card in cards if card.status == "recipe only")
    public = tuple(card for card in cards if card.public)
    others = tuple(card for card in cards if card not in (*recipes, *public) and not card.results)
    return [
        Unmeasured(
            "recipes/",
            "Recipes only",
            "Recipes that were not run: there are no weights, and nothing is claimed for them.",
            "To be trained against",
            "Train",
            recipes,
        ),
        Unmeasured(
            "public/",
            "Public weights",
            "Classifiers with public weights, with a defense around them; not measured on a test split.",
            "Made for",
            "Measure",
            public,
        ),
        Unmeasured("waiting/", "Not measured yet", "Trained, but not measured on test images.", "Trained against", "", others),
    ]


@cache
def templates() -> jinja2.Environment:
    """The templates, with everything that they call."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("patchcert_cli.reporting.site"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_showable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"share": numbers.share, "guarantees": [one for one in Guarantee if one.proves]}
    environment.filters |= {
        "percent": numbers.percent,
        "interval": numbers.interval,
        "file_size": files.file_size,
        "title": title,
        "describe": describe,
        "own": own,
        "words": search_words,
        "fragment": fragment,
        "quote": quote,
        "prose": prose,
        "letters": letters,
        "as_options": as_options,
        "recipe": recipe,
        "results": results_of,
        "sources": sources,
        "paper": lambda card: card.report() if card.guarantee is Guarantee.RECOVERY else None,
        "paper_for": lambda result, card: paper_for(card, result),
        "draw": lambda chart: Markup(_showable(Chart.draw(chart))),
    }
    return environment


def _source(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _showable(value: Any) -> Any:
    """A text without characters that cannot be shown; other values as they are."""
    return UNSHOWABLE.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def fragment(*parts: str) -> str:
    """An ``id`` without blanks, which after a ``#`` is its own address: the quoted parts, joined by slashes."""
    return "/".join(quote(str(part), safe=":", errors="surrogatepass") for part in parts)


def prose(text: str) -> Markup:
    """A card's paragraph: text between two backticks is code."""
    parts = re.split(r"`([^`\n]+)`", _showable(text))
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def letters(index: int) -> str:
    """a to z, then aa, ab and so on."""
    return (letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def sources(papers: Iterable[Published | None]) -> list[str]:
    """The papers below a table, in the order of their letters."""
    return list(dict.fromkeys(paper.source for paper in papers if paper))


def search_words(card: Card, *more: str) -> str:
    """The text that the filter searches."""
    return " ".join((card.name, card.defense, card.network, card.license, card.status, *more, own(card))).lower()


def recipe(card: Card) -> str:
    """The recipe as YAML."""
    return yaml.safe_dump(
        card.to_dict()["recipe"], sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    ).rstrip()


def results_of(card: Card, guarantee: Guarantee) -> list[Measured]:
    """The measurements of one guarantee, by data set and threat, the best proof first."""
    results = [one for one in card.results if one.guarantee is guarantee]
    return sorted(results, key=lambda one: (one.dataset, difficulty(one.threat), one.split, -one.certified))
