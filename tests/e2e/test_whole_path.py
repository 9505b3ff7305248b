"""The whole path from picture files to certificates, held against naive code: plain accuracy, double masking by all pairs of
masks, certified detection, and pictures pasted on images.

Once with made-up pictures and a small network, and, where the pictures are there, with the zoo's ImageNet model on photographs:
``PATCHCERT_PICTURES`` names a folder with class folders ``imagenette-50/WNID/`` and square patches ``patches/*.png``.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from patchcert_cli import attacks, cards, data
from patchcert_cli.catalog import bundled
from patchcert_cli.certificate import ALERT
from patchcert_cli.defenses.minority import Minority
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.evaluation import models
from patchcert_cli.evaluation.models import DefenseRequest
from patchcert_cli.threats import Patch, parse_threat

NAME = "imagenet-patchcleanser-efficientnet-lite0"
PICTURES = Path(os.environ.get("PATCHCERT_PICTURES", Path(os.environ.get("PATCHCERT_DATA", "data")) / "imagenet-samples"))
COLOURS = {"blue": (40, 60, 200), "green": (60, 180, 40), "red": (210, 50, 60)}


class Channels(nn.Module):
    """The largest of the means of three channels, the middle of the picture counting most."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.hann_window(26, periodic=False)[1:-1]
        self.weight = nn.Parameter((weight[:, None] * weight[None]) / weight.sum() ** 2 * 40)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(dim=(2, 3)).flip(1)  # blue, green, red


class Labels:
    """Labels of one image [C, H, W] behind each pair of masks and behind none, in float64, asked one by one."""

    def __init__(self, defense: PatchCleanser, image: Tensor) -> None:
        self.network, self.masks, self.fill = copy.deepcopy(defense.network).double(), defense.masks, defense.fill.double()
        self.image, self.count = image.double(), len(defense.masks)
        pairs = list(itertools.combinations_with_replacement(range(self.count), 2))
        self.pairs = {pair: int(self._logits(self.masks[pair[0]] | self.masks[pair[1]]).argmax()) for pair in pairs}
        self.singles = [self._logits(mask).softmax(dim=0) for mask in self.masks]
        self.whole = int(self._logits(torch.zeros_like(self.masks[0])).argmax())

    @torch.no_grad()
    def _logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.network(torch.where(hidden, self.fill, self.image)[None])[0]
        return found

    def recovered(self) -> tuple[int, bool]:
        """The published two-round answer, and whether the labels behind all pairs agree with it."""
        first = [self.pairs[at, at] for at in range(self.count)]
        most = Counter(first).most_common()
        majority = min(label for label, times in most if times == most[0][1])
        answer = majority
        for at, label in enumerate(first):
            row = [self.pairs[min(at, other), max(at, other)] for other in range(self.count)]
            if label != majority and set(row) == {label}:
                answer = label
                break
        return answer, set(self.pairs.values()) == {answer}

    def detected(self, threshold: float) -> tuple[int, bool]:
        """The label or an alarm, and whether every mask says that label, confidently enough."""
        views = [(int(one.argmax()), float(one.max())) for one in self.singles]
        if any(label != self.whole and sure >= threshold for label, sure in views):
            return ALERT, False
        return self.whole, all(label == self.whole and sure > threshold for label, sure in views)


def check_path(candidate: Any, defense: PatchCleanser, name: str, threat: Patch, patches: Path, count: int) -> dict[str, int]:
    """Hold everything against naive code on ``count`` pictures of a folder; returns counts."""
    images = data.load(name, "test")
    dataset = data.open_dataset(name)
    outputs = candidate.matched(dataset.class_names("test"), dataset, type("EvaluatedModel", (), {"defense": defense}))
    images = images if outputs is None else images.relabelled(outputs)
    plain = torch.cat([defense.plain(data.to_float(part)) for part in images.read().split(10)])
    some = images.limit(count, 0)
    x = data.to_float(some.read())
    naive = [Labels(defense, image) for image in x]
    certificate, every = defense.certify(x, threat), defense.certify(x, threat, "pairs")
    assert [(one.recovered()[0]) for one in naive] == certificate.prediction.tolist() == defense.predict(x).tolist()
    assert [one.recovered()[1] for one in naive] == every.certified.tolist()
    assert not bool((every.certified & ~certificate.certified).any())
    assert [one.whole for one in naive] == defense.plain(x).tolist()
    found = {"plain": int((plain == images.labels).sum()), "certified": int(certificate.certified.sum()), "alarms": 0, "held": 0}
    detecting = Minority(
        defense.network,
        input_shape=defense.input_shape,
        classes=defense.classes,
        masks=defense.plan,
        fill=defense.fill.flatten().tolist(),
    ).eval()
    detecting._tested = True  # the network was, a moment ago
    for threshold in (0.0, 0.6):
        detecting.threshold = threshold
        proven = detecting.certify(x, threat, "all")
        assert [(int(one), bool(two)) for one, two in zip(proven.prediction, proven.certified, strict=True)] == [
            one.detected(threshold) for one in naive
        ]
        found["alarms"] += int((proven.prediction == ALERT).sum())
        found["held"] += int(proven.certified.sum())
    attack, _ = attacks.pasted(patches, threat, defense.input_shape, seed=1)
    chosen = certificate.certified.long().argmax()  # the first certified one, if there is any
    outcome = attack(defense, x[chosen : chosen + 1], threat, index=some.index[chosen : chosen + 1])
    assert not bool((outcome.success & certificate.certified[chosen]).any())
    found["pasted"] = int(outcome.judged[0, 0])
    return found


def test_the_whole_path_on_made_up_pictures(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(4):  # flat colours with noise, and ever more of another colour
            pixels = torch.tensor(colour, dtype=torch.float32).expand(30, 27, 3) + 60 * torch.randn(
                30, 27, 3, generator=generator
            )
            pixels[: 5 * number] = torch.tensor(COLOURS["red" if name != "red" else "green"], dtype=torch.float32)
            Image.fromarray(numpy.asarray(pixels.clamp(0, 255).byte())).save(tmp_path / "val" / name / f"{number}.png")
    (tmp_path / "patches").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (5, 5), colour).save(tmp_path / "patches" / f"{name}.png")
    request = DefenseRequest(masks=3)
    defense = PatchCleanser(
        Channels().eval(),
        input_shape=(3, 24, 24),
        classes=tuple(COLOURS),
        masks=request.plan([Patch(5, 5)], (3, 24, 24)),
        fill=(0.5,) * 3,
    ).eval()

    class Named:
        def matched(self, classes: Any, name: str, model: Any) -> list[int]:
            return [list(COLOURS).index(one) for one in classes]

    found = check_path(Named(), defense, f"imagefolder:{tmp_path / 'val'}@24", Patch(5, 5), tmp_path / "patches", 12)
    assert found["plain"] >= 9 and 0 < found["certified"] < 12 and found["alarms"] > 0 and found["held"] > 0
    assert found["pasted"] == 3


@pytest.mark.pictures
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (PICTURES / "imagenette-50").is_dir(), reason=f"no pictures in '{PICTURES}'")
@pytest.mark.skipif(not cards.weights_of(bundled.folder() / NAME), reason="no weights")
def test_the_whole_path_on_photographs(tmp_path: Path) -> None:
    folder = tmp_path / "imagenette-50"
    folder.symlink_to((PICTURES / "imagenette-50").resolve())
    threat = parse_threat("patch:50")
    assert isinstance(threat, Patch)
    candidate = models.find(NAME, None, DefenseRequest(masks=3), "cpu")
    made: Any = candidate.evaluated((3, 224, 224), [threat], "cpu").defense
    assert len(made.masks) == 9  # and 45 pairs
    name = candidate.fitted(data.open_dataset(f"imagefolder:{folder}")).name
    found = check_path(candidate, made, name, threat, PICTURES / "patches", 3)
    assert found["plain"] == 37 and found["pasted"] == 10
