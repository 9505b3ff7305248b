"""The command line: parse, call one library function, print. An error is a line, a hint, and a documented exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from patchcert_cli.cli import attack, certify, convert, doctor, report, reproduce, show, streams, train, zoo
from patchcert_cli.cli.groups import command, interruptible
from patchcert_cli.cli.interrupts import interrupts
from patchcert_cli.errors import PatchcertError, UsageError, on_all_ranks
from patchcert_cli.parallel import workers
from patchcert_cli.version import __version__

HELP = """Train, certify, attack and share certified defenses against adversarial patches and sparse attacks.

Results go to stdout, everything else to stderr. Exit codes: 0 ok, 1 bug, 2 usage, 3 unknown name, 4 Hub out of reach,
5 integrity, 6 data, 7 machine, 8 claim broken, 130 interrupted, 141 the reader of stdout has left.
"""

WRONGLY_TYPED: type[typer.BadParameter] = typer.BadParameter.__mro__[1]  # UsageError, of the click that typer has

app = typer.Typer(
    cls=interruptible(),
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", cls=command(), epilog=train.EXAMPLES)(train.train)
app.command("certify", cls=command(certify.OLD), epilog=certify.EXAMPLES)(certify.certify)
app.command("attack", cls=command(attack.OLD), epilog=attack.EXAMPLES)(attack.attack)
app.command("convert", cls=command(convert.OLD), epilog=convert.EXAMPLES)(convert.convert)
app.command("doctor", cls=command(), epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("reproduce", cls=command(), epilog=reproduce.EXAMPLES)(reproduce.reproduce)
app.add_typer(zoo.app, name="zoo")
app.add_typer(report.app, name="report")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"patchcert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of patchcert itself."""


def run() -> None:
    """Entry point of the ``patchcert`` command."""
    with streams.guarded(), interrupts():
        try:
            streams.require_stdout()
            _as_rank()
            code = app(prog_name="patchcert", standalone_mode=False)  # also for python -m patchcert_cli
            sys.exit(code if isinstance(code, int) else 0)
        except WRONGLY_TYPED as problem:
            _fail(_wrongly_typed(problem))
        except PatchcertError as problem:
            if os.environ.get("PATCHCERT_DEBUG"):
                raise
            _fail(problem)
        except OSError as problem:
            if problem.errno != errno.ENAMETOOLONG:  # of what is read, wherever it is looked for
                raise
            _fail(UsageError(f"the name of a file is too long: '{str(problem.filename)[:60]}...'.", hint="Check what was typed."))


def _as_rank() -> None:
    """Of a process that torchrun has started: the first rank prints for all, and a job that ends early ends without a word."""
    if workers.inside():
        show.set_silent(os.environ["RANK"] != "0")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        workers.end_with_launcher()


def _wrongly_typed(problem: typer.BadParameter) -> PatchcertError:
    """What typer found wrong in the command line, as an error like any other."""
    if type(problem).__name__ == "NoArgsIsHelpError":
        problem.show()
        sys.exit(problem.exit_code)
    named = [word for word in sys.argv[1:2] if not word.startswith("-")]  # of an option without its value nothing else is known
    typed = " ".join(["patchcert", *named]) if problem.ctx is None else problem.ctx.command_path
    message = " ".join(problem.format_message().split())
    end = "" if message.endswith((".", "?")) else "."
    return on_all_ranks(UsageError(f"{message[:1].lower()}{message[1:]}{end}", hint=f"Type: {typed} -h"))


def _fail(problem: PatchcertError) -> NoReturn:
    if not (problem.of_first and os.environ.get("RANK", "0") != "0"):  # the first rank says it
        show.error(problem)
    sys.exit(problem.code)


if __name__ == "__main__":
    run()
