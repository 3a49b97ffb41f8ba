"""The table of all commands."""

import difflib

from conclugen_jax.errors import ConclugenError

GROUPS = {
    "Start": {
        "run": "run all steps: from clips or features to a trained model, its scores and a report",
        "demo": "run the whole method on embedded digits in a minute: build, pretrain, probe",
        "doctor": "check whether this machine can train, and say how to fix what is wrong",
        "configs": "list the named configurations, print one, or write one out to edit",
        "completion": "print a script that completes commands, flags and keys in bash, zsh or fish",
    },
    "Data": {
        "build": "build a data set's shards from feature files",
        "inspect": "show what is in a data set, and verify every file and record",
        "oddities": "list likely wrong labels, copies, persons as clusters, useless modalities and clips that all methods miss",
        "convert_mmsa": "convert the pickles of MMSA and MMSA-FET to tables, executing nothing in them",
        "extract": "turn clips (video, sound, words) into a data set",
        "convert_weights": "convert published weights of the frozen backbones that extract uses",
    },
    "Training": {
        "pretrain": "pretrain; repeat the command to resume",
        "replay": "repeat a step that a run skipped, and find what went wrong in it",
        "search": "search hyper-parameters of pretraining",
        "downstream": "train a classifier: linear evaluation, fine-tuning, supervised, raw features, sweeps",
        "study": "run methods x data sets x protocols x seeds; repeat the command to resume",
    },
    "Results": {
        "probe": "measure accuracy with few labels per class",
        "embed": "write representations and class probabilities as .npz or Parquet",
        "predict": "predict classes of clips, or show the expressions of faces",
        "runs": "list the runs below a folder: progress, scores, state",
        "report": "write a study, a run or a search as one page of curves, maps and tables",
        "checkpoint": "list, verify, export and import checkpoints",
    },
}
"""Group -> command -> what it does."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
ALIASES = {"build_dataset": "build", "inspect_dataset": "inspect"}  # former name -> command
HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}


def find(text: str) -> str:
    """Return the command for a name with dashes or underscores, also a former name; refuse unknown names."""
    name = text.replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(text, [*COMMANDS, *ALIASES], n=1, cutoff=0.4)
        hint = f"; did you mean {ALIASES.get(near[0], near[0])!r}?" if near else ""
        raise ConclugenError(f"{text!r} is not a command{hint} (all commands: conclugen --help)")
    return name


def overview() -> str:
    """Return the page that ``conclugen --help`` prints."""
    lines = ["Multi-modal self-supervised pretraining with ConCluGen.", "", "conclugen COMMAND [--FLAG=VALUE ...]"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:16} {line}" for name, line in commands.items())]
    lines += ["", "conclugen COMMAND --help explains a command; conclugen --version prints the version."]
    return "\n".join(lines)
