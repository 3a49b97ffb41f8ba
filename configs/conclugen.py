"""ConCluGen at the paper's scale: L_MMS + L_Clu + L_Rec (Eq. 11) on VoxCeleb2 features.

Command:  conclugen pretrain --config=conclugen --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 60.4, MELD 56.6, CAER 37.5; ours: not measured.
"""

from configs import base


def get_config():
    return base.get_config()
