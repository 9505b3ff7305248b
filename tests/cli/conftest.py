"""The command line as a user types it."""

from __future__ import annotations

import sys

import pytest

from patchcert_cli.cli import main


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def patchcert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["patchcert", *words])
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call
