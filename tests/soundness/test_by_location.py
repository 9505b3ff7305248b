"""What each registered defense says can be forced at a location, and which classes stay among the first: against every change.

The enemy is that of ``arena.py``: it writes everything into each location in turn and collects the answers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchcert_cli import Claim, UsageError, defenses
from patchcert_cli.certifiers.bounds import by_location as by_bounds
from patchcert_cli.certifiers.cells import by_location as by_votes
from patchcert_cli.certifiers.cells import robust_masking
from patchcert_cli.certifiers.masks import mask_sets
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import PatchcertError
from patchcert_cli.threats import Patch, Sparse
from tests.examples import tiny

from .arena import Attack, changes, draw_images, places, random_defense, random_region

THREATS: list[Attack] = [Patch(2, 2), Patch(1, 3), Sparse(1)]
LOCATING = ("bagcert", "clipped", "ibp", "partition", "patchcleanser", "patchguard", "smoothing")  # besides ensembles, which may
RANKING = ("bagcert", "clipped", "ibp", "partition", "smoothing")


def brought_about(defense: Defense, images: Tensor, threat: Attack) -> Tensor:
    """The answers that some content of each location leads to, bool [B, A, K]."""
    mask, value = changes(defense.input_shape, threat)
    attacked = torch.where(mask[:, None], value[:, None], images)  # [A * R, B, C, H, W]
    after = defense.predict(attacked.flatten(0, 1)).reshape(len(places(defense.input_shape, threat)), -1, len(images))
    return torch.nn.functional.one_hot(after, len(defense.classes)).bool().any(dim=1).transpose(0, 1)


def assert_sound(defense: Defense, images: Tensor, threat: Attack, *, exact: bool) -> tuple[int, int]:
    """Returns for how many pairs of image and location only the answer is left, and how many change it."""
    certificate, plain = defense.certify(images, threat, forced=True), defense.certify(images, threat)
    assert certificate.forced is not None and plain.forced is None
    for name in ("prediction", "certified", "margin", "worst", "runner_up"):
        assert torch.equal(getattr(certificate, name), getattr(plain, name)), name
    real = brought_about(defense, images, threat)
    assert not bool((real & ~certificate.forced).any()), threat
    alone = (certificate.forced.sum(dim=2) == 1).all(dim=1)
    assert bool((~certificate.certified | alone).all())
    if exact:
        assert torch.equal(certificate.certified, alone)
    return int((certificate.forced.sum(dim=2) == 1).sum()), int((real.sum(dim=2) > 1).sum())


def example(name: str, seed: int) -> Defense:
    """Of BagCert one with cells of one pixel, of which a location touches few."""
    return random_region("single", seed) if name == "bagcert" else tiny(name, seed)


def checked(name: str) -> tuple[int, int]:
    kept = harmed = 0
    for seed in range(3):
        defense = example(name, seed)
        for threat in THREATS:
            if isinstance(threat, Sparse) and name == "patchcleanser":
                continue
            counts = assert_sound(defense, draw_images(defense.input_shape, 8, seed), threat, exact=name != "ibp")
            kept, harmed = kept + counts[0], harmed + counts[1]
    return kept, harmed


@pytest.mark.parametrize("name", LOCATING)
def test_no_change_of_a_location_brings_about_what_its_set_lacks(name: str) -> None:
    kept, harmed = checked(name)
    assert kept > 100 and harmed > 15


@pytest.mark.parametrize("kind", ["cnn", "linear", "deep"])
def test_bounds_of_other_networks_are_sound_by_location(kind: str) -> None:
    kept = 0
    for seed in range(3):
        defense = random_defense(kind, (1, 4, 4), seed, whole=seed == 1)
        for threat in (Patch(1, 2), Patch(2, 2), Sparse(1, "value")):
            kept += assert_sound(defense, draw_images(defense.input_shape, 12, seed), threat, exact=False)[0]
    assert kept > 100


def ranks_after(
    defense: Defense, images: Tensor, threat: Attack, stays: Tensor, ranking: Tensor, scores: Callable[..., Tensor]
) -> int:
    """Check that no change expels a class that is to stay; returns how many of them are expelled without such a promise."""
    mask, value = changes(defense.input_shape, threat)
    attacked = torch.where(mask[:, None], value[:, None], images).flatten(0, 1)
    order = scores(attacked).sort(dim=1, descending=True, stable=True).indices[:, : ranking.shape[1]]
    order = order.reshape(len(mask), len(images), -1)
    inside = (order[..., None] == ranking[None, :, None, :]).any(dim=2).all(dim=0)  # [B, k]
    assert not bool((stays & ~inside).any())
    return int((~inside).sum())


def _scores(defense: Defense) -> Callable[..., Tensor]:
    if isinstance(defense, defenses.VotingDefense):
        return lambda x: defense.votes(x).sums()
    return lambda x: defense.network(x)


@pytest.mark.parametrize("name", RANKING)
def test_no_change_expels_a_class_that_is_certified_to_stay(name: str) -> None:
    staying = expelled = 0
    for seed in range(4):
        defense = example(name, seed)
        images = draw_images(defense.input_shape, 6, seed)
        for threat in (Patch(1, 2), Patch(2, 2), Sparse(1)):
            found, plain = defense.certify(images, threat, top=2), defense.certify(images, threat)
            assert found.ranking is not None and found.stays is not None
            assert found.top == 2 and plain.top == 1 and plain.ranking is None and plain.stays is None
            assert torch.equal(found.ranking[:, 0], plain.prediction) and torch.equal(found.stays[:, 0], found.certified)
            assert bool((found.certified | ~plain.certified).all()), "what stays the first stays among the first"
            expelled += ranks_after(defense, images, threat, found.stays, found.ranking, _scores(defense))
            staying += int(found.stays.sum())
    assert staying > 8 and (expelled > 8 or name == "bagcert")


@pytest.mark.parametrize("kind", ["cnn", "linear"])
def test_rankings_by_bounds_of_other_networks_are_sound(kind: str) -> None:
    defense = random_defense(kind, (1, 4, 4), 1, whole=True)
    images = draw_images((1, 4, 4), 24, 1)
    for threat in (Patch(1, 2), Patch(2, 2), Sparse(1)):
        found = defense.certify(images, threat, top=2)
        assert found.stays is not None and found.ranking is not None and bool(found.stays.any())
        ranks_after(defense, images, threat, found.stays, found.ranking, _scores(defense))


Break = Callable[[pytest.MonkeyPatch], None]


def votes_of_other_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    original = by_votes.forced
    monkeypatch.setattr(by_votes, "forced", lambda parts: (found := original(parts)) & found.roll(1, 1))


def evidence_of_other_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    original = robust_masking.forced
    monkeypatch.setattr(robust_masking, "forced", lambda *given: original(*given) & original(*given).roll(1, 1))


def masks_that_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask need not hide all of a location."""
    monkeypatch.setattr(mask_sets.MaskSet, "hides", lambda self, threat: torch.ones(threat.count(4, 4), len(self)).bool())


def last_location_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    original = by_bounds.margin_iterator

    def kept(*args: object) -> object:
        stream = original(*args)  # type: ignore[arg-type]
        chunks = stream.chunks

        def without(*given: object) -> object:
            for chunk in chunks(*given):  # type: ignore[arg-type]
                chunk[-1] = 100.0
                yield chunk

        stream.chunks = without  # type: ignore[method-assign, assignment]
        return stream

    monkeypatch.setattr(by_bounds, "margin_iterator", kept)


BREAKS: dict[str, tuple[Break, str]] = {
    "sets of other locations": (votes_of_other_locations, "clipped"),
    "sets of other locations, masked": (evidence_of_other_locations, "patchguard"),
    "masks that do not hide the location": (masks_that_touch, "patchcleanser"),
    "the last location is safe": (last_location_left_out, "ibp"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_sets_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, name = BREAKS[broken]
    change(monkeypatch)
    with pytest.raises((AssertionError, PatchcertError)):
        checked(name)


def test_what_has_no_proof_is_refused() -> None:
    x = torch.rand(1, 1, 4, 4)
    with pytest.raises(UsageError, match="cannot say what can be forced"):
        tiny("minority").certify(x, "patch:2x2", forced=True)
    with pytest.raises(UsageError, match="cannot say what can be forced"):
        tiny("roots").certify(x, "patch:2x2", forced=True)
    with pytest.raises(UsageError, match="2 locations"):
        tiny("bagcert").certify(x, "sparse:2", forced=True)
    with pytest.raises(UsageError, match="2 locations"):
        tiny("bagcert").certify(x, "patches:2:1x1", forced=True)
    with pytest.raises(UsageError, match="no proof that an answer stays among the first 2"):
        tiny("patchcleanser").certify(x, "patch:2x2", top=2)
    for top in (0, 3, -1):
        with pytest.raises(UsageError, match=f"the first {top} of 3 classes"):
            tiny("bagcert").certify_claims(x, [Claim(Patch(1, 1), top=top)])


def test_no_other_defense_has_such_proofs() -> None:
    for name in defenses.names():
        defense = tiny(name)
        assert defense.locates == (name in LOCATING) or name == "ensemble"
        assert defense.ranks == (name in RANKING)


def test_empty_batches_have_empty_sets() -> None:
    for name in LOCATING:
        found = tiny(name).certify(torch.zeros(0, 1, 4, 4), "patch:2x2", forced=True)
        assert found.forced is not None and found.forced.shape == (0, 9, 3)
    for name in RANKING:
        found = tiny(name).certify(torch.zeros(0, 1, 4, 4), "patch:2x2", top=2)
        assert found.stays is not None and found.stays.shape == (0, 2)
