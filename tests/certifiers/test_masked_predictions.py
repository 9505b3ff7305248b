"""Labels of networks that cannot be made exact: one function of the image on one machine, and refused where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import device
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certifiers.masks import masked_predictions
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE, MaskedPredictor
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers.preprocessing import Normalize, WithPreprocessing
from patchcert_cli.threats import Patch

from .test_logit_scale import Fake, small

SHAPE = (1, 4, 4)


def around(network: nn.Module, labels: str = "float32") -> PatchCleanser:
    plan = MaskSpec(("patch:2x2",), per_axis=3)
    made = PatchCleanser(network, input_shape=SHAPE, classes=("a", "b", "c"), masks=plan, fill=(0.25,), prediction_dtype=labels)
    return made.eval()


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Placed(nn.Module):
    """Logits that depend on the place in the batch, as those of other people's kernels may, by ``much``."""

    def __init__(self, much: float, tie: bool = True, wide: bool = False) -> None:
        super().__init__()
        self.much, self.tie, self.wide = much, tie, wide  # in float64 too

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(dim=1)
        moved = self.much * (torch.arange(len(x)) % 7).to(x) * (x.dtype == torch.float32 or self.wide)
        near = 1e-7 * (bright - 0.4) if self.tie else bright
        return torch.stack([torch.ones_like(bright), 1 + near + moved, bright / 2], dim=1)


def test_what_is_in_doubt_does_not_depend_on_the_place_in_the_batch() -> None:
    made, x = around(Placed(1e-6)), images(40)
    made.self_test()
    together, certificate = made.predict(x), made.certify(x, Patch(2, 2))
    back = made.certify(x.flip(0), Patch(2, 2))
    assert torch.equal(back.prediction.flip(0), certificate.prediction) and torch.equal(certificate.prediction, together)
    assert torch.equal(back.certified.flip(0), certificate.certified)
    assert set(together.tolist()) == {0, 1} and certificate.arithmetic is Arithmetic.MEASURED
    assert bool(certificate.certified.any())
    wide = around(Placed(1e-6, wide=True))
    wide.self_test()
    assert not bool(wide.certify(x, Patch(2, 2)).certified.any()), "its float64 is not believed"
    assert torch.equal(wide.predict(x), wide.predict(x.flip(0)).flip(0))


def test_a_network_whose_place_in_the_batch_matters_much_is_refused() -> None:
    with pytest.raises(IntegrityError, match="in float32 logits are off by .* of their scale"):
        around(Placed(1e-3)).self_test()


class Random(nn.Module):
    """Never twice the same."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        bright = x.flatten(1).mean(dim=1)
        noise = 1e-6 * (torch.rand(len(x)) if self.how == "random" else torch.full((len(x),), float(self.calls)))
        return torch.stack([bright, 1 - bright + noise.to(x), bright / 2], dim=1)


@pytest.mark.parametrize("how", ["random", "remembers"])
def test_a_network_that_is_no_function_of_the_image_is_refused(how: str) -> None:
    expected = r"depend on its position in the batch, the size of the batch, the memory format, the threads \(1\)"
    with pytest.raises(IntegrityError, match=expected):
        around(Random(how)).self_test()


def test_passes_in_doubt_run_on_one_thread_whatever_was_chosen() -> None:
    class Counting(nn.Module):
        """Differs a little with the threads."""

        def forward(self, x: Tensor) -> Tensor:
            seen.append((len(x), torch.get_num_threads(), x.dtype, x.is_contiguous()))
            bright = x.flatten(1).mean(dim=1)
            return torch.stack([bright * 0 + 1, bright * 1e-9 + 1 + 1e-9 * torch.get_num_threads(), bright / 2], dim=1)

    seen: list[tuple[int, int, torch.dtype, bool]] = []
    made, x = around(Counting()), images(6)
    one = made.certify(x, Patch(2, 2))
    torch.set_num_threads(2)
    try:
        made.self_test()
        seen.clear()
        two = made.certify(x.contiguous(memory_format=torch.channels_last), Patch(2, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one.margin, two.margin) and torch.equal(one.prediction, two.prediction)
    wide = [row for row in seen if row[2] == torch.float64]
    assert wide and set(wide) == {(1, 1, torch.float64, True)}


@pytest.mark.parametrize("how", ["whole", "end", "middle"])
def test_a_float64_that_is_none_certifies_nothing_in_doubt(how: str) -> None:
    """Around a network whose two first logits all but tie, nothing is certified unless float64 is float64."""

    def tied() -> nn.Sequential:
        network = small()
        network[3].weight[1] = network[3].weight[0] * (1 + 1e-6)
        network[3].weight[2] *= 0
        network[3].bias.copy_(torch.tensor([5.0, 5.0, 0.0]))
        return network

    honest, fake = around(tied()), around(Fake(tied(), how))
    for made in (honest, fake):
        made.self_test()
    assert honest.views().calibration.double and not fake.views().calibration.double
    x = images(30)
    sure = honest.certify(x, Patch(2, 2))
    assert int(sure.certified.sum()) > 0
    assert not bool(fake.certify(x, Patch(2, 2)).certified.any())


def test_leads_are_measured_against_a_scale_that_no_picture_shrinks() -> None:
    """All logits of a dark image are 2^-20 of those of an ordinary one: a logit margin of a tenth of them is in doubt."""

    class Fading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            precision.append(x.dtype)
            size = torch.where(x.flatten(1).amax(dim=1) > 0.6, 1.0, 2.0**-20)
            mean = x.mean(dim=(1, 2, 3))
            return torch.stack([mean * 0 + 1, mean * 0 + 0.5, mean * 0.5], dim=1) * size[:, None]

    precision: list[torch.dtype] = []
    made, dark = around(Fading()), torch.full((2, *SHAPE), 0.2)
    bright = dark.clone()
    bright[:, :, 3, 3] = 0.9
    views = made.views()
    assert views.calibration.head is None and views.calibration.least == 1.0
    zero = torch.zeros(2, dtype=torch.int64)
    precision.clear()
    seen = views.ask(bright, torch.arange(2), zero, zero)
    assert precision == [torch.float32] and float(seen.logit_margin[0]) == pytest.approx(0.5)
    precision.clear()
    seen = views.ask(dark, torch.arange(2), zero, zero)
    assert precision == [torch.float32, torch.float64, torch.float64] and float(seen.logit_margin[0]) == pytest.approx(
        0.5 * 2.0**-20
    )


def test_bfloat16_decides_only_where_the_last_layer_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_predictions, "computes_in_bfloat16", lambda device: True)
    known, unknown = around(small(), "bfloat16"), around(Placed(0.0, tie=False), "bfloat16")
    assert known.views().quick == ("bfloat16", "float32") and unknown.views().quick == ("float32",)
    known.self_test()
    unknown.self_test()


def test_a_network_that_bfloat16_rounds_too_much_is_refused_with_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_predictions, "computes_in_bfloat16", lambda device: True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 4), nn.Linear(4, 3)).requires_grad_(False)
    network[1].bias.fill_(300)  # of which the next layer leaves nothing
    network[2].weight.copy_(network[2].weight - network[2].weight.mean(dim=1, keepdim=True))
    around(network).self_test()
    with pytest.raises(IntegrityError, match="in bfloat16 logits are off by"):
        around(network, "bfloat16").self_test()


def test_views_say_what_they_are() -> None:
    views = around(small()).views()
    assert isinstance(views, MaskedPredictor) and (views.tolerance, views.arithmetic) == (TOLERANCE["float64"], "measured")
    empty = torch.zeros(0, dtype=torch.int64)
    assert views.ask(images(1), empty, empty, empty).label.shape == (0,)


def test_bfloat16_is_not_used_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, quick in ((True, ("bfloat16", "float32")), (False, ("float32",))):
        monkeypatch.setattr(masked_predictions, "computes_in_bfloat16", lambda place, there=there: there)
        assert around(small(), "bfloat16").views().quick == quick
    assert isinstance(device.computes_in_bfloat16(torch.device("cpu")), bool)


class Bare(nn.Module):
    """Layer normalization over channels without biases: it enlarges a remainder a thousand times a layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.convolutions = nn.ModuleList(nn.Conv2d(c, 8, 1, bias=False) for c in (3, 8, 8, 8))
        self.head = nn.Linear(8, 3)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            v = convolution(x).permute(0, 2, 3, 1)
            x = nn.functional.layer_norm(v, (8,), eps=1e-6).permute(0, 3, 1, 2)
        return self.head(x.mean(dim=(2, 3)))


class NormalizedLast(nn.Module):
    """As ``x * scale + shift``, whose value at the mean is what rounding leaves."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.normalize, self.network = Normalize(MEAN, STD), network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.normalize(x))  # type: ignore[no-any-return]


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("size", [None, (12, 12)])
def test_masks_of_the_mean_colour_leave_nothing_that_a_network_could_enlarge(size: tuple[int, int] | None) -> None:
    plan, more = MaskSpec(("patch:3x3",), per_axis=3), {"input_shape": (3, 8, 8), "classes": ("a", "b", "c")}
    network = WithPreprocessing(Bare().eval(), size=size, mean=MEAN, std=STD)
    made = PatchCleanser(network.eval(), masks=plan, fill=MEAN, **more).eval()  # type: ignore[arg-type]
    made.self_test()
    seen: list[Tensor] = []
    network.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    made.behind(torch.rand(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool))
    assert not bool(seen[0].any())
    last = PatchCleanser(NormalizedLast(Bare()).eval(), masks=plan, fill=MEAN, **more).eval()  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="in float32 logits are off by .* of their scale"):
        last.self_test()
