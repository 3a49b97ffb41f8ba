"""Pretrain.

conclugen pretrain --config=conclugen --data=DATA/NAME/VERSION --workdir=RUN

Repeat the same command to resume an interrupted run from its newest checkpoint. Ctrl-C, SIGTERM or SIGUSR1 saves a
checkpoint first; a second one ends the process at once.

With several machines or processes, start the same command once for each, with --distributed=auto (launch/cluster).
"""

from conclugen_jax.commands import app
from conclugen_jax.system import processes

command = app.Command(config="run", short=app.OF_PRETRAINING)
FLAGS = command.flags
command.string("workdir", None, "Folder of checkpoints, metrics.jsonl, config.json; default: runs/CONFIGURATION")
command.distribute()
command.bool("moved", False, "Accept a data set at another path, if its hashes are the same")
command.bool("debug_nans", False, "Name the first operation of a bad step whose result is not a number")


def main() -> None:
    """Train to the last epoch."""
    app.refuse_downstream(command.config_name)
    from conclugen_jax import pretrain

    command.join()
    workdir = FLAGS.workdir or f"runs/{command.config_name}"
    pretrain.pretrain(command.config, workdir, moved=FLAGS.moved, debug_nans=FLAGS.debug_nans)
    if processes.is_main():
        print(f"saved in {workdir}")
