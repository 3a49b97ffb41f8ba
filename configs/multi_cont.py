"""Multi-Cont: L_MMS alone on VoxCeleb2 features. The paper leaves its weight decay blank; here it is that of the others.

Command:  conclugen pretrain --config=multi_cont --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 56.4, MELD 57.2, CAER 34.6; ours: not measured.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.loss.clustering_weight = 0.0
    config.loss.reconstruction_weight = 0.0
    config.optimizer.learning_rate = 3.6e-4
    return config
