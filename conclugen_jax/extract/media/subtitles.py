"""Read and check words with times: subtitles, transcripts of whisper, tables with intervals, and plain text."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import msgspec

from conclugen_jax.data.cells import number, read_csv
from conclugen_jax.data.files import read_whole
from conclugen_jax.data.text import decoded
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.extract.media import cues

MAX_BYTES = 64 * 2**20  # of a file of subtitles
SUFFIXES = (".srt", ".vtt", ".csv", ".tsv", ".json", ".txt")  # the last one has no times

_NUMBER = r"-?\d+\.\d+"
_NO_WORDS = (
    ("lines with times", re.compile(r"\W?(\d{1,2}:\d\d|\d{4}-\d\d-\d\d)")),
    ("a log", re.compile(r"\W?(DEBUG|INFO|WARN|WARNING|ERROR)\b")),
    ("a table of numbers", re.compile(rf"(.*[\s,;])?{_NUMBER}[\s,;]+{_NUMBER}([\s,;]|$)|-?\d+(\.\d+)?\t")),
)
"""How lines begin that are not words alone."""


@dataclasses.dataclass(frozen=True)
class Utterance:
    """Words with their start and end in seconds of the clip; an end of ``None`` is that of the clip."""

    start: float
    end: float | None
    text: str


class Segment(msgspec.Struct):
    """Part of a transcript of whisper and tools like it, with times in seconds."""

    start: float
    end: float
    text: str


class Transcript(msgspec.Struct):
    """What whisper and WhisperX write as JSON."""

    segments: list[Segment]


def read(path: Path, remarks: list[str] | None = None) -> list[Utterance]:
    """Return the utterances in a file, by their times; none if nothing is said.

    Args:
      path: file with one of :data:`SUFFIXES`.
      remarks: list to append remarks for the user to.

    Raises:
      ConclugenError: content other than the ending says, or damaged.
    """
    text, suffix = read_text(path, remarks), path.suffix.lower()
    if not text.strip():
        return []
    if suffix == ".txt" and not any(map(cues.is_interval, text.splitlines())):
        return [Utterance(0.0, None, _plain(path, text))]
    if suffix not in (".csv", ".tsv", ".json") and "-->" not in text:
        raise ConclugenError(f"{path}: no utterances; expected 00:00:01,000 --> 00:00:02,500 and such, with text below")
    found = {".csv": _table, ".tsv": _milliseconds, ".json": _transcript}.get(suffix, _cues)(path, text)
    for u in found:
        if not 0 <= u.start < u.end < 1e6:
            raise ConclugenError(f"{path}: {u.text[:40]!r} is from {u.start:g} s to {u.end:g} s; correct its times")
    return sorted((u for u in found if u.text), key=lambda u: u.start)


def read_text(path: Path, remarks: list[str] | None = None) -> str:
    """Return a file's text; a remark says where its encoding is a guess, a ConclugenError why it cannot be read."""
    text, remark = decoded(read_whole(path, MAX_BYTES), path)
    if remark and remarks is not None:
        remarks.append(f"{path}: {remark}")
    return text


def _cues(path: Path, text: str) -> list[Utterance]:
    return [Utterance(start, end, words) for start, end, words in cues.read(path, text)]


def _plain(path: Path, text: str) -> str:
    """Return the words of a text; of a transcript of LRS2 or LRS3 those in its line ``Text:``."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines[0].startswith("Text:") and any(line.startswith(("Conf:", "WORD START")) for line in lines[1:]):
        return " ".join(lines[0].removeprefix("Text:").split())
    if what := _no_words(text, lines):
        raise ConclugenError(f"{path}: holds {what}, expected words alone; save words with times as .srt or .vtt")
    return " ".join(text.split())


def _no_words(text: str, lines: list[str]) -> str:
    """Return the other content of a text, such as markup; empty if it may be words alone."""
    if re.search(r"\d:\d\d\S*\s*-->", text):
        return _NO_WORDS[0][0]
    if text.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            return "JSON"
    most = [what for what, begins in _NO_WORDS if 2 * sum(map(bool, map(begins.match, lines))) >= len(lines)]
    return most[0] if most and (len(lines) > 1 or not any(map(str.isalpha, text))) else ""


def _milliseconds(path: Path, text: str) -> list[Utterance]:
    """Read start, end and text between tabs, as whisper writes them."""
    found = []
    for i, line in enumerate(text.splitlines()):
        cells = [cell.strip() for cell in line.split("\t", 2)]
        if i == 0 and cells != ["start", "end", "text"]:
            expected = "start, end (milliseconds) and text between tabs, as whisper writes them"
            raise ConclugenError(f"{path}: its first line is {line[:80]!r}, expected {expected}")
        if i and line.strip():
            if len(cells) != 3 or not all(re.fullmatch(r"\d{1,12}", cell) for cell in cells[:2]):
                raise ConclugenError(
                    f"{path}, line {i + 1}: {line[:80]!r}, expected milliseconds, milliseconds and words"
                )
            found.append(Utterance(int(cells[0]) / 1000, int(cells[1]) / 1000, " ".join(cells[2].split())))
    return [u for u in found if u.start != u.end]


def _transcript(path: Path, text: str) -> list[Utterance]:
    """Read the segments of a transcript. JSON of Python may hold NaN, which msgspec does not read."""
    try:
        made = msgspec.convert(json.loads(text), Transcript | list[Segment])
        segments = made if isinstance(made, list) else made.segments
        "".join(x.text for x in segments).encode()  # refuses half a character
    except (ValueError, RecursionError, OverflowError, msgspec.MsgspecError) as e:
        expected = "segments with start, end (seconds) and text, as whisper writes them"
        raise ConclugenError(f"{path}: no transcript ({reason(e)[:200]}); expected {expected}") from e
    return [Utterance(x.start, x.end, " ".join(x.text.split())) for x in segments if x.start != x.end]


def _table(path: Path, _text: str) -> list[Utterance]:
    """Read columns ``start``, ``end`` (seconds) and ``text``, whatever their case."""
    table = read_csv(path)
    lowered = [name.lower() for name in table.columns]
    for name in ("start", "end", "text"):
        if (count := lowered.count(name)) != 1:
            raise ConclugenError(f"{path}: {count} columns {name!r}; expected one each of start, end (seconds), text")
    mark = table.mark(*(name for name in table.columns if name.lower() in ("start", "end")))
    found = []
    for where, row in table:
        cells = dict(zip(lowered, row.values(), strict=True))
        start, end = (number(cells[name], f"{where}: {name}", (0, 1e6), mark) for name in ("start", "end"))
        found.append(Utterance(start, end, " ".join(cells["text"].split())))
    return found


def said(utterances: list[Utterance], start: float = 0.0, end: float | None = None) -> str | None:
    """Return the words of the utterances that are more than half inside an interval; ``None`` if there are none.

    An utterance without times counts only where the interval is the whole clip (``end`` is ``None``).
    """
    words = []
    for u in utterances:
        last = u.end if end is None else end
        inside = end is None if u.end is None else min(u.end, last) - max(u.start, start) > (u.end - u.start) / 2
        words += [u.text] if inside else []
    return " ".join(words) or None
