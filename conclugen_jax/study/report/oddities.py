"""Oddities of the data that a study scores: the tables of ``conclugen oddities``, shortened."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import odd_tables, oddities, weights
from conclugen_jax.study.report import embedding_map
from conclugen_jax.study.report.reading import Study
from conclugen_jax.study.report.tables import Part, words

MOST_ROWS, TOP, RUNS = 2000, 10, 3


def parts(study: Study) -> Iterator[Part]:
    """Yield for each data set what is odd in it, by the vectors of the first methods with a checkpoint, or by raw features."""
    able = [run for method in study.methods if (run := embedding_map.checkpointed(study, method))]
    runs = list({str(run.workdir): run for run in able}.values())
    for key, facts in study.datasets.items():
        title = facts.title(key)
        if not (Path(facts.path) / manifest_lib.FILE).is_file():
            yield Part(title, notes=[f"Not looked for: there is no data set in {facts.path} any more."])
            continue
        manifest, fitting = manifest_lib.read(facts.path), []
        for run in runs:
            sizes = {m: run.data.modalities[m] for m in run.config["data"]["modalities"]}
            with contextlib.suppress(ConclugenError):  # a run on other features is skipped
                weights.check_features(manifest, sizes, title, "the run")
                fitting.append(str(run.workdir))
        try:
            found = oddities.find(facts.path, fitting[:RUNS], most_rows=MOST_ROWS)
        except ConclugenError as e:
            yield Part(title, notes=[f"Not looked for: {e}."])
            continue
        options = f"--data={facts.path}" + f" --workdir={','.join(fitting[:RUNS])}" * bool(fitting)
        sentences = [f"{note[0].upper()}{note[1:]}." for note in found.notes]
        yield Part(title, notes=[*sentences, f"With all rows, as a csv: conclugen oddities {options}"])
        for one in odd_tables.shown(found, TOP):
            if one.rows:
                table = words(one.title, tuple(one.columns), [tuple(row) for row in one.rows])
                yield table._replace(text=one.said)
            else:
                yield Part(one.title, text=one.said)
