"""Run the paper's method and the recommended one on embedded digits, and measure accuracy with few labels.

conclugen demo [--folder=FOLDER] [--tiny]

Takes less than a minute on two CPU cores. Repeat the command to resume. The commands that it runs are printed; change them
as you like. FOLDER/label_efficiency.md has the table of ConCluGen, FOLDER/recommended.md that of conclu_neighbours.
"""

import contextlib
import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.runs import configuration_files
from conclugen_jax.system import progress
from conclugen_jax.system.pool import Pool, without_script

command = app.Command()
FLAGS = command.flags
command.string("folder", None, "Folder for data, run and table; default: conclugen_demo, or conclugen_demo_tiny")
command.bool("tiny", False, "Small networks and two epochs, which learn little: tests an installation in seconds")

TINY = (
    *("--config.model.representation_dim=32", "--config.model.projection_dim=16", "--config.train.num_epochs=2"),
    *("--config.model.reconstruction_dim=16", "--config.clustering.start_epoch=1"),
)
FEW = ("--labels=2,all", "--draws=2")


def main() -> int:
    """Run the commands of both methods, side by side on a processor, and stop at the first that fails."""
    import jax

    from conclugen_jax.data import digits

    tiny, devices = FLAGS.tiny, len(jax.devices())
    folder = Path(FLAGS.folder or ("conclugen_demo_tiny" if tiny else "conclugen_demo"))
    rows = configuration_files.load("demo", of_run=True).train.batch_size
    shared = () if rows % devices == 0 else (f"--batch_size={rows // devices * devices}",)  # equally by the devices
    data, few = folder / "data" / digits.Digits.spec.name / digits.Digits.spec.version, FEW if tiny else ()
    runs = {"conclugen": ("demo", "label_efficiency"), "conclu_neighbours": ("conclu_neighbours", "recommended")}
    of_runs = []
    for name, (config, table) in runs.items():
        run = f"--workdir={folder / name}"
        train = ("pretrain", f"--config={config}", f"--data={data}", run, *shared, *(TINY if tiny else ()))
        of_runs.append([train, ("probe", run, f"--output={folder / table}", *few)])
    code = _call([("build", f"--dataset={digits.Digits.spec.name}", f"--data_dir={folder / 'data'}")])
    if not code and not tiny and jax.default_backend() == "cpu" and (os.cpu_count() or 1) > 1:
        code = _side_by_side(*of_runs)
    else:
        code = code or _call([*of_runs[0], *of_runs[1]])
    if tiny and not code:
        print("Two epochs of a tiny network learn little: this tests the installation, not the method.")
    return code


def _call(commands: Sequence[Sequence[str]]) -> int:
    """Run commands up to the first that fails; return its exit code, or 0."""
    for name, *arguments in commands:
        progress.say(f"\nconclugen {shlex.join([name, *arguments])}")
        if code := app.call(name, arguments):
            return code
    return 0


def _side_by_side(first: Sequence[Sequence[str]], second: Sequence[Sequence[str]]) -> int:
    """Run the first commands here and the second ones in another process, whose output follows; return an exit code.

    What one core alone can do, such as to compile, the two do at the same time.
    """
    with without_script(), Pool(1) as pool:
        others = pool.submit(_captured, second)
        if code := _call(first):
            pool.terminate()
            return code
        code, text = others.result()
    print(text, end="")
    return code


def _captured(commands: Sequence[Sequence[str]]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return _call(commands), said.getvalue()
