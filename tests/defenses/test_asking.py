"""What a user may pass to a defense in Python, and what is said of what cannot be meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import patchcert_cli
from patchcert_cli.certificate import Claim
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import DataError, PatchcertError, UsageError
from patchcert_cli.threats import Patch, Patches, PatchPercent, Sparse
from tests.examples import tiny


@pytest.fixture
def made() -> Defense:
    return tiny("patchcleanser")


def test_a_threat_may_be_given_as_text(made: Defense) -> None:
    x = torch.rand(3, 1, 4, 4)
    one, two = made.certify(x, "patch:2x3"), made.certify(x, Patch(2, 3))
    assert one.threat == Patch(2, 3) and torch.equal(one.certified, two.certified) and torch.equal(one.margin, two.margin)
    for threat, kind, said in (
        ("pach:2x3", UsageError, "invalid threat 'pach:2x3'"),
        (5, UsageError, r"int is not a threat model. Give Patch\(5, 5\), or its text: 'patch:5x5'"),
        ((5, 5), UsageError, "tuple is not a threat model"),
    ):
        with pytest.raises(kind, match=said):
            made.certify(x, threat)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((2, 1, 4, 4), dtype=np.float32), r"images are numpy.ndarray, not a tensor. Give torch.as_tensor\(images\)"),
        ([[0.5]], "images are builtins.list, not a tensor"),
        (torch.zeros(1, 4, 4), r"one image of shape \(1, 4, 4\) is not a batch. Give x\[None\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), "Give float32 in"),
        (torch.zeros(2, 3, 4, 4), "do not fit this model"),
        (torch.full((2, 1, 4, 4), float("nan")), "some are not a number"),
        (torch.full((2, 1, 4, 4), 1.5), "pixels outside"),
    ],
)
def test_images_that_are_none(made: Defense, given: Any, said: str) -> None:
    for ask in (made.predict, lambda x: made.certify(x, "patch:2x3")):
        with pytest.raises(DataError, match=said) as caught:
            ask(given)
        assert isinstance(caught.value, PatchcertError)


def test_claims_may_be_of_any_iterable_and_are_claims(made: Defense) -> None:
    x = torch.rand(2, 1, 4, 4)
    (one,) = made.certify_claims(x, (claim for claim in [Claim(Patch(2, 3))]))  # type: ignore[arg-type]
    assert torch.equal(one.margin, made.certify(x, Patch(2, 3)).margin)
    (alone,) = made.certify_claims(x, Claim(Patch(2, 3)))  # type: ignore[arg-type]
    assert torch.equal(alone.margin, one.margin)
    for strange in (["patch:2x3"], Patch(2, 3), [Claim(Patch(2, 3)), Patch(1, 1)]):
        with pytest.raises(UsageError, match=r"is not a claim. Give Claim\(Patch\(5, 5\)\)"):
            made.certify_claims(x, strange)  # type: ignore[arg-type]


def test_each_output_of_a_network_needs_a_name() -> None:
    defense = tiny("ibp")
    defense.classes = defense.classes[:-1]
    for ask in (defense.predict, lambda x: defense.certify(x, "patch:1x1")):
        with pytest.raises(UsageError, match="outputs, and .* classes are named. Name one class for each output"):
            ask(torch.rand(2, *defense.input_shape))


def test_a_proof_about_a_class_without_a_name_is_a_bug(made: Defense, monkeypatch: pytest.MonkeyPatch) -> None:
    right = made._certify
    monkeypatch.setattr(
        made, "_certify", lambda x, claims: [replace(one, runner_up=one.runner_up + 9) for one in right(x, claims)]
    )
    with pytest.raises(PatchcertError, match="a class that is not among"):
        made.certify(torch.rand(2, 1, 4, 4), "patch:2x3")


def test_numbers_of_other_libraries_make_threats() -> None:
    assert Patch(np.int64(5), np.int64(5)) == Patch(5, 5) and Sparse(np.int64(3)) == Sparse(3)
    for wrong in (
        lambda: Patch(1.5, 1),
        lambda: Patch("5", 5),
        lambda: Sparse(1.5),
        lambda: Sparse(True),
        lambda: Patches(2, "5"),
    ):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="invalid"):
            wrong()
    for share in (0, 101, "2", 2.0):
        with pytest.raises(UsageError, match="invalid share"):
            PatchPercent(share)  # type: ignore[arg-type]


def test_the_public_names_are_listed() -> None:
    assert set(patchcert_cli.__all__) == set(dir(patchcert_cli)) and "parse_threat" in dir(patchcert_cli)
