"""Signals: noted, raised where nothing is lost, not kept waiting by compiled code, and the second one final."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from conclugen_jax.system import processes, signals


def send(number, after=0.2):
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", signals.CAUGHT)
def test_where_nothing_is_lost_a_signal_ends_the_work_with_its_code(number):
    start, cleaned = time.monotonic(), []

    def work():
        with signals.caught() as stop, stop.at_once():
            send(number)
            try:
                time.sleep(20)
            finally:
                cleaned.append(True)

    with pytest.raises(signals.Interrupted) as ended:
        work()
    assert ended.value.code == 128 + number
    assert time.monotonic() - start < 10
    assert cleaned


def test_elsewhere_it_is_noted_and_raised_by_the_next_place_where_nothing_is_lost(capfd):
    with signals.caught() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.signal == signal.SIGTERM
        assert "once more to stop at once" in capfd.readouterr().err
        with pytest.raises(signals.Interrupted), stop.at_once():
            pytest.fail("went on")


def test_where_nothing_is_lost_a_signal_to_one_of_several_processes_ends_all(monkeypatch):
    ended = []
    monkeypatch.setattr(processes, "fail", lambda *told: ended.append(told))

    def work():
        with signals.caught() as stop, stop.at_once():
            send(signal.SIGTERM)
            time.sleep(20)

    with pytest.raises(signals.Interrupted):
        work()
    with signals.caught() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert len(ended) == 1
        with pytest.raises(signals.Interrupted), stop.at_once():
            pytest.fail("went on")
    assert ended == [("stopped; repeat the command to resume", 143), ("stopped; repeat the command to resume", 130)]


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in signals.CAUGHT]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with signals.caught() as outer:
        with signals.caught() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in signals.CAUGHT] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup


def ended(program, *numbers):
    """Exit code and seconds of a program that prints "ready", then gets signals, half a second between two."""
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    started.stdout.readline()
    start = time.monotonic()
    for number in numbers:
        time.sleep(0.5)
        started.send_signal(number)
    code = started.wait(timeout=60)
    started.stdout.close()
    return code, time.monotonic() - start


COMPILED_CODE = """
import numpy as np
from conclugen_jax.system import processes, signals
signals.GRACE = 0.5
x = np.random.default_rng(0).normal(size=(4000, 4000))
with signals.caught() as stop:
    {context}
        print("ready", flush=True)
        for _ in range(100):
            np.linalg.svd(x)  # much longer than the test waits; no handler of Python runs meanwhile
"""


@pytest.mark.slow
def test_compiled_code_does_not_keep_a_signal_waiting_where_nothing_is_lost():
    code, seconds = ended(COMPILED_CODE.format(context="with stop.at_once():"), signal.SIGTERM)
    assert code == 143
    assert seconds < 10


@pytest.mark.slow
def test_compiled_code_that_must_end_is_waited_for_and_a_second_signal_ends_it():
    code, seconds = ended(COMPILED_CODE.format(context="if True:"), signal.SIGINT, signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert 1 < seconds < 10


KEPT = """
import time
from conclugen_jax.system import processes, signals
signals.GRACE = 0.5
with signals.caught() as stop, stop.at_once():
    print("ready", flush=True)
    try:
        time.sleep(30)
    except SystemExit:
        pass
    time.sleep(30)
"""


@pytest.mark.slow
def test_code_that_keeps_the_exception_does_not_keep_the_process():
    code, seconds = ended(KEPT, signal.SIGTERM)
    assert code == 143
    assert seconds < 10


class Ending:
    """Gets a signal while it is deleted, where Python lets no exception out."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


def test_a_signal_in_a_place_that_lets_no_exception_out_is_noted_quietly(capfd):
    hook, thing = sys.unraisablehook, [Ending()]
    with signals.caught() as stop:
        with stop.at_once():
            thing.clear()
        assert stop.signal == signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err
    assert sys.unraisablehook is hook


def test_the_thread_takes_any_number_of_a_file():
    """As in a process with more than 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    try:
        out, into = os.pipe()
        high = fcntl.fcntl(out, fcntl.F_DUPFD, 1500)
        thread = threading.Thread(target=signals.Stop().watch, args=(high,), daemon=True)
        thread.start()
        os.write(into, b"\0")
        thread.join(10)
        assert not thread.is_alive()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(high)  # it was closed by the thread, which did not fail
    finally:
        os.close(out)
        os.close(into)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
