"""Two frameworks in processes of their own that take turns on one machine."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


class Side:
    """A process that answers requests, a line of JSON each.

    A request names what to time; the process keeps what it has prepared, so that turns cost the timed work only.
    """

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

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


def serve(answers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests from standard input with the function that ``what`` names, until it ends."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("what")](**request)), flush=True)


def in_turns(sides: Sequence[Side], repeats: int, **request: Any) -> dict[str, list[dict[str, Any]]]:
    """The answers of each side, asked in turn; a first round that does not count prepares and warms up."""
    for side in sides:
        side.ask(**request)
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            found[side.name].append(side.ask(**request))
    return found


def median(answers: Sequence[dict[str, Any]], key: str = "seconds") -> float:
    """Of one number of each answer."""
    return statistics.median(answer[key] for answer in answers)


def ratio(slower: Sequence[dict[str, Any]], faster: Sequence[dict[str, Any]], key: str = "seconds") -> float:
    """Median over turns of the ratio within a turn."""
    return statistics.median(a[key] / b[key] for a, b in zip(slower, faster, strict=True))
