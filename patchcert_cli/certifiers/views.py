"""What a classifier says of images behind masks, the same however it is rounded.

A label is decided by how far the largest logit is ahead of the next. Where this lead is within what rounding may do, the pass is
computed again in higher precision, at last in float64. So a label depends neither on the batch nor on the device, unless it is
closer than float64 can tell, and then its lead says so. How much rounding may do is not proven but allowed for generously
(:data:`SLACK`), and :meth:`Views.test` compares precisions and batches on the very network.

Shapes: B images, C channels, H x W pixels, K classes, M masks, n passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers import rounding
from patchcert_cli.errors import IntegrityError
from patchcert_cli.exact import exact_arithmetic

SLACK = {"bfloat16": 2.0**-2, "float32": 2.0**-13, "float64": 2.0**-40}  # shares of a pass's largest logit
PRECISIONS = ("float32", "bfloat16")  # in which labels may be computed at first
PASSES, PIXELS, LARGER = 256, 1 << 20, 64  # passes at a time on a CPU, their values, and how many times that on a GPU
GATHERED = 4  # times as many passes have their images copied at once


class Answers(NamedTuple):
    """What the classifier says of n masked images.

    Attributes:
        label: int64 [n], the class with the largest logit, ties to the lowest index.
        rival: int64 [n], the next one.
        lead: float64 [n], how far the label is ahead of it, as a share of the largest logit; sure if above SLACK["float64"].
    """

    label: Tensor
    rival: Tensor
    lead: Tensor


def behind(network: nn.Module, x: Tensor, hidden: Tensor, fill: Tensor) -> Tensor:
    """Logits [B, K] of images [B, C, H, W] in which hidden pixels, bool [B, H, W], have the colour ``fill`` [C, 1, 1].

    A network whose attribute ``takes_mask`` is true is also told which pixels are hidden, bool [B, 1, H, W].
    """
    seen = torch.where(hidden[:, None], fill, x)
    return cast(Tensor, network(seen, hidden[:, None]) if getattr(network, "takes_mask", False) else network(seen))


class Views:
    """A classifier, as it is now, and masks.

    Attributes:
        slack: what a lead must exceed to be sure.
    """

    slack = SLACK["float64"]

    def __init__(self, network: nn.Module, masks: Tensor, fill: Tensor, shape: tuple[int, ...], classes: int, first: str) -> None:
        """Look through masks, bool [M, H, W], of colour ``fill`` [C, 1, 1].

        Args:
            network: images of ``shape`` (C, H, W) in [0, 1] to logits of ``classes``.
            masks: what each mask hides.
            fill: the colour of hidden pixels.
            shape: C, H and W.
            classes: K.
            first: the precision to begin with, float32 or bfloat16.
        """
        self._masks, self._fill, self._shape, self._classes = masks, fill, shape, classes
        self._ladder = ("bfloat16", "float32", "float64") if first == "bfloat16" else ("float32", "float64")
        self._networks: dict[str, nn.Module | None] = dict.fromkeys(PRECISIONS, rounding.frozen(network))

    def asking(self, x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Answers]:
        """What to ask about images [B, C, H, W]; see :meth:`ask`."""
        return functools.partial(self.ask, x)

    def ask(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor) -> Answers:
        """Labels of n passes: which of the images [B, C, H, W] behind which two masks, int64 [n]; on the CPU.

        Raises:
            IntegrityError: what the network returns is not one finite number per image and class.
        """
        together = torch.split(torch.arange(len(image)), GATHERED * self._size(x))
        parts = [self._ask(x[image[some].to(x.device)], first[some], second[some]) for some in together]
        return Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _ask(self, x: Tensor, first: Tensor, second: Tensor) -> Answers:
        """The same of one image [n, C, H, W] a pass."""
        label, rival = torch.zeros(2, len(x), dtype=torch.int64)
        lead, open_ = torch.zeros(len(x), dtype=torch.float64), torch.arange(len(x))
        for kind in self._ladder:
            logits = self.logits(kind, x[open_.to(x.device)], first[open_], second[open_])
            if logits is None:
                lead[open_] = 0  # nobody can tell, so it certifies nothing
                break
            ranked = logits.sort(dim=1, descending=True, stable=True)  # of equals the lowest class first
            label[open_], rival[open_] = ranked.indices[:, 0], ranked.indices[:, 1]
            lead[open_] = (ranked.values[:, 0] - ranked.values[:, 1]) / _scale(logits)
            open_ = open_[lead[open_] <= SLACK[kind]]
            if not len(open_):
                break
        return Answers(label, rival, lead)

    def _size(self, x: Tensor) -> int:
        """Passes at a time."""
        return max(1, min(PASSES, PIXELS // math.prod(self._shape))) * (1 if x.device.type == "cpu" else LARGER)

    @torch.no_grad()
    def logits(self, kind: str, x: Tensor, first: Tensor, second: Tensor) -> Tensor | None:
        """float64 [n, K] on the CPU, computed in precision ``kind``; None if the network cannot be."""
        network = self._network(kind)
        if network is None:
            return None
        parts = [torch.zeros(0, self._classes, dtype=torch.float64)]
        for some in torch.split(torch.arange(len(x)), self._size(x)):
            images = x[some.to(x.device)]
            hidden = self._masks[first[some].to(x.device)] | self._masks[second[some].to(x.device)]
            with exact_arithmetic(), torch.autocast(x.device.type, torch.bfloat16, enabled=kind == "bfloat16"):
                logits = behind(network, images.double() if kind == "float64" else images.float(), hidden, self._fill)
            if tuple(logits.shape) != (len(some), self._classes):
                raise IntegrityError(
                    f"the network returns {tuple(logits.shape)} for {len(some)} images;",
                    hint=f"it must return logits ({len(some)}, {self._classes}).",
                )
            parts.append(logits.double().cpu())
        joined = torch.cat(parts)
        if not bool(joined.isfinite().all()):
            raise IntegrityError("the network answers NaN or infinity;", hint="its weights or its preprocessing are broken.")
        return joined

    def _network(self, kind: str) -> nn.Module | None:
        """The copy in float64 is made when it is first needed; other people's code may not compute in float64."""
        if kind not in self._networks:
            network = rounding.double(cast(nn.Module, self._networks["float32"]))
            grey = torch.full((1, *self._shape), 0.5, dtype=torch.float64, device=self._masks.device)
            try:
                kept = behind(network, grey, self._masks[:1], self._fill).dtype == torch.float64
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError):
                kept = False
            self._networks[kind] = network if kept else None
        return self._networks[kind]

    @torch.no_grad()
    def test(self) -> None:
        """Compare the precisions, and batches with single images, on some masked images.

        Raises:
            IntegrityError: they differ by more than half of what rounding is allowed.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(4, *self._shape, generator=generator)
        x[2:] = F.interpolate(x[2:, :, ::4, ::4], self._shape[1:])  # of larger squares
        x = x.to(self._masks.device)
        first, second = torch.randint(len(self._masks), (2, len(x)), generator=generator)
        finest = self.logits("float64", x, first, second)
        best = finest if finest is not None else self.logits("float32", x, first, second)
        assert best is not None
        for kind in self._ladder[:-1]:
            alone = [self.logits(kind, x[at : at + 1], first[at : at + 1], second[at : at + 1]) for at in (0, 2)]
            for at, count, found in ((0, len(x), self.logits(kind, x, first, second)), (0, 1, alone[0]), (2, 1, alone[1])):
                assert found is not None
                off = float(((found - best[at : at + count]).abs().amax(dim=1) / _scale(best[at : at + count])).amax())
                if 2 * off > SLACK[kind]:
                    raise IntegrityError(
                        f"in {kind} logits are off by {off:.1e} of the largest, and {SLACK[kind] / 2:.1e} is allowed for;",
                        hint="a network so sensitive to rounding cannot be certified.",
                    )


def _scale(logits: Tensor) -> Tensor:
    """The largest logit of each pass, [n, K] -> [n]."""
    return logits.abs().amax(dim=1).clamp(min=1e-300)
