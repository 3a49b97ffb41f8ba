"""Saves in the background: one at a time, each tried twice, with a limit for failures in a row."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from conclugen_jax.errors import ConclugenError, reason
from conclugen_jax.system import progress

PATIENCE = 1200.0
"""Seconds after which a save counts as hanging."""


class Saver:
    """Run saves in a thread that does not keep the process from ending.

    Attributes:
      failure: of the newest save, once that has ended.
    """

    def __init__(self, folder: Path, max_failures: int):
        """Prepare for saves.

        Args:
          folder: of the checkpoints, for messages.
          max_failures: number of failures in a row that raise.
        """
        self._folder, self._max_failures, self._failures = folder, max_failures, 0
        self.failure: ConclugenError | None = None
        self._thread: threading.Thread | None = None

    def start(self, step: int, save: Callable[[], None], make_room: Callable[[], None]) -> None:
        """Start a save; :meth:`check` has been called before.

        Args:
          step: of the checkpoint, for messages.
          save: writes it.
          make_room: called after a failure, before the second try.
        """
        # A daemon: a disk that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(step, save, make_room), daemon=True)
        self._thread.start()

    def _run(self, step: int, save: Callable[[], None], make_room: Callable[[], None]) -> None:
        try:
            try:
                save()
            except Exception:
                make_room()
                save()
            self.failure, self._failures = None, 0
        except Exception as e:  # Orbax and TensorStore raise many kinds
            self.failure = ConclugenError(
                f"{self._folder}: checkpoint of step {step} cannot be written ({type(e).__name__}: {reason(e, 120)}); free "
                "space and repeat the command to resume"
            )
            self._failures += 1
            with contextlib.suppress(Exception):
                make_room()
            if self._failures < self._max_failures:
                progress.say(f"warning: {self.failure}; the run goes on")

    def join(self) -> None:
        """Wait for the save under way.

        Raises:
          ConclugenError: it hangs.
        """
        if self._thread is None:
            return
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise ConclugenError(
                f"{self._folder}: a checkpoint is still not written after {PATIENCE:.0f} s; the disk does not answer, repeat "
                "the command when it does"
            )
        self._thread = None

    def check(self) -> None:
        """Wait for the save under way.

        Raises:
          ConclugenError: it hangs, or too many saves in a row have failed.
        """
        self.join()
        if self._failures >= self._max_failures:
            raise self.failure

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
          ConclugenError: it hangs, or has failed.
        """
        self.join()
        if self.failure:
            raise self.failure
