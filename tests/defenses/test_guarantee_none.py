"""A defense without certificates: it cannot be certified, its attacks give accuracy alone, and no table of proofs holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from site_cards import card as site_card
from site_cards import recipe, result
from torch import Tensor, nn

from patchcert_cli import attacks
from patchcert_cli.cards import Attacked, Card, Published, prose
from patchcert_cli.cards.published import ClaimKey
from patchcert_cli.cards.results import CertifyResult
from patchcert_cli.cli import attack as attack_command
from patchcert_cli.cli import several
from patchcert_cli.data.images import Images
from patchcert_cli.defenses import Claim, Defense, Proof
from patchcert_cli.errors import IntegrityError, UnsupportedThreat
from patchcert_cli.evaluation import estimate, evaluate
from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
from patchcert_cli.reporting import text
from patchcert_cli.reporting.site import page
from patchcert_cli.reporting.site.leaderboards import leaderboards
from patchcert_cli.schema import Invalid, read
from patchcert_cli.threats import Guarantee, Patch


class Unproven(Defense):
    """The brighter half."""

    guarantee = Guarantee.NONE
    methods = ()

    def __init__(self) -> None:
        super().__init__(input_shape=(1, 4, 4), classes=("left", "right"))
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.stack([x[..., :2].sum(dim=(1, 2, 3)), x[..., 2:].sum(dim=(1, 2, 3))], dim=1)

    def predict(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self(x).argmax(dim=1)

    def _certify(self, x: Tensor, claims: Any) -> list[Proof]:
        raise AssertionError("never called")


def task(count: int = 3) -> EvaluationTask:
    pixels = torch.randint(256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(count, dtype=torch.int64), torch.arange(count), "mnist", "test", "bundled")
    model = EvaluatedModel(Unproven().eval(), "halves", "halves", "0" * 64, "code")
    return EvaluationTask(model, images, (Claim(Patch(2, 2)),), total=count)


def test_it_is_the_one_guarantee_that_proves_nothing() -> None:
    assert [one for one in Guarantee if one.proves] == [Guarantee.RECOVERY, Guarantee.DETECTION]
    assert Guarantee.NONE.kept(torch.tensor([0, 1]), torch.tensor([0, 0])).tolist() == [True, False]


def test_it_cannot_be_certified(tmp_path: Path) -> None:
    made = Unproven().eval()
    for certify in (
        lambda: made.certify(torch.rand(2, 1, 4, 4), Patch(2, 2)),
        lambda: made.certify_claims(torch.rand(0, 1, 4, 4), []),
        lambda: evaluate.certify(task(), tmp_path / "run"),
        lambda: estimate.evaluation(task(), tmp_path / "run"),
    ):
        with pytest.raises(UnsupportedThreat, match="Unproven has no certificate.*patchcert attack"):
            certify()
    assert not (tmp_path / "run").exists()


def test_an_attack_gives_accuracy_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacker = attacks.for_threat(Patch(2, 2), "patch_pgd")
    found = evaluate.attack(task(), attacker, {"name": "PatchPGD", "seed": 0}, tmp_path / "run")  # joined by default
    assert found["guarantee"] == "none" and found["claims"] == [] and found["broken"] == []
    assert found["flipped"] > 0
    rows = dict(text.attack_rows(found))
    assert rows["certified"] == text.NO_CERTIFICATE and "empirical" in rows["right under attack"]
    assert not {"verdict", "arithmetic", "judged for"} & rows.keys()
    with pytest.raises(IntegrityError, match="not a result of patchcert certify"):
        CertifyResult.from_dict(found, "result.json")
    joined = found | {"guarantee": "recovery", "claims": [], "model": "another"}
    attack_command._table([found, joined])
    tables = capsys.readouterr().out.split("No certificates: nothing is proven")
    assert "halves" not in tables[0] and "another" in tables[0]
    assert "halves" in tables[1] and "certified" not in tables[1].partition("\n")[2]


def test_rows_of_it_are_in_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    several.by_guarantee([{"model": "proven"}, {"model": "unproven"}], ["recovery", "none"], ("model",))
    first, _, second = capsys.readouterr().out.partition("No certificates")
    assert "unproven" not in first and "unproven" in second


ATTACKED = Attacked(
    "mnist", "test", 100, Patch(5, 5), 98, 3, ("patch_pgd", "patch_rs"), "2026-01-31", "patchcert attack x", "0.1.0"
)


def unproven(**changes: Any) -> Card:
    own = {"guarantee": Guarantee.NONE, "published": (), "attacked": (ATTACKED,), "defense": "halves"}
    return recipe("unproven", **{**own, **changes})


def test_a_card_of_it_claims_accuracy_under_named_attacks_alone() -> None:
    made = unproven()
    assert Card.from_text(made.render()) == made
    said = prose(made)
    assert "3.00% (3/100)" in said and "patch_pgd, patch_rs" in said and "Nothing is proven" in said
    assert "certified, measured" not in said and "certified-robustness" not in made.render()
    for name, claim in {"results": (result(3, 700),), "published": (Published(Patch(3, 3), 0.9, 0.5, "x"),)}.items():
        with pytest.raises(IntegrityError, match=f"{name} must be empty while guarantee is none"):
            unproven(**{name: claim}).render()
    with pytest.raises(IntegrityError, match="validation must be empty while guarantee is none"):
        site_card("trained", guarantee=Guarantee.NONE).render()
    with pytest.raises(IntegrityError, match=r"attacked\[0\].attacks"):
        unproven(attacked=(replace(ATTACKED, attacks=()),)).render()
    with pytest.raises(IntegrityError, match="right 99, clean 98"):
        unproven(attacked=(replace(ATTACKED, right=99),)).render()


def test_a_measurement_of_it_is_no_certificate() -> None:
    claim = {"threat": "patch:5x5", "method": "x", "guarantee": "none"}
    with pytest.raises(Invalid, match="guarantee is 'none'"):
        read(ClaimKey, claim)
    measured = site_card("a", [result(3, 700)]).to_dict()
    measured["results"][0]["guarantee"] = "none"
    with pytest.raises(IntegrityError, match=r"results\[0\].guarantee is 'none', not a guarantee of certificates"):
        Card.from_dict(measured)


def test_it_is_in_no_leaderboard_and_no_table_of_measurements() -> None:
    forced = site_card("forced", [replace(result(3, 700), guarantee=Guarantee.NONE), result(3, 600)])  # no file can say so
    boards = leaderboards([forced, unproven()])
    assert [(board.guarantee, [entry.card.name for entry in board.entries]) for board in boards] == [
        (Guarantee.RECOVERY, ["forced"])
    ]
    assert boards[0].entries[0].result.certified == 600
    shown = page.render([forced, unproven()])
    assert "Measured: none" not in shown
