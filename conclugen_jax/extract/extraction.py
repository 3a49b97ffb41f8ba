"""Clips -> features -> shards: every utterance once, resumable, its failures listed."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data import (
    builders,
    data_frames,
    formats,
    labels,
    manifest as manifest_lib,
    matching,
    utterances as seen_lib,
)
from conclugen_jax.data.features import Combined
from conclugen_jax.data.joined import JoinedSource
from conclugen_jax.data.requests import Found, Request
from conclugen_jax.data.sources import Features
from conclugen_jax.data.utterances import Seen
from conclugen_jax.errors import ConclugenError
from conclugen_jax.extract import backbones as backbones_lib, outcome, preparation
from conclugen_jax.extract.backbones import Networks
from conclugen_jax.extract.outcome import FAILURES, WORDS, Tally
from conclugen_jax.extract.preparation import Recipe
from conclugen_jax.extract.store import KEPT, State, Store, Vectors
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import Clock, vectors
from conclugen_jax.system import locks
from conclugen_jax.system.progress import say

BEAM_PART = 16  # utterances that a worker of Beam takes at a time

Progress = Callable[[int, int | None], None]

Job = tuple[Utterance, int, list]  # an utterance, its number of views, and its stamp before anything was read


def extract(
    request: Request,
    utterances: Sequence[Utterance],
    networks: Networks,
    data_dir: str | Path,
    *,
    known: Any = None,
    num_workers: int = 0,
    beam: Sequence[str] | None = None,
    overwrite: bool = False,
    keep: bool = False,
    most: int = 0,
    progress: Progress = lambda done, total: None,
    **preparation_options: Any,
) -> tuple[Path, Tally]:
    """Build a data set of clips.

    Args:
      request: data set, name, version, labels and folds, as for features in files.
      utterances: all utterances; only those that the labels name are extracted.
      networks: networks to run.
      data_dir: parent of the data sets.
      known: labels that the layout of the clips holds (:class:`Found`), or a data frame of them as ``labels.csv`` has them;
        else ``request`` says where labels are.
      num_workers: processes that prepare clips; 0: this one.
      beam: pipeline options of Apache Beam, whose workers then do everything; they must see clips, weights and ``data_dir``.
      overwrite: whether to replace an existing data set.
      keep: whether to keep the folder of single vectors after building the shards.
      most: maximum number of utterances, chosen at random; 0 for all.
      progress: called with the number of utterances done and of all.
      **preparation_options: attributes of :class:`conclugen_jax.extract.preparation.Recipe` besides those of the backbones.

    Returns:
      The folder of the data set, and the outcome of the utterances. If the data set exists and was made from the same clips
      with the same settings, nothing is done.

    Raises:
      ConclugenError: the labels match no clip, every clip failed, another data set exists there, or the folder cannot be
        written. Finished clips are kept for the next try.
    """
    if data_frames.is_frame(known):
        known = data_frames.labels(known)
    work = _Extraction(
        request, known or Found({}), utterances, networks, Path(data_dir).absolute(), preparation_options, most
    )
    if not overwrite and (work.target / manifest_lib.FILE).is_file():
        return work.target, work.there_already()
    if work.unlabelled:
        say("no column 'label' was found; if another has the labels, stop this and name it with --label=COLUMN")
    with work.written():
        work.store.begin(work.facts, overwrite=overwrite, keep=keep)
        tally, present = work.run(num_workers, beam, progress)
        built = work.build(tally, present, overwrite)
        if not keep:
            shutil.rmtree(work.store.folder, ignore_errors=True)
    return built, tally


class _Extraction:
    """The work of building a data set from clips."""

    def __init__(
        self,
        request: Request,
        known: Found,
        utterances: Sequence[Utterance],
        networks: Networks,
        data_dir: Path,
        options: dict,
        most: int,
    ):
        self.request, self.networks, backbones = request, networks, backbones_lib.load(networks)
        self.how = preparation.recipe(backbones, size=networks.options.size, **options)
        self.dims = Counter()  # modality -> size of its vectors
        for b in backbones:
            self.dims[b.modality] += b.dim
        if known.table is not None:  # its ids are names of clips, whatever its keys were
            known = dataclasses.replace(known, table=dataclasses.replace(known.table, keys=None))
        planned = {modality: Vectors(utterances, dim) for modality, dim in self.dims.items()}
        self.known = labels.annotate(request, dataclasses.replace(known, features=planned))
        source = formats.assemble(request, self.known, "clips")
        builders.check_spec(source.spec)
        asked = request.dataset == formats.GENERIC and not request.layout.label and not request.layout.kind
        tables = known.table is not None or bool(request.labels)
        self.unlabelled = asked and tables and source.spec.label.kind == "none"
        self.annotations, self.planned = source.annotations, next(iter(source.features.values()))
        self.first_split = source.spec.splits[0]  # the one that has views
        self.todo, *self.unknown = _asked_for(source, utterances, self.how)
        if 0 < most < len(self.todo):
            chosen = np.random.default_rng(0).choice(len(self.todo), most, replace=False)
            self.todo = [self.todo[i] for i in np.sort(chosen)]
        self.facts = preparation.provenance(backbones, self.how, networks.options).to_json()
        stamps = [[u.place, views, stamp] for u, views, stamp in self.todo]
        content = json.dumps([source.stamp()[0], stamps, self.facts], sort_keys=True).encode()
        self.fingerprint, name, version = hashlib.sha256(content).hexdigest(), source.spec.name, source.spec.version
        self.target, self.store = data_dir / name / version, Store(data_dir / f".extracting-{name}-{version}")
        self._lock = self.store.folder.with_name(f"{self.store.folder.name}.lock")

    def there_already(self) -> Tally:
        """Return the tally of an existing data set, and remove leftovers of an earlier try."""
        present = manifest_lib.read(self.target)
        made = present.source.get("extraction", {})
        if made.get("fingerprint") != self.fingerprint:
            way_out = "pass --overwrite to replace it, or choose another --data_dir"
            raise ConclugenError(f"{self.target}: holds a data set made of other clips or in another way; {way_out}")
        if made.get("thumbnails") and not self.how.thumbnails:
            raise ConclugenError(
                f"{self.target}: holds thumbnails of the clips; pass --overwrite to replace it by one without"
            )
        manifest_lib.verify(self.target, present)
        if self.store.folder.exists() and not (self.store.folder / KEPT).exists():
            with contextlib.suppress(locks.Busy), locks.hold(self._lock):
                shutil.rmtree(self.store.folder, ignore_errors=True)
        return outcome.known(made, self.target, len(self.todo))

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Hold the lock of the data set while it is made; turn write errors into ConclugenError."""
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            with locks.hold(self._lock):
                yield
        except locks.Busy as e:
            way_out = "wait, or choose another name or --data_dir"
            raise ConclugenError(f"{self.target}: being extracted by {e}; {way_out}") from None
        except OSError as e:
            fault = f"{e.filename or self._lock.parent}: cannot be written ({e.strerror or e})"
            way_out = "free space and repeat the command, which resumes, or choose another folder"
            raise ConclugenError(f"{fault}; {way_out}") from e

    def run(self, num_workers: int, beam: Sequence[str] | None, progress: Progress) -> tuple[Tally, dict[str, list]]:
        """Extract the missing utterances and count all; also return which utterances have each modality.

        Failures are tried again: a file may have been repaired.
        """
        states = [self.store.state(u, views) for u, views, _ in self.todo]
        left = [job for job, state in zip(self.todo, states, strict=True) if state is None or state.failure]
        unknown, near = self.unknown
        tally, total = Tally(unknown=unknown, near=near, reused=len(self.todo) - len(left)), len(self.todo)
        counted = itertools.count(tally.reused)
        progress(next(counted), total)
        work = functools.partial(_work, self.store, self.networks, self.how)
        if beam is not None:
            builders.run_beam([left[i : i + BEAM_PART] for i in range(0, len(left), BEAM_PART)], work, beam)
        else:
            work(left, num_workers, tally.clock, lambda: progress(next(counted), total))
        present: dict[str, list[Utterance]] = {modality: [] for modality in self.dims}
        for u, views, _ in self.todo:
            state = self.store.state(u, views) or State(failure="was changed while it was extracted")
            if state.failure:
                tally.failures[u.place] = state.failure
                continue
            tally.done += 1
            tally.add_notes(state.notes)
            tally.missing.update(self.dims.keys() - set(state.present))
            for modality in state.present:
                present[modality].append(u)
            if self.how.recogniser and not u.text and state.text:
                tally.heard[u.place] = state.text
        return tally, present

    def build(self, tally: Tally, present: dict[str, list[Utterance]], overwrite: bool) -> Path:
        """Write failures and words, then the shards."""
        listed = outcome.write_table(self.target, FAILURES, tally.failures)
        if not any(present.values()):
            first = next(iter(tally.failures.values()), "none has any modality")
            raise ConclugenError(f"each of {len(self.todo):,} failed, such as: {first}; all of them are in {listed}")
        outcome.write_table(self.target, WORDS, tally.heard)
        seen = self.store.folder / seen_lib.FILE
        seen_lib.write(seen, self._seen())
        features: dict[str, Features] = {}
        for modality, utterances in present.items():
            about = utterances, self.dims[modality], self.store.folder, modality
            views = [Vectors(*about, view) for view in range(self.how.num_views)]
            if utterances:
                features[modality] = Combined([[view] for view in views], first_split=self.first_split)
        made = {"fingerprint": self.fingerprint, "thumbnails": self.how.thumbnails, **tally.to_json()}
        facts = self.known.facts | {"extraction": {**self.facts, **made}}
        found = dataclasses.replace(
            self.known, features=features, facts=facts, identity=self.fingerprint, beside=[seen]
        )
        source = formats.assemble(self.request, found, "clips")
        return builders.build(source, self.store.folder.parent, overwrite=overwrite, drop_bad=True)

    def _seen(self) -> Iterator[tuple[str, str, Seen]]:
        """Yield split, id and the facts to show of the utterances that the labels name."""
        jobs = {u.place: (u, views) for u, views, _ in self.todo}
        for split, columns in self.annotations.items():
            for name, place in zip(columns.ids, _places(self.planned, split, columns.keys), strict=True):
                u, views = jobs.get(place, (None, 0))
                state = self.store.state(u, views) if u else None
                if state and not state.failure:
                    thumbnail = state.thumbnail if self.how.thumbnails else b""
                    words = u.text or state.text or ""
                    path = os.path.abspath(u.path).encode(errors="backslashreplace").decode()
                    yield split, name, Seen(words, path, u.start, u.end or 0.0, thumbnail)


def _places(features: Features, split: str, keys: Sequence[Any]) -> list[Any]:
    """Return the place of each key in a split, ``None`` where there is none."""
    places = features.locate(split, keys)
    if isinstance(features, Combined):  # cut into folds: a number of variants, and the places in each
        places = [place and place[1][0][0] for place in places]
    return list(places)


def _asked_for(source: JoinedSource, utterances: Sequence[Utterance], how: Recipe) -> tuple[list[Job], list[str], str]:
    """Return the utterances that the labels name, unmatched ids, and how one of these differs from a name."""
    by_place = {u.place: u for u in utterances}
    first, found, unknown, near = source.spec.splits[0], {}, [], ""
    features = next(iter(source.features.values()))
    names = collections.defaultdict(list, features.names())
    for split, columns in source.annotations.items():
        (key, count), *_ = Counter(columns.keys).most_common(1) or [("", 0)]
        if count > 1:
            raise ConclugenError(f"the labels name {key!r} twice in {split}; leave one row out")
        places = dict(zip(columns.keys, _places(features, split, columns.keys), strict=True))
        there = [place for place in places.values() if place is not None]
        views = how.num_views if split == first else 1
        found |= {place: (by_place[place], views, by_place[place].stamp()) for place in there}
        lost = [key for key, place in places.items() if place is None]
        unknown += lost
        path = next((key for key in lost if "/" in key), None)
        if path is not None or (lost and not there):
            near = (
                matching.likeness([path or lost[0]], names[split] + names[""])
                or f"clips have names such as {min(by_place)!r}"
            )
            raise ConclugenError(
                f"the labels name {path or lost[0]!r} in {split}, but no clip has this name; {near}; ids are paths with _ "
                "for / and without ending (lines of subtitles with --cut); correct the ids, or leave these rows out"
            )
        near = near or matching.likeness(lost, set(names[split] + names[""]) - set(places))
    if not found:
        raise ConclugenError(f"the labels name no clip, such as {min(by_place)!r}; give a table that has rows")
    return [found[place] for place in sorted(found)], unknown, near


def _work(
    store: Store,
    networks: Networks,
    how: Recipe,
    jobs: Sequence[Job],
    num_workers: int = 0,
    clock: Clock | None = None,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Extract utterances into a store."""
    by_place, clock = {job[0].place: job for job in jobs}, clock or Clock()
    with contextlib.closing(preparation.prepared([job[:2] for job in jobs], how, num_workers)) as prepared:
        for each, found in vectors(prepared, backbones_lib.load(networks), clock):
            _, views, stamp = by_place[each.place]
            texts = (each.failure, *each.notes)  # which name files, whose names may be no UTF-8
            failure, *notes = (text.encode(errors="backslashreplace").decode() for text in texts)
            state = State(stamp, views, sorted(found), notes, failure, each.text, each.thumbnail)
            with clock.parts.timed("writing"):
                store.put(each.place, found, state)
            done()
