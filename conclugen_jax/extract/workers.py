"""Utterances prepared by processes beside the device, or by this one."""

import concurrent.futures
import concurrent.futures.process
import os
from collections import deque
from collections.abc import Iterable, Iterator

from conclugen_jax.data.workers import Spawning, interrupts_blocked
from conclugen_jax.extract.clips import Utterance
from conclugen_jax.extract.preparation import Prepared, Recipe, prepare
from conclugen_jax.system import signals

AHEAD = 2
"""Utterances that are under way or wait for the device, for each process; each holds its frames."""

TIMEOUT = 900.0
"""Seconds after which an utterance is given up, in case a decoder never ends."""

Work = tuple[Utterance, int]
"""An utterance and its number of views."""


def prepared(work: Iterable[Work], how: Recipe, num_workers: int) -> Iterator[Prepared]:
    """Prepare utterances, in order.

    Args:
      work: utterances with their numbers of views.
      how: they are prepared.
      num_workers: processes; 0: this one.

    Yields:
      What was prepared of each. An utterance whose file crashes the decoder, and the process with it, or keeps it busy for
      ever, is a failure.
    """
    if not num_workers:
        for utterance, views in work:
            yield prepare(utterance, how, views)
        return
    work, waiting = iter(work), deque()
    while True:
        # After a crash a new pool does what was under way: one by one, so that it is known who crashes it.
        alone = list(waiting)
        waiting.clear()
        for job in alone:
            yield _alone(job, how)
        if (yield from _pool(work, waiting, how, num_workers)):
            return


def _pool(work: Iterator[Work], waiting: deque, how: Recipe, num_workers: int) -> Iterator[Prepared]:
    """Runs until the work is done (returns ``True``), or until a process has died or hangs, with what was under way waiting."""
    futures: deque = deque()

    def first() -> Prepared:
        result = futures.popleft().result(TIMEOUT)
        waiting.popleft()
        return result

    with _executor(num_workers) as executor:
        try:
            for job in work:
                waiting.append(job)
                with interrupts_blocked():
                    futures.append(executor.submit(prepare, job[0], how, job[1]))
                if len(futures) >= num_workers * AHEAD:
                    yield first()
            while futures:
                yield first()
            return True
        except concurrent.futures.process.BrokenProcessPool:
            return False
        except TimeoutError:
            executor.kill()
            yield _given_up(waiting.popleft())
            return False


def _alone(job: Work, how: Recipe) -> Prepared:
    with _executor(1) as executor:
        try:
            with interrupts_blocked():
                future = executor.submit(prepare, job[0], how, job[1])
            return future.result(TIMEOUT)
        except concurrent.futures.process.BrokenProcessPool:
            return Prepared(
                job[0].place, failure=f"{job[0].path}: the process that decoded it died; is it damaged or too large?"
            )
        except TimeoutError:
            executor.kill()
            return _given_up(job)


def _given_up(job: Work) -> Prepared:
    return Prepared(job[0].place, failure=f"{job[0].path}: not decoded within {TIMEOUT:g} s; is it damaged?")


class _executor:
    """A pool of fresh processes, none of which is left, however the context is left."""

    def __init__(self, num_workers: int):
        self._context = Spawning()
        self._pool = concurrent.futures.ProcessPoolExecutor(
            num_workers, mp_context=self._context, initializer=_start, initargs=(os.getpid(),)
        )
        self.submit, self.kill = self._pool.submit, self._context.kill

    def __enter__(self) -> "_executor":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start(parent: int) -> None:
    """Workers compute on the processor: the device is the parent's."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    signals.end_with(parent)
