"""A whole training run: data, loop, card. The folder it leaves has the shape of a zoo folder."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import cards, checkpoint, data, models, schema
from patchcert_cli import device as devices
from patchcert_cli.catalog import resolve
from patchcert_cli.classifiers import addresses
from patchcert_cli.defenses import Trainable
from patchcert_cli.errors import IntegrityError, PatchcertError, UsageError
from patchcert_cli.parallel import workers as jobs
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files, locks
from patchcert_cli.training import budget as budgets
from patchcert_cli.training import loop, steps
from patchcert_cli.training.budget import Budget, Pace
from patchcert_cli.training.overrides import hash_of_model
from patchcert_cli.training.recipe import ROLES, Recipe
from patchcert_cli.training.state import Beginning, reduced
from patchcert_cli.training.trackers import Tracking
from patchcert_cli.version import __version__

TEACHERS = "Use a model of patchcleanser, minority, hicert, smoothing or ibp of the same data set: patchcert zoo list."
PATIENCE = 3600.0  # seconds that ranks wait for the first one to measure
SAVED_PER_SECOND = 1e8  # bytes, about


def begin(recipe: Recipe) -> Beginning:
    """The fresh defense that a run starts with, and what loads the weights that the recipe names into it.

    Raises:
        UsageError: no network can be built from its options, the weights to begin with are those of another network, or the
            teacher does not fit.
        IntegrityError: the weights to begin with, or the teacher's, are not those of the recipe.
    """
    try:
        beginning = Beginning.of(recipe)
    except IntegrityError as problem:  # of a file it would be; here it is what the user typed
        raise UsageError(
            problem.message, hint="See --network-option." if problem.hint in ("", models.CORRECT) else problem.hint
        ) from problem
    initial = None
    if recipe.start:
        hash_of_model(recipe.start, recipe.start_sha256, "start")
        initial = checkpoint.weights_for(beginning.defense, resolve.resolve(recipe.start).folder)

    def load(defense: Trainable) -> None:
        if recipe.network_options.get("weights"):  # published ones, all but the layers that give the classes
            network: Any = defense.network
            addresses.begin_with(network, recipe.network_options)
        if initial is not None:
            defense.load_state_dict(initial, strict=True)

    return replace(beginning, load=load, teacher=_teacher(recipe) if recipe.teacher else None)


def _teacher(recipe: Recipe) -> Trainable:
    """The model whose class probabilities a run also learns from.

    Raises:
        UsageError: it has none, or takes other images or has other classes than the recipe's data set.
        IntegrityError: its weights are not those of the recipe.
    """
    hash_of_model(recipe.teacher, recipe.teacher_sha256, "teacher")
    found = resolve.resolve(recipe.teacher)
    path = found.folder / files.CONFIG
    config = files.read_json(path).get("deployed", {}) if path.is_file() else {}
    theirs, ours = (config.get("input_shape"), config.get("classes")), (recipe.images.shape, recipe.images.classes)
    for what, one, other in zip(("images", "classes"), theirs, ours, strict=True):
        if one is not None and list(one) != list(other):
            raise UsageError(
                f"'{recipe.teacher}' cannot teach here: it has other {what} than {recipe.dataset},"
                f" {schema.shown(list(one))} in place of {schema.shown(list(other))}.",
                hint=TEACHERS,
            )
    teacher, _ = checkpoint.load_defense(found.folder)
    if isinstance(teacher, Trainable):
        with suppress(UsageError), torch.no_grad():
            teacher.class_probabilities(torch.zeros(1, *teacher.input_shape))
            return teacher.requires_grad_(False)
    kind = type(teacher).__name__
    raise UsageError(f"'{recipe.teacher}' cannot teach: {kind} has no class probabilities.", hint=TEACHERS)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    fresh: bool = False,
    fetch: str = "",
    progress: Progress | None = None,
    max_minutes: float | None = None,
    began: float | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any]:
    """Train ``recipe`` into ``folder``, continuing a stopped run, and write its card; returns a summary of plain values.

    With ``max_minutes`` the schedule is scaled to what fits into this time (:mod:`patchcert_cli.training.budget`), which began at
    ``began`` of ``time.perf_counter``, by default now.
    The processes of a job share the work. ``track`` names trackers of its metrics (:mod:`patchcert_cli.training.trackers`).

    Raises:
        DataError: the training data is not there; the message names the command that fetches it.
        UsageError: the recipe is wrong, or the folder holds a run of another one.
        UnknownName: there is no such tracker.
        MachineError: another process uses the folder, or the library of a tracker is not installed.
        Interrupted: stopped by Ctrl-C; whole epochs are kept.
    """
    progress = progress or Silent()
    for role in ROLES if fresh else ():
        if getattr(recipe, role) and Path(getattr(recipe, role)).resolve() == folder.resolve():
            raise UsageError(f"--fresh would delete '{folder}', which is the recipe's {role}.", hint="Use another --out.")
    began, place = time.perf_counter() if began is None else began, devices.resolve(device)
    workers = jobs.current().scope()
    tracking = Tracking(track if workers.first else (), progress)
    beginning = begin(recipe)
    images = data.open_dataset(recipe.dataset, data_dir=data_dir).load("train", download=download, fetch=fetch)
    images = images.limit(recipe.limit or None, recipe.seed).checked(progress)
    if recipe.precision == "bfloat16" and not reduced(recipe, torch.device(place)):
        progress.note("this processor has no bfloat16 arithmetic: training computes in float32")
    for remark in images.remarks:
        progress.note(remark)
    with locks.held(folder, files.CONFIG) if workers.first else nullcontext():
        budget = None
        if max_minutes is not None:
            if fresh and workers.first:
                loop.clear(folder)
            recipe, pace = _fitting(recipe, images, folder, max_minutes, place, beginning, workers, progress, began)
            beginning, fresh = replace(begin(recipe), load=beginning.load), False
            budget = Budget(max_minutes, pace, spent=budgets.spent(folder) + time.perf_counter() - began)
        made = loop.train(
            recipe,
            images,
            folder,
            device=place,
            fresh=fresh,
            progress=progress,
            beginning=beginning,
            budget=budget,
            workers=workers,
            tracking=tracking,
        )
        return _described(made.recipe, folder, made, place, progress, workers)


def _fitting(
    recipe: Recipe,
    images: data.Images,
    folder: Path,
    minutes: float,
    device: str,
    beginning: Beginning,
    workers: Workers,
    progress: Progress,
    began: float,
) -> tuple[Recipe, Pace]:
    """The recipe that fits into some minutes, by measuring a few steps, and what was measured; the plan of a run that goes on."""
    if workers.first:
        try:
            plan = budgets.planned(folder, recipe, minutes)
            if plan is None:
                files.check_folder(folder, "--out")
                progress.note("measuring some steps, and what certifying takes")
                kept, held = images.hold_out(recipe.validation, recipe.seed)
                tried = steps.trial(recipe, kept, device=device, beginning=copy.deepcopy(beginning))
                finishing, certifying = steps.time_to_certify(recipe, tried.state, held)
                certifying *= len(held) / workers.size
                pace = Pace(sum(tried.seconds) / len(tried.seconds), certifying, tried.kept / SAVED_PER_SECOND, finishing)
                plan = budgets.fitted(recipe, minutes, len(kept), pace, spent=time.perf_counter() - began), pace
                budgets.write(folder, recipe, minutes, *plan)
                epochs = f"{plan[0].epochs} epoch{'s' * (plan[0].epochs != 1)}"
                progress.note(
                    f"--max-minutes {minutes:g}: time for {epochs}; a step takes {pace.step:.2g} s,"
                    f" and certifying {len(held)} held-out images about {pace.validation:.0f} s"
                )
        except PatchcertError as problem:
            workers.failed("plan", problem)
            raise
        workers.tell("plan", [plan[0].to_dict(), asdict(plan[1])])
        return plan
    values, measured = workers.outcome("plan", PATIENCE)
    return Recipe.from_dict(values), Pace(**measured)


def _described(
    recipe: Recipe, folder: Path, made: loop.Trained, place: str, progress: Progress, workers: Workers
) -> dict[str, Any]:
    """Write the card of a trained model, and say what it is."""
    if not workers.first:
        return {"out": str(folder)}
    weights = cards.weights_sha256({name: cards.File.of(folder / name) for name in cards.weights_of(folder)})
    validation = {"images": made.validation.images, "clean": made.validation.clean, "certified": made.validation.certified}
    if made.epochs_run or not (folder / files.CARD).exists():
        card = cards.card_for_run(
            recipe.to_dict(),
            folder,
            network=models.describe(made.defense),
            kept=made.kept,
            validation=validation,
            trained={
                "seconds": round(made.seconds, 1),
                "device": place,
                "threads": torch.get_num_threads() * workers.size,
                "torch": str(torch.__version__),
                "patchcert": __version__,
            },
            command=recipe.command,
            source=made.defense.source,
            guarantee=made.defense.guarantee,
        )
        files.write_atomically(folder / files.CARD, card.render().encode())
    else:
        progress.note(f"{folder} is finished; --fresh trains it again")
    return {
        "out": str(folder),
        "model_sha256": weights,
        "defense": recipe.defense,
        "dataset": recipe.dataset,
        "threat": str(recipe.threat),
        "guarantee": str(made.defense.guarantee),
        "epochs": recipe.epochs,
        "at_chance": made.at_chance,
        "chance": made.chance,
        "validation": {"images": made.validation.images, "counts": {k: validation[k] for k in ("clean", "certified")}},
        "seconds": made.seconds,
        "device": place,
    }
