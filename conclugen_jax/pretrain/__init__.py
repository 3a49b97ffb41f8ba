"""Pretraining: the step, and the run around it. Uses ``evaluate`` (online probes) and the rooms below."""

from conclugen_jax.pretrain.setup import pretrain_step
from conclugen_jax.pretrain.training import OnEpoch, pretrain

__all__ = ["OnEpoch", "pretrain", "pretrain_step"]
