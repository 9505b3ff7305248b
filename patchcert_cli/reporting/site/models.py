"""A section for each model: everything that its card says."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import yaml

from patchcert_cli.cards import Card, Measured
from patchcert_cli.reporting.site.leaderboards import difficulty, own, paper_for
from patchcert_cli.reporting.site.markup import Html, block, code, facts, fragment, join, percent, prose, scrolling, tag
from patchcert_cli.reporting.site.tables import PAPERS, Sources, head, measured, published, title
from patchcert_cli.reporting.site.tables import words as searched
from patchcert_cli.storage.files import file_size
from patchcert_cli.threats import Guarantee, as_options, parse_threat

HUB = "https://huggingface.co/"


def section(card: Card) -> Html:
    """A model's card, folded; its summary names it."""
    short = f"{card.defense} · {title(card.dataset)} · trained against {own(card)}"
    if card.public or card.status == "recipe only":
        short = f"{card.defense} · {title(card.dataset)} · for {own(card)}"
    summary = tag(
        "summary",
        tag("h3", card.name),
        badge(card),
        tag("span", short, class_="short"),
    )
    parts = [
        tag("p", prose(card.reason), class_="reason") if card.reason else "",
        tag("p", prose(card.notes), class_="notes") if card.notes else "",
        _facts(card),
        *_measurements(card),
        *_samples(card),
        _published(card),
        *_commands(card),
        _provenance(card),
        _files(card),
    ]
    return tag(
        "details",
        summary,
        tag("div", *parts, class_="body"),
        id=fragment("model", card.name),
        class_="card",
        data_dataset=fragment(card.dataset),
        data_words=searched(card, own(card), title(card.dataset)),
        data_status=card.status,
    )


def badge(card: Card) -> Html:
    """A model's status."""
    kind = {"measured": "good", "unreliable": "bad"}.get(card.status, "plain")
    return tag("span", card.status, class_=f"badge {kind}")


def hub_link(card: Card) -> Html:
    """The Hub repository at its pinned commit, or that there is none yet."""
    if not card.hub.revision:
        return join(["not published yet (", code(card.hub.repo), ")"])
    address = f"{HUB}{quote(card.hub.repo)}/tree/{quote(card.hub.revision)}"
    return join([tag("a", card.hub.repo, href=address, rel="noreferrer"), " at ", code(card.hub.revision)])


def certify_command(card: Card) -> str:
    """What measures the model under the threat that it was trained against."""
    return f"patchcert certify {card.name} {as_options(parse_threat(card.threat))}"


def _facts(card: Card) -> Html:
    weights = file_size(card.size) if card.size else "none yet"
    return facts(
        [
            ("Defense", card.defense),
            ("Source", card.source),
            ("Network", card.network),
            ("Data set", title(card.dataset)),
            ("Made for" if card.public else "Trained against" if card.trained else "To be trained against", code(own(card))),
            ("Training images", join([code(card.split), f", seed {card.seed}"])),
            ("Weights", weights),
            *([("Origin", prose(card.origin))] if card.origin else []),
            ("Licence", card.license),
            ("Hub", hub_link(card)),
        ]
    )


def _measurements(card: Card) -> Iterator[Html]:
    """A table for each guarantee: they promise different things."""
    for guarantee in Guarantee:
        results = [one for one in card.results if one.guarantee == guarantee]
        if results:
            results.sort(key=lambda one: (one.dataset, difficulty(parse_threat(one.threat)), one.split, -one.certified))
            yield _measured(card, guarantee, results)


def _samples(card: Card) -> Iterator[Html]:
    """What was measured on pictures that are no test split; each row says how many and where they come from."""
    if not card.samples:
        return
    rows = [
        tag(
            "tr",
            tag("th", prose(one.pictures), scope="row"),
            tag("td", str(one.images)),
            tag("td", code(one.threat), f", {one.guarantee} ({one.method}{', ' + one.masks if one.masks else ''})"),
            *(tag("td", f"{percent(count, one.images)} % ({count}/{one.images})") for count in (one.clean, one.certified)),
            tag("td", " to ".join(f"{100 * end:.2f}" for end in one.certified_interval) + " %"),
            tag("td", one.arithmetic),
        )
        for one in card.samples
    ]
    names = ("pictures", "n", "threat", "clean", "certified", "95 % interval", "arithmetic")
    heads = tag("tr", *(tag("th", name, scope="col") for name in names))
    said = tag("span", f"On other pictures: no figures for the test split of {title(card.dataset)}, and on no board.")
    yield scrolling(
        tag("table", tag("caption", said), tag("thead", heads), tag("tbody", *rows)), f"{card.name} on other pictures"
    )


def _measured(card: Card, guarantee: Guarantee, results: list[Measured]) -> Html:
    sources = Sources()
    rows = [
        tag(
            "tr",
            tag("th", code(str(parse_threat(one.threat))), scope="row"),
            tag("td", f"{title(one.dataset)}, {one.split}"),
            tag("td", one.method),
            tag("td", str(card.arithmetic(one)), title=card.arithmetic(one).meaning),
            measured(one.clean, one.images),
            measured(one.certified, one.images, one.certified_interval),
            *published(paper_for(card, one), sources),
            tag("td", one.date),
        )
        for one in results
    ]
    heads = [head(name) for name in ("Threat", "Data", "Proof", "Arithmetic")]
    heads += [head(f"{name}, %", number=True) for name in ("Clean", "Certified", "Published clean", "Published certified")]
    heads.append(head("Measured"))
    about = f"{card.name}, guarantee {guarantee}: {guarantee.phrase}. Certified accuracy with its exact 95 % interval."
    table = tag(
        "table", tag("caption", tag("span", about)), tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="results"
    )
    made = {
        one.patchcert: list(dict.fromkeys(each.command for each in results if each.patchcert == one.patchcert)) for one in results
    }
    how = [join([tag("p", f"Measured with patchcert {version}:"), block("\n".join(lines))]) for version, lines in made.items()]
    return join(
        [
            tag("h4", f"Measured: {guarantee}"),
            scrolling(table, f"Measurements of {card.name}, {guarantee}"),
            sources.listed(),
            *how,
        ]
    )


def _published(card: Card) -> Html:
    """All that the papers report, measured here or not."""
    if not card.published:
        return Html()
    items = [
        tag(
            "li",
            code(str(parse_threat(one.threat))),
            ": clean ",
            tag("span", f"{100 * one.clean:.2f} %", class_="published"),
            ", certified ",
            tag("span", f"{100 * one.certified:.2f} %", class_="published"),
            f"; {one.source}",
        )
        for one in card.published
    ]
    return join([tag("h4", "Published"), tag("p", PAPERS), tag("ul", *items)])


def _commands(card: Card) -> Iterator[Html]:
    yield join([tag("h4", "Measure" if card.public else "Train"), block(card.command)])
    if card.files:
        yield join([tag("h4", "Certify"), block(certify_command(card))])
    recipe = yaml.safe_dump(
        card.to_dict()["recipe"], sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    ).rstrip()
    yield join([tag("h4", "Recipe"), block(recipe)])


def _provenance(card: Card) -> Html:
    rows: list[tuple[str, str]] = []
    if card.trained:
        made = card.trained
        rows += [
            ("Trained", f"{made.date}, {made.seconds:g} s on {made.device} with {made.threads} threads"),
            ("Made with", f"torch {made.torch}, patchcert {made.patchcert}"),
        ]
    if card.validation:
        held = card.validation
        shares = [f"{percent(count, held.images)} % ({count}/{held.images})" for count in (held.clean, held.certified)]
        rows.append(("Held-out training images", f"clean {shares[0]}, certified {shares[1]}"))
    return join([tag("h4", "Provenance"), facts(rows)]) if rows else Html()


def _files(card: Card) -> Html:
    if not card.files:
        return Html()
    rows = [
        tag(
            "tr",
            tag("th", code(name), scope="row"),
            tag("td", str(file.size), class_="number"),
            tag("td", tag("code", file.sha256, class_="hash")),
        )
        for name, file in card.files.items()
    ]
    heads = tag("tr", head("File"), head("Bytes", number=True), head("sha256"))
    caption = tag("caption", tag("span", f"Files of {card.name}"))
    table = tag("table", caption, tag("thead", heads), tag("tbody", *rows), class_="files")
    return join([tag("h4", "Files"), scrolling(table, f"Files of {card.name}")])
