"""Prepare clips on the host, in worker processes: decode, find the face, recognise the words, make items; and say how."""

import contextlib
import dataclasses
import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

import jax
import msgspec
import numpy as np
from threadpoolctl import threadpool_limits

from conclugen_jax.errors import ConclugenError, place_of
from conclugen_jax.extract import faces
from conclugen_jax.extract.backbones import Backbone, Items, Options, View
from conclugen_jax.extract.media import decoding as media, speech
from conclugen_jax.extract.media.clip import Clip
from conclugen_jax.extract.networks import weights
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.system.pool import Died, Pool

NO_FACE = ("drop", "whole", "missing")  # a clip without a face: report a failure, take whole frames, or no pictures
DETECTIONS = 2.0  # frames per second in which faces are looked for
SEEN = {"video", "landmarks"}  # modalities that need pictures alone; one of the user's own may need anything
LACKING = 0.5  # seconds by which an interval may end after its clip without a note
AHEAD = 2  # utterances per process that are under way or wait for the device; each holds its frames
TIMEOUT = 900.0  # seconds after which an utterance is given up, in case a decoder never ends

Work = tuple[Utterance, int]  # and its number of views


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to prepare clips; can be sent to other processes."""

    prepare: Mapping[str, Callable[[Clip, View | None], Items | None]]  # backbone -> its function
    modalities: Mapping[str, str]  # backbone -> its modality
    rates: tuple[float, ...] = ()  # frames per second to decode, the highest first; empty if no backbone has one
    size: int = 180  # side of the frames that faces are cropped to
    faces: str = ""  # folder of MTCNN's weights; empty for whole frames
    no_face: str = "drop"  # one of NO_FACE
    recogniser: str = ""  # of speech, for clips whose words are unknown; empty for none
    num_views: int = 1  # of each clip of the training split; the first is the clip as it is
    seed: int = 0  # of the views
    strength: str = "strong"  # of the views, a key of augmentation.STRENGTHS
    thumbnails: bool = False  # whether a small picture of each clip is made


def recipe(backbones: list[Backbone], **options: Any) -> Recipe:
    """Return the recipe for backbones; ``options`` are further attributes. Tools that cannot be opened are refused.

    Faces are looked for at a rate of their own, so that the frames of one backbone do not depend on the others.
    """
    rates = {b.rate for b in backbones if b.rate}
    rates |= {DETECTIONS} if rates and options.get("faces") else set()
    prepare, modalities = {b.name: b.prepare for b in backbones}, {b.name: b.modality for b in backbones}
    made = Recipe(prepare, modalities, tuple(sorted(rates, reverse=True)), **options)
    if made.recogniser:
        recogniser(made.recogniser)
    if made.faces:
        mtcnn_weights(made.faces)
    return made


class Frames(msgspec.Struct, frozen=True):
    """How pictures are cropped."""

    faces: str  # SHA-256 of MTCNN's weights; empty for whole frames
    no_face: Literal["", *NO_FACE]  # empty for whole frames
    faces_per_second: float = 0.0  # frames per second in which faces are looked for
    least_face: float = 0.0  # part of the side of the last face below which none is looked for, while that is there


class Provenance(msgspec.Struct, frozen=True):
    """What vectors depend on besides the clips: JSON, the same on every machine with the same versions."""

    backbones: dict[str, dict[str, Any]]  # name -> modality, size of the vectors, what else the backbone says of itself
    options: Options  # of the backbones; their batch size does not count
    frames: Frames  # how pictures are cropped
    speech: dict[str, str]  # which recogniser heard the words; empty for none
    views: dict[str, Any] = {}  # their number, seed and strength; empty for one
    versions: dict[str, str] = {}  # of the packages that read clips

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest stores it."""
        facts = msgspec.to_builtins(self)
        del facts["options"]["batch_items"]
        return facts


def provenance(backbones: Sequence[Backbone], how: Recipe, options: Options) -> Provenance:
    """Return what the vectors of backbones depend on."""
    cropped = (
        Frames(weights.load(how.faces).sha256, how.no_face, DETECTIONS, faces.LEAST) if how.faces else Frames("", "")
    )
    heard = speech.provenance(how.recogniser) if how.recogniser else {}
    views = {"number": how.num_views, "seed": how.seed, "strength": how.strength} if how.num_views > 1 else {}
    installed = {name: version for name in ("av", "pillow", "tokenizers") if (version := _version(name))}
    facts = {b.name: {"modality": b.modality, "dim": b.dim, **b.provenance} for b in backbones}
    return Provenance(facts, options, cropped, heard, views, installed)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class Parts(Counter):
    """Parts of the work, or names of backbones -> seconds that they took."""

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time in the context to a part."""
        start = time.perf_counter()
        yield
        self[part] += time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The items of an utterance, ready for the backbones."""

    place: str  # of the utterance
    views: tuple[dict[str, Items], ...] = ()  # for each, backbone -> items; those of a missing modality are not there
    notes: tuple[str, ...] = ()  # remarks for the user
    failure: str = ""  # why there are none; empty if there are
    text: str | None = None  # what is said, as far as known
    times: tuple[float, float] = (0.0, 0.0)  # start and end of the utterance in seconds, as far as known
    boxes: tuple[tuple[float, ...], ...] = ()  # of faces: (time, x, y, x, y) each, in parts of the frame
    parts: Parts = dataclasses.field(default_factory=Parts)  # what it took
    thumbnail: bytes = b""  # JPEG; empty for none


def prepared(work: Iterable[Work], how: Recipe, num_workers: int) -> Iterator[Prepared]:
    """Prepare utterances in processes (0: in this one), and yield what was prepared of each, in order.

    An utterance that crashes the process that decodes it, or keeps it busy forever, is a failure.
    """
    if not num_workers:
        yield from (prepare(utterance, how, views) for utterance, views in work)
        return
    work = iter(work)
    while left := (yield from _in_processes(work, how, num_workers)):
        for job in left:  # after a crash one by one, to know which utterance crashes its process
            if (yield from _in_processes(iter([job]), how, 1)):
                yield _failed(job[0], "the process that decoded it died; is it damaged or too large?")


def _in_processes(work: Iterator[Work], how: Recipe, num_workers: int) -> Generator[Prepared, None, list[Work]]:
    """Yield results until the work is done, or a process died or hangs; return what was under way then."""
    jobs, futures = deque(), deque()
    with Pool(num_workers, start=_start) as pool:
        try:
            while True:
                while len(jobs) < num_workers * AHEAD and (job := next(work, None)):
                    jobs.append(job)
                    futures.append(pool.submit(prepare, job[0], how, job[1]))
                if not jobs:
                    return []
                result = futures.popleft().result(TIMEOUT)
                jobs.popleft()
                yield result
        except Died:
            return list(jobs)
        except TimeoutError:
            pool.kill()
            utterance, _ = jobs.popleft()
            yield _failed(utterance, f"not decoded within {TIMEOUT:g} s; is it damaged?")
            return list(jobs)


def _start() -> None:
    jax.config.update("jax_platforms", "cpu")  # the device is the parent's
    threadpool_limits(1)  # as many processes as cores


def prepare(utterance: Utterance, how: Recipe, num_views: int) -> Prepared:
    """Prepare an utterance. Whatever is wrong with its files becomes its failure."""
    try:
        return _prepare(utterance, how, num_views)
    except ConclugenError as e:
        return Prepared(utterance.place, failure=str(e))
    except (Exception, SystemExit) as e:  # one clip of a million must not end a run of days; it is listed by name
        return _failed(utterance, f"{type(e).__name__}: {str(e)[:300]} ({place_of(e)})")


def _failed(utterance: Utterance, why: str) -> Prepared:
    return Prepared(utterance.place, failure=f"{utterance.path}: {why}")


def _prepare(utterance: Utterance, how: Recipe, num_views: int) -> Prepared:
    if utterance.problem:
        raise ConclugenError(utterance.problem)
    used = set(how.modalities.values())
    reads = bool(used - SEEN - {"audio"})
    recognised = reads and bool(how.recogniser) and not utterance.text
    parts = Parts()
    with parts.timed("decoding"):
        clip = _decoded(utterance, how.rates, bool(used - SEEN - {"text"}) or recognised)
    notes, boxes = [*utterance.notes, *clip.notes], ()
    end = utterance.end or utterance.start + clip.length
    if clip.length and end - utterance.start > clip.length + LACKING:
        notes.append("the clip ends before the interval does")
    whole = clip
    if how.faces and clip.frames:
        with parts.timed("faces"):
            clip, boxes, noted = _cropped(utterance, clip, how)
        notes += noted
    thumbnail = _thumbnail(whole, boxes) if how.thumbnails and whole.frames else b""
    text = utterance.text
    if recognised and clip.sound is not None:
        with parts.timed("words"):
            text = recogniser(how.recogniser)(clip.sound) or None
    clip = dataclasses.replace(clip, text=text)
    views = [View(how.seed, utterance.place, i, how.strength) if i else None for i in range(num_views)]
    items = [{name: _items(name, how, clip, view, parts) for name in how.prepare} for view in views]
    # A modality is missing where any view lacks one of its backbones.
    missing = sorted({how.modalities[name] for found in items for name, x in found.items() if x is None})
    if len(missing) == len(used):
        why = "; ".join(notes) or "nothing is left"
        raise ConclugenError(f"{utterance.path}: lacks {' and '.join(missing)}; {why}")
    items = [{name: x for name, x in found.items() if how.modalities[name] not in missing} for found in items]
    notes += [f"no {modality}" for modality in missing]
    times = utterance.start, end
    return Prepared(utterance.place, tuple(items), tuple(notes), "", text, times, boxes, parts, thumbnail)


def _thumbnail(clip: Clip, boxes: Sequence[tuple[float, ...]]) -> bytes:
    """Return a picture of the face that is detected in the middle, or of the frame in the middle."""
    time, *box = boxes[len(boxes) // 2] if boxes else (clip.times[len(clip.frames) // 2],)
    frame = clip.frames[int(np.abs(clip.times - time).argmin())]
    return faces.thumbnail(frame, np.array(box) if box else None)


def _items(name: str, how: Recipe, clip: Clip, view: View | None, parts: Parts) -> Items | None:
    """Return what a backbone makes of a clip, checked; ``None`` if there are no items."""
    with parts.timed(name):
        items = how.prepare[name](clip, view)
    if items is None:
        return None
    arrays = items if isinstance(items, tuple) else ()
    lengths = {len(x) if isinstance(x, np.ndarray) and x.ndim else None for x in arrays}
    if len(lengths) != 1 or None in lengths:
        raise ConclugenError(f"backbone {name}: prepare gave no tuple of arrays with a row for each item, nor None")
    return items if lengths != {0} else None


def _decoded(utterance: Utterance, rates: tuple[float, ...], hears: bool) -> Clip:
    span = {"start": utterance.start, "end": utterance.end}
    aside = hears and bool(utterance.sound)
    clip = Clip([], np.zeros(0), 0.0, None)
    if rates or (hears and not aside):
        clip = media.decode(utterance.path, rates=rates, sound=hears and not aside, **span)
    if aside:
        try:
            heard = media.decode(utterance.sound, rates=(), **span)
        except ConclugenError as e:  # which costs the sound alone
            heard = Clip([], np.zeros(0), 0.0, None, notes=(f"the file of its sound cannot be used ({e})",))
        length = max(clip.length, heard.length)
        clip = dataclasses.replace(clip, sound=heard.sound, notes=clip.notes + heard.notes, length=length)
    return clip


def _cropped(utterance: Utterance, clip: Clip, how: Recipe) -> tuple[Clip, tuple, list[str]]:
    """Return the clip with the face's frames alone, the boxes found, and notes."""
    rows = clip.rows_at(DETECTIONS)
    found = faces.find(mtcnn_weights(how.faces), [clip.frames[i] for i in rows])
    timed = zip(clip.times[rows].tolist(), found, strict=True)
    boxes = tuple((time, *box.tolist()) for time, box in timed if box is not None)
    if boxes:
        cropped = faces.crop(clip, found, rows, how.size)
        lost = len(clip.frames) - len(cropped.frames)
        return cropped, boxes, [f"no face in {lost} of {len(clip.frames)} frames"] if lost else []
    if how.no_face == "drop":
        way_out = "take a clip that shows one, or whole frames by conclugen extract --no_face=whole"
        raise ConclugenError(f"{utterance.path}: no face was found; {way_out}")
    if how.no_face == "missing":
        clip = dataclasses.replace(clip, frames=[], times=np.zeros(0))
    return clip, (), ["no face was found"]


@functools.cache
def mtcnn_weights(folder: str) -> Any:
    """Return the variables of MTCNN, read once in each process."""
    loaded = weights.load(folder)
    if loaded.network != "mtcnn":
        raise ConclugenError(f"{folder}: weights of {loaded.network}, not of mtcnn; leave --mtcnn out for those here")
    return loaded.params


recogniser = functools.cache(speech.create)  # by name, opened once in each process
