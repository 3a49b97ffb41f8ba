"""Command-line entry points: each parses its flags and calls one room; may use every other room, nothing may use it."""

import os
import platform
import signal
from pathlib import Path

# Until a launcher runs, Ctrl-C ends the process without a traceback: importing JAX takes seconds.
signal.signal(signal.SIGINT, signal.SIG_DFL)

# Compiled programs are kept, so that a repeated command starts at once. A folder for each machine: they hold its code.
_cache = Path(
    os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "conclugen_jax", platform.node() or "host"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
