"""The network that learns behind masks: how it begins, what it sees, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.errors import IntegrityError
from patchcert_cli.models.masked import HEAD, QUICK, MaskedNetwork, Norm


def build(**options: Any) -> MaskedNetwork:
    shape = options.pop("input_shape", (3, 16, 16))
    given = {"input_shape": shape, "classes": 5, "mean": [0.4] * shape[0], "std": [0.25] * shape[0], **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: Any = models.build("masked", given)
    assert isinstance(made, MaskedNetwork)
    return made


def images(count: int = 64, shape: tuple[int, int, int] = (3, 16, 16)) -> Tensor:
    """Smooth ones, whose neighbouring pixels are much alike."""
    coarse = torch.rand(count, shape[0], 5, 5, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, shape[1:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize(
    ("options", "side"),
    [({"widths": [6, 8, 10]}, 1), ({"widths": [6]}, 7), ({"widths": [6, 8], "kernel": 3}, 4), ({"widths": [8, 6], "stem": 9}, 3)],
)
def test_shapes(options: dict[str, Any], side: int) -> None:
    made = build(**{"stem": 4, **options}).eval()
    last = made.stages(F.gelu(made.stem(made.normalize(images(2)))))
    assert last.shape == (2, options["widths"][-1], side, side)
    assert torch.allclose(made(images(2)), made.head(last.amax(dim=(2, 3)) / HEAD))
    assert models.describe(made).startswith(f"masked CNN {options.get('stem', 4)}-{'-'.join(map(str, options['widths']))}, 0.0")


def test_the_networks_of_the_zoo_have_the_size_that_is_said_of_them() -> None:
    cifar = build(input_shape=(3, 32, 32))
    assert models.describe(cifar) == "masked CNN 24-64-256-256, 1.97M parameters"
    assert cifar.most == 64 * 31 * 31
    layers: list[int] = []
    for layer in cifar.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, given, out: layers.append(out[0].numel()))
    cifar.eval()(images(2, (3, 32, 32)))
    assert max(layers) == cifar.most and len(layers) == 7


def test_what_is_hidden_is_one_more_channel() -> None:
    made, x = build(widths=[6, 8], takes_mask=True).eval(), images(4)
    assert made.stem.in_channels == 4
    nothing, something = torch.zeros(4, 1, 16, 16, dtype=torch.bool), torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    something[:, :, 4:9] = True
    assert not torch.allclose(made(x, nothing), made(x, something))
    v = torch.cat([(x - 0.4) / 0.25, something.float()], dim=1)
    expected = made.head(made.stages(F.gelu(made.stem(v))).amax(dim=(2, 3)) / HEAD)
    assert torch.allclose(made(x, something), expected, atol=1e-5)
    with pytest.raises(AssertionError, match="needs to know which pixels are occluded"):
        made(x)


@torch.no_grad()
@pytest.mark.parametrize("takes_mask", [False, True])
def test_a_mirrored_network_answers_a_mirrored_image_alike(takes_mask: bool) -> None:
    one, two = (build(widths=[6, 8], takes_mask=takes_mask, mirrored=mirrored).eval() for mirrored in (False, True))
    x = images(6)
    occluded = torch.zeros(6, 1, 16, 16, dtype=torch.bool)
    occluded[:, :, 2:7, 1:6] = True
    more = (occluded,) if takes_mask else ()
    other = (occluded.flip(3),) if takes_mask else ()
    assert torch.allclose(two(x, *more), two(x.flip(3), *other), atol=1e-6)
    assert torch.allclose(two(x, *more), (one(x, *more) + one(x.flip(3), *other)) / 2)
    assert not torch.allclose(one(x, *more), two(x, *more))
    assert torch.equal(one.train()(x, *more), two.train()(x, *more)), "training sees each image once"


@torch.no_grad()
@pytest.mark.parametrize("takes_mask", [False, True])
def test_the_stem_begins_with_whitening(takes_mask: bool) -> None:
    made, x = build(widths=[6], stem=30, takes_mask=takes_mask), images(200)
    before = made.stem.weight[24:].clone()
    made.whiten(x)
    seen = made.normalize(x)
    answers = F.conv2d(seen, made.stem.weight[:12, :3]).permute(0, 2, 3, 1).reshape(-1, 12).double()
    moments = answers.T @ answers / len(answers)
    windows = F.unfold(seen, 2).transpose(1, 2).flatten(0, 1).double()
    variances = torch.linalg.eigvalsh(windows.T @ windows / len(windows)).flip(0)
    assert torch.allclose(moments.diagonal(), variances / (variances + 5e-4), atol=1e-3)
    assert float((moments - moments.diagonal().diag()).abs().amax()) < 1e-3, "uncorrelated"
    assert torch.equal(made.stem.weight[12:24], -made.stem.weight[:12])
    assert torch.equal(made.stem.weight[24:], before), "more kernels than directions stay random"
    assert not takes_mask or float(made.stem.weight[:24, 3].abs().amax()) == 0
    few = build(widths=[6], stem=5)
    few.whiten(x)
    assert torch.allclose(few.stem.weight[0], made.stem.weight[0, :3]) and torch.equal(few.stem.weight[2], -few.stem.weight[0])


def test_stages_begin_as_copies_of_what_comes_in() -> None:
    made = build(widths=[6, 8], stem=4)
    for stage, before in zip(made.stages, (4, 6), strict=True):
        assert isinstance(stage.first, nn.Conv2d)
        v = torch.rand(1, before, 6, 6)
        assert torch.equal(stage.first(v)[:, :before], v)
        assert isinstance(stage.second, nn.Conv2d)
        u = torch.rand(1, stage.second.in_channels, 6, 6)
        assert torch.equal(stage.second(u), u)


def test_batch_norm_without_gains_and_with_quick_biases() -> None:
    mine, reference = Norm(5), nn.BatchNorm2d(5)
    v = torch.randn(8, 5, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with torch.no_grad():
        mine.quick.copy_(torch.linspace(-0.2, 0.3, 5))
        reference.bias.copy_(mine.quick * QUICK)
    for training in (True, False):
        mine.train(training)
        reference.train(training)
        assert torch.allclose(mine(v), reference(v), atol=1e-6)
    assert torch.allclose(mine.running_mean, reference.running_mean) and torch.allclose(mine.running_var, reference.running_var)
    assert int(mine.num_batches_tracked) == int(reference.num_batches_tracked) == 1
    assert set(dict(mine.named_parameters())) == {"quick"}
    (mine(v) * torch.rand(5)[:, None, None]).sum().backward()
    (reference(v) * 0).sum().backward()
    assert mine.quick.grad is not None and float(mine.quick.grad.abs().amax()) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"widths": []}, "there are no stages"),
        ({"widths": [4, 0]}, r"widths\[1\] is 0, not 1 or more"),
        ({"stem": 0}, "stem is 0, not 1 or more"),
        ({"bits": 4}, "bits is 4; allowed: 8"),
        ({"widths": [4, 4, 4, 4]}, "4 stages are too many for images of 16x16"),
    ],
)
def test_networks_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        build(**options)
