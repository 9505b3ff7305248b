"""The contract: a defense is one network, one deployed answer, and proofs about that answer.

The smallest defense writes ``predict`` and ``_certify``. More is optional: :class:`patchcert_cli.defenses.Trainable` for
``patchcert train``, :class:`patchcert_cli.defenses.Attackable` for better attacks, :class:`MarginMaps` for ``--map``, and
:class:`WrapsClassifier` for defenses around own classifiers.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn

from patchcert_cli import models, schema
from patchcert_cli.certificate import Certificate, Claim, Proof
from patchcert_cli.errors import DataError, IntegrityError, PatchcertError, UnsupportedThreat, UsageError
from patchcert_cli.threats import ALERT, Guarantee, Threat, parse_threat


class Defense(nn.Module, ABC):
    """A classifier whose answer can be certified.

    ``predict`` and ``certify`` are about the same function: the certificate's ``prediction`` is what ``predict`` returns, and a
    certified image keeps that answer under every change that the threat allows.

    Authors write :meth:`predict` and :meth:`_certify`, users call :meth:`certify` or :meth:`certify_claims`.

    Attributes:
        source: the paper it comes from.
        methods: names of its proofs, the best one first.
        guarantee: what they prove; a defense of ``detection`` may answer :data:`patchcert_cli.certificate.ALERT`, one of ``none``
            has no proofs.
        precision: what its answers and proofs are computed in, for manifests.
    """

    source: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ("proof",)
    guarantee: Guarantee = Guarantee.RECOVERY
    precision: Mapping[str, str] = {}

    def __init__(self, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__()
        self._tested = False
        self.input_shape = input_shape
        self.classes = classes

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Defense:
        """Build the defense, with fresh weights, from the section ``deployed`` of its ``config.json``.

        All defenses have the entries ``defense``, ``input_shape``, ``classes`` and ``network``.
        """
        raise UsageError(f"{cls.__name__} cannot be built from a configuration.", hint="Make it in Python.")

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> int64 [B], the deployed answer; it depends on neither threat nor label.

        Raises:
            DataError: the images do not fit: call :meth:`check_input`.
        """

    @abstractmethod
    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> Sequence[Proof]:
        """One proof for each claim, in order, about ``predict(x)``.

        Images and claims are checked before, every claim names its method, there is at least one claim, and no gradient is
        recorded.

        Raises:
            UnsupportedThreat: the defense has no proof for a threat model.
        """

    @final
    @torch.no_grad()
    def certify_claims(self, x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        """Prove, image by image and claim by claim, that no change allowed by the threat alters ``predict(x)``.

        Raises:
            DataError: the images do not fit the model.
            UnsupportedThreat: the defense has no proof for a threat model, or none at all.
            UsageError: a threat does not fit the image, or the defense has no proof of a claim's method.
        """
        self.check_proves()
        self.check_input(x)
        claims = list(claims) if isinstance(claims, Iterable) else [claims]
        if strange := [claim for claim in claims if not isinstance(claim, Claim)]:
            raise UsageError(f"{strange[0]!r} is not a claim.", hint="Give Claim(Patch(5, 5)), or call certify with one threat.")
        named = [replace(claim, method=self.check_method(claim.method)) for claim in claims]
        channels, height, width = self.input_shape
        for claim in named:
            claim.threat.check(height, width, channels)
            self.check_wishes(claim)
        if not named:
            return []
        self.test_once()
        proofs = self._certify(x, named)
        for proof in proofs:
            if proof.margin.dtype != torch.float64 or proof.margin.shape != proof.answer.shape or len(proof.answer) != len(x):
                raise PatchcertError(
                    f"{type(self).__name__} returned a proof of shape {tuple(proof.margin.shape)}, {proof.margin.dtype}.",
                    hint=f"This is a bug of the defense: margins are float64 [{len(x)}].",
                )
        for proof, claim in zip(proofs, named, strict=True):
            self._check_more(proof, claim)
        return [
            Certificate.of(proof, claim, self.guarantee, size=(height, width), device=x.device)
            for proof, claim in zip(proofs, named, strict=True)
        ]

    def _check_more(self, proof: Proof, claim: Claim) -> None:
        """Raise unless a proof has the sets and the ranking that its claim asks for, and its answer in each of them."""
        batch, classes = len(proof.answer), len(self.classes)
        problems = []
        readable = proof.answer.device.type == "cpu"  # elsewhere, reading them would wait for the device
        if batch and readable and max(int(proof.answer.max()), int(proof.runner_up.max())) >= classes:
            problems.append(f"a class that is not among {classes}")
        if claim.forced:
            shape, held = (batch, claim.threat.count(*self.input_shape[1:]), classes), proof.forced
            if held is None or held.dtype != torch.bool or held.shape != shape:
                problems.append(f"sets of answers that are not bool {shape}")
            elif not bool(held[torch.arange(batch), :, proof.answer.to(held.device)].all()):
                problems.append("sets of answers without the answer itself")
        if claim.top > 1:
            wanted, ranking, stays = (batch, claim.top), proof.ranking, proof.stays
            if ranking is None or stays is None or ranking.shape != wanted or stays.shape != wanted:
                problems.append(f"no ranking and stays of shape {wanted}")
            elif not bool((ranking[:, 0] == proof.answer).all() & (stays[:, 0] == (proof.margin > proof.tolerance)).all()):
                problems.append("a ranking that does not begin with the answer")
        if problems:
            raise PatchcertError(f"{type(self).__name__} returned {problems[0]}.", hint="This is a bug of the defense.")

    def certify(
        self, x: Tensor, threat: Threat | str, method: str | None = None, *, forced: bool = False, top: int = 1
    ) -> Certificate:
        """One claim; see :meth:`certify_claims`. A threat model may be given as its text, such as ``patch:5x5``.

        Args:
            x: [B, C, H, W] in [0, 1].
            threat: the threat model.
            method: the name of a proof; None for the best one.
            forced: also return what can be forced at each location, :attr:`Certificate.forced`.
            top: the answer is to stay among this many first classes.
        """
        parsed = parse_threat(threat) if isinstance(threat, str) else threat
        if not isinstance(parsed, Threat):
            raise UsageError(
                f"{type(parsed).__name__} is not a threat model.", hint="Give Patch(5, 5), or its text: 'patch:5x5'."
            )
        return self.certify_claims(x, [Claim(parsed, method, forced, top)])[0]

    @property
    def locates(self) -> bool:
        """Whether its proofs can say what an attacker can force at each location (:attr:`Certificate.forced`)."""
        return False

    @property
    def ranks(self) -> bool:
        """Whether its proofs can say which classes stay among the first few (:attr:`Certificate.stays`)."""
        return False

    def check_wishes(self, claim: Claim) -> None:
        """Raise :class:`UsageError` if a claim asks for sets by location or for a ranking that this defense has no proof of."""
        classes = len(self.classes)
        if claim.top != 1 and not 1 <= claim.top < classes:
            raise UsageError(
                f"the first {claim.top} of {classes} classes make no claim.", hint=f"Allowed for top: 1 to {classes - 1}."
            )
        if claim.top > 1 and not self.ranks:
            raise UsageError(
                f"{type(self).__name__} has no proof that an answer stays among the first {claim.top}.",
                hint="Leave top out; sums of votes and interval bounds have such a proof.",
            )
        if claim.forced and not self.locates:
            raise UsageError(
                f"{type(self).__name__} cannot say what can be forced at each location.",
                hint="Votes, interval bounds, double masking and robust masking can.",
            )
        if claim.forced and claim.threat.budget != 1:
            raise UsageError(
                f"with {claim.threat} an attacker has {claim.threat.budget} locations, so a set for each of them means nothing.",
                hint="Ask for sets by location under one patch, or under sparse:1.",
            )

    def check_method(self, method: str | None) -> str:
        """The method, or the best one for None, empty if there are no proofs.

        Raises:
            UsageError: the defense has no proof of this name.
        """
        if method is not None and method not in self.methods:
            raise UsageError(f"this defense has no proof '{method}'.", hint=f"Allowed: {', '.join(self.methods)}.")
        return method or next(iter(self.methods), "")

    @classmethod
    def check_proves(cls) -> None:
        """Raise :class:`UnsupportedThreat` if the defense has no certificates, whatever the threat model."""
        if not cls.guarantee.proves:
            raise UnsupportedThreat(
                f"{cls.__name__} has no certificate: nothing is proven about its answers.",
                hint="Attack it, which measures what these attacks leave: patchcert attack.",
            )

    def plain(self, x: Tensor) -> Tensor | None:
        """The labels of the classifier inside the defense for whole images [B, C, H, W], int64 [B]; None if there is none."""
        return None

    def undefended(self) -> Defense | None:
        """The classifier inside the defense, as it answers without it; None if there is none."""
        return None

    def class_name(self, answer: int) -> str:
        """What an answer is called: the name of its class, or ``alarm``."""
        return "alarm" if answer == ALERT else self.classes[answer]

    def note(self, threat: Threat) -> str:
        """What a user should know about this threat model besides the numbers, in one line; may be empty."""
        return ""

    def settings(self) -> dict[str, Any]:
        """What else decides its answers and can be chosen when it is evaluated, as plain values for the manifest."""
        return {}

    def group(self, claims: Sequence[Claim]) -> int:
        """How many images evaluation certifies in one call, where the last bits of margins depend on that; 0 if they do not.

        Evaluations are the same bytes in any number of processes because of this. Verdicts never depend on it.
        """
        return 0

    def passes_per_image(self) -> tuple[int, int] | None:
        """The fewest and the most passes of the network that a certificate takes, if the defense counts them."""
        return None

    def self_test(self) -> None:
        """Check what the proof assumes of the network, when a model is loaded.

        Raises:
            IntegrityError: the network is not what the proof takes it for.
        """

    def test_once(self) -> None:
        """Run :meth:`self_test` at the first use of a defense that was made in Python and never loaded; afterwards do nothing."""
        if not self._tested:
            self.self_test()
            self._tested = True

    def trust(self) -> None:
        """Leave :meth:`self_test` out from now on: for networks whose cost is measured and whose answers mean nothing."""
        self._tested = True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers()), torch.zeros(())).device

    def check_input(self, x: Tensor) -> None:
        """Raise :class:`DataError` unless ``x`` is [B, C, H, W] of this model's size with pixels in [0, 1]."""
        if not isinstance(x, Tensor):
            said = f"images are {type(x).__module__.partition('.')[0]}.{type(x).__name__}, not a tensor."
            raise DataError(said, hint="Give torch.as_tensor(images), float [B, C, H, W] in [0, 1].")
        if x.ndim == 3 and tuple(x.shape) == self.input_shape:
            raise DataError(f"one image of shape {tuple(x.shape)} is not a batch.", hint="Give x[None], which is a batch of one.")
        if x.dtype not in (torch.float32, torch.float64):
            raise DataError(f"images of type {x.dtype}.", hint="Give float32 in [0, 1]: divide 8-bit images by 255.")
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise DataError(f"images of shape {tuple(x.shape[1:])} do not fit this model.", hint=f"It takes {self.input_shape}.")
        if len(x) and not bool(((x >= 0) & (x <= 1)).all()):  # also refuses NaN
            if bool(x.isnan().any()):
                said = "pixels outside [0, 1]: some are not a number."
                raise DataError(said, hint="Look for a division by 0 where the images are made.")
            raise DataError("pixels outside [0, 1].", hint="Divide 8-bit images by 255; normalization lives inside the model.")


class MarginMaps(ABC):
    """A defense whose margins are known at every location of a patch.

    Attributes:
        unit: what they count.
    """

    unit: str = "votes"

    @abstractmethod
    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        """The margin at every location of a patch, float64 [B, P, Q]: positive where the patch cannot do harm.

        Raises:
            UsageError: the threat is not a patch.
        """


class WrapsClassifier(ABC):
    """A defense that can be put around any classifier, such as ``timm:NAME``.

    Attributes:
        masked: whether it evaluates the classifier under masks, which the threat model decides; else it has settings instead.
    """

    masked: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def wrap(cls, network: nn.Module, *, input_shape: tuple[int, int, int], classes: tuple[str, ...], **given: Any) -> Defense:
        """The defense around ``network``: images [B, C, H, W] in [0, 1] -> logits [B, K].

        A masked one is given ``masks`` (:class:`patchcert_cli.MaskSpec`), ``fill`` and, if it is wished, ``prediction_dtype``,
        see :class:`patchcert_cli.defenses.MaskedClassifier`; any other one its settings by name.
        """

    def fingerprint(self) -> dict[str, Any] | None:
        """Answers that show whether the network is the same; None where its weights do."""
        return None


COMMON_ENTRIES = ("defense", "input_shape", "classes", "network")  # of the section ``deployed`` of every defense
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class NoEntries:
    """The own entries of a defense that has none."""


def own_entries(kind: type[Kind], deployed: Mapping[str, Any]) -> Kind:
    """The entries of ``deployed`` that not all defenses have, as dataclass ``kind``.

    Raises:
        IntegrityError: lists everything that is wrong, unknown entries included.
    """
    try:
        return schema.read(kind, {name: value for name, value in deployed.items() if name not in COMMON_ENTRIES})
    except schema.Invalid as problem:
        raise IntegrityError(f"{deployed['defense']} cannot be built: {problem}.", hint="Correct its config.json.") from problem


def size_and_classes(deployed: Mapping[str, Any]) -> dict[str, Any]:
    """``input_shape`` and ``classes``, as the constructors of defenses take them."""
    return {"input_shape": tuple(deployed["input_shape"]), "classes": tuple(deployed["classes"])}


def build_network(deployed: Mapping[str, Any], input_shape: Sequence[int] | None = None) -> nn.Sequential:
    """The network with fresh weights; ``input_shape`` is that of its images, if they are not those of the defense."""
    network, shape = deployed["network"], tuple(input_shape or deployed["input_shape"])
    return models.build(network["name"], {**network["options"], "input_shape": shape, "classes": len(deployed["classes"])})
