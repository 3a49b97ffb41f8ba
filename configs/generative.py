"""Generative: L_Rec alone on VoxCeleb2 features.

Command:  conclugen pretrain --config=generative --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 46.9, MELD 52.1, CAER 37.3; ours: not measured.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.loss.contrastive_weight = 0.0
    config.loss.clustering_weight = 0.0
    config.optimizer.learning_rate = 3.6e-4
    return config
