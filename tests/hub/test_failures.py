"""Settings of the Hub's client: within limits while a request is made, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import get_session, logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

from patchcert_cli.errors import HubError
from patchcert_cli.hub.failures import translate_errors


@pytest.fixture
def factory() -> Any:
    """A factory of an application's own, which counts its clients."""
    made: list[Any] = []
    default = get_session()
    kind, hooks = type(default), default.event_hooks

    def client() -> Any:
        made.append(kind(event_hooks=hooks))
        return made[-1]

    set_client_factory(client)
    yield made
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=None))


def test_settings_of_the_process_are_restored(factory: list[Any]) -> None:
    verbosity = logging.get_verbosity()  # type: ignore[no-untyped-call]
    enable_progress_bars()
    limits = []

    def request() -> None:
        with translate_errors("org/name"), translate_errors("org/other"):
            assert logging.get_verbosity() == logging.ERROR and are_progress_bars_disabled()  # type: ignore[no-untyped-call]
            session = get_session()
            assert session is factory[-1], "the application's factory makes the client"
            limits.append(session.event_hooks["request"][-1])
            plain = session.build_request("GET", "http://127.0.0.1:9", timeout=None)
            limits[0](plain)
            assert plain.extensions["timeout"]["read"] == constants.HF_HUB_DOWNLOAD_TIMEOUT
            raise RuntimeError("anything")

    with pytest.raises(HubError):
        request()
    assert logging.get_verbosity() == verbosity and not are_progress_bars_disabled()  # type: ignore[no-untyped-call]
    hooks: dict[str, list[Callable[..., Any]]] = get_session().event_hooks
    assert limits[0] not in hooks["request"] and not hooks["response"]
