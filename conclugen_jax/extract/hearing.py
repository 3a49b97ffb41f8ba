"""Inputs of the ready audio backbones: items of a decoded clip, made in worker processes."""

import functools
from typing import Any

import numpy as np

from conclugen_jax.extract.media import augmentation, mel
from conclugen_jax.extract.media.augmentation import View
from conclugen_jax.extract.media.clip import SAMPLE_RATE, Clip
from conclugen_jax.extract.networks import whisper

PART = SAMPLE_RATE * 30  # samples that Whisper hears at a time, at most
STEP = 500  # frames; Whisper hears silence after a sound up to a multiple of it: a program is compiled for each length
SHORTEST = SAMPLE_RATE // 10  # samples; openSMILE finds nothing in less


def spectrograms(clip: Clip, view: View | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the inputs of Whisper: spectrograms [n, frames, mels], and the number of states [n] of each that are sound.

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


def functionals(clip: Clip, view: View | None) -> tuple[np.ndarray] | None:
    """Return one item: the 88 functionals of eGeMAPS over the whole sound, float32 [1, 88]; those of all views are the same.

    ``None`` for a clip without sound, or with less than 0.1 s.
    """
    del view
    if clip.sound is None or len(clip.sound) < SHORTEST:
        return None
    return (_smile().process_signal(np.asarray(clip.sound, np.float32), SAMPLE_RATE).to_numpy(np.float32),)


@functools.cache
def _smile() -> Any:
    import opensmile

    return opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
