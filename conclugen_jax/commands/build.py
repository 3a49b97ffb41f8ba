"""Build a data set's shards from feature files.

conclugen build --dataset=meld --source=processed/meld --data_dir=data
conclugen build --dataset=features --name=mine --source=FOLDER --label=emotion --data_dir=data
conclugen build --dataset=digits --data_dir=data

The command writes to DATA_DIR/NAME/VERSION. Pass that folder to other commands as --data. Building again from the same
files writes nothing. docs/reference/datasets/ has a page for each data set.
"""

import os
from pathlib import Path
from typing import Any

from conclugen_jax.commands import app
from conclugen_jax.data import formats
from conclugen_jax.data.corpora import CORPORA
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import progress, signals

command = app.Command(jax=False)
FLAGS = command.flags
command.enum("dataset", None, ["digits", *CORPORA, formats.GENERIC], "Which data set; features: any other")
command.string("data_dir", None, "Folder of the data sets; created if needed")
command.string("source", None, "Folder or file of the features")
command.string("format", "auto", f"Layout of the source: auto, {', '.join(formats.FORMATS)}")
command.string("name", "", "Name of the built data set; required for your own data")
command.string("version", "1.0.0", "Version of the built data set")
command.multi_string("modality", [], "NAME=PATH: features of a modality, besides those in the source; may be repeated")
command.list("modalities", [], "Names of the modalities to build; default: all")
command.list("labels", [], "Files of labels, instead of labels.csv in the source")
command.list("label", [], "Your own data: column of the label, or one column of 0 and 1 per label")
KINDS = ["", "single", "multi", "value", "none"]
command.enum("label_kind", "", KINDS, "Your own data: kind of the label, none for no label; default: guess it")
command.list("classes", [], "Your own data: names of the classes in order; default: all found names, sorted")
command.list("targets", [], "Your own data: columns of further labels to predict")
command.string("pool", "mean", "How frames or tokens become one vector: mean, max, last")
command.integer("num_folds", 0, "Split into this many folds, for data without splits")
command.integer("fold", 0, "With --num_folds: the fold to test on, from 0; the fold before it is for validation")
BY = "With --num_folds: split by group (person), or by example: stratified by label, a person may be in two folds"
command.enum("fold_by", "group", ["group", "example"], BY)
command.integer(
    "fold_seed", 0, "With --num_folds: seed of the shuffle before the split; 0: persons in order", lower_bound=0
)
command.bool(
    "fold_validation", True, "With --num_folds: use the fold before the test fold for validation, else for training"
)
command.bool("drop_bad", False, "Drop and list examples with NaN, infinities or no modality")
command.bool("strict", False, "Fail if several splits share ids or groups")
command.bool("overwrite", False, "Replace an existing data set")
command.integer("num_workers", 0, "Processes; 0 for as many as there are cores", lower_bound=0)
command.bool("beam", False, "Let Apache Beam run the workers (pip install 'conclugen_jax[beam]')")
command.list("beam_options", [], "Pipeline options, such as --runner=FlinkRunner")

# Flags that do not affect which files are read, and how.
OF_ALL = "dataset", "data_dir", "drop_bad", "strict", "overwrite", "num_workers", "beam", "beam_options"


@signals.ending_at_once()
def main() -> None:
    """Build the data set and report on it."""
    _refuse_ignored()
    how = command.values("drop_bad", "strict") | builder_options(command)
    request = None if FLAGS.dataset == "digits" else _request()
    from conclugen_jax.data import builders, digits, inspection_view

    source = formats.open_source(request) if request else digits.Digits()
    with progress.Counter(f"building {source.spec.name}") as counter:
        folder = builders.build(source, command.required("data_dir"), progress=counter, **how)
    for line in inspection_view.describe(folder):
        print(line)
    asked = FLAGS.dataset == "features" and not FLAGS.label and not FLAGS.label_kind
    if asked and source.spec.label.kind == "none":
        print("no column 'label' was found; if another has the labels, name it with --label=COLUMN and --overwrite")


def _refuse_ignored() -> None:
    """Refuse flags that would do nothing."""
    given = [name for name in FLAGS if name not in OF_ALL and FLAGS[name].value != FLAGS[name].default]
    if FLAGS.dataset == "digits" and given:
        raise ConclugenError(f"--{given[0]} is for features in files; the digits are as they are, leave it out")
    kind = FLAGS.label_kind
    if len(FLAGS.label) > 1 and kind not in ("", "multi"):
        fact = f"--label_kind={kind} is for one column, --label names {len(FLAGS.label)}"
        raise ConclugenError(f"{fact}; name one, or multi")
    if FLAGS.classes and (len(FLAGS.label) > 1 or kind in ("multi", "value")):
        raise ConclugenError("--classes names the classes of one column of --label_kind=single; leave it out")


def _request() -> Request:
    pairs = [_pair(text) for text in FLAGS.modality]
    if twice := [name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i])]:
        raise ConclugenError(f"--modality={twice[0]}=... is there twice; give each modality one path")
    return Request(
        dataset=command.required("dataset"),
        source=Path(FLAGS.source) if FLAGS.source else None,
        modalities=dict(pairs),
        only=tuple(FLAGS.modalities),
        labels=tuple(map(Path, FLAGS.labels)),
        **command.values("format", "name", "pool"),
        **request_options(command),
    )


def builder_options(own: app.Command) -> dict[str, Any]:
    """Return the flags for workers as arguments of a function that builds shards."""
    flags = own.flags
    if flags.beam_options and not flags.beam:
        raise ConclugenError("--beam_options without --beam; add --beam, or leave them out")
    if flags.beam and flags.num_workers:
        raise ConclugenError("--num_workers with --beam, whose own options say how many there are; leave it out")
    found = {"num_workers": flags.num_workers or os.cpu_count(), "beam": flags.beam_options if flags.beam else None}
    return found | own.values("overwrite")


def request_options(own: app.Command) -> dict[str, Any]:
    """Return the flags for version, labels and folds as arguments of a request."""
    flags = own.flags
    for name in ("fold", "fold_by", "fold_seed", "fold_validation"):
        if flags[name].present and not flags.num_folds:
            raise ConclugenError(f"--{name}={flags[name].value} without --num_folds; say how many folds there are")
    folds = (flags.num_folds, flags.fold) if flags.num_folds else None
    return {"layout": layout_of(own), "folds": folds} | own.values("version", "fold_by", "fold_seed", "fold_validation")


def layout_of(own: app.Command) -> Layout:
    """Return the flags for labels as a layout."""
    flags = own.flags
    if flags.label_kind == "none" and (flags.label or flags.classes):
        raise ConclugenError("--label_kind=none is for no label, and --label or --classes describes one; leave it out")
    return Layout(tuple(flags.label), flags.label_kind, tuple(flags.classes), tuple(flags.targets))


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise ConclugenError(f"--modality={text}: expected NAME=PATH, such as landmarks=landmarks.npy")
    return name, path
