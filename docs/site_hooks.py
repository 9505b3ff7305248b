"""Hooks of ``mkdocs build``: pages that lie outside of docs/, and links to files as the repository has them.

README.md, CHANGELOG.md, CONTRIBUTING.md, the cards of the zoo and the examples become pages. In every page a link to a file or
folder of the repository becomes a link to its page. Other files outside of docs/ that a page links to, such as notebooks, are
copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
FOUND = ("zoo/*/README.md", "examples/*/README.md", "examples/*.py")
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """Every page that lies outside of docs/: its path in the repository, and its path in the site."""
    found = [path.relative_to(ROOT).as_posix() for pattern in FOUND for path in sorted(ROOT.glob(pattern))]
    return PAGES | {path: path.removesuffix("/README.md").removesuffix(".py") + ".md" for path in found}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/, and the files outside of docs/ that any page links to."""
    for source, uri in pages().items():
        if source.endswith(".py"):
            script = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, uri, content=f"# `{source}`\n\n```python\n{script}```\n"))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    for page in files.documentation_pages():
        source = repository_path(page.src_uri)
        for target in LINK.finditer(FENCE.sub("", page.content_string)):
            found = target_of(source, target["target"])
            if found and (ROOT / found).is_file() and (uri := site_path(found)) not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / found)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    source, here = repository_path(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        found = target_of(source, link["target"])
        return posixpath.relpath(site_path(found), here or ".") + (link["anchor"] or "") if found else link[0]

    return LINK.sub(moved, markdown)


def target_of(source: str, target: str) -> str | None:
    """The path in the repository that a link in the file ``source`` means; None where there is no such file or folder."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(target)))
    if ":" in target or target.startswith("/") or path.startswith("..") or not (ROOT / path).exists():
        return None
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def site_path(path: str) -> str:
    """Where a file of the repository is in the site's source."""
    return pages().get(path, path.removeprefix("docs/"))


def repository_path(uri: str) -> str:
    """The file of the repository that a file of the site's source comes from."""
    return {uri: path for path, uri in pages().items()}.get(uri, f"docs/{uri}")
