"""Command-line entry points: each defines its flags and calls one room; may use every other room, nothing may use it."""

import os
import platform
from pathlib import Path

# JAX keeps compiled programs here, so that a repeated command starts at once. Each machine has its own folder, since the
# programs hold its machine code.
_cache = Path(
    os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "conclugen_jax", platform.node() or "host"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
