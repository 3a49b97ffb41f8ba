"""A study: methods x data sets x protocols x seeds, each cell a run of its own, several side by side.

A folder holds everything: ``pretraining/METHOD/seed_S`` and ``PROTOCOL/DATASET/METHOD/seed_S...`` are workdirs, ``study.json``
is what was asked for, ``results.json`` what came out. Whatever is finished is skipped when the command is repeated; an
interrupted pretraining goes on from its checkpoint. A cell that fails is marked with its error, the others go on.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conclugen_jax import config as config_lib
from conclugen_jax import progress, signals, study_results
from conclugen_jax import workdir as workdir_lib
from conclugen_jax.errors import ConclugenError

DEFINITION, FAILURE, DONE = "study.json", "failed.json", "done.json"
SWEPT = ("linear_evaluation", "raw_features")
"""Protocols whose labels and draws are one run each (a sweep)."""
ALONE = ("supervised", "raw_features")
"""Protocols that need no pretraining; in tables each is a method of its own."""
PROTOCOLS = ("linear_evaluation", "fine_tuning", *ALONE)
KEYS = {
    *("name", "pretraining_path", "methods", "datasets", "seeds", "labels", "label_draws", "training_draws"),
    *("jobs", "job_gib", "reference", "order"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One workdir of a study.

    Attributes:
      path: below the study's folder.
      config: of the run; ``data.path``, ``seed`` and ``downstream.checkpoint`` filled in.
      protocol: of a downstream run, or ``pretraining``.
      dataset: its name in the study; empty for pretraining.
      method: its name in the study.
      seed: of the run.
    """

    path: str
    config: ConfigDict
    protocol: str
    dataset: str
    method: str
    seed: int


def check(study: ConfigDict) -> None:
    """Refuse a definition that cannot be run.

    Raises:
      ConclugenError: names the key and what is expected.
    """
    wrong = sorted(KEYS ^ set(study.keys()))
    if wrong:
        raise ConclugenError(
            f"config.{wrong[0]}: {'missing' if wrong[0] in KEYS else 'unknown'}; a study has the keys "
            f"{', '.join(sorted(KEYS))}, see configs/study_demo.py"
        )
    for name, method in study.methods.items():
        if "uses" in method and (method.uses not in study.methods or "uses" in study.methods[method.uses]):
            raise ConclugenError(
                f"config.methods.{name}.uses is {method.uses!r}; name a method that is pretrained itself"
            )
    for name, dataset in study.datasets.items():
        unknown = sorted(set(dataset.protocols.keys()) - set(PROTOCOLS))
        if unknown:
            raise ConclugenError(
                f"config.datasets.{name}.protocols has {unknown[0]!r}; there are {', '.join(PROTOCOLS)}"
            )
    if sorted(study.order) != sorted(study.methods.keys()):
        raise ConclugenError(
            f"config.order is {tuple(study.order)}; it must name every method once, as tables list them: "
            f"{', '.join(study.methods.keys())}"
        )
    named = {*study.methods.keys(), *ALONE}
    if study.reference not in named:
        raise ConclugenError(f"config.reference is {study.reference!r}; name one of {', '.join(sorted(named))}")
    if not 1 <= study.training_draws <= study.label_draws:
        raise ConclugenError(
            f"config.training_draws is {study.training_draws}; it must be at least 1 and at most label_draws "
            f"({study.label_draws}), so that runs are compared on the same labels"
        )


def chains(study: ConfigDict) -> Iterator[list[Run]]:
    """Runs in the order of their dependence, those of one method and seed together: pretraining first, if any."""
    for seed in study.seeds:
        for name in study.order:
            method = study.methods[name]
            if "uses" in method:
                continue
            users = {n: m for n, m in study.methods.items() if n == name or m.get("uses") == name}
            config = _filled(method.pretraining, study.pretraining_path, seed)
            chain = [Run(f"pretraining/{name}/seed_{seed}", config, "pretraining", "", name, seed)]
            for user, settings in users.items():
                chain += _downstream(study, user, settings.modalities, seed, chain[0].path)
            yield chain
        for protocol in ALONE:
            runs = _downstream(study, protocol, (), seed, "")
            if runs:
                yield runs


def _downstream(study: ConfigDict, method: str, modalities: Any, seed: int, pretraining: str) -> list[Run]:
    """The downstream runs of one method and seed on all data sets."""
    runs = []
    draws = range(seed * study.label_draws, (seed + 1) * study.label_draws)
    for dataset, settings in study.datasets.items():
        for protocol, config in settings.protocols.items():
            if (protocol in ALONE) != (not pretraining) or (protocol in ALONE and protocol != method):
                continue
            config = _filled(config, settings.path, seed)
            config.downstream.protocol, config.downstream.checkpoint = protocol, pretraining
            if modalities:
                config.downstream.modalities = tuple(modalities)
            path, labels = f"{protocol}/{dataset}/{method}/seed_{seed}", tuple(study.labels[protocol])
            if protocol in SWEPT:
                config.sweep.labels_per_class, config.sweep.label_draws = labels, tuple(draws)
                runs.append(Run(path, config, protocol, dataset, method, seed))
                continue
            for number in labels:
                for draw in draws[: study.training_draws if number else 1]:
                    one = config.copy_and_resolve_references()
                    one.downstream.labels_per_class, one.downstream.label_draw = number, draw
                    name = f"labels_{number or 'all'}" + (f"_draw_{draw}" if number else "")
                    runs.append(Run(f"{path}/{name}", one, protocol, dataset, method, seed))
    return runs


def _filled(config: ConfigDict, path: str, seed: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.path, config.seed = path, seed
    return config


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
    check(study)
    with workdir_lib.claim(folder) as root, signals.caught() as stop:
        every = [run for chain in chains(study) for run in chain]
        workdir_lib.write_atomically(root / DEFINITION, config_lib.to_json(study))
        waiting = [chain for chain in chains(study) if not all(is_done(root, run) for run in chain)]
        jobs = min(study.jobs or automatic_jobs(study.job_gib), max(len(waiting), 1))
        progress.say(
            f"study {study.name}: {len(every)} runs, {sum(is_done(root, run) for run in every)} done already, "
            f"{jobs} side by side"
        )
        _work(root, waiting, jobs, stop)
        results = study_results.collect(study, every, root)
        workdir_lib.write_atomically(root / study_results.RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def automatic_jobs(job_gib: float) -> int:
    """As many as there are processors and as memory allows."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(processors()), int(available / job_gib)))


def processors() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def is_done(root: Path, run: Run) -> bool:
    """Whether a run has left its result."""
    return (root / run.path / (DONE if run.protocol == "pretraining" else "result.json")).exists()


def _work(root: Path, waiting: list[list[Run]], jobs: int, stop: signals.Stop) -> None:
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
                if process.exitcode and not stop.signal:
                    _mark_lost(root, chain, process.exitcode)
                del running[slot]
                free.append(slot)
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


def _mark_lost(root: Path, chain: list[Run], code: int) -> None:
    """A process that ended without saying why: the run that it was at has failed."""
    for run in chain:
        if not is_done(root, run) and not (root / run.path / FAILURE).exists():
            reason = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            _fail(root, run, f"the process that ran it was {reason}; repeat the command to try again")
            return


def _fail(root: Path, run: Run, error: str) -> None:
    folder = root / run.path
    folder.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_atomically(folder / FAILURE, json.dumps({"error": error}) + "\n")


def _worker(root: str, chain: list[Run], slot: int, jobs: int, parent: int) -> None:
    """Work through a chain in a process of its own."""
    _end_with(parent)
    own = processors()[slot::jobs]
    if own and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, own)
    import jax

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


def _end_with(parent: int) -> None:
    """End this process as soon as its parent is gone, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work_through(root: Path, chain: list[Run], act: Callable[[Run, Path], None] | None = None) -> None:
    """Do the runs of a chain that are not done; a failed pretraining fails what depends on it.

    Args:
      root: the study's folder.
      chain: runs in the order of their dependence.
      act: does one run; for tests.
    """
    broken = None
    for run in chain:
        if is_done(root, run):
            continue
        (root / run.path / FAILURE).unlink(missing_ok=True)
        if broken:
            _fail(root, run, f"its pretraining failed: {broken}")
            continue
        try:
            (act or perform)(run, root)
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
    # Here, not above: the process that only starts others needs no JAX.
    from conclugen_jax import downstream, pretrain, sweep

    workdir, config = root / run.path, run.config.copy_and_resolve_references()
    if config.downstream.checkpoint:
        config.downstream.checkpoint = str(root / config.downstream.checkpoint)
    if run.protocol == "pretraining":
        state = pretrain.pretrain(config, workdir)
        workdir_lib.write_atomically(workdir / DONE, json.dumps({"steps": int(state.step)}) + "\n")
    elif run.protocol in SWEPT:
        sweep.sweep(config, workdir)
    else:
        downstream.downstream(config, workdir)


def chosen(results: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """Entries of a list of results that have the given values."""
    return [entry for entry in results if all(entry[k] == v for k, v in wanted.items())]
