"""Instance-Cont: L_NCE (Eq. 1) alone, between two views of the video features of VoxCeleb2.

Views are stored variants (features of augmented clips) where the data set has them; else they are made of the features,
by masking and noise (config.views).

Command:  conclugen pretrain --config=instance_cont --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 41.2, MELD 46.3, CAER 34.6; ours: not measured.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.data.modalities = ("video",)
    config.loss.contrastive_weight = 0.0
    config.loss.clustering_weight = 0.0
    config.loss.reconstruction_weight = 0.0
    config.loss.instance_weight = 1.0
    config.optimizer.learning_rate = 3.6e-4
    return config
