"""Feature partition: which set a pixel is in, that a vote sees its set alone, and the proof against enumeration."""

from __future__ import annotations

from itertools import combinations, count, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from soundness.arena import Arena, check, draw_images
from torch import Tensor

from patchcert_cli import attacks
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import CellCoverage
from patchcert_cli.defenses import Claim, TrainingStep, partition
from patchcert_cli.defenses.partition import Partition, PartitionOptions, divided
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Patches, Sparse, Threat
from patchcert_cli.training.recipe import Recipe, default_recipe, usual_defense
from tests.examples import section

SHAPE = (2, 5, 7)
LAYOUTS = ("lattice", "random")
VOTES = ("top-one", "independent")
LOOKS = ({"mirrored": True}, {"moves": 1}, {"mirrored": True, "moves": 2})


def build(shape: tuple[int, int, int] = SHAPE, classes: int = 3, seed: int = 0, **options: Any) -> Partition:
    network = {"width": 6, "blocks": [5], "mean": [0.4] * shape[0], "std": [0.3] * shape[0]}
    config = {
        "input_shape": list(shape),
        "classes": [str(c) for c in range(classes)],
        "network": {"name": "setwise", "options": network},
        "options": {"spacing": 3, **options},
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        looks = {name: value for name, value in options.items() if name in ("mirrored", "moves")}
        defense = Partition.from_config(section("partition", config) | looks).eval()
        for name, buffer in defense.network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 1)
        x = images(40, shape, 99)
        scores = defense.network(defense.values(x))
        defense.network.head.weight.mul_(3 / scores.std())
        defense.network.head.bias.sub_(defense.network(defense.values(x)).mean(dim=(0, 2, 3)))
        defense.calibrate(x)
    return defense


def images(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (255 * torch.rand(count, *shape, generator=generator)).round() / 255


@pytest.mark.parametrize(("layout", "spacing"), [("lattice", 1), ("lattice", 3), ("lattice", 5), ("random", 3), ("random", 5)])
def test_every_pixel_is_in_one_set_and_no_set_is_empty(layout: str, spacing: int) -> None:
    defense = build(layout=layout, spacing=spacing)
    members = [[p for p in row if p < 35] for row in defense.members.tolist()]
    assert sorted(p for row in members for p in row) == list(range(35))
    assert all(members) and len(members) == spacing**2
    for number, row in enumerate(members):
        assert all(int(defense.sets.flatten()[p]) == number for p in row)
        if layout == "lattice":
            assert {(p // 7 % spacing, p % 7 % spacing) for p in row} == {divmod(number, spacing)}
    if layout == "random":
        assert max(map(len, members)) - min(map(len, members)) <= 1
        assert not torch.equal(defense.sets, build(layout=layout, spacing=spacing, shuffle=1).sets)


SETS = [3, 0, 0, 2, 0, 1, 2, 1, 3, 3, 1, 2]


def test_random_sets_are_the_same_for_ever() -> None:
    sets = divided((1, 3, 4), PartitionOptions(layout="random", spacing=2, shuffle=7))
    assert sets.flatten().tolist() == SETS


@pytest.mark.parametrize("options", [{"layout": layout} for layout in LAYOUTS] + list(LOOKS))
def test_a_vote_sees_all_of_its_set_and_nothing_else(options: dict[str, Any]) -> None:
    """A not-a-number in every pixel, through the deployed network, and a change of every pixel."""
    defense, x = build(**options), images(1).repeat(35, 1, 1, 1)
    broken, changed = x.clone(), x.clone()
    for pixel in range(35):
        broken[pixel, :, pixel // 7, pixel % 7] = float("nan")
        changed[pixel, :, pixel // 7, pixel % 7] = 1 - x[pixel, :, pixel // 7, pixel % 7].round()
    own = F.one_hot(defense.sets.flatten(), 9).bool()
    with torch.no_grad():
        assert torch.equal(defense.scores(broken).isnan().any(dim=1).flatten(1), own)
        assert torch.equal((defense.scores(changed) != defense.scores(x)).any(dim=1).flatten(1), own)
    defense.self_test()


@pytest.mark.parametrize("options", LOOKS)
@pytest.mark.parametrize("shape", [SHAPE, (1, 6, 4)])
def test_looks_are_sums_of_scores_of_moved_images_set_by_set(options: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """Pixel by pixel: a set is where its pixels are in the moved image, and what comes in is 0."""
    defense, plain = build(shape, **options), build(shape)
    x, (_, height, width), most = images(3, shape), shape, options.get("moves", 0)
    sums = torch.zeros_like(plain.scores(x)).double()
    for mirrored in (False, True)[: 1 + options.get("mirrored", False)]:
        for down, right in product(range(-most, most + 1), repeat=2):
            image, places = torch.zeros_like(x), {}
            for i, j in product(range(height), range(width)):
                to = i + down, (width - 1 - j if mirrored else j) + right
                places.setdefault((i % 3, j % 3), set()).add((to[0] % 3, to[1] % 3))
                if 0 <= to[0] < height and 0 <= to[1] < width:
                    image[:, :, to[0], to[1]] = x[:, :, i, j]
            scores = plain.scores(image)
            for (row, column), (there,) in places.items():
                sums[:, :, row, column] += scores[:, :, there[0], there[1]]
    scores = defense.scores(x)
    assert torch.allclose(scores, sums, rtol=0, atol=1e-9)
    assert torch.equal(torch.cat([defense.scores(image[None]) for image in x]), scores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_deployed_network_is_near_the_trained_one_and_the_same_in_any_batch(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense, x = build(layout=layout), images(60)
    scores = defense.scores(x)
    with torch.no_grad():
        assert float((scores - defense.network(defense.values(x))).abs().max()) < 0.2 * float(scores.abs().max())
    certificate = defense.certify(x, Sparse(1))
    assert torch.equal(torch.cat([defense.scores(image[None]) for image in x]), scores)
    assert torch.equal(defense.scores(x.flip(0)).flip(0), scores)
    assert torch.equal(defense.train().scores(x.double()), scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(defense.eval().scores(x), scores)
    monkeypatch.setattr(partition, "PIECE", 500)
    assert torch.equal(defense.scores(x), scores)
    assert torch.equal(Certificate.cat([defense.certify(image[None], Sparse(1)) for image in x]).margin, certificate.margin)
    assert defense.predict(x[:0]).shape == (0,)


def answer(ballots: list[list[int]]) -> int:
    """Of the ballots of all sets."""
    sums = [sum(column) for column in zip(*ballots, strict=True)]
    return sums.index(max(sums))


def forced(defense: Partition, ballots: list[list[int]], pixels: tuple[int, ...]) -> bool:
    """Whether some votes of the sets of these pixels change the answer, by trying all of them."""
    classes = len(ballots[0])
    one = [[int(c == chosen) for c in range(classes)] for chosen in range(classes)]
    possible = one if defense.how.vote == "top-one" else [list(bits) for bits in product((0, 1), repeat=classes)]
    touched = sorted({int(defense.sets.flatten()[pixel]) for pixel in pixels})
    for votes in product(possible, repeat=len(touched)):
        changed = list(ballots)
        for number, ballot in zip(touched, votes, strict=True):
            changed[number] = ballot
        if answer(changed) != answer(ballots):
            return True
    return False


@pytest.mark.parametrize(("layout", "vote"), list(product(LAYOUTS, VOTES)))
def test_certified_is_exactly_what_no_votes_of_k_pixels_can_change(layout: str, vote: str) -> None:
    """Both ways, for every choice of k pixels and of the votes of their sets."""
    defense, x = build((1, 3, 4), layout=layout, vote=vote, seed=2), images(12, (1, 3, 4), 5)
    ballots = defense.votes(x).scores.int().flatten(2).permute(0, 2, 1).tolist()
    found = set()
    for k in (1, 2, 3):
        certified = defense.certify(x, Sparse(k)).certified.tolist()
        for b, row in enumerate(ballots):
            broken = any(forced(defense, row, pixels) for pixels in combinations(range(12), k))
            assert certified[b] == (not broken)
            found.add((k, certified[b]))
    assert {certified for _, certified in found} == {True, False} or layout == "random"


def test_looks_whose_scores_are_not_put_back_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look alone is a partition, but another one."""
    defense = build(mirrored=True, moves=1)
    values = Partition.values
    turns = count()
    monkeypatch.setattr(Partition, "values", lambda self, x: values(self, x).roll(next(turns), dims=3))
    with pytest.raises(IntegrityError, match="not its own alone"):
        defense.self_test()


@pytest.mark.parametrize(("layout", "vote"), list(product(LAYOUTS, VOTES)))
def test_no_change_of_pixels_or_values_moves_a_certified_answer(layout: str, vote: str) -> None:
    threats: list[Any] = [Sparse(1), Sparse(2), Sparse(2, "value")] + ([Patch(1, 2)] if layout == "lattice" else [])
    shape = (1, 3, 3)
    looks = {"mirrored": True, "moves": 1} if layout == "lattice" else {}
    arenas = [Arena(str(s), build(shape, layout=layout, vote=vote, seed=s), draw_images(shape, 8, s)) for s in range(3)]
    arenas += [Arena("looks", build(shape, layout=layout, vote=vote, **looks), draw_images(shape, 8, 9))] if looks else []
    score = check(arenas, threats)
    assert score.violations == [] and score.unsupported == 0
    assert score.certified >= 5 and score.broken >= 5


@pytest.mark.parametrize("wrong", ["budget", "cell", "tie"])
def test_a_broken_proof_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pixel too few, a set that votes from another's pixels, and ties that always go to the answer."""
    whole, honest = Partition.cover_of, Partition.count
    if wrong == "budget":
        monkeypatch.setattr(
            Partition,
            "cover_of",
            lambda self, threat: (
                whole(self, Sparse(threat.k - 1)) if isinstance(threat, Sparse) and threat.k > 1 else whole(self, threat)
            ),
        )
    elif wrong == "cell":
        values = Partition.values
        monkeypatch.setattr(
            Partition, "values", lambda self, x: values(self, x).roll(1, dims=1) + values(self, x).roll(1, dims=3)
        )
    else:
        prove = Partition.prove

        def generous(self: Partition, said: Votes, cover: CellCoverage, claim: Claim) -> Any:
            proof = prove(self, said, cover, claim)
            return partition.replace(proof, margin=proof.margin + 1)

        monkeypatch.setattr(Partition, "prove", generous)
    assert honest is Partition.count
    shape = (1, 3, 3)
    made = [build(shape, seed=s) for s in range(6)]
    for defense in made:
        defense.trust()
    arenas = [Arena(str(s), defense, draw_images(shape, 8, s)) for s, defense in enumerate(made)]
    assert check(arenas, [Sparse(1), Sparse(2)], until_found=True).violations
    if wrong == "cell":
        with pytest.raises(IntegrityError):
            made[0].self_test()


def test_the_worst_pixel_is_in_a_set_of_the_largest_loss_and_every_k_comes_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build((1, 8, 8), spacing=4, seed=1), images(30, (1, 8, 8))
    calls, scores = [], Partition.scores
    monkeypatch.setattr(Partition, "scores", lambda self, x: calls.append(len(x)) or scores(self, x))
    several = defense.certify_claims(x, [Claim(Sparse(k)) for k in range(1, 17)] + [Claim(Sparse(3, "value"))])
    assert calls[-1] == 30 and calls.count(30) == 1
    margins = torch.stack([one.margin for one in several[:16]])
    assert bool((margins[1:] <= margins[:-1]).all())
    assert torch.equal(several[-1].certified, several[2].certified)
    votes = defense.votes(x)
    for one in (several[0], several[3]):
        for b in range(30):
            top, left, height, width = one.worst[b].tolist()
            assert (height, width) == (1, 1)
            ballots = votes.scores[b].int().flatten(1)
            loss = 1 + ballots[one.prediction[b]] - ballots[one.runner_up[b]]
            assert int(loss[defense.sets[top, left]]) == int(loss.max())


def test_more_pixels_than_sets_certify_nothing_and_say_so() -> None:
    defense, x = build((1, 4, 4), spacing=2), images(8, (1, 4, 4))
    for k in (3, 4, 5, 16):
        assert not bool(defense.certify(x, Sparse(k)).certified.any())
        assert "no image can be certified" in defense.note(Sparse(k))
    assert defense.note(Sparse(2)) == ""
    with pytest.raises(UsageError, match="17"):
        defense.certify(x, Sparse(17))


def test_a_patch_reaches_the_sets_of_its_pixels() -> None:
    defense = build((1, 5, 7))
    for patch in (Patch(1, 1), Patch(2, 3), Patch(4, 2), Patch(5, 7)):
        cover = defense.cover_of(patch)
        claimed = (cover.rows.matrix()[:, None, :, None] * cover.columns.matrix()[None, :, None, :]).flatten(0, 1).flatten(1)
        for at, (top, left, height, width) in enumerate(patch.locations(5, 7).tolist()):
            inside = defense.sets[top : top + height, left : left + width].flatten().unique().tolist()
            assert claimed[at].nonzero().flatten().tolist() == inside
    assert defense.cover_of(Patches(2, Patch(1, 2))).budget == 2
    threats: list[Threat] = [Patch(1, 1), Patches(2, Patch(1, 2))]
    for threat in threats:
        with pytest.raises(UnsupportedThreat):
            build(layout="random").certify(images(1), threat)


def test_bad_partitions_are_refused() -> None:
    with pytest.raises(UsageError, match="36 sets are too many"):
        build(spacing=6)
    with pytest.raises(UsageError, match="36 sets are too many"):
        build(layout="random", spacing=6)
    with pytest.raises(IntegrityError, match="layout"):
        build(layout="spiral")
    for options in LOOKS:
        with pytest.raises(UsageError, match="mirrored and moves need sets of a lattice"):
            build(layout="random", **options)
    with pytest.raises(UsageError, match="moves = 5 leaves nothing of 5x7 pixels. Use moves from 0 to 4"):
        build(moves=5)
    network = {"name": "mlp", "options": {"mean": [0.4], "std": [0.3]}}
    with pytest.raises(IntegrityError):
        Partition.from_config(
            section("partition", {"input_shape": [1, 4, 4], "classes": ["a", "b"], "network": network, "options": {"spacing": 2}})
        )


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("drawn", [0, 4])
def test_the_loss_is_that_of_the_votes_of_the_drawn_sets(vote: str, drawn: int) -> None:
    defense, x, label = build(vote=vote, drawn=drawn, margin_weight=0.5), images(6), torch.arange(6) % 3
    options = PartitionOptions(spacing=3, vote=vote, drawn=drawn, margin_weight=0.5)
    step = TrainingStep(Sparse(2), options, 0.0, 1, torch.Generator().manual_seed(3))
    loss = defense.training_loss(x, label, step)
    drawing = torch.Generator().manual_seed(3)
    number = torch.rand(6, 9, generator=drawing).argsort(dim=1)[:, :4] if drawn else torch.arange(9).expand(6, -1)
    with torch.no_grad():
        whole = defense.network(defense.values(x)).flatten(2).permute(0, 2, 1)  # [B, n, K]
    scores = torch.stack([row[chosen] for row, chosen in zip(whole, number, strict=True)])
    hot = F.one_hot(label, 3)[:, None].expand(-1, scores.shape[1], -1)
    if vote == "top-one":
        votes, wanted = F.one_hot(scores.argmax(dim=2), 3).float(), -(scores.log_softmax(dim=2) * hot).sum(dim=2).mean()
    else:
        votes = (scores > 0).float()
        wanted = -torch.where(hot.bool(), F.logsigmoid(scores), F.logsigmoid(-scores)).mean()
    share = votes.mean(dim=1)
    for b in range(6):
        rivals = torch.stack([share[b, c] for c in range(3) if c != label[b]])
        soft = (15 * torch.cat([rivals, torch.tensor([-1.0])])).logsumexp(dim=0) / 15
        wanted = wanted + 0.5 * (0.5 - share[b, label[b]] + soft).clamp(min=0) / 6
    assert torch.allclose(loss, wanted, atol=1e-4)
    loss.backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in defense.parameters())


@pytest.mark.parametrize("vote", VOTES)
def test_the_attack_on_pixels_flips_answers_and_no_certified_one(vote: str) -> None:
    defense, x, threat = build((1, 6, 6), vote=vote, seed=4), images(40, (1, 6, 6), 1), Sparse(2)
    certified = defense.certify(x, threat).certified
    found = attacks.for_threat(threat, iterations=20, steps=5)(defense, x, threat)
    assert not bool((found.success & certified).any())
    assert int(found.success.sum()) >= 3


def test_pixels_of_cifar_are_for_partition_and_the_rest_is_as_before() -> None:
    assert (
        usual_defense(Sparse(10))
        == usual_defense(Sparse(10, "value"), "cifar10")
        == usual_defense(Patch(5, 5), "cifar10")
        == "ibp"
    )
    assert usual_defense(Sparse(10), "cifar10") == "partition"
    assert default_recipe(Sparse(10), "partition").command == "patchcert train --threat sparse --k 10 --defense partition"
    assert "--defense ibp" in Recipe(Sparse(10), "cifar10").command
