"""Pretrain.

conclugen pretrain --config=conclugen --data=DATA/NAME/VERSION --workdir=RUN

Repeat the same command to resume an interrupted run from its newest checkpoint. Ctrl-C, SIGTERM or SIGUSR1 saves a
checkpoint first; a second one ends the process at once.

With several machines or processes, start the same command once for each, with --distributed=auto (launch/cluster).
"""

import os

from conclugen_jax.commands import app
from conclugen_jax.system import processes, progress

command = app.Command(config="run", short=app.OF_PRETRAINING)
FLAGS = command.flags
command.string("workdir", None, "Folder of checkpoints, metrics.jsonl, config.json; default: runs/CONFIGURATION")
OTHERS = "auto: join the other processes that the cluster or JAX_* variables name"
command.enum("distributed", "off", ["off", "auto"], OTHERS)
WAIT = "Seconds for all processes to start, and until a silent one counts as gone"
command.float("distributed_timeout", 60.0, WAIT, lower_bound=1, upper_bound=86400)
command.bool("moved", False, "Accept a data set at another path, if its hashes are the same")
command.bool("debug_nans", False, "Name the first operation of a bad step whose result is not a number")


def main() -> None:
    """Train to the last epoch."""
    app.refuse_downstream(command.config_name)
    from conclugen_jax import pretrain

    if FLAGS.distributed == "auto":
        processes.start(FLAGS.distributed_timeout)
    elif (count := os.environ.get(processes.COUNT, "1")) != "1":
        progress.say(
            f"warning: {processes.COUNT}={count} is ignored: this process trains alone, without --distributed=auto"
        )
    workdir = FLAGS.workdir or f"runs/{command.config_name}"
    pretrain.pretrain(command.config, workdir, moved=FLAGS.moved, debug_nans=FLAGS.debug_nans)
    if processes.is_main():
        print(f"saved in {workdir}")
