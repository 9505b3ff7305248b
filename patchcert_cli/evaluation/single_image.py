"""One image: its answer, its certificate under each claim, where a patch would do most harm, and what an attack does to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from patchcert_cli.attacks import AnyAttack, Combined
from patchcert_cli.certificate import Certificate
from patchcert_cli.data import class_names, image_files
from patchcert_cli.data.images import to_float
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Claim, Defense, MarginMaps
from patchcert_cli.errors import ClaimError, UsageError
from patchcert_cli.evaluation import hints
from patchcert_cli.evaluation.adversarial_images import AdversarialFolder, changed_box
from patchcert_cli.evaluation.task import EvaluatedModel
from patchcert_cli.layers import passes
from patchcert_cli.models import timm
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.threats import Threat


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
    pixels, notes, x = _read(model, path, resize_crop, resize)
    if mapped and len({str(claim.threat) for claim in claims}) > 1:
        raise UsageError("--map draws one patch.", hint="Give one --patch, for example --patch 5.")
    with _counted(defense, progress or Silent()):
        certificates = defense.certify_claims(x, claims)
    found = _about(model, path, pixels, x, int(certificates[0].prediction[0]))
    found |= {"claims": [_claim_row(defense, certificate) for certificate in certificates]}
    margins = None
    if mapped:
        with _counted(defense, progress or Silent(), whole=True):
            if not isinstance(defense, MarginMaps):
                raise UsageError("this defense has no margins by location.", hint="--map is for models with votes or masks.")
            margins = defense.margin_map(x, claims[0].threat)[0].cpu()
        found |= {"locations": margins.numel(), "weak_locations": int((margins <= 0).sum())}
    notes += [text for text in dict.fromkeys(defense.note(claim.threat) for claim in claims) if text]
    return Single(found, notes, pixels, margins, defense.unit if isinstance(defense, MarginMaps) else "")


class Attacked(NamedTuple):
    """What an attack did to one image.

    Attributes:
        values: plain values, as JSON shows them.
        notes: what was done to the image, line by line.
        clean: float32 [C, H, W] in [0, 1].
        adversarial: float32 [C, H, W] in [0, 1], the clean image if its answer was not flipped.
    """

    values: dict[str, Any]
    notes: list[str]
    clean: Tensor
    adversarial: Tensor


def attack(
    model: EvaluatedModel,
    path: Path,
    threat: Threat,
    attacker: AnyAttack,
    settings: Mapping[str, Any],
    *,
    join: bool = True,
    resize_crop: ResizeCrop | None = None,
    resize: bool = False,
    save: Path | None = None,
    progress: Progress | None = None,
) -> Attacked:
    """Attack one image file, see :func:`certify`; ``join`` and ``save`` are those of :func:`.evaluate.attack`."""
    defense = model.defense
    pixels, notes, x = _read(model, path, resize_crop, resize)
    threat.check(int(x.shape[2]), int(x.shape[3]), int(x.shape[1]))
    join = join and defense.guarantee.proves
    with _counted(defense, progress or Silent(), searching=True):
        outcome, certificate = hints.search(defense, x, threat, attacker, join=join)
    found = _about(model, path, pixels, x, int(outcome.clean_prediction[0]))
    flipped, answer, by = bool(outcome.success[0]), int(outcome.prediction[0]), int(outcome.by[0])
    clean, adversarial = x[0].cpu(), outcome.adversarial[0].cpu()
    found |= {
        "threat": str(threat),
        "guarantee": str(defense.guarantee),
        "attack": dict(settings),
        "claims": [] if certificate is None else [_claim_row(defense, certificate)],
        "flipped": flipped,
        "attacked": answer,
        "attacked_class": _called(defense, answer),
        "queries": int(outcome.queries[0]),
        **({"flipped_at": int(outcome.flipped_at[0]), "changed": changed_box(clean, adversarial)} if flipped else {}),
        **({"by": attacker.names[by]} if flipped and isinstance(attacker, Combined) else {}),
        "broken": [0] if flipped and certificate is not None and bool(certificate.certified[0]) else [],
    }
    if save is not None:
        identity = {name: found[name] for name in ("image_sha256", "model_sha256", "threat", "attack")} | {"kind": "attack"}
        kept = AdversarialFolder(save, json.loads(json.dumps(identity)))
        kept.claim()
        kept.keep(defense, x, [0], [None], threat, outcome)
        found |= {"saved": kept.listed()}
    return Attacked(found, notes, clean, adversarial)


def _read(model: EvaluatedModel, path: Path, resize_crop: ResizeCrop | None, resize: bool) -> tuple[Tensor, list[str], Tensor]:
    """An image file as uint8 [C, H, W], notes on what was done to it, and what the model is given, float32 [1, C, H, W]."""
    channels, height, width = model.defense.input_shape
    size = height, width
    pixels, notes = image_files.read(path, resize_crop or ResizeCrop(size, size), channels, resize=resize)
    return pixels, notes, to_float(pixels)[None].to(model.defense.device)


def _about(model: EvaluatedModel, path: Path, pixels: Tensor, x: Tensor, answer: int) -> dict[str, Any]:
    """Image, model and answer, as plain values; of a plain classifier its answer too."""
    found: dict[str, Any] = {
        "image": str(path),
        "image_sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        "model": model.name,
        "model_sha256": model.sha256,
        "model_source": model.source,
        "defense": model.kind,
        "prediction": answer,
        "class": _called(model.defense, answer),
    }
    plain = model.plain(x)
    if plain is not None:
        found |= {"in_front": model.in_front, "plain": int(plain[0]), "plain_label": model.defense.class_name(int(plain[0]))}
    return found


def check(values: Mapping[str, Any]) -> None:
    """Raise :class:`ClaimError` if an attack flipped the image although it is certified."""
    if values.get("broken"):
        raise ClaimError(
            f"'{values['image']}' is certified and was flipped: the certificate is wrong.",
            hint="Please report it with the image; --save FOLDER keeps the adversarial one.",
        )


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
        **_ranked(defense, certificate),
    }


def _ranked(defense: Defense, certificate: Certificate) -> dict[str, Any]:
    """The first k classes of a claim about them, and which of them stay among them; nothing for other claims."""
    if certificate.ranking is None or certificate.stays is None:
        return {}
    names = [_called(defense, answer) for answer in certificate.ranking[0].tolist()]
    return {"top": certificate.top, "ranking": names, "stays": certificate.stays[0].tolist()}


@contextmanager
def _counted(defense: Defense, progress: Progress, *, whole: bool = False, searching: bool = False) -> Iterator[None]:
    """Show the passes of the network, of the most there can be, or of all pairs of masks if the ``whole`` table is made.

    The passes of an attack that is ``searching`` have no known end.
    """
    cost, made = None if searching else defense.passes_per_image(), 0
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
