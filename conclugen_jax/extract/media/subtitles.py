"""Read what is said when: subtitles (.srt, .vtt), tables (.csv) with intervals, and plain text (.txt)."""

import dataclasses
import html
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from conclugen_jax.data.cells import number, read_csv
from conclugen_jax.errors import ConclugenError

MAX_BYTES = 64 * 2**20
"""Largest file of subtitles."""


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Something that is said.

    Attributes:
      start: in seconds from the start of the clip.
      end: in seconds; ``None``: the end of the clip.
      text: words.
    """

    start: float
    end: float | None
    text: str


SUFFIXES = (".srt", ".vtt", ".csv", ".txt")

_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_CUE = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_TAG = re.compile(r"<[^<>]{0,100}>|\{\\[^{}]{0,100}\}")


def beside(clip: Path) -> Path | None:
    """Return the file of subtitles of a clip, which has its name and another ending; ``None`` if there is none."""
    endings = (ending for suffix in SUFFIXES for ending in (suffix, suffix.upper()))
    return next((p for p in map(clip.with_suffix, endings) if p.is_file()), None)


def read(path: Path) -> list[Utterance]:
    """Return the utterances in a file, in the order of their times; none if nothing is said in it.

    Raises:
      ConclugenError: the file cannot be read, or a time in it cannot.
    """
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return [Utterance(0.0, None, " ".join(text.split()))]
    if not text.strip():
        return []
    found = _table(path) if suffix == ".csv" else _cues(path, text)
    if not found and "-->" not in text and suffix != ".csv":
        raise ConclugenError(
            f"{path}: no utterances; expected lines such as 00:00:01,000 --> 00:00:02,500 and text below"
        )
    return sorted(found, key=lambda u: u.start)


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8, UTF-16 with its mark, or else Windows-1252.

    Raises:
      ConclugenError: the file cannot be read or is too large.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConclugenError(f"{path}: {path.stat().st_size} bytes, too large for text; expected subtitles")
        content = path.read_bytes()
    except OSError as e:
        raise ConclugenError(f"{path}: cannot be read ({e.strerror})") from e
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _cues(path: Path, text: str) -> list[Utterance]:
    """Read cues: a line of times and the lines below, up to an empty one or to the next times (and their number)."""
    found: list[Utterance] = []
    lines = text.splitlines()
    at = list(_lines_of_times(lines))
    for i, following in zip(at, [*at, len(lines)][1:], strict=True):
        times = _CUE.fullmatch(lines[i])
        if times is None:
            raise ConclugenError(f"{path}: {lines[i][:80]!r} is no interval; expected 00:00:01,000 --> 00:00:02,500")
        below = lines[i + 1 : following]
        if following < len(lines) and below and below[-1].strip().isdigit():
            below.pop()  # the number of the next cue
        said = itertools.takewhile(str.strip, below)
        words = " ".join(html.unescape(_TAG.sub("", " ".join(said))).split())
        start, end = _seconds(times.groups()[:4]), _seconds(times.groups()[4:])
        if words and start != end:
            found.append(_checked(path, start, end, words))
    return found


def _lines_of_times(lines: list[str]) -> Iterator[int]:
    """Yield where times are: in the first two lines of a block they may be damaged, in a line further below they are not."""
    place, remark, timed = 0, False, False
    for i, line in enumerate(lines):
        place = place + 1 if line.strip() else 0
        if place == 1:
            remark, timed = line.startswith("NOTE"), False
        if "-->" in line and not remark and ((place <= 2 and not timed) or _CUE.fullmatch(line)):
            timed = True
            yield i


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction.ljust(3, "0")) / 1000


def _checked(path: Path, start: float, end: float | None, words: str) -> Utterance:
    if end is not None and not 0 <= start < end < 1e6:
        raise ConclugenError(f"{path}: an utterance from {start:g} s to {end:g} s ({words[:40]!r}); mend its times")
    return Utterance(start, end, words)


def _table(path: Path) -> list[Utterance]:
    """Read columns ``start``, ``end`` (seconds) and ``text``, whatever their case."""
    table = read_csv(path)
    names = {name.lower(): name for name in table.names}
    if len(names) < len(table.names):
        twice = next(name for name in names if sum(name == other.lower() for other in table.names) > 1)
        raise ConclugenError(f"{path}: two columns {twice!r}; leave one out")
    missing = {"start", "end", "text"} - names.keys()
    if missing:
        raise ConclugenError(f"{path}: no column {min(missing)!r}; expected start, end (seconds) and text")
    found = []
    for where, row in table:
        start, end = (number(row[names[name]], f"{where}: {name}", (0, 1e6)) for name in ("start", "end"))
        found.append(_checked(path, start, end, " ".join(row[names["text"]].split())))
    return [u for u in found if u.text]


def said(utterances: list[Utterance], start: float = 0.0, end: float | None = None) -> str | None:
    """Return the words of the utterances that lie in an interval by more than half; ``None`` if nothing is said.

    An utterance without times counts only where the interval is the whole clip (``end`` is ``None``).
    """
    words = []
    for u in utterances:
        if u.end is None:
            inside = end is None
        else:
            inside = min(u.end, u.end if end is None else end) - max(u.start, start) > (u.end - u.start) / 2
        words += [u.text] if inside else []
    return " ".join(words) or None
