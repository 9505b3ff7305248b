"""Derandomized smoothing: what a view shows and a patch touches, how cells vote, and that storage and batches change nothing."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from soundness.arena import Arena, check, draw_images
from torch import Tensor, nn

from patchcert_cli import checkpoint, data, models
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.defenses import TrainingStep, smoothing
from patchcert_cli.defenses.smoothing import ABLATIONS, ROUNDING, VIEWS, VOTES, Ablations, Smoothing, SmoothingOptions
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.layers import fixed_point, precision
from patchcert_cli.layers.fixed_point import ValueRange
from patchcert_cli.models.resnet import ResNet, convolution
from patchcert_cli.threats import Patch, Sparse
from patchcert_cli.training import loop
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.steps import monitor
from tests.examples import file_of, section

SHAPE = (2, 6, 10)
CASES = [(ablation, view, stride) for ablation, view in product(ABLATIONS, VIEWS) for stride in (1, 3)]  # 3 does not divide 10


def config(shape: tuple[int, int, int] = SHAPE, classes: int = 4, stored: str = "float32", **options: Any) -> dict[str, Any]:
    network = {"widths": [5, 6], "blocks": [1, 1], "strides": [1, 2], "mean": [0.4] * shape[0], "std": [0.3] * shape[0]}
    return {
        "defense": "smoothing",
        "input_shape": list(shape),
        "classes": [str(c) for c in range(classes)],
        "network": {"name": "resnet", "options": network},
        "options": {"band": 3, **options},
        "recipe": {"stored": stored},
    }


def roughen(network: ResNet, sample: Tensor) -> None:
    """Random statistics of norms, and logits around zero with a deviation of 3."""
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 1)
        network.eval()
        network.head.weight.mul_(3 / network(sample).std(dim=0).mean())
        network.head.bias.sub_(network(sample).mean(dim=0))


def build(given: dict[str, Any] | None = None, seed: int = 0) -> Smoothing:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        defense = Smoothing.from_config(section("smoothing", given or config())).eval()
        x = images(24, defense.input_shape, 99)
        cell = torch.arange(24) % defense.cells
        roughen(defense.network, defense.views(x, torch.arange(24), cell))
        defense.calibrate(x)
    return defense


def images(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """8-bit noise around a brightness of each image's own."""
    generator = torch.Generator().manual_seed(seed)
    level, noise = torch.rand(count, 1, 1, 1, generator=generator), torch.rand(count, *shape, generator=generator)
    return (255 * (level + 0.6 * noise - 0.3).clamp(0, 1)).round() / 255


def kept(length: int, how: SmoothingOptions, *, banded: bool) -> list[list[int]]:
    """For each cell along an axis, the pixels that it keeps, in the order in which a crop shows them."""
    if not banded:
        return [list(range(length))]
    cells, start = [], 0
    while start < length:
        pixels, at = [], start
        for _ in range(how.band):
            pixels.append(at)
            at = 0 if at == length - 1 else at + 1
        cells.append(pixels)
        start += how.stride
    return cells


def axes(shape: tuple[int, int, int], how: SmoothingOptions) -> tuple[list[list[int]], list[list[int]]]:
    return (
        kept(shape[1], how, banded=how.ablation != "column"),
        kept(shape[2], how, banded=how.ablation != "row"),
    )


@pytest.mark.parametrize(("ablation", "view", "stride"), CASES)
def test_a_view_shows_the_kept_pixels_twice_and_nothing_else(ablation: str, view: str, stride: int) -> None:
    defense = build(config(ablation=ablation, view=view, stride=stride))
    rows, columns = axes(SHAPE, defense.how)
    assert defense.cells == len(rows) * len(columns)
    assert (stride, ablation) != (3, "column") or columns[3] == [9, 0, 1]
    x = images(2) * 0.8 + 0.1  # neither black nor white
    image = torch.arange(2).repeat_interleave(defense.cells)
    shown = defense.views(x, image, torch.arange(defense.cells).repeat(2), full=5.0)
    for v, (b, r, c) in enumerate(product(range(2), rows, columns)):
        if view == "full":
            wanted = torch.zeros(4, *SHAPE[1:])
            for row, column in product(r, c):
                wanted[:2, row, column] = x[b, :, row, column]
                wanted[2:, row, column] = 5 - x[b, :, row, column]
        else:
            wanted = torch.zeros(4, len(r), len(c))
            for (i, row), (j, column) in product(enumerate(r), enumerate(c)):
                wanted[:2, i, j] = x[b, :, row, column]
                wanted[2:, i, j] = 5 - x[b, :, row, column]
        assert torch.equal(shown[v], wanted)


def test_an_absent_pixel_is_not_a_black_one() -> None:
    defense = build(config(view="full"))
    black, zero = torch.zeros(1, *SHAPE), torch.tensor([0])
    shown = defense.views(black, zero, zero)
    assert shown[0, :, 0, 0].tolist() == [0, 0, 1, 1]
    assert shown[0, :, 0, 5].tolist() == [0, 0, 0, 0]
    assert defense.views(1 - black, zero, zero)[0, :, 0, 0].tolist() == [1, 1, 0, 0]
    other = defense.views(black, zero, zero + 1)
    assert not torch.equal(shown, other)


@pytest.mark.parametrize(("ablation", "view", "stride"), CASES)
@pytest.mark.parametrize("patch", [Patch(1, 1), Patch(2, 3), Patch(6, 2), Patch(1, 9)], ids=str)
def test_a_patch_reaches_exactly_the_cells_that_are_claimed(ablation: str, view: str, stride: int, patch: Patch) -> None:
    """A not-a-number in the patch, through the deployed network, at every location; and the pixels that cells keep."""
    defense = build(config(ablation=ablation, view=view, stride=stride))
    rows, columns = axes(SHAPE, defense.how)
    locations, cover = patch.locations(*SHAPE[1:]).tolist(), defense.cover(patch)
    claimed = (cover.rows.matrix()[:, None, :, None] * cover.columns.matrix()[None, :, None, :]).flatten(0, 1).bool()
    assert claimed.shape == (len(locations), len(rows), len(columns))
    x = images(1).repeat(len(locations), 1, 1, 1)
    for at, (top, left, height, width) in enumerate(locations):
        x[at, :, top : top + height, left : left + width] = float("nan")
        inside = set(product(range(top, top + height), range(left, left + width)))
        for (n, r), (m, c) in product(enumerate(rows), enumerate(columns)):
            assert bool(claimed[at, n, m]) == bool(inside & set(product(r, c)))
    with torch.no_grad():
        reached = defense.scores(x).isnan()
    assert torch.equal(reached.any(dim=1), reached.all(dim=1))
    assert torch.equal(reached.any(dim=1), claimed)
    defense.self_test()


@pytest.mark.parametrize(("ablation", "view", "stride"), CASES)
def test_a_changed_pixel_changes_no_other_cell(ablation: str, view: str, stride: int) -> None:
    defense, before = build(config(ablation=ablation, view=view, stride=stride)), images(3)
    cover = defense.cover(Patch(1, 1))
    rows, columns = cover.rows.matrix().bool(), cover.columns.matrix().bool()
    scores = defense.scores(before)
    for row, column in ((0, 0), (5, 9), (2, 4), (3, 8)):
        after = before.clone()
        after[:, :, row, column] = 1 - after[:, :, row, column].round()
        differ = (defense.scores(after) != scores).any(dim=1).any(dim=0)
        reached = rows[row][:, None] & columns[column]
        assert not bool((differ & ~reached).any())
        assert bool((differ & reached).any())


@pytest.mark.parametrize(("length", "band", "stride"), [(10, 3, 3), (10, 4, 3), (32, 4, 1), (7, 7, 2), (9, 1, 4), (10, 5, 7)])
def test_counts_along_an_axis_are_those_of_sets_of_pixels(length: int, band: int, stride: int) -> None:
    shape = (1, 4, length)
    how = SmoothingOptions(ablation="column", band=band, stride=stride)
    defense = build(config(shape, band=band, stride=stride))
    cells = kept(length, how, banded=True)
    for side in range(1, length + 1):
        cover = defense.cover(Patch(2, side))
        assert [list(touched) for touched in cover.columns.touched] == [
            [i for i, pixels in enumerate(cells) if any(start <= p < start + side for p in pixels)]
            for start in range(length - side + 1)
        ]
        assert cover.rows.touched == ((0,), (0,), (0,))
        if stride == 1:  # as published
            assert {len(touched) for touched in cover.columns.touched} == {min(side + band - 1, length)}


def same(one: Certificate, other: Certificate) -> None:
    for name in ("prediction", "margin", "certified", "worst", "runner_up"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize(("ablation", "view"), [("column", "crop"), ("row", "full"), ("block", "crop")])
def test_batches_do_not_matter(ablation: str, view: str, vote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(config(ablation=ablation, view=view, vote=vote)), images(7)
    whole, scores = defense.certify(x, Patch(2, 2)), defense.scores(x)
    same(Certificate.cat([defense.certify(image[None], Patch(2, 2)) for image in x]), whole)
    assert torch.equal(torch.cat([defense.scores(image[None]) for image in x]), scores)
    assert torch.equal(torch.cat([defense.scores(part) for part in x.split(3)]), scores)
    assert torch.equal(defense.scores(x.flip(0)).flip(0), scores)
    assert torch.equal(defense.train().scores(x), scores)  # its norms are frozen in the deployed network
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(defense.scores(x), scores)
    monkeypatch.setattr(smoothing, "PIECE", 1000)
    assert torch.equal(defense.scores(x), scores)
    assert torch.equal(defense.predict(x), whole.prediction)
    assert defense.predict(x[:0]).shape == (0,)


def test_pixels_are_rounded_to_eight_bits_first() -> None:
    defense, x = build(), images(8)
    noise = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 0.99 / 255
    near = (x + noise).clamp(0, 1)
    assert torch.equal(defense.scores(near), defense.scores(x))
    assert torch.equal(defense.scores(near.double()), defense.scores(x))


def test_each_cell_votes_for_the_first_of_its_largest_scores() -> None:
    defense = build(config(vote="top-one"))
    scores = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, -3.0, -0.5]]).t()[None, :, None]
    votes = defense.count(scores)
    assert votes.unknown is None
    assert votes.scores[0, :, 0].t().int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_a_likelihood_next_to_the_threshold_counts_as_the_attackers() -> None:
    defense = build(config(vote="threshold", threshold=0.25))
    near = [0.5, 0.25 + ROUNDING / 3, 0.25 - ROUNDING / 3, 1e-12]
    rows = [[0.25] * 4, near, [0.3, 0.3, 0.3, 0.1], [0.22, 0.24, 0.2, 0.34]]
    votes = defense.count(torch.tensor(rows, dtype=torch.float64).log().t()[None, :, None])
    assert votes.unknown is not None
    assert votes.unknown[0, :, 0].t().int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert votes.scores[0, :, 0].t()[1:].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    # all ten cells surely vote for class 1 alone, then one is in doubt about 1 and another about 3
    sure = torch.tensor([0.1, 0.7, 0.1, 0.1]).double().log()[None, :, None, None].repeat(1, 1, 1, 10)
    doubt = sure.clone()
    doubt[0, :, 0, 8] = torch.tensor([0.5, 0.25, 0.15, 0.1]).double().log()
    doubt[0, :, 0, 9] = torch.tensor([0.05, 0.65, 0.05, 0.25]).double().log()
    cover = defense.cover(Patch(1, 1))
    assert float(additive.prove(defense.count(sure), cover).margin) == 10 - 2 * 3
    assert float(additive.prove(defense.count(doubt), cover).margin) == 10 - 2 - 2 * 3  # it leads 9 to 1 at worst
    assert float(additive.prove(defense.count(doubt), cover).margin) == float(
        reference(defense.count(doubt), defense, Patch(1, 1))
    )


def reference(votes: Votes, defense: Smoothing, patch: Patch) -> Tensor:
    """The smallest margin over rivals and locations of each image, by loops: the attacker rewrites every cell that he sees."""
    rows, columns = axes(defense.input_shape, defense.how)
    margins = []
    for b, image in enumerate(votes.scores.int().tolist()):
        sums = [sum(map(sum, plane)) for plane in image]
        answer, found = sums.index(max(sums)), []
        for top, left, height, width in patch.locations(*defense.input_shape[1:]).tolist():
            inside = set(product(range(top, top + height), range(left, left + width)))
            worst = [0] * len(sums)
            for (n, r), (m, c) in product(enumerate(rows), enumerate(columns)):
                seen = bool(inside & set(product(r, c)))
                for k in range(len(sums)):
                    unknown = votes.unknown is not None and bool(votes.unknown[b, k, n, m])
                    worst[k] += int(k != answer) if seen or unknown else image[k][n][m]
            found += [worst[answer] - worst[k] + (answer < k) for k in range(len(sums)) if k != answer]
        margins.append(min(found))
    return torch.tensor(margins, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ablation", "stride", "vote"),
    [
        ("column", 1, "threshold"),
        ("row", 1, "top-one"),
        ("block", 1, "top-one"),
        ("column", 3, "top-one"),
        ("block", 3, "threshold"),
    ],
)
def test_margins_are_those_of_loops_over_pixels(ablation: str, stride: int, vote: str) -> None:
    defense = build(config(classes=3, ablation=ablation, stride=stride, vote=vote, band=2, threshold=0.4))
    x = images(5, seed=1)
    votes = defense.votes(x)
    for patch in (Patch(2, 3), Patch(5, 1)):
        certificate = defense.certify(x, patch)
        assert torch.equal(certificate.margin, reference(votes, defense, patch))
        assert torch.equal(certificate.prediction, defense.predict(x))


def test_condition_3_3_is_the_published_count() -> None:
    """The answer leads by more than 2 (p + b - 1) votes, p columns wide."""
    defense, x = build(config(band=2)), images(60, seed=3)
    for side in (1, 2, 3):
        first, second = defense.votes(x).sums().topk(2, dim=1).values.t()
        published = first - second > 2 * (side + 1)
        assert torch.equal(defense.certify(x, Patch(4, side), "3.3").certified, published)
        assert bool((defense.certify(x, Patch(4, side)).certified >= published).all())


@pytest.mark.parametrize(
    ("ablation", "view", "vote"),
    [("column", "full", "top-one"), ("row", "full", "threshold"), ("block", "full", "threshold"), ("block", "crop", "top-one")],
)
def test_no_change_moves_a_certified_answer(ablation: str, view: str, vote: str) -> None:
    """Every location and content, as for :meth:`Smoothing.tiny` in ``tests/soundness``, for what it does not draw."""
    arenas, shape = [], (1, 4, 3) if ablation == "row" else (1, 3, 4)
    for seed in range(2):
        given = config(shape, 3, ablation=ablation, view=view, vote=vote, threshold=0.5, band=1)
        given["network"]["options"] |= {"widths": [4], "blocks": [1], "strides": [1 + seed % 2]}
        arenas.append(Arena(f"{ablation} {seed}", build(given, seed), draw_images(shape, 8, seed)))
    score = check(arenas, [Patch(1, 1), Patch(2, 1), Patch(1, 2), Sparse(2)])
    assert score.violations == []
    assert score.certified >= 5 and score.broken >= 20


def step(options: SmoothingOptions, seed: int) -> TrainingStep:
    return TrainingStep(Patch(3, 3), options, 1.0, 10, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_loss_is_the_cross_entropy_of_one_view_of_each_image(ablation: str) -> None:
    defense, x, label = build(config(ablation=ablation)), images(12), torch.arange(12) % 4
    loss = defense.training_loss(x, label, step(defense.how, 5))
    cells = torch.randint(defense.cells, (12,), generator=torch.Generator().manual_seed(5))
    assert len(set(cells.tolist())) > 2
    with torch.no_grad():
        logits = torch.cat([defense.network(defense.views(x, torch.tensor([at]), cells[at : at + 1])) for at in range(12)])
    assert torch.allclose(loss, F.cross_entropy(logits, label), atol=1e-5)
    loss.backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in defense.parameters())


def test_the_surrogate_is_the_mean_likelihood_of_all_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(3).requires_grad_()
    whole = defense(x)
    one = [defense.network(defense.views(x, torch.tensor([1]), torch.tensor([c]))).softmax(dim=1) for c in range(defense.cells)]
    assert torch.allclose(whole[1:2], torch.stack(one).mean(dim=0), atol=1e-6)
    gradient = torch.autograd.grad(whole[:, 1].sum(), x)[0]
    monkeypatch.setattr(smoothing, "PIECE", 2000)
    assert torch.allclose(torch.autograd.grad(defense(x)[:, 1].sum(), x)[0], gradient, atol=1e-6)
    assert bool((gradient != 0).any(dim=1).all())


TINY = Recipe(
    "patch:1x1",
    defense="smoothing",
    network_options={"widths": [8, 16], "blocks": [1, 1], "strides": [2, 2]},
    epochs=4,
    batch_size=32,
    learning_rate=0.01,
    validation=100,
    options={"band": 20, "stride": 9, "flip": False, "shift": 1},
)


def test_training_learns_and_all_of_it_is_stored(tmp_path: Path) -> None:
    some = data.load("mnist", "test").limit(800, 0)
    made = loop.train(TINY, some, tmp_path / "run")
    _, held = some.hold_out(TINY.validation, TINY.seed)
    assert made.validation.clean >= 30
    again, read = checkpoint.load_defense(made.folder)
    assert isinstance(again, Smoothing)
    assert again.how == Ablations(band=20, stride=9)
    assert read == TINY.config()
    assert monitor(again, held, TINY) == made.validation


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_storage_changes_nothing(tmp_path: Path, stored: str) -> None:
    given = config(stored=stored, ablation="block", stride=2, vote="threshold", view="full")
    defense, x = build(given), images(5)
    with torch.no_grad():
        for weight in defense.parameters():  # as training does at its end
            weight.copy_(weight.to(getattr(torch, stored)) if weight.ndim > 1 else weight)
    defense.calibrate(images(8, seed=98))
    given = file_of("smoothing", given)
    checkpoint.save_defense(tmp_path, defense, given, stored=stored)
    again, read = checkpoint.load_defense(tmp_path)
    assert read == given and isinstance(again, Smoothing) and again.how == defense.how
    assert torch.equal(again.scores(x), defense.scores(x))
    same(again.certify(x, Patch(2, 2)), defense.certify(x, Patch(2, 2)))


def test_without_options_it_is_the_default() -> None:
    given = config((1, 5, 6))
    del given["options"]
    how = Smoothing.from_config(section("smoothing", given)).how
    assert how == Ablations() == Ablations("column", 4, 1, "top-one", 0.2, "crop")
    options = Recipe("patch:5x5", "cifar10", "smoothing").config()["recipe"]["options"]
    assert set(options) == set(SmoothingOptions.__dataclass_fields__)


def test_the_deployed_network_follows_the_weights() -> None:
    defense, x = build(), images(4)
    first, before = defense.deployed(), defense.scores(x)
    assert defense.deployed() is first
    with torch.no_grad():
        defense.network.head.bias[2] += 1000
    assert bool((defense.votes(x).scores[:, 2]).all())
    defense.load_state_dict(build().state_dict())
    assert torch.equal(defense.scores(x), before)


def test_what_it_cannot_do_is_said_in_one_line() -> None:
    for options, message in (
        ({"band": 11}, "a column of 11 pixels is larger than the 6x10 image. Allowed: up to 10."),
        ({"band": 7, "ablation": "row"}, "a row of 7 pixels is larger than the 6x10 image. Allowed: up to 6."),
        ({"band": 7, "ablation": "block"}, "a block of 7 pixels is larger than the 6x10 image. Allowed: up to 6."),
    ):
        with pytest.raises(UsageError) as caught:
            build(config(**options))
        assert str(caught.value) == message
    with pytest.raises(IntegrityError, match="smoothing cannot be built: band is 0, not 1 or more"):
        build(config(band=0))
    wrong = {"ablation": "diagonal", "vote": "all", "view": "half", "threshold": 1.0, "stride": 0, "bend": 4}
    with pytest.raises(UsageError) as caught:
        Recipe("patch:5x5", "cifar10", "smoothing", options=wrong)
    said = str(caught.value)
    assert (
        "\n" not in said
        and "known options: zoom, turn, tint, teacher_weight, ablation, band, stride, vote, threshold, view, flip, shift." in said
    )
    for part in ("bend is not", "'diagonal', not one of column, row, block", "'all', not one of top-one, threshold"):
        assert part in said
    for part in ("'half', not one of crop, full", "threshold is 1.0, not between 0 and 1", "stride is 0, not 1 or more"):
        assert part in said
    other = config()
    other["network"] = {"name": "mlp", "options": {"hidden": [3], "mean": [0.5, 0.5], "std": [1, 1]}}
    with pytest.raises(IntegrityError, match="needs a residual network, not 'mlp'"):
        Smoothing.from_config(section("smoothing", other))
    with pytest.raises(UnsupportedThreat, match="votes have no certificate"):
        build().certify(images(1), Sparse(1, "value"))


PLANS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "band": ((6, 32, 4), {"widths": (8, 16, 24, 32), "blocks": (2, 1, 1, 2)}),
    "block": ((2, 5, 5), {"widths": (7, 9), "blocks": (1, 2), "strides": (2, 3)}),
    "frame": ((2, 9, 8), {"widths": (8, 8, 40), "blocks": (2, 1, 1), "strides": (1, 1, 2), "bits": 6}),
    "fine": ((2, 5, 6), {"widths": (5, 9), "blocks": (2, 1), "strides": (1, 2), "bits": 16}),
    "line": ((2, 1, 7), {"widths": (5,), "blocks": (2,), "strides": (1,)}),
}


def resnet(name: str, seed: int = 0) -> ResNet:
    shape, plan = PLANS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = models.build("resnet", {**plan, "input_shape": shape, "classes": 5, "mean": (0.1,), "std": (0.2,)})
        assert isinstance(made, ResNet)
        roughen(made, steps(name, 12, 1) / 255)
        with fixed_point.observing(made), torch.no_grad():
            made(steps(name, 40, 2) / 255)
    return made


def steps(name: str, count: int, seed: int) -> Tensor:
    """Encoded views in whole steps, v and 255 - v, some pixels absent."""
    channels, height, width = PLANS[name][0]
    generator = torch.Generator().manual_seed(seed)
    v = torch.randint(256, (count, channels // 2, height, width), generator=generator).float()
    absent = torch.rand(count, 1, height, width, generator=generator) < 0.2
    return torch.cat([v, 255 - v], dim=1).masked_fill(absent, 0)


@pytest.mark.parametrize("name", [name for name in PLANS if name != "fine"])
def test_the_frozen_network_is_exact_and_close_to_what_was_trained(name: str) -> None:
    network, v = resnet(name), steps(name, 20, 3)
    frozen, bits = network.freeze(torch.float32)
    assert bits >= 5
    with torch.no_grad(), precision.exact_arithmetic():
        found = frozen(v)
        assert torch.equal(copy.deepcopy(frozen).double()(v.double()), found)  # as off the CPU
        assert torch.equal(torch.cat([frozen(view[None]) for view in v]), found)
        last = frozen.to(memory_format=torch.channels_last)
        assert torch.equal(last(v.contiguous(memory_format=torch.channels_last)), found)
        trained, finer = network(v / 255), network.freeze(torch.float64)[0](v.double())
    for other in (trained, finer):
        assert float((found - other).square().mean().sqrt()) < 0.15 * float(trained.std())


def test_with_many_bits_it_is_the_trained_network() -> None:
    network, v = resnet("fine"), steps("fine", 20, 3)
    with torch.no_grad():
        found, trained = network.freeze(torch.float64)[0](v.double()), network.double()(v.double() / 255)
    assert float((found - trained).abs().max()) < 1e-3 * float(trained.std())


def unit(values: Tensor) -> float:
    """The exponent of the largest power of two that divides all of the values."""
    mantissa, exponent = torch.frexp(values[values != 0].double())
    whole = (mantissa * 2.0**53).long()
    return float((exponent - 53 + (whole & -whole).double().log2()).min()) if len(whole) else float("inf")


def obeys(parts: list[tuple[Tensor, ValueRange]], bias: Tensor, bits: int) -> bool:
    """The theorem of :mod:`patchcert_cli.layers.fixed_point`, channel by channel, for a sum over several value_ranges."""
    for channel in range(len(bias)):
        step = min([unit(weight[channel]) + value_range.exponent for weight, value_range in parts] + [unit(bias[channel])])
        total = sum(float(weight[channel].double().abs().sum()) * value_range.most for weight, value_range in parts)
        if total + abs(float(bias[channel])) > 2.0 ** (bits + step):
            return False
    return True


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("factor", [2.0**-9, 1.0, 2.0**9])  # how far the steps on the two ways through a block are apart
def test_no_sum_is_ever_rounded(name: str, factor: float, precision: torch.dtype) -> None:
    network, v = resnet(name), steps(name, 6, 4)
    with torch.no_grad():
        for norm in (layer for which, layer in network.named_modules() if which.endswith("first_norm")):
            assert isinstance(norm, nn.BatchNorm2d)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
        with fixed_point.observing(network):
            network(v / 255)
        frozen: Any
        frozen, fewest = network.freeze(precision)
        if fewest == 0:
            assert name == "fine" and precision == torch.float32
            return
        found, trained = frozen(v.to(precision)), network(v / 255)
        assert torch.equal(copy.deepcopy(frozen).double()(v.double()), found)
        assert fewest < fixed_point.ENOUGH - 1 or float((found - trained).square().mean().sqrt()) < 0.3 * float(trained.std())
    bits, value_range = fixed_point.BITS[precision], network.grid.value_range
    assert obeys([(frozen[0].layer.weight, fixed_point.PIXELS)], frozen[0].layer.bias, bits)
    for block in list(frozen)[1:-1]:
        assert obeys([(block.first.weight, value_range)], block.first.bias, bits)
        aside = torch.eye(len(block.second.bias)) if block.shortcut is None else block.shortcut.weight
        assert obeys([(block.second.weight, block.inner), (aside, value_range)], block.second.bias, bits)
        assert block.shortcut is None or not bool(block.shortcut.bias.any())
        value_range = block.value_range
    pooled = ValueRange(value_range.exponent, value_range.most * network.positions)
    assert pooled.most <= 2.0 ** (24 + value_range.exponent)
    assert obeys([(frozen[-1].layer.weight, pooled)], frozen[-1].layer.bias, 53)


def test_where_a_shortcut_is_too_fine_for_float32_it_is_float64() -> None:
    network, v = resnet("band"), steps("band", 6, 4)
    norm: Any = network.blocks[1].second_norm
    with torch.no_grad():
        norm.weight.mul_(1e6)
        assert network.freeze(torch.float32)[1] == 0
        assert next(fixed_point.freeze(network).buffers()).dtype == torch.float64
        assert bool(fixed_point.freeze(network)(v.double()).isfinite().all())
        norm.weight.mul_(1e9)
    with pytest.raises(IntegrityError, match="too far apart in size"):
        fixed_point.freeze(network)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", list(product((1, 2, 3, 4, 7), (1, 2, 3, 5))))
def test_kernels_without_padding_columns_are_the_same_function(size: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    cut = convolution(2, 3, size, stride)
    (up, left), (height, width) = cut.padding, cut.kernel_size
    assert not isinstance(up, str)
    whole = torch.randn(3, 2, 3, 3)  # what is not taken over can be anything
    whole[:, :, 1 - int(up) : 1 - int(up) + height, 1 - int(left) : 1 - int(left) + width] = cut.weight.detach()
    x = torch.randn(4, 2, *size)
    assert torch.allclose(cut(x), F.conv2d(x, whole, stride=stride, padding=1), atol=1e-6)
    whole.requires_grad_()
    F.conv2d(x.double(), whole.double(), stride=stride, padding=1).sum().backward()
    assert whole.grad is not None
    assert int((whole.grad != 0).any(dim=1)[0].sum()) == height * width  # no column too many


def test_networks_that_make_no_sense_are_refused() -> None:
    for plan in ({"widths": (), "blocks": (), "strides": ()}, {"widths": (4,)}, {"widths": (4, 0, 4, 4)}, {"widths": 4}):
        with pytest.raises(IntegrityError, match="network 'resnet' cannot be built"):
            models.build("resnet", {**plan, "input_shape": (2, 4, 4), "classes": 3, "mean": (0.1,), "std": (0.2,)})


def test_the_default_is_resnet_18() -> None:
    made: Any = models.build("resnet", {"input_shape": (6, 32, 32), "classes": 10, "mean": (0.1,), "std": (0.2,)})
    assert sum(weight.numel() for weight in made.parameters()) == 11_173_962 + 3 * 9 * 64  # of CIFAR-10, with six channels
