"""Plain English: words and phrases that an engineer has to read twice, and what to write instead.

Read are the docs, the model cards, and of the code the docstrings, the comments and all texts, errors and help among them.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# pattern -> what to write instead; letter case does not count
WORDS = {
    r"so-manieth": "every `stride`-th",
    r"\banew\b": "again",
    r"\b(some|any|who)body('s)?\b|\bnobody\b|\bno one\b|\bwhoever\b": "the user, a third party, or a passive sentence",
    r"\bstrangers?('s)?\b": "third-party, unknown",
    r"cannot be meant|can be meant": "is invalid",
    r"(?<!\bthere )\b(is|are) no (?!longer\b|more\b|less\b|better\b|worse\b)": "is not a ...",
    r"\bin front of\b": "before",
    r"\bbehind\b": "after a layer; under a mask",
    r"\bdear(er|est)?\b": "expensive",
    r"\bso many\b": "the name of the number",
    r"\bstands? in\b|\bstood in\b": "is in",
    r"\b(is|are|was|were|be) (told|said)\b|\bwithout being told\b": "is reported, is stated",
    r"\bfor ever\b|\bwaits? for ever\b": "without a time limit",
    r"\bcome to itself\b|\bkeep it from talking\b|\bfrom talking\b": "recover; silence",
    r"\bin vain\b": "for nothing; unnecessarily",
    r"\bheld against\b": "checked against",
    r"\b(he|his|him)\b(?! et al)": "the attacker, it",
    r"\bspeaks? for\b": "supports; the signed margin",
    r"\bis asked\b|\bare asked\b|\basked again\b": "is evaluated, is requested",
    r"\bof one's own\b|\bone's own\b": "the user's",
    r"\bbears? out\b|\bborne out\b": "is confirmed by",
    r"\ba bomb\b": "a decompression bomb",
    r"\bhurry\b|\bpatience\b|\btrouble\b": "a timeout; an error",
    r"\bonto which\b|\bwhereof\b|\bthereof\b|\bthereby\b|\bhence\b|\btherefrom\b|\bwherein\b": "a second sentence",
    r"\bthe very\b": "the same",
    r"\bat home in\b|\bat home\b": "defined in",
    r"\brivals?\b": "runner-up; every other class",
    r"\bpictures?\b": "image file, image, plot",
    r"\bin words\b": "as text",
    r"(?<!\byour )(?<!\bits )(?<!'s )\bown code\b": "user code",
    r"\b(leave|leaves|left) (something|it|them|images?) open\b|\bleft open\b": "undecided",
    r"\bnothing of it\b": "no part of it",
    r"\bbut for\b": "except for",
    r"\bunless told\b|\btold otherwise\b": "by default",
    r"\btells? (whether|whose|what|how)\b": "shows",
    r"\ball the same\b": "still",
    r"\bby lot\b": "at random",
    r"\bat work\b": "in progress; is running",
    r"\bfelt\b": "visible to",
    r"\bfor good\b": "permanently",
    r"\bbrought along\b|\byours to bring\b": "not included",
}
# a file and a pattern in it that has its reason
ALLOWED: dict[tuple[str, str], str] = {}
CODE_SPAN = re.compile(r"(`+)[^`\n]*\1")
FIELD = re.compile(r"^[ -]*\w+:")  # names of fields, arguments and attributes are code
DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("zoo/*/README.md"),
]
CODE = [path for folder in ("patchcert_cli", "benchmarks", "docs", "examples") for path in ROOT.glob(f"{folder}/**/*.py")]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a document, or the comments, docstrings and texts of a module, with their line numbers."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        lines = CODE_SPAN.sub("``", content).splitlines()
        yield from enumerate((FIELD.sub("", line) for line in lines), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            text = CODE_SPAN.sub("``", node.value)
            yield from ((node.lineno + line, FIELD.sub("", part)) for line, part in enumerate(text.splitlines()))


def breaches(path: Path) -> list[str]:
    """Each line of ``path`` that uses a word of the list, with the better one."""
    name = path.relative_to(ROOT).as_posix()
    return [
        f"{name}:{line}: '{match.group()}' (write: {better}): {text.strip()[:100]}"
        for line, text in texts(path)
        for pattern, better in WORDS.items()
        if (name, pattern) not in ALLOWED and (match := re.search(pattern, text, re.IGNORECASE))
    ]


@pytest.mark.parametrize("path", [*DOCS, *CODE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_plain_english(path: Path) -> None:
    found = breaches(path)
    assert not found, "\n".join(found)


def test_the_list_finds_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Fine.\nThe proof is made anew, for whoever asks.\n`anew` is code.\n", encoding="utf-8")
    module = tmp_path / "module.py"
    module.write_text('"""Computed anew."""\nanew = 1  # nobody reads it\n', encoding="utf-8")
    assert [line.split(":")[1] for line in breaches(page)] == ["2", "2"]
    assert sorted(line.split(":")[1] for line in breaches(module)) == ["1", "2"]
