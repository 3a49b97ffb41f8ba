"""Turn a folder of clips, files of features, or a built data set into one data set of all rows."""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data import builders, data_frames, formats, inspection_view, manifest as manifest_lib
from conclugen_jax.data.files import MEDIA
from conclugen_jax.data.requests import Layout, Request
from conclugen_jax.errors import ConclugenError
from conclugen_jax.pipeline.stages import Stage
from conclugen_jax.system import files, progress

DATA = "data"
"""Folder of the data sets, below that of everything."""
QUICK_CLIPS = 60


@dataclasses.dataclass(frozen=True)
class Source:
    """The training data and the place of their labels."""

    path: Path  # folder of clips or of features, a file of features, or a built data set
    labels: tuple[Path, ...] = ()  # tables instead of labels.csv in the source
    pattern: str = ""  # of the names of clips that say the labels
    layout: Layout = dataclasses.field(default_factory=Layout)
    drop_bad: bool = False
    thumbnails: bool = True  # whether small pictures of clips are kept

    @functools.cached_property
    def kind(self) -> str:
        """Return ``built``, ``clips`` or ``features``."""
        if not self.path.exists():
            raise ConclugenError(f"{self.path}: no such file or folder; name clips, features or a built data set")
        if (self.path / manifest_lib.FILE).is_file():
            return "built"
        for pattern in (f"{DATA}/*/*/{manifest_lib.FILE}", f"*/*/{manifest_lib.FILE}", f"*/{manifest_lib.FILE}"):
            if found := sorted(self.path.glob(pattern)):
                raise ConclugenError(f"{self.path}: holds a built data set; name {found[-1].parent} instead")
        if self.path.is_file() and self.path.name.lower().endswith(MEDIA):
            raise ConclugenError(f"{self.path}: one clip, expected a folder of them; name the folder")
        return "clips" if any(name.lower().endswith(MEDIA) for _, name in _walk(self.path)) else "features"

    def check(self, root: Path) -> None:
        """Refuse a workdir inside the source or around it, and flags that have no effect."""
        source, own = (Path(os.path.realpath(path)) for path in (self.path, root))
        if source.is_relative_to(own):
            raise ConclugenError(f"{self.path}: is in the folder of the run, {root}; choose another --workdir")
        if own.is_relative_to(source) and self.kind != "clips":
            raise ConclugenError(f"{root}: is in {self.path}, all of which is read; choose a --workdir beside it")
        if self.kind == "built" and (self.labels or self.pattern or self.drop_bad or self.layout != Layout()):
            raise ConclugenError(f"{self.path}: is built already, with its labels; leave the flags of labels out")
        if self.kind == "features" and self.pattern:
            raise ConclugenError(f"--label_pattern={self.pattern}: {self.path} holds no clips; leave it out")


def stamp(source: Source, root: Path) -> str:
    """Return a hash of names, sizes and times of the files of a source, apart from those of the run itself.

    For a built data set, return the hash of its manifest, which covers all files except the cache.
    """
    digest, own = hashlib.sha256(source.kind.encode()), root.absolute()
    first = source.path / manifest_lib.FILE if source.kind == "built" else source.path
    for path in (first, *source.labels):
        below = sorted(Path(at, name) for at, name in _walk(path))
        below = [file for file in below if own not in file.absolute().parents]
        for file in below or [path]:
            try:
                found = file.stat()
            except OSError as e:
                raise ConclugenError(f"{file}: cannot be read ({e.strerror}); repair or remove it") from e
            digest.update(os.fsencode(f"{file.relative_to(path)}\0{found.st_size}\0{found.st_mtime_ns}\0"))
    return digest.hexdigest()


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield folder and name of the files below a folder, those of linked folders too, each folder once."""
    entered: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from ((at, name) for name in names if not name.startswith("."))


def built(source: Source, root: Path, quick: bool, stage: Stage) -> Path:
    """Return the data set of all rows, and build it if it does not exist."""
    about = {"labels": source.labels, "layout": source.layout}
    if source.kind == "built":
        folder, lines = source.path, []
    elif source.kind == "clips":
        folder, lines = _extracted(source, root, quick, stage)
    else:
        request = Request(formats.GENERIC, source.path, name=_name(source.path), **about)
        how = {"drop_bad": source.drop_bad, "num_workers": os.cpu_count() or 1, "progress": stage.counter("rows")}
        folder, lines = builders.build(formats.open_source(request), root / DATA, **how), []
    first, *others = inspection_view.describe(folder, with_dropped=not lines)
    stage.say(first.partition(": ")[2])
    for line in (*others, *lines):
        progress.say(line)
    return folder


def _extracted(source: Source, root: Path, quick: bool, stage: Stage) -> tuple[Path, list[str]]:
    """Extract clips with the ready backbones; return the data set, and lines on the outcome of the clips."""
    from conclugen_jax.extract import extraction, folders, outcome, ready, vectors
    from conclugen_jax.extract.backbones import Networks
    from conclugen_jax.extract.networks import mtcnn

    vectors.keep_freed_memory()
    about = {"labels": source.labels, "layout": source.layout, "pattern": source.pattern}
    request, utterances, known = folders.read(source.path, name=_name(source.path), **about)
    for line in ready.lines():
        progress.say(line)
    there, _ = ready.chosen()
    recogniser = ready.SPEECH if ready.SPEECH in there and importlib.util.find_spec("faster_whisper") else ""
    how = {"faces": str(mtcnn.WEIGHTS), "no_face": "drop", "recogniser": recogniser, "num_workers": os.cpu_count() or 1}
    how |= {
        "thumbnails": source.thumbnails,
        "known": known,
        "progress": stage.counter("clips"),
        "most": QUICK_CLIPS if quick else 0,
    }
    folder, tally = extraction.extract(request, utterances, Networks(own=tuple(there)), root / DATA, **how)
    tried = tally.done + len(tally.failures)
    more = [f"--quick: {tried} of {len(utterances):,} clips"] if tried < len(utterances) else []
    return folder, [*outcome.lines(tally, folder, tried), *more]


def _name(path: Path) -> str:
    """Return the name of the data set of a source."""
    name = re.sub(r"\W+", "_", path.absolute().stem.lower(), flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


def labels_of(frame: Any, root: Path) -> tuple[Path, Mapping[str, Sequence[str]]]:
    """Write a data frame of labels (``id``, ``label``, ``group``, ``split``, ...) as a table in the folder of a run.

    Returns the table, whose name has a hash of its content, and column -> names of its classes where the frame orders them.
    """
    found = data_frames.labels(frame)
    table, text = found.table, io.StringIO(newline="")
    csv.writer(text).writerows([list(table.columns), *zip(*table.columns.values(), strict=True)])
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"labels_{found.facts['labels_sha256'][:16]}.csv"
    if not path.exists():
        files.write_atomically(path, text.getvalue())
    return path, table.classes
