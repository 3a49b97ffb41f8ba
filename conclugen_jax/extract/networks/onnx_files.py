"""Read the weights of ONNX files, also those stored as 8-bit integers with scales, without the libraries of ONNX.

An ONNX file is a Protocol Buffers message (``onnx.proto``); the numbers below are those of its fields.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conclugen_jax.errors import ConclugenError

GRAPH = 7  # of the model
NODE, INITIALIZER = 1, 5  # of the graph
INPUT, OUTPUT, OPERATION = 1, 2, 4  # of a node
SHAPE, TYPE, NAME, RAW = 1, 2, 8, 9  # of a tensor
TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}


class Node(NamedTuple):
    """An operation of the graph."""

    operation: str
    inputs: list[str]
    outputs: list[str]


def read(path: Path) -> dict[str, np.ndarray]:
    """Return name -> float32 array of the weights of linear layers, norms and embeddings, as PyTorch names and turns them.

    Integers are multiplied by their scales. The kernel of a linear layer has no name in the file: it is the one whose product
    is added to the layer's bias. A ConclugenError says that the file cannot be read.
    """
    try:
        (graph,) = _fields(memoryview(path.read_bytes()))[GRAPH]
        parts = _fields(graph)
        values = dict(map(_tensor, parts[INITIALIZER]))
        named = {name for name, x in values.items() if x.dtype == np.float32}
        products: dict[str, np.ndarray] = {}
        for operation, inputs, (output, *_) in map(_node, parts[NODE]):
            known = [values.get(name) for name in inputs]
            if operation == "Cast" and known[0] is not None:
                values[output] = known[0].astype(np.float32)
            elif operation == "Mul" and all(x is not None for x in known):
                values[output] = known[0] * known[1]
                named.add(output)
            elif operation == "MatMul" and known[1] is not None:
                products[output] = known[1].T
            elif operation == "Add" and inputs[0] in products and inputs[1].endswith(".bias"):
                name = f"{inputs[1].removesuffix('bias')}weight"
                values[name] = products[inputs[0]]
                named.add(name)
    except (KeyError, ValueError, IndexError) as e:
        raise ConclugenError(f"{path}: not an ONNX file that can be read ({e}); fetch it again") from e
    return {name: values[name] for name in named}


def _fields(message: memoryview) -> dict[int, list]:
    """Return number -> values of the fields of a message: integers, or views of bytes."""
    found: dict[int, list] = {}
    for number, value in _each(message):
        found.setdefault(number, []).append(value)
    return found


def _each(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else integer()
        at += size
        if at > len(message):
            raise ValueError("cut off")
        yield number, message[at - size : at]


def _node(message: memoryview) -> Node:
    parts = _fields(message)
    inputs, outputs = ([bytes(name).decode() for name in parts.get(number, ())] for number in (INPUT, OUTPUT))
    return Node(bytes(parts[OPERATION][0]).decode(), inputs, outputs)


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    parts = _fields(message)
    x = np.frombuffer(parts[RAW][0], TYPES[parts[TYPE][0]]).reshape(parts.get(SHAPE, ()))
    return bytes(parts[NAME][0]).decode(), x
