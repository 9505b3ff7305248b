"""Certifiers that are wrong in one known way, to show that the soundness checks would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from certifiers import ballot_breaks
from torch import Tensor

from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.bounds import first_layer, intervals, margin_chunks, rounding
from patchcert_cli.certifiers.bounds.windows import patch_windows, windows
from patchcert_cli.certifiers.geometry import Axis, touched_range
from patchcert_cli.defenses import VotingDefense
from patchcert_cli.defenses._cells import RegionDefense
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.layers import fixed_point
from patchcert_cli.threats import Patch, PatchPercent, Sparse

Break = Callable[[pytest.MonkeyPatch], None]


def last_locations_missing(axis: int) -> Break:
    """The last row (axis 0) or column (axis 1) of patch locations is never looked at."""

    def without(chunks: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Tensor]]:
        def kept(self: Any, *args: Any) -> Iterator[Tensor]:
            start = self.patch.locations(*self.x.shape[2:])[:, axis]
            margins = torch.cat(list(chunks(self, *args)))
            margins[start >= max(int(start.max()), 1)] = float("inf")
            yield margins

        return kept

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        for stream in (margin_chunks.DenseMargins, margin_chunks.WindowMargins):
            monkeypatch.setattr(stream, "chunks", without(stream.chunks))

    return apply


def _resolved(change: Callable[[Any], Any]) -> Break:
    """Another threat is certified than the one that is claimed."""
    original, prove = rounding.resolve, rounding.prove

    def proven(*args: Any) -> rounding.Proof:
        proof = prove(*args)
        return replace(proof, worst=proof.worst * 0)  # the index would belong to the other threat

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rounding, "resolve", lambda *args: change(original(*args)))
        monkeypatch.setattr(rounding, "prove", proven)

    return apply


def _smaller(threat: Patch | Sparse) -> Patch | Sparse:
    return Patch(max(threat.height - 1, 1), max(threat.width - 1, 1)) if isinstance(threat, Patch) else threat


def _one_column_less(threat: Patch | Sparse) -> Patch | Sparse:
    return Patch(threat.height, max(threat.width - 1, 1)) if isinstance(threat, Patch) else threat


def _one_less(threat: Patch | Sparse) -> Patch | Sparse:
    return replace(threat, k=max(threat.k - 1, 1)) if isinstance(threat, Sparse) else threat


def _other_unit(threat: Patch | Sparse) -> Patch | Sparse:
    if isinstance(threat, Patch):
        return threat
    return replace(threat, unit="pixel" if threat.unit == "value" else "value")


def radius_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Touched entries move only half of their way."""
    sums, pixels = margin_chunks.window_sums, windows.Windows._pixels
    gains, convolution = first_layer.largest_gains, first_layer._convolution_gains

    def halved(*args: Any) -> windows.DeviationBox:
        field = pixels(*args)
        return replace(field, radius=field.radius / 2)

    monkeypatch.setattr(margin_chunks, "window_sums", lambda *args: sums(*args) / 2)
    monkeypatch.setattr(windows.Windows, "_pixels", halved)
    monkeypatch.setattr(first_layer, "largest_gains", lambda *args, **more: tuple(part / 2 for part in gains(*args, **more)))
    monkeypatch.setattr(first_layer, "_convolution_gains", lambda *args: tuple(part / 2 for part in convolution(*args)))


def _judged(rule: Callable[[Certificate], Tensor]) -> Break:
    original = IntervalDefense.certify

    def certify(self: IntervalDefense, x: Tensor, threat: Any, method: str | None = None) -> Certificate:
        certificate = original(self, x, threat, method)
        return replace(certificate, certified=rule(certificate))

    return lambda monkeypatch: monkeypatch.setattr(IntervalDefense, "certify", certify)


def _margins(change: Callable[[intervals.Margins, margin_chunks.MarginIterator, Tensor], intervals.Margins]) -> Break:
    original = rounding.minimum

    def margins(stream: margin_chunks.MarginIterator, target: Tensor) -> intervals.Margins:
        return change(original(stream, target), stream, target)

    return lambda monkeypatch: monkeypatch.setattr(rounding, "minimum", margins)


def _runner_up_only(margins: intervals.Margins, stream: Any, target: Tensor) -> intervals.Margins:
    logits = stream.x
    for layer in stream.split.layers:
        logits = layer(logits)
    logits = logits.scatter(1, target[:, None], float("-inf"))
    rival = torch.arange(logits.shape[1]) == logits.argmax(dim=1)[:, None]
    return replace(margins, values=torch.where(rival, margins.values, 1e6))


def _grouped_by_target(margins: intervals.Margins, stream: Any, target: Tensor) -> intervals.Margins:
    order = target.argsort(stable=True)
    return intervals.Margins(margins.values[order], margins.worst[order])


def wrong_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper bounds stand where lower bounds belong."""
    original = margin_chunks.ClassDifference.__init__

    def swapped(self: margin_chunks.ClassDifference, *args: Any) -> None:
        original(self, *args)
        self.halves = [torch.cat(list(reversed(half.chunk(2, dim=1))), dim=1) for half in self.halves]

    monkeypatch.setattr(margin_chunks.ClassDifference, "__init__", swapped)


def largest_over_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best location decides instead of the worst."""

    def largest(chunks: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.cat(list(chunks)).max(dim=0)
        return found[0], found[1]

    monkeypatch.setattr(intervals, "_smallest", largest)


def percent_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A percentage becomes a patch one pixel too small."""
    original = PatchPercent.resolve
    monkeypatch.setattr(PatchPercent, "resolve", lambda *args: Patch(*(max(1, original(*args).height - 1),) * 2))


PATCH_BREAKS: dict[str, Break] = {
    "last row of locations missing": last_locations_missing(0),
    "last column of locations missing": last_locations_missing(1),
    "patch one pixel smaller": _resolved(_smaller),
    "patch one column narrower": _resolved(_one_column_less),
    "largest over locations": largest_over_locations,
    "margins given to other images": _margins(_grouped_by_target),
}


def _touched(change: Callable[[patch_windows.SlidingAxis, int, int], tuple[int, int]]) -> Break:
    """Windows of convolutions and pooling are others than those that a patch can reach."""
    return lambda monkeypatch: monkeypatch.setattr(
        patch_windows.SlidingAxis, "touched", lambda self, start, side, clip: change(self, start, side)
    )


def _clipped(slide: patch_windows.SlidingAxis, start: int, side: int, *, padding: int | None = None) -> tuple[int, int]:
    padding = slide.padding if padding is None else padding
    first, last = touched_range(start, side, kernel=slide.extent, stride=slide.stride, padding=padding, size=slide.size)
    return first, max(last - first, 0)


def _one_short(slide: patch_windows.SlidingAxis, start: int, side: int) -> tuple[int, int]:
    first, count = _clipped(slide, start, side)
    return first, max(count - 1, 1)


def _one_late(slide: patch_windows.SlidingAxis, start: int, side: int) -> tuple[int, int]:
    first, count = _clipped(slide, start, side)
    return (first + 1, count - 1) if count > 1 else (first, count)


WINDOW_BREAKS: dict[str, Break] = {
    "window one cell short": _touched(_one_short),
    "window begins one cell late": _touched(_one_late),
    "padding forgotten": _touched(lambda slide, start, side: _clipped(slide, start, side, padding=0)),
}
SPARSE_BREAKS: dict[str, Break] = {
    "budget k - 1": _resolved(_one_less),
    "pixels and values mixed up": _resolved(_other_unit),
}
COMMON_BREAKS: dict[str, Break] = {
    "radius halved": radius_halved,
    "wrong side": wrong_side,
    "runner-up only": _margins(_runner_up_only),
    "a margin of zero is enough": _judged(lambda c: c.margin >= 0),
    "tolerance with the wrong sign": _judged(lambda c: c.margin > -c.tolerance),
    "margin a little below zero": _judged(lambda c: c.margin > -0.1),
}


def covering(change: Callable[[Any], Any]) -> Break:
    """Votes are certified against another threat than the one that is claimed."""
    original = VotingDefense.cover_of
    return lambda monkeypatch: monkeypatch.setattr(VotingDefense, "cover_of", lambda self, threat: original(self, change(threat)))


def answer_of_another_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is sure, the proof is about another class than the deployed answer."""
    original = VotingDefense.certify_claims

    def certify_claims(self: VotingDefense, x: Tensor, claims: Any) -> list[Certificate]:
        return [
            replace(certificate, prediction=(certificate.prediction + (certificate.margin > 1)) % len(self.classes))
            for certificate in original(self, x, claims)
        ]

    monkeypatch.setattr(VotingDefense, "certify_claims", certify_claims)


def mirrored_cells_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of the mirrored image are added where they are, not where they belong."""
    original = RegionDefense.scores

    def scores(self: Any, x: Tensor) -> Tensor:
        found = original(self, x)
        if not self.scorer.mirrored:
            return found
        steps = fixed_point.to_steps(x)
        return (self.run(steps).double() + self.run(steps.flip(3)).double()) / 2

    monkeypatch.setattr(RegionDefense, "scores", scores)


def frame_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are counted with the frame around the image, but numbered as if there were none."""

    def sliding(length: int, side: int, *, kernel: int, stride: int = 1, padding: int = 0) -> Axis:
        cells = (length + 2 * padding - kernel) // stride + 1
        ranges = (touched_range(at, side, kernel=kernel, stride=stride, padding=0, size=cells) for at in range(length - side + 1))
        return Axis(cells, tuple(tuple(range(*ends)) for ends in ranges))

    monkeypatch.setattr(Axis, "sliding", sliding)


# those about wrapping and about a third class are caught by the enemy of ``test_additive.py``
VOTE_BREAKS: dict[str, tuple[Break, str]] = {
    **{name: known for name, known in ballot_breaks.BREAKS.items() if name not in ("no wrap-around", "runner-up only")},
    "patch one pixel smaller": (covering(_smaller), "exact"),
    "patch one column narrower": (covering(_one_column_less), "exact"),
    "a proof about another answer": (answer_of_another_network, "exact"),
}
VOTE_SPARSE_BREAKS: dict[str, Break] = {**ballot_breaks.SPARSE_BREAKS, "budget k - 1 in the cover": covering(_one_less)}
