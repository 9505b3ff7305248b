"""What the tables leave open without a GPU, measured on one in a given time, beside the published figures of a V100.

    python benchmarks/gpu.py [--minutes 8] [--device auto] [--data-dir DIR] [--images N] [--out FOLDER] [--only TEXT] [--small]

For 10,000 CIFAR-10 images: BagCert with receptive fields 5 to 13 at ten sizes of a patch, column and block smoothing, interval
bounds, double masking. Then passes of a ViT-B/16, and training steps of each recipe of the zoo. Each line gets an equal share of
the time that is left. Where it does not suffice, fewer images are measured, and the seconds are scaled to all, marked ``~``.
Networks without bundled weights have random ones, which cost the same. No network is needed: without CIFAR-10 in the data
directory, the bundled images are repeated. ``--small`` makes all networks tiny, to try the command on a CPU.

Writes ``gpu.json`` and ``gpu.md`` into the folder, after each line, and prints the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli import data
from patchcert_cli import device as devices
from patchcert_cli.catalog import bundled, resolve
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Claim, Defense
from patchcert_cli.errors import DataError, PatchcertError, UsageError
from patchcert_cli.layers.precision import exact_arithmetic
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch
from patchcert_cli.training import recipe_files, steps
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning, State
from patchcert_cli.version import __version__

ALL = 10_000  # images that published seconds are for
FIELDS = {5: 39.0, 7: 40.6, 9: 43.2, 11: 45.9, 13: 48.5}  # receptive fields, and published seconds (Metzen & Yatsura, 2021)
COLUMN, BLOCK = 28.0, 788.0  # as measured there, of column and block smoothing (Levine & Feizi, 2020)
SIZES = [Claim(Patch(side, side)) for side in range(1, 11)]
FIVE = [Claim(Patch(5, 5))]
FLAT: dict[str, Any] = {"network": "mlp", "network_options": {"hidden": [4]}}
LARGEST = 512  # images at a time
WARM = 2  # images of the pass that is not timed
SPARE = 0.9  # share of its time that a line plans with
STEPS = 50  # of training, at most
PASSES = 1024  # of the vision transformer, at most
TINY = " Tiny networks, whose speeds mean nothing."
Work = Callable[[Tensor], object]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: was measured.
        count: how many images, passes or steps.
        seconds: they took.
        unit: ``images``, ``passes`` or ``steps``.
        published: seconds for 10,000 images on a V100.
        note: about the network, or what kept it from being measured.
    """

    what: str
    count: int
    seconds: float
    unit: str = "images"
    published: float | None = None
    note: str = ""

    @property
    def rate(self) -> float:
        """How many a second."""
        return self.count / self.seconds if self.seconds else 0.0

    def text(self) -> str:
        whole = "-"
        if self.unit == "images" and self.count:
            whole = f"{'' if self.count >= ALL else '~'}{ALL / self.rate:,.1f}"
        published = "-" if self.published is None else f"{self.published:.1f}"
        return f"| {self.what} | {self.count:,} {self.unit} | {self.rate:,.3g} | {whole} | {published} | {self.note} |"


@dataclass
class Bench:
    """The run: images, device, and the time that is left.

    Attributes:
        x: float32 [n, C, H, W], on the CPU.
        ends: when the line that is measured now is to end, by ``time.perf_counter()``.
    """

    x: Tensor
    device: torch.device
    small: bool
    ends: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def wait(self) -> None:
        """Until the GPU has computed what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def left(self) -> float:
        """Seconds that the line may still take."""
        return SPARE * (self.ends - time.perf_counter())

    def timed(self, work: Work, x: Tensor) -> float:
        self.wait()
        began = time.perf_counter()
        work(x)
        self.wait()
        return time.perf_counter() - began

    def over(self, work: Work, x: Tensor) -> tuple[int, float]:
        """As many images of ``x`` as there is time for, and their seconds; batches double, and halve where memory ends."""
        at, spent, size, most = 0, 0.0, 1, LARGEST
        self.timed(work, devices.sent(x[:WARM], self.device))
        while at < len(x):
            if at:
                fits = int(self.left * at / spent)
                if fits < 1:
                    break
                size = min(2 * size, most, fits)
            try:
                spent += self.timed(work, devices.sent(x[at : at + size], self.device))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = most = size // 2
                continue
            at = min(at + size, len(x))
        return at, spent


def parameters(module: nn.Module) -> str:
    count = sum(weight.numel() for weight in module.parameters())
    return f"{count / 1e6:.3g}M parameters"


def certified(bench: Bench, what: str, defense: Defense, claims: list[Claim], published: float | None = None) -> Row:
    defense.to(bench.device).trust()
    count, seconds = bench.over(lambda x: defense.certify_claims(x, claims), bench.x)
    return Row(what, count, seconds, published=published, note=parameters(defense))


def fresh(bench: Bench, kind: str, **entries: Any) -> Defense:
    """A defense of CIFAR-10 with random weights, from some entries of a recipe, calibrated to some images."""
    recipe = Recipe.from_dict({"threat": "patch:5x5", "dataset": "cifar10", "defense": kind, **entries})
    defense = Beginning.of(recipe).defense
    defense.calibrate(bench.x[:100])
    return defense.eval()


def fields(bench: Bench, size: int) -> Row:
    widths = {"widths": [4, 4, 4]} if bench.small else {}
    defense = fresh(bench, "bagcert", network_options={"rf": size, **widths})
    return certified(bench, f"receptive field {size}, patches 1 to 10", defense, SIZES, FIELDS[size])


def smoothing(bench: Bench, ablation: str, band: int, published: float) -> Row:
    network: dict[str, Any] = {"widths": [64, 128, 256, 512], "blocks": [2, 2, 2, 2], "strides": [1, 2, 2, 2]}
    if bench.small:
        network = {"widths": [4], "blocks": [1], "strides": [4]}
    options = {"ablation": ablation, "band": band, "view": "full", **({"stride": 16} if bench.small else {})}
    defense = fresh(bench, "smoothing", network_options=network, options=options)
    return certified(bench, f"{ablation} smoothing, band {band}", defense, FIVE, published)


def intervals(bench: Bench) -> Row:
    if bench.small:
        return certified(bench, "interval bounds, tiny", fresh(bench, "ibp", **FLAT), FIVE)
    return certified(bench, "interval bounds, cifar-ibp-p5", resolve.load("cifar-ibp-p5"), FIVE)


def masking(bench: Bench) -> Row:
    if bench.small:
        return certified(bench, "double masking, tiny", fresh(bench, "patchcleanser", **FLAT), FIVE)
    return certified(bench, "double masking, cifar-masked-cnn", resolve.load("cifar-masked-cnn"), FIVE)


def vit(bench: Bench, reduced: bool) -> Row:
    """Passes of a vision transformer at 224 x 224, as proofs make them in float32, or in bfloat16."""
    from torchvision.models import VisionTransformer  # type: ignore[import-untyped]

    shape = (32, 8, 1, 2, 16, 32) if bench.small else (224, 16, 12, 12, 768, 3072)
    network = VisionTransformer(*shape).to(bench.device).eval()
    x = torch.rand(16, 3, shape[0], shape[0], generator=torch.Generator().manual_seed(0))
    x = x.expand(max(min(len(bench.x), PASSES) // 16, 1), *x.shape).flatten(0, 1)

    @torch.no_grad()
    def work(some: Tensor) -> object:
        with exact_arithmetic(), torch.autocast(some.device.type, torch.bfloat16, enabled=reduced):
            return network(some)

    count, seconds = bench.over(work, x)
    kind = "bfloat16" if reduced else "float32"
    return Row(f"ViT-B/16 at 224, {kind}", count, seconds, "passes", note=parameters(network))


def training(bench: Bench, name: str) -> Row:
    """Steps of the last epoch of a recipe, on random images."""
    recipe, what = recipe_files.recipe_of(name), f"training {name}"
    beginning = Beginning.of(recipe)
    size = min(recipe.batch_size, len(bench.x)) if bench.small else recipe.batch_size
    pixels = torch.randint(256, (size, *recipe.images.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(size) % len(recipe.images.classes)
    images = Images(pixels, labels, torch.arange(size), recipe.dataset, "train", "random")
    state, epoch = State.of(recipe, beginning, str(bench.device)), recipe.epochs - 1
    count, spent = 0, 0.0
    steps.epoch(recipe, epoch, state, images, Silent())
    while not count or (count < (2 if bench.small else STEPS) and bench.left > spent / count):
        spent, count = spent + bench.timed(lambda _: steps.epoch(recipe, epoch, state, images, Silent()), bench.x), count + 1
    return Row(what, count, spent, "steps", note=f"{size} images a step, {recipe.precision}")


def lines(small: bool) -> Iterator[tuple[str, Callable[[Bench], Row]]]:
    """What is measured: its name, and what measures it."""
    for size in FIELDS:
        yield f"receptive field {size}", lambda bench, size=size: fields(bench, size)  # type: ignore[misc]
    yield "column smoothing", lambda bench: smoothing(bench, "column", 4, COLUMN)
    yield "block smoothing", lambda bench: smoothing(bench, "block", 12, BLOCK)
    yield "interval bounds", intervals
    yield "double masking", masking
    for kind in ("float32", "bfloat16"):
        yield f"ViT-B/16 {kind}", lambda bench, kind=kind: vit(bench, kind == "bfloat16")  # type: ignore[misc]
    for name in ("mnist-ibp-p2",) if small else trained():
        yield f"training {name}", lambda bench, name=name: training(bench, name)  # type: ignore[misc]


def trained() -> list[str]:
    """Models of the zoo that have a recipe."""
    return [name for name in bundled.names() if (bundled.folder() / name / recipe_files.RECIPE).exists()]


def loaded(given: argparse.Namespace) -> tuple[Tensor, str]:
    """Test images of CIFAR-10, float32 [n, C, H, W], and where they are from."""
    images = data.open_dataset("cifar10", data_dir=given.data_dir)
    try:
        some = images.load("test")
    except DataError:
        if given.data_dir is not None:
            raise
        some = data.open_dataset("cifar10").load("test")
    pixels = some.pixels[torch.arange(given.images) % len(some)]
    return to_float(pixels), f"{some.source}, {len(some):,} different ones"


def machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def table(about: dict[str, Any], rows: list[Row]) -> str:
    head = f"{about['machine']}, torch {about['torch']}, {about['images']:,} CIFAR-10 images ({about['source']});"
    return "\n".join(
        [
            f"{head} {about['spent']:.0f} s of {about['minutes']:g} minutes.{TINY if about['small'] else ''}",
            "",
            "| what | measured | a second | seconds for 10,000 images | published, V100 | |",
            "| --- | --- | --- | --- | --- | --- |",
            *(row.text() for row in rows),
            "",
        ]
    )


def run(given: argparse.Namespace) -> str:
    """All lines within the time; the table."""
    if given.images < 1 or given.minutes <= 0:
        raise UsageError("--images and --minutes must be more than 0.")
    began, (x, source) = time.perf_counter(), loaded(given)
    bench = Bench(x, torch.device(devices.resolve(given.device)), given.small)
    todo = [(name, work) for name, work in lines(given.small) if given.only in name]
    if not todo:
        raise UsageError(f"nothing to measure is called '{given.only}'.", hint=f"Use --only {next(lines(True))[0]}.")
    files.check_folder(given.out, "--out")
    about: dict[str, Any] = {"machine": machine(bench.device), "torch": str(torch.__version__), "patchcert": __version__}
    about |= {"images": len(x), "source": source, "minutes": given.minutes, "small": given.small, "spent": 0.0}
    for number, (name, work) in enumerate(todo):
        left = 60 * given.minutes - (time.perf_counter() - began)
        bench.ends = time.perf_counter() + left / (len(todo) - number)
        try:
            bench.rows.append(work(bench) if left > 0 else Row(name, 0, 0.0, note="no time left"))
        except (torch.OutOfMemoryError, PatchcertError) as problem:
            bench.rows.append(Row(name, 0, 0.0, note=str(problem).splitlines()[0].replace("|", "/")))
        about["spent"] = time.perf_counter() - began
        files.write_json(given.out / "gpu.json", {**about, "rows": [{**asdict(row), "rate": row.rate} for row in bench.rows]})
        files.write_named(given.out / "gpu.md", table(about, bench.rows).encode())
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    return table(about, bench.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it takes about as long, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--images", type=int, default=ALL)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    given = parser.parse_args()
    try:
        print(run(given))
    except PatchcertError as problem:
        parser.exit(problem.code, f"error: {problem}\n")


if __name__ == "__main__":
    main()
