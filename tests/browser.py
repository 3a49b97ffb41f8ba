"""A headless Chromium that tests steer over a pipe, by the DevTools protocol; no package is needed."""

import base64
import contextlib
import fcntl
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@functools.cache
def axe_core() -> str:
    """The script of axe-core, or nothing where npm is not there or cannot reach its registry."""
    if not (npm := shutil.which("npm")):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, "axe-core@4.14.1"]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        return Path(folder, "node_modules/axe-core/axe.min.js").read_text() if done.returncode == 0 else ""


class Browser:
    """One page. A context manager; ``problems`` lists console errors, exceptions and requests that left the disk."""

    def __init__(self, profile: Path):
        self.problems: list[str] = []
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        # Chromium listens at descriptor 3 and answers at 4; ours must be others, or one would overwrite the other.
        listens, speaks = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (commands, answers))
        silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, listens, 3), (os.POSIX_SPAWN_DUP2, speaks, 4)]
        arguments = [CHROMIUM, *flags, "about:blank"]
        self._process = os.posix_spawn(CHROMIUM, arguments, os.environ, file_actions=[*silent, *pipes], setpgroup=0)
        for fd in (commands, answers, listens, speaks):
            os.close(fd)
        self._buffer, self._number, self._session = b"", 0, None

    def __enter__(self) -> "Browser":
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._write)
        os.close(self._read)
        with contextlib.suppress(ProcessLookupError):  # with its pipe closed it ends by itself
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of some width."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=f"file://{path.absolute()}")
        until = time.monotonic() + 60
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            assert time.monotonic() < until, "the page does not load"
            time.sleep(0.05)

    def run(self, expression: str) -> Any:
        """Value of an expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def violations(self) -> list[Any]:
        """What axe-core finds wrong for readers that do not see the page; nothing where npm cannot get it."""
        if not (script := axe_core()):
            return []
        self.run(script)
        self.run("axe.run(document, {resultTypes: ['violations']}).then(found => { window.found = found }); 0")
        until = time.monotonic() + 60
        while not self.run("!!window.found"):
            assert time.monotonic() < until, "axe-core does not end"
            time.sleep(0.2)
        return self.run("found.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200)).slice(0, 3)])")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def paper(self, path: Path) -> None:
        """The page as PDF."""
        path.write_bytes(
            base64.b64decode(
                self.call("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)["data"]
            )
        )

    def _next(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                assert selector.select(60), "the browser does not answer"
                chunk = os.read(self._read, 1 << 20)
                assert chunk, "the browser has ended"
                self._buffer += chunk
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(raw)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "about:", "data:")
        ):
            self.problems.append(f"request {params['request']['url']}")
        if method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and params["type"] == "error"):
            self.problems.append(json.dumps(params)[:500])
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        return message
