"""Turn a decoded clip, or an augmented view of it, into what networks see: frames, windows of them, a spectrogram, tokens."""

import dataclasses
import functools
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.faces import resize
from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.extract.media.clip import Clip

Items = tuple[np.ndarray, ...]
"""Arrays whose rows belong together, one row for each item of a clip."""

WINDOW = 16
"""Frames of an item of a 3D network."""

LENGTHS = 256
"""Spectrograms are padded to a multiple of so many frames: a program is compiled for each length."""


@dataclasses.dataclass(frozen=True)
class View:
    """An augmented view of a clip; the draw follows from these."""

    seed: int
    clip: str
    number: int
    strength: str

    def generator(self, modality: str) -> np.random.Generator:
        """Return the random numbers of this view of a modality."""
        return augmentation.generator(self.seed, self.clip, modality, self.number)


def _pictures(clip: Clip, view: View | None, rate: float, size: int) -> list[np.ndarray]:
    shown = clip.at_rate(rate)
    small = {id(f): f if f.shape[:2] == (size, size) else resize(f, (size, size)) for f in shown}
    if view is not None:
        change = augmentation.draw_pictures(view.generator("video"), augmentation.STRENGTHS[view.strength])
        small = {key: change.apply(frame) for key, frame in small.items()}
    return [small[id(f)] for f in shown]


def frames(clip: Clip, view: View | None, *, rate: float, size: int) -> Items | None:
    """Return frames at a rate, uint8 [n, size, size, 3]; ``None`` for a clip without pictures."""
    pictures = _pictures(clip, view, rate, size)
    return (np.stack(pictures),) if pictures else None


def windows(clip: Clip, view: View | None, *, rate: float, size: int) -> Items | None:
    """Return windows of 16 frames, one after the other, uint8 [n, 16, size, size, 3]; ``None`` for a clip without pictures.

    A last window with fewer than half of its frames is dropped, unless it is the only one; any other is filled up with its
    last frame.
    """
    pictures = _pictures(clip, view, rate, size)
    if not pictures:
        return None
    rest = len(pictures) % WINDOW
    if 0 < rest < WINDOW / 2 and len(pictures) > WINDOW:
        del pictures[-rest:]
    elif rest:
        pictures += [pictures[-1]] * (WINDOW - rest)
    return (np.stack(pictures).reshape(-1, WINDOW, size, size, 3),)


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
    """Return the tokenizer of a ``tokenizer.json``, opened once in each process; it truncates texts to ``max_tokens``.

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
