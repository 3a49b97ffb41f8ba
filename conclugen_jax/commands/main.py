"""The command ``conclugen``. It imports nothing slow before it knows which command to run, so ``--help`` is instant."""

import os
import signal
import sys
from typing import NoReturn

import conclugen_jax
from conclugen_jax.commands import names
from conclugen_jax.errors import ConclugenError


def main() -> NoReturn:
    """Run the command that the first argument names."""
    _open_standard_files()
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # names of files are UTF-8 for C++, whatever the locale is
        os.execv(sys.executable, sys.orig_argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command runs, Ctrl-C ends the process without a traceback
    sys.path.append(
        os.getcwd()
    )  # --backbone=MODULE:FUNCTION and configuration files may import from the current folder
    first, *rest = sys.argv[1:] or [""]
    if first in names.HELP or first in ("", "help"):
        print(names.overview())
        sys.exit(0 if first else 2)
    if first == "--version":
        print(f"conclugen {conclugen_jax.__version__}")
        sys.exit(0)
    try:
        name = names.find(first)
    except ConclugenError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    from conclugen_jax.commands import app  # late: it loads the libraries that commands share

    app.run(name, rest)


def _open_standard_files() -> None:
    """Open closed standard streams on the null device: else C++ writes messages into the next file that is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
