"""Recognise speech with other packages: sound in, words out."""

import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media.clip import SAMPLE_RATE, SILENCE
from conclugen_jax.system import files

Recogniser = Callable[[np.ndarray], str]  # float32 [samples] at 16 kHz -> words, empty where none are heard
MODEL = "model.bin"  # file of a model of faster-whisper


def create(name: str) -> Recogniser:
    """Return a recogniser, ``pocketsphinx`` (offline, English, poor) or ``faster-whisper:MODEL_FOLDER``, if it is there."""
    package, _, folder = name.partition(":")
    if package not in ("pocketsphinx", "faster-whisper") or bool(folder) != (package == "faster-whisper"):
        raise ConclugenError(f"speech recogniser {name!r} is unknown; use pocketsphinx or faster-whisper:MODEL_FOLDER")
    try:
        return _whisper(Path(folder)) if folder else _pocketsphinx()
    except ImportError as e:
        raise ConclugenError(f"{package} is not installed: pip install {package}") from e


def provenance(name: str) -> dict[str, str]:
    """Return what the words of a recogniser (see :func:`create`) depend on besides the sound: JSON."""
    package, _, folder = name.partition(":")
    facts = {"name": name, "version": metadata.version(package)}
    return facts | ({"sha256": files.sha256(Path(folder) / MODEL)} if folder else {})


def _pocketsphinx() -> Recogniser:
    from pocketsphinx import Decoder

    decoder, alone = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL"), threading.Lock()

    def recognise(sound: np.ndarray) -> str:
        if np.abs(sound).max(initial=0) < SILENCE:
            return ""  # PocketSphinx hears words in silence
        samples = (np.clip(sound, -1, 1) * 32767).astype("<i2")
        with alone:  # Beam's workers have threads
            decoder.reinit_feat()  # otherwise the words depend on earlier clips
            decoder.start_utt()
            decoder.process_raw(samples.tobytes(), full_utt=True)
            decoder.end_utt()
            found = decoder.hyp()
            return found.hypstr.strip() if found is not None else ""

    return recognise


def _whisper(folder: Path) -> Recogniser:
    if not (folder / MODEL).is_file():
        raise ConclugenError(f"{folder}: no {MODEL}; name the folder of a model of faster-whisper")
    from faster_whisper import WhisperModel

    model = WhisperModel(str(folder), local_files_only=True)

    def recognise(sound: np.ndarray) -> str:
        segments, _ = model.transcribe(sound, temperature=0.0)  # one temperature: the same words every time
        return " ".join(segment.text.strip() for segment in segments)

    return recognise
