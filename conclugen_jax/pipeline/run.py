"""Run all stages, from a folder of clips, feature files or a built data set to a trained model, its scores and a page.

Each stage saves its outcome in the folder of the run, so that a repeated command skips it. The folder is also that of a
study.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from conclugen_jax.data import (
    builders,
    formats,
    inspection,
    manifest as manifest_lib,
    shards,
)
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import health
from conclugen_jax.pipeline import plan, rules, source as source_lib
from conclugen_jax.pipeline.source import Source
from conclugen_jax.pipeline.stages import Stage, Stages
from conclugen_jax.pretrain import setup
from conclugen_jax.runs import config as config_lib, configuration_files, log as log_lib, workdir as workdir_lib
from conclugen_jax.runs.layout import REQUEST
from conclugen_jax.study import results, study as study_lib
from conclugen_jax.study.definition import Run
from conclugen_jax.study.report import reading, report, tables
from conclugen_jax.system import engines, files, progress, signals

CONFIG, INSPECTION = "config.py", "inspection.json"
FEATURES, INSPECT, SETTINGS, TRAINING, REPORT = "features", "inspection", "settings", "training and scores", "report"
ROWS_A_WORKER = 5000
"""Rows of a built data set that are read in the seconds that a process takes to start."""
SECONDS = 2.0
"""Interval between two reads of the logs of runs in other processes."""


class Outcome(NamedTuple):
    """The results of a run and their places."""

    workdir: Path
    data: Path  # the data set of all rows
    config: Path  # file of the settings, which ``--config`` takes
    report: Path
    pretraining: Path  # folder of the pretraining run, for vectors
    results: Mapping[str, Any] | None = None  # see ``study/results.py``; ``None`` without labels
    classifier: Path | None = None  # folder of the final classifier; ``None`` without labels
    clips: bool = False  # whether the rows were extracted from clips
    remarks: Sequence[str] = ()  # sentences on the data
    split: str = "train"  # name of the training split


class _Chosen(NamedTuple):
    """The chosen settings, with their reasons."""

    config: ConfigDict
    settings: Sequence[rules.Setting]
    known: rules.Facts  # of the training rows, of folds the fewest
    scheme: rules.Scheme | None  # ``None``: nothing can be scored
    path: str  # of the data sets that are scored, with {fold} and {shuffle}
    remarks: Sequence[str]


def run(
    source: Source,
    workdir: str | Path,
    *,
    quick: bool = False,
    config: str = "",
    changes: Sequence[tuple[str, str]] = (),
    engine: engines.Engine | None = None,
) -> Outcome:
    """Run all stages that are not done yet.

    Args:
      source: what to train on.
      workdir: folder for all results.
      quick: whether to take a first look: fewer steps, one fold, at most 60 clips.
      config: name or file of a configuration that is used as it is, instead of settings chosen from the data.
      changes: keys of the configuration with their values as text, above all settings.
      engine: starts the processes that train; ``None``: of this machine.

    Raises:
      ConclugenError: the source has no clips or features, it has too few rows, or the folder holds another run.
      Interrupted: a signal came; the same call resumes.
    """
    source.check(Path(workdir))
    with workdir_lib.claim(workdir) as root, signals.caught() as stop:
        _settle(root, source, {"quick": quick, "config": config, "changes": [list(pair) for pair in changes]})
        with Stages((FEATURES, INSPECT, SETTINGS, TRAINING, REPORT)) as stages:
            with stages(FEATURES) as stage, stop.at_once():
                data = source_lib.built(source, root, quick, stage)
            dataset = shards.open_dataset(data, verify="size")
            with stages(INSPECT) as stage, stop.at_once():
                known = _inspected(root, dataset, stage)
            with stages(SETTINGS) as stage, stop.at_once():
                chosen = _settings(root, dataset, known, quick, stage)
                chosen = _configured(root, dataset, chosen, config, changes, stage)
            with stages(TRAINING) as stage:
                runs = plan.model(chosen.config, chosen.scheme, chosen.known, quick=quick)
                found = _trained(root, dataset, chosen, runs, quick, stop, stage, engine or engines.Engine())
            with stages(REPORT) as stage, stop.at_once():
                pretraining = root / (runs[-1].config.downstream.checkpoint or runs[-1].path)
                page, sick = _reported(root, dataset, chosen, pretraining, found)
                stage.say(str(page))
    scheme, extracted = chosen.scheme, "extraction" in dataset.manifest.source
    classifier = root / plan.CLASSIFIER if scheme else None
    remarks, split = [*chosen.remarks, *sick], runs[-1].config.data.train_split
    return Outcome(root, data, root / CONFIG, page, pretraining, found, classifier, extracted, remarks, split)


def _settle(root: Path, source: Source, how: Mapping[str, Any]) -> None:
    """Write the arguments of a new run; refuse a folder whose run was started with other arguments.

    Before a data set exists, all arguments may change, since extraction compares its own settings. The configuration may
    change until it is written.
    """
    asked = {
        "source": str(source.path.absolute()),
        "labels": [str(path.absolute()) for path in source.labels],
        **{name: getattr(source, name) for name in ("pattern", "drop_bad")},
        "layout": dataclasses.asdict(source.layout),
        **how,
        "files": source_lib.stamp(source, root),
    }
    asked, path = json.loads(json.dumps(asked)), root / REQUEST
    begun = (root / INSPECTION).exists() or any((root / source_lib.DATA).glob(f"*/*/{manifest_lib.FILE}"))
    if not (begun and path.exists()):
        files.write_json(path, asked)
        return
    before = files.read_json(path, dict[str, Any], way_out="choose another --workdir")
    unsettled = () if (root / CONFIG).exists() else ("config", "changes")
    changed = [key for key in asked if before.get(key) != asked[key] and key not in unsettled]
    if not changed:
        files.write_json(path, asked)
    if changed == ["files"]:
        fact = f"the files of {source.path} have changed since the run started"
        raise ConclugenError(f"{root}: {fact}; choose another --workdir")
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {asked[key]!r} now" for key in changed if key != "files")
        way_out = "repeat the command with the same arguments, or choose another --workdir"
        raise ConclugenError(f"{root}: the run was started with other arguments ({shown}); {way_out}")


def _inspected(root: Path, dataset: shards.Dataset, stage: Stage) -> rules.Facts:
    """Report persons and classes of the training rows, and save the whole inspection as a file."""
    found = inspection.inspect(dataset.path, progress=stage.counter("rows"))
    files.write_json(root / INSPECTION, found)
    known = rules.facts(dataset)
    several = "es" * (len(known.counts) != 1), "s" * (len(known.counts) != 1)
    kinds = {"single": f"{len(known.counts)} class{several[0]}", "multi": f"{len(known.counts)} label{several[1]}"}
    kinds["value"] = "a number"
    persons = (
        f"{known.persons} persons with {known.clips:g} rows each (median)" if known.persons else "no persons named"
    )
    persons = f"1 person with {known.clips:g} rows" if known.persons == 1 else persons
    stage.say(f"{known.rows:,} training rows, {kinds.get(known.kind, 'no labels')}, {persons}")
    return known


def _settings(root: Path, dataset: shards.Dataset, known: rules.Facts, quick: bool, stage: Stage) -> _Chosen:
    """Cut the folds, and choose settings from the smallest of their training splits."""
    scheme = rules.scheme(known, quick=quick) if rules.is_labelled(known) else None
    kept, remarks = rules.modalities(known)
    manifest, path = dataset.manifest, str(dataset.path.absolute())
    if scheme is None and known.kind == "none":
        remarks.append("no labels, so no scores: the same command with labels (labels.csv) measures accuracy")
    elif scheme is None:
        found = f"one class alone ({', '.join(known.counts) or 'none'})"
        remarks.append(f"{found}: there is nothing to predict, so no scores")
    else:
        remarks.append(scheme.reason)
    if scheme and scheme.num_folds:
        folds = _cut(root, dataset, known, scheme, kept, stage)
        known = rules.facts(min(folds, key=lambda fold: fold.manifest.splits["train"]["num_examples"]))
        path = str(root.absolute() / source_lib.DATA / plan.fold_name(manifest.name, scheme) / manifest.version)
    present, dims = ({m: x[m] for m in kept} for x in (known.present, known.dims))
    known, devices = known._replace(present=present, dims=dims), jax.devices()
    settings = rules.settings(known, quick=quick, num_devices=len(devices), slow=devices[0].platform == "cpu")
    return _Chosen(ConfigDict(), settings, known, scheme, path, remarks)


def _cut(
    root: Path, dataset: shards.Dataset, known: rules.Facts, scheme: rules.Scheme, kept: Sequence[str], stage: Stage
) -> list[shards.Dataset]:
    """Return the folds of a scheme as data sets of the modalities that are kept; rows that have none are dropped."""
    name, version, folds = dataset.manifest.name, dataset.manifest.version, []
    workers = min(os.cpu_count() or 1, 1 + known.rows // ROWS_A_WORKER)
    how = {"fold_by": scheme.fold_by, "fold_seed": 1, "fold_validation": False, "only": tuple(kept)}
    for number, seed in enumerate(scheme.seeds, 1):
        stage.say(f"fold {number} of {len(scheme.seeds)}")
        cut = Request(formats.GENERIC, dataset.path.absolute(), name=name, version=version, **how)
        opened = formats.open_source(dataclasses.replace(cut, folds=(scheme.num_folds, seed)))
        built = builders.build(opened, root / source_lib.DATA, drop_bad=True, num_workers=workers)
        folds.append(shards.open_dataset(built, verify="size"))
    return folds


def _configured(
    root: Path, dataset: shards.Dataset, chosen: _Chosen, config: str, changes: Sequence[tuple[str, str]], stage: Stage
) -> _Chosen:
    """Make the pretraining configuration from settings or a file, check it against the data, and save it."""
    for key, _ in changes:
        if key in ("data.path", "data.train_split"):
            raise ConclugenError(f"--config.{key}: SOURCE says the data; leave it out")
    data = {
        "data.path": str(dataset.path.absolute()),
        "data.train_split": rules.training_split(dataset.manifest.splits),
    }
    settings = [] if config else chosen.settings
    made = plan.configured(settings, data, changes, config or plan.START)
    _try(made, made.data.path, made.data.train_split)
    for seed in chosen.scheme.seeds if chosen.scheme else ():
        path = chosen.path.replace("{fold}", str(seed)).replace("{shuffle}", "1")
        _try(made, path, chosen.known.splits[0])
    if not (root / CONFIG).exists():
        files.write_atomically(root / CONFIG, plan.written(settings, made, dataset.manifest.name))
    elif changed := config_lib.differences(configuration_files.load(str(root / CONFIG), of_run=True), made):
        way_out = "restore it, or pass it by --config with another --workdir"
        raise ConclugenError(
            f"{root / CONFIG}: differs from what this command chooses ({'; '.join(changed)}); {way_out}"
        )
    for one in settings:
        progress.say(f"  {one.key} = {one.value!r}: {one.reason}")
    stage.say(str(root / CONFIG))
    return chosen._replace(config=made, settings=settings)


def _try(config: ConfigDict, path: str, split: str) -> None:
    """Refuse a configuration that does not fit one of the training sets, before any training starts."""
    config = config.copy_and_resolve_references()
    config.data.path, config.data.train_split, config.data.verify = path, split, "size"
    setup.open_data(config, jax.device_count())


def _trained(
    root: Path,
    dataset: shards.Dataset,
    chosen: _Chosen,
    runs: list[Run],
    quick: bool,
    stop: signals.Stop,
    stage: Stage,
    engine: engines.Engine,
) -> dict[str, Any] | None:
    """Run the study that measures the gain of pretraining, and train the final classifier; without labels only pretrain."""
    with _watched(root, stage):
        if chosen.scheme is None:
            if not all(study_lib.is_done(root, run) for run in runs):
                study_lib.work(root, [[runs]], engine.plan(root, 1, 1, 0), stop, engine)
            found, cells = None, []
        else:
            config = chosen.config.copy_and_resolve_references()
            config.data.path, config.data.train_split = chosen.path, chosen.known.splits[0]
            study = plan.study(config, chosen.scheme, chosen.known, dataset.manifest.name, quick=quick)
            found = study_lib.within(root, study, stop, runs, engine)
            cells = [cell for cell in found["cells"] if cell["status"] != "done"]
    for one in runs:
        if error := results.failure(root / one.path):
            raise ConclugenError(f"{root / one.path}: {error}")
    for cell in cells[:1]:
        progress.say(f"warning: {len(cells)} scores are missing, such as {cell['path']}: {cell['error']}")
    stage.say(f"{len(found['cells']) - len(cells)} scores; {runs[-1].path}" if found else runs[-1].path)
    return found


@contextlib.contextmanager
def _watched(root: Path, stage: Stage) -> Iterator[None]:
    """Show the newest step of the runs below a folder while other processes train them."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(SECONDS):
            with contextlib.suppress(OSError, IndexError, ValueError, KeyError):
                newest = max(root.glob(f"**/{log_lib.METRICS}"), key=lambda path: path.stat().st_mtime)
                step = json.loads(newest.read_text(encoding="utf-8").splitlines()[-1])["step"]
                stage.say(f"{newest.parent.relative_to(root)}, step {step:,}")

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _reported(
    root: Path, dataset: shards.Dataset, chosen: _Chosen, pretraining: Path, found: Mapping[str, Any] | None
) -> tuple[Path, list[str]]:
    """Write the page; return its path, and warnings about the pretraining."""
    study = reading.read(root) if found else reading.of_run(pretraining, plan.METHOD)
    parts = [tables.Part(notes=list(chosen.remarks))]
    if chosen.settings:
        rows = [(one.key, repr(one.value), one.reason) for one in chosen.settings]
        parts.append(tables.words("", ("setting", "value", "reason"), rows))
    written = report.write(study, root, title=f"Run on {dataset.manifest.name}", last={"Settings": parts})
    return written.files[0], health.warnings(health.of_run(pretraining))
