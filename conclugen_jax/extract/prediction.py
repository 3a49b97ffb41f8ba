"""From clips to predictions. Features are made as those that the run was trained on."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.markup import escape
from rich.table import Table

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import embedding
from conclugen_jax.extract import backbones as backbones_lib, preparation, ready
from conclugen_jax.extract.backbones import Backbone, Networks
from conclugen_jax.extract.companions import Companions
from conclugen_jax.extract.networks import mtcnn
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import vectors
from conclugen_jax.runs import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run predicts for an utterance."""

    clip: str  # path
    start: float = 0.0  # in seconds
    end: float = 0.0  # in seconds
    text: str | None = None  # what is said, as far as known
    classes: tuple[str, ...] = ()  # of the run's label; empty for a number
    probability: tuple[float, ...] = ()  # of each class; empty for a number
    predicted: tuple[str, ...] | float = ()  # names of the class, or of any number of labels; or the number
    missing: tuple[str, ...] = ()  # modalities of the run that the clip lacks
    notes: tuple[str, ...] = ()  # remarks for the user
    failure: str = ""  # why there is no prediction; empty if there is one
    boxes: tuple[tuple[float, ...], ...] = ()  # of faces: (time from the start, x, y, x, y), in parts of the frame

    @property
    def said(self) -> str:
        """Return what is predicted, in words."""
        return f"{self.predicted:.2f}" if isinstance(self.predicted, float) else ", ".join(self.predicted) or "none"

    def to_json(self) -> dict[str, Any]:
        """Return all but the boxes."""
        facts = dataclasses.asdict(self)
        facts["probability"] = dict(zip(facts.pop("classes"), facts["probability"], strict=False))
        del facts["boxes"]
        return facts


def predict(
    workdir: str | Path,
    files: Sequence[Path],
    folders: Sequence[str],
    own: Sequence[str] = (),
    *,
    cut: bool = False,
    recogniser: str = "",
    mtcnn_folder: str | Path = mtcnn.WEIGHTS,
    num_workers: int = 0,
    person: str = "",
    reference: Sequence[Path] = (),
) -> list[Prediction]:
    """Predict the label of clips by a downstream run.

    Args:
      workdir: workdir of a downstream run whose data set was made by extraction.
      files: paths of the clips.
      folders: folders of the converted weights that made the data set's vectors of the run's modalities, in any order.
      own: the user's own backbones, as ``MODULE:FUNCTION``; ready backbones need not be named.
      cut: whether each line of the subtitles beside a clip is an utterance, instead of the whole clip.
      recogniser: speech recogniser for clips without words; empty for the recogniser of the data set.
      mtcnn_folder: folder of the weights of MTCNN.
      num_workers: number of processes that decode; 0 decodes in this process.
      person: the person in all clips, for a run that standardises by person. A person of the run's training split gets the
        statistics of that split. A new person gets those of these clips and of ``reference``. If it is empty, the statistics
        of the split are used, with a remark.
      reference: further clips of the person.

    Returns:
      One entry for each utterance, in order of clips and times.

    Raises:
      ConclugenError: the run is of another kind, or its data set was made with other weights.
    """
    network = embedding.load(workdir)
    if network.task is None:
        raise ConclugenError(f"{workdir}: a pretraining run predicts nothing; name a downstream run")
    manifest = workdir_lib.read_data(workdir)
    networks = Networks(tuple(map(str, folders)), tuple(own))
    backbones, how = _same_way(manifest, workdir, network.modalities, networks, recogniser, Path(mtcnn_folder))
    if (person or reference) and not network.persons:
        raise ConclugenError(f"{workdir}: does not standardise by person; leave --person out")
    beside, own = Companions(), set(map(str, files))
    further = [file for file in reference if str(file) not in own]
    utterances = [u for file in (*files, *further) for u in _utterances(file, cut, beside)]
    prepared = preparation.prepared([(u, 1) for u in utterances], how, num_workers)
    found = {each.place: (each, rows) for each, rows in vectors(prepared, backbones)}
    if network.persons:
        found = _by_person(found, network, person, manifest.modalities, stored=not reference)
    utterances = [u for u in utterances if u.path in own]
    run = embedding.Computing(network)
    return [_prediction(u, *found[u.place], network, run, manifest.modalities) for u in utterances]


def _by_person(
    found: dict[str, tuple[preparation.Prepared, dict[str, np.ndarray]]],
    network: embedding.Network,
    person: str,
    sizes: Mapping[str, int],
    *,
    stored: bool,
) -> dict[str, tuple[preparation.Prepared, dict[str, np.ndarray]]]:
    """Return what was found with vectors standardised by one person; ``stored`` statistics are used if there are any."""
    places, persons = [place for place, (_, rows) in found.items() if rows], network.persons
    rows = [found[place][1] for place in places]
    present = {m: np.array([m in each for each in rows], bool) for m in network.modalities}
    zeros = {m: np.zeros((1, sizes[m]), np.float32) for m in network.modalities}
    features = {m: np.concatenate([each.get(m, zeros[m]) for each in rows] or [zeros[m]]) for m in network.modalities}
    known = persons.data if stored and person in persons.names else ""
    by_person = persons.applied(features, present, [person] * len(places), data=known) if places else {}
    remark = (
        ()
        if person
        else ("unknown person: standardised with the statistics of the split; name the person with --person",)
    )
    made = dict(found)
    for i, place in enumerate(places):
        each, _ = found[place]
        vectors_of = {m: by_person[m][i : i + 1] for m in network.modalities if present[m][i]}
        made[place] = dataclasses.replace(each, notes=(*each.notes, *remark)), vectors_of
    return made


def _utterances(file: Path, cut: bool, beside: Companions) -> list[Utterance]:
    return beside.with_words(Utterance(str(file), "", str(file), sound=beside.sound(file)), cut=cut)


def _same_way(
    manifest: Manifest,
    workdir: str | Path,
    modalities: Sequence[str],
    networks: Networks,
    recogniser: str,
    faces: Path,
) -> tuple[list[Backbone], preparation.Recipe]:
    """Return the backbones of a run's modalities, and how clips are prepared, as the run's data set was made."""
    if "extraction" not in manifest.source:
        fault = "was not made by conclugen extract, so it does not record how its features were made"
        raise ConclugenError(f"{workdir}: its data set {manifest.name!r} {fault}; train on one that was")
    try:
        made = msgspec.convert(manifest.source["extraction"], preparation.Provenance)
        needed = [name for name, facts in made.backbones.items() if facts["modality"] in modalities]
    except (msgspec.ValidationError, KeyError) as e:
        way_out = f"restore its {workdir_lib.DATA}, or train again"
        raise ConclugenError(f"{workdir}: damaged facts of its data set ({e}); {way_out}") from e
    networks = dataclasses.replace(networks, options=made.options)
    found = {b.name: b for b in backbones_lib.load(networks)} if networks.folders or networks.own else {}
    if absent := [name for name in needed if name not in found and name in ready.READY]:
        found |= {b.name: b for b in backbones_lib.load(Networks(own=tuple(absent), options=made.options))}
    if missing := ", ".join(name for name in needed if name not in found):
        raise ConclugenError(f"{workdir}: its features need {missing}; name the weights with --weights or --backbone")
    if spare := sorted(found.keys() - made.backbones.keys()):
        raise ConclugenError(f"{workdir}: its features were made without {', '.join(spare)}; leave that out")
    recogniser = recogniser or made.speech.get("name", "")
    how = preparation.recipe(
        [found[name] for name in needed],
        size=made.options.size,
        faces=str(faces) if made.frames.faces else "",
        no_face=made.frames.no_face or "drop",
        recogniser=recogniser,
    )
    ours = preparation.provenance(list(found.values()), how, made.options)
    tools = [{**p.backbones, "mtcnn": msgspec.to_builtins(p.frames)} for p in (ours, made)]
    if recogniser and recogniser == made.speech.get("name"):  # another one may be chosen
        tools = [{**facts, recogniser: p.speech} for facts, p in zip(tools, (ours, made), strict=True)]
    compare(*tools, str(workdir))
    return [found[name] for name in needed], how


def compare(found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]], whose: str) -> None:
    """Refuse tools, facts by name, that differ from those that made the data set of a run; where weights came from may."""
    for name, ours in sorted(found.items()):
        keys = (ours.keys() | expected[name].keys()) - {"source"}
        for key in sorted(keys, key=lambda key: (key != "sha256", key)):  # the hash says most
            a, b = (json.dumps(facts.get(key), sort_keys=True) for facts in (ours, expected[name]))
            if a != b:
                theirs = f"that of the features of {whose} is {b[:200]}"
                raise ConclugenError(f"{name}: its {key} is {a[:200]}, {theirs}; use the same or extract again")


def _prediction(
    u: Utterance,
    each: preparation.Prepared,
    rows: dict[str, np.ndarray],
    network: embedding.Network,
    run: Callable[..., dict[str, np.ndarray]],
    sizes: dict[str, int],
) -> Prediction:
    if each.failure:
        return Prediction(u.path, u.start, u.end or 0.0, u.text, failure=each.failure)
    missing, label = tuple(m for m in network.modalities if m not in rows), network.task.label
    known = Prediction(u.path, *each.times, each.text, missing=missing, notes=each.notes, boxes=each.boxes)
    if len(missing) == len(network.modalities):
        failure = f"{u.path}: lacks {', '.join(missing)}, all that the run uses"
        return dataclasses.replace(known, failure=failure)
    features = {m: rows[m] if m in rows else np.zeros((1, sizes[m]), np.float32) for m in network.modalities}
    found = run(features, {m: np.array([m in rows]) for m in network.modalities})
    predicted = found["prediction"][0]
    if label.kind == "value":
        return dataclasses.replace(known, predicted=float(predicted))
    names = tuple(label.names[i] for i in ([int(predicted)] if label.kind == "single" else np.flatnonzero(predicted)))
    probability = tuple(map(float, found["probability"][0]))
    return dataclasses.replace(known, classes=label.names, probability=probability, predicted=names)


def table(predictions: Sequence[Prediction], title: str) -> Table:
    """Return a table for a terminal: a row for each prediction of one run that did not fail."""
    classes = predictions[0].classes if predictions else ()
    shown = Table(title=escape(f"{title}: probabilities in %" if classes else title))
    names, rows = ["clip", "seconds", "words", "prediction", *classes, "remarks"], []
    for p in predictions:
        remarks = "; ".join(dict.fromkeys([*(f"no {m}" for m in p.missing), *p.notes]))
        probability = [f"{100 * x:.1f}" for x in p.probability] or [""] * len(classes)
        rows.append([Path(p.clip).name, f"{p.start:.1f}-{p.end:.1f}", p.text or "", p.said, *probability, remarks])
    kept = [i for i in range(len(names)) if any(row[i] for row in rows)]
    for i in kept:
        shown.add_column(escape(names[i]), justify="right" if 4 <= i < len(names) - 1 else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row[i]) for i in kept))
    return shown
