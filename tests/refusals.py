"""What a command that refuses to run prints."""

from __future__ import annotations


def check_refused(err: str, code: int, *words: str) -> None:
    """Assert that ``err`` is one error line with this exit code and at most one hint after it, which contain all ``words``."""
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2 and lines[0].startswith(f"error[{code}]: "), err
    assert all(line.startswith("hint: ") for line in lines[1:]), err
    assert not lines[0].endswith((";", ":")), err
    for word in words:
        assert word in err, (word, err)
