"""Whether this machine can train, what is wrong and how to mend it.

python -m launch.doctor [--data=DATA/NAME/VERSION] [--workdir=FOLDER] [--json]

Checks packages, devices, a sum over them, a matrix product, the disk of --workdir, the folder of compiled programs, every file
of --data, and a short training run that is resumed. Exit code 1 if a check fails.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.commands import checks as doctor
from configs import base

DATA = flags.DEFINE_string("data", None, "Folder of a built data set to verify")
WORKDIR = flags.DEFINE_string("workdir", ".", "Folder whose disk is tried")
JSON = flags.DEFINE_bool("json", False, "Print one JSON document instead of lines")


def main() -> None:
    """Make all checks and print what they found."""
    findings = []
    checks = doctor.examine(base.get_config(), data=DATA.value, workdir=Path(WORKDIR.value))
    while True:
        with contextlib.redirect_stderr(io.StringIO()):  # what the trial run says is of no interest
            finding = next(checks, None)
        if finding is None:
            break
        findings.append(finding)
        if not JSON.value:
            print(f"{finding.status:8} {finding.check:14} {finding.found}", flush=True)
            if finding.mend:
                print(f"{'':23} -> {finding.mend}", flush=True)
    ok = not any(finding.status == "failed" for finding in findings)
    if JSON.value:
        print(json.dumps({"ok": ok, "checks": [finding._asdict() for finding in findings]}, indent=1))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    app.run(main)
