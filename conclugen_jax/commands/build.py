"""Build a data set's shards from feature files.

python -m launch.build_dataset --dataset=meld --source=processed/meld --data_dir=data
python -m launch.build_dataset --dataset=features --name=mine --source=FOLDER --label=emotion --data_dir=data
python -m launch.build_dataset --dataset=digits --data_dir=data

The files go to DATA_DIR/NAME/VERSION; that folder is what --config.data.path names. Building what is there already,
from the same files, writes nothing. docs/datasets/ has a page for each data set.
"""

import os
from pathlib import Path

from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.data import builders, digits, formats
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.data.annotations import Layout
from conclugen_jax.data.corpora import CORPORA, expected_counts
from conclugen_jax.data.requests import Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import progress, signals

FLAGS = flags.FLAGS
DATASET = flags.DEFINE_string("dataset", None, f"Which data set: digits, {', '.join(CORPORA)}, or features: any other")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that holds the data sets; made if needed")
SOURCE = flags.DEFINE_string("source", None, "Folder or file of the features")
FORMAT = flags.DEFINE_string("format", "auto", f"Layout of the source: auto, {', '.join(formats.FORMATS)}")
NAME = flags.DEFINE_string("name", "", "Name of the built data set; needed for --dataset=features")
VERSION = flags.DEFINE_string("version", "1.0.0", "Version of the built data set")
MODALITY = flags.DEFINE_multi_string(
    "modality", [], "NAME=PATH: features of a modality, beside those in the source; may be repeated"
)
ONLY = flags.DEFINE_list("modalities", [], "Names of the modalities to build; all if left out")
LABELS = flags.DEFINE_list("labels", [], "Files of labels, instead of labels.csv in the source")
LABEL = flags.DEFINE_list("label", [], "features: column of the label, or one column of 0 and 1 per label")
LABEL_KIND = flags.DEFINE_enum("label_kind", "", ["", "single", "multi", "value"], "features: if not to be guessed")
CLASSES = flags.DEFINE_list("classes", [], "features: names of the classes in order; else those found, sorted")
TARGETS = flags.DEFINE_list("targets", [], "features: columns of further things to predict")
POOL = flags.DEFINE_string("pool", "mean", "How frames or tokens become one vector: mean, max, last")
NUM_FOLDS = flags.DEFINE_integer("num_folds", 0, "Split by group into this many folds, for data without splits")
FOLD = flags.DEFINE_integer("fold", 0, "With --num_folds: the fold to test on, from 0; the one before validates")
DROP_BAD = flags.DEFINE_bool("drop_bad", False, "Leave out and list examples with NaN, infinities or no modality")
STRICT = flags.DEFINE_bool("strict", False, "Refuse ids or groups that several splits have in common")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a data set that is there already")
NUM_WORKERS = flags.DEFINE_integer("num_workers", 0, "Processes; 0 for as many as there are cores", lower_bound=0)
BEAM = flags.DEFINE_bool("beam", False, "Let Apache Beam run the workers (pip install 'conclugen_jax[beam]')")
BEAM_OPTIONS = flags.DEFINE_list("beam_options", [], "Pipeline options, such as --runner=FlinkRunner")

OF_FILES = (
    SOURCE,
    FORMAT,
    NAME,
    VERSION,
    MODALITY,
    ONLY,
    LABELS,
    LABEL,
    LABEL_KIND,
    CLASSES,
    TARGETS,
    POOL,
    NUM_FOLDS,
    FOLD,
)
"""What says which files are read, and how."""


def main() -> None:
    """Build and say what was built."""
    signals.unwinding()
    _refuse_ignored()
    source = _source(app.required("dataset"))
    workers = NUM_WORKERS.value or os.cpu_count()
    with progress.Counter(f"building {source.spec.name}") as counter:
        folder = builders.build(
            source,
            app.required("data_dir"),
            overwrite=OVERWRITE.value,
            drop_bad=DROP_BAD.value,
            strict=STRICT.value,
            num_workers=workers,
            beam=BEAM_OPTIONS.value if BEAM.value else None,
            progress=counter,
        )
    for line in describe(folder):
        print(line)


def describe(folder: Path, *, with_dropped: bool = True) -> list[str]:
    """What was built, what was converted or left out (unless that is told elsewhere), and what is suspicious."""
    manifest = manifest_lib.read(folder)
    counts = ", ".join(f"{split} {facts['num_examples']:,}" for split, facts in manifest.splits.items())
    sizes = ", ".join(f"{m} {dim}" for m, dim in manifest.modalities.items())
    n = len(manifest.label.names)
    labels = {"single": f"{n} classes", "multi": f"{n} labels", "value": "a number to predict", "none": "no labels"}[
        manifest.label.kind
    ]
    lines = [f"{folder}: {counts} examples; modalities {sizes}; {labels}"]
    for modality in manifest.modalities:
        missing = {s: f["num_examples"] - f["present"][modality] for s, f in manifest.splits.items()}
        if any(missing.values()):
            lines.append(f"{modality} is missing in " + ", ".join(f"{s} {n:,}" for s, n in missing.items() if n))
    for modality, n in manifest.source.get("unused", {}).items():
        lines.append(f"{n:,} vectors of {modality} belong to no row of the labels and were not used")
    if passed_over := manifest.source.get("passed_over"):
        lines.append(f"found beside the features and not used: {', '.join(passed_over)}")
    for kind, n in manifest.source.get("converted", {}).items():
        modality, dtype = kind.split()
        lines.append(f"{n:,} {dtype} vectors of {modality} were converted to float32")
    for modality, n in manifest.source.get("replaced", {}).items():
        lines.append(f"{n:,} values of {modality} were -inf and read as 0")
    outside = manifest.source.get("rows_outside_folds", 0)
    if outside:
        lines.append(f"{outside:,} rows of the labels are of videos in no fold and were left out")
    dropped = {s: f["dropped"] for s, f in manifest.splits.items() if f["dropped"]}
    if dropped and with_dropped:
        lines.append(
            f"left out as bad: {', '.join(f'{s} {n:,}' for s, n in dropped.items())}; see {folder / builders.DROPPED}"
        )
    corpus = CORPORA.get(str(manifest.source.get("dataset")))
    for n in expected_counts(corpus, {s: f["num_examples"] for s, f in manifest.splits.items()}).values():
        if n["found"] != n["expected"]:
            lines.append(f"{n['found']:,} examples; {n['expected']:,} are expected of the corpus")
    return lines + [f"warning: {warning}" for warning in manifest.warnings]


def _refuse_ignored() -> None:
    """Refuse flags that would do nothing."""
    given = [flag for flag in OF_FILES if flag.value != flag.default]
    if DATASET.value == "digits" and given:
        raise ConclugenError(f"--{given[0].name} is for features in files; the digits are as they are, leave it out")
    if FLAGS["fold"].present and not NUM_FOLDS.value:
        raise ConclugenError(f"--fold={FOLD.value} without --num_folds; say how many folds there are")
    kind = LABEL_KIND.value
    if len(LABEL.value) > 1 and kind not in ("", "multi"):
        raise ConclugenError(
            f"--label_kind={kind} is for one column, --label names {len(LABEL.value)}; name one, or multi"
        )
    if CLASSES.value and (len(LABEL.value) > 1 or kind in ("multi", "value")):
        raise ConclugenError("--classes names the classes of one column of --label_kind=single; leave it out")
    if BEAM_OPTIONS.value and not BEAM.value:
        raise ConclugenError("--beam_options without --beam; add --beam, or leave them out")
    if BEAM.value and NUM_WORKERS.value:
        raise ConclugenError("--num_workers with --beam, whose own options say how many there are; leave it out")


def _source(dataset: str):
    if dataset == "digits":
        return digits.Digits()
    if dataset not in (*CORPORA, formats.GENERIC):
        known = ", ".join(("digits", *CORPORA, formats.GENERIC))
        raise ConclugenError(f"--dataset={dataset} is unknown; there are {known}")
    return formats.open_source(
        Request(
            dataset=dataset,
            source=Path(SOURCE.value) if SOURCE.value else None,
            format=FORMAT.value,
            name=NAME.value,
            version=VERSION.value,
            modalities=dict(_pair(text) for text in MODALITY.value),
            only=tuple(ONLY.value),
            labels=tuple(map(Path, LABELS.value)),
            layout=Layout(tuple(LABEL.value), LABEL_KIND.value, tuple(CLASSES.value), tuple(TARGETS.value)),
            pool=POOL.value,
            folds=(NUM_FOLDS.value, FOLD.value) if NUM_FOLDS.value else None,
        )
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ConclugenError(f"--modality={text}: expected NAME=PATH, such as landmarks=landmarks.npy")
    return name, path


if __name__ == "__main__":
    app.run(main)
