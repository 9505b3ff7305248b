"""Double masking: the deployed answer of PatchCleanser, and the proof that no patch alters it.

Let f(i, j) be the label that a classifier gives to an image under masks i and j; f(i, i) is under one mask.

**The answer.** Round one: all f(i, i). If they agree, that label. Otherwise let M be the most frequent one, ties to the lowest
class index. Round two: for each i with d = f(i, i) != M in the order of indices: if f(i, j) = d for every j, the answer is d. If
there is none, it is M (Xiang, Mahloujifar & Mittal, PatchCleanser: Certifiably Robust Defense against Adversarial Patches, USENIX
Security 2022, algorithm 1).

**Theorem.** If for every set L of pixels that an attack may touch there is a mask i that hides all of L, with f(i, j) = y on the
clean image for every j, then the answer is y for any content of L.

*Proof.* f(i, j) never sees L, so the whole row i is y under attack too. If all f(k, k) agree, they agree with f(i, i) = y.
Otherwise a k with d = f(k, k) != y fails in round two: its entry f(k, i) = f(i, k) is y. So the answer is M, or that of some k
with f(k, k) = y. If M = y, either is y. If M != y, i itself passes round two, so some k is answered, and its label is y. QED.

Neither the order of ties nor the unmasked image plays a role. The published condition, f(i, j) = y for all pairs, implies this
one, and requires more than is needed where several masks hide a location.

**Rounding.** The theorem is about one function f of the image. Of a network that computes exactly
(:mod:`patchcert_cli.layers.fixed_point`) there is one. Of any other network f is what is computed, and a label counts as y only
if y is ahead of every other class by more than ``tolerance``: a certificate then holds as far as rounding moves no logit margin
by more than that, which :mod:`patchcert_cli.certifiers.masks.masked_predictions` measures and does not prove.

Shapes: B images, M masks, n passes, U sets of masks of which one is to be whole
    (:class:`patchcert_cli.certifiers.masks.mask_sets.MaskCoverage`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchcert_cli.certifiers.masks.masked_predictions import MaskedPredictions
from patchcert_cli.errors import UsageError
from patchcert_cli.layers.precision import first_largest

METHODS = ("rows", "pairs")  # the theorem, and the published condition
MOST_CLASSES = 2**31  # classes that a table can hold
FIRST = 6  # pairs of an image that are evaluated first; then twice as many each time


Ask = Callable[[Tensor, Tensor, Tensor], MaskedPredictions]  # image, mask, mask, each int64 [n]


class Table:
    """What is known of f for B images: [B, M, M], symmetric. Every pair is evaluated at most once.

    Attributes:
        label: int32, -1 where unknown.
        rival: int32.
        logit_margin: float32; 0 where it is not finite, which certifies nothing.
        passes: int64 [B], how many pairs were asked for.
    """

    def __init__(self, ask: Ask, images: int, masks: int) -> None:
        self._ask, self.images, self.masks = ask, images, masks
        self.label = torch.full((images, masks, masks), -1, dtype=torch.int32)
        self.rival, self.logit_margin = torch.full_like(self.label, -1), torch.zeros(self.label.shape)
        self.passes = torch.zeros(images, dtype=torch.int64)

    def fill(self, image: Tensor, first: Tensor, second: Tensor) -> None:
        """Ask for pairs of masks, all int64 [n], that are not known; none appears twice."""
        new = self.label[image, first, second] < 0
        image, first, second = image[new], first[new], second[new]
        if not len(image):
            return
        told = self._ask(image, first, second)
        for classes in (told.label, told.rival):
            if bool(((classes < 0) | (classes >= MOST_CLASSES)).any()):
                raise UsageError(
                    f"a classifier that answers class {int(classes.max())} or below 0.",
                    hint=f"Classes are 0 to {MOST_CLASSES - 1}.",
                )
        logit_margin = torch.nan_to_num(told.logit_margin, nan=0.0, posinf=0.0, neginf=0.0)
        for mine, new in ((self.label, told.label), (self.rival, told.rival), (self.logit_margin, logit_margin)):
            mine[image, first, second] = mine[image, second, first] = new.to(mine)
        self.passes += torch.bincount(image, minlength=self.images)

    def one(self) -> Tensor:
        """Labels of round one, int64 [B, M]."""
        image, mask = torch.ones(self.images, self.masks).nonzero().T
        self.fill(image, mask, mask)
        return self.label.diagonal(dim1=1, dim2=2).long()

    def towards(self, label: Tensor) -> Tensor:
        """Signed logit margin of ``label`` [B] for each single mask, float32 [B, M]; negative where another class wins."""
        logit_margin = self.logit_margin.diagonal(dim1=1, dim2=2)
        return torch.where(self.one() == label[:, None], logit_margin, -logit_margin)


def answer(table: Table, classes: int) -> Tensor:
    """The deployed answer, int64 [B]."""
    one = table.one()
    votes = torch.zeros(table.images, classes, dtype=torch.int64).scatter_add_(1, one, torch.ones_like(one))
    result = first_largest(votes)
    asked = one != result[:, None]  # [B, M], the masks that may still pass round two
    size = torch.full((table.images,), FIRST)  # of each image on its own, so that its passes do not depend on the others
    while bool(asked.any()):
        at = asked.any(dim=1).nonzero()[:, 0]
        row = asked[at].int().argmax(dim=1)  # the first of each image
        candidate = one[at, row]
        entries = table.label[at, row]  # [b, M]
        passed = (entries == candidate[:, None]).all(dim=1)
        failed = ((entries >= 0) & (entries != candidate[:, None])).any(dim=1)
        result[at[passed]] = candidate[passed]
        asked[at[passed]] = False
        asked[at[failed], row[failed]] = False
        open_ = ~(passed | failed)
        score = table.towards(result.scatter(0, at, candidate))[at]  # masks that speak against the candidate come first
        number, column = _lowest(torch.where((entries < 0) & open_[:, None], score, torch.inf), size[at])
        table.fill(at[number], row[number], column)
        size[at[open_]] = (2 * size[at[open_]]).clamp(max=table.masks)  # without a limit it overflows after 60 rows
    return result


@dataclass(frozen=True)
class Proof:
    """What is proven of one claim.

    Attributes:
        certified: bool [B].
        margin: float64 [B], the smallest logit margin of the answer in the rows that the proof rests on; where nothing is proven,
            at most ``tolerance``.
        weakest: int64 [B], which of the U sets of masks has that logit margin.
        rival: int64 [B], the class that comes nearest there.
    """

    certified: Tensor
    margin: Tensor
    weakest: Tensor
    rival: Tensor


def lowest(table: Table, label: Tensor) -> Tensor:
    """The smallest logit margin of ``label`` [B] in each whole row: float64 [B, M]; negative where another class is ahead."""
    image, first, second = (table.label < 0).triu().nonzero().T
    table.fill(image, first, second)
    return torch.where(table.label == label[:, None, None], table.logit_margin, -table.logit_margin).amin(dim=2).double()


def forced(table: Table, label: Tensor, hides: Tensor, tolerance: float, certified: Tensor) -> Tensor:
    """At which locations an attacker may alter the answers: where no mask that hides the location has a whole row, bool [B, A].

    This is the theorem for each location alone. With a whole row of another label the answer would be that one, so a whole row of
    ``label`` is what there is to look for. For images that are not certified all pairs are evaluated.

    Args:
        table: what is known of the images.
        label: int64 [B], the deployed answers.
        hides: bool [A, M], which masks hide which location.
        tolerance: a label counts if it is ahead by more.
        certified: bool [B], the theorem holds for every location.
    """
    open_ = (~certified).nonzero()[:, 0]
    image, pair = open_.repeat_interleave(table.masks**2), torch.arange(table.masks**2).repeat(len(open_))
    first, second = pair // table.masks, pair % table.masks
    wanted = (first <= second) & (table.label[image, first, second] < 0)
    table.fill(image[wanted], first[wanted], second[wanted])
    right = (table.label[open_] == label[open_, None, None]) & (table.logit_margin[open_] > tolerance)
    found = torch.zeros(table.images, len(hides), dtype=torch.bool)
    found[open_] = ~_served(right.all(dim=2), hides)
    return found


def prove(table: Table, label: Tensor, by: Tensor, tolerance: float, seen: Tensor | None = None) -> Proof:
    """Decide the theorem's condition for the answers ``label`` [B] and sets of masks ``by``, bool [U, M].

    ``seen``, bool [B, M, M], is what the proof may know at first, by default all that the table knows. With what was known when
    the answer was found, a claim has the same margins whichever other claims are made.

    In every set some mask must get a whole row. Rows are chosen so that few of them cover all sets. Of their pairs, those whose
    single masks have the smallest signed margins are evaluated first. An image is finished as soon as it is decided.
    """
    single = table.towards(label)
    seen = table.label >= 0 if seen is None else seen.clone()
    certified = torch.zeros(table.images, dtype=torch.bool)
    at, size = torch.arange(table.images), FIRST
    while len(at):
        unknown = ~seen[at]
        right = ~unknown & (table.label[at] == label[at, None, None]) & (table.logit_margin[at] > tolerance)
        alive = (right | unknown).all(dim=2)  # [b, M]
        certified[at] = _served(right.all(dim=2), by).all(dim=1)
        open_ = ~certified[at] & _served(alive, by).all(dim=1)
        at, unknown, alive = at[open_], unknown[open_], alive[open_]
        rows = _few(alive, single[at], unknown.sum(dim=2), by)
        wanted = (unknown & (rows[:, :, None] | rows[:, None, :])).triu()
        score = single[at, :, None] + single[at, None, :]
        number, pair = _lowest(torch.where(wanted, score, torch.inf).flatten(1), torch.full((len(at),), size))
        image, first, second = at[number], pair // table.masks, pair % table.masks
        table.fill(image, first, second)
        seen[image, first, second] = seen[image, second, first] = True
        size = min(2 * size, table.masks**2)
    return _told(table, label, by, certified, seen)


def _lowest(score: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the ``size`` [b] lowest finite entries of each row of [b, N], of equals the first: int64 [n] and [n]."""
    ranked = score.sort(dim=1, stable=True)
    wanted = (ranked.values < torch.inf) & (torch.arange(score.shape[1]) < size[:, None])
    row, place = wanted.nonzero().T
    return row, ranked.indices[row, place]


def _served(rows: Tensor, by: Tensor) -> Tensor:
    """Which sets have a mask among ``rows``: bool [B, M], bool [U, M] -> bool [B, U]."""
    return (rows.float() @ by.float().T) > 0


def _few(alive: Tensor, score: Tensor, missing: Tensor, by: Tensor) -> Tensor:
    """Few rows, of those ``alive`` [b, M], that serve all sets: bool [b, M].

    Greedily the row that serves the most sets for each pair of it that is ``missing`` [b, M]; of equals the one of the highest
    ``score`` [b, M].
    """
    if bool((by.sum(dim=1) == 1).all()):  # one mask hides each location
        return alive & by.any(dim=0)
    chosen, sets = torch.zeros_like(alive), by.float()
    rank = score.argsort(dim=1).argsort(dim=1) / alive.shape[1]  # [b, M] in [0, 1)
    left = torch.ones(len(alive), len(by))  # sets not served yet
    while bool((left > 0).any()):
        gain = left @ sets
        best = torch.where(alive & (gain > 0), (gain + rank) / (missing + 1), -1.0).argmax(dim=1)
        needed = left.any(dim=1)
        chosen[needed, best[needed]] = True
        left *= 1 - sets.T[best]
    return chosen


def _told(table: Table, label: Tensor, by: Tensor, certified: Tensor, known: Tensor) -> Proof:
    """Margins from what is known, bool [B, M, M], and where they are."""
    signed = torch.where(table.label == label[:, None, None], table.logit_margin, -table.logit_margin)
    entries = torch.where(known, signed, torch.inf)
    entries[certified] = entries[certified].masked_fill(~known[certified].all(dim=2, keepdim=True), -torch.inf)
    least, column = entries.min(dim=2)  # [B, M]
    best, row = torch.where(by, least[:, None, :], -torch.inf).max(dim=2)  # [B, U]
    margin, weakest = best.min(dim=1)
    image = torch.arange(table.images)
    row = row[image, weakest]
    column = column[image, row]
    told = table.label[image, row, column].long()
    rival = torch.where(told == label, table.rival[image, row, column].long(), told)
    return Proof(certified, margin.double(), weakest, rival)
