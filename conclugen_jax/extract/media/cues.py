"""Read the cues of .srt and .vtt files: words with times, without markup and repetitions."""

import dataclasses
import functools
import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from conclugen_jax.errors import ConclugenError

FLASH = 0.05  # seconds: a cue this short has no speech
SHOWN = 8  # lines at most that captions keep on the screen
ADJACENT = 0.1  # seconds at most from one cue to the next in captions that roll

_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_INTERVAL = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_LINES = re.compile(r"\r\n|\r|\n")
_BREAK = re.compile(r"<br\s*/?>|\\[Nn]", re.IGNORECASE)
_TAG = re.compile(
    r"<rt>[^<>]{0,200}</rt>"  # how the characters before are pronounced
    r"|</?(?:[biusc]|ruby|rt|v|lang|font)(?:\.[^\s<>]{0,100})?>"
    r"|<(?:c|v|lang|font)(?:\.[^\s<>]{0,100})?\s[^<>]{0,200}>"
    r"|<(?:\d+:)?\d\d:\d\d\.\d{3}>"
    r"|\{\\[^{}]{0,200}\}",
    re.IGNORECASE,
)
"""Markup of SubRip, WebVTT and ASS; other text between < and > is text."""
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z]\w{1,30});", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Cue:
    """Lines that are shown from one time to another, in seconds."""

    start: float
    end: float
    written: list[str]  # lines as they are in the file

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines without markup; some may be empty."""
        return [" ".join(plain(line).split()) for line in self.written]

    @property
    def flashes(self) -> bool:
        """Whether the cue is too short for its words."""
        return self.end - self.start <= FLASH


def is_interval(line: str) -> bool:
    """Return whether a line holds the times of a cue."""
    return _INTERVAL.fullmatch(line) is not None


def plain(text: str) -> str:
    """Return a text without markup."""
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), _TAG.sub("", _BREAK.sub(" ", text)))


def read(path: Path, text: str) -> list[tuple[float, float, str]]:
    """Return start, end and words of the cues in a text, by their starts. Captions that roll are unrolled.

    Raises:
      ConclugenError: times that cannot be read, or a cue that ends before it starts.
    """
    cues = []
    for cue in _cues(path, text):
        if not cue.start <= cue.end < 1e6:
            words = " ".join(cue.lines)[:40]
            raise ConclugenError(f"{path}: {words!r} is from {cue.start:g} s to {cue.end:g} s; correct its times")
        cues += [cue] if cue.start < cue.end else []
    return _unrolled(sorted(cues, key=lambda cue: cue.start))


def _cues(path: Path, text: str) -> list[Cue]:
    """Read cues: a line of times and the lines below, up to an empty one or to the next times (and their number).

    Times may be damaged in the first two lines of a block; a line further below is one of words unless it is all times.
    A line of blanks is not empty: automatic captions begin with one. Where an editor has emptied it, or every second line
    is empty, the words are in the block after that of the times.
    """
    found: list[tuple[re.Match, list[str]]] = []
    for filled, grouped in itertools.groupby(_LINES.split(text), key=bool):
        block, first = list(grouped), len(found)
        if not filled or block[0].startswith("NOTE"):
            continue
        if found and not found[-1][1] and not any("-->" in line for line in block) and not block[0].strip().isdigit():
            found[-1][1].extend(block)
            continue
        for place, line in enumerate(block):
            times = _INTERVAL.fullmatch(line)
            if times is None and "-->" in line and place < 2 and len(found) == first:
                raise ConclugenError(f"{path}: {line[:80]!r} is no interval; expected 00:00:01,000 --> 00:00:02,500")
            if times is not None:
                if len(found) > first and found[-1][1] and found[-1][1][-1].strip().isdigit():
                    found[-1][1].pop()  # the number of this cue
                found.append((times, []))
            elif len(found) > first:
                found[-1][1].append(line)
    return [Cue(_seconds(*times.groups()[:4]), _seconds(*times.groups()[4:]), said) for times, said in found]


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _repeated(before: Cue, cue: Cue) -> int:
    """Return how many of a cue's first lines are the last ones of the cue just before it."""
    shown = list(filter(None, before.lines))
    if cue.start - before.end > ADJACENT:
        return 0
    most = min(len(shown), len(cue.lines), SHOWN)
    return next((k for k in range(most, 0, -1) if cue.lines[:k] == shown[-k:]), 0)


def _roll(cues: Sequence[Cue]) -> bool:
    """Return whether cues repeat lines that are still shown: at least half of those that follow another one.

    Somebody may say the same twice. A line counts as repeated if the cue flashes, has other lines below, or has other markup,
    which follows the words that are spoken.
    """
    count = 0
    for before, cue in itertools.pairwise(cues):
        k = _repeated(before, cue)
        written = list(filter(str.strip, before.written))
        count += bool(k) and (cue.flashes or any(cue.lines[k:]) or cue.written[:k] != written[-k:])
    return 0 < len(cues) - 1 <= 2 * count


def _unrolled(cues: Sequence[Cue]) -> list[tuple[float, float, str]]:
    """Return start, end and words of cues. In captions that roll, repeated lines are dropped.

    The time of a cue with nothing new is that of the words before, and that of a flash belongs to the words after it.
    """
    found: list[tuple[float, float, str]] = []
    rolls, flash = _roll(cues), None
    for i, cue in enumerate(cues):
        k = _repeated(cues[i - 1], cue) if rolls and i else 0
        words = " ".join(filter(None, cue.lines[k:]))
        if words:
            found.append((cue.start if not k or flash is None else flash, cue.end, words))
        elif k and found and not cue.flashes:
            found[-1] = (found[-1][0], max(found[-1][1], cue.end), found[-1][2])
        flash = cue.start if k and cue.flashes and not words else None
    return found
