"""EfficientNet-Lite: widths and depths of all variants, padding as TensorFlow's, and the copy in the zoo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from patchcert_cli import cards, checkpoint, defenses, models
from patchcert_cli.catalog import bundled, claims
from patchcert_cli.errors import UsageError
from patchcert_cli.layers.preprocessing import WithPreprocessing
from patchcert_cli.models.efficientnet_lite import Convolution
from patchcert_cli.storage import files
from tests.examples import section

NAME = "imagenet-patchcleanser-efficientnet-lite0"
OPTIONS: dict[str, Any] = {"input_shape": (3, 64, 64), "classes": 7, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("variant", range(5))
def test_every_variant_has_the_parameters_of_timm(variant: int) -> None:
    """Sizes of all weights in the order of layers; timm's code of the same networks is somebody else's."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = models.build("efficientnet_lite", {**OPTIONS, "variant": variant})
        theirs = timm.create_model(f"tf_efficientnet_lite{variant}", num_classes=7)
    assert [tuple(one.shape) for one in ours.parameters()] == [tuple(one.shape) for one in theirs.parameters()]


def test_it_computes_what_timm_computes_with_the_same_weights() -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
        for name, value in theirs.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.1)
    ours: Any = models.build("efficientnet_lite", OPTIONS)
    pairs = zip(ours.model.state_dict(), theirs.state_dict().values(), strict=True)
    ours.model.load_state_dict(dict(pairs), strict=True)
    for side in (64, 67):
        x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        ours.size = (side, side)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs((x - 0.5) / 0.5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("side", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (8, 5, 2), (7, 5, 2), (8, 5, 1), (8, 1, 1)])
def test_an_odd_row_of_zeros_goes_below_and_right(side: int, kernel: int, stride: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = Convolution(2, 3, kernel, stride), torch.rand(1, 2, side, side)
    most = (math.ceil(side / stride) - 1) * stride + kernel - side
    before, after = max(most, 0) // 2, max(most, 0) - max(most, 0) // 2
    wanted = F.conv2d(F.pad(x, (before, after, before, after)), layer.weight, layer.bias, stride)
    torch.testing.assert_close(layer(x), wanted)
    assert layer(x).shape[2:] == (math.ceil(side / stride),) * 2


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError, match="variant 5 is not an EfficientNet-Lite. Allowed: 0 to 4"):
        models.build("efficientnet_lite", {**OPTIONS, "variant": 5})
    with pytest.raises(UsageError, match=r"size \[0\] is not an image size"):
        models.build("efficientnet_lite", {**OPTIONS, "size": [0]})


def test_the_zoo_holds_public_weights_and_says_whose() -> None:
    card = bundled.card(NAME)
    assert card.public and not card.results and not card.published and card.license == "apache-2.0"
    for words in ("ML Illustrated", "TensorFlow Authors", "Apache-2.0", "half precision"):
        assert words in card.origin
    text = cards.prose(card)
    assert "A 50,000-image figure is not known" in text
    assert "No figure for the test split of imagenet is known" in text
    assert card.samples and all("EliSchwartz" in one.pictures or "ImageNet-Patch" in one.pictures for one in card.samples)
    for one in card.samples:  # number and origin in one line
        lines = [line for line in text.splitlines() if line.startswith(f"| {one.pictures} |")]
        (line,) = [line for line in lines if f"`{one.threat}`" in line]
        assert f"| {one.images} |" in line and f"({one.certified}/{one.images})" in line
    folder = bundled.folder() / NAME
    card.verify(folder)
    claims.check_samples(card, folder)
    assert "model-index" not in card.render().split("---")[1]


def test_the_zoo_model_has_words_for_its_classes_and_answers() -> None:
    folder = bundled.folder() / NAME
    defense: Any = defenses.build(
        section("patchcleanser", files.read_json(folder / files.CONFIG))
    )  # its self-test takes a while, see test_whole_path.py
    defense.load_state_dict(checkpoint.unpack(folder / files.WEIGHTS)[0], strict=True)
    assert isinstance(defense.network, WithPreprocessing) and defense.input_shape == (3, 224, 224)
    assert len(set(defense.classes)) == 1000 and defense.classes[0] == "tench"
    assert not any(name.startswith("n0") for name in defense.classes)
    torch.testing.assert_close(defense.fill.flatten(), torch.full((3,), 127 / 255))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert defense.plain(x).shape == (1,)
