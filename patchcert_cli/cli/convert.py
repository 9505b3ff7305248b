"""``patchcert convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import OutputOptions

OLD = {"--to": "--out"}  # spelling of earlier versions
EXAMPLES = (
    "Examples:  patchcert convert weights.pth --out weights.safetensors"
    "   |   patchcert convert run.ckpt --key ema --out ema.safetensors"
)


@grouped
def convert(
    weights: Annotated[Path, typer.Argument(metavar="FILE", help="A file of torch.save: a state dict, or one around it.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="The file to write.")],
    key: Annotated[str | None, typer.Option("--key", help="Which entry holds the weights, where there are several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
    output: OutputOptions,
) -> None:
    """Turn a pickle of weights into safetensors, the only format that --weights reads.

    It is read with weights_only=True: tensors and plain values, no code. Wrappers and prefixes are removed and reported.
    """
    from patchcert_cli.classifiers import convert as library
    from patchcert_cli.storage import files

    library.check(out, force=force)
    found = library.read(weights, key)
    library.write(found, out, force=force)
    show.say("\n".join(found.notes))
    numbers = sum(value.numel() for value in found.tensors.values())
    digest = files.sha256(out)
    line = f"{out}: {len(found.tensors)} tensors, {numbers:,} numbers, sha256 {digest}"
    value = {"out": str(out), "tensors": len(found.tensors), "numbers": numbers, "sha256": digest, "notes": list(found.notes)}
    show.printed(lambda: typer.echo(line), value, output.json)
