"""The zoo as a web page: who stands where, which numbers occur, and that a card cannot bring anything but text."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from refusals import check_refused
from site_cards import HOSTILE, PAPER, card, recipe, result, sweep, zoo

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards import Card, Hub, Published
from patchcert_cli.catalog import bundled
from patchcert_cli.cli import main
from patchcert_cli.reporting import site
from patchcert_cli.reporting.site import page as site_page
from patchcert_cli.reporting.site.charts import charts
from patchcert_cli.reporting.site.leaderboards import Leaderboard, covers, describe, leaderboards
from patchcert_cli.reporting.site.page import fragment, letters, prose
from patchcert_cli.threats import parse_threat


def parsed(page: str) -> ET.Element:
    """The page as a tree; read as XML, so that an element that is not closed is an error."""
    assert page.startswith("<!DOCTYPE html>\n")
    bare = re.sub(r"<(style|script)>.*?</\1>", "", page.removeprefix("<!DOCTYPE html>\n"), flags=re.DOTALL)
    return ET.fromstring(re.sub(r"<((?:meta|input)\b[^>]*)>", r"<\1/>", bare))


def having(tree: ET.Element, name: str, class_: str) -> Iterator[ET.Element]:
    yield from (one for one in tree.iter(name) if class_ in one.get("class", "").split())


def text(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def rows(table: ET.Element) -> list[list[str]]:
    """The texts of the cells of the body."""
    return [[text(cell) for cell in row] for row in table.findall("tbody/tr")]


def shown_boards(tree: ET.Element) -> dict[tuple[str, ...], list[list[str]]]:
    """Rows by threat and guarantee of every section, in the order of the page."""
    return {
        (section.attrib["data-dataset"], *text(section.find("h3")).split()): rows(section.find(".//table"))  # type: ignore[arg-type]
        for section in having(tree, "section", "threat")
    }


@pytest.fixture(scope="module")
def tree() -> ET.Element:
    return parsed(site.render(zoo()))


def test_models_are_ranked_by_certified_accuracy_and_the_best_proof_counts(tree: ET.Element) -> None:
    table = shown_boards(tree)["mnist", "patch:3x3", "recovery"]
    assert [(row[0], row[1], row[3]) for row in table] == [
        ("1", "bounds", "70.00 700/1000 68.77 to 71.23"),
        ("2", "votes-a", "66.00 660/1000 64.77 to 67.23"),
        ("3", "votes-b", "60.00 600/1000 58.77 to 61.23"),
        ("4", "pixels-10", "41.00 410/1000 39.77 to 42.23"),
        ("\N{EN DASH}", "doubtful unreliable", "94.90 949/1000 93.67 to 96.13"),
    ]
    assert table[0][4:] == [
        "90.00a",
        "71.00a",
        "ibp",
        "MLP 784-255-10",
        "additive",
        "bounded",
        "patch:3x3",
        "811.3 kB",
        "apache-2.0",
    ]
    assert table[3][8] == "additive, proven for sparse:10"
    assert table[1][4:6] == ["\N{EN DASH}", "\N{EN DASH}"]
    shown = next(one for one in having(tree, "details", "card") if one.get("id") == "model/bounds")
    proofs = rows(next(having(shown, "table", "results")))
    assert [(row[2], row[3], row[5][:5]) for row in proofs] == [
        ("additive", "bounded", "70.00"),
        ("3.1", "bounded", "64.00"),
        ("3.2", "bounded", "60.00"),
    ]
    assert all(one.meaning in "".join(tree.itertext()) for one in Arithmetic)


def test_equal_accuracies_share_a_rank_whatever_their_counts() -> None:
    models = [card("c", [result(3, 500)]), card("a", [result(3, 50, images=100, clean=95)]), card("b", [result(3, 499)])]
    models += [card("d", [result(3, 500, clean=960)])]
    (board,) = leaderboards(models)
    assert [(entry.rank, entry.card.name) for entry in board.entries] == [(1, "d"), (1, "a"), (1, "c"), (4, "b")]


def test_what_holds_for_a_stronger_threat_is_ranked_but_no_point_of_a_chart() -> None:
    models = [
        card("a", [result(3, 500), result(4, 300)]),
        card("b", [result(4, 600), result(5, 550)]),
        card("c", [result(2, 900)]),
    ]
    boards = {str(board.threat): board for board in leaderboards(models)}
    shown = [(entry.rank, entry.card.name, str(entry.result.threat)) for entry in boards["patch:3x3"].entries]
    assert shown == [(1, "b", "patch:4x4"), (2, "a", "patch:3x3")]
    assert [entry.card.name for entry in boards["patch:4x4"].entries] == ["b", "a"]
    assert [entry.card.name for entry in boards["patch:2x2"].entries] == ["c"], "no model here was trained against 2x2"
    (chart,) = charts(boards.values())
    assert {line.card.name: [strength for strength, _ in line.points] for line in chart.lines} == {
        "a": [3, 4],
        "b": [4, 5],
        "c": [2],
    }


def test_there_is_a_table_for_every_data_set_split_threat_and_guarantee() -> None:
    models = [
        card(
            "a",
            [
                result(3, 500),
                result(3, 400, split="train"),
                result(3, 300, dataset="cifar10"),
                result("patch:3", 600, method="x"),
            ],
        ),
        card(
            "b",
            [result(3, 500, guarantee="detection"), result("patch:3x4", 10), result("sparse:3:value", 9), result("patch:2%", 8)],
        ),
    ]
    found = [(one.dataset, one.split, str(one.threat), one.guarantee, len(one.entries)) for one in leaderboards(models)]
    assert found == [
        ("cifar10", "test", "patch:3x3", "recovery", 1),
        ("mnist", "test", "patch:3x3", "recovery", 2),  # what b has for 3x4 holds for 3x3
        ("mnist", "test", "patch:3x3", "detection", 1),
        ("mnist", "train", "patch:3x3", "recovery", 1),
        ("mnist", "test", "patch:3x4", "recovery", 1),
        ("mnist", "test", "patch:2%", "recovery", 1),
        ("mnist", "test", "sparse:3:value", "recovery", 1),
    ]


def test_recovery_and_detection_never_share_a_table_or_a_chart(tree: ET.Element) -> None:
    tables = shown_boards(tree)
    assert [row[1] for row in tables["mnist", "patch:3x3", "detection"]] == ["alarm"]
    assert all("alarm" not in str(table) for key, table in tables.items() if key[2] == "recovery")
    both = card("both", [result(3, 500), result(3, 600, guarantee="detection"), result(4, 400)])
    shown = parsed(site.render([both]))
    assert [rows(table)[0][5][:5] for table in having(shown, "table", "results")] == ["50.00", "60.00"]
    for chart in charts(leaderboards([*zoo(), both])):
        points = [entry for line in chart.lines for _, entry in line.points]
        assert {entry.result.guarantee for entry in points} == {chart.guarantee}


def test_a_published_number_stands_beside_one_guarantee_or_none() -> None:
    paper = (Published(parse_threat("patch:3x3"), 0.9, 0.8, PAPER),)
    both = card("both", [result(3, 500), result(3, 600, guarantee="detection")], published=paper)
    assert [entry.paper for board in leaderboards([both]) for entry in board.entries] == [None, None]
    other = card("other", [result(3, 500), result(3, 600, dataset="cifar10")], published=paper)
    assert [(one.dataset, one.entries[0].paper) for one in leaderboards([other])] == [
        ("cifar10", None),
        ("mnist", paper[0]),
    ]


def test_the_threats_that_a_model_was_trained_against_are_shown_first() -> None:
    def first(found: list[Leaderboard]) -> list[tuple[str, str]]:
        return [(board.dataset, str(board.threat)) for board in found if board.own]

    assert first(leaderboards(zoo())) == [
        ("cifar10", "patch:2x2"),
        ("mnist", "patch:3x3"),
        ("mnist", "patch:3x3"),
        ("mnist", "sparse:4"),
        ("mnist", "sparse:10"),
    ]
    away = [
        sweep("a", 900, 100, (1, 2), threat=parse_threat("patch:9")),
        sweep("b", 900, 100, (2, 5), threat=parse_threat("patch:9")),
    ]
    assert first(leaderboards(away)) == [("mnist", "patch:2x2")]


def test_every_measured_number_of_the_bundled_cards_is_there_and_no_other() -> None:
    names = bundled.names()
    assert len(names) >= 9
    page = parsed(site.render(bundled.cards().values()))
    for parent in [*page.iter()]:
        for child in [*parent]:
            if child.tag == "pre" or "notes" in child.get("class", ""):
                parent.remove(child)
    said, allowed = text(page), set()
    for name in names:
        raw = yaml.safe_load((bundled.folder() / name / "README.md").read_text().split("---\n")[1])["patchcert"]
        for one in [*raw["results"], *raw.get("samples", []), *([raw["validation"]] if raw["validation"] else [])]:
            for count in (one["clean"], one["certified"]):
                assert f"{count}/{one['images']}" in said
            allowed |= {f"{100 * one[key] / one['images']:.2f}" for key in ("clean", "certified")}
            allowed |= {f"{100 * end:.2f}" for end in one.get("certified_interval", ())}
        allowed |= {f"{100 * one[key]:.2f}" for one in raw["published"] for key in ("clean", "certified")}
        for free in (raw["network"], raw["source"], (raw["trained"] or {}).get("torch")):
            said = said.replace(free or "\0", "")
    assert set(re.findall(r"(?<![\d.])\d+\.\d\d(?!\d)", said)) == allowed


def test_a_recipe_shows_what_the_paper_says_and_how_to_train_but_nothing_measured(tree: ET.Element) -> None:
    section = next(one for one in tree.iter("section") if one.get("id") == "recipes/")
    table = section.find(".//table")
    assert table is not None
    assert rows(table) == [
        ["large-recipe", "MNIST", "patch:3x3", "86.42a", "59.31a", "ibp", "MLP 784-255-10"],
    ]
    assert "Published numbers belong to the weights of the paper, not to these:" in text(section)
    assert f"a {PAPER}" in text(section) and text(section).endswith("patchcert train --threat patch --patch 3 --seed 3")
    shown = next(one for one in having(tree, "details", "card") if one.get("id") == "model/large-recipe")
    for part in (section, shown):
        assert not [*having(part, "td", "measured")] and "/1000" not in text(part)
    assert "patchcert certify large-recipe" not in text(tree) and "recipe only" in text(shown)
    assert all("large-recipe" not in str(table) for table in shown_boards(tree).values())
    waiting = next(one for one in tree.iter("section") if one.get("id") == "waiting/").find(".//table")
    assert waiting is not None and [row[0] for row in rows(waiting)] == ["waiting"]


def test_a_card_section_tells_all_that_the_card_says(tree: ET.Element) -> None:
    shown = text(next(one for one in having(tree, "details", "card") if one.get("id") == "model/bounds"))
    one = next(each for each in zoo() if each.name == "bounds")
    assert one.trained is not None
    for part in (
        *(one.defense, one.network, one.source, one.license, one.split, one.command, one.hub.repo, one.hub.revision),
        *("seed 3", "patchcert certify bounds --patch 3", "hidden: [255]", "learning_rate: 1.0e-05", "See votes-a."),
        *("2026-01-31, 12.5 s on cpu with 1 threads", "torch 2.6.0, patchcert 0.1.0", "clean 94.22 % (4711/5000)"),
        *("certified 62.26 % (3113/5000)", "patch:7x7: clean 88.00 %, certified 12.34 %; another paper", "811316", "a" * 64),
        *("Measured with patchcert 0.1.0: patchcert certify NAME", "2026-02-01"),
    ):
        assert str(part) in shown, part
    address = "https://huggingface.co/patchcert/bounds/tree/0123456789abcdef0123456789abcdef01234567"
    assert [link.get("href") for link in tree.iter("a") if "bounds/tree" in link.get("href", "")] == [address]
    other = text(next(each for each in having(tree, "details", "card") if each.get("id") == "model/pixels-4"))
    assert "not published yet (patchcert/pixels-4)" in other and "patchcert certify pixels-4 --threat sparse --k 4" in other
    doubtful = text(next(each for each in having(tree, "details", "card") if each.get("id") == "model/doubtful"))
    assert doubtful.startswith("doubtful unreliable") and "an attack flipped a certified image" in doubtful


def test_every_link_inside_the_page_arrives_and_ids_are_unique(tree: ET.Element) -> None:
    ids = [one.attrib["id"] for one in tree.iter() if "id" in one.attrib]
    assert len(ids) == len(set(ids)) and {"cifar10", "mnist/patch:3x3", "mnist/sparse:10", "model/votes-a"} <= set(ids)
    inside = [link.attrib["href"] for link in tree.iter("a") if link.attrib["href"].startswith("#")]
    assert len(inside) > 20 and {address[1:] for address in inside} <= set(ids)


def test_tables_and_controls_are_named(tree: ET.Element) -> None:
    assert tree.get("lang") == "en" and text(tree.find("head/title")).startswith("patchcert zoo")  # type: ignore[arg-type]
    tables = [*tree.iter("table")]
    assert len(tables) > 20 and all(text(table.find("caption/span")) for table in tables)  # type: ignore[arg-type]
    assert all(head.get("scope") for head in tree.iter("th"))
    controls = [*tree.iter("select"), *tree.iter("input")]
    assert len(controls) == 3 and all(any(one in label for label in tree.iter("label")) for one in controls)
    assert all(drawing.get("aria-label") or drawing.get("aria-hidden") for drawing in tree.iter("svg"))


def hostile() -> Card:
    """Text that tries to get out of wherever it stands."""
    one = result(
        "patch:2%", 7, images=10, clean=8, dataset=HOSTILE, split=HOSTILE, method=HOSTILE, command=HOSTILE, patchcert=HOSTILE
    )
    found = card("hostile", [one, result(3, 5), result(4, 4)], defense=HOSTILE, network=HOSTILE, license=HOSTILE, command=HOSTILE)
    assert found.trained is not None
    return replace(
        found,
        dataset=HOSTILE,
        split=HOSTILE,
        source=HOSTILE,
        reason=HOSTILE,
        notes=f"`{HOSTILE}`",
        status="unreliable",
        recipe={HOSTILE: [HOSTILE]},
        hub=Hub('evil/"><script>', "javascript:alert(4)"),
        trained=replace(found.trained, device=HOSTILE, torch=HOSTILE),
        files={HOSTILE: found.files["config.json"]},
        published=(Published(parse_threat("patch:2%"), 0.9, 0.8, HOSTILE),),
    )


def test_nothing_on_a_card_can_become_markup() -> None:
    sober, page = site.render([hostile_free()]), site.render([hostile()])
    seen = parsed(page)
    for word in ("<script", "</script", "<style", "</style"):
        assert page.count(word) == sober.count(word) == 1
    assert {one.tag for one in seen.iter()} == {one.tag for one in parsed(sober).iter()}
    names = {name for one in seen.iter() for name in one.attrib}
    assert names == {name for one in parsed(sober).iter() for name in one.attrib}
    assert not [name for name in names if name.startswith("on") or name in ("src", "style", "srcdoc", "action")]
    links = {link.attrib["href"].partition("/")[0] for link in seen.iter("a")}
    assert links == {"#model", "https:"}
    assert "alert(1)" in text(seen) and not re.search("[\x00\u202e\ud800]", page)
    page.encode()


def hostile_free() -> Card:
    """The same card with harmless text."""
    plain = card("hostile", [result("patch:2%", 7, images=10, clean=8, dataset="a"), result(3, 5), result(4, 4)])
    paper = (Published(parse_threat("patch:2%"), 0.9, 0.8, PAPER),)
    hub = Hub("a/b", "c" * 40)
    return replace(plain, dataset="a", status="unreliable", reason="a", notes="`a`", published=paper, hub=hub)


@given(st.text(st.characters(exclude_characters="\t\n\r`")))  # XML reads the first three as blanks
def test_text_stays_text(text: str) -> None:
    shown = site_page.UNSHOWABLE.sub("\ufffd", text)
    read = ET.fromstring(f"<p>{prose(text)}</p>")
    assert (read.text or "") == shown and len(read) == 0
    assert re.fullmatch(r"[\w.~:%-]*", fragment(text), re.ASCII)


def test_text_between_backticks_is_code() -> None:
    read = ET.fromstring(f"<p>{prose('see `a<b>` & `c`')}</p>")
    assert [code.text for code in read] == ["a<b>", "c"] and "".join(read.itertext()) == "see a<b> & c"


def test_equal_cards_give_equal_bytes_in_any_order_and_the_date_is_the_newest_measurements() -> None:
    page = site.render(zoo(), version="9.9")
    assert page == site.render(reversed(zoo()), version="9.9")
    (about,) = (text(one) for one in having(parsed(page), "p", "meta"))
    assert all(part in about for part in ("patchcert 9.9", "8 of 10 models measured", "2026-02-01"))
    later = [*zoo(), card("later", [result(3, 1, date="2031-12-30")])]
    assert "newest measurement 2031-12-30" in site.render(later)
    assert "no measurement yet" in site.render([recipe("only")])


def test_the_page_loads_nothing_and_allows_only_its_own_style_and_script() -> None:
    page = site.render(zoo())
    assert not re.search(r"\ssrc\s*=|<link|<base|<img|<iframe|<object|@import|url\(|\sstyle=|\son\w+=", page)
    assert set(re.findall(r"https?://[^/\"]*", page)) == {"https://huggingface.co"}
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    wanted = ["default-src 'none'"]
    for name in ("style", "script"):
        (inside,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        wanted.append(f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'")
    assert html.unescape(policy).split("; ") == [*wanted, "base-uri 'none'", "form-action 'none'"]


def marks(drawing: ET.Element, name: str) -> list[ET.Element]:
    line = next(one for one in having(drawing, "g", "model") if one.get("data-name") == name)
    return [*line.iter("use")]


def test_charts_show_what_was_measured(tree: ET.Element) -> None:
    found = charts(leaderboards(zoo()))
    shown = [(one.dataset, one.axis, one.guarantee, [line.card.name for line in one.lines], one.doubtful) for one in found]
    assert shown == [
        ("cifar10", "side", "recovery", ["photos"], ()),
        ("mnist", "side", "recovery", ["bounds", "votes-a", "votes-b"], ("doubtful",)),
        ("mnist", "side", "detection", ["alarm"], ()),
        ("mnist", "pixel", "recovery", ["pixels-10", "pixels-4"], ()),
    ]
    drawing = [*having(tree, "figure", "curve")][1]
    tooltip = text(marks(drawing, "votes-b")[0].find("title"))  # type: ignore[arg-type]
    for part in ("votes-b, patch:1x1", "90.00 % (900/1000)", "88.77 to 91.23 %", "95.00 % (950/1000)", "additive"):
        assert part in tooltip
    places = [(float(one.attrib["x"]), float(one.attrib["y"])) for one in marks(drawing, "votes-b")]
    (left, top), (right, bottom) = places[0], places[-1]
    for i, (x, y) in enumerate(places):  # six sides, and 15 points of accuracy less for each
        assert (x, y) == (pytest.approx(left + (right - left) * i / 5), pytest.approx(top + (bottom - top) * i / 5))
    assert left < right and top < bottom
    legend = [text(one.find("a")) for one in next(having(drawing, "ul", "legend"))]  # type: ignore[arg-type]
    assert legend == ["bounds", "votes-a", "votes-b"] and "doubtful" in text(drawing)


def test_a_model_has_one_look_in_all_charts_and_legends(tree: ET.Element) -> None:
    looks: dict[str, set[tuple[str, str]]] = {}
    for item in (item for legend in having(tree, "ul", "legend") for item in legend):
        looks.setdefault(text(item.find("a")), set()).add((item[0].attrib["class"], text(item[0])))  # type: ignore[arg-type]
    assert all(len(found) == 1 for found in looks.values())
    for line in having(tree, "g", "model"):
        ((look, _),) = looks[line.attrib["data-name"]]
        assert {mark.attrib["fill"] for mark in line.iter("use")} == {f"var(--{look.split()[-1]})"}


def test_drawings_take_their_colours_from_the_page_and_need_no_inline_style(tree: ET.Element) -> None:
    drawings = [one for plot in having(tree, "div", "plot") for one in plot.iter()]
    colors = {one.attrib[name] for one in drawings for name in ("fill", "stroke") if name in one.attrib}
    assert len(colors) > 5 and all(color == "none" or color.startswith("var(--") for color in colors)
    assert not any("style" in one.attrib or "clip-path" in one.attrib for one in drawings)
    assert {"certified accuracy, %", "side of a square patch, pixels"} <= {text(one) for one in drawings if one.tag == "text"}


def test_one_point_is_no_chart_and_odd_shapes_are_on_no_axis() -> None:
    assert charts(leaderboards([card("a", [result(3, 5), result("patch:2x9", 5), result("patch:2%", 5)])])) == []
    units = [card("a", [result(f"sparse:{k}:{unit}", 5) for k in (1, 2) for unit in ("pixel", "value")])]
    found = charts(leaderboards(units))
    assert [(one.axis, [place for place, _ in one.lines[0].points]) for one in found] == [("pixel", [1, 2]), ("value", [1, 2])]


def test_thirty_six_models_can_be_distinguished() -> None:
    (chart,) = charts(leaderboards([sweep(f"model-{i:02}", 900 - i, 100) for i in range(36)]))
    assert len({(line.look.color, line.look.marker) for line in chart.lines}) == 36 and not chart.shows_clean


def test_words_for_threats_and_letters_for_sources() -> None:
    assert describe(parse_threat("patch:3x7")) == "one patch of 3x7 pixels, anywhere in the image"
    assert describe(parse_threat("patch:2.5%")) == "one square patch of 2.5 % of the image, anywhere in it"
    assert describe(parse_threat("sparse:4")) == "any 4 pixels"
    assert describe(parse_threat("sparse:4:value")) == "any 4 single channel values"
    assert [letters(i) for i in (0, 25, 26, 701, 702)] == ["a", "z", "aa", "zz", "aaa"]


MAKE_ZOO = Path(__file__).parents[2] / "docs" / "make_zoo.py"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def patchcert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """The command line, with a zoo of its own."""
    monkeypatch.setattr(bundled, "cards", lambda dataset=None: {one.name: one for one in zoo()})

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["patchcert", *words])
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def test_the_command_writes_one_file_and_says_which(patchcert: Call) -> None:
    assert patchcert("report", "zoo") == (0, "site/index.html\n", "")
    assert patchcert("report", "zoo", "--out", "deep/er") == (0, "deep/er/index.html\n", "")
    assert [path.name for path in Path("deep/er").iterdir()] == ["index.html"]
    written = Path("site/index.html").read_bytes()
    assert written == Path("deep/er/index.html").read_bytes() == site.render(zoo()).encode()
    Path("site/index.html").write_bytes(written[:-100])
    assert patchcert("report", "zoo")[0] == 0 and Path("site/index.html").read_bytes() == written


def test_what_is_not_ours_is_kept(patchcert: Call) -> None:
    Path("plain").write_text("mine")
    below = f"--out 'plain/deeper': '{Path('plain').resolve()}' is a file."
    for out, said in (("plain", "--out 'plain' is a file."), ("plain/deeper", below)):
        code, printed, err = patchcert("report", "zoo", "--out", out)
        assert (code, printed) == (2, "")
        check_refused(err, 2, said)
    Path("site").mkdir()
    Path("site/index.html").write_text("<h1>mine</h1>")
    code, out, err = patchcert("report", "zoo")
    assert (code, out) == (2, "")
    check_refused(err, 2, "was not written by this command", "--out", "--force")
    assert Path("plain").read_text() == "mine" and Path("site/index.html").read_text() == "<h1>mine</h1>"
    assert patchcert("report", "zoo", "--force")[0] == 0
    Path("other/index.html").mkdir(parents=True)
    assert patchcert("report", "zoo", "--out", "other", "--force")[0] == 2


def test_a_disk_that_takes_nothing_is_the_machines_fault(patchcert: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = patchcert("report", "zoo", "--out", "/proc/nowhere/site")
    assert (code, out) == (7, "") and err.startswith("error[7]: --out '/proc/nowhere/site': nothing can be")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = patchcert("report", "zoo")
    assert (code, out) == (7, "") and "No space left on device" in err and [*Path("site").iterdir()] == []


def test_a_data_set_without_models_is_refused(patchcert: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "cards", lambda dataset=None: {})
    code, out, err = patchcert("report", "zoo", "--dataset", "mnist")
    assert (code, out) == (2, "")
    check_refused(err, 2, "no model to report on", "patchcert zoo list")
    monkeypatch.undo()


def test_the_command_needs_neither_torch_nor_a_network(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['patchcert', 'report', 'zoo', '--dataset', 'mnist']\n"
        "from patchcert_cli.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print({'torch', 'huggingface_hub', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path, loaded = done.stdout.splitlines()
    assert loaded == "set()"
    page = (tmp_path / path).read_text()
    assert "model/mnist-ibp-p5" in page and "CIFAR-10" not in page


def test_without_matplotlib_there_is_no_page_rather_than_one_without_charts(
    patchcert: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = patchcert("report", "zoo")
    assert (code, out) == (7, "") and not Path("site/index.html").exists()
    check_refused(err, 7, "matplotlib", "pip install 'patchcert[plots]'")


def test_the_readme_and_its_plots_show_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(MAKE_ZOO), "--check"])
    assert runpy.run_path(str(MAKE_ZOO))["main"]() == 0


def test_the_plot_by_threat_shows_the_best_of_the_cards_beside_numbers_that_stand_on_cards() -> None:
    made = runpy.run_path(str(MAKE_ZOO))
    rows, cards = made["field"](), bundled.cards().values()
    assert [(row.dataset, str(row.threat)) for row in rows] == [
        *((data, threat) for data in ("mnist", "cifar10") for threat in ("patch:2x2", "patch:5x5", "sparse:4", "sparse:10")),
        ("imagenet", "patch:2%"),
    ]
    papers = {(card.dataset, paper.clean, paper.certified) for card in cards for paper in card.published}
    for row in rows:
        one = row.published
        known = (row.dataset, one["clean"], one["certified"]) in papers
        assert known or not one.get("checked", True) or row.dataset == "imagenet"
        own = [
            result.certified
            for card in cards
            for result in card.results
            if (result.dataset, result.threat, result.guarantee) == (row.dataset, row.threat, "recovery")
        ]
        if row.found is None:
            assert not own and row.missing.startswith("not measured")
        else:
            assert row.found.images == 10_000 and row.found.certified >= max(own) and row.found in row.card.results
            assert (row.found.threat == row.threat) == ("proven for" not in row.remark)
    assert any(row.remark == "proven for patch:5x5" for row in rows)
    (away,) = [row for row in rows if row.dataset == "imagenet"]
    assert away.missing == "not measured on the test split; 21.33 % of a sample (n = 150)"


def test_a_threat_covers_another_if_it_allows_all_its_changes() -> None:
    names = ["patch:1x1", "patch:2x2", "patch:2x3", "patch:3x2", "patch:2%", "sparse:1", "sparse:4", "sparse:4:value"]
    found = {name: parse_threat(name) for name in [*names, "sparse:12:value", "patches:2:1x1"]}
    random = torch.Generator().manual_seed(0)
    for weak_name, weak in found.items():
        changed = torch.zeros(60, 3, 6, 6, dtype=torch.bool)
        for image in changed:
            for _ in range(int(torch.randint(1, 4, (), generator=random))):
                top, left, high, wide = torch.randint(1, 4, (4,), generator=random).tolist()
                image[:, top : top + high, left : left + wide] = torch.rand(3, high, wide, generator=random).ge(0.3)[
                    :, : 6 - top, : 6 - left
                ]
        allowed = changed[weak.contains(changed)]
        assert covers(weak, weak)
        for strong_name, strong in found.items():
            if covers(strong, weak):
                assert bool(strong.contains(allowed).all()), (strong_name, weak_name)
    pairs = {(strong, weak) for strong in found for weak in found if strong != weak and covers(found[strong], found[weak])}
    assert {("patch:2x3", "patch:2x2"), ("sparse:4", "patch:2x2"), ("sparse:4", "sparse:4:value")} <= pairs
    assert not {("patch:2x2", "patch:2x3"), ("sparse:4:value", "sparse:4"), ("sparse:1", "patch:2x2")} & pairs
