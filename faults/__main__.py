"""Run the fault suite: python -m faults --report=docs/understand/reliability_table.md

The suite takes about --budget seconds (780), shared by the groups. If anything was lost, the exit code is 1 and the folders of
these attempts are kept and named.
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import conclugen_jax
from faults import groups, harness


def main() -> None:
    """Try the faults of all groups and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=780.0, help="seconds for everything, more or less")
    parser.add_argument("--only", default="", help=f"comma-separated: {','.join(groups.GROUPS | groups.EXTRA)}")
    parser.add_argument("--report", type=Path, help="Markdown file for the table")
    parser.add_argument("--folder", type=Path, help="where to work; kept")
    a = parser.parse_args()
    start = time.monotonic()
    folder = a.folder or Path(tempfile.mkdtemp(prefix="conclugen_faults-"))
    place = harness.Place(folder, a.seed)
    names = a.only.split(",") if a.only else list(groups.GROUPS)
    known = groups.GROUPS | groups.EXTRA
    weights = {name: known[name][1] for name in names}
    tallies: list[harness.Tally] = []
    for i, name in enumerate(names):
        left = a.budget - (time.monotonic() - start)
        share = max(5.0, left * weights[name] / sum(weights[n] for n in names[i:]))
        for tally in known[name][0](place, share):
            tallies.append(tally)
            print(f"{tally.fault}: tried {tally.tried}, lost {len(tally.lost)}", file=sys.stderr, flush=True)
            for what in tally.lost:
                print(f"  LOST: {what}", file=sys.stderr, flush=True)
    lost = sum(len(t.lost) for t in tallies)
    now = datetime.datetime.now(datetime.UTC)
    text = (
        f"{harness.table(tallies)}\n\nconclugen_jax {conclugen_jax.__version__}, JAX {metadata.version('jax')}, Python "
        f"{platform.python_version()}, {os.cpu_count()} processors, seed {a.seed}, {now:%Y-%m-%d}, "
        f"{time.monotonic() - start:.0f} s: `python -m faults --seed={a.seed} --budget={a.budget:g}`\n"
    )
    print(text)
    if a.report:
        a.report.write_text(text)
    if not lost and a.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
