"""Clips -> features -> shards: every utterance once, resumable, its failures listed."""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import builders, formats
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data import workers as data_workers
from conclugen_jax.data.cells import read_csv
from conclugen_jax.data.joined import JoinedSource
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones as backbones_lib
from conclugen_jax.extract import preparation, workers
from conclugen_jax.extract.vectors import Averages
from conclugen_jax.extract.backbones import Backbone, Networks, Options
from conclugen_jax.extract.clips import Utterance
from conclugen_jax.extract.media import container, speech
from conclugen_jax.extract.networks import weights
from conclugen_jax.extract.preparation import Prepared, Recipe
from conclugen_jax.extract.store import Planned, Store
from conclugen_jax.system import files, locks

MOST_WAITING = 64
"""Utterances that wait for their batches to be filled, and would be done again after an interruption, at most."""

LISTED = 100
"""Failures that the manifest names; the file of failures has all."""


@dataclasses.dataclass
class Tally:
    """What became of the utterances.

    Attributes:
      done: with vectors of one modality at least.
      failures: place -> reason.
      notes: remark -> number of utterances.
      missing: modality -> number of utterances without it.
      heard: place -> words that were recognised.
      unknown: ids of the labels that are the name of no clip.
      reused: utterances that an earlier try had done.
      host_seconds: that the device waited for prepared clips.
      device_seconds: that the backbones took.
    """

    done: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: Counter = dataclasses.field(default_factory=Counter)
    missing: Counter = dataclasses.field(default_factory=Counter)
    heard: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    reused: int = 0
    host_seconds: float = 0.0
    device_seconds: float = 0.0


def vectors(
    prepared: Iterator[Prepared], backbones: Sequence[Backbone], tally: Tally
) -> Iterator[tuple[Prepared, dict[str, np.ndarray]]]:
    """Run the backbones over prepared utterances.

    Args:
      prepared: utterances, in any order.
      backbones: in the order in which vectors of one modality are joined.
      tally: takes the seconds.

    Yields:
      (utterance, modality -> float32 [views, dim]) of each, as soon as it is complete; failures, among them vectors that
      are not finite, with nothing.

    Raises:
      ConclugenError: vectors of another size than a backbone says.
    """
    averages = {b.name: Averages(b) for b in backbones}
    waiting: dict[str, tuple[Prepared, dict[tuple[int, str], np.ndarray | None]]] = {}

    def finished(found: Iterator[tuple[tuple[str, int], np.ndarray]], name: str) -> Iterator:
        for (place, view), vector in found:
            each, results = waiting[place]
            results[view, name] = vector
            if all(x is not None for x in results.values()):
                del waiting[place]
                bad = sorted({name for (_, name), x in results.items() if not np.isfinite(x).all()})
                if bad:
                    reason = (
                        f"{place}: {', '.join(bad)} gave numbers that are not finite; is something odd about the clip?"
                    )
                    yield Prepared(place, failure=reason), {}
                else:
                    yield dataclasses.replace(each, views=()), _joined(results, len(each.views), backbones)

    def flushed() -> Iterator:
        for name, running in averages.items():
            yield from finished(running.flush(), name)

    prepared = iter(prepared)
    while True:
        start = time.perf_counter()
        each = next(prepared, None)
        tally.host_seconds += time.perf_counter() - start
        if each is None:
            break
        if each.failure:
            yield each, {}
            continue
        keys = [(view, name) for view, items in enumerate(each.views) for name in items]
        # Its frames are kept by the batches that they wait for alone.
        waiting[each.place] = (dataclasses.replace(each, views=({},) * len(each.views)), dict.fromkeys(keys))
        start = time.perf_counter()
        for view, items in enumerate(each.views):
            for name, rows in items.items():
                yield from finished(averages[name].add((each.place, view), rows), name)
        if len(waiting) >= MOST_WAITING:
            yield from flushed()
        tally.device_seconds += time.perf_counter() - start
    start = time.perf_counter()
    yield from flushed()
    tally.device_seconds += time.perf_counter() - start


def _joined(
    results: Mapping[tuple[int, str], np.ndarray], num_views: int, backbones: Sequence[Backbone]
) -> dict[str, np.ndarray]:
    """modality -> [views, dim], of modalities all of whose backbones have a vector of every view."""
    found = {}
    for modality in dict.fromkeys(b.modality for b in backbones):
        names = [b.name for b in backbones if b.modality == modality]
        if all((view, name) in results for view in range(num_views) for name in names):
            views = [np.concatenate([results[view, name] for name in names]) for view in range(num_views)]
            found[modality] = np.stack(views)
    return found


def dims(backbones: Sequence[Backbone]) -> dict[str, int]:
    """modality -> size of its vectors."""
    sizes: dict[str, int] = {}
    for b in backbones:
        sizes[b.modality] = sizes.get(b.modality, 0) + b.dim
    return sizes


def facts_of(backbones: Sequence[Backbone]) -> dict[str, dict[str, Any]]:
    """Name -> what the vectors of a backbone depend on; JSON."""
    return {b.name: {"modality": b.modality, "dim": b.dim, **b.provenance} for b in backbones}


def provenance(backbones: Sequence[Backbone], how: Recipe, options: Options) -> dict[str, Any]:
    """What the vectors depend on besides the clips: JSON, the same on every machine of the same versions."""
    versions = {name: metadata.version(name) for name in ("av", "pillow", "tokenizers") if _installed(name)}
    return {
        "backbones": facts_of(backbones),
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "batch_items"},
        "frames": {
            "faces": weights.load(how.faces).sha256 if how.faces else "",
            "no_face": how.no_face if how.faces else "",
            "faces_per_second": preparation.DETECTIONS if how.faces else 0.0,
        },
        "speech": speech.provenance(how.recogniser) if how.recogniser else {},
        "views": {"number": how.num_views, "seed": how.seed, "strength": how.strength} if how.num_views > 1 else {},
        "versions": versions,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def extract(
    request: Request,
    utterances: Sequence[Utterance],
    networks: Networks,
    data_dir: str | Path,
    *,
    num_workers: int = 0,
    beam: Sequence[str] | None = None,
    overwrite: bool = False,
    keep: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
    **preparation_options: Any,
) -> tuple[Path, Tally]:
    """Build a data set of clips.

    Args:
      request: data set, name, version, labels and folds, as for features in files.
      utterances: all that there are; those that the labels name are extracted.
      networks: that are run.
      data_dir: parent of the data sets.
      num_workers: processes that prepare clips; 0: this one.
      beam: pipeline options of Apache Beam, whose workers then do everything; they must see clips, weights and ``data_dir``.
      overwrite: replace a data set that is there already.
      keep: keep the folder of single vectors after the shards are built.
      progress: called with the number of utterances done and of all.
      **preparation_options: attributes of :class:`conclugen_jax.extract.preparation.Recipe` besides those of the backbones.

    Returns:
      The folder of the data set, and what became of the utterances. If it is there already, made of the same clips in the
      same way, nothing is done.

    Raises:
      ConclugenError: labels that fit no clip, a failure of every clip, a data set in the way, or a folder that cannot be
        written. What is done is kept for the next try.
    """
    data_dir, backbones = Path(data_dir).absolute(), backbones_lib.load(networks)
    how = preparation.recipe(backbones, size=networks.options.size, **preparation_options)
    if how.recogniser:
        preparation.recogniser(how.recogniser)  # an unknown one is no fault of the clips
    if how.faces:
        preparation.mtcnn_weights(how.faces)
    sizes, facts = dims(backbones), provenance(backbones, how, networks.options)
    plan = formats.assemble(request, Found({m: Planned(utterances, dim) for m, dim in sizes.items()}), "clips")
    builders.check_spec(plan.spec)
    todo, unknown = _asked_for(plan, utterances, how)
    if how.rates or set(how.modalities.values()) - {"text"}:
        container.library()  # where it is not installed that is no fault of the clips
    fingerprint = _fingerprint(plan, todo, facts)
    target = data_dir / plan.spec.name / plan.spec.version
    folder = data_dir / f".extracting-{plan.spec.name}-{plan.spec.version}"
    store = Store(folder)
    if not overwrite and (target / manifest_lib.FILE).is_file():
        known = _known(_same(target, fingerprint), target, len(todo))
        if folder.exists() and not store.is_kept():  # an earlier try was stopped when all but this was done
            with contextlib.suppress(locks.Busy), locks.hold(folder.with_name(f"{folder.name}.lock")):
                shutil.rmtree(folder, ignore_errors=True)
        return target, known
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with locks.hold(folder.with_name(f"{folder.name}.lock")):
            store.begin(facts, overwrite=overwrite, keep=keep)
            work = _Work(networks, how, str(folder))
            tally = _run(store, todo, work, num_workers, beam, progress)
            tally.unknown = unknown
            first = plan.spec.splits[0]
            features = {m: f for m in sizes if (f := store.features(m, how.num_views, first)) is not None}
            if not tally.done or not features:
                listed = _list(target, FAILURES, tally.failures)
                raise ConclugenError(
                    f"each of {len(todo):,} failed, such as: {_first(tally)}; all of them are in {listed}"
                )
            made = Found(features, facts=_told(facts, fingerprint, tally), identity=fingerprint)
            _list(target, FAILURES, tally.failures)
            _list(target, WORDS, tally.heard)
            built = builders.build(
                formats.assemble(request, made, "clips"), data_dir, overwrite=overwrite, drop_bad=True
            )
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            return built, tally
    except locks.Busy as e:
        raise ConclugenError(f"{target}: being extracted by {e}; wait, or choose another name or --data_dir") from None
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free space and repeat the command, which goes on" if full else "choose another --data_dir"
        raise ConclugenError(f"{e.filename or data_dir}: cannot be written ({e.strerror or e}); {way_out}") from e


def _asked_for(
    plan: JoinedSource, utterances: Sequence[Utterance], how: Recipe
) -> tuple[list[tuple[Utterance, int]], list[str]]:
    """The utterances that the annotations name, each with its number of views, and the ids that name none."""
    by_place = {u.place: u for u in utterances}
    first, found, unknown = plan.spec.splits[0], {}, []
    features = next(iter(plan.features.values()))
    for split, columns in plan.annotations.items():
        counts = Counter(columns.keys)
        if counts and max(counts.values()) > 1:
            raise ConclugenError(
                f"the labels name {max(counts, key=counts.__getitem__)!r} twice in {split}; leave one row out"
            )
        places = dict(zip(columns.keys, features.locate(split, columns.keys), strict=True))
        there = [place for place in places.values() if place is not None]
        found |= {place: (by_place[place], how.num_views if split == first else 1) for place in there}
        lost = [key for key, place in places.items() if place is None]
        unknown += lost
        bent = next((key for key in lost if "/" in key), None)
        if bent is not None or (lost and not there):
            raise ConclugenError(
                f"the labels name {bent or lost[0]!r} in {split}, which is the name of no clip; there are such as "
                f"{min(by_place)!r}: paths with _ for / and without ending (lines of subtitles with --cut); mend the ids, or "
                "leave these rows out"
            )
    if not found:
        raise ConclugenError(
            f"no clip is named by the labels; there are such as {min(by_place)!r}, compare the ids of the labels with them"
        )
    return [found[place] for place in sorted(found)], unknown


def _fingerprint(plan: JoinedSource, todo: Sequence[tuple[Utterance, int]], facts: Mapping[str, Any]) -> str:
    labels, _ = plan.stamp()
    clips = [[u.place, views, u.stamp()] for u, views in todo]
    return hashlib.sha256(json.dumps([labels, clips, facts], sort_keys=True).encode()).hexdigest()


def _known(made: Mapping[str, Any], target: Path, count: int) -> Tally:
    """What became of the utterances of a data set that is there already."""
    path = table(target, FAILURES)
    try:
        failures = {row["utterance"]: row[FAILURES[1]] for _, row in read_csv(path)} if path.is_file() else {}
    except (ConclugenError, KeyError):
        failures = {}
    failures = failures if len(failures) == made["failed"] else dict(made["failures"])
    notes = Counter(made["notes"])
    return Tally(done=count - made["failed"], failures=failures, notes=notes, reused=count - made["failed"])


def _same(target: Path, fingerprint: str) -> dict[str, Any]:
    """What the manifest of a data set says of its extraction, if it is the one asked for."""
    present = manifest_lib.read(target)
    if present.source.get("extraction", {}).get("fingerprint") != fingerprint:
        raise ConclugenError(
            f"{target}: holds a data set made of other clips or in another way; pass --overwrite to replace it, or choose "
            "another --data_dir"
        )
    manifest_lib.verify(target, present)
    return present.source["extraction"]


def _told(facts: Mapping[str, Any], fingerprint: str, tally: Tally) -> dict[str, Any]:
    """What the manifest says of the extraction."""
    listed = dict(sorted(tally.failures.items())[:LISTED])
    return {
        "extraction": {
            **facts,
            "fingerprint": fingerprint,
            "failed": len(tally.failures),
            "failures": listed,
            "notes": dict(sorted(tally.notes.items())),
        }
    }


def _first(tally: Tally) -> str:
    return next(iter(tally.failures.values()), "none has any modality")


FAILURES, WORDS = ("failures", "reason"), ("words", "words")
"""Tables beside the data sets, and what they have besides utterances: why one failed, which words were recognised."""


def table(target: Path, kind: tuple[str, str]) -> Path:
    """Where a table of a data set lies; ``kind``: :data:`FAILURES` or :data:`WORDS`."""
    return target.parent.parent / f"{kind[0]}-{target.parent.name}-{target.name}.csv"


def _list(target: Path, kind: tuple[str, str], rows: Mapping[str, str]) -> Path:
    path = table(target, kind)
    if not rows:
        path.unlink(missing_ok=True)
        return path
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("utterance", kind[1]), *sorted(rows.items())])
    files.write_atomically(path, text.getvalue())
    return path


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a process needs to extract utterances."""

    networks: Networks
    how: Recipe
    folder: str

    def run(
        self,
        jobs: Sequence[tuple[Utterance, int]],
        num_workers: int = 0,
        done: Callable[[], None] = lambda: None,
        tally: Tally | None = None,
    ) -> None:
        """Extract utterances into the store."""
        backbones = backbones_lib.load(self.networks)
        store, by_place = Store(Path(self.folder)), {u.place: (u, n) for u, n in jobs}
        stamps: dict[str, list] = {}

        def begun() -> Iterator[tuple[Utterance, int]]:
            for u, views in jobs:
                stamps[u.place] = u.stamp()  # a file that changes from now on is done again the next time
                yield u, views

        with contextlib.closing(workers.prepared(begun(), self.how, num_workers)) as prepared:
            for each, found in vectors(prepared, backbones, tally or Tally()):
                stamp = stamps.pop(each.place)
                remarks = {"notes": each.notes, "failure": each.failure, "text": each.text}
                store.put(*by_place[each.place], found, stamp=stamp, **remarks)
                done()


BEAM_PART = 16
"""Utterances that a worker of Beam takes at a time."""


def _run(
    store: Store,
    todo: Sequence[tuple[Utterance, int]],
    work: _Work,
    num_workers: int,
    beam: Sequence[str] | None,
    progress: Callable[[int, int | None], None] | None,
) -> Tally:
    """Extract what is not done, then count all."""
    left, tally = [job for job in todo if _is_open(store.state(*job))], Tally()
    counted = itertools.count(len(todo) - len(left))

    def one_more() -> None:
        number = next(counted)
        if progress is not None:
            progress(number, len(todo))

    tally.reused = len(todo) - len(left)
    one_more()
    if beam is not None:
        parts = [left[i : i + BEAM_PART] for i in range(0, len(left), BEAM_PART)]
        data_workers.run_beam(parts, work.run, beam)
    else:
        work.run(left, num_workers, one_more, tally)
    sizes, present = dims(backbones_lib.load(work.networks)), {}
    for u, views in todo:
        state = store.state(u, views) or {"failure": "was changed while it was extracted", "notes": [], "present": []}
        if state["failure"]:
            tally.failures[u.place] = state["failure"]
            continue
        tally.done += 1
        tally.notes.update(map(_kind, state["notes"]))
        tally.missing.update(set(sizes) - set(state["present"]))
        present[u.place] = state["present"]
        if work.how.recogniser and not u.text and state.get("text"):
            tally.heard[u.place] = state["text"]
    store.keep_only(present)
    return tally


def _is_open(state: Mapping[str, Any] | None) -> bool:
    """Failures are tried again: a file may have been mended, or a disk been away."""
    return state is None or bool(state["failure"])


def _kind(note: str) -> str:
    """A note without its numbers, to be counted."""
    note = "no face in some frames" if note.startswith("no face in") else note.partition(" (")[0]
    return note.lstrip("0123456789 ")
