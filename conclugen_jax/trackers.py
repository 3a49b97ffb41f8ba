"""Mirrors of the metrics log for outside tools. ``metrics.jsonl`` stays the record; a mirror may fail."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conclugen_jax.errors import ConclugenError

FOLDER = "tensorboard"


class TensorBoard:
    """Event files for TensorBoard in ``WORKDIR/tensorboard``, written by tensorboardX."""

    def __init__(self, workdir: Path, step: int):
        """Open event files that go on after a step; what a killed run wrote beyond it is hidden.

        Raises:
          ConclugenError: tensorboardX is not installed.
        """
        try:
            import tensorboardX
        except ImportError as e:
            raise ConclugenError(
                "config.train.tensorboard is True but tensorboardX is not installed; pip install tensorboardX or set the "
                "key to False"
            ) from e
        self._writer = tensorboardX.SummaryWriter(str(workdir / FOLDER), purge_step=step + 1)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add one point per number of every record, at the record's step."""
        for record in records:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
