"""The web page in a real browser: sorting, filtering, addresses, curves, colours, and that it asks for nothing."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reporting.test_runs_page import write_run
from reporting.test_site import hostile
from site_cards import HOSTILE, card, result, zoo

from e2e.browser.driver import Browser, missing
from patchcert_cli.catalog import bundled
from patchcert_cli.reporting import site
from patchcert_cli.reporting.site import runs, weakest

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "a browser is here")

PNG = (  # one white pixel
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="
)
ENTER = "\ue007"
TABLE = 'section[id="mnist/patch:3x3"]'
SHOWN = """
const visible = (each) => each.checkVisibility();
const texts = (what, from = document) => [...from.querySelectorAll(what)].filter(visible).map((each) => each.textContent.trim());
"""
CONTRAST = """
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (each) => {
  for (; each; each = each.parentElement) {
    const color = parts(getComputedStyle(each).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
  }
};
document.querySelectorAll("details").forEach((each) => { each.open = true; });
const low = [];
for (const each of document.querySelectorAll("body *")) {
  const written = [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!written || !each.checkVisibility() || each.closest("title, option")) continue;
  const style = getComputedStyle(each);
  const ink = parts(each.closest("svg") ? style.fill : style.color);
  const [a, b] = [light(ink), light(behind(each))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) low.push(each.tagName + " " + each.getAttribute("class") + " " + each.textContent);
}
return [...new Set(low)];
"""
OVERLAPS = """
const wrong = [];
for (const drawing of document.querySelectorAll(".plot svg")) {
  const frame = drawing.getBoundingClientRect();
  const boxes = [...drawing.querySelectorAll("text")].map((each) => [each.textContent, each.getBoundingClientRect()]);
  boxes.forEach(([name, box], i) => {
    if (box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom) wrong.push(name);
    for (const [other, its] of boxes.slice(i + 1)) {
      const apart = box.right <= its.left || its.right <= box.left || box.bottom <= its.top + 2 || its.bottom <= box.top + 2;
      if (!apart) wrong.push(name + " on " + other);
    }
  });
}
return wrong;
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return site.write(zoo(), tmp_path_factory.mktemp("page")).as_uri()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def browser(window: Browser, address: str) -> Iterator[Browser]:
    """The page as it is first seen, at 1280 pixels, in light; after the test the console must be empty."""
    window.resize(1280, 900)
    window.scheme("light")
    visit(window, address)
    yield window
    assert window.messages() == []


def visit(window: Browser, address: str) -> None:
    """Load a page anew, with empty logs."""
    window.open("about:blank")
    window.messages(), window.requests()
    window.open(address)


def names(browser: Browser, table: str = TABLE) -> list[str]:
    """The models of a table, as they stand."""
    return [str(name) for name in browser.run(f"{SHOWN} return texts(arguments[0]);", f"{table} tbody th a")]


def boards(browser: Browser) -> list[str]:
    """The leaderboards that are visible."""
    script = "return [...document.querySelectorAll('section.threat')].filter(visible)"
    found = browser.run(f"{SHOWN} {script}.map((each) => each.dataset.dataset + ' ' + texts('h3', each)[0]);")
    return [str(name) for name in found]


def column(number: int, row: int = 1) -> str:
    return f"{TABLE} thead tr:nth-child({row}) th:nth-child({number}) button"


def direction(browser: Browser) -> dict[str, str]:
    """The columns that say that they are sorted."""
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => [each.textContent, each.ariaSort]);"
    return dict(browser.run(script, f"{TABLE} th[aria-sort]"))


def test_the_first_view(browser: Browser, address: str) -> None:
    own = ["cifar10 patch:2x2 recovery", "mnist patch:3x3 recovery", "mnist patch:3x3 detection"]
    assert boards(browser) == [*own, "mnist sparse:4 recovery", "mnist sparse:10 recovery"]
    assert names(browser) == ["bounds", "votes-a", "votes-b", "doubtful"]
    assert direction(browser) == {"Certified, %": "descending"}
    assert browser.run("return document.querySelector('#status').textContent") == "8 models in these tables"
    assert browser.requests() == [address]


def test_a_click_sorts_and_another_turns_the_order(browser: Browser) -> None:
    browser.click(column(4))
    assert names(browser) == ["votes-b", "votes-a", "bounds", "doubtful"]
    assert direction(browser) == {"Certified, %": "ascending"}
    browser.click(column(4))
    assert names(browser) == ["doubtful", "bounds", "votes-a", "votes-b"]
    browser.click(column(2))
    assert names(browser) == ["bounds", "doubtful", "votes-a", "votes-b"] and direction(browser) == {"Model": "ascending"}


def test_the_keyboard_sorts_too(browser: Browser) -> None:
    browser.type(column(2), ENTER)
    assert names(browser) == ["bounds", "doubtful", "votes-a", "votes-b"]
    browser.type(column(2), " ")
    assert names(browser) == ["votes-b", "votes-a", "doubtful", "bounds"] and direction(browser) == {"Model": "descending"}


def test_missing_values_are_last_both_ways_and_equal_ones_keep_their_order(browser: Browser) -> None:
    for way in ("ascending", "descending"):
        browser.click(column(1))
        assert names(browser)[-1] == "doubtful" and direction(browser) == {"Rank": way}
    assert names(browser) == ["votes-b", "votes-a", "bounds", "doubtful"]
    for way in ("descending", "ascending"):
        browser.click(column(2, row=2))
        assert names(browser) == ["bounds", "votes-b", "votes-a", "doubtful"] and direction(browser) == {"certified": way}
    browser.click(column(6))
    assert names(browser) == ["votes-b", "bounds", "doubtful", "votes-a"]  # bagcert, ibp twice, smoothing
    browser.click(column(11))
    assert names(browser) == ["votes-a", "votes-b", "bounds", "doubtful"]  # 2 MB, and three times the same


def test_the_filter_leaves_what_it_names(browser: Browser) -> None:
    browser.type("#filter", "VOTES 64")
    assert names(browser) == ["votes-b"] and boards(browser) == ["mnist patch:3x3 recovery"]
    assert browser.run(f"{SHOWN} return texts('details.card h3');") == ["votes-b"]
    assert browser.run(f"{SHOWN} return texts('h2');") == ["MNIST", "Model cards"]
    browser.type("#filter", " nothing")
    assert boards(browser) == [] and browser.run("return document.querySelector('#status').textContent").startswith("No model")
    browser.run("const it = document.querySelector('#filter'); it.value = ''; it.dispatchEvent(new Event('input'));")
    assert len(boards(browser)) == 5


def test_selectors_and_addresses_say_the_same(browser: Browser, address: str) -> None:
    def chosen() -> tuple[str, ...]:
        parts = browser.run(
            "return [location.hash, ...['#dataset', '#threat'].map((each) => document.querySelector(each).value)]"
        )
        return tuple(parts)

    browser.click("#dataset option[value=mnist]")
    assert chosen() == ("#mnist", "mnist", "") and len(boards(browser)) == 4
    browser.click('#threat option[value="patch:4x4"]')
    assert chosen() == ("#mnist/patch:4x4", "mnist", "patch:4x4")
    assert boards(browser) == ["mnist patch:4x4 recovery", "mnist patch:4x4 detection"]
    assert len(browser.run(f"{SHOWN} return texts('figure.curve');")) == 2  # those about patches
    browser.click("#dataset option[value=cifar10]")  # it has no such table
    assert chosen() == ("#cifar10", "cifar10", "") and boards(browser) == ["cifar10 patch:2x2 recovery"]
    assert browser.run("return document.querySelector('#threat option[value=\"patch:4x4\"]').disabled")
    browser.click("#threat option[value=all]")
    assert chosen()[0] == "#cifar10/all" and len(boards(browser)) == 3
    visit(browser, address + "#mnist/sparse:10")
    assert chosen() == ("#mnist/sparse:10", "mnist", "sparse:10") and boards(browser) == ["mnist sparse:10 recovery"]
    browser.open(address + "#all/patch%3A1x1")
    assert boards(browser) == ["cifar10 patch:1x1 recovery", "mnist patch:1x1 recovery"]
    browser.open(address + "#no-such/thing")
    assert len(boards(browser)) == 5


def test_a_models_name_leads_to_its_card(browser: Browser, address: str) -> None:
    browser.click(f"{TABLE} tbody tr:nth-child(2) th a")
    script = "const it = document.getElementById(arguments[0]); return [it.open, it.getBoundingClientRect().top];"
    end = time.monotonic() + 10  # the page is told of its new address only after the click
    while not (state := browser.run(script, "model/votes-a"))[0] and time.monotonic() < end:
        time.sleep(0.05)
    opened, top = state
    assert opened and 0 <= top < 300
    visit(browser, address + "#model/pixels-4")
    assert browser.run(script, "model/pixels-4")[0]
    browser.type("#filter", "votes")
    browser.run("location.hash = '#model/bounds'")
    assert "bounds" in browser.run(f"{SHOWN} return texts('details.card h3');")


def test_commands_can_be_copied(browser: Browser) -> None:
    browser.run("document.getElementById('model/bounds').open = true")
    browser.click('[id="model/bounds"] .copy')
    script = "return document.querySelector('[id=\"model/bounds\"] .copy').textContent"
    end = time.monotonic() + 10
    while (said := browser.run(script)) == "Copy" and time.monotonic() < end:
        time.sleep(0.05)
    assert said in ("Copied", "Selected")


@pytest.mark.parametrize("width", [1280, 820, 390, 320])
def test_curves_are_drawn_and_their_texts_cover_nothing(browser: Browser, width: int) -> None:
    browser.resize(width, 900)
    sizes = browser.run(
        "return [...document.querySelectorAll('.plot svg')].map((each) => [...each.querySelectorAll('.model use')].map("
        "(mark) => Math.min(mark.getBoundingClientRect().width, mark.getBoundingClientRect().height)));"
    )
    assert [len(marks) for marks in sizes] == [3, 13, 2, 2] and min(map(min, sizes)) > 3
    box = "const box = each.getBoundingClientRect(); return [box.width, box.height]"
    for across, up in browser.run(f"return [...document.querySelectorAll('.plot svg')].map((each) => {{ {box} }});"):
        assert across > 250 and up > 130
    assert browser.run(OVERLAPS) == []


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_never_scrolls_sideways(browser: Browser, width: int) -> None:
    browser.resize(width, 800)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    needed, given = browser.run("const it = document.documentElement; return [it.scrollWidth, it.clientWidth]")
    assert needed <= given <= width
    if width < 1280:
        inside = browser.run(f"const it = document.querySelector('{TABLE} .scroll'); return [it.scrollWidth, it.clientWidth]")
        assert inside[0] > inside[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_readable(browser: Browser, scheme: str, tmp_path: Path) -> None:
    browser.scheme(scheme)
    picture = browser.screenshot()
    (tmp_path / f"{scheme}.png").write_bytes(picture)
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG" and image.size == (1280, 900)
        shades = image.convert("L").histogram()
    assert sum(count > 20 for count in shades) > 30  # not blank
    background = sum(i * count for i, count in enumerate(shades)) / sum(shades)
    assert background > 200 if scheme == "light" else background < 60
    assert browser.run(CONTRAST) == []


def test_without_scripts_everything_is_there(browser: Browser, address: str) -> None:
    def count(selector: str) -> int:
        root = browser.devtools("DOM.getDocument", depth=0)["root"]["nodeId"]
        return len(browser.devtools("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])

    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        visit(browser, address)
        assert count("section.threat") > 10 and count("section.threat[hidden], tr[hidden], figure[hidden], details[hidden]") == 0
        assert count("#controls[hidden]") == 1 and count("button") == 0
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)


def test_the_policy_is_enforced(browser: Browser) -> None:
    """Broken on purpose: what gets into the page later neither runs nor loads."""
    browser.run(
        "const add = (name, values) => document.body.append(Object.assign(document.createElement(name), values));"
        "add('script', {textContent: 'window.broken = 1'}); add('img', {src: 'https://example.invalid/x.png'});"
        "document.body.setAttribute('onclick', 'window.broken = 1'); document.body.click();"
    )
    assert browser.run("return window.broken === undefined")
    said = browser.messages()
    assert all("Content Security Policy" in line for line in said)
    for what in ("inline script", "the image", "inline event handler"):
        assert any(what in line for line in said), said


def test_a_hostile_card_brings_text_only(browser: Browser, tmp_path: Path) -> None:
    visit(browser, site.write([hostile(), card("plain", [result(3, 5)])], tmp_path / "hostile").as_uri())
    found: Any = browser.run("return ['script', 'img', 'style', 'iframe'].map((name) => document.querySelectorAll(name).length)")
    assert found == [1, 0, 1, 0]
    assert "alert(1)" in HOSTILE and "alert(1)" in browser.run("return document.querySelector('h2').textContent")
    browser.click("#dataset option:nth-child(2)")
    assert browser.run("return document.querySelectorAll('section.threat:not([hidden])').length") >= 1
    visit(browser, browser.run("return location.href"))
    assert browser.run("return document.querySelector('#dataset').selectedIndex") == 1


def test_the_bundled_zoo(browser: Browser, tmp_path: Path) -> None:
    visit(browser, site.write(bundled.cards().values(), tmp_path / "bundled").as_uri())
    assert browser.run("return document.querySelectorAll('details.card').length") == len(bundled.names())
    assert len(boards(browser)) >= 5 and browser.run(OVERLAPS) == []
    wide = "return [...document.querySelectorAll('main > section .scroll')].filter((one) => one.checkVisibility()"
    assert browser.run(f"{wide} && one.scrollWidth > one.clientWidth).map((one) => one.ariaLabel)") == []
    looks = """
    const looks = {};
    const add = (name, mark, glyph) => { (looks[name] ||= new Set()).add(getComputedStyle(mark).color + glyph); };
    document.querySelectorAll(".board .key").forEach((one) => add(one.nextSibling.textContent, one, one.dataset.glyph));
    for (const {firstChild, lastChild} of document.querySelectorAll(".legend li")) {
      add(lastChild.textContent, firstChild, firstChild.textContent);
    }
    return Object.values(looks).map((found) => found.size);
    """
    assert set(browser.run(looks)) == {1}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (700, "dark"), (375, "light")])
def test_the_page_of_a_users_runs(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    found = runs.read([write_run(tmp_path / "one", [3, -1, 5, 9]), write_run(tmp_path / "two", [3, 4, 5, 9])])
    image = weakest.WeakImage("image 3", "cat", "dog", -1.0, False, (0, 0, 5, 5), PNG)
    path = tmp_path / "index.html"
    path.write_text(runs.render(found, [(found[0], weakest.Weakest(found[0].main, (image,), ""))]))
    browser.resize(width, 900)
    browser.scheme(scheme)
    visit(browser, path.as_uri())
    needed, given = browser.run("const it = document.documentElement; return [it.scrollWidth, it.clientWidth]")
    assert needed <= given and browser.run(OVERLAPS) == [] and browser.run(CONTRAST) == []
    assert browser.run("return [...document.images].map((one) => one.naturalWidth)") == [1]
    assert {address for address in browser.requests() if not address.startswith("data:")} == {path.as_uri()}
