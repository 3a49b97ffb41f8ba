"""Multi-Cont on video and audio. Any modality is dropped by name, as here.

Command:  conclugen pretrain --config=multi_cont_without_text --data=DATA/voxceleb2/1.0.0 --workdir=RUN
Hardware: one GPU of 24 GiB or more, or a TPU host. Time: not measured.
Score:    published, linear evaluation, weighted accuracy: CMU-MOSEI 42.5, MELD 48.1, CAER 23.2; ours: not measured.
"""

from configs import multi_cont


def get_config():
    config = multi_cont.get_config()
    config.data.modalities = ("video", "audio")
    return config
