"""The one exception type for mistakes that a user can correct."""

import difflib
import traceback
from collections.abc import Iterable


class ConclugenError(Exception):
    """A mistake in a file, a configuration or a command.

    The message is one sentence that names the file, row, key or shape, says what was expected and the way out.
    Launchers print it without a traceback and end with exit code 2.
    """


def place_of(e: BaseException) -> str:
    """File and line that an exception comes from: the innermost ones that are of no installed package."""
    frames = traceback.extract_tb(e.__traceback__)
    own = [frame for frame in frames if "-packages" not in frame.filename]
    where = (own or frames)[-1]
    return f"{where.filename}, line {where.lineno}"


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``; did you mean PREFIX + NAME?`` of the known name most like a wrong one, or nothing where none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def reason(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an exception's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
