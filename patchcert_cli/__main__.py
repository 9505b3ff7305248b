"""``python -m patchcert_cli``."""

from patchcert_cli.cli.main import run

run()
