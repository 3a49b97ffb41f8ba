"""What a built data set holds: python -m launch.inspect_dataset --data=data/meld/1.0.0

Shows counts, class balance, missing modalities, statistics of the vectors, what is there twice, and where it came from.
--verify compares every file and every record with the manifest and lists every fault; the exit code is 2 if there is
one. --json writes the same as one JSON object.
"""

import json

from absl import flags
from rich.console import Console

from conclugen_jax.commands import app
from conclugen_jax.data import inspection, inspection_view
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import progress

DATA = flags.DEFINE_string("data", None, "Folder of a built data set, DATA_DIR/NAME/VERSION")
VERIFY = flags.DEFINE_bool("verify", False, "Compare every file and record with the manifest; exit code 2 for a fault")
JSON = flags.DEFINE_bool("json", False, "One JSON object on standard output, nothing else")
TOP = flags.DEFINE_integer("top", 5, "Ids and groups to name of each kind, default 5", lower_bound=0)


def main() -> None:
    """Inspect, print, and fail if there are faults."""
    data = app.required("data")
    with progress.Counter(f"reading {data}") as counter:
        report = inspection.inspect(data, verify=VERIFY.value, top=TOP.value, progress=counter)
    if JSON.value:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for part in inspection_view.render(report):
            console.print(part)
    faults = report["faults"]
    if faults:
        files = len({fault["file"] for fault in faults})
        raise ConclugenError(
            f"{data}: {len(faults)} fault{'s' if len(faults) > 1 else ''} in {files} file{'s' if files > 1 else ''}; restore "
            "the data set from a copy or build it again with --overwrite"
        )


if __name__ == "__main__":
    app.run(main)
