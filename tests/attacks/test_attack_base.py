"""The base class is the judge: it counts, projects, refuses cheats and trusts only the deployed answer."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks
from patchcert_cli.attacks import Attack, AttackResult, Target
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import DataError, PatchcertError, UnknownName, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat

Build = Callable[[int], IntervalDefense]
X = torch.full((2, 3, 6, 6), 0.5)


class Painter(Attack):
    """Does what the test tells it, in whatever unlawful way."""

    kinds: ClassVar[tuple[str, ...]] = ("patch", "sparse")
    paint: ClassVar[Callable[[Tensor], object]]

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        found = x.clone()
        result = type(self).paint(found)
        return result if isinstance(result, Tensor) else found


def painter(paint: Callable[[Tensor], object]) -> Attack:
    return type("Painter", (Painter,), {"paint": staticmethod(paint)})()


def put(*places: tuple[object, ...], value: float = 1.0) -> Callable[[Tensor], object]:
    def paint(x: Tensor) -> None:
        for place in places:
            x[place] = value

    return paint


CHEATS = {
    "a row too many": ("patch:2x3", put((0, slice(None), slice(0, 3), slice(0, 3)))),
    "a column too many": ("patch:2x3", put((1, 0, slice(0, 2), slice(0, 4)))),
    "two patches": ("patch:2x2", put((0, 0, slice(0, 2), slice(0, 2)), (0, 0, slice(4, 6), slice(4, 6)))),
    "the whole image": ("patch:5%", put((slice(None),))),
    "k + 1 pixels": ("sparse:2", put((0, 0, 0, 0), (0, 1, 3, 3), (0, 2, 5, 5))),
    "k + 1 values": ("sparse:2:value", put((1, slice(None), 4, 4))),
    "tiny differences": ("sparse:1", put((0, 0, 0, 0), (0, 0, 5, 5), value=0.5 + 2**-24)),
}


@pytest.mark.parametrize(("threat", "paint"), CHEATS.values(), ids=CHEATS)
def test_a_cheat_is_caught(cnn: Build, threat: str, paint: Callable[[Tensor], object]) -> None:
    with pytest.raises(PatchcertError, match=r"attack Painter broke the rules.*of 2 images") as caught:
        painter(paint)(cnn(0), X, parse_threat(threat))
    assert caught.value.code == 1


LAWFUL = {
    "a patch": ("patch:2x3", put((0, slice(None), slice(4, 6), slice(3, 6)))),
    "k pixels, all channels": ("sparse:2", put((0, slice(None), 0, 0), (0, slice(None), 5, 5))),
    "k values": ("sparse:3:value", put((1, slice(None), 4, 4))),
    "nothing": ("sparse:1", put()),
}


@pytest.mark.parametrize(("threat", "paint"), LAWFUL.values(), ids=LAWFUL)
def test_a_lawful_change_passes(cnn: Build, threat: str, paint: Callable[[Tensor], object]) -> None:
    assert isinstance(painter(paint)(cnn(0), X, parse_threat(threat)), AttackResult)


@pytest.mark.parametrize("paint", [lambda x: x[:, :, :-1], lambda x: x.fill_(torch.nan), lambda x: x[:1]])
def test_what_is_no_image_is_refused(cnn: Build, paint: Callable[[Tensor], object]) -> None:
    with pytest.raises(PatchcertError, match="Painter did not return images"):
        painter(paint)(cnn(0), X, Patch(6, 6))


@pytest.mark.parametrize(("value", "projected"), [(7.0, 1.0), (-3.0, 0.0)])
def test_values_are_projected_before_they_are_judged(
    linear: Callable[..., IntervalDefense], value: float, projected: float
) -> None:
    weight = torch.zeros(2, 1, 2, 2)
    weight[1, 0, 1, 1] = 1.0 if value > 0 else -1.0
    defense = linear(weight, torch.tensor([0.6 if value > 0 else -0.4, 0.0]))
    result = painter(put((slice(None), 0, 1, 1), value=value))(defense, torch.full((1, 1, 2, 2), 0.5), Sparse(1))
    assert result.success.all()
    assert result.adversarial[0, 0, 1, 1] == projected


def test_only_the_deployed_answer_decides(mlp: Build) -> None:
    class Stubborn(IntervalDefense):
        def predict(self, x: Tensor) -> Tensor:
            return torch.ones(len(x), dtype=torch.int64)

    plain = mlp(0)
    stubborn = Stubborn(plain.network, input_shape=plain.input_shape, classes=plain.classes)
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for threat in (Patch(3, 3), Sparse(5)):
        result = attacks.for_threat(threat)(stubborn, x, threat)
        assert not result.success.any()
        assert torch.equal(result.adversarial, x)
        assert torch.equal(result.prediction, result.clean_prediction)


def test_registry_matches_the_folder() -> None:
    found = {module.name for module in pkgutil.iter_modules(attacks.__path__) if not module.name.startswith("_")}
    assert set(attacks.names()) == found
    assert len(found) >= 2
    for name in attacks.names():
        assert attacks.by_name(name).kinds
    with pytest.raises(UnknownName, match="patch_pgd"):
        attacks.by_name("patch-pdg")


def test_choice_by_threat() -> None:
    for threat in ("patch:5", "patch:2%", "sparse:3", "sparse:3:value"):
        chosen = attacks.for_threat(parse_threat(threat), seed=4)
        assert parse_threat(threat).kind in chosen.kinds
        assert chosen.seed == 4

    class Noise(Patch):
        kind: ClassVar[str] = "noise"

    with pytest.raises(UnsupportedThreat, match="patch, sparse"):
        attacks.for_threat(Noise(2, 2))


BORDERS = {
    "another kind": (Sparse(1), X, None, UsageError),
    "a patch that does not fit": (Patch(7, 7), X, None, UsageError),
    "another size": (Patch(2, 2), X[:, :, 1:], None, DataError),
    "8-bit pixels": (Patch(2, 2), X * 255, None, DataError),
    "too few numbers": (Patch(2, 2), X, torch.arange(1), UsageError),
}


@pytest.mark.parametrize(("threat", "x", "index", "error"), BORDERS.values(), ids=BORDERS)
def test_borders(cnn: Build, threat: Threat, x: Tensor, index: Tensor | None, error: type[PatchcertError]) -> None:
    with pytest.raises(error):
        attacks.by_name("patch_pgd")()(cnn(0), x, threat, index=index)


@pytest.mark.parametrize("threat", [Patch(2, 2), Sparse(2)])
def test_bad_options_are_refused(threat: Threat) -> None:
    with pytest.raises(UsageError, match="rivals 0 is out of range. Allowed: 1 or more"):
        attacks.for_threat(threat, rivals=0)


def test_draws_are_uniform_and_depend_on_number_stream_and_seed() -> None:
    class Idle(Painter):
        pass

    index = torch.tensor([0, 1, 10**12, 1])
    drawn = Idle(seed=1).draw(index, 3, 10_000)
    assert 0 <= drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    assert (drawn.mean(dim=1) - 0.5).abs().max() < 0.02  # 7 standard errors
    assert (drawn.var(dim=1) - 1 / 12).abs().max() < 0.01
    assert torch.equal(drawn[1], drawn[3])
    assert torch.equal(drawn[:, :7], Idle(seed=1).draw(index, 3, 7))
    others = [drawn[0], drawn[1], drawn[2], Idle(seed=2).draw(index, 3, 10_000)[0], Idle(seed=1).draw(index, 4, 10_000)[0]]
    correlation = torch.corrcoef(torch.stack(others)) - torch.eye(5)
    assert correlation.abs().max() < 0.06  # 6 standard errors


def test_parts_join(mlp: Build) -> None:
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    attack, defense, index = attacks.for_threat(Patch(2, 2)), mlp(0), torch.arange(5)
    parts = [attack(defense, x[part], Patch(2, 2), index=index[part]) for part in (slice(0, 2), slice(2, 5))]
    joined, whole = AttackResult.cat(parts), attack(defense, x, Patch(2, 2))
    assert torch.equal(joined.success, whole.success)
    assert torch.equal(joined.queries, whole.queries)
    empty = attack(defense, x[:0], Patch(2, 2))
    assert empty.adversarial.shape == (0, 1, 4, 4)
    assert empty.queries.shape == (0,)
