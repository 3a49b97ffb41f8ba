"""The one exception type for mistakes that a user can mend."""


class ConclugenError(Exception):
    """A mistake in a file, a configuration or a command.

    The message is one sentence that names the file, row, key or shape, says what was expected and the way out.
    Launchers print it without a traceback and end with exit code 2.
    """
