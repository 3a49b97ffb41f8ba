"""Pretrain: python -m launch.pretrain --config=configs/conclugen.py --config.data.path=DATA/NAME/VERSION --workdir=RUN

Repeat the same command to resume an interrupted run from where its newest checkpoint stands. Ctrl-C or SIGTERM saves a
checkpoint first.
"""

from absl import flags

from conclugen_jax import pretrain
from launch import app

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics.jsonl, config.json")
app.define_config()


def main() -> None:
    """Train to the last epoch."""
    pretrain.pretrain(app.config(), app.required("workdir"))


if __name__ == "__main__":
    app.run(main)
