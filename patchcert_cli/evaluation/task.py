"""What an evaluation is about: a model, images and claims, checked to fit together, and where its records go."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from patchcert_cli.data.images import Images
from patchcert_cli.defenses import Claim, Defense, WrapsClassifier
from patchcert_cli.errors import DataError, UsageError
from patchcert_cli.threats import Threat
from patchcert_cli.version import __version__

BATCH_SIZE, FEWEST = 1000, 16
PASSES = 1 << 14  # forward passes between two resume points, of a network that is evaluated for each mask


def batch_size(defense: Defense) -> int:
    """Images at a time by default: fewer where each takes many passes, so that stopping a run loses little."""
    cost = defense.passes_per_image()
    return BATCH_SIZE if cost is None else max(FEWEST, min(BATCH_SIZE, PASSES // cost[1]))


@dataclass(frozen=True)
class EvaluatedModel:
    """The model under evaluation: a loaded defense and what identifies it.

    Attributes:
        kind: name of the defense.
        sha256: of the weights.
        source: where the weights came from.
        setting: what besides the weights decides its answers, where no zoo states it: masks, preprocessing, user code.
        in_front: of a plain classifier its preprocessing as text; empty for a model that was trained as a defense.
        notes: lines about it for the user, known once the images are.
    """

    defense: Defense
    name: str
    kind: str
    sha256: str
    source: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    in_front: str = ""
    notes: tuple[str, ...] = ()

    def plain(self, x: Tensor) -> Tensor | None:
        """What a plain classifier says of images [B, C, H, W] without the defense, int64 [B]; None if it is none."""
        return self.defense.plain(x) if self.in_front else None

    def fingerprint(self) -> dict[str, Any] | None:
        """Answers of a plain classifier that show whether it is still the same; None for other models."""
        return self.defense.fingerprint() if self.in_front and isinstance(self.defense, WrapsClassifier) else None


def other_size(images: str, shape: tuple[int, ...], model: str, wanted: tuple[int, int, int]) -> DataError:
    """What is raised where images of ``shape`` are given to a model that takes others."""
    hint = f"Choose images with --data; those of a folder are resized with imagefolder:PATH@{wanted[1]}x{wanted[2]}."
    return DataError(f"{images} images are {shape}, but {model} takes {wanted}.", hint=hint)


@dataclass(frozen=True)
class EvaluationTask:
    """One evaluation.

    Attributes:
        model: the model.
        images: what it is evaluated on.
        claims: what is to be certified, or the one threat to attack under.
        total: images of the whole split.
        seed: of the subset, and of attacks.
        batch_size: images at a time.
        command: what the user typed, for the manifest.
    """

    model: EvaluatedModel
    images: Images
    claims: tuple[Claim, ...]
    total: int
    seed: int = 0
    batch_size: int = BATCH_SIZE
    command: str = ""

    @property
    def threat(self) -> Threat:
        """The threat model of the first claim."""
        return self.claims[0].threat

    @property
    def _said(self) -> dict[str, Any]:
        """The claims, as a manifest tells them."""
        top = {"top": self.claims[0].top} if self.claims[0].top > 1 else {}  # the same for all
        if len(self.claims) == 1:
            method = self.claims[0].method
            return {"threat": str(self.threat)} | ({"method": method} if method else {}) | top
        return {"claims": [[str(claim.threat), claim.method] for claim in self.claims]} | top

    def check(self) -> None:
        """Raise unless images, model and threat fit together."""
        shape = self.model.defense.input_shape
        if tuple(self.images.pixels.shape[1:]) != shape:
            raise other_size(self.images.name, tuple(self.images.pixels.shape[1:]), self.model.name, shape)
        if self.batch_size < 1:
            raise UsageError(
                f"--batch-size is {self.batch_size}.", hint="Allowed: 1 or more; leave it out for a size that fits the memory."
            )
        for claim in self.claims:
            claim.threat.check(shape[1], shape[2], shape[0])
            self.model.defense.check_method(claim.method)
            self.model.defense.check_wishes(claim)

    def identity(self, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides the records; two runs that differ here never share a folder."""
        return {
            "kind": kind,
            "model": self.model.name,
            "model_sha256": self.model.sha256,
            "defense": self.model.kind,
            "numerics": dict(self.model.defense.precision),
            "dataset": self.images.name,
            "split": self.images.split,
            "data_sha256": self.images.digest(),
            "images": len(self.images),
            "subset_seed": self.seed if len(self.images) < self.total else None,
            **({"setting": json.loads(json.dumps(self.model.setting))} if self.model.setting else {}),  # as it reads back
            **self._said,
            "patchcert": __version__,
            **extra,
        }

    def folder(self, kind: str, extra: dict[str, Any]) -> Path:
        """The default run folder: readable, and different for different runs."""
        digest = hashlib.sha256(json.dumps(self.identity(kind, extra), sort_keys=True).encode()).hexdigest()[:8]
        threat = str(self.threat).replace(":", "-").replace("%", "pct")
        threat += f"-and-{len(self.claims) - 1}-more" if len(self.claims) > 1 else ""
        name = re.sub(r"[^\w.@-]+", "-", Path(self.model.name).name)
        return Path("runs") / f"{kind}-{name}-{threat}-{digest}"
