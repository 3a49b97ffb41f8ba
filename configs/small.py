"""The recommended method for a small data set of one's own: smaller networks, batches of 64, 8 clusters.

Command:  conclugen pretrain --config=small --data=DATA/mine/1.0.0 --workdir=RUN
          A training split of less than 192 clips needs a smaller --batch_size; a third of the clips is a good size.
Hardware: two CPU cores, or any GPU. Time: not measured.
Score:    not measured; the same method on digits and RAVDESS: docs/understand/evidence.md.
"""

from configs import conclu_neighbours


def get_config():
    config = conclu_neighbours.get_config()
    config.clustering.num_clusters = 8
    config.train.batch_size = 64
    return config
