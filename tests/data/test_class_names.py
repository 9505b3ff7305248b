"""Classes are matched by name, and every way in which names do not fit is told apart."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from patchcert_cli.data import class_names
from patchcert_cli.errors import DataError

OUTPUTS = (("n02012849", "crane"), ("n03126707", "crane"), ("n01440764", "tench", "Tinca tinca"), ("n02119789", "kit fox"))


def match(*classes: str, outputs: class_names.Names = OUTPUTS, count: int = 4) -> list[int]:
    return class_names.match(classes, outputs, data="./val", model="m", count=count)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_any_order_of_names_gives_the_outputs_of_these_names(order: tuple[int, ...]) -> None:
    names = ["n03126707", "Tinca tinca", "KIT_fox"]
    assert match(*(names[at] for at in order)) == [[1, 2, 3][at] for at in order]


def test_an_exact_name_comes_before_one_that_only_looks_alike() -> None:
    assert match("Crane", "crane", outputs=(("crane",), ("Crane",)), count=2) == [1, 0]
    with pytest.raises(DataError, match="class 'CRANE' of ./val names more than one output of m: crane and Crane"):
        match("CRANE", outputs=(("crane",), ("Crane",)), count=2)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (
            ("tench", "cat", "dog"),
            r"3 classes in ./val, 2 of them none of the 4 outputs of m \(cat, dog is not among n02012849 = ",
        ),
        (("tench", "cat"), r"Pass --classes names.txt \(one line per output\), or --weights with a 2-way head"),
        (("crane",), "class 'crane' of ./val names more than one output of m: n02012849 and n03126707. Rename its folder"),
        (("tench", "n01440764"), "classes tench and n01440764 of ./val are the same output of m. Join their folders"),
    ],
)
def test_names_that_do_not_fit_are_refused(classes: tuple[str, ...], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        match(*classes)
    assert caught.value.code == 6 and "\n" not in str(caught.value)


def test_position_alone_is_never_enough() -> None:
    with pytest.raises(DataError, match="nothing says what the 2 outputs of m are called. Classes are never matched by position"):
        match("a", "b", outputs=(), count=2)
    with pytest.raises(DataError, match="4 class names, but m has 5 outputs. Give one line per output"):
        match("tench", count=5)


def test_outputs_are_called_by_words() -> None:
    assert class_names.words(OUTPUTS) == ("crane (n02012849)", "crane (n03126707)", "tench", "kit fox")
    assert class_names.words((("n02012849",), ("cat", "n02123045"))) == ("n02012849", "cat")
    assert class_names.words((("a",), ("a", "b"))) == ("a", "a")


def test_names_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeffn1\tgreat white shark\tshark\nn2 \n\n", encoding="utf-8")
    assert class_names.read(path) == (("n1", "great white shark", "shark"), ("n2",))
    for content, said in (
        ("a\n\nb", "line 2 is empty"),
        ("", "it is empty"),
        ("red fox\ncat\nRed_Fox\n", "lines 1 and 3 are both 'Red_Fox'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            class_names.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    for place in (path, tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=r"--classes '.*' cannot be read \(.*\). Give a text file with one line per output"):
            class_names.read(place)
