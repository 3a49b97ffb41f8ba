"""States as nested dicts of NumPy arrays, as checkpoints hold them: to and from, and hashed."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
from flax import traverse_util

from conclugen_jax.errors import ConclugenError


def to_tree(state: Any) -> dict[str, Any]:
    """Copy a state into nested dicts of NumPy arrays; random keys become their numbers, empty arrays are dropped."""
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
    flat = traverse_util.flatten_dict(flax.serialization.to_state_dict(raw))
    # On a CPU np.asarray would be a view of a buffer that the next step reuses.
    return traverse_util.unflatten_dict({path: np.array(x, copy=True) for path, x in flat.items() if x.size})


def from_tree(tree: Mapping[str, Any], template: Any, *, source: str) -> Any:
    """Return the state that :func:`to_tree` was given, with the structure of a template of arrays or of their shapes.

    Trees from a ``source`` that lack a path, or have one that is spare or of another shape or type, are refused.
    """
    shapes = jax.tree.map(_shape, template)
    expected = traverse_util.flatten_dict(flax.serialization.to_state_dict(shapes), sep="/", keep_empty_nodes=True)
    arrays = {path: x for path, x in expected.items() if hasattr(x, "shape")}
    wanted = {path: x for path, x in arrays.items() if x.size}
    found = traverse_util.flatten_dict(dict(tree), sep="/")
    if wrong := _differences(found, wanted):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConclugenError(
            f"{source}: the checkpoint does not fit the model: {wrong[0]}{more}; use the configuration it was made with"
        )
    empty = {path: np.zeros(x.shape, x.dtype) for path, x in arrays.items() if path not in wanted}
    filled = traverse_util.unflatten_dict({**expected, **empty, **found}, sep="/")
    restored = flax.serialization.from_state_dict(shapes, filled)
    return jax.tree.map(lambda like, x: jax.random.wrap_key_data(x) if _is_key(like) else x, template, restored)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    wrong = []
    for path in sorted({*found, *wanted}):
        ours, theirs = (f"{x[path].dtype}{list(x[path].shape)}" if path in x else "" for x in (found, wanted))
        if not ours:
            wrong.append(f"{path} is missing")
        elif not theirs:
            wrong.append(f"{path} is not part of this model")
        elif ours != theirs:
            wrong.append(f"{path} is {ours}, expected {theirs}")
    return wrong


def fingerprint(tree: Any) -> str:
    """Return the SHA-256 over paths, types, shapes and bytes of all arrays of a tree."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(x)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def size(state: Any) -> int:
    """Return the bytes of a tree of arrays or of their shapes."""
    shapes = jax.tree.leaves(jax.tree.map(_shape, state))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    shaped = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    return jax.ShapeDtypeStruct(shaped.shape, shaped.dtype)
