"""Read pickle files as data: containers, text, numbers and NumPy arrays. Nothing that a file names is imported or run.

The standard library parses the format, in its Python form: the C form reserves memory as a damaged file says, ends the
process on some files and copies every array. A name in the file only ever becomes a :class:`Name`, so that nothing that
can be called is on the unpickler's stack; :data:`CALLS` says what stands for the few calls that plain data need.
"""

import dataclasses
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from conclugen_jax.data.files import open_regular, readable, stand_in
from conclugen_jax.errors import ConclugenError

MAX_READS = 30_000_000
"""Reads from one file, two or three for an operation; ten times what the largest known feature files need."""

OPERATIONS = b"\x80\x95(N\x88\x89KMJ\x8aGX\x8c\x8dBC\x8e\x96]ae}su)\x85\x86\x87tqr\x94hjc\x93Rb."
"""Codes that Python writes for plain data under protocols 2 to 5; none for extensions, instances or persistent ids."""

Calls = Mapping[str, Callable[..., Any] | None]
"""Name -> what stands for a function, called with the unpickler and the arguments; None for a class that is only named."""

_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|U[1-9]\d{0,5}|O8")
_COPIED = 256  # bytes; shorter pieces of a file are copied, longer ones are views


class Refused(Exception):
    """The reason to refuse a file; the caller adds the file's name."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A function or class that a file names."""

    name: str


@dataclasses.dataclass(eq=False)
class Unfinished:
    """A dtype, or where ``code`` is empty an array, whose state, and so its value, comes later in the file."""

    code: str = ""
    value: Any = None


class Memo(dict):
    """The values that a file can refer to again, by number."""

    def __getitem__(self, key: int) -> Any:
        found = super().__getitem__(key)
        return found.value if type(found) is Unfinished and found.value is not None else found


def read(path: Path) -> tuple[Any, memoryview]:
    """Read a pickle of protocol 2 to 5 without importing or calling anything it names.

    Returns:
      What the file describes: ``dict`` (with text keys), ``list``, ``tuple``, ``str``, ``int``, ``float``, ``bool``,
      ``None``, ``bytes`` or ``memoryview``, and read-only arrays, which are views of the mapped file and take no memory of
      their own; an array of objects is a flat list. And the content of the file.

    Raises:
      ConclugenError: the file cannot be read, is no such pickle, is damaged, or asks for anything else.
    """
    content = map_file(path)
    if content[0] != 0x80:
        why = stand_in(path) or "not a pickle of protocol 2 to 5, which begins with the byte 0x80"
        raise ConclugenError(f"{path}: {why}")
    return interpret(Unpickler(Content(content)), path), content


def interpret(unpickler: "Unpickler", path: Path) -> Any:
    """Run an unpickler; a ConclugenError names the file and says what is damaged or not admitted."""
    at = unpickler.content
    try:
        return unpickler.load()
    except Refused as e:
        fault = f"{e} (byte {at.position})"
    except MemoryError:
        fault = "does not fit into memory"
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error, pickle.PickleError) as e:
        fault = f"damaged or cut off at byte {at.position} ({type(e).__name__}), fetch it again"
    raise ConclugenError(f"{path}: {fault}; nothing in the file was executed")


def map_file(path: Path) -> memoryview:
    """Map a regular file that is not empty into memory; a ConclugenError says why that is not possible."""
    with open_regular(path) as file, readable(path):
        if not os.fstat(file.fileno()).st_size:
            raise ConclugenError(f"{path}: an empty file; fetch it again")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Content:
    """A mapped file as an unpickler reads it: large pieces are views, and none is longer than the file."""

    def __init__(self, view: memoryview, position: int = 0):
        self.view, self.position, self._reads = view, position, 0

    def read(self, n: int) -> bytes | memoryview:
        """Return the next n bytes."""
        self._reads += 1
        if self._reads > MAX_READS:
            raise Refused(f"more than {MAX_READS} pieces, which no table of features needs")
        start, end = self.position, self.position + n
        if end > len(self.view):
            raise Refused(f"cut off: {n} bytes are announced and {len(self.view) - start} are left")
        self.position = end
        return self.view[start:end] if n > _COPIED else bytes(self.view[start:end])

    def readline(self) -> bytes:
        """Return the rest of a line; names are short."""
        piece = bytes(self.view[self.position : self.position + 256])
        line = piece[: piece.index(b"\n") + 1]
        self.position += len(line)
        return line


class Dispatch(dict):
    """Operation by code; names what is not admitted."""

    def __missing__(self, code: int) -> Any:
        name = pickletools.code2op[chr(code)].name if chr(code) in pickletools.code2op else f"{code:#04x}"
        if name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            raise Refused("written by Python 2; load it there and write its arrays with numpy.savez")
        raise Refused(f"holds the operation {name}, which a table of numbers and text does not need")


class Unpickler(pickle._Unpickler):
    """The standard library's unpickler without anything that could be called.

    ``calls`` has what stands for the names that are admitted. Keys of dictionaries are of the types ``keys``: others could
    exhaust the stack when they are hashed. ``what`` and ``way_out`` are for messages.
    """

    calls: ClassVar[Calls]
    keys: tuple[type, ...] = (str,)
    what = "a table of numbers and text"
    way_out = "pickle it again as plain dictionaries of NumPy arrays"
    dispatch = Dispatch({code: pickle._Unpickler.dispatch[code] for code in OPERATIONS})

    def __init__(self, content: Content):
        super().__init__(content)
        self.content, self.memo, self._copies_left = content, Memo(), len(content.view)

    def find_class(self, module: str, name: str) -> Name:
        """Admit a name; nothing is imported."""
        full = f"{module}.{name}"
        if full not in self.calls:
            raise Refused(f"asks for {full[:100]!r}, which {self.what} does not need; {self.way_out}")
        return Name(full)

    def load_reduce(self) -> None:
        """Call one of the functions that are written here; refuse all others."""
        arguments, function = self.stack.pop(), self.stack.pop()
        call = self.calls[function.name] if type(function) is Name and type(arguments) is tuple else None
        if call is None:
            raise Refused("a call of something that is not a function")
        self.append(call(self, *arguments))

    def load_build(self) -> None:
        """Set the state of an array or a type."""
        state, target = self.stack.pop(), self.stack.pop()
        if type(target) is not Unfinished or target.value is not None or type(state) is not tuple:
            raise Refused(f"sets the state of a {type(target).__name__}")
        if target.code:
            target.value = _dtype_of(target.code, *state)
        else:
            _, shape, dtype, fortran, data = state
            target.value = self.array(data, dtype, shape, "F" if fortran else "C")
        self.append(target.value)

    def load_setitem(self) -> None:
        """Set one item of a dictionary whose keys are text."""
        value, key = self.stack.pop(), self.stack.pop()
        self.load_setitems([key, value])

    def load_setitems(self, pair: Sequence[Any] = ()) -> None:
        """Set the items above the mark, or one pair, in a dictionary whose keys are text."""
        items = pair or self.pop_mark()
        if type(self.stack[-1]) is not dict or len(items) % 2 or any(type(key) not in self.keys for key in items[::2]):
            raise Refused("a dictionary whose keys are not text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_frame(self) -> None:
        """Skip the size of a frame."""
        self.content.read(8)

    dispatch |= {ord("R"): load_reduce, ord("b"): load_build, ord("s"): load_setitem, ord("u"): load_setitems}
    dispatch |= {0x95: load_frame, 0x96: pickle._Unpickler.load_binbytes8}  # a bytearray is bytes as well

    def array(self, data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray | list[Any]:
        """Return a view of bytes of the file, or a flat list of objects, once type, shape and size are known to agree."""
        known = isinstance(dtype, np.dtype) and type(shape) is tuple and len(shape) <= 8
        if not known or any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
            raise Refused("an array of unknown type or impossible shape")
        size, objects = math.prod(shape), dtype.kind == "O"
        held = len(data) if type(data) in ((list,) if objects else (memoryview, bytes)) else 0
        if held != size * (1 if objects else dtype.itemsize):
            raise Refused(f"an array of shape {shape} and type {dtype} that is not there")
        if objects:
            return data
        if not size:
            return np.empty(shape, dtype)
        if dtype.kind == "U" and np.frombuffer(data, dtype.str[0] + "u4").max() > 0x10FFFF:
            raise Refused("text that is not Unicode")  # NumPy believes the bytes, Python's str must not be made of them
        return np.frombuffer(data, dtype).reshape(shape, order=order)

    def charge(self, n: int) -> None:
        """Count copied bytes: all copies are smaller than the file unless one piece is copied many times."""
        self._copies_left -= n
        if self._copies_left < 0:
            raise Refused("describes more data than the file holds")


def _dtype(unpickler: Unpickler, code: Any, align: Any = False, copy: Any = True) -> Unfinished:
    if type(code) is not str or not _DTYPE.fullmatch(code):
        kind = code[:20] if type(code) is str else type(code)
        raise Refused(f"an array of type {kind!r}; numbers, text and truth values are read")
    return Unfinished(code)


def _dtype_of(code: str, version: Any, order: Any, *rest: Any) -> np.dtype:
    if version != 3 or order not in ("<", ">", "|", "=") or len(rest) != 6 or any(x is not None for x in rest[:3]):
        raise Refused("an array of a composed type; numbers, text and truth values are read")
    return np.dtype(order + code)


def _reconstruct(unpickler: Unpickler, kind: Any, shape: Any, code: Any) -> Unfinished:
    if kind != Name("numpy.ndarray"):
        raise Refused("an array of a class of its own")
    return Unfinished()


def _frombuffer(unpickler: Unpickler, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    if order not in ("C", "F", "K") or (order == "K") != (type(axes) is tuple):
        raise Refused("an array of unknown order")
    value = unpickler.array(data, dtype, shape, "F" if order == "F" else "C")
    return value if axes is None or isinstance(value, list) else value.transpose(axes)


def _scalar(unpickler: Unpickler, dtype: Any, data: Any) -> Any:
    value = unpickler.array(data, dtype, (1,), "C")
    if isinstance(value, list):
        raise Refused("a number that is an object")
    unpickler.charge(value.nbytes)
    return value[0].item()


def _encode(unpickler: Unpickler, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":  # how protocol 2 stores bytes
        raise Refused("an encoding other than that of bytes")
    unpickler.charge(len(text))
    return text.encode("latin-1")


CALLS: Calls = {
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda unpickler: b"",
    "collections.OrderedDict": lambda unpickler: {},
}
Unpickler.calls = CALLS
