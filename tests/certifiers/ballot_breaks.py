"""Proofs about voting cells that are wrong in one known way, to show that an enemy who tries everything would see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from patchcert_cli.certifiers import geometry
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.certifiers.cells.additive import Proof, Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage

Break = Callable[[pytest.MonkeyPatch], None]


def window_one_short(side: int) -> Break:
    original = geometry.touched_range

    def shorter(*args: Any, **options: Any) -> tuple[int, int]:
        first, stop = original(*args, **options)
        return (first, max(first, stop - 1)) if side else (min(first + 1, stop), stop)

    return lambda monkeypatch: monkeypatch.setattr(geometry, "touched_range", shorter)


def proving(change: Callable[[Votes, CellCoverage, str, Callable[..., Proof]], Proof]) -> Break:
    """Another proof in the place of :func:`additive.prove`, which it is given."""
    original = additive.prove

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(additive, "prove", lambda votes, cover, method="exact": change(votes, cover, method, original))

    return apply


def runner_up_only(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
    """Nobody votes for the third and the rest."""
    total = votes.sums().double() - torch.arange(votes.scores.shape[1]) / 1000
    two = total.topk(2, dim=1).indices
    kept = torch.zeros_like(total).scatter(1, two, 1)[:, :, None, None]
    return prove(Votes((votes.scores * kept).long(), None, votes.weight), cover, method)


def weights_times(factor: float) -> Callable[..., Proof]:
    """What a cell can be made to say counts so much less; without it, votes are lost but never won."""

    def weighted(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
        weight = torch.ones(votes.scores.shape[2:]) if votes.weight is None else votes.weight.float()
        return prove(Votes(votes.scores, votes.unknown, weight * factor), cover, method)

    return weighted


def ties_always_stay(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
    proof = prove(votes, cover, "3.2")
    return replace(proof, margin=proof.margin + 1)


def ties_to_the_highest(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
    proof, last = prove(Votes(votes.scores.flip(1), None, votes.weight), cover, method), votes.scores.shape[1] - 1
    return replace(proof, answer=last - proof.answer, rival=last - proof.rival)


def credit_of_the_other_side(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
    proof = prove(votes, cover, "3.2")
    return replace(proof, margin=proof.margin + (proof.answer > proof.rival))


def one_location_of_several(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
    return prove(votes, replace(cover, budget=max(1, cover.budget - 1)), method)


def given_to_other_images(votes: Votes, cover: CellCoverage, method: str, prove: Callable[..., Proof]) -> Proof:
    proof = prove(votes, cover, method)
    return replace(proof, margin=proof.margin[proof.answer.argsort(stable=True)])


def no_wrap_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def bands(length: int, side: int, *, band: int, stride: int = 1) -> Axis:
        shown = [set(range(first, min(first + band, length))) for first in range(0, length, stride)]
        patches = [set(range(start, start + side)) for start in range(length - side + 1)]
        return Axis(len(shown), tuple(tuple(i for i, pixels in enumerate(shown) if pixels & patch) for patch in patches))

    monkeypatch.setattr(Axis, "bands", bands)


def distinct(keep: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Break:
    original = Axis.distinct
    return lambda monkeypatch: monkeypatch.setattr(Axis, "distinct", lambda axis: keep(original(axis)))


def largest_location_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts that touch fewer cells than the most are dropped, though no single other one covers them."""

    def largest(axis: Axis) -> tuple[int, ...]:
        most = max(len(cells) for cells in axis.touched)
        return (next(start for start, cells in enumerate(axis.touched) if len(cells) == most),)

    monkeypatch.setattr(Axis, "distinct", largest)


BREAKS: dict[str, tuple[Break, str]] = {
    "window one cell short at the end": (window_one_short(1), "exact"),
    "window one cell short at the start": (window_one_short(0), "exact"),
    "runner-up only": (proving(runner_up_only), "exact"),
    "half of the cells": (proving(weights_times(0.5)), "exact"),
    "votes are lost but never won": (proving(weights_times(0)), "exact"),
    "ties always stay": (proving(ties_always_stay), "exact"),
    "answer of the highest index": (proving(ties_to_the_highest), "exact"),
    "credit of the other side": (proving(credit_of_the_other_side), "exact"),
    "margins given to other images": (proving(given_to_other_images), "exact"),
    "last distinct start dropped": (distinct(lambda starts: starts[:-1] or starts), "exact"),
    "first distinct start dropped": (distinct(lambda starts: starts[1:] or starts), "exact"),
    "only one of the largest starts": (largest_location_only, "exact"),
    "global rule with a factor of 1": (proving(weights_times(0.5)), "3.3"),
    "no wrap-around": (no_wrap_around, "exact"),
}
SPARSE_BREAKS: dict[str, Break] = {"budget k - 1": proving(one_location_of_several)}
