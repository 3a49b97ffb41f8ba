"""Show what a built data set holds.

conclugen inspect --data=data/meld/1.0.0

Prints counts, class balance, missing modalities, statistics of the vectors, duplicates, and where the data came from.
--verify compares every file and every record with the manifest and lists every fault; the exit code is 2 if there is
one. --json writes the same as one JSON object.
"""

import json

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import progress

command = app.Command(jax=False)
FLAGS = command.flags
command.string("data", None, "Folder of a built data set, DATA_DIR/NAME/VERSION")
command.bool("verify", False, "Compare every file and record with the manifest; exit code 2 for a fault")
command.bool("json", False, "Print one JSON object on standard output, nothing else")
command.integer("top", 5, "Ids and groups to name of each kind, default 5", lower_bound=0)


def main() -> None:
    """Inspect, print, and fail if there are faults."""
    data = command.required("data")
    from conclugen_jax.data import inspection, inspection_view

    with progress.Counter(f"reading {data}") as counter:
        report = inspection.inspect(data, verify=FLAGS.verify, top=FLAGS.top, progress=counter)
    if FLAGS.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        app.draw(*inspection_view.render(report))
    faults = report["faults"]
    if faults:
        files = len({fault["file"] for fault in faults})
        counts = f"{len(faults)} fault{'s' * (len(faults) > 1)} in {files} file{'s' * (files > 1)}"
        raise ConclugenError(f"{data}: {counts}; restore the data set from a copy or build it again with --overwrite")
