"""Programs in processes of their own that start at once: forks of a process that has imported what they need.

Many tests need a process, because the Hub client reads its environment once, when it is imported. Importing takes most of a
second each time. Here everything but the Hub client is imported once, and each program is run by a fork with its own
environment, folder, and output.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SERVER = """
import json, os, runpy, signal, sys
import huggingface_hub, huggingface_hub.hf_api, huggingface_hub.file_download
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]  # what it imports stays
import typer._adapters
import patchcert_cli.catalog.publish, patchcert_cli.catalog.resolve, patchcert_cli.cli.main
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
os.environ.clear()
os.environ.update(order["environment"])
os.chdir(order["folder"])
for number, path in enumerate((os.devnull, order["out"], order["err"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, number)
    os.close(opened)
signal.alarm(300)
sys.argv = order["argv"]
if order["code"] is None:
    runpy.run_module("patchcert_cli", run_name="__main__", alter_sys=True)
else:
    exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
"""


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks, one for each process of the test run."""
    started = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(started.communicate)
    return started


def run(argv: Sequence[str], environment: Mapping[str, str], code: str | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m patchcert_cli argv[1:]``, or ``python -c code argv[1:]``, in five minutes at most."""
    asked, answered = server().stdin, server().stdout
    assert asked is not None and answered is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        order = {"argv": [*argv], "environment": {**environment}, "code": code}
        asked.write(json.dumps({**order, "folder": str(Path.cwd()), "out": str(out), "err": str(err)}) + "\n")
        asked.flush()
        returned = int(answered.readline())
        return subprocess.CompletedProcess([*argv], returned, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
