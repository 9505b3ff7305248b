"""BagCert: what a cell sees, how votes are counted and trained, and that storage and batches change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli import checkpoint, data
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.defenses import Claim, TrainingStep, _cells
from patchcert_cli.defenses.bagcert import BagCert, BagCertOptions, Step
from patchcert_cli.errors import DataError, IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.layers import fixed_point, precision
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat
from patchcert_cli.training import loop, steps
from patchcert_cli.training.recipe import Recipe
from tests.examples import file_of, section

PLANS: dict[int, dict[str, Any]] = {
    5: {"widths": [4, 5], "kernels": [3, 3], "dilations": [1, 1], "mixes": [0, 1]},
    7: {"widths": [4, 5, 6], "kernels": [3, 3, 2], "dilations": [1, 1, 2], "mixes": [1, 0, 2]},
    9: {"widths": [4, 5, 6], "kernels": [3, 3, 3], "dilations": [1, 1, 2], "mixes": [0, 0, 0]},
    11: {"widths": [4, 5, 6], "kernels": [3, 3, 3], "dilations": [1, 2, 2], "mixes": [0, 1, 0]},
    13: {"widths": [4, 5, 6], "kernels": [3, 3, 3], "dilations": [1, 2, 3], "mixes": [1, 1, 1]},
}
SHAPE = (2, 15, 14)


def config(reach: int = 5, shape: tuple[int, int, int] = SHAPE, classes: int = 4, stored: str = "float32") -> dict[str, Any]:
    options = {**PLANS[reach], "mean": [0.4] * shape[0], "std": [0.3] * shape[0]}
    return {
        "defense": "bagcert",
        "input_shape": list(shape),
        "classes": [str(c) for c in range(classes)],
        "network": {"name": "region", "options": options},
        "recipe": {"stored": stored},
    }


def build(given: Mapping[str, Any] | None = None, seed: int = 0, lean: float = 0.7) -> BagCert:
    """Random weights and statistics; each class votes in about half of the cells, or with more ``lean`` in most or few."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        defense = BagCert.from_config(section("bagcert", given or config())).eval()
        for name, buffer in defense.scorer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 1)
        x = images(32, defense.input_shape, 99)
        scores = defense.scorer(x)
        shift = lean * torch.randn(len(defense.classes)) * scores.std(dim=(0, 2, 3))
        defense.scorer.head.bias += shift - scores.mean(dim=(0, 2, 3))
        defense.calibrate(x)
    return defense


def images(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """8-bit noise around a brightness of each image's own."""
    generator = torch.Generator().manual_seed(seed)
    level, noise = torch.rand(count, 1, 1, 1, generator=generator), torch.rand(count, *shape, generator=generator)
    return (255 * (level + 0.6 * noise - 0.3).clamp(0, 1)).round() / 255


def framed(reach: int, frame: str) -> dict[str, Any]:
    """A configuration with no frame, one of half the receptive field, or the widest."""
    given = config(reach)
    given["network"]["options"] |= {"padding": {"no": 0, "half": reach // 2, "widest": reach - 1}[frame]}
    return given


@pytest.mark.parametrize("reach", PLANS)
@pytest.mark.parametrize("frame", ["no", "half", "widest"])
@pytest.mark.parametrize("patch", [Patch(1, 1), Patch(3, 2), Patch(2, 6), Patch(15, 1)], ids=str)
def test_a_patch_reaches_exactly_the_cells_that_are_claimed(reach: int, patch: Patch, frame: str) -> None:
    """A not-a-number in the patch, through the deployed network, at every location."""
    defense = build(framed(reach, frame))
    padding = defense.scorer.padding
    assert defense.receptive_field == reach
    cover, locations = defense.cover(patch), patch.locations(*SHAPE[1:])
    steps = fixed_point.to_steps(images(1)).repeat(len(locations), 1, 1, 1)
    for image, (top, left, height, width) in zip(steps, locations.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = float("nan")
    network = defense.deployed()
    with torch.no_grad(), precision.exact_arithmetic():
        reached = network(steps.to(fixed_point.execution_type(network, steps.device))).isnan()
    assert torch.equal(reached.any(dim=1), reached.all(dim=1))
    claimed = cover.rows.matrix()[:, None, :, None] * cover.columns.matrix()[None, :, None, :]  # [P, Q, N, M]
    assert reached.shape[2:] == tuple(side + 2 * padding - reach + 1 for side in (15, 14)) == claimed.shape[2:]
    assert torch.equal(reached.any(dim=1), claimed.flatten(0, 1).bool())


@pytest.mark.parametrize("reach", PLANS)
@pytest.mark.parametrize("frame", ["no", "half"])
def test_every_so_manieth_cell_has_the_scores_of_the_whole_map(reach: int, frame: str) -> None:
    scorer, x = build(framed(reach, frame)).scorer.double(), images(3).double()
    with torch.no_grad():
        whole = scorer(x)
        for every in range(1, 7):
            some = scorer(x, every)
            assert some.shape == whole[:, :, ::every, ::every].shape
            assert torch.allclose(some, whole[:, :, ::every, ::every], atol=1e-12), every


@pytest.mark.parametrize("reach", PLANS)
def test_cells_inside_a_framed_image_have_the_scores_of_the_image_alone(reach: int) -> None:
    """And the cells at the edge those of an image with the frame's colour around it, a whole number of steps."""
    plain, x = build(config(reach)), images(4)
    for frame in ("half", "widest"):
        both = build(framed(reach, frame))
        both.load_state_dict(plain.state_dict())
        width, inside = both.scorer.padding, (slice(None), slice(None), *[slice(both.scorer.padding, -both.scorer.padding)] * 2)
        if width:
            assert torch.equal(both.scores(x)[inside], plain.scores(x))
            around = torch.full((len(x), 2, 15 + 2 * width, 14 + 2 * width), 102 / 255)  # the mean, 0.4
            around[:, :, width:-width, width:-width] = x
            assert torch.equal(both.scores(x), plain.run(fixed_point.to_steps(around)))
            with torch.no_grad():
                assert torch.allclose(both.scorer(x), plain.scorer(around), atol=1e-4)
        both.self_test()


def test_a_frame_leaves_no_cell_without_a_pixel() -> None:
    given = config(5)
    given["network"]["options"] |= {"padding": 5}
    with pytest.raises(UsageError, match="padding 5 leaves cells that see no pixel") as caught:
        BagCert.from_config(section("bagcert", given))
    assert "0 to 4; 2 gives" in str(caught.value.hint)
    for padding in (-20, -1):
        given["network"]["options"] |= {"padding": padding, "places": padding == -20}
        with pytest.raises(IntegrityError, match=f"padding is {padding}, not 0 or more"):
            BagCert.from_config(section("bagcert", given))


def test_training_from_other_weights_whitens_and_keeps_their_function() -> None:
    given = config(5)
    given["network"]["options"] |= {"whiten": True, "padding": 2}
    defense, x = build(given), images(40)
    before = defense.scorer(x)
    defense.fit_start(x)
    stage = defense.scorer.stages[0]
    assert not torch.allclose(stage.whitening, torch.eye(len(stage.whitening)), atol=0.1)
    torch.testing.assert_close(defense.scorer(x), before, rtol=1e-4, atol=1e-4)


def mirrored(reach: int, **more: Any) -> dict[str, Any]:
    given = config(reach)
    given["network"]["options"] |= {"mirrored": True, **more}
    return given


@pytest.mark.parametrize("reach", PLANS)
def test_a_mirrored_scorer_looks_twice_and_cells_keep_their_windows(reach: int) -> None:
    one, both, x = build(config(reach)), build(mirrored(reach)), images(4)
    both.load_state_dict(one.state_dict())
    wanted = (one.scores(x).double() + one.scores(x.flip(3)).flip(3).double()) / 2
    assert torch.equal(both.scores(x), wanted) and torch.equal(both.scores(x.flip(3)), wanted.flip(3))
    both.self_test()
    with torch.no_grad():
        assert torch.allclose(both.scorer(x), (one.scorer(x) + one.scorer(x.flip(3)).flip(3)) / 2, atol=1e-5)
        assert torch.equal(both.scorer.train()(x), one.scorer.train()(x)), "training looks once"


def test_a_mirrored_scorer_needs_windows_that_mirror_to_windows() -> None:
    for more, why in ({"places": True}, "where they are"), ({"stride": 2}, "columns at the edge"):
        given = mirrored(5, **more)
        with pytest.raises(UsageError, match=why):
            BagCert.from_config(section("bagcert", given))
    build(mirrored(5, stride=3)).self_test()  # 14 - 5 = 9


def test_votes_are_the_signs_of_the_deployed_scores() -> None:
    defense, x = build(), images(9)
    network = defense.deployed()
    votes = defense.votes(x)
    with torch.no_grad(), precision.exact_arithmetic():
        scores = network(fixed_point.to_steps(x).to(fixed_point.execution_type(network, x.device)))
    assert torch.equal(votes.scores, scores > 0)
    assert votes.unknown is None and votes.weight is None
    total = (scores > 0).sum(dim=(2, 3)).tolist()
    assert defense.predict(x).tolist() == [of.index(max(of)) for of in total]
    with torch.no_grad():
        trained = defense.scorer(x) > 0
    assert float((trained == votes.scores).float().mean()) > 0.97
    assert 0.05 < float(votes.scores.float().mean()) < 0.95


def test_a_score_of_zero_is_no_vote_and_gradients_pass_straight_through() -> None:
    scores = torch.tensor([-2.0, -0.1, 0.0, 1e-30, 3.0], requires_grad=True)
    votes = Step.apply(scores)
    assert votes.tolist() == [0, 0, 0, 1, 1]
    (votes * torch.arange(1.0, 6.0)).sum().backward()
    likelihood = scores.detach().sigmoid()
    assert scores.grad is not None
    assert torch.allclose(scores.grad, torch.arange(1.0, 6.0) * likelihood * (1 - likelihood))


def step(options: BagCertOptions, progress: float = 5.0, seed: int = 0) -> TrainingStep:
    return TrainingStep(Patch(3, 3), options, progress, 10, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharpness", [0.0, 15.0, 40.0])
@pytest.mark.parametrize(("margin", "one_hot", "every"), [(0.5, 0.0, 1), (0.9, 0.3, 1), (0.6, 0.1, 2), (0.6, 0.0, 3)])
def test_the_loss_is_its_formula(sharpness: float, margin: float, one_hot: float, every: int) -> None:
    defense, x = build(), images(6)
    label = torch.tensor([0, 1, 2, 3, 0, 1])
    options = BagCertOptions(margin=margin, sharpness=sharpness, one_hot=one_hot, every=every)
    down, right = torch.randint(every, (2,), generator=torch.Generator().manual_seed(3)).tolist() if every > 1 else (0, 0)
    with torch.no_grad():
        found = float(defense.training_loss(x, label, step(options, seed=3)))
        votes = (defense.scorer(x) > 0)[:, :, down::every, right::every].double()
    hinges, penalties = [], []
    for image, right_class in zip(votes, label.tolist(), strict=True):
        share = [float(plane.mean()) for plane in image]
        rivals = torch.tensor([share[c] for c in range(4) if c != right_class], dtype=torch.float64)
        most = float(torch.logsumexp(sharpness * rivals, dim=0) / sharpness) if sharpness else max(rivals.tolist())
        hinges.append(max(0.0, margin - (share[right_class] - most)))
        penalties += [(sum(float(v) for v in cell) - 1) ** 2 for cell in image.flatten(1).t()]
    assert found == pytest.approx(sum(hinges) / 6 + one_hot * sum(penalties) / len(penalties), rel=1e-5)
    assert found > 0


def test_the_gradient_of_the_loss_is_that_of_sigmoids_where_the_hinge_is_open() -> None:
    defense, x, label = build(), images(5), torch.tensor([0, 1, 2, 3, 0])
    options = BagCertOptions(margin=2.0, sharpness=0.0, every=1)
    defense.training_loss(x, label, step(options)).backward()
    given = defense.scorer.head.bias.grad
    scores = defense.scorer(x).detach()
    share = (scores > 0).double().mean(dim=(2, 3))
    slope = (scores.sigmoid() * (1 - scores.sigmoid())).double().mean(dim=(2, 3))  # [B, K]
    rival = share.scatter(1, label[:, None], -1).argmax(dim=1)
    sign = F.one_hot(rival, 4).double() - F.one_hot(label, 4).double()
    assert given is not None
    assert torch.allclose(given.double(), (slope * sign).mean(dim=0), atol=1e-6)


def test_first_epochs_train_with_cross_entropy() -> None:
    defense, x, label = build(), images(4), torch.tensor([0, 1, 2, 3])
    options = BagCertOptions(warm_up_epochs=2, every=1)
    with torch.no_grad():
        wanted = float(F.cross_entropy(defense.scorer(x).mean(dim=(2, 3)), label))
        assert float(defense.training_loss(x, label, step(options, 1.9))) == pytest.approx(wanted, rel=1e-6)
        assert float(defense.training_loss(x, label, step(options, 2.0))) != pytest.approx(wanted, rel=1e-3)


def test_training_on_few_cells() -> None:
    """A map of 3x2 cells, of which every tenth is wanted: there is always one."""
    defense = build(config(13))
    for seed in range(10):
        loss = defense.training_loss(images(2), torch.tensor([0, 1]), step(BagCertOptions(every=10), seed=seed))
        assert bool(loss.isfinite())


TINY = Recipe(
    "patch:1x1",
    defense="bagcert",
    network_options={"widths": [16, 24], "kernels": [3, 3], "dilations": [1, 2], "mixes": [0, 1]},
    epochs=6,
    batch_size=32,
    learning_rate=0.01,
    validation=150,
    options={"margin": 0.4, "flip": False, "shift": 0, "every": 3, "warm_up_epochs": 1},
)


def test_training_raises_certified_accuracy(tmp_path: Path) -> None:
    some = data.load("mnist", "test").limit(1350, 0)
    made = loop.train(TINY, some, tmp_path / "run")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        untrained = checkpoint.defenses.build(TINY.config()["deployed"])
    kept, held = some.hold_out(TINY.validation, TINY.seed)
    untrained.calibrate(kept.pixels[:100].float() / 255)
    before = steps.monitor(untrained, held, TINY)
    assert made.validation.certified >= 10 > 2 * before.certified
    assert made.validation.clean >= 60 > 2 * before.clean
    again, _ = checkpoint.load_defense(made.folder)
    assert steps.monitor(again, held, TINY) == made.validation


def same(one: Certificate, other: Certificate) -> None:
    assert torch.equal(one.prediction, other.prediction)
    assert torch.equal(one.margin, other.margin)
    assert torch.equal(one.certified, other.certified)
    assert torch.equal(one.worst, other.worst)
    assert torch.equal(one.runner_up, other.runner_up)


@pytest.mark.parametrize("threat", [Patch(2, 3), Sparse(1), Sparse(3)], ids=str)
def test_batches_do_not_matter(threat: Threat, monkeypatch: pytest.MonkeyPatch) -> None:
    defense, x = build(), images(11)
    whole, answers = defense.certify(x, threat), defense.predict(x)
    same(Certificate.cat([defense.certify(image[None], threat) for image in x]), whole)
    same(Certificate.cat([defense.certify(part, threat) for part in x.split(4)]), whole)
    assert torch.equal(torch.cat([defense.predict(image[None]) for image in x]), answers)
    assert torch.equal(defense.predict(x.flip(0)).flip(0), answers)
    monkeypatch.setattr(_cells, "PIECE", 1)
    same(defense.certify(x, threat), whole)
    same(defense.train().certify(x, threat), whole)  # its norms are frozen in the deployed network
    assert torch.equal(whole.prediction, answers)
    assert not bool(whole.tolerance.any())


def test_reduced_precision_around_it_changes_nothing() -> None:
    defense, x = build(), images(6)
    whole = defense.certify(x, Patch(2, 2))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(defense.certify(x, Patch(2, 2)), whole)
            assert torch.equal(defense.predict(x), whole.prediction)
    finally:
        torch.set_float32_matmul_precision(before)


def test_pixels_are_rounded_to_eight_bits_first() -> None:
    defense, x = build(), images(8)
    noise = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 0.99 / 255
    near = (x + noise).clamp(0, 1)
    same(defense.certify(near, Patch(2, 2)), defense.certify(x, Patch(2, 2)))
    same(defense.certify(near.double(), Patch(2, 2)), defense.certify(x, Patch(2, 2)))


def test_all_claims_at_once_are_each_on_its_own() -> None:
    shape = (2, 24, 24)
    defense, x = build(config(5, shape), lean=0.3), images(60, shape)
    claims = [Claim(Patch(2, 2), method) for method in additive.METHODS] + [Claim(Sparse(2)), Claim(parse_threat("patch:1%"))]
    together = defense.certify_claims(x, claims)
    for claim, certificate in zip(claims, together, strict=True):
        same(certificate, defense.certify(x, claim.threat, claim.method))
        assert certificate.threat == claim.threat
    same(defense.certify(x, parse_threat("patch:1%")), defense.certify(x, Patch(3, 3)))
    same(defense.certify(x, Sparse(1)), defense.certify(x, Patch(1, 1)))
    counts = {certificate.method: int(certificate.certified.sum()) for certificate in together[:4]}
    assert list(counts) == ["additive", "condition 3.1", "condition 3.2", "condition 3.3"]
    assert counts["condition 3.1"] == counts["condition 3.2"]
    assert 0 < counts["condition 3.3"] < counts["condition 3.2"] <= counts["additive"] < 60


def test_the_map_of_margins_has_the_certificate_as_its_smallest_entry() -> None:
    defense, x, patch = build(), images(12), Patch(3, 2)
    chart, certificate = defense.margin_map(x, patch), defense.certify(x, patch)
    assert chart.shape == (12, 13, 13)
    assert torch.equal(chart.flatten(1).amin(dim=1), certificate.margin)
    at = chart[torch.arange(12), certificate.worst[:, 0], certificate.worst[:, 1]]
    assert torch.equal(at, certificate.margin)
    assert certificate.worst[:, 2:].tolist() == [[3, 2]] * 12
    with pytest.raises(UsageError, match="a map needs one patch"):
        defense.margin_map(x, Sparse(2))  # type: ignore[arg-type]


def test_a_patch_that_reaches_every_cell_certifies_nothing() -> None:
    for reach, patch in ((13, Patch(13, 13)), (5, Patch(15, 14)), (9, Patch(8, 8)), (5, Patch(14, 14))):
        defense, x = build(config(reach)), images(20)
        for method in additive.METHODS:
            certificate = defense.certify(x, patch, method)
            assert int(certificate.certified.sum()) == 0
            assert torch.equal(certificate.prediction, defense.predict(x))


def test_what_it_cannot_do_is_said() -> None:
    defense, x = build(), images(2)
    with pytest.raises(UsageError, match="receptive field of 13 is larger than the 12x14 image"):
        build(config(13, (2, 12, 14)))
    with pytest.raises(UnsupportedThreat, match="votes have no certificate against sparse:2:value"):
        defense.certify(x, Sparse(2, "value"))
    with pytest.raises(UnsupportedThreat, match=r"condition 3.1 is not for sparse:2"):
        defense.certify(x, Sparse(2), "3.1")
    with pytest.raises(UsageError, match="no proof 'ibp'"):
        defense.certify(x, Patch(1, 1), "ibp")
    with pytest.raises(UsageError, match="does not fit"):
        defense.certify(x, Patch(16, 1))
    with pytest.raises(DataError, match="do not fit"):
        defense.predict(images(2, (2, 14, 15)))
    other = config()
    other["network"] = {"name": "mlp", "options": {"hidden": [3], "mean": [0.5, 0.5], "std": [1, 1]}}
    with pytest.raises(IntegrityError, match="needs a region scorer, not 'mlp'"):
        BagCert.from_config(section("bagcert", other))


def test_condition_3_1_holds_for_a_single_pixel() -> None:
    defense, x = build(), images(20)
    assert torch.equal(defense.certify(x, Sparse(1), "3.1").certified, defense.certify(x, Sparse(1), "3.2").certified)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_storage_changes_nothing(tmp_path: Path, stored: str) -> None:
    given = config(7, stored=stored)
    defense, x = build(given), images(16)
    with torch.no_grad():
        for weight in defense.parameters():  # as training does at its end
            weight.copy_(weight.to(getattr(torch, stored)) if weight.ndim > 1 else weight)
    defense.calibrate(images(32, seed=98))
    given = file_of("bagcert", given)
    checkpoint.save_defense(tmp_path, defense, given, stored=stored)
    again, read = checkpoint.load_defense(tmp_path)
    assert read == given
    assert isinstance(again, BagCert)
    same(again.certify(x, Patch(2, 2)), defense.certify(x, Patch(2, 2)))
    for one, other in zip(again.deployed().buffers(), defense.deployed().buffers(), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    sizes = {tensor.dtype for tensor in checkpoint.unpack(tmp_path / "model.safetensors")[0].values() if tensor.ndim > 1}
    assert sizes == {getattr(torch, stored)}


def test_the_deployed_network_follows_the_weights() -> None:
    defense, x = build(), images(10)
    first, before = defense.deployed(), defense.votes(x).scores
    assert defense.deployed() is first
    with torch.no_grad():
        defense.scorer.head.bias += 100
    assert defense.deployed() is not first
    assert bool(defense.votes(x).scores.all())
    other = build(seed=1)
    defense.load_state_dict(other.state_dict())
    assert torch.equal(defense.votes(x).scores, other.votes(x).scores)
    defense.load_state_dict(build().state_dict(), assign=True)
    assert torch.equal(defense.votes(x).scores, before)
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.1)
    defense.training_loss(x, torch.zeros(10, dtype=torch.int64), step(replace(BagCertOptions(), margin=2.0))).backward()
    last = defense.deployed()
    optimizer.step()
    assert defense.deployed() is not last
    last = defense.deployed()
    defense.calibrate(images(32, seed=3) * 0.1)
    assert defense.deployed() is not last
