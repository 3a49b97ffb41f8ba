"""Read files written by ``torch.save`` as named arrays, without torch and without executing their content.

Both layouts are read: the archive (a zip file with ``data.pkl`` and one stored record per tensor storage) and the older one
(five pickles in a row and the storages behind them). See ``torch/serialization.py`` of PyTorch.
"""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from conclugen_jax.data import pickles
from conclugen_jax.data.files import stand_in
from conclugen_jax.data.pickles import Name, Refused, Unpickler
from conclugen_jax.errors import ConclugenError

MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file of the older layout

STORAGES = {  # classes of storages -> type of their numbers
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("b1"),
}


class Storage(NamedTuple):
    """Numbers that tensors are views of: their type and their bytes."""

    dtype: np.dtype
    data: bytes | bytearray


def read(path: Path) -> dict[str | int, Any]:
    """Read a file of ``torch.save`` that holds a dictionary, such as a module's ``state_dict()``.

    Returns name -> numpy array (which may share memory with others), number, text, list, tuple, or a dictionary of such. A
    ConclugenError says that it is damaged, holds something else, or asks for a class or function other than tensors.
    """
    content = pickles.map_file(path)
    try:
        found = (_read_archive if bytes(content[:4]) == b"PK\x03\x04" else _read_old)(path, content)
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise Refused(f"holds a {kind}, expected a dictionary of tensors; save the module's state_dict()")
    except (Refused, RecursionError) as e:
        raise ConclugenError(f"{path}: {e}; nothing in the file was executed") from e
    return found


def _tensor(unpickler: Unpickler, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
    """Return a view of a storage; offset and strides are counted in numbers, and NumPy checks that they stay within."""
    try:
        if type(storage) is not Storage:
            raise TypeError("no storage")
        width = storage.dtype.itemsize
        found = np.ndarray(shape, storage.dtype, storage.data, offset * width, tuple(step * width for step in strides))
        if found.nbytes > len(storage.data):
            raise ValueError("the same numbers again and again")
    except (TypeError, ValueError, OverflowError) as e:
        raise Refused(f"a tensor of shape {str(shape)[:100]} that its storage does not hold ({e})") from e
    unpickler.bytes_left -= found.nbytes
    if unpickler.bytes_left < 0:  # each would be copied
        raise Refused("tensors of more than 4 times the bytes of the file")
    return found


class _Tensors(Unpickler):
    """Admits tensors beside plain containers."""

    keys = (str, int)
    what = "a file of weights"
    way_out = "save the module's state_dict() alone"
    dispatch = pickles.Dispatch(Unpickler.dispatch)
    calls: ClassVar[pickles.Calls] = {
        **pickles.CALLS,
        **dict.fromkeys(STORAGES),
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_parameter": lambda unpickler, data, *rest: data,
        "torch.Size": lambda unpickler, shape=(): shape,
    }

    def __init__(self, content: pickles.Content, read: Callable[[str, int], bytes | bytearray], file_bytes: int):
        """Prepare to read storages by (key, number of bytes), all of them no larger than the file."""
        super().__init__(content)
        self.storages: dict[str, Storage] = {}
        self._read_storage, self._copies_left, self.bytes_left = read, file_bytes, 4 * file_bytes

    def persistent_load(self, entry: Any) -> Storage:
        """Return the storage that a persistent id describes; its numbers are read once."""
        match entry:
            case ("storage", Name(kind), str(key), _, int(length), *views) if kind in STORAGES and set(views) <= {None}:
                dtype, size = STORAGES[kind], length * STORAGES[kind].itemsize
            case _:
                raise Refused("a storage of unknown type, or a view of another one; save the weights again")
        if key not in self.storages:
            self.storages[key] = Storage(dtype, self._read_storage(key, size))
            self.charge(size)  # entries of a zip file may overlap
        if self.storages[key].dtype != dtype or len(self.storages[key].data) != size:
            raise Refused(f"storage {key[:40]!r} has two types")
        return self.storages[key]

    def load_build(self) -> None:
        """Pass over further attributes of a dictionary, such as the versions in a state_dict."""
        if len(self.stack) > 1 and type(self.stack[-2]) is dict and type(self.stack[-1]) is dict:
            self.stack.pop()
        else:
            super().load_build()

    dispatch |= {ord("Q"): Unpickler.load_binpersid, ord("b"): load_build}


def _read_archive(path: Path, content: memoryview) -> Any:
    """Read the layout since PyTorch 1.6: a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            names = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
                raise Refused("a zip file that torch.save did not write")
            folder = names[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in infos and archive.read(f"{folder}byteorder") != b"little":
                raise Refused("numbers of a big-endian machine; save the weights again")

            def storage(key: str, size: int) -> bytes:
                info = infos.get(f"{folder}data/{key}")
                if info is None or info.file_size != size:
                    raise Refused(f"storage {key[:40]!r} of {size} bytes has {info.file_size if info else 0}")
                return archive.read(info)

            tree = pickles.Content(memoryview(archive.read(names[0])))
            return pickles.interpret(_Tensors(tree, storage, len(content)), path)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as e:
        raise ConclugenError(f"{path}: a damaged archive ({e}); fetch it again") from e


def _read_old(path: Path, content: memoryview) -> Any:
    """Read the layout before PyTorch 1.6: pickles in a row, then the storages in the order of the last of them."""
    if MAGIC.to_bytes(10, "little") not in bytes(content[:32]):
        if found := stand_in(path):
            raise ConclugenError(f"{path}: {found}")
        raise Refused("not a file that torch.save wrote")

    def storage(key: str, size: int) -> bytearray:
        if not 0 <= size <= len(content):
            raise Refused(f"cut off, or damaged, in the numbers of storage {key[:40]!r}")
        return bytearray(size)  # filled below, once tensors are views of it

    file = pickles.Content(content)
    unpicklers = [_Tensors(file, storage, len(content)) for _ in range(5)]
    _, _, system, found, keys = (pickles.interpret(unpickler, path) for unpickler in unpicklers)
    storages = unpicklers[3].storages
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("numbers of a big-endian machine; save the weights again")
    if type(keys) is not list or not all(type(k) is str for k in keys) or sorted(keys) != sorted(storages):
        raise Refused("storages other than those of its tensors")
    for key in keys:
        dtype, data = storages[key]
        if struct.unpack("<q", file.read(8))[0] * dtype.itemsize != len(data):
            raise Refused(f"cut off, or damaged, in the numbers of storage {key!r}")
        data[:] = file.read(len(data))
    return found
