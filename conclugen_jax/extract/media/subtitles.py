"""Read what is said when: subtitles (.srt, .vtt), tables (.csv) with intervals, and plain text (.txt)."""

import dataclasses
import html
import itertools
import re
from pathlib import Path

from conclugen_jax.data.cells import number, read_csv
from conclugen_jax.data.files import read_whole
from conclugen_jax.errors import ConclugenError

MAX_BYTES = 64 * 2**20  # of a file of subtitles
SUFFIXES = (".srt", ".vtt", ".csv", ".txt")

_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_TAG = re.compile(r"<[^<>]{0,100}>|\{\\[^{}]{0,100}\}")


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Something that is said: its words, and start and end in seconds of the clip; an end of ``None`` is that of the clip."""

    start: float
    end: float | None
    text: str


def beside(clip: Path) -> Path | None:
    """Return the file of subtitles of a clip, which has its name and another ending; ``None`` if there is none."""
    endings = (ending for suffix in SUFFIXES for ending in (suffix, suffix.upper()))
    return next((p for p in map(clip.with_suffix, endings) if p.is_file()), None)


def read(path: Path) -> list[Utterance]:
    """Return the utterances in a file, by their times; none if nothing is said. A ConclugenError says what cannot be read."""
    text, suffix = read_text(path), path.suffix.lower()
    if suffix == ".txt":
        return [Utterance(0.0, None, " ".join(text.split()))]
    if not text.strip():
        return []
    if suffix != ".csv" and "-->" not in text:
        raise ConclugenError(f"{path}: no utterances; expected 00:00:01,000 --> 00:00:02,500 and such, with text below")
    found = _table(path) if suffix == ".csv" else _cues(path, text)
    for u in found:
        if not 0 <= u.start < u.end < 1e6:
            raise ConclugenError(f"{path}: {u.text[:40]!r} is from {u.start:g} s to {u.end:g} s; correct its times")
    return sorted((u for u in found if u.text), key=lambda u: u.start)


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8, UTF-16 with its mark, or else Windows-1252; a ConclugenError says why it cannot."""
    content = read_whole(path, MAX_BYTES)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _cues(path: Path, text: str) -> list[Utterance]:
    """Read cues: a line of times and the lines below, up to an empty one or to the next times (and their number).

    Times may be damaged in the first two lines of a block; a line further below is one of words unless it is all times.
    """
    found = []
    for filled, lines in itertools.groupby(text.splitlines(), key=lambda line: bool(line.strip())):
        cues: list[tuple[re.Match, list[str]]] = []
        for place, line in enumerate(lines if filled else ()):
            times = _CUE.fullmatch(line)
            if place == 0 and line.startswith("NOTE"):
                break
            if times is None and "-->" in line and place < 2 and not cues:
                raise ConclugenError(f"{path}: {line[:80]!r} is no interval; expected 00:00:01,000 --> 00:00:02,500")
            if times is not None:
                if cues and cues[-1][1] and cues[-1][1][-1].strip().isdigit():
                    cues[-1][1].pop()  # the number of this cue
                cues.append((times, []))
            elif cues:
                cues[-1][1].append(line)
        for times, said in cues:
            start, end = _seconds(*times.groups()[:4]), _seconds(*times.groups()[4:])
            words = " ".join(html.unescape(_TAG.sub("", " ".join(said))).split())
            if words and start != end:
                found.append(Utterance(start, end, words))
    return found


def _seconds(hours: str | None, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _table(path: Path) -> list[Utterance]:
    """Read columns ``start``, ``end`` (seconds) and ``text``, whatever their case."""
    table = read_csv(path)
    lowered = [name.lower() for name in table.columns]
    for name in ("start", "end", "text"):
        if (count := lowered.count(name)) != 1:
            raise ConclugenError(f"{path}: {count} columns {name!r}; expected one each of start, end (seconds), text")
    found = []
    for where, row in table:
        cells = dict(zip(lowered, row.values(), strict=True))
        start, end = (number(cells[name], f"{where}: {name}", (0, 1e6)) for name in ("start", "end"))
        found.append(Utterance(start, end, " ".join(cells["text"].split())))
    return found


def said(utterances: list[Utterance], start: float = 0.0, end: float | None = None) -> str | None:
    """Return the words of the utterances that lie in an interval by more than half; ``None`` if nothing is said.

    An utterance without times counts only where the interval is the whole clip (``end`` is ``None``).
    """
    words = []
    for u in utterances:
        last = u.end if end is None else end
        inside = end is None if u.end is None else min(u.end, last) - max(u.start, start) > (u.end - u.start) / 2
        words += [u.text] if inside else []
    return " ".join(words) or None
