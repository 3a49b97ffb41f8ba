"""The log lines of a run: the clock stands still while it is paused."""

import time
import types

import pytest

from conclugen_jax.pretrain.recorder import Recorder
from conclugen_jax.train.feed import Dispatch
from tests.helpers import tiny_config


def test_what_happens_in_a_pause_is_left_out_of_the_speed(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = types.SimpleNamespace(write=lines.extend)
    display = types.SimpleNamespace(update=lambda *_, **__: None)
    recorder = Recorder(tiny_config(train__batch_size=16), log, display, {"epoch_sums": {}, "epoch_steps": {}})

    def dispatched(first):
        now[0] += 1.0
        metrics = {"loss": [1.0, 1.0], "gradient_norm": [1.0, 1.0]}
        recorder.take(Dispatch(0, first, 2, first + 2, False), metrics)

    dispatched(0)
    with recorder.paused():  # writes what is pending
        assert [line["step"] for line in lines] == [1, 2]
        now[0] += 100.0
    dispatched(2)
    recorder.flush()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # Two steps of 16 examples a second, both before and after the pause.
    assert [line["examples_per_second"] for line in lines] == pytest.approx([32.0] * 4)
