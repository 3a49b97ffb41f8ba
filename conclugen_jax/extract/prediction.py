"""From clips to predictions. Features are made as those that the run was trained on."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.markup import escape
from rich.table import Table

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import embedding
from conclugen_jax.extract import backbones as backbones_lib
from conclugen_jax.extract import clips, preparation, provenance, workers
from conclugen_jax.extract.backbones import Backbone, Networks
from conclugen_jax.extract.clips import Utterance
from conclugen_jax.extract.media import speech
from conclugen_jax.extract.networks import mtcnn, weights
from conclugen_jax.extract.provenance import Provenance
from conclugen_jax.extract.vectors import vectors
from conclugen_jax.run import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run predicts for an utterance.

    Attributes:
      clip: path.
      start: in seconds.
      end: in seconds.
      text: what is said, as far as known.
      classes: of the run's label; empty for a number.
      probability: of each class; empty for a number.
      predicted: names of the classes predicted (one, or any number of labels), or the number.
      missing: modalities of the run that the clip lacks.
      notes: remarks for the user.
      failure: why there is no prediction; empty if there is one.
      boxes: of faces: (time from the start, x, y, x, y), in parts of the frame.
    """

    clip: str
    start: float = 0.0
    end: float = 0.0
    text: str | None = None
    classes: tuple[str, ...] = ()
    probability: tuple[float, ...] = ()
    predicted: tuple[str, ...] | float = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failure: str = ""
    boxes: tuple[tuple[float, ...], ...] = ()

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
) -> list[Prediction]:
    """Predict what a downstream run was trained to predict.

    Args:
      workdir: of a downstream run whose data set was made by extraction.
      files: clips.
      folders: of converted weights, those of the run's modalities that the data set was made with, in any order.
      own: backbones of the user's own, as ``MODULE:FUNCTION``.
      cut: an utterance for each line of the subtitles beside a clip; else the whole clip is one.
      recogniser: of speech, where no words are known; empty: the one of the data set.
      mtcnn_folder: weights of MTCNN.
      num_workers: processes that decode; 0: this one.

    Returns:
      One entry for each utterance, in order of clips and times.

    Raises:
      ConclugenError: a run of another kind, or weights other than its data set's.
    """
    network = embedding.load(workdir)
    if network.task is None:
        raise ConclugenError(f"{workdir}: a pretraining run predicts nothing; name a downstream run")
    manifest = workdir_lib.read_data(workdir)
    networks = Networks(tuple(map(str, folders)), tuple(own))
    backbones, how = _same_way(manifest, workdir, network.modalities, networks, recogniser, Path(mtcnn_folder))
    utterances = [u for file in files for u in _utterances(file, cut)]
    prepared = workers.prepared([(u, 1) for u in utterances], how, num_workers)
    found = {each.place: (each, rows) for each, rows in vectors(prepared, backbones)}
    run = embedding.predictor(network)
    return [_prediction(u, *found[u.place], network, run, manifest.modalities) for u in utterances]


def _utterances(file: Path, cut: bool) -> list[Utterance]:
    return clips.with_words(Utterance(str(file), "", str(file), sound=clips.sound_beside(file)), cut=cut)


def _same_way(
    manifest: Manifest,
    workdir: str | Path,
    modalities: Sequence[str],
    networks: Networks,
    recogniser: str,
    faces: Path,
) -> tuple[list[Backbone], preparation.Recipe]:
    """Return the backbones of a run's modalities, and how clips are prepared, as the run's data set was made."""
    made = _made(manifest, workdir)
    networks = dataclasses.replace(networks, options=made.options)
    by_name = {b.name: b for b in backbones_lib.load(networks)} if networks.folders or networks.own else {}
    needed = [name for name, facts in made.backbones.items() if facts["modality"] in modalities]
    found = provenance.of_backbones(list(by_name.values()))
    provenance.compare(found, made.backbones, needed, str(workdir))
    if made.frames.faces:
        _check_faces(made.frames, workdir, faces)
    recogniser = recogniser or made.speech.get("name", "")
    if recogniser:
        preparation.recogniser(recogniser)  # an unknown one is no fault of the clips
    if recogniser and recogniser == made.speech.get("name") and speech.provenance(recogniser) != made.speech:
        raise ConclugenError(
            f"{recogniser}: of another version or with another model than the words of {workdir} were recognised with; install "
            "that one, or choose a recogniser with --speech"
        )
    how = preparation.recipe(
        [by_name[name] for name in needed],
        size=made.options.size,
        faces=str(faces) if made.frames.faces else "",
        no_face=made.frames.no_face or "drop",
        recogniser=recogniser,
    )
    return [by_name[name] for name in needed], how


def _made(manifest: Manifest, workdir: str | Path) -> Provenance:
    """Return how the data set of a run was made."""
    made = manifest.source.get("extraction")
    if not isinstance(made, dict):
        raise ConclugenError(
            f"{workdir}: its data set {manifest.name!r} was not made by conclugen extract, so nothing says how its features "
            "are to be made; train on one that was"
        )
    try:
        return provenance.read(made)
    except msgspec.ValidationError as e:
        raise ConclugenError(
            f"{workdir}: damaged facts of its data set ({e}); restore its {workdir_lib.DATA}, or train anew"
        ) from e


def _check_faces(made: provenance.Frames, workdir: str | Path, faces: Path) -> None:
    if made.faces_per_second != preparation.DETECTIONS:
        raise ConclugenError(
            f"{workdir}: in the clips of its data set faces were not looked for {preparation.DETECTIONS:g} times a second, as "
            "now; extract it anew"
        )
    if weights.load(faces).sha256 != made.faces:
        raise ConclugenError(f"{faces}: other weights of MTCNN than those of the data set; name these with --mtcnn")


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
    present = {m: np.array([m in rows]) for m in network.modalities}
    missing = tuple(m for m in network.modalities if m not in rows)
    facts = {"text": each.text, "notes": each.notes, "boxes": each.boxes, "missing": missing}
    if len(missing) == len(network.modalities):
        return Prediction(
            u.path, *each.times, failure=f"{u.path}: lacks {', '.join(missing)}, all that the run uses", **facts
        )
    features = {m: rows[m] if m in rows else np.zeros((1, sizes[m]), np.float32) for m in network.modalities}
    found, label = run(features, present), network.task.label
    if label.kind == "value":
        return Prediction(u.path, *each.times, predicted=float(found["prediction"][0]), **facts)
    names = _names(label, found["prediction"][0])
    probability = tuple(map(float, found["probability"][0]))
    return Prediction(u.path, *each.times, classes=label.names, probability=probability, predicted=names, **facts)


def _names(label: LabelSpec, predicted: Any) -> tuple[str, ...]:
    if label.kind == "single":
        return (label.names[int(predicted)],)
    return tuple(name for name, yes in zip(label.names, predicted, strict=True) if yes)


def table(predictions: Sequence[Prediction], title: str) -> Table:
    """Return a table of predictions for a terminal, a row for each utterance.

    Args:
      predictions: those that did not fail; of one run.
      title: what made them.
    """
    classes = predictions[0].classes if predictions else ()
    shown = Table(title=escape(f"{title}: probabilities in %" if classes else title))
    said = any(p.text for p in predictions)
    for column in ("clip", "seconds", *(["words"] if said else []), "prediction"):
        shown.add_column(column, overflow="fold")
    for name in classes:
        shown.add_column(escape(name), justify="right")
    remarks = [_remarks(p) for p in predictions]
    if any(remarks):
        shown.add_column("remarks", overflow="fold")
    for p, remark in zip(predictions, remarks, strict=True):
        cells = [Path(p.clip).name, f"{p.start:.1f}-{p.end:.1f}", *([p.text or ""] if said else []), p.said]
        row = [*map(escape, cells), *(f"{100 * x:.1f}" for x in p.probability)]
        shown.add_row(*row, *([escape(remark)] if any(remarks) else []))
    return shown


def _remarks(p: Prediction) -> str:
    return "; ".join(dict.fromkeys([*(f"no {modality}" for modality in p.missing), *p.notes]))
