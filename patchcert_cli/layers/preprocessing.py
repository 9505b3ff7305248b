"""Layers of our own that both networks and proofs know."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


def _check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != len(std) or not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(mean, std, strict=True)):
        raise ValueError(f"mean {list(mean)} and std {list(std)} must be finite, std above 0, one each per channel")


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel on [B, C, H, W]; inside the model, so that threats speak of pixels in [0, 1].

    It is computed as ``x * scale + shift``, with ``scale`` and ``shift`` [C] rounded to float32 once: that is its definition.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        _check_statistics(mean, std)
        mean_, std_ = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("scale", (1 / std_).float(), persistent=False)
        self.register_buffer("shift", (-mean_ / std_).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, C, H, W], zero mean and unit deviation over the training set."""
        return x * self.scale.reshape(1, -1, 1, 1) + self.shift.reshape(1, -1, 1, 1)


class Centre(nn.Module):
    """The constants of ``(x - mean) * scale``, [C], rounded to float32 once; the mean itself becomes exactly zero."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        _check_statistics(mean, std)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", (1 / torch.tensor(std, dtype=torch.float64)).float(), persistent=False)


class WithPreprocessing(nn.Module):
    """A classifier after the preprocessing that it was made for: images [B, C, H, W] in [0, 1], of any size, to logits [B, K].

    A defense masks the images as they are given to it. They are resized here, after the masks, so that no pixel of a patch has
    leaked into another one before it is covered.

    The mean is taken off before anything else. So what a mask of the mean colour hides is exactly zero for the classifier, in
    every precision; taken off last it would be what rounding left of the mean. Layers without biases, such as those of fresh
    networks with layer normalization, take such a remainder for an image and enlarge it a thousand times a layer.

    Attributes:
        model: the classifier, normalized [B, C', H', W'] -> [B, K]; its parameters are all that is stored.
        size: H' and W'; None to leave images as they are.
        summary: what it is, for cards.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels: int | None = None,
        interpolation: str = "bicubic",
        summary: str = "",
    ) -> None:
        """Wrap ``model``.

        Args:
            model: the classifier.
            size: its input height and width; None if it takes images as they are.
            mean: per channel; None, as ``std``, if it takes pixels in [0, 1].
            std: per channel.
            channels: how many it takes; a grey image is repeated for one that takes three. None if it takes any.
            interpolation: how images of another size are resized: bicubic or bilinear, both with antialiasing, or nearest.
            summary: what it is; its class by default.
        """
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation '{interpolation}' must be one of {', '.join(INTERPOLATIONS)}")
        self.model, self.channels, self.interpolation = model, channels, interpolation
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.centre = None if mean is None or std is None else Centre(mean, std)
        self.summary = summary or type(model).__name__

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and self.channels == 3:
            x = x.expand(-1, 3, -1, -1)
        mean = x.new_zeros(()) if self.centre is None else self.centre.mean.reshape(1, -1, 1, 1)
        x = x if self.centre is None else x - mean
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            smooth = self.interpolation != "nearest"
            more = {"align_corners": False, "antialias": True} if smooth else {}
            x = F.interpolate(x, self.size, mode=self.interpolation, **more).clamp(-mean, 1 - mean)  # as pixels in [0, 1]
        logits: Tensor = self.model(x if self.centre is None else x * self.centre.scale.reshape(1, -1, 1, 1))
        return logits

    @property
    def description(self) -> str:
        """What happens before the classifier, as text."""
        said = (
            [] if self.size is None else [f"resized to {self.size[0]}x{self.size[1]} ({self.interpolation}) where they are not"]
        )
        if self.centre is not None:
            mean, std = ((f"{value:.4g}" for value in part.tolist()) for part in (self.centre.mean, 1 / self.centre.scale))
            said.append(f"minus mean {' '.join(mean)}, divided by std {' '.join(std)}")
        return f"pixels in [0, 1], {', '.join(said) or 'as they are'}"
