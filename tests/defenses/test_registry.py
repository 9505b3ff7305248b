"""Defenses by name, compared with the folder's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchcert_cli import defenses
from patchcert_cli.certificate import Certificate
from patchcert_cli.defenses import Claim, Defense
from patchcert_cli.errors import DataError, UnknownName, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat
from tests.examples import tiny

THREATS = [Patch(1, 1), Patch(2, 2), Patch(1, 4), Patch(4, 4), parse_threat("patch:7%"), Sparse(1), Sparse(3), Sparse(1, "value")]

SHARED = ("_base", "_cells")


def test_names_are_the_files() -> None:
    files = {path.stem for path in Path(defenses.__file__).parent.iterdir() if not path.name.startswith("_")}
    assert set(defenses.names()) == files
    assert defenses.names() == sorted(defenses.names())


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="no defense 'ipb'"):
        defenses.by_name("ipb")
    for shared in SHARED:
        with pytest.raises(UnknownName):
            defenses.by_name(shared)


def knows(defense: Defense, x: torch.Tensor, threat: Threat) -> bool:
    try:
        defense.certify(x, threat)
    except UnsupportedThreat:
        return False
    return True


PROVING = [name for name in defenses.names() if defenses.by_name(name).guarantee.proves]
UNPROVEN = sorted(set(defenses.names()) - set(PROVING))


def test_the_defenses_without_a_certificate_are_these() -> None:
    """No proof is lost from the tests below because a guarantee was changed."""
    assert UNPROVEN == ["lgs", "undefended", "watermark"]


@pytest.mark.parametrize("name", UNPROVEN)
class TestDefensesWithoutCertificate:
    def test_no_threat_is_certified(self, name: str) -> None:
        defense, x = tiny(name), torch.rand(3, 1, 4, 4)
        assert defense.methods == ()
        for threat in THREATS:
            with pytest.raises(UnsupportedThreat, match="has no certificate"):
                defense.certify(x, threat)
        with pytest.raises(UnsupportedThreat, match="has no certificate"):
            defense.certify_claims(x, [Claim(Patch(2, 2), "guess")])

    def test_answers(self, name: str) -> None:
        defense, x = tiny(name), torch.rand(5, 1, 4, 4)
        before = {key: value.clone() for key, value in defense.state_dict().items()}
        assert not defense.training and defense.input_shape == (1, 4, 4) and len(defense.classes) == 3
        answers = defense.predict(x)
        assert answers.dtype == torch.int64 and answers.shape == (5,) and defense(x).shape == (5, 3)
        assert defense.predict(x[:0]).shape == (0,)
        assert torch.equal(torch.cat([defense.predict(one) for one in x.split(1)]), answers)
        assert all(torch.equal(value, before[key]) for key, value in defense.state_dict().items())

    @pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf")])
    def test_pixels_outside_the_unit_interval_are_refused(self, name: str, bad: float) -> None:
        x = torch.rand(2, 1, 4, 4)
        x[1, 0, 3, 3] = bad
        with pytest.raises(DataError, match="outside"):
            tiny(name).predict(x)
        with pytest.raises(DataError, match="do not fit"):
            tiny(name).predict(torch.rand(2, 1, 4, 5))


@pytest.mark.parametrize("name", PROVING)
class TestEveryDefense:
    def tiny(self, name: str) -> Defense:
        return tiny(name)

    def test_tiny_is_a_defense_in_eval_mode(self, name: str) -> None:
        defense = self.tiny(name)
        assert isinstance(defense, Defense)
        assert not defense.training
        assert defense.input_shape == (1, 4, 4)
        assert len(defense.classes) == 3

    def test_shapes_and_types(self, name: str) -> None:
        defense, x = self.tiny(name), torch.rand(5, 1, 4, 4)
        certificate = defense.certify(x, Patch(2, 2))
        assert isinstance(certificate, Certificate)
        assert defense(x).shape == (5, 3)
        assert defense.predict(x).dtype == certificate.prediction.dtype == torch.int64
        assert certificate.certified.dtype == torch.bool
        assert certificate.margin.dtype == certificate.tolerance.dtype == torch.float64
        assert certificate.worst.shape == (5, 4)
        assert certificate.threat == Patch(2, 2)
        assert torch.equal(certificate.certified, certificate.margin > certificate.tolerance)

    @pytest.mark.parametrize("count", [0, 1])
    def test_empty_and_single_batches(self, name: str, count: int) -> None:
        defense, x = self.tiny(name), torch.rand(count, 1, 4, 4)
        certificate = defense.certify(x, Patch(2, 2))
        assert defense.predict(x).shape == certificate.prediction.shape == (count,)
        assert certificate.certified.shape == certificate.margin.shape == certificate.tolerance.shape == (count,)
        assert certificate.worst.shape == (count, 4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8])
    def test_other_number_types_are_refused_or_answered_alike(self, name: str, dtype: torch.dtype) -> None:
        defense, x = self.tiny(name), (torch.rand(6, 1, 4, 4) if dtype.is_floating_point else torch.ones(6, 1, 4, 4)).to(dtype)
        try:
            prediction = defense.predict(x)
            certificate = defense.certify(x, Patch(1, 1))
        except DataError:
            return
        assert torch.equal(prediction, certificate.prediction)
        assert torch.equal(certificate.certified, defense.certify(x.float(), Patch(1, 1)).certified)

    @pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf")])
    def test_pixels_outside_the_unit_interval_are_refused(self, name: str, bad: float) -> None:
        defense, x = self.tiny(name), torch.rand(2, 1, 4, 4)
        x[1, 0, 3, 3] = bad
        for ask in (defense.predict, lambda x: defense.certify(x, Patch(1, 1))):
            with pytest.raises(DataError, match="outside"):
                ask(x)

    @pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 4, 4), (2, 1, 4, 5), (2, 1, 5, 4)])
    def test_images_of_another_shape_are_refused(self, name: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="do not fit"):
            self.tiny(name).predict(torch.rand(shape))

    def test_certifying_changes_nothing(self, name: str) -> None:
        defense, x = self.tiny(name), torch.rand(4, 1, 4, 4)
        before, pixels = {key: value.clone() for key, value in defense.state_dict().items()}, x.clone()
        first, second = defense.certify(x, Patch(2, 2)), defense.certify(x, Patch(2, 2))
        assert torch.equal(x, pixels)
        assert all(torch.equal(value, before[key]) for key, value in defense.state_dict().items())
        assert torch.equal(first.margin, second.margin)

    @pytest.mark.parametrize("threat", THREATS, ids=str)
    @pytest.mark.parametrize("count", [0, 6])
    def test_every_proof_is_about_the_deployed_answer(self, name: str, threat: Threat, count: int) -> None:
        """Each method either refuses the threat or certifies what ``predict`` says."""
        defense, x, supported = self.tiny(name), torch.rand(count, 1, 4, 4), 0
        assert defense.methods
        for method in (None, *defense.methods):
            try:
                certificate = defense.certify(x, threat, method)
            except UnsupportedThreat:
                continue
            supported += 1
            assert torch.equal(certificate.prediction, defense.predict(x))
            assert torch.equal(certificate.certified, certificate.margin > certificate.tolerance)
            assert certificate.threat == threat and certificate.guarantee is defense.guarantee
            locations = {tuple(location) for location in threat.locations(4, 4).tolist()}
            assert {tuple(worst) for worst in certificate.worst.tolist()} <= locations
            assert bool((certificate.runner_up != certificate.prediction).all())
            if isinstance(threat, Patch) and threat.height == threat.width == 4:
                assert not bool(certificate.certified.all()) or count == 0
        fits = isinstance(threat, Patch) and (not hasattr(defense, "masks") or (threat.height <= 2 and threat.width <= 3))
        assert supported or not fits, "every defense knows patches, or at least those that its masks were made for"

    def test_claims_together_are_the_claims_alone(self, name: str) -> None:
        defense, x = self.tiny(name), torch.rand(5, 1, 4, 4)
        claims = [Claim(threat) for threat in (Patch(1, 1), Patch(2, 2), Patch(2, 3), Sparse(2)) if knows(defense, x, threat)]
        assert len(claims) >= 2
        for claim, certificate in zip(claims, defense.certify_claims(x, claims), strict=True):
            alone = defense.certify(x, claim.threat)
            assert torch.equal(certificate.margin, alone.margin) and torch.equal(certificate.worst, alone.worst)
            assert certificate.threat == claim.threat
        assert defense.certify_claims(x, []) == []
        with pytest.raises(UsageError, match="no proof 'guess'"):
            defense.certify_claims(x, [Claim(Patch(1, 1)), Claim(Patch(1, 1), "guess")])
        with pytest.raises(UsageError, match="does not fit"):
            defense.certify(x, Patch(5, 1))
