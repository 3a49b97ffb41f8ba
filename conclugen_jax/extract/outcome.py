"""What became of the utterances, and the tables beside a data set that say so."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conclugen_jax.data.cells import read_csv
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract.vectors import Clock
from conclugen_jax.system import files

LISTED = 100  # failures that the manifest names at most; the table of failures names all

FAILURES, WORDS = ("failures", "reason"), ("words", "words")
"""Tables beside the data sets, and their column besides ``utterance``: why one failed, which words were recognised."""


@dataclasses.dataclass
class Tally:
    """What became of the utterances."""

    done: int = 0  # number of those with vectors of one modality at least
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # place -> reason
    notes: Counter = dataclasses.field(default_factory=Counter)  # remark -> number of utterances
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # remark -> the first one with its details
    missing: Counter = dataclasses.field(default_factory=Counter)  # modality -> number of utterances without it
    heard: dict[str, str] = dataclasses.field(default_factory=dict)  # place -> words that were recognised
    unknown: list[str] = dataclasses.field(default_factory=list)  # ids in the labels that name no clip
    near: str = ""  # how one of these differs from the name of a clip
    reused: int = 0  # number of utterances that an earlier try had done
    clock: Clock = dataclasses.field(default_factory=Clock)  # what the extraction waited for

    def add_notes(self, notes: Iterable[str]) -> None:
        """Count the remarks on an utterance."""
        for note in notes:
            self.notes[kind(note)] += 1
            self.examples.setdefault(kind(note), note)

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        listed = dict(sorted(self.failures.items())[:LISTED])
        return {"failed": len(self.failures), "failures": listed, "notes": dict(sorted(self.notes.items()))}


def known(made: Mapping[str, Any], target: Path, count: int) -> Tally:
    """Return what became of the utterances of a data set that is there already, ``count`` of them.

    Its manifest describes the extraction by ``made``; the table of failures is beside its folder, ``target``.
    """
    try:
        failures = {row["utterance"]: row[FAILURES[1]] for _, row in read_csv(table(target, FAILURES))}
    except (ConclugenError, KeyError):
        failures = {}
    if len(failures) != made["failed"]:  # the table was changed or deleted
        failures = dict(made["failures"])
    done = count - made["failed"]
    return Tally(done=done, failures=failures, notes=Counter(made["notes"]), reused=done)


def kind(note: str) -> str:
    """Return a note without its numbers, so that it can be counted."""
    note = "no face in some frames" if note.startswith("no face in") else note.partition(" (")[0]
    return note.lstrip("0123456789 ")


def table(target: Path, which: tuple[str, str]) -> Path:
    """Return the path of a table of a data set; ``which``: :data:`FAILURES` or :data:`WORDS`."""
    return target.parent.parent / f"{which[0]}-{target.parent.name}-{target.name}.csv"


def write_table(target: Path, which: tuple[str, str], rows: Mapping[str, str]) -> Path:
    """Write a table of a data set, or remove it if there are no rows; return its path."""
    path = table(target, which)
    if not rows:
        path.unlink(missing_ok=True)
        return path
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("utterance", which[1]), *sorted(rows.items())])
    files.write_atomically(path, text.getvalue(), place="--data_dir")
    return path


def lines(tally: Tally, folder: Path, count: int) -> list[str]:
    """Return lines on the outcome of ``count`` utterances, for the data set in a folder."""
    told, left_out = [], count - tally.done - len(tally.failures)
    if left_out > 0:
        told.append(f"{counted(left_out)} not named by the labels and skipped")
    if tally.unknown:
        near = f"; {tally.near}" if tally.near else f", such as {tally.unknown[0]!r}"
        told.append(f"{len(tally.unknown):,} ids of the labels match no clip{near}")
    way_out = {"text": "; put subtitles beside the clips, or name a recogniser (conclugen extract --speech)"}
    for modality in sorted(m for m, n in tally.missing.items() if n == tally.done):
        told.append(f"warning: no utterance has {modality}, so the data set lacks it{way_out.get(modality, '')}")
    known = {f"no {modality}" for modality in tally.missing}  # reported for each split already
    told += [f"{counted(n)}: {_detailed(tally, note)}" for note, n in sorted(tally.notes.items()) if note not in known]
    if tally.failures:
        told.append(f"{counted(len(tally.failures))} skipped because of errors; see {table(folder, FAILURES)}")
    if tally.heard:
        told.append(f"words were recognised in {counted(len(tally.heard))}; see {table(folder, WORDS)}")
    told += _time(tally)
    return told


def _time(tally: Tally) -> list[str]:
    """Return lines on the time of an extraction: its rate, what it waited for, and the shares of the work."""
    clock = tally.clock
    if not (seconds := clock.host + clock.device):
        return []
    before = f", {tally.reused:,} of them before" if tally.reused else ""
    rate = (tally.done + len(tally.failures) - tally.reused) / seconds
    longer, what = max((clock.device, "computing features"), (clock.host, "waiting for decoded clips"))
    whole, parts = clock.parts.total(), clock.parts.most_common()
    shares = ", ".join(f"{part} {took / whole:.0%}" for part, took in parts if took >= whole / 200)
    return [
        f"{counted(tally.done)} extracted{before}; {rate:.2g} a second, {longer / seconds:.0%} of the time {what}",
        f"the work of all processes: {shares}",
    ]


def _detailed(tally: Tally, note: str) -> str:
    """Return a remark with the details of the first utterance that it is on, if it has any."""
    _, bracket, details = tally.examples.get(note, "").partition(" (")
    return f"{note}{bracket}{'such as ' if bracket and tally.notes[note] > 1 else ''}{details}"


def counted(n: int) -> str:
    """Return a number of utterances as text."""
    return f"{n:,} utterance{'' if n == 1 else 's'}"
