"""One process of several that evaluate a run together, for test_shared_evaluations.py.

python -m tests.run_evaluations DATA FOLDER [killed]: what is in its environment says which one it is, FOLDER/pretrained is
the run. ``killed``: process 1 kills itself in the middle.
"""

import os
import signal
import sys
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.data import shards
from conclugen_jax.evaluate import best_epochs, downstream, embedding, probe, sweep
from conclugen_jax.system import files, processes
from tests.helpers import tiny_config

GRIDS = {"by_group": ((0.05,), (0, 1)), "by_pair": ((0.02, 0.05, 0.1), (0,))}
"""Sweep -> rates and seeds; four devices share two groups, or three pairs."""


def config_of(data, folder, protocol, **changes):
    """A downstream run that compiles fast; with Adam split over the devices, whose eps hides the rounding of zeros."""
    return tiny_config(
        data,
        downstream__protocol=protocol,
        downstream__checkpoint=str(folder / "pretrained"),
        downstream__early_stopping_epochs=2,
        optimizer__shard=True,
        optimizer__eps=0.01,
        optimizer__learning_rate=0.05,
        train__num_epochs=3,
        **changes,
    )


def work(data, folder, out, devices=None):
    """Make every kind of evaluation in a folder ``out``; embeddings and probes take all devices of the processes."""
    for protocol, tier in (("linear_evaluation", "auto"), ("fine_tuning", "shards")):
        config = config_of(data, folder, protocol, data__tier=tier)
        downstream.downstream(config, out / protocol, devices=devices)
    for name, (rates, seeds) in GRIDS.items():
        grid = {"sweep__learning_rates": rates, "sweep__seeds": seeds}
        sweep.sweep(config_of(data, folder, "linear_evaluation", **grid), out / name, devices=devices)
    network, dataset = embedding.load(out / "fine_tuning"), shards.open_dataset(data)
    embedding.write(embedding.embed(network, dataset, "test", batch_size=10), out / "fine_tuning.npz")
    report = probe.label_efficiency_of_run(folder / "pretrained", num_draws=2)
    assert (report is not None) == processes.is_main()
    if report:
        files.write_json(out / "probe.json", [[r.name, r.num_labels, r.accuracy] for r in report.results])


def killed(improved):
    """Return the method that kills process 1 in the second epoch of the first run that it is called for."""

    def kill(self, epoch, *scores):
        if epoch == 1 and not processes.is_main():
            os.kill(os.getpid(), signal.SIGKILL)
        return improved(self, epoch, *scores)

    return kill


def main():
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    processes.start(60)
    if sys.argv[3:]:
        best_epochs.BestEpochs.improved = killed(best_epochs.BestEpochs.improved)
    work(data, folder, folder / "together")
    different = config_of(data, folder, "linear_evaluation", seed=0 if processes.is_main() else 1)
    downstream.downstream(different, folder / "different")


if __name__ == "__main__":
    sys.exit(app.guarded(main))
