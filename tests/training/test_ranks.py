"""Training in several processes: the gradient of the whole batch, a run that resumes to the bit, and one set of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchcert_cli.errors import UsageError
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.storage import files
from patchcert_cli.training import ranks, steps
from patchcert_cli.training.run import loop
from tests.training.test_loop import TINY, digest, images

RANKS = """
import copy, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from dataclasses import replace
from patchcert_cli.data.images import to_float
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.errors import Interrupted
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Silent
from patchcert_cli.training import loop, ranks
from patchcert_cli.training.state import Beginning
from tests.training.test_loop import TINY, images

folder, rank, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=120))
if rank == 0:
    print(store.port, flush=True)
workers = Workers(rank, 2, store)

class Stop(Silent):
    def note(self, text):
        if text.startswith("epoch 1 of"):
            raise KeyboardInterrupt

# The gradient of 2 ranks, and of one process; 7 images, so that the ranks have 4 and 3.
recipe = TINY
defense = Beginning.of(recipe).defense
some = images(7)
x, label = to_float(some.read()), some.labels
whole = copy.deepcopy(defense)

def step(images):
    return TrainingStep(recipe.threat, recipe.options, 1.5, recipe.epochs, torch.Generator().manual_seed(0))

whole.training_loss(x, label, step(7)).backward()
with ranks.joined(workers.scope(), "cpu", 7) as group:
    mine = group.share(torch.arange(7))
    loss = group.loss(defense, torch.nn.Module())  # which is to outlive the gradient
    (loss(x[mine], label[mine], step(len(mine))) * group.weight(len(mine), 7)).backward()
    worst = max(
        float((a.grad - b.grad).abs().max() / b.grad.abs().max())
        for a, b in zip(defense.parameters(), whole.parameters(), strict=True)
    )
    assert worst < 1e-6, worst
    assert group.total(1.0, rank) == [2.0, 1.0] and group.first_of(5.0 + rank) == 5.0

# A whole run, and one that was stopped after its first epoch; both ranks have the same weights in the end.
found = [loop.train(recipe, images(), folder / "whole", workers=workers.scope())]
try:
    loop.train(recipe, images(), folder / "cut", workers=workers.scope(), progress=Stop())
except Interrupted:
    pass
found.append(loop.train(recipe, images(), folder / "cut", workers=workers.scope()))
assert [one.epochs_run for one in found] == [3, 2] and found[0].validation == found[1].validation
torch.save([list(one.defense.parameters()) for one in found], folder / f"{rank}.pt")
workers.add("done", 1)
while not rank and workers.add("done", 0) < 2:
    pass
"""


def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: list[subprocess.Popen[str]] = []
    try:
        for rank in range(2):
            port = found[0].stdout.readline().strip() if found and found[0].stdout else "0"
            program = [sys.executable, "-c", RANKS, str(tmp_path), str(rank), port]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            found.append(subprocess.Popen(program, cwd=Path(__file__).parents[2], env=environment, text=True, **pipes))
        outputs = [process.communicate(timeout=240) for process in reversed(found)]
        assert [process.returncode for process in found] == [0, 0], outputs
    finally:  # no rank outlives the test
        for process in found:
            process.kill()
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for mine, other in zip(*both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "whole" / files.METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and rows[-1]["validation_images"] == TINY.validation
    alone = loop.train(TINY, images(), tmp_path / "alone")
    _, held = images().hold_out(TINY.validation, TINY.seed)
    assert alone.validation == steps.monitor(alone.defense, held, TINY)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "alone" / files.METRICS).read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(losses[0], rel=0.02)  # other shifts and mirrors are drawn, nothing else differs


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    with (
        pytest.raises(UsageError, match="4 processes are more than the 3 images of a batch"),
        ranks.joined(
            Workers(0, 4, object()),
            "cpu",
            3,  # type: ignore[arg-type]
        ),
    ):
        pass
