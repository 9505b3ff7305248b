"""Accuracy of defenses without a certificate under attack, beside the certified accuracy of the zoo on the same images.

    python benchmarks/empirical.py [--data mnist,cifar10] [--limit N] [--seed S] [--data-dir DIR] [--out FOLDER]

The defenses are put around the plain networks inside ``mnist-masked-cnn`` and ``cifar-masked-cnn``. Each image that is answered
right meets, one after the other until one flips it: what gradient ascent finds against the undefended network (the blind attack),
random search (``patch_rs``), and gradient ascent through the defense (``patch_pgd``). It writes a Markdown table, and
``records.json`` with what happened to each image, of which ``docs/empirical.json`` is a copy; a stopped run goes on where it
stopped. Accuracy under attack proves nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchcert_cli import data
from patchcert_cli.attacks import Attack, Target
from patchcert_cli.attacks.patch_pgd import PatchPGD
from patchcert_cli.attacks.patch_rs import PatchRS
from patchcert_cli.cards import weights_sha256
from patchcert_cli.cards.published import PublishedRecords
from patchcert_cli.catalog import bundled
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import PatchcertError, UsageError
from patchcert_cli.evaluation.models import DefenseRequest, find
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Threat

PATCH = Patch(5, 5)
DEFENSES = ("undefended", "lgs", "watermark")
NETWORKS = {"mnist": "mnist-masked-cnn", "cifar10": "cifar-masked-cnn"}
CERTIFIED = {
    "mnist": ("mnist-ibp-p5", "mnist-masked-cnn"),
    "cifar10": ("cifar-ibp-p5", "cifar-bagcert-rf7", "cifar-masked-cnn"),
}
BATCH = 5  # images between two points where a stopped run goes on
HEADER = (
    "| data | model | clean | under the blind attack | under all attacks | certified |",
    "| --- | --- | --- | --- | --- | --- |",
)
Outcomes = dict[int, dict[str, Any]]  # by image and defense: whether the answer is right, and which attack changed it


@dataclass(frozen=True, kw_only=True)
class Ready(Attack):
    """Images that were found before, against the undefended network: what ``transfer`` finds, computed once for all defenses."""

    found: Mapping[int, Tensor]
    kinds: ClassVar[tuple[str, ...]] = ("patch",)

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        return torch.stack([self.found[at] for at in index.tolist()])


def opened(kind: str, name: str, images: Images) -> Defense:
    """A defense around the plain network inside a model of the zoo."""
    channels, height, width = images.pixels.shape[1:]
    shape = (channels, height, width)
    return find(name, None, DefenseRequest(defense=kind), "cpu").evaluated(shape, [PATCH], "cpu").defense


def outcomes(name: str, images: Images, given: argparse.Namespace) -> Outcomes:
    """All attacks on all defenses, image by image; only images that are answered right are attacked."""
    made = {kind: opened(kind, NETWORKS[name], images) for kind in DEFENSES}
    path = given.out / f"{name}-{given.seed}-{given.budget}-{given.steps}-{given.locations}.jsonl"
    files.check_folder(given.out, "--out")
    given.out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    known: Outcomes = {row.pop("index"): row for row in map(json.loads, lines)}
    found = {index: known[index] for index in images.index.tolist() if index in known}  # also those of a smaller --limit
    open_ = torch.tensor([at for at, index in enumerate(images.index.tolist()) if index not in found], dtype=torch.int64)
    for some in torch.split(open_, BATCH) if len(open_) else ():
        part = images.take(some)
        rows = attacked(made, part, given)
        with path.open("a") as stream:
            for index, row in rows.items():
                stream.write(json.dumps({"index": index, **row}) + "\n")
        found |= rows
        print(f"{name}: {len(found)} of {len(images)}", file=sys.stderr, flush=True)
    return found


def attacked(made: dict[str, Defense], part: Images, given: argparse.Namespace) -> Outcomes:
    """The outcome of each image of a batch, for each defense."""
    x = to_float(part.read())
    found: Outcomes = {index: {} for index in part.index.tolist()}
    pgd = PatchPGD(seed=given.seed, steps=given.steps, locations=given.locations)
    random = PatchRS(seed=given.seed, budget=given.budget)
    blind = pgd(made["undefended"], x, PATCH, index=part.index).adversarial
    ready = Ready(found=dict(zip(part.index.tolist(), blind, strict=True)))
    for kind, defense in made.items():
        right = (defense.predict(x) == part.labels).nonzero()[:, 0]
        turns: dict[str, Attack] = {"transfer": ready, "patch_rs": random, "patch_pgd": pgd}
        if kind == "undefended":  # of which the first is this
            turns = {"patch_pgd": ready, "patch_rs": random}
        left = right
        for name, attack in turns.items():
            if len(left):
                flipped = attack(defense, x[left], PATCH, index=part.index[left]).success
                for index in part.index[left[flipped]].tolist():
                    found[index][kind] = {"right": True, "by": name}
                left = left[~flipped]
        for at, index in enumerate(part.index.tolist()):
            found[index].setdefault(kind, {"right": at in right, "by": None})
    return found


def share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f}"


def empirical_row(kind: str, name: str, found: Outcomes) -> str:
    right = [row[kind]["by"] for row in found.values() if row[kind]["right"]]
    withstood = (right.count(None), len(right) - right.count("transfer"))
    under = share(withstood[1], len(found)) if kind != "undefended" else "-"
    about = f"`{kind}` around the network of `{NETWORKS[name]}`"
    return f"| {name} | {about} | {share(len(right), len(found))} | {under} | {share(withstood[0], len(found))} | none |"


def certified_row(name: str, images: Images) -> str:
    published = PublishedRecords.read(bundled.folder() / name / files.PUBLISHED_RECORDS)
    at, rows = published.position(PATCH), [published.rows[index] for index in images.index.tolist()]
    right = [row for row in rows if row.prediction == row.label]
    held = sum(row.certified[at] for row in right)
    return f"| {images.name} | `{name}` | {share(len(right), len(rows))} | - | - | **{share(held, len(rows))}** |"


def run(given: argparse.Namespace) -> list[str]:
    names = given.data.split(",")
    if strange := [name for name in names if name not in NETWORKS]:
        raise UsageError(f"no network is named for '{strange[0]}'.", hint=f"Use --data with {', '.join(NETWORKS)}.")
    for flag in ("limit", "budget", "steps", "locations"):
        if getattr(given, flag) < 1:
            raise UsageError(f"--{flag} {getattr(given, flag)} must be 1 or more.")
    table, counts = list(HEADER), []
    records: dict[str, Any] = {"setting": {name: getattr(given, name) for name in ("seed", "budget", "steps", "locations")}}
    for name in names:
        split = data.open_dataset(name, data_dir=given.data_dir).load("test")
        images = split.limit(given.limit, given.seed)
        counts.append(f"{name}: {len(images)} of {len(split)} test images")
        found = outcomes(name, images, given)
        sha256 = weights_sha256(bundled.card(NETWORKS[name]).files)
        lines = [{"index": index, **row} for index, row in sorted(found.items())]
        records[name] = {"network": NETWORKS[name], "model_sha256": sha256, "images": lines}
        table += [empirical_row(kind, name, found) for kind in DEFENSES]
        table += [certified_row(model, images) for model in CERTIFIED[name]]
    files.write_named(given.out / "records.json", (json.dumps(records) + "\n").encode())
    about = f"{PATCH}, {'; '.join(counts)}; seed {given.seed}, budget {given.budget}, steps {given.steps},"
    return [f"{about} locations {given.locations}.", "", *table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist,cifar10")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=500, help="candidates of random search for an image")
    parser.add_argument("--steps", type=int, default=20, help="of a climb of gradient ascent")
    parser.add_argument("--locations", type=int, default=5, help="that gradient ascent climbs in, of all that it looks at")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/empirical"))
    given = parser.parse_args()
    try:
        text = "\n".join(run(given)) + "\n"
    except PatchcertError as problem:
        parser.exit(problem.code, f"error: {problem}\n")
    files.write_named(given.out / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
