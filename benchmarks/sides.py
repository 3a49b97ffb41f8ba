"""Two frameworks in processes of their own that take turns on one machine."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO


class Side:
    """A process that answers requests, a line of JSON each.

    A request names what to time; the process keeps what it has prepared, so that turns cost the timed work only.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None):
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The process's answer; what it writes to standard error passes through.

        Raises:
          RuntimeError: it ended instead.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: ended with code {self._process.wait()} on {request}")
        return json.loads(line)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.communicate()


def serve(answers: dict[str, Callable[..., dict[str, Any]]], stream: TextIO = sys.stdout) -> None:
    """Answer requests from standard input with the function that ``what`` names, until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("what")](**request)), file=stream, flush=True)


def peak() -> dict[str, float]:
    """Highest resident set of this process since it was last forgotten, GiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"gib": int(lines["VmHWM"].split()[0]) / 2**20}


def forget_peak() -> dict[str, float]:
    """Let :func:`peak` start again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
