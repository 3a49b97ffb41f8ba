"""ConClu with hidden features and vectors smoothed over neighbours: recommended for data of one's own.

Against ConCluGen: no reconstruction; 0.3 of the input features are hidden at each step; the queue is kept from epoch to epoch,
so that L_Clu counts at every step; vectors are those before the last relu, averaged with their 20 nearest training rows.
Where groups are persons who show all classes, add --config.data.standardize=person (docs/usage.md says when).

Command:  conclugen pretrain --config=conclu_neighbours --data=DATA/mine/1.0.0 --workdir=RUN
Hardware: two CPU cores, or any GPU.
"""

from configs import demo


def get_config():
    config = demo.get_config()
    config.loss.reconstruction_weight = 0.0
    config.augmentation.feature_dropout = 0.3
    config.clustering.queue_reset = "never"
    config.evaluation.vectors = "pre_activation"
    config.evaluation.smoothing_neighbours = 20
    return config
