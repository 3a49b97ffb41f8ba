"""What the ready backbones of sound take: items of a decoded clip, made in worker processes."""

import numpy as np

from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.extract.media.augmentation import View
from conclugen_jax.extract.media.clip import SAMPLE_RATE, Clip
from conclugen_jax.extract.networks import whisper

PART = SAMPLE_RATE * 30  # samples that Whisper hears at a time, at most
STEP = 500  # frames; Whisper hears silence after a sound up to a multiple of it: a program is compiled for each length


def spectrograms(clip: Clip, view: View | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what Whisper hears of a clip: spectrograms [n, frames, mels], and how many states [n] of each are sound.

    A sound of more than 30 s is cut into equal parts. ``None`` for a clip without sound.
    """
    if clip.sound is None or not len(clip.sound):
        return None
    parts = np.array_split(clip.sound, -(-len(clip.sound) // PART))
    hop = SAMPLE_RATE // 100
    frames = min(whisper.FRAMES, -(-len(parts[0]) // (hop * STEP)) * STEP)
    heard, rng = [mel.whisper(part, frames) for part in parts], view.generator("audio") if view else None
    for x, part in zip(heard, parts, strict=True):
        if rng is not None:
            length = -(-len(part) // hop)
            x[:length] = augmentation.change_sound(x[:length], rng)
    return np.stack(heard), np.array([-(-len(part) // whisper.STATE) for part in parts], np.int32)
