"""One image: its answer, its certificate under each claim, and where a patch would do most harm."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from patchcert_cli.certificate import Certificate
from patchcert_cli.data import class_names, image_files
from patchcert_cli.data.images import to_float
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Claim, Defense, MarginMaps
from patchcert_cli.errors import UsageError
from patchcert_cli.evaluation.task import EvaluatedModel
from patchcert_cli.layers import passes
from patchcert_cli.models import timm
from patchcert_cli.progress import Progress, Silent


class Single(NamedTuple):
    """What is known of one image.

    Attributes:
        values: plain values, as JSON shows them.
        notes: what was done to the image, line by line.
        pixels: uint8 [C, H, W], what the model was given.
        margins: float64 [H - h + 1, W - w + 1], the margin at every location of the first claim's patch, if it was asked for.
        unit: what they count.
    """

    values: dict[str, Any]
    notes: list[str]
    pixels: Tensor
    margins: Tensor | None
    unit: str = ""


def certify(
    model: EvaluatedModel,
    path: Path,
    claims: Sequence[Claim],
    *,
    resize_crop: ResizeCrop | None = None,
    resize: bool = False,
    mapped: bool = False,
    progress: Progress | None = None,
) -> Single:
    """Certify one image file.

    Args:
        model: the model.
        path: the image file; see :func:`patchcert_cli.data.image_files.read`.
        claims: what is to be certified.
        resize_crop: how the file is resized and cropped to the model's size; by default its whole middle square.
        resize: make the image fit; else it must be of that size.
        mapped: whether the margins of every location of the first claim's patch are wanted as well.
        progress: receives the passes of the network.
    """
    defense = model.defense
    channels, height, width = defense.input_shape
    size = height, width
    pixels, notes = image_files.read(path, resize_crop or ResizeCrop(size, size), channels, resize=resize)
    x = to_float(pixels)[None].to(defense.device)
    if mapped and len({str(claim.threat) for claim in claims}) > 1:
        raise UsageError("--map draws one patch.", hint="Give one --patch, for example --patch 5.")
    with _counted(defense, progress or Silent()):
        certificates = defense.certify_claims(x, claims)
    answer = int(certificates[0].prediction[0])
    found: dict[str, Any] = {
        "image": str(path),
        "image_sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        "model": model.name,
        "model_sha256": model.sha256,
        "model_source": model.source,
        "defense": model.kind,
        "prediction": answer,
        "class": _called(defense, answer),
        "claims": [_claim_row(defense, certificate) for certificate in certificates],
    }
    plain = model.plain(x)
    if plain is not None:
        found |= {"in_front": model.in_front, "plain": int(plain[0]), "plain_label": defense.class_name(int(plain[0]))}
    margins = None
    if mapped:
        with _counted(defense, progress or Silent(), whole=True):
            if not isinstance(defense, MarginMaps):
                raise UsageError("this defense has no margins by location.", hint="--map is for models with votes or masks.")
            margins = defense.margin_map(x, claims[0].threat)[0].cpu()
        found |= {"locations": margins.numel(), "weak_locations": int((margins <= 0).sum())}
    notes += [text for text in dict.fromkeys(defense.note(claim.threat) for claim in claims) if text]
    return Single(found, notes, pixels, margins, defense.unit if isinstance(defense, MarginMaps) else "")


def _claim_row(defense: Defense, certificate: Certificate) -> dict[str, Any]:
    """What a certificate of one image says, as plain values."""
    return {
        "threat": str(certificate.threat),
        "method": certificate.method,
        "guarantee": str(certificate.guarantee),
        "arithmetic": str(certificate.arithmetic),
        "certified": bool(certificate.certified[0]),
        "margin": float(certificate.margin[0]),
        "worst": certificate.worst[0].tolist(),
        "runner_up": _called(defense, int(certificate.runner_up[0])),
    }


@contextmanager
def _counted(defense: Defense, progress: Progress, *, whole: bool = False) -> Iterator[None]:
    """Show the passes of the network, of the most there can be, or of all pairs of masks if the ``whole`` table is made."""
    cost, made = defense.passes_per_image(), 0
    total = None if cost is None else cost[1]
    what = "passes for the map" if whole else "passes at most"

    def heard(count: int) -> None:
        nonlocal made
        made += count
        if made:
            progress.update(made, max(total or made, made), what if total else "passes so far")

    with passes.heard(heard):
        yield


def _called(defense: Defense, answer: int) -> str:
    """What an answer is called; of a WordNet id its words, where they are known."""
    name = defense.class_name(answer)
    return timm.word(name) if class_names.WNID.fullmatch(name) else name
