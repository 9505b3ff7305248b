"""``patchcert convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli import show

EXAMPLES = (
    "Examples:  patchcert convert weights.pth --to weights.safetensors"
    "   |   patchcert convert run.ckpt --key ema --to ema.safetensors"
)


def convert(
    weights: Annotated[Path, typer.Argument(metavar="FILE", help="A file of torch.save: a state dict, or one around it.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE.safetensors", help="The file to write.")],
    key: Annotated[str | None, typer.Option("--key", help="Which entry holds the weights, where there are several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Turn a pickle of weights into safetensors, which is all that --weights reads.

    It is read with weights_only=True: tensors and plain values, no code. Wrappers and prefixes are taken off, and said.
    """
    from patchcert_cli.classifiers import convert as library
    from patchcert_cli.storage import files

    library.check(to, force=force)
    found = library.read(weights, key)
    library.write(found, to, force=force)
    show.say("\n".join(found.notes))
    numbers = sum(value.numel() for value in found.tensors.values())
    typer.echo(f"{to}: {len(found.tensors)} tensors, {numbers:,} numbers, sha256 {files.sha256(to)}")
