"""A study: methods x data sets x protocols x seeds, each cell a run of its own, several side by side.

The way down: ``definition.py`` checks what is asked for and lists the runs in chains that depend on each other, here they are
done, ``results.py`` collects their scores, ``report/`` shows them. One folder holds everything: ``pretraining/METHOD/seed_S``
and ``PROTOCOL/DATASET/METHOD/seed_S...`` are workdirs, ``study.json`` is the definition, ``results.json`` the outcome. A
repeated command skips runs that have their result and resumes an interrupted pretraining from its checkpoint; a run that fails
is marked with its error, and the others continue.
"""

import contextlib
import functools
import signal
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from conclugen_jax import pretrain
from conclugen_jax.data import manifest as manifest_lib
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.evaluate import downstream, probe_run, sweep, weights
from conclugen_jax.evaluate.baselines import BASELINES
from conclugen_jax.pretrain import together
from conclugen_jax.runs import checkpoint, config as config_lib, workdir as workdir_lib
from conclugen_jax.runs.layout import BEGUN, DONE, FAILURE, RUNS, STUDY
from conclugen_jax.study import definition, results
from conclugen_jax.study.definition import PROBE, SWEPT, Run
from conclugen_jax.system import engines, files, progress, signals
from conclugen_jax.system.engines import Engine
from conclugen_jax.system.pool import Died

LOST = "the process that ran it"


def run(study: ConfigDict, folder: str | Path, engine: Engine | None = None) -> dict[str, Any]:
    """Run what is not done yet of a study such as ``configs/study_demo.py`` in its folder, then collect the results.

    ``engine`` starts the processes; ``None``: of this machine.

    Returns:
      Content of ``results.json``, see :func:`results.collect`. Failed cells are marked in it.

    Raises:
      ConclugenError: an impossible definition, a data set that is to be used is none, or the folder is in use.
      Interrupted: SIGINT or SIGTERM came; repeating the command resumes.
    """
    definition.check(study)
    with workdir_lib.claim(folder) as root, signals.caught() as stop:
        return within(root, study, stop, engine=engine)


def within(
    root: Path, study: ConfigDict, stop: signals.Stop, further: Sequence[Run] = (), engine: Engine | None = None
) -> dict[str, Any]:
    """Run a study that was checked in a folder that is owned already, see :func:`run`.

    ``further``: runs that are no cells of the study, each after the pretraining that it names, or in their order.
    """
    chains = list(definition.chains(study))
    every = [run for chain in chains for run in chain]
    for run in further:
        before = [chain for chain in chains if chain[0].path == run.config.downstream.checkpoint]
        if before:
            before[0].append(run)
        else:
            chains.append([run])
    runs = [run for chain in chains for run in chain]
    done = {run.path for run in runs if is_done(root, run)}
    data = (run.config.data for run in runs if run.path not in done)
    for path in dict.fromkeys(path for one in data for path in (one.path, *one.test_paths)):
        manifest_lib.read(path)
    files.write_atomically(root / STUDY, config_lib.to_json(study))
    files.write_json(root / RUNS, [run.path for run in runs], place="folder")
    waiting = definition.cohorts(chain for chain in chains if not done.issuperset(run.path for run in chain))
    engine = engine or engines.Engine()
    jobs = engine.plan(root, len(waiting), study.jobs, study.job_gib)
    progress.say(f"study {study.name}: {len(runs)} runs, {len(done)} done already, {jobs} side by side")
    work(root, waiting, jobs, stop, engine)
    found = results.collect(study, every, root)
    files.write_json(root / results.RESULTS, found, place="folder")
    return found


def chosen(entries: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the entries of a list of results that have the given values."""
    return [entry for entry in entries if all(entry[k] == v for k, v in wanted.items())]


def is_done(root: Path, run: Run) -> bool:
    """Return whether a run of this configuration has left its result and has not failed since."""
    folder = root / run.path
    finished = (folder / (DONE if run.protocol == "pretraining" else weights.RESULT)).exists()
    return finished and not (folder / FAILURE).exists() and not _of_another(root, run)


def _of_another(root: Path, run: Run) -> str:
    """Return what is wrong with a workdir that was made with another configuration; empty: nothing."""
    folder = root / run.path
    if not (folder / workdir_lib.CONFIG).exists():
        return ""
    try:
        lines = config_lib.differences(workdir_lib.read_config(folder), run.config)
    except ConclugenError as e:
        return str(e)
    # The checkpoint is the study's own wherever the study lies; a key that only one side has came with another version;
    # without modalities named, the run's are those of its data.
    own = ("config.downstream.checkpoint:", *["config.data.modalities:"] * (not run.config.data.modalities))
    changed = "; ".join(line for line in lines if "(absent)" not in line and not line.startswith(own))
    way_out = "delete that folder to run it again, restore the configuration, or name another --study"
    return f"{folder} was made with another configuration ({changed}); {way_out}" if changed else ""


def work(root: Path, waiting: list[list[list[Run]]], jobs: int, stop: signals.Stop, engine: Engine) -> None:
    """Work through the cohorts of chains in processes, ``jobs`` at a time."""
    total, begun, finished = len(waiting), time.monotonic(), 0
    do, begin = functools.partial(_work_through_logged, root), functools.partial(_begin, root)
    for cohort, future, code in engines.side_by_side(engine, jobs, waiting, do, begin, stop):
        try:
            future.result()
            rest = []
        except (Died, signals.Interrupted) as e:
            rest = _left(root, cohort, code if isinstance(e, Died) else -signal.SIGTERM)
        if rest:
            waiting.append(rest)
        else:
            finished += 1
            left = remaining((time.monotonic() - begun) / finished * (total - finished))
            paths = [root / run.path for chain in cohort for run in chain]
            outcome = "failed" if any(map(results.failure, paths)) else "finished"
            more = f" and {len(cohort) - 1} more" * (len(cohort) > 1)
            progress.say(f"{finished}/{total} {cohort[0][0].path}{more} {outcome}{left}")


def remaining(seconds: float) -> str:
    """Return what is said of the time that is left; nothing where none is."""
    about = f"about {seconds / 60:.0f} min" if seconds >= 60 else "less than a minute"
    return f"; {about} left" if seconds else ""


def _begin(root: Path, place: int) -> None:
    """Let a process keep compiled programs for the others."""
    del place
    if not jax.config.jax_compilation_cache_dir:  # runs of a study compile the same programs again and again
        jax.config.update("jax_compilation_cache_dir", str((root / ".compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _work_through_logged(root: Path, cohort: list[list[Run]]) -> None:
    """Work through a cohort; its output goes to a log of its own."""
    (root / "logs").mkdir(exist_ok=True)
    name = cohort[0][0].path.replace("/", "_") + ".log"
    log = (root / "logs" / name).open("a", encoding="utf-8")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        work_through(root, cohort)


def _left(root: Path, cohort: list[list[Run]], code: int) -> list[list[Run]]:
    """Mark what the process of a cohort was at when it ended; return what can be tried of its chains."""
    begun = [chain for chain in cohort if any(results.failure(root / run.path) == BEGUN for run in chain)]
    lost = begun or [chain for chain in cohort if not all(is_done(root, run) for run in chain)][:1]
    left = [mark_lost(root, chain, code) if chain in lost else _untried(root, chain) for chain in cohort]
    return [chain for chain in left if chain]


def _untried(root: Path, chain: list[Run]) -> list[Run]:
    return [run for run in chain if not is_done(root, run) and results.failure(root / run.path) is None]


def mark_lost(root: Path, chain: list[Run], code: int) -> list[Run]:
    """Mark the run that a process was at when it ended without saying why; return those after it that can be tried."""
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    open_ones = [i for i, run in enumerate(chain) if not is_done(root, run)]
    begun = [i for i in open_ones if results.failure(root / chain[i].path) == BEGUN]
    if not open_ones:
        return []
    return _failed(root, chain[(begun or open_ones)[0] :], f"{LOST} {ended}; repeat the command to try again")


def _failed(root: Path, chain: list[Run], cause: str) -> list[Run]:
    """Mark the first run of a chain as failed, and all others if it was pretraining; return those that can be tried."""
    lost, *rest = chain
    _mark(root, lost, cause)
    if lost.protocol != "pretraining":
        return rest
    for run in rest:
        _mark(root, run, f"its pretraining failed: {cause}")
    return []


def _mark(root: Path, run: Run, error: str) -> None:
    (root / run.path).mkdir(parents=True, exist_ok=True)
    files.write_json(root / run.path / FAILURE, {"error": error}, place="folder")


def work_through(root: Path, cohort: list[list[Run]]) -> None:
    """Do the runs of chains that are not done: pretrainings together where that is possible, then chain by chain."""
    renewed = _pretrained_together(root, [chain[0] for chain in cohort])
    for chain in cohort:
        _work_through_chain(root, chain, chain[0].path in renewed)


def _pretrained_together(root: Path, runs: list[Run]) -> set[str]:
    """Pretrain those of some runs together that can be; return which are done. The others are tried one by one."""
    alone = len(runs) < 2 or together.kind(runs[0].config) is None or runs[0].protocol != "pretraining"
    saved = {run.path: any((root / run.path / checkpoint.FOLDER).glob("[0-9]*")) for run in runs}
    lost = {run.path: (results.failure(root / run.path) or "").startswith(LOST) for run in runs}  # too large together?
    new = [run for run in runs if not (alone or saved[run.path] or lost[run.path] or _of_another(root, run))]
    if len(new) < 2:
        return set()
    for run in new:
        _mark(root, run, BEGUN)
    try:
        finished = together.pretrain_together([run.config for run in new], [root / run.path for run in new])
    except Exception as e:  # which of them it is about shows when they are trained one by one
        progress.say(f"not trained together: {e if isinstance(e, ConclugenError) else traceback.format_exc()}")
        return set()
    done = [run for run, good in zip(new, finished, strict=True) if good]
    for run in done:
        files.write_json(root / run.path / DONE, {"together": len(done)}, place="folder")
        (root / run.path / FAILURE).unlink()
    return {run.path for run in done}


def _work_through_chain(root: Path, chain: list[Run], renewed: bool) -> None:
    """Do the runs of a chain that are not done; a failed pretraining fails what depends on it.

    A run is marked as failed while it is being done, so that one whose process is killed never counts as finished. After a
    new pretraining (``renewed``), downstream runs that are done are compared with it.
    """
    while chain:
        run, *rest = chain
        if (renewed and run.protocol != "pretraining") or not is_done(root, run):
            renewed = renewed or run.protocol == "pretraining"
            _mark(root, run, BEGUN)
            try:
                if problem := _of_another(root, run):
                    raise ConclugenError(problem)
                perform(run, root)
                (root / run.path / FAILURE).unlink()
            except ConclugenError as e:
                rest = _failed(root, chain, str(e))
            except Exception as e:  # whatever it is, the other runs continue; the log has it in full
                traceback.print_exc()
                rest = _failed(root, chain, f"{type(e).__name__}: {reason(e)}")
        chain = rest


def perform(run: Run, root: Path) -> None:
    """Do one run in its workdir."""
    workdir, config = root / run.path, run.config.copy_and_resolve_references()
    if config.downstream.checkpoint:
        config.downstream.checkpoint = str((root / config.downstream.checkpoint).absolute())
    if run.protocol == "pretraining":
        state = pretrain.pretrain(config, workdir)
        files.write_json(workdir / DONE, {"steps": int(state.step)}, place="folder")
    elif run.protocol == PROBE:
        probe_run.run(config, workdir, BASELINES[run.method].form if run.method in BASELINES else "")
    elif run.protocol in SWEPT:
        sweep.sweep(config, workdir)
    else:
        downstream.downstream(config, workdir)
