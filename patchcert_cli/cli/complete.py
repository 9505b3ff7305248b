"""What a shell offers for an argument: names alone, found without torch. Paths are offered by the shell itself.

``patchcert --install-completion`` switches it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from patchcert_cli import registry

ROOT = Path(__file__).parents[1]


def models(incomplete: str) -> list[str]:
    """Models of the zoo."""
    from patchcert_cli.catalog import bundled

    return _beginning(bundled.names(), incomplete)


def recipes(incomplete: str) -> list[str]:
    """Models of the zoo that have a recipe."""
    from patchcert_cli.catalog import bundled

    return _beginning(sorted(path.parent.name for path in bundled.folder().glob("*/recipe.yaml")), incomplete)


def datasets(incomplete: str) -> list[str]:
    """Data sets, those of installed packages included."""
    from patchcert_cli.data import datasets

    return _beginning([*datasets.DATASETS, *registry.names("dataset", ()), datasets.PREFIX], incomplete)


def attacks(incomplete: str) -> list[str]:
    """Attacks, also after others and a comma."""
    before, comma, last = incomplete.rpartition(",")
    return [
        f"{before}{comma}{name}" for name in _beginning([*_of("attack", "attacks"), *([] if comma else ["all", "list"])], last)
    ]


def one_attack(incomplete: str) -> list[str]:
    """Attacks, or none."""
    return _beginning([*_of("attack", "attacks"), "none"], incomplete)


def defenses(incomplete: str) -> list[str]:
    """Defenses."""
    return _beginning(_of("defense", "defenses"), incomplete)


def networks(incomplete: str) -> list[str]:
    """Networks."""
    return _beginning(_of("network", "models"), incomplete)


def trackers(incomplete: str) -> list[str]:
    """Trackers of training."""
    return _beginning(_of("tracker", "training/trackers"), incomplete)


def papers(incomplete: str) -> list[str]:
    """Papers whose tables are known."""
    from patchcert_cli import papers

    return _beginning(papers.names(), incomplete)


def tables(incomplete: str) -> list[str]:
    """Tables and figures of all papers."""
    from patchcert_cli import papers

    return _beginning(dict.fromkeys(table.id for name in papers.names() for table in papers.load(name).tables), incomplete)


def among(*names: str) -> Callable[[str], list[str]]:
    """The completion of an option that is one of these."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(names, incomplete)

    return complete


def _of(kind: str, folder: str) -> list[str]:
    """The entries of the registry, whose packages, which need torch, are not imported."""
    return registry.names(kind, [str(ROOT / folder)])


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
