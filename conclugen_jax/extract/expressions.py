"""A first look at clips before any training: the expressions of the face over time, and the words.

The networks need no conversion: ``face_expression`` is part of this package, ``whisper_tiny`` of the extra ``ready``.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.special import softmax

from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones, faces, prediction, preparation
from conclugen_jax.extract.backbones import Backbone, Items, Networks, View
from conclugen_jax.extract.companions import Companions
from conclugen_jax.extract.media import decoding as media, speech, subtitles
from conclugen_jax.extract.media.clip import SAMPLE_RATE, Clip
from conclugen_jax.extract.networks import mtcnn
from conclugen_jax.extract.networks.face_api import EXPRESSIONS, RATE, SIZE
from conclugen_jax.extract.prediction import Prediction
from conclugen_jax.extract.utterance import Utterance

NAME = "face_expression"
ABOUT = (
    f"{NAME}: one small network that others trained. It sees single frames of the face, no sound and no words, and was not "
    "trained on your data."
)
PIECE = 30.0  # seconds that are decoded at a time
NEAR = 0.9 / preparation.DETECTIONS  # seconds from a frame in which the face was found
REST = "rest"  # what else is taken from a clip
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)  # lengths of the rows of a table in seconds
MOST_ROWS = 12  # of a clip
NO_FACE = "no face"

Progress = Callable[[int, int], None]
"""Called with the number of pieces done, and of all."""


@dataclasses.dataclass(frozen=True)
class Expressions(Prediction):
    """The expressions and words of a clip. ``probability`` is the mean over its moments."""

    moments: tuple[tuple[float, tuple[float, ...]], ...] = ()  # time of a frame with a face, probability of each class
    words: tuple[subtitles.Utterance, ...] = ()  # what is said when; an end of ``None``: at some time in the clip

    @property
    def without_face(self) -> list[tuple[float, float]]:
        """Return the intervals in which no face was found, in seconds."""
        times = [time for time, _ in self.moments]
        step = float(min(np.diff(times), default=1 / RATE))
        ends, starts = [0.0, *(time + step for time in times)], [*times, self.end]
        return [(a, b) for a, b in zip(ends, starts, strict=True) if b - a > step / 2]

    def to_json(self) -> dict[str, Any]:
        """Return all but the boxes, with the probabilities at each moment."""
        moments = [{"time": time, "probability": dict(zip(self.classes, p, strict=True))} for time, p in self.moments]
        return super().to_json() | {"moments": moments, "without_face": self.without_face, "by": NAME}

    def rows(self) -> list[Prediction]:
        """Return the rows of a table: the whole clip, then the means over intervals with their words."""
        whole = dataclasses.replace(self, predicted=self.predicted or (NO_FACE,), text=None)
        step = next((s for s in STEPS if self.end <= s * MOST_ROWS), STEPS[-1])
        starts = np.arange(0.0, max(self.end - step / 10, step), step).tolist()  # a shorter rest is of the last row
        said: list[list[str]] = [[] for _ in starts]
        for line in self.words:
            if line.end is None:
                whole = dataclasses.replace(whole, text=line.text)
            else:
                said[max(0, bisect.bisect(starts, (line.start + line.end) / 2) - 1)].append(line.text)
        times, found = [time for time, _ in self.moments], []
        for start, end, texts in zip(starts, [*starts[1:], self.end], said, strict=True):
            first, last = (bisect.bisect_left(times, time - 1e-6) for time in (start, end))
            seen = self.moments[first:last]
            part = _mean([p for _, p in seen]) if seen else {"predicted": (NO_FACE,)}
            text = " ".join(texts) or None
            found.append(Prediction("", start, end, text, classes=self.classes, **part))
        return [whole, *found] if len(found) > 1 else [dataclasses.replace(whole, text=self.text)]


def look(
    files: Sequence[Path],
    listen: speech.Listener | None = None,
    *,
    mtcnn_folder: str | Path = mtcnn.WEIGHTS,
    num_workers: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Expressions]:
    """Return the expressions of the most probable face over time, and the words, of each clip.

    Args:
      files: clips of any length.
      listen: recogniser of speech for clips without words beside them; ``None``: those have no words.
      mtcnn_folder: weights of MTCNN.
      num_workers: processes that decode; 0: this one.
      progress: called after each piece of a clip.

    Raises:
      ConclugenError: the weights were altered. Faults of a clip are recorded as its failure.
    """
    try:
        (network,) = backbones.load(Networks(own=(NAME,)))
    except ConclugenError as e:
        raise ConclugenError(f"{e}; --checkpoint of a run that was trained without it works all the same") from e
    preparation.mtcnn_weights(str(mtcnn_folder))  # what is wrong with them is no fault of the clips
    tools = dataclasses.replace(network, prepare=functools.partial(_faces, mtcnn_folder=str(mtcnn_folder)))
    how = preparation.recipe([tools, Backbone(REST, REST, 0, _rest, lambda *x: x)])
    beside, found = Companions(), [[] for _ in files]
    pieces = [(i, u) for i, file in enumerate(files) for u in _pieces(file, beside.sound(file), i)]
    progress(0, len(pieces))
    prepared = preparation.prepared([(u, 1) for _, u in pieces], how, num_workers)
    for done, ((i, u), each) in enumerate(zip(pieces, prepared, strict=True), 1):
        found[i].append(_seen(u, each, network))
        progress(done, len(pieces))
    return [_joined(file, each, listen, beside) for file, each in zip(files, found, strict=True)]


def table(found: Sequence[Expressions]) -> Table | None:
    """Return a table for a terminal, ``None`` where there is nothing to show: clips without a face and without words."""
    if not (rows := [row for each in found if each.moments or each.words for row in each.rows()]):
        return None
    shown = prediction.table(rows, NAME)
    for column in shown.columns:
        column.no_wrap = column.header not in ("clip", "words", "remarks")
    return shown


def recogniser(name: str = "") -> tuple[speech.Listener | None, str]:
    """Return the named or the ready speech recogniser, and a remark if there is none."""
    try:
        return speech.listener(name or speech.READY), ""
    except ConclugenError as e:
        if name:
            raise
        return None, f"no words are recognised ({e}); those in files beside the clips are shown, and the expressions"


def _faces(clip: Clip, view: View | None, *, mtcnn_folder: str) -> Items | None:
    """Return faces, uint8 [n, 112, 112, 3], the time of each, [n], and its box in parts of the frame, [n, 4].

    A face is cropped by the detection nearest in time, closer than extraction does, so that it may move.
    """
    rows = clip.rows_at(preparation.DETECTIONS)
    boxes = faces.find(preparation.mtcnn_weights(mtcnn_folder), [clip.frames[i] for i in rows])
    found = [(clip.times[i], box) for i, box in zip(rows, boxes, strict=True) if box is not None]
    seen = []
    for frame, time in ((clip.frames[i], clip.times[i]) for i in clip.rows_at(RATE)):
        at, box = min(found, key=lambda each: abs(each[0] - time), default=(np.inf, None))
        if abs(at - time) < NEAR:
            seen.append((faces.cut(frame, box, SIZE), time, box))
    return tuple(map(np.stack, zip(*seen, strict=True))) or None


def _rest(clip: Clip, view: View | None) -> Items:
    """Return one item, so that no clip lacks everything: its sound, which may be empty, and whether it has pictures."""
    return (np.zeros((1, 0), np.float32) if clip.sound is None else clip.sound[None], np.array([bool(clip.frames)]))


def _pieces(file: Path, sound: str, number: int) -> list[Utterance]:
    """Cut a clip into pieces of about :data:`PIECE` seconds; ``number`` identifies the clip."""
    starts = PIECE * np.arange(max(1, round(media.seconds(file) / PIECE)))
    bounds = zip(starts.tolist(), [*starts[1:].tolist(), None], strict=True)
    return [Utterance(f"{number} {start:g}", "", str(file), start, end, sound=sound) for start, end in bounds]


def _seen(u: Utterance, each: preparation.Prepared, network: Backbone) -> tuple[Expressions, np.ndarray]:
    """Return the expressions in a piece, with times of the whole clip, and its sound."""
    if each.failure:
        return Expressions(u.path, u.start, failure=each.failure), np.zeros(0, np.float32)
    sound, pictures = each.views[0][REST]
    found = Expressions(u.path, *each.times, notes=(*each.notes, *([] if pictures[0] else ["no pictures"])))
    if NAME in each.views[0]:
        crops, times, boxes = each.views[0][NAME]
        size = network.batch_size
        filled = np.concatenate([crops, np.repeat(crops[-1:], -len(crops) % size, axis=0)])
        logits = [network.vectors(filled[i : i + size]) for i in range(0, len(filled), size)]
        logits = np.concatenate(logits)[: len(crops), -len(EXPRESSIONS) :].astype(np.float64)
        times = (u.start + times).tolist()
        moments = zip(times, map(tuple, softmax(logits, axis=1).tolist()), strict=True)
        boxes = tuple((time, *box) for time, box in zip(times, boxes.tolist(), strict=True))
        found = dataclasses.replace(found, boxes=boxes, moments=tuple(moments))
    return found, sound[0]


def _joined(
    file: Path, pieces: Sequence[tuple[Expressions, np.ndarray]], listen: speech.Listener | None, beside: Companions
) -> Expressions:
    """Return a clip of its pieces, with its words."""
    known = [piece for piece, _ in pieces if not piece.failure]
    if not known:
        return pieces[0][0]
    sounds = [np.zeros(0, np.float32)]
    for piece, sound in pieces:
        short = round(piece.start * SAMPLE_RATE) - sum(map(len, sounds))
        sounds += [np.zeros(max(0, short), np.float32), sound]
    sound = np.concatenate(sounds)
    lines, notes = beside.words(file)
    if not lines and listen is not None and sound.any():
        lines = _within(listen(sound), known[-1].end)
    moments = tuple(moment for piece in known for moment in piece.moments)
    remarks = [note for piece, _ in pieces for note in (*piece.notes, piece.failure)]
    told = [note for note in remarks if note and not note.startswith("no ")]  # what is missing is counted below
    told += ["no sound"] if not sound.any() and "the sound is silence" not in told else []
    found = Expressions(
        str(file),
        end=known[-1].end,
        text=subtitles.said(lines),
        classes=EXPRESSIONS,
        missing=() if lines else ("words",),
        notes=tuple(dict.fromkeys((*told, *notes))),
        boxes=tuple(box for piece in known for box in piece.boxes),
        moments=moments,
        words=tuple(lines),
    )
    if not moments:
        why = "holds no pictures" if all("no pictures" in piece.notes for piece in known) else "no face was found"
        return dataclasses.replace(found, failure=f"{file}: {why}, and {NAME} sees faces alone")
    if gone := sum(b - a for a, b in found.without_face):
        found = dataclasses.replace(found, notes=(f"no face for {gone:.1f} of {found.end:.1f} s", *found.notes))
    return dataclasses.replace(found, **_mean([p for _, p in moments]))


def _within(lines: Sequence[subtitles.Utterance], end: float) -> list[subtitles.Utterance]:
    """Return the words until the clip ends, since Whisper rounds times up and hears "." in noise."""
    heard = [line for line in lines if line.start < end and any(map(str.isalnum, line.text))]
    return [dataclasses.replace(line, end=line.end and min(line.end, end)) for line in heard]


def _mean(probabilities: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Return mean probabilities, and the name of the most probable class."""
    mean = np.mean(probabilities, axis=0)
    return {"probability": tuple(mean.tolist()), "predicted": (EXPRESSIONS[mean.argmax()],)}
