"""NaN and infinity in every proof: whatever they stand for, they certify nothing, and every proof ends."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import rounding
from patchcert_cli.certifiers.bounds.linear import linear, refine, relaxations
from patchcert_cli.certifiers.bounds.linear.relaxations import Form
from patchcert_cli.certifiers.cells import additive, robust_masking
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.certifiers.masks import double_masking, masked_detection
from patchcert_cli.certifiers.masks.masked_detection import MaskedOutputs
from patchcert_cli.certifiers.masks.masked_predictions import MaskedPredictions
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import UsageError
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, Sparse, Threat

from .networks import LAYOUTS, images, network

NO_NUMBERS = [float("nan"), float("inf"), -float("inf")]
NAN = float("nan")


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", ["mlp2", "mlp-norm-inside", "conv-norm", "conv-max-pool", "conv-last", "relu-last", "pool-last"])
def test_a_weight_that_is_no_number_certifies_nothing(name: str, value: float) -> None:
    layout = LAYOUTS[name]
    net, x = network(name), images(layout.shape, 3)
    seen = 0
    for at, weight in enumerate(net.state_dict().values()):
        if not weight.is_floating_point():
            continue
        broken = copy.deepcopy(net)
        list(broken.state_dict().values())[at].view(-1)[-1] = value
        classes = broken(x).shape[1]
        made = IntervalDefense(broken, input_shape=layout.shape, classes=tuple("abcdefg"[:classes])).eval()
        made.trust()  # the self-test refuses some of them before any proof
        threats: list[Threat] = [Patch(1, 1), *([Sparse(1)] if layout.sparse else [])]
        for threat in threats:
            for method in ("interval", "linear"):
                certificate = made.certify(x, threat, method)
                logits = broken.double()(x.double())
                broken.float()
                if not bool(logits.isfinite().all()):  # an infinite variance makes a channel constant, which is a number
                    assert not bool(certificate.certified.any()), (at, threat, method)
                    seen += 1
    assert seen >= 4


def test_bounds_that_are_no_numbers_are_not_taken_by_linear_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = precision.double(network("mlp2")), images((1, 4, 5), 12).double()
    target = net(x).argmax(dim=1)
    threat = Patch(1, 1)
    proof = rounding.prove(net, net, x, target, threat)
    open_ = replace(proof, margin=torch.full_like(proof.margin, -1e-3))  # as if intervals left everything open
    assert bool((refine.improve(net, x, target, threat, open_).margin > 0).any())
    for value in NO_NUMBERS:
        none = refine.improve(net, x, target, threat, replace(proof, margin=torch.full_like(proof.margin, value)))
        assert not bool((none.margin > none.tolerance)[~torch.isposinf(none.margin)].any())
    bounds = linear.Engine.bounds
    monkeypatch.setattr(linear.Engine, "bounds", lambda self, query: bounds(self, query) * NAN)
    none = refine.improve(net, x, target, threat, open_)
    assert not bool((none.margin > none.tolerance).any())
    monkeypatch.setattr(linear.Engine, "bounds", bounds)
    intervals = linear.Engine.intervals
    monkeypatch.setattr(linear.Engine, "intervals", lambda self, chosen: intervals(self, chosen) * NAN)
    none = refine.improve(net, x, target, threat, open_)
    assert not bool((none.margin > none.tolerance).any())
    monkeypatch.setattr(linear.Engine, "intervals", intervals)
    unions = linear.Engine._unions

    def spoiled(self: linear.Engine, query: linear.Query, limit: int) -> dict[int, tuple[Tensor, Tensor]]:
        return {at: (low * NAN, high) for at, (low, high) in unions(self, query, limit).items()}

    monkeypatch.setattr(linear.Engine, "_unions", spoiled)
    none = refine.improve(net, x, target, threat, open_)
    assert not bool((none.margin > none.tolerance).any())


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.MaxPool2d(2)], ids=["relu", "max-pool"])
@pytest.mark.parametrize("end", [0, 1, 2])
def test_a_box_that_is_no_number_has_no_line(layer: nn.Module, end: int) -> None:
    low, high = -torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    for at, side in enumerate((low, high)):
        if end in (at, 2):
            side[..., 0, 0] = NAN
    for sign in (-1.0, 1.0):
        shape = (1, 1, 2, 2) if isinstance(layer, nn.ReLU) else (1, 1, 1, 1)
        form = Form(torch.full(shape, sign, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
        owner = torch.zeros(1, dtype=torch.int64)
        found = relaxations.backward([layer], [low.shape[1:]], {0: (low, high)}, owner, form, relaxations.zero)
        smallest = found.offset + (found.weight * torch.where(found.weight > 0, low, high)).flatten(1).sum(dim=1)
        assert not bool(smallest > 0)


@pytest.mark.parametrize("method", additive.METHODS)
@pytest.mark.parametrize("budget", [1, 2])
def test_votes_that_are_no_numbers_certify_nothing(method: str, budget: int) -> None:
    if method == "3.1" and budget > 1:
        pytest.skip("3.1 is for one location")
    axis = Axis.sliding(6, 1, kernel=1, stride=1)
    scores = torch.zeros(2, 3, 6, 6)
    scores[:, 1] = 1
    cover = CellCoverage(axis, axis, budget)
    assert bool((additive.prove(Votes(scores), cover, method).margin > 0).all())
    for label in range(3):
        for cell in ((0, 0), (3, 2), (5, 5)):
            spoiled = scores.clone()
            spoiled[0, label, *cell] = NAN
            found = additive.prove(Votes(spoiled), cover, method).margin > 0
            assert found.tolist() == [False, True]
            if budget == 1 and method == "exact":
                chart = additive.margin_map(Votes(spoiled), cover)
                assert not bool((chart[0] > 0).any())


def test_evidence_that_is_no_number_certifies_nothing() -> None:
    axis = Axis.sliding(4, 1, kernel=1, stride=1)
    evidence = torch.zeros(1, 2, 4, 4)
    evidence[:, 0] = NAN
    with pytest.raises(ValueError, match="int64"):
        robust_masking.prove(evidence, robust_masking.Masking((1, 1)), CellCoverage(axis, axis, 1))


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_leads_that_are_no_numbers_certify_nothing(value: float) -> None:
    masks, images_ = 4, 3

    def ask(image: Tensor, first: Tensor, second: Tensor) -> MaskedPredictions:
        logit_margin = torch.ones(len(image), dtype=torch.float64)
        logit_margin[(image == 0) & ((first == 1) | (second == 1))] = value
        logit_margin[(image == 1) & (first == 0) & (second == 3)] = value
        return MaskedPredictions(torch.zeros_like(image), torch.ones_like(image), logit_margin)

    table = double_masking.Table(ask, images_, masks)
    label = double_masking.answer(table, 2)
    for by in (torch.eye(masks, dtype=torch.bool), torch.eye(masks, dtype=torch.bool)[[0, 1]]):
        proof = double_masking.prove(table, label, by, 0.125)
        assert proof.certified.tolist() == [False, False, True]
        assert not bool((proof.margin[:2] > 0.125).any())


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("field", ["logit_margin", "confidence_margin"])
def test_reports_that_are_no_numbers_certify_nothing(field: str, value: float) -> None:
    ones = torch.ones(1, 3, dtype=torch.float64)
    found = MaskedOutputs(torch.zeros(1).long(), torch.zeros(1, 3).long(), torch.ones(1, 3).long(), ones, ones.clone())
    by = torch.eye(3, dtype=torch.bool)
    assert bool(masked_detection.prove(found, by).margin > 0)
    for mask in range(3):
        spoiled = ones.clone()
        spoiled[0, mask] = value
        assert not bool(masked_detection.prove(replace(found, **{field: spoiled}), by).margin > 0)


def test_classes_far_apart_are_told_apart_in_tables_of_labels() -> None:
    """In 16 bits, classes 5 and 65541 would be one."""
    classes = 70_000

    def ask(image: Tensor, first: Tensor, second: Tensor) -> MaskedPredictions:
        label = torch.where((first == 2) | (second == 2), 65_541, 5)
        return MaskedPredictions(label, torch.full_like(label, 69_999), torch.ones(len(label), dtype=torch.float64))

    table = double_masking.Table(ask, 1, 3)
    label = double_masking.answer(table, classes)
    proof = double_masking.prove(table, label, torch.eye(3, dtype=torch.bool), 0.125)
    assert label.tolist() == [65_541] and proof.certified.tolist() == [False]
    assert table.one().tolist() == [[5, 5, 65_541]]
    for wrong in (double_masking.MOST_CLASSES, -1):
        beyond = double_masking.Table(
            lambda image, first, second, at=wrong: MaskedPredictions(image * 0 + at, image * 0, image.double()), 1, 2
        )  # type: ignore[misc]
        with pytest.raises(UsageError, match="Classes are 0 to"):
            beyond.one()
