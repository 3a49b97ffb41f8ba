"""ConClu with neighbours as positives and vectors smoothed over neighbours: recommended for data of one's own.

Against ConCluGen: no reconstruction; a modality of an example may come from one of its five nearest neighbours; the queue is
kept from epoch to epoch, so that L_Clu counts at every step; vectors are those before the last relu, averaged with their 20
nearest training rows. Where groups are persons who show all classes, add
--config.data.standardize=person (docs/understand/persons.md).

Command:  conclugen pretrain --config=conclu_neighbours --data=DATA/mine/1.0.0 --workdir=RUN
Hardware: two CPU cores, or any GPU. Time: 240 steps of 350 digits in 5 s on one core, without compilation.
Score:    accuracy in % with 2 / 5 / 20 / all labels per class, 12 seeds or folds, docs/understand/evidence.md:
          digits  96.5 / 97.2 / 97.6 / 98.0; ConCluGen 89.7 / 94.7 / 96.8 / 98.0; raw features 79.7 / 90.3 / 95.7 / 97.5;
          RAVDESS 57.7 / 65.0 / 72.8 / 77.3; ConCluGen 51.8 / 62.4 / 72.5 / 77.1; raw features 37.8 / 50.0 / 65.4 / 75.6, all by
          person; untrained network, smoothed alike 54.9 / 63.1 / 71.8 / 76.6. Other data: not measured.
"""

from configs import demo


def get_config():
    config = demo.get_config()
    config.loss.reconstruction_weight = 0.0
    config.loss.neighbours = 5
    config.clustering.queue_reset = "never"
    config.evaluation.vectors = "pre_activation"
    config.evaluation.smoothing_neighbours = 20
    config.evaluation.c_times_dim = 30.0
    return config
