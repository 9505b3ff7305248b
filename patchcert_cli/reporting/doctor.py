"""A check of the installation and the machine: one row per fact, none of them a secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patchcert_cli import data
from patchcert_cli.catalog import bundled
from patchcert_cli.errors import IntegrityError, MachineError, PatchcertError, first_line
from patchcert_cli.hub import client
from patchcert_cli.storage import files, hub_cache
from patchcert_cli.version import __version__

EXTRAS = {
    "matplotlib": "plots",
    "timm": "timm",
    "onnxruntime": "onnx",
    **{name: name for name in ("pandas", "tensorboard", "wandb", "trackio")},
}
MIN_FREE_BYTES = 100e6
REPAIR = "pip install --force-reinstall torch torchvision"


@dataclass(frozen=True)
class Finding:
    """A fact about the machine; with ``problem`` it is an error."""

    name: str
    value: str
    problem: PatchcertError | None = None


def examine(*, data_dir: Path | None = None, offline: bool = False) -> list[Finding]:
    """Everything that commands depend on. Sends one request to the Hub unless ``offline``."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _software,
        _torch,
        lambda: _hub(offline),
        _disk,
        _zoo,
        lambda: _data(data_dir),
    ]
    return [finding for check in checks for finding in check()]


def _software() -> Iterator[Finding]:
    yield Finding("patchcert", f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    versions = {name: _version(name) for name in EXTRAS}
    extras = [f"{name} {version}" if version else f"no {name} (extra {EXTRAS[name]})" for name, version in versions.items()]
    yield Finding("extras", ", ".join(extras))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as problem:
        yield Finding(
            "torch",
            "cannot be imported",
            MachineError(f"torch cannot be imported: {first_line(problem)}.", hint=f"Repair it: {REPAIR}"),
        )
        return
    yield Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count()))
    else:
        names = "none: everything runs on the CPU"
    yield Finding("gpu", names)
    from patchcert_cli.layers import integers

    yield Finding("convolutions", integers.serving())
    try:
        import torchvision  # type: ignore[import-untyped]
    except (ImportError, OSError, RuntimeError) as problem:  # mixed builds raise RuntimeError: no operator torchvision::nms
        mismatch = f"torch {torch.__version__} and torchvision {_version('torchvision') or '(none)'} do not fit together"
        yield Finding("torchvision", mismatch, MachineError(f"{mismatch}: {first_line(problem)}.", hint=f"Repair it: {REPAIR}"))
        return
    yield Finding("torchvision", str(torchvision.__version__))


def _hub(offline: bool) -> Iterator[Finding]:
    facts = client.facts()
    yield Finding("huggingface_hub", str(facts["version"]))
    reason = "not asked" if offline else client.reachable()
    yield Finding("hub", f"{facts['endpoint']}: {reason or 'answers'}")  # being offline is not an error: the zoo is bundled
    yield Finding("token", "set" if facts["token"] else "none: public models only")


def _disk() -> Iterator[Finding]:
    cache = hub_cache.folder()
    existing = files.nearest(cache)
    cached = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()] if existing == cache else []
    yield Finding("cache", f"{cache}: {files.file_size(sum(path.stat().st_size for path in cached))} in {len(cached)} files")
    free = shutil.disk_usage(existing).free
    full = MachineError(f"less than 100 MB are free on the disk of '{cache}'.", hint="Free some space, or set HF_HOME.")
    yield Finding("free", f"{free / 1e9:.1f} GB", full if free < MIN_FREE_BYTES else None)
    try:
        files.check_folder(cache, "the cache")
    except PatchcertError as problem:
        yield Finding("writable", "no", MachineError(problem.message, hint="Put the cache elsewhere with HF_HOME."))


def _zoo() -> Iterator[Finding]:
    zoo = bundled.folder()
    intact, recipes, problems = 0, 0, []
    for name in bundled.names(zoo):
        try:
            card = bundled.card(name, zoo)
            if card.files:
                card.verify(zoo / name)
                intact += 1
            else:
                recipes += 1
        except PatchcertError as problem:
            problems.append(str(problem))
    broken = (
        IntegrityError(f"{len(problems)} models of the bundled zoo are damaged: {problems[0]}", hint="Install patchcert again.")
        if problems
        else None
    )
    counts = f"{intact} models with the sha256 of their cards, {recipes} recipes, {len(problems)} damaged"
    yield Finding("zoo", f"{zoo}: {counts}", broken)


def _data(data_dir: Path | None) -> Iterator[Finding]:
    for name, facts in data.DATASETS.items():
        if facts.in_folders:  # listing it takes a while
            exists = (data.directory(data_dir) / name).is_dir()
            yield Finding(name, f"in '{data.directory(data_dir) / name}'" if exists else "none; see " + facts.page)
            continue
        try:
            images = data.load(name, "test", data_dir=data_dir)
        except PatchcertError as problem:
            yield Finding(name, str(problem), problem if data_dir else None)
            continue
        total = facts.test_images
        origin = "bundled with patchcert" if images.source == "bundled" else f"from '{images.source}'"
        yield Finding(name, f"{len(images)} of {total} test images, {origin}")
