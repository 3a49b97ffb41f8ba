"""ConCluGen in pure JAX: contrastive, clustering and generative pretraining over frozen multi-modal features."""

__version__ = "0.1.0"
