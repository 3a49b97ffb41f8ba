"""What one example is made of: an interval of a clip."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class Utterance:
    """An interval of a clip, from which one example is made."""

    key: str  # its name, unique within its split
    split: str  # named by its folder; empty if the folder names none
    path: str  # of the clip
    start: float = 0.0  # in seconds
    end: float | None = None  # in seconds; ``None``: the end of the clip
    text: str | None = None  # what is said, where it is known
    sound: str = ""  # file of the sound, where it is another than the clip
    problem: str = ""  # why it cannot be extracted; empty if nothing is known to be wrong
    notes: tuple[str, ...] = ()  # remarks for the user

    @property
    def place(self) -> str:
        """Name within the data set: ``SPLIT/KEY`` or ``KEY``."""
        return f"{self.split}/{self.key}" if self.split else self.key

    def stamp(self) -> list:
        """Return what changes when the example does: times, words, and size and time of its files."""
        return [self.start, self.end, self.text, self.problem, *map(_stamp, filter(None, (self.path, self.sound)))]


def _stamp(path: str) -> list[int]:
    try:
        file = os.stat(path)
    except OSError:  # it cannot be decoded either, which is a failure of its own
        return []
    return [file.st_size, file.st_mtime_ns]
