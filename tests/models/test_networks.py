"""Networks: single numbers where options are lists, and region scorers whose cells are several pixels apart."""

from __future__ import annotations

import copy
import types
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import defenses, models
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.bagcert import BagCert, BagCertOptions
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, precision
from patchcert_cli.threats import Patch, Sparse
from patchcert_cli.training.recipe import Recipe, typed, written
from tests.attacks import test_surrogates
from tests.examples import section
from tests.soundness import arena

PLANS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "dilated": ((2, 15, 14), {"widths": [4, 5, 6], "kernels": [3, 3, 2], "dilations": [1, 1, 2], "mixes": [1, 0, 2]}),
    "pyramid": ((1, 25, 22), {"widths": [4, 5, 6, 7], "kernels": [3] * 4, "dilations": [1, 1, 2, 4], "mixes": [0, 1, 0, 1]}),
    "places": ((1, 9, 11), {"widths": [4, 6], "kernels": [2, 3], "dilations": [1, 1], "mixes": [0, 1], "places": True}),
}
STRIDES = (2, 3, 4, 8)


def build(name: str, stride: int = 1, aggregate: str = "sum") -> BagCert:
    """Random weights that are the same at every stride; most cells agree."""
    shape, plan = PLANS[name]
    options = {**plan, "stride": stride, "mean": [0.4] * shape[0], "std": [0.3] * shape[0]}
    config = {"input_shape": shape, "classes": list("abcd"), "network": {"name": "region", "options": options}}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        defense = BagCert.from_config(section("bagcert", {**config, "options": {"aggregate": aggregate}})).eval()
        if defense.position is not None:
            defense.position.normal_()
        if stride > 1:
            state = build(name).state_dict()
            position = {} if defense.position is None else {"position": defense.position}
            defense.load_state_dict({**state, **position}, strict=True)
            return defense
        x = arena.draw_images(shape, 32, 5)
        scores = defense.scorer(x)
        defense.scorer.head.bias += 2 * torch.randn(4) * scores.std(dim=(0, 2, 3)) - scores.mean(dim=(0, 2, 3))
        defense.calibrate(x)
    return defense


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("stride", STRIDES)
def test_cells_of_a_stride_are_cells_of_the_whole_map(name: str, stride: int) -> None:
    dense, sparse = build(name), build(name, stride)
    x = arena.draw_images(dense.input_shape, 5, 0)
    wanted = dense.scores(x)[:, :, ::stride, ::stride]
    assert torch.equal(sparse.scores(x), wanted)  # no sum is rounded, so they are the very same
    assert wanted.shape[2:] == tuple(sparse.scorer.cells(side) for side in dense.input_shape[1:])
    with torch.no_grad():
        for every in (1, 2, 3):
            found = sparse.scorer.double()(x.double(), every)
            step = stride * every
            torch.testing.assert_close(found, dense.scorer.double()(x.double())[:, :, ::step, ::step], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("patch", [Patch(1, 1), Patch(3, 2), Patch(2, 6)], ids=str)
def test_a_patch_reaches_exactly_the_cells_that_are_claimed(name: str, stride: int, patch: Patch) -> None:
    """A not-a-number in the patch, through the deployed network, at every location."""
    defense = build(name, stride)
    shape = defense.input_shape
    cover, locations = defense.cover(patch), patch.locations(*shape[1:])
    x = torch.full((len(locations), *shape), 128.0)
    for image, (top, left, height, width) in zip(x, locations.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = float("nan")
    network = defense.deployed()
    with torch.no_grad(), precision.exact_arithmetic():
        reached = network(x.to(fixed_point.execution_type(network, x.device))).isnan().any(dim=1)
    claimed = cover.rows.matrix()[:, None, :, None] * cover.columns.matrix()[None, :, None, :]  # [P, Q, N, M]
    assert torch.equal(reached, claimed.flatten(0, 1).bool())
    defense.self_test()


def test_a_proof_that_forgets_the_stride_is_noticed_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    defense = build("dilated", 2)

    def forgetful(patch: Patch) -> CellCoverage:
        axes = []
        for length, side in zip(defense.input_shape[1:], (patch.height, patch.width), strict=True):
            cells = defense.scorer.cells(length)
            dense = Axis.sliding(length, side, kernel=defense.receptive_field).touched
            axes.append(Axis(cells, tuple(tuple(cell for cell in touched if cell < cells) for touched in dense)))
        return CellCoverage(*axes)

    monkeypatch.setattr(defense, "cover", forgetful)
    with pytest.raises(IntegrityError, match="but the proof counts"):
        defense.self_test()


SMALL = {  # five or nine cells along an axis, of which strides leave two to five
    "strided": ((1, 6, 6), {"widths": [4, 6], "kernels": [2, 1], "dilations": [1, 1], "mixes": [0, 1], "stride": 2}),
    "uneven": ((1, 6, 5), {"widths": [5], "kernels": [2], "dilations": [1], "mixes": [1], "stride": 3}),
    "apart": ((1, 7, 7), {"widths": [5], "kernels": [1], "dilations": [1], "mixes": [0], "stride": 2}),  # some pixels unseen
}


@pytest.mark.parametrize("name", SMALL)
def test_no_change_moves_a_certified_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the enemy that tries everything."""
    monkeypatch.setattr(arena, "REGIONS", SMALL)
    arenas = []
    for seed in range(4):
        defense = arena.random_region(name, seed, lean=(1.0, 2.0, 4.0)[seed % 3])
        arenas.append(arena.Arena(f"{name} {seed}", defense, arena.draw_images(defense.input_shape, 10, seed)))
    score = arena.check(arenas, [Patch(1, 1), Patch(1, 2), Patch(2, 2), Sparse(2)])
    assert score.violations == []
    assert score.certified > 10 and score.broken > 10


@pytest.mark.parametrize("aggregate", ["sum", "weighted"])
@pytest.mark.parametrize("stride", [2, 3, 4, 6])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (12, 10), (13, 11)])
def test_near_and_rest_make_the_whole(aggregate: str, stride: int, size: tuple[int, int]) -> None:
    test_surrogates.test_near_and_rest_make_the_whole({"aggregate": aggregate, "stride": stride}, size)


@pytest.mark.parametrize("aggregate", ["sum", "weighted"])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_loss_is_that_of_the_same_cells_of_the_whole_map(aggregate: str, every: int) -> None:
    defense = build("pyramid", 2, aggregate)
    x, label = arena.draw_images(defense.input_shape, 4, 1), torch.tensor([0, 1, 2, 3])

    def step() -> TrainingStep:
        options = BagCertOptions(every=every, sharpness=0.0, margin=2.0)
        return TrainingStep(Patch(2, 2), options, 1.0, 2, torch.Generator().manual_seed(8))

    loss = defense.training_loss(x, label, step())
    cells = defense.scorer.cells(22)
    down, right = (
        torch.randint(min(every, cells), (2,), generator=torch.Generator().manual_seed(8)).tolist() if every > 1 else (0, 0)
    )
    votes = (build("pyramid").scorer(x)[:, :, ::2, ::2] > 0).double()[:, :, down::every, right::every]
    weight = torch.ones(votes.shape[2:])
    if defense.position is not None:
        weight = torch.nn.functional.softplus(defense.position)[down::every, right::every]
    share = (votes * weight / weight.sum()).sum(dim=(2, 3))
    own = share.gather(1, label[:, None])[:, 0]
    wanted = 2.0 - (own - share.scatter(1, label[:, None], -1.0).amax(dim=1))
    assert float(loss.detach()) == pytest.approx(float(wanted.detach().mean()), rel=1e-5)
    loss.backward()
    assert all(bool(weight.grad is not None and weight.grad.isfinite().all()) for weight in defense.parameters())


def test_a_stride_is_named_and_checked_and_costs_less() -> None:
    assert models.describe(build("pyramid", 8)).startswith("region scorer 4-5-6-7, receptive field 17, stride 8, ")
    assert "stride" not in models.describe(build("pyramid"))
    assert build("pyramid", 8).scorer.widest < build("pyramid").scorer.widest == 7
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, given: Any, out: Tensor) -> None:
        shapes.append(tuple(out.shape[2:]))

    defense = build("pyramid", 8)
    for layer in defense.deployed().modules():
        if isinstance(layer, fixed_point.Affine) and layer.weight.shape[2:] != (1, 1):
            layer.register_forward_hook(note)
    x = arena.draw_images(defense.input_shape, 2, 0)
    assert torch.equal(defense.deployed()(fixed_point.to_steps(x)), defense.scores(x))
    assert shapes == [(23, 20), (11, 9), (5, 4), (2, 1)]
    with pytest.raises(IntegrityError, match=r"network option stride is 0, not 1 or more\."):
        build("pyramid", 0)


LISTS = {  # per network, options that are lists, with a single number each
    "masked": {"widths": 4},
    "mlp": {"hidden": 12},
    "efficientnet_lite": {"size": 8},
    "cnn": {"channels": 4, "strides": 2, "hidden": 5},
    "region": {"widths": 4, "kernels": 3, "dilations": 1, "mixes": 0},
    "resnet": {"widths": 4, "blocks": 1, "strides": 2},
    "setwise": {"blocks": 8},
    "timm": {"size": 8},
}


@pytest.mark.parametrize("name", models.names())
def test_a_single_number_is_a_list_of_one(name: str) -> None:
    base = {"input_shape": (3, 8, 8), "classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    if name == "timm":
        pytest.importorskip("timm")
    given = LISTS[name]
    alone = models.build(name, {**base, **given})
    in_lists = models.build(name, {**base, **{key: [value] for key, value in given.items()}})
    assert [tuple(weight.shape) for weight in alone.parameters()] == [tuple(weight.shape) for weight in in_lists.parameters()]
    assert models.listed(name, given) == {key: [value] for key, value in given.items()}
    assert set(given) == {key for key, value in models.listed(name, dict.fromkeys(given, 1)).items() if value == [1]}
    for other in ({"bits": 8}, {"places": True}, {"hidden": "12"}, {"widths": [1, 2]}, {"unknown": 3}):
        assert models.listed(name, other) == other
    with pytest.raises(IntegrityError, match="cannot be built from its options"):
        models.build(name, {**base, "unknown": 3})


def test_recipes_spell_single_numbers_so_that_they_are_read_back() -> None:
    one = replace(Recipe("patch:5x5"), network_options={"hidden": typed("300")})
    assert one.network_options == {"hidden": [300]}
    assert one == replace(Recipe("patch:5x5"), network_options={"hidden": [300]})
    assert one.command.endswith("--network-option hidden=300")
    for value in (300, [300], [512, 256]):
        again = replace(Recipe("patch:5x5"), network_options={"hidden": typed(written(value))})
        assert again == replace(Recipe("patch:5x5"), network_options={"hidden": value})
        assert defenses.build(again.config()["deployed"]).input_shape == (1, 28, 28)


def test_every_combination_of_stride_and_dilations_adds_up() -> None:
    """Strides and dilations of the stages multiply to the spacing of the cells and to the dilations of the dense network."""
    for dilations, stride, every in product([(1,), (1, 2), (2, 1), (1, 1, 2, 4), (3, 6), (2, 2)], range(1, 9), (1, 2, 3)):
        plan = {"widths": [2] * len(dilations), "kernels": [2] * len(dilations), "mixes": [0] * len(dilations)}
        options = {**plan, "dilations": dilations, "stride": stride, "mean": [0.5], "std": [0.5]}
        scorer: Any = models.build("region", {"input_shape": (1, 20, 20), "classes": 2, **options})
        spacing = 1
        for (step, apart), dilation in zip(scorer._steps(every), dilations, strict=True):
            assert apart * spacing == dilation
            spacing *= step
        assert spacing == stride * every


@pytest.mark.parametrize("every", [4, 5, 9])
@pytest.mark.parametrize("training", [False, True])
def test_sampled_cells_are_cells_of_the_whole_map(every: int, training: bool) -> None:
    """One 7x7 convolution and 1x1 convolutions: few cells are computed by matrix products alone."""
    options = {"widths": [6, 5], "kernels": [7, 1], "dilations": [1, 1], "mixes": [1, 1], "whiten": True}
    if training:  # batch statistics are those of the cells that are computed, and a strided map computes more in its first stage
        options |= {"widths": [6], "kernels": [7], "dilations": [1], "mixes": [2]}
    options |= {"input_shape": (3, 20, 18), "classes": 4, "mean": [0.5] * 3, "std": [0.25] * 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer: Any = models.build("region", options)
        x = torch.rand(5, 3, 20, 18)
    scorer.whiten(x)
    for stage in scorer.stages:  # statistics that are not those of a fresh network
        stage.norm.running_mean.add_(0.1)
    scorer.train(training)
    copied = copy.deepcopy(scorer)
    with torch.no_grad():
        few = scorer.score(scorer.prepare(x), every)
        copied.one_window = False  # by strided convolutions
        right = copied.score(copied.prepare(x), every)
    assert few.shape == right.shape and torch.allclose(few, right, atol=1e-5)
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(scorer.buffers(), copied.buffers(), strict=True))
    if not training:
        assert torch.allclose(few, scorer(x)[:, :, ::every, ::every], atol=1e-5)


def test_whitened_windows_are_white_and_fusing_changes_nothing() -> None:
    options = {"widths": [6], "kernels": [3], "dilations": [2], "mixes": [0], "whiten": True}
    options |= {"input_shape": (2, 12, 12), "classes": 4, "mean": [0.5] * 2, "std": [0.25] * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer: Any = models.build("region", options)
        x = torch.nn.functional.interpolate(torch.rand(200, 2, 5, 5), (12, 12), mode="bilinear")
    scorer.eval().whiten(x)
    windows = torch.nn.functional.unfold(scorer.prepare(x), 3, dilation=2).transpose(1, 2).flatten(0, 1)
    white = (windows - windows.mean(dim=0)) @ scorer.stages[0].whitening.T
    covariance = white.T @ white / len(white)
    assert float((covariance - covariance.diagonal().diag()).abs().max()) < 1e-2
    assert float(covariance.diagonal().max()) < 1.01 and float(covariance.diagonal().max()) > 0.95
    with torch.no_grad():
        before = scorer(x[:5])
        scorer.fuse()
        assert torch.equal(scorer.stages[0].whitening, torch.eye(18))
        assert torch.allclose(scorer(x[:5]), before, atol=1e-5)


def _plugin(monkeypatch: pytest.MonkeyPatch, build_function: Any) -> None:
    module = types.SimpleNamespace(__name__="outside", build=build_function)
    monkeypatch.setattr(models, "_module", lambda name: module)


def test_networks_of_other_packages_need_no_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in docs/extending/network.md: mean and std have none, and neither need options."""

    def made(
        *, input_shape, classes, width: int = 32, hidden: Sequence[int] = (255,), scale=None, sizes: list[int] = (), mean, std
    ):  # type: ignore[no-untyped-def]
        return nn.Sequential(nn.Flatten(), nn.Linear(width, classes))

    _plugin(monkeypatch, made)
    given = {"input_shape": (1, 2, 2), "classes": 3, "mean": [0.1], "std": [0.2], "sizes": [1, 2], "scale": "any"}
    assert models.build("outside", given)[1].out_features == 3
    assert models.problems("outside", {"width": 4, "hidden": 5, "scale": None, "sizes": [3]}) == []
    assert models.problems("outside", {"width": "x"}) == ["network option width is 'x', not a whole number."]
    with pytest.raises(IntegrityError, match="has no option 'depth'; known: hidden, scale, sizes, width"):
        models.build("outside", {**given, "depth": 3})


def test_networks_of_other_packages_may_take_any_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*, input_shape: Sequence[int], classes: int, width: Annotated[int, "pixels"] = None, **options: Any) -> nn.Module:  # type: ignore[assignment]  # noqa: RUF013
        return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))

    _plugin(monkeypatch, made)
    assert models.problems("outside", {"width": None, "depth": [1, "x"]}) == [], "a default may be of another type"
    assert models.problems("outside", {"width": 1.5}) == ["network option width is 1.5, not a whole number."]
    models.build("outside", {"input_shape": (1, 2, 2), "classes": 3, "mean": [0.1], "std": [0.2], "depth": 2})


@pytest.mark.parametrize(("name", "bits"), [("region", 1), ("region", 16), ("resnet", 1), ("resnet", 16)])
def test_limits_of_bits_are_those_that_can_be_frozen(name: str, bits: int) -> None:
    small = {
        "region": {"widths": [4], "kernels": [3], "dilations": [1], "mixes": [1]},
        "resnet": {"widths": [4], "blocks": [1], "strides": [1]},
    }
    options = {**small[name], "bits": bits, "input_shape": (3, 8, 8), "classes": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
    network = next(part for part in models.build(name, options).modules() if hasattr(part, "freeze"))
    frozen, _ = network.eval().freeze(torch.float64)
    assert isinstance(frozen, nn.Module)


def test_a_network_of_stages_needs_a_stage() -> None:
    options = {"widths": [], "kernels": [], "dilations": [], "mixes": [], "input_shape": (3, 8, 8), "classes": 2}
    with pytest.raises(IntegrityError, match="there are no stages"):
        models.build("region", {**options, "mean": [0.5] * 3, "std": [0.25] * 3})
