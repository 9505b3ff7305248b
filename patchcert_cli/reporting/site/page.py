"""The whole page, and writing it.

It loads nothing: style and script stand in it, and its Content-Security-Policy allows these two alone, by their hashes.
Equal cards and an equal version give equal bytes; the date is that of the newest measurement.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards import Card
from patchcert_cli.errors import UsageError
from patchcert_cli.reporting.site import curves, models, tables
from patchcert_cli.reporting.site.leaderboards import Leaderboard, difficulty, leaderboards
from patchcert_cli.reporting.site.markup import Html, facts, fragment, tag
from patchcert_cli.reporting.site.script import SCRIPT
from patchcert_cli.reporting.site.style import STYLE
from patchcert_cli.storage import files
from patchcert_cli.threats import Guarantee
from patchcert_cli.version import __version__

INDEX = "index.html"
GENERATOR = "patchcert report zoo"
TITLE = "Certified defenses against adversarial patches and sparse attacks"
LEAD = (
    "Certified accuracy is the share of test images for which the model's answer is right and a proof shows that no change"
    " the attacker is allowed to make can alter it: every place of the patch or choice of pixels, with any content. It is a"
    " lower bound that no future attack can break, up to rounding where the arithmetic is called measured; accuracy under attack"
    " is not shown here."
)
READING = (
    "Each accuracy is in percent, with the count it was made from; below a certified accuracy stands its exact (Clopper and"
    " Pearson) 95 % interval. A guarantee of recovery says that the answer stays right; one of detection only that it stays right"
    " or an alarm is raised. As they promise different things, they never share a table. Published numbers are those of the named"
    " papers, for the papers' own weights; nothing here was measured on those."
)


def render(cards: Iterable[Card], *, version: str = __version__) -> str:
    """The page about these cards."""
    shown = sorted(cards, key=lambda card: card.name)
    found = leaderboards(shown)
    body = tag("body", _header(shown, version), _controls(found), tag("main", *_main(shown, found)), _footer(), "\n", _script())
    return f"<!DOCTYPE html>\n{tag('html', _head(version), body, lang='en')}\n"


def write(cards: Iterable[Card], folder: Path, *, force: bool = False) -> Path:
    """Write the page as ``index.html`` into a folder, which is made if need be; returns its path.

    Raises:
        UsageError: the folder is a file or below one, or holds an ``index.html`` that is not such a page, without ``force``.
        MachineError: it cannot be written.
    """
    path = folder / INDEX
    files.check_folder(folder, "--out")
    if path.exists() and not path.is_file():
        raise UsageError(f"'{path}' is no regular file.", hint="Choose another --out.")
    if path.exists() and not force and not _ours(path):
        raise UsageError(f"'{path}' was not written by this command.", hint="Choose another --out, or replace it with --force.")
    files.write_named(path, render(cards).encode())
    return path


def _ours(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return f'content="{GENERATOR}'.encode() in stream.read(2000)
    except OSError:
        return False


def policy() -> str:
    """The Content-Security-Policy: nothing but this style and this script."""
    allowed = {"style-src": STYLE, "script-src": SCRIPT}
    parts = ["default-src 'none'"]
    for name, text in allowed.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        parts.append(f"{name} 'sha256-{digest}'")
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'"])


def _head(version: str) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy()),
        tag("meta", name="generator", content=f"{GENERATOR} {version}"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"patchcert zoo: {TITLE.lower()}"),
        tag("style", Html(STYLE)),
    )


def _script() -> Html:
    return tag("script", Html(SCRIPT))


def newest(cards: Iterable[Card]) -> str | None:
    """The date of the newest measurement."""
    return max((one.date for card in cards for one in card.results), default=None)


def _header(cards: Sequence[Card], version: str) -> Html:
    date = newest(cards)
    measured = sum(bool(card.results) for card in cards)
    said = [f"patchcert {version}", f"{measured} of {len(cards)} models measured"]
    said.append(f"newest measurement {date}" if date else "no measurement yet")
    return tag(
        "header",
        tag("h1", TITLE),
        tag("p", LEAD, class_="lead"),
        tag("p", READING),
        tag("p", " · ".join(said), class_="meta"),
    )


def _controls(found: Sequence[Leaderboard]) -> Html:
    """Selectors and the filter; hidden until the script makes them work."""
    datasets = dict.fromkeys(board.dataset for board in found)
    threats = dict.fromkeys(str(board.threat) for board in sorted(found, key=lambda board: difficulty(board.threat)))
    first = [tag("option", "all", value="all"), *(tag("option", tables.title(one), value=fragment(one)) for one in datasets)]
    second = [tag("option", "those trained against", value=""), tag("option", "all", value="all")]
    second += [tag("option", one, value=fragment(one)) for one in threats]
    return tag(
        "div",
        tag("label", "Data set", tag("select", *first, id="dataset", autocomplete="off")),
        tag("label", "Threat", tag("select", *second, id="threat", autocomplete="off")),
        tag("label", "Filter by name, defense, network", tag("input", id="filter", type="search", autocomplete="off")),
        tag("p", id="status", role="status"),
        id="controls",
        class_="controls",
        role="search",
        hidden="",
    )


def _main(cards: Sequence[Card], found: Sequence[Leaderboard]) -> Iterable[Html]:
    drawn = curves.charts(found)
    for dataset in dict.fromkeys(board.dataset for board in found):
        seen: set[str] = set()
        parts = []
        for board in found:
            if board.dataset == dataset:
                address = tables.board_id(board)
                parts.append(tables.leaderboard(board, first=address not in seen))
                seen.add(address)
        charts = curves.section(dataset, drawn)
        yield tag("section", tag("h2", tables.title(dataset)), *parts, charts, class_="data", id=fragment(dataset))
    yield tables.unmeasured(cards)
    yield tag("section", tag("h2", "Model cards"), *map(models.section, cards), id="models/")


def _footer() -> Html:
    promises = facts((str(one), f"{one.phrase}, whatever the attacker does within the threat.") for one in Guarantee)
    words = facts((str(one), f"{one.meaning}.") for one in Arithmetic)
    text = "Made by patchcert from its model cards. Each number can be measured again with the command on the model's card."
    return tag("footer", tag("p", text), promises, tag("p", "Arithmetic of a certificate:"), words)
