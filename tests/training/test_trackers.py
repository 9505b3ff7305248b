"""Trackers, with fakes of their libraries: each epoch once, in the same run after a stop, and training never depends on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from patchcert_cli.cli import main
from patchcert_cli.errors import Interrupted, MachineError, UnknownName
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.training import loop, run, trackers
from patchcert_cli.training.trackers import TRACKED, Tracking
from tests.training.test_loop import TINY, digest, images

LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
SHORT = replace(TINY, epochs=2, options={"natural_epochs": 0, "ramp_epochs": 0, "bounded_epochs": 1})


class Library:
    """What a tracker's library was called with."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.finished = 0
        self.fail_at = 0  # this epoch fails

    def init(self, **options: Any) -> Any:
        print("hello from the library")  # as trackio does
        self.begun.append(options)
        return SimpleNamespace(log=lambda values, step: self._log(step, values), finish=self._finish)

    def writer(self, folder: str) -> Any:
        self.begun.append({"folder": folder})
        add = lambda name, value, step: self._log(step, {name: value})  # noqa: E731
        return SimpleNamespace(add_scalar=add, flush=lambda: None, close=self._finish)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if step == self.fail_at:
            raise ConnectionError("no route to host")
        assert not set(values) & set(self.logged.get(step, {})), "an epoch came twice"
        self.logged.setdefault(step, {}).update(values)

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=sorted(LIBRARIES))
def tracked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Library]:
    return request.param, installed(request.param, monkeypatch)


def installed(name: str, monkeypatch: pytest.MonkeyPatch) -> Library:
    library, module = Library(), ModuleType(LIBRARIES[name])
    module.init, module.SummaryWriter = library.init, library.writer  # type: ignore[attr-defined]
    module.log, module.finish = (lambda values, step: library._log(step, values)), library._finish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, LIBRARIES[name], module)
    return library


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def rows(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / files.METRICS).read_text().splitlines()]
    return {row.pop("epoch"): row for row in lines}


def stopping_at(epoch: int) -> Callable[[Silent, str], None]:
    def note(self: Silent, text: str) -> None:
        if text.startswith(f"epoch {epoch} "):
            raise KeyboardInterrupt

    return note


def test_every_tracker_of_the_folder_is_tested() -> None:
    assert trackers.names() == sorted(LIBRARIES)


def test_a_tracker_gets_the_metrics_of_each_epoch(
    tracked: tuple[str, Library], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, library = tracked
    loop.train(SHORT, images(), tmp_path / "run", tracking=Tracking([name]))
    assert library.logged == rows(tmp_path / "run") and "certified" in library.logged[2]
    assert len(library.begun) == library.finished == 1
    assert not capsys.readouterr().out
    loop.train(SHORT, images(), tmp_path / "run", tracking=Tracking([name]))  # finished, and tracked
    assert len(library.begun) == 1
    if name == "wandb":
        loop.train(SHORT, images(), tmp_path / "plain")
        assert digest(tmp_path / "plain") == digest(tmp_path / "run") and not (tmp_path / "plain" / TRACKED).exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_resumed_run_goes_on_in_the_same_tracker_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = installed(name, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(Silent, "note", stopping_at(2))
        with pytest.raises(Interrupted):
            loop.train(TINY, images(), tmp_path, tracking=Tracking([name]))
    assert list(library.logged) == [1]
    loop.train(TINY, images(), tmp_path, tracking=Tracking([name]))
    assert library.logged == rows(tmp_path) and list(library.logged) == [1, 2, 3]  # the second was made, but not shown, before
    assert library.begun[0] == library.begun[1] and library.finished == 2
    if name != "tensorboard":
        assert library.begun[0]["resume"] == "allow" and library.begun[0]["config"]["epochs"] == 3
        loop.train(TINY, images(), tmp_path, fresh=True)
        assert not (tmp_path / TRACKED).exists(), "a run that is started over is another one"


def test_a_run_that_is_tracked_later_shows_all_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.train(SHORT, images(), tmp_path)
    library = installed("wandb", monkeypatch)
    loop.train(SHORT, images(), tmp_path, tracking=Tracking(["wandb"]))
    assert library.logged == rows(tmp_path)


def test_a_tracker_that_fails_is_left_out_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, sound, notes = installed("wandb", monkeypatch), installed("trackio", monkeypatch), Notes()
    broken.fail_at = 1
    loop.train(SHORT, images(), tmp_path / "run", tracking=Tracking(["wandb", "trackio"], notes), progress=notes)
    assert [line for line in notes.lines if "tracker" in line] == [
        "tracker wandb failed: no route to host; training goes on without it"
    ]
    assert sound.logged == rows(tmp_path / "run") and not broken.logged and not broken.finished
    broken.fail_at = 0
    loop.train(SHORT, images(), tmp_path / "run", tracking=Tracking(["wandb"]))
    assert broken.logged == sound.logged, "what it missed is shown by the same command again"


def test_a_tracker_that_cannot_begin_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, notes = installed("wandb", monkeypatch), Notes()
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    made = loop.train(SHORT, images(), tmp_path, tracking=Tracking(["wandb"], notes))
    assert made.epochs_run == 2 and notes.lines == ["tracker wandb failed: division by zero; training goes on without it"]
    assert not library.logged


def test_only_the_first_rank_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def stop(names: tuple[str, ...], progress: Any) -> None:
        asked.append(tuple(names))
        raise InterruptedError

    monkeypatch.setattr(run, "Tracking", stop)
    monkeypatch.setattr(run, "begin", lambda recipe: None)
    monkeypatch.setattr(run.data, "open_dataset", lambda *_, **__: SimpleNamespace(load=lambda *_, **__: images()))
    for rank in (0, 1):
        monkeypatch.setattr(run.jobs, "current", lambda rank=rank: SimpleNamespace(scope=lambda: Workers(rank, 2)))
        with pytest.raises(InterruptedError):
            run.train(SHORT, tmp_path, track=["wandb"])
    assert asked == [("wandb",), ()]


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_a_missing_library_is_refused_before_anything_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    monkeypatch.setattr(sys, "argv", ["patchcert", "train", "--track", name, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main.run()
    said, hint = capsys.readouterr().err.splitlines()
    assert stop.value.code == MachineError.code and not (tmp_path / "run").exists()
    assert said.startswith(f"error[7]: --track {name} cannot import '{LIBRARIES[name]}': import of {LIBRARIES[name]}")
    assert hint == f"hint: Type: pip install 'patchcert[{name}]'"


def test_a_library_that_is_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "wandb":
                raise AttributeError("numpy has no attribute float_")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MachineError, match="--track wandb cannot import 'wandb': numpy has no attribute float_"):
        Tracking(["wandb"])


def test_an_unknown_tracker_is_refused_with_suggestions() -> None:
    with pytest.raises(UnknownName, match="no tracker 'wanb'") as unknown:
        Tracking(["wanb"])
    assert "wandb" in unknown.value.hint
