"""Masked passes of whole numbers: what is shared between masks has the very bits of the whole network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli.certifiers.masks import mask_influence
from patchcert_cli.certifiers.masks.exact_predictions import ExactMaskedPredictor
from patchcert_cli.certifiers.masks.mask_influence import MaskInfluence, ReadIndex, common_boxes, spread
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, integers
from patchcert_cli.layers.levels import Levels
from tests.layers.test_levels import images, network, slowly

FILL = torch.tensor([0.4, 0.5, 0.3])[:, None, None]


def views(cover: str = "patch:3x3", seed: int = 0, **options: Any) -> tuple[ExactMaskedPredictor, Tensor]:
    """A network behind masks, and a few images."""
    shape = options.get("input_shape", (3, 16, 16))
    frozen: Any = fixed_point.freeze(network(seed, **options))
    masks = MaskSpec((cover,), per_axis=3).masks(*shape[1:]).occluded
    return ExactMaskedPredictor(frozen, masks, FILL[: shape[0]]), images(shape, 3)


def every(count: int, masks: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(count, masks, masks).nonzero().T.unbind()  # type: ignore[return-value]


CASES: list[dict[str, Any]] = [
    {},
    {"cover": "patch:2x7"},
    {"cover": "patches:2:2x2"},
    {"takes_mask": True},
    {"mirrored": True},
    {"kernel": 3},
    {"widths": [6]},
    {"input_shape": (1, 15, 13), "widths": [4, 4], "takes_mask": True},
    {"widths": [6, 8, 10]},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("worth", [0.0, 0.7, 2.0])
def test_every_pair_has_the_bits_of_the_whole_network(
    case: dict[str, Any], worth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_influence, "WORTH", worth)
    through, x = views(**case)
    partial_levels = through.influences()[0].partial_levels
    assert partial_levels == (0 if worth == 0 else len(through.network.each)) or worth == 0.7
    image, first, second = every(len(x), len(through.masks))
    found = through.for_images(x).logits(image, first, second)
    occluded = through.masks[first] | through.masks[second]
    steps = torch.where(occluded[:, None], through.fill, fixed_point.to_steps(x)[image])
    assert torch.equal(found, slowly(through.network, steps, occluded))
    assert len(found) == len(x) * len(through.masks) ** 2


def test_neither_order_nor_company_alters_a_pass() -> None:
    through, x = views()
    image, first, second = every(len(x), len(through.masks))
    right = through.for_images(x).logits(image, first, second)
    shuffled = torch.randperm(len(image), generator=torch.Generator().manual_seed(5))
    asked = through.for_images(x)
    for some in torch.split(shuffled, 7):
        assert torch.equal(asked.logits(image[some], first[some], second[some]), right[some])
    assert torch.equal(asked.logits(image, second, first), right)  # two masks have no order
    alone = through.for_images(x[1:2])
    mine = image == 1
    assert torch.equal(alone.logits(image[mine] - 1, first[mine], second[mine]), right[mine])
    for backend in ("float32", "float64"):
        with integers.only(backend):
            assert torch.equal(through.for_images(x).logits(image, first, second), right)
    assert asked.logits(*torch.zeros(3, 0, dtype=torch.int64)).shape == (0, 5)


def test_answers_are_sorted_logits() -> None:
    through, x = views()
    image, first, second = every(len(x), len(through.masks))
    asked = through.for_images(x)
    told, logits = asked(image, first, second), asked.logits(image, first, second)
    for row in range(len(logits)):
        numbers = logits[row].tolist()
        ranked = sorted(range(len(numbers)), key=lambda k: (-numbers[k], k))
        assert (int(told.label[row]), int(told.rival[row])) == (ranked[0], ranked[1])
        assert (float(told.logit_margin[row]) > 0) == (numbers[ranked[0]] > numbers[ranked[1]])


def test_zones_are_where_a_hidden_pixel_is_felt() -> None:
    """By NaN: what a pixel reaches in a chain of convolutions and poolings of the same shapes."""
    frozen: Any = fixed_point.freeze(network(kernel=3))
    masks = MaskSpec(("patch:3x3",), per_axis=3).masks(16, 16).occluded
    affected = masks
    for level in frozen.each:
        marked = torch.where(affected[:, None], torch.nan, 1.0)
        kernel = torch.ones(1, 1, level.kernel, level.kernel)
        reached = torch.nn.functional.conv2d(marked, kernel, padding=level.padding)
        if level.pool:
            reached = torch.nn.functional.max_pool2d(reached, 2)
        affected = spread(affected, level)
        assert torch.equal(affected, reached.isnan()[:, 0])
    boxes = common_boxes(affected)
    for i in range(len(affected)):
        for j in range(len(affected)):
            rows, columns = (affected[i] & affected[j]).nonzero().T
            top, left, height, width = boxes[i, j].tolist()
            if not len(rows):
                assert height == 0 or width == 0
                continue
            assert (top, top + height) == (int(rows.min()), int(rows.max()) + 1)
            assert (left, left + width) == (int(columns.min()), int(columns.max()) + 1)


@pytest.mark.parametrize("broken", ["zone", "box", "row"])
def test_a_wrong_zone_is_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_influence, "WORTH", 2.0)
    through, x = views()
    influences = through.influences()[0]
    if broken == "zone":  # a column less is affected
        for affected in influences.affected[1:]:
            affected &= affected.roll(1, dims=2)
        influences.boxes = [common_boxes(affected) for affected in influences.affected[1:]]
    elif broken == "box":  # a row less is computed
        for boxes in influences.boxes:
            boxes[..., 2] = (boxes[..., 2] - 1).clamp(min=0)
    else:  # a row too far in what is read of single masks
        original = MaskInfluence._read_index

        def seen(self: MaskInfluence, number: int, *places: Tensor) -> ReadIndex:
            found = original(self, number, *places)
            return replace(found, offset=found.offset + (found.own == 0).int()) if number == 1 else found

        monkeypatch.setattr(MaskInfluence, "_read_index", seen)
    image, first, second = every(len(x), len(through.masks))
    found = through.for_images(x).logits(image, first, second)
    occluded = through.masks[first] | through.masks[second]
    steps = torch.where(occluded[:, None], through.fill, fixed_point.to_steps(x)[image])
    assert not torch.equal(found, through.network(steps, occluded))


def test_the_self_test_finds_a_backend_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    through, _ = views()
    through.test()
    real = integers.Whole.run
    monkeypatch.setattr(
        integers.Whole,
        "run",
        lambda self, q: real(self, q) if integers._forced else lambda v: integers.reference(self, v) ^ 1,
    )
    with pytest.raises(IntegrityError, match="differ"):
        through.test()


def test_boxes_save_most_of_the_early_levels() -> None:
    """What makes sharing pay: of the first maps of the network of the zoo, masks have hardly anything in common_boxes."""
    frozen: Any = fixed_point.freeze(network(input_shape=(3, 32, 32), widths=[8, 8, 8]))
    assert isinstance(frozen, Levels)
    masks = MaskSpec(("patch:5x5",), per_axis=7).masks(32, 32).occluded
    influences = MaskInfluence(frozen, masks)
    shares = [
        float((boxes[..., 2] * boxes[..., 3]).double().mean()) / affected[0].numel()
        for affected, boxes in zip(influences.affected[1:], influences.boxes, strict=True)
    ]
    assert len(masks) == 49 and influences.partial_levels == 5
    assert shares[0] < 0.01 and shares[2] < 0.06 and shares[3] < 0.25 and shares[4] < 0.5
