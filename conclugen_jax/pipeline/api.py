"""What ``conclugen run`` does, as a function."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.data import data_frames
from conclugen_jax.data.requests import Layout
from conclugen_jax.pipeline import run as run_lib, source as source_lib
from conclugen_jax.system import pool


def run(
    source: str | Path,
    workdir: str | Path,
    *,
    labels: Any = (),
    label: str | Sequence[str] = (),
    label_kind: str = "",
    classes: Sequence[str] = (),
    targets: Sequence[str] = (),
    label_pattern: str = "",
    drop_bad: bool = False,
    quick: bool = False,
    config: str = "",
    changes: Mapping[str, Any] | None = None,
) -> run_lib.Outcome:
    """Go from clips, features or a built data set to a trained model, its scores and a page; see ``conclugen run --help``.

    It starts processes, so a script calls it below ``if __name__ == "__main__":``.

    Args:
      source: folder of clips, folder or file of features, or a built data set.
      workdir: folder for all that comes of it; the same call resumes there.
      labels: tables, or a data frame, instead of ``labels.csv`` in the source.
      label: column of the label, or columns of 0 and 1.
      label_kind: ``single``, ``multi``, ``value`` or ``none``; guessed if empty.
      classes: names in order; those found, sorted, if empty.
      targets: columns of further things to predict.
      label_pattern: names of clips that say their labels, such as ``{actor}_{emotion}_{take}``.
      drop_bad: drop examples with NaN, infinities or no modality.
      quick: a first look.
      config: name or file of a configuration that is used as it is, instead of settings chosen from the data.
      changes: keys of the configuration -> values, above all settings.

    Raises:
      ConclugenError: a source that cannot be used, too few rows, or a folder in which something else was begun.
      Interrupted: a signal came; the same call resumes.
    """
    columns = (label,) if isinstance(label, str) else tuple(label)
    columns = tuple(filter(None, columns))
    if data_frames.is_frame(labels):
        source_lib.Source(Path(source)).check(Path(workdir))  # before the table is written into the workdir
        labels, known = source_lib.labels_of(labels, Path(workdir))
        if not classes and label_kind in ("", "single") and len(columns) < 2:
            classes = known.get(*(columns or ("label",)), ())
    layout = Layout(columns, label_kind, tuple(classes), tuple(targets))
    tables = tuple(map(Path, [labels] if isinstance(labels, str | Path) else labels))
    found = source_lib.Source(Path(source), tables, label_pattern, layout, drop_bad)
    given = [(key, str(value)) for key, value in (changes or {}).items()]
    with pool.without_script():
        return run_lib.run(found, workdir, quick=quick, config=config, changes=given)
