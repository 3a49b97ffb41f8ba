"""Run a study: processes side by side, each working through a chain of runs that depend on each other.

A run that has its result is skipped; one that fails is marked with its error, and the others continue.
"""

import concurrent.futures
import contextlib
import functools
import os
import signal
import time
import traceback
from concurrent.futures import Future
from pathlib import Path

import jax

from conclugen_jax import pretrain
from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.evaluate import downstream, sweep
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.study import results as study_results
from conclugen_jax.study.definition import SWEPT, Run
from conclugen_jax.study.results import FAILURE
from conclugen_jax.system import files, progress, signals
from conclugen_jax.system.pool import Died, Pool

DONE = "done.json"
BEGUN = "it was begun and has not ended; repeat the command to resume"


def automatic_jobs(job_gib: float) -> int:
    """Return how many jobs processors and free memory allow."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(processors()), int(available / job_gib)))


def processors() -> list[int]:
    """Return the numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def is_done(root: Path, run: Run) -> bool:
    """Return whether a run of this configuration has left its result and has not failed since."""
    folder = root / run.path
    finished = (folder / (DONE if run.protocol == "pretraining" else downstream.RESULT)).exists()
    return finished and not (folder / FAILURE).exists() and not _of_another(root, run)


def _of_another(root: Path, run: Run) -> str:
    """Return what is wrong with a workdir that was made with another configuration; empty: nothing."""
    if not (root / run.path / workdir_lib.CONFIG).exists():
        return ""
    try:
        lines = config_lib.differences(workdir_lib.read_config(root / run.path), run.config)
    except ConclugenError as e:
        return str(e)
    # The checkpoint is the study's own wherever the study lies; a key that only one side has came with another version;
    # without modalities named, the run's are those of its data.
    own = ["config.downstream.checkpoint:"] + ["config.data.modalities:"] * (not run.config.data.modalities)
    changed = [line for line in lines if "(absent)" not in line and not line.startswith(tuple(own))]
    if not changed:
        return ""
    return (
        f"{root / run.path} was made with another configuration ({'; '.join(changed)}); delete that folder to run it again, "
        "restore the configuration, or name another --study"
    )


def work(root: Path, waiting: list[list[Run]], jobs: int, stop: signals.Stop) -> None:
    """Work through the chains in processes, ``jobs`` at a time, each on its own processors.

    Raises:
      Interrupted: a signal came; what was running has a checkpoint.
    """
    total, begun, finished = len(waiting), time.monotonic(), 0
    free: list[int] = list(range(jobs))
    running: dict[Future, tuple[Pool, list[Run], int]] = {}
    try:
        while (waiting or running) and not stop.signal:
            while waiting and free:
                chain, slot = waiting.pop(0), free.pop()
                pool = Pool(1, start=functools.partial(_prepare, root, slot, jobs))
                running[pool.submit(_work_through_logged, root, chain)] = pool, chain, slot
            done, _ = concurrent.futures.wait(running, timeout=0.1, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in () if stop.signal else done:
                pool, chain, slot = running.pop(future)
                free.append(slot)
                rest = _ended(root, chain, future, pool)
                if rest:
                    waiting.append(rest)
                    continue
                finished += 1
                left = (time.monotonic() - begun) / finished * (total - finished)
                progress.say(f"{finished}/{total} {chain[0].path} finished; about {left / 60:.0f} min left")
    finally:
        for pool, _, _ in running.values():
            pool.terminate()  # a pretraining saves a checkpoint first
        concurrent.futures.wait(running, timeout=60)
        for pool, _, _ in running.values():
            pool.kill()
            pool.close()
    if stop.signal:
        raise signals.Interrupted(stop.signal)


def _ended(root: Path, chain: list[Run], future: Future, pool: Pool) -> list[Run]:
    """Return the runs of a chain that can still be tried after its process has ended."""
    (code,) = pool.close()
    try:
        future.result()
        return []
    except Died:
        return mark_lost(root, chain, code or 0)
    except signals.Interrupted:
        return mark_lost(root, chain, -signal.SIGTERM)


def _prepare(root: Path, slot: int, jobs: int) -> None:
    """Give a process its share of processors and of a GPU's memory, and the study's compiled programs."""
    own = processors()[slot::jobs]
    if own and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
    if jobs > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / jobs:.3f}")
    if not jax.config.jax_compilation_cache_dir:  # runs of a study compile the same programs again and again
        jax.config.update("jax_compilation_cache_dir", str((root / ".compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _work_through_logged(root: Path, chain: list[Run]) -> None:
    """Work through a chain; its output goes to a log of its own."""
    (root / "logs").mkdir(exist_ok=True)
    name = chain[0].path.replace("/", "_") + ".log"
    log = (root / "logs" / name).open("a", encoding="utf-8")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        work_through(root, chain)


def mark_lost(root: Path, chain: list[Run], code: int) -> list[Run]:
    """Mark the run that a process was at when it ended without saying why, and all others if that was pretraining.

    Returns:
      The runs after it that can still be tried.
    """
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    cause = f"the process that ran it {ended}; repeat the command to try again"
    open_ones = [i for i, run in enumerate(chain) if not is_done(root, run)]
    begun = [i for i in open_ones if study_results.failure(root / chain[i].path) == BEGUN]
    if not open_ones:
        return []
    at = (begun or open_ones)[0]
    _fail(root, chain[at], cause)
    rest = chain[at + 1 :]
    if chain[at].protocol != "pretraining":
        return rest
    for run in rest:
        _fail(root, run, f"its pretraining failed: {cause}")
    return []


def _fail(root: Path, run: Run, error: str) -> None:
    (root / run.path).mkdir(parents=True, exist_ok=True)
    files.write_json(root / run.path / FAILURE, {"error": error}, place="--study")


def work_through(root: Path, chain: list[Run]) -> None:
    """Do the runs of a chain that are not done; a failed pretraining fails what depends on it.

    A run is marked as failed while it is being done, so that one whose process is killed never counts as finished. After a
    new pretraining, downstream runs that are done are compared with it.
    """
    broken, renewed = None, False
    for run in chain:
        if broken:
            _fail(root, run, f"its pretraining failed: {broken}")
            continue
        if is_done(root, run) and not renewed:
            continue
        renewed = renewed or run.protocol == "pretraining"
        _fail(root, run, BEGUN)
        try:
            problem = _of_another(root, run)
            if problem:
                raise ConclugenError(problem)
            perform(run, root)
            (root / run.path / FAILURE).unlink()
        except signals.Interrupted:
            raise
        except Exception as e:  # whatever it is, the other runs continue; the log has it in full
            if not isinstance(e, ConclugenError):
                traceback.print_exc()
            cause = str(e) if isinstance(e, ConclugenError) else f"{type(e).__name__}: {reason(e)}"
            _fail(root, run, cause)
            broken = cause if run.protocol == "pretraining" else None


def perform(run: Run, root: Path) -> None:
    """Do one run in its workdir."""
    workdir, config = root / run.path, run.config.copy_and_resolve_references()
    if config.downstream.checkpoint:
        config.downstream.checkpoint = str((root / config.downstream.checkpoint).absolute())
    if run.protocol == "pretraining":
        state = pretrain.pretrain(config, workdir)
        files.write_json(workdir / DONE, {"steps": int(state.step)}, place="--study")
    elif run.protocol in SWEPT:
        sweep.sweep(config, workdir)
    else:
        downstream.downstream(config, workdir)
