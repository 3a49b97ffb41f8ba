"""Pickle files read as data: containers, text, numbers and NumPy arrays; nothing that they ask for is ever run."""

import dataclasses
import math
import mmap
import os
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError

MAX_OPERATIONS = 10_000_000
"""Operations that a file may hold; ten times what the largest feature files known need."""

_DTYPE = re.compile(r"b1|[iu][1248]|f[248]|U[1-9]\d{0,5}|O8")
_STOP = ord(".")


@dataclasses.dataclass(eq=False)
class Array:
    """An array of the file: numbers or text as a read-only view of the file, objects as a flat list."""

    value: np.ndarray | list[Any] | None = None


@dataclasses.dataclass(eq=False)
class _Dtype:
    """Stands for ``numpy.dtype``; complete once its byte order is known."""

    code: str
    dtype: np.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Name:
    """Stands for the function or class of that name."""

    name: str


class Refused(Exception):
    """Why a file is not read; the caller adds the file's name."""


def read(path: Path) -> tuple[Any, memoryview]:
    """Interpret a pickle of protocol 2 to 5 without importing or calling anything it names.

    The file is mapped into memory: large arrays are views of it and take no memory of their own.

    Args:
      path: of a regular file.

    Returns:
      What the file describes: ``dict`` (with text keys), ``list``, ``tuple``, ``str``, ``int``, ``float``, ``bool``,
      ``None``, :class:`Array` or ``memoryview`` (for bytes). And the content of the file.

    Raises:
      ConclugenError: the file cannot be read, is no such pickle, is damaged, or asks for anything else.
    """
    content = map_file(path)
    if content[0] != 0x80:
        raise ConclugenError(f"{path}: not a pickle of protocol 2 to 5, which begins with the byte 0x80")
    return interpret(Machine(content), path), content


def interpret(machine: "Machine", path: Path) -> Any:
    """Run a machine, and name the file in what it refuses.

    Raises:
      ConclugenError: the content is no such pickle, is damaged, or asks for what the machine does not admit.
    """
    try:
        return machine.run()
    except Refused as e:
        raise ConclugenError(f"{path}: {e} (byte {machine.at}); nothing in the file was executed") from e
    except MemoryError as e:
        raise ConclugenError(f"{path}: does not fit into memory; nothing in the file was executed") from e
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as e:
        raise ConclugenError(
            f"{path}: damaged or cut off at byte {machine.at} ({type(e).__name__}); nothing in the file was executed, "
            "fetch it again"
        ) from e


def unwrap(x: Any) -> Any:
    """The value of an :class:`Array`; anything else as it is."""
    return x.value if isinstance(x, Array) else x


def map_file(path: Path) -> memoryview:
    """The content of a regular file that is not empty, mapped into memory.

    Raises:
      ConclugenError: there is no such file, or it cannot be read.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise ConclugenError(f"{path}: no such file; name the file to be read")
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ConclugenError(f"{path}: an empty file; fetch it again")
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as e:
        raise ConclugenError(f"{path}: cannot be read ({e})") from e
    return content


class Machine:
    """The stack machine of the pickle format, with a stand-in for every name it admits.

    Attributes:
      content: that is interpreted.
      at: next byte.
      calls: name -> what stands for the function or class; others are refused.
      actions: code -> operation; others are refused.
      keys: types that keys of dictionaries may have; others could exhaust the stack when they are hashed.
      what: is expected, for messages.
      way_out: of what is refused, for messages.
    """

    keys: tuple[type, ...] = (str,)
    what = "a table of numbers and text"
    way_out = "pickle it anew as plain dictionaries of NumPy arrays"

    def __init__(self, content: memoryview, at: int = 0):
        self.content, self.at = content, at
        self.calls, self.actions = CALLS, ACTIONS
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.budget = len(content)

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self.take(1)[0]
            if code == _STOP:
                return self.stack.pop()
            action = self.actions.get(code)
            if action is None:
                raise Refused(_about(code))
            action(self)
        raise Refused(f"more than {MAX_OPERATIONS} operations, which no table of features needs")

    def take(self, n: int) -> memoryview:
        """The next n bytes."""
        end = self.at + n
        if end > len(self.content):
            raise Refused(f"cut off: {n} bytes are announced and {len(self.content) - self.at} are left")
        piece = self.content[self.at : end]
        self.at = end
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to the end of a line; names are short."""
        piece = bytes(self.content[self.at : self.at + 256])
        text = piece[: piece.index(b"\n")]
        self.at += len(text) + 1
        return text.decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise IndexError
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return items

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise Refused(f"{type(self.stack[-1]).__name__} where a {kind.__name__} must be")
        return self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        if len(items) % 2 or any(type(key) not in self.keys for key in items[::2]):
            raise Refused("a dictionary whose keys are not text")
        self.top(dict).update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is not text")
        full = f"{module}.{name}"
        if full not in self.calls:
            raise Refused(f"asks for {full[:100]!r}, which {self.what} does not need; {self.way_out}")
        self.push(Name(full))

    def call(self) -> None:
        function, arguments = self.pop(2)
        if type(function) is not Name or type(arguments) is not tuple:
            raise Refused("a call of something that is not a function")
        self.push(self.calls[function.name](self, *arguments))

    def build(self) -> None:
        target, state = self.pop(2)
        if type(target) is _Dtype:
            _complete(target, *state)
        elif type(target) is Array:
            version, shape, dtype, fortran, data = state
            target.value = self.array(data, dtype, shape, "F" if fortran else "C")
        else:
            raise Refused(f"sets the state of a {type(target).__name__}")
        self.push(target)

    def array(self, data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray | list[Any]:
        """A view of bytes of the file, once size and shape are known to agree."""
        if type(dtype) is not _Dtype or dtype.dtype is None or type(shape) is not tuple or len(shape) > 8:
            raise Refused("an array of unknown type or shape")
        if any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
            raise Refused("an array of impossible shape")
        size = math.prod(shape)
        if dtype.dtype.kind == "O":
            if type(data) is not list or len(data) != size:
                raise Refused(f"an array of {size} objects that are not there")
            return data
        if type(data) not in (memoryview, bytes) or len(data) != size * dtype.dtype.itemsize:
            held = len(data) if type(data) in (memoryview, bytes) else 0
            raise Refused(f"an array said to have {size * dtype.dtype.itemsize} bytes has {held}")
        if not size:
            return np.empty(shape, dtype.dtype)
        if dtype.dtype.kind == "U" and np.frombuffer(data, dtype.dtype.str[0] + "u4").max() > 0x10FFFF:
            raise Refused("text that is not Unicode")  # NumPy believes the bytes, Python's str must not be made of them
        return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)

    def charge(self, n: int) -> None:
        """Count copied bytes: all copies together are smaller than the file unless one piece is copied many times."""
        self.budget -= n
        if self.budget < 0:
            raise Refused("describes more data than the file holds")


def _about(code: int) -> str:
    known = pickletools.code2op.get(chr(code))
    if known is None:
        return f"damaged: {code:#04x} is not an operation of the pickle format"
    if known.name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
        return "written by Python 2; load it there and write its arrays with numpy.savez"
    return f"holds the operation {known.name}, which a table of numbers and text does not need"


def _dtype(machine: Machine, code: Any, align: Any = False, copy: Any = True) -> _Dtype:
    if type(code) is not str or not _DTYPE.fullmatch(code):
        what = repr(code[:20]) if type(code) is str else "unknown"
        raise Refused(f"an array of type {what}; numbers, text and truth values are read")
    return _Dtype(code)


def _complete(target: _Dtype, version: Any, order: Any, *rest: Any) -> None:
    if version != 3 or order not in ("<", ">", "|", "=") or len(rest) != 6 or any(x is not None for x in rest[:3]):
        raise Refused("an array of a composed type; numbers, text and truth values are read")
    target.dtype = np.dtype(order + target.code)


def _reconstruct(machine: Machine, kind: Any, shape: Any, code: Any) -> Array:
    if kind != Name("numpy.ndarray"):
        raise Refused("an array of a class of its own")
    return Array()


def _frombuffer(machine: Machine, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    if order not in ("C", "F", "K") or (order == "K") != (type(axes) is tuple):
        raise Refused("an array of unknown order")
    value = machine.array(data, dtype, shape, "F" if order == "F" else "C")
    return Array(value if axes is None or isinstance(value, list) else value.transpose(axes))


def _scalar(machine: Machine, dtype: Any, data: Any) -> Any:
    value = machine.array(data, dtype, (1,), "C")
    if isinstance(value, list):
        raise Refused("a number that is an object")
    machine.charge(value.nbytes)
    return value[0].item()


def _encode(machine: Machine, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":  # how protocol 2 stores bytes
        raise Refused("an encoding other than that of bytes")
    machine.charge(len(text))
    return text.encode("latin-1")


def _no_bytes(machine: Machine) -> bytes:
    return b""


def _ordered(machine: Machine) -> dict[str, Any]:
    return {}


def _not_called(machine: Machine, *arguments: Any) -> None:
    raise Refused("a call of a class")


CALLS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": _not_called,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": _ordered,
}


def _protocol(m: Machine) -> None:
    if not 2 <= m.number("B") <= 5:
        raise Refused("not a pickle of protocol 2 to 5")


def _integer(m: Machine) -> None:
    m.push(int.from_bytes(m.take(m.number("B")), "little", signed=True))


def _fixed(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.number(layout))


def _text(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.push(str(m.take(m.number(layout)), "utf-8", "surrogatepass"))


def _bytes(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.take(m.number(layout)))


def _put(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.memo.__setitem__(m.number(layout), m.stack[-1])


def _get(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.memo[m.number(layout)])


def _tuple(n: int) -> Callable[[Machine], None]:
    return lambda m: m.push(tuple(m.pop(n)))


# The operations that Python writes for plain data under protocols 2 to 5. Those that name classes by extension code,
# persistent id or otherwise are not here.
ACTIONS: dict[int, Callable[[Machine], None]] = {
    ord(code): action
    for code, action in {
        "\x80": _protocol,
        "\x95": lambda m: m.number("<Q"),  # FRAME
        "(": Machine.mark,
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "K": _fixed("B"),
        "M": _fixed("<H"),
        "J": _fixed("<i"),
        "\x8a": _integer,
        "G": _fixed(">d"),
        "\x8c": _text("B"),
        "X": _text("<I"),
        "\x8d": _text("<Q"),
        "C": _bytes("B"),
        "B": _bytes("<I"),
        "\x8e": _bytes("<Q"),
        "\x96": _bytes("<Q"),
        "]": lambda m: m.push([]),
        "a": lambda m: m.extend(m.pop(1)),
        "e": lambda m: m.extend(m.pop_mark()),
        "}": lambda m: m.push({}),
        "s": lambda m: m.update(m.pop(2)),
        "u": lambda m: m.update(m.pop_mark()),
        ")": lambda m: m.push(()),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "t": lambda m: m.push(tuple(m.pop_mark())),
        "q": _put("B"),
        "r": _put("<I"),
        "\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
        "h": _get("B"),
        "j": _get("<I"),
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": lambda m: m.name(*m.pop(2)),
        "R": Machine.call,
        "b": Machine.build,
    }.items()
}
