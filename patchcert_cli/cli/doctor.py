"""``patchcert doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import DataDirOption, OutputOptions

EXAMPLES = "Examples:  patchcert doctor   |   patchcert doctor --offline --json -"


@grouped
def doctor(
    *,
    data_dir: DataDirOption = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not contact the Hub.")] = False,
    output: OutputOptions,
) -> None:
    """Report versions, devices, the Hub, cache, disk, zoo and data of this machine. The first problem decides the exit code."""
    from patchcert_cli.reporting import doctor

    findings = doctor.examine(data_dir=data_dir, offline=offline)
    problems = [finding.problem for finding in findings if finding.problem]
    value = {
        "facts": {finding.name: finding.value for finding in findings},
        "problems": [{"code": problem.code, "problem": str(problem)} for problem in problems],
    }
    show.result([(finding.name, finding.value) for finding in findings], value, output.json)
    if problems:
        raise problems[0]
