"""Files written by ``torch.save``, read as named arrays without torch; nothing that they ask for is ever run.

Both layouts are read: the archive (a zip file with ``data.pkl`` and one stored record per tensor storage) and the older one
(five pickles in a row and the storages behind them). See ``torch/serialization.py`` of PyTorch.
"""

import dataclasses
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import pickles
from conclugen_jax.data.pickles import Machine, Name, Refused
from conclugen_jax.errors import ConclugenError

MAGIC = 0x1950A86A20F9469CFC6C
"""First object of a file of the older layout."""

BFLOAT16 = "bfloat16"
STORAGES: dict[str, str] = {
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


@dataclasses.dataclass(eq=False)
class Storage:
    """Numbers that tensors are views of.

    Attributes:
      dtype: of the numbers.
      length: how many the file says there are.
      values: them; ``None`` until they have been found in the file.
    """

    dtype: str
    length: int
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, by numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The numbers; bfloat16 as float32."""
        if self.storage.values is None:
            raise Refused("a tensor without a storage")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        size = math.prod(self.shape)
        if size > self.storage.length or (size and last >= self.storage.length):
            raise Refused(f"a tensor of shape {self.shape} beyond the end of its storage")
        if not size:
            return np.zeros(self.shape, np.float32)
        flat = self.storage.values[self.offset :]
        strides = tuple(step * flat.itemsize for step in self.strides)
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False))


def read(path: Path) -> dict[str, Any]:
    """The content of a file: arrays and plain values, by name.

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
        found = _Arrays(MOST_COPIES * max(len(content), 2**20)).of(read_layout(path, content))
    except Refused as e:
        raise ConclugenError(f"{path}: {e}; nothing in the file was executed") from e
    except RecursionError as e:
        raise ConclugenError(f"{path}: nested too deeply for weights; nothing in the file was executed") from e
    if not isinstance(found, dict):
        raise ConclugenError(
            f"{path}: holds a {type(found).__name__}, expected a dictionary of tensors; save the module's state_dict()"
        )
    return found


class _TorchMachine(Machine):
    """Admits tensors beside plain containers."""

    keys = (str, int)
    what = "a file of weights"
    way_out = "save the module's state_dict() alone"

    def __init__(self, content: memoryview, storage: Callable[[Any], Storage], at: int = 0):
        super().__init__(content, at)
        self.storage = storage
        self.calls, self.actions = {**self.calls, **_CALLS}, {**self.actions, **_ACTIONS}


def _tensor(machine: Machine, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    counts = (offset, *shape, *strides) if type(shape) is tuple and type(strides) is tuple else (None,)
    if type(storage) is not Storage or any(type(n) is not int or not 0 <= n < 2**40 for n in counts):
        raise Refused("a tensor of impossible shape")
    if len(shape) != len(strides) or len(shape) > 8:
        raise Refused("a tensor of impossible shape")
    return Tensor(storage, offset, shape, strides)


def _parameter(machine: Machine, data: Any, *rest: Any) -> Any:
    if type(data) is not Tensor:
        raise Refused("a parameter that is no tensor")
    return data


def _named(machine: Machine, *arguments: Any) -> None:
    raise Refused("a call of a class of storages")


def _size(machine: Machine, shape: Any = ()) -> tuple:
    if type(shape) is not tuple:
        raise Refused("a shape that is no tuple")
    return shape


def _build(machine: Machine) -> None:
    """Further attributes of a dictionary, such as the versions in a state_dict, are passed over."""
    if len(machine.stack) > 1 and type(machine.stack[-2]) is dict and type(machine.stack[-1]) is dict:
        machine.stack.pop()
    else:
        machine.build()


def _persistent(machine: Any) -> None:
    machine.push(machine.storage(machine.stack.pop()))


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    **{f"torch.{name}": _named for name in STORAGES},
}
_ACTIONS = {ord("Q"): _persistent, ord("b"): _build}


def _described(entry: Any) -> tuple[str, str, int]:
    """Type, key and length of the storage that a persistent id names."""
    if type(entry) is not tuple or len(entry) not in (5, 6) or entry[0] != "storage" or type(entry[1]) is not Name:
        raise Refused("a reference that is no storage of numbers")
    kind, key, length = entry[1].name.rpartition(".")[2], entry[2], entry[4]
    if kind not in STORAGES or type(key) is not str or type(length) is not int or not 0 <= length < 2**40:
        raise Refused("a storage of unknown type")
    if len(entry) == 6 and entry[5] is not None:
        raise Refused("a storage that is a view of another; save the weights anew")
    return STORAGES[kind], key, length


def _values(data: memoryview | bytes, dtype: str) -> np.ndarray:
    if dtype != BFLOAT16:
        return np.frombuffer(data, dtype)
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def _width(dtype: str) -> int:
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def _read_archive(path: Path, content: memoryview) -> Any:
    """The layout since PyTorch 1.6: a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            (name,) = [n for n in infos if n.endswith("/data.pkl") and n.count("/") == 1] or [None]
            if name is None or any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
                raise Refused("a zip file that torch.save did not write")
            folder = name.removesuffix("data.pkl")
            if archive.read(f"{folder}byteorder") != b"little" if f"{folder}byteorder" in infos else False:
                raise Refused("numbers of a big-endian machine; save the weights anew")
            storages: dict[str, Storage] = {}

            def storage(entry: Any) -> Storage:
                dtype, key, length = _described(entry)
                info = infos.get(f"{folder}data/{key}")
                if key not in storages:
                    if info is None or info.file_size != length * _width(dtype):
                        held = info.file_size if info else 0
                        raise Refused(f"storage {key[:40]!r} of {length * _width(dtype)} bytes has {held}")
                    storages[key] = Storage(dtype, length, _values(archive.read(info), dtype))
                if (storages[key].dtype, storages[key].length) != (dtype, length):
                    raise Refused(f"storage {key[:40]!r} has two types")
                return storages[key]

            machine = _TorchMachine(memoryview(archive.read(name)), storage)
            return pickles.interpret(machine, path)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as e:
        if isinstance(e, ConclugenError):
            raise
        raise ConclugenError(f"{path}: a damaged archive ({e}); fetch it again") from e


def _read_old(path: Path, content: memoryview) -> Any:
    """The layout before PyTorch 1.6: pickles in a row, then the storages in the order of the last of them."""
    storages: dict[str, Storage] = {}

    def storage(entry: Any) -> Storage:
        dtype, key, length = _described(entry)
        found = storages.setdefault(key, Storage(dtype, length))
        if (found.dtype, found.length) != (dtype, length):
            raise Refused(f"storage {key[:40]!r} has two types")
        return found

    at, objects = 0, []
    for number in range(5):
        if at >= len(content) or content[at] != 0x80:
            raise Refused("not a file that torch.save wrote")
        machine = _TorchMachine(content, storage, at)
        objects.append(pickles.interpret(machine, path))
        at = machine.at
        if not number and objects[0] != MAGIC:
            raise Refused("not a file that torch.save wrote")
    _, _, system, found, keys = objects
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("numbers of a big-endian machine; save the weights anew")
    if type(keys) is not list or not all(type(k) is str for k in keys) or sorted(keys) != sorted(storages):
        raise Refused("storages other than those of its tensors")
    for key in keys:
        known = storages[key]
        size = known.length * _width(known.dtype)
        if len(content) - at < 8 + size or struct.unpack("<q", content[at : at + 8])[0] != known.length:
            raise Refused(f"cut off, or damaged, in the numbers of storage {key!r}")
        known.values = _values(content[at + 8 : at + 8 + size], known.dtype)
        at += 8 + size
    return found


MOST_COPIES = 4
"""Bytes of all tensors may be so many times those of the file: several may be views of the same numbers."""


class _Arrays:
    """Arrays and plain values for what a file describes, each object once however often it is referred to."""

    def __init__(self, most_bytes: int):
        self._left, self._done = most_bytes, {}

    def of(self, tree: Any) -> Any:
        if not isinstance(tree, Tensor | Mapping | list | tuple):
            return pickles.unwrap(tree)
        if id(tree) not in self._done:  # the object is kept as well, so that no other one has its number
            self._done[id(tree)] = tree, self._made(tree)
        return self._done[id(tree)][1]

    def _made(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            width = 4 if tree.storage.dtype == BFLOAT16 else np.dtype(tree.storage.dtype).itemsize
            self._left -= min(math.prod(tree.shape), tree.storage.length) * width
            if self._left < 0:
                raise Refused(f"tensors of more than {MOST_COPIES} times the bytes of the file")
            return tree.array()
        if isinstance(tree, Mapping):
            return {str(key): self.of(value) for key, value in tree.items()}
        return [self.of(value) for value in tree]
