"""A study: methods x data sets x protocols x seeds, each cell a run of its own, several side by side.

The way down: ``definition.py`` checks what is asked for and lists the runs, ``work.py`` does them, ``results.py`` collects
their scores, ``report/`` shows them. One folder holds everything: ``pretraining/METHOD/seed_S`` and
``PROTOCOL/DATASET/METHOD/seed_S...`` are workdirs, ``study.json`` is the definition, ``results.json`` the outcome. A repeated
command skips what is finished and resumes an interrupted pretraining from its checkpoint.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.study import definition, results, work
from conclugen_jax.system import files, progress, signals

DEFINITION = "study.json"


def run(study: ConfigDict, folder: str | Path) -> dict[str, Any]:
    """Run what is not done yet, then collect the results.

    Args:
      study: see ``configs/study_demo.py``.
      folder: of the study.

    Returns:
      Content of ``results.json``, see :func:`results.collect`. Failed cells are marked in it.

    Raises:
      ConclugenError: an impossible definition, or the folder is in use.
      Interrupted: SIGINT or SIGTERM came; repeating the command resumes.
    """
    definition.check(study)
    with workdir_lib.claim(folder) as root, signals.caught() as stop:
        chains = list(definition.chains(study))
        every = [run for chain in chains for run in chain]
        files.write_atomically(root / DEFINITION, config_lib.to_json(study))
        waiting = [chain for chain in chains if not all(work.is_done(root, run) for run in chain)]
        jobs = min(study.jobs or work.automatic_jobs(study.job_gib), max(len(waiting), 1))
        progress.say(
            f"study {study.name}: {len(every)} runs, {sum(work.is_done(root, run) for run in every)} done already, "
            f"{jobs} side by side"
        )
        work.work(root, waiting, jobs, stop)
        found = results.collect(study, every, root)
        files.write_json(root / results.RESULTS, found, place="--study")
    return found


def chosen(entries: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the entries of a list of results that have the given values."""
    return [entry for entry in entries if all(entry[k] == v for k, v in wanted.items())]
