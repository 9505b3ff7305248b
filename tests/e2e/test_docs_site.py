"""The documentation builds as a site without a warning, is complete, and loads nothing from elsewhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import patchcert_cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "patchcert_cli"
CONTRACTS = ("certificate", "threats", "errors", "defenses/_base", "defenses/_training", "defenses/_attackable", "attacks/_base")
LOADED = {"stylesheet", "preload", "prefetch", "modulepreload", "icon", "manifest", "preconnect", "dns-prefetch"}
ELSEWHERE = re.compile(r"(?:[a-z]+:)?//", re.IGNORECASE)


class Reader(HTMLParser):
    """The ids of a page, and the addresses that a browser loads as it shows the page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        self.loads += [value for name in ("src", "srcset", "data", "poster") if (value := given.get(name))]
        if tag == "link" and LOADED & set((given.get("rel") or "").split()):
            self.loads.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[str, Reader]:
    """Every page of the site, by its address."""
    return {page.relative_to(site).as_posix(): Reader(page) for page in site.rglob("*.html")}


def entries(nav: Any) -> Iterator[str]:
    """The pages of ``nav``, from top to bottom."""
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(item)


def address(uri: str) -> str:
    """Where the site has a page of its source."""
    folder = uri.removesuffix(".md").removesuffix("index").rstrip("/")
    return f"{folder}/index.html".lstrip("/")


def test_every_page_of_the_contents_exists(read: dict[str, Reader]) -> None:
    pages = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(pages) == len(set(pages)) > 20
    assert {address(page) for page in pages} <= read.keys()


def test_every_page_card_and_example_is_on_the_site(read: dict[str, Reader]) -> None:
    sources = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    sources |= {f"zoo/{path.parent.name}.md" for path in ROOT.glob("zoo/*/README.md")}
    sources |= {f"examples/{path.parent.name}.md" for path in ROOT.glob("examples/*/README.md")}
    sources |= {f"examples/{path.stem}.md" for path in ROOT.glob("examples/*.py")}
    sources |= {"index.md", "changelog.md", "contributing.md", "404.md"}
    assert {"404.html" if source == "404.md" else address(source) for source in sources} == read.keys()


def test_every_public_name_has_its_entry(read: dict[str, Reader]) -> None:
    ids = set().union(*(page.ids for page in read.values()))
    assert {f"patchcert_cli.{name}" for name in patchcert_cli.__all__} <= ids
    named = {identity.rpartition(".")[2] for identity in ids if identity.startswith("patchcert_cli.")}
    for contract in CONTRACTS:
        tree = ast.parse((PACKAGE / f"{contract}.py").read_text(encoding="utf-8"))
        assert {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"} <= named, contract


def test_roles_of_docstrings_are_links(site: Path, read: dict[str, Reader]) -> None:
    text = (site / "api" / "defenses" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r":(?:class|func|meth|data|mod|attr|exc):", text)
    assert "patchcert_cli.Defense.certify_claims" in read["api/defenses/index.html"].ids
    assert re.search(r'<a [^>]*href="#patchcert_cli\.Defense\.certify_claims"[^>]*><code>certify_claims</code></a>', text)


def test_nothing_is_loaded_from_elsewhere(site: Path, read: dict[str, Reader]) -> None:
    loads = [(name, load) for name, page in read.items() for load in page.loads]
    assert len(loads) > len(read)
    assert [load for load in loads if ELSEWHERE.match(load[1])] == []
    for name, load in loads:
        if not load.startswith("data:"):
            start = site if load.startswith("/") else (site / name).parent
            assert (start / load.lstrip("/").partition("?")[0]).is_file(), (name, load)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
