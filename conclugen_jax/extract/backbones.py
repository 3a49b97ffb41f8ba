"""What turns the media of a clip into a feature vector: the frozen networks, and the interface for others.

A backbone has two functions. ``prepare`` runs in worker processes: a decoded clip -> items, such as frames or windows of them.
``vectors`` runs on the device: a batch of items of many clips -> a vector each. A clip's feature is the mean over its items.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conclugen_jax.errors import ConclugenError, place_of
from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import davenet, resnet, text_encoder, weights
from conclugen_jax.extract.networks.weights import Weights

Items = tuple[np.ndarray, ...]
"""Arrays whose rows belong together, one row for each item of a clip."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
"""Mean and standard deviation of the colours, of ImageNet and as the authors use them for Kinetics-400."""

WINDOW = 16
"""Frames of an item of a 3D network."""

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class View:
    """An augmented view of a clip; the draw follows from these."""

    seed: int
    clip: str
    number: int
    strength: str

    def generator(self, modality: str) -> np.random.Generator:
        """Random numbers of this view of a modality."""
        return augmentation.generator(self.seed, self.clip, modality, self.number)


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
      authors_normalisation: mean and deviation of the colours exchanged for 2D networks, as in the authors' configuration.
      batch_items: frames at a time; 3D networks take a sixteenth of it in windows, at least one.
    """

    size: int = 180
    precision: str = "float32"
    front_end: str = "published"
    authors_normalisation: bool = False
    batch_items: int = 16


def create(loaded: Weights, options: Options) -> Backbone:
    """The backbone of converted weights.

    Raises:
      ConclugenError: weights that make no vectors, or of another shape than the network.
    """
    dtype = PRECISIONS[options.precision]
    make = _sound if loaded.network == "resdavenet" else _text if loaded.network == "text" else _pictures
    if loaded.network == "mtcnn":
        raise ConclugenError(f"{loaded.folder}: MTCNN finds faces and makes no vectors; name it with --mtcnn")
    _check_options(loaded)
    module, prepare, rate, batch, example, facts = make(loaded, options, dtype)
    checked(module, loaded, example)
    params = jax.device_put(loaded.params)

    @jax.jit
    def apply(params: Any, *arrays: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest" if options.precision == "float32" else "default"):
            return module.apply({"params": params}, *arrays)

    dim = jax.eval_shape(apply, params, *example).shape[1]
    provenance = {**loaded.provenance(), "precision": options.precision, **facts}
    vectors = functools.partial(apply, params)
    modality = "audio" if loaded.network == "resdavenet" else "text" if loaded.network == "text" else "video"
    return Backbone(loaded.network, modality, dim, prepare, vectors, rate, batch, provenance)


def _check_options(loaded: Weights) -> None:
    """Compare the options of a network with what there is, before anything is made of them.

    Raises:
      ConclugenError: one is missing, spare, or of another type or range.
    """
    options = loaded.options
    layers = sum(name.startswith("layer") for name in loaded.params)
    ranges: dict[str, tuple[int, int]] = {}
    if loaded.network == "text":
        ranges = dict.fromkeys(("vocabulary", "width", "num_heads", "hidden_dim", "max_positions"), (1, 2**24))
        ranges |= {"num_layers": (max(layers, 1), layers), "first_position": (0, 1024), "num_types": (0, 1024)}
    elif loaded.network == "resdavenet":
        ranges = {"kernel_mels": (1, 1024)}
    others: Mapping[str, Callable[[Any], bool]] = {
        "text": {
            "activation": lambda x: type(x) is str and x in text_encoder.ACTIVATIONS,
            "epsilon": lambda x: type(x) is float and 0 < x < 1,
        },
        "resdavenet": {"widths": lambda x: type(x) is list and len(x) == 5 and all(_is_size(n, 1, 2**14) for n in x)},
    }.get(loaded.network, {})
    wrong = [name for name in options.keys() | ranges.keys() | others.keys() if name not in {**ranges, **others}]
    wrong += [name for name, (least, most) in ranges.items() if not _is_size(options.get(name), least, most)]
    wrong += [name for name, is_right in others.items() if not is_right(options.get(name))]
    if not wrong and loaded.network == "text" and options["width"] % options["num_heads"]:
        wrong = ["num_heads"]
    if wrong:
        name = min(wrong)
        raise ConclugenError(
            f"{loaded.folder}: its options make no network ({name!r} is {repr(options.get(name))[:100]}); {weights.AGAIN}"
        )


def _is_size(n: Any, least: int, most: int) -> bool:
    return type(n) is int and least <= n <= most


def checked(module: Any, loaded: Weights, example: Items) -> None:
    """Compare the variables of converted weights with those that a module has.

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
    """A user's backbone: ``MODULE:FUNCTION``, which is called without arguments.

    Raises:
      ConclugenError: it cannot be imported, or is no backbone; its ``vectors`` raises it too, whatever happens there.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConclugenError(f"--backbone={name}: expected MODULE:FUNCTION, such as mine:colours")
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as e:
        raise ConclugenError(
            f"--backbone={name}: {e}; run the command in the folder of {module}.py, or add that to PYTHONPATH"
        ) from e
    except AttributeError as e:
        raise ConclugenError(f"--backbone={name}: {module} has no function {function!r}") from e
    except Exception as e:  # whatever a user's module does
        raise ConclugenError(f"--backbone={name}: cannot be imported ({type(e).__name__}: {e})") from e
    try:
        made = make()
    except Exception as e:
        raise ConclugenError(
            f"--backbone={name}: {type(e).__name__}: {e}; expected a function without arguments that gives a Backbone"
        ) from e
    if not isinstance(made, Backbone):
        raise ConclugenError(
            f"--backbone={name}: gave a {type(made).__name__}, expected a Backbone (docs/extraction.md)"
        )
    return dataclasses.replace(made, vectors=functools.partial(_vectors_of, made))


def _vectors_of(own: Backbone, *arrays: np.ndarray) -> Any:
    """What a user's function gives; an error in it is told as theirs."""
    try:
        return own.vectors(*arrays)
    except Exception as e:
        if type(e).__name__ == "JaxRuntimeError":  # memory, which is told elsewhere
            raise
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in arrays)
        raise ConclugenError(
            f"backbone {own.name}: its function vectors failed on {shapes}: {type(e).__name__}: {str(e)[:300]} ({place_of(e)})"
        ) from e


def _pictures(loaded: Weights, options: Options, dtype: Any) -> tuple:
    volume = loaded.network.startswith("resnet3d")
    depth = int(loaded.network.removeprefix("resnet3d" if volume else "resnet"))
    mean, std = KINETICS if volume else IMAGENET
    if options.authors_normalisation and not volume:
        mean, std = std, mean
    module = resnet.ResNet(depth, 3 if volume else 2, mean, std, dtype)
    rate = 16.0 if volume else 1.0
    prepare = functools.partial(windows if volume else frames, rate=rate, size=options.size)
    frame = (options.size, options.size, 3)
    batch = max(1, options.batch_items // WINDOW) if volume else options.batch_items
    example = (np.zeros((batch, WINDOW, *frame) if volume else (batch, *frame), np.uint8),)
    facts = {"frames_per_second": rate, "size": options.size, "mean": list(mean), "std": list(std)}
    return module, prepare, rate, batch, example, facts | ({"window": WINDOW} if volume else {})


def _sound(loaded: Weights, options: Options, dtype: Any) -> tuple:
    module = davenet.ResDAVEnet(loaded.options["widths"], loaded.options["kernel_mels"], dtype)
    _, mels = mel.FRONT_ENDS[options.front_end]
    if mels < module.kernel_mels:
        raise ConclugenError(
            f"{loaded.folder}: hears {module.kernel_mels} Mel bands, the front end {options.front_end} has {mels}; choose "
            "another --front_end"
        )
    prepare = functools.partial(spectrogram, front_end=options.front_end)
    example = (np.zeros((4, 256, mels), np.float32), np.full(4, 256, np.int32))
    return module, prepare, 0.0, 4, example, {"front_end": options.front_end, "mels": mels}


def _text(loaded: Weights, options: Options, dtype: Any) -> tuple:
    module = text_encoder.TextEncoder(**loaded.options, dtype=dtype)
    if module.max_tokens < 1:
        raise ConclugenError(f"{loaded.folder}: its options make no network; {weights.AGAIN}")
    path = loaded.folder / weights.TOKENIZER
    tokenizer(str(path), module.max_tokens)  # one that cannot be read is no fault of the clips
    prepare = Tokens(str(path), module.max_tokens)
    example = (np.zeros((8, 32), np.int32), np.ones((8, 32), bool))
    return module, prepare, 0.0, 8, example, {"max_tokens": module.max_tokens}


def frames(clip: Clip, view: View | None, *, rate: float, size: int) -> Items | None:
    """Frames at a rate, uint8 [n, size, size, 3]."""
    pictures = _resized(clip, view, rate, size)
    return (np.stack(pictures),) if pictures else None


def windows(clip: Clip, view: View | None, *, rate: float, size: int) -> Items | None:
    """Windows of 16 frames, one after the other, uint8 [n, 16, size, size, 3].

    A last window with fewer than half of its frames is left out, unless it is the only one; else it is filled up with its
    last frame.
    """
    pictures = _resized(clip, view, rate, size)
    if not pictures:
        return None
    rest = len(pictures) % WINDOW
    if rest and rest < WINDOW / 2 and len(pictures) > WINDOW:
        pictures = pictures[:-rest]
    elif rest:
        pictures = pictures + [pictures[-1]] * (WINDOW - rest)
    return (np.stack(pictures).reshape(-1, WINDOW, size, size, 3),)


def _resized(clip: Clip, view: View | None, rate: float, size: int) -> list[np.ndarray]:
    from conclugen_jax.extract.faces import resize

    small = {id(f): f if f.shape[:2] == (size, size) else resize(f, (size, size)) for f in clip.at_rate(rate)}
    if view is not None:
        change = augmentation.draw_pictures(view.generator("video"), augmentation.STRENGTHS[view.strength])
        small = {key: change.apply(frame) for key, frame in small.items()}
    return [small[id(f)] for f in clip.at_rate(rate)]


LENGTHS = 256
"""Spectrograms are filled up to a multiple of so many frames, of which a program is compiled for each."""


def spectrogram(clip: Clip, view: View | None, *, front_end: str) -> Items | None:
    """One item: a log-Mel spectrogram [1, frames, mels], filled up with zeros, and its length [1]."""
    if clip.sound is None:
        return None
    x = mel.FRONT_ENDS[front_end][0](clip.sound)
    if view is not None:
        x = augmentation.change_sound(x, view.generator("audio"), augmentation.STRENGTHS[view.strength])
    filled = np.pad(x, ((0, -len(x) % LENGTHS), (0, 0)))
    return filled[None], np.array([len(x)], np.int32)


class Tokens:
    """Text -> tokens; the tokenizer is opened where it is used."""

    def __init__(self, path: str, max_tokens: int):
        self.path, self.max_tokens = path, max_tokens

    def __call__(self, clip: Clip, view: View | None) -> Items | None:
        """One item: tokens [1, length], filled up to a power of two from 8 on, and whether each is real."""
        if not clip.text:
            return None
        text = clip.text
        if view is not None:
            text = augmentation.change_text(text, view.generator("text"), augmentation.STRENGTHS[view.strength])
        ids = tokenizer(self.path, self.max_tokens).encode(text).ids
        length = min(max(8, 1 << (len(ids) - 1).bit_length()), self.max_tokens)
        tokens, mask = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
        return tokens, mask


@functools.cache
def tokenizer(path: str, max_tokens: int) -> Any:
    """The tokenizer of a ``tokenizer.json``, which cuts texts off at the longest that the encoder takes.

    Raises:
      ConclugenError: the file cannot be read.
    """
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


@dataclasses.dataclass(frozen=True)
class Networks:
    """Which backbones: light enough to be sent to another process.

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
    """Backbones of folders of weights, then those of users, once in each process.

    Raises:
      ConclugenError: none, two of one name, or one that cannot be loaded.
    """
    found = [create(weights.load(folder), networks.options) for folder in networks.folders]
    found += [load_own(name) for name in networks.own]
    names = [b.name for b in found]
    if not found:
        raise ConclugenError(
            "no backbone; name folders of weights with --weights (see python -m launch.convert_weights)"
        )
    if len(set(names)) < len(names):
        raise ConclugenError(f"two backbones are called {max(names, key=names.count)!r}; give one another name")
    return found
