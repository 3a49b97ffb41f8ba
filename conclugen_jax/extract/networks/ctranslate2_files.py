"""Read the weights of a model in CTranslate2's binary format as named arrays (``ctranslate2/specs/model_spec.py``)."""

import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from conclugen_jax.errors import ConclugenError

VERSION = 6  # of the format
TYPES = [np.dtype(kind) for kind in ("<f4", "i1", "<i2", "<i4", "<f2", jnp.bfloat16)]
"""Types of numbers by their codes."""


def read(path: Path) -> dict[str, np.ndarray]:
    """Return name -> array, not copied; a ConclugenError says that the file is of another version, or damaged."""
    content, at = path.read_bytes(), 0

    def numbers(form: str) -> tuple[int, ...]:
        nonlocal at
        found = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(f"<{form}")
        return found

    def text() -> str:
        nonlocal at
        (length,) = numbers("H")  # with a zero at the end
        at += length
        return content[at - length : at - 1].decode()

    try:
        (version,) = numbers("I")
        if version != VERSION:
            raise ValueError(f"version {version} of the format, expected {VERSION}")
        text(), numbers("I")  # name and revision of the architecture
        found = {}
        for _ in range(*numbers("I")):
            name, (axes,) = text(), numbers("B")
            shape, (kind, size) = numbers(f"{axes}I"), numbers("BI")
            found[name] = np.frombuffer(content, TYPES[kind], size // TYPES[kind].itemsize, at).reshape(shape)
            at += size
    except (struct.error, ValueError, IndexError) as e:
        raise ConclugenError(f"{path}: not a model of CTranslate2 that can be read ({e}); fetch it again") from e
    return found
