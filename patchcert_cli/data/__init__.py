"""Data sets in [0, 1]: on disk, downloaded, or bundled.

The public names are loaded when they are first used, so that facts about data sets are known without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchcert_cli.data.datasets import DATASETS as DATASETS
    from patchcert_cli.data.datasets import DEFAULT_DIRECTORY as DEFAULT_DIRECTORY
    from patchcert_cli.data.datasets import ENVIRONMENT as ENVIRONMENT
    from patchcert_cli.data.datasets import Dataset as Dataset
    from patchcert_cli.data.datasets import directory as directory
    from patchcert_cli.data.datasets import open_dataset as open_dataset
    from patchcert_cli.data.images import Images as Images
    from patchcert_cli.data.images import load as load
    from patchcert_cli.data.images import pixels_of as pixels_of
    from patchcert_cli.data.images import to_float as to_float
    from patchcert_cli.data.images import whole_split as whole_split

_HOMES = {
    "DATASETS": "datasets",
    "DEFAULT_DIRECTORY": "datasets",
    "Dataset": "datasets",
    "ENVIRONMENT": "datasets",
    "Images": "images",
    "directory": "datasets",
    "load": "images",
    "open_dataset": "datasets",
    "pixels_of": "images",
    "to_float": "images",
    "whole_split": "images",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
