"""Supervised baseline: the network of linear evaluation from random weights, encoder trained too.

Command:  conclugen downstream --config=supervised --data=DATA/meld/1.0.0 --workdir=RUN
Time:     not measured.
Score:    published accuracy: CMU-MOSEI 57.88, CAER 34.43, MELD 55.97; ours: not measured.
"""

from configs import linear_evaluation


def get_config():
    config = linear_evaluation.get_config()
    config.downstream.protocol = "supervised"
    return config
