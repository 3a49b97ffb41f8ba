"""ConClu with hidden features and vectors smoothed over neighbours: recommended for data of one's own.

Against ConCluGen: no reconstruction; 0.3 of the input features are hidden at each step; the queue is kept from epoch to epoch,
so that L_Clu counts at every step; vectors are those before the last relu, averaged with their 20 nearest training rows.
Where groups are persons who show all classes, add --config.data.standardize=person (docs/usage.md says when).

Command:  conclugen pretrain --config=conclu_neighbours --data=DATA/mine/1.0.0 --workdir=RUN
Hardware: two CPU cores, or any GPU. Time: on the digits of the demo 20 s on two cores, half of it compilation.
Score:    digits, one training, logistic regression (C = 1), 10 draws of 2 / 5 / 20 labels per class: 96.0 / 96.8 / 97.5 %, raw
          features smoothed alike 87.4 / 93.7 / 96.4 %. RAVDESS by person, 16 actors for training and 8 for test, three folds
          shuffled twice, 5 draws: 59.0 / 63.7 / 70.1 %; raw features alike 40.7 / 52.4 / 65.0 %, the untrained network 56.3 /
          62.8 / 70.2 %. Other data: not measured.
"""

from configs import demo


def get_config():
    config = demo.get_config()
    config.model.representation_dim = 256
    config.model.projection_dim = 128
    config.loss.reconstruction_weight = 0.0
    config.loss.neighbours = 5
    config.clustering.queue_reset = "never"
    config.evaluation.vectors = "pre_activation"
    config.evaluation.smoothing_neighbours = 20
    config.evaluation.c_times_dim = 30.0
    return config
