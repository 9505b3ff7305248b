"""The tables of the page: leaderboards, and models about which nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence

from patchcert_cli.cards import Card, Published
from patchcert_cli.reporting.site.leaderboards import Entry, Leaderboard, describe, own
from patchcert_cli.reporting.site.markup import Html, block, code, fragment, join, percent, scrolling, tag
from patchcert_cli.storage.files import file_size
from patchcert_cli.threats import Guarantee

PAPERS = "Published numbers belong to the weights of the paper, not to these:"
TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}
NOTHING = tag("span", "\N{EN DASH}", class_="none", aria_label="none")


def title(dataset: str) -> str:
    """A data set's name in headings."""
    return TITLES.get(dataset, dataset)


class Sources:
    """The papers below a table, each with a letter."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def mark(self, source: str) -> Html:
        """The letter of a source, which is listed from now on."""
        if source not in self.seen:
            self.seen.append(source)
        return tag("sup", letters(self.seen.index(source)), class_="mark")

    def listed(self) -> Html:
        """The list below the table; nothing if there is no source."""
        if not self.seen:
            return Html()
        items = (tag("li", tag("sup", letters(i)), " ", source) for i, source in enumerate(self.seen))
        return tag("div", tag("p", PAPERS), tag("ul", *items), class_="sources")


def letters(index: int) -> str:
    """a to z, then aa, ab and so on."""
    return (letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def head(name: str, *, number: bool = False, group: bool = False, sort: str | None = None, rows: int | None = None) -> Html:
    """A column's head; what sorts by it is a button that the page's script puts there."""
    classes = " ".join(word for word, meant in (("number", number), ("group", group)) if meant)
    return tag(
        "th", name, scope="col", class_=classes or None, aria_sort=sort, rowspan=rows, data_sort="number" if number else "text"
    )


def cell(text: str, *, value: float | str | None = None, class_: str | None = None) -> Html:
    """A cell with the value that it is sorted by, by default its text; no value is sorted last."""
    return tag("td", text, class_=class_, data_value=value)


def measured(count: int, images: int, interval: tuple[float, float] | None = None) -> Html:
    """An accuracy measured here: percent, count, and the exact interval if there is one."""
    below = [f"{count}/{images}"]
    if interval is not None:
        below.append(f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}")
    parts = [tag("b" if interval else "span", percent(count, images), class_="share")]
    parts += [tag("span", text, class_="below") for text in below]
    return cell(join(parts, " "), value=repr(count / images), class_="number measured" + (" certified" if interval else ""))


def published(paper: Published | None, sources: Sources) -> list[Html]:
    """Two cells: clean and certified accuracy of a paper, attributed to it."""
    if paper is None:
        return [cell(NOTHING, class_="number published"), cell(NOTHING, class_="number published")]
    mark = sources.mark(paper.source)
    shares = (paper.clean, paper.certified)
    return [cell(join([f"{100 * share:.2f}", mark]), value=repr(share), class_="number published") for share in shares]


def model(card: Card) -> Html:
    """The head of a model's row: its name, which leads to its card, and whether it is in doubt."""
    name = tag("a", card.name, href=f"#{fragment('model', card.name)}")
    doubt = [tag("span", "unreliable", class_="badge bad")] if card.status == "unreliable" else []
    return tag("th", join([name, *doubt], " "), scope="row", class_="model", data_value=card.name)


def words(card: Card, *more: str) -> str:
    """What the filter looks into."""
    return " ".join((card.name, card.defense, card.network, card.license, card.status, *more)).lower()


def board_id(board: Leaderboard) -> str:
    """The address of the boards of one data set and threat."""
    return fragment(board.dataset, str(board.threat))


def leaderboard(board: Leaderboard, *, first: bool) -> Html:
    """A board as a section; the ``first`` of a data set and threat carries their address."""
    sources = Sources()
    rows = [_row(entry, sources) for entry in board.entries]
    heads = tag(
        "tr",
        head("Rank", number=True, rows=2),
        head("Model", rows=2),
        head("Clean, %", number=True, rows=2),
        head("Certified, %", number=True, sort="descending", rows=2),
        tag("th", "Published, %", scope="colgroup", colspan=2, class_="number group"),
        head("Defense", rows=2),
        head("Network", rows=2),
        head("Proof", rows=2),
        head("Arithmetic", rows=2),
        head("Trained against", rows=2),
        head("Size", number=True, rows=2),
        head("Licence", rows=2),
    )
    about = f"{title(board.dataset)}, {board.split} split; {describe(board.threat)}. Ranked by certified accuracy."
    table = tag(
        "table",
        tag("caption", tag("span", about)),
        tag("thead", heads, tag("tr", head("clean", number=True, group=True), head("certified", number=True, group=True))),
        tag("tbody", *rows),
        class_="board",
    )
    name = join(
        [code(str(board.threat)), tag("span", board.guarantee, class_="badge", title=Guarantee(board.guarantee).phrase)], " "
    )
    return tag(
        "section",
        tag("h3", name),
        scrolling(table, f"Leaderboard of {board.threat}, {board.guarantee}"),
        sources.listed(),
        class_="threat",
        id=board_id(board) if first else None,
        data_dataset=fragment(board.dataset),
        data_threat=fragment(str(board.threat)),
        data_own="yes" if board.own else None,
    )


def _row(entry: Entry, sources: Sources) -> Html:
    card, result = entry.card, entry.result
    said = card.arithmetic(result)
    bytes_ = cell(file_size(card.size), value=card.size, class_="number") if card.size else cell(NOTHING, class_="number")
    rank = NOTHING if entry.rank is None else str(entry.rank)
    return tag(
        "tr",
        cell(rank, value=entry.rank, class_="number rank"),
        model(card),
        measured(result.clean, result.images),
        measured(result.certified, result.images, result.certified_interval),
        *published(entry.paper, sources),
        cell(card.defense, value=card.defense),
        cell(card.network, value=card.network, class_="network"),
        cell(result.method, value=result.method),
        tag("td", str(said), title=said.meaning, data_value=str(said)),
        cell(code(own(card)), value=own(card)),
        bytes_,
        cell(card.license, value=card.license),
        data_words=words(card, result.method, str(said), own(card)),
        data_status=card.status,
    )


def unmeasured(cards: Sequence[Card]) -> Html:
    """Recipes without weights, and models without a test measurement, in a table each; nothing if there are none."""
    recipes = [card for card in cards if card.status == "recipe only"]
    public = [card for card in cards if card.public]
    waiting = [card for card in cards if card not in (*recipes, *public) and not card.results]
    parts = []
    if recipes:
        intro = "Recipes that nobody has run here: there are no weights, and nothing is claimed for them."
        parts.append(_waiting("recipes/", "Recipes only", intro, recipes))
    if public:
        intro = "Classifiers of others, whose weights are public, with a defense around them; not measured on a test split."
        parts.append(_waiting("public/", "Public weights", intro, public))
    if waiting:
        intro = "Trained, but not measured on test images yet."
        parts.append(_waiting("waiting/", "Not measured yet", intro, waiting))
    return join(parts)


def _waiting(id_: str, name: str, intro: str, cards: Sequence[Card]) -> Html:
    sources = Sources()
    rows = [
        tag(
            "tr",
            model(card),
            cell(title(card.dataset), value=card.dataset),
            cell(code(own(card)), value=own(card)),
            *published(card.report() if card.guarantee == "recovery" else None, sources),
            cell(card.defense, value=card.defense),
            cell(card.network, value=card.network, class_="network"),
            data_words=words(card, own(card)),
            data_dataset=fragment(card.dataset),
            data_status=card.status,
        )
        for card in cards
    ]
    heads = tag(
        "tr",
        head("Model", rows=2),
        head("Data set", rows=2),
        head({"recipes/": "To be trained against", "public/": "Made for"}.get(id_, "Trained against"), rows=2),
        tag("th", "Published, %", scope="colgroup", colspan=2, class_="number group"),
        head("Defense", rows=2),
        head("Network", rows=2),
    )
    second = tag("tr", head("clean", number=True, group=True), head("certified", number=True, group=True))
    table = tag("table", tag("caption", tag("span", intro)), tag("thead", heads, second), tag("tbody", *rows), class_="board")
    commands = [
        tag(
            "div",
            tag("p", "Measure " if card.public else "Train ", tag("b", card.name), ":"),
            block(card.command),
            class_="how",
            data_words=words(card, own(card)),
            data_dataset=fragment(card.dataset),
        )
        for card in cards
        if card.status in ("recipe only", "public weights")
    ]
    shown = scrolling(table, name)
    return tag("section", tag("h2", name), shown, sources.listed(), *commands, class_="unmeasured", id=id_)
