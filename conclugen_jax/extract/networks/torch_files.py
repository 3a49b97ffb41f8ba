"""Read files written by ``torch.save`` as named arrays, without torch; nothing that they ask for is ever run.

Both layouts are read: the archive (a zip file with ``data.pkl`` and one stored record per tensor storage) and the older one
(five pickles in a row and the storages behind them). See ``torch/serialization.py`` of PyTorch.
"""

import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from conclugen_jax.data import pickles
from conclugen_jax.data.pickles import Name, Refused, Unpickler
from conclugen_jax.errors import ConclugenError

MAGIC = 0x1950A86A20F9469CFC6C
"""First object of a file of the older layout."""

MOST_COPIES = 4
"""Bytes of all tensors may be so many times those of the file: several may be views of the same numbers."""

BFLOAT16 = "bfloat16"
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
"""Classes of storages -> type of their numbers."""


class Storage(NamedTuple):
    """Numbers that tensors are views of: their type in the file, and an array [length], bfloat16 as float32."""

    dtype: str
    values: np.ndarray


def read(path: Path) -> dict[str, Any]:
    """Read the content of a file: arrays and plain values, by name.

    Args:
      path: written by ``torch.save``, of a dictionary such as a module's ``state_dict()``.

    Returns:
      name -> numpy array, number, text, list, or a dictionary of such.

    Raises:
      ConclugenError: the file cannot be read, is damaged, holds something else than a dictionary, or asks for a class or
        function other than tensors.
    """
    content = pickles.map_file(path)
    read_layout = _read_archive if bytes(content[:4]) == b"PK\x03\x04" else _read_old
    try:
        found = _plain(read_layout(path, content), {})
    except Refused as e:
        raise ConclugenError(f"{path}: {e}; nothing in the file was executed") from e
    except RecursionError as e:
        raise ConclugenError(f"{path}: nested too deeply for weights; nothing in the file was executed") from e
    if not isinstance(found, dict):
        raise ConclugenError(
            f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors; save the module's state_dict()"
        )
    return found


def _plain(tree: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Return dictionaries with text keys, and lists for tuples; an object that occurs twice is made once."""
    if not isinstance(tree, dict | list | tuple):
        return tree
    if id(tree) not in done:  # the object is kept as well, so that no other one gets its number
        many = tree.items() if isinstance(tree, dict) else enumerate(tree)
        items = [(str(key), _plain(value, done)) for key, value in many]
        done[id(tree)] = tree, dict(items) if isinstance(tree, dict) else [value for _, value in items]
    return done[id(tree)][1]


class _Tensors(Unpickler):
    """Admits tensors beside plain containers."""

    keys = (str, int)
    what = "a file of weights"
    way_out = "save the module's state_dict() alone"
    dispatch = pickles.Dispatch(Unpickler.dispatch)

    def __init__(self, content: pickles.Content, values: Callable[[str, str, int], np.ndarray], file_bytes: int):
        """Prepare.

        Args:
          content: what is unpickled.
          values: (key, dtype, length) of a storage -> its numbers.
          file_bytes: size of the file, which bounds storages and tensors.
        """
        super().__init__(content)
        self.storages: dict[str, Storage] = {}
        self._values, self._storage_bytes_left = values, file_bytes
        self._tensor_bytes_left = MOST_COPIES * max(file_bytes, 2**20)

    def persistent_load(self, entry: Any) -> Storage:
        """Return the storage that a persistent id describes; its numbers are read once."""
        dtype, key, length = _described(entry)
        if key not in self.storages:
            self.storages[key] = Storage(dtype, self._values(key, dtype, length))
            self._storage_bytes_left -= length * _width(dtype)
            if self._storage_bytes_left < 0:  # entries of a zip file may overlap
                raise Refused("storages of more bytes than the file")
        found = self.storages[key]
        if (found.dtype, len(found.values)) != (dtype, length):
            raise Refused(f"storage {key[:40]!r} has two types")
        return found

    def load_build(self) -> None:
        """Pass over further attributes of a dictionary, such as the versions in a state_dict."""
        if len(self.stack) > 1 and type(self.stack[-2]) is dict and type(self.stack[-1]) is dict:
            self.stack.pop()
        else:
            super().load_build()

    dispatch |= {ord("Q"): Unpickler.load_binpersid, ord("b"): load_build}

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
        """Return a view of a storage, counted in numbers."""
        counts = (offset, *shape, *strides) if type(shape) is tuple and type(strides) is tuple else (None,)
        if type(storage) is not Storage or any(type(n) is not int or not 0 <= n < 2**40 for n in counts):
            raise Refused("a tensor of impossible shape")
        if len(shape) != len(strides) or len(shape) > 8:
            raise Refused("a tensor of impossible shape")
        size, values = math.prod(shape), storage.values
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if size > len(values) or (size and last >= len(values)):
            raise Refused(f"a tensor of shape {shape} beyond the end of its storage")
        if not size:
            return np.zeros(shape, np.float32)
        self._tensor_bytes_left -= size * values.itemsize
        if self._tensor_bytes_left < 0:
            raise Refused(f"tensors of more than {MOST_COPIES} times the bytes of the file")
        steps = tuple(step * values.itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)

    def parameter(self, data: Any, *rest: Any) -> np.ndarray:
        """Return a parameter's tensor."""
        if not isinstance(data, np.ndarray):
            raise Refused("a parameter that is no tensor")
        return data

    def size(self, shape: Any = ()) -> tuple:
        """Return a shape."""
        if type(shape) is not tuple:
            raise Refused("a shape that is no tuple")
        return shape

    calls: ClassVar[pickles.Calls] = {
        **pickles.CALLS,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch.Size": size,
        **{f"torch.{name}": None for name in STORAGES},
    }


def _described(entry: Any) -> tuple[str, str, int]:
    """Return type, key and length of the storage that a persistent id names."""
    if type(entry) is not tuple or len(entry) not in (5, 6) or entry[0] != "storage" or type(entry[1]) is not Name:
        raise Refused("a reference that is no storage of numbers")
    kind, key, length = entry[1].name.rpartition(".")[2], entry[2], entry[4]
    if kind not in STORAGES or type(key) is not str or type(length) is not int or not 0 <= length < 2**40:
        raise Refused("a storage of unknown type")
    if len(entry) == 6 and entry[5] is not None:
        raise Refused("a storage that is a view of another; save the weights again")
    return STORAGES[kind], key, length


def _width(dtype: str) -> int:
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def _numbers(data: memoryview | bytes, dtype: str) -> np.ndarray:
    if dtype != BFLOAT16:
        return np.frombuffer(data, dtype)
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _read_archive(path: Path, content: memoryview) -> Any:
    """Read the layout since PyTorch 1.6: a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            (name,) = [n for n in infos if n.endswith("/data.pkl") and n.count("/") == 1] or [None]
            if name is None or any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
                raise Refused("a zip file that torch.save did not write")
            folder = name.removesuffix("data.pkl")
            if f"{folder}byteorder" in infos and archive.read(f"{folder}byteorder") != b"little":
                raise Refused("numbers of a big-endian machine; save the weights again")

            def values(key: str, dtype: str, length: int) -> np.ndarray:
                info = infos.get(f"{folder}data/{key}")
                if info is None or info.file_size != length * _width(dtype):
                    held = info.file_size if info else 0
                    raise Refused(f"storage {key[:40]!r} of {length * _width(dtype)} bytes has {held}")
                return _numbers(archive.read(info), dtype)

            tree = pickles.Content(memoryview(archive.read(name)))
            return pickles.interpret(_Tensors(tree, values, len(content)), path)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as e:
        raise ConclugenError(f"{path}: a damaged archive ({e}); fetch it again") from e


def _read_old(path: Path, content: memoryview) -> Any:
    """Read the layout before PyTorch 1.6: pickles in a row, then the storages in the order of the last of them."""

    def values(key: str, dtype: str, length: int) -> np.ndarray:
        if length * _width(dtype) > len(content):
            raise Refused(f"cut off, or damaged, in the numbers of storage {key[:40]!r}")
        return np.empty(length, "<f4" if dtype == BFLOAT16 else dtype)  # filled below, once tensors are views of it

    file, objects = pickles.Content(content), []
    for number in range(5):
        if content[file.position : file.position + 1] != b"\x80":
            raise Refused("not a file that torch.save wrote")
        unpickler = _Tensors(file, values, len(content))
        objects.append(pickles.interpret(unpickler, path))
        if number == 0 and objects[0] != MAGIC:
            raise Refused("not a file that torch.save wrote")
        if number == 3:
            storages = unpickler.storages
    _, _, system, found, keys = objects
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("numbers of a big-endian machine; save the weights again")
    if type(keys) is not list or not all(type(k) is str for k in keys) or sorted(keys) != sorted(storages):
        raise Refused("storages other than those of its tensors")
    for key in keys:
        dtype, numbers = storages[key]
        if struct.unpack("<q", file.read(8))[0] != len(numbers):
            raise Refused(f"cut off, or damaged, in the numbers of storage {key!r}")
        numbers[:] = _numbers(file.read(len(numbers) * _width(dtype)), dtype)
    return found
