"""ConCluGen in pure JAX: contrastive, clustering and generative pretraining over frozen multi-modal features.

The names that most programs need can be had from here, as in ``from conclugen_jax import losses``; each is imported when it is
first asked for.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see of the names below
    from conclugen_jax import pretrain as pretrain
    from conclugen_jax.evaluate import downstream as downstream, notebook as notebook, probe as probe
    from conclugen_jax.method import clustering as clustering, losses as losses, model as model
    from conclugen_jax.pipeline.api import run as run
    from conclugen_jax.pipeline.estimator import ConCluGen as ConCluGen
    from conclugen_jax.train import optimizer as optimizer

__version__ = "0.2.0"

_NAMES = {
    "losses": "method.losses",
    "clustering": "method.clustering",
    "model": "method.model",
    "optimizer": "train.optimizer",
    "pretrain": "pretrain",
    "downstream": "evaluate.downstream",
    "probe": "evaluate.probe",
    "notebook": "evaluate.notebook",
    "run": "pipeline.api:run",
    "ConCluGen": "pipeline.estimator:ConCluGen",
}
"""Name -> module, or ``module:attribute``."""


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    return getattr(found, attribute) if attribute else found
