"""Everything in one go: a folder of clips, feature files or a built data set -> a trained model, its scores and a page.

The stages: features, inspection, settings, training and scores, model, report. Each leaves its outcome in the folder of the
run, so that a repeated command does nothing twice.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from conclugen_jax.data import builders, formats, inspection_view, manifest as manifest_lib, shards
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline import plan, rules
from conclugen_jax.pipeline.stages import Stage, Stages
from conclugen_jax.runs import configuration_files, log as log_lib, workdir as workdir_lib
from conclugen_jax.study import results, study as study_lib
from conclugen_jax.study.definition import Run
from conclugen_jax.system import files, progress, signals

CONFIG, REQUEST, DATA = "config.py", "request.json", "data"
FEATURES, SETTINGS, SCORES, MODEL, REPORT = "features", "settings", "training and scores", "model", "report"
SECONDS = 2.0
"""Between two looks at the logs of runs in other processes."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What is trained on, and where its labels are."""

    path: Path  # folder of clips or of features, a file of features, or a built data set
    labels: tuple[Path, ...] = ()  # tables instead of labels.csv in the source
    layout: Layout = dataclasses.field(default_factory=Layout)
    drop_bad: bool = False


class Outcome(NamedTuple):
    """What a run has left in its folder."""

    workdir: Path
    data: Path  # the data set of all rows
    config: Path  # file of the settings, which ``--config`` takes
    report: Path
    results: Mapping[str, Any] | None  # see ``study/results.py``; ``None`` without labels
    classifier: Path | None  # run that predicts, likewise
    warnings: Sequence[str] = ()


def run(
    source: Source,
    workdir: str | Path,
    *,
    quick: bool = False,
    config: str = "",
    changes: Sequence[tuple[str, str]] = (),
) -> Outcome:
    """Do all stages that are not done.

    Args:
      source: what to train on.
      workdir: folder for all that comes of it.
      quick: a first look: fewer steps, one fold.
      config: name or file of a configuration that is used as it is, instead of settings chosen from the data.
      changes: keys of the configuration with their values as text, above all settings.

    Raises:
      ConclugenError: a source without clips or features, too few rows, or a folder that was begun otherwise.
      Interrupted: a signal came; the same call goes on.
    """
    with workdir_lib.claim(workdir) as root, signals.caught() as stop:
        _settle(root, source, {"quick": quick, "config": config, "changes": [list(pair) for pair in changes]})
        with Stages((FEATURES, SETTINGS, SCORES, MODEL, REPORT)) as stages:
            with stages(FEATURES) as stage:
                data = _features(source, root, stage)
            dataset = shards.open_dataset(data, verify="size")
            with stages(SETTINGS) as stage:
                known = rules.facts(dataset)
                scheme = rules.scheme(known, quick=quick) if rules.is_labelled(known) else None
                chosen = _settings(root, dataset, known, scheme, quick, config, changes, stage)
            with stages(SCORES) as stage:
                found = _scores(root, chosen, scheme, dataset, stop, stage)
            with stages(MODEL) as stage:
                _work(root, plan.model(chosen.config, scheme, chosen.known), stop, stage)
            with stages(REPORT) as stage:
                report = _report(root, chosen, found, stage)
    classifier = root / plan.CLASSIFIER if scheme else None
    return Outcome(root, data, root / CONFIG, report, found, classifier, chosen.remarks)


class _Chosen(NamedTuple):
    """What is trained, and why."""

    config: ConfigDict
    settings: Sequence[rules.Setting]
    known: rules.Facts  # of the smallest training split
    path: str  # of the data sets that are scored, with {fold} and {shuffle}
    remarks: Sequence[str]


def _settle(root: Path, source: Source, how: Mapping[str, Any]) -> None:
    """Write what was asked for, or refuse a folder in which something else was begun."""
    asked = {
        "source": str(source.path.absolute()),
        "labels": [str(path.absolute()) for path in source.labels],
        "layout": dataclasses.asdict(source.layout),
        "drop_bad": source.drop_bad,
        **how,
        "files": _stamp(source),
    }
    asked, path = json.loads(json.dumps(asked)), root / REQUEST
    if not path.exists():
        files.write_json(path, asked)
        return
    before = files.read_json(path, dict[str, Any], way_out="choose another --workdir")
    changed = [key for key in asked if before.get(key) != asked[key]]
    if changed == ["files"]:
        raise ConclugenError(
            f"{root}: the files of {source.path} have changed since it was begun; choose another --workdir"
        )
    if changed:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {asked[key]!r} now" for key in changed if key != "files")
        way_out = "repeat the command as it was, or choose another --workdir"
        raise ConclugenError(f"{root}: was begun otherwise ({shown}); {way_out}")


def _stamp(source: Source) -> str:
    """Return a hash of names, sizes and times of the files of a source."""
    if not source.path.exists():
        raise ConclugenError(f"{source.path}: no such file or folder; name clips, features or a built data set")
    digest = hashlib.sha256()
    for path in (source.path, *source.labels):
        below = [path] if path.is_file() else sorted(Path(at, n) for at, _, names in os.walk(path) for n in names)
        for file in below:
            try:
                found = file.stat()
            except OSError as e:
                raise ConclugenError(f"{file}: cannot be read ({e.strerror}); repair or remove it") from e
            digest.update(os.fsencode(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0"))
    return digest.hexdigest()


def _features(source: Source, root: Path, stage: Stage) -> Path:
    """Return the data set of all rows, built if it is not there."""
    if (source.path / manifest_lib.FILE).is_file():
        if source.labels or source.layout != Layout():
            raise ConclugenError(f"{source.path}: is built already, with its labels; leave the flags of labels out")
        folder = source.path
    else:
        request = Request(
            formats.GENERIC, source.path, name=_name(source.path), labels=source.labels, layout=source.layout
        )
        opened = formats.open_source(request)
        count, workers = stage.counter("rows"), os.cpu_count() or 1
        folder = builders.build(opened, root / DATA, drop_bad=source.drop_bad, num_workers=workers, progress=count)
    first, *others = inspection_view.describe(folder)
    stage.say(first.partition(": ")[2])
    for line in others:
        progress.say(line)
    return folder


def _name(path: Path) -> str:
    """Return the name of the data set of a source."""
    name = re.sub(r"\W+", "_", path.absolute().stem.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


def _settings(
    root: Path,
    dataset: shards.Dataset,
    known: rules.Facts,
    scheme: rules.Scheme | None,
    quick: bool,
    config: str,
    changes: Sequence[tuple[str, str]],
    stage: Stage,
) -> _Chosen:
    """Cut the folds, choose settings from the smallest of their training splits, and save them as a configuration."""
    kept, remarks = rules.modalities(known)
    if scheme and scheme.fold_by == "example" and scheme.num_folds:
        remarks.append(scheme.reason)
    if not scheme and known.kind != "none":
        remarks.append(
            f"one class alone ({', '.join(known.counts) or 'none'}): there is nothing to predict, so no scores"
        )
    elif not scheme:
        remarks.append("no labels: there are no scores; with a labels.csv the same command measures accuracy")
    folder, pattern = dataset.path.absolute(), str(dataset.path.absolute())
    smallest = known.rows
    if scheme and scheme.num_folds:
        for number, seed in enumerate(scheme.seeds, 1):
            stage.say(f"fold {number} of {len(scheme.seeds)}")
            cut = Request(
                formats.GENERIC,
                folder,
                name=dataset.manifest.name,
                only=tuple(kept),
                folds=(scheme.num_folds, seed),
                fold_by=scheme.fold_by,
                fold_seed=1,
                fold_validation=False,
            )
            built = builders.build(
                formats.open_source(cut), root / DATA, drop_bad=True, num_workers=os.cpu_count() or 1
            )
            smallest = min(smallest, manifest_lib.read(built).splits["train"]["num_examples"])
        pattern = str(
            built.parent.with_name(f"{dataset.manifest.name}_fold{{fold}}of{scheme.num_folds}_seed{{shuffle}}")
        )
        pattern = str(Path(pattern, dataset.manifest.version))
    known = known._replace(
        rows=smallest, present={m: known.present[m] for m in kept}, dims={m: known.dims[m] for m in kept}
    )
    devices = jax.devices()
    settings = rules.settings(known, quick=quick, num_devices=len(devices), slow=devices[0].platform == "cpu")
    path, split = root / CONFIG, known.splits[0]
    if config:
        made = configuration_files.load(config, of_run=True)
        made.data.path, made.data.train_split, settings = str(folder), split, []
        for key, text in changes:
            configuration_files.override(made, key, text)
    else:
        made = plan.configured(settings, folder, split, changes)
    if not path.exists():
        files.write_atomically(path, plan.written(settings, made, dataset.manifest.name))
    stage.say(f"{scheme.reason if scheme else 'all rows'}; saved as {path}")
    return _Chosen(made, settings, known, pattern, remarks)


def _scores(
    root: Path, chosen: _Chosen, scheme: rules.Scheme | None, dataset: shards.Dataset, stop: signals.Stop, stage: Stage
) -> dict[str, Any] | None:
    """Run the study of what pretraining gains; ``None`` for data without labels."""
    if scheme is None:
        stage.say("left out: there is nothing to predict")
        return None
    config = chosen.config.copy_and_resolve_references()
    config.data.path = chosen.path
    made = plan.study(config, scheme, chosen.known, chosen.path, dataset.manifest.name)
    with _watched(root / plan.STUDY, stage):
        found = study_lib.run(made, root / plan.STUDY)
    failed = [cell for cell in found["cells"] if cell["status"] != "done"]
    if failed:
        stage.say(f"{len(failed)} of {len(found['cells'])} scores failed")
        progress.say(f"warning: {failed[0]['path']}: {failed[0]['error']}")
    else:
        stage.say(f"{len(found['cells'])} scores")
    return found


def _work(root: Path, runs: Sequence[Run], stop: signals.Stop, stage: Stage) -> None:
    """Do runs that depend on each other, in a process of their own."""
    waiting = [run for run in runs if not study_lib.is_done(root, run)]
    with _watched(root, stage):
        if waiting:
            study_lib.work(root, [[list(runs)]], 1, stop)
    for run in runs:
        if error := results.failure(root / run.path):
            raise ConclugenError(f"{root / run.path}: {error}")
    stage.say(str(root / runs[-1].path))


@contextlib.contextmanager
def _watched(root: Path, stage: Stage) -> Iterator[None]:
    """Show the newest step of the runs below a folder, which other processes work on."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(SECONDS):
            with contextlib.suppress(ConclugenError, OSError, IndexError, ValueError):
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


def _report(root: Path, chosen: _Chosen, found: Mapping[str, Any] | None, stage: Stage) -> Path:
    """Write the page."""
    from conclugen_jax.study.report import report

    written = report.write(root / plan.STUDY, root)
    stage.say(str(written.files[0]))
    return written.files[0]
