"""Linear evaluation of a pretraining checkpoint, with the paper's rates for MELD.

Command:  conclugen downstream --config=linear_evaluation --data=DATA/meld/1.0.0 --checkpoint=PRETRAINING_RUN --workdir=RUN
          CAER:      --config.optimizer.learning_rate=6.1e-3 --config.optimizer.weight_decay=8.216e-2
          CMU-MOSEI: --config.optimizer.learning_rate=9.96e-3 --config.optimizer.weight_decay=7e-5
Time:     not measured.
Score:    published weighted accuracy of ConCluGen: CMU-MOSEI 60.4, MELD 56.6, CAER 37.5; ours: not measured.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.downstream.protocol = "linear_evaluation"
    config.optimizer.learning_rate = 9.67e-3
    config.optimizer.weight_decay = 4e-5
    return config
