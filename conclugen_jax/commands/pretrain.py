"""Pretrain: python -m launch.pretrain --config=configs/conclugen.py --config.data.path=DATA/NAME/VERSION --workdir=RUN

Repeat the same command to resume an interrupted run from where its newest checkpoint stands. Ctrl-C, SIGTERM or SIGUSR1 saves a
checkpoint first; a second one ends at once.

On several machines or with several processes start the same command once for each, with --distributed=auto (launch/cluster).
"""

from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.pretrain import training as pretrain
from conclugen_jax.system import processes

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics.jsonl, config.json")
DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "off", ["off", "auto"], "auto: join the other processes that Slurm, Open MPI or JAX_* variables name"
)
TIMEOUT = flags.DEFINE_float(
    "distributed_timeout", 60.0, "Seconds for all processes to come, and until a silent one counts as gone", 1, 86400
)
MOVED = flags.DEFINE_bool("moved", False, "The data set lies elsewhere now; accepted if it is the same by its hashes")
DEBUG_NANS = flags.DEFINE_bool("debug_nans", False, "Of a step that goes wrong, say which operation was the first to")
app.define_config()


def main() -> None:
    """Train to the last epoch."""
    if DISTRIBUTED.value == "auto":
        processes.start(TIMEOUT.value)
    pretrain.pretrain(app.config(), app.required("workdir"), moved=MOVED.value, debug_nans=DEBUG_NANS.value)


if __name__ == "__main__":
    app.run(main)
