"""``patchcert attack``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchcert_cli.cli import launch, loading, several, show
from patchcert_cli.cli.attack_options import JoinOptions, SavedOptions, SearchOptions
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import (
    ClassifierOptions,
    DataOptions,
    DryRunOption,
    ModelsArgument,
    OutputOptions,
    RunOptions,
    ThreatOptions,
)
from patchcert_cli.errors import UsageError

if TYPE_CHECKING:
    from patchcert_cli.attacks import AnyAttack
    from patchcert_cli.evaluation.task import EvaluationTask
    from patchcert_cli.threats import Threat

EXAMPLES = (
    "Examples:  patchcert attack mnist-ibp-p5 --patch 5 --limit 500   |   patchcert attack runs/x --threat sparse --k 4"
    "   |   patchcert attack NAME --patch 5 --attack all   |   patchcert attack NAME --patch 50 --saved ./patches"
    "   |   patchcert attack --attack list"
)
OLD = {"--labels": "--precision"}  # spellings of earlier versions
COLUMNS = ("model", "threat", "right under attack", "certified", "flipped")  # where there is little room
LIST = "list"


@grouped
def attack(
    models: ModelsArgument = None,
    *,
    threat: ThreatOptions,
    search: SearchOptions,
    saved: SavedOptions,
    classifier: ClassifierOptions,
    data: DataOptions,
    run: RunOptions,
    join: JoinOptions,
    dry_run: DryRunOption = False,
    output: OutputOptions,
) -> None:
    """Try to flip predictions within the threat model, and compare with the certificates.

    An attack is empirical: one that fails proves nothing. A flipped certified image is a bug, with exit code 8.
    """
    if search.attack == LIST:
        print_attacks(output.json)
        return
    chosen = threat.one()
    request = classifier.request(dry_run=dry_run, download=data.download)
    several.alone(models or [], {"--out": run.out})
    join.check()
    _check_options(search, saved)
    launch.start(run.processes, dry_run=dry_run)

    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation import results
    from patchcert_cli.reporting import text

    def claims(own: Threat | None, shape: tuple[int, int, int]) -> list[Claim]:
        return [Claim(chosen or threat.own(own))]

    def one(model: str | None, command: str) -> several.Value:
        if dry_run:
            task, total = loading.open_sample(model, claims, data, run, command, request)
            return _estimate(task, total, *_attacker(task, search, saved, run.seed, join.join), run, join)
        task = loading.open_task(model, claims, data, run, command, request)
        return _attack(task, *_attacker(task, search, saved, run.seed, join.join), run, join)

    if dry_run:
        several.run(models, one, several.estimates, output.json, one_table=several.in_two_columns(text.plain_rows))
    else:
        several.run(
            models, one, _table, output.json, one_table=several.in_two_columns(text.attack_rows), check=results.check_claim
        )


def print_attacks(json_to: str | None) -> None:
    """Print the names of all attacks with the kinds of threat that each knows."""
    from patchcert_cli import attacks

    value = {name: {"threats": list(kinds), "default_for": attacks.default_for(name)} for name, kinds in attacks.kinds().items()}
    rows = [
        {"attack": name, "threats": ", ".join(one["threats"]), "default for": ", ".join(one["default_for"]) or "-"}
        for name, one in value.items()
    ]
    show.printed(lambda: show.table(rows), value, json_to)


def _attack(
    task: EvaluationTask, attacker: AnyAttack, settings: dict[str, Any], run: RunOptions, join: JoinOptions
) -> several.Value:
    from patchcert_cli.evaluation import evaluate

    with show.progress() as progress:
        return evaluate.attack(
            task,
            attacker,
            settings,
            run.out,
            join=join.join,
            fresh=run.fresh,
            progress=progress,
            max_seconds=join.max_seconds,
        )


def _estimate(
    task: EvaluationTask, total: int, attacker: AnyAttack, settings: dict[str, Any], run: RunOptions, join: JoinOptions
) -> several.Value:
    """What attacking ``total`` images would take, measured on the few of the task."""
    from patchcert_cli.evaluation import estimate

    joined = join.join and task.model.defense.guarantee.proves
    folder = run.out or task.folder("attack", {"attack": settings, "joined": joined})
    with show.progress() as progress:
        return estimate.evaluation(task, folder, attacker, total, join=join.join, progress=progress)


def _check_options(search: SearchOptions, saved: SavedOptions) -> None:
    """Refuse options of the attack that is not chosen, and unknown names."""
    if saved.saved is None:
        if saved.settings() or search.attack == "saved":
            flag = f"--{next(iter(saved.settings()))}" if saved.settings() else "--attack saved"
            raise UsageError(f"{flag} is about images to paste.", hint="Add --saved FOLDER.")
    elif search.settings() or search.attack not in (None, "saved"):
        flag = f"--{next(iter(search.settings()))}" if search.settings() else f"--attack {search.attack}"
        raise UsageError(f"{flag} is for an attack that searches, and --saved only pastes.", hint="Leave one of them out.")
    if search.attack is not None:
        from patchcert_cli import attacks

        chosen = attacks.listed(search.attack)
        if len(chosen) > 1 and "saved" in chosen:
            raise UsageError(
                "the attack saved does not search: it cannot be part of a list.", hint="Run it alone: --saved FOLDER"
            )


def _attacker(
    task: EvaluationTask, search: SearchOptions, saved: SavedOptions, seed: int, hinted: bool
) -> tuple[AnyAttack, dict[str, Any]]:
    """The attack that the options name, and its settings for the manifest."""
    from patchcert_cli import attacks

    settings, chosen = search.settings() | saved.settings(), attacks.listed(search.attack) if search.attack else []
    if saved.saved is not None:
        shape = task.model.defense.input_shape
        pasted, pictures = attacks.pasted(saved.saved, task.threat, shape, seed=seed, **settings)
        return pasted, settings | attacks.identity(pasted) | {"pictures": pictures}
    if len(chosen) > 1 or chosen == [attacks.ALL]:
        several_: AnyAttack = attacks.combined(chosen, task.threat, task.model.defense, hinted=hinted, seed=seed, **settings)
        return several_, settings | attacks.identity(several_)
    single = attacks.for_threat(task.threat, chosen[0] if chosen else None, seed=seed, **settings)
    return single, settings | attacks.identity(single)


def _table(results: Sequence[several.Value]) -> None:
    """One row for each model."""
    from patchcert_cli.reporting.numbers import share
    from patchcert_cli.threats import Guarantee

    rows, guarantees = [], [result.get("guarantee", "recovery") for result in results]
    for result, guarantee in zip(results, guarantees, strict=True):
        images, counts = result["images"], result["counts"]
        survived = round(result["attacked_accuracy"] * images)
        certified = [claim["counts"]["certified"] for claim in result["claims"]]
        proven = {"certified": share(certified[0], images) if certified else "-"} if Guarantee(guarantee).proves else {}
        rows.append(
            {
                "model": str(result["model"]),
                "threat": result["threat"],
                "clean": share(counts["clean"], images),
                "right under attack": share(survived, images),
                **proven,
                "flipped": f"{len(result['broken'])} certified images" if certified else f"{result['flipped']} images",
                "time": f"{result['seconds']:.1f} s",
            }
        )
    several.by_guarantee(rows, guarantees, COLUMNS)
