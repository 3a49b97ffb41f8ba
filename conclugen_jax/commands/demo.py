"""Run the paper's method and the recommended one on embedded digits, and measure accuracy with few labels.

conclugen demo [--folder=FOLDER] [--tiny]

Takes about a minute on two CPU cores. Repeat the command to resume. The commands that it runs are printed; change them
as you like. FOLDER/label_efficiency.md has the table of ConCluGen, FOLDER/recommended.md that of conclu_neighbours.
"""

import shlex
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.runs import configuration_files
from conclugen_jax.system import progress

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
    """Run the commands, and stop at the first that fails."""
    import jax

    from conclugen_jax.data import digits

    tiny, devices = FLAGS.tiny, len(jax.devices())
    folder = Path(FLAGS.folder or ("conclugen_demo_tiny" if tiny else "conclugen_demo"))
    rows = configuration_files.load("demo", of_run=True).train.batch_size
    shared = () if rows % devices == 0 else (f"--batch_size={rows // devices * devices}",)  # equally by the devices
    data, few = folder / "data" / digits.Digits.spec.name / digits.Digits.spec.version, FEW if tiny else ()
    commands = [("build", f"--dataset={digits.Digits.spec.name}", f"--data_dir={folder / 'data'}")]
    runs = {"conclugen": ("demo", "label_efficiency"), "conclu_neighbours": ("conclu_neighbours", "recommended")}
    for name, (config, table) in runs.items():
        run = f"--workdir={folder / name}"
        commands.append(("pretrain", f"--config={config}", f"--data={data}", run, *shared, *(TINY if tiny else ())))
        commands.append(("probe", run, f"--output={folder / table}", *few))
    for name, *arguments in commands:
        progress.say(f"\nconclugen {shlex.join([name, *arguments])}")
        if code := app.call(name, arguments):
            return code
    if tiny:
        print("Two epochs of a tiny network learn little: this tests the installation, not the method.")
    return 0
