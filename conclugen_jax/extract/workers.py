"""Prepare utterances in processes beside the device, or in this one."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator

import jax

from conclugen_jax.extract.clips import Utterance
from conclugen_jax.extract.preparation import Prepared, Recipe, prepare
from conclugen_jax.system.pool import Died, Pool

AHEAD = 2
"""Utterances per process that are under way or wait for the device; each holds its frames."""

TIMEOUT = 900.0
"""Seconds after which an utterance is given up, in case a decoder never ends."""

Work = tuple[Utterance, int]
"""An utterance and its number of views."""


def prepared(work: Iterable[Work], how: Recipe, num_workers: int) -> Iterator[Prepared]:
    """Prepare utterances, in order.

    Args:
      work: utterances with their numbers of views.
      how: to prepare them.
      num_workers: processes; 0: this one.

    Yields:
      What was prepared of each. An utterance that crashes the process that decodes it, or keeps it busy for ever, is a failure.
    """
    if not num_workers:
        yield from (prepare(utterance, how, views) for utterance, views in work)
        return
    work = iter(work)
    while left := (yield from _in_processes(work, how, num_workers)):
        for job in left:  # after a crash one by one, to know which utterance crashes its process
            if (yield from _in_processes(iter([job]), how, 1)):
                failure = f"{job[0].path}: the process that decoded it died; is it damaged or too large?"
                yield Prepared(job[0].place, failure=failure)


def _in_processes(work: Iterator[Work], how: Recipe, num_workers: int) -> Generator[Prepared, None, list[Work]]:
    """Yield results until the work is done, or a process died or hangs; return what was under way then."""
    jobs, futures = deque(), deque()
    with Pool(num_workers, start=_compute_on_processor) as pool:
        try:
            while True:
                while len(jobs) < num_workers * AHEAD and (job := next(work, None)):
                    jobs.append(job)
                    futures.append(pool.submit(prepare, job[0], how, job[1]))
                if not jobs:
                    return []
                result = futures.popleft().result(TIMEOUT)
                jobs.popleft()
                yield result
        except Died:
            return list(jobs)
        except TimeoutError:
            pool.kill()
            utterance, _ = jobs.popleft()
            failure = f"{utterance.path}: not decoded within {TIMEOUT:g} s; is it damaged?"
            yield Prepared(utterance.place, failure=failure)
            return list(jobs)


def _compute_on_processor() -> None:
    """Leave the device to the parent."""
    jax.config.update("jax_platforms", "cpu")
