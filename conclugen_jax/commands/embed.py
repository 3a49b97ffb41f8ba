"""Vectors of a run, and predictions, for other tools.

python -m launch.embed --workdir=RUN --data=DATA/NAME/VERSION --split=test --output=vectors.npz

RUN is a pretraining run (representations) or a downstream run (representations, class probabilities, predictions). The
file holds id, group, label, present/MODALITY and MODALITY for every row, or fused; npz is put together in memory, Parquet
(vectors as lists of numbers) is written batch by batch.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from conclugen_jax.commands import app
from conclugen_jax.data import shards
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import embedding
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.system import progress

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a pretraining or downstream run")
CHECKPOINT = flags.DEFINE_string("checkpoint", "newest", "newest, best or a step")
DATA = flags.DEFINE_string("data", None, "Folder of a data set; default: the one of the run")
SPLIT = flags.DEFINE_string("split", "test", "Which split")
MODALITIES = flags.DEFINE_list("modalities", [], "Whose representations; all of the run's if left out")
FUSION = flags.DEFINE_string("fusion", "none", "none (a vector per modality), concat or mean: one vector 'fused'")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1024, "Rows at a time", lower_bound=1, upper_bound=2**24)
OUTPUT = flags.DEFINE_string("output", None, "File to write: NAME.npz or NAME.parquet")


def main() -> None:
    """Compute and write."""
    workdir, output = app.required("workdir"), Path(app.required("output"))
    if output.suffix not in WRITERS:
        raise ConclugenError(f"--output={output}: expected a name that ends with {' or '.join(WRITERS)}")
    network = embedding.load(workdir, CHECKPOINT.value)
    dataset = shards.open_dataset(DATA.value or workdir_lib.read_config(workdir).data.path)
    rows = embedding.embed(
        network,
        dataset,
        SPLIT.value,
        modalities=MODALITIES.value,
        fusion=FUSION.value,
        batch_size=BATCH_SIZE.value,
    )
    scratch = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with progress.Counter(f"embedding {SPLIT.value}") as counter:
            total = dataset.manifest.splits.get(SPLIT.value, {}).get("num_examples")
            count = WRITERS[output.suffix](_counted(rows, counter, total), str(scratch))
        os.replace(scratch, output)
    except OSError as e:
        raise ConclugenError(
            f"--output={output}: cannot be written ({e.strerror or e}); free space or choose another file"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
    print(f"{output}: {count:,} rows of split {SPLIT.value}")


def _counted(rows: Iterator[dict], counter: progress.Counter, total: int | None) -> Iterator[dict]:
    done = 0
    for chunk in rows:
        done += len(chunk["id"])
        counter(done, total)
        yield chunk


def _write_npz(rows: Iterator[dict], path: str) -> int:
    chunks = list(rows)
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return len(arrays["id"])


def _write_parquet(rows: Iterator[dict], path: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, count = None, 0
    try:
        for chunk in rows:
            table = pa.table({name: pa.array(list(x) if x.ndim > 1 else x) for name, x in chunk.items()})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(table)
    finally:
        if writer is not None:
            writer.close()
    return count


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}

if __name__ == "__main__":
    app.run(main)
