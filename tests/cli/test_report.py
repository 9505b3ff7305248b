"""``patchcert report``: what is meant where a word is neither a command nor a path."""

from __future__ import annotations

from pathlib import Path

from refusals import check_refused


def test_nearly_a_command_is_told_its_name(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("report", "zo")
    assert done.code == 2 and not done.out
    check_refused(done.err, 2, "report has no 'zo'", "Did you mean zoo?")


def test_a_path_of_such_a_name_is_a_path(patchcert) -> None:  # type: ignore[no-untyped-def]
    Path("zo").mkdir()
    done = patchcert("report", "zo")
    assert done.code != 0 and "Did you mean" not in done.err
    assert "Did you mean" not in patchcert("report", "elsewhere").err
