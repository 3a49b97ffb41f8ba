"""Write vectors of a run, and predictions, for other tools.

conclugen embed --workdir=RUN --split=test

RUN is a pretraining run (representations) or a downstream run (representations, class probabilities, predictions). The
file holds id, group, label, present/MODALITY and MODALITY for every row, or fused. The command builds an npz file in
memory; it writes Parquet (vectors as lists of numbers) batch by batch.
"""

from collections.abc import Iterator
from pathlib import Path

from conclugen_jax.commands import app
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import processes, progress

command = app.Command()
FLAGS = command.flags
command.string("workdir", None, "Folder of a pretraining or downstream run")
command.string("checkpoint", "newest", "newest, best or a step")
command.string("data", None, "Folder of a data set; default: the one of the run")
command.string("split", "test", "Which split")
command.list("modalities", [], "Modalities to represent; default: all of the run")
command.string("fusion", "none", "none (a vector per modality), concat or mean: one vector 'fused'")
command.integer("batch_size", 1024, "Rows at a time", lower_bound=1, upper_bound=2**24)
command.string("output", None, "File to write, NAME.npz or NAME.parquet; default: WORKDIR/embeddings_SPLIT.npz")
command.distribute()


def main() -> None:
    """Compute the vectors and write them."""
    from conclugen_jax.data import shards
    from conclugen_jax.evaluate import embedding
    from conclugen_jax.runs import checkpoint
    from conclugen_jax.train import parallel

    workdir = command.required("workdir")
    output = Path(FLAGS.output or Path(workdir, f"embeddings_{FLAGS.split}.npz"))
    if output.suffix not in embedding.WRITERS:
        raise ConclugenError(f"--output={output}: expected a name that ends with {' or '.join(embedding.WRITERS)}")
    command.join()
    network = embedding.load(workdir, FLAGS.checkpoint)
    dataset = shards.open_dataset(FLAGS.data or network.config.data.path)
    how = command.values("split", "modalities", "fusion", "batch_size")
    weights = checkpoint.fingerprint([network.variables, network.classifier_params])
    parallel.check_alike(network.config, dataset.manifest, weights=weights, **how)
    rows = embedding.embed(network, dataset, **how)
    with progress.Counter(f"embedding {FLAGS.split}") as counter:
        total = dataset.manifest.splits.get(FLAGS.split, {}).get("num_examples")
        count = embedding.write(_counted(rows, counter, total), output)
    if not processes.is_main():
        return
    print(f"{output}: {count:,} rows of split {FLAGS.split}")
    for column, spec in (("label", dataset.manifest.label), ("prediction", network.task and network.task.label)):
        if spec and spec.names:
            print(f"{column}: " + ", ".join(f"{i} {name}" for i, name in enumerate(spec.names)))


def _counted(rows: Iterator[dict], counter: progress.Counter, total: int | None) -> Iterator[dict]:
    done = 0
    for chunk in rows:
        done += len(chunk["id"])
        counter(done, total)
        yield chunk
