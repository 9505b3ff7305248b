"""Progress where stderr is no terminal: lines with the time to the end, by a clock that the test moves."""

from __future__ import annotations

import pytest

from patchcert_cli.cli import show


def test_piped_progress_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    shown = show.TerminalProgress(clock=lambda: now[0])
    shown.update(100, 1000, "clean 50.00%")
    for second in range(1, 31):
        now[0] = float(second)
        shown.update(100 + second, 1000, "clean 50.00%")
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "110/1000 clean 50.00%, 15 min left",
        "120/1000 clean 50.00%, 15 min left",
        "130/1000 clean 50.00%, 14 min left",
    ]


def test_a_terminal_shows_it_beside_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    now = [0.0]
    shown = show.TerminalProgress(clock=lambda: now[0])
    shown.update(0, 50, "no image yet")
    now[0] = 12.0
    shown.update(2, 50, "clean [/] 50.00%")
    assert shown.bars is not None and shown.bars.tasks[0].description == "clean [/] 50.00%, 5 min left"
    shown.close()
    assert "clean [/] 50.00%, 5 min left" in capsys.readouterr().err
