"""Adversarial images on disk: each as a PNG to look at, and bit for bit.

A folder has, for each flipped image, ``NUMBER.safetensors`` with ``clean`` and ``adversarial``, float32 [C, H, W] in [0, 1], and
the answers of the deployed defense in its metadata; and ``NUMBER.png``, the adversarial image rounded to 8 bits. Rounding may
undo a flip, so the defense is evaluated on the PNG as it was written. ``adversarial.json`` lists the images of the folder.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli import checkpoint
from patchcert_cli.attacks import AttackResult
from patchcert_cli.data import image_files
from patchcert_cli.data.images import to_float
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import UsageError
from patchcert_cli.storage import files
from patchcert_cli.threats import Threat

LIST = "adversarial.json"
TENSORS = ".safetensors"
PNG_CHANNELS = (1, 3)


@dataclass(frozen=True)
class AdversarialFolder:
    """The folder of the adversarial images of one run.

    Attributes:
        path: made if it does not exist.
        identity: what decides the images; a folder holds those of one run.
    """

    path: Path
    identity: dict[str, Any]

    def claim(self) -> None:
        """Make the folder, or go on with it.

        Raises:
            UsageError: it holds other files, or the images of another run. They are left as they are.
            MachineError: nothing can be written there.
        """
        check(self.path)
        if (self.path / LIST).exists():
            if files.read_json(self.path / LIST).get("run") != self.identity:
                hint = "Use another --save; nothing in this one was changed."
                raise UsageError(f"'{self.path}' holds the adversarial images of another run.", hint=hint)
            return
        files.write_json(self.path / LIST, {"run": self.identity, "images": []})

    def has(self, index: int) -> bool:
        """Whether an image is kept."""
        return (self.path / f"{index}{TENSORS}").exists()

    def keep(
        self,
        defense: Defense,
        x: Tensor,
        index: Sequence[int],
        labels: Sequence[int | None],
        threat: Threat,
        outcome: AttackResult,
    ) -> None:
        """Write the flipped ones of images [B, C, H, W]."""
        for at in outcome.success.nonzero()[:, 0].tolist():
            clean, adversarial = x[at].cpu(), outcome.adversarial[at].cpu()
            note = {
                "index": index[at],
                "label": labels[at],
                "prediction": int(outcome.clean_prediction[at]),
                "attacked": int(outcome.prediction[at]),
                "changed": changed_box(clean, adversarial),
                **self._png(defense, clean, adversarial, index[at], int(outcome.clean_prediction[at]), threat),
            }
            content = checkpoint.pack({"clean": clean, "adversarial": adversarial}, note)
            files.write_atomically(self.path / f"{index[at]}{TENSORS}", content)

    def _png(
        self, defense: Defense, clean: Tensor, adversarial: Tensor, index: int, answer: int, threat: Threat
    ) -> dict[str, Any]:
        """Write the PNG, and read it again as anyone would: what the deployed defense answers, and whether that is a flip."""
        if len(adversarial) not in PNG_CHANNELS:
            return {}
        path = self.path / f"{index}.png"
        files.write_atomically(path, png(adversarial))
        pixels, _ = image_files.read(path, ResizeCrop((int(clean.shape[1]), int(clean.shape[2]))), len(clean))
        rounded = to_float(pixels)[None]
        found = defense.predict(rounded.to(defense.device)).cpu()
        flips = ~defense.guarantee.kept(torch.tensor([answer]), found) & threat.contains(rounded != clean[None])
        return {"png": path.name, "png_answer": int(found), "png_flips": bool(flips)}

    def listed(self) -> dict[str, Any]:
        """Write the list of all images, and return how many there are and how many of the PNG files still flip the answer."""
        notes = [checkpoint.unpack(path)[1] for path in self.path.glob(f"*{TENSORS}")]
        notes.sort(key=lambda note: int(note["index"]))
        files.write_json(self.path / LIST, {"run": self.identity, "images": notes})
        pngs = [note for note in notes if "png" in note]
        still = sum(note["png_flips"] for note in pngs)
        return {"folder": str(self.path), "images": len(notes), "png": len(pngs), "png_flips": still}


def check(path: Path) -> None:
    """Refuse a folder that holds anything but adversarial images. Nothing is created or changed.

    Raises:
        UsageError: it holds other files, or is a file.
        MachineError: nothing can be written there.
    """
    files.check_folder(path, "--save")
    if path.is_dir() and any(path.iterdir()) and not (path / LIST).exists():
        raise UsageError(f"--save '{path}' is not empty and holds no adversarial images.", hint="Name a new folder.")


def png(image: Tensor) -> bytes:
    """A PNG file of an image [C, H, W] in [0, 1], rounded to 8 bits; C is 1 or 3."""
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray((pixels[:, :, 0] if len(image) == 1 else pixels).contiguous().numpy()).save(content, format="png")
    return content.getvalue()


def changed_box(clean: Tensor, adversarial: Tensor) -> list[int]:
    """The smallest box around the changed pixels of an image [C, H, W]: top, left, height, width; zeros if there are none."""
    touched = (clean != adversarial).any(dim=0).nonzero()
    if not len(touched):
        return [0, 0, 0, 0]
    first, last = touched.amin(dim=0), touched.amax(dim=0)
    return [*first.tolist(), *(last - first + 1).tolist()]
