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
