"""Backbones turn the media of a clip into a feature vector: the frozen networks here, and the interface for others.

A backbone has two functions. ``prepare`` runs in worker processes: a decoded clip -> items, such as frames or windows of them.
``vectors`` runs on the device: a batch of items of many clips -> a vector each. A clip's feature is the mean over its items.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from conclugen_jax.errors import ConclugenError, place_of
from conclugen_jax.extract.items import WINDOW, Items, View, frames, spectrogram, tokenizer, tokens, windows
from conclugen_jax.extract.media import mel
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.media.sampler import MAX_SIDE
from conclugen_jax.extract.networks import davenet, resnet, text_encoder, weights
from conclugen_jax.extract.networks.weights import Weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
"""Mean and standard deviation of the colours, of ImageNet and as the authors use them for Kinetics-400."""

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen network.

    Attributes:
      name: for messages and the manifest.
      modality: that its vectors are of; those of several backbones of a modality are joined in their order.
      dim: size of its vectors.
      prepare: (clip, view or ``None``) -> items, ``None`` where the clip lacks the modality. It can be sent to other
        processes; a view that it knows nothing of it may ignore.
      vectors: arrays of n items -> float [n, dim].
      rate: frames per second that it looks at; 0 for none.
      batch_size: items that ``vectors`` takes at a time; it is always called with so many.
      provenance: what the vectors depend on, such as hashes of weights, for the manifest; JSON.
    """

    name: str
    modality: str
    dim: int
    prepare: Callable[[Clip, View | None], Items | None]
    vectors: Callable[..., Any]
    rate: float = 0.0
    batch_size: int = 8
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Options:
    """How backbones are run.

    Attributes:
      size: side of the frames, in pixels.
      precision: ``float32`` or ``bfloat16``.
      front_end: of the sound, a key of :data:`conclugen_jax.extract.media.mel.FRONT_ENDS`.
      authors_normalisation: swap mean and deviation of the colours for 2D networks, as the authors' configuration does.
      batch_items: frames at a time; 3D networks take a sixteenth of it in windows, at least one.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)] = 180
    precision: Literal["float32", "bfloat16"] = "float32"
    front_end: Literal["published", "authors"] = "published"
    authors_normalisation: bool = False
    batch_items: int = 16


def create(loaded: Weights, options: Options) -> Backbone:
    """Return the backbone of converted weights.

    Raises:
      ConclugenError: weights that make no vectors, or of another shape than the network.
    """
    dtype, network = PRECISIONS[options.precision], loaded.network
    if network == "mtcnn":
        raise ConclugenError(f"{loaded.folder}: MTCNN finds faces and makes no vectors; name it with --mtcnn")
    try:
        msgspec.convert(loaded.options, weights.OPTIONS[network])
    except msgspec.ValidationError as e:
        raise ConclugenError(f"{loaded.folder}: its options make no network ({e}); {weights.AGAIN}") from e
    make = {"resdavenet": _sound, "text": _text}.get(network, _pictures)
    modality, module, prepare, rate, example, facts = make(loaded, options, dtype)
    checked(module, loaded, example)
    params = jax.device_put(loaded.params)

    @jax.jit
    def apply(params: Any, *arrays: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest" if options.precision == "float32" else "default"):
            return module.apply({"params": params}, *arrays)

    batch, dim = len(example[0]), jax.eval_shape(apply, params, *example).shape[1]
    provenance = {**loaded.provenance(), "precision": options.precision, **facts}
    return Backbone(network, modality, dim, prepare, functools.partial(apply, params), rate, batch, provenance)


def checked(module: Any, loaded: Weights, example: Items) -> None:
    """Compare the variables of converted weights with those of a module.

    Raises:
      ConclugenError: one is missing, spare or misshapen.
    """
    try:
        shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    except (TypeError, ValueError, ArithmeticError) as e:
        reason = str(e).partition("\n")[0][:200]
        raise ConclugenError(f"{loaded.folder}: its options make no network ({reason}); {weights.AGAIN}") from e
    expected, found = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (shapes, loaded.params))
    for path in sorted(expected.keys() | found.keys(), key=str):
        a, b = (getattr(tree.get(path), "shape", None) for tree in (expected, found))
        if a != b:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConclugenError(f"{loaded.folder}: {name} has the shape {b}, expected {a}; {weights.AGAIN}")


def load_own(name: str) -> Backbone:
    """Return a user's backbone: ``MODULE:FUNCTION`` is called without arguments.

    Raises:
      ConclugenError: it cannot be imported, or is no backbone; its ``vectors`` raises it too, whatever happens there.
    """
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
        if not isinstance(made, Backbone):
            raise TypeError(f"gave a {type(made).__name__}")
    except Exception as e:  # whatever a user's module does
        raise ConclugenError(
            f"--backbone={name}: {type(e).__name__}: {e}; expected MODULE:FUNCTION, such as mine:colours for mine.py in this "
            "folder or in PYTHONPATH, a function without arguments that gives a Backbone (docs/extraction.md)"
        ) from e
    return dataclasses.replace(made, vectors=functools.partial(_vectors_of, made))


def _vectors_of(own: Backbone, *arrays: np.ndarray) -> Any:
    """Call the user's ``vectors`` and attribute its errors to it."""
    try:
        return own.vectors(*arrays)
    except Exception as e:
        if type(e).__name__ == "JaxRuntimeError":  # out of memory, which is reported elsewhere
            raise
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in arrays)
        raise ConclugenError(
            f"backbone {own.name}: its function vectors failed on {shapes}: {type(e).__name__}: {str(e)[:300]} ({place_of(e)})"
        ) from e


def _pictures(loaded: Weights, options: Options, dtype: Any) -> tuple:
    depth, axes = resnet.NETWORKS[loaded.network]
    volume = axes == 3
    mean, std = KINETICS if volume else IMAGENET
    if options.authors_normalisation and not volume:
        mean, std = std, mean
    module = resnet.ResNet(depth, mean, std, dtype)
    rate, size = 16.0 if volume else 1.0, options.size
    prepare = functools.partial(windows if volume else frames, rate=rate, size=size)
    batch = (max(1, options.batch_items // WINDOW), WINDOW) if volume else (options.batch_items,)
    facts = {"frames_per_second": rate, "size": size, "mean": list(mean), "std": list(std)}
    facts |= {"window": WINDOW} if volume else {}
    return "video", module, prepare, rate, (np.zeros((*batch, size, size, 3), np.uint8),), facts


def _sound(loaded: Weights, options: Options, dtype: Any) -> tuple:
    module = davenet.ResDAVEnet(**loaded.options, dtype=dtype)
    _, mels = mel.FRONT_ENDS[options.front_end]
    if mels < module.kernel_mels:
        raise ConclugenError(
            f"{loaded.folder}: hears {module.kernel_mels} Mel bands, the front end {options.front_end} has {mels}; choose "
            "another --front_end"
        )
    prepare = functools.partial(spectrogram, front_end=options.front_end)
    example = np.zeros((4, 256, mels), np.float32), np.full(4, 256, np.int32)
    return "audio", module, prepare, 0.0, example, {"front_end": options.front_end, "mels": mels}


def _text(loaded: Weights, options: Options, dtype: Any) -> tuple:
    described = text_encoder.Options(**loaded.options)
    module, max_tokens = text_encoder.TextEncoder(described, dtype), described.max_tokens
    path = str(loaded.folder / weights.TOKENIZER)
    tokenizer(path, max_tokens)  # one that cannot be read is no fault of the clips
    prepare = functools.partial(tokens, path=path, max_tokens=max_tokens)
    example = np.zeros((8, 32), np.int32), np.ones((8, 32), bool)
    return "text", module, prepare, 0.0, example, {"max_tokens": max_tokens}


@dataclasses.dataclass(frozen=True)
class Networks:
    """Which backbones to load; can be sent to other processes.

    Attributes:
      folders: of converted weights.
      own: of users, as ``MODULE:FUNCTION``.
      options: how they are run.
    """

    folders: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    options: Options = dataclasses.field(default_factory=Options)


@functools.cache
def load(networks: Networks) -> list[Backbone]:
    """Load the backbones of folders of weights, then those of users, once in each process.

    Raises:
      ConclugenError: none, two of one name, or one that cannot be loaded.
    """
    found = [create(weights.load(folder), networks.options) for folder in networks.folders]
    found += [load_own(name) for name in networks.own]
    names = [b.name for b in found]
    if not found:
        raise ConclugenError("no backbone; name folders of weights with --weights (see conclugen convert_weights)")
    if len(set(names)) < len(names):
        raise ConclugenError(f"two backbones are called {max(names, key=names.count)!r}; give one another name")
    return found
