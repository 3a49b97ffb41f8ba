"""Use the files beside a clip that have its name: its sound, and the words that are said in it."""

import dataclasses
import glob
from collections.abc import Callable
from pathlib import Path

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.media import subtitles
from conclugen_jax.extract.utterance import PICTURES, SOUNDS, Utterance


def sound_beside(path: Path) -> str:
    """Return the one file of sound that has the name of a file of pictures; empty if there is none, or several."""
    if path.suffix.lower() not in PICTURES:
        return ""
    beside = path.parent.glob(f"{glob.escape(path.stem)}.*")
    found = [str(p) for p in beside if p.stem == path.stem and p.suffix.lower() in SOUNDS]
    return found[0] if len(found) == 1 else ""


def with_words(
    u: Utterance, *, cut: bool = False, read: Callable[[Path], list[subtitles.Utterance]] = subtitles.read
) -> list[Utterance]:
    """Return an utterance with the words of the subtitles beside its clip, unless its words are known already.

    With ``cut`` each line of subtitles that have times is an utterance. Subtitles that ``read`` refuses become a problem.
    """
    path = subtitles.beside(Path(u.path)) if u.text is None else None
    if path is None:
        return [u]
    try:
        lines = read(path)
    except ConclugenError as e:
        return [dataclasses.replace(u, problem=str(e))]
    if cut and lines and lines[0].end is not None:
        cues = [(f"{u.key}_{i:04d}", line.start, line.end, line.text) for i, line in enumerate(lines)]
        return [dataclasses.replace(u, key=key, start=start, end=end, text=text) for key, start, end, text in cues]
    return [dataclasses.replace(u, text=subtitles.said(lines, u.start, u.end))]
