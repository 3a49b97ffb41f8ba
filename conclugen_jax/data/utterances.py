"""For people to look at, beside the shards of a data set made from clips: the place of each clip, its words, a thumbnail."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conclugen_jax.data.manifest import Manifest
from conclugen_jax.errors import ConclugenError

FILE = "utterances.parquet"
CHUNK = 1024  # rows that are written at a time
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("split", "id", "words", "clip")),
        *((name, pa.float64()) for name in ("start", "end")),
        ("thumbnail", pa.binary()),
    ]
)


class Seen(NamedTuple):
    """The known facts about an utterance; unknown ones are empty."""

    words: str = ""
    clip: str = ""  # path of its file
    start: float = 0.0  # in seconds
    end: float = 0.0  # in seconds; 0: the end of the clip
    thumbnail: bytes = b""  # JPEG


def write(path: Path, rows: Iterable[tuple[str, str, Seen]]) -> None:
    """Write split, id and the known facts of utterances."""
    rows = iter(rows)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while chunk := list(itertools.islice(rows, CHUNK)):
            columns = zip(*((split, name, *seen) for split, name, seen in chunk), strict=True)
            writer.write_table(pa.table([list(column) for column in columns], schema=SCHEMA))


def read(folder: Path, manifest: Manifest, rows: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], Seen]:
    """Return (split, id) -> what is known, of ids of each split; all is empty in a data set without this file.

    A data set that was cut into folds has the file of the whole, in which splits are others and ids unique.
    """
    found: dict[tuple[str, str], Seen] = {}
    if FILE in manifest.files:
        wanted = np.unique(np.concatenate([list(ids) for ids in rows.values()])).tolist()
        try:
            table = pq.read_table(folder / FILE, filters=[("id", "in", wanted)])
            columns = [table.column(name).to_pylist() for name in SCHEMA.names]
        except (OSError, pa.ArrowException, KeyError) as e:
            raise ConclugenError(f"{folder / FILE}: cannot be read ({e}); build the data set again") from e
        for split, name, *seen in zip(*columns, strict=True):
            found[split, name] = found["", name] = Seen(*seen)
    nothing = Seen()
    return {
        (split, name): found.get((split, name)) or found.get(("", name), nothing)
        for split, ids in rows.items()
        for name in ids
    }
