"""Prepare utterances in processes beside the device, or in this one."""

from collections import deque
from collections.abc import Iterable, Iterator

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
        for utterance, views in work:
            yield prepare(utterance, how, views)
        return
    work, waiting = iter(work), deque()
    while True:
        # After a crash, repeat what was under way one by one, to know which utterance crashes its process.
        alone = list(waiting)
        waiting.clear()
        for job in alone:
            yield _alone(job, how)
        if (yield from _together(work, waiting, how, num_workers)):
            return


def _together(work: Iterator[Work], waiting: deque, how: Recipe, num_workers: int) -> Iterator[Prepared]:
    """Yield results until the work is done (returns ``True``), or a process died or hangs; ``waiting`` is then what is left."""
    futures: deque = deque()

    def first() -> Prepared:
        result = futures.popleft().result(TIMEOUT)
        waiting.popleft()
        return result

    with Pool(num_workers, start=_compute_on_processor) as pool:
        try:
            for job in work:
                waiting.append(job)
                futures.append(pool.submit(prepare, job[0], how, job[1]))
                if len(futures) >= num_workers * AHEAD:
                    yield first()
            while futures:
                yield first()
            return True
        except Died:
            return False
        except TimeoutError:
            pool.kill()
            yield _given_up(waiting.popleft())
            return False


def _alone(job: Work, how: Recipe) -> Prepared:
    utterance, views = job
    with Pool(1, start=_compute_on_processor) as pool:
        try:
            return pool.submit(prepare, utterance, how, views).result(TIMEOUT)
        except Died:
            failure = f"{utterance.path}: the process that decoded it died; is it damaged or too large?"
            return Prepared(utterance.place, failure=failure)
        except TimeoutError:
            pool.kill()
            return _given_up(job)


def _given_up(job: Work) -> Prepared:
    return Prepared(job[0].place, failure=f"{job[0].path}: not decoded within {TIMEOUT:g} s; is it damaged?")


def _compute_on_processor() -> None:
    """Leave the device to the parent."""
    import jax

    jax.config.update("jax_platforms", "cpu")
