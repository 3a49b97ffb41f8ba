"""Worker processes: results in order, few jobs ahead, deaths noticed, none left behind."""

import functools
import os
import signal
import time

import pytest

from conclugen_jax.errors import ConclugenError
from conclugen_jax.study import sharing
from conclugen_jax.system import pool


def square(x):
    return x * x


def pid_after(number):
    """Send this worker a signal, and return its process id."""
    os.kill(os.getpid(), number)
    return os.getpid()


def sleep(seconds):
    time.sleep(seconds)


def fail_once(folder):
    """Fail in the first process that comes here; take longer, and leave a file, in others."""
    try:
        (folder / "failed").mkdir()
    except FileExistsError:
        time.sleep(1)
        return (folder / "finished").touch()
    raise ConclugenError("a mistake")


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_are_in_order_and_jobs_are_read_as_they_are_needed():
    read = []

    def jobs():
        for i in range(20):
            read.append(i)
            yield i

    with pool.Pool(2) as workers:
        results = workers.map(square, jobs(), ahead=1)
        assert next(results) == 0
        assert len(read) == 4
        assert list(results) == [i * i for i in range(1, 20)]


@pytest.mark.slow
def test_interrupts_are_not_the_business_of_workers_and_a_kill_is_noticed():
    with pool.Pool(1) as workers:
        assert workers.submit(pid_after, signal.SIGINT).result() == workers.submit(os.getpid).result()
        with pytest.raises(pool.Died):
            workers.submit(pid_after, signal.SIGKILL).result()


@pytest.mark.slow
def test_an_error_leaves_no_worker_behind():
    def fail():
        with pool.Pool(1) as workers:
            pids.append(workers.submit(os.getpid).result())
            workers.submit(sleep, 60)
            raise KeyboardInterrupt

    pids, start = [], time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert time.monotonic() - start < 40
    assert not lives(pids[0])


def test_it_tells_how_workers_ended():
    with pool.Pool(1) as workers:
        with pytest.raises(pool.Died):
            workers.submit(os._exit, 3).result()
        assert workers.close() == [3]
    with pool.Pool(1) as workers:
        workers.submit(os.getpid).result()
        workers.terminate()
        assert workers.close() == [-signal.SIGTERM]


def test_an_error_of_one_process_that_shares_work_ends_no_other(tmp_path):
    with pytest.raises(ConclugenError, match=r"^a mistake$"):
        sharing.share(2, functools.partial(fail_once, tmp_path), tmp_path)
    assert (tmp_path / "finished").exists()
