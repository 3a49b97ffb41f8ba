"""ConCluGen on the embedded digits: the whole method, sized for two CPU cores.

Command:  conclugen demo
Hardware: two CPU cores. Time: see docs/benchmarks.md.
Score:    logistic regression on its representations, 10 draws of 2 / 5 / 20 labels per class: 90.6 / 95.3 / 97.2 %;
          on raw features 80.3 / 91.5 / 95.8 %.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.standardize = "split"
    config.model.bottleneck = ()
    config.model.representation_dim = 256
    config.model.projection_dim = 128
    config.model.reconstruction_dim = 256
    config.clustering.num_clusters = 10
    config.clustering.start_epoch = 12
    config.clustering.queue_batches = 2  # an epoch has only four steps
    config.optimizer.learning_rate = 1e-3
    config.train.batch_size = 350
    config.train.num_epochs = 60
    config.checkpoint.every_epochs = 20
    return config
