"""Fine-tuning of a pretraining checkpoint: classifier and representation networks, with the paper's rates for MELD.

Command:  conclugen downstream --config=fine_tuning --data=DATA/meld/1.0.0 --checkpoint=PRETRAINING_RUN --workdir=RUN
          CAER:      --config.optimizer.learning_rate=6.1e-3 --config.optimizer.weight_decay=8.216e-2
          CMU-MOSEI: --config.optimizer.learning_rate=9.96e-3 --config.optimizer.weight_decay=7e-5
          A rate of their own for the representation networks: --config.downstream.encoder_rate=0.1
Time:     not measured.
Score:    published accuracy of ConCluGen: CMU-MOSEI 66.48, CAER 50.75, MELD 60.03; ours: not measured.
"""

from configs import linear_evaluation


def get_config():
    config = linear_evaluation.get_config()
    config.downstream.protocol = "fine_tuning"
    return config
