"""Models and their claims, to and from the Hub; only :mod:`client` knows the Hub's own client."""

from patchcert_cli.hub.client import Pushed, fetch_unlisted, reachable, remove
from patchcert_cli.hub.client import facts as client_facts
from patchcert_cli.hub.find import ADDRESS, Resolved, facts, load, pull, resolve
from patchcert_cli.hub.publish import Release, prepare, publish
from patchcert_cli.hub.shelve import add

__all__ = [
    "ADDRESS",
    "Pushed",
    "Release",
    "Resolved",
    "add",
    "client_facts",
    "facts",
    "fetch_unlisted",
    "load",
    "prepare",
    "publish",
    "pull",
    "reachable",
    "remove",
    "resolve",
]
