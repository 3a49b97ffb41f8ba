"""The command ``conclugen``: a table of all commands. It imports nothing slow, so that ``conclugen --help`` is instant."""

import difflib
import os
import signal
import sys
from typing import NoReturn

import conclugen_jax

GROUPS = {
    "Start": {
        "demo": "run the whole method on embedded digits in a minute: build, pretrain, probe",
        "doctor": "check whether this machine can train, and say how to fix what is wrong",
        "configs": "list the named configurations, print one, or write one out to edit",
        "completion": "print a script that completes commands, flags and keys in bash, zsh or fish",
    },
    "Data": {
        "build": "build a data set's shards from feature files",
        "inspect": "show what is in a data set, and verify every file and record",
        "convert_mmsa": "convert the pickles of MMSA and MMSA-FET to tables, executing nothing in them",
        "extract": "turn clips (video, sound, words) into a data set",
        "convert_weights": "convert published weights of the frozen backbones that extract uses",
    },
    "Training": {
        "pretrain": "pretrain; repeat the command to resume",
        "search": "search hyper-parameters of pretraining",
        "downstream": "train a classifier: linear evaluation, fine-tuning, supervised, raw features, sweeps",
        "study": "run methods x data sets x protocols x seeds; repeat the command to resume",
    },
    "Results": {
        "probe": "measure accuracy with few labels per class",
        "embed": "write representations and class probabilities as .npz or Parquet",
        "predict": "predict classes of clips",
        "report": "write a study as one page of tables, curves and maps",
        "checkpoint": "list, verify, export and import checkpoints",
    },
}
"""Group -> command -> what it does."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
ALIASES = {"build_dataset": "build", "inspect_dataset": "inspect"}
"""Former name -> command."""
HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}


def main() -> NoReturn:
    """Run the command that the first argument names."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command runs, Ctrl-C ends the process without a traceback
    sys.path.append(os.getcwd())  # --backbone=MODULE:FUNCTION and configuration files may import what lies here
    first, *rest = sys.argv[1:] or [""]
    if first in HELP or first in ("", "help"):
        print(overview())
        sys.exit(0 if first else 2)
    if first == "--version":
        print(f"conclugen {conclugen_jax.__version__}")
        sys.exit(0)
    name = find(first)
    if name is None:
        near = difflib.get_close_matches(first, [*COMMANDS, *ALIASES], n=1, cutoff=0.4)
        hint = f"; did you mean {ALIASES.get(near[0], near[0])!r}?" if near else ""
        print(f"error: {first!r} is not a command{hint} (all commands: conclugen --help)", file=sys.stderr)
        sys.exit(2)
    from conclugen_jax.commands import app  # late: it loads the libraries that commands share

    app.run(name, rest)


def find(text: str) -> str | None:
    """Return the command that a user means by a name, with dashes or underscores, today's or former."""
    name = text.replace("-", "_")
    name = ALIASES.get(name, name)
    return name if name in COMMANDS else None


def overview() -> str:
    """Return the page that ``conclugen --help`` prints."""
    lines = ["Multi-modal self-supervised pretraining with ConCluGen.", "", "conclugen COMMAND [--FLAG=VALUE ...]"]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:16} {line}" for name, line in commands.items())]
    return "\n".join(
        [*lines, "", "conclugen COMMAND --help explains a command; conclugen --version prints the version."]
    )
