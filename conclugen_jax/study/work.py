"""The work of a study: processes side by side, each going through runs that depend on each other.

A run whose result is there is skipped; one that fails is marked with its error, and the others go on.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from conclugen_jax import pretrain
from conclugen_jax.errors import ConclugenError
from conclugen_jax.evaluate import downstream, sweep
from conclugen_jax.run import config as config_lib
from conclugen_jax.run import workdir as workdir_lib
from conclugen_jax.study import results as study_results
from conclugen_jax.study.definition import SWEPT, Run
from conclugen_jax.system import files, progress, signals

FAILURE, DONE = "failed.json", "done.json"
BEGUN = "it was begun and has not ended; repeat the command to go on"


def automatic_jobs(job_gib: float) -> int:
    """As many as there are processors and as memory allows."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(processors()), int(available / job_gib)))


def processors() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def is_done(root: Path, run: Run) -> bool:
    """Whether a run has left its result, by the configuration that is asked for, and has not failed since."""
    folder = root / run.path
    finished = (folder / (DONE if run.protocol == "pretraining" else downstream.RESULT)).exists()
    return finished and not (folder / FAILURE).exists() and not _of_another(root, run)


def _of_another(root: Path, run: Run) -> str:
    """What is wrong with a workdir that a run of another configuration has made; empty: nothing."""
    if not (root / run.path / workdir_lib.CONFIG).exists():
        return ""
    try:
        found = dict(config_lib.flatten(workdir_lib.read_config(root / run.path).to_dict()))
    except ConclugenError as e:
        return str(e)
    # The checkpoint is the study's own wherever the study lies; a key that only one side has came with another version.
    wanted = {k: v for k, v in config_lib.flatten(run.config.to_dict()) if k != "downstream.checkpoint" and k in found}
    changed = [f"config.{k}: {found[k]} -> {v}" for k, v in sorted(wanted.items()) if found[k] != v]
    if not changed:
        return ""
    return (
        f"{root / run.path} was made with another configuration ({'; '.join(changed)}); delete that folder to run it anew, "
        "restore the configuration, or name another --study"
    )


def work(root: Path, waiting: list[list[Run]], jobs: int, stop: signals.Stop) -> None:
    """Let processes work through the chains, ``jobs`` at a time, each on its own processors."""
    context, total, begun = multiprocessing.get_context("spawn"), len(waiting), time.monotonic()
    free, running, finished = list(range(jobs)), {}, 0
    try:
        while (waiting or running) and not stop.signal:
            while waiting and free:
                chain, slot = waiting.pop(0), free.pop()
                process = context.Process(target=_worker, args=(str(root), chain, slot, jobs, os.getpid()))
                with _environment(jobs):
                    process.start()
                running[slot] = process, chain
            time.sleep(0.1)
            for slot, (process, chain) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[slot]
                free.append(slot)
                rest = mark_lost(root, chain, process.exitcode) if process.exitcode and not stop.signal else []
                if rest:
                    waiting.append(rest)
                    continue
                finished += 1
                left = (time.monotonic() - begun) / finished * (total - finished)
                progress.say(f"{finished}/{total} {chain[0].path} finished; about {left / 60:.0f} min left")
    finally:
        for process, _ in running.values():
            process.terminate()  # a pretraining saves a checkpoint first
        for process, _ in running.values():
            process.join(60)
            process.kill()
    if stop.signal:
        raise signals.Interrupted(stop.signal)


class _environment:
    """What processes side by side need: an equal share of a GPU's memory each."""

    def __init__(self, jobs: int):
        self._set = {} if jobs == 1 else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"}

    def __enter__(self) -> None:
        self._old = {k: os.environ.get(k) for k in self._set}
        os.environ.update({k: v for k, v in self._set.items() if k not in os.environ})

    def __exit__(self, *_: Any) -> None:
        for key, value in self._old.items():
            if value is None:
                os.environ.pop(key, None)


def mark_lost(root: Path, chain: list[Run], code: int) -> list[Run]:
    """A process that ended without saying why: the run that it was at has failed, and all others if that was pretraining.

    Returns:
      The runs after it that can still be tried.
    """
    reason = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    reason = f"the process that ran it {reason}; repeat the command to try again"
    open_ones = [i for i, run in enumerate(chain) if not is_done(root, run)]
    begun = [i for i in open_ones if study_results.failure(root / chain[i].path) == BEGUN]
    if not open_ones:
        return []
    at = (begun or open_ones)[0]
    _fail(root, chain[at], reason)
    rest = chain[at + 1 :]
    if chain[at].protocol != "pretraining":
        return rest
    for run in rest:
        _fail(root, run, f"its pretraining failed: {reason}")
    return []


def _fail(root: Path, run: Run, error: str) -> None:
    folder = root / run.path
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(folder / FAILURE, json.dumps({"error": error}) + "\n")


def _worker(root: str, chain: list[Run], slot: int, jobs: int, parent: int) -> None:
    """Work through a chain in a process of its own."""
    signals.end_with(parent)
    own = processors()[slot::jobs]
    if own and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
    if not jax.config.jax_compilation_cache_dir:  # runs of a study compile the same programs again and again
        jax.config.update("jax_compilation_cache_dir", str(Path(root, ".compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    Path(root, "logs").mkdir(exist_ok=True)
    with open(Path(root, "logs", chain[0].path.replace("/", "_") + ".log"), "a", encoding="utf-8") as log:
        sys.stdout = sys.stderr = log
        try:
            work_through(Path(root), chain)
        except signals.Interrupted:
            sys.exit(1)


def work_through(root: Path, chain: list[Run], act: Callable[[Run, Path], None] | None = None) -> None:
    """Do the runs of a chain that are not done; a failed pretraining fails what depends on it.

    While a run is being done it is marked as failed, so that one whose process is killed is never taken for finished. Where
    pretraining was done now, what there is of downstream runs is compared with it.

    Args:
      root: the study's folder.
      chain: runs in the order of their dependence.
      act: does one run; for tests.
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
            (act or perform)(run, root)
            (root / run.path / FAILURE).unlink()
        except signals.Interrupted:
            raise
        except Exception as e:  # whatever it is, the other cells go on; the log has it in full
            if not isinstance(e, ConclugenError):
                traceback.print_exc()
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            reason = reason if isinstance(e, ConclugenError) else f"{type(e).__name__}: {reason}"
            _fail(root, run, reason)
            broken = reason if run.protocol == "pretraining" else None


def perform(run: Run, root: Path) -> None:
    """Do one run in its workdir."""
    workdir, config = root / run.path, run.config.copy_and_resolve_references()
    if config.downstream.checkpoint:
        config.downstream.checkpoint = str((root / config.downstream.checkpoint).absolute())
    if run.protocol == "pretraining":
        state = pretrain.pretrain(config, workdir)
        files.write_atomically(workdir / DONE, json.dumps({"steps": int(state.step)}) + "\n")
    elif run.protocol in SWEPT:
        sweep.sweep(config, workdir)
    else:
        downstream.downstream(config, workdir)
