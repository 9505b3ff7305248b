"""Interval bound propagation (Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020).

Any feed-forward network of linear, convolution, ReLU and pooling layers, trained so that its interval bounds stay tight under
the threat, and certified by them, or by linear bounds for images that they leave undecided. Proofs:
:mod:`patchcert_cli.certifiers.bounds.intervals` and :mod:`patchcert_cli.certifiers.bounds.linear.linear`; rounding rule:
:mod:`patchcert_cli.certifiers.bounds.rounding`; training: :mod:`patchcert_cli.defenses.ibp.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli.certificate import Arithmetic, Claim, Proof
from patchcert_cli.certifiers.bounds import by_location, pairwise, rounding
from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.certifiers.bounds.folding import fold
from patchcert_cli.certifiers.bounds.linear import refine
from patchcert_cli.certifiers.bounds.windows import partition
from patchcert_cli.defenses._base import NoEntries, build_network, own_entries, size_and_classes
from patchcert_cli.defenses._training import Options, Trainable, TrainingStep
from patchcert_cli.defenses.ibp import losses, regularizers
from patchcert_cli.defenses.ibp.guide import Guide
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.errors import IntegrityError, MachineError, UnsupportedThreat, UsageError
from patchcert_cli.layers.precision import first_largest, plain_sums
from patchcert_cli.layers.supported_layers import layers_of, rebuilt
from patchcert_cli.threats import Patch, PatchPercent, Sparse, Threat


class IntervalDefense(Trainable):
    """A plain classifier certified by interval and linear bounds, against patches and sparse changes."""

    source = "Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020"
    methods = ("best", "interval", "linear")  # linear bounds are added to interval bounds, so best and linear are one
    options = IntervalOptions
    precision: Mapping[str, str] = {
        "bounds": "float32",
        "near_zero": "float64",
        "linear": "float64",
        "prediction": "float64",
    }
    default_network = "mlp"

    def __init__(self, network: nn.Sequential, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        self.network = network

    @classmethod
    def default_recipe(cls, threat: Threat, dataset: str) -> dict[str, Any]:
        if isinstance(threat, Sparse):
            schedule = {"ramp_epochs": 8, "bounded_epochs": 12}
            return {"network_options": {"hidden": [512]}, "epochs": 32, "options": schedule}
        return {"network_options": {"hidden": [255]}}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> IntervalDefense:
        own_entries(NoEntries, deployed)
        return cls(build_network(deployed), **size_and_classes(deployed))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.forward(x).float().softmax(dim=1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Argmax of the logits evaluated in float64, lowest class index first.

        It is the same in every batch and on any device, except for ties closer than float64 resolves, which are never certified.
        """
        self.check_input(x)
        return self._predict(rebuilt(self.network, torch.float64), x)

    def _predict(self, exact: nn.Module, x: Tensor) -> Tensor:
        with plain_sums():
            logits: Tensor = exact(x.double())
        if logits.ndim != 2:
            raise UnsupportedThreat(
                f"logits of shape {tuple(logits.shape)} are not [B, K].", hint="End the network with Flatten."
            )
        if logits.shape[1] != len(self.classes):
            said = f"the network has {logits.shape[1]} outputs, and {len(self.classes)} classes are named."
            raise UsageError(said, hint="Name one class for each output.")
        return first_largest(logits)

    def group(self, claims: Sequence[Claim]) -> int:
        """As many as make the products of matrices large."""
        return 512 if all(claim.threat.kind == "sparse" for claim in claims) else 64

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        exact = rebuilt(self.network, torch.float64)
        with plain_sums():
            prediction = self._predict(exact, x)
            network = exact if x.dtype == torch.float64 else rebuilt(self.network)
            bounds = {
                threat: rounding.prove(network, exact, x, prediction, threat)
                for threat in dict.fromkeys(claim.threat for claim in claims)
            }
            proofs = []
            for claim in claims:
                found, linear = bounds[claim.threat], claim.method != "interval"
                if linear:
                    found = refine.improve(exact, x, prediction, claim.threat, found)
                proof = Proof(
                    answer=prediction,
                    margin=found.margin,
                    location=found.worst,
                    runner_up=found.rival,
                    tolerance=found.tolerance,
                    method="linear" if linear else "interval",
                    arithmetic=Arithmetic.BOUNDED,
                )
                if claim.forced:
                    certified = found.margin > found.tolerance
                    sets = by_location.forced(network, exact, x, prediction, claim.threat, certified)
                    proof = replace(proof, forced=sets)
                proofs.append(self._ranked(proof, network, exact, x, claim) if claim.top > 1 else proof)
        return proofs

    @property
    def locates(self) -> bool:
        return True

    @property
    def ranks(self) -> bool:
        return True

    def _ranked(self, proof: Proof, network: nn.Module, exact: nn.Module, x: Tensor, claim: Claim) -> Proof:
        """The proof, and whether each of the first classes stays among them; an answer that stays the first one does."""
        logits: Tensor = exact(x.double())
        ranking = logits.sort(dim=1, descending=True, stable=True).indices[:, : claim.top]
        found = [by_location.stay(network, exact, x, ranking[:, at], claim.threat, claim.top) for at in range(claim.top)]
        stays = torch.stack([one.margin > one.tolerance for one in found], dim=1)
        already, first = proof.margin > proof.tolerance, found[0]
        stays[:, 0] |= already
        return replace(
            proof,
            margin=torch.where(already, proof.margin, first.margin),
            tolerance=torch.where(already, proof.tolerance, first.tolerance),
            location=torch.where(already, proof.location, first.worst),
            runner_up=torch.where(already, proof.runner_up, first.rival),
            ranking=ranking,
            stays=stays,
        )

    @torch.no_grad()
    def self_test(self) -> None:
        """Compare float32 with float64 on some images: they differ by no more than roundings of float32 can explain.

        Raises:
            UnsupportedThreat: a layer has no rule.
            IntegrityError: logits are not finite.
            MachineError: this machine computes in less than float32 where it should not.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(4, *self.input_shape, generator=generator).to(self.device)
        single, exact = rebuilt(self.network, torch.float32), rebuilt(self.network, torch.float64)
        with plain_sums():
            found, best = single(x).double(), exact(x.double())
            allowed = rounding.forward_error(Split.of(exact, x.shape[1]), x, torch.float32)
        if not bool(found.isfinite().all() & best.isfinite().all()):
            raise IntegrityError("the network answers NaN or infinity.", hint="Its weights or its preprocessing are broken.")
        off = float((found - best).abs().max())  # of one logit; a difference of two may be off by twice as much
        if not off <= allowed:
            raise MachineError(
                f"in float32 logits are off by {off:.1e}, and rounding explains {allowed:.1e}.",
                hint="A setting makes this machine compute in less than float32: undo it, or use another --device.",
            )

    def note(self, threat: Threat) -> str:
        if not isinstance(threat, Patch | PatchPercent):
            return ""
        layer = partition.first_global_layer(self.network, self.input_shape)
        if layer is None:
            return ""
        return (
            f"from {layer} on every location costs a pass over whole maps instead of a window; faster: Flatten and Linear right "
            "after convolutions and pooling."
        )

    def init_weights(self, options: Options) -> nn.Module | None:
        assert isinstance(options, IntervalOptions)
        layers_of(self.network)  # a network without bounds is refused before the first step
        if options.init == "ibp":
            regularizers.initialize(self.network)
        if options.linear:  # refused before the first epoch, not after the natural ones
            pairwise.require_dense(fold(self.network, torch.zeros(1, *self.input_shape))[0], self.input_shape[0])
        return Guide(self.input_shape[0], len(self.classes)) if options.picked == "guided" else None

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        return losses.training_loss(self.network, x, label, step)
