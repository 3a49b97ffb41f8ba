"""Recognise speech with other packages: sound in, words out."""

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.extract import ready
from conclugen_jax.extract.media.clip import SAMPLE_RATE, SILENCE
from conclugen_jax.extract.media.subtitles import Utterance
from conclugen_jax.system import files

Recogniser = Callable[[np.ndarray], str]  # float32 [samples] at 16 kHz -> words, empty where none are heard
Listener = Callable[[np.ndarray], list[Utterance]]  # the same -> what is said when
MODEL = "model.bin"  # file of a model of faster-whisper
READY = ready.SPEECH
WHISPER = {"precision": "int8", "silence": "5 s"}  # how Whisper hears, see docs/decisions.md: a part of its provenance


def create(name: str) -> Recogniser:
    """Return a recogniser if it is there; see :func:`listener`."""
    listen = listener(name)
    return lambda sound: " ".join(line.text for line in listen(sound))


def listener(name: str) -> Listener:
    """Return a recogniser that says when something is said, too; of ``pocketsphinx`` all is one line without times.

    It is ``pocketsphinx`` (offline, English, poor), ``whisper_tiny`` (English) or ``faster-whisper:MODEL_FOLDER``.
    """
    package, folder = _parts(name)
    if package not in ("pocketsphinx", "faster-whisper") or bool(folder) != (package == "faster-whisper"):
        there = f"pocketsphinx, {READY} or faster-whisper:MODEL_FOLDER"
        raise ConclugenError(f"speech recogniser {name!r} is unknown; use {there}")
    try:
        listen = _whisper(Path(folder)) if folder else _pocketsphinx()
    except ImportError as e:
        raise ConclugenError(f"{package} is not installed: pip install {package}") from e
    return lambda sound: listen(sound) if np.abs(sound).max(initial=0) >= SILENCE else []  # both hear words in silence


def provenance(name: str) -> dict[str, str]:
    """Return what the words of a recogniser (see :func:`create`) depend on besides the sound: JSON."""
    package, folder = _parts(name)
    facts = {"name": name, "version": metadata.version(package)}
    return facts | ({"sha256": files.sha256(Path(folder) / MODEL)} | WHISPER if folder else {})


def _parts(name: str) -> tuple[str, str]:
    """Return package and folder of a recogniser."""
    if name == READY:
        return "faster-whisper", str(ready.paths(READY)[0].parent)
    package, _, folder = name.partition(":")
    return package, folder


def _pocketsphinx() -> Listener:
    from pocketsphinx import Decoder

    decoder, alone = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL"), threading.Lock()

    def listen(sound: np.ndarray) -> list[Utterance]:
        samples = (np.clip(sound, -1, 1) * 32767).astype("<i2")
        with alone:  # Beam's workers have threads
            decoder.reinit_feat()  # otherwise the words depend on earlier clips
            decoder.start_utt()
            decoder.process_raw(samples.tobytes(), full_utt=True)
            decoder.end_utt()
            found = decoder.hyp()
        words = found.hypstr.strip() if found is not None else ""
        return [Utterance(0.0, None, words)] if words else []

    return listen


def _whisper(folder: Path) -> Listener:
    if not (folder / MODEL).is_file():
        raise ConclugenError(f"{folder}: no {MODEL}; name the folder of a model of faster-whisper")
    os.environ.setdefault("CT2_VERBOSE", "-1")  # CTranslate2 warns of weights in half precision otherwise
    from faster_whisper import WhisperModel

    # Several processes with as many threads each as there are cores wait for each other most of the time.
    alone = multiprocessing.parent_process() is None
    with _whole(folder, Exception):  # each of its files has another type of error where it is damaged or absent
        threads = os.cpu_count() or 1 if alone else 1
        model = WhisperModel(str(folder), local_files_only=True, cpu_threads=threads, compute_type=WHISPER["precision"])
    model.encode = functools.partial(_encode_short, model.encode)

    def listen(sound: np.ndarray) -> list[Utterance]:
        with _whole(folder, ValueError):  # a word that the vocabulary lacks
            segments, _ = model.transcribe(sound, temperature=0.0)  # one temperature: the same words every time
            return [Utterance(s.start, s.end, words) for s in segments if (words := s.text.strip())]

    return listen


def _encode_short(encode: Callable, features: np.ndarray) -> Any:
    """Encode a spectrogram [mels, frames of 10 ms] without most of the padding to 30 s: a third of the time for 3 s.

    10 s are encoded at least, and 5 s of padding remain after the sound, else Whisper repeats itself.
    """
    heard = int(np.flatnonzero(features.any(0)).max(initial=0))
    return encode(features[:, : max(1000, -(-(heard + 500) // 500) * 500)])


@contextlib.contextmanager
def _whole(folder: Path, expected: type[Exception]) -> Iterator[None]:
    """Refuse a model of faster-whisper whose use raises an expected error."""
    try:
        yield
    except expected as e:
        raise ConclugenError(
            f"{folder}: not a whole model of faster-whisper ({reason(e)}); install or copy it again"
        ) from e
