"""``patchcert attack``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from patchcert_cli.cli import launch, loading, several, show
from patchcert_cli.cli.attack_options import JoinOptions, KeepOptions, SavedOptions, SearchOptions
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
    from patchcert_cli.data.resize_crop import ResizeCrop
    from patchcert_cli.defenses import Claim, Defense
    from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
    from patchcert_cli.threats import Threat

    _Attacker = tuple[AnyAttack, dict[str, Any]]

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
    keep: KeepOptions,
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
    several.alone(models or [], {"--out": run.out, **keep.of_one_model})
    join.check()
    keep.check(data, run, join, dry_run)
    _check_options(search, saved)
    launch.start(run.processes, dry_run=dry_run)

    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation import results, single_image
    from patchcert_cli.reporting import text

    def claims(own: Threat | None, shape: tuple[int, int, int]) -> list[Claim]:
        return [Claim(chosen or threat.own(own))]

    def attacker(defense: Defense, threat: Threat) -> _Attacker:
        return _attacker(defense, threat, search, saved, run.seed, join.join)

    def one(model: str | None, command: str) -> several.Value:
        if keep.image is not None:
            opened = loading.open_image(model, claims, request, data.dataset, run.device, keep.image)
            return _attack_image(*opened, attacker, keep, join)
        if dry_run:
            task, total = loading.open_sample(model, claims, data, run, command, request)
            return _estimate(task, total, *attacker(task.model.defense, task.threat), run, join)
        task = loading.open_task(model, claims, data, run, command, request)
        return _attack(task, *attacker(task.model.defense, task.threat), run, join, keep)

    if dry_run:
        several.run(models, one, several.estimates, output.json, one_table=several.in_two_columns(text.plain_rows))
    elif keep.image is not None:
        rows = several.in_two_columns(text.attacked_image_rows)
        several.run(models, one, _table, output.json, one_table=rows, check=single_image.check)
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
    task: EvaluationTask, attacker: AnyAttack, settings: dict[str, Any], run: RunOptions, join: JoinOptions, keep: KeepOptions
) -> several.Value:
    """Attack test images, and draw the plot if asked."""
    from patchcert_cli.evaluation import evaluate
    from patchcert_cli.reporting import attack_plots

    with show.progress() as progress:
        found = evaluate.attack(
            task,
            attacker,
            settings,
            run.out,
            join=join.join,
            fresh=run.fresh,
            progress=progress,
            max_seconds=join.max_seconds,
            save=keep.save,
        )
    if keep.plot is not None:
        attack_plots.queries([found], keep.plot)
        show.say(f"drew {keep.plot}")
    return found


def _attack_image(
    model: EvaluatedModel,
    claims: Sequence[Claim],
    resize_crop: ResizeCrop,
    attacker: Callable[[Defense, Threat], _Attacker],
    keep: KeepOptions,
    join: JoinOptions,
) -> several.Value:
    """Attack one image, and draw it if asked."""
    from patchcert_cli.evaluation import single_image
    from patchcert_cli.reporting import attack_plots

    assert keep.image is not None
    threat = claims[0].threat
    with show.progress() as progress:
        found = single_image.attack(
            model,
            keep.image,
            threat,
            *attacker(model.defense, threat),
            join=join.join,
            resize_crop=resize_crop,
            resize=keep.resize,
            save=keep.save,
            progress=progress,
        )
    values = found.values
    if keep.map_ is not None:
        attack_plots.attacked_image(values, found.clean, found.adversarial, keep.map_)
        values |= {"map": str(keep.map_)}
        found.notes.append(f"drew {keep.map_}")
    show.say("\n".join(found.notes))
    return values


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
            raise UsageError("the attack saved does not search, and cannot be in a list.", hint="Run it alone: --saved FOLDER")


def _attacker(defense: Defense, threat: Threat, search: SearchOptions, saved: SavedOptions, seed: int, hinted: bool) -> _Attacker:
    """The attack that the options name, and its settings for the manifest."""
    from patchcert_cli import attacks

    settings, chosen = search.settings() | saved.settings(), attacks.listed(search.attack) if search.attack else []
    if saved.saved is not None:
        pasted, pictures = attacks.pasted(saved.saved, threat, defense.input_shape, seed=seed, **settings)
        return pasted, settings | attacks.identity(pasted) | {"pictures": pictures}
    if len(chosen) > 1 or chosen == [attacks.ALL]:
        several_: AnyAttack = attacks.combined(chosen, threat, defense, hinted=hinted, seed=seed, **settings)
        return several_, settings | attacks.identity(several_)
    single = attacks.for_threat(threat, chosen[0] if chosen else None, seed=seed, **settings)
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
