"""ConCluGen for some hundred to some thousand clips, such as a data set of one's own: the whole method in smaller networks.

Command:  conclugen pretrain --config=small --data=DATA/mine/1.0.0 --workdir=RUN
          A training split of less than 192 clips takes a smaller --batch_size: an epoch has three steps at least.
Hardware: two CPU cores, or any GPU. Time: not measured.
Score:    not measured; the same sizes on digits: configs/demo.py, on RAVDESS: docs/ravdess.md.
"""

from configs import demo


def get_config():
    config = demo.get_config()
    config.clustering.num_clusters = 8
    config.train.batch_size = 64
    return config
