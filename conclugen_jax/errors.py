"""The one exception type for mistakes that a user can mend."""

import traceback


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


def reason(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an exception's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
