"""Check whether this machine can train, and say how to fix what is wrong.

conclugen doctor [--data=DATA/NAME/VERSION] [--workdir=FOLDER] [--json]

Checks packages, environment variables, devices, a sum over them, a matrix product, the disk of --workdir, the folder of
compiled programs, every file of --data, and a short training run that is resumed. The exit code is 1 if a check fails.
"""

import contextlib
import io
import json
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.runs import configuration_files

command = app.Command()
FLAGS = command.flags
command.string("data", None, "Folder of a built data set to verify")
command.string("workdir", ".", "Folder whose disk is tested")
command.bool("json", False, "Print one JSON document instead of lines")


def main() -> int:
    """Run all checks and print their results."""
    from conclugen_jax.pretrain import checks

    findings = []
    examined = checks.examine(configuration_files.base(), data=FLAGS.data, workdir=Path(FLAGS.workdir))
    with contextlib.redirect_stderr(io.StringIO()):  # what the trial run says is of no interest
        for finding in examined:
            findings.append(finding)
            if not FLAGS.json:
                way_out = f"\n{'':23} -> {finding.fix}" if finding.fix else ""
                print(f"{finding.status:8} {finding.check:14} {finding.found}{way_out}", flush=True)
    ok = not any(finding.status == "failed" for finding in findings)
    if FLAGS.json:
        print(json.dumps({"ok": ok, "checks": [finding._asdict() for finding in findings]}, indent=1))
    return int(not ok)
