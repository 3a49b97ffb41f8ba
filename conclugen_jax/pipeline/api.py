"""The command ``conclugen run`` as a Python function."""

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
    """Pretrain and score a model on clips, features or a built data set, and write a report.

    The arguments are those of ``conclugen run``. The function starts processes. A script must therefore call it below
    ``if __name__ == "__main__":``.

    Args:
      source: folder of clips, folder or file of features, or folder of a built data set.
      workdir: folder for all results. The same call resumes an interrupted run in it.
      labels: path or paths of tables, or a data frame; by default ``labels.csv`` in the source.
      label: name of the column with the label, or names of several columns of 0 and 1.
      label_kind: ``single``, ``multi``, ``value`` or ``none``; by default guessed from the values.
      classes: class names in order; by default the sorted names in the label column.
      targets: names of columns with further labels to predict.
      label_pattern: pattern that reads labels from the names of clips, such as ``{actor}_{emotion}_{take}``.
      drop_bad: whether to drop examples with NaN, infinities or no modality.
      quick: whether to train shorter, for a first look.
      config: name or file of a configuration to use unchanged; by default the settings are chosen from the data.
      changes: maps keys of the configuration to values, which take precedence over all other settings.

    Returns:
      The scores, and the paths of the report and of the trained runs.

    Raises:
      ConclugenError: the source cannot be used, it has too few rows, or the workdir holds another run.
      Interrupted: the process got SIGINT or SIGTERM; the same call resumes.
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
