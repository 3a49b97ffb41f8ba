"""Build a data set from any source: checked examples -> TFDS array_record shards + manifest, all or nothing.

TensorFlow Datasets runs here without TensorFlow. One process, several, or Apache Beam workers write the parts of a data
set, all through ``records.write_part``. A data set gets its final name only when it is complete.
"""

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data import assembly, manifest as manifest_lib
from conclugen_jax.data.records import Job, Part, Parts, write_part
from conclugen_jax.data.sources import LABEL_KINDS, DatasetSpec, LabelSpec, PartedSource, Source
from conclugen_jax.errors import ConclugenError
from conclugen_jax.system import pool

WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""Names of modalities, targets and splits."""

VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")
"""``major.minor.patch`` as TFDS takes it."""

Progress = Callable[[int, int | None], None] | None
SHARD_BYTES = 128 * 2**20
"""Size at which a split is cut into shards, before compression."""


def build(
    source: Source,
    data_dir: str | Path,
    *,
    overwrite: bool = False,
    drop_bad: bool = False,
    strict: bool = False,
    num_workers: int = 1,
    beam: Sequence[str] | None = None,
    progress: Progress = None,
) -> Path:
    """Write a data set's shards and manifest.

    Args:
      source: the examples.
      data_dir: parent of the data sets; the files go to ``data_dir/NAME/VERSION``.
      overwrite: whether to replace an existing data set.
      drop_bad: drop, count and list examples with NaN or infinite values or without any modality; else refuse them.
      strict: refuse ids or groups that several splits have in common, which otherwise cause a warning.
      num_workers: processes that read and write; more than one only for a source that can be read in parts.
      beam: pipeline options of Apache Beam, which then runs the workers; they must see ``data_dir`` and the source.
      progress: called with the number of examples done and of all examples (None where unknown).

    Returns:
      The folder of the data set. Nothing is written if it exists, is intact, and was made from the same examples.

    Raises:
      ConclugenError: an example is bad, another data set or file exists there, another process is building it, or the
        folder cannot be written. Nothing partial remains.
    """
    spec = source.spec
    check_spec(spec)
    target = Path(data_dir).absolute() / spec.name / spec.version
    try:
        str(target).encode()
    except UnicodeEncodeError:  # array_record takes no other names
        raise ConclugenError(f"{str(data_dir)!a}: the folder's name is not UTF-8; choose another --data_dir") from None
    fingerprint = (read_from := source.fingerprint()) + " drop_bad" * drop_bad
    try:
        if _already_built(target, fingerprint, overwrite=overwrite, strict=strict):  # needs no right to write
            return target
        with assembly.claimed(target) as scratch:
            if _already_built(target, fingerprint, overwrite=overwrite, strict=strict):
                return target
            _refuse_to_replace(target, source)
            total = sum(map(source.num_examples, spec.splits)) if isinstance(source, PartedSource) else None
            parts = _write(_jobs(source, scratch), num_workers, beam, progress, total)
            folder = scratch / spec.name / spec.version
            folder.mkdir(parents=True)
            assembly.finish(source, parts, folder, fingerprint=fingerprint, drop_bad=drop_bad, strict=strict)
            if source.fingerprint() != read_from:
                raise ConclugenError(f"data set {spec.name!r}: the source changed while it was read; build again")
            target.parent.mkdir(exist_ok=True)
            assembly.swap(folder, target)
    except OSError as e:
        way = "free space" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "repair that"
        way = "choose a shorter --name" if e.errno == errno.ENAMETOOLONG else way
        fault = f"{e.filename or data_dir}: cannot write the data set ({e.strerror or e})"
        raise ConclugenError(f"{fault}; {way} or choose another folder") from e
    return target


def _already_built(target: Path, fingerprint: str, *, overwrite: bool, strict: bool) -> bool:
    """Return whether to keep an existing data set; raise if it is damaged or was made from another source."""
    if os.path.lexists(target) and not (target / manifest_lib.FILE).is_file():
        raise ConclugenError(f"{target}: exists, but is not a data set; move it, or choose another --data_dir")
    if overwrite or not target.exists():
        return False
    present = manifest_lib.read(target)
    if present.source.get("fingerprint") != fingerprint:
        way_out = "pass --overwrite (overwrite=True) to replace it or choose another --data_dir"
        raise ConclugenError(f"{target}: holds a data set made from other examples; {way_out}")
    if strict and present.warnings:
        raise ConclugenError(f"{target}: {'; '.join(present.warnings)}; repair the splits or build without --strict")
    manifest_lib.verify(target, present)
    return True


def _refuse_to_replace(target: Path, source: Source) -> None:
    """Refuse to replace a link, and a folder that holds what is read."""
    if target.is_symlink():
        fault = f"a link to {os.path.realpath(target)}, which --overwrite does not replace"
        raise ConclugenError(f"{target}: {fault}; remove the link, or name the --data_dir that it leads to")
    for folder in getattr(source, "folders", tuple)():
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(target)):
            fault = f"a source inside {target}, which --overwrite would delete"
            raise ConclugenError(f"{folder}: {fault}; move it, or choose another --data_dir")


def _jobs(source: Source, scratch: Path) -> Iterator[Job]:
    """Yield the parts to write, each about as large as a shard."""
    spec = source.spec
    row_bytes = 4 * sum(dim * spec.variants.get(m, 1) for m, dim in spec.modalities.items())
    rows = max(1, SHARD_BYTES // row_bytes)
    for split in spec.splits:
        if isinstance(source, PartedSource):
            n = source.num_examples(split)
            pieces = (source.part(split, start, min(start + rows, n)) for start in range(0, n, rows))
        else:
            pieces = _pieces(iter(source.examples(split)), rows)
        for number, examples in enumerate(pieces):
            yield Job(spec, split, number * rows, examples, scratch / f"{split}-{number:05d}")


def _pieces(examples: Iterator[Any], rows: int) -> Iterator[Iterator[Any]]:
    """Yield consecutive pieces of an iterator; the caller uses up each before it asks for the next."""
    for first in examples:
        yield itertools.chain([first], itertools.islice(examples, rows - 1))


def _write(
    jobs: Iterator[Job], workers: int, beam: Sequence[str] | None, progress: Progress, total: int | None
) -> Parts:
    """Write all parts, in the order of the records; ``total`` is None for a source that cannot be read in parts."""
    if beam is not None and total is None:
        way_out = "give it num_examples(split) and part(split, start, stop), or build without --beam"
        raise ConclugenError(f"this source cannot be read in parts, which Beam needs; {way_out}")
    if beam is not None:
        jobs = list(jobs)
        run_beam(jobs, _write_and_save, beam)
        written = (Part.load(job.path) for job in jobs)
    else:
        several = workers > 1 and total is not None
        written = _in_processes(jobs, workers) if several else (write_part(job) for job in jobs)
    parts: Parts = {}
    done = 0
    with contextlib.closing(written):  # no worker writes after this, even if the loop raises
        for part in written:
            parts.setdefault(part.split, []).append(part)
            done += len(part.rows) + len(part.bad)
            if progress is not None:
                progress(done, total)
    return parts


def _in_processes(jobs: Iterator[Job], num_workers: int) -> Iterator[Part]:
    """Write parts in order; a queued job holds the ids and labels of its part, so that few are queued."""
    sent, queued = itertools.tee(jobs)
    with pool.Pool(num_workers) as processes:
        try:
            for part in processes.map(write_part, queued):
                next(sent)
                yield part
        except pool.Died as e:
            job, fault = next(sent), "a worker process was killed, perhaps because memory ran out"
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


def _write_and_save(job: Job) -> None:
    write_part(job).save()  # Beam returns nothing


def check_spec(spec: DatasetSpec) -> None:
    """Check the description of a data set.

    Raises:
      ConclugenError: an invalid name, version, modality, label, number of variants or split.
    """
    labels, sizes, variants = {"label": spec.label, **spec.targets}, dict(spec.modalities), dict(spec.variants)
    names = {"modalities": list(sizes), "targets": list(spec.targets), "splits": list(spec.splits)}
    words = all(WORD.fullmatch(name) for each in names.values() for name in each)
    for fits, fault in (
        (re.fullmatch(r"[a-z][a-z0-9_]*", spec.name), "the name takes lower case letters, digits and '_'"),
        (VERSION.fullmatch(spec.version), f"version {spec.version!r}; three numbers without leading zeros"),
        (words, f"{names}; names take letters, digits and '_'"),
        (sizes and spec.splits, "no modality or no split"),
        (min(sizes.values(), default=1) >= 1, f"modalities {sizes}; sizes are >= 1"),
        (all(n >= 1 and m in sizes for m, n in variants.items()), f"variants {variants}; modality -> a number >= 1"),
        *((_is_label(name, label), f"{name} {label}; kinds are {LABEL_KINDS}") for name, label in labels.items()),
    ):
        if not fits:
            raise ConclugenError(f"data set {spec.name!r}: {fault}")


def _is_label(name: str, label: LabelSpec) -> bool:
    """Return whether a label has a known kind ("none" only for the main label) and, if its kind needs them, unique names."""
    named = bool(label.names) == (label.kind in ("single", "multi")) and len(set(label.names)) == len(label.names)
    return named and label.kind in LABEL_KINDS and (label.kind != "none" or name == "label")
