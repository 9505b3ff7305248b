"""One picture: its answer, its certificate under each claim, and where a patch would do most harm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchcert_cli import image, pictures
from patchcert_cli.data import to_float
from patchcert_cli.defenses.base import Claim
from patchcert_cli.errors import UsageError
from patchcert_cli.plan import Subject
from patchcert_cli.threats import Patch


def certify(
    subject: Subject, path: Path, claims: Sequence[Claim], *, resize: bool = False, map_to: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Certify one picture file; returns plain values, and notes on what was done to the picture.

    Args:
        subject: the model.
        path: the picture; see :func:`patchcert_cli.image.read`.
        claims: what is to be certified.
        resize: scale the picture to the model's size.
        map_to: a picture file to draw the margins of every location of the first claim's patch into.
    """
    defense = subject.defense
    pixels, notes = image.read(path, defense.input_shape, resize=resize)
    x = to_float(pixels)[None].to(defense.device)
    if map_to is not None and len({str(claim.threat) for claim in claims}) > 1:
        raise UsageError("--map draws one patch;", hint="give one --patch, for example --patch 5.")
    certificates = defense.certify_each(x, claims)
    answer = int(certificates[0].prediction[0])
    rows = [
        {
            "threat": str(certificate.threat),
            "method": certificate.method,
            "guarantee": str(certificate.guarantee),
            "arithmetic": str(certificate.arithmetic),
            "certified": bool(certificate.certified[0]),
            "margin": float(certificate.margin[0]),
            "worst": certificate.worst[0].tolist(),
            "rival": defense.classes[int(certificate.rival[0])],
        }
        for certificate in certificates
    ]
    found: dict[str, Any] = {
        "image": str(path),
        "image_sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        "model": subject.name,
        "model_sha256": subject.sha256,
        "model_source": subject.source,
        "defense": subject.kind,
        "prediction": answer,
        "label": defense.called(answer),
        "claims": rows,
    }
    plain = subject.plain(x)
    if plain is not None:
        found |= {"in_front": subject.in_front, "plain": int(plain[0]), "plain_label": defense.called(int(plain[0]))}
    if map_to is not None:
        threat = claims[0].threat
        margins = defense.margin_map(x, threat)[0].cpu()
        found |= {"map": str(map_to), "locations": margins.numel(), "weak_locations": int((margins <= 0).sum())}
        top, left, height, width = certificates[0].worst[0].tolist()
        words = "certified" if rows[0]["certified"] else "not certified"
        pictures.margin_map(
            pixels,
            margins,
            map_to,
            title=f"{path.name}: {defense.called(answer)}, {words} against {threat}",
            box=(top, left, height, width),
            patch=Patch(height, width),
            unit=defense.unit,
        )
        notes.append(f"drew {map_to}")
    notes += [text for text in dict.fromkeys(defense.remark(claim.threat) for claim in claims) if text]
    return found, notes
