"""The two compiled programs of a run: without and with clustering in the objective."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from conclugen_jax.method.train_state import Metrics, TrainState
from conclugen_jax.pretrain.setup import Setup
from conclugen_jax.system import progress
from conclugen_jax.train import memory, parallel, sharded_update
from conclugen_jax.train.loop import Dispatch


class Programs:
    """Runs dispatches; each program is compiled when the first dispatch needs it."""

    def __init__(self, run: Setup):
        self._run = run
        self._compiled: dict[bool, Callable] = {}

    def lacks(self, dispatch: Dispatch) -> bool:
        """Whether the program of a dispatch is still to be compiled."""
        return not dispatch.left_out and self._run.clusters(dispatch.epoch) not in self._compiled

    def compile(self, dispatch: Dispatch, state: TrainState, inputs: Any, display: progress.Display) -> None:
        """Compile the program of a dispatch.

        Raises:
          ConclugenError: it takes more memory than the device has.
        """
        run, start, cluster = self._run, time.monotonic(), self._run.clusters(dispatch.epoch)
        axes = sharded_update.axes(state, run.config, run.devices)
        program = run.batches.program(functools.partial(run.step, cluster=cluster), axes)
        compiled = parallel.compiled(program, state, *inputs)
        memory.check(compiled, jax.local_devices()[0], run.memory(state), run.config)
        kind = "with" if cluster else "without"
        display.say(f"{run.title}: compiled {kind} clustering in {time.monotonic() - start:.1f} s")
        self._compiled[cluster] = compiled

    def __call__(self, dispatch: Dispatch, state: TrainState, inputs: Any) -> tuple[TrainState, Metrics]:
        """Return the state after a dispatch, and its metrics; one that is left out changes the count of steps alone."""
        if dispatch.left_out:
            return state.replace(step=parallel.replicate(np.int32(dispatch.end_step), self._run.devices)), {}
        return self._compiled[self._run.clusters(dispatch.epoch)](state, *inputs)
