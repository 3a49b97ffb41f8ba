"""Repeat a step that a run skipped, operation by operation.

conclugen replay RUN/bad_steps/STEP.npz [--json]

Prints the losses of the step, the rows whose features are not finite, and the first operation whose result is NaN. The file
holds the state before the step, its batch and its key, so the command needs neither the run nor its data set.
"""

import json
import math

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError

command = app.Command(words="a file of RUN/bad_steps")
FLAGS = command.flags
command.bool("json", False, "Print one JSON object on standard output, nothing else")


def main() -> None:
    """Replay the step and print what was found."""
    if len(command.words) != 1:
        raise ConclugenError("name one file: conclugen replay RUN/bad_steps/STEP.npz")
    from conclugen_jax.pretrain import replay

    found = replay.replay(command.words[0])
    metrics = {name: x if math.isfinite(x) else str(x) for name, x in found.metrics.items()}
    print(
        json.dumps(found._asdict() | {"metrics": metrics}, indent=1) if FLAGS.json else "\n".join(replay.lines(found))
    )
