"""A study: methods x data sets x protocols x seeds, each cell a run of its own, several side by side.

A folder holds everything: ``pretraining/METHOD/seed_S`` and ``PROTOCOL/DATASET/METHOD/seed_S...`` are workdirs, ``study.json``
is what was asked for, ``results.json`` what came out. Whatever is finished is skipped when the command is repeated; an
interrupted pretraining goes on from its checkpoint. A cell that fails is marked with its error, the others go on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.study import definition as study_runs
from conclugen_jax.study import results as study_results
from conclugen_jax.study import work as study_work
from conclugen_jax.system import files, progress, signals

DEFINITION = "study.json"


def run(study: ConfigDict, folder: str | Path) -> dict[str, Any]:
    """Run what is not done yet, then collect.

    Args:
      study: see ``configs/study_demo.py``.
      folder: of the study.

    Returns:
      Content of ``results.json``, see ``study_results.py``. Failed cells are marked in it.

    Raises:
      ConclugenError: an impossible definition, or the folder is in use.
      Interrupted: SIGINT or SIGTERM came; repeating the command goes on.
    """
    study_runs.check(study)
    with workdir_lib.claim(folder) as root, signals.caught() as stop:
        chains = list(study_runs.chains(study))
        every = [run for chain in chains for run in chain]
        files.write_atomically(root / DEFINITION, config_lib.to_json(study))
        waiting = [chain for chain in chains if not all(study_work.is_done(root, run) for run in chain)]
        jobs = min(study.jobs or study_work.automatic_jobs(study.job_gib), max(len(waiting), 1))
        progress.say(
            f"study {study.name}: {len(every)} runs, {sum(study_work.is_done(root, run) for run in every)} done already, "
            f"{jobs} side by side"
        )
        study_work.work(root, waiting, jobs, stop)
        results = study_results.collect(study, every, root)
        files.write_json(root / study_results.RESULTS, results)
    return results


def chosen(results: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Entries of a list of results that have the given values."""
    return [entry for entry in results if all(entry[k] == v for k, v in wanted.items())]
