"""Surrogates: what attacks climb, whole and near a box, and attacks that are told where to begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks, defenses
from patchcert_cli.attacks import AttackResult, Start, Target
from patchcert_cli.attacks.patch_pgd import PatchPGD, _around, _grid, _moved
from patchcert_cli.defenses.bagcert import BagCert
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import UsageError
from patchcert_cli.layers.boxes import box_mask
from patchcert_cli.threats import Patch, Sparse, Threat
from tests.attacks.test_attack_strength import check
from tests.examples import section, tiny
from tests.soundness import arena

SHAPE = (2, 13, 11)
PLAN = {"widths": [4, 5], "kernels": [3, 2], "dilations": [1, 2], "mixes": [1, 0]}  # receptive field 5


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def scorer(aggregate: str = "sum", seed: int = 0, lean: float = 0.0, **more: Any) -> BagCert:
    """Random weights, whose scores are spread around 0, or with ``lean`` above it for class 0 and below for others."""
    options = {**PLAN, **more, "mean": [0.5] * SHAPE[0], "std": [0.25] * SHAPE[0]}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        made = BagCert.from_config(
            section(
                "bagcert",
                {
                    "input_shape": SHAPE,
                    "classes": ["a", "b", "c", "d"],
                    "network": {"name": "region", "options": options},
                    "options": {"aggregate": aggregate},
                },
            )
        ).eval()
        scores = made.scorer(images(32, SHAPE))
        made.scorer.head.weight.mul_(3 / scores.std())
        made.scorer.head.bias.sub_(made.scorer(images(32, SHAPE)).mean(dim=(0, 2, 3)))
        made.scorer.head.bias.add_(lean * torch.tensor([1.0, -1, -1, -1]))
        if made.position is not None:
            made.position.normal_()
    made.calibrate(images(32, SHAPE))
    return made.requires_grad_(False)


def start_of(defense: Any, x: Tensor, threat: Threat) -> Start:
    certificate = defense.certify(x, threat)
    return Start(certificate.worst, certificate.runner_up)


@pytest.mark.parametrize("aggregate", ["sum", "weighted"])
def test_surrogates_have_shapes_and_gradients_and_the_first_is_the_vote(aggregate: str) -> None:
    defense, x = scorer(aggregate), images(6, SHAPE, 1)
    straight, plain = defense.surrogates()
    for surrogate in (straight, plain):
        point = x.clone().requires_grad_()
        scores = surrogate.whole(point)
        assert scores.shape == (6, 4)
        (slope,) = torch.autograd.grad(scores[:, 1].sum(), point)
        assert slope.shape == x.shape
        assert (slope.flatten(1) != 0).float().mean() > 0.9
    votes = straight.whole(x)
    assert torch.equal(votes, votes.round())
    assert ((votes - defense.votes(x).sums()).abs().amax(dim=1) <= 3 * straight.tolerance).all()
    assert (votes.argmax(dim=1) == defense.predict(x)).float().mean() > 0.6


def test_straight_through_is_the_slope_of_sigmoids() -> None:
    defense, x = scorer(), images(3, SHAPE, 2)
    slopes = []
    for whole in (defense.surrogates()[0].whole, lambda v: defense.scorer(v).sigmoid().sum(dim=(2, 3))):
        point = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(whole(point)[:, 2].sum(), point)[0])
    torch.testing.assert_close(*slopes)


BOXES = [(0, 0, 3, 4), (10, 7, 3, 4), (5, 4, 3, 4), (0, 7, 3, 4), (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "more",
    [{}, {"aggregate": "weighted"}, {"places": True}, {"mirrored": True}, {"padding": 2}, {"padding": 1, "places": True}],
    ids=str,
)
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (12, 10), (13, 11)])
def test_near_and_rest_make_the_whole(more: dict[str, Any], size: tuple[int, int]) -> None:
    """Also where the window is cut at the border, and where it is the whole image."""
    defense, x = scorer(**more), images(2, SHAPE, 3)
    locations = Patch(*size).locations(*SHAPE[1:])
    boxes = locations[torch.randperm(len(locations), generator=torch.Generator().manual_seed(0))[:12]].expand(2, -1, -1)
    inside = box_mask(boxes, *x.shape[2:])[:, :, None]
    changed = torch.where(inside, images(inside.shape[1], SHAPE, 4), x[:, None]).flatten(0, 1)
    for surrogate in defense.surrogates():
        assert surrogate.rest(x, boxes).shape == (*boxes.shape[:2], 4)
        found = surrogate.rest(x, boxes).flatten(0, 1) + surrogate.near(changed, boxes.flatten(0, 1))
        torch.testing.assert_close(found, surrogate.whole(changed), rtol=1e-4, atol=1e-3)
        point = changed.clone().requires_grad_()
        near = torch.autograd.grad(surrogate.near(point, boxes.flatten(0, 1))[:, 0].sum(), point)[0]
        whole = torch.autograd.grad(surrogate.whole(point)[:, 0].sum(), point)[0]
        torch.testing.assert_close(near * inside.flatten(0, 1), whole * inside.flatten(0, 1), rtol=1e-3, atol=1e-4)


def test_a_defense_that_says_nothing_offers_its_forward() -> None:
    defense, x = tiny("ibp"), images(5, (1, 4, 4))
    (surrogate,) = defenses.surrogates(defense)
    boxes = torch.tensor([[0, 1, 2, 2]]).expand(5, 1, 4)
    assert torch.equal(surrogate.whole(x), defense(x))
    assert torch.equal(surrogate.rest(x, boxes) + surrogate.near(x, boxes[:, 0])[:, None], defense(x)[:, None])
    assert defenses.activations(defense) == 16


def test_a_defense_states_its_activations_without_naming_surrogates() -> None:
    """Or else attacks look at every location of networks for which that costs the most."""
    for name in ("smoothing", "partition"):
        defense = tiny(name)
        assert Target(defense, images(1, defense.input_shape)).activations == defense.activations


def test_a_network_of_large_layers_goes_image_by_image() -> None:
    """So that neither the size nor the company of a batch can change how sums are rounded."""
    defense, x = scorer(), images(3, SHAPE)
    target = Target(defense, x)
    target.rows = 4  # as for a real network
    assert [group.tolist() for group in target.groups(48)] == [[0], [1], [2]]
    assert Target(defense, x).rows == (1 << 20) // (5 * 13 * 11)


WRONG = {
    "too few": (torch.zeros(1, 4), torch.zeros(1)),
    "no box": (torch.zeros(2, 2), torch.zeros(2)),
    "a rival too many": (torch.tensor([[0, 0, 2, 2]] * 2), torch.zeros(3)),
    "outside": (torch.tensor([[0, 0, 2, 2], [3, 0, 2, 2]]), torch.zeros(2)),
    "another size": (torch.tensor([[0, 0, 2, 2], [0, 0, 2, 3]]), torch.zeros(2)),
    "no class": (torch.tensor([[0, 0, 2, 2]] * 2), torch.tensor([0, 3])),
}


@pytest.mark.parametrize(("location", "rival"), WRONG.values(), ids=WRONG)
def test_a_start_that_does_not_fit_is_refused_in_one_line(location: Tensor, rival: Tensor) -> None:
    defense, x = tiny("bagcert"), images(2, (1, 4, 4))
    with pytest.raises(UsageError, match=r"^a start [^\n]*$"):
        attacks.for_threat(Patch(2, 2))(defense, x, Patch(2, 2), start=Start(location, rival))


@pytest.mark.parametrize("screen", [True, False])
@pytest.mark.parametrize("hinted", [True, False])
@pytest.mark.parametrize("aggregate", ["sum", "weighted"])
def test_votes_are_flipped_within_the_rules_and_certificates_hold(screen: bool, hinted: bool, aggregate: str) -> None:
    threat, flipped, certified = Patch(3, 4), 0, 0
    for seed in (0, 3):
        defense, x = scorer(aggregate, seed, lean=2.5 * seed), images(10, SHAPE, seed)
        attack = PatchPGD(screen=screen, locations=4, steps=15, rounds=2, carried=20)
        for allowed in (threat, Patch(1, 1)):
            proof = defense.certify(x, allowed)
            start = Start(proof.worst, proof.runner_up) if hinted else None
            result = attack(defense, x, allowed, start=start)
            check(defense, x, allowed, result)
            assert not (proof.certified & result.success).any()
            certified += int(proof.certified.sum())
            flipped += int(result.success.sum())
    assert flipped >= 5
    assert certified >= 1


CARRY = {"screen": False, "hope": 1.0, "steps": 20}
TINY: dict[str, tuple[Patch | Sparse, dict[str, Any], float]] = {
    "a pixel, by looking": (Patch(1, 1), {"steps": 15}, 0.9),
    "a patch, by looking": (Patch(2, 2), {"steps": 15}, 0.9),
    "a pixel, by carrying": (Patch(1, 1), CARRY, 0.7),
    "a patch, by carrying": (Patch(2, 2), CARRY, 0.7),
    "a sparse pixel": (Sparse(1), {"iterations": 50}, 0.85),
}


@pytest.mark.parametrize(
    ("threat", "options", "share"),
    [
        pytest.param(*value, marks=pytest.mark.slow if name == "a pixel, by looking" else (), id=name)
        for name, value in TINY.items()
    ],
)
def test_tiny_votes_are_attacked_nearly_as_well_as_by_trying_everything(
    threat: Patch | Sparse, options: dict[str, Any], share: float
) -> None:
    attack = attacks.for_threat(threat, **options)
    best = found = certified = 0
    for one in arena.registered_arenas("bagcert"):
        breakable, proof = one.breakable(threat), one.defense.certify(one.images, threat)
        result = attack(one.defense, one.images, threat, start=Start(proof.worst, proof.runner_up))
        assert not (proof.certified & result.success).any()
        best += int(breakable.sum())
        found += int((result.success & breakable).sum())
        certified += int(proof.certified.sum())
    assert best >= 10
    assert certified >= 10 or threat == Patch(2, 2)  # which touches all cells
    assert found >= share * best


@pytest.mark.parametrize("screen", [True, False])
def test_batches_do_not_matter_with_starts(screen: bool) -> None:
    defense, x, threat = scorer(seed=1, lean=1.0), images(8, SHAPE, 5), Patch(2, 2)
    attack, index = PatchPGD(seed=2, screen=screen, locations=3, steps=8, carried=15, rounds=2), torch.arange(50, 58)
    start = start_of(defense, x, threat)

    def run(part: Tensor) -> AttackResult:
        return attack(defense, x[part], threat, index=index[part], start=Start(start.location[part], start.rival[part]))

    whole = run(torch.arange(8))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert 0 < whole.success.sum() < 8
    for other, positions in (
        (run(order), order),
        (AttackResult.cat([run(torch.tensor([i])) for i in range(8)]), torch.arange(8)),
    ):
        for name in ("success", "prediction", "queries", "clean_prediction"):
            assert torch.equal(getattr(other, name), getattr(whole, name)[positions]), name
        torch.testing.assert_close(other.adversarial, whole.adversarial[positions])


@pytest.mark.parametrize("screen", [True, False])
def test_the_start_is_tried_first(screen: bool) -> None:
    """One pixel decides; who knows where it is needs no search."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(400, 2))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].weight[1, 20 * 11 + 7] = 1
        network[1].bias.copy_(torch.tensor([0.5, 0.0]))
    defense = IntervalDefense(network, input_shape=(1, 20, 20), classes=("a", "b")).eval()
    x, threat = torch.zeros(2, 1, 20, 20), Patch(1, 1)
    start = Start(torch.tensor([[11, 7, 1, 1], [3, 3, 1, 1]]), torch.ones(2, dtype=torch.int64))
    result = PatchPGD(screen=screen)(defense, x, threat, start=start)
    assert result.success[0]
    assert result.queries[0] <= 12
    assert result.queries[1] > 100
    assert bool(result.success[1]) is screen  # a start that promises nothing ends the search where looking is dear


def test_the_further_locations_of_a_hint_are_climbed_in() -> None:
    """Hopeless at the worst location, and no grid location is tried: only who is told of the others finds more."""
    threat, x = Patch(3, 3), images(12, SHAPE, 9)
    locations = threat.locations(*SHAPE[1:])
    corner = torch.tensor([[0, 0, 3, 3]]).expand(12, 4)  # which few cells see
    further = locations[torch.tensor([40, 44, 60, 64])].expand(12, -1, -1)
    common: dict[str, Any] = {"screen": False, "hope": 1.0, "steps": 10, "restarts": 0, "rounds": 0}
    one = several = 0
    for seed in range(2):
        defense = scorer(seed=seed)
        rival = start_of(defense, x, threat).rival
        one += int(PatchPGD(**common)(defense, x, threat, start=Start(corner, rival)).success.sum())
        hint = Start(corner, rival, further)
        found = PatchPGD(**common)(defense, x, threat, start=hint)
        check(defense, x, threat, found)
        most = PatchPGD(**common).most(defense, threat, hinted=True)
        assert (found.queries <= most.queries + most.answers).all()
        several += int(found.success.sum())
        single = PatchPGD(**common, starts=1)(defense, x, threat, start=hint)
        assert torch.equal(single.success, PatchPGD(**common)(defense, x, threat, start=Start(corner, rival)).success)
    assert several > one


def test_more_candidates_go_at_once_where_a_box_reaches_a_small_part() -> None:
    defense, x = scorer(), images(1, SHAPE)
    target, boxes = Target(defense, x), torch.tensor([[[2, 2, 1, 1]] * 9])
    target.rows = 2
    evaluator = target.local_evaluator(x, torch.zeros(1, dtype=torch.int64), boxes)
    assert evaluator.share == pytest.approx(min(1, 5 / 9) * min(1, 5 / 7))  # of 9x7 cells, those that a window of 5x5 pixels has
    assert [len(part) for part in target._parts(x.expand(9, -1, -1, -1), evaluator)] == [5, 4]
    assert [len(part) for part in target._parts(x.expand(9, -1, -1, -1), None)] == [2, 2, 2, 2, 1]


def test_a_content_is_carried_to_where_it_works() -> None:
    """Every start but one row is hopeless for slopes; a content found at the start flips the answer elsewhere."""
    threat, x = Patch(3, 3), images(12, SHAPE, 9)
    stay, go = 0, 0
    for seed in range(2):
        defense = scorer(seed=seed)
        start = Start(torch.tensor([[0, 0, 3, 3]]).expand(12, 4), start_of(defense, x, threat).rival)  # a corner: few cells
        common: dict[str, Any] = {"screen": False, "hope": 1.0, "steps": 15, "locations": 4, "carried": 30}
        stay += int(PatchPGD(**common, rounds=0)(defense, x, threat, start=start).success.sum())
        go += int(PatchPGD(**common, rounds=2)(defense, x, threat, start=start).success.sum())
    assert go > stay


def test_a_hopeless_start_ends_the_search() -> None:
    defense, x, threat = scorer(), images(8, SHAPE, 5), Patch(1, 1)
    start = start_of(defense, x, threat)
    queries = [PatchPGD(screen=False, hope=hope)(defense, x, threat, start=start).queries for hope in (0.0, 0.99, 1.0)]
    assert (queries[0] >= queries[1]).all()
    assert queries[0].sum() > queries[1].sum()


def test_moves_grids_and_neighbours() -> None:
    locations = Patch(2, 3).locations(7, 8)
    x = images(2, (1, 7, 8))
    box, boxes = torch.tensor([[1, 2, 2, 3], [5, 5, 2, 3]]), torch.stack([locations[[0, 9, 35]], locations[[35, 1, 20]]])
    moved = _moved(x, box, boxes)
    for n in range(2):
        top, left = box[n, :2].tolist()
        for s in range(3):
            down, right = boxes[n, s, :2].tolist()
            content = moved[n, s, :, down : down + 2, right : right + 3]
            assert torch.equal(content, x[n, :, top : top + 2, left : left + 3])
    around = _around(locations, box)
    assert around.shape == (2, 8, 4)
    assert (around[:, :, None] == locations).all(dim=3).any(dim=2).all()
    assert ((around[0, :, :2] - box[0, :2]).abs().amax(dim=1) == 1).all()
    assert torch.equal(_grid(locations, 100, 0), locations)
    several = [_grid(locations, 9, phase) for phase in range(2)]
    assert [len(grid) for grid in several] == [9, 9]
    assert not (several[0][:, None] == several[1]).all(dim=2).any()
