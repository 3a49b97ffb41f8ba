"""ConGen: L_MMS + L_Rec (Eq. 13) on VoxCeleb2 features.

Command:  conclugen pretrain --config=congen --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 53.3, MELD 57.4, CAER 35.8; ours: not measured.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.loss.clustering_weight = 0.0
    config.optimizer.learning_rate = 3.6e-4
    return config
