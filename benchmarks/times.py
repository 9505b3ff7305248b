"""How long certifying the rows of a paper's table takes, all in one run on one thread: ``patchcert_cli/papers/times.json``.

    python benchmarks/times.py [--images N] [--runs DIR] [--data-dir DIR] [--machine TEXT] [--out FILE]

The rows are those of the table of receptive fields. A row whose command trains a model is timed with the weights that
``benchmarks/rows.py`` left in ``--runs``, and left out without them. Times are of the processor; loading and self-tests are not
counted.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch

from patchcert_cli import data, papers
from patchcert_cli.catalog import resolve
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.papers import times, trained
from patchcert_cli.papers.paper import Row
from patchcert_cli.storage import files

PAPER, TABLE = "metzen-2021", "receptive-fields"
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/rows"))
    parser.add_argument("--data-dir", type=Path)
    described = f"{platform.machine()}, one thread, torch {torch.__version__}"
    parser.add_argument("--machine", default=described, help="what it is, as text")
    parser.add_argument("--out", type=Path, default=times.FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = data.open_dataset("cifar10", data_dir=options.data_dir).load("test").limit(options.images, 0)
    rows = []
    for row in papers.load(PAPER).table(TABLE).rows:
        place = row.model or str(options.runs / trained.folder_name(row.command))
        if row.model or (Path(place) / files.CARD).is_file():
            rows.append(timed(row, place, images))
            print(f"{row.name}: {rows[-1].per_split:.0f} s of one core for {times.IMAGES} images", flush=True)
    times.write(options.machine, rows, options.out)


def timed(row: Row, place: str, images: Images) -> times.TimedRow:
    """One row, all images once after a first batch that is not counted."""
    defense, x, spent = resolve.load(place), to_float(images.pixels), 0.0
    defense.certify(x[:BATCH], row.threat)
    for batch in torch.split(x, BATCH):
        began = time.process_time()
        defense.certify(batch, row.threat)
        spent += time.process_time() - began
    return times.TimedRow(row.model or row.command, row.threat, len(x), round(spent, 3), resolve.resolve(place).sha256)


if __name__ == "__main__":
    main()
