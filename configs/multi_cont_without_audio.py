"""Multi-Cont on video and text.

Command:  conclugen pretrain --config=multi_cont_without_audio --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 53.4, MELD 54.3, CAER 35.1; ours: not measured.
"""

from configs import multi_cont


def get_config():
    config = multi_cont.get_config()
    config.data.modalities = ("video", "text")
    config.model.bottleneck = ()  # it names audio
    return config
