"""Several processes that share one run: which one writes, what all get from it, and how they end together.

The connections on which they met stay open: a process that fails tells the others why, and one that is gone is noticed at once.
"""

import os
import sys
import threading
import time
from typing import Any

import numpy as np

from conclugen_jax.system import cluster

_party: "Party | None" = None


def is_main() -> bool:
    """Return whether this process writes the files of the run: process 0 does, and a process that is alone."""
    return _party is None or _party.place.index == 0


def several() -> bool:
    """Return whether this process shares its run with others."""
    return _party is not None


def start(timeout: float) -> None:
    """Join the processes that the environment describes; to be called before anything else of JAX.

    All must come within ``timeout`` seconds, after which a silent process counts as gone, too.

    Raises:
      ConclugenError: the environment describes none, or not all have come in time.
    """
    global _party
    place = cluster.from_environment()
    if place.count == 1:
        return
    _party = Party(place, cluster.meet(place, timeout))
    import jax  # late: commands without JAX import this module, too

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the run
    names = "initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        **dict.fromkeys(names, max(1, round(timeout))),
    )
    # Let all devices meet in one sum. On CPUs the first collective operation waits 30 s for the other processes; later it
    # would come after a compilation, which may take one process much longer than another that finds its programs in the cache.
    mesh = jax.sharding.Mesh(jax.devices(), "devices")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    jax.block_until_ready(jax.make_array_from_callback((mesh.size,), split, lambda _: np.ones(1, np.float32)).sum())


def of_main(tree: Any) -> Any:
    """Return the tree of NumPy arrays of process 0, bit for bit; shapes and types are the same on every process."""
    if not several():
        return tree
    import jax
    from jax.experimental import multihost_utils

    def broadcast(x: np.ndarray) -> np.ndarray:
        # Send bytes: the broadcast sums values, which changes -0.0 and NaN.
        sent = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return np.asarray(sent).view(x.dtype).reshape(x.shape)

    return jax.tree.map(broadcast, tree)


def text_of_main(text: str) -> str:
    """Return the text of process 0 on every process."""
    data = text.encode()
    length = int(of_main(np.array([len(data)], np.int64))[0])
    return of_main(np.frombuffer(data[:length].ljust(length), np.uint8)).tobytes().decode()


def wait() -> None:
    """Wait until all processes have called this."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("conclugen_jax")


def fail(sentence: str, code: int) -> None:
    """Print why this process fails, tell the others, and end at once; return if it is alone."""
    if _party is not None:
        _party.end(sentence, code, f"process {_party.place.index}: {sentence}")


def leave() -> None:
    """Wait until the other processes are done as well; return at once if this one is alone."""
    if _party is not None:
        _party.leave()


class Party:
    """This process among those that have met; a thread for each line hears what becomes of the process there."""

    def __init__(self, place: cluster.Place, lines: dict[int, cluster.Line]):
        self.place, self._lines = place, lines
        self._ending = threading.Lock()  # held by the thread that ends this process
        self._left = threading.Semaphore(0)  # processes that have said that they leave
        self._hearing = [threading.Thread(target=self._hear, args=x, daemon=True) for x in lines.items()]
        for thread in self._hearing:
            thread.start()

    def _hear(self, number: int, line: cluster.Line) -> None:
        gone = (
            f"process {number} is gone (killed, out of memory, or its machine or network failed); repeat the command on "
            "all machines to resume"
        )
        while word := line.receive():
            if "error" in word:
                self.end(word["error"], word["code"])
            gone = ""
            self._left.release()
        if gone:
            self.end(gone, 1)

    def end(self, sentence: str, code: int, told: str = "") -> None:
        """End this process with a sentence, and all others with what they are told; only the first thread to call does."""
        if not self._ending.acquire(blocking=threading.current_thread() not in self._hearing):
            return
        try:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            for line in self._lines.values():
                line.send(error=told or sentence, code=code)
            if self.place.index == 0:  # JAX aborts all others as soon as process 0 is gone
                deadline = time.monotonic() + cluster.PATIENCE
                for thread in self._hearing:
                    if thread is not threading.current_thread():
                        thread.join(max(0, deadline - time.monotonic()))
        finally:  # also where standard error is closed
            os._exit(code)

    def leave(self) -> None:
        """Return when all processes have called this: the others tell process 0, which then tells them."""
        if self.place.index == 0:
            for _ in self._lines:
                self._left.acquire()
        for line in self._lines.values():
            line.send(leaving=True)
        if self.place.index != 0:
            self._left.acquire()
