"""What is finally certified, compared with exact fractions (``reference.py``), single changes tried out, and broken weights."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.bounds import intervals
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import PatchcertError, UnsupportedThreat
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, Sparse, Threat

from . import reference
from .networks import LAYOUTS, Shape, images, network, rounding_error

ROOT = Path(__file__).resolve().parents[2]
SINGLE: list[Threat] = [Patch(1, 1), Sparse(1)]


def defense(layers: nn.Sequential, shape: Shape) -> IntervalDefense:
    layers = layers.requires_grad_(False).eval()
    names = tuple("abcdefg"[: layers(torch.zeros(1, *shape)).shape[1]])  # one for each output
    return IntervalDefense(layers, input_shape=shape, classes=names).eval()


def dense(first: list[list[float]], bias: list[float], last: list[list[float]], shift: list[float]) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(len(first[0]), len(first)), nn.ReLU(), nn.Linear(len(last[0]), len(last))
    ).requires_grad_(False)
    for layer, weight, offset in ((layers[1], first, bias), (layers[3], last, shift)):
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(offset))
    return layers


def broken(judge: IntervalDefense, x: Tensor, certificate: Certificate) -> list[int]:
    """Certified images whose answer one changed pixel (to all zeros or ones) moves."""
    moved = torch.zeros(len(x), dtype=torch.bool)
    for pixel in range(x.shape[2] * x.shape[3]):
        for value in (0.0, 1.0):
            changed = x.flatten(2).clone()
            changed[:, :, pixel] = value
            moved |= judge.predict(changed.reshape(x.shape)) != certificate.prediction
    found: list[int] = (moved & certificate.certified).nonzero()[:, 0].tolist()
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_certificate_is_about_the_deployed_answer(name: str) -> None:
    layout = LAYOUTS[name]
    for seed in range(2):
        judge, x = defense(network(name, seed), layout.shape), images(layout.shape, 9, seed)
        logits = precision.double(judge.network)(x.double())
        expected = torch.tensor([row.index(max(row)) for row in logits.tolist()])
        for threat in SINGLE if layout.sparse else SINGLE[:1]:
            certificate = judge.certify(x, threat)
            assert torch.equal(certificate.prediction, judge.predict(x))
            assert torch.equal(certificate.prediction, expected)
            assert bool((certificate.certified <= (certificate.margin > 0)).all())
            assert bool((certificate.runner_up != certificate.prediction).all())
            assert broken(judge, x, certificate) == []
            assert certificate.worst.shape == (9, 4)


@pytest.mark.parametrize("threat", [Patch(2, 2), Sparse(2)], ids=str)
def test_nothing_is_certified_whose_exact_margin_is_not_positive(threat: Threat) -> None:
    certified = 0
    for seed in range(5):
        layers, x = network("mlp2", seed), images((1, 4, 5), 4, seed)
        certificate = defense(layers, (1, 4, 5)).certify(x, threat, "interval")
        path = reference.steps(layers, (1, 4, 5), Fraction)
        for i, y in enumerate(certificate.prediction.tolist()):
            v = reference.numbers(x[i], Fraction)
            if isinstance(threat, Patch):
                rows = reference.patch_margins(path, v, (1, 4, 5), (2, 2), y)
            else:
                rows = [reference.sparse_margins(path, v, (1, 4, 5), 2, "pixel", y)]
            exact = min(row[c] for row in rows for c in range(3) if c != y)
            assert abs(Fraction(float(certificate.margin[i])) - exact) <= Fraction(float(certificate.tolerance[i]))
            assert exact > 0 or not bool(certificate.certified[i])
            certified += int(certificate.certified[i])
    assert certified > 0


@pytest.mark.parametrize("exponent", [-60, -20])
def test_a_margin_within_rounding_is_not_certified_and_a_clear_one_is(exponent: int) -> None:
    """The margin is exactly 2**exponent: lost in float64 rounding for -60, and beyond float32 but clear in float64 for -20."""
    layers = dense([[1.0] * 9, [1.0] * 9], [3.0, 3.0], [[1.0, 1.0], [1.0, 1.0]], [2.0**exponent, 0.0])
    judge, x = defense(layers, (1, 3, 3)), images((1, 3, 3), 5)
    for threat in (Patch(2, 2), Sparse(3)):
        certificate = judge.certify(x, threat)
        assert certificate.prediction.tolist() == [0] * 5
        assert bool((rounding_error(layers, x, threat, torch.float32) > 2.0**-20).all())
        assert certificate.certified.tolist() == [exponent == -20] * 5


def test_ties_go_to_the_lowest_class_and_are_never_certified() -> None:
    layers = network("mlp2")
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight[2], last.bias[2] = last.weight[1], last.bias[1]
    last.weight[0], last.bias[0] = 0, -1e4
    judge, x = defense(layers, (1, 4, 5)), images((1, 4, 5), 8)
    for threat in (Patch(1, 1), Sparse(1)):
        certificate = judge.certify(x, threat)
        assert certificate.prediction.tolist() == [1] * 8
        assert certificate.margin.tolist() == [0.0] * 8
        assert certificate.runner_up.tolist() == [2] * 8
        assert not bool(certificate.certified.any())


@pytest.mark.parametrize("name", ["mlp2", "mlp3", "mlp-rgb", "conv-stride", "conv-norm", "average-pool-first", "pool-last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_never_certify(name: str, value: float) -> None:
    layout = LAYOUTS[name]
    x, seen = images(layout.shape, 4), 0
    for index, shape in enumerate(weight.shape for weight in network(name).parameters()):
        for at in {0, shape.numel() - 1}:
            layers = network(name)
            list(layers.parameters())[index].view(-1)[at] = value
            for threat in [Patch(2, 2), *([Sparse(2)] if layout.sparse else [])]:
                judge = defense(layers, layout.shape)
                judge.trust()  # the self-test refuses them before any proof
                certificate = judge.certify(x, threat)
                assert not bool(certificate.certified.any()), (index, at, threat)
                seen += 1
    assert seen >= 8


def test_overflow_of_a_hidden_neuron_is_not_certified() -> None:
    """Partial sums overflow float32 to minus infinity, which the ReLU turns into an innocent zero."""
    big = 3e38
    layers = dense([[-big, -big, big, big], [0, 0, 0, 0]], [big / 2, 1.0], [[0, 1.0], [1e-38, 0]], [0, 0])
    judge = defense(layers, (1, 2, 2))
    x = torch.tensor([[1, 1, 1, 1], [1, 1, 0.9, 0.9], [1, 1, 1, 0.5], [1, 1, 1, 0], [1, 1, 0.5, 0.5]]).reshape(5, 1, 2, 2)
    for threat in SINGLE:
        assert broken(judge, x, judge.certify(x, threat)) == []


def test_overflow_towards_one_rival_is_not_certified() -> None:
    """One rival's margin overflows to plus infinity while another's stays finite."""
    big = 3e38
    last = [[0.0] * 8, [-big] * 4 + [1.1 * big] * 4, [-1e38] + [0.0] * 7]
    layers = dense([[0.0] * 4] * 4 + [[1.0, 0, 0, 0]] * 4, [1.0] * 4 + [0.0] * 4, last, [0.0] * 3)
    judge, x = defense(layers, (1, 2, 2)), torch.tensor([0, 0.5, 0.5, 0.5]).reshape(1, 1, 2, 2)
    judge.trust()  # the self-test refuses it before any proof
    for threat in SINGLE:
        assert broken(judge, x, judge.certify(x, threat)) == []


def test_cancelling_batch_norm_is_not_certified_wrongly() -> None:
    """One pixel, monotone layers: bounds are exact, and the float32 shift of the batch norm is off by more than the margin."""
    violations, gaps = [], []
    for scale in (1.3, 1.7, 2.1, 2.9):
        norm = nn.BatchNorm2d(1).eval()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.fill_(1e6)
        norm.running_var.fill_(scale)
        norm.bias.data.fill_(1 + 1e6 / (scale + norm.eps) ** 0.5)
        layers = nn.Sequential(norm, *dense([[1.0]], [0.0], [[1.0], [0.0]], [0.0, 0.0])).requires_grad_(False)
        x, target = torch.full((1, 1, 1, 1), 0.9), torch.tensor([0])
        narrow = intervals.lower_margins(layers, x, target, Patch(1, 1)).values[0, 1]
        wide = intervals.lower_margins(precision.double(layers), x.double(), target, Patch(1, 1)).values[0, 1]
        gaps.append(float(narrow - wide))
        layers[-1].bias[1] = float(narrow + wide) / 2  # type: ignore[index, operator]
        judge = defense(layers, (1, 1, 1))
        violations += broken(judge, x, judge.certify(x, Patch(1, 1)))
    assert max(gaps) > 1e-4, "no shift was rounded upwards"
    assert violations == []


class Residual(nn.Sequential):
    """A container that is not the composition of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scaled(nn.Linear):
    """A linear layer that does something else besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.amax(dim=1, keepdim=True)


class ImageNorm(nn.Module):
    """Has a scale and a shift, but is not affine: it divides by the image's own deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.scale * nn.functional.layer_norm(x, x.shape[1:]) + self.shift
        return normed


@pytest.mark.parametrize("kind", ["residual", "scaled", "image-norm"])
def test_layers_that_only_look_supported_are_refused(kind: str) -> None:
    """Refused or right: a certificate about another function than the deployed one must not be given."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        *([ImageNorm()] if kind == "image-norm" else []),
        *(nn.Flatten(), nn.Linear(9, 6), nn.ReLU()),
        *([Residual(nn.Linear(6, 6), nn.ReLU())] if kind == "residual" else []),
        *([Scaled(6, 6)] if kind == "scaled" else []),
        nn.Linear(6, 3),
    )
    judge, x = defense(layers, (1, 3, 3)), images((1, 3, 3), 400)
    try:
        certificate = judge.certify(x, Patch(1, 1))
    except UnsupportedThreat:
        return
    assert broken(judge, x, certificate) == []


def test_a_linear_layer_on_an_image_that_was_not_flattened() -> None:
    """It acts on rows, so its weight is no map of pixels: refused, or right."""
    layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)).requires_grad_(False)
    first, last = layers[0], layers[3]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    first.weight.copy_(torch.tensor([[5.0, 5, 5], [0, 0, 0], [0, 0, 0]]))
    first.bias.zero_()
    last.weight.zero_()
    last.weight[0, 3] = 1
    last.bias.copy_(torch.tensor([0.0, 1.0]))
    judge, x = defense(layers, (1, 3, 3)), torch.zeros(1, 1, 3, 3)
    x[0, 0, 0] = 1
    for threat in SINGLE:
        try:
            certificate = judge.certify(x, threat)
        except UnsupportedThreat:
            continue
        assert broken(judge, x, certificate) == []


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(6)], ids=["dropout", "batch-norm"])
def test_training_mode_is_refused_or_left(layer: nn.Module) -> None:
    """In training mode images mix or answers are random: the deployed function is the one in eval mode."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), layer, nn.ReLU(), nn.Linear(6, 3))
    judge, x = defense(layers, (1, 3, 3)), images((1, 3, 3), 200)
    judge.train()
    try:
        certificate = judge.certify(x, Patch(1, 1))
    except PatchcertError:
        return
    assert broken(judge, x, certificate) == []


def test_precision_set_through_the_newer_interface() -> None:
    """In a process of its own, since mixing torch's two precision interfaces cannot be undone."""
    code = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from tests.examples import tiny; from patchcert_cli.threats import Patch\n"
        "print(len(tiny('ibp').certify(torch.rand(2, 1, 4, 4), Patch(2, 2)).certified))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr[-300:]
