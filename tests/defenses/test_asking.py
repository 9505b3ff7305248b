"""What a user may pass to a defense in Python, and what is said of what cannot be meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patchcert_cli
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import DataError, PatchcertError, UsageError
from patchcert_cli.threats import Patch
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
    ],
)
def test_images_that_are_none(made: Defense, given: Any, said: str) -> None:
    for ask in (made.predict, lambda x: made.certify(x, "patch:2x3")):
        with pytest.raises(DataError, match=said) as caught:
            ask(given)
        assert isinstance(caught.value, PatchcertError)


def test_the_public_names_are_listed() -> None:
    assert set(patchcert_cli.__all__) == set(dir(patchcert_cli)) and "parse_threat" in dir(patchcert_cli)
