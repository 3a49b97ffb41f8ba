"""ConClu: L_MMS + L_Clu (Eq. 12) on VoxCeleb2 features.

Command:  conclugen pretrain --config=conclu --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 57.4, MELD 58.0, CAER 36.6; ours: not measured.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.loss.reconstruction_weight = 0.0
    return config
