"""Every test runs on one thread, without a network, and in a folder of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp()  # the Hub client reads its home once, when it is imported
os.environ.pop("PATCHCERT_DATA", None)
os.environ.pop("PATCHCERT_ZOO", None)

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
number_of_threads = torch.get_num_threads  # tests replace the function


@pytest.fixture(scope="session", autouse=True)
def own_home() -> Iterator[None]:
    """Take the Hub client's home away in the end."""
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run inside an empty folder, so that nothing is found or left by accident."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """A test leaves torch's settings of the process as they were: the next one would compute otherwise."""
    before = settings()
    yield
    assert settings() == before, "the test leaves other settings of torch than it found"


def settings() -> tuple[object, ...]:
    backends = torch.backends
    return (
        backends.cudnn.enabled,
        backends.mkldnn.enabled,
        number_of_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
