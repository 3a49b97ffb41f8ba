"""Use the files beside a clip that begin with its name: its sound and its words."""

import dataclasses
import functools
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from conclugen_jax.data.files import MEDIA, PICTURES, SOUNDS, STILLS
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import subtitles
from conclugen_jax.extract.utterance import Utterance

NO_WORDS, WRONG_LETTERS = "a file beside the clip gives no words", "words may have wrong letters"
LISTED = 3  # files that a note names at most
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")  # en, eng, en-US, pt_BR, zh-Hans, en-orig


class Companions:
    """The files beside clips. Each folder is listed once, and the words beside each clip are read once."""

    def __init__(self):
        self._in = functools.cache(by_clip)
        self.words = functools.cache(self._read)

    def sound(self, clip: Path) -> str:
        """Return the one file of sound that has the name of a file of pictures; empty if there is none, or several."""
        found = self._sounds(clip)
        return str(found[0]) if len(found) == 1 else ""

    def with_words(self, u: Utterance, *, cut: bool = False) -> list[Utterance]:
        """Return an utterance with the words of a file beside its clip, unless its words are known already.

        With ``cut`` each line of subtitles that have times is an utterance. Notes name the files that are not used.
        """
        if u.text is not None:
            return [u]
        lines, notes = self.words(Path(u.path))
        timed = bool(lines) and lines[0].end is not None
        if cut and not timed:
            notes += ("the clip is not cut, as no words with times are beside it",)
        elif lines and not timed and u.end is not None:
            notes += ("the interval has no words, as those beside the clip have no times",)
        u = dataclasses.replace(u, notes=(*u.notes, *notes))
        if cut and timed:
            said = [(f"{u.key}_{i:04d}", line.start, line.end, line.text) for i, line in enumerate(lines)]
            return [dataclasses.replace(u, key=key, start=start, end=end, text=text) for key, start, end, text in said]
        return [dataclasses.replace(u, text=subtitles.said(lines, u.start, u.end))]

    def _of(self, clip: Path) -> list[Path]:
        return [path for path in self._in(clip.parent).get(_stem(clip.name), ()) if path.name != clip.name]

    def _sounds(self, clip: Path) -> list[Path]:
        of = self._of(clip) if clip.suffix.lower() in PICTURES else []
        return [path for path in of if path.suffix.lower() in SOUNDS and not _between(path, clip)[1]]

    def _read(self, clip: Path) -> tuple[list[subtitles.Utterance], tuple[str, ...]]:
        """Return the words of the first file beside a clip in the order of :func:`_rank`, and notes.

        Skip files that cannot be read and files without words.
        """
        files = [path for path in self._of(clip) if path.suffix.lower() not in MEDIA + STILLS]
        ranks = {path: rank for path in files if (rank := _rank(path, clip))}
        wrong = [f"{path}: {_why_not(path, clip)}" for path in files if path not in ranks]
        lines, used, others, letters = [], "", [], []
        for path in sorted(ranks, key=ranks.__getitem__):
            if lines:
                others.append(path.name)
                continue
            try:
                letters, used = [], path.name
                lines = subtitles.read(path, letters)
            except ConclugenError as e:
                wrong.append(str(e))
        sounds = [path.name for path in self._sounds(clip)]
        chosen = [f"{used}, not {_few(others)}; move {used} away to use the next"] if others else []
        return lines, (
            *note("words are those of the first of several files", chosen),
            *note(NO_WORDS, wrong),
            *note(WRONG_LETTERS, letters if lines else []),
            *note("the clip's own sound is used, as several files of sound have its name", sounds[1:] and sounds),
        )


def by_clip(folder: Path) -> Mapping[str, Sequence[Path]]:
    """Return the files of a folder by the name of their clip: the longest one that they begin with, up to a dot."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and not e.is_dir())
    except OSError:  # the clip cannot be decoded either
        return {}
    clips = {_stem(name) for name in names if name.lower().endswith(MEDIA) and not is_full_name(folder / name)}
    found: dict[str, list[Path]] = {}
    for name in names:
        parts = unicodedata.normalize("NFC", name).split(".")
        begins = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
        if owner := next((stem for stem in begins if stem in clips), ""):
            found.setdefault(owner, []).append(folder / name)
    return found


def is_full_name(path: Path) -> bool:
    """Return whether a file is sound that has the whole name of a file of pictures, such as ``talk.mp4.wav``."""
    clip = path.with_suffix("")
    return path.suffix.lower() in SOUNDS and clip.suffix.lower() in PICTURES and clip.is_file()


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def _between(path: Path, clip: Path) -> tuple[bool, str]:
    """Return whether a file's name has the ending of a clip, and the part between the clip's name and its own ending."""
    _, *parts = _stem(path.name)[len(_stem(clip.name)) :].split(".")
    full = bool(parts) and f".{parts[0].lower()}" in MEDIA
    return full, ".".join(parts[full:])


def _rank(path: Path, clip: Path) -> tuple | None:
    """Return the place of a file of words in the order of preference; ``None`` if its name is not that of one.

    Files with times come before plain text; then those without language, English ones, and others in alphabetical order.
    """
    full, language = _between(path, clip)
    ending = path.suffix.lower()
    if ending not in subtitles.SUFFIXES or (language and not _LANGUAGE.fullmatch(language)):
        return None
    english = re.split("[-_]", language.lower())[0] in ("en", "eng")
    return ending == ".txt", bool(language), not english, language, full, subtitles.SUFFIXES.index(ending)


def _why_not(path: Path, clip: Path) -> str:
    if path.suffix.lower() not in subtitles.SUFFIXES:
        return f"words are read from {', '.join(subtitles.SUFFIXES)}"
    return f"{_between(path, clip)[1]!r} is no language; if it holds the words, call it {clip.stem}{path.suffix}"


def note(kind: str, details: Sequence[str]) -> tuple[str, ...]:
    """Return a remark with its details, if any."""
    return (f"{kind} ({_few(details)})",) if details else ()


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return "; ".join(names[:LISTED]) + more
