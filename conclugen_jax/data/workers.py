"""Write the parts of a data set: by this process, by several, or by Apache Beam workers."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data.records import Part, Parts, write_part
from conclugen_jax.data.sources import DatasetSpec, Example
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import pool


@dataclasses.dataclass(frozen=True)
class Job:
    """One part to be written: see :func:`conclugen_jax.data.records.write_part`."""

    spec: DatasetSpec
    split: str
    first_row: int
    examples: Iterable[Example]
    path: Path
    first_split: bool

    @property
    def facts(self) -> Path:
        """File beside the part where workers of Beam, which returns nothing, leave its facts."""
        return self.path.with_name(self.path.name + ".facts")

    def run(self) -> Part:
        """Write the part."""
        return write_part(self.spec, self.split, self.first_row, self.examples, self.path, first_split=self.first_split)


def run(
    jobs: Iterator[Job],
    *,
    num_workers: int,
    beam: Sequence[str] | None,
    progress: Callable[[int, int | None], None] | None,
    total: int | None,
) -> Parts:
    """Write all parts, in the order of the records.

    ``total`` is the number of examples, None for a source that cannot be read in parts; ``beam`` are pipeline options, None
    for no Beam; ``progress`` is called after each part with the number of examples done and ``total``.

    Raises:
      ConclugenError: a bad example, a killed worker, or Beam for a source that cannot be read in parts.
      OSError: a part cannot be written.
    """
    if beam is not None and total is None:
        way_out = "give it num_examples(split) and part(split, start, stop), or build without --beam"
        raise ConclugenError(f"this source cannot be read in parts, which Beam needs; {way_out}")
    if beam is not None:
        jobs = list(jobs)
        run_beam(jobs, run_and_save, beam)
        results = ((job, Part.load(job.facts)) for job in jobs)
    elif num_workers > 1 and total is not None:
        results = _run_processes(jobs, num_workers)
    else:
        results = ((job, job.run()) for job in jobs)
    parts: Parts = {}
    done = 0
    with contextlib.closing(results):  # no worker writes after this, even if the loop raises
        for job, part in results:
            parts.setdefault(job.split, []).append((job.path, part))
            done += len(part.rows) + len(part.bad)
            if progress is not None:
                progress(done, total)
    return parts


def _run_processes(jobs: Iterator[Job], num_workers: int) -> Iterator[tuple[Job, Part]]:
    """Yield results in order; a queued job holds the ids and labels of its part, so that few are queued."""
    sent, queued = itertools.tee(jobs)
    with pool.Pool(num_workers) as processes:
        try:
            for part in processes.map(Job.run, queued):
                yield next(sent), part
        except pool.Died as e:
            job = next(sent)
            fault = "a worker process was killed, perhaps because memory ran out"
            where = f"split {job.split!r}, part at row {job.first_row}"
            raise ConclugenError(f"{where}: {fault}; build with a smaller --num_workers") from e


def run_beam(elements: Sequence[Any], action: Callable[[Any], None], options: Sequence[str]) -> None:
    """Call an action on elements with Apache Beam, and wait until it is done; all must be picklable.

    Raises:
      ConclugenError: Beam is not installed, or the action raised one.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        own = "in an environment of its own: pip install 'conclugen_jax[beam]'"
        raise ConclugenError(f"--beam needs Apache Beam, {own}") from e
    pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
    _ = pipeline | beam.Create(list(elements)) | beam.Reshuffle() | beam.Map(action)
    try:
        pipeline.run().wait_until_finish()
    except Exception as e:
        cause: BaseException | None = e  # Beam wraps what a worker raises; our own error is the innermost
        while cause is not None:
            if isinstance(cause, ConclugenError | OSError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise


def run_and_save(job: Job) -> None:
    """Write a part, and its facts beside it."""
    job.run().save(job.facts)
