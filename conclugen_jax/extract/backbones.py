"""Backbones turn the media of a clip into a feature vector: the frozen networks here, and the interface for others.

A backbone has two functions. ``prepare`` runs in worker processes: a decoded clip -> items, such as frames or windows of them.
``vectors`` runs on the device: a batch of items of many clips -> a vector each. A clip's feature is the mean over its items.
"""

import dataclasses
import functools
import importlib
import pickle
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from conclugen_jax.errors import ConclugenError, place_of, reason
from conclugen_jax.extract import hearing, ready
from conclugen_jax.extract.faces import resize
from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.extract.media.augmentation import View
from conclugen_jax.extract.media.clip import MAX_SIDE, SAMPLE_RATE, Clip
from conclugen_jax.extract.networks import davenet, efficientnet, face_api, resnet, text_encoder, weights, whisper
from conclugen_jax.extract.networks.weights import Weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
"""Mean and standard deviation of the colours, of ImageNet and as the authors use them for Kinetics-400."""

WINDOW = 16  # frames of an item of a 3D network
LENGTHS = 256  # spectrograms are padded to a multiple of so many frames: a program is compiled for each length

Items = tuple[np.ndarray, ...]
"""Arrays whose rows belong together, one row for each item of a clip."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen network.

    Attributes:
      name: for messages and the manifest.
      modality: that its vectors are of; those of several backbones of a modality are joined in their order.
      dim: size of its vectors.
      prepare: (clip, view or ``None``) -> items, ``None`` where the clip lacks the modality. It can be sent to other
        processes. It may ignore views that it does not know.
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
    """How backbones are run."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)] = 180  # side of the frames, in pixels
    precision: Literal["float32", "bfloat16"] = "float32"
    front_end: Literal["published", "authors"] = "published"  # of the sound, see mel.FRONT_ENDS
    authors_normalisation: bool = False  # swap mean and deviation of colours for 2D networks, as they do
    batch_items: int = 16  # frames at a time; 3D networks take a sixteenth of it in windows, at least one


def frames(clip: Clip, view: View | None, *, rate: float, size: int, window: int = 0) -> Items | None:
    """Return frames at a rate, uint8 [n, size, size, 3], or windows of them, [n, window, size, size, 3], one after the other.

    A last window with fewer than half of its frames is dropped, unless it is the only one; any other is filled up with its
    last frame. ``None`` for a clip without pictures.
    """
    shown = clip.at_rate(rate)
    if not shown:
        return None
    small = {}
    for f in shown:
        if (id(f), size) not in clip.resized:
            clip.resized[id(f), size] = f if f.shape[:2] == (size, size) else resize(f, (size, size))
        small[id(f)] = clip.resized[id(f), size]
    if view is not None:
        change = augmentation.draw_pictures(view.generator("video"), augmentation.STRENGTHS[view.strength])
        small = {key: change.apply(frame) for key, frame in small.items()}
    pictures = [small[id(f)] for f in shown]
    if not window:
        return (np.stack(pictures),)
    rest = len(pictures) % window
    if 0 < rest < window / 2 and len(pictures) > window:
        del pictures[-rest:]
    elif rest:
        pictures += [pictures[-1]] * (window - rest)
    return (np.stack(pictures).reshape(-1, window, size, size, 3),)


def spectrogram(clip: Clip, view: View | None, *, front_end: str) -> Items | None:
    """Return one item: a log-Mel spectrogram [1, frames, mels], padded with zeros, and its length [1]."""
    if clip.sound is None:
        return None
    x = mel.FRONT_ENDS[front_end][0](clip.sound)
    if view is not None:
        x = augmentation.change_sound(x, view.generator("audio"))
    filled = np.pad(x, ((0, -len(x) % LENGTHS), (0, 0)))
    return filled[None], np.array([len(x)], np.int32)


def tokens(clip: Clip, view: View | None, *, path: str, max_tokens: int) -> Items | None:
    """Return one item: tokens [1, length], padded to a power of two from 8 on, and whether each is real."""
    if not clip.text:
        return None
    text = clip.text
    if view is not None:
        text = augmentation.change_text(text, view.generator("text"))
    ids = tokenizer(path, max_tokens).encode(text).ids
    length = min(max(8, 1 << (len(ids) - 1).bit_length()), max_tokens)
    filled = np.pad(np.array([ids], np.int32), ((0, 0), (0, length - len(ids))))
    return filled, np.arange(length)[None] < len(ids)


@functools.cache
def tokenizer(path: str, max_tokens: int) -> Any:
    """Return the tokenizer of a ``tokenizer.json``, opened once in each process; it truncates texts to ``max_tokens``."""
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise ConclugenError("text needs the package tokenizers: pip install 'conclugen_jax[extract]'") from e
    try:
        found = Tokenizer.from_file(path)
    except Exception as e:  # the library raises this class itself
        raise ConclugenError(f"{path}: not a tokenizer that can be read ({e}); fetch it again") from e
    found.no_padding()
    found.enable_truncation(max_tokens)
    return found


def create(loaded: Weights, options: Options, name: str = "") -> Backbone:
    """Return the backbone of weights, called as its network where it has no name.

    A ConclugenError names weights of another shape, or that make no vectors.
    """
    if loaded.network == "mtcnn":
        raise ConclugenError(f"{loaded.folder}: MTCNN finds faces and makes no vectors; name it with --mtcnn")
    if loaded.network == "egemaps":  # whose functionals are computed in the worker processes
        made = loaded.provenance() | {"version": metadata.version("opensmile")}
        return Backbone(name, "audio", 88, hearing.functionals, lambda x: x, batch_size=1, provenance=made)
    make = MAKERS.get(loaded.network, _pictures)
    try:
        msgspec.convert(loaded.options, weights.OPTIONS[loaded.network])
        modality, module, prepare, rate, example, facts = make(loaded, options, jnp.dtype(options.precision))
        shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    except (msgspec.ValidationError, TypeError, ValueError, ArithmeticError) as e:
        raise ConclugenError(f"{loaded.folder}: its options make no network ({reason(e)}); {weights.AGAIN}") from e
    expected, found = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (shapes, loaded.params))
    for path in sorted(expected.keys() | found.keys(), key=str):
        a, b = (getattr(tree.get(path), "shape", None) for tree in (expected, found))
        if a != b:
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConclugenError(f"{loaded.folder}: {key} has the shape {b}, expected {a}; {weights.AGAIN}")
    params = jax.device_put(loaded.params)

    @jax.jit
    def apply(params: Any, *arrays: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest" if options.precision == "float32" else "default"):
            return module.apply({"params": params}, *arrays)

    batch, dim = len(example[0]), jax.eval_shape(apply, params, *example).shape[1]
    provenance = {**loaded.provenance(), "precision": options.precision, **facts}
    return Backbone(
        name or loaded.network, modality, dim, prepare, functools.partial(apply, params), rate, batch, provenance
    )


def load_own(name: str) -> Backbone:
    """Call a user's ``MODULE:FUNCTION`` without arguments and return its backbone; turn its failures into ConclugenError."""
    module, colon, function = name.partition(":")
    if not colon:
        there = f"{', '.join(ready.READY)}, or MODULE:FUNCTION of your own, such as mine:colours"
        raise ConclugenError(f"--backbone={name}: no backbone of this name; there are {there}")
    try:
        made = getattr(importlib.import_module(module), function)()
        if not isinstance(made, Backbone):
            raise TypeError(f"gave a {type(made).__name__}")
        pickle.dumps(made.prepare)  # worker processes call it
    except (Exception, SystemExit) as e:  # whatever a user's module does
        expected = "MODULE:FUNCTION, such as mine:colours for mine.py in this folder or in PYTHONPATH"
        gives = "a function without arguments that gives a Backbone whose prepare is a function at the top of a module"
        raise ConclugenError(f"--backbone={name}: {type(e).__name__}: {e}; expected {expected}, {gives}") from e

    def vectors(*arrays: np.ndarray) -> Any:
        try:
            return made.vectors(*arrays)
        except (Exception, SystemExit) as e:
            if type(e).__name__ == "JaxRuntimeError":  # out of memory, which is reported elsewhere
                raise
            shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in arrays)
            fault = f"{type(e).__name__}: {str(e)[:300]} ({place_of(e)})"
            raise ConclugenError(f"backbone {made.name}: its function vectors failed on {shapes}: {fault}") from e

    return dataclasses.replace(made, vectors=vectors)


def _pictures(loaded: Weights, options: Options, dtype: Any) -> tuple:
    depth, axes = resnet.NETWORKS[loaded.network]
    volume = axes == 3
    mean, std = KINETICS if volume else IMAGENET
    if options.authors_normalisation and not volume:
        mean, std = std, mean
    module = resnet.ResNet(depth, mean, std, dtype)
    rate, size, window = 16.0 if volume else 1.0, options.size, {"window": WINDOW} if volume else {}
    prepare = functools.partial(frames, rate=rate, size=size, **window)
    batch = (max(1, options.batch_items // WINDOW), WINDOW) if volume else (options.batch_items,)
    facts = {"frames_per_second": rate, "size": size, "mean": list(mean), "std": list(std), **window}
    return "video", module, prepare, rate, (np.zeros((*batch, size, size, 3), np.uint8),), facts


def _efficientnet(loaded: Weights, options: Options, dtype: Any) -> tuple:
    size, rate = efficientnet.SIZE, 1.0
    prepare, module = functools.partial(frames, rate=rate, size=size), efficientnet.EfficientNetLite0(dtype)
    facts = {"frames_per_second": rate, "size": size}
    return "video", module, prepare, rate, (np.zeros((options.batch_items, size, size, 3), np.uint8),), facts


def _face(loaded: Weights, options: Options, dtype: Any) -> tuple:
    prepare = functools.partial(frames, rate=face_api.RATE, size=face_api.SIZE)
    example = (np.zeros((options.batch_items, face_api.SIZE, face_api.SIZE, 3), np.uint8),)
    facts = {"frames_per_second": face_api.RATE, "size": face_api.SIZE}
    if loaded.network == "face_landmarks":
        return "landmarks", face_api.Landmarks(dtype), prepare, face_api.RATE, example, facts
    facts["expressions"] = list(face_api.EXPRESSIONS)
    return "video", face_api.Expression(dtype), prepare, face_api.RATE, example, facts


def _sound(loaded: Weights, options: Options, dtype: Any) -> tuple:
    module = davenet.ResDAVEnet(**loaded.options, dtype=dtype)
    _, mels = mel.FRONT_ENDS[options.front_end]
    if mels < module.kernel_mels:
        fault = f"hears {module.kernel_mels} Mel bands, the front end {options.front_end} has {mels}"
        raise ConclugenError(f"{loaded.folder}: {fault}; choose another --front_end")
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


def _whisper(loaded: Weights, options: Options, dtype: Any) -> tuple:
    module, facts = whisper.WhisperEncoder(dtype=dtype), {"seconds": hearing.PART // SAMPLE_RATE, "step": hearing.STEP}
    example = np.zeros((4, hearing.STEP, whisper.MELS), np.float32), np.ones(4, np.int32)
    return "audio", module, hearing.spectrograms, 0.0, example, facts


MAKERS = {"resdavenet": _sound, "text": _text, "efficientnet_lite0": _efficientnet, "whisper_tiny": _whisper}
MAKERS |= {"face_expression": _face, "face_landmarks": _face}
"""Network -> what makes its module, function ``prepare``, rate, a batch of zeros and facts; residual networks are not here."""


@dataclasses.dataclass(frozen=True)
class Networks:
    """Which backbones to load; can be sent to other processes."""

    folders: tuple[str, ...] = ()  # of converted weights
    own: tuple[str, ...] = ()  # names of ready ones, or of users, as ``MODULE:FUNCTION``
    options: Options = dataclasses.field(default_factory=Options)  # how they are run


@functools.cache
def load(networks: Networks) -> list[Backbone]:
    """Load the backbones of folders of weights, then those named, once in each process; raise for none or equal names."""
    found = [create(weights.load(folder), networks.options) for folder in networks.folders]
    for name in networks.own:
        found.append(create(ready.load(name), networks.options, name) if name in ready.READY else load_own(name))
    names = [b.name for b in found]
    if not found:
        ways = f"a ready one with --backbone ({', '.join(ready.READY)}), or folders of weights with --weights"
        raise ConclugenError(f"no backbone; name {ways} (see conclugen convert_weights)")
    if len(set(names)) < len(names):
        raise ConclugenError(f"two backbones are called {max(names, key=names.count)!r}; give one another name")
    return found
