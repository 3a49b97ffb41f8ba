"""From clips to predictions: the features are made as those that the run was trained on were."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.data.sources import LabelSpec
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import embedding
from conclugen_jax.extract import backbones as backbones_lib
from conclugen_jax.extract import clips, extraction, preparation, workers
from conclugen_jax.extract.backbones import PRECISIONS, Backbone, Networks, Options
from conclugen_jax.extract.clips import Utterance
from conclugen_jax.extract.media import sampler, speech
from conclugen_jax.extract.networks import mtcnn, weights
from conclugen_jax.run import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a run says of an utterance.

    Attributes:
      clip: path.
      start: in seconds.
      end: in seconds.
      text: what is said, as far as known.
      classes: of the run's label; empty for a number.
      probability: of each class; empty for a number.
      predicted: names of the classes predicted (one, or any number of labels), or the number.
      missing: modalities of the run that the clip lacks.
      notes: what was odd.
      failure: why there is no prediction; empty where there is.
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
        """What is predicted, in words."""
        return f"{self.predicted:.2f}" if isinstance(self.predicted, float) else ", ".join(self.predicted) or "none"

    def to_json(self) -> dict[str, Any]:
        """Without the boxes."""
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
    if network.classifier is None:
        raise ConclugenError(f"{workdir}: a pretraining run predicts nothing; name a downstream run")
    manifest = workdir_lib.read_data(workdir)
    networks = Networks(tuple(map(str, folders)), tuple(own))
    backbones, how = _same_way(manifest, workdir, network.modalities, networks, recogniser, Path(mtcnn_folder))
    utterances = [u for file in files for u in _utterances(file, cut)]
    tally, found = extraction.Tally(), {}
    jobs = [(u, 1) for u in utterances]
    for each, vectors in extraction.vectors(workers.prepared(jobs, how, num_workers), backbones, tally):
        found[each.place] = (each, vectors)
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
    """Backbones of the modalities of a run and the recipe, as its data set was made."""
    made = manifest.source.get("extraction")
    if not isinstance(made, dict):
        raise ConclugenError(
            f"{workdir}: its data set {manifest.name!r} was not made by launch.extract, so nothing says how its features are "
            "to be made; train on one that was"
        )
    try:
        names = {field.name for field in dataclasses.fields(Options)}
        how_run = Options(**{k: v for k, v in made["options"].items() if k in names})
        expected = {name: dict(facts) for name, facts in made["backbones"].items()}
        needed = [name for name, facts in expected.items() if facts["modality"] in modalities]
        crops, no_face, heard = made["frames"]["faces"], made["frames"]["no_face"], made["speech"]
        if not all(
            type(x) is str for x in (crops, no_face, heard.get("name", ""), how_run.precision, how_run.front_end)
        ):
            raise ValueError("a name that is no text")
        if (
            how_run.precision not in PRECISIONS
            or type(how_run.size) is not int
            or not 0 < how_run.size <= sampler.MAX_SIDE
        ):
            raise ValueError("options that no extraction has")
        detections = made["frames"].get("faces_per_second")
        recogniser = recogniser or heard.get("name", "")
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ConclugenError(
            f"{workdir}: damaged facts of its data set ({type(e).__name__}: {e}); restore its {workdir_lib.DATA}, or train anew"
        ) from e
    given = networks.folders or networks.own
    by_name = {b.name: b for b in backbones_lib.load(dataclasses.replace(networks, options=how_run))} if given else {}
    _compare(extraction.facts_of(list(by_name.values())), expected, needed, workdir)
    backbones = [by_name[name] for name in needed]
    if crops and detections != preparation.DETECTIONS:
        raise ConclugenError(
            f"{workdir}: in the clips of its data set faces were not looked for {preparation.DETECTIONS:g} times a second, as "
            "now; extract it anew"
        )
    if crops and weights.load(faces).sha256 != crops:
        raise ConclugenError(f"{faces}: other weights of MTCNN than those of the data set; name these with --mtcnn")
    if recogniser:
        preparation.recogniser(recogniser)  # an unknown one is no fault of the clips
    if recogniser and recogniser == heard.get("name") and speech.provenance(recogniser) != heard:
        raise ConclugenError(
            f"{recogniser}: of another version or with another model than the words of {workdir} were recognised with; install "
            "that one, or choose a recogniser with --speech"
        )
    options = {"faces": str(faces) if crops else "", "no_face": no_face or "drop", "recogniser": recogniser}
    return backbones, preparation.recipe(backbones, size=how_run.size, **options)


def _compare(
    found: Mapping[str, dict[str, Any]],
    expected: Mapping[str, dict[str, Any]],
    needed: Sequence[str],
    workdir: str | Path,
) -> None:
    """Compare what is known of backbones, by their names, with what a data set was made with."""
    lacking, spare = [name for name in needed if name not in found], sorted(found.keys() - expected.keys())
    if lacking:
        raise ConclugenError(
            f"{workdir}: its features need {', '.join(lacking)}; name the weights with --weights, or with --backbone"
        )
    if spare:
        raise ConclugenError(f"{workdir}: its features were made without {', '.join(spare)}; leave that out")
    for name in sorted(found):
        # The same weights may come from another file.
        keys = sorted((found[name].keys() | expected[name].keys()) - {"source"}, key=lambda key: (key != "sha256", key))
        for key in keys:
            ours, theirs = (json.dumps(facts[name].get(key), sort_keys=True) for facts in (found, expected))
            if ours != theirs:
                raise ConclugenError(
                    f"{name}: its {key} is {ours[:200]}, that of the features of {workdir} is {theirs[:200]}; name the same"
                )


def _prediction(
    u: Utterance,
    each: preparation.Prepared,
    vectors: dict[str, np.ndarray],
    network: embedding.Network,
    run: Callable[..., dict[str, np.ndarray]],
    sizes: dict[str, int],
) -> Prediction:
    if each.failure:
        return Prediction(u.path, u.start, u.end or 0.0, u.text, failure=each.failure)
    present = {m: np.array([m in vectors]) for m in network.modalities}
    missing = tuple(m for m in network.modalities if m not in vectors)
    facts = {"text": each.text, "notes": each.notes, "boxes": each.boxes, "missing": missing}
    if len(missing) == len(network.modalities):
        return Prediction(
            u.path, *each.times, failure=f"{u.path}: lacks {', '.join(missing)}, all that the run uses", **facts
        )
    features = {m: vectors[m] if m in vectors else np.zeros((1, sizes[m]), np.float32) for m in network.modalities}
    found, label = run(features, present), network.label
    if label.kind == "value":
        return Prediction(u.path, *each.times, predicted=float(found["prediction"][0]), **facts)
    names = _names(label, found["prediction"][0])
    probability = tuple(map(float, found["probability"][0]))
    return Prediction(u.path, *each.times, classes=label.names, probability=probability, predicted=names, **facts)


def _names(label: LabelSpec, predicted: Any) -> tuple[str, ...]:
    if label.kind == "single":
        return (label.names[int(predicted)],)
    return tuple(name for name, yes in zip(label.names, predicted, strict=True) if yes)
