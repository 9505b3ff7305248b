"""Masked predictions of classifiers whose arithmetic rounds: what is measured of that, and what is recomputed in float64.

A label is decided by how far the largest logit is ahead of the next, as a share of a scale that no image can shrink
(:mod:`patchcert_cli.certifiers.masks.logit_scale`). Where this logit margin is above what rounding is allowed in a quick
precision (:data:`TOLERANCE`), it decides, in whatever batch. Every other pass is **in doubt**, and is computed the same way each
time: in float64, each image alone, in one memory format, on one thread of a CPU. So on one machine ``predict`` and ``certify``
ask one function of the image, as long as quick passes err by less than they are allowed.

**This is measured, not proven**: nothing bounds the rounding errors of an arbitrary network. :meth:`MaskedPredictor.test`
measures them, on ordinary images and on ones whose logits were driven together, and refuses a network that uses a quarter of its
allowance. A result in float64 counts only if it follows steps of the input that float32 cannot see; else what is in doubt is
computed in float32, and certifies nothing. Two machines may differ where they round differently: labels that a pass in float64
leaves within ``tolerance`` certify nothing.

Shapes: B images, C channels, H x W pixels, K classes, M masks, n passes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certifiers.masks import logit_scale
from patchcert_cli.certifiers.masks.logit_scale import Calibration, CalibrationCache
from patchcert_cli.device import computes_in_bfloat16
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import passes, precision
from patchcert_cli.layers.precision import exact_arithmetic

TOLERANCE = {"bfloat16": 2.0**-4, "float32": 2.0**-13, "float64": 2.0**-40}  # shares of the scale
ROOM = 4  # a measured error may be this part of it: two logits make a logit margin, and a measurement is not a bound
PRECISIONS = ("float32", "bfloat16")  # in which labels may be computed at first
PASSES, PIXELS, LARGER = 256, 1 << 20, 64  # passes at a time on a CPU, their values, and how many times that on a GPU
GATHERED = 4  # times as many passes have their images copied at once
MANY = 1000  # classes from which on bfloat16 leaves nearly all labels in doubt, so that it gains nothing
SIZES = (1, 2, 3, 7)  # batches that the quick precisions are measured in
CHANNELS_LAST = (nn.Conv2d, nn.BatchNorm2d)  # layers of networks that compute with channels last on a CPU
LARGE = {"bfloat16": 64, "float32": PASSES}  # and the largest one


class MaskedPredictions(NamedTuple):
    """Predictions for n masked images.

    Attributes:
        label: int64 [n], the class with the largest logit, ties to the lowest index.
        rival: int64 [n], the next one.
        logit_margin: float64 [n], how far the label is ahead of it, as a share of the scale; sure if above ``tolerance`` of the
            views.
    """

    label: Tensor
    rival: Tensor
    logit_margin: Tensor


class MaskedLogits(NamedTuple):
    """Logits of n passes.

    Attributes:
        logits: float64 [n, K].
        scale: float64 [n], what logit margins are measured against.
        known: bool [n], beyond doubt, or computed in a float64 that was verified.
    """

    logits: Tensor
    scale: Tensor
    known: Tensor


Clear = Callable[[Tensor, Tensor], Tensor]  # logits [n, K], scale [n] -> how far each pass is from another decision, [n]


def logit_margins(logits: Tensor, scale: Tensor) -> Tensor:
    """How far the largest logit is ahead of the next one, as a share of the scale: [n, K], [n] -> [n]."""
    best = logits.topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]) / scale


def logits_under_mask(network: nn.Module, x: Tensor, occluded: Tensor, fill: Tensor) -> Tensor:
    """Logits [B, K] of images [B, C, H, W] in which hidden pixels, bool [B, H, W], have the colour ``fill`` [C, 1, 1].

    A network whose attribute ``takes_mask`` is true also gets which pixels are occluded, bool [B, 1, H, W].
    """
    seen = torch.where(occluded[:, None], fill, x)
    return cast(Tensor, network(seen, occluded[:, None]) if getattr(network, "takes_mask", False) else network(seen))


class MaskedPredictor:
    """A classifier, as it is now, and masks.

    Attributes:
        arithmetic: what is known of the rounding of its labels.
        tolerance: a logit margin that is sure exceeds it.
    """

    arithmetic = Arithmetic.MEASURED
    tolerance = TOLERANCE["float64"]

    def __init__(
        self,
        network: nn.Module,
        masks: Tensor,
        fill: Tensor,
        shape: tuple[int, ...],
        classes: int,
        first: str,
        memory: CalibrationCache | None = None,
    ) -> None:
        """Look through masks, bool [M, H, W], of colour ``fill`` [C, 1, 1].

        Args:
            network: images of ``shape`` (C, H, W) in [0, 1] to logits of ``classes``.
            masks: what each mask hides.
            fill: the colour of hidden pixels.
            shape: C, H and W.
            classes: K.
            first: the precision to begin with, float32 or bfloat16.
            memory: where what was found out about the network is kept from one call to the next.
        """
        self._masks, self._fill, self._shape, self._first, self.classes = masks, fill, shape, first, classes
        self._networks: dict[str, nn.Module | None] = dict.fromkeys(PRECISIONS, precision.frozen(network))
        self._owner, self._memory = network, memory or CalibrationCache()

    @property
    def calibration(self) -> Calibration:
        """What was found out about the network; a few passes the first time."""
        return self._memory.of(self._owner, (len(self._masks), self._masks.device), self._measure)

    @property
    def quick(self) -> tuple[str, ...]:
        """The precisions that decide in batches.

        bfloat16 is one of them only where the size of the last layer's terms is known, where the processor computes in it, and
        where there are fewer than :data:`MANY` classes.
        """
        wished = self._first == "bfloat16" and self.classes < MANY and computes_in_bfloat16(self._masks.device)
        return PRECISIONS[::-1] if wished and self.calibration.head is not None else PRECISIONS[:1]

    def for_images(self, x: Tensor) -> Callable[[Tensor, Tensor, Tensor], MaskedPredictions]:
        """What to ask about images [B, C, H, W]; see :meth:`ask`."""
        return functools.partial(self.ask, x)

    def ask(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor) -> MaskedPredictions:
        """Labels of n passes: which of the images [B, C, H, W] under which two masks, int64 [n]; on the CPU.

        Raises:
            IntegrityError: what the network returns is not one finite number per image and class.
        """
        seen = self.masked_logits(x, image, first, second, logit_margins)
        ranked = seen.logits.sort(dim=1, descending=True, stable=True).indices  # of equals the lowest class first
        return MaskedPredictions(ranked[:, 0], ranked[:, 1], torch.where(seen.known, logit_margins(seen.logits, seen.scale), 0))

    def masked_logits(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor, clear: Clear) -> MaskedLogits:
        """Logits of n passes, as :meth:`ask` takes them, where ``clear`` decides which are beyond doubt."""
        together = torch.split(torch.arange(len(image)), GATHERED * self._size(x))
        parts = [self._look(x[image[some].to(x.device)], first[some], second[some], clear) for some in together]
        return MaskedLogits(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else self._nothing(0)

    def _nothing(self, count: int) -> MaskedLogits:
        logits = torch.zeros(count, self.classes, dtype=torch.float64)
        return MaskedLogits(logits, torch.ones(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool))

    def _look(self, x: Tensor, first: Tensor, second: Tensor, clear: Clear) -> MaskedLogits:
        """The same of one image [n, C, H, W] a pass."""
        found, open_ = self._nothing(len(x)), torch.arange(len(x))
        for kind in self.quick:
            if not len(open_):
                return found
            logits, scale = self.logits(kind, x[open_.to(x.device)], first[open_], second[open_])
            found.logits[open_], found.scale[open_] = logits, scale
            open_ = open_[~(clear(logits, scale) > TOLERANCE[kind])]
        if len(open_):
            logits, scale = self.reference_logits(x[open_.to(x.device)], first[open_], second[open_])
            found.logits[open_], found.scale[open_], found.known[open_] = logits, scale, self.calibration.double
        return found

    def _size(self, x: Tensor) -> int:
        """Passes at a time."""
        return max(1, min(PASSES, PIXELS // math.prod(self._shape))) * (1 if x.device.type == "cpu" else LARGER)

    def reference_logits(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float64 [n, K] and scale [n] on the CPU, each pass computed in one way, independent of the others."""
        kind = "float64" if self.calibration.double else "float32"
        with one_way(x.device):
            logits, scale = self._each(kind, x, first, second, self.calibration.head)
        return logits, scale.clamp(min=self.calibration.least)

    def _each(self, kind: str, x: Tensor, first: Tensor, second: Tensor, head: str | None) -> tuple[Tensor, Tensor]:
        one = [slice(at, at + 1) for at in range(len(x))]
        plain = torch.contiguous_format
        parts = []
        for at in one:
            parts.append(self._run(kind, x[at].clone(memory_format=plain), first[at], second[at], head))
            passes.made(0)
        return torch.cat([logits for logits, _ in parts]), torch.cat([scale for _, scale in parts])

    def logits(self, kind: str, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float64 [n, K] and scale [n] on the CPU, computed in precision ``kind``, many passes at a time."""
        found = self._nothing(0)
        parts, sizes = [found.logits], [found.scale]
        layout = torch.channels_last if kind == "float32" and self.calibration.last else torch.preserve_format
        for some in torch.split(torch.arange(len(x)), self._size(x)):
            images = x[some.to(x.device)].clone(memory_format=layout)
            logits, scale = self._run(kind, images, first[some], second[some], self.calibration.head)
            parts.append(logits)
            sizes.append(scale.clamp(min=self.calibration.least))
            passes.made(len(some) if kind == self.quick[0] else 0)
        return torch.cat(parts), torch.cat(sizes)

    @torch.no_grad()
    def _run(self, kind: str, x: Tensor, first: Tensor, second: Tensor, head: str | None) -> tuple[Tensor, Tensor]:
        """One batch: logits float64 [n, K], and the scale [n] of the pass alone."""
        network = self._network(kind)
        assert network is not None
        with logit_scale.recording_head(network, head) as watch:
            logits = self._behind(kind, network, x, first, second)
        if tuple(logits.shape) != (len(x), self.classes):
            raise IntegrityError(
                f"the network returns {tuple(logits.shape)} for {len(x)} images.",
                hint=f"It must return logits ({len(x)}, {self.classes}).",
            )
        told = logits.double().cpu()
        if not bool(told.isfinite().all()):
            raise IntegrityError("the network answers NaN or infinity.", hint="Its weights or its preprocessing are broken.")
        return told, watch.scale(logits)

    def _behind(self, kind: str, network: nn.Module, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        occluded = self._masks[first.to(x.device)] | self._masks[second.to(x.device)]
        with exact_arithmetic(), torch.autocast(x.device.type, torch.bfloat16, enabled=kind == "bfloat16"):
            return logits_under_mask(network, x.double() if kind == "float64" else x.float(), occluded, self._fill)

    def _network(self, kind: str) -> nn.Module | None:
        """The copy in float64 is made when it is first needed; a user's code may not compute in float64."""
        if kind not in self._networks:
            grey = torch.full((1, *self._shape), 0.5, dtype=torch.float64, device=self._masks.device)
            try:
                with torch.no_grad():
                    network = precision.double(cast(nn.Module, self._networks["float32"]))
                    kept = logits_under_mask(network, grey, self._masks[:1], self._fill).dtype == torch.float64
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception:  # a user's code can raise anything when it is copied or asked in float64
                kept = False
            self._networks[kind] = network if kept else None
        return self._networks[kind]

    def probe_images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed images and two masks for each."""
        x = logit_scale.probe_images(self._shape)
        first, second = torch.randint(len(self._masks), (2, len(x)), generator=torch.Generator().manual_seed(0))
        return x.to(self._masks.device), first, second

    def _measure(self) -> Calibration:
        """Find the last layer, the smallest scale, and whether float64 is really float64."""
        x, first, second = self.probe_images()
        quick = cast(nn.Module, self._networks["float32"])
        with torch.no_grad(), one_way(x.device):
            self._run("float32", x, first, second, None)  # refuses what are not logits
            head = logit_scale.head_of(quick, lambda: self._behind("float32", quick, x, first, second))
            _, scale = self._each("float32", x, first, second, head)
            least = logit_scale.power_above(float(scale.amax()))
            double = self._network("float64") is not None and self._believed(x[:3], first[:3], second[:3], least)
            return Calibration(head, least, double, self._lasts(x, first, second, scale.clamp(min=least)))

    def _lasts(self, x: Tensor, first: Tensor, second: Tensor, scale: Tensor) -> bool:
        """Whether it is a network of convolutions and batch norm on a CPU, faster with channels last, and errs little so."""
        layers = list(self._owner.modules())
        if x.device.type != "cpu" or not all(any(isinstance(one, kind) for one in layers) for kind in CHANNELS_LAST):
            return False
        best, _ = self._each("float64" if self._network("float64") else "float32", x, first, second, None)
        logits, _ = self._run("float32", x.contiguous(memory_format=torch.channels_last), first, second, None)
        return float(((logits - best).abs().amax(dim=1) / scale).amax()) * ROOM <= TOLERANCE["float32"]

    def _believed(self, x: Tensor, first: Tensor, second: Tensor, least: float) -> bool:
        """Whether float64 carries more than float32, and gives a batch what it gives each image of it."""

        def logits(images: Tensor) -> Tensor:
            return self._each("float64", images, first, second, None)[0]

        together, _ = self._run("float64", x, first, second, None)
        steady = float((together - logits(x)).abs().amax()) * ROOM <= TOLERANCE["float64"] * least
        return steady and logit_scale.responds(logits, x.double())

    def test(self) -> None:
        """Measure what rounding does, on ordinary images and on ones whose logits were driven together.

        A network that fails with channels last is tested, and used, without.

        Raises:
            IntegrityError: the pass of an image depends on its place in the batch, or a precision errs by more than a quarter of
                its allowance.
        """
        try:
            self._test()
        except IntegrityError:
            if not self.calibration.last:
                raise
            self._memory.amend(replace(self.calibration, last=False))
            self._test()

    def _test(self) -> None:
        x, first, second = self.probe_images()
        network = cast(nn.Module, self._networks["float32"])
        near = logit_scale.shrunk(lambda images: self._behind("float32", network, images, first[:3], second[:3]), x[:3])
        if near is not None:
            x, first, second = torch.cat([x, near]), first.repeat(2)[: len(x) + 3], second.repeat(2)[: len(x) + 3]
        best, scale = self.reference_logits(x, first, second)
        some = torch.tensor(sorted({0, 2, len(x) - 1}))  # noise, squares, and if there is one an image of vanishing logit margins
        self._check_steady(x[some.to(x.device)], first[some], second[some], best[some])
        if not self.calibration.double and self._network("float64") is not None:  # good enough to find errors with
            best, _ = self._each("float64", x, first, second, None)
        for kind in self.quick:
            for size in (*SIZES, LARGE[kind]):
                off = self._off(kind, x, first, second, size, best, scale)
                if ROOM * off > TOLERANCE[kind]:
                    raise IntegrityError(
                        f"in {kind} logits are off by {off:.1e} of their scale, and {TOLERANCE[kind] / ROOM:.1e} is allowed for.",
                        hint="A network so sensitive to rounding cannot be certified.",
                    )

    def _off(self, kind: str, x: Tensor, first: Tensor, second: Tensor, size: int, best: Tensor, scale: Tensor) -> float:
        """How far logits in batches of ``size``, as far as batches get so large, are from the best ones: a share of the scale."""
        size = min(size, self._size(x))
        which = torch.arange(max(size, len(x))) % len(x)
        parts = [self.logits(kind, x[some.to(x.device)], first[some], second[some])[0] for some in torch.split(which, size)]
        return float(((torch.cat(parts) - best[which]).abs().amax(dim=1) / scale[which]).amax())

    def _check_steady(self, x: Tensor, first: Tensor, second: Tensor, best: Tensor) -> None:
        """Compare logits ``best`` with those of the same passes asked in other ways, bit by bit."""

        def differ(order: Tensor, images: Tensor = x) -> bool:
            return not torch.equal(self.reference_logits(images[order.to(x.device)], first[order], second[order])[0], best[order])

        every, failed = torch.arange(len(x)), list[str]()
        failed += ["its position in the batch"] if differ(every.flip(0)) else []
        failed += ["the size of the batch"] if any(differ(every[at : at + 1]) for at in every.tolist()) else []
        failed += ["the memory format"] if differ(every, x.contiguous(memory_format=torch.channels_last)) else []
        with precision.ONE_THREAD:
            threads = torch.get_num_threads()
            try:
                for count in (1, 2):
                    torch.set_num_threads(count)
                    failed += [f"the threads ({count})"] if differ(every) else []
            finally:
                torch.set_num_threads(threads)
        if failed:
            raise IntegrityError(
                f"the logits of an image depend on {', '.join(failed)}.",
                hint="Something in the network is random or remembers: it has no answer to certify.",
            )


@contextlib.contextmanager
def one_way(device: torch.device) -> Iterator[None]:
    """Fix what besides the batch decides the order of sums: threads of a CPU, the choice of algorithms of a GPU."""
    with precision.ONE_THREAD:
        threads, cudnn = torch.get_num_threads(), cast(Any, torch.backends.cudnn)
        before = (cudnn.benchmark, cudnn.deterministic)
        try:
            if device.type == "cpu" and threads != 1:
                torch.set_num_threads(1)
            cudnn.benchmark, cudnn.deterministic = False, True
            yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
