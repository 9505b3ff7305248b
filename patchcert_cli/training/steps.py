"""The steps of an epoch, and what is measured of steps: of any defense, on one process or on the ranks of a job."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchcert_cli.certificate import Tally
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Trainable, TrainingStep
from patchcert_cli.device import sent
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.training import augment
from patchcert_cli.training.ranks import Ranks
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning, Place, State, reduced, some_images

KEPT_EVERY = 60.0  # seconds between two states that are kept within an epoch, or more:
SHARE_KEPT = 20.0  # this many times as long as keeping one takes
LOOK = 10  # steps between two looks at the loss
PROBED = 8  # held-out images that are certified to know what that takes
DEAR = 6.0  # times as long: such proofs are not repeated
PROBING = 0.5  # seconds; where they took less, as many times more are certified


def rate_at(recipe: Recipe, progress: float) -> float:
    """The learning rate after ``progress`` epochs."""
    return recipe.learning_rate * recipe.options.lr_multiplier(progress, recipe.epochs)


@torch.no_grad()
def finish(recipe: Recipe, defense: Trainable, images: Images, *, rounded: bool) -> None:
    """What a defense needs before it is validated; at the end its weights are rounded as they will be stored."""
    if rounded:
        defense.fuse()
    if rounded and recipe.stored != "float32":
        for weight in defense.parameters():
            if weight.ndim > 1:
                weight.copy_(weight.to(getattr(torch, recipe.stored)))
    defense.calibrate(some_images(defense, images))


def epoch(
    recipe: Recipe,
    at_epoch: int,
    state: State,
    images: Images,
    progress: Progress,
    together: Ranks | None = None,
    choose: Callable[[float], int] | None = None,
    *,
    place: Place | None = None,
    keep: Callable[[Place], None] | None = None,
) -> float:
    """The recipe's steps on random training images, or as many as ``choose`` says, given the seconds of the first one.

    Nothing that the first step does depends on how many follow. Returns the mean loss.

    Args:
        place: the steps of this epoch that are done; None for none.
        keep: keeps the state after a step, every now and then (:data:`KEPT_EVERY`).
    """
    place = place or Place(at_epoch)
    defense, optimizer, average = state.defense, state.optimizer, state.average
    together = together or Ranks(Workers(), defense.device)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + at_epoch)
    order = torch.randperm(len(images), generator=generator)
    if not together.alone:  # what is drawn for a rank's images
        generator.manual_seed((recipe.seed * 1_000_003 + at_epoch) * 4_099 + together.workers.rank)
    threat, options, steps = recipe.threat, recipe.options, recipe.steps_of(at_epoch, len(images))
    if place.drawn is not None and together.alone:
        generator.set_state(place.drawn)
    lower, total = reduced(recipe, defense.device), torch.full((), place.loss, dtype=torch.float64, device=defense.device)
    defense.train()
    loss_of, number, began = together.loss(defense, state.auxiliary), place.steps, time.perf_counter()
    due = began + KEPT_EVERY
    while number < steps:
        at = at_epoch + number / steps
        batch = order[number * recipe.batch_size : (number + 1) * recipe.batch_size]
        picked = together.share(batch)
        x, label = to_float(sent(images.read(picked), defense.device)), sent(images.labels[picked], defense.device)
        x = augment.apply(x, options.augment(at, recipe.epochs), generator)
        if lower:
            x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * recipe.learning_rate * options.lr_multiplier(at, recipe.epochs)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(defense.device.type, torch.bfloat16, enabled=lower):
            taught = _taught(state.teacher, x)
            loss = loss_of(x, label, TrainingStep(threat, options, at, recipe.epochs, generator, state.auxiliary, taught))
        loss = loss * together.weight(len(picked), len(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if average:
            average.follow(defense, options.ema_decay)
        total += loss.detach()
        if number % LOOK == 0 or number == place.steps or number + 1 == steps:  # reading a loss waits for the device
            line = f"epoch {at_epoch + 1} of {recipe.epochs}: loss {float(total) / (number + 1):.4f}"
        number += 1
        progress.update(at_epoch * steps + number, recipe.epochs * steps, line)
        now = time.perf_counter()
        if choose is not None and number == place.steps + 1:
            steps = choose(now - began)
        if keep is not None and now >= due and number < steps:
            keep(Place(at_epoch, number, float(total), place.seconds + now - began, generator.get_state()))
            due = time.perf_counter() + max(KEPT_EVERY, SHARE_KEPT * (time.perf_counter() - now))
    together.agree([defense, *([average.defense] if average else [])])
    defense.eval()
    return together.total(float(total) / steps)[0] / together.workers.size


@torch.no_grad()
def _taught(teacher: Trainable | None, x: Tensor) -> Tensor | None:
    """The teacher's class probabilities [B, K] of images [B, C, H, W], which are changed as the defense gets them."""
    return None if teacher is None else teacher.class_probabilities(x)


@dataclass(frozen=True)
class Trial:
    """What two steps of a run took: seconds of each, and bytes of the weights and of what every epoch keeps, the state."""

    seconds: tuple[float, float]
    weights: int
    kept: int
    state: State


def trial(recipe: Recipe, images: Images, *, device: str = "cpu", beginning: Beginning | None = None) -> Trial:
    """A step as in the first epoch and one as in the last, on at least one batch of images; nothing is kept.

    The first step of all, which sets things up, is not timed. Held-out images are certified with the weights that there are then:
    trained ones may take longer.
    """
    recipe = replace(recipe, steps=())  # an epoch of the recipe may have none
    state = State.of(recipe, beginning or Beginning.of(recipe), device)
    batch, spent = images.take(torch.arange(min(recipe.batch_size, len(images)))), []
    for number in (0, 0, recipe.epochs - 1):
        began = time.perf_counter()
        epoch(recipe, number, state, batch, Silent())
        spent.append(time.perf_counter() - began)
    weights, kept = (sum(one.nbytes for one in tensors.values()) for tensors in (state.defense.state_dict(), state.tensors()))
    return Trial((spent[1], spent[2]), weights, kept, state)


def time_to_certify(recipe: Recipe, state: State, images: Images) -> tuple[float, float]:
    """Seconds of what a defense needs before it certifies, and of certifying an image, measured on a few."""
    began = time.perf_counter()
    finish(recipe, state.deployed, images, rounded=False)
    finished = time.perf_counter() - began
    count, seconds = probe(state.deployed, images, recipe)
    return finished, seconds / count


def probe(defense: Trainable, images: Images, recipe: Recipe, ranks: Ranks | None = None) -> tuple[int, float]:
    """A few images, and the seconds that certifying them takes: more images where that is quick, for together each costs less."""
    ranks, count = ranks or Ranks(Workers(), defense.device), PROBED
    monitor(defense, images.limit(1, recipe.seed), recipe, ranks=ranks)  # sets things up
    while True:
        few = images.limit(min(count, len(images)), recipe.seed)
        began = time.perf_counter()
        monitor(defense, few, recipe, ranks=ranks)
        seconds = ranks.first_of(time.perf_counter() - began)
        if PROBING < seconds < DEAR * PROBING:  # the first batch of a new size sets more up
            began = time.perf_counter()
            monitor(defense, few, recipe, ranks=ranks)
            seconds = min(seconds, ranks.first_of(time.perf_counter() - began))
        if seconds > PROBING or len(few) == len(images):
            return len(few), seconds
        count *= PROBED


@torch.no_grad()
def monitor(defense: Trainable, images: Images, recipe: Recipe, batch: int = 500, ranks: Ranks | None = None) -> Tally:
    """Clean and certified counts on held-out training images, which ranks take from a shared counter."""
    defense.eval()
    ranks = ranks or Ranks(Workers(), defense.device)
    scope, threat, counts = ranks.workers.scope(), recipe.threat, [0, 0, 0]
    batch = batch if ranks.alone else max(1, min(batch, len(images) // (4 * ranks.workers.size)))
    while (start := scope.add("taken", batch) - batch) < len(images):
        part = slice(start, start + batch)
        certificate = defense.certify(to_float(sent(images.read(part), defense.device)), threat)
        tally = Tally.of(images.labels[part], certificate.prediction.cpu(), certificate.certified.cpu())
        counts = [sum(pair) for pair in zip(counts, (tally.images, tally.clean, tally.certified), strict=True)]
    return Tally(*(int(count) for count in ranks.total(*counts)))
