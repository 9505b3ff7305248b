"""A headless Chromium, driven over the WebDriver protocol with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for one command
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment says of proxies


def missing() -> str:
    """Why there is no browser here; empty if there is one."""
    absent = [name for name, path in (("Chromium", chromium()), ("chromedriver", shutil.which("chromedriver"))) if path is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def chromium() -> str | None:
    """The browser's path."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One browser window; ``home`` is an empty folder for its profile and its logs."""

    def __init__(self, home: Path) -> None:
        self.log = home / "chromedriver.log"
        environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(["chromedriver", "--port=0"], stdout=log, stderr=log, env=environment)
        self.session = ""
        try:
            self.base = f"http://127.0.0.1:{self._port()}"
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
            flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={home / 'profile'}"]
            options = {"binary": chromium(), "args": flags}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.session = f"/session/{made['sessionId']}"
        except BaseException:
            self.close()
            raise

    def _port(self) -> int:
        """The port that chromedriver chose, from what it prints."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            text = self.log.read_text(errors="replace")
            if "on port " in text and (digits := text.rsplit("on port ", 1)[1].split(".")[0].strip()).isdigit():
                return int(digits)
            time.sleep(0.05)
        raise RuntimeError(f"chromedriver did not start: {self.log.read_text(errors='replace')}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + self.session + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with DIRECT.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as problem:
            with problem:
                said = json.load(problem)["value"]
            raise RuntimeError(f"{method} {path}: {said['error']}: {said['message']}") from None

    def open(self, address: str) -> None:
        """Load a page and wait for it; an address that differs in its fragment alone does not load it again."""
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a JavaScript function returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Click as a user does: an element that is covered or not visible is an error."""
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Type into a field or onto a focused button; ``\\ue007`` is Enter."""
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def _find(self, selector: str) -> str:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[ELEMENT])

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of this size in CSS pixels."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Prefer ``light`` or ``dark``."""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def messages(self) -> list[str]:
        """What the console said since the last call: errors, warnings, breaches of the Content-Security-Policy."""
        return [str(entry["message"]) for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that pages asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._call("POST", "/se/log", {"type": "performance"})]
        return [str(one["params"]["request"]["url"]) for one in events if one["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """End the session and the driver."""
        try:
            if self.session:
                self._call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(timeout=PATIENCE)
